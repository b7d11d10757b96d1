"""`python -m tests.bench`: measure, and report as text and as JSON.

python -m tests.bench                           the cases of this checkout (two minutes)
python -m tests.bench --peers                   and the Node peer, turn about
python -m tests.bench --against PATH --control  A/B: this checkout, another one, and itself again
python -m tests.bench --env-b NAME=value        A/B of a setting
python -m tests.bench --endurance               memory over 100,000 logins
python -m tests.bench --day                     a day of one million users, three brokers
python -m tests.bench --scale                   5 million credentials beside 10 thousand
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import day, endurance, machine, report, rounds, scale
from tests.bench.rounds import Case
from tests.bench.service import ROOT, LoginFailed, broker, node_peer, stores
from tests.support.parts import MissingPart

CASES = "flex-1,flex-16,flex-64,register-16,propelauth-16,propelauth-64,hanko-16"
NODE = ",node-16,node-64"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--json", type=Path, metavar="FILE", help="write the figures here, also when interrupted")
    add("--case", help=f"only these, with commas between: {CASES}{NODE}")
    add("--rounds", "--pairs", type=int, help="5; of an A/B 12")
    add("--seconds", type=float, default=2.0, help="length of a turn (%(default)s)")
    add("--rate", type=float, default=0, help="logins a second, instead of a closed loop")
    add("--peers", action="store_true", help="measure the Node peer as well")
    more: Any = {"action": "append", "default": []}
    add("--against", type=Path, metavar="PATH", help="B: another checkout; repeatable", **more)
    add("--env-b", metavar="NAME=VALUE", help="B's environment; repeatable", **more)
    add("--args-b", default="", metavar="WORDS", help="B's arguments for `broker serve`")
    add("--control", action="store_true", help="a second process of A, for the noise of the ratio")
    add("--endurance", action="store_true", help="memory over many logins, instead of the cases")
    add("--day", action="store_true", help="a day of one million users, instead of the cases")
    add("--scale", action="store_true", help="a large database, instead of the cases")
    add("--credentials", type=int, default=5_000_000, help="of --scale (%(default)s)")
    return made


def start(cases: list[Case], options: argparse.Namespace, stack: ExitStack) -> None:
    """Start the servers and add their cases, each with the case that it is compared with."""
    other = {
        "environment": dict(pair.split("=", 1) for pair in options.env_b),
        "arguments": shlex.split(options.args_b),
    }
    sides: dict[str, dict[str, Any]] = {"": {}}
    for path in options.against or [ROOT] * any(other.values()):
        sides[" B" if len(options.against) < 2 else f" {path.name}"] = {
            "checkout": path.resolve(),
            **other,
        }
    if options.control:
        sides[" again"] = {}
    chosen = options.case or ("flex-16" if len(sides) > 1 else CASES + NODE * options.peers)
    names = [(name, *name.split("-")) for name in chosen.split(",")]
    made = stack.enter_context(stores())
    found: dict[str, Case] = {}
    for side, settings in sides.items():
        server = stack.enter_context(broker(made, **settings))
        for name, flow, k in names:
            if flow != "node":
                base = found.get(name)
                found[name + side] = Case(name + side, server, flow, int(k), options.rate, base)
    if "node" in chosen:
        peer = stack.enter_context(node_peer(made))
        for name, flow, k in names:
            if flow == "node":
                found[name] = Case(name, peer, flow, int(k), options.rate)
                if f"propelauth-{k}" in found:
                    found[f"propelauth-{k}"].base = found[name]
    cases += found.values()


def main() -> int:
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    say = partial(print, file=sys.stderr, flush=True)
    result: dict[str, Any] = {"machine": machine.described()}
    cases: list[Case] = []
    try:
        if options.endurance:
            endurance.run(result, say)
            return 0
        if options.day:
            day.run(result, say)
            return 0
        with ExitStack() as stack:
            try:
                if options.scale:
                    scale.start(cases, options.credentials, stack, say)
                else:
                    start(cases, options, stack)
                ab = options.against or options.env_b or options.args_b or options.control
                rounds.run(cases, options.rounds or (12 if ab else 5), options.seconds, say)
            finally:  # before the servers are stopped, which a second Ctrl-C may cut short
                result = report.result(result["machine"], cases)
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


if __name__ == "__main__":
    sys.exit(main())
