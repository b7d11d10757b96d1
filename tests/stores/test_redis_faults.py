"""Every failed command to Redis is counted by its cause and logged: each cause is brought about on
a real server.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from redis.asyncio.connection import DefaultParser

from broker.dialects import openers
from broker.ephemeral import Ephemeral, Unknown, connect
from broker.ephemeral.connection import term_of
from broker.ephemeral.faults import CAUSES, Faults, cause_of
from broker.ephemeral.one_time import Envelope
from broker.ephemeral.transport import Script
from broker.errors import Unavailable
from broker.telemetry import Log, Metrics
from broker.tokens import digest
from tests.support.processes import free_port
from tests.support.proxy import Fate, redis_proxy
from tests.support.servers import Valkey, eventually

SECRET = b"zq9w-a-value"
LIMIT = 5.0


def error_of(reply: str) -> BaseException:
    """What the connection makes of a server's error."""
    error: BaseException = DefaultParser.parse_error(reply)  # type: ignore[no-untyped-call]  # redis-py
    return error


class Operator:
    """A store, and what an operator sees of it."""

    def __init__(self, url: str, timeout: float = LIMIT) -> None:
        self.metrics, self.stream = Metrics(), io.StringIO()
        commands = connect(url, timeout=timeout)
        self.store = Ephemeral(
            commands,
            timeout=timeout,
            metrics=self.metrics,
            log=Log(self.stream),
            clock=lambda: 0.0,
            openers=openers(),
        )

    def counted(self) -> dict[str, float]:
        return {
            labels[0]: number for labels, (number,) in self.metrics.redis_failures.values.items()
        }

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.stream.getvalue().splitlines()]

    async def sees(self, cause: str, error: str, code: str | None) -> None:
        """A store's call fails for this cause; metric and log say so, and nothing of the call's
        data.
        """
        with pytest.raises(Unavailable):
            await self.store.tickets.put("app", "ticket", SECRET.decode(), 60.0)
        assert self.counted() == {cause: 1.0}
        (line,) = self.lines
        told: dict[str, object] = {
            "level": "warning",
            "event": "redis_failed",
            "cause": cause,
            "error": error,
            "code": code,
        }
        told |= {"operation": "put_ticket", "failures": 1}
        assert {name: value for name, value in line.items() if name != "at"} == told
        assert "zq9w" not in self.stream.getvalue()


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey.start(tmp_path_factory.mktemp("faults"))
    yield server
    server.stop()


@pytest.fixture
async def watch() -> AsyncIterator[Callable[..., Operator]]:
    made: list[Operator] = []

    def make(url: str, timeout: float = LIMIT) -> Operator:
        made.append(Operator(url, timeout))
        return made[-1]

    yield make
    for operator in made:
        await operator.store.close()


async def test_a_full_server(valkey: Valkey, watch: Callable[..., Operator]) -> None:
    with valkey.client() as client:
        client.config_set("maxmemory", 1)
        try:
            await watch(valkey.url).sees("oom", "OutOfMemoryError", "OOM")
        finally:
            client.config_set("maxmemory", 0)


async def test_a_replica(valkey: Valkey, watch: Callable[..., Operator]) -> None:
    with valkey.client() as client:
        client.replicaof("127.0.0.1", "1")
        try:
            await watch(valkey.url).sees("readonly", "ReadOnlyError", "READONLY")
        finally:
            client.replicaof("NO", "ONE")


async def test_too_few_replicas(valkey: Valkey, watch: Callable[..., Operator]) -> None:
    with valkey.client() as client:
        client.config_set("min-replicas-to-write", 1)
        try:
            await watch(valkey.url).sees("noreplicas", "ResponseError", "NOREPLICAS")
        finally:
            client.config_set("min-replicas-to-write", 0)


async def test_a_user_without_a_permission(valkey: Valkey, watch: Callable[..., Operator]) -> None:
    with valkey.client() as client:
        client.execute_command("ACL SETUSER ann on >pw ~* +@all -set")
    url = valkey.url.replace("://", "://ann:pw@")
    await watch(url).sees("noperm", "NoPermissionError", "NOPERM")


async def test_a_wrong_password(valkey: Valkey, watch: Callable[..., Operator]) -> None:
    """The connection is never made, and it is told why."""
    url = valkey.url.replace("://", "://ann:zq9w@")
    await watch(url).sees("auth", "AuthenticationError", "WRONGPASS")


async def test_a_cluster_without_slots(watch: Callable[..., Operator], tmp_path: Path) -> None:
    bus = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    server = Valkey.start(tmp_path / "no-slots", *bus)
    try:
        await watch(server.url).sees("cluster_down", "ClusterDownError", "CLUSTERDOWN")
    finally:
        server.stop()


async def test_nobody_listens(watch: Callable[..., Operator], tmp_path: Path) -> None:
    server = Valkey.start(tmp_path / "gone")
    server.stop()
    await watch(server.url).sees("connection", "ConnectionError", None)


async def test_a_server_that_is_silent(valkey: Valkey, watch: Callable[..., Operator]) -> None:
    async with redis_proxy(valkey.connect) as proxy:
        proxy.fate = lambda _: Fate.SWALLOW
        operator = watch(valkey.url_at(proxy.port), timeout=0.3)
        await operator.sees("timeout", "TimeoutError", None)
        await operator.store.close()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("return nothing.at_all", None),
        ("this is no Lua: " + SECRET.decode(), None),
        ("return redis.call('HGETALL', KEYS[1])", "WRONGTYPE"),
        ("return redis.call('NONSENSE', ARGV[1])", None),
    ],
)
async def test_a_script_with_a_defect(
    valkey: Valkey, watch: Callable[..., Operator], text: str, code: str | None
) -> None:
    with valkey.client() as client:
        client.set("text", "x")
    operator = watch(valkey.url)
    with pytest.raises(Unavailable):
        await operator.store._transport.run("defect", Script(text), [b"text"], [SECRET])
    assert operator.counted() == {"script": 1.0}
    (line,) = operator.lines
    assert (line["cause"], line["error"], line["operation"]) == (
        "script",
        "ResponseError",
        "defect",
    )
    assert line["code"] in {code, "ERR"}
    assert "zq9w" not in operator.stream.getvalue()


async def test_a_busy_server(valkey: Valkey, watch: Callable[..., Operator]) -> None:
    """Another client's script never ends."""
    with valkey.client() as client:
        client.config_set("busy-reply-threshold", 1)
    reader, writer = await valkey.connect()
    writer.write(b"EVAL 'while true do end' 0\r\n")
    with valkey.client() as client:
        await eventually(lambda: _is_busy(client), "the script runs")
        try:
            await watch(valkey.url).sees("busy", "ResponseError", "BUSY")
        finally:
            client.script_kill()
            await reader.read(1)
            writer.close()


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as fault:
        return "BUSY" in str(fault)
    return False


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading"),
        ("MASTERDOWN Link with MASTER is down", "cluster_down"),
        ("MISCONF Errors writing to the AOF file: No space left on device", "misconf"),
        ("MOVED 3999 127.0.0.1:6381", "redirect"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "redirect"),
        (
            "ERR ACL failure in script: User ann has no permissions to run the 'set' command",
            "noperm",
        ),
        ("ERR max number of clients reached", "connection"),
        ("NOAUTH Authentication required.", "auth"),
        ("ERR unknown command 'zq9w', with args beginning with: 'zq9w'", "other"),
        ("zq9w", "other"),
    ],
)
def test_replies_that_a_test_can_hardly_bring_about(reply: str, cause: str) -> None:
    assert cause_of(error_of(reply))[0] == cause


def test_a_cause_is_logged_once_a_second_and_counted_always() -> None:
    now, metrics, stream = 100.0, Metrics(), io.StringIO()
    faults = Faults(metrics, Log(stream), lambda: now)
    full, slow = error_of("OOM command not allowed"), TimeoutError()

    def told() -> list[tuple[str, int]]:
        lines = [orjson.loads(line) for line in stream.getvalue().splitlines()]
        return [(line["cause"], line["failures"]) for line in lines]

    for _ in range(500):
        faults.tell("put", full)
    faults.tell("put", slow)
    assert told() == [("oom", 1), ("timeout", 1)], "each cause by itself"
    now += 0.99
    faults.tell("put", full)
    assert len(told()) == 2
    now += 0.02
    faults.tell("put", full)
    assert told()[2:] == [("oom", 501)], "with all that were not told"
    assert metrics.redis_failures.values == {("oom",): [502.0], ("timeout",): [1.0]}


def test_readme_lists_the_causes() -> None:
    text = (Path(__file__).parents[2] / "deploy" / "MONITORING.md").read_text()
    (row,) = re.findall(r"\| `broker_redis_failures_total` \| cause \| (.*) \|\n", text)
    assert tuple(re.findall(r"`([a-z_]+)`", row.partition(":")[2].partition(".")[0])) == CAUSES


async def test_a_lost_connection_is_told_to_all_who_wait(valkey: Valkey) -> None:
    """Each failure counts, and the cause is what ended the connection."""
    operator = Operator(valkey.url)
    await operator.store.check()
    with valkey.client() as client:
        client.config_set("busy-reply-threshold", 5000)
        waits: list[Awaitable[object]] = [
            operator.store._transport.ask("wait", "BLPOP", b"nothing", 0) for _ in range(3)
        ]
        asked = [asyncio.ensure_future(wait) for wait in waits]
        await eventually(lambda: client.info("clients")["blocked_clients"] == 1, "it waits")
        client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        results = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(result) for result in results} == {Unavailable}
    assert operator.counted() == {"connection": 3.0}
    assert [line["failures"] for line in operator.lines] == [1]
    await operator.store.close()


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x92\x01", b"zq9w-a-value"])
async def test_a_value_that_is_none_of_ours(
    valkey: Valkey, watch: Callable[..., Operator], payload: bytes
) -> None:
    """An envelope with a payload that can't be decoded is unknown to the caller; the operator sees
    why, and no byte of it."""
    operator, nonce = watch(valkey.url), "pbn_" + "n" * 43
    with valkey.client() as client:
        key = b"n:" + digest("nonce", nonce)
        value = Envelope("nonce", "app", 60.0, payload)
        term = term_of(valkey.ask("INFO", "replication"))
        client.set(key, value.serialize(term), px=700_000)
    assert await operator.store.nonces.take("app", nonce) == Unknown("unreadable")
    assert operator.counted() == {"unreadable": 1.0}
    (line,) = operator.lines
    assert (line["cause"], line["operation"]) == ("unreadable", "take_nonce")
    assert "zq9w" not in operator.stream.getvalue()
