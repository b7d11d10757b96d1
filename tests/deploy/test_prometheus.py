"""Prometheus scrapes a broker in trouble: each query of the dashboard shows its part of the
traffic, and alerts on that trouble are raised.

Traffic and faults come in two rounds, with a scrape between them, for a rate needs two samples.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from broker.directory import Directory
from broker.durable import Durable
from broker.embedded import EmbeddedStores
from tests.cli.test_serve import BROKER, Serve
from tests.deploy.test_monitoring import ALERTS, DASHBOARD, RULES, TARGETS
from tests.support.authenticator import Authenticator
from tests.support.parts import program
from tests.support.processes import free_port, get, until
from tests.support.servers import Valkey, pool, session_of
from tests.support.wire import ORIGIN, RP_ID, Wire

JOB = "passkey-broker"
FILES = 200  # that the broker may open
CALLERS = 165  # connections that stay open
MANY = 45  # requests that fail, for alerts on a rate of 0.1 a second over 5 minutes
SOME = 8  # redemptions or finishes that are refused
# The clean-up's first pass comes at least five minutes after the start.
WITHOUT_DATA = {"Deleted rows a minute A", "Failed clean-ups A"}
RAISED = {
    "BrokerInstanceDown",
    "BrokerErrors",
    "BrokerSlow",
    "BrokerFinishesRefused",
    "BrokerNonceReplayed",
    "BrokerNonceOfAnother",
    "BrokerRedisFails",
    "BrokerRedisFull",
    "BrokerPostgresFails",
    "BrokerSignInsEndedByFailover",
    "BrokerLoopLags",
    "BrokerFiles",
    "BrokerEventsLost",
}


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus that scrapes a broker and has the alerts."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data that its HTTP API answers."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}") as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as fault:
            pytest.fail(f"{parameters}: {fault.read().decode()}")

    def sum(self, selector: str) -> float:
        """The sum of the newest samples; 0 where there is none."""
        result = self.ask("query", query=f"sum({selector})")["result"]
        return float(result[0]["value"][1]) if result else 0.0

    def rules(self) -> dict[str, dict[str, Any]]:
        """The alerts' rules by name, with their state."""
        groups = self.ask("rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}


def _prometheus(opened: ExitStack, home: Path, targets: Sequence[int]) -> Prometheus:
    ports = [f"127.0.0.1:{port}" for port in targets]
    configuration = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "200ms"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": ports}]}],
    }
    (home / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    argv = [program("prometheus"), f"--web.listen-address=127.0.0.1:{port}"]
    argv += ["--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=home, stdin=subprocess.DEVNULL, stderr=log)
    opened.callback(process.wait)
    opened.callback(process.kill)
    until(lambda: get(port, "/-/ready") == 200, "Prometheus is ready")
    return Prometheus(f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def prometheus(
    stores: EmbeddedStores, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    home = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as opened:
        management = free_port()
        # First: Prometheus waits for 5 seconds before it scrapes.
        started = _prometheus(opened, home, [management, free_port()])
        valkey = Valkey.start(home / "valkey")
        opened.callback(valkey.stop)
        environment = {
            "BROKER_DATABASE_URL": stores.database_url,
            "BROKER_REDIS_URL": valkey.url,
            "BROKER_MANAGEMENT_PORT": str(management),
            "BROKER_STORE_TIMEOUT": "0.6",
        }
        limited = ("sh", "-c", f'ulimit -n {FILES} && exec "$0" serve', str(BROKER))
        broker = Serve(environment, command=limited)
        opened.callback(broker.process.wait)
        opened.callback(broker.process.kill)
        asyncio.run(_cause_trouble(broker.begun(), management, stores, valkey, started))
        for _ in range(CALLERS):
            caller = opened.enter_context(socket.create_connection(("127.0.0.1", management)))
            caller.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert caller.recv(4096).startswith(b"HTTP/1.1 200 ")
        yield started


async def _cause_trouble(
    broker: Serve, management: int, stores: EmbeddedStores, valkey: Valkey, prometheus: Prometheus
) -> None:
    postgres = pool(stores.database_url)
    await postgres.open()
    directory = Directory(durable=Durable(postgres))
    app, key = await directory.create_app("Example", RP_ID, [ORIGIN])
    await postgres.close()
    async with aiohttp.ClientSession() as session:
        page, backend = (
            Wire(session, f"http://127.0.0.1:{port}", app.id, key)
            for port in (broker.port, management)
        )
        for number in (1, 2):
            await _sign_in(page, backend, f"ann{number}")
            await _fill_redis(backend, valkey)
            await _fail_over(page, backend, valkey)
            await _lock_events(page, backend, stores, number)
            await asyncio.to_thread(_await_scrape, prometheus, number)
    _pause(broker, prometheus)


async def _sign_in(page: Wire, backend: Wire, user: str) -> None:
    """Sign-ins that succeed, finishes and redemptions that are refused, and a mail code."""
    device = Authenticator()
    nonce = await page.register(await backend.open_registration(user), device)
    assert (await backend.redeem(nonce)).status == 200
    assert (await backend.redeem(nonce)).status == 401
    assert (await backend.redeem(await page.authenticate(None, device))).status == 200
    for _ in range(SOME):
        nonce = await page.authenticate(await backend.open_authentication(user), device)
        assert (await backend.redeem(nonce, external_id="another")).status == 401
    transaction = await backend.open_authentication(user)
    for _ in range(SOME):
        handle, options = await page.begin("authenticate", transaction)
        response = device.authenticate(options, ORIGIN, signature=b"no")
        assert (await page.finish("authenticate", handle, response, transaction)).status == 401
    mail = {"email": f"{user}@example.org", "purpose": "sign-in", "external_id": user}
    (await backend.keyed("POST", "/mail_codes", mail)).of(201)


async def _open_registrations(backend: Wire, users: Sequence[str]) -> set[int]:
    """Open transactions at the same time; returns their statuses."""
    asked = [{"external_id": user, "passkey_display_name": user} for user in users]
    answers = await asyncio.gather(
        *(backend.keyed("POST", "/transactions/register", each) for each in asked)
    )
    return {answer.status for answer in answers}


async def _fill_redis(backend: Wire, valkey: Valkey) -> None:
    valkey.ask("CONFIG SET", "maxmemory", 1)
    assert await _open_registrations(backend, ["ann"] * MANY) == {503}
    valkey.ask("CONFIG SET", "maxmemory", 0)


async def _fail_over(page: Wire, backend: Wire, valkey: Valkey) -> None:
    """End a transaction by a new term, as a promotion does."""
    transaction = await backend.open_registration("ann")
    valkey.ask("REPLICAOF", "127.0.0.1", 1)
    valkey.ask("REPLICAOF", "NO", "ONE")
    begun = {"transaction_id": transaction}
    assert (await page.page("/register/transactions/webauthn/start", begun)).status == 404


async def _lock_events(page: Wire, backend: Wire, stores: EmbeddedStores, number: int) -> None:
    """Let each statement with an event wait for the lock of another session."""
    async with session_of(stores) as session, session.transaction():
        await session.execute("LOCK TABLE events")
        path, origin = "/register/transactions/webauthn/start", f"https://{number}.example"
        new = [f"new{number}-{each}" for each in range(MANY)]
        refused, failed = await asyncio.gather(
            page.page(path, {}, origin=origin), _open_registrations(backend, new)
        )
        assert (refused.status, failed) == (403, {503})


def _await_scrape(prometheus: Prometheus, rounds: int) -> None:
    """Wait until Prometheus has the counters of these rounds."""
    until(
        lambda: (
            prometheus.sum('broker_redemptions_total{result="replayed"}') == rounds
            and prometheus.sum("broker_events_lost_total") == rounds
        ),
        "a scrape",
    )


def _pause(broker: Serve, prometheus: Prometheus) -> None:
    """Stop the process until a scrape fails, so that its event loop is late."""
    os.kill(broker.process.pid, signal.SIGSTOP)
    until(lambda: prometheus.sum("up") == 0, "a scrape fails")
    os.kill(broker.process.pid, signal.SIGCONT)
    until(lambda: prometheus.sum("up") == 1, "a scrape succeeds")


def test_the_dashboard_lists_the_job(prometheus: Prometheus) -> None:
    """The values of its variable: `label_values(broker_build_info, job)`."""
    (found,) = re.findall(r"label_values\((\w+), (\w+)\)", DASHBOARD.read_text())[:1]
    assert prometheus.ask(f"label/{found[1]}/values", **{"match[]": found[0]}) == [JOB]


@pytest.mark.parametrize(("panel", "query", "legend"), TARGETS, ids=[each[0] for each in TARGETS])
def test_a_panel_shows_the_traffic(
    prometheus: Prometheus, panel: str, query: str, legend: str
) -> None:
    filled = query.replace("$__rate_interval", "5m").replace("$job", JOB)
    found = prometheus.ask("query", query=filled)["result"]
    numbers = [float(each["value"][1]) for each in found]
    assert any(map(math.isfinite, numbers)) is (panel not in WITHOUT_DATA), found
    for each in found:
        assert set(re.findall(r"{{(\w+)}}", legend)) <= each["metric"].keys()


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_a_rule_runs_and_is_raised_by_its_trouble(prometheus: Prometheus, alert: str) -> None:
    """Firing, or pending where the rule has a time."""
    until(
        lambda: alert not in RAISED or bool(prometheus.rules()[alert]["alerts"]),
        f"{alert} is raised",
    )
    rule = prometheus.rules()[alert]
    assert rule["health"] == "ok", rule
