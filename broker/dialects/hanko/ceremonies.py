"""Hanko's ceremonies: initialize and finalize of registration, login, second factor and
transaction, and the token they end with.

The options are WebAuthn's JSON inside `{"publicKey": …}`. Finalize takes the bare answer of the
browser; the challenge in it finds the pending ceremony, which is taken before anything is verified.
Nothing here looks at a signature or at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from broker import ceremony
from broker.dialects.hanko import ALGORITHM, TOKEN_LIFE
from broker.dialects.hanko.refusals import FIELDS
from broker.dialects.hanko.serialised import go_json_again
from broker.errors import InvalidKey, InvalidRequest
from broker.model import NO_OPTIONS, Approval, Caller, CeremonyOptions, Receipt, base64url
from broker.web import BROKER, SETTINGS, SIGNING, authorise, header, json_answer, read_object
from broker.web.body import parse_object, read_bytes

KEY = header("apiKey")
_NAME = 128  # characters
_SECOND_FACTOR = CeremonyOptions(second_factor=True)


# -- registration ----------------------------------------------------------------------------------


async def begin_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id, username, display_name?, icon?}` to the creation options. The user is made if
    there is none.
    """
    attachment = caller.app.policy.authenticator_attachment
    return await _begin_registration(
        request, caller, NO_OPTIONS, attachment=None if attachment == "any" else attachment
    )


async def begin_second_factor_registration(
    request: web.Request, caller: Caller
) -> web.StreamResponse:
    """As `begin_registration`, for a credential that is only a second factor; the app's policy for
    those holds.
    """
    return await _begin_registration(request, caller, _SECOND_FACTOR)


async def _begin_registration(
    request: web.Request, caller: Caller, asked: CeremonyOptions, **more: Any
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
    options = await request.app[BROKER].begin_registration_of(
        caller.app,
        user_id,
        opener="hanko",
        user_name=user_name,
        user_display_name=display_name if display_name.strip() else None,
        asked=asked,
        by="challenge",
        **more,
    )
    if icon:
        options["user"]["icon"] = icon
    return json_answer({"publicKey": options})


async def finish_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`."""
    answer = ceremony.parse_registration(await read_object(request))
    await _ready(request, caller)
    receipt = await request.app[BROKER].finish_registration_by(
        caller.app, answer, openers=("hanko",), second_factor=False, confirmed=False
    )
    return await _token(request, caller, receipt)


async def finish_second_factor_registration(
    request: web.Request, caller: Caller
) -> web.StreamResponse:
    """The same, keyed: so the passkey is confirmed."""
    answer = ceremony.parse_registration(await read_object(request))
    await _ready(request, caller)
    receipt = await request.app[BROKER].finish_registration_by(
        caller.app, answer, openers=("hanko",), second_factor=True, confirmed=True
    )
    return await _token(request, caller, receipt)


# -- login -----------------------------------------------------------------------------------------


async def begin_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id?}` or nothing to the request options; without a user it is discoverable. For
    callers whose key was seen.
    """
    return await _begin_login(request, caller, await _user_of_login(request))


async def begin_login_of_anyone(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The same for anybody: who names a user needs a key."""
    user_id = await _user_of_login(request)
    if user_id is not None:
        caller = await authorise(request, KEY)
    return await _begin_login(request, caller, user_id, keyless=user_id is None)


async def begin_login_of_nobody(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The same where no key is taken: nobody can name a user."""
    if await _user_of_login(request) is not None:
        raise InvalidKey(reason="key_not_taken_here")
    return await _begin_login(request, caller, None, keyless=True)


async def _user_of_login(request: web.Request) -> str | None:
    body = await bound(request)
    if body.get("user_id") is None:
        return None
    faults: list[str] = []
    if body["user_id"] == "":
        faults.append("user_id must at least have 1 entry")
    user_id = _optional(body, "user_id", faults)
    judge(faults)
    return user_id


async def _begin_login(
    request: web.Request,
    caller: Caller,
    user_id: str | None,
    asked: CeremonyOptions | None = None,
    *,
    keyless: bool = False,
) -> web.StreamResponse:
    options = await request.app[BROKER].begin_authentication_of(
        caller.app,
        user_id,
        opener="hanko_keyless" if keyless else "hanko",
        asked=asked or NO_OPTIONS,
        by="challenge",
        keyless=keyless,
    )
    return json_answer({"publicKey": options})


async def finish_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`."""
    answer = ceremony.parse_authentication(await read_object(request))
    await _ready(request, caller)
    receipt = await request.app[BROKER].finish_authentication_by(
        caller.app, answer, openers=("hanko", "hanko_keyless")
    )
    return await _token(request, caller, receipt)


async def begin_second_factor_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id}` to the request options; all the user's credentials may answer."""
    body = await bound(request)
    faults: list[str] = []
    user_id = required(body, "user_id", faults)
    judge(faults)
    return await _begin_login(request, caller, user_id, _SECOND_FACTOR)


async def finish_second_factor_login(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`."""
    answer = ceremony.parse_authentication(await read_object(request))
    await _ready(request, caller)
    receipt = await request.app[BROKER].finish_authentication_by(
        caller.app, answer, openers=("hanko",), second_factor=True
    )
    return await _token(request, caller, receipt)


# -- transaction: a payload that the user approves -------------------------------------------------


async def begin_approval(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user_id, transaction_id, transaction_data}` to the request options, whose challenge ends
    with the payload's hash: SHA-256(UTF-8 of the transaction id, then the data as `serialised`
    writes it)."""
    body = await bound(request)
    faults: list[str] = []
    user_id = required(body, "user_id", faults)
    identifier = required(body, "transaction_id", faults, limit=_NAME)
    if not _is_given(body.get("transaction_data")):
        faults.append("transaction_data is a required field")
    judge(faults)
    data = go_json_again(await read_bytes(request), "transaction_data")
    digest = hashlib.sha256((identifier + data).encode()).digest()
    options = await request.app[BROKER].begin_authentication_of(
        caller.app,
        user_id,
        opener="hanko",
        by="challenge",
        approval=Approval(identifier, data, digest),
    )
    return json_answer({"publicKey": options})


def _is_given(data: object) -> bool:
    """The vendor takes null, false, zero and "" for missing, and empty objects and lists for
    given.
    """
    return isinstance(data, dict | list) or bool(data)


async def finish_approval(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The browser's answer to `{token}`, whose `trans` is the transaction's id."""
    answer = ceremony.parse_authentication(await read_object(request))
    await _ready(request, caller)
    receipt = await request.app[BROKER].finish_authentication_by(
        caller.app, answer, openers=("hanko",), approved=True
    )
    return await _token(request, caller, receipt)


# -- token -----------------------------------------------------------------------------------------


async def _ready(request: web.Request, caller: Caller) -> None:
    """Before the challenge is taken: find out that a token can be made.

    Raises:
        Unavailable.
    """
    await request.app[SIGNING].ready(caller.app, caller.app.policy[ALGORITHM])


async def _token(request: web.Request, caller: Caller, receipt: Receipt) -> web.StreamResponse:
    """`{token}`. Its `jti` is a nonce that lives as long and can be redeemed once."""
    life = request.app[SETTINGS][TOKEN_LIFE]
    issued = int(receipt.at)
    claims: dict[str, Any] = {
        "aud": [caller.app.rp_id],
        "cred": base64url(receipt.credential_id),
        "exp": issued + life,
        "iat": issued,
        "jti": await request.app[BROKER].hand_out(caller.app, receipt, life),
        "purpose": receipt.proof,
        "sub": receipt.external_id,
    }
    if receipt.approval is not None:
        claims["trans"] = receipt.approval
    token = await request.app[SIGNING].sign(caller.app, caller.app.policy[ALGORITHM], claims)
    return json_answer({"token": token})


# -- fields ----------------------------------------------------------------------------------------


async def bound(request: web.Request) -> dict[str, Any]:
    """The body of a route that is not a finalize: none at all is `{}`, and any other is labelled as
    JSON.

    Raises:
        InvalidRequest: another label, or as `read_object`.
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
    """A field that must be a non-empty string; what is wrong with it joins `faults`, but for a
    wrong type.
    """
    value = _optional(body, name, faults, limit=limit)
    if not value:
        faults.append(f"{name} is a required field")
    return value


def judge(faults: list[str]) -> None:
    """Refuse a request with all the faults of its fields at once."""
    if faults:
        raise InvalidRequest(" and ".join(faults), reason=FIELDS)


def _optional(
    body: Mapping[str, Any], name: str, faults: list[str], *, limit: int | None = None
) -> str:
    """A field that may be missing or null (both "")."""
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
