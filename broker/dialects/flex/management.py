"""Management in the Flex API, beyond the contract: passkeys with and without an owner, names,
owners, approvals, events. Every route is keyed.

    GET    /passkeys                       a page: external_id?, order_by?, page?, limit? ->
           {passkeys, page, limit, total}
    GET    /passkeys/{passkey_id}          -> {passkey}
    PATCH  /passkeys/{passkey_id}          {nickname} -> {passkey}
    DELETE /passkeys/{passkey_id}          -> 200, empty
    POST   /passkeys/{passkey_id}/owner    {external_id} -> {passkey}, once: a passkey without an
           owner gets its owner
    PATCH  /users/{user_id}                {user_name} -> {passkeys}: the name that authenticators
           show, on each of the user's
    POST   /users/{user_id}/disable        -> 200, empty
    POST   /users/{user_id}/enable         -> 200, empty
    GET    /users/{user_id}/approvals      -> {approvals}
    GET    /events                         a page: after?, before?, user?, action?, page?, limit? ->
           {events, page, limit, total}
                                           or the next: cursor, limit? -> {events, next_cursor}

Each handler parses, calls one verb and renders. A list refuses an unknown field, because a misspelt
filter would list everything. A rename changes the broker's lists; signals update authenticators.
"""

from __future__ import annotations

from datetime import UTC, datetime

from aiohttp import web

from broker.dialects.flex.fields import page_and_limit, query_of, whole
from broker.dialects.flex.objects import approval_object, event_object, passkey_object
from broker.errors import InvalidRequest
from broker.model import Caller
from broker.web import DIRECTORY, json_answer, keyed, read_object
from broker.web.body import text_field

_ALL = 1000  # a user has no more passkeys
_RESULTS = ("done", "refused")
_ORDERS = {"created_at": False, "created_at:ASC": False, "created_at:DESC": True}


# -- passkeys --------------------------------------------------------------------------------------


async def list_passkeys(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A page of the passkeys of the app or of one user, oldest first by default."""
    query = query_of(request, "page", "limit", "external_id", "order_by")
    order = query.get("order_by") or "created_at"
    if order not in _ORDERS:
        raise InvalidRequest("order_by is created_at, with :ASC or :DESC.")
    place = page_and_limit(query)
    owned, total = await request.app[DIRECTORY].passkeys(
        caller.app, external_id=query.get("external_id"), newest_first=_ORDERS[order], **place
    )
    return json_answer({"passkeys": [passkey_object(o) for o in owned], **place, "total": total})


async def get_passkey(request: web.Request, caller: Caller) -> web.StreamResponse:
    """One passkey."""
    owned = await request.app[DIRECTORY].passkey(caller.app, request.match_info["passkey_id"])
    return json_answer({"passkey": passkey_object(owned)})


async def rename_passkey(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Rename a passkey in the broker's lists."""
    nickname, passkey_id = (
        text_field(await read_object(request), "nickname"),
        request.match_info["passkey_id"],
    )
    directory = request.app[DIRECTORY]
    await directory.rename(caller.app, passkey_id, nickname)
    return json_answer({"passkey": passkey_object(await directory.passkey(caller.app, passkey_id))})


async def revoke_passkey(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Revoke a passkey."""
    await request.app[DIRECTORY].revoke_passkey(caller.app, request.match_info["passkey_id"])
    return web.Response(status=200)


async def give_owner(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Give an ownerless passkey its owner. Of two parallel requests one succeeds, the other is
    refused. A missing user is created.
    """
    external_id = text_field(await read_object(request), "external_id")
    owned = await request.app[DIRECTORY].assign(
        caller.app, request.match_info["passkey_id"], external_id
    )
    return json_answer({"passkey": passkey_object(owned)})


# -- users -----------------------------------------------------------------------------------------


async def rename_user(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Rename a user on each passkey: authenticators show the name of the passkey's user."""
    user_name = text_field(await read_object(request), "user_name")
    directory = request.app[DIRECTORY]
    user = await directory.user(caller.app, user_id=request.match_info["user_id"])
    await directory.rename_user(caller.app, user.external_id, user_name)
    owned, _ = await directory.passkeys(
        caller.app, external_id=user.external_id, limit=_ALL, newest_first=False
    )
    return json_answer({"passkeys": [passkey_object(o) for o in owned]})


async def disable_user(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Disabling ends the user's ceremonies and nonces; the passkeys stay."""
    return await _disable_user(request, caller, disabled=True)


async def enable_user(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The user signs in and registers again, with the passkeys of before."""
    return await _disable_user(request, caller, disabled=False)


async def _disable_user(
    request: web.Request, caller: Caller, *, disabled: bool
) -> web.StreamResponse:
    directory, user_id = request.app[DIRECTORY], request.match_info["user_id"]
    user = await directory.user(caller.app, user_id=user_id)
    await directory.disable_user(caller.app, user.external_id, disabled=disabled)
    return web.Response(status=200)


async def list_approvals(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The user's approvals, signed or not, oldest first."""
    directory = request.app[DIRECTORY]
    user = await directory.user(caller.app, user_id=request.match_info["user_id"])
    return json_answer(
        {"approvals": [approval_object(a) for a in await directory.approvals(caller.app, user.id)]}
    )


# -- events ----------------------------------------------------------------------------------------


async def list_events(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A page of the app's events, newest first. `after` and `before` are exclusive; `user` is a
    part of the external id. With `cursor`, which permits only `limit` besides, the events after the
    cursor, oldest first and without a gap."""
    query = query_of(request, "page", "limit", "after", "before", "user", "action", "cursor")
    place = page_and_limit(query)
    if "cursor" in query:
        return await _events_after(request, caller, query, place["limit"])
    action = query.get("action")
    rows, total = await request.app[DIRECTORY].audit(
        caller.app,
        start=_moment(query, "after"),
        end=_moment(query, "before"),
        kinds=[(action, result) for result in _RESULTS] if action else None,
        user=query.get("user") or None,
        page=place["page"],
        limit=place["limit"],
    )
    return json_answer({"events": [event_object(row) for row in rows], **place, "total": total})


async def _events_after(
    request: web.Request, caller: Caller, query: dict[str, str], limit: int
) -> web.StreamResponse:
    if others := query.keys() - {"cursor", "limit"}:
        raise InvalidRequest(
            f"cursor stands alone with limit, without {', '.join(sorted(others))}."
        )
    cursor = whole(query["cursor"], "cursor", 0, 0, 10**12 - 1)
    rows, following = await request.app[DIRECTORY].events_after(caller.app.id, cursor, limit=limit)
    return json_answer(
        {"events": [event_object(row) for row in rows], "next_cursor": str(following)}
    )


def _moment(query: dict[str, str], name: str) -> datetime | None:
    """A time in RFC 3339, in UTC or with an offset."""
    value = query.get(name)
    if not value:
        return None
    try:
        moment = datetime.fromisoformat(value) if value.isascii() and len(value) <= 40 else None
        if moment is not None and moment.tzinfo is not None and 1970 <= moment.year < 2500:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(
        f"{name} is a time like 2026-01-16T12:00:00Z (with an offset, write + as %2B)."
    )


def routes(base: str) -> list[web.RouteDef]:
    """The keyed routes below `base`, the path of an app."""
    passkey, user = f"{base}/passkeys/{{passkey_id}}", f"{base}/users/{{user_id}}"
    return [
        web.get(f"{base}/passkeys", keyed(list_passkeys), allow_head=False),
        web.get(passkey, keyed(get_passkey), allow_head=False),
        web.patch(passkey, keyed(rename_passkey)),
        web.delete(passkey, keyed(revoke_passkey)),
        web.post(f"{passkey}/owner", keyed(give_owner)),
        web.patch(user, keyed(rename_user)),
        web.post(f"{user}/disable", keyed(disable_user)),
        web.post(f"{user}/enable", keyed(enable_user)),
        web.get(f"{user}/approvals", keyed(list_approvals), allow_head=False),
        web.get(f"{base}/events", keyed(list_events), allow_head=False),
    ]
