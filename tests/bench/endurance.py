"""`--endurance`: memory of a serving process over 100,000 logins of three dialects.

A process grows at first: connections, prepared statements, arenas of its allocator. A leak shows in
the second half, in which nothing new is allocated: less than 2 MB there is less than the smallest
object that each login could leave behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.bench.machine import resident_bytes
from tests.bench.service import broker, stores

LOGINS, STEPS = 100_000, 10
MOST_GROWTH = 2_000_000  # bytes in the second half
_MIX = (("flex", 0.5), ("propelauth", 0.3), ("hanko", 0.2))


def run(result: dict[str, Any], say: Callable[[str], None], logins: int = LOGINS) -> None:
    """Put the resident bytes at the start and after each tenth of the logins into `result`."""
    sizes = result["resident_bytes"] = []
    with stores() as made, broker(made) as server:
        for step in range(STEPS + 1):
            if step:
                for flow, share in _MIX:
                    server.run(flow, 64, count=round(logins / STEPS * share))
            sizes.append(resident_bytes(server.pid))
            say(f"{logins * step // STEPS:>8} logins: {sizes[-1] / 1e6:.1f} MB")
    result["growth_bytes"] = growth = max(sizes[STEPS // 2 :]) - sizes[STEPS // 2]
    result["flat"] = growth <= MOST_GROWTH
    say(f"{'Flat' if result['flat'] else 'NOT flat'}: {growth / 1e6:.1f} MB in the second half.")
