"""The mode `postgres` of one-time values: the ledger decides takes, and all instances have the
recorded mode.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest

from broker.broker import Broker
from broker.dialects import openers
from broker.durable import Postgres
from broker.durable.housekeeping import Housekeeping
from broker.durable.ledger import Ledger
from broker.embedded import EmbeddedStores
from broker.ephemeral import TERM_OVER, Ephemeral, Replayed, Taken, Unknown
from broker.errors import Unavailable
from broker.model import Idempotency
from broker.telemetry import Log, Metrics
from broker.tokens import digest
from tests.conftest import Starter
from tests.stores.test_ephemeral import APP, MINT, TIMEOUT, Place, redeemable
from tests.stores.test_terms import ALL, Pair, Takes, pair, put_values, server
from tests.support.authenticator import Authenticator
from tests.support.commands import Cli, refused_serve
from tests.support.processes import until
from tests.support.servers import Valkey, database_of, pool
from tests.support.wire import Wire

__all__ = ["pair"]  # a fixture

NOW = datetime(2026, 1, 2, tzinfo=UTC)
STAMPS = ("0123456789abcdef", "fedcba9876543210")


@dataclass(slots=True)
class Scene:
    """A database of the test's own, in the mode `postgres`, and the ledgers of instances."""

    url: str
    pools: list[Postgres]

    async def ledger(self) -> Ledger:
        """The ledger of another instance."""
        made = pool(self.url)
        await made.open()
        self.pools.append(made)
        return Ledger(made)

    async def store(self, place: Place) -> Ephemeral:
        """The ephemeral store of another instance."""
        assert isinstance(place.server, Valkey)
        made = Ephemeral(
            place.server.commands(timeout=TIMEOUT),
            timeout=TIMEOUT,
            metrics=place.metrics,
            log=place.log,
            clock=place.clock,
            openers=openers(),
            ledger=await self.ledger(),
        )
        place.made.append(made)
        return made


@pytest.fixture
async def scene(stores: EmbeddedStores) -> AsyncIterator[Scene]:
    async with database_of(stores) as url:
        made = Scene(url, [])
        ledger = await made.ledger()
        await made.pools[0].migrate(NOW)
        await ledger.record("postgres", STAMPS[0], NOW)
        yield made
        for opened in made.pools:
            await opened.close()


async def test_one_of_many_spends_a_value(scene: Scene) -> None:
    """Of many callers of two instances, whose statements have digests in common."""
    ledgers = [await scene.ledger() for _ in range(2)]
    digests = [bytes([number]) * 32 for number in range(40)]
    spent = await asyncio.gather(
        *(ledger.spend(60.0, digest) for digest in digests for ledger in ledgers * 3)
    )
    assert sum(spent) == len(digests)
    assert [await ledgers[0].spend(60.0, digest) for digest in digests[:2]] == [False, False]
    assert await ledgers[0].spend(3660.0, digests[0]), "a value with another end is another value"


async def test_a_claim_spends_again_what_it_spent(scene: Scene) -> None:
    """And nothing else: a claim that came too late is not recorded."""
    ledgers = [await scene.ledger() for _ in range(2)]
    value, mine, other = (bytes([number]) * 32 for number in range(3))
    assert await ledgers[0].spend(60.0, value, mine)
    assert [await each.spend(60.0, value, mine) for each in ledgers] == [True, True]
    for claim in (other, other, b""):
        assert not await ledgers[1].spend(60.0, value, claim)


async def test_a_repeated_redemption_is_decided_by_the_ledger(scene: Scene, pair: Pair) -> None:
    """A nonce is in two servers. The tombstone of the second server proves no redemption: the
    ledger refused it, and refuses the repeated request.
    """
    first, second = [await scene.store(place) for place in (pair.primary, pair.replica)]
    nonce = MINT.token("nonce")
    await first.nonces.put(APP, nonce, redeemable(pair.primary))
    key = b"n:" + digest("nonce", nonce)
    with server(pair.primary).client() as here, server(pair.replica).client() as there:
        there.set(key, here.get(key), px=700_000)
    mine, other = Idempotency("pbk_a:1", b"r" * 32), Idempotency("pbk_a:2", b"r" * 32)
    taken = await first.nonces.take(APP, nonce, mine)
    assert isinstance(taken, Taken)
    assert await second.nonces.take(APP, nonce, other) == TERM_OVER
    assert isinstance(await second.nonces.take(APP, nonce, other), Replayed)
    assert await first.nonces.take(APP, nonce, mine) == taken._replace(repeated=True)


async def test_failover_to_a_lagging_replica(scene: Scene, pair: Pair) -> None:
    """Each value of each kind is in two servers, and both would hand it out: the ledger decides."""
    pair.follow(pair.replica, pair.primary)
    store = await scene.store(pair.primary)
    takes = Takes(await put_values(pair.primary, store))
    until(lambda: pair.level(pair.replica, pair.primary), "the values are replicated")
    pair.cut(pair.replica)
    assert await takes(store) == ["taken"]
    server(pair.replica).ask("REPLICAOF", "NO", "ONE")
    again = await scene.store(pair.replica)
    assert await takes(again) == ["term_over"]
    assert sum(takes.taken) == ALL
    fresh = Takes(await put_values(pair.replica, again))
    assert await fresh(again) == ["taken"]


async def test_a_change_of_the_mode_ends_values(scene: Scene, pair: Pair) -> None:
    term = pair.primary.store()
    nonces = [MINT.token("nonce") for _ in range(2)]
    await term.nonces.put(APP, nonces[0], redeemable(pair.primary))
    first = await scene.store(pair.primary)
    assert await first.nonces.take(APP, nonces[0]) == TERM_OVER, "one of the other mode"
    await first.nonces.put(APP, nonces[1], redeemable(pair.primary))
    assert await term.nonces.take(APP, nonces[1]) == TERM_OVER
    ledger = await scene.ledger()
    await ledger.record("term", "", NOW)
    await ledger.record("postgres", STAMPS[1], NOW)
    second = await scene.store(pair.primary)
    assert await second.nonces.take(APP, nonces[1]) == TERM_OVER, "one of an earlier period"


async def test_without_the_ledger_a_take_fails_and_spends(scene: Scene, pair: Pair) -> None:
    store, nonce = await scene.store(pair.primary), MINT.token("ticket")
    await store.tickets.put(APP, nonce, 1, pair.primary.clock() + 60)
    other = await scene.store(pair.primary)
    await other.tickets.put(APP, MINT.token("ticket"), 1, pair.primary.clock() + 60)
    for opened in scene.pools:
        await opened.close()
    with pytest.raises(Unavailable):
        await store.tickets.take(APP, nonce)
    assert await store.tickets.take(APP, nonce) == Unknown("unknown")


async def test_the_partition_of_two_hours_ago_is_emptied(scene: Scene) -> None:
    ledger = await scene.ledger()
    now = NOW.timestamp()
    for hours in (-2, -1, 0, 1):
        assert await ledger.spend(now + 3600 * hours, b"d" * 32)
    housekeeping = Housekeeping(
        scene.pools[0], retention_days=0, metrics=Metrics(), log=Log(), clock=lambda: now
    )
    await housekeeping.clean()
    kept = [not await ledger.spend(now + 3600 * hours, b"d" * 32) for hours in (-2, -1, 0, 1)]
    assert kept == [False, True, True, True]


async def test_logins_with_the_ledger(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator, scene: Scene
) -> None:
    broker = await start_broker(database_url=scene.url, one_time="postgres")
    assert isinstance(broker.parts.broker, Broker)
    async with session.get(f"{broker.url}/health/ready") as answer:
        assert answer.status == 200
    wire = await Wire.open(broker.service, session)
    await wire.user("ann", device)
    nonce = await wire.authenticate(await wire.open_authentication("ann"), device)
    answers = await asyncio.gather(*(wire.redeem(nonce) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 401, 401, 401, 401]
    ledger = await scene.ledger()
    await ledger.record("term", "", NOW)
    async with session.get(f"{broker.url}/health/ready") as answer:
        assert (await answer.json())["missing"] == ["postgres_one_time"]


async def test_the_mode_of_an_instance_is_the_recorded_one(
    cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BROKER_DATABASE_URL", scene.url)
    assert "`broker one-time --set term`" in await asyncio.to_thread(refused_serve)
    assert "FAIL one-time: BROKER_ONE_TIME is term" in (await asyncio.to_thread(cli, "doctor")).out
    monkeypatch.setenv("BROKER_ONE_TIME", "postgres")
    found = (await asyncio.to_thread(cli, "doctor")).out
    assert "warn one-time: postgres; synchronous_standby_names is empty" in found
    assert "term: not compared" in found
    shown = await asyncio.to_thread(cli, "one-time", "--json")
    assert shown.json == {"mode": "postgres"}
    ledger = await scene.ledger()
    before = await ledger.recorded()
    await asyncio.to_thread(cli, "one-time", "--set", "postgres")
    assert (await ledger.recorded()).stamp not in ("", before.stamp)
    await asyncio.to_thread(cli, "one-time", "--set", "term")
    assert (await ledger.recorded()) == ("term", "")
    (*_, event) = (await asyncio.to_thread(cli, "events", "--app", "", "--json")).json
    assert (event["action"], event["payload"]) == ("one_time_mode.recorded", {"mode": "term"})
    assert event["actor"].startswith("cli:")
