"""The table of relying parties ("apps")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, cast

import asyncpg

from broker.durable.events import actor, insert_event
from broker.durable.postgres import Connection, Postgres
from broker.errors import Conflict
from broker.model import ApiKey, Policy, RelyingParty

_APP = "id, name, rp_id, origins, related_origins, policy, created_at, updated_at"


class Apps:
    """The statements on relying parties."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres
        self.find = postgres.group_commit("app", self._find_batch)

    async def create(self, app: RelyingParty, key: ApiKey, key_hash: bytes) -> None:
        """Insert a relying party with its first API key."""
        event = insert_event("'app.created'", "FROM app", at="$7", app_id="id", by="$12, $13")
        await self._pg.row(
            "create_app",
            f"""
            WITH app AS (
                INSERT INTO relying_parties (
                    id, name, rp_id, origins, related_origins, policy, created_at, updated_at)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $7) RETURNING id
            ), key AS (
                INSERT INTO api_keys (id, app_id, hash, hint, name, created_at)
                SELECT $8, id, $9, $10, $11, $7 FROM app
            ) {event}
            """,
            app.id,
            app.name,
            app.rp_id,
            list(app.origins),
            list(app.related_origins),
            app.policy.dump(),
            key.created_at,
            key.id,
            key_hash,
            key.hint,
            key.name,
            *actor(),
        )

    async def update(self, app: RelyingParty, now: datetime) -> RelyingParty | None:
        """Replace name, RP ID, origins and policy of the version with this `updated_at`
        (compare-and-swap), which no two versions share. Returns the new version; None: no such app.

        Raises:
            Conflict: the app has another version meanwhile.
        """
        event = insert_event(
            "'app.updated'",
            "FROM app JOIN was ON true",
            at="$7",
            app_id="id",
            by="$9, $10",
            payload="""(
                SELECT jsonb_build_object('changed', jsonb_agg(key ORDER BY key))
                FROM jsonb_each(was.facts) AS a FULL JOIN jsonb_each(app.facts) AS b USING (key)
                WHERE a.value IS DISTINCT FROM b.value
            )""",
        )
        facts = "to_jsonb(r) - '{id,created_at,updated_at,policy}'::text[] || r.policy AS facts"
        row = await self._pg.row(
            "update_app",
            f"""
            WITH was AS (
                SELECT {facts} FROM relying_parties r WHERE r.id = $1 AND r.updated_at = $8
            ), app AS (
                UPDATE relying_parties r
                SET name = $2, rp_id = $3, origins = $4, related_origins = $5, policy = $6,
                    updated_at = greatest($7, updated_at + interval '1 microsecond')
                WHERE id = $1 AND updated_at = $8 RETURNING id, updated_at, {facts}
            ), event AS ({event})
            SELECT r.id, (SELECT updated_at FROM app) AS updated_at
            FROM relying_parties r WHERE r.id = $1
            """,
            app.id,
            app.name,
            app.rp_id,
            list(app.origins),
            list(app.related_origins),
            app.policy.dump(),
            now,
            app.updated_at,
            *actor(),
        )
        if row is None:
            return None
        if row["updated_at"] is None:
            raise Conflict
        return replace(app, updated_at=row["updated_at"])

    async def delete(self, app_id: str, now: datetime) -> bool:
        """Delete a relying party with its keys, users and credentials. Its events stay, and
        `app.deleted` is added. False: no such app.
        """
        event = insert_event("'app.deleted'", "", at="$1", app_id="$2", by="$3, $4")

        async def delete(connection: Connection) -> bool:
            async with connection.transaction():
                deleted = "DELETE FROM relying_parties WHERE id = $1 RETURNING id"
                if await connection.fetchrow(deleted, app_id) is None:
                    return False
                # Last: readers of events wait for a transaction that writes an event, and the
                # deletion of a large app is slow.
                await connection.execute(event, now, app_id, *actor())
            return True

        return await self._pg.run("delete_app", delete)

    async def _find_batch(self, ids: Sequence[str], _: bool) -> Sequence[RelyingParty | None]:
        """The relying party with each id."""
        rows = await self._pg.rows(
            "app",
            # LIMIT 1 keeps the planner, which expects 10 rows of an array, from reading all apps.
            f"SELECT app.* FROM unnest($1::text[]) a(id) JOIN LATERAL"
            f" (SELECT {_APP} FROM relying_parties WHERE id = a.id LIMIT 1) app ON true",
            ids,
        )
        found = {row["id"]: _app_of(row) for row in rows}
        return [found.get(app_id) for app_id in ids]

    async def all(self) -> list[RelyingParty]:
        """Every relying party, oldest first."""
        rows = await self._pg.rows(
            "apps", f"SELECT {_APP} FROM relying_parties ORDER BY created_at, id"
        )
        return [_app_of(row) for row in rows]


def _app_of(row: asyncpg.Record) -> RelyingParty:
    return RelyingParty(
        **{
            **row,
            "origins": tuple(row["origins"]),
            "related_origins": tuple(row["related_origins"]),
            "policy": Policy.load(cast("dict[str, Any]", row["policy"])),
        }
    )
