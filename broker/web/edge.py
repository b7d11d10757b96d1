"""Outermost request handler: routing, request ids, the request log, and error responses.

Each request gets an id (the caller's `X-Request-Id` if well-formed), a deadline, one log line and
one observation in the metrics. Each `Refusal` becomes a response in the shape of the dialect whose
path was requested. This includes 404, 405, 413, 415, 500 and 503. The edge sets the headers of a
refusal, and decides whether the connection closes after it. Any other exception is a defect: its
type and place are logged, and the response is a bare 500.

A request above the caps of its port (`Limits.connections`, `Limits.requests`) gets 503 with
Retry-After, unless its route tells of the process's health.

The edge calls aiohttp's router and the middlewares itself. So it also answers the exceptions that
aiohttp raises there: no route, wrong method, an unknown Expect header (aiohttp would echo its
bytes).
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from aiohttp import ClientConnectionResetError, hdrs, web
from multidict import istr

from broker.errors import (
    Conflict,
    IdempotencyConflict,
    InternalFault,
    InvalidKey,
    InvalidRequest,
    InvalidSetting,
    MailCodeAttempts,
    MailCodeExpired,
    MailCodeRate,
    MethodNotAllowed,
    NotFound,
    OperationNotAllowed,
    Refusal,
    RequestTimeout,
    RequestTooLarge,
    TooManyRequests,
    Unavailable,
    UnsupportedEncoding,
)
from broker.telemetry import CONTEXT, Context, Log, Metrics, context, fault
from broker.web.answer import HEADERS, NO_HEADERS, REQUEST_ID, Answer, as_response
from broker.web.body import ANSWER_SECONDS, LIMITS, Incoming, Limits
from broker.web.client_address import CLIENT_ADDRESS, ClientAddress
from broker.web.route_cache import RouteCache

if TYPE_CHECKING:
    from broker.telemetry.tracing import Tracing

# Writes a refusal in a dialect's shape, which may depend on the request. The request is None if the
# bytes were not HTTP.
Renderer = Callable[[Refusal, web.Request | None], web.Response]

# Status of each refusal that is the same in every dialect (RFC 9110 §15). Each dialect adds rows of
# its own.
STATUS: Mapping[type[Refusal], int] = {
    InvalidRequest: 400,
    InvalidSetting: 400,
    OperationNotAllowed: 403,
    NotFound: 404,
    MethodNotAllowed: 405,
    RequestTimeout: 408,
    Conflict: 409,
    MailCodeExpired: 410,
    MailCodeAttempts: 410,
    RequestTooLarge: 413,
    UnsupportedEncoding: 415,
    IdempotencyConflict: 422,
    TooManyRequests: 429,
    MailCodeRate: 429,
    InternalFault: 500,
    Unavailable: 503,
}

# Request ids reach logs and events, so the broker's own tokens are not well-formed request ids.
_WELL_FORMED_ID = re.compile(r"(?!pb[a-z]_)[A-Za-z0-9._-]{8,64}\Z")
_REQUEST_ID_HEADER = istr(REQUEST_ID)
_CHANCE = random.Random()  # noqa: S311 - request ids are no secrets
# Routes that answer above the caps: a load balancer and an operator must see an overloaded process.
_NOT_CAPPED = frozenset({"/health/live", "/health/ready", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _headers_of(refusal: Refusal) -> dict[str, str]:
    """Response headers of a refusal, which a dialect may override: Retry-After in seconds
    (RFC 9110 §10.2.3), the scheme of the key (RFC 6750 §3)."""
    if isinstance(refusal, Unavailable | TooManyRequests | MailCodeRate):
        return {"Retry-After": str(refusal.retry_after)}
    if isinstance(refusal, InvalidKey):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def _words_of(refusal: Refusal) -> dict[str, str]:
    """Log fields of a refusal."""
    told = {"code": refusal.code, "reason": refusal.reason}
    return {**told, "hint": refusal.hint} if refusal.hint else told


@lru_cache(1024)
def _user_agent(header: str) -> str:
    """A `User-Agent` header as events keep it: in printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in header)


class Edge:
    """Request handler around an aiohttp application.

    `renderers` pairs each dialect's paths with its renderer; no path belongs to two dialects.
    `default` renders refusals on all other paths, and of bytes that are not HTTP. `docs_url` is the
    page of refusal codes.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        renderers: Sequence[tuple[re.Pattern[str], Renderer]],
        default: Renderer,
        metrics: Metrics,
        log: Log,
        docs_url: str = "",
    ) -> None:
        self.log = log
        self._routes = RouteCache(app)
        self._renderers = tuple(renderers)
        self._default = default
        self._metrics = metrics
        self._docs_url = docs_url
        self._most_requests = app.get(LIMITS, Limits()).requests
        self._client_address = app.get(CLIENT_ADDRESS, ClientAddress())
        self._in_flight = 0
        metrics.requests_in_flight.add(lambda: self._in_flight)

    async def __call__(self, request: Incoming) -> web.StreamResponse:
        began = time.monotonic()
        headers = request.headers
        now = Context(
            _request_id(headers.get(_REQUEST_ID_HEADER)),
            "browser",
            None,
            began + ANSWER_SECONDS,
            self._client_address.of(request),
            _user_agent(headers.get(hdrs.USER_AGENT, "")[:255]),
        )
        CONTEXT.set(now)
        refusal: Refusal | None = None
        response: web.StreamResponse
        allow: Mapping[str, str] = NO_HEADERS
        route = "unmatched"
        self._in_flight += 1
        try:
            found = self._routes.find(request) or await self._routes.resolve(request)
            request.match_info, route = found.match, found.template
            if request.is_surplus or self._in_flight > self._most_requests:
                _refuse_above_caps(request, route)
            if hdrs.EXPECT in headers:
                await _meet_expectation(request)
            response = await found.handler(request)
        except Refusal as raised:
            refusal = raised
        except web.HTTPException as raised:
            refusal = _of_aiohttp(raised)
            allow = {
                name: raised.headers[name]
                for name in ("Allow", "Location")
                if name in raised.headers
            }
            response = web.Response(status=raised.status, headers=allow)
        except Exception as error:  # noqa: BLE001 - the outermost handler: 500, without details
            self.log(
                "defect",
                severity=logging.ERROR,
                request_id=now.request_id,
                route=route,
                **fault(error),
            )
            refusal = InternalFault()
        finally:
            self._in_flight -= 1
        if refusal is not None:
            if refusal.hint and now.actor.startswith("key:"):  # no hints for pages
                refusal.sentence = f"{refusal.sentence} {refusal.hint}"
            response = self._render(refusal, request)
            if allow:
                response.headers.update(allow)
        if request.is_surplus:
            response = as_response(response)
            response.force_close()
        _finish(response, now.request_id, request.cors or NO_HEADERS)
        seconds = time.monotonic() - began
        status = response.status
        self._metrics.requests.observe(seconds, route, str(status))
        self.log(
            "request",
            severity=logging.WARNING if status >= 500 else logging.INFO,
            method=request.method if request.method in _METHODS else "other",
            route=route,
            status=status,
            ms=round(seconds * 1000, 2),
            app=now.app_id,
            request_id=now.request_id,
            **(_words_of(refusal) if refusal is not None else {}),
        )
        return response

    def malformed(self, kind: str) -> web.Response:
        """Response to bytes that are not HTTP. `kind` is the parser's name of the fault. The bytes
        reach neither the response nor the log.
        """
        refusal = InvalidRequest("The request is not well-formed HTTP/1.1.", reason="http")
        response = self._render(refusal, None)
        request_id = _request_id(None)
        _finish(response, request_id, NO_HEADERS)
        self.log("malformed_request", status=response.status, kind=kind, request_id=request_id)
        return response

    def late_head(self) -> None:
        """Count and log a request whose head was not complete in time. Its connection closes
        without a response.
        """
        self._metrics.refusals.inc(RequestTimeout.code, "head")
        self.log("late_head", request_id=_request_id(None))

    def refuse_connection(self) -> asyncio.BaseProtocol:
        """Count a connection that is so far above the cap that it ends without an answer."""
        self._metrics.refusals.inc(Unavailable.code, "connections")
        return _EndedConnection()

    def _render(self, refusal: Refusal, request: web.Request | None) -> web.Response:
        """Response to a refusal. The refusal is counted in the metrics."""
        self._metrics.refusals.inc(refusal.code, refusal.reason)
        if self._docs_url:
            refusal.doc = f"{self._docs_url}#{refusal.code}"
        response = self._renderer(request)(refusal, request)
        for name, value in _headers_of(refusal).items():
            response.headers.setdefault(name, value)
        if isinstance(refusal, RequestTimeout | RequestTooLarge):
            response = as_response(response)
            response.force_close()  # the rest of the body would be read as the next request
        return response

    def _renderer(self, request: web.Request | None) -> Renderer:
        if request is not None:
            for paths, renderer in self._renderers:
                if paths.match(request.path):
                    return renderer
        return self._default


class TracedEdge(Edge):
    """An edge that makes a span of each request. `trusts_callers`: a caller's trace goes on."""

    def __init__(
        self, tracing: Tracing, *arguments: Any, trusts_callers: bool, **more: Any
    ) -> None:
        super().__init__(*arguments, **more)
        self._tracing = tracing
        self._trusts_callers = trusts_callers

    async def __call__(self, request: Incoming) -> web.StreamResponse:
        with self._tracing.request(request.headers, trusted=self._trusts_callers) as span:
            response = await super().__call__(request)
            resource, now = request.match_info.route.resource, context()
            route = resource.canonical if resource else "unmatched"
            method = request.method if request.method in _METHODS else "_OTHER"
            span.update_name(f"{method} {route}")
            # https://opentelemetry.io/docs/specs/semconv/http/http-spans/
            span.set_attributes(
                {
                    "http.request.method": method,
                    "http.route": route,
                    "http.response.status_code": response.status,
                    "broker.request_id": now.request_id,
                    "broker.app": now.app_id or "",
                }
            )
            return response


class _EndedConnection(asyncio.Protocol):
    """A connection that ends at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).abort()


def _refuse_above_caps(request: Incoming, route: str) -> None:
    """Raise `Unavailable`, before anything is read or taken."""
    if route not in _NOT_CAPPED:
        raise Unavailable(reason="connections" if request.is_surplus else "requests_in_flight")


def _request_id(given: str | None) -> str:
    """The caller's request id if well-formed, otherwise a new random id."""
    return given if given and _WELL_FORMED_ID.match(given) else f"{_CHANCE.getrandbits(96):024x}"


def _finish(response: web.StreamResponse, request_id: str, cors: Mapping[str, str]) -> None:
    """Add the request id, the security headers and the CORS headers to a response."""
    if isinstance(response, Answer):
        response.finish(request_id, cors)
    elif not response.prepared:
        response.headers.update({**cors, REQUEST_ID: request_id})
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)


async def _meet_expectation(request: web.Request) -> None:
    """Write "100 Continue" if the request expects it (RFC 9110 §10.1.1)."""
    expectation = request.headers[hdrs.EXPECT]
    if not expectation.isascii():
        raise InvalidRequest(reason="http_417")  # aiohttp fails to echo it
    if expectation:
        try:
            await request.match_info.expect_handler(request)
        except ClientConnectionResetError:  # the peer is gone
            raise InvalidRequest("The body ended early.", reason="disconnected") from None


def _of_aiohttp(raised: web.HTTPException) -> Refusal | None:
    """The refusal for an HTTP error that aiohttp raised. None: a redirect, which stays."""
    if raised.status < 400:
        return None
    if raised.status == 404:
        return NotFound()
    if raised.status == 405:
        return MethodNotAllowed()
    if raised.status == 413:
        return RequestTooLarge()
    return InvalidRequest(reason=f"http_{raised.status}")
