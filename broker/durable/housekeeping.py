"""Periodic clean-up: expired rows are deleted in small batches, by one instance at a time.

Each instance makes a pass about every `EVERY` seconds. A batch is a transaction of its own, which
first tries to take an advisory lock. So one of many instances works, and the others skip their
pass. A batch has at most `BATCH` rows, keeps within the limit of any wait for Postgres, and skips
rows that another transaction has locked. A pause of several times the batch's length follows, so
that requests go first. A failed batch ends the chore's pass and counts in
`broker_housekeeping_failures_total`. The next batch is half as large. Postgres ends a batch whose
instance hangs, and its locks.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeAlias

import asyncpg

from broker.durable import ledger
from broker.durable.ceremonies import UNCONFIRMED
from broker.durable.events import ERASE, actor, insert_event
from broker.durable.postgres import Connection, Postgres
from broker.errors import Unavailable
from broker.telemetry import Log, Metrics, fault

EVERY = 600.0  # seconds between two passes of an instance, give or take half of it
BATCH = 1000  # rows
_SMALLEST = 10  # rows
_PENDING = timedelta(days=1)  # since the last registration was opened for a user without a passkey
_HAS_NOTHING = (
    "u.past_logins = 0 AND u.disabled_at IS NULL"
    " AND NOT EXISTS (SELECT FROM credentials c WHERE c.user_id = u.id)"
    " AND NOT EXISTS (SELECT FROM approvals p WHERE p.user_id = u.id)"
)
_REST = 4  # times as long as a batch took
_SHORTEST_REST = 0.02  # seconds
_IDLE = 2.0  # seconds that Postgres waits for an instance that hangs in a batch and holds its locks
_LOCK = 0x636C_6561_6E75_70  # "cleanup"
_CHANCE = random.Random()  # noqa: S311 - spreads the passes of instances that started together


class _Batch(NamedTuple):
    """The result of a batch."""

    rows: int
    more: bool  # whether there may be further rows


_Chore: TypeAlias = "Callable[[Connection, datetime, int], Awaitable[_Batch]]"


class Housekeeping:
    """The chores, one after the other. `retention_days` is how long events stay, 0 for ever;
    `clock` gives seconds since the epoch.
    """

    def __init__(
        self,
        postgres: Postgres,
        *,
        retention_days: int,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pg = postgres
        self._retention = timedelta(days=retention_days)
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._seen = 0  # id of the newest event that this pass has read
        self._chores: dict[str, _Chore] = {
            "unconfirmed_passkeys": self._unconfirmed_passkeys,
            "pending_users": self._pending_users,
            "spent_values": self._spent_values,
            "event_months": self._event_months,
        }
        if retention_days:
            self._chores["old_event_months"] = self._old_event_months
            self._chores["events"] = self._old_events
        self._sizes = dict.fromkeys(self._chores, BATCH)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the passes; needs no connection. The first pass comes later, so that it does not
        slow a restart down.
        """
        self._task = asyncio.create_task(self._run(), name="housekeeping")

    async def close(self) -> None:
        """Stop, even during a batch: its transaction is rolled back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY * _CHANCE.uniform(0.5, 1.5))
            await self.clean()

    async def clean(self) -> dict[str, int]:
        """Run one pass: each chore until no row is left, another instance works, or a batch fails.
        Returns rows by chore. A defect counts as a failed batch.
        """
        done = {}
        self._seen = 0
        for name, chore in self._chores.items():
            try:
                if rows := await self._all_of(name, chore):
                    done[name] = rows
            except Exception as error:  # noqa: BLE001 - a defect ends neither other chores nor passes
                self._metrics.housekeeping_failures.inc(name)
                self._log("defect", severity=logging.ERROR, chore=name, **fault(error))
        if done:
            self._log("housekeeping", rows=done)
        return done

    async def _all_of(self, name: str, chore: _Chore) -> int:
        rows = 0
        while True:
            began, size = time.monotonic(), self._sizes[name]
            try:
                batch = await self._batch(chore, size)
            except (Unavailable, asyncpg.PostgresError) as failure:
                self._sizes[name] = max(_SMALLEST, size // 2)
                self._metrics.housekeeping_failures.inc(name)
                reason = (
                    failure.reason if isinstance(failure, Unavailable) else type(failure).__name__
                )
                self._log(
                    "housekeeping_failed", severity=logging.WARNING, chore=name, reason=reason
                )
                return rows
            if batch is None:
                return rows
            rows += batch.rows
            self._metrics.housekeeping_rows.add(batch.rows, name)
            self._sizes[name] = min(BATCH, 2 * size)
            if not batch.more:
                return rows
            await asyncio.sleep(max(_SHORTEST_REST, _REST * (time.monotonic() - began)))

    async def _batch(self, chore: _Chore, size: int) -> _Batch | None:
        """None: another instance works."""
        now = datetime.fromtimestamp(self._clock(), UTC)

        async def work(connection: Connection) -> _Batch | None:
            async with connection.transaction():
                alone = await connection.fetchval(
                    "SELECT pg_try_advisory_xact_lock($1),"
                    " set_config('idle_in_transaction_session_timeout', $2, true)",
                    _LOCK,
                    str(round(_IDLE * 1000)),
                )
                if not alone:
                    return None
                return await chore(connection, now, size)

        return await self._pg.run("housekeeping", work)

    # -- events ------------------------------------------------------------------------------------

    async def _event_months(self, connection: Connection, now: datetime, size: int) -> _Batch:
        """Make the partitions of months to come, by the clock of Postgres."""
        rows = await connection.fetch("SELECT make_event_months() AS name")
        if rows:
            self._log("event_months_made", months=[row["name"] for row in rows])
        return _Batch(0, more=False)

    async def _old_event_months(self, connection: Connection, now: datetime, size: int) -> _Batch:
        """Drop the partitions of months that ended before the retention, by the clock of Postgres.
        No row is counted."""
        rows = await connection.fetch("SELECT drop_event_months($1) AS name", self._retention)
        if rows:
            self._log("event_months_dropped", months=[row["name"] for row in rows])
        return _Batch(0, more=False)

    async def _old_events(self, connection: Connection, now: datetime, size: int) -> _Batch:
        """Delete events of all apps that are older than the retention. The scan goes by id and ends
        at the first batch without an old event: event times rise with ids, but for the difference
        of the instances' clocks. The bounds of `at` keep the DELETE to the oldest partitions."""
        row = await connection.fetchrow(
            """
            WITH oldest AS MATERIALIZED (
                SELECT id, at FROM events WHERE id > $1 ORDER BY id LIMIT $2
            ), gone AS (
                DELETE FROM events
                WHERE at >= (SELECT min(at) FROM oldest) AND at < $3
                    AND id = ANY (ARRAY(SELECT id FROM oldest WHERE at < $3))
                RETURNING id
            )
            SELECT (SELECT max(id) FROM oldest) AS last, (SELECT count(*) FROM oldest) AS seen,
                   (SELECT count(*) FROM gone) AS gone
            """,
            self._seen,
            size,
            now - self._retention,
        )
        assert row is not None, "a SELECT without FROM has one row"
        self._seen = row["last"] or self._seen
        return _Batch(row["gone"], more=row["gone"] > 0 and row["seen"] == size)

    # -- passkeys ----------------------------------------------------------------------------------

    async def _unconfirmed_passkeys(
        self, connection: Connection, now: datetime, size: int
    ) -> _Batch:
        """Delete passkeys whose time to be confirmed is over.

        A user without another passkey is pending again. A user without an external id is deleted
        with its passkey."""
        rows = await connection.fetch(
            "SELECT c.id, c.user_id FROM credentials c JOIN users u ON u.id = c.user_id"
            " WHERE NOT c.live AND c.created_at < $1"
            " ORDER BY c.created_at LIMIT $2 FOR UPDATE SKIP LOCKED",
            now - UNCONFIRMED,
            size,
        )
        if not rows:
            return _Batch(0, more=False)
        # These rows are locked. Statements of their own see what was committed before the locks.
        event = insert_event(
            "'passkey.expired'",
            "FROM gone",
            at="$2",
            by="$3, $4",
            user_id="user_id",
            passkey_id="id",
        )
        await connection.execute(
            f"""
            WITH gone AS (
                DELETE FROM credentials WHERE id = ANY ($1::text[]) RETURNING app_id, user_id, id
            )
            {event}
            """,
            [row["id"] for row in rows],
            now,
            *actor(),
        )
        await connection.execute(
            """
            WITH without AS (
                SELECT u.id, u.external_id IS NULL AS nobody FROM users u
                WHERE u.id = ANY ($1::text[])
                    AND NOT EXISTS (SELECT FROM credentials c WHERE c.user_id = u.id)
            ), nobody AS (
                DELETE FROM users WHERE id = ANY (ARRAY(SELECT id FROM without WHERE nobody))
            )
            UPDATE users SET status = 'pending', opened_at = $2, updated_at = $2
            WHERE id = ANY (ARRAY(SELECT id FROM without WHERE NOT nobody)) AND status <> 'pending'
            """,
            list({row["user_id"] for row in rows}),
            now,
        )
        return _Batch(len(rows), more=len(rows) == size)

    # -- one-time values ---------------------------------------------------------------------------

    async def _spent_values(self, connection: Connection, now: datetime, size: int) -> _Batch:
        """Empty the partition of the ledger whose values ended long ago. No row is counted."""
        await ledger.empty(connection, now)
        return _Batch(0, more=False)

    # -- users -------------------------------------------------------------------------------------

    async def _pending_users(self, connection: Connection, now: datetime, size: int) -> _Batch:
        """Delete users who have nothing and for whom no registration was opened during `_PENDING`.
        Opening a registration and adding a passkey lock the user's row, so the later transaction
        sees the result of the earlier one."""
        rows = await connection.fetch(
            "SELECT u.id FROM users u"
            " WHERE u.status = 'pending' AND coalesce(u.opened_at, u.created_at) < $1"
            f" AND {_HAS_NOTHING}"
            " ORDER BY coalesce(u.opened_at, u.created_at) LIMIT $2 FOR UPDATE SKIP LOCKED",
            now - _PENDING,
            size,
        )
        if not rows:
            return _Batch(0, more=False)
        # Statements of their own see what was committed before the locks.
        event = insert_event("'user.expired'", "FROM gone", at="$2", by="$3, $4", user_id="id")
        gone = await connection.fetch(
            f"""
            WITH gone AS (
                DELETE FROM users u WHERE u.id = ANY ($1::text[]) AND {_HAS_NOTHING}
                RETURNING u.id, u.app_id
            ), event AS ({event})
            SELECT id FROM gone
            """,
            [row["id"] for row in rows],
            now,
            *actor(),
        )
        await connection.execute(ERASE, [row["id"] for row in gone])
        return _Batch(len(gone), more=len(rows) == size)
