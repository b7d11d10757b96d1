"""Rate limits: what a client address and an API key may do, on one server and in a Cluster, by
several instances, and while Redis does not answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from ipaddress import ip_network
from typing import Any

import aiohttp
import pytest

from broker.embedded import EmbeddedStores
from broker.ephemeral.rate_limits import RateLimits
from broker.errors import TooManyRequests
from broker.model import ANYONE, RATE_KEYS, Caller, Policy, RelyingParty, rate_of
from broker.settings import Settings
from tests.conftest import ON_BOTH, Starter
from tests.support.authenticator import Authenticator
from tests.support.servers import eventually, frozen
from tests.support.signals import lines, refused
from tests.support.wire import ORIGIN, Answer, Wire

START = "/authenticate/transactions/webauthn/start"
FINISH = "/authenticate/transactions/webauthn/finish"
FEW = "1/min:3"  # three at once, then one a minute
PROXIES = (ip_network("127.0.0.1"),)


async def page(wire: Wire, path: str, body: dict[str, Any], client: str) -> Answer:
    """A request of a page at a client address."""
    return await wire.send(
        "POST", path, json=body, headers={"Origin": ORIGIN, "X-Forwarded-For": client}
    )


# -- begins ----------------------------------------------------------------------------------------


@ON_BOTH
async def test_begins_of_one_address(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """Over the limit nothing is written: the transaction's earlier ceremony still finishes. Other
    addresses, other apps, keyed callers and redemptions go on.
    """
    broker = await start_broker(begin_rate=FEW, trusted_proxies=PROXIES)
    wire, other = [await Wire.open(broker.service, session) for _ in range(2)]
    await wire.user("ann", device)  # one begin of 127.0.0.1
    transaction = await wire.open_authentication("ann")
    body = {"transaction_id": transaction}
    answers = [await page(wire, START, body, "203.0.113.7") for _ in range(3)]
    handshake = answers[-1].of(200)["handshake"]
    for _ in range(2):
        with refused(broker, "too_many_requests", "begin_rate"):
            answer = await page(wire, START, body, "203.0.113.7")
        assert (answer.status, answer.code) == (429, "too_many_requests")
        assert 50 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    response = device.authenticate(handshake["challenge"]["publicKey"], ORIGIN)
    finish = {"handshake_id": handshake["id"], "handshake_response": response}
    nonce = (await page(wire, FINISH, finish, "203.0.113.7")).of(200)["nonce"]
    assert (await wire.redeem(nonce)).status == 200
    assert (await page(wire, START, {}, "203.0.113.8")).status == 200
    assert (await page(other, START, {}, "203.0.113.7")).status == 200
    for _ in range(4):
        (await wire.keyed("POST", "/ceremonies/authenticate/start", {"discoverable": True})).of(200)


async def test_ipv6_clients_are_counted_by_their_64(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    broker = await start_broker(begin_rate=FEW, trusted_proxies=PROXIES)
    wire = await Wire.open(broker.service, session)
    for last in range(3):
        (await page(wire, START, {}, f"2001:db8:1:2::{last}")).of(200)
    with refused(broker, "too_many_requests", "begin_rate"):
        assert (await page(wire, START, {}, "2001:db8:1:2:ffff::")).status == 429
    (await page(wire, START, {}, "2001:db8:1:3::")).of(200)


async def test_a_caller_can_not_choose_its_address(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    """Without trusted proxies the peer is the client, whatever the headers say."""
    broker = await start_broker(begin_rate=FEW)
    wire = await Wire.open(broker.service, session)
    for last in range(3):
        (await page(wire, START, {}, f"203.0.113.{last}")).of(200)
    with refused(broker, "too_many_requests", "begin_rate"):
        assert (await page(wire, START, {}, "203.0.113.9")).status == 429
    assert "BROKER_TRUSTED_PROXIES" in lines(broker)[-1]["hint"]


async def test_a_proxy_that_is_not_trusted_is_told_once(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    for proxies, times in (((), 1), (PROXIES, 0)):
        broker = await start_broker(trusted_proxies=proxies)
        wire = await Wire.open(broker.service, session)
        (await wire.page(START, {})).of(200)
        assert "proxy_not_trusted" not in {line["event"] for line in broker.log}
        for _ in range(2):
            (await page(wire, START, {}, "203.0.113.7")).of(200)
        told = [line for line in broker.log if line["event"] == "proxy_not_trusted"]
        assert len(told) == times
        assert all("BROKER_TRUSTED_PROXIES" in line["todo"] for line in told)


async def test_discoverable_begins_have_a_limit_of_their_own(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    broker = await start_broker(discoverable_rate=FEW, secret_key=("x" * 20 + "0123456789abcdef",))
    wire = await Wire.open(broker.service, session)
    await wire.user("ann", device)
    for path in (START, f"{wire.url}/hanko/{wire.app_id}/login/initialize", START):
        (await wire.page(path, {})).of(200)
    for path in (START, f"{wire.url}/hanko/{wire.app_id}/login/initialize"):
        with refused(broker, "too_many_requests", "discoverable_rate"):
            assert (await wire.page(path, {})).status == 429
    nonce = await wire.authenticate(await wire.open_authentication("ann"), device)
    assert (await wire.redeem(nonce)).status == 200


async def test_the_policy_overrides_the_setting(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    broker = await start_broker(begin_rate=FEW)
    more, none, own = [
        await Wire.open(broker.service, session, policy=Policy(begin_rate=rate))
        for rate in ("1/min:5", "0", "default")
    ]
    for wire, allowed in ((more, 5), (none, 9), (own, 3)):
        statuses = Counter([(await wire.page(START, {})).status for _ in range(9)])
        assert statuses[200] == allowed, wire
    assert (
        broker.metric("broker_refusals_total", code="too_many_requests", reason="begin_rate") == 10
    )


ATTACKERS, EACH = 100, 200


async def test_abandoned_begins_do_not_close_an_app(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """20,000 discoverable begins from 100 addresses, none of them finished, while others sign in:
    all are within the default limits, and the app goes on. An address that begins without end is
    refused, and alone.
    """
    rates = {name: getattr(Settings(), name) for name in RATE_KEYS}
    broker = await start_broker(trusted_proxies=PROXIES, **rates)
    wire = await Wire.open(broker.service, session)
    await wire.user("ann", device)
    app = await broker.parts.directory.app(wire.app_id)

    async def sign_in(client: str) -> None:
        begun = (await page(wire, START, {}, client)).of(200)["handshake"]
        response = device.authenticate(begun["challenge"]["publicKey"], ORIGIN)
        body = {"handshake_id": begun["id"], "handshake_response": response}
        nonce = (await page(wire, FINISH, body, client)).of(200)["nonce"]
        assert (await wire.redeem(nonce)).status == 200

    # All at the verb, where the guard's client address is; a client of HTTP costs far more.
    begin = broker.parts.broker.begin_authentication
    callers = [Caller(app, address=f"198.51.100.{n}") for n in range(ATTACKERS)]
    for number in range(EACH // 5):
        await asyncio.gather(*(begin(caller, ANYONE, "page") for caller in callers * 5))
        if number % 5 == 0:
            await sign_in(f"203.0.113.{number}")
    begun = 0
    while (await page(wire, START, {}, "192.0.2.1")).status == 200:
        begun += 1
    assert begun >= 300, "its burst"
    await sign_in("203.0.113.250")


# -- keyed calls -----------------------------------------------------------------------------------


@ON_BOTH
async def test_calls_of_one_key(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """Over the limit finishes and redemptions go on, as do other keys and pages."""
    broker = await start_broker(keyed_rate="1/min:5")
    wire = await Wire.open(broker.service, session)
    nonce = await wire.register(await wire.open_registration("ann"), device)
    begun = await wire.keyed("POST", "/authenticate/start", {"external_id": "ann"})
    for _ in range(3):
        (await wire.keyed("GET", "/users")).of(200)
    for method, path, body in (
        ("GET", "/users", None),
        ("POST", "/transactions/authenticate", {"external_id": "ann"}),
        ("POST", "/authenticate/start", {"external_id": "ann"}),
    ):
        with refused(broker, "too_many_requests", "keyed_rate"):
            answer = await wire.keyed(method, path, body)
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) > 50
        assert "keyed_rate" in answer.json["error"]
    assert (await wire.redeem(nonce)).status == 200
    response = device.authenticate(begun.of(200)["options"], ORIGIN)
    finish = {"external_id": "ann", "credential": response}
    (await wire.keyed("POST", "/authenticate/finish", finish)).of(200)
    _, second = await broker.parts.directory.create_key(wire.app_id, "second")
    assert (await wire.keyed("GET", "/users", key=second)).status == 200
    assert (await wire.page(START, {})).status == 200


# -- finishes --------------------------------------------------------------------------------------


async def test_unknown_finishes_of_one_address(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """Over the limit a finish of that address is refused before anything is taken: another address
    finishes that ceremony.
    """
    broker = await start_broker(unknown_finish_rate=FEW, trusted_proxies=PROXIES)
    wire = await Wire.open(broker.service, session)
    await wire.user("ann", device)
    handle, options = await wire.begin("authenticate", None)
    response = device.authenticate(options, ORIGIN)
    right = {"handshake_id": handle, "handshake_response": response}
    wrong = {"handshake_id": "pbh_" + "a" * 43, "handshake_response": response}
    for _ in range(3):
        answer = await page(wire, FINISH, wrong, "203.0.113.7")
        assert (answer.status, answer.code) == (404, "transaction_not_found")
    for body in (wrong, right):
        with refused(broker, "too_many_requests", "unknown_finish_rate"):
            answer = await page(wire, FINISH, body, "203.0.113.7")
        assert (answer.status, answer.code) == (429, "too_many_requests")
    nonce = (await page(wire, FINISH, right, "203.0.113.8")).of(200)["nonce"]
    assert (await wire.redeem(nonce)).status == 200


async def test_parallel_unknown_finishes_refuse_no_longer(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """All were admitted before the first was found unknown. They fill the bucket, and no more."""
    broker = await start_broker(unknown_finish_rate=FEW)
    wire = await Wire.open(broker.service, session)
    await wire.user("ann", device)
    response = device.authenticate((await wire.begin("authenticate", None))[1], ORIGIN)
    wrong = {"handshake_id": "pbh_" + "a" * 43, "handshake_response": response}
    answers = await asyncio.gather(*(wire.page(FINISH, wrong) for _ in range(40)))
    assert {answer.status for answer in answers} <= {404, 429}
    with refused(broker, "too_many_requests", "unknown_finish_rate"):
        answer = await wire.page(FINISH, wrong)
    assert 0 < int(answer.headers["Retry-After"]) <= 60


# -- instances and outages -------------------------------------------------------------------------


@ON_BOTH
async def test_instances_share_a_bucket(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    first, second = [await start_broker(begin_rate=FEW) for _ in range(2)]
    wire = await Wire.open(first.service, session)
    for _ in range(3):
        (await wire.page(START, {})).of(200)
    elsewhere = f"http://127.0.0.1:{second.service.port}/v1/apps/{wire.app_id}{START}"
    (await wire.page(elsewhere, {})).of(200)  # its reply tells what the first instance charged
    with refused(second, "too_many_requests", "begin_rate"):
        answer = await wire.page(elsewhere, {})
    assert answer.status == 429
    assert int(answer.headers["Retry-After"]) > 60, "what passed the limit is charged too"


async def test_a_bucket_empties(start_broker: Starter, session: aiohttp.ClientSession) -> None:
    broker = await start_broker(begin_rate=FEW)
    wire = await Wire.open(broker.service, session)
    await asyncio.gather(*(wire.page(START, {}) for _ in range(3)))
    with refused(broker, "too_many_requests", "begin_rate"):
        wait = int((await wire.page(START, {})).headers["Retry-After"])
    broker.clock.ahead = wait - 2
    with refused(broker, "too_many_requests", "begin_rate"):
        assert (await wire.page(START, {})).status == 429
    broker.clock.ahead = wait
    assert (await wire.page(START, {})).status == 200


async def test_parallel_begins_at_one_instance_are_exact(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    broker = await start_broker(begin_rate="1/min:10")
    wire = await Wire.open(broker.service, session)
    answers = await asyncio.gather(*(wire.page(START, {}) for _ in range(30)))
    assert Counter(answer.status for answer in answers) == {200: 10, 429: 20}


async def test_without_redis_each_instance_limits_by_itself(
    start_broker: Starter, own_stores: EmbeddedStores, session: aiohttp.ClientSession
) -> None:
    """The limiter fails open, and a metric counts that; takes and puts fail closed. A begin that
    Redis did not answer is charged in memory.
    """
    broker = await start_broker(own_stores, begin_rate=FEW, keyed_rate=FEW, store_timeout=0.3)
    wire = await Wire.open(broker.service, session)
    with frozen(own_stores, "Valkey"):
        assert (await wire.page(START, {})).status == 503
        assert (await wire.keyed("GET", "/users")).status == 200
        labels = {"store": "redis", "operation": "charge"}
        await eventually(
            lambda: broker.metric("broker_store_failures_total", **labels) == 2, "charges failed"
        )
        for _ in range(2):
            assert (await wire.page(START, {})).status == 503
        with refused(broker, "too_many_requests", "begin_rate"):
            assert (await wire.page(START, {})).status == 429


# -- in memory -------------------------------------------------------------------------------------


class _Posted:
    """Keeps what is posted: only the memory of `RateLimits` decides."""

    def __init__(self) -> None:
        self.charged: list[tuple[list[bytes], list[int]]] = []

    def post(self, _: str, __: object, keys: list[bytes], args: list[int], ___: object) -> None:
        self.charged.append((keys, args))


def limits_of(now: list[float], **rates: str) -> tuple[RateLimits, _Posted]:
    posted = _Posted()
    return RateLimits(posted, rates, lambda: now[0]), posted  # type: ignore[arg-type]


APP = RelyingParty("a" * 24, "App", "example.org", (ORIGIN,))


@pytest.mark.parametrize(
    ("text", "value"),
    [("600/min:300", (100, 300)), ("200/s:400", (5, 400)), ("7/min:1", (8571, 1)), ("0", (1, 0))],
)
def test_a_rate_is_an_interval_and_a_burst(text: str, value: tuple[int, int]) -> None:
    assert rate_of(text) == value


def test_one_charge_has_every_bucket_of_a_request() -> None:
    limits, posted = limits_of([0.0], begin_rate="10/s:9", discoverable_rate="150/s:9")
    limits.begin(Caller(APP, address="1.2.3.4"), discoverable=True)
    name = b"l:{%b|1.2.3.4}" % APP.id.encode()
    assert posted.charged == [([name + b":b", name + b":d"], [100, 7])]


def test_a_refused_begin_charges_no_bucket() -> None:
    limits, posted = limits_of([0.0], begin_rate="10/s:5", discoverable_rate="10/s:1")
    caller = Caller(APP, address="1.2.3.4")
    limits.begin(caller, discoverable=True)
    for _ in range(9):
        with pytest.raises(TooManyRequests):
            limits.begin(caller, discoverable=True)
    for _ in range(4):
        limits.begin(caller, discoverable=False)
    assert len(posted.charged) == 5


def test_no_limit_charges_nothing() -> None:
    limits, posted = limits_of([0.0], begin_rate="0")
    for _ in range(1000):
        limits.begin(Caller(APP), discoverable=True)
        limits.unknown_finish(Caller(APP))
        limits.finish(Caller(APP))
    assert posted.charged == []


def test_memory_holds_no_empty_bucket() -> None:
    now = [0.0]
    limits, _ = limits_of(now, begin_rate="10/s:3")
    for number in range(25_000):
        now[0] = number / 1000  # so some hundred are not empty
        limits.begin(Caller(APP, address=str(number)), discoverable=False)
    assert len(limits._empty_at) <= 10_001
