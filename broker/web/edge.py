"""The edge: the one place between HTTP and everything else.

Each request gets an id (the caller's `X-Request-Id` where well-formed), a deadline, one log line
and one observation in the metrics. Each `Refusal` becomes an answer in the shape of the dialect
whose path was asked, on every path: also 404, 405, 413, 415, 500 and 503; its headers, and whether
the connection ends with it, are the edge's. What is not a refusal is a defect of ours: it is logged
by type and place, and answered with 500 and nothing else.

The edge stands outside aiohttp's router and middlewares, so what those raise by themselves (no
route, wrong method, an odd Expect header, whose bytes aiohttp would echo) passes here as well.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence

import orjson
from aiohttp import ClientConnectionResetError, hdrs, web
from aiohttp.compression_utils import MAX_SYNC_CHUNK_SIZE
from aiohttp.http import RESPONSES
from multidict import CIMultiDict, istr

from broker.errors import (
    Conflict,
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
    TooManyCeremonies,
    Unavailable,
    UnsupportedEncoding,
)
from broker.telemetry import CONTEXT, Context, Log, Metrics, fault
from broker.web.body import ANSWER_SECONDS, Incoming
from broker.web.shortcuts import Shortcuts, Way

# A refusal in a dialect's shape. The request is there for shapes that depend on it; None where the
# bytes were no HTTP.
Renderer = Callable[[Refusal, web.Request | None], web.Response]

# Refusals whose status depends on no vendor (RFC 9110 §15). Each dialect's table has these rows,
# and its own.
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
    TooManyCeremonies: 429,
    MailCodeRate: 429,
    InternalFault: 500,
    Unavailable: 503,
}

# Not one of our tokens, should a caller use one to tell requests apart: a request id goes to logs
# and events.
_REQUEST_ID = re.compile(r"(?!pb[a-z]_)[A-Za-z0-9._-]{8,64}\Z")
_X_REQUEST_ID = istr("X-Request-Id")
_CHANCE = random.Random()  # noqa: S311 - ids tell requests apart, no more
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Server": "passkey-broker",
}
_JSON_HEADERS = CIMultiDict({hdrs.CONTENT_TYPE: "application/json", **_HEADERS})
_NO_HEADERS: Mapping[str, str] = {}
REASON_PHRASES = {status: phrase for status, (phrase, _) in RESPONSES.items()}


class Answer(web.Response):
    """A whole JSON answer. As long as nobody asks for its headers there is no dictionary of them,
    and `serialize` is what goes over the wire.

    It sets what its parents' `__init__` set, which ask many questions that a JSON answer has no
    doubts about; a test compares."""

    def __init__(self, body: bytes, status: int) -> None:
        self._state = {}
        self._status = status
        self._reason = REASON_PHRASES.get(status, "")
        self._body = body
        self._compressed_body = None
        self._zlib_executor_size = MAX_SYNC_CHUNK_SIZE
        self._zlib_executor = None
        self._own: CIMultiDict[str] | None = None
        self._more: Mapping[str, str] = _NO_HEADERS
        self._request_id = ""

    @property
    def _headers(self) -> CIMultiDict[str]:  # type: ignore[override]  # where aiohttp has an attribute
        if self._own is None:
            self._own = CIMultiDict(_JSON_HEADERS)
            self.finish(self._request_id, self._more)
        return self._own

    def finish(self, request_id: str, more: Mapping[str, str]) -> None:
        """Add the headers that differ from answer to answer."""
        self._request_id, self._more = request_id, more
        if self._own is not None:
            self._own.update(more)
            if request_id:
                self._own["X-Request-Id"] = request_id

    def serialize(self, date: str) -> bytes | None:
        """Head and body; None where the answer has headers of its own. `more` are names and values
        that we wrote, or judged (`page_origin`), and a request id has no line break
        (`_REQUEST_ID`)."""
        body = self._body
        if self._own is not None or not isinstance(body, bytes):
            return None
        first = _FIRST.get(self._status) or _first(self._status)
        more = (
            "".join([f"{name}: {value}\r\n" for name, value in self._more.items()])
            if self._more
            else ""
        )
        last = f"X-Request-Id: {self._request_id}\r\nContent-Length: {len(body)}\r\nDate: {date}\r\n\r\n"
        return f"{first}{more}{last}".encode() + body


_FIRST: dict[int, str] = {}


def _first(status: int) -> str:
    """How an answer with this status begins: what is the same in all of them."""
    lines = [
        f"HTTP/1.1 {status} {REASON_PHRASES.get(status, '')}",
        *map(": ".join, _JSON_HEADERS.items()),
        "",
    ]
    _FIRST[status] = "\r\n".join(lines)
    return _FIRST[status]


def json_answer(
    value: object, *, status: int = 200, headers: Mapping[str, str] = _NO_HEADERS
) -> web.Response:
    """A JSON answer."""
    answer = Answer(orjson.dumps(value), status)
    if headers:
        answer.headers.update(headers)
    return answer


def _headers_of(refusal: Refusal) -> dict[str, str]:
    """Headers that a refusal carries in every dialect, unless that has said otherwise: Retry-After
    in seconds (RFC 9110 §10.2.3), the scheme of the key (RFC 6750 §3)."""
    if isinstance(refusal, Unavailable | TooManyCeremonies | MailCodeRate):
        return {"Retry-After": str(refusal.retry_after)}
    if isinstance(refusal, InvalidKey):
        return {"WWW-Authenticate": "Bearer"}
    return {}


class Edge:
    """Wraps an aiohttp application. `renderers` pairs the paths that are a dialect's own with its
    shape; no path is two dialects'. `default` is the shape of paths that nobody owns, and of bytes
    that are no HTTP. `docs_url` is the page of refusal codes."""

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
        self._router = (
            app._handle
        )  # what aiohttp's own server calls; the edge has to stand outside of it
        self._shortcuts = Shortcuts(app)
        self._renderers = tuple(renderers)
        self._default = default
        self._metrics = metrics
        self._log = log
        self._docs_url = docs_url

    async def _by_router(self, request: web.Request) -> web.StreamResponse:
        if not request.headers.get(hdrs.EXPECT, "").isascii():
            raise InvalidRequest(reason="http_417")  # aiohttp fails over saying it back
        try:
            return await self._router(request)
        except ClientConnectionResetError:  # nobody is there to be told to continue
            raise InvalidRequest("The body ended early.", reason="disconnected") from None

    async def __call__(self, request: Incoming) -> web.StreamResponse:
        began = time.monotonic()
        headers = request.headers
        now = Context(
            _request_id(headers.get(_X_REQUEST_ID)), "browser", None, began + ANSWER_SECONDS
        )
        CONTEXT.set(now)
        refusal: Refusal | None = None
        response: web.StreamResponse
        more: Mapping[str, str] = _NO_HEADERS
        found: Way | None = None
        try:
            found = self._shortcuts.find(request.method, request.raw_path)
            if found is not None and hdrs.EXPECT not in headers:
                request._match_info = found.match
                response = await found.handler(request)
            else:
                response = await self._by_router(request)
        except Refusal as raised:
            refusal = raised
        except web.HTTPException as raised:
            refusal = _of_aiohttp(raised)
            more = {
                name: raised.headers[name]
                for name in ("Allow", "Location")
                if name in raised.headers
            }
            response = web.Response(status=raised.status, headers=more)
        except Exception as error:  # noqa: BLE001 - the last line: a defect is logged and answered, never shown
            self._log(
                "defect",
                severity=logging.ERROR,
                request_id=now.request_id,
                route=_route(request),
                **fault(error),
            )
            refusal = InternalFault()
        if refusal is not None:
            if refusal.hint and now.actor.startswith(
                "key:"
            ):  # the key was accepted: a backend reads it, not a page
                refusal.sentence = f"{refusal.sentence} {refusal.hint}"
            response = self._render(refusal, request)
            if more:
                response.headers.update(more)
            self._metrics.refusals.inc(refusal.code, refusal.reason)
        if type(response) is Answer:
            response.finish(now.request_id, request.cors or _NO_HEADERS)
        elif not response.prepared:
            _finish(response, now.request_id, request.cors or _NO_HEADERS)
        seconds = time.monotonic() - began
        route = found.route if found is not None else _route(request)
        status = response.status
        self._metrics.requests.observe(seconds, route, str(status))
        self._log.request(
            request.method if request.method in _METHODS else "other",
            route,
            status,
            seconds,
            now.app_id,
            now.request_id,
            (refusal.code, refusal.reason, refusal.hint) if refusal is not None else None,
        )
        return response

    def malformed(self, kind: str) -> web.Response:
        """The answer to bytes that are not HTTP. Nothing of them is in it, nor in the log: `kind`
        is the parser's word.
        """
        refusal = InvalidRequest("The request is not well-formed HTTP/1.1.", reason="http")
        self._metrics.refusals.inc(refusal.code, refusal.reason)
        response = self._render(refusal, None)
        request_id = _request_id(None)
        _finish(response, request_id, _NO_HEADERS)
        self._log("malformed_request", status=response.status, kind=kind, request_id=request_id)
        return response

    def late_head(self) -> None:
        """Count and log a request whose head was not complete in time. Its connection ends without
        an answer.
        """
        self._metrics.refusals.inc(RequestTimeout.code, "head")
        self._log("late_head", request_id=_request_id(None))

    def _render(self, refusal: Refusal, request: web.Request | None) -> web.Response:
        if self._docs_url:
            refusal.doc = f"{self._docs_url}#{refusal.code}"
        response = self._renderer(request)(refusal, request)
        for name, value in _headers_of(refusal).items():
            response.headers.setdefault(name, value)
        if isinstance(refusal, RequestTimeout | RequestTooLarge):
            response.force_close()  # what is left of the body would be read as the next request
        return response

    def _renderer(self, request: web.Request | None) -> Renderer:
        if request is not None:
            for paths, renderer in self._renderers:
                if paths.match(request.path):
                    return renderer
        return self._default


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _request_id(given: str | None) -> str:
    """The caller's id where it is well-formed, else a new one."""
    return given if given and _REQUEST_ID.match(given) else f"{_CHANCE.getrandbits(96):024x}"


def _finish(response: web.StreamResponse, request_id: str, cors: Mapping[str, str]) -> None:
    """The headers that every answer carries, and those for pages."""
    response.headers.update(cors)
    response.headers["X-Request-Id"] = request_id
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


def _route(request: web.Request) -> str:
    """The route's template; "unmatched" where there is none, so labels stay bounded and no path is
    logged.
    """
    match = request._match_info
    if match is None:
        return "unmatched"
    resource = match._route.resource
    return resource.canonical if resource is not None else "unmatched"


def _of_aiohttp(raised: web.HTTPException) -> Refusal | None:
    """What aiohttp refused by itself, as a refusal of ours. None: a redirect, which stands."""
    if raised.status < 400:
        return None
    if raised.status == 404:
        return NotFound()
    if raised.status == 405:
        return MethodNotAllowed()
    if raised.status == 413:
        return RequestTooLarge()
    return InvalidRequest(reason=f"http_{raised.status}")
