"""The client's own wheel: built without a network, installed without the server, typed, and able to
sign in.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from broker import __version__
from tests.conftest import Started
from tests.support.authenticator import Authenticator
from tests.support.environments import install, new_environment
from tests.support.signals import counted
from tests.support.wire import Wire

ROOT = Path(__file__).resolve().parents[2]
SDK = ROOT / "broker" / "sdk"
HTTPX = (
    "anyio",
    "certifi",
    "h11",
    "httpcore",
    "httpx",
    "idna",
    "typing-extensions",
)  # and what it needs

# A backend: prints what it gives to the page, reads the nonce that the page brings.
PROGRAM = """
import asyncio
import sys
from collections.abc import AsyncIterator

import httpx
from passkey_broker import AsyncBrokerClient, BrokerClient, InvalidNonce, OwnedPasskey, Receipt

url, app_id, api_key = sys.argv[1:]


def nonce_for(transaction: str) -> str:
    print(transaction, flush=True)
    return input()


def sign_up(external_id: str) -> Receipt:
    http = httpx.Client(trust_env=False)
    with BrokerClient(url, app_id, api_key, http=http, read_retries=2) as broker:
        transaction = broker.create_register_transaction(
            external_id, "Ada", user_verification="required"
        )
        nonce = nonce_for(transaction)
        receipt = broker.verify_nonce(
            nonce, purpose="register", transaction_id=transaction, external_id=external_id
        )
        try:
            broker.verify_nonce(nonce)
        except InvalidNonce as refused:
            assert refused.code == "invalid_nonce"
        else:
            raise AssertionError("redeemed twice")
        return receipt


async def sign_in(external_id: str) -> Receipt:
    async with AsyncBrokerClient(url, app_id, api_key) as broker:
        transaction = await broker.create_authenticate_transaction(external_id)
        nonce = await asyncio.to_thread(nonce_for, transaction)
        receipt = await broker.verify_nonce(
            nonce, purpose="authenticate", transaction_id=transaction, external_id=external_id
        )
        listed: AsyncIterator[OwnedPasskey] = broker.iter_passkeys(external_id)
        assert [passkey.id async for passkey in listed] == [receipt.passkey_id]
        return receipt


print(sign_up("ada").external_id, flush=True)
print(asyncio.run(sign_in("ada")).external_id, flush=True)
"""


def run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which therefore is whole, by the build backend that is
    installed here.
    """
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, SDK, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel, httpx as the lock file has it, and nothing else."""
    folder = tmp_path_factory.mktemp("client")
    python = new_environment(folder / "environment")
    lock = (ROOT / "deploy" / "requirements.lock").read_text()
    pins = {
        found[1]: found[0] for found in re.finditer(r"^([a-z0-9-]+)==.*\n(?:    .*\n)*", lock, re.M)
    }
    (folder / "httpx.lock").write_text("".join(pins[name] for name in HTTPX))
    install(python, "--require-hashes", "-r", folder / "httpx.lock")
    install(python, "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, "check", cwd=folder)
    (folder / "program.py").write_text(PROGRAM)
    return python


def test_it_holds_the_client_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    source = SDK / "passkey_broker"
    ours = {
        path.relative_to(SDK).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    folder = f"passkey_broker_client-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(folder)} == ours
    assert {"passkey_broker/py.typed", "passkey_broker/_sync/__init__.py"} <= ours
    assert f"{folder}/licenses/LICENSE" in names
    assert (SDK / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) == ["httpx<1,>=0.28"]
    assert re.search(
        rf"^Name: passkey-broker-client\nVersion: {re.escape(__version__)}$", metadata, re.M
    )


def test_a_program_that_uses_it_is_typed(python: Path) -> None:
    """mypy sees the types of the installed package, and finds the fault in a program that has
    one.
    """
    folder = python.parents[2]
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--python-executable",
        str(python),
    ]
    run(*mypy, "program.py", cwd=folder)
    (folder / "wrong.py").write_text(
        PROGRAM.replace('purpose="register"', 'purpose="registration"')
    )
    done = subprocess.run(
        [*mypy, "wrong.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'Argument "purpose"' in done.stdout


async def test_installed_without_the_server_it_signs_in(
    python: Path, broker: Started, wire: Wire, device: Authenticator
) -> None:
    arguments = ("-I", str(python.parents[2] / "program.py"), wire.url, wire.app_id, wire.key)
    backend = await asyncio.create_subprocess_exec(
        python,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert backend.stdin is not None
    assert backend.stdout is not None
    said: list[str] = []
    with (
        counted(broker, "broker_redemptions_total", times=2, result="ok"),
        counted(broker, "broker_redemptions_total", times=1, result="replayed"),
    ):
        for ceremony in (wire.register, wire.authenticate):
            transaction = (await backend.stdout.readline()).decode().strip()
            backend.stdin.write((await ceremony(transaction, device)).encode() + b"\n")
            said.append((await backend.stdout.readline()).decode().strip())
        rest, _ = await backend.communicate()
    assert (said, backend.returncode) == (["ada", "ada"], 0), rest
