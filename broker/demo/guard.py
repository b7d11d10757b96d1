"""Request guard of the sample site: security headers, origin check (CSRF), bounded bodies, session
cookie, refusals.

A request that changes something must come from the site's own page. It is a POST with JSON, whose
`Origin` header is exactly one of the site's origins. A browser sets that header itself, and sends
JSON to another origin only after a preflight, so another site can't make a visitor's browser act
here. The cookie is SameSite=Strict and HttpOnly, and over https Secure and `__Host-`. A body has at
most `BODY_LIMIT` bytes, and is one JSON object without equal keys. Every fault is a `DemoRefusal`:
a status, a stable code and a sentence for the visitor.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import sqlite3
from collections.abc import Callable, Collection
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from broker.demo.accounts import SESSION_LIFE, Accounts, Session
from broker.demo.replay import LastRedemptions
from broker.demo.wire import TRACE
from broker.sdk.passkey_broker import (
    AsyncBrokerClient,
    BrokerError,
    BrokerUnavailable,
    BrokerUnreachable,
    TooManyRequests,
)

ACCOUNTS = web.AppKey("accounts", Accounts)
CLIENT = web.AppKey("client", AsyncBrokerClient)
APP_ID = web.AppKey("app_id", str)
REDEMPTIONS = web.AppKey("redemptions", LastRedemptions)
ORIGINS: web.AppKey[Callable[[], Collection[str]]] = web.AppKey("origins")

RENEWED = web.RequestKey("renewed", str)  # the token of a session that began in the request
COOKIE = "demo_session"
COOKIE_PATH = "/demo/"
# RFC 6265bis §4.1.3.2: no other host can set a cookie of this name, and no page over http.
HTTPS_COOKIE = f"__Host-{COOKIE}"
BODY_LIMIT = 4096  # bytes; the longest honest body is a nonce and a name
BODY_SECONDS = 10.0

log = logging.getLogger(__name__)

_HOST = re.compile(r"(?:([A-Za-z0-9._~-]*)|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{1,5})?)?")

HEADERS = {
    # Own files only, and no inline code: an injected tag or attribute has no effect.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'self'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    # Passkeys in own pages only, never in a frame of another site, and no other feature.
    "Permissions-Policy": "publickey-credentials-create=(self), publickey-credentials-get=(self),"
    " camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class DemoRefusal(Exception):
    """A refused request: HTTP status, stable code, a sentence for the visitor, and headers."""

    def __init__(self, status: int, code: str, sentence: str, **headers: str) -> None:
        self.status = status
        self.code = code
        self.headers = headers
        super().__init__(sentence)


def answer(status: int = 200, **fields: Any) -> web.Response:
    """A JSON answer. Its `trace` lists the calls of this request to the broker."""
    body = json.dumps({**fields, "trace": TRACE.get()}, separators=(",", ":"))
    return web.Response(
        status=status,
        text=body,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check host and origin before the handler, add security headers after it, and give every
    refusal one shape.
    """
    TRACE.set([])
    response: web.StreamResponse
    try:
        read_host(request)
        if request.method not in ("GET", "HEAD"):
            _check_origin(request)
        response = await handler(request)
    except (DemoRefusal, BrokerError, sqlite3.Error, web.HTTPException) as error:
        refusal = _refusal_of(error)
        response = answer(refusal.status, code=refusal.code, error=str(refusal))
        response.headers.update(refusal.headers)
    if RENEWED in request:
        set_cookie(request, response, request[RENEWED])
    response.headers.extend(HEADERS)
    return response


_HTTP_REFUSALS = {
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address doesn't take that method."),
}


def _refusal_of(
    error: DemoRefusal | BrokerError | sqlite3.Error | web.HTTPException,
) -> DemoRefusal:
    match error:
        case DemoRefusal():
            return error
        case BrokerUnavailable() | BrokerUnreachable():
            log.warning("the broker can't answer: %s", type(error).__name__)
            return DemoRefusal(
                503,
                "broker_down",
                "The passkey service can't be reached right now. Wait a moment, then try again.",
                **{"Retry-After": "2"},
            )
        case TooManyRequests():
            return DemoRefusal(
                429,
                "too_many_requests",
                "Many people are at it right now. Try again in a few seconds.",
            )
        case BrokerError():
            log.error("the broker refused a call of the sample site: %s", error.code)
            return DemoRefusal(
                502,
                "broker_refused",
                "The passkey service refused this site's request. "
                "The site's operator has to look into it.",
            )
        case sqlite3.Error():
            log.error("the accounts file can't be used: %s", type(error).__name__)
            return DemoRefusal(
                503,
                "accounts_down",
                "This site can't read its accounts right now. Try again in a moment.",
            )
    refusal = _HTTP_REFUSALS.get(
        error.status, ("invalid_request", "The request can't be understood.")
    )
    allow = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
    return DemoRefusal(error.status, *refusal, **allow)


def read_host(request: web.Request) -> tuple[str, int | None]:
    """Host, without brackets, and port of the Host header. The host is "" in HTTP/1.0 without the
    header (RFC 9112 §3.2).

    Raises:
        DemoRefusal: the header is not a name or address with a port.
    """
    found = _HOST.fullmatch(request.headers.get(hdrs.HOST, ""))
    try:
        if found is None:
            raise ValueError
        name, address, port = found.groups()
        if address is not None:
            ipaddress.IPv6Address(address)
        if int(port or 0) > 65535:
            raise ValueError
    except ValueError:
        raise DemoRefusal(
            400, "invalid_request", "The request's Host header can't be understood."
        ) from None
    return address or name or "", int(port) if port else None


def _check_origin(request: web.Request) -> None:
    """Refuse a request without an `Origin` of the site (RFC 6454 §7)."""
    if request.headers.get("Origin") not in request.app[ORIGINS]():
        raise DemoRefusal(
            403,
            "foreign_origin",
            "This request didn't come from this site's own page. Open the page again and retry.",
        )


async def read_body(request: web.Request) -> dict[str, Any]:
    """The JSON object of the page's body, of at most BODY_LIMIT bytes, within 10 s."""
    if request.content_type != "application/json":
        raise DemoRefusal(415, "unsupported_media_type", "Send JSON, as application/json.")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while len(body) <= BODY_LIMIT and (chunk := await request.content.readany()):
                body += chunk
    except web.RequestPayloadError:
        raise DemoRefusal(400, "invalid_request", "The request broke off.") from None
    except TimeoutError:
        raise DemoRefusal(408, "request_timeout", "The request took too long to arrive.") from None
    if len(body) > BODY_LIMIT:
        raise DemoRefusal(
            413, "request_too_large", "That's more than this site takes in one request."
        )
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise DemoRefusal(400, "invalid_request", "The request isn't well-formed JSON.") from None
    if not isinstance(value, dict):
        raise DemoRefusal(400, "invalid_request", "The request isn't a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key twice")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(text)


def text_field(body: dict[str, Any], name: str, limit: int, *, least: int = 1) -> str:
    """A required string of `least` to `limit` Unicode characters. A lone surrogate (RFC 8259 §8.2)
    is refused.
    """
    value = body.get(name)
    if (
        not isinstance(value, str)
        or not least <= len(value) <= limit
        or any("\ud800" <= c <= "\udfff" for c in value)
    ):
        raise DemoRefusal(
            400,
            "invalid_request",
            f"The request needs {name}, {least} to {limit} characters of text.",
        )
    return value


async def current_session(request: web.Request) -> Session | None:
    """The live session of the request's cookie."""
    token = next(filter(None, map(request.cookies.get, _cookies_read(request))), None)
    return await request.app[ACCOUNTS].session(token) if token else None


def set_cookie(request: web.Request, response: web.StreamResponse, token: str) -> None:
    """Set the session cookie: Secure if the page came over https, as its checked Origin says."""
    name, path, secure = _cookie_attributes(request)
    response.set_cookie(
        name,
        token,
        path=path,
        max_age=SESSION_LIFE,
        httponly=True,
        samesite="Strict",
        secure=secure,
    )


def clear_cookie(request: web.Request, response: web.Response) -> None:
    name, path, secure = _cookie_attributes(request)
    response.del_cookie(name, path=path, httponly=True, samesite="Strict", secure=secure)


def _cookie_attributes(request: web.Request) -> tuple[str, str, bool]:
    """Name, path and `Secure` of the session cookie, for the origin of the request."""
    secure = request.headers.get("Origin", "").startswith("https://")
    return (HTTPS_COOKIE, "/", True) if secure else (COOKIE, COOKIE_PATH, False)


def _cookies_read(request: web.Request) -> tuple[str, ...]:
    """Names of the cookies that may carry the session.

    A browser sends no Origin with a GET of an own page. The name without prefix then counts only on
    a site that has pages over http.
    """
    if request.method not in ("GET", "HEAD"):
        return (_cookie_attributes(request)[0],)
    plain = any(origin.startswith("http://") for origin in request.app[ORIGINS]())
    return (HTTPS_COOKIE, COOKIE) if plain else (HTTPS_COOKIE,)
