"""A site on loopback that serves a fixture page and the modules it imports, and calls into that
page.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from tests.browser.chromium import Page


@contextlib.asynccontextmanager
async def site(document: bytes, **modules: Callable[[], bytes]) -> AsyncIterator[str]:
    """The origin of a site whose `/` is `document`; `/name.js` is what `name` returns."""
    app = web.Application()
    app.router.add_get("/", _served(lambda: document, "text/html"))
    for name, module in modules.items():
        app.router.add_get(f"/{name}.js", _served(module, "text/javascript"))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://localhost:{runner.addresses[0][1]}"
    await runner.cleanup()


def _served(content: Callable[[], bytes], kind: str) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=await asyncio.to_thread(content), content_type=kind)

    return answer


async def visit(page: Page, origin: str) -> None:
    """Open the site's page, which says `window.ready` when it is."""
    await asyncio.to_thread(page.goto, f"{origin}/")
    await asyncio.to_thread(page.wait_until, "window.ready")


async def in_page(page: Page, function: str, argument: object) -> dict[str, Any]:
    """What a function of the page resolves with."""
    told: dict[str, Any] = await asyncio.to_thread(page.js, f"{function}({json.dumps(argument)})")
    return told
