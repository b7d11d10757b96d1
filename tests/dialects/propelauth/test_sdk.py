"""The vendor's own Python and Node clients, unmodified, against a running broker: every passkey
method and every named error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker.errors import InternalFault
from broker.model import Policy
from tests.conftest import OpenApp, Started
from tests.sdk.propelauth import OPERATIONS, Client, NodeClient, PythonClient
from tests.support.authenticator import Authenticator
from tests.support.signals import lines, refused
from tests.support.wire import ORIGIN, Wire

STRANGER = "https://evil.example"
USER = {"userId": "ann"}
NAMES = {"userId": "ann", "emailOrUsername": "ann@example.org"}


@pytest.fixture
async def wire(open_app: OpenApp) -> Wire:
    return await open_app(Policy(max_passkeys=3))


async def _client(kind: str, url: str, key: str) -> AsyncIterator[Client]:
    if kind == "python":
        yield PythonClient(url, key)
    else:
        async with NodeClient.open(url, key) as opened:
            yield opened


@pytest.fixture(params=["python", "node"])
async def client(request: pytest.FixtureRequest, wire: Wire) -> AsyncIterator[Client]:
    """The vendor's client, with nothing changed but address and key."""
    async for made in _client(request.param, f"{wire.url}/propelauth", wire.key):
        yield made


@pytest.fixture(params=["python", "node"])
async def stranger(request: pytest.FixtureRequest, wire: Wire) -> AsyncIterator[Client]:
    """A client with a key that nobody has."""
    async for made in _client(request.param, f"{wire.url}/propelauth", "pbk_" + "a" * 43):
        yield made


async def ok(client: Client, method: str, **arguments: object) -> Any:
    outcome = await client.call(method, **arguments)
    assert outcome.error is None, outcome.error
    return outcome.data


async def fails(client: Client, kind: str, method: str, **arguments: object) -> Any:
    """The details of an error that must come, typed."""
    outcome = await client.call(method, **arguments)
    assert outcome.data is None
    assert outcome.error["type"] == kind, outcome.error
    return outcome.error.get("details")


async def register(client: Client, device: Authenticator, **how: Any) -> dict[str, Any]:
    """Start and finish; the answer that finished it."""
    options = (await ok(client, "startRegistration", **NAMES))["registrationOptions"]
    made = device.register(options, ORIGIN, **how)
    assert await ok(client, "finishRegistration", publicKey=made, **USER) == {}
    return made


async def test_every_method(broker: Started, client: Client, device: Authenticator) -> None:
    assert abs((await ok(client, "ping"))["timestamp"] - broker.clock()) < 60
    started = await ok(
        client,
        "startRegistration",
        userDisplayName="Ann",
        passkeyDisplayName="Ann's phone",
        **NAMES,
    )
    options = started["registrationOptions"]
    assert options["user"]["displayName"] == "Ann"
    made = device.register(options, ORIGIN)
    assert await ok(client, "finishRegistration", publicKey=made, **USER) == {}

    options = (await ok(client, "startAuthentication", **USER))["authenticationOptions"]
    answer = device.authenticate(options, ORIGIN)
    assert await ok(client, "finishAuthentication", publicKey=answer, **USER) == {}

    second = await register(client, Authenticator())
    assert (await ok(client, "fetchAllPasskeysForUser", **USER))["passkeys"] == [
        {"credentialId": made["id"], "displayName": "Ann's phone"},
        {"credentialId": second["id"]},
    ]
    assert await ok(client, "deregisterPasskey", credentialId=made["id"], **USER) == {}
    assert await ok(client, "deregisterAllPasskeysForUser", **USER) == {}
    assert await ok(client, "fetchAllPasskeysForUser", **USER) == {"passkeys": []}
    assert {line["status"] for line in lines(broker, route="/propelauth/run-command")} == {200}


async def test_origins(client: Client, device: Authenticator) -> None:
    made = await register(client, device)
    bad = {"additionalAllowedOrigin": "not an origin"}
    for method, more in (
        ("startRegistration", {"emailOrUsername": "a"}),
        ("finishRegistration", {"publicKey": made}),
        ("startAuthentication", {}),
        (
            "finishAuthentication",
            {"publicKey": device.authenticate({"challenge": "YQ", "rpId": "example.org"}, ORIGIN)},
        ),
    ):
        assert (
            await fails(client, "CannotParseAdditionalAllowedOrigin", method, **USER, **more, **bad)
            is None
        )
    options = (await ok(client, "startRegistration", additionalAllowedOrigin=STRANGER, **NAMES))[
        "registrationOptions"
    ]
    made = Authenticator().register(options, STRANGER)
    details = await fails(client, "OriginNotAllowed", "finishRegistration", publicKey=made, **USER)
    assert details["message"]
    begun = await ok(client, "startAuthentication", additionalAllowedOrigin=STRANGER, **USER)
    answer = device.authenticate(begun["authenticationOptions"], STRANGER)
    for more in ({"additionalAllowedOrigin": STRANGER}, {}):
        details = await fails(
            client, "OriginNotAllowed", "finishAuthentication", publicKey=answer, **USER, **more
        )
        assert details["message"]


async def test_the_limit(broker: Started, client: Client) -> None:
    for _ in range(3):
        await register(client, Authenticator())
    with refused(broker, "too_many_passkeys", "too_many_passkeys"):
        details = await fails(client, "TooManyPasskeys", "startRegistration", **NAMES)
    assert details["max_passkeys" if "max_passkeys" in details else "maxPasskeys"] == 3
    assert details["current_count" if "current_count" in details else "currentCount"] == 3


async def test_a_registration_that_does_not_pass(client: Client, device: Authenticator) -> None:
    made = await register(client, device)
    assert (
        await fails(
            client, "NoRegistrationChallengeFound", "finishRegistration", publicKey=made, **USER
        )
        is None
    )
    options = (await ok(client, "startRegistration", **NAMES))["registrationOptions"]
    again = Authenticator().register(
        options, ORIGIN, credential_id=device.credentials("example.org")[0].id
    )
    assert (
        await fails(
            client, "PasskeyForUserAlreadyExists", "finishRegistration", publicKey=again, **USER
        )
        is None
    )
    options = (await ok(client, "startRegistration", **NAMES))["registrationOptions"]
    unverified = Authenticator().register(options, ORIGIN, uv=False)
    assert await fails(
        client, "UnexpectedError", "finishRegistration", publicKey=unverified, **USER
    )


async def test_a_sign_in_that_does_not_pass(client: Client, device: Authenticator) -> None:
    assert await fails(client, "NoPasskeysRegisteredForUser", "startAuthentication", **USER) is None
    await register(client, device)
    options = (await ok(client, "startAuthentication", **USER))["authenticationOptions"]
    forged = device.authenticate(options, ORIGIN, signature=b"x")
    assert await fails(client, "UnexpectedError", "finishAuthentication", publicKey=forged, **USER)
    right = device.authenticate(options, ORIGIN)
    kind = "NoAuthenticationChallengeFound"
    assert await fails(client, kind, "finishAuthentication", publicKey=right, **USER) is None


async def test_a_passkey_of_somebody_else(client: Client, device: Authenticator) -> None:
    made = await register(client, device)
    arguments = {"userId": "bob", "credentialId": made["id"]}
    assert await fails(client, "PasskeyNotFound", "deregisterPasskey", **arguments) is None


@pytest.mark.parametrize("method", [method for method in OPERATIONS if method != "ping"])
async def test_what_has_no_name_has_a_sentence(client: Client, method: str) -> None:
    more: dict[str, dict[str, Any]] = {
        "startRegistration": {"emailOrUsername": "a"},
        "finishRegistration": {"publicKey": {}},
        "finishAuthentication": {"publicKey": {}},
        "deregisterPasskey": {"credentialId": "YQ"},
    }
    details = await fails(
        client, "UnexpectedError", method, userId="x" * 257, **more.get(method, {})
    )
    assert details == "userId has 257 characters; 256 are allowed."


async def test_a_defect_of_ours_in_ping(
    broker: Started, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError

    monkeypatch.setattr(broker.parts.directory, "now", broken)
    assert await fails(client, "UnexpectedError", "ping") == InternalFault.default


async def test_a_wrong_key(broker: Started, stranger: Client) -> None:
    """The vendor's key errors are outside of what its methods declare: lists and ping show the
    type, the others fail on it.
    """
    with refused(broker, "invalid_access_token", "key_unknown", times=2):
        for method, arguments in (("ping", {}), ("fetchAllPasskeysForUser", USER)):
            outcome = await stranger.call(method, **arguments)
            assert outcome.error["type"] == "IntegrationKeyNotFound"
