"""Runs: traffic, a fault, the end in peace, the final rows, the verdict."""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial
from pathlib import Path

import asyncpg
from redis.exceptions import RedisError

from broker.errors import Unavailable
from tests.chaos.checker import Violation, judge
from tests.chaos.deployment import Deployment, Kind, OneTime, deployed
from tests.chaos.faults import FAULTS, Fault, Run
from tests.chaos.history import NEMESIS, Recorder, read
from tests.chaos.report import report
from tests.chaos.terms import recorded_terms
from tests.chaos.traffic import FLEX, Passkey, Traffic, at_once, traffic_on
from tests.support.authenticator import b64

_FINAL = 150  # passkeys that sign in at the end, the newest first
_SETTLES = 1.0  # seconds that a broker stamps values with a term that it knows
_TRIES = 4  # of a final sign-in, because a store may have failed at that moment


async def run(
    deployment: Deployment,
    fault: Fault,
    path: Path,
    *,
    seed: int,
    people: int = 10,
    stock: int = 100,
) -> list[Violation]:
    """Run the traffic with a fault, write its history to `path`, and judge it."""
    with Recorder(path) as recorder:
        async with (
            recorded_terms(deployment, recorder),
            traffic_on(deployment, recorder, seed) as traffic,
        ):
            watching = asyncio.create_task(deployment.follow_changes())
            try:
                async with traffic.people(people):
                    await fault(Run(deployment, traffic, recorder, stock))
                    await deployment.heal()
                    await asyncio.sleep(_SETTLES)
                    recorder.fault("healed")
                    await asyncio.sleep(0.5)  # traffic after the faults
            finally:
                watching.cancel()
                await deployment.heal()
            await _sign_in_finally(traffic)
            recorder.write(NEMESIS, "info", "final", await _rows(deployment, traffic))
    return judge(read(path))


async def _sign_in_finally(traffic: Traffic) -> None:
    """Sign in with the acknowledged passkeys, now that all is well."""

    async def one(passkey: Passkey) -> None:
        for _ in range(_TRIES):
            done = (await traffic.sign_in(passkey, FLEX)).ok
            if done:
                break
        process = traffic.caller.new_process()
        value = {"app": passkey.app.id, "user": passkey.user, "credential": passkey.credential}
        traffic.recorder.write(process, "invoke", "final sign-in", value)
        traffic.recorder.write(process, "ok", "final sign-in", {"done": done})

    live = [passkey for passkey in traffic.passkeys if not passkey.revoked]
    await at_once([partial(one, passkey) for passkey in live[-_FINAL:]])


async def _rows(deployment: Deployment, traffic: Traffic) -> dict[str, list[dict[str, object]]]:
    """The rows of the traffic's apps."""
    apps = [app.id for app in traffic.apps]
    session = await asyncpg.connect(deployment.postgres.primary.url)
    try:
        credentials = await session.fetch(
            "SELECT app_id, credential_id, sign_count FROM credentials WHERE app_id = ANY($1)", apps
        )
        replays = await session.fetch(
            "SELECT app_id, request_id FROM events WHERE app_id = ANY($1)"
            " AND action = 'nonce.replayed'",
            apps,
        )
    finally:
        await session.close()
    return {
        "credentials": [
            {"app": app, "credential": b64(id_), "counter": count}
            for app, id_, count in credentials
        ],
        "replays": [{"app": app, "request": request} for app, request in replays],
    }


async def mixed(folder: Path, kind: Kind, one_time: OneTime, seed: int, seconds: float) -> int:
    """Faults in the order that the seed gives, until the time is over. Each history has a few of
    them, and is reported as it ends. A history that the harness can't complete, because a busy
    machine is slow, is judged as far as it goes. How many histories broke a promise.
    """
    chance = random.Random(seed)
    ends, broken, number = time.monotonic() + seconds, 0, 0
    async with deployed(kind, one_time=one_time) as deployment:
        while time.monotonic() < ends:
            chosen = chance.sample(FAULTS[kind], 3)

            async def some(run_: Run, chosen: list[Fault] = chosen) -> None:
                for fault in chosen:
                    await fault(run_)
                    await deployment.heal()
                    await asyncio.sleep(_SETTLES)
                    run_.note("healed")

            number += 1
            path = folder / f"long-{kind}-{seed}-{number}.jsonl"
            try:
                found = await run(deployment, some, path, seed=chance.randrange(10**6), stock=40)
            except (
                AssertionError,
                OSError,
                RedisError,
                Unavailable,
                asyncpg.PostgresError,
            ) as fault:
                print(f"Incomplete: {fault!r}", flush=True)
                found = judge(read(path))
                await deployment.heal()
            broken += not report(path, found)
    return broken
