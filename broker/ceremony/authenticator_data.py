"""Authenticator data: what the authenticator says it did. WebAuthn L3 §6.1, judged as §7.1 and §7.2
say alike.

    offset  0  32 bytes  SHA-256 of the RP ID
           32   1        flags: UP 0x01, UV 0x04, BE 0x08, BS 0x10, AT 0x40, ED 0x80
           33   4        signature counter, big-endian
           37   …        AT: AAGUID (16), length of the credential id (2), credential id, COSE key;
                ED: a CBOR map

The flags AT and ED alone say what follows; every byte must be accounted for. Reserved bits are
ignored, as §6.1 has them for future use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from broker.ceremony import cbor
from broker.ceremony.verdict import refuse
from broker.model import UserVerification

UP, UV, BE, BS, AT, ED = 0x01, 0x04, 0x08, 0x10, 0x40, 0x80
MAX_CREDENTIAL_ID = 1023


@dataclass(frozen=True, slots=True)
class AttestedCredential:
    """WebAuthn L3 §6.5.1. `public_key` is the COSE key as bytes, `members` the same as a map."""

    aaguid: bytes
    credential_id: bytes
    public_key: bytes
    members: Mapping[Any, Any]

    @property
    def aaguid_text(self) -> str:
        return str(UUID(bytes=self.aaguid))


class AuthenticatorData(NamedTuple):
    raw: bytes
    flags: int
    sign_count: int
    attested: AttestedCredential | None

    @property
    def rp_id_hash(self) -> bytes:
        return self.raw[:32]

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)


def read_authenticator_data(raw: bytes) -> AuthenticatorData:
    """Read all of `raw`.

    Raises:
        CeremonyRefused: "malformed"; "credential_id" for an empty or over-long one; "public_key"
            when it is no map.
    """
    if len(raw) < 37:
        raise refuse("malformed", "The authenticator data is shorter than 37 bytes.")
    flags, at, attested = raw[32], 37, None
    if flags & AT:
        attested, at = _read_attested(raw, at)
    if flags & ED:
        extensions, at = cbor.read(raw, at)
        if not isinstance(extensions, dict):
            raise refuse("malformed", "The extension data is not a CBOR map.")
    if at != len(raw):
        raise refuse("malformed", "Bytes are left over behind the authenticator data.")
    return AuthenticatorData(raw, flags, int.from_bytes(raw[33:37], "big"), attested)


def _read_attested(raw: bytes, at: int) -> tuple[AttestedCredential, int]:
    if len(raw) < at + 18:
        raise refuse("malformed", "The attested credential data ends too early.")
    length = int.from_bytes(raw[at + 16 : at + 18], "big")
    # §7.1 "Verify that the credentialId is ≤ 1023 bytes"
    if not 1 <= length <= MAX_CREDENTIAL_ID:
        raise refuse(
            "credential_id", f"The credential id is empty or longer than {MAX_CREDENTIAL_ID} bytes."
        )
    begin = at + 18 + length
    if len(raw) < begin:
        raise refuse("malformed", "The attested credential data ends too early.")
    members, end = cbor.read(raw, begin)
    if not isinstance(members, dict):
        raise refuse("public_key", "The public key is not a CBOR map.")
    return AttestedCredential(raw[at : at + 16], raw[at + 18 : begin], raw[begin:end], members), end


@lru_cache(maxsize=1024)
def _hash(rp_id: str) -> bytes:
    return hashlib.sha256(rp_id.encode()).digest()


def judge_authenticator_data(
    data: AuthenticatorData, *, rp_id: str, verification: UserVerification, presence: bool = True
) -> None:
    """Judge what both ceremonies have in common. `presence`: the user must have been present.

    Raises:
        CeremonyRefused: "rp_id", "user_presence", "user_verification", "backup_flags".
    """
    flags = data.flags
    # WebAuthn L3 §7.1, §7.2 "Verify that the rpIdHash in authData is the SHA-256 hash of the RP ID
    # expected"
    if data.rp_id_hash != _hash(rp_id):
        raise refuse("rp_id", "The passkey was made for another RP ID than the app's.")
    # §7.2 "Verify that the UP bit of the flags in authData is set"; §7.1 the same "If
    # options.mediation is not set to conditional"
    if presence and not flags & UP:
        raise refuse("user_presence", "The authenticator did not see the user.")
    # §7.1, §7.2 "If the Relying Party requires user verification … verify that the UV bit … is set"
    if verification == "required" and not flags & UV:
        raise refuse("user_verification", "The authenticator did not verify the user.")
    # §7.1, §7.2 "If the BE bit of the flags in authData is not set, verify that the BS bit is not
    # set"
    if flags & BS and not flags & BE:
        raise refuse(
            "backup_flags", "The passkey claims to be backed up without being eligible for it."
        )
