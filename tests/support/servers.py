"""Servers of a test's own, and what can befall a server: stopped, killed, started again.

`Valkey` is a Valkey (or Redis) on a loopback port with settings of the test's choice, `Cluster` six
of them as a Redis Cluster. The functions below them do to embedded servers what machines do:
`freeze` (SIGSTOP of every process of it), `kill` (SIGKILL), `revive`.
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
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import redis

from broker.durable import Postgres
from broker.embedded import EmbeddedStores
from broker.embedded.binaries import find_redis
from broker.embedded.directories import server_account
from broker.embedded.processes import Server
from broker.ephemeral import connect
from broker.ephemeral.cluster import ClusterRouter
from broker.ephemeral.transport import Commands
from broker.errors import Unavailable
from broker.telemetry import Metrics
from broker.tokens import SystemMint
from tests.support.processes import DEADLINE, alive, descendants, free_port, until
from tests.support.proxy import Connect, RedisProxy, Streams


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """`until` for a condition that this event loop brings about."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.01)  # between two looks


async def reached(check: Callable[[], Awaitable[None]]) -> None:
    """Connect to a store that is up: a client's first tries can run out of time before a busy
    machine has connected it.

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
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    password: str | None = None

    @classmethod
    def start(
        cls,
        home: Path,
        *settings: str,
        binary: Path | None = None,
        port: int = 0,
        config: Path | None = None,
        password: str = "",
    ) -> Self:
        """Start one in `home`, in memory only. `settings` are further command-line words. With
        `config`, a file that it may write, it is a Sentinel.
        """
        if binary is None:
            found = find_redis(server_account())
            binary = found.directory / found.server
        home.mkdir(exist_ok=True)
        port = port or free_port()
        argv = [
            str(binary),
            *([str(config), "--sentinel"] if config else []),
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(home),
        ]
        argv += ["--save", "", "--appendonly", "no", "--logfile", str(home / "log"), *settings]
        argv += ["--requirepass", password] if password else []
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        server = cls(process, port, password or None)
        try:
            until(server._answers, "Valkey answers")
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """The URL for the broker where clients reach the server at another port."""
        return f"redis://127.0.0.1:{port}"

    @property
    def doors(self) -> list[Connect]:
        """What reaches the server, for a proxy."""
        return [self.connect]

    def commands(self, *, timeout: float, through: RedisProxy | None = None) -> Commands:
        """The broker's commands to the server, through a proxy where one is given."""
        return connect(self.url_at(through.port) if through else self.url, timeout=timeout)

    def client(self) -> redis.Redis:
        """A plain client of the node."""
        return redis.Redis(port=self.port, password=self.password, protocol=2)

    def ask(self, *command: Any) -> Any:
        """The raw reply to one command."""
        with self.client() as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def knows(self, ids: list[str]) -> bool:
        """Whether this node of a cluster knows all of these and has met them."""
        lines = self.ask("CLUSTER NODES").decode().splitlines()
        met = [
            line.split()[0] for line in lines if "handshake" not in line and " connected" in line
        ]
        return sorted(met) == sorted(ids)

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


MASTERS = 3
_SLOTS = 16384
_NODE_TIMEOUT = 1000  # ms without a reply after which a node counts as failed


class _Whole(redis.RedisCluster):
    """By itself redis-py asks one node for its keys."""

    def keys(self, pattern: Any = "*", **options: Any) -> Any:
        return super().keys(pattern, target_nodes=self.PRIMARIES, **options)


@dataclass(slots=True)
class Cluster:
    """A Redis Cluster of three masters, `nodes[:3]`, and their replicas, `nodes[3:]`, in one
    order.
    """

    nodes: list[Valkey]
    ids: list[str]

    @classmethod
    def start(cls, home: Path, *settings: str, failover: bool = False) -> Self:
        """Start one. Without `failover` a node that a busy machine holds up is not replaced."""
        home.mkdir(exist_ok=True)
        nodes: list[Valkey] = []
        words = ["--cluster-node-timeout", str(_NODE_TIMEOUT), "--repl-diskless-sync-delay", "0"]
        try:
            for number in range(2 * MASTERS):
                bus = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
                nodes.append(Valkey.start(home / str(number), *bus, *words, *settings))
            made = cls(nodes, [node.ask("CLUSTER MYID").decode() for node in nodes])
            made._form()
            if not failover:
                for node in nodes:
                    node.ask("CONFIG SET", "cluster-node-timeout", 60_000)
        except BaseException:
            for node in nodes:
                node.stop()
            raise
        return made

    def _form(self) -> None:
        first = self.nodes[0]
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if node is not first:
                bus = int(node.ask("CONFIG GET", "cluster-port")[1])
                first.ask("CLUSTER MEET", "127.0.0.1", node.port, bus)
        for number, node in enumerate(self.nodes[:MASTERS]):
            node.ask("CLUSTER ADDSLOTSRANGE", *self.slots(number))
        for node in self.nodes:
            until(partial(node.knows, self.ids), "the nodes know each other")
        for node, master in zip(self.nodes[MASTERS:], self.ids, strict=False):
            node.ask("CLUSTER REPLICATE", master)
        until(self.whole, "the cluster is up and replicates")

    @staticmethod
    def slots(number: int) -> tuple[int, int]:
        """The first and the last slot of a master."""
        return number * _SLOTS // MASTERS, (number + 1) * _SLOTS // MASTERS - 1

    def whole(self) -> bool:
        """Whether each node sees every slot served by a master that has a replica."""
        return all(
            b"cluster_state:ok" in node.ask("CLUSTER INFO")
            and all(len(shard) == 4 for shard in node.ask("CLUSTER SLOTS"))
            and (replication := node.ask("INFO", "replication"))
            and (b"role:master" in replication or b"master_link_status:up" in replication)
            for node in self.nodes
        )

    @property
    def url(self) -> str:
        """The URL for the broker; every node is a seed."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def doors(self) -> list[Connect]:
        """What reaches each node, for a proxy."""
        return [node.connect for node in self.nodes]

    def commands(self, *, timeout: float, through: RedisProxy | None = None) -> ClusterRouter:
        """The broker's commands to the cluster, through proxies where they are given."""
        router = connect(self.url, timeout=timeout)
        assert isinstance(router, ClusterRouter)
        if through is not None:
            ports = dict(zip([node.port for node in self.nodes], through.ports, strict=True))
            node = router._connect
            router._connect = lambda address, on_end: node((address[0], ports[address[1]]), on_end)
        return router

    def client(self) -> redis.RedisCluster:
        """A client of all masters, which sees every key."""
        return _Whole("127.0.0.1", self.nodes[0].port, protocol=2)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()


@dataclass(slots=True)
class Sentinels:
    """A primary, `nodes[0]` at first, its replicas and as many Sentinels, which fail over by the
    votes of most. `service` is the primary's name.
    """

    nodes: list[Valkey]
    watchers: list[Valkey]
    service: str = "main"

    @classmethod
    def start(cls, home: Path, *settings: str, secret: str = "", count: int = 3) -> Self:
        """Start them. `settings` are those of the servers. `secret` is the Sentinels' password, and
        the servers have the same one reversed.
        """
        home.mkdir(exist_ok=True)
        made = cls([], [])
        words = [*settings, "--repl-diskless-sync-delay", "0"]
        if secret:
            words += ["--masterauth", secret[::-1]]
        try:
            for number in range(count):
                after = ["--replicaof", f"127.0.0.1 {made.nodes[0].port}"] if made.nodes else []
                node = Valkey.start(home / f"node{number}", *words, *after, password=secret[::-1])
                made.nodes.append(node)
            for number in range(count):
                made.watchers.append(made.watch(home / f"sentinel{number}", secret))
            until(made.whole, "the Sentinels know each other and the replicas")
        except BaseException:
            made.stop()
            raise
        return made

    def watch(self, home: Path, secret: str = "", primary: Valkey | None = None) -> Valkey:
        """Start a Sentinel, of this primary or of the first one."""
        home.mkdir()
        port, name = (primary or self.nodes[0]).port, self.service
        lines = [f"sentinel monitor {name} 127.0.0.1 {port} {len(self.nodes) // 2 + 1}"]
        lines.append(f"sentinel down-after-milliseconds {name} 500")
        lines.append(f"sentinel failover-timeout {name} 3000")
        if secret:
            lines.append(f"sentinel auth-pass {name} {secret[::-1]}")
            lines.append(f"sentinel sentinel-pass {secret}")
        file = home / "sentinel.conf"
        file.write_text("\n".join(lines) + "\n")
        return Valkey.start(home, config=file, password=secret)

    def whole(self) -> bool:
        """Whether each Sentinel knows all others and every replica."""
        for watcher in self.watchers:
            words = watcher.ask("SENTINEL", "MASTER", self.service)
            state = dict(zip(words[::2], words[1::2], strict=True))
            if int(state[b"num-other-sentinels"]) < len(self.watchers) - 1:
                return False
            if int(state[b"num-slaves"]) < len(self.nodes) - 1:
                return False
        return True

    def primary(self) -> Valkey:
        """The primary that most Sentinels name."""
        ports = [
            int(w.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])
            for w in self.watchers
        ]
        port = max(set(ports), key=ports.count)
        return next(node for node in self.nodes if node.port == port)

    @property
    def url(self) -> str:
        """The URL for the broker, without passwords."""
        hosts = ",".join(f"127.0.0.1:{watcher.port}" for watcher in self.watchers)
        return f"redis+sentinel://{hosts}/{self.service}"

    def stop(self) -> None:
        for server in (*self.watchers, *self.nodes):
            server.stop()


Which = Literal["PostgreSQL", "Valkey"]


def server_of(stores: EmbeddedStores, which: Which) -> Server:
    """The embedded server, the present one where it was revived."""
    titles = ("Valkey", "Redis") if which == "Valkey" else ("PostgreSQL",)
    found = [server for server in stores._running if server.title.startswith(titles)]
    return found[-1]


def _family(pid: int) -> list[int]:
    """A process and all that descend from it: PostgreSQL's backends lead sessions of their own, so
    its group is not enough.
    """
    return [pid, *descendants(pid)]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def frozen(stores: EmbeddedStores, which: Which) -> Iterator[Callable[[], None]]:
    """Inside, the server's processes are stopped: they accept connections and answer nothing.
    Yields what ends it early.
    """
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
    cwd = stores.directory / ("valkey" if which == "Valkey" else "postgres")
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
        lines = (stores.directory / "postgres" / "postmaster.pid").read_text().splitlines()
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
