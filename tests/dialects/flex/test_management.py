"""The Flex API beyond the contract: golden files, what a backend does with each route, and bad
input on all of them.

Whoever has another app's ids gets the same as with made-up ones; whoever has no key is told so
first (`test_guards`).
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest

from broker.dialects.flex.canonical import canonical
from broker.errors import InvalidRequest
from broker.model import Policy
from tests.conftest import OpenApp, Started, Starter
from tests.support import jws
from tests.support.authenticator import Authenticator
from tests.support.golden import golden
from tests.support.signals import counted, refused, same_answer
from tests.support.wire import ORIGIN, Answer, Wire

NOBODY = "x" * 24


def key(wire: Wire) -> dict[str, str]:
    return {"Authorization": f"Bearer {wire.key}"}


async def start(wire: Wire, kind: str, **body: object) -> dict[str, Any]:
    answer = await wire.keyed("POST", f"/ceremonies/{kind}/start", body)
    assert answer.status == 200, answer.body
    options: dict[str, Any] = answer.json["options"]
    return options


async def finish(wire: Wire, kind: str, credential: object, **more: object) -> Answer:
    return await wire.keyed(
        "POST", f"/ceremonies/{kind}/finish", {"credential": credential, **more}
    )


async def passkeys(wire: Wire, query: str = "") -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = (await wire.keyed("GET", f"/passkeys{query}")).json["passkeys"]
    return listed


async def user_id(wire: Wire, external_id: str) -> str:
    return str((await wire.keyed("GET", f"/users?identifier={external_id}")).json["users"][0]["id"])


# -- transactions ----------------------------------------------------------------------------------


async def test_a_register_transaction_with_wishes(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    other = await wire.user("bob", device)
    body = {
        "external_id": "ann",
        "passkey_display_name": "Ann's key",
        "user_name": "ann@example.org",
        "user_verification": "required",
        "timeout": 60_000,
        "exclude_passkeys": [other],
        "second_factor": False,
    }
    answer = await golden(
        wire, "flex/m1-wishes", "POST", "/transactions/register", body, headers=key(wire)
    )
    _, options = await wire.begin("register", answer.json["transaction_id"])
    assert (options["user"]["name"], options["user"]["displayName"]) == (
        "ann@example.org",
        "Ann's key",
    )
    assert options["timeout"] <= 60_000
    assert [c["id"] for c in options["excludeCredentials"]] == [
        (await passkeys(wire))[0]["credential_id"]
    ]
    assert ("user.created", "done", None) in await broker.events(wire.app_id)


async def test_an_authenticate_transaction_with_wishes(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    first, second = await wire.user("ann", device), await wire.user("ann", Authenticator())
    body = {
        "external_id": "ann",
        "passkeys": [first],
        "user_verification": "required",
        "timeout": 60_000,
        "mediation": "conditional",
    }
    answer = await golden(
        wire, "flex/m2-wishes", "POST", "/transactions/authenticate", body, headers=key(wire)
    )
    page = {"transaction_id": answer.json["transaction_id"]}
    path = "/authenticate/transactions/webauthn/start"
    begun = await golden(wire, "flex/a3-wishes", "POST", path, page, headers={"Origin": ORIGIN})
    challenge = begun.json["handshake"]["challenge"]
    assert [c["id"] for c in challenge["publicKey"]["allowCredentials"]] == [
        p["credential_id"] for p in await passkeys(wire) if p["id"] == first
    ]
    assert second != first
    with counted(
        broker, "broker_ceremonies_total", kind="authenticate", step="finish", result="ok"
    ):
        nonce = await wire.authenticate(page["transaction_id"], device)
    assert (await wire.redeem(nonce, transaction_id=page["transaction_id"])).json[
        "passkey_id"
    ] == first


async def test_a_transaction_of_whoever_answers(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Said, never meant by leaving the name out; refused answers of nobody in particular are
    discoverable ones.
    """
    passkey = await wire.user("ann", device)
    stranger = Authenticator()
    other = await wire.user("bob", stranger)
    for whom in ({"discoverable": True}, {"passkeys": [passkey, other]}):
        opened = await wire.keyed("POST", "/transactions/authenticate", whom)
        assert opened.status == 201
        for person, who in ((stranger, "bob"), (device, "ann")):
            if who == "ann":
                opened = await wire.keyed("POST", "/transactions/authenticate", whom)
            transaction = opened.json["transaction_id"]
            nonce = await wire.authenticate(transaction, person)
            receipt = await wire.redeem(nonce, transaction_id=transaction, purpose="authenticate")
            assert receipt.json["external_id"] == who
    opened = await wire.keyed("POST", "/transactions/authenticate", {"passkeys": [passkey]})
    handle, options = await wire.begin("authenticate", opened.json["transaction_id"])
    del options["allowCredentials"]
    with refused(broker, "discoverable_login_failed", "not_offered"):
        answer = await wire.finish("authenticate", handle, stranger.authenticate(options, ORIGIN))
    assert answer.status == 401


# -- keyed ceremonies, joined by the challenge -----------------------------------------------------


async def test_c1_registration(broker: Started, open_app: OpenApp, device: Authenticator) -> None:
    """Confirmed and live at once, under any policy."""
    wire = await open_app(Policy(live_at="redemption"))
    body: dict[str, object] = {
        "external_id": "ann",
        "user_name": "ann@example.org",
        "user_display_name": "Ann",
        "passkey_display_name": "phone",
    }
    path = "/ceremonies/register/"
    begun = await golden(wire, "flex/c1-start", "POST", path + "start", body, headers=key(wire))
    body = {"credential": device.register(begun.json["options"], ORIGIN)}
    with counted(broker, "broker_ceremonies_total", kind="register", step="finish", result="ok"):
        await golden(wire, "flex/c1-finish", "POST", path + "finish", body, headers=key(wire))
    with refused(broker, "transaction_not_found", "challenge_unknown"):
        await golden(wire, "flex/c1-finish-again", "POST", path + "finish", body, headers=key(wire))
    [shown] = await passkeys(wire)
    assert (shown["live"], shown["confirmed_at"], shown["nickname"]) == (
        True,
        shown["created_at"],
        "phone",
    )
    transaction = await wire.open_authentication("ann")
    assert (await wire.redeem(await wire.authenticate(transaction, device))).json[
        "external_id"
    ] == "ann"


async def test_c2_authentication(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    path, body = "/ceremonies/authenticate/", dict[str, object](external_id="ann")
    begun = await golden(wire, "flex/c2-start", "POST", path + "start", body, headers=key(wire))
    body = {"credential": device.authenticate(begun.json["options"], ORIGIN)}
    await golden(wire, "flex/c2-finish", "POST", path + "finish", body, headers=key(wire))
    with refused(broker, "transaction_not_found", "challenge_unknown"):
        assert (await finish(wire, "authenticate", body["credential"])).status == 404
    for whom in ({"discoverable": True}, {"passkeys": [(await passkeys(wire))[0]["id"]]}):
        options = await start(wire, "authenticate", **whom)
        receipt = await finish(wire, "authenticate", device.authenticate(options, ORIGIN))
        assert receipt.json["external_id"] == "ann"


async def test_several_are_open_for_one_user(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Each finishes once, in any order; of 50 finishes of one, one succeeds."""
    await wire.user("ann", device)
    begun = [await start(wire, "authenticate", external_id="ann") for _ in range(3)]
    credentials = [device.authenticate(options, ORIGIN) for options in begun]
    for credential in (credentials[0], credentials[1]):
        assert (await finish(wire, "authenticate", credential)).json["external_id"] == "ann"
    with refused(broker, "transaction_not_found", "challenge_unknown", times=49):
        answers = await asyncio.gather(
            *(finish(wire, "authenticate", credentials[2]) for _ in range(50))
        )
    assert sorted(a.status for a in answers) == [200] + [404] * 49


async def test_a_ceremony_of_another_app_kind_or_purpose_is_unknown(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    other = await open_app()
    await wire.user("ann", device)
    credential = device.authenticate(await start(wire, "authenticate", external_id="ann"), ORIGIN)
    with refused(broker, "transaction_not_found", "challenge_unknown"):
        elsewhere = await finish(other, "authenticate", credential)
    with refused(broker, "transaction_not_found", "other_finish"):
        same_answer(elsewhere, await finish(wire, "authenticate", credential, second_factor=True))
    assert (await finish(wire, "authenticate", credential)).status == 200, (
        "another kind takes nothing"
    )
    made = Authenticator().register(
        await start(wire, "register", external_id="eve", user_name="e"), ORIGIN
    )
    signed = device.authenticate(await start(wire, "authenticate", external_id="ann"), ORIGIN)
    crossed = {
        **signed,
        "response": {**signed["response"], "clientDataJSON": made["response"]["clientDataJSON"]},
    }
    with refused(broker, "transaction_not_found", "other_finish"):
        assert (await finish(wire, "authenticate", crossed)).status == 404
    assert (await finish(wire, "register", made)).status == 200


async def test_a_second_factor_from_begin_to_end(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Registered and used where it is asked for, offered nowhere else, and the receipt says what it
    is.
    """
    key_fob = Authenticator(backup_eligible=False, backed_up=False, attachment="cross-platform")
    await wire.user("ann", device)
    options = await start(wire, "register", external_id="ann", user_name="ann", second_factor=True)
    assert options["authenticatorSelection"] == {
        "residentKey": "discouraged",
        "requireResidentKey": False,
        "userVerification": "preferred",
        "authenticatorAttachment": "cross-platform",
    }
    made = key_fob.register(options, ORIGIN, uv=False)
    receipt = (await finish(wire, "register", made, second_factor=True)).json
    assert (receipt["second_factor"], receipt["user_verified"]) == (True, False)
    assert receipt["purpose"] == "register_second_factor"
    [first, second] = await passkeys(wire)
    assert (first["second_factor"], second["second_factor"]) == (False, True)
    devices = (await wire.keyed("GET", f"/users/{await user_id(wire, 'ann')}/devices")).json[
        "devices"
    ]
    assert [d["second_factor"] for d in devices] == [False, True]

    offered = await start(wire, "authenticate", external_id="ann")
    assert [c["id"] for c in offered["allowCredentials"]] == [first["credential_id"]]
    options = await start(wire, "authenticate", external_id="ann", second_factor=True)
    signed = key_fob.authenticate(options, ORIGIN, uv=False)
    receipt = (await finish(wire, "authenticate", signed, second_factor=True)).json
    assert (receipt["external_id"], receipt["second_factor"]) == ("ann", True)

    body = {"external_id": "ann", "second_factor": True, "passkeys": [second["id"]]}
    proof = "authenticate_second_factor"
    for stated in ({"purpose": proof}, {}, {"purpose": "authenticate"}):
        opened = (await wire.keyed("POST", "/transactions/authenticate", body)).json[
            "transaction_id"
        ]
        redeemed = await wire.redeem(await wire.authenticate(opened, key_fob, uv=False), **stated)
        if stated.get("purpose") == proof:
            assert (redeemed.json["external_id"], redeemed.json["purpose"]) == ("ann", proof)
        else:
            assert (redeemed.status, redeemed.code) == (401, "invalid_nonce"), "it buys no login"
    with refused(broker, "user_has_no_passkeys", "user_has_no_passkeys"):
        body = {"external_id": "ann", "passkeys": [second["id"]]}
        assert (await wire.keyed("POST", "/transactions/authenticate", body)).status == 409


async def test_an_approval_from_begin_to_end(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    approval = {
        "id": "payment-7",
        "data": {"to": "Bob", "amount": 12.50, "lines": [1, None, True, "é"]},
    }
    path, body = (
        "/ceremonies/authenticate/",
        dict[str, object](external_id="ann", approval=approval),
    )
    begun = await golden(wire, "flex/c3-start", "POST", path + "start", body, headers=key(wire))
    with refused(broker, "approval_exists", "approval_exists"):
        await golden(wire, "flex/c3-start-again", "POST", path + "start", body, headers=key(wire))
    listing = f"/users/{await user_id(wire, 'ann')}/approvals"
    await golden(wire, "flex/approvals-open", "GET", listing, headers=key(wire))
    body = {"credential": device.authenticate(begun.json["options"], ORIGIN), "approval": True}
    receipt = await golden(wire, "flex/c3-finish", "POST", path + "finish", body, headers=key(wire))
    assert receipt.json["approval"] == "payment-7"
    await golden(wire, "flex/approvals", "GET", listing, headers=key(wire))
    with refused(broker, "user_not_found", "user_not_found"):
        answer = await wire.keyed("GET", f"/users/{NOBODY}/approvals")
    assert answer.status == 404


def test_the_canonical_form() -> None:
    """RFC 8785, appendix B and §3.2.3; numbers as a page writes them."""
    for number, written in (
        (0.0, "0"),
        (-0.0, "0"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (-1.7976931348623157e308, "-1.7976931348623157e+308"),
        (9007199254740992.0, "9007199254740992"),
        (295147905179352830000.0, "295147905179352830000"),
        (9.999999999999997e22, "9.999999999999997e+22"),
        (1e23, "1e+23"),
        (999999999999999700000.0, "999999999999999700000"),
        (1e21, "1e+21"),
        (333333333.33333325, "333333333.33333325"),
        (0.000001, "0.000001"),
        (0.0000001, "1e-7"),
        (12.50, "12.5"),
        (-12, "-12"),
        (2**53 - 1, "9007199254740991"),
    ):
        assert canonical(number) == written
    members = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "\u00f6": 7}
    names = [name for name, _ in json.loads(canonical(members), object_pairs_hook=list)]
    assert names == ["\r", "1", "\x80", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert canonical({"b": [None, True, False], "a": '\u000f\n"\\é/'}) == (
        '{"a":"\\u000f\\n\\"\\\\é/","b":[null,true,false]}'
    )
    for number in (2**53, -(2**53), 2**64 - 1):
        with pytest.raises(InvalidRequest, match=r"2\^53"):
            canonical([number])


# -- passkeys --------------------------------------------------------------------------------------


async def test_passkeys_by_page(wire: Wire, device: Authenticator) -> None:
    ids = [await wire.user("ann", device)]
    ids += [await wire.user(name, Authenticator()) for name in ("bob", "ann", "eve")]
    await golden(wire, "flex/passkeys", "GET", "/passkeys?limit=1&page=2", headers=key(wire))
    seen = [p["id"] for number in (1, 2) for p in await passkeys(wire, f"?limit=3&page={number}")]
    assert seen == ids
    assert [p["id"] for p in await passkeys(wire, "?order_by=created_at:DESC")] == ids[::-1]
    whole = (await wire.keyed("GET", "/passkeys?external_id=ann&limit=1")).json
    assert (whole["total"], whole["limit"], whole["page"]) == (2, 1, 1)
    for nobody in ("", "ANN", "an", "ann ", "x" * 300):
        whole = (await wire.keyed("GET", f"/passkeys?external_id={quote(nobody)}")).json
        assert (whole["passkeys"], whole["total"]) == ([], 0)
    assert await passkeys(wire, "?page=1000000&limit=500") == []


async def test_one_passkey(broker: Started, wire: Wire, device: Authenticator) -> None:
    path = f"/passkeys/{await wire.user('ann', device)}"
    await golden(wire, "flex/passkey", "GET", path, headers=key(wire))
    await golden(
        wire, "flex/passkey-rename", "PATCH", path, {"nickname": "Work"}, headers=key(wire)
    )
    assert [p["nickname"] for p in await passkeys(wire)] == ["Work"]
    devices = (await wire.keyed("GET", f"/users/{await user_id(wire, 'ann')}/devices")).json[
        "devices"
    ]
    assert [d["friendly_name"] for d in devices] == ["Work"]
    assert ("passkey.renamed", "done", None) in await broker.events(wire.app_id)
    await golden(wire, "flex/passkey-delete", "DELETE", path, headers=key(wire))
    with refused(broker, "device_not_found", "device_not_found"):
        await golden(wire, "flex/passkey-unknown", "GET", path, headers=key(wire))
    with refused(broker, "user_has_no_passkeys", "user_has_no_passkeys"):
        await wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"})


async def test_a_user_is_renamed_on_every_passkey(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    await wire.user("ann", Authenticator())
    await wire.user("bob", Authenticator())
    path, body = f"/users/{await user_id(wire, 'ann')}", {"user_name": "ann@example.com"}
    answer = await golden(wire, "flex/user-rename", "PATCH", path, body, headers=key(wire))
    assert [p["user_name"] for p in answer.json["passkeys"]] == ["ann@example.com"] * 2
    assert [p["user_name"] for p in await passkeys(wire, "?external_id=bob")] == ["Ann's passkey"]
    assert (await broker.events(wire.app_id)).count(("passkey.renamed", "done", None)) == 2


async def test_a_user_is_disabled_and_enabled(wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    user = f"/users/{await user_id(wire, 'ann')}"
    for name, verb, status in (
        ("flex/user-disable", "disable", "inactive"),
        ("flex/user-enable", "enable", "active"),
    ):
        await golden(wire, name, "POST", f"{user}/{verb}", headers=key(wire))
        assert (await wire.keyed("GET", user)).of(200)["user"]["status"] == status


async def test_another_apps_ids_are_unknown_ones(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    """Byte for byte; and nothing is changed over there."""
    other = await open_app()
    passkey, user = await wire.user("ann", device), await user_id(wire, "ann")
    ways: list[tuple[str, str, object]] = [
        ("GET", "/passkeys/{}", None),
        ("PATCH", "/passkeys/{}", {"nickname": "mine"}),
        ("DELETE", "/passkeys/{}", None),
        ("POST", "/passkeys/{}/owner", {"external_id": "eve"}),
        ("PATCH", "/users/{}", {"user_name": "mine"}),
        ("POST", "/users/{}/disable", None),
        ("POST", "/users/{}/enable", None),
        ("GET", "/users/{}/approvals", None),
    ]
    for method, path, body in ways:
        there = user if "/users" in path else passkey
        answers = [
            await other.keyed(method, path.format(i), body)
            for i in (there, NOBODY, "none", "a%00b")
        ]
        for answer in answers:
            assert answer.status == 404
            same_answer(answers[0], answer)
    body = {"passkeys": [passkey]}
    unknown = await other.keyed("POST", "/transactions/authenticate", body)
    same_answer(
        unknown, await other.keyed("POST", "/transactions/authenticate", {"passkeys": [NOBODY]})
    )
    assert (unknown.status, unknown.code) == (409, "user_has_no_passkeys")
    gone = await other.keyed("POST", "/signals/delete", body)
    assert gone.json["missing"] == [passkey]
    assert await passkeys(other) == []
    [left] = await passkeys(wire)
    assert (left["nickname"], left["user_name"], left["external_id"]) == (
        "Ann's passkey",
        "Ann's passkey",
        "ann",
    )
    assert (await other.keyed("GET", "/users")).json["total_users"] == 0, (
        "no user was made for a passkey that is not there"
    )


# -- events ----------------------------------------------------------------------------------------


async def test_events_by_page_time_action_and_user(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    broker.clock.ahead += 60
    await wire.user("bob", Authenticator())
    await golden(wire, "flex/events", "GET", "/events?limit=2&page=2", headers=key(wire))
    whole = (await wire.keyed("GET", "/events?limit=500")).json
    assert whole["total"] == len(whole["events"]) == len(await broker.events(wire.app_id))
    assert [e["id"] for e in whole["events"]] == sorted(
        (e["id"] for e in whole["events"]), reverse=True
    )

    async def actions(query: str) -> list[tuple[str, str | None]]:
        found = (await wire.keyed("GET", f"/events?{query}")).json
        assert found["total"] == len(found["events"])
        return [(e["action"], e["external_id"]) for e in found["events"]]

    assert await actions("action=user.created") == [
        ("user.created", "bob"),
        ("user.created", "ann"),
    ]
    assert await actions("action=passkey.registered&user=nn") == [("passkey.registered", "ann")]
    assert await actions("action=no.such") == []
    [bobs] = [
        e for e in whole["events"] if (e["action"], e["external_id"]) == ("user.created", "bob")
    ]
    assert ("user.created", "ann") in await actions(f"before={bobs['at']}")
    assert ("user.created", "bob") not in await actions(f"before={bobs['at']}&user=bob")
    later = await actions(
        f"after={quote(str(datetime.fromisoformat(bobs['at']) - timedelta(seconds=1)))}"
    )
    assert later[-1] == ("user.created", "bob")
    assert (
        await actions(
            f"after={(datetime.now(UTC) + timedelta(hours=2)).strftime('%Y-%m-%dT%H:%M:%SZ')}"
        )
        == []
    )


async def test_refused_sign_ins_are_events(wire: Wire, device: Authenticator) -> None:
    passkey = await wire.user("ann", device)
    options = await start(wire, "authenticate", external_id="ann")
    assert (
        await finish(wire, "authenticate", device.authenticate(options, ORIGIN, uv=False))
    ).status == 401
    [found] = (await wire.keyed("GET", "/events?action=passkey.used")).json["events"]
    assert (found["result"], found["reason"], found["external_id"]) == (
        "refused",
        "user_verification",
        "ann",
    )
    assert found["passkey_id"] == passkey
    assert found["actor"].startswith("key:")


# -- signed receipts -------------------------------------------------------------------------------


async def test_a_signed_receipt(broker: Started, wire: Wire, device: Authenticator) -> None:
    """Verified by hand with what anybody may read; the app's own keys sign, and its claims are the
    receipt's.
    """
    await wire.user("ann", device)
    body = {"nonce": await wire.authenticate(None, device), "signed": True}
    answer = await golden(
        wire, "flex/m3-signed", "POST", "/authenticate/verify", body, headers=key(wire)
    )
    keys = await golden(
        wire,
        "flex/jwks",
        "GET",
        "/.well-known/jwks.json",
        headers={"Origin": "https://anywhere.example"},
    )
    claims = jws.verify(answer.json["token"], keys.json)
    registered = {name: claims.pop(name) for name in ("iss", "sub", "aud", "iat", "exp", "jti")}
    assert claims == {name: value for name, value in answer.json.items() if name != "token"}
    assert (registered["sub"], registered["aud"]) == ("ann", [wire.app_id])
    assert registered["iss"] == f"/v1/apps/{wire.app_id}"
    assert registered["exp"] - registered["iat"] == 300
    assert abs(registered["iat"] - broker.clock()) < 60
    again = await wire.redeem(await wire.authenticate(None, device))
    assert "token" not in again.json


async def test_each_app_has_keys_and_ids_of_its_own(
    start_broker: Starter, session: Any, device: Authenticator
) -> None:
    started = await start_broker(
        public_url="https://passkeys.example.com/base", receipt_token_life=60
    )
    tokens, sets = [], []
    for _ in range(2):
        wire = await Wire.open(started.service, session)
        await wire.user("ann", device)
        body = {"nonce": await wire.authenticate(None, device), "signed": True}
        tokens.append((await wire.keyed("POST", "/authenticate/verify", body)).json["token"])
        sets.append((await wire.send("GET", "/.well-known/jwks.json")).json)
        claims = jws.verify(tokens[-1], sets[-1])
        assert claims["iss"] == f"https://passkeys.example.com/base/v1/apps/{wire.app_id}"
        assert claims["exp"] - claims["iat"] == 60
        device = Authenticator()
    with pytest.raises(KeyError):
        jws.verify(tokens[0], sets[1])
    assert jws.claims(tokens[0])["jti"] != jws.claims(tokens[1])["jti"]


async def test_without_a_secret_key_nothing_is_signed(
    start_broker: Starter, session: Any, device: Authenticator
) -> None:
    """Refused before the nonce is taken; the key set is empty, or shows the keys that are left."""
    started = await start_broker(secret_key=())
    wire = await Wire.open(started.service, session)
    await wire.user("ann", device)
    nonce = await wire.authenticate(None, device)
    with refused(started, "invalid_request", "no_secret_key"):
        answer = await wire.keyed("POST", "/authenticate/verify", {"nonce": nonce, "signed": True})
    assert answer.status == 400
    assert "BROKER_SECRET_KEY" in answer.json["error"]
    assert (await wire.send("GET", "/.well-known/jwks.json")).json == {"keys": []}
    able = await start_broker()
    keys = (await wire.send("GET", f"{able.url}/v1/apps/{wire.app_id}/.well-known/jwks.json")).json
    assert len(keys["keys"]) == 1
    assert (await wire.send("GET", "/.well-known/jwks.json")).json == keys
    assert (await wire.redeem(nonce)).json["external_id"] == "ann"


async def test_a_refused_redemption_is_never_signed(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    nonce = await wire.authenticate(None, device)
    for body, reason in (
        ({"nonce": nonce, "signed": True, "purpose": "register"}, "nonce_mismatch"),
        ({"nonce": nonce, "signed": True}, "nonce_replayed"),
    ):
        with refused(broker, "invalid_nonce", reason):
            answer = await wire.keyed("POST", "/authenticate/verify", body)
        assert (answer.status, set(answer.json)) == (401, {"code", "error"})


# -- bad input -------------------------------------------------------------------------------------


TEXT: list[object] = [None, 0, 1.5, True, [], {}, ""]
LISTS: list[object] = [
    0,
    "p" * 24,
    {},
    [],
    [1],
    [None],
    ["short"],
    ["p" * 24 + "!"],
    ["é" * 24],
    [["p" * 24]],
]
START = {"external_id": "ann", "user_name": "ann"}
BAD: list[tuple[str, str, dict[str, Any], list[tuple[str, list[object]]]]] = [
    (
        "POST",
        "/transactions/register",
        {"external_id": "ann", "passkey_display_name": "Ann"},
        [
            ("user_name", [0, [], "x" * 257]),
            ("user_verification", ["", "always", 1, ["required"], {}]),
            ("timeout", [0, 999, 600_001, -1, 1500.0, "5000", True, [], 2**63]),
            ("exclude_passkeys", LISTS),
            ("second_factor", ["", "true", 1, 0, []]),
        ],
    ),
    (
        "POST",
        "/transactions/authenticate",
        {"external_id": "ann"},
        [
            ("external_id", TEXT),
            ("passkeys", [None, *LISTS, ["p" * 24] * 1001]),
            ("discoverable", [True, 1, "true"]),
            ("mediation", ["", "silent", 1, ["conditional"]]),
            ("timeout", [False, 1e4]),
            ("second_factor", ["no"]),
        ],
    ),
    ("POST", "/transactions/authenticate", {}, [("discoverable", [None, False])]),
    ("POST", "/transactions/authenticate", {"discoverable": True}, [("second_factor", [True])]),
    (
        "POST",
        "/authenticate/verify",
        {"nonce": "pbn_" + "n" * 43},
        [("signed", [1, "true", [], ""])],
    ),
    (
        "POST",
        "/ceremonies/register/start",
        START,
        [
            ("external_id", TEXT),
            ("user_name", [*TEXT, "x" * 257]),
            ("user_display_name", [1, "x" * 257]),
            ("passkey_display_name", [1]),
            ("authenticator_attachment", ["", "usb", 1]),
            ("user_verification", ["none"]),
        ],
    ),
    (
        "POST",
        "/ceremonies/register/finish",
        {},
        [("credential", [None, 1, "x", [], {}, {"id": "AA"}])],
    ),
    (
        "POST",
        "/ceremonies/authenticate/finish",
        {},
        [("credential", [None, 1, "x", [], {}, {"id": "AA"}])],
    ),
    (
        "POST",
        "/ceremonies/authenticate/start",
        {"external_id": "ann"},
        [
            (
                "approval",
                [
                    None,
                    1,
                    "x",
                    [],
                    {},
                    {"id": "a"},
                    {"data": 1},
                    {"id": "", "data": 1},
                    {"id": 1, "data": 1},
                ],
            ),
            (
                "approval",
                [
                    {"id": "x" * 257, "data": 1},
                    {"id": "a", "data": 2**53},
                    {"id": None, "data": {}},
                ],
            ),
        ],
    ),
    (
        "POST",
        "/ceremonies/authenticate/start",
        {"discoverable": True},
        [("approval", [{"id": "a", "data": 1}]), ("passkeys", [["p" * 24]])],
    ),
    ("POST", "/register/start", START, [("second_factor", [True]), ("timeout", [1])]),
    (
        "POST",
        "/authenticate/start",
        {"external_id": "ann"},
        [("second_factor", [True]), ("passkeys", LISTS)],
    ),
    ("PATCH", f"/passkeys/{NOBODY}", {}, [("nickname", [*TEXT, "x" * 257])]),
    ("POST", f"/passkeys/{NOBODY}/owner", {}, [("external_id", [*TEXT, "x" * 257])]),
    ("PATCH", f"/users/{NOBODY}", {}, [("user_name", TEXT)]),
    (
        "POST",
        "/signals/update",
        {"external_id": "ann", "user_name": "ann"},
        [
            ("external_id", [*TEXT, "x" * 257]),
            ("user_name", TEXT),
            ("user_display_name", [1, "x" * 257]),
        ],
    ),
    (
        "POST",
        "/signals/delete",
        {},
        [("external_id", [*TEXT, "x" * 257]), ("passkeys", [None, *LISTS])],
    ),
    ("POST", "/signals/delete", {"external_id": "ann"}, [("passkeys", [None, ["p" * 24]])]),
    ("POST", "/signals/prune", {}, [("external_id", [*TEXT, "x" * 257])]),
]


@pytest.mark.parametrize(("method", "path", "whole", "wrong"), BAD)
async def test_bad_input_is_told_by_name(
    broker: Started,
    wire: Wire,
    device: Authenticator,
    method: str,
    path: str,
    whole: dict[str, Any],
    wrong: list[tuple[str, list[object]]],
) -> None:
    await wire.user("ann", device)
    for field, values in wrong:
        for value in values:
            answer = await wire.keyed(method, path, whole | {field: value})
            assert (answer.status, answer.code) == (400, "invalid_request"), (field, value)
            if field != "credential":
                assert field in answer.json["error"], (value, answer.json)
    assert (await wire.keyed(method, path, data=b"{")).status == 400
    assert (await wire.keyed(method, path, data=b"[]")).status == 400
    assert not [line for line in broker.log if line.get("status") == 500]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        *(
            ("/passkeys", q)
            for q in ("limit=0", "limit=501", "page=0", "page=1.5", "limit=%D9%A1", "order_by=id")
        ),
        *(
            ("/passkeys", q)
            for q in (
                "user=ann",
                "external_id=a&external_id=b",
                "external_id=%00",
                "external_id=%FF",
            )
        ),
        *(
            ("/events", q)
            for q in (
                "limit=501",
                "page=x",
                "kind=a",
                "user=%00",
                "action=a%00",
                "action=a&action=b",
            )
        ),
        *(
            ("/events", f"after={t}")
            for t in ("now", "1", "2026-01-01", "2026-01-01T00:00:00", "x" * 50, "%FF")
        ),
        *(
            ("/events", f"before={t}")
            for t in ("0001-01-01T00:00:00%2B23:59", "9999-12-31T23:59:59-23:59")
        ),
        ("/events", "after=2026-01-01T00:00:00+01:00"),
    ],
)
async def test_a_list_that_can_not_be_answered_is_refused(
    broker: Started, wire: Wire, path: str, query: str
) -> None:
    answer = await wire.keyed("GET", f"{path}?{query}")
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert not [line for line in broker.log if line.get("status") == 500]


async def test_a_fault_of_form_spends_no_keyed_ceremony(wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    credential = device.authenticate(await start(wire, "authenticate", external_id="ann"), ORIGIN)
    for more in ({"second_factor": "yes"}, {"approval": 1}):
        assert (await finish(wire, "authenticate", credential, **more)).status == 400
    for wrong in ({**credential, "id": "="}, {**credential, "response": {}}):
        assert (await finish(wire, "authenticate", wrong)).status == 400
    assert (await finish(wire, "authenticate", credential)).status == 200
