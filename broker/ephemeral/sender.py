"""One connection to one Redis server, shared by every caller of the process.

**Why.** redis-py takes a connection from a pool for each command, packs, writes, waits, reads and
gives it back: 30 to 50 microseconds of our CPU, several times what the server needs. Here callers
queue. What gathers in a few turns of the event loop (`broker.gathering`) goes out in one write, the
replies come back in the order of the commands, and each is handed to the caller whose turn it is as
soon as its bytes are here. The connection is redis-py's: making it, TLS, AUTH and SELECT stay
there. Once it stands, its transport speaks to us; hiredis packs and parses, as it does for
redis-py, and redis-py names the errors.

**Nothing is sent twice.** A command is written once or not at all. Whoever gave up before the write
is left out of it; whoever gave up after it leaves a place in the queue, so their reply is dropped
and never given to another. When the connection ends, everybody who waits gets a `ConnectionError`:
whether the server acted is unknown, and a one-time command that is repeated would burn what it
took. The next command opens a new connection.

**Every wait has an end.** One clock tick for all callers, every 50 ms while somebody waits: it
fails the callers whose own limit has passed. It ends the connection when the reply that is due next
has been out for the whole limit, for then the server hangs or the network swallows, and everybody
behind that reply would wait in vain. A server that answers others answers us: replies have one
order, so a slow script delays all callers of this process by its own time, as it does all clients
of a server with one thread.

A replica refuses writes with READONLY. After a failover that is what the old address may be, so
such a reply ends the connection too, and the next one asks the name service again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool, DefaultParser
from redis.exceptions import ConnectionError as Lost
from redis.exceptions import InvalidResponse, ReadOnlyError, RedisError

from broker.gathering import Gathering

_TICK = 0.05
_NOT_YET = object()
_ASKING: bytes = hiredis.pack_command(("ASKING",))

PROBE = b"ready"  # the key that `check` writes


class _Waiting:
    """A caller: its reply's future, the loop's time by which it must be here, and when it was
    written. `whole`: it got the whole limit. `asking`: ASKING is sent right before the command."""

    __slots__ = ("asking", "deadline", "packed", "reply", "sent", "whole")

    def __init__(
        self, packed: bytes, reply: asyncio.Future[Any], deadline: float, whole: bool, asking: bool
    ) -> None:
        self.packed = packed
        self.reply = reply
        self.deadline = deadline
        self.whole = whole
        self.asking = asking
        self.sent = 0.0


class _Link(asyncio.Protocol):
    """A connection and its queue, from connecting to its end. An ended one is never used again.
    `on_end` is called when it ends by a fault."""

    def __init__(
        self,
        connection: AbstractConnection,
        timeout: float,
        batch: Batch,
        on_end: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._batch = batch
        self._timeout = timeout
        self.on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._replies = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=DefaultParser.parse_error,
            notEnoughData=_NOT_YET,
        )
        self._unsent: list[_Waiting] = []
        self.due: deque[_Waiting] = deque()
        self._tick: asyncio.TimerHandle | None = None
        self._postponed = False
        self._over = asyncio.Event()
        self.ended = False
        batch.links.add(self)
        self._life = self._loop.create_task(self._live(), name="redis")

    @property
    def idle(self) -> bool:
        """Whether no caller waits."""
        return not self.due and not self._unsent

    def ask(self, packed: bytes, limit: float, asking: bool) -> asyncio.Future[Any]:
        """Queue a command; the future has its reply."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        deadline = self._loop.time() + limit
        self._unsent.append(_Waiting(packed, reply, deadline, limit >= self._timeout, asking))
        self._batch.come(self)
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
            self.write()
            await self._over.wait()
        except (RedisError, OSError, TimeoutError) as raised:
            fault = raised
        except ValueError as raised:  # the host is no name
            fault = raised
        except asyncio.CancelledError:  # `end` was called while it connected
            pass
        finally:
            self._fail(fault)
            await self._connection.disconnect(nowait=True)

    def write(self) -> None:
        """Everything queued in one write, but for who gave up."""
        if self.ended or self._transport is None:
            return
        now = self._loop.time()
        chunks: list[bytes] = []
        for waiting in self._unsent:
            if not waiting.reply.done():
                waiting.sent = now
                if waiting.asking:
                    chunks.append(_ASKING)
                    self.due.append(self._nobody(now))
                chunks.append(waiting.packed)
                self.due.append(waiting)
        self._unsent.clear()
        if chunks:
            self._transport.write(b"".join(chunks))

    def _nobody(self, now: float) -> _Waiting:
        """A place in the queue whose reply is dropped."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        reply.cancel()
        made = _Waiting(b"", reply, now, False, False)
        made.sent = now
        return made

    def data_received(self, data: bytes) -> None:
        """Hand out replies, in order, to their callers."""
        try:
            self._replies.feed(data)
            while (reply := self._replies.gets()) is not _NOT_YET:
                if not self.due:
                    raise Lost("a reply that nobody asked for")
                future = self.due.popleft().reply
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
            # We were late ourselves, so replies may lie unread: they come first. Once, for a loop
            # may be late at every tick.
            self._postponed = True
            self._tick = self._loop.call_later(_TICK, self._look_at_the_clock)
            return
        self._postponed = False
        for waiting in (*self.due, *self._unsent):
            if waiting.deadline <= now and not waiting.reply.done():
                waiting.reply.set_exception(TimeoutError())
        # Who was given the whole limit has waited it out since before the write; nobody new shall
        # queue behind that reply.
        if self.due and (
            self.due[0].sent + self._timeout <= now
            or (self.due[0].whole and self.due[0].deadline <= now)
        ):
            self.end(TimeoutError())
        self._tick = (
            self._loop.call_later(_TICK, self._look_at_the_clock)
            if (self.due or self._unsent) and not self.ended
            else None
        )

    def end(self, fault: BaseException) -> None:
        """Fail whoever waits, and close."""
        self._fail(fault)
        if self._transport is None:
            self._life.cancel()
        self._over.set()

    def _fail(self, fault: BaseException) -> None:
        if not self.ended:
            self.ended = True
            self._batch.leave(self)
            self.on_end()
        for waiting in (*self.due, *self._unsent):
            if not waiting.reply.done():
                lost = Lost(type(fault).__name__)  # each its own: a raised one grows a trace
                lost.__cause__ = fault
                waiting.reply.set_exception(lost)
        self.due.clear()
        self._unsent.clear()

    async def closed(self) -> None:
        await asyncio.wait([self._life])


class Batch:
    """Micro-batch of several connections: their commands are flushed together. The nodes of a
    cluster share one. With a batch for each of three nodes, whose sizes vary, queues wait far
    longer to gather: a login cost 1.47 times a single server's CPU then, and 1.08 times with one
    batch (16 in flight)."""

    def __init__(self) -> None:
        self.links: set[_Link] = set()
        self._queue: list[_Link] = []  # one entry a command
        self._gathering = Gathering(self._queue, self, self._flush)

    def come(self, link: _Link) -> None:
        """A command was queued for this connection."""
        self._queue.append(link)
        self._gathering.come()

    def leave(self, link: _Link) -> None:
        """A connection has ended."""
        self.links.discard(link)
        self._queue[:] = [other for other in self._queue if other is not link]

    def _flush(self) -> None:
        links = set(self._queue)
        self._queue.clear()
        for link in links:
            link.write()

    def __len__(self) -> int:
        """How many commands were sent and not answered yet."""
        return sum(len(link.due) for link in self.links)


class Sender:
    """Commands to one server. `timeout` in seconds limits a wait for the server, and the making of
    a connection. `on_end` is called when a connection ends by a fault."""

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        timeout: float,
        batch: Batch | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._timeout = timeout
        self._batch = Batch() if batch is None else batch
        self._on_end = on_end
        self._link: _Link | None = None

    @property
    def idle(self) -> bool:
        """Whether no caller waits."""
        return self._link is None or self._link.idle

    def _connection(self) -> AbstractConnection:
        return cast("AbstractConnection", self._pool.make_connection())  # type: ignore[no-untyped-call]  # redis-py

    def ask(self, *command: Any, limit: float, asking: bool = False) -> asyncio.Future[Any]:
        """The reply to a command, within `limit` seconds. `asking`: the server is the node of a
        cluster to which the command's slot is being moved.

        Raises (by the future):
            TimeoutError, OSError, RedisError: no reply, or one that refuses. It is not known
            whether the server acted.
        """
        link = self._link
        if link is None or link.ended:
            link = self._link = _Link(self._connection(), self._timeout, self._batch, self._on_end)
        packed: bytes = hiredis.pack_command(command)
        return link.ask(packed, limit, asking)

    async def check(self, *, limit: float) -> None:
        """Raise what `ask` raises unless the server takes a write."""
        await self.ask("SET", PROBE, b"", "PX", 1000, limit=limit)

    async def close(self) -> None:
        """End the connection. Who waits is failed."""
        link, self._link = self._link, None
        if link is not None:
            link.on_end = lambda: None
            link.end(Lost("closing"))
            await link.closed()
