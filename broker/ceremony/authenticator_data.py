"""Authenticator data: the signed bytes in which an authenticator reports a ceremony. WebAuthn L3
§6.1; rules that §7.1 and §7.2 share.

    offset  0  32 bytes  SHA-256 of the RP ID
           32   1        flags: UP 0x01, UV 0x04, BE 0x08, BS 0x10, AT 0x40, ED 0x80
           33   4        signature counter, big-endian
           37   …        AT: AAGUID (16), length of the credential id (2), credential id, COSE key;
                ED: a CBOR map

The flags AT and ED alone decide which parts follow. No byte may be left over. Reserved bits are
ignored: §6.1 keeps them for future use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from broker.ceremony import cbor
from broker.ceremony.reasons import refuse, require
from broker.model import UserVerification

UP, UV, BE, BS, AT, ED = 0x01, 0x04, 0x08, 0x10, 0x40, 0x80
MAX_CREDENTIAL_ID = 1023  # bytes; §7.1 "Verify that the credentialId is ≤ 1023 bytes"


@dataclass(frozen=True, slots=True)
class AttestedCredential:
    """Attested credential data (WebAuthn L3 §6.5.1).

    `public_key` holds the COSE key as bytes, `members` the same key as a map.
    """

    aaguid: bytes
    credential_id: bytes
    public_key: bytes
    members: Mapping[Any, Any]

    @property
    def aaguid_text(self) -> str:
        return str(UUID(bytes=self.aaguid))


class AuthenticatorData(NamedTuple):
    """Parsed authenticator data; `raw` are its bytes, which the signature covers."""

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
    """Read `raw` to its last byte.

    Raises:
        CeremonyRefused: "malformed"; "credential_id" if the id is empty or too long; "public_key"
            if the key is not a map.
    """
    require(len(raw) >= 37, "malformed", "The authenticator data is shorter than 37 bytes.")
    flags, at, attested = raw[32], 37, None
    if flags & AT:
        attested, at = _read_attested(raw, at)
    if flags & ED:
        extensions, at = cbor.read(raw, at)
        require(isinstance(extensions, dict), "malformed", "The extension data is not a CBOR map.")
    require(at == len(raw), "malformed", "Bytes are left over behind the authenticator data.")
    return AuthenticatorData(raw, flags, int.from_bytes(raw[33:37], "big"), attested)


def _read_attested(raw: bytes, at: int) -> tuple[AttestedCredential, int]:
    early = "The attested credential data ends too early."
    require(len(raw) >= at + 18, "malformed", early)
    length = int.from_bytes(raw[at + 16 : at + 18], "big")
    require(
        1 <= length <= MAX_CREDENTIAL_ID,
        "credential_id",
        f"The credential id is empty or longer than {MAX_CREDENTIAL_ID} bytes.",
    )
    begin = at + 18 + length
    require(len(raw) >= begin, "malformed", early)
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
    """Verify the rules that both ceremonies share. `presence` demands the flag UP.

    Raises:
        CeremonyRefused: "rp_id", "user_presence", "user_verification", "backup_flags".
    """
    # WebAuthn L3 §7.1, §7.2 "Verify that the rpIdHash in authData is the SHA-256 hash of the RP ID
    # expected"
    require(
        data.rp_id_hash == _hash(rp_id),
        "rp_id",
        "The passkey was made for another RP ID than the app's.",
    )
    # §7.2 "Verify that the UP bit of the flags in authData is set"; §7.1 the same "If
    # options.mediation is not set to conditional"
    require(
        data.has(UP) or not presence, "user_presence", "The authenticator did not see the user."
    )
    # §7.1, §7.2 "If the Relying Party requires user verification … verify that the UV bit … is set"
    require(
        data.has(UV) or verification != "required",
        "user_verification",
        "The authenticator did not verify the user.",
    )
    # §7.1, §7.2 "If the BE bit of the flags in authData is not set, verify that the BS bit is not
    # set"
    require(
        data.has(BE) or not data.has(BS),
        "backup_flags",
        "The passkey claims to be backed up without being eligible for it.",
    )
