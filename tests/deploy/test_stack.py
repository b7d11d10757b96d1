"""The whole installation of `deploy/`, as processes on loopback: Postgres, three Valkeys, three
Sentinels, three brokers and HAProxy. Each has its own file, and secrets that `secrets.sh` makes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker.embedded import EmbeddedStores
from broker.embedded.binaries import find_redis
from broker.embedded.directories import server_account
from tests.support.authenticator import Authenticator
from tests.support.commands import BROKER, CLEAN
from tests.support.load_balancers import DEPLOY, LoadBalancer, haproxy
from tests.support.processes import DEADLINE, free_port, get, until
from tests.support.wire import ORIGIN, RP_ID, UnexpectedStatus, Wire


@dataclass(slots=True)
class Stack:
    """The running installation. `folder` has the secrets and the working folders."""

    folder: Path
    valkeys: list[int]
    sentinels: list[int]
    environment: dict[str, str]
    proxy: LoadBalancer

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text().strip()

    def broker(self, *words: str, **more: str) -> str:
        """What a command of `broker` prints."""
        environment = CLEAN | self.environment | more
        done = subprocess.run(
            [str(BROKER), *words], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def sentinel(self, *words: str) -> Any:
        """The answer of the first Sentinel."""
        password = self.secret("monitor.conf").rpartition(" ")[2]
        with redis.Redis(port=self.sentinels[0], password=password, protocol=2) as client:
            client.response_callbacks.clear()
            return client.execute_command("SENTINEL", *words)

    def replicas(self) -> int:
        """How many replicas the first Sentinel sees in order."""
        found = [
            dict(zip(each[::2], each[1::2], strict=True))
            for each in self.sentinel("replicas", "broker")
        ]
        return [each[b"flags"] for each in found].count(b"slave")


def _spawn(
    opened: ExitStack, log: Path, argv: list[str], cwd: Path, environment: dict[str, str]
) -> None:
    written = opened.enter_context(log.open("wb"))
    process = subprocess.Popen(
        argv, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=written, stderr=written
    )
    opened.callback(process.wait)
    opened.callback(process.kill)


def _postgres(opened: ExitStack, folder: Path, port: int) -> EmbeddedStores:
    """Postgres with the settings of `postgresql.conf`, which takes passwords on loopback."""
    hba = "local all broker peer map=broker\nhost all all 127.0.0.1/32 scram-sha-256\n"
    (folder / "hba.conf").write_text(hba)
    line = re.compile(r"^(\w+) = '?([^'#\n]*?)'? *(?:#.*)?$", re.M)
    settings = {
        **dict(line.findall((DEPLOY / "postgresql.conf").read_text())),
        "hba_file": str(folder / "hba.conf"),
        "listen_addresses": "127.0.0.1",
        "port": str(port),
    }
    return opened.enter_context(
        EmbeddedStores.start(folder / "data", None, settings, redis_url="redis://unused")
    )


def _server() -> str:
    found = find_redis(server_account())
    return str(found.directory / found.server)


def _valkeys(opened: ExitStack, folder: Path, ports: list[int]) -> None:
    for port in ports:
        role = "# primary" if port == ports[0] else f"replicaof 127.0.0.1 {ports[0]}"
        _contained(opened, folder, "valkey-1", port, {"ROLE": role, "HOSTNAME": "127.0.0.1"})


def _sentinels(opened: ExitStack, folder: Path, ports: list[int]) -> None:
    for port in ports:
        _contained(opened, folder, "sentinel-1", port, {})


def _contained(
    opened: ExitStack, folder: Path, service: str, port: int, variables: dict[str, str]
) -> None:
    """Run the shell script that starts a service of `compose.yaml`, on another port."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    script: str = compose["services"][service]["entrypoint"][2]
    for theirs, ours in (
        ("$$", "$"),
        ("/etc/valkey/", f"{DEPLOY}/"),
        ("/run/secrets/", f"{folder}/secrets/"),
        ("exec valkey-server", f"exec {_server()}"),
        (".conf --", f".conf --port {port} --bind 127.0.0.1 --"),
    ):
        assert theirs in script or theirs == "$$"
        script = script.replace(theirs, ours)
    home = folder / str(port)
    home.mkdir()
    _spawn(opened, home / "log", ["sh", "-ec", script], home, os.environ | variables)


async def _roles(database: str, secrets: Path) -> None:
    superuser = await asyncpg.connect(database)
    await superuser.execute("CREATE DATABASE broker")
    await superuser.close()
    superuser = await asyncpg.connect(database.replace("/postgres?", "/broker?"))
    for path in (DEPLOY / "grants.sql", secrets / "roles.sql"):
        await superuser.execute(path.read_text())
    await superuser.close()


def _ready(port: int) -> bool:
    return get(port, "/health/ready") == 200


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with ExitStack() as opened:
        folder = Path(tempfile.mkdtemp(prefix="broker-stack-"))
        opened.callback(shutil.rmtree, folder)
        folder.chmod(0o755)
        ports = [free_port() for _ in range(13)]
        postgres, valkeys, sentinels = ports[0], ports[1:4], ports[4:7]
        pages, management = ports[7:10], ports[10:13]
        addresses = {
            "POSTGRES": f"127.0.0.1:{postgres}",
            "PRIMARY": f"127.0.0.1 {valkeys[0]}",
            "SENTINELS": ",".join(f"127.0.0.1:{port}" for port in sentinels),
        }
        argv = ["sh", str(DEPLOY / "secrets.sh"), str(folder / "secrets")]
        subprocess.run(argv, env=os.environ | addresses, check=True)
        _valkeys(opened, folder, valkeys)
        stores = _postgres(opened, folder, postgres)
        _sentinels(opened, folder, sentinels)  # they find replicas that are there at once
        environment = {
            f"BROKER_{name.upper()}_FILE": str(folder / "secrets" / name)
            for name in ("database_url", "redis_url", "secret_key")
        }
        database = f"{stores.database_url}&port={postgres}"
        asyncio.run(_roles(database, folder / "secrets"))
        owner = {"BROKER_DATABASE_URL_FILE": str(folder / "secrets" / "owner_database_url")}
        subprocess.run([str(BROKER), "migrate"], env=CLEAN | environment | owner, check=True)
        for page, keyed in zip(pages, management, strict=True):
            more = {"BROKER_PORT": str(page), "BROKER_MANAGEMENT_PORT": str(keyed)}
            more |= {"BROKER_HOST": "127.0.0.1", "BROKER_LAME_DUCK_SECONDS": "0"}
            log, argv = folder / f"{page}.log", [str(BROKER), "serve"]
            _spawn(opened, log, argv, folder, CLEAN | environment | more)
        for page in pages:
            until(partial(_ready, page), "the broker is ready")
        (folder / "proxy").mkdir()
        proxy = opened.enter_context(haproxy(folder / "proxy", pages=pages, management=management))
        made = Stack(folder, valkeys, sentinels, environment, proxy)
        until(lambda: made.replicas() == 2, "the Sentinel sees two replicas")
        yield made


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(ssl=stack.proxy.trust)
    async with aiohttp.ClientSession(connector=connector) as opened:
        yield opened


@pytest.fixture
def app(stack: Stack, client: aiohttp.ClientSession) -> tuple[Wire, Wire]:
    """A new app, as pages reach it and as its backend does."""
    words = ("app", "create", "--name", "Shop", "--rp-id", RP_ID, "--origin", ORIGIN, "--json")
    made = json.loads(stack.broker(*words))
    page, backend = (
        Wire(client, f"https://localhost:{port}", made["app_id"], made["api_key"])
        for port in (stack.proxy.pages, stack.proxy.management)
    )
    return page, backend


async def test_people_sign_in_before_and_after_a_failover(
    stack: Stack, app: tuple[Wire, Wire], device: Authenticator
) -> None:
    page, backend = app
    nonce = await page.register(await backend.open_registration("ann"), device)
    assert (await backend.redeem(nonce)).of(200)["external_id"] == "ann"
    assert stack.sentinel("failover", "broker") == b"OK"
    first = b"%d" % stack.valkeys[0]
    primary = ("get-master-addr-by-name", "broker")
    await asyncio.to_thread(until, lambda: stack.sentinel(*primary)[1] != first, "a failover")
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                nonce = await page.authenticate(await backend.open_authentication("ann"), device)
                assert (await backend.redeem(nonce)).of(200)["external_id"] == "ann"
                break
            except UnexpectedStatus as refused:
                # A primary takes no write until a replica follows. Sign-ins in flight start over.
                if refused.answer.status not in (401, 404, 503):
                    raise
            await asyncio.sleep(0.05)  # between two tries


async def test_the_service_s_role_owns_nothing(stack: Stack) -> None:
    service = await asyncpg.connect(stack.secret("database_url"))
    try:
        owned = "SELECT count(*) FROM pg_class WHERE relowner = current_user::regrole"
        assert await service.fetchval(owned) == 0
        for statement in (
            "CREATE TABLE mine (x int)",
            "CREATE TEMP TABLE mine (x int)",
            "DROP TABLE credentials",
            "ALTER TABLE users ADD COLUMN mine int",
            "TRUNCATE events",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await service.execute(statement)
        for slot in range(4):
            await service.execute(f"TRUNCATE one_time_spent_{slot}")
    finally:
        await service.close()


def test_the_doctor_finds_no_fault(stack: Stack) -> None:
    findings = json.loads(stack.broker("doctor", "--json"))
    assert all(finding["ok"] for finding in findings)
    assert {"check": "role", "ok": True, "found": "owns no table", "todo": ""} in findings


def test_accounts_of_redis_may_do_no_more_than_they_need(stack: Stack) -> None:
    user, password = stack.secret("redis_url").partition("://")[2].partition("@")[0].split(":")
    with redis.Redis(port=stack.valkeys[1], username=user, password=password) as client:
        for command in ("CONFIG SET maxmemory 1", "FLUSHALL", "KEYS *", "ACL LIST"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(command)
    with (
        redis.Redis(port=stack.valkeys[1], retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_the_operator_s_account_loads_accounts_and_changes_settings(stack: Stack) -> None:
    password = stack.secret("redis_password")
    with redis.Redis(port=stack.valkeys[1], username="operator", password=password) as client:
        assert client.acl_load()
        assert client.config_set("maxmemory", "1gb")


def test_a_primary_that_is_cut_off_takes_no_writes(stack: Stack) -> None:
    password = stack.secret("redis_password")
    for port in stack.valkeys:
        with redis.Redis(port=port, username="operator", password=password) as client:
            assert client.config_get("min-replicas-to-write") == {"min-replicas-to-write": "1"}
            assert client.config_get("min-replicas-max-lag") == {"min-replicas-max-lag": "10"}
