"""What keyed callers and operators look up and change outside of ceremonies: users, passkeys by
page, approvals, the audit log (`broker.durable.events`).

Users without an external id (nobody owns their passkey yet) are in no list of users; their passkeys
are in the lists of passkeys.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, cast

from broker.durable.events import Events
from broker.durable.postgres import Connection, Postgres
from broker.durable.rows import CREDENTIAL, TELL, USER, USES, owned_of, who
from broker.errors import OwnedAlready, UnknownPasskey
from broker.model import ApprovalRecord, Owned, User

UserOrder = Literal["created_at", "-created_at", "updated_at", "-updated_at", "id", "-id"]
_ORDERS: dict[UserOrder, str] = {
    "created_at": "u.created_at, u.id",
    "-created_at": "u.created_at DESC, u.id DESC",
    "updated_at": "u.updated_at, u.id",
    "-updated_at": "u.updated_at DESC, u.id DESC",
    "id": "u.id",
    "-id": "u.id DESC",
}
_OWNED = f"SELECT {CREDENTIAL}, u.external_id FROM credentials c JOIN users u ON u.id = c.user_id"


class Catalogue(Events):
    """The statements, each beside its method."""

    def __init__(self, postgres: Postgres) -> None:
        Events.__init__(self, postgres)

    # -- users -------------------------------------------------------------------------------------

    async def users(
        self,
        app_id: str,
        *,
        limit: int,
        offset: int = 0,
        external_id: str | None = None,
        user_id: str | None = None,
        status: str | None = None,
        created_before: datetime | None = None,
        order: UserOrder = "created_at",
    ) -> tuple[list[User], int]:
        """A page of users and how many there are in all."""
        conditions, values = (
            ["u.app_id = $1", "u.external_id IS NOT NULL"],
            cast("list[object]", [app_id]),
        )
        for condition, value in (
            ("u.external_id = ", external_id),
            ("u.id = ", user_id),
            ("u.status = ", status),
            ("u.created_at < ", created_before),
        ):
            if value is not None:
                values.append(value)
                conditions.append(f"{condition}${len(values)}")
        where = " AND ".join(conditions)
        rows = await self._pg.rows(
            "users",
            f"""
            SELECT {USER}, n.total FROM (SELECT count(*) AS total FROM users u WHERE {where}) n
            LEFT JOIN LATERAL (
                SELECT u.* FROM users u WHERE {where} ORDER BY {_ORDERS[order]}
                LIMIT ${len(values) + 1} OFFSET ${len(values) + 2}
            ) u ON true {USES} ORDER BY {_ORDERS[order]}
            """,
            *values,
            limit,
            offset,
        )
        users = [
            User(**{k: v for k, v in row.items() if k != "total"})
            for row in rows
            if row["id"] is not None
        ]
        return users, rows[0]["total"]

    # -- passkeys ----------------------------------------------------------------------------------

    async def passkey(
        self, app_id: str, *, passkey_id: str | None = None, credential_id: bytes | None = None
    ) -> Owned | None:
        """One passkey of the app, by our id or by its credential id."""
        row = await self._pg.row(
            "passkey",
            f"{_OWNED} WHERE c.app_id = $1 AND "
            + ("c.id" if passkey_id is not None else "c.credential_id")
            + " = $2",
            app_id,
            passkey_id if passkey_id is not None else credential_id,
        )
        return owned_of(row) if row else None

    async def passkeys(
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
        # Every passkey has a user, so whose they are matters only where one is asked for.
        of_user = " JOIN users u ON u.id = c.user_id" if external_id is not None else ""
        counted = await self._pg.row(
            "passkeys",
            f"SELECT count(*) AS total FROM credentials c{of_user} WHERE {where}"
            " AND $2::bigint IS NOT NULL AND $3::bigint IS NOT NULL",
            *values,
        )
        assert counted is not None, "an aggregate has one row"
        return [owned_of(row) for row in rows], counted["total"]

    async def owned_by(self, app_id: str, external_id: str) -> list[Owned]:
        """All passkeys of a user, oldest first."""
        rows = await self._pg.rows(
            "owned_by",
            f"{_OWNED} WHERE u.app_id = $1 AND u.external_id = $2 ORDER BY c.created_at, c.id",
            app_id,
            external_id,
        )
        return [owned_of(row) for row in rows]

    async def passkeys_after(
        self, app_id: str, after: tuple[datetime, str] | None, limit: int
    ) -> list[Owned]:
        """The app's passkeys in the order of their making, behind `after` (when and which)."""
        rows = await self._pg.rows(
            "passkeys_after",
            f"{_OWNED} WHERE c.app_id = $1"
            + (" AND (c.created_at, c.id) > ($3, $4)" if after else "")
            + " ORDER BY c.created_at, c.id LIMIT $2",
            app_id,
            limit,
            *(after or ()),
        )
        return [owned_of(row) for row in rows]

    async def rename(self, app_id: str, passkey_id: str, nickname: str, now: datetime) -> bool:
        """Change what lists show of a passkey. False: no such passkey."""
        row = await self._pg.row(
            "rename",
            f"""
            WITH changed AS (
                UPDATE credentials SET nickname = $3, updated_at = $4 WHERE app_id = $1 AND id = $2 RETURNING app_id, user_id, id
            ), told AS ({TELL} SELECT $4, app_id, $5, 'passkey.renamed', user_id, id, 'done', NULL, $6 FROM changed)
            SELECT id FROM changed
            """,
            app_id,
            passkey_id,
            nickname,
            now,
            *who(),
        )
        return row is not None

    async def rename_user(
        self, app_id: str, external_id: str, user_name: str, now: datetime
    ) -> list[str]:
        """Change the user's name on every passkey of theirs; returns the passkeys' ids."""
        rows = await self._pg.rows(
            "rename_user",
            f"""
            WITH changed AS (
                UPDATE credentials c SET user_name = $3, updated_at = $4 FROM users u
                WHERE u.app_id = $1 AND u.external_id = $2 AND c.user_id = u.id RETURNING c.app_id, c.user_id, c.id
            ), told AS ({TELL} SELECT $4, app_id, $5, 'passkey.renamed', user_id, id, 'done', NULL, $6 FROM changed)
            SELECT id FROM changed
            """,
            app_id,
            external_id,
            user_name,
            now,
            *who(),
        )
        return [row["id"] for row in rows]

    async def rename_user_of(
        self, app_id: str, passkey_id: str, user_name: str, now: datetime
    ) -> bool:
        """Change the user's name on one passkey. False: no such passkey."""
        row = await self._pg.row(
            "rename_user_of",
            f"""
            WITH changed AS (
                UPDATE credentials SET user_name = $3, updated_at = $4 WHERE app_id = $1 AND id = $2 RETURNING app_id, user_id, id
            ), told AS ({TELL} SELECT $4, app_id, $5, 'passkey.renamed', user_id, id, 'done', NULL, $6 FROM changed)
            SELECT id FROM changed
            """,
            app_id,
            passkey_id,
            user_name,
            now,
            *who(),
        )
        return row is not None

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
        """Give a passkey that nobody owns to a user, who is made with `new_id` and `new_handle` if
        there is none. Whoever comes second makes nobody.

        Raises:
            UnknownPasskey, OwnedAlready.
        """

        async def give(connection: Connection) -> bool | None:
            async with connection.transaction():
                # The lock makes a second caller wait; the statement after it sees what the first
                # one did.
                lock = (
                    "SELECT user_id, live FROM credentials WHERE app_id = $1 AND id = $2 FOR UPDATE"
                )
                old = await connection.fetchrow(lock, app_id, passkey_id)
                if old is None:
                    return None
                owned = "SELECT external_id IS NOT NULL FROM users WHERE id = $1"
                if await connection.fetchval(owned, old["user_id"]):
                    return False
                user_id = await self._user(connection, app_id, external_id, new_id, new_handle, now)
                update = "UPDATE credentials SET user_id = $3, updated_at = $4 WHERE app_id = $1 AND id = $2"
                await connection.execute(update, app_id, passkey_id, user_id, now)
                if old["live"]:
                    activate = "UPDATE users SET status = 'active', updated_at = $2 WHERE id = $1"
                    await connection.execute(activate, user_id, now)
                await connection.execute("DELETE FROM users WHERE id = $1", old["user_id"])
                told = f"{TELL} VALUES ($1, $2, $3, 'passkey.assigned', $4, $5, 'done', NULL, $6)"
                actor, request_id = who()
                await connection.execute(told, now, app_id, actor, user_id, passkey_id, request_id)
            return True

        given = await self._pg.run("assign", give)
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
        """The id of the user, made if there is none, and kept from being deleted until the
        transaction ends.
        """
        while True:
            find = "SELECT id FROM users WHERE app_id = $1 AND external_id = $2 FOR UPDATE"
            found: str | None = await connection.fetchval(find, app_id, external_id)
            if found is not None:
                return found
            make = (
                "INSERT INTO users (id, app_id, external_id, handle, status, created_at, updated_at)"
                " VALUES ($1, $2, $3, $4, 'pending', $5, $5) ON CONFLICT (app_id, external_id) DO NOTHING RETURNING id"
            )
            if (
                await connection.fetchval(make, new_id, app_id, external_id, new_handle, now)
                is not None
            ):
                told = f"{TELL} VALUES ($1, $2, $3, 'user.created', $4, NULL, 'done', NULL, $5)"
                actor, request_id = who()
                await connection.execute(told, now, app_id, actor, new_id, request_id)
                return new_id
            # Somebody was faster: the next look sees that user.

    # -- approvals ---------------------------------------------------------------------------------

    async def approvals(self, app_id: str, user_id: str) -> list[ApprovalRecord]:
        """What a user was asked to approve, oldest first."""
        rows = await self._pg.rows(
            "approvals",
            "SELECT id, user_id, identifier, data, created_at, approved_at FROM approvals"
            " WHERE app_id = $1 AND user_id = $2 ORDER BY created_at, id",
            app_id,
            user_id,
        )
        return [ApprovalRecord(**dict(row)) for row in rows]
