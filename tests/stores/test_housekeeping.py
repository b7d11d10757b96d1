"""The periodic clean-up, on a database of the test's own, with the clock moved and a pass called by
hand.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

import asyncpg
import pytest

from broker.durable import Durable, Postgres, housekeeping, instant
from broker.durable.housekeeping import BATCH, Housekeeping
from broker.embedded import EmbeddedStores
from broker.model import Approval, RelyingParty, Unowned
from broker.telemetry import CONTEXT, Context, Log
from tests.conftest import Starter
from tests.stores.test_durable import MINT, NOW, add, ensure, new_app, verified
from tests.stores.test_durable import pending as pending_of
from tests.support.servers import database_of, eventually, pool

HOLD = 4242  # the advisory lock at which a statement is held
Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass(slots=True)
class House:
    """A database, its clean-up, and what a test looks at."""

    postgres: Postgres
    durable: Durable
    session: Session
    now: list[float] = field(default_factory=lambda: [NOW.timestamp()])
    stream: io.StringIO = field(default_factory=io.StringIO)

    def keeping(self, days: int = 90) -> Housekeeping:
        return Housekeeping(
            self.postgres,
            retention_days=days,
            metrics=self.postgres._metrics,
            log=Log(self.stream),
            clock=lambda: self.now[0],
        )

    def pass_time(self, **period: float) -> None:
        self.now[0] += timedelta(**period).total_seconds()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def metric(self, name: str, chore: str) -> float:
        found = self.postgres._metrics.registry.get_sample_value(
            f"broker_housekeeping_{name}_total", {"chore": chore}
        )
        return found or 0.0

    async def fill(self, app: RelyingParty, number: int) -> None:
        """So many events of this moment."""
        await self.session.execute(
            "INSERT INTO events (at, app_id, actor, action, result, request_id)"
            " SELECT $1, $2, 'test', 'old', 'done', '' FROM generate_series(1, $3::int)",
            instant(self.now[0]),
            app.id,
            number,
        )

    async def kept(self) -> list[tuple[str, int]]:
        rows = await self.session.fetch(
            "SELECT action, count(*) FROM events GROUP BY action ORDER BY action"
        )
        return [(row[0], row[1]) for row in rows]


@pytest.fixture
async def house(stores: EmbeddedStores, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(housekeeping, "_REST", 0)
    monkeypatch.setattr(housekeeping, "_SHORTEST_REST", 0)
    async with database_of(stores) as url:
        made = pool(url)
        await made.open()
        await made.migrate(NOW)
        session = await asyncpg.connect(url)
        yield House(made, Durable(made), session)
        await session.close()
        await made.close()


# -- events ----------------------------------------------------------------------------------------


async def test_events_end_with_the_retention(house: House) -> None:
    """At the boundary: what is exactly as old as the retention stays. Of every app, also of one
    that was deleted.
    """
    app, gone = await new_app(house.durable), await new_app(house.durable)
    await house.fill(app, 3)
    await house.durable.apps.delete(gone.id, NOW)
    keeping = house.keeping(90)
    house.pass_time(days=90)
    await house.fill(app, 2)
    assert await keeping.clean() == {}
    assert await house.kept() == [("app.created", 2), ("app.deleted", 1), ("old", 5)]
    house.pass_time(seconds=0.001)
    assert await keeping.clean() == {"events": 6}
    assert await house.kept() == [("old", 2)]
    assert house.metric("rows", "events") == 6
    [line] = [line for line in house.lines if line["event"] == "housekeeping"]
    assert line["rows"] == {"events": 6}


async def test_a_batch_is_small_and_a_statement_of_its_own(house: House) -> None:
    app = await new_app(house.durable)
    await house.session.execute(
        "CREATE TABLE batches (rows bigint, moment bigint);"
        "CREATE FUNCTION batch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO batches SELECT count(*), pg_current_xact_id()::text::bigint FROM gone;"
        " RETURN NULL; END $$;"
        "CREATE TRIGGER batch AFTER DELETE ON events"
        " REFERENCING OLD TABLE AS gone EXECUTE FUNCTION batch()"
    )
    await house.fill(app, 2 * BATCH + 500)
    house.pass_time(days=91)
    await house.fill(app, 10)
    assert await house.keeping().clean() == {"events": 2 * BATCH + 501}
    batches = await house.session.fetch(
        "SELECT rows, moment FROM batches WHERE rows > 0 ORDER BY moment"
    )
    assert [row["rows"] for row in batches] == [BATCH, BATCH, 501]
    assert len({row["moment"] for row in batches}) == 3, "each in a transaction of its own"
    assert await house.kept() == [("old", 10)]


async def test_without_a_retention_events_stay(house: House) -> None:
    await house.fill(await new_app(house.durable), 3)
    house.pass_time(days=40_000)
    assert await house.keeping(0).clean() == {}
    assert await house.kept() == [("app.created", 1), ("old", 3)]


async def test_old_events_behind_one_of_a_clock_ahead_end_as_well(house: House) -> None:
    app = await new_app(house.durable)
    house.pass_time(days=3)
    await house.fill(app, 1)
    house.pass_time(days=-3)
    await house.fill(app, 5)
    house.pass_time(days=91)
    assert await house.keeping().clean() == {"events": 6}
    assert await house.kept() == [("old", 1)]


# -- passkeys that were never confirmed ------------------------------------------------------------


async def state(house: House, user_id: str) -> str | None:
    found: str | None = await house.session.fetchval(
        "SELECT status FROM users WHERE id = $1", user_id
    )
    return found


async def actions(house: House, app: RelyingParty) -> list[tuple[str, str | None, str | None]]:
    return [
        (e.action, e.user_id, e.passkey_id)
        for e in await Durable(house.postgres).events.newest(app.id, limit=1000)
    ]


async def test_a_passkey_that_can_not_be_confirmed_any_more_ends(house: House) -> None:
    """At the boundary: its nonce lives 10 minutes at most, and instances' clocks differ by less
    than one.
    """
    app = await new_app(house.durable)
    pending, active = [await ensure(house.durable, app, name) for name in ("pending", "active")]
    mine = await add(house.durable, app, pending, b"1", live=False)
    other = await add(house.durable, app, active, b"2", live=False)
    stays = await add(house.durable, app, active, b"3")
    confirmed = await add(house.durable, app, active, b"4", live=False)
    assert await house.durable.ceremonies.confirm(app.id, confirmed.id, 0, NOW)
    keeping = house.keeping()
    house.pass_time(seconds=660)
    assert await keeping.clean() == {}
    house.pass_time(seconds=0.001)
    assert await keeping.clean() == {"unconfirmed_passkeys": 2}
    assert house.metric("rows", "unconfirmed_passkeys") == 2
    assert not await house.durable.ceremonies.confirm(app.id, mine.id, 0, NOW)
    assert {c.id for c in await house.durable.credentials.of_user(app.id, active)} == {
        stays.id,
        confirmed.id,
    }
    assert await house.durable.credentials.of_user(app.id, pending) == []
    assert [await state(house, user) for user in (pending, active)] == ["pending", "active"]
    assert sorted((await actions(house, app))[-2:]) == sorted(
        [("passkey.expired", pending, mine.id), ("passkey.expired", active, other.id)]
    )


async def test_a_user_whose_last_passkey_ends_is_pending_again(house: House) -> None:
    app = await new_app(house.durable)
    user = await ensure(house.durable, app, "ann")
    first = await add(house.durable, app, user, b"1")
    await add(house.durable, app, user, b"2", live=False)
    assert await house.durable.credentials.revoke(app.id, user, [first.id], NOW) == [first.id]
    assert await state(house, user) == "active"
    house.pass_time(minutes=12)
    assert await house.keeping().clean() == {"unconfirmed_passkeys": 1}
    assert await state(house, user) == "pending"


async def test_a_user_without_a_name_ends_with_its_passkey(house: House) -> None:
    app = await new_app(house.durable)
    nobody = MINT.id()
    outcome = await house.durable.ceremonies.add(
        pending_of(app, nobody, subject=Unowned(nobody)),
        verified(b"1"),
        new_id=MINT.id(),
        live=False,
        now=NOW,
    )
    assert (outcome, await state(house, nobody)) == ("added", "pending")
    house.pass_time(minutes=12)
    assert await house.keeping().clean() == {"unconfirmed_passkeys": 1}
    assert await state(house, nobody) is None


async def test_a_passkey_in_somebody_elses_hands_is_passed_over(house: House) -> None:
    """It is confirmed at this moment, late by the clocks: the clean-up waits for nobody and judges
    by what is committed.
    """
    app = await new_app(house.durable)
    user = await ensure(house.durable, app, "ann")
    held, free = [await add(house.durable, app, user, name, live=False) for name in (b"1", b"2")]
    house.pass_time(minutes=12)
    async with house.session.transaction():
        await house.session.execute("UPDATE credentials SET live = true WHERE id = $1", held.id)
        other = await ensure(house.durable, app, "ben")
        third = await add(house.durable, app, other, b"3", live=False)
        assert await house.keeping().clean() == {"unconfirmed_passkeys": 2}, (free, third)
    assert await house.keeping().clean() == {}
    assert [c.id for c in await house.durable.credentials.of_user(app.id, user)] == [held.id]
    assert house.metric("failures", "unconfirmed_passkeys") == 0


# -- users who never got a passkey -----------------------------------------------------------------


async def test_a_user_who_never_got_a_passkey_ends_a_day_later(house: House) -> None:
    """At the boundary, from the last time that a registration was opened. Who has anything
    stays.
    """
    app = await new_app(house.durable)
    names = ("once", "again", "passkey", "approval", "logins", "active")
    once, again, with_passkey, with_approval, with_logins, active = [
        await ensure(house.durable, app, name) for name in names
    ]
    approval = Approval("payment", "{}", b"")
    assert await house.durable.approvals.add(
        app.id, with_approval, approval, new_id=MINT.id(), now=NOW
    )
    await house.session.execute("UPDATE users SET past_logins = 1 WHERE id = $1", with_logins)
    await add(house.durable, app, active, b"1")
    keeping = house.keeping()
    house.pass_time(hours=23)
    assert await ensure(house.durable, app, "again", instant(house.now[0])) == again
    house.pass_time(hours=1)
    await add(house.durable, app, with_passkey, b"2", live=False, now=instant(house.now[0]))
    assert await keeping.clean() == {}
    house.pass_time(seconds=0.001)
    assert await keeping.clean() == {"pending_users": 1}
    users, _ = await Durable(house.postgres).users.page(app.id, limit=10)
    assert {user.external_id for user in users} == set(names) - {"once"}
    assert house.metric("rows", "pending_users") == 1
    assert (await actions(house, app))[-1] == ("user.expired", once, None)
    house.pass_time(hours=23)
    assert await keeping.clean() == {"unconfirmed_passkeys": 1, "pending_users": 2}
    users, _ = await Durable(house.postgres).users.page(app.id, limit=10)
    assert {user.external_id for user in users} == {"approval", "logins", "active"}


async def test_of_a_user_who_ended_events_keep_our_ids_alone(house: House) -> None:
    app = await new_app(house.durable)
    token = CONTEXT.set(Context("chosen-by-ann", "key:k"))
    try:
        user = await ensure(house.durable, app, "ann")
    finally:
        CONTEXT.reset(token)
    house.pass_time(days=2)
    assert await house.keeping().clean() == {"pending_users": 1}
    events = await Durable(house.postgres).events.newest(app.id, limit=10)
    assert [(e.action, e.user_id, e.request_id) for e in events[1:]] == [
        ("user.created", user, ""),
        ("user.expired", user, ""),
    ]
    assert await ensure(house.durable, app, "ann") != user


async def test_a_user_before_the_column_was_there_ends_by_its_age(house: House) -> None:
    app = await new_app(house.durable)
    await ensure(house.durable, app, "ann")
    await house.session.execute("UPDATE users SET opened_at = NULL")
    house.pass_time(hours=24)
    assert await house.keeping().clean() == {}
    house.pass_time(seconds=1)
    assert await house.keeping().clean() == {"pending_users": 1}


async def held(house: House, when: str) -> None:
    """From now on a statement that does this to a row is held there, with its locks, as long as the
    test has the advisory lock.
    """
    await house.session.execute(
        "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM pg_advisory_xact_lock_shared({HOLD}); RETURN coalesce(NEW, OLD); END $$;"
        f"CREATE TRIGGER hold {when} FOR EACH ROW EXECUTE FUNCTION hold()"
    )
    await house.session.execute("SELECT pg_advisory_lock($1)", HOLD)


async def waits(house: House, kind: str, task: asyncio.Task[Any]) -> None:
    while not await house.session.fetchval(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = $1", kind
    ):
        assert not task.done(), task
        await asyncio.sleep(0.005)  # between two looks


@pytest.mark.parametrize("together", [1, 2])
async def test_who_opens_while_the_user_ends_has_a_user(house: House, together: int) -> None:
    """The clean-up deletes the user and is held open; whoever opens a registration waits, and has
    another user then.
    """
    app = await new_app(house.durable)
    old = await ensure(house.durable, app, "ann")
    house.pass_time(days=2)
    await held(house, "BEFORE DELETE ON users")
    cleaning = asyncio.create_task(house.keeping().clean())
    await waits(house, "advisory", cleaning)
    names = ["ann", "ben"][:together]
    opening = [
        asyncio.create_task(ensure(house.durable, app, n, instant(house.now[0]))) for n in names
    ]
    await waits(house, "transactionid", opening[0])
    await house.session.execute("SELECT pg_advisory_unlock($1)", HOLD)
    assert await cleaning == {"pending_users": 1}
    new, *_ = await asyncio.gather(*opening)
    assert new != old
    assert [await state(house, user) for user in (old, new)] == [None, "pending"]
    assert await house.keeping().clean() == {}
    assert await add(house.durable, app, new, b"1")


async def test_the_clean_up_passes_over_who_opens_at_this_moment(house: House) -> None:
    """Opened, and not yet committed."""
    app = await new_app(house.durable)
    user = await ensure(house.durable, app, "ann")
    house.pass_time(days=2)
    async with house.session.transaction():
        await house.session.execute("UPDATE users SET opened_at = $1", instant(house.now[0]))
        assert await house.keeping().clean() == {}
    assert await house.keeping().clean() == {}
    assert await state(house, user) == "pending"


async def test_a_registration_that_finishes_at_this_moment_keeps_its_user(house: House) -> None:
    """Opened by code that does not say so: the passkey is added, and not yet committed."""
    app = await new_app(house.durable)
    user = await ensure(house.durable, app, "ann")
    house.pass_time(days=2)
    await held(house, "AFTER INSERT ON credentials")
    adding = asyncio.create_task(add(house.durable, app, user, b"1", now=instant(house.now[0])))
    await waits(house, "advisory", adding)
    assert await house.keeping().clean() == {}
    await house.session.execute("SELECT pg_advisory_unlock($1)", HOLD)
    key = await adding
    assert await house.keeping().clean() == {}
    assert [c.id for c in await house.durable.credentials.of_user(app.id, user)] == [key.id]
    assert await state(house, user) == "active"


async def test_a_registration_whose_user_ends_at_this_moment_is_refused(house: House) -> None:
    app = await new_app(house.durable)
    user = await ensure(house.durable, app, "ann")
    house.pass_time(days=2)
    await held(house, "BEFORE DELETE ON users")
    cleaning = asyncio.create_task(house.keeping().clean())
    await waits(house, "advisory", cleaning)
    adding = asyncio.create_task(
        house.durable.ceremonies.add(
            pending_of(app, user),
            verified(b"1"),
            new_id=MINT.id(),
            live=True,
            now=instant(house.now[0]),
        )
    )
    await waits(house, "transactionid", adding)
    await house.session.execute("SELECT pg_advisory_unlock($1)", HOLD)
    assert await cleaning == {"pending_users": 1}
    assert await adding == "no_user"


# -- how it goes about it --------------------------------------------------------------------------


async def test_one_instance_works_at_a_time(house: House) -> None:
    """The second one comes while a batch of the first is held open, and leaves the work to it."""
    await house.fill(await new_app(house.durable), 5)
    house.pass_time(days=91)
    async with house.session.transaction():
        await house.session.execute("LOCK TABLE events IN SHARE MODE")
        first = asyncio.create_task(house.keeping().clean())
        waiting = (
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'events'::regclass"
        )
        while not await house.session.fetchval(waiting):
            assert not first.done()
            await asyncio.sleep(0.005)  # between two looks
        assert await house.keeping().clean() == {}
        assert not first.done()
    assert await first == {"events": 6}
    assert house.metric("failures", "events") == 0


async def test_a_batch_that_fails_is_counted_and_the_next_one_is_smaller(house: House) -> None:
    await house.fill(await new_app(house.durable), BATCH)
    house.pass_time(days=91)
    keeping = house.keeping()
    house.postgres._timeout = 0.2
    async with house.session.transaction():
        await house.session.execute("LOCK TABLE events IN SHARE MODE")
        assert await keeping.clean() == {}
    house.postgres._timeout = 5.0
    assert house.metric("failures", "events") == 1
    failed = [line for line in house.lines if line["event"] == "housekeeping_failed"]
    assert ("events", "postgres") in [(line["chore"], line["reason"]) for line in failed]
    assert keeping._sizes["events"] == BATCH // 2
    assert await keeping.clean() == {"events": BATCH + 1}
    assert keeping._sizes["events"] == BATCH


async def test_an_instance_that_hangs_in_a_batch_does_not_keep_its_locks(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_IDLE", 0.05)
    keeping, resumed = house.keeping(), asyncio.Event()

    async def hang(connection: Any, *_: object) -> housekeeping._Batch:
        await connection.execute("LOCK TABLE events")
        await resumed.wait()
        return housekeeping._Batch(0, more=False)

    keeping._chores = {"events": hang}
    batch = asyncio.create_task(keeping.clean())
    held = "SELECT count(*) FROM pg_locks WHERE relation = 'events'::regclass AND granted"
    while not await house.session.fetchval(held):
        assert not batch.done()
        await asyncio.sleep(0.005)  # between two looks
    await new_app(house.durable)  # waits for the lock
    resumed.set()
    assert await batch == {}
    assert house.metric("failures", "events") == 1


async def test_a_defect_of_a_chore_is_told_and_ends_no_other_chore(house: House) -> None:
    await house.fill(await new_app(house.durable), 5)
    house.pass_time(days=91)
    keeping = house.keeping()

    async def defective(*_: object) -> housekeeping._Batch:
        raise KeyError("secret")

    keeping._chores["pending_users"] = defective
    assert await keeping.clean() == {"events": 6}
    assert house.metric("failures", "pending_users") == 1
    (told,) = [line for line in house.lines if line["event"] == "defect"]
    assert (told["chore"], told["error"]) == ("pending_users", "KeyError")
    assert "secret" not in house.stream.getvalue()


async def test_a_broker_cleans_up_by_its_setting(
    house: House, start_broker: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running instance makes passes without being asked, with its own clock and retention."""
    monkeypatch.setattr(housekeeping, "EVERY", 0.01)
    await house.fill(await new_app(house.durable), 5)
    broker = await start_broker(database_url=house.postgres._url, event_retention_days=7)
    await eventually(
        lambda: broker.metric("broker_housekeeping_rows_total", chore="events") == 6,
        "events are deleted",
    )
    await broker.service.close()
    assert broker.parts.housekeeping._task is not None
    assert broker.parts.housekeeping._task.cancelled()
