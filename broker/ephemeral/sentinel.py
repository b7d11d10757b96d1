"""Redis Sentinel: finds the primary for each new connection.

**Discovery.** Every Sentinel is asked at once, and the address with the newest configuration epoch
counts. A Sentinel that is cut off together with an old primary therefore misleads no caller while
another Sentinel answers. A Sentinel that hangs delays a new connection by a quarter of the store's
time limit.

**Why no library's.** redis-py connects to the primary: TLS, AUTH and SELECT are its part. Its own
discovery asks one Sentinel after another and takes the first answer, which may be the old primary.

**After a failover** the old connection ends: the old primary hangs, closes it, or answers READONLY
or NOREPLICAS. The next command makes a new connection, which asks again. An old primary that still
takes writes does no harm: see "Terms" in `broker.ephemeral.one_time`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.exceptions import RedisError

PREFIX = "sentinel_"
_PORT = 26379


class SentinelPool(SentinelConnectionPool):
    """Connections to the primary that Sentinels name `service`. `sentinels` are the URLs of these;
    `limits` are redis-py's options for connections to them, `timeout` in seconds limits their
    answers.
    """

    def __init__(
        self,
        service: str,
        sentinels: Sequence[str],
        limits: Mapping[str, Any],
        *,
        timeout: float,
        **primary: Any,
    ) -> None:
        super().__init__(service, None, **primary)  # type: ignore[no-untyped-call]  # redis-py
        self._sentinels = sentinels
        self._limits = limits
        self._timeout = timeout

    async def get_master_address(self) -> tuple[str, int]:
        """Host and port of the primary.

        Raises:
            MasterNotFoundError: no Sentinel answers in time, or none knows the primary.
        """
        told = await asyncio.gather(*map(self._ask, self._sentinels), return_exceptions=True)
        states = [state for state in told if not isinstance(state, BaseException)]
        if not states:
            raise MasterNotFoundError("no Sentinel names the primary") from told[0]
        newest = max(states, key=lambda state: int(state["config-epoch"]))
        return newest["ip"], int(newest["port"])

    async def _ask(self, sentinel: str) -> Any:
        try:
            async with (
                asyncio.timeout(self._timeout),
                Redis.from_url(sentinel, **self._limits) as client,
            ):
                return await client.sentinel_master(self.service_name)
        except (RedisError, OSError, TimeoutError) as fault:
            raise MasterNotFoundError(type(fault).__name__) from fault


def sentinel_pool(url: str, limits: Mapping[str, Any], *, timeout: float) -> SentinelPool:
    """The pool of a `redis+sentinel://user:password@host:port,…/service?options` URL, or of
    `rediss+sentinel://`, which is TLS with the primary. Credentials before the `@` are the
    primary's. Options that begin with `sentinel_` are for the connections to Sentinels:
    `sentinel_username`, `sentinel_password`, `sentinel_tls` (`yes` or `no`; without it as the
    primary) and, with it, `sentinel_ssl_ca_certs` and the like.
    """
    parts = urlsplit(url)
    scheme = parts.scheme.removesuffix("+sentinel")
    credentials, at, hosts = parts.netloc.rpartition("@")
    given = parse_qsl(parts.query)
    own = {name: value for name, value in given if not name.startswith(PREFIX)}
    theirs = {name.removeprefix(PREFIX): value for name, value in given if name.startswith(PREFIX)}
    tls = theirs.pop("tls", "yes" if scheme == "rediss" else "no") == "yes"
    if tls:
        theirs = {k: v for k, v in own.items() if k.startswith("ssl_")} | theirs
    sentinels = []
    for host in hosts.split(","):
        port = urlsplit(f"//{host}").port
        address = host if port else f"{host.rstrip(':')}:{_PORT}"
        sentinels.append(f"{'rediss' if tls else 'redis'}://{address}?{urlencode(theirs)}")
    primary = dict(parse_url(f"{scheme}://{credentials}{at}unused?{urlencode(own)}"))
    del primary["host"]
    managed = (
        SentinelManagedSSLConnection
        if primary.pop("connection_class", None) is SSLConnection
        else SentinelManagedConnection
    )
    return SentinelPool(
        parts.path.removeprefix("/"),
        sentinels,
        limits,
        timeout=timeout / 4,
        **{**primary, **limits, "connection_class": managed},
    )
