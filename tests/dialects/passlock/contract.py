"""Passlock's answers, by call and status: the vendor's server SDK decodes them by schema, its
browser SDK reads their tags.

What that SDK merely calls optional may be absent and may not be null; only `cursor` and a
challenge's `metadata` may. Of the errors each call knows a few tags and throws on any other, so
every call lists its own. Both generations of paths have the same answers: `/v2` is left out. Beyond
the contract: `purpose` in a principal and an id_token, and 422 for a reused Idempotency-Key.
"""

from __future__ import annotations

from typing import Any

from tests.support.shapes import (
    BYTES,
    EPOCH,
    EPOCH_MS,
    HANDLE,
    ID,
    NOTHING,
    OBJECT,
    Maybe,
    either,
    signed,
    text,
    word,
)
from tests.support.webauthn import CREATION, REQUEST, RSA, TRANSPORT, jwks

Shape = dict[str, object]


def error(tag: str, **more: object) -> Shape:
    return {"_tag": word(f"@error/{tag}"), "message": str, **more}


BAD_REQUEST, FORBIDDEN, NOT_FOUND = error("BadRequest"), error("Forbidden"), error("NotFound")
PASSKEY_NOT_FOUND = error("PasskeyNotFound", credentialId=BYTES, rpId=str)

# -- passkeys --------------------------------------------------------------------------------------

PASSKEY: Shape = {
    "_tag": word("Passkey"),
    "id": ID,
    "userId?": str,
    "enabled": bool,
    "credential": {
        "id": BYTES,
        "userId": HANDLE,
        "username": str,
        "aaguid": str,
        "backedUp": bool,
        "counter": int,
        "deviceType": word("singleDevice", "multiDevice"),
        "transports": [TRANSPORT],
        "publicKey": text("<ES256 key>"),
        "rpId": str,
    },
    "platform?": {"name?": str, "icon?": str},
    "lastUsed?": EPOCH_MS,
    "createdAt": EPOCH_MS,
    "updatedAt": EPOCH_MS,
}
SUMMARY: Shape = {
    "_tag": word("PasskeySummary"),
    "id": ID,
    "userId": str,
    "enabled": bool,
    "credential": {"id": BYTES, "userId": HANDLE},
    "createdAt": EPOCH_MS,
    "lastUsed?": EPOCH_MS,
}
FIND_ALL: Shape = {"_tag": word("FindAllPasskeys"), "cursor": Maybe(str), "records": [SUMMARY]}
UPDATED: Shape = {"_tag": word("UpdatedPasskeys"), "updated": [PASSKEY]}
DELETED: Shape = {"_tag": word("DeletedPasskeys"), "deleted": [PASSKEY]}
WARNING: Shape = {
    "code": word(
        "PASSKEY_NOT_FOUND",
        "NO_PASSKEYS_FOUND",
        "BROWSER_SIGNAL_UNSUPPORTED",
        "BROWSER_SIGNAL_FAILED",
        "EMPTY_SIGNAL_PAYLOAD",
    ),
    "message": str,
    "passkeyId?": ID,
}


def prepared(tag: str, token: str) -> Shape:
    return {
        "_tag": word(tag),
        token: text("<ticket>"),
        "expiresAt": EPOCH_MS,
        "warnings": [WARNING],
    }


def instructions(tag: str, **fields: object) -> Shape:
    instruction = {"rpId": str, "userId": HANDLE, **fields}
    return {"_tag": word(tag), "instructions": [instruction], "warnings": [WARNING]}


# What pages of clients before 2.5 read without a key.
CREDENTIAL: Shape = {"rpId": str, "userId": HANDLE, "credentialId": BYTES}
CREDENTIALS: Shape = {"rpId": str, "userId": HANDLE, "allAcceptedCredentialIds": [BYTES]}

# -- ceremonies ------------------------------------------------------------------------------------


def authorized(tag: str, token: str) -> Shape:
    return {"_tag": word(tag), token: text("<transaction>"), "expiresAt": EPOCH_MS}


CLAIMS: Shape = {
    "iss": word("passlock.dev"),
    "aud": ID,
    "sub": str,
    "jti": BYTES,
    "iat": EPOCH,
    "exp": EPOCH,
    "a:id": ID,
    "a:typ": word("passkey"),
    "pk:uv": bool,
    "purpose": word("register", "authenticate"),
}
_SESSION: Shape = {"sessionToken": text("<handshake>")}
REGISTRATION_OPTIONS: Shape = {**_SESSION, "optionsJSON": CREATION}
AUTHENTICATION_OPTIONS: Shape = {
    **_SESSION,
    "optionsJSON": REQUEST,
    "mediation": word("required", "conditional"),
}


def verified(tag: str) -> Shape:
    return {
        "_tag": word(tag),
        "principal": {"authenticatorId": ID, "userId": str},
        "id_token": signed(CLAIMS, "RS256"),
        "code": text("<nonce>"),
    }


PRINCIPAL: Shape = {
    "_tag": word("ExtendedPrincipal"),
    "id": BYTES,
    "authenticatorId": ID,
    "authenticatorType": word("passkey"),
    "userId": str,
    "createdAt": EPOCH_MS,
    "expiresAt": EPOCH_MS,
    "passkey?": {"verified": bool, "userVerified": bool, "platformName?": str},
    "metadata": {"ipAddress?": str, "userAgent?": str},
    "purpose": word("register", "authenticate"),
}

# -- mailbox challenges ----------------------------------------------------------------------------

_FACTS: Shape = {
    "challengeId": ID,
    "purpose": str,
    "email": str,
    "userId?": str,
    "createdAt": EPOCH_MS,
    "expiresAt": EPOCH_MS,
    "metadata": Maybe(OBJECT),
}
CHALLENGE: Shape = {"_tag": word("Challenge"), **_FACTS}
CHALLENGE_CREATED: Shape = {
    "_tag": word("ChallengeCreated"),
    "challenge": {
        **_FACTS,
        "secret": text("<mail secret>"),
        "code": text("<mail code>"),
        "message": {"html": str, "text": str},
    },
}
CHALLENGE_VERIFIED: Shape = {"_tag": word("ChallengeVerified"), "challenge": CHALLENGE}
RATE_LIMITED = error("ChallengeRateLimited", retryAfterSeconds=int)

# -- by call ---------------------------------------------------------------------------------------

_REGISTRATION, _AUTHENTICATION = (
    "POST /{t}/passkey/registration",
    "POST /{t}/passkey/authentication",
)
ANSWERS: dict[str, dict[int, object]] = {
    f"{_REGISTRATION}/authorize": {
        200: authorized("AuthorizedPasskeyRegistration", "registrationToken"),
        400: BAD_REQUEST,
    },
    f"{_REGISTRATION}/prepare": {
        200: authorized("PreparedPasskeyRegistration", "registrationToken")
    },
    f"{_REGISTRATION}/options": {200: REGISTRATION_OPTIONS, 400: BAD_REQUEST, 403: FORBIDDEN},
    f"{_REGISTRATION}/verification": {200: verified("RegistrationSuccess"), 400: BAD_REQUEST},
    f"{_AUTHENTICATION}/authorize": {
        200: authorized("AuthorizedPasskeyAuthentication", "authenticationToken"),
        400: BAD_REQUEST,
        409: BAD_REQUEST,
    },
    f"{_AUTHENTICATION}/prepare": {
        200: authorized("PreparedPasskeyAuthentication", "authenticationToken")
    },
    f"{_AUTHENTICATION}/options": {200: AUTHENTICATION_OPTIONS, 400: BAD_REQUEST, 429: BAD_REQUEST},
    f"{_AUTHENTICATION}/verification": {
        200: verified("AuthenticationSuccess"),
        400: either(BAD_REQUEST, PASSKEY_NOT_FOUND),
    },
    "GET /{t}/principal/{code}": {200: PRINCIPAL, 404: error("InvalidCode")},
    "POST /{t}/principal/{code}": {200: PRINCIPAL, 422: BAD_REQUEST},
    "GET /{t}/passkeys/": {200: FIND_ALL, 403: FORBIDDEN},
    "GET /{t}/passkeys/{id}": {200: PASSKEY, 404: NOT_FOUND},
    "PATCH /{t}/passkeys/{id}": {200: PASSKEY, 403: FORBIDDEN},
    "DELETE /{t}/passkeys/{id}": {202: PASSKEY},
    "PATCH /{t}/users/{user}/passkeys/": {200: UPDATED},
    "DELETE /{t}/users/{user}/passkeys/": {202: DELETED},
    "POST /{t}/passkeys/update": {202: prepared("PreparedPasskeyUpdate", "updatePasskeysToken")},
    "POST /{t}/passkeys/delete": {
        202: prepared("PreparedPasskeyDeletion", "deletePasskeysToken"),
        400: BAD_REQUEST,
    },
    "POST /{t}/passkeys/prune": {202: prepared("PreparedPasskeyPruning", "prunePasskeysToken")},
    "POST /{t}/passkeys/update/exchange": {
        200: instructions("PasskeyUpdateInstructions", username=str, displayName=str),
        400: BAD_REQUEST,
    },
    "POST /{t}/passkeys/delete/exchange": {
        200: instructions("PasskeyDeletionInstructions", credentialId=BYTES)
    },
    "POST /{t}/passkeys/prune/exchange": {
        200: instructions("PasskeyPruningInstructions", allAcceptedCredentialIds=[BYTES])
    },
    "GET /{t}/credential/{id}": {200: CREDENTIAL, 404: NOT_FOUND},
    "GET /{t}/credentials/{ids}": {200: CREDENTIALS},
    "POST /{t}/challenges": {201: CHALLENGE_CREATED, 400: BAD_REQUEST, 429: RATE_LIMITED},
    "GET /{t}/challenges/{id}": {200: CHALLENGE, 404: NOT_FOUND},
    "POST /{t}/challenges/verify": {
        200: CHALLENGE_VERIFIED,
        400: error("InvalidChallengeCode"),
        404: error("InvalidChallenge"),
        410: either(error("ChallengeExpired"), error("ChallengeAttemptsExceeded")),
    },
    "DELETE /{t}/challenges/{id}": {200: {"_tag": word("ChallengeDeleted")}},
    "GET /.well-known/jwks.json": {200: jwks(RSA)},
    "GET /aaguid/{aaguid}/icon.svg": {404: NOT_FOUND},
    "OPTIONS": {204: NOTHING},
}
# Whatever is asked for. The SDKs know none of these from 404 on.
EVERYWHERE: dict[int, object] = {
    404: NOT_FOUND,
    405: BAD_REQUEST,
    413: BAD_REQUEST,
    415: BAD_REQUEST,
    500: error("InternalServerError"),
    503: error("ServiceUnavailable"),
}


def call(method: str, path: str, _: Any) -> str:
    """What was asked for, in the words of `ANSWERS`, with ids where those have names."""
    return method if method == "OPTIONS" else f"{method} {path.removeprefix('/v2')}"
