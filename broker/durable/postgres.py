"""The connection pool to Postgres, its limits and faults.

**Every wait has a limit**: `timeout` for one statement, and never past the request's own deadline.
A connection whose statement did not end well is cut, not returned: its answer may still be on the
way, and asyncpg would otherwise wait for a server that does not answer. The pool is a stack of idle
connections and a queue of those who wait, no more: sessions here keep no state (no SET, no
temporary table, no advisory lock), so nothing is reset between two users of one, and a statement
costs one round trip. The server has the same limit (`statement_timeout`), for it does not notice a
cut while a statement waits for a lock: the sessions left behind would use up its `max_connections`.
Whatever the network or the server does wrong is `Unavailable`; a defect of ours (a syntax error,
say) stays an exception. An unknown outcome of a commit is a failure to the caller.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from datetime import datetime
from typing import Any, TypeAlias, TypeVar

import asyncpg

from broker.durable import migrations
from broker.durable.group_commit import GroupCommit, OwnStatement
from broker.durable.migrations import Patience
from broker.errors import Unavailable
from broker.telemetry import Metrics, Stopwatch, remaining

A = TypeVar("A")
T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_PATIENCE = Patience()

_DOWN = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
_NOT_MIGRATED = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError)


class Postgres:
    """At most `connections` connections. `timeout` in seconds limits one wait; they are made when
    needed, so `open` needs no server.
    """

    def __init__(self, url: str, *, timeout: float, connections: int, metrics: Metrics) -> None:
        self._url = url
        self._timeout = timeout
        self._metrics = metrics
        self._wanted = 0
        self._room = connections  # for further connections
        self._idle: list[Connection] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._busy: set[Connection] = set()
        self._closed = False

    async def open(self) -> None:
        """Get ready. No connection is made yet."""
        self._wanted = migrations.sql_files()[-1][0]

    async def close(self) -> None:
        """Close every connection, at once where the server does not answer."""
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in (*idle, *self._busy):
            try:
                await connection.close(timeout=self._timeout)
            except _DOWN:
                connection.terminate()

    async def run(self, operation: str, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` on a connection, within the limit.

        Raises:
            Unavailable: the server is down, slow, full, lacks a migration, or denies our role what
                it needs.
        """
        connection: Connection | None = None
        sound = False
        try:
            with Stopwatch(self._metrics, "postgres", operation):
                async with asyncio.timeout(remaining(self._timeout)):
                    connection = await self._acquire()
                    result = await work(connection)
            sound = True
        except _NOT_MIGRATED as fault:
            raise Unavailable(reason="postgres_not_migrated") from fault
        except asyncpg.InsufficientPrivilegeError as fault:
            raise Unavailable(reason="postgres_denied") from fault
        except _DOWN as fault:
            raise Unavailable(reason="postgres") from fault
        finally:
            if connection is not None:
                self._release(connection, sound=sound)
        return result

    async def _acquire(self) -> Connection:
        """An idle connection, the one used last, for its server process is warm; a new one where
        there is room; else wait in line.
        """
        while self._waiting or not (self._idle or self._room):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._call_next()  # the turn came as we left
                raise
            if self._idle or self._room:
                break
        if self._closed:
            raise asyncpg.InterfaceError("closing")
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                self._busy.add(connection)
                return connection
            self._room += 1
        return await self._connect()

    async def _connect(self) -> Connection:
        self._room -= 1
        try:
            connection: Connection = await asyncpg.connect(
                self._url,
                timeout=self._timeout,
                server_settings={
                    "application_name": "passkey-broker",
                    "statement_timeout": str(max(1, round(self._timeout * 1000))),  # ms
                },
            )
        except BaseException:
            self._room += 1
            self._call_next()
            raise
        self._busy.add(connection)
        try:
            await _init(connection)
        except BaseException:
            self._release(connection, sound=False)
            raise
        return connection

    def _release(self, connection: Connection, *, sound: bool) -> None:
        self._busy.discard(connection)
        if sound and not connection.is_closed() and not self._closed:
            self._idle.append(connection)
        else:
            connection.terminate()
            self._room += 1
        self._call_next()

    def _call_next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def group_commit(
        self,
        operation: str,
        statement: Callable[[Sequence[A], bool], Awaitable[Sequence[T | OwnStatement]]],
        *,
        key: Callable[[A], Hashable] = id,
    ) -> Callable[[A], Awaitable[T]]:
        """`statement` for one caller, who shares it with others that come at the same time, within
        the caller's limit.
        """
        return GroupCommit(
            operation, statement, timeout=self._timeout, metrics=self._metrics, key=key
        ).submit

    async def row(self, operation: str, sql: str, *values: object) -> asyncpg.Record | None:
        return await self.run(operation, lambda c: c.fetchrow(sql, *values))

    async def rows(self, operation: str, sql: str, *values: object) -> list[asyncpg.Record]:
        return await self.run(operation, lambda c: c.fetch(sql, *values))

    # -- schema ------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Raise `Unavailable` unless the server takes writes and has every migration this code
        needs.
        """
        row = await self.row(
            "check",
            "SELECT max(version) AS version, current_setting('transaction_read_only')::boolean AS read_only FROM schema_migrations",
        )
        assert row is not None, "an aggregate without GROUP BY has one row"
        if row["read_only"]:  # a standby, too
            raise Unavailable(reason="postgres")
        if (row["version"] or 0) < self._wanted:
            raise Unavailable(reason="postgres_not_migrated")

    async def facts(self) -> dict[str, Any]:
        """For `broker doctor`: version, and seconds since the epoch by the server's clock."""
        row = await self.row(
            "facts",
            "SELECT current_setting('server_version_num')::int / 10000 AS version, extract(epoch FROM clock_timestamp())::float8 AS clock",
        )
        assert row is not None, "a SELECT without FROM has one row"
        return dict(row)

    async def migrate(self, now: datetime, patience: Patience = _PATIENCE) -> list[str]:
        """Apply the migrations that are missing and return their names.

        Raises:
            MigrationFault: see `broker.durable.migrations.migrate`.
        """
        return await migrations.migrate(self._url, now, patience)


async def _init(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    await connection.set_type_codec(
        "jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog"
    )
