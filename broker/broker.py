"""What the broker does, as verbs. Read this file first.

    open     a backend asks for permission for one ceremony of one of its users     -> transaction id
    begin    the page asks for a challenge                                          -> handle, options
    finish   the page brings the authenticator's answer                             -> nonce
    redeem   the backend exchanges the nonce                                        -> receipt

Transaction and nonce are bookends round one ceremony: a discoverable authentication has no transaction.

**Order is the guarantee.** Begin only peeks at the transaction, for people cancel and try again. Finish takes the pending
ceremony before any cryptography, so an answer, right or wrong, is judged once; it takes the transaction after the answer was
verified and before anything durable is written, so a transaction buys one success; then comes one durable write, and only then
the nonce. Whatever fails after a take has spent what was taken: the person starts over, from the page while the transaction
stands, else from the backend (`Unavailable.retry` says which). Each take is one atomic command of the ephemeral store, so this
holds for any number of instances.

**Who may learn what.** Callers with a key may know of users. Callers without one get the same refusal for unknown, expired, used,
wrong-kind and foreign values; `Refusal.reason` tells the operator which it was.

Clock and chance are arguments. The durable write, not what was read before it, decides about revocation, counters and duplicates.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn, TypeVar

from broker import ceremony
from broker.durable import Durable, Owned, instant
from broker.ephemeral import Ephemeral
from broker.errors import (
    CeremonyRefused,
    DiscoverableRefused,
    InvalidRequest,
    NoPasskeys,
    Refusal,
    Retry,
    Signal,
    Unavailable,
    UnknownNonce,
    UnknownTransaction,
    UnknownUser,
)
from broker.model import (
    Attachment,
    AuthenticationAnswer,
    Credential,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    Receipt,
    Redeemable,
    RegistrationAnswer,
    RelyingParty,
    Transaction,
    VerifiedAuthentication,
)
from broker.telemetry import Metrics
from broker.tokens import Mint, SystemMint, digest, well_formed

MAX_TEXT = 256
_SIGNED = frozenset({"counter", "revoked_or_counter"})  # refused after the signature was verified
P = TypeVar("P", PendingRegistration, PendingAuthentication)


@dataclass(frozen=True, slots=True)
class Begun:
    """A begun ceremony: the handle for finish, and the JSON for `navigator.credentials` (the content of `publicKey`)."""

    handle: str
    options: dict[str, Any]


class Broker:
    """The verbs. `clock` gives seconds since the epoch, `mint` is the source of chance."""

    def __init__(
        self,
        *,
        ephemeral: Ephemeral,
        durable: Durable,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        mint: Mint | None = None,
    ) -> None:
        self._ephemeral = ephemeral
        self._durable = durable
        self._metrics = metrics
        self._clock = clock
        self._mint = mint or SystemMint()

    # -- open -----------------------------------------------------------------------------------------------------------------

    async def open_registration(self, app: RelyingParty, external_id: str, display_name: str) -> str:
        """Permit one registration for a user, who is made if the app has none with this external id. Returns a transaction id.

        `display_name` is what the authenticator shows. The id is a bearer right to add a passkey until it is used or ends.

        Raises:
            InvalidRequest, Unavailable.
        """
        _checked(external_id, "external_id")
        _checked(display_name, "passkey_display_name")
        user_id, handle = await self._durable.ensure_user(
            app.id,
            external_id,
            new_id=self._mint.id(),
            new_handle=self._mint.user_handle(),
            now=self._now(),
        )
        return await self._open(app, "register", user_id, external_id, handle, display_name)

    async def open_authentication(self, app: RelyingParty, external_id: str) -> str:
        """Permit one authentication of a user. Returns a transaction id.

        Raises:
            InvalidRequest, UnknownUser, NoPasskeys, Unavailable.
        """
        _checked(external_id, "external_id")
        found = await self._durable.user_to_sign_in(app.id, external_id)
        if found is None:
            raise UnknownUser
        user_id, handle, able = found
        if not able:
            raise NoPasskeys
        return await self._open(app, "authenticate", user_id, external_id, handle, "")

    async def _open(
        self,
        app: RelyingParty,
        purpose: Purpose,
        user_id: str,
        external_id: str,
        handle: str,
        display_name: str,
    ) -> str:
        transaction_id = self._mint.token("transaction")
        ends = self._clock() + app.policy.transaction_life
        await self._ephemeral.put_transaction(
            transaction_id,
            Transaction(app.id, purpose, user_id, external_id, handle, display_name, ends),
        )
        return transaction_id

    # -- registration ---------------------------------------------------------------------------------------------------------

    async def begin_registration(
        self, app: RelyingParty, transaction_id: str, attachment: Attachment | None
    ) -> Begun:
        """Begin a registration; replaces the transaction's earlier pending ceremony.

        Raises:
            UnknownTransaction, Unavailable.
        """
        name, transaction = await self._peek(app, transaction_id, "register")
        # A passkey that was never confirmed is not excluded: the authenticator shall be able to replace it.
        held = await self._durable.credentials(app.id, transaction.user_id, live_only=True)
        now = self._clock()
        pending = PendingRegistration(
            app_id=app.id,
            challenge=self._mint.challenge(),
            transaction=name,
            user_id=transaction.user_id,
            external_id=transaction.external_id,
            user_handle=transaction.user_handle,
            display_name=transaction.display_name,
            user_verification=app.policy.user_verification,
            algorithms=app.policy.algorithms,
            begun_at=now,
            expires_at=min(now + app.policy.ceremony_life, transaction.expires_at),
        )
        handle = await self._ephemeral.put_pending(self._mint.token("handle"), pending, cap=0)
        self._metrics.ceremonies.labels("register", "begin", "ok").inc()
        return Begun(
            handle,
            ceremony.begin_registration(
                app,
                challenge=pending.challenge,
                user_handle=pending.user_handle,
                user_name=pending.display_name,
                user_display_name=pending.display_name,
                exclude=[(c.credential_id, c.transports) for c in held],
                life=pending.expires_at - now,
                attachment=attachment,
            ),
        )

    async def finish_registration(
        self, app: RelyingParty, handle: str, transaction_id: str | None, answer: RegistrationAnswer
    ) -> str:
        """Finish a registration: judge the answer, store the credential, return a nonce.

        Raises:
            UnknownTransaction: no such pending ceremony; or `transaction_id` names another transaction, or its own is spent.
            CeremonyRefused: the answer does not satisfy WebAuthn L3 §7.1, or its credential id is registered already.
            Unavailable.
        """
        async with self._counted("register"):
            pending = _as_strict_as(
                app, await self._take_pending(app, handle, transaction_id, PendingRegistration)
            )
            signal = Signal(app.rp_id, answer.credential_id)
            try:
                verified = ceremony.finish_registration(pending, app, answer)
            except CeremonyRefused as refusal:
                # The device made this passkey and it will never be stored: the page may tell the device so. Unless it was stored
                # by an earlier ceremony, whose answer came again: then somebody signs in with it.
                if await self._nobody_has(app, answer.credential_id):
                    refusal.signal = signal
                await self._tell_refusal(app, "passkey.registered", refusal, pending.user_id)
                raise
            async with _retry_from("backend"):
                await self._take_transaction(pending.transaction)
                now = self._clock()
                live = app.policy.live_at == "finish"
                passkey_id = self._mint.id()
                outcome = await self._durable.add_credential(
                    pending, verified, new_id=passkey_id, live=live, now=instant(now)
                )
                if outcome != "added":
                    # No signal for a duplicate: somebody signs in with that passkey.
                    refused = CeremonyRefused(
                        "This passkey can't be added; use another authenticator.",
                        reason=outcome,
                        signal=signal if outcome == "no_user" else None,
                    )
                    await self._tell_refusal(app, "passkey.registered", refused, pending.user_id)
                    raise refused
                receipt = Receipt(
                    external_id=pending.external_id,
                    user_id=pending.user_id,
                    purpose="register",
                    passkey_id=passkey_id,
                    credential_id=verified.credential_id,
                    origin=verified.origin,
                    user_present=verified.user_present,
                    user_verified=verified.user_verified,
                    backup_eligible=verified.backup_eligible,
                    backed_up=verified.backed_up,
                    backup_changed=False,
                    counter_regressed=False,
                    attestation=verified.attestation_trust,
                    authenticator_name_claimed=ceremony.authenticator_name(verified.aaguid),
                    at=now,
                )
                return await self._put_nonce(app, receipt, pending.transaction)

    # -- authentication -------------------------------------------------------------------------------------------------------

    async def begin_authentication(self, app: RelyingParty, transaction_id: str | None) -> Begun:
        """Begin an authentication: of the transaction's user, or discoverable (`transaction_id` None).

        Raises:
            UnknownTransaction, TooManyCeremonies, Unavailable.
        """
        name, transaction, offered = None, None, list[Credential]()
        if transaction_id is not None:
            name, transaction = await self._peek(app, transaction_id, "authenticate")
            offered = await self._durable.credentials(app.id, transaction.user_id, live_only=True)
            if (
                not offered
            ):  # revoked since the transaction was opened; an empty list would ask for any passkey
                raise UnknownTransaction(reason="no_passkey_left")
        now = self._clock()
        ends = now + app.policy.ceremony_life
        pending = PendingAuthentication(
            app_id=app.id,
            challenge=self._mint.challenge(),
            transaction=name,
            user_id=transaction.user_id if transaction else None,
            allowed=tuple(c.id for c in offered),
            user_verification=app.policy.user_verification,
            begun_at=now,
            expires_at=min(ends, transaction.expires_at) if transaction else ends,
        )
        handle = await self._ephemeral.put_pending(
            self._mint.token("handle"), pending, cap=app.policy.discoverable_limit
        )
        self._metrics.ceremonies.labels(
            "authenticate" if transaction else "discoverable", "begin", "ok"
        ).inc()
        return Begun(
            handle,
            ceremony.begin_authentication(
                app,
                challenge=pending.challenge,
                allow=[(c.credential_id, c.transports) for c in offered],
                life=pending.expires_at - now,
            ),
        )

    async def finish_authentication(
        self, app: RelyingParty, handle: str, transaction_id: str | None, answer: AuthenticationAnswer
    ) -> str:
        """Finish an authentication: judge the answer, record the sign-in, return a nonce.

        Raises:
            UnknownTransaction: no such pending ceremony; or `transaction_id` names another transaction, or its own is spent.
            CeremonyRefused: the answer does not satisfy WebAuthn L3 §7.2; `DiscoverableRefused` where there was no transaction.
            Unavailable.
        """
        async with self._counted("authenticate") as counted:
            pending = _as_strict_as(
                app, await self._take_pending(app, handle, transaction_id, PendingAuthentication)
            )
            if pending.transaction is None:
                counted.kind = "discoverable"
            owned: Owned | None = None
            try:
                owned = await self._durable.owned(app.id, answer.credential_id)
                if owned is None:
                    unknown = await self._nobody_has(app, answer.credential_id)
                    raise CeremonyRefused(
                        reason="unknown_credential",
                        signal=Signal(app.rp_id, answer.credential_id) if unknown else None,
                    )
                if not owned.credential.live:
                    raise CeremonyRefused(reason="not_live")
                verified = ceremony.finish_authentication(pending, app, owned.credential, answer)
            except CeremonyRefused as refusal:
                await self._refuse_authentication(app, pending, owned, refusal)
            async with _retry_from("backend" if pending.transaction else "page"):
                return await self._signed_in(app, pending, owned, verified)

    async def _signed_in(
        self,
        app: RelyingParty,
        pending: PendingAuthentication,
        owned: Owned,
        verified: VerifiedAuthentication,
    ) -> str:
        if pending.transaction is not None:
            await self._take_transaction(pending.transaction)
        credential, now = owned.credential, self._clock()
        recorded = await self._durable.use_credential(
            credential, verified, flag_counter=app.policy.counter == "flag", now=instant(now)
        )
        if recorded is None:
            await self._refuse_authentication(
                app, pending, owned, CeremonyRefused(reason="revoked_or_counter")
            )
        receipt = Receipt(
            external_id=owned.external_id,
            user_id=credential.user_id,
            purpose="authenticate",
            passkey_id=credential.id,
            credential_id=credential.credential_id,
            origin=verified.origin,
            user_present=verified.user_present,
            user_verified=verified.user_verified,
            backup_eligible=verified.backup_eligible,
            backed_up=verified.backed_up,
            backup_changed=recorded.backup_changed,
            counter_regressed=recorded.counter_regressed,
            attestation=credential.attestation_trust,
            authenticator_name_claimed=ceremony.authenticator_name(credential.aaguid),
            at=now,
        )
        return await self._put_nonce(app, receipt, pending.transaction)

    async def _refuse_authentication(
        self, app: RelyingParty, pending: PendingAuthentication, owned: Owned | None, refusal: CeremonyRefused
    ) -> NoReturn:
        """Tell of the refusal, where it concerns somebody, and raise it as what the caller may learn."""
        # Without a transaction anybody can have answers refused, so only what a genuine passkey signed is worth an event.
        if pending.user_id is not None or refusal.reason in _SIGNED:
            await self._tell_refusal(
                app,
                "passkey.used",
                refusal,
                owned.credential.user_id if owned else pending.user_id,
                owned.credential.id if owned else None,
            )
        if pending.transaction is None:
            raise DiscoverableRefused(reason=refusal.reason, signal=refusal.signal) from refusal
        raise refusal

    # -- redeem ---------------------------------------------------------------------------------------------------------------

    async def redeem(
        self,
        app: RelyingParty,
        nonce: str,
        *,
        purpose: Purpose | None = None,
        transaction_id: str | None = None,
        external_id: str | None = None,
    ) -> Receipt:
        """Exchange a nonce for its receipt, once. What the caller states must match; a mismatch spends the nonce.

        Redeeming a registration's nonce confirms the passkey (`Credential.confirmed_at`).

        Raises:
            UnknownNonce: unknown, expired, redeemed, of another app, or not what the caller expects: all alike.
            Unavailable: the nonce may be spent.
        """
        async with _retry_from("backend"):
            found = await self._ephemeral.take_nonce(app.id, nonce) if well_formed(nonce, "nonce") else None
            if found is None:
                self._metrics.redemptions.labels("unknown").inc()
                raise UnknownNonce(reason="nonce_unknown")
            receipt, now = found.receipt, self._clock()
            life = found.expires_at - receipt.at
            self._metrics.redemption_age.observe(min(1.0, max(0.0, (now - receipt.at) / life)))
            if (
                (purpose is not None and purpose != receipt.purpose)
                or (external_id is not None and external_id != receipt.external_id)
                or (
                    transaction_id is not None
                    and digest("transaction", app.id, transaction_id) != found.transaction
                )
            ):
                self._metrics.redemptions.labels("mismatch").inc()
                raise UnknownNonce(reason="nonce_mismatch")
            if receipt.purpose == "register":
                await self._durable.confirm_credential(app.id, receipt.passkey_id, instant(now))
            self._metrics.redemptions.labels("ok").inc()
            return receipt

    # -- shared steps ---------------------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        return instant(self._clock())

    async def _peek(
        self, app: RelyingParty, transaction_id: str, purpose: Purpose
    ) -> tuple[bytes, Transaction]:
        if not well_formed(transaction_id, "transaction"):
            raise UnknownTransaction(reason="transaction_malformed")
        found = await self._ephemeral.peek_transaction(app.id, transaction_id)
        if found is None:
            raise UnknownTransaction(reason="transaction_unknown")
        if found[1].purpose != purpose:
            raise UnknownTransaction(reason="transaction_wrong_kind")
        return found

    async def _take_pending(
        self, app: RelyingParty, handle: str, transaction_id: str | None, kind: type[P]
    ) -> P:
        """Take the pending ceremony, before any cryptography. Its own transaction is meant where `transaction_id` is None."""
        async with _retry_from("page"):
            pending = (
                await self._ephemeral.take_pending(app.id, handle) if well_formed(handle, "handle") else None
            )
        if pending is None:
            raise UnknownTransaction(reason="handle_unknown")
        if not isinstance(pending, kind):
            raise UnknownTransaction(reason="handle_wrong_kind")
        if (
            transaction_id is not None
            and digest("transaction", app.id, transaction_id) != pending.transaction
        ):
            raise UnknownTransaction(reason="other_transaction")
        return pending

    async def _take_transaction(self, name: bytes) -> None:
        """Take the transaction, before any durable write: one transaction, one success."""
        if await self._ephemeral.take_transaction(name) is None:
            raise UnknownTransaction(reason="transaction_spent")

    async def _nobody_has(self, app: RelyingParty, credential_id: bytes) -> bool:
        """Whether it is proved that nobody of the RP ID has this credential; a store that can't tell proves nothing.

        Of the RP ID, not of the app: the signal reaches an authenticator, which knows no apps, and two apps may share an RP ID.
        """
        try:
            return not await self._durable.held(app.rp_id, credential_id)
        except Unavailable:
            return False

    async def _put_nonce(self, app: RelyingParty, receipt: Receipt, transaction: bytes | None) -> str:
        nonce = self._mint.token("nonce")
        await self._ephemeral.put_nonce(
            app.id, nonce, Redeemable(receipt, transaction, receipt.at + app.policy.nonce_life)
        )
        return nonce

    async def _tell_refusal(
        self,
        app: RelyingParty,
        action: str,
        refusal: Refusal,
        user_id: str | None,
        passkey_id: str | None = None,
    ) -> None:
        """Write the event of a refused ceremony. The refusal stands also when the event can't be written; a metric counts that."""
        try:
            await self._durable.tell(
                app.id,
                action,
                result="refused",
                reason=refusal.reason,
                user_id=user_id,
                passkey_id=passkey_id,
                now=self._now(),
            )
        except Unavailable:
            self._metrics.events_lost.inc()

    @asynccontextmanager
    async def _counted(self, kind: str) -> AsyncIterator[_Counted]:
        """Count a finish by its result; an unavailable store without a place to start again means: from the page."""
        counted = _Counted(kind)
        try:
            async with _retry_from("page"):
                yield counted
        except Unavailable:
            self._metrics.ceremonies.labels(counted.kind, "finish", "unavailable").inc()
            raise
        except Refusal:
            self._metrics.ceremonies.labels(counted.kind, "finish", "refused").inc()
            raise
        self._metrics.ceremonies.labels(counted.kind, "finish", "ok").inc()


@dataclass(slots=True)
class _Counted:
    kind: str


@asynccontextmanager
async def _retry_from(place: Retry) -> AsyncIterator[None]:
    """An unavailable store inside means: start again at `place`. The innermost place counts."""
    try:
        yield
    except Unavailable as fault:
        fault.retry = fault.retry or place
        raise


def _as_strict_as(app: RelyingParty, pending: P) -> P:
    """A pending ceremony that asks for user verification if the policy does by now: a policy made stricter applies at once."""
    if app.policy.user_verification == "required":
        return replace(pending, user_verification="required")
    return pending


def _checked(value: str, name: str) -> None:
    """1 to 256 characters, none of them NUL (Postgres can't hold it, and C readers end there)."""
    if not value:
        raise InvalidRequest(f"{name} is empty; it has 1 to {MAX_TEXT} characters.")
    if len(value) > MAX_TEXT:
        raise InvalidRequest(f"{name} has {len(value)} characters; {MAX_TEXT} are allowed.")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidRequest(
            f"{name} has a character that can't be stored (NUL or half of a surrogate pair)."
        )
