"""The wheel that people install: built without a network, complete, and able to run `broker dev` in
an empty environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.environments import install, new_environment
from tests.support.processes import free_port, get, until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workshop() -> Iterator[Path]:
    """A directory that the servers' user can enter, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp(prefix="broker-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def wheel(workshop: Path) -> Path:
    """The project's wheel, made from a copy of the sources by the build backend that is installed
    here.
    """
    source = workshop / "source"
    ignored = shutil.ignore_patterns("__pycache__", "node_modules")
    for name in ("broker", "sql"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(workshop),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = workshop.glob("*.whl")
    return built


def test_it_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "broker").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    migrations = {f"broker/sql/{path.name}" for path in (ROOT / "sql").glob("*.sql")}
    assert migrations, "sql/ has no migrations"
    for needed in ("broker/sdk/passkey.js", "broker/sdk/passkey.d.ts", "broker/cli/__init__.py"):
        assert needed in names
    assert any(name.startswith("broker/demo/") and name.endswith(".html") for name in names)
    assert ours | migrations <= names
    assert {name.split("/")[0] for name in names} == {"broker", "passkey_broker-0.1.0.dist-info"}
    assert {name for name in names - ours - migrations if name.startswith("broker/")} == set()


def test_installed_into_an_empty_environment_it_runs_broker_dev(
    wheel: Path, workshop: Path
) -> None:
    python = new_environment(workshop / "environment")
    install(python, "--require-hashes", "-r", ROOT / "deploy" / "requirements.lock")
    install(python, "--no-deps", "--no-index", wheel)
    port = free_port()
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BROKER_", "COV", "PYTHON"))
    }
    broker = subprocess.Popen(
        [python.with_name("broker"), "dev", "--no-open", "--data", workshop / "data"],
        cwd=workshop,
        env={**clean, "PORT": str(port), "BROKER_METRICS": "public"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(
            lambda: get(port, "/health/ready") == 200 or broker.poll() is not None,
            "the broker is ready",
        )
        statuses = {
            path: get(port, path, "localhost")
            for path in ("/health/ready", "/sdk/passkey.js", "/demo/", "/metrics")
        }
    finally:
        broker.send_signal(signal.SIGTERM)
        output, _ = broker.communicate(timeout=30)
    assert set(statuses.values()) == {200}, (statuses, output)
    assert broker.returncode == 0, output
    assert f"http://localhost:{port}/demo/" in output
