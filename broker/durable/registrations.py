"""What every registration asks of Postgres: whose it is, what they have, the new passkey, and that
its nonce was redeemed.

Each is one statement for all callers who come at the same time (`broker.durable.group_commit`).

For several callers a statement waits for no row: where the app is being deleted, or the user or the
passkey is in somebody else's hands, it passes over that caller, who then gets a statement alone,
which waits. What no statement can pass over is another's insert of the same user or the same
passkey, not yet committed: these come in the order of their names, so that no two statements wait
for each other in a circle, and whoever is waited for waits for nothing else. The app is locked
before the user, as who deletes an app goes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Literal, NamedTuple

import asyncpg

from broker.durable.group_commit import NEEDS_OWN_STATEMENT, OwnStatement
from broker.durable.postgres import Postgres
from broker.durable.rows import TELL, UNCONFIRMED, Callers, who
from broker.errors import UnknownApp
from broker.model import PendingRegistration, VerifiedRegistration, action_of

Outcome = Literal["added", "duplicate", "no_user", "too_many_passkeys"]


class _User(NamedTuple):
    """A user to find, or to make."""

    app_id: str
    external_id: str
    new_id: str
    new_handle: str
    at: datetime
    actor: str
    request_id: str


class _Passkey(NamedTuple):
    """A passkey to store; bytes in hexadecimal."""

    id: str
    app_id: str
    user_id: str
    credential_id: str
    user_handle: str
    public_key: str
    algorithm: int
    sign_count: int
    backup_eligible: bool
    backed_up: bool
    transports: tuple[str, ...]
    attachment: str | None
    aaguid: str
    attestation_format: str
    attestation_trust: str
    user_name: str
    user_display_name: str
    nickname: str
    live: bool
    confirmed_at: datetime | None
    second_factor: bool
    at: datetime
    actor: str
    request_id: str
    action: str
    max_passkeys: int
    counted_from: datetime


class _Confirmation(NamedTuple):
    """A passkey whose nonce was redeemed."""

    id: str
    app_id: str
    at: datetime
    actor: str
    request_id: str


class _Owner(NamedTuple):
    """A user whose passkeys are asked for."""

    app_id: str
    user_id: str
    counted_from: datetime


_USERS, _OWNERS, _PASSKEYS, _CONFIRMATIONS = map(Callers, (_User, _Owner, _Passkey, _Confirmation))


class ExcludedCredential(NamedTuple):
    """What a new registration must know of a passkey that its user has."""

    credential_id: bytes
    transports: tuple[str, ...]
    live: bool


class Registrations:
    """The statements of a registration."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres
        self._user = postgres.group_commit(
            "ensure_user", self._ensure_users, key=lambda user: (user.app_id, user.external_id)
        )
        self._held = postgres.group_commit("held_by", self._held_by)
        self._add: Callable[[_Passkey], Awaitable[Outcome]] = postgres.group_commit(
            "add_credential",
            self._add_credentials,
            key=lambda new: (new.app_id, new.credential_id),
        )
        self._confirm = postgres.group_commit(
            "confirm_credential",
            self._confirm_credentials,
            key=lambda confirmation: confirmation.id,
        )

    # -- whose it is -------------------------------------------------------------------------------

    async def ensure_user(
        self, app_id: str, external_id: str, *, new_id: str, new_handle: str, now: datetime
    ) -> tuple[str, str]:
        """The id and the handle of the user with this external id, made if there is none. Two at
        once make one row.

        Raises:
            UnknownApp: the app was deleted while the caller still remembered it.
        """
        user = _User(app_id, external_id, new_id, new_handle, now, *who())
        while True:
            try:
                found = await self._user(user)
            except asyncpg.ForeignKeyViolationError:
                raise UnknownApp from None
            if found is not None:
                return found

    async def _ensure_users(
        self, users: Sequence[_User], alone: bool
    ) -> list[tuple[str, str] | OwnStatement | None]:
        """Each with another name. None: somebody else has made that user, or ended it, after our
        snapshot, and the next look sees that.

        The app is locked for those only who are missing, as their insert would lock it. A user who
        is pending is told that a registration was opened, or the periodic clean-up would end it."""
        passing_over = "" if alone else "SKIP LOCKED"
        table, values = _USERS.table(users)
        rows = await self._pg.rows(
            "ensure_user",
            f"""
            WITH a AS (SELECT * FROM {table}), old AS (
                SELECT a.number, u.id, u.handle, u.status FROM a
                CROSS JOIN LATERAL (
                    SELECT id, handle, status FROM users WHERE app_id = a.app_id AND external_id = a.external_id LIMIT 1
                ) u
            ), waiting AS (
                SELECT a.number, u.id, u.handle, a.at FROM old JOIN a ON a.number = old.number
                CROSS JOIN LATERAL (
                    SELECT id, handle FROM users WHERE id = old.id AND status <> 'active' FOR NO KEY UPDATE {passing_over}
                ) u
                WHERE old.status <> 'active'
            ), opened AS (
                UPDATE users SET opened_at = greatest(users.opened_at, w.at) FROM waiting w
                WHERE users.id = ANY (ARRAY(SELECT id FROM waiting)) AND users.id = w.id
            ), absent AS MATERIALIZED (
                SELECT a.* FROM a WHERE NOT EXISTS (SELECT FROM old WHERE old.number = a.number)
            ), missing AS (
                SELECT a.* FROM absent a {"" if alone else _APP_IS_FREE}
            ), new AS (
                INSERT INTO users (id, app_id, external_id, handle, status, created_at, updated_at, opened_at)
                SELECT new_id, app_id, external_id, new_handle, 'pending', at, at, at FROM missing ORDER BY app_id, external_id
                ON CONFLICT (app_id, external_id) DO NOTHING RETURNING id, handle
            ), told AS (
                {TELL} SELECT m.at, m.app_id, m.actor, 'user.created', m.new_id, NULL, 'done', NULL, m.request_id
                FROM missing m JOIN new ON new.id = m.new_id
            )
            SELECT number, id, handle FROM old WHERE status = 'active'
            UNION ALL SELECT number, id, handle FROM waiting
            UNION ALL SELECT m.number, new.id, new.handle FROM missing m LEFT JOIN new ON new.id = m.new_id
            """,
            *values,
        )
        found: list[tuple[str, str] | OwnStatement | None] = [
            None if alone else NEEDS_OWN_STATEMENT
        ] * len(users)
        for number, user_id, handle in rows:
            found[number] = None if user_id is None else (user_id, handle)
        return found

    # -- what they have ----------------------------------------------------------------------------

    async def held_by(
        self, app_id: str, user_id: str, *, now: datetime
    ) -> list[ExcludedCredential]:
        """The user's passkeys, oldest first, without those that can't be confirmed any more."""
        return await self._held(_Owner(app_id, user_id, now - UNCONFIRMED))

    async def _held_by(self, asked: Sequence[_Owner], _: bool) -> list[list[ExcludedCredential]]:
        table, values = _OWNERS.table(asked)
        rows = await self._pg.rows(
            "held_by",
            f"WITH a AS (SELECT * FROM {table})"
            " SELECT a.number, c.credential_id, c.transports, c.live FROM a JOIN credentials c"
            # The array keeps the planner from reading all passkeys: it takes the callers for 100.
            " ON c.user_id = ANY (ARRAY(SELECT user_id FROM a)) AND c.user_id = a.user_id AND c.app_id = a.app_id"
            " AND (c.live OR c.created_at > a.counted_from)"
            " ORDER BY a.number, c.created_at, c.id",
            *values,
        )
        found: list[list[ExcludedCredential]] = [[] for _ in asked]
        for number, credential_id, transports, live in rows:
            found[number].append(ExcludedCredential(credential_id, tuple(transports), live))
        return found

    # -- the new passkey ---------------------------------------------------------------------------

    async def add_credential(
        self,
        pending: PendingRegistration,
        verified: VerifiedRegistration,
        *,
        new_id: str,
        live: bool,
        confirmed: bool = False,
        max_passkeys: int = 1000,
        now: datetime,
    ) -> Outcome:
        """Insert a credential of a user who has fewer than `max_passkeys`; those that can't be
        confirmed any more don't count. The unique index on (app, credential id) decides who was
        first."""
        passkey = _Passkey(
            new_id,
            pending.app_id,
            pending.user_id,
            verified.credential_id.hex(),
            pending.user_handle,
            verified.public_key.hex(),
            verified.algorithm,
            verified.sign_count,
            verified.backup_eligible,
            verified.backed_up,
            verified.transports,
            verified.attachment,
            verified.aaguid,
            verified.attestation_format,
            verified.attestation_trust,
            pending.user_name,
            pending.user_display_name,
            pending.nickname,
            live,
            now if confirmed else None,
            pending.asked.second_factor,
            now,
            *who(),
            action_of(pending),
            max_passkeys,
            now - UNCONFIRMED,
        )
        try:
            if pending.external_id is None:
                return await self._add_for_nobody(passkey)
            return await self._add(passkey)
        except asyncpg.ForeignKeyViolationError:
            return "no_user"

    async def _add_credentials(
        self, passkeys: Sequence[_Passkey], alone: bool
    ) -> list[Outcome | OwnStatement]:
        """Each with another credential id."""
        passing_over = "" if alone else "SKIP LOCKED"
        rows = await self._add_rows(
            passkeys,
            f"""
            SELECT a.number, u.id FROM a
            CROSS JOIN LATERAL (SELECT id FROM relying_parties WHERE id = a.app_id FOR KEY SHARE {passing_over}) app
            CROSS JOIN LATERAL (SELECT id FROM users WHERE id = a.user_id AND app_id = app.id FOR NO KEY UPDATE {passing_over}) u
            """,
        )
        found: list[Outcome | OwnStatement] = ["no_user" if alone else NEEDS_OWN_STATEMENT] * len(
            passkeys
        )
        for number, fits, added in rows:
            if added:
                found[number] = "added"
            elif fits:
                found[number] = "duplicate"
            elif alone:
                found[number] = "too_many_passkeys"
        return found

    async def _add_for_nobody(self, passkey: _Passkey) -> Outcome:
        """Insert a credential whose user has no external id. Such a user has no row before the
        passkey either: a page alone, which may try for ever, leaves none behind."""
        rows = await self._add_rows(
            [passkey],
            """
            INSERT INTO users (id, app_id, handle, status, created_at, updated_at)
            SELECT a.user_id, a.app_id, a.user_handle, 'pending', a.at, a.at FROM a
            WHERE NOT EXISTS (SELECT FROM credentials c WHERE c.app_id = a.app_id AND c.credential_id = a.key_id)
            RETURNING 0 AS number, id
            """,
        )
        if rows and not rows[0]["added"]:  # somebody was faster between our two inserts
            drop = "DELETE FROM users WHERE id = $1 AND external_id IS NULL"
            await self._pg.row("drop_nobody", drop, passkey.user_id)
        return "added" if rows and rows[0]["added"] else "duplicate"

    async def _add_rows(self, passkeys: Sequence[_Passkey], owners: str) -> list[asyncpg.Record]:
        """Number, whether the owner may have it, and whether it was added, of each passkey that has
        an owner; `owners` says who that is.

        The owner's row is locked when passkeys are counted, so no other statement adds one of
        theirs meanwhile. Several of one owner in one statement count as if all before were added;
        one that does not fit then gets a statement alone."""
        table, values = _PASSKEYS.table(passkeys)
        return await self._pg.rows(
            "add_credential",
            f"""
            WITH a AS (SELECT *, decode(credential_id, 'hex') AS key_id FROM {table}), owner AS ({owners}),
            counted AS MATERIALIZED (
                SELECT o.number, o.id, counted_passkeys(o.id, a.counted_from)
                    + row_number() OVER (PARTITION BY o.id ORDER BY o.number) <= a.max_passkeys AS fits
                FROM owner o JOIN a ON a.number = o.number
            ), new AS (
                INSERT INTO credentials AS c (
                    id, app_id, user_id, credential_id, user_handle, public_key, algorithm, sign_count, backup_eligible,
                    backed_up, transports, attachment, aaguid, attestation_format, attestation_trust, user_name,
                    user_display_name, nickname, live, created_at, updated_at, confirmed_at, second_factor)
                SELECT a.id, a.app_id, o.id, a.key_id, a.user_handle, decode(a.public_key, 'hex'), a.algorithm, a.sign_count,
                    a.backup_eligible, a.backed_up, a.transports, a.attachment, a.aaguid, a.attestation_format, a.attestation_trust,
                    a.user_name, a.user_display_name, a.nickname, a.live, a.at, a.at, a.confirmed_at, a.second_factor
                FROM a JOIN counted o ON o.number = a.number AND o.fits ORDER BY a.app_id, a.key_id
                ON CONFLICT (app_id, credential_id) DO NOTHING RETURNING c.id, c.user_id
            ), active AS (
                UPDATE users SET status = 'active', updated_at = a.at FROM new JOIN a ON a.id = new.id
                WHERE users.id = ANY (ARRAY(SELECT user_id FROM new)) AND users.id = new.user_id AND a.live
            ), told AS (
                {TELL} SELECT a.at, a.app_id, a.actor, a.action, new.user_id, new.id, 'done', NULL, a.request_id
                FROM new JOIN a ON a.id = new.id
            )
            SELECT o.number, o.fits, new.id IS NOT NULL AS added FROM counted o JOIN a ON a.number = o.number LEFT JOIN new ON new.id = a.id
            """,
            *values,
        )

    # -- redeemed ----------------------------------------------------------------------------------

    async def confirm_credential(self, app_id: str, passkey_id: str, now: datetime) -> bool:
        """Record that a registration's nonce was redeemed; makes the credential live. False:
        revoked meanwhile.
        """
        return await self._confirm(_Confirmation(passkey_id, app_id, now, *who()))

    async def _confirm_credentials(
        self, confirmations: Sequence[_Confirmation], alone: bool
    ) -> list[bool | OwnStatement]:
        """Each of another credential. With "= 'pending'" the planner may read the whole index of
        pending users.
        """
        passing_over = "" if alone else "SKIP LOCKED"
        table, values = _CONFIRMATIONS.table(confirmations)
        rows = await self._pg.rows(
            "confirm_credential",
            f"""
            WITH held AS (
                SELECT a.*, u.id AS user_id FROM {table}
                CROSS JOIN LATERAL (
                    SELECT user_id FROM credentials WHERE id = a.id AND app_id = a.app_id FOR NO KEY UPDATE {passing_over}
                ) c
                CROSS JOIN LATERAL (SELECT id FROM users WHERE id = c.user_id FOR NO KEY UPDATE {passing_over}) u
            ), kept AS (
                UPDATE credentials c SET confirmed_at = coalesce(c.confirmed_at, held.at), live = true, updated_at = held.at
                FROM held WHERE c.id = ANY (ARRAY(SELECT id FROM held)) AND c.id = held.id RETURNING held.*
            ), active AS (
                UPDATE users SET status = 'active', updated_at = kept.at FROM kept
                WHERE users.id = ANY (ARRAY(SELECT user_id FROM kept)) AND users.id = kept.user_id AND users.status <> 'active'
            ), told AS (
                {TELL} SELECT at, app_id, actor, 'passkey.confirmed', user_id, id, 'done', NULL, request_id FROM kept
            )
            SELECT number FROM kept
            """,
            *values,
        )
        found: list[bool | OwnStatement] = [False if alone else NEEDS_OWN_STATEMENT] * len(
            confirmations
        )
        for (number,) in rows:
            found[number] = True
        return found


_APP_IS_FREE = "CROSS JOIN LATERAL (SELECT FROM relying_parties WHERE id = a.app_id FOR KEY SHARE SKIP LOCKED) app"
