"""One connection to one Redis server, shared by every caller of the process.

**Why.** redis-py takes a connection from a pool for each command, packs, writes, waits, reads and gives it back: 30 to 50 microseconds of
our CPU, several times what the server needs. Here callers queue. What gathers in a few turns of the event loop (`broker.gathering`) goes
out in one write, the replies come back in the order of the commands, and each is handed to the caller whose turn it is as soon as its bytes
are here. The connection is redis-py's: making it, TLS, AUTH and SELECT stay there. Once it stands, its transport speaks to us; hiredis
packs and parses, as it does for redis-py, and redis-py names the errors.

**Nothing is sent twice.** A command is written once or not at all. Whoever gave up before the write is left out of it; whoever gave up
after it leaves a place in the queue, so their reply is dropped and never given to another. When the connection ends, everybody who
waits gets a `ConnectionError`: whether the server acted is unknown, and a one-time command that is repeated would burn what it took.
The next command opens a new connection.

**Every wait has an end.** One clock tick for all callers, every 50 ms while somebody waits: it fails the callers whose own limit has
passed. It ends the connection when the reply that is due next has been out for the whole limit, for then the server hangs or the network
swallows, and everybody behind that reply would wait in vain. A server that answers others answers us: replies have one order, so a slow
script delays all callers of this process by its own time, as it does all clients of a server with one thread.

A replica refuses writes with READONLY. After a failover that is what the old address may be, so such a reply ends the connection too, and
the next one asks the name service again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, cast

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool, DefaultParser
from redis.exceptions import ConnectionError as Lost
from redis.exceptions import InvalidResponse, ReadOnlyError, RedisError

from broker.gathering import Gathering

_TICK = 0.05
_NOT_YET = object()


class _Waiting:
    """A caller: its reply's future, the loop's time by which it must be here, and when it was written. `whole`: it got the whole limit."""

    __slots__ = ("deadline", "packed", "reply", "sent", "whole")

    def __init__(self, packed: bytes, reply: asyncio.Future[Any], deadline: float, whole: bool) -> None:
        self.packed = packed
        self.reply = reply
        self.deadline = deadline
        self.whole = whole
        self.sent = 0.0


class _Link(asyncio.Protocol):
    """A connection and its queue, from connecting to its end. An ended one is never used again."""

    def __init__(self, connection: AbstractConnection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._replies = hiredis.Reader(
            protocolError=InvalidResponse, replyError=DefaultParser.parse_error, notEnoughData=_NOT_YET
        )
        self._unsent: list[_Waiting] = []
        self._due: deque[_Waiting] = deque()
        self._gathering = Gathering(self._unsent, self._due, self._write)
        self._tick: asyncio.TimerHandle | None = None
        self._postponed = False
        self._over = asyncio.Event()
        self.ended = False
        self._life = self._loop.create_task(self._live(), name="redis")

    def ask(self, packed: bytes, limit: float) -> asyncio.Future[Any]:
        """Queue a command; the future has its reply."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._unsent.append(_Waiting(packed, reply, self._loop.time() + limit, limit >= self._timeout))
        self._gathering.come()
        if self._tick is None:
            self._tick = self._loop.call_later(_TICK, self._look_at_the_clock)
        return reply

    async def _live(self) -> None:
        fault: BaseException = Lost("the connection was closed")
        try:
            async with asyncio.timeout(self._timeout):
                await self._connection.connect()  # type: ignore[no-untyped-call]  # redis-py
            writer = self._connection._writer
            assert writer is not None, "it is connected"
            self._transport = writer.transport
            self._transport.set_protocol(self)
            self._write()
            await self._over.wait()
        except (RedisError, OSError, TimeoutError) as raised:
            fault = raised
        except asyncio.CancelledError:  # `end` was called while it connected
            pass
        finally:
            self._fail(fault)
            await self._connection.disconnect(nowait=True)

    def _write(self) -> None:
        """Everything queued in one write, but for who gave up."""
        if self.ended or self._transport is None:
            return
        now = self._loop.time()
        chunks: list[bytes] = []
        for waiting in self._unsent:
            if not waiting.reply.done():
                waiting.sent = now
                chunks.append(waiting.packed)
                self._due.append(waiting)
        self._unsent.clear()
        if chunks:
            self._transport.write(b"".join(chunks))

    def data_received(self, data: bytes) -> None:
        """Hand out replies, in order, to their callers."""
        try:
            self._replies.feed(data)
            while (reply := self._replies.gets()) is not _NOT_YET:
                if not self._due:
                    raise Lost("a reply that nobody asked for")
                future = self._due.popleft().reply
                if not future.done():
                    if isinstance(reply, Exception):
                        future.set_exception(reply)
                    else:
                        future.set_result(reply)
                if isinstance(reply, ReadOnlyError):
                    raise Lost("the server is a replica") from reply
        except RedisError as fault:
            self.end(fault)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(exc or Lost("the server closed the connection"))

    def _look_at_the_clock(self) -> None:
        now = self._loop.time()
        assert self._tick is not None
        if now - self._tick.when() > _TICK and not self.ended and not self._postponed:
            # We were late ourselves, so replies may lie unread: they come first. Once, for a loop may be late at every tick.
            self._postponed = True
            self._tick = self._loop.call_later(_TICK, self._look_at_the_clock)
            return
        self._postponed = False
        for waiting in (*self._due, *self._unsent):
            if waiting.deadline <= now and not waiting.reply.done():
                waiting.reply.set_exception(TimeoutError())
        # Who was given the whole limit has waited it out since before the write; nobody new shall queue behind that reply.
        if self._due and (
            self._due[0].sent + self._timeout <= now or (self._due[0].whole and self._due[0].deadline <= now)
        ):
            self.end(TimeoutError())
        self._tick = (
            self._loop.call_later(_TICK, self._look_at_the_clock)
            if (self._due or self._unsent) and not self.ended
            else None
        )

    def end(self, fault: BaseException) -> None:
        """Fail whoever waits, and close."""
        self._fail(fault)
        if self._transport is None:
            self._life.cancel()
        self._over.set()

    def _fail(self, fault: BaseException) -> None:
        self.ended = True
        for waiting in (*self._due, *self._unsent):
            if not waiting.reply.done():
                lost = Lost(type(fault).__name__)  # each its own: a raised one grows a trace
                lost.__cause__ = fault
                waiting.reply.set_exception(lost)
        self._due.clear()
        self._unsent.clear()

    async def closed(self) -> None:
        await asyncio.wait([self._life])


class Sender:
    """Commands to one server. `timeout` in seconds limits a wait for the server, and the making of a connection."""

    def __init__(self, pool: ConnectionPool, *, timeout: float) -> None:
        self._pool = pool
        self._timeout = timeout
        self._link: _Link | None = None

    def _connection(self) -> AbstractConnection:
        return cast("AbstractConnection", self._pool.make_connection())  # type: ignore[no-untyped-call]  # redis-py

    def ask(self, *command: Any, limit: float) -> asyncio.Future[Any]:
        """The reply to a command, within `limit` seconds.

        Raises (by the future):
            TimeoutError, OSError, RedisError: no reply, or one that refuses. It is not known whether the server acted.
        """
        link = self._link
        if link is None or link.ended:
            link = self._link = _Link(self._connection(), self._timeout)
        packed: bytes = hiredis.pack_command(command)
        return link.ask(packed, limit)

    async def close(self) -> None:
        """End the connection. Who waits is failed."""
        link, self._link = self._link, None
        if link is not None:
            link.end(Lost("closing"))
            await link.closed()
