"""Parsing of answers: errors by their code, results by the types of their dataclasses.

The dataclass is the schema. A field must be present with its type, unless it is optional or has a
default, which an older broker leaves out. A result is returned only if all of it could be read.
Anything else is `UnexpectedAnswer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from functools import cache
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

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
    """An HTTP answer, complete and not yet parsed. Names of headers are lower-case."""

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
    """Raise the error of the answer, unless its status is 200 to 299."""
    if 200 <= answer.status <= 299:
        return
    body = _object(answer.body) or {}
    code, message, retry, doc = (body.get(name) for name in ("code", "error", "retry", "doc"))
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
        _signal(body.get("signal")),
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
    """A JSON object of a successful answer, whose members are read with their types."""

    def __init__(self, answer: Answer, value: Any = None) -> None:
        """`value` is an object within the answer. Without it the whole answer is parsed."""
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

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def flag(self, name: str) -> bool:
        return self._typed(name, bool)

    def number(self, name: str) -> int:
        return self._typed(name, int)

    def object(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self._typed(name, dict))

    def objects(self, name: str) -> list[dict[str, Any]]:
        return self._items(name, dict, "objects")

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._items(name, str, "texts"))

    def _items(self, name: str, kind: type[T], plural: str) -> list[T]:
        values = self._typed(name, list)
        if not all(isinstance(value, kind) for value in values):
            raise self.unexpected(f"no {plural} in {name}")
        return values

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

    def purpose(self, name: str) -> Proof:
        value = self.text(name)
        if value not in get_args(Proof):
            raise self.unexpected(f"no known {name}")
        return cast("Proof", value)

    def inner(self, name: str) -> Fields:
        return Fields(self._answer, self._typed(name, dict))

    def each(self, name: str) -> list[Fields]:
        return [Fields(self._answer, item) for item in self._typed(name, list)]

    def read(self, kind: type[T], **known: Any) -> T:
        """A result of this dataclass. `known` are fields that are not read by their name."""
        for name, hint, default in _schema(cast("Any", kind)):
            if name not in known:
                is_absent = default is not MISSING and self._value.get(name) is None
                known[name] = default if is_absent else _READERS[hint](self, name)
        return kind(**known)


_READERS: dict[Any, Callable[[Fields, str], Any]] = {
    str: Fields.text,
    bool: Fields.flag,
    int: Fields.number,
    datetime: Fields.moment,
    dict[str, Any]: Fields.object,
    tuple[str, ...]: Fields.texts,
    Proof: Fields.purpose,
    Any: Fields.anything,
}


@cache
def _schema(kind: Any) -> list[tuple[str, Any, Any]]:
    """The name, type and default of each field. An optional field defaults to None."""
    hints, schema = get_type_hints(kind), []
    for field in fields(kind):
        hint, default = hints[field.name], field.default
        if NoneType in get_args(hint):
            (hint,) = (member for member in get_args(hint) if member is not NoneType)
            default = None if default is MISSING else default
        schema.append((field.name, hint, default))
    return schema


def receipt(answer: Answer, *, signed: bool = False) -> Receipt:
    fields = Fields(answer)
    return fields.read(Receipt, token=fields.text("token") if signed else None)


def expected_receipt(
    answer: Answer, purpose: Proof | None, external_id: str | None, *, signed: bool = False
) -> Receipt:
    """The receipt of a nonce.

    Raises:
        InvalidNonce: the receipt has another purpose or user than the caller stated. A broker that
            does not know those fields of the request ignores them.
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
    return device.read(
        Passkey,
        credential_id=device.text("cred_id"),
        name=device.text("friendly_name"),
        use_count=uses,
        last_used_at=device.moment("last_login_at") if uses else None,
    )


def owned_passkey(fields: Fields) -> OwnedPasskey:
    return fields.read(OwnedPasskey)


def one_passkey(answer: Answer) -> OwnedPasskey:
    return owned_passkey(Fields(answer).inner("passkey"))


def passkey_page(answer: Answer) -> PasskeyPage:
    fields = Fields(answer)
    return fields.read(PasskeyPage, passkeys=tuple(map(owned_passkey, fields.each("passkeys"))))


def user(answer: Answer) -> User:
    fields = Fields(answer).inner("user")
    passkeys = tuple(map(passkey, fields.each("webauthn_devices")))
    return fields.read(User, passkeys=passkeys, last_login_at=_last_login(fields))


def _last_login(user: Fields) -> datetime | None:
    return user.moment("last_login_at") if user.number("login_count") else None


def user_page(answer: Answer) -> UserPage:
    fields = Fields(answer)
    users = [
        each.read(ListedUser, last_login_at=_last_login(each)) for each in fields.each("users")
    ]
    return fields.read(UserPage, users=tuple(users), total=fields.number("total_users"))


def approval(fields: Fields) -> Approval:
    return fields.read(Approval)


def event_page(answer: Answer) -> EventPage:
    fields = Fields(answer)
    return fields.read(EventPage, events=_events(fields))


def event_batch(answer: Answer) -> EventBatch:
    fields = Fields(answer)
    return fields.read(EventBatch, events=_events(fields))


def _events(fields: Fields) -> tuple[Event, ...]:
    return tuple(each.read(Event) for each in fields.each("events"))


def signal_ticket(answer: Answer) -> SignalTicket:
    return Fields(answer).read(SignalTicket)


def mail_code(answer: Answer) -> MailCode:
    return Fields(answer).inner("mail_code").read(MailCode)


def new_mail_code(answer: Answer) -> NewMailCode:
    fields = Fields(answer).inner("mail_code")
    return fields.read(NewMailCode, message=fields.inner("message").read(MailMessage))


def app(answer: Answer) -> App:
    fields = Fields(answer).inner("app")
    first, others = fields.text("auth_origin"), fields.texts("additional_auth_origins")
    return fields.read(App, origins=tuple(origin for origin in (first, *others) if origin))
