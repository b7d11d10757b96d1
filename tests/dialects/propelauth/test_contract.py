"""PropelAuth BYO's commands on the wire, row by row of the contract: golden files, statuses, types,
and what is never there.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from broker.dialects.propelauth import routes as propelauth
from broker.errors import Refusal
from broker.model import Policy
from broker.settings import SettingsFault
from tests.conftest import OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, Misbehaviour, b64
from tests.support.byo import ERRORS, JAVA, KEY_ERRORS, PATH, SUCCESS, Byo, judge
from tests.support.golden import FOLDER, golden
from tests.support.signals import counted, lines, refused
from tests.support.wire import ORIGIN, Answer, Wire

OTHER_ORIGIN = "https://staging.example"
CEREMONIES = [command for command in SUCCESS if command.startswith(("Start", "Finish"))]


@pytest.fixture
def byo(wire: Wire) -> Byo:
    return Byo(wire)


async def golden_command(
    byo: Byo, name: str, command: str, data: object, *, agent: str = "node", key: str | None = None
) -> Answer:
    headers = {
        "Authorization": f"Bearer {byo.wire.key if key is None else key}",
        "User-Agent": agent,
    }
    body = {"command": command, "data": data}
    answer = await golden(
        byo.wire,
        f"propelauth/{name}",
        "POST",
        "/run-command",
        body,
        headers=headers,
        below="/propelauth",
    )
    judge(answer, command, java=agent.startswith("Java"))
    return answer


# -- golden files ----------------------------------------------------------------------------------


async def test_registration(broker: Started, byo: Byo, device: Authenticator) -> None:
    data: dict[str, Any] = {
        "userId": "ann",
        "emailOrUsername": "ann@example.org",
        "userDisplayName": "Ann",
        "passkeyDisplayName": "Ann's phone",
    }
    with counted(broker, "broker_ceremonies_total", kind="register", step="begin", result="ok"):
        begun = await golden_command(byo, "start-registration", "StartPasskeyRegistration", data)
    made = device.register(begun.json["registrationOptions"], ORIGIN)
    data = {"userId": "ann", "publicKey": made}
    with counted(broker, "broker_ceremonies_total", kind="register", step="finish", result="ok"):
        await golden_command(byo, "finish-registration", "FinishPasskeyRegistration", data)
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        await golden_command(byo, "finish-registration-again", "FinishPasskeyRegistration", data)
    await golden_command(byo, "list", "FetchAllPasskeysForUser", {"userId": "ann"})
    assert [x for x in await broker.events(byo.wire.app_id) if x[0].startswith("passkey")] == [
        ("passkey.registered", "done", None)
    ]


async def test_authentication(broker: Started, byo: Byo, device: Authenticator) -> None:
    await byo.register("ann", device)
    begun = await golden_command(
        byo, "start-authentication", "StartPasskeyAuthentication", {"userId": "ann"}
    )
    answer = device.authenticate(begun.json["authenticationOptions"], ORIGIN)
    data = {"userId": "ann", "publicKey": answer}
    with counted(
        broker, "broker_ceremonies_total", kind="authenticate", step="finish", result="ok"
    ):
        await golden_command(byo, "finish-authentication", "FinishPasskeyAuthentication", data)
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        await golden_command(
            byo, "finish-authentication-again", "FinishPasskeyAuthentication", data
        )
    assert ("passkey.used", "done", None) in await broker.events(byo.wire.app_id)
    assert lines(broker, route=PATH, status=200, app=byo.wire.app_id)


async def test_deregistration(broker: Started, byo: Byo, device: Authenticator) -> None:
    data = {"userId": "ann", "credentialId": await byo.register("ann", device)}
    await golden_command(byo, "deregister", "DeregisterPasskey", data)
    with refused(broker, "device_not_found", "device_not_found"):
        await golden_command(byo, "deregister-again", "DeregisterPasskey", data)
    await byo.register("ann", Authenticator())
    await golden_command(byo, "deregister-all", "DeregisterAllPasskeysForUser", {"userId": "ann"})
    await golden_command(byo, "list-none", "FetchAllPasskeysForUser", {"userId": "ann"})
    assert [x for x in await broker.events(byo.wire.app_id) if x[0] == "passkey.revoked"] == [
        ("passkey.revoked", "done", None)
    ] * 2


async def test_ping_and_unknown_commands(broker: Started, byo: Byo) -> None:
    answer = await golden_command(byo, "ping", "Ping", {})
    assert abs(answer.json["timestamp"] - broker.clock()) < 60
    with refused(broker, "invalid_request", "command"):
        await golden_command(byo, "unknown-command", "CreateSession", {})
    assert (await byo.send({"command": "Ping"})).json.keys() == {"timestamp"}
    assert (await byo.send({"command": "Ping", "data": None})).json.keys() == {"timestamp"}


async def test_too_many_passkeys(broker: Started, open_app: OpenApp, device: Authenticator) -> None:
    """All four keys, but two for the Java client, which takes no name that it doesn't know."""
    byo = Byo(await open_app(Policy(max_passkeys=1)))
    data = {"userId": "ann", "emailOrUsername": "ann@example.org"}
    options = await byo.begin_registration("ann")
    await byo.ok(
        "FinishPasskeyRegistration", userId="ann", publicKey=device.register(options, ORIGIN)
    )
    with refused(broker, "too_many_passkeys", "too_many_passkeys", times=2):
        for name, agent in (("too-many", "node"), ("too-many-java", JAVA)):
            answer = await golden_command(byo, name, "StartPasskeyRegistration", data, agent=agent)
            assert answer.status == 409
    await byo.begin_registration("bob")


async def test_named_errors(broker: Started, byo: Byo, device: Authenticator) -> None:
    user: dict[str, object] = {"userId": "ann"}
    with refused(broker, "user_not_found", "user_not_found"):
        await golden_command(byo, "no-passkeys", "StartPasskeyAuthentication", user)
    await byo.register("ann", device)
    bad = user | {"additionalAllowedOrigin": "not an origin"}
    with refused(broker, "invalid_request", "additional_origin"):
        await golden_command(byo, "no-origin", "StartPasskeyAuthentication", bad)
    made = Authenticator().register(
        await byo.begin_registration("ann"),
        ORIGIN,
        credential_id=device.credentials("example.org")[0].id,
    )
    with refused(broker, "webauthn_login_failed", "duplicate"):
        data = user | {"publicKey": made}
        await golden_command(byo, "already-registered", "FinishPasskeyRegistration", data)
    made = Authenticator().register(await byo.begin_registration("ann"), OTHER_ORIGIN)
    with refused(broker, "webauthn_login_failed", "origin"):
        data = user | {"publicKey": made}
        await golden_command(byo, "registration-origin", "FinishPasskeyRegistration", data)
    for name, origin, how, reason in (
        ("authentication-origin", OTHER_ORIGIN, {}, "origin"),
        ("authentication-signature", ORIGIN, {"signature": b"x"}, "signature"),
    ):
        options = await byo.begin_authentication("ann")
        data = user | {
            "publicKey": device.authenticate(options, origin, **cast("Misbehaviour", how))
        }
        with refused(broker, "webauthn_login_failed", reason):
            await golden_command(byo, name, "FinishPasskeyAuthentication", data)


async def test_errors_below_the_prefix(byo: Byo) -> None:
    headers = {"Authorization": f"Bearer {byo.wire.key}"}
    for name, method, path, status in (
        ("error-404", "POST", "/nowhere", 404),
        ("error-405", "GET", "/run-command", 405),
    ):
        answer = await golden(
            byo.wire, f"propelauth/{name}", method, path, headers=headers, below="/propelauth"
        )
        judge(answer, "")
        assert answer.status == status


async def test_keys(broker: Started, byo: Byo) -> None:
    unknown = "pbk_" + "a" * 43
    for name, key, reason in (
        ("key-missing", "", "key_missing"),
        ("key-prefix", "sk_live", "key_malformed"),
        ("key-unknown", unknown, "key_unknown"),
    ):
        with refused(broker, "invalid_access_token", reason):
            answer = await golden_command(byo, name, "Ping", {}, key=key)
        assert answer.status == 401
    assert (await byo.send({}, headers={"Authorization": "Bearer pbk_cut"})).json == {
        "type": "IntegrationKeyNotFound"
    }


async def test_an_app_that_is_gone(broker: Started, start_broker: Starter, byo: Byo) -> None:
    """A key that is still remembered for an app that was deleted."""
    other = await start_broker(cache_seconds=1.0)
    byo.wire.url = other.url
    await byo.ok("Ping")
    await broker.parts.directory.delete_app(byo.wire.app_id)
    other.parts.directory._apps.forget(byo.wire.app_id)
    with refused(other, "app_not_found", "app_not_found"):
        answer = await byo.run("Ping")
    assert (answer.status, answer.json) == (401, {"type": "IntegrationKeyNotFound"})


def test_every_named_error_has_a_golden_file() -> None:
    files = (FOLDER / "propelauth" / "golden").glob("*.json")
    seen = {json.loads(f.read_text())["answer"]["body"].get("type") for f in files}
    assert set().union(*ERRORS.values()) | KEY_ERRORS | {"UnexpectedError"} <= seen


# -- options ---------------------------------------------------------------------------------------


async def test_options_are_bare_and_whole(byo: Byo, device: Authenticator) -> None:
    """The JSON of WebAuthn L3 with nothing round it, and no null anywhere."""
    options = await byo.begin_registration("ann")
    assert options["user"]["name"] == options["user"]["displayName"] == "ann@example.org"
    assert b"null" not in json.dumps(options).encode()
    assert options["excludeCredentials"] == []
    credential_id = await byo.register("ann", device)
    options = await byo.begin_registration("ann", userDisplayName="Ann", passkeyDisplayName="phone")
    assert (options["user"]["name"], options["user"]["displayName"]) == ("ann@example.org", "Ann")
    assert [d["id"] for d in options["excludeCredentials"]] == [credential_id]
    options = await byo.begin_authentication("ann")
    assert [d["id"] for d in options["allowCredentials"]] == [credential_id]
    assert b"null" not in json.dumps(options).encode()


async def test_a_label_is_shown_where_one_was_given(byo: Byo) -> None:
    for name in ({"passkeyDisplayName": "phone"}, {"passkeyDisplayName": None}, {}):
        device = Authenticator()
        options = await byo.begin_registration("ann", **name)
        await byo.ok(
            "FinishPasskeyRegistration", userId="ann", publicKey=device.register(options, ORIGIN)
        )
    assert [item.get("displayName") for item in await byo.passkeys("ann")] == ["phone", None, None]


async def test_passkeys_that_are_not_live_are_not_offered(open_app: OpenApp) -> None:
    wire = await open_app(Policy(live_at="redemption"))
    byo, pending, live = Byo(wire), Authenticator(), Authenticator()
    await wire.register(await wire.open_registration("ann"), pending)
    await byo.refused(
        404, "NoPasskeysRegisteredForUser", "StartPasskeyAuthentication", userId="ann"
    )
    credential_id = await byo.register(
        "ann", live
    )  # live at once, for the caller's finish is the redemption
    options = await byo.begin_authentication("ann")
    assert [d["id"] for d in options["allowCredentials"]] == [credential_id]
    await byo.authenticate("ann", live)
    assert len(await byo.passkeys("ann")) == 2


# -- fields ----------------------------------------------------------------------------------------


async def test_nulls_and_unknown_fields(byo: Byo, device: Authenticator) -> None:
    more = {
        "userDisplayName": None,
        "passkeyDisplayName": None,
        "additionalAllowedOrigin": None,
        "more": [1],
    }
    made = device.register(await byo.begin_registration("ann", **more), ORIGIN)
    finish: dict[str, object] = {"userId": "ann", "additionalAllowedOrigin": None, "more": {}}
    await byo.ok("FinishPasskeyRegistration", publicKey=made, **finish)
    answer = device.authenticate(await byo.begin_authentication("ann"), ORIGIN)
    await byo.ok("FinishPasskeyAuthentication", publicKey=answer, **finish)


async def test_the_answer_may_be_json_text(byo: Byo, device: Authenticator) -> None:
    made = device.register(await byo.begin_registration("ann"), ORIGIN)
    await byo.ok("FinishPasskeyRegistration", userId="ann", publicKey=json.dumps(made))
    answer = device.authenticate(await byo.begin_authentication("ann"), ORIGIN)
    await byo.ok("FinishPasskeyAuthentication", userId="ann", publicKey=json.dumps(answer))


REQUIRED = {
    "StartPasskeyRegistration": ("userId", "emailOrUsername"),
    "FinishPasskeyRegistration": ("userId", "publicKey"),
    "StartPasskeyAuthentication": ("userId",),
    "FinishPasskeyAuthentication": ("userId", "publicKey"),
    "FetchAllPasskeysForUser": ("userId",),
    "DeregisterPasskey": ("userId", "credentialId"),
    "DeregisterAllPasskeysForUser": ("userId",),
}


@pytest.mark.parametrize("command", REQUIRED)
async def test_what_is_missing_is_named_and_spends_nothing(
    byo: Byo, device: Authenticator, command: str
) -> None:
    made = device.register(await byo.begin_registration("ann"), ORIGIN)
    whole: dict[str, object] = {
        "userId": "ann",
        "emailOrUsername": "a",
        "publicKey": made,
        "credentialId": "YQ",
    }
    for name in REQUIRED[command]:
        bads: tuple[Any, ...] = ("missing", None, "", 7, {}, "x" * 257)
        for bad in bads:
            if name == "credentialId" and isinstance(bad, str) and len(bad) == 257:
                continue
            data = {k: v for k, v in whole.items() if k in REQUIRED[command] and k != name}
            if bad != "missing":
                data[name] = bad
            details = await byo.refused(400, "UnexpectedError", command, **data)
            assert name in details or name == "publicKey"
    await byo.ok("FinishPasskeyRegistration", userId="ann", publicKey=made)


async def test_user_ids_have_1_to_256_characters(byo: Byo) -> None:
    """Of any kind, compared as they are."""
    for user in ("x", "x" * 256, "Ångström 🔑", "A\u030angstro\u0308m 🔑"):
        device = Authenticator()
        await byo.register(user, device)
        await byo.authenticate(user, device)
        assert len(await byo.passkeys(user)) == 1


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"data":{}}', b'{"command":7}', b'{"command":"Ping","data":[]}']
)
async def test_a_body_that_is_no_command(broker: Started, byo: Byo, body: bytes) -> None:
    answer = await byo.send(None, data=body)
    judge(answer, "")
    assert (answer.status, answer.json["type"]) == (400, "UnexpectedError")
    assert lines(broker, route=PATH, status=400, code="invalid_request")


# -- origins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", CEREMONIES)
async def test_an_additional_origin_that_is_none(
    broker: Started, byo: Byo, device: Authenticator, command: str
) -> None:
    """Told at once, and nothing is spent."""
    await byo.register("ann", device)
    data: dict[str, object] = {"userId": "ann", "emailOrUsername": "a"}
    made: dict[str, Any] = {}
    if command == "FinishPasskeyRegistration":
        made = Authenticator().register(await byo.begin_registration("ann"), ORIGIN)
    elif command == "FinishPasskeyAuthentication":
        made = device.authenticate(await byo.begin_authentication("ann"), ORIGIN)
    data |= {"publicKey": made} if made else {}
    bad = [
        "",
        "staging.example",
        "https://",
        "https://x/path",
        "https://u@x",
        "ftp://x",
        "https://x:99999",
        " ",
    ]
    with refused(broker, "invalid_request", "additional_origin", times=len(bad)):
        for origin in bad:
            await byo.refused(
                400,
                "CannotParseAdditionalAllowedOrigin",
                command,
                additionalAllowedOrigin=origin,
                **data,
            )
    await byo.refused(400, "UnexpectedError", command, additionalAllowedOrigin=7, **data)
    await byo.ok(command, **data)


async def test_an_additional_origin_that_is_registered_changes_nothing(
    open_app: OpenApp, device: Authenticator
) -> None:
    byo = Byo(await open_app(origins=(ORIGIN, "https://app.example.org:8443")))
    for origin in (ORIGIN, "HTTPS://App.example.org:8443/"):
        device, user = Authenticator(), origin
        options = await byo.begin_registration(user, additionalAllowedOrigin=origin)
        made = device.register(options, "https://app.example.org:8443")
        data = {"userId": user, "additionalAllowedOrigin": origin}
        await byo.ok("FinishPasskeyRegistration", publicKey=made, **data)
        answer = device.authenticate(
            await byo.begin_authentication(user), "https://app.example.org:8443"
        )
        await byo.ok("FinishPasskeyAuthentication", publicKey=answer, **data)


@pytest.mark.parametrize("kind", ["Registration", "Authentication"])
async def test_an_additional_origin_that_is_not_registered(
    broker: Started, byo: Byo, device: Authenticator, kind: str
) -> None:
    """Ignored at start; at finish refused, whether the call asks for it or the answer comes from
    it.
    """
    await byo.register("ann", device)
    more: dict[str, Any] = {"additionalAllowedOrigin": OTHER_ORIGIN}

    async def answered(origin: str) -> dict[str, Any]:
        if kind == "Registration":
            return Authenticator().register(await byo.begin_registration("ann", **more), origin)
        begun = await byo.ok("StartPasskeyAuthentication", userId="ann", **more)
        return device.authenticate(begun["authenticationOptions"], origin)

    finish = f"FinishPasskey{kind}"
    data = {"userId": "ann", "publicKey": await answered(ORIGIN)}
    for origin in (OTHER_ORIGIN, "http://10.0.0.1:3000", "android:apk-key-hash:" + "k" * 43):
        with refused(broker, "operation_not_allowed", "additional_origin"):
            details = await byo.refused(
                403, "OriginNotAllowed", finish, **{**data, "additionalAllowedOrigin": origin}
            )
        assert "register" in details["message"]
    await byo.ok(finish, **data)
    data["publicKey"] = await answered(OTHER_ORIGIN)
    with refused(broker, "webauthn_login_failed", "origin"):
        await byo.refused(403, "OriginNotAllowed", finish, **data)
    await byo.refused(400, f"No{kind}ChallengeFound", finish, **data)


# -- refusals --------------------------------------------------------------------------------------


def subclasses(kind: type[Refusal]) -> set[type[Refusal]]:
    return {kind}.union(*(subclasses(below) for below in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(subclasses(Refusal) - {Refusal}, key=repr))
def test_every_refusal_has_a_status(kind: type[Refusal]) -> None:
    """So that no refusal can become a 500, and the table has no row that nothing raises."""
    answer = propelauth.render(kind())
    assert 400 <= answer.status < 600
    assert answer.status == propelauth.STATUS[kind]
    assert set(propelauth.STATUS) == subclasses(Refusal) - {Refusal}
    assert isinstance(answer.body, bytes)
    judge(Answer(answer.status, answer.headers, answer.body), "")


def test_the_types_are_those_of_the_contract() -> None:
    for command, rows in propelauth.TYPES.items():
        assert set(rows.values()) == ERRORS.get(command, set())
    assert propelauth.TYPES.keys() == SUCCESS.keys()
    assert set(propelauth._KEY_TYPES.values()) == KEY_ERRORS
    readme = Path(propelauth.__file__).with_name("README.md").read_text()
    kinds = set().union(*ERRORS.values()) | KEY_ERRORS | {"UnexpectedError"}
    assert [kind for kind in kinds if f"`{kind}`" not in readme] == []


async def test_a_registered_credential(broker: Started, byo: Byo, device: Authenticator) -> None:
    """Whoever has it."""
    credential_id = await byo.register("ann", device)
    for user in ("ann", "bob"):
        made = Authenticator().register(
            await byo.begin_registration(user),
            ORIGIN,
            credential_id=device.credentials("example.org")[0].id,
        )
        assert made["id"] == credential_id
        with refused(broker, "webauthn_login_failed", "duplicate"):
            await byo.refused(
                409,
                "PasskeyForUserAlreadyExists",
                "FinishPasskeyRegistration",
                userId=user,
                publicKey=made,
            )
    assert await byo.passkeys("bob") == []


async def test_users_without_passkeys(byo: Byo, device: Authenticator) -> None:
    """Unknown, begun, and with all passkeys gone: one answer."""
    await byo.begin_registration("begun")
    await byo.register("gone", device)
    await byo.ok("DeregisterAllPasskeysForUser", userId="gone")
    for user in ("unknown", "begun", "gone"):
        await byo.refused(
            404, "NoPasskeysRegisteredForUser", "StartPasskeyAuthentication", userId=user
        )
        assert await byo.passkeys(user) == []
        assert await byo.ok("DeregisterAllPasskeysForUser", userId=user) == {}
        await byo.refused(
            404, "PasskeyNotFound", "DeregisterPasskey", userId=user, credentialId="YQ"
        )


async def test_only_the_users_own_passkey_is_deregistered(
    byo: Byo, open_app: OpenApp, device: Authenticator
) -> None:
    credential_id = await byo.register("ann", device)
    await byo.register("bob", Authenticator())
    other = Byo(await open_app())
    await other.register("ann", Authenticator())
    for backend, user, wrong in (
        (byo, "bob", credential_id),
        (other, "ann", credential_id),
        (byo, "ann", credential_id + "="),
        (byo, "ann", b64(b"\0" * 32)),
    ):
        await backend.refused(
            404, "PasskeyNotFound", "DeregisterPasskey", userId=user, credentialId=wrong
        )
    assert [item["credentialId"] for item in await byo.passkeys("ann")] == [credential_id]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"signature": b"x"}, "signature"),
        ({"rp_id": "evil.example"}, "rp_id"),
        ({"uv": False}, "user_verification"),
        ({"user_handle": b64(b"somebody")}, "user_handle"),
    ],
)
async def test_a_refused_sign_in_has_a_sentence(
    broker: Started, byo: Byo, device: Authenticator, how: Any, reason: str
) -> None:
    await byo.register("ann", device)
    answer = device.authenticate(await byo.begin_authentication("ann"), ORIGIN, **how)
    with refused(broker, "webauthn_login_failed", reason):
        details = await byo.refused(
            400, "UnexpectedError", "FinishPasskeyAuthentication", userId="ann", publicKey=answer
        )
    assert details.endswith(".")
    assert ("passkey.used", "refused", reason) in await broker.events(byo.wire.app_id)


# -- HTTP ------------------------------------------------------------------------------------------


async def test_every_path_below_has_the_vendors_shape(broker: Started, byo: Byo) -> None:
    headers = {"Authorization": f"Bearer {byo.wire.key}"}
    for method, path, status in (
        ("GET", PATH, 405),
        ("DELETE", PATH, 405),
        ("OPTIONS", PATH, 405),
        ("POST", PATH + "/", 404),
        ("POST", "/propelauth/", 404),
        ("GET", "/propelauth", 404),
        ("POST", "/propelauth/ping", 404),
    ):
        answer = await byo.wire.send(method, byo.wire.url + path, headers=headers)
        judge(answer, "")
        assert (answer.status, answer.json["type"]) == (status, "UnexpectedError")
    answer = await byo.send(None, data=b" " * 70_000)
    judge(answer, "")
    assert (answer.status, answer.headers["Connection"]) == (413, "close")
    answer = await byo.send(None, data=b"x", headers={"Content-Encoding": "gzip"})
    judge(answer, "")
    assert answer.status == 415
    assert lines(broker, route=PATH, status=415)


async def test_a_store_that_is_down(start_broker: Starter, session: Any, own_stores: Any) -> None:
    """503 with Retry-After, in the shape that every client reads."""
    started = await start_broker(own_stores)
    byo = Byo(await Wire.open(started.service, session))
    await byo.begin_registration("ann")
    own_stores.stop()
    with refused(started, "service_unavailable", "postgres"):
        answer = await byo.run("FetchAllPasskeysForUser", userId="ann")
    assert (answer.status, answer.json["type"]) == (503, "UnexpectedError")
    assert answer.headers["Retry-After"].isdigit()


async def test_no_page_reads_an_answer(byo: Byo) -> None:
    """A key does not belong in a page: no CORS header, whatever the origin."""
    answer = await byo.send({"command": "Ping"}, headers={"Origin": ORIGIN})
    assert answer.status == 200
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


async def test_the_java_clients_request(broker: Started, byo: Byo, device: Authenticator) -> None:
    """`data` first, nulls for what is not given, and an offer of HTTP/2 that is declined by
    answering in HTTP/1.1.
    """
    body = json.dumps(
        {
            "data": {
                "userId": "ann",
                "emailOrUsername": "a@b.c",
                "userDisplayName": None,
                "passkeyDisplayName": None,
                "additionalAllowedOrigin": None,
            },
            "command": "StartPasskeyRegistration",
        }
    ).encode()
    url = urlsplit(broker.url)
    head = (
        f"POST {PATH} HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        f"Content-Length: {len(body)}\r\nHost: {url.netloc}\r\n"
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
        f"User-Agent: {JAVA}\r\nAuthorization: Bearer {byo.wire.key}\r\n"
        "Content-Type: application/json\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        for _ in range(2):  # the connection stays, as after any request
            writer.write(head.encode() + body)
            seen = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode()
            status, *fields = seen.split("\r\n")
            headers = {
                k.title(): v for k, _, v in (field.partition(": ") for field in fields if field)
            }
            assert status.split(" ")[:2] == ["HTTP/1.1", "200"]
            assert "Upgrade" not in headers
            content = await reader.readexactly(int(headers["Content-Length"]))
            answer = Answer(200, headers, content)
            judge(answer, "StartPasskeyRegistration", java=True)
    finally:
        writer.close()
    made = device.register(answer.json["registrationOptions"], ORIGIN)
    await byo.ok("FinishPasskeyRegistration", userId="ann", publicKey=made)


async def test_a_dialect_that_does_not_exist(start_broker: Starter) -> None:
    with pytest.raises(
        SettingsFault, match=r"^BROKER_DIALECTS must be of flex, hanko, passlock, propelauth"
    ):
        await start_broker(dialects=("flex", "passlock9"))


async def test_dialects_can_be_switched_off(start_broker: Starter, session: Any) -> None:
    """What is off is nowhere, and answers as any unknown path."""
    started = await start_broker(dialects=("flex",))
    byo = Byo(await Wire.open(started.service, session))
    with refused(started, "not_found", "not_found"):
        answer = await byo.send({"command": "Ping"})
    assert (answer.status, answer.code) == (404, "not_found")
    started = await start_broker(dialects=("propelauth",))
    byo = Byo(await Wire.open(started.service, session))
    await byo.ok("Ping")
    with refused(started, "not_found", "not_found"):
        assert (await byo.wire.keyed("GET", "/users")).status == 404
