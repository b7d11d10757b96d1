"""Who may call a route. Every handler says so by its decorator, and a test walks the router to see
that none forgot.

    keyed        an API key of the app in the path, checked before the body, the app or the user is
                 looked at
    keyed_alone  the same for a path that names no app: the key says whose it is
    browser      a page: an `Origin`, if sent, must be registered for the app; answers carry CORS
                 headers
    public       anybody (health, metrics, static files)
    public_app   anybody, and any origin: the app's public subset

A handler behind any of them but `public` is called with the relying party, so it can't forget to
look it up either.

CORS (Fetch standard §3.3): the registered origin is echoed with `Vary: Origin`, never with
credentials. An unregistered one is refused, and that refusal alone is readable by its page, so that
a developer sees the reason: browsers show a page only what a preflight has permitted, so the
preflight before it is granted. "null", which is no origin of a page, and what browsers don't write
gets no CORS headers. `Access-Control-Allow-Headers` lists what the vendors' SDKs send.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Literal, cast

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler as AnyHandler

from broker.broker import Broker
from broker.directory import Directory
from broker.errors import InvalidKey, OperationNotAllowed, Unavailable
from broker.mailbox import Mailbox
from broker.model import RelyingParty, page_origin
from broker.settings import Settings
from broker.signals import Signals
from broker.signing import Signing
from broker.telemetry import CONTEXT, Metrics, context
from broker.web.body import as_incoming, only_header, read_bytes
from broker.web.refused_origins import RefusedOrigins

Access = Literal["key", "browser", "public"]
Handler = Callable[[web.Request, RelyingParty], Awaitable[web.StreamResponse]]
KeyReader = Callable[[web.Request], str]

BROKER = web.AppKey("BROKER", Broker)
DIRECTORY = web.AppKey("DIRECTORY", Directory)
MAILBOX = web.AppKey("MAILBOX", Mailbox)
SIGNALS = web.AppKey("SIGNALS", Signals)
METRICS = web.AppKey("METRICS", Metrics)
PUBLIC_URL = web.AppKey("PUBLIC_URL", str)
REFUSED_ORIGINS = web.AppKey("REFUSED_ORIGINS", RefusedOrigins)
SETTINGS = web.AppKey("SETTINGS", Settings)
SIGNING = web.AppKey("SIGNING", Signing)

_ACCESS = "broker_access"
_PREFLIGHT_SECONDS = "600"
_SLOW_SECONDS = 0.1


def _marked(handler: AnyHandler, access: Access) -> AnyHandler:
    setattr(handler, _ACCESS, access)
    return handler


def access_of(handler: object) -> Access | None:
    """How a route's handler is guarded; None where nobody said."""
    return cast("Access | None", getattr(handler, _ACCESS, None))


async def _slow_body(request: web.Request) -> bool:
    """Read the body, if there is one; whether it took so long that what was looked up before it may
    have changed.
    """
    if as_incoming(request).whole_body is not None or not request.can_read_body:
        return False
    began = time.monotonic()
    await read_bytes(request)
    return time.monotonic() - began > _SLOW_SECONDS


def bearer(request: web.Request) -> str:
    """The bearer token (RFC 6750 §2.1), "" if there is none. The scheme's name is
    case-insensitive.
    """
    scheme, _, token = (only_header(request, hdrs.AUTHORIZATION) or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def header(name: str) -> KeyReader:
    """The API key as the whole of a header, "" if there is none."""

    def read(request: web.Request) -> str:
        return (only_header(request, name) or "").strip()

    return read


async def authorise(request: web.Request, key_in: KeyReader = bearer) -> RelyingParty:
    """The relying party of the path, if the request has one of its keys.

    Raises:
        InvalidKey: none, wrong, revoked, of another app, or no such app: all alike.
    """
    directory = request.app[DIRECTORY]
    app_id = request.match_info["app_id"]
    key = key_in(request)
    if not key:
        raise InvalidKey(reason="key_missing")
    known = directory.remembered(key)
    if known is not None and known[1].id == app_id:
        _acts(known[0], app_id)
        return known[1]
    _acts(await directory.authorise(app_id, key), app_id)
    return await directory.app(app_id)


def _acts(key_id: str, app_id: str) -> None:
    """Who acts in this request from now on."""
    now = CONTEXT.get()
    now.actor, now.app_id = f"key:{key_id}", app_id


def keyed(handler: Handler, key_in: KeyReader = bearer) -> AnyHandler:
    """Guard a handler by an API key of the app in the path, which `key_in` finds in the request."""
    return _by_key(handler, lambda request: authorise(request, key_in))


async def authorise_alone(request: web.Request) -> RelyingParty:
    """The relying party whose key the request has.

    Raises:
        InvalidKey: none, malformed, unknown or revoked; `reason` says which.
    """
    directory = request.app[DIRECTORY]
    key = bearer(request)
    if not key:
        raise InvalidKey(reason="key_missing")
    known = directory.remembered(key)
    if known is not None:
        _acts(known[0], known[1].id)
        return known[1]
    key_id, app_id = await directory.owner(key)
    _acts(key_id, app_id)
    return await directory.app(app_id)


def keyed_alone(handler: Handler) -> AnyHandler:
    """Guard a handler by an API key that names the app by itself."""
    return _by_key(handler, authorise_alone)


def _by_key(
    handler: Handler, app_of: Callable[[web.Request], Awaitable[RelyingParty]]
) -> AnyHandler:
    """The guard of every keyed route: the key is looked at before the body, and again after a slow
    one.
    """

    async def guarded(request: web.Request) -> web.StreamResponse:
        app = await app_of(request)
        if await _slow_body(request):
            app = await app_of(request)  # the key may be revoked by now
        return await handler(request, app)

    return _marked(guarded, "key")


async def _app_of(request: web.Request) -> RelyingParty:
    app = await request.app[DIRECTORY].app(request.match_info["app_id"])
    context().app_id = app.id
    return app


async def _admitted(request: web.Request) -> RelyingParty:
    """The relying party of the path, if the request comes from one of its pages, or from none.

    A preflight from any page is granted: the request after it is refused where the page can read
    why.
    """
    try:
        app = await _app_of(request)
    except Unavailable as fault:
        fault.retry = "page"  # nothing was taken yet
        raise
    origin = only_header(request, hdrs.ORIGIN)
    if origin is not None:
        registered, readable = origin in app.web_origins, page_origin(origin)
        admitted = registered or (readable and request.method == hdrs.METH_OPTIONS)
        if not admitted:
            await request.app[REFUSED_ORIGINS].tell(app, origin)
        allowed = {"Access-Control-Allow-Origin": origin} if registered or readable else {}
        as_incoming(request).cors = {**allowed, "Vary": "Origin"}
        if not admitted:
            raise OperationNotAllowed(
                f"This page's origin {origin} is not registered for the app; tell whoever runs this site."
                if readable
                else None,
                reason="origin",
                hint="`broker app update --app A --add-origin ORIGIN` registers an origin.",
            )
    return app


def _browser(handler: Handler) -> AnyHandler:
    async def guarded(request: web.Request) -> web.StreamResponse:
        app = await _admitted(request)
        if await _slow_body(request):
            app = await _admitted(request)  # origins and policy may differ by now
        return await handler(request, app)

    return _marked(guarded, "browser")


def _preflight(headers: str) -> Handler:
    async def answer(request: web.Request, _: RelyingParty) -> web.StreamResponse:
        as_incoming(request).cors = {
            **(as_incoming(request).cors or {}),
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": headers,
            "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
        }
        return web.Response(status=204)

    return answer


def browser_routes(
    posts: Mapping[str, Handler],
    *,
    headers: str,
    gets: Mapping[str, Handler] = MappingProxyType({}),
) -> list[web.RouteDef]:
    """POST and GET routes for pages, each with its preflight. `headers` are those a page may
    send.
    """
    routes = [web.post(path, _browser(handler)) for path, handler in posts.items()]
    routes += [web.get(path, _browser(handler), allow_head=False) for path, handler in gets.items()]
    routes += [web.options(path, _browser(_preflight(headers))) for path in (*posts, *gets)]
    return routes


def public(handler: AnyHandler) -> AnyHandler:
    """Mark a handler as open to anybody."""
    return _marked(handler, "public")


def public_app(handler: Handler) -> AnyHandler:
    """Call `handler` with the relying party of the path; anybody may ask, from any origin."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        as_incoming(request).cors = {"Access-Control-Allow-Origin": "*"}
        return await handler(request, await _app_of(request))

    return _marked(guarded, "public")


def preflight_any(headers: str) -> AnyHandler:
    """The preflight of a `public_app` route."""
    return public_app(_preflight(headers))
