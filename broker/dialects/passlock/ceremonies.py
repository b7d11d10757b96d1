"""Passlock's ceremonies: a backend authorises a ceremony, the page runs it, the backend exchanges
the code or verifies the id_token.

    authorize      keyed     -> registrationToken, authenticationToken: a transaction's id
    options        page      -> sessionToken: the handle of the pending ceremony
    verification   page      -> code: a nonce; id_token: a signed token
    principal      keyed     code -> the principal, once

Clients 2.0 to 2.4 have no call by the backend. Their pages send the ceremony options instead of a
token. A page has no key, so such an authentication is discoverable. `allowCredentials` narrows the
passkeys that may answer, and is not echoed. Such a registration creates an ownerless passkey, which
needs the policy `passlock_open_registration`.

Code and id_token are two proofs of one ceremony. `id` of the principal equals `jti` of the token,
so a backend that gets both recognises them as the same proof.
"""

from __future__ import annotations

import hashlib
from typing import Any

from aiohttp import web

from broker import ceremony
from broker.broker import Outcome, Signed
from broker.dialects.passlock import CODE_LIFE, OPENER, TOKEN_LIFE
from broker.dialects.passlock.fields import (
    Body,
    as_a_page_may,
    authentication_options,
    judge_rp_id,
    judge_rp_name,
    milliseconds,
    optional_short_text,
    registration_options,
    short_text,
    switch,
)
from broker.errors import InvalidRequest, OperationNotAllowed
from broker.model import (
    ANYONE,
    OWNERLESS_HINT,
    ByHandle,
    ByTransaction,
    Caller,
    ExpectedCeremony,
    ExpectedReceipt,
    Names,
    Receipt,
    RelyingParty,
    base64url,
)
from broker.web import BROKER, DIRECTORY, SETTINGS, Handler, bearer, json_answer, read_object
from broker.web.body import idempotency_of, text_field

_ISSUER = "passlock.dev"  # the vendor's verifier accepts no other issuer
_EXPECTED = ExpectedCeremony((OPENER,))

# -- authorize -------------------------------------------------------------------------------------


def authorize_registration(tag: str) -> Handler:
    """`{rpId, rpName?, userId, username, displayName?, excludeCredentials?, userVerification?,
    timeout?}` to `{registrationToken, expiresAt}`."""

    async def handle(request: web.Request, caller: Caller) -> web.StreamResponse:
        body = await read_object(request)
        judge_rp_id(body, caller.app)
        judge_rp_name(body)
        user_id, names = short_text(body, "userId"), _names(body)
        options, ends = registration_options(body), _transaction_ends(request, caller)
        token = await request.app[BROKER].open_registration(caller, user_id, names, options)
        return json_answer({"_tag": tag, "registrationToken": token, "expiresAt": ends})

    return handle


def authorize_authentication(tag: str) -> Handler:
    """`{rpId, userId?, allowCredentials?, discoverable?, mediation?, userVerification?, timeout?}`
    to `{authenticationToken, expiresAt}`. The request has `userId`, `allowCredentials` or both, or
    else `discoverable`."""

    async def handle(request: web.Request, caller: Caller) -> web.StreamResponse:
        body = await read_object(request)
        judge_rp_id(body, caller.app)
        user_id = optional_short_text(body, "userId")
        options = authentication_options(body, caller.app)
        discoverable = switch(body, "discoverable")
        if discoverable == (user_id is not None or options.allow is not None):
            raise InvalidRequest(
                "Give userId, allowCredentials or both, or else discoverable: true.", reason="scope"
            )
        if options.mediation == "conditional" and not discoverable:
            raise InvalidRequest("mediation: conditional needs discoverable: true.", reason="scope")
        ends = _transaction_ends(request, caller)
        token = await request.app[BROKER].open_authentication(
            caller, ANYONE if user_id is None else user_id, options
        )
        return json_answer({"_tag": tag, "authenticationToken": token, "expiresAt": ends})

    return handle


def _names(body: Body) -> Names:
    user_name = short_text(body, "username")
    display_name = optional_short_text(body, "displayName") or user_name
    return Names(user_name, display_name, display_name)


def _transaction_ends(request: web.Request, caller: Caller) -> int:
    """The end of a transaction that is opened now."""
    return milliseconds(request.app[DIRECTORY].now()) + caller.app.policy.transaction_life * 1000


# -- options ---------------------------------------------------------------------------------------


async def begin_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{registrationToken}`, or `{username, displayName?, excludeCredentials?, userVerification?,
    timeout?}` if the policy lets pages register, to `{sessionToken, optionsJSON}`."""
    body, broker = await read_object(request), request.app[BROKER]
    if "registrationToken" in body or "username" not in body:
        link = _transaction(body, "registrationToken")
        begun = await broker.begin_registration(caller, link, OPENER)
    else:
        judge_open(caller.app)
        names = _names(body)
        options = as_a_page_may(registration_options(body), caller.app)
        begun = await broker.begin_registration(
            caller, ANYONE, OPENER, names=names, options=options
        )
    return json_answer({"sessionToken": begun.handle, "optionsJSON": begun.public_key})


async def begin_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{authenticationToken}`, or `{allowCredentials?, userVerification?, rpId?, timeout?}` for a
    discoverable authentication, to `{sessionToken, optionsJSON, mediation}`."""
    body, broker = await read_object(request), request.app[BROKER]
    if "authenticationToken" in body:
        link = _transaction(body, "authenticationToken")
        begun = await broker.begin_authentication(caller, link, OPENER)
    else:
        if body.get("rpId") is not None:
            judge_rp_id(body, caller.app)
        options = as_a_page_may(authentication_options(body, caller.app), caller.app)
        begun = await broker.begin_authentication(caller, ANYONE, OPENER, options=options)
    return json_answer(
        {
            "sessionToken": begun.handle,
            "optionsJSON": begun.public_key,
            "mediation": begun.mediation,
        }
    )


def _transaction(body: Body, name: str) -> ByTransaction:
    """The transaction of a token. A transaction of a second factor is unknown here: this wire
    format has no second factor.
    """
    return ByTransaction(text_field(body, name), second_factor=False)


def judge_open(app: RelyingParty) -> None:
    """Require the policy `passlock_open_registration` for a page without a backend's token.

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


async def finish_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{sessionToken, response}` to `{principal, id_token, code}`."""
    body = await read_object(request)
    link = ByHandle(text_field(body, "sessionToken"))
    answer = ceremony.parse_registration(body.get("response"))
    outcome = await request.app[BROKER].finish_registration(
        caller, link, answer, _EXPECTED, _proofs(request, caller.app)
    )
    return _verified("RegistrationSuccess", outcome)


async def finish_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{sessionToken, response}` to `{principal, id_token, code}`."""
    body = await read_object(request)
    link = ByHandle(text_field(body, "sessionToken"))
    answer = ceremony.parse_authentication(body.get("response"))
    outcome = await request.app[BROKER].finish_authentication(
        caller, link, answer, _EXPECTED, _proofs(request, caller.app)
    )
    return _verified("AuthenticationSuccess", outcome)


def _verified(tag: str, outcome: Outcome) -> web.StreamResponse:
    receipt = outcome.receipt
    return json_answer(
        {
            "_tag": tag,
            "principal": {"authenticatorId": receipt.passkey_id, "userId": _user_id(receipt)},
            "id_token": outcome.token,
            "code": outcome.nonce,
        }
    )


def _proofs(request: web.Request, app: RelyingParty) -> Signed:
    """The signed token of a verification: the id_token, whose claims have exactly the types that
    the vendor's verifier requires, and the ceremony's purpose. The code is its nonce.
    """
    settings = request.app[SETTINGS]

    def claims(receipt: Receipt, code: str) -> dict[str, Any]:
        issued = int(receipt.at)
        return {
            "iss": _ISSUER,
            "aud": app.id,
            "sub": _user_id(receipt),
            "jti": _principal_id(code),
            "iat": issued,
            "exp": issued + settings[TOKEN_LIFE],
            "a:id": receipt.passkey_id,
            "a:typ": "passkey",
            "pk:uv": receipt.user_verified,
            "purpose": receipt.purpose,
        }

    return Signed(None, "RS256", claims, settings[CODE_LIFE])


def _user_id(receipt: Receipt) -> str:
    """The owner's id. An ownerless passkey has its own id there, as with the vendor."""
    return receipt.passkey_id if receipt.external_id is None else receipt.external_id


def _principal_id(code: str) -> str:
    """The id that code and id_token share: 256 bits that don't reveal the code."""
    return base64url(hashlib.sha256(f"principal:{code}".encode()).digest())


# -- exchange --------------------------------------------------------------------------------------


async def exchange_code(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Exchange the code in the path for its principal, once or idempotently."""
    receipt = await _redeem(request, caller)
    return _principal(request, receipt, _user_id(receipt))


async def exchange_code_for(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{userId}`: exchange the code of this user's passkey. An ownerless passkey gets this user as
    its owner.
    """
    user_id = short_text(await read_object(request), "userId")
    receipt = await _redeem(request, caller)
    if _user_id(receipt) != user_id:
        directory, passkey_id = request.app[DIRECTORY], receipt.passkey_id
        # The receipt of a repeated exchange has no owner, and the passkey has one.
        if (await directory.passkey(caller.app, passkey_id)).external_id != user_id:
            await directory.assign(caller.app, passkey_id, user_id)
    return _principal(request, receipt, user_id)


async def _redeem(request: web.Request, caller: Caller) -> Receipt:
    """The receipt of the code in the path, once, and again for the same idempotent request.
    Ownerless passkeys sign in while the policy permits them.
    """
    outcome = await request.app[BROKER].redeem(
        caller,
        request.match_info["code"],
        ExpectedReceipt(unowned=caller.app.policy.ownerless_registration),
        idempotency=await idempotency_of(request, bearer(request)),
    )
    return outcome.receipt


def _principal(request: web.Request, receipt: Receipt, user_id: str) -> web.StreamResponse:
    """The principal of a receipt. `metadata` is empty: a receipt has no address and no user
    agent.
    """
    passkey: Body = {"verified": True, "userVerified": receipt.user_verified}
    if receipt.authenticator_name_claimed is not None:
        passkey["platformName"] = receipt.authenticator_name_claimed
    issued = int(receipt.at) * 1000
    return json_answer(
        {
            "_tag": "ExtendedPrincipal",
            "id": _principal_id(request.match_info["code"]),
            "authenticatorId": receipt.passkey_id,
            "authenticatorType": "passkey",
            "userId": user_id,
            "createdAt": issued,
            "expiresAt": issued + request.app[SETTINGS][TOKEN_LIFE] * 1000,
            "passkey": passkey,
            "metadata": {},
            "purpose": receipt.purpose,
        }
    )
