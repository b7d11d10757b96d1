"""PropelAuth BYO's answers, by command and status. The vendor's Java client fails on any field
more, its Python client on any less, so every shape is exact. The statuses are ours: the clients
tell errors apart by `type`, from a list of each command's own.
"""

from __future__ import annotations

from typing import Any

from tests.support.shapes import BYTES, EPOCH, either, word
from tests.support.webauthn import CREATION, REQUEST

Shape = dict[str, object]
DONE: Shape = {}


def error(kind: str, details: object = None) -> Shape:
    return {"type": word(kind)} | ({"details": details} if details is not None else {})


_COUNTS: Shape = {"max_passkeys": int, "current_count": int}
UNEXPECTED = error("UnexpectedError", str)
ORIGIN = error("OriginNotAllowed", {"message": str})
# The Java client fails on the camel-case names, which the Python client reads.
TOO_MANY = either(
    error("TooManyPasskeys", _COUNTS | {"maxPasskeys": int, "currentCount": int}),
    error("TooManyPasskeys", _COUNTS),
)
ANSWERS: dict[str, dict[int, object]] = {
    "StartPasskeyRegistration": {200: {"registrationOptions": CREATION}, 409: TOO_MANY},
    "FinishPasskeyRegistration": {
        200: DONE,
        400: error("NoRegistrationChallengeFound"),
        403: ORIGIN,
        409: error("PasskeyForUserAlreadyExists"),
    },
    "StartPasskeyAuthentication": {
        200: {"authenticationOptions": REQUEST},
        400: error("CannotParseAdditionalAllowedOrigin"),
        403: UNEXPECTED,
        404: error("NoPasskeysRegisteredForUser"),
    },
    "FinishPasskeyAuthentication": {
        200: DONE,
        400: either(error("NoAuthenticationChallengeFound"), UNEXPECTED),
        403: ORIGIN,
    },
    "FetchAllPasskeysForUser": {200: {"passkeys": [{"credentialId": BYTES, "displayName?": str}]}},
    "DeregisterPasskey": {200: DONE, 404: error("PasskeyNotFound")},
    "DeregisterAllPasskeysForUser": {200: DONE},
    "Ping": {
        200: {"timestamp": EPOCH},
        401: either(
            error("NoIntegrationKeyFoundInHeader"),
            error("InvalidPrefix", str),
            error("IntegrationKeyNotFound"),
        ),
    },
}
# Whatever the command, and where none is understood.
EVERYWHERE: dict[int, object] = dict.fromkeys((400, 404, 405, 413, 415, 429, 500, 503), UNEXPECTED)


def call(_method: str, _path: str, body: Any) -> str:
    """The command."""
    return str(body.get("command")) if isinstance(body, dict) else ""
