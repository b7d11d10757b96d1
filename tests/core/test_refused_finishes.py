"""A transaction ends with its tenth refused finish, in every API that has transactions; so what it
writes down is bounded.

Faults of form spend nothing and are not counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from broker.broker import limited_events
from tests.conftest import OpenApp, Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.passlock import Passlock
from tests.support.signals import lines, refused
from tests.support.wire import ORIGIN, Answer, Wire

Options = dict[str, Any]
LIMIT = 10


@dataclass(frozen=True)
class Way:
    """One kind of transaction: opened by the backend, begun and finished by the page. `action` is
    what its events are called; "" where nobody is named, so that refusals of unsigned answers are
    no events."""

    kind: str
    action: str
    open: Callable[[Wire], Awaitable[str]]
    begin: Callable[[Wire, str], Awaitable[Answer]]
    finish: Callable[[Wire, str, Options], Awaitable[Answer]]


def _flex(kind: str, action: str, **asked: object) -> Way:
    async def opened(wire: Wire) -> str:
        name = {"passkey_display_name": "Ann"} if kind == "register" else {}
        who = {} if "discoverable" in asked else {"external_id": "ann"}
        answer = await wire.keyed("POST", f"/transactions/{kind}", {**who, **name, **asked})
        return str(answer.json["transaction_id"])

    page = f"/{kind}/transactions/webauthn"
    return Way(
        kind,
        action,
        opened,
        lambda wire, transaction: wire.page(f"{page}/start", {"transaction_id": transaction}),
        lambda wire, handle, answer: wire.finish(kind, handle, answer),
    )


def _passlock(kind: str, action: str, *, user: str | None = "ann", prefix: str = "/v2") -> Way:
    registers = kind == "registration"

    async def opened(wire: Wire) -> str:
        if registers:
            return await Passlock(wire).authorize_registration(cast("str", user))
        return await Passlock(wire).authorize_authentication(user)

    return Way(
        "register" if registers else "authenticate",
        action,
        opened,
        lambda wire, token: Passlock(wire, prefix).page(
            f"/passkey/{kind}/options", {f"{kind}Token": token}
        ),
        lambda wire, handle, answer: Passlock(wire, prefix).finish(kind, handle, answer),
    )


WAYS: dict[str, Way] = {
    "flex-register": _flex("register", "passkey.registered"),
    "flex-authenticate": _flex("authenticate", "passkey.used"),
    "flex-discoverable": _flex("authenticate", "", discoverable=True),
    "flex-second-registration": _flex("register", "second_factor.registered", second_factor=True),
    "flex-second-authentication": _flex("authenticate", "second_factor.used", second_factor=True),
    "passlock-registration": _passlock("registration", "passkey.registered"),
    "passlock-authentication": _passlock("authentication", "passkey.used"),
    "passlock-discoverable": _passlock("authentication", "", user=None),
    "passlock-unprefixed": _passlock("authentication", "passkey.used", prefix=""),
}


def _handle(begun: Answer) -> tuple[str, Options]:
    body = begun.json
    if "sessionToken" in body:
        return body["sessionToken"], body["optionsJSON"]
    return body["handshake"]["id"], body["handshake"]["challenge"]["publicKey"]


def _answer(way: Way, options: Options, device: Authenticator, origin: str = ORIGIN) -> Options:
    if way.kind == "register":
        return Authenticator().register(options, origin)
    return device.authenticate(options, origin)


async def _refuse(way: Way, wire: Wire, transaction: str, device: Authenticator) -> Answer:
    """Begin, and finish with an answer of another origin."""
    handle, options = _handle(await way.begin(wire, transaction))
    return await way.finish(wire, handle, _answer(way, options, device, "https://evil.example"))


async def _events(broker: Started, wire: Wire, way: Way) -> int:
    found = await broker.events(wire.app_id)
    return sum((action, result) == (way.action, "refused") for action, result, _ in found)


@pytest.mark.parametrize("name", WAYS)
async def test_the_tenth_refused_finish_ends_a_transaction(
    start_broker: Starter, broker: Started, wire: Wire, device: Authenticator, name: str
) -> None:
    """Over two instances. The ninth leaves it, and the tenth is answered as the others are."""
    way, other = WAYS[name], await start_broker()
    second = Wire(wire.session, other.url, wire.app_id, wire.key)
    await wire.user("ann", device)
    transaction, spare = await way.open(wire), await way.open(wire)
    answers = [
        await _refuse(way, (wire, second)[number % 2], transaction, device)
        for number in range(LIMIT)
    ]
    assert len({(answer.status, tuple(answer.json)) for answer in answers}) == 1
    assert answers[0].status in (400, 401)
    for one in (broker, other):
        assert len(lines(one, reason="origin")) == LIMIT / 2
    with refused(broker, "transaction_not_found", "too_many_refusals"):
        ended = await way.begin(wire, transaction)
    unknown = await way.begin(wire, "pbt_" + "a" * 43)
    assert (ended.status, ended.body) == (unknown.status, unknown.body)
    assert ended.status == (400 if "passlock" in name else 404)
    assert await _events(broker, wire, way) == (LIMIT if way.action else 0)
    for _ in range(LIMIT - 1):
        await _refuse(way, wire, spare, device)
    handle, options = _handle(await way.begin(wire, spare))
    done = await way.finish(wire, handle, _answer(way, options, device))
    assert done.status == 200, "nine refused ones leave a transaction, and another's don't count"


async def test_a_finish_that_names_another_transaction_counts(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """It spends the ceremony as any refused finish does. What it names is not counted against."""
    await wire.user("ann", device)
    transaction, named = (
        await wire.open_authentication("ann"),
        await wire.open_authentication("ann"),
    )
    with refused(broker, "transaction_not_found", "other_transaction", times=LIMIT):
        for _ in range(LIMIT):
            handle, options = await wire.begin("authenticate", transaction)
            answer = device.authenticate(options, ORIGIN)
            assert (await wire.finish("authenticate", handle, answer, named)).status == 404
    path = "/authenticate/transactions/webauthn/start"
    with refused(broker, "transaction_not_found", "too_many_refusals"):
        assert (await wire.page(path, {"transaction_id": transaction})).status == 404
    await wire.authenticate(named, device)


@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_faults_of_form_are_not_counted(wire: Wire, device: Authenticator, kind: str) -> None:
    await wire.user("ann", device)
    way = WAYS[f"flex-{kind}"]
    transaction = await way.open(wire)
    handle, options = _handle(await way.begin(wire, transaction))
    answer = _answer(way, options, device)
    for _ in range(LIMIT):
        for fault in ({}, {**answer, "id": "no+base64"}, {**answer, "response": []}):
            assert (await way.finish(wire, handle, fault)).status == 400
    assert (await way.finish(wire, handle, answer)).status == 200


async def test_refused_finishes_at_once_write_ten_events(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """However many are in flight when the tenth ends the transaction."""
    await wire.user("ann", device)
    way = WAYS["flex-authenticate"]
    transaction = await way.open(wire)

    async def insist() -> None:
        while (begun := await way.begin(wire, transaction)).status == 200:
            handle, options = _handle(begun)
            await way.finish(wire, handle, _answer(way, options, device, "https://evil.example"))
            # In step, each begin would replace the ceremony of another before its finish.
            await asyncio.sleep(random.random() / 4)

    await asyncio.gather(*(insist() for _ in range(20)))
    assert len(lines(broker, reason="origin")) >= LIMIT
    assert await _events(broker, wire, way) == LIMIT
    assert lines(broker, code="transaction_not_found", reason="too_many_refusals")


async def test_the_count_outlives_the_transaction_and_goes_by_itself(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    way = WAYS["flex-authenticate"]
    async with Redis.from_url(broker.parts.settings.redis_url) as redis:
        before = {name async for name in redis.scan_iter(match="f:*")}
        await _refuse(way, wire, await way.open(wire), device)
        [name] = {name async for name in redis.scan_iter(match="f:*")} - before
        assert len(name) == len("f:") + 32, "a digest"
        assert 590_000 < await redis.pttl(name) <= 600_000


async def test_events_of_refused_finishes_are_limited(
    broker: Started,
    wire: Wire,
    open_app: OpenApp,
    device: Authenticator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By app and action, over any number of transactions; one more has the number of the rest."""
    monkeypatch.setattr(limited_events, "LIMIT", 3)
    other = await open_app()
    for place in (wire, other):
        await place.user("ann", device)
    way, registration = WAYS["flex-authenticate"], WAYS["flex-register"]
    for _ in range(7):
        await _refuse(way, wire, await way.open(wire), device)
    await _refuse(way, other, await way.open(other), device)
    await _refuse(registration, wire, await registration.open(wire), device)
    assert await _events(broker, wire, way) == 3
    assert await _events(broker, wire, registration) == 1
    assert await _events(broker, other, way) == 1
    await broker.parts.broker.close()
    *_, rest = await broker.parts.directory.events(wire.app_id, limit=1000)
    assert (rest.action, rest.result, rest.reason) == ("passkey.used", "refused", "limited")
    assert await _events(broker, wire, way) == 4
    assert await _events(broker, other, way) == 1
