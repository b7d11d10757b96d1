"""What the directory caches, and for how long: the promise that a change is effective on every
instance within a second.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace

import asyncpg
import pytest

from broker.durable import cache
from broker.durable.cache import Cache
from broker.embedded import EmbeddedStores
from broker.errors import Conflict, InvalidKey, UnknownApp, UnknownPasskey, UnknownUser
from broker.model import Policy
from tests.conftest import Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.wire import ORIGIN, RP_ID, Wire

REMEMBERS = 0.9


@pytest.fixture
async def one(start_broker: Starter) -> Started:
    return await start_broker(cache_seconds=REMEMBERS)


@pytest.fixture
async def other(start_broker: Starter) -> Started:
    return await start_broker(cache_seconds=REMEMBERS)


def asked(broker: Started, operation: str) -> float:
    """How often the store was asked."""
    return broker.metric("broker_store_seconds_count", store="postgres", operation=operation)


async def test_a_change_is_effective_elsewhere_in_time(one: Started, other: Started) -> None:
    app, _ = await one.parts.directory.create_app("Old", RP_ID, [ORIGIN])
    assert (await other.parts.directory.app(app.id)).name == "Old"
    await one.parts.directory.update_app(replace(app, name="New", policy=Policy(nonce_life=30)))
    other.clock.ahead += REMEMBERS * 0.9
    assert (await other.parts.directory.app(app.id)).name == "Old"
    other.clock.ahead += REMEMBERS * 0.1
    changed = await other.parts.directory.app(app.id)
    assert (changed.name, changed.policy.nonce_life) == ("New", 30)


async def test_a_change_of_what_another_instance_changed_is_refused(
    one: Started, other: Started
) -> None:
    """An instance that remembers the app as it was undoes nothing, and then sees it as it is."""
    app, _ = await one.parts.directory.create_app("Old", RP_ID, [ORIGIN])
    remembered = await other.parts.directory.app(app.id)
    await one.parts.directory.update_app(replace(app, policy=Policy(nonce_life=30)))
    with pytest.raises(Conflict):
        await other.parts.directory.update_app(replace(remembered, name="New"))
    seen = await other.parts.directory.app(app.id)
    assert (seen.name, seen.policy.nonce_life) == ("Old", 30)
    await other.parts.directory.update_app(replace(seen, name="New"))
    assert [e for e in await one.events(app.id) if e[0] == "app.updated"] == [
        ("app.updated", "done", None)
    ] * 2


async def test_a_deleted_app_is_gone_in_time(one: Started, other: Started) -> None:
    app, key = await one.parts.directory.create_app("Gone", RP_ID, [ORIGIN])
    await other.parts.directory.app(app.id)
    await other.parts.directory.authorise(app.id, key)
    await one.parts.directory.delete_app(app.id)
    other.clock.ahead += REMEMBERS
    with pytest.raises(UnknownApp):
        await other.parts.directory.app(app.id)
    with pytest.raises(InvalidKey):
        await other.parts.directory.authorise(app.id, key)


async def test_a_revoked_key_ends_elsewhere_in_time(one: Started, other: Started) -> None:
    app, first = await one.parts.directory.create_app("App", RP_ID, [ORIGIN])
    made, second = await one.parts.directory.create_key(app.id, "second")
    assert await other.parts.directory.authorise(app.id, second) == made.id
    assert await one.parts.directory.revoke_key(app.id, made.id)
    assert not await one.parts.directory.revoke_key(app.id, made.id)
    other.clock.ahead += REMEMBERS
    with pytest.raises(InvalidKey) as caught:
        await other.parts.directory.authorise(app.id, second)
    assert caught.value.reason == "key_unknown"
    await other.parts.directory.authorise(app.id, first)


async def test_a_wall_clock_set_back_lengthens_nothing(one: Started, other: Started) -> None:
    """The look-up is 0.6 s old when the clock is set back by half a second, and ends 0.3 s
    later."""
    app, _ = await one.parts.directory.create_app("App", RP_ID, [ORIGIN])
    made, key = await one.parts.directory.create_key(app.id, "second")
    await other.parts.directory.authorise(app.id, key)
    await one.parts.directory.revoke_key(app.id, made.id)
    other.clock.ahead += 0.6
    other.clock.wall -= 0.5
    assert await other.parts.directory.authorise(app.id, key) == made.id
    other.clock.ahead += 0.3
    with pytest.raises(InvalidKey):
        await other.parts.directory.authorise(app.id, key)


async def test_a_slow_answer_is_not_remembered_longer(
    stores: EmbeddedStores, one: Started, other: Started
) -> None:
    """The look-up is held inside the store until after the revocation; memory counts from when it
    was asked.
    """
    app, _ = await one.parts.directory.create_app("App", RP_ID, [ORIGIN])
    made, key = await one.parts.directory.create_key(app.id, "second")
    held = await asyncpg.connect(stores.database_url)
    try:
        transaction = held.transaction()
        await transaction.start()
        await held.execute("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        looking = asyncio.create_task(other.parts.directory.authorise(app.id, key))
        watch = await asyncpg.connect(stores.database_url)
        try:
            while not await watch.fetchval(
                "SELECT count(*) FROM pg_locks"
                " WHERE NOT granted AND relation = 'api_keys'::regclass"
            ):
                assert not looking.done(), "the look-up did not wait for the table"
        finally:
            await watch.close()
        other.clock.ahead += REMEMBERS
        await transaction.rollback()
        assert await looking == made.id
    finally:
        await held.close()
    await one.parts.directory.revoke_key(app.id, made.id)
    with pytest.raises(InvalidKey):
        await other.parts.directory.authorise(app.id, key)


async def test_what_is_remembered_is_not_asked_again(one: Started) -> None:
    app, key = await one.parts.directory.create_app("App", RP_ID, [ORIGIN])
    for _ in range(5):
        await one.parts.directory.app(app.id)
        await one.parts.directory.authorise(app.id, key)
    assert (asked(one, "app"), asked(one, "key")) == (1, 1)


async def test_the_unknown_is_not_asked_for_again(one: Started) -> None:
    """For as long as the known is remembered; and it evicts nothing that is known."""
    app, known = await one.parts.directory.create_app("App", RP_ID, [ORIGIN])
    await one.parts.directory.app(app.id)
    await one.parts.directory.authorise(app.id, known)
    app_id, key = secrets.token_hex(12), new_key()
    for asked_before in (1, 2):
        for _ in range(3):
            with pytest.raises(UnknownApp):
                await one.parts.directory.app(app_id)
            with pytest.raises(InvalidKey) as caught:
                await one.parts.directory.authorise(app.id, key)
            assert caught.value.reason == "key_unknown"
        assert (asked(one, "app"), asked(one, "key")) == (1 + asked_before, 1 + asked_before)
        one.clock.ahead += REMEMBERS
    assert list(one.parts.directory._apps._values) == [app.id]
    assert len(one.parts.directory._keys._values) == 1


async def test_a_flood_of_unknown_names_shares_statements(one: Started) -> None:
    """And what an operator makes meanwhile works at once."""
    directory = one.parts.directory
    app, _ = await directory.create_app("App", RP_ID, [ORIGIN])
    flood = [directory.app(secrets.token_hex(12)) for _ in range(200)]
    keys = [directory.authorise(app.id, new_key()) for _ in range(200)]
    told = asyncio.gather(*flood, *keys, return_exceptions=True)
    made, second = await directory.create_key(app.id, "second")
    assert await directory.authorise(app.id, second) == made.id
    assert {type(fault) for fault in await told} == {UnknownApp, InvalidKey}
    assert asked(one, "app") <= 10
    assert asked(one, "key") <= 10


def new_key() -> str:
    return "pbk_" + secrets.token_urlsafe(32)


@pytest.mark.parametrize(
    "app_id", ["", "x", "a" * 23, "a" * 25, "a" * 23 + "é", "a" * 24 + "\n", "../" * 8]
)
async def test_the_ill_formed_is_not_even_asked_for(one: Started, app_id: str) -> None:
    with pytest.raises(UnknownApp):
        await one.parts.directory.app(app_id)
    with pytest.raises(InvalidKey) as caught:
        await one.parts.directory.authorise(app_id, "pbk_" + "a" * 43)
    assert caught.value.reason == "key_malformed"
    assert (asked(one, "app"), asked(one, "key")) == (0, 0)


@pytest.mark.parametrize(
    "key", ["", "pbk_", "pbk_short", "pbn_" + "a" * 43, "pbk_" + "a" * 42 + "é"]
)
async def test_an_ill_formed_key_is_not_even_asked_for(one: Started, key: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        await one.parts.directory.authorise("a" * 24, key)
    assert caught.value.reason == "key_malformed"
    assert asked(one, "key") == 0


def test_memory_is_bounded() -> None:
    memory: Cache[int] = Cache(1.0, lambda: 100.0)
    for number in range(3 * cache._MOST):
        memory.put(number, number, memory.now())
        assert memory.get(number) == number
        assert len(memory._values) <= cache._MOST


def test_zero_seconds_is_no_memory() -> None:
    memory: Cache[int] = Cache(0.0, lambda: 100.0)
    memory.put("a", 1, memory.now())
    assert memory.get("a") is None


async def test_a_key_of_one_app_is_unknown_to_another(broker: Started) -> None:
    mine, _ = await broker.parts.directory.create_app("Mine", RP_ID, [ORIGIN])
    _, key = await broker.parts.directory.create_app("Other", RP_ID, [ORIGIN])
    with pytest.raises(InvalidKey):
        await broker.parts.directory.authorise(mine.id, key)


async def test_users_and_passkeys_of_another_app_are_unknown(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    passkey = await wire.user("ann", device)
    mine = await broker.parts.directory.app(wire.app_id)
    foreign, _ = await broker.parts.directory.create_app("Other", RP_ID, [ORIGIN])
    ann = await broker.parts.directory.user(mine, external_id="ann")
    for look in ({"external_id": "ann"}, {"user_id": ann.id}):
        assert await broker.parts.directory.user(mine, **look) == ann
        with pytest.raises(UnknownUser):
            await broker.parts.directory.user(foreign, **look)
    with pytest.raises(UnknownPasskey):
        await broker.parts.directory.revoke(foreign, ann, passkey)
    with pytest.raises(UnknownUser):
        await broker.parts.directory.delete_user(foreign, "ann")
    assert await broker.parts.directory.credentials(foreign, ann) == []
    assert [c.id for c in await broker.parts.directory.credentials(mine, ann)] == [passkey]
    assert await broker.events(foreign.id) == [("app.created", "done", None)]
