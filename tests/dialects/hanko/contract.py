"""Hanko's answers below the tenant, by route and status. Its SDK's types come from the vendor's
OpenAPI file; the titles of errors are the vendor's, where it has one. Beyond both: `extensions`,
`excludeCredentials` and `transports` in options; `jti` and `purpose` in a token.
"""

from __future__ import annotations

from typing import Any

from tests.support.shapes import (
    BYTES,
    EPOCH,
    ID,
    NOTHING,
    TIME,
    UUID,
    Maybe,
    either,
    signed,
    text,
    word,
)
from tests.support.webauthn import CREATION, REQUEST, RSA, TRANSPORT, USER, jwks

Shape = dict[str, object]


def error(*titles: str) -> Shape:
    return {"title": word(*titles), "details": str, "status": int}


_NO_CHALLENGE = "received challenge does not match with any stored one"
CREDENTIAL_NOT_FOUND = error("credential with id '<32 bytes>' not found")
BAD_FIELDS, UNREADABLE = error("unable to validate request"), error("unable to process request")
BAD = either(BAD_FIELDS, UNREADABLE)
NO_CREDENTIALS = error("user has no suitable credentials for this operation")
BAD_KEY = error("The api key is invalid")

CLAIMS: Shape = {
    "aud": [str],
    "cred": BYTES,
    "exp": EPOCH,
    "iat": EPOCH,
    "sub": str,
    "trans?": str,
    "jti": text("<nonce>"),
    "purpose": word(
        "register",
        "authenticate",
        "register_second_factor",
        "authenticate_second_factor",
        "approve",
    ),
}
TOKEN: Shape = {"token": signed(CLAIMS, "RS256")}
CREATION_OPTIONS: Shape = {"publicKey": {**CREATION, "user": {**USER, "icon?": str}}}
REQUEST_OPTIONS: Shape = {"publicKey": REQUEST}
CREDENTIAL: Shape = {
    "id": BYTES,
    "name?": str,
    "public_key": text("<ES256 key>"),
    "attestation_type": str,
    "aaguid": str,
    "last_used_at?": TIME,
    "created_at": TIME,
    "transports": [TRANSPORT],
    "backup_eligible": bool,
    "backup_state": bool,
    "is_mfa": bool,
    "user_id?": str,
}
TRANSACTION: Shape = {
    "id": UUID,
    "identifier": str,
    "data": str,
    "created_at": TIME,
    "updated_at": TIME,
}
_KINDS = tuple(
    f"{kind}_final_{result}"
    for kind in (
        "webauthn_registration",
        "webauthn_authentication",
        "webauthn_transaction",
        "mfa_registration",
        "mfa_authentication",
    )
    for result in ("succeeded", "failed")
)
AUDIT_LOG: Shape = {
    "id": text("<number>"),
    "type": word(*_KINDS, "webauthn_credential_updated", "webauthn_credential_deleted"),
    "error?": str,
    "meta_http_request_id": ID,
    "meta_source_ip": str,
    "meta_user_agent": str,
    "actor_user_id?": str,
    "created_at": TIME,
    "updated_at": TIME,
    "tenant_id": ID,
    "transaction_id": Maybe(str),
}

ANSWERS: dict[str, dict[int, object]] = {
    "POST /registration/initialize": {
        200: CREATION_OPTIONS,
        400: BAD,
        409: error("user has too many credentials"),
    },
    "POST /registration/finalize": {
        200: TOKEN,
        400: error(
            "unable to parse credential creation response",
            _NO_CHALLENGE,
            "failed to validate attestation",
        ),
        404: error("user not found"),
        422: error(
            "failed to validate attestation: the user was not verified: "
            "user verification is required"
        ),
    },
    "POST /login/initialize": {
        200: REQUEST_OPTIONS,
        400: either(BAD, NO_CREDENTIALS),
        401: error("The api key is invalid", "api key is missing"),
        403: error("Forbidden", "user is disabled"),
        404: error("user not found", "tenant not found"),
        429: error("Too Many Requests"),
    },
    "POST /login/finalize": {
        200: TOKEN,
        400: error("unable to finish login"),
        401: error("failed to get session data", "failed to validate assertion"),
    },
    "POST /mfa/registration/initialize": {200: CREATION_OPTIONS},
    "POST /mfa/registration/finalize": {200: TOKEN, 400: error(_NO_CHALLENGE)},
    "POST /mfa/login/initialize": {200: REQUEST_OPTIONS, 400: BAD_FIELDS},
    "POST /mfa/login/finalize": {200: TOKEN, 401: error("failed to get session data")},
    "POST /transaction/initialize": {
        200: REQUEST_OPTIONS,
        400: either(BAD_FIELDS, NO_CREDENTIALS),
        404: error("unable to find user"),
        409: error("transaction already exists"),
    },
    "POST /transaction/finalize": {
        200: TOKEN,
        400: error("unable to finish transaction"),
        401: error(
            "failed to get session data",
            "failed to get user handle",
            "failed to validate assertion",
        ),
    },
    "GET /transaction/{user_id}": {200: [TRANSACTION], 400: error("invalid user id")},
    "GET /credentials": {200: [CREDENTIAL], 400: BAD_FIELDS, 401: BAD_KEY},
    "GET /credentials/{id}": {200: CREDENTIAL, 404: CREDENTIAL_NOT_FOUND},
    "PATCH /credentials/{id}": {204: NOTHING, 400: BAD_FIELDS, 404: CREDENTIAL_NOT_FOUND},
    "DELETE /credentials/{id}": {204: NOTHING, 404: CREDENTIAL_NOT_FOUND},
    "GET /audit_logs": {200: [AUDIT_LOG], 400: BAD_FIELDS},
    "GET /.well-known/jwks.json": {200: jwks(RSA)},
    "OPTIONS": {204: NOTHING},
}
EVERYWHERE: dict[int, object] = {
    404: error("Not Found"),
    405: error("Method Not Allowed"),
    413: error("Request Entity Too Large"),
    415: error("Unsupported Media Type"),
    500: error("Internal Server Error"),
    503: error("Service Unavailable"),
}


def call(method: str, path: str, _: Any) -> str:
    """Method and path below the tenant."""
    return method if method == "OPTIONS" else f"{method} {path.removeprefix('/hanko/<id>')}"
