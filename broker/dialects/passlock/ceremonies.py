"""Passlock's ceremonies: a backend authorises one, the page runs it, the backend exchanges the code
or checks the id_token.

    authorize      keyed     -> registrationToken, authenticationToken: a transaction's id
    options        page      -> sessionToken: the handle of the pending ceremony
    verification   page      -> code: a nonce; id_token: a signed token
    principal      keyed     code -> who, once

Clients before the backend's part (2.0 to 2.4) send the ceremony's wishes from the page instead of a
token. As a page has no key, such an authentication is a discoverable one, and `allowCredentials`
narrows whom it takes without being read back. Such a registration makes a passkey that nobody owns;
it needs the policy `passlock_open_registration`.

Code and id_token are two proofs of one ceremony, and `id` of the one is `jti` of the other: a
backend that may be shown both can tell.
"""

from __future__ import annotations

import hashlib
from typing import Any

from aiohttp import web

from broker import ceremony
from broker.broker import Begun
from broker.dialects.passlock import CODE_LIFE, TOKEN_LIFE
from broker.dialects.passlock.fields import (
    Body,
    as_a_page_may,
    asked_of_authentication,
    asked_of_registration,
    judge_rp_id,
    judge_rp_name,
    milliseconds,
    optional_short_text,
    short_text,
    switch,
)
from broker.errors import InvalidRequest, OperationNotAllowed
from broker.model import OWNERLESS_HINT, Attachment, Caller, Receipt, RelyingParty, base64url
from broker.web import BROKER, DIRECTORY, SETTINGS, SIGNING, Handler, json_answer, read_object
from broker.web.body import text_field

_ISSUER = "passlock.dev"  # whoever signs: the vendor's verifier takes no other

# -- authorize -------------------------------------------------------------------------------------


def authorize_registration(tag: str) -> Handler:
    """`{rpId, rpName?, userId, username, displayName?, excludeCredentials?, userVerification?,
    timeout?}` to `{registrationToken, expiresAt}`."""

    async def handle(request: web.Request, caller: Caller) -> web.StreamResponse:
        body = await read_object(request)
        judge_rp_id(body, caller.app)
        judge_rp_name(body)
        user_id, user_name = short_text(body, "userId"), short_text(body, "username")
        display_name = optional_short_text(body, "displayName") or user_name
        asked, ends = asked_of_registration(body), _transaction_ends(request, caller)
        token = await request.app[BROKER].open_registration(
            caller.app, user_id, display_name, user_name=user_name, asked=asked
        )
        return json_answer({"_tag": tag, "registrationToken": token, "expiresAt": ends})

    return handle


def authorize_authentication(tag: str) -> Handler:
    """`{rpId, userId?, allowCredentials?, discoverable?, mediation?, userVerification?, timeout?}`
    to `{authenticationToken, expiresAt}`. Whom it is about is said once: by `userId`,
    `allowCredentials` or both, or by `discoverable`."""

    async def handle(request: web.Request, caller: Caller) -> web.StreamResponse:
        body = await read_object(request)
        judge_rp_id(body, caller.app)
        user_id, asked = (
            optional_short_text(body, "userId"),
            asked_of_authentication(body, caller.app),
        )
        discoverable, scoped = (
            switch(body, "discoverable"),
            user_id is not None or asked.allow is not None,
        )
        if discoverable == scoped:
            raise InvalidRequest(
                "Give userId, allowCredentials or both, or else discoverable: true.", reason="scope"
            )
        if asked.mediation == "conditional" and not discoverable:
            raise InvalidRequest("mediation: conditional needs discoverable: true.", reason="scope")
        ends = _transaction_ends(request, caller)
        token = await request.app[BROKER].open_authentication(caller.app, user_id, asked=asked)
        return json_answer({"_tag": tag, "authenticationToken": token, "expiresAt": ends})

    return handle


def _transaction_ends(request: web.Request, caller: Caller) -> int:
    """When a transaction that is opened now ends."""
    return milliseconds(request.app[DIRECTORY].now()) + caller.app.policy.transaction_life * 1000


# -- options ---------------------------------------------------------------------------------------


async def registration_options(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{registrationToken}`, or `{username, displayName?, excludeCredentials?, userVerification?,
    timeout?}` where pages may register, to `{sessionToken, optionsJSON}`."""
    body, broker = await read_object(request), request.app[BROKER]
    attachment = caller.app.policy.authenticator_attachment
    wanted: Attachment | None = None if attachment == "any" else attachment
    if "registrationToken" in body or "username" not in body:
        begun = await broker.begin_registration(
            caller.app,
            text_field(body, "registrationToken"),
            wanted,
            opener="passlock",
            second_factors=False,
        )
    else:
        judge_open(caller.app)
        user_name = short_text(body, "username")
        display_name = optional_short_text(body, "displayName") or user_name
        asked = as_a_page_may(asked_of_registration(body), caller.app)
        begun = await broker.begin_registration_of_nobody(
            caller.app, user_name, display_name, wanted, opener="passlock", asked=asked
        )
    return json_answer(_begun(begun))


async def authentication_options(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{authenticationToken}`, or `{allowCredentials?, userVerification?, rpId?, timeout?}` for a
    discoverable authentication, to `{sessionToken, optionsJSON, mediation}`."""
    body = await read_object(request)
    broker = request.app[BROKER]
    if "authenticationToken" in body:
        begun = await broker.begin_authentication(
            caller.app,
            text_field(body, "authenticationToken"),
            opener="passlock",
            second_factors=False,
        )
    else:
        if body.get("rpId") is not None:
            judge_rp_id(body, caller.app)
        asked = as_a_page_may(asked_of_authentication(body, caller.app), caller.app)
        begun = await broker.begin_authentication(caller.app, None, opener="passlock", asked=asked)
    return json_answer(_begun(begun) | {"mediation": begun.mediation})


def _begun(begun: Begun) -> Body:
    return {"sessionToken": begun.handle, "optionsJSON": begun.options}


def judge_open(app: RelyingParty) -> None:
    """What a page may do without a backend's word, it may where the policy says so.

    Raises:
        OperationNotAllowed.
    """
    if not app.policy.ownerless_registration:
        raise OperationNotAllowed(
            "This page can't do that by itself; tell whoever runs this site.",
            reason="not_open",
            hint="Have the backend authorise it. " + OWNERLESS_HINT,
        )


# -- verification ----------------------------------------------------------------------------------


async def verify_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{sessionToken, response}` to `{principal, id_token, code}`."""
    body = await read_object(request)
    handle, answer = (
        text_field(body, "sessionToken"),
        ceremony.parse_registration(body.get("response")),
    )
    await _judge_signing(request)
    code, receipt = await request.app[BROKER].finish_registration_with_receipt(
        caller.app,
        handle,
        None,
        answer,
        opener="passlock",
        nonce_life=request.app[SETTINGS][CODE_LIFE],
    )
    return await _verified(request, caller, "RegistrationSuccess", code, receipt)


async def verify_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{sessionToken, response}` to `{principal, id_token, code}`."""
    body = await read_object(request)
    handle, answer = (
        text_field(body, "sessionToken"),
        ceremony.parse_authentication(body.get("response")),
    )
    await _judge_signing(request)
    code, receipt = await request.app[BROKER].finish_authentication_with_receipt(
        caller.app,
        handle,
        None,
        answer,
        opener="passlock",
        nonce_life=request.app[SETTINGS][CODE_LIFE],
    )
    return await _verified(request, caller, "AuthenticationSuccess", code, receipt)


async def _judge_signing(request: web.Request) -> None:
    """Before anything is taken: find out whether there is a key to sign with.

    Raises:
        Unavailable.
    """
    await request.app[SIGNING].ready(None, "RS256")


async def _verified(
    request: web.Request, caller: Caller, tag: str, code: str, receipt: Receipt
) -> web.StreamResponse:
    claims = _claims(caller.app, receipt, code, request.app[SETTINGS][TOKEN_LIFE])
    return json_answer(
        {
            "_tag": tag,
            "principal": {"authenticatorId": receipt.passkey_id, "userId": receipt.external_id},
            "id_token": await request.app[SIGNING].sign(None, "RS256", claims),
            "code": code,
        }
    )


def _claims(app: RelyingParty, receipt: Receipt, code: str, life: int) -> dict[str, Any]:
    """Those that the vendor's verifier requires, each of exactly this type, and the ceremony's
    purpose.
    """
    issued = int(receipt.at)
    return {
        "iss": _ISSUER,
        "aud": app.id,
        "sub": receipt.external_id,
        "jti": _principal_id(code),
        "iat": issued,
        "exp": issued + life,
        "a:id": receipt.passkey_id,
        "a:typ": "passkey",
        "pk:uv": receipt.user_verified,
        "purpose": receipt.purpose,
    }


def _principal_id(code: str) -> str:
    """What code and id_token have in common: 256 bits from which nobody gets to the code."""
    return base64url(hashlib.sha256(f"principal:{code}".encode()).digest())


# -- exchange --------------------------------------------------------------------------------------


async def exchange_code(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The code in the path to its principal, once."""
    code = request.match_info["code"]
    return _principal(request, code, await _redeem(request, caller, code))


async def exchange_code_for(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{userId}`: the same, of this user's passkey; one that nobody owned is this user's from now
    on.
    """
    body = await read_object(request)
    code, user_id = request.match_info["code"], short_text(body, "userId")
    receipt = await _redeem(request, caller, code)
    if receipt.external_id != user_id:
        await request.app[DIRECTORY].assign(caller.app, receipt.passkey_id, user_id)
    return _principal(request, code, receipt._replace(external_id=user_id))


async def _redeem(request: web.Request, caller: Caller, code: str) -> Receipt:
    """What nobody owns signs in here, while the policy stands."""
    return await request.app[BROKER].redeem(
        caller.app, code, ownerless=caller.app.policy.ownerless_registration
    )


def _principal(request: web.Request, code: str, receipt: Receipt) -> web.StreamResponse:
    """`metadata` is empty: no address and no user agent of anybody is kept here."""
    passkey: Body = {"verified": True, "userVerified": receipt.user_verified}
    if receipt.authenticator_name_claimed is not None:
        passkey["platformName"] = receipt.authenticator_name_claimed
    issued = int(receipt.at) * 1000
    return json_answer(
        {
            "_tag": "ExtendedPrincipal",
            "id": _principal_id(code),
            "authenticatorId": receipt.passkey_id,
            "authenticatorType": "passkey",
            "userId": receipt.external_id,
            "createdAt": issued,
            "expiresAt": issued + request.app[SETTINGS][TOKEN_LIFE] * 1000,
            "passkey": passkey,
            "metadata": {},
            "purpose": receipt.purpose,
        }
    )
