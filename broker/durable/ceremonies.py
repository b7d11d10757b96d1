"""SQL statements of ceremonies on the table of credentials: look up the passkeys that may answer,
record a sign-in, insert a passkey, confirm a passkey.

The writes are group commits (`broker.durable.group_commit`). The write decides, against the locked
row: about revocation and counters, about duplicates and the limit of passkeys. A statement for
several callers waits for no row: SKIP LOCKED passes over a row that another transaction has locked.
Only a statement for one caller waits, and then knows that a missing row doesn't exist. So no row
delays other callers, and statements don't deadlock. SKIP LOCKED can't pass over an uncommitted
insert of the same credential id, so a batch inserts in the order of the ids. The app is locked
before the user, and the user before the passkey, as in deletions.

**The epoch of a user** ends what was begun before. Revoke-all and disable raise it, and a deletion
ends the row. A transaction, a ceremony and a nonce carry the epoch in which they were made. A new
passkey needs the epoch of the user's locked row. A sign-in and a redemption need at least the epoch
of the passkey's row, which disable raises too. So a login reads and locks no further row. A
statement that reads a user's epoch also reads whether the user is disabled.

The look-up of a login is batched too. The look-up of a registration is a plain statement.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

import asyncpg

from broker.durable.batch_input import BatchInput
from broker.durable.events import actor, insert_event
from broker.durable.group_commit import NEEDS_OWN_STATEMENT, OwnStatement
from broker.durable.postgres import Postgres
from broker.model import (
    LONGEST_NONCE,
    AllowedCredential,
    Credential,
    PendingRegistration,
    SignInOutcome,
    Unowned,
    VerifiedAuthentication,
    VerifiedRegistration,
    action_of,
    epoch_of,
)

Outcome = Literal["added", "duplicate", "no_user", "epoch_over", "too_many_passkeys"]

# Time in which a new passkey can be confirmed: no nonce lives longer, by any instance's clock.
UNCONFIRMED = timedelta(seconds=LONGEST_NONCE + 60)

_ALLOWED = ", ".join(f"c.{name}" for name in AllowedCredential._fields)


class UserCredentials(NamedTuple):
    """A user, and the passkeys that may answer for a login."""

    user_id: str
    epoch: int
    disabled: bool
    allowed: list[AllowedCredential]


class ExcludedCredential(NamedTuple):
    """A passkey of the user, which a registration excludes."""

    credential_id: bytes
    transports: tuple[str, ...]
    live: bool


class _LookUp(NamedTuple):
    """A user whose passkeys may answer."""

    app_id: str
    external_id: str
    second_factor: bool


class _Use(NamedTuple):
    """A sign-in to record."""

    id: str
    app_id: str
    epoch: int
    sign_count: int
    backed_up: bool
    at: datetime
    flag_counter: bool
    actor: str
    request: dict[str, str]
    action: str
    approval: str | None


class _New(NamedTuple):
    """A passkey to store; bytes in hexadecimal."""

    id: str
    app_id: str
    user_id: str
    epoch: int
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
    request: dict[str, str]
    action: str
    max_passkeys: int
    counted_from: datetime


class _Confirmation(NamedTuple):
    """A passkey whose nonce was redeemed."""

    id: str
    app_id: str
    epoch: int
    at: datetime
    actor: str
    request: dict[str, str]


class _Redeemed(NamedTuple):
    """A passkey that signed in, whose nonce is redeemed."""

    id: str
    app_id: str
    epoch: int


_LOOK_UPS, _USES, _NEW, _CONFIRMATIONS, _REDEEMED = map(
    BatchInput, (_LookUp, _Use, _New, _Confirmation, _Redeemed)
)


class Ceremonies:
    """The statements of ceremonies."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres
        self._allowed = postgres.group_commit("user_to_sign_in", self._allowed_batch)
        self._use = postgres.group_commit("use_credential", self._use_batch, key=lambda u: u.id)
        self._add: Callable[[_New], Awaitable[Outcome]] = postgres.group_commit(
            "add_credential", self._add_batch, key=lambda new: (new.app_id, new.credential_id)
        )
        self._confirm = postgres.group_commit(
            "confirm_credential", self._confirm_batch, key=lambda confirmation: confirmation.id
        )
        self._is_live = postgres.group_commit("is_live", self._is_live_batch)

    # -- a login -----------------------------------------------------------------------------------

    def allowed(
        self, app_id: str, external_id: str, *, second_factor: bool = False
    ) -> Awaitable[UserCredentials | None]:
        """The user with this external id and the live passkeys, oldest first; with `second_factor`
        second factors are among them. None: no such user.
        """
        return self._allowed(_LookUp(app_id, external_id, second_factor))

    async def _allowed_batch(
        self, look_ups: Sequence[_LookUp], _: bool
    ) -> list[UserCredentials | None]:
        rows = await self._pg.rows(
            "user_to_sign_in",
            "SELECT a.number, u.id AS owner, u.epoch, u.disabled_at IS NOT NULL AS disabled,"
            f" {_ALLOWED} FROM {_LOOK_UPS.table}"
            # The pair is unique. LIMIT 1 keeps the planner, which expects 100 rows of a batch, from
            # reading all users.
            " JOIN LATERAL (SELECT id, epoch, disabled_at FROM users"
            " WHERE app_id = a.app_id AND external_id = a.external_id LIMIT 1) u ON true"
            " LEFT JOIN credentials c ON c.user_id = u.id AND c.live"
            " AND (a.second_factor OR NOT c.second_factor)"
            " ORDER BY a.number, c.created_at, c.id",
            _LOOK_UPS.encode(look_ups),
        )
        found: list[UserCredentials | None] = [None] * len(look_ups)
        for row in rows:
            user = found[row["number"]]
            if user is None:
                user = UserCredentials(row["owner"], row["epoch"], row["disabled"], [])
                found[row["number"]] = user
            if row["id"] is not None:
                user.allowed.append(_allowed_of(row))
        return found

    def use(
        self,
        credential: Credential | AllowedCredential,
        verified: VerifiedAuthentication,
        *,
        epoch: int,
        flag_counter: bool,
        action: str = "passkey.used",
        approval: str | None = None,
        now: datetime,
    ) -> Awaitable[SignInOutcome | None]:
        """Record a sign-in, and what was approved by it. None: revoked meanwhile, the user disabled
        since `epoch`, or the counter went back (unless `flag_counter`).

        Changes are compared with the locked row: of two clones that answer at once, one is
        detected. Source: WebAuthn L3 §7.2, "If authData.signCount is nonzero or
        credentialRecord.signCount is nonzero".
        """
        return self._use(
            _Use(
                credential.id,
                credential.app_id,
                epoch,
                verified.sign_count,
                verified.backed_up,
                now,
                flag_counter,
                *actor(),
                action,
                approval,
            )
        )

    async def _use_batch(
        self, uses: Sequence[_Use], own: bool
    ) -> list[SignInOutcome | OwnStatement | None]:
        """Record sign-ins, each of another credential. The array in the update's condition keeps
        the planner, which expects 100 rows of a batch, from reading the table.
        """
        event = insert_event(
            "action",
            "FROM used",
            user_id="user_id",
            passkey_id="id",
            reason="CASE WHEN regressed THEN 'counter' END",
        )
        approve = (
            ", approve AS (UPDATE approvals p SET approved_at = u.at FROM used u"
            " WHERE p.app_id = u.app_id AND p.identifier = u.approval)"
            if any(use.approval is not None for use in uses)
            else ""
        )
        rows = await self._pg.rows(
            "use_credential",
            f"""
            WITH old AS (
                SELECT a.*, c.user_id, c.backed_up AS was_backed_up,
                       NOT (c.sign_count < a.sign_count
                            OR (c.sign_count = 0 AND a.sign_count = 0)) AS regressed
                FROM {_USES.table}
                CROSS JOIN LATERAL (
                    SELECT c.user_id, c.backed_up, c.sign_count FROM credentials c
                    WHERE c.id = a.id AND c.app_id = a.app_id AND c.live AND c.epoch <= a.epoch
                    FOR UPDATE {_skip(own)}
                ) c
            ), used AS (
                UPDATE credentials c
                SET sign_count = greatest(c.sign_count, old.sign_count),
                    backed_up = old.backed_up, last_used_at = old.at, updated_at = old.at,
                    use_count = c.use_count + 1
                FROM old
                WHERE c.id = ANY (ARRAY(SELECT id FROM old)) AND c.id = old.id
                    AND (old.flag_counter OR NOT old.regressed)
                RETURNING old.*
            ), event AS ({event}){approve}
            SELECT number, regressed, was_backed_up <> backed_up AS backup_changed FROM used
            """,
            _USES.encode(uses),
            app_id=uses[0].app_id if own else None,
        )
        found: list[SignInOutcome | OwnStatement | None]
        found = [None if own else NEEDS_OWN_STATEMENT] * len(uses)
        for number, regressed, backup_changed in rows:
            found[number] = SignInOutcome(regressed, backup_changed)
        return found

    async def is_live(self, app_id: str, passkey_id: str, epoch: int) -> bool:
        """True if the passkey still signs in what began in this epoch of its user, for the
        redemption of a login's nonce: revocation, disable and deletion end what it proved."""
        return await self._is_live(_Redeemed(passkey_id, app_id, epoch))

    async def _is_live_batch(self, redeemed: Sequence[_Redeemed], _: bool) -> list[bool]:
        rows = await self._pg.rows(
            "is_live",
            f"SELECT a.number FROM {_REDEEMED.table} JOIN LATERAL ("
            " SELECT FROM credentials c WHERE c.id = a.id AND c.app_id = a.app_id"
            " AND c.live AND c.epoch <= a.epoch LIMIT 1) c ON true",
            _REDEEMED.encode(redeemed),
        )
        live = {number for (number,) in rows}
        return [number in live for number in range(len(redeemed))]

    # -- a registration ----------------------------------------------------------------------------

    async def excluded(
        self, app_id: str, user_id: str, epoch: int, *, now: datetime
    ) -> list[ExcludedCredential] | None:
        """The user's passkeys, oldest first, without those that can't be confirmed any more. None:
        the app has no such user, or the user another epoch.
        """
        rows = await self._pg.rows(
            "held_by",
            "SELECT c.credential_id, c.transports, c.live FROM users u"
            " LEFT JOIN credentials c ON c.user_id = u.id AND (c.live OR c.created_at > $3)"
            " WHERE u.id = $2 AND u.app_id = $1 AND u.epoch = $4 ORDER BY c.created_at, c.id",
            app_id,
            user_id,
            now - UNCONFIRMED,
            epoch,
        )
        if not rows:
            return None
        return [
            ExcludedCredential(i, tuple(transports), live)
            for i, transports, live in rows
            if i is not None
        ]

    async def add(
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
        """Insert a credential of a user who has the epoch of the ceremony and fewer than
        `max_passkeys`; those that can't be confirmed any more don't count. The unique index on
        (app, credential id) decides between parallel inserts."""
        new = _New(
            new_id,
            pending.app_id,
            pending.subject.user_id,
            epoch_of(pending.subject),
            verified.credential_id.hex(),
            pending.entity.handle,
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
            pending.entity.user_name,
            pending.entity.user_display_name,
            pending.entity.nickname,
            live,
            now if confirmed else None,
            pending.options.second_factor,
            now,
            *actor(),
            action_of(pending),
            max_passkeys,
            now - UNCONFIRMED,
        )
        try:
            if isinstance(pending.subject, Unowned):
                return await self._add_ownerless(new)
            return await self._add(new)
        except asyncpg.ForeignKeyViolationError:
            return "no_user"

    async def _add_batch(self, new: Sequence[_New], own: bool) -> list[Outcome | OwnStatement]:
        """Insert credentials, each with another credential id."""
        rows = await self._insert(
            new,
            f"""
            SELECT a.number, u.id, u.epoch = a.epoch AS current FROM a
            CROSS JOIN LATERAL (
                SELECT id FROM relying_parties WHERE id = a.app_id FOR KEY SHARE {_skip(own)}
            ) app
            CROSS JOIN LATERAL (
                SELECT id, epoch FROM users WHERE id = a.user_id AND app_id = app.id
                FOR NO KEY UPDATE {_skip(own)}
            ) u
            """,
            own,
        )
        found: list[Outcome | OwnStatement]
        found = ["no_user" if own else NEEDS_OWN_STATEMENT] * len(new)
        for number, current, fits, added in rows:
            if added:
                found[number] = "added"
            elif not current:
                found[number] = "epoch_over"
            elif fits:
                found[number] = "duplicate"
            elif own:
                found[number] = "too_many_passkeys"
        return found

    async def _add_ownerless(self, new: _New) -> Outcome:
        """Insert a credential with a user without an external id. Such a user has no row before the
        passkey, so attempts of pages leave no rows."""
        rows = await self._insert(
            [new],
            """
            INSERT INTO users (id, app_id, handle, status, created_at, updated_at)
            SELECT a.user_id, a.app_id, a.user_handle, 'pending', a.at, a.at FROM a
            WHERE NOT EXISTS (
                SELECT FROM credentials c
                WHERE c.app_id = a.app_id AND c.credential_id = a.key_id
            )
            RETURNING 0 AS number, id, true AS current
            """,
            own=True,
        )
        if rows and not rows[0]["added"]:  # another request inserted it between these two inserts
            drop = "DELETE FROM users WHERE id = $1 AND external_id IS NULL"
            await self._pg.row("drop_nobody", drop, new.user_id)
        return "added" if rows and rows[0]["added"] else "duplicate"

    async def _insert(self, new: Sequence[_New], owners: str, own: bool) -> list[asyncpg.Record]:
        """Number, whether the ceremony's epoch is the owner's, whether the owner may have it, and
        whether it was added, of each passkey that has an owner; `owners` selects number, owner and
        the former.

        The owner's row is locked when passkeys are counted, so no other statement adds one of
        theirs meanwhile. Several of one owner in one statement count as if all before were added;
        one that does not fit then gets a statement of its own."""
        event = insert_event(
            "a.action",
            "FROM new JOIN a ON a.id = new.id",
            at="a.at",
            app_id="a.app_id",
            by="a.actor, a.request",
            user_id="new.user_id",
            passkey_id="new.id",
        )
        return await self._pg.rows(
            "add_credential",
            f"""
            WITH a AS (
                SELECT *, decode(credential_id, 'hex') AS key_id FROM {_NEW.table}
            ), owner AS ({owners}), counted AS MATERIALIZED (
                SELECT o.number, o.id, o.current,
                    o.current AND counted_passkeys(o.id, a.counted_from)
                    + row_number() OVER (PARTITION BY o.id ORDER BY o.number)
                    <= a.max_passkeys AS fits
                FROM owner o JOIN a ON a.number = o.number
            ), new AS (
                INSERT INTO credentials AS c (
                    id, app_id, user_id, credential_id, user_handle, public_key, algorithm,
                    sign_count, backup_eligible, backed_up, transports, attachment, aaguid,
                    attestation_format, attestation_trust, user_name, user_display_name, nickname,
                    live, created_at, updated_at, confirmed_at, second_factor, epoch)
                SELECT
                    a.id, a.app_id, o.id, a.key_id, a.user_handle, decode(a.public_key, 'hex'),
                    a.algorithm, a.sign_count, a.backup_eligible, a.backed_up, a.transports,
                    a.attachment, a.aaguid, a.attestation_format, a.attestation_trust, a.user_name,
                    a.user_display_name, a.nickname, a.live, a.at, a.at, a.confirmed_at,
                    a.second_factor, a.epoch
                FROM a JOIN counted o ON o.number = a.number AND o.fits ORDER BY a.app_id, a.key_id
                ON CONFLICT (app_id, credential_id) DO NOTHING RETURNING c.id, c.user_id
            ), active AS (
                UPDATE users SET status = 'active', updated_at = a.at
                FROM new JOIN a ON a.id = new.id
                WHERE users.id = ANY (ARRAY(SELECT user_id FROM new)) AND users.id = new.user_id
                    AND a.live
            ), event AS ({event})
            SELECT o.number, o.current, o.fits, new.id IS NOT NULL AS added
            FROM counted o JOIN a ON a.number = o.number LEFT JOIN new ON new.id = a.id
            """,
            _NEW.encode(new),
            app_id=new[0].app_id if own else None,
        )

    async def confirm(self, app_id: str, passkey_id: str, epoch: int, now: datetime) -> bool:
        """Record that a registration's nonce was redeemed; makes the credential live. False:
        revoked meanwhile, or the user disabled since `epoch`.
        """
        return await self._confirm(_Confirmation(passkey_id, app_id, epoch, now, *actor()))

    async def _confirm_batch(
        self, confirmations: Sequence[_Confirmation], own: bool
    ) -> list[bool | OwnStatement]:
        """Confirm passkeys, each another credential. With "= 'pending'" the planner may read the
        whole index of pending users.
        """
        event = insert_event("'passkey.confirmed'", "FROM kept", user_id="user_id", passkey_id="id")
        rows = await self._pg.rows(
            "confirm_credential",
            f"""
            WITH held AS (
                SELECT a.*, u.id AS user_id FROM {_CONFIRMATIONS.table}
                CROSS JOIN LATERAL (
                    SELECT user_id FROM credentials WHERE id = a.id AND app_id = a.app_id LIMIT 1
                ) owned
                CROSS JOIN LATERAL (
                    SELECT id FROM users WHERE id = owned.user_id FOR NO KEY UPDATE {_skip(own)}
                ) u
                CROSS JOIN LATERAL (
                    SELECT FROM credentials
                    WHERE id = a.id AND user_id = u.id AND epoch <= a.epoch
                    FOR NO KEY UPDATE {_skip(own)}
                ) c
            ), kept AS (
                UPDATE credentials c
                SET confirmed_at = coalesce(c.confirmed_at, held.at), live = true,
                    updated_at = held.at
                FROM held
                WHERE c.id = ANY (ARRAY(SELECT id FROM held)) AND c.id = held.id
                RETURNING held.*
            ), active AS (
                UPDATE users SET status = 'active', updated_at = kept.at FROM kept
                WHERE users.id = ANY (ARRAY(SELECT user_id FROM kept)) AND users.id = kept.user_id
                    AND users.status <> 'active'
            ), event AS ({event})
            SELECT number FROM kept
            """,
            _CONFIRMATIONS.encode(confirmations),
            app_id=confirmations[0].app_id if own else None,
        )
        found: list[bool | OwnStatement]
        found = [False if own else NEEDS_OWN_STATEMENT] * len(confirmations)
        for (number,) in rows:
            found[number] = True
        return found


def _skip(own: bool) -> str:
    """The lock's option for a row that another transaction has locked: wait, or skip the row."""
    return "" if own else "SKIP LOCKED"


def _allowed_of(row: asyncpg.Record) -> AllowedCredential:
    values = {name: row[name] for name in AllowedCredential._fields}
    return AllowedCredential(**values | {"transports": tuple(row["transports"])})
