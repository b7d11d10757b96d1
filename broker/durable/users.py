"""The table of users: an external id and a random handle of each.

A user without an external id exists for one passkey that has no owner yet. Such users are in no
list of users.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, cast

import asyncpg

from broker.durable.events import ERASE, actor, insert_event
from broker.durable.postgres import Connection, Postgres
from broker.errors import UnknownApp, UserDisabled
from broker.model import Named, User

UserOrder = Literal["created_at", "-created_at", "updated_at", "-updated_at", "id", "-id"]
_ORDERS: dict[UserOrder, str] = {
    "created_at": "u.created_at, u.id",
    "-created_at": "u.created_at DESC, u.id DESC",
    "updated_at": "u.updated_at, u.id",
    "-updated_at": "u.updated_at DESC, u.id DESC",
    "id": "u.id",
    "-id": "u.id DESC",
}
_STATUS = "CASE WHEN u.disabled_at IS NULL THEN u.status ELSE 'inactive' END"
_USER = f"""
    u.id, u.app_id, u.external_id, u.handle, {_STATUS} AS status, u.created_at, u.updated_at,
    u.past_logins + coalesce(k.uses, 0)::bigint AS login_count,
    greatest(u.past_login_at, k.used_at) AS last_login_at
"""
_USES = """
    LEFT JOIN LATERAL (
        SELECT sum(c.use_count) AS uses, max(c.last_used_at) AS used_at
        FROM credentials c WHERE c.user_id = u.id
    ) k ON true
"""


class Users:
    """The statements on users."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres

    async def ensure(
        self, app_id: str, external_id: str, *, new_id: str, new_handle: str, now: datetime
    ) -> tuple[Named, str]:
        """The user with this external id, and the handle. A missing user is inserted; parallel
        callers insert one row.

        A pending user is marked: a registration was opened, so the periodic clean-up passes over
        the row for another day.

        Raises:
            UserDisabled; UnknownApp: the app was deleted while a cache still had it.
        """
        event = insert_event(
            "'user.created'", "FROM new", at="$5", app_id="$1", by="$6, $7", user_id="id"
        )
        while True:
            try:
                row = await self._pg.row(
                    "ensure_user",
                    f"""
                    WITH old AS (
                        SELECT id, handle, status, epoch, disabled_at FROM users
                        WHERE app_id = $1 AND external_id = $2
                    ), opened AS (
                        UPDATE users SET opened_at = greatest(users.opened_at, $5) FROM old
                        WHERE users.id = old.id AND old.status <> 'active' RETURNING users.id
                    ), new AS (
                        INSERT INTO users (
                            id, app_id, external_id, handle, status, created_at, updated_at,
                            opened_at)
                        SELECT $3, $1, $2, $4, 'pending', $5, $5, $5
                        WHERE NOT EXISTS (SELECT FROM old)
                        ON CONFLICT (app_id, external_id) DO NOTHING
                        RETURNING id, handle, epoch, disabled_at
                    ), event AS ({event})
                    SELECT id, handle, epoch, disabled_at FROM old
                    WHERE status = 'active' OR id IN (SELECT id FROM opened)
                    UNION ALL SELECT id, handle, epoch, disabled_at FROM new
                    """,
                    app_id,
                    external_id,
                    new_id,
                    new_handle,
                    now,
                    *actor(),
                    app_id=app_id,
                )
            except asyncpg.ForeignKeyViolationError:
                raise UnknownApp from None
            if row is not None:
                if row["disabled_at"] is not None:
                    raise UserDisabled
                return Named(row["id"], external_id, row["epoch"]), row["handle"]
            # Another request has inserted or deleted the user after the snapshot: read again.

    async def find(
        self, app_id: str, *, user_id: str | None = None, external_id: str | None = None
    ) -> User | None:
        """A user, by the broker's id or by the external id."""
        row = await self._pg.row(
            "user",
            f"SELECT {_USER} FROM users u {_USES}"
            " WHERE u.app_id = $1 AND u.external_id IS NOT NULL AND "
            + ("u.id = $2" if user_id is not None else "u.external_id = $2"),
            app_id,
            user_id if user_id is not None else external_id,
        )
        return User(**dict(row)) if row else None

    async def page(
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
        """A page of users, and the number of all users."""
        conditions, values = (
            ["u.app_id = $1", "u.external_id IS NOT NULL"],
            cast("list[object]", [app_id]),
        )
        for condition, value in (
            ("u.external_id = ", external_id),
            ("u.id = ", user_id),
            (f"{_STATUS} = ", status),
            ("u.created_at < ", created_before),
        ):
            if value is not None:
                values.append(value)
                conditions.append(f"{condition}${len(values)}")
        where = " AND ".join(conditions)
        rows = await self._pg.rows(
            "users",
            f"""
            SELECT {_USER}, n.total FROM (SELECT count(*) AS total FROM users u WHERE {where}) n
            LEFT JOIN LATERAL (
                SELECT u.* FROM users u WHERE {where} ORDER BY {_ORDERS[order]}
                LIMIT ${len(values) + 1} OFFSET ${len(values) + 2}
            ) u ON true {_USES} ORDER BY {_ORDERS[order]}
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

    async def set_disabled(
        self, app_id: str, external_id: str, now: datetime, *, disabled: bool
    ) -> bool:
        """Disable or enable a user. A change raises the epoch, so what was begun before ends.
        False: no such user.

        A statement of its own marks the passkeys: it sees those that were added while the first
        one waited for the user's row.
        """
        action = "'user.disabled'" if disabled else "'user.enabled'"
        event = insert_event(action, "", at="$1", app_id="$2", by="$3, $4", user_id="$5")

        async def change(connection: Connection) -> bool:
            async with connection.transaction():
                find = (
                    "SELECT id, disabled_at IS NOT NULL AS disabled FROM users"
                    " WHERE app_id = $1 AND external_id = $2 FOR NO KEY UPDATE"
                )
                user = await connection.fetchrow(find, app_id, external_id)
                if user is None or user["disabled"] == disabled:
                    return user is not None
                update = (
                    "UPDATE users SET disabled_at = $2, updated_at = $3, epoch = epoch + 1"
                    " WHERE id = $1 RETURNING epoch"
                )
                since = now if disabled else None
                epoch = await connection.fetchval(update, user["id"], since, now)
                mark = "UPDATE credentials SET epoch = $2 WHERE user_id = $1"
                await connection.execute(mark, user["id"], epoch)
                await connection.execute(event, now, app_id, *actor(), user["id"])
            return True

        return await self._pg.run("disable_user", change, app_id=app_id)

    async def delete(self, app_id: str, external_id: str, now: datetime) -> bool:
        """Delete a user with credentials and approvals. Events keep kind, time and our ids; of what
        a caller chose they hold the request's id, which is erased. False: no such user."""
        event = insert_event("'user.deleted'", "", at="$1", app_id="$2", by="$3, $4", user_id="$5")

        async def delete(connection: Connection) -> bool:
            async with connection.transaction():
                deleted = "DELETE FROM users WHERE app_id = $1 AND external_id = $2 RETURNING id"
                user_id = await connection.fetchval(deleted, app_id, external_id)
                if user_id is None:
                    return False
                # A separate statement sees events that were committed while the first statement
                # waited.
                await connection.execute(ERASE, [user_id])
                await connection.execute(event, now, app_id, *actor(), user_id)
            return True

        return await self._pg.run("delete_user", delete, app_id=app_id)
