"""The table of credentials ("passkeys"): look-ups and changes of keyed callers. The statements of
ceremonies are in `broker.durable.ceremonies`.

An ownerless credential belongs to a user without an external id, which is inserted and deleted with
the credential.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime

import asyncpg

from broker.durable.events import actor, insert_event
from broker.durable.postgres import Connection, Postgres
from broker.errors import OwnedAlready, UnknownPasskey
from broker.model import Credential, Owned

_FIELDS = tuple(field.name for field in fields(Credential))
_CREDENTIAL = ", ".join(f"c.{name}" for name in _FIELDS)
_OWNED = (
    f"SELECT {_CREDENTIAL}, u.external_id, u.epoch, u.disabled_at IS NOT NULL AS disabled"
    " FROM credentials c JOIN users u ON u.id = c.user_id"
)


class Credentials:
    """The statements on credentials."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres

    # -- look-ups ----------------------------------------------------------------------------------

    async def find(
        self, app_id: str, *, passkey_id: str | None = None, credential_id: bytes | None = None
    ) -> Owned | None:
        """The app's credential with this id (`Credential.id`) or with the authenticator's id."""
        row = await self._pg.row(
            "passkey",
            f"{_OWNED} WHERE c.app_id = $1 AND "
            + ("c.id" if passkey_id is not None else "c.credential_id")
            + " = $2",
            app_id,
            passkey_id if passkey_id is not None else credential_id,
        )
        return _owned_of(row) if row else None

    async def by_ids(self, app_id: str, passkey_ids: Sequence[str]) -> list[Owned]:
        """The app's credentials with these ids (`Credential.id`), oldest first."""
        rows = await self._pg.rows(
            "credentials_by_ids",
            f"{_OWNED} WHERE c.app_id = $1 AND c.id = ANY($2::text[]) ORDER BY c.created_at, c.id",
            app_id,
            list(passkey_ids),
        )
        return [_owned_of(row) for row in rows]

    async def of_user(self, app_id: str, user_id: str) -> list[Credential]:
        """The user's credentials, oldest first."""
        rows = await self._pg.rows(
            "credentials",
            f"SELECT {_CREDENTIAL} FROM credentials c WHERE c.app_id = $1 AND c.user_id = $2"
            " ORDER BY c.created_at, c.id",
            app_id,
            user_id,
        )
        return [_credential_of(row) for row in rows]

    async def of_external_id(self, app_id: str, external_id: str) -> list[Credential]:
        """The credentials of the user with this external id, oldest first."""
        rows = await self._pg.rows(
            "owned_by",
            f"SELECT {_CREDENTIAL} FROM credentials c JOIN users u ON u.id = c.user_id"
            " WHERE u.app_id = $1 AND u.external_id = $2 ORDER BY c.created_at, c.id",
            app_id,
            external_id,
        )
        return [_credential_of(row) for row in rows]

    async def exists(self, rp_id: str, credential_id: bytes) -> bool:
        """True if any app of this RP ID has a credential with this id: authenticators know RP IDs,
        not apps.
        """
        row = await self._pg.row(
            "held",
            "SELECT EXISTS (SELECT FROM relying_parties r"
            " JOIN credentials c ON c.app_id = r.id AND c.credential_id = $2"
            " WHERE r.rp_id = $1) AS held",
            rp_id,
            credential_id,
        )
        return row is not None and bool(row["held"])

    async def page(
        self, app_id: str, *, external_id: str | None, limit: int, offset: int, newest_first: bool
    ) -> tuple[list[Owned], int]:
        """A page of the app's passkeys, or of one user's, and how many there are in all."""
        order = "c.created_at DESC, c.id DESC" if newest_first else "c.created_at, c.id"
        where = "c.app_id = $1" + (
            " AND u.app_id = $1 AND u.external_id = $4" if external_id is not None else ""
        )
        values: list[object] = [
            app_id,
            limit,
            offset,
            *([external_id] if external_id is not None else []),
        ]
        rows = await self._pg.rows(
            "passkeys", f"{_OWNED} WHERE {where} ORDER BY {order} LIMIT $2 OFFSET $3", *values
        )
        # Every passkey has a user, so only a filter by user needs the join.
        of_user = " JOIN users u ON u.id = c.user_id" if external_id is not None else ""
        counted = await self._pg.row(
            "passkeys",
            f"SELECT count(*) AS total FROM credentials c{of_user} WHERE {where}"
            " AND $2::bigint IS NOT NULL AND $3::bigint IS NOT NULL",
            *values,
        )
        assert counted is not None, "an aggregate has one row"
        return [_owned_of(row) for row in rows], counted["total"]

    async def after(
        self, app_id: str, after: tuple[datetime, str] | None, limit: int
    ) -> list[Owned]:
        """The app's passkeys, oldest first, after the cursor `after` (time and id)."""
        rows = await self._pg.rows(
            "passkeys_after",
            f"{_OWNED} WHERE c.app_id = $1"
            + (" AND (c.created_at, c.id) > ($3, $4)" if after else "")
            + " ORDER BY c.created_at, c.id LIMIT $2",
            app_id,
            limit,
            *(after or ()),
        )
        return [_owned_of(row) for row in rows]

    # -- changes -----------------------------------------------------------------------------------

    async def rename(
        self,
        app_id: str,
        *,
        passkey_id: str | None = None,
        external_id: str | None = None,
        nickname: str | None = None,
        user_name: str | None = None,
        now: datetime,
    ) -> list[str]:
        """Change the `nickname` (for lists) or the user's name, of one passkey or of all of a user.
        Returns the passkeys' ids.
        """
        column = "nickname" if nickname is not None else "user_name"
        where = (
            "WHERE c.app_id = $1 AND c.id = $2"
            if passkey_id is not None
            else "FROM users u WHERE u.app_id = $1 AND u.external_id = $2 AND c.user_id = u.id"
        )
        event = insert_event(
            "'passkey.renamed'",
            "FROM changed",
            at="$4",
            by="$5, $6",
            user_id="user_id",
            passkey_id="id",
        )
        rows = await self._pg.rows(
            "rename",
            f"""
            WITH changed AS (
                UPDATE credentials c SET {column} = $3, updated_at = $4 {where}
                RETURNING c.app_id, c.user_id, c.id
            ), event AS ({event})
            SELECT id FROM changed
            """,
            app_id,
            passkey_id if passkey_id is not None else external_id,
            nickname if nickname is not None else user_name,
            now,
            *actor(),
            app_id=app_id,
        )
        return [row["id"] for row in rows]

    async def revoke(
        self, app_id: str, user_id: str, passkey_ids: Sequence[str] | None, now: datetime
    ) -> list[str]:
        """Delete those of the user's credentials that have one of these ids, or all (None) and with
        them what was begun for the user before; returns the ids deleted.

        A user without an external id is deleted with its passkey. The user's row is locked first:
        the next statement sees a passkey that was added meanwhile.
        """
        event = insert_event(
            "'passkey.revoked'",
            "FROM gone",
            at="$4",
            by="$5, $6",
            user_id="user_id",
            passkey_id="id",
        )
        revoke = f"""
            WITH gone AS (
                DELETE FROM credentials
                WHERE app_id = $1 AND user_id = $2 AND ($3::text[] IS NULL OR id = ANY($3))
                RETURNING id, app_id, user_id, use_count, last_used_at
            ), kept AS (
                UPDATE users
                SET past_logins = past_logins + (SELECT sum(use_count) FROM gone)::bigint,
                    past_login_at = greatest(past_login_at, (SELECT max(last_used_at) FROM gone)),
                    updated_at = $4
                WHERE id = $2 AND external_id IS NOT NULL AND EXISTS (SELECT FROM gone)
            ), nobody AS (
                DELETE FROM users
                WHERE id = $2 AND external_id IS NULL AND EXISTS (SELECT FROM gone)
            ), event AS ({event})
            SELECT id FROM gone
            """

        async def work(connection: Connection) -> list[str]:
            async with connection.transaction():
                lock = (
                    "UPDATE users SET epoch = epoch + 1 WHERE app_id = $1 AND id = $2"
                    if passkey_ids is None
                    else "SELECT FROM users WHERE app_id = $1 AND id = $2 FOR NO KEY UPDATE"
                )
                await connection.execute(lock, app_id, user_id)
                rows = await connection.fetch(revoke, app_id, user_id, passkey_ids, now, *actor())
            return [row["id"] for row in rows]

        return await self._pg.run("revoke_credentials", work, app_id=app_id)

    async def assign(
        self,
        app_id: str,
        passkey_id: str,
        external_id: str,
        *,
        new_id: str,
        new_handle: str,
        now: datetime,
    ) -> None:
        """Give an ownerless passkey to a user. A missing user is inserted with `new_id` and
        `new_handle`. The second of two callers inserts no user.

        Raises:
            UnknownPasskey, OwnedAlready.
        """
        event = insert_event(
            "'passkey.assigned'",
            "",
            at="$1",
            app_id="$2",
            by="$3, $4",
            user_id="$5",
            passkey_id="$6",
        )

        async def give(connection: Connection) -> bool | None:
            async with connection.transaction():
                # The lock on the user without an external id makes a second caller wait. Its next
                # statement sees the result of the first.
                live, nobody = None, ""
                while live is None:
                    find = (
                        "SELECT c.user_id, u.external_id IS NOT NULL AS owned FROM credentials c"
                        " JOIN users u ON u.id = c.user_id WHERE c.app_id = $1 AND c.id = $2"
                    )
                    old = await connection.fetchrow(find, app_id, passkey_id)
                    if old is None:
                        return None
                    if old["owned"]:
                        return False
                    nobody = old["user_id"]
                    lock = "SELECT FROM users WHERE id = $1 FOR UPDATE"
                    await connection.execute(lock, nobody)
                    lock = "SELECT live FROM credentials WHERE user_id = $1 AND id = $2 FOR UPDATE"
                    live = await connection.fetchval(lock, nobody, passkey_id)
                user_id = await self._user(connection, app_id, external_id, new_id, new_handle, now)
                # The nonce of a passkey without an owner has the first epoch, and stays valid.
                update = (
                    "UPDATE credentials c SET user_id = u.id, updated_at = $4,"
                    " epoch = CASE WHEN u.disabled_at IS NULL THEN c.epoch ELSE u.epoch END"
                    " FROM users u WHERE c.app_id = $1 AND c.id = $2 AND u.id = $3"
                )
                await connection.execute(update, app_id, passkey_id, user_id, now)
                if live:
                    activate = "UPDATE users SET status = 'active', updated_at = $2 WHERE id = $1"
                    await connection.execute(activate, user_id, now)
                await connection.execute("DELETE FROM users WHERE id = $1", nobody)
                await connection.execute(event, now, app_id, *actor(), user_id, passkey_id)
            return True

        given = await self._pg.run("assign", give, app_id=app_id)
        if given is None:
            raise UnknownPasskey
        if not given:
            raise OwnedAlready

    @staticmethod
    async def _user(
        connection: Connection,
        app_id: str,
        external_id: str,
        new_id: str,
        new_handle: str,
        now: datetime,
    ) -> str:
        """The id of the user, inserted if missing, and locked against deletion until the
        transaction ends.
        """
        event = insert_event("'user.created'", "", at="$1", app_id="$2", by="$3, $4", user_id="$5")
        while True:
            find = "SELECT id FROM users WHERE app_id = $1 AND external_id = $2 FOR UPDATE"
            found: str | None = await connection.fetchval(find, app_id, external_id)
            if found is not None:
                return found
            make = (
                "INSERT INTO users"
                " (id, app_id, external_id, handle, status, created_at, updated_at)"
                " VALUES ($1, $2, $3, $4, 'pending', $5, $5)"
                " ON CONFLICT (app_id, external_id) DO NOTHING RETURNING id"
            )
            if await connection.fetchval(make, new_id, app_id, external_id, new_handle, now):
                await connection.execute(event, now, app_id, *actor(), new_id)
                return new_id
            # Another request has inserted the user: read again.


def _credential_of(row: asyncpg.Record) -> Credential:
    values = {name: row[name] for name in _FIELDS}
    return Credential(**values | {"transports": tuple(row["transports"])})


def _owned_of(row: asyncpg.Record) -> Owned:
    """A credential's columns, and its user's."""
    return Owned(_credential_of(row), row["external_id"], row["epoch"], row["disabled"])
