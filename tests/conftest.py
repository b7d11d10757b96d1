"""Fixtures: real stores once a worker, a broker on a free port per test, an app of its own per
test.

Tests share the two stores and are kept apart by their apps' ids, as customers are. A test that
stops or fills a store starts its own (`own_stores`). A missing part fails the run and names what to
install.
"""

from __future__ import annotations

import asyncio
import gc
import io
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from broker import cli as command_line
from broker import dialects
from broker.app import Parts, Service, assemble, serve
from broker.durable import Durable, Postgres, instant
from broker.embedded import EmbeddedStores
from broker.model import RATE_KEYS, Policy
from broker.settings import Settings
from broker.telemetry import Log
from tests.support.authenticator import Authenticator
from tests.support.commands import CLEAN, Cli, Done
from tests.support.servers import Cluster, pool
from tests.support.wire import Wire

SECRET_KEY = (
    "tests-only-" + "0123456789abcdefghijklmnopqrstuvwxyz"
)  # what every broker on the shared stores seals under

_RAM = Path("/dev/shm")
_ROOM = 2 << 30  # bytes that the stores, profiles and environments of one run stay below

_LONGEST = (
    "test_cli",
    "test_client_wheel",
    "test_cluster",
    "test_demo",
    "test_dev",
    "test_docs_run",
    "test_embedded",
    "test_ephemeral",
    "test_epochs",
    "test_fast_path",
    "test_image",
    "test_outages",
    "test_passkey_js",
    "test_serve",
    "test_wheel",
)


def pytest_configure() -> None:
    """Temporary folders, so every store that a test starts, on a RAM disk where there is a large
    one: each commit waits for the disk.

    What a killed process had written survives there as it does on a disk; only the machine's own
    crash is another matter.
    """
    if "TMPDIR" in os.environ or not _RAM.is_dir():
        return
    disk = os.statvfs(_RAM)
    if (
        disk.f_bavail * disk.f_frsize >= _ROOM
        and not disk.f_flag & os.ST_NOEXEC
        and os.access(_RAM, os.W_OK)
    ):
        os.environ["TMPDIR"] = str(_RAM)  # processes that tests start look there too
        tempfile.tempdir = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: not item.path.stem.startswith(_LONGEST))


def pytest_collection_finish() -> None:
    """Freeze what is collected: a full garbage collection otherwise takes 0.2 s to traverse it."""
    gc.freeze()


SKEW = 5  # seconds by which the broker's clock alone may be past the end of a one-time value


class Clock:
    """The server's time, moved by hand. Starts at the real one, for the stores' own TTLs run in
    real time.
    """

    def __init__(self) -> None:
        self.ahead = 0.0
        self.wall = 0.0  # how far the wall clock alone was set

    def __call__(self) -> float:
        return time.time() + self.ahead + self.wall

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@dataclass(slots=True)
class Started:
    """A broker that listens, with what a test looks at: its log and its clock."""

    service: Service
    clock: Clock
    stream: io.StringIO

    @property
    def parts(self) -> Parts:
        return self.service.parts

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every line logged so far; each must be a JSON object."""
        return [orjson.loads(line) for line in self.stream.getvalue().splitlines()]

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, 0 where it has none yet."""
        return self.parts.metrics.registry.get_sample_value(name, labels) or 0.0

    async def events(self, app_id: str) -> list[tuple[str, str, str | None]]:
        """Action, result and reason of an app's events, oldest first."""
        found = await self.parts.directory.events(app_id, limit=1000)
        return [(e.action, e.result, e.reason) for e in found]


Starter = Callable[..., Awaitable[Started]]


@pytest.fixture(scope="module", autouse=True)
def uncovered_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs that the tests of documentation and deployment start run without coverage, which
    doubles their cost: other tests cover the same code.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in ("project", "deploy"):
            for name in [name for name in os.environ if name.startswith("COV")]:
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def stores() -> Iterator[EmbeddedStores]:
    """PostgreSQL and Valkey, migrated, shared by the tests of one worker."""
    with _new_folder() as folder, EmbeddedStores.start(folder) as started:
        asyncio.run(_migrate(started))
        yield started


@contextmanager
def _new_folder() -> Iterator[Path]:
    """A folder directly below the system's temporary one, which the servers' unprivileged user can
    enter.
    """
    folder = Path(tempfile.mkdtemp(prefix="broker-test-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


async def _migrate(stores: EmbeddedStores) -> None:
    parts = await assemble(settings_for(stores))
    try:
        await parts.postgres.migrate(instant(time.time()))
    finally:
        await parts.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Redis Cluster of three masters and three replicas, shared by the tests of one worker."""
    started = Cluster.start(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def stopped_stores() -> Iterator[Path]:
    """A data directory with migrated stores that do not run, to be copied: quicker than making one
    for each test.
    """
    with _new_folder() as folder:
        with EmbeddedStores.start(folder) as started:
            asyncio.run(_migrate(started))
        yield folder


@pytest.fixture
def own_stores(stopped_stores: Path) -> Iterator[EmbeddedStores]:
    """PostgreSQL and Valkey of the test's own, migrated, to be stopped, slowed or filled."""
    with _new_folder() as folder:
        subprocess.run(["cp", "-a", f"{stopped_stores}/.", str(folder)], check=True)
        with EmbeddedStores.start(folder) as started:
            yield started


def settings_for(stores: EmbeddedStores, **changes: object) -> Settings:
    """Settings for a broker on these stores, on free ports, remembering nothing between requests,
    and without rate limits: every client has one address.
    What is not about limits waits for stores as long as settings let it: a test machine's disk
    pauses."""
    values: dict[str, Any] = {
        "database_url": stores.database_url,
        "redis_url": stores.redis_url,
        "host": "127.0.0.1",
        "port": 0,
        "cache_seconds": 0.0,
        "store_timeout": 1.5,
        "secret_key": (SECRET_KEY,),
        **dict.fromkeys(RATE_KEYS, "0"),
        **changes,
    }
    declared = [setting.name for dialect in dialects.DIALECTS for setting in dialect.settings]
    return Settings(
        declared={name: values.pop(name) for name in declared if name in values}, **values
    )


ON_BOTH = pytest.mark.parametrize("redis_url", ["single", "cluster"], indirect=True)
"""Runs a test's brokers on the shared Valkey, then on the shared Redis Cluster."""


@pytest.fixture
def redis_url(request: pytest.FixtureRequest, stores: EmbeddedStores) -> str:
    """The Redis of brokers on the shared stores."""
    if getattr(request, "param", "single") == "single":
        return stores.redis_url
    shared: Cluster = request.getfixturevalue("cluster")
    return shared.url


@dataclass(slots=True)
class _Brokers:
    stores: EmbeddedStores
    redis_url: str
    started: list[Started] = field(default_factory=list)

    async def __call__(self, stores: EmbeddedStores | None = None, **changes: object) -> Started:
        clock, stream = Clock(), io.StringIO()
        if stores is None:
            changes.setdefault("redis_url", self.redis_url)
        parts = await assemble(
            settings_for(stores or self.stores, **changes),
            log=Log(stream, level="debug"),
            clock=clock,
            monotonic=clock.monotonic,
        )
        started = Started(await serve(parts), clock, stream)
        self.started.append(started)
        return started


@pytest.fixture
async def postgres(stores: EmbeddedStores) -> AsyncIterator[Postgres]:
    made = pool(stores.database_url)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def durable(postgres: Postgres) -> Durable:
    return Durable(postgres)


@pytest.fixture
async def other(stores: EmbeddedStores) -> AsyncIterator[Durable]:
    """Another instance of the durable store, on the same server."""
    made = pool(stores.database_url)
    await made.open()
    yield Durable(made)
    await made.close()


@pytest.fixture
async def start_broker(stores: EmbeddedStores, redis_url: str) -> AsyncIterator[Starter]:
    """Start brokers; each is an instance of its own on the same stores. Stopped at the end of the
    test.
    """
    brokers = _Brokers(stores, redis_url)
    yield brokers
    for started in brokers.started:
        await started.service.close()


@pytest.fixture
async def broker(start_broker: Starter) -> Started:
    """One broker."""
    return await start_broker()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client without a limit on connections."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as opened:
        yield opened


OpenApp = Callable[..., Awaitable[Wire]]


@pytest.fixture
def open_app(broker: Started, session: aiohttp.ClientSession) -> OpenApp:
    """Make an app, with a policy if given."""

    async def make(policy: Policy | None = None, **options: Any) -> Wire:
        return await Wire.open(broker.service, session, policy=policy, **options)

    return make


@pytest.fixture
async def wire(open_app: OpenApp) -> Wire:
    """An app of the test's own."""
    return await open_app()


@pytest.fixture
def device() -> Authenticator:
    """An authenticator that behaves."""
    return Authenticator()


@pytest.fixture
def cli(
    stores: EmbeddedStores,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Cli:
    """Run a command in this process, on the shared stores, in an empty directory."""
    for name in os.environ.keys() - CLEAN.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("BROKER_DATABASE_URL", stores.database_url)
    monkeypatch.setenv("BROKER_REDIS_URL", stores.redis_url)
    monkeypatch.setenv("BROKER_SECRET_KEY", SECRET_KEY)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        try:
            status = command_line.main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capsys.readouterr())

    return run
