"""The HTTP fast path (`broker.web.fast_path`) at the level of bytes.

Most tests serve a small application of handlers that a test holds and lets go (`Place`), behind the
real edge; what stores have to do with it is asked of the whole broker.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.http import HttpRequestParser
from aiohttp.typedefs import Handler

from broker.dialects.flex import routes as flex
from broker.errors import NotFound
from broker.telemetry import Log, Metrics, capture_library_records
from broker.web import LIMITS, Edge, Limits, Listener, json_answer, listen
from broker.web.answer import Answer, as_response
from broker.web.body import MAX_BODY, SPARE_CONNECTIONS, read_bytes
from broker.web.fast_path import Connection, Server
from broker.web.server import bind
from tests.conftest import Started
from tests.support.authenticator import Authenticator
from tests.support.servers import eventually
from tests.support.signals import lines
from tests.support.stall import stalled
from tests.support.waited import soon
from tests.support.wire import Wire
from tests.web.test_server import Line, request

LARGE = 8_000_000  # bytes, more than the sockets of a connection hold
SOON = 0.2  # seconds, of limits that a test waits for


def answering() -> list[asyncio.Task[Any]]:
    """The tasks of connections."""
    return [
        task for task in asyncio.all_tasks() if _name(task) == Connection._answer_each.__qualname__
    ]


def _name(task: asyncio.Task[Any]) -> str:
    return str(getattr(task.get_coro(), "__qualname__", ""))


@dataclass
class Place:
    """A server of few routes. `/held` waits for `release`; `entered` counts who came there, `left`
    who got to its end.
    """

    stream: StringIO = field(default_factory=StringIO)
    metrics: Metrics = field(default_factory=Metrics)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    entered: int = 0
    left: int = 0

    def application(self, limits: Limits) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app[LIMITS] = limits
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/plain", self.plain),
            ("GET", "/text", self.text),
            ("GET", "/large", self.large),
            ("GET", "/health/live", self.plain),
        ]
        routes += [
            ("POST", "/echo", self.echo),
            ("POST", "/held", self.held),
            ("GET", "/defect", self.defect),
        ]
        routes += [("GET", "/refused", self.refused), ("POST", "/unread", self.plain)]
        for method, path, handler in routes:
            app.router.add_route(method, path, handler)
        return app

    async def start(self, limits: Limits, drain_seconds: float) -> None:
        log = Log(self.stream)
        capture_library_records(log)
        app = self.application(limits)
        edge = Edge(app, renderers=[], default=flex.render, metrics=self.metrics, log=log)
        self.listener: Listener = await listen(
            app, bind("127.0.0.1", 0), edge=edge, drain_seconds=drain_seconds
        )

    @property
    def log(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.stream.getvalue().splitlines()]

    @property
    def late_heads(self) -> int:
        """How many the log tells of; the metric must agree."""
        logged = sum(entry["event"] == "late_head" for entry in self.log)
        labels = {"code": "request_timeout", "reason": "head"}
        counted = int(self.metrics.registry.get_sample_value("broker_refusals_total", labels) or 0)
        assert logged == counted
        return counted

    @property
    def faults(self) -> list[dict[str, Any]]:
        """What would wake an operator."""
        return [entry for entry in self.log if entry["event"] in ("defect", "library")]

    @property
    def connections(self) -> list[Connection]:
        """Those that are open."""
        assert isinstance(self.listener.server, Server)
        return list(self.listener.server.connections)

    # -- handlers ----------------------------------------------------------------------------------

    async def plain(self, _: web.Request) -> web.Response:
        return json_answer({"is": "plain"})

    async def text(self, _: web.Request) -> web.Response:
        return web.Response(text="text")

    async def large(self, _: web.Request) -> web.Response:
        return json_answer("x" * LARGE)

    async def refused(self, _: web.Request) -> web.Response:
        raise NotFound

    async def defect(self, _: web.Request) -> web.Response:
        raise KeyError("of ours")

    async def echo(self, request: web.Request) -> web.Response:
        body = await read_bytes(request)
        return json_answer({"length": len(body), "begins": body[:100].decode("latin-1")})

    async def held(self, request: web.Request) -> web.Response:
        self.entered += 1
        await self.release.wait()
        self.left += 1
        return json_answer({"held": (await read_bytes(request)).decode()})

    async def holds(self, number: int) -> None:
        """Return when this many requests have come to `/held`."""
        await eventually(lambda: self.entered >= number, f"{number} requests are held")


Open = Callable[..., Awaitable[Place]]
Dial = Callable[[int], Awaitable[Line]]


@pytest.fixture
async def start() -> AsyncIterator[Open]:
    """Start places; ended, and looked through for what would wake an operator, at the end of the
    test.
    """
    gc.collect()  # what other tests left is told about now
    started: list[Place] = []
    root = logging.getLogger()
    handlers, level = root.handlers, root.level

    async def open_one(limits: Limits | None = None, *, drain_seconds: float = 5.0) -> Place:
        place = Place()
        await place.start(limits or Limits(), drain_seconds)
        started.append(place)
        return place

    yield open_one
    for place in started:
        place.release.set()
        await place.listener.close()
    own = asyncio.current_task()
    await eventually(lambda: asyncio.all_tasks() == {own}, "no task is left")
    root.handlers = handlers
    root.setLevel(level)
    for place in started:
        assert place.faults == []


@pytest.fixture
async def place(start: Open) -> Place:
    return await start()


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """Open connections to a port; closed at the end of the test."""
    opened: list[Line] = []

    async def connect(port: int) -> Line:
        line = Line(*await asyncio.open_connection("127.0.0.1", port))
        opened.append(line)
        return line

    yield connect
    for line in opened:
        line.writer.close()


@pytest.fixture
async def line(place: Place, dial: Dial) -> Line:
    """A connection that was used."""
    return await used(await dial(place.listener.ports[0]))


PLAIN = request("GET", "/plain")


async def used(line: Line) -> Line:
    """After one request."""
    await line.send(PLAIN)
    assert await told(line) == {"is": "plain"}
    return line


async def told(line: Line, status: int = 200) -> Any:
    """The body of the next answer."""
    got, _, body = await line.answer()
    assert got == status, body
    return json.loads(body)


def echo(text: str, *headers: str) -> bytes:
    return request("POST", "/echo", *headers, body=text.encode())


def echoed(text: str) -> dict[str, Any]:
    return {"length": len(text), "begins": text[:100]}


def held(text: str) -> bytes:
    return request("POST", "/held", body=text.encode())


def test_aiohttp_is_held_to_the_minor_release_that_is_tested() -> None:
    """The fast path uses its internals, which may change with any other one."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (declared,) = [part for part in project["dependencies"] if part.startswith("aiohttp")]
    major, minor, _ = version("aiohttp").split(".", 2)
    assert declared == f"aiohttp=={major}.{minor}.*"


# -- several at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 5, 40])
async def test_pipelined_requests_in_one_segment(line: Line, number: int) -> None:
    """Forty are more than aiohttp keeps in its queue."""
    texts = [f"request {n}" for n in range(number)]
    await line.send(b"".join(map(echo, texts)))
    assert [await told(line) for _ in texts] == [echoed(text) for text in texts]
    await line.send(PLAIN)
    assert await told(line) == {"is": "plain"}


async def test_a_flood_of_pipelined_requests_lets_others_have_their_turn(
    place: Place, dial: Dial, line: Line
) -> None:
    """A request of another connection that comes with the flood is answered among its first."""
    other, flood = await used(await dial(place.listener.ports[0])), 1000
    line.writer.write(PLAIN * flood)
    other.writer.write(request("GET", "/text"))
    assert (await other.answer())[0] == 200
    for _ in range(flood):
        await told(line)
    order = [entry["route"] for entry in place.log][2:]
    assert len(order) == flood + 1
    assert order.index("/text") < 10


async def test_requests_that_come_while_one_is_answered(place: Place, line: Line) -> None:
    """They wait for their turn, also where they come one by one, and where one of them needs no
    body.
    """
    await line.send(held("first"))
    await place.holds(1)
    later = [echo("second"), PLAIN, echo("fourth")]
    for data in later:
        await line.send(data)
    protocol = place.connections[0]
    await eventually(lambda: len(protocol._queue) == len(later), "they are queued")
    assert line.reader._buffer == bytearray()  # type: ignore[attr-defined]  # nothing overtook
    place.release.set()
    assert [await told(line) for _ in range(4)] == [
        {"held": "first"},
        echoed("second"),
        {"is": "plain"},
        echoed("fourth"),
    ]
    await used_again(line)


async def used_again(line: Line) -> None:
    """The connection goes on."""
    await line.send(echo("again"))
    assert await told(line) == echoed("again")


def _is_busy(connection: Connection) -> bool:
    return connection._received > connection._answered


def _only_connection() -> Connection:
    (task,) = answering()
    coroutine: Any = task.get_coro()
    protocol = coroutine.cr_frame.f_locals["self"]
    assert isinstance(protocol, Connection)
    return protocol


async def test_a_malformed_request_behind_one_that_is_answered(place: Place, line: Line) -> None:
    await line.send(held("first"))
    await place.holds(1)
    await line.send(b"nonsense\r\n\r\n" + echo("never"))
    await eventually(lambda: len(place.connections[0]._queue) == 1, "it is queued")
    place.release.set()
    assert await told(line) == {"held": "first"}
    assert (await told(line, 400))["code"] == "invalid_request"
    assert await line.ends() == b""
    assert [entry["status"] for entry in place.log] == [200, 200, 400]


async def test_a_malformed_request_behind_a_good_one_in_one_segment(
    place: Place, line: Line
) -> None:
    """aiohttp's parser gives up the segment as a whole: neither is done, and one answer says so."""
    await line.send(echo("first") + b"nonsense\r\n\r\n" + PLAIN)
    assert (await told(line, 400))["code"] == "invalid_request"
    assert await line.ends() == b""
    assert [entry["event"] for entry in place.log] == ["request", "malformed_request"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", ["chunked", "length", "head"])
async def test_an_incomplete_request_behind_a_good_one(
    place: Place, line: Line, kind: str, apart: bool
) -> None:
    """In one segment with it, or while it is answered."""
    if kind == "chunked":
        begin = request("POST", "/echo", "Transfer-Encoding: chunked") + b"3\r\nsec\r\n"
        end = b"3\r\nond\r\n0\r\n\r\n"
    elif kind == "length":
        whole = echo("second")
        begin, end = whole[:-3], whole[-3:]
    else:
        whole = echo("second")
        begin, end = whole[:20], whole[20:]
    if apart:
        await line.send(held("first"))
        await place.holds(1)
        await line.send(begin)
    else:
        await line.send(held("first") + begin)
        await place.holds(1)
    place.release.set()
    assert await told(line) == {"held": "first"}
    await line.send(end)
    assert await told(line) == echoed("second")
    await used_again(line)


async def test_many_bodies_that_come_after_their_heads(line: Line) -> None:
    """They use up no place in aiohttp's queue: two pipelined requests are still both read."""
    whole = echo("x")
    for _ in range(40):
        await line.send(whole[:-1])
        await eventually(lambda: _is_busy(_only_connection()), "its head is here")
        await line.send(whole[-1:])
        assert await told(line) == echoed("x")
    await line.send(PLAIN + PLAIN)
    assert [await told(line) for _ in range(2)] == [{"is": "plain"}] * 2


# -- odd ones --------------------------------------------------------------------------------------

CHUNKED = request("POST", "/echo", "Transfer-Encoding: chunked") + b"3\r\nodd\r\n0\r\n\r\n"
ODD: dict[str, tuple[bytes, int]] = {
    "chunked": (CHUNKED, 200),
    "HTTP/1.0 that keeps alive": (
        request("GET", "/plain", "Connection: keep-alive", version="HTTP/1.0"),
        200,
    ),
    "an offer to upgrade": (echo("odd", "Connection: Upgrade", "Upgrade: websocket"), 200),
    "an offer to upgrade to what nobody knows": (
        echo("odd", "Connection: Upgrade", "Upgrade: h2c"),
        200,
    ),
    "an expectation that is none": (echo("odd", "Expect: "), 200),
    "another expectation": (echo("odd", "Expect: miracles"), 400),
    "an expectation in no letters": (echo("odd", "Expect: \xff"), 400),
    "a compressed body": (echo("odd", "Content-Encoding: gzip"), 415),
    "a body in chunks and compressed": (
        CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Encoding: br\r\n\r\n", 1),
        415,
    ),
    "a refusal": (request("GET", "/refused"), 404),
    "no route": (request("GET", "/nothing"), 404),
    "another method": (request("DELETE", "/plain"), 405),
    "an answer of another kind": (request("GET", "/text"), 200),
    "a body that nobody reads": (request("POST", "/unread", body=b"x" * 1000), 200),
    "a body of a GET": (request("GET", "/plain", body=b"x"), 200),
    "a length of zero": (request("GET", "/plain", "Content-Length: 0"), 200),
    "an absolute target": (request("GET", "http://passkeys.example/plain"), 200),
    "a query": (request("GET", "/plain?a=b"), 200),
}


@pytest.mark.parametrize(
    ("data", "status"), [pytest.param(*value, id=name) for name, value in ODD.items()]
)
async def test_a_request_after_an_odd_one(line: Line, data: bytes, status: int) -> None:
    for _ in range(2):
        await line.send(data)
        got, _, body = await line.answer()
        assert (got, body != b"") == (status, True)
        await used_again(line)


async def test_a_request_after_head(line: Line) -> None:
    await line.send(request("HEAD", "/plain"))
    assert (await line.answer(body=False))[0] == 405
    await used_again(line)


@pytest.mark.parametrize("whole", [False, True])
async def test_a_request_after_one_that_expects(line: Line, whole: bool) -> None:
    """The body comes with the head, or when it was asked for; "Continue" is said either way."""
    data = echo("odd", "Expect: 100-continue")
    await line.send(data if whole else data[:-3])
    assert (await line.answer())[0] == 100
    if not whole:
        await line.send(data[-3:])
    assert await told(line) == echoed("odd")
    await used_again(line)


async def test_an_expectation_without_a_body(line: Line) -> None:
    await line.send(request("GET", "/plain", "Expect: 100-continue"))
    assert (await line.answer())[0] == 100
    assert await told(line) == {"is": "plain"}
    await used_again(line)


@pytest.mark.parametrize(
    "data",
    [
        request("GET", "/plain", "Connection: close"),
        request("GET", "/plain", version="HTTP/1.0"),
        echo("x", "Connection: close"),
    ],
)
async def test_a_request_that_ends_the_connection(line: Line, data: bytes) -> None:
    """It is answered first."""
    await line.send(data)
    assert (await line.answer())[0] == 200
    assert await line.ends() == b""


# -- bodies and answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("size", [MAX_BODY - 1, MAX_BODY, MAX_BODY + 1])
async def test_the_largest_body(line: Line, size: int, apart: bool) -> None:
    """The limit is the same whether the body comes with its head or after it. Above it the
    connection ends with the answer.
    """
    data = echo("x" * size)
    if apart:
        protocol = _only_connection()
        await line.send(data[: -size // 2])
        await eventually(lambda: _is_busy(protocol) or protocol._closing, "its head is here")
        await line.send(data[-size // 2 :])
    else:
        await line.send(data)
    if size <= MAX_BODY:
        assert await told(line) == echoed("x" * size)
        await used_again(line)
    else:
        got, headers, body = await line.answer()
        assert (got, headers["connection"]) == (413, "close")
        assert json.loads(body)["code"] == "request_too_large"
        assert await line.ends() == b""


async def test_a_large_answer_to_a_slow_reader(place: Place, dial: Dial) -> None:
    """It comes whole, and what was asked behind it comes after it."""
    line = await dial(place.listener.ports[0])
    await line.send(request("GET", "/large"))
    await eventually(
        lambda: any(p.writing_paused for p in place.connections), "the peer does not read"
    )
    assert len(answering()) == 1
    await line.send(PLAIN)
    assert await told(line) == "x" * LARGE
    assert await told(line) == {"is": "plain"}
    await used_again(line)


async def test_a_large_answer_to_nobody(start: Open, dial: Dial) -> None:
    """Who never reads is cut off, and the task of the connection ends."""
    place = await start(Limits(body=SOON))
    line = await dial(place.listener.ports[0])
    await line.send(request("GET", "/large"))
    await eventually(
        lambda: any(p.writing_paused for p in place.connections), "the peer does not read"
    )
    await eventually(lambda: not place.connections and not answering(), "the connection is over")


def test_an_answer_is_the_response_that_aiohttp_sends() -> None:
    """Serialized in one step, with headers of its own, or as aiohttp's response: one status line,
    the same headers, the same body.
    """
    more = {"Access-Control-Allow-Origin": "https://example.org", "Vary": "Origin"}
    for status in (200, 201, 404, 503, 599):
        fast, asked_before, asked_after = [Answer(b'{"a":1}', status) for _ in range(3)]
        assert asked_before.headers["Content-Type"] == "application/json"
        for answer in (fast, asked_before, asked_after):
            answer.finish("request-1", more)
        assert asked_before.headers == asked_after.headers
        assert asked_before.headers is not asked_after.headers
        assert asked_before.serialize("today") is None
        theirs = as_response(asked_after)
        assert (theirs.status, theirs.body) == (status, b'{"a":1}')
        fields = {**theirs.headers, "Content-Length": "7", "Date": "today"}
        assert fields["X-Request-Id"] == "request-1"
        whole = fast.serialize("today")
        assert whole is not None
        head, _, body = whole.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        assert first == f"HTTP/1.1 {status} {theirs.reason}"
        assert sorted(lines) == sorted(f"{name}: {value}" for name, value in fields.items())
        assert body == theirs.body


VARYING = (b"Date:", b"X-Request-Id:", b"Connection:")


@pytest.mark.parametrize("path", ["/plain", "/refused", "/nothing", "/text"])
async def test_headers_are_the_same_however_an_answer_is_written(
    place: Place, dial: Dial, path: str
) -> None:
    """Byte for byte, but for those that differ between any two answers."""

    async def raw(data: bytes) -> tuple[bytes, list[bytes], bytes]:
        line = await dial(place.listener.ports[0])
        await line.send(data)
        head = (await line.reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        length = int(next(h for h in head if h.startswith(b"Content-Length:")).split()[1])
        body = await line.reader.readexactly(length)
        assert sorted({h.split(b":")[0] for h in head[1:]}) == sorted(
            h.split(b":")[0] for h in head[1:]
        )
        return (
            head[0].split(b" ", 1)[1],
            sorted(h for h in head[1:] if not h.startswith(VARYING)),
            body,
        )

    at_once = await raw(request("GET", path))
    assert await raw(request("GET", path, version="HTTP/1.0")) == at_once
    assert await raw(request("GET", path, "Connection: close")) == at_once


async def test_a_defect_is_answered(start: Open, dial: Dial) -> None:
    place = await start()
    line = await dial(place.listener.ports[0])
    await line.send(request("GET", "/defect"))
    assert (await told(line, 500))["code"] == "internal_server_error"
    await used_again(line)
    assert [entry["error"] for entry in place.faults] == ["KeyError"]
    place.stream.truncate(0)  # it was expected
    place.stream.seek(0)


# -- time ------------------------------------------------------------------------------------------


async def test_an_idle_connection_ends_and_a_busy_one_does_not(start: Open, dial: Dial) -> None:
    """The idle one's end is the proof that the time was over while the other's request was under
    way; then the other one idles.
    """
    place = await start(Limits(idle=SOON))
    busy, idle = [await used(await dial(place.listener.ports[0])) for _ in range(2)]
    await busy.send(held("x"))
    await place.holds(1)
    assert await idle.ends() == b""
    await eventually(
        lambda: asyncio.get_running_loop().time() > place.connections[0]._idle_since + SOON,
        "its time is over as well",
    )
    place.release.set()
    assert await told(busy) == {"held": "x"}
    assert await busy.ends() == b""


async def test_a_slow_head_on_a_connection_that_was_used(start: Open, dial: Dial) -> None:
    place = await start(Limits(head=SOON, idle=60))
    line = await used(await dial(place.listener.ports[0]))
    await line.send(PLAIN[:10])
    assert await line.ends() == b""
    assert [entry["event"] for entry in place.log] == ["request", "late_head"]
    assert place.late_heads == 1


BEFORE: dict[str, list[bytes]] = {
    "no body": [PLAIN],
    "a length": [echo("x" * 100)],
    "a body that ends with an empty line": [echo("x\r\n\r\n")],
    "chunks": [request("POST", "/echo", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n\r\n"],
    "two": [PLAIN, echo("x")],
    "forty": [echo(f"request {n}") for n in range(40)],
    "an offer to upgrade": [echo("x", "Connection: Upgrade", "Upgrade: websocket")],
}
HEADS = [b"G", PLAIN[:10], PLAIN[:-2], PLAIN[:-1]]


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("pause", ["none", "in the head", "before the head"])
async def test_a_slow_head_behind_whole_requests(
    start: Open,
    dial: Dial,
    before: list[bytes],
    pause: str,
) -> None:
    """Its limit is its own, and not the longer one of an idle connection; what came before it is
    answered.
    """
    place = await start(Limits(head=SOON, idle=60))
    lines = []
    for head in HEADS:
        line = await dial(place.listener.ports[0])
        lines.append(line)
        part = {"none": len(head), "in the head": len(head) // 2, "before the head": 0}[pause]
        await line.send(b"".join(before) + head[:part])
        for _ in before:
            assert (await line.answer())[0] == 200
        await line.send(head[part:])
    for line in lines:
        assert await line.ends() == b""
    assert place.late_heads == len(HEADS)


async def test_a_slow_head_behind_a_request_that_is_under_way(start: Open, dial: Dial) -> None:
    """The request is answered, although the head is late before that; the rest of that head is not
    read any more.
    """
    place = await start(Limits(head=SOON, idle=60))
    line = await used(await dial(place.listener.ports[0]))
    await line.send(held("first") + PLAIN[:10])
    await place.holds(1)
    await eventually(lambda: place.late_heads == 1, "the head is late")
    await line.send(PLAIN[10:])
    place.release.set()
    assert await told(line) == {"held": "first"}
    assert await line.ends() == b""
    assert [entry["route"] for entry in place.log if entry["event"] == "request"] == [
        "/plain",
        "/held",
    ]


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
async def test_an_idle_connection_has_no_slow_head(
    start: Open, dial: Dial, before: list[bytes]
) -> None:
    """However its last request was cut into segments. A head that begins after them is late: then
    the time of theirs would be over, too.
    """
    place = await start(
        Limits(head=2.0, idle=60)
    )  # a busy machine takes its time for forty answers
    data = b"".join(before)
    end = len(data) - len(before[-1]) + before[-1].index(b"\r\n\r\n")
    lines = []
    for cut in (len(data), end, end + 1, end + 3, end + 4, end + 5, len(data) - 2, len(data) - 1):
        line = await dial(place.listener.ports[0])
        lines.append(line)
        await line.send(data[:cut])
        for _ in before[:-1]:
            await line.answer()
        await asyncio.sleep(0)
        await line.send(data[cut:])
        assert (await line.answer())[0] == 200
    late = await dial(place.listener.ports[0])
    await late.send(b"G")
    assert await late.ends() == b""
    for line in lines:
        await line.send(PLAIN)
        assert await told(line) == {"is": "plain"}
    assert place.late_heads == 1


async def test_heads_that_come_one_behind_the_other_have_a_limit_each(
    start: Open, dial: Dial
) -> None:
    """Each ends in the segment in which the next one begins."""
    place = await start(Limits(head=60, idle=60))
    line = await used(await dial(place.listener.ports[0]))
    await line.send(PLAIN[:10])
    for _ in range(3):
        await eventually(
            lambda: place.connections[0]._timers.get("head") is not None, "a head has begun"
        )
        timer = place.connections[0]._timers.get("head")
        await line.send(PLAIN[10:] + PLAIN[:10])
        assert await told(line) == {"is": "plain"}
        again = place.connections[0]._timers.get("head")
        assert timer is not None
        assert timer.cancelled()
        assert again is not None
        assert again.when() > timer.when()
    await line.send(PLAIN[10:])
    assert await told(line) == {"is": "plain"}
    assert place.connections[0]._timers.get("head") is None


async def test_the_first_head_begins_with_its_first_byte(start: Open, dial: Dial) -> None:
    """A connection that says nothing ends as early as a slow head does, and is none."""
    place = await start(Limits(head=SOON, idle=60))
    silent = await dial(place.listener.ports[0])
    assert await silent.ends() == b""
    assert place.log == []
    line = await dial(place.listener.ports[0])
    await eventually(lambda: len(place.connections) == 1, "it is there")
    assert "head" not in place.connections[0]._timers
    sent = asyncio.get_running_loop().time()
    await line.send(b"G")
    await eventually(lambda: "head" in place.connections[0]._timers, "its first byte is there")
    assert place.connections[0]._timers["head"].when() >= sent + SOON
    assert await line.ends() == b""
    assert place.late_heads == 1


async def test_a_slow_body_on_a_connection_that_was_used(start: Open, dial: Dial) -> None:
    place = await start(Limits(body=SOON, idle=60))
    line = await used(await dial(place.listener.ports[0]))
    await line.send(echo("slow")[:-1])
    assert (await told(line, 408))["code"] == "request_timeout"
    assert await line.ends() == b""


# -- what is not HTTP ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["CONNECT", "GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("target", ["", " "])
async def test_a_request_without_a_target(
    place: Place, dial: Dial, method: str, target: str
) -> None:
    """Refused, and the connection ends, also where another request came before."""
    for first in (False, True):
        line = await dial(place.listener.ports[0])
        if first:
            await used(line)
        await line.send(f"{method}{target}\r\nHost: x\r\n\r\n".encode())
        assert (await told(line, 400))["code"] == "invalid_request"
        assert await line.ends() == b""
    assert [entry["status"] for entry in place.log] == [400, 200, 400]


@pytest.mark.parametrize("turns", range(4))
async def test_nonsense_from_a_peer_that_goes_away(place: Place, dial: Dial, turns: int) -> None:
    """Scanners do that; it is nothing to log as a fault. Nor is an expectation that nobody waits to
    be met.
    """
    for data in (b"nonsense\r\n\r\n", echo("x", "Expect: 100-continue"), request("CONNECT", "a:1")):
        for first in (False, True):
            line = await dial(place.listener.ports[0])
            if first:
                await used(line)
            line.writer.write(data)
            for _ in range(turns):
                await asyncio.sleep(0)
            line.writer.transport.abort()
    await eventually(lambda: not place.connections, "all is over")
    assert place.faults == []


# -- who goes away ---------------------------------------------------------------------------------


NO_LINGER = b"\1\0\0\0\0\0\0\0"  # of a socket whose end is a reset


@pytest.mark.parametrize("behind", [b"", PLAIN, PLAIN[:10]])
async def test_a_peer_that_closes(place: Place, line: Line, behind: bytes) -> None:
    """It looks like one that half-closes until an answer is refused. What was asked is done to its
    end; nothing is left and nothing is said.
    """
    await line.send(held("x") + behind)
    await place.holds(1)
    line.writer.close()
    await eventually(lambda: place.connections[0]._ending, "its end is seen")
    assert place.left == 0
    place.release.set()
    await eventually(lambda: not place.connections and not answering(), "all is over")
    gc.collect()  # a task's exception that nobody looked at is told about now
    assert place.left == 1
    assert {entry["event"] for entry in place.log} == {"request"}


@pytest.mark.parametrize("behind", [b"", PLAIN, PLAIN[:10]])
async def test_a_peer_that_goes_away(place: Place, line: Line, behind: bytes) -> None:
    """With a reset. What was asked is done to its end; what was asked behind it is not; nothing is
    left and nothing is said.
    """
    await line.send(held("x"))
    await place.holds(1)
    await line.send(behind)
    line.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    line.writer.transport.abort()
    await eventually(lambda: place.connections[0].transport is None, "the connection is over")
    assert place.left == 0
    place.release.set()
    await eventually(lambda: not answering(), "the task is over")
    gc.collect()  # a task's exception that nobody looked at is told about now
    assert place.left == 1
    assert [entry["route"] for entry in place.log] == ["/plain", "/held"]


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("apart", [False, True])
async def test_a_peer_that_half_closes(
    place: Place,
    dial: Dial,
    before: list[bytes],
    fresh: bool,
    apart: bool,
) -> None:
    """It gets the answers to all that it asked, and then the connection ends."""
    line = await dial(place.listener.ports[0])
    if not fresh:
        await used(line)
    line.writer.write(b"".join(before))
    if apart:
        await eventually(lambda: place.connections[0]._received > (not fresh), "a request is there")
    line.writer.write_eof()
    for _ in before:
        assert (await line.answer())[0] == 200
    assert await line.ends() == b""
    await eventually(lambda: not place.connections and not answering(), "all is over")
    assert [(entry["event"], entry["status"]) for entry in place.log] == [("request", 200)] * (
        len(before) + (not fresh)
    )


@pytest.mark.parametrize("behind", [0, 1, 40])
async def test_a_peer_that_half_closes_while_it_waits(
    place: Place, line: Line, behind: int
) -> None:
    """Also for several answers: more than aiohttp keeps in its queue."""
    await line.send(held("x"))
    await place.holds(1)
    await line.send(PLAIN * behind)
    line.writer.write_eof()
    if behind < 30:
        await eventually(lambda: place.connections[0]._ending, "its end is seen")
    place.release.set()
    assert await told(line) == {"held": "x"}
    for _ in range(behind):
        assert await told(line) == {"is": "plain"}
    assert await line.ends() == b""
    assert [entry["status"] for entry in place.log] == [200] * (2 + behind)


async def test_a_peer_that_half_closes_and_reads_slowly(place: Place, dial: Dial) -> None:
    line = await dial(place.listener.ports[0])
    await line.send(request("GET", "/large"))
    await eventually(
        lambda: any(p.writing_paused for p in place.connections), "the peer does not read"
    )
    line.writer.write_eof()
    await eventually(lambda: place.connections[0]._ending, "its end is seen")
    assert await told(line) == "x" * LARGE
    assert await line.ends() == b""


@pytest.mark.parametrize("first", ["nothing", "answered", "under way", "in one segment"])
@pytest.mark.parametrize("cut", [1, 10, -30, -1])
async def test_a_peer_that_half_closes_within_a_request(
    place: Place, dial: Dial, first: str, cut: int
) -> None:
    """In its head or its body. It is not waited for; a whole one before it gets its answer."""
    line = await dial(place.listener.ports[0])
    begun = echo("x" * 60)[:cut]
    if first == "answered":
        await used(line)
    elif first == "under way":
        await line.send(held("x"))
        await place.holds(1)
    elif first == "in one segment":
        begun = held("x") + begun
    line.writer.write(begun)
    line.writer.write_eof()
    if first in ("under way", "in one segment"):
        await eventually(
            lambda: bool(place.connections and place.connections[0]._ending), "its end is seen"
        )
        await place.holds(1)
        place.release.set()
        assert await told(line) == {"held": "x"}
    assert await line.ends() == b""
    await eventually(lambda: not place.connections and not answering(), "all is over")
    requests = [(entry["route"], entry["status"]) for entry in place.log]
    whole = {"answered": [("/plain", 200)], "nothing": []}.get(first, [("/held", 200)])
    assert requests in (whole, [*whole, ("/echo", 400)]), (
        "of what came in parts at most a refusal is logged"
    )
    assert place.late_heads == 0


async def test_nonsense_before_a_half_close(place: Place, line: Line) -> None:
    await line.send(held("x"))
    await place.holds(1)
    line.writer.write(b"nonsense\r\n\r\n")
    line.writer.write_eof()
    await eventually(lambda: place.connections[0]._ending, "its end is seen")
    place.release.set()
    assert await told(line) == {"held": "x"}
    assert (await told(line, 400))["code"] == "invalid_request"
    assert await line.ends() == b""


async def test_the_end_waits_for_a_peer_that_half_closed(place: Place, line: Line) -> None:
    await line.send(held("x"))
    await place.holds(1)
    line.writer.write_eof()
    await eventually(lambda: place.connections[0]._ending, "its end is seen")
    closing = asyncio.create_task(place.listener.close())
    await eventually(lambda: place.connections[0]._closing, "it is to end")
    place.release.set()
    assert await told(line) == {"held": "x"}
    assert await line.ends() == b""
    async with soon():
        await closing


async def test_peers_that_go_away_at_any_moment(place: Place, dial: Dial) -> None:
    """Resets right behind what was sent, in one turn of the loop with it or a few later."""
    place.release.set()
    for turns in range(12):
        for first in (False, True):
            line = await dial(place.listener.ports[0])
            if first:
                await used(line)
            raw = line.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            line.writer.write(held("x") + (PLAIN if turns % 2 else b""))
            for _ in range(turns):
                await asyncio.sleep(0)
            line.writer.transport.abort()
    await eventually(lambda: not place.connections and not answering(), "all is over")
    gc.collect()
    assert {entry["event"] for entry in place.log} == {"request"}


@pytest.mark.parametrize("how", ["close", "abort", "half"])
async def test_a_statement_ends_without_its_caller(
    broker: Started, wire: Wire, dial: Dial, how: str
) -> None:
    before = answering()
    line = await dial(broker.service.port)
    target, key = (
        f"/v1/apps/{wire.app_id}/transactions/register",
        f"Authorization: Bearer {wire.key}",
    )
    async with stalled(broker, "users") as stall:
        await line.send(
            request("POST", target, key, body=b'{"external_id":"ann","passkey_display_name":"Ann"}')
        )
        await stall.waiting(1)
        assert len(answering()) == len(before) + 1
        if how == "close":
            line.writer.close()
        elif how == "abort":
            line.writer.transport.abort()
        else:
            line.writer.write_eof()
    if how == "half":
        assert (await line.answer())[0] == 201
        assert await line.ends() == b""
    await eventually(lambda: bool(lines(broker, status=201)), "the request is over")
    assert (await wire.keyed("GET", "/users?identifier=ann")).json["total_users"] == 1
    assert [entry["event"] for entry in broker.log] == ["request", "request"]


# -- the end ---------------------------------------------------------------------------------------


async def test_the_end_waits_for_the_answer(start: Open, dial: Dial) -> None:
    """It gets its answer, and the connection closes; what is queued behind it is not begun; idle
    ones close at once.
    """
    place = await start()
    port = place.listener.ports[0]
    running, idle = [await used(await dial(port)) for _ in range(2)]
    await running.send(held("first"))
    await place.holds(1)
    await running.send(echo("never"))
    await eventually(lambda: any(p._queue for p in place.connections), "it is queued")
    closing = asyncio.create_task(place.listener.close())
    assert await idle.ends() == b""
    assert not closing.done()
    place.release.set()
    assert await told(running) == {"held": "first"}
    assert await running.ends() == b""
    async with soon():
        await closing
    await eventually(lambda: not answering(), "the tasks are over")
    assert [entry["route"] for entry in place.log] == ["/plain", "/plain", "/held"]


async def test_the_end_does_not_wait_for_ever(start: Open, dial: Dial) -> None:
    """A request that is stuck, and an answer that nobody reads, are cut off at the limit."""
    place = await start(drain_seconds=SOON)
    port = place.listener.ports[0]
    stuck, deaf = [await used(await dial(port)) for _ in range(2)]
    await deaf.send(request("GET", "/large"))
    await eventually(
        lambda: any(p.writing_paused for p in place.connections), "the peer does not read"
    )
    await stuck.send(held("x"))
    await place.holds(1)
    async with soon():
        await place.listener.close()
    assert await stuck.ends() == b""
    assert place.left == 0
    await eventually(lambda: len(answering()) <= 1, "the stuck one is over")
    deaf.writer.transport.abort()
    await eventually(lambda: not answering(), "the tasks are over")


# -- one connection, many callers ------------------------------------------------------------------


@pytest.fixture
async def one_connection() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client that has one connection, as a proxy in front may."""
    connector = aiohttp.TCPConnector(limit=1, force_close=False)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as opened:
        yield opened


async def test_nothing_of_a_request_stays_for_the_next(
    broker: Started, one_connection: aiohttp.ClientSession
) -> None:
    """Two apps' backends and pages on one connection: each event and each line has its own actor,
    app and request id.
    """
    ann = await Wire.open(broker.service, one_connection)
    ben = await Wire.open(broker.service, one_connection)
    devices = {ann.app_id: Authenticator(), ben.app_id: Authenticator()}
    for wire in (ann, ben):
        await wire.user("someone", devices[wire.app_id])
    for wire in (ben, ann):
        await wire.redeem(
            await wire.authenticate(await wire.open_authentication("someone"), devices[wire.app_id])
        )
    assert (await ann.send("GET", broker.url + "/nothing")).status == 404
    assert len(answering()) == 1, "one connection"
    assert lines(broker)[-1]["app"] is None
    for wire in (ann, ben):
        mine = lines(broker, app=wire.app_id)
        assert len(mine) == 8
        assert len({entry["request_id"] for entry in mine}) == 8
        keys = {f"key:{key.id}" for key in await broker.parts.directory.keys(wire.app_id)}
        assert len(keys) == 1
        told_of = {
            event.action: (event.actor, entry["route"].rpartition("{app_id}")[2])
            for event in await broker.parts.directory.events(wire.app_id, limit=100)
            for entry in mine
            if entry["request_id"] == event.request_id
        }
        (key,) = keys
        page = "/transactions/webauthn/finish"
        assert told_of == {
            "user.created": (key, "/transactions/register"),
            "passkey.registered": ("browser", f"/register{page}"),
            "passkey.confirmed": (key, "/authenticate/verify"),
            "passkey.used": ("browser", f"/authenticate{page}"),
        }


async def test_a_thousand_requests_leave_nothing(place: Place, line: Line) -> None:
    """No object for the garbage collector to keep, whatever is asked."""
    mixed = [PLAIN, echo("x"), request("GET", "/refused"), request("GET", "/text"), CHUNKED]

    async def ask(number: int) -> int:
        for n in range(number):
            await line.send(mixed[n % len(mixed)])
            await line.answer()
        place.stream.seek(0)
        place.stream.truncate(0)
        gc.collect()
        return len(gc.get_objects())

    await ask(1000)  # fills the caches of the process
    before = await ask(100)
    assert await ask(1000) - before < 100


# -- caps ------------------------------------------------------------------------------------------

HEALTH = request("GET", "/health/live")


@pytest.fixture(params=["the fast path", "aiohttp's server"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two servers."""
    if request.param == "aiohttp's server":
        monkeypatch.delattr("broker.web.fast_path.checked_server")


def refusals(place: Place, reason: str) -> float | None:
    labels = {"code": "service_unavailable", "reason": reason}
    return place.metrics.registry.get_sample_value("broker_refusals_total", labels)


@pytest.mark.usefixtures("server")
async def test_above_the_cap_of_connections_only_health_answers(start: Open, dial: Dial) -> None:
    place = await start(Limits(connections=2))
    port = place.listener.ports[0]
    first, second = await used(await dial(port)), await used(await dial(port))
    for data, status in ((PLAIN, 503), (HEALTH, 200)):
        surplus = await dial(port)
        await surplus.send(data)
        got, headers, _ = await surplus.answer()
        assert (got, headers["connection"]) == (status, "close")
        assert headers.get("retry-after") == ("1" if status == 503 else None)
        assert await surplus.ends() == b""
    assert refusals(place, "connections") == 1
    spare = [await dial(port) for _ in range(SPARE_CONNECTIONS)]
    assert await (await dial(port)).ends() == b""
    assert refusals(place, "connections") == 2
    await used(first)
    for line in (*spare, second):
        line.writer.close()
    await eventually(lambda: len(place.listener.server.connections) == 1, "the others ended")
    await used(await used(await dial(port)))


@pytest.mark.usefixtures("server")
async def test_above_the_cap_of_requests_only_health_answers(start: Open, dial: Dial) -> None:
    place = await start(Limits(requests=1))
    port = place.listener.ports[0]
    held, other = await dial(port), await dial(port)
    await held.send(request("POST", "/held", body=b"x"))
    await eventually(lambda: place.entered == 1, "a request is in flight")
    for data, status in ((PLAIN, 503), (HEALTH, 200), (PLAIN, 503)):
        await other.send(data)
        got, headers, _ = await other.answer()
        assert (got, headers.get("retry-after")) == (status, "1" if status == 503 else None)
    assert refusals(place, "requests_in_flight") == 2
    place.release.set()
    assert await told(held) == {"held": "x"}
    await used(other)
    await used(held)


# -- without the fast path -------------------------------------------------------------------------


class _Changed(HttpRequestParser):
    """A parser whose answer has another shape."""

    def feed_data(self, data: bytes) -> Any:  # type: ignore[override]
        return (*super().feed_data(data), None)


OTHER: dict[str, tuple[str, object]] = {
    "no parser": ("aiohttp.http.HttpRequestParser", None),
    "a parser that answers otherwise": ("aiohttp.http.HttpRequestParser", _Changed),
    "a parser that is made otherwise": ("aiohttp.http.HttpRequestParser", lambda protocol: None),
    "no base": ("aiohttp.base_protocol.BaseProtocol", None),
    "no pause": ("aiohttp.base_protocol.BaseProtocol._pause_reading_for_buffer", None),
    "no resumption": ("aiohttp.base_protocol.BaseProtocol._resume_reading_for_buffer", None),
    "no writer": ("aiohttp.http.StreamWriter", None),
    "a writer that is made otherwise": ("aiohttp.http.StreamWriter", lambda protocol: None),
    "no date": ("aiohttp.helpers.rfc822_formatted_time", None),
}


@pytest.mark.parametrize(("name", "other"), OTHER.values(), ids=OTHER)
async def test_another_aiohttp_serves_by_its_own_server(
    start: Open, dial: Dial, monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    """One name that the fast path uses is gone or means something else: the log says so, and every
    request is answered.
    """
    monkeypatch.delitem(sys.modules, "broker.web.fast_path")
    monkeypatch.delattr("broker.web.fast_path")
    if other is None:
        monkeypatch.delattr(name)
    else:
        monkeypatch.setattr(name, other)
    place = await start(drain_seconds=1.0)
    (told_off,) = [entry for entry in place.log if entry["event"] == "fast_path_off"]
    assert (told_off["level"], bool(told_off["error"])) == ("warning", True)
    assert isinstance(place.listener.server, web.Server)
    monkeypatch.undo()
    gc.collect()  # what the probe left is told about now
    place.stream.seek(0)
    place.stream.truncate(0)
    line = await dial(place.listener.ports[0])
    for _ in range(2):
        await line.send(PLAIN + echo("a"))
        assert [await told(line), await told(line)] == [{"is": "plain"}, echoed("a")]
        await line.send(CHUNKED)
        assert await told(line) == echoed("odd")
        for data, status in ODD.values():
            if b"HTTP/1.0" not in data:
                await line.send(data)
                assert (await line.answer())[0] == status
    await line.send(echo("x" * (MAX_BODY + 1)))
    assert (await told(line, 413))["code"] == "request_too_large"
    assert await line.ends() == b""
    line = await dial(place.listener.ports[0])
    await line.send(b"GET /\x01secret HTTP/1.1\r\nAuthorization: secret\r\n\r\n")
    assert (await told(line, 400))["code"] == "invalid_request"
    assert await line.ends() == b""
    assert "secret" not in place.stream.getvalue()
    running = await dial(place.listener.ports[0])
    await running.send(held("x"))
    await place.holds(1)
    closing = asyncio.create_task(place.listener.close())
    place.release.set()
    assert await told(running) == {"held": "x"}
    assert await running.ends() == b""
    await closing


async def test_another_aiohttp_limits_heads_too(
    start: Open, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "broker.web.fast_path")
    monkeypatch.delattr("aiohttp.http.HttpRequestParser")
    place = await start(Limits(head=SOON, idle=60))
    monkeypatch.undo()
    for sent in (b"", b"G", PLAIN[:-1]):
        line = await dial(place.listener.ports[0])
        await line.send(sent)
        assert await line.ends() == b""
    line = await used(await dial(place.listener.ports[0]))
    await asyncio.sleep(2 * SOON)  # idle
    await line.send(PLAIN + PLAIN[:5])
    assert await told(line) == {"is": "plain"}
    await line.send(PLAIN[5:10])
    assert await line.ends() == b""
