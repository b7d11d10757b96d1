"""Ephemeral store: one-time values with a life, on Redis.

Read in this order: `one_time` (envelope, scripts, the answer of a take), `stores` (keys; the stores
of transactions, ceremonies, nonces and tickets), `mail_codes`. Below them: `transport` (limits and
failures), `connection`, `sentinel` and `cluster` (the way to a server), `codec`, `faults`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.ephemeral.mail_codes import MailCodes
from broker.ephemeral.one_time import (
    TERM_OVER,
    Answer,
    FirstTake,
    OneTimeStore,
    Replayed,
    Taken,
    Unknown,
)
from broker.ephemeral.stores import Ceremonies, Nonces, OpenAnswers, Tickets, Transactions
from broker.ephemeral.transport import Commands, Transport, connect
from broker.telemetry import Log, Metrics

__all__ = [
    "TERM_OVER",
    "Answer",
    "Ephemeral",
    "FirstTake",
    "Replayed",
    "Taken",
    "Unknown",
    "connect",
]


class Ephemeral:
    """The ephemeral store. `clock` gives seconds since the epoch; `timeout` in seconds limits one
    wait.
    """

    def __init__(
        self,
        commands: Commands,
        *,
        timeout: float,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
    ) -> None:
        self._transport = Transport(commands, timeout=timeout, metrics=metrics, log=log)
        store = OneTimeStore(self._transport, clock)
        self.transactions = Transactions(store, self._transport)
        self.ceremonies = Ceremonies(store, self._transport, clock, metrics)
        self.nonces = Nonces(store, clock)
        self.open_answers = OpenAnswers(self._transport)
        self.tickets = Tickets(store)
        self.mail_codes = MailCodes(store)
        self.check = self._transport.check
        self.close = self._transport.close

    async def facts(self) -> dict[str, Any]:
        """For `broker doctor`: version, seconds since the epoch by the server's clock, eviction
        policy.
        """
        server = _info(await self._transport.ask("facts", "INFO", b"server"))
        memory = _info(await self._transport.ask("facts", "INFO", b"memory"))
        now = await self._transport.ask("facts", "TIME")
        return {
            "version": server.get("valkey_version") or server["redis_version"],
            "clock": int(now[0]) + int(now[1]) / 1e6,
            "eviction": memory.get("maxmemory_policy", "noeviction"),
        }


def _info(reply: bytes) -> dict[str, str]:
    """An INFO reply."""
    lines = (line.partition(":") for line in reply.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}
