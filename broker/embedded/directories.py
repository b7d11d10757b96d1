"""Directories, accounts and files of the embedded stores: ownership, locks and safe writes.

Three directories matter. Each is 0700 and belongs to the account that the servers run as.

- The *data directory* (`.broker/`) is the one that the caller names. Its `lock` is held with
  flock(2) while the broker runs, so two brokers never share it. The kernel drops the lock of a
  killed broker. The lock also marks a data directory: a directory with other content and no lock is
  never touched.
- The *servers' directory* holds the servers' files. It is the data directory itself, except as root
  below a directory that the servers' account can't enter (a 0700 home, for instance). Then it is a
  folder in the system's state directory, which the file `where` in the data directory names. The
  permissions of foreign directories never change.
- The *socket directory* is `run` in the servers' directory, except if the path of a socket would
  exceed the kernel's limit (`sun_path`: 108 bytes with the NUL on Linux, 104 on macOS and the
  BSDs). Then it is a short directory elsewhere. Its name is derived from the servers' directory, so
  that URLs stay the same between runs.

**As root.** The servers' account, which other daemons may share, owns directories in which root
works. A process of that account can replace anything there at any time. Therefore:

- No link is followed below the data directory. Files are opened with O_NOFOLLOW. A directory is
  opened once (`entered`), and all work in it goes through that descriptor.
- Files are written anew and renamed. A file that is opened for writing has a single name.
- `where` and the record of processes count only if root wrote them, and `where` only if it names a
  folder that root alone could have made.
- Copies of binaries, which root writes path by path, lie beside the servers' directories in the
  state directory, where only root can write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.errors import Fault

SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
LONGEST_SOCKET = ".s.PGSQL.5432.lock"
STATE = Path("/var/lib/passkey-broker")

_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~+-]+")
_FOLDER_NAME = re.compile(r"[0-9a-f]{16}")


class EmbeddedFault(Fault):
    """The embedded stores can't run. The message is one sentence that says what to do."""


class NotOurs(EmbeddedFault):
    """A file that the broker reads was written by another program or account."""


@dataclass(frozen=True, slots=True)
class Account:
    """The account that the servers run as. `switched`: it is not the broker's own account."""

    name: str
    uid: int
    gid: int
    switched: bool

    @property
    def identity(self) -> dict[str, Any]:
        """The arguments of `subprocess.Popen` that run a process as this account."""
        if not self.switched:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a short command as this account in `/`, within 10 s, in the servers' environment.

        Raises OSError if it can't be executed, subprocess.TimeoutExpired.
        """
        return subprocess.run(  # noqa: S603  the caller's argv, no shell
            argv,
            cwd="/",
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            **self.identity,
        )

    def can_enter(self, directory: Path) -> bool:
        """True if this account may look up names in the directory. The kernel decides."""
        if not self.switched:
            return os.access(directory, os.X_OK)
        try:
            return self.run("/bin/sh", "-c", 'test -x "$1"', "sh", str(directory)).returncode == 0
        except (OSError, subprocess.SubprocessError) as fault:
            raise EmbeddedFault(
                f"The broker runs as root and can't start servers as the user {self.name}: {fault}."
            ) from fault


def server_account() -> Account:
    """The broker's own account. For root it is `nobody`, because Postgres refuses to run as
    root.
    """
    uid = os.geteuid()
    switched = uid == 0
    try:
        entry = pwd.getpwnam("nobody") if switched else pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedFault(
            "The broker runs as root and there is no user `nobody` to run PostgreSQL and Valkey "
            "as; run the broker as a normal user."
            if switched
            else f"The user id {uid} has no entry in the password database, which PostgreSQL "
            "needs; run as an existing user, or set BROKER_DATABASE_URL and BROKER_REDIS_URL."
        ) from None
    return Account(
        entry.pw_name, entry.pw_uid, entry.pw_gid if switched else os.getegid(), switched
    )


def server_environment() -> dict[str, str]:
    """The servers' environment: UTC and C, no secret of ours, and no PG* variable, which would
    redirect them.
    """
    kept = {
        name: os.environ[name]
        for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        if name in os.environ
    }
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", **kept}


def user_name(uid: int) -> str:
    """The name of a user id; without a name, the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"number {uid}"


@dataclass(frozen=True, slots=True)
class Claim:
    """The lock of a data directory, held until `release`."""

    path: Path
    _lock: int

    def release(self) -> None:
        """Release the lock, once. The lock file stays, because two brokers could lock different
        files if it were unlinked.
        """
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
        os.close(self._lock)


def is_new(data: Path) -> bool:
    """True if there is no data directory of a broker yet. False also for a path that can't be read,
    which `claim` reports.
    """
    try:
        return not os.path.lexists(data.expanduser() / "lock")
    except (OSError, RuntimeError):
        return False


@contextlib.contextmanager
def _faults(consequence: str) -> Iterator[None]:
    """Report a fault of the file system as an EmbeddedFault of this consequence."""
    try:
        yield
    except (OSError, RuntimeError) as fault:
        reason = (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
        raise EmbeddedFault(f"{consequence}: {reason}.") from None


def claim(data: Path) -> Claim:
    """Make the data directory if it is missing, and hold its lock.

    Raises EmbeddedFault: the directory can't be made or read, is a file, belongs to another user,
    holds foreign files, or another broker runs on it.
    """
    with _faults(f"The data directory {data} can't be made"):
        path = data.expanduser().resolve()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise EmbeddedFault(
                f"The data directory {data} is a file; remove it or name another data directory."
            ) from None
        owner = path.stat().st_uid
    owners = {0, server_account().uid} if os.geteuid() == 0 else {os.geteuid()}
    if owner not in owners:
        raise EmbeddedFault(
            f"The data directory {path} belongs to the user {user_name(owner)}; "
            "run the broker as that user or name another data directory."
        )
    with _faults(f"The data directory {path} can't be read"):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with _faults(f"The data directory {path} can't be used"):
            names = os.listdir(directory)
            if names and "lock" not in names:
                raise EmbeddedFault(
                    f"The directory {path} is not empty and was not made by the broker; "
                    "name another data directory."
                )
            lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=directory)
            try:
                require_sole_file(lock, path / "lock")
                _hold(lock, path)
                os.fchmod(directory, 0o700)
            except BaseException:
                os.close(lock)
                raise
    finally:
        os.close(directory)
    return Claim(path, lock)


def _hold(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        process = f" (process {owner})" if owner.isdigit() else ""
        raise EmbeddedFault(
            f"Another broker{process} runs on the data directory {path}; "
            "stop it or name another data directory."
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def own(directory: Path, account: Account) -> None:
    """Make the directory if it is missing; give it to the account, with mode 0700.

    Raises EmbeddedFault for a file, a link, or a foreign directory; OSError.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    with entered(directory, account) as descriptor:
        if os.fstat(descriptor).st_uid != account.uid:
            os.fchown(descriptor, account.uid, account.gid)
        os.fchmod(descriptor, 0o700)


@contextlib.contextmanager
def entered(directory: Path, account: Account) -> Iterator[int]:
    """A descriptor of a directory that belongs to the account or to the broker. Work through the
    descriptor stays in that directory, even if another one takes its name.

    Raises EmbeddedFault for a file, a link, or a foreign directory; OSError if it is missing or
    can't be read.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as fault:
        if fault.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        kind = "a symbolic link" if directory.is_symlink() else "not a directory"
        raise EmbeddedFault(
            f"{directory} is {kind}, so the embedded stores can't use it; remove it."
        ) from None
    try:
        owner = os.fstat(descriptor).st_uid
        if owner not in (account.uid, os.geteuid()):
            raise EmbeddedFault(
                f"{directory} belongs to the user {user_name(owner)}, not to {account.name}, whom "
                "the servers run as; give it back or name another data directory."
            )
        yield descriptor
    finally:
        os.close(descriptor)


def require_sole_file(descriptor: int, path: Path) -> None:
    """Raise EmbeddedFault unless it is a regular file with a single name: a write must not change
    another file.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise EmbeddedFault(
            f"{path} is not a file with a single name, so the embedded stores can't use it; "
            "remove it."
        )


def read_ours(path: Path) -> str:
    """The text of a small file that the broker wrote.

    Raises FileNotFoundError, EmbeddedFault for a link or a file that can't be read, NotOurs for a
    file of another program or account.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as fault:
        raise EmbeddedFault(
            f"{path} is a symbolic link, so the embedded stores can't use it; remove it."
            if fault.errno == errno.ELOOP
            else f"{path} can't be read: {fault.strerror}."
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise NotOurs(f"{path} was not written by the broker; remove it or restore it.")
        return os.pread(descriptor, 65536, 0).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


def recorded_directory(data: Path) -> Path | None:
    """The servers' directory that `where` names. None: the data directory has no `where`.

    Raises EmbeddedFault if `where` is not ours or names a foreign folder: as root the broker is
    about to change its owner.
    """
    try:
        servers = Path(read_ours(data / "where").strip())
    except FileNotFoundError:
        return None
    if servers.parent != STATE or not _FOLDER_NAME.fullmatch(servers.name):
        raise EmbeddedFault(
            f"{data / 'where'} names {servers}, which is not a folder of the broker's; "
            f"remove the file {data / 'where'} or restore it."
        )
    return servers


def make_directory_elsewhere(data: Path, why: str) -> tuple[Path, tuple[str, ...]]:
    """A servers' directory in the system's state directory, recorded in `where`, and the notes that
    say so.

    Its name is derived from the data directory's path. A folder of that name without a `where` is
    left of a deleted data directory. It is set aside: a person who deletes `.broker/` wants to
    begin anew.
    """
    servers = _state() / _name_of(data)
    notes = [f"The stores' data is in {servers}: {why}."]
    if servers.exists():
        aside = servers.with_suffix(".old")
        shutil.rmtree(aside, ignore_errors=True)
        servers.rename(aside)
        notes.append(f"The data of an earlier {data} was set aside in {aside}.")
    write(data / "where", f"{servers}\n")
    return servers, tuple(notes)


def binaries_directory(servers: Path) -> Path:
    """The directory for copies of binaries that the servers' account can't execute in place. Root
    only.

    It lies beside the servers' directories, not in one, so that only root can change it.
    """
    name = servers.name if servers.parent == STATE else _name_of(servers)
    home = _state() / f"{name}.binaries"
    home.mkdir(exist_ok=True)
    home.chmod(0o755)
    return home


def _state() -> Path:
    STATE.mkdir(mode=0o711, exist_ok=True)
    status = STATE.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise EmbeddedFault(
            f"{STATE} is not a directory that only root can write to; correct that and start again."
        )
    return STATE


def _name_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def socket_directory(servers: Path, account: Account) -> Path:
    """The directory for the servers' sockets: `run` in the servers' directory, or a short directory
    elsewhere.

    Elsewhere if the path is too long, or has characters that a connection URL or Postgres's list of
    directories would need quoted.
    """
    inside = servers / "run"
    if _fits(inside):
        own(inside, account)
        return inside
    if account.switched:
        bases = ["/run", "/var/run"]
    else:
        bases = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]  # noqa: S108  `own` judges owner and links
    for base in bases:
        short = Path(base) / f"passkey-broker-{_name_of(servers)}"
        if short.is_absolute() and _fits(short):
            with contextlib.suppress(EmbeddedFault, OSError):
                own(short, account)
                return short
    raise EmbeddedFault(
        f"The path {inside} is too long for a Unix socket and no short directory could be made in "
        f"{', '.join(filter(None, bases))}; name a data directory with a shorter path."
    )


def _fits(directory: Path) -> bool:
    longest = os.fsencode(directory / LONGEST_SOCKET)
    return len(longest) <= SOCKET_PATH_BYTES and _PLAIN_PATH.fullmatch(str(directory)) is not None


def write(
    path: Path | str, text: str, account: Account | None = None, *, directory: int | None = None
) -> None:
    """Replace a file atomically, mode 0600, owned by the account. With `directory`, a descriptor,
    the path is a name in it.

    Raises OSError.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(
        new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory
    )
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if account is not None and account.switched:
                os.fchown(descriptor, account.uid, account.gid)
            file.write(text)
        os.replace(new, path, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=directory)
        raise
