"""Authenticated encryption of what a secret token stands for, under a key derived from the token.

A store has the digest of a token and the sealed value, so a dump of the store does not open it. The
caller brings the token again. Apart from `broker.tokens`, which needs no third party.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE = 12  # bytes


class SealBroken(Exception):
    """Sealed bytes that no given secret opens: sealed under another one, or changed since.

    Sealed values are the broker's own, so this is never a caller's fault.
    """


def seal(token: str, plain: bytes) -> bytes:
    """`plain`, sealed under a token of 256 random bits or more."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + _cipher(token).encrypt(nonce, plain, None)


def unseal(token: str, sealed: bytes) -> bytes:
    """What `seal` sealed under this token.

    Raises:
        SealBroken: other bytes.
    """
    try:
        return _cipher(token).decrypt(sealed[:_NONCE], sealed[_NONCE:], None)
    except (InvalidTag, ValueError):  # ValueError: too short
        raise SealBroken from None


def _cipher(token: str) -> AESGCM:
    # The token is random, so one hash derives a key. Digests for a store have another prefix.
    return AESGCM(hashlib.sha256(f"seal:{token}".encode()).digest())
