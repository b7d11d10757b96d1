"""The vendor's documented page flows in a real Chromium, with `@github/webauthn-json` in the page
and the vendor's SDK as the backend.

Registration and second factor go through the backend, which relays what the page has; a login goes
from the page to the broker directly, from an origin that is not the broker's, so the browser asks
for permission first (CORS) and refuses what the broker doesn't allow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.browser.chromium import Chromium, Page
from tests.browser.site import in_page, site, visit
from tests.conftest import OpenApp, Started
from tests.sdk.hanko import Sdk, browser_library
from tests.support.signals import lines
from tests.support.wire import Wire

PAGE = b"""<!doctype html>
<title>Fixture: @github/webauthn-json</title>
<form><input name="name" autocomplete="username webauthn"></form>
<script type="module">
  import { create, get } from "./library.js";
  window.told = (ceremony) =>
    ceremony.then((answer) => ({ answer }), ({ name, message }) => ({ name, message }));
  window.register = (options) => told(create(options));
  window.confirm = (options) => told(get(options));
  const post = async (url, body) => {
    const headers = { "Content-Type": "application/json" };
    return (await fetch(url, { method: "POST", headers, body: body && JSON.stringify(body) })).json();
  };
  window.login = ({ tenant, ...more }) =>
    told(
      (async () => {
        const options = await post(`${tenant}/login/initialize`);
        return post(`${tenant}/login/finalize`, await get({ ...options, ...more }));
      })(),
    );
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


@pytest.fixture
async def sdk(wire: Wire) -> AsyncIterator[Sdk]:
    async with Sdk.open(f"{wire.url}/hanko", wire.app_id, wire.key) as opened:
        yield opened


async def test_registers_and_signs_in_from_the_page(
    broker: Started, page: Page, origin: str, wire: Wire, sdk: Sdk
) -> None:
    device = page.authenticator()
    await visit(page, origin)
    options = await sdk.ok(
        "registration.initialize", {"userId": "ann", "username": "ann@example.org"}
    )
    made = (await in_page(page, "register", options))["answer"]
    token = (await sdk.ok("registration.finalize", made))["token"]
    assert (await sdk.verified(token, "localhost"))["payload"]["cred"] == made["id"]
    [kept] = device.credentials()
    assert kept["userName"] == "ann@example.org"

    tenant = f"{wire.url}/hanko/{wire.app_id}"
    for more in (
        {},
        {"mediation": "conditional"},
    ):  # by a click, and by the autofill of the name field
        token = (await in_page(page, "login", {"tenant": tenant, **more}))["answer"]["token"]
        claims = (await sdk.verified(token, "localhost"))["payload"]
        assert (claims["sub"], claims["purpose"]) == ("ann", "authenticate")
    for path in ("login/initialize", "login/finalize"):
        assert lines(broker, route=f"/hanko/{{app_id}}/{path}", method="OPTIONS", status=204)
        assert len(lines(broker, route=f"/hanko/{{app_id}}/{path}", method="POST", status=200)) == 2

    options = await sdk.ok(
        "registration.initialize", {"userId": "ann", "username": "ann@example.org"}
    )
    told = await in_page(page, "register", options)
    assert (
        told["name"] == "InvalidStateError"
    )  # this device has a passkey, and excludeCredentials says so


async def test_a_second_factor_in_the_page(page: Page, origin: str, wire: Wire, sdk: Sdk) -> None:
    """A security key that keeps nothing by itself, so its answer has no user handle."""
    page.authenticator(transport="usb", hasResidentKey=False, hasUserVerification=False)
    await visit(page, origin)
    options = await sdk.ok("user(ann).mfa.registration.initialize", {"username": "ann@example.org"})
    made = (await in_page(page, "register", options))["answer"]
    token = (await sdk.ok("user(ann).mfa.registration.finalize", made))["token"]
    assert (await sdk.verified(token, "localhost"))["payload"][
        "purpose"
    ] == "register_second_factor"
    answer = (await in_page(page, "confirm", await sdk.ok("user(ann).mfa.login.initialize")))[
        "answer"
    ]
    assert answer["response"]["userHandle"] is None
    token = (await sdk.ok("user(ann).mfa.login.finalize", answer))["token"]
    assert (await sdk.verified(token, "localhost"))["payload"]["sub"] == "ann"
    [listed] = await sdk.ok("user(ann).credentials")
    assert (listed["is_mfa"], listed["transports"]) == (True, ["usb"])


async def test_a_page_of_another_origin(
    broker: Started, chromium: Chromium, page: Page, origin: str, open_app: OpenApp
) -> None:
    """The broker refuses, in the vendor's shape, and the page can say why; it offers the device
    nothing.
    """
    wire = await open_app(rp_id="localhost", origins=("http://localhost:1",))
    await visit(page, origin)
    told = await in_page(page, "login", {"tenant": f"{wire.url}/hanko/{wire.app_id}"})
    assert told["name"] == "Error"  # the library's, of an answer without options
    assert lines(broker, method="POST", status=403, code="operation_not_allowed")
    page.errors.clear()
