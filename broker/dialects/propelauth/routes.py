"""PropelAuth BYO's passkey commands, all at `POST /propelauth/run-command`.

One address takes `{command, data}` with an API key, and the key alone names the app. The user id
joins start and finish: each user has one pending registration and one pending authentication,
which a new start replaces. README.md summarises the wire contract, with every decision where the
contract is open.

The vendor's clients differ in strictness, so each answer satisfies the strictest. Success is 200
and no other 2xx. A body is JSON without a field beyond the contract's. An error is `{type}` or
`{type, details}`, as its type declares, and the command declares the type. A refusal without a type
of its own is `UnexpectedError` with a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aiohttp import hdrs, web

from broker import ceremony, errors
from broker.dialects.propelauth import OPENER
from broker.errors import InvalidRequest, InvalidSetting, OperationNotAllowed, Refusal
from broker.model import (
    MAX_TEXT,
    ByUser,
    Caller,
    ExpectedCeremony,
    Names,
    RelyingParty,
    base64url,
    is_origin,
    web_origin,
)
from broker.tokens import PREFIX as KEY_PREFIXES
from broker.web import BROKER, DIRECTORY, RATE_LIMITS, bearer, edge, json_answer, keyed, read_object
from broker.web.body import optional_text, parse_object, text_field

PREFIX = "/propelauth"
PATHS = re.compile(rf"{PREFIX}(?:/|\Z)")
_UNEXPECTED = "UnexpectedError"
_KEY_PREFIX = KEY_PREFIXES["key"]
_COMMAND = web.RequestKey("COMMAND", str)
_EXPECTED = ExpectedCeremony((OPENER,))

STATUS: Mapping[type[Refusal], int] = {
    **edge.STATUS,
    errors.UnknownNonce: 400,
    errors.UnknownTransaction: 400,
    errors.CeremonyRefused: 400,
    errors.DiscoverableRefused: 400,
    errors.WrongMailCode: 400,
    errors.InvalidKey: 401,
    errors.UnknownApp: 401,
    errors.UserDisabled: 403,
    errors.UnknownUser: 404,
    errors.UnknownPasskey: 404,
    errors.NoPasskeys: 404,
    errors.UnknownMailCode: 404,
    errors.UnknownTicket: 404,
    errors.TooManyPasskeys: 409,
    errors.OwnedAlready: 409,
    errors.DuplicateApproval: 409,
}

# Types by refusal and reason; a refusal without a row is UnexpectedError. First the rows of every
# command:
_KEY_TYPES: Mapping[tuple[type[Refusal], str], str] = {
    (errors.InvalidKey, "key_missing"): "NoIntegrationKeyFoundInHeader",
    (errors.InvalidKey, "key_malformed"): "InvalidPrefix",
    (errors.InvalidKey, "key_unknown"): "IntegrationKeyNotFound",
    (errors.UnknownApp, "app_not_found"): "IntegrationKeyNotFound",
}
# … then the rows of some commands.
_ORIGIN_FORM = {(errors.InvalidRequest, "additional_origin"): "CannotParseAdditionalAllowedOrigin"}
TYPES: Mapping[str, Mapping[tuple[type[Refusal], str], str]] = {
    "StartPasskeyRegistration": _ORIGIN_FORM
    | {(errors.TooManyPasskeys, "too_many_passkeys"): "TooManyPasskeys"},
    "FinishPasskeyRegistration": _ORIGIN_FORM
    | {
        (errors.UnknownTransaction, "user_has_no_ceremony"): "NoRegistrationChallengeFound",
        (errors.UnknownTransaction, "other_finish"): "NoRegistrationChallengeFound",
        (errors.UnknownTransaction, "term_over"): "NoRegistrationChallengeFound",
        (errors.CeremonyRefused, "challenge"): "NoRegistrationChallengeFound",
        (errors.CeremonyRefused, "origin"): "OriginNotAllowed",
        (errors.OperationNotAllowed, "additional_origin"): "OriginNotAllowed",
        (errors.CeremonyRefused, "duplicate"): "PasskeyForUserAlreadyExists",
    },
    "StartPasskeyAuthentication": _ORIGIN_FORM
    | {
        (errors.UnknownUser, "user_not_found"): "NoPasskeysRegisteredForUser",
        (errors.NoPasskeys, "user_has_no_passkeys"): "NoPasskeysRegisteredForUser",
    },
    "FinishPasskeyAuthentication": _ORIGIN_FORM
    | {
        (errors.UnknownTransaction, "user_has_no_ceremony"): "NoAuthenticationChallengeFound",
        (errors.UnknownTransaction, "other_finish"): "NoAuthenticationChallengeFound",
        (errors.UnknownTransaction, "term_over"): "NoAuthenticationChallengeFound",
        (errors.CeremonyRefused, "challenge"): "NoAuthenticationChallengeFound",
        (errors.CeremonyRefused, "origin"): "OriginNotAllowed",
        (errors.OperationNotAllowed, "additional_origin"): "OriginNotAllowed",
    },
    "FetchAllPasskeysForUser": {},
    "DeregisterPasskey": {(errors.UnknownPasskey, "device_not_found"): "PasskeyNotFound"},
    "DeregisterAllPasskeysForUser": {},
    "Ping": {},
}
# Types whose status differs from their refusal's.
_TYPE_STATUS = {"OriginNotAllowed": 403, "PasskeyForUserAlreadyExists": 409}


def render(refusal: Refusal, request: web.Request | None = None) -> web.Response:
    """`{type}` or `{type, details}`: the type that the request's command declares for this refusal,
    otherwise UnexpectedError.
    """
    command = request.get(_COMMAND, "") if request is not None else ""
    row = (type(refusal), refusal.reason)
    kind = _KEY_TYPES.get(row) or TYPES.get(command, {}).get(row, _UNEXPECTED)
    if kind == "InvalidPrefix" and request is not None and bearer(request).startswith(_KEY_PREFIX):
        kind = "IntegrationKeyNotFound"
    body: dict[str, Any] = {"type": kind}
    match kind:
        case "UnexpectedError":
            body["details"] = refusal.sentence
        case "InvalidPrefix":
            body["details"] = f"An integration key begins with {_KEY_PREFIX}."
        case "OriginNotAllowed":
            body["details"] = {"message": refusal.sentence}
        case "TooManyPasskeys" if isinstance(refusal, errors.TooManyPasskeys):
            agent = request.headers.get(hdrs.USER_AGENT, "") if request is not None else ""
            body["details"] = _limit_details(refusal, agent)
    status = _TYPE_STATUS.get(kind, STATUS[type(refusal)])
    return json_answer(body, status=status)


def _limit_details(refusal: errors.TooManyPasskeys, agent: str) -> dict[str, int]:
    """The details of the limit, by client: the vendor's Python client reads other names than the
    others, and the Java client rejects unknown names.
    """
    details = {"max_passkeys": refusal.limit, "current_count": refusal.count}
    if not agent.startswith("Java-http-client/"):
        details |= {"maxPasskeys": refusal.limit, "currentCount": refusal.count}
    return details


# -- commands --------------------------------------------------------------------------------------

Data = dict[str, Any]


async def start_registration(request: web.Request, caller: Caller, data: Data) -> Data:
    """`{userId, emailOrUsername, userDisplayName?, passkeyDisplayName?, additionalAllowedOrigin?}`
    to `{registrationOptions}`.
    """
    link, user_name = ByUser(_text(data, "userId")), _text(data, "emailOrUsername")
    names = Names(
        user_name,
        _optional(data, "userDisplayName") or user_name,
        _optional(data, "passkeyDisplayName") or "",
    )
    _additional_origin(data)
    begun = await request.app[BROKER].begin_registration(caller, link, OPENER, names=names)
    return {"registrationOptions": begun.public_key}


async def finish_registration(request: web.Request, caller: Caller, data: Data) -> Data:
    """`{userId, publicKey, additionalAllowedOrigin?}` to `{}`. `publicKey` is the browser's whole
    answer.
    """
    link, answer = ByUser(_text(data, "userId")), ceremony.parse_registration(_credential(data))
    _judge_registered(_additional_origin(data), caller.app)
    await request.app[BROKER].finish_registration(caller, link, answer, _EXPECTED)
    return {}


async def start_authentication(request: web.Request, caller: Caller, data: Data) -> Data:
    """`{userId, additionalAllowedOrigin?}` to `{authenticationOptions}`."""
    link = ByUser(_text(data, "userId"))
    _additional_origin(data)
    begun = await request.app[BROKER].begin_authentication(caller, link, OPENER)
    return {"authenticationOptions": begun.public_key}


async def finish_authentication(request: web.Request, caller: Caller, data: Data) -> Data:
    """`{userId, publicKey, additionalAllowedOrigin?}` to `{}`."""
    link, answer = ByUser(_text(data, "userId")), ceremony.parse_authentication(_credential(data))
    _judge_registered(_additional_origin(data), caller.app)
    await request.app[BROKER].finish_authentication(caller, link, answer, _EXPECTED)
    return {}


async def fetch_all(request: web.Request, caller: Caller, data: Data) -> Data:
    """`{userId}` to `{passkeys: [{credentialId, displayName?}]}`; empty for an unknown user."""
    passkeys = await request.app[DIRECTORY].credentials_of(caller.app, _text(data, "userId"))
    return {
        "passkeys": [
            {"credentialId": base64url(c.credential_id)}
            | ({"displayName": c.nickname} if c.nickname else {})
            for c in passkeys
        ]
    }


async def deregister(request: web.Request, caller: Caller, data: Data) -> Data:
    """`{userId, credentialId}` to `{}`."""
    user_id, credential_id = _text(data, "userId"), text_field(data, "credentialId")
    await request.app[DIRECTORY].revoke_of(caller.app, user_id, credential_id)
    return {}


async def deregister_all(request: web.Request, caller: Caller, data: Data) -> Data:
    """`{userId}` to `{}`, also for a user without passkeys."""
    await request.app[DIRECTORY].revoke_of(caller.app, _text(data, "userId"), None)
    return {}


async def ping(request: web.Request, _: Caller, __: Data) -> Data:
    """`{}` to `{timestamp}`, in whole seconds since the epoch."""
    return {"timestamp": int(request.app[DIRECTORY].now().timestamp())}


_COMMANDS = {
    "StartPasskeyRegistration": start_registration,
    "FinishPasskeyRegistration": finish_registration,
    "StartPasskeyAuthentication": start_authentication,
    "FinishPasskeyAuthentication": finish_authentication,
    "FetchAllPasskeysForUser": fetch_all,
    "DeregisterPasskey": deregister,
    "DeregisterAllPasskeysForUser": deregister_all,
    "Ping": ping,
}


async def run(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{command, data?}` to the command's answer. Missing and null `data` are `{}`; unknown fields
    are ignored.
    """
    body = await read_object(request)
    command = text_field(body, "command")
    if command not in _COMMANDS:
        raise InvalidRequest("There is no such command here.", reason="command")
    request[_COMMAND] = command
    if not command.startswith("Finish"):
        request.app[RATE_LIMITS].keyed_call(caller)
    data = {} if body.get("data") is None else body["data"]
    if not isinstance(data, dict):
        raise InvalidRequest("data is not an object.", reason="field_type")
    return json_answer(await _COMMANDS[command](request, caller, data))


def routes(*, management: bool, browser: bool) -> list[web.RouteDef]:
    """The route of all commands, on a port that serves keyed callers."""
    return [web.post(f"{PREFIX}/run-command", keyed(run, limited=False))] if management else []


# -- fields ----------------------------------------------------------------------------------------


def _text(data: Data, name: str) -> str:
    """A required string of 1 to 256 characters. Checked here, so that the refusal has the vendor's
    name of the field.
    """
    return _short(text_field(data, name), name)


def _optional(data: Data, name: str) -> str | None:
    value = optional_text(data, name)
    return _short(value, name) if value is not None else None


def _short(value: str, name: str) -> str:
    if len(value) > MAX_TEXT:
        raise InvalidRequest(f"{name} has {len(value)} characters; {MAX_TEXT} are allowed.")
    return value


def _credential(data: Data) -> object:
    """The browser's answer, an object or the JSON text of one."""
    value = data.get("publicKey")
    if value is None:
        raise InvalidRequest("publicKey is missing.", reason="missing_field")
    return parse_object(value.encode()) if isinstance(value, str) else value


def _additional_origin(data: Data) -> str | None:
    """The `additionalAllowedOrigin`, an origin by its form."""
    value = data.get("additionalAllowedOrigin")
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidRequest("additionalAllowedOrigin is not a string.", reason="field_type")
    if not is_origin(value) and not value.startswith("android:"):
        raise InvalidRequest(
            "additionalAllowedOrigin is not an origin.", reason="additional_origin"
        )
    return value


def _judge_registered(origin: str | None, app: RelyingParty) -> None:
    """Refuse an additional origin that the app doesn't list: a call can't add an origin. The
    refusal takes no pending ceremony.
    """
    if origin is None or origin in app.accepted_origins:
        return
    try:
        known = web_origin(origin) in app.accepted_origins
    except InvalidSetting:
        known = False
    if not known:
        raise OperationNotAllowed(
            "additionalAllowedOrigin is not one of the app's origins.",
            reason="additional_origin",
            hint="`broker app update --app A --add-origin ORIGIN` registers an origin.",
        )
