"""Passlock's management of passkeys: keyed lists and changes, and the page's calls of the WebAuthn
Signal API.

A change in the broker does not reach authenticators. So each change also gives a one-time token.
The page exchanges the token for the arguments of the Signal API (update: names; delete: deleted
credentials; prune: all remaining credentials). An unknown user or id is a warning, not an error:
the rest of the change is made.

Clients 2.0 to 2.8 change single passkeys, or all of a user, and get the changed passkeys back.
Pages of clients before 2.5 read a passkey's ids without a key, which needs a policy of the app.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode
from collections.abc import Callable
from datetime import datetime

from aiohttp import web

from broker.dialects.passlock.ceremonies import judge_open
from broker.dialects.passlock.fields import (
    Body,
    handle_of,
    optional_short_text,
    passkey_ids,
    passkey_object,
    short_text,
    summary_object,
)
from broker.durable import instant
from broker.errors import InvalidRequest, UnknownPasskey
from broker.model import Caller, Owned, base64url, validate_text
from broker.signals import Instructions, SignalKind, SignalTicket
from broker.web import DIRECTORY, SIGNALS, Handler, json_answer, read_object
from broker.web.body import optional_text, read_query, text_field

PAGE_SIZE = 50
_CURSOR = re.compile(r"([0-9]{1,17})\.([A-Za-z0-9]{24})\Z")
_MICROSECONDS = 1_000_000
_ALL = 1000  # passkeys; a user has no more


# -- lists -----------------------------------------------------------------------------------------


async def list_passkeys(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`?cursor=` to `{cursor, records}`: up to 50 of the app's passkeys, oldest first; `cursor` is
    null behind the last.
    """
    query = read_query(request)
    cursor = query.get("cursor") or None
    found = await request.app[DIRECTORY].passkeys_after(
        caller.app, after=_place(cursor) if cursor else None, limit=PAGE_SIZE + 1
    )
    more = len(found) > PAGE_SIZE
    shown = found[:PAGE_SIZE]
    return json_answer(
        {
            "_tag": "FindAllPasskeys",
            "cursor": _cursor(shown[-1]) if more else None,
            "records": [summary_object(owned) for owned in shown],
        }
    )


def _cursor(last: Owned) -> str:
    """The cursor of the next page: the position after this passkey, which inserts and deletions
    don't move.
    """
    made = last.credential.created_at
    micros = int(made.timestamp()) * _MICROSECONDS + made.microsecond
    return base64url(f"{micros}.{last.credential.id}".encode())


def _place(cursor: str) -> tuple[datetime, str]:
    try:
        found = _CURSOR.match(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii"))
        made = instant(0) if found is None else instant(int(found[1]) // _MICROSECONDS)
    except (ValueError, OverflowError, OSError):
        found = None
    if found is None:
        raise InvalidRequest("cursor is not one that this list gave.", reason="cursor")
    return made.replace(microsecond=int(found[1]) % _MICROSECONDS), found[2]


async def get_passkey(request: web.Request, caller: Caller) -> web.StreamResponse:
    """One passkey, whole."""
    owned = await request.app[DIRECTORY].passkey(caller.app, request.match_info["passkey_id"])
    return json_answer(passkey_object(owned, caller.app))


# -- changes with a token for the page -------------------------------------------------------------


async def update_passkeys(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{userId, username, displayName?}` to 202 `{updatePasskeysToken, expiresAt, warnings}`. The
    username is stored on every passkey of the user; the display name travels in the token only."""
    body = await read_object(request)
    user_id, user_name = short_text(body, "userId"), short_text(body, "username")
    prepared = await request.app[SIGNALS].prepare_update(
        caller.app, user_id, user_name, optional_short_text(body, "displayName")
    )
    return _prepared("PreparedPasskeyUpdate", "updatePasskeysToken", prepared)


async def delete_passkeys(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{passkeyIds}` or `{userId}` to 202 `{deletePasskeysToken, expiresAt, warnings}`. Deletes the
    passkeys.
    """
    body = await read_object(request)
    user_id = optional_short_text(body, "userId")
    if (user_id is None) == (body.get("passkeyIds") is None):
        raise InvalidRequest("Give either passkeyIds or userId.", reason="scope")
    ids = passkey_ids(body, "passkeyIds", most=_ALL)
    if user_id is None and ids is None:
        raise InvalidRequest("passkeyIds is empty.", reason="empty_field")
    prepared = await request.app[SIGNALS].prepare_delete(
        caller.app, passkey_ids=ids, external_id=user_id
    )
    return _prepared("PreparedPasskeyDeletion", "deletePasskeysToken", prepared)


async def prune_passkeys(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{userId}` to 202 `{prunePasskeysToken, expiresAt, warnings}`. Deletes nothing in the
    broker.
    """
    body = await read_object(request)
    prepared = await request.app[SIGNALS].prepare_prune(caller.app, short_text(body, "userId"))
    return _prepared("PreparedPasskeyPruning", "prunePasskeysToken", prepared)


def _prepared(tag: str, token: str, prepared: SignalTicket) -> web.Response:
    return json_answer(
        {
            "_tag": tag,
            token: prepared.ticket,
            "expiresAt": int(prepared.expires_at * 1000),
            "warnings": _warnings(prepared),
        },
        status=202,
    )


def _warnings(told: SignalTicket | Instructions) -> list[Body]:
    """Warnings about unknown users and passkeys of the request."""
    if told.empty and not told.missing:
        return [{"code": "NO_PASSKEYS_FOUND", "message": "This user has no passkeys."}]
    return [
        {
            "code": "PASSKEY_NOT_FOUND",
            "message": "There is no such passkey.",
            "passkeyId": passkey_id,
        }
        for passkey_id in told.missing
    ]


def _exchange(kind: SignalKind, field: str, tag: str, rendered: Callable[[Body], Body]) -> Handler:
    """`{token}` to `{instructions, warnings}`, once."""

    async def handle(request: web.Request, caller: Caller) -> web.StreamResponse:
        body = await read_object(request)
        told = await request.app[SIGNALS].exchange(caller.app, kind, text_field(body, field))
        instructions = [rendered(call) for call in told.calls]
        return json_answer({"_tag": tag, "instructions": instructions, "warnings": _warnings(told)})

    return handle


def _update(call: Body) -> Body:
    return {
        "rpId": call["rpId"],
        "userId": call["userId"],
        "username": call["name"],
        "displayName": call["displayName"],
    }


exchange_update = _exchange("update", "updatePasskeysToken", "PasskeyUpdateInstructions", _update)
exchange_deletion = _exchange("delete", "deletePasskeysToken", "PasskeyDeletionInstructions", dict)
exchange_pruning = _exchange("prune", "prunePasskeysToken", "PasskeyPruningInstructions", dict)


# -- changes of clients before 2.9 -----------------------------------------------------------------


async def change_passkey(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{userId}`, `{username}` or both to the passkey. `userId` gives an ownerless passkey its
    owner; `username` is the name that authenticators show.
    """
    body = await read_object(request)
    user_id, user_name = optional_short_text(body, "userId"), optional_short_text(body, "username")
    if user_id is None and user_name is None:
        raise InvalidRequest("Give userId, username or both.", reason="missing_field")
    directory, passkey_id = request.app[DIRECTORY], request.match_info["passkey_id"]
    owned = await directory.passkey(caller.app, passkey_id)
    if user_id is not None and owned.external_id != user_id:
        owned = await directory.assign(caller.app, passkey_id, user_id)
    if user_name is not None:
        await directory.rename_user_of(caller.app, passkey_id, user_name)
        owned = await directory.passkey(caller.app, passkey_id)
    return json_answer(passkey_object(owned, caller.app))


async def delete_passkey(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Delete a passkey; 202 with its last state."""
    owned = await request.app[DIRECTORY].revoke_passkey(
        caller.app, request.match_info["passkey_id"]
    )
    return json_answer(passkey_object(owned, caller.app), status=202)


async def rename_user(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{username}` to `{updated}`: all passkeys of the user in the path; empty for an unknown
    user.
    """
    body = await read_object(request)
    user_id, user_name = _user_in(request, body), short_text(body, "username")
    await request.app[DIRECTORY].rename_user(caller.app, user_id, user_name)
    updated = await _passkeys_of(request, caller, user_id)
    return json_answer({"_tag": "UpdatedPasskeys", "updated": updated})


async def delete_user(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{userId?}` or an empty body to 202 `{deleted}`: the last state of all passkeys of the user
    in the path; empty for an unknown user.
    """
    user_id = _user_in(request, await read_object(request, empty=True))
    deleted = await _passkeys_of(request, caller, user_id)
    await request.app[DIRECTORY].revoke_of(caller.app, user_id, None)
    return json_answer({"_tag": "DeletedPasskeys", "deleted": deleted}, status=202)


async def _passkeys_of(request: web.Request, caller: Caller, user_id: str) -> list[Body]:
    owned, _ = await request.app[DIRECTORY].passkeys(
        caller.app, external_id=user_id, limit=_ALL, newest_first=False
    )
    return [passkey_object(o, caller.app) for o in owned]


def _user_in(request: web.Request, body: Body) -> str:
    """The user in the path. `userId` of the body must be the same user, if present."""
    user_id = request.match_info["user_id"]
    validate_text(user_id, "userId")
    if optional_text(body, "userId") not in (None, user_id):
        raise InvalidRequest("userId is not the user in the path.", reason="scope")
    return user_id


# -- pages -----------------------------------------------------------------------------------------


async def read_credential(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The ids that a page needs to signal one passkey: `{credentialId, userId, rpId}`."""
    judge_open(caller.app)
    owned = await request.app[DIRECTORY].passkey(caller.app, request.match_info["passkey_id"])
    credential = owned.credential
    return json_answer(
        {
            "credentialId": base64url(credential.credential_id),
            "userId": handle_of(credential),
            "rpId": caller.app.rp_id,
        }
    )


async def read_credentials(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The ids that a page needs to prune: `{rpId, userId, allAcceptedCredentialIds}` of the
    passkeys in the path, which must have one owner.
    """
    judge_open(caller.app)
    wanted = request.match_info["passkey_ids"].split(",")
    owned = await request.app[DIRECTORY].passkeys_by_ids(caller.app, wanted)
    if not owned:
        raise UnknownPasskey
    handle, *others = dict.fromkeys(handle_of(o.credential) for o in owned)
    if others:
        raise InvalidRequest("These passkeys are of different users.", reason="scope")
    return json_answer(
        {
            "rpId": caller.app.rp_id,
            "userId": handle,
            "allAcceptedCredentialIds": [base64url(o.credential.credential_id) for o in owned],
        }
    )
