"""What the broker does, as verbs. Read this file first.

    open     a backend asks for permission for one ceremony of one of its users     -> transaction id
    begin    the page asks for a challenge                                          -> handle, options
    finish   the page brings the authenticator's answer                             -> nonce
    redeem   the backend exchanges the nonce                                        -> receipt

Transaction and nonce are bookends round one ceremony. A discoverable authentication has no transaction. A keyed caller who carries
the page's messages itself needs neither: `begin_…_of` and `finish_…_of` name the user, whose pending ceremony of that purpose a new
begin replaces, and finish answers with the receipt. Both ways take the same steps.

**Order is the guarantee.** Begin only peeks at the transaction, for people cancel and try again. Finish takes the pending
ceremony before any cryptography, so an answer, right or wrong, is judged once; it takes the transaction after the answer was
verified and before anything durable is written, so a transaction buys one success; then comes one durable write, and only then
the nonce or the receipt. Whatever fails after a take has spent what was taken: the person starts over, from the page while the
transaction stands, else from the backend (`Unavailable.retry` says which). Each take is one atomic command of the ephemeral store,
so this holds for any number of instances.

**Who may learn what.** Callers with a key may know of users. Callers without one get the same refusal for unknown, expired, used,
wrong-kind and foreign values; `Refusal.reason` tells the operator which it was.

The steps that both ways share are in `broker.broker.steps`. Clock and chance are arguments. The durable write, not what was read
before it, decides about revocation, counters and duplicates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from broker.broker.steps import MAX_TEXT, Steps, checked, kind_of, pending_name, retry_from
from broker.durable import Durable, instant
from broker.ephemeral import Ephemeral
from broker.errors import NoPasskeys, UnknownNonce, UnknownTransaction
from broker.model import (
    Attachment,
    AuthenticationAnswer,
    Credential,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    Receipt,
    RegistrationAnswer,
    RelyingParty,
    Transaction,
)
from broker.telemetry import Metrics
from broker.tokens import Mint, SystemMint, digest, well_formed

__all__ = ["MAX_TEXT", "Begun", "Broker"]


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
        self._steps = Steps(
            ephemeral=ephemeral, durable=durable, metrics=metrics, clock=clock, mint=self._mint
        )

    # -- open -----------------------------------------------------------------------------------------------------------------

    async def open_registration(self, app: RelyingParty, external_id: str, display_name: str) -> str:
        """Permit one registration for a user, who is made if the app has none with this external id. Returns a transaction id.

        `display_name` is what the authenticator shows. The id is a bearer right to add a passkey until it is used or ends.

        Raises:
            InvalidRequest, Unavailable.
        """
        checked(external_id, "external_id")
        checked(display_name, "passkey_display_name")
        user_id, handle = await self._steps.ensure_user(app, external_id)
        return await self._open(app, "register", user_id, external_id, handle, display_name)

    async def open_authentication(self, app: RelyingParty, external_id: str) -> str:
        """Permit one authentication of a user. Returns a transaction id.

        Raises:
            InvalidRequest, UnknownUser, NoPasskeys, Unavailable.
        """
        user_id, handle = await self._steps.user_to_sign_in(app, external_id)
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
            UnknownTransaction, TooManyPasskeys, Unavailable.
        """
        name, transaction = await self._steps.peek(app, transaction_id, "register")
        pending, options = await self._steps.new_registration(
            app,
            user=(transaction.user_id, transaction.external_id, transaction.user_handle),
            names=(transaction.display_name,) * 3,
            bound=(name, transaction.expires_at),
            attachment=attachment,
        )
        handle = await self._ephemeral.put_pending(self._mint.token("handle"), pending, cap=0)
        self._metrics.ceremonies.labels("register", "begin", "ok").inc()
        return Begun(handle, options)

    async def begin_registration_of(
        self,
        app: RelyingParty,
        external_id: str,
        *,
        user_name: str,
        user_display_name: str | None = None,
        nickname: str | None = None,
        attachment: Attachment | None = None,
    ) -> dict[str, Any]:
        """Begin a registration of a user whom a keyed caller names, who is made if there is none; replaces the user's earlier one.

        `user_name` and `user_display_name` (the same, if not given) are what the authenticator shows, `nickname` what lists show.

        Raises:
            InvalidRequest, TooManyPasskeys, Unavailable.
        """
        checked(external_id, "external_id")
        checked(user_name, "user_name")
        user_display_name = user_name if user_display_name is None else user_display_name
        checked(user_display_name, "user_display_name")
        if nickname is not None:
            checked(nickname, "nickname")
        user_id, user_handle = await self._steps.ensure_user(app, external_id)
        pending, options = await self._steps.new_registration(
            app,
            user=(user_id, external_id, user_handle),
            names=(user_name, user_display_name, nickname or ""),
            bound=None,
            attachment=attachment,
        )
        await self._ephemeral.put_pending_as(pending_name("register", external_id), pending)
        self._metrics.ceremonies.labels("register", "begin", "ok").inc()
        return options

    async def finish_registration(
        self, app: RelyingParty, handle: str, transaction_id: str | None, answer: RegistrationAnswer
    ) -> str:
        """Finish a registration: judge the answer, store the credential, return a nonce.

        Raises:
            UnknownTransaction: no such pending ceremony; or `transaction_id` names another transaction, or its own is spent.
            CeremonyRefused: the answer does not satisfy WebAuthn L3 §7.1, or its credential id is registered already.
            Unavailable.
        """
        async with self._steps.counted("register", "page"):
            pending = await self._steps.take_pending(app, handle, transaction_id, PendingRegistration)
            receipt = await self._steps.registered(app, pending, answer, confirmed=False)
            async with retry_from("backend"):
                return await self._steps.put_nonce(app, receipt, pending.transaction)

    async def finish_registration_of(
        self, app: RelyingParty, external_id: str, answer: RegistrationAnswer
    ) -> Receipt:
        """Finish the registration begun for a user: judge the answer, store the credential. The call is the caller's redemption, so
        the passkey is confirmed, and live under any policy.

        Raises:
            InvalidRequest; UnknownTransaction: no pending registration of this user; CeremonyRefused; Unavailable.
        """
        async with self._steps.counted("register", "backend"):
            pending = await self._steps.take_pending_of(app, "register", external_id, PendingRegistration)
            return await self._steps.registered(app, pending, answer, confirmed=True)

    # -- authentication -------------------------------------------------------------------------------------------------------

    async def begin_authentication(self, app: RelyingParty, transaction_id: str | None) -> Begun:
        """Begin an authentication: of the transaction's user, or discoverable (`transaction_id` None).

        Raises:
            UnknownTransaction, TooManyCeremonies, Unavailable.
        """
        user_id, bound, offered = None, None, list[Credential]()
        if transaction_id is not None:
            name, transaction = await self._steps.peek(app, transaction_id, "authenticate")
            user_id, bound = transaction.user_id, (name, transaction.expires_at)
            offered = await self._durable.credentials(app.id, user_id, live_only=True)
            if not offered:  # revoked since the transaction was opened; no list would ask for any passkey
                raise UnknownTransaction(reason="no_passkey_left")
        pending, options = self._steps.new_authentication(app, user_id, offered, bound)
        handle = await self._ephemeral.put_pending(
            self._mint.token("handle"), pending, cap=app.policy.discoverable_limit
        )
        self._metrics.ceremonies.labels(kind_of(pending), "begin", "ok").inc()
        return Begun(handle, options)

    async def begin_authentication_of(self, app: RelyingParty, external_id: str) -> dict[str, Any]:
        """Begin an authentication of a user whom a keyed caller names; replaces the user's earlier one.

        Raises:
            InvalidRequest, UnknownUser, NoPasskeys, Unavailable.
        """
        user_id, _ = await self._steps.user_to_sign_in(app, external_id)
        offered = await self._durable.credentials(app.id, user_id, live_only=True)
        if not offered:  # revoked between the two looks
            raise NoPasskeys
        pending, options = self._steps.new_authentication(app, user_id, offered, None)
        await self._ephemeral.put_pending_as(pending_name("authenticate", external_id), pending)
        self._metrics.ceremonies.labels(kind_of(pending), "begin", "ok").inc()
        return options

    async def finish_authentication(
        self, app: RelyingParty, handle: str, transaction_id: str | None, answer: AuthenticationAnswer
    ) -> str:
        """Finish an authentication: judge the answer, record the sign-in, return a nonce.

        Raises:
            UnknownTransaction: no such pending ceremony; or `transaction_id` names another transaction, or its own is spent.
            CeremonyRefused: the answer does not satisfy WebAuthn L3 §7.2; `DiscoverableRefused` where there was no transaction.
            Unavailable.
        """
        async with self._steps.counted("authenticate", "page") as counted:
            pending = await self._steps.take_pending(app, handle, transaction_id, PendingAuthentication)
            counted.kind = kind_of(pending)
            receipt = await self._steps.authenticated(app, pending, answer)
            async with retry_from("backend" if pending.transaction else "page"):
                return await self._steps.put_nonce(app, receipt, pending.transaction)

    async def finish_authentication_of(
        self, app: RelyingParty, external_id: str, answer: AuthenticationAnswer
    ) -> Receipt:
        """Finish the authentication begun for a user: judge the answer, record the sign-in.

        Raises:
            InvalidRequest; UnknownTransaction: no pending authentication of this user; CeremonyRefused; Unavailable.
        """
        async with self._steps.counted("authenticate", "backend"):
            pending = await self._steps.take_pending_of(
                app, "authenticate", external_id, PendingAuthentication
            )
            return await self._steps.authenticated(app, pending, answer)

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
        async with retry_from("backend"):
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
