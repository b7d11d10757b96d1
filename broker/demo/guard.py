"""What every request to the sample site goes through: headers, origin check, bounded bodies,
session cookie, refusals.

Theory of operation. A request that changes something must come from our own page: it is a POST with
JSON whose `Origin` header is exactly one of the site's origins. A browser sets that header itself
and sends JSON to another origin only after asking, so another site can't make a visitor's browser
act here; the cookie is SameSite=Strict besides, HttpOnly, and over https Secure and `__Host-`.
Bodies end at `BODY_LIMIT` bytes and are one JSON object with no key twice. Whatever goes wrong is a
`DemoRefusal`: a status, a stable code and a sentence for the visitor.
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

from broker.demo.accounts import SESSION, Accounts, Session
from broker.demo.replay import LastRedemptions
from broker.demo.wire import TRACE, Trace
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

RENEWED = web.RequestKey("renewed", str)  # the token of a session that the request began
COOKIE = "demo_session"
COOKIE_PATH = "/demo/"
HTTPS_COOKIE = f"__Host-{COOKIE}"  # no other host, and nobody over http, can set one of this name (RFC 6265bis §4.1.3.2)
BODY_LIMIT = 4096  # bytes; the longest honest body is a nonce and a name

BODY_SECONDS = 10.0

log = logging.getLogger(__name__)

_HOST = re.compile(r"(?:([A-Za-z0-9._~-]*)|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{1,5})?)?")

HEADERS = {
    # Nothing but our own files, and no inline code: an injected tag or attribute does nothing.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; frame-ancestors 'none'; form-action 'self'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    # Passkeys in our own pages only, never in a frame of somebody else's; nothing else that a
    # browser can offer.
    "Permissions-Policy": "publickey-credentials-create=(self), publickey-credentials-get=(self),"
    " camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class DemoRefusal(Exception):
    """A request that is not granted: HTTP status, stable code, and a sentence for the person in
    front of the page.
    """

    def __init__(self, status: int, code: str, sentence: str) -> None:
        self.status = status
        self.code = code
        self.sentence = sentence
        super().__init__(sentence)


def answer(status: int = 200, **fields: Any) -> web.Response:
    """A JSON answer that carries, as `trace`, the calls which this request made to the broker."""
    body = json.dumps({**fields, "trace": TRACE.get().hops}, separators=(",", ":"))
    return web.Response(
        status=status,
        text=body,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Checks of Host and origin before the handler, security headers after it, and one shape for
    every refusal.
    """
    TRACE.set(Trace())
    response: web.StreamResponse
    try:
        read_host(request)
        if request.method not in ("GET", "HEAD"):
            _check_origin(request)
        response = await handler(request)
    except DemoRefusal as refusal:
        response = _refused(refusal)
    except (BrokerUnavailable, BrokerUnreachable) as error:
        log.warning("the broker can't answer: %s", type(error).__name__)
        sentence = "The passkey service can't be reached right now. Wait a moment, then try again."
        response = _refused(DemoRefusal(503, "broker_down", sentence))
        response.headers["Retry-After"] = "2"
    except TooManyRequests:
        sentence = "Many people are at it right now. Try again in a few seconds."
        response = _refused(DemoRefusal(429, "too_many_requests", sentence))
    except BrokerError as error:
        log.error("the broker refused a call of ours: %s", error.code)
        sentence = "The passkey service refused this site's request. The site's operator has to look into it."
        response = _refused(DemoRefusal(502, "broker_refused", sentence))
    except sqlite3.Error as error:
        log.error("the accounts file can't be used: %s", type(error).__name__)
        sentence = "This site can't read its accounts right now. Try again in a moment."
        response = _refused(DemoRefusal(503, "accounts_down", sentence))
    except web.HTTPException as error:
        known = {404: ("not_found", "There is nothing at this address."),
                 405: ("method_not_allowed", "This address doesn't take that method.")}  # fmt: skip
        code, sentence = known.get(
            error.status, ("invalid_request", "The request can't be understood.")
        )
        response = _refused(DemoRefusal(error.status, code, sentence))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    if RENEWED in request:
        set_cookie(request, response, request[RENEWED])
    response.headers.extend(HEADERS)
    return response


def _refused(refusal: DemoRefusal) -> web.Response:
    return answer(refusal.status, code=refusal.code, error=refusal.sentence)


def read_host(request: web.Request) -> tuple[str, int | None]:
    """Host, without brackets, and port of the Host header; "" of HTTP/1.0, which may lack one (RFC
    9112 §3.2).

    Raises:
        DemoRefusal: it has another form than a name or address with a port.
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
    """RFC 6454 §7: the browser says which origin asks. A request without the header, or with
    another origin, is not our page's.
    """
    if request.headers.get("Origin") not in request.app[ORIGINS]():
        sentence = (
            "This request didn't come from this site's own page. Open the page again and retry."
        )
        raise DemoRefusal(403, "foreign_origin", sentence)


async def read_body(request: web.Request) -> dict[str, Any]:
    """The JSON object that the page sent. Refuses another content type, more than BODY_LIMIT bytes
    or 10 s, and what is no object.
    """
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
    """A field that has to be a string of `least` to `limit` Unicode characters (a lone surrogate,
    RFC 8259 §8.2, is none).
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
    accounts = request.app[ACCOUNTS]
    return await accounts.call(accounts.session, token) if token else None


def set_cookie(request: web.Request, response: web.StreamResponse, token: str) -> None:
    """Give the browser its session. Secure whenever the page itself came over https, as its
    (checked) Origin says.
    """
    name, path, secure = _cookie_set(request)
    response.set_cookie(
        name, token, path=path, max_age=SESSION, httponly=True, samesite="Strict", secure=secure
    )


def clear_cookie(request: web.Request, response: web.Response) -> None:
    name, path, secure = _cookie_set(request)
    response.del_cookie(name, path=path, httponly=True, samesite="Strict", secure=secure)


def _cookie_set(request: web.Request) -> tuple[str, str, bool]:
    """Name, path and `Secure` of the cookie for the page that asks."""
    return (HTTPS_COOKIE, "/", True) if _https(request) else (COOKIE, COOKIE_PATH, False)


def _cookies_read(request: web.Request) -> tuple[str, ...]:
    """Names of the cookies that may bring the session. Browsers send no Origin with a GET of our
    own page; then the name without prefix counts only on a site that has pages over http."""
    if request.method not in ("GET", "HEAD"):
        return (_cookie_set(request)[0],)
    plain = any(origin.startswith("http://") for origin in request.app[ORIGINS]())
    return (HTTPS_COOKIE, COOKIE) if plain else (HTTPS_COOKIE,)


def _https(request: web.Request) -> bool:
    return request.headers.get("Origin", "").startswith("https://")
