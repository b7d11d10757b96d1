"""The redemption that a session made last, kept in memory so that a visitor can see it refused.

A site of yours needs none of this. The page's button “Redeem it again” shows that a nonce is good
once: the backend sends the same redemption to the broker a second time. For that the backend keeps
the spent nonce and what it expected of it: one redemption a session, for `KEPT` seconds, at most
`MOST` in all (the oldest leaves first). Only the session's own token hash finds a redemption. No
redemption is written to a file or a log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from broker.sdk.passkey_broker import AsyncBrokerClient, Purpose, Receipt

KEPT = 5 * 60  # seconds
MOST = 1000  # redemptions


@dataclass(frozen=True, slots=True)
class Redemption:
    """A nonce and what the site expects it to prove.

    A sign-in without a name expects no transaction and no user.
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
    """Token hash of a session -> its last redemption, with the time at which it is forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[float, Redemption]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, token_hash: str, redemption: Redemption) -> None:
        """Replace the session's last redemption. What has expired is removed on the way."""
        now = self._clock()
        self._kept.pop(token_hash, None)
        self._kept = {owner: kept for owner, kept in self._kept.items() if kept[0] > now}
        while len(self._kept) >= MOST:
            del self._kept[next(iter(self._kept))]
        self._kept[token_hash] = (now + KEPT, redemption)

    def of(self, token_hash: str) -> Redemption | None:
        """The session's last redemption, unless it has expired."""
        expires, redemption = self._kept.get(token_hash, (0.0, None))
        return redemption if expires > self._clock() else None

    def forget(self, token_hash: str) -> None:
        self._kept.pop(token_hash, None)
