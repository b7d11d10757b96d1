"""`make bench-scale`: a login beside five million credentials against one beside ten thousand.

Two databases on one Postgres, each with its broker, take turns. Users have five passkeys in both:
a login reads as many rows, and only the tables differ. Users from all over the table sign in, so
that no two logins share a page. The ratio to read is the CPU of broker and stores together.

Settings that keep one database's maintenance out of the other's turn: autovacuum is off on the
seeded tables, and no checkpoint is due. Postgres has the buffers that its manual recommends, a
quarter of the machine's memory. Each user signs in twice before the first turn: then the pages are
in the buffers, and the backends have touched them, which costs some ten microseconds a page.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack

import asyncpg

from tests.bench.rounds import Case
from tests.bench.service import Server, broker, stores
from tests.support import seed
from tests.support.authenticator import b64
from tests.support.seed import Size

_FLOWS = (("flex", 16), ("propelauth", 16))
_EACH = 5  # passkeys of a user
_WHO_SIGN_IN = 30_000  # users at most
_ROW, _SPARE = 2_100, 9 << 30  # bytes of disk: a credential with its events; log and sorting


def start(
    cases: list[Case], credentials: int, stack: ExitStack, say: Callable[[str], None]
) -> None:
    """Start both brokers, seed their databases, and add their cases."""
    needed, free = credentials * _ROW + _SPARE, shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise SystemExit(
            f"The large database needs {needed >> 30} GB in {tempfile.gettempdir()}, where"
            f" {free >> 30} GB are free; point TMPDIR to a larger disk, or ask for fewer"
            " --credentials."
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    made = stack.enter_context(
        stores(
            {
                "shared_buffers": f"{memory // 4 >> 20}MB",
                "huge_pages": "try",
                "checkpoint_timeout": "1h",
                "max_wal_size": "8GB",
            }
        )
    )
    for name, count in (("small", 10_000), ("large", credentials)):
        server = stack.enter_context(broker(made, users=64))
        server.run("flex", 16, count=64)
        say(f"{name}: {asyncio.run(_seed(server, Size(count // _EACH, count, 2 * count)))}")
        server.run("flex", 16, count=2 * min(count // _EACH, _WHO_SIGN_IN))
        small = dict(zip(_FLOWS, cases, strict=False))
        cases += [Case(f"{at[0]}-{at[1]} {name}", server, *at, base=small.get(at)) for at in _FLOWS]
    asyncio.run(made.execute("CHECKPOINT"))
    os.sync()


async def _seed(server: Server, size: Size) -> str:
    """Fill the database and give the load generator users of it; what there is now, in words."""
    session: seed.Session = await asyncpg.connect(server.settings["BROKER_DATABASE_URL"])
    try:
        keys = await seed.templates(session)
        for name in ("users", "credentials", "events_first"):  # where the bulk's events are
            await session.execute(f"ALTER TABLE {name} SET (autovacuum_enabled = off)")
        await seed.grow(session, [server.app_id], size)
        chance = random.Random(0)
        users = chance.sample(range(size.users), min(size.users, _WHO_SIGN_IN))
        numbers = [user + size.users * chance.randrange(_EACH) for user in users]
        chosen = [
            (external_id, b64(credential_id), b64(handle.encode()), key)
            for external_id, credential_id, handle, key in await seed.passkeys(
                session, size, numbers
            )
        ]
        server.ask("adopt", keys=[b64(key) for key in keys], users=chosen)
        bytes_ = await session.fetchval("SELECT pg_database_size(current_database())")
    finally:
        await session.close()
    return f"{size.credentials} credentials, {size.events} events, {bytes_ / 1e9:.2f} GB"
