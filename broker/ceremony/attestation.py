"""Attestation statements, and how far they are trusted. WebAuthn L3 §8, §7.1 from "Determine the
attestation statement format".

`judge_attestation` verifies the statement against its format's rules and says what it proves:
nothing ("none"), something that nobody vouches for ("claimed"), or a chain to a root which the
policy names ("verified"). The package's docstring has the decisions. Statements reach this module
after `cbor` read them, so that types are all that can be wrong with their members.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from broker.ceremony import keys
from broker.ceremony.authenticator_data import AttestedCredential, AuthenticatorData
from broker.ceremony.verdict import PARSER_FAULTS, refuse
from broker.model import Policy, Trust

FIDO_AAGUID = ObjectIdentifier("1.3.6.1.4.1.45724.1.1.4")
APPLE_NONCE = ObjectIdentifier("1.2.840.113635.100.8.2")
ANDROID_KEY_DESCRIPTION = ObjectIdentifier("1.3.6.1.4.1.11129.2.1.17")
MAX_CHAIN = 4


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a statement is about: authenticator data, the credential in it, and the hash of the
    client data.
    """

    data: AuthenticatorData
    credential: AttestedCredential
    key: keys.PublicKey
    client_data_hash: bytes

    @property
    def signed(self) -> bytes:
        return self.data.raw + self.client_data_hash


@dataclass(frozen=True, slots=True)
class Certificate:
    """The attestation certificate with what its rules ask, read once: everything that parsing can
    raise was raised then.
    """

    raw: bytes
    certificate: x509.Certificate
    key: object
    extensions: x509.Extensions
    subject: x509.Name

    def extension(self, oid: ObjectIdentifier) -> x509.Extension[Any] | None:
        return next((e for e in self.extensions if e.oid == oid), None)

    def unknown(self, oid: ObjectIdentifier) -> bytes | None:
        """The value of an extension that X.509 libraries know nothing of."""
        found = self.extension(oid)
        return (
            found.value.value
            if found and isinstance(found.value, x509.UnrecognizedExtension)
            else None
        )


def wrong(sentence: str) -> Exception:
    return refuse("attestation", sentence)


def member(statement: Mapping[Any, Any], key: str, kind: type) -> Any:
    """A member of the statement that must be there with a type (never a bool for int), and not
    empty.
    """
    value = statement.get(key)
    if type(value) is not kind or value in (b"", ""):
        raise wrong(f"The attestation statement has no valid {key}.")
    return value


def read_chain(statement: Mapping[Any, Any]) -> tuple[Certificate, list[x509.Certificate]]:
    """The attestation certificate and the rest of `x5c`.

    Raises:
        CeremonyRefused: "attestation", when it is no list of certificates.
    """
    chain = statement.get("x5c")
    if (
        type(chain) is not list
        or not 1 <= len(chain) <= MAX_CHAIN
        or not all(type(c) is bytes for c in chain)
    ):
        raise wrong("The attestation statement's x5c is no list of certificates.")
    if len(set(chain)) != len(chain):
        raise wrong("The attestation statement's x5c names a certificate twice.")
    try:
        leaf, *rest = [x509.load_der_x509_certificate(raw) for raw in chain]
        if not all(_cheap(certificate.public_key()) for certificate in (leaf, *rest)):
            raise wrong("The attestation statement's x5c has a key that no attestation uses.")
        return Certificate(chain[0], leaf, leaf.public_key(), leaf.extensions, leaf.subject), rest
    except PARSER_FAULTS:
        raise wrong("A certificate of the attestation statement can't be read.") from None


def _cheap(key: object) -> bool:
    """Whether verifying with this key takes well under a millisecond: a stranger's certificates
    must not hold the event loop.
    """
    if isinstance(key, rsa.RSAPublicKey):
        return bool(key.key_size <= 4096 and key.public_numbers().e < 2**32)
    return isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)


def demand_end_entity(certificate: Certificate) -> None:
    """What §8.2.1 and §8.3.1 share: version 3, no certification authority, its AAGUID extension (if
    any) being the credential's.

    Raises:
        CeremonyRefused: "attestation".
    """
    if certificate.certificate.version is not x509.Version.v3:
        raise wrong("The attestation certificate is not of version 3.")
    constraints = certificate.extension(x509.BasicConstraints.oid)
    if constraints is None or constraints.value.ca:
        raise wrong("The attestation certificate does not exclude being an authority.")


def demand_aaguid(certificate: Certificate, aaguid: bytes) -> None:
    """§8.2, §8.3 "If attestnCert contains an extension with OID 1.3.6.1.4.1.45724.1.1.4 … verify
    that the value … matches".
    """
    found = certificate.extension(FIDO_AAGUID)
    if found is None:
        return
    if found.critical or certificate.unknown(FIDO_AAGUID) != b"\x04\x10" + aaguid:
        raise wrong("The attestation certificate is for another AAGUID.")


def chain_trust(
    leaf: Certificate, rest: list[x509.Certificate], policy: Policy, at: float
) -> Trust:
    """ "verified" when a chain leads from `leaf` through `rest` to one of the policy's roots, all
    valid at `at` (seconds since the epoch); else "claimed", or a refusal where the policy asks for
    attestation and has roots.

    Raises:
        CeremonyRefused: "attestation_trust".
    """
    if not policy.attestation_roots:
        return "claimed"
    try:
        builder = (
            PolicyBuilder()
            .store(_roots(policy.attestation_roots))
            .time(datetime.fromtimestamp(at, UTC))
        )
        builder = builder.extension_policies(
            ca_policy=_AUTHORITY, ee_policy=ExtensionPolicy.permit_all()
        )
        builder.build_client_verifier().verify(leaf.certificate, rest)
    except (VerificationError, *PARSER_FAULTS):
        if policy.attestation != "none":
            # WebAuthn L3 §7.1 "If the attestation statement attStmt verified successfully but is
            # not trustworthy"
            raise refuse(
                "attestation_trust",
                "The authenticator's attestation leads to none of the app's roots.",
            ) from None
        return "claimed"
    return "verified"


_AUTHORITY = ExtensionPolicy.permit_all().require_present(
    x509.BasicConstraints, Criticality.AGNOSTIC, None
)


@lru_cache(maxsize=64)
def _roots(pem: tuple[str, ...]) -> Store:
    return Store([x509.load_pem_x509_certificate(root.encode()) for root in pem])


def packed(
    statement: Mapping[Any, Any], about: Evidence
) -> tuple[Certificate, list[x509.Certificate]] | None:
    """§8.2. Returns the chain, or None for self attestation."""
    algorithm, signature = member(statement, "alg", int), member(statement, "sig", bytes)
    if "x5c" not in statement:
        # §8.2 "If x5c is not present, self attestation is in use. Validate that alg matches the
        # algorithm of the credentialPublicKey"
        if algorithm != about.credential.members[3]:
            raise wrong("The self attestation is of another algorithm than its key.")
        if not keys.verify(about.key, algorithm, signature, about.signed):
            raise wrong("The self attestation's signature does not verify.")
        return None
    leaf, rest = read_chain(statement)
    if algorithm == keys.RS1 or not keys.verify(leaf.key, algorithm, signature, about.signed):
        raise wrong("The attestation's signature does not verify.")
    demand_end_entity(leaf)
    demand_aaguid(leaf, about.credential.aaguid)
    named = {attribute.oid: attribute.value for attribute in leaf.subject}
    country = named.get(NameOID.COUNTRY_NAME)
    # §8.2.1 "The Subject field MUST be set to: Subject-C …, Subject-O …, Subject-OU …, Subject-CN"
    if (
        not (isinstance(country, str) and len(country) == 2 and country.isalpha())
        or not named.get(NameOID.ORGANIZATION_NAME)
        or named.get(NameOID.ORGANIZATIONAL_UNIT_NAME) != "Authenticator Attestation"
        or not named.get(NameOID.COMMON_NAME)
    ):
        raise wrong("The attestation certificate's subject is not that of an authenticator.")
    return leaf, rest


def fido_u2f(
    statement: Mapping[Any, Any], about: Evidence
) -> tuple[Certificate, list[x509.Certificate]]:
    """§8.6."""
    signature = member(statement, "sig", bytes)
    leaf, rest = read_chain(statement)
    if rest:
        raise wrong("A fido-u2f statement has one certificate.")
    if not isinstance(leaf.key, ec.EllipticCurvePublicKey) or not isinstance(
        leaf.key.curve, ec.SECP256R1
    ):
        raise wrong("The attestation certificate's key is not on P-256.")
    if about.credential.members[3] != keys.ES256:
        raise wrong("A fido-u2f credential has an ES256 key.")
    point = b"\x04" + about.credential.members[-2] + about.credential.members[-3]
    message = (
        b"\x00"
        + about.data.rp_id_hash
        + about.client_data_hash
        + about.credential.credential_id
        + point
    )
    if not keys.verify(leaf.key, keys.ES256, signature, message):
        raise wrong("The attestation's signature does not verify.")
    return leaf, rest


def android_key(
    statement: Mapping[Any, Any], about: Evidence
) -> tuple[Certificate, list[x509.Certificate]]:
    """§8.4. `x5c` may hold the leaf alone."""
    algorithm, signature = member(statement, "alg", int), member(statement, "sig", bytes)
    leaf, rest = read_chain(statement)
    if algorithm == keys.RS1 or not keys.verify(leaf.key, algorithm, signature, about.signed):
        raise wrong("The attestation's signature does not verify.")
    if leaf.key != about.key:
        raise wrong("The attestation certificate is for another key than the credential's.")
    description = leaf.unknown(ANDROID_KEY_DESCRIPTION)
    if description is None:
        raise wrong("The attestation certificate has no Android key description.")
    _judge_key_description(description, about.client_data_hash)
    return leaf, rest


# KeyDescription ::= SEQUENCE { version, level, version, level, attestationChallenge, uniqueId,
# softwareEnforced, teeEnforced }
_KEY_DESCRIPTION = (0x02, 0x0A, 0x02, 0x0A, 0x04, 0x04, 0x30, 0x30)
_PURPOSE, _ALL_APPLICATIONS, _ORIGIN = 0xA1, 0xBF8458, 0xBF853E  # [1], [600], [702], explicit
_SIGN, _GENERATED = (
    bytes.fromhex("3103020102"),
    bytes.fromhex("020100"),
)  # SET { INTEGER 2 }; INTEGER 0


def _judge_key_description(raw: bytes, client_data_hash: bytes) -> None:
    outer = read_der(raw)
    parts = read_der(outer[0][1]) if [tag for tag, _ in outer] == [0x30] else []
    if tuple(tag for tag, _ in parts) != _KEY_DESCRIPTION:
        raise wrong("The Android key description can't be read.")
    # §8.4 "Verify that the attestationChallenge field … is identical to clientDataHash"
    if parts[4][1] != client_data_hash:
        raise wrong("The Android key description is for another challenge.")
    for _, enforced in parts[6:]:
        for tag, value in read_der(enforced):
            # §8.4 "The AuthorizationList.allApplications field is not present on either
            # authorization list"
            if tag == _ALL_APPLICATIONS:
                raise wrong("The Android key may be used by all applications.")
            # §8.4 "AuthorizationList.origin … equal to KM_ORIGIN_GENERATED",
            # "AuthorizationList.purpose … KM_PURPOSE_SIGN"
            if (tag == _ORIGIN and value != _GENERATED) or (tag == _PURPOSE and value != _SIGN):
                raise wrong("The Android key was not generated on the device for signing only.")


def read_der(raw: bytes) -> list[tuple[int, bytes]]:
    """The DER values in `raw`, one after the other: identifier octets as a number, and content
    (X.690 §8.1).

    Raises:
        CeremonyRefused: "attestation".
    """
    values, at = [], 0
    try:
        while at < len(raw):
            start, at = at, at + 1
            if raw[start] & 0x1F == 0x1F:
                while raw[at] & 0x80:
                    at += 1
                at += 1
            tag = int.from_bytes(raw[start:at][:4], "big")
            size, at = raw[at], at + 1
            if size & 0x80:
                width = size & 0x7F
                size, at = int.from_bytes(raw[at : at + width], "big"), at + width
            if size > len(raw) - at:
                raise IndexError(at)
            values.append((tag, raw[at : at + size]))
            at += size
    except IndexError:
        raise wrong("The attestation certificate's extension can't be read.") from None
    return values


def apple(
    statement: Mapping[Any, Any], about: Evidence
) -> tuple[Certificate, list[x509.Certificate]]:
    """§8.8."""
    leaf, rest = read_chain(statement)
    nonce = hashlib.sha256(about.signed).digest()
    # §8.8 "Verify that nonce equals the value of the extension with OID 1.2.840.113635.100.8.2":
    # SEQUENCE { [1] { OCTET STRING } }
    if leaf.unknown(APPLE_NONCE) != b"\x30\x24\xa1\x22\x04\x20" + nonce:
        raise wrong("The attestation certificate is for another ceremony.")
    if leaf.key != about.key:
        raise wrong("The attestation certificate is for another key than the credential's.")
    return leaf, rest
