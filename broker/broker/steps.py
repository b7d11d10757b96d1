"""The steps that ceremonies are made of, whoever asks for them: with a transaction, discoverable, or of a user whom a keyed caller
names. `Broker` puts them together.

A step that takes is one atomic command, and everything after it fails closed: `retry_from` writes on the refusal where the person
starts again. Steps that judge take the pending ceremony as it was taken, so there is no way to judge an answer that could come again.
A refusal that concerns somebody is told as an event, where the store can write it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from broker import ceremony
from broker.durable import Durable, instant
from broker.ephemeral import Ephemeral
from broker.errors import (
    CeremonyRefused,
    DiscoverableRefused,
    DuplicateApproval,
    NoPasskeys,
    Refusal,
    Retry,
    Signal,
    TooManyPasskeys,
    Unavailable,
    UnknownTransaction,
    UnknownUser,
)
from broker.model import (
    Approval,
    Asked,
    Attachment,
    AuthenticationAnswer,
    Beginning,
    Credential,
    Offered,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    Receipt,
    Redeemable,
    RegistrationAnswer,
    RelyingParty,
    Transaction,
    action_of,
    checked,
    is_weaker,
)
from broker.telemetry import Metrics
from broker.tokens import Mint, digest, well_formed

_SIGNED = frozenset({"counter", "revoked_or_counter"})  # refused after the signature was verified
_LONGEST_NONCE = 600  # seconds
_CARRIED = 8
P = TypeVar("P", PendingRegistration, PendingAuthentication)


class Steps:
    """The steps, on the two stores."""

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

    async def ensure_user(self, app: RelyingParty, external_id: str) -> tuple[str, str]:
        """Id and handle of the user, who is made if the app has none with this external id."""
        return await self._durable.ensure_user(
            app.id,
            external_id,
            new_id=self._mint.id(),
            new_handle=self._mint.user_handle(),
            now=instant(self._clock()),
        )

    def nobody(self) -> tuple[str, str]:
        """Id and handle of a new user without an external id, who is stored with the passkey that nobody owns yet."""
        return self._mint.id(), self._mint.user_handle()

    async def user_to_sign_in(
        self, app: RelyingParty, external_id: str, asked: Asked
    ) -> tuple[str, list[Offered]]:
        """Id and live passkeys of a user who has one that may answer; second factors are among them if asked for."""
        checked(external_id, "external_id")
        found = await self._durable.user_to_sign_in(app.id, external_id, second_factor=asked.second_factor)
        if found is None:
            raise UnknownUser
        user_id, _, held = found
        offered = [o for o in held if asked.allow is None or o.id in asked.allow]
        if not offered:
            raise NoPasskeys
        return user_id, offered

    async def peek(
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

    async def begin_registration(
        self, app: RelyingParty, transaction_id: str, attachment: Attachment | None
    ) -> tuple[str, Transaction, dict[str, Any]]:
        """Begin the registration of a transaction: the handle, the transaction, the options. What may be refused comes before the earlier
        pending ceremony is replaced."""
        name, transaction = await self.peek(app, transaction_id, "register")
        assert transaction.user_id is not None, "a registration has a user, also where nobody owns it"
        pending, options = await self.new_registration(
            app,
            user=(transaction.user_id, transaction.external_id, transaction.user_handle),
            names=(transaction.user_name, transaction.user_display_name, transaction.nickname),
            bound=(name, transaction.expires_at),
            attachment=attachment,
            asked=transaction.asked,
        )
        beginning = Beginning(
            pending.challenge,
            pending.begun_at,
            app.policy.ceremony_life,
            app.policy.verifications,
            app.policy.algorithms,
        )
        handle, _, _ = await self._begin(app, transaction_id, "register", beginning)
        return handle, transaction, options

    async def begin_authentication(
        self, app: RelyingParty, transaction_id: str
    ) -> tuple[str, Transaction, dict[str, Any]]:
        """Begin the authentication of a transaction: the handle, the transaction, the options. One round trip, unless the transaction
        does not carry who may answer."""
        now = self._clock()
        beginning = Beginning(self._mint.challenge(), now, app.policy.ceremony_life, app.policy.verifications)
        handle, name, transaction = await self._begin(app, transaction_id, "authenticate", beginning)
        offered: Sequence[Credential] | Sequence[Offered] = transaction.offered
        if not offered and (transaction.external_id is not None or transaction.asked.allow is not None):
            offered = await self.offered_again(app, transaction)
            # Nobody has heard of the handle so far, so nothing can be finished with what is replaced here.
            beginning = beginning._replace(allowed=tuple(c.id for c in offered))
            handle, name, transaction = await self._begin(app, transaction_id, "authenticate", beginning)
        pending = beginning.pending(name, transaction)
        return (
            handle,
            transaction,
            ceremony.begin_authentication(
                app,
                challenge=pending.challenge,
                allow=[(c.credential_id, c.transports) for c in offered],
                life=pending.expires_at - now,
                user_verification=pending.user_verification,
            ),
        )

    async def _begin(
        self, app: RelyingParty, transaction_id: str, purpose: Purpose, beginning: Beginning
    ) -> tuple[str, bytes, Transaction]:
        if not well_formed(transaction_id, "transaction"):
            raise UnknownTransaction(reason="transaction_malformed")
        secret = self._mint.token("handle")
        found = await self._ephemeral.begin(app.id, transaction_id, purpose, secret, beginning)
        if found is None:
            raise UnknownTransaction(reason="transaction_unknown")
        if found[2].purpose != purpose:
            raise UnknownTransaction(reason="transaction_wrong_kind")
        return found

    async def take_pending(
        self, app: RelyingParty, handle: str, transaction_id: str | None, kind: type[P]
    ) -> P:
        """Take the pending ceremony, before any cryptography. Its own transaction is meant where `transaction_id` is None."""
        async with retry_from("page"):
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
        return as_strict_as(app, pending)

    async def take_pending_of(
        self, app: RelyingParty, purpose: Purpose, external_id: str, kind: type[P]
    ) -> P:
        """Take the user's pending ceremony, before any cryptography."""
        checked(external_id, "external_id")
        pending = await self._ephemeral.take_pending_as(app.id, pending_name(purpose, external_id))
        if not isinstance(pending, kind):
            raise UnknownTransaction(
                "There is no begun ceremony of this user, or it is expired or already used; begin again.",
                reason="user_has_no_ceremony",
            )
        return as_strict_as(app, pending)

    async def take_pending_by_challenge(
        self, app: RelyingParty, challenge: bytes, kind: type[P], *, second_factor: bool
    ) -> P:
        """Take the pending ceremony with this challenge, before any cryptography."""
        pending = await self._ephemeral.take_pending_by_challenge(app.id, challenge)
        if not isinstance(pending, kind) or pending.asked.second_factor != second_factor:
            raise UnknownTransaction(
                "There is no begun ceremony with this challenge, or it is expired or already used; begin again.",
                reason="challenge_unknown",
            )
        return as_strict_as(app, pending)

    async def offered(self, app: RelyingParty, asked: Asked) -> list[Credential]:
        """The live passkeys asked for, whoever owns them.

        Raises:
            NoPasskeys: none is left; an empty list would ask for any passkey.
        """
        found = await self._durable.owned_by_ids(app.id, asked.allow or ())
        offered = [
            o.credential
            for o in found
            if o.credential.live
            and (asked.second_factor or not o.credential.second_factor)
            and (asked.ownerless or o.external_id is not None)
        ]
        if not offered:
            raise NoPasskeys
        return offered

    async def offered_again(
        self, app: RelyingParty, transaction: Transaction
    ) -> Sequence[Credential] | Sequence[Offered]:
        """What a transaction offers that doesn't carry it: its user's passkeys, those asked for, or any (an empty list).

        Raises:
            UnknownTransaction: none is left of them.
        """
        asked = transaction.asked
        try:
            if transaction.external_id is not None:
                return (await self.user_to_sign_in(app, transaction.external_id, asked))[1]
            return await self.offered(app, asked) if asked.allow is not None else ()
        except (UnknownUser, NoPasskeys):
            raise UnknownTransaction(reason="no_passkey_left") from None

    async def record(self, app: RelyingParty, user_id: str, approval: Approval) -> None:
        """Write down what a user is asked to approve."""
        if not await self._durable.add_approval(
            app.id, user_id, approval, new_id=self._mint.id(), now=instant(self._clock())
        ):
            raise DuplicateApproval

    async def new_registration(
        self,
        app: RelyingParty,
        *,
        user: tuple[str, str | None, str],
        names: tuple[str, str, str],
        bound: tuple[bytes, float] | None,
        attachment: Attachment | None,
        asked: Asked,
    ) -> tuple[PendingRegistration, dict[str, Any]]:
        """A pending ceremony and its options. `bound`: the transaction and its end, which the ceremony doesn't outlive."""
        user_id, external_id, user_handle = user
        user_name, user_display_name, nickname = names
        held = await self._durable.credentials(app.id, user_id)
        if len(held) >= app.policy.max_passkeys:
            raise TooManyPasskeys(limit=app.policy.max_passkeys, count=len(held))
        # A passkey that was never confirmed is not excluded: the authenticator shall be able to replace it.
        exclude = {c.credential_id: c.transports for c in held if c.live}
        if asked.exclude:
            others = await self._durable.owned_by_ids(app.id, asked.exclude)
            exclude |= {o.credential.credential_id: o.credential.transports for o in others}
        if asked.second_factor and attachment is None and app.policy.second_factor_attachment != "any":
            attachment = app.policy.second_factor_attachment
        now = self._clock()
        ends = now + min(asked.life or app.policy.ceremony_life, app.policy.ceremony_life)
        pending = PendingRegistration(
            app_id=app.id,
            challenge=self._mint.challenge(),
            transaction=bound[0] if bound else None,
            user_id=user_id,
            external_id=external_id,
            user_handle=user_handle,
            user_name=user_name,
            user_display_name=user_display_name,
            nickname=nickname,
            asked=without_lists(asked),
            user_verification=app.policy.verification(asked),
            algorithms=app.policy.algorithms,
            begun_at=now,
            expires_at=min(ends, bound[1]) if bound else ends,
        )
        return pending, ceremony.begin_registration(
            app,
            challenge=pending.challenge,
            user_handle=user_handle,
            user_name=user_name,
            user_display_name=user_display_name,
            exclude=list(exclude.items()),
            life=pending.expires_at - now,
            attachment=attachment,
            user_verification=pending.user_verification,
            discoverable=not asked.second_factor,
        )

    def new_authentication(
        self,
        app: RelyingParty,
        user: tuple[str | None, str | None],
        offered: Sequence[Credential] | Sequence[Offered],
        asked: Asked,
        approval: Approval | None = None,
    ) -> tuple[PendingAuthentication, dict[str, Any]]:
        """A pending ceremony without a transaction, and its options."""
        now = self._clock()
        ends = now + min(asked.life or app.policy.ceremony_life, app.policy.ceremony_life)
        pending = PendingAuthentication(
            app_id=app.id,
            challenge=self._mint.challenge() + (approval.digest if approval else b""),
            transaction=None,
            user_id=user[0],
            external_id=user[1],
            allowed=tuple([c.id for c in offered]),
            offered=carried(offered),
            approval=approval.identifier if approval else None,
            asked=without_lists(asked),
            user_verification=app.policy.verification(asked),
            begun_at=now,
            expires_at=ends,
        )
        return pending, ceremony.begin_authentication(
            app,
            challenge=pending.challenge,
            allow=[(c.credential_id, c.transports) for c in offered],
            life=pending.expires_at - now,
            user_verification=pending.user_verification,
        )

    async def registered(
        self, app: RelyingParty, pending: PendingRegistration, answer: RegistrationAnswer, *, confirmed: bool
    ) -> Receipt:
        """Judge the answer to a pending ceremony that was taken, take its transaction if it has one, store the credential."""
        signal = Signal(app.rp_id, answer.credential_id)
        try:
            verified = ceremony.finish_registration(pending, app, answer)
        except CeremonyRefused as refusal:
            # The device made this passkey and it will never be stored: the page may tell the device so. Unless it was stored
            # by an earlier ceremony, whose answer came again: then somebody signs in with it.
            if await self._nobody_has(app, answer.credential_id):
                refusal.signal = signal
            await self._tell_refused_registration(app, pending, refusal)
            raise
        async with retry_from("backend"):
            await self._take_transaction(pending.transaction)
            now = self._clock()
            passkey_id = self._mint.id()
            outcome = await self._durable.add_credential(
                pending,
                verified,
                new_id=passkey_id,
                live=confirmed or app.policy.live_at == "finish",
                confirmed=confirmed,
                now=instant(now),
            )
        if outcome != "added":
            # No signal for a duplicate: somebody signs in with that passkey.
            refused = CeremonyRefused(
                "This passkey can't be added; use another authenticator.",
                reason=outcome,
                signal=signal if outcome == "no_user" else None,
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
    ) -> Receipt:
        """Judge the answer to a pending ceremony that was taken, take its transaction if it has one, record the sign-in."""
        credential: Credential | Offered | None = next(
            (o for o in pending.offered if o.credential_id == answer.credential_id), None
        )
        external_id = pending.external_id
        try:
            if credential is None:
                credential, external_id = await self._owned(app, pending, answer)
            verified = ceremony.finish_authentication(pending, app, credential, answer)
        except CeremonyRefused as refusal:
            await self._refuse_authentication(app, pending, credential, refusal)
        async with retry_from(
            "page" if pending.user_id is None and pending.transaction is None else "backend"
        ):
            await self._take_transaction(pending.transaction)
            now = self._clock()
            recorded = await self._durable.use_credential(
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
            refused = CeremonyRefused(reason="revoked_or_counter", signal=signal)
            await self._refuse_authentication(app, pending, credential, refused)
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
            at=now,
            ownerless=external_id is None,
        )

    async def _owned(
        self, app: RelyingParty, pending: PendingAuthentication, answer: AuthenticationAnswer
    ) -> tuple[Credential, str | None]:
        """The answering passkey, where it was not read before, and its owner's external id."""
        owned = await self._durable.owned(app.id, answer.credential_id)
        if owned is None:
            unknown = await self._nobody_has(app, answer.credential_id)
            raise CeremonyRefused(
                reason="unknown_credential",
                signal=Signal(app.rp_id, answer.credential_id) if unknown else None,
            )
        if not owned.credential.live:
            raise CeremonyRefused(reason="not_live")
        if owned.credential.second_factor and not pending.asked.second_factor:
            raise CeremonyRefused(reason="second_factor")
        if owned.external_id is None and not pending.asked.ownerless:
            raise CeremonyRefused(reason="ownerless")
        return owned.credential, owned.external_id

    async def _take_transaction(self, name: bytes | None) -> None:
        """Take the transaction, if there is one, before any durable write: one transaction, one success."""
        if name is not None and not await self._ephemeral.take_transaction(name):
            raise UnknownTransaction(reason="transaction_spent")

    async def put_nonce(
        self, app: RelyingParty, receipt: Receipt, transaction: bytes | None, life: int | None = None
    ) -> str:
        """A nonce for the receipt; `life` in seconds, the policy's if not given, 10 minutes at most."""
        nonce = self._mint.token("nonce")
        ends = receipt.at + min(life or app.policy.nonce_life, _LONGEST_NONCE)
        await self._ephemeral.put_nonce(app.id, nonce, Redeemable(receipt, transaction, ends))
        return nonce

    async def _nobody_has(self, app: RelyingParty, credential_id: bytes) -> bool:
        """Whether it is proved that nobody of the RP ID has this credential; a store that can't tell proves nothing.

        Of the RP ID, not of the app: the signal reaches an authenticator, which knows no apps, and two apps may share an RP ID.
        """
        try:
            return not await self._durable.held(app.rp_id, credential_id)
        except Unavailable:
            return False

    async def _refuse_authentication(
        self,
        app: RelyingParty,
        pending: PendingAuthentication,
        credential: Credential | Offered | None,
        refusal: CeremonyRefused,
    ) -> NoReturn:
        """Tell of the refusal, where it concerns somebody, and raise it as what the caller may learn."""
        # Where nobody was named anybody can have answers refused, so only what a genuine passkey signed is worth an event.
        if pending.user_id is not None or refusal.reason in _SIGNED:
            await self._tell_refusal(
                app,
                action_of(pending),
                refusal,
                credential.user_id if credential else pending.user_id,
                credential.id if credential else None,
            )
        if pending.user_id is None:
            raise DiscoverableRefused(reason=refusal.reason, signal=refusal.signal) from refusal
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
        """Write the event of a refused ceremony. The refusal stands also when the event can't be written; a metric counts that."""
        try:
            await self._durable.tell(
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

    @asynccontextmanager
    async def counted(self, kind: str, place: Retry) -> AsyncIterator[Counted]:
        """Count a finish by its result; an unavailable store without another place to start again means: from `place`."""
        counted = Counted(kind)
        try:
            async with retry_from(place):
                yield counted
        except Unavailable:
            self._metrics.ceremonies.inc(counted.kind, "finish", "unavailable")
            raise
        except Refusal:
            self._metrics.ceremonies.inc(counted.kind, "finish", "refused")
            raise
        self._metrics.ceremonies.inc(counted.kind, "finish", "ok")


@dataclass(slots=True)
class Counted:
    kind: str


def carried(offered: Sequence[Credential] | Sequence[Offered]) -> tuple[Offered, ...]:
    """The passkeys that a one-time value carries: of a named user, and few enough for their bytes to be worth the look-up they save."""
    few = [o for o in offered if isinstance(o, Offered)]
    return tuple(few) if len(few) <= _CARRIED else ()


def without_lists(asked: Asked) -> Asked:
    """What was asked, for a pending ceremony: its lists are done with, and long."""
    return (
        asked if asked.allow is None and asked.exclude is None else replace(asked, allow=None, exclude=None)
    )


def pending_name(purpose: Purpose, external_id: str) -> str:
    """The name of a user's one pending ceremony of this purpose."""
    return f"{purpose}:{external_id}"


def kind_of(pending: PendingAuthentication) -> str:
    return "discoverable" if pending.user_id is None else "authenticate"


@asynccontextmanager
async def retry_from(place: Retry) -> AsyncIterator[None]:
    """An unavailable store inside means: start again at `place`. The innermost place counts."""
    try:
        yield
    except Unavailable as fault:
        fault.retry = fault.retry or place
        raise


def as_strict_as(app: RelyingParty, pending: P) -> P:
    """A pending ceremony that asks for as much user verification as it would if it began now, and lets what nobody owns in only if it
    still would: a policy made stricter applies at once."""
    if not app.policy.passlock_open_registration:
        by_a_page = pending.transaction is None
        if isinstance(pending, PendingRegistration) and pending.external_id is None and by_a_page:
            raise UnknownTransaction(reason="not_open")
        if pending.asked.ownerless:
            pending = pending._replace(asked=replace(pending.asked, ownerless=False))
    now = app.policy.verification(pending.asked)
    return pending._replace(user_verification=now) if is_weaker(pending.user_verification, now) else pending
