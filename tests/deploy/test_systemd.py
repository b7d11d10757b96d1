"""`deploy/systemd/`: systemd accepts the unit and finds it hardened."""

from __future__ import annotations

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
