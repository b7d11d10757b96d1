"""Migrations while people sign in: every file's locks on 200,000 rows, and what a migration that
waits does to a sign-in.

A migration is held open, by a trigger on its row in `schema_migrations` or by a transaction that
its index waits for, and its locks are read from `pg_locks` while sign-ins go on beside it. How many
rows it read and wrote is what Postgres counted for its transaction. Nothing here is judged by how
long it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from broker.durable import Durable, MigrationFault, Patience, Postgres, migrations, sql_files
from broker.embedded import EmbeddedStores
from broker.telemetry import Metrics
from broker.tokens import SystemMint
from tests.stores.test_durable import add, ensure, new_app, signed_in
from tests.stores.test_migrations import NAMES, NOW, Session
from tests.support.servers import pool, session_of

ROWS = 200_000
FEW = 1000  # rows that a transaction may touch under a lock that keeps people out
LOGIN_TABLES = ("users", "credentials", "events")
# What a sign-in or a registration (ACCESS SHARE, ROW SHARE, ROW EXCLUSIVE) waits for.
KEEPING_OUT = {"ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"}
SUPERSEDED = Path(__file__).parent / "superseded"
HOLD = 4242  # the advisory lock at which a migration is held
QUICK = Patience(turn=0.5, lock=0.1, tries=2, pause=0.01, build=0.5, poll=0.02)

Files = list[tuple[int, str, str]]


@pytest.fixture
async def url(stores: EmbeddedStores) -> AsyncIterator[str]:
    """An empty database, where one process builds an index, so that what it reads is counted for
    its session.
    """
    name = "test_" + SystemMint().id().lower()
    async with session_of(stores) as session:
        await session.execute(f"CREATE DATABASE {name}")
        await session.execute(f"ALTER DATABASE {name} SET max_parallel_maintenance_workers = 0")
        yield stores.database_url.replace("/postgres?", f"/{name}?")
        await session.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    made = await asyncpg.connect(url)
    yield made
    await made.close()


@pytest.fixture
async def migrating(url: str) -> AsyncIterator[Postgres]:
    made = Postgres(url, timeout=2, connections=1, metrics=Metrics())
    await made.open()
    yield made
    await made.close()


async def until(
    condition: Callable[[], Awaitable[object]], what: str, task: asyncio.Task[object]
) -> None:
    """Wait for the condition while `task` runs; a task that ends before is a failure."""
    while not await condition():
        assert not task.done(), f"ended before: {what} ({task.exception() if task.done() else ''})"
        await asyncio.sleep(0.005)  # between two looks


def earlier(files: Files) -> Files:
    """The same migrations with the texts that they had at first."""
    texts = {path.stem: path.read_text() for path in SUPERSEDED.glob("*.sql")}
    assert texts
    return [(version, name, texts.get(name, text)) for version, name, text in files]


# -- what every migration locks --------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What one migration did."""

    name: str
    concurrent: bool
    held: dict[
        str, set[str]
    ]  # table to lock modes, at the end of the transaction or while the index is built
    touched: dict[str, int]  # table to rows read and written
    rewritten: set[str]
    logins: int  # that ended while the migration was held open

    @property
    def keeps_out(self) -> set[str]:
        return {table for table, modes in self.held.items() if modes & KEEPING_OUT}

    @property
    def faults(self) -> list[str]:
        """Tables that nobody could use while something went on that takes longer the more rows
        there are.
        """
        slow = {table for table, rows in self.touched.items() if rows > FEW} | self.rewritten
        found = [
            f"{self.name} keeps sign-ins from {table}" for table in sorted(self.keeps_out) if slow
        ]
        if self.concurrent:
            found += [f"{self.name} locks {table}" for table in sorted(self.keeps_out)]
        return found


_LOGIN = (
    "SELECT c.id FROM users u JOIN credentials c ON c.user_id = u.id AND c.live"
    " WHERE u.app_id = 'app' AND u.external_id = $1",
    "WITH used AS (UPDATE credentials SET use_count = use_count + 1, last_used_at = now()"
    " WHERE id = $1 RETURNING *)"
    " INSERT INTO events (at, app_id, actor, action, user_id, passkey_id, result, request_id)"
    " SELECT now(), app_id, 'browser', 'passkey.used', user_id, id, 'done', '' FROM used",
)
_FILL = """
SET session_replication_role = replica;
SET synchronous_commit = off;
INSERT INTO relying_parties (id, name, rp_id, origins, created_at, updated_at)
VALUES ('app', 'App', 'a.example', '{}', now(), now());
INSERT INTO users (id, app_id, external_id, handle, status, created_at, updated_at)
    SELECT 'u' || n, 'app', 'e' || n, 'h' || n, 'active', now(), now()
    FROM generate_series(1, %(rows)s) n;
INSERT INTO credentials (id, app_id, user_id, credential_id, user_handle, public_key, algorithm,
        sign_count, backup_eligible, backed_up, transports, aaguid, attestation_format,
        attestation_trust, user_name, user_display_name, nickname, live, created_at, updated_at)
    SELECT 'c' || n, 'app', 'u' || n, sha256(n::text::bytea), 'h' || n, '\\x00', -7, 0, true, true,
        '{}', '', 'none', 'none', '', '', '', true, now(), now()
    FROM generate_series(1, %(rows)s) n;
INSERT INTO events (at, app_id, actor, action, user_id, passkey_id, result, request_id)
    SELECT now(), 'app', 'browser', 'passkey.used', 'u' || n, 'c' || n, 'done', ''
    FROM generate_series(1, %(rows)s) n;
SET session_replication_role = origin;
CREATE TABLE observed (name text, relation text, touched bigint);
CREATE FUNCTION observe() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO observed SELECT NEW.name, relname,
        seq_tup_read + coalesce(idx_tup_fetch, 0) + n_tup_ins + n_tup_upd + n_tup_del
        FROM pg_stat_xact_user_tables;
    PERFORM pg_advisory_xact_lock_shared(%(hold)s);
    RETURN NEW;
END $$;
CREATE TRIGGER observe BEFORE INSERT ON schema_migrations FOR EACH ROW EXECUTE FUNCTION observe();
"""


class Observed:
    """A filled database, its migrations applied one by one, each held open while people sign in."""

    def __init__(self, url: str, session: Session) -> None:
        self._url = url
        self._session = session
        self._number = 0

    async def login(self, session: Session) -> None:
        """Another user's, each time. It has two seconds, as a request may have."""
        self._number += 1
        passkey = await session.fetchval(_LOGIN[0], f"e{self._number}", timeout=2)
        assert passkey == f"c{self._number}"
        await session.execute(_LOGIN[1], passkey, timeout=2)

    async def apply(self, patch: pytest.MonkeyPatch, files: Files) -> Seen:
        """Apply the last of `files`, the others being applied."""
        name, concurrent = files[-1][1], migrations.concurrent_steps(files[-1][2]) is not None
        patch.setattr(migrations, "sql_files", lambda: files)
        tables = {table: await self._oid(table) for table in LOGIN_TABLES}
        before = await self._filenodes(tables)
        people, old = await asyncpg.connect(self._url), await asyncpg.connect(self._url)
        await self._session.execute("SELECT pg_advisory_lock($1)", HOLD)
        snapshot = old.transaction(isolation="repeatable_read")
        if concurrent:  # the index waits for this snapshot before it is valid
            await snapshot.start()
            await old.fetchval("SELECT count(*) FROM credentials WHERE id = 'c1'")
        task = asyncio.create_task(migrations.migrate(self._url, NOW, Patience()))
        waits = "virtualxid" if concurrent else "advisory"
        try:
            await until(lambda: self._waiting(waits), f"{name} is held open", task)
            held = await self._held()
            logins = 0
            if concurrent or not any(modes & KEEPING_OUT for modes in held.values()):
                for _ in range(3):
                    await self.login(people)
                    logins += 1
            assert not task.done(), "it was still held open when the last of them had signed in"
        finally:
            await self._session.execute("SELECT pg_advisory_unlock($1)", HOLD)
            if concurrent:
                await snapshot.rollback()
            assert await task == [name]
            await self.login(people)
            await people.close()
            await old.close()
        rows = await self._session.fetch(
            "SELECT relation, touched FROM observed WHERE name = $1", name
        )
        after = await self._filenodes(tables)
        touched = dict.fromkeys(LOGIN_TABLES, 0)
        for row in rows:
            table = row["relation"].removesuffix("_first")  # events, since migration 14
            touched[table] = touched.get(table, 0) + row["touched"]
        return Seen(
            name,
            concurrent,
            held,
            {table: touched[table] for table in LOGIN_TABLES},
            {table for table in LOGIN_TABLES if before[table] != after[table]},
            logins,
        )

    async def _waiting(self, kind: str) -> bool:
        """Whether the migrating session waits for a lock of this kind."""
        return bool(
            await self._session.fetchval(
                "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
                " WHERE a.application_name = 'passkey-broker migrate'"
                " AND a.datname = current_database()"
                " AND NOT l.granted AND l.locktype = $1",
                kind,
            )
        )

    async def _held(self) -> dict[str, set[str]]:
        rows = await self._session.fetch(
            "SELECT l.relation::regclass::text AS relation, l.mode FROM pg_locks l"
            " JOIN pg_stat_activity a USING (pid)"
            " WHERE a.application_name = 'passkey-broker migrate'"
            " AND a.datname = current_database() AND l.granted"
            " AND l.relation = ANY ($1::text[]::regclass[]::oid[])",
            list(LOGIN_TABLES),
        )
        held: dict[str, set[str]] = {}
        for row in rows:
            held.setdefault(row["relation"], set()).add(row["mode"])
        return held

    async def _oid(self, table: str) -> int:
        oid: int = await self._session.fetchval("SELECT $1::text::regclass::oid", table)
        return oid

    async def _filenodes(self, oids: dict[str, int]) -> dict[str, int]:
        """The files of tables, whatever their names are now."""
        return {
            table: await self._session.fetchval("SELECT pg_relation_filenode($1::oid)", oid)
            for table, oid in oids.items()
        }


@pytest.fixture
async def observed(
    url: str, session: Session, migrating: Postgres, monkeypatch: pytest.MonkeyPatch
) -> Observed:
    first = sql_files()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "sql_files", lambda: first)
        assert await migrating.migrate(NOW) == NAMES[:1]
    await session.execute(_FILL % {"rows": ROWS, "hold": HOLD})
    await session.execute("ANALYZE")
    return Observed(url, session)


async def test_no_migration_keeps_people_out_for_long(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sql_files()
    seen = []
    for number in range(2, len(files) + 1):
        with monkeypatch.context() as patch:
            seen.append(await observed.apply(patch, files[:number]))
    assert [one.name for one in seen] == NAMES[1:]
    assert [fault for one in seen for fault in one.faults] == []
    assert [one.name for one in seen if one.concurrent and not one.logins] == []
    assert sum(one.logins for one in seen) >= 9
    by_name = {one.name: one for one in seen}
    assert by_name["0003_keyed_ceremonies"].keeps_out == {"users", "credentials"}, (
        "the look at locks sees locks"
    )
    assert by_name["0005_credentials_page"].held["credentials"] == {"ShareUpdateExclusiveLock"}


async def test_one_that_keeps_people_out_is_found(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The migration as it was at first, by the same look."""
    files = earlier(sql_files())
    with monkeypatch.context() as patch:
        await observed.apply(patch, files[:2])
        seen = await observed.apply(patch, files[:3])
    assert seen.touched["credentials"] >= ROWS
    assert seen.faults == [
        "0003_keyed_ceremonies keeps sign-ins from credentials",
        "0003_keyed_ceremonies keeps sign-ins from users",
    ]


# -- a migration that waits ------------------------------------------------------------------------


async def test_a_sign_in_does_not_wait_behind_a_migration_that_waits(
    url: str, session: Session, migrating: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction keeps a row; the migration wants the table; a sign-in queues behind the
    migration and ends before either.
    """
    await migrating.migrate(NOW)
    files = [*sql_files(), (9999, "9999_next", "ALTER TABLE credentials ADD COLUMN next integer")]
    monkeypatch.setattr(migrations, "sql_files", lambda: files)
    made = pool(url, timeout=1.5)
    await made.open()
    durable = Durable(made)
    app = await new_app(durable)
    slow, quick = [
        await add(durable, app, await ensure(durable, app, n), n.encode())
        for n in ("slow", "quick")
    ]
    try:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(session.transaction())
            await session.execute("UPDATE credentials SET nickname = 'x' WHERE id = $1", slow.id)
            task = asyncio.create_task(migrating.migrate(NOW))
            looking = await asyncpg.connect(url)
            stack.push_async_callback(looking.close)
            waits = (
                "SELECT count(*) FROM pg_locks"
                " WHERE NOT granted AND relation = 'credentials'::regclass AND mode = $1"
            )
            await until(
                lambda: looking.fetchval(waits, "AccessExclusiveLock"),
                "it waits for the table",
                task,
            )
            used = await durable.ceremonies.use(
                quick, signed_in(), epoch=0, flag_counter=False, now=NOW
            )
            assert used is not None, "signed in, in a request's time"
            assert not task.done(), "it is still to be applied"
            assert not await session.fetchval(
                "SELECT count(*) FROM schema_migrations WHERE version = 9999"
            )
        assert await task == ["9999_next"], "tried again when the table was free"
    finally:
        await made.close()


async def test_a_transaction_that_stays_open_is_named(
    url: str, session: Session, migrating: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrating.migrate(NOW)
    files = [*sql_files(), (9999, "9999_next", "ALTER TABLE credentials ADD COLUMN next integer")]
    monkeypatch.setattr(migrations, "sql_files", lambda: files)
    await session.execute("SET application_name = 'forgotten'")
    async with session.transaction():
        await session.execute("LOCK TABLE credentials IN ROW EXCLUSIVE MODE")
        said = (
            f"Migration 9999_next found its tables locked 2 times; end the oldest transaction"
            f" (process {session.get_server_pid()}, 'forgotten') and run `broker migrate` again."
        )
        with pytest.raises(MigrationFault, match=f"^{re.escape(said)}$"):
            await migrating.migrate(NOW, QUICK)
    assert await migrating.migrate(NOW, QUICK) == ["9999_next"]


async def test_an_index_that_failed_is_built_again(
    url: str, session: Session, migrating: Postgres
) -> None:
    """A try that gives up leaves an INVALID index, which no statement uses and every write pays
    for.
    """
    state = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('credentials_page')"
    await migrating.migrate(NOW)
    await session.execute("DROP INDEX credentials_page")
    await session.execute("DELETE FROM schema_migrations WHERE version = 5")
    old = await asyncpg.connect(url, server_settings={"application_name": "report"})
    try:
        async with old.transaction(isolation="repeatable_read"):
            await old.fetchval("SELECT count(*) FROM credentials")
            with pytest.raises(MigrationFault) as fault:
                await migrating.migrate(NOW, QUICK)
        assert str(fault.value) == (
            "Migration 0005_credentials_page waited 0.5 s for other transactions; end the oldest "
            f"transaction (process {old.get_server_pid()}, 'report') and run `broker migrate` "
            "again."
        )
    finally:
        await old.close()
    assert await session.fetchval(state) is False
    broken = await session.fetchval("SELECT to_regclass('credentials_page')::oid")
    assert await migrating.migrate(NOW, QUICK) == ["0005_credentials_page"]
    assert await session.fetchval(state) is True
    built = await session.fetchval("SELECT to_regclass('credentials_page')::oid")
    assert built != broken
    await session.execute("DELETE FROM schema_migrations WHERE version = 5")
    assert await migrating.migrate(NOW, QUICK) == ["0005_credentials_page"], (
        "it ended before its row was written"
    )
    assert await session.fetchval("SELECT to_regclass('credentials_page')::oid") == built, (
        "a valid index stays"
    )


async def test_who_migrates_is_named(url: str, session: Session, migrating: Postgres) -> None:
    await session.execute("SET application_name = 'the other one'")
    await session.execute("SELECT pg_advisory_lock($1)", migrations.MIGRATION_LOCK)
    with pytest.raises(MigrationFault) as fault:
        await migrating.migrate(NOW, QUICK)
    assert str(fault.value) == (
        "Another session has migrated for 0.5 s"
        f" (process {session.get_server_pid()}, 'the other one');"
        " wait for it or end it, then run `broker migrate` again."
    )
    await session.execute("SELECT pg_advisory_unlock($1)", migrations.MIGRATION_LOCK)
    assert await migrating.migrate(NOW, QUICK) == NAMES


async def test_an_instance_that_waits_its_turn_holds_up_no_index(
    url: str, session: Session, migrating: Postgres
) -> None:
    """One is about to build an index, for which it waits for every older snapshot; another one
    waits for it to end.
    """
    await migrating.migrate(NOW)
    await session.execute("DROP INDEX credentials_page")
    await session.execute("DELETE FROM schema_migrations WHERE version = 5")
    second = Postgres(url, timeout=2, connections=1, metrics=Metrics())
    asking = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'passkey-broker migrate'"
        " AND datname = current_database() AND query LIKE "
    )
    looking = await asyncpg.connect(url)
    try:
        async with session.transaction():
            await session.execute("LOCK TABLE credentials IN SHARE UPDATE EXCLUSIVE MODE")
            first = asyncio.create_task(migrating.migrate(NOW))
            await until(
                lambda: looking.fetchval(asking + "'CREATE INDEX%'"),
                "it is to build the index",
                first,
            )
            other = asyncio.create_task(second.migrate(NOW, Patience()._replace(poll=0.001)))
            await until(
                lambda: looking.fetchval(asking + "'%advisory_lock%'"),
                "another asked for its turn",
                other,
            )
        assert [await first, await other] == [["0005_credentials_page"], []]
    finally:
        await looking.close()


# -- files -----------------------------------------------------------------------------------------


def test_what_goes_without_a_transaction() -> None:
    head = "-- Why: x\n-- no transaction\n-- Old code: y\n"
    one, two = (
        f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON users (id)" for name in ("a", "b")
    )
    assert migrations.concurrent_steps(f"{head}\n{one}; -- one\n{two};\n") == [
        ("a", one),
        ("b", two),
    ]
    assert migrations.concurrent_steps("-- Why\nSELECT 1;\n-- no transaction\n") is None
    for repeated in (
        "CREATE INDEX CONCURRENTLY a ON users (id)",
        "CREATE INDEX a ON users (id)",
        "SELECT 1",
    ):
        with pytest.raises(MigrationFault, match="only builds indexes concurrently"):
            migrations.concurrent_steps(f"{head}{one};{repeated};")
    assert any(migrations.concurrent_steps(text) for _, _, text in sql_files())


async def _catalogue(session: Session) -> dict[str, list[tuple[object, ...]]]:
    """The schema, as the catalogues have it."""
    questions = {
        "columns": "SELECT attrelid::regclass::text, attnum, attname,"
        " format_type(atttypid, atttypmod), attnotnull, attgenerated,"
        " attidentity, attcollation::regcollation::text, pg_get_expr(adbin, adrelid)"
        " FROM pg_attribute"
        " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)"
        " AND attnum > 0 AND NOT attisdropped",
        "relations": "SELECT relname, relkind, reloptions::text FROM pg_class"
        " WHERE relnamespace = 'public'::regnamespace",
        "constraints": "SELECT conrelid::regclass::text, conname, convalidated,"
        " pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace",
        "indexes": "SELECT indexrelid::regclass::text, indisvalid, indisready,"
        " pg_get_indexdef(indexrelid) FROM pg_index"
        " WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)",
        "triggers": "SELECT pg_get_triggerdef(oid), tgenabled FROM pg_trigger"
        " WHERE NOT tgisinternal",
        "functions": "SELECT pg_get_functiondef(oid) FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace",
    }
    return {
        kind: sorted((tuple(row) for row in await session.fetch(question)), key=repr)
        for kind, question in questions.items()
    }


async def test_both_texts_of_a_migration_lead_to_one_schema(
    url: str, session: Session, migrating: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that was migrated with the earlier text stays valid, and ends as one that is made
    today.
    """
    await migrating.migrate(NOW)
    today = await _catalogue(session)
    assert all(today.values())
    await session.execute("DROP SCHEMA public CASCADE")
    await session.execute("CREATE SCHEMA public")
    known, files = sql_files(), earlier(sql_files()[:4])
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "sql_files", lambda: files)
        assert await migrating.migrate(NOW) == NAMES[:4]
    digests = "SELECT sha256 FROM schema_migrations ORDER BY version"
    assert [row[0] for row in await session.fetch(digests)] == [
        migrations._digest(t) for _, _, t in files
    ]
    assert files != known[:4]
    assert await migrating.migrate(NOW) == NAMES[4:]
    assert await _catalogue(session) == today
    await migrating.check()
