"""Passlock's API, at the root of the origin, because the vendor's server SDK drops the path of its
configured address.

    /v2/{tenancy}/…                              clients from 2.5 on: a backend authorises every
                                                 ceremony
    /{tenancy}/…                                 clients 2.0 to 2.4: the page begins
    /v2/.well-known/jwks.json, /.well-known/…    the key set of id_tokens, which names no tenancy
    /aaguid/{aaguid}/icon.svg                    the vendor's error: the broker has no icons

A tenancy is an app, and its id is the app's. A path whose id can't be an app's gets 403, the only
status that an SDK with a wrong tenancy handles. The first segments of
`_OTHERS` belong to other dialects and to the service. `ceremonies`, `management` and `mailbox`
translate the vendor's words; this module has the routes and renders refusals. README.md summarises
the wire contract, with every decision where the contract is open.

Every answer is JSON with a `_tag`, and every error is `{_tag, message}`. The vendor's server SDK
throws on a tag that its call does not declare. So a wrong key, an unknown tenancy and an origin
that is not registered are `@error/Forbidden`. Most other refusals are `@error/BadRequest` with a
status that says more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from broker import errors
from broker.dialects import DIALECTS
from broker.dialects.passlock import ceremonies, mailbox, management
from broker.errors import NotFound, Refusal, UnknownApp
from broker.model import base64url
from broker.signing import JWKS_MAX_AGE
from broker.web import SIGNING, browser_routes, edge, json_answer, keyed, public
from broker.web.body import as_incoming

# First segments of the root that are no tenancy: the service's own, and those of the dialects. A
# test compares them with the router.
_SEGMENTS = ("health", "metrics", "sdk", "demo", *(s for d in DIALECTS for s in d.segments))
_OTHERS = rf"(?:{'|'.join(map(re.escape, _SEGMENTS))})/"
# A segment in the tenancy's place that can't be an app's id. An escaped slash makes two segments.
_NO_TENANCY = r"(?![A-Za-z0-9]{24}/)(?:(?!%2[Ff])[^/])+"
# The unprefixed paths below a tenancy.
_BELOW = (
    r"(?:passkey/(?:registration|authentication)/(?:options|verification)|principal/[^/]+|passkeys/[^/]*"
    r"|users/(?s:.+)/passkeys/|challenges(?:/[^/]+)?|credentials?/[^/]+)"
)
PATHS = re.compile(
    r"/(?:v2|[A-Za-z0-9]{24}|\.well-known/jwks\.json|aaguid)(?:/|\Z)"
    rf"|/(?!{_OTHERS}){_NO_TENANCY}/{_BELOW}\Z"
)
_TENANCY = "{app_id:[A-Za-z0-9]{24}}"
_V2 = f"/v2/{_TENANCY}"
_V1 = f"/{_TENANCY}"
_PAGE_HEADERS = "content-type"

_BAD_REQUEST, _FORBIDDEN, _NOT_FOUND = "@error/BadRequest", "@error/Forbidden", "@error/NotFound"
_ORPHANED = "@error/PasskeyNotFound"

STATUS: Mapping[type[Refusal], int] = {
    **edge.STATUS,
    **mailbox.STATUS,
    errors.UnknownTransaction: 400,
    errors.UnknownTicket: 400,
    errors.UnknownUser: 400,
    errors.CeremonyRefused: 400,
    errors.DiscoverableRefused: 400,
    errors.InvalidKey: 403,
    errors.UnknownApp: 403,
    errors.UserDisabled: 403,
    errors.OwnedAlready: 403,
    errors.UnknownNonce: 404,
    errors.UnknownPasskey: 404,
    errors.NoPasskeys: 409,
    errors.TooManyPasskeys: 409,
    errors.DuplicateApproval: 409,
}
TAGS: Mapping[type[Refusal], str] = {
    **dict.fromkeys(STATUS, _BAD_REQUEST),
    **mailbox.TAGS,
    errors.InvalidKey: _FORBIDDEN,
    errors.UnknownApp: _FORBIDDEN,
    errors.UserDisabled: _FORBIDDEN,
    errors.OperationNotAllowed: _FORBIDDEN,
    errors.OwnedAlready: _FORBIDDEN,
    errors.UnknownNonce: "@error/InvalidCode",
    errors.UnknownPasskey: _NOT_FOUND,
    errors.NotFound: _NOT_FOUND,
    errors.InternalFault: "@error/InternalServerError",
    errors.Unavailable: "@error/ServiceUnavailable",
}


# Reasons of a refused sign-in with an unknown or deleted passkey.
_ORPHANS = frozenset({"unknown_credential", "revoked_or_counter"})


def render(refusal: Refusal, _: web.Request | None = None) -> web.Response:
    """`{_tag, message}`, and `credentialId` and `rpId` if no user has the passkey of the refused
    sign-in.
    """
    body: dict[str, Any] = {
        "_tag": TAGS[type(refusal)],
        "message": refusal.sentence,
    } | mailbox.details(refusal)
    signal = refusal.signal if isinstance(refusal, errors.CeremonyRefused) else None
    if signal is not None and refusal.reason in _ORPHANS:
        body |= {
            "_tag": _ORPHANED,
            "credentialId": base64url(signal.credential_id),
            "rpId": signal.rp_id,
        }
    return json_answer(body, status=STATUS[type(refusal)])


# -- public ----------------------------------------------------------------------------------------


@public
async def key_set(request: web.Request) -> web.StreamResponse:
    """The broker's own key set. Its keys sign for all tenancies, so a verifier must compare `aud`
    with its own tenancy.
    """
    keys = await request.app[SIGNING].key_set(None)
    as_incoming(request).cors = {"Access-Control-Allow-Origin": "*"}
    return json_answer(keys, headers={"Cache-Control": f"public, max-age={JWKS_MAX_AGE}"})


@public
async def icon(_: web.Request) -> web.StreamResponse:
    """The error of a missing icon: the broker has no icons."""
    raise NotFound("There are no icons here.", reason="no_icon")


@public
async def no_tenancy(_: web.Request) -> web.StreamResponse:
    """The error of a path whose id can't be an app's."""
    raise UnknownApp(
        "There is no such tenancy; its id has 24 letters and digits.", reason="tenancy"
    )


# -- routes ----------------------------------------------------------------------------------------


def routes(*, management: bool, browser: bool) -> list[web.RouteDef]:
    """The routes of a port that serves keyed callers, pages, or both. Verifiers reach the key set
    on either.
    """
    found = [
        web.get(f"{place}/.well-known/jwks.json", key_set, allow_head=False)
        for place in ("/v2", "")
    ]
    if management:
        found += _keyed_routes() + mailbox.routes(keyed)
    if browser:
        found += _page_routes()
        found.append(web.get("/aaguid/{aaguid}/icon.svg", icon, allow_head=False))
    return found + _without_tenancy(found)


def _without_tenancy(routes: list[web.RouteDef]) -> list[web.RouteDef]:
    """The paths of `routes` with a segment that can't be a tenancy, for any method. No path matches
    both lists.
    """
    paths = dict.fromkeys(route.path for route in routes if _TENANCY in route.path)
    places = (
        (_V2, f"/v2/{{app_id:{_NO_TENANCY}}}"),
        (_V1, f"/{{app_id:(?!{_OTHERS}){_NO_TENANCY}}}"),
    )
    return [
        web.route("*", other + path.removeprefix(place), no_tenancy)
        for path in paths
        for place, other in places
        if path.startswith(place)
    ]


def _keyed_routes() -> list[web.RouteDef]:
    registration, authentication = f"{_V2}/passkey/registration", f"{_V2}/passkey/authentication"
    authorized = {
        f"{registration}/authorize": ceremonies.authorize_registration(
            "AuthorizedPasskeyRegistration"
        ),
        f"{registration}/prepare": ceremonies.authorize_registration("PreparedPasskeyRegistration"),
        f"{authentication}/authorize": ceremonies.authorize_authentication(
            "AuthorizedPasskeyAuthentication"
        ),
        f"{authentication}/prepare": ceremonies.authorize_authentication(
            "PreparedPasskeyAuthentication"
        ),
    }
    changed = {
        f"{_V2}/passkeys/update": management.update_passkeys,
        f"{_V2}/passkeys/delete": management.delete_passkeys,
        f"{_V2}/passkeys/prune": management.prune_passkeys,
    }
    found = [web.post(path, keyed(handler)) for path, handler in (authorized | changed).items()]
    for tenancy in (_V2, _V1):
        code, passkey = f"{tenancy}/principal/{{code}}", f"{tenancy}/passkeys/{{passkey_id}}"
        # Clients put the user id into the path unescaped, with its slashes.
        user = f"{tenancy}/users/{{user_id:.+}}/passkeys/"
        found += [
            web.get(code, keyed(ceremonies.exchange_code, limited=False), allow_head=False),
            web.post(code, keyed(ceremonies.exchange_code_for, limited=False)),
            web.get(f"{tenancy}/passkeys/", keyed(management.list_passkeys), allow_head=False),
            web.get(passkey, keyed(management.get_passkey), allow_head=False),
            web.patch(passkey, keyed(management.change_passkey)),
            web.delete(passkey, keyed(management.delete_passkey)),
            web.patch(user, keyed(management.rename_user)),
            web.delete(user, keyed(management.delete_user)),
        ]
    return found


def _page_routes() -> list[web.RouteDef]:
    posts = {
        f"{tenancy}/passkey/{kind}": handler
        for tenancy in (_V2, _V1)
        for kind, handler in (
            ("registration/options", ceremonies.begin_registration),
            ("registration/verification", ceremonies.finish_registration),
            ("authentication/options", ceremonies.begin_authentication),
            ("authentication/verification", ceremonies.finish_authentication),
        )
    } | {
        f"{_V2}/passkeys/update/exchange": management.exchange_update,
        f"{_V2}/passkeys/delete/exchange": management.exchange_deletion,
        f"{_V2}/passkeys/prune/exchange": management.exchange_pruning,
    }
    gets = {
        f"{_V1}/credential/{{passkey_id}}": management.read_credential,
        f"{_V1}/credentials/{{passkey_ids}}": management.read_credentials,
    }
    return browser_routes(posts, gets=gets, headers=_PAGE_HEADERS)
