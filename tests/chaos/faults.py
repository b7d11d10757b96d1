"""Faults: coroutines that break the deployment while traffic goes on and prepared values race.

Each acts on a `Run`, notes what it does in the history, and leaves the repair to `Deployment.heal`.
A note says what else may happen until all is well again (`Recorder.fault`). A change of term needs
no word there, because the history records terms.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import redis

from tests.chaos.deployment import Deployment, Kind
from tests.chaos.history import Recorder
from tests.chaos.links import replication
from tests.chaos.postgreses import Pooler
from tests.chaos.traffic import Traffic
from tests.chaos.valkeys import reached
from tests.support.servers import MASTERS, Valkey


@dataclass(frozen=True, slots=True)
class Run:
    """What a fault acts on."""

    deployment: Deployment
    traffic: Traffic
    recorder: Recorder
    stock: int

    def note(self, name: str, **value: object) -> None:
        self.recorder.fault(name, **value)


_SLOTS = 40  # that move
_STUCK = 10  # slots whose MIGRATE times out
_BRIEF = 50  # ms that such a MIGRATE waits
Fault = Callable[[Run], Awaitable[None]]


async def calm(run: Run) -> None:
    """No fault. The stock races within a moment, and people go on."""
    proofs, ceremonies = await run.traffic.stock(run.stock)
    await run.traffic.race(proofs, ceremonies, 0.05)
    await asyncio.sleep(3.0)  # traffic goes on meanwhile


async def mistakes(run: Run) -> None:
    """No fault. Many ceremonies get a wrong answer first, or are finished through another door."""
    await run.traffic.stock(run.stock)
    for _ in range(3):
        tries = [verb() for verb in (run.traffic.try_again, run.traffic.enter_elsewhere) * 12]
        await asyncio.gather(*tries)


# -- Valkey with Sentinels -------------------------------------------------------------------------


async def failover(run: Run) -> None:
    """The primary dies while its replicas lag, and 2 x `stock` redemptions and finishes race."""
    deployment, traffic, redis = run.deployment, run.traffic, run.deployment.replicated
    proofs, ceremonies = await traffic.stock(run.stock)
    await redis.replicating()
    old = redis.primary()
    run.note("replicas lag")
    redis.hold_replication(old)

    async def kill() -> None:
        await asyncio.sleep(1.0)  # traffic goes on meanwhile
        run.note("primary killed")
        old.kill()
        old.link.cut()
        await redis.promoted(old)
        deployment.follow()
        run.note("replica promoted")
        # The values that the new primary still has are tried once more.
        await traffic.race(proofs, ceremonies, 0.5)

    await asyncio.gather(kill(), traffic.race(proofs, ceremonies, 1.8))


async def fail_back(run: Run) -> None:
    """The primary is demoted and promoted again, while its replica lags before each promotion."""
    deployment, traffic, redis = run.deployment, run.traffic, run.deployment.replicated
    proofs, ceremonies = await traffic.stock(run.stock)
    await redis.replicating()
    first = redis.nodes[0]  # the one that the Sentinels prefer
    if redis.primary() is not first:
        await redis.fail_over()
    for _ in range(2):
        old = redis.primary()
        run.note("replicas lag")
        redis.hold_replication(old)
        await traffic.race(proofs, ceremonies, 0.6)
        new = await redis.fail_over()
        deployment.follow()
        run.note("replica promoted", node=redis.nodes.index(new))
        await traffic.race(proofs, ceremonies, 0.6)
        old.link.cut(replication)  # what lags never arrives
        old.link.release()
        await asyncio.to_thread(old.ask, "REPLICAOF", "127.0.0.1", new.port)
        await redis.replicating()


async def split_brain(run: Run) -> None:
    """One broker talks to the old primary, the others to the new one, for 10 seconds."""
    deployment, traffic, redis = run.deployment, run.traffic, run.deployment.replicated
    proofs, ceremonies = await traffic.stock(run.stock)
    await redis.replicating()
    old = redis.primary()
    outsider, insider, _ = deployment.brokers
    deployment.outsider = outsider
    run.note("primary isolated")
    redis.isolate(old)
    await redis.promoted(old)
    run.note("two primaries")
    await traffic.race(proofs, ceremonies, 10.0, (outsider.door, insider.door))


async def redis_stalls(run: Run) -> None:
    """The primary answers each broker later than the broker waits, while nonces are redeemed."""
    proofs, ceremonies = await run.traffic.stock(run.stock)
    link = run.deployment.replicated.primary().link
    own = [b.redis for b in run.deployment.brokers if b.redis is not None]
    run.note("Redis stalls")

    async def stall() -> None:
        for _ in range(3):
            for each in (link, *own):
                each.hold(lambda connection: not connection.replicates)
            await asyncio.sleep(1.2)  # traffic goes on meanwhile
            for each in (link, *own):
                each.release()
            await asyncio.sleep(0.8)  # traffic goes on meanwhile

    await asyncio.gather(stall(), run.traffic.race(proofs, ceremonies, 6.0))


# -- brokers ---------------------------------------------------------------------------------------


async def broker_killed(run: Run) -> None:
    """One broker is killed, another is restarted, under load."""
    victim, other, _ = run.deployment.brokers
    await asyncio.sleep(1.0)  # traffic goes on meanwhile
    run.note("broker killed", broker=victim.number)
    victim.kill()
    run.note("broker killed", broker=victim.number)  # calls that came while it died
    await asyncio.sleep(0.5)  # traffic goes on meanwhile
    victim.spawn()
    await asyncio.to_thread(victim.wait_ready)
    await asyncio.sleep(1.0)  # traffic goes on meanwhile
    run.note("broker terminated", broker=other.number)
    await asyncio.to_thread(other.stop)
    other.spawn()
    await asyncio.to_thread(other.wait_ready)
    await asyncio.sleep(0.5)  # traffic goes on meanwhile


async def brokers_restarted(run: Run) -> None:
    """Each broker is restarted under load, when HAProxy sends requests to all of them again."""
    for broker in run.deployment.brokers:
        run.note("broker terminated", broker=broker.number)
        await asyncio.to_thread(broker.stop)
        broker.spawn()
        await asyncio.to_thread(broker.wait_ready)
        await run.deployment.balanced()


# -- Postgres --------------------------------------------------------------------------------------


async def postgres_failed_over(run: Run) -> None:
    """The primary dies in the middle of commits, and the standby takes over."""
    deployment = run.deployment
    await asyncio.sleep(1.0)  # traffic goes on meanwhile
    run.note("Postgres killed", loses_events=True)
    await asyncio.to_thread(deployment.postgres.primary.kill)
    await asyncio.sleep(0.3)  # traffic goes on meanwhile
    await deployment.postgres.fail_over()
    deployment.follow()
    run.note("Postgres promoted")
    await asyncio.sleep(2.0)  # traffic goes on meanwhile


async def postgres_slow(run: Run) -> None:
    """Each message between the brokers and Postgres takes 30 ms, while pages share transactions."""
    run.note("Postgres slow", loses_events=True)
    for broker in run.deployment.brokers:
        broker.postgres.delay = 0.03
    for _ in range(3):
        await asyncio.gather(*(run.traffic.two_pages() for _ in range(12)))


# -- Cluster ---------------------------------------------------------------------------------------


async def master_stopped(run: Run) -> None:
    """A master of a Cluster stops, its replica takes over, and the master comes back."""
    cluster, traffic = run.deployment.cluster, run.traffic
    proofs, ceremonies = await traffic.stock(run.stock)
    number = next(n for n, node in enumerate(cluster.nodes) if _is_master(node))
    master, replica = cluster.nodes[number], cluster.nodes[number - MASTERS]  # of six
    run.note("replica lags")
    # A replica that is stopped keeps what its kernel has received; a new connection brings no more.
    replica.process.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(master.ask, "CLIENT", "KILL", "TYPE", "replica")
    await traffic.race(proofs, ceremonies, 0.6)
    run.note("master stopped")
    master.process.send_signal(signal.SIGSTOP)
    replica.process.send_signal(signal.SIGCONT)
    await reached(lambda: _is_master(replica), "the replica is promoted")
    run.note("replica promoted")
    await traffic.race(proofs, ceremonies, 1.0)
    master.process.send_signal(signal.SIGCONT)
    run.note("master continued")
    await traffic.race(proofs, ceremonies, 0.5)


def _is_master(node: Valkey) -> bool:
    return b"role:master" in node.ask("INFO", "replication")


# -- more faults of Valkey, for the long run -------------------------------------------------------


async def _around(run: Run, break_: Callable[[], Awaitable[None]]) -> None:
    """Let a stock race, break something in the middle, and let the same stock race again."""
    proofs, ceremonies = await run.traffic.stock(run.stock)
    await run.traffic.race(proofs, ceremonies, 0.5)
    await break_()
    await run.traffic.race(proofs, ceremonies, 1.5)


async def primary_stopped(run: Run) -> None:
    """SIGSTOP of the primary until another one is promoted; then it continues."""
    redis = run.deployment.replicated

    async def stop() -> None:
        old = redis.primary()
        run.note("primary stopped")
        old.signal(signal.SIGSTOP)
        await redis.promoted(old)
        old.signal(signal.SIGCONT)
        run.note("old primary continues")

    await _around(run, stop)


async def old_snapshot(run: Run) -> None:
    """The primary is killed, and starts again from an old RDB file, before Sentinels notice."""
    redis = run.deployment.replicated
    proofs, ceremonies = await run.traffic.stock(run.stock)
    primary = redis.primary()
    await asyncio.to_thread(primary.ask, "SAVE")
    run.note("snapshot")
    await run.traffic.race(proofs, ceremonies, 0.5)
    primary.kill()
    await asyncio.to_thread(primary.restart)
    run.note("started from the old snapshot")
    await run.traffic.race(proofs, ceremonies, 1.5)


async def truncated_log(run: Run) -> None:
    """The primary is killed, and starts again from an append-only file that lacks its end."""
    redis = run.deployment.replicated
    primary = redis.primary()
    await asyncio.to_thread(primary.ask, "CONFIG", "SET", "appendonly", "yes")
    await reached(lambda: "aof_rewrite_in_progress:0" in primary.ask("INFO", "persistence"), "AOF")
    proofs, ceremonies = await run.traffic.stock(run.stock)
    files = list((primary.home / "appendonlydir").glob("*.incr.aof"))
    size = sum(file.stat().st_size for file in files)
    run.note("append-only file noted")
    await run.traffic.race(proofs, ceremonies, 0.5)
    primary.kill()
    for file in files:
        with file.open("r+b") as opened:
            opened.truncate(min(size + 100, file.stat().st_size))
    await asyncio.to_thread(primary.restart, "--appendonly", "yes")
    run.note("started from the truncated file")
    await run.traffic.race(proofs, ceremonies, 1.5)


async def flushed(run: Run) -> None:
    """FLUSHALL."""

    async def flush() -> None:
        run.note("FLUSHALL", ends_values=True)
        await asyncio.to_thread(run.deployment.replicated.primary().ask, "FLUSHALL")

    await _around(run, flush)


async def full(run: Run) -> None:
    """The primary is full, and refuses writes for a while."""
    primary = run.deployment.replicated.primary()

    async def fill() -> None:
        run.note("primary full")
        await asyncio.to_thread(primary.ask, "CONFIG", "SET", "maxmemory", 1)
        await asyncio.sleep(1.5)  # traffic goes on meanwhile
        await asyncio.to_thread(primary.ask, "CONFIG", "SET", "maxmemory", 0)

    await _around(run, fill)


async def writable_replica(run: Run) -> None:
    """One broker talks to a replica that takes writes."""
    deployment, redis = run.deployment, run.deployment.replicated
    proofs, ceremonies = await run.traffic.stock(run.stock)
    outsider, insider, _ = deployment.brokers
    deployment.outsider = outsider
    replica = redis.replicas()[0]
    run.note("writable replica")
    await asyncio.to_thread(replica.ask, "CONFIG", "SET", "replica-read-only", "no")
    assert outsider.redis is not None
    outsider.redis.point(replica.server.port)
    await run.traffic.race(proofs, ceremonies, 2.0, (outsider.door, insider.door))


async def replica_attaches(run: Run) -> None:
    """The primary loses its replicas and its backlog, and a replica attaches again."""
    redis = run.deployment.replicated
    primary, replicas = redis.primary(), redis.replicas()

    async def attach() -> None:
        run.note("replicas detached")
        await asyncio.to_thread(primary.ask, "CONFIG", "SET", "repl-backlog-ttl", 1)
        primary.link.closed = True
        primary.link.cut(replication)
        await reached(lambda: primary.info()["repl_backlog_active"] == "0", "the backlog is freed")
        primary.link.closed = False
        run.note("replicas attach")
        await reached(lambda: int(primary.info()["connected_slaves"]) == len(replicas), "attached")
        await asyncio.to_thread(primary.ask, "CONFIG", "SET", "repl-backlog-ttl", 3600)

    await _around(run, attach)


async def replies_lost(run: Run) -> None:
    """Redis executes commands, and their replies are lost."""
    link = run.deployment.brokers[0].redis
    assert link is not None

    async def lose() -> None:
        run.note("replies lost")
        for _ in range(5):
            link.lose_replies()
            await asyncio.sleep(0.3)  # traffic goes on meanwhile
            link.cut()

    proofs, ceremonies = await run.traffic.stock(run.stock)
    doors = (run.deployment.brokers[0].door, run.deployment.brokers[1].door)
    await asyncio.gather(lose(), run.traffic.race(proofs, ceremonies, 1.8, doors))


async def network_slow(run: Run) -> None:
    """Each message between Redis and the brokers takes 100 ms."""
    run.note("Redis slow")
    for node in run.deployment.replicated.nodes:
        node.link.delay = 0.1
    await run.traffic.race(*await run.traffic.stock(run.stock), 2.0)


# -- more faults of brokers ------------------------------------------------------------------------


async def broker_stopped(run: Run) -> None:
    """SIGSTOP of a broker for two seconds."""

    async def stop() -> None:
        victim = run.deployment.brokers[2]
        run.note("broker stopped")
        victim.signal(signal.SIGSTOP)
        await asyncio.sleep(2.0)  # traffic goes on meanwhile
        victim.signal(signal.SIGCONT)

    await _around(run, stop)


async def clock_wrong(run: Run) -> None:
    """The clock of one broker is an hour ahead, then an hour behind."""
    broker = run.deployment.brokers[2]
    run.note("clock wrong", ends_values=True)
    for offset in ("+1h", "-1h"):
        proofs, ceremonies = await run.traffic.stock(run.stock // 2)
        await asyncio.to_thread(broker.stop)
        broker.clock = offset
        broker.spawn()
        await asyncio.to_thread(broker.wait_ready)
        await run.traffic.race(proofs, ceremonies, 1.0)
        await asyncio.to_thread(broker.stop)
        broker.clock = ""
        broker.spawn()
        await asyncio.to_thread(broker.wait_ready)


# -- more faults of Postgres -----------------------------------------------------------------------


async def postgres_restarted(run: Run) -> None:
    """SIGKILL of the primary, which starts again on its data."""
    pair = run.deployment.postgres
    run.note("Postgres killed", loses_events=True)
    await asyncio.to_thread(pair.primary.kill)
    await asyncio.to_thread(pair.primary.start)
    run.note("Postgres started")
    await asyncio.sleep(1.5)  # traffic goes on meanwhile


async def postgres_stopped(run: Run) -> None:
    """SIGSTOP of the primary for two seconds."""
    run.note("Postgres stopped", loses_events=True)
    run.deployment.postgres.primary.freeze()
    await asyncio.sleep(2.0)  # traffic goes on meanwhile
    run.deployment.postgres.primary.thaw()
    await asyncio.sleep(1.0)  # traffic goes on meanwhile


async def commits_cut(run: Run) -> None:
    """Connections to Postgres are cut between a commit and its answer."""
    run.note("commits cut", loses_events=True)
    for _ in range(10):
        for broker in run.deployment.brokers:
            broker.postgres.lose_replies()
        await asyncio.sleep(0.1)  # traffic goes on meanwhile
        for broker in run.deployment.brokers:
            broker.postgres.cut()
        await asyncio.sleep(0.2)  # traffic goes on meanwhile


async def pooler_killed(run: Run) -> None:
    """Brokers reach Postgres through PgBouncer, which is stopped for a moment, then killed and
    started again.
    """
    pair = run.deployment.postgres
    pooler = pair.pooler = Pooler(pair.home, pair.primary.port)
    await asyncio.to_thread(pooler.start)
    run.note("connections pooled", loses_events=True)
    run.deployment.follow()
    await asyncio.sleep(1.5)  # traffic goes on meanwhile
    run.note("pooler stopped")
    pooler.signal(signal.SIGSTOP)
    await asyncio.sleep(1.5)  # traffic goes on meanwhile
    pooler.signal(signal.SIGCONT)
    await asyncio.sleep(1.0)  # traffic goes on meanwhile
    run.note("pooler killed")
    pooler.kill()
    await asyncio.sleep(0.5)  # traffic goes on meanwhile
    await asyncio.to_thread(pooler.start)
    run.note("pooler started")
    await asyncio.sleep(1.5)  # traffic goes on meanwhile


# -- more faults of a Cluster ----------------------------------------------------------------------


async def slots_moved(run: Run) -> None:
    """Slots that have keys move to another master and back, while values race."""
    cluster = run.deployment.cluster
    masters = [node for node in cluster.nodes if _is_master(node)]
    ids = {node.port: node.ask("CLUSTER MYID").decode() for node in masters}
    proofs, ceremonies = await run.traffic.stock(run.stock)
    source, target, _ = masters
    slots = await asyncio.to_thread(_slots_with_keys, source)
    run.note("slots move", slots=len(slots))

    async def to_and_fro() -> None:
        for from_, to in ((source, target), (target, source)):
            for slot in slots:
                await asyncio.to_thread(_move_slot, slot, from_, to, ids, masters)
        run.note("slots are back")

    await asyncio.gather(to_and_fro(), run.traffic.race(proofs, ceremonies, 3.0))
    # Values of these slots tell every broker where the slots are.
    await run.traffic.race(*await run.traffic.stock(run.stock), 1.0)


async def migrate_timed_out(run: Run) -> None:
    """The target of slots that move stops, so each MIGRATE times out and leaves copies there. The
    operator deletes the copies of values that the source still has, and moves the slots.
    """
    cluster = run.deployment.cluster
    masters = [node for node in cluster.nodes if _is_master(node)]
    ids = {node.port: node.ask("CLUSTER MYID").decode() for node in masters}
    proofs, ceremonies = await run.traffic.stock(run.stock)
    source, target, _ = masters
    slots = (await asyncio.to_thread(_slots_with_keys, source))[:_STUCK]
    run.note("MIGRATE times out", slots=len(slots))

    async def move_in_vain() -> None:
        for slot in slots:
            await asyncio.to_thread(_open_slot, slot, source, target, ids)
        target.process.send_signal(signal.SIGSTOP)
        for slot in slots:
            await asyncio.to_thread(_migrate_in_vain, slot, source, target)
        target.process.send_signal(signal.SIGCONT)
        run.note("copies are left")

    await asyncio.gather(move_in_vain(), run.traffic.race(proofs, ceremonies, 1.5))
    if not _is_master(target):  # a busy machine was slow to continue it
        for slot in slots:
            await asyncio.to_thread(source.ask, "CLUSTER", "SETSLOT", slot, "STABLE")
        return
    copies = [
        await asyncio.to_thread(_move_slot, slot, source, target, ids, masters) for slot in slots
    ]
    run.note("slots moved", copies=sum(copies))
    await run.traffic.race(proofs, ceremonies, 1.0)


def _migrate_in_vain(slot: int, source: Valkey, target: Valkey) -> None:
    if keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
        with contextlib.suppress(redis.ResponseError):  # IOERR
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, _BRIEF, "KEYS", *keys)
            raise AssertionError("the target has stopped, and MIGRATE succeeds")


def _slots_with_keys(node: Valkey) -> list[int]:
    """Some slots of a master."""
    with node.client() as client:
        keys = [key for key, _ in zip(client.scan_iter(count=1000), range(_SLOTS), strict=False)]
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.execute_command("CLUSTER KEYSLOT", key)
        return sorted(set(pipeline.execute()))


def _move_slot(
    slot: int, source: Valkey, target: Valkey, ids: dict[int, str], masters: list[Valkey]
) -> int:
    """Move a slot: how many values had a copy at the target, which was deleted."""
    copies = 0
    _open_slot(slot, source, target, ids)
    while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
        try:
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 1000, "KEYS", *keys)
        except redis.ResponseError as fault:  # what a MIGRATE left before
            if "BUSYKEY" not in str(fault):
                raise
            copies += _delete(target, source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100))
    for node in (target, source, *masters):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
    return copies


def _open_slot(slot: int, source: Valkey, target: Valkey, ids: dict[int, str]) -> None:
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])


def _delete(target: Valkey, keys: list[bytes]) -> int:
    """Delete keys of a slot that is being moved to this server: how many were there."""
    with target.client() as client:
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.execute_command("ASKING")
            pipeline.execute_command("DEL", key)
        return sum(pipeline.execute()[1::2])


_OF_BOTH: tuple[Fault, ...] = (
    calm,
    mistakes,
    broker_killed,
    brokers_restarted,
    broker_stopped,
    clock_wrong,
    postgres_failed_over,
    postgres_restarted,
    postgres_stopped,
    postgres_slow,
    commits_cut,
    pooler_killed,
)
FAULTS: dict[Kind, tuple[Fault, ...]] = {
    "sentinel": (
        *_OF_BOTH,
        failover,
        fail_back,
        split_brain,
        primary_stopped,
        old_snapshot,
        truncated_log,
        flushed,
        full,
        writable_replica,
        replica_attaches,
        replies_lost,
        redis_stalls,
        network_slow,
    ),
    "cluster": (*_OF_BOTH, master_stopped, slots_moved, migrate_timed_out),
}
