"""The native dialect: the two HTTP APIs of Passage Flex, under `/v1/apps/{app_id}` on one origin.

Management (M1 to M8, and four ceremony routes of our own for a backend that carries the page's messages) needs an API key; browser
routes (A1 to A5) need none and answer CORS. Facts and numbering are those of the
wire contract summarised in README.md beside this file, with every decision where the contract is open. Strict clients fail on a
missing or null field, so users, devices and lists are always whole; answers may carry more than the contract, never less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, cast
from urllib.parse import quote, urlencode, urlsplit

from aiohttp import web

from broker import ceremony, errors
from broker.durable import UserOrder, instant
from broker.errors import InvalidRequest, Refusal
from broker.model import Attachment, Credential, Purpose, Receipt, RelyingParty, User
from broker.tokens import text
from broker.web import (
    BROKER,
    DIRECTORY,
    PUBLIC_URL,
    bearer,
    browser_routes,
    json_answer,
    keyed,
    preflight_any,
    public,
    public_app,
    read_object,
)
from broker.web.body import optional_text, read_query, text_field
from broker.web.edge import refusal_headers

PREFIX = "/v1"
_APP = "/v1/apps/{app_id}"
_PAGE_HEADERS = "content-type, passage-flex-version"
_INT32 = 2**31 - 1
_NO_FILTERS = frozenset({"login_count", "created_at", "updated_at", "last_login_at"})

STATUS: Mapping[type[Refusal], int] = {
    errors.InvalidRequest: 400,
    errors.InvalidSetting: 400,
    errors.InvalidKey: 401,
    errors.UnknownNonce: 401,
    errors.CeremonyRefused: 401,
    errors.DiscoverableRefused: 401,
    errors.OperationNotAllowed: 403,
    errors.UnknownApp: 404,
    errors.UnknownUser: 404,
    errors.UnknownPasskey: 404,
    errors.UnknownTransaction: 404,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.RequestTimeout: 408,
    errors.NoPasskeys: 409,
    errors.TooManyPasskeys: 409,
    errors.RequestTooLarge: 413,
    errors.UnsupportedEncoding: 415,
    errors.TooManyCeremonies: 429,
    errors.InternalFault: 500,
    errors.Unavailable: 503,
}


def render(refusal: Refusal, _: web.Request | None = None) -> web.Response:
    """`{code, error}`, with `retry` or `signal` where the refusal has one."""
    body: dict[str, Any] = {"code": refusal.code, "error": refusal.sentence}
    if isinstance(refusal, errors.Unavailable) and refusal.retry:
        body["retry"] = refusal.retry
    if isinstance(refusal, errors.CeremonyRefused) and refusal.signal:
        body["signal"] = {
            "type": "unknown_credential",
            "rp_id": refusal.signal.rp_id,
            "credential_id": text(refusal.signal.credential_id),
        }
    response = json_answer(body, status=STATUS[type(refusal)], headers=refusal_headers(refusal))
    if isinstance(refusal, errors.RequestTimeout | errors.RequestTooLarge):
        response.force_close()  # what is left of the body would be read as the next request
    return response


# -- management -------------------------------------------------------------------------------------------------------------------


async def open_registration(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M1. `{external_id, passkey_display_name}` to 201 `{transaction_id}`."""
    body = await read_object(request)
    transaction_id = await request.app[BROKER].open_registration(
        app, text_field(body, "external_id"), text_field(body, "passkey_display_name")
    )
    return json_answer({"transaction_id": transaction_id}, status=201)


async def open_authentication(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M2. `{external_id}` to 201 `{transaction_id}`."""
    body = await read_object(request)
    transaction_id = await request.app[BROKER].open_authentication(app, text_field(body, "external_id"))
    return json_answer({"transaction_id": transaction_id}, status=201)


async def redeem(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M3. `{nonce}`, and `purpose`, `transaction_id`, `external_id` if the caller expects them, to 200 with the receipt."""
    body = await read_object(request)
    nonce = text_field(body, "nonce")
    # A stated expectation is never empty: a check that was meant must not vanish because a variable was unset.
    expected = {
        name: text_field(body, name) for name in ("purpose", "transaction_id", "external_id") if name in body
    }
    purpose = expected.get("purpose")
    if purpose not in (None, "register", "authenticate"):
        raise InvalidRequest('purpose is "register" or "authenticate".')
    receipt = await request.app[BROKER].redeem(
        app,
        nonce,
        purpose=cast(Purpose | None, purpose),
        transaction_id=expected.get("transaction_id"),
        external_id=expected.get("external_id"),
    )
    return json_answer(receipt_object(receipt))


async def begin_registration_of(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """`{external_id, user_name, user_display_name?, passkey_display_name?}` to `{options}`: no transaction, no handle."""
    body = await read_object(request)
    options = await request.app[BROKER].begin_registration_of(
        app,
        text_field(body, "external_id"),
        user_name=text_field(body, "user_name"),
        user_display_name=optional_text(body, "user_display_name"),
        nickname=optional_text(body, "passkey_display_name"),
        attachment=_attachment(body, app),
    )
    return json_answer({"options": options})


async def finish_registration_of(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """`{external_id, credential}` to the receipt: no nonce."""
    body = await read_object(request)
    external_id, answer = text_field(body, "external_id"), ceremony.parse_registration(body.get("credential"))
    return json_answer(
        receipt_object(await request.app[BROKER].finish_registration_of(app, external_id, answer))
    )


async def begin_authentication_of(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """`{external_id}` to `{options}`."""
    body = await read_object(request)
    options = await request.app[BROKER].begin_authentication_of(app, text_field(body, "external_id"))
    return json_answer({"options": options})


async def finish_authentication_of(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """`{external_id, credential}` to the receipt."""
    body = await read_object(request)
    external_id, answer = (
        text_field(body, "external_id"),
        ceremony.parse_authentication(body.get("credential")),
    )
    return json_answer(
        receipt_object(await request.app[BROKER].finish_authentication_of(app, external_id, answer))
    )


async def list_users(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M4. A page of users; `identifier` is an external id, literal and exact. An unknown one is an empty list."""
    query = read_query(request)
    for name in query:
        if name in _NO_FILTERS:
            raise InvalidRequest(f"Users can't be filtered by {name}.")
        if len(query.getall(name)) > 1:
            raise InvalidRequest(f"{name[:64]} is given twice.")
    limit = _whole(query.get("limit"), "limit", 10, 1, 500)
    page = _whole(query.get("page"), "page", 1, 1, 1_000_000)
    before = query.get("created_before")
    created_before = _whole(before, "created_before", 0, 0, 2**33) if before else None
    identifier = query.get("identifier")
    if identifier is not None and "\0" in identifier:
        raise InvalidRequest("identifier has a NUL character; no user has.")
    directory = request.app[DIRECTORY]
    users, total = await directory.users(
        app,
        limit=limit,
        page=page,
        external_id=identifier,
        user_id=_plain(query.get("id"), "id"),
        status=_plain(query.get("status"), "status"),
        created_before=instant(created_before) if created_before is not None else None,
        order=_order(query.get("order_by")),
    )
    base = request.app[PUBLIC_URL] + request.path
    shared = {k: v for k, v in query.items() if k not in ("page", "limit")}

    def link(number: int) -> dict[str, str]:
        parts = urlsplit(base + "?" + urlencode({**shared, "page": number, "limit": limit}, quote_via=quote))
        return {"href": f"{parts.netloc}{parts.path}?{parts.query}"}

    last = max(1, -(-total // limit))
    return json_answer(
        {
            "_links": {
                "first": link(1),
                "last": link(last),
                "next": link(page + 1) if page < last else {"href": ""},
                "previous": link(min(page - 1, last)) if page > 1 else {"href": ""},
                "self": link(page),
            },
            # Rounded up, so that a later page asked for with it leaves out nobody whom this one counts.
            "created_before": created_before
            if created_before is not None
            else math.ceil(directory.now().timestamp()),
            "limit": limit,
            "page": page,
            "total_users": total,
            "users": [listed_user_object(user) for user in users],
        }
    )


async def get_user(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M5. The user with its devices."""
    directory = request.app[DIRECTORY]
    user = await directory.user(app, user_id=request.match_info["user_id"])
    return json_answer({"user": user_object(user, await directory.credentials(app, user))})


async def list_devices(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M6. The user's passkeys."""
    directory = request.app[DIRECTORY]
    user = await directory.user(app, user_id=request.match_info["user_id"])
    return json_answer({"devices": [device_object(c) for c in await directory.credentials(app, user)]})


async def revoke_device(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M7. Revoke a passkey; 200 with an empty body."""
    directory = request.app[DIRECTORY]
    user = await directory.user(app, user_id=request.match_info["user_id"])
    await directory.revoke(app, user, request.match_info["device_id"])
    return web.Response(status=200)


async def get_app(_: web.Request, app: RelyingParty) -> web.StreamResponse:
    """M8. The whole app, for old clients that read it at start."""
    return json_answer({"app": app_object(app)})


async def get_app_public(_: web.Request, app: RelyingParty) -> web.StreamResponse:
    """A5. The public subset; old browser clients compare `auth_origin` with the page's."""
    return json_answer({"app": public_app_object(app)})


_keyed_app = keyed(get_app)
_public_app = public_app(get_app_public)


@public
async def either_app(request: web.Request) -> web.StreamResponse:
    """M8 with a key, A5 without, where both APIs share a port."""
    return await (_keyed_app if bearer(request) else _public_app)(request)


# -- browser ----------------------------------------------------------------------------------------------------------------------


async def begin_registration(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """A1. `{transaction_id, authenticator_attachment?}` to `{handshake, transaction_id}`."""
    body = await read_object(request)
    transaction_id = text_field(body, "transaction_id")
    begun = await request.app[BROKER].begin_registration(app, transaction_id, _attachment(body, app))
    return json_answer(
        {
            "handshake": {"id": begun.handle, "challenge": {"publicKey": begun.options}},
            "transaction_id": transaction_id,
        }
    )


async def finish_registration(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """A2. `{handshake_id, handshake_response, transaction_id}` to `{nonce}`."""
    body = await read_object(request)
    handle, transaction_id = text_field(body, "handshake_id"), optional_text(body, "transaction_id")
    answer = ceremony.parse_registration(body.get("handshake_response"))
    nonce = await request.app[BROKER].finish_registration(app, handle, transaction_id, answer)
    return json_answer({"nonce": nonce})


async def begin_authentication(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """A3. `{transaction_id?}`, `{}` or nothing to `{handshake, transaction_id?}`."""
    body = await read_object(request, empty=True)
    transaction_id = optional_text(body, "transaction_id")
    begun = await request.app[BROKER].begin_authentication(app, transaction_id)
    answer: dict[str, Any] = {
        "handshake": {"id": begun.handle, "challenge": {"publicKey": begun.options}},
    }
    if transaction_id is not None:
        answer["transaction_id"] = transaction_id
    return json_answer(answer)


async def finish_authentication(request: web.Request, app: RelyingParty) -> web.StreamResponse:
    """A4. `{handshake_id, handshake_response, transaction_id?}` to `{nonce}`."""
    body = await read_object(request)
    handle, transaction_id = text_field(body, "handshake_id"), optional_text(body, "transaction_id")
    answer = ceremony.parse_authentication(body.get("handshake_response"))
    nonce = await request.app[BROKER].finish_authentication(app, handle, transaction_id, answer)
    return json_answer({"nonce": nonce})


def routes(*, management: bool, browser: bool) -> list[web.RouteDef]:
    """The routes of a port that serves keyed callers, pages, or both."""
    found: list[web.RouteDef] = []
    if management:
        found += [
            web.post(f"{_APP}/transactions/register", keyed(open_registration)),
            web.post(f"{_APP}/transactions/authenticate", keyed(open_authentication)),
            web.post(f"{_APP}/authenticate/verify", keyed(redeem)),
            web.post(f"{_APP}/register/start", keyed(begin_registration_of)),
            web.post(f"{_APP}/register/finish", keyed(finish_registration_of)),
            web.post(f"{_APP}/authenticate/start", keyed(begin_authentication_of)),
            web.post(f"{_APP}/authenticate/finish", keyed(finish_authentication_of)),
            web.get(f"{_APP}/users", keyed(list_users), allow_head=False),
            web.get(f"{_APP}/users/{{user_id}}", keyed(get_user), allow_head=False),
            web.get(f"{_APP}/users/{{user_id}}/devices", keyed(list_devices), allow_head=False),
            web.delete(f"{_APP}/users/{{user_id}}/devices/{{device_id}}", keyed(revoke_device)),
        ]
    if browser:
        found += browser_routes(
            {
                f"{_APP}/register/transactions/webauthn/start": begin_registration,
                f"{_APP}/register/transactions/webauthn/finish": finish_registration,
                f"{_APP}/authenticate/transactions/webauthn/start": begin_authentication,
                f"{_APP}/authenticate/transactions/webauthn/finish": finish_authentication,
            },
            headers=_PAGE_HEADERS,
        )
    app = either_app if management and browser else _keyed_app if management else _public_app
    for path in (_APP, _APP + "/"):
        found.append(web.get(path, app, allow_head=False))
        if browser:
            found.append(web.options(path, preflight_any(_PAGE_HEADERS)))
    return found


# -- fields -----------------------------------------------------------------------------------------------------------------------


def _attachment(body: dict[str, Any], app: RelyingParty) -> Attachment | None:
    """The authenticator attachment asked for, the policy's where the page names none; None means any."""
    wanted = body.get("authenticator_attachment")
    if wanted is None:
        wanted = app.policy.authenticator_attachment
    if wanted not in ("platform", "cross-platform", "any"):
        raise InvalidRequest('authenticator_attachment is "platform", "cross-platform" or "any".')
    return None if wanted == "any" else cast(Attachment, wanted)


def _whole(value: str | None, name: str, default: int, low: int, high: int) -> int:
    if value is None or value == "":
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 12 or not low <= int(value) <= high:
        raise InvalidRequest(f"{name} is a whole number from {low} to {high}.")
    return int(value)


def _plain(value: str | None, name: str) -> str | None:
    if value and (value.startswith("<") or "\0" in value):
        raise InvalidRequest(f"{name} is compared exactly; filter operators are not offered.")
    return value


def _order(value: str | None) -> UserOrder:
    field, _, direction = (value or "created_at:ASC").partition(":")
    order = {"": field, "ASC": field, "DESC": "-" + field}.get(direction.upper())
    if field not in ("created_at", "updated_at", "id") or order is None:
        raise InvalidRequest("order_by is created_at, updated_at or id, with :ASC or :DESC.")
    return cast(UserOrder, order)


def _time(value: datetime) -> str:
    """RFC 3339 in UTC."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def receipt_object(receipt: Receipt) -> dict[str, Any]:
    """The receipt of a redemption."""
    return {
        "external_id": receipt.external_id,
        "user_id": receipt.user_id,
        "purpose": receipt.purpose,
        "passkey_id": receipt.passkey_id,
        "credential_id": text(receipt.credential_id),
        "origin": receipt.origin,
        "user_present": receipt.user_present,
        "user_verified": receipt.user_verified,
        "backup_eligible": receipt.backup_eligible,
        "backed_up": receipt.backed_up,
        "backup_changed": receipt.backup_changed,
        "counter_regressed": receipt.counter_regressed,
        "attestation": receipt.attestation,
        "authenticator_name_claimed": receipt.authenticator_name_claimed,
        "at": _time(instant(receipt.at)),
    }


def listed_user_object(user: User) -> dict[str, Any]:
    """A user as lists show it. A user who never signed in shows the time of creation: strict clients need a string."""
    return {
        "id": user.id,
        "external_id": user.external_id,
        "email": "",
        "email_verified": False,
        "phone": "",
        "phone_verified": False,
        "status": user.status,
        "login_count": min(user.login_count, _INT32),
        "created_at": _time(user.created_at),
        "updated_at": _time(user.updated_at),
        "last_login_at": _time(user.last_login_at or user.created_at),
        "user_metadata": None,
    }


def user_object(user: User, credentials: list[Credential]) -> dict[str, Any]:
    """A user with devices."""
    return {
        **listed_user_object(user),
        "recent_events": [],
        "social_connections": {},
        "webauthn": bool(credentials),
        "webauthn_devices": [device_object(c) for c in credentials],
        "webauthn_types": sorted({_device_type(c) for c in credentials}),
    }


def device_object(credential: Credential) -> dict[str, Any]:
    """A passkey, as the contract's device; what the contract lacks stands behind."""
    return {
        "id": credential.id,
        "cred_id": text(credential.credential_id),
        "friendly_name": credential.nickname or credential.user_name,
        "type": _device_type(credential),
        "usage_count": min(credential.use_count, _INT32),
        "created_at": _time(credential.created_at),
        "updated_at": _time(credential.updated_at),
        "last_login_at": _time(credential.last_used_at or credential.created_at),
        "icons": {"light": None, "dark": None},
        "confirmed_at": _time(credential.confirmed_at) if credential.confirmed_at else None,
        "last_used_at": _time(credential.last_used_at) if credential.last_used_at else None,
        "backup_eligible": credential.backup_eligible,
        "backed_up": credential.backed_up,
        "transports": list(credential.transports),
        "aaguid": credential.aaguid,
        "attestation": credential.attestation_trust,
        "authenticator_name_claimed": ceremony.authenticator_name(credential.aaguid),
        "live": credential.live,
    }


def _device_type(credential: Credential) -> Literal["passkey", "security_key", "platform"]:
    if credential.backup_eligible:
        return "passkey"
    if credential.attachment == "platform" or "internal" in credential.transports:
        return "platform"
    return "security_key"


def public_app_object(app: RelyingParty) -> dict[str, Any]:
    """What anybody may know of an app."""
    first, *more = app.web_origins or ("",)
    return {
        "id": app.id,
        "name": app.name,
        "type": "flex",
        "rp_id": app.rp_id,
        "auth_origin": first,
        "additional_auth_origins": more,
    }


def app_object(app: RelyingParty) -> dict[str, Any]:
    """The whole app: every field a strict old client needs, most of them about things the broker has none of."""
    off = {"enabled": False, "ttl": 300, "ttl_display_unit": "s"}
    return {
        **public_app_object(app),
        "allowed_callback_urls": [],
        "allowed_identifier": "none",
        "allowed_logout_urls": [],
        "application_login_uri": "",
        "auth_fallback_method": "none",
        "auth_fallback_method_ttl": 300,
        "auth_methods": {"passkeys": {"enabled": True}, "otp": off, "magic_link": off},
        "auto_theme_enabled": False,
        "created_at": _time(app.created_at or instant(0)),
        "default_language": "en",
        "layouts": {"profile": [], "registration": []},
        "login_url": "",
        "hosted": False,
        "hosted_subdomain": "",
        "passage_branding": False,
        "profile_management": False,
        "public_signup": False,
        "redirect_url": "",
        "refresh_absolute_lifetime": 0,
        "refresh_enabled": False,
        "refresh_inactivity_lifetime": 0,
        "require_email_verification": False,
        "require_identifier_verification": False,
        "required_identifier": "none",
        "role": "",
        "rsa_public_key": "",
        "session_timeout_length": 0,
        "user_metadata_schema": [],
        "technologies": [],
        "element_customization": {},
        "element_customization_dark": {},
    }
