"""The vendor's documented flow in a real Chromium: its Python client as the backend,
`@simplewebauthn/browser` in the page.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import pytest

from tests.browser.chromium import Page
from tests.browser.site import in_page, site, visit
from tests.conftest import OpenApp, Started
from tests.sdk.propelauth import PythonClient, browser_library
from tests.support.signals import lines
from tests.support.wire import Wire

PAGE = b"""<!doctype html>
<title>Fixture: @simplewebauthn/browser</title>
<script type="module">
  import { startAuthentication, startRegistration } from "./library.js";
  window.told = (ceremony) =>
    ceremony.then((answer) => ({ answer }), ({ name, message }) => ({ name, message }));
  window.create = (optionsJSON) => told(startRegistration({ optionsJSON }));
  window.get = (optionsJSON) => told(startAuthentication({ optionsJSON }));
  window.ready = true;
</script>
"""


@pytest.fixture
async def origin() -> AsyncIterator[str]:
    async with site(PAGE, library=browser_library) as opened:
        yield opened


@pytest.fixture
async def wire(open_app: OpenApp, origin: str) -> Wire:
    return await open_app(rp_id="localhost", origins=(origin,))


async def test_registers_and_signs_in(broker: Started, page: Page, origin: str, wire: Wire) -> None:
    client = PythonClient(f"{wire.url}/propelauth", wire.key)
    device = page.authenticator()
    await visit(page, origin)

    begun = await client.call(
        "startRegistration",
        userId="ann",
        emailOrUsername="ann@example.org",
        passkeyDisplayName="phone",
    )
    made = (await in_page(page, "create", begun.data["registrationOptions"]))["answer"]
    done = await client.call("finishRegistration", userId="ann", publicKey=made)
    assert done.data == {}
    [kept] = device.credentials()
    assert kept["userName"] == "ann@example.org"

    begun = await client.call("startAuthentication", userId="ann")
    answer = (await in_page(page, "get", begun.data["authenticationOptions"]))["answer"]
    assert (await client.call("finishAuthentication", userId="ann", publicKey=answer)).data == {}
    again = await client.call("finishAuthentication", userId="ann", publicKey=answer)
    assert again.error == {"type": "NoAuthenticationChallengeFound"}

    begun = await client.call("startRegistration", userId="ann", emailOrUsername="ann@example.org")
    told = await in_page(page, "create", begun.data["registrationOptions"])
    assert (
        told["name"] == "InvalidStateError"
    )  # this device has a passkey, and excludeCredentials says so

    listed = (await client.call("fetchAllPasskeysForUser", userId="ann")).data["passkeys"]
    assert listed == [{"credentialId": made["id"], "displayName": "phone"}]
    assert base64.urlsafe_b64decode(made["id"] + "==") == base64.b64decode(kept["credentialId"])
    assert lines(broker, route="/propelauth/run-command", status=400, code="transaction_not_found")
