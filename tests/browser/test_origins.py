"""A page whose origin is not registered, in a real Chromium: it can tell its developer why, and
reads nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import Page
from tests.browser.site import in_page, site, visit
from tests.conftest import OpenApp, Started
from tests.support.signals import refused
from tests.support.wire import Wire

SDK = Path(__file__).parents[2] / "broker" / "sdk" / "passkey.js"
PAGE = b"""<!doctype html>
<title>Fixture: origins</title>
<script type="module">
  import { Passkeys } from "./passkey.js";
  window.told = ({ url, app, call }) =>
    new Passkeys(url, app)[call[0]](...call.slice(1)).then(
      (nonce) => ({ nonce }),
      ({ code, status, refusal, message, cause }) => ({ code, status, refusal, message, cause: cause?.name }),
    );
  const read = `async ({ url, ...options }) => {
    try {
      const answer = await fetch(url, options);
      return { status: answer.status, body: await answer.text(), headers: [...answer.headers.keys()] };
    } catch (error) {
      return { failed: error.name };
    }
  }`;
  window.asked = eval(read);
  // The same in a frame without an origin of its own.
  window.askedByNobody = (request) =>
    new Promise((resolve) => {
      window.onmessage = (event) => resolve(event.data);
      const frame = document.createElement("iframe");
      frame.sandbox = "allow-scripts";
      frame.srcdoc = `<script>(${read})(${JSON.stringify(request)}).then((said) => parent.postMessage(said, "*"))<\\/script>`;
      document.body.append(frame);
    });
  window.ready = true;
</script>
<body></body>
"""
JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def origin() -> AsyncIterator[str]:
    async with site(PAGE, passkey=SDK.read_bytes) as opened:
        yield opened


@pytest.fixture
async def wire(open_app: OpenApp) -> Wire:
    return await open_app(rp_id="localhost", origins=("http://localhost:1",))


CALLS: list[list[Any]] = [
    ["authenticate"],
    ["authenticate", {"transactionId": "pbt_" + "a" * 43}],
    ["authenticate", {"conditional": True}],
    ["register", "pbt_" + "a" * 43],
    ["applySignals", "delete", "pbs_" + "a" * 43],
]


async def test_the_sdk_says_why(broker: Started, page: Page, origin: str, wire: Wire) -> None:
    """`refused` with the sentence, for each verb; and as soon as the origin is registered the same
    page signs in.
    """
    device = page.authenticator()
    await visit(page, origin)
    place = {"url": wire.url, "app": wire.app_id}
    for call in CALLS:
        with refused(broker, "operation_not_allowed", "origin"):
            told = await in_page(page, "told", {**place, "call": call})
        assert told.pop("message") == (
            f"This page's origin {origin} is not registered for the app; tell whoever runs this site."
        )
        assert told == {"code": "refused", "status": 403, "refusal": "operation_not_allowed"}
    assert ("origin.refused", "refused", origin) in await broker.events(wire.app_id)

    app = await broker.parts.directory.app(wire.app_id)
    await broker.parts.directory.update_app(replace(app, origins=(*app.origins, origin)))
    transaction = await wire.open_registration("ann")
    assert "nonce" in await in_page(page, "told", {**place, "call": ["register", transaction]})
    assert "nonce" in await in_page(page, "told", {**place, "call": ["authenticate"]})
    assert len(device.credentials()) == 1


async def test_a_page_reads_that_refusal_and_nothing_else(
    broker: Started, page: Page, origin: str, wire: Wire
) -> None:
    """A request that needs a preflight, and one that needs none; and no page without an origin
    reads anything.
    """
    await visit(page, origin)
    paths = [f"/v1/apps/{wire.app_id}/authenticate/transactions/webauthn/start"]
    paths += [
        f"/hanko/{wire.app_id}/login/initialize",
        f"/v2/{wire.app_id}/passkey/authentication/options",
    ]
    for path in paths:
        for headers in (JSON, {}):
            request = {"url": wire.url + path, "method": "POST", "headers": headers, "body": "{}"}
            told = await in_page(page, "asked", request)
            assert told["status"] == 403
            assert sorted(told["headers"]) == ["cache-control", "content-length", "content-type"]
            assert f"This page's origin {origin} is not registered" in told["body"]
            with refused(broker, "operation_not_allowed", "origin"):
                assert await in_page(page, "askedByNobody", request) == {"failed": "TypeError"}
    assert ("origin.refused", "refused", "null") in await broker.events(wire.app_id)
    for path in (
        paths[0].replace(wire.app_id, "x" * 24),
        f"/v1/apps/{wire.app_id}/users",
        "/health/ready",
        "/nowhere",
    ):
        told = await in_page(
            page, "asked", {"url": wire.url + path, "method": "POST", "body": "{}"}
        )
        assert told == {"failed": "TypeError"}
    page.errors.clear()
