"""How ceremonies begin, whoever asks for them: with a transaction, discoverable, or of a user whom
a keyed caller names.

Who may answer is looked up here and nowhere later: the pending ceremony, or the transaction that it
belongs to, carries it. What is to be refused is refused before anything is written, so a refused
begin leaves an earlier pending ceremony alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from broker import ceremony
from broker.durable import Durable, instant
from broker.ephemeral import Ephemeral, Unknown
from broker.errors import (
    DuplicateApproval,
    NoPasskeys,
    TooManyPasskeys,
    UnknownTransaction,
    UnknownUser,
)
from broker.model import (
    MAX_REFUSALS,
    AllowedCredential,
    Approval,
    Attachment,
    BegunCeremony,
    CeremonyOptions,
    Credential,
    FinishKind,
    Opener,
    PendingAuthentication,
    PendingRegistration,
    RelyingParty,
    Transaction,
    finish_kind,
    validate_text,
)
from broker.tokens import Mint, digest, well_formed

Kinds = tuple[FinishKind, ...]  # of a transaction that the caller's wire has a word for
_CARRIED = 8


class Begins:
    """The steps up to the options, on the two stores."""

    def __init__(
        self,
        *,
        ephemeral: Ephemeral,
        durable: Durable,
        clock: Callable[[], float],
        mint: Mint,
    ) -> None:
        self._ephemeral = ephemeral
        self._durable = durable
        self._clock = clock
        self._mint = mint

    async def ensure_user(self, app: RelyingParty, external_id: str) -> tuple[str, str]:
        """Id and handle of the user, who is made if the app has none with this external id."""
        return await self._durable.users.ensure(
            app.id,
            external_id,
            new_id=self._mint.id(),
            new_handle=self._mint.user_handle(),
            now=instant(self._clock()),
        )

    def nobody(self) -> tuple[str, str]:
        """Id and handle of a new user without an external id, who is stored with the passkey that
        nobody owns yet.
        """
        return self._mint.id(), self._mint.user_handle()

    async def user_to_sign_in(
        self, app: RelyingParty, external_id: str, asked: CeremonyOptions
    ) -> tuple[str, list[AllowedCredential]]:
        """Id and live passkeys of a user who has one that may answer; second factors are among them
        if asked for.
        """
        validate_text(external_id, "external_id")
        found = await self._durable.ceremonies.allowed(
            app.id, external_id, second_factor=asked.second_factor
        )
        if found is None:
            raise UnknownUser
        user_id, held = found
        offered = held if asked.allow is None else [o for o in held if o.id in asked.allow]
        if not offered:
            raise NoPasskeys
        return user_id, offered

    async def offered(self, app: RelyingParty, asked: CeremonyOptions) -> list[Credential]:
        """The live passkeys asked for, whoever owns them.

        Raises:
            NoPasskeys: none is left; an empty list would ask for any passkey.
        """
        found = await self._durable.credentials.by_ids(app.id, asked.allow or ())
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
    ) -> Sequence[Credential] | Sequence[AllowedCredential]:
        """What a transaction offers that doesn't carry it: its user's passkeys, those asked for, or
        any (an empty list).

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

    async def begin_registration(
        self,
        app: RelyingParty,
        transaction_id: str,
        attachment: Attachment | None,
        opener: Opener,
        kinds: Kinds,
    ) -> tuple[str, Transaction, dict[str, Any]]:
        """Begin the registration of a transaction: the handle, the transaction, the options. What
        may be refused comes before the earlier pending ceremony is replaced."""
        name = _name(app, transaction_id)
        found = await self._ephemeral.transactions.peek(name)
        if found is None:
            raise await self._unknown(name)
        transaction = found
        _judge_kind(transaction, kinds)
        assert transaction.user_id is not None, (
            "a registration has a user, also where nobody owns it"
        )
        pending, options = await self.new_registration(
            app,
            user=(transaction.user_id, transaction.external_id, transaction.user_handle),
            names=(transaction.user_name, transaction.user_display_name, transaction.nickname),
            bound=(name, transaction.expires_at),
            attachment=attachment,
            asked=transaction.asked,
        )
        beginning = BegunCeremony(
            pending.challenge,
            pending.begun_at,
            app.policy.ceremony_life,
            app.policy.verifications,
            app.policy.algorithms,
            attachment=pending.attachment,
        )
        handle, _ = await self._begin(app, name, opener, kinds, beginning)
        return handle, transaction, options

    async def begin_authentication(
        self, app: RelyingParty, transaction_id: str, opener: Opener, kinds: Kinds
    ) -> tuple[str, Transaction, dict[str, Any]]:
        """Begin the authentication of a transaction: the handle, the transaction, the options. One
        round trip, unless the transaction does not carry who may answer."""
        now, name = self._clock(), _name(app, transaction_id)
        beginning = BegunCeremony(
            self._mint.challenge(), now, app.policy.ceremony_life, app.policy.verifications
        )
        handle, transaction = await self._begin(app, name, opener, kinds, beginning)
        offered: Sequence[Credential] | Sequence[AllowedCredential] = transaction.offered
        if transaction.to_look_up:
            offered = await self.offered_again(app, transaction)
            beginning = beginning._replace(allowed=tuple(c.id for c in offered))
            handle, transaction = await self._begin(app, name, opener, kinds, beginning)
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
        self,
        app: RelyingParty,
        name: bytes,
        opener: Opener,
        kinds: Kinds,
        beginning: BegunCeremony,
    ) -> tuple[str, Transaction]:
        """The handle and the transaction. The handle finds nothing where the passkeys are to be
        looked up first."""
        secret = self._mint.token("handle")
        found = await self._ephemeral.ceremonies.begin(
            app.id, name, opener, kinds, secret, beginning
        )
        if not isinstance(found, Unknown):
            return found
        if found.value is None:
            raise await self._unknown(name)
        _judge_kind(found.value, kinds)
        return secret, found.value

    async def _unknown(self, name: bytes) -> UnknownTransaction:
        """The refusal of a transaction that is not there; its reason tells whether refused finishes
        ended it.
        """
        ended = await self._ephemeral.transactions.refusals(name) >= MAX_REFUSALS
        return UnknownTransaction(reason="too_many_refusals" if ended else "transaction_unknown")

    async def new_registration(
        self,
        app: RelyingParty,
        *,
        user: tuple[str, str | None, str],
        names: tuple[str, str, str],
        bound: tuple[bytes, float] | None,
        attachment: Attachment | None,
        asked: CeremonyOptions,
    ) -> tuple[PendingRegistration, dict[str, Any]]:
        """A pending ceremony and its options. `bound`: the transaction and its end, which the
        ceremony doesn't outlive.
        """
        user_id, external_id, user_handle = user
        user_name, user_display_name, nickname = names
        held = await self._durable.ceremonies.excluded(app.id, user_id, now=instant(self._clock()))
        if len(held) >= app.policy.max_passkeys:
            raise TooManyPasskeys(limit=app.policy.max_passkeys, count=len(held))
        # A passkey that was never confirmed is not excluded: the authenticator shall be able to
        # replace it.
        exclude = {c.credential_id: c.transports for c in held if c.live}
        if asked.exclude:
            others = await self._durable.credentials.by_ids(app.id, asked.exclude)
            exclude |= {
                o.credential.credential_id: o.credential.transports
                for o in others
                if o.credential.live
            }
        if (
            asked.second_factor
            and attachment is None
            and app.policy.second_factor_attachment != "any"
        ):
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
            attachment=attachment,
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
            discoverable=pending.discoverable,
        )

    def new_authentication(
        self,
        app: RelyingParty,
        user: tuple[str | None, str | None],
        offered: Sequence[Credential] | Sequence[AllowedCredential],
        asked: CeremonyOptions,
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
            offered=inlined(offered),
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

    async def record(self, app: RelyingParty, user_id: str, approval: Approval) -> None:
        """Write down what a user is asked to approve."""
        if not await self._durable.approvals.add(
            app.id, user_id, approval, new_id=self._mint.id(), now=instant(self._clock())
        ):
            raise DuplicateApproval


def _name(app: RelyingParty, transaction_id: str) -> bytes:
    """The digest of a transaction's id."""
    if not well_formed(transaction_id, "transaction"):
        raise UnknownTransaction(reason="transaction_malformed")
    return digest("transaction", app.id, transaction_id)


def _judge_kind(transaction: Transaction, kinds: Kinds) -> None:
    kind = finish_kind(transaction.purpose, second_factor=transaction.asked.second_factor)
    if kind not in kinds:
        other = transaction.purpose not in kinds
        raise UnknownTransaction(reason="transaction_wrong_kind" if other else "second_factor")


def inlined(
    offered: Sequence[Credential] | Sequence[AllowedCredential],
) -> tuple[AllowedCredential, ...]:
    """The passkeys that a one-time value carries: of a named user, and few enough for their bytes
    to be worth the look-up they save.
    """
    few = [o for o in offered if isinstance(o, AllowedCredential)]
    return tuple(few) if len(few) <= _CARRIED else ()


def without_lists(asked: CeremonyOptions) -> CeremonyOptions:
    """What was asked, for a pending ceremony: its lists are done with, and long."""
    return (
        asked
        if asked.allow is None and asked.exclude is None
        else asked._replace(allow=None, exclude=None)
    )
