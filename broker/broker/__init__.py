"""The broker's verbs: open, begin, finish, redeem, cancel. Read this file first.

    open     a backend asks for permission for one ceremony of one user    -> transaction id
    begin    the page asks for a challenge                                 -> options, handle
    finish   the page brings the authenticator's answer                    -> receipt, nonce, token
    redeem   the backend exchanges the nonce                               -> receipt
    cancel   the backend ends a transaction

Transaction and nonce are optional bookends of one ceremony. A discoverable authentication has no
transaction. A keyed caller that carries the page's messages needs neither: it names the user at
begin, and finish answers with the receipt. Every way takes the same steps.

A **subject** (`broker.model.Subject`) is a named user, a user whose passkey has no owner yet, or
anyone. A **link** says how finish finds its ceremony: begin gets a transaction, a user, a challenge
or nothing (`ANYONE`); finish gets a handle, a user, or the challenge in the answer.

**Order is the guarantee.** Begin only peeks at the transaction, so that people may cancel and try
again. Finish takes the pending ceremony before any cryptography: an answer, right or wrong, is
judged once. It takes the transaction after the answer was verified and before anything durable is
written: one transaction, one success. Then comes one durable write, and then the nonce. A failure
after a take has spent what was taken: the person starts over, from the page while the transaction
lives, else from the backend (`Unavailable.retry` says which). A take is one atomic script, so this
holds for any number of instances.

**Who may learn what.** Callers with a key may know of users. Callers without a key get the same
refusal for unknown, expired, used, wrong-kind and foreign values; `Refusal.reason` tells the
operator which it was.

**A ceremony is finished by its opener.** `opener` (a dialect, with a key or without) is part of the
name under which a ceremony is stored, and so is its kind. The finish of another dialect, or of
another kind of ceremony, finds nothing and takes nothing.

**Limits come first.** A begin or a finish of a client address that is over its rate limit is
refused before its first command (`TooManyRequests`), so it spends and writes nothing.

**The write decides.** The passkeys that may answer are looked up once and travel with the one-time
value: public keys, not secrets. A login is two statements: that look-up, and the write that records
the sign-in. That write, not what was read before it, decides about revocation, counters and
duplicates.

The steps stand in `registration`, `authentication` and `redemption`; what they share in `steps`.
**Idempotent requests.** An open or a redemption that is repeated with the same Idempotency-Key by
the same API key gets the same answer for a minute. A repeated redemption still asks Postgres
whether the passkey is live. A finish is never repeated.

Clock and chance are arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from broker.broker.authentication import Authentication, metric_of, restart_of
from broker.broker.decoys import Decoys
from broker.broker.redemption import Nonce, Outcome, Redemption, Signed
from broker.broker.registration import Registration
from broker.broker.steps import Begun, is_discoverable, require_binding, retry_from
from broker.durable import Durable
from broker.ephemeral import Ephemeral
from broker.errors import Refusal, Retry, Unavailable
from broker.model import (
    NO_OPTIONS,
    Anyone,
    Approval,
    AttachmentPolicy,
    AuthenticationAnswer,
    BeginLink,
    ByHandle,
    Caller,
    CeremonyOptions,
    ExpectedCeremony,
    ExpectedReceipt,
    FinishLink,
    Idempotency,
    Names,
    Opener,
    PendingAuthentication,
    PendingRegistration,
    RegistrationAnswer,
)
from broker.signing import Signing
from broker.telemetry import Log, Metrics
from broker.tokens import Mint, SystemMint

__all__ = ["Begun", "Broker", "Nonce", "Outcome", "Signed", "require_binding"]

_ANY_RECEIPT = ExpectedReceipt()


class Broker:
    """The verbs. `clock` gives seconds since the epoch, `mint` is the source of chance, and decoys
    derive from `secret_keys`. Each verb may raise `Unavailable`.
    """

    def __init__(
        self,
        *,
        ephemeral: Ephemeral,
        durable: Durable,
        signing: Signing,
        secret_keys: Callable[[], Sequence[str]],
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float] = time.time,
        mint: Mint | None = None,
    ) -> None:
        decoys = Decoys(secret_keys)
        parts = (ephemeral, durable, signing, decoys, metrics, clock, mint or SystemMint())
        self._registration = Registration(*parts)
        self._authentication = Authentication(*parts)
        self._redemption = Redemption(*parts, log=log)
        self._rate_limits = ephemeral.rate_limits
        self._metrics = metrics

    async def close(self) -> None:
        """Write the events that wait for the end of their minute."""
        for steps in (self._registration, self._authentication, self._redemption):
            await steps.close()

    # -- open and cancel ---------------------------------------------------------------------------

    async def open_registration(
        self,
        caller: Caller,
        external_id: str | Anyone,
        names: Names,
        options: CeremonyOptions = NO_OPTIONS,
        idempotency: Idempotency | None = None,
    ) -> str:
        """Permit one registration for a user, who is made if the app has none with this external
        id. Returns a transaction id: a bearer right to add a passkey until it is used or ends.

        Without an external id (`ANYONE`) the passkey has no owner, and signs in only where unowned
        ones may, until `Directory.assign` gives it one.

        Raises:
            InvalidRequest, IdempotencyConflict.
        """
        app, steps = caller.app, self._registration
        require_binding(app, options)
        if (answer := await steps.earlier_answer(idempotency)) is not None:
            return answer
        transaction = await steps.permit(app, external_id, names, options)
        return await steps.put_transaction(app, transaction, idempotency)

    async def open_authentication(
        self,
        caller: Caller,
        external_id: str | Anyone,
        options: CeremonyOptions = NO_OPTIONS,
        idempotency: Idempotency | None = None,
    ) -> str:
        """Permit one authentication: of a user, or (`ANYONE`) of any user with a passkey that
        answers, one of `options.allow` if given. Returns a transaction id.

        Raises:
            InvalidRequest, UnknownUser, IdempotencyConflict; NoPasskeys: the user has none, or no
                live one is allowed.
        """
        app, steps = caller.app, self._authentication
        require_binding(app, options)
        if (answer := await steps.earlier_answer(idempotency)) is not None:
            return answer
        transaction, _ = await steps.permit(app, external_id, options)
        return await steps.put_transaction(app, transaction, idempotency)

    async def cancel(self, caller: Caller, transaction_id: str) -> None:
        """End a transaction and its pending ceremony. A transaction that is unknown, used or ended
        stays so.
        """
        await self._redemption.cancel(caller.app, transaction_id)

    # -- registration ------------------------------------------------------------------------------

    async def begin_registration(
        self,
        caller: Caller,
        link: BeginLink,
        opener: Opener,
        *,
        names: Names | None = None,
        attachment: AttachmentPolicy | None = None,
        options: CeremonyOptions = NO_OPTIONS,
    ) -> Begun:
        """Begin a registration. A transaction says the names and options itself, and its earlier
        pending ceremony is replaced, as is the user's (`ByUser`). `attachment` None: the policy's.

        A registration that a page begins by itself (`ANYONE`) has no owner, and the cap of the
        app's open ceremonies counts it.

        Raises:
            InvalidRequest, UnknownTransaction, TooManyPasskeys, TooManyRequests.
        """
        self._rate_limits.begin(caller, discoverable=is_discoverable(link))
        begun = await self._registration.begin(caller, link, opener, names, attachment, options)
        self._metrics.ceremonies.inc("register", "begin", "ok")
        return begun

    async def finish_registration(
        self,
        caller: Caller,
        link: FinishLink,
        answer: RegistrationAnswer,
        expect: ExpectedCeremony,
        reward: Nonce | Signed | None = None,
    ) -> Outcome:
        """Finish a registration: judge the answer, store the credential. A keyed caller's finish is
        its redemption: the passkey is confirmed, and live under any policy.

        Raises:
            InvalidRequest; UnknownTransaction: no such pending ceremony, or its transaction is
                spent, or not the expected one; CeremonyRefused: the answer does not satisfy
                WebAuthn L3 §7.1, or its credential id is registered already.
        """
        await self._redemption.ready(reward)
        with _Counted(self._metrics, "register", link):
            pending = await self._registration.take(
                caller, link, answer, expect, PendingRegistration
            )
            self._redemption.require_bound(caller.app, pending, reward)
            receipt = await self._registration.record(
                caller.app, pending, answer, confirmed=caller.key_id is not None
            )
            with retry_from("backend"):
                return await self._redemption.reward(caller.app, receipt, pending, reward)

    # -- authentication ----------------------------------------------------------------------------

    async def begin_authentication(
        self,
        caller: Caller,
        link: BeginLink,
        opener: Opener,
        *,
        options: CeremonyOptions = NO_OPTIONS,
        approval: Approval | None = None,
    ) -> Begun:
        """Begin an authentication. A transaction says the options itself, and its earlier pending
        ceremony is replaced, as is the user's (`ByUser`). Without a user it is discoverable; the
        cap of the app's open ceremonies counts it if the caller has no key.

        A page by itself (`ANYONE`) learns nothing of credentials: `options.allow` narrows, and is
        not listed. An approval's digest ends the challenge; the approval is listed from now on.

        Raises:
            InvalidRequest, UnknownUser, NoPasskeys, UnknownTransaction, DuplicateApproval,
                TooManyRequests.
        """
        self._rate_limits.begin(caller, discoverable=is_discoverable(link))
        return await self._authentication.begin(caller, link, opener, options, approval)

    async def finish_authentication(
        self,
        caller: Caller,
        link: FinishLink,
        answer: AuthenticationAnswer,
        expect: ExpectedCeremony,
        reward: Nonce | Signed | None = None,
    ) -> Outcome:
        """Finish an authentication: judge the answer, record the sign-in.

        Raises:
            InvalidRequest; UnknownTransaction: no such pending ceremony, or its transaction is
                spent, or not the expected one; CeremonyRefused: the answer does not satisfy
                WebAuthn L3 §7.2; DiscoverableRefused: the same, where no user was named.
        """
        await self._redemption.ready(reward)
        with _Counted(self._metrics, "authenticate", link) as counted:
            pending = await self._authentication.take(
                caller, link, answer, expect, PendingAuthentication
            )
            counted.kind = metric_of(pending)
            self._redemption.require_bound(caller.app, pending, reward)
            receipt = await self._authentication.record(caller.app, pending, answer)
            with retry_from(restart_of(pending)):
                return await self._redemption.reward(caller.app, receipt, pending, reward)

    # -- redeem ------------------------------------------------------------------------------------

    async def redeem(
        self,
        caller: Caller,
        nonce: str,
        expect: ExpectedReceipt = _ANY_RECEIPT,
        reward: Signed | None = None,
        idempotency: Idempotency | None = None,
    ) -> Outcome:
        """Exchange a nonce for its receipt, once. A mismatch with what the caller expects spends
        the nonce. Redeeming a registration's nonce confirms the passkey
        (`Credential.confirmed_at`).

        Raises:
            UnknownNonce: unknown, expired, redeemed, of another app, not what the caller expects,
                or its passkey was revoked: all alike. IdempotencyConflict. Unavailable: the nonce
                may be spent; the same idempotent request still gets the receipt.
        """
        await self._redemption.ready(reward)
        with retry_from("backend"):
            return await self._redemption.redeem(caller.app, nonce, expect, reward, idempotency)


class _Counted:
    """Counts a finish by its result. `kind` may be known better once the ceremony was taken. Where
    an unavailable store has no other place to start again, a handle's holder starts from the page.
    """

    __slots__ = ("_metrics", "_place", "kind")

    def __init__(self, metrics: Metrics, kind: str, link: FinishLink) -> None:
        self._metrics = metrics
        self._place: Retry = "page" if isinstance(link, ByHandle) else "backend"
        self.kind = kind

    def __enter__(self) -> _Counted:
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
