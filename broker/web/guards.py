"""Guards: decorators that authenticate the caller of a route. A test walks the router and compares
each route's guard with a list.

    keyed        an API key, checked before the body, the app or the user is looked at: a key of
                 the app in the path, or, where the path names no app, of any
    browser      a page: an `Origin`, if sent, must be registered for the app; answers carry CORS
                 headers
    public       any caller (health, metrics, static files)
    public_app   any caller and any origin: the app's public subset

Each guard but `public` calls the handler with the request's `Caller`, which names the app: a
handler never looks an app up.

CORS (Fetch standard §3.3): answers echo the registered origin with `Vary: Origin`, never with
credentials. A request from an unregistered origin is refused. Its page can read that refusal alone,
so that a developer learns the reason. Browsers show a page an answer only after a granted
preflight, so the preflight before the refusal is granted. An answer to the origin "null", or to an
origin in a form that browsers don't write, has no CORS headers. `Access-Control-Allow-Headers`
lists the headers that the vendors' SDKs send.
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
from broker.ephemeral.rate_limits import RateLimits
from broker.errors import InvalidKey, OperationNotAllowed, Unavailable
from broker.mailbox import Mailbox
from broker.model import ALL_SCOPES, Caller, page_origin
from broker.settings import Settings
from broker.signals import Signals
from broker.signing import Signing
from broker.telemetry import CONTEXT, Metrics, context
from broker.web.body import as_incoming, only_header, read_bytes
from broker.web.refused_origins import RefusedOrigins

Access = Literal["key", "browser", "public"]
Handler = Callable[[web.Request, Caller], Awaitable[web.StreamResponse]]
KeyReader = Callable[[web.Request], str]

BROKER = web.AppKey("BROKER", Broker)
DIRECTORY = web.AppKey("DIRECTORY", Directory)
MAILBOX = web.AppKey("MAILBOX", Mailbox)
SIGNALS = web.AppKey("SIGNALS", Signals)
METRICS = web.AppKey("METRICS", Metrics)
PUBLIC_URL = web.AppKey("PUBLIC_URL", str)
RATE_LIMITS = web.AppKey("RATE_LIMITS", RateLimits)
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
    """The guard of a route's handler; None if it has none."""
    return cast("Access | None", getattr(handler, _ACCESS, None))


async def _slow_body(request: web.Request) -> bool:
    """Read the request's body. True if the body took so long that an earlier look-up may be
    outdated.
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


async def authorise(request: web.Request, key_in: KeyReader = bearer) -> Caller:
    """The caller with the request's API key.

    Raises:
        InvalidKey: none, malformed, unknown, revoked, or not a key of the app in the path; also for
            an unknown app. All have the same answer, and differ in `reason`.
        Unavailable.
    """
    directory = request.app[DIRECTORY]
    app_id = request.match_info.get("app_id")
    key = key_in(request)
    if not key:
        raise InvalidKey(reason="key_missing")
    known = directory.remembered(key)
    if known is not None and app_id in (None, known[1].id):
        _act(known[0], known[1].id)
        return Caller(known[1], known[0], ALL_SCOPES)
    if app_id is None:
        key_id, app_id = await directory.owner(key)
    else:
        key_id = await directory.authorise(app_id, key)
    _act(key_id, app_id)
    return Caller(await directory.app(app_id), key_id, ALL_SCOPES)


def _act(key_id: str, app_id: str) -> None:
    """Note in the request's context which key acts, for events and logs."""
    now = CONTEXT.get()
    now.actor, now.app_id = f"key:{key_id}", app_id


def keyed(handler: Handler, key_in: KeyReader = bearer, *, limited: bool = True) -> AnyHandler:
    """Guard a handler by an API key, which `key_in` finds in the request. The key is checked before
    the body is read, and again after a slow body. The key's calls are `limited` in rate, but for
    finishes and redemptions.
    """

    async def guarded(request: web.Request) -> web.StreamResponse:
        caller = await authorise(request, key_in)
        if limited:
            request.app[RATE_LIMITS].keyed_call(caller)
        if await _slow_body(request):
            caller = await authorise(request, key_in)  # the key may be revoked by now
        return await handler(request, caller)

    return _marked(guarded, "key")


async def _anonymous(request: web.Request) -> Caller:
    """A caller without a key, of the app in the path."""
    app = await request.app[DIRECTORY].app(request.match_info["app_id"])
    context().app_id = app.id
    return Caller(app)


async def _admitted(request: web.Request) -> Caller:
    """An anonymous caller of the app in the path: a page of the app, or a caller without an origin.

    A preflight from any page is granted, so that the page can read the refusal that follows.
    """
    try:
        caller = await _anonymous(request)
    except Unavailable as fault:
        fault.retry = "page"  # nothing was taken yet
        raise
    origin = only_header(request, hdrs.ORIGIN)
    if origin is not None:
        app = caller.app
        registered, readable = origin in app.web_origins, page_origin(origin)
        admitted = registered or (readable and request.method == hdrs.METH_OPTIONS)
        if not admitted:
            await request.app[REFUSED_ORIGINS].tell(app, origin)
        allowed = {"Access-Control-Allow-Origin": origin} if registered or readable else {}
        as_incoming(request).cors = {**allowed, "Vary": "Origin"}
        if not admitted:
            raise OperationNotAllowed(
                f"This page's origin {origin} is not registered for the app; "
                "tell whoever runs this site."
                if readable
                else None,
                reason="origin",
                hint="`broker app update --app A --add-origin ORIGIN` registers an origin.",
            )
    return caller._replace(address=context().address)


def _browser(handler: Handler) -> AnyHandler:
    async def guarded(request: web.Request) -> web.StreamResponse:
        caller = await _admitted(request)
        if await _slow_body(request):
            caller = await _admitted(request)  # origins and policy may differ by now
        return await handler(request, caller)

    return _marked(guarded, "browser")


def _preflight(headers: str) -> Handler:
    async def answer(request: web.Request, _: Caller) -> web.StreamResponse:
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
    """POST and GET routes for pages, each with its preflight. `headers` are the names that a page
    may send.
    """
    routes = [web.post(path, _browser(handler)) for path, handler in posts.items()]
    routes += [web.get(path, _browser(handler), allow_head=False) for path, handler in gets.items()]
    routes += [web.options(path, _browser(_preflight(headers))) for path in (*posts, *gets)]
    return routes


def public(handler: AnyHandler) -> AnyHandler:
    """Mark a handler as open to any caller."""
    return _marked(handler, "public")


def public_app(handler: Handler) -> AnyHandler:
    """Open a handler to any caller of the app in the path, from any origin."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        as_incoming(request).cors = {"Access-Control-Allow-Origin": "*"}
        return await handler(request, await _anonymous(request))

    return _marked(guarded, "public")


def preflight_any(headers: str) -> AnyHandler:
    """The preflight of a `public_app` route."""
    return public_app(_preflight(headers))
