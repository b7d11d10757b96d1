"""Reading of answers: errors by code, results field by field.

A result is returned only when all of it could be read; what is missing or of the wrong type is
`UnexpectedAnswer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, cast, get_args

from .errors import (
    BY_CODE,
    BrokerError,
    BrokerUnavailable,
    InvalidNonce,
    Retry,
    UnexpectedAnswer,
    UnknownCredential,
)
from .results import (
    App,
    Approval,
    Event,
    EventBatch,
    EventPage,
    ListedUser,
    MailCode,
    MailMessage,
    NewMailCode,
    OwnedPasskey,
    Passkey,
    PasskeyPage,
    Proof,
    Receipt,
    SignalTicket,
    User,
    UserPage,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read to its end and not yet judged. Names of headers are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")

    @property
    def retry_after(self) -> float | None:
        """Seconds."""
        value = self.headers.get("retry-after", "")
        return float(value) if value.isascii() and value.isdigit() else None


def accept(answer: Answer) -> None:
    """Raise the error that the answer stands for, if its status is none of 200 to 299."""
    if 200 <= answer.status <= 299:
        return
    said = _object(answer.body) or {}
    code, message, retry, doc = (said.get(name) for name in ("code", "error", "retry", "doc"))
    kind = BY_CODE.get(code, BrokerError) if isinstance(code, str) else UnexpectedAnswer
    fallback = "unexpected_answer"
    if answer.status >= 500:
        kind, fallback = BrokerUnavailable, "service_unavailable"
    unexplained = f"The answer has status {answer.status} and no explanation."
    raise kind(
        code if isinstance(code, str) else fallback,
        message if isinstance(message, str) else unexplained,
        answer.status,
        answer.request_id,
        cast("Retry", retry) if retry in ("page", "backend") else None,
        answer.retry_after,
        _signal(said.get("signal")),
        doc if isinstance(doc, str) else None,
    )


def _signal(value: object) -> UnknownCredential | None:
    if not isinstance(value, dict) or value.get("type") != "unknown_credential":
        return None
    rp_id, credential_id = value.get("rp_id"), value.get("credential_id")
    if isinstance(rp_id, str) and isinstance(credential_id, str):
        return UnknownCredential(rp_id, credential_id)
    return None


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Fields:
    """A JSON object of a successful answer, read field by field."""

    def __init__(self, answer: Answer, value: Any = None) -> None:
        """`value` is an object within the answer; without it the whole answer is judged first."""
        if value is None:
            accept(answer)
            value = _object(answer.body)
        self._answer = answer
        self._value = value
        if not isinstance(value, dict):
            raise self.unexpected("no JSON object")

    def unexpected(self, what: str) -> UnexpectedAnswer:
        message = f"The answer has {what}; is the URL the broker's?"
        answer = self._answer
        return UnexpectedAnswer("unexpected_answer", message, answer.status, answer.request_id)

    def _typed(self, name: str, kind: type[T]) -> T:
        value = self._value.get(name)
        if type(value) is not kind:  # not isinstance: True is an int
            raise self.unexpected(f"no {name} of type {kind.__name__}")
        return value

    def _has(self, name: str) -> bool:
        return self._value.get(name) is not None

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def text_or_null(self, name: str) -> str | None:
        return self._typed(name, str) if self._has(name) else None

    def flag(self, name: str) -> bool:
        return self._typed(name, bool)

    def flag_or(self, name: str, default: bool) -> bool:
        """For what an older broker does not send."""
        return self.flag(name) if self._has(name) else default

    def number(self, name: str) -> int:
        return self._typed(name, int)

    def object(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self._typed(name, dict))

    def objects(self, name: str) -> list[dict[str, Any]]:
        values = self._typed(name, list)
        if not all(isinstance(value, dict) for value in values):
            raise self.unexpected(f"no objects in {name}")
        return values

    def object_or_null(self, name: str) -> dict[str, Any] | None:
        return self.object(name) if self._has(name) else None

    def anything(self, name: str) -> Any:
        if name not in self._value:
            raise self.unexpected(f"no {name}")
        return self._value[name]

    def moment(self, name: str) -> datetime:
        """An RFC 3339 time, aware."""
        try:
            moment = datetime.fromisoformat(self.text(name))
        except ValueError:
            raise self.unexpected(f"no time in {name}") from None
        if moment.tzinfo is None:
            raise self.unexpected(f"no time zone in {name}")
        return moment

    def moment_or_null(self, name: str) -> datetime | None:
        return self.moment(name) if self._has(name) else None

    def purpose(self, name: str) -> Proof:
        value = self.text(name)
        if value not in get_args(Proof):
            raise self.unexpected(f"no known {name}")
        return cast("Proof", value)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._typed(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self.unexpected(f"no texts in {name}")
        return tuple(values)

    def texts_or_none(self, name: str) -> tuple[str, ...]:
        return self.texts(name) if self._has(name) else ()

    def inner(self, name: str) -> Fields:
        return Fields(self._answer, self._typed(name, dict))

    def each(self, name: str) -> list[Fields]:
        return [Fields(self._answer, item) for item in self._typed(name, list)]


def receipt(answer: Answer, *, signed: bool = False) -> Receipt:
    fields = Fields(answer)
    return Receipt(
        external_id=fields.text("external_id"),
        user_id=fields.text("user_id"),
        purpose=fields.purpose("purpose"),
        passkey_id=fields.text("passkey_id"),
        credential_id=fields.text("credential_id"),
        origin=fields.text("origin"),
        user_present=fields.flag("user_present"),
        user_verified=fields.flag("user_verified"),
        backup_eligible=fields.flag("backup_eligible"),
        backed_up=fields.flag("backed_up"),
        backup_changed=fields.flag("backup_changed"),
        counter_regressed=fields.flag("counter_regressed"),
        attestation=fields.text("attestation"),
        authenticator_name_claimed=fields.text_or_null("authenticator_name_claimed"),
        at=fields.moment("at"),
        second_factor=fields.flag_or("second_factor", False),
        approval=fields.text_or_null("approval"),
        token=fields.text("token") if signed else None,
    )


def expected_receipt(
    answer: Answer, purpose: Proof | None, external_id: str | None, *, signed: bool = False
) -> Receipt:
    """The receipt of a nonce.

    Raises:
        InvalidNonce: it says another purpose or user than the caller stated. A broker that does not
            know those fields ignores them.
    """
    found = receipt(answer, signed=signed)
    if purpose not in (None, found.purpose) or external_id not in (None, found.external_id):
        raise InvalidNonce("invalid_nonce", "The nonce is for another purpose or another user.")
    return found


def finished_receipt(answer: Answer, purpose: Proof, external_id: str | None = None) -> Receipt:
    """The receipt of a keyed ceremony that the caller finished for this purpose."""
    found = receipt(answer)
    if found.purpose != purpose or external_id not in (None, found.external_id):
        raise Fields(answer).unexpected("a receipt of another ceremony")
    return found


def passkey(device: Fields) -> Passkey:
    uses = device.number("usage_count")
    return Passkey(
        id=device.text("id"),
        credential_id=device.text("cred_id"),
        name=device.text("friendly_name"),
        type=device.text("type"),
        use_count=uses,
        backed_up=device.flag("backed_up"),
        confirmed_at=device.moment_or_null("confirmed_at"),
        created_at=device.moment("created_at"),
        updated_at=device.moment("updated_at"),
        last_used_at=device.moment("last_login_at") if uses else None,
        live=device.flag_or("live", True),
        second_factor=device.flag_or("second_factor", False),
        backup_eligible=device.flag_or("backup_eligible", False),
        transports=device.texts_or_none("transports"),
        aaguid=device.text_or_null("aaguid"),
        attestation=device.text_or_null("attestation"),
        authenticator_name_claimed=device.text_or_null("authenticator_name_claimed"),
    )


def owned_passkey(fields: Fields) -> OwnedPasskey:
    return OwnedPasskey(
        id=fields.text("id"),
        external_id=fields.text_or_null("external_id"),
        credential_id=fields.text("credential_id"),
        nickname=fields.text_or_null("nickname"),
        user_name=fields.text("user_name"),
        type=fields.text("type"),
        second_factor=fields.flag("second_factor"),
        live=fields.flag("live"),
        backed_up=fields.flag("backed_up"),
        use_count=fields.number("use_count"),
        created_at=fields.moment("created_at"),
        last_used_at=fields.moment_or_null("last_used_at"),
        user_id=fields.text_or_null("user_id"),
        user_display_name=fields.text_or_null("user_display_name"),
        confirmed_at=fields.moment_or_null("confirmed_at"),
        updated_at=fields.moment_or_null("updated_at"),
        backup_eligible=fields.flag_or("backup_eligible", False),
        transports=fields.texts_or_none("transports"),
        aaguid=fields.text_or_null("aaguid"),
        attestation=fields.text_or_null("attestation"),
        authenticator_name_claimed=fields.text_or_null("authenticator_name_claimed"),
    )


def passkey_page(answer: Answer) -> PasskeyPage:
    fields = Fields(answer)
    found = tuple(owned_passkey(each) for each in fields.each("passkeys"))
    return PasskeyPage(found, fields.number("total"))


def user(answer: Answer) -> User:
    fields = Fields(answer).inner("user")
    listed = listed_user(fields)
    return User(
        id=listed.id,
        external_id=listed.external_id,
        status=listed.status,
        login_count=listed.login_count,
        created_at=listed.created_at,
        updated_at=listed.updated_at,
        last_login_at=listed.last_login_at,
        passkeys=tuple(passkey(device) for device in fields.each("webauthn_devices")),
    )


def listed_user(fields: Fields) -> ListedUser:
    logins = fields.number("login_count")
    return ListedUser(
        id=fields.text("id"),
        external_id=fields.text("external_id"),
        status=fields.text("status"),
        login_count=logins,
        created_at=fields.moment("created_at"),
        updated_at=fields.moment("updated_at"),
        last_login_at=fields.moment("last_login_at") if logins else None,
    )


def user_page(answer: Answer) -> UserPage:
    fields = Fields(answer)
    users = tuple(listed_user(each) for each in fields.each("users"))
    return UserPage(users, fields.number("total_users"), fields.number("created_before"))


def approval(fields: Fields) -> Approval:
    return Approval(
        id=fields.text("id"),
        data=fields.anything("data"),
        created_at=fields.moment("created_at"),
        approved_at=fields.moment_or_null("approved_at"),
    )


def event(fields: Fields) -> Event:
    return Event(
        id=fields.number("id"),
        at=fields.moment("at"),
        actor=fields.text("actor"),
        action=fields.text("action"),
        result=fields.text("result"),
        reason=fields.text_or_null("reason"),
        external_id=fields.text_or_null("external_id"),
        user_id=fields.text_or_null("user_id"),
        passkey_id=fields.text_or_null("passkey_id"),
        request_id=fields.text_or_null("request_id"),
    )


def event_page(answer: Answer) -> EventPage:
    fields = Fields(answer)
    return EventPage(tuple(event(each) for each in fields.each("events")), fields.number("total"))


def event_batch(answer: Answer) -> EventBatch:
    fields = Fields(answer)
    found = tuple(event(each) for each in fields.each("events"))
    return EventBatch(found, fields.text("next_cursor"))


def signal_ticket(answer: Answer) -> SignalTicket:
    fields = Fields(answer)
    return SignalTicket(
        ticket=fields.text("ticket"),
        expires_at=fields.moment("expires_at"),
        missing=fields.texts("missing"),
        empty=fields.flag("empty"),
    )


def mail_code(answer: Answer) -> MailCode:
    return MailCode(**_mail_code(Fields(answer).inner("mail_code")))


def new_mail_code(answer: Answer) -> NewMailCode:
    fields = Fields(answer).inner("mail_code")
    message = fields.inner("message")
    return NewMailCode(
        **_mail_code(fields),
        secret=fields.text("secret"),
        code=fields.text("code"),
        message=MailMessage(message.text("html"), message.text("text")),
    )


def _mail_code(fields: Fields) -> dict[str, Any]:
    return {
        "id": fields.text("id"),
        "purpose": fields.text("purpose"),
        "email": fields.text("email"),
        "external_id": fields.text_or_null("external_id"),
        "metadata": fields.object_or_null("metadata"),
        "created_at": fields.moment("created_at"),
        "expires_at": fields.moment("expires_at"),
        "attempts_left": fields.number("attempts_left"),
    }


def app(answer: Answer) -> App:
    fields = Fields(answer).inner("app")
    first, others = fields.text("auth_origin"), fields.texts("additional_auth_origins")
    return App(
        id=fields.text("id"),
        name=fields.text("name"),
        rp_id=fields.text("rp_id"),
        origins=tuple(origin for origin in (first, *others) if origin),
        created_at=fields.moment("created_at"),
    )
