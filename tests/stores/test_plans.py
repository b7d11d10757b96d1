"""The plan of every statement that a request can bring about: none reads a whole table that grows.

A broker on a database of its own is asked on every route of every dialect, and each statement that
it sends is noted. Then the database is filled and analysed, and Postgres is asked how it would run
each of them: by the plan for any values (what a connection uses from the sixth time on) and by the
one for the values that were sent. Nothing is forbidden to the planner; with tens of thousands of
rows a sequential scan is what it chooses where no index helps. Walking through a whole index is the
same by another name.

That nothing is missed is read from the source: each operation of `broker.durable`, and each piece
of its SQL, was seen.
"""

from __future__ import annotations

import ast
import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg
import pytest

from broker.app import application, assemble, serve
from broker.durable import Postgres, ceremonies, instant
from broker.durable import postgres as module
from broker.durable.batch_input import BatchInput
from broker.embedded import EmbeddedStores
from broker.telemetry import Log, Metrics
from broker.tokens import SystemMint
from tests.conftest import Clock, Started, settings_for
from tests.support import seed
from tests.support.asking import ask_everything
from tests.support.servers import session_of

DURABLE = Path(module.__file__).parent
GROWS = {
    "users",
    "credentials",
    "events",
    "approvals",
    "api_keys",
    "relying_parties",
    "signing_keys",
}
APPS = 80
SIZE = seed.Size(users=10_000, credentials=15_000, events=80_000)

# What no request brings about, with who does.
OPERATORS = {
    "apps": "broker app list",
    "facts": "broker doctor",
    "record_one_time_mode": "broker one-time",
    "spend_value": "takes with BROKER_ONE_TIME=postgres",
    "event_months": "broker doctor",
    "all_signing_keys": "broker key reseal, broker doctor",
    "reseal_signing_key": "broker key reseal",
}
# What a request brings about only when another one is faster at the same moment.
RACES = {
    "drop_nobody": "two pages that register one passkey at once, for nobody yet",
    "events_writers": "a reader of events while another transaction writes one",
}
# Routes that ask no store, or never succeed.
_NO_STORE = ("/sdk/", "/metrics", "/health/", "/aaguid/")
NOT_RUN = OPERATORS.keys() | RACES.keys()


# -- noting statements -----------------------------------------------------------------------------


_operation: ContextVar[str] = ContextVar("operation", default="(no operation)")


_PLANNED = re.compile(
    r"\s*(SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|TABLE)\b", re.I
)  # no BEGIN and the like


@dataclass(slots=True)
class Noted:
    """What the broker did: operations, and each statement with its operation and the values it was
    first sent with.
    """

    operations: set[str] = field(default_factory=set)
    statements: dict[tuple[str, str], tuple[object, ...]] = field(default_factory=dict)
    routes: set[tuple[str, str]] = field(
        default_factory=set
    )  # method and template, answered with success
    plans: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)

    def note(self, sql: str, values: tuple[object, ...]) -> None:
        if _PLANNED.match(sql):
            self.statements.setdefault((_operation.get(), sql), values)


if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection


def _noting(noted: Noted) -> type[_Connection]:
    """A connection that notes what it is asked, by any of the driver's ways to ask."""

    def way(name: str, many: bool = False) -> Callable[..., Any]:
        ask = getattr(asyncpg.Connection, name)

        def noting(self: _Connection, sql: str, *args: Any, **how: Any) -> Any:
            noted.note(sql, tuple(args[0][0]) if many else args)
            return ask(self, sql, *args, **how)

        return noting

    singles = {
        name: way(name)
        for name in ("execute", "fetch", "fetchrow", "fetchval", "prepare", "cursor")
    }
    return type(
        "Noting", (asyncpg.Connection,), singles | {"executemany": way("executemany", many=True)}
    )


async def _collect(stores: EmbeddedStores) -> Noted:
    """Ask everything, fill the database, and explain every statement."""
    noted = Noted()
    connect, run, create_pool = asyncpg.connect, Postgres.run, asyncpg.create_pool

    async def noting_run(self: Postgres, operation: str, *args: Any, **how: Any) -> Any:
        noted.operations.add(operation)
        token = _operation.set(operation)
        try:
            return await run(self, operation, *args, **how)
        finally:
            _operation.reset(token)

    async with _database(stores) as url:
        migrating = Postgres(url, timeout=10, connections=1, metrics=Metrics())
        await migrating.migrate(instant(time.time()))
        with pytest.MonkeyPatch.context() as patch:
            noting = lambda *args, **how: create_pool(  # noqa: E731
                *args, **how | {"connection_class": _noting(noted)}
            )
            patch.setattr(asyncpg, "create_pool", noting)
            patch.setattr(Postgres, "run", noting_run)
            noted.routes = await _asked(stores, url)
        session: seed.Session = await connect(url)
        try:
            await session.set_type_codec(
                "jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog"
            )
            await _fill(session)
            for key, values in noted.statements.items():
                noted.plans[key] = await _plans(session, key[1], values)
        finally:
            await session.close()
    return noted


@asynccontextmanager
async def _database(stores: EmbeddedStores) -> AsyncIterator[str]:
    name = "test_" + SystemMint().id().lower()
    async with session_of(stores) as session:
        await session.execute(f"CREATE DATABASE {name}")
        try:
            yield stores.database_url.replace("/postgres?", f"/{name}?")
        finally:
            await session.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def _asked(stores: EmbeddedStores, url: str) -> set[tuple[str, str]]:
    """Start a broker and ask everything: method and template of the routes that answered with
    success.
    """
    stream = io.StringIO()
    parts = await assemble(settings_for(stores, database_url=url), log=Log(stream, level="debug"))
    service = await serve(parts)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await ask_everything(service, session)
        lines = Started(service, Clock(), stream).log
    finally:
        await service.close()
    return {
        (line["method"], line["route"])
        for line in lines
        if line["event"] == "request" and line["status"] < 400
    }


async def _fill(session: seed.Session) -> None:
    """As a broker with many apps: what was asked is a small part of what is there."""
    some = await session.fetch(
        "INSERT INTO relying_parties (id, name, rp_id, origins, policy, created_at, updated_at)"
        " SELECT left(md5('app ' || n), 24), 'App', 'app' || n || '.example', '{}', '{}', now(),"
        " now()"
        " FROM generate_series(1, $1::int) n RETURNING id",
        APPS,
    )
    await seed.part_by_month(session, 3)
    await seed.templates(session)
    await seed.grow(session, [row["id"] for row in some], SIZE)
    await session.execute(
        "SET session_replication_role = replica"
    )  # no look at foreign keys, row by row
    await session.execute(
        "INSERT INTO relying_parties (id, name, rp_id, origins, policy, created_at, updated_at)"
        " SELECT left(md5('small ' || n), 24), 'App', 'small' || n || '.example', '{}', '{}',"
        " now(), now()"
        " FROM generate_series(1, 1000) n"
    )
    await session.execute(
        "INSERT INTO api_keys (id, app_id, hash, hint, name, created_at)"
        " SELECT left(md5('key ' || a.id || n), 24), a.id, sha256(convert_to(a.id || n, 'UTF8')),"
        " 'hint', 'key', now()"
        " FROM relying_parties a, generate_series(1, 3) n"
    )
    await session.execute(
        "INSERT INTO signing_keys (id, app_id, algorithm, generation, sealed, public, created_at,"
        " signs_from)"
        " SELECT left(md5('signing ' || a.id || n), 24), a.id, 'EdDSA', n, '', '{}', now(), now()"
        " FROM relying_parties a, generate_series(1, 2) n"
    )
    await session.execute(
        "INSERT INTO approvals (id, app_id, user_id, identifier, data, created_at)"
        " SELECT left(md5('approval ' || id), 24), app_id, id, id, '{}', created_at FROM users"
    )
    await session.execute("ANALYZE relying_parties, api_keys, signing_keys, approvals")


# -- plans -----------------------------------------------------------------------------------------


async def _plans(session: seed.Session, sql: str, values: Sequence[object]) -> list[dict[str, Any]]:
    """The plan for any values, and the one for these, as Postgres' JSON has them."""
    await session.execute(f"PREPARE asked AS {sql}")
    try:
        count = await session.fetchval(
            "SELECT coalesce(cardinality(parameter_types), 0) FROM pg_prepared_statements"
            " WHERE name = 'asked'"
        )
        given = f"({', '.join(['NULL'] * count)})" if count else ""
        await session.execute("SET plan_cache_mode = force_generic_plan")
        generic = await session.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE asked{given}")
    finally:
        await session.execute("DEALLOCATE asked")
        await session.execute("SET plan_cache_mode = force_custom_plan")
    custom = (
        await session.fetchval(f"EXPLAIN (FORMAT JSON) {sql}", *values)
        if len(values) == count
        else None
    )
    return [json.loads(told)[0]["Plan"] for told in (generic, custom) if told is not None]


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)


def _shown(plan: dict[str, Any], depth: int = 0) -> str:
    """A plan for people: a line for each node."""
    told = [
        plan[name]
        for name in ("Node Type", "Relation Name", "Index Name", "Index Cond", "Filter")
        if name in plan
    ]
    below = (_shown(inner, depth + 1) for inner in plan.get("Plans", ()))
    return "\n".join(["  " * depth + ", ".join(told), *below])


def _table(relation: str | None) -> str | None:
    """The table of a relation. Only past months of events have so many rows that an index helps."""
    if relation is not None and relation.startswith("events_"):
        past = relation < time.strftime("events_%Y_%m", time.gmtime()) or relation == "events_first"
        return "events" if past else None
    return relation


def whole_reads(plan: dict[str, Any]) -> list[str]:
    """Where a plan reads a whole table that grows, or walks through a whole index of one."""
    found = []
    for node in _nodes(plan):
        table, kind = _table(node.get("Relation Name")), node["Node Type"]
        if table in GROWS and (
            kind == "Seq Scan"
            or (kind in ("Index Scan", "Index Only Scan") and "Index Cond" not in node)
        ):
            found.append(f"{kind} on {table} {node.get('Index Name', '')}".strip())
    return found


@pytest.fixture(scope="module")
def noted(stores: EmbeddedStores) -> Noted:
    return asyncio.run(_collect(stores))


def test_no_plan_reads_a_whole_table(noted: Noted) -> None:
    faults = [
        f"{operation}: {', '.join(whole_reads(plan))}\n{sql}\n{_shown(plan)}"
        for (operation, sql), plans in noted.plans.items()
        if operation not in NOT_RUN
        for plan in plans
        if whole_reads(plan)
    ]
    assert not faults, "\n\n".join(faults)


async def test_a_plan_that_does_is_found(stores: EmbeddedStores) -> None:
    """By the same look at plans, with the planner left no better way."""
    async with session_of(stores) as session:
        for sql, found in (
            ("SELECT id FROM users WHERE status = $1", ["Seq Scan on users"]),
            (
                "UPDATE users SET status = $1"
                " WHERE id IN (SELECT user_id FROM events WHERE result = $1)",
                ["Seq Scan on events"],
            ),
        ):
            generic, custom = await _plans(session, sql, ["active"])
            assert set(found) <= set(whole_reads(generic)), generic
            assert set(found) <= set(whole_reads(custom)), custom
        await session.execute("SET enable_seqscan = off")
        await session.execute("SET enable_bitmapscan = off")
        [generic, _] = await _plans(
            session, "SELECT id FROM users WHERE status = $1 ORDER BY id", ["active"]
        )
        assert whole_reads(generic) == ["Index Scan on users users_pkey"]


async def test_every_foreign_key_has_an_index(stores: EmbeddedStores) -> None:
    """Deleting what it refers to looks for its rows, in a plan that nobody is shown."""
    async with session_of(stores) as session:
        rows = await session.fetch(
            "SELECT conrelid::regclass::text || '.' || conname AS name FROM pg_constraint c"
            " WHERE contype = 'f' AND NOT EXISTS ("
            " SELECT FROM pg_index i"
            " WHERE i.indrelid = c.conrelid AND i.indpred IS NULL AND i.indkey[0] = c.conkey[1])"
        )
    assert [row["name"] for row in rows] == []


# -- that nothing is missed ------------------------------------------------------------------------


def test_every_route_was_asked(noted: Noted, routes: set[tuple[str, str]]) -> None:
    assert routes - noted.routes == set()


@pytest.fixture
async def routes(broker: Started) -> set[tuple[str, str]]:
    """Those of a whole broker that ask a store."""
    app = application(broker.parts, management=True, browser=True)
    found = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method not in {"OPTIONS", "*"}
    }
    return {(m, path) for m, path in found if not path.startswith(_NO_STORE)}


def _sources() -> Iterator[ast.Module]:
    for path in sorted(DURABLE.glob("*.py")):
        if path.stem == "migrations":
            continue
        yield ast.parse(path.read_text(), path.name)


def _asks(call: ast.AST) -> str | None:
    """The operation that a call names: `self._pg.row("name", …)`, or `self.row("name", …)` of
    Postgres itself.
    """
    if (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    ):
        owner = call.func.value
        if (isinstance(owner, ast.Attribute) and owner.attr == "_pg") or (
            isinstance(owner, ast.Name)
            and owner.id == "self"
            and call.func.attr in ("run", "row", "rows")
        ):
            return call.args[0].value
    return None


def test_every_operation_was_run(noted: Noted) -> None:
    named = {name for tree in _sources() for node in ast.walk(tree) if (name := _asks(node))}
    assert len(named) > 30
    assert named - noted.operations == NOT_RUN, "those that are not run are listed, with the reason"


def test_every_piece_of_sql_was_seen(noted: Noted) -> None:
    """An operation may have statements of its own for some callers, and some statements only parts
    for them.
    """
    seen = [" ".join(sql.split()) for _, sql in noted.statements]
    missing = [piece for piece in _pieces() if not any(piece in sql for sql in seen)]
    assert missing == []


def test_every_batch_input_was_seen(noted: Noted) -> None:
    inputs = [found for found in vars(ceremonies).values() if isinstance(found, BatchInput)]
    assert len(inputs) >= 3
    tables = [found.table for found in inputs]
    assert [table for table in tables if not any(table in sql for _, sql in noted.statements)] == []


_ITSELF = re.compile(r"\bpg_\w+")
_SQL = re.compile(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|WHERE|ORDER BY|FROM|JOIN)\b")


def _pieces() -> Iterator[str]:
    """Every constant text with SQL in it, without docstrings, what assertions say, what asks the
    server about itself, the migrations' own, and what is not run."""
    for tree in _sources():
        skipped: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                skipped.add(node.value)
            if isinstance(node, ast.Assert) and node.msg is not None:
                skipped.add(node.msg)
            if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef) and (
                any(_asks(n) in NOT_RUN for n in ast.walk(node))
            ):
                skipped |= set(ast.walk(node))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node not in skipped
                and _SQL.search(node.value)
                and not _ITSELF.search(node.value)
            ):
                yield " ".join(node.value.split())
