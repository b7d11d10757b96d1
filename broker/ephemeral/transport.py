"""Redis transport: one server over a multiplexed connection, or a cluster through a router with one
such connection for each node.

Both answer alike: `ask` gives the raw reply within a limit or raises one of `DOWN`, and no command
runs twice. TLS and credentials are redis-py's part.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from broker.ephemeral.cluster import Address, ClusterRouter
from broker.ephemeral.connection import PROBE, Batch, MultiplexedConnection

__all__ = ["DOWN", "ByClient", "Commands", "NoScriptError", "Script", "connect"]

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

    def ask(self, *command: Any, limit: float) -> Awaitable[Any]:
        """The reply to one command within `limit` seconds; bytes, integers, None and lists of
        these.

        Raises:
            DOWN: no reply, or one that refuses. Unless it is a refusal, it is not known whether the
                server acted.
        """
        ...

    async def check(self, *, limit: float) -> None:
        """Raise `DOWN` unless every server that has keys takes a write."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class ByClient:
    """A client of redis-py that stands in for a server in tests. It gives INFO as a dict."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def ask(self, *command: Any, limit: float) -> Any:
        async with asyncio.timeout(limit):
            return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def check(self, *, limit: float) -> None:
        await self.ask("SET", PROBE, b"", "PX", 1000, limit=limit)

    async def close(self) -> None:
        await self._client.aclose()


def connect(url: str, *, timeout: float) -> Commands:
    """Commands to the server that `url` names, or to the cluster (`redis+cluster://`,
    `rediss+cluster://`; one or more of its nodes). Nothing is connected yet."""
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
    if "+cluster://" not in url:
        return MultiplexedConnection(ConnectionPool.from_url(url, **limits), timeout=timeout)
    parts = urlsplit(url.replace("+cluster://", "://"))
    credentials, at, hosts = parts.netloc.rpartition("@")
    pools = [
        ConnectionPool.from_url(parts._replace(netloc=credentials + at + host).geturl(), **limits)
        for host in hosts.split(",")
    ]
    kind, options = pools[0].connection_class, pools[0].connection_kwargs

    batch = Batch()

    def node(address: Address, on_end: Callable[[], None]) -> MultiplexedConnection:
        pool = ConnectionPool(kind, **{**options, "host": address[0], "port": address[1]})
        return MultiplexedConnection(pool, timeout=timeout, batch=batch, on_end=on_end)

    given = [pool.connection_kwargs for pool in pools]
    seeds = [(one.get("host", "localhost"), one.get("port", 6379)) for one in given]
    return ClusterRouter(seeds, node, timeout=timeout)
