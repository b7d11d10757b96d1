"""Bulk rows: users, credentials and events, made in the database from a few real registrations.

The row with number n follows from n: ids and credential ids are cut from digests of n, so that they
are as random to an index as real ones. Other columns are copied from a *template*, a registered
credential: the holder of the templates' key pairs can sign in as any user, and a column that a
later migration adds is filled as registration fills it.

Rows are made without checks of foreign keys, and indexes that no foreign key needs are made
afterwards: minutes instead of an hour for five million credentials.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg

Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# SQL of the columns of row number {0}.
_ID = "left(md5('{1} ' || {0}), 24)"
_HANDLE = "left(md5('handle ' || {0}) || md5('other half ' || {0}), 43)"
_EXTERNAL = "md5('external ' || {0})::uuid::text"
_CREDENTIAL = "sha256(convert_to('credential ' || {0}, 'UTF8'))"
_WHEN = "now() - interval '3 years' * (1 - n::float8 / {0})"


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers of rows. Credentials belong to users, and events to credentials, in turn."""

    users: int
    credentials: int
    events: int


async def part_by_month(session: Session, months: int) -> None:
    """Give each of the last `months` months a partition of events, as a broker has after a long
    time. `events_first` has what is older.
    """
    await session.execute(
        f"""
        DO $$
        DECLARE
            starts timestamptz;
            ends timestamptz;
        BEGIN
            SET LOCAL timezone = 'UTC';
            ends := date_trunc('month', now()) - interval '{months} months';
            ALTER TABLE events DETACH PARTITION events_first;
            ALTER TABLE events_first RENAME TO events_before;
            EXECUTE format(
                'CREATE TABLE events_first PARTITION OF events (PRIMARY KEY (id))'
                ' FOR VALUES FROM (MINVALUE) TO (%L)', ends
            );
            WHILE to_regclass(to_char(ends, '"events_"YYYY_MM')) IS NULL LOOP
                starts := ends;
                ends := starts + interval '1 month';
                EXECUTE format(
                    'CREATE TABLE %I PARTITION OF events (PRIMARY KEY (id))'
                    ' FOR VALUES FROM (%L) TO (%L)',
                    to_char(starts, '"events_"YYYY_MM'), starts, ends
                );
            END LOOP;
            INSERT INTO events OVERRIDING SYSTEM VALUE SELECT * FROM events_before;
            DROP TABLE events_before;
        END
        $$
        """
    )


async def templates(session: Session) -> list[bytes]:
    """Make the registered credentials templates of this session; their credential ids in order."""
    await session.execute(
        "CREATE TEMPORARY TABLE template AS SELECT c.*,"
        " row_number() OVER (ORDER BY c.credential_id) - 1 AS template"
        " FROM credentials c WHERE live AND NOT second_factor"
    )
    rows = await session.fetch("SELECT credential_id FROM template ORDER BY template")
    return [row["credential_id"] for row in rows]


async def grow(session: Session, apps: Sequence[str], size: Size) -> None:
    """Add rows to these apps in turn. A template has signed in before."""
    await session.execute("SET session_replication_role = replica")
    await session.execute("SET maintenance_work_mem = '256MB'")
    await session.execute("SET synchronous_commit = off")
    some = await session.fetchval("SELECT count(*) FROM template")
    user, passkey = f"(n % {size.users})", f"(n % {size.credentials} % {size.users})"
    app = f"($1::text[])[1 + {passkey} % {len(apps)}]"
    numbers = "generate_series(0, {} - 1) n"
    tables = {
        "users": (
            "(SELECT u.* FROM users u JOIN template t ON u.id = t.user_id"
            " WHERE u.status = 'active' LIMIT 1) t"
            f" CROSS JOIN {numbers.format(size.users)}",
            {
                "id": _ID.format("n", "user"),
                "app_id": app,
                "external_id": _EXTERNAL.format("n"),
                "handle": _HANDLE.format("n"),
                **dict.fromkeys(("created_at", "updated_at"), _WHEN.format(size.users)),
            },
        ),
        "credentials": (
            f"{numbers.format(size.credentials)} JOIN template t ON t.template = n % {some}",
            {
                "id": _ID.format("n", "passkey"),
                "app_id": app,
                "user_id": _ID.format(user, "user"),
                "credential_id": _CREDENTIAL.format("n"),
                "user_handle": _HANDLE.format(user),
                **dict.fromkeys(("user_name", "user_display_name"), _EXTERNAL.format(user)),
                "sign_count": "0",
                "use_count": "n % 100",
                **dict.fromkeys(("created_at", "updated_at"), _WHEN.format(size.credentials)),
                "last_used_at": "now() - interval '1 second' * (n % 1000000)",
            },
        ),
        "events": (
            "(SELECT * FROM events WHERE action = 'passkey.used' LIMIT 1) t"
            f" CROSS JOIN {numbers.format(size.events)}",
            {
                "at": _WHEN.format(size.events),
                "app_id": app,
                "user_id": _ID.format(passkey, "user"),
                "passkey_id": _ID.format(f"(n % {size.credentials})", "passkey"),
                "request_id": "md5('request ' || n)",
            },
        ),
    }
    for table, (source, made) in tables.items():
        await _add(session, apps, table, source, made)
    for table in tables:
        await session.execute(f"VACUUM (ANALYZE) {table}")
    await session.execute("SET session_replication_role = origin")


async def passkeys(
    session: Session, size: Size, numbers: Sequence[int]
) -> list[tuple[str, bytes, str, int]]:
    """Credentials by number: external id, credential id, user handle, index of the template."""
    user = f"(n % {size.users})"
    rows = await session.fetch(
        f"SELECT {_EXTERNAL.format(user)}, {_CREDENTIAL.format('n')}, {_HANDLE.format(user)},"
        " n % (SELECT count(*) FROM template) FROM unnest($1::bigint[]) n",
        list(numbers),
    )
    return [(row[0], row[1], row[2], row[3]) for row in rows]


async def _add(
    session: Session, apps: Sequence[str], table: str, source: str, made: Mapping[str, str]
) -> None:
    """Insert the rows of `source`: columns as in `made` ($1 are the apps), others from `t`."""
    rows = await session.fetch(
        "SELECT column_name FROM information_schema.columns"
        " WHERE table_schema = current_schema() AND table_name = $1"
        " AND is_generated = 'NEVER' AND is_identity = 'NO' ORDER BY ordinal_position",
        table,
    )
    columns = {name: made.get(name, f"t.{name}") for (name,) in rows}
    async with _without_indexes(session, table):
        await session.execute(
            f"INSERT INTO {table} ({', '.join(columns)})"
            f" SELECT {', '.join(columns.values())} FROM {source}",
            list(apps),
        )


@asynccontextmanager
async def _without_indexes(session: Session, table: str) -> AsyncIterator[None]:
    """Inside, the table has only the indexes that foreign keys of other tables need."""
    constraints = await session.fetch(
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint c"
        " WHERE conrelid = $1::text::regclass AND contype IN ('p', 'u') AND NOT EXISTS"
        " (SELECT FROM pg_constraint f WHERE f.contype = 'f' AND f.conindid = c.conindid)",
        table,
    )
    indexes = await session.fetch(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
        " WHERE indrelid = $1::text::regclass AND NOT EXISTS"
        " (SELECT FROM pg_constraint c WHERE c.contype IN ('p', 'u') AND c.conindid = indexrelid)",
        table,
    )
    for name, _ in constraints:
        await session.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    for name, _ in indexes:
        await session.execute(f"DROP INDEX {name}")
    yield
    for name, definition in constraints:
        await session.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}")
    for _, definition in indexes:
        # Shown with ONLY if the table is partitioned, which would leave out the partitions.
        await session.execute(definition.replace(" ON ONLY ", " ON "))
