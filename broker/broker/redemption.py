"""Redemption: what a finished ceremony gives its caller, and the exchange of a nonce for its
receipt.

A signing key is made ready before anything is taken, and signs after the last write: a broker that
can't sign spends nothing.

**Replay alarm.** The second redemption of a nonce is refused like any unknown nonce. For the
operator and the backend it is an event `nonce.replayed` with the user, a metric and a warning in
the log. Event and warning name the first redemption: its time, request id and actor. So the backend
finds the session that the first redemption opened. Any other refused redemption is an event
`nonce.refused` with its reason.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from broker.broker.steps import Steps
from broker.durable import instant
from broker.ephemeral import FirstTake, Replayed, Taken
from broker.errors import UnknownNonce, UnknownTransaction, policy_hint
from broker.model import (
    LONGEST_NONCE,
    ExpectedReceipt,
    Idempotency,
    Pending,
    Receipt,
    Redeemable,
    RelyingParty,
    TokenAlgorithm,
    base64url,
    epoch_of,
)
from broker.telemetry import Log, context
from broker.tokens import digest, well_formed

# The reason of a refused nonce, by its result in metrics.
_REASONS = {
    "malformed": "nonce_malformed",
    "expired": "nonce_expired",
    "foreign": "nonce_foreign",
    "replayed": "nonce_replayed",
    "term_over": "term_over",
    "unknown": "nonce_unknown",
}


def _is_bound(app: RelyingParty, found: Redeemable, expect: ExpectedReceipt) -> bool:
    """True if the caller brought the verifier of the nonce's challenge, or none where there is no
    challenge and the policy requires none.

    Source: RFC 7636 §4.6; RFC 9700 §2.1.1 on downgrade: a verifier without a challenge is refused.
    """
    challenge, verifier = found.binding_challenge, expect.binding_verifier
    if challenge is None or verifier is None:
        return challenge is verifier and not app.policy.binding_required
    made = base64url(hashlib.sha256(verifier.encode()).digest())
    return hmac.compare_digest(made, challenge)


class Nonce(NamedTuple):
    """A reward: a nonce. `life` is in seconds, at most 600; None: the policy's."""

    life: int | None = None


class Signed(NamedTuple):
    """A reward: a nonce, and a token signed with a key of the app's set, or of the broker's
    (`signer` None). `claims` makes the token's claims from the receipt and the nonce.
    """

    signer: RelyingParty | None
    algorithm: TokenAlgorithm
    claims: Callable[[Receipt, str], dict[str, Any]]
    life: int | None = None


class Outcome(NamedTuple):
    """A finished ceremony or a redemption: the receipt, and what the caller asked for."""

    receipt: Receipt
    nonce: str | None = None
    token: str | None = None


class Redemption(Steps):
    """The steps behind a receipt."""

    def __init__(self, *parts: Any, log: Log) -> None:
        super().__init__(*parts)
        self._log = log

    async def ready(self, reward: Nonce | Signed | None) -> None:
        """Make the signing key ready, if the reward needs one.

        Raises:
            Unavailable.
        """
        if isinstance(reward, Signed):
            await self._signing.ready(reward.signer, reward.algorithm)

    def require_bound(
        self, app: RelyingParty, pending: Pending, reward: Nonce | Signed | None
    ) -> None:
        """Refuse a finish whose nonce would lack the binding that the policy requires by now, and
        one whose signed token would escape the binding: a verifier of tokens asks for none.

        Raises:
            UnknownTransaction.
        """
        bound = pending.options.binding_challenge is not None
        if bound and isinstance(reward, Signed):
            raise UnknownTransaction(
                reason="binding_offline", hint="A bound transaction is finished by the Flex API."
            )
        if reward is not None and app.policy.binding_required and not bound:
            raise UnknownTransaction(
                reason="binding_missing", hint=policy_hint("binding_required", "false")
            )

    async def reward(
        self,
        app: RelyingParty,
        receipt: Receipt,
        pending: Pending,
        reward: Nonce | Signed | None,
    ) -> Outcome:
        """The outcome of a finished ceremony."""
        if reward is None:
            return Outcome(receipt)
        nonce = self._mint.token("nonce")
        ends = receipt.at + min(reward.life or app.policy.nonce_life, LONGEST_NONCE)
        await self._ephemeral.nonces.put(
            app.id,
            nonce,
            Redeemable(receipt, pending.transaction, ends, pending.options.binding_challenge),
        )
        return await self._signed(receipt, nonce, reward)

    async def redeem(
        self,
        app: RelyingParty,
        nonce: str,
        expect: ExpectedReceipt,
        reward: Signed | None,
        idempotency: Idempotency | None,
    ) -> Outcome:
        """Take a nonce; confirm a new passkey, or see that the passkey is live."""
        found, repeated = await self._take_nonce(app, nonce, idempotency)
        receipt, now = found.receipt, self._clock()
        life = found.expires_at - receipt.at
        self._metrics.redemption_age.observe(min(1.0, max(0.0, (now - receipt.at) / life)))
        if (
            receipt.proof not in expect.proofs
            or (receipt.external_id is None and not expect.unowned)
            or expect.external_id not in (None, receipt.external_id)
            or (
                expect.transaction_id is not None
                and digest("transaction", app.id, expect.transaction_id) != found.transaction
            )
        ):
            self._metrics.redemptions.inc("mismatch")
            raise await self._refused(app, "nonce_mismatch", receipt)
        if not _is_bound(app, found, expect):
            self._metrics.redemptions.inc("mismatch")
            raise await self._refused(app, "binding_mismatch", receipt)
        ceremonies, epoch = self._durable.ceremonies, epoch_of(receipt.subject)
        if not await (
            ceremonies.confirm(app.id, receipt.passkey_id, epoch, instant(now))
            if receipt.purpose == "register"
            else ceremonies.is_live(app.id, receipt.passkey_id, epoch)
        ):
            self._metrics.redemptions.inc("revoked")
            raise await self._refused(app, "passkey_revoked", receipt)
        self._metrics.redemptions.inc("repeated" if repeated else "ok")
        return await self._signed(receipt, nonce, reward)

    async def _take_nonce(
        self, app: RelyingParty, nonce: str, idempotency: Idempotency | None
    ) -> Taken[Redeemable]:
        cause, replayed = "malformed", None
        if well_formed(nonce, "nonce"):
            answer = await self._ephemeral.nonces.take(app.id, nonce, idempotency)
            if isinstance(answer, Taken):
                return answer
            if isinstance(answer, Replayed):
                cause, replayed = "replayed", answer
            else:
                cause = answer.reason
        result = cause if cause in _REASONS else "unknown"
        self._metrics.redemptions.inc(result)
        if replayed is not None:
            raise await self._replayed(app, replayed.first, replayed.value.receipt)
        raise await self._refused(app, _REASONS[result])

    async def _replayed(
        self, app: RelyingParty, first: FirstTake, receipt: Receipt
    ) -> UnknownNonce:
        """The refusal of a second redemption, which is told: event and log line."""
        told = {
            "first_at": instant(first.at).isoformat(timespec="milliseconds"),
            "first_request_id": first.request_id,
            "first_actor": first.actor,
        }
        self._log(
            "nonce_replayed",
            severity=logging.WARNING,
            app=app.id,
            request_id=context().request_id,
            user_id=receipt.subject.user_id,
            **told,
        )
        return await self._refused(app, "nonce_replayed", receipt, "nonce.replayed", told)

    async def _refused(
        self,
        app: RelyingParty,
        reason: str,
        receipt: Receipt | None = None,
        action: str = "nonce.refused",
        payload: Mapping[str, Any] | None = None,
    ) -> UnknownNonce:
        """The refusal of a redemption, after its event."""
        await self._refusals.add(
            app,
            action,
            reason,
            user_id=receipt.subject.user_id if receipt else None,
            passkey_id=receipt.passkey_id if receipt else None,
            payload=payload,
        )
        return UnknownNonce(reason=reason)

    async def _signed(self, receipt: Receipt, nonce: str, reward: Nonce | Signed | None) -> Outcome:
        token = None
        if isinstance(reward, Signed):
            claims = reward.claims(receipt, nonce)
            token = await self._signing.sign(reward.signer, reward.algorithm, claims)
        return Outcome(receipt, nonce, token)
