"""The HTTP server at the level of bytes: what is not HTTP, what comes slowly, what is asked oddly;
logs, metrics, and the end.

These tests send what would reveal a change of the aiohttp internals that `broker.web.server`
overrides.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from broker import __version__
from broker.app import assemble, serve
from broker.embedded import EmbeddedStores
from broker.errors import InternalFault
from broker.telemetry import Log, capture_library_records
from broker.web import Limits
from tests.conftest import Clock, OpenApp, Started, Starter, settings_for
from tests.support.authenticator import Authenticator, Misbehaviour
from tests.support.signals import counted, lines, refused
from tests.support.stall import stalled
from tests.support.waited import soon
from tests.support.wire import ORIGIN, Wire

SECRET = "pbk_" + "S3cret" * 7 + "x"
SDK = Path(__file__).parents[2] / "broker" / "sdk"
SDK_FOLDERS = {  # Cache-Control by folder
    "/sdk": "public, max-age=300",
    f"/sdk/{__version__}": "public, max-age=31536000, immutable",
}


@dataclass(slots=True)
class Line:
    """One connection, spoken to in bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers in lower case, body."""
        async with soon():
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            length = int(headers.get("content-length", 0)) if body else 0
            return int(head[0].split()[1]), headers, await self.reader.readexactly(length)

    async def ends(self) -> bytes:
        """What still comes until the server closes the connection."""
        async with soon():
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


Dial = Callable[[Started], Awaitable[Line]]


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """Open connections; closed at the end of the test."""
    opened: list[Line] = []

    async def connect(broker: Started) -> Line:
        line = Line(*await asyncio.open_connection("127.0.0.1", broker.service.port))
        opened.append(line)
        return line

    yield connect
    for line in opened:
        line.writer.close()


Limited = Callable[..., Awaitable[Started]]


@pytest.fixture
async def limited(stores: EmbeddedStores) -> AsyncIterator[Limited]:
    """Start a broker with other limits for slow callers."""
    running: list[Started] = []

    async def start(limits: Limits, **changes: object) -> Started:
        clock, stream = Clock(), StringIO()
        parts = await assemble(settings_for(stores, **changes), log=Log(stream), clock=clock)
        started = Started(await serve(parts, limits=limits), clock, stream)
        running.append(started)
        return started

    yield start
    for started in running:
        await started.service.close()


@pytest.fixture
def library_log(broker: Started) -> Iterator[None]:
    """What libraries log goes to the broker's log too, as in a running process."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    capture_library_records(broker.parts.log)
    yield
    root.handlers = handlers
    root.setLevel(level)


def request(
    method: str, target: str, *headers: str, body: bytes = b"", version: str = "HTTP/1.1"
) -> bytes:
    """A well-formed request; its length is stated where there is a body."""
    fields = [f"{method} {target} {version}", "Host: passkeys.example", *headers]
    if body:
        fields.append(f"Content-Length: {len(body)}")
    return "\r\n".join(fields).encode("latin-1") + b"\r\n\r\n" + body


# -- what is not HTTP ------------------------------------------------------------------------------

HEAD = f"POST /v1/apps/{SECRET}/users?identifier={SECRET} HTTP/1.1\r\nHost: x\r\n".encode()
KEY = f"Authorization: Bearer {SECRET}".encode()
MALFORMED: dict[str, bytes] = {
    "NUL in the Authorization header": HEAD + KEY + b"\x00\r\n\r\n",
    "a control byte in the Authorization header": HEAD + KEY + b"\x01\r\n\r\n",
    "a control byte in a header's name": HEAD + KEY + b"\r\nX\x02Y: 1\r\n\r\n",
    "a carriage return in a header": HEAD + KEY + b"\rX\r\n\r\n",
    "a header without a colon": HEAD + KEY + b"\r\nnonsense\r\n\r\n",
    "a space before the colon": HEAD + KEY + b"\r\nX : 1\r\n\r\n",
    "a folded header": HEAD + KEY + b"\r\n folded: yes\r\n\r\n",
    "a length that is no number": HEAD + KEY + b"\r\nContent-Length: abc\r\n\r\n",
    "a negative length": HEAD + KEY + b"\r\nContent-Length: -1\r\n\r\n",
    "a length with a plus": HEAD + KEY + b"\r\nContent-Length: +1\r\n\r\nx",
    "two lengths": HEAD + KEY + b"\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    "a length and chunks": HEAD
    + KEY
    + b"\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks that are not last": HEAD
    + KEY
    + b"\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "a header of 9,000 bytes": HEAD + KEY + b"\r\nX: " + b"x" * 9_000 + b"\r\n\r\n",
    "a name of 9,000 bytes": HEAD + KEY + b"\r\n" + b"x" * 9_000 + b": 1\r\n\r\n",
    "200 headers": HEAD
    + KEY
    + b"\r\n"
    + b"".join(b"X-%d: 1\r\n" % n for n in range(200))
    + b"\r\n",
    "a target of 9,000 bytes": b"GET /" + b"x" * 9_000 + SECRET.encode() + b" HTTP/1.1\r\n\r\n",
    "an unknown version": f"GET /{SECRET} HTTP/9.9\r\n\r\n".encode(),
    "an unknown protocol": f"GET /{SECRET} SPDY/1\r\n\r\n".encode(),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SECRET.encode(),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + SECRET.encode() + b"\r\n\r\n",
    "zeros": b"\x00" * 64 + SECRET.encode() + b"\r\n\r\n",
    "a method of nonsense": f"N{SECRET} / HTTP/1.1\r\n\r\n".encode(),
    "a space in the target": f"GET /a {SECRET} HTTP/1.1\r\n\r\n".encode(),
    "a control byte in the target": f"GET /\x01{SECRET} HTTP/1.1\r\n\r\n".encode(),
    "a target with a broken host": f"GET http://[::1/{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "a target with a broken port": (
        f"GET http://x:99999999/{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    ),
}


@pytest.mark.usefixtures("library_log")
@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in MALFORMED.items()])
async def test_what_is_not_http(broker: Started, dial: Dial, data: bytes) -> None:
    """JSON, 400, closed; and not a byte of it in the answer or in any log line."""
    line = await dial(broker)
    with counted(broker, "broker_refusals_total", code="invalid_request", reason="http"):
        await line.send(data)
        status, headers, body = await line.answer()
        rest = await line.ends()
    assert (status, headers["content-type"], rest) == (400, "application/json", b"")
    assert json.loads(body) == {
        "code": "invalid_request",
        "error": "The request is not well-formed HTTP/1.1.",
    }
    assert SECRET not in str((headers, body))
    assert headers["x-request-id"]
    told = [entry for entry in broker.log if entry["event"] == "malformed_request"]
    assert [(entry["status"], entry["request_id"]) for entry in told] == [
        (400, headers["x-request-id"])
    ]
    assert SECRET[:12] not in broker.stream.getvalue()
    assert len(broker.log) == 1


@pytest.mark.usefixtures("library_log")
@pytest.mark.parametrize(
    "chunks",
    [
        f"{SECRET}\r\n",
        f"-1\r\n{SECRET}\r\n",
        f"5\r\n{SECRET}\r\n0\r\n\r\n",
        "fffffffffffffffff\r\n",
    ],
)
async def test_broken_chunks(broker: Started, wire: Wire, dial: Dial, chunks: str) -> None:
    line = await dial(broker)
    head = request(
        "POST",
        f"/v1/apps/{wire.app_id}/transactions/authenticate",
        f"Authorization: Bearer {wire.key}",
        "Transfer-Encoding: chunked",
    )
    await line.send(head + chunks.encode())
    status, headers, body = await line.answer()
    assert (status, json.loads(body)["code"]) == (400, "invalid_request")
    assert SECRET not in str((headers, body)) + broker.stream.getvalue()
    assert broker.metric(
        "broker_refusals_total", code="invalid_request", reason="framing"
    ) + broker.metric("broker_refusals_total", code="invalid_request", reason="http")


@pytest.mark.usefixtures("library_log")
@pytest.mark.parametrize("before", [b"", b'c\r\n{"external_i\r\n'])
async def test_chunks_that_break_later(
    broker: Started, wire: Wire, dial: Dial, before: bytes
) -> None:
    """The head is here and its handler waits for the body: it is told at once, and there is one
    answer.
    """
    line = await dial(broker)
    target, key = (
        f"/v1/apps/{wire.app_id}/transactions/register",
        f"Authorization: Bearer {wire.key}",
    )
    await line.send(
        request("POST", target, key, "Expect: 100-continue", "Transfer-Encoding: chunked") + before
    )
    assert (await line.answer())[0] == 100
    with refused(broker, "invalid_request", "framing"):
        await line.send(f"{SECRET}\r\n".encode() + request("GET", "/health/live"))
        status, _, body = await line.answer()
    assert (status, json.loads(body)["code"]) == (400, "invalid_request")
    assert await line.ends() == b""
    assert len(broker.log) == 1
    assert SECRET not in broker.stream.getvalue()


async def logged(broker: Started, **values: object) -> dict[str, Any]:
    """The request line with these values, as soon as it is there."""
    async with soon():
        while True:
            if found := lines(broker, **values):
                return found[0]
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("library_log")
@pytest.mark.parametrize("how", ["close", "abort", "half"])
async def test_a_caller_who_goes_away(broker: Started, wire: Wire, dial: Dial, how: str) -> None:
    """In the middle of the body: no defect of ours, so no line and no metric that would wake an
    operator.
    """
    line = await dial(broker)
    target, key = (
        f"/v1/apps/{wire.app_id}/transactions/register",
        f"Authorization: Bearer {wire.key}",
    )
    await line.send(request("POST", target, key, "Expect: 100-continue", "Content-Length: 50"))
    assert (await line.answer())[0] == 100
    await line.send(b"{")
    if how == "close":
        line.writer.close()
    elif how == "abort":
        line.writer.transport.abort()
    else:
        line.writer.write_eof()
    entry = await logged(broker, reason="disconnected")
    assert (entry["status"], entry["code"]) == (400, "invalid_request")
    assert [e["event"] for e in broker.log] == ["request"]
    assert (await wire.send("GET", broker.url + "/health/live")).status == 200


async def test_a_caller_who_does_not_wait_for_the_answer(
    broker: Started, wire: Wire, dial: Dial
) -> None:
    """What was asked is done all the same: a change is never half made."""
    line = await dial(broker)
    target, key = (
        f"/v1/apps/{wire.app_id}/transactions/register",
        f"Authorization: Bearer {wire.key}",
    )
    async with stalled(broker, "users") as stall:
        await line.send(
            request("POST", target, key, body=b'{"external_id":"ann","passkey_display_name":"Ann"}')
        )
        await stall.waiting(1)
        line.writer.transport.abort()
    await logged(broker, status=201)
    assert (await wire.keyed("GET", "/users?identifier=ann")).json["total_users"] == 1


# -- what comes slowly -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health/live HT", b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: "]
)
async def test_a_head_that_does_not_end(limited: Limited, dial: Dial, sent: bytes) -> None:
    """Also of the second request on a connection."""
    broker = await limited(Limits(head=0.2, idle=60))
    first = await dial(broker)
    await first.send(sent)
    assert await first.ends() == b""
    second = await dial(broker)
    await second.send(request("GET", "/health/live"))
    assert (await second.answer())[0] == 200
    await second.send(sent or b"G")
    assert await second.ends() == b""
    assert len(lines(broker)) == 1


async def test_a_head_that_trickles(limited: Limited, dial: Dial) -> None:
    """Each byte is in time, the whole is not."""
    broker = await limited(Limits(head=0.3))
    line = await dial(broker)
    ended = asyncio.create_task(line.ends())
    for byte in request("GET", "/health/live", "X: " + "x" * 4_000):
        if ended.done():
            break
        line.writer.write(bytes([byte]))
        await asyncio.sleep(0.01)
    assert ended.done()
    assert await ended == b""
    assert lines(broker) == []


async def test_a_quiet_connection_is_not_a_slow_head(limited: Limited, dial: Dial) -> None:
    """The head's limit begins with its first byte; a connection may be idle for longer."""
    broker = await limited(Limits(head=0.1, idle=60))
    line = await dial(broker)
    for _ in range(3):
        await line.send(request("GET", "/health/live"))
        assert (await line.answer())[0] == 200
        await asyncio.sleep(0.2)
    assert len(lines(broker, status=200)) == 3


async def test_an_idle_connection_ends(limited: Limited, dial: Dial) -> None:
    broker = await limited(Limits(idle=0.2))
    line = await dial(broker)
    await line.send(request("GET", "/health/live"))
    assert (await line.answer())[0] == 200
    assert await line.ends() == b""


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
async def test_a_body_that_does_not_end(
    limited: Limited, dial: Dial, wire: Wire, framing: str
) -> None:
    broker = await limited(Limits(body=0.2))
    line = await dial(broker)
    target = f"/v1/apps/{wire.app_id}/transactions/register"
    with refused(broker, "request_timeout", "request_timeout"):
        await line.send(request("POST", target, f"Authorization: Bearer {wire.key}", framing))
        await line.send(b'5\r\n{"ext' if "chunked" in framing else b'{"ext')
        status, headers, body = await line.answer()
    assert (status, json.loads(body)["code"]) == (408, "request_timeout")
    assert headers["connection"] == "close"
    assert await line.ends() == b""


async def test_a_slow_body_without_a_key_is_not_waited_for(
    limited: Limited, dial: Dial, wire: Wire
) -> None:
    broker = await limited(Limits(body=60))
    line = await dial(broker)
    with refused(broker, "invalid_access_token", "key_missing"):
        await line.send(
            request("POST", f"/v1/apps/{wire.app_id}/transactions/register", "Content-Length: 9")
        )
        assert (await line.answer())[0] == 401


# -- what is asked oddly ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", ["gzip", "br", "deflate", "GZIP", "identity, gzip", "nonsense"]
)
async def test_a_compressed_body(broker: Started, wire: Wire, encoding: str) -> None:
    """Refused unread: a small body that unpacks to a large one costs nothing."""
    headers = {"Content-Encoding": encoding, "Authorization": f"Bearer {wire.key}"}
    with refused(broker, "unsupported_media_type", "unsupported_media_type"):
        answer = await wire.send(
            "POST", "/transactions/register", data=b"\x1f\x8b\x08", headers=headers
        )
    assert (answer.status, answer.code) == (415, "unsupported_media_type")
    headers["Content-Encoding"] = "identity"
    body = {"external_id": "ann", "passkey_display_name": "Ann"}
    assert (
        await wire.send("POST", "/transactions/register", json=body, headers=headers)
    ).status == 201


async def test_expectations(broker: Started, wire: Wire, dial: Dial) -> None:
    """100-continue is met; anything else is refused without saying it back."""
    line = await dial(broker)
    target, key = (
        f"/v1/apps/{wire.app_id}/transactions/register",
        f"Authorization: Bearer {wire.key}",
    )
    body = b'{"external_id":"ann","passkey_display_name":"Ann"}'
    await line.send(
        request("POST", target, key, "Expect: 100-continue", f"Content-Length: {len(body)}")
    )
    assert (await line.answer())[0] == 100
    await line.send(body)
    assert (await line.answer())[0] == 201
    with refused(broker, "invalid_request", "http_417"):
        await line.send(request("POST", target, key, f"Expect: {SECRET}", body=body))
        status, headers, answer = await line.answer()
    assert (status, json.loads(answer)["code"]) == (400, "invalid_request")
    assert SECRET not in str((headers, answer)) + broker.stream.getvalue()


async def test_connect_and_http_0_9_find_nothing(broker: Started, dial: Dial) -> None:
    for data in (
        b"CONNECT /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET /{SECRET}\r\n\r\n".encode(),
    ):
        line = await dial(broker)
        with refused(broker, "not_found", "not_found"):
            await line.send(data)
            assert (await line.answer())[0] == 404
    assert SECRET not in broker.stream.getvalue()


async def test_http_1_0(broker: Started, dial: Dial) -> None:
    line = await dial(broker)
    await line.send(request("GET", "/health/live", version="HTTP/1.0"))
    assert (await line.answer())[0] == 200
    assert await line.ends() == b""
    assert lines(broker, route="/health/live", status=200)


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.0", "nonsense"])
async def test_an_offer_to_upgrade_is_ignored(
    broker: Started, wire: Wire, dial: Dial, upgrade: str
) -> None:
    """Some clients offer h2c with every request, also with one that has a body; the connection goes
    on as it is.
    """
    line = await dial(broker)
    body = b'{"external_id":"ann","passkey_display_name":"Ann"}'
    for _ in range(2):
        await line.send(
            request(
                "POST",
                f"/v1/apps/{wire.app_id}/transactions/register",
                f"Authorization: Bearer {wire.key}",
                "Connection: Upgrade, HTTP2-Settings",
                f"Upgrade: {upgrade}",
                "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAABkAAQBAAAAAAUAAEAA",
                body=body,
            )
        )
        status, _, answer = await line.answer()
        assert (status, set(json.loads(answer))) == (201, {"transaction_id"})
    assert len(lines(broker, status=201)) == 2


async def test_pipelined_requests_are_answered_in_order(
    broker: Started, wire: Wire, dial: Dial
) -> None:
    line = await dial(broker)
    key = f"Authorization: Bearer {wire.key}"
    app = f"/v1/apps/{wire.app_id}"
    body = b'{"external_id":"ann","passkey_display_name":"Ann"}'
    batch = [
        request("POST", f"{app}/transactions/register", key, body=body),
        request("GET", f"{app}/users?limit=1", key),
        request("GET", "/nothing"),
        request("POST", f"{app}/transactions/register", key, body=b"{"),
        request("GET", "/health/live"),
    ]
    await line.send(b"".join(batch))
    assert [(await line.answer())[0] for _ in batch] == [201, 200, 404, 400, 200]
    await line.send(b"nonsense\r\n\r\n" + batch[4])
    assert (await line.answer())[0] == 400
    assert await line.ends() == b"", "what follows nonsense is not read"


@pytest.mark.parametrize(
    ("method", "status", "allow"),
    [
        ("PUT", 405, "GET,HEAD"),
        ("POST", 405, "GET,HEAD"),
        ("TRACE", 405, "GET,HEAD"),
        ("PROPFIND", 405, "GET,HEAD"),
        ("OPTIONS", 405, "GET,HEAD"),
    ],
)
async def test_other_methods(
    broker: Started, dial: Dial, method: str, status: int, allow: str
) -> None:
    line = await dial(broker)
    with refused(broker, "method_not_allowed", "method_not_allowed"):
        await line.send(request(method, "/health/live"))
        got, headers, body = await line.answer()
    assert (got, headers["allow"]) == (status, allow.lower())
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["code"] == "method_not_allowed"
    known = method in ("PUT", "POST", "OPTIONS")
    assert lines(broker, status=405, method=method if known else "other", route="unmatched")


@pytest.mark.parametrize(
    "path",
    [
        "/health/live",
        "/health/ready",
        *(f"{folder}/passkey.{kind}" for folder in SDK_FOLDERS for kind in ("js", "d.ts")),
    ],
)
async def test_head_is_get_without_a_body(broker: Started, dial: Dial, path: str) -> None:
    """RFC 9110 §9.3.2 "The HEAD method is identical to GET except that the server MUST NOT send
    content in the response".
    """
    line = await dial(broker)
    answers = []
    for method in ("GET", "HEAD", "GET"):
        await line.send(request(method, path))
        status, headers, body = await line.answer(body=method == "GET")
        answers.append(
            (status, {k: v for k, v in headers.items() if k not in ("date", "x-request-id")})
        )
        assert (len(body) > 0) == (method == "GET")
    assert answers[0] == answers[1] == answers[2], (
        "with the same headers, and the connection goes on"
    )
    assert answers[0][0] == 200
    assert [(e["method"], e["status"]) for e in lines(broker, route=path)] == [
        ("GET", 200),
        ("HEAD", 200),
        ("GET", 200),
    ]


async def test_head_of_what_is_not_ready_is_503(start_broker: Starter, dial: Dial) -> None:
    broker = await start_broker(redis_url="unix:///nonexistent")
    line = await dial(broker)
    await line.send(request("HEAD", "/health/ready"))
    status, headers, _ = await line.answer(body=False)
    assert (status, headers["retry-after"]) == (503, "1")
    assert lines(broker, method="HEAD", status=503, route="/health/ready")


TARGETS = [
    "/",
    "//",
    "/%",
    "/%zz",
    "/%00",
    "/%ff%fe",
    "/v1/apps/%00/users",
    "/v1/apps/%ff",
    "/v1/apps/%C0%AF",
    "/v1/apps/..%2f..%2fetc",
    "/v1/apps/../health/live",
    "/v1/apps/{APP}/users/%00",
    "/v1/apps/{APP}/users/%ff/devices",
    "/v1/apps/{APP}/users/a%2fb",
    "/v1/apps/{APP}/users/%E2%80%AE",
    "/v1/apps/{APP}//users",
    "/v1/apps/{APP}%20",
    "/v1/apps/{APP}%0d%0aX:y",
    "/v1/apps/\xff\xfe",
    "/\xc3\xa9?\xff",
    "/v1/apps/{APP}/users?identifier=%ff",
    "/v1/apps/{APP}/users?identifier=%00",
    "/v1/apps/{APP}/users?identifier=%ED%A0%80",
    "/v1/apps/{APP}/users?limit=%F0",
    "/sdk/../../etc/passwd",
    "/sdk/%2e%2e/client.py",
    "/health/live%00",
    "/health/live/",
    "http://elsewhere.example/v1/apps/{APP}/nothing",
    "*",
]


async def test_odd_targets_are_never_a_500(broker: Started, wire: Wire, dial: Dial) -> None:
    for method in ("GET", "POST", "OPTIONS", "DELETE"):
        for target in TARGETS:
            line = await dial(broker)
            await line.send(
                request(
                    method,
                    target.replace("{APP}", wire.app_id),
                    f"Authorization: Bearer {wire.key}",
                )
            )
            status, headers, body = await line.answer()
            assert 400 <= status < 500, (method, target, body)
            assert set(json.loads(body)) == {"code", "error"}
            assert "passwd" not in str(headers)
    assert not lines(broker, status=500)
    assert [entry for entry in broker.log if entry["event"] == "defect"] == []


@pytest.mark.parametrize(
    "target", ["/nothing", "/v1", "/v1/nothing", "/demo/", "/index.html", "/.env"]
)
async def test_unknown_paths(broker: Started, wire: Wire, target: str) -> None:
    with refused(broker, "not_found", "not_found"):
        answer = await wire.send("GET", broker.url + target)
    assert (answer.status, answer.code) == (404, "not_found")
    assert lines(broker, status=404, route="unmatched")


# -- request ids and the log -----------------------------------------------------------------------


@pytest.mark.parametrize("given", ["12345678", "req-7.f_A" * 7, "0af7651916cd43dd8448eb211c80319c"])
async def test_a_well_formed_request_id_is_taken(broker: Started, wire: Wire, given: str) -> None:
    headers = {"X-Request-Id": given, "Authorization": f"Bearer {wire.key}"}
    body = {"external_id": "ann", "passkey_display_name": "Ann"}
    answer = await wire.send("POST", "/transactions/register", json=body, headers=headers)
    assert {k.lower(): v for k, v in answer.headers.items()}["x-request-id"] == given
    assert lines(broker, request_id=given, status=201)
    events = await broker.parts.directory.events(wire.app_id, limit=10)
    created = [event for event in events if event.action == "user.created"]
    assert [(event.request_id, event.actor[:4]) for event in created] == [(given, "key:")]


@pytest.mark.parametrize(
    "given",
    [
        "",
        "short",
        "x" * 65,
        "with space",
        "semi;colon",
        "quote\"'",
        "é" * 9,
        SECRET,
        "pbn_" + "a" * 43,
    ],
)
async def test_another_request_id_is_made(broker: Started, wire: Wire, given: str) -> None:
    """Also where somebody uses one of our tokens as the id: it would go to logs and events."""
    for status, path in ((404, "/nothing"), (200, "")):
        answer = await wire.send("GET", path, headers={"X-Request-Id": given})
        made = {k.lower(): v for k, v in answer.headers.items()}["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{24}", made)
        assert lines(broker, request_id=made, status=status)
    assert not given or given not in broker.stream.getvalue()


async def test_one_log_line_a_request(broker: Started, wire: Wire, device: Authenticator) -> None:
    """With route template, status, duration and app; nothing else but ids of ours and the words of
    a refusal.
    """
    await wire.user("ann", device)
    await wire.authenticate(None, device)
    await wire.send("GET", "/nothing")
    await wire.keyed("GET", "/users/nobody")
    await wire.page("/authenticate/transactions/webauthn/start", data=b"{")
    app = "/v1/apps/{app_id}"
    assert [(e["event"], e["method"], e["route"], e["status"], e["app"]) for e in broker.log] == [
        ("request", "POST", app + "/transactions/register", 201, wire.app_id),
        ("request", "POST", app + "/register/transactions/webauthn/start", 200, wire.app_id),
        ("request", "POST", app + "/register/transactions/webauthn/finish", 200, wire.app_id),
        ("request", "POST", app + "/authenticate/verify", 200, wire.app_id),
        ("request", "POST", app + "/authenticate/transactions/webauthn/start", 200, wire.app_id),
        ("request", "POST", app + "/authenticate/transactions/webauthn/finish", 200, wire.app_id),
        ("request", "GET", "unmatched", 404, None),
        ("request", "GET", app + "/users/{user_id}", 404, wire.app_id),
        ("request", "POST", app + "/authenticate/transactions/webauthn/start", 400, wire.app_id),
    ]
    keys = {"at", "level", "event", "method", "route", "status", "ms", "app", "request_id"}
    for entry in broker.log:
        assert set(entry) == keys | ({"code", "reason"} if entry["status"] >= 400 else set())
        assert entry["ms"] >= 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["at"])


@pytest.mark.usefixtures("library_log")
async def test_nothing_of_a_caller_reaches_the_log(
    broker: Started, wire: Wire, open_app: OpenApp, dial: Dial
) -> None:
    """Everything once, right and wrong; then the whole log is searched for all that was sent and
    all that was answered.
    """
    device, stranger = Authenticator(), Authenticator()
    external, name = "ann.external-4711@example.org", "Ann's secret display name"
    said: set[str] = {
        wire.key,
        external,
        name,
        "passkeys.invalid",
        "evil-query",
        "evil-path",
        "evil-agent",
    }
    said.add("evil query")

    def remember(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                remember(inner)
        elif isinstance(value, list):
            for inner in value:
                remember(inner)
        elif isinstance(value, str) and len(value) >= 20:
            said.add(value)

    async def post(
        path: str, body: dict[str, Any], *, key: str | None = None, at: Wire = wire
    ) -> Any:
        headers = {
            "Origin": ORIGIN,
            "User-Agent": "evil-agent",
            "Passage-Flex-Version": "evil-agent",
        }
        if key:
            headers["Authorization"] = f"Bearer {key}"
        answer = await at.send("POST", path, json=body, headers=headers)
        remember(body)
        remember({k: v for k, v in answer.json.items() if k not in ("error", "code")})
        return answer.json

    fields = {"external_id": external, "passkey_display_name": name}
    for how in (Misbehaviour(), Misbehaviour(uv=False), Misbehaviour(challenge="x")):
        opened = await post("/transactions/register", fields, key=wire.key)
        begun = await post("/register/transactions/webauthn/start", opened)
        answer = Authenticator().register(
            begun["handshake"]["challenge"]["publicKey"], ORIGIN, **how
        )
        body = {"handshake_id": begun["handshake"]["id"], "handshake_response": answer, **opened}
        finished = await post("/register/transactions/webauthn/finish", body)
        await post("/register/transactions/webauthn/finish", body)
        nonce = finished.get("nonce", "pbn_" + "z" * 43)
        await post("/authenticate/verify", {"nonce": nonce}, key=wire.key)
        await post("/authenticate/verify", {"nonce": nonce, "external_id": external}, key=wire.key)
        await post("/authenticate/verify", {"nonce": nonce}, key="pbk_" + "y" * 43)
    await wire.user(external, device)
    elsewhere = await open_app()
    await elsewhere.user(external, stranger)
    for maker, how in (
        (device, Misbehaviour()),
        (device, Misbehaviour(signature=b"no")),
        (stranger, Misbehaviour()),
    ):
        for opened in (
            {},
            await post("/transactions/authenticate", {"external_id": external}, key=wire.key),
        ):
            begun = await post("/authenticate/transactions/webauthn/start", opened)
            options = begun["handshake"]["challenge"]["publicKey"]
            options.pop("allowCredentials", None)
            made = maker.authenticate(options, ORIGIN, **how)
            body = {"handshake_id": begun["handshake"]["id"], "handshake_response": made, **opened}
            await post("/authenticate/transactions/webauthn/finish", body)
            await post("/authenticate/transactions/webauthn/finish", body, at=elsewhere)
    users = await wire.keyed("GET", f"/users?identifier={external}&evil-query=1")
    user = users.json["users"][0]["id"]
    remember((await wire.keyed("GET", f"/users/{user}")).json)
    await wire.keyed("GET", "/users?limit=evil-query")
    await wire.keyed("DELETE", f"/users/{user}/devices/evil-path")
    await wire.send("GET", "/evil-path?evil-query", headers={"Origin": "https://passkeys.invalid"})
    for origin in (
        "https://passkeys.invalid",
        "https://passkeys.invalid/evil-path",
        "https://evil query",
    ):
        await wire.page("/authenticate/transactions/webauthn/start", {}, origin=origin)
    await wire.page("/authenticate/transactions/webauthn/start", data=b'{"evil-query')
    line = await dial(broker)
    await line.send(
        f"GET /evil-path HTTP/1.1\r\nAuthorization: Bearer {wire.key}\x00\r\n\r\n".encode()
    )
    await line.ends()

    said -= {ORIGIN}
    tokens = {value for value in said if re.match(r"pb[tnhk]_", value)}
    assert len(tokens) > 15
    notices = [entry for entry in broker.log if entry["event"] == "origin_refused"]
    assert [entry["origin"] for entry in notices] == ["https://passkeys.invalid", "malformed"]
    # The one thing that callers put into the log: an origin, in the form that browsers write.
    log = "\n".join(
        line for line in broker.stream.getvalue().splitlines() if '"origin_refused"' not in line
    )
    assert len(broker.log) > 40
    shown = {value for value in said if value in log}
    assert shown == {wire.app_id, user} & said, "ids of ours, and nothing that a caller can use"
    naming = {entry["event"] for entry in broker.log if user in entry.values()}
    assert naming == {"nonce_replayed"}
    assert ORIGIN not in log
    for value in tokens:
        assert value[4:20] not in log


# -- metrics and health ----------------------------------------------------------------------------

METRICS = [
    "broker_ceremonies_total",
    "broker_refusals_total",
    "broker_redemptions_total",
    "broker_redemption_age_fraction",
    "broker_store_seconds",
    "broker_store_failures_total",
    "broker_redis_failures_total",
    "broker_request_seconds",
    "broker_events_lost_total",
]


async def test_metrics(
    start_broker: Starter, session: ClientSession, device: Authenticator
) -> None:
    """Every metric is there from the start; labels are words of ours, so their number is
    bounded.
    """
    broker = await start_broker(metrics="public")
    wire = await Wire.open(broker.service, session)
    answer = await wire.send("GET", broker.url + "/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = set(re.findall(r"^# TYPE (\S+) ", answer.body.decode(), re.M))
    assert set(METRICS) <= families
    await wire.user("ann", device)
    await wire.authenticate(None, device)
    await wire.send("GET", "/x1")
    await wire.send("GET", "/x2")
    text = (await wire.send("GET", broker.url + "/metrics")).body.decode()
    labels = dict.fromkeys(re.findall(r'(\w+)="([^"]*)"', text))
    for name, value in labels:
        assert name in (
            "le",
            "kind",
            "step",
            "result",
            "code",
            "reason",
            "store",
            "operation",
            "route",
            "status",
            "cache",
            "queue",
            "state",
            "generation",
            "version",
            "python",
        )
        assert len(value) < 80
    assert wire.app_id not in text
    assert "ann" not in {value for _, value in labels}
    assert 'broker_ceremonies_total{kind="discoverable",result="ok",step="finish"} 1.0' in text
    assert 'broker_request_seconds_count{route="unmatched",status="404"} 2.0' in text


async def test_health(broker: Started, wire: Wire) -> None:
    for path, word in (("/health/live", "live"), ("/health/ready", "ready")):
        answer = await wire.send("GET", broker.url + path)
        assert (answer.status, answer.json) == (200, {"status": word})
        assert answer.headers["Cache-Control"] == "no-store"
    assert broker.metric("broker_store_seconds_count", store="postgres", operation="check") == 1
    assert broker.metric("broker_store_seconds_count", store="redis", operation="check") == 1


async def test_the_browser_side_is_served(broker: Started, wire: Wire) -> None:
    for name, kind in (
        ("passkey.js", "text/javascript"),
        ("passkey.d.ts", "application/typescript"),
    ):
        content = (SDK / name).read_bytes()
        for folder, caching in SDK_FOLDERS.items():
            answer = await wire.send("GET", f"{broker.url}{folder}/{name}")
            assert (answer.status, answer.body) == (200, content)
            assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
            assert answer.headers["Cache-Control"] == caching
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert lines(broker, status=200, route=f"{folder}/{name}")


async def test_the_browser_side_of_another_version_is_not_served(
    broker: Started, wire: Wire
) -> None:
    """A page that names it would get other bytes than it expects, and keep them for a year."""
    for version in ("0.0.1", "latest", __version__ + ".0", "%30.1.0x"):
        answer = await wire.send("GET", f"{broker.url}/sdk/{version}/passkey.js")
        assert (answer.status, answer.code) == (404, "not_found")
    assert len(lines(broker, status=404, route="unmatched")) == 4


# -- the end ---------------------------------------------------------------------------------------


async def refuses_connections(broker: Started) -> None:
    """Return when nobody listens any more. Who connects in the moment of the end makes asyncio's
    own server stumble, from Python 3.13 on; so the address is asked for instead, which is free when
    nobody listens on it."""
    address = "127.0.0.1", broker.service.port
    async with soon():
        while True:
            with socket.socket() as own, contextlib.suppress(OSError):
                own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                own.bind(address)
                break
            await asyncio.sleep(0.005)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)


async def test_close_finishes_what_runs_and_refuses_what_is_new(
    broker: Started, wire: Wire, dial: Dial
) -> None:
    idle = await dial(broker)
    await idle.send(request("GET", "/health/live"))
    await idle.answer()
    running = await dial(broker)
    async with stalled(broker, "users") as stall:
        await running.send(
            request(
                "POST",
                f"/v1/apps/{wire.app_id}/transactions/register",
                f"Authorization: Bearer {wire.key}",
                body=b'{"external_id":"ann","passkey_display_name":"Ann"}',
            )
        )
        await stall.waiting(1)
        closing = asyncio.create_task(broker.service.close())
        await refuses_connections(broker)
        assert await idle.ends() == b""
        assert not closing.done()
    status, _, body = await running.answer()
    assert (status, set(json.loads(body))) == (201, {"transaction_id"})
    assert await running.ends() == b""
    async with soon():
        await closing
    assert lines(broker, status=201)


async def test_close_lets_a_body_arrive(broker: Started, wire: Wire, dial: Dial) -> None:
    """A request whose head was here before the end may send the rest of its body."""
    body = b'{"external_id":"ann","passkey_display_name":"Ann"}'
    head = request(
        "POST",
        f"/v1/apps/{wire.app_id}/transactions/register",
        f"Authorization: Bearer {wire.key}",
        "Expect: 100-continue",
        f"Content-Length: {len(body)}",
    )
    running = await dial(broker)
    await running.send(head)
    assert (await running.answer())[0] == 100
    await running.send(body[:10])
    closing = asyncio.create_task(broker.service.close())
    await refuses_connections(broker)
    await running.send(body[10:])
    assert (await running.answer())[0] == 201
    async with soon():
        await closing
    assert lines(broker, status=201)


async def test_close_waits_no_longer_than_the_drain_limit(
    start_broker: Starter, wire: Wire, dial: Dial
) -> None:
    broker = await start_broker(drain_seconds=0.2)
    line = await dial(broker)
    target = f"/v1/apps/{wire.app_id}/transactions/register"
    await line.send(
        request(
            "POST",
            target,
            f"Authorization: Bearer {wire.key}",
            "Expect: 100-continue",
            "Content-Length: 50",
        )
    )
    assert (await line.answer())[0] == 100
    async with soon():
        await broker.service.close()
    assert b"HTTP/1.1 2" not in await line.ends()


async def test_a_defect_of_ours_is_a_500_without_a_word_of_it(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """A stored policy that no code of ours writes: the answer says nothing of it, the log says what
    kind of defect and where.
    """
    async with stalled(broker, "relying_parties") as stall:
        await stall.connection.execute(
            "UPDATE relying_parties SET policy = $2::jsonb WHERE id = $1",
            wire.app_id,
            json.dumps({"ceremony_life": SECRET}),
        )
    with refused(broker, "internal_server_error", "internal_server_error"):
        answer = await wire.page("/authenticate/transactions/webauthn/start", {})
    assert (answer.status, answer.json) == (
        500,
        {"code": "internal_server_error", "error": InternalFault.default},
    )
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    defect = next(entry for entry in broker.log if entry["event"] == "defect")
    assert (defect["level"], defect["error"]) == ("error", "TypeError")
    assert "begin_authentication" in defect["trace"]
    assert SECRET not in broker.stream.getvalue()
