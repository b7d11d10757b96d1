"""The sample site as an aiohttp application: its pages, its API, and its client of the broker.

The pages are files of `static/`. They are read once, when the application is made, and served from
memory with a validator (ETag), so a browser fetches changed files only. The footer's links lead to
README.md and to the site's own source, as plain text from memory too: they work on every host. A
path outside of this list finds nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from broker.demo.accounts import Accounts
from broker.demo.api import routes
from broker.demo.guard import (
    ACCOUNTS,
    APP_ID,
    CLIENT,
    ORIGINS,
    REDEMPTIONS,
    DemoRefusal,
    guard,
    read_host,
)
from broker.demo.replay import LastRedemptions
from broker.demo.wire import TracedClient
from broker.sdk import client
from broker.web import public

FILE = "demo.sqlite3"
HERE = Path(__file__).parent
STATIC = HERE / "static"

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_IP_LITERALS = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Page:
    content: bytes
    content_type: str
    etag: str


PAGES = web.AppKey("pages", dict[str, Page])  # by their paths below the site


def demo_app(
    *,
    broker_url: str,
    app_id: str,
    api_key: str,
    data: Path,
    origins: Callable[[], Collection[str]] | Collection[str],
    clock: Callable[[], float] = time.time,
) -> web.Application:
    """The site, to be mounted at `/demo/`.

    Args:
        broker_url: the broker's root, as this process reaches it.
        app_id: the app at the broker.
        api_key: a key of that app.
        data: the folder of the accounts file.
        origins: the origins (scheme, host, port) whose pages may call the API. A callable is called
            at each request, because a port may be known only after the server listens.
        clock: gives seconds since 1970.
    """
    app = web.Application(middlewares=[guard])
    app[APP_ID] = app_id
    app[ACCOUNTS] = Accounts(data / FILE, clock=clock)
    app[ORIGINS] = origins if callable(origins) else lambda: origins
    app[REDEMPTIONS] = LastRedemptions(clock)
    app[PAGES] = _pages()
    for route in (*routes, web.get("/", index), web.get("/{folder:static|source}/{name}", file)):
        assert isinstance(route, web.RouteDef)
        public(route.handler)  # needs no API key of the broker: the site has sessions of its own
        app.router.add_route(route.method, route.path, route.handler)

    async def open_and_close(app: web.Application) -> AsyncIterator[None]:
        accounts = app[ACCOUNTS]
        try:
            await accounts.open()
            async with TracedClient(broker_url, app_id, api_key) as traced:
                app[CLIENT] = traced
                yield
        finally:
            await accounts.close()

    app.cleanup_ctx.append(open_and_close)
    return app


def _pages() -> dict[str, Page]:
    pages = {
        f"static/{path.name}": _page_of(path.read_bytes(), _TYPES[path.suffix])
        for path in STATIC.iterdir()
        if path.suffix in _TYPES
    }
    for source in (*HERE.glob("*.py"), Path(client.__file__)):
        pages[f"source/{source.name}"] = _page_of(source.read_bytes(), "text/plain")
    pages["source/README.md"] = _page_of(_readme(), "text/plain")
    return pages


def _readme() -> bytes:
    """README.md of the checkout; without a checkout, from the installed package's metadata."""
    checkout = HERE.parent.parent
    if (checkout / "pyproject.toml").is_file():
        return (checkout / "README.md").read_bytes()
    return str(metadata("passkey-broker").json["description"]).encode()


def _page_of(content: bytes, content_type: str) -> Page:
    return Page(content, content_type, hashlib.sha256(content).hexdigest()[:32])


async def index(request: web.Request) -> web.Response:
    """The page. A loopback address redirects to an origin with a host name, which passkeys need.

    WebAuthn L3 §5.1.3 "effective domain": an IP address is no valid domain. The target is one of
    the site's origins, and never comes from the request.
    """
    origins = sorted(request.app[ORIGINS]())
    host, port = read_host(request)
    if host in _IP_LITERALS and f"{request.scheme}://{request.host}" not in origins:
        same_port = [origin for origin in origins if urlsplit(origin).port == port]
        if same_port:
            return web.Response(status=302, headers={"Location": f"{same_port[0]}/demo/"})
    return _page(request, "static/index.html")


async def file(request: web.Request) -> web.Response:
    return _page(request, "{folder}/{name}".format_map(request.match_info))


def _page(request: web.Request, name: str) -> web.Response:
    page = request.app[PAGES].get(name)
    if page is None:
        raise DemoRefusal(404, "not_found", "There is nothing at this address.")
    headers = {"Cache-Control": "no-cache", "ETag": f'"{page.etag}"'}
    if any(tag.value == page.etag for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(
        body=page.content, content_type=page.content_type, charset="utf-8", headers=headers
    )
