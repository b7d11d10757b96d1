"""Relying parties, API keys, users, credentials and events, on Postgres.

**The write decides.** Unique indexes and `UPDATE … WHERE` answer "already there", "counter went
back" and "revoked meanwhile"; no method reads first and trusts what it read; a foreign key answers
"deleted meanwhile". Each step of a ceremony is one statement, and so one commit: a credential and
the event that tells of it stand or fall together.

**Events** are inserted by the statement that makes the change they tell of. Who acts and the
request id come from `telemetry.context()`.

**Ceremonies go together.** What every login and every registration asks is one statement for all
who ask at the same time: `broker.durable.sign_ins`, `broker.durable.registrations`.

Limits and faults are in `broker.durable.postgres`: whatever the server or the network does wrong is
`Unavailable`. Migrations are in `broker.durable.migrations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import asyncpg

from broker.durable.catalogue import Catalogue, UserOrder
from broker.durable.migrations import MigrationFault, Patience, sql_files
from broker.durable.postgres import Connection, Postgres
from broker.durable.registrations import Registrations
from broker.durable.rows import (
    APP,
    CREDENTIAL,
    ERASE,
    TELL,
    USER,
    USES,
    app_of,
    credential_of,
    owned_of,
    who,
)
from broker.durable.sign_ins import SignIns
from broker.errors import Conflict, UnknownUser
from broker.model import (
    ApiKey,
    Approval,
    Credential,
    Owned,
    RelyingParty,
    User,
)

__all__ = [
    "Catalogue",
    "Durable",
    "MigrationFault",
    "Patience",
    "Postgres",
    "UserOrder",
    "instant",
    "sql_files",
]


class Durable(SignIns, Registrations):
    """The durable store: every statement, beside its method."""

    def __init__(self, postgres: Postgres) -> None:
        SignIns.__init__(self, postgres)
        Registrations.__init__(self, postgres)

    # -- relying parties and keys ------------------------------------------------------------------

    async def create_app(self, app: RelyingParty, key: ApiKey, key_hash: bytes) -> None:
        """Insert a relying party with its first key."""
        await self._pg.row(
            "create_app",
            f"""
            WITH app AS (
                INSERT INTO relying_parties (id, name, rp_id, origins, related_origins, policy, created_at, updated_at)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $7) RETURNING id
            ), key AS (
                INSERT INTO api_keys (id, app_id, hash, hint, name, created_at) SELECT $8, id, $9, $10, $11, $7 FROM app
            )
            {TELL} SELECT $7, id, $12, 'app.created', NULL, NULL, 'done', NULL, $13 FROM app
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
            *who(),
        )

    async def update_app(self, app: RelyingParty, now: datetime) -> RelyingParty | None:
        """Replace name, RP ID, origins and policy of the version with this `updated_at`
        (compare-and-swap), which no two versions share. Returns the new version; None: no such app.

        Raises:
            Conflict: there is another version meanwhile.
        """
        row = await self._pg.row(
            "update_app",
            f"""
            WITH app AS (
                UPDATE relying_parties SET name = $2, rp_id = $3, origins = $4, related_origins = $5, policy = $6,
                       updated_at = greatest($7, updated_at + interval '1 microsecond')
                WHERE id = $1 AND updated_at = $8 RETURNING id, updated_at
            ), told AS ({TELL} SELECT $7, id, $9, 'app.updated', NULL, NULL, 'done', NULL, $10 FROM app)
            SELECT r.id, (SELECT updated_at FROM app) AS updated_at FROM relying_parties r WHERE r.id = $1
            """,
            app.id,
            app.name,
            app.rp_id,
            list(app.origins),
            list(app.related_origins),
            app.policy.dump(),
            now,
            app.updated_at,
            *who(),
        )
        if row is None:
            return None
        if row["updated_at"] is None:
            raise Conflict
        return replace(app, updated_at=row["updated_at"])

    async def delete_app(self, app_id: str, now: datetime) -> bool:
        """Delete a relying party with its keys, users and credentials. Its events stay, and one
        more. False: no such app.
        """

        async def delete(connection: Connection) -> bool:
            async with connection.transaction():
                deleted = "DELETE FROM relying_parties WHERE id = $1 RETURNING id"
                if await connection.fetchrow(deleted, app_id) is None:
                    return False
                # Last: readers of events wait for a transaction that writes one, and a large app
                # takes its time.
                told = f"{TELL} VALUES ($1, $2, $3, 'app.deleted', NULL, NULL, 'done', NULL, $4)"
                await connection.execute(told, now, app_id, *who())
            return True

        return await self._pg.run("delete_app", delete)

    async def app(self, app_id: str) -> RelyingParty | None:
        row = await self._pg.row(
            "app",
            f"SELECT {APP} FROM relying_parties WHERE id = $1",
            app_id,
        )
        return app_of(row) if row else None

    async def apps(self) -> list[RelyingParty]:
        rows = await self._pg.rows(
            "apps",
            f"SELECT {APP} FROM relying_parties ORDER BY created_at, id",
        )
        return [app_of(row) for row in rows]

    async def create_key(self, key: ApiKey, key_hash: bytes) -> bool:
        """Insert a key. False: no such app."""
        row = await self._pg.row(
            "create_key",
            f"""
            WITH key AS (
                INSERT INTO api_keys (id, app_id, hash, hint, name, created_at)
                SELECT $1, a.id, $3, $4, $5, $6 FROM relying_parties a WHERE a.id = $2 RETURNING app_id
            ), told AS ({TELL} SELECT $6, app_id, $7, 'key.created', NULL, NULL, 'done', $1, $8 FROM key)
            SELECT app_id FROM key
            """,
            key.id,
            key.app_id,
            key_hash,
            key.hint,
            key.name,
            key.created_at,
            *who(),
        )
        return row is not None

    async def keys(self, app_id: str) -> list[ApiKey]:
        rows = await self._pg.rows(
            "keys",
            "SELECT id, app_id, hint, name, created_at, revoked_at FROM api_keys WHERE app_id = $1 ORDER BY created_at, id",
            app_id,
        )
        return [ApiKey(**dict(row)) for row in rows]

    async def revoke_key(self, app_id: str, key_id: str, now: datetime) -> bool:
        """Revoke a key. False: no such key, or revoked before."""
        row = await self._pg.row(
            "revoke_key",
            f"""
            WITH key AS (
                UPDATE api_keys SET revoked_at = $3 WHERE app_id = $1 AND id = $2 AND revoked_at IS NULL RETURNING id, app_id
            ), told AS ({TELL} SELECT $3, app_id, $4, 'key.revoked', NULL, NULL, 'done', id, $5 FROM key)
            SELECT id FROM key
            """,
            app_id,
            key_id,
            now,
            *who(),
        )
        return row is not None

    async def key(self, key_hash: bytes) -> tuple[str, str] | None:
        """The id and the app of the unrevoked key with this hash."""
        row = await self._pg.row(
            "key",
            "SELECT id, app_id FROM api_keys WHERE hash = $1 AND revoked_at IS NULL",
            key_hash,
        )
        return (row["id"], row["app_id"]) if row else None

    # -- users -------------------------------------------------------------------------------------

    async def user(
        self, app_id: str, *, user_id: str | None = None, external_id: str | None = None
    ) -> User | None:
        row = await self._pg.row(
            "user",
            f"SELECT {USER} FROM users u {USES} WHERE u.app_id = $1 AND u.external_id IS NOT NULL AND "
            + ("u.id = $2" if user_id is not None else "u.external_id = $2"),
            app_id,
            user_id if user_id is not None else external_id,
        )
        return User(**dict(row)) if row else None

    async def delete_user(self, app_id: str, external_id: str, now: datetime) -> bool:
        """Delete a user with credentials and approvals. Events keep kind, time and our ids; of what
        a caller chose they hold the request's id, which is erased. False: no such user."""

        async def delete(connection: Connection) -> bool:
            async with connection.transaction():
                deleted = "DELETE FROM users WHERE app_id = $1 AND external_id = $2 RETURNING id"
                gone = await connection.fetchrow(deleted, app_id, external_id)
                if gone is None:
                    return False
                # A statement of its own sees what others committed while the first one waited for
                # them.
                await connection.execute(ERASE, [gone["id"]])
                told = f"{TELL} VALUES ($1, $2, $3, 'user.deleted', $4, NULL, 'done', NULL, $5)"
                actor, request_id = who()
                await connection.execute(told, now, app_id, actor, gone["id"], request_id)
            return True

        return await self._pg.run("delete_user", delete)

    # -- credentials -------------------------------------------------------------------------------

    async def credentials(self, app_id: str, user_id: str) -> list[Credential]:
        """The user's credentials, oldest first."""
        rows = await self._pg.rows(
            "credentials",
            f"SELECT {CREDENTIAL} FROM credentials c WHERE c.app_id = $1 AND c.user_id = $2 ORDER BY c.created_at, c.id",
            app_id,
            user_id,
        )
        return [credential_of(row) for row in rows]

    async def owned(self, app_id: str, credential_id: bytes) -> Owned | None:
        """The app's credential with this id, whoever owns it."""
        row = await self._pg.row(
            "credential",
            f"SELECT {CREDENTIAL}, u.external_id FROM credentials c JOIN users u ON u.id = c.user_id"
            " WHERE c.app_id = $1 AND c.credential_id = $2",
            app_id,
            credential_id,
        )
        return owned_of(row) if row else None

    async def owned_by_ids(self, app_id: str, passkey_ids: Sequence[str]) -> list[Owned]:
        """The app's credentials with these ids (`Credential.id`), oldest first."""
        rows = await self._pg.rows(
            "credentials_by_ids",
            f"SELECT {CREDENTIAL}, u.external_id FROM credentials c JOIN users u ON u.id = c.user_id"
            " WHERE c.app_id = $1 AND c.id = ANY($2::text[]) ORDER BY c.created_at, c.id",
            app_id,
            list(passkey_ids),
        )
        return [owned_of(row) for row in rows]

    async def held(self, rp_id: str, credential_id: bytes) -> bool:
        """Whether any app of this RP ID has a credential with this id: authenticators know RP IDs,
        not apps.
        """
        row = await self._pg.row(
            "held",
            "SELECT EXISTS (SELECT FROM relying_parties r JOIN credentials c ON c.app_id = r.id AND c.credential_id = $2"
            " WHERE r.rp_id = $1) AS held",
            rp_id,
            credential_id,
        )
        return row is not None and bool(row["held"])

    async def add_approval(
        self, app_id: str, user_id: str, approval: Approval, *, new_id: str, now: datetime
    ) -> bool:
        """Insert what a user is asked to approve. False: the app has used its identifier before.

        Raises:
            UnknownUser: deleted meanwhile.
        """
        try:
            row = await self._pg.row(
                "add_approval",
                "INSERT INTO approvals (id, app_id, user_id, identifier, data, created_at) VALUES ($1, $2, $3, $4, $5, $6)"
                " ON CONFLICT (app_id, identifier) DO NOTHING RETURNING id",
                new_id,
                app_id,
                user_id,
                approval.identifier,
                approval.data,
                now,
            )
        except asyncpg.ForeignKeyViolationError:
            raise UnknownUser from None
        return row is not None

    async def revoke_credentials(
        self, app_id: str, user_id: str, passkey_id: str | None, now: datetime
    ) -> list[str]:
        """Delete one of the user's credentials, or all of them (`passkey_id` None); returns the ids
        deleted.
        """
        return await self.revoke_these(
            app_id, user_id, None if passkey_id is None else [passkey_id], now
        )

    async def revoke_these(
        self, app_id: str, user_id: str, passkey_ids: Sequence[str] | None, now: datetime
    ) -> list[str]:
        """Delete those of the user's credentials that have one of these ids, all for None; returns
        the ids deleted.

        A user without an external id was there for its one passkey, and goes with it."""
        rows = await self._pg.rows(
            "revoke_credentials",
            f"""
            WITH gone AS (
                DELETE FROM credentials WHERE app_id = $1 AND user_id = $2 AND ($3::text[] IS NULL OR id = ANY($3))
                RETURNING id, app_id, user_id, use_count, last_used_at
            ), kept AS (
                UPDATE users SET past_logins = past_logins + (SELECT sum(use_count) FROM gone)::bigint,
                       past_login_at = greatest(past_login_at, (SELECT max(last_used_at) FROM gone)), updated_at = $4
                WHERE id = $2 AND external_id IS NOT NULL AND EXISTS (SELECT FROM gone)
            ), nobody AS (
                DELETE FROM users WHERE id = $2 AND external_id IS NULL AND EXISTS (SELECT FROM gone)
            ), told AS ({TELL} SELECT $4, app_id, $5, 'passkey.revoked', user_id, id, 'done', NULL, $6 FROM gone)
            SELECT id FROM gone
            """,
            app_id,
            user_id,
            passkey_ids,
            now,
            *who(),
        )
        return [row["id"] for row in rows]

    # -- events ------------------------------------------------------------------------------------

    async def tell(
        self,
        app_id: str,
        action: str,
        *,
        result: str,
        reason: str | None,
        user_id: str | None = None,
        passkey_id: str | None = None,
        now: datetime,
    ) -> None:
        """Insert an event of its own: for a refusal, which changes nothing else. It names nobody
        deleted meanwhile.
        """
        await self._pg.row(
            "tell",
            f"{TELL} SELECT $1, a.id, $3, $5, u.id, CASE WHEN u.id IS NOT NULL THEN $7 END, $8, $9, $4"
            " FROM relying_parties a LEFT JOIN users u ON u.app_id = a.id AND u.id = $6 WHERE a.id = $2",
            now,
            app_id,
            *who(),
            action,
            user_id,
            passkey_id,
            result,
            reason,
        )


def instant(epoch: float) -> datetime:
    """Seconds since the epoch as an aware `datetime`."""
    return datetime.fromtimestamp(epoch, UTC)
