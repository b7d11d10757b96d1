"""HTTP server: binds sockets, serves an application behind its edge, and shuts down gracefully.

Requests take the HTTP fast path (`broker.web.fast_path`). Where the aiohttp that is installed lacks
what the fast path needs, aiohttp's own server answers, by documented names only, and the log says
`fast_path_off`. A login then costs a quarter more CPU. A head that begins behind another request
has the longer limit of an idle connection, and a peer that half-closes gets no answer.

Bytes that are no HTTP get one fixed JSON sentence, and a log line without a byte of them. aiohttp
would answer and log them (a control byte in a header makes it print the Authorization header).
Compressed bodies stay compressed, and are refused.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from aiohttp import web

from broker.telemetry import fault
from broker.web.answer import as_response
from broker.web.body import LIMITS, MAX_BODY, SPARE_CONNECTIONS, Incoming, Limits
from broker.web.edge import Edge
from broker.web.proxy_protocol import read_header

_BACKLOG = 1024


class _PlainServer(web.Server):
    """aiohttp's server behind the edge."""

    def __init__(self, edge: Edge, limits: Limits, *, proxy_protocol: bool) -> None:
        self.edge, self.limits, self.proxy_protocol = edge, limits, proxy_protocol
        self.loop = asyncio.get_running_loop()
        super().__init__(self._answer, request_factory=self._request)  # type: ignore[arg-type]  # an `Incoming`

    def __call__(self) -> Any:
        count, cap = len(self.connections), self.limits.connections
        if count >= cap + SPARE_CONNECTIONS:
            return self.edge.refuse_connection()
        return _PlainConnection(self, is_surplus=count >= cap)

    def _request(
        self, message: Any, body: Any, connection: Any, writer: Any, task: Any
    ) -> Incoming:
        connection.stop_timer()
        make = partial(Incoming, client_max_size=MAX_BODY)
        request = make(message, body, connection, writer, task, self.loop)
        request.is_surplus = connection.is_surplus
        return request

    async def _answer(self, request: Incoming) -> web.StreamResponse:
        return as_response(await self.edge(request))


class _PlainConnection(web.RequestHandler):
    """aiohttp's connection, with a limit on the time of a head, and behind a header of the PROXY
    protocol where one is expected.
    """

    timer: asyncio.TimerHandle | None = None

    def __init__(self, server: _PlainServer, *, is_surplus: bool) -> None:
        self.server = server
        self.header = b"" if server.proxy_protocol else None  # incomplete
        self.source: str | None = None  # the address in the header
        self.is_surplus = is_surplus
        super().__init__(
            server,
            loop=server.loop,
            keepalive_timeout=server.limits.idle,
            lingering_time=1.0,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # documented: no access log
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.timer = self.server.loop.call_later(self.server.limits.head, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.stop_timer()

    def data_received(self, data: bytes) -> None:
        if self.timer is None:
            self.timer = self.server.loop.call_later(self.server.limits.head, self.force_close)
        if self.header is not None:
            self.header += data
            try:
                found = read_header(self.header)
            except ValueError:
                self.server.edge.malformed("ProxyHeader")
                self.force_close()
                return
            if found is None:
                return
            self.source, data, self.header = found.source, self.header[found.length :], None
        super().data_received(data)

    @property
    def peername(self) -> Any:
        """The address of the client, of whom `web.Request.remote` tells."""
        if self.source is not None:
            return (self.source, 0)
        return self.transport and self.transport.get_extra_info("peername")

    def stop_timer(self) -> None:
        """A head is complete. The next one is awaited when this request is answered."""
        if self.timer is not None:
            self.timer.cancel()

    async def finish_response(self, *arguments: Any) -> tuple[web.StreamResponse, bool]:
        try:
            return await super().finish_response(*arguments)
        finally:
            self.stop_timer()
            self.timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP, and close the connection."""
        response = as_response(self.server.edge.malformed(type(exc).__name__))
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        response.force_close()
        return response


class Listener:
    """A running server. `ports` are those it listens on (useful where 0 was asked)."""

    def __init__(
        self,
        app: web.Application,
        server: Any,
        sockets: Sequence[socket.socket],
        drain_seconds: float,
    ) -> None:
        self.server = server
        self.acceptors: list[asyncio.AbstractServer] = []
        self.ports = tuple(dict.fromkeys(s.getsockname()[1] for s in sockets))
        self._app = app
        self._drain_seconds = drain_seconds

    def count_connections(self) -> int:
        """How many connections are open."""
        return len(self.server.connections)

    async def close(self) -> None:
        """Refuse new connections, let running requests end (up to the drain limit), then close."""
        for acceptor in self.acceptors:
            acceptor.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds + 1):  # for peers that do not read
                await asyncio.sleep(0)
                self.server.pre_shutdown()
                await self._app.shutdown()
                await self.server.shutdown(self._drain_seconds)
                await self._app.cleanup()


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
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # of what it accepts
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
    proxy_protocol: bool = False,
) -> Listener:
    """Serve `app` behind `edge` on bound sockets. How long callers may take is `app[LIMITS]`, where
    it is set. With `proxy_protocol` a connection begins with its header.
    """
    app.on_startup.freeze()
    await app.startup()
    app.freeze()
    limits = app.get(LIMITS, Limits())
    server: Any
    try:
        from broker.web.fast_path import checked_server

        server = await checked_server(edge, limits, proxy_protocol=proxy_protocol)
    except Exception as changed:  # noqa: BLE001 - whatever another aiohttp does, the service runs
        edge.log("fast_path_off", severity=logging.WARNING, **fault(changed))
        server = _PlainServer(edge, limits, proxy_protocol=proxy_protocol)
    listener = Listener(app, server, sockets, drain_seconds)
    loop = asyncio.get_running_loop()
    for listening in sockets:
        acceptor = await loop.create_server(server, sock=listening, backlog=_BACKLOG)
        listener.acceptors.append(acceptor)
    return listener
