"""Steps that both ceremonies share: open a transaction, put a pending ceremony at begin, take it at
finish, count a refused finish and write its event.

A step that takes is one atomic script, and every later failure fails closed. `retry_from` records
on an unavailable store from where the person starts again. The steps that verify an answer get the
taken ceremony as an argument, so no answer is verified twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from broker import ceremony
from broker.broker.decoys import Decoys
from broker.broker.limited_events import LimitedEvents
from broker.durable import Durable, instant
from broker.ephemeral import TERM_OVER, Ephemeral, Taken, Unknown
from broker.errors import (
    InvalidRequest,
    Refusal,
    Retry,
    Signal,
    Unavailable,
    UnknownTransaction,
    policy_hint,
)
from broker.model import (
    MAX_REFUSALS,
    OWNERLESS_HINT,
    AllowedCredential,
    Anyone,
    AuthenticationAnswer,
    BeginLink,
    BegunCeremony,
    ByChallenge,
    ByHandle,
    ByTransaction,
    ByUser,
    Caller,
    CeremonyOptions,
    Credential,
    ExpectedCeremony,
    FinishKind,
    FinishLink,
    Idempotency,
    Mediation,
    Named,
    Opener,
    Pending,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    RegistrationAnswer,
    RelyingParty,
    Subject,
    Transaction,
    Unowned,
    action_of,
    base64url,
    finish_kind,
    finish_kind_of,
    is_weaker,
    validate_text,
)
from broker.signing import Signing
from broker.telemetry import Metrics
from broker.tokens import FoundBy, Mint, digest, well_formed

P = TypeVar("P", PendingRegistration, PendingAuthentication)
_PURPOSES: dict[type[Pending], Purpose] = {
    PendingRegistration: "register",
    PendingAuthentication: "authenticate",
}
_OTHER_FINISH = (Unknown("foreign"), Unknown("other_kind"))
_SIGNED = frozenset({"counter", "revoked_or_counter"})  # refused after the signature was verified
_BEGIN_AGAIN = "There is no begun ceremony {}, or it is expired or already used; begin again."


class Begun(NamedTuple):
    """A begun ceremony: the JSON for `publicKey` of `navigator.credentials`, the mediation, and the
    handle, if finish needs a handle.
    """

    handle: str | None
    public_key: dict[str, Any]
    mediation: Mediation = "required"


class Steps:
    """The shared steps. `clock` gives seconds since the epoch, `mint` is the source of chance."""

    def __init__(
        self,
        ephemeral: Ephemeral,
        durable: Durable,
        signing: Signing,
        decoys: Decoys,
        metrics: Metrics,
        clock: Callable[[], float],
        mint: Mint,
    ) -> None:
        self._ephemeral = ephemeral
        self._durable = durable
        self._signing = signing
        self._decoys = decoys
        self._metrics = metrics
        self._clock = clock
        self._mint = mint
        self._refusals = LimitedEvents(self._tell)

    async def close(self) -> None:
        """Write the events that the rate limit counted."""
        await self._refusals.close()

    # -- begin -------------------------------------------------------------------------------------

    async def earlier_answer(self, idempotency: Idempotency | None) -> str | None:
        """The id of the transaction that the same request opened before.

        Raises:
            IdempotencyConflict: another request had this key.
        """
        return None if idempotency is None else await self._ephemeral.open_answers.find(idempotency)

    async def put_transaction(
        self, app: RelyingParty, transaction: Transaction, idempotency: Idempotency | None = None
    ) -> str:
        """Store a transaction for the policy's `transaction_life`. Returns the transaction's id; if
        the same request has opened another one meanwhile, the id of that, and this one expires.
        """
        transaction_id = self._mint.token("transaction")
        ends = self._clock() + app.policy.transaction_life
        await self._ephemeral.transactions.put(
            transaction_id, transaction._replace(expires_at=ends)
        )
        if idempotency is None:
            return transaction_id
        return await self._ephemeral.open_answers.keep(idempotency, transaction_id)

    async def cancel(self, app: RelyingParty, transaction_id: str) -> None:
        """End a transaction and its pending ceremony. A live transaction gives an event."""
        if not well_formed(transaction_id, "transaction"):
            return
        name = digest("transaction", app.id, transaction_id)
        found = await self._ephemeral.transactions.take(name)
        if isinstance(found, Taken):
            await self._tell(app, "transaction.cancelled", user_id_of(found.value.subject))

    async def _peek(
        self, app: RelyingParty, link: ByTransaction, purpose: Purpose
    ) -> tuple[bytes, Transaction]:
        """Peek at a transaction of the expected kind: the digest of its id, and the transaction."""
        name = _transaction_name(app, link)
        found = await self._ephemeral.transactions.peek(name)
        return name, await self._expected(found, name, kinds_of(purpose, link.second_factor))

    async def _put_beside(
        self,
        app: RelyingParty,
        link: ByTransaction,
        purpose: Purpose,
        opener: Opener,
        begun: BegunCeremony,
    ) -> tuple[str, bytes, Transaction]:
        """Store the pending ceremony of a transaction, in place of its earlier ceremony.

        Returns the handle, the digest of the transaction's id, and the transaction. If the
        transaction's credentials must be queried, nothing is stored under the handle.
        """
        name, secret = _transaction_name(app, link), self._mint.token("handle")
        kinds = kinds_of(purpose, link.second_factor)
        found = await self._ephemeral.ceremonies.begin(app.id, name, opener, kinds, secret, begun)
        if not isinstance(found, Unknown):
            handle, transaction = found
            return handle, name, transaction
        return secret, name, await self._expected(found.value or found, name, kinds)

    async def _expected(
        self, transaction: Transaction | Unknown, name: bytes, kinds: tuple[FinishKind, ...]
    ) -> Transaction:
        """The transaction, if it exists and has an expected kind.

        Raises:
            UnknownTransaction: `reason` tells the operator the cause.
        """
        if transaction == TERM_OVER:
            raise UnknownTransaction(reason="term_over")
        if isinstance(transaction, Unknown):
            ended = await self._ephemeral.transactions.refusals(name) >= MAX_REFUSALS
            raise UnknownTransaction(reason="too_many_refusals" if ended else "transaction_unknown")
        if transaction.kind not in kinds:
            other = transaction.purpose not in kinds
            raise UnknownTransaction(reason="transaction_wrong_kind" if other else "second_factor")
        return transaction

    async def _put_alone(
        self, caller: Caller, link: ByUser | ByChallenge | Anyone, opener: Opener, pending: Pending
    ) -> str | None:
        """Store a pending ceremony that has no transaction. Returns the handle, if finish finds the
        ceremony by handle. The app's cap of open ceremonies counts those of anonymous callers.
        """
        cap = None
        if caller.key_id is None:
            require_binding(caller.app, pending.options)
            cap = caller.app.policy.discoverable_limit
        # Finish needs neither list, and both may be long.
        pending = pending._replace(options=pending.options._replace(allow=None, exclude=None))
        put = self._ephemeral.ceremonies.put
        match link:
            case ByUser(external_id):
                await put("user", external_id, pending, opener=opener)
            case ByChallenge():
                challenge = base64url(pending.challenge)
                await put("challenge", challenge, pending, opener=opener, cap=cap)
            case _:
                handle = self._mint.token("handle")
                await put("handle", handle, pending, opener=opener, cap=cap)
                return handle
        return None

    # -- finish ------------------------------------------------------------------------------------

    async def take(
        self,
        caller: Caller,
        link: FinishLink,
        answer: RegistrationAnswer | AuthenticationAnswer,
        expect: ExpectedCeremony,
        type_: type[P],
    ) -> P:
        """Take the pending ceremony, before any cryptography.

        Raises:
            InvalidRequest; UnknownTransaction: no such ceremony, or not of the expected kind;
                TooManyRequests.
        """
        app, rate_limits = caller.app, self._ephemeral.rate_limits
        rate_limits.finish(caller)
        purpose = _PURPOSES[type_]
        kinds = kinds_of(purpose, expect.second_factor, approved=expect.approval)
        kind: FinishKind = purpose
        by: FoundBy
        match link:
            case ByHandle(token):
                by, unknown = "handle", UnknownTransaction(reason="handle_unknown")
                if not well_formed(token, "handle"):
                    rate_limits.unknown_finish(caller)
                    raise unknown
            case ByUser(token):
                validate_text(token, "external_id")
                sentence = _BEGIN_AGAIN.format("of this user")
                by, unknown = "user", UnknownTransaction(sentence, reason="user_has_no_ceremony")
            case ByChallenge():
                token = base64url(ceremony.challenge_of(answer.client_data_json))
                hint = _BEGIN_AGAIN.format("with this challenge")
                by, unknown = "challenge", UnknownTransaction(hint=hint, reason="challenge_unknown")
                kind = kinds[0]
        found = await self._ephemeral.ceremonies.take(by, app.id, token, expect.openers, kind)
        pending = found.value if isinstance(found, Taken) else None
        if not isinstance(pending, type_) or finish_kind_of(pending) not in kinds:
            if pending is not None or found in _OTHER_FINISH:
                unknown.reason = "other_finish"
            elif found == TERM_OVER:
                unknown.reason = "term_over"
            rate_limits.unknown_finish(caller)
            raise unknown
        name = expect.transaction_id
        if name is not None and digest("transaction", app.id, name) != pending.transaction:
            await self._count_refusal(pending)
            raise UnknownTransaction(reason="other_transaction")
        return _reapply_policy(app, pending)

    async def _take_transaction(self, name: bytes | None) -> None:
        """Take the ceremony's transaction, if any, before any durable write: one transaction gives
        one success.
        """
        if name is None:
            return
        found = await self._ephemeral.transactions.take(name)
        if not isinstance(found, Taken):
            raise UnknownTransaction(
                reason="term_over" if found == TERM_OVER else "transaction_spent"
            )

    # -- refusals ----------------------------------------------------------------------------------

    async def _count_refusal(self, pending: Pending) -> bool:
        """Count a refused finish of the ceremony's transaction, if any. The last permitted refusal
        ends the transaction. False: a refusal beyond the last, which is no event. A refusal stands
        even if it can't be counted.
        """
        name = pending.transaction
        if name is None:
            return True
        try:
            refusals = await self._ephemeral.transactions.count_refusal(name)
            if refusals >= MAX_REFUSALS:
                await self._ephemeral.transactions.take(name)
        except Unavailable:
            return True
        return refusals <= MAX_REFUSALS

    async def _orphan(self, app: RelyingParty, credential_id: bytes) -> Signal | None:
        """The signal that no user of the RP ID has this credential. None: a user has it, it is a
        decoy, or the store is unavailable.

        The query covers the RP ID, not the app: authenticators know no apps, and two apps may share
        an RP ID.
        """
        if self._decoys.has(app.rp_id, credential_id):
            return None
        try:
            held = await self._durable.credentials.exists(app.rp_id, credential_id)
        except Unavailable:
            return None
        return None if held else Signal(app.rp_id, credential_id)

    async def _tell_refusal(
        self,
        app: RelyingParty,
        pending: Pending,
        refusal: Refusal,
        credential: Credential | AllowedCredential | None = None,
    ) -> None:
        """Write the event of a refused finish.

        Without a named user any caller can produce refusals. Such a refusal is an event only if a
        genuine passkey signed the answer.
        """
        named = isinstance(pending.subject, Named)
        if named or refusal.reason in _SIGNED:
            await self._refusals.add(
                app,
                action_of(pending),
                refusal.reason,
                user_id=credential.user_id if credential else user_id_of(pending.subject),
                passkey_id=credential.id if credential else None,
            )

    async def _tell(
        self,
        app: RelyingParty,
        action: str,
        user_id: str | None,
        reason: str | None = None,
        passkey_id: str | None = None,
        payload: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an event; with a reason, an event of a refusal. The decision stands even if the
        event can't be written; a metric counts lost events.
        """
        try:
            await self._durable.events.add(
                app.id,
                action,
                result="refused" if reason else "done",
                reason=reason,
                user_id=user_id,
                passkey_id=passkey_id,
                payload=payload,
                now=instant(self._clock()),
            )
        except Unavailable:
            self._metrics.events_lost.inc()


def require_binding(app: RelyingParty, options: CeremonyOptions) -> None:
    """Refuse a ceremony whose nonce would lack the binding that the policy requires.

    Raises:
        InvalidRequest.
    """
    if app.policy.binding_required and options.binding_challenge is None:
        raise InvalidRequest(
            "binding_challenge is missing; this app requires one.",
            reason="binding_missing",
            hint=policy_hint("binding_required", "false"),
        )


@contextmanager
def retry_from(place: Retry) -> Iterator[None]:
    """Set `retry` of an `Unavailable` raised inside, unless an inner block has set it."""
    try:
        yield
    except Unavailable as fault:
        fault.retry = fault.retry or place
        raise


def user_id_of(subject: Subject) -> str | None:
    """The id of a named user."""
    return subject.user_id if isinstance(subject, Named) else None


def is_discoverable(link: BeginLink) -> bool:
    """True if a begin names no transaction and no user."""
    return isinstance(link, Anyone) or (
        isinstance(link, ByChallenge) and isinstance(link.external_id, Anyone)
    )


def _transaction_name(app: RelyingParty, link: ByTransaction) -> bytes:
    """The digest of a transaction's id.

    Raises:
        UnknownTransaction: malformed.
    """
    if not well_formed(link.transaction_id, "transaction"):
        raise UnknownTransaction(reason="transaction_malformed")
    return digest("transaction", app.id, link.transaction_id)


def kinds_of(
    purpose: Purpose, second_factor: bool | None, *, approved: bool = False
) -> tuple[FinishKind, ...]:
    """The kinds of ceremony of a purpose; `second_factor` None gives those of both factors."""
    factors = (False, True) if second_factor is None else (second_factor,)
    return tuple([finish_kind(purpose, second_factor=f, approved=approved) for f in factors])


def _reapply_policy(app: RelyingParty, pending: P) -> P:
    """Apply the current policy to a pending ceremony, so that a stricter policy is effective at
    once. User verification is never lowered. An unowned passkey needs a policy that still allows
    it.
    """
    if not app.policy.ownerless_registration:
        by_page = pending.transaction is None
        if (
            isinstance(pending, PendingRegistration)
            and by_page
            and isinstance(pending.subject, Unowned)
        ):
            raise UnknownTransaction(reason="not_open", hint=OWNERLESS_HINT)
        if pending.options.unowned:
            pending = pending._replace(options=pending.options._replace(unowned=False))
    now = app.policy.verification(pending.options)
    return (
        pending._replace(user_verification=now)
        if is_weaker(pending.user_verification, now)
        else pending
    )
