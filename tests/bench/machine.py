"""Readings of the kernel: CPU time and memory of processes, and what the machine is."""

from __future__ import annotations

import os
import platform
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.processes import descendants

_PACKAGES = ("aiohttp", "asyncpg", "cryptography", "hiredis", "orjson", "redis", "uvloop")
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its living descendants, from the scheduler (`schedstat` of every
    thread, in nanoseconds): waiting doesn't count.
    """
    total = 0
    for each in (pid, *descendants(pid)):
        for thread in Path(f"/proc/{each}/task").glob("*/schedstat"):
            try:
                total += int(thread.read_text().split()[0])
            except OSError:  # the thread ended meanwhile
                continue
    return total / 1e9


def busy_seconds() -> float:
    """CPU time of all processes of the machine, and what the hypervisor took (`steal`).

    Interrupts don't count: those of a run's own sockets and disk would pass for other processes.
    """
    found = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    user, nice, system, steal = *found[:3], found[7]
    return (user + nice + system + steal) / _TICK


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its living descendants."""
    page = os.sysconf("SC_PAGE_SIZE")
    pids = (pid, *descendants(pid))
    return sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) * page for each in pids)


def described() -> dict[str, Any]:
    """The machine, as far as it explains figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "optimised": "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")),
        "packages": {name: version(name) for name in _PACKAGES},
    }
