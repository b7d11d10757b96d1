"""Redis Cluster router: sends each command to the node that owns the slot of its key.

**Connections.** Each node that owns slots has one multiplexed connection, made when the first
command needs it. The connection of a node that owns nothing any more is closed when no caller waits
on it.

**Topology.** The first commands wait for one read of the topology. A read asks all known nodes and
all seeds at once. An answer says which node owns which slots, and at which config epoch. The newest
claim to a slot counts, so an outdated node misleads no caller. Once one node has answered, the
others have `_ROUND` seconds, so a node that hangs delays no caller further. The topology is read
again when an owner's connection ends by a fault, a reply that is overdue among them, and on MOVED
and CLUSTERDOWN; from then on every `_PAUSE` seconds until each owner of slots has answered. So
after a replica's promotion its slots are served within `_PAUSE` and one read.

A node is reached at the host that the cluster announces (`cluster-preferred-endpoint-type`). Where
the cluster announces none, it is reached at the host through which it was asked.

**Nothing one-time is sent twice.** MOVED, ASK and TRYAGAIN say that the node did not run the
command, so it is sent again within the caller's limit. After any other failure it is unknown
whether the node acted, so the caller is told.
"""

from __future__ import annotations

import asyncio
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Collection, Mapping
from itertools import count
from typing import Any, NamedTuple

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, TryAgainError
from redis.exceptions import ConnectionError as Lost

from broker.ephemeral.connection import PROBE, MultiplexedConnection

Address = tuple[str, int]

_ROUND = 0.2  # seconds that the other nodes have to tell the topology once one has
_PAUSE = 0.5  # seconds between two reads of the topology
_SENDS = 5  # of one command: the first, and those after MOVED and ASK
_TRY_AGAIN = 0.05  # seconds until keys that are being moved may be together again
_KEYLESS = frozenset(("INFO", "TIME"))


class _Claim(NamedTuple):
    """Ownership of a range of slots. The largest claim counts: the newest; of equals the owner's
    own.
    """

    epoch: int
    own: bool
    owner: Address
    first: int
    last: int


class _Answer(NamedTuple):
    """The topology as one node knows it."""

    claims: frozenset[_Claim]
    nodes: frozenset[Address]


class ClusterRouter:
    """Commands to a cluster. `node` makes the connection to an address, which calls back when it
    ends by a fault. `timeout` in seconds limits a read of the topology."""

    def __init__(
        self,
        seeds: Collection[Address],
        node: Callable[[Address, Callable[[], None]], MultiplexedConnection],
        *,
        timeout: float,
    ) -> None:
        self._seeds = frozenset(seeds)
        self._connect = node
        self._timeout = timeout
        self._nodes: dict[Address, MultiplexedConnection] = {}
        self._known = self._seeds  # masters and replicas
        self._owners: list[Address | None] = []  # by slot; empty until the topology is known
        self._masters: frozenset[Address] = frozenset()  # that own slots
        self._probes: list[bytes] = []  # a key of each master
        self._reading: asyncio.Task[None] | None = None
        self._next_read = 0.0
        self._doubted = False
        self._closed_changes = 0  # of terms, by connections that are closed
        self.moves = 0
        self._fault: BaseException | None = None  # why a node did not tell the topology

    async def ask(self, *command: Any, limit: float, patient: bool = False) -> Any:
        """The reply to a command, within `limit` seconds. Its keys share a slot. Without a key any
        node answers.

        Raises:
            TimeoutError, OSError, RedisError: no reply, or one that refuses. It is not known
                whether the server acted.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        key = _key(command)
        slot = 0 if key is None else key_slot(key)
        address, limit = await self._owner(slot, limit)
        asking, sends, postponed = False, 0, False
        while True:
            sends += 1
            try:
                return await self._node(address).ask(
                    *command, limit=limit, asking=asking, patient=patient
                )
            except AskError as redirection:
                asking = not isinstance(redirection, MovedError)
                address = (redirection.host.strip("?") or address[0], redirection.port)
                if not asking and self._owners:
                    self._hand_over(self._owners[slot], address)
                    self._owners[slot] = address
                    self.moves += 1
                    self._doubt()
                if sends == _SENDS:
                    raise
            except TryAgainError:
                if postponed:
                    raise
                postponed = True
                await asyncio.sleep(_TRY_AGAIN)
            except ClusterDownError:
                self._doubt()
                raise
            limit = deadline - loop.time()
            if limit <= 0 or not self._owners:  # none: closed meanwhile
                raise TimeoutError

    async def term(self, key: bytes, *, limit: float) -> bytes:
        """The term of the node that owns the key's slot. A value that is put while its slot moves
        may be stamped with the other node's term, and is unknown then.

        Raises:
            TimeoutError, OSError, RedisError: no reply.
        """
        address, limit = await self._owner(key_slot(key), limit)
        return await self._node(address).term(key, limit=limit)

    def forget_terms(self) -> None:
        """Have the terms of the nodes read anew."""
        for node in self._nodes.values():
            node.forget_terms()

    @property
    def term_changes(self) -> int:
        """How often a term was another one than the last one known of these slots."""
        return self._closed_changes + sum(node.term_changes for node in self._nodes.values())

    async def survey(self, *command: Any, connections: int, limit: float) -> list[list[Any]]:
        """The replies to a command without keys, of each master that owns slots, over so many new
        connections.

        Raises:
            TimeoutError, OSError, RedisError: no reply, or one that refuses.
        """
        await self._owner(0, limit)
        masters = [self._node(address) for address in self._masters]
        told = [node.survey(*command, connections=connections, limit=limit) for node in masters]
        return [replies for (replies,) in await asyncio.gather(*told)]

    async def _owner(self, slot: int, limit: float) -> tuple[Address, float]:
        """The owner of a slot, and what is left of the limit."""
        if not self._owners:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + limit
            await self._first_read(limit)
            limit = deadline - loop.time()
            if limit <= 0:
                raise TimeoutError
        owner = self._owners[slot]
        if owner is None:
            self._doubt()
            raise ClusterDownError("no node owns the slot")
        return owner, limit

    async def check(self, *, limit: float) -> None:
        """Raise what `ask` raises unless every master that owns slots takes a write."""
        if not self._owners:
            await self._first_read(limit)
        if not self._probes:
            owners, found = set(self._owners) - {None}, dict[Address | None, bytes]()
            for number in count():
                if found.keys() >= owners:
                    break
                key = b"%b:%d" % (PROBE, number)
                found.setdefault(self._owners[key_slot(key)], key)
            found.pop(None, None)
            self._probes = list(found.values())
        if not self._probes:
            raise ClusterDownError("no node owns a slot")
        writes = [self.ask("SET", key, b"", "PX", 1000, limit=limit) for key in self._probes]
        await asyncio.gather(*writes)

    async def close(self) -> None:
        """Close every connection. Callers that wait are failed."""
        nodes, self._nodes = self._nodes, {}
        self._known, self._owners, self._masters = self._seeds, [], frozenset()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        for node in (*nodes.values(), *self._nodes.values()):
            await node.close()
        self._nodes = {}

    def _node(self, address: Address) -> MultiplexedConnection:
        found = self._nodes.get(address)
        if found is None:
            found = self._nodes[address] = self._connect(address, lambda: self._ended(address))
        return found

    def _ended(self, address: Address) -> None:
        if address in self._masters:
            self._doubt()

    # -- topology -------------------------------------------------------------------------------

    def _doubt(self) -> asyncio.Task[None]:
        """Have the topology read again."""
        self._doubted = True
        if self._reading is None or self._reading.done():
            loop = asyncio.get_running_loop()
            self._over: asyncio.Future[None] = loop.create_future()  # the end of the next read
            self._reading = loop.create_task(self._read_until_sound(), name="redis topology")
        return self._reading

    async def _first_read(self, limit: float) -> None:
        reading = self._doubt()
        waited = [self._over, reading]
        done, _ = await asyncio.wait(waited, timeout=limit, return_when=FIRST_COMPLETED)
        if not self._owners:
            raise Lost("no node tells the topology") from (self._fault if done else TimeoutError())

    async def _read_until_sound(self) -> None:
        """Read until every master has answered, and only masters are connected."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._next_read - loop.time())
            self._doubted, began = False, loop.time()
            asked = self._seeds | self._known | self._masters
            answers = await self._read(asked)
            if answers:
                self._adopt(answers.values())
            # A master that this read has brought to light is asked at once.
            self._next_read = began + (_PAUSE if self._masters <= asked else 0.0)
            over, self._over = self._over, loop.create_future()
            over.set_result(None)
            if answers and answers.keys() >= self._masters and not self._doubted:
                for address in self._nodes.keys() - self._masters:
                    if self._nodes[address].idle:
                        leaving = self._nodes.pop(address)
                        self._closed_changes += leaving.term_changes
                        await leaving.close()
                if self._nodes.keys() <= self._masters:
                    return

    async def _read(self, asked: Collection[Address]) -> Mapping[Address, _Answer]:
        """The answers of those that answer in time."""
        loop = asyncio.get_running_loop()
        tasks = {loop.create_task(self._told_by(address)): address for address in asked}
        pending, answers, end = set(tasks), dict[Address, _Answer](), loop.time() + self._timeout
        try:
            while pending and (left := end - loop.time()) > 0:
                done, pending = await asyncio.wait(
                    pending, timeout=left, return_when=FIRST_COMPLETED
                )
                answers |= {tasks[task]: answer for task in done if (answer := task.result())}
                if answers:
                    end = min(end, loop.time() + _ROUND)
        finally:
            for task in pending:
                task.cancel()
        return answers

    async def _told_by(self, address: Address) -> _Answer | None:
        node = self._node(address)
        try:
            nodes, slots = await asyncio.gather(
                node.ask("CLUSTER", "NODES", limit=self._timeout),
                node.ask("CLUSTER", "SLOTS", limit=self._timeout),
            )
            return _parsed(address[0], nodes, slots)
        except (RedisError, OSError, TimeoutError) as fault:
            self._fault = fault
        except (ValueError, TypeError, LookupError, AttributeError) as fault:  # malformed
            self._fault = fault
        return None

    def _adopt(self, answers: Collection[_Answer]) -> None:
        owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for _, _, owner, first, last in sorted(frozenset().union(*(a.claims for a in answers))):
            owners[first : last + 1] = [owner] * (last + 1 - first)
        for former, taker in set(zip(self._owners, owners, strict=False)):
            self._hand_over(former, taker)
        self._owners, self._probes = owners, []
        self._masters = frozenset(owner for owner in owners if owner is not None)
        self._known = frozenset().union(*(answer.nodes for answer in answers))

    def _hand_over(self, former: Address | None, owner: Address | None) -> None:
        """Carry the former owner's term over, so that the new owner's counts as a change."""
        left = self._nodes.get(former) if former and former != owner else None
        if owner and left and left.known_term:
            taker = self._node(owner)
            taker.known_term = taker.known_term or left.known_term


def _key(command: tuple[Any, ...]) -> bytes | None:
    """The first key of a command, which decides about its slot."""
    name = command[0]
    if name in ("EVALSHA", "EVAL"):
        key: bytes | None = command[3] if command[2] else None
        return key
    return None if name in _KEYLESS else command[1]


def _parsed(host: str, nodes: bytes, slots: list[Any]) -> _Answer:
    """The topology from a node's replies to CLUSTER NODES, which has the epochs, and to CLUSTER
    SLOTS, which has the addresses for clients. The node was asked at `host`."""
    epochs, me = dict[str, int](), ""
    for line in nodes.decode().splitlines():
        name, _, flags, _, _, _, epoch, *_ = line.split(" ")
        epochs[name] = int(epoch)
        if "myself" in flags:
            me = name
    claims, known = set[_Claim](), set[Address]()
    for first, last, *holders in slots:
        places = [
            (host if endpoint in (None, b"", b"?") else endpoint.decode(), int(port))
            for endpoint, port, *_ in holders
        ]
        owner = holders[0][2].decode()
        claims.add(_Claim(epochs[owner], owner == me, places[0], first, last))
        known.update(places)
    return _Answer(frozenset(claims), frozenset(known))
