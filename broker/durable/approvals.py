"""The table of approvals: payloads that users approve by signing, and the time of each
signature."""

from __future__ import annotations

from datetime import datetime

import asyncpg

from broker.durable.postgres import Postgres
from broker.errors import UnknownUser
from broker.model import Approval, ApprovalRecord


class Approvals:
    """The statements on approvals. The write of the sign-in sets `approved_at`
    (`Credentials.use`).
    """

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres

    async def add(
        self, app_id: str, user_id: str, approval: Approval, *, new_id: str, now: datetime
    ) -> bool:
        """Insert an approval. False: the app has used its identifier before.

        Raises:
            UnknownUser: deleted meanwhile.
        """
        try:
            row = await self._pg.row(
                "add_approval",
                "INSERT INTO approvals (id, app_id, user_id, identifier, data, created_at)"
                " VALUES ($1, $2, $3, $4, $5, $6)"
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

    async def of_user(self, app_id: str, user_id: str) -> list[ApprovalRecord]:
        """The approvals of a user, signed or not, oldest first."""
        rows = await self._pg.rows(
            "approvals",
            "SELECT id, user_id, identifier, data, created_at, approved_at FROM approvals"
            " WHERE app_id = $1 AND user_id = $2 ORDER BY created_at, id",
            app_id,
            user_id,
        )
        return [ApprovalRecord(**dict(row)) for row in rows]
