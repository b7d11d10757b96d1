"""Readings: how much CPU and memory processes took, what the machine is, what one signature costs
on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from broker.tokens.signed import generate, sign

PACKAGES = (
    "aiohttp",
    "webauthn",
    "redis",
    "hiredis",
    "asyncpg",
    "pyjwt",
    "uvloop",
    "orjson",
    "cryptography",
)
_ECDSA = ec.ECDSA(hashes.SHA256())
ROOT = Path(__file__).parent.parent.parent
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU that a process and its living descendants have taken, in seconds, to the nanosecond
    (`schedstat` of every thread).
    """
    return sum(own_cpu_seconds(found) for found in (pid, *_children(pid)))


def own_cpu_seconds(pid: int) -> float:
    """`cpu_seconds` without descendants."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[0])
        except OSError:  # a thread that ended meanwhile
            continue
    return total / 1e9


def touched(pid: int) -> int:
    """How many pages in memory a process and its living descendants have touched, each counted when
    a process touches it first (minor faults).
    """
    found = 0
    for each in (pid, *_children(pid)):
        try:
            found += int(Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[7])
        except OSError:  # it ended meanwhile
            continue
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in _children(child)]


def busy_seconds() -> float:
    """CPU that all processes of the machine have taken, in seconds. Interrupts are nobody's: those
    of a run's own sockets and disk would count as others' work."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:4])
    return (user + nice + system) / _TICK


def resident_bytes(pid: int) -> list[int]:
    """Resident memory of a process and of each of its living descendants."""
    return [_resident(found) for found in (pid, *_children(pid))]


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no VmRSS")


@dataclass(frozen=True, slots=True)
class Unit:
    """Seconds of CPU on the core: for one P-256 verification and for one RS256 token while the
    other cores work, as they do during logins; and for a verification while they rest."""

    verify: float
    sign: float
    alone: float


class Calibration:
    """Raw cryptography on the server's core, short enough to go before and after every repetition:
    a neighbour of the virtual machine may make the core a third slower from one minute to the next,
    and one figure at the start of a run would say nothing about its end. For the same reason the
    other cores sign meanwhile, as the driver does during logins: two cores of a virtual machine may
    share one of the real machine, and then a verification beside a busy core costs a third more,
    like everything else that is measured there. What it costs beside idle cores is reported as
    well. A token is signed as the broker signs it, with its own function: that is the signature's
    part of a login whose dialect hands out tokens."""

    def __init__(self, core: int, others: Iterable[int] = ()) -> None:
        self._core = core
        self._others = [_busy(other) for other in others]
        key = ec.generate_private_key(ec.SECP256R1())
        self._public, self._signed = key.public_key(), hashlib.sha256(b"calibration").digest() * 3
        self._signature = key.sign(self._signed, _ECDSA)
        self._private = generate("RS256")
        self._claims = {
            "sub": "user",
            "aud": ["example.org"],
            "iat": 0,
            "exp": 60,
            "jti": "x" * 43,
            "cred": "x" * 43,
        }

    def __call__(self, *, rounds: int = 3, verifies: int = 300, tokens: int = 40) -> Unit:
        """Medians of some rounds. The calling thread is on the core meanwhile, and where it was
        afterwards.
        """
        here = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._core})
        try:
            alone = _seconds(self._verify, rounds, verifies)
            for other in self._others:
                other.send_signal(signal.SIGCONT)
            return Unit(
                _seconds(self._verify, rounds, verifies),
                _seconds(self._sign, rounds, tokens),
                alone,
            )
        finally:
            for other in self._others:
                other.send_signal(signal.SIGSTOP)
            os.sched_setaffinity(0, here)

    def close(self) -> None:
        """End what works on the other cores."""
        for other in self._others:
            other.kill()
            other.wait()

    def _verify(self) -> None:
        self._public.verify(self._signature, self._signed, _ECDSA)

    def _sign(self) -> None:
        sign(self._claims, self._private, "x" * 24, "RS256")


_SIGNING = """
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
key, algorithm = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(hashes.SHA256())
print(flush=True)
while True:
    key.sign(b"calibration", algorithm)
"""


def _busy(core: int) -> subprocess.Popen[bytes]:
    """A process that signs on this core, stopped for now."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SIGNING],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    return process


def _seconds(work: Callable[[], None], rounds: int, times: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(times):
            work()
        found.append((time.thread_time() - began) / times)
    return statistics.median(found)


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


def machine_of(python: Path | None) -> dict[str, Any]:
    """`machine`, as another interpreter tells it; ours for None."""
    if python is None:
        return machine()
    told = subprocess.run(
        [str(python), "-m", "tests.bench.measure"], cwd=ROOT, check=True, capture_output=True
    )
    found: dict[str, Any] = json.loads(told.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(machine()))
