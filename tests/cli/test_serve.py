"""`broker serve` as a process: what it needs to start, when it is ready, and how it ends."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import pty
import re
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
import redis

from broker.app import assemble
from broker.cli import process
from broker.embedded import EmbeddedStores
from broker.embedded.binaries import find_redis
from broker.embedded.directories import server_account
from broker.telemetry import Log
from tests.conftest import SECRET_KEY, settings_for
from tests.support.authenticator import Authenticator
from tests.support.processes import free_port, get, until
from tests.support.servers import Cluster
from tests.support.wire import ORIGIN, RP_ID, Wire

BROKER = Path(sys.executable).with_name("broker")
BODY = b'{"external_id": "ann", "passkey_display_name": "Ann"}'
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
SERVING = {
    "BROKER_HOST": "127.0.0.1",
    "BROKER_PORT": "0",
    "BROKER_SECRET_KEY": SECRET_KEY,
    "BROKER_LAME_DUCK_SECONDS": "0",
}


class Serve:
    """A `broker serve`, or another command; `log` grows as it writes. Ports are in its line
    "listening".
    """

    def __init__(
        self,
        environment: dict[str, str],
        *options: str,
        command: Sequence[str] = (str(BROKER), "serve"),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.process = subprocess.Popen(
            [*command, *options],
            env=CLEAN | SERVING | environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def _listening(self) -> dict[str, Any] | None:
        return next((line for line in self.log if line["event"] == "listening"), None)

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every line so far; each must be a JSON object."""
        return [json.loads(line) for line in list(self.lines)]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.log if line["event"] != "request"]

    def begun(self) -> Serve:
        """Wait until it listens."""
        until(
            lambda: self.process.poll() is not None or self._listening() is not None, "it listens"
        )
        assert self.process.poll() is None, self.lines
        return self

    @property
    def port(self) -> int:
        told = self._listening()
        assert told
        return int(told["port"])

    def ready(self) -> dict[str, Any]:
        """What /health/ready answers, with the status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        told: dict[str, Any] = json.loads(answer.read())
        connection.close()
        return {"http": answer.status, **told}

    def scraped_readiness(self) -> dict[str, float]:
        """The gauge of readiness, by reason."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            found = re.findall(
                r'^broker_ready{reason="(\w*)"} (\S+)$', answer.read().decode(), re.M
            )
        return {reason: float(number) for reason, number in found}

    def tell(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(30)
        self._reader.join(30)
        return status


Start = Callable[..., Serve]


@pytest.fixture
def serve(stores: EmbeddedStores) -> Iterator[Start]:
    """Start `broker serve` on the shared stores, or others."""
    running: list[Serve] = []

    def start(*options: str, **environment: str) -> Serve:
        named = {f"BROKER_{name.upper()}": value for name, value in environment.items()}
        urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
        running.append(Serve(urls | named, *options))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
        each.end()


@pytest.fixture
async def fresh_database(stores: EmbeddedStores) -> str:
    """The URL of a database without a schema."""
    name = f"fresh_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(stores.database_url)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return stores.database_url.replace("/postgres?", f"/{name}?")


class Valkey:
    """A Valkey of the test's own, to be stopped and started again."""

    def __init__(self, home: Path, *options: str) -> None:
        found = find_redis(server_account())
        self.socket = home / "v.sock"
        self._argv = [
            str(found.directory / found.server),
            "--save",
            "",
            "--unixsocket",
            str(self.socket),
        ]
        self._argv += ["--dir", str(home), *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._answers, "Valkey answers")

    def _answers(self) -> bool:
        try:
            with redis.Redis(unix_socket_path=str(self.socket)) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    own = Valkey(tmp_path, "--port", "0")
    yield own
    own.stop()


# -- before it listens -----------------------------------------------------------------------------


def test_tells_every_fault_at_once(serve: Start) -> None:
    started = serve(
        database_url="mysql://u:zq9w@h/x", redis_url="redis://:zq/9w@h", prot="1", log_level="loud"
    )
    assert started.end() == 1
    assert sorted(line.split(" ")[1] for line in started.lines) == [
        "BROKER_DATABASE_URL",
        "BROKER_LOG_LEVEL",
        "BROKER_PROT",
        "BROKER_REDIS_URL",
    ]
    text = "".join(started.lines)
    assert "broker: BROKER_PROT is not a setting.\n" in text
    assert "zq" not in text
    assert "Traceback" not in text


def test_needs_both_stores(serve: Start) -> None:
    started = serve(database_url="", redis_url="")
    assert started.end() == 1
    assert started.lines == [
        "broker: BROKER_DATABASE_URL is missing.\n",
        "broker: BROKER_REDIS_URL is missing.\n",
    ]


def test_an_unknown_setting_is_a_warning(serve: Start) -> None:
    """And a Service called `broker` is none."""
    started = serve(prot="zq9w", port_8080_tcp="tcp://10.0.0.11:8080").begun()
    (said,) = [line for line in started.log if line["event"] == "unknown_settings"]
    assert (said["level"], said["variables"]) == ("warning", ["BROKER_PROT"])
    assert "zq9w" not in "".join(started.lines)


@pytest.mark.parametrize("option", ["--port", "--management-port"])
def test_a_busy_port_is_one_sentence(serve: Start, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = serve(option, str(port))
        assert started.end() == 1
    (sentence,) = started.lines
    assert re.fullmatch(
        rf"broker: Port (0 or )?{port} on 127\.0\.0\.1 is in use; "
        r"stop what uses it or choose another one\.\n",
        sentence,
    )


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("192.0.2.1", "Can't listen on 192.0.2.1, port 0: Cannot assign requested address."),
        (
            "a..b",
            "BROKER_HOST must be a host name or an IP address, like localhost, 0.0.0.0 or ::.",
        ),
    ],
)
def test_an_address_that_is_not_ours_is_one_sentence(
    serve: Start, host: str, sentence: str
) -> None:
    started = serve("--host", host)
    assert started.end() == 1
    assert started.lines == [f"broker: {sentence}\n"]


def test_options_stand_above_the_environment(serve: Start) -> None:
    port = free_port()
    started = serve("--host", "127.0.0.1", "--port", str(port), host="192.0.2.1", port="1").begun()
    assert started.port == port
    assert started.log[0]["host"] == "127.0.0.1"
    assert get(port, "/health/live") == 200


def test_localhost_is_both_loopback_addresses(serve: Start) -> None:
    """As browsers try both."""
    started = serve(host="localhost").begun()
    assert get(started.port, "/health/live", host="127.0.0.1") == 200
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return  # the machine has no IPv6, and the service started without it
    assert get(started.port, "/health/live", host="::1") == 200


def test_runs_on_uvloop() -> None:
    async def kind() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert process.run(kind()) == "uvloop"


# -- ready -----------------------------------------------------------------------------------------


def migrate(database_url: str) -> str:
    """`broker migrate`; what it printed."""
    environment = CLEAN | {"BROKER_DATABASE_URL": database_url}
    done = subprocess.run(
        [str(BROKER), "migrate"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


async def test_is_ready_once_migrated(serve: Start, fresh_database: str) -> None:
    """Without a restart; and stays so when newer code has migrated further, so that a roll-back is
    safe.
    """
    started = serve(database_url=fresh_database, metrics="public").begun()
    assert started.ready() == {
        "http": 503,
        "code": "not_ready",
        "error": "Not ready: postgres_not_migrated.",
        "missing": ["postgres_not_migrated"],
    }
    assert started.scraped_readiness() == {"postgres_not_migrated": 0}
    assert get(started.port, "/health/live") == 200
    until(lambda: "not_migrated" in started.events, "it says so")
    (said,) = [line for line in started.log if line["event"] == "not_migrated"]
    assert said["level"] == "warning"
    assert "`broker migrate`" in said["todo"]
    assert migrate(fresh_database).startswith("0001_first\n")
    assert migrate(fresh_database) == "Nothing to apply.\n"
    assert started.ready() == {"http": 200, "status": "ready"}
    assert started.scraped_readiness() == {"": 1}
    connection = await asyncpg.connect(fresh_database)
    try:
        await connection.execute(
            "INSERT INTO schema_migrations (version, name, sha256, applied_at)"
            " VALUES (9999, 'newer', '', now())"
        )
        assert started.ready()["http"] == 200
        await connection.execute("DELETE FROM schema_migrations")
        assert started.ready()["missing"] == ["postgres_not_migrated"]
    finally:
        await connection.close()


async def test_the_log_says_every_minute_why_postgres_can_not_be_used(
    stores: EmbeddedStores, fresh_database: str
) -> None:
    """At each look: two find an unmigrated database, one none that answers, one a migrated
    database, and one a database that takes no writes.
    """
    stream = io.StringIO()
    settings = settings_for(stores, database_url=fresh_database, store_timeout=0.3)
    parts = await assemble(settings, log=Log(stream))
    looks: list[float] = []
    operator = await asyncpg.connect(fresh_database)
    holding = operator.transaction()

    async def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            # A kept connection could still ask: the lock stops new ones.
            await parts.postgres._pool.expire_connections()
            await holding.start()
            await operator.execute("LOCK pg_class IN ACCESS EXCLUSIVE MODE")
        elif len(looks) == 3:
            await holding.rollback()
            await process.apply_migrations(parts)
        elif len(looks) == 4:
            database = await operator.fetchval("SELECT current_database()")
            await operator.execute(
                f"ALTER DATABASE {database} SET default_transaction_read_only = on"
            )
            await parts.postgres._pool.expire_connections()
        elif len(looks) == 5:
            raise asyncio.CancelledError

    try:
        async with asyncio.timeout(30):
            with pytest.raises(asyncio.CancelledError):
                await process.watch_postgres(parts, pause=pause)
    finally:
        await parts.close()
        await operator.close()
    assert looks == [60.0] * 5
    lines = map(json.loads, stream.getvalue().splitlines())
    assert [(line["event"], line.get("cause")) for line in lines] == [
        ("not_migrated", None),
        ("not_migrated", None),
        ("postgres_failed", "no answer in time"),
        ("migrated", None),
        ("postgres_failed", "it takes no writes"),
    ]


async def test_several_may_migrate_at_once(serve: Start, fresh_database: str) -> None:
    several = [serve("--migrate", database_url=fresh_database) for _ in range(3)]
    assert [each.begun().ready()["http"] for each in several] == [200, 200, 200]
    connection = await asyncpg.connect(fresh_database)
    try:
        versions = await connection.fetch("SELECT version FROM schema_migrations ORDER BY version")
    finally:
        await connection.close()
    numbers = [row["version"] for row in versions]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


def test_an_unreachable_postgres_is_told(serve: Start) -> None:
    started = serve(database_url="postgresql://broker:zq9w@127.0.0.1:1/x").begun()
    until(lambda: "postgres_failed" in started.events, "it says so")
    (said,) = [line for line in started.log if line["event"] == "postgres_failed"]
    assert (said["level"], said["cause"]) == ("warning", "connection refused")
    assert "zq9w" not in "".join(started.lines)


def test_migrating_without_a_database_is_one_sentence(serve: Start, tmp_path: Path) -> None:
    started = serve("--migrate", database_url=f"postgresql://broker@/postgres?host={tmp_path}")
    assert started.end() == 1
    (sentence,) = started.lines
    assert re.fullmatch(
        r"broker: Postgres can't be reached \(\w+\); check BROKER_DATABASE_URL\.\n", sentence
    )


def test_is_ready_when_the_stores_are(serve: Start, valkey: Valkey, tmp_path: Path) -> None:
    """Starts without Redis, sees it come, go and come back."""
    started = serve(redis_url=f"unix://{valkey.socket}").begun()
    for _ in range(2):
        assert started.ready()["missing"] == ["redis"]
        valkey.start()
        until(lambda: started.ready()["http"] == 200, "ready with Redis")
        valkey.stop()
        until(lambda: started.ready()["http"] == 503, "not ready without Redis")
    assert get(started.port, "/health/live") == 200
    both = serve(
        redis_url=f"unix://{valkey.socket}",
        database_url=f"postgresql://broker@/postgres?host={tmp_path}",
        metrics="public",
    ).begun()
    assert both.ready()["missing"] == ["postgres", "redis"]
    assert both.scraped_readiness() == {"postgres": 0, "redis": 0}


# -- ports -----------------------------------------------------------------------------------------


async def test_a_management_port_takes_the_keyed_routes_away(serve: Start) -> None:
    management = free_port()
    started = serve("--management-port", str(management)).begun()
    public, keyed = started.port, management
    app = "/v1/apps/" + "a" * 24
    expected = {
        "/metrics": (404, 200),
        "/health/ready": (200, 200),
        "/sdk/passkey.js": (200, 404),
        f"{app}/users": (404, 401),
        app: (404, 401),
    }
    assert {path: (get(public, path), get(keyed, path)) for path in expected} == expected


@pytest.mark.parametrize(
    ("management", "metrics", "told"),
    [(False, "", "nowhere"), (False, "public", "public"), (True, "", "management")],
)
def test_the_start_tells_where_metrics_are(
    serve: Start, management: bool, metrics: str, told: str
) -> None:
    port = str(free_port()) if management else ""
    started = serve(management_port=port, metrics=metrics).begun()
    (line,) = [line for line in started.log if line["event"] == "listening"]
    assert line["metrics"] == told
    assert get(started.port, "/metrics") == (200 if told == "public" else 404)


# -- caps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hard", "warned"), [(512, [(512, 708)]), (4096, [])])
def test_a_low_limit_of_open_files_is_raised(
    stores: EmbeddedStores, hard: int, warned: list[tuple[int, int]]
) -> None:
    """708: two ports of 250 + 64, 16 for Postgres, 64 others. Else a warning."""
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
    caps = {"BROKER_MAX_CONNECTIONS": "250", "BROKER_MANAGEMENT_PORT": str(free_port())}
    script = f'ulimit -Sn 128 && ulimit -Hn {hard} && exec "$0" serve'
    started = Serve(urls | caps, command=("bash", "-c", script, str(BROKER))).begun()
    try:
        allowed, _ = resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE)
        assert allowed == min(hard, 708)
        lines = [line for line in started.log if line["event"] == "few_descriptors"]
        assert [(line["allowed"], line["needed"]) for line in lines] == warned
    finally:
        started.tell(signal.SIGTERM)
        assert started.end() == 0


# -- half-closed connections -----------------------------------------------------------------------


@pytest.mark.parametrize("expect", ["", "Expect: \r\n"])
def test_a_peer_that_half_closes_gets_its_answers(serve: Start, expect: str) -> None:
    """On uvloop."""
    started = serve().begun()
    asked = f"GET /health/live HTTP/1.1\r\nHost: localhost\r\n{expect}\r\n".encode()
    for times in (1, 3, 40):
        with socket.create_connection(("127.0.0.1", started.port), timeout=10) as opened:
            opened.sendall(asked * times)
            opened.shutdown(socket.SHUT_WR)
            assert opened.makefile("rb").read().count(b"HTTP/1.1 200 OK\r\n") == times
    for part in (asked[:9], b"POST" + asked[3:-2] + b"Content-Length: 9\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", started.port), timeout=10) as opened:
            opened.sendall(part)
            opened.shutdown(socket.SHUT_WR)
            assert b" 200 " not in opened.makefile("rb").read()


# -- SIGHUP ----------------------------------------------------------------------------------------


def test_a_hangup_reads_secrets_again(serve: Start, tmp_path: Path) -> None:
    place = tmp_path / "key"
    place.write_text(SECRET_KEY)
    started = serve(secret_key="", secret_key_file=str(place)).begun()
    place.write_text(f"{SECRET_KEY[::-1]},{SECRET_KEY}")

    def reloads() -> list[list[str]]:
        return [line["changed"] for line in started.log if line["event"] == "settings_reloaded"]

    started.tell(signal.SIGHUP)
    until(lambda: reloads() != [], "it says so")
    started.tell(signal.SIGHUP)
    until(lambda: len(reloads()) > 1, "it says so")
    assert reloads() == [["BROKER_SECRET_KEY"], []]
    started.tell(signal.SIGTERM)
    assert started.end() == 0


def test_a_hangup_of_its_terminal_ends_it(stores: EmbeddedStores) -> None:
    ours, terminal = pty.openpty()
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored
    started = Serve(urls, stdin=terminal).begun()
    signal.signal(signal.SIGHUP, inherited)
    started.tell(signal.SIGHUP)
    assert started.end() == -signal.SIGHUP
    os.close(terminal)
    os.close(ours)


# -- the end ---------------------------------------------------------------------------------------


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=30).close()
    except ConnectionRefusedError:
        return True
    return False


def in_flight(port: int, app: dict[str, str]) -> socket.socket:
    """A request whose body is half sent, so that its handler runs and waits; `finish` sends the
    rest.
    """
    opened = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = f"POST /v1/apps/{app['app_id']}/transactions/register HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Authorization: Bearer {app['api_key']}\r\nExpect: 100-continue\r\n"
    opened.sendall(head.encode() + f"Content-Length: {len(BODY)}\r\n\r\n".encode())
    assert opened.recv(100).startswith(b"HTTP/1.1 100 ")
    opened.sendall(BODY[:9])
    return opened


def finish(opened: socket.socket) -> bytes:
    """Send the rest of the body and return the status line."""
    opened.sendall(BODY[9:])
    return opened.makefile("rb").readline()


@pytest.fixture
def app(stores: EmbeddedStores) -> dict[str, str]:
    """An app in the shared stores: `app_id`, `api_key`."""
    done = subprocess.run(
        [
            str(BROKER),
            "app",
            "create",
            "--name",
            "A",
            "--rp-id",
            RP_ID,
            "--origin",
            ORIGIN,
            "--json",
        ],
        env=CLEAN | {"BROKER_DATABASE_URL": stores.database_url},
        capture_output=True,
        text=True,
        check=True,
    )
    told: dict[str, str] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_finishes_what_runs_and_refuses_the_new(
    serve: Start, app: dict[str, str], number: signal.Signals
) -> None:
    started = serve().begun()
    idle = http.client.HTTPConnection("127.0.0.1", started.port, timeout=30)
    idle.request("GET", "/health/live")
    assert idle.getresponse().read()
    with in_flight(started.port, app) as running:
        started.tell(number)
        until(lambda: refuses_connections(started.port), "new connections are refused")
        assert idle.sock.recv(1) == b"", "an idle connection ends"
        assert started.process.poll() is None
        assert finish(running) == b"HTTP/1.1 201 Created\r\n"
        assert started.end() == 0
    assert started.events == ["listening", "draining", "stopped"]
    assert started.process.stdout is not None
    assert started.process.stdout.read() == ""


def test_serves_on_without_being_ready_before_it_drains(serve: Start, app: dict[str, str]) -> None:
    """Until a second signal, here."""
    started = serve(lame_duck_seconds="60", metrics="public").begun()
    started.tell(signal.SIGTERM)
    until(lambda: started.ready()["http"] == 503, "readiness ends")
    assert started.ready()["missing"] == ["draining"]
    assert started.scraped_readiness() == {"draining": 0}
    assert get(started.port, "/health/live") == 200
    with in_flight(started.port, app) as running:
        assert finish(running) == b"HTTP/1.1 201 Created\r\n"
    assert started.events == ["listening", "lame_duck"]
    started.tell(signal.SIGTERM)
    assert started.end() == -signal.SIGTERM


def test_a_terminals_signal_ends_no_readiness(serve: Start) -> None:
    started = serve(lame_duck_seconds="60").begun()
    started.tell(signal.SIGINT)
    assert started.end() == 0
    assert started.events == ["listening", "draining", "stopped"]


def test_drains_when_it_was_not_ready_for_long_enough(serve: Start) -> None:
    started = serve(lame_duck_seconds="0.01").begun()
    started.tell(signal.SIGTERM)
    assert started.end() == 0
    assert started.events == ["listening", "lame_duck", "draining", "stopped"]


def test_draining_has_a_limit(serve: Start, app: dict[str, str]) -> None:
    started = serve(drain_seconds="0.2").begun()
    with in_flight(started.port, app) as running:
        started.tell(signal.SIGTERM)
        assert started.end() == 0
        assert running.makefile("rb").readline() == b""
    assert started.events == ["listening", "draining", "stopped"]


def test_both_ports_drain_together(serve: Start, app: dict[str, str]) -> None:
    """While a request runs on the management port, the other one refuses new ones too."""
    management = free_port()
    started = serve("--management-port", str(management)).begun()
    with in_flight(management, app) as running:
        started.tell(signal.SIGTERM)
        until(lambda: refuses_connections(management), "the management port refuses")
        until(lambda: refuses_connections(started.port), "the public port refuses")
        assert started.process.poll() is None
        assert finish(running) == b"HTTP/1.1 201 Created\r\n"
        assert started.end() == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_second_signal_ends_at_once(
    serve: Start, app: dict[str, str], number: signal.Signals, status: int
) -> None:
    started = serve(drain_seconds="60").begun()
    with in_flight(started.port, app):
        started.tell(number)
        until(lambda: "draining" in started.events, "it drains")
        started.tell(number)
        assert started.end() == status
    assert "stopped" not in started.events
    assert not any("Traceback" in line for line in started.lines)


# -- the log ---------------------------------------------------------------------------------------


def test_every_line_is_json_and_holds_nothing_of_the_request(serve: Start) -> None:
    started = serve(log_level="debug").begun()
    secret = "pbk_" + "zq9w" * 11
    for request in (
        f"GET /v1/apps/{'a' * 24}/users?{secret} HTTP/1.1\r\nHost: h\r\n"
        f"Authorization: Bearer {secret}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {secret}\x01\r\n\r\n",
        f"{secret} / HTTP/1.1\r\nHost: h\r\n\r\n",
        f"POST /{secret} HTTP/1.1\r\nHost: {secret}\r\nTransfer-Encoding: {secret}\r\n\r\n",
        f"{secret}\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", started.port), timeout=30) as connection:
            connection.sendall(request.encode())
            assert connection.recv(100).startswith(b"HTTP/1.")
    started.tell(signal.SIGTERM)
    assert started.end() == 0
    assert len(started.log) >= 3 + 5
    assert "zq9w" not in "".join(started.lines)
    assert {"at", "level", "event"} <= set.intersection(*(set(line) for line in started.log))


# -- Redis Cluster ---------------------------------------------------------------------------------


def doctor(stores: EmbeddedStores, redis_url: str) -> list[dict[str, Any]]:
    """What `broker doctor` finds; all must be well, but for apps that other tests made."""
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": redis_url}
    urls["BROKER_SECRET_KEY"] = SECRET_KEY  # other tests' signing keys are sealed under it
    done = subprocess.run(
        [str(BROKER), "doctor", "--json"], env=CLEAN | urls, capture_output=True, text=True
    )
    assert done.stderr == "", done
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert all(f["ok"] for f in found if f["check"] != "app"), done
    return found


async def test_works_on_a_cluster(
    serve: Start,
    stores: EmbeddedStores,
    cluster: Cluster,
    app: dict[str, str],
    device: Authenticator,
) -> None:
    """As an operator runs it: doctor, readiness, a registration, a login, a redemption."""
    url = cluster.url
    assert {"check": "eviction", "ok": True, "found": "noeviction", "todo": ""} in doctor(
        stores, url
    )
    started = serve(redis_url=url).begun()
    assert started.ready() == {"http": 200, "status": "ready"}
    async with aiohttp.ClientSession() as session:
        wire = Wire(session, f"http://127.0.0.1:{started.port}", app["app_id"], app["api_key"])
        await wire.user("ann", device)
        nonce = await wire.authenticate(None, device)
        assert (await wire.redeem(nonce)).json["external_id"] == "ann"
        assert (await wire.redeem(nonce)).code == "invalid_nonce"
