"""Migrations, on databases of the test's own: applied once, whoever else applies them, and
readiness by what the schema is.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest

from broker.durable import MigrationFault, Postgres, migrations, sql_files
from broker.embedded import EmbeddedStores
from broker.errors import Unavailable
from broker.telemetry import Metrics
from broker.tokens import SystemMint
from tests.support.servers import session_of

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NAMES = [name for _, name, _ in sql_files()]


@pytest.fixture
async def url(stores: EmbeddedStores) -> AsyncIterator[str]:
    """An empty database."""
    name = "test_" + SystemMint().id().lower()
    async with session_of(stores) as session:
        await session.execute(f"CREATE DATABASE {name}")
        yield stores.database_url.replace("/postgres?", f"/{name}?")
        await session.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def opened(url: str) -> AsyncIterator[Postgres]:
    made = Postgres(url, timeout=2, connections=2, metrics=Metrics())
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def session(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    made = await asyncpg.connect(url)
    yield made
    await made.close()


Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def refused(opened: Postgres) -> str:
    """Why it is not ready."""
    with pytest.raises(Unavailable) as fault:
        await opened.check()
    return fault.value.reason


async def test_ready_when_migrated(opened: Postgres, session: Session) -> None:
    assert await refused(opened) == "postgres_not_migrated"
    assert await opened.migrate(NOW) == NAMES
    await opened.check()
    assert await opened.migrate(NOW) == [], "again changes nothing"
    rows = await session.fetch(
        "SELECT version, name, sha256, applied_at FROM schema_migrations ORDER BY version"
    )
    assert [tuple(row) for row in rows] == [
        (version, name, hashlib.sha256(text.encode()).hexdigest(), NOW)
        for version, name, text in sql_files()
    ]


async def test_statements_before_the_migration_are_unavailable(opened: Postgres) -> None:
    with pytest.raises(Unavailable) as fault:
        await opened.row("test", "SELECT id FROM relying_parties")
    assert fault.value.reason == "postgres_not_migrated"


async def test_many_instances_migrate_at_once(url: str, session: Session) -> None:
    instances = [Postgres(url, timeout=2, connections=1, metrics=Metrics()) for _ in range(10)]
    applied = await asyncio.gather(*(instance.migrate(NOW) for instance in instances))
    assert sorted(applied, key=len) == [[]] * 9 + [NAMES]
    assert await session.fetchval("SELECT count(*) FROM schema_migrations") == len(NAMES)
    assert await session.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_an_edited_migration_is_refused(opened: Postgres, session: Session) -> None:
    await opened.migrate(NOW)
    await session.execute("UPDATE schema_migrations SET sha256 = 'other' WHERE version = 1")
    with pytest.raises(MigrationFault, match=f"{NAMES[0]} was edited"):
        await opened.migrate(NOW)
    assert await session.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_a_newer_schema_serves_older_code(opened: Postgres, session: Session) -> None:
    """A roll-back: the schema knows a migration that the code does not."""
    await opened.migrate(NOW)
    await session.execute(
        "INSERT INTO schema_migrations VALUES (9999, '9999_of_tomorrow', 'x', now())"
    )
    await opened.check()
    assert await opened.migrate(NOW) == []


async def test_an_older_schema_is_not_ready(
    opened: Postgres, monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    await opened.migrate(NOW)
    further = [*sql_files(), (9999, "9999_next", "CREATE TABLE next (id integer PRIMARY KEY)")]
    monkeypatch.setattr(migrations, "sql_files", lambda: further)
    newer = Postgres(opened._url, timeout=2, connections=1, metrics=Metrics())
    await newer.open()
    try:
        assert await refused(newer) == "postgres_not_migrated"
        await opened.check()
        assert await newer.migrate(NOW) == ["9999_next"]
        await newer.check()
        await opened.check()
    finally:
        await newer.close()
    assert await session.fetchval("SELECT to_regclass('next')") is not None


async def test_a_migration_that_fails_leaves_nothing_behind(
    opened: Postgres, monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    further = [*sql_files(), (9999, "9999_next", "CREATE TABLE next (id integer); SELECT 1 / 0")]
    monkeypatch.setattr(migrations, "sql_files", lambda: further)
    with pytest.raises(MigrationFault, match="9999_next"):
        await opened.migrate(NOW)
    assert await session.fetchval("SELECT to_regclass('next')") is None
    assert await session.fetchval("SELECT max(version) FROM schema_migrations") == len(NAMES)
    assert await session.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [(("/test_", "/none_"), "InvalidCatalogNameError"), (("host=", "host=%2Fnowhere"), "Error")],
)
async def test_a_server_out_of_reach_is_one_sentence(
    url: str, change: tuple[str, str], word: str
) -> None:
    elsewhere = Postgres(url.replace(*change), timeout=2, connections=1, metrics=Metrics())
    with pytest.raises(
        MigrationFault, match=rf"can't be reached \(\w*{word}\); check BROKER_DATABASE_URL"
    ):
        await elsewhere.migrate(NOW)


async def test_a_server_that_takes_no_writes_is_one_sentence(url: str) -> None:
    reading = Postgres(
        url + "&default_transaction_read_only=on", timeout=2, connections=1, metrics=Metrics()
    )
    with pytest.raises(MigrationFault, match="ReadOnlySQLTransactionError"):
        await reading.migrate(NOW)


def test_each_migration_says_why_and_what_old_code_sees() -> None:
    assert [number for number, _, _ in sql_files()] == list(range(1, len(NAMES) + 1)), "no gap"
    for _, name, text in sql_files():
        header = re.match(r"(--.*\n)+", text)
        assert header is not None, name
        assert "Why" in header[0], name
        assert "Old code" in header[0], name
        assert "-- no transaction" in header[0] or "CONCURRENTLY" not in text, name


def test_where_the_migrations_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the package in a checkout, inside it in a wheel; nowhere is a fault."""
    package = tmp_path / "broker"
    (package / "durable").mkdir(parents=True)
    monkeypatch.setattr(migrations, "__file__", str(package / "durable" / "migrations.py"))
    with pytest.raises(MigrationFault, match="No migrations found"):
        sql_files()
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "0001_beside.sql").write_text("-- a")
    (tmp_path / "sql" / "README.md").write_text("no migration")
    assert sql_files() == [(1, "0001_beside", "-- a")]
    (package / "sql").mkdir()
    (package / "sql" / "0001_inside.sql").write_text("-- b")
    assert sql_files() == [(1, "0001_inside", "-- b")]
