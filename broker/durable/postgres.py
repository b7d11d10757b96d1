"""The connection pool to Postgres (asyncpg's), its limits and faults.

**Every wait has a limit**: `timeout` for one statement, and never past the request's own deadline.
The server has the same limit (`statement_timeout`), for it does not notice a closed connection
while a statement waits for a lock: the sessions left behind would use up its `max_connections`. A
connection whose statement was given up is closed, not returned: its answer may still be on the way.

**A fault of a connection expires all that are idle**, once for all statements that were under way.
Connections that a network dropped silently so fail one statement, not one each.

**One app can't use up the pool.** Statements that may wait for rows of one app take at most three
quarters of the connections; further ones wait, within their limit, without a connection.

Sessions keep no state (no SET, no temporary table, no advisory lock), so nothing is reset between
two users of a connection: that would be a round trip for each statement. Whatever the network or
the server does wrong is `Unavailable`; a defect of ours (a syntax error, say) stays an exception.
An unknown outcome of a commit is a failure to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import weakref
from collections.abc import Awaitable, Callable, Hashable, Sequence
from datetime import datetime
from typing import Any, TypeAlias, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from broker.durable import migrations
from broker.durable.group_commit import GroupCommit, OwnStatement
from broker.durable.migrations import Patience
from broker.errors import Unavailable
from broker.telemetry import Metrics, Stopwatch, remaining

A = TypeVar("A")
T = TypeVar("T")
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

_PATIENCE = Patience()
_IDLE = 60.0  # seconds: shorter than networks keep a silent connection

_LOST = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.ReadOnlySQLTransactionError,  # after a failover: the server has become a standby
)
_DOWN = (
    *_LOST,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
_NOT_MIGRATED = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
)


class _Connection(asyncpg.Connection):
    """A connection that closes without waiting: a lost server answers no Terminate message."""

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's
        self.terminate()


class Postgres:
    """At most `connections` connections. `timeout` in seconds limits one wait; they are made when
    needed, so `open` needs no server. `read_url` gives the URL for a connection, whose credentials
    may differ by then.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        connections: int,
        metrics: Metrics,
        read_url: Callable[[], str] | None = None,
    ) -> None:
        self._url = url
        self._read_url = read_url or (lambda: url)
        self._timeout = timeout
        self._connections = connections
        self._metrics = metrics
        self._wanted = 0
        self._expiries = 0
        self._shares: weakref.WeakValueDictionary[str, asyncio.Semaphore]
        self._shares = weakref.WeakValueDictionary()

    async def open(self) -> None:
        """Make the pool. No connection is made yet."""
        self._wanted = migrations.sql_files()[-1][0]
        self._pool: asyncpg.Pool[asyncpg.Record] = await asyncpg.create_pool(
            self._url,
            connect=self._connect,
            min_size=0,
            max_size=self._connections,
            max_inactive_connection_lifetime=_IDLE,
            connection_class=_Connection,
            init=_init,
            reset=_no_reset,
            timeout=self._timeout,
            command_timeout=self._timeout,  # also of a transaction's ROLLBACK
            server_settings={
                "application_name": "passkey-broker",
                "statement_timeout": str(max(1, round(self._timeout * 1000))),  # ms
            },
        )
        pool, readings = self._pool, self._metrics.postgres_connections
        readings.add(pool.get_idle_size, "idle")
        readings.add(lambda: pool.get_size() - pool.get_idle_size(), "busy")
        self._metrics.postgres_connections_limit.add(pool.get_max_size)

    async def _connect(
        self,
        dsn: str | None = None,
        **options: Any,
    ) -> asyncpg.Connection[asyncpg.Record]:
        return await asyncpg.connect(self._read_url(), **options)

    async def close(self) -> None:
        """Close every connection."""
        self._pool.terminate()

    async def run(
        self,
        operation: str,
        work: Callable[[Connection], Awaitable[T]],
        *,
        app_id: str | None = None,
    ) -> T:
        """Do `work` on a connection, within the limit. `app_id`: the app whose rows it may wait
        for.

        Raises:
            Unavailable: the server is down, slow, full, lacks a migration, or denies our role what
                it needs.
        """
        expiries = self._expiries
        try:
            with Stopwatch(self._metrics, "postgres", operation):
                async with asyncio.timeout(remaining(self._timeout)), self._share(app_id):
                    connection: Connection = await self._pool.acquire()
                    try:
                        return await work(connection)
                    except BaseException as fault:
                        if not isinstance(fault, asyncpg.PostgresError):
                            connection.terminate()
                        raise
                    finally:
                        await self._pool.release(connection)
        except _NOT_MIGRATED as fault:
            raise Unavailable(reason="postgres_not_migrated") from fault
        except asyncpg.InsufficientPrivilegeError as fault:
            raise Unavailable(reason="postgres_denied") from fault
        except _DOWN as fault:
            if isinstance(fault, _LOST) and expiries == self._expiries:
                self._expiries += 1
                await self._pool.expire_connections()
            raise Unavailable(reason="postgres") from fault

    def _share(self, app_id: str | None) -> contextlib.AbstractAsyncContextManager[None]:
        """An app's part of the pool."""
        if app_id is None:
            return contextlib.nullcontext()
        share = asyncio.Semaphore(max(1, self._connections * 3 // 4))
        return self._shares.setdefault(app_id, share)

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

    async def row(
        self, operation: str, sql: str, *values: object, app_id: str | None = None
    ) -> asyncpg.Record | None:
        return await self.run(operation, lambda c: c.fetchrow(sql, *values), app_id=app_id)

    async def rows(
        self, operation: str, sql: str, *values: object, app_id: str | None = None
    ) -> list[asyncpg.Record]:
        return await self.run(operation, lambda c: c.fetch(sql, *values), app_id=app_id)

    # -- schema ------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Raise `Unavailable` unless the server takes writes and has every migration this code
        needs.
        """
        row = await self.row(
            "check",
            "SELECT max(version) AS version,"
            " current_setting('transaction_read_only')::boolean AS read_only"
            " FROM schema_migrations",
        )
        assert row is not None, "an aggregate without GROUP BY has one row"
        if row["read_only"]:  # a standby, too
            raise Unavailable(reason="postgres")
        if (row["version"] or 0) < self._wanted:
            raise Unavailable(reason="postgres_not_migrated")

    async def facts(self) -> dict[str, Any]:
        """For `broker doctor`: version, seconds since the epoch by the server's clock, settings
        that commits and failovers rest on, the number of standbys, rights of our role, tables on
        which it lacks some, whether every role may create in the schema, and how many connections
        roles like ours may have. "" or None stands for a setting that a Postgres-compatible
        database lacks.
        """
        row = await self.row(
            "facts",
            """
            SELECT current_setting('server_version_num')::int / 10000 AS version,
                extract(epoch FROM clock_timestamp())::float8 AS clock,
                current_setting('synchronous_standby_names', true) AS synchronous_standbys,
                current_setting('fsync', true) AS fsync,
                current_setting('full_page_writes', true) AS full_page_writes,
                current_setting('synchronous_commit', true) AS synchronous_commit,
                (SELECT count(*) FROM pg_stat_replication) AS standbys,
                role.rolsuper AS superuser,
                EXISTS (
                    SELECT FROM pg_class
                    WHERE relnamespace = quote_ident(current_schema())::regnamespace
                        AND relkind IN ('r', 'p') AND pg_has_role(relowner, 'USAGE')
                ) AS owner,
                has_schema_privilege('public', current_schema(), 'CREATE') AS open_schema,
                -- Statements reach a partition by the rights on its parent.
                (
                    SELECT coalesce(string_agg(relname, ', ' ORDER BY relname), '') FROM pg_class
                    WHERE relnamespace = quote_ident(current_schema())::regnamespace
                        AND relkind IN ('r', 'p') AND NOT relispartition
                        AND NOT (has_table_privilege(oid, 'SELECT')
                            AND has_table_privilege(oid, 'INSERT')
                            AND has_table_privilege(oid, 'UPDATE')
                            AND has_table_privilege(oid, 'DELETE'))
                ) AS denied,
                least(
                    current_setting('max_connections')::int
                        - current_setting('superuser_reserved_connections')::int
                        - coalesce(current_setting('reserved_connections', true)::int, 0),
                    nullif(role.rolconnlimit, -1), nullif(datconnlimit, -1)
                ) AS connections
            FROM pg_roles AS role, pg_database
            WHERE rolname = current_user AND datname = current_database()
            """,
        )
        assert row is not None, "the role and the database are there"
        return dict(row)

    async def migrate(self, now: datetime, patience: Patience = _PATIENCE) -> list[str]:
        """Apply the migrations that are missing and return their names.

        Raises:
            MigrationFault: see `broker.durable.migrations.migrate`.
        """
        return await migrations.migrate(self._read_url(), now, patience)


async def _init(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    await connection.set_type_codec(
        "jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog"
    )


async def _no_reset(_: asyncpg.Connection[asyncpg.Record]) -> None:
    pass
