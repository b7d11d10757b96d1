"""Ephemeral store: one-time values with a life, on Redis.

Read in this order: `one_time` (envelope, the answer of a take), `one_time_scripts`, `stores` (keys;
the stores of transactions, ceremonies, nonces and tickets), `mail_codes`, `rate_limits`. Below
them: `transport` (limits and failures), `connection`, `sentinel` and `cluster` (the way to a
server), `codec`, `faults`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from broker.ephemeral.mail_codes import MailCodes
from broker.ephemeral.one_time import (
    TERM_OVER,
    Answer,
    FirstTake,
    Ledger,
    OneTimeStore,
    Replayed,
    Taken,
    Unknown,
)
from broker.ephemeral.rate_limits import RateLimits
from broker.ephemeral.stores import Ceremonies, Nonces, OpenAnswers, Tickets, Transactions
from broker.ephemeral.transport import Commands, Transport, connect
from broker.errors import Unavailable
from broker.model import Opener
from broker.telemetry import Log, Metrics

__all__ = [
    "TERM_OVER",
    "Answer",
    "Ephemeral",
    "FirstTake",
    "RedisFacts",
    "Replayed",
    "Taken",
    "Unknown",
    "connect",
]


# Settings of Redis that `broker doctor` checks.
_SETTINGS = (
    "enable-debug-command",
    "replica-read-only",
    "repl-backlog-ttl",
    "min-replicas-to-write",
)


class RedisFacts(NamedTuple):
    """Facts about Redis, or about the primaries of a cluster. `ahead` in seconds, of the server
    whose clock differs most from ours. `replicas` of the server that has most. `settings` have the
    values of all servers, and lack what the broker's user may not read.
    """

    version: str
    ahead: float
    eviction: str
    replicas: int
    settings: Mapping[str, Sequence[str]]
    term_readable: bool


class Ephemeral:
    """The ephemeral store. `clock` gives seconds since the epoch; `timeout` in seconds limits one
    wait. `openers` are all that begin a ceremony. `rates` are texts of rate limits by name, and
    `monotonic` is their clock; a rate that is left out limits nothing. A `ledger` decides takes
    instead of terms.
    """

    def __init__(
        self,
        commands: Commands,
        *,
        timeout: float,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
        openers: Collection[Opener],
        rates: Mapping[str, str] = MappingProxyType({}),
        monotonic: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
    ) -> None:
        self._transport = Transport(commands, timeout=timeout, metrics=metrics, log=log)
        self._clock = clock
        store = OneTimeStore(self._transport, clock, ledger)
        self.transactions = Transactions(store, self._transport)
        self.ceremonies = Ceremonies(store, self._transport, clock, metrics, openers)
        self.nonces = Nonces(store, clock)
        self.open_answers = OpenAnswers(self._transport)
        self.tickets = Tickets(store)
        self.mail_codes = MailCodes(store)
        self._store = store
        self._term_proved = ledger is not None  # it needs no term
        self.rate_limits = RateLimits(self._transport, rates, monotonic)
        self.close = self._transport.close

    async def check(self) -> None:
        """Raise `Unavailable` unless the server, or every primary of a cluster, takes a write, and
        its term can be read (reason `redis_term`).
        """
        await self._transport.check()
        if not self._term_proved:
            self._term_proved = await self._store.is_term_readable()
        if not self._term_proved:
            raise Unavailable(reason="redis_term")

    async def facts(self) -> RedisFacts:
        """The facts for `broker doctor`. Raises `Unavailable`."""
        info = await self._transport.survey("facts", "INFO") or [[b""]]
        servers = [_info(reply) for [reply] in info]
        times = await self._transport.survey("facts", "TIME") or []
        ours = self._clock()
        ahead = [int(now[0]) + int(now[1]) / 1e6 - ours for [now] in times]
        given = await self._transport.survey("facts", "CONFIG", "GET", *_SETTINGS) or []
        settings: dict[str, list[str]] = {}
        for [reply] in given:
            for name, value in zip(reply[::2], reply[1::2], strict=True):
                settings.setdefault(name.decode(), []).append(value.decode())
        first = servers[0]
        policies = {server.get("maxmemory_policy", "noeviction") for server in servers}
        return RedisFacts(
            version=first.get("valkey_version") or first.get("redis_version") or "0",
            ahead=max(ahead, key=abs, default=0.0),
            eviction=", ".join(sorted(policies)),
            replicas=max(int(server.get("connected_slaves", 0)) for server in servers),
            settings={name: sorted(set(values)) for name, values in settings.items()},
            term_readable=await self._store.is_term_readable(),
        )


def _info(reply: bytes) -> dict[str, str]:
    """An INFO reply."""
    lines = (line.partition(":") for line in reply.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}
