"""The Flex API's answers, by route and status: Passage Flex's, whose strictest client (Rust)
fails where a field is missing or null, and what the broker adds. Objects of the vendor's are
written as it has them; `WITH_…` are the same with our fields behind.
"""

from __future__ import annotations

from typing import Any

from tests.support.shapes import (
    BYTES,
    EPOCH,
    HANDLE,
    ID,
    NOTHING,
    OBJECT,
    TIME,
    Maybe,
    Whole,
    either,
    fits,
    signed,
    text,
    word,
)
from tests.support.webauthn import CREATION, P256, REQUEST, TRANSPORT, jwks

Shape = dict[str, object]
_INT, _LONG = Whole(32), Whole(64)

# -- the vendor's objects --------------------------------------------------------------------------

DEVICE: Shape = {
    "id": ID,
    "cred_id": BYTES,
    "friendly_name": str,
    "type": word("passkey", "security_key", "platform"),
    "usage_count": _INT,
    "created_at": TIME,
    "updated_at": TIME,
    "last_login_at": TIME,
    "icons": {"light": Maybe(str), "dark": Maybe(str)},
}
LISTED_USER: Shape = {
    "id": ID,
    "external_id": str,
    "email": str,
    "email_verified": bool,
    "phone": str,
    "phone_verified": bool,
    "status": word("active", "inactive", "pending"),
    "login_count": _INT,
    "created_at": TIME,
    "updated_at": TIME,
    "last_login_at": TIME,
    "user_metadata": Maybe(OBJECT),
}
RECENT_EVENT: Shape = {
    "created_at": TIME,
    "completed_at": Maybe(TIME),
    "id": str,
    "ip_addr": str,
    "status": word("complete", "incomplete"),
    "type": str,
    "user_agent": str,
    "user_agent_display": str,
    "action": word("register", "login", "other"),
    "social_login_type": Maybe(word("apple", "github", "google")),
}


def _user(device: Shape) -> Shape:
    return {
        "user": {
            **LISTED_USER,
            "recent_events": [RECENT_EVENT],
            "social_connections": OBJECT,
            "webauthn": bool,
            "webauthn_devices": [device],
            "webauthn_types": [word("passkey", "security_key", "platform")],
        }
    }


_HREF: Shape = {"href": str}
USER = _user(DEVICE)
DEVICES: Shape = {"devices": [DEVICE]}
USERS: Shape = {
    "_links": {"first": _HREF, "last": _HREF, "next": _HREF, "previous": _HREF, "self": _HREF},
    "created_before": EPOCH,
    "limit": _INT,
    "page": _INT,
    "total_users": _LONG,
    "users": [LISTED_USER],
}
_FALLBACK: Shape = {"enabled": bool, "ttl": _INT, "ttl_display_unit": word("s", "m", "h", "d")}
_APP: Shape = {
    "additional_auth_origins": [str],
    "allowed_callback_urls": [str],
    "allowed_identifier": str,
    "allowed_logout_urls": [str],
    "application_login_uri": str,
    "auth_fallback_method": str,
    "auth_fallback_method_ttl": _INT,
    "auth_methods": {"passkeys": {"enabled": bool}, "otp": _FALLBACK, "magic_link": _FALLBACK},
    "auth_origin": str,
    "auto_theme_enabled": bool,
    "created_at": TIME,
    "default_language": str,
    "id": ID,
    "layouts": {"profile": [OBJECT], "registration": [OBJECT]},
    "login_url": str,
    "name": str,
    "hosted": bool,
    "hosted_subdomain": str,
    "passage_branding": bool,
    "profile_management": bool,
    "public_signup": bool,
    "redirect_url": str,
    "refresh_absolute_lifetime": _INT,
    "refresh_enabled": bool,
    "refresh_inactivity_lifetime": _INT,
    "require_email_verification": bool,
    "require_identifier_verification": bool,
    "required_identifier": str,
    "role": str,
    "rsa_public_key": str,
    "session_timeout_length": _INT,
    "type": word("complete", "flex"),
    "user_metadata_schema": [OBJECT],
    "technologies": [str],
    "element_customization": OBJECT,
    "element_customization_dark": OBJECT,
}
APP: Shape = {"app": _APP}
TRANSACTION: Shape = {"transaction_id": text("<transaction>")}
VERIFIED: Shape = {"external_id": str}
NONCE: Shape = {"nonce": text("<nonce>")}
ERROR: Shape = {"code": str, "error": str}


def _handshake(options: Shape, **more: object) -> Shape:
    challenge = {"publicKey": options, **more}
    return {
        "handshake": {"id": text("<handshake>"), "challenge": challenge},
        "transaction_id?": text("<transaction>"),
    }


REGISTER_START = _handshake(CREATION)
AUTHENTICATE_START = _handshake(REQUEST, **{"mediation?": word("required", "conditional")})

# -- what we add -----------------------------------------------------------------------------------

_PASSKEY_FACTS: Shape = {
    "backup_eligible": bool,
    "backed_up": bool,
    "transports": [TRANSPORT],
    "aaguid": str,
    "attestation": word("none", "unverified", "verified"),
    "authenticator_name_claimed": Maybe(str),
    "live": bool,
    "second_factor": bool,
    "confirmed_at": Maybe(TIME),
    "last_used_at": Maybe(TIME),
}
WITH_DEVICE: Shape = DEVICE | _PASSKEY_FACTS
PASSKEY: Shape = {
    **_PASSKEY_FACTS,
    "id": ID,
    "external_id": Maybe(str),
    "user_id": Maybe(ID),
    "credential_id": BYTES,
    "nickname": Maybe(str),
    "user_name": str,
    "user_display_name": str,
    "type": word("passkey", "security_key", "platform"),
    "use_count": int,
    "created_at": TIME,
    "updated_at": TIME,
}
PUBLIC_APP: Shape = {
    "app": {
        "id": ID,
        "name": str,
        "type": word("flex"),
        "rp_id": str,
        "auth_origin": str,
        "additional_auth_origins": [str],
    }
}
WITH_APP: Shape = {"app": _APP | {"rp_id": str}}
RECEIPT: Shape = {
    "external_id": str,
    "user_id": ID,
    "purpose": word(
        "register",
        "authenticate",
        "register_second_factor",
        "authenticate_second_factor",
        "approve",
    ),
    "passkey_id": ID,
    "credential_id": BYTES,
    "origin": str,
    "user_present": bool,
    "user_verified": bool,
    "backup_eligible": bool,
    "backed_up": bool,
    "backup_changed": bool,
    "counter_regressed": bool,
    "attestation": word("none", "unverified", "verified"),
    "authenticator_name_claimed": Maybe(str),
    "second_factor": bool,
    "approval": Maybe(str),
    "at": TIME,
}
CLAIMS: Shape = {
    **RECEIPT,
    "iss": str,
    "sub": str,
    "aud": [ID],
    "iat": EPOCH,
    "exp": EPOCH,
    "jti": BYTES,
}
SIGNED_RECEIPT: Shape = {**RECEIPT, "token?": signed(CLAIMS, "ES256")}
_MAIL_CODE: Shape = {
    "id": ID,
    "purpose": str,
    "email": str,
    "external_id": Maybe(str),
    "metadata": Maybe(OBJECT),
    "created_at": TIME,
    "expires_at": TIME,
    "attempts_left": int,
}
_NEW_MAIL_CODE: Shape = {
    **_MAIL_CODE,
    "secret": text("<mail secret>"),
    "code": text("<mail code>"),
    "message": {"html": str, "text": str},
}
_PAGE: Shape = {"page": int, "limit": int, "total": int}
EVENT: Shape = {
    "id": text("<number>"),
    "at": TIME,
    "actor": str,
    "action": str,
    "result": word("done", "refused"),
    "reason": Maybe(str),
    "external_id": Maybe(str),
    "user_id": Maybe(ID),
    "passkey_id": Maybe(ID),
    "request_id": ID,
    "payload": Maybe(OBJECT),
    "address": Maybe(str),
    "user_agent": Maybe(str),
}
APPROVAL: Shape = {"id": str, "data": OBJECT, "created_at": TIME, "approved_at": Maybe(TIME)}
TICKET: Shape = {"ticket": text("<ticket>"), "expires_at": TIME, "missing": [ID], "empty": bool}
# Arguments of the WebAuthn Signal API (L3 §5.1.10).
CALL = either(
    {"rpId": str, "credentialId": BYTES},
    {"rpId": str, "userId": HANDLE, "allAcceptedCredentialIds": [BYTES]},
    {"rpId": str, "userId": HANDLE, "name": str, "displayName": str},
)


def error(*codes: str, **more: object) -> Shape:
    return ERROR | {"code": word(*codes), **more}


_ORPHAN = {"type": word("unknown_credential"), "rp_id": str, "credential_id": BYTES}
REFUSED = error("webauthn_login_failed", "discoverable_login_failed", **{"signal?": _ORPHAN})
_NO_TRANSACTION = error("transaction_not_found")
_BEGUN: dict[int, object] = {200: {"options": CREATION}, 409: error("too_many_passkeys")}
_FINISHED: dict[int, object] = {200: RECEIPT, 404: _NO_TRANSACTION}
_NO_CODE, _NO_DEVICE, _NO_TICKET = (
    error("mail_code_not_found"),
    error("device_not_found"),
    error("ticket_not_found"),
)

ANSWERS: dict[str, dict[int, object]] = {
    # The vendor's.
    "POST /transactions/register": {201: TRANSACTION, 401: error("invalid_access_token")},
    "POST /transactions/authenticate": {
        201: TRANSACTION,
        403: error("user_disabled"),
        409: error("user_has_no_passkeys"),
        422: error("idempotency_key_reused"),
    },
    "POST /authenticate/verify": {200: SIGNED_RECEIPT, 401: error("invalid_nonce")},
    "GET /users": {200: USERS},
    "GET /users/{id}": {200: _user(WITH_DEVICE), 404: error("user_not_found")},
    "GET /users/{id}/devices": {200: {"devices": [WITH_DEVICE]}},
    "DELETE /users/{id}/devices/{id}": {200: NOTHING, 404: _NO_DEVICE},
    "GET ": {200: either(PUBLIC_APP, WITH_APP)},
    "POST /register/transactions/webauthn/start": {200: REGISTER_START},
    "POST /register/transactions/webauthn/finish": {200: NONCE, 401: REFUSED, 404: _NO_TRANSACTION},
    "POST /authenticate/transactions/webauthn/start": {
        200: AUTHENTICATE_START,
        403: error("operation_not_allowed"),
        404: error("app_not_found"),
        429: error("too_many_requests"),
    },
    "POST /authenticate/transactions/webauthn/finish": {200: NONCE, 401: REFUSED},
    # Ours.
    "POST /register/start": _BEGUN,
    "POST /register/finish": _FINISHED,
    "POST /authenticate/start": {200: {"options": REQUEST}},
    "POST /authenticate/finish": _FINISHED,
    "POST /ceremonies/register/start": {200: {"options": CREATION}},
    "POST /ceremonies/register/finish": _FINISHED,
    "POST /ceremonies/authenticate/start": {
        200: {"options": REQUEST},
        409: error("approval_exists"),
    },
    "POST /ceremonies/authenticate/finish": {200: RECEIPT},
    "GET /passkeys": {200: {"passkeys": [PASSKEY], **_PAGE}},
    "GET /passkeys/{id}": {200: {"passkey": PASSKEY}, 404: _NO_DEVICE},
    "PATCH /passkeys/{id}": {200: {"passkey": PASSKEY}},
    "DELETE /passkeys/{id}": {200: NOTHING},
    "POST /passkeys/{id}/owner": {200: {"passkey": PASSKEY}, 409: error("passkey_has_owner")},
    "PATCH /users/{id}": {200: {"passkeys": [PASSKEY]}},
    "POST /users/{id}/disable": {200: NOTHING},
    "POST /users/{id}/enable": {200: NOTHING},
    "GET /users/{id}/approvals": {200: {"approvals": [APPROVAL]}},
    "GET /events": {200: {"events": [EVENT], **_PAGE}},
    "POST /transactions/cancel": {200: NOTHING},
    "POST /mail_codes": {
        201: {"mail_code": _NEW_MAIL_CODE},
        400: error("invalid_request"),
        429: error("mail_code_rate_limited"),
    },
    "GET /mail_codes/{id}": {200: {"mail_code": _MAIL_CODE}, 404: _NO_CODE},
    "POST /mail_codes/verify": {
        200: {"mail_code": _MAIL_CODE},
        401: error("mail_code_wrong"),
        404: _NO_CODE,
        410: error("mail_code_expired", "mail_code_attempts_exceeded"),
    },
    "DELETE /mail_codes/{id}": {200: NOTHING},
    "POST /signals/{kind}": {201: TICKET},
    "POST /signals/exchange": {200: {"calls": [CALL]}, 404: _NO_TICKET},
    "GET /.well-known/jwks.json": {200: jwks(P256)},
    "OPTIONS": {204: NOTHING},
}
EVERYWHERE: dict[int, object] = {
    404: error("not_found"),
    405: error("method_not_allowed"),
    413: error("request_too_large"),
    415: error("unsupported_media_type"),
    500: error("internal_server_error"),
    503: error("service_unavailable"),
}


def strict(value: Any, kind: object) -> None:
    """Fail unless the vendor's strictest client takes `value` for `kind`. Unknown keys it
    ignores.
    """
    fits(value, kind, closed=False)


def call(method: str, path: str, _: Any) -> str:
    """Method and path below the app; the app itself with or without a slash behind."""
    return (
        method
        if method == "OPTIONS"
        else f"{method} {path.removeprefix('/v1/apps/<id>').rstrip('/')}"
    )
