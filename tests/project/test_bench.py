"""The benchmark's arithmetic: which repetitions count, what their figures come to, and what is said
when too few do.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from tests.bench import measure, report
from tests.bench.cases import Apart, Bench, Case, Unfit, measured, sound
from tests.bench.report import Repetition
from tests.bench.service import ROOT, Cores, aimed, broker, stores
from tests.support.processes import DEADLINE, accepted, alive, descendants

STEADY = Repetition(
    logins=1000,
    seconds=2.0,
    server=1.0,
    redis=0.1,
    postgres=0.2,
    others=0.05,
    verifies=(100e-6, 100e-6),
    sign=600e-6,
    alone=90e-6,
    redis_requests=7000,
    statements=2000,
    p50=0.016,
    p99=0.03,
    steps={"options": {"p50": 0.006, "p99": 0.01}, "verify": {"p50": 0.01, "p99": 0.02}},
)
BUSY = replace(STEADY, others=0.2)
DRIFTED = replace(STEADY, verifies=(100e-6, 114e-6))
SHARED = replace(STEADY, verifies=(113e-6, 118e-6))
BEHIND = replace(STEADY, behind=0.3)


@dataclass
class Played:
    """A bench whose repetitions are given."""

    repetitions: list[Repetition]
    ran: list[str] = field(default_factory=list)

    def driver(self, what: str, **_: int) -> dict[str, int]:
        if what != "connect":
            self.ran.append(f"warm {what}")
        return {"failed": 0}

    def repetition(self, what: str, in_flight: int, count: int, rate: int | None) -> Repetition:
        self.ran.append(what)
        return self.repetitions.pop(0)


def case(name: str, played: Played) -> Case:
    return Case(f"{name}-16", cast("Bench", played), name, 16, 1000)


@pytest.mark.parametrize(
    ("repetition", "why"),
    [
        (STEADY, None),
        (BUSY, "busy"),
        (DRIFTED, "drifted"),
        (SHARED, "shared"),
        (BEHIND, "behind"),
        (replace(SHARED, behind=0.3), "shared"),
        (replace(STEADY, behind=0.1), None),
        (replace(STEADY, others=0.15, verifies=(96e-6, 105e-6)), None),
        (replace(STEADY, verifies=(106e-6, 114e-6)), None),
    ],
)
def test_a_repetition_counts_on_a_quiet_and_steady_core(
    repetition: Repetition, why: str | None
) -> None:
    assert repetition.discarded(best=100e-6) == why


def test_the_ratio_is_each_repetitions_own() -> None:
    """A slow minute makes logins and verifications dearer alike, and no ratio."""
    slow = replace(STEADY, server=1.3, verifies=(130e-6, 130e-6))
    found = report.figures("flex", [STEADY, slow, slow])
    assert (found["ratio"], found["ratio_all"]) == (10.0, [10.0] * 3)
    assert (found["cpu_us"], found["verify_us"]) == (1300.0, 130.0)
    assert (found["redis_requests"], found["statements"]) == (7.0, 2.0)
    assert found["request_ms"]["verify"] == {"p50": 10.0, "p99": 20.0}
    assert "signing_us" not in found


def test_what_signing_takes_is_apart() -> None:
    found = report.figures("hanko", [STEADY])
    assert (found["signing_us"], found["signing_ratio"]) == (600.0, 6.0)
    machine: dict[str, object] = dict.fromkeys(
        ("cpu", "cores", "python", "optimised", "python_build"), "x"
    )
    machine["packages"] = {}
    result = {"machine": machine, "cases": {"hanko-16": found}, "also": {"more": "x"}, "unfit": []}
    text = report.table(result)
    assert "without it the ratio is 4.00" in text
    assert "more: x" in text


def test_a_server_that_counts_nothing_shows_nothing() -> None:
    found = report.figures("peer", [replace(STEADY, redis_requests=None, statements=None)])
    assert (found["redis_requests"], found["statements"]) == (None, None)


def test_cases_take_turns_and_make_up_for_what_is_discarded() -> None:
    played = Played([STEADY, BUSY, STEADY, STEADY, STEADY])
    cases = [case("flex", played), case("hanko", played)]
    fit, unfit = measured(cases, 2, lambda _: None)
    assert played.ran == ["warm flex", "warm hanko", "flex", "hanko", "flex", "hanko", "hanko"]
    assert (fit, unfit) == (cases, [])


def test_what_a_neighbour_slowed_is_known_by_what_comes_later() -> None:
    """What is slow throughout counts."""
    played = Played([SHARED, STEADY, STEADY])
    slowed = case("flex", played)
    assert measured([slowed], 2, lambda _: None) == ([slowed], [])
    assert slowed.good == [STEADY, STEADY]
    slow = case("flex", Played([SHARED, SHARED]))
    assert measured([slow], 2, lambda _: None) == ([slow], [])


def test_too_few_repetitions_are_told_with_the_reason() -> None:
    good = case("flex", Played([STEADY] * 2))
    bad = case("hanko", Played([BUSY] * 3 + [DRIFTED] * 5 + [SHARED] * 4))
    fit, [sentence] = measured([good, bad], 2, lambda _: None)
    assert fit == [good]
    assert sentence.startswith(
        "of 12 repetitions of hanko-16 none counted; discarded were 3 while other"
    )
    assert "5 in whose course" in sentence
    assert "100 to 114 us" in sentence
    assert (
        "4 while a neighbour had over 15% of the core (one verification took up to 118 us, 100 at best)"
        in sentence
    )
    late = replace(case("flex", Played([BEHIND] * 6)), rate=400)
    with pytest.raises(
        Unfit,
        match=r"6 in which 400 logins a second could not begin \(they took up to 30% longer\)",
    ):
        measured([late], 1, lambda _: None)
    with pytest.raises(Unfit, match="hanko-16"):
        measured([case("hanko", Played([BUSY] * 12))], 2, lambda _: None)


def test_one_failed_login_and_nothing_is_reported() -> None:
    with pytest.raises(Unfit, match="1 logins failed, the first with: verify: 401"):
        sound({"failed": 1, "failures": ["verify: 401"]})


def test_two_runs_are_compared_by_their_ratios() -> None:
    old = {"cases": {"flex-16": {"ratio": 20.0}, "gone-1": {"ratio": 1.0}}}
    new = {"cases": {"flex-16": {"ratio": 10.0}, "new-1": {"ratio": 1.0}}}
    _, line = report.comparison(old, new).splitlines()
    assert line.split() == ["flex-16", "20.00", "10.00", "0.50"]


def test_a_worker_is_measured_by_itself() -> None:
    """Each in its turn, for the logins that it served, on a core where the other isn't; logins
    begin at their rate.
    """
    cores = Cores.split()
    with ExitStack() as stack:
        calibrate = measure.Calibration(min(cores.server))
        stack.callback(calibrate.close)
        made = stack.enter_context(stores(cores))
        server = stack.enter_context(broker(made, cores, workers=2))
        driver = stack.enter_context(aimed(cores, server))
        sound(driver("register", count=16, in_flight=16))
        workers = server.workers()
        assert len(workers) == 2
        places: list[list[frozenset[int]]] = []  # before and after each turn
        connections: list[list[int]] = []

        def calibrated() -> measure.Unit:
            places.append([frozenset(os.sched_getaffinity(pid)) for pid in workers])
            connections.append([len(accepted(pid, server.port)) for pid in workers])
            return calibrate(rounds=1, verifies=1, tokens=1)

        apart = Apart(
            "two",
            server,
            driver,
            made,
            cast("measure.Calibration", calibrated),
            counts=False,
            cores=cores,
            turns=itertools.cycle(workers),
        )
        whole = measure.cpu_seconds(server.pid)
        turns = [apart.repetition("flex", 16, 64, rate=256) for _ in workers]
        whole = measure.cpu_seconds(server.pid) - whole
        assert places == [[cores.server, cores.rest]] * 2 + [[cores.rest, cores.server]] * 2
        assert [os.sched_getaffinity(pid) for pid in workers] == [cores.server] * 2
    for turn, mine, shared in zip(turns, (0, 1), connections[1::2], strict=True):
        assert sum(shared) == 16
        assert turn.logins == 4 * shared[mine]
        assert turn.behind >= -1 / 4  # the last share of the time has begun
    assert 0 < sum(turn.server for turn in turns) < whole


def test_who_took_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as ours, listening.accept()[0]:
            assert accepted(os.getpid(), port) == [ours.getsockname()[1]]
        assert accepted(os.getpid(), port) == []


def test_what_a_benchmark_started_ends_with_it() -> None:
    started: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench", "--cases", "flex-1"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as bench:
        try:
            assert bench.stderr is not None
            assert "round 1" in bench.stderr.readline()  # stores, broker and driver are at work
            started = descendants(bench.pid)
            bench.send_signal(signal.SIGTERM)
            assert bench.wait(2 * DEADLINE) == 128 + signal.SIGTERM
            assert len(started) > 3
            assert alive(started) == []
        finally:
            bench.kill()
            for pid in alive(started):
                os.kill(pid, signal.SIGKILL)
