"""Ledger of spent one-time values, and the mode of one-time values (`BROKER_ONE_TIME`).

In the mode `postgres` the insert of a value's digest decides its take: one of two takes inserts,
also if two servers of Redis had the value. The inserts are a group commit. An idempotent take has a
second row, its claim: the same request, repeated, finds it and gets the value again. The ledger is
as good as Postgres' own failover: without synchronous replication a failover may lose entries.

**Mode.** All instances have the mode that `one_time_mode` records. Another instance is not ready. A
change to `postgres` draws a stamp, which every value then carries instead of a term. So no value of
one mode is taken in the other, and no value of an earlier period of one mode in a later one.

**Ring.** Digests lie in four partitions, by the hour in which their value ends. `empty` truncates
the one of two hours ago. Correctness doesn't depend on that, for a digest never occurs twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from broker.durable.events import actor, insert_event
from broker.durable.group_commit import OwnStatement
from broker.durable.postgres import Connection, Postgres
from broker.errors import Unavailable
from broker.settings import OneTimeMode

_HOUR = 3600.0  # seconds; above the life of every value, and above any skew of clocks
_SLOTS = 4


class _Spent(NamedTuple):
    """A value that is to be spent."""

    slot: int
    digest: bytes
    claim: bytes


class Recorded(NamedTuple):
    """The recorded mode, and the stamp of values in the mode `postgres`."""

    mode: OneTimeMode
    stamp: str


class Ledger:
    """The statements on the ledger and on the mode."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres
        self._stamp = ""
        self._spend = postgres.group_commit(
            "spend_value", self._spend_batch, key=lambda spent: spent.digest
        )

    async def recorded(self) -> Recorded:
        """The recorded mode."""
        row = await self._pg.row("one_time_mode", "SELECT mode, stamp FROM one_time_mode")
        if row is None:
            raise Unavailable(reason="postgres_one_time")
        return Recorded(row["mode"], row["stamp"])

    async def record(self, mode: OneTimeMode, stamp: str, now: datetime) -> None:
        """Record a mode. `stamp` is random, 16 hex digits; "" in the mode `term`. The event is
        `one_time_mode.recorded`, under the app id "".
        """
        event = insert_event(
            "'one_time_mode.recorded'",
            "FROM recorded",
            at="$3",
            app_id="''",
            by="$4, $5",
            payload="jsonb_build_object('mode', mode)",
        )
        await self._pg.row(
            "record_one_time_mode",
            f"""
            WITH recorded AS (
                INSERT INTO one_time_mode (mode, stamp) VALUES ($1, $2)
                ON CONFLICT (id) DO UPDATE SET mode = excluded.mode, stamp = excluded.stamp
                RETURNING mode
            )
            {event}
            """,
            mode,
            stamp,
            now,
            *actor(),
        )

    async def check(self, mode: str) -> None:
        """Raise `Unavailable` (reason `postgres_one_time`) unless this mode is recorded."""
        found = await self.recorded()
        if found.mode != mode:
            raise Unavailable(reason="postgres_one_time")
        self._stamp = found.stamp

    async def stamp(self) -> str:
        """The stamp of values in the mode `postgres`, as `check` read it last.

        Raises:
            Unavailable: also where another mode is recorded.
        """
        if not self._stamp:
            await self.check("postgres")
        return self._stamp

    async def spend(self, ends: float, digest: bytes, claim: bytes = b"") -> bool:
        """Spend a value that ends at `ends`, in seconds since the epoch. False: it was spent, and
        not with this claim, the digest of value and idempotent request.

        Raises:
            Unavailable: it is unknown whether the value is spent now.
        """
        return await self._spend(_Spent(_slot(ends), digest, claim))

    async def _spend_batch(
        self, batch: Sequence[_Spent], own: bool
    ) -> Sequence[bool | OwnStatement]:
        """A claim is a row beside the digest that it spent. A claim that another statement commits
        meanwhile may be missed, which refuses the repeated request.
        """
        # In one order, so that two statements with digests in common don't wait in a circle.
        rows = await self._pg.rows(
            "spend_value",
            """
            WITH a AS (
                SELECT * FROM unnest($1::smallint[], $2::bytea[], $3::bytea[])
                    AS a (slot, digest, claim)
            ), made AS (
                INSERT INTO one_time_spent (slot, digest) SELECT slot, digest FROM a ORDER BY 1, 2
                ON CONFLICT DO NOTHING RETURNING slot, digest
            ), claimed AS (
                INSERT INTO one_time_spent (slot, digest)
                SELECT slot, claim FROM a JOIN made USING (slot, digest) WHERE claim <> ''
                ON CONFLICT DO NOTHING
            )
            SELECT slot, digest FROM made
            UNION ALL SELECT s.slot, a.digest FROM a
            JOIN one_time_spent s ON s.slot = a.slot AND s.digest = a.claim
            """,
            [spent.slot for spent in batch],
            [spent.digest for spent in batch],
            [spent.claim for spent in batch],
        )
        made = {tuple(row) for row in rows}
        return [(spent.slot, spent.digest) in made for spent in batch]


async def empty(connection: Connection, now: datetime) -> None:
    """Empty the partition of the values that ended two hours ago."""
    name = f"one_time_spent_{(_slot(now.timestamp()) + 2) % _SLOTS}"
    if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {name})"):
        await connection.execute(f"TRUNCATE {name}")


def _slot(ends: float) -> int:
    return int(ends // _HOUR) % _SLOTS
