"""Servers of a test's own, and what can befall a server: stopped, killed, started again.

`Valkey` is a Valkey (or Redis) on a loopback port, single or a cluster of one node, with settings of the test's choice. The
functions below it do to embedded servers what machines do: `freeze` (SIGSTOP of every process of it), `kill` (SIGKILL), `revive`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import redis

from broker.durable import Postgres
from broker.embedded import EmbeddedStores
from broker.embedded.binaries import find_redis
from broker.embedded.children import Server
from broker.embedded.place import server_account
from broker.errors import Unavailable
from broker.telemetry import Metrics
from broker.tokens import SystemMint
from tests.processes import DEADLINE, alive, descendants, free_port, until
from tests.proxy import Streams


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """`until` for a condition that this event loop brings about."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.01)  # between two looks


async def reached(check: Callable[[], Awaitable[None]]) -> None:
    """Connect to a store that is up: a client's first tries can run out of time before a busy machine has connected it.

    Raises:
        Unavailable: the store is not up.
    """
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            return await check()
        except Unavailable:
            if time.monotonic() >= deadline:
                raise


@dataclass(slots=True)
class Valkey:
    """A running server; `cluster` says whether it is a cluster of one node."""

    process: subprocess.Popen[bytes]
    port: int
    cluster: bool

    @classmethod
    def start(
        cls, home: Path, *settings: str, cluster: bool = False, binary: Path | None = None, port: int = 0
    ) -> Self:
        """Start one in `home`, in memory only. `settings` are further command-line words."""
        if binary is None:
            found = find_redis(server_account())
            binary = found.directory / found.server
        home.mkdir(exist_ok=True)
        port = port or free_port()
        argv = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home)]
        argv += ["--save", "", "--appendonly", "no", "--logfile", str(home / "log"), *settings]
        if cluster:
            argv += ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        server = cls(process, port, cluster)
        try:
            until(server._answers, "Valkey answers")
            if cluster:
                with server.client() as client:
                    client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
                    until(
                        lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok",
                        "the cluster is up",
                    )
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """The URL for the broker where clients reach the server at another port."""
        return f"redis{'+cluster' if self.cluster else ''}://127.0.0.1:{port}"

    def client(self) -> redis.Redis:
        """A plain client of the node."""
        return redis.Redis(port=self.port, decode_responses=False, protocol=2)

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def stop(self) -> None:
        """End it, also where it is frozen."""
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server ended at once"
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


Which = Literal["PostgreSQL", "Valkey"]


def server_of(stores: EmbeddedStores, which: Which) -> Server:
    """The embedded server, the present one where it was revived."""
    titles = ("Valkey", "Redis") if which == "Valkey" else ("PostgreSQL",)
    found = [server for server in stores._running if server.title.startswith(titles)]
    return found[-1]


def _family(pid: int) -> list[int]:
    """A process and all that descend from it: PostgreSQL's backends lead sessions of their own, so its group is not enough."""
    return [pid, *descendants(pid)]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def frozen(stores: EmbeddedStores, which: Which) -> Iterator[Callable[[], None]]:
    """Inside, the server's processes are stopped: they accept connections and answer nothing. Yields what ends it early."""
    pid = server_of(stores, which).process.pid
    stopped: list[int] = []
    while new := [member for member in _family(pid) if member not in stopped]:
        _send(new, signal.SIGSTOP)
        stopped += new

    def thaw() -> None:
        _send(stopped, signal.SIGCONT)
        stopped.clear()

    try:
        yield thaw
    finally:
        thaw()


def kill(stores: EmbeddedStores, which: Which) -> None:
    """SIGKILL of all its processes, as by a machine that loses power."""
    process = server_of(stores, which).process
    family = _family(process.pid)
    _send(family, signal.SIGKILL)
    process.wait()
    until(lambda: not alive(family), f"{which} is gone")


def revive(stores: EmbeddedStores, which: Which) -> None:
    """Start a killed server on the same data, and wait until it answers."""
    old = server_of(stores, which)
    if which == "Valkey":
        Path(_valkey_socket(stores)).unlink(missing_ok=True)
    assert isinstance(old.process.args, list)
    cwd = stores.place / ("valkey" if which == "Valkey" else "postgres")
    stores._spawn(old.title, old.process.args, server_account(), cwd, old.log, old.mark)
    until(lambda: _answers(stores, which), f"{which} answers")


def _answers(stores: EmbeddedStores, which: Which) -> bool:
    if which == "Valkey":
        try:
            with redis.Redis.from_url(stores.redis_url, protocol=2) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
            return False
    try:  # line 8 of postmaster.pid is PostgreSQL's own word
        lines = (stores.place / "postgres" / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    pid = server_of(stores, "PostgreSQL").process.pid
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


async def connect_postgres(stores: EmbeddedStores) -> Streams:
    """The bytes of a connection to the embedded PostgreSQL, for a proxy."""
    directory = parse_qs(urlsplit(stores.database_url).query)["host"][0]
    return await asyncio.open_unix_connection(f"{directory}/.s.PGSQL.5432")


async def connect_valkey(stores: EmbeddedStores) -> Streams:
    """The bytes of a connection to the embedded Valkey, for a proxy."""
    return await asyncio.open_unix_connection(_valkey_socket(stores))


def _valkey_socket(stores: EmbeddedStores) -> str:
    return unquote(urlsplit(stores.redis_url).path)


@contextlib.asynccontextmanager
async def session_of(stores: EmbeddedStores) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A session with the embedded PostgreSQL, of the test's own."""
    connection = await asyncpg.connect(stores.database_url)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def database_of(stores: EmbeddedStores) -> AsyncIterator[str]:
    """The URL of a database of the test's own, empty."""
    name = "test_" + SystemMint().id().lower()
    async with session_of(stores) as session:
        await session.execute(f"CREATE DATABASE {name}")
        try:
            yield stores.database_url.replace("/postgres?", f"/{name}?")
        finally:
            await session.execute(f"DROP DATABASE {name} WITH (FORCE)")


def pool(url: str, *, timeout: float = 5.0, connections: int = 16) -> Postgres:
    return Postgres(url, timeout=timeout, connections=connections, metrics=Metrics())


def statements(postgres: Postgres, operation: str) -> float:
    """How many of this operation there were."""
    labels = {"store": "postgres", "operation": operation}
    return postgres._metrics.registry.get_sample_value("broker_store_seconds_count", labels) or 0.0
