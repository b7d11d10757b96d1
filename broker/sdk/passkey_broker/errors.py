"""Exceptions of the client: one class for each error code that a backend can act on, all
`BrokerError`.

A code without a class raises `BrokerError` itself, so the code of a newer broker is never lost:
read `BrokerError.code`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Retry = Literal["page", "backend"]


@dataclass(frozen=True, slots=True)
class UnknownCredential:
    """A passkey that no user has, so that the page can signal its removal (WebAuthn Signal API).

    `credential_id` is base64url. Give `rpId` and `credentialId` to
    `PublicKeyCredential.signalUnknownCredential`.
    """

    rp_id: str
    credential_id: str


class BrokerError(Exception):
    """A request failed.

    Attributes:
        code: the broker's stable word for the error.
        message: the sentence of the error.
        status: the HTTP status; None without an answer.
        request_id: finds the request in the broker's log.
        retry: where to start again: "page" or "backend"; None if the broker names neither.
        retry_after: seconds to wait; None if the broker names none.
        signal: after a refused ceremony, the passkey whose removal the page may signal.
        doc: address of the code's documentation, if the broker's operator has set one.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        request_id: str | None = None,
        retry: Retry | None = None,
        retry_after: float | None = None,
        signal: UnknownCredential | None = None,
        doc: str | None = None,
    ) -> None:
        # All are arguments of Exception, so that the error can be pickled.
        super().__init__(code, message, status, request_id, retry, retry_after, signal, doc)
        self.code = code
        self.message = message
        self.status = status
        self.request_id = request_id
        self.retry = retry
        self.retry_after = retry_after
        self.signal = signal
        self.doc = doc

    def __str__(self) -> str:
        where = ", ".join(str(part) for part in (self.status, self.request_id) if part)
        return f"{self.code}: {self.message}" + (f" ({where})" if where else "")


class InvalidRequest(BrokerError):
    """An argument has a wrong form, like an empty external id. Nothing was spent."""


class InvalidKey(BrokerError):
    """The API key is unknown, revoked, or of another app."""


class AppNotFound(BrokerError):
    """The broker has no app with this id."""


class InvalidNonce(BrokerError):
    """The nonce is unknown, expired, redeemed, or not as the caller stated. Sign in no user."""


class TransactionNotFound(BrokerError):
    """The ceremony is unknown, expired, finished, or was begun for another purpose. Start another
    one.
    """


class CeremonyRefused(BrokerError):
    """The authenticator's answer was refused, and the ceremony is spent. `signal` may be set."""


class DiscoverableRefused(CeremonyRefused):
    """The authenticator's answer to a ceremony without a user was refused."""


class UserNotFound(BrokerError):
    """The app has no user with this external id."""


class UserDisabled(BrokerError):
    """The user is disabled: neither signs in nor registers until `enable_user`."""


class NoPasskeys(BrokerError):
    """The user has no passkey to sign in with; open a register transaction first."""


class TooManyPasskeys(BrokerError):
    """The user has as many passkeys as the app's policy allows; revoke one first."""


class PasskeyNotFound(BrokerError):
    """The user, or the app, has no passkey with this id."""


class PasskeyHasOwner(BrokerError):
    """The passkey has an owner already; an owner never changes."""


class ApprovalExists(BrokerError):
    """The app has used this approval id before; each approval takes a new one."""


class MailCodeNotFound(BrokerError):
    """The mail code is unknown, already taken or replaced, or the secret is not this code's."""


class WrongMailCode(BrokerError):
    """The digits are not those of the mail. The person may try again."""


class MailCodeExpired(BrokerError):
    """The mail code has expired; make a new one."""


class MailCodeAttemptsExceeded(BrokerError):
    """The mail code was entered wrong too often and is spent; make a new one."""


class TooManyRequests(BrokerError):
    """The broker asks to wait `retry_after` seconds. Nothing was spent."""


class MailCodeRateLimited(TooManyRequests):
    """Too many mail codes for the mailbox or the user; wait `retry_after` seconds."""


class BrokerUnavailable(BrokerError):
    """The broker is briefly unavailable (any status from 500)."""


class BrokerUnreachable(BrokerError):
    """No answer: no connection, or none in time. The cause is httpx's error.

    The broker may have executed the request.
    """


class UnexpectedAnswer(BrokerError):
    """The answer is not one of the broker's: check the URL."""


BY_CODE: dict[str, type[BrokerError]] = {
    "app_not_found": AppNotFound,
    "approval_exists": ApprovalExists,
    "device_not_found": PasskeyNotFound,
    "discoverable_login_failed": DiscoverableRefused,
    "invalid_access_token": InvalidKey,
    "invalid_nonce": InvalidNonce,
    "invalid_request": InvalidRequest,
    "mail_code_attempts_exceeded": MailCodeAttemptsExceeded,
    "mail_code_expired": MailCodeExpired,
    "mail_code_not_found": MailCodeNotFound,
    "mail_code_rate_limited": MailCodeRateLimited,
    "mail_code_wrong": WrongMailCode,
    "passkey_has_owner": PasskeyHasOwner,
    "too_many_passkeys": TooManyPasskeys,
    "too_many_requests": TooManyRequests,
    "transaction_not_found": TransactionNotFound,
    "user_disabled": UserDisabled,
    "user_has_no_passkeys": NoPasskeys,
    "user_not_found": UserNotFound,
    "webauthn_login_failed": CeremonyRefused,
}
