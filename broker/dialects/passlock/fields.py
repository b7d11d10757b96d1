"""Passlock's shared request fields and response objects: ceremony options, limits, and passkeys as
the vendor's clients read them.

The vendor's server SDK decodes by schema: a missing required field and a null in an optional field
both fail. So an absent optional field is always left out. All times are whole milliseconds since
the epoch. Binary values are base64url without padding.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any, cast, get_args

from broker import ceremony
from broker.errors import InvalidRequest
from broker.model import (
    ID,
    CeremonyOptions,
    Credential,
    Mediation,
    Owned,
    RelyingParty,
    UserVerification,
    base64url,
    is_weaker,
    validate_text,
)
from broker.web.body import optional_text, text_field

_LONGEST_ID = 64
_MOST_OF_A_PAGE = 20  # passkeys

Body = dict[str, Any]


def milliseconds(at: datetime) -> int:
    """Whole milliseconds since the epoch."""
    return int(at.timestamp() * 1000)


# -- fields of requests ----------------------------------------------------------------------------


def judge_rp_id(body: Body, app: RelyingParty) -> None:
    """Compare `rpId` with the app's RP ID, which no caller can change. Case makes no difference, as
    in host names.

    Raises:
        InvalidRequest: missing, or another RP ID.
    """
    if text_field(body, "rpId").lower() != app.rp_id:
        raise InvalidRequest(f"rpId is not {app.rp_id}, the RP ID of this tenancy.", reason="rp_id")


def judge_rp_name(body: Body) -> None:
    """`rpName` may be absent but not blank. Authenticators show the app's name instead.

    Raises:
        InvalidRequest.
    """
    if body.get("rpName") is not None and not text_field(body, "rpName").strip():
        raise InvalidRequest("rpName is blank.", reason="empty_field")


def short_text(body: Body, name: str) -> str:
    """A required string of 1 to 256 characters. Checked here, so that the refusal has the vendor's
    name of the field.
    """
    value = text_field(body, name)
    validate_text(value, name)
    return value


def optional_short_text(body: Body, name: str) -> str | None:
    """An optional string of up to 256 characters. None: absent, null or empty."""
    return short_text(body, name) if optional_text(body, name) is not None else None


def user_verification(body: Body) -> UserVerification | None:
    """`required`, `preferred` or `discouraged`. Null counts as absent, as in every optional
    field.
    """
    value = body.get("userVerification")
    if value is not None and value not in get_args(UserVerification):
        raise InvalidRequest(
            "userVerification is required, preferred or discouraged.", reason="field_type"
        )
    return cast("UserVerification | None", value)


def life(body: Body) -> float | None:
    """The ceremony's life in seconds, from `timeout` in milliseconds."""
    value = body.get("timeout")
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 1
    ):
        raise InvalidRequest("timeout is a number of milliseconds, 1 or more.", reason="field_type")
    return value / 1000


def passkey_ids(body: Body, name: str, *, most: int = 100) -> tuple[str, ...] | None:
    """A list of at most `most` passkey ids. None: absent or empty."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > most:
        raise InvalidRequest(
            f"{name} is a list of at most {most} passkey ids.", reason="field_type"
        )
    if not all(isinstance(item, str) and 0 < len(item) <= _LONGEST_ID for item in value):
        raise InvalidRequest(
            f"{name} holds something that can't be a passkey id.", reason="field_type"
        )
    return tuple(dict.fromkeys(value)) or None


def switch(body: Body, name: str) -> bool:
    """A boolean field; an absent field is false."""
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is true or false.", reason="field_type")
    return value


def registration_options(body: Body) -> CeremonyOptions:
    """The ceremony options of a registration: `userVerification`, `timeout`,
    `excludeCredentials`.
    """
    return CeremonyOptions(
        user_verification=user_verification(body),
        life=life(body),
        exclude=passkey_ids(body, "excludeCredentials"),
    )


def authentication_options(body: Body, app: RelyingParty) -> CeremonyOptions:
    """The ceremony options of an authentication: `userVerification`, `timeout`, `allowCredentials`,
    `mediation`. An ownerless passkey may answer if the policy lets pages register passkeys.
    """
    mediation = "required" if body.get("mediation") is None else body["mediation"]
    if mediation not in get_args(Mediation):
        raise InvalidRequest("mediation is required or conditional.", reason="field_type")
    return CeremonyOptions(
        user_verification=user_verification(body),
        life=life(body),
        allow=passkey_ids(body, "allowCredentials"),
        unowned=app.policy.ownerless_registration,
        mediation=cast("Mediation", mediation),
    )


def as_a_page_may(options: CeremonyOptions, app: RelyingParty) -> CeremonyOptions:
    """Restrict the options of a caller without a key.

    The number of passkeys is limited, because Redis stores their ids until the ceremony ends. User
    verification is never lower than the policy's.

    Raises:
        InvalidRequest: too many passkeys, or text that is no passkey's id.
    """
    for name, ids in (("allowCredentials", options.allow), ("excludeCredentials", options.exclude)):
        if ids is not None and (len(ids) > _MOST_OF_A_PAGE or not all(map(ID.match, ids))):
            raise InvalidRequest(
                f"{name} of a page is a list of at most {_MOST_OF_A_PAGE} passkey ids"
                " (24 letters and digits each).",
                reason="field_type",
            )
    wish = options.user_verification
    if wish is not None and is_weaker(wish, app.policy.user_verification):
        return options._replace(user_verification=None)
    return options


# -- passkeys in answers ---------------------------------------------------------------------------


def user_id_of(owned: Owned) -> str:
    """The owner's id. An ownerless passkey has its own id there, as with the vendor."""
    return owned.external_id if owned.external_id is not None else owned.credential.id


def handle_of(credential: Credential) -> str:
    """The user handle in base64url, as in WebAuthn's JSON."""
    return base64url(credential.user_handle.encode())


def summary_object(owned: Owned) -> Body:
    """A passkey in a list."""
    credential = owned.credential
    found: Body = {
        "_tag": "PasskeySummary",
        "id": credential.id,
        "userId": user_id_of(owned),
        "enabled": credential.live,
        "credential": {"id": base64url(credential.credential_id), "userId": handle_of(credential)},
        "createdAt": milliseconds(credential.created_at),
    }
    return found | _last_used(credential)


def passkey_object(owned: Owned, app: RelyingParty) -> Body:
    """A whole passkey. `platform.name` is the authenticator's claimed name. `platform.icon` is
    absent: the broker has no icons.
    """
    credential = owned.credential
    name = ceremony.authenticator_name(credential.aaguid)
    found: Body = {
        "_tag": "Passkey",
        "id": credential.id,
        "userId": user_id_of(owned),
        "enabled": credential.live,
        "credential": {
            "id": base64url(credential.credential_id),
            "userId": handle_of(credential),
            "username": credential.user_name,
            "aaguid": credential.aaguid,
            "backedUp": credential.backed_up,
            "counter": credential.sign_count,
            "deviceType": "multiDevice" if credential.backup_eligible else "singleDevice",
            "transports": list(credential.transports),
            "publicKey": base64url(credential.public_key),
            "rpId": app.rp_id,
        },
        "createdAt": milliseconds(credential.created_at),
        "updatedAt": milliseconds(credential.updated_at),
    }
    return (
        found | ({"platform": {"name": name}} if name is not None else {}) | _last_used(credential)
    )


def _last_used(credential: Credential) -> Body:
    return {"lastUsed": milliseconds(credential.last_used_at)} if credential.last_used_at else {}
