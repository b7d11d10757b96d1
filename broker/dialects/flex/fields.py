"""Strict validation of the Flex API's request fields: a field is missing, or has exactly the type
and values below.

The ceremony options (`CeremonyOptions`) have one set of names on every route that begins a
ceremony:

    user_verification   "required", "preferred" or "discouraged"
    timeout             milliseconds, as in WebAuthn's options; limited by the app's `ceremony_life`
    passkeys            ids of the only passkeys that may answer; never empty, for an empty list
                        would allow any passkey
    exclude_passkeys    ids of passkeys, besides the user's own, whose authenticators must not
                        create another passkey
    second_factor       true: the ceremony is for second factors
    mediation           "required" or "conditional", for the page

Null counts as missing, except for `passkeys` and the fields of a browser binding: an unset variable
of the caller must not remove the restriction.
"""

from __future__ import annotations

import re
from typing import Any, cast, get_args

from aiohttp import web

from broker.errors import InvalidRequest
from broker.model import (
    ANYONE,
    ID,
    NO_OPTIONS,
    Anyone,
    AttachmentPolicy,
    CeremonyOptions,
    Mediation,
    UserVerification,
)
from broker.web.body import read_query, text_field

Body = dict[str, Any]

_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")
_TIMEOUT = (1_000, 600_000)  # milliseconds
_LIST = 1000  # a user has no more


def attachment(body: Body) -> AttachmentPolicy | None:
    """The authenticator attachment. None: the policy's."""
    value = body.get("authenticator_attachment")
    if value is not None and value not in get_args(AttachmentPolicy):
        raise InvalidRequest('authenticator_attachment is "platform", "cross-platform" or "any".')
    return cast("AttachmentPolicy | None", value)


def switch(body: Body, name: str) -> bool:
    """A boolean field; a missing field is false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} is true or false.", reason="field_type")
    return bool(value)


def passkey_ids(body: Body, name: str) -> tuple[str, ...]:
    """A list of 1 to 1000 passkey ids. Lists and receipts have the same ids."""
    value = body.get(name)
    if not isinstance(value, list) or not all(
        isinstance(item, str) and ID.match(item) for item in value
    ):
        raise InvalidRequest(f"{name} is a list of ids of passkeys.", reason="field_type")
    if not 1 <= len(value) <= _LIST:
        raise InvalidRequest(
            f"{name} has {len(value)} ids; it has 1 to {_LIST}, or is left out.",
            reason="empty_field",
        )
    return tuple(dict.fromkeys(value))


_PLAIN = {"external_id"}  # most requests have no other field


def registration_options(body: Body, *, at_a_page: bool = False) -> CeremonyOptions:
    """The ceremony options of a registration. With `at_a_page` the request may ask for conditional
    create.
    """
    return CeremonyOptions(
        user_verification=_user_verification(body),
        life=_life(body),
        exclude=None
        if body.get("exclude_passkeys") is None
        else passkey_ids(body, "exclude_passkeys"),
        second_factor=switch(body, "second_factor"),
        mediation=_mediation(body) if at_a_page else "required",
    )


def authentication_options(body: Body) -> tuple[str | Anyone, CeremonyOptions]:
    """The external id, and the ceremony options of an authentication.

    The request names its user or passkeys by `external_id`, `passkeys` or both. Only
    `discoverable: true` lets any user answer. A request with none of the three is refused.
    """
    if body.keys() == _PLAIN:
        return text_field(body, "external_id"), NO_OPTIONS
    options = CeremonyOptions(
        user_verification=_user_verification(body),
        life=_life(body),
        allow=passkey_ids(body, "passkeys") if "passkeys" in body else None,
        second_factor=switch(body, "second_factor"),
        mediation=_mediation(body),
    )
    discoverable = switch(body, "discoverable")
    if discoverable and ("external_id" in body or options.allow is not None):
        raise InvalidRequest(
            "Give external_id, passkeys or both, or else discoverable: true.", reason="scope"
        )
    if "external_id" in body:
        return text_field(body, "external_id"), options
    if not discoverable and options.allow is None:
        raise InvalidRequest(
            "external_id is missing; for whoever answers, say discoverable: true.",
            reason="missing_field",
        )
    if options.second_factor:
        raise InvalidRequest(
            "second_factor needs external_id: it is asked of somebody who is known.", reason="scope"
        )
    return ANYONE, options


def binding_challenge(body: Body) -> str | None:
    """The challenge of a browser binding, SHA-256 in base64url; None without one. There is no other
    method.
    """
    return _formed(body, "binding_challenge", _CHALLENGE, "43 characters of base64url, a SHA-256")


def binding_verifier(body: Body) -> str | None:
    """The verifier of a browser binding (RFC 7636 §4.1); None without one."""
    return _formed(body, "binding_verifier", _VERIFIER, "43 to 128 unreserved characters")


def _formed(body: Body, name: str, form: re.Pattern[str], described: str) -> str | None:
    if name not in body:
        return None
    value = body[name]
    if not isinstance(value, str) or not form.fullmatch(value):
        raise InvalidRequest(f"{name} is {described}.", reason="field_type")
    return value


def _user_verification(body: Body) -> UserVerification | None:
    value = body.get("user_verification")
    if value is not None and value not in get_args(UserVerification):
        raise InvalidRequest(
            'user_verification is "required", "preferred" or "discouraged".', reason="field_type"
        )
    return cast("UserVerification | None", value)


def _mediation(body: Body) -> Mediation:
    value = "required" if body.get("mediation") is None else body["mediation"]
    if value not in get_args(Mediation):
        raise InvalidRequest('mediation is "required" or "conditional".', reason="field_type")
    return cast("Mediation", value)


def _life(body: Body) -> float | None:
    """The life of the ceremony in seconds, from `timeout`."""
    value = body.get("timeout")
    if value is None:
        return None
    low, high = _TIMEOUT
    if type(value) is not int or not low <= value <= high:  # not isinstance: True is an int
        raise InvalidRequest(
            f"timeout is a whole number of milliseconds, {low} to {high}.", reason="field_type"
        )
    return value / 1000


# -- queries ---------------------------------------------------------------------------------------


def query_of(request: web.Request, *names: str) -> dict[str, str]:
    """The fields of the query. An unknown field is refused: a list that ignores a filter would be
    wrong.
    """
    query = read_query(request)
    for name in query:
        if name not in names:
            raise InvalidRequest(
                f"{name[:64]} is no field of this list; there are {', '.join(names)}."
            )
        if len(query.getall(name)) > 1:
            raise InvalidRequest(f"{name[:64]} is given twice.")
        if "\0" in query[name]:
            raise InvalidRequest(f"{name} has a NUL character.")
    return dict(query)


def whole(value: str | None, name: str, default: int, low: int, high: int) -> int:
    """A whole number in decimal digits; `default` if missing or empty."""
    if value is None or value == "":
        return default
    if (
        not value.isascii()
        or not value.isdigit()
        or len(value) > 12
        or not low <= int(value) <= high
    ):
        raise InvalidRequest(f"{name} is a whole number from {low} to {high}.")
    return int(value)


def page_and_limit(query: dict[str, str]) -> dict[str, int]:
    """The number of the page, and the items a page."""
    return {
        "page": whole(query.get("page"), "page", 1, 1, 1_000_000),
        "limit": whole(query.get("limit"), "limit", 10, 1, 500),
    }
