"""HTTP fast path: one task answers all requests of a connection, and a JSON answer is one write.

**What it gains.** aiohttp hands each request from its connection's task to a task of its own and
back, and writes an answer in several steps. Without the fast path a
four-request login takes 1.18 times the CPU with 16 logins in flight, and 1.27 times with 64 (A/B in
turns, six pairs, 2026-11-30).

**What it promises besides**, where aiohttp does otherwise:

- A head is complete within `Limits.head` of its first byte, also behind other requests. A peer has
  `Limits.body` to read an answer.
- A body whose chunks break fails at once. aiohttp lets its reader wait.
- A peer that half-closes the connection (RFC 9293 §3.6, "CLOSE is an operation meaning 'I have no
  more data to send'") gets the answers to its whole requests.
- During shutdown the body of a request that is being answered may still come.
- An offer to upgrade is ignored.
- Of pipelined requests one is answered in an iteration of the event loop, so that a flood of them
  on one connection lets the others have their turn.
- With `proxy_protocol` the peer's address is that of the connection's PROXY protocol header.

**What it rests on.** Private names of aiohttp occur in this module only. `BaseProtocol`, with
`_buffer_paused`, `_pause_reading_for_buffer` and `_resume_reading_for_buffer`, lets readers and
writers pause a connection. A `StreamReader` has a body in `_buffer`. `HttpRequestParser`, with
`feed_data`, `message_consumed` and `set_upgraded`, makes `RawRequestMessage`s. `ERROR` stands for
bytes that are not HTTP. Undocumented are also the constructors of `StreamWriter` and `web.Request`,
and `rfc822_formatted_time`.

At each start `checked_server` sends requests through a socket pair. Where a name is missing or
behaves in another way, aiohttp's own server takes over (`broker.web.server`), and the log says
`fast_path_off`.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from aiohttp import EMPTY_PAYLOAD, HttpVersion11, StreamReader, hdrs, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import HttpProcessingError, HttpRequestParser, RawRequestMessage, StreamWriter
from aiohttp.web_protocol import ERROR

from broker.web.answer import Answer
from broker.web.body import MAX_BODY, SPARE_CONNECTIONS, Incoming, Limits
from broker.web.edge import Edge
from broker.web.proxy_protocol import read_header

QUEUE = 32  # requests of one connection that wait; then the peer waits
LINGER_SECONDS = 1.0  # for the rest of a body that no handler has read
_BODY_BUFFER = 2**16  # bytes of a body that wait for its reader; with twice as many the peer waits
_EMPTY_LINE = b"\r\n\r\n"


class Connection(BaseProtocol):
    """HTTP/1.1 connection. `is_surplus`: the cap on connections is reached."""

    def __init__(self, server: Server, *, is_surplus: bool) -> None:
        self._http: Any = HttpRequestParser(
            self,
            server.loop,
            _BODY_BUFFER,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=QUEUE,
        )
        super().__init__(server.loop, self._http)
        self._server = server
        self._is_surplus = is_surplus
        self._queue: deque[tuple[RawRequestMessage | str, StreamReader]] = deque()
        self._received = self._answered = 0  # requests
        self._last_body: StreamReader = EMPTY_PAYLOAD  # of the last request whose head is here
        self._header = b"" if server.proxy_protocol else None  # of the PROXY protocol, incomplete
        self._unparsed = b""  # the last byte that came, where the parser can't take it yet
        self._broken = False  # what came can't be parsed
        self._ending = False  # no further request is read
        self._closing = False  # no further request is begun
        self._wake: asyncio.Future[None] = server.loop.create_future()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.ssl_context = transport.get_extra_info("sslcontext")
        self.peername = transport.get_extra_info("peername")
        self.sockname = transport.get_extra_info("sockname")
        self._server.connections.add(self)
        self._idle_since = self._server.loop.time()
        self._end_if_idle()
        self._task = self._server.loop.create_task(self._answer_each())
        self._task.add_done_callback(lambda _: self._server.connections.discard(self))

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        for name in list(self._timers):
            self._stop(name)
        if not self._last_body.is_eof():
            self._last_body.set_exception(ConnectionResetError("the peer is gone"))
        self.close()

    # -- reading -----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse `data`. An incomplete head at its end has `Limits.head` seconds from here on.

        The parser does not report whether its buffer has an incomplete head. The buffer has one
        where no body is awaited and the last byte has completed no request, so that byte is parsed
        by itself. Data that ends with an empty line leaves no incomplete head, and is parsed at
        once.
        """
        if data and self._ending and self._last_body.is_eof():
            return
        if self._header is not None:
            data = self._without_header(self._header + data)
            if not data:
                return
        before, begun = self._received, False
        data, self._unparsed = self._unparsed + data, b""
        if data.endswith(_EMPTY_LINE):
            self._parse(data)
        else:
            self._parse(data[:-1])
            complete, awaited = self._received, not self._last_body.is_eof()
            if len(self._queue) >= QUEUE:
                self._unparsed = data[-1:]  # the parser waits for room, and may hold more requests
            elif data:
                self._parse(data[-1:])
                begun = self._received == complete and not awaited and not self._broken
        if self._received != before:
            self._stop("head")
        if begun and "head" not in self._timers:
            self._start("head", self._server.limits.head, self._head_is_late)

    def _without_header(self, data: bytes) -> bytes:
        """Strip the header of the PROXY protocol from the beginning of `data`."""
        self._header = data
        try:
            found = read_header(data)
        except ValueError:
            self._refuse_the_rest("ProxyHeader")
            return b""
        if found is None:
            return b""
        self._header = None
        if found.source is not None:
            self.peername = (found.source, 0)
        return data[found.length :]

    def _parse(self, data: bytes) -> None:
        """Queue the requests whose heads end in `data`."""
        is_upgraded = not self._broken
        while is_upgraded:
            self._http.set_upgraded(False)  # data after an offer to upgrade is HTTP
            try:
                messages, is_upgraded, data = self._http.feed_data(data)
            except HttpProcessingError as fault:
                self._refuse_the_rest(type(fault).__name__)
                return
            for message, body in messages:
                if message.path is None:  # CONNECT to nothing, which the parser lets pass
                    self._refuse_the_rest("InvalidURLError")
                    return
                self._received += 1
                self._last_body = body
                self._queue.append((message, body))
        if len(self._queue) >= QUEUE and not self._buffer_paused:
            self._pause_reading_for_buffer()
        self._go_on()

    def _refuse_the_rest(self, kind: str) -> None:
        """Refuse data that is not HTTP. `kind` is the parser's name of the fault."""
        self._broken = self._ending = True
        if self._last_body.is_eof():
            self._received += 1
            self._queue.append((kind, EMPTY_PAYLOAD))
        else:  # the request that has this body gets the answer
            self._last_body.set_exception(web.RequestPayloadError())
            self._last_body.feed_eof()
        self._go_on()

    def eof_received(self) -> bool:
        """The peer sends no more (a half-close, or the end of its process). The peer gets the
        answers to whole requests, then the connection ends.
        """
        left = self._received - self._answered
        if left and not self._last_body.is_eof():  # the last one will never be whole
            left -= 1
            if left:  # else it is with its handler, which learns it from the end of the connection
                self._queue.pop()
                self._answered += 1
        self._ending = True
        self._stop("head")
        self._go_on()
        return left > 0

    def _make_room(self) -> None:
        """Tell the parser that a queued request was taken. A parser that waits for room goes on."""
        self._http.message_consumed()
        if self._buffer_paused and len(self._queue) <= QUEUE // 2:
            self.data_received(b"")
            if len(self._queue) < QUEUE:
                self._resume_reading_for_buffer()

    # -- answering ---------------------------------------------------------------------------------

    async def _answer_each(self) -> None:
        """The connection's only task."""
        try:
            while not self._closing:
                if self._queue:
                    message, body = self._queue.popleft()
                    self._make_room()
                    await self._answer(message, body)
                    self._answered += 1
                    self._idle_since = self._server.loop.time()
                    if self._queue:  # answers without a wait would keep the loop from the others
                        await asyncio.sleep(0)
                elif self._ending:
                    break
                else:
                    self._wake = self._server.loop.create_future()
                    await self._wake
        except ConnectionError:  # the peer is gone
            pass
        finally:
            if self.transport is not None:
                self.transport.close()

    async def _answer(self, message: RawRequestMessage | str, body: StreamReader) -> None:
        edge, loop, writer = (
            self._server.edge,
            self._server.loop,
            StreamWriter(self, self._server.loop),
        )
        kind = None
        if isinstance(message, str):
            kind, message = message, ERROR
        request = Incoming(
            message, body, cast("Any", self), writer, self._task, loop, client_max_size=MAX_BODY
        )
        request.is_surplus = self._is_surplus
        response: web.StreamResponse
        if kind is not None:
            response = edge.malformed(kind)
        else:
            if body.is_eof():
                chunks = body._buffer if body is not EMPTY_PAYLOAD else ()  # not taken from it
                request.whole_body = b"".join(chunks)
            response = await edge(request)
        whole = None
        if type(response) is Answer:
            if (
                message.version == HttpVersion11
                and not message.should_close
                and message.method != hdrs.METH_HEAD
            ):
                whole = response.serialize(rfc822_formatted_time())
            if whole is None:
                response = response.as_response()
        if whole is None:
            await response.prepare(request)
            await response.write_eof()
            if not response.keep_alive:
                self._closing = True
        elif self.transport is not None:
            self.transport.write(whole)
            await writer.drain()
        if not body.is_eof():
            await self._discard(body)

    async def _discard(self, body: StreamReader) -> None:
        """Read the rest of a body that no handler has read, so that the peer reads the answer."""
        with suppress(TimeoutError, ConnectionError, web.RequestPayloadError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not body.is_eof():
                    await body.readany()
        if not body.is_eof():
            self._closing = True

    def pause_writing(self) -> None:
        """The peer does not read. The connection ends after `Limits.body` without a read."""
        super().pause_writing()
        self._start("write", self._server.limits.body, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("write")

    # -- ends --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Begin no further request. The connection ends with the one that is being answered."""
        self._closing = True
        self._go_on()

    async def shutdown(self, timeout: float | None) -> None:  # noqa: ASYNC109 - as aiohttp's servers
        """Wait for the request that is being answered, at most `timeout` seconds."""
        self.close()
        _, late = await asyncio.wait([self._task], timeout=timeout)
        if late:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._abort()

    def _go_on(self) -> None:
        if not self._wake.done():
            self._wake.set_result(None)

    def _start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._timers[name] = self._server.loop.call_later(seconds, then)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def _head_is_late(self) -> None:
        self._stop("head")
        self._server.edge.late_head()
        self._ending = True
        self._go_on()

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _end_if_idle(self) -> None:
        """End a connection without a request for `Limits.idle`, or for `Limits.head` before the
        first request.
        """
        limits = self._server.limits
        limit = limits.idle if self._received else limits.head
        left = self._idle_since + limit - self._server.loop.time()
        if self._received != self._answered or "head" in self._timers:
            left = limit
        if left > 0:
            self._start("idle", min(left, limits.head, limits.idle), self._end_if_idle)
        else:
            self.close()


class Server:
    """Makes a `Connection` of each accepted socket. With `proxy_protocol` each connection begins
    with a header of the PROXY protocol.
    """

    def __init__(self, edge: Edge, limits: Limits, *, proxy_protocol: bool = False) -> None:
        self.edge = edge
        self.limits = limits
        self.proxy_protocol = proxy_protocol
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()

    def __call__(self) -> asyncio.BaseProtocol:
        count, cap = len(self.connections), self.limits.connections
        if count >= cap + SPARE_CONNECTIONS:
            return self.edge.refuse_connection()
        return Connection(self, is_surplus=count >= cap)

    def pre_shutdown(self) -> None:
        """Close idle connections, and begin no further request."""
        for connection in list(self.connections):
            connection.close()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Wait for requests that are being answered, at most `timeout` seconds."""
        await asyncio.gather(*(each.shutdown(timeout) for each in list(self.connections)))


async def checked_server(edge: Edge, limits: Limits, *, proxy_protocol: bool) -> Server:
    """A `Server`, if the fast path works with the aiohttp that is installed.

    Raises:
        Exception: of any kind, where a probe fails.
    """

    async def echo(request: Incoming) -> web.StreamResponse:
        whole = request.whole_body
        return Answer(whole if whole == await request.read() else b"", 200)

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(Server(cast("Edge", echo), limits), theirs)
    with ours:
        async with asyncio.timeout(_CHECK_SECONDS):
            await loop.sock_sendall(ours, _PROBE)
            answers = b""
            while data := await loop.sock_recv(ours, 65536):
                answers += data
    if (
        answers.count(b"HTTP/1.1 200 OK\r\n") != _PROBES
        or answers.count(b"\r\n\r\nping") != _PROBES
    ):
        raise RuntimeError(f"the probe was answered by {len(answers)} bytes")
    return Server(edge, limits, proxy_protocol=proxy_protocol)


_CHECK_SECONDS = 5.0
# More requests than a queue holds, a body in chunks, and a request that ends the connection.
_PROBES = QUEUE + 10
_PROBE = (
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nping" * (_PROBES - 2)
    + b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nping\r\n0\r\n\r\n"
    + b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\n\r\nping"
)
