"""Refusals in Hanko's shape: `{title, details, status}`. All three are always present, because the
vendor's SDK throws only where an error has a body.

A title is the vendor's word for the step that failed, so it depends on the operation as well as on
the refusal. `TITLES` has the rows of each operation, and `_ANYWHERE` the rows of every operation. A
refusal without a row has the status' own name (RFC 7231 §6). `details` is the refusal's sentence,
or the vendor's second word where there is one. A caller without a key gets one title for every
refused sign-in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from aiohttp import web

from broker import errors
from broker.errors import Refusal
from broker.web import edge, json_answer

FIELDS = "fields"  # the reason of a refusal that lists the faults of a request's fields

STATUS: Mapping[type[Refusal], int] = {
    **edge.STATUS,
    errors.NoPasskeys: 400,
    errors.InvalidKey: 401,
    errors.UnknownNonce: 401,
    errors.UnknownTransaction: 401,
    errors.CeremonyRefused: 401,
    errors.DiscoverableRefused: 401,
    errors.WrongMailCode: 401,
    errors.UserDisabled: 403,
    errors.UnknownApp: 404,
    errors.UnknownUser: 404,
    errors.UnknownPasskey: 404,
    errors.UnknownTicket: 404,
    errors.UnknownMailCode: 404,
    errors.TooManyPasskeys: 409,
    errors.OwnedAlready: 409,
    errors.DuplicateApproval: 409,
}


class _Told(NamedTuple):
    """The vendor's title, details and status of a refusal. None: the name of the status, the
    refusal's sentence, the status of `STATUS`.
    """

    title: str | None = None
    details: str | None = None
    status: int | None = None


_Row = tuple[type[Refusal], str | None]
_SEND_A_KEY = "Send one of the app's API keys in the header apiKey."
_NO_CHALLENGE = "received challenge does not match with any stored one"

# By refusal and reason (None: any reason). First the rows of every operation …
_ANYWHERE: Mapping[_Row, _Told] = {
    (errors.InvalidRequest, None): _Told("unable to process request"),
    (errors.InvalidRequest, FIELDS): _Told("unable to validate request"),
    (errors.InvalidKey, None): _Told("The api key is invalid", _SEND_A_KEY),
    (errors.UnknownApp, None): _Told("tenant not found"),
    (errors.UnknownUser, None): _Told("user not found"),
    (errors.UserDisabled, None): _Told("user is disabled"),
    (errors.NoPasskeys, None): _Told("user has no suitable credentials for this operation"),
    (errors.TooManyPasskeys, None): _Told("user has too many credentials"),
    (errors.CeremonyRefused, None): _Told("failed to validate assertion"),
    (errors.UnknownTransaction, None): _Told("failed to get session data", _NO_CHALLENGE),
}
_REGISTRATION: Mapping[_Row, _Told] = {
    (errors.InvalidRequest, None): _Told("unable to parse credential creation response"),
    (errors.UnknownTransaction, None): _Told(_NO_CHALLENGE, status=400),
    (errors.CeremonyRefused, None): _Told("failed to validate attestation", status=400),
    (errors.CeremonyRefused, "user_verification"): _Told(
        "failed to validate attestation: the user was not verified: user verification is required",
        status=422,
    ),
    (errors.CeremonyRefused, "no_user"): _Told("user not found", status=404),
}
_LOGIN: Mapping[_Row, _Told] = {(errors.InvalidRequest, None): _Told("unable to finish login")}
# … then the rows of one operation, by its path below the tenant.
TITLES: Mapping[str, Mapping[_Row, _Told]] = {
    "registration/finalize": _REGISTRATION,
    "mfa/registration/finalize": _REGISTRATION,
    "login/initialize": {
        (errors.InvalidKey, "key_missing"): _Told("api key is missing", _SEND_A_KEY)
    },
    "login/finalize": _LOGIN,
    "mfa/login/finalize": _LOGIN,
    "transaction/initialize": {
        (errors.UnknownUser, None): _Told("unable to find user"),
        (errors.DuplicateApproval, None): _Told("transaction already exists"),
    },
    "transaction/finalize": {
        (errors.InvalidRequest, None): _Told("unable to finish transaction"),
        (errors.UnknownTransaction, None): _Told(
            "failed to get session data", "no transaction found for this challenge"
        ),
        (errors.CeremonyRefused, "user_handle"): _Told(
            "failed to get user handle", "user not found"
        ),
    },
    "transaction/{user_id}": {(errors.InvalidRequest, "user_id"): _Told("invalid user id")},
}
_BASE64URL = re.compile(r"[A-Za-z0-9_-]{1,1364}\Z")
# RFC 9110 has another name than RFC 7231, and Python from 3.13 on.
_RENAMED = {413: "Request Entity Too Large"}


def status_name(status: int) -> str:
    """The name of a status, the same on every Python version."""
    return _RENAMED.get(status) or HTTPStatus(status).phrase


def render(refusal: Refusal, request: web.Request | None = None) -> web.Response:
    """`{title, details, status}`, in the vendor's words for the requested operation."""
    told = _told(refusal, _operation(request))
    status = told.status or STATUS[type(refusal)]
    title = told.title or status_name(status)
    if isinstance(refusal, errors.UnknownPasskey) and request is not None:
        wanted = request.match_info.get("credential_id", "")
        title = f"credential with id '{wanted if _BASE64URL.match(wanted) else '…'}' not found"
    body = {
        "title": title,
        "details": told.details if told.details is not None else refusal.sentence,
        "status": status,
    }
    headers = {"WWW-Authenticate": "apiKey"} if isinstance(refusal, errors.InvalidKey) else {}
    return json_answer(body, status=status, headers=headers)


def _told(refusal: Refusal, operation: str) -> _Told:
    """The most specific row: the operation's before every operation's, a class before its base, a
    reason before any reason.
    """
    kinds = [kind for kind in type(refusal).__mro__ if issubclass(kind, Refusal)]
    for rows in (TITLES.get(operation, {}), _ANYWHERE):
        for kind in kinds:
            for row in ((kind, refusal.reason), (kind, None)):
                if row in rows:
                    return rows[row]
    return _Told()


def _operation(request: web.Request | None) -> str:
    """The route's template below the tenant; "" without a route."""
    resource = request.match_info.route.resource if request is not None else None
    return resource.canonical.partition("{app_id}/")[2] if resource is not None else ""
