"""Keys that sign tokens, on Postgres: of each app, and of the broker itself.

A *set* has the keys that the verifiers of one app trust. Wire formats whose key set names no app
share the broker's own set (`app_id` None). In each set every algorithm has its own line of keys,
numbered by `generation`. The write decides: no number occurs twice in a line. So if two instances
find no key and each generate a key, one key is stored, and the other instance reads it. A rotation
is one statement. It inserts the next key, sets the time at which each older key leaves the set, and
deletes keys whose time has passed.

Private keys are stored sealed only (`broker.tokens.signed`). An app's keys are deleted with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg

from broker.durable.events import actor, insert_event
from broker.durable.postgres import Postgres
from broker.errors import UnknownApp
from broker.model import TokenAlgorithm


@dataclass(frozen=True, slots=True)
class StoredKey:
    """One row. `public` is the JSON Web Key; `retires_at` is when it leaves the set, None while no
    key follows it.
    """

    id: str
    app_id: str | None
    algorithm: TokenAlgorithm
    generation: int
    sealed: bytes = field(repr=False)
    public: Mapping[str, str]
    created_at: datetime
    signs_from: datetime
    retires_at: datetime | None = None

    @property
    def scope(self) -> str:
        """The app's id, "" for the broker's own set."""
        return self.app_id or ""


class SigningKeys:
    """The statements on signing keys, each beside its method."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres

    async def of(self, app_id: str | None) -> list[StoredKey]:
        """The keys of a set by algorithm, oldest first; also those that have left it and are not
        deleted yet.
        """
        rows = await self._pg.rows(
            "signing_keys",
            "SELECT id, app_id, algorithm, generation, sealed, public, created_at,"
            " signs_from, retires_at"
            " FROM signing_keys WHERE scope = $1 ORDER BY algorithm, generation",
            app_id or "",
        )
        return [StoredKey(**dict(row)) for row in rows]

    async def all(self) -> list[StoredKey]:
        """The keys of every set."""
        rows = await self._pg.rows(
            "all_signing_keys",
            "SELECT id, app_id, algorithm, generation, sealed, public, created_at,"
            " signs_from, retires_at"
            " FROM signing_keys ORDER BY scope, algorithm, generation",
        )
        return [StoredKey(**dict(row)) for row in rows]

    async def add_first(self, key: StoredKey, *, rotated: bool = False) -> None:
        """Insert the first key of a line, unless the line has a key: read the set afterwards. If an
        operator asked for the key (`rotated`), the event is `signing_key.rotated`.

        Raises:
            UnknownApp: the app was deleted while a cache still had it.
        """
        try:
            await self._pg.row(
                "add_signing_key",
                f"""
                WITH new AS (
                    INSERT INTO signing_keys (
                        id, app_id, algorithm, generation, sealed, public, created_at, signs_from)
                    SELECT $1, $2::text, $3::text, 1, $4, $5, $6, $7
                    WHERE NOT EXISTS (
                        SELECT FROM signing_keys
                        WHERE scope = coalesce($2, '') AND algorithm = $3
                    )
                    ON CONFLICT (scope, algorithm, generation) DO NOTHING
                    RETURNING app_id, created_at
                )
                {_insert_rotated("FROM new WHERE $8")}
                """,
                key.id,
                key.app_id,
                key.algorithm,
                key.sealed,
                key.public,
                key.created_at,
                key.signs_from,
                rotated,
                *actor(),
            )
        except asyncpg.ForeignKeyViolationError:
            raise UnknownApp from None

    async def rotate(self, key: StoredKey, *, others_retire_at: datetime) -> None:
        """Insert the next key of its line. Older ones leave the set at `others_retire_at`, or when
        they were to leave before that; those of the set that have left it are deleted.
        `key.generation` is not looked at. The event is `signing_key.rotated`, of the broker's own
        set under the app id "".

        Raises:
            UnknownApp: there is no such app.
        """
        try:
            while not await self._rotate(key, others_retire_at):
                pass  # another rotation took the number after the snapshot: read again
        except asyncpg.ForeignKeyViolationError:
            raise UnknownApp from None

    async def _rotate(self, key: StoredKey, others_retire_at: datetime) -> bool:
        row = await self._pg.row(
            "rotate_signing_key",
            f"""
            WITH line AS (
                SELECT id, generation, retires_at FROM signing_keys
                WHERE scope = coalesce($2::text, '') AND algorithm = $3::text
            ), new AS (
                INSERT INTO signing_keys (
                    id, app_id, algorithm, generation, sealed, public, created_at, signs_from)
                SELECT $1, $2, $3, (SELECT coalesce(max(generation), 0) + 1 FROM line),
                    $4, $5, $6::timestamptz, $7
                ON CONFLICT (scope, algorithm, generation) DO NOTHING
                RETURNING id, app_id, created_at
            ), older AS (
                UPDATE signing_keys k SET retires_at = least(k.retires_at, $8) FROM line, new
                WHERE k.id = line.id AND (k.retires_at IS NULL OR k.retires_at > $6)
            ), gone AS (
                DELETE FROM signing_keys k USING new
                WHERE k.scope = coalesce($2, '') AND k.retires_at <= $6
            ), event AS ({_insert_rotated("FROM new")})
            SELECT id FROM new
            """,
            key.id,
            key.app_id,
            key.algorithm,
            key.sealed,
            key.public,
            key.created_at,
            key.signs_from,
            others_retire_at,
            *actor(),
        )
        return row is not None

    async def reseal(self, key: StoredKey, sealed: bytes, now: datetime) -> bool:
        """Replace the sealed form of a key. The event is `signing_key.resealed`, under the app id
        as a rotation's. False: the key was resealed or deleted since it was read.
        """
        event = insert_event(
            "'signing_key.resealed'",
            "FROM key",
            at="$4",
            app_id="coalesce(app_id, '')",
            by="$5, $6",
        )
        row = await self._pg.row(
            "reseal_signing_key",
            f"""
            WITH key AS (
                UPDATE signing_keys SET sealed = $3 WHERE id = $1 AND sealed = $2
                RETURNING id, app_id
            ), event AS ({event})
            SELECT id FROM key
            """,
            key.id,
            key.sealed,
            sealed,
            now,
            *actor(),
        )
        return row is not None


def _insert_rotated(source: str) -> str:
    return insert_event(
        "'signing_key.rotated'",
        source,
        at="created_at",
        app_id="coalesce(app_id, '')",
        by="$9, $10",
    )
