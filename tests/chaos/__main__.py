"""The harness as a program.

    python -m tests.chaos run FAULT [--seed N]
    python -m tests.chaos long [--seed N] [--seconds N]
    python -m tests.chaos mutants [NAME …]
    python -m tests.chaos judge FILE

`run` and `long` take `--stores sentinel|cluster` and `--one-time term|postgres` (BROKER_ONE_TIME).
Histories and timelines are written to `.chaos/`. The exit status is 1 where a promise was broken,
or where a mutant was not found out.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from pathlib import Path

from tests.chaos.checker import judge
from tests.chaos.deployment import deployed
from tests.chaos.faults import FAULTS
from tests.chaos.history import read
from tests.chaos.mutants import MUTANTS, copied
from tests.chaos.report import FOLDER, report
from tests.chaos.runs import mixed, run


async def run_one(options: argparse.Namespace) -> int:
    fault = {found.__name__: found for found in FAULTS[options.stores]}[options.fault]
    path = FOLDER / f"{options.fault}-{options.seed}.jsonl"
    async with deployed(options.stores, one_time=options.one_time) as deployment:
        found = await run(deployment, fault, path, seed=options.seed)
    return 0 if report(path, found) else 1


async def run_long(options: argparse.Namespace) -> int:
    """Mixed faults until the time is over, in histories of about a minute."""
    print(f"seed {options.seed}", flush=True)
    return min(
        1, await mixed(FOLDER, options.stores, options.one_time, options.seed, options.seconds)
    )


async def run_mutants(options: argparse.Namespace) -> int:
    """A run on each mutant, which must break the mutant's rule."""
    missed = []
    for name in options.name or MUTANTS:
        mutant = MUTANTS[name]
        path = FOLDER / f"mutant-{name}.jsonl"
        with copied(mutant) as tree:
            async with deployed(mutant.kind, tree) as deployment:
                found = await run(deployment, mutant.fault, path, seed=options.seed)
        rules = {violation.rule for violation in found}
        caught = mutant.rule in rules
        print(f"{name}: {'found out' if caught else 'MISSED'}, broke {sorted(rules)}", flush=True)
        if not caught:
            missed.append(name)
    return 1 if missed else 0


async def judge_again(options: argparse.Namespace) -> int:
    return 0 if report(options.file, judge(read(options.file))) else 1


def main() -> int:
    """Parse the command line and run."""
    top = argparse.ArgumentParser(prog="python -m tests.chaos")
    commands = top.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    stores = argparse.ArgumentParser(add_help=False)
    stores.add_argument("--stores", choices=("sentinel", "cluster"), default="sentinel")
    stores.add_argument("--one-time", choices=("term", "postgres"), default="term")
    one = commands.add_parser("run", parents=[shared, stores])
    one.add_argument("fault")
    one.set_defaults(act=run_one)
    long = commands.add_parser("long", parents=[shared, stores])
    long.add_argument("--seconds", type=int, default=600)
    long.set_defaults(act=run_long)
    mutants = commands.add_parser("mutants", parents=[shared])
    mutants.add_argument("name", nargs="*", metavar="NAME", help=", ".join(MUTANTS))
    mutants.set_defaults(act=run_mutants)
    again = commands.add_parser("judge")
    again.add_argument("file", type=Path)
    again.set_defaults(act=judge_again)
    options = top.parse_args()
    return int(asyncio.run(options.act(options)))


if __name__ == "__main__":
    sys.exit(main())
