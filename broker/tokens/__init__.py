"""Minting and hashing one-time tokens, API keys and ids.

Every token is a prefix and 43 characters of base64url: 32 bytes (256 bits) from the operating
system's generator. The prefix lets a secret scanner recognise a leaked token and a person tell them
apart; it carries no right. A store sees only a token's `digest`: SHA-256 over the kind, the app and
the token. Since the token has 256 bits of chance, a fast hash is enough. Since kind and app are
hashed in, a token of another kind or app is as unknown as a made-up one. A nonce's digest lacks the
app, so that a nonce of another app is told apart from an unknown one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Literal, Protocol

from broker.model import FinishKind, Opener, base64url

FoundBy = Literal["handle", "challenge", "user"]  # how a finish finds its ceremony
OneTime = Literal["transaction", "nonce", "ticket"] | FoundBy
Kind = Literal["transaction", "handle", "nonce", "ticket", "key"]

PREFIX: dict[Kind, str] = {
    "transaction": "pbt_",
    "handle": "pbh_",
    "nonce": "pbn_",
    "ticket": "pbs_",
    "key": "pbk_",
}
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# A byte as a digit of base 62. The last eight values would make some digits likelier than others,
# so they are left out.
_DIGITS = bytes(ord(_ALPHABET[byte % 62]) for byte in range(256))
_UNEVEN = bytes(range(248, 256))
_TOKEN = re.compile(r"pb[thnsk]_[A-Za-z0-9_-]{43,86}\Z")


class Mint(Protocol):
    """The source of chance, an argument so that tests can count and choose what it gives."""

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
    """Chance from the operating system (`secrets`)."""

    def token(self, kind: Kind) -> str:
        return PREFIX[kind] + base64url(secrets.token_bytes(32))

    def challenge(self) -> bytes:
        return secrets.token_bytes(32)

    def user_handle(self) -> str:
        return base64url(secrets.token_bytes(32))

    def id(self) -> str:
        found = b""
        while len(found) < 24:  # of 36 bytes 12 are left out once in 10^9
            found += secrets.token_bytes(36).translate(_DIGITS, _UNEVEN)
        return found[:24].decode("ascii")


def digest(kind: OneTime, *parts: str) -> bytes:
    """SHA-256 (32 bytes) that stands for a one-time value in a store. `parts`: the app's id and the
    token; of a nonce the token alone.
    """
    return hashlib.sha256(":".join((kind, *parts)).encode()).digest()


def ceremony_digest(
    by: FoundBy, app_id: str, opener: Opener, kind: FinishKind, token: str
) -> bytes:
    """SHA-256 (32 bytes) that names a pending ceremony. `token` is the handle, the challenge or the
    user.

    Opener and kind are hashed in, so only the ceremony's own finish finds it. To any other finish
    the ceremony is unknown and stays where it is.
    """
    return digest(by, app_id, f"{opener}:{kind}:{token}")


def key_digest(key: str) -> bytes:
    """SHA-256 (32 bytes) that stands for an API key. Without the app: a wire format may name the
    app by the key alone.
    """
    return hashlib.sha256(f"key:{key}".encode()).digest()


def well_formed(token: str, kind: Kind) -> bool:
    """Whether `token` could have been minted here. A cheap refusal before any store is asked."""
    return token.startswith(PREFIX[kind]) and _TOKEN.match(token) is not None


def key_hint(key: str) -> str:
    """What lists show of an API key: enough to recognise it, nothing to use."""
    return key[: len(PREFIX["key"]) + 4] + "…"
