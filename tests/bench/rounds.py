"""Repetitions: a fixed number of rounds, in which each case has one turn of a few seconds.

The order is reversed from round to round (A B, B A, …), so that a slow minute of the machine falls
on all cases alike. Nothing is repeated or left out for its result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.machine import busy_seconds, cpu_seconds
from tests.bench.service import Server

NOISY = 0.15  # of a core, used by processes that don't belong to the run


@dataclass(frozen=True, slots=True)
class Turn:
    """One repetition. CPU in microseconds a login; `others` in cores; latencies in seconds."""

    logins: int
    failed: int
    per_second: float
    cpu: float
    redis: float
    postgres: float
    wal: float  # bytes a login
    others: float
    latency: dict[str, dict[str, float]]  # of the whole login and of each request: p50, p99

    @property
    def noisy(self) -> bool:
        return self.others > NOISY


@dataclass(slots=True)
class Case:
    """A flow with K logins in flight at one server."""

    name: str
    server: Server
    flow: str
    in_flight: int
    rate: float = 0  # logins that begin a second; 0: each when the connection's last one is done
    base: Case | None = None  # the case that it is compared with
    turns: list[Turn] = field(default_factory=list)

    def turn(self, seconds: float) -> Turn:
        """Run the flow for some seconds and read what it took.

        Raises:
            LoginFailed: a login failed.
        """
        time.sleep(0.3)  # Postgres' writers finish, and closed connections are freed
        server, made = self.server, self.server.stores
        processes = (server.pid, made.redis_pid, made.postgres_pid, os.getpid())

        def readings() -> list[float]:
            return [busy_seconds(), time.monotonic(), *map(cpu_seconds, processes)]

        wal, before = made.wal_bytes(), readings()
        told = server.run(self.flow, self.in_flight, seconds=seconds, rate=self.rate)
        used = [after - start for after, start in zip(readings(), before, strict=True)]
        busy, clock, cpu, redis, postgres, ours = used
        logins = told["logins"]
        return Turn(
            logins=logins,
            failed=told["failed"],
            per_second=logins / told["seconds"],
            cpu=cpu / logins * 1e6,
            redis=redis / logins * 1e6,
            postgres=postgres / logins * 1e6,
            wal=(made.wal_bytes() - wal) / logins,
            others=(busy - ours) / clock,
            latency=told["latency"],
        )


def run(cases: Sequence[Case], rounds: int, seconds: float, say: Callable[[str], None]) -> None:
    """Warm every case, then give each one turn a round; a line of progress after each round."""
    for case in cases:
        case.turn(seconds / 2)
    for number in range(1, rounds + 1):
        for case in cases[:: 1 if number % 2 else -1]:
            case.turns.append(case.turn(seconds))
        told = (
            f"{case.name} {case.turns[-1].cpu:.0f}{' noisy' * case.turns[-1].noisy}"
            for case in cases
        )
        say(f"round {number} of {rounds}, CPU of a login in us: {', '.join(told)}")
