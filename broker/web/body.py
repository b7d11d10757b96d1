"""Request bodies: size limit, read timeout and strict JSON parsing.

Two parsers may read one body differently: a proxy in front sees one user, the broker another. So
JSON that RFC 8259 leaves open is refused: duplicate keys (§4), lone surrogates (§8.2), numbers
beyond a double (§6), NaN, invalid UTF-8, NUL in strings, deep nesting. orjson refuses most of this,
but merges duplicate keys silently. A body that equals orjson's own output has no duplicate keys,
for a merged key would be missing there. `JSON.stringify` in browsers writes such bodies. Only other
bodies are parsed a second time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import orjson
from aiohttp import hdrs, web
from aiohttp.web_urldispatcher import MatchInfoError, UrlMappingMatchInfo
from multidict import MultiDict, istr

from broker.errors import InvalidRequest, RequestTimeout, RequestTooLarge, UnsupportedEncoding
from broker.model import Idempotency
from broker.telemetry import context

MAX_BODY = 64 * 1024
ANSWER_SECONDS = 1.8
MAX_DEPTH = 32
SPARE_CONNECTIONS = 64  # above the cap: for health checks, and for answers of 503


@dataclass(frozen=True, slots=True)
class Limits:
    """Timeouts of a connection in seconds: to receive a whole head, to receive a whole body, and
    between two requests. And the caps of a port: `connections`, and `requests` in flight.
    """

    head: float = 10.0
    body: float = 10.0
    idle: float = 75.0
    connections: int = 4096
    requests: int = 2048


_IDEMPOTENCY_KEY = istr("Idempotency-Key")
_VISIBLE = re.compile(r"[!-~]{1,255}")
LIMITS = web.AppKey("LIMITS", Limits)
_DEFAULT = Limits()


class Incoming(web.Request):
    """A request with further attributes: the body if it came whole with the head, the body that was
    read and checked, the CORS headers of the response, the route, and whether the connection is
    above the cap.
    """

    ATTRS = web.Request.ATTRS | {"whole_body", "judged_body", "cors", "match_info", "is_surplus"}
    whole_body: bytes | None = None
    judged_body: bytes | None = None
    cors: Mapping[str, str] | None = None
    is_surplus: bool = False
    match_info: UrlMappingMatchInfo = MatchInfoError(web.HTTPNotFound())  # until the edge sets it

    @property
    def app(self) -> web.Application:
        return self.match_info.current_app


def as_incoming(request: web.Request) -> Incoming:
    """The request under the type that the broker's server creates. No `cast`: that is a call."""
    return request  # type: ignore[return-value]


def only_header(request: web.Request, name: str) -> str | None:
    """A header that authorises a request or says how its body is read. Of two, a proxy may have
    read the other, so a duplicate is refused.

    Raises:
        InvalidRequest: the header is sent twice.
    """
    values = request.headers.getall(name, ())
    if len(values) > 1:
        raise InvalidRequest(f"The header {name} is sent twice.", reason="header_twice")
    return values[0] if values else None


async def read_bytes(request: web.Request) -> bytes:
    """The body, at most 64 KiB, complete in time and not compressed. The deadline of the response
    starts when the body is complete.

    Raises:
        RequestTooLarge, RequestTimeout, UnsupportedEncoding, InvalidRequest (broken framing, two
        encodings, caller gone).
    """
    body = _at_hand(as_incoming(request))
    if body is None:
        body = await _read(request)
        context().deadline = time.monotonic() + ANSWER_SECONDS
        as_incoming(request).judged_body = body
    return body


def _at_hand(incoming: Incoming) -> bytes | None:
    """The body if it came whole with its head, or was read before; checked as by `read_bytes`."""
    if incoming.judged_body is not None:
        return incoming.judged_body
    encoding = only_header(incoming, hdrs.CONTENT_ENCODING)
    if encoding is not None and encoding.lower() != "identity":
        raise UnsupportedEncoding
    body = incoming.whole_body
    if body is not None:
        if len(body) > MAX_BODY:
            raise RequestTooLarge
        incoming.judged_body = body
    return body


async def _read(request: web.Request) -> bytes:
    if (request.content_length or 0) > MAX_BODY:
        raise RequestTooLarge
    try:
        async with asyncio.timeout(request.match_info.apps[0].get(LIMITS, _DEFAULT).body):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise RequestTooLarge from None
    except TimeoutError:
        raise RequestTimeout from None
    except web.RequestPayloadError:
        raise InvalidRequest("The body is not framed as HTTP/1.1 asks.", reason="framing") from None
    except ConnectionError:  # the peer is gone, which is no defect
        raise InvalidRequest("The body ended early.", reason="disconnected") from None


async def idempotency_of(request: web.Request, api_key: str) -> Idempotency | None:
    """The idempotency of a request: its header Idempotency-Key, 1 to 255 visible ASCII characters.
    None without it.

    Source: draft-ietf-httpapi-idempotency-key-header; the value is taken as it stands, quotes too.

    Raises:
        InvalidRequest: the header has another form, or is sent twice.
    """
    key = only_header(request, _IDEMPOTENCY_KEY)
    if key is None:
        return None
    if not _VISIBLE.fullmatch(key):
        raise InvalidRequest(
            "Idempotency-Key has 1 to 255 visible ASCII characters.", reason="idempotency_key"
        )
    digest = hashlib.sha256(f"{request.path}\n".encode() + await read_bytes(request)).digest()
    return Idempotency(f"{api_key}:{key}", digest)


async def read_object(request: web.Request, *, empty: bool = False) -> dict[str, Any]:
    """The body as a JSON object; the content type is ignored. With `empty`, an empty body gives
    `{}`.

    Raises:
        InvalidRequest: not JSON, not an object, or JSON that parsers read differently.
        As `read_bytes`.
    """
    body = _at_hand(as_incoming(request))
    if body is None:
        body = await read_bytes(request)
    if empty and not body.strip():
        return {}
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        InvalidRequest: see `read_object`.
    """
    try:
        value = orjson.loads(body)
        if orjson.dumps(value) != body:
            value = json.loads(body, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
            _judge(value, 0)
    except InvalidRequest:
        raise
    except (ValueError, RecursionError, orjson.JSONEncodeError):
        raise InvalidRequest("The body is not JSON (RFC 8259, UTF-8).", reason="not_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body is not a JSON object.", reason="not_an_object")
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH or b"\\u0000" in body:
        _judge(value, 0)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequest("The body names a key twice.", reason="duplicate_key")
    return found


def _no_constant(_: str) -> object:
    raise ValueError


def _judge(value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"The body is nested more than {MAX_DEPTH} deep.", reason="nesting")
    if isinstance(value, dict):
        for name, item in value.items():
            _judge(name, depth + 1)
            _judge(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _judge(item, depth + 1)
    elif isinstance(value, str):
        if "\0" in value:
            raise InvalidRequest("The body has a NUL character.", reason="nul")
    elif (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, int) and not -(2**63) <= value < 2**64
    ):
        raise InvalidRequest("The body has a number out of range.", reason="number")


def read_query(request: web.Request) -> MultiDict[str]:
    """The query, decoded as a form: `+` is a space (URL Standard,
    application/x-www-form-urlencoded).

    Raises:
        InvalidRequest: not UTF-8, or more than 32 fields.
    """
    raw = request.raw_path.partition("?")[2]
    try:
        return MultiDict(
            parse_qsl(
                raw, keep_blank_values=True, encoding="utf-8", errors="strict", max_num_fields=32
            )
        )
    except ValueError:
        raise InvalidRequest(
            "The query is not form-encoded UTF-8 of at most 32 fields.", reason="query"
        ) from None


def text_field(body: dict[str, Any], name: str) -> str:
    """A required field: a non-empty string.

    Raises:
        InvalidRequest: missing, null, empty or of another type.
    """
    value = body.get(name)
    if isinstance(value, str) and value:
        return value
    if name not in body:
        raise InvalidRequest(f"{name} is missing.", reason="missing_field")
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is not a string.", reason="field_type")
    raise InvalidRequest(f"{name} is empty.", reason="empty_field")


def optional_text(body: dict[str, Any], name: str) -> str | None:
    """An optional string field. A missing field, null and "" give None.

    Raises:
        InvalidRequest: of another type.
    """
    value = body.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is not a string.", reason="field_type")
    return value
