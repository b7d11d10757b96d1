"""The vendor's own Node SDK, unmodified, against a running broker: every method, every error it can
meet, and the token by jose.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import Started
from tests.sdk.hanko import Sdk
from tests.support.authenticator import Authenticator
from tests.support.signals import lines, refused
from tests.support.wire import ORIGIN, Wire

NAMES = {
    "userId": "ann",
    "username": "ann@example.org",
    "displayName": "Ann",
    "icon": "https://example.org/a.png",
}
INVALID_KEY = "The api key is invalid"


@pytest.fixture
async def sdk(wire: Wire) -> AsyncIterator[Sdk]:
    """With nothing changed but address, tenant and key."""
    async with Sdk.open(f"{wire.url}/hanko", wire.app_id, wire.key) as opened:
        yield opened


async def registered(sdk: Sdk, device: Authenticator, user: str = "ann") -> str:
    """A whole registration; the token."""
    options = (await sdk.ok("registration.initialize", {"userId": user, "username": user}))[
        "publicKey"
    ]
    token: str = (await sdk.ok("registration.finalize", device.register(options, ORIGIN)))["token"]
    return token


async def test_every_method_of_the_sdk(
    broker: Started, wire: Wire, sdk: Sdk, device: Authenticator
) -> None:
    assert await sdk.ok("config.tenantId") == wire.app_id
    assert await sdk.ok("config.baseUrl") == f"{wire.url}/hanko"
    options = (await sdk.ok("registration.initialize", NAMES))["publicKey"]
    assert (options["user"]["displayName"], options["user"]["icon"]) == ("Ann", NAMES["icon"])
    token = (await sdk.ok("registration.finalize", device.register(options, ORIGIN)))["token"]
    verified = await sdk.verified(token, "example.org")
    assert verified["protectedHeader"]["alg"] == "RS256"
    claims = verified["payload"]
    assert (claims["sub"], claims["aud"], claims["purpose"]) == ("ann", ["example.org"], "register")
    assert claims["exp"] - claims["iat"] == 300

    options = (await sdk.ok("login.initialize"))["publicKey"]
    assert "allowCredentials" not in options
    token = (await sdk.ok("login.finalize", device.authenticate(options, ORIGIN)))["token"]
    assert (await sdk.verified(token, "example.org"))["payload"]["sub"] == "ann"
    assert await sdk.verified(token, "evil.example") == {"code": "ERR_JWT_CLAIM_VALIDATION_FAILED"}
    head, payload, signature = token.split(".")
    forged = f"{head}.{payload}.{'A' * len(signature)}"
    assert await sdk.verified(forged, "example.org") == {
        "code": "ERR_JWS_SIGNATURE_VERIFICATION_FAILED"
    }

    key = Authenticator(attachment="cross-platform", transports=("usb",))
    names = {"username": "ann@example.org", "displayName": "Ann"}
    options = (await sdk.ok("user(ann).mfa.registration.initialize", names))["publicKey"]
    made = key.register(options, ORIGIN)
    token = (await sdk.ok("user(ann).mfa.registration.finalize", made))["token"]
    assert (await sdk.verified(token, "example.org"))["payload"][
        "purpose"
    ] == "register_second_factor"
    options = (await sdk.ok("user(ann).mfa.login.initialize"))["publicKey"]
    assert len(options["allowCredentials"]) == 2
    answer = key.authenticate(options, ORIGIN)
    token = (await sdk.ok("user(ann).mfa.login.finalize", answer))["token"]
    claims = (await sdk.verified(token, "example.org"))["payload"]
    assert (claims["cred"], claims["purpose"]) == (made["id"], "authenticate_second_factor")

    listed = await sdk.ok("user(ann).credentials")
    assert [c["is_mfa"] for c in listed] == [True, False]
    assert {
        "id",
        "name",
        "public_key",
        "attestation_type",
        "aaguid",
        "last_used_at",
        "created_at",
    } <= set(listed[0])
    [published] = (await sdk.ok("jwks"))["keys"]
    assert (published["kty"], published["kid"]) == ("RSA", verified["protectedHeader"]["kid"])
    assert await sdk.ok(f"credential({made['id']}).remove") == {}
    assert [c["is_mfa"] for c in await sdk.ok("user(ann).credentials")] == [False]
    assert {line["status"] for line in lines(broker, app=wire.app_id)} == {200, 204}


async def test_a_user_with_a_name_that_needs_quoting(sdk: Sdk, device: Authenticator) -> None:
    await registered(sdk, device, "a b/c?d=é&e")
    [one] = await sdk.ok("user(a b/c?d=é&e).credentials")
    assert one["user_id"] == "a b/c?d=é&e"


async def test_what_the_sdk_throws(broker: Started, sdk: Sdk, device: Authenticator) -> None:
    """Always an error with a status, for each thing that can go wrong at each method."""
    await registered(sdk, device)

    async def fails(status: int, title: str, method: str, *arguments: object) -> None:
        error = await sdk.fails(method, *arguments)
        assert (error["status"], error["title"]) == (status, title)
        assert isinstance(error["details"], str)

    options = (await sdk.ok("login.initialize"))["publicKey"]
    answer = device.authenticate(options, ORIGIN)
    await sdk.ok("login.finalize", answer)
    with refused(broker, "transaction_not_found", "challenge_unknown"):
        await fails(401, "failed to get session data", "login.finalize", answer)
    options = (await sdk.ok("login.initialize"))["publicKey"]
    wrong = device.authenticate(options, "https://evil.example")
    await fails(401, "failed to validate assertion", "login.finalize", wrong)
    await fails(400, "unable to finish login", "login.finalize", {})

    validation = "unable to validate request"
    await fails(
        400, validation, "registration.initialize", {"userId": "ann", "username": "x" * 129}
    )
    await fails(400, validation, "registration.initialize", {})
    form = "unable to parse credential creation response"
    await fails(400, form, "registration.finalize", {})
    options = (await sdk.ok("registration.initialize", NAMES))["publicKey"]
    made = Authenticator().register(options, ORIGIN, uv=False)
    error = await sdk.fails("registration.finalize", made)
    assert error["status"] == 422
    title = "received challenge does not match with any stored one"
    await fails(400, title, "registration.finalize", made)

    await fails(400, validation, "user(ann).mfa.registration.initialize", {})
    await fails(400, form, "user(ann).mfa.registration.finalize", {})
    await fails(404, "user not found", "user(bob).mfa.login.initialize")
    await fails(400, "unable to finish login", "user(ann).mfa.login.finalize", {})
    await fails(404, "credential with id 'YQ' not found", "credential(YQ).remove")
    assert await sdk.ok("user(bob).credentials") == []
    assert not lines(broker, status=500)


@pytest.mark.parametrize("key", ["", "pbk_" + "a" * 43])
async def test_an_sdk_without_a_right_key(wire: Wire, key: str) -> None:
    """Is refused where a key is needed, and served where none is."""
    async with Sdk.open(f"{wire.url}/hanko/", wire.app_id, key) as sdk:
        calls: list[tuple[Any, ...]] = [
            ("registration.initialize", NAMES),
            ("user(ann).credentials",),
            ("user(ann).mfa.registration.initialize", {"username": "a"}),
            ("user(ann).mfa.registration.finalize", {}),
            ("user(ann).mfa.login.initialize",),
            ("user(ann).mfa.login.finalize", {}),
            ("credential(YQ).remove",),
        ]
        for call in calls:
            error = await sdk.fails(*call)
            assert (error["status"], error["title"]) == (401, INVALID_KEY)
        assert (await sdk.ok("login.initialize"))["publicKey"]["challenge"]
        assert (await sdk.ok("jwks"))["keys"]


async def test_an_sdk_with_a_tenant_that_is_none(wire: Wire) -> None:
    async with Sdk.open(f"{wire.url}/hanko", "x" * 24, wire.key) as sdk:
        assert (await sdk.fails("login.initialize"))["title"] == "tenant not found"
        assert (await sdk.fails("jwks"))["status"] == 404
        assert (await sdk.fails("registration.initialize", NAMES))["title"] == INVALID_KEY


async def test_a_defect_of_ours_reaches_the_sdk_as_an_error(
    broker: Started, sdk: Sdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(broker.parts.directory, "passkeys", broken)
    error = await sdk.fails("user(ann).credentials")
    assert (error["status"], error["title"]) == (500, "Internal Server Error")
