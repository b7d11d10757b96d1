"""`deploy/systemd/`: systemd accepts the unit and finds it hardened."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from broker.cli import parser
from broker.settings import Settings
from tests.support.load_balancers import DEPLOY
from tests.support.parts import program

UNIT = DEPLOY / "systemd" / "passkey-broker@.service"


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    """The unit's first instance, with the broker of this environment."""
    broker = Path(sys.executable).parent
    text = UNIT.read_text().replace("/opt/passkey-broker/bin", str(broker))
    made = tmp_path / "passkey-broker@1.service"
    made.write_text(text)
    return made


def test_systemd_accepts_it(instance: Path) -> None:
    argv = [program("systemd-analyze"), "verify", "--man=no", str(instance)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_finds_it_hardened(instance: Path) -> None:
    """An exposure of 1.5 of 10 at most."""
    argv = [program("systemd-analyze"), "security", "--no-pager", "--offline=true"]
    argv += ["--threshold=15", str(instance)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_its_command_is_one_of_the_broker() -> None:
    found = re.search(r"^ExecStart=\S+/broker (.*)$", UNIT.read_text(), re.M)
    assert found
    options = parser().parse_args(found[1].replace("%i", "1").split())
    assert (options.port, options.management_port) == (8001, 9001)


def test_it_stops_later_than_the_broker_ends() -> None:
    settings = Settings()
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.M)
    assert found
    assert int(found[1]) > settings.lame_duck_seconds + settings.drain_seconds + 1


def test_the_loop_in_its_head_waits_until_an_instance_is_ready(tmp_path: Path) -> None:
    """The shell runs it with commands that write what they are called with. Each instance is ready
    at the second question.
    """
    found = re.search(r"^(#   for n in .*?^#   done$)", UNIT.read_text(), re.M | re.S)
    assert found
    loop = re.sub(r"^#   ", "", found[1], flags=re.M)
    called = tmp_path / "called"
    scripts = {
        "systemctl": f'echo "$@" >> {called}',
        "curl": f'echo "$3" >> {called}; [ $(grep -c "$3" {called}) = 2 ]',
        "sleep": "",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", "-ec", loop], env=environment, check=True, timeout=10)
    expected = [
        line
        for n in (1, 2)
        for line in (f"restart passkey-broker@{n}", *[f"localhost:900{n}/health/ready"] * 2)
    ]
    assert called.read_text().splitlines() == expected
