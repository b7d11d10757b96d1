"""Hanko's ceremonies: initialize and finalize of registration, login, second factor and
transaction, and the signed token of finalize.

The options are WebAuthn's JSON inside `{"publicKey": …}`. The body of finalize is the browser's
answer. The challenge in the answer finds the pending ceremony, which is taken before verification.
This module verifies no signature and no time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from broker import ceremony
from broker.broker import Signed, require_binding
from broker.dialects.hanko import ALGORITHM, KEYLESS, OPENER, TOKEN_LIFE
from broker.dialects.hanko.refusals import FIELDS
from broker.dialects.hanko.serialised import go_json_again
from broker.errors import InvalidKey, InvalidRequest
from broker.model import (
    ANYONE,
    NO_OPTIONS,
    Anyone,
    Approval,
    ByChallenge,
    Caller,
    CeremonyOptions,
    ExpectedCeremony,
    Names,
    Receipt,
    RelyingParty,
    base64url,
)
from broker.web import BROKER, RATE_LIMITS, SETTINGS, authorise, header, json_answer, read_object
from broker.web.body import parse_object, read_bytes

KEY = header("apiKey")
_NAME = 128  # characters
_SECOND_FACTOR = CeremonyOptions(second_factor=True)


# -- registration ----------------------------------------------------------------------------------


async def begin_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id, username, display_name?, icon?}` to the creation options. A missing user is
    created.
    """
    return await _begin_registration(request, caller, NO_OPTIONS)


async def begin_second_factor_registration(
    request: web.Request, caller: Caller
) -> web.StreamResponse:
    """As `begin_registration`, for a credential that is only a second factor, under the app's
    policy for second factors.
    """
    return await _begin_registration(request, caller, _SECOND_FACTOR)


async def _begin_registration(
    request: web.Request, caller: Caller, options: CeremonyOptions
) -> web.StreamResponse:
    body = await bound(request)
    faults: list[str] = []
    user_id = required(body, "user_id", faults)
    user_name = required(body, "username", faults, limit=_NAME)
    display_name = _optional(body, "display_name", faults, limit=_NAME)
    icon = _optional(body, "icon", faults)
    if icon and not _is_url(icon):
        faults.append("icon must be a valid URL")
    judge(faults)
    names = Names(user_name, display_name if display_name.strip() else user_name)
    require_binding(caller.app, options)
    begun = await request.app[BROKER].begin_registration(
        caller, ByChallenge(user_id), OPENER, names=names, options=options
    )
    if icon:
        begun.public_key["user"]["icon"] = icon
    return json_answer({"publicKey": begun.public_key})


async def finish_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`."""
    return await _finish_registration(request, caller, ExpectedCeremony((OPENER,)))


async def finish_second_factor_registration(
    request: web.Request, caller: Caller
) -> web.StreamResponse:
    """The browser's answer to `{token}`. The call is keyed, so the passkey is confirmed."""
    return await _finish_registration(request, caller, ExpectedCeremony((OPENER,), True))


async def _finish_registration(
    request: web.Request, caller: Caller, expect: ExpectedCeremony
) -> web.StreamResponse:
    answer = ceremony.parse_registration(await read_object(request))
    outcome = await request.app[BROKER].finish_registration(
        caller, ByChallenge(), answer, expect, _token(request, caller.app)
    )
    return json_answer({"token": outcome.token})


# -- login -----------------------------------------------------------------------------------------


async def begin_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id?}` or an empty body to the request options. Without a user the login is
    discoverable. A page that names a user needs a key.
    """
    user_id = await _user_of_login(request)
    if user_id is not ANYONE and caller.key_id is None:
        caller = await authorise(request, KEY)
        request.app[RATE_LIMITS].keyed_call(caller)
    return await _begin_login(request, caller, user_id)


async def begin_login_of_anyone(request: web.Request, caller: Caller) -> web.StreamResponse:
    """An empty body to the request options, on a port that takes no keys: a named user is
    refused.
    """
    if await _user_of_login(request) is not ANYONE:
        raise InvalidKey(reason="key_not_taken_here")
    return await _begin_login(request, caller, ANYONE)


async def _user_of_login(request: web.Request) -> str | Anyone:
    body = await bound(request)
    if body.get("user_id") is None:
        return ANYONE
    faults: list[str] = []
    if body["user_id"] == "":
        faults.append("user_id must at least have 1 entry")
    user_id = _optional(body, "user_id", faults)
    judge(faults)
    return user_id


async def _begin_login(
    request: web.Request,
    caller: Caller,
    user_id: str | Anyone,
    options: CeremonyOptions = NO_OPTIONS,
    approval: Approval | None = None,
) -> web.StreamResponse:
    require_binding(caller.app, options)
    begun = await request.app[BROKER].begin_authentication(
        caller,
        ByChallenge(user_id),
        OPENER if caller.key_id else KEYLESS,
        options=options,
        approval=approval,
    )
    return json_answer({"publicKey": begun.public_key})


async def finish_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`."""
    return await _finish_login(request, caller, ExpectedCeremony((OPENER, KEYLESS)))


async def begin_second_factor_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id}` to the request options. All credentials of the user may answer."""
    body = await bound(request)
    faults: list[str] = []
    user_id = required(body, "user_id", faults)
    judge(faults)
    return await _begin_login(request, caller, user_id, _SECOND_FACTOR)


async def finish_second_factor_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`."""
    return await _finish_login(request, caller, ExpectedCeremony((OPENER,), second_factor=True))


# -- transaction: a payload that the user approves -------------------------------------------------


async def begin_approval(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id, transaction_id, transaction_data}` to the request options. The challenge ends with
    the payload's hash: SHA-256(UTF-8 of the transaction id, then the data as `serialised` writes
    it)."""
    body = await bound(request)
    faults: list[str] = []
    user_id = required(body, "user_id", faults)
    identifier = required(body, "transaction_id", faults, limit=_NAME)
    if not _is_given(body.get("transaction_data")):
        faults.append("transaction_data is a required field")
    judge(faults)
    data = go_json_again(await read_bytes(request), "transaction_data")
    digest = hashlib.sha256((identifier + data).encode()).digest()
    approval = Approval(identifier, data, digest)
    return await _begin_login(request, caller, user_id, approval=approval)


def _is_given(data: object) -> bool:
    """True if the vendor treats the payload as present. The vendor treats null, false, zero and ""
    as missing, and empty objects and lists as present.
    """
    return isinstance(data, dict | list) or bool(data)


async def finish_approval(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`. The token's claim `trans` is the transaction's id."""
    return await _finish_login(request, caller, ExpectedCeremony((OPENER,), approval=True))


# -- token -----------------------------------------------------------------------------------------


async def _finish_login(
    request: web.Request, caller: Caller, expect: ExpectedCeremony
) -> web.StreamResponse:
    answer = ceremony.parse_authentication(await read_object(request))
    outcome = await request.app[BROKER].finish_authentication(
        caller, ByChallenge(), answer, expect, _token(request, caller.app)
    )
    return json_answer({"token": outcome.token})


def _token(request: web.Request, app: RelyingParty) -> Signed:
    """The signed token of a finalize. The token's `jti` is a nonce with the same life, which can be
    redeemed once.
    """
    life = request.app[SETTINGS][TOKEN_LIFE]

    def claims(receipt: Receipt, nonce: str) -> dict[str, Any]:
        issued = int(receipt.at)
        found: dict[str, Any] = {
            "aud": [app.rp_id],
            "cred": base64url(receipt.credential_id),
            "exp": issued + life,
            "iat": issued,
            "jti": nonce,
            "purpose": receipt.proof,
            "sub": receipt.external_id,
        }
        return found if receipt.approval is None else found | {"trans": receipt.approval}

    return Signed(app, app.policy[ALGORITHM], claims, life)


# -- fields ----------------------------------------------------------------------------------------


async def bound(request: web.Request) -> dict[str, Any]:
    """The body of a route other than finalize. An empty body is `{}`; any other needs the content
    type of JSON.

    Raises:
        InvalidRequest: another content type, or as `read_object`.
    """
    body = await read_bytes(request)
    if not body:
        return {}
    if not request.headers.get(hdrs.CONTENT_TYPE, "").lower().startswith("application/json"):
        raise InvalidRequest("Send the body as application/json.", reason="content_type")
    return parse_object(body)


def required(
    body: Mapping[str, Any], name: str, faults: list[str], *, limit: int | None = None
) -> str:
    """A required field: a non-empty string. Faults are appended to `faults`, except a wrong type,
    which is refused at once.
    """
    value = _optional(body, name, faults, limit=limit)
    if not value:
        faults.append(f"{name} is a required field")
    return value


def judge(faults: list[str]) -> None:
    """Refuse a request that has faults. The refusal lists them all."""
    if faults:
        raise InvalidRequest(" and ".join(faults), reason=FIELDS)


def _optional(
    body: Mapping[str, Any], name: str, faults: list[str], *, limit: int | None = None
) -> str:
    """An optional field; missing and null give ""."""
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is not a string.", reason="field_type")
    if limit is not None and len(value) > limit:
        faults.append(f"{name} cannot have more than {limit} entries")
    return value


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    return bool(parts.scheme and (parts.netloc or parts.path))
