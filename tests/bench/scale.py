"""`make bench-scale`: does a login cost more beside five million passkeys than beside ten thousand?

Two databases on one Postgres, the small one and the large one, each with its broker, its driver and
one app that has everything, as an operator with one product has it. Users have five passkeys in
both, so that a login reads as many rows and only the tables differ. Drivers register some users;
all other rows are copies of those with ids, handles and times of their own (`seed`), and the logins
are of users all over the table, so that their pages are cold. The two take turns repetition by
repetition. What is compared is the CPU of the broker and of Postgres together, in verifications.

Autovacuum is off on the seeded tables, for it would come to the small one every minute, and never
to the large one; and no checkpoint comes while logins run, for the disk's pauses then would be one
repetition's alone. Postgres has the buffers that its manual recommends, a quarter of the machine's
memory, and they hold what logins read, as those of a server do that has run for a while. For the
same reason logins run before the measured ones until Postgres' processes have touched those
buffers: the first touch of a page costs a process some ten microseconds, and beside few rows none
is left after a second. (Where huge pages are reserved there are few to touch.) What remains is that
indexes are deeper, that no two logins share a page, and that most write whole pages to the log,
being the first since the checkpoint to change them. With `--buffers 32` nothing large fits, as in
the embedded store: rows are read through the kernel's cache, and pages are written back to make
room.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg

from tests.bench import measure, report, seed
from tests.bench.cases import Bench, Case, Unfit, measured, sound
from tests.bench.driver import b64
from tests.bench.seed import Size
from tests.bench.service import Cores, Driver, Server, Stores, aimed, broker, stores

REGISTERED = 64
PASSKEYS_EACH = 5
WHO_SIGN_IN = 30_000  # at most so many users
RUN_BEFORE = 10_000  # logins, as often as needed
AT_HOME = 0.25  # first touches a login: others remain, of what a process asks for to work in
MOST_BEFORE = 30 * RUN_BEFORE
CASES = (("flex", 16, 2000), ("propelauth", 16, 2000), ("hanko", 16, 1000))
MOST = 1.15
_READ = (
    ("handle", "users", "app_id, external_id"),
    ("sign_count", "credentials", "user_id"),
    ("sign_count", "credentials", "id"),
    ("user_id", "events WHERE user_id IS NOT NULL", "user_id"),
)
_BYTES = {"users": 700, "credentials": 1100, "events": 400}  # a row with its indexes
_SPARE = 9 << 30  # for the write-ahead log, sorting, and what else the disk is for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes."""
    parser.add_argument(
        "--credentials",
        type=int,
        default=5_000_000,
        help="of --scale's large database (%(default)s)",
    )
    parser.add_argument("--events", type=int, default=10_000_000, help="likewise (%(default)s)")
    parser.add_argument(
        "--buffers",
        type=int,
        default=_quarter(),
        help="of Postgres, in MB, with --scale (%(default)s)",
    )


def sizes(options: argparse.Namespace) -> tuple[Size, Size]:
    """The small and the large one."""
    small = Size(10_000 // PASSKEYS_EACH, 10_000, 20_000)
    return small, Size(options.credentials // PASSKEYS_EACH, options.credentials, options.events)


def _quarter() -> int:
    """A quarter of the machine's memory, in MB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 >> 20


def run(
    sized: tuple[Size, Size], repetitions: int, say: Callable[[str], None], *, buffers: int
) -> dict[str, Any]:
    """Seed both databases and measure, with so many MB of buffers.

    Raises:
        Unfit: the disk is too small, a login failed, or the machine was too busy.
    """
    _room(sized[1])
    cores = Cores.split()
    cases: list[Case] = []
    also: dict[str, str] = {}
    with ExitStack() as stack:
        calibrate = measure.Calibration(next(iter(cores.server)), cores.rest - cores.server)
        stack.callback(calibrate.close)
        settings = {"shared_buffers": f"{buffers}MB", "huge_pages": "try"}
        made = stack.enter_context(stores(cores, postgres=settings))
        also["buffers of Postgres"] = f"{buffers} MB"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-bench-")))
        for name, size in zip(("small", "large"), sized, strict=True):
            own = asyncio.run(_database(made, name))
            server = stack.enter_context(broker(own, cores, log=folder / name))
            driver = stack.enter_context(aimed(cores, server))
            sound(driver("register", count=REGISTERED, in_flight=16))
            sound(driver("flex", count=REGISTERED, in_flight=16))
            began = time.monotonic()
            also[name] = asyncio.run(_seeded(own, server, driver, size))
            say(f"{name}: {also[name]}, in {time.monotonic() - began:.0f} s")
            bench = Bench(name, server, driver, own, calibrate)
            also[f"{name}, before"] = before = _lived_in(bench)
            say(f"{name}, before: {before}")
            asyncio.run(_checkpoint(own))
            cases += [Case(f"{what}-{k} {name}", bench, what, k, count) for what, k, count in CASES]
        cases.sort(key=lambda case: case.name)
        fit, unfit = measured(cases, repetitions, say)
    found = {case.name: report.figures(case.what, case.good) for case in fit}
    ratios = {}
    for what, k, _ in CASES:
        name = f"{what}-{k}"
        if {f"{name} small", f"{name} large"} <= found.keys():
            ratios[name] = round(
                found[f"{name} large"]["whole_ratio"] / found[f"{name} small"]["whole_ratio"], 3
            )
    return {
        "machine": measure.machine(),
        "cases": found,
        "ratios": ratios,
        "also": also,
        "unfit": unfit,
    }


def table(result: dict[str, Any]) -> str:
    """Both databases' cases, and the ratios."""
    lines = [report.table(result), ""]
    for name, ratio in result["ratios"].items():
        small, large = (
            result["cases"][f"{name} {size}"]["whole_ratio"] for size in ("small", "large")
        )
        lines.append(
            f"{name}: CPU of broker and Postgres per login {small:.2f} verifications in the small database, {large:.2f} in the large"
            f" one: {ratio:.2f} times ({'within' if ratio <= MOST else 'ABOVE'} {MOST})"
        )
    return "\n".join(lines)


def _room(size: Size) -> None:
    needed = (
        size.users * _BYTES["users"]
        + size.credentials * _BYTES["credentials"]
        + size.events * _BYTES["events"]
    ) + _SPARE
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Unfit(
            f"the large database needs about {needed / 1e9:.0f} GB in {folder}, where {free / 1e9:.0f} GB are free;"
            " make room, point TMPDIR to a larger disk, or ask for less with --credentials and --events."
        )


async def _database(made: Stores, name: str) -> Stores:
    """A database of its own on the same server."""
    session = await asyncpg.connect(made.database_url)
    try:
        await session.execute(f"CREATE DATABASE {name}")
    finally:
        await session.close()
    return replace(made, database_url=made.database_url.replace("/postgres?", f"/{name}?"))


async def _seeded(made: Stores, server: Server, driver: Driver, size: Size) -> str:
    """Fill the database and give the driver users of it; what there is now, in words."""
    session: seed.Session = await asyncpg.connect(made.database_url)
    try:
        keys = await seed.templates(session)
        for name in ("users", "credentials", "events"):
            await session.execute(f"ALTER TABLE {name} SET (autovacuum_enabled = off)")
        await seed.grow(session, [server.app_id], size)
        for setting in ("checkpoint_timeout = '1h'", "max_wal_size = '8GB'"):
            await session.execute(f"ALTER SYSTEM SET {setting}")
        await session.execute("SELECT pg_reload_conf()")
        await _warm(session)
        driver("adopt", keys=[b64(key) for key in keys], users=await _some(session, size))
        bytes_ = await session.fetchval("SELECT pg_database_size(current_database())")
    finally:
        await session.close()
    return f"{size.users} users, {size.credentials} passkeys, {size.events} events, {bytes_ / 1e9:.2f} GB"


def _lived_in(bench: Bench) -> str:
    """Run logins until Postgres' processes have touched the pages that logins read; how it went, in
    words.
    """
    bench.driver("connect", in_flight=16)
    done, each = 0, math.inf
    while each > AT_HOME and done < MOST_BEFORE:
        before = measure.touched(bench.stores.postgres_pid)
        sound(bench.driver("flex", count=RUN_BEFORE, in_flight=16))
        each = (measure.touched(bench.stores.postgres_pid) - before) / RUN_BEFORE
        done += RUN_BEFORE
    return f"{done} logins; the last {RUN_BEFORE} each touched {each:.2f} pages that their process had not touched yet"


async def _checkpoint(made: Stores) -> None:
    """Have everything on the disk, so that nothing is written back while logins are measured."""
    session: seed.Session = await asyncpg.connect(made.database_url)
    try:
        await session.execute("CHECKPOINT")
    finally:
        await session.close()
    await asyncio.to_thread(os.sync)


async def _warm(session: seed.Session) -> None:
    """Read what logins read, in the order of the indexes by which they find it: a sequential scan
    of a large table leaves nothing behind.
    """
    for way in ("seqscan", "bitmapscan", "sort"):
        await session.execute(f"SET enable_{way} = off")
    await session.execute("SET max_parallel_workers_per_gather = 0")
    for column, table, order in _READ:
        await session.execute(
            f"SELECT max({column}) FROM (SELECT {column} FROM {table} ORDER BY {order}) rows"
        )
    await session.execute("RESET ALL")


async def _some(session: seed.Session, size: Size) -> Sequence[tuple[str, str, str, int]]:
    """One passkey each of users from everywhere in the table. Each user occurs once: some dialects
    have one ceremony a user.
    """
    chance = random.Random(0)
    users = chance.sample(range(size.users), min(size.users, WHO_SIGN_IN))
    numbers = [
        user + size.users * chance.randrange(size.credentials // size.users) for user in users
    ]
    return [
        (external_id, b64(credential_id), b64(handle.encode()), key)
        for external_id, credential_id, handle, key in await seed.passkeys(session, size, numbers)
    ]
