"""Registration: permit one, begin it, store the credential of a verified answer.

A begin refuses before it writes, so a refused begin leaves the earlier pending ceremony alone.
"""

from __future__ import annotations

import math

from broker import ceremony
from broker.broker.steps import Begun, Steps, retry_from
from broker.durable import ExcludedCredential, instant
from broker.errors import CeremonyRefused, Signal, TooManyPasskeys, UnknownTransaction
from broker.model import (
    ANYONE,
    Anyone,
    AttachmentPolicy,
    BeginLink,
    BegunCeremony,
    ByTransaction,
    Caller,
    CeremonyOptions,
    Named,
    Names,
    Opener,
    PendingRegistration,
    Receipt,
    RegistrationAnswer,
    RelyingParty,
    Transaction,
    Unowned,
    UserEntity,
    validate_text,
)

_NOT_ADDED = {
    "duplicate": "This passkey can't be added; use another device or security key.",
    **dict.fromkeys(("no_user", "epoch_over"), "This registration has ended; start again."),
    "too_many_passkeys": TooManyPasskeys.default,
}


class Registration(Steps):
    """The steps of a registration."""

    async def permit(
        self,
        app: RelyingParty,
        external_id: str | Anyone,
        names: Names,
        options: CeremonyOptions,
    ) -> Transaction:
        """A transaction for one registration, not stored. The user is made if the app has none with
        this external id. Without one the passkey's user is stored with the passkey.

        Raises:
            InvalidRequest, UserDisabled, Unavailable.
        """
        if names.nickname:
            validate_text(names.nickname, "nickname")
        validate_text(names.user_name, "user_name")
        validate_text(names.user_display_name, "user_display_name")
        user_id, handle = self._mint.id(), self._mint.user_handle()
        subject: Named | Unowned = Unowned(user_id)
        if external_id is not ANYONE:
            validate_text(external_id, "external_id")
            now = instant(self._clock())
            subject, handle = await self._durable.users.ensure(
                app.id, external_id, new_id=user_id, new_handle=handle, now=now
            )
        entity = UserEntity(handle, *names)
        return Transaction(app.id, "register", subject, entity, (), options, math.inf)

    async def begin(
        self,
        caller: Caller,
        link: BeginLink,
        opener: Opener,
        names: Names | None,
        attachment: AttachmentPolicy | None,
        options: CeremonyOptions,
    ) -> Begun:
        """Put the pending ceremony of a transaction, or of one that is not stored."""
        app, name = caller.app, None
        if isinstance(link, ByTransaction):
            name, transaction = await self._peek(app, link, "register")
        else:
            assert names is not None
            external_id = link if isinstance(link, Anyone) else link.external_id
            transaction = await self.permit(app, external_id, names, options)
        begun = self._begun(app, transaction.options, attachment)
        pending = begun.registration(name, transaction)
        exclude = await self._excluded(app, pending)
        handle: str | None
        if isinstance(link, ByTransaction):
            handle, _, _ = await self._put_beside(app, link, "register", opener, begun)
        else:
            handle = await self._put_alone(caller, link, opener, pending)
        public_key = ceremony.begin_registration(
            app,
            challenge=pending.challenge,
            user_handle=pending.entity.handle,
            user_name=pending.entity.user_name,
            user_display_name=pending.entity.user_display_name,
            exclude=exclude,
            life=pending.expires_at - pending.begun_at,
            attachment=pending.attachment,
            user_verification=pending.user_verification,
            discoverable=pending.discoverable,
        )
        return Begun(handle, public_key)

    def _begun(
        self, app: RelyingParty, options: CeremonyOptions, attachment: AttachmentPolicy | None
    ) -> BegunCeremony:
        """A ceremony that begins now; without an `attachment` the policy's is asked for."""
        policy = app.policy
        wanted = attachment or (
            policy.second_factor_attachment
            if options.second_factor
            else policy.authenticator_attachment
        )
        return BegunCeremony(
            self._mint.challenge(),
            self._clock(),
            policy.ceremony_life,
            policy.verifications,
            policy.algorithms,
            attachment=None if wanted == "any" else wanted,
        )

    async def _excluded(
        self, app: RelyingParty, pending: PendingRegistration
    ) -> list[tuple[bytes, tuple[str, ...]]]:
        """The credential ids and transports of the user's live passkeys, and of those that the
        caller excludes.

        Raises:
            TooManyPasskeys; UnknownTransaction: it is of an earlier epoch of the user.
        """
        held: list[ExcludedCredential] | None = []
        if isinstance(pending.subject, Named):
            user_id, _, epoch = pending.subject
            now = instant(self._clock())
            held = await self._durable.ceremonies.excluded(app.id, user_id, epoch, now=now)
        if held is None:
            raise UnknownTransaction(reason="epoch_over")
        if len(held) >= app.policy.max_passkeys:
            raise TooManyPasskeys(limit=app.policy.max_passkeys, count=len(held))
        # A passkey that was never confirmed is not excluded: its authenticator may replace it.
        found = {c.credential_id: c.transports for c in held if c.live}
        if pending.options.exclude:
            others = await self._durable.credentials.by_ids(app.id, pending.options.exclude)
            live = [owned.credential for owned in others if owned.credential.live]
            found |= {c.credential_id: c.transports for c in live}
        return list(found.items())

    async def record(
        self,
        app: RelyingParty,
        pending: PendingRegistration,
        answer: RegistrationAnswer,
        *,
        confirmed: bool,
    ) -> Receipt:
        """Judge the answer, take the transaction if there is one, store the credential."""
        try:
            verified = ceremony.finish_registration(pending, app, answer)
        except CeremonyRefused as refusal:
            # The authenticator made this passkey and it will never be stored, unless an earlier
            # ceremony stored it, whose answer came again.
            refusal.signal = await self._orphan(app, answer.credential_id)
            if await self._count_refusal(pending):
                await self._tell_refusal(app, pending, refusal)
            raise
        passkey_id = self._mint.id()
        with retry_from("backend"):
            await self._take_transaction(pending.transaction)
            now = self._clock()
            is_decoy = self._decoys.has(app.rp_id, verified.credential_id)
            outcome = (
                "duplicate"
                if is_decoy
                else await self._durable.ceremonies.add(
                    pending,
                    verified,
                    new_id=passkey_id,
                    live=confirmed or app.policy.live_at == "finish",
                    confirmed=confirmed,
                    max_passkeys=app.policy.max_passkeys,
                    now=instant(now),
                )
            )
        if outcome != "added":
            refused = CeremonyRefused(
                _NOT_ADDED[outcome],
                reason=outcome,
                hint=TooManyPasskeys.default_hint if outcome == "too_many_passkeys" else None,
                # A duplicate signs somebody in: no signal.
                signal=Signal(app.rp_id, answer.credential_id) if outcome != "duplicate" else None,
            )
            await self._tell_refusal(app, pending, refused)
            raise refused
        return Receipt(
            subject=pending.subject,
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
            second_factor=pending.options.second_factor,
            approval=None,
            at=now,
        )
