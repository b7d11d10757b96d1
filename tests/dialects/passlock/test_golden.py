"""Every endpoint of the Passlock dialect on the wire, against golden files: request, status,
headers that matter, body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from broker.model import Policy
from tests.conftest import OpenApp, Started, Starter
from tests.dialects.passlock.contract import CREDENTIAL, CREDENTIALS
from tests.support.authenticator import Authenticator
from tests.support.golden import golden
from tests.support.passlock import OPTIONS, Passlock, judge
from tests.support.signals import counted, lines, refused
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

PAGE = {"Origin": ORIGIN, "Content-Type": "application/json", "Accept": "application/json"}
REGISTRATION, AUTHENTICATION = "/passkey/registration", "/passkey/authentication"


@pytest.fixture
def passlock(wire: Wire) -> Passlock:
    return Passlock(wire)


async def sent(
    passlock: Passlock,
    name: str,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: Mapping[str, str] | None = None,
    shape: object = None,
) -> Answer:
    """With the key, unless `headers` are others."""
    given = {"Authorization": f"Bearer {passlock.wire.key}"} if headers is None else headers
    below = passlock.prefix + "/{app_id}"
    answer = await golden(
        passlock.wire, f"passlock/{name}", method, path, body, headers=given, below=below
    )
    if method != "OPTIONS":
        judge(answer, shape or OPTIONS.get(path))
    return answer


# -- ceremonies ------------------------------------------------------------------------------------


async def test_passlock_registration(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    user = {"rpId": RP_ID, "rpName": "Example", "userId": "ann", "username": "ann@example.org"}
    more = {
        "displayName": "Ann",
        "excludeCredentials": [],
        "userVerification": "required",
        "timeout": 60_000,
    }
    answer = await sent(passlock, "prepare-registration", "POST", f"{REGISTRATION}/prepare", user)
    answer = await sent(
        passlock, "authorize-registration", "POST", f"{REGISTRATION}/authorize", user | more
    )
    token = {"registrationToken": answer.json["registrationToken"]}
    with counted(broker, "broker_ceremonies_total", kind="register", step="begin", result="ok"):
        begun = await sent(
            passlock, "registration-options", "POST", f"{REGISTRATION}/options", token, headers=PAGE
        )
    made = device.register(begun.json["optionsJSON"], ORIGIN)
    body = {"sessionToken": begun.json["sessionToken"], "response": made}
    path = f"{REGISTRATION}/verification"
    with counted(broker, "broker_ceremonies_total", kind="register", step="finish", result="ok"):
        await sent(passlock, "registration-verification", "POST", path, body, headers=PAGE)
    with refused(broker, "transaction_not_found", "handle_unknown"):
        await sent(passlock, "registration-verification-again", "POST", path, body, headers=PAGE)
    with refused(broker, "transaction_not_found", "transaction_unknown"):
        path = f"{REGISTRATION}/options"
        await sent(passlock, "registration-options-again", "POST", path, token, headers=PAGE)
    assert ("passkey.registered", "done", None) in await broker.events(passlock.wire.app_id)
    assert lines(broker, route="/v2/{app_id}/passkey/registration/verification", status=200)


async def test_passlock_authentication(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    await passlock.user("ann", device)
    body: dict[str, object] = {"rpId": RP_ID, "userId": "ann"}
    await sent(passlock, "prepare-authentication", "POST", f"{AUTHENTICATION}/prepare", body)
    answer = await sent(
        passlock, "authorize-authentication", "POST", f"{AUTHENTICATION}/authorize", body
    )
    token = {"authenticationToken": answer.json["authenticationToken"]}
    path = f"{AUTHENTICATION}/options"
    begun = await sent(passlock, "authentication-options", "POST", path, token, headers=PAGE)
    answered = device.authenticate(begun.json["optionsJSON"], ORIGIN)
    body = {"sessionToken": begun.json["sessionToken"], "response": answered}
    path = f"{AUTHENTICATION}/verification"
    with counted(
        broker, "broker_ceremonies_total", kind="authenticate", step="finish", result="ok"
    ):
        done = await sent(passlock, "authentication-verification", "POST", path, body, headers=PAGE)
    with refused(broker, "transaction_not_found", "handle_unknown"):
        await sent(passlock, "authentication-verification-again", "POST", path, body, headers=PAGE)
    code = f"/principal/{done.json['code']}"
    with counted(broker, "broker_redemptions_total", result="ok"):
        await sent(passlock, "principal", "GET", code)
    with refused(broker, "invalid_nonce", "nonce_replayed"):
        await sent(passlock, "principal-again", "GET", code)
    with refused(broker, "user_not_found", "user_not_found"):
        body = {"rpId": RP_ID, "userId": "eve"}
        await sent(passlock, "authorize-unknown-user", "POST", f"{AUTHENTICATION}/authorize", body)


async def test_conditional_and_allowed(passlock: Passlock, device: Authenticator) -> None:
    passkey_id = await passlock.user("ann", device)
    body = {"rpId": RP_ID, "discoverable": True, "mediation": "conditional"}
    path = f"{AUTHENTICATION}/authorize"
    answer = await sent(passlock, "authorize-conditional", "POST", path, body)
    body = {"authenticationToken": answer.json["authenticationToken"]}
    await sent(
        passlock,
        "authentication-options-conditional",
        "POST",
        f"{AUTHENTICATION}/options",
        body,
        headers=PAGE,
    )
    body = {"rpId": RP_ID, "allowCredentials": [passkey_id]}
    await sent(passlock, "authorize-allowed", "POST", path, body)


async def test_refused_ceremonies(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    """A passkey that nobody has is the vendor's orphan; anything else is one refusal."""
    await passlock.user("ann", device)
    session, options = await passlock.begin(
        "authentication", {"authenticationToken": await passlock.authorize_authentication()}
    )
    token = {"registrationToken": await passlock.authorize_registration("eve")}
    stranger = Authenticator()  # makes a passkey that is never sent
    stranger.register((await passlock.begin("registration", token))[1], ORIGIN)
    path = f"{AUTHENTICATION}/verification"
    with refused(broker, "discoverable_login_failed", "unknown_credential"):
        body: dict[str, object] = {
            "sessionToken": session,
            "response": stranger.authenticate(options, ORIGIN),
        }
        await sent(passlock, "orphaned", "POST", path, body, headers=PAGE)
    session, options = await passlock.begin(
        "authentication", {"authenticationToken": await passlock.authorize_authentication("ann")}
    )
    with refused(broker, "webauthn_login_failed", "signature"):
        response = device.authenticate(options, ORIGIN, signature=b"x")
        body = {"sessionToken": session, "response": response}
        await sent(passlock, "authentication-refused", "POST", path, body, headers=PAGE)
    session, options = await passlock.begin(
        "registration", {"registrationToken": await passlock.authorize_registration("bob")}
    )
    with refused(broker, "webauthn_login_failed", "user_verification"):
        response = Authenticator().register(options, ORIGIN, uv=False)
        body = {"sessionToken": session, "response": response}
        await sent(
            passlock,
            "registration-refused",
            "POST",
            f"{REGISTRATION}/verification",
            body,
            headers=PAGE,
        )


async def test_tokens_that_are_none(broker: Started, passlock: Passlock) -> None:
    with refused(broker, "transaction_not_found", "transaction_malformed", times=2):
        for kind in ("registration", "authentication"):
            body = {f"{kind}Token": "made-up"}
            path = f"/passkey/{kind}/options"
            await sent(passlock, f"{kind}-options-unknown", "POST", path, body, headers=PAGE)
    with refused(broker, "invalid_request", "rp_id"):
        body = {"rpId": "other.example", "userId": "ann", "username": "ann"}
        await sent(passlock, "authorize-other-rp-id", "POST", f"{REGISTRATION}/authorize", body)
    with refused(broker, "operation_not_allowed", "not_open"):
        body = {"username": "ann"}
        await sent(passlock, "not-open", "POST", f"{REGISTRATION}/options", body, headers=PAGE)


# -- management ------------------------------------------------------------------------------------


async def test_lists(passlock: Passlock, device: Authenticator) -> None:
    passkey_id = await passlock.user("ann", device)
    await passlock.authenticate("ann", device)
    await sent(passlock, "list", "GET", "/passkeys/")
    await sent(passlock, "get", "GET", f"/passkeys/{passkey_id}")
    await sent(passlock, "get-unknown", "GET", "/passkeys/" + "x" * 24)


async def test_update(broker: Started, passlock: Passlock, device: Authenticator) -> None:
    await passlock.user("ann", device)
    body = {"userId": "ann", "username": "ann@new.example", "displayName": "Ann"}
    done = await sent(passlock, "update", "POST", "/passkeys/update", body)
    body = {"updatePasskeysToken": done.json["updatePasskeysToken"]}
    await sent(passlock, "update-exchange", "POST", "/passkeys/update/exchange", body, headers=PAGE)
    with refused(broker, "ticket_not_found", "ticket_not_found"):
        await sent(
            passlock,
            "update-exchange-again",
            "POST",
            "/passkeys/update/exchange",
            body,
            headers=PAGE,
        )
    body = {"userId": "eve", "username": "eve"}
    await sent(passlock, "update-nobody", "POST", "/passkeys/update", body)


async def test_delete(passlock: Passlock, device: Authenticator) -> None:
    passkey_id = await passlock.user("ann", device)
    body: dict[str, object] = {"passkeyIds": [passkey_id, "x" * 24]}
    done = await sent(passlock, "delete", "POST", "/passkeys/delete", body)
    body = {"deletePasskeysToken": done.json["deletePasskeysToken"]}
    await sent(passlock, "delete-exchange", "POST", "/passkeys/delete/exchange", body, headers=PAGE)
    await sent(passlock, "delete-nobody", "POST", "/passkeys/delete", {"userId": "ann"})
    body = {"userId": "ann", "passkeyIds": [passkey_id]}
    await sent(passlock, "delete-both", "POST", "/passkeys/delete", body)


async def test_prune(passlock: Passlock, device: Authenticator) -> None:
    await passlock.user("ann", device)
    done = await sent(passlock, "prune", "POST", "/passkeys/prune", {"userId": "ann"})
    body = {"prunePasskeysToken": done.json["prunePasskeysToken"]}
    await sent(passlock, "prune-exchange", "POST", "/passkeys/prune/exchange", body, headers=PAGE)
    await sent(passlock, "prune-nobody", "POST", "/passkeys/prune", {"userId": "eve"})


# -- clients of the unprefixed paths ---------------------------------------------------------------


async def test_before_authorization(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    passlock = Passlock(await open_app(Policy(passlock_open_registration=True)), prefix="")
    body: dict[str, object] = {"username": "ann@example.org", "displayName": "Ann"}
    path = f"{REGISTRATION}/options"
    begun = await sent(passlock, "b-registration-options", "POST", path, body, headers=PAGE)
    made = device.register(begun.json["optionsJSON"], ORIGIN)
    body = {"sessionToken": begun.json["sessionToken"], "response": made}
    path = f"{REGISTRATION}/verification"
    done = await sent(passlock, "b-registration-verification", "POST", path, body, headers=PAGE)
    passkey_id = done.json["principal"]["authenticatorId"]
    await sent(
        passlock, "b-principal-assign", "POST", f"/principal/{done.json['code']}", {"userId": "ann"}
    )

    body = {"allowCredentials": [passkey_id], "userVerification": "required", "rpId": RP_ID}
    path = f"{AUTHENTICATION}/options"
    begun = await sent(passlock, "b-authentication-options", "POST", path, body, headers=PAGE)
    answered = device.authenticate(begun.json["optionsJSON"], ORIGIN)
    body = {"sessionToken": begun.json["sessionToken"], "response": answered}
    path = f"{AUTHENTICATION}/verification"
    await sent(passlock, "b-authentication-verification", "POST", path, body, headers=PAGE)

    path = f"/credential/{passkey_id}"
    await sent(passlock, "b-credential", "GET", path, headers=PAGE, shape=CREDENTIAL)
    path = f"/credentials/{passkey_id}"
    await sent(passlock, "b-credentials", "GET", path, headers=PAGE, shape=CREDENTIALS)
    path = "/credential/" + "x" * 24
    with refused(broker, "device_not_found", "device_not_found"):
        await sent(passlock, "b-credential-unknown", "GET", path, headers=PAGE)


async def test_single_changes(broker: Started, passlock: Passlock, device: Authenticator) -> None:
    passkey_id = await passlock.user("ann", device)
    path = f"/passkeys/{passkey_id}"
    await sent(passlock, "patch", "PATCH", path, {"username": "ann@new.example"})
    with refused(broker, "passkey_has_owner", "passkey_has_owner"):
        await sent(passlock, "patch-owner", "PATCH", path, {"userId": "bob"})
    old = Passlock(passlock.wire, prefix="")
    await sent(old, "b-list", "GET", "/passkeys/")
    await sent(old, "b-patch", "PATCH", path, {"userId": "ann", "username": "ann"})
    await sent(
        old, "b-rename-user", "PATCH", "/users/ann/passkeys/", {"username": "ann@example.org"}
    )
    await sent(old, "b-delete", "DELETE", path)
    await passlock.user("ann", device)
    await sent(old, "b-delete-user", "DELETE", "/users/ann/passkeys/", {"userId": "ann"})


# -- public, and errors of any path ----------------------------------------------------------------


async def test_key_sets(start_broker: Starter, own_stores: Any, session: Any) -> None:
    """On stores of its own: the set is the broker's, whose other tests may rotate it."""
    started = await start_broker(own_stores)
    wire = await Wire.open(started.service, session)
    for name, place in (("jwks", "/v2"), ("b-jwks", "")):
        path = "/.well-known/jwks.json"
        answer = await golden(wire, f"passlock/{name}", "GET", path, headers={}, below=place)
        assert answer.headers["Content-Type"] == "application/json"


async def test_errors(broker: Started, passlock: Passlock) -> None:
    with refused(broker, "not_found", "no_icon"):
        path = "/aaguid/00000000-0000-0000-0000-000000000000/icon.svg"
        await golden(passlock.wire, "passlock/icon", "GET", path, headers={}, below="")
    with refused(broker, "invalid_access_token", "key_missing"):
        await sent(passlock, "error-403", "GET", "/passkeys/", headers={})
    with refused(broker, "not_found", "not_found"):
        await sent(passlock, "error-404", "GET", "/nowhere")
    with refused(broker, "method_not_allowed", "method_not_allowed"):
        await sent(passlock, "error-405", "PUT", "/passkeys/update", {})
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    path = f"{REGISTRATION}/options"
    await sent(passlock, "preflight", "OPTIONS", path, headers=asked)
    stranger = {"Origin": "https://evil.example"}
    await sent(passlock, "preflight-stranger", "OPTIONS", path, headers=asked | stranger)
    with refused(broker, "operation_not_allowed", "origin"):
        await sent(passlock, "origin", "POST", path, {}, headers=stranger)
