"""The audit log's reader: a cursor that never skips an event, whatever the order of commits; by
HTTP and on the command line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any

import aiohttp
import asyncpg
import pytest

from broker.durable import Durable, Postgres, events
from broker.embedded import EmbeddedStores
from broker.model import RelyingParty
from tests.conftest import OpenApp, Started, Starter
from tests.stores.test_durable import new_app
from tests.support.authenticator import Authenticator
from tests.support.servers import eventually, pool, session_of, statements
from tests.support.wire import ORIGIN, Wire

NOW = datetime(2026, 3, 4, tzinfo=UTC)
INSERT = (
    "INSERT INTO events (at, app_id, actor, action, result, request_id)"
    " VALUES (now(), $1, 'test', $2, 'done', '') RETURNING id"
)


@pytest.fixture
async def app(durable: Durable) -> RelyingParty:
    return await new_app(durable)


@pytest.fixture
async def writer(stores: EmbeddedStores) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A session whose commits the test decides about."""
    async with session_of(stores) as session:
        yield session


async def after(postgres: Postgres, app: RelyingParty, cursor: int) -> tuple[list[str], int]:
    found, following = await Durable(postgres).events.after(app.id, cursor, limit=100)
    return [row.event.action for row in found], following


async def test_an_earlier_event_that_is_committed_later_is_not_skipped(
    postgres: Postgres,
    durable: Durable,
    app: RelyingParty,
    writer: asyncpg.Connection[asyncpg.Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, start = await after(postgres, app, 0)
    held = writer.transaction()
    await held.start()
    earlier = await writer.fetchval(INSERT, app.id, "earlier")
    await durable.events.add(app.id, "later", result="done", reason=None, now=NOW)
    later = (await Durable(postgres).events.newest(app.id, limit=1))[0]
    assert (later.action, later.id > earlier) == ("later", True)

    with monkeypatch.context() as patch:
        patch.setattr(events, "PATIENCE", 0.0)
        for _ in range(3):
            assert await after(postgres, app, start) == ([], start), "neither, while one is missing"

    monkeypatch.setattr(events, "PATIENCE", 60.0)
    looks = statements(postgres, "events_writers")
    reading = asyncio.create_task(after(postgres, app, start))
    await eventually(lambda: statements(postgres, "events_writers") > looks + 2, "the reader waits")
    assert not reading.done()
    await held.commit()
    assert await reading == (["earlier", "later"], later.id)
    assert await after(postgres, app, later.id) == ([], later.id)


async def test_one_that_is_never_committed_holds_up_nobody_for_ever(
    postgres: Postgres,
    durable: Durable,
    app: RelyingParty,
    writer: asyncpg.Connection[asyncpg.Record],
) -> None:
    _, start = await after(postgres, app, 0)
    held = writer.transaction()
    await held.start()
    await writer.fetchval(INSERT, app.id, "never")
    await durable.events.add(app.id, "later", result="done", reason=None, now=NOW)
    await held.rollback()
    assert (await after(postgres, app, start))[0] == ["later"]


async def test_who_waits_for_nothing_new_is_answered_at_once(
    postgres: Postgres,
    durable: Durable,
    app: RelyingParty,
    writer: asyncpg.Connection[asyncpg.Record],
) -> None:
    """A writer in another app, or one that began later, is not waited for where nothing is new."""
    _, start = await after(postgres, app, 0)
    looks = statements(postgres, "events_writers")
    async with writer.transaction():
        await writer.fetchval(INSERT, (await new_app(durable)).id, "elsewhere")
        assert await after(postgres, app, start) == ([], start)
    assert statements(postgres, "events_writers") == looks


async def test_a_poller_sees_every_event_of_many_writers(
    stores: EmbeddedStores, postgres: Postgres, app: RelyingParty
) -> None:
    """Eight writers whose transactions overlap in every order; the poller takes a few at a time."""
    made = pool(stores.database_url, connections=8)
    await made.open()
    ended = asyncio.Event()

    async def write(number: int) -> None:
        for n in range(15):

            async def work(connection: Any, n: int = n) -> None:
                async with connection.transaction():
                    await connection.fetchval(INSERT, app.id, f"{number}.{n}")
                    await asyncio.sleep(
                        0.001 * (number * 7 + n * 3) % 0.012
                    )  # who commits first differs

            await made.run("test", work)

    async def poll() -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []
        cursor = 0
        while True:
            last = ended.is_set()
            found, cursor = await Durable(postgres).events.after(app.id, cursor, limit=3)
            seen += [(row.event.id, row.event.action) for row in found]
            if last and not found:
                return seen

    polling = asyncio.create_task(poll())
    try:
        await asyncio.gather(*(write(number) for number in range(8)))
    finally:
        ended.set()
        await made.close()
    seen = await polling
    assert seen == sorted(seen), "oldest first"
    assert sorted(action for _, action in seen[1:]) == sorted(
        f"{w}.{n}" for w in range(8) for n in range(15)
    )
    assert seen[0][1] == "app.created"


async def test_a_cursor_by_http(wire: Wire, open_app: OpenApp, broker: Started) -> None:
    for name in ("ann", "ben"):
        await wire.open_registration(name)
    first = (await wire.keyed("GET", "/events?cursor=0&limit=2")).json
    assert [event["action"] for event in first["events"]] == ["app.created", "user.created"]
    assert first["events"][1]["external_id"] == "ann"
    assert first["next_cursor"] == str(first["events"][1]["id"])
    assert first.keys() == {"events", "next_cursor"}
    second = (await wire.keyed("GET", f"/events?cursor={first['next_cursor']}&limit=2")).json
    assert [event["external_id"] for event in second["events"]] == ["ben"]
    end = (await wire.keyed("GET", f"/events?cursor={second['next_cursor']}")).json
    assert end == {"events": [], "next_cursor": second["next_cursor"]}
    listed = (await wire.keyed("GET", "/events")).json["events"]
    assert [e["id"] for e in listed] == [e["id"] for e in (*first["events"], *second["events"])][
        ::-1
    ]

    elsewhere = await open_app()
    assert [
        e["action"] for e in (await elsewhere.keyed("GET", "/events?cursor=0")).json["events"]
    ] == ["app.created"]
    for query in (
        "cursor=-1",
        "cursor=x",
        "cursor=1e3",
        "cursor=0&page=1",
        "cursor=0&user=ann",
        "cursor=0&after=",
    ):
        answer = await wire.keyed("GET", f"/events?{query}")
        assert (answer.status, answer.code) == (400, "invalid_request"), query
    assert answer.json["error"] == "cursor stands alone with limit, without after."


AGENT = "Fox/1 \xe9" + "x" * 600


async def test_an_event_has_the_client_of_its_request(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """Behind a proxy; of writes that callers share, and of one that stands alone."""
    broker = await start_broker(trusted_proxies=[ip_network("127.0.0.0/8")])
    wire = await Wire.open(broker.service, session)
    session.headers["X-Forwarded-For"] = "198.51.100.1, 203.0.113.9"
    session.headers["User-Agent"] = AGENT
    await wire.user("ann", device)
    handle, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
    session.headers["X-Forwarded-For"] = "2001:db8:1:2:3::4"
    session.headers["User-Agent"] = "Fox/2"
    await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    answer = await wire.keyed("GET", "/events?limit=100")
    created, *others, used = answer.json["events"][::-1]
    assert created["action"] == "app.created"
    assert (created["address"], created["user_agent"]) == (None, None)
    assert [event["action"] for event in others] == [
        "user.created",
        "passkey.registered",
        "passkey.confirmed",
    ]
    shown = "Fox/1 ?" + "x" * 248
    assert {(event["address"], event["user_agent"]) for event in others} == {("203.0.113.9", shown)}
    assert used["action"] == "passkey.used"
    assert (used["address"], used["user_agent"]) == ("2001:db8:1:2::/64", "Fox/2")
    await broker.parts.directory.delete_user(await broker.parts.directory.app(wire.app_id), "ann")
    kept = (await wire.keyed("GET", "/events?limit=100")).json["events"]
    clients = [(e["address"], e["user_agent"]) for e in kept if e["user_id"] is not None]
    assert len(clients) == 5
    assert set(clients) == {(None, None)}
