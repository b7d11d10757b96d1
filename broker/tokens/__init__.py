"""One-time tokens, API keys and ids: minting and hashing.

A token is a prefix and 43 characters of base64url: 32 bytes (256 bits) from the operating system's
generator. The prefix lets a secret scanner recognise a leaked token; it grants nothing.

A store gets only a `digest`: SHA-256 over kind, app and token. A fast hash is enough for a token of
256 random bits. Kind and app are part of the digest, so a token of another kind or app is not
found, without a comparison that code could omit. A nonce's digest lacks the app, so that the log
distinguishes a nonce of another app from an unknown one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Literal, Protocol

from broker.model import FinishKind, Opener, base64url

FoundBy = Literal["handle", "challenge", "user"]  # the key by which finish finds its ceremony
OneTime = Literal["transaction", "nonce", "ticket", "idempotency"] | FoundBy
Kind = Literal["transaction", "handle", "nonce", "ticket", "key"]

PREFIX: dict[Kind, str] = {
    "transaction": "pbt_",
    "handle": "pbh_",
    "nonce": "pbn_",
    "ticket": "pbs_",
    "key": "pbk_",
}
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# A byte as a digit of base 62. The last eight values are dropped: they would make some digits more
# likely.
_DIGITS = bytes(ord(_ALPHABET[byte % 62]) for byte in range(256))
_UNEVEN = bytes(range(248, 256))
_TOKEN = re.compile(r"pb[thnsk]_[A-Za-z0-9_-]{43,86}\Z")


class Mint(Protocol):
    """The source of randomness. It is an argument, so that tests count and choose its values."""

    def token(self, kind: Kind) -> str:
        """A new token: prefix and 43 characters of base64url (256 bits)."""
        ...

    def challenge(self) -> bytes:
        """32 random bytes. WebAuthn L3 §13.4.3 asks for at least 16."""
        ...

    def user_handle(self) -> str:
        """43 ASCII characters: the base64url text of 32 random bytes."""
        ...

    def id(self) -> str:
        """24 ASCII alphanumerics (142 bits)."""
        ...


class SystemMint:
    """Randomness from the operating system (`secrets`)."""

    def token(self, kind: Kind) -> str:
        return PREFIX[kind] + base64url(secrets.token_bytes(32))

    def challenge(self) -> bytes:
        return secrets.token_bytes(32)

    def user_handle(self) -> str:
        return base64url(secrets.token_bytes(32))

    def id(self) -> str:
        found = b""
        while len(found) < 24:  # 36 bytes give fewer than 24 digits once in 10^9
            found += secrets.token_bytes(36).translate(_DIGITS, _UNEVEN)
        return found[:24].decode("ascii")


def digest(kind: OneTime, *parts: str) -> bytes:
    """SHA-256 (32 bytes) of a one-time value, its name in a store. `parts` are the app's id and the
    token; of a nonce the token alone.
    """
    return hashlib.sha256(":".join((kind, *parts)).encode()).digest()


def ceremony_digest(
    by: FoundBy, app_id: str, opener: Opener, kind: FinishKind, token: str
) -> bytes:
    """SHA-256 (32 bytes) that names a pending ceremony. `token` is the handle, the challenge or the
    user.

    Opener and kind are part of the digest, so only the ceremony's own finish finds it. Any other
    finish finds nothing and spends nothing.
    """
    return digest(by, app_id, f"{opener}:{kind}:{token}")


def key_digest(key: str) -> bytes:
    """SHA-256 (32 bytes) of an API key, its name in a store. The app is no part of it, because some
    wire formats name the app by the key alone.
    """
    return hashlib.sha256(f"key:{key}".encode()).digest()


def well_formed(token: str, kind: Kind) -> bool:
    """True if `token` has the form of a minted token. Refuses others before a query to a store."""
    return token.startswith(PREFIX[kind]) and _TOKEN.match(token) is not None


def key_hint(key: str) -> str:
    """The beginning of an API key, which identifies it in lists."""
    return key[: len(PREFIX["key"]) + 4] + "…"
