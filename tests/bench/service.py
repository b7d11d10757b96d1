"""The servers under measurement, each where it belongs: the measured one on one core; stores and
driver on the others.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import redis

from broker.embedded import EmbeddedStores
from tests.bench.driver import ORIGIN
from tests.support.processes import descendants, free_port, get, until
from tests.support.servers import Valkey

ROOT = Path(__file__).parent.parent.parent
_SECRET = os.urandom(24).hex()  # of every broker of a run, for they share stores


@dataclass(frozen=True, slots=True)
class Cores:
    """The measured server's core, and those of everything else."""

    server: frozenset[int]
    rest: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        """The last core for the server. With one core there is nothing to keep apart."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(frozenset(usable[-1:]), frozenset(usable[:-1] or usable))


@dataclass(frozen=True, slots=True)
class Stores:
    """Postgres with fsync, and Valkey in memory."""

    database_url: str
    redis_url: str
    postgres_pid: int
    redis_pid: int

    @contextmanager
    def counted(self) -> Iterator[redis.Redis]:
        """A client that reads the store's own figures."""
        client = redis.Redis.from_url(self.redis_url)
        try:
            yield client
        finally:
            client.close()


@contextmanager
def stores(
    cores: Cores, *, tcp: bool = False, postgres: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Stores]:
    """Both, on the rest's cores and on sockets of the machine, as `broker dev` runs them; with
    `tcp` Valkey is spoken to through loopback. `postgres` are settings of it instead of the
    embedded store's."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores.rest)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="broker-bench-") as folder,
            tempfile.TemporaryDirectory(prefix="broker-bench-data-") as data,
        ):
            home = Path(folder)
            with _embedded(Path(data), postgres) as embedded:
                valkey = Valkey.start(home / "valkey", "--unixsocket", str(home / "valkey.sock"))
                try:
                    yield Stores(
                        embedded.database_url,
                        f"redis://127.0.0.1:{valkey.port}/0"
                        if tcp
                        else f"unix://{home / 'valkey.sock'}",
                        _postmaster(),
                        valkey.process.pid,
                    )
                finally:
                    valkey.stop()
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _embedded(data: Path, postgres: Mapping[str, str]) -> Iterator[EmbeddedStores]:
    """Nothing of them is left, also where their user can't enter `data` and they are elsewhere."""
    with EmbeddedStores.start(data, None, postgres) as embedded:
        yield embedded
    shutil.rmtree(embedded.place, ignore_errors=True)
    data.mkdir(exist_ok=True)  # whoever made it removes it


def _postmaster() -> int:
    """The process that forks Postgres' backends, among our descendants."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/postgres"):
                return pid
    raise AssertionError("no postgres was started")


@dataclass(slots=True)
class Server:
    """A measured process that listens."""

    process: subprocess.Popen[bytes]
    url: str
    app_id: str = ""
    key: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def workers(self) -> list[int]:
        """The processes that serve, where there is a supervisor."""
        return descendants(self.pid)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; of a broker."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in wanted)
        )


@contextmanager
def _listening(
    argv: list[str],
    environment: dict[str, str],
    core: frozenset[int],
    port: int,
    path: str,
    log: Path | None,
) -> Iterator[subprocess.Popen[bytes]]:
    with open(log or os.devnull, "wb") as lines:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=lines,
            stderr=lines,
            preexec_fn=lambda: os.sched_setaffinity(0, core),
        )
    try:
        until(lambda: process.poll() is not None or get(port, path) == 200, f"{argv[0]} listens")
        assert process.poll() is None, f"{' '.join(argv)} ended with {process.returncode}"
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextmanager
def broker(
    made: Stores,
    cores: Cores,
    *,
    workers: int = 1,
    log: Path | None = None,
    python: Path | None = None,
) -> Iterator[Server]:
    """`broker serve` as an operator runs it, with an app. Its log goes to a file, as in production;
    events and metrics are on. It waits for stores as long as settings let it: a pause of the
    machine's disk is no failed login. `python` is the interpreter of an environment that the broker
    is installed in, ours for None."""
    port = free_port()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("BROKER_")},
        "BROKER_DATABASE_URL": made.database_url,
        "BROKER_REDIS_URL": made.redis_url,
        "BROKER_SECRET_KEY": _SECRET,
        "BROKER_STORE_TIMEOUT": "1.5",
        "BROKER_METRICS": "public",
    }
    command = [str((python or Path(sys.executable)).with_name("broker"))]
    argv = [*command, "serve", "--host", "127.0.0.1", "--port", str(port), "--migrate"]
    if workers > 1:
        argv += ["--workers", str(workers)]
    with _listening(argv, environment, cores.server, port, "/health/ready", log) as process:
        created = subprocess.run(
            [
                *command,
                "app",
                "create",
                "--name",
                "Bench",
                "--rp-id",
                "example.org",
                "--origin",
                ORIGIN,
                "--json",
            ],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
        )
        told = json.loads(created.stdout)
        yield Server(process, f"http://127.0.0.1:{port}", told["app_id"], told["api_key"])


def knows_workers() -> bool:
    """Whether `broker serve` can have several workers."""
    argv = [str(Path(sys.executable).with_name("broker")), "serve", "--help"]
    return "--workers" in subprocess.run(argv, check=True, capture_output=True, text=True).stdout


class Driver:
    """The load process, on the rest's cores."""

    def __init__(self, cores: Cores) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.driver"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, cores.rest),
        )
        self.pid = self._process.pid

    def __call__(self, do: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the driver ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def aim(self, server: Server) -> None:
        """Choose the server; users are made anew."""
        self("aim", url=server.url, app_id=server.app_id, key=server.key)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@contextmanager
def aimed(cores: Cores, server: Server) -> Iterator[Driver]:
    """A driver of this server's own."""
    driver = Driver(cores)
    try:
        driver.aim(server)
        yield driver
    finally:
        driver.close()


def placed(pid: int, cores: frozenset[int]) -> None:
    """Move a process, all of its threads, to these cores."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def settled(seconds: float = 0.3) -> None:
    """Let what the last repetition left running end: Postgres' writers, freed connections."""
    time.sleep(
        seconds
    )  # nothing tells when writers are done, and what is left is counted as others' work
