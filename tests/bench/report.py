"""From repetitions to figures: medians, tables, the comparison of two runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MOST_OTHER = 0.15  # of a core, by processes that are none of ours: this machine's, or a neighbour's of the same processor
MOST_DRIFT = 0.10  # between the calibrations before and after a repetition
MOST_BEHIND = 0.10  # of the time that logins take when they begin at the rate they should
Discarded = Literal["busy", "drifted", "shared", "behind"]
_TOKENS = ("hanko",)  # what hands out a token signed with RS256


@dataclass(frozen=True, slots=True)
class Repetition:
    """One measured repetition; CPU and wall in seconds for all its logins.

    `verifies` are seconds of CPU for one verification, before and after it; `sign` for one token.
    Requests to Redis and statements are None where the server does not count them. `behind` is how
    much longer than planned logins took that begin at a rate, as a part.
    """

    logins: int
    seconds: float
    server: float
    redis: float
    postgres: float
    others: float
    verifies: tuple[float, float]
    sign: float
    alone: float
    redis_requests: float | None
    statements: float | None
    p50: float
    p99: float
    steps: dict[str, dict[str, float]]
    behind: float = 0.0

    @property
    def verify(self) -> float:
        return sum(self.verifies) / 2

    def discarded(self, best: float) -> Discarded | None:
        """Why it does not count, None if it does. `best` is what a verification took when it was
        fastest, in seconds: where it takes longer, somebody else has a part of the core."""
        if self.others > MOST_OTHER:
            return "busy"
        if abs(self.verifies[0] - self.verifies[1]) / self.verify > MOST_DRIFT:
            return "drifted"
        if max(self.verifies) > best * (1 + MOST_OTHER):
            return "shared"
        return "behind" if self.behind > MOST_BEHIND else None


def figures(what: str, repetitions: Sequence[Repetition]) -> dict[str, Any]:
    """What a case comes to: medians over its repetitions; CPU in microseconds per login. `ratio` is
    the median of each repetition's CPU per login over the verification that was measured around it.
    """

    def us(values: Iterable[float]) -> float:
        return round(statistics.median(values) * 1e6, 1)

    def per_login(counts: Sequence[float | None]) -> float | None:
        known = [c / r.logins for c, r in zip(counts, repetitions, strict=True) if c is not None]
        return round(statistics.median(known), 2) if known else None

    def ms(quantiles: Sequence[dict[str, float]]) -> dict[str, float]:
        return {
            q: round(statistics.median([f[q] for f in quantiles]) * 1e3, 2) for q in ("p50", "p99")
        }

    cpu = statistics.median([r.server / r.logins for r in repetitions])
    found = {
        "repetitions": len(repetitions),
        "logins": sum(r.logins for r in repetitions),
        "cpu_us": us([cpu]),
        "cpu_us_all": [us([r.server / r.logins]) for r in repetitions],
        "verify_us": us(r.verify for r in repetitions),
        "verify_us_all": [us([r.verify]) for r in repetitions],
        "verify_alone_us": us(r.alone for r in repetitions),
        "ratio": round(statistics.median([r.server / r.logins / r.verify for r in repetitions]), 2),
        "ratio_all": [round(r.server / r.logins / r.verify, 2) for r in repetitions],
        "redis_cpu_us": us(r.redis / r.logins for r in repetitions),
        "postgres_cpu_us": us(r.postgres / r.logins for r in repetitions),
        "whole_ratio": round(
            statistics.median([(r.server + r.postgres) / r.logins / r.verify for r in repetitions]),
            2,
        ),
        "logins_per_core_second": round(1 / cpu),
        "logins_per_second": round(statistics.median([r.logins / r.seconds for r in repetitions])),
        "redis_requests": per_login([r.redis_requests for r in repetitions]),
        "statements": per_login([r.statements for r in repetitions]),
        "login_ms": ms([{"p50": r.p50, "p99": r.p99} for r in repetitions]),
        "request_ms": {
            step: ms([r.steps[step] for r in repetitions]) for step in repetitions[0].steps
        },
    }
    if what in _TOKENS:
        found["signing_us"] = us(r.sign for r in repetitions)
        found["signing_ratio"] = round(
            statistics.median([r.sign / r.verify for r in repetitions]), 2
        )
    return found


def table(result: dict[str, Any]) -> str:
    """A run as text: the machine, a line for each case, the requests of each case, and what else
    was found.
    """
    cases = result["cases"]
    verifies = [v for f in cases.values() for v in f["verify_us_all"]]
    lines = [
        *about(result["machine"]),
        f"one P-256 verification on the server's core: {statistics.median(verifies):.0f} us of CPU"
        f" beside cores that work ({min(verifies):.0f} to {max(verifies):.0f} in this run; each ratio is to the one measured around its"
        f" repetition), {statistics.median([f['verify_alone_us'] for f in cases.values()]):.0f} us beside cores that rest",
        "",
        f"{'case':<22}{'runs':>5}{'CPU us':>8}{'ratio':>7}{'verify':>8}{'/s/core':>9}{'Redis':>7}{'PG':>7}{'reqs':>6}{'stmts':>6}{'p50 ms':>8}{'p99 ms':>8}",
    ]
    for name, f in cases.items():
        lines.append(
            f"{name:<22}{f['repetitions']:>5}{f['cpu_us']:>8.0f}{f['ratio']:>7.2f}{f['verify_us']:>8.0f}"
            f"{f['logins_per_core_second']:>9}{f['redis_cpu_us']:>7.0f}{f['postgres_cpu_us']:>7.0f}"
            f"{_known(f['redis_requests']):>6}{_known(f['statements']):>6}"
            f"{f['login_ms']['p50']:>8.2f}{f['login_ms']['p99']:>8.2f}"
        )
        if "signing_us" in f:
            rest = f["ratio"] - f["signing_ratio"]
            lines.append(
                f"{'  of which signing':<22}{'':>5}{f['signing_us']:>8.0f}{f['signing_ratio']:>7.2f}"
                f"   (one RS256 token; without it the ratio is {rest:.2f})"
            )
    lines += ["", f"{'case':<22}{'request':<10}{'p50 ms':>8}{'p99 ms':>8}"]
    for name, f in cases.items():
        for step, at in f["request_ms"].items():
            lines.append(f"{name:<22}{step:<10}{at['p50']:>8.2f}{at['p99']:>8.2f}")
            name = ""
    lines += ["", *(f"{name}: {value}" for name, value in result["also"].items())]
    lines += [f"Not reported: {sentence}" for sentence in result["unfit"]]
    return "\n".join(lines)


def about(machine: dict[str, Any]) -> list[str]:
    """What was measured on, in lines."""
    return [
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}"
        f" ({'optimised' if machine['optimised'] else 'not an optimised'} build)",
        "  " + ", ".join(f"{name} {number}" for name, number in machine["packages"].items()),
        f"  build: {machine['python_build'] or '(flags unknown)'}",
    ]


def _known(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Two runs beside each other, by the ratio, which outlives a change of machine."""
    lines = [f"{'case':<24}{'old':>8}{'new':>8}{'new/old':>9}"]
    for name in old["cases"].keys() & new["cases"].keys():
        before, after = old["cases"][name]["ratio"], new["cases"][name]["ratio"]
        lines.append(f"{name:<24}{before:>8.2f}{after:>8.2f}{after / before:>9.2f}")
    return "\n".join([lines[0], *sorted(lines[1:])])
