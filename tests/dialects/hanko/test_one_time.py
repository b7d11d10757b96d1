"""Every Hanko ceremony is good once: 50 finalizes at once, answers again, other operations, other
tenants, other times.

The vendor accepts an answer again after a failed finalize, and of two at once both may succeed.
Here the challenge is taken before anything is verified, so the second one is refused in the
vendor's own shape.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from broker.errors import UnknownTransaction
from broker.model import Policy
from tests.conftest import ON_BOTH, SKEW, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, unb64
from tests.support.hanko import (
    LOGIN,
    NO_CHALLENGE,
    REGISTRATION,
    SECOND_LOGIN,
    SECOND_REGISTRATION,
    TRANSACTION,
    Hanko,
)
from tests.support.signals import refused
from tests.support.wire import ORIGIN, Wire

PARALLEL = 50
OPERATIONS = [REGISTRATION, LOGIN, SECOND_REGISTRATION, SECOND_LOGIN, TRANSACTION]
GONE = "transaction_not_found", "challenge_unknown"
QUICK = Policy(declared={"hanko_algorithm": "ES256"})  # keys that are made at once


@pytest.fixture
async def hanko(open_app: OpenApp) -> Hanko:
    return Hanko(await open_app(QUICK))


async def begun(
    hanko: Hanko, at: str, device: Authenticator, name: str = "t", **how: Any
) -> dict[str, Any]:
    """The answer to a new ceremony; `device` has a passkey of ann."""
    if at.endswith(REGISTRATION):
        return Authenticator().register(await hanko.begin_registration("ann", at=at), ORIGIN, **how)
    more = {"transaction_id": name, "transaction_data": {"amount": 1}} if at == TRANSACTION else {}
    return device.authenticate(await hanko.begin(at, user_id="ann", **more), ORIGIN, **how)


def gone(at: str) -> tuple[int, str, str]:
    """Status, title and details of an answer to a challenge that is not there."""
    if at.endswith(REGISTRATION):
        told, keyed = UnknownTransaction.default, at == SECOND_REGISTRATION
        hint = (
            "There is no begun ceremony with this challenge, or it is expired or already used; "
            "begin again."
        )
        return 400, NO_CHALLENGE, f"{told} {hint}" if keyed else told
    details = "no transaction found for this challenge" if at == TRANSACTION else NO_CHALLENGE
    return 401, "failed to get session data", details


async def is_gone(hanko: Hanko, at: str, answer: object) -> None:
    response = await hanko.send("POST", at + "/finalize", answer)
    assert (response.status, response.json["title"], response.json["details"]) == gone(at)


@ON_BOTH
@pytest.mark.parametrize("at", OPERATIONS)
async def test_of_50_finalizes_one_succeeds(
    start_broker: Starter,
    session: Any,
    hanko: Hanko,
    broker: Started,
    device: Authenticator,
    at: str,
) -> None:
    """Over two instances."""
    await hanko.register("ann", device)
    second = await start_broker()
    other = Hanko(Wire(session, second.url, hanko.wire.app_id, hanko.wire.key))
    answer = await begun(hanko, at, device)
    before = len(await hanko.credentials("ann"))
    answers = await asyncio.gather(
        *((hanko, other)[n % 2].send("POST", at + "/finalize", answer) for n in range(PARALLEL))
    )
    assert Counter(a.status for a in answers) == {200: 1, gone(at)[0]: PARALLEL - 1}
    counted = [
        b.metric("broker_refusals_total", code=GONE[0], reason=GONE[1]) for b in (broker, second)
    ]
    assert sum(counted) == PARALLEL - 1
    assert len(await hanko.credentials("ann")) - before == at.endswith(REGISTRATION)
    await is_gone(hanko, at, answer)


@ON_BOTH
@pytest.mark.parametrize("at", OPERATIONS)
async def test_a_refused_answer_spends_the_challenge(
    broker: Started, hanko: Hanko, device: Authenticator, at: str
) -> None:
    await hanko.register("ann", device)
    answer = await begun(hanko, at, device)
    wrong = {**answer, "response": {**answer["response"]}}
    field = "attestationObject" if at.endswith(REGISTRATION) else "authenticatorData"
    wrong["response"][field] = "AAAA"
    response = await hanko.send("POST", at + "/finalize", wrong)
    assert 400 <= response.status < 500
    with refused(broker, *GONE):
        await is_gone(hanko, at, answer)


@ON_BOTH
@pytest.mark.parametrize("at", OPERATIONS)
async def test_a_fault_of_form_spends_no_challenge(
    hanko: Hanko, device: Authenticator, at: str
) -> None:
    await hanko.register("ann", device)
    answer = await begun(hanko, at, device)
    for bad in (
        {},
        {**answer, "id": "no+base64"},
        {**answer, "type": "password"},
        {**answer, "response": []},
    ):
        assert (await hanko.send("POST", at + "/finalize", bad)).status == 400
    await hanko.finish(at, answer)


@ON_BOTH
@pytest.mark.parametrize("at", OPERATIONS)
async def test_a_challenge_of_another_operation(
    broker: Started, hanko: Hanko, device: Authenticator, at: str
) -> None:
    """The vendor's sessions are told apart by operation, and so are ours."""
    await hanko.register("ann", device)
    for number, other in enumerate(o for o in OPERATIONS if o != at):
        answer = await begun(hanko, other, device, f"t{number}")
        if at.endswith(REGISTRATION) != other.endswith(REGISTRATION):
            answer = swapped(answer)
        with refused(broker, GONE[0], "other_finish"):
            await is_gone(hanko, at, answer)


def swapped(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with what the other kind of finalize reads as well."""
    more = {"attestationObject": "AAAA", "authenticatorData": "AAAA", "signature": "AAAA"}
    return {**answer, "response": {**more, **answer["response"]}}


@ON_BOTH
@pytest.mark.parametrize("at", OPERATIONS)
async def test_a_challenge_of_another_tenant(
    broker: Started, hanko: Hanko, open_app: OpenApp, device: Authenticator, at: str
) -> None:
    """Unknown there, and still good where it was made."""
    other = Hanko(await open_app(QUICK))
    await hanko.register("ann", device)
    answer = await begun(hanko, at, device)
    with refused(broker, *GONE):
        await is_gone(other, at, answer)
    await hanko.finish(at, answer)


@ON_BOTH
@pytest.mark.parametrize("at", OPERATIONS)
async def test_a_challenge_lives_as_long_as_its_timeout(
    broker: Started, open_app: OpenApp, device: Authenticator, at: str
) -> None:
    hanko = Hanko(await open_app(Policy(declared={"hanko_algorithm": "ES256"}, ceremony_life=90)))
    await hanko.register("ann", device)
    late, early = await begun(hanko, at, device, "late"), await begun(hanko, at, device, "early")
    broker.clock.ahead += 89
    await hanko.ok(at + "/finalize", early)
    broker.clock.ahead += 2 + SKEW
    with refused(broker, *GONE):
        await is_gone(hanko, at, late)


@pytest.mark.parametrize("at", OPERATIONS)
async def test_a_dump_of_redis_finalizes_nothing(
    broker: Started, hanko: Hanko, device: Authenticator, at: str
) -> None:
    """The challenge is all that a registration's answer takes, from whatever authenticator, and a
    page may bring it: so nobody gets to one from what is at rest."""
    await hanko.register("ann", device)
    answer = await begun(hanko, at, device)
    challenge: str = json.loads(unb64(answer["response"]["clientDataJSON"]))["challenge"]
    async with Redis.from_url(broker.parts.settings.redis_url) as redis:
        names: list[bytes] = [n async for n in redis.scan_iter(match=f"p:{{{hanko.wire.app_id}}}*")]
        values = [cast("bytes", await redis.get(name)) for name in names]
    assert len(names) == 1
    for dumped in (*names, *values):
        assert challenge.encode() not in dumped
        assert unb64(challenge) not in dumped
    await hanko.finish(at, answer)


@ON_BOTH
async def test_a_token_of_an_hour_is_redeemed_within_ten_minutes(
    start_broker: Starter, session: Any, device: Authenticator
) -> None:
    """What redeems once is short, however long the token that carries it is good for whoever checks
    it offline.
    """
    broker = await start_broker(hanko_token_life=3600)
    hanko = Hanko(await Wire.open(broker.service, session, policy=QUICK))
    await hanko.register("ann", device)
    late, early = [await hanko.login(device) for _ in range(2)]
    assert late["exp"] - late["iat"] == 3600
    broker.clock.ahead += 590
    assert (await hanko.wire.redeem(early["jti"])).status == 200
    broker.clock.ahead += 20
    with refused(broker, "invalid_nonce", "nonce_expired"):
        assert (await hanko.wire.redeem(late["jti"])).status == 401


@ON_BOTH
async def test_several_may_be_open(hanko: Hanko, device: Authenticator) -> None:
    """Each is found by its own challenge, so a new one replaces none."""
    await hanko.register("ann", device)
    for at in OPERATIONS:
        answers = [await begun(hanko, at, device, f"{at}{n}") for n in range(3)]
        for answer in answers:
            await hanko.finish(at, answer)


@ON_BOTH
async def test_a_challenge_that_the_answer_made_up(
    broker: Started, hanko: Hanko, device: Authenticator
) -> None:
    await hanko.register("ann", device)
    for challenge in ("A" * 43, "A" * 86):
        answer = await begun(hanko, LOGIN, device, challenge=challenge)
        with refused(broker, *GONE):
            await is_gone(hanko, LOGIN, answer)
    for challenge in ("", "é", "no base64", "a" * 9000):
        answer = await begun(hanko, LOGIN, device, challenge=challenge)
        assert (await hanko.send("POST", LOGIN + "/finalize", answer)).status in (400, 401), (
            challenge
        )
    for client_data in (b"", b"[]", b"{", b"\xff", b'{"challenge":7}', b"{}"):
        answer = await begun(hanko, LOGIN, device, client_data_json=client_data)
        details = await hanko.refused(400, "unable to finish login", LOGIN + "/finalize", answer)
        assert details
