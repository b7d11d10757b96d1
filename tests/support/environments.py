"""Python environments of a test's own."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path


def new_environment(folder: Path) -> Path:
    """Make an empty virtual environment. Return the path of its Python."""
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def install(python: Path, *arguments: str | Path) -> None:
    """Install packages as `make` does: with uv, whose cache has those of the lock files, and with
    pip where uv fails.
    """
    uv = (Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--python", python)
    if subprocess.run([*uv, *arguments], capture_output=True, check=False).returncode != 0:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
        done = subprocess.run(
            [*pip, "--python", python, "install", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
