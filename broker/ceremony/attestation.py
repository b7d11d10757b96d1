"""Attestation statements: the verification procedures of WebAuthn L3 §8, and trust in their chains.

`packed`, `fido_u2f`, `android_key` and `apple` (and `tpm`, in its own module) each verify a
statement by the rules of its format. A procedure returns the certificate chain, or None for self
attestation. `chain_trust` then decides between "claimed" and "verified" by the policy's roots. The
package's docstring lists the decisions where the specification leaves room.

`cbor` has read every statement before, so only the types of its members are checked here.

The DER reader for Android's key description is home-made. py_webauthn and cryptography (`asn1`)
want a closed list of fields, and Android adds fields with each release. A generic reader finds the
three fields that §8.4 names and passes over the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeAlias

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

from broker.ceremony import cose
from broker.ceremony.authenticator_data import AttestedCredential, AuthenticatorData
from broker.ceremony.reasons import PARSER_FAULTS, refuse, require
from broker.model import Policy, Trust

FIDO_AAGUID = ObjectIdentifier("1.3.6.1.4.1.45724.1.1.4")
APPLE_NONCE = ObjectIdentifier("1.2.840.113635.100.8.2")
ANDROID_KEY_DESCRIPTION = ObjectIdentifier("1.3.6.1.4.1.11129.2.1.17")
MAX_CHAIN = 4

_NO_SIGNATURE = "The attestation's signature does not verify."
_OTHER_KEY = "The attestation certificate is for another key than the credential's."


@dataclass(frozen=True, slots=True)
class VerificationInputs:
    """The inputs of a verification procedure (WebAuthn L3 §6.5.2): the statement, the authenticator
    data with its credential, and the hash of the client data.

    `tpm_manufacturers` are the accepted TPM manufacturer ids, as `id:494E5443`.
    """

    statement: Mapping[Any, Any]
    data: AuthenticatorData
    credential: AttestedCredential
    key: cose.PublicKey
    client_data_hash: bytes
    tpm_manufacturers: Set[str]

    @property
    def signed(self) -> bytes:
        return self.data.raw + self.client_data_hash

    def member(self, name: str, kind: type) -> Any:
        """A required member of the statement: of exactly this type, and not empty."""
        value = self.statement.get(name)
        require_attested(
            type(value) is kind and value not in (b"", ""),
            f"The attestation statement has no valid {name}.",
        )
        return value


@dataclass(frozen=True, slots=True)
class Certificate:
    """An attestation certificate, parsed as a whole: no later access raises a parser's fault."""

    raw: bytes
    certificate: x509.Certificate
    key: object
    extensions: x509.Extensions
    subject: x509.Name

    def extension(self, oid: ObjectIdentifier) -> x509.Extension[Any] | None:
        return next((e for e in self.extensions if e.oid == oid), None)

    def raw_extension(self, oid: ObjectIdentifier) -> bytes | None:
        """The value of an extension that cryptography does not parse."""
        found = self.extension(oid)
        raw = found.value if found else None
        return raw.value if isinstance(raw, x509.UnrecognizedExtension) else None


Chain: TypeAlias = tuple[Certificate, list[x509.Certificate]]


def require_attested(condition: bool, detail: str) -> None:
    """Verify a rule of attestation.

    Raises:
        CeremonyRefused: "attestation".
    """
    require(condition, "attestation", detail)


def read_chain(statement: Mapping[Any, Any]) -> Chain:
    """The attestation certificate, and the other certificates of `x5c`.

    Raises:
        CeremonyRefused: "attestation", if `x5c` is not a list of one to `MAX_CHAIN` certificates.
    """
    chain = statement.get("x5c")
    if (
        type(chain) is not list
        or not 1 <= len(chain) <= MAX_CHAIN
        or not all(type(c) is bytes for c in chain)
    ):
        raise refuse("attestation", "The attestation statement's x5c is no list of certificates.")
    require_attested(
        len(set(chain)) == len(chain), "The attestation statement's x5c names a certificate twice."
    )
    try:
        leaf, *rest = [x509.load_der_x509_certificate(raw) for raw in chain]
        require_attested(
            all(_is_cheap(certificate.public_key()) for certificate in (leaf, *rest)),
            "The attestation statement's x5c has a key that no attestation uses.",
        )
        return Certificate(chain[0], leaf, leaf.public_key(), leaf.extensions, leaf.subject), rest
    except PARSER_FAULTS:
        raise refuse(
            "attestation", "A certificate of the attestation statement can't be read."
        ) from None


def _is_cheap(key: object) -> bool:
    """True if a verification with this key takes well under a millisecond.

    The certificates come from the browser, and the event loop verifies them.
    """
    if isinstance(key, rsa.RSAPublicKey):
        return bool(key.key_size <= 4096 and key.public_numbers().e < 2**32)
    return isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)


def require_end_entity(certificate: Certificate) -> None:
    """Verify what §8.2.1 and §8.3.1 share: version 3, and no certification authority.

    Raises:
        CeremonyRefused: "attestation".
    """
    require_attested(
        certificate.certificate.version is x509.Version.v3,
        "The attestation certificate is not of version 3.",
    )
    constraints = certificate.extension(x509.BasicConstraints.oid)
    require_attested(
        constraints is not None and not constraints.value.ca,
        "The attestation certificate does not exclude being an authority.",
    )


def require_aaguid(certificate: Certificate, aaguid: bytes) -> None:
    """§8.2, §8.3 "If attestnCert contains an extension with OID 1.3.6.1.4.1.45724.1.1.4 … verify
    that the value … matches".

    Raises:
        CeremonyRefused: "attestation".
    """
    found = certificate.extension(FIDO_AAGUID)
    matches = certificate.raw_extension(FIDO_AAGUID) == b"\x04\x10" + aaguid
    require_attested(
        found is None or (matches and not found.critical),
        "The attestation certificate is for another AAGUID.",
    )


def chain_trust(
    leaf: Certificate, rest: list[x509.Certificate], policy: Policy, at: float
) -> Trust:
    """ "verified" if a chain leads from `leaf` through `rest` to one of the policy's roots, all of
    them valid at `at` (seconds since the epoch); otherwise "claimed".

    Raises:
        CeremonyRefused: "attestation_trust", if no chain does, and the policy asks for attestation
            and has roots.
    """
    if not policy.attestation_roots:
        return "claimed"
    try:
        builder = (
            PolicyBuilder()
            .store(_roots(policy.attestation_roots))
            .time(datetime.fromtimestamp(at, UTC))
            .extension_policies(ca_policy=_AUTHORITY, ee_policy=ExtensionPolicy.permit_all())
        )
        builder.build_client_verifier().verify(leaf.certificate, rest)
    except (VerificationError, *PARSER_FAULTS):
        # WebAuthn L3 §7.1 "If the attestation statement attStmt verified successfully but is
        # not trustworthy"
        require(
            policy.attestation == "none",
            "attestation_trust",
            "The authenticator's attestation leads to none of the app's roots.",
        )
        return "claimed"
    return "verified"


_AUTHORITY = ExtensionPolicy.permit_all().require_present(
    x509.BasicConstraints, Criticality.AGNOSTIC, None
)


@lru_cache(maxsize=64)
def _roots(pem: tuple[str, ...]) -> Store:
    return Store([x509.load_pem_x509_certificate(root.encode()) for root in pem])


def packed(inputs: VerificationInputs) -> Chain | None:
    """The "packed" format, §8.2. None: self attestation."""
    if "x5c" not in inputs.statement:
        algorithm, signature = inputs.member("alg", int), inputs.member("sig", bytes)
        # §8.2 "If x5c is not present, self attestation is in use. Validate that alg matches the
        # algorithm of the credentialPublicKey"
        require_attested(
            algorithm == inputs.credential.members[3],
            "The self attestation is of another algorithm than its key.",
        )
        require_attested(
            cose.verify(inputs.key, algorithm, signature, inputs.signed),
            "The self attestation's signature does not verify.",
        )
        return None
    leaf, rest = _signing_chain(inputs)
    require_end_entity(leaf)
    require_aaguid(leaf, inputs.credential.aaguid)
    named = {attribute.oid: attribute.value for attribute in leaf.subject}
    country = named.get(NameOID.COUNTRY_NAME)
    # §8.2.1 "The Subject field MUST be set to: Subject-C …, Subject-O …, Subject-OU …, Subject-CN"
    require_attested(
        isinstance(country, str)
        and len(country) == 2
        and country.isalpha()
        and bool(named.get(NameOID.ORGANIZATION_NAME))
        and named.get(NameOID.ORGANIZATIONAL_UNIT_NAME) == "Authenticator Attestation"
        and bool(named.get(NameOID.COMMON_NAME)),
        "The attestation certificate's subject is not that of an authenticator.",
    )
    return leaf, rest


def _signing_chain(inputs: VerificationInputs) -> Chain:
    """The chain of `x5c`, whose first certificate signs the authenticator data and the hash of the
    client data.
    """
    algorithm, signature = inputs.member("alg", int), inputs.member("sig", bytes)
    leaf, rest = read_chain(inputs.statement)
    require_attested(
        algorithm != cose.RS1 and cose.verify(leaf.key, algorithm, signature, inputs.signed),
        _NO_SIGNATURE,
    )
    return leaf, rest


def fido_u2f(inputs: VerificationInputs) -> Chain:
    """The "fido-u2f" format, §8.6."""
    signature = inputs.member("sig", bytes)
    leaf, rest = read_chain(inputs.statement)
    require_attested(not rest, "A fido-u2f statement has one certificate.")
    require_attested(
        isinstance(leaf.key, ec.EllipticCurvePublicKey)
        and isinstance(leaf.key.curve, ec.SECP256R1),
        "The attestation certificate's key is not on P-256.",
    )
    members = inputs.credential.members
    require_attested(members[3] == cose.ES256, "A fido-u2f credential has an ES256 key.")
    message = b"".join(
        (
            b"\x00",
            inputs.data.rp_id_hash,
            inputs.client_data_hash,
            inputs.credential.credential_id,
            b"\x04" + members[-2] + members[-3],
        )
    )
    require_attested(cose.verify(leaf.key, cose.ES256, signature, message), _NO_SIGNATURE)
    return leaf, rest


def android_key(inputs: VerificationInputs) -> Chain:
    """The "android-key" format, §8.4. `x5c` may hold the leaf alone."""
    leaf, rest = _signing_chain(inputs)
    require_attested(leaf.key == inputs.key, _OTHER_KEY)
    description = leaf.raw_extension(ANDROID_KEY_DESCRIPTION)
    if description is None:
        raise refuse("attestation", "The attestation certificate has no Android key description.")
    _judge_key_description(description, inputs.client_data_hash)
    return leaf, rest


# KeyDescription ::= SEQUENCE { version, level, version, level, attestationChallenge, uniqueId,
# softwareEnforced, teeEnforced }
_KEY_DESCRIPTION = (0x02, 0x0A, 0x02, 0x0A, 0x04, 0x04, 0x30, 0x30)
_PURPOSE, _ALL_APPLICATIONS, _ORIGIN = 0xA1, 0xBF8458, 0xBF853E  # [1], [600], [702], explicit
# SET { INTEGER 2 }; INTEGER 0
_SIGN, _GENERATED = bytes.fromhex("3103020102"), bytes.fromhex("020100")


def _judge_key_description(raw: bytes, client_data_hash: bytes) -> None:
    outer = read_der(raw)
    parts = read_der(outer[0][1]) if [tag for tag, _ in outer] == [0x30] else []
    require_attested(
        tuple(tag for tag, _ in parts) == _KEY_DESCRIPTION,
        "The Android key description can't be read.",
    )
    # §8.4 "Verify that the attestationChallenge field … is identical to clientDataHash"
    require_attested(
        parts[4][1] == client_data_hash, "The Android key description is for another challenge."
    )
    enforced = [field for _, fields in parts[6:] for field in read_der(fields)]
    # §8.4 "The AuthorizationList.allApplications field is not present on either authorization list"
    require_attested(
        all(tag != _ALL_APPLICATIONS for tag, _ in enforced),
        "The Android key may be used by all applications.",
    )
    # §8.4 "AuthorizationList.origin … equal to KM_ORIGIN_GENERATED",
    # "AuthorizationList.purpose … KM_PURPOSE_SIGN"
    expected = {_ORIGIN: _GENERATED, _PURPOSE: _SIGN}
    require_attested(
        all(value == expected.get(tag, value) for tag, value in enforced),
        "The Android key was not generated on the device for signing only.",
    )


def read_der(raw: bytes) -> list[tuple[int, bytes]]:
    """The DER values in `raw`, each as its identifier octets (a number) and its content.

    Raises:
        CeremonyRefused: "attestation".

    Source: X.690 §8.1.
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
        raise refuse(
            "attestation", "The attestation certificate's extension can't be read."
        ) from None
    return values


def apple(inputs: VerificationInputs) -> Chain:
    """The "apple" format, §8.8."""
    leaf, rest = read_chain(inputs.statement)
    nonce = hashlib.sha256(inputs.signed).digest()
    # §8.8 "Verify that nonce equals the value of the extension with OID 1.2.840.113635.100.8.2":
    # SEQUENCE { [1] { OCTET STRING } }
    require_attested(
        leaf.raw_extension(APPLE_NONCE) == b"\x30\x24\xa1\x22\x04\x20" + nonce,
        "The attestation certificate is for another ceremony.",
    )
    require_attested(leaf.key == inputs.key, _OTHER_KEY)
    return leaf, rest
