"""The broker's refusals, as exception types.

Each refusal has a stable `code` and one sentence for the person who reads it. This module knows no
HTTP: `broker.web` and each dialect hold a table from these classes to a status and a vendor's code.
A test asserts that no class lacks a row.

Two rules decide what a sentence may say. A caller without a key learns nothing, so one class covers
unknown, expired, spent, wrong-kind and foreign values. `reason` says which of these it was, in the
log, the metric and the event. It never leaves the process, except to a keyed caller whose wire
format has a word of its own for it. And a sentence tells the reader what to do, not what the code
did.

**Two readers.** A person at a page may read a `sentence`, so it is plain and names no policy,
command or setting. The `hint` is for an operator or a backend's developer. It says in technical
words what was wrong, and which policy key or setting caused the refusal (`policy_hint`). The edge
adds a hint to the request's log line, and to the answer of a caller whose key was accepted; no
other answer has it. So a hint holds no byte of a caller. A fault of form (`InvalidRequest`) is a
mistake of the page's author, so its sentence names the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Retry = Literal["page", "backend"]


@dataclass(frozen=True, slots=True)
class Signal:
    """The arguments of a WebAuthn Signal API call: the authenticator has a passkey that the relying
    party doesn't have.

    Source: WebAuthn L3 §5.1.10, `PublicKeyCredential.signalUnknownCredential(options)`.
    """

    rp_id: str
    credential_id: bytes


def policy_hint(key: str, value: str) -> str:
    """The hint of a refusal that a policy key causes: the key, and how to set it to what would let
    the request pass.
    """
    return (
        f"The app's policy {key} decides that; "
        f"`broker app update --app A --set {key}={value}` changes it."
    )


class Fault(Exception):
    """A fault of the installation, outside of any request: one sentence that says what to do."""

    code: ClassVar[str] = "fault"


class Refusal(Exception):
    """A request that is not granted. `sentence` is for the caller, who may be a person at a page.
    `reason` (a short bounded word) and `hint` (sentences of ours) are for the operator, and the
    hint for keyed callers too. `doc` links to the documentation of `code`, "" where the operator
    has named no page; only the Flex API renders it.
    """

    code: ClassVar[str]
    default: ClassVar[str]
    default_hint: ClassVar[str | None] = None

    def __init__(
        self, sentence: str | None = None, *, reason: str | None = None, hint: str | None = None
    ) -> None:
        self.sentence = sentence or self.default
        self.reason = reason or self.code
        self.hint = hint if hint or sentence else self.default_hint
        self.doc = ""
        super().__init__(self.sentence)


class InvalidRequest(Refusal):
    """A fault of form: found before anything is taken, spends nothing."""

    code = "invalid_request"
    default = "The request is not well-formed."


class InvalidKey(Refusal):
    """No API key, an unknown or revoked one, or one of another app: all alike."""

    code = "invalid_access_token"
    default = "Invalid access token"


class OperationNotAllowed(Refusal):
    code = "operation_not_allowed"
    default = "This origin is not registered for the app; tell whoever runs this site."


class UnknownApp(Refusal):
    code = "app_not_found"
    default = "There is no such app."


class UnknownUser(Refusal):
    """Keyed callers only."""

    code = "user_not_found"
    default = "The app has no such user."


class UserDisabled(Refusal):
    """Keyed callers only."""

    code = "user_disabled"
    default = "The user is disabled; enable the user first."


class NoPasskeys(Refusal):
    """Keyed callers only."""

    code = "user_has_no_passkeys"
    default = "The user has no passkeys yet; open a register transaction first."


class TooManyPasskeys(Refusal):
    """The user has as many passkeys as the policy allows: `count` of `limit`."""

    code = "too_many_passkeys"
    default = "This account has as many passkeys as it may have; remove one first."
    default_hint = policy_hint("max_passkeys", "N")

    def __init__(
        self,
        sentence: str | None = None,
        *,
        reason: str | None = None,
        hint: str | None = None,
        limit: int = 0,
        count: int = 0,
    ) -> None:
        super().__init__(sentence, reason=reason, hint=hint)
        self.limit = limit
        self.count = count


class UnknownPasskey(Refusal):
    """Keyed callers only."""

    code = "device_not_found"
    default = "The user has no such passkey."


class UnknownTransaction(Refusal):
    """The transaction is unknown, expired, used, of the wrong kind, or of another app: all alike.
    Also for a handle or a user without a pending ceremony.
    """

    code = "transaction_not_found"
    default = "This step has expired or was already used; reload the page and start again."
    default_hint = (
        "The transaction, session or ceremony is unknown, expired or already used; open a new one."
    )


class UnknownNonce(Refusal):
    """The nonce is unknown, expired, redeemed, of another app, or not what the caller expects: all
    alike.
    """

    code = "invalid_nonce"
    default = "nonce is invalid, expired, or cannot be found"


class IdempotencyConflict(Refusal):
    """Keyed callers only: this Idempotency-Key came with another request before."""

    code = "idempotency_key_reused"
    default = "This Idempotency-Key was sent with another request; use a new one for each request."


class UnknownTicket(Refusal):
    """The ticket is unknown, expired, used, of another kind or of another app: all alike."""

    code = "ticket_not_found"
    default = "This step has expired or was already used; reload the page."
    default_hint = "The ticket is unknown, expired or already used; prepare a new one."


class OwnedAlready(Refusal):
    """Keyed callers only: the passkey has an owner, and the owner of a passkey never changes."""

    code = "passkey_has_owner"
    default = "The passkey has an owner already; an owner never changes."


class DuplicateApproval(Refusal):
    """Keyed callers only: the app has used this identifier before."""

    code = "approval_exists"
    default = "There is an approval with this identifier already; each takes a new one."


class CeremonyRefused(Refusal):
    """The browser's answer does not satisfy WebAuthn L3 §7.1 or §7.2. The pending ceremony is
    spent.

    `reason` is a bounded word ("challenge", "origin", "signature", …). `signal` is set where the
    server has proved that the authenticator holds a passkey which no user of the app has.
    """

    code = "webauthn_login_failed"
    default = "The passkey could not be verified; try again, or use another one."

    def __init__(
        self,
        sentence: str | None = None,
        *,
        reason: str | None = None,
        hint: str | None = None,
        signal: Signal | None = None,
    ) -> None:
        super().__init__(sentence, reason=reason, hint=hint)
        self.signal = signal


class DiscoverableRefused(CeremonyRefused):
    """A refused authentication that had no transaction."""

    code = "discoverable_login_failed"
    default = "The passkey could not be verified; try again, or use another one."


class TooManyRequests(Refusal):
    """A rate limit is reached, or the app's cap of open discoverable ceremonies. Nothing was taken
    or written. `reason` is the policy key that decided; `retry_after` in whole seconds.
    """

    code = "too_many_requests"
    default = "Too many requests; try again in a moment."
    default_hint = policy_hint("discoverable_limit", "N")

    def __init__(
        self,
        sentence: str | None = None,
        *,
        reason: str = "discoverable_limit",
        hint: str | None = None,
        retry_after: int = 5,
    ) -> None:
        super().__init__(sentence, reason=reason, hint=hint)
        self.retry_after = retry_after


class UnknownMailCode(Refusal):
    """The mail code is unknown, used, replaced or of another app, or the secret is another code's:
    all alike.
    """

    code = "mail_code_not_found"
    default = "The mail code is unknown, already used or replaced; make a new one."


class WrongMailCode(Refusal):
    """The digits are not those of the mail. The guess counts, unless it is not six digits."""

    code = "mail_code_wrong"
    default = "The code is not the one in the mail."


class MailCodeExpired(Refusal):
    code = "mail_code_expired"
    default = "The mail code has expired; make a new one."


class MailCodeAttempts(Refusal):
    """The guesses of the code are used up: a further guess, right or wrong, is not judged."""

    code = "mail_code_attempts_exceeded"
    default = "The mail code was entered wrong too often; make a new one."


class MailCodeRate(Refusal):
    """Too many codes for one mailbox or one user. `retry_after` in whole seconds."""

    code = "mail_code_rate_limited"
    default = "Too many mail codes were made for this mailbox or user; try again later."

    def __init__(
        self, sentence: str | None = None, *, reason: str | None = None, retry_after: int = 1
    ) -> None:
        super().__init__(sentence, reason=reason)
        self.retry_after = retry_after


class NotFound(Refusal):
    code = "not_found"
    default = "There is nothing at this address."


class MethodNotAllowed(Refusal):
    code = "method_not_allowed"
    default = "This address does not take that method."


class RequestTooLarge(Refusal):
    code = "request_too_large"
    default = "The body is larger than 64 KiB."


class RequestTimeout(Refusal):
    code = "request_timeout"
    default = "The request did not arrive in time."


class UnsupportedEncoding(Refusal):
    code = "unsupported_media_type"
    default = "Send the body uncompressed."


class Unavailable(Refusal):
    """A store is down, slow or full, a migration is missing, or the process is above its caps.
    `retry` says where to start again, if a step was begun.
    """

    code = "service_unavailable"
    default = "The service is briefly unavailable; try again."
    retry_after = 1

    def __init__(
        self, sentence: str | None = None, *, reason: str | None = None, retry: Retry | None = None
    ) -> None:
        super().__init__(sentence, reason=reason)
        self.retry = retry


class InvalidSetting(Refusal):
    """An operator's value (an origin, a policy, a setting) that can't be used; the sentence names
    it and says why.
    """

    code = "invalid_setting"
    default = "The setting can't be used."


class Conflict(Refusal):
    """An update of a version that another update has replaced. Nothing was changed."""

    code = "conflict"
    default = "The app was changed meanwhile; look at it and try again."


class InternalFault(Refusal):
    """A defect of the broker, as the caller sees it. The log has the exception, and the answer has
    nothing of it.
    """

    code = "internal_server_error"
    default = "Something went wrong on our side; try again later."
