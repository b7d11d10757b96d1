"""The connection pool to Postgres, its limits and faults, and the migrations.

**Every wait has a limit**: `timeout` for one statement, and never past the request's own deadline. A connection whose statement
did not end well is cut, not returned: its answer may still be on the way, and asyncpg would otherwise wait for a server that
does not answer. The server has the same limit (`statement_timeout`), for it does not notice a cut while a statement waits for a
lock: the sessions left behind would use up its `max_connections`. Whatever the network or the server does wrong is `Unavailable`; a defect of ours (a syntax error, say) stays an
exception. An unknown outcome of a commit is a failure to the caller.

**Migrations** are `sql/NNNN_name.sql`, applied in order under an advisory lock, each in its own transaction with its row in
`schema_migrations`. A schema newer than the code is fine: migrations keep old code running, so a roll-back is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import asyncpg

from broker.errors import Fault, Unavailable
from broker.telemetry import Metrics, Stopwatch, context

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

MIGRATION_LOCK = 0x7061_7373_6B65_79  # "passkey"

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


class MigrationFault(Fault):
    """The schema can't be brought up to date; the sentence says why."""


def sql_files() -> list[tuple[int, str, str]]:
    """The migrations in order: number, name, text. They stand beside the package in a checkout and inside it in a wheel."""
    package = Path(__file__).parent.parent
    folder = package / "sql" if (package / "sql").is_dir() else package.parent / "sql"
    files = sorted(folder.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    if not files:
        raise MigrationFault(f"No migrations found in {folder.name}/.")
    return [(int(f.name[:4]), f.stem, f.read_text()) for f in files]


class Postgres:
    """A pool of connections. `timeout` in seconds limits one wait; `open` connects lazily, so it succeeds without a server."""

    def __init__(self, url: str, *, timeout: float, connections: int, metrics: Metrics) -> None:
        self._url = url
        self._timeout = timeout
        self._connections = connections
        self._metrics = metrics
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._wanted = 0

    async def open(self) -> None:
        """Make the pool. No connection is made yet."""
        self._wanted = sql_files()[-1][0]
        self._pool = await asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=self._connections,
            timeout=self._timeout,
            max_queries=sys.maxsize,  # replacing a connection would wait for the server outside of any limit
            reset=_no_reset,
            server_settings={
                "application_name": "passkey-broker",
                "statement_timeout": str(max(1, round(self._timeout * 1000))),  # ms
            },
            init=_init,
        )

    async def close(self) -> None:
        """Close every connection, at once where the server does not answer."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            try:
                await asyncio.wait_for(pool.close(), self._timeout)
            except _DOWN:
                pool.terminate()

    async def run(self, operation: str, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` on a connection, within the limit.

        Raises:
            Unavailable: the server is down, slow, full, lacks a migration, or denies our role what it needs.
        """
        assert self._pool is not None, "opened by the composition root"
        connection: Connection | None = None
        try:
            with Stopwatch(self._metrics, "postgres", operation):
                async with asyncio.timeout(context().remaining(self._timeout)):
                    connection = await self._pool.acquire()
                    result = await work(connection)
        except _NOT_MIGRATED as fault:
            await self._cut(connection)
            raise Unavailable(reason="postgres_not_migrated") from fault
        except asyncpg.InsufficientPrivilegeError as fault:
            await self._cut(connection)
            raise Unavailable(reason="postgres_denied") from fault
        except _DOWN as fault:
            await self._cut(connection)
            raise Unavailable(reason="postgres") from fault
        except BaseException:
            await self._cut(connection)
            raise
        await self._pool.release(connection)
        return result

    async def _cut(self, connection: Connection | None) -> None:
        if connection is not None and self._pool is not None:
            connection.terminate()
            await self._pool.release(connection)

    async def row(self, operation: str, sql: str, *values: object) -> asyncpg.Record | None:
        return await self.run(operation, lambda c: c.fetchrow(sql, *values))

    async def rows(self, operation: str, sql: str, *values: object) -> list[asyncpg.Record]:
        return await self.run(operation, lambda c: c.fetch(sql, *values))

    # -- schema ---------------------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Raise `Unavailable` unless the server takes writes and has every migration this code needs."""
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

    async def migrate(self, now: datetime) -> list[str]:
        """Apply what is missing, under a lock, and return the names applied. Several instances may call it at once.

        Raises:
            MigrationFault: the server can't be reached or refuses, or an applied migration's text has changed since.
        """
        try:
            connection = await asyncpg.connect(self._url, timeout=10)
        except (*_DOWN, asyncpg.PostgresError) as fault:
            raise MigrationFault(
                f"Postgres can't be reached ({type(fault).__name__}); check BROKER_DATABASE_URL."
            ) from fault
        step = "The table of migrations"
        try:
            await connection.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (version integer PRIMARY KEY, name text NOT NULL,"
                " sha256 text NOT NULL, applied_at timestamptz NOT NULL)"
            )
            applied = {
                r["version"]: r["sha256"]
                for r in await connection.fetch("SELECT version, sha256 FROM schema_migrations")
            }
            names = []
            for version, name, text in sql_files():
                step = f"Migration {name}"
                sha256 = hashlib.sha256(text.encode()).hexdigest()
                if version in applied:
                    if applied[version] != sha256:
                        raise MigrationFault(f"{step} was edited after it had been applied.")
                    continue
                async with connection.transaction():
                    await connection.execute(text)
                    await connection.execute(
                        "INSERT INTO schema_migrations (version, name, sha256, applied_at) VALUES ($1, $2, $3, $4)",
                        version,
                        name,
                        sha256,
                        now,
                    )
                names.append(name)
            return names
        except asyncpg.InsufficientPrivilegeError as fault:
            raise MigrationFault(
                "The database's role may not make tables; migrate as their owner, or grant it CREATE on the schema."
            ) from fault
        except (*_DOWN, asyncpg.PostgresError) as fault:
            raise MigrationFault(f"{step} failed ({type(fault).__name__}: {fault}).") from fault
        finally:
            with contextlib.suppress(*_DOWN):
                await connection.close(timeout=10)


async def _no_reset(_: asyncpg.Connection[asyncpg.Record]) -> None:
    """Sessions here keep no state (no SET, no temporary table, no advisory lock), so a release needs no round trip."""


async def _init(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
