"""The router of Redis Cluster (`broker.ephemeral.cluster`) on three masters and three replicas:
topology, redirections, failovers.

What the stores promise on a cluster is in tests/stores/test_ephemeral.py and
tests/core/test_mailbox.py, and what the whole broker promises in the tests that are marked
`ON_BOTH`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from redis.asyncio.connection import SSLConnection
from redis.crc import key_slot
from redis.exceptions import ClusterDownError, MovedError, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as Lost

from broker.dialects import openers
from broker.ephemeral import Ephemeral, Taken, Unknown, connect
from broker.ephemeral.cluster import Address, ClusterRouter, _Answer, _Claim, _parsed
from broker.ephemeral.codec import encode
from broker.ephemeral.one_time import Envelope, Expected, OneTimeStore
from broker.ephemeral.transport import DOWN, Transport
from broker.errors import Unavailable
from broker.telemetry import Log, Metrics
from broker.tokens import SystemMint, digest
from tests.conftest import Starter
from tests.support.authenticator import Authenticator
from tests.support.proxy import Fate, RedisProxy, redis_proxy
from tests.support.servers import MASTERS, Cluster, Valkey, eventually, reached
from tests.support.wire import Wire

LIMIT = 5.0
MINT = SystemMint()
SHARD = [
    b"{a%d}" % next(n for n in range(999) if key_slot(b"a%d" % n) * MASTERS >> 14 == m)
    for m in range(MASTERS)
]
"""A hash tag in the slots of each master."""


@pytest.fixture
def empty(cluster: Cluster) -> None:
    """The cluster has no keys: slots with keys can't be given away."""
    for node in cluster.nodes[:MASTERS]:
        node.ask("FLUSHALL")


@pytest.fixture
async def router(cluster: Cluster, empty: None) -> AsyncIterator[ClusterRouter]:
    made = cluster.commands(timeout=LIMIT)
    yield made
    await made.close()


@pytest.fixture
async def proxy(cluster: Cluster) -> AsyncIterator[RedisProxy]:
    """A proxy in front of each node."""
    async with redis_proxy(*cluster.doors) as made:
        yield made
        made.release.set()


@pytest.fixture
async def behind(cluster: Cluster, empty: None, proxy: RedisProxy) -> AsyncIterator[ClusterRouter]:
    """A router that reaches the nodes through the proxy."""
    made = cluster.commands(timeout=LIMIT, through=proxy)
    yield made
    await made.close()


async def settled(router: ClusterRouter) -> None:
    """No read of the topology is under way."""
    await eventually(
        lambda: router._reading is None or router._reading.done(), "the topology is known"
    )


def test_the_tags_are_one_for_each_master() -> None:
    for number, tag in enumerate(SHARD):
        first, last = Cluster.slots(number)
        assert first <= key_slot(tag) <= last


# -- topology ------------------------------------------------------------------------------------


async def test_300_callers_at_a_cold_start(cluster: Cluster, proxy: RedisProxy) -> None:
    """All wait for one read of the topology, then each command goes to its node, once."""
    for _ in range(3):
        proxy.commands.clear()
        router = cluster.commands(timeout=LIMIT, through=proxy)
        keys = [b"cold:%d" % number for number in range(300)]
        replies = await asyncio.gather(
            *(router.ask("SET", k, k, "PX", 5000, limit=LIMIT) for k in keys)
        )
        assert replies == [b"OK"] * 300
        assert len(proxy.named(b"SET")) == 300, "none was sent to a wrong node"
        assert len(proxy.named(b"CLUSTER")) == 2 * len(cluster.nodes), "each node was asked once"
        await settled(router)
        assert router._nodes.keys() == {
            ("127.0.0.1", node.port) for node in cluster.nodes[:MASTERS]
        }
        await router.close()


async def test_a_cold_start_of_the_whole_store(cluster: Cluster) -> None:
    """300 callers at once, with scripts that no node has: nobody is refused."""
    with cluster.client() as client:
        client.script_flush()
    metrics = Metrics()
    store = Ephemeral(
        cluster.commands(timeout=LIMIT),
        timeout=LIMIT,
        metrics=metrics,
        log=Log(io.StringIO()),
        clock=time.time,
        openers=openers(),
    )
    handles = [MINT.token("handle") for _ in range(300)]
    apps = [f"app-{number}" for number in range(300)]
    taken = await asyncio.gather(
        *(
            store.ceremonies.take("handle", app, handle, ("page",), "register")
            for app, handle in zip(apps, handles, strict=True)
        )
    )
    assert taken == [Unknown("unknown")] * 300
    assert metrics.redis_failures.values == {}
    await store.close()


@pytest.mark.parametrize("seeds", ["a dead one first", "one that hangs first", "a replica"])
async def test_one_seed_suffices(cluster: Cluster, tmp_path: Path, seeds: str) -> None:
    other = Valkey.start(tmp_path / "other")
    if seeds == "a dead one first":
        other.stop()
    else:
        other.process.send_signal(signal.SIGSTOP)
    good = cluster.nodes[MASTERS if seeds == "a replica" else 1].port
    hosts = [
        f"127.0.0.1:{port}" for port in ([good] if seeds == "a replica" else [other.port, good])
    ]
    router = connect("redis+cluster://" + ",".join(hosts), timeout=LIMIT)
    try:
        for tag in SHARD:
            assert await router.ask("SET", tag, b"x", "PX", 5000, limit=LIMIT) == b"OK"
    finally:
        await router.close()
        other.stop()


async def test_a_connection_takes_the_password_of_then(cluster: Cluster) -> None:
    words = ["old-word"]

    def url() -> str:
        return f"redis+cluster://ann:{words[-1]}@127.0.0.1:{cluster.nodes[0].port}"

    router = connect(url(), timeout=LIMIT, read_url=url)
    try:
        for word in ("old-word", "new-word"):
            words.append(word)
            for node in cluster.nodes:
                node.ask("ACL SETUSER", "ann", "on", "resetpass", f">{word}", "~*", "+@all")
            for tag in SHARD:
                assert await router.ask("SET", tag, b"x", "PX", 5000, limit=LIMIT) == b"OK"
            await router.close()
    finally:
        for node in cluster.nodes:
            node.ask("ACL DELUSER", "ann")


@pytest.mark.parametrize(
    "url", ["redis+cluster://u:p@h1,h2:2", "rediss+cluster://u:p@h1,h2:2?ssl_cert_reqs=none"]
)
async def test_each_node_is_reached_as_the_url_says(url: str) -> None:
    """TLS and credentials are those of the URL, for every node."""
    router = connect(url, timeout=LIMIT)
    assert isinstance(router, ClusterRouter)
    assert router._seeds == {("h1", 6379), ("h2", 2)}
    for address in (("h2", 2), ("node-7.example", 7000)):
        pool: Any = router._node(address)._pool()
        made = pool.make_connection()
        assert (made.host, made.port, made.username, made.password) == (*address, "u", "p")
        assert isinstance(made, SSLConnection) == url.startswith("rediss")
    await router.close()


SLOTS = [
    [0, 5, [b"10.0.0.1", 7000, b"a", []], [b"10.0.0.2", 7001, b"b", []]],
    [6, 6, [b"node.example", 7002, b"c", []]],
]
NODES = (
    b"a 10.0.0.1:7000@17000 myself,master - 0 0 4 connected 0-5\n"
    b"b 10.0.0.2:7001@17001 slave a 0 0 4 connected\n"
    b"c 10.0.0.3:7002@17002,node.example master - 0 0 2 connected 6 [6->-a]\n"
)


@pytest.mark.parametrize("unknown", [None, b"", b"?"])
def test_a_node_without_a_host_is_at_the_host_that_was_asked(unknown: bytes | None) -> None:
    answer = _parsed("seed.example", NODES, SLOTS)
    own, hosts = _Claim(4, True, ("10.0.0.1", 7000), 0, 5), ("node.example", 7002)
    assert answer.claims == {own, _Claim(2, False, hosts, 6, 6)}
    assert answer.nodes == {("10.0.0.1", 7000), ("10.0.0.2", 7001), hosts}
    nameless = [[0, 5, [unknown, 7000, b"a", []]]]
    assert _parsed("seed.example", NODES, nameless).nodes == {("seed.example", 7000)}


@pytest.mark.parametrize("kind", ["hostname", "unknown-endpoint"])
async def test_what_the_cluster_announces(cluster: Cluster, kind: str) -> None:
    """Host names where it prefers those; none: the host of the seed. Redirections name the same."""
    for node in cluster.nodes:
        node.ask(
            "CONFIG SET",
            "cluster-announce-hostname",
            "localhost",
            "cluster-preferred-endpoint-type",
            kind,
        )
    router = connect(f"redis+cluster://localhost:{cluster.nodes[0].port}", timeout=LIMIT)
    assert isinstance(router, ClusterRouter)
    try:
        for tag in SHARD:
            assert await router.ask("SET", tag, b"x", "PX", 5000, limit=LIMIT) == b"OK"
        await settled(router)
        assert {host for host, _ in router._masters} == {"localhost"}
        router._owners[key_slot(SHARD[2])] = router._owners[key_slot(SHARD[0])]
        assert await router.ask("GET", SHARD[2], limit=LIMIT) == b"x"
        await settled(router)
        assert {host for host, _ in router._nodes} == {"localhost"}
    finally:
        await router.close()
        for node in cluster.nodes:
            node.ask(
                "CONFIG SET",
                "cluster-announce-hostname",
                "",
                "cluster-preferred-endpoint-type",
                "ip",
            )


@pytest.mark.parametrize("number", range(10))
def test_the_newest_claim_to_a_slot_counts(number: int) -> None:
    """Whatever the order of the answers; also of a node that has another address now."""
    router = ClusterRouter([("seed", 1)], lambda *_: pytest.fail("connects"), timeout=LIMIT)
    old, new, moved = (f"old-{number}", 1), (f"new-{number}", 1), (f"new-{number}", 2)

    def answer(*claims: _Claim) -> _Answer:
        return _Answer(frozenset(claims), frozenset(claim.owner for claim in claims))

    outdated = answer(_Claim(1, True, old, 0, 16383))
    newer = answer(
        _Claim(7, False, new, 100, 200),
        _Claim(1, False, old, 0, 99),
        _Claim(1, False, old, 201, 16000),
    )
    itself = answer(_Claim(7, True, moved, 100, 200))
    for answers in (
        [outdated, newer, itself],
        [itself, newer, outdated],
        [newer, outdated, itself],
    ):
        router._adopt(answers)
        assert [router._owners[slot] for slot in (0, 99, 100, 200, 201, 16383)] == [
            old,
            old,
            moved,
            moved,
            old,
            old,
        ]
        assert router._masters == {old, moved}
    router._adopt([newer])
    assert router._owners[16001:] == [None] * (16384 - 16001)


async def test_an_outdated_node_misleads_nobody(behind: ClusterRouter, proxy: RedisProxy) -> None:
    """One that hangs as well: the topology is what the others say."""
    await behind.check(limit=LIMIT)
    told = behind._told_by
    stale = _Answer(
        frozenset([_Claim(0, True, ("127.0.0.1", 1), 0, 16383)]), frozenset([("127.0.0.1", 1)])
    )

    async def answers(address: Address) -> _Answer | None:
        if address[1] == 1:
            return stale
        return await told(address)

    behind._told_by = answers  # type: ignore[method-assign]
    behind._known |= {("127.0.0.1", 1)}
    owners = list(behind._owners)
    behind._doubt()
    await settled(behind)
    assert behind._owners == owners


async def test_a_server_that_is_no_cluster(tmp_path: Path) -> None:
    server = Valkey.start(tmp_path / "single")
    router = connect(f"redis+cluster://127.0.0.1:{server.port}", timeout=LIMIT)
    try:
        with pytest.raises(Lost) as caught:
            await router.ask("GET", b"x", limit=LIMIT)
        assert isinstance(caught.value.__cause__, ResponseError)
    finally:
        await router.close()
        server.stop()


@pytest.mark.parametrize(
    ("nodes", "slots"),
    [
        (b"", SLOTS),
        (b"a b c", SLOTS),
        (b"\xff", SLOTS),
        (NODES, [[0, 5]]),
        (NODES, [[0, 5, []]]),
        (NODES, [None]),
        (7, []),
    ],
)
async def test_a_malformed_topology_is_a_failure_like_others(nodes: Any, slots: Any) -> None:
    class Node:
        idle = True

        def ask(self, *command: Any, **_: Any) -> asyncio.Future[Any]:
            reply = asyncio.get_running_loop().create_future()
            reply.set_result(nodes if command[1] == "NODES" else slots)
            return reply

        async def close(self) -> None: ...

    router = ClusterRouter([("seed", 1)], lambda *_: Node(), timeout=LIMIT)  # type: ignore[arg-type]
    with pytest.raises(DOWN):
        await router.ask("GET", b"x", limit=0.2)
    await router.close()


async def test_a_host_that_is_no_name() -> None:
    router = connect("redis+cluster://" + "x" * 300 + ".example:1", timeout=LIMIT)
    with pytest.raises(DOWN):
        await router.ask("GET", b"x", limit=LIMIT)
    await router.close()


async def test_an_end_leaves_no_task_and_a_new_begin_works(cluster: Cluster) -> None:
    before = asyncio.all_tasks()
    router = cluster.commands(timeout=LIMIT)
    await router.close()
    waiting = asyncio.ensure_future(router.ask("GET", b"x", limit=LIMIT))
    await asyncio.sleep(0)
    await router.close()
    with pytest.raises(DOWN):
        await waiting
    assert await router.ask("GET", b"x", limit=LIMIT) is None
    blocked = asyncio.ensure_future(router.ask("BLPOP", b"nothing", 0, limit=LIMIT))
    await asyncio.sleep(0.05)  # it is sent
    await router.close()
    with pytest.raises(DOWN):
        await blocked
    await eventually(lambda: asyncio.all_tasks() <= before, "no task is left")


# -- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(MASTERS))
async def test_check_tells_of_each_master(
    cluster: Cluster, router: ClusterRouter, number: int
) -> None:
    await router.check(limit=LIMIT)
    cluster.nodes[number].ask("CONFIG SET", "maxmemory", 1)
    try:
        with pytest.raises(RedisError, match="maxmemory"):
            await router.check(limit=LIMIT)
    finally:
        cluster.nodes[number].ask("CONFIG SET", "maxmemory", 0)
    await router.check(limit=LIMIT)


async def test_a_command_without_a_key_is_answered_by_a_node(router: ClusterRouter) -> None:
    assert b"redis_version" in await router.ask("INFO", b"server", limit=LIMIT)
    assert len(await router.ask("TIME", limit=LIMIT)) == 2
    assert await router.ask("EVAL", "return 7", 0, limit=LIMIT) == 7


# -- redirections --------------------------------------------------------------------------------


def _give(cluster: Cluster, slot: int, source: int, target: int) -> None:
    """What a resharding does at its end: all keys have been moved."""
    name = cluster.ids[target]
    for number in (target, source, *({0, 1, 2} - {source, target})):
        cluster.nodes[number].ask("CLUSTER SETSLOT", slot, "NODE", name)


def _open(cluster: Cluster, slot: int, source: int, target: int) -> None:
    """What a resharding begins with."""
    cluster.nodes[target].ask("CLUSTER SETSLOT", slot, "IMPORTING", cluster.ids[source])
    cluster.nodes[source].ask("CLUSTER SETSLOT", slot, "MIGRATING", cluster.ids[target])


def _migrate(cluster: Cluster, slot: int, source: int, target: int) -> None:
    """Move the keys that the slot has now."""
    while keys := cluster.nodes[source].ask("CLUSTER GETKEYSINSLOT", slot, 3):
        port = cluster.nodes[target].port
        cluster.nodes[source].ask("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *keys)


@contextlib.contextmanager
def moving(cluster: Cluster, slot: int) -> Iterator[None]:
    """Inside, the slot of master 0 is on its way to master 1; afterwards it is where it was."""
    _open(cluster, slot, 0, 1)
    try:
        yield
    finally:
        _migrate(cluster, slot, 0, 1)
        _give(cluster, slot, 0, 1)
        _open(cluster, slot, 1, 0)
        _migrate(cluster, slot, 1, 0)
        _give(cluster, slot, 1, 0)


async def test_moved(cluster: Cluster, behind: ClusterRouter, proxy: RedisProxy) -> None:
    """The command goes to the owner that the node names, and the next one goes there at once."""
    slot = key_slot(SHARD[0])
    await behind.ask("SET", SHARD[0], b"x", "PX", 60000, limit=LIMIT)
    await settled(behind)
    _open(cluster, slot, 0, 1)
    _migrate(cluster, slot, 0, 1)
    _give(cluster, slot, 0, 1)
    try:
        proxy.commands.clear()
        assert await behind.ask("GETDEL", SHARD[0], limit=LIMIT) == b"x"
        assert len(proxy.named(b"GETDEL")) == 2
        assert await behind.ask("GETDEL", SHARD[0], limit=LIMIT) is None
        assert len(proxy.named(b"GETDEL")) == 3
        await settled(behind)
        assert behind._owners[slot] == ("127.0.0.1", cluster.nodes[1].port)
    finally:
        _open(cluster, slot, 1, 0)
        _give(cluster, slot, 1, 0)


async def test_a_value_put_by_an_outdated_topology_can_be_taken(
    cluster: Cluster, router: ClusterRouter
) -> None:
    """The put follows MOVED, and the value has the term of the node that has it."""
    slot, key = key_slot(SHARD[0]), SHARD[0] + b"put"
    transport = Transport(router, timeout=LIMIT, metrics=Metrics(), log=Log(io.StringIO()))
    store = OneTimeStore(transport, time.time, None)
    await router.check(limit=LIMIT)
    await settled(router)
    _open(cluster, slot, 0, 1)
    _give(cluster, slot, 0, 1)
    try:
        await store.put("put", key, Envelope("ticket", "", time.time() + 60, encode("x")))
        assert await store.take("take", [key], str, Expected(["ticket"])) == Taken("x")
    finally:
        _open(cluster, slot, 1, 0)
        _give(cluster, slot, 1, 0)


async def test_ask(cluster: Cluster, behind: ClusterRouter, proxy: RedisProxy) -> None:
    """A key that has been moved ahead of its slot; the owner stays whom all others ask."""
    slot = key_slot(SHARD[0])
    key, late = SHARD[0] + b"moved", SHARD[0] + b"not moved"
    await behind.ask("SET", key, b"x", "PX", 60000, limit=LIMIT)
    with moving(cluster, slot):
        _migrate(cluster, slot, 0, 1)
        proxy.commands.clear()
        assert await behind.ask("GETDEL", key, limit=LIMIT) == b"x"
        assert [words[0] for words in proxy.commands if words[0] != b"CLUSTER"] == [
            b"GETDEL",
            b"ASKING",
            b"GETDEL",
        ]
        assert await behind.ask("GETDEL", key, limit=LIMIT) is None
        assert await behind.ask("SET", late, b"y", "PX", 60000, limit=LIMIT) == b"OK"
        assert behind._owners[slot] == ("127.0.0.1", cluster.nodes[0].port)
    assert await behind.ask("GETDEL", late, limit=LIMIT) == b"y"


async def test_asking_stays_with_its_command(cluster: Cluster, router: ClusterRouter) -> None:
    """Callers who give up, in any turn of the loop, leave no ASKING for the next one's command."""
    slot = key_slot(SHARD[0])
    await router.check(limit=LIMIT)
    with moving(cluster, slot):
        target = router._node(("127.0.0.1", cluster.nodes[1].port))
        for turns in range(40):
            asked = [
                asyncio.ensure_future(router.ask("GET", SHARD[0] + b"x", limit=LIMIT))
                for _ in range(3)
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            for one in asked:
                one.cancel()
            with pytest.raises(MovedError):
                await target.ask("GET", SHARD[0] + b"x", limit=LIMIT)
            assert await target.ask("GET", SHARD[1], limit=LIMIT) is None
            await asyncio.gather(*asked, return_exceptions=True)


async def test_keys_that_are_apart(
    cluster: Cluster, behind: ClusterRouter, proxy: RedisProxy
) -> None:
    """Once more after a moment, then the caller is told: the command was not run."""
    slot = key_slot(SHARD[0])
    one, two = SHARD[0] + b"1", SHARD[0] + b"2"
    await behind.ask("SET", one, b"x", "PX", 60000, limit=LIMIT)
    await behind.ask("SET", two, b"y", "PX", 60000, limit=LIMIT)
    script = "return redis.call('MGET', KEYS[1], KEYS[2])"
    with moving(cluster, slot):
        cluster.nodes[0].ask("MIGRATE", "127.0.0.1", cluster.nodes[1].port, one, 0, 5000)
        proxy.commands.clear()
        with pytest.raises(TryAgainError):
            await behind.ask("EVAL", script, 2, one, two, limit=LIMIT)
        assert len(proxy.named(b"EVAL")) == 2
        asked = asyncio.ensure_future(behind.ask("EVAL", script, 2, one, two, limit=LIMIT))
        await eventually(lambda: len(proxy.named(b"EVAL")) == 3, "it was asked")
        _migrate(cluster, slot, 0, 1)
        assert await asked == [b"x", b"y"]


async def test_redirections_have_an_end(
    behind: ClusterRouter, cluster: Cluster, proxy: RedisProxy
) -> None:
    """Two nodes that each name the other: a few times, then the caller is told."""
    slot, (first, second, _) = key_slot(SHARD[0]), cluster.nodes[:MASTERS]
    await behind.check(limit=LIMIT)
    await settled(behind)
    first.ask("CLUSTER SETSLOT", slot, "NODE", cluster.ids[1])
    try:
        proxy.commands.clear()
        with pytest.raises(MovedError):
            await behind.ask("GET", SHARD[0], limit=LIMIT)
        assert len(proxy.named(b"GET")) == 5
    finally:
        first.ask("CLUSTER SETSLOT", slot, "NODE", cluster.ids[0])
        second.ask("CLUSTER SETSLOT", slot, "NODE", cluster.ids[0])


@pytest.mark.parametrize("fate", [Fate.SWALLOW, Fate.CUT])
async def test_a_reply_lost_after_a_redirection(
    cluster: Cluster, proxy: RedisProxy, fate: Fate
) -> None:
    """ASK was followed, and the reply of the second node is lost: nothing is sent a third time."""
    slot, key = key_slot(SHARD[0]), SHARD[0] + b"lost"
    router = cluster.commands(timeout=0.8, through=proxy)
    with moving(cluster, slot):
        await router.check(limit=0.8)
        target = ("127.0.0.1", cluster.nodes[1].port)
        await router.ask("SET", key, b"x", "PX", 60000, limit=0.8)
        await settled(router)
        proxy.commands.clear()
        asked = 0

        def second(words: list[bytes]) -> Fate:
            nonlocal asked
            asked += words[0] == b"GETDEL"
            return fate if words[0] == b"GETDEL" and asked == 2 else Fate.PASS

        proxy.fate = second
        with pytest.raises(DOWN):
            await router.ask("GETDEL", key, limit=0.8)
        assert len(proxy.named(b"GETDEL")) == 2
        assert target in router._nodes
    await router.close()


async def test_slots_that_move_to_and_fro(cluster: Cluster, router: ClusterRouter) -> None:
    """Under calls: none fails, and each value is taken once."""
    slot, taken, done = key_slot(SHARD[0]), Counter[bytes](), False

    async def caller(name: int) -> None:
        number = 0
        while not done:
            key = b"%b%d:%d" % (SHARD[0], name, number)
            number += 1
            assert await router.ask("SET", key, key, "PX", 60000, limit=LIMIT) == b"OK"
            for reply in await asyncio.gather(
                *(router.ask("GETDEL", key, limit=LIMIT) for _ in range(2))
            ):
                taken[key] += reply == key

    callers = [asyncio.create_task(caller(name)) for name in range(16)]
    await router.check(limit=LIMIT)
    for source, target in ((0, 1), (1, 0)) * 4:
        for step in (_open, _migrate, _migrate, _give):
            await asyncio.to_thread(step, cluster, slot, source, target)
    done = True
    await asyncio.gather(*callers)
    assert set(taken.values()) == {1}
    assert len(taken) > 100


# -- a master that fails -------------------------------------------------------------------------

WITHIN = 2.0  # seconds after the promotion: what is promised
MARGIN = 3.0  # the machine's, which runs other tests


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the test's own that replaces masters, and serves the other slots meanwhile."""
    started = Cluster.start(
        tmp_path / "own", "--cluster-require-full-coverage", "no", failover=True
    )
    yield started
    started.stop()


class Calls:
    """Callers of every shard who put a nonce and take it twice, and what they were told."""

    def __init__(self, store: Ephemeral) -> None:
        self.store = store
        self.taken = Counter[str]()
        self.served: list[list[float]] = [[] for _ in range(MASTERS)]  # when, by shard
        self.failed: list[list[float]] = [[] for _ in range(MASTERS)]
        self.done = False

    async def run(self) -> None:
        await asyncio.gather(*(self._caller() for _ in range(12)))

    async def _caller(self) -> None:
        while not self.done:
            ticket = MINT.token("nonce")
            await self._told(ticket, self.store.tickets.put("app", ticket, 1, time.time() + 60))
            for _ in range(2):
                taken = await self._told(ticket, self.store.tickets.take("app", ticket))
                if isinstance(taken, Taken):
                    self.taken[ticket] += 1
            await asyncio.sleep(0.02)  # not to starve the cluster

    async def _told(self, ticket: str, call: Awaitable[object]) -> object:
        shard = key_slot(b"s:" + digest("ticket", "app", ticket)) * MASTERS >> 14
        try:
            reply = await call
        except Unavailable:
            self.failed[shard].append(time.monotonic())
            return None
        self.served[shard].append(time.monotonic())
        return reply


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_master_that_fails_is_left(
    own_cluster: Cluster,
    start_broker: Starter,
    session: ClientSession,
    device: Authenticator,
    number: signal.Signals,
) -> None:
    """Its slots are served again soon after the replica's promotion. Callers of the other shards
    notice nothing. Nothing comes twice."""
    cluster, metrics = own_cluster, Metrics()
    store = Ephemeral(
        cluster.commands(timeout=1.0),
        timeout=1.0,
        metrics=metrics,
        log=Log(io.StringIO()),
        clock=time.time,
        openers=openers(),
    )
    broker = await start_broker(redis_url=cluster.url, store_timeout=1.0)
    wire = await Wire.open(broker.service, session)
    await wire.user("ann", device)
    calls = Calls(store)
    running = asyncio.create_task(calls.run())
    await eventually(
        lambda: all(len(times) > 20 for times in calls.served), "every shard is served"
    )

    cluster.nodes[0].process.send_signal(number)
    await eventually(lambda: bool(calls.failed[0]), "calls of its shard fail")
    replica = cluster.nodes[MASTERS]
    await eventually(lambda: b"role:master" in replica.ask("INFO", "replication"), "it is promoted")
    promoted = time.monotonic()
    await eventually(lambda: calls.served[0][-1] > promoted, "its shard is served again")
    again = next(at for at in calls.served[0] if at > promoted)
    assert again - promoted <= WITHIN + MARGIN
    late = again + 2.0  # callers of before may wait for as long as their limit
    await eventually(lambda: all(times[-1] > late for times in calls.served), "all are served")
    calls.done = True
    await running

    assert [calls.failed[1], calls.failed[2]] == [[], []]
    assert [at for at in calls.failed[0] if at > late] == []
    assert set(calls.taken.values()) == {1}
    router = store._transport._commands
    assert isinstance(router, ClusterRouter)
    await eventually(
        lambda: (
            router._nodes.keys() == {("127.0.0.1", cluster.nodes[n].port) for n in (1, 2, MASTERS)}
        ),
        "the connection to the one that left is closed",
    )
    failures = {labels[0] for labels in metrics.redis_failures.values}
    assert failures <= {"timeout", "connection", "cluster_down"}
    assert failures
    assert metrics.registry.get_sample_value("broker_redis_term_changes_total") == 1

    await reached(broker.parts.ephemeral.check)  # an idle broker learns of it by its readiness
    nonce = await wire.authenticate(None, device)
    assert (await wire.redeem(nonce)).json["external_id"] == "ann"
    assert (await wire.redeem(nonce)).code == "invalid_nonce"
    await wire.user("bob", Authenticator())
    await store.close()


async def test_a_shard_without_a_master_harms_no_other(own_cluster: Cluster) -> None:
    """Killed with its replica: callers are told, and the topology is read at a bounded rate."""
    cluster = own_cluster
    async with redis_proxy(*cluster.doors) as proxy:
        router = cluster.commands(timeout=1.0, through=proxy)
        await router.check(limit=1.0)
        for node in (cluster.nodes[0], cluster.nodes[MASTERS]):
            node.stop()
        began, asked = time.monotonic(), len(proxy.named(b"CLUSTER"))
        while time.monotonic() < began + 3.0:
            with pytest.raises((ClusterDownError, Lost, OSError)):
                await router.ask("GET", SHARD[0], limit=1.0)
            for tag in SHARD[1:]:
                assert await router.ask("GET", tag, limit=1.0) is None
            await asyncio.sleep(0.02)  # not to starve the cluster
        with pytest.raises(DOWN):
            await router.check(limit=1.0)
        reads = (len(proxy.named(b"CLUSTER")) - asked) / (2 * 4)
        assert reads <= (time.monotonic() - began) / 0.5 + 2
        await router.close()
