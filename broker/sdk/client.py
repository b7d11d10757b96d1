"""The backend's side of the broker: open a transaction, redeem a nonce, look after passkeys.

    with BrokerClient("https://broker.example", app_id, api_key) as broker:
        transaction = broker.create_authenticate_transaction("user-7")      # give it to the page
        receipt = broker.verify_nonce(nonce, purpose="authenticate", transaction_id=transaction, external_id="user-7")

`AsyncBrokerClient` has the same methods, to be awaited. Both are thin: each operation is written once, as a generator that
yields requests and takes answers (`_verify_nonce` and its neighbours), and a client only carries them over httpx.

What it promises. Every request is sent once: no retry, no redirect followed, so a nonce is never redeemed twice by this code and
a lost answer is an error, after which the person signs in again. Every failure is a `BrokerError`. A receipt is returned only
when all of it could be read and it agrees with the purpose and the external id that the caller named. The API key goes into one
header and into no message, repr or exception. An argument that is no text where the broker takes one (a field of a session that is
not there is None) is `InvalidRequest` before anything is sent. An answer is read up to `LARGEST_ANSWER` bytes and within `timeout` seconds.

Needs httpx and the standard library, nothing of the broker. One file, so that a backend which installs nothing can copy it.
"""

from __future__ import annotations

import ipaddress
import json
import re
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast, get_args
from urllib.parse import quote, urlsplit

import httpx

Purpose = Literal["register", "authenticate"]
Proof = Literal["register", "authenticate", "register_second_factor", "authenticate_second_factor", "approve"]
Retry = Literal["page", "backend"]
UserVerification = Literal["required", "preferred", "discouraged"]
SignalKind = Literal["update", "delete", "prune"]

CONNECT_TIMEOUT = 2.0  # seconds
TIMEOUT = 10.0  # seconds, for the answer
LARGEST_ANSWER = 1 << 20  # bytes; a user with a hundred passkeys needs some tens of thousands

T = TypeVar("T")


class BrokerError(Exception):
    """The broker did not do what was asked.

    `code` is the broker's stable word, `message` its sentence; `status` the HTTP status (None without an answer); `request_id`
    finds the request in the broker's log; `retry` says where to start again ("page", "backend"), `retry_after` in how many
    seconds, both None unless the broker said so.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        request_id: str | None = None,
        retry: Retry | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(
            code, message, status, request_id, retry, retry_after
        )  # all of them, so that it pickles
        self.code = code
        self.message = message
        self.status = status
        self.request_id = request_id
        self.retry = retry
        self.retry_after = retry_after

    def __str__(self) -> str:
        where = ", ".join(str(part) for part in (self.status, self.request_id) if part)
        return f"{self.code}: {self.message}" + (f" ({where})" if where else "")


class InvalidRequest(BrokerError):
    """An argument has a form that the broker refuses, like an empty external id."""


class InvalidKey(BrokerError):
    """The API key is unknown, revoked, or of another app."""


class InvalidNonce(BrokerError):
    """The nonce is unknown, expired, already redeemed, or not what the caller expects. Nobody is signed in."""


class UserNotFound(BrokerError):
    """The app has no user with this external id."""


class NoPasskeys(BrokerError):
    """The user has no passkey to sign in with; open a register transaction first."""


class PasskeyNotFound(BrokerError):
    """The user has no passkey with this id."""


class TooManyRequests(BrokerError):
    """The broker asks to wait `retry_after` seconds."""


class BrokerUnavailable(BrokerError):
    """The broker answered that it can't, for now (any status from 500)."""


class BrokerUnreachable(BrokerError):
    """No answer: no connection, or none in time. Whether the broker did what was asked is unknown. The cause is httpx's error."""


class UnexpectedAnswer(BrokerError):
    """What answered does not speak as the broker does: check the URL."""


_BY_CODE: dict[str, type[BrokerError]] = {
    "invalid_request": InvalidRequest,
    "invalid_access_token": InvalidKey,
    "invalid_nonce": InvalidNonce,
    "user_not_found": UserNotFound,
    "user_has_no_passkeys": NoPasskeys,
    "device_not_found": PasskeyNotFound,
    "too_many_requests": TooManyRequests,
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """Who finished a ceremony, and how it was proved.

    `credential_id` is base64url; `origin` the page's; `attestation` is "none", "claimed" or "verified" (to a root of the app's
    policy); `authenticator_name_claimed` is what the authenticator says of itself, unproved; `at` is when the ceremony finished.
    `purpose` says what it proves: a `second_factor` or an approval is no sign-in, so each has a purpose of its own; `approval` is the id of what the user approved; `token` is the receipt as a signed
    JSON Web Token, where `verify_nonce` asked for one.
    """

    external_id: str
    user_id: str
    purpose: Proof
    passkey_id: str
    credential_id: str
    origin: str
    user_present: bool
    user_verified: bool
    backup_eligible: bool
    backed_up: bool
    backup_changed: bool
    counter_regressed: bool
    attestation: str
    authenticator_name_claimed: str | None
    at: datetime
    second_factor: bool = False
    approval: str | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Passkey:
    """One passkey of a user. `id` is the broker's, for `revoke_passkey`; `credential_id` is the authenticator's, base64url.

    `type` is "passkey", "security_key" or "platform"; `backed_up` says that it is synced; `last_used_at` is None while it has not
    been used, `confirmed_at` until the nonce of its registration was redeemed.
    """

    id: str
    credential_id: str
    name: str
    type: str
    use_count: int
    backed_up: bool
    confirmed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    last_used_at: datetime | None


@dataclass(frozen=True, slots=True)
class OwnedPasskey:
    """One passkey of the app, whoever owns it; `external_id` is None while nobody does.

    `nickname` is what lists show (None: not given), `user_name` what the authenticator shows; a `second_factor` signs in only where
    one is asked for, and one that is not `live` nowhere yet.
    """

    id: str
    external_id: str | None
    credential_id: str
    nickname: str | None
    user_name: str
    type: str
    second_factor: bool
    live: bool
    backed_up: bool
    use_count: int
    created_at: datetime
    last_used_at: datetime | None


@dataclass(frozen=True, slots=True)
class PasskeyPage:
    """A page of passkeys, and how many there are in all."""

    passkeys: tuple[OwnedPasskey, ...]
    total: int


@dataclass(frozen=True, slots=True)
class SignalTicket:
    """For the page's `applySignals`, once, until `expires_at`. `missing` are the ids that are no passkeys of the app; where it is
    `empty` there is nothing to tell."""

    ticket: str = field(repr=False)
    expires_at: datetime
    missing: tuple[str, ...]
    empty: bool


@dataclass(frozen=True, slots=True)
class User:
    """One user of the app. `status` is "active", "inactive", or "pending" until the first passkey."""

    id: str
    external_id: str
    status: str
    login_count: int
    created_at: datetime
    updated_at: datetime
    last_login_at: datetime | None
    passkeys: tuple[Passkey, ...]


# ---- One operation each: yields requests, takes answers, returns the result


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as `send` carries it. The key is not in it."""

    method: str
    path: str  # below /v1/apps/{app_id}, percent-encoded
    body: dict[str, Any] | None = None
    query: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read to its end and not yet judged."""

    status: int
    headers: httpx.Headers
    body: bytes


_Steps = Generator[Request, Answer, T]


def _create_transaction(
    purpose: Purpose, timeout: float | None, required: Sequence[str] = (), **body: object
) -> _Steps[str]:
    """`timeout` in seconds; what is None or False was not asked, unless it is `required`."""
    _judge_texts(**{name: body[name] for name in required})
    _judge_stated(body)
    stated = {name: value for name, value in body.items() if value is not None and value is not False}
    if timeout is not None:
        stated["timeout"] = round(timeout * 1000)
    answer = yield Request("POST", f"/transactions/{purpose}", body=stated)
    return _Fields(answer).text("transaction_id")


def _verify_nonce(
    nonce: str, purpose: Proof | None, transaction_id: str | None, external_id: str | None, signed: bool
) -> _Steps[Receipt]:
    expected = {"purpose": purpose, "transaction_id": transaction_id, "external_id": external_id}
    _judge_texts(nonce=nonce)
    _judge_stated(expected)
    stated: dict[str, Any] = {name: value for name, value in expected.items() if value is not None}
    if signed:
        stated["signed"] = True
    fields = _Fields((yield Request("POST", "/authenticate/verify", body={"nonce": nonce, **stated})))
    receipt = Receipt(
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
        second_factor=fields.flag_or_false("second_factor"),
        approval=fields.text_or_null("approval"),
        token=fields.text("token") if signed else None,
    )
    if purpose not in (None, receipt.purpose) or external_id not in (None, receipt.external_id):
        raise InvalidNonce("invalid_nonce", "The nonce is for another purpose or another user.")
    return receipt


def _user_id(external_id: str) -> _Steps[str]:
    _judge_texts(external_id=external_id)
    answer = yield Request("GET", "/users", query={"identifier": external_id, "limit": "1"})
    for user in _Fields(answer).each("users"):
        if user.text("external_id") == external_id:
            return user.text("id")
    raise UserNotFound("user_not_found", "The app has no such user.", answer.status, _request_id(answer))


def _get_user(external_id: str) -> _Steps[User]:
    user_id = yield from _user_id(external_id)
    user = _Fields((yield Request("GET", f"/users/{quote(user_id, safe='')}"))).inner("user")
    logins = user.number("login_count")
    return User(
        id=user.text("id"),
        external_id=user.text("external_id"),
        status=user.text("status"),
        login_count=logins,
        created_at=user.moment("created_at"),
        updated_at=user.moment("updated_at"),
        last_login_at=user.moment("last_login_at") if logins else None,
        passkeys=tuple(_passkey(device) for device in user.each("webauthn_devices")),
    )


def _list_passkeys(external_id: str) -> _Steps[list[Passkey]]:
    user_id = yield from _user_id(external_id)
    answer = yield Request("GET", f"/users/{quote(user_id, safe='')}/devices")
    return [_passkey(device) for device in _Fields(answer).each("devices")]


def _revoke_passkey(external_id: str, passkey_id: str) -> _Steps[None]:
    _judge_id(passkey_id)
    user_id = yield from _user_id(external_id)
    answer = yield Request("DELETE", f"/users/{quote(user_id, safe='')}/devices/{passkey_id}")
    _accept(answer)


def _list_all_passkeys(external_id: str | None, page: int, limit: int) -> _Steps[PasskeyPage]:
    _judge_stated({"external_id": external_id})
    query = {"page": str(page), "limit": str(limit)}
    if external_id is not None:
        query["external_id"] = external_id
    fields = _Fields((yield Request("GET", "/passkeys", query=query)))
    return PasskeyPage(tuple(_owned_passkey(p) for p in fields.each("passkeys")), fields.number("total"))


def _rename_passkey(passkey_id: str, nickname: str) -> _Steps[OwnedPasskey]:
    _judge_id(passkey_id)
    _judge_texts(nickname=nickname)
    answer = yield Request("PATCH", f"/passkeys/{passkey_id}", body={"nickname": nickname})
    return _owned_passkey(_Fields(answer).inner("passkey"))


def _prepare_signals(kind: SignalKind, **body: object) -> _Steps[SignalTicket]:
    _judge_texts(kind=kind)
    _judge_stated(body)
    stated = {name: value for name, value in body.items() if value is not None}
    fields = _Fields((yield Request("POST", f"/signals/{quote(kind, safe='')}", body=stated)))
    return SignalTicket(
        ticket=fields.text("ticket"),
        expires_at=fields.moment("expires_at"),
        missing=fields.texts("missing"),
        empty=fields.flag("empty"),
    )


def _ids(passkey_ids: Sequence[str] | None) -> list[str] | None:
    """None is what was not asked. A list stays one when it is empty: the broker refuses to take it for "any"."""
    if isinstance(passkey_ids, str):  # a sequence of its characters
        raise InvalidRequest("invalid_request", "Passkeys' ids are a list of texts.")
    return None if passkey_ids is None else list(passkey_ids)


def _judge_texts(**arguments: object) -> None:
    """Refuse, before anything is sent, what is not a text with something in it. The message never holds the value."""
    for name, value in arguments.items():
        if not isinstance(value, str) or not value:
            raise InvalidRequest("invalid_request", f"{name} is not a non-empty text.")


_FLAGS = frozenset({"discoverable", "second_factor"})
_LISTS = frozenset({"passkeys", "exclude_passkeys"})


def _judge_stated(arguments: dict[str, Any]) -> None:
    """The same for those that may be left out; of a list for each item."""
    for name, value in arguments.items():
        if name in _LISTS:
            for item in value or ():
                _judge_texts(**{name: item})
        elif value is not None and name not in _FLAGS:
            _judge_texts(**{name: value})


def _judge_id(passkey_id: str) -> None:
    if not isinstance(passkey_id, str):
        raise InvalidRequest("invalid_request", "passkey_id is not a text.")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", passkey_id):  # "" and ".." would change the path
        raise PasskeyNotFound("device_not_found", "No passkey has such an id.")


def _owned_passkey(fields: _Fields) -> OwnedPasskey:
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
    )


def _passkey(device: _Fields) -> Passkey:
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
    )


# ---- Reading answers


def _request_id(answer: Answer) -> str | None:
    value: str | None = answer.headers.get("x-request-id")
    return value


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _accept(answer: Answer) -> None:
    """Raise the error that the answer stands for, if it is none of 200 to 299."""
    if 200 <= answer.status <= 299:
        return
    said = _object(answer.body) or {}
    code, message, retry = said.get("code"), said.get("error"), said.get("retry")
    after = answer.headers.get("retry-after", "")
    kind = _BY_CODE.get(code, BrokerError) if isinstance(code, str) else UnexpectedAnswer
    fallback = "unexpected_answer"
    if answer.status >= 500:
        kind, fallback = BrokerUnavailable, "service_unavailable"
    raise kind(
        code if isinstance(code, str) else fallback,
        message if isinstance(message, str) else f"The answer has status {answer.status} and no explanation.",
        answer.status,
        _request_id(answer),
        cast("Retry", retry) if retry in ("page", "backend") else None,
        float(after) if after.isascii() and after.isdigit() else None,
    )


class _Fields:
    """A JSON object of a successful answer, read field by field; what is missing or of the wrong type is an `UnexpectedAnswer`."""

    def __init__(self, answer: Answer, value: Any = None) -> None:
        if value is None:
            _accept(answer)
            value = _object(answer.body)
        self._answer = answer
        self._value = value
        if not isinstance(value, dict):
            raise self._unexpected("no JSON object")

    def _unexpected(self, what: str) -> UnexpectedAnswer:
        message = f"The answer has {what}; is the URL the broker's?"
        return UnexpectedAnswer("unexpected_answer", message, self._answer.status, _request_id(self._answer))

    def _typed(self, name: str, kind: type[T]) -> T:
        value = self._value.get(name)
        if type(value) is not kind:  # not isinstance: True is an int
            raise self._unexpected(f"no {name} of type {kind.__name__}")
        return value

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def text_or_null(self, name: str) -> str | None:
        return None if self._value.get(name) is None else self._typed(name, str)

    def flag(self, name: str) -> bool:
        return self._typed(name, bool)

    def flag_or_false(self, name: str) -> bool:
        """For what an older broker does not know."""
        return self._value.get(name) is not None and self.flag(name)

    def number(self, name: str) -> int:
        return self._typed(name, int)

    def moment(self, name: str) -> datetime:
        """An RFC 3339 time, aware."""
        try:
            moment = datetime.fromisoformat(self.text(name))
        except ValueError:
            raise self._unexpected(f"no time in {name}") from None
        if moment.tzinfo is None:
            raise self._unexpected(f"no time zone in {name}")
        return moment

    def moment_or_null(self, name: str) -> datetime | None:
        return None if self._value.get(name) is None else self.moment(name)

    def purpose(self, name: str) -> Proof:
        value = self.text(name)
        if value not in get_args(Proof):
            raise self._unexpected(f"no known {name}")
        return cast("Proof", value)

    def inner(self, name: str) -> _Fields:
        return _Fields(self._answer, self._typed(name, dict))

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._typed(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self._unexpected(f"no texts in {name}")
        return tuple(values)

    def each(self, name: str) -> list[_Fields]:
        return [_Fields(self._answer, item) for item in self._typed(name, list)]


class _Body:
    """The answer's body as it arrives, within its limits of size and time."""

    def __init__(self, timeout: float) -> None:
        self._end = time.monotonic() + timeout
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > LARGEST_ANSWER:
            raise UnexpectedAnswer("unexpected_answer", f"The answer is larger than {LARGEST_ANSWER} bytes.")
        if time.monotonic() > self._end:
            raise BrokerUnreachable("unreachable", "The answer did not arrive in time.")

    def answer(self, response: httpx.Response) -> Answer:
        return Answer(response.status_code, response.headers, b"".join(self._chunks))


# ---- Carrying requests


class _Address:
    """Where the app is, and how requests to it look. Keeps the key only in the headers it gives to httpx, which hide it."""

    def __init__(self, url: str, app_id: str, api_key: str, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("url is the broker's, like https://broker.example")
        if "@" in parts.netloc:
            raise ValueError("url has a user name or a password; the API key is all that the broker asks for")
        if not app_id:
            raise ValueError("app_id is empty")
        if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise ValueError("api_key is not an API key: it is empty or has characters that no key has")
        self.name = f"{url!r}, {app_id!r}"
        self.timeout = timeout
        self._base = f"{url.rstrip('/')}/v1/apps/{quote(app_id, safe='')}"
        self.options: dict[str, Any] = {
            "headers": {
                "Authorization": f"Bearer {api_key}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "passkey-broker-client",
            },
            "timeout": httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout)),
            "follow_redirects": False,
            "trust_env": not _loopback(parts.hostname),  # a proxy of the environment can't reach this machine
        }

    def request(self, request: Request) -> dict[str, Any]:
        """The arguments of httpx's `stream`.

        Raises:
            InvalidRequest: a text holds a lone surrogate, which no encoding can carry.
        """
        try:
            json.dumps([request.body, request.query], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("invalid_request", "An argument is not valid Unicode text.") from None
        arguments: dict[str, Any] = {"method": request.method, "url": self._base + request.path}
        if request.body is not None:
            arguments["json"] = request.body
        if request.query is not None:
            arguments["params"] = request.query
        return arguments

    @contextmanager
    def reaching(self) -> Iterator[_Body]:
        """Turn httpx's errors into ours; the clock of the answer runs from here."""
        try:
            yield _Body(self.timeout)
        except httpx.TimeoutException as error:
            raise BrokerUnreachable("unreachable", "The broker did not answer in time.") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise BrokerUnreachable("unreachable", f"The broker can't be reached: {error}") from error


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class BrokerClient:
    """A blocking client of one app. Thread-safe; keeps connections, so make one and close it, or use it in a `with`.

    Args:
        url: where the broker's keyed API is, like "https://broker.example".
        app_id: 24 alphanumerics, from `broker app create`.
        api_key: the app's key, `pbk_…`.
        timeout: seconds for an answer; connecting has 2 s at most.

    Raises (every method): `InvalidKey`, `BrokerUnavailable`, `BrokerUnreachable`, `UnexpectedAnswer`, and what it names itself;
    all are `BrokerError`.
    """

    def __init__(self, url: str, app_id: str, api_key: str, *, timeout: float = TIMEOUT) -> None:
        self._address = _Address(url, app_id, api_key, timeout)
        self._http = httpx.Client(**self._address.options)

    def _run(self, steps: _Steps[T]) -> T:
        try:
            request = next(steps)
            while True:
                request = steps.send(self.send(request))
        except StopIteration as done:
            return cast("T", done.value)

    def send(self, request: Request) -> Answer:
        """Carry one request, once. A subclass that wants to watch requests overrides this."""
        arguments = self._address.request(request)
        with self._address.reaching() as body, self._http.stream(**arguments) as response:
            for chunk in response.iter_bytes():
                body.add(chunk)
            return body.answer(response)

    def create_register_transaction(
        self,
        external_id: str,
        passkey_display_name: str,
        *,
        user_name: str | None = None,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        exclude_passkeys: Sequence[str] | None = None,
        second_factor: bool = False,
    ) -> str:
        """Permit one new passkey for the user, who is created if new. Returns the transaction's id, for the page.

        The id is a bearer right to add a passkey until it is used or ends. The display name is what the authenticator shows, beside
        `user_name` (the same, if not given). `ceremony_timeout` is in seconds, 1 to 600, and never more than the app's `ceremony_life`;
        `exclude_passkeys` are ids of passkeys besides the user's own; `second_factor` makes a passkey that signs in only where a
        second factor is asked for.

        Raises:
            InvalidRequest: a text is missing, empty or longer than 256 characters, or an option has no form that the broker takes.
        """
        return self._run(
            _create_transaction(
                "register",
                ceremony_timeout,
                ("external_id", "passkey_display_name"),
                external_id=external_id,
                passkey_display_name=passkey_display_name,
                user_name=user_name,
                user_verification=user_verification,
                exclude_passkeys=_ids(exclude_passkeys) or None,
                second_factor=second_factor,
            )
        )

    def create_authenticate_transaction(
        self,
        external_id: str | None = None,
        *,
        passkeys: Sequence[str] | None = None,
        discoverable: bool = False,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        second_factor: bool = False,
    ) -> str:
        """Permit one sign-in of the user. Returns the transaction's id, for the page.

        `passkeys` are the ids of the only passkeys that may answer; an empty list is refused. Without `external_id` it is a sign-in of
        whoever has one of them, or with `discoverable` of whoever has a passkey: act on the receipt's external id alone. `ceremony_timeout` is
        in seconds. With `second_factor` the user's second factors may answer, too.

        Raises:
            UserNotFound, NoPasskeys, InvalidRequest
        """
        return self._run(
            _create_transaction(
                "authenticate",
                ceremony_timeout,
                external_id=external_id,
                passkeys=_ids(passkeys),
                discoverable=discoverable,
                user_verification=user_verification,
                second_factor=second_factor,
            )
        )

    def verify_nonce(
        self,
        nonce: str,
        *,
        purpose: Proof | None = None,
        transaction_id: str | None = None,
        external_id: str | None = None,
        signed: bool = False,
    ) -> Receipt:
        """Redeem a nonce that a page brought, once. Sign in `receipt.external_id` and nobody else.

        Always state what the session expects: `purpose` keeps a registration from buying a login, `transaction_id` and
        `external_id` another person's nonce; a second factor's nonce is redeemed only for its own purpose. A mismatch spends the nonce. Sent once; after `BrokerUnreachable` or
        `BrokerUnavailable` the nonce may be spent, and the person signs in again. `signed` asks for `Receipt.token` as well, for
        services that check it offline with the app's key set.

        Raises:
            InvalidNonce, InvalidRequest
        """
        return self._run(_verify_nonce(nonce, purpose, transaction_id, external_id, signed))

    def get_user(self, external_id: str) -> User:
        """The user with all passkeys. Raises `UserNotFound`."""
        return self._run(_get_user(external_id))

    def list_passkeys(self, external_id: str) -> list[Passkey]:
        """The user's passkeys. Raises `UserNotFound`."""
        return self._run(_list_passkeys(external_id))

    def list_all_passkeys(
        self, external_id: str | None = None, *, page: int = 1, limit: int = 100
    ) -> PasskeyPage:
        """A page of the app's passkeys, or of one user's, oldest first; `limit` is 500 at most."""
        return self._run(_list_all_passkeys(external_id, page, limit))

    def rename_passkey(self, passkey_id: str, nickname: str) -> OwnedPasskey:
        """Change what lists show of a passkey. Raises `PasskeyNotFound`, `InvalidRequest`."""
        return self._run(_rename_passkey(passkey_id, nickname))

    def prepare_signals(
        self,
        kind: SignalKind,
        *,
        external_id: str | None = None,
        user_name: str | None = None,
        user_display_name: str | None = None,
        passkeys: Sequence[str] | None = None,
    ) -> SignalTicket:
        """Change passkeys, and get a ticket with which the page tells the authenticator.

        "update" stores `user_name` on all passkeys of the user; "delete" ends `passkeys`, or all of the user, at once; "prune"
        changes nothing, and lets the authenticator forget passkeys that are no longer there.

        Raises:
            InvalidRequest: not what the kind takes.
        """
        return self._run(
            _prepare_signals(
                kind,
                external_id=external_id,
                user_name=user_name,
                user_display_name=user_display_name,
                passkeys=_ids(passkeys),
            )
        )

    def revoke_passkey(self, external_id: str, passkey_id: str) -> None:
        """End a passkey of this user: it never signs in again. Raises `UserNotFound`, `PasskeyNotFound`."""
        self._run(_revoke_passkey(external_id, passkey_id))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"BrokerClient({self._address.name})"


class AsyncBrokerClient:
    """`BrokerClient` for asyncio (or trio): the same arguments, methods and errors, to be awaited; `close`, or `async with`."""

    def __init__(self, url: str, app_id: str, api_key: str, *, timeout: float = TIMEOUT) -> None:
        self._address = _Address(url, app_id, api_key, timeout)
        self._http = httpx.AsyncClient(**self._address.options)

    async def _run(self, steps: _Steps[T]) -> T:
        try:
            request = next(steps)
            while True:
                request = steps.send(await self.send(request))
        except StopIteration as done:
            return cast("T", done.value)

    async def send(self, request: Request) -> Answer:
        """As `BrokerClient.send`."""
        arguments = self._address.request(request)
        with self._address.reaching() as body:
            async with self._http.stream(**arguments) as response:
                async for chunk in response.aiter_bytes():
                    body.add(chunk)
                return body.answer(response)

    async def create_register_transaction(
        self,
        external_id: str,
        passkey_display_name: str,
        *,
        user_name: str | None = None,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        exclude_passkeys: Sequence[str] | None = None,
        second_factor: bool = False,
    ) -> str:
        """As `BrokerClient.create_register_transaction`."""
        return await self._run(
            _create_transaction(
                "register",
                ceremony_timeout,
                ("external_id", "passkey_display_name"),
                external_id=external_id,
                passkey_display_name=passkey_display_name,
                user_name=user_name,
                user_verification=user_verification,
                exclude_passkeys=_ids(exclude_passkeys) or None,
                second_factor=second_factor,
            )
        )

    async def create_authenticate_transaction(
        self,
        external_id: str | None = None,
        *,
        passkeys: Sequence[str] | None = None,
        discoverable: bool = False,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        second_factor: bool = False,
    ) -> str:
        """As `BrokerClient.create_authenticate_transaction`."""
        return await self._run(
            _create_transaction(
                "authenticate",
                ceremony_timeout,
                external_id=external_id,
                passkeys=_ids(passkeys),
                discoverable=discoverable,
                user_verification=user_verification,
                second_factor=second_factor,
            )
        )

    async def verify_nonce(
        self,
        nonce: str,
        *,
        purpose: Proof | None = None,
        transaction_id: str | None = None,
        external_id: str | None = None,
        signed: bool = False,
    ) -> Receipt:
        """As `BrokerClient.verify_nonce`."""
        return await self._run(_verify_nonce(nonce, purpose, transaction_id, external_id, signed))

    async def get_user(self, external_id: str) -> User:
        """As `BrokerClient.get_user`."""
        return await self._run(_get_user(external_id))

    async def list_passkeys(self, external_id: str) -> list[Passkey]:
        """As `BrokerClient.list_passkeys`."""
        return await self._run(_list_passkeys(external_id))

    async def list_all_passkeys(
        self, external_id: str | None = None, *, page: int = 1, limit: int = 100
    ) -> PasskeyPage:
        """As `BrokerClient.list_all_passkeys`."""
        return await self._run(_list_all_passkeys(external_id, page, limit))

    async def rename_passkey(self, passkey_id: str, nickname: str) -> OwnedPasskey:
        """As `BrokerClient.rename_passkey`."""
        return await self._run(_rename_passkey(passkey_id, nickname))

    async def prepare_signals(
        self,
        kind: SignalKind,
        *,
        external_id: str | None = None,
        user_name: str | None = None,
        user_display_name: str | None = None,
        passkeys: Sequence[str] | None = None,
    ) -> SignalTicket:
        """As `BrokerClient.prepare_signals`."""
        return await self._run(
            _prepare_signals(
                kind,
                external_id=external_id,
                user_name=user_name,
                user_display_name=user_display_name,
                passkeys=_ids(passkeys),
            )
        )

    async def revoke_passkey(self, external_id: str, passkey_id: str) -> None:
        """As `BrokerClient.revoke_passkey`."""
        await self._run(_revoke_passkey(external_id, passkey_id))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncBrokerClient({self._address.name})"
