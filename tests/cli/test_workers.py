"""`broker serve --workers N`: several processes are one service, whatever ends one of them, and end
as one.

The tests of `shared` share a service of two workers, which every one of them leaves whole; the
others start their own. Nothing waits for a time to pass: the supervisor's log, the kernel's tables
and answers say when something has happened.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from broker.cli.workers import LONGEST_PAUSE, pause
from broker.embedded import EmbeddedStores
from tests.cli import test_serve
from tests.cli.test_serve import Serve, Start, finish, in_flight, refuses_connections
from tests.conftest import SECRET_KEY
from tests.support.authenticator import Authenticator
from tests.support.processes import accepted, alive, descendants, free_port, get, until
from tests.support.wire import Wire

serve, app, fresh_database = test_serve.serve, test_serve.app, test_serve.fresh_database

HASTY = """
import os
from broker.cli.workers import supervise
from broker.settings import Settings
supervise(Settings.load(os.environ), os.environ, migrate=False, hang_seconds=5.0)
"""

# A worker imports this at its start. SIGUSR1 then blocks its event loop.
HANGS = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))
"""


def workers(started: Serve) -> list[int]:
    return descendants(started.process.pid)


def folders(pids: list[int]) -> list[Path]:
    """The private folders that these processes were told of."""
    found = set()
    for pid in pids:
        told = re.search(rb'"folder": "([^"]+)"', Path(f"/proc/{pid}/cmdline").read_bytes())
        if told:
            found.add(Path(told[1].decode()))
    return list(found)


def said(started: Serve, event: str, **values: object) -> list[dict[str, object]]:
    return [
        line for line in started.log if line["event"] == event and values.items() <= line.items()
    ]


def figures(port: int) -> dict[str, float]:
    """Every counter that a scrape shows, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples if "_created" not in name}


def on_each(started: Serve, app: dict[str, str]) -> list[socket.socket]:
    """Requests under way, at least one at each worker."""
    opened: list[socket.socket] = []
    while not all(accepted(pid, started.port) for pid in workers(started)):
        assert len(opened) < 200
        opened.append(in_flight(started.port, app))
    return opened


def silent(pid: int, started: Serve) -> socket.socket:
    """A connection that this worker has taken, and on which nothing was sent."""
    while True:
        opened = socket.create_connection(("127.0.0.1", started.port), timeout=30)
        mine = opened.getsockname()[1]
        until(
            lambda mine=mine: any(
                mine in accepted(each, started.port) for each in workers(started)
            ),  # type: ignore[misc]
            "somebody takes it",
        )
        if mine in accepted(pid, started.port):
            return opened
        opened.close()


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def shared(stores: EmbeddedStores) -> Iterator[Serve]:
    """A service of two workers."""
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
    started = Serve(urls | {"BROKER_METRICS": "public"}, "--workers", "2").begun()
    yield started
    (folder,) = folders(workers(started))
    started.tell(signal.SIGTERM)
    assert started.end() == 0
    assert not folder.exists()
    assert started.events[-2:] == ["draining", "stopped"]
    assert len(said(started, "listening", workers=2)) == 1


# -- one service -----------------------------------------------------------------------------------


async def hammer(port: int, requests: int, path: str = "/health/live") -> None:
    connector = aiohttp.TCPConnector(limit=32)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:

        async def one(number: int) -> None:
            async with session.get(path, headers={"X-Request-Id": f"{number:064}"}) as answer:
                assert answer.status == 200

        await asyncio.gather(*map(one, range(requests)))


async def test_all_answer_on_one_port_and_their_lines_stay_whole(shared: Serve) -> None:
    lines: list[dict[str, object]] = []

    def all_there(sent: int) -> bool:
        lines[:] = [line for line in said(shared, "request") if len(str(line["request_id"])) == 64]
        return len(lines) == sent

    # Whoever is awake accepts: on a busy machine that may be one of them.
    for sent in range(1000, 20_001, 1000):
        await hammer(shared.port, 1000)
        until(partial(all_there, sent), "every request has a line, and each line is JSON")
        if {line["pid"] for line in lines} == set(workers(shared)):
            break
    assert {line["pid"] for line in lines} == set(workers(shared))


async def test_figures_add_up_whoever_is_asked(shared: Serve) -> None:
    path = "/sdk/passkey.d.ts"
    name = f'broker_request_seconds_count{{route="{path}",status="200"}}'
    await hammer(shared.port, 100, path)
    for _ in range(5):
        until(lambda: figures(shared.port).get(name, 0) >= 100, "what all counted")
    assert figures(shared.port)[name] == 100


async def test_a_nonce_is_redeemed_once_across_workers(
    shared: Serve, app: dict[str, str], device: Authenticator
) -> None:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        wire = Wire(session, f"http://127.0.0.1:{shared.port}", app["app_id"], app["api_key"])
        await wire.user("ann", device)
        for _ in range(3):
            nonce = await wire.authenticate(None, device)
            answers = await asyncio.gather(*(wire.redeem(nonce) for _ in range(50)))
            assert sorted(answer.status for answer in answers) == [200] + [401] * 49
    verify = "/v1/apps/{app_id}/authenticate/verify"
    until(
        lambda: (
            {line["pid"] for line in said(shared, "request", route=verify)} == set(workers(shared))
        ),
        "both were asked",
    )


def test_what_is_passed_on_is_private(shared: Serve) -> None:
    (folder,) = folders(workers(shared))
    assert folder.stat().st_mode & 0o777 == 0o700
    for pid in workers(shared):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"postgres" not in words
        assert SECRET_KEY.encode() not in words


def counts(started: Serve) -> list[int]:
    """How many connections each worker has."""
    return sorted(len(accepted(pid, started.port)) for pid in workers(started))


def test_connections_that_stay_are_shared(shared: Serve) -> None:
    """A burst, as a backend's pool opens it, and connections that come one by one."""
    opened: list[socket.socket] = []
    try:
        for number in (64, *range(65, 81)):
            while len(opened) < number:
                opened.append(socket.create_connection(("127.0.0.1", shared.port), timeout=30))
            until(lambda number=number: sum(counts(shared)) >= number, "they are taken")  # type: ignore[misc]
        assert min(counts(shared)) >= 16
    finally:
        for each in opened:
            each.close()


def test_a_killed_worker_is_replaced_and_nothing_is_missed(shared: Serve) -> None:
    """Connections made after its death are all served; and no figure that a scrape shows ever goes
    down.
    """
    killed, other = workers(shared)
    known = len(said(shared, "worker_listening"))
    last = figures(shared.port)
    os.kill(killed, signal.SIGKILL)
    until(lambda: not alive([killed]), "it is dead")

    def replaced() -> bool:
        nonlocal last
        assert get(shared.port, "/health/live") == 200
        now = figures(shared.port)
        assert [name for name, value in last.items() if now.get(name, -1) < value] == []
        last = now
        return len(said(shared, "worker_listening")) > known

    until(replaced, "another one listens")
    (ended,) = said(shared, "worker_ended", worker=killed)
    assert (ended["cause"], ended["signal"], ended["level"]) == ("signal", "SIGKILL", "warning")
    assert {other} < set(workers(shared))
    assert figures(shared.port)['broker_worker_restarts_total{cause="signal"}'] == 1


def test_a_worker_told_to_end_drains_and_is_replaced(shared: Serve, app: dict[str, str]) -> None:
    before = workers(shared)
    told = before[0]
    known = len(said(shared, "worker_listening"))
    opened = on_each(shared, app)
    fresh = silent(told, shared)
    os.kill(told, signal.SIGTERM)
    until(lambda: bool(said(shared, "worker_drains", worker=told)), "it drains")
    with fresh:
        fresh.sendall(b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n")
        assert fresh.recv(100).startswith(b"HTTP/1.1 200 "), "a connection that it had just taken"
    assert alive([told]) == [told], "its requests run"
    assert get(shared.port, "/health/live") == 200
    for each in opened:
        with each:
            assert finish(each) == b"HTTP/1.1 201 Created\r\n"
    until(lambda: len(said(shared, "worker_listening")) > known, "another one listens")
    until(lambda: not alive([told]), "it is done")
    assert said(shared, "worker_ended", worker=told) == []
    assert figures(shared.port)['broker_worker_restarts_total{cause="told"}'] >= 1


def test_a_hangup_renews_one_after_the_other(shared: Serve) -> None:
    old = workers(shared)
    shared.tell(signal.SIGHUP)

    def renewed() -> bool:
        assert get(shared.port, "/health/live") == 200
        return bool(said(shared, "workers_renewed"))

    until(renewed, "all are new")
    until(lambda: not alive(old), "the old ones are done")
    assert len(workers(shared)) == 2
    assert get(shared.port, "/health/live") == 200


# -- the end of one --------------------------------------------------------------------------------


def test_pauses_grow_up_to_a_limit() -> None:
    assert [pause(early) for early in range(6)] == [0, 0, 1, 2, 4, 8]
    assert pause(30) == LONGEST_PAUSE


def test_a_worker_that_keeps_dying_is_started_less_and_less(shared: Serve) -> None:
    """With one that dies before it listens: its place waits, the other goes on."""
    good, bad = workers(shared)
    dead = []
    for _ in range(3):
        os.kill(bad, signal.SIGKILL)
        dead.append(bad)
        until(lambda: bool(said(shared, "worker_ended", worker=dead[-1])), "its end is known")
        if len(dead) < 3:
            until(lambda: len(workers(shared)) == 2, "there is another one")
            (bad,) = {*workers(shared)} - {good}
    pauses = [said(shared, "worker_ended", worker=pid)[0]["pause"] for pid in dead]
    assert pauses in ([0, 0, 1], [0, 1, 2], [1, 2, 4]), (
        "by how many died early in that place before"
    )
    assert get(shared.port, "/health/live") == 200


def test_a_worker_that_hangs_ends_and_is_replaced(
    stores: EmbeddedStores, app: dict[str, str], tmp_path: Path
) -> None:
    """Sooner than others. At last the service is told twice, and ends at once."""
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
    hasty = urls | {"BROKER_WORKERS": "2", "BROKER_DRAIN_SECONDS": "60", "BROKER_METRICS": "public"}
    hasty["PYTHONPATH"] = str(tmp_path)
    started = Serve(hasty, command=(sys.executable, "-c", HASTY)).begun()
    try:
        hanging, other = workers(started)
        os.kill(hanging, signal.SIGUSR1)
        until(lambda: bool(said(started, "worker_ended", worker=hanging)), "it ends")
        (ended,) = said(started, "worker_ended", worker=hanging)
        assert (ended["cause"], ended["signal"]) == ("hung", "SIGALRM")
        until(lambda: bool(said(started, "worker_listening")), "another one listens")
        assert figures(started.port)['broker_worker_restarts_total{cause="hung"}'] == 1
        assert other in workers(started), "the one that does not hang goes on"
        ends_at_once(started, app, signal.SIGTERM, -signal.SIGTERM)
    finally:
        started.process.kill()
        started.end()


# -- the end of all --------------------------------------------------------------------------------


def test_all_drain_at_the_same_time(serve: Start, app: dict[str, str]) -> None:
    """Also where a service manager signals every process: being told twice is no second signal."""
    started = serve("--workers", "2").begun()
    pids = workers(started)
    opened = on_each(started, app)
    os.kill(pids[0], signal.SIGTERM)
    started.tell(signal.SIGTERM)
    until(lambda: refuses_connections(started.port), "new connections are refused")
    os.kill(pids[1], signal.SIGTERM)
    assert sorted(alive(pids)) == sorted(pids)
    for each in opened:
        with each:
            assert finish(each) == b"HTTP/1.1 201 Created\r\n"
    assert started.end() == 0
    assert alive(pids) == []
    assert started.events[-1] == "stopped"


def ends_at_once(started: Serve, app: dict[str, str], number: signal.Signals, status: int) -> None:
    """While a request runs, tell it twice."""
    pids = workers(started)
    (folder,) = folders(pids)
    with in_flight(started.port, app):
        started.tell(number)
        until(lambda: "draining" in started.events, "it drains")
        started.tell(number)
        assert started.end() == status
        until(lambda: not alive(pids), "nobody is left")
    assert "stopped" not in started.events
    assert not any("Traceback" in line for line in started.lines)
    assert not folder.exists()


def test_a_second_interrupt_ends_all_at_once(serve: Start, app: dict[str, str]) -> None:
    """SIGTERM does so too, above."""
    ends_at_once(serve("--workers", "2", drain_seconds="60").begun(), app, signal.SIGINT, 130)


def test_nobody_outlives_a_killed_supervisor(serve: Start, app: dict[str, str]) -> None:
    started = serve("--workers", "2").begun()
    port, pids = started.port, workers(started)
    (folder,) = folders(pids)
    with in_flight(port, app) as running:
        started.process.kill()
        until(lambda: refuses_connections(port), "new connections are refused")
        assert finish(running) == b"HTTP/1.1 201 Created\r\n"
    until(lambda: not alive(pids), "no orphan is left")
    assert free(port)
    assert not folder.exists()


def test_an_orphan_that_hangs_ends_too(stores: EmbeddedStores, tmp_path: Path) -> None:
    """A blocked event loop does not see that the supervisor is gone."""
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
    hasty = urls | {"BROKER_WORKERS": "2", "PYTHONPATH": str(tmp_path)}
    started = Serve(hasty, command=(sys.executable, "-c", HASTY)).begun()
    pids = workers(started)
    os.kill(pids[0], signal.SIGUSR1)
    started.process.kill()
    until(lambda: not alive(pids), "no orphan is left")
    started.end()


# -- before it listens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changes", "sentence"),
    [
        (("--workers", "0"), {}, r"BROKER_WORKERS must be a whole number from 1 to 64\."),
        ((), {"dialects": "nope"}, r"BROKER_DIALECTS must be of .*"),
        (
            ("--migrate",),
            {"database_url": "postgresql://broker@/postgres?host=/nowhere"},
            r"Postgres can't be reached \(\w+\); check BROKER_DATABASE_URL\.",
        ),
    ],
    ids=["workers", "dialects", "migrate"],
)
def test_faults_are_told_once(
    serve: Start, options: tuple[str, ...], changes: dict[str, str], sentence: str
) -> None:
    started = serve(*options, **({"workers": "3"} | changes))
    assert started.end() == 1
    (line,) = started.lines
    assert re.fullmatch(rf"broker: {sentence}\n", line)


def test_a_port_in_use_is_told_once_also_of_a_service_with_workers(
    shared: Serve, serve: Start
) -> None:
    started = serve("--workers", "2", "--port", str(shared.port))
    assert started.end() == 1
    assert started.lines == [
        f"broker: Port {shared.port} on 127.0.0.1 is in use; stop what uses it or choose another one.\n"
    ]


def test_a_worker_that_cannot_start_ends_the_service(serve: Start) -> None:
    started = serve("--workers", "2")
    until(lambda: len(workers(started)) == 2, "workers are started")
    pids = workers(started)
    os.kill(pids[1], signal.SIGKILL)
    assert started.end() == 1
    assert started.lines == ["broker: A worker ended before it listened (SIGKILL).\n"]
    assert alive(pids) == []


async def test_migrates_once_and_listens_on_both_ports(serve: Start, fresh_database: str) -> None:
    management = free_port()
    started = serve(
        "--workers",
        "2",
        "--migrate",
        "--management-port",
        str(management),
        database_url=fresh_database,
    ).begun()
    assert started.ready() == {"http": 200, "status": "ready"}
    assert said(started, "listening", management_port=management, workers=2)
    for _ in range(4):
        assert (get(started.port, "/metrics"), get(management, "/metrics")) == (404, 200)


def test_more_workers_than_cores_are_a_warning(serve: Start) -> None:
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})  # what we start inherits it
    try:
        two, one = serve("--workers", "2").begun(), serve("--workers", "1").begun()
    finally:
        os.sched_setaffinity(0, usable)
    until(
        lambda: bool(said(two, "workers_share_cores", level="warning", workers=2, cores=1)),
        "it warns",
    )
    assert one.ready()["http"] == 200
    assert not said(one, "workers_share_cores")


def test_one_is_as_before(serve: Start) -> None:
    """No supervisor, no process besides, no pid in the lines."""
    started = serve("--workers", "1", workers="2").begun()
    assert workers(started) == []
    assert all("pid" not in line for line in started.log)
