"""The benchmark's report from given repetitions, and one run of it, which is interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.bench import report, rounds
from tests.bench.rounds import Case, Turn
from tests.bench.service import ROOT, LoginFailed, Server
from tests.support.processes import DEADLINE, accepted, alive, descendants

TURN = Turn(
    logins=1000,
    failed=1,
    per_second=480.0,
    cpu=1000.0,
    redis=100.0,
    postgres=200.0,
    wal=800.0,
    others=0.05,
    latency={
        "login": {"p50": 0.016, "p99": 0.03},
        "open": {"p50": 0.003, "p99": 0.006},
        "finish": {"p50": 0.008, "p99": 0.013},
    },
)
MACHINE = {"cpu": "x", "cores": 2, "python": "3", "optimised": False, "packages": {"aiohttp": "3"}}


@dataclass(slots=True)
class Played(Case):
    """A case with given turns; `log` has the order in which cases had theirs."""

    coming: list[Turn] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def turn(self, seconds: float) -> Turn:
        self.log.append(f"{self.name} {seconds}")
        if not self.coming:
            raise LoginFailed("flex: no more turns")
        return self.coming.pop(0)


def played(name: str, *cpu: float, noisy: tuple[int, ...] = (), log: Any = None) -> Played:
    """A case whose repetitions take this CPU; those numbered in `noisy` had busy neighbours."""
    turns = [
        replace(TURN, cpu=each, others=0.2 if number in noisy else 0.05)
        for number, each in enumerate(cpu, 1)
    ]
    log = [] if log is None else log
    return Played(name, cast("Server", None), "flex", 16, coming=[TURN, *turns], log=log)


def ran(*cases: Played) -> list[str]:
    """Run the cases for as many rounds as the first one has turns; the lines of progress."""
    said: list[str] = []
    rounds.run(cases, len(cases[0].coming) - 1, 2.0, said.append)
    return said


def test_cases_take_turns_in_an_order_that_is_reversed() -> None:
    log: list[str] = []
    a, b = played("A", 1, 2, 3, log=log), played("B", 4, 5, 6, log=log)
    said = ran(a, b)
    warm, measured = log[:2], log[2:]
    assert warm == ["A 1.0", "B 1.0"]
    assert measured == [f"{name} 2.0" for name in "ABBAAB"]
    assert [turn.cpu for turn in a.turns + b.turns] == [1, 2, 3, 4, 5, 6]
    assert said[2] == "round 3 of 3, CPU of a login in us: A 3, B 6"


def test_noisy_repetitions_are_marked_and_stay() -> None:
    """However busy the machine is, the run has its number of repetitions and reports them all."""
    case = played("A", 100, 900, 110, 120, noisy=(2,))
    said = ran(case)
    assert said[1] == "round 2 of 4, CPU of a login in us: A 900 noisy"
    found = report.figures(case)["cpu"]
    assert found["all"] == [100, 900, 110, 120]
    assert found["noisy"] == [2]
    assert (found["median"], found["median_quiet"]) == (115, 110)
    assert (found["quartiles"], found["limits"]) == ([107.5, 315], [100, 900])
    text = report.text(report.result(MACHINE, [case]))
    assert "100 900* 110 120" in text
    assert "115 (quartiles 108 to 315, all 100 to 900); 110 over 3 quiet ones" in text


def test_a_run_without_quiet_repetitions_is_reported_as_such() -> None:
    case = played("A", 100, 120, 110, noisy=(1, 2, 3))
    ran(case)
    text = report.text(report.result(MACHINE, [case]))
    assert "100* 120* 110*" in text
    assert "median 110 (quartiles 105 to 115, all 100 to 120); fewer than 3 quiet ones" in text


def test_each_pair_has_its_ratio() -> None:
    """A slow minute makes both sides dearer and no ratio; a pair is noisy if a side of it is."""
    a, b = played("A", 100, 200, 100, noisy=(3,)), played("B", 110, 220, 130, noisy=(3,))
    b.base = a
    ran(a, b)
    result = report.result(MACHINE, [a, b])
    found = result["ratios"]["B / A"]
    assert (found["CPU"]["all"], found["CPU"]["noisy"]) == ([1.1, 1.1, 1.3], [3])
    assert found["CPU"]["median"] == 1.1
    assert found["CPU with stores"]["all"] == [1.025, 1.04, 1.075]
    assert found["WAL"]["all"] == found["p50"]["all"] == [1, 1, 1]
    lines = report.text(result).splitlines()
    assert "  pairs: 1.10 1.10 1.30*" in lines
    assert lines.index("B / A, turn about (* noisy)") < next(
        number for number, line in enumerate(lines) if line.startswith("case")
    ), "ratios come first"


def test_what_was_measured_is_what_the_table_says() -> None:
    case = played("A", 1000)
    ran(case)
    lines = report.text(report.result(MACHINE, [case])).splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("case"))
    assert "logins/s" in lines[head]
    assert " ".join(lines[head + 1].split()) == "A 1000 100 200 800 480 16.00 30.00 1"
    assert lines[-1].split(maxsplit=1)[1] == "open 3.00 / 6.00, finish 8.00 / 13.00"


def test_a_run_that_a_failed_login_ends_keeps_its_turns() -> None:
    a, b, c = played("A", 100, 110), played("B", 120), played("C")
    b.base = c.base = a
    with pytest.raises(LoginFailed, match="no more turns"):
        rounds.run([a, b], 2, 2.0, lambda _: None)
    result = report.result(MACHINE, [a, b, c])
    assert list(result["cases"]) == ["A", "B"]
    assert {name: found["CPU"]["all"] for name, found in result["ratios"].items()} == {
        "B / A": [1.2]
    }


def test_who_took_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as ours, listening.accept()[0]:
            assert accepted(os.getpid(), port) == [ours.getsockname()[1]]
        assert accepted(os.getpid(), port) == []


def test_an_interrupted_run_writes_what_it_has_and_ends_its_processes(tmp_path: Path) -> None:
    """The smoke run: two processes of this checkout, turn about, until SIGTERM."""
    written = tmp_path / "run.json"
    argv = [sys.executable, "-m", "tests.bench", "--control", "--case", "flex-4"]
    argv += ["--rounds", "1000", "--seconds", "0.2", "--json", str(written)]
    started: list[int] = []
    with subprocess.Popen(
        argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bench:
        try:
            assert bench.stderr is not None
            assert bench.stdout is not None
            assert bench.stderr.readline().startswith("round 1 of 1000, CPU of a login in us: ")
            started = descendants(bench.pid)
            bench.send_signal(signal.SIGTERM)
            text = bench.stdout.read()
            assert bench.wait(2 * DEADLINE) == 128 + signal.SIGTERM
            assert len(started) > 5
            assert alive(started) == []
        finally:
            bench.kill()
            for pid in alive(started):
                os.kill(pid, signal.SIGKILL)
    assert "flex-4 again / flex-4, turn about" in text
    result = json.loads(written.read_text())
    (ratio,) = result["ratios"].values()
    assert 0.1 < ratio["CPU"]["all"][0] < 10
    for case in result["cases"].values():
        turn = case["turns"][0]
        assert turn["logins"] > 0
        assert turn["cpu"] > 0
        assert set(turn["latency"]) == {"login", "open", "begin", "finish", "redeem"}
