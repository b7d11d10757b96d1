"""Hanko's Passkey API on the wire, section by section of the contract: what is taken, what is
answered, and what is better here.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from broker.dialects.hanko import routes as dialect
from broker.errors import Refusal
from broker.model import Policy
from tests.conftest import OpenApp, Started, Starter
from tests.support import hanko as hanko_wire
from tests.support.authenticator import Authenticator, b64
from tests.support.hanko import (
    LOGIN,
    REGISTRATION,
    SECOND_LOGIN,
    SECOND_REGISTRATION,
    TRANSACTION,
    Hanko,
    judge,
)
from tests.support.signals import lines, refused, same_answer
from tests.support.wire import ORIGIN, Answer, Wire
from tests.web.test_bad_input import BODIES, WRONG
from tests.web.test_guards import STRANGERS, free_port

QUICK = Policy(declared={"hanko_algorithm": "ES256"})  # keys that are made at once
NAMES = {"user_id": "ann", "username": "ann@example.org"}
INVALID_KEY = "The api key is invalid"
PAGES = sorted({path.removeprefix(hanko_wire.TENANT) for _, path in hanko_wire.PAGES})
KEYED = sorted(
    (method, path.removeprefix(hanko_wire.TENANT).format(user_id="u" * 24, credential_id="YQ"))
    for method, path in hanko_wire.KEYED
)


@pytest.fixture
async def hanko(open_app: OpenApp) -> Hanko:
    return Hanko(await open_app(QUICK))


# -- refusals --------------------------------------------------------------------------------------


def subclasses(kind: type[Refusal]) -> set[type[Refusal]]:
    return {kind}.union(*(subclasses(below) for below in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(subclasses(Refusal) - {Refusal}, key=repr))
def test_every_refusal_has_a_status_in_hankos_shape(kind: type[Refusal]) -> None:
    answer = dialect.render(kind())
    assert answer.status == dialect.STATUS[kind] >= 400
    assert set(dialect.STATUS) == subclasses(Refusal) - {Refusal}
    assert isinstance(answer.body, bytes)
    judge(
        Answer(
            answer.status, {**answer.headers, "Content-Length": str(len(answer.body))}, answer.body
        )
    )


def test_every_title_is_in_the_readme() -> None:
    readme = Path(dialect.__file__).with_name("README.md").read_text()
    titles = {told.title for rows in dialect.TITLES.values() for told in rows.values()}
    assert [
        title for title in titles if title and f"`{title.partition(':')[0]}" not in readme
    ] == []


async def test_every_path_below_has_hankos_shape(broker: Started, hanko: Hanko) -> None:
    for method, path, status in (
        ("GET", "", 404),
        ("GET", "/", 404),
        ("POST", "/login", 404),
        ("POST", "/login/initialize/", 404),
        ("GET", "/login/initialize", 405),
        ("DELETE", "/registration/finalize", 405),
        ("PUT", "/credentials/YQ", 405),
        ("POST", "/.well-known/jwks.json", 405),
        ("OPTIONS", "/credentials", 405),
    ):
        answer = await hanko.send(method, path)
        assert (answer.status, answer.json["status"]) == (status, status)
        assert ("Allow" in answer.headers) == (status == 405)
    for path in ("/hanko", "/hanko/", "/hanko/nobody/nowhere", "/hanko/%ff/\xff"):
        answer = await hanko.wire.send("GET", hanko.wire.url + path)
        judge(answer)
        assert answer.status == 404
    answer = await hanko.page(LOGIN + "/initialize", data=b" " * 70_000)
    assert (answer.status, answer.headers["Connection"]) == (413, "close")
    assert (await hanko.page(LOGIN + "/initialize", data=b"x")).status == 400
    assert lines(broker, route="/hanko/{app_id}/login/initialize", status=413)


async def test_a_store_that_is_down_in_hankos_shape(
    start_broker: Starter, session: Any, own_stores: Any, device: Authenticator
) -> None:
    started = await start_broker(own_stores)
    hanko = Hanko(await Wire.open(started.service, session, policy=QUICK))
    await hanko.register("ann", device)
    answer = device.authenticate(await hanko.begin(), ORIGIN)
    own_stores.stop()
    for method, path, body in (
        ("POST", LOGIN + "/initialize", None),
        ("POST", LOGIN + "/finalize", answer),
        ("GET", "/credentials", None),
        ("GET", "/.well-known/jwks.json", None),
    ):
        response = await hanko.send(method, path, body)
        assert (response.status, response.json["title"]) == (503, "Service Unavailable")
        assert response.headers["Retry-After"].isdigit()
    assert lines(started, code="service_unavailable")


async def test_nothing_is_spent_where_nothing_can_be_signed(
    start_broker: Starter, hanko: Hanko, device: Authenticator
) -> None:
    """Whether a token can be made is found out before the challenge is taken: here by an instance
    with another secret.
    """
    made = device.register(await hanko.begin_registration("ann"), ORIGIN)
    await hanko.get("/.well-known/jwks.json")  # the signing key is there
    blind = await start_broker(secret_key=("another secret key, of 32 characters or more",))
    there = Hanko(replace(hanko.wire, url=blind.url))
    with refused(blind, "service_unavailable", "signing_key_sealed"):
        await there.refused(503, "Service Unavailable", REGISTRATION + "/finalize", made)
    assert await hanko.credentials("ann") == []
    await hanko.finish(REGISTRATION, made)


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), KEYED)
async def test_hankos_key_is_checked_before_anything_else(
    broker: Started, hanko: Hanko, open_app: OpenApp, method: str, path: str
) -> None:
    """Missing, malformed, unknown, another tenant's, of no tenant: one answer, whatever the
    body.
    """
    other, first = await open_app(), None
    nobody = Hanko(Wire(hanko.wire.session, hanko.wire.url, "x" * 24, hanko.wire.key))
    for backend, key, reason in (
        (hanko, "", "key_missing"),
        (hanko, "x", "key_malformed"),
        (hanko, "pbk_" + "a" * 43, "key_unknown"),
        (hanko, other.key, "key_of_another_app"),
        (nobody, hanko.wire.key, "key_of_another_app"),
    ):
        for body in (b"{", b" " * 70_000, b""):
            with refused(broker, "invalid_access_token", reason):
                answer = await backend.send(method, path + "?page=x", data=body, key=key)
            assert (answer.status, answer.json["title"]) == (401, INVALID_KEY)
            assert answer.headers["WWW-Authenticate"] == "apiKey"
            first = first or answer
            same_answer(first, answer)


async def test_where_the_key_stands(broker: Started, hanko: Hanko) -> None:
    """The header's name in any case, white space round the key; not as a bearer token, and not
    twice.
    """
    key = hanko.wire.key
    for headers in ({"apikey": key}, {"APIKEY": key}, {"apiKey": f" {key}\t"}):
        assert (await hanko.send("GET", "/credentials", key="", headers=headers)).status == 200
    headers = {"Authorization": f"Bearer {key}"}
    await hanko.refused(401, INVALID_KEY, "/credentials", method="GET", key="", headers=headers)
    twice = [("apiKey", key), ("apiKey", "x")]
    async with hanko.wire.session.get(hanko.base + "/credentials", headers=twice) as response:
        assert response.status == 400
    with refused(broker, "invalid_access_token", "key_unknown"):
        await broker.parts.directory.revoke_key(
            hanko.wire.app_id, (await broker.parts.directory.keys(hanko.wire.app_id))[0].id
        )
        await hanko.refused(401, INVALID_KEY, "/credentials", method="GET")


async def test_a_login_that_names_nobody_needs_no_key(
    broker: Started, hanko: Hanko, device: Authenticator
) -> None:
    """Nor looks at one; one that names a user does, and the two lacks have a title each."""
    path = LOGIN + "/initialize"
    for key in ("", "wrong", hanko.wire.key):
        assert (await hanko.send("POST", path, key=key)).status == 200
        assert (await hanko.send("POST", path, {"user_id": None}, key=key)).status == 200
    await hanko.register("ann", device)
    for user in ("ann", "nobody"):
        with refused(broker, "invalid_access_token", "key_missing"):
            await hanko.refused(401, "api key is missing", path, {"user_id": user}, key="")
        with refused(broker, "invalid_access_token", "key_malformed"):
            await hanko.refused(401, INVALID_KEY, path, {"user_id": user}, key="wrong")
    assert (await hanko.begin(user_id="ann"))["allowCredentials"]


async def test_hanko_with_a_management_port(
    start_broker: Starter, session: Any, device: Authenticator
) -> None:
    """Pages on one port; on the other all that an SDK on a backend calls, with a key each time."""
    started = await start_broker(management_port=free_port())
    public = Hanko(await Wire.open(started.service, session, policy=QUICK))
    url = f"http://127.0.0.1:{started.service.management_port}"
    keyed = Hanko(Wire(session, url, public.wire.app_id, public.wire.key))
    for method, path in KEYED:
        with refused(started, "not_found", "not_found"):
            assert (await public.send(method, path)).status == 404
    with refused(started, "invalid_access_token", "key_not_taken_here"):
        await public.refused(401, INVALID_KEY, LOGIN + "/initialize", {"user_id": "ann"})
    for path in PAGES:
        with refused(started, "invalid_access_token", "key_missing"):
            title = "api key is missing" if path == LOGIN + "/initialize" else INVALID_KEY
            await keyed.refused(401, title, path, key="")
        assert (await keyed.send("OPTIONS", path)).status == 405

    made = device.register(await keyed.begin_registration("ann"), ORIGIN)
    answer = await public.page(REGISTRATION + "/finalize", made)
    assert (await public.claims(answer.json["token"]))["sub"] == "ann"
    options = (await public.page(LOGIN + "/initialize")).json["publicKey"]
    await public.finish(LOGIN, device.authenticate(options, ORIGIN))
    await keyed.register("bob", Authenticator())
    assert (
        (await keyed.login(device))["sub"]
        == (await keyed.login(device, user="ann"))["sub"]
        == "ann"
    )


async def test_hanko_can_be_switched_off(start_broker: Starter, session: Any) -> None:
    """And it is off where there is no secret to seal signing keys under."""
    for changes in ({"dialects": ("flex",)}, {"secret_key": ()}):
        started = await start_broker(**changes)
        wire = await Wire.open(started.service, session)
        with refused(started, "not_found", "not_found"):
            answer = await wire.send("POST", f"{wire.url}/hanko/{wire.app_id}/login/initialize")
        assert (answer.status, answer.code) == (404, "not_found")


# -- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", STRANGERS)
async def test_hankos_pages_of_an_origin_that_is_not_registered(
    broker: Started, hanko: Hanko, origin: str
) -> None:
    """403 in the vendor's shape, before the body is looked at."""
    for path in PAGES:
        with refused(broker, "operation_not_allowed", "origin"):
            answer = await hanko.send("POST", path, data=b"{", headers={"Origin": origin})
        assert (answer.status, answer.json["title"]) == (403, "Forbidden")


async def test_hankos_pages_of_a_registered_origin(hanko: Hanko) -> None:
    """Echoed with Vary, never with credentials; the SDK's header is allowed; native apps send no
    origin and pass.
    """
    for path in PAGES:
        answer = await hanko.page(path, {})
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert answer.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in answer.headers
        answer = await hanko.send("OPTIONS", path, key="", headers={"Origin": ORIGIN})
        assert answer.status == 204
        allowed = answer.headers["Access-Control-Allow-Headers"].replace(" ", "").split(",")
        assert {"apikey", "content-type"} <= set(allowed)
    assert (await hanko.page(LOGIN + "/initialize", origin=None)).status == 200


async def test_the_key_set_may_be_read_from_anywhere(hanko: Hanko) -> None:
    path = "/.well-known/jwks.json"
    for origin in ("https://evil.example", "null"):
        for method, status in (("GET", 200), ("OPTIONS", 204)):
            answer = await hanko.send(method, path, key="", headers={"Origin": origin})
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "*")
    assert answer.headers["Access-Control-Allow-Headers"] == "content-type, apikey"
    answer = await hanko.send("GET", path)
    assert answer.headers["Cache-Control"] == "max-age=600"
    nobody = Hanko(Wire(hanko.wire.session, hanko.wire.url, "x" * 24, "x"))
    await nobody.refused(404, "tenant not found", path, method="GET", key="")


async def test_no_page_reads_what_hankos_keys_give(hanko: Hanko) -> None:
    for method, path in KEYED:
        answer = await hanko.send(method, path, headers={"Origin": ORIGIN})
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


# -- bodies ----------------------------------------------------------------------------------------

INITIALIZES = [
    at + "/initialize"
    for at in (REGISTRATION, LOGIN, SECOND_REGISTRATION, SECOND_LOGIN, TRANSACTION)
]
FINALIZES = {
    REGISTRATION + "/finalize": "unable to parse credential creation response",
    SECOND_REGISTRATION + "/finalize": "unable to parse credential creation response",
    LOGIN + "/finalize": "unable to finish login",
    SECOND_LOGIN + "/finalize": "unable to finish login",
    TRANSACTION + "/finalize": "unable to finish transaction",
}


@pytest.mark.parametrize("path", [*INITIALIZES, *FINALIZES, "/credentials/YQ"])
async def test_a_body_that_hanko_can_not_read(broker: Started, hanko: Hanko, path: str) -> None:
    method = "PATCH" if path.startswith("/credentials") else "POST"
    for name, (body, reason) in BODIES.items():
        with refused(broker, "invalid_request", reason):
            answer = await hanko.send(method, path, data=body)
        title = FINALIZES.get(path, "unable to process request")
        assert (answer.status, answer.json["title"]) == (400, title), name
    assert not lines(broker, status=500)


@pytest.mark.parametrize("path", INITIALIZES)
async def test_fields_of_another_type(hanko: Hanko, path: str) -> None:
    whole: dict[str, object] = {**NAMES, "transaction_id": "t", "transaction_data": {}}
    names = ["user_id"]
    names += ["username", "display_name", "icon"] if REGISTRATION in path else []
    names += ["transaction_id"] if path.startswith(TRANSACTION) else []
    for name in names:
        for wrong in WRONG:
            await hanko.refused(400, "unable to process request", path, {**whole, name: wrong})


async def test_what_is_wrong_with_fields_is_told_at_once(hanko: Hanko) -> None:
    title, path = "unable to validate request", REGISTRATION + "/initialize"
    both = "user_id is a required field and username is a required field"
    for body in (None, {}, {"user_id": None, "username": ""}, {"user_id": "", "username": None}):
        assert await hanko.refused(400, title, path, body) == both
    for name in ("username", "display_name"):
        await hanko.ok(path, {**NAMES, name: "é" * 128})
        details = await hanko.refused(400, title, path, {**NAMES, name: "é" * 129})
        assert details == f"{name} cannot have more than 128 entries"
    for icon in ("ann.png", "//example.org/a", "https://", "http://[", " "):
        assert (
            await hanko.refused(400, title, path, {**NAMES, "icon": icon})
            == "icon must be a valid URL"
        )
    await hanko.refused(400, "unable to process request", path, {**NAMES, "user_id": "x" * 257})
    assert (
        await hanko.refused(400, title, SECOND_LOGIN + "/initialize", {})
        == "user_id is a required field"
    )
    details = await hanko.refused(400, title, LOGIN + "/initialize", {"user_id": ""})
    assert details == "user_id must at least have 1 entry"
    details = await hanko.refused(
        400, title, TRANSACTION + "/initialize", {"transaction_id": "x" * 129}
    )
    assert details.count(" and ") == 2


async def test_how_bodies_come(hanko: Hanko, device: Authenticator) -> None:
    """Nothing at all, any label at a finalize, pieces, unknown fields; but an initialize that is
    not labelled as JSON is refused.
    """
    path = LOGIN + "/initialize"
    assert (
        await hanko.send("POST", path, headers={"Content-Type": "application/octet-stream"})
    ).status == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        await hanko.refused(
            400, "unable to process request", path, data=b"{}", headers={"Content-Type": kind}
        )
    assert (
        await hanko.send(
            "POST", path, {"more": [1]}, headers={"Content-Type": "application/json;charset=UTF-8"}
        )
    ).status == 200

    async def pieces() -> Any:
        yield b'{"user_id":'
        yield b'""}'

    headers = {"Content-Type": "application/json"}
    async with hanko.wire.session.post(
        hanko.base + path, data=pieces(), headers=headers
    ) as response:
        assert (
            response.status == 400
        )  # read, where the vendor drops it and begins a login of anyone
    made = device.register(await hanko.begin_registration("ann"), ORIGIN)
    answer = await hanko.send(
        "POST", REGISTRATION + "/finalize", made, headers={"Content-Type": "text/plain"}
    )
    assert answer.status == 200


async def test_every_form_of_an_answer(hanko: Hanko) -> None:
    """As `@github/webauthn-json` writes it and as `toJSON()` does: transports in either place,
    nulls, padding, extra members.
    """
    for number, (inside, beside) in enumerate(((["usb"], None), (None, ["usb"]))):
        device = Authenticator(transports=())
        made = device.register(await hanko.begin_registration(f"u{number}"), ORIGIN)
        made["response"] |= {"transports": inside, "publicKey": "AAAA", "authenticatorData": "AAAA"}
        made |= {"transports": beside, "authenticatorAttachment": None}
        del made["clientExtensionResults"]
        made["rawId"] += "="
        await hanko.finish(REGISTRATION, made)
        [listed] = await hanko.credentials(f"u{number}")
        assert listed["transports"] == ["usb"]
        options = await hanko.begin(user_id=f"u{number}")
        answer = device.authenticate(options, ORIGIN, user_handle=None)
        answer["response"] |= {
            "userHandle": None,
            "clientDataJSON": answer["response"]["clientDataJSON"],
        }
        del answer["clientExtensionResults"]
        await hanko.finish(LOGIN, answer)


# -- registration ----------------------------------------------------------------------------------


async def test_names(hanko: Hanko) -> None:
    """A blank display name is the user name; names and icon are those of each call; the handle is
    ours and never the user id.
    """
    for display_name in (None, "", " \t"):
        user = (await hanko.begin_registration("ann", display_name=display_name))["user"]
        assert (user["name"], user["displayName"]) == ("ann@example.org", "ann@example.org")
        assert "icon" not in user
    changed = (
        await hanko.begin_registration("ann", username="a", display_name="Ann", icon="data:,x")
    )["user"]
    assert (changed["name"], changed["displayName"], changed["icon"]) == ("a", "Ann", "data:,x")
    assert changed["id"] == user["id"] != b64(b"ann")


async def test_options_follow_the_policy_for_hanko(open_app: OpenApp) -> None:
    hanko = Hanko(
        await open_app(
            Policy(
                user_verification="discouraged",
                authenticator_attachment="platform",
                attestation="direct",
                ceremony_life=60,
                second_factor_user_verification="required",
                second_factor_attachment="any",
            )
        )
    )
    options = await hanko.begin_registration("ann")
    assert (options["timeout"], options["attestation"]) == (60_000, "direct")
    selection = options["authenticatorSelection"]
    assert (selection["userVerification"], selection["authenticatorAttachment"]) == (
        "discouraged",
        "platform",
    )
    assert (await hanko.begin())["userVerification"] == "discouraged"
    selection = (await hanko.begin_registration("ann", at=SECOND_REGISTRATION))[
        "authenticatorSelection"
    ]
    assert selection == {
        "userVerification": "required",
        "residentKey": "discouraged",
        "requireResidentKey": False,
    }


async def test_an_authenticator_registers_once(
    broker: Started, hanko: Hanko, device: Authenticator
) -> None:
    """`excludeCredentials` has what the user holds, second factors too; a credential id that
    somebody has is refused.
    """
    first = (await hanko.register("ann", device))["cred"]
    second = (await hanko.register("ann", Authenticator(), at=SECOND_REGISTRATION))["cred"]
    for at in (REGISTRATION, SECOND_REGISTRATION):
        options = await hanko.begin_registration("ann", at=at)
        assert {d["id"] for d in options["excludeCredentials"]} == {first, second}
        assert (await hanko.begin_registration("bob", at=at))["excludeCredentials"] == []
    held = device.credentials("example.org")[0].id
    made = Authenticator().register(
        await hanko.begin_registration("bob"), ORIGIN, credential_id=held
    )
    with refused(broker, "webauthn_login_failed", "duplicate"):
        details = await hanko.refused(
            400, "failed to validate attestation", REGISTRATION + "/finalize", made
        )
    assert "ann" not in details
    assert await hanko.credentials("bob") == []


@pytest.mark.parametrize(
    "user", ["sixteen bytes ok", "b" * 16, "x", "é" * 256, "a/b?c=%25", "A\u030a 🔑"]
)
async def test_user_ids_of_any_kind(hanko: Hanko, device: Authenticator, user: str) -> None:
    """Of 16 bytes too, which the vendor lets register and never sign in."""
    made = device.register(await hanko.begin_registration(user), ORIGIN)
    assert (await hanko.finish(REGISTRATION, made))["sub"] == user
    assert (await hanko.login(device))["sub"] == user
    assert (await hanko.login(device, user=user))["sub"] == user


# -- login -----------------------------------------------------------------------------------------


async def test_who_signs_in(broker: Started, hanko: Hanko, device: Authenticator) -> None:
    """Whoever owns the passkey; where a user was named, only that one's passkeys."""
    other = Authenticator()
    await hanko.register("ann", device)
    await hanko.register("bob", other)
    options = await hanko.begin(user_id="ann")
    answer = other.authenticate({**options, "allowCredentials": []}, ORIGIN)
    with refused(broker, "webauthn_login_failed", "not_offered"):
        await hanko.refused(401, "failed to validate assertion", LOGIN + "/finalize", answer)
    assert (await hanko.login(other))["sub"] == "bob"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"signature": b"x"}, "signature"),
        ({"rp_id": "evil.example"}, "rp_id"),
        ({"uv": False}, "user_verification"),
        ({"user_handle": b64(b"somebody")}, "user_handle"),
        ({"user_handle": None}, "user_handle"),
        ({"credential_id": b"unknown"}, "unknown_credential"),
        ({"cross_origin": True}, "cross_origin"),
        ({"counter": 0}, "counter"),
    ],
)
async def test_refused_logins_are_alike(
    broker: Started, hanko: Hanko, device: Authenticator, how: Any, reason: str
) -> None:
    """To a caller without a key; the operator's metric and log tell them apart."""
    await hanko.register("ann", device)
    answers = []
    for more in ({"signature": b"no"}, how):
        answer = device.authenticate(await hanko.begin(), ORIGIN, **more)
        answers.append(await hanko.page(LOGIN + "/finalize", answer))
    assert (answers[0].status, answers[0].json["title"]) == (401, "failed to validate assertion")
    same_answer(*answers)
    assert lines(broker, code="discoverable_login_failed", reason=reason)


async def test_a_clone_is_found(broker: Started, hanko: Hanko, device: Authenticator) -> None:
    """The counter is kept, which the vendor doesn't."""
    await hanko.register("ann", device)
    await hanko.login(device, counter=9)
    with refused(broker, "discoverable_login_failed", "counter"):
        answer = device.authenticate(await hanko.begin(), ORIGIN, counter=9)
        await hanko.refused(401, "failed to validate assertion", LOGIN + "/finalize", answer)


async def test_users_without_passkeys_are_no_500(
    broker: Started, hanko: Hanko, device: Authenticator
) -> None:
    """Begun, revoked, or with second factors only."""
    title = "user has no suitable credentials for this operation"
    await hanko.begin_registration("begun")
    cred = (await hanko.register("gone", device))["cred"]
    await hanko.send("DELETE", f"/credentials/{cred}")
    await hanko.register("mfa", Authenticator(), at=SECOND_REGISTRATION)
    for user in ("begun", "gone", "mfa"):
        body: dict[str, object] = {"user_id": user, "transaction_id": "t", "transaction_data": {}}
        for path in (LOGIN + "/initialize", TRANSACTION + "/initialize"):
            await hanko.refused(400, title, path, body)
    await hanko.refused(400, title, SECOND_LOGIN + "/initialize", {"user_id": "begun"})
    await hanko.refused(404, "user not found", SECOND_LOGIN + "/initialize", {"user_id": "nobody"})
    assert not lines(broker, status=500)


# -- second factor ---------------------------------------------------------------------------------


async def test_a_second_factor_never_signs_in_alone(
    broker: Started, hanko: Hanko, device: Authenticator
) -> None:
    """Not discoverable, not for a named user, not as an approval, not through the Flex API;
    passkeys are second factors too.
    """
    key = Authenticator()
    passkey = (await hanko.register("ann", device))["cred"]
    second = (await hanko.register("ann", key, at=SECOND_REGISTRATION))["cred"]
    assert {c["id"]: c["is_mfa"] for c in await hanko.credentials("ann")} == {
        passkey: False,
        second: True,
    }
    options = await hanko.begin(SECOND_LOGIN, user_id="ann")
    assert {d["id"] for d in options["allowCredentials"]} == {passkey, second}
    for one in (key, device):
        claims = await hanko.login(one, at=SECOND_LOGIN, user="ann")
        assert (claims["sub"], claims["purpose"]) == ("ann", "authenticate_second_factor")
    options = await hanko.begin(user_id="ann")
    assert [d["id"] for d in options["allowCredentials"]] == [passkey]
    approval = {"user_id": "ann", "transaction_id": "t", "transaction_data": {}}
    for at, begun in (
        (LOGIN, options),
        (LOGIN, await hanko.begin()),
        (TRANSACTION, await hanko.begin(TRANSACTION, **approval)),
    ):
        answer = key.authenticate({**begun, "allowCredentials": []}, ORIGIN)
        await hanko.refused(401, "failed to validate assertion", at + "/finalize", answer)
    assert lines(broker, reason="second_factor")
    handle, begun = await hanko.wire.begin("authenticate", None)
    answer = key.authenticate(begun, ORIGIN)
    assert (await hanko.wire.finish("authenticate", handle, answer)).status == 401


# -- transactions ----------------------------------------------------------------------------------


async def test_a_transaction_id_is_unique_in_its_tenant(
    broker: Started, hanko: Hanko, open_app: OpenApp, device: Authenticator
) -> None:
    """Across users, also of one that was abandoned; of 20 at once one begins."""
    await hanko.register("ann", device)
    await hanko.register("bob", Authenticator())
    body = {"user_id": "ann", "transaction_id": "t", "transaction_data": {"a": 1}}
    answers = await asyncio.gather(
        *(hanko.send("POST", TRANSACTION + "/initialize", body) for _ in range(20))
    )
    assert sorted(a.status for a in answers) == [200] + [409] * 19
    with refused(broker, "approval_exists", "approval_exists"):
        await hanko.refused(
            409,
            "transaction already exists",
            TRANSACTION + "/initialize",
            {**body, "user_id": "bob"},
        )
    other = Hanko(await open_app(QUICK))
    await other.register("ann", Authenticator())
    await other.ok(TRANSACTION + "/initialize", body)


async def test_what_was_approved(broker: Started, hanko: Hanko, device: Authenticator) -> None:
    """`trans` is in the token of a transaction alone; the list shows which were signed by when they
    changed.
    """
    await hanko.register("ann", device)
    user = (await hanko.wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    options = await hanko.begin(
        TRANSACTION, user_id="ann", transaction_id="one", transaction_data={"to": "Bob"}
    )
    await hanko.begin(TRANSACTION, user_id="ann", transaction_id="two", transaction_data=[1])
    broker.clock.ahead += 5
    claims = await hanko.finish(TRANSACTION, device.authenticate(options, ORIGIN))
    assert (claims["sub"], claims["trans"], claims["purpose"]) == ("ann", "one", "approve")
    assert "trans" not in await hanko.login(device)
    listed = await hanko.get(f"{TRANSACTION}/{user}")
    assert [
        (row["identifier"], row["data"], row["updated_at"] > row["created_at"]) for row in listed
    ] == [
        ("one", '{"to":"Bob"}', True),
        ("two", "[1]", False),
    ]
    # The vendor's schema of a transaction's id: format uuid, 36 characters. It is the same whenever
    # it is read.
    ids = [row["id"] for row in listed]
    assert [str(UUID(one)) for one in ids] == ids
    assert len(set(ids)) == 2
    assert [row["id"] for row in await hanko.get(f"{TRANSACTION}/{user}")] == ids


async def test_transactions_are_their_tenants(
    hanko: Hanko, open_app: OpenApp, device: Authenticator
) -> None:
    await hanko.register("ann", device)
    await hanko.begin(TRANSACTION, user_id="ann", transaction_id="one", transaction_data=[1])
    user = (await hanko.wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    other = Hanko(await open_app())
    assert await other.get(f"{TRANSACTION}/{user}") == []
    for bad in ("ann", user[:-1], user + "a", "initialize", "%00", "é" * 24):
        await hanko.refused(400, "invalid user id", f"{TRANSACTION}/{bad}", method="GET")
