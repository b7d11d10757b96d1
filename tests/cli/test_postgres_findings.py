"""What `broker doctor` finds in Postgres, on a primary with a synchronous standby."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from broker.cli.findings import Finding
from tests.chaos.postgreses import Pair
from tests.support.commands import Cli
from tests.support.processes import until

WELL = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "standby": "synchronous_standby_names is *",
    "role": "owns no table",
    "schema": "not open to every role",
    "rights": "on all tables",
    "connections": "117 at most, and an instance takes 17",
}
SOUND = (
    "ALTER SYSTEM RESET ALL",
    "ALTER SYSTEM SET synchronous_standby_names = '*'",
    "DROP TABLE IF EXISTS owned",
    "ALTER ROLE service NOSUPERUSER CONNECTION LIMIT -1",
    "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    "SELECT pg_reload_conf()",
)
Doctor = Callable[[], dict[str, Finding]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="broker-findings-"))
    folder.chmod(0o755)
    made = asyncio.run(Pair.start(folder / "pair"))
    execute(made, "CREATE ROLE service LOGIN")
    yield made
    asyncio.run(made.stop())
    shutil.rmtree(folder)


def execute(pair: Pair, *statements: str) -> None:
    asyncio.run(pair.primary.run(*statements))


@pytest.fixture
def doctor(cli: Cli, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """The findings that are tested here, of the sound pair and a role that owns nothing."""
    url = pair.primary.url.replace("//broker@", "//service@")
    monkeypatch.setenv("BROKER_DATABASE_URL", url)

    def findings() -> dict[str, Finding]:
        made = [Finding(**found) for found in orjson.loads(cli("doctor", "--json").out)]
        return {finding.check: finding for finding in made if finding.check in WELL}

    execute(pair, *SOUND)
    well = {check: Finding(check, True, found) for check, found in WELL.items()}
    until(lambda: findings() == well, "all is well")
    return findings


@pytest.mark.parametrize(
    ("statements", "check", "ok", "found", "todo"),
    [
        (
            ["ALTER SYSTEM SET fsync = off"],
            "fsync",
            False,
            "off: a crash of the machine loses acknowledged registrations",
            "Set fsync on.",
        ),
        (
            ["ALTER SYSTEM SET synchronous_commit = off"],
            "synchronous_commit",
            False,
            "off: a crash of Postgres loses acknowledged registrations.",
            "Set it on",
        ),
        (
            ["ALTER SYSTEM SET full_page_writes = off"],
            "full_page_writes",
            True,
            "off: a crash of the machine may damage pages.",
            "Set it on",
        ),
        (
            ["ALTER SYSTEM SET synchronous_standby_names = ''"],
            "standby",
            True,
            "none is synchronous: a failover may lose acknowledged registrations.",
            "Set synchronous_standby_names.",
        ),
        (
            ["ALTER SYSTEM SET synchronous_commit = local"],
            "standby",
            True,
            "synchronous_commit is local: a failover may lose acknowledged registrations.",
            "Set synchronous_commit on.",
        ),
        (
            ["ALTER ROLE service SUPERUSER"],
            "role",
            True,
            "is a superuser: a leaked password of the service can change the schema.",
            "broker_service",
        ),
        (
            ["CREATE TABLE owned ()", "ALTER TABLE owned OWNER TO service"],
            "role",
            True,
            "owns tables: a leaked password of the service can change the schema.",
            "broker_service",
        ),
        (
            ["CREATE TABLE owned ()", "GRANT SELECT, INSERT, DELETE ON owned TO service"],
            "rights",
            True,
            "lacks some on owned: requests that need them get 503.",
            "Run deploy/grants.sql again.",
        ),
        (
            ["GRANT CREATE ON SCHEMA public TO PUBLIC"],
            "schema",
            True,
            "is open: every role of the database can make functions that run with the broker's",
            "Run deploy/grants.sql.",
        ),
        (
            ["ALTER ROLE service CONNECTION LIMIT 33"],
            "connections",
            True,
            "33 at most, and an instance takes 17: an upgrade runs two beside each other.",
            "Raise max_connections",
        ),
    ],
)
def test_the_doctor_tells_of_a_fault(
    pair: Pair,
    doctor: Doctor,
    statements: list[str],
    check: str,
    ok: bool,
    found: str,
    todo: str,
) -> None:
    """And of no fault before."""
    execute(pair, *statements, "SELECT pg_reload_conf()")
    until(lambda: doctor()[check].found.startswith(found), f"{check} is told of")
    finding = doctor()[check]
    assert finding.ok is ok
    assert todo in finding.todo
