"""Ceremony options: PublicKeyCredentialCreationOptionsJSON and
PublicKeyCredentialRequestOptionsJSON.

WebAuthn L3 §5.4 and §5.5, in the JSON form of §5.1.8 and §5.1.9, for `parseCreationOptionsFromJSON`
and `parseRequestOptionsFromJSON`. `finish` verifies the answer against the same values, from the
pending ceremony and the policy: algorithms, user verification, challenge, allowed credentials.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from broker.model import Attachment, RelyingParty, UserVerification, base64url

Descriptor = tuple[bytes, tuple[str, ...]]


def begin_registration(
    rp: RelyingParty,
    *,
    challenge: bytes,
    user_handle: str,
    user_name: str,
    user_display_name: str,
    exclude: Sequence[Descriptor],
    life: float,
    attachment: Attachment | None,
    user_verification: UserVerification,
    discoverable: bool = True,
) -> dict[str, Any]:
    """The object under `publicKey` for `navigator.credentials.create()`.

    `exclude` holds the credential ids and transports of the user's passkeys. `life` is in seconds.
    `user.id` is the base64url of the handle's ASCII bytes, because some platforms treat it as text.
    A passkey is discoverable; a credential that is not `discoverable` is a second factor.
    """
    policy = rp.policy
    selection: dict[str, Any] = {
        "residentKey": "required" if discoverable else "discouraged",
        "requireResidentKey": discoverable,
        "userVerification": user_verification,
    }
    if attachment is not None:
        selection["authenticatorAttachment"] = attachment
    options: dict[str, Any] = {
        "rp": {"id": rp.rp_id, "name": rp.name},
        "user": {
            "id": base64url(user_handle.encode()),
            "name": user_name,
            "displayName": user_display_name,
        },
        "challenge": base64url(challenge),
        "pubKeyCredParams": [
            {"type": "public-key", "alg": algorithm} for algorithm in policy.algorithms
        ],
        "timeout": _milliseconds(life),
        "excludeCredentials": _descriptors(exclude),
        "authenticatorSelection": selection,
        "attestation": policy.attestation,
        "extensions": {},
    }
    if policy.hints:
        options["hints"] = list(policy.hints)
    return options


def begin_authentication(
    rp: RelyingParty,
    *,
    challenge: bytes,
    allow: Sequence[Descriptor],
    life: float,
    user_verification: UserVerification,
) -> dict[str, Any]:
    """The object under `publicKey` for `navigator.credentials.get()`.

    An empty `allow` permits any discoverable credential. `life` is in seconds.
    """
    options: dict[str, Any] = {
        "challenge": base64url(challenge),
        "rpId": rp.rp_id,
        "timeout": _milliseconds(life),
        "userVerification": user_verification,
        "extensions": {},
    }
    if allow:
        options["allowCredentials"] = _descriptors(allow)
    if rp.policy.hints:
        options["hints"] = list(rp.policy.hints)
    return options


def _milliseconds(life: float) -> int:
    return max(1, int(life * 1000))


def _descriptors(credentials: Sequence[Descriptor]) -> list[dict[str, Any]]:
    """PublicKeyCredentialDescriptor, WebAuthn L3 §5.8.3. `transports` is left out if none is known:
    some browsers read an empty list as "none".
    """
    return [
        {"type": "public-key", "id": base64url(credential_id)}
        | ({"transports": list(transports)} if transports else {})
        for credential_id, transports in credentials
    ]
