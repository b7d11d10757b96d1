"""WebAuthn's Signal API in the Flex API, beyond the contract: pages tell authenticators of renamed
and deleted passkeys.

    POST /signals/update    keyed     {external_id, user_name, user_display_name?} -> 201 {ticket,
                            expires_at, missing, empty}
    POST /signals/delete    keyed     {passkeys} or {external_id} -> the same; deletes the passkeys
    POST /signals/prune     keyed     {external_id} -> the same; changes nothing in the broker
    POST /signals/exchange  page      {kind, ticket} -> {calls}

The backend calls one of the first three, which changes the broker's passkeys at once, and gives the
ticket to the page. The page exchanges the ticket once. It passes each of `calls` to the method of
`PublicKeyCredential` for the kind: `signalCurrentUserDetails`, `signalUnknownCredential` or
`signalAllAcceptedCredentials`. `missing` lists the ids that are no passkeys of the app. `empty` is
true if there are no calls.
"""

from __future__ import annotations

from typing import cast, get_args

from aiohttp import web

from broker.dialects.flex.fields import passkey_ids
from broker.dialects.flex.objects import rfc3339
from broker.durable import instant
from broker.errors import InvalidRequest
from broker.model import Caller
from broker.signals import SignalKind, SignalTicket
from broker.web import SIGNALS, Handler, json_answer, keyed, read_object
from broker.web.body import optional_text, text_field

# The members of each call: exactly the argument of the Signal API's method (WebAuthn L3 §5.1.10).
_MEMBERS: dict[SignalKind, tuple[str, ...]] = {
    "update": ("rpId", "userId", "name", "displayName"),
    "delete": ("rpId", "credentialId"),
    "prune": ("rpId", "userId", "allAcceptedCredentialIds"),
}


async def prepare_update(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Store the user name on all passkeys of the user. The display name is stored with the ticket
    only.
    """
    body = await read_object(request)
    return _prepared(
        await request.app[SIGNALS].prepare_update(
            caller.app,
            text_field(body, "external_id"),
            text_field(body, "user_name"),
            optional_text(body, "user_display_name"),
        )
    )


async def prepare_delete(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Delete the passkeys of the list, or all of a user. The request has exactly one of the two."""
    body = await read_object(request)
    if ("passkeys" in body) == ("external_id" in body):
        raise InvalidRequest("Give either passkeys or external_id.", reason="scope")
    if "passkeys" in body:
        prepared = await request.app[SIGNALS].prepare_delete(
            caller.app, passkey_ids=passkey_ids(body, "passkeys")
        )
    else:
        prepared = await request.app[SIGNALS].prepare_delete(
            caller.app, external_id=text_field(body, "external_id")
        )
    return _prepared(prepared)


async def prepare_prune(request: web.Request, caller: Caller) -> web.StreamResponse:
    """List all passkeys that the user has. Authenticators drop the others."""
    body = await read_object(request)
    return _prepared(
        await request.app[SIGNALS].prepare_prune(caller.app, text_field(body, "external_id"))
    )


def _prepared(prepared: SignalTicket) -> web.Response:
    return json_answer(
        {
            "ticket": prepared.ticket,
            "expires_at": rfc3339(instant(prepared.expires_at)),
            "missing": list(prepared.missing),
            "empty": prepared.empty,
        },
        status=201,
    )


async def exchange(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Exchange a ticket for its calls. A ticket of another kind is refused, and spent: a page
    presented it for which it was not issued.
    """
    body = await read_object(request)
    kind = text_field(body, "kind")
    if kind not in get_args(SignalKind):
        raise InvalidRequest('kind is "update", "delete" or "prune".', reason="field_type")
    told = await request.app[SIGNALS].exchange(
        caller.app, cast("SignalKind", kind), text_field(body, "ticket")
    )
    members = _MEMBERS[cast("SignalKind", kind)]
    return json_answer({"calls": [{name: call[name] for name in members} for call in told.calls]})


def routes(base: str) -> list[web.RouteDef]:
    """The keyed routes below `base`, the path of an app."""
    return [
        web.post(f"{base}/signals/update", keyed(prepare_update)),
        web.post(f"{base}/signals/delete", keyed(prepare_delete)),
        web.post(f"{base}/signals/prune", keyed(prepare_prune)),
    ]


def pages(base: str) -> dict[str, Handler]:
    """The page's route below `base`."""
    return {f"{base}/signals/exchange": exchange}
