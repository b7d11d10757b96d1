"""Tokens: how much chance is in them, what form they have, that a digest is of one kind and one
app; and signed ones.
"""

from __future__ import annotations

import math
import re
import secrets
from base64 import urlsafe_b64decode
from functools import cache
from typing import Any, get_args

import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.model import ID, TokenAlgorithm, base64url
from broker.tokens import (
    PREFIX,
    Kind,
    OneTime,
    SystemMint,
    digest,
    key_digest,
    key_hint,
    signed,
    well_formed,
)
from broker.tokens.sealed import SealBroken
from tests.support import jws

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
    assert asked == [36]


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
    digests = {digest(kind, app, token) for kind in ONE_TIME for app in (APP, "B" * 24)} | {
        key_digest(token)
    }
    assert len(digests) == 2 * len(ONE_TIME) + 1
    assert all(len(d) == 32 for d in digests)
    assert digest("nonce", APP, token) == digest("nonce", APP, token)
    assert digest("nonce", APP, token) != digest("nonce", APP, token[:-1])
    for value in digests:
        assert token[4:].encode() not in value
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", base64url(value))
        assert urlsafe_b64decode(base64url(value) + "=") == value


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
    handle = MINT.token("handle") + base64url(b"\xff" * 32)
    assert len(handle) == 4 + 86
    assert well_formed(handle, "handle")
    assert not well_formed(handle, "nonce")
    assert not well_formed(handle + "a", "handle")


def test_a_hint_shows_four_characters() -> None:
    key = MINT.token("key")
    assert key_hint(key) == key[:8] + "…"


# -- signed tokens ---------------------------------------------------------------------------------

TOKEN_ALGORITHMS: tuple[TokenAlgorithm, ...] = get_args(TokenAlgorithm)
KID = "K" * 24
SECRETS = (
    "first-" + "0123456789abcdefghijklmnopqrstuvwxyz",
    "second-" + "0123456789abcdefghijklmnopqrstuvwxyz",
)
CLAIMS = {
    "sub": "zoë",
    "aud": ["example.org"],
    "iat": 1_700_000_000,
    "exp": 1_700_000_300,
    "pk:uv": True,
}


@cache
def private_key(algorithm: TokenAlgorithm) -> signed.PrivateKey:
    return signed.generate(algorithm)


@pytest.mark.parametrize("algorithm", TOKEN_ALGORITHMS)
def test_a_token_verifies_by_hand_and_by_a_library(algorithm: TokenAlgorithm) -> None:
    private = private_key(algorithm)
    token = signed.sign(CLAIMS, private, KID, algorithm)
    jwk = signed.public_jwk(private, KID, algorithm)
    assert jws.header(token) == {"alg": algorithm, "kid": KID, "typ": "JWT"}
    assert jws.verify(token, {"keys": [jwk]}) == CLAIMS, "nothing is added"
    key = jwt.PyJWK(jwk)
    assert (
        jwt.decode(token, key, [algorithm], options={"verify_exp": False}, audience="example.org")
        == CLAIMS
    )
    other = signed.public_jwk(signed.generate(algorithm), KID, algorithm)
    with pytest.raises(InvalidSignature):
        jws.verify(token, {"keys": [other]})


@pytest.mark.parametrize("algorithm", TOKEN_ALGORITHMS)
def test_a_public_key_has_public_members_only(algorithm: TokenAlgorithm) -> None:
    jwk = signed.public_jwk(private_key(algorithm), KID, algorithm)
    numbers = {"ES256": {"crv", "x", "y"}, "EdDSA": {"crv", "x"}}.get(algorithm, {"n", "e"})
    assert jwk.keys() == {"kty", "use", "alg", "kid"} | numbers
    assert (jwk["use"], jwk["alg"], jwk["kid"]) == ("sig", algorithm, KID)
    if "n" in jwk:
        assert jws.number(jwk["n"]).bit_length() >= 2048
        assert jwk["e"] == "AQAB"


def test_coordinates_keep_their_leading_zeros() -> None:
    """RFC 7518 §6.2.1.2: each has the length of the field, 32 bytes."""
    made = [signed.public_jwk(signed.generate("ES256"), KID, "ES256") for _ in range(600)]
    lengths = {len(jws.raw(jwk[name])) for jwk in made for name in "xy"}
    assert lengths == {32}


@pytest.mark.parametrize("algorithm", TOKEN_ALGORITHMS)
def test_a_sealed_key_opens_with_any_of_the_secrets(algorithm: TokenAlgorithm) -> None:
    place: dict[str, Any] = {"kid": KID, "scope": APP, "algorithm": algorithm}
    private = private_key(algorithm)
    old, both, new = signed.Seal(SECRETS[1:]), signed.Seal(SECRETS), signed.Seal(SECRETS[:1])
    sealed = old.close(private, **place)
    opened, number = both.open(sealed, **place)
    assert number == 1
    assert signed.public_jwk(opened, KID, algorithm) == signed.public_jwk(private, KID, algorithm)
    with pytest.raises(SealBroken):
        new.open(sealed, **place)
    assert new.open(both.close(opened, **place), **place)[1] == 0, "the first one seals"
    assert len({old.close(private, **place) for _ in range(100)}) == 100, "no nonce twice"


@pytest.mark.parametrize(
    "change", [{"kid": "L" * 24}, {"scope": ""}, {"scope": "B" * 24}, {"algorithm": "PS256"}]
)
def test_a_sealed_key_opens_in_its_own_place_only(change: dict[str, Any]) -> None:
    seal, place = signed.Seal(SECRETS), {"kid": KID, "scope": APP, "algorithm": "RS256"}
    sealed = seal.close(private_key("RS256"), **place)  # type: ignore[arg-type]
    with pytest.raises(SealBroken):
        seal.open(sealed, **place | change)


def test_a_sealed_key_that_was_changed_does_not_open() -> None:
    seal, place = signed.Seal(SECRETS), {"kid": KID, "scope": "", "algorithm": "EdDSA"}
    sealed = seal.close(private_key("EdDSA"), **place)  # type: ignore[arg-type]
    changed = [sealed[:n] + bytes([sealed[n] ^ 1]) + sealed[n + 1 :] for n in range(len(sealed))]
    for broken in [*changed, *(sealed[:n] for n in range(len(sealed))), sealed + b"\0"]:
        with pytest.raises(SealBroken):
            seal.open(broken, **place)  # type: ignore[arg-type]


def test_a_sealed_key_shows_nothing_of_the_key() -> None:
    for algorithm in TOKEN_ALGORITHMS:
        private = private_key(algorithm)
        sealed = signed.Seal(SECRETS).close(private, kid=KID, scope=APP, algorithm=algorithm)
        der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        assert not any(der[n : n + 8] in sealed for n in range(len(der) - 7))
