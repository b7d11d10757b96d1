"""`--endurance`: does a serving process stay as large as it was? Logins of every kind in turn, and
its memory after each step.

A process grows at first: connections, compiled statements, arenas of its allocator. What is looked
at is the second half, in which nothing new comes: `flat` means that it grew there by at most
`MOST_GROWTH`, so by no more than a few dozen bytes a login, less than the smallest object that a
login could leave behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import measure
from tests.bench.cases import sound
from tests.bench.report import about
from tests.bench.service import Cores, aimed, broker, stores

LOGINS = 100_000
STEPS = 10
MOST_GROWTH = 2_000_000  # bytes in the second half
MOST_RESIDENT = 110_000_000  # bytes at the end
# What a step is made of.
MIX = (("flex", 0.5), ("propelauth", 0.3), ("hanko", 0.2))


def run(logins: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Resident bytes of the process at the start and after every tenth of the logins, 64 in flight.

    Raises:
        Unfit: a login failed.
    """
    cores = Cores.split()
    found: list[tuple[int, int]] = []
    with ExitStack() as stack:
        made = stack.enter_context(stores(cores))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-bench-"))
        server = stack.enter_context(broker(made, cores, log=Path(folder) / "log"))
        driver = stack.enter_context(aimed(cores, server))
        sound(driver("register", count=256, in_flight=64))
        done = 0
        found.append((done, measure.resident_bytes(server.pid)[0]))
        for _ in range(STEPS):
            for what, part in MIX:
                done += sound(driver(what, count=round(logins / STEPS * part), in_flight=64))[
                    "logins"
                ]
            found.append((done, measure.resident_bytes(server.pid)[0]))
            say(f"{done} logins: {found[-1][1] / 1e6:.1f} MB")
    half, end = found[STEPS // 2], found[-1]
    growth = max(size for _, size in found[STEPS // 2 :]) - half[1]
    return {
        "machine": measure.machine(),
        "resident": [{"logins": logins, "bytes": size} for logins, size in found],
        "growth_bytes": growth,
        "growth_bytes_per_login": round(growth / (end[0] - half[0]), 1),
        "flat": growth <= MOST_GROWTH,
        "small": end[1] <= MOST_RESIDENT,
    }


def table(result: dict[str, Any]) -> str:
    """The sizes, and the verdict."""
    sizes = result["resident"]
    lines = [*about(result["machine"]), "", f"{'logins':>10}{'resident MB':>14}"]
    lines += [f"{at['logins']:>10}{at['bytes'] / 1e6:>14.1f}" for at in sizes]
    half = sizes[STEPS // 2]["logins"]
    lines.append(
        f"{'Flat' if result['flat'] else 'NOT flat'} from {half} logins on: grew by {result['growth_bytes'] / 1e6:.1f} MB,"
        f" {result['growth_bytes_per_login']} bytes a login (at most {MOST_GROWTH / 1e6:.0f} MB is flat)."
    )
    lines.append(
        f"{sizes[-1]['bytes'] / 1e6:.0f} MB at the end; {'within' if result['small'] else 'ABOVE'} {MOST_RESIDENT / 1e6:.0f} MB."
    )
    return "\n".join(lines)
