"""Authentication: look up the passkeys that may answer, begin, judge the answer, record it.

The passkeys of a named user are looked up once, at open or at a begin without a transaction. The
one-time value carries them, so finish needs no read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from broker import ceremony
from broker.broker.steps import Begun, Steps, retry_from
from broker.durable import instant
from broker.errors import (
    CeremonyRefused,
    DiscoverableRefused,
    DuplicateApproval,
    InvalidRequest,
    NoPasskeys,
    Retry,
    UnknownTransaction,
    UnknownUser,
    UserDisabled,
    policy_hint,
)
from broker.model import (
    ANYONE,
    OWNERLESS_HINT,
    AllowedCredential,
    Anyone,
    Approval,
    AuthenticationAnswer,
    BeginLink,
    BegunCeremony,
    ByTransaction,
    Caller,
    CeremonyOptions,
    Credential,
    Named,
    Opener,
    PendingAuthentication,
    Receipt,
    RelyingParty,
    Subject,
    Transaction,
    Unowned,
    action_of,
    epoch_of,
    validate_text,
)

_INLINED = 8  # passkeys of a user; with more, their bytes cost more than the look-up that they save

Allowed = Sequence[Credential] | Sequence[AllowedCredential]


class Authentication(Steps):
    """The steps of an authentication."""

    async def permit(
        self,
        app: RelyingParty,
        external_id: str | Anyone,
        options: CeremonyOptions,
        *,
        approves: bool = False,
    ) -> tuple[Transaction, Allowed]:
        """A transaction for one authentication, not stored, and the passkeys that may answer: the
        user's, or those of `options.allow`; an empty list allows any. Where the policy says so, a
        user who has none gets decoys, unless the ceremony is about an approval, a second factor or
        given passkeys.

        Raises:
            InvalidRequest, UnknownUser, UserDisabled, Unavailable; NoPasskeys: no live passkey is
                left.
        """
        subject: Named | Anyone = ANYONE
        inlined: tuple[AllowedCredential, ...] = ()
        allowed: Allowed = ()
        if external_id is not ANYONE:
            validate_text(external_id, "external_id")
            found = await self._durable.ceremonies.allowed(
                app.id, external_id, second_factor=options.second_factor
            )
            mine: Sequence[AllowedCredential] = ()
            if found is not None:
                user_id, epoch, disabled, held = found
                if disabled:
                    raise UserDisabled
                subject = Named(user_id, external_id, epoch)
                mine = [c for c in held if options.allow is None or c.id in options.allow]
            is_hidden = options.allow is None and not options.second_factor and not approves
            if not mine and app.policy.decoys and is_hidden:
                mine = self._decoys.of(app, external_id, found.user_id if found else "")
                subject = subject if found else Named(mine[0].user_id, external_id, 0)
            elif found is None:
                raise UnknownUser
            allowed, inlined = mine, tuple(mine) if len(mine) <= _INLINED else ()
        elif options.allow is not None:
            allowed = [
                owned.credential
                for owned in await self._durable.credentials.by_ids(app.id, options.allow)
                if owned.credential.live
                and not owned.disabled
                and (options.second_factor or not owned.credential.second_factor)
                and (options.unowned or owned.external_id is not None)
            ]
        if not allowed and (subject is not ANYONE or options.allow is not None):
            raise NoPasskeys
        return Transaction(
            app.id, "authenticate", subject, None, inlined, options, math.inf
        ), allowed

    async def begin(
        self,
        caller: Caller,
        link: BeginLink,
        opener: Opener,
        options: CeremonyOptions,
        approval: Approval | None,
    ) -> Begun:
        """Put the pending ceremony: of a transaction in one round trip, unless its passkeys must be
        queried first; else of a transaction that is not stored.
        """
        app, policy, challenge = caller.app, caller.app.policy, self._mint.challenge()
        begun = BegunCeremony(challenge, self._clock(), policy.ceremony_life, policy.verifications)
        handle: str | None
        allowed: Allowed
        if isinstance(link, ByTransaction):
            handle, name, transaction = await self._put_beside(
                app, link, "authenticate", opener, begun
            )
            allowed = transaction.offered
            if transaction.to_look_up:
                allowed = await self._look_up(app, transaction)
                begun = begun._replace(allowed=tuple([c.id for c in allowed]))
                handle, name, transaction = await self._put_beside(
                    app, link, "authenticate", opener, begun
                )
            pending = begun.authentication(name, transaction)
        else:
            if isinstance(link, Anyone):
                if options.allow == ():
                    raise InvalidRequest(
                        "The list of passkeys is empty, so none could answer.", reason="empty_field"
                    )
                transaction, allowed = await self.permit(app, ANYONE, options._replace(allow=None))
                # Not listed in the options: a page by itself learns nothing of credentials.
                ids = options.allow or ()
            else:
                transaction, allowed = await self.permit(
                    app, link.external_id, options, approves=approval is not None
                )
                ids = tuple([c.id for c in allowed])
            begun = begun._replace(allowed=ids)
            if approval is not None:
                begun = begun._replace(
                    challenge=challenge + approval.digest, approval=approval.identifier
                )
            pending = begun.authentication(None, transaction)
            handle = await self._put_alone(caller, link, opener, pending)
            if approval is not None and isinstance(pending.subject, Named):
                await self._record_approval(app, pending.subject, approval)
        public_key = ceremony.begin_authentication(
            app,
            challenge=pending.challenge,
            allow=[(c.credential_id, c.transports) for c in allowed],
            life=pending.expires_at - pending.begun_at,
            user_verification=pending.user_verification,
        )
        self._metrics.ceremonies.inc(metric_of(pending), "begin", "ok")
        return Begun(handle, public_key, pending.options.mediation)

    async def _look_up(self, app: RelyingParty, transaction: Transaction) -> Allowed:
        """The passkeys that may answer, of a transaction that does not carry them."""
        subject = transaction.subject
        external_id = subject.external_id if isinstance(subject, Named) else ANYONE
        try:
            now, allowed = await self.permit(app, external_id, transaction.options)
        except (UnknownUser, UserDisabled, NoPasskeys):
            raise UnknownTransaction(reason="no_passkey_left") from None
        if now.subject != subject:
            raise UnknownTransaction(reason="epoch_over")
        return allowed

    async def _record_approval(self, app: RelyingParty, user: Named, approval: Approval) -> None:
        """Record what a user is asked to approve.

        After the pending ceremony, so that a store that fails leaves the identifier unused. Where
        this refuses, that ceremony expires: its challenge was given to no caller.
        """
        new_id, now = self._mint.id(), instant(self._clock())
        if not await self._durable.approvals.add(
            app.id, user.user_id, approval, new_id=new_id, now=now
        ):
            raise DuplicateApproval

    async def record(
        self, app: RelyingParty, pending: PendingAuthentication, answer: AuthenticationAnswer
    ) -> Receipt:
        """Judge the answer, take the transaction if there is one, record the sign-in."""
        credential: Credential | AllowedCredential | None = None
        owner: Subject = pending.subject
        for offered in pending.offered:
            if offered.credential_id == answer.credential_id:
                credential = offered
                break
        try:
            if credential is None:
                credential, found = await self._owned(app, pending, answer)
                # The epoch of a named user is the one in which the ceremony was permitted.
                owner = found if owner is ANYONE else owner
            verified = ceremony.finish_authentication(pending, app, credential, answer)
        except CeremonyRefused as refusal:
            if await self._count_refusal(pending):
                await self._tell_refusal(app, pending, refusal, credential)
            raise _shown(refusal, pending) from None
        with retry_from(restart_of(pending)):
            await self._take_transaction(pending.transaction)
            now = self._clock()
            outcome = await self._durable.ceremonies.use(
                credential,
                verified,
                epoch=epoch_of(owner),
                flag_counter=app.policy.counter == "flag",
                action=action_of(pending),
                approval=pending.approval,
                now=instant(now),
            )
        if outcome is None:
            refused = CeremonyRefused(
                reason="revoked_or_counter",
                signal=await self._orphan(app, answer.credential_id),
                hint="The passkey was revoked, its user disabled, or its counter went back. "
                + policy_hint("counter", "flag"),
            )
            await self._tell_refusal(app, pending, refused, credential)
            raise _shown(refused, pending)
        assert not isinstance(owner, Anyone)
        return Receipt(
            subject=owner,
            purpose="authenticate",
            passkey_id=credential.id,
            credential_id=credential.credential_id,
            origin=verified.origin,
            user_present=verified.user_present,
            user_verified=verified.user_verified,
            backup_eligible=verified.backup_eligible,
            backed_up=verified.backed_up,
            backup_changed=outcome.backup_changed,
            counter_regressed=outcome.counter_regressed,
            attestation=credential.attestation_trust,
            authenticator_name_claimed=ceremony.authenticator_name(credential.aaguid),
            second_factor=pending.options.second_factor,
            approval=pending.approval,
            at=now,
        )

    async def _owned(
        self, app: RelyingParty, pending: PendingAuthentication, answer: AuthenticationAnswer
    ) -> tuple[Credential | AllowedCredential, Named | Unowned]:
        """The answering passkey and its owner, where they were not read before."""
        owned = await self._durable.credentials.find(app.id, credential_id=answer.credential_id)
        if owned is None and (decoy := self._decoys.find(app, answer.credential_id)):
            return decoy, Named(decoy.user_id, "", 0)
        if owned is None:
            signal = await self._orphan(app, answer.credential_id)
            raise CeremonyRefused(reason="unknown_credential", signal=signal)
        credential, external_id = owned.credential, owned.external_id
        if owned.disabled:
            raise CeremonyRefused(reason="user_disabled")
        if not credential.live:
            raise CeremonyRefused(
                reason="not_live",
                hint="The registration's nonce was not redeemed. "
                + policy_hint("live_at", "finish"),
            )
        if credential.second_factor and not pending.options.second_factor:
            raise CeremonyRefused(reason="second_factor")
        if external_id is not None:
            return credential, Named(credential.user_id, external_id, owned.epoch)
        if not pending.options.unowned:
            raise CeremonyRefused(reason="ownerless", hint=OWNERLESS_HINT)
        return credential, Unowned(credential.user_id)


def _shown(refusal: CeremonyRefused, pending: PendingAuthentication) -> CeremonyRefused:
    """The refusal as the caller may learn it: one code for every login without a named user."""
    if pending.subject is not ANYONE:
        return refusal
    return DiscoverableRefused(reason=refusal.reason, signal=refusal.signal, hint=refusal.hint)


def metric_of(pending: PendingAuthentication) -> str:
    """The ceremony's kind in metrics."""
    return "discoverable" if pending.subject is ANYONE else "authenticate"


def restart_of(pending: PendingAuthentication) -> Retry:
    """Where the person starts again after the transaction was taken."""
    alone = pending.transaction is None and pending.subject is ANYONE
    return "page" if alone else "backend"
