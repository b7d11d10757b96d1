"""The acceptance checklist of the wire contract (numbers 1 to 13), line by line, and what old and
odd clients send.

Number 14, the vendors' own clients, is in `tests/sdk` and `tests/browser`.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from broker import errors
from broker.dialects.flex import routes as flex
from broker.errors import Refusal
from broker.model import Policy
from tests.conftest import OpenApp, Started, Starter
from tests.dialects.flex.contract import DEVICES, USER, USERS, strict
from tests.support.authenticator import Authenticator, b64, flex_wire_form, unb64
from tests.support.signals import counted, lines, refused, same_answer
from tests.support.wire import ORIGIN, Wire

START = "/authenticate/transactions/webauthn/start"


async def user_of(wire: Wire, external_id: str) -> dict[str, Any]:
    found = (await wire.keyed("GET", f"/users?identifier={quote(external_id)}&limit=1")).json[
        "users"
    ]
    whole = (await wire.keyed("GET", f"/users/{found[0]['id']}")).json
    return dict(whole["user"])


# -- 1 to 5: the management API --------------------------------------------------------------------


async def test_1_both_apis_on_one_origin_and_a_trailing_slash(broker: Started, wire: Wire) -> None:
    with_key = {"Authorization": f"Bearer {wire.key}"}
    for path in ("", "/"):
        assert "rsa_public_key" in (await wire.send("GET", path, headers=with_key)).json["app"]
        assert "rsa_public_key" not in (await wire.send("GET", path)).json["app"]
        with refused(broker, "invalid_access_token", "key_unknown"):
            wrong = await wire.send(
                "GET", path, headers={"Authorization": "Bearer pbk_" + "a" * 43}
            )
        assert (wrong.status, wrong.code) == (401, "invalid_access_token")
    assert (await wire.page(START, {})).status == 200
    assert {line["route"] for line in lines(broker, status=200)} == {
        "/v1/apps/{app_id}",
        "/v1/apps/{app_id}/",
        "/v1/apps/{app_id}" + START,
    }


async def test_2_a_key_on_management_none_in_the_browser(
    broker: Started, wire: Wire, open_app: OpenApp
) -> None:
    other = await open_app()
    fields = {"external_id": "ann", "passkey_display_name": "Ann"}
    with refused(broker, "invalid_access_token", "key_of_another_app"):
        answer = await wire.keyed("POST", "/transactions/register", fields, key=other.key)
    assert (answer.status, answer.code) == (401, "invalid_access_token")
    with refused(broker, "invalid_access_token", "key_malformed"):
        answer = await wire.keyed("POST", "/transactions/register", fields, key="wrong")
    assert (answer.status, answer.code) == (401, "invalid_access_token")
    assert (await wire.page(START, {})).status == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_2_the_scheme_is_case_insensitive(wire: Wire, scheme: str) -> None:
    answer = await wire.send("GET", "/users", headers={"Authorization": f"{scheme} {wire.key}"})
    assert answer.status == 200


async def test_3_statuses_of_success(broker: Started, wire: Wire, device: Authenticator) -> None:
    fields = {"external_id": "ann", "passkey_display_name": "Ann"}
    opened = await wire.keyed("POST", "/transactions/register", fields)
    assert opened.status == 201
    nonce = await wire.register(opened.json["transaction_id"], device)
    assert (
        await wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"})
    ).status == 201
    assert (await wire.redeem(nonce)).status == 200
    with refused(broker, "invalid_nonce", "nonce_replayed"):
        again = await wire.redeem(nonce)
    assert (again.status, again.json["error"]) == (
        401,
        "nonce is invalid, expired, or cannot be found",
    )
    user = await user_of(wire, "ann")
    passkey = user["webauthn_devices"][0]["id"]
    gone = await wire.keyed("DELETE", f"/users/{user['id']}/devices/{passkey}")
    assert (gone.status, gone.body) == (200, b"")
    assert ("passkey.revoked", "done", None) in await broker.events(wire.app_id)


@pytest.mark.parametrize(
    "external_id",
    [
        "ann@example.org",
        "ann+tag@example.org",
        "Ann Smith",
        "ann/smith",
        "añá 漢字 😀",
        "100%",
        "a&b=c",
        "<ne:ann>",
        "<like:%>",
        "e\u0301",
        " ann ",
        "#?",
        "x" * 256,
        "😀" * 256,
    ],
)
async def test_4_identifier_is_literal_in_either_encoding(wire: Wire, external_id: str) -> None:
    """One client percent-encodes (`%20`, `%2B`), the other form-encodes (`+` for a space)."""
    await wire.open_registration(external_id)
    await wire.open_registration("ann")
    for encoded in (quote(external_id, safe=""), quote(external_id, safe=" ").replace(" ", "+")):
        listed = (await wire.keyed("GET", f"/users?identifier={encoded}&limit=1")).json
        assert [u["external_id"] for u in listed["users"]] == [external_id]
        assert listed["total_users"] == 1


@pytest.mark.parametrize("unknown", ["", "ANN", "an", "ann ", "<ne:eve>", "<like:ann>", "x" * 300])
async def test_4_unknown_identifier_is_an_empty_list(
    broker: Started, wire: Wire, unknown: str
) -> None:
    await wire.open_registration("ann")
    answer = await wire.keyed("GET", f"/users?identifier={quote(unknown)}&limit=1&page=1")
    assert answer.status == 200
    strict(answer.json, USERS)
    assert (answer.json["users"], answer.json["total_users"]) == ([], 0)
    assert lines(broker, route="/v1/apps/{app_id}/users", status=200)


async def test_4_pages_never_hold_more_than_limit(wire: Wire) -> None:
    for number in range(7):
        await wire.open_registration(f"user-{number}")
    seen: list[str] = []
    for page in (1, 2, 3, 4):
        answer = (await wire.keyed("GET", f"/users?limit=3&page={page}")).json
        assert len(answer["users"]) <= 3
        assert (answer["page"], answer["limit"], answer["total_users"]) == (page, 3, 7)
        seen += [user["external_id"] for user in answer["users"]]
    assert seen == [f"user-{number}" for number in range(7)]
    assert len((await wire.keyed("GET", "/users")).json["users"]) == 7
    newest = (await wire.keyed("GET", "/users?order_by=created_at:DESC&limit=2")).json["users"]
    assert [user["external_id"] for user in newest] == ["user-6", "user-5"]
    pending = (await wire.keyed("GET", "/users?status=pending&limit=500")).json
    assert (pending["total_users"], pending["limit"]) == (7, 500)
    assert (await wire.keyed("GET", "/users?status=active")).json["total_users"] == 0
    assert (await wire.keyed("GET", "/users?status=")).json["total_users"] == 0
    assert (await wire.keyed("GET", "/users?id=")).json["total_users"] == 0
    one = newest[0]
    assert (await wire.keyed("GET", f"/users?id={one['id']}")).json["users"] == [one]


async def test_4_links_lead_from_page_to_page(
    start_broker: Starter, open_app: OpenApp, wire: Wire
) -> None:
    """Host and path without a scheme; made from the public URL, never from the Host header; ""
    where there is no page.
    """
    for number in range(5):
        await wire.open_registration(f"a+b {number}")
    instance = await start_broker(public_url="https://passkeys.example.com/base")
    wire.url = instance.url
    path: str = "/users?limit=2&status=pending"
    numbers = []
    while path:
        headers = {"Host": "evil.example", "Authorization": f"Bearer {wire.key}"}
        answer = (await wire.send("GET", path, headers=headers)).json
        links = {name: link["href"] for name, link in answer["_links"].items()}
        own = f"passkeys.example.com/base/v1/apps/{wire.app_id}/users?status=pending&page="
        assert links["self"] == f"{own}{answer['page']}&limit=2"
        assert links["first"] == f"{own}1&limit=2"
        assert links["last"] == f"{own}3&limit=2"
        numbers.append(answer["page"])
        path = links["next"].removeprefix(f"passkeys.example.com/base/v1/apps/{wire.app_id}")
    assert numbers == [1, 2, 3]
    assert (await wire.keyed("GET", "/users?limit=2")).json["_links"]["previous"]["href"] == ""
    beyond = (await wire.keyed("GET", "/users?limit=2&page=9")).json
    assert beyond["users"] == []
    assert beyond["_links"]["next"]["href"] == ""
    assert "page=3&" in beyond["_links"]["previous"]["href"]


async def test_4_created_before_keeps_pages_stable(broker: Started, wire: Wire) -> None:
    """The value of the first page asks for the same users again; those who come later are
    left out.
    """
    await wire.open_registration("early")
    first = (await wire.keyed("GET", "/users")).json
    again = (await wire.keyed("GET", f"/users?created_before={first['created_before']}")).json
    assert again["total_users"] == 1
    assert again["created_before"] == first["created_before"]
    broker.clock.ahead += 60
    await wire.open_registration("late")
    again = (await wire.keyed("GET", f"/users?created_before={first['created_before']}")).json
    assert [user["external_id"] for user in again["users"]] == ["early"]
    assert (await wire.keyed("GET", "/users")).json["total_users"] == 2


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "limit=-1",
        "limit=1.0",
        "limit=ten",
        "limit=%D9%A1",
        "limit=99999999999999999999",
        "page=0",
        "page=1000001",
        "created_before=now",
        "created_before=99999999999",
        "order_by=identifier:ASC",
        "order_by=created_at:UP",
        "order_by=created_at,id",
        "id=%3Cne:x%3E",
        "status=%3Cne:active%3E",
        "identifier=%FF",
        "identifier=a%00b",
        "login_count=1",
        "created_at=%3Cgt:1%3E",
        "last_login_at=1",
        "identifier=ann&identifier=bob",
        "&".join(f"k{n}=v" for n in range(40)),
    ],
)
async def test_4_a_query_that_can_not_be_answered_is_refused(
    broker: Started, wire: Wire, query: str
) -> None:
    """Rather than answered as if it had not been asked."""
    before = len(lines(broker, status=400, code="invalid_request"))
    answer = await wire.keyed("GET", f"/users?{query}")
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert len(lines(broker, status=400, code="invalid_request")) == before + 1


async def test_5_objects_are_whole_for_every_kind_of_user(wire: Wire, broker: Started) -> None:
    """Without a passkey, with each type of device, before and after a sign-in, after the last
    passkey went.
    """
    await wire.open_registration("pending")
    synced = Authenticator()
    built_in = Authenticator(
        backup_eligible=False, backed_up=False, attachment="platform", transports=()
    )
    roaming = Authenticator(
        backup_eligible=False, attachment="cross-platform", transports=("usb", "nfc")
    )
    for device in (synced, built_in, roaming):
        handle, options = await wire.begin("register", await wire.open_registration("ann"))
        answer = await wire.finish("register", handle, device.register(options, ORIGIN))
        assert answer.status == 200
    for external_id in ("pending", "ann"):
        strict({"user": await user_of(wire, external_id)}, USER)
    ann = await user_of(wire, "ann")
    strict((await wire.keyed("GET", f"/users/{ann['id']}/devices")).json, DEVICES)
    assert [d["type"] for d in ann["webauthn_devices"]] == ["passkey", "platform", "security_key"]
    assert ann["webauthn_types"] == ["passkey", "platform", "security_key"]
    assert (ann["status"], ann["webauthn"]) == ("active", True)
    for passkey in ann["webauthn_devices"]:
        await wire.keyed("DELETE", f"/users/{ann['id']}/devices/{passkey['id']}")
    ann = await user_of(wire, "ann")
    strict({"user": ann}, USER)
    assert (ann["webauthn_devices"], ann["webauthn"], ann["webauthn_types"]) == ([], False, [])
    assert (await broker.events(wire.app_id)).count(("passkey.revoked", "done", None)) == 3


async def test_5_counts_and_times_of_a_passkey(
    wire: Wire, broker: Started, device: Authenticator
) -> None:
    """A registration is no login: counts stay 0, and times that must be there are the creation's. A
    login counts in both.
    """
    await wire.register(await wire.open_registration("ann", "Ann's phone"), device)
    ann = await user_of(wire, "ann")
    passkey = ann["webauthn_devices"][0]
    assert (ann["login_count"], passkey["usage_count"]) == (0, 0)
    assert ann["last_login_at"] == ann["created_at"]
    assert passkey["last_login_at"] == passkey["created_at"]
    assert passkey["last_used_at"] is None
    assert passkey["friendly_name"] == "Ann's phone"
    assert unb64(passkey["cred_id"]) == next(iter(device.held))
    broker.clock.ahead += 5
    await wire.authenticate(None, device)
    ann = await user_of(wire, "ann")
    used = ann["webauthn_devices"][0]
    assert (ann["login_count"], used["usage_count"]) == (1, 1)
    assert used["last_login_at"] > passkey["last_login_at"]
    assert ann["last_login_at"] == used["last_login_at"] == used["last_used_at"]
    await wire.keyed("DELETE", f"/users/{ann['id']}/devices/{used['id']}")
    assert (await user_of(wire, "ann"))["login_count"] == 1, (
        "logins by a revoked passkey stay counted"
    )


# -- 6 to 8: what browsers send --------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", ["text/plain;charset=UTF-8", "application/json", "image/png", "x"]
)
async def test_6_any_content_type(wire: Wire, broker: Started, content_type: str) -> None:
    body = f'{{"transaction_id": "{await wire.open_registration("ann")}"}}'.encode()
    headers = {"Content-Type": content_type, "Origin": ORIGIN}
    answer = await wire.send(
        "POST", "/register/transactions/webauthn/start", data=body, headers=headers
    )
    assert answer.status == 200
    assert broker.metric("broker_ceremonies_total", kind="register", step="begin", result="ok") == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"  \n", b"{}", b'{"transaction_id":""}', b'{"transaction_id":null}', b'{"more":[1]}'],
)
async def test_6_begin_without_a_transaction(wire: Wire, broker: Started, body: bytes) -> None:
    with counted(broker, "broker_ceremonies_total", kind="discoverable", step="begin", result="ok"):
        answer = await wire.page(START, data=body)
    assert answer.status == 200
    assert "transaction_id" not in answer.json
    assert "allowCredentials" not in answer.json["handshake"]["challenge"]["publicKey"]


async def test_6_finish_with_an_empty_transaction_means_its_own(
    wire: Wire, broker: Started, device: Authenticator
) -> None:
    await wire.user("ann", device)
    for given in ("", None):
        for transaction in (None, await wire.open_authentication("ann")):
            handle, options = await wire.begin("authenticate", transaction)
            response = flex_wire_form(device.authenticate(options, ORIGIN))
            body = {"handshake_id": handle, "handshake_response": response, "transaction_id": given}
            answer = await wire.page("/authenticate/transactions/webauthn/finish", body)
            assert answer.status == 200
            receipt = await wire.redeem(
                answer.json["nonce"], **({"transaction_id": transaction} if transaction else {})
            )
            assert receipt.json["external_id"] == "ann"
    assert broker.metric("broker_redemptions_total", result="ok") == 5


async def test_7_preflight_and_cors_on_errors(wire: Wire, broker: Started) -> None:
    preflight = await wire.send(
        "OPTIONS", START, headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status == 204
    assert "passage-flex-version" in preflight.headers["Access-Control-Allow-Headers"]
    with refused(broker, "transaction_not_found", "transaction_malformed"):
        answer = await wire.page(START, {"transaction_id": "nothing"})
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    with refused(broker, "invalid_request", "not_json"):
        answer = await wire.page(START, data=b"{")
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    with refused(broker, "request_too_large", "request_too_large"):
        answer = await wire.page(START, data=b" " * 70_000)
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN


@pytest.mark.parametrize(
    ("policy", "asked", "offered"),
    [
        ("any", "platform", "platform"),
        ("any", "cross-platform", "cross-platform"),
        ("platform", "any", None),
        ("any", None, None),
        ("platform", None, "platform"),
        ("cross-platform", None, "cross-platform"),
        ("cross-platform", "platform", "platform"),
    ],
)
async def test_8_authenticator_attachment(
    open_app: OpenApp, policy: Any, asked: str | None, offered: str | None
) -> None:
    wire = await open_app(Policy(authenticator_attachment=policy))
    more = {"authenticator_attachment": asked} if asked else {}
    _, options = await wire.begin("register", await wire.open_registration("ann"), **more)
    assert options["authenticatorSelection"].get("authenticatorAttachment") == offered
    assert ("authenticatorAttachment" in options["authenticatorSelection"]) == (offered is not None)


@pytest.mark.parametrize("asked", ["", "ANY", "usb", 1, [], {"a": 1}, True])
async def test_8_unknown_attachment_is_refused_and_spends_nothing(
    wire: Wire, broker: Started, asked: object
) -> None:
    transaction = await wire.open_registration("ann")
    body = {"transaction_id": transaction, "authenticator_attachment": asked}
    with refused(broker, "invalid_request", "invalid_request"):
        answer = await wire.page("/register/transactions/webauthn/start", body)
    assert (answer.status, answer.code) == (400, "invalid_request")
    await wire.begin("register", transaction)


@pytest.mark.parametrize(
    ("inside", "beside", "stored"),
    [
        (["usb", "nfc"], None, ["usb", "nfc"]),
        (None, ["internal"], ["internal"]),
        (["usb"], ["internal"], ["usb"]),
        ([], ["internal"], ["internal"]),
        (None, None, []),
        (["from-the-future", "usb"], None, ["usb"]),
    ],
)
async def test_8_transports_in_two_places(
    wire: Wire,
    inside: list[str] | None,
    beside: list[str] | None,
    stored: list[str],
    device: Authenticator,
) -> None:
    handle, options = await wire.begin("register", await wire.open_registration("ann"))
    answer = device.register(options, ORIGIN)
    del answer["response"]["transports"]
    if inside is not None:
        answer["response"]["transports"] = inside
    if beside is not None:
        answer["transports"] = beside
    assert (await wire.finish("register", handle, answer)).status == 200
    assert (await user_of(wire, "ann"))["webauthn_devices"][0]["transports"] == stored
    _, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
    assert options["allowCredentials"][0].get("transports", []) == stored


@pytest.mark.parametrize("with_transaction", [True, False])
@pytest.mark.parametrize("form", ["web", "ios", "ios on the web", "padded"])
async def test_8_three_forms_of_the_user_handle(
    wire: Wire, device: Authenticator, form: str, with_transaction: bool
) -> None:
    await wire.user("ann", device)
    handle_bytes = next(iter(device.held.values())).user_handle
    once = b64(handle_bytes)
    given = {
        "web": once,
        "ios": handle_bytes.decode(),
        "ios on the web": b64(once.encode()),
        "padded": once + "=" * (-len(once) % 4),
    }[form]
    transaction = await wire.open_authentication("ann") if with_transaction else None
    nonce = await wire.authenticate(transaction, device, user_handle=given)
    assert (await wire.redeem(nonce, purpose="authenticate")).json["external_id"] == "ann"


@pytest.mark.parametrize("given", ["", None])
async def test_8_no_user_handle(
    wire: Wire, broker: Started, device: Authenticator, given: str | None
) -> None:
    """With a transaction the user is known; without one nobody is, and the sign-in is refused."""
    await wire.user("ann", device)
    nonce = await wire.authenticate(
        await wire.open_authentication("ann"), device, user_handle=given
    )
    assert (await wire.redeem(nonce)).json["external_id"] == "ann"
    handle, options = await wire.begin("authenticate", None)
    with refused(broker, "discoverable_login_failed", "user_handle"):
        answer = await wire.finish(
            "authenticate", handle, device.authenticate(options, ORIGIN, user_handle=given)
        )
    assert (answer.status, answer.code, "signal" in answer.json) == (
        401,
        "discoverable_login_failed",
        False,
    )
    assert (await broker.events(wire.app_id))[-1] == ("passkey.used", "done", None), (
        "nobody is told of"
    )


# -- 9 to 13 ---------------------------------------------------------------------------------------


async def test_9_handshake_is_single_use_and_bound(
    wire: Wire, broker: Started, device: Authenticator, open_app: OpenApp
) -> None:
    await wire.user("ann", device)
    other = await open_app()
    handle, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
    answer = device.authenticate(options, ORIGIN)
    with refused(broker, "transaction_not_found", "handle_unknown"):
        elsewhere = await other.finish("authenticate", handle, answer)
    assert elsewhere.status == 404
    assert (await wire.finish("authenticate", handle, answer)).status == 200, (
        "another app's try spends nothing"
    )
    with refused(broker, "transaction_not_found", "handle_unknown"):
        again = await wire.finish("authenticate", handle, answer)
    same_answer(again, elsewhere)


async def test_9_discoverable_finish_finds_the_user_by_the_credential(
    wire: Wire, broker: Started
) -> None:
    devices = {name: Authenticator() for name in ("ann", "bob")}
    for name, device in devices.items():
        await wire.user(name, device)
    begun = {name: await wire.begin("authenticate", None) for name in devices}
    for name, device in devices.items():
        handle, options = begun[name]
        answer = await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
        assert (await wire.redeem(answer.json["nonce"])).json["external_id"] == name
    assert (await broker.events(wire.app_id)).count(("passkey.used", "done", None)) == 2


async def test_10_live_at_finish_and_known_from_the_start(
    wire: Wire, broker: Started, device: Authenticator
) -> None:
    transaction = await wire.open_registration("ann")
    ann = await user_of(wire, "ann")
    assert (ann["status"], ann["webauthn_devices"]) == ("pending", [])
    await wire.register(transaction, device)
    ann = await user_of(wire, "ann")
    assert (ann["status"], ann["webauthn_devices"][0]["live"]) == ("active", True)
    assert ann["webauthn_devices"][0]["confirmed_at"] is None, "the nonce was thrown away"
    assert (await wire.redeem(await wire.authenticate(None, device))).json["external_id"] == "ann"
    assert ("passkey.confirmed", "done", None) not in await broker.events(wire.app_id)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/users/", 404, "not_found"),
        ("POST", "/users", 405, "method_not_allowed"),
        ("PATCH", "", 405, "method_not_allowed"),
        ("GET", START, 405, "method_not_allowed"),
        ("GET", "/users/none", 404, "user_not_found"),
        ("GET", "/users/none/devices", 404, "user_not_found"),
        ("DELETE", "/users/none/devices/none", 404, "user_not_found"),
    ],
)
async def test_11_every_error_is_json(
    wire: Wire, broker: Started, method: str, path: str, status: int, code: str
) -> None:
    with refused(broker, code, code):
        answer = await wire.keyed(method, path)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["Content-Type"] == "application/json"


def subclasses(kind: type[Refusal]) -> set[type[Refusal]]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(subclasses(Refusal) - {Refusal}, key=repr))
def test_11_every_refusal_has_a_status(kind: type[Refusal]) -> None:
    """So that no refusal can become a 500, and the table has no row that nothing raises."""
    answer = flex.render(kind())
    assert answer.status == flex.STATUS[kind]
    assert 400 <= answer.status < 600
    assert set(flex.STATUS) == subclasses(Refusal) - {Refusal}


def test_11_codes_and_statuses() -> None:
    """The table as callers know it."""
    assert {(kind.code, status) for kind, status in flex.STATUS.items()} == {
        ("invalid_request", 400),
        ("invalid_setting", 400),
        ("invalid_access_token", 401),
        ("invalid_nonce", 401),
        ("webauthn_login_failed", 401),
        ("discoverable_login_failed", 401),
        ("operation_not_allowed", 403),
        ("app_not_found", 404),
        ("user_not_found", 404),
        ("device_not_found", 404),
        ("transaction_not_found", 404),
        ("ticket_not_found", 404),
        ("mail_code_not_found", 404),
        ("mail_code_wrong", 401),
        ("mail_code_expired", 410),
        ("mail_code_attempts_exceeded", 410),
        ("mail_code_rate_limited", 429),
        ("not_found", 404),
        ("method_not_allowed", 405),
        ("request_timeout", 408),
        ("user_disabled", 403),
        ("user_has_no_passkeys", 409),
        ("too_many_passkeys", 409),
        ("passkey_has_owner", 409),
        ("approval_exists", 409),
        ("conflict", 409),
        ("request_too_large", 413),
        ("unsupported_media_type", 415),
        ("idempotency_key_reused", 422),
        ("too_many_requests", 429),
        ("internal_server_error", 500),
        ("service_unavailable", 503),
    }
    assert errors.UnknownNonce.default == "nonce is invalid, expired, or cannot be found"


async def test_12_unfinished_handshakes_end_by_themselves(
    open_app: OpenApp, broker: Started
) -> None:
    """A page that begins and never finishes costs a place for the life of the ceremony, no
    longer.
    """
    wire = await open_app(Policy(discoverable_limit=3, ceremony_life=30))
    for _ in range(3):
        await wire.begin("authenticate", None)
    with refused(broker, "too_many_requests", "discoverable_limit"):
        answer = await wire.page(START, {})
    assert (answer.status, answer.code) == (429, "too_many_requests")
    assert int(answer.headers["Retry-After"]) >= 1
    broker.clock.ahead += 31
    await wire.begin("authenticate", None)


async def test_13_origins_of_pages_and_of_apps(
    open_app: OpenApp, broker: Started, device: Authenticator
) -> None:
    """An Android origin counts inside client data, where the platform writes it, and nowhere
    else.
    """
    android = "android:apk-key-hash:" + "k" * 43
    wire = await open_app(origins=(ORIGIN, "https://app.example.org:8443", android))
    await wire.user("ann", device)
    for origin, sent in (
        (ORIGIN, ORIGIN),
        ("https://app.example.org:8443", ORIGIN),
        (android, None),
    ):
        begun = (await wire.page(START, {}, origin=sent)).json["handshake"]
        response = device.authenticate(begun["challenge"]["publicKey"], origin)
        body = {"handshake_id": begun["id"], "handshake_response": response}
        answer = await wire.page("/authenticate/transactions/webauthn/finish", body, origin=sent)
        assert (await wire.redeem(answer.json["nonce"])).json["origin"] == origin
    with refused(broker, "operation_not_allowed", "origin"):
        assert (await wire.page(START, {}, origin=android)).status == 403


async def test_13_the_app_names_the_pages_origin_first(open_app: OpenApp, broker: Started) -> None:
    """The registered one that asks; else the app's first. An answer that depends on who asks says
    so to caches.
    """
    android, second = "android:apk-key-hash:" + "k" * 43, "https://app.example.org:8443"
    wire = await open_app(origins=(ORIGIN, second, android))
    for asking, told, others in (
        (None, ORIGIN, [second]),
        (ORIGIN, ORIGIN, [second]),
        (second, second, [ORIGIN]),
        ("https://evil.example", ORIGIN, [second]),
        (second + "/", ORIGIN, [second]),
        (android, ORIGIN, [second]),
        ("null", ORIGIN, [second]),
    ):
        for path in ("", "/"):
            answer = await wire.send("GET", path, headers={"Origin": asking} if asking else {})
            app = answer.json["app"]
            assert (app["auth_origin"], app["additional_auth_origins"]) == (told, others), asking
            assert answer.headers["Vary"] == "Origin"
    keyed = await wire.keyed("GET", "")
    assert (keyed.json["app"]["auth_origin"], keyed.headers.get("Vary")) == (ORIGIN, None)
    assert len(lines(broker, app=wire.app_id, status=200)) == 15


# -- where the contract is open --------------------------------------------------------------------


async def test_authenticate_for_an_unknown_user_and_for_one_without_passkeys(
    wire: Wire, broker: Started
) -> None:
    with refused(broker, "user_not_found", "user_not_found"):
        answer = await wire.keyed("POST", "/transactions/authenticate", {"external_id": "nobody"})
    assert (answer.status, answer.code) == (404, "user_not_found")
    await wire.open_registration("ann")
    with refused(broker, "user_has_no_passkeys", "user_has_no_passkeys"):
        answer = await wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"})
    assert (answer.status, answer.code) == (409, "user_has_no_passkeys")


async def test_one_user_has_one_handle_and_the_external_id_is_never_it(
    wire: Wire, device: Authenticator
) -> None:
    _, first = await wire.begin("register", await wire.open_registration("ann"))
    _, second = await wire.begin("register", await wire.open_registration("ann"))
    _, other = await wire.begin("register", await wire.open_registration("bob"))
    assert first["user"]["id"] == second["user"]["id"] != other["user"]["id"]
    handle = unb64(first["user"]["id"]).decode("ascii")
    assert len(handle) == 43
    assert "ann" not in handle
    assert len(unb64(handle)) == 32


async def test_options_follow_the_policy(open_app: OpenApp, broker: Started) -> None:
    wire = await open_app(
        Policy(
            user_verification="preferred",
            attestation="direct",
            algorithms=(-8, -7, -35, -36, -53, -257),
            hints=("security-key", "hybrid"),
            ceremony_life=120,
        )
    )
    _, options = await wire.begin("register", await wire.open_registration("ann"))
    assert options["authenticatorSelection"]["userVerification"] == "preferred"
    assert options["authenticatorSelection"]["residentKey"] == "required"
    assert options["attestation"] == "direct"
    assert [p["alg"] for p in options["pubKeyCredParams"]] == [-8, -7, -35, -36, -53, -257]
    assert (options["hints"], options["timeout"]) == (["security-key", "hybrid"], 120_000)
    _, options = await wire.begin("authenticate", None)
    assert (options["userVerification"], options["hints"]) == (
        "preferred",
        ["security-key", "hybrid"],
    )


async def test_two_at_once_make_one_user(wire: Wire, broker: Started) -> None:
    await asyncio.gather(*(wire.open_registration("ann") for _ in range(20)))
    listed = (await wire.keyed("GET", "/users?identifier=ann&limit=5")).json
    assert listed["total_users"] == 1
    assert (await broker.events(wire.app_id)).count(("user.created", "done", None)) == 1


def test_every_decision_names_tests_that_exist() -> None:
    """The dialects' pages say which test holds a decision; a renamed test must not leave a promise
    behind.
    """
    decisions = Path(flex.__file__).with_name("DECISIONS.md").read_text()
    folder = Path(flex.__file__).parent.parent
    readme = decisions + "".join(
        page.read_text().partition("\n## Decisions\n")[2]
        for page in sorted(folder.glob("*/README.md"))
    )
    named = set(re.findall(r"`(test_\w+)`", readme))
    there = {
        name
        for file in Path(__file__).parents[2].rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 50
    assert named - there == set()
    rows = [
        line
        for line in readme.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    decided = [
        row for row in rows[rows.index("| decision | test |") + 1 :] if not row.endswith("| test |")
    ]
    assert [row for row in decided if "`test_" not in row.rsplit("| ", 1)[-1]] == []
    codes = {kind.code for kind in flex.STATUS}
    assert [code for code in codes if f"`{code}`" not in decisions] == []
