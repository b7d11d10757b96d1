"""The Flex API's objects: receipts, users, devices and apps as JSON; passkeys, approvals and
events, beyond the contract.

Strict clients fail on a missing or null field. So every object has all fields of the contract,
with empty values for features that the broker lacks. An object may have more fields than the
contract. DECISIONS.md lists the differences from the contract.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from broker import ceremony
from broker.durable import instant
from broker.model import (
    ApprovalRecord,
    AuditRow,
    Credential,
    Owned,
    Receipt,
    RelyingParty,
    User,
    base64url,
)

_INT32 = 2**31 - 1


def rfc3339(value: datetime) -> str:
    """RFC 3339 in UTC, with microseconds. orjson needs a fifth of `isoformat`'s time, but omits the
    fraction of a whole second.
    """
    moment = orjson.dumps(value.astimezone(UTC), option=orjson.OPT_UTC_Z).decode()
    return moment[1:-1] if value.microsecond else f"{moment[1:-2]}.000000Z"


def receipt_object(receipt: Receipt) -> dict[str, Any]:
    """The receipt of a redemption. `purpose` tells the kind of proof: a second factor and an
    approval have values of their own, for neither is a login.
    """
    return {
        "external_id": receipt.external_id,
        "user_id": receipt.subject.user_id,
        "purpose": receipt.proof,
        "passkey_id": receipt.passkey_id,
        "credential_id": base64url(receipt.credential_id),
        "origin": receipt.origin,
        "user_present": receipt.user_present,
        "user_verified": receipt.user_verified,
        "backup_eligible": receipt.backup_eligible,
        "backed_up": receipt.backed_up,
        "backup_changed": receipt.backup_changed,
        "counter_regressed": receipt.counter_regressed,
        "attestation": receipt.attestation,
        "authenticator_name_claimed": receipt.authenticator_name_claimed,
        "second_factor": receipt.second_factor,
        "approval": receipt.approval,
        "at": rfc3339(instant(receipt.at)),
    }


def listed_user_object(user: User) -> dict[str, Any]:
    """A user in a list. `last_login_at` of a user without a login is the time of creation: strict
    clients need a string.
    """
    return {
        "id": user.id,
        "external_id": user.external_id,
        "email": "",
        "email_verified": False,
        "phone": "",
        "phone_verified": False,
        "status": user.status,
        "login_count": min(user.login_count, _INT32),
        "created_at": rfc3339(user.created_at),
        "updated_at": rfc3339(user.updated_at),
        "last_login_at": rfc3339(user.last_login_at or user.created_at),
        "user_metadata": None,
    }


def user_object(user: User, credentials: list[Credential]) -> dict[str, Any]:
    """A user with all devices."""
    return {
        **listed_user_object(user),
        "recent_events": [],
        "social_connections": {},
        "webauthn": bool(credentials),
        "webauthn_devices": [device_object(c) for c in credentials],
        "webauthn_types": sorted({_device_type(c) for c in credentials}),
    }


def device_object(credential: Credential) -> dict[str, Any]:
    """A passkey as the contract's device. Fields beyond the contract follow the contract's."""
    return {
        "id": credential.id,
        "cred_id": base64url(credential.credential_id),
        "friendly_name": credential.nickname or credential.user_name,
        "type": _device_type(credential),
        "usage_count": min(credential.use_count, _INT32),
        "created_at": rfc3339(credential.created_at),
        "updated_at": rfc3339(credential.updated_at),
        "last_login_at": rfc3339(credential.last_used_at or credential.created_at),
        "icons": {"light": None, "dark": None},
        "confirmed_at": rfc3339(credential.confirmed_at) if credential.confirmed_at else None,
        "last_used_at": rfc3339(credential.last_used_at) if credential.last_used_at else None,
        "backup_eligible": credential.backup_eligible,
        "backed_up": credential.backed_up,
        "transports": list(credential.transports),
        "aaguid": credential.aaguid,
        "attestation": credential.attestation_trust,
        "authenticator_name_claimed": ceremony.authenticator_name(credential.aaguid),
        "live": credential.live,
        "second_factor": credential.second_factor,
    }


def passkey_object(owned: Owned) -> dict[str, Any]:
    """A passkey in the broker's own terms. Without an owner `external_id` and `user_id` are
    null.
    """
    credential = owned.credential
    return {
        "id": credential.id,
        "external_id": owned.external_id,
        "user_id": credential.user_id if owned.external_id is not None else None,
        "credential_id": base64url(credential.credential_id),
        "nickname": credential.nickname or None,
        "user_name": credential.user_name,
        "user_display_name": credential.user_display_name,
        "type": _device_type(credential),
        "second_factor": credential.second_factor,
        "live": credential.live,
        "backup_eligible": credential.backup_eligible,
        "backed_up": credential.backed_up,
        "transports": list(credential.transports),
        "aaguid": credential.aaguid,
        "attestation": credential.attestation_trust,
        "authenticator_name_claimed": ceremony.authenticator_name(credential.aaguid),
        "use_count": credential.use_count,
        "created_at": rfc3339(credential.created_at),
        "updated_at": rfc3339(credential.updated_at),
        "confirmed_at": rfc3339(credential.confirmed_at) if credential.confirmed_at else None,
        "last_used_at": rfc3339(credential.last_used_at) if credential.last_used_at else None,
    }


def approval_object(record: ApprovalRecord) -> dict[str, Any]:
    """An approval, with the caller's own id. `approved_at` is null until the user has signed."""
    return {
        "id": record.identifier,
        "data": json.loads(record.data),
        "created_at": rfc3339(record.created_at),
        "approved_at": rfc3339(record.approved_at) if record.approved_at else None,
    }


def event_object(row: AuditRow) -> dict[str, Any]:
    """An audit event. `external_id` is null for an event without a user, or of a deleted user."""
    event = row.event
    return {
        "id": event.id,
        "at": rfc3339(event.at),
        "actor": event.actor,
        "action": event.action,
        "result": event.result,
        "reason": event.reason,
        "external_id": row.external_id,
        "user_id": event.user_id,
        "passkey_id": event.passkey_id,
        "request_id": event.request_id,
        "payload": event.payload,
        "address": event.address,
        "user_agent": event.user_agent,
    }


def _device_type(credential: Credential) -> Literal["passkey", "security_key", "platform"]:
    if credential.backup_eligible:
        return "passkey"
    if credential.attachment == "platform" or "internal" in credential.transports:
        return "platform"
    return "security_key"


def public_app_object(app: RelyingParty, origin: str | None = None) -> dict[str, Any]:
    """The public fields of an app. `auth_origin` is `origin` if the app lists it as a web origin,
    otherwise the first web origin.
    """
    known = app.web_origins or ("",)
    first = origin if origin in known else known[0]
    return {
        "id": app.id,
        "name": app.name,
        "type": "flex",
        "rp_id": app.rp_id,
        "auth_origin": first,
        "additional_auth_origins": [other for other in known if other != first],
    }


def app_object(app: RelyingParty) -> dict[str, Any]:
    """The app with every field that strict old clients need. Most fields describe features that the
    broker lacks.
    """
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
        "created_at": rfc3339(app.created_at or instant(0)),
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
