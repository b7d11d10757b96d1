"""Replay of a redemption: keeps each session's last nonce in memory, so that a visitor can see the
broker refuse it and raise its replay alarm.

A site of yours needs none of this. The page's button “Redeem it again” shows that a nonce is
redeemed once. The backend sends the same redemption to the broker a second time, so it keeps the
spent nonce and the stated purpose, transaction and user: one redemption a session, for
`REDEMPTION_LIFE` seconds, at most `REDEMPTION_LIMIT` in all (the oldest is dropped first). Only the
session's own token hash finds a redemption. No redemption is written to a file or a log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from broker.sdk.passkey_broker import AsyncBrokerClient, Purpose, Receipt

REDEMPTION_LIFE = 5 * 60  # seconds
REDEMPTION_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Redemption:
    """A nonce, with the purpose, transaction and user that the site states.

    A sign-in without a name states no transaction and no user.
    """

    nonce: str = field(repr=False)
    purpose: Purpose
    transaction_id: str | None = field(default=None, repr=False)
    external_id: str | None = None

    async def send(self, client: AsyncBrokerClient) -> Receipt:
        """Redeem the nonce. Raises what `AsyncBrokerClient.verify_nonce` raises."""
        return await client.verify_nonce(
            self.nonce,
            purpose=self.purpose,
            transaction_id=self.transaction_id,
            external_id=self.external_id,
        )


class LastRedemptions:
    """The last redemption of each session, by the hash of its token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[float, Redemption]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, token_hash: str, redemption: Redemption) -> None:
        """Replace the session's last redemption, and drop expired ones."""
        now = self._clock()
        self._kept.pop(token_hash, None)
        self._kept = {owner: entry for owner, entry in self._kept.items() if entry[0] > now}
        while len(self._kept) >= REDEMPTION_LIMIT:
            del self._kept[next(iter(self._kept))]
        self._kept[token_hash] = (now + REDEMPTION_LIFE, redemption)

    def of(self, token_hash: str) -> Redemption | None:
        """The session's last redemption, unless it has expired."""
        expires, redemption = self._kept.get(token_hash, (0.0, None))
        return redemption if expires > self._clock() else None

    def forget(self, token_hash: str) -> None:
        self._kept.pop(token_hash, None)
