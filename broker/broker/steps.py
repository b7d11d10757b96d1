"""Steps that both ceremonies share: open a transaction, put a pending ceremony at begin, take it at
finish, count and tell a refusal.

A step that takes is one atomic script, and everything after it fails closed. `retry_from` notes on
an unavailable store where the person starts again. Steps that judge get the pending ceremony as it
was taken, so no answer is judged twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from broker import ceremony
from broker.durable import Durable, instant
from broker.ephemeral import Ephemeral, Taken, Unknown
from broker.errors import Refusal, Retry, Signal, Unavailable, UnknownTransaction
from broker.model import (
    MAX_REFUSALS,
    OWNERLESS_HINT,
    AllowedCredential,
    Anyone,
    AuthenticationAnswer,
    BegunCeremony,
    ByChallenge,
    ByHandle,
    ByTransaction,
    ByUser,
    Caller,
    Credential,
    ExpectedCeremony,
    FinishKind,
    FinishLink,
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
    handle where finish needs one.
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
        metrics: Metrics,
        clock: Callable[[], float],
        mint: Mint,
    ) -> None:
        self._ephemeral = ephemeral
        self._durable = durable
        self._signing = signing
        self._metrics = metrics
        self._clock = clock
        self._mint = mint

    # -- begin -------------------------------------------------------------------------------------

    async def put_transaction(self, app: RelyingParty, transaction: Transaction) -> str:
        """Store a transaction, which lives as long as the policy says; its id."""
        transaction_id = self._mint.token("transaction")
        ends = self._clock() + app.policy.transaction_life
        await self._ephemeral.transactions.put(
            transaction_id, transaction._replace(expires_at=ends)
        )
        return transaction_id

    async def cancel(self, app: RelyingParty, transaction_id: str) -> None:
        """End a transaction and its pending ceremony; an event if it lived."""
        if not well_formed(transaction_id, "transaction"):
            return
        name = digest("transaction", app.id, transaction_id)
        transaction = await self._ephemeral.transactions.take(name)
        if transaction is not None:
            await self._tell(app, "transaction.cancelled", user_id_of(transaction.subject))

    async def _peek(
        self, app: RelyingParty, link: ByTransaction, purpose: Purpose
    ) -> tuple[bytes, Transaction]:
        """The digest of a transaction's id, and the transaction, if its kind is expected."""
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
        """Store the pending ceremony of a transaction, in place of its earlier one: the handle, the
        digest of the transaction's id, and the transaction. While its credentials must be queried
        the handle finds nothing.
        """
        name, secret = _transaction_name(app, link), self._mint.token("handle")
        kinds = kinds_of(purpose, link.second_factor)
        found = await self._ephemeral.ceremonies.begin(app.id, name, opener, kinds, secret, begun)
        if not isinstance(found, Unknown):
            handle, transaction = found
            return handle, name, transaction
        return secret, name, await self._expected(found.value, name, kinds)

    async def _expected(
        self, transaction: Transaction | None, name: bytes, kinds: tuple[FinishKind, ...]
    ) -> Transaction:
        """The transaction, if there is one and its kind is expected.

        Raises:
            UnknownTransaction: `reason` tells the operator what was wrong.
        """
        if transaction is None:
            ended = await self._ephemeral.transactions.refusals(name) >= MAX_REFUSALS
            raise UnknownTransaction(reason="too_many_refusals" if ended else "transaction_unknown")
        if transaction.kind not in kinds:
            other = transaction.purpose not in kinds
            raise UnknownTransaction(reason="transaction_wrong_kind" if other else "second_factor")
        return transaction

    async def _put_alone(
        self, caller: Caller, link: ByUser | ByChallenge | Anyone, opener: Opener, pending: Pending
    ) -> str | None:
        """Store a pending ceremony that has no transaction; its handle where that finds it. The cap
        of the app's open ceremonies counts those of anonymous callers.
        """
        cap = None if caller.key_id else caller.app.policy.discoverable_limit
        # The lists are done with, and long.
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
        app: RelyingParty,
        link: FinishLink,
        answer: RegistrationAnswer | AuthenticationAnswer,
        expect: ExpectedCeremony,
        type_: type[P],
    ) -> P:
        """Take the pending ceremony, before any cryptography.

        Raises:
            InvalidRequest; UnknownTransaction: no such ceremony, or not what the finish expects.
        """
        purpose = _PURPOSES[type_]
        kinds = kinds_of(purpose, expect.second_factor, approved=expect.approval)
        kind: FinishKind = purpose
        by: FoundBy
        match link:
            case ByHandle(token):
                by, unknown = "handle", UnknownTransaction(reason="handle_unknown")
                if not well_formed(token, "handle"):
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
            raise unknown
        name = expect.transaction_id
        if name is not None and digest("transaction", app.id, name) != pending.transaction:
            await self._count_refusal(pending)
            raise UnknownTransaction(reason="other_transaction")
        return _reapply_policy(app, pending)

    async def _take_transaction(self, name: bytes | None) -> None:
        """Take the transaction, if there is one, before any durable write: one transaction, one
        success.
        """
        if name is not None and await self._ephemeral.transactions.take(name) is None:
            raise UnknownTransaction(reason="transaction_spent")

    # -- refusals ----------------------------------------------------------------------------------

    async def _count_refusal(self, pending: Pending) -> bool:
        """Count a refused finish of the ceremony's transaction, if it has one; the last that it may
        have ends it. False for refusals beyond the last, which are no events. A refusal stands also
        when it can't be counted.
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
        """The signal that no user of the RP ID has this credential, where that is proved; a store
        that can't tell proves nothing.

        Of the RP ID, not of the app: the signal reaches an authenticator, which knows no apps, and
        two apps may share an RP ID.
        """
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

        Without a named user any caller can have answers refused: an event is worth only what a
        genuine passkey signed.
        """
        named = isinstance(pending.subject, Named)
        if named or refusal.reason in _SIGNED:
            await self._tell(
                app,
                action_of(pending),
                credential.user_id if credential else user_id_of(pending.subject),
                refusal.reason,
                credential.id if credential else None,
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
        """Write an event, of a refusal if it has a reason. What was decided stands also when the
        event can't be written; a metric counts that.
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


@contextmanager
def retry_from(place: Retry) -> Iterator[None]:
    """Note on an unavailable store inside: start again at `place`. The innermost place counts."""
    try:
        yield
    except Unavailable as fault:
        fault.retry = fault.retry or place
        raise


def user_id_of(subject: Subject) -> str | None:
    """The id of a named user."""
    return subject.user_id if isinstance(subject, Named) else None


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
    """The kinds of ceremony of this purpose; with `second_factor` None those of either factor."""
    factors = (False, True) if second_factor is None else (second_factor,)
    return tuple([finish_kind(purpose, second_factor=f, approved=approved) for f in factors])


def _reapply_policy(app: RelyingParty, pending: P) -> P:
    """The pending ceremony as strict as one that begins now: a stricter policy is effective at
    once. It asks for no less user verification, and takes an unowned passkey only where the policy
    still does.
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
