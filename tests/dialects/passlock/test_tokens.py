"""Passlock's id_tokens, verified by `jose` with the keys that the broker publishes, with the issuer
and audience that the vendor's SDK compares."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import OpenApp, Started, Starter
from tests.sdk.passlock import Jose
from tests.support.authenticator import Authenticator
from tests.support.passlock import Passlock
from tests.support.signals import lines
from tests.support.wire import Wire

KEY_SETS = ("/v2/.well-known/jwks.json", "/.well-known/jwks.json")


@pytest.fixture
def passlock(wire: Wire) -> Passlock:
    return Passlock(wire)


@pytest.fixture
async def jose() -> AsyncIterator[Jose]:
    async with Jose.open() as opened:
        yield opened


async def test_both_key_sets_verify(
    broker: Started, passlock: Passlock, jose: Jose, open_app: OpenApp, device: Authenticator
) -> None:
    """Of registrations and authentications; the set is the broker's, so the audience keeps
    tenancies apart.
    """
    wire = passlock.wire
    tokens = [
        (await passlock.register("ann", device))["id_token"],
        (await passlock.authenticate("ann", device))["id_token"],
    ]
    for path in KEY_SETS:
        for token, purpose in zip(tokens, ("register", "authenticate"), strict=True):
            found = await jose.verify(wire.url + path, token, wire.app_id)
            assert (found["algorithm"], found["claims"]["sub"], found["claims"]["purpose"]) == (
                "RS256",
                "ann",
                purpose,
            )
            assert (found["claims"]["iss"], found["claims"]["aud"]) == ("passlock.dev", wire.app_id)
    other = await Passlock(await open_app()).register("ann", Authenticator())
    found = await jose.verify(wire.url + KEY_SETS[0], other["id_token"], wire.app_id)
    assert found == {"code": "ERR_JWT_CLAIM_VALIDATION_FAILED", "claim": "aud"}
    assert lines(broker, route=KEY_SETS[0], status=200)


async def test_tokens_that_do_not_verify(
    passlock: Passlock, jose: Jose, device: Authenticator
) -> None:
    wire = passlock.wire
    token = (await passlock.register("ann", device))["id_token"]
    header, payload, signature = token.split(".")
    other = (await passlock.authenticate("ann", device))["id_token"].split(".")
    for wrong in (
        ".".join((header, other[1], signature)),
        ".".join((header, payload, other[2])),
        ".".join((header, payload, "")),
        ".".join(("eyJhbGciOiJub25lIn0", payload, "")),
    ):
        found = await jose.verify(wire.url + KEY_SETS[0], wrong, wire.app_id)
        assert found["code"].startswith("ERR_"), found


async def test_a_token_ends(
    start_broker: Starter, session: Any, jose: Jose, device: Authenticator
) -> None:
    """Five minutes after the ceremony; a broker whose clock is behind issues one that has ended."""
    started = await start_broker()
    passlock = Passlock(await Wire.open(started.service, session))
    await passlock.user("ann", device)
    started.clock.ahead = -301
    done = await passlock.authenticate("ann", device)
    found = await jose.verify(
        passlock.wire.url + KEY_SETS[0], done["id_token"], passlock.wire.app_id
    )
    assert found == {"code": "ERR_JWT_EXPIRED", "claim": "exp"}


async def test_a_key_set_may_be_kept_for_a_while(passlock: Passlock) -> None:
    for path in KEY_SETS:
        answer = await passlock.wire.send(
            "GET", passlock.wire.url + path, headers={"Origin": "https://anywhere.example"}
        )
        assert answer.headers["Cache-Control"] == "public, max-age=600"
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert all(not set(key) & {"d", "p", "q"} for key in answer.json["keys"])
