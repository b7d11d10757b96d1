"""`python -m tests.bench`: measure, and write the figures as a table and as JSON.

python -m tests.bench --json run.json          all cases (about three minutes)
python -m tests.bench --peers                   with the Node peer
python -m tests.bench --compare old.json new.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import measure, report
from tests.bench.peer import peer
from tests.bench.service import Cores, Driver, Server, Stores, broker, settled, stores

USERS = 256
# Case, logins in flight, logins a repetition.
CASES = (
    ("flex", 1, 300),
    ("flex", 16, 2000),
    ("flex", 64, 3000),
    ("register", 16, 600),
    ("propelauth", 16, 2000),
    ("propelauth", 64, 3000),
    ("hanko", 16, 1000),
)
_MOST_TRIES = 3


class Unfit(Exception):
    """A run that may not be reported; the sentence says why."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cases", help="only these, as flex-16,propelauth-64")
    parser.add_argument("--peers", action="store_true", help="measure the Node peer as well")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two runs and end"
    )
    options = parser.parse_args()
    if options.compare:
        old, new = (json.loads(path.read_text()) for path in options.compare)
        print(report.comparison(old, new))
        return 0
    wanted = set(options.cases.split(",")) if options.cases else None
    try:
        result = run(options.repetitions, wanted, peers=options.peers)
    except Unfit as fault:
        print(f"Nothing to report: {fault}", file=sys.stderr)
        return 1
    print(report.table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run(repetitions: int, wanted: set[str] | None, *, peers: bool) -> dict[str, Any]:
    """Measure every case.

    Raises:
        Unfit: a login failed, or the machine was too busy.
    """
    cores = Cores.split()
    verify = measure.calibrate(next(iter(cores.server)))
    cases: dict[str, Any] = {}
    also: dict[str, str] = {}
    with stores(cores) as made, tempfile.TemporaryDirectory(prefix="broker-bench-") as folder:
        with broker(made, cores, log=Path(folder) / "log") as server:
            driver = Driver(cores)
            try:
                driver.aim(server)
                _sound(driver("register", count=USERS, in_flight=16))
                also["resident after start"] = f"{measure.resident_bytes(server.pid) / 1e6:.0f} MB"
                also["bytes in Redis per login in flight"] = f"{_bytes_in_flight(driver, made):.0f}"
                for case, in_flight, count in CASES:
                    name = f"{case}-{in_flight}"
                    if wanted is None or name in wanted:
                        cases[name] = _case(driver, server, made, case, in_flight, count, repetitions, verify)
                also["resident at the end"] = f"{measure.resident_bytes(server.pid) / 1e6:.0f} MB"
            finally:
                driver.close()
        if peers:
            with peer(made, cores) as server:
                driver = Driver(cores)
                try:
                    driver.aim(server)
                    driver("seed", count=USERS)
                    for in_flight, count in ((16, 2000), (64, 3000)):
                        cases[f"node-{in_flight}"] = _case(
                            driver, server, made, "peer", in_flight, count, repetitions, verify
                        )
                finally:
                    driver.close()
    for in_flight in (16, 64):
        if f"node-{in_flight}" in cases and f"propelauth-{in_flight}" in cases:
            ratio = cases[f"propelauth-{in_flight}"]["cpu_us"] / cases[f"node-{in_flight}"]["cpu_us"]
            also[f"two-request login against Node, {in_flight} in flight"] = f"{ratio:.2f}"
    return {"machine": measure.machine(), "verify_us": verify * 1e6, "cases": cases, "also": also}


def _sound(told: dict[str, Any]) -> dict[str, Any]:
    if told["failed"]:
        raise Unfit(f"{told['failed']} logins failed, the first with: {told['failures'][0]}")
    return told


def _case(
    driver: Driver,
    server: Server,
    made: Stores,
    case: str,
    in_flight: int,
    count: int,
    repetitions: int,
    verify: float,
) -> dict[str, Any]:
    _sound(driver(case, count=max(count // 4, in_flight * 2), in_flight=in_flight))  # warm
    good: list[report.Repetition] = []
    for _ in range(repetitions * _MOST_TRIES):
        settled()
        found = _repetition(driver, server, made, case, in_flight, count)
        if found.others <= report.MOST_OTHER:
            good.append(found)
        if len(good) == repetitions:
            return report.figures(good, verify)
    raise Unfit(f"other processes kept the machine busy during {case} with {in_flight} in flight.")


def _repetition(
    driver: Driver, server: Server, made: Stores, case: str, in_flight: int, count: int
) -> report.Repetition:
    def readings() -> list[float]:
        ours = [
            measure.cpu_seconds(pid) for pid in (server.pid, made.redis_pid, made.postgres_pid, driver.pid)
        ]
        return [*ours, measure.busy_seconds(), time.monotonic()]

    def requests(store: str) -> float:
        return 0.0 if case == "peer" else server.metric("broker_store_seconds_count", store=store)

    sent = requests("redis"), requests("postgres")
    before = readings()
    told = _sound(driver(case, count=count, in_flight=in_flight))
    after = readings()
    used = [b - a for a, b in zip(before, after, strict=True)]
    others = (used[4] - sum(used[:4])) / used[5]
    return report.Repetition(
        logins=told["logins"],
        seconds=told["seconds"],
        server=used[0],
        redis=used[1],
        postgres=used[2],
        others=others,
        redis_requests=requests("redis") - sent[0],
        statements=requests("postgres") - sent[1],
        p50=told["whole"]["p50"],
        p99=told["whole"]["p99"],
        steps=told["steps"],
    )


def _bytes_in_flight(driver: Driver, made: Stores) -> float:
    """What Redis holds for a login between begin and finish: its transaction and its pending ceremony."""
    count = 2000
    with made.counted() as client:
        before = client.info("memory")["used_memory"]
        _sound(driver("begun", count=count, in_flight=16))
        return float(client.info("memory")["used_memory"] - before) / count


if __name__ == "__main__":
    sys.exit(main())
