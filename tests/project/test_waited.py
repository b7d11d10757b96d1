"""The clock that limits of time are judged by, on an idle machine and on a busy one."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.support.waited import Waited


def test_a_wait_and_a_computation_count() -> None:
    with Waited() as waited:
        time.sleep(0.2)  # the wait itself
        slept = waited.seconds
        used = time.thread_time()
        while time.thread_time() - used < 0.2:
            pass
    assert slept >= 0.15
    assert waited.seconds - slept >= 0.15
    ended = waited.seconds
    time.sleep(0.01)
    assert waited.seconds == ended


def test_what_other_processes_take_does_not_count() -> None:
    """Nine processes on one core, of which this is one: what it computes takes several times as
    long as it counts.
    """
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    os.sched_setaffinity(0, core)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        began, used = time.monotonic(), time.thread_time()
        with Waited() as waited:
            while time.thread_time() - used < 0.3:
                pass
        real = time.monotonic() - began
        assert real > 0.6, "there is nothing to tell apart"
        assert waited.seconds < 0.3 + (real - 0.3) / 2
    finally:
        for process in busy:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, cores)
