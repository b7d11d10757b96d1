"""`python -m tests.bench`: measure, and report as text and as JSON.

python -m tests.bench                           the cases of this checkout (two minutes)
python -m tests.bench --peers                   and the Node peer, turn about
python -m tests.bench --against PATH --control  A/B: this checkout, another one, and itself again
python -m tests.bench --env-b NAME=value        A/B of a setting
python -m tests.bench --endurance               memory over 100,000 logins
python -m tests.bench --scale                   5 million credentials beside 10 thousand
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import endurance, machine, report, rounds, scale
from tests.bench.report import Comparison
from tests.bench.rounds import Case
from tests.bench.service import ROOT, LoginFailed, broker, node_peer, stores
from tests.support.parts import MissingPart

CASES = (
    "flex-1",
    "flex-16",
    "flex-64",
    "register-16",
    "propelauth-16",
    "propelauth-64",
    "hanko-16",
)
NODE = ("node-16", "node-64")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--json", type=Path, metavar="FILE", help="write the figures here, also when interrupted")
    add("--case", help=f"only these, with commas between: {', '.join(CASES + NODE)}")
    add("--rounds", "--pairs", type=int, help="5; of an A/B 12")
    add("--seconds", type=float, default=2.0, help="length of a turn (%(default)s)")
    add("--peers", action="store_true", help="measure the Node peer as well")
    add(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="B: another checkout; may be given several times",
    )
    add("--env-b", action="append", default=[], metavar="NAME=VALUE", help="B's environment")
    add("--args-b", default="", metavar="WORDS", help="B's arguments for `broker serve`")
    add("--control", action="store_true", help="a second process of A, for the noise of the ratio")
    add("--endurance", action="store_true", help="memory over many logins, instead of the cases")
    add("--scale", action="store_true", help="a large database, instead of the cases")
    add("--credentials", type=int, default=5_000_000, help="of --scale (%(default)s)")
    return made


def sides(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The brokers of an A/B by name, with what distinguishes each; one broker for other runs."""
    other = {
        "environment": dict(pair.split("=", 1) for pair in options.env_b),
        "arguments": shlex.split(options.args_b),
    }
    found: dict[str, dict[str, Any]] = {"A": {}}
    for path in options.against or [ROOT] * any(other.values()):
        name = "B" if len(options.against) < 2 else path.name
        found[name] = {"checkout": path.resolve(), **other}
    return {**found, "A again": {}} if options.control else found


def compare(cases: list[Case], options: argparse.Namespace, stack: ExitStack) -> list[Comparison]:
    """Start the servers and add their cases; the comparisons to report."""
    brokers = sides(options)
    ab = len(brokers) > 1
    default = "flex-16" if ab else ",".join(CASES + NODE * options.peers)
    names = [tuple(name.split("-")) for name in (options.case or default).split(",")]
    made = stack.enter_context(stores())
    for side, settings in brokers.items():
        server = stack.enter_context(broker(made, **settings))
        cases += [
            Case(f"{flow}-{k} {side}" if ab else f"{flow}-{k}", server, flow, int(k))
            for flow, k in names
            if flow != "node"
        ]
    if ab:
        return [
            (f"{flow}-{k} {side}", f"{flow}-{k} A")
            for flow, k in names
            for side in brokers
            if side != "A"
        ]
    nodes = [k for flow, k in names if flow == "node"]
    if nodes:
        peer = stack.enter_context(node_peer(made))
        cases += [Case(f"node-{k}", peer, "node", int(k)) for k in nodes]
    return [(f"propelauth-{k}", f"node-{k}") for k in nodes]


def main() -> int:
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result: dict[str, Any] = {"machine": machine.described()}
    cases: list[Case] = []
    comparisons: list[Comparison] = []
    try:
        if options.endurance:
            endurance.run(result, _say)
            return 0
        with ExitStack() as stack:
            try:
                if options.scale:
                    comparisons = scale.prepare(cases, options.credentials, stack, _say)
                else:
                    comparisons = compare(cases, options, stack)
                count = options.rounds or (12 if len(sides(options)) > 1 else 5)
                rounds.run(cases, count, options.seconds, _say)
            finally:  # before the servers are stopped, which a second Ctrl-C may cut short
                result = report.result(result["machine"], cases, comparisons)
                print(report.text(result), flush=True)
        return 0
    except (LoginFailed, MissingPart) as fault:
        print(f"The run ended: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
