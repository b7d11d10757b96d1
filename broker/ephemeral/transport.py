"""Redis transport: one server over a multiplexed connection, the primary that Sentinels name, or a
cluster through a router with one such connection for each node.

Both answer alike: `ask` gives the raw reply within a limit or raises one of `DOWN`, and no command
runs twice. TLS and credentials are redis-py's part.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from broker.ephemeral.cluster import Address, ClusterRouter
from broker.ephemeral.connection import PROBE, Batch, MultiplexedConnection, term_of
from broker.ephemeral.faults import Faults
from broker.ephemeral.sentinel import sentinel_pool
from broker.errors import Unavailable
from broker.telemetry import Log, Metrics, remaining

__all__ = ["DOWN", "ByClient", "Commands", "NoScriptError", "Script", "Transport", "connect"]

# The errors of a server that is down, slow or full, or that refuses.
DOWN = (RedisError, OSError, TimeoutError)


class Script:
    """A Lua script and its SHA-1, by which EVALSHA runs it."""

    __slots__ = ("sha1", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha1 = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode()


class Commands(Protocol):
    """One server, or a cluster."""

    @property
    def term_changes(self) -> int:
        """How often `term` read another term than before of that server or of its slots."""
        ...

    @property
    def moves(self) -> int:
        """How often a node named another owner of a slot (MOVED)."""
        ...

    def ask(self, *command: Any, limit: float, patient: bool = False) -> Awaitable[Any]:
        """The reply to one command within `limit` seconds; bytes, integers, None and lists of
        these.

        Raises:
            DOWN: no reply, or one that refuses. Unless it is a refusal, it is not known whether the
                server acted.
        """
        ...

    async def term(self, key: bytes, *, limit: float) -> bytes:
        """The term of the server that has the key (`connection.term_of`), at most a second old.

        Raises:
            DOWN: see `ask`.
        """
        ...

    def forget_terms(self) -> None:
        """Have `term` read anew, of every server."""
        ...

    async def survey(self, *command: Any, connections: int, limit: float) -> list[list[Any]]:
        """The replies to a command without keys: of each server that has keys, one over each of so
        many new connections.

        Raises:
            DOWN: see `ask`.
        """
        ...

    async def check(self, *, limit: float) -> None:
        """Raise `DOWN` unless every server that has keys takes a write."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class Transport:
    """Commands and scripts within the running request's limit. A failure is counted, logged and
    raised as `Unavailable`. `timeout` in seconds limits one wait.
    """

    def __init__(self, commands: Commands, *, timeout: float, metrics: Metrics, log: Log) -> None:
        self._commands = commands
        self._timeout = timeout
        self._metrics = metrics
        self._posted: set[asyncio.Future[Any]] = set()  # a task that nothing holds may vanish
        self._faults = Faults(metrics, log, time.monotonic)
        self._unanswered = 0
        metrics.queued.add(lambda: self._unanswered, "redis")
        metrics.redis_term_changes.add(lambda: commands.term_changes)
        self.tell = self._faults.tell
        self.forget_terms = commands.forget_terms

    @property
    def moves(self) -> int:
        """`Commands.moves`."""
        return self._commands.moves

    def ask(self, operation: str, *command: Any) -> Awaitable[Any]:
        """The reply to one command.

        Raises:
            Unavailable: the server is down, slow, full, or refuses to write; or its reply was lost.
        """
        reply = self._commands.ask(*command, limit=remaining(self._timeout))
        return self._watched(operation, reply)

    async def run(
        self, operation: str, script: Script, keys: Sequence[bytes], args: Sequence[Any]
    ) -> Any:
        """The reply to a Lua script whose keys share a hash tag: atomic, and one round trip once
        the server has the script.

        Raises:
            Unavailable: see `ask`.
        """
        try:
            return await self.ask(operation, "EVALSHA", script.sha1, len(keys), *keys, *args)
        except NoScriptError:  # nothing was run
            return await self.ask(operation, "EVAL", script.text, len(keys), *keys, *args)

    async def term(self, operation: str, key: bytes) -> bytes:
        """The term of the server that has the key.

        Raises:
            Unavailable: see `ask`.
        """
        try:
            return await self._commands.term(key, limit=remaining(self._timeout))
        except DOWN as fault:
            self.tell(operation, fault)
            raise Unavailable(reason="redis") from fault

    async def survey(
        self, operation: str, *command: Any, connections: int = 1
    ) -> list[list[Any]] | None:
        """The replies of each server that has keys, over so many new connections; None if a server
        refuses the command.

        Raises:
            Unavailable: see `ask`.
        """
        limit = remaining(self._timeout)
        try:
            return await self._commands.survey(*command, connections=connections, limit=limit)
        except ResponseError:
            return None
        except DOWN as fault:
            self.tell(operation, fault)
            raise Unavailable(reason="redis") from fault

    def post(
        self,
        operation: str,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Any],
        then: Callable[[Any], None],
    ) -> None:
        """Run a Lua script whose keys share a hash tag, and wait for nothing: `then` gets the
        reply. A failure is counted and logged.
        """

        def send(*script_words: Any) -> None:
            command = (*script_words, len(keys), *keys, *args)
            # A single server's reply is a future already. A cluster's takes a task.
            asked = self._commands.ask(*command, limit=self._timeout, patient=True)
            reply = asyncio.ensure_future(asked)
            self._posted.add(reply)
            reply.add_done_callback(done)

        def done(reply: asyncio.Future[Any]) -> None:
            self._posted.discard(reply)
            fault = None if reply.cancelled() else reply.exception()
            if isinstance(fault, NoScriptError):  # nothing was run
                send("EVAL", script.text)
            elif isinstance(fault, DOWN):
                self.tell(operation, fault)
            elif not reply.cancelled():
                then(reply.result())

        send("EVALSHA", script.sha1)

    async def check(self) -> None:
        """Raise `Unavailable` unless the server, or every master of a cluster, takes a write: a
        full server or a replica answers PING and takes nothing."""
        await self._watched("check", self._commands.check(limit=remaining(self._timeout)))

    async def close(self) -> None:
        """Close every connection, when the scripts that no caller waits for are answered."""
        if self._posted:
            await asyncio.wait(self._posted, timeout=self._timeout)
        await self._commands.close()

    async def _watched(self, operation: str, reply: Awaitable[Any]) -> Any:
        began, failed = time.perf_counter(), False
        self._unanswered += 1
        try:
            return await reply
        except NoScriptError:
            raise
        except DOWN as fault:
            failed = True
            self.tell(operation, fault)
            raise Unavailable(reason="redis") from fault
        finally:
            self._unanswered -= 1
            seconds = time.perf_counter() - began
            self._metrics.store_seconds.observe(seconds, "redis", operation)
            if self._metrics.trace is not None:
                self._metrics.trace("redis", operation, seconds, failed)


class ByClient:
    """A client of redis-py that stands in for a server in tests."""

    term_changes = 0
    moves = 0

    def __init__(self, client: Redis) -> None:
        client.response_callbacks.clear()  # replies stay raw
        self._client = client

    async def ask(self, *command: Any, limit: float, patient: bool = False) -> Any:
        async with asyncio.timeout(limit):
            return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def term(self, key: bytes, *, limit: float) -> bytes:
        return term_of(await self.ask("INFO", "replication", limit=limit))

    def forget_terms(self) -> None:
        pass

    async def survey(self, *command: Any, connections: int, limit: float) -> list[list[Any]]:
        return [[await self.ask(*command, limit=limit) for _ in range(connections)]]

    async def check(self, *, limit: float) -> None:
        await self.ask("SET", PROBE, b"", "PX", 1000, limit=limit)

    async def close(self) -> None:
        await self._client.aclose()


def connect(url: str, *, timeout: float, read_url: Callable[[], str] | None = None) -> Commands:
    """Commands to the server that `url` names, to the primary of `redis+sentinel://` or
    `rediss+sentinel://` (`broker.ephemeral.sentinel`), or to the cluster (`redis+cluster://`,
    `rediss+cluster://`; one or more of its nodes). Nothing is connected yet. `read_url` gives the
    URL for a connection, whose credentials may differ by then.
    """
    read = read_url or (lambda: url)
    limits: dict[str, Any] = {
        # `ask` limits every wait. redis-py's own limit would swallow that one: until Python 3.12 a
        # cancelled asyncio.wait_for returns what happens to be there, and the wait goes on past the
        # request's deadline.
        "socket_timeout": None,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        # With RESP3 the server may push between answers, so redis-py takes a connection with unread
        # data for sound.
        "protocol": 2,
    }
    if "+sentinel://" in url:
        return MultiplexedConnection(
            lambda: sentinel_pool(read(), limits, timeout=timeout), timeout=timeout
        )
    if "+cluster://" not in url:
        return MultiplexedConnection(
            lambda: ConnectionPool.from_url(read(), **limits), timeout=timeout
        )

    def pools(url: str) -> list[ConnectionPool]:
        parts = urlsplit(url.replace("+cluster://", "://"))
        credentials, at, hosts = parts.netloc.rpartition("@")
        return [
            ConnectionPool.from_url(
                parts._replace(netloc=credentials + at + each).geturl(), **limits
            )
            for each in hosts.split(",")
        ]

    batch = Batch()

    def node(address: Address, on_end: Callable[[], None]) -> MultiplexedConnection:
        def pool() -> ConnectionPool:
            seed = pools(read())[0]
            options = {**seed.connection_kwargs, "host": address[0], "port": address[1]}
            return ConnectionPool(seed.connection_class, **options)

        return MultiplexedConnection(pool, timeout=timeout, batch=batch, on_end=on_end)

    given = [pool.connection_kwargs for pool in pools(url)]
    seeds = [(one.get("host", "localhost"), one.get("port", 6379)) for one in given]
    return ClusterRouter(seeds, node, timeout=timeout)
