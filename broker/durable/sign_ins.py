"""What every login asks of Postgres, and nothing else does: who may answer, and the record of who
did.

Both are one statement for all callers who come at the same time (`broker.durable.group_commit`).

The update decides about revocation and counters, against the row as it locked it. For several
callers it waits for no row: one that another transaction holds is passed over, as are those it may
not use, and only a caller who is alone waits and is told that there is none. So one row that is
held up holds up nobody else, and no two statements can wait for each other in a circle.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import NamedTuple

from broker.durable.group_commit import NEEDS_OWN_STATEMENT, OwnStatement
from broker.durable.postgres import Postgres
from broker.durable.rows import OFFERED, TELL, Callers, offered_of, who
from broker.model import AllowedCredential, Credential, SignInOutcome, VerifiedAuthentication


class _Use(NamedTuple):
    """A sign-in to record."""

    id: str
    app_id: str
    sign_count: int
    backed_up: bool
    at: datetime
    flag_counter: bool
    actor: str
    request_id: str
    action: str
    approval: str | None


class _Asked(NamedTuple):
    """Whose passkeys may answer."""

    app_id: str
    external_id: str
    second_factor: bool


_USES, _ASKED = Callers(_Use), Callers(_Asked)


class SignIns:
    """The two statements of a login."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres
        self._sign_in = postgres.group_commit("user_to_sign_in", self._users_to_sign_in)
        self._use = postgres.group_commit(
            "use_credential", self._use_credentials, key=lambda use: use.id
        )

    def user_to_sign_in(
        self, app_id: str, external_id: str, *, second_factor: bool = False
    ) -> Awaitable[tuple[str, str, list[AllowedCredential]] | None]:
        """Id, handle and the live passkeys, oldest first; with `second_factor` second factors are
        among them.
        """
        return self._sign_in(_Asked(app_id, external_id, second_factor))

    async def _users_to_sign_in(
        self, asked: Sequence[_Asked], _: bool
    ) -> list[tuple[str, str, list[AllowedCredential]] | None]:
        table, values = _ASKED.table(asked)
        rows = await self._pg.rows(
            "user_to_sign_in",
            f"SELECT a.number, u.id AS owner, u.handle, {OFFERED} FROM {table}"
            # LIMIT 1 changes nothing, the pair is unique, but keeps the planner from reading all
            # users: it takes the callers for 100.
            " JOIN LATERAL (SELECT id, handle FROM users WHERE app_id = a.app_id AND external_id = a.external_id LIMIT 1) u ON true"
            " LEFT JOIN credentials c ON c.user_id = u.id AND c.live AND (a.second_factor OR NOT c.second_factor)"
            " ORDER BY a.number, c.created_at, c.id",
            *values,
        )
        found: list[tuple[str, str, list[AllowedCredential]] | None] = [None] * len(asked)
        for row in rows:
            number = row["number"]
            user = found[number]
            if user is None:
                user = found[number] = (row["owner"], row["handle"], [])
            if row["id"] is not None:
                user[2].append(offered_of(row))
        return found

    def use_credential(
        self,
        credential: Credential | AllowedCredential,
        verified: VerifiedAuthentication,
        *,
        flag_counter: bool,
        action: str = "passkey.used",
        approval: str | None = None,
        now: datetime,
    ) -> Awaitable[SignInOutcome | None]:
        """Record a sign-in, and what was approved by it. None: revoked meanwhile, or the counter
        went back (unless `flag_counter`).

        What changed is judged against the locked row: of two clones that answer at once, one is
        told. Source: WebAuthn L3 §7.2, "If authData.signCount is nonzero or
        credentialRecord.signCount is nonzero".
        """
        return self._use(
            _Use(
                credential.id,
                credential.app_id,
                verified.sign_count,
                verified.backed_up,
                now,
                flag_counter,
                *who(),
                action,
                approval,
            )
        )

    async def _use_credentials(
        self, uses: Sequence[_Use], alone: bool
    ) -> list[SignInOutcome | OwnStatement | None]:
        """Each of another credential. The array in the update's condition keeps the planner from
        reading the table, as above.
        """
        approve = (
            ", approve AS (UPDATE approvals p SET approved_at = u.at FROM used u WHERE p.app_id = u.app_id AND p.identifier = u.approval)"
            if any(use.approval is not None for use in uses)
            else ""
        )
        table, values = _USES.table(uses)
        rows = await self._pg.rows(
            "use_credential",
            f"""
            WITH old AS (
                SELECT a.*, c.user_id, c.backed_up AS was_backed_up,
                       NOT (c.sign_count < a.sign_count OR (c.sign_count = 0 AND a.sign_count = 0)) AS regressed
                FROM {table}
                CROSS JOIN LATERAL (
                    SELECT c.user_id, c.backed_up, c.sign_count FROM credentials c
                    WHERE c.id = a.id AND c.app_id = a.app_id AND c.live FOR UPDATE {"" if alone else "SKIP LOCKED"}
                ) c
            ), used AS (
                UPDATE credentials c
                SET sign_count = greatest(c.sign_count, old.sign_count), backed_up = old.backed_up, last_used_at = old.at,
                    updated_at = old.at, use_count = c.use_count + 1
                FROM old WHERE c.id = ANY (ARRAY(SELECT id FROM old)) AND c.id = old.id AND (old.flag_counter OR NOT old.regressed)
                RETURNING old.*
            ), told AS (
                {TELL} SELECT at, app_id, actor, action, user_id, id, 'done', CASE WHEN regressed THEN 'counter' END, request_id FROM used
            ){approve}
            SELECT number, regressed, was_backed_up <> backed_up AS backup_changed FROM used
            """,
            *values,
        )
        found: list[SignInOutcome | OwnStatement | None] = [
            None if alone else NEEDS_OWN_STATEMENT
        ] * len(uses)
        for number, regressed, backup_changed in rows:
            found[number] = SignInOutcome(regressed, backup_changed)
        return found
