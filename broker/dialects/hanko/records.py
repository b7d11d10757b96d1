"""Hanko's credentials, transactions and audit log for backends, and the public key set.

A list is a bare array, newest first, 20 items a page, with the headers `Link` and `X-Total-Count`.
A credential id finds credentials of its own tenant only.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as NotBase64
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode
from uuid import UUID, uuid5

from aiohttp import web
from multidict import MultiDict

from broker import ceremony
from broker.dialects.hanko import ALGORITHM
from broker.dialects.hanko.ceremonies import bound, judge, required
from broker.dialects.hanko.refusals import FIELDS
from broker.errors import InvalidRequest, UnknownPasskey
from broker.model import ID, ApprovalRecord, AuditRow, Caller, Owned, RelyingParty, base64url
from broker.signing import JWKS_MAX_AGE
from broker.web import DIRECTORY, PUBLIC_URL, SIGNING, json_answer
from broker.web.body import read_query

_PAGE = 20
_LONGEST_PAGE = 1000
_MAX_AGE = f"max-age={JWKS_MAX_AGE}"
# A namespace (RFC 9562 §6.6), drawn at random and then fixed.
_TRANSACTIONS = UUID("b34c2af2-d2e6-4efa-b12b-8983ca954943")


# -- credentials -----------------------------------------------------------------------------------


async def list_credentials(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A page of credentials of one user (`user_id`) or of all users. `user_id` "" matches no
    user.
    """
    query = read_query(request)
    page, limit = _page(query)
    order = _one(query, "order") or "desc"
    if order not in ("asc", "desc"):
        raise InvalidRequest("Order must be one of 'asc desc'", reason=FIELDS)
    found, total = await request.app[DIRECTORY].passkeys(
        caller.app,
        external_id=_one(query, "user_id"),
        limit=limit,
        page=page,
        newest_first=order == "desc",
    )
    return _listed(request, query, [credential_object(owned) for owned in found], total)


async def get_credential(request: web.Request, caller: Caller) -> web.StreamResponse:
    """One credential."""
    return json_answer(credential_object(await _credential(request, caller)))


async def rename_credential(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{name}` to 204."""
    body = await bound(request)
    faults: list[str] = []
    name = required(body, "name", faults)
    judge(faults)
    owned = await _credential(request, caller)
    await request.app[DIRECTORY].rename(caller.app, owned.credential.id, name)
    return web.Response(status=204)


async def revoke_credential(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Revoke a credential; 204."""
    owned = await _credential(request, caller)
    await request.app[DIRECTORY].revoke_passkey(caller.app, owned.credential.id)
    return web.Response(status=204)


async def _credential(request: web.Request, caller: Caller) -> Owned:
    """The credential of the path. Its id is base64url without padding, and compared as text. With
    `user_id` in the query it must be that user's, so that a backend can trust an id from a page.

    Raises:
        UnknownPasskey.
    """
    wanted = request.match_info["credential_id"]
    try:
        credential_id = urlsafe_b64decode(wanted.encode("ascii") + b"=" * (-len(wanted) % 4))
    except (UnicodeEncodeError, NotBase64):
        raise UnknownPasskey from None
    if urlsafe_b64encode(credential_id).decode().rstrip("=") != wanted:
        raise UnknownPasskey
    owned = await request.app[DIRECTORY].passkey_by_credential(caller.app, credential_id)
    if _one(read_query(request), "user_id") not in (None, owned.external_id):
        raise UnknownPasskey
    return owned


def credential_object(owned: Owned) -> dict[str, Any]:
    """A credential. An ownerless credential has no `user_id`. `last_used_at` of an unused
    credential is the time of its creation.
    """
    credential = owned.credential
    credential_id = base64url(credential.credential_id)
    shown = {
        "id": credential_id,
        "name": credential.nickname
        or ceremony.authenticator_name(credential.aaguid)
        or f"cred-{credential_id}",
        "public_key": base64url(credential.public_key),
        "attestation_type": credential.attestation_format,
        "aaguid": credential.aaguid,
        "last_used_at": _time(credential.last_used_at or credential.created_at),
        "created_at": _time(credential.created_at),
        "transports": list(credential.transports),
        "backup_eligible": credential.backup_eligible,
        "backup_state": credential.backed_up,
        "is_mfa": credential.second_factor,
    }
    return shown if owned.external_id is None else {**shown, "user_id": owned.external_id}


# -- transactions ----------------------------------------------------------------------------------


async def list_approvals(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The transactions of a user, by the broker's own id of the user. An unknown user has none."""
    user_id = request.match_info["user_id"]
    if not ID.match(user_id):
        raise InvalidRequest("A user's own id has 24 letters and digits.", reason="user_id")
    found = await request.app[DIRECTORY].approvals(caller.app, user_id)
    return json_answer([approval_object(record) for record in found])


def approval_object(record: ApprovalRecord) -> dict[str, Any]:
    """A transaction. `updated_at` is the time of its approval, if any. The vendor's ids are UUIDs
    (its schema: 36 characters). No route looks a transaction up by it, so the UUID is derived from
    the broker's id."""
    return {
        "id": str(uuid5(_TRANSACTIONS, record.id)),
        "identifier": record.identifier,
        "data": record.data,
        "created_at": _time(record.created_at),
        "updated_at": _time(record.approved_at or record.created_at),
    }


# -- audit log -------------------------------------------------------------------------------------

# The vendor's types by action and result. Other events of the broker have no counterpart. The
# vendor's "init" types have none here: a begin is no event.
_TYPES: Mapping[tuple[str, str], str] = {
    ("passkey.registered", "done"): "webauthn_registration_final_succeeded",
    ("passkey.registered", "refused"): "webauthn_registration_final_failed",
    ("passkey.used", "done"): "webauthn_authentication_final_succeeded",
    ("passkey.used", "refused"): "webauthn_authentication_final_failed",
    ("second_factor.registered", "done"): "mfa_registration_final_succeeded",
    ("second_factor.registered", "refused"): "mfa_registration_final_failed",
    ("second_factor.used", "done"): "mfa_authentication_final_succeeded",
    ("second_factor.used", "refused"): "mfa_authentication_final_failed",
    ("approval.signed", "done"): "webauthn_transaction_final_succeeded",
    ("approval.signed", "refused"): "webauthn_transaction_final_failed",
    ("passkey.renamed", "done"): "webauthn_credential_updated",
    ("passkey.revoked", "done"): "webauthn_credential_deleted",
}


async def list_audit_logs(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A page of events, filtered by `type` (may be repeated), `start_time` and `end_time`
    (exclusive), by a part of the user's id (`actor_user_id`) or of the client's address
    (`meta_source_ip`), and by a part of one of both (`q`).
    """
    query = read_query(request)
    page, limit = _page(query)
    start, end = _instant(query, "start_time"), _instant(query, "end_time")
    wanted = query.getall("type", [])
    kinds = [kind for kind, name in _TYPES.items() if not wanted or name in wanted]
    found, total = await request.app[DIRECTORY].audit(
        caller.app,
        limit=limit,
        page=page,
        start=start,
        end=end,
        kinds=kinds,
        user=_one(query, "actor_user_id") or None,
        address=_one(query, "meta_source_ip") or None,
        either=_one(query, "q") or None,
    )
    return _listed(request, query, [audit_object(row, caller.app) for row in found], total)


def audit_object(row: AuditRow, app: RelyingParty) -> dict[str, Any]:
    """An event, without its transaction, which is not stored."""
    event = row.event
    shown = {
        "id": str(event.id),
        "type": _TYPES[event.action, event.result],
        "meta_http_request_id": event.request_id,
        "meta_source_ip": event.address or "",
        "meta_user_agent": event.user_agent or "",
        "created_at": _time(event.at),
        "updated_at": _time(event.at),
        "tenant_id": app.id,
        "transaction_id": None,
    }
    if event.result == "refused":
        shown["error"] = event.reason
    if row.external_id is not None:
        shown["actor_user_id"] = row.external_id
    return shown


def _instant(query: MultiDict[str], name: str) -> datetime | None:
    """A time in RFC 3339."""
    value = _one(query, name)
    if not value:
        return None
    try:
        found = datetime.fromisoformat(value)
        if found.tzinfo is None:
            raise ValueError
        return found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{name} is a time like 2026-01-31T12:00:00Z.", reason=FIELDS
        ) from None


# -- keys ------------------------------------------------------------------------------------------


async def key_set(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The public keys that verify this tenant's tokens (RFC 7517 §5)."""
    keys = await request.app[SIGNING].key_set(caller.app, caller.app.policy[ALGORITHM])
    return json_answer(keys, headers={"Cache-Control": _MAX_AGE})


# -- pages -----------------------------------------------------------------------------------------


def _page(query: MultiDict[str]) -> tuple[int, int]:
    """The number of the page, and the items a page."""
    return _whole(query, "page", 1, 1_000_000), _whole(query, "per_page", _PAGE, _LONGEST_PAGE)


def _whole(query: MultiDict[str], name: str, default: int, high: int) -> int:
    value = _one(query, name)
    if not value:
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 9 or not 1 <= int(value) <= high:
        raise InvalidRequest(f"{name} is a whole number from 1 to {high}", reason=FIELDS)
    return int(value)


def _one(query: MultiDict[str], name: str) -> str | None:
    """A field of the query that may not be repeated."""
    values = query.getall(name, [])
    if len(values) > 1:
        raise InvalidRequest(f"{name} is given twice.", reason=FIELDS)
    if values and "\0" in values[0]:
        raise InvalidRequest(f"{name} has a NUL character.", reason="nul")
    return values[0] if values else None


def _listed(
    request: web.Request, query: MultiDict[str], items: list[dict[str, Any]], total: int
) -> web.StreamResponse:
    """A page as an array, with links to the other pages in its headers (RFC 8288)."""
    page, limit = _page(query)
    last = max(1, -(-total // limit))
    places = {"first": 1, "last": last}
    if page < last:
        places["next"] = page + 1
    if page > 1:
        places["prev"] = min(page - 1, last)
    base = request.app[PUBLIC_URL] + request.path
    kept = [(k, v) for k, v in query.items() if k not in ("page", "per_page")]

    def link(number: int) -> str:
        asked = [*kept, ("page", str(number)), ("per_page", str(limit))]
        return f"{base}?{urlencode(asked, quote_via=quote)}"

    headers: Mapping[str, str] = {
        "Link": ",".join(f'<{link(number)}>; rel="{place}"' for place, number in places.items()),
        "X-Total-Count": str(total),
    }
    return json_answer(items, headers=headers)


def _time(value: datetime) -> str:
    """RFC 3339 in UTC."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
