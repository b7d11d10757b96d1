"""What `broker dev` does for a person at a terminal, and with HOST, PORT and the settings that it
shares with `serve`.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.processes import free_port, get, until

BROKER = Path(sys.executable).with_name("broker")


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that the servers' unprivileged user can enter."""
    made = Path(tempfile.mkdtemp(prefix="broker-test-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def environment(**changes: str) -> dict[str, str]:
    kept = ("BROKER_", "DISPLAY", "WAYLAND", "PORT", "HOST")
    return {
        name: value for name, value in os.environ.items() if not name.startswith(kept)
    } | changes


@pytest.mark.parametrize(
    ("arguments", "display", "opens"),
    [((), ":9", True), (("--no-open",), ":9", False), ((), "", False)],
    ids=["terminal and display", "--no-open", "no display"],
)
def test_opens_the_browser_at_a_terminal_with_a_display(
    folder: Path, arguments: tuple[str, ...], display: str, opens: bool
) -> None:
    port, opened = free_port(), folder / "opened"
    browser = folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.new && mv {opened}.new {opened}\n')
    browser.chmod(0o755)
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [str(BROKER), "dev", "--port", str(port), *arguments],
        cwd=folder,
        env=environment(BROWSER=f"{browser} %s", DISPLAY=display),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    try:
        until(lambda: get(port, "/health/ready") == 200, "the broker is ready")
        shown = b""
        while b"Ctrl-C stops everything" not in shown:
            shown += os.read(terminal, 4096)
        if opens:
            until(opened.exists, "the browser is opened")
            assert opened.read_text() == f"http://localhost:{port}/demo/\n"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        os.close(terminal)
    assert opened.exists() is opens


def test_a_host_beside_loopback_answers_and_so_does_loopback(folder: Path) -> None:
    """Passkeys of localhost need a page there, whatever else is listened on."""
    port, management = free_port(), free_port()
    process = subprocess.Popen(
        [str(BROKER), "dev", "--no-open"],
        cwd=folder,
        env=environment(HOST="127.0.0.7", PORT=str(port), BROKER_MANAGEMENT_PORT=str(management)),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: get(port, "/health/ready") == 200, "loopback answers")
        assert get(port, "/health/ready", "127.0.0.7") == 200
        facts = json.loads((folder / ".broker/dev.json").read_text())
        assert facts["url"] == f"http://localhost:{port}"
        assert get(port, f"/v1/apps/{facts['app_id']}/users") == 404, (
            "keyed routes have a port of their own"
        )
        assert get(management, f"/v1/apps/{facts['app_id']}/users") == 401
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "given", "name"),
    [
        ((), {"PORT": "abc"}, "PORT"),
        ((), {"PORT": "99999"}, "PORT"),
        (("--port", "99999"), {}, "--port"),
    ],
)
def test_a_port_that_is_none_is_named_as_it_was_given(
    folder: Path, arguments: tuple[str, ...], given: dict[str, str], name: str
) -> None:
    done = subprocess.run(
        [str(BROKER), "dev", *arguments],
        cwd=folder,
        env=environment(**given),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"broker: {name} must be")
    assert len(done.stderr.splitlines()) == 1
    assert list(folder.iterdir()) == [], "nothing was started"


def test_a_strangers_dev_json_is_not_followed(folder: Path) -> None:
    """Whoever wrote it would choose where our commands, and the passwords they find, go."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        stored = folder / ".broker" / "dev.json"
        stored.parent.mkdir()
        url = f"postgresql://broker@127.0.0.1:{trap.getsockname()[1]}/x"
        stored.write_text(json.dumps({"database_url": url, "redis_url": ""}))
        stored.chmod(0o644)
        command = [str(BROKER), "app", "list"]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (1, "broker: BROKER_DATABASE_URL is missing.\n")
        with pytest.raises(TimeoutError):
            trap.accept()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc(5), SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def test_a_first_start_says_what_it_does_with_times(folder: Path) -> None:
    """At a terminal, before the banner; the next start has nothing to tell."""
    step = r"  [A-Z][^\n]+… \d+\.\d s\n"
    for steps in (True, False):
        port = free_port()
        terminal, inside = pty.openpty()
        process = subprocess.Popen(
            [str(BROKER), "dev", "--port", str(port), "--no-open"],
            cwd=folder,
            env=environment(),
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
        )
        os.close(inside)
        shown = b""
        try:
            while b"Ctrl-C stops everything" not in shown:
                shown += os.read(terminal, 4096)
            until(partial(catches, process.pid, signal.SIGTERM), "it ends when told")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            os.close(terminal)
        told, _, _ = shown.decode().replace("\r\n", "\n").partition("\n  Demo ")
        assert re.fullmatch(f"(?:{step})*\n?", told), told
        names = re.findall(r"  ([^\n]+)… ", told)
        if steps:
            assert [
                name.split(" with ")[0].split(" PostgreSQL")[0]
                for name in names
                if "Copying" not in name
            ] == [
                "Making a database",
                "Starting",
                "Making the tables",
                "Making the demo's app",
                "Starting the broker and the demo",
            ]
        else:
            assert names == []


def test_a_step_that_fails_ends_its_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        terminal, inside = pty.openpty()
        process = subprocess.Popen(
            [str(BROKER), "dev", "--port", str(taken.getsockname()[1]), "--no-open"],
            cwd=folder,
            env=environment(),
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
        )
        os.close(inside)
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # nobody has it open any more
            pass
        assert process.wait(30) == 1
        os.close(terminal)
    lines = shown.decode().splitlines()
    assert re.fullmatch(r"  Starting the broker and the demo… \d+\.\d s, not finished", lines[-2])
    assert "is in use" in lines[-1]
