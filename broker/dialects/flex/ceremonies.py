"""Keyed ceremonies in the Flex API, beyond the contract: a backend carries the page's
messages itself. No transaction, no nonce.

    POST /register/start                  {external_id, user_name, …} -> {options}
    POST /register/finish                 {external_id, credential} -> the receipt
    POST /authenticate/start              {external_id, …} -> {options}
    POST /authenticate/finish             {external_id, credential} -> the receipt

are joined by the user: each has one pending ceremony of each purpose, and finish says again whose
it is.

    POST /ceremonies/register/start       the same and `second_factor`
    POST /ceremonies/register/finish      {credential, second_factor?} -> the receipt
    POST /ceremonies/authenticate/start   {external_id}, {passkeys} or {discoverable: true};
                                          `second_factor`, `approval` {id, data}
    POST /ceremonies/authenticate/finish  {credential, second_factor?, approval?: true} -> the
                                          receipt

are joined by the challenge: any number may be open for a user, and the receipt says who it was.
Finish says what kind of ceremony it is for, so that a second factor never passes for a sign-in and
what was signed as an approval is nothing else. The optional fields of `broker.dialects.flex.fields`
hold for every start.

The finish is the redemption: a new passkey is confirmed, and live under any policy.
"""

from __future__ import annotations

from aiohttp import web

from broker import ceremony
from broker.dialects.flex.canonical import approval_digest, canonical
from broker.dialects.flex.fields import (
    Body,
    asked_of_authentication,
    asked_of_registration,
    attachment,
    switch,
)
from broker.dialects.flex.objects import receipt_object
from broker.errors import InvalidRequest
from broker.model import Approval, Caller, CeremonyOptions, validate_text
from broker.web import BROKER, json_answer, keyed, read_object
from broker.web.body import optional_text, text_field

# -- joined by the user ----------------------------------------------------------------------------


async def begin_registration_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, user_name, user_display_name?, passkey_display_name?,
    authenticator_attachment?, …}` to `{options}`.
    """
    return await _begin_registration(request, caller, by_user=True)


async def finish_registration_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, credential}` to the receipt."""
    body = await read_object(request)
    external_id, answer = (
        text_field(body, "external_id"),
        ceremony.parse_registration(body.get("credential")),
    )
    return json_answer(
        receipt_object(
            await request.app[BROKER].finish_registration_of(
                caller.app, external_id, answer, opener="keyed"
            )
        )
    )


async def begin_authentication_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, …}` to `{options}`."""
    body = await read_object(request)
    external_id, asked = text_field(body, "external_id"), asked_of_authentication(body)[1]
    _judge_by_user(asked)
    options = await request.app[BROKER].begin_authentication_of(
        caller.app, external_id, opener="keyed", asked=asked
    )
    return json_answer({"options": options})


async def finish_authentication_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, credential}` to the receipt."""
    body = await read_object(request)
    external_id, answer = (
        text_field(body, "external_id"),
        ceremony.parse_authentication(body.get("credential")),
    )
    return json_answer(
        receipt_object(
            (
                await request.app[BROKER].finish_authentication_of(
                    caller.app, external_id, answer, opener="keyed"
                )
            ).receipt()
        )
    )


# -- joined by the challenge -----------------------------------------------------------------------


async def begin_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """As `begin_registration_of`."""
    return await _begin_registration(request, caller, by_user=False)


async def finish_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{credential, second_factor?}` to the receipt."""
    body = await read_object(request)
    second_factor, answer = (
        switch(body, "second_factor"),
        ceremony.parse_registration(body.get("credential")),
    )
    receipt = await request.app[BROKER].finish_registration_by(
        caller.app, answer, openers=("keyed",), second_factor=second_factor, confirmed=True
    )
    return json_answer(receipt_object(receipt))


async def begin_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id?, passkeys?, discoverable?, approval?, …}` to `{options}`."""
    body = await read_object(request)
    external_id, asked = asked_of_authentication(body)
    approval = _approval(body["approval"]) if "approval" in body else None
    if approval is not None and external_id is None:
        raise InvalidRequest(
            "approval needs external_id: somebody is asked to approve.", reason="scope"
        )
    options = await request.app[BROKER].begin_authentication_of(
        caller.app, external_id, opener="keyed", asked=asked, by="challenge", approval=approval
    )
    return json_answer({"options": options})


async def finish_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{credential, second_factor?, approval?}` to the receipt, whose `approval` says what was
    approved.
    """
    body = await read_object(request)
    second_factor, approved = switch(body, "second_factor"), switch(body, "approval")
    answer = ceremony.parse_authentication(body.get("credential"))
    receipt = await request.app[BROKER].finish_authentication_by(
        caller.app, answer, openers=("keyed",), second_factor=second_factor, approved=approved
    )
    return json_answer(receipt_object(receipt))


async def _begin_registration(
    request: web.Request, caller: Caller, *, by_user: bool
) -> web.StreamResponse:
    body = await read_object(request)
    asked = asked_of_registration(body)
    if by_user:
        _judge_by_user(asked)
    options = await request.app[BROKER].begin_registration_of(
        caller.app,
        text_field(body, "external_id"),
        opener="keyed",
        user_name=text_field(body, "user_name"),
        user_display_name=optional_text(body, "user_display_name"),
        nickname=optional_text(body, "passkey_display_name"),
        attachment=attachment(body, caller.app, second_factor=asked.second_factor),
        asked=asked,
        by="user" if by_user else "challenge",
    )
    return json_answer({"options": options})


def _judge_by_user(asked: CeremonyOptions) -> None:
    """One pending ceremony of each purpose: a second factor's would be the sign-in's, and finish
    could not tell them apart.
    """
    if asked.second_factor:
        raise InvalidRequest(
            "second_factor is for transactions and for the routes below ceremonies/.",
            reason="scope",
        )


def _approval(value: object) -> Approval:
    """`{id, data}`: the caller's id, new in the app, and any JSON value."""
    if not isinstance(value, dict) or "data" not in value:
        raise InvalidRequest("approval is an object of id and data.", reason="field_type")
    approval: Body = value
    identifier = approval.get("id")
    if not isinstance(identifier, str):
        raise InvalidRequest("approval.id is not a string.", reason="field_type")
    validate_text(identifier, "approval.id")
    data = canonical(approval["data"])
    return Approval(identifier, data, approval_digest(identifier, approval["data"]))


def routes(base: str) -> list[web.RouteDef]:
    """The keyed routes below `base`, the path of an app."""
    return [
        web.post(f"{base}/register/start", keyed(begin_registration_of)),
        web.post(f"{base}/register/finish", keyed(finish_registration_of)),
        web.post(f"{base}/authenticate/start", keyed(begin_authentication_of)),
        web.post(f"{base}/authenticate/finish", keyed(finish_authentication_of)),
        web.post(f"{base}/ceremonies/register/start", keyed(begin_registration)),
        web.post(f"{base}/ceremonies/register/finish", keyed(finish_registration)),
        web.post(f"{base}/ceremonies/authenticate/start", keyed(begin_authentication)),
        web.post(f"{base}/ceremonies/authenticate/finish", keyed(finish_authentication)),
    ]
