"""The table of API keys: digests, never keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from broker.durable.events import actor, insert_event
from broker.durable.postgres import Postgres
from broker.model import ApiKey


class ApiKeys:
    """The statements on API keys."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres
        self.find = postgres.group_commit("key", self._find_batch)

    async def create(self, key: ApiKey, key_hash: bytes) -> bool:
        """Insert a key. False: no such app."""
        event = insert_event("'key.created'", "FROM key", at="$6", by="$7, $8", reason="$1")
        row = await self._pg.row(
            "create_key",
            f"""
            WITH key AS (
                INSERT INTO api_keys (id, app_id, hash, hint, name, created_at)
                SELECT $1, a.id, $3, $4, $5, $6 FROM relying_parties a WHERE a.id = $2
                RETURNING app_id
            ), event AS ({event})
            SELECT app_id FROM key
            """,
            key.id,
            key.app_id,
            key_hash,
            key.hint,
            key.name,
            key.created_at,
            *actor(),
        )
        return row is not None

    async def of_app(self, app_id: str) -> list[ApiKey]:
        """The app's keys, oldest first."""
        rows = await self._pg.rows(
            "keys",
            "SELECT id, app_id, hint, name, created_at, revoked_at FROM api_keys"
            " WHERE app_id = $1 ORDER BY created_at, id",
            app_id,
        )
        return [ApiKey(**dict(row)) for row in rows]

    async def revoke(self, app_id: str, key_id: str, now: datetime) -> bool:
        """Revoke a key. False: no such key, or revoked before."""
        event = insert_event("'key.revoked'", "FROM key", at="$3", by="$4, $5", reason="id")
        row = await self._pg.row(
            "revoke_key",
            f"""
            WITH key AS (
                UPDATE api_keys SET revoked_at = $3
                WHERE app_id = $1 AND id = $2 AND revoked_at IS NULL
                RETURNING id, app_id
            ), event AS ({event})
            SELECT id FROM key
            """,
            app_id,
            key_id,
            now,
            *actor(),
        )
        return row is not None

    async def _find_batch(
        self, hashes: Sequence[bytes], _: bool
    ) -> Sequence[tuple[str, str] | None]:
        """The id and the app of the unrevoked key with each hash. A flood of unknown keys shares
        statements, and uses no more connections than other operations leave to it.
        """
        rows = await self._pg.rows(
            "key",
            "SELECT hash, id, app_id FROM api_keys"
            " WHERE hash = ANY($1::bytea[]) AND revoked_at IS NULL",
            hashes,
        )
        found = {row["hash"]: (row["id"], row["app_id"]) for row in rows}
        return [found.get(key_hash) for key_hash in hashes]
