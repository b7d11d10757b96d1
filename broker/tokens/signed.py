"""Signed tokens: key generation, key sealing, JSON Web Keys and JSON Web Tokens.

**Keys** come from the operating system's generator: RSA of `RSA_BITS` for RS256 and PS256, P-256
for ES256, Ed25519 for EdDSA. The public half is a JSON Web Key (RFC 7517; RFC 7518 §6 for RSA and
EC, RFC 8037 §2 for EdDSA) with its use (signatures), one algorithm and one `kid`.

**Sealing.** A private key at rest is encrypted with AES-256-GCM. HKDF-SHA256 (RFC 5869) derives the
encryption key from an operator's secret, and each nonce has 96 random bits. GCM stays safe for 2^32
seals under one secret with such nonces (NIST SP 800-38D §8.3). The `kid`, the app and the algorithm
are authenticated: a sealed key that was copied into the row of another key, app or algorithm does
not open. A reader of the database without the secret learns nothing, and a writer can't make the
broker sign with a key of another origin. The secret must be random, not a password: HKDF does not
slow a guess down.

The sealing format is home-made on cryptography's AESGCM and HKDF. Fernet, its ready format, has no
associated data to bind a key to its row.

Secrets are a list: the first seals, any opens. So a secret changes without a pause: put the new
secret first, reseal, drop the old one.

**A token** is a JWS in compact form (RFC 7515 §7.1) with `alg`, `kid` and `typ` in its header, made
by PyJWT. The claims are the caller's; nothing is added. An RSA signature takes a third of a
millisecond, which is cheaper than a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import jwt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from broker.model import TokenAlgorithm
from broker.tokens.sealed import SealBroken

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA_BITS = 2048
_NONCE = 12  # bytes: the length that GCM is made for
_TAG = 16
_FORMAT = b"\x01"  # first byte of a sealed key: the version of the format
_PURPOSE = b"passkey-broker: sealing of signing keys"


def generate(algorithm: TokenAlgorithm) -> PrivateKey:
    """A new private key. Call it in a thread: RSA takes 30 to 300 ms of processor time, without the
    interpreter's lock.
    """
    if algorithm in ("RS256", "PS256"):
        return rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def public_jwk(private: PrivateKey, kid: str, algorithm: TokenAlgorithm) -> dict[str, str]:
    """The public half as a JSON Web Key: the members of the public key, `use`, `alg` and `kid` (RFC
    7517 §4).
    """
    numbers = jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key(), as_dict=True)
    public = {
        name: str(numbers[name]) for name in ("kty", "crv", "n", "e", "x", "y") if name in numbers
    }
    return public | {"use": "sig", "alg": algorithm, "kid": kid}


def sign(
    claims: Mapping[str, Any], private: PrivateKey, kid: str, algorithm: TokenAlgorithm
) -> str:
    """A JSON Web Token with exactly these claims, in JWS compact form. Times are seconds (RFC 7519
    §2, NumericDate).
    """
    return jwt.encode(dict(claims), private, algorithm, headers={"kid": kid})


class Seal:
    """Seals private keys under the first secret, and opens keys sealed under any of them.

    Each secret has 32 random characters or more.
    """

    def __init__(self, secret_keys: Sequence[str]) -> None:
        self._ciphers = [AESGCM(_derived(secret)) for secret in secret_keys]

    def __bool__(self) -> bool:
        """True if there is a secret."""
        return bool(self._ciphers)

    def close(
        self, private: PrivateKey, *, kid: str, scope: str, algorithm: TokenAlgorithm
    ) -> bytes:
        """The sealed form. `scope` is the app's id, "" for the broker's own set."""
        plain = private.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        nonce = secrets.token_bytes(_NONCE)
        return (
            _FORMAT
            + nonce
            + self._ciphers[0].encrypt(nonce, plain, _bound_to(kid, scope, algorithm))
        )

    def open(
        self, sealed: bytes, *, kid: str, scope: str, algorithm: TokenAlgorithm
    ) -> tuple[PrivateKey, int]:
        """The private key, and the number of the secret that opened it (0 seals new keys).

        Raises:
            SealBroken: no secret opens it. It was sealed under another secret, or changed since.
        """
        if sealed[:1] != _FORMAT or len(sealed) <= 1 + _NONCE + _TAG:
            raise SealBroken
        nonce, body = sealed[1 : 1 + _NONCE], sealed[1 + _NONCE :]
        for number, cipher in enumerate(self._ciphers):
            try:
                plain = cipher.decrypt(nonce, body, _bound_to(kid, scope, algorithm))
            except InvalidTag:
                continue
            # The seal authenticates the key, so the validation of its primes (40 ms) is skipped.
            private = serialization.load_der_private_key(
                plain, None, unsafe_skip_rsa_key_validation=True
            )
            return cast("PrivateKey", private), number
        raise SealBroken


def _derived(secret: str) -> bytes:
    return HKDF(hashes.SHA256(), length=32, salt=None, info=_PURPOSE).derive(secret.encode())


def _bound_to(kid: str, scope: str, algorithm: TokenAlgorithm) -> bytes:
    """The additional authenticated data. Ids hold no NUL, so each triple has bytes of its own."""
    return "\0".join((kid, scope, algorithm)).encode()
