"""Validation of arguments and assembly of request bodies, before anything is sent.

An argument with a wrong type is `InvalidRequest`. A session's missing field, for instance, is None,
and must not become a request with another meaning. No message holds a value.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import quote

from .errors import BrokerError, InvalidRequest, MailCodeNotFound, PasskeyNotFound
from .results import ApprovalRequest

_SEGMENT = re.compile(r"[A-Za-z0-9_-]+")
_UNKNOWN: dict[str, tuple[type[BrokerError], str, str]] = {
    "passkey_id": (PasskeyNotFound, "device_not_found", "No passkey has such an id."),
    "mail_code_id": (MailCodeNotFound, "mail_code_not_found", "No mail code has such an id."),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A request without its API key, for `send`."""

    method: str
    path: str  # below /v1/apps/{app_id}, percent-encoded
    body: dict[str, Any] | None = None
    query: dict[str, str] | None = None
    idempotency_key: str | None = None  # the broker answers repetitions with the same answer

    @classmethod
    def idempotent(cls, path: str, body: dict[str, Any]) -> Request:
        """A POST with an Idempotency-Key of its own."""
        return cls("POST", path, body, idempotency_key=secrets.token_urlsafe(24))

    def encoded(self) -> bytes | None:
        """The body as JSON.

        Raises:
            InvalidRequest: an argument is not a JSON value, or has a lone surrogate, which UTF-8
                can't encode.
        """
        try:
            for value in (self.query or {}).values():
                value.encode()
            if self.body is None:
                return None
            text = json.dumps(
                self.body,
                ensure_ascii=False,
                allow_nan=False,
                separators=(",", ":"),
                default=_mapping,
            )
            return text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                "invalid_request", "An argument is not valid Unicode text."
            ) from None
        except (TypeError, ValueError, RecursionError):
            raise InvalidRequest("invalid_request", "An argument is not a JSON value.") from None


def _mapping(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError("not a JSON value")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest("invalid_request", message)


def _stated(
    arguments: Mapping[str, Any], is_valid: Callable[[Any], bool], fault: str
) -> dict[str, Any]:
    """The arguments that are not None, each of which must be valid."""
    stated = {name: value for name, value in arguments.items() if value is not None}
    for name, value in stated.items():
        _require(is_valid(value), f"{name} is {fault}.")
    return stated


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def require_texts(**arguments: object) -> None:
    """Refuse an argument that is not a non-empty text."""
    for name, value in arguments.items():
        _require(_is_text(value), f"{name} is not a non-empty text.")


def texts(**arguments: object) -> dict[str, Any]:
    """The arguments that are not None, each a non-empty text."""
    return _stated(arguments, _is_text, "not a non-empty text")


def ids(name: str, values: Sequence[str] | None) -> dict[str, Any]:
    """A list of ids, unless it is None.

    An empty list is sent, and the broker refuses it: a list that narrows must not mean "any".
    """
    if values is None:
        return {}
    # A text is a sequence of its characters.
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    _require(is_list, f"{name} is a list of texts.")
    for value in values:
        require_texts(**{name: value})
    return {name: list(values)}


def flags(**arguments: bool) -> dict[str, Any]:
    """The arguments that are True. A value that is only truthy is refused: it may be a mistake."""
    for name, value in arguments.items():
        _require(isinstance(value, bool), f"{name} is not True or False.")
    return {name: True for name, value in arguments.items() if value}


def milliseconds(seconds: float | None) -> dict[str, Any]:
    """The member `timeout` of a body, unless it is None."""
    if seconds is None:
        return {}
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    _require(is_number and 0 < seconds < 1e6, "ceremony_timeout is not a number of seconds.")
    return {"timeout": round(seconds * 1000)}


def approval(request: ApprovalRequest | None) -> dict[str, Any]:
    """The member `approval` of a body, unless it is None."""
    if request is None:
        return {}
    _require(isinstance(request, ApprovalRequest), "approval is not an ApprovalRequest.")
    require_texts(approval_id=request.id)
    return {"approval": {"id": request.id, "data": request.data}}


def registration(
    user_verification: str | None,
    ceremony_timeout: float | None,
    exclude_passkeys: Sequence[str] | None,
    second_factor: bool = False,
) -> dict[str, Any]:
    """The ceremony options of a registration. An empty `exclude_passkeys` is left out."""
    excluded = ids("exclude_passkeys", exclude_passkeys)
    return {
        **texts(user_verification=user_verification),
        **milliseconds(ceremony_timeout),
        **(excluded if exclude_passkeys else {}),
        **flags(second_factor=second_factor),
    }


def authentication(
    external_id: str | None,
    passkeys: Sequence[str] | None,
    user_verification: str | None,
    ceremony_timeout: float | None,
    *,
    discoverable: bool = False,
    second_factor: bool = False,
    mediation: str | None = None,
) -> dict[str, Any]:
    """The allowed users and passkeys of an authentication, and its ceremony options."""
    return {
        **texts(external_id=external_id),
        **ids("passkeys", passkeys),
        **texts(user_verification=user_verification, mediation=mediation),
        **milliseconds(ceremony_timeout),
        **flags(discoverable=discoverable, second_factor=second_factor),
    }


class Binding(NamedTuple):
    """A verifier for the browser's session, and its challenge for the broker (RFC 7636, S256)."""

    verifier: str
    challenge: str


def new_binding() -> Binding:
    """A new pair, which binds one nonce to one browser session."""
    verifier = secrets.token_urlsafe(32)
    digest = hashlib.sha256(verifier.encode()).digest()
    return Binding(verifier, base64.urlsafe_b64encode(digest).rstrip(b"=").decode())


def objects(**arguments: object) -> dict[str, Any]:
    """The arguments that are not None, each a JSON object."""
    return _stated(arguments, lambda value: isinstance(value, Mapping), "not a JSON object")


def credential(value: Mapping[str, Any]) -> dict[str, Any]:
    """The member `credential`: the browser's answer, as the page sent it."""
    _require(isinstance(value, Mapping), "credential is not a JSON object.")
    return {"credential": value}


def place(page: int, limit: int) -> dict[str, str]:
    """The page of a list, and the size of a page."""
    pair = {"page": page, "limit": limit}
    for name, value in pair.items():
        _require(_is_whole(value) and value > 0, f"{name} is not a whole number from 1.")
    return {name: str(value) for name, value in pair.items()}


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0  # not isinstance: True is an int


def whole(**arguments: int | None) -> dict[str, str]:
    """The arguments that are not None, each a whole number from 0."""
    stated = _stated(arguments, _is_whole, "not a whole number from 0")
    return {name: str(value) for name, value in stated.items()}


def moments(**arguments: datetime | None) -> dict[str, str]:
    """The arguments that are not None, as RFC 3339."""
    stated = _stated(
        arguments,
        lambda value: isinstance(value, datetime) and value.tzinfo is not None,
        "not a datetime with a time zone",
    )
    return {name: value.isoformat() for name, value in stated.items()}


def segment(name: str, value: str) -> str:
    """An id as a segment of a path.

    Raises:
        InvalidRequest: the id is not a text.
        BrokerError: the "not found" of its kind, for an impossible id: "" and ".." would change the
            path.
    """
    _require(isinstance(value, str), f"{name} is not a text.")
    if not _SEGMENT.fullmatch(value):
        error, code, sentence = _UNKNOWN[name]
        raise error(code, sentence)
    return quote(value, safe="")
