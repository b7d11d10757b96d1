"""The "tpm" attestation statement format, WebAuthn L3 §8.3 and §8.3.1.

`pubArea` (TPMT_PUBLIC, TPM 2.0 Part 2 §12.2.4) describes the credential's key. `certInfo`
(TPMS_ATTEST, §10.12.8) names that key and carries the hash of the attested data. The attestation
identity key signs `certInfo`.

The reader is home-made. py_webauthn's parsers pass over a structure that ends early or late, and
expect fixed sizes of its parameters; this reader accounts for every byte. The manufacturers are
py_webauthn's list of the TCG's registry.
"""

from __future__ import annotations

import hmac
from collections.abc import Set

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from webauthn.helpers.tpm.structs import TPM_MANUFACTURERS

from broker.ceremony import cose
from broker.ceremony.attestation import (
    Certificate,
    Chain,
    VerificationInputs,
    read_chain,
    require_aaguid,
    require_attested,
    require_end_entity,
)
from broker.ceremony.reasons import refuse

MANUFACTURERS: frozenset[str] = frozenset(TPM_MANUFACTURERS)

_GENERATED, _CERTIFY = b"\xff\x54\x43\x47", b"\x80\x17"
_RSA, _ECC, _NULL = 0x0001, 0x0023, 0x0010
_NAME_HASHES: dict[int, hashes.HashAlgorithm] = {
    0x0004: hashes.SHA1(),  # noqa: S303 - the Name binds pubArea inside a signed structure; TPM 2.0 allows it
    0x000B: hashes.SHA256(),
    0x000C: hashes.SHA384(),
    0x000D: hashes.SHA512(),
}
_CURVES = {0x0003: "secp256r1", 0x0004: "secp384r1", 0x0005: "secp521r1"}
_MANUFACTURER, _MODEL, _VERSION = "2.23.133.2.1", "2.23.133.2.2", "2.23.133.2.3"
_AIK = x509.ObjectIdentifier("2.23.133.8.3")


class _Reader:
    """Reads big-endian fields of a TPM structure, in order."""

    def __init__(self, raw: bytes) -> None:
        self.rest = raw

    def take(self, count: int) -> bytes:
        require_attested(len(self.rest) >= count, "A TPM structure ends too early.")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def number(self, count: int = 2) -> int:
        return int.from_bytes(self.take(count), "big")

    def sized(self) -> bytes:
        """A TPM2B: two bytes of length, then so many bytes."""
        return self.take(self.number())

    def end(self) -> None:
        require_attested(not self.rest, "Bytes are left over behind a TPM structure.")


def tpm(inputs: VerificationInputs) -> Chain:
    """The "tpm" format, §8.3.

    Raises:
        CeremonyRefused: "attestation".
    """
    require_attested(
        inputs.statement.get("ver") == "2.0", "The TPM statement is not of version 2.0."
    )
    algorithm, signature = inputs.member("alg", int), inputs.member("sig", bytes)
    area, info = inputs.member("pubArea", bytes), inputs.member("certInfo", bytes)
    leaf, rest = read_chain(inputs.statement)
    name_algorithm = _judge_public_area(area, inputs.key)
    digest = cose.digest_for(algorithm)
    if digest is None:
        raise refuse("attestation", "The TPM statement's algorithm has no hash.")
    name = name_algorithm.to_bytes(2, "big") + _hash(_NAME_HASHES[name_algorithm], area)
    _judge_certificate_info(info, extra=_hash(digest, inputs.signed), name=name)
    # §8.3 "Verify the sig is a valid signature over certInfo using the attestation public key in
    # aikCert"
    require_attested(
        cose.verify(leaf.key, algorithm, signature, info),
        "The attestation's signature does not verify.",
    )
    _judge_certificate(leaf, inputs.tpm_manufacturers)
    require_aaguid(leaf, inputs.credential.aaguid)
    return leaf, rest


def _hash(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()


def _judge_public_area(raw: bytes, key: cose.PublicKey) -> int:
    """Verify `pubArea`; return its nameAlg.

    §8.3 "Verify that the public key specified by the parameters and unique fields of pubArea is
    identical to the credentialPublicKey".
    """
    area = _Reader(raw)
    kind, name_algorithm = area.number(), area.number()
    require_attested(
        name_algorithm in _NAME_HASHES, "The TPM key's name algorithm is not supported."
    )
    area.take(4)  # objectAttributes
    area.sized()  # authPolicy
    if area.number() != _NULL:
        area.take(4)  # symmetric: key bits, mode
    if area.number() != _NULL:
        area.take(2)  # scheme: hash
    if kind == _RSA and isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        area.take(2)  # keyBits
        same = (area.number(4) or 65537) == numbers.e
        same &= int.from_bytes(area.sized(), "big") == numbers.n
    elif kind == _ECC and isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_numbers()
        same = _CURVES.get(area.number()) == key.curve.name
        if area.number() != _NULL:
            area.take(2)  # kdf: hash
        same &= int.from_bytes(area.sized(), "big") == point.x
        same &= int.from_bytes(area.sized(), "big") == point.y
    else:
        raise refuse("attestation", "The TPM's key is of another type than the credential's.")
    area.end()
    require_attested(same, "The TPM's key is another than the credential's.")
    return name_algorithm


def _judge_certificate_info(raw: bytes, *, extra: bytes, name: bytes) -> None:
    """Verify `certInfo`.

    §8.3 "Verify that magic is set to TPM_GENERATED_VALUE … that extraData is set to the hash of
    attToBeSigned …".
    """
    info = _Reader(raw)
    require_attested(
        info.take(4) == _GENERATED and info.take(2) == _CERTIFY,
        "The TPM statement is no certification made by a TPM.",
    )
    info.sized()  # qualifiedSigner
    require_attested(
        hmac.compare_digest(info.sized(), extra), "The TPM statement is for another ceremony."
    )
    info.take(17 + 8)  # clockInfo, firmwareVersion
    require_attested(
        hmac.compare_digest(info.sized(), name), "The TPM statement names another key."
    )
    info.sized()  # qualifiedName
    info.end()


def _judge_certificate(leaf: Certificate, manufacturers: Set[str]) -> None:
    """§8.3.1 "TPM Attestation Statement Certificate Requirements"."""
    require_end_entity(leaf)
    require_attested(len(leaf.subject) == 0, "The TPM's certificate has a subject.")
    usage = leaf.extension(x509.ExtendedKeyUsage.oid)
    require_attested(
        usage is not None and _AIK in usage.value,
        "The TPM's certificate is not one of an attestation identity key.",
    )
    names = leaf.extension(x509.SubjectAlternativeName.oid)
    directory = names.value.get_values_for_type(x509.DirectoryName) if names else []
    named = {
        a.oid.dotted_string: a.value for name in directory for a in name if isinstance(a.value, str)
    }
    require_attested(
        f"id:{named.get(_MANUFACTURER, '')[3:].upper()}" in manufacturers
        and bool(named.get(_MODEL))
        and bool(named.get(_VERSION)),
        "The TPM's certificate names no known TPM.",
    )
