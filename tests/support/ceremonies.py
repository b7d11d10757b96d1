"""What a broker would hold round a ceremony, for tests that judge answers without one: an app,
pending ceremonies, a credential.

    rp = relying_party(user_verification="preferred")
    made, device = registered(rp)                                # a credential, and the
                                                                 authenticator that holds it
    answer = device.authenticate(request_options(rp, made), ORIGIN, uv=False)
    seen = authenticate(rp, made, answer)                         # begin, form and finish, as the
                                                                  broker does it

Times are fixed and nothing is random but the authenticator's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Unpack

from broker.ceremony import (
    begin_authentication,
    begin_registration,
    finish_authentication,
    finish_registration,
    parse_authentication,
    parse_registration,
)
from broker.model import (
    ANYONE,
    CeremonyOptions,
    Credential,
    Named,
    PendingAuthentication,
    PendingRegistration,
    Policy,
    RelyingParty,
    UserEntity,
    VerifiedAuthentication,
    VerifiedRegistration,
)
from tests.support.authenticator import Authenticator, Misbehaviour, b64

APP, USER, PASSKEY = "A" * 24, "U" * 24, "P" * 24
ORIGIN, RP_ID = "https://example.com", "example.com"
HANDLE = b64(bytes(range(32)))
CHALLENGE = bytes(range(100, 132))
NOW = 1_767_225_600.0  # 2026-01-01


def relying_party(**policy: Any) -> RelyingParty:
    """An app on example.com with the default policy, changed as given."""
    return RelyingParty(APP, "Example", RP_ID, (ORIGIN,), policy=replace(Policy(), **policy))


def pending_registration(rp: RelyingParty, *, challenge: bytes = CHALLENGE) -> PendingRegistration:
    return PendingRegistration(
        app_id=rp.id,
        challenge=challenge,
        transaction=b"t" * 32,
        subject=Named(USER, "alice", 0),
        entity=UserEntity(HANDLE, "Alice", "Alice", "Alice"),
        options=CeremonyOptions(),
        user_verification=rp.policy.user_verification,
        algorithms=rp.policy.algorithms,
        begun_at=NOW,
        expires_at=NOW + 300,
    )


def pending_authentication(
    rp: RelyingParty, credential: Credential | None, *, challenge: bytes = CHALLENGE
) -> PendingAuthentication:
    """For one credential's user, or discoverable when there is none."""
    return PendingAuthentication(
        app_id=rp.id,
        challenge=challenge,
        transaction=b"t" * 32 if credential else None,
        subject=Named(credential.user_id, "alice", 0) if credential else ANYONE,
        allowed=(credential.id,) if credential else (),
        offered=(),
        approval=None,
        options=CeremonyOptions(),
        user_verification=rp.policy.user_verification,
        begun_at=NOW,
        expires_at=NOW + 300,
    )


def credential_of(made: VerifiedRegistration, rp: RelyingParty) -> Credential:
    """The credential that a broker would store."""
    at = datetime.fromtimestamp(NOW, UTC)
    return Credential(
        id=PASSKEY,
        app_id=rp.id,
        user_id=USER,
        credential_id=made.credential_id,
        user_handle=HANDLE,
        public_key=made.public_key,
        algorithm=made.algorithm,
        sign_count=made.sign_count,
        backup_eligible=made.backup_eligible,
        backed_up=made.backed_up,
        transports=made.transports,
        attachment=made.attachment,
        aaguid=made.aaguid,
        attestation_format=made.attestation_format,
        attestation_trust=made.attestation_trust,
        user_name="alice",
        user_display_name="Alice",
        nickname="",
        live=True,
        second_factor=False,
        confirmed_at=None,
        created_at=at,
        updated_at=at,
        last_used_at=None,
        use_count=0,
    )


def creation_options(rp: RelyingParty) -> dict[str, Any]:
    return begin_registration(
        rp,
        challenge=CHALLENGE,
        user_handle=HANDLE,
        user_name="alice",
        user_display_name="Alice",
        exclude=(),
        life=300,
        attachment=None,
        user_verification=rp.policy.user_verification,
    )


def request_options(rp: RelyingParty, credential: Credential | None) -> dict[str, Any]:
    allow = [(credential.credential_id, credential.transports)] if credential else []
    return begin_authentication(
        rp,
        challenge=CHALLENGE,
        allow=allow,
        life=300,
        user_verification=rp.policy.user_verification,
    )


def register(rp: RelyingParty, answer: Mapping[str, Any]) -> VerifiedRegistration:
    """Form and finish of a registration."""
    return finish_registration(pending_registration(rp), rp, parse_registration(answer))


def authenticate(
    rp: RelyingParty,
    credential: Credential,
    answer: Mapping[str, Any],
    *,
    discoverable: bool = False,
) -> VerifiedAuthentication:
    """Form and finish of an authentication."""
    pending = pending_authentication(rp, None if discoverable else credential)
    return finish_authentication(pending, rp, credential, parse_authentication(answer))


def registered(
    rp: RelyingParty, device: Authenticator | None = None, **how: Unpack[Misbehaviour]
) -> tuple[Credential, Authenticator]:
    """A credential that passed registration, and the authenticator that holds it."""
    device = device or Authenticator()
    made = register(rp, device.register(creation_options(rp), ORIGIN, **how))
    return credential_of(made, rp), device
