"""Signed tokens: keys, how a private key is kept, and JSON Web Tokens.

**Keys** are made from the operating system's chance: RSA of `RSA_BITS` for RS256 and PS256, P-256
for ES256, Ed25519 for EdDSA. The public half is a JSON Web Key (RFC 7517; RFC 7518 §6 for RSA and
EC, RFC 8037 §2 for EdDSA) which says that it is for signatures, of one algorithm, under one `kid`.

**A private key at rest is sealed** with AES-256-GCM under a key that HKDF-SHA256 (RFC 5869) derives
from an operator's secret, with 96 bits of chance as nonce. GCM stays safe for 2^32 seals under one
secret with such nonces (NIST SP 800-38D §8.3). The `kid`, the app and the algorithm are
authenticated with it, so a sealed key that was copied into another row, another app's or another
algorithm's, does not open. Whoever reads the database without the secret learns nothing; whoever
writes to it can't make us sign with a key of theirs. The secret must be chance itself, not a
password: HKDF does not slow a guesser down.

Secrets are a list: the first seals, all of them open. So a secret changes without a pause: put the
new one first, seal anew, drop the old one.

**A token** is a JWS in compact form (RFC 7515 §7.1) with `alg`, `kid` and `typ` in its header, made
by PyJWT. The claims are the caller's; nothing is added. An RSA signature takes a third of a
millisecond, less than a hop to a thread and back would be worth.
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
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from broker.model import TokenAlgorithm

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA_BITS = 2048
_NONCE = 12  # bytes: the length that GCM is made for
_TAG = 16
_FORM = b"\x01"  # first byte of a sealed key; another form would begin with another one
_PURPOSE = b"passkey-broker: sealing of signing keys"


class SealBroken(Exception):
    """No secret opens a sealed key: it was sealed under another one, or changed since. A value of
    ours, never a caller's.
    """


def generate(algorithm: TokenAlgorithm) -> PrivateKey:
    """A new private key. RSA takes 30 to 300 ms of processor time without the interpreter's lock:
    call it in a thread.
    """
    if algorithm in ("RS256", "PS256"):
        return rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def public_jwk(private: PrivateKey, kid: str, algorithm: TokenAlgorithm) -> dict[str, str]:
    """The public half as a JSON Web Key: only members of the public key, and `use`, `alg`, `kid`
    (RFC 7517 §4).
    """
    if isinstance(private, rsa.RSAPrivateKey):
        numbers = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        numbers = ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
    else:
        numbers = OKPAlgorithm.to_jwk(private.public_key(), as_dict=True)
    public = {
        name: str(numbers[name]) for name in ("kty", "crv", "n", "e", "x", "y") if name in numbers
    }
    return public | {"use": "sig", "alg": algorithm, "kid": kid}


def sign(
    claims: Mapping[str, Any], private: PrivateKey, kid: str, algorithm: TokenAlgorithm
) -> str:
    """A JSON Web Token with exactly these claims, in JWS compact form. Times are numbers of seconds
    (RFC 7519 §2, NumericDate).
    """
    return jwt.encode(dict(claims), private, algorithm, headers={"kid": kid})


class Seal:
    """Seals private keys under the first of `secrets` and opens what any of them sealed. Each has
    32 characters of chance or more.
    """

    def __init__(self, secret_keys: Sequence[str]) -> None:
        self._ciphers = [AESGCM(_derived(secret)) for secret in secret_keys]

    def __bool__(self) -> bool:
        """Whether there is a secret at all."""
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
            _FORM + nonce + self._ciphers[0].encrypt(nonce, plain, _bound_to(kid, scope, algorithm))
        )

    def open(
        self, sealed: bytes, *, kid: str, scope: str, algorithm: TokenAlgorithm
    ) -> tuple[PrivateKey, int]:
        """The private key, and which of the secrets opened it (0: the one that seals).

        Raises:
            SealBroken: none of them does.
        """
        if sealed[:1] != _FORM or len(sealed) <= 1 + _NONCE + _TAG:
            raise SealBroken
        nonce, body = sealed[1 : 1 + _NONCE], sealed[1 + _NONCE :]
        for number, cipher in enumerate(self._ciphers):
            try:
                plain = cipher.decrypt(nonce, body, _bound_to(kid, scope, algorithm))
            except InvalidTag:
                continue
            # It is what `generate` made, for the seal says so; proving the primes again would take
            # 40 ms.
            private = serialization.load_der_private_key(
                plain, None, unsafe_skip_rsa_key_validation=True
            )
            return cast("PrivateKey", private), number
        raise SealBroken


def _derived(secret: str) -> bytes:
    return HKDF(hashes.SHA256(), length=32, salt=None, info=_PURPOSE).derive(secret.encode())


def _bound_to(kid: str, scope: str, algorithm: TokenAlgorithm) -> bytes:
    """The additional data: ids hold no NUL, so no two triples give the same bytes."""
    return "\0".join((kid, scope, algorithm)).encode()
