"""Events by month: the migration of a table that is in use, rights, and what the clean-up makes and
drops. Each test has a database of its own.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import TypeAlias
from urllib.parse import quote

import asyncpg
import pytest

from broker.durable import Durable, Postgres, events, migrations, sql_files
from broker.durable.housekeeping import Housekeeping
from broker.embedded import EmbeddedStores
from broker.model import RelyingParty
from broker.telemetry import Log
from broker.tokens import SystemMint
from tests.stores.test_durable import NOW, add, ensure, new_app, signed_in
from tests.stores.test_events import INSERT
from tests.support import seed
from tests.support.load_balancers import DEPLOY
from tests.support.servers import database_of, pool, session_of

BEFORE = 11  # the last migration before those that part events by month
Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@pytest.fixture
async def url(stores: EmbeddedStores) -> AsyncIterator[str]:
    async with database_of(stores) as made:
        yield made


@pytest.fixture
async def opened(url: str) -> AsyncIterator[Postgres]:
    made = pool(url)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    made = await asyncpg.connect(url)
    yield made
    await made.close()


class CleanUp:
    """Passes of the clean-up, with the log lines that they write."""

    def __init__(self, postgres: Postgres, days: int = 90) -> None:
        self._stream, self._postgres, self._days = io.StringIO(), postgres, days

    async def run(self) -> dict[str, int]:
        keeping = Housekeeping(
            self._postgres,
            retention_days=self._days,
            metrics=self._postgres._metrics,
            log=Log(self._stream),
        )
        return await keeping.clean()

    def months(self, event: str) -> list[list[str]]:
        """Of each log line of this event."""
        lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        return [line["months"] for line in lines if line["event"] == event]

    @property
    def failed(self) -> list[str]:
        """The chores of failed batches."""
        lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        return [line["chore"] for line in lines if line["event"] == "housekeeping_failed"]


async def migrate_before(opened: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply the migrations up to `BEFORE`."""
    files = sql_files()[:BEFORE]
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "sql_files", lambda: files)
        await opened.migrate(NOW)


async def all_after(opened: Postgres, app: RelyingParty, page: int) -> list[tuple[int, str]]:
    """The events of an app by the cursor: id and action."""
    found, cursor = [], 0
    while True:
        rows, cursor = await Durable(opened).events.after(app.id, cursor, limit=page)
        found += [(row.event.id, row.event.action) for row in rows]
        if not rows:
            return found


async def partitions(session: Session) -> dict[str, int]:
    """Rows by partition, without empty ones."""
    rows = await session.fetch("SELECT tableoid::regclass::text, count(*) FROM events GROUP BY 1")
    return {row[0]: row[1] for row in rows}


def month(when: datetime) -> str:
    return when.astimezone(UTC).strftime("events_%Y_%m")


# -- the migration ---------------------------------------------------------------------------------


async def test_what_there_was_stays_in_order_and_old_sessions_go_on(
    url: str, opened: Postgres, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of an older instance has prepared its statements before the migration."""
    await migrate_before(opened, monkeypatch)
    durable = Durable(opened)
    app = await new_app(durable)
    old = await asyncpg.connect(url)
    insert, writers = await old.prepare(INSERT), await old.prepare(events._WRITERS)
    for n in range(20):
        await insert.fetchval(app.id, f"before {n}")
    assert await writers.fetch() == []
    before = await all_after(opened, app, 7)
    assert len(before) == 21
    await opened.migrate(NOW)

    assert await all_after(opened, app, 7) == before
    newer = [await insert.fetchval(app.id, f"after {n}") for n in range(3)]
    await durable.events.add(app.id, "new code", result="done", reason=None, now=NOW)
    after = (await all_after(opened, app, 7))[len(before) :]
    assert after[:3] == [(newer[n], f"after {n}") for n in range(3)]
    assert [action for _, action in after[3:]] == ["new code"]
    ids = [number for number, _ in before + after]
    assert ids == sorted(set(ids))
    async with session.transaction():
        await session.fetchval(INSERT, app.id, "held")
        assert len(await writers.fetch()) == 1, "an older reader sees writers of the new table"
    await old.close()


async def test_sign_ins_go_on_while_events_are_parted(
    opened: Postgres, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate_before(opened, monkeypatch)
    durable = Durable(opened)
    app = await new_app(durable)
    passkeys = [
        await add(durable, app, await ensure(durable, app, str(n)), str(n).encode())
        for n in range(4)
    ]
    ended = asyncio.Event()
    begun = asyncio.Semaphore(0)

    async def sign_in_again(number: int) -> int:
        times = 0
        while not ended.is_set():
            used = await durable.ceremonies.use(
                passkeys[number], signed_in(), epoch=0, flag_counter=False, now=NOW
            )
            assert used is not None
            times += 1
            begun.release()
        return times

    people = [asyncio.create_task(sign_in_again(n)) for n in range(4)]
    for _ in range(8):
        await begun.acquire()
    await opened.migrate(NOW)
    ended.set()
    times = sum(await asyncio.gather(*people))
    told = "SELECT count(*) FROM events WHERE action = 'passkey.used'"
    assert await session.fetchval(told) == times


@pytest.mark.parametrize("by", ["grants.sql", "hand"])
async def test_a_role_that_owns_nothing_does_all_that_an_instance_does(
    url: str, stores: EmbeddedStores, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """With the rights of grants.sql, and with those on tables that it had before the migration."""
    name = SystemMint().id().lower()
    owner, service = f"owner_{name}", f"service_{name}"
    grants = (DEPLOY / "grants.sql").read_text()
    grants = grants.replace("broker_owner", owner).replace("broker_service", service)
    async with AsyncExitStack() as stack:
        superuser = await asyncpg.connect(url)
        stack.push_async_callback(superuser.close)
        server = await stack.enter_async_context(session_of(stores))
        for role in (owner, service):
            await server.execute(f"CREATE ROLE {role}")
            stack.push_async_callback(server.execute, f"DROP ROLE {role}")
            stack.push_async_callback(superuser.execute, f"DROP OWNED BY {role} CASCADE")
        opened = {}
        for role in (owner, service):
            opened[role] = pool(f"{url}&options={quote(f'-c role={role}', safe='')}")
            await opened[role].open()
            stack.push_async_callback(opened[role].close)
        if by == "grants.sql":
            await superuser.execute(grants)
        else:
            await superuser.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")
        await migrate_before(opened[owner], monkeypatch)
        if by == "hand":
            await superuser.execute(
                "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES"
                f" IN SCHEMA public TO {service}"
            )
        await opened[owner].migrate(NOW)

        durable = Durable(opened[service])
        app = await new_app(durable)
        user = await ensure(durable, app, "ann")
        await superuser.execute("DROP TABLE " + month(datetime.now(UTC) + timedelta(days=75)))
        await superuser.execute("DROP TABLE events_first")
        await durable.events.add(
            app.id, "x", result="done", reason=None, user_id=user, now=datetime.now(UTC)
        )
        clean_up = CleanUp(opened[service])
        await clean_up.run()
        assert clean_up.failed == []
        assert clean_up.months("event_months_made") != []
        await durable.users.delete(app.id, "ann", NOW)
        assert len(await all_after(opened[service], app, 10)) == 2
        assert await durable.events.months() == {"covered": True, "astray": True}

        await superuser.execute(grants)
        truncated = (
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            f" AND relkind IN ('r', 'p') AND has_table_privilege('{service}', oid, 'TRUNCATE')"
        )
        ledger = [f"one_time_spent_{slot}" for slot in range(4)]
        assert sorted(row["relname"] for row in await superuser.fetch(truncated)) == ledger


# -- months ----------------------------------------------------------------------------------------


async def test_retention_drops_months_and_deletes_what_is_left_of_one(
    opened: Postgres, session: Session
) -> None:
    await opened.migrate(NOW)
    await seed.part_by_month(session, 5)
    app = await new_app(Durable(opened))  # its event is in events_first
    await session.execute(
        "INSERT INTO events (at, app_id, actor, action, result, request_id)"
        " SELECT now() - n * interval '1 day' + interval '1 hour', $1, 'test', n, 'done', ''"
        " FROM generate_series(0, 170) n",
        app.id,
    )
    end = datetime.now(UTC) - timedelta(days=90)
    gone = sorted(name for name in await partitions(session) if name < month(end))
    assert len(gone) in (2, 3)
    left = await session.fetchval(
        "SELECT count(*) FROM events WHERE at < $1 AND tableoid = $2::text::regclass",
        end,
        month(end),
    )
    clean_up = CleanUp(opened)
    assert await clean_up.run() == ({"events": left} if left else {})
    [dropped] = clean_up.months("event_months_dropped")
    assert dropped == ["events_first", *gone]
    assert await session.fetchval("SELECT min(name) FROM event_months") == month(end)
    found = await all_after(opened, app, 50)
    assert [action for _, action in found] == [str(n) for n in range(91)]
    assert await CleanUp(opened, days=0).run() == {}
    assert len(await all_after(opened, app, 50)) == 91


async def test_a_month_that_is_being_read_is_dropped_later(
    opened: Postgres, session: Session
) -> None:
    await opened.migrate(NOW)
    await seed.part_by_month(session, 5)
    clean_up = CleanUp(opened)
    async with session.transaction():
        await session.fetchval("SELECT count(*) FROM events")  # as a dump does
        await clean_up.run()
        assert clean_up.failed == ["old_event_months"]
    await clean_up.run()
    assert len(clean_up.months("event_months_dropped")) == 1


async def test_an_event_outside_all_months_is_kept_and_moves_when_its_month_is_made(
    opened: Postgres, session: Session
) -> None:
    """No instance made months for a long time. One of them has more events than move at once."""
    await opened.migrate(NOW)
    await session.execute("DROP TABLE events_first")
    for (name,) in await session.fetch("SELECT name FROM event_months"):
        await session.execute(f"DROP TABLE {name}")
    durable = Durable(opened)
    assert await durable.events.months() == {"covered": False, "astray": False}
    app = await new_app(durable)
    now = datetime.fromtimestamp(time.time(), UTC)
    await durable.events.add(app.id, "now", result="done", reason=None, now=now)
    full = (now.replace(day=1) + timedelta(days=40)).replace(day=15)
    await session.execute(
        "INSERT INTO events (at, app_id, actor, action, result, request_id)"
        " SELECT $1, 'elsewhere', 'test', 'ahead', 'done', '' FROM generate_series(1, 10001)",
        full,
    )
    before = await all_after(opened, app, 10)
    assert [action for _, action in before] == ["app.created", "now"]
    clean_up = CleanUp(opened, days=0)
    await clean_up.run()
    assert clean_up.failed == []
    [made] = clean_up.months("event_months_made")
    assert month(now) in made
    assert month(full) not in made
    assert await all_after(opened, app, 10) == before
    assert await partitions(session) == {
        month(now): 1,
        "events_default": 10_002,  # and the app, which was made in `NOW`
    }
    assert await durable.events.months() == {"covered": True, "astray": True}
    await clean_up.run()
    assert clean_up.months("event_months_made") == [made]


async def test_a_function_of_another_role_is_not_run(opened: Postgres, session: Session) -> None:
    """In a schema in which every role may create, as `public` was until Postgres 15."""
    await opened.migrate(NOW)
    await seed.part_by_month(session, 5)
    last = await session.fetchval("SELECT name FROM event_months ORDER BY ends DESC LIMIT 1")
    await session.execute(f"DROP TABLE {last}")
    for more in ("text", "text, timestamptz, timestamptz", "timestamptz, timestamptz, text"):
        await session.execute(
            f"CREATE FUNCTION format(text, {more}) RETURNS text LANGUAGE plpgsql"
            " AS 'BEGIN RAISE EXCEPTION ''mine''; END'"
        )
    clean_up = CleanUp(opened)
    await clean_up.run()
    assert clean_up.failed == []
    assert clean_up.months("event_months_made") == [[last]]
    assert len(clean_up.months("event_months_dropped")) == 1


async def test_partitions_of_another_table_are_none_of_events(
    opened: Postgres, session: Session
) -> None:
    """Their bounds need not be times. The plan that reads all of them first may be chosen."""
    database = await session.fetchval("SELECT current_database()")
    await session.execute(f"ALTER DATABASE {database} SET enable_nestloop = off")
    await session.execute(
        "CREATE TABLE others (name text) PARTITION BY RANGE (name);"
        "CREATE TABLE others_a PARTITION OF others FOR VALUES FROM ('a') TO ('m')"
    )
    await opened.migrate(NOW)
    assert await Durable(opened).events.months() == {"covered": True, "astray": False}
    clean_up = CleanUp(opened)
    await clean_up.run()
    assert clean_up.failed == []
    names = await session.fetch("SELECT name FROM event_months ORDER BY ends")
    assert names[0]["name"] == "events_first"
    assert all(row["name"].startswith("events_") for row in names)


async def test_a_user_is_erased_from_every_month(opened: Postgres, session: Session) -> None:
    await opened.migrate(NOW)
    await seed.part_by_month(session, 3)
    durable = Durable(opened)
    app = await new_app(durable)
    user = await ensure(durable, app, "ann")
    await session.execute(
        "INSERT INTO events (at, app_id, actor, action, user_id, result, request_id, address)"
        " SELECT now() + n * interval '1 month', $1, 'test', 'x', $2, 'done', 'r', '192.0.2.1'"
        " FROM generate_series(-6, 12) n",
        app.id,
        user,
    )
    assert len(await partitions(session)) >= 6
    assert await durable.users.delete(app.id, "ann", NOW)
    left = "SELECT count(*) FROM events WHERE address IS NOT NULL OR request_id = 'r'"
    assert await session.fetchval(left) == 0


async def test_a_cursor_goes_by_id_whatever_the_months(opened: Postgres, session: Session) -> None:
    """Clocks of instances differ: about midnight a later id may have the earlier month."""
    await opened.migrate(NOW)
    await seed.part_by_month(session, 6)
    app = await new_app(Durable(opened))
    await session.execute(
        "INSERT INTO events (at, app_id, actor, action, result, request_id)"
        " SELECT now() - (n * 7 % 6) * interval '1 month', $1, 'test', n, 'done', ''"
        " FROM generate_series(0, 29) n",
        app.id,
    )
    assert len(await partitions(session)) >= 6
    found = await all_after(opened, app, 4)
    assert [action for _, action in found[1:]] == [str(n) for n in range(30)]
    newest = await Durable(opened).events.newest(app.id, limit=5)
    assert [event.action for event in newest] == [str(n) for n in range(25, 30)]


async def test_a_cursor_of_a_time_skips_months_and_no_event(
    opened: Postgres, session: Session
) -> None:
    """An event of the earlier month has a lower, one a higher id than the first of the later."""
    await opened.migrate(NOW)
    await seed.part_by_month(session, 3)
    app = await new_app(Durable(opened))
    later = await session.fetchval(
        "SELECT ends FROM event_months ORDER BY ends OFFSET 1 LIMIT 1"
    )  # where the second month ends
    ids = {}
    for name, minutes in (("before", -2), ("ahead", 1), ("behind", -1), ("after", 2)):
        ids[name] = await session.fetchval(
            "INSERT INTO events (at, app_id, actor, action, result, request_id)"
            " VALUES ($1, $2, 'test', $3, 'done', '') RETURNING id",
            later + timedelta(minutes=minutes),
            app.id,
            name,
        )
    durable = Durable(opened)
    for since in (later, later + timedelta(days=20)):
        assert await durable.events.cursor_before(app.id, since) == ids["ahead"] - 1
    assert await durable.events.cursor_before(app.id, later - timedelta(minutes=1)) < ids["before"]
    assert await durable.events.cursor_before(app.id, NOW - timedelta(days=9999)) == 0
    assert await durable.events.cursor_before("nobody", later) == 0
