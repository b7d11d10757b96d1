"""Many rows: users, passkeys, events, as years of use leave them, made by the server out of a few
that came by real registrations.

Everything about row number n follows from n, so nothing has to be read back: ids, handles and
credential ids are cut from digests of n, and look as chance does to an index. What is not made anew
is copied from a *template*, one of the passkeys that were really registered: their public keys
above all. So whoever holds the templates' private keys can sign in as any user of the table, and a
column that a later migration adds is filled as registration fills it. A user's passkeys lie apart
in the table, for they came at different times.

Foreign keys are not checked while rows are made, and indexes that no foreign key needs are made
anew afterwards: minutes instead of an hour for five million.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg

Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# SQL of what number n has.
_ID = "left(md5('{0} ' || {1}), 24)"
_HANDLE = "left(md5('handle ' || {0}) || md5('other half ' || {0}), 43)"
_EXTERNAL = "md5('external ' || {0})::uuid::text"
_CREDENTIAL = "sha256(convert_to('credential ' || {0}, 'UTF8'))"
_WHEN = "now() - interval '3 years' * (1 - n::float8 / {0})"


@dataclass(frozen=True, slots=True)
class Size:
    """How many rows to make. Passkeys are dealt out to users, and events to passkeys, in turn."""

    users: int
    credentials: int
    events: int


async def templates(session: Session) -> list[bytes]:
    """Remember the passkeys there are, as templates; their credential ids in that order."""
    await session.execute(
        "CREATE TEMPORARY TABLE template AS"
        " SELECT row_number() OVER (ORDER BY c.credential_id) - 1 AS template, c.* FROM credentials c WHERE live AND NOT second_factor"
    )
    rows = await session.fetch("SELECT credential_id FROM template ORDER BY template")
    return [row["credential_id"] for row in rows]


async def grow(session: Session, apps: Sequence[str], size: Size) -> None:
    """Add rows, users dealt out to these apps in turn, in the session that has the templates. Some
    template has signed in before.
    """
    await session.execute("SET session_replication_role = replica")
    await session.execute("SET maintenance_work_mem = '256MB'")
    await session.execute("SET synchronous_commit = off")
    some = await session.fetchval("SELECT count(*) FROM template")
    user, passkey = f"(n % {size.users})", f"(n % {size.credentials} % {size.users})"
    app = f"($1::text[])[1 + {passkey} % {len(apps)}]"
    await _add(
        session,
        apps,
        "users",
        f"(SELECT u.* FROM users u JOIN template t ON u.id = t.user_id LIMIT 1) t CROSS JOIN generate_series(0, {size.users - 1}) n",
        {
            "id": _ID.format("user", "n"),
            "app_id": app,
            "external_id": _EXTERNAL.format("n"),
            "handle": _HANDLE.format("n"),
            "created_at": _WHEN.format(size.users),
            "updated_at": _WHEN.format(size.users),
        },
    )
    await _add(
        session,
        apps,
        "credentials",
        f"generate_series(0, {size.credentials - 1}) n JOIN template t ON t.template = n % {some}",
        {
            "id": _ID.format("passkey", "n"),
            "app_id": app,
            "user_id": _ID.format("user", user),
            "credential_id": _CREDENTIAL.format("n"),
            "user_handle": _HANDLE.format(user),
            "user_name": _EXTERNAL.format(user),
            "user_display_name": _EXTERNAL.format(user),
            "sign_count": "0",
            "use_count": "n % 100",
            "created_at": _WHEN.format(size.credentials),
            "updated_at": _WHEN.format(size.credentials),
            "last_used_at": "now() - interval '1 second' * (n % 1000000)",
        },
    )
    await _add(
        session,
        apps,
        "events",
        "(SELECT * FROM events WHERE action = 'passkey.used' LIMIT 1) t"
        f" CROSS JOIN generate_series(0, {size.events - 1}) n",
        {
            "at": _WHEN.format(size.events),
            "app_id": app,
            "user_id": _ID.format("user", passkey),
            "passkey_id": _ID.format("passkey", f"(n % {size.credentials})"),
            "request_id": "md5('request ' || n)",
        },
    )
    for table in ("users", "credentials", "events"):
        await session.execute(f"VACUUM (ANALYZE) {table}")
    await session.execute("SET session_replication_role = origin")


async def passkeys(
    session: Session, size: Size, numbers: Sequence[int]
) -> list[tuple[str, bytes, str, int]]:
    """Of passkeys by number: external id, credential id, user handle, and which template's key
    signs for it.
    """
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
    """Insert what `source` yields: columns as `made` says ($1 are the apps), all others as the
    template `t` has them.
    """
    rows = await session.fetch(
        "SELECT column_name FROM information_schema.columns WHERE table_schema = current_schema() AND table_name = $1"
        " AND is_generated = 'NEVER' AND is_identity = 'NO' ORDER BY ordinal_position",
        table,
    )
    columns = {
        row["column_name"]: made.get(row["column_name"], f"t.{row['column_name']}") for row in rows
    }
    async with _without_indexes(session, table):
        await session.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(columns.values())} FROM {source}",
            list(apps),
        )


@asynccontextmanager
async def _without_indexes(session: Session, table: str) -> AsyncIterator[None]:
    """Inside, the table has only the indexes that foreign keys of others need."""
    constraints = await session.fetch(
        "SELECT conname, pg_get_constraintdef(oid) AS made FROM pg_constraint c WHERE conrelid = $1::text::regclass"
        " AND contype IN ('p', 'u')"
        " AND NOT EXISTS (SELECT FROM pg_constraint f WHERE f.contype = 'f' AND f.conindid = c.conindid)",
        table,
    )
    indexes = await session.fetch(
        "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS made FROM pg_index"
        " WHERE indrelid = $1::text::regclass"
        " AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.contype IN ('p', 'u') AND c.conindid = indexrelid)",
        table,
    )
    for row in constraints:
        await session.execute(f"ALTER TABLE {table} DROP CONSTRAINT {row['conname']}")
    for row in indexes:
        await session.execute(f"DROP INDEX {row['name']}")
    yield
    for row in constraints:
        await session.execute(f"ALTER TABLE {table} ADD CONSTRAINT {row['conname']} {row['made']}")
    for row in indexes:
        await session.execute(row["made"])
