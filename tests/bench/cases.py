"""Cases and their repetitions: what is run, in which order, and which repetitions count.

Cases take turns: one repetition of each, then the next round, so that a slow minute of the machine
falls on all of them alike, and cases that are compared (a peer, two workers, a larger database) are
compared within the same minutes. The core is calibrated right before and right after each
repetition. A repetition does not count in whose course other processes took more than `MOST_OTHER`
of a core, or the two calibrations differ by more than `MOST_DRIFT`; further rounds make up for it.
Repetitions are short and many: where neighbours come and go within seconds, a calibration tells
little about three seconds and much about one.

Other virtual machines' processes count as other processes. Nothing here shows them but the core's
speed: one that computes on the core's other thread makes a verification a third slower, and a login
more than that, for it takes half of the caches as well, which a verification hardly uses. So a
repetition does not count either when one of its calibrations took longer by more than `MOST_OTHER`
than the run's fastest. A core that is shared from the first to the last repetition is what the
machine is, and counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.bench import measure
from tests.bench.report import MOST_DRIFT, MOST_OTHER, Discarded, Repetition
from tests.bench.service import Cores, Driver, Server, Stores, placed, settled
from tests.support.processes import accepted

_MOST_ROUNDS = 6  # times as many as repetitions were asked for


class Unfit(Exception):
    """A run that may not be reported; the sentence says why."""


class _Reading(NamedTuple):
    """Seconds: CPU of what is measured, of each process with its descendants, of all processes; and
    the time.
    """

    measured: float
    server: float
    redis: float
    postgres: float
    driver: float
    machine: float
    clock: float


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A server under load; `name` is what tables call it. `counts` says whether its metrics tell of
    every request to the stores: not where several processes serve.
    """

    name: str
    server: Server
    driver: Driver
    stores: Stores
    calibrate: measure.Calibration
    counts: bool = True

    def repetition(self, what: str, in_flight: int, count: int, rate: int | None) -> Repetition:
        """Run `count` logins; with a `rate`, as many begin a second.

        Raises:
            Unfit: one failed.
        """
        return self._repetition(what, in_flight, count, rate, None)

    def _repetition(
        self, what: str, in_flight: int, count: int, rate: int | None, of: int | None
    ) -> Repetition:
        """What is measured is the server's CPU for all logins; with `of` a worker's, with its part
        of the supervisor's, for those that it served.
        """
        self.driver("connect", in_flight=in_flight)
        settled()
        unit = self.calibrate()
        sent = self._sent()
        before = self._reading(of)
        told = sound(self.driver(what, count=count, in_flight=in_flight, rate=rate))
        after = self._reading(of)
        unit_after = self.calibrate()
        sent_after = self._sent()
        used = _Reading(*(b - a for a, b in zip(before, after, strict=True)))
        requests, statements = (
            (b - a for a, b in zip(sent, sent_after, strict=True))
            if sent and sent_after
            else (None, None)
        )
        served = told["logins"]
        if of is not None:
            served = sum(told["ports"].get(str(port), 0) for port in accepted(of, self.server.port))
        part = served / told["logins"]  # stores are everybody's
        return Repetition(
            logins=served,
            seconds=told["seconds"],
            server=used.measured,
            redis=used.redis * part,
            postgres=used.postgres * part,
            others=(used.machine - used.server - used.redis - used.postgres - used.driver)
            / used.clock,
            verifies=(unit.verify, unit_after.verify),
            alone=(unit.alone + unit_after.alone) / 2,
            sign=(unit.sign + unit_after.sign) / 2,
            redis_requests=requests,
            statements=statements,
            p50=told["whole"]["p50"],
            p99=told["whole"]["p99"],
            steps=told["steps"],
            behind=told["seconds"] * rate / count - 1 if rate else 0.0,
        )

    def _reading(self, of: int | None) -> _Reading:
        server = measure.cpu_seconds(self.server.pid)
        return _Reading(
            measured=server if of is None else self._of_worker(of),
            server=server,
            redis=measure.cpu_seconds(self.stores.redis_pid),
            postgres=measure.cpu_seconds(self.stores.postgres_pid),
            driver=measure.cpu_seconds(self.driver.pid),
            machine=measure.busy_seconds(),
            clock=time.monotonic(),
        )

    def _of_worker(self, pid: int) -> float:
        supervisor = measure.own_cpu_seconds(self.server.pid)
        return measure.own_cpu_seconds(pid) + supervisor / len(self.server.workers())

    def _sent(self) -> tuple[float, float] | None:
        if not self.counts:
            return None
        name = "broker_store_seconds_count"
        return self.server.metric(name, store="redis"), self.server.metric(name, store="postgres")


@dataclass(frozen=True, slots=True, eq=False)
class Apart(Bench):
    """Workers of one server, of which one has the server's core to itself while it is measured, in
    `turns`; the others serve on the rest's cores meanwhile, which they share with stores and
    driver."""

    cores: Cores = field(kw_only=True)
    turns: Iterator[int] = field(kw_only=True)

    def repetition(self, what: str, in_flight: int, count: int, rate: int | None) -> Repetition:
        mine = next(self.turns)
        workers = self.server.workers()
        try:
            for worker in workers:
                placed(worker, self.cores.server if worker == mine else self.cores.rest)
            return self._repetition(what, in_flight, count, rate, mine)
        finally:
            for worker in workers:
                placed(worker, self.cores.server)


@dataclass(slots=True)
class Case:
    """`count` logins a repetition, `in_flight` at a time; at this rate, or for None each as soon as
    one is done.
    """

    name: str
    bench: Bench
    what: str
    in_flight: int
    count: int
    rate: int | None = None
    ran: list[Repetition] = field(default_factory=list)
    good: list[Repetition] = field(default_factory=list)

    def warm(self) -> None:
        count = max(self.count // 4, self.in_flight * 2)
        self.bench.driver("connect", in_flight=self.in_flight)
        sound(self.bench.driver(self.what, count=count, in_flight=self.in_flight))

    def repeat(self) -> None:
        self.ran.append(self.bench.repetition(self.what, self.in_flight, self.count, self.rate))

    def judge(self, best: float) -> None:
        """Find what counts, where a verification takes `best` seconds when the core is ours
        alone.
        """
        self.good = [r for r in self.ran if r.discarded(best) is None]

    def unfit(self, best: float) -> str:
        """Why there are too few repetitions."""
        discarded: dict[Discarded | None, list[Repetition]] = {}
        for repetition in self.ran:
            discarded.setdefault(repetition.discarded(best), []).append(repetition)
        reasons = []
        if busy := discarded.get("busy"):
            most = max(r.others for r in busy)
            reasons.append(
                f"{len(busy)} while other processes took over {MOST_OTHER:.0%} of a core (up to {most:.0%})"
            )
        if drifted := discarded.get("drifted"):
            verifies = [v * 1e6 for r in drifted for v in r.verifies]
            reasons.append(
                f"{len(drifted)} in whose course the core changed its speed by over {MOST_DRIFT:.0%}"
                f" (one verification took {min(verifies):.0f} to {max(verifies):.0f} us)"
            )
        if shared := discarded.get("shared"):
            slowest = max(max(r.verifies) for r in shared) * 1e6
            reasons.append(
                f"{len(shared)} while a neighbour had over {MOST_OTHER:.0%} of the core"
                f" (one verification took up to {slowest:.0f} us, {best * 1e6:.0f} at best)"
            )
        if behind := discarded.get("behind"):
            reasons.append(
                f"{len(behind)} in which {self.rate} logins a second could not begin"
                f" (they took up to {max(r.behind for r in behind):.0%} longer)"
            )
        return (
            f"of {len(self.ran)} repetitions of {self.name} {len(self.good) or 'none'} counted; discarded were "
            f"{' and '.join(reasons)}. Run it again when the machine is quiet, or fewer cases with --cases."
        )


def measured(
    cases: Sequence[Case], repetitions: int, say: Callable[[str], None]
) -> tuple[list[Case], list[str]]:
    """Run every case in turns until each has its repetitions: those that may be reported, and a
    sentence about each other one.

    When the rounds are used up, a case with more than half of its repetitions is reported, with as
    many as there are.

    Raises:
        Unfit: a login failed, or no case may be reported.
    """
    for case in cases:
        case.warm()
    best = math.inf
    for number in range(repetitions * _MOST_ROUNDS):
        lacking = [case for case in cases if len(case.good) < repetitions]
        if not lacking:
            break
        say(f"round {number + 1}: {', '.join(case.name for case in lacking)}")
        for case in lacking:
            case.repeat()
        best = min(best, *(v for case in lacking for v in case.ran[-1].verifies))
        for case in cases:
            case.judge(best)
    fit = [case for case in cases if len(case.good) * 2 > repetitions]
    unfit = [case.unfit(best) for case in cases if case not in fit]
    if not fit:
        raise Unfit(" ".join(unfit))
    return fit, unfit


def sound(told: dict[str, Any]) -> dict[str, Any]:
    """What the driver told of a run in which every login succeeded.

    Raises:
        Unfit: one failed.
    """
    if told["failed"]:
        raise Unfit(f"{told['failed']} logins failed, the first with: {told['failures'][0]}")
    return told
