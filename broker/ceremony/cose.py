"""COSE public keys (RFC 9052, RFC 9053, RFC 8230) and their signatures. WebAuthn L3 §5.8.5,
§6.5.1.1, §6.5.6.

A key has exactly the members of its type: §6.5.1.1 "MUST contain the alg parameter and MUST NOT
contain any other OPTIONAL parameters". Type, curve and algorithm must fit each other as §5.8.5
says: ES256 is P-256 and nothing else. Points are uncompressed and on the curve.

A key for which a signature can be made without its private key is refused, new or stored:

- Ed25519, Ed448: a point of small order. With S = 0 and an R of small order the equation of RFC
  8032 §5.1.7 holds for some messages, and for the neutral point for all. Refused as well is an
  encoding that RFC 8032 §5.1.3 and §5.2.3 do not decode: y not below p, and "-0" for x, which only
  such points have.
- P-256, P-384, P-521: a point off the curve. Their cofactor is 1, and coordinates can't express the
  point at infinity.
- RSA: a key that fails the cheap part of the partial validation of NIST SP 800-89 §5.3.3. The
  exponent is even or below 3, or the modulus is even, a square or has a factor below 752. Whether
  a modulus is composite is not tested: that takes 30 ms for 2048 bits.

The checks are home-made. py_webauthn's decoder ignores unknown members and raises KeyError on
missing ones, and neither it nor cryptography refuses Edwards points of small order.

Cost of these checks: 0.2 ms (Ed25519) or 0.6 ms (Ed448) at a registration. At a sign-in 8 to 30 us,
to read the key again, and nothing for ES256.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, isqrt, prod
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa

from broker.ceremony import cbor
from broker.ceremony.reasons import refuse, require

ES256, EDDSA, RS256, ES384, ES512, ED448 = -7, -8, -257, -35, -36, -53
RS1 = -65535  # attestation signatures of old TPMs only

# Algorithms whose assertions py_webauthn verifies.
PY_WEBAUTHN_ALGORITHMS = frozenset({ES256, EDDSA, RS256, ES512})

PublicKey = (
    ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
)

RSA_BITS = range(2048, 8193)
_SMALL_PRIMES = prod(n for n in range(3, 752, 2) if all(n % d for d in range(3, isqrt(n) + 1, 2)))

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
    RS1: hashes.SHA1(),  # noqa: S303 - only `tpm` accepts it
}

# The bytes around the coordinates of a P-256 key in CTAP2's canonical CBOR:
# {1: 2, 3: -7, -1: 1, -2: x, -3: y}.
_P256_BEGINS, _P256_BETWEEN = bytes.fromhex("a5010203262001215820"), bytes.fromhex("225820")
_P256_SIZE = 77


def public_key_without_owner() -> bytes:
    """A new COSE public key of ES256 whose private key is not kept, so nobody can sign for it."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    x, y = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
    return _P256_BEGINS + x + _P256_BETWEEN + y


class _Edwards(NamedTuple):
    """A curve ax² + y² = 1 + dx²y² modulo p. `small` holds y of all points of small order, whose
    order divides the cofactor.
    """

    key: type[ed25519.Ed25519PublicKey] | type[ed448.Ed448PublicKey]
    curve: int  # COSE
    size: int
    p: int
    a: int
    d: int
    small: frozenset[int]


_P25519, _P448 = 2**255 - 19, 2**448 - 2**224 - 1
# y of a point of order 8, as libsodium's ge25519_has_small_order lists it: a root of dy⁴ + 2y² = 1.
_ORDER_8 = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_EDWARDS = {
    # RFC 8032 §5.1: cofactor 8. The orders are 1, 2, 4 (two points), 8 (four).
    EDDSA: _Edwards(
        key=ed25519.Ed25519PublicKey,
        curve=6,
        size=32,
        p=_P25519,
        a=-1,
        d=-121665 * pow(121666, -1, _P25519) % _P25519,
        small=frozenset({1, _P25519 - 1, 0, _ORDER_8, _P25519 - _ORDER_8}),
    ),
    # RFC 8032 §5.2: cofactor 4. The orders are 1, 2, 4 (two points).
    ED448: _Edwards(
        key=ed448.Ed448PublicKey,
        curve=7,
        size=57,
        p=_P448,
        a=1,
        d=-39081,
        small=frozenset({1, _P448 - 1, 0}),
    ),
}


def digest_for(algorithm: int) -> hashes.HashAlgorithm | None:
    """The hash of a COSE signature algorithm. None: EdDSA, which has no separate hash, or an
    unknown algorithm.
    """
    return _ECDSA.get(algorithm) or _RSA.get(algorithm)


def load(members: Mapping[Any, Any]) -> PublicKey:
    """The public key in the COSE_Key map of a new credential.

    Raises:
        CeremonyRefused: "public_key" if the key is malformed, off its curve, weak, too small or too
            large; "algorithm" if the algorithm is unknown.
    """
    key = _load(members)
    edwards = _EDWARDS.get(members[3])
    require(
        edwards is None or _is_on_curve(members[-2], edwards),
        "public_key",
        "The public key is no point of its curve.",
    )
    return key


def _load(members: Mapping[Any, Any]) -> PublicKey:
    algorithm = members.get(3)
    if type(algorithm) is not int:
        raise refuse("public_key", "The public key names no algorithm.")
    try:
        if algorithm in _CURVES:
            return _load_ec(members, algorithm)
        if algorithm == RS256:
            return _load_rsa(members)
        if algorithm in _EDWARDS:
            return _load_okp(members, _EDWARDS[algorithm])
    except ValueError:
        raise refuse("public_key", "The public key is not a valid key of its algorithm.") from None
    raise refuse("algorithm", "The public key is of an unknown algorithm.")


def load_stored(raw: bytes) -> PublicKey:
    """The public key in the bytes that a registration recorded; raises as `load`.

    A point off an Edwards curve is found only when a signature is verified with it.
    """
    return _load(_members(raw))


def for_py_webauthn(raw: bytes) -> bytes:
    """A stored key in the form that py_webauthn reads fastest.

    For P-256 that is the uncompressed point (SEC 1 §2.3.3), which py_webauthn takes for ES256; any
    other key is returned as stored. py_webauthn verifies that an elliptic point is on its curve.
    All other rules of a key are verified here.

    Raises:
        CeremonyRefused: "public_key", also for a stored key that a registration no longer accepts.
    """
    if len(raw) == _P256_SIZE and raw.startswith(_P256_BEGINS) and raw[42:45] == _P256_BETWEEN:
        return b"\x04" + raw[10:42] + raw[45:]
    members = _members(raw)
    if not _is_integer(members.get(1), 2):
        _load(members)
    return raw


def _members(raw: bytes) -> dict[Any, Any]:
    members = cbor.read_all(raw)
    if not isinstance(members, dict):
        raise refuse("public_key", "The public key is not a CBOR map.")
    return members


def _is_integer(value: object, number: int) -> bool:
    """True if a CBOR value is this integer. `true` and 1.0 equal 1 in Python, not in COSE."""
    return type(value) is int and value == number


def _require_members(members: Mapping[Any, Any], kty: int, keys: set[int]) -> None:
    require(
        set(members) == keys and _is_integer(members[1], kty),
        "public_key",
        "The public key's members do not fit its algorithm.",
    )


def _load_ec(members: Mapping[Any, Any], algorithm: int) -> ec.EllipticCurvePublicKey:
    curve, kind, size = _CURVES[algorithm]
    _require_members(members, 2, {1, 3, -1, -2, -3})
    x, y = members[-2], members[-3]
    # §5.8.5 "Keys with algorithm ES256 (-7) MUST specify P-256 (1) as the crv parameter and MUST
    # NOT use the compressed point form"
    require(
        _is_integer(members[-1], curve) and isinstance(x, bytes) and isinstance(y, bytes),
        "public_key",
        "The public key's curve does not fit its algorithm, or its point is compressed.",
    )
    require(
        len(x) == len(y) == size, "public_key", "The public key's coordinates have a wrong length."
    )
    numbers = ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "big"), int.from_bytes(y, "big"), kind
    )
    key = numbers.public_key()
    # SEC 1 §2.3.5: a coordinate is below the field's prime; OpenSSL reduces one that is not.
    require(
        key.public_numbers() == numbers,
        "public_key",
        "The public key's coordinates are not reduced.",
    )
    return key


def _load_rsa(members: Mapping[Any, Any]) -> rsa.RSAPublicKey:
    _require_members(members, 3, {1, 3, -1, -2})
    n, e = members[-1], members[-2]
    # RFC 8230 §4 "… the octet sequence MUST utilize the minimum number of octets needed"
    require(
        all(isinstance(number, bytes) and number[:1] not in (b"", b"\0") for number in (n, e)),
        "public_key",
        "The RSA key's numbers are not minimal byte strings.",
    )
    modulus = int.from_bytes(n, "big")
    require(
        modulus.bit_length() in RSA_BITS and modulus % 2 == 1 and len(e) <= 4,
        "public_key",
        "The RSA key is too small, too large or no RSA key.",
    )
    require(
        gcd(modulus, _SMALL_PRIMES) == 1 and isqrt(modulus) ** 2 != modulus,
        "public_key",
        "The RSA key's modulus is no product of two large primes.",
    )
    return rsa.RSAPublicNumbers(int.from_bytes(e, "big"), modulus).public_key()


def _load_okp(members: Mapping[Any, Any], curve: _Edwards) -> PublicKey:
    _require_members(members, 1, {1, 3, -1, -2})
    x: bytes = members[-2]
    require(
        _is_integer(members[-1], curve.curve) and isinstance(x, bytes) and len(x) == curve.size,
        "public_key",
        "The public key's curve or length does not fit its algorithm.",
    )
    y = _y(x)
    # RFC 8032 §5.1.3, §5.2.3 "If the resulting value is >= p, decoding fails."
    require(y < curve.p, "public_key", "The public key's encoding is not canonical.")
    require(
        y not in curve.small,
        "public_key",
        "The public key is of small order: signatures can be forged.",
    )
    return curve.key.from_public_bytes(x)


def _y(encoded: bytes) -> int:
    """The y of an encoded point, without the sign bit of x. RFC 8032 §5.1.2, §5.2.2."""
    return int.from_bytes(encoded, "little") & ~(1 << (8 * len(encoded) - 1))


def _is_on_curve(encoded: bytes, curve: _Edwards) -> bool:
    """True if an encoded point that is not of small order has an x: x² = (1 - y²) / (a - dy²) is a
    square, by Euler's criterion.
    """
    square = _y(encoded) ** 2
    # The quotient and the product of two numbers differ by a square; neither is 0.
    return pow((1 - square) * (curve.a - curve.d * square), (curve.p - 1) // 2, curve.p) == 1


def verify(key: object, algorithm: int, signature: bytes, data: bytes) -> bool:
    """True if `signature` over `data` verifies. False also if key and algorithm do not fit."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and algorithm in _ECDSA:
            key.verify(signature, data, ec.ECDSA(_ECDSA[algorithm]))
        elif isinstance(key, rsa.RSAPublicKey) and algorithm in _RSA:
            key.verify(signature, data, padding.PKCS1v15(), _RSA[algorithm])
        elif algorithm in _EDWARDS and isinstance(key, _EDWARDS[algorithm].key):
            key.verify(signature, data)
        else:
            return False
    # ValueError: a key too small for the hash
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True
