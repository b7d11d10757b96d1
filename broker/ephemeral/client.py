"""How commands reach Redis: one server through a `Sender`, a cluster through redis-py's own client.

Both answer the same way: `ask` gives the raw reply within a limit or raises what `DOWN` names, and sends a command at most once.
Sentinel and TLS are matters of the connection, which is redis-py's either way.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable
from typing import Any, Protocol

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from broker.ephemeral.sender import Sender

__all__ = ["DOWN", "ByClient", "Commands", "NoScriptError", "Script", "connect"]

# What redis-py raises for a server that is down, slow, full or refuses; RedisClusterException is no RedisError.
DOWN = (RedisError, RedisClusterException, OSError, TimeoutError)


class Script:
    """A Lua script and the digest by which a server that has it knows it."""

    __slots__ = ("sha1", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha1 = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode()


class Commands(Protocol):
    """One server, or a cluster."""

    def ask(self, *command: Any, limit: float) -> Awaitable[Any]:
        """The reply to one command within `limit` seconds; bytes, integers, None and lists of these.

        Raises:
            DOWN: no reply, or one that refuses. Unless it is a refusal, it is not known whether the server acted.
        """
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class ByClient:
    """A client of redis-py: a cluster's, which knows where keys are, or a stand-in for a server in tests. It gives INFO as a dict."""

    def __init__(self, client: Redis | RedisCluster) -> None:
        self._client = client

    async def ask(self, *command: Any, limit: float) -> Any:
        async with asyncio.timeout(limit):
            return await self._client.execute_command(*command)

    async def close(self) -> None:
        await self._client.aclose()


class _PatientCluster(RedisCluster):
    """A cluster's client whose callers wait for their turn, as they do for one server. By itself redis-py refuses
    the caller for whom no connection is left, so a short burst would be an outage."""

    def __init__(self, *, turns: int, **options: Any) -> None:
        # A connection that is being closed after a fault still counts, so there is room for as many again.
        super().__init__(max_connections=2 * turns, **options)
        self._turns = asyncio.Semaphore(turns)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        async with self._turns:
            return await super().execute_command(*args, **options)


def connect(url: str, *, timeout: float, connections: int) -> Commands:
    """A client that never repeats a command by itself. `redis+cluster://` and `rediss+cluster://` name a cluster.

    Of a cluster at most `connections` commands are under way at once; who comes later waits.
    """
    limits: dict[str, Any] = {
        # `ask` limits every wait. redis-py's own limit would swallow that one: until Python 3.12 a cancelled asyncio.wait_for
        # returns what happens to be there, and the wait goes on past the request's deadline.
        "socket_timeout": None,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        # With RESP3 the server may push between answers, so redis-py takes a connection with unread data for sound.
        "protocol": 2,
    }
    if "+cluster://" in url:
        return ByClient(
            _PatientCluster.from_url(
                url.replace("+cluster://", "://"),
                turns=connections,
                require_full_coverage=False,
                **limits,
            )
        )
    return Sender(ConnectionPool.from_url(url, **limits), timeout=timeout)
