"""From turns to figures: medians with their spread, ratios of pairs, and the text of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

from tests.bench.rounds import Case, Turn

_READINGS: dict[str, Callable[[Turn], float]] = {
    "CPU": lambda turn: turn.cpu,
    "CPU with stores": lambda turn: turn.cpu + turn.redis + turn.postgres,
    "p50": lambda turn: turn.latency["login"]["p50"],
    "WAL": lambda turn: turn.wal,
}


def spread(values: Sequence[float], noisy: Sequence[bool], digits: int) -> dict[str, Any]:
    """The values in their order, which are noisy, and their medians, quartiles and limits."""
    low, _, high = quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    quiet = [value for value, loud in zip(values, noisy, strict=True) if not loud]
    return {
        "all": [round(value, digits) for value in values],
        "noisy": [number for number, loud in enumerate(noisy, 1) if loud],
        "median": round(median(values), digits),
        "median_quiet": round(median(quiet), digits) if len(quiet) >= 3 else None,
        "quartiles": [round(low, digits), round(high, digits)],
        "limits": [round(min(values), digits), round(max(values), digits)],
    }


def figures(case: Case) -> dict[str, Any]:
    """What a case comes to. CPU in microseconds a login, latencies in milliseconds."""

    def middle(read: Callable[[Turn], float]) -> float:
        return round(median(map(read, case.turns)), 2)

    def latency(step: str, quantile: str) -> float:
        return middle(lambda turn: turn.latency[step][quantile] * 1e3)

    return {
        "cpu": spread([turn.cpu for turn in case.turns], [turn.noisy for turn in case.turns], 1),
        "redis": middle(lambda turn: turn.redis),
        "postgres": middle(lambda turn: turn.postgres),
        "wal": middle(lambda turn: turn.wal),
        "logins_per_second": middle(lambda turn: turn.per_second),
        "latency": {
            step: {quantile: latency(step, quantile) for quantile in ("p50", "p99")}
            for step in case.turns[0].latency
        },
        "failed": sum(turn.failed for turn in case.turns),
        "turns": [asdict(turn) for turn in case.turns],
    }


def ratios(over: Case, under: Case) -> dict[str, Any]:
    """Each round's ratio of the first case to the second; a pair is noisy if a turn of it is."""
    pairs = list(zip(over.turns, under.turns, strict=False))  # an interrupted round has no pair
    noisy = [mine.noisy or other.noisy for mine, other in pairs]
    return {
        name: spread([read(mine) / read(other) for mine, other in pairs], noisy, 3)
        for name, read in _READINGS.items()
        if all(read(other) for _, other in pairs)
    }


def result(machine: dict[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
    """The run for JSON, with the cases that have had a turn."""
    measured = [case for case in cases if case.turns]
    return {
        "machine": machine,
        "ratios": {
            f"{case.name} / {case.base.name}": ratios(case, case.base)
            for case in measured
            if case.base in measured
        },
        "cases": {case.name: figures(case) for case in measured},
    }


def text(result: dict[str, Any]) -> str:
    """The run for people: ratios first, then every repetition, then requests."""
    machine, cases = result["machine"], result["cases"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}"
        f" ({'optimised' if machine['optimised'] else 'plain'} build), {packages}"
    ]
    for name, readings in result["ratios"].items():
        lines += ["", f"{name}, turn about (* noisy)", f"  pairs: {_listed(readings['CPU'], 2)}"]
        lines += [f"  {reading:<16}{_summed(at, 2)}" for reading, at in readings.items()]
    lines += [
        "",
        f"{'case':<22}{'CPU us':>8}{'Redis':>7}{'PG':>7}{'WAL B':>7}{'logins/s':>10}"
        f"{'p50 ms':>8}{'p99 ms':>8}{'failed':>8}",
    ]
    for name, at in cases.items():
        login = at["latency"]["login"]
        lines.append(
            f"{name:<22}{at['cpu']['median']:>8.0f}{at['redis']:>7.0f}{at['postgres']:>7.0f}"
            f"{at['wal']:>7.0f}{at['logins_per_second']:>10.0f}{login['p50']:>8.2f}"
            f"{login['p99']:>8.2f}{at['failed']:>8}"
        )
    lines += ["", "CPU us of every repetition (* noisy: other processes took over 15 % of a core)"]
    for name, at in cases.items():
        lines += [f"{name:<22}{_listed(at['cpu'], 0)}", f"{'':<22}{_summed(at['cpu'], 0)}"]
    lines += ["", "Requests, p50 / p99 in ms"]
    for name, at in cases.items():
        steps = [
            f"{step} {found['p50']:.2f} / {found['p99']:.2f}"
            for step, found in at["latency"].items()
            if step != "login"
        ]
        lines.append(f"{name:<22}{', '.join(steps)}")
    return "\n".join(lines)


def _listed(at: dict[str, Any], digits: int) -> str:
    return " ".join(
        f"{value:.{digits}f}{'*' if number in at['noisy'] else ''}"
        for number, value in enumerate(at["all"], 1)
    )


def _summed(at: dict[str, Any], digits: int) -> str:
    (low, high), (least, most) = at["quartiles"], at["limits"]
    quiet = "fewer than 3 quiet ones"
    if at["median_quiet"] is not None:
        count = len(at["all"]) - len(at["noisy"])
        quiet = f"{at['median_quiet']:.{digits}f} over {count} quiet ones"
    return (
        f"median {at['median']:.{digits}f} (quartiles {low:.{digits}f} to {high:.{digits}f},"
        f" all {least:.{digits}f} to {most:.{digits}f}); {quiet}"
    )
