"""Public keys as COSE (RFC 9052, RFC 9053, RFC 8230), and signatures. WebAuthn L3 §5.8.5, §6.5.1.1, §6.5.6.

A key has exactly the members of its type: §6.5.1.1 "MUST contain the alg parameter and MUST NOT contain any other OPTIONAL
parameters". Type, curve and algorithm must fit each other as §5.8.5 says, so ES256 is P-256 and nothing else; points are
uncompressed and on the curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa

from broker.ceremony import cbor
from broker.ceremony.verdict import refuse

ES256, EDDSA, RS256, ES384, ES512, ED448 = -7, -8, -257, -35, -36, -53
RS1 = -65535  # attestation signatures of old TPMs only

# Those for which py_webauthn gives the verdict.
PY_WEBAUTHN_ALGORITHMS = frozenset({ES256, EDDSA, RS256, ES512})

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey

RSA_BITS = range(2048, 8193)

# algorithm: COSE curve, its class, length of a coordinate
_CURVES: dict[int, tuple[int, ec.EllipticCurve, int]] = {
    ES256: (1, ec.SECP256R1(), 32),
    ES384: (2, ec.SECP384R1(), 48),
    ES512: (3, ec.SECP521R1(), 66),
}
_ECDSA: dict[int, hashes.HashAlgorithm] = {
    ES256: hashes.SHA256(),
    ES384: hashes.SHA384(),
    ES512: hashes.SHA512(),
}
_RSA: dict[int, hashes.HashAlgorithm] = {
    RS256: hashes.SHA256(),
    -258: hashes.SHA384(),
    -259: hashes.SHA512(),
    RS1: hashes.SHA1(),  # noqa: S303 - judged by who calls: see tpm
}

# What stands round the coordinates of a P-256 key, as CTAP2's canonical CBOR writes it: {1: 2, 3: -7, -1: 1, -2: x, -3: y}.
_P256_BEGINS, _P256_BETWEEN = bytes.fromhex("a5010203262001215820"), bytes.fromhex("225820")
_P256_SIZE = 77

_EDWARDS: dict[int, type[ed25519.Ed25519PublicKey] | type[ed448.Ed448PublicKey]] = {
    EDDSA: ed25519.Ed25519PublicKey,
    ED448: ed448.Ed448PublicKey,
}


def digest_for(algorithm: int) -> hashes.HashAlgorithm | None:
    """The hash that a COSE signature algorithm employs, where it is a separate step; None for EdDSA and unknown ones."""
    return _ECDSA.get(algorithm) or _RSA.get(algorithm)


def load(members: Mapping[Any, Any]) -> PublicKey:
    """The public key that a COSE_Key map holds.

    Raises:
        CeremonyRefused: "public_key" when it is malformed, off its curve, too small or too large, or of no known algorithm.
    """
    algorithm = members.get(3)
    if type(algorithm) is not int:
        raise refuse("public_key", "The public key names no algorithm.")
    try:
        if algorithm in _CURVES:
            return _load_ec(members, algorithm)
        if algorithm == RS256:
            return _load_rsa(members)
        if algorithm == EDDSA:
            return ed25519.Ed25519PublicKey.from_public_bytes(_load_okp(members, curve=6, size=32))
        if algorithm == ED448:
            return ed448.Ed448PublicKey.from_public_bytes(_load_okp(members, curve=7, size=57))
    except ValueError:
        raise refuse("public_key", "The public key is not a valid key of its algorithm.") from None
    raise refuse("algorithm", "The public key is of an unknown algorithm.")


def load_stored(raw: bytes) -> PublicKey:
    """As `load`, from the bytes that a registration recorded."""
    members = cbor.read_all(raw)
    if not isinstance(members, dict):
        raise refuse("public_key", "The public key is not a CBOR map.")
    return load(members)


def for_py_webauthn(raw: bytes) -> bytes:
    """A stored key as py_webauthn reads it soonest: of P-256 the uncompressed point (SEC 1 §2.3.3, which it takes for ES256), else as it is."""
    if len(raw) == _P256_SIZE and raw.startswith(_P256_BEGINS) and raw[42:45] == _P256_BETWEEN:
        return b"\x04" + raw[10:42] + raw[45:]
    return raw


def _is(value: object, number: int) -> bool:
    """Whether a CBOR value is this integer; `true` and 1.0 equal 1 in Python, not in COSE."""
    return type(value) is int and value == number


def _expect(members: Mapping[Any, Any], kty: int, keys: set[int]) -> None:
    if set(members) != keys or not _is(members[1], kty):
        raise refuse("public_key", "The public key's members do not fit its algorithm.")


def _load_ec(members: Mapping[Any, Any], algorithm: int) -> ec.EllipticCurvePublicKey:
    curve, kind, size = _CURVES[algorithm]
    _expect(members, 2, {1, 3, -1, -2, -3})
    x, y = members[-2], members[-3]
    # §5.8.5 "Keys with algorithm ES256 (-7) MUST specify P-256 (1) as the crv parameter and MUST NOT use the compressed point form"
    if not _is(members[-1], curve) or not isinstance(x, bytes) or not isinstance(y, bytes):
        raise refuse(
            "public_key", "The public key's curve does not fit its algorithm, or its point is compressed."
        )
    if len(x) != size or len(y) != size:
        raise refuse("public_key", "The public key's coordinates have a wrong length.")
    return ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "big"), int.from_bytes(y, "big"), kind
    ).public_key()


def _load_rsa(members: Mapping[Any, Any]) -> rsa.RSAPublicKey:
    _expect(members, 3, {1, 3, -1, -2})
    n, e = members[-1], members[-2]
    # RFC 8230 §4 "… the octet sequence MUST utilize the minimum number of octets needed"
    if not isinstance(n, bytes) or not isinstance(e, bytes) or n[:1] in (b"", b"\0") or e[:1] in (b"", b"\0"):
        raise refuse("public_key", "The RSA key's numbers are not minimal byte strings.")
    modulus = int.from_bytes(n, "big")
    if modulus.bit_length() not in RSA_BITS or modulus % 2 == 0 or len(e) > 4:
        raise refuse("public_key", "The RSA key is too small, too large or no RSA key.")
    return rsa.RSAPublicNumbers(int.from_bytes(e, "big"), modulus).public_key()


def _load_okp(members: Mapping[Any, Any], *, curve: int, size: int) -> bytes:
    _expect(members, 1, {1, 3, -1, -2})
    x = members[-2]
    if not _is(members[-1], curve) or not isinstance(x, bytes) or len(x) != size:
        raise refuse("public_key", "The public key's curve or length does not fit its algorithm.")
    return x


def verify(key: object, algorithm: int, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` is right for a COSE signature algorithm; False also when key and algorithm do not fit."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and algorithm in _ECDSA:
            key.verify(signature, data, ec.ECDSA(_ECDSA[algorithm]))
        elif isinstance(key, rsa.RSAPublicKey) and algorithm in _RSA:
            key.verify(signature, data, padding.PKCS1v15(), _RSA[algorithm])
        elif algorithm in _EDWARDS and isinstance(key, _EDWARDS[algorithm]):
            key.verify(signature, data)
        else:
            return False
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):  # ValueError: a key too small for the hash
        return False
    return True
