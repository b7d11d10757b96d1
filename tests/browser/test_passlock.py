"""Passlock's flow in a real Chromium: a backend with the key, and a page that does over
`@simplewebauthn/browser` and the Signal API what the vendor's browser SDK does. Both generations of
paths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker.model import Policy
from tests.browser.chromium import Page
from tests.browser.site import site, visit
from tests.conftest import OpenApp, Started
from tests.sdk.passlock import BROWSER_SDK
from tests.sdk.propelauth import browser_library
from tests.support.passlock import Passlock
from tests.support.signals import lines
from tests.support.wire import Wire

PAGE = b"""<!doctype html>
<title>Fixture: Passlock</title>
<form><input autocomplete="username webauthn"></form>
<script type="module">
  import { Passlock } from "./sdk.js";
  window.Passlock = Passlock;
  window.told = (promise) =>
    promise.then(
      (value) => ({ value: value ?? null }),
      (error) => (error instanceof Error ? { name: error.name, message: error.message, code: error.code } : error),
    );
  window.ready = true;
</script>
"""


@pytest.fixture
async def origin() -> AsyncIterator[str]:
    async with site(PAGE, sdk=lambda: BROWSER_SDK, library=browser_library) as opened:
        yield opened


@pytest.fixture
async def wire(open_app: OpenApp, origin: str) -> Wire:
    """An app of this page, whose pages may register by themselves too."""
    return await open_app(
        Policy(passlock_open_registration=True), rp_id="localhost", origins=(origin,)
    )


async def opened(page: Page, origin: str, wire: Wire, version: str = "v2/") -> None:
    """The page, with a client of the app."""
    await visit(page, origin)
    options = {"tenancyId": wire.app_id, "endpoint": wire.url, "version": version}
    await asyncio.to_thread(
        page.js, f"void (window.passlock = new Passlock({json.dumps(options)}))"
    )


async def call(page: Page, method: str, argument: object) -> Any:
    """What the client's method resolved with, or was refused with."""
    return await asyncio.to_thread(page.js, f"told(passlock.{method}({json.dumps(argument)}))")


async def done(page: Page, method: str, argument: object) -> Any:
    told = await call(page, method, argument)
    assert "value" in told, told
    return told["value"]


def registration(user: str) -> dict[str, object]:
    return {"rpId": "localhost", "userId": user, "username": f"{user}@example.org"}


async def register(backend: Passlock, page: Page, user: str) -> Any:
    authorized = await backend.ok("POST", "/passkey/registration/authorize", registration(user))
    return await done(
        page, "registerPasskey", {"registrationToken": authorized["registrationToken"]}
    )


async def authorized(backend: Passlock, **wishes: object) -> dict[str, str]:
    body = {"rpId": "localhost"} | wishes
    answer = await backend.ok("POST", "/passkey/authentication/authorize", body)
    return {"authenticationToken": answer["authenticationToken"]}


async def test_registers_and_signs_in(broker: Started, page: Page, origin: str, wire: Wire) -> None:
    """Of a user, by whichever passkey, from the autofill; and a token is good once."""
    backend, device = Passlock(wire), page.authenticator()
    await opened(page, origin, wire)
    made = await register(backend, page, "ann")
    assert made["_tag"] == "RegistrationSuccess"
    assert (await backend.exchange(made["code"]))["userId"] == "ann"
    assert [kept["userName"] for kept in device.credentials()] == ["ann@example.org"]

    for wishes in (
        {"userId": "ann"},
        {"discoverable": True},
        {"discoverable": True, "mediation": "conditional"},
    ):
        token = await authorized(backend, **wishes)
        signed_in = await done(page, "authenticatePasskey", token)
        assert signed_in["_tag"] == "AuthenticationSuccess"
        who = await backend.exchange(signed_in["code"])
        assert (who["userId"], who["passkey"]["userVerified"]) == ("ann", True)
        told = await call(page, "authenticatePasskey", token)
        assert told["_tag"] == "@error/BadRequest"

    body = registration("ann")
    token = (await backend.ok("POST", "/passkey/registration/authorize", body))["registrationToken"]
    told = await call(page, "registerPasskey", {"registrationToken": token})
    assert told["code"] == "ERROR_AUTHENTICATOR_PREVIOUSLY_REGISTERED"
    assert lines(broker, route="/v2/{app_id}/passkey/authentication/options", status=400)


async def test_an_orphaned_passkey(page: Page, origin: str, wire: Wire) -> None:
    """The broker has forgotten a passkey that the device still offers: the page learns which, and
    the device forgets it too.
    """
    backend, device = Passlock(wire), page.authenticator()
    await opened(page, origin, wire)
    made = await register(backend, page, "ann")
    await backend.ok(
        "POST", "/passkeys/delete", {"passkeyIds": [made["principal"]["authenticatorId"]]}
    )
    told = await call(page, "authenticatePasskey", await authorized(backend, discoverable=True))
    assert (told["_tag"], told["rpId"]) == ("@error/PasskeyNotFound", "localhost")
    await done(page, "deleteOrphanedPasskey", told)
    await asyncio.to_thread(device.wait_event, "deleted")
    assert device.credentials() == []


async def test_update_prune_and_delete(page: Page, origin: str, wire: Wire) -> None:
    """What the backend changes reaches the authenticator."""
    backend, device = Passlock(wire), page.authenticator()
    await opened(page, origin, wire)
    made = await register(backend, page, "ann")

    body = {"userId": "ann", "username": "ann@new.example", "displayName": "Ann"}
    token = (await backend.ok("POST", "/passkeys/update", body))["updatePasskeysToken"]
    await done(page, "updatePasskeys", {"updatePasskeysToken": token})
    await asyncio.to_thread(device.wait_event, "updated")
    [kept] = device.credentials()
    assert (kept["userName"], kept["userDisplayName"]) == ("ann@new.example", "Ann")

    token = (await backend.ok("POST", "/passkeys/prune", {"userId": "ann"}))["prunePasskeysToken"]
    await done(page, "prunePasskeys", {"prunePasskeysToken": token})
    await done(
        page, "authenticatePasskey", await authorized(backend, userId="ann")
    )  # kept, for it still counts

    passkey_id = made["principal"]["authenticatorId"]
    deleted = await backend.ok("POST", "/passkeys/delete", {"passkeyIds": [passkey_id]})
    token = deleted["deletePasskeysToken"]
    await done(page, "deletePasskeys", {"deletePasskeysToken": token})
    await asyncio.to_thread(device.wait_event, "deleted")
    assert device.credentials() == []
    told = await call(page, "deletePasskeys", {"deletePasskeysToken": token})
    assert told["_tag"] == "@error/BadRequest"


async def test_the_page_begins(page: Page, origin: str, wire: Wire) -> None:
    """Clients 2.0 to 2.4: register with a name, give the owner while exchanging, sign in, delete by
    the passkey's id.
    """
    backend, device = Passlock(wire, prefix=""), page.authenticator()
    await opened(page, origin, wire, version="")
    made = await done(page, "registerPasskey", {"username": "ann@example.org"})
    passkey_id = made["principal"]["authenticatorId"]
    assert made["principal"]["userId"] == passkey_id
    who = await backend.ok("POST", f"/principal/{made['code']}", {"userId": "ann"})
    assert who["userId"] == "ann"
    signed_in = await done(page, "authenticatePasskey", {"allowCredentials": [passkey_id]})
    assert (await backend.exchange(signed_in["code"]))["userId"] == "ann"
    await done(page, "deletePasskey", {"passkeyId": passkey_id})
    await asyncio.to_thread(device.wait_event, "deleted")
    await backend.ok("DELETE", f"/passkeys/{passkey_id}")
    told = await call(page, "deletePasskey", {"passkeyId": passkey_id})
    assert told["_tag"] == "@error/NotFound"
