"""From repetitions to figures: medians, tables, the comparison of two runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_OTHER = 0.15  # of a core, by processes that are none of ours


@dataclass(frozen=True, slots=True)
class Repetition:
    """One measured repetition; CPU and wall in seconds for all its logins."""

    logins: int
    seconds: float
    server: float
    redis: float
    postgres: float
    others: float
    redis_requests: float
    statements: float
    p50: float
    p99: float
    steps: dict[str, dict[str, float]]


def figures(repetitions: Sequence[Repetition], verify: float) -> dict[str, Any]:
    """What a case comes to: medians over its repetitions; CPU in microseconds per login."""

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    cpu = middle([r.server / r.logins for r in repetitions])
    return {
        "repetitions": len(repetitions),
        "logins": sum(r.logins for r in repetitions),
        "cpu_us": round(cpu * 1e6, 1),
        "cpu_us_all": [round(r.server / r.logins * 1e6, 1) for r in repetitions],
        "ratio": round(cpu / verify, 2),
        "redis_cpu_us": round(middle([r.redis / r.logins for r in repetitions]) * 1e6, 1),
        "postgres_cpu_us": round(middle([r.postgres / r.logins for r in repetitions]) * 1e6, 1),
        "logins_per_core_second": round(1 / cpu),
        "logins_per_second": round(middle([r.logins / r.seconds for r in repetitions])),
        "redis_requests": round(middle([r.redis_requests / r.logins for r in repetitions]), 2),
        "statements": round(middle([r.statements / r.logins for r in repetitions]), 2),
        "login_ms": {
            "p50": round(middle([r.p50 for r in repetitions]) * 1e3, 2),
            "p99": round(middle([r.p99 for r in repetitions]) * 1e3, 2),
        },
        "request_ms": {
            step: {q: round(middle([r.steps[step][q] for r in repetitions]) * 1e3, 2) for q in ("p50", "p99")}
            for step in repetitions[0].steps
        },
    }


def table(result: dict[str, Any]) -> str:
    """A run as text."""
    lines = [
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores; Python {result['machine']['python']}"
        f" ({'optimised' if result['machine']['optimised'] else 'not an optimised'} build)",
        "  " + ", ".join(f"{name} {number}" for name, number in result["machine"]["packages"].items()),
        f"  build: {result['machine']['python_build'] or '(flags unknown)'}",
        f"one P-256 verification: {result['verify_us']:.1f} us of CPU on the server's core",
        "",
        f"{'case':<24}{'CPU us':>8}{'ratio':>7}{'/s/core':>9}{'Redis':>7}{'PG':>7}{'reqs':>6}{'stmts':>6}{'p50 ms':>8}{'p99 ms':>8}",
    ]
    for name, f in result["cases"].items():
        lines.append(
            f"{name:<24}{f['cpu_us']:>8.0f}{f['ratio']:>7.2f}{f['logins_per_core_second']:>9}{f['redis_cpu_us']:>7.0f}"
            f"{f['postgres_cpu_us']:>7.0f}{f['redis_requests']:>6.1f}{f['statements']:>6.1f}"
            f"{f['login_ms']['p50']:>8.2f}{f['login_ms']['p99']:>8.2f}"
        )
    for name, value in result.get("also", {}).items():
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Two runs beside each other, by the ratio, which outlives a change of machine."""
    lines = [f"{'case':<24}{'old':>8}{'new':>8}{'new/old':>9}"]
    for name in old["cases"].keys() & new["cases"].keys():
        before, after = old["cases"][name]["ratio"], new["cases"][name]["ratio"]
        lines.append(f"{name:<24}{before:>8.2f}{after:>8.2f}{after / before:>9.2f}")
    return "\n".join([lines[0], *sorted(lines[1:])])
