"""Keyed ceremonies in the Flex API, beyond the contract: a backend relays the page's messages,
without a transaction and without a nonce.

    POST /register/start                  {external_id, user_name, …} -> {options}
    POST /register/finish                 {external_id, credential} -> the receipt
    POST /authenticate/start              {external_id, …} -> {options}
    POST /authenticate/finish             {external_id, credential} -> the receipt

Finish finds these by the user: a user has one pending ceremony of each purpose.

    POST /ceremonies/register/start       the same and `second_factor`
    POST /ceremonies/register/finish      {credential, second_factor?} -> the receipt
    POST /ceremonies/authenticate/start   {external_id}, {passkeys} or {discoverable: true};
                                          `second_factor`, `approval` {id, data}
    POST /ceremonies/authenticate/finish  {credential, second_factor?, approval?: true} -> the
                                          receipt

Finish finds these by the challenge: a user may have any number of them, and the receipt names the
user. Finish states the kind of ceremony that it expects. So a second factor or an approval never
passes for a sign-in. Every start takes the optional fields of `broker.dialects.flex.fields`.

Finish redeems at once: a new passkey is confirmed, and live under any policy.
"""

from __future__ import annotations

from aiohttp import web

from broker import ceremony
from broker.broker import Outcome
from broker.dialects.flex import KEYED
from broker.dialects.flex.canonical import approval_digest, canonical
from broker.dialects.flex.fields import (
    Body,
    attachment,
    authentication_options,
    registration_options,
    switch,
)
from broker.dialects.flex.objects import receipt_object
from broker.errors import InvalidRequest
from broker.model import (
    ANYONE,
    Approval,
    ByChallenge,
    ByUser,
    Caller,
    CeremonyOptions,
    ExpectedCeremony,
    Names,
    validate_text,
)
from broker.web import BROKER, json_answer, keyed, read_object
from broker.web.body import optional_text, text_field

_BY_USER = ExpectedCeremony((KEYED,))

# -- joined by the user ----------------------------------------------------------------------------


async def begin_registration_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, user_name, user_display_name?, passkey_display_name?,
    authenticator_attachment?, …}` to `{options}`.
    """
    body = await read_object(request)
    options = registration_options(body)
    _judge_by_user(options)
    return await _begin_registration(
        request, caller, ByUser(text_field(body, "external_id")), body, options
    )


async def finish_registration_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, credential}` to the receipt."""
    body = await read_object(request)
    link = ByUser(text_field(body, "external_id"))
    answer = ceremony.parse_registration(body.get("credential"))
    return _receipt(await request.app[BROKER].finish_registration(caller, link, answer, _BY_USER))


async def begin_authentication_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, …}` to `{options}`."""
    body = await read_object(request)
    link, options = ByUser(text_field(body, "external_id")), authentication_options(body)[1]
    _judge_by_user(options)
    begun = await request.app[BROKER].begin_authentication(caller, link, KEYED, options=options)
    return json_answer({"options": begun.public_key})


async def finish_authentication_of(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id, credential}` to the receipt."""
    body = await read_object(request)
    link = ByUser(text_field(body, "external_id"))
    answer = ceremony.parse_authentication(body.get("credential"))
    return _receipt(await request.app[BROKER].finish_authentication(caller, link, answer, _BY_USER))


# -- joined by the challenge -----------------------------------------------------------------------


async def begin_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """As `begin_registration_of`."""
    body = await read_object(request)
    options = registration_options(body)
    return await _begin_registration(
        request, caller, ByChallenge(text_field(body, "external_id")), body, options
    )


async def finish_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{credential, second_factor?}` to the receipt."""
    body = await read_object(request)
    expect = ExpectedCeremony((KEYED,), switch(body, "second_factor"))
    answer = ceremony.parse_registration(body.get("credential"))
    return _receipt(
        await request.app[BROKER].finish_registration(caller, ByChallenge(), answer, expect)
    )


async def begin_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{external_id?, passkeys?, discoverable?, approval?, …}` to `{options}`."""
    body = await read_object(request)
    external_id, options = authentication_options(body)
    approval = _approval(body["approval"]) if "approval" in body else None
    if approval is not None and external_id is ANYONE:
        raise InvalidRequest(
            "approval needs external_id: somebody is asked to approve.", reason="scope"
        )
    begun = await request.app[BROKER].begin_authentication(
        caller, ByChallenge(external_id), KEYED, options=options, approval=approval
    )
    return json_answer({"options": begun.public_key})


async def finish_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{credential, second_factor?, approval?}` to the receipt, whose `approval` is the id of the
    approval.
    """
    body = await read_object(request)
    expect = ExpectedCeremony((KEYED,), switch(body, "second_factor"), switch(body, "approval"))
    answer = ceremony.parse_authentication(body.get("credential"))
    return _receipt(
        await request.app[BROKER].finish_authentication(caller, ByChallenge(), answer, expect)
    )


async def _begin_registration(
    request: web.Request,
    caller: Caller,
    link: ByUser | ByChallenge,
    body: Body,
    options: CeremonyOptions,
) -> web.StreamResponse:
    user_name = text_field(body, "user_name")
    begun = await request.app[BROKER].begin_registration(
        caller,
        link,
        KEYED,
        names=Names(
            user_name,
            optional_text(body, "user_display_name") or user_name,
            optional_text(body, "passkey_display_name") or "",
        ),
        attachment=attachment(body),
        options=options,
    )
    return json_answer({"options": begun.public_key})


def _receipt(outcome: Outcome) -> web.StreamResponse:
    return json_answer(receipt_object(outcome.receipt))


def _judge_by_user(options: CeremonyOptions) -> None:
    """Refuse a second factor: a user has one pending ceremony of each purpose, and finish could not
    distinguish a second factor from a sign-in.
    """
    if options.second_factor:
        raise InvalidRequest(
            "second_factor is for transactions and for the routes below ceremonies/.",
            reason="scope",
        )


def _approval(value: object) -> Approval:
    """`{id, data}`: an id of the caller, unique in the app, and any JSON value."""
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
        web.post(f"{base}/register/finish", keyed(finish_registration_of, limited=False)),
        web.post(f"{base}/authenticate/start", keyed(begin_authentication_of)),
        web.post(f"{base}/authenticate/finish", keyed(finish_authentication_of, limited=False)),
        web.post(f"{base}/ceremonies/register/start", keyed(begin_registration)),
        web.post(f"{base}/ceremonies/register/finish", keyed(finish_registration, limited=False)),
        web.post(f"{base}/ceremonies/authenticate/start", keyed(begin_authentication)),
        web.post(
            f"{base}/ceremonies/authenticate/finish", keyed(finish_authentication, limited=False)
        ),
    ]
