"""Schema migrations: numbered SQL files, applied in order and forward only, while instances serve
sign-ins.

Each file of `sql/` is applied once; `schema_migrations` has a row for it, with the digest of its
text. A schema newer than the code is fine: migrations keep old code running, so a roll-back is
safe. There are two kinds of file.

**In a transaction**, with its row in `schema_migrations`. Every lock is waited for no longer than
`Patience.lock`, for a statement of a sign-in queues behind a lock request that waits. After that
the whole transaction is rolled back and tried again after a pause. The locks that it got are held
until the commit. While sign-ins wait for them, such a file does no work that grows with the rows of
a table; a test measures it.

**Without a transaction**: a line `-- no transaction` in the header. Such a file builds indexes with
CREATE INDEX CONCURRENTLY, which Postgres refuses inside a transaction and which blocks no write. A
failed try leaves an INVALID index; the next try drops it, also concurrently, and builds it again. A
valid index of that name stays.

**One session migrates at a time**, by an advisory lock that is tried again and again. A session
that waits inside `pg_advisory_lock()` holds a snapshot, and CREATE INDEX CONCURRENTLY waits for all
older snapshots: the two would wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeAlias

import asyncpg

from broker.errors import Fault

_Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

MIGRATION_LOCK = 0x7061_7373_6B65_79  # "passkey"

_FAULTS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_LOCKED = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
_NO_TRANSACTION = re.compile(r"(?:--.*\n)*-- no transaction\n")
_INDEX = re.compile(r"CREATE (?:UNIQUE )?INDEX CONCURRENTLY IF NOT EXISTS (\w+) ON \w")

# Digests of earlier texts of a migration that lead to the same schema with the migrations after it.
_EARLIER_TEXTS = {
    # Migration 3 built the index credentials_page under its locks; migration 5 builds it now.
    3: {"8495d9861c2327c66aa2d58b4c626d432ea84522be5e1e3793cb998291752f49"},
}


class MigrationFault(Fault):
    """The schema can't be brought up to date; the sentence says why."""


class Patience(NamedTuple):
    """Limits of a migration's waits for other sessions, in seconds."""

    turn: float = 300.0  # for another session that migrates
    lock: float = (
        0.1  # for one lock, in a transaction: far shorter than a sign-in waits for the store
    )
    tries: int = 12  # of a transaction that did not get its locks; with the pauses some 45 s
    pause: float = 0.5  # after the first try; doubles, up to `longest_pause`
    longest_pause: float = 5.0
    build: float = 300.0  # for the transactions that are older than a concurrent step of an index
    poll: float = 0.2  # between two tries of the advisory lock


def sql_files() -> list[tuple[int, str, str]]:
    """The migrations in order: number, name, text. They stand beside the package in a checkout and
    inside it in a wheel.
    """
    package = Path(__file__).parent.parent
    folder = package / "sql" if (package / "sql").is_dir() else package.parent / "sql"
    files = sorted(folder.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    if not files:
        raise MigrationFault(f"No migrations found in {folder.name}/.")
    return [(int(f.name[:4]), f.stem, f.read_text()) for f in files]


def concurrent_steps(text: str) -> list[tuple[str, str]] | None:
    """The index and the statement of each step of a migration without a transaction; None for one
    that has a transaction.

    Raises:
        MigrationFault: a statement that could not be repeated after a failed try.
    """
    if not _NO_TRANSACTION.match(text):
        return None
    steps = []
    for statement in re.sub(r"--.*", "", text).split(";"):
        if statement := " ".join(statement.split()):
            found = _INDEX.match(statement)
            if found is None:
                raise MigrationFault(
                    "A migration without a transaction only builds indexes concurrently."
                )
            steps.append((found[1], statement))
    return steps


async def migrate(url: str, now: datetime, patience: Patience) -> list[str]:
    """Apply what is missing and return the names applied. Several instances may call it at once.

    Raises:
        MigrationFault: the server can't be reached or refuses, an applied migration's text has
            changed since, or another session kept a lock for too long.
    """
    try:
        connection = await asyncpg.connect(
            url, timeout=10, server_settings={"application_name": "passkey-broker migrate"}
        )
    except _FAULTS as fault:
        raise MigrationFault(
            f"Postgres can't be reached ({type(fault).__name__}); check BROKER_DATABASE_URL."
        ) from fault
    try:
        return await _Migrating(connection, now, patience).run()
    finally:
        with contextlib.suppress(*_FAULTS):
            await connection.close(timeout=10)


class _Migrating:
    """A session that migrates."""

    def __init__(self, connection: _Connection, now: datetime, patience: Patience) -> None:
        self._connection = connection
        self._now = now
        self._patience = patience
        self._step = "The table of migrations"

    async def run(self) -> list[str]:
        try:
            await self._connection.execute(
                "SET statement_timeout = 0"
            )  # building an index takes its time
            await self._take_turn()
            missing = await self._missing()
            for version, name, text in missing:
                await self._apply(version, name, text)
            return [name for _, name, _ in missing]
        except asyncpg.InsufficientPrivilegeError as fault:
            raise MigrationFault(
                "The database's role may not make tables; migrate as their owner, or grant it "
                "CREATE on the schema."
            ) from fault
        except _FAULTS as fault:
            raise MigrationFault(
                f"{self._step} failed ({type(fault).__name__}: {fault})."
            ) from fault

    async def _take_turn(self) -> None:
        """Take the advisory lock, which ends with the session."""
        time = asyncio.get_running_loop().time
        ends = time() + self._patience.turn
        while not await self._connection.fetchval(
            "SELECT pg_try_advisory_lock($1)", MIGRATION_LOCK
        ):
            if time() >= ends:
                raise MigrationFault(
                    f"Another session has migrated for {self._patience.turn:g} s "
                    f"({await self._holder()}); "
                    "wait for it or end it, then run `broker migrate` again."
                )
            await asyncio.sleep(self._patience.poll)

    async def _missing(self) -> Sequence[tuple[int, str, str]]:
        await self._connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations"
            " (version integer PRIMARY KEY, name text NOT NULL,"
            " sha256 text NOT NULL, applied_at timestamptz NOT NULL)"
        )
        rows = await self._connection.fetch("SELECT version, sha256 FROM schema_migrations")
        applied = {row["version"]: row["sha256"] for row in rows}
        missing = []
        for version, name, text in sql_files():
            if version not in applied:
                missing.append((version, name, text))
            elif applied[version] not in {_digest(text), *_EARLIER_TEXTS.get(version, ())}:
                raise MigrationFault(f"Migration {name} was edited after it had been applied.")
        return missing

    async def _apply(self, version: int, name: str, text: str) -> None:
        self._step = f"Migration {name}"
        steps = concurrent_steps(text)
        if steps is None:
            await self._in_transaction(version, name, text)
            return
        for index, statement in steps:
            await self._build(index, statement)
        await self._record(version, name, text)

    async def _in_transaction(self, version: int, name: str, text: str) -> None:
        patience, pause = self._patience, self._patience.pause
        for left in reversed(range(patience.tries)):
            try:
                async with self._connection.transaction():
                    await self._connection.execute(
                        f"SET LOCAL lock_timeout = {_milliseconds(patience.lock)}"
                    )
                    await self._connection.execute(text)
                    await self._record(version, name, text)
                return
            except _LOCKED as fault:
                if not left:
                    raise MigrationFault(
                        f"{self._step} found its tables locked {patience.tries} times; "
                        f"{await self._oldest()}."
                    ) from fault
            await asyncio.sleep(pause)
            pause = min(2 * pause, patience.longest_pause)

    async def _build(self, index: str, statement: str) -> None:
        """Build one index concurrently; what waits are transactions older than a step of it, and
        nobody waits for this session.
        """
        # Each statement goes alone: several in one message are one transaction.
        await self._connection.execute(f"SET lock_timeout = {_milliseconds(self._patience.build)}")
        try:
            invalid = "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)"
            if await self._connection.fetchval(invalid, index):
                await self._connection.execute(f"DROP INDEX CONCURRENTLY {index}")
            await self._connection.execute(statement)
        except _LOCKED as fault:
            raise MigrationFault(
                f"{self._step} waited {self._patience.build:g} s for other transactions; "
                f"{await self._oldest()}."
            ) from fault

    async def _record(self, version: int, name: str, text: str) -> None:
        await self._connection.execute(
            "INSERT INTO schema_migrations (version, name, sha256, applied_at)"
            " VALUES ($1, $2, $3, $4)",
            version,
            name,
            _digest(text),
            self._now,
        )

    async def _holder(self) -> str:
        """The session that holds the advisory lock, for a person who looks for it."""
        row = await self._connection.fetchrow(
            f"SELECT {_SESSION} FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE l.locktype = 'advisory'"
            " AND l.granted"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND (l.classid::bigint << 32) + l.objid::bigint = $1 AND l.objsubid = 1",
            MIGRATION_LOCK,
        )
        return _as_text(row)

    async def _oldest(self) -> str:
        """The advice about the session with the oldest transaction."""
        row = await self._connection.fetchrow(
            f"SELECT {_SESSION} FROM pg_stat_activity a"
            " WHERE a.xact_start IS NOT NULL AND a.pid <> pg_backend_pid()"
            " AND a.datname = current_database() ORDER BY a.xact_start LIMIT 1"
        )
        return f"end the oldest transaction ({_as_text(row)}) and run `broker migrate` again"


_SESSION = "a.pid, a.application_name AS name, host(a.client_addr) AS address"


def _as_text(row: asyncpg.Record | None) -> str:
    if row is None:
        return "pg_stat_activity shows none to this role"
    name, address = row["name"] or "", row["address"]
    return f"process {row['pid']}, {name!r}" + (f" from {address}" if address else "")


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
