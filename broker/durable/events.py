"""The table of events, which is the audit log: one writer, and readers by page, by the newest, and
by a cursor that never skips an event.

An event is inserted by the statement that makes the change it reports, so both are committed or
neither. `actor()` takes the actor and the request from the context.

**The cursor** is an event's id. Ids are drawn before the commit, so a lower id may be committed
after a higher one, and a reader that remembers the higher one would miss it. Therefore the reader
waits for the writers: the newest committed id is read together with the transactions that hold ROW
EXCLUSIVE on the table at that moment, and the answer comes when those have ended. A lower id was
drawn earlier, by a transaction that had the lock already, so that transaction is among them or has
ended: what is read afterwards up to that id is complete. Where a writer stays open for longer than
`PATIENCE` the answer is empty and the cursor stays. Ids survive dump and restore, and need no right
on the sequence. Events that retention deletes are gone for every reader.

**Months.** The table is partitioned by time, a partition a month. An insert locks the table itself
too, so a reader sees the writers of all months. The clean-up (`broker.durable.housekeeping`) makes
months ahead and drops those that are over. An event outside all months is in the partition
`events_default`, so no insert fails for want of a month. Readers by id merge the indexes of all
months: 100 events out of 28 months cost Postgres 1.2 ms of CPU, out of a single table 0.2 ms. An
insert of 16 events costs 0 to 7 % more CPU than into a single table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import asyncpg

from broker.durable.postgres import Postgres
from broker.model import AuditRow, Event
from broker.telemetry import context, remaining

PATIENCE = 1.0  # seconds that a reader waits for writers, at most
_STEP = 0.02  # seconds between two looks

# What a caller chose, erased from the events of users who are gone. A column that is added to
# events has its place here, or is ours.
ERASE = """
    UPDATE events SET request_id = '', payload = NULL, address = NULL, user_agent = NULL
    WHERE user_id = ANY ($1::text[])
        AND (request_id <> '' OR num_nonnulls(payload, address, user_agent) > 0)
"""

_EVENT = (
    "e.id, e.at, e.app_id, e.actor, e.action, e.user_id, e.passkey_id, e.result, e.reason,"
    " e.request_id, e.payload, e.address, e.user_agent"
)
# A range of one app, so that the index on (app_id, id) alone has the rows in order. With "=" the
# order would be that of ids, and a plan for any app may walk through everybody's events for the few
# of a quiet one.
_OF_APP = "e.app_id BETWEEN $1 AND $1"
_WRITERS = """
    SELECT virtualtransaction FROM pg_locks
    WHERE relation = 'events'::regclass AND mode = 'RowExclusiveLock' AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND pid IS DISTINCT FROM pg_backend_pid()
"""


def actor() -> tuple[str, dict[str, str]]:
    """The actor of the running request or command, and that request: `id`, `address`,
    `user_agent`; an address or a user agent that is not known is missing.
    """
    now = context()
    request = {"id": now.request_id}
    if now.address:
        request["address"] = now.address
    if now.user_agent:
        request["user_agent"] = now.user_agent
    return now.actor, request


def insert_event(
    action: str,
    source: str,
    *,
    at: str = "at",
    app_id: str = "app_id",
    by: str = "actor, request",
    user_id: str = "NULL",
    passkey_id: str = "NULL",
    result: str = "'done'",
    reason: str = "NULL",
    payload: str = "NULL",
) -> str:
    """The insert of an event for each row of `source`, a FROM; all arguments are SQL. `by` are two
    columns, as `actor()` gives them.
    """
    actor, request = by.split(", ")
    return (
        "INSERT INTO events"
        " (at, app_id, actor, request_id, address, user_agent, action, user_id, passkey_id, result,"
        " reason, payload)"
        f" SELECT {at}, {app_id}, {actor}, {request}::jsonb ->> 'id',"
        f" {request}::jsonb ->> 'address', {request}::jsonb ->> 'user_agent', {action}, {user_id},"
        f" {passkey_id}, {result}, {reason}, {payload} {source}"
    )


class Events:
    """The statements on events."""

    def __init__(self, postgres: Postgres) -> None:
        self._pg = postgres

    async def add(
        self,
        app_id: str,
        action: str,
        *,
        result: str,
        reason: str | None,
        user_id: str | None = None,
        passkey_id: str | None = None,
        payload: Mapping[str, Any] | None = None,
        now: datetime,
    ) -> None:
        """Insert an event of its own: of a refusal, which changes nothing else. It names no user
        that was deleted meanwhile, and then has no payload.
        """
        event = insert_event(
            "$3",
            "FROM relying_parties a LEFT JOIN users u ON u.app_id = a.id AND u.id = $4"
            " WHERE a.id = $2",
            at="$1",
            app_id="a.id",
            by="$9, $10",
            user_id="u.id",
            passkey_id="CASE WHEN u.id IS NOT NULL THEN $5 END",
            result="$6",
            reason="$7",
            payload="CASE WHEN u.id IS NOT NULL OR $4 IS NULL THEN $8::jsonb END",
        )
        values = (now, app_id, action, user_id, passkey_id, result, reason, payload, *actor())
        await self._pg.row("tell", event, *values)

    async def newest(self, app_id: str, *, limit: int) -> list[Event]:
        """The newest `limit` events of an app, oldest first."""
        rows = await self._pg.rows(
            "events",
            f"SELECT {_EVENT} FROM events e WHERE {_OF_APP}"
            " ORDER BY e.app_id DESC, e.id DESC LIMIT $2",
            app_id,
            limit,
        )
        return [Event(**dict(row)) for row in reversed(rows)]

    async def after(self, app_id: str, cursor: int, *, limit: int) -> tuple[list[AuditRow], int]:
        """The first `limit` events of an app with an id above `cursor`, oldest first, and the
        cursor to go on from. An event that is committed later has an id above that cursor."""
        newest = await self._settled(app_id, cursor)
        if newest is None:
            return [], cursor
        rows = await self._pg.rows(
            "events_after",
            f"SELECT {_EVENT}, u.external_id FROM events e"
            " LEFT JOIN users u ON u.id = e.user_id AND u.app_id = $1"
            f" WHERE {_OF_APP} AND e.id > $2 AND e.id <= $3 ORDER BY e.app_id, e.id LIMIT $4",
            app_id,
            cursor,
            newest,
            limit,
        )
        found = _audited(rows)
        return found, found[-1].event.id if len(found) == limit else newest

    async def cursor_before(self, app_id: str, since: datetime) -> int:
        """A cursor before every event of an app from `since` on. It skips the months that ended
        before; 0 if there are none.
        """
        row = await self._pg.row(
            "event_cursor",
            f"SELECT e.id - 1 AS cursor FROM events e WHERE {_OF_APP}"
            " AND e.at >= (SELECT max(ends) FROM event_months WHERE ends <= $2)"
            " ORDER BY e.app_id, e.id LIMIT 1",
            app_id,
            since,
        )
        return 0 if row is None else cast("int", row["cursor"])

    async def _settled(self, app_id: str, cursor: int) -> int | None:
        """The id up to which every event of the app is committed or never will be; None: nothing
        new, or a writer stays open.
        """
        row = await self._pg.row(
            "events_newest",
            "SELECT (SELECT max(id) FROM events WHERE app_id = $1 AND id > $2) AS newest,"
            f" ARRAY({_WRITERS}) AS writers",
            app_id,
            cursor,
        )
        assert row is not None, "a SELECT without FROM has one row"
        newest: int | None = row["newest"]
        writers = set(row["writers"]) if newest is not None else set()
        time = asyncio.get_running_loop().time
        ends = time() + min(PATIENCE, remaining(2 * PATIENCE) / 2)
        while writers:
            if time() >= ends:
                return None
            await asyncio.sleep(_STEP)
            writers &= {row[0] for row in await self._pg.rows("events_writers", _WRITERS)}
        return newest

    async def months(self) -> dict[str, bool]:
        """For `broker doctor`: whether this month and the next are `covered` by partitions, and
        whether events are `astray` in `events_default`.
        """
        row = await self._pg.row(
            "event_months",
            "SELECT EXISTS (SELECT FROM event_months WHERE ends >= (date_trunc('month',"
            " now() AT TIME ZONE 'UTC') + interval '2 months') AT TIME ZONE 'UTC') AS covered,"
            " EXISTS (SELECT FROM events_default) AS astray",
        )
        assert row is not None, "a SELECT without FROM has one row"
        return dict(row)

    async def page(
        self,
        app_id: str,
        *,
        limit: int,
        offset: int,
        start: datetime | None,
        end: datetime | None,
        kinds: Sequence[tuple[str, str]] | None,
        user: str | None,
        address: str | None = None,
        either: str | None = None,
    ) -> tuple[list[AuditRow], int]:
        """A page of events, newest first, and how many there are in all. `kinds` are pairs of
        action and result; `user` is a part of the external id, `address` one of the address, and
        `either` one of one of them; `start` and `end` are exclusive.
        """
        conditions, values = [_OF_APP], cast("list[object]", [app_id])
        for condition, value in (
            ("e.at > {}", start),
            ("e.at < {}", end),
            ("strpos(u.external_id, {}) > 0", user),
            ("strpos(e.address, {}) > 0", address),
            ("(strpos(u.external_id, {0}) > 0 OR strpos(e.address, {0}) > 0)", either),
            (
                "e.action || ' ' || e.result = ANY({}::text[])",
                None if kinds is None else [" ".join(k) for k in kinds],
            ),
        ):
            if value is not None:
                values.append(value)
                conditions.append(condition.format(f"${len(values)}"))
        where = " AND ".join(conditions)
        source = (
            f"FROM events e LEFT JOIN users u ON u.id = e.user_id AND u.app_id = $1 WHERE {where}"
        )
        counted = await self._pg.row("audit", f"SELECT count(*) AS total {source}", *values)
        assert counted is not None, "an aggregate has one row"
        rows = await self._pg.rows(
            "audit",
            f"SELECT {_EVENT}, u.external_id {source} ORDER BY e.app_id DESC, e.id DESC"
            f" LIMIT ${len(values) + 1} OFFSET ${len(values) + 2}",
            *values,
            limit,
            offset,
        )
        return _audited(rows), counted["total"]


def _audited(rows: Sequence[asyncpg.Record]) -> list[AuditRow]:
    """An event's columns and `external_id`."""
    return [
        AuditRow(Event(**{k: v for k, v in row.items() if k != "external_id"}), row["external_id"])
        for row in rows
    ]
