"""`python -m tests.bench.upgrade CHECKOUT`: upgrade and roll back with logins going on.

Three brokers of the other checkout run behind `deploy/haproxy.cfg`, on a new database that it has
migrated. Logins begin at random moments (Poisson); one in eight is a registration. This checkout
migrates the database. Its brokers replace the others, are replaced by them, and replace them again:
one by one, or with `--at-once` by a reload of HAProxy. Read from it how many logins failed in each
phase, and by which answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import aiohttp

from broker.embedded import EmbeddedStores
from tests.bench.service import ROOT
from tests.support.authenticator import Authenticator
from tests.support.commands import CLEAN
from tests.support.load_balancers import DEPLOY, LoadBalancer, variables
from tests.support.parts import program
from tests.support.processes import free_port, get, until
from tests.support.wire import ORIGIN, RP_ID, UnexpectedStatus, Wire

BROKERS, USERS = 3, 24
RATE = 8.0  # logins a second
ALONE = 8.0  # seconds with the brokers of one checkout
SETTLE = 10.0  # seconds in which HAProxy's last process ends what it has begun
_PATIENCE = 15.0  # seconds that a login may take
_CLI = [sys.executable, "-c", "import sys; from broker.cli import main; sys.exit(main())"]
_APP = ("app", "create", "--name", "Shop", "--rp-id", RP_ID, "--origin", ORIGIN, "--json")


class Installation:
    """Stores, brokers and HAProxy. Brokers have two sets of ports, of which one is in use."""

    def __init__(self, checkout: Path, opened: ExitStack) -> None:
        self._opened = opened
        self._home = Path(tempfile.mkdtemp(prefix="broker-upgrade-"))
        opened.callback(shutil.rmtree, self._home, ignore_errors=True)
        self._home.chmod(0o755)
        stores = opened.enter_context(EmbeddedStores.start(self._home / "data"))
        self._settings = {
            "BROKER_DATABASE_URL": stores.database_url,
            "BROKER_REDIS_URL": stores.redis_url,
            "BROKER_SECRET_KEY": os.urandom(24).hex(),
            "BROKER_HOST": "127.0.0.1",
        }
        self._ports = [[(free_port(), free_port()) for _ in range(BROKERS)] for _ in range(2)]
        self._given = variables(self._home, pages=(), management=())
        self.run(checkout, "migrate")
        self._brokers = [self._start(checkout, *ports) for ports in self._ports[0]]
        self._proxy = self._reload()

    @property
    def proxy(self) -> LoadBalancer:
        return LoadBalancer(self._proxy, self._given, self._home / "haproxy.log")

    def run(self, checkout: Path, *words: str) -> str:
        """What a command of `broker` prints."""
        argv, environment = [*_CLI, *words], self._environment(checkout)
        return subprocess.check_output(argv, cwd=checkout, env=environment, text=True)

    def replace_one_by_one(self, checkout: Path) -> None:
        """Each when the one before it is ready."""
        for number, ports in enumerate(self._ports[0]):
            _stop(self._brokers[number])
            self._brokers[number] = self._start(checkout, *ports)

    def replace_at_once(self, checkout: Path) -> None:
        """Start new brokers beside the old ones, and let HAProxy's next process send to them."""
        self._ports.reverse()
        beside = [self._start(checkout, *ports) for ports in self._ports[0]]
        self._proxy = self._reload("-sf", str(self._proxy.pid))
        time.sleep(SETTLE)  # sign-ins go on meanwhile
        for process in self._brokers:
            _stop(process)
        self._brokers = beside

    def _environment(self, checkout: Path) -> dict[str, str]:
        return CLEAN | self._settings | {"PYTHONPATH": str(checkout)}

    def _start(self, checkout: Path, page: int, keyed: int) -> subprocess.Popen[bytes]:
        ports = {"BROKER_PORT": str(page), "BROKER_MANAGEMENT_PORT": str(keyed)}
        environment = self._environment(checkout) | ports
        process = self._spawn([*_CLI, "serve"], environment, checkout, f"{page}.log")
        until(lambda: get(page, "/health/ready") == 200, "the broker is ready")
        return process

    def _reload(self, *words: str) -> subprocess.Popen[bytes]:
        argv = [program("haproxy"), "-f", str(DEPLOY / "haproxy.cfg"), *words]
        for number, (page, keyed) in enumerate(self._ports[0], 1):
            self._given |= {
                f"PAGES_{number}": f"127.0.0.1:{page}",
                f"MANAGEMENT_{number}": f"127.0.0.1:{keyed}",
            }
        return self._spawn(argv, os.environ | self._given, ROOT, "haproxy.log")

    def _spawn(
        self, argv: list[str], environment: dict[str, str], folder: Path, log: str
    ) -> subprocess.Popen[bytes]:
        with (self._home / log).open("ab") as written:
            process = subprocess.Popen(
                argv,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
            )
        self._opened.callback(process.kill)
        return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait()


class Traffic:
    """Logins that begin at random moments; `counts` has their results by phase."""

    def __init__(self, page: Wire, backend: Wire) -> None:
        self._page, self._backend = page, backend
        self._people: list[tuple[str, Authenticator]] = []  # with a passkey that is not in use
        self.phase = "registrations"
        self.counts: dict[str, Counter[str]] = {}

    async def login(self, user: str, device: Authenticator | None) -> None:
        """Sign in with the device, or register a new one; count the result."""
        counts = self.counts.setdefault(self.phase, Counter())
        new = device is None
        device = device or Authenticator()
        try:
            async with asyncio.timeout(_PATIENCE):
                if new:
                    opened = await self._backend.open_registration(user)
                    nonce = await self._page.register(opened, device)
                else:
                    opened = await self._backend.open_authentication(user)
                    nonce = await self._page.authenticate(opened, device)
                (await self._backend.redeem(nonce)).of(200)
        except UnexpectedStatus as refused:
            code = (refused.answer.json or {}).get("code", "without a code")  # HAProxy's have none
            counts[f"{refused.answer.status} {code}"] += 1
        except (aiohttp.ClientError, TimeoutError) as fault:
            counts[type(fault).__name__] += 1
        else:
            counts["done"] += 1
            new = False
        if not new:
            self._people.append((user, device))

    async def run(self) -> None:
        """Begin logins until cancelled."""
        number = 0
        async with asyncio.TaskGroup() as logins:
            while True:
                number += 1
                if number % 8 and self._people:
                    logins.create_task(self.login(*self._people.pop(0)))
                else:
                    logins.create_task(self.login(f"new-{number}", None))
                await asyncio.sleep(random.expovariate(RATE))


async def main(other: Path, *, at_once: bool) -> None:
    """Print the results of each phase."""
    with ExitStack() as opened:
        here = Installation(other, opened)
        app = json.loads(here.run(other, *_APP))
        until(here.proxy.open, "HAProxy listens")
        connector = aiohttp.TCPConnector(ssl=here.proxy.trust, limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            page, backend = (
                Wire(session, f"https://localhost:{port}", app["app_id"], app["api_key"])
                for port in (here.proxy.pages, here.proxy.management)
            )
            traffic = Traffic(page, backend)
            await asyncio.sleep(3)  # HAProxy asks readiness twice
            for number in range(USERS):
                await traffic.login(f"user-{number}", None)
            replace = here.replace_at_once if at_once else here.replace_one_by_one
            running = asyncio.create_task(traffic.run())
            for phase, step in {
                "the other release": None,
                "migration": partial(here.run, ROOT, "migrate"),
                "to this release": partial(replace, ROOT),
                "this release": None,
                "back": partial(replace, other),
                "the other release again": None,
                "to this release again": partial(replace, ROOT),
                "this release again": None,
            }.items():
                traffic.phase = phase
                await (asyncio.to_thread(step) if step else asyncio.sleep(ALONE))
            running.cancel()
            await asyncio.wait([running])
    for phase, counts in traffic.counts.items():
        print(f"{phase:<24} {sum(counts.values()):>5} begun ", dict(counts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=lambda text: Path(text).resolve())
    parser.add_argument("--at-once", action="store_true", help="by a reload of HAProxy")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.checkout, at_once=arguments.at_once))
