"""Valkey with two replicas and three Sentinels, and Redis Cluster, for the harness.

`Replicated.start` starts three servers. Every process reaches a server through the server's link,
because each announces the port of its link: a fault partitions, delays or cuts replication and
Sentinels there. The harness makes a replica lag with `hold_replication`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from broker.embedded.binaries import find_redis
from broker.embedded.directories import server_account
from tests.chaos.links import Link, replication
from tests.support.processes import DEADLINE, free_port
from tests.support.servers import Valkey

MASTER_NAME = "broker"
_DOWN_AFTER = 1500  # ms without a reply after which a Sentinel takes a server for down
_SETTINGS = (
    "--repl-diskless-sync-delay",
    "0",
    "--repl-ping-replica-period",
    "1",
    "--repl-timeout",
    "5",
)


async def reached(condition: Callable[[], bool], what: str, *, within: float = DEADLINE) -> None:
    """Wait for a condition that other processes bring about.

    Raises:
        AssertionError: it did not come true.
    """
    deadline = time.monotonic() + within
    while True:
        try:
            if condition():
                return
        except (redis.RedisError, OSError):
            pass  # a server that is down, or about to be up
        assert time.monotonic() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.05)  # between two looks


def _settings(link: Link, home: Path) -> list[str]:
    """A server announces its link. The Sentinels prefer the first server."""
    priority = "10" if home.name.endswith("0") else "100"
    return [
        *_SETTINGS,
        "--replica-announce-ip",
        "127.0.0.1",
        "--replica-announce-port",
        str(link.port),
        "--replica-priority",
        priority,
    ]


@dataclass(eq=False, slots=True)
class Node:
    """A server, its folder, and the link by which it is reached."""

    home: Path
    server: Valkey
    link: Link

    @property
    def port(self) -> int:
        """The port that it announces: its link's."""
        return self.link.port

    def ask(self, *words: object) -> str:
        """The reply to one command, past the link, as text."""
        with redis.Redis(port=self.server.port, protocol=2, socket_timeout=2) as client:
            client.response_callbacks.clear()
            reply = client.execute_command(*words)
        return reply.decode() if isinstance(reply, bytes) else str(reply)

    def info(self) -> dict[str, str]:
        """INFO replication."""
        lines = self.ask("INFO", "replication").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    @property
    def up(self) -> bool:
        return self.server.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.server.process.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.server.stop()

    def restart(self, *settings: str) -> None:
        """Start it again, with what its folder holds, as a primary."""
        words = _settings(self.link, self.home)
        self.server = Valkey.start(self.home, *words, *settings, port=self.server.port)


@dataclass(eq=False, slots=True)
class Replicated:
    """Three servers, of which Sentinels choose the primary."""

    home: Path
    nodes: list[Node] = field(default_factory=list)
    sentinels: list[subprocess.Popen[bytes]] = field(default_factory=list)
    sentinel_ports: list[int] = field(default_factory=list)

    @classmethod
    async def start(cls, home: Path) -> Replicated:
        await asyncio.to_thread(home.mkdir)
        made = cls(home)
        try:
            for number in range(3):
                port = free_port()
                link = await Link(port).open()
                folder = home / f"valkey-{number}"
                words = _settings(link, folder)
                server = await asyncio.to_thread(Valkey.start, folder, *words, port=port)
                made.nodes.append(Node(folder, server, link))
            for replica in made.nodes[1:]:
                await asyncio.to_thread(replica.ask, "REPLICAOF", "127.0.0.1", made.nodes[0].port)
            await made.replicating()
            for number in range(3):
                made._start_sentinel(number)
            await reached(made._watched, "the Sentinels know the replicas and each other")
        except BaseException:
            await made.stop()
            raise
        return made

    def _start_sentinel(self, number: int) -> None:
        found = find_redis(server_account())
        port, folder = free_port(), self.home / f"sentinel-{number}"
        folder.mkdir()
        config = folder / "sentinel.conf"
        lines = [
            f"port {port}",
            "bind 127.0.0.1",
            f"dir {folder}",
            f"logfile {folder / 'log'}",
            f"sentinel monitor {MASTER_NAME} 127.0.0.1 {self.nodes[0].port} 2",
            f"sentinel down-after-milliseconds {MASTER_NAME} {_DOWN_AFTER}",
            f"sentinel failover-timeout {MASTER_NAME} 5000",
            f"sentinel parallel-syncs {MASTER_NAME} 2",
        ]
        config.write_text("\n".join(lines) + "\n")
        argv = [str(found.directory / found.server), str(config), "--sentinel"]
        self.sentinels.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL))
        self.sentinel_ports.append(port)

    async def stop(self) -> None:
        for sentinel in self.sentinels:
            sentinel.kill()
            sentinel.wait()
        for node in self.nodes:
            node.server.stop()
            await node.link.stop()

    @property
    def url(self) -> str:
        """The URL for the broker."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://{hosts}/{MASTER_NAME}"

    # -- what the Sentinels say --------------------------------------------------------------------

    def _sentinel(self, *words: object) -> object:
        """The first Sentinel's reply."""
        with redis.Redis(port=self.sentinel_ports[0], protocol=2, socket_timeout=2) as client:
            client.response_callbacks.clear()
            return client.execute_command("SENTINEL", *words)

    def _watched(self) -> bool:
        for port in self.sentinel_ports:
            with redis.Redis(port=port, protocol=2, socket_timeout=2) as client:
                client.response_callbacks.clear()
                reply = client.execute_command("SENTINEL", "MASTER", MASTER_NAME)
            state = dict(zip(reply[::2], reply[1::2], strict=True))
            known = (state[b"num-slaves"], state[b"num-other-sentinels"], state[b"flags"])
            if known != (b"2", b"2", b"master"):
                return False
        return True

    def primary(self) -> Node:
        """The server that the first Sentinel names."""
        reply = self._sentinel("GET-MASTER-ADDR-BY-NAME", MASTER_NAME)
        assert isinstance(reply, list)
        port = int(reply[1])
        return next(node for node in self.nodes if node.port == port)

    def replicas(self) -> list[Node]:
        primary = self.primary()
        return [node for node in self.nodes if node is not primary]

    async def fail_over(self) -> Node:
        """Have the Sentinels promote a replica, as an operator does: the first server, where that
        is one.
        """
        old = self.primary()
        # The Sentinels refuse while an earlier failover goes on.
        await reached(
            lambda: self._sentinel("FAILOVER", MASTER_NAME) == b"OK", "the Sentinels take the order"
        )
        return await self.promoted(old)

    # -- states ------------------------------------------------------------------------------------

    async def replicating(self) -> None:
        """Wait until one server is primary, two replicate, and both have what it has."""

        def whole() -> bool:
            states = [node.info() for node in self.nodes]
            primaries = [state for state in states if state["role"] == "master"]
            links = [state.get("master_link_status") for state in states]
            offsets = {state["slave_repl_offset"] for state in states if state["role"] == "slave"}
            return (
                len(primaries) == 1
                and links.count("up") == 2
                and max(map(int, offsets)) <= int(primaries[0]["master_repl_offset"])
                and len(offsets) == 1
            )

        await reached(whole, "one primary and two replicas")

    async def promoted(self, old: Node) -> Node:
        """Wait for another primary than this, and return it."""

        def other() -> bool:
            primary = self.primary()
            return primary is not old and primary.info()["role"] == "master"

        await reached(other, "the Sentinels promoted a replica")
        return self.primary()

    async def heal(self) -> None:
        """Undo every fault: all servers run, and two replicate from the primary of the
        Sentinels.
        """
        for node in self.nodes:
            node.link.closed, node.link.delay = False, 0.0
            node.link.release()
            if not node.up:
                await asyncio.to_thread(node.restart)
            node.signal(signal.SIGCONT)
        primary = await asyncio.to_thread(self.primary)
        for node in self.nodes:
            await asyncio.to_thread(node.ask, "CONFIG", "SET", "replica-read-only", "yes")
            if node is not primary:
                await asyncio.to_thread(node.ask, "REPLICAOF", "127.0.0.1", primary.port)
        await self.replicating()
        await reached(self._watched, "the Sentinels see a healthy primary and its replicas")

    def hold_replication(self, primary: Node) -> None:
        """Let the replicas lag: they keep their connections, and nothing arrives."""
        primary.link.hold(replication)

    def isolate(self, node: Node) -> None:
        """Cut a server off from the processes that reach it through its link."""
        node.link.closed = True
        node.link.cut()
