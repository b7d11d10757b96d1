"""The vendor's documented flow in a real Chromium: its Python client as the backend, `@simplewebauthn/browser` in the page."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import web

from tests.browser.chromium import Chromium, Page
from tests.conftest import OpenApp, Started
from tests.sdk.propelauth import PythonClient, browser_library
from tests.signals import lines
from tests.wire import Wire

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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    with chromium.page() as page:
        yield page
        assert page.errors == []


@pytest.fixture
async def origin() -> AsyncIterator[str]:
    """A site that serves the page and the library."""

    async def document(_: web.Request) -> web.Response:
        return web.Response(body=PAGE, content_type="text/html")

    async def library(_: web.Request) -> web.Response:
        return web.Response(body=await asyncio.to_thread(browser_library), content_type="text/javascript")

    app = web.Application()
    app.router.add_get("/", document)
    app.router.add_get("/library.js", library)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://localhost:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def wire(open_app: OpenApp, origin: str) -> Wire:
    return await open_app(rp_id="localhost", origins=(origin,))


async def in_page(page: Page, function: str, options: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = await asyncio.to_thread(page.js, f"{function}({json.dumps(options)})")
    return told


async def test_registers_and_signs_in(broker: Started, page: Page, origin: str, wire: Wire) -> None:
    client = PythonClient(f"{wire.url}/propelauth", wire.key)
    device = page.authenticator()
    await asyncio.to_thread(page.goto, f"{origin}/")
    await asyncio.to_thread(page.wait_until, "window.ready")

    begun = await client.call(
        "startRegistration", userId="ann", emailOrUsername="ann@example.org", passkeyDisplayName="phone"
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
    assert told["name"] == "InvalidStateError"  # this device has a passkey, and excludeCredentials says so

    listed = (await client.call("fetchAllPasskeysForUser", userId="ann")).data["passkeys"]
    assert listed == [{"credentialId": made["id"], "displayName": "phone"}]
    assert base64.urlsafe_b64decode(made["id"] + "==") == base64.b64decode(kept["credentialId"])
    assert lines(broker, route="/propelauth/run-command", status=400, code="transaction_not_found")
