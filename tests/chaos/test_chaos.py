"""The fixed-seed subset of the chaos runs: one fault each, on a deployment that the tests share.

Histories stay in `.chaos/`, those that fail with a timeline.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos import faults
from tests.chaos.deployment import Deployment, deployed
from tests.chaos.faults import Fault
from tests.chaos.report import FOLDER, report
from tests.chaos.runs import run

SEED = 19

pytestmark = [
    pytest.mark.alone,  # Sentinels and clusters judge servers by time
    pytest.mark.xdist_group("chaos"),  # one deployment at a time
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def replicated() -> AsyncIterator[Deployment]:
    """Brokers on Valkey with Sentinels."""
    async with deployed("sentinel") as deployment:
        yield deployment


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster() -> AsyncIterator[Deployment]:
    """Brokers on a Cluster."""
    async with deployed("cluster") as deployment:
        yield deployment


async def keep_promises(deployment: Deployment, fault: Fault) -> None:
    path = FOLDER / f"{fault.__name__}-{SEED}.jsonl"
    found = await run(deployment, fault, path, seed=SEED)
    assert report(path, found), "the history breaks a promise; see above"


@pytest.mark.parametrize(
    "fault",
    [
        faults.fail_back,
        faults.split_brain,
        faults.broker_killed,
        faults.postgres_failed_over,
        faults.failover,
    ],
    ids=lambda fault: fault.__name__,
)
async def test_promises_hold_with_sentinels(replicated: Deployment, fault: Fault) -> None:
    await keep_promises(replicated, fault)


async def test_promises_hold_when_a_master_of_a_cluster_stops(cluster: Deployment) -> None:
    await keep_promises(cluster, faults.master_stopped)
