"""Multiplexed Redis connection: all callers of the process pipeline their commands over one
connection.

**Why no library's.** redis-py takes a connection from a pool for each command: 30 to 50 us of the
broker's CPU a command, against 3 us here. Commands that arrive together (`broker.batching`) go out
in one write, and replies are handed out in the order of the commands. With redis-py's client a
login costs 1.88 times as much CPU (16 in flight, 12 pairs, quartiles 1.62 to 1.97). redis-py still
connects: TLS, AUTH and SELECT are its part. It also names the errors; hiredis packs and parses.

**Private name of redis-py.** `Connection._writer` is how the connected transport is found. If that
name changes, the first command fails at start-up.

**No command is sent twice.** A command is written once or not at all. A command whose caller gave
up before the write is left out. The reply to a caller who gave up later is dropped. When the
connection ends, each waiting caller gets a `ConnectionError`: it is unknown whether the server
acted, and a repeated take would lose the value. The next command opens a new connection.

**Every wait has an end.** A timer fails overdue callers every 50 ms. It ends the connection when
the next reply has been due for the whole limit: the server hangs or the network drops, and every
later reply is behind that one. Replies have one order, so a slow script delays all callers of the
process, as it delays all clients of a server with one thread.

A reply of READONLY or NOREPLICAS ends the connection too, and a new connection finds the primary
again. READONLY comes from a primary that became a replica. NOREPLICAS comes from a primary whose
replicas have left for a newer one; Sentinels demote the former primary 10 s later.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool, DefaultParser
from redis.exceptions import ConnectionError as Lost
from redis.exceptions import InvalidResponse, ReadOnlyError, RedisError, ResponseError

from broker.batching import FlushPolicy

_TICK = 0.05
_LATE = 0.005  # seconds
_TERM_AGE = 1.0  # seconds after which the term is read again
_TERM = re.compile(rb"role:master\r\n.*?master_replid:([0-9a-f]{16})", re.DOTALL)
_NOT_YET = object()
_ASKING: bytes = hiredis.pack_command(("ASKING",))

PROBE = b"ready"  # the key that `check` writes


def term_of(info: bytes) -> bytes:
    """The term of a server by its INFO replication, b"" if it is no primary."""
    found = _TERM.search(info)
    return found[1] if found else b""


@dataclass(slots=True, eq=False)
class _Command:
    """A command and its caller: the future of the reply, its deadline by the loop's time, and the
    time of the write.

    `whole`: the caller was given the whole limit. `asking`: ASKING is sent before the command, and
    its reply, which comes first, is dropped.
    """

    packed: bytes
    reply: asyncio.Future[Any]
    deadline: float
    whole: bool
    asking: bool
    sent: float = 0.0


class _Stream(asyncio.Protocol):
    """One stream to the server and its queue, from connecting to its end. An ended stream is never
    used again. `on_end` is called when it ends by a fault."""

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
        self._unsent: list[_Command] = []
        self.due: deque[_Command] = deque()
        self._tick: asyncio.TimerHandle | None = None
        self._postponed = False
        self._over = asyncio.Event()
        self.ended = False
        self.term = b""
        self.term_until = 0.0  # by the loop's time
        batch.streams.add(self)
        self._life = self._loop.create_task(self._live(), name="redis")

    @property
    def idle(self) -> bool:
        """True if no caller waits."""
        return not self.due and not self._unsent

    def ask(self, packed: bytes, limit: float, asking: bool, patient: bool) -> asyncio.Future[Any]:
        """Queue a command; the future has its reply."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        deadline = self._loop.time() + limit
        self._unsent.append(_Command(packed, reply, deadline, limit >= self._timeout, asking))
        if patient:
            self._batch.join(self)
        else:
            self._batch.come(self)
        if self._tick is None:
            self._tick = self._loop.call_later(_TICK, self._fail_overdue)
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
        except (RedisError, OSError, TimeoutError, ValueError) as raised:
            fault = raised  # ValueError: the host is no name
        except asyncio.CancelledError:  # `end` was called while it connected
            pass
        finally:
            self._fail(fault)
            await self._connection.disconnect(nowait=True)

    def write(self) -> None:
        """Write every queued command whose caller still waits, in one piece."""
        if self.ended or self._transport is None:
            return
        now = self._loop.time()
        chunks: list[bytes] = []
        for command in self._unsent:
            if not command.reply.done():
                command.sent = now
                chunks.append(_ASKING + command.packed if command.asking else command.packed)
                self.due.append(command)
        self._unsent.clear()
        if chunks:
            self._transport.write(b"".join(chunks))

    def data_received(self, data: bytes) -> None:
        """Hand out replies, in order, to their callers."""
        try:
            self._replies.feed(data)
            while (reply := self._replies.gets()) is not _NOT_YET:
                if not self.due:
                    raise Lost("a reply without a command")
                if self.due[0].asking:
                    self.due[0].asking = False
                    continue
                future = self.due.popleft().reply
                if not future.done():
                    if isinstance(reply, Exception):
                        future.set_exception(reply)
                    else:
                        future.set_result(reply)
                if isinstance(reply, ResponseError) and (
                    isinstance(reply, ReadOnlyError) or str(reply).startswith("NOREPLICAS")
                ):
                    raise Lost("the server takes no writes") from reply
        except RedisError as fault:
            self.end(fault)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(exc or Lost("the server closed the connection"))

    def _fail_overdue(self) -> None:
        now = self._loop.time()
        assert self._tick is not None
        if now - self._tick.when() > _TICK and not self.ended and not self._postponed:
            # The loop was late, so replies may lie unread: they come first. Once, for a loop may be
            # late at every tick.
            self._postponed = True
            self._tick = self._loop.call_later(_TICK, self._fail_overdue)
            return
        self._postponed = False
        for command in (*self.due, *self._unsent):
            if command.deadline <= now and not command.reply.done():
                command.reply.set_exception(TimeoutError())
        # A caller with the whole limit has waited since before the write. No new command shall
        # queue behind that reply.
        if self.due and (
            self.due[0].sent + self._timeout <= now
            or (self.due[0].whole and self.due[0].deadline <= now)
        ):
            self.end(TimeoutError())
        self._tick = (
            self._loop.call_later(_TICK, self._fail_overdue)
            if not self.idle and not self.ended
            else None
        )

    def end(self, fault: BaseException) -> None:
        """Fail every caller that waits, and close."""
        self._fail(fault)
        if self._transport is None:
            self._life.cancel()
        self._over.set()

    def _fail(self, fault: BaseException) -> None:
        if not self.ended:
            self.ended = True
            self._batch.leave(self)
            self.on_end()
        for command in (*self.due, *self._unsent):
            if not command.reply.done():
                lost = Lost(type(fault).__name__)  # one for each: a raised exception grows a trace
                lost.__cause__ = fault
                command.reply.set_exception(lost)
        self.due.clear()
        self._unsent.clear()

    async def closed(self) -> None:
        """Wait until the stream is closed."""
        await asyncio.wait([self._life])


class Batch:
    """Micro-batch of several connections: their commands are flushed together. The nodes of a
    cluster share one.

    With a batch for each of three nodes, whose sizes vary, commands wait far longer: a login cost
    1.47 times a single server's CPU, and 1.08 times with one batch (16 in flight).
    """

    def __init__(self) -> None:
        self.streams: set[_Stream] = set()
        self._queue: list[_Stream] = []  # one entry a command
        self._patient: set[_Stream] = set()  # with commands that nobody waits for
        self._late: asyncio.TimerHandle | None = None
        self._policy = FlushPolicy(self._queue, self, self._flush)

    def join(self, stream: _Stream) -> None:
        """Note a command that nobody waits for. It goes with the next batch, `_LATE` from now at
        the latest, and doesn't count as one of its commands: else the policy would wait for as many
        callers. Counted, the charges of rate limits make a login cost 1.23 times as much CPU
        (16 in flight, 10 pairs, quartiles 1.12 to 1.37).
        """
        self._patient.add(stream)
        if self._late is None:
            self._late = asyncio.get_running_loop().call_later(_LATE, self._flush)

    def come(self, stream: _Stream) -> None:
        """Note a command that was queued for this stream."""
        self._queue.append(stream)
        self._policy.schedule()

    def leave(self, stream: _Stream) -> None:
        """Forget a stream that has ended."""
        self.streams.discard(stream)
        self._patient.discard(stream)
        self._queue[:] = [other for other in self._queue if other is not stream]

    def _flush(self) -> None:
        streams = self._patient.union(self._queue)
        self._queue.clear()
        self._patient.clear()
        if self._late is not None:
            self._late.cancel()
            self._late = None
        for stream in streams:
            stream.write()

    def __len__(self) -> int:
        """The number of commands sent and not answered yet."""
        return sum(len(stream.due) for stream in self.streams)


class MultiplexedConnection:
    """Commands to one server over one connection, which is made when a command needs it.

    `pool` gives redis-py's pool that makes a connection; its credentials may differ by then.
    `timeout` in seconds limits a wait for the server, and the making of a connection. `on_end` is
    called when a connection ends by a fault.
    """

    def __init__(
        self,
        pool: Callable[[], ConnectionPool],
        *,
        timeout: float,
        batch: Batch | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._timeout = timeout
        self._batch = Batch() if batch is None else batch
        self._on_end = on_end
        self._stream: _Stream | None = None
        self.known_term = b""  # the last one, of any stream
        self.term_changes = 0
        self.moves = 0  # a single server names no other owner

    @property
    def idle(self) -> bool:
        """True if no caller waits."""
        return self._stream is None or self._stream.idle

    def ask(
        self, *command: Any, limit: float, asking: bool = False, patient: bool = False
    ) -> asyncio.Future[Any]:
        """The reply to a command, within `limit` seconds. `asking`: the server is the node of a
        cluster to which the command's slot is being moved. `patient`: nobody waits for the reply.

        Raises (by the future):
            TimeoutError, OSError, RedisError: no reply, or one that refuses. It is not known
            whether the server acted.
        """
        packed: bytes = hiredis.pack_command(command)
        return self._open().ask(packed, limit, asking, patient)

    async def term(self, key: bytes, *, limit: float) -> bytes:
        """The server's term (`term_of`): read when the connection is made, and again by the first
        caller after a second. Callers beside that one get the earlier term.

        Raises:
            TimeoutError, OSError, RedisError: no reply.
        """
        stream, now = self._open(), asyncio.get_running_loop().time()
        if not stream.term or stream.term_until <= now:
            stream.term_until = now + _TERM_AGE
            stream.term = term_of(await self.ask("INFO", "replication", limit=limit))
            if stream.term and stream.term != self.known_term:
                self.term_changes += self.known_term != b""
                self.known_term = stream.term
        return stream.term

    def forget_terms(self) -> None:
        """Have `term` read anew."""
        if self._stream is not None:
            self._stream.term = b""

    async def survey(self, *command: Any, connections: int, limit: float) -> list[list[Any]]:
        """The replies to a command over so many new connections, in a list of one.

        Raises:
            TimeoutError, OSError, RedisError: no reply, or one that refuses.
        """
        made = [
            MultiplexedConnection(self._pool, timeout=self._timeout) for _ in range(connections)
        ]
        try:
            return [await asyncio.gather(*(one.ask(*command, limit=limit) for one in made))]
        finally:
            for one in made:
                await one.close()

    def _open(self) -> _Stream:
        """The stream, a new one if it has ended."""
        stream = self._stream
        if stream is None or stream.ended:
            self._held = self._pool()  # a connection of Sentinels has a weak reference to it
            made = cast("AbstractConnection", self._held.make_connection())  # type: ignore[no-untyped-call]  # redis-py
            stream = self._stream = _Stream(made, self._timeout, self._batch, self._on_end)
        return stream

    async def check(self, *, limit: float) -> None:
        """Raise what `ask` raises unless the server takes a write."""
        await self.ask("SET", PROBE, b"", "PX", 1000, limit=limit)

    async def close(self) -> None:
        """End the connection. Callers that wait are failed."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.on_end = lambda: None
            stream.end(Lost("closing"))
            await stream.closed()
