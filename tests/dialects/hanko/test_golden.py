"""One request and its answer of every Hanko endpoint and every error, as they travel."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from broker.dialects.hanko.refusals import TITLES
from broker.model import Policy
from tests.conftest import OpenApp, Started
from tests.support.authenticator import Authenticator, b64
from tests.support.golden import FOLDER, golden
from tests.support.hanko import (
    LOGIN,
    REGISTRATION,
    SECOND_LOGIN,
    SECOND_REGISTRATION,
    TRANSACTION,
    Hanko,
    judge,
)
from tests.support.signals import counted, lines, refused
from tests.support.wire import ORIGIN, Answer, Wire

NAMES = {"user_id": "ann", "username": "ann@example.org"}
UNKNOWN = b64(b"u" * 32)


@pytest.fixture
def hanko(wire: Wire) -> Hanko:
    return Hanko(wire)


async def seen(
    hanko: Hanko,
    name: str,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: Mapping[str, str] | None = None,
    data: bytes | None = None,
) -> Answer:
    """As the backend, unless `headers` says otherwise."""
    given = {"apiKey": hanko.wire.key} if headers is None else headers
    answer = await golden(
        hanko.wire,
        f"hanko/{name}",
        method,
        path,
        body,
        headers=given,
        data=data,
        below="/hanko/{app_id}",
    )
    judge(answer)
    return answer


PAGE = {"Origin": ORIGIN}


async def test_registration(broker: Started, hanko: Hanko, device: Authenticator) -> None:
    body = {**NAMES, "display_name": "Ann", "icon": "https://example.org/ann.png"}
    with counted(broker, "broker_ceremonies_total", kind="register", step="begin", result="ok"):
        begun = await seen(
            hanko, "registration-initialize", "POST", REGISTRATION + "/initialize", body
        )
    made = device.register(begun.json["publicKey"], ORIGIN)
    with counted(broker, "broker_ceremonies_total", kind="register", step="finish", result="ok"):
        await seen(
            hanko, "registration-finalize", "POST", REGISTRATION + "/finalize", made, headers=PAGE
        )
    with refused(broker, "transaction_not_found", "challenge_unknown"):
        await seen(hanko, "registration-finalize-again", "POST", REGISTRATION + "/finalize", made)
    await seen(hanko, "registration-again", "POST", REGISTRATION + "/initialize", NAMES)


async def test_registration_refused(
    broker: Started, hanko: Hanko, open_app: OpenApp, device: Authenticator
) -> None:
    for name, body in (
        ("registration-initialize-fields", {"username": "x" * 129, "icon": "none"}),
        ("registration-initialize-type", {"user_id": 7, "username": "ann"}),
    ):
        await seen(hanko, name, "POST", REGISTRATION + "/initialize", body)
    with refused(broker, "invalid_request", "invalid_request"):
        await seen(
            hanko,
            "registration-finalize-form",
            "POST",
            REGISTRATION + "/finalize",
            {},
            headers=PAGE,
        )
    made = device.register(await hanko.begin_registration("ann"), "https://evil.example")
    with refused(broker, "webauthn_login_failed", "origin"):
        await seen(hanko, "registration-finalize-refused", "POST", REGISTRATION + "/finalize", made)
    made = device.register(await hanko.begin_registration("ann"), ORIGIN, uv=False)
    with refused(broker, "webauthn_login_failed", "user_verification"):
        await seen(
            hanko, "registration-finalize-unverified", "POST", REGISTRATION + "/finalize", made
        )
    made = device.register(await hanko.begin_registration("gone"), ORIGIN)
    await broker.parts.directory.delete_user(
        await broker.parts.directory.app(hanko.wire.app_id), "gone"
    )
    with refused(broker, "webauthn_login_failed", "no_user"):
        await seen(hanko, "registration-finalize-no-user", "POST", REGISTRATION + "/finalize", made)
    full = Hanko(await open_app(Policy(max_passkeys=1, declared={"hanko_algorithm": "ES256"})))
    await full.register("ann", Authenticator())
    with refused(broker, "too_many_passkeys", "too_many_passkeys"):
        await seen(
            full, "registration-initialize-full", "POST", REGISTRATION + "/initialize", NAMES
        )


async def test_login(broker: Started, hanko: Hanko, device: Authenticator) -> None:
    await hanko.register("ann", device)
    with counted(broker, "broker_ceremonies_total", kind="discoverable", step="begin", result="ok"):
        begun = await seen(hanko, "login-initialize", "POST", LOGIN + "/initialize", headers=PAGE)
    answer = device.authenticate(begun.json["publicKey"], ORIGIN)
    await seen(hanko, "login-finalize", "POST", LOGIN + "/finalize", answer, headers=PAGE)
    with refused(broker, "transaction_not_found", "challenge_unknown"):
        await seen(hanko, "login-finalize-again", "POST", LOGIN + "/finalize", answer, headers=PAGE)
    with counted(broker, "broker_ceremonies_total", kind="authenticate", step="begin", result="ok"):
        await seen(
            hanko, "login-initialize-user", "POST", LOGIN + "/initialize", {"user_id": "ann"}
        )


async def test_login_refused(broker: Started, hanko: Hanko, device: Authenticator) -> None:
    await hanko.begin_registration("begun")
    for name, body in (
        ("login-initialize-unknown", {"user_id": "nobody"}),
        ("login-initialize-none", {"user_id": "begun"}),
        ("login-initialize-empty", {"user_id": ""}),
        ("login-initialize-list", []),
    ):
        await seen(hanko, name, "POST", LOGIN + "/initialize", body)
    with refused(broker, "invalid_access_token", "key_missing"):
        await seen(
            hanko, "login-initialize-no-key", "POST", LOGIN + "/initialize", NAMES, headers=PAGE
        )
    with refused(broker, "invalid_access_token", "key_unknown"):
        headers = {"apiKey": "pbk_" + "a" * 43}
        await seen(
            hanko, "login-initialize-bad-key", "POST", LOGIN + "/initialize", NAMES, headers=headers
        )
    await seen(hanko, "login-finalize-form", "POST", LOGIN + "/finalize", {"id": "x"}, headers=PAGE)
    await hanko.register("ann", device)
    answer = device.authenticate(await hanko.begin(), ORIGIN, signature=b"x")
    with refused(broker, "discoverable_login_failed", "signature"):
        await seen(
            hanko, "login-finalize-refused", "POST", LOGIN + "/finalize", answer, headers=PAGE
        )


async def test_second_factor(broker: Started, hanko: Hanko) -> None:
    key = Authenticator(attachment="cross-platform", transports=("usb",))
    begun = await seen(
        hanko, "mfa-registration-initialize", "POST", SECOND_REGISTRATION + "/initialize", NAMES
    )
    made = key.register(begun.json["publicKey"], ORIGIN)
    await seen(hanko, "mfa-registration-finalize", "POST", SECOND_REGISTRATION + "/finalize", made)
    with refused(broker, "transaction_not_found", "challenge_unknown"):
        path = SECOND_REGISTRATION + "/finalize"
        await seen(hanko, "mfa-registration-finalize-again", "POST", path, made)
    begun = await seen(
        hanko, "mfa-login-initialize", "POST", SECOND_LOGIN + "/initialize", {"user_id": "ann"}
    )
    answer = key.authenticate(begun.json["publicKey"], ORIGIN)
    await seen(hanko, "mfa-login-finalize", "POST", SECOND_LOGIN + "/finalize", answer)
    await seen(hanko, "mfa-login-finalize-again", "POST", SECOND_LOGIN + "/finalize", answer)
    await seen(hanko, "mfa-login-initialize-fields", "POST", SECOND_LOGIN + "/initialize")


async def test_transaction(broker: Started, hanko: Hanko, device: Authenticator) -> None:
    body = {
        "user_id": "ann",
        "transaction_id": "order-1",
        "transaction_data": {"to": "Bob & Co", "amount": 12.5},
    }
    path = TRANSACTION + "/initialize"
    await seen(hanko, "transaction-initialize-unknown", "POST", path, body)
    await hanko.begin_registration("ann")
    await seen(hanko, "transaction-initialize-none", "POST", path, body)
    await seen(hanko, "transaction-initialize-fields", "POST", path, {"transaction_id": "x" * 129})
    await hanko.register("ann", device)
    begun = await seen(hanko, "transaction-initialize", "POST", path, body)
    with refused(broker, "approval_exists", "approval_exists"):
        await seen(hanko, "transaction-initialize-again", "POST", path, body)
    answer = device.authenticate(begun.json["publicKey"], ORIGIN)
    path = TRANSACTION + "/finalize"
    await seen(hanko, "transaction-finalize", "POST", path, answer)
    await seen(hanko, "transaction-finalize-again", "POST", path, answer)
    await seen(hanko, "transaction-finalize-form", "POST", path, {})
    for name, how in (
        ("transaction-finalize-handle", {"user_handle": b64(b"somebody")}),
        ("transaction-finalize-refused", {"signature": b"x"}),
    ):
        again = {**body, "transaction_id": name}
        options = (await hanko.ok(TRANSACTION + "/initialize", again))["publicKey"]
        await seen(hanko, name, "POST", path, device.authenticate(options, ORIGIN, **how))
    user = (await hanko.wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    await seen(hanko, "transaction-list", "GET", f"{TRANSACTION}/{user}")
    await seen(hanko, "transaction-list-nobody", "GET", f"{TRANSACTION}/{'u' * 24}")
    await seen(hanko, "transaction-list-invalid", "GET", f"{TRANSACTION}/ann")


async def test_credentials(hanko: Hanko, device: Authenticator) -> None:
    one = f"/credentials/{(await hanko.register('ann', device))['cred']}"
    await hanko.register("bob", Authenticator())
    await seen(hanko, "credentials", "GET", "/credentials?user_id=ann")
    await seen(hanko, "credentials-page", "GET", "/credentials?per_page=1&page=2&order=asc")
    await seen(hanko, "credentials-nobody", "GET", "/credentials?user_id=nobody")
    await seen(hanko, "credentials-order", "GET", "/credentials?order=up")
    await seen(hanko, "credential", "GET", one)
    await seen(hanko, "credential-rename", "PATCH", one, {"name": "Ann's phone"})
    await seen(hanko, "credential-renamed", "GET", one)
    await seen(hanko, "credential-rename-fields", "PATCH", one, {})
    await seen(hanko, "credential-delete", "DELETE", one)
    for method, name in (("GET", "credential-unknown"), ("DELETE", "credential-delete-again")):
        await seen(hanko, name, method, one)
    await seen(
        hanko, "credential-rename-unknown", "PATCH", f"/credentials/{UNKNOWN}", {"name": "x"}
    )


async def test_audit_logs(hanko: Hanko, device: Authenticator) -> None:
    cred = (await hanko.register("ann", device))["cred"]
    await hanko.login(device)
    refused = device.authenticate(await hanko.begin(user_id="ann"), ORIGIN, signature=b"x")
    await hanko.send("POST", LOGIN + "/finalize", refused)
    await hanko.send("PATCH", f"/credentials/{cred}", {"name": "phone"})
    await hanko.send("DELETE", f"/credentials/{cred}")
    await seen(hanko, "audit-logs", "GET", "/audit_logs")
    types = "?type=webauthn_credential_deleted&type=webauthn_credential_updated"
    query = f"{types}&actor_user_id=an&per_page=1"
    await seen(hanko, "audit-logs-filtered", "GET", "/audit_logs" + query)
    await seen(hanko, "audit-logs-time", "GET", "/audit_logs?start_time=yesterday")


async def test_keys_and_errors(broker: Started, hanko: Hanko) -> None:
    await seen(hanko, "jwks", "GET", "/.well-known/jwks.json", headers={})
    for name, headers in (("key-missing", {}), ("key-unknown", {"apiKey": "pbk_" + "a" * 43})):
        await seen(hanko, name, "GET", "/credentials", headers=headers)
    await seen(hanko, "error-404", "GET", "/nowhere")
    await seen(hanko, "error-405", "GET", LOGIN + "/initialize")
    await seen(
        hanko,
        "content-type",
        "POST",
        LOGIN + "/initialize",
        data=b"{}",
        headers={"Content-Type": "text/plain"},
    )
    stranger = {"Origin": "https://evil.example"}
    await seen(hanko, "origin", "POST", LOGIN + "/initialize", headers=stranger)
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "apikey,content-type",
    }
    for name, path in (
        ("preflight", LOGIN + "/initialize"),
        ("preflight-jwks", "/.well-known/jwks.json"),
    ):
        await seen(hanko, name, "OPTIONS", path, headers=PAGE | ask)
    await seen(hanko, "preflight-stranger", "OPTIONS", LOGIN + "/finalize", headers=stranger | ask)
    nobody = Hanko(Wire(hanko.wire.session, hanko.wire.url, "x" * 24, "pbk_" + "a" * 43))
    await seen(nobody, "tenant-unknown", "POST", LOGIN + "/initialize", headers={})
    assert lines(broker, code="app_not_found", status=404)


async def test_too_many_open_logins(broker: Started, open_app: OpenApp) -> None:
    hanko = Hanko(await open_app(Policy(discoverable_limit=1)))
    await hanko.begin()
    with refused(broker, "too_many_requests", "discoverable_limit"):
        await seen(hanko, "error-429", "POST", LOGIN + "/initialize", headers=PAGE)


def test_every_title_has_a_golden_file() -> None:
    bodies = [
        json.loads(f.read_text())["answer"]["body"]
        for f in (FOLDER / "hanko" / "golden").glob("*.json")
    ]
    titles = {body["title"] for body in bodies if isinstance(body, dict) and "title" in body}
    assert {told.title for rows in TITLES.values() for told in rows.values()} <= titles
