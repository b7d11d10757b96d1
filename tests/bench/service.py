"""The processes of a run: measured servers on one core; stores and load generators on the others.

All servers of a run share one Postgres and one Valkey. Each has a database of its own in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from broker.embedded import EmbeddedStores
from tests.bench.driver import MOST_FAILED, ORIGIN
from tests.support import parts
from tests.support.processes import descendants, free_port, get, until
from tests.support.servers import Valkey

ROOT = Path(__file__).resolve().parent.parent.parent
PEER = Path(__file__).parent / "peer"
_USABLE = sorted(os.sched_getaffinity(0))
SERVER_CORES = frozenset(_USABLE[-1:])
OTHER_CORES = frozenset(_USABLE[:-1] or _USABLE)  # a single core can't be divided
_CLI = "import sys; from broker.cli import main; sys.exit(main())"
_NOTHING: Mapping[str, str] = {}
# Rate limits that are charged and never reached: all clients have one address.
_RATES = dict.fromkeys(
    [f"BROKER_{name}_RATE" for name in ("BEGIN", "DISCOVERABLE", "KEYED", "UNKNOWN_FINISH")],
    "1000/s:999999999",
)
_MANY = {"max_connections": "400"}  # each broker has a pool


@dataclass(slots=True)
class Stores:
    """Postgres with fsync and Valkey with an append-only file, on sockets of the machine."""

    database_url: str
    socket: str
    postgres_pid: int
    redis_pid: int
    databases: int = 0

    def database(self) -> dict[str, str]:
        """Settings of a broker with a new database in both stores."""
        self.databases += 1
        name = f"bench{self.databases}"
        asyncio.run(self.execute(f"CREATE DATABASE {name}"))
        return {
            "BROKER_DATABASE_URL": self.database_url.replace("/postgres?", f"/{name}?"),
            "BROKER_REDIS_URL": f"unix://{self.socket}?db={self.databases}",
        }

    async def execute(self, sql: str) -> Any:
        """Run a statement; the value that it yields."""
        session = await asyncpg.connect(self.database_url)
        try:
            return await session.fetchval(sql)
        finally:
            await session.close()

    def wal_bytes(self) -> int:
        """Bytes of the write-ahead log so far."""
        return int(asyncio.run(self.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")))


@contextmanager
def stores(postgres: Mapping[str, str] = _NOTHING) -> Iterator[Stores]:
    """Start both stores; `postgres` are further settings of Postgres."""
    os.sched_setaffinity(0, OTHER_CORES)  # also of the children, but for measured servers
    with (
        tempfile.TemporaryDirectory(prefix="broker-bench-") as home,
        tempfile.TemporaryDirectory(prefix="broker-bench-data-") as data,
        EmbeddedStores.start(Path(data), None, {**_MANY, **postgres}) as embedded,
    ):
        socket = f"{home}/valkey.sock"
        valkey = Valkey.start(Path(home, "valkey"), "--unixsocket", socket, "--appendonly", "yes")
        try:
            yield Stores(embedded.database_url, socket, _postmaster(), valkey.process.pid)
        finally:
            valkey.stop()
    # The directory lies elsewhere if Postgres runs as nobody.
    shutil.rmtree(embedded.directory, ignore_errors=True)


def _postmaster() -> int:
    """The process that forks Postgres' backends, among our descendants."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/postgres"):
                return pid
    raise AssertionError("no postgres was started")


class LoginFailed(Exception):
    """Too many logins failed: the run's figures would be those of another workload."""


@dataclass(slots=True)
class Server:
    """A measured server with the load generator of its own."""

    pid: int
    stores: Stores
    driver: subprocess.Popen[str]
    settings: Mapping[str, str] = field(default_factory=dict)
    app_id: str = ""

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send the load generator a command."""
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        print(json.dumps({"do": do, **values}), file=self.driver.stdin, flush=True)
        line = self.driver.stdout.readline()
        assert line, "the load generator ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def run(self, flow: str, in_flight: int, **until: float) -> dict[str, Any]:
        """Run a flow for `seconds=` or `count=`.

        Raises:
            LoginFailed: over a tenth of the logins failed.
        """
        told = self.ask("run", flow=flow, in_flight=in_flight, **until)
        if told["failed"] > in_flight + MOST_FAILED * told["logins"] or not told["logins"]:
            raise LoginFailed(f"{told['failed']} failed, the first {flow} with {told['failure']}")
        return told


@contextmanager
def broker(
    made: Stores,
    *,
    checkout: Path = ROOT,
    environment: Mapping[str, str] = _NOTHING,
    arguments: Sequence[str] = (),
    users: int = 256,
) -> Iterator[Server]:
    """`broker serve` of a checkout with an app and users, its log in a file as in production.

    The interpreter and its packages are those of this process; the checkout is on PYTHONPATH.
    """
    port = free_port()
    settings = {
        **{name: value for name, value in os.environ.items() if not name.startswith("BROKER_")},
        "PYTHONPATH": str(checkout),
        "BROKER_SECRET_KEY": os.urandom(24).hex(),
        "BROKER_STORE_TIMEOUT": "1.5",  # a pause of the machine's disk is no failed login
        **(_RATES if "begin_rate" in (checkout / "broker" / "settings.py").read_text() else {}),
        **made.database(),
        **environment,
    }
    cli = [sys.executable, "-c", _CLI]
    serve = [*cli, "serve", "--host", "127.0.0.1", "--port", str(port), "--migrate", *arguments]
    app = ["app", "create", "--name", "Bench", "--rp-id", "example.org", "--origin", ORIGIN]
    with _listening(serve, checkout, settings, port, "/health/ready") as pid:
        created = subprocess.run(
            [*cli, *app, "--json"], cwd=checkout, env=settings, check=True, capture_output=True
        )
        told = json.loads(created.stdout)
        with _driver(port, told["app_id"], told["api_key"]) as driver:
            server = Server(pid, made, driver, settings, told["app_id"])
            server.run("register", 16, count=users)
            yield server


@contextmanager
def node_peer(made: Stores) -> Iterator[Server]:
    """The Node peer: the two requests of a login on fastify and @simplewebauthn/server."""
    parts.install_node()
    parts.install_npm(PEER)
    port, node = free_port(), parts.node()
    settings = {
        **node.environment(),
        "PORT": str(port),
        "DATABASE_URL": made.database_url,
        "REDIS_URL": f"unix://{made.socket}",
        "NODE_ENV": "production",
    }
    command = [*node.node, str(PEER / "server.mjs")]
    with (
        _listening(command, ROOT, settings, port, "/health") as pid,
        _driver(port, "", "") as driver,
    ):
        server = Server(pid, made, driver)
        server.run("seed", 1, count=256)
        yield server


@contextmanager
def _listening(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], port: int, health: str
) -> Iterator[int]:
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, SERVER_CORES),
            process_group=0,  # Ctrl-C reaches the benchmark alone, which ends the others
        ) as process,
    ):
        try:
            until(lambda: process.poll() is not None or get(port, health) == 200, "it listens")
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(f"{' '.join(command)} ended: {log.read()[-2000:].decode()}")
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)  # after SIGTERM a broker serves on for a while


@contextmanager
def _driver(port: int, app_id: str, key: str) -> Iterator[subprocess.Popen[str]]:
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.driver", url, app_id, key],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
