"""`python -m tests.bench`: measure, and write the figures as a table and as JSON.

python -m tests.bench --json run.json          all cases (five to ten minutes)
python -m tests.bench --peers                   with the Node peer
python -m tests.bench --compare old.json new.json
python -m tests.bench --endurance               100,000 logins: does memory stay where it was?
python -m tests.bench --scale                   a database of 5 million passkeys beside one of 10
                                                thousand
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import endurance, measure, report, scale
from tests.bench.cases import Apart, Bench, Case, Unfit, measured, sound
from tests.bench.peer import peer
from tests.bench.service import Cores, Driver, Server, Stores, aimed, broker, knows_workers, stores

USERS = 256
# Case, in flight, logins a repetition.
CASES = (
    ("flex", 1, 300),
    ("flex", 16, 1000),
    ("flex", 64, 1000),
    ("register", 16, 300),
    ("propelauth", 16, 1400),
    ("propelauth", 64, 1700),
    ("hanko", 16, 500),
)
NODE = (("node", 16, 800), ("node", 64, 1000))
WORKERS = (
    ("workers2", 16, 1000),
    ("workers2", 32, 1000),
    ("workers2", 64, 1000),
    ("workers2", 128, 2000),
)
# Case, logins a second for each worker, its logins a repetition. With two workers the cores must
# have room for twice that, beside stores and driver.
PACED = (("paced", 300, 480),)
PACED_WORKERS = (("apart2", 300, 480),)
CONNECTIONS = 32  # of a worker in these
NAMES = {f"{name}-{number}" for name, number, _ in CASES + PACED + WORKERS + PACED_WORKERS + NODE}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument(
        "--cases", help=f"only these, with commas between: {', '.join(sorted(NAMES))}"
    )
    parser.add_argument("--peers", action="store_true", help="measure the Node peer as well")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two runs and end"
    )
    parser.add_argument(
        "--python",
        type=Path,
        help="the broker's interpreter: of an environment that it is installed in",
    )
    parser.add_argument(
        "--tcp", action="store_true", help="speak to Valkey through loopback, not a socket"
    )
    parser.add_argument(
        "--endurance", action="store_true", help="memory over many logins, instead of the cases"
    )
    parser.add_argument(
        "--logins", type=int, default=endurance.LOGINS, help="of --endurance (%(default)s)"
    )
    parser.add_argument(
        "--scale", action="store_true", help="a large database, instead of the cases"
    )
    scale.add_arguments(parser)
    options = parser.parse_args()
    if options.compare:
        old, new = (json.loads(path.read_text()) for path in options.compare)
        print(report.comparison(old, new))
        return 0
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # what was started ends as well
    try:
        if options.endurance:
            result = endurance.run(options.logins, _say)
            text = endurance.table(result)
        elif options.scale:
            result = scale.run(
                scale.sizes(options), options.repetitions, _say, buffers=options.buffers
            )
            text = scale.table(result)
        else:
            wanted = set(options.cases.split(",")) if options.cases else None
            if unknown := (wanted or set()) - NAMES:
                parser.error(
                    f"There is no case {', '.join(unknown)}; there are {', '.join(sorted(NAMES))}."
                )
            result = run(
                options.repetitions,
                wanted,
                peers=options.peers,
                tcp=options.tcp,
                python=options.python,
            )
            text = report.table(result)
    except Unfit as fault:
        print(f"Nothing to report: {fault}", file=sys.stderr)
        return 1
    print(text)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result.get("unfit") else 0


def run(
    repetitions: int,
    wanted: set[str] | None,
    *,
    peers: bool,
    tcp: bool = False,
    python: Path | None = None,
) -> dict[str, Any]:
    """Measure the wanted cases, all for None.

    **Two workers** are compared with one in two ways. *With a core for each*, as they are deployed,
    and the same load for each, logins that begin at a rate: one of them is measured on the core
    that the one worker has, while the other serves as many on the other cores; then the other one.
    A load of so many in flight would not be the same for both: where the other cores are a single
    one, stores and driver share it with a worker, answer later, and begin fewer logins for who
    waits for them. *On the core that one worker has*: then a second worker's cost is two sets of
    warm code in one cache, the switches between them, and, with as many logins in flight in all,
    half as many callers for a message to the stores; with as many in flight for each the messages
    are as they were.

    Raises:
        Unfit: a login failed, or the machine was too busy for any case.
    """

    def chosen(table: tuple[tuple[str, int, int], ...]) -> list[tuple[str, int, int]]:
        return [case for case in table if wanted is None or f"{case[0]}-{case[1]}" in wanted]

    cores = Cores.split()
    cases: list[Case] = []
    also: dict[str, str] = {}
    with ExitStack() as stack:
        calibrate = measure.Calibration(next(iter(cores.server)), cores.rest - cores.server)
        stack.callback(calibrate.close)
        made = stack.enter_context(stores(cores, tcp=tcp))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-bench-")))
        server = stack.enter_context(broker(made, cores, log=folder / "log", python=python))
        one = Bench("broker", server, stack.enter_context(aimed(cores, server)), made, calibrate)
        sound(one.driver("register", count=USERS, in_flight=16))
        also["resident after start"] = _resident(server)
        also["bytes in Redis per login in flight"] = f"{_bytes_in_flight(one.driver, made):.0f}"
        cases += [Case(f"{what}-{k}", one, what, k, count) for what, k, count in chosen(CASES)]
        cases += [
            Case(f"{name}-{rate}", one, "flex", CONNECTIONS, count, rate)
            for name, rate, count in chosen(PACED)
        ]
        if chosen(WORKERS + PACED_WORKERS) and (wanted or knows_workers()):
            server = stack.enter_context(
                broker(made, cores, workers=2, log=folder / "log2", python=python)
            )
            driver = stack.enter_context(aimed(cores, server))
            two = Bench("broker with two workers", server, driver, made, calibrate, counts=False)
            sound(two.driver("register", count=USERS, in_flight=16))
            cases += [
                Case(f"{name}-{k}", two, "flex", k, count) for name, k, count in chosen(WORKERS)
            ]
            turns = itertools.cycle(server.workers())
            apart = Apart(
                two.name, server, driver, made, calibrate, counts=False, cores=cores, turns=turns
            )
            cases += [
                Case(f"{name}-{rate}", apart, "flex", 2 * CONNECTIONS, 2 * count, 2 * rate)
                for name, rate, count in chosen(PACED_WORKERS)
            ]
        if chosen(NODE) and (peers or wanted):
            server = stack.enter_context(peer(made, cores))
            node = Bench(
                "Node",
                server,
                stack.enter_context(aimed(cores, server)),
                made,
                calibrate,
                counts=False,
            )
            node.driver("seed", count=USERS)
            cases += [
                Case(f"{name}-{k}", node, "peer", k, count) for name, k, count in chosen(NODE)
            ]
        fit, unfit = measured(cases, repetitions, _say)
        for bench in dict.fromkeys(case.bench for case in cases):
            also[f"resident at the end, {bench.name}"] = _resident(bench.server)
    found = {case.name: report.figures(case.what, case.good) for case in fit}
    for k in (16, 64):
        _compare(
            also,
            found,
            f"two-request login against Node, {k} in flight",
            f"propelauth-{k}",
            f"node-{k}",
        )
        _compare(
            also,
            found,
            f"two workers against one, {k} in flight in all",
            f"workers2-{k}",
            f"flex-{k}",
        )
    for k in (16, 64):
        _compare(
            also,
            found,
            f"two workers against one, {k} in flight for each",
            f"workers2-{2 * k}",
            f"flex-{k}",
        )
    for _, rate, _ in PACED:
        _compare(
            also,
            found,
            f"two workers with a core each against one, {rate} logins a second for each",
            f"apart2-{rate}",
            f"paced-{rate}",
        )
    return {"machine": measure.machine_of(python), "cases": found, "also": also, "unfit": unfit}


def _compare(
    also: dict[str, str], cases: dict[str, Any], what: str, ours: str, theirs: str
) -> None:
    if ours in cases and theirs in cases:
        also[what] = f"{cases[ours]['ratio'] / cases[theirs]['ratio']:.2f}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _resident(server: Server) -> str:
    return ", ".join(f"{size / 1e6:.0f} MB" for size in measure.resident_bytes(server.pid))


def _bytes_in_flight(driver: Driver, made: Stores) -> float:
    """What Redis holds for a login between begin and finish: its transaction and its pending
    ceremony.
    """
    count = 2000
    with made.counted() as client:
        before = client.info("memory")["used_memory"]
        sound(driver("begun", count=count, in_flight=16))
        return float(client.info("memory")["used_memory"] - before) / count


if __name__ == "__main__":
    sys.exit(main())
