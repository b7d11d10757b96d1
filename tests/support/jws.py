"""An independent check of signed tokens: a JSON Web Token is taken apart and verified by hand, with
a public JSON Web Key and nothing else.

No JOSE library is used, so that a token which verifies here is what RFC 7515 (JWS) and RFC 7518 and
8037 (algorithms) describe, not only what the library that made it accepts.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature


def raw(text: str) -> bytes:
    """Unpadded base64url (RFC 7515 §2) as bytes."""
    assert "=" not in text
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def number(text: str) -> int:
    return int.from_bytes(raw(text))


def header(token: str) -> dict[str, Any]:
    """The token's header, not verified."""
    found: dict[str, Any] = json.loads(raw(token.split(".")[0]))
    return found


def claims(token: str) -> dict[str, Any]:
    """The token's claims, not verified."""
    found: dict[str, Any] = json.loads(raw(token.split(".")[1]))
    return found


def verify(token: str, key_set: Mapping[str, Any]) -> dict[str, Any]:
    """The claims of a token that the one key of the set with its `kid` verifies, with that key's
    own algorithm.

    Raises:
        KeyError: the set has no such key.
        cryptography.exceptions.InvalidSignature.
    """
    head, body, signature = token.split(".")
    kid, algorithm = header(token)["kid"], header(token)["alg"]
    keys = {key["kid"]: key for key in key_set["keys"]}
    assert len(keys) == len(key_set["keys"]), "no kid twice"
    jwk = keys[kid]
    assert jwk["alg"] == algorithm
    _verify(jwk, f"{head}.{body}".encode(), raw(signature))
    return claims(token)


def _verify(jwk: Mapping[str, str], signed: bytes, signature: bytes) -> None:
    match jwk["alg"]:
        case "RS256":
            _rsa(jwk).verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
        case "PS256":  # RFC 7518 §3.5: the salt is as long as the hash
            _rsa(jwk).verify(
                signature, signed, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()
            )
        case "ES256":
            assert (jwk["kty"], jwk["crv"], len(signature)) == ("EC", "P-256", 64)
            point = ec.EllipticCurvePublicNumbers(
                number(jwk["x"]), number(jwk["y"]), ec.SECP256R1()
            )
            r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
            point.public_key().verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
        case "EdDSA":
            assert (jwk["kty"], jwk["crv"]) == ("OKP", "Ed25519")
            ed25519.Ed25519PublicKey.from_public_bytes(raw(jwk["x"])).verify(signature, signed)
        case other:
            raise AssertionError(f"an algorithm that nobody asked for: {other}")


def _rsa(jwk: Mapping[str, str]) -> rsa.RSAPublicKey:
    assert jwk["kty"] == "RSA"
    return rsa.RSAPublicNumbers(number(jwk["e"]), number(jwk["n"])).public_key()
