"""TCP proxies of the harness, which partition, delay and re-point connections.

A client reaches its server through a `Link`. A fault changes the link while connections are open:

    link.point(port)       another server; open connections are cut
    link.cut()             every connection is closed at once
    link.closed = True     a new connection is closed at once
    link.hold(...)         no byte passes; what was sent stays in the link until `release`
    link.lose_replies()    what the server sends on the open connections is dropped
    link.delay             seconds that each piece of data waits, in both directions

Replication connections of Valkey are told apart by their first commands (`Connection.replicates`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Connection:
    """A connection through a link."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    replicates: bool = False
    mute: bool = False
    passing: asyncio.Event = field(default_factory=asyncio.Event)

    def close(self) -> None:
        self.client.close()
        self.server.close()


Chosen = Callable[[Connection], bool]


def every(_: Connection) -> bool:
    return True


def replication(connection: Connection) -> bool:
    return connection.replicates


@dataclass(eq=False, slots=True)
class Link:
    """A proxy on a port of the loopback interface in front of the server at `target`."""

    target: int
    port: int = 0
    delay: float = 0.0
    closed: bool = False
    holds: Chosen | None = None
    connections: set[Connection] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def open(self) -> Link:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def point(self, target: int) -> None:
        """Lead to another server."""
        if target != self.target:
            self.target = target
            self.cut()

    def cut(self, chosen: Chosen = every) -> None:
        """Close connections. Data that a hold keeps is lost."""
        for connection in [found for found in self.connections if chosen(found)]:
            connection.close()

    def hold(self, chosen: Chosen = every) -> None:
        """Let no byte pass on the chosen connections, present and future."""
        self.holds = chosen
        for connection in self.connections:
            self._judge(connection)

    def release(self) -> None:
        """Let everything pass again."""
        self.holds = None
        for connection in self.connections:
            connection.mute = False
            connection.passing.set()

    def lose_replies(self) -> None:
        """Drop what the server sends on the open connections."""
        for connection in self.connections:
            connection.mute = True

    def _judge(self, connection: Connection) -> None:
        if self.holds is not None and self.holds(connection):
            connection.passing.clear()
        else:
            connection.passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(asyncio.CancelledError):  # by `stop`; asyncio would log it
            await self._forward(reader, writer)
        writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closed:
            return
        try:
            upstream, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # no server listens there
            return
        connection = Connection(writer, server)
        self._judge(connection)
        self.connections.add(connection)
        ways = [
            asyncio.create_task(self._pump(connection, reader, server, to_server=True)),
            asyncio.create_task(self._pump(connection, upstream, writer, to_server=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            self.connections.discard(connection)
            connection.close()

    async def _pump(
        self,
        connection: Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        to_server: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if to_server and not connection.replicates and b"PSYNC" in data:
                    connection.replicates = True
                    self._judge(connection)
                if self.delay:
                    await asyncio.sleep(self.delay)
                await connection.passing.wait()
                if to_server or not connection.mute:
                    writer.write(data)
                    await writer.drain()
