"""Record of terms: samples every server of the one-time store, and notes each change in the
history.

A note has the state of every server, asked past its link, and the servers that each Sentinel and
the first broker's link lead to. `earlier` is the age of the sample before, in seconds: the change
came after that sample began. A server that does not answer is `silent` and keeps its state. A
server that accepts no connection has no role. The checker explains refusals by these notes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as Silence

from tests.chaos.deployment import Deployment
from tests.chaos.history import Recorder
from tests.chaos.valkeys import MASTER_NAME, Node, Replicated
from tests.support.processes import DEADLINE
from tests.support.servers import MASTERS

_PAUSE = 0.2  # seconds between two samples
_LIMIT = 0.5  # seconds for an answer
_DIGITS = 16  # of the id, which make the broker's term

State = dict[str, Any]


@contextlib.asynccontextmanager
async def recorded_terms(deployment: Deployment, recorder: Recorder) -> AsyncIterator[None]:
    """Inside, the history gets a note of each change; at the beginning one of the state, in which
    each shard must have one primary.
    """
    stores = deployment.redis
    async with contextlib.AsyncExitStack() as stack:
        servers = [node.server if isinstance(node, Node) else node for node in stores.nodes]
        clients = [await stack.enter_async_context(_client(server.port)) for server in servers]
        sentinels = [
            await stack.enter_async_context(_client(port))
            for port in (stores.sentinel_ports if isinstance(stores, Replicated) else ())
        ]
        watch = _Watch(deployment, clients, sentinels, [{} for _ in clients])
        async with asyncio.timeout(DEADLINE):
            while True:
                known = await watch.sample()
                roles = [server.get("role") for server in known["servers"]]
                if roles.count("master") == known["shards"]:
                    break
                await asyncio.sleep(_PAUSE)
        recorder.terms(known, earlier=0.0)
        task = asyncio.create_task(watch.note_changes(recorder, known))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _client(port: int) -> Redis:
    return Redis(
        port=port,
        protocol=2,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=_LIMIT,
        socket_connect_timeout=_LIMIT,
    )


@dataclass(slots=True)
class _Watch:
    deployment: Deployment
    servers: Sequence[Redis]
    sentinels: Sequence[Redis]
    states: list[State]

    async def note_changes(self, recorder: Recorder, known: State) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(_PAUSE)
            began = time.monotonic()
            seen = await self.sample()
            if seen != known:
                known = seen
                recorder.terms(seen, earlier=time.monotonic() - before)
            before = began

    async def sample(self) -> State:
        """The present state."""
        named = asyncio.gather(*map(self._named, self.sentinels))
        self.states = list(await asyncio.gather(*map(self._state, self.servers, self.states)))
        if not self.sentinels:
            return {"shards": MASTERS, "servers": self.states}
        link = self.deployment.brokers[0].redis
        assert link is not None
        ports = [node.server.port for node in self.deployment.replicated.nodes]
        leads = [*await named, ports.index(link.target)]
        return {"shards": 1, "servers": self.states, "leads": leads}

    async def _state(self, server: Redis, known: State) -> State:
        try:
            info = await server.info("replication", "server")
            state = {"role": info["role"], "term": info["master_replid"][:_DIGITS]}
            state["run"] = info["run_id"][:_DIGITS]
            if not self.sentinels:
                nodes = await server.execute_command("CLUSTER NODES")  # type: ignore[no-untyped-call]  # redis-py
                own = next(node for node in nodes.values() if "myself" in node["flags"])
                state |= {name: own[name] for name in ("epoch", "slots", "migrations")}
            return state
        except Silence:
            return {**known, "silent": True}
        except RedisError:
            return {}

    async def _named(self, sentinel: Redis) -> int | None:
        """The number of the server that a Sentinel names."""
        try:
            words = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)
            _, port = await sentinel.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py
        except RedisError:
            return None
        ports = [node.port for node in self.deployment.replicated.nodes]
        return ports.index(int(port))
