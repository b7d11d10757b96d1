"""How ceremonies finish: take, judge, take, write; whoever asked for them.

A step that takes is one atomic command, and everything after it fails closed: `retry_from` writes
on the refusal where the person starts again. Steps that judge take the pending ceremony as it was
taken, so there is no way to judge an answer that could come again. A refusal that concerns somebody
is told as an event, where the store can write it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, NoReturn, TypeVar

from broker import ceremony
from broker.durable import Durable, instant
from broker.ephemeral import Answer, Ephemeral, Taken, Unknown
from broker.errors import (
    CeremonyRefused,
    DiscoverableRefused,
    Refusal,
    Retry,
    Signal,
    TooManyPasskeys,
    Unavailable,
    UnknownTransaction,
    policy_hint,
)
from broker.model import (
    LONGEST_NONCE,
    MAX_REFUSALS,
    OWNERLESS_HINT,
    AllowedCredential,
    AuthenticationAnswer,
    Credential,
    FinishKind,
    Opener,
    Pending,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    Receipt,
    Redeemable,
    RegistrationAnswer,
    RelyingParty,
    SignInOutcome,
    VerifiedAuthentication,
    action_of,
    base64url,
    is_weaker,
    validate_text,
)
from broker.telemetry import Metrics
from broker.tokens import Mint, digest, well_formed

_SIGNED = frozenset({"counter", "revoked_or_counter"})  # refused after the signature was verified
_NOT_ADDED = {
    "duplicate": "This passkey can't be added; use another device or security key.",
    "no_user": "This registration has ended; start again.",
    "too_many_passkeys": TooManyPasskeys.default,
}
# The reason of a refusal: the ceremony is there, but another dialect or another kind of finish ends
# it.
_OTHER_FINISH = "other_finish"
P = TypeVar("P", PendingRegistration, PendingAuthentication)
_PURPOSES: dict[type[Pending], Purpose] = {
    PendingRegistration: "register",
    PendingAuthentication: "authenticate",
}


class SignedIn(NamedTuple):
    """A sign-in that was judged and recorded: by which passkey, whose it is (an external id; None
    for nobody's), and when.
    """

    pending: PendingAuthentication
    credential: Credential | AllowedCredential
    external_id: str | None
    verified: VerifiedAuthentication
    recorded: SignInOutcome
    at: float

    def receipt(self) -> Receipt:
        """What it proves."""
        pending, credential, external_id, verified, recorded, at = self
        return Receipt(
            external_id=external_id or credential.id,
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
            second_factor=pending.asked.second_factor,
            approval=pending.approval,
            at=at,
            ownerless=external_id is None,
        )


class Finishes:
    """The steps from the answer to the nonce or the receipt, on the two stores."""

    def __init__(
        self,
        *,
        ephemeral: Ephemeral,
        durable: Durable,
        metrics: Metrics,
        clock: Callable[[], float],
        mint: Mint,
    ) -> None:
        self._ephemeral = ephemeral
        self._durable = durable
        self._metrics = metrics
        self._clock = clock
        self._mint = mint

    async def take_pending(
        self,
        app: RelyingParty,
        handle: str,
        transaction_id: str | None,
        opener: Opener,
        kind: type[P],
    ) -> P:
        """Take the pending ceremony, before any cryptography. Its own transaction is meant where
        `transaction_id` is None.
        """
        if not well_formed(handle, "handle"):
            raise UnknownTransaction(reason="handle_unknown")
        with retry_from("page"):
            found = await self._ephemeral.ceremonies.take(
                "handle", app.id, handle, (opener,), _PURPOSES[kind]
            )
            pending = _taken(found, kind, UnknownTransaction(reason="handle_unknown"))
        if (
            transaction_id is not None
            and digest("transaction", app.id, transaction_id) != pending.transaction
        ):
            await self._count_refusal(pending)
            raise UnknownTransaction(reason="other_transaction")
        return reapply_policy(app, pending)

    async def take_pending_of(
        self, app: RelyingParty, external_id: str, opener: Opener, kind: type[P]
    ) -> P:
        """Take the user's pending ceremony, before any cryptography."""
        validate_text(external_id, "external_id")
        found = await self._ephemeral.ceremonies.take(
            "user", app.id, external_id, (opener,), _PURPOSES[kind]
        )
        unknown = UnknownTransaction(
            "There is no begun ceremony of this user, or it is expired or already used; begin again.",
            reason="user_has_no_ceremony",
        )
        return reapply_policy(app, _taken(found, kind, unknown))

    async def take_pending_by_challenge(
        self,
        app: RelyingParty,
        challenge: bytes,
        openers: tuple[Opener, ...],
        kind: FinishKind,
        expected: type[P],
    ) -> P:
        """Take the pending ceremony with this challenge, before any cryptography."""
        found = await self._ephemeral.ceremonies.take(
            "challenge", app.id, base64url(challenge), openers, kind
        )
        unknown = UnknownTransaction(
            hint="There is no begun ceremony with this challenge, or it is expired or already used; begin again.",
            reason="challenge_unknown",
        )
        return reapply_policy(app, _taken(found, expected, unknown))

    async def registered(
        self,
        app: RelyingParty,
        pending: PendingRegistration,
        answer: RegistrationAnswer,
        *,
        confirmed: bool,
    ) -> Receipt:
        """Judge the answer to a pending ceremony that was taken, take its transaction if it has
        one, store the credential.
        """
        signal = Signal(app.rp_id, answer.credential_id)
        try:
            verified = ceremony.finish_registration(pending, app, answer)
        except CeremonyRefused as refusal:
            # The device made this passkey and it will never be stored: the page may tell the device
            # so. Unless it was stored by an earlier ceremony, whose answer came again: then
            # somebody signs in with it.
            if await self._nobody_has(app, answer.credential_id):
                refusal.signal = signal
            if await self._count_refusal(pending):
                await self._tell_refused_registration(app, pending, refusal)
            raise
        with retry_from("backend"):
            await self._take_transaction(pending.transaction)
            now = self._clock()
            passkey_id = self._mint.id()
            outcome = await self._durable.ceremonies.add(
                pending,
                verified,
                new_id=passkey_id,
                live=confirmed or app.policy.live_at == "finish",
                confirmed=confirmed,
                max_passkeys=app.policy.max_passkeys,
                now=instant(now),
            )
        if outcome != "added":
            # No signal for a duplicate: somebody signs in with that passkey.
            refused = CeremonyRefused(
                _NOT_ADDED[outcome],
                reason=outcome,
                hint=TooManyPasskeys.default_hint if outcome == "too_many_passkeys" else None,
                signal=signal if outcome != "duplicate" else None,
            )
            await self._tell_refused_registration(app, pending, refused)
            raise refused
        return Receipt(
            external_id=pending.external_id or passkey_id,
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
            second_factor=pending.asked.second_factor,
            approval=None,
            at=now,
            ownerless=pending.external_id is None,
        )

    async def authenticated(
        self, app: RelyingParty, pending: PendingAuthentication, answer: AuthenticationAnswer
    ) -> SignedIn:
        """Judge the answer to a pending ceremony that was taken, take its transaction if it has
        one, record the sign-in.
        """
        credential: Credential | AllowedCredential | None = None
        for offered in pending.offered:
            if offered.credential_id == answer.credential_id:
                credential = offered
                break
        external_id = pending.external_id
        try:
            if credential is None:
                credential, external_id = await self._owned(app, pending, answer)
            verified = ceremony.finish_authentication(pending, app, credential, answer)
        except CeremonyRefused as refusal:
            told = await self._count_refusal(pending)
            await self._refuse_authentication(app, pending, credential, refusal, told=told)
        with retry_from(
            "page" if pending.user_id is None and pending.transaction is None else "backend"
        ):
            await self._take_transaction(pending.transaction)
            now = self._clock()
            recorded = await self._durable.ceremonies.use(
                credential,
                verified,
                flag_counter=app.policy.counter == "flag",
                action=action_of(pending),
                approval=pending.approval,
                now=instant(now),
            )
        if recorded is None:
            gone = await self._nobody_has(app, answer.credential_id)
            signal = Signal(app.rp_id, answer.credential_id) if gone else None
            refused = CeremonyRefused(
                reason="revoked_or_counter",
                signal=signal,
                hint="The passkey was revoked meanwhile, or its counter went back. "
                + policy_hint("counter", "flag"),
            )
            await self._refuse_authentication(app, pending, credential, refused, told=True)
        return SignedIn(pending, credential, external_id, verified, recorded, now)

    async def _owned(
        self, app: RelyingParty, pending: PendingAuthentication, answer: AuthenticationAnswer
    ) -> tuple[Credential, str | None]:
        """The answering passkey, where it was not read before, and its owner's external id."""
        owned = await self._durable.credentials.find(app.id, credential_id=answer.credential_id)
        if owned is None:
            unknown = await self._nobody_has(app, answer.credential_id)
            raise CeremonyRefused(
                reason="unknown_credential",
                signal=Signal(app.rp_id, answer.credential_id) if unknown else None,
            )
        if not owned.credential.live:
            raise CeremonyRefused(
                reason="not_live",
                hint="The registration's nonce was not redeemed. "
                + policy_hint("live_at", "finish"),
            )
        if owned.credential.second_factor and not pending.asked.second_factor:
            raise CeremonyRefused(reason="second_factor")
        if owned.external_id is None and not pending.asked.ownerless:
            raise CeremonyRefused(reason="ownerless", hint=OWNERLESS_HINT)
        return owned.credential, owned.external_id

    async def _count_refusal(self, pending: Pending) -> bool:
        """Count a refused finish of the ceremony's transaction, if it has one, and end the
        transaction with the last that it may have. False for those beyond, which were in flight
        then: they are no events. A refusal stands also when it can't be counted."""
        if pending.transaction is None:
            return True
        try:
            refusals = await self._ephemeral.transactions.count_refusal(pending.transaction)
            if refusals >= MAX_REFUSALS:
                await self._ephemeral.transactions.take(pending.transaction)
        except Unavailable:
            return True
        return refusals <= MAX_REFUSALS

    async def _take_transaction(self, name: bytes | None) -> None:
        """Take the transaction, if there is one, before any durable write: one transaction, one
        success.
        """
        if name is not None and not await self._ephemeral.transactions.take(name):
            raise UnknownTransaction(reason="transaction_spent")

    async def put_nonce(
        self,
        app: RelyingParty,
        receipt: Receipt,
        transaction: bytes | None,
        life: int | None = None,
    ) -> str:
        """A nonce for the receipt; `life` in seconds, the policy's if not given, 10 minutes at
        most.
        """
        nonce = self._mint.token("nonce")
        ends = receipt.at + min(life or app.policy.nonce_life, LONGEST_NONCE)
        await self._ephemeral.nonces.put(app.id, nonce, Redeemable(receipt, transaction, ends))
        return nonce

    async def _nobody_has(self, app: RelyingParty, credential_id: bytes) -> bool:
        """Whether it is proved that nobody of the RP ID has this credential; a store that can't
        tell proves nothing.

        Of the RP ID, not of the app: the signal reaches an authenticator, which knows no apps, and
        two apps may share an RP ID.
        """
        try:
            return not await self._durable.credentials.exists(app.rp_id, credential_id)
        except Unavailable:
            return False

    async def _refuse_authentication(
        self,
        app: RelyingParty,
        pending: PendingAuthentication,
        credential: Credential | AllowedCredential | None,
        refusal: CeremonyRefused,
        *,
        told: bool,
    ) -> NoReturn:
        """Tell of the refusal, where it concerns somebody and `told` is true, and raise it as what
        the caller may learn.
        """
        # Where nobody was named anybody can have answers refused, so only what a genuine passkey
        # signed is worth an event.
        if told and (pending.user_id is not None or refusal.reason in _SIGNED):
            await self._tell_refusal(
                app,
                action_of(pending),
                refusal,
                credential.user_id if credential else pending.user_id,
                credential.id if credential else None,
            )
        if pending.user_id is None:
            raise DiscoverableRefused(
                reason=refusal.reason, signal=refusal.signal, hint=refusal.hint
            ) from refusal
        raise refusal

    async def _tell_refused_registration(
        self, app: RelyingParty, pending: PendingRegistration, refusal: CeremonyRefused
    ) -> None:
        # As with sign-ins: where nobody was named anybody can have answers refused.
        if pending.external_id is not None:
            await self._tell_refusal(app, action_of(pending), refusal, pending.user_id)

    async def _tell_refusal(
        self,
        app: RelyingParty,
        action: str,
        refusal: Refusal,
        user_id: str | None,
        passkey_id: str | None = None,
    ) -> None:
        """Write the event of a refused ceremony. The refusal stands also when the event can't be
        written; a metric counts that.
        """
        try:
            await self._durable.events.add(
                app.id,
                action,
                result="refused",
                reason=refusal.reason,
                user_id=user_id,
                passkey_id=passkey_id,
                now=instant(self._clock()),
            )
        except Unavailable:
            self._metrics.events_lost.inc()

    def counted(self, kind: str, place: Retry) -> Counted:
        """Count a finish by its result; an unavailable store without another place to start again
        means: from `place`.
        """
        return Counted(self._metrics, kind, place)


class retry_from:
    """`with retry_from(place):` an unavailable store inside means: start again at `place`. The
    innermost place counts.
    """

    __slots__ = ("_place",)

    def __init__(self, place: Retry) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(fault, Unavailable):
            fault.retry = fault.retry or self._place


class Counted:
    """Counts a finish of a `kind`, which may be known better once it has begun, by its result."""

    __slots__ = ("_metrics", "_place", "kind")

    def __init__(self, metrics: Metrics, kind: str, place: Retry) -> None:
        self._metrics = metrics
        self._place = place
        self.kind = kind

    def __enter__(self) -> Counted:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if fault is None:
            result = "ok"
        elif isinstance(fault, Unavailable):
            fault.retry = fault.retry or self._place
            result = "unavailable"
        elif isinstance(fault, Refusal):
            result = "refused"
        else:
            return
        self._metrics.ceremonies.inc(self.kind, "finish", result)


def _taken(answer: Answer[Pending], kind: type[P], unknown: UnknownTransaction) -> P:
    """The pending ceremony that was taken; else `unknown` is raised, with the reason for the
    operator.
    """
    if isinstance(answer, Taken) and isinstance(answer.value, kind):
        return answer.value
    if isinstance(answer, Unknown) and answer.reason in ("foreign", "other_kind"):
        unknown.reason = _OTHER_FINISH
    raise unknown


def kind_of(pending: PendingAuthentication) -> str:
    return "discoverable" if pending.user_id is None else "authenticate"


def reapply_policy(app: RelyingParty, pending: P) -> P:
    """A pending ceremony that asks for as much user verification as it would if it began now, and
    lets what nobody owns in only if it still would: a policy made stricter applies at once."""
    if not app.policy.ownerless_registration:
        by_a_page = pending.transaction is None
        if isinstance(pending, PendingRegistration) and pending.external_id is None and by_a_page:
            raise UnknownTransaction(reason="not_open", hint=OWNERLESS_HINT)
        if pending.asked.ownerless:
            pending = pending._replace(asked=pending.asked._replace(ownerless=False))
    now = app.policy.verification(pending.asked)
    return (
        pending._replace(user_verification=now)
        if is_weaker(pending.user_verification, now)
        else pending
    )
