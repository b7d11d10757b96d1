"""What `broker doctor` and a start find in Redis, on servers with the faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import orjson
import pytest

from broker.cli.findings import Finding
from tests.support.commands import Cli, refused_serve
from tests.support.processes import until
from tests.support.proxy import Streams, redis_proxy
from tests.support.servers import Valkey

User = Callable[..., str]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    made = Valkey.start(tmp_path_factory.mktemp("valkey"))
    yield made
    made.stop()


def user(server: Valkey, *rules: str) -> str:
    """The URL of a user of the server with these rules."""
    server.ask("ACL", "SETUSER", "broker", "reset", "on", ">secret", "~*", "+@all", *rules)
    return f"redis://broker:secret@127.0.0.1:{server.port}"


def findings(cli: Cli) -> dict[str, Finding]:
    """The findings of the doctor, by check. "clock" is of Redis."""
    made = [Finding(**found) for found in orjson.loads(cli("doctor", "--json").out)]
    return {finding.check: finding for finding in made}


def refusal(cli: Cli) -> str:
    """Why `serve` does not start."""
    done = cli("serve", "--port", "0")
    assert done.status == 1
    return done.err


def test_a_user_that_may_not_read_the_term(
    cli: Cli, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_REDIS_URL", user(valkey, "-info"))
    found = findings(cli)["term"]
    assert not found.ok
    assert "+info" in found.todo
    assert "can't be read" in refusal(cli)


async def test_connections_that_reach_several_servers(
    cli: Cli, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Valkey.start(tmp_path / "second")
    turns = cycle((valkey, second))

    async def connect() -> Streams:
        return await next(turns).connect()

    try:
        async with redis_proxy(connect) as proxy:
            monkeypatch.setenv("BROKER_REDIS_URL", f"redis://127.0.0.1:{proxy.port}")
            found = (await asyncio.to_thread(findings, cli))["term"]
            assert not found.ok
            assert "differs between connections" in await asyncio.to_thread(refused_serve)
    finally:
        second.stop()


def test_settings_that_cost_one_time_values(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--maxmemory-policy", "allkeys-lru", "--enable-debug-command", "yes")
    server = Valkey.start(tmp_path / "valkey", *words)
    try:
        monkeypatch.setenv("BROKER_REDIS_URL", server.url)
        found = findings(cli)
        assert [found[name].ok for name in ("term", "eviction", "debug command")] == [
            True,
            False,
            False,
        ]
        told = refusal(cli)
        assert "maxmemory-policy is allkeys-lru" in told
        assert "enable-debug-command is yes" in told
    finally:
        server.stop()


def test_settings_that_are_not_seen_are_not_fine(
    cli: Cli, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_REDIS_URL", user(valkey, "-config"))
    found = findings(cli)
    assert found["debug command"] == Finding(
        "debug command",
        True,
        "unseen: the broker's user may not read it.",
        "Check enable-debug-command on the server, or allow +config|get.",
    )
    assert "warn debug command: unseen" in cli("doctor").out


def test_advice_where_replicas_are(
    cli: Cli, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("replica-read-only", "repl-backlog-ttl", "min-replicas-to-write")
    monkeypatch.setenv("BROKER_REDIS_URL", valkey.url)
    assert not findings(cli).keys() & set(names)
    replica = Valkey.start(tmp_path / "replica", "--replicaof", f"127.0.0.1 {valkey.port}")
    try:
        until(lambda: b"connected_slaves:1" in valkey.ask("INFO", "replication"), "it replicates")
        valkey.ask("CONFIG", "SET", "replica-read-only", "no", "repl-backlog-ttl", "3600")
        found = findings(cli)
        assert all(found[name].ok and found[name].todo for name in names)
        fine = ("yes", "0", "1")
        for name, value in zip(names, fine, strict=True):
            valkey.ask("CONFIG", "SET", name, value)
        found = findings(cli)
        assert [(found[name].found, found[name].todo) for name in names] == [
            (value, "") for value in fine
        ]
    finally:
        replica.stop()
