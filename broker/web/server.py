"""aiohttp's HTTP server, bounded and discreet.

aiohttp has no limit on how long a request's head may take, keeps idle connections for an hour,
unpacks compressed bodies, and answers and logs malformed requests with the bytes it could not parse
(a control byte in a header makes it print the Authorization header). Here: a head is complete
within 10 s of its first byte, an idle connection ends after 75 s (`Limits`), compressed bodies stay
compressed (and are refused), and a malformed request gets one fixed JSON sentence and a log line
without a byte of it. Three more things aiohttp does otherwise: a body whose chunks break leaves its
reader waiting, at shut-down the rest of a body that is under way is dropped, and a peer that
half-closes the connection (RFC 9293 §3.6, "CLOSE is an operation meaning 'I have no more data to
send'") gets no answer to what it asked before.

**The fast lane.** aiohttp hands each request from its connection's task to a task of its own and
back, and writes answers in steps that any response might need: two thirds of what a small request
costs. A request that is whole when its head is (as nearly all are), on a connection that waits for
one, is answered here by one task of the connection, and an `Answer` goes out in one write.
Everything else, and every request that comes while one is being answered, takes aiohttp's own way:
while the lane is in use, aiohttp's task waits and its queue fills.

aiohttp offers no public way to choose the protocol class; `_Runner` therefore overrides
`AppRunner._make_server` and hands our `_Protocol` out. tests/web/test_server.py sends what would
reveal a change of those internals.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_exceptions import HttpProcessingError, InvalidURLError
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import StreamWriter, _serialize_headers
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from broker.web.body import LIMITS, MAX_BODY, Incoming, Limits
from broker.web.edge import Answer, Edge
from broker.web.share import Acceptor, Share

LINGER_SECONDS = 1.0
_BACKLOG = 1024
_NO_WRITER = cast(
    "AbstractStreamWriter", None
)  # of requests whose answers need none, as nearly all


class _Protocol(RequestHandler):
    """One connection."""

    __slots__ = (
        "_answered",
        "_ending",
        "_head_timer",
        "_held",
        "_idle",
        "_lane",
        "_last_body",
        "_server",
        "_silent",
        "_taken",
        "_write_timer",
    )

    def __init__(self, manager: _Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._server = manager  # aiohttp's `_manager` is gone with the peer
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._last_body: StreamReader = EMPTY_PAYLOAD  # of the last request whose head is here
        self._silent = True  # no byte has come
        self._held = b""  # the last byte that came, where the parser can't take it yet
        self._answered = 0  # of `_request_count`
        self._ending = False  # the connection ends when all requests that are here are answered
        self._lane: asyncio.Task[None] | None = None
        self._idle: asyncio.Future[None]  # what the lane's task waits for
        self._taken: tuple[RawRequestMessage, StreamReader, asyncio.Future[None]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head_timer = self._loop.call_later(self._server.limits.head, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._head_is_here()
        self._it_reads()
        super().connection_lost(exc)
        if self._lane is not None and self._taken is None:
            self._lane.cancel()  # else it ends with its request

    def data_received(self, data: bytes) -> None:
        if self._ending and data and self._last_body.is_eof():
            return
        complete = self._request_count
        waiter = self._waiter
        if waiter is not None and not waiter.done() and not self._messages:
            self._waiter = None  # so that what is read is queued and wakes nobody yet
            self._parse(data)
            if self._request_count != complete and self._enter_lane(waiter):
                return
            self._give_back(waiter)
            return
        if (
            (self._close or self._force_close)
            and self._request_in_progress
            and self.transport is not None
        ):
            # Shutting down: aiohttp would drop these bytes, and with them the body of a request
            # that may still end well.
            closing = self._close, self._force_close
            self._close = self._force_close = False
            self._parse(data)
            self._close, self._force_close = closing
            return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        """Parse `data`. A head that it leaves incomplete has `Limits.head` seconds from here on.

        The parser does not say whether it holds an incomplete head. It does where no body is
        awaited and the last byte has completed no request, so that byte is parsed by itself. Data
        that ends with an empty line leaves no incomplete head, and is parsed at once.
        """
        before, begun = self._request_count, False
        data, self._held = self._held + data, b""
        if data.endswith(b"\r\n\r\n"):
            self._parse_part(data)
        else:
            self._parse_part(data[:-1])
            complete, awaited = self._request_count, not self._last_body.is_eof()
            if len(self._messages) >= self._max_msg_queue_size and not self._upgraded:
                self._held = data[-1:]  # the parser waits for room, and may hold more requests
            elif data and not self._is_broken():
                self._parse_part(data[-1:])
                begun = self._request_count == complete and not awaited and not self._upgraded
        if self._request_count != before or (self._silent and data):
            self._head_is_here()
        self._silent = self._silent and not data
        if begun and self._head_timer is None:
            self._head_timer = self._loop.call_later(self._server.limits.head, self._head_is_late)

    def _parse_part(self, data: bytes) -> None:
        complete = self._request_count
        super().data_received(data)
        if self._request_count != complete:
            self._judge_framing()

    def _is_broken(self) -> bool:
        return self._close or bool(self._messages and isinstance(self._messages[-1][0], _ErrInfo))

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp's answers nothing, which closes the transport
        """The peer sends no more (a half-close, or the end of its process). It gets the answers to
        whole requests, then the connection ends.
        """
        left = self._request_count - self._answered
        if left and not self._last_body.is_eof():  # the last one will never be whole
            left -= 1
            if left:  # else it is with its handler, which learns it from the end of the connection
                self._messages.pop()
                self._answered += 1
        self._ending = True
        self._head_is_here()
        return left > 0

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._server.edge.late_head()
        if self._request_count == self._answered:
            self.force_close()
        self._ending = True

    def _is_answered(self) -> None:
        self._answered += 1
        if self._ending and self._answered == self._request_count:
            self._close = True

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write an answer on aiohttp's own way. It offers nothing to upgrade to: what came behind
        the offer is HTTP.
        """
        if self._upgraded and not self._messages and self._parser is not None:
            self._parser.set_upgraded(False)
            self._upgraded = False
            tail, self._message_tail = self._message_tail, b""
            self._parse(tail)
            if self._buffer_paused:
                self._resume_reading_if_drained()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._is_answered()

    def _enter_lane(self, waiter: asyncio.Future[None]) -> bool:
        """Whether what came is one whole request, which is being answered now; aiohttp's task,
        which waits for `waiter`, goes on waiting.
        """
        if len(self._messages) != 1 or self._close or self._force_close or self._parser is None:
            return False
        message, body = self._messages[0]
        if (
            isinstance(message, _ErrInfo)
            or message.should_close
            or message.upgrade
            or message.version != HttpVersion11
            or message.method == hdrs.METH_HEAD
            or not body.is_eof()
            or hdrs.EXPECT in message.headers  # "100 Continue" is written on the way
        ):
            return False
        self._messages.clear()
        self._parser.message_consumed()
        assert self._manager is not None
        self._manager.requests_count += 1
        self._taken = message, body, waiter
        if self._lane is None:
            self._lane = self._loop.create_task(self._answer_each())
        else:
            self._idle.set_result(None)
        return True

    async def _answer_each(self) -> None:
        """Answer what enters the lane, one after the other, until the connection ends. One task for
        all: a task costs as much as a look-up.
        """
        handle, lane, loop = self._server.edge, self._lane, self._loop
        assert lane is not None
        while self._taken is not None:
            message, body, waiter = self._taken
            try:
                request = Incoming(
                    message, body, self, _NO_WRITER, lane, loop, client_max_size=MAX_BODY
                )
                chunks: Sequence[bytes] = body._buffer if body is not EMPTY_PAYLOAD else ()
                request.whole_body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
                response = await handle(request)
                if type(response) is Answer and response._keep_alive is None:
                    self._write_whole(response)
                    if self._paused:
                        await self._drain_helper()
                else:
                    request._payload_writer = StreamWriter(self, self._loop)
                    await super().finish_response(request, response, None)
                    if not response.keep_alive:
                        self.force_close()
            except ConnectionError:  # the peer is gone
                self.force_close()
            except BaseException:
                self.force_close()
                raise
            finally:
                self._taken = None
                self._is_answered()
                self._next_keepalive_close_time = loop.time() + self._keepalive_timeout
                if self._keepalive_handle is None and not self._force_close:  # it rang meanwhile
                    self._keepalive_handle = loop.call_at(
                        self._next_keepalive_close_time, self._process_keepalive
                    )
                self._give_back(waiter)
            if self._close or self._force_close:
                if self.transport is not None:
                    self.transport.close()
                return
            del message, body, waiter, request, response
            self._idle = loop.create_future()
            await self._idle

    def _write_whole(self, answer: Answer) -> None:
        if self.transport is not None:
            date = rfc822_formatted_time()
            whole = answer.serialize(date)
            if whole is None:
                content, headers = answer._body, answer._headers
                assert isinstance(content, bytes)
                headers[hdrs.CONTENT_LENGTH] = str(len(content))
                headers[hdrs.DATE] = date
                head = _serialize_headers(f"HTTP/1.1 {answer._status} {answer._reason}", headers)
                whole = head + content
            self.transport.write(whole)

    def _give_back(self, waiter: asyncio.Future[None]) -> None:
        """Let aiohttp's task have its future again: to wait for, to look at what was queued, or to
        end.
        """
        self._waiter = waiter
        if self._close or self._force_close:
            waiter.cancel()
        elif self._messages and not waiter.done():
            waiter.set_result(None)

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """End the connection; a request in the lane has `timeout` seconds."""
        if self._lane is not None and self._taken is not None:
            self._force_close = True
            _, late = await asyncio.wait([self._lane], timeout=timeout)
            if late:
                self._lane.cancel()
                await asyncio.wait([self._lane])
        await super().shutdown(timeout)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp resumes with every body that it has read, also where nothing was paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def _judge_framing(self) -> None:
        """A body whose framing breaks fails at once; aiohttp would let its reader wait for more
        until the time is over.
        """
        if not self._messages:
            return
        message, body = self._messages[-1]
        if not isinstance(message, _ErrInfo):
            self._last_body = body
            if message.path is None:  # CONNECT to nothing, which the parser lets pass
                self._messages[-1] = _ErrInfo(400, InvalidURLError(""), ""), EMPTY_PAYLOAD
        elif not self._last_body.is_eof():
            self._messages.pop()  # the request that has this body gets the answer
            self._answered += 1
            self._close = True
            self._last_body.set_exception(web.RequestPayloadError())
            self._last_body.feed_eof()

    def pause_writing(self) -> None:
        """The peer does not read. It gets as long for that as for sending a body."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self._loop.call_later(self._server.limits.body, self._give_up)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._it_reads()

    def _it_reads(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _give_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP, and close the connection."""
        response = self._server.edge.malformed(
            type(exc).__name__ if isinstance(exc, HttpProcessingError) else "other"
        )
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        response.force_close()
        return response


class _Server(web.Server):
    """Makes a `_Protocol` for each connection."""

    def __init__(self, edge: Edge, *, limits: Limits, share: Share | None, **options: Any) -> None:
        super().__init__(edge, keepalive_timeout=limits.idle, **options)  # type: ignore[arg-type]  # our request factory makes web.Request
        self.edge = edge
        self.limits = limits
        self._share = share

    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        if self._share is not None:
            self._share.went()


def _incoming(
    message: RawRequestMessage,
    body: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
    *,
    client_max_size: int,
) -> Incoming:
    return Incoming(
        message, body, protocol, writer, task, protocol._loop, client_max_size=client_max_size
    )


class _Runner(web.AppRunner):
    __slots__ = ("_edge", "_share")

    def __init__(
        self, app: web.Application, *, edge: Edge, drain_seconds: float, share: Share | None
    ) -> None:
        super().__init__(app, shutdown_timeout=drain_seconds, access_log=None)
        self._edge = edge
        self._share = share

    async def _make_server(self) -> web.Server:
        loop = asyncio.get_running_loop()
        self._app._set_loop(loop)
        self._app.on_startup.freeze()
        await self._app.startup()
        self._app.freeze()
        return _Server(
            self._edge,
            limits=self._app.get(LIMITS, Limits()),
            share=self._share,
            request_factory=partial(_incoming, client_max_size=self._app._client_max_size),
            loop=loop,
            lingering_time=LINGER_SECONDS,
            auto_decompress=False,
            access_log=None,
        )


class _SharedSite(web.SockSite):
    """A socket from which other processes accept as well."""

    __slots__ = ("_acceptor", "_share")

    def __init__(self, runner: _Runner, listening: socket.socket, share: Share) -> None:
        super().__init__(runner, listening)
        self._share = share

    async def start(self) -> None:
        await web.BaseSite.start(self)  # not the one between, which accepts by itself
        assert self._runner.server is not None
        self._acceptor = Acceptor(self._sock, self._runner.server, self._share)

    async def stop(self) -> None:
        await self._acceptor.close()
        await super().stop()


class Listener:
    """A running server. `ports` are those it listens on (useful where 0 was asked)."""

    def __init__(
        self, runner: _Runner, sockets: Sequence[socket.socket], drain_seconds: float
    ) -> None:
        self._runner = runner
        self._drain_seconds = drain_seconds
        self.ports = tuple(dict.fromkeys(s.getsockname()[1] for s in sockets))

    async def accept_no_more(self) -> None:
        """Take no new connections; those there are go on."""
        for site in list(self._runner.sites):
            await site.stop()

    async def close(self) -> None:
        """Refuse new connections, let running requests end (up to the drain limit), then close."""
        try:
            async with asyncio.timeout(
                self._drain_seconds + 1
            ):  # aiohttp waits twice where a peer does not read
                await self._runner.cleanup()
        except TimeoutError:
            pass


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets for `host`, or for several separated by commas; "localhost" means 127.0.0.1 and ::1,
    as browsers try both.

    Raises:
        OSError: the address is in use or not ours.
    """
    sockets: list[socket.socket] = []
    names = host.split(",")
    hosts = dict.fromkeys(
        h for n in names for h in (("127.0.0.1", "::1") if n == "localhost" else (n,))
    )
    try:
        for name in hosts:
            family, kind, protocol, _, address = socket.getaddrinfo(
                name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            if family == socket.AF_INET6 and not _has_ipv6():
                continue
            listening = socket.socket(family, kind, protocol)
            sockets.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                address = (address[0], port, *address[2:])
            listening.bind(address)
            if port == 0:
                port = listening.getsockname()[1]
            listening.listen(_BACKLOG)
            listening.setblocking(False)
    except OSError:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def _has_ipv6() -> bool:
    """Whether ::1 can be bound: containers are often without IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def listen(
    app: web.Application,
    sockets: Sequence[socket.socket],
    *,
    edge: Edge,
    drain_seconds: float,
    share: Share | None = None,
) -> Listener:
    """Serve `app` behind `edge` on bound sockets, with a `share` of what they accept where other
    processes have them too. How long callers may take is `app[LIMITS]`, where it is set."""
    runner = _Runner(app, edge=edge, drain_seconds=drain_seconds, share=share)
    await runner.setup()
    for listening in sockets:
        site = (
            _SharedSite(runner, listening, share)
            if share
            else web.SockSite(runner, listening, backlog=_BACKLOG)
        )
        await site.start()
    return Listener(runner, sockets, drain_seconds)
