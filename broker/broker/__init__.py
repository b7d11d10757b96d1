"""What the broker does, as verbs. Read this file first.

    open     a backend asks for permission for one ceremony of one of its users     -> transaction
             id
    begin    the page asks for a challenge                                          -> handle,
             options
    finish   the page brings the authenticator's answer                             -> nonce
    redeem   the backend exchanges the nonce                                        -> receipt

Transaction and nonce are bookends round one ceremony. A discoverable authentication has no
transaction. A keyed caller who carries the page's messages itself needs neither: `begin_…_of` and
`finish_…_of` name the user, whose pending ceremony of that purpose a new begin replaces, and finish
answers with the receipt. Both ways take the same steps.

**Order is the guarantee.** Begin only peeks at the transaction, for people cancel and try again.
Finish takes the pending ceremony before any cryptography, so an answer, right or wrong, is judged
once; it takes the transaction after the answer was verified and before anything durable is written,
so a transaction buys one success; then comes one durable write, and only then the nonce or the
receipt. Whatever fails after a take has spent what was taken: the person starts over, from the page
while the transaction stands, else from the backend (`Unavailable.retry` says which). Each take is
one atomic command of the ephemeral store, so this holds for any number of instances.

**Who may learn what.** Callers with a key may know of users. Callers without one get the same
refusal for unknown, expired, used, wrong-kind and foreign values; `Refusal.reason` tells the
operator which it was.

**A ceremony is finished by its opener.** `opener` (a dialect, with a key or without) is part of the
name under which a ceremony is stored, and so is its kind. The finish of another dialect, or of
another kind of ceremony, finds nothing and takes nothing.

**Nothing is read twice.** Who may sign in with which passkeys is looked up once, when a transaction
is opened (or a keyed ceremony begun), and travels with the one-time value: public keys, not
secrets. A passkey added since is not offered by that transaction; one that was revoked since is
refused by the write that records the sign-in. A login is two statements: that look-up, and that
write.

The steps that both ways share are in `broker.broker.begins` and `broker.broker.finishes`. Clock and
chance are arguments. The durable write, not what was read before it, decides about revocation,
counters and duplicates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from broker import ceremony
from broker.broker.begins import Begins, inlined
from broker.broker.finishes import Finishes, SignedIn, kind_of, retry_from
from broker.durable import Durable, instant
from broker.ephemeral import Ephemeral, Taken
from broker.errors import InvalidRequest, UnknownNonce
from broker.model import (
    NO_OPTIONS,
    AllowedCredential,
    Approval,
    Attachment,
    AuthenticationAnswer,
    CeremonyOptions,
    Credential,
    FinishKind,
    Mediation,
    Opener,
    PendingAuthentication,
    PendingRegistration,
    Proof,
    Purpose,
    Receipt,
    Redeemable,
    RegistrationAnswer,
    RelyingParty,
    Transaction,
    base64url,
    finish_kind,
    validate_text,
)
from broker.telemetry import Metrics
from broker.tokens import Mint, SystemMint, digest, well_formed

__all__ = ["Begun", "Broker"]


@dataclass(frozen=True, slots=True)
class Begun:
    """A begun ceremony: the handle for finish, and for `navigator.credentials` the JSON of
    `publicKey` and the mediation. `second_factor`: it is about one, so no login comes of it."""

    handle: str
    options: dict[str, Any]
    mediation: Mediation = "required"
    second_factor: bool = False


FoundBy = Literal["user", "challenge"]


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
        self._begins = Begins(ephemeral=ephemeral, durable=durable, clock=clock, mint=self._mint)
        self._finishes = Finishes(
            ephemeral=ephemeral, durable=durable, metrics=metrics, clock=clock, mint=self._mint
        )

    # -- open --------------------------------------------------------------------------------------

    async def open_registration(
        self,
        app: RelyingParty,
        external_id: str | None,
        display_name: str,
        *,
        user_name: str | None = None,
        asked: CeremonyOptions = NO_OPTIONS,
    ) -> str:
        """Permit one registration for a user, who is made if the app has none with this external
        id. Returns a transaction id.

        `user_name` (the display name, if not given) and `display_name` are what the authenticator
        shows. Without an external id the passkey has no owner and signs in only where ownerless
        ones may, until `Directory.assign` gives it one. The id is a bearer right to add a passkey
        until it is used or ends.

        Raises:
            InvalidRequest, Unavailable.
        """
        validate_text(display_name, "passkey_display_name")
        user_name = display_name if user_name is None else user_name
        validate_text(user_name, "user_name")
        if external_id is None:
            user_id, handle = self._begins.nobody()
        else:
            validate_text(external_id, "external_id")
            user_id, handle = await self._begins.ensure_user(app, external_id)
        names = (user_name, display_name, display_name)
        return await self._open(app, "register", (user_id, external_id, handle), names, (), asked)

    async def open_authentication(
        self, app: RelyingParty, external_id: str | None, *, asked: CeremonyOptions = NO_OPTIONS
    ) -> str:
        """Permit one authentication: of a user, or without an external id of whoever has a passkey
        that answers (one of `asked.allow`, if given). Returns a transaction id.

        Raises:
            InvalidRequest, UnknownUser, Unavailable; NoPasskeys: the user has none, or no live one
                is among those allowed.
        """
        user_id = None
        offered: list[AllowedCredential] = []
        if external_id is not None:
            user_id, offered = await self._begins.user_to_sign_in(app, external_id, asked)
        elif asked.allow is not None:
            await self._begins.offered(app, asked)
        user = (user_id, external_id, "")
        return await self._open(app, "authenticate", user, ("", "", ""), inlined(offered), asked)

    async def _open(
        self,
        app: RelyingParty,
        purpose: Purpose,
        user: tuple[str | None, str | None, str],
        names: tuple[str, str, str],
        offered: tuple[AllowedCredential, ...],
        asked: CeremonyOptions,
    ) -> str:
        transaction_id = self._mint.token("transaction")
        ends = self._clock() + app.policy.transaction_life
        await self._ephemeral.transactions.put(
            transaction_id, Transaction(app.id, purpose, *user, *names, offered, asked, ends)
        )
        return transaction_id

    # -- registration ------------------------------------------------------------------------------

    async def begin_registration(
        self,
        app: RelyingParty,
        transaction_id: str,
        attachment: Attachment | None,
        *,
        opener: Opener,
        second_factors: bool = True,
    ) -> Begun:
        """Begin a registration; replaces the transaction's earlier pending ceremony. Without
        `second_factors` a transaction of a second factor is unknown, and left as it is.

        Raises:
            UnknownTransaction, TooManyPasskeys, Unavailable.
        """
        handle, transaction, options = await self._begins.begin_registration(
            app, transaction_id, attachment, opener, _kinds("register", second_factors)
        )
        self._metrics.ceremonies.inc("register", "begin", "ok")
        return Begun(handle, options, second_factor=transaction.asked.second_factor)

    async def begin_registration_of_nobody(
        self,
        app: RelyingParty,
        user_name: str,
        display_name: str,
        attachment: Attachment | None,
        *,
        opener: Opener,
        asked: CeremonyOptions = NO_OPTIONS,
    ) -> Begun:
        """Begin a registration that a page asks for by itself, without a transaction, so the cap of
        open ceremonies counts it. The passkey has no owner and signs in only where ownerless ones
        may, until `Directory.assign` gives it one.

        Raises:
            InvalidRequest, TooManyCeremonies, Unavailable.
        """
        validate_text(user_name, "user_name")
        validate_text(display_name, "user_display_name")
        user_id, user_handle = self._begins.nobody()
        pending, options = await self._begins.new_registration(
            app,
            user=(user_id, None, user_handle),
            names=(user_name, display_name, display_name),
            bound=None,
            attachment=attachment,
            asked=asked,
        )
        handle = self._mint.token("handle")
        await self._ephemeral.ceremonies.put(
            "handle", handle, pending, opener=opener, cap=app.policy.discoverable_limit
        )
        self._metrics.ceremonies.inc("register", "begin", "ok")
        return Begun(handle, options)

    async def begin_registration_of(
        self,
        app: RelyingParty,
        external_id: str,
        *,
        opener: Opener,
        user_name: str,
        user_display_name: str | None = None,
        nickname: str | None = None,
        attachment: Attachment | None = None,
        asked: CeremonyOptions = NO_OPTIONS,
        by: FoundBy = "user",
    ) -> dict[str, Any]:
        """Begin a registration of a user whom a keyed caller names, who is made if there is none.
        Returns the options.

        `user_name` and `user_display_name` (the same, if not given) are what the authenticator
        shows, `nickname` what lists show. By the user it replaces the user's earlier one; by its
        challenge several may be open.

        Raises:
            InvalidRequest, TooManyPasskeys, Unavailable.
        """
        validate_text(external_id, "external_id")
        validate_text(user_name, "user_name")
        user_display_name = user_name if user_display_name is None else user_display_name
        validate_text(user_display_name, "user_display_name")
        if nickname is not None:
            validate_text(nickname, "nickname")
        user_id, user_handle = await self._begins.ensure_user(app, external_id)
        pending, options = await self._begins.new_registration(
            app,
            user=(user_id, external_id, user_handle),
            names=(user_name, user_display_name, nickname or ""),
            bound=None,
            attachment=attachment,
            asked=asked,
        )
        if by == "challenge":
            challenge = base64url(pending.challenge)
            await self._ephemeral.ceremonies.put("challenge", challenge, pending, opener=opener)
        else:
            await self._ephemeral.ceremonies.put("user", external_id, pending, opener=opener)
        self._metrics.ceremonies.inc("register", "begin", "ok")
        return options

    async def finish_registration(
        self,
        app: RelyingParty,
        handle: str,
        transaction_id: str | None,
        answer: RegistrationAnswer,
        *,
        opener: Opener,
    ) -> str:
        """Finish a registration: judge the answer, store the credential, return a nonce.

        Raises:
            UnknownTransaction: no such pending ceremony; or `transaction_id` names another
                transaction, or its own is spent.
            CeremonyRefused: the answer does not satisfy WebAuthn L3 §7.1, or its credential id is
                registered already. Unavailable.
        """
        nonce, _ = await self.finish_registration_with_receipt(
            app, handle, transaction_id, answer, opener=opener
        )
        return nonce

    async def finish_registration_with_receipt(
        self,
        app: RelyingParty,
        handle: str,
        transaction_id: str | None,
        answer: RegistrationAnswer,
        *,
        opener: Opener,
        nonce_life: int | None = None,
    ) -> tuple[str, Receipt]:
        """`finish_registration` for a caller who tells the page more than the nonce; `nonce_life`
        in seconds, the policy's if not given.
        """
        with self._finishes.counted("register", "page"):
            pending = await self._finishes.take_pending(
                app, handle, transaction_id, opener, PendingRegistration
            )
            receipt = await self._finishes.registered(app, pending, answer, confirmed=False)
            with retry_from("backend"):
                return await self._finishes.put_nonce(
                    app, receipt, pending.transaction, nonce_life
                ), receipt

    async def finish_registration_of(
        self, app: RelyingParty, external_id: str, answer: RegistrationAnswer, *, opener: Opener
    ) -> Receipt:
        """Finish the registration begun for a user: judge the answer, store the credential. The
        call is the caller's redemption, so the passkey is confirmed, and live under any policy.

        Raises:
            InvalidRequest; UnknownTransaction: no pending registration of this user;
                CeremonyRefused; Unavailable.
        """
        with self._finishes.counted("register", "backend"):
            pending = await self._finishes.take_pending_of(
                app, external_id, opener, PendingRegistration
            )
            return await self._finishes.registered(app, pending, answer, confirmed=True)

    async def finish_registration_by(
        self,
        app: RelyingParty,
        answer: RegistrationAnswer,
        *,
        openers: tuple[Opener, ...],
        second_factor: bool,
        confirmed: bool,
    ) -> Receipt:
        """Finish the registration whose challenge the answer carries, if one of `openers` began it.
        `confirmed`: the call is a keyed caller's, so its redemption.

        Raises:
            UnknownTransaction: no such pending registration; CeremonyRefused; Unavailable.
        """
        with self._finishes.counted("register", "backend"):
            challenge = ceremony.challenge_of(answer.client_data_json)
            kind = finish_kind("register", second_factor=second_factor)
            pending = await self._finishes.take_pending_by_challenge(
                app, challenge, openers, kind, PendingRegistration
            )
            return await self._finishes.registered(app, pending, answer, confirmed=confirmed)

    # -- authentication ----------------------------------------------------------------------------

    async def begin_authentication(
        self,
        app: RelyingParty,
        transaction_id: str | None,
        *,
        opener: Opener,
        asked: CeremonyOptions = NO_OPTIONS,
        second_factors: bool = True,
    ) -> Begun:
        """Begin an authentication: as the transaction says, or discoverable (`transaction_id`
        None), where `asked` is the page's: it narrows, and what it allows is not listed in the
        options, for a page without a transaction learns nothing of credentials. Without
        `second_factors` a transaction of a second factor is unknown, and left as it is.

        Raises:
            UnknownTransaction, TooManyCeremonies, Unavailable; InvalidRequest: an empty list of
                passkeys, which none could answer.
        """
        if transaction_id is not None:
            handle, transaction, options = await self._begins.begin_authentication(
                app, transaction_id, opener, _kinds("authenticate", second_factors)
            )
            kind = "discoverable" if transaction.user_id is None else "authenticate"
            self._metrics.ceremonies.inc(kind, "begin", "ok")
            return Begun(
                handle, options, transaction.asked.mediation, transaction.asked.second_factor
            )
        if asked.allow == ():
            raise InvalidRequest(
                "The list of passkeys is empty, so none could answer.", reason="empty_field"
            )
        pending, options = self._begins.new_authentication(app, (None, None), (), asked)
        if asked.allow is not None:
            pending = pending._replace(allowed=asked.allow)
        handle = self._mint.token("handle")
        await self._ephemeral.ceremonies.put(
            "handle", handle, pending, opener=opener, cap=app.policy.discoverable_limit
        )
        self._metrics.ceremonies.inc(kind_of(pending), "begin", "ok")
        return Begun(handle, options, asked.mediation, asked.second_factor)

    async def begin_authentication_of(
        self,
        app: RelyingParty,
        external_id: str | None,
        *,
        opener: Opener,
        asked: CeremonyOptions = NO_OPTIONS,
        by: FoundBy = "user",
        approval: Approval | None = None,
        keyless: bool = False,
    ) -> dict[str, Any]:
        """Begin an authentication of a user whom a keyed caller names, or without one (only by its
        challenge) a discoverable one. Returns the options. By the user it replaces the user's
        earlier one; by its challenge several may be open. `keyless`: anybody may ask for it, so the
        cap of open ceremonies counts it.

        With an `approval` its digest is the end of the challenge, and it is listed from now on.

        Raises:
            InvalidRequest, UnknownUser, NoPasskeys, DuplicateApproval, TooManyCeremonies,
                Unavailable.
        """
        user_id: str | None = None
        offered: Sequence[Credential] | Sequence[AllowedCredential] = ()
        if external_id is not None:
            user_id, offered = await self._begins.user_to_sign_in(app, external_id, asked)
        elif asked.allow is not None:
            offered = await self._begins.offered(app, asked)
        pending, options = self._begins.new_authentication(
            app, (user_id, external_id), offered, asked, approval
        )
        if by == "challenge" or external_id is None:
            cap = app.policy.discoverable_limit if keyless else None
            await self._ephemeral.ceremonies.put(
                "challenge", base64url(pending.challenge), pending, opener=opener, cap=cap
            )
        else:
            await self._ephemeral.ceremonies.put("user", external_id, pending, opener=opener)
        if approval is not None and user_id is not None:
            # Last, so that a store that fails leaves the identifier unused. Where this refuses, the
            # pending ceremony above expires: its challenge was given to nobody.
            await self._begins.record(app, user_id, approval)
        self._metrics.ceremonies.inc(kind_of(pending), "begin", "ok")
        return options

    async def finish_authentication(
        self,
        app: RelyingParty,
        handle: str,
        transaction_id: str | None,
        answer: AuthenticationAnswer,
        *,
        opener: Opener,
    ) -> str:
        """Finish an authentication: judge the answer, record the sign-in, return a nonce.

        Raises:
            UnknownTransaction: no such pending ceremony; or `transaction_id` names another
                transaction, or its own is spent.
            CeremonyRefused: the answer does not satisfy WebAuthn L3 §7.2; `DiscoverableRefused`
                where there was no transaction. Unavailable.
        """
        nonce, _ = await self.finish_authentication_with_receipt(
            app, handle, transaction_id, answer, opener=opener
        )
        return nonce

    async def finish_authentication_with_receipt(
        self,
        app: RelyingParty,
        handle: str,
        transaction_id: str | None,
        answer: AuthenticationAnswer,
        *,
        opener: Opener,
        nonce_life: int | None = None,
    ) -> tuple[str, Receipt]:
        """`finish_authentication` for a caller who tells the page more than the nonce; `nonce_life`
        in seconds, the policy's if not given.
        """
        with self._finishes.counted("authenticate", "page") as counted:
            pending = await self._finishes.take_pending(
                app, handle, transaction_id, opener, PendingAuthentication
            )
            counted.kind = kind_of(pending)
            receipt = (await self._finishes.authenticated(app, pending, answer)).receipt()
            with retry_from("backend" if pending.transaction else "page"):
                return await self._finishes.put_nonce(
                    app, receipt, pending.transaction, nonce_life
                ), receipt

    async def finish_authentication_of(
        self, app: RelyingParty, external_id: str, answer: AuthenticationAnswer, *, opener: Opener
    ) -> SignedIn:
        """Finish the authentication begun for a user: judge the answer, record the sign-in. Who
        wants its receipt asks for it.

        Raises:
            InvalidRequest; UnknownTransaction: no pending authentication of this user;
                CeremonyRefused; Unavailable.
        """
        with self._finishes.counted("authenticate", "backend"):
            pending = await self._finishes.take_pending_of(
                app, external_id, opener, PendingAuthentication
            )
            return await self._finishes.authenticated(app, pending, answer)

    async def finish_authentication_by(
        self,
        app: RelyingParty,
        answer: AuthenticationAnswer,
        *,
        openers: tuple[Opener, ...],
        second_factor: bool = False,
        approved: bool = False,
    ) -> Receipt:
        """Finish the authentication whose challenge the answer carries, if one of `openers` began
        it; `approved`: it must be about an approval, else about none.

        Raises:
            UnknownTransaction: no such pending authentication; CeremonyRefused,
                DiscoverableRefused, Unavailable.
        """
        with self._finishes.counted("authenticate", "backend") as counted:
            challenge = ceremony.challenge_of(answer.client_data_json)
            kind = finish_kind("authenticate", second_factor=second_factor, approved=approved)
            pending = await self._finishes.take_pending_by_challenge(
                app, challenge, openers, kind, PendingAuthentication
            )
            counted.kind = kind_of(pending)
            return (await self._finishes.authenticated(app, pending, answer)).receipt()

    async def hand_out(self, app: RelyingParty, receipt: Receipt, life: int) -> str:
        """A nonce for a receipt, to be redeemed once within `life` seconds, 10 minutes at most.

        Raises:
            Unavailable.
        """
        with retry_from("backend"):
            return await self._finishes.put_nonce(app, receipt, None, life)

    # -- redeem ------------------------------------------------------------------------------------

    async def redeem(
        self,
        app: RelyingParty,
        nonce: str,
        *,
        purpose: Proof | None = None,
        transaction_id: str | None = None,
        external_id: str | None = None,
        ownerless: bool = False,
    ) -> Receipt:
        """Exchange a nonce for its receipt, once. What the caller states must match; a mismatch
        spends the nonce.

        Without a `purpose` a registration and a login match: a second factor or an approval is
        redeemed by who asks for it, and so is, with `ownerless`, what a passkey that nobody owns
        has proved.

        Redeeming a registration's nonce confirms the passkey (`Credential.confirmed_at`).

        Raises:
            UnknownNonce: unknown, expired, redeemed, of another app, not what the caller expects,
                or its passkey was revoked: all alike.
            Unavailable: the nonce may be spent.
        """
        with retry_from("backend"):
            if not well_formed(nonce, "nonce"):
                self._metrics.redemptions.inc("unknown")
                raise UnknownNonce(reason="nonce_unknown")
            answer = await self._ephemeral.nonces.take(app.id, nonce)
            if not isinstance(answer, Taken):
                self._metrics.redemptions.inc("unknown")
                raise UnknownNonce(reason="nonce_unknown")
            found: Redeemable = answer.value
            receipt, now = found.receipt, self._clock()
            life = found.expires_at - receipt.at
            self._metrics.redemption_age.observe(min(1.0, max(0.0, (now - receipt.at) / life)))
            if (
                (
                    receipt.proof
                    not in ((purpose,) if purpose is not None else ("register", "authenticate"))
                )
                or (receipt.ownerless and not ownerless)
                or (external_id is not None and external_id != receipt.external_id)
                or (
                    transaction_id is not None
                    and digest("transaction", app.id, transaction_id) != found.transaction
                )
            ):
                self._metrics.redemptions.inc("mismatch")
                raise UnknownNonce(reason="nonce_mismatch")
            ceremonies = self._durable.ceremonies
            if not await (
                ceremonies.confirm(app.id, receipt.passkey_id, instant(now))
                if receipt.purpose == "register"
                else ceremonies.is_live(app.id, receipt.passkey_id)
            ):
                self._metrics.redemptions.inc("revoked")
                raise UnknownNonce(reason="passkey_revoked")
            self._metrics.redemptions.inc("ok")
            return receipt


def _kinds(purpose: Purpose, second_factors: bool) -> tuple[FinishKind, ...]:
    """The kinds of transaction that may begin."""
    return (purpose, finish_kind(purpose, second_factor=True)) if second_factors else (purpose,)
