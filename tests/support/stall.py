"""Hold a request open inside the broker: a lock on a table of the real Postgres, which its next
statement needs.

    async with stalled(broker, "users") as stall:
        running = asyncio.create_task(wire.keyed(…))
        await stall.waiting(1)        # the request stands at the lock
        …                             # what shall happen meanwhile
    answer = await running            # let go, it ends

A store's limit on one wait goes on running, so what happens meanwhile has to be short.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import asyncpg

from tests.conftest import Started
from tests.support.processes import DEADLINE


@dataclass(frozen=True, slots=True)
class Stall:
    """A table that is locked."""

    connection: asyncpg.Connection[asyncpg.Record]
    table: str

    async def waiting(self, number: int) -> None:
        """Return when this many statements wait for the table."""
        deadline = time.monotonic() + DEADLINE
        while True:
            found = await self.connection.fetchval(
                "SELECT count(DISTINCT pid) FROM pg_locks"
                " WHERE NOT granted AND relation = $1::text::regclass",
                self.table,
            )
            if found >= number:
                return
            assert time.monotonic() < deadline, (
                f"{found} of {number} statements wait for {self.table}"
            )
            await asyncio.sleep(0.005)  # between two looks


@asynccontextmanager
async def stalled(
    broker: Started, table: str, *, mode: Literal["ACCESS EXCLUSIVE", "SHARE"] = "ACCESS EXCLUSIVE"
) -> AsyncIterator[Stall]:
    """Lock `table` while inside, so that every statement which names it waits; with "SHARE" only
    those that write.

    What `Stall.connection` does inside is committed before the others go on.
    """
    connection = await asyncpg.connect(broker.parts.settings.database_url)
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {table} IN {mode} MODE")
            yield Stall(connection, table)
    finally:
        await connection.close()
