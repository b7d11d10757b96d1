"""Tokens: how much chance is in them, what form they have, and that a digest is of one kind and one app."""

from __future__ import annotations

import math
import re
import secrets
from base64 import urlsafe_b64decode
from typing import get_args

import pytest

from broker.model import ID
from broker.tokens import PREFIX, Kind, OneTime, SystemMint, digest, key_digest, key_hint, text, well_formed

MINT = SystemMint()
KINDS: tuple[Kind, ...] = get_args(Kind)
ONE_TIME: tuple[OneTime, ...] = ("transaction", "handle", "nonce")
APP = "A" * 24


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_256_bits_and_a_prefix_of_its_own(kind: Kind) -> None:
    made = [MINT.token(kind) for _ in range(1000)]
    assert len(set(made)) == 1000
    for token in made:
        assert re.fullmatch(r"pb[a-z]_[A-Za-z0-9_-]{43}", token)
        assert token.startswith(PREFIX[kind])
        assert len(urlsafe_b64decode(token.removeprefix(PREFIX[kind]) + "=")) == 32
        assert well_formed(token, kind)
    assert len(set(PREFIX.values())) == len(KINDS)


def test_chance_comes_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw asks `secrets` for at least what is promised."""
    asked: list[int] = []
    draw_bytes, draw_text = secrets.token_bytes, secrets.token_urlsafe

    def token_bytes(size: int | None = None) -> bytes:
        asked.append(size or 0)
        return draw_bytes(size)

    def token_urlsafe(size: int | None = None) -> str:
        asked.append(size or 0)
        return draw_text(size)

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    monkeypatch.setattr(secrets, "token_urlsafe", token_urlsafe)
    MINT.token("nonce")
    assert asked[0] == 32
    asked.clear()
    assert len(MINT.challenge()) == 32
    assert asked[0] == 32
    asked.clear()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", MINT.user_handle())
    assert asked[0] == 32
    asked.clear()
    MINT.id()
    assert asked == [20]


def test_ids_use_every_character_about_as_often() -> None:
    made = [MINT.id() for _ in range(20_000)]
    assert all(ID.match(i) for i in made)
    assert len(set(made)) == len(made)
    for position in (0, 11, 23):
        counts: dict[str, int] = {}
        for i in made:
            counts[i[position]] = counts.get(i[position], 0) + 1
        expected = len(made) / 62
        assert len(counts) == 62
        assert all(abs(n - expected) < 7 * math.sqrt(expected) for n in counts.values()), position


def test_a_digest_is_of_one_kind_one_app_and_one_token() -> None:
    token = MINT.token("nonce")
    digests = {digest(kind, app, token) for kind in ONE_TIME for app in (APP, "B" * 24)} | {key_digest(token)}
    assert len(digests) == 2 * len(ONE_TIME) + 1
    assert all(len(d) == 32 for d in digests)
    assert digest("nonce", APP, token) == digest("nonce", APP, token)
    assert digest("nonce", APP, token) != digest("nonce", APP, token[:-1])
    for value in digests:
        assert token[4:].encode() not in value
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", text(value))
        assert urlsafe_b64decode(text(value) + "=") == value


MALFORMED = [
    "",
    "pbn_",
    "pbn_" + "a" * 42,
    "pbn_" + "a" * 87,
    "pbn_" + "a" * 43 + "\n",
    "pbn_" + "a" * 42 + "=",
    "pbn_" + "a" * 42 + "é",
    "pbn_" + "a" * 42 + "{",
    "pbn_" + "a" * 42 + " ",
    " pbn_" + "a" * 43,
    "PBN_" + "a" * 43,
    "pbt_" + "a" * 43,
    "a" * 47,
    "pbn_" + "a" * 42 + "\0",
    "pbn_" + "\u0661" * 43,
]


@pytest.mark.parametrize("token", MALFORMED)
def test_what_could_not_have_been_minted_is_malformed(token: str) -> None:
    assert not well_formed(token, "nonce")


def test_a_handle_carries_its_transactions_digest() -> None:
    handle = MINT.token("handle") + text(b"\xff" * 32)
    assert len(handle) == 4 + 86
    assert well_formed(handle, "handle")
    assert not well_formed(handle, "nonce")
    assert not well_formed(handle + "a", "handle")


def test_a_hint_shows_four_characters() -> None:
    key = MINT.token("key")
    assert key_hint(key) == key[:8] + "…"
