"""The multiplexed connection to Redis (`broker.ephemeral.connection`) on a real Valkey, plain and
through TLS: large values, and ends of all kinds.

What the stores make of it, and what a lost reply means, is in tests/stores/test_ephemeral.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as Lost
from redis.exceptions import ResponseError

from broker.cli import process
from broker.ephemeral import connect
from broker.ephemeral.connection import MultiplexedConnection
from broker.ephemeral.transport import Commands
from tests.support.load_balancers import certificate
from tests.support.relay import Door, relay
from tests.support.servers import Valkey, eventually

LIMIT = 5.0
LARGE = 3_000_000  # bytes, more than sockets and transports hold


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey.start(tmp_path_factory.mktemp("sender"))
    yield server
    server.stop()


@pytest.fixture(params=["plain", "TLS"])
async def door(
    request: pytest.FixtureRequest, valkey: Valkey, tmp_path: Path
) -> AsyncIterator[Door]:
    """In front of the server."""
    trust = certificate(tmp_path) if request.param == "TLS" else None
    async with relay(valkey.connect, trust) as made:
        yield made


@pytest.fixture
async def commands(door: Door) -> AsyncIterator[Commands]:
    made = connect(door.url, timeout=LIMIT)
    yield made
    await made.close()


async def test_each_caller_gets_their_own_reply(commands: Commands, door: Door) -> None:
    """A thousand at once on one connection; who gives up takes nobody's."""
    asking = [
        asyncio.ensure_future(commands.ask("ECHO", b"%d" % number, limit=LIMIT))
        for number in range(1000)
    ]
    for number in range(0, 500, 7):  # before anything is written
        asking[number].cancel()
    await asyncio.wait([asking[1]])
    for number in range(500, 1000, 7):  # some of them after
        asking[number].cancel()
    replies = await asyncio.gather(*asking, return_exceptions=True)
    for number, reply in enumerate(replies):
        assert reply == b"%d" % number or isinstance(reply, asyncio.CancelledError)
    assert sum(isinstance(reply, bytes) for reply in replies) >= 850
    assert await commands.ask("ECHO", b"next", limit=LIMIT) == b"next"
    assert door.connections == 1


async def test_large_values(commands: Commands, door: Door) -> None:
    """More than a transport takes at once, in both directions, among small ones."""
    value = bytes(range(256)) * (LARGE // 256)
    replies = tuple(
        await asyncio.gather(
            commands.ask("SET", "large", value, limit=LIMIT),
            commands.ask("ECHO", b"between", limit=LIMIT),
            commands.ask("GET", "large", limit=LIMIT),
            commands.ask("GET", "large", limit=LIMIT),
            commands.ask("ECHO", b"", limit=LIMIT),
            commands.ask("DEL", "large", limit=LIMIT),
        )
    )
    assert replies == (b"OK", b"between", value, value, b"", 1)
    assert door.connections == 1


async def test_a_refusal_is_its_callers(commands: Commands, door: Door) -> None:
    replies = await asyncio.gather(
        commands.ask("ECHO", b"a", limit=LIMIT),
        commands.ask("NONSENSE", limit=LIMIT),
        commands.ask("EVAL", "return redis.call('GET')", 0, limit=LIMIT),
        commands.ask("ECHO", b"b", limit=LIMIT),
        return_exceptions=True,
    )
    assert (replies[0], replies[3]) == (b"a", b"b")
    assert isinstance(replies[1], ResponseError)
    assert isinstance(replies[2], ResponseError)
    assert door.connections == 1


@pytest.mark.parametrize(
    ("deny", "allow", "code"),
    [
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "replica"),
        (
            ("CONFIG", "SET", "min-replicas-to-write", "1"),
            ("CONFIG", "SET", "min-replicas-to-write", "0"),
            "NOREPLICAS",
        ),
    ],
)
async def test_a_server_that_takes_no_writes_is_left(
    valkey: Valkey,
    commands: Commands,
    door: Door,
    deny: tuple[str, ...],
    allow: tuple[str, ...],
    code: str,
) -> None:
    """After a failover the former primary stays one for a while, without replicas."""
    assert await commands.ask("SET", "key", b"a", limit=LIMIT) == b"OK"
    valkey.ask(*deny)
    try:
        with pytest.raises(ResponseError, match=code):
            await commands.ask("SET", "key", b"b", limit=LIMIT)
    finally:
        valkey.ask(*allow)
    assert await commands.ask("ECHO", b"c", limit=LIMIT) == b"c"
    assert door.connections == 2


async def test_the_server_closes_while_callers_wait(commands: Commands, door: Door) -> None:
    """All of them are told, each by an exception of their own; the next has a new connection."""
    assert await commands.ask("ECHO", b"a", limit=LIMIT) == b"a"
    waiting = [
        asyncio.ensure_future(commands.ask("BLPOP", "nothing", 0, limit=LIMIT)) for _ in range(3)
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    door.close()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, Lost) for one in told), told
    assert len({id(one) for one in told}) == 3
    assert await commands.ask("ECHO", b"b", limit=LIMIT) == b"b"
    assert door.connections == 2


async def test_the_server_closes_an_idle_connection(
    commands: Commands, door: Door, valkey: Valkey
) -> None:
    """As one with a `timeout` does: nobody is refused for it."""
    for number in range(1, 4):
        assert await commands.ask("ECHO", b"a", limit=LIMIT) == b"a"
        assert door.connections == number
        assert isinstance(commands, MultiplexedConnection)
        stream = commands._stream
        assert stream is not None
        with valkey.client() as client:
            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        await eventually(partial(getattr, stream, "ended"), "the connection is closed")


async def test_an_end_leaves_no_task(door: Door) -> None:
    """Closed before it was used, while it connects, in use, idle, and twice."""
    before = asyncio.all_tasks()
    own = connect(door.url, timeout=LIMIT)
    await own.close()
    connecting = asyncio.ensure_future(own.ask("ECHO", b"a", limit=LIMIT))
    await asyncio.sleep(0)
    await own.close()
    assert isinstance((await asyncio.gather(connecting, return_exceptions=True))[0], Lost)
    assert await own.ask("ECHO", b"a", limit=LIMIT) == b"a"
    using = asyncio.ensure_future(own.ask("BLPOP", "nothing", 0, limit=LIMIT))
    await asyncio.sleep(0)
    await own.close()
    assert isinstance((await asyncio.gather(using, return_exceptions=True))[0], Lost)
    await own.close()
    await eventually(lambda: not door.open, "the door sees it")
    await eventually(lambda: asyncio.all_tasks() <= before, "no task is left")


def test_one_loop_after_the_other(valkey: Valkey) -> None:
    """A store that was closed may be used again, also in another event loop."""
    commands = connect(valkey.url, timeout=LIMIT)

    async def use() -> object:
        try:
            return await commands.ask("ECHO", b"a", limit=LIMIT)
        finally:
            await commands.close()

    assert [asyncio.run(use()) for _ in range(2)] == [b"a", b"a"]


def test_who_asks_as_the_connection_ends_is_told_so(valkey: Valkey) -> None:
    """A transport is closed a turn before it says that the connection is lost, and takes a write in
    between for nothing.
    """

    async def main() -> None:
        commands = connect(valkey.url, timeout=LIMIT)
        assert isinstance(commands, MultiplexedConnection)
        try:
            assert await commands.ask("PING", limit=LIMIT) == b"PONG"
            assert commands._stream is not None
            assert commands._stream._transport is not None
            commands._stream._transport.close()
            with pytest.raises(Lost):
                await commands.ask("PING", limit=LIMIT)
            assert await commands.ask("PING", limit=LIMIT) == b"PONG"
        finally:
            await commands.close()

    process.run(main())
