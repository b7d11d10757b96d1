"""Readings: how much CPU processes took, what the machine is, what one signature check costs on it."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

PACKAGES = ("aiohttp", "webauthn", "redis", "hiredis", "asyncpg", "pyjwt", "uvloop", "orjson", "cryptography")
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU that a process and its living descendants have taken, in seconds, to the nanosecond (`schedstat` of every thread)."""
    return sum(_own(found) for found in (pid, *_children(pid)))


def _own(pid: int) -> float:
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[0])
        except OSError:  # a thread that ended meanwhile
            continue
    return total / 1e9


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in _children(child)]


def busy_seconds() -> float:
    """CPU that the whole machine has taken, in seconds."""
    user, nice, system, _, _, irq, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + soft) / _TICK


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, without its children."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no VmRSS")


def calibrate(core: int, *, rounds: int = 7, verifies: int = 1500) -> float:
    """Seconds of CPU for one P-256 verification with `cryptography` on this core: the median of some rounds."""
    here = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        key = ec.generate_private_key(ec.SECP256R1())
        public, signed = key.public_key(), hashlib.sha256(b"calibration").digest() * 3
        algorithm = ec.ECDSA(hashes.SHA256())
        signature = key.sign(signed, algorithm)
        found = []
        for _ in range(rounds):
            began = time.process_time()
            for _ in range(verifies):
                public.verify(signature, signed, algorithm)
            found.append((time.process_time() - began) / verifies)
        return statistics.median(found)
    finally:
        os.sched_setaffinity(0, here)


def machine() -> dict[str, Any]:
    """What was measured on, as far as it explains figures."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    flags = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "optimised": "--enable-optimizations" in flags,
        "python_build": flags,
        "packages": {name: version(name) for name in PACKAGES},
    }
