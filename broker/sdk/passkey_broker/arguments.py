"""Validation of arguments and assembly of request bodies, before anything is sent.

An argument that is no text where the broker takes one is `InvalidRequest`: a session's field that
is not there is None, and must not become a request that means something else. No message holds a
value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
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
    """One request, as `send` carries it. The API key is not in it."""

    method: str
    path: str  # below /v1/apps/{app_id}, percent-encoded
    body: dict[str, Any] | None = None
    query: dict[str, str] | None = None

    def encoded(self) -> bytes | None:
        """The body as JSON.

        Raises:
            InvalidRequest: an argument is no JSON value, or holds half of a surrogate pair, which
                no encoding can carry.
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


def judge_texts(**arguments: object) -> None:
    """Refuse what is not a text with something in it."""
    for name, value in arguments.items():
        if not isinstance(value, str) or not value:
            raise InvalidRequest("invalid_request", f"{name} is not a non-empty text.")


def texts(**arguments: object) -> dict[str, Any]:
    """Those of the arguments that are stated, each a text with something in it; None states
    nothing."""
    stated = {name: value for name, value in arguments.items() if value is not None}
    judge_texts(**stated)
    return stated


def ids(name: str, values: Sequence[str] | None) -> dict[str, Any]:
    """A list of ids, None if not stated. It stays a list when it is empty: the broker refuses that,
    for a list that was meant to narrow must not mean "any"."""
    if values is None:
        return {}
    if isinstance(values, str) or not isinstance(
        values, Sequence
    ):  # a text is one of its characters
        raise InvalidRequest("invalid_request", f"{name} is a list of texts.")
    for value in values:
        judge_texts(**{name: value})
    return {name: list(values)}


def flags(**arguments: bool) -> dict[str, Any]:
    """Those of the arguments that are true.

    A value that is neither True nor False is refused: what is merely truthy may be a mistake.
    """
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise InvalidRequest("invalid_request", f"{name} is not True or False.")
    return {name: True for name, value in arguments.items() if value}


def milliseconds(seconds: float | None) -> dict[str, Any]:
    """`timeout`, as the broker takes it; nothing for None."""
    if seconds is None:
        return {}
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
        raise InvalidRequest("invalid_request", "ceremony_timeout is not a number of seconds.")
    return {"timeout": round(seconds * 1000)}


def approval(request: ApprovalRequest | None) -> dict[str, Any]:
    """`approval`, as the broker takes it; nothing for None."""
    if request is None:
        return {}
    if not isinstance(request, ApprovalRequest):
        raise InvalidRequest("invalid_request", "approval is not an ApprovalRequest.")
    judge_texts(approval_id=request.id)
    return {"approval": {"id": request.id, "data": request.data}}


def registration(
    user_verification: str | None,
    ceremony_timeout: float | None,
    exclude_passkeys: Sequence[str] | None,
    second_factor: bool = False,
) -> dict[str, Any]:
    """The ceremony options of a registration. An empty `exclude_passkeys` is not stated."""
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
    """Who may answer an authentication, and its ceremony options."""
    return {
        **texts(external_id=external_id),
        **ids("passkeys", passkeys),
        **texts(user_verification=user_verification, mediation=mediation),
        **milliseconds(ceremony_timeout),
        **flags(discoverable=discoverable, second_factor=second_factor),
    }


def objects(**arguments: object) -> dict[str, Any]:
    """Those of the arguments that are stated, each a JSON object."""
    stated = {name: value for name, value in arguments.items() if value is not None}
    for name, value in stated.items():
        if not isinstance(value, Mapping):
            raise InvalidRequest("invalid_request", f"{name} is not a JSON object.")
    return stated


def credential(value: Mapping[str, Any]) -> dict[str, Any]:
    """What the browser made, as the page sent it."""
    if value is None:
        raise InvalidRequest("invalid_request", "credential is not a JSON object.")
    return objects(credential=value)


def place(page: int, limit: int) -> dict[str, str]:
    """Which page of a list, and how much is on one."""
    for name, value in (("page", page), ("limit", limit)):
        if type(value) is not int or value < 1:  # not isinstance: True is an int
            raise InvalidRequest("invalid_request", f"{name} is not a whole number from 1.")
    return {"page": str(page), "limit": str(limit)}


def whole(**arguments: int | None) -> dict[str, str]:
    """Those of the arguments that are stated, each a whole number from 0."""
    found = {}
    for name, value in arguments.items():
        if value is not None and (type(value) is not int or value < 0):
            raise InvalidRequest("invalid_request", f"{name} is not a whole number from 0.")
        if value is not None:
            found[name] = str(value)
    return found


def moments(**arguments: datetime | None) -> dict[str, str]:
    """Those of the arguments that are stated, as RFC 3339."""
    found = {}
    for name, value in arguments.items():
        if value is None:
            continue
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise InvalidRequest("invalid_request", f"{name} is not a datetime with a time zone.")
        found[name] = value.isoformat()
    return found


def segment(name: str, value: str) -> str:
    """An id as a segment of a path.

    Raises:
        InvalidRequest: it is no text.
        BrokerError: the kind's own "not found", for an id of no possible form: "" and ".." would
            change the path.
    """
    if not isinstance(value, str):
        raise InvalidRequest("invalid_request", f"{name} is not a text.")
    if not _SEGMENT.fullmatch(value):
        error, code, sentence = _UNKNOWN[name]
        raise error(code, sentence)
    return quote(value, safe="")
