"""What lets look-ups be remembered for long: notifications that empty the memory, and the proof
that they come.

The promise is that a change is effective on every instance within one second, whatever becomes of
the connection that listens. The connections are real, and so is what befalls them: a proxy that
swallows, a server process that is stopped, a session that is ended. A look-up is *lasting* when it
was asked for less than `LONGEST` but more than `SECONDS` ago and the store is not asked again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from broker.app import assemble
from broker.durable.notifications import CHANNEL, Notifications
from broker.durable.remembered import LONGEST, News, Remembered
from broker.embedded import EmbeddedStores
from broker.errors import InvalidKey, UnknownApp
from broker.model import Policy, RelyingParty
from broker.telemetry import Log, Metrics
from tests.conftest import Started, Starter, settings_for
from tests.support.processes import DEADLINE, free_port
from tests.support.proxy import PostgresProxy, postgres_proxy
from tests.support.servers import connect_postgres, eventually, kill, revive, session_of
from tests.support.waited import Waited
from tests.support.wire import ORIGIN, RP_ID

SECONDS = 0.9
WITHIN = 1.0  # second: the promise


@dataclass(frozen=True, slots=True)
class Instance:
    """A broker that remembers, and an app with a key that it has looked up."""

    broker: Started
    app: RelyingParty
    key_id: str
    key: str

    @property
    def news(self) -> News:
        return self.broker.parts.notifications.news

    @property
    def pid(self) -> int:
        """The server's process that listens for this instance."""
        session = self.broker.parts.notifications._session
        assert session is not None, "no session"
        return int(session.get_server_pid())

    def asked(self, operation: str) -> float:
        return self.broker.metric(
            "broker_store_seconds_count", store="postgres", operation=operation
        )

    async def look(self) -> tuple[str, str]:
        """What it takes for the app's name, and for the key's id."""
        directory = self.broker.parts.directory
        return (await directory.app(self.app.id)).name, await directory.authorise(
            self.app.id, self.key
        )

    async def proof(self) -> None:
        """Wait for a proof that is younger than this call."""
        since = self.broker.clock()
        await eventually(lambda: self.news.proven >= since, "a proof")

    async def lasting(self) -> None:
        """Bring its look-ups to where only a notification or the end of proofs ends them."""
        await self.look()
        await self.proof()
        self.broker.clock.ahead += SECONDS
        await self.look()  # the first that are made while it listens
        self.broker.clock.ahead += SECONDS
        await self.proof()
        with self.not_asking():
            await self.look()

    @contextmanager
    def not_asking(self) -> Iterator[None]:
        """Inside, the store is not asked for the app or the key."""
        before = self.asked("app"), self.asked("key")
        yield
        assert (self.asked("app"), self.asked("key")) == before

    async def heard_of(self, change: Awaitable[Any]) -> None:
        """Make a change and wait until this instance has heard of something."""
        count = self.news.count
        await change
        await eventually(lambda: self.news.count > count, "a notification")

    async def refused_within(self, revoked: float) -> None:
        """The key is refused at last, and in time; `revoked` is when it was revoked, by the
        monotonic clock.
        """
        directory = self.broker.parts.directory
        while True:
            began = time.monotonic()
            try:
                await directory.authorise(self.app.id, self.key)
            except InvalidKey:
                return
            assert began - revoked < WITHIN, "a revoked key was accepted"
            await asyncio.sleep(0.005)  # between two looks

    def lines(self, event: str) -> list[str | None]:
        """The reasons of the lines logged under that name."""
        return [line.get("reason") for line in self.broker.log if line["event"] == event]


Start = Callable[..., Awaitable[Instance]]


@pytest.fixture
def start(start_broker: Starter) -> Start:
    """Start a broker with an app and a key of its own, not looked up yet."""

    async def made(stores: EmbeddedStores | None = None, **changes: object) -> Instance:
        broker = await start_broker(stores, **{"cache_seconds": SECONDS, **changes})
        app, _ = await broker.parts.directory.create_app("Old", RP_ID, [ORIGIN])
        key, secret = await broker.parts.directory.create_key(app.id, "second")
        return Instance(broker, app, key.id, secret)

    return made


@pytest.fixture
async def one(start: Start) -> Instance:
    return await start()


@pytest.fixture
async def other(start_broker: Starter) -> Started:
    """Another instance, which makes the changes."""
    return await start_broker()


@pytest.fixture
async def proxy(stores: EmbeddedStores) -> AsyncIterator[PostgresProxy]:
    async with postgres_proxy(lambda: connect_postgres(stores)) as made:
        yield made


# -- while notifications come ----------------------------------------------------------------------


async def test_the_store_is_not_asked_again(one: Instance) -> None:
    await one.lasting()
    with one.not_asking():
        for _ in range(5):
            one.broker.clock.ahead += 10
            await one.proof()
            assert await one.look() == ("Old", one.key_id)
    before = one.asked("app"), one.asked("key")
    one.broker.clock.ahead += LONGEST - 50
    await one.proof()
    await one.look()
    assert (one.asked("app"), one.asked("key")) == (before[0] + 1, before[1] + 1), (
        "in the end it is"
    )


async def test_without_a_proof_it_is_asked_in_time(one: Instance) -> None:
    await one.lasting()
    before = one.asked("app"), one.asked("key")
    one.broker.clock.ahead += SECONDS  # no proof is that young
    await one.look()
    assert (one.asked("app"), one.asked("key")) == (before[0] + 1, before[1] + 1)


async def test_a_policy_changed_by_another_instance(one: Instance, other: Started) -> None:
    await one.lasting()
    changed = replace(one.app, name="New", policy=Policy(nonce_life=30))
    await one.heard_of(other.parts.directory.update_app(changed))
    app = await one.broker.parts.directory.app(one.app.id)
    assert (app.name, app.policy.nonce_life) == ("New", 30)


async def test_a_key_revoked_by_another_instance(one: Instance, other: Started) -> None:
    await one.lasting()
    await one.heard_of(other.parts.directory.revoke_key(one.app.id, one.key_id))
    with pytest.raises(InvalidKey):
        await one.broker.parts.directory.authorise(one.app.id, one.key)


async def test_a_key_revoked_by_the_instance_itself(one: Instance) -> None:
    await one.lasting()
    await one.heard_of(one.broker.parts.directory.revoke_key(one.app.id, one.key_id))
    with pytest.raises(InvalidKey):
        await one.broker.parts.directory.authorise(one.app.id, one.key)


async def test_only_what_changed_is_asked_again(start: Start, other: Started) -> None:
    one = await start()
    await one.lasting()
    bystander, _ = await other.parts.directory.create_app("Bystander", RP_ID, [ORIGIN])
    await one.heard_of(other.parts.directory.update_app(replace(bystander, name="Changed")))
    with one.not_asking():
        await one.look()


BY_HAND = {
    "renamed": "UPDATE relying_parties SET name = 'New' WHERE id = $1",
    "revoked": "UPDATE api_keys SET revoked_at = now() WHERE app_id = $1",
    "moved": "UPDATE api_keys SET hash = sha256(hash) WHERE app_id = $1",
    "no key": "DELETE FROM api_keys WHERE app_id = $1",
    "no app": "DELETE FROM relying_parties WHERE id = $1",
}


@pytest.mark.parametrize("role", ["origin", "replica", "local"])
@pytest.mark.parametrize("what", BY_HAND)
async def test_a_change_by_hand(
    one: Instance, stores: EmbeddedStores, what: str, role: str
) -> None:
    """With psql, and in a session that other triggers keep out of."""
    await one.lasting()
    directory = one.broker.parts.directory
    async with session_of(stores) as session:
        await session.execute(f"SET session_replication_role = {role}")
        await one.heard_of(session.execute(BY_HAND[what], one.app.id))
    if what == "renamed":
        assert await one.look() == ("New", one.key_id)
    elif what == "no app":
        with pytest.raises(UnknownApp):
            await directory.app(one.app.id)
    if what != "renamed" and (what, role) != ("no app", "replica"):  # where nothing cascades
        with pytest.raises(InvalidKey):
            await directory.authorise(one.app.id, one.key)


async def test_everything_emptied_by_hand(start: Start, own_stores: EmbeddedStores) -> None:
    one = await start(own_stores)
    await one.lasting()
    async with session_of(own_stores) as session:
        await one.heard_of(session.execute("TRUNCATE relying_parties CASCADE"))
    directory = one.broker.parts.directory
    with pytest.raises(UnknownApp):
        await directory.app(one.app.id)
    with pytest.raises(InvalidKey):
        await directory.authorise(one.app.id, one.key)


async def test_a_change_that_is_rolled_back_is_none(one: Instance, stores: EmbeddedStores) -> None:
    await one.lasting()
    count = one.news.count
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        await session.execute(BY_HAND["revoked"], one.app.id)
        await change.rollback()
    await one.proof()
    assert one.news.count == count


async def test_signing_keys_that_another_instance_rotates(one: Instance, other: Started) -> None:
    """A further algorithm, a rotation, and the broker's own set."""
    signing, keys = one.broker.parts.signing, other.parts.signing

    async def kids(app: RelyingParty | None) -> set[str]:
        return {str(key["kid"]) for key in (await signing.key_set(app, "ES256"))["keys"]}

    await one.lasting()
    for app in (one.app, None):
        await kids(app)  # makes the first
        await one.proof()  # and hears of it
        one.broker.clock.ahead += SECONDS
        first = await kids(app)
        one.broker.clock.ahead += SECONDS
        await one.proof()
        asked = one.asked("signing_keys")
        assert await kids(app) == first
        assert one.asked("signing_keys") == asked, "lasting"
        await one.heard_of(keys.rotate(app, "ES256"))
        assert len(await kids(app)) == len(first) + 1


async def test_what_is_not_from_a_trigger_of_ours_harms_nobody(
    one: Instance, stores: EmbeddedStores
) -> None:
    await one.lasting()
    async with session_of(stores) as session:
        for payload in (
            "",
            " ",
            "api_keys zz",
            "api_keys",
            "relying_parties \x1f",
            "else 1",
            "x" * 7999,
        ):
            await one.heard_of(session.execute("SELECT pg_notify($1, $2)", CHANNEL, payload))
    await one.proof()
    assert await one.look() == ("Old", one.key_id)
    assert {line["event"] for line in one.broker.log} <= {"request", "library"}
    assert not one.lines("library")


# -- what a proof proves ---------------------------------------------------------------------------


async def test_an_answer_comes_behind_every_notification(one: Instance, other: Started) -> None:
    """The listening process is stopped, the change is made, and then the question sent; so it meets
    both at the same moment.
    """
    await one.lasting()
    notifications = one.broker.parts.notifications
    app = one.app
    for number in range(20):
        os.kill(one.pid, signal.SIGSTOP)
        try:
            name = f"Name {number}"
            app = await asyncio.wait_for(
                other.parts.directory.update_app(replace(app, name=name)), DEADLINE
            )
            count = one.news.count
            asking = asyncio.create_task(
                notifications._postgres.run("listen", notifications._prove)
            )
            await asyncio.sleep(
                0
            )  # it sends its question, or stands in line behind one that was sent
        finally:
            os.kill(one.pid, signal.SIGCONT)
        await asking
        assert one.news.count > count
        assert (await one.look())[0] == name


async def test_a_late_answer_proves_no_more_than_what_was_when_it_was_asked_for(
    one: Instance,
) -> None:
    await one.lasting()
    os.kill(one.pid, signal.SIGSTOP)
    try:
        postgres = one.broker.parts.notifications._postgres
        await eventually(lambda: bool(postgres._busy), "a question without an answer")
        before, asked = one.news.proven, one.broker.clock()
        one.broker.clock.ahead += 5
    finally:
        os.kill(one.pid, signal.SIGCONT)
    await eventually(lambda: one.news.proven > before, "the proof")
    assert one.news.proven <= asked


async def test_a_look_up_answered_before_the_change_and_put_after_it(
    start: Start, other: Started, proxy: PostgresProxy
) -> None:
    """Its answer is held until the notification has come. It may be used for as long as without
    notifications, and no longer.
    """
    one = await start(database_url=proxy.url)
    await one.lasting()
    directory = one.broker.parts.directory
    directory._keys.forget(bytes.fromhex(await _hash(other, one)))
    proxy.holding = True
    looking = asyncio.create_task(directory.authorise(one.app.id, one.key))
    await proxy.held.wait()
    await one.heard_of(other.parts.directory.revoke_key(one.app.id, one.key_id))
    assert not looking.done()
    proxy.holding = False
    proxy.release.set()
    assert await looking == one.key_id
    one.broker.clock.ahead += SECONDS
    await one.proof()
    with pytest.raises(InvalidKey):
        await directory.authorise(one.app.id, one.key)


async def _hash(broker: Started, one: Instance) -> str:
    row = await broker.parts.postgres.row(
        "test", "SELECT encode(hash, 'hex') AS hash FROM api_keys WHERE id = $1", one.key_id
    )
    assert row is not None
    return str(row["hash"])


async def test_a_look_up_from_before_it_listened_does_not_last(
    one: Instance, other: Started
) -> None:
    await one.look()
    await one.proof()
    one.broker.clock.ahead += SECONDS
    await one.proof()
    before = one.asked("app")
    await one.look()
    assert one.asked("app") == before + 1


async def test_a_change_just_before_it_listens(
    start: Start, other: Started, proxy: PostgresProxy
) -> None:
    """The connection is there and LISTEN under way; a look-up made then does not last, for nobody
    will tell of the change.
    """
    proxy.late = True
    one = await start(database_url=proxy.url)
    await one.look()
    await proxy.held.wait()
    one.broker.clock.ahead += SECONDS
    await one.look()
    await other.parts.directory.revoke_key(one.app.id, one.key_id)
    proxy.release.set()
    await one.proof()
    one.broker.clock.ahead += SECONDS
    await one.proof()
    with pytest.raises(InvalidKey):
        await one.look()


async def test_a_clock_set_back_ends_the_memory(one: Instance, other: Started) -> None:
    await one.lasting()
    before = one.asked("app"), one.asked("key")
    one.broker.clock.ahead -= 3600
    await one.proof()
    await one.look()
    assert (one.asked("app"), one.asked("key")) == (before[0] + 1, before[1] + 1)


# -- when the connection is lost -------------------------------------------------------------------


async def test_a_connection_that_went_silent(
    start: Start, other: Started, proxy: PostgresProxy
) -> None:
    """The network swallows what either side sends; neither side is told."""
    one = await start(database_url=proxy.url)
    await one.lasting()
    proxy.deaf = True
    await other.parts.directory.revoke_key(one.app.id, one.key_id)
    await one.refused_within(time.monotonic())
    await eventually(lambda: one.lines("notifications_lost") == ["postgres"], "a line that says so")
    assert (
        one.broker.metric("broker_store_failures_total", store="postgres", operation="listen") > 0
    )
    proxy.recover()
    await eventually(lambda: one.lines("notifications_heard") == [None], "a line that it is over")
    await works_again(one, other)


async def works_again(one: Instance, other: Started) -> None:
    """A fresh key is remembered for long, and forgotten when it is revoked."""
    key, secret = await other.parts.directory.create_key(one.app.id, "third")
    one = replace(one, key_id=key.id, key=secret)
    await one.lasting()
    await one.heard_of(other.parts.directory.revoke_key(one.app.id, key.id))
    with pytest.raises(InvalidKey):
        await one.look()


async def test_a_server_process_that_stopped(one: Instance, other: Started) -> None:
    await one.lasting()
    pid = one.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        await other.parts.directory.revoke_key(one.app.id, one.key_id)
        await one.refused_within(time.monotonic())
        await eventually(
            lambda: one.lines("notifications_lost") == ["postgres"], "a line that says so"
        )
        await works_again(one, other)
        assert one.pid != pid
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_change_while_the_connection_is_cut(
    start: Start, other: Started, proxy: PostgresProxy
) -> None:
    """Nobody tells of it afterwards; what was remembered before is no longer trusted."""
    one = await start(database_url=proxy.url)
    await one.lasting()
    proxy.deaf = True  # until the change is made, the next connection is not heard on either
    proxy.cut_listeners()
    await other.parts.directory.revoke_key(one.app.id, one.key_id)
    revoked = time.monotonic()
    proxy.recover()
    await one.refused_within(revoked)
    await one.proof()
    with pytest.raises(InvalidKey):
        await one.look()
    await works_again(one, other)


async def test_a_session_that_the_operator_ends(
    one: Instance, other: Started, stores: EmbeddedStores
) -> None:
    await one.lasting()
    pid = one.pid
    async with session_of(stores) as session, session.transaction():
        assert await session.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
        await session.execute(BY_HAND["revoked"], one.app.id)
    await one.refused_within(time.monotonic())
    await works_again(one, other)
    assert one.pid != pid


async def test_a_server_that_is_killed_and_comes_back(
    start: Start, own_stores: EmbeddedStores
) -> None:
    one = await start(own_stores)
    await one.lasting()
    kill(own_stores, "PostgreSQL")
    await eventually(lambda: one.lines("notifications_lost") == ["postgres"], "a line that says so")
    revive(own_stores, "PostgreSQL")
    await one.proof()
    await works_again(one, one.broker)
    assert one.lines("notifications_heard") == [None]


async def test_started_before_its_server(
    start_broker: Starter, start: Start, stores: EmbeddedStores
) -> None:
    """No reason not to start; it listens when there is something to listen to."""
    port = free_port()
    lost = await start_broker(
        database_url=f"postgresql://broker@127.0.0.1:{port}/postgres?sslmode=disable",
        cache_seconds=SECONDS,
    )
    one = replace(await start(), broker=lost)
    lost.parts.notifications.news.wanted.set()
    await eventually(lambda: one.lines("notifications_lost") == ["postgres"], "a line that says so")
    async with await asyncio.start_server(_to(stores), "127.0.0.1", port):
        await one.proof()
        await one.lasting()
        await lost.service.close()


def _to(
    stores: EmbeddedStores,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await connect_postgres(stores)
        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    return serve


# -- where nothing can be proven -------------------------------------------------------------------


async def falls_back(one: Instance, other: Started, reason: str) -> None:
    """Remembers as without notifications, and says why, once."""
    await one.look()
    await eventually(lambda: one.asked("listen") > 1, "two tries")
    assert one.lines("notifications_lost") == [reason]
    one.broker.clock.ahead += SECONDS
    before = one.asked("app"), one.asked("key")
    for _ in range(3):
        await one.look()
    assert (one.asked("app"), one.asked("key")) == (before[0] + 1, before[1] + 1)
    await other.parts.directory.revoke_key(one.app.id, one.key_id)
    await one.refused_within(time.monotonic())


async def test_behind_a_pooler(start: Start, other: Started, proxy: PostgresProxy) -> None:
    """Which lends one session to many: that LISTEN and questions are answered there proves
    nothing.
    """
    proxy.pooling = True
    await falls_back(await start(database_url=proxy.url), other, "postgres_pooled")


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE api_keys DISABLE TRIGGER notify_change",
        "ALTER TABLE relying_parties ENABLE REPLICA TRIGGER notify_truncate",
        "DROP FUNCTION notify_change CASCADE",
    ],
)
async def test_without_a_trigger(
    start: Start, start_broker: Starter, own_stores: EmbeddedStores, change: str
) -> None:
    one, other = await start(own_stores), await start_broker(own_stores)
    async with session_of(own_stores) as session:
        await session.execute(change)
    await falls_back(one, other, "postgres_not_migrated")


async def test_a_trigger_that_is_disabled_later(
    start: Start, start_broker: Starter, own_stores: EmbeddedStores
) -> None:
    one, other = await start(own_stores), await start_broker(own_stores)
    await one.lasting()
    async with session_of(own_stores) as session:
        await session.execute("ALTER TABLE api_keys DISABLE TRIGGER ALL")
    await other.parts.directory.revoke_key(one.app.id, one.key_id)
    await one.refused_within(time.monotonic())


async def test_on_a_server_that_does_not_know_what_is_said(
    start: Start, start_broker: Starter, own_stores: EmbeddedStores
) -> None:
    """A relative of Postgres may lack some of it. Here a function is taken away."""
    one, other = await start(own_stores), await start_broker(own_stores)
    async with session_of(own_stores) as session:
        await session.execute(
            "ALTER FUNCTION pg_catalog.pg_listening_channels() RENAME TO pg_other"
        )
    await one.look()
    await eventually(lambda: one.lines("notifications_lost") == ["postgres_no_listen"], "a line")
    await other.parts.directory.revoke_key(one.app.id, one.key_id)
    await one.refused_within(time.monotonic())


async def test_a_command_listens_to_nothing(stores: EmbeddedStores) -> None:
    parts = await assemble(settings_for(stores, cache_seconds=SECONDS))
    try:
        app, _ = await parts.directory.create_app("App", RP_ID, [ORIGIN])
        await parts.directory.app(app.id)
        assert parts.notifications._task is None
    finally:
        await parts.close()


async def test_nothing_is_listened_to_where_nothing_is_remembered(broker: Started) -> None:
    assert broker.parts.notifications._task is None


# -- rest and end ----------------------------------------------------------------------------------


async def test_nothing_is_asked_while_nobody_looks_up(stores: EmbeddedStores) -> None:
    """With no patience at all, each look-up is worth one question; the session stays, so what
    changes at rest is heard of.
    """
    metrics = Metrics()
    resting = Notifications(
        stores.database_url, seconds=SECONDS, timeout=2, metrics=metrics, log=Log(), rest=0.0
    )

    def asked() -> float:
        labels = {"store": "postgres", "operation": "listen"}
        return metrics.registry.get_sample_value("broker_store_seconds_count", labels) or 0.0

    resting.start()
    try:
        await asyncio.sleep(SECONDS / 2)  # that nothing happens is no event
        assert asked() == 0
        for number in (1, 2):
            resting.news.wanted.set()
            await eventually(partial(_is, asked, number), "a question")
            await asyncio.sleep(SECONDS / 2)
            assert asked() == number
        async with session_of(stores) as session:
            count = resting.news.count
            await session.execute("SELECT pg_notify($1, 'else')", CHANNEL)
            await eventually(lambda: resting.news.count > count, "a notification")
    finally:
        await resting.close()


def _is(read: Callable[[], float], number: int) -> bool:
    return read() == number


@pytest.mark.parametrize("how", ["between questions", "in the middle of a question"])
async def test_it_ends_cleanly(start: Start, stores: EmbeddedStores, how: str) -> None:
    one = await start()
    await one.lasting()
    pid, parts = one.pid, one.broker.parts
    if how == "in the middle of a question":
        os.kill(pid, signal.SIGSTOP)
        await eventually(
            lambda: bool(parts.notifications._postgres._busy), "a question without an answer"
        )
    with Waited() as waited:
        await one.broker.service.close()
    assert waited.seconds < 2
    if how == "in the middle of a question":
        os.kill(pid, signal.SIGCONT)
    assert parts.notifications._task is not None
    assert parts.notifications._task.done()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "notifications"]
    async with session_of(stores) as session:
        there = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"
        deadline = time.monotonic() + DEADLINE
        while await session.fetchval(there, pid):
            assert time.monotonic() < deadline, "its session is still there"
            await asyncio.sleep(0.01)  # between two looks
    assert not [line for line in one.broker.log if line["event"] in ("defect", "library")]


# -- the rule, without a store ---------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """A memory with its news and a clock that stands."""

    now: float
    news: News
    memory: Remembered[str]

    @classmethod
    def make(cls) -> Bench:
        news = News()

        def clock() -> float:
            return bench.now

        bench = cls(1000.0, news, Remembered(1.0, clock, news, "t"))
        return bench

    def put(self) -> None:
        self.memory.put("a", "A", self.memory.ask())


def test_a_proof_holds_as_long_as_a_look_up() -> None:
    bench = Bench.make()
    bench.news.restart()
    bench.put()
    for proven, now, held in (
        (1000.5, 1001.4, True),
        (1000.5, 1001.5, False),
        (1030.0, 1030.9, True),
        (1030.0, 1031.0, False),
        (1030.0, 1029.9, False),  # the clock was set back
        (1059.5, 1059.9, True),
        (1059.5, 1060.0, False),  # LONGEST
        (999.5, 999.9, False),  # set back behind the look-up itself
    ):
        bench.news.proven, bench.now = proven, now
        assert (bench.memory.get("a") == "A") is held, (proven, now)


@pytest.mark.parametrize("event", ["change", "other change", "session"])
@pytest.mark.parametrize("when", ["while asking", "afterwards"])
def test_what_ends_a_look_up(event: str, when: str) -> None:
    bench = Bench.make()
    bench.news.restart()
    asked = bench.memory.ask()
    if when == "afterwards":
        bench.memory.put("a", "A", asked)
    if event == "session":
        bench.news.restart()
    else:
        bench.news.hear("t a" if event == "change" else "t b")
    if when == "while asking":
        bench.memory.put("a", "A", asked)
    forgotten = event == "change" and when == "afterwards"
    assert bench.memory.get("a") == (None if forgotten else "A"), "less than a second old"
    bench.now = bench.news.proven = 1002.0
    assert bench.memory.get("a") == (
        "A" if (event, when) == ("other change", "afterwards") else None
    )
