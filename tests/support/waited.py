"""Real time without what a busy machine takes: a limit of time is judged by it.

    with Waited() as waited:
        answer = await call()
    assert waited.seconds <= 2.0

Time in which this thread could have run, and other processes had the cores, does not count; the
kernel knows it of each thread. So a limit that the broker keeps by its timers is judged alike on an
idle machine and beside busy processes, while a wait or a computation that takes too long fails on
both. Where the kernel doesn't tell, `seconds` is real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

from tests.support.processes import DEADLINE

# proc(5): time on a core, time ready to run and without one (both in nanoseconds), and how often it
# got one.
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class Waited:
    """Measures what is inside its `with`; `seconds` is right inside as well."""

    def __enter__(self) -> Self:
        self._began, self._end = _now(), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._end = _now()

    @property
    def seconds(self) -> float:
        """So far, or in all."""
        return (self._end or _now()) - self._began


@contextlib.asynccontextmanager
async def soon(limit: float = 5.0) -> AsyncIterator[None]:
    """Fail what takes longer than `limit` by this clock; what hangs ends after the deadline of all
    tests.
    """
    with Waited() as waited:
        async with asyncio.timeout(DEADLINE):
            yield
    assert waited.seconds < limit, f"took {waited.seconds:.2f} s"


def _now() -> float:
    lost = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        lost = int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    return time.monotonic() - lost
