"""The Passlock dialect, decision by decision: who may ask what, what a ceremony is bound to, what
its tokens say.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.dialects.passlock import routes as dialect
from broker.errors import Refusal
from broker.model import Policy
from tests.conftest import SKEW, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, AuthenticatorRefused, b64
from tests.support.passlock import ERRORS, Passlock, judge
from tests.support.signals import lines, refused, same_answer
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

REGISTRATION, AUTHENTICATION = "/passkey/registration", "/passkey/authentication"
ANN = {"rpId": RP_ID, "userId": "ann", "username": "ann@example.org"}


@pytest.fixture
def passlock(wire: Wire) -> Passlock:
    return Passlock(wire)


async def changed(broker: Started, passlock: Passlock, **policy: Any) -> None:
    """The app with another policy."""
    directory = broker.parts.directory
    app = await directory.app(passlock.wire.app_id)
    await directory.update_app(replace(app, policy=replace(app.policy, **policy)))


def claims(token: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(urlsafe_b64decode(token.split(".")[1] + "=="))
    return found


# -- refusals --------------------------------------------------------------------------------------


def subclasses(kind: type[Refusal]) -> set[type[Refusal]]:
    return {kind}.union(*(subclasses(below) for below in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(subclasses(Refusal) - {Refusal}, key=repr))
def test_every_refusal_has_a_tag_and_a_status(kind: type[Refusal]) -> None:
    """So that no refusal can become a 500, and the tables have no row that nothing raises."""
    answer = dialect.render(kind())
    assert answer.status == dialect.STATUS[kind] >= 400
    assert set(dialect.STATUS) == set(dialect.TAGS) == subclasses(Refusal) - {Refusal}
    assert isinstance(answer.body, bytes)
    shown = Answer(answer.status, answer.headers, answer.body)
    judge(shown)
    assert shown.json["_tag"] == dialect.TAGS[kind]


def test_the_readme_names_every_error() -> None:
    readme = Path(dialect.__file__).with_name("README.md").read_text()
    assert set(dialect.TAGS.values()) | {"@error/PasskeyNotFound"} == ERRORS
    assert [tag for tag in ERRORS if f"`{tag}`" not in readme] == []


OURS = [
    "/v2",
    "/v2/",
    "/v2/{app}/nowhere",
    "/v2/nobody/passkeys",
    "/{app}",
    "/{app}/passkeys/x/y",
    "/aaguid/x",
]
NOT_OURS = [
    "/",
    "/v20",
    "/signup",
    "/v1/apps/{app}/nowhere",
    "/{app}x/passkeys",
    "/{app}x/passkey/registration/authorize",
    "/.well-known/webauthn",
    "/nowhere",
]


@pytest.mark.parametrize("path", OURS)
async def test_what_goes_wrong_has_the_vendors_shape(
    broker: Started, wire: Wire, path: str
) -> None:
    url = wire.url + path.replace("{app}", wire.app_id)
    with refused(broker, "not_found", "not_found"):
        answer = await wire.send("GET", url)
    judge(answer)
    assert (answer.status, answer.json["_tag"]) == (404, "@error/NotFound")


@pytest.mark.parametrize("path", NOT_OURS)
async def test_paths_that_nobody_owns_are_told_as_by_flex(
    broker: Started, wire: Wire, path: str
) -> None:
    with refused(broker, "not_found", "not_found"):
        answer = await wire.send("GET", wire.url + path.replace("{app}", wire.app_id))
    assert (answer.status, answer.code) == (404, "not_found")


async def test_a_body_that_is_too_large_or_compressed(broker: Started, passlock: Passlock) -> None:
    url = passlock.base + f"{REGISTRATION}/options"
    answer = await passlock.wire.send("POST", url, data=b" " * 70_000)
    judge(answer)
    assert (answer.status, answer.headers["Connection"]) == (413, "close")
    answer = await passlock.wire.send("POST", url, data=b"x", headers={"Content-Encoding": "gzip"})
    judge(answer)
    assert answer.status == 415
    assert lines(broker, status=415)


async def test_a_store_that_is_down_in_passlocks_shape(
    start_broker: Starter, session: Any, own_stores: Any
) -> None:
    started = await start_broker(own_stores)
    passlock = Passlock(await Wire.open(started.service, session))
    own_stores.stop()
    with refused(started, "service_unavailable", "postgres"):
        answer = await passlock.keyed("GET", "/passkeys/")
    assert (answer.status, answer.json["_tag"]) == (503, "@error/ServiceUnavailable")
    assert answer.headers["Retry-After"].isdigit()


async def test_a_wrong_key_and_an_unknown_tenancy_are_alike(
    broker: Started, passlock: Passlock, open_app: OpenApp
) -> None:
    """403 with the one tag that every call of the server SDK declares."""
    other = await open_app()
    first = await passlock.keyed("GET", "/passkeys/", key="")
    assert (first.status, first.json["_tag"]) == (403, "@error/Forbidden")
    same_answer(first, await passlock.keyed("GET", "/passkeys/", key=other.key))
    nobody = Passlock(Wire(passlock.wire.session, passlock.wire.url, "x" * 24, passlock.wire.key))
    same_answer(first, await nobody.keyed("GET", "/passkeys/"))
    with refused(broker, "app_not_found", "app_not_found"):
        answer = await nobody.page(f"{AUTHENTICATION}/options", {})
    assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden")


# -- authorize -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["registration", "authentication"])
async def test_the_rp_id_is_the_apps(broker: Started, passlock: Passlock, kind: str) -> None:
    await passlock.user("ann", Authenticator())
    path = f"/passkey/{kind}/authorize"
    assert (await passlock.keyed("POST", path, ANN | {"rpId": "Example.ORG"})).status == 200
    for wrong in ("evil.example", "sub.example.org", "org", "", None, 7):
        answer = await passlock.keyed("POST", path, ANN | {"rpId": wrong})
        assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
        assert "rpId" in answer.json["message"]
    assert lines(broker, reason="rp_id", status=400, app=passlock.wire.app_id)


async def test_the_rp_name_may_be_left_out_and_changes_nothing(passlock: Passlock) -> None:
    path = f"{REGISTRATION}/authorize"
    for name in ({}, {"rpName": "Another"}, {"rpName": None}):
        done = await passlock.ok("POST", path, ANN | name)
        _, options = await passlock.begin(
            "registration", {"registrationToken": done["registrationToken"]}
        )
        assert options["rp"] == {"id": RP_ID, "name": "Example"}
    assert (await passlock.keyed("POST", path, ANN | {"rpName": "  "})).status == 400


async def test_names_reach_the_authenticator(passlock: Passlock) -> None:
    for more, shown in (
        ({}, "ann@example.org"),
        ({"displayName": "Ann"}, "Ann"),
        ({"displayName": ""}, "ann@example.org"),
    ):
        token = await passlock.authorize_registration("ann", **more)
        _, options = await passlock.begin("registration", {"registrationToken": token})
        assert (options["user"]["name"], options["user"]["displayName"]) == (
            "ann@example.org",
            shown,
        )


async def test_what_is_too_long_is_named_as_the_caller_names_it(passlock: Passlock) -> None:
    for path, body in (
        (f"{REGISTRATION}/authorize", ANN | {"displayName": "x"}),
        ("/passkeys/update", {"userId": "ann", "username": "ann", "displayName": "x"}),
    ):
        for name in {*body} - {"rpId"}:
            answer = await passlock.keyed("POST", path, body | {name: "x" * 257})
            assert answer.json["message"] == f"{name} has 257 characters; 256 are allowed."
            assert answer.status == 400


async def authorized_options(passlock: Passlock, kind: str, **more: object) -> dict[str, Any]:
    authorize = (
        passlock.authorize_registration
        if kind == "registration"
        else passlock.authorize_authentication
    )
    _, options = await passlock.begin(kind, {f"{kind}Token": await authorize("ann", **more)})
    return options


def verification_in(options: dict[str, Any]) -> str:
    return str(options.get("authenticatorSelection", options)["userVerification"])


@pytest.mark.parametrize("kind", ["registration", "authentication"])
async def test_user_verification_may_be_raised(
    broker: Started, passlock: Passlock, kind: str
) -> None:
    """And lowered only where the policy says so; the policy's stands otherwise."""
    await passlock.user("ann", Authenticator())
    for policy, allowed, wish, expected in (
        ("preferred", False, "required", "required"),
        ("preferred", False, "discouraged", "preferred"),
        ("required", False, "discouraged", "required"),
        ("required", True, "discouraged", "discouraged"),
        ("required", True, None, "required"),
    ):
        await changed(broker, passlock, user_verification=policy, allow_weaker=allowed)
        options = await authorized_options(passlock, kind, userVerification=wish)
        assert verification_in(options) == expected, (policy, allowed, wish)
    bad: tuple[object, ...] = ("never", 7, [], {})
    for wrong in bad:
        body = ANN | {"userVerification": wrong}
        assert (await passlock.keyed("POST", f"/passkey/{kind}/authorize", body)).status == 400


async def test_user_verification_that_was_asked_for_is_judged(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    passlock = Passlock(await open_app(Policy(user_verification="preferred")))
    await passlock.user("ann", device)
    token = await passlock.authorize_authentication("ann", userVerification="required")
    session, options = await passlock.begin("authentication", {"authenticationToken": token})
    with refused(broker, "webauthn_login_failed", "user_verification"):
        answer = await passlock.finish(
            "authentication", session, device.authenticate(options, ORIGIN, uv=False)
        )
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    done = await passlock.authenticate("ann", device, uv=False)
    assert claims(done["id_token"])["pk:uv"] is False
    assert (await passlock.exchange(done["code"]))["passkey"]["userVerified"] is False


@pytest.mark.parametrize("kind", ["registration", "authentication"])
async def test_timeouts(broker: Started, passlock: Passlock, kind: str) -> None:
    """Milliseconds; a timeout is how long the ceremony lives, and is never longer than the
    policy's.
    """
    device = Authenticator()
    await passlock.user("ann", device)
    assert (await authorized_options(passlock, kind, timeout=60_000))["timeout"] == 60_000
    assert (await authorized_options(passlock, kind, timeout=90_000_000))["timeout"] == 300_000
    assert (await authorized_options(passlock, kind))["timeout"] == 300_000
    bad: tuple[object, ...] = (0, -1, "60000", True, [])
    for wrong in bad:
        body = ANN | {"timeout": wrong}
        assert (await passlock.keyed("POST", f"/passkey/{kind}/authorize", body)).status == 400
    if kind == "authentication":
        token = await passlock.authorize_authentication("ann", timeout=60_000)
        session, options = await passlock.begin(kind, {"authenticationToken": token})
        broker.clock.ahead += 61 + SKEW
        with refused(broker, "transaction_not_found", "handle_unknown"):
            answer = await passlock.finish(kind, session, device.authenticate(options, ORIGIN))
        assert answer.json["_tag"] == "@error/BadRequest"


async def test_expires_at_is_the_tokens_end(
    broker: Started, passlock: Passlock, open_app: OpenApp
) -> None:
    passlock = Passlock(await open_app(Policy(transaction_life=120)))
    for path, field in (
        (f"{REGISTRATION}/authorize", "registrationToken"),
        (f"{AUTHENTICATION}/authorize", "x"),
    ):
        body = ANN if field == "registrationToken" else {"rpId": RP_ID, "discoverable": True}
        done = await passlock.ok("POST", path, body)
        assert abs(done["expiresAt"] - (broker.clock() + 120) * 1000) < 5000
    done = await passlock.ok("POST", f"{REGISTRATION}/authorize", ANN)
    broker.clock.ahead += 121 + SKEW
    with refused(broker, "transaction_not_found", "transaction_unknown"):
        answer = await passlock.page(
            f"{REGISTRATION}/options", {"registrationToken": done["registrationToken"]}
        )
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")


SCOPES: list[tuple[dict[str, object], bool]] = [
    ({"userId": "ann"}, True),
    ({"allowCredentials": ["ID"]}, True),
    ({"userId": "ann", "allowCredentials": ["ID"]}, True),
    ({"userId": "ann", "allowCredentials": []}, True),
    ({"discoverable": True}, True),
    ({"discoverable": True, "allowCredentials": []}, True),
    ({"discoverable": True, "mediation": "conditional"}, True),
    ({"discoverable": True, "mediation": "required"}, True),
    ({"userId": "ann", "discoverable": False}, True),
    ({}, False),
    ({"allowCredentials": []}, False),
    ({"userId": None}, False),
    ({"discoverable": False}, False),
    ({"userId": "ann", "discoverable": True}, False),
    ({"allowCredentials": ["ID"], "discoverable": True}, False),
    ({"userId": "ann", "mediation": "conditional"}, False),
    ({"discoverable": True, "mediation": "silent"}, False),
    ({"discoverable": True, "mediation": {}}, False),
    ({"discoverable": "yes"}, False),
    ({"allowCredentials": "ID"}, False),
    ({"allowCredentials": [7]}, False),
    ({"userId": 7}, False),
    ({"userId": "x" * 257}, False),
    ({"userId": "eve"}, False),
    ({"allowCredentials": ["x" * 24]}, False),
    ({"userId": "ann", "allowCredentials": ["BOBS"]}, False),
]


async def test_whom_an_authentication_is_about_is_said_once(
    broker: Started, passlock: Passlock
) -> None:
    ids = {
        name: await passlock.user(user, Authenticator())
        for name, user in (("ID", "ann"), ("BOBS", "bob"))
    }
    for scope, good in SCOPES:
        body = {"rpId": RP_ID} | scope
        if isinstance(given := scope.get("allowCredentials"), list):
            body["allowCredentials"] = [ids.get(i, i) for i in given]
        answer = await passlock.keyed("POST", f"{AUTHENTICATION}/authorize", body)
        assert (answer.status == 200) == good, (scope, answer.body)
        assert good or answer.json["_tag"] == "@error/BadRequest"
    assert not lines(broker, status=500)


async def test_mediation_reaches_the_page(passlock: Passlock) -> None:
    for more, expected in (({}, "required"), ({"mediation": "conditional"}, "conditional")):
        token = await passlock.authorize_authentication(None, **more)
        begun = await passlock.page_ok(f"{AUTHENTICATION}/options", {"authenticationToken": token})
        assert begun["mediation"] == expected
        assert "allowCredentials" not in begun["optionsJSON"]


async def test_allow_credentials(passlock: Passlock, open_app: OpenApp) -> None:
    """By passkey ids; of one user where one is named; only those answer."""
    one, two, bobs = Authenticator(), Authenticator(), Authenticator()
    first, second, other = (
        await passlock.user("ann", one),
        await passlock.user("ann", two),
        await passlock.user("bob", bobs),
    )

    async def offered(user: str | None, *ids: str) -> tuple[str, dict[str, Any]]:
        token = await passlock.authorize_authentication(user, allowCredentials=list(ids))
        return await passlock.begin("authentication", {"authenticationToken": token})

    for user, ids, expected in (
        ("ann", (first,), [one]),
        ("ann", (first, second, other), [one, two]),
        (None, (second, other), [two, bobs]),
        (None, (second, "x" * 24), [two]),
    ):
        _, options = await offered(user, *ids)
        assert {d["id"] for d in options["allowCredentials"]} == {
            b64(d.credentials(RP_ID)[0].id) for d in expected
        }
    session, options = await offered(None, second, other)
    done = await passlock.finish("authentication", session, bobs.authenticate(options, ORIGIN))
    assert done.json["principal"] == {"authenticatorId": other, "userId": "bob"}
    session, options = await offered("ann", first)
    answer = two.authenticate(options | {"allowCredentials": []}, ORIGIN)
    assert (await passlock.finish("authentication", session, answer)).json[
        "_tag"
    ] == "@error/BadRequest"
    elsewhere = Passlock(await open_app())
    body = {"rpId": RP_ID, "allowCredentials": [first]}
    assert (await elsewhere.keyed("POST", f"{AUTHENTICATION}/authorize", body)).status == 409


async def test_exclude_credentials(
    passlock: Passlock, open_app: OpenApp, device: Authenticator
) -> None:
    """The user's own always, others by passkey ids, never another app's."""
    mine, bobs = await passlock.user("ann", device), await passlock.user("bob", Authenticator())
    elsewhere = await Passlock(await open_app()).user("ann", Authenticator())
    for user, ids, number in (
        ("ann", [], 1),
        ("ann", [bobs], 2),
        ("ann", [mine], 1),
        ("carl", [mine, elsewhere], 1),
    ):
        token = await passlock.authorize_registration(user, excludeCredentials=ids)
        session, options = await passlock.begin("registration", {"registrationToken": token})
        assert len(options["excludeCredentials"]) == number, (user, ids)
        assert session
    with pytest.raises(AuthenticatorRefused, match="excludeCredentials"):
        device.register(options, ORIGIN)
    bad: tuple[object, ...] = ("x", [7], [""], {})
    for wrong in bad:
        body = ANN | {"excludeCredentials": wrong}
        assert (await passlock.keyed("POST", f"{REGISTRATION}/authorize", body)).status == 400


async def test_a_user_without_a_live_passkey(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    """The backend may know; and a token whose passkey is gone meanwhile signs nobody in."""
    body = {"rpId": RP_ID, "userId": "ann"}
    with refused(broker, "user_not_found", "user_not_found"):
        answer = await passlock.keyed("POST", f"{AUTHENTICATION}/authorize", body)
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    passkey_id = await passlock.user("ann", device)
    token = await passlock.authorize_authentication("ann")
    await passlock.ok("POST", "/passkeys/delete", {"passkeyIds": [passkey_id]})
    session, options = await passlock.begin("authentication", {"authenticationToken": token})
    with refused(broker, "webauthn_login_failed", "revoked_or_counter"):
        answer = await passlock.finish(
            "authentication", session, device.authenticate(options, ORIGIN)
        )
    assert answer.json["_tag"] == "@error/PasskeyNotFound"
    with refused(broker, "user_has_no_passkeys", "user_has_no_passkeys"):
        answer = await passlock.keyed("POST", f"{AUTHENTICATION}/authorize", body)
    assert (answer.status, answer.json["_tag"]) == (409, "@error/BadRequest")


# -- tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_code_and_token_say_the_same(
    broker: Started, passlock: Passlock, device: Authenticator, kind: str
) -> None:
    done = await passlock.register("ann", device)
    if kind == "authenticate":
        done = await passlock.authenticate("ann", device)
    said = claims(done["id_token"])
    types = {k: type(v) for k, v in said.items()}
    assert types == {
        **dict.fromkeys(("iss", "aud", "sub", "jti", "a:id", "a:typ", "purpose"), str),
        **dict.fromkeys(("iat", "exp"), int),
        "pk:uv": bool,
    }
    who = await passlock.exchange(done["code"])
    assert who == {
        "_tag": "ExtendedPrincipal",
        "id": said["jti"],
        "authenticatorId": said["a:id"],
        "authenticatorType": said["a:typ"],
        "userId": said["sub"],
        "createdAt": said["iat"] * 1000,
        "expiresAt": said["exp"] * 1000,
        "passkey": {"verified": True, "userVerified": said["pk:uv"]},
        "metadata": {},
        "purpose": said["purpose"],
    }
    assert (said["iss"], said["aud"], said["sub"]) == ("passlock.dev", passlock.wire.app_id, "ann")
    assert (said["purpose"], said["exp"] - said["iat"]) == (kind, 300)
    assert abs(said["iat"] - broker.clock()) < 5
    assert done["principal"] == {"authenticatorId": said["a:id"], "userId": "ann"}
    assert done["code"] not in done["id_token"] + said["jti"]


async def test_lives_are_settings(
    start_broker: Starter, session: Any, device: Authenticator
) -> None:
    started = await start_broker(passlock_code_life=30, passlock_token_life=60)
    passlock = Passlock(await Wire.open(started.service, session))
    done = await passlock.register("ann", device)
    assert claims(done["id_token"])["exp"] - claims(done["id_token"])["iat"] == 60
    started.clock.ahead += 31 + SKEW
    with refused(started, "invalid_nonce", "nonce_expired"):
        answer = await passlock.keyed("GET", f"/principal/{done['code']}")
    assert (answer.status, answer.json["_tag"]) == (404, "@error/InvalidCode")


async def test_a_code_lives_for_five_minutes(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    first, second = (
        await passlock.register("ann", device),
        await passlock.authenticate("ann", device),
    )
    broker.clock.ahead += 290
    assert (await passlock.exchange(first["code"]))["userId"] == "ann"
    broker.clock.ahead += 20
    assert (await passlock.keyed("GET", f"/principal/{second['code']}")).status == 404


async def test_nothing_is_spent_where_there_is_no_key_to_sign_with(
    start_broker: Starter, passlock: Passlock, device: Authenticator
) -> None:
    """An instance with another secret can't open the key, and finds out before it takes the
    session.
    """
    token = {"registrationToken": await passlock.authorize_registration("ann")}
    session, options = await passlock.begin("registration", token)
    response = device.register(options, ORIGIN)
    await passlock.wire.send(
        "GET", passlock.wire.url + "/v2/.well-known/jwks.json"
    )  # the signing key is there
    blind = await start_broker(secret_key=("another secret key, of 32 characters or more",))
    there = replace(passlock, wire=replace(passlock.wire, url=blind.url))
    with refused(blind, "service_unavailable", "signing_key_sealed"):
        answer = await there.finish("registration", session, response)
    assert (answer.status, answer.json["_tag"]) == (503, "@error/ServiceUnavailable")
    assert (await passlock.ok("GET", "/passkeys/"))["records"] == []
    assert (await passlock.finish("registration", session, response)).status == 200


async def test_without_a_secret_key_it_does_not_answer(start_broker: Starter, session: Any) -> None:
    """Nor where it is switched off: then its paths are nobody's."""
    for settings in ({"secret_key": ()}, {"dialects": ("flex", "propelauth")}):
        started = await start_broker(**settings)
        wire = await Wire.open(started.service, session)
        for path in (f"/v2/{wire.app_id}/passkeys/", "/v2/.well-known/jwks.json"):
            with refused(started, "not_found", "not_found"):
                answer = await wire.send("GET", wire.url + path)
            assert (answer.status, answer.code) == (404, "not_found")


async def test_the_authenticators_name_is_its_own_claim(passlock: Passlock) -> None:
    known = bytes.fromhex("bada5566a7aa401fbd9645619a55120d")
    done = await passlock.register("ann", Authenticator(), aaguid=known)
    assert (await passlock.exchange(done["code"]))["passkey"]["platformName"] == "1Password"
    found = await passlock.passkey(done["principal"]["authenticatorId"])
    assert found["platform"] == {"name": "1Password"}


async def test_live_at_redemption(open_app: OpenApp, device: Authenticator) -> None:
    """A passkey that must be confirmed signs in when its code was exchanged; the id_token alone
    confirms nothing.
    """
    passlock = Passlock(await open_app(Policy(live_at="redemption")))
    done = await passlock.register("ann", device)
    passkey_id = done["principal"]["authenticatorId"]
    assert (await passlock.passkey(passkey_id))["enabled"] is False
    await passlock.exchange(done["code"])
    assert (await passlock.passkey(passkey_id))["enabled"] is True
    await passlock.authenticate("ann", device)
