"""The Flex API: the two HTTP APIs of Passage Flex, under `/v1/apps/{app_id}` on one origin.

The contract's routes are here: management (M1 to M8) needs an API key, browser routes (A1 to A5)
need none and answer CORS. Facts and numbering are those of the wire contract summarised in
README.md, with every decision where the contract is open in DECISIONS.md. Everything beyond the
contract is added and changes nothing of it:

    ceremonies   keyed ceremonies: a backend carries the page's messages
    management   passkeys, names, owners, approvals, events
    signals      what authenticators should hear of their passkeys
    signed       receipts that others check offline
    mail         mail codes
    fields       what requests ask for, read strictly
    canonical    one text for one JSON value
    objects      what answers are made of
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast, get_args
from urllib.parse import quote, urlencode, urlsplit

from aiohttp import hdrs, web

from broker import ceremony, errors
from broker.broker import Begun, Nonce
from broker.dialects.flex import PAGE, ceremonies, mail, signals, signed
from broker.dialects.flex.fields import (
    attachment,
    authentication_options,
    binding_challenge,
    binding_verifier,
    registration_options,
    switch,
    whole,
)
from broker.dialects.flex.management import routes as management_routes
from broker.dialects.flex.objects import (
    app_object,
    device_object,
    listed_user_object,
    public_app_object,
    receipt_object,
    user_object,
)
from broker.durable import UserOrder, instant
from broker.errors import InvalidRequest, Refusal
from broker.model import (
    ANYONE,
    NO_OPTIONS,
    ByHandle,
    ByTransaction,
    Caller,
    CeremonyOptions,
    ExpectedCeremony,
    ExpectedReceipt,
    Names,
    Proof,
    base64url,
    validate_text,
)
from broker.web import (
    BROKER,
    DIRECTORY,
    PUBLIC_URL,
    bearer,
    browser_routes,
    edge,
    json_answer,
    keyed,
    preflight_any,
    public,
    public_app,
    read_object,
)
from broker.web.body import idempotency_of, optional_text, read_query, text_field

PATHS = re.compile(r"/v1(?:/|\Z)")
_APP = "/v1/apps/{app_id}"
_PAGE_HEADERS = "content-type, passage-flex-version"
_PROOFS = frozenset(get_args(Proof))
_LOGINS: tuple[Proof, ...] = ("register", "authenticate")
_NONCE = Nonce()
_NO_FILTERS = frozenset({"login_count", "created_at", "updated_at", "last_login_at"})

STATUS: Mapping[type[Refusal], int] = {
    **edge.STATUS,
    errors.InvalidKey: 401,
    errors.UnknownNonce: 401,
    errors.CeremonyRefused: 401,
    errors.DiscoverableRefused: 401,
    errors.WrongMailCode: 401,
    errors.UserDisabled: 403,
    errors.UnknownApp: 404,
    errors.UnknownUser: 404,
    errors.UnknownPasskey: 404,
    errors.UnknownTransaction: 404,
    errors.UnknownMailCode: 404,
    errors.UnknownTicket: 404,
    errors.NoPasskeys: 409,
    errors.TooManyPasskeys: 409,
    errors.OwnedAlready: 409,
    errors.DuplicateApproval: 409,
}


def render(refusal: Refusal, _: web.Request | None = None) -> web.Response:
    """`{code, error}`, and `doc`, `retry` or `signal` if the refusal has them."""
    body: dict[str, Any] = {"code": refusal.code, "error": refusal.sentence}
    if refusal.doc:
        body["doc"] = refusal.doc
    if isinstance(refusal, errors.Unavailable) and refusal.retry:
        body["retry"] = refusal.retry
    if isinstance(refusal, errors.CeremonyRefused) and refusal.signal:
        body["signal"] = {
            "type": "unknown_credential",
            "rp_id": refusal.signal.rp_id,
            "credential_id": base64url(refusal.signal.credential_id),
        }
    return json_answer(body, status=STATUS[type(refusal)])


# -- management ------------------------------------------------------------------------------------


async def open_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """M1. `{external_id, passkey_display_name}`, and beyond the contract `user_name?` and the
    options of `fields`, to 201 `{transaction_id}`."""
    body = await read_object(request)
    external_id, shown = text_field(body, "external_id"), text_field(body, "passkey_display_name")
    validate_text(shown, "passkey_display_name")
    transaction_id = await request.app[BROKER].open_registration(
        caller,
        external_id,
        Names(optional_text(body, "user_name") or shown, shown, shown),
        registration_options(body, at_a_page=True)._replace(
            binding_challenge=binding_challenge(body)
        ),
        await idempotency_of(request, bearer(request)),
    )
    return json_answer({"transaction_id": transaction_id}, status=201)


async def open_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """M2. `{external_id}`, and beyond the contract the options of `fields`, to 201
    `{transaction_id}`.
    """
    body = await read_object(request)
    external_id, options = authentication_options(body)
    if "binding_challenge" in body:
        options = options._replace(binding_challenge=binding_challenge(body))
    idempotency = await idempotency_of(request, bearer(request))
    transaction_id = await request.app[BROKER].open_authentication(
        caller, external_id, options, idempotency
    )
    return json_answer({"transaction_id": transaction_id}, status=201)


async def cancel(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Beyond the contract: `{transaction_id}` to 200 with an empty body, also for a transaction
    that is unknown, used or ended.
    """
    body = await read_object(request)
    await request.app[BROKER].cancel(caller, text_field(body, "transaction_id"))
    return web.Response(status=200)


async def redeem(request: web.Request, caller: Caller) -> web.StreamResponse:
    """M3. `{nonce}`, and `purpose`, `transaction_id`, `external_id` if the caller expects them, and
    the `binding_verifier` of a bound nonce, to 200 with the receipt; with `signed` also as a token.
    """
    body = await read_object(request)
    nonce = text_field(body, "nonce")
    # An empty expectation is refused: an unset variable of the caller must not remove a check.
    purpose, transaction_id, external_id = (
        text_field(body, name) if name in body else None
        for name in ("purpose", "transaction_id", "external_id")
    )
    if purpose is not None and purpose not in _PROOFS:
        raise InvalidRequest(
            'purpose is "register" or "authenticate"; of a second factor "register_second_factor" '
            'or "authenticate_second_factor", of an approval "approve".'
        )
    proofs = _LOGINS if purpose is None else (cast("Proof", purpose),)
    outcome = await request.app[BROKER].redeem(
        caller,
        nonce,
        ExpectedReceipt(
            proofs, external_id, transaction_id, binding_verifier=binding_verifier(body)
        ),
        signed.receipt_token(request, caller.app) if switch(body, "signed") else None,
        await idempotency_of(request, bearer(request)),
    )
    answer = receipt_object(outcome.receipt)
    if outcome.token is not None:
        answer["token"] = outcome.token
    return json_answer(answer)


async def list_users(request: web.Request, caller: Caller) -> web.StreamResponse:
    """M4. A page of users. `identifier` is an external id, compared exactly; an unknown external id
    gives an empty list.
    """
    query = read_query(request)
    for name in query:
        if name in _NO_FILTERS:
            raise InvalidRequest(f"Users can't be filtered by {name}.")
        if len(query.getall(name)) > 1:
            raise InvalidRequest(f"{name[:64]} is given twice.")
    limit = whole(query.get("limit"), "limit", 10, 1, 500)
    page = whole(query.get("page"), "page", 1, 1, 1_000_000)
    before = query.get("created_before")
    created_before = whole(before, "created_before", 0, 0, 2**33) if before else None
    identifier = query.get("identifier")
    if identifier is not None and "\0" in identifier:
        raise InvalidRequest("identifier has a NUL character; no user has.")
    directory = request.app[DIRECTORY]
    users, total = await directory.users(
        caller.app,
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
        parts = urlsplit(
            base + "?" + urlencode({**shared, "page": number, "limit": limit}, quote_via=quote)
        )
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
            # Rounded up: a later page with this value includes every user that this page counts.
            "created_before": created_before
            if created_before is not None
            else math.ceil(directory.now().timestamp()),
            "limit": limit,
            "page": page,
            "total_users": total,
            "users": [listed_user_object(user) for user in users],
        }
    )


async def get_user(request: web.Request, caller: Caller) -> web.StreamResponse:
    """M5. The user with its devices."""
    directory = request.app[DIRECTORY]
    user = await directory.user(caller.app, user_id=request.match_info["user_id"])
    return json_answer({"user": user_object(user, await directory.credentials(caller.app, user))})


async def list_devices(request: web.Request, caller: Caller) -> web.StreamResponse:
    """M6. The user's passkeys."""
    directory = request.app[DIRECTORY]
    user = await directory.user(caller.app, user_id=request.match_info["user_id"])
    return json_answer(
        {"devices": [device_object(c) for c in await directory.credentials(caller.app, user)]}
    )


async def revoke_device(request: web.Request, caller: Caller) -> web.StreamResponse:
    """M7. Revoke a passkey; 200 with an empty body."""
    directory = request.app[DIRECTORY]
    user = await directory.user(caller.app, user_id=request.match_info["user_id"])
    await directory.revoke(caller.app, user, request.match_info["device_id"])
    return web.Response(status=200)


async def get_app(_: web.Request, caller: Caller) -> web.StreamResponse:
    """M8. The whole app, which old clients read at start."""
    return json_answer({"app": app_object(caller.app)})


async def get_app_public(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A5. The public subset of the app. Old browser clients compare `auth_origin` with the page's
    origin, so a page of a registered origin gets its own origin there.
    """
    shown = public_app_object(caller.app, request.headers.get(hdrs.ORIGIN))
    return json_answer({"app": shown}, headers={"Vary": "Origin"})


_keyed_app = keyed(get_app)
_public_app = public_app(get_app_public)


@public
async def either_app(request: web.Request) -> web.StreamResponse:
    """M8 with a key, A5 without a key, for a port that serves both APIs."""
    return await (_keyed_app if bearer(request) else _public_app)(request)


# -- browser ---------------------------------------------------------------------------------------


async def begin_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A1. `{transaction_id, authenticator_attachment?}` to `{handshake, transaction_id}`."""
    body = await read_object(request)
    transaction_id = text_field(body, "transaction_id")
    begun = await request.app[BROKER].begin_registration(
        caller, ByTransaction(transaction_id), PAGE, attachment=attachment(body)
    )
    return json_answer({"handshake": _handshake(begun), "transaction_id": transaction_id})


async def finish_registration(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A2. `{handshake_id, handshake_response, transaction_id}` to `{nonce}`."""
    body = await read_object(request)
    link, expect = _finished(body)
    answer = ceremony.parse_registration(body.get("handshake_response"))
    outcome = await request.app[BROKER].finish_registration(caller, link, answer, expect, _NONCE)
    return json_answer({"nonce": outcome.nonce})


async def begin_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A3. `{transaction_id?}`, `{binding_challenge?}` or an empty body to `{handshake,
    transaction_id?}`. Conditional mediation adds `mediation` beside `publicKey`.
    """
    body = await read_object(request, empty=True)
    transaction_id = optional_text(body, "transaction_id")
    challenge = binding_challenge(body)
    if challenge is not None and transaction_id is not None:
        raise InvalidRequest(
            "A transaction has its own binding_challenge; leave it out here.", reason="scope"
        )
    link = ANYONE if transaction_id is None else ByTransaction(transaction_id)
    options = NO_OPTIONS if challenge is None else CeremonyOptions(binding_challenge=challenge)
    begun = await request.app[BROKER].begin_authentication(caller, link, PAGE, options=options)
    answer: dict[str, Any] = {"handshake": _handshake(begun)}
    if transaction_id is not None:
        answer["transaction_id"] = transaction_id
    return json_answer(answer)


async def finish_authentication(request: web.Request, caller: Caller) -> web.StreamResponse:
    """A4. `{handshake_id, handshake_response, transaction_id?}` to `{nonce}`."""
    body = await read_object(request)
    link, expect = _finished(body)
    answer = ceremony.parse_authentication(body.get("handshake_response"))
    outcome = await request.app[BROKER].finish_authentication(caller, link, answer, expect, _NONCE)
    return json_answer({"nonce": outcome.nonce})


def _handshake(begun: Begun) -> dict[str, Any]:
    challenge: dict[str, Any] = {"publicKey": begun.public_key}
    if begun.mediation != "required":
        challenge["mediation"] = begun.mediation
    return {"id": begun.handle, "challenge": challenge}


def _finished(body: dict[str, Any]) -> tuple[ByHandle, ExpectedCeremony]:
    """The handle of the ceremony that a page finishes, and the expected transaction. Either factor
    may answer.
    """
    handle, transaction_id = text_field(body, "handshake_id"), optional_text(body, "transaction_id")
    return ByHandle(handle), ExpectedCeremony(
        (PAGE,), second_factor=None, transaction_id=transaction_id
    )


def routes(*, management: bool, browser: bool) -> list[web.RouteDef]:
    """The routes of a port that serves keyed callers, pages, or both."""
    found: list[web.RouteDef] = []  # the router searches in this order: sign-ins first
    if browser:
        found += browser_routes(
            {
                f"{_APP}/authenticate/transactions/webauthn/start": begin_authentication,
                f"{_APP}/authenticate/transactions/webauthn/finish": finish_authentication,
                f"{_APP}/register/transactions/webauthn/start": begin_registration,
                f"{_APP}/register/transactions/webauthn/finish": finish_registration,
            },
            headers=_PAGE_HEADERS,
        )
    if management:
        found += [
            web.post(f"{_APP}/transactions/authenticate", keyed(open_authentication)),
            web.post(f"{_APP}/authenticate/verify", keyed(redeem, limited=False)),
            web.post(f"{_APP}/transactions/register", keyed(open_registration)),
            web.post(f"{_APP}/transactions/cancel", keyed(cancel)),
            web.get(f"{_APP}/users", keyed(list_users), allow_head=False),
            web.get(f"{_APP}/users/{{user_id}}", keyed(get_user), allow_head=False),
            web.get(f"{_APP}/users/{{user_id}}/devices", keyed(list_devices), allow_head=False),
            web.delete(f"{_APP}/users/{{user_id}}/devices/{{device_id}}", keyed(revoke_device)),
            *ceremonies.routes(_APP),
            *management_routes(_APP),
            *signals.routes(_APP),
            *mail.routes(_APP),
        ]
    if browser:
        found += browser_routes(signals.pages(_APP), headers=_PAGE_HEADERS)
    found += signed.routes(_APP)
    app = either_app if management and browser else _keyed_app if management else _public_app
    for path in (_APP, _APP + "/"):
        found.append(web.get(path, app, allow_head=False))
        if browser:
            found.append(web.options(path, preflight_any(_PAGE_HEADERS)))
    return found


# -- fields ----------------------------------------------------------------------------------------


def _plain(value: str | None, name: str) -> str | None:
    if value and (value.startswith("<") or "\0" in value):
        raise InvalidRequest(f"{name} is compared exactly; filter operators are not offered.")
    return value


def _order(value: str | None) -> UserOrder:
    field, _, direction = (value or "created_at:ASC").partition(":")
    order = {"": field, "ASC": field, "DESC": "-" + field}.get(direction.upper())
    if field not in ("created_at", "updated_at", "id") or order is None:
        raise InvalidRequest("order_by is created_at, updated_at or id, with :ASC or :DESC.")
    return cast("UserOrder", order)
