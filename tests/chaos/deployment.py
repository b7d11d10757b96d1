"""The system under test: three brokers behind HAProxy, on Valkey with Sentinels or on a Cluster,
and Postgres with a standby.

Each broker reaches Postgres through a link of its own (`links.py`), which `follow` points at the
primary after a failover, as a virtual address does. With Sentinels, the first broker reaches Redis
in the same way, and the others ask the Sentinels. Brokers on a Cluster reach its nodes themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import redis

from broker.app import Parts, assemble
from broker.settings import Settings
from broker.telemetry import Log
from tests.chaos.links import Link
from tests.chaos.postgreses import Pair
from tests.chaos.valkeys import Replicated, reached
from tests.support.commands import CLEAN
from tests.support.load_balancers import DEPLOY, LoadBalancer, haproxy
from tests.support.parts import ROOT, program
from tests.support.processes import free_port, get, until
from tests.support.servers import Cluster

Kind = Literal["sentinel", "cluster"]
OneTime = Literal["term", "postgres"]
SECRET_KEY = "chaos-only-0123456789abcdefghijklmnopqrstuvwxyz"
BROKERS = 3
_BROKER = (sys.executable, "-c", "import sys; from broker.cli import main; sys.exit(main())")
_RATES = ("BEGIN", "DISCOVERABLE", "KEYED", "UNKNOWN_FINISH")
_SERVER, _UP = 'server="broker-', 'state="UP"'
_BALANCE = "    balance leastconn\n"
_NAME_SERVER = "    http-after-response set-header X-Server %[srv_name]\n"


class Door(NamedTuple):
    """Where callers reach the service, or one broker: the addresses for pages and for backends."""

    name: str
    pages: str
    keyed: str


@dataclass(eq=False, slots=True)
class BrokerProcess:
    """One `broker serve` and its links to the stores."""

    number: int
    tree: Path
    log: Path
    postgres: Link
    redis: Link | None
    redis_url: str
    one_time: OneTime
    port: int = field(default_factory=free_port)
    management: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    clock: str = ""  # faketime's offset

    @property
    def door(self) -> Door:
        pages, keyed = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.management}"
        return Door(f"broker-{self.number}", pages, keyed)

    def environment(self) -> dict[str, str]:
        return CLEAN | {
            "PYTHONPATH": str(self.tree),
            "BROKER_DATABASE_URL": _postgres_url(self.postgres.port),
            "BROKER_REDIS_URL": self.redis_url,
            "BROKER_HOST": "127.0.0.1",
            "BROKER_PORT": str(self.port),
            "BROKER_MANAGEMENT_PORT": str(self.management),
            "BROKER_SECRET_KEY": SECRET_KEY,
            "BROKER_ONE_TIME": self.one_time,
            "BROKER_LOG_LEVEL": "warning",
            "BROKER_DRAIN_SECONDS": "5",
            "BROKER_LAME_DUCK_SECONDS": "3",  # HAProxy notices after 2
            "BROKER_DATABASE_CONNECTIONS": "8",
            # All traffic has one address. The limits count, and refuse no request.
            **{f"BROKER_{name}_RATE": "1000/s:9999" for name in _RATES},
        }

    def run(self, *words: str) -> None:
        """Run a command of `broker` with the settings of this one."""
        done = subprocess.run(
            [*_BROKER, *words],
            cwd=self.tree,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def spawn(self) -> None:
        argv = [*_BROKER, "serve", "--migrate"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                cwd=self.tree,
                env=self.environment() | _faked(self.clock),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            return get(self.management, "/health/ready") == 200

        until(ready, "a broker is ready")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """SIGTERM: it finishes its requests, and ends."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@dataclass(eq=False, slots=True)
class Deployment:
    """Everything that runs. `operator` is the harness's own access to apps, keys and rows."""

    home: Path
    kind: Kind
    tree: Path
    postgres: Pair
    redis: Replicated | Cluster
    brokers: list[BrokerProcess]
    operator: Parts
    operator_link: Link
    balancer: LoadBalancer
    outsider: BrokerProcess | None = None

    @property
    def door(self) -> Door:
        """Where HAProxy listens."""
        pages, keyed = self.balancer.pages, self.balancer.management
        return Door("", f"https://localhost:{pages}", f"https://localhost:{keyed}")

    @property
    def replicated(self) -> Replicated:
        assert isinstance(self.redis, Replicated)
        return self.redis

    @property
    def cluster(self) -> Cluster:
        assert isinstance(self.redis, Cluster)
        return self.redis

    def follow(self) -> None:
        """Point the links at the primaries of the stores; those of the `outsider` stay."""
        primary = self.redis.primary() if isinstance(self.redis, Replicated) else None
        for broker in self.brokers:
            broker.postgres.point(self.postgres.port)
            if broker.redis is not None and primary is not None and broker is not self.outsider:
                broker.redis.point(primary.server.port)
        self.operator_link.point(self.postgres.primary.port)

    async def follow_changes(self) -> None:
        """Follow the primary of the Sentinels, as a virtual address does. A machine that is busy
        may bring a change that no scenario asked for.
        """
        if not isinstance(self.redis, Replicated):
            return
        known = await asyncio.to_thread(self.redis.primary)
        while True:
            await asyncio.sleep(0.1)  # between two looks
            with contextlib.suppress(redis.RedisError):
                primary = await asyncio.to_thread(self.redis.primary)
                if primary is not known:
                    known = primary
                    self.follow()

    async def heal(self) -> None:
        """Undo every fault, and wait until all is well."""
        for broker in self.brokers:
            for link in (broker.postgres, broker.redis):
                if link is not None:
                    link.closed, link.delay = False, 0.0
                    link.release()
        self.outsider = None
        await self.postgres.heal()
        if isinstance(self.redis, Replicated):
            await self.redis.heal()
        else:
            for node in self.redis.nodes:
                node.process.send_signal(signal.SIGCONT)
            await reached(self.redis.whole, "the cluster is up and replicates")
        self.follow()
        for broker in self.brokers:
            if broker.process is None or broker.process.poll() is not None:
                broker.spawn()
            else:
                broker.signal(signal.SIGCONT)
        for broker in self.brokers:
            await asyncio.to_thread(broker.wait_ready)
        await self.balanced()

    async def balanced(self) -> None:
        """Wait until HAProxy sends requests to every broker."""
        await asyncio.to_thread(until, self._balanced, "HAProxy sends requests to every broker")

    def _balanced(self) -> bool:
        """True if HAProxy sends requests to every broker."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.balancer.metrics}/metrics") as page:
            lines = page.read().decode().splitlines()
        states = [line for line in lines if line.startswith("haproxy_server_status")]
        up = [line for line in states if _SERVER in line and _UP in line]
        return len(up) == 2 * BROKERS and all(line.endswith(" 1") for line in up)

    async def stop(self) -> None:
        for broker in self.brokers:
            broker.kill()
            for link in (broker.postgres, broker.redis):
                if link is not None:
                    await link.stop()
        await self.operator.close()
        await self.operator_link.stop()


@contextlib.asynccontextmanager
async def deployed(
    kind: Kind, tree: Path = ROOT, one_time: OneTime = "term"
) -> AsyncIterator[Deployment]:
    """A deployment in a temporary folder, of the broker in `tree`."""
    async with contextlib.AsyncExitStack() as stack:
        home = stack.enter_context(_folder())
        postgres = await Pair.start(home / "postgres")
        stack.push_async_callback(postgres.stop)
        stores: Replicated | Cluster
        if kind == "sentinel":
            stores = await Replicated.start(home / "valkey")
            stack.push_async_callback(stores.stop)
        else:
            settings = ("--cluster-replica-validity-factor", "0", "--cluster-node-timeout", "2000")
            stores = await asyncio.to_thread(
                lambda: Cluster.start(home / "cluster", *settings, failover=True)
            )
            stack.callback(stores.stop)
        link = await Link(postgres.primary.port).open()
        operator = await _operator(link)
        brokers = [await _broker(n, home, tree, postgres, stores, one_time) for n in range(BROKERS)]
        pages, management = [b.port for b in brokers], [b.management for b in brokers]
        configuration = home / "haproxy.cfg"
        configuration.write_text(
            (DEPLOY / "haproxy.cfg").read_text().replace(_BALANCE, _BALANCE + _NAME_SERVER)
        )
        balancer = stack.enter_context(
            haproxy(home, configuration, pages=pages, management=management)
        )
        made = Deployment(home, kind, tree, postgres, stores, brokers, operator, link, balancer)
        stack.push_async_callback(made.stop)
        if one_time == "postgres":
            await asyncio.to_thread(brokers[0].run, "migrate")
            await asyncio.to_thread(brokers[0].run, "one-time", "--set", "postgres")
        await made.heal()
        yield made


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder that the servers' account can enter."""
    home = Path(tempfile.mkdtemp(prefix="broker-chaos-"))
    home.chmod(0o755)
    yield home
    shutil.rmtree(home, ignore_errors=True)


async def _broker(
    number: int,
    home: Path,
    tree: Path,
    postgres: Pair,
    stores: Replicated | Cluster,
    one_time: OneTime,
) -> BrokerProcess:
    link = await Link(postgres.primary.port).open()
    log = home / f"broker-{number}.log"
    if isinstance(stores, Cluster):
        return BrokerProcess(number, tree, log, link, None, stores.url, one_time)
    if number > 0:
        return BrokerProcess(number, tree, log, link, None, stores.url, one_time)
    to_redis = await Link(stores.primary().server.port).open()
    return BrokerProcess(
        number, tree, log, link, to_redis, f"redis://127.0.0.1:{to_redis.port}", one_time
    )


def _faked(clock: str) -> dict[str, str]:
    """The environment of a process whose clock has this offset. The command `faketime` itself would
    stay as the process's parent, and take its signals.
    """
    if not clock:
        return {}
    argv = [program("faketime"), "-f", clock, "printenv", "LD_PRELOAD"]
    library = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    return {"LD_PRELOAD": library, "FAKETIME": clock, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


async def _operator(link: Link) -> Parts:
    """The parts of a broker that serves nothing: the harness makes apps and keys with it."""
    settings = Settings(
        database_url=_postgres_url(link.port),
        redis_url="redis://127.0.0.1:1",  # never asked
        secret_key=(SECRET_KEY,),
        cache_seconds=0.0,
        store_timeout=8.0,  # a busy machine
        database_connections=4,
    )
    return await assemble(settings, log=Log(io.StringIO()))


def _postgres_url(port: int) -> str:
    return f"postgresql://broker@127.0.0.1:{port}/postgres?sslmode=disable"
