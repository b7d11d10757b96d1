"""`--day`: a day of one million users against three brokers, each hour of it in a few seconds.

The arrivals of each second are those of the real day: only the hours are shorter. Logins begin at
random moments (Poisson), spread over three brokers on the same stores. A user signs in twice a
day, and one login in ten is a registration. The peak hour has 8.5 % of the day.

Read from it what an operator plans with: CPU of a login at a real rate, where batches are small,
and not in a closed loop; time at the quiet and at the busy hour; memory of the stores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import redis

from tests.bench.machine import cpu_seconds, resident_bytes
from tests.bench.service import Server, broker, stores

USERS, LOGINS_EACH, BROKERS = 1_000_000, 2, 3
HOURS = (  # shares of the day in thousandths
    *(12, 8, 6, 6, 8, 14, 28, 46, 62, 64, 58, 54),
    *(56, 54, 50, 50, 52, 56, 64, 74, 85, 48, 29, 16),
)
_FLOWS = (
    "flex",
    "flex",
    "flex",
    "flex",
    "flex",
    "propelauth",
    "propelauth",
    "hanko",
    "hanko",
    "register",
)
SECONDS = 5.0  # of an hour


def rates(users: int = USERS) -> list[float]:
    """Logins a second in each hour of the day."""
    return [users * LOGINS_EACH * share / sum(HOURS) / 3600 for share in HOURS]


def run(result: dict[str, Any], say: Callable[[str], None], users: int = USERS) -> None:
    """Put the figures of each hour into `result`."""
    hours = result["hours"] = []
    with ExitStack() as stack, ThreadPoolExecutor(BROKERS) as threads:
        made = stack.enter_context(stores())
        shared = {**made.database(), "BROKER_SECRET_KEY": os.urandom(24).hex()}
        servers = [stack.enter_context(broker(made, environment=shared)) for _ in range(BROKERS)]
        say("hour  logins/s  failed  CPU us  Redis us  WAL B  p50 ms  p99 ms  Redis MB")
        for hour, rate in enumerate(rates(users)):
            told = _hour(threads, servers, hour, rate)
            with redis.Redis(unix_socket_path=made.socket) as client:
                told["redis_bytes"] = client.info("memory")["used_memory"]
            hours.append(told)
            say(
                f"{hour:>4}  {told['logins_per_second']:>8.1f}  {told['failed']:>6}"
                f"  {told['cpu']:>6.0f}  {told['redis']:>8.0f}  {told['wal']:>5.0f}"
                f"  {told['p50'] * 1e3:>6.1f}  {told['p99'] * 1e3:>6.1f}"
                f"  {told['redis_bytes'] / 1e6:>8.1f}"
            )
        result["resident_bytes"] = [resident_bytes(server.pid) for server in servers]


def _hour(
    threads: ThreadPoolExecutor, servers: list[Server], hour: int, rate: float
) -> dict[str, Any]:
    made = servers[0].stores
    pids = {
        "cpu": [server.pid for server in servers],
        "redis": [made.redis_pid],
    }

    def read() -> dict[str, float]:
        return {name: sum(map(cpu_seconds, several)) for name, several in pids.items()}

    def drive(number: int) -> dict[str, Any]:
        flow = _FLOWS[(hour * BROKERS + number) % len(_FLOWS)]
        share = rate / BROKERS
        connections = max(1, round(share))  # each begins a login a second
        return servers[number].run(flow, connections, seconds=SECONDS, rate=share)

    before, wal = read(), made.wal_bytes()
    told = list(threads.map(drive, range(BROKERS)))
    logins = sum(each["logins"] for each in told)
    return {
        **{name: (after - before[name]) / logins * 1e6 for name, after in read().items()},
        "wal": (made.wal_bytes() - wal) / logins,
        "rate": rate,
        "logins_per_second": sum(each["logins"] / each["seconds"] for each in told),
        "failed": sum(each["failed"] for each in told),
        "p50": max(each["latency"]["login"]["p50"] for each in told),
        "p99": max(each["latency"]["login"]["p99"] for each in told),
    }
