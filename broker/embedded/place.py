"""Where the embedded stores live, whom they run as, and who may enter.

Three directories matter, and each is 0700 and belongs to the account that the servers run as:

- the *data directory* (`.broker/`) is what the caller names. Its `lock` is held with flock(2) for
  as long as the broker runs, so two brokers never share it, and a broker that was killed leaves
  nothing to clean: the kernel drops the lock. The lock is also the mark of a data directory: a
  directory with other content and no lock is somebody else's and stays untouched.
- the *place* holds the servers' files. It is the data directory itself, except as root below a
  directory that the servers' account can't enter (a 0700 home, for instance). Then it is a folder
  under the system's state directory, and the file `where` in the data directory names it. No
  permission of a directory that isn't ours is ever changed.
- the *socket directory* is `run` in the place, except where the path of a socket would exceed what
  the kernel takes (`sun_path`: 108 bytes with the NUL on Linux, 104 on macOS and the BSDs). Then it
  is a short directory elsewhere, with a name derived from the place, so that URLs stay the same
  between runs.

As root the servers' account, which other daemons may share, owns directories in which root works,
and can put anything in place of anything there at any time. Therefore

- no link is followed below the data directory: files are opened with O_NOFOLLOW, directories are
  entered once (`entered`) and what happens in them happens through that descriptor;
- files are written anew and renamed, and what is opened to be written has no second name;
- `where` and the record of processes are believed only when root wrote them, and `where` only when
  it names a folder that root alone could have made;
- copies of binaries, which root writes path by path, are beside the places in the system's state
  directory, where only root can.
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

from broker.errors import Fault

SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
LONGEST_SOCKET = ".s.PGSQL.5432.lock"
STATE = Path("/var/lib/passkey-broker")

_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~+-]+")
_PLACE_NAME = re.compile(r"[0-9a-f]{16}")


class EmbeddedFault(Fault):
    """The embedded stores can't run. The message is one sentence that says what to do; the caller
    shows it and ends.
    """


class NotOurs(EmbeddedFault):
    """A file that the broker reads was not written by it."""


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the servers run as. `switched` is true when that is not the broker's own account."""

    name: str
    uid: int
    gid: int
    switched: bool

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a short command as this account in `/`, with a limit of 10 s and the servers'
        environment.

        Raises OSError where it can't be executed, subprocess.TimeoutExpired.
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
            user=self.uid if self.switched else None,
            group=self.gid if self.switched else None,
            extra_groups=[] if self.switched else None,
        )

    def can_enter(self, directory: Path) -> bool:
        """Whether this account may look up names in the directory, by the kernel's own answer."""
        if not self.switched:
            return os.access(directory, os.X_OK)
        try:
            return self.run("/bin/sh", "-c", 'test -x "$1"', "sh", str(directory)).returncode == 0
        except (OSError, subprocess.SubprocessError) as fault:
            raise EmbeddedFault(
                f"The broker runs as root and can't start servers as the user {self.name}: {fault}."
            ) from fault


def server_account() -> Account:
    """The broker's own account, or `nobody` when the broker is root (Postgres refuses to run as
    root).
    """
    uid = os.geteuid()
    if uid != 0:
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            raise EmbeddedFault(
                f"The user id {uid} has no entry in the password database, which PostgreSQL needs; "
                "run as an existing user, or set BROKER_DATABASE_URL and BROKER_REDIS_URL."
            ) from None
        return Account(entry.pw_name, uid, os.getegid(), switched=False)
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedFault(
            "The broker runs as root and there is no user `nobody` to run PostgreSQL and Valkey as; run the broker as a normal user."
        ) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, switched=True)


def server_environment() -> dict[str, str]:
    """What servers see of our environment: no secret of ours, no PG* variable that would redirect
    them, UTC and C.
    """
    kept = {
        name: os.environ[name]
        for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        if name in os.environ
    }
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", **kept}


def user_name(uid: int) -> str:
    """The name of a user id, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"number {uid}"


@dataclass(slots=True)
class Claim:
    """A data directory that is ours until `release`."""

    path: Path
    _descriptors: list[int]

    def release(self) -> None:
        """Give the directory back; idempotent. The lock file stays: unlinking it would let two
        brokers lock different files.
        """
        while self._descriptors:
            descriptor = self._descriptors.pop()
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def also(self, other: Claim) -> None:
        """Hold the other claim for as long as this one."""
        self._descriptors += other._descriptors


def is_new(data: Path) -> bool:
    """Whether there is no data directory of a broker yet; False also for what can't be looked at,
    which `claim` tells of.
    """
    try:
        return not os.path.lexists(data.expanduser() / "lock")
    except (OSError, RuntimeError):
        return False


def claim(data: Path) -> Claim:
    """Make the data directory where it is missing, and hold its lock.

    Raises EmbeddedFault: it can't be made or read, is a file, belongs to somebody else, holds other
    things, or another broker runs on it.
    """
    try:
        path = data.expanduser().resolve()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except FileExistsError:
        raise EmbeddedFault(
            f"The data directory {data} is a file; remove it or name another data directory."
        ) from None
    except (OSError, RuntimeError) as fault:
        raise EmbeddedFault(f"The data directory {data} can't be made: {_reason(fault)}.") from None
    owners = {os.geteuid()} if os.geteuid() != 0 else {0, server_account().uid}
    if status.st_uid not in owners:
        raise EmbeddedFault(
            f"The data directory {path} belongs to the user {user_name(status.st_uid)}; "
            "run the broker as that user or name another data directory."
        )
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as fault:
        raise EmbeddedFault(f"The data directory {path} can't be read: {_reason(fault)}.") from None
    try:
        names = os.listdir(directory)
        if names and "lock" not in names:
            raise EmbeddedFault(
                f"The directory {path} is not empty and was not made by the broker; name another data directory."
            )
        lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=directory)
        try:
            sole_file(lock, path / "lock")
            _hold(lock, path)
        except BaseException:
            os.close(lock)
            raise
        os.fchmod(directory, 0o700)
    except OSError as fault:
        raise EmbeddedFault(f"The data directory {path} can't be used: {_reason(fault)}.") from None
    finally:
        os.close(directory)
    return Claim(path, [lock])


def _hold(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        process = f" (process {owner})" if owner.isdigit() else ""
        raise EmbeddedFault(
            f"Another broker{process} runs on the data directory {path}; stop it or name another data directory."
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def own(directory: Path, account: Account) -> None:
    """Make the directory where it is missing, and have it 0700 and the account's. Raises
    EmbeddedFault for a file, a link, or somebody else's directory; OSError where the file system
    refuses."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    with entered(directory, account) as descriptor:
        if os.fstat(descriptor).st_uid != account.uid:
            os.fchown(descriptor, account.uid, account.gid)
        os.fchmod(descriptor, 0o700)


@contextlib.contextmanager
def entered(directory: Path, account: Account) -> Iterator[int]:
    """A descriptor of a directory that is the account's or ours; what is done through it stays in
    it, whatever takes its name.

    Raises EmbeddedFault for a file, a link, or somebody else's directory; OSError where there is
    none or it can't be read.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as fault:
        if fault.errno in (errno.ENOTDIR, errno.ELOOP):
            what = "a symbolic link" if directory.is_symlink() else "not a directory"
            raise EmbeddedFault(
                f"{directory} is {what}, so the embedded stores can't use it; remove it."
            ) from None
        raise
    try:
        owner = os.fstat(descriptor).st_uid
        if owner not in (account.uid, os.geteuid()):
            raise EmbeddedFault(
                f"{directory} belongs to the user {user_name(owner)}, not to {account.name}, whom the servers run as; "
                "give it back or name another data directory."
            )
        yield descriptor
    finally:
        os.close(descriptor)


def sole_file(descriptor: int, path: Path) -> None:
    """Raise EmbeddedFault unless it is a regular file with one name: what we write must not be
    another file's content.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise EmbeddedFault(
            f"{path} is not a file with a single name, so the embedded stores can't use it; remove it."
        )


def read_ours(path: Path) -> str:
    """The text of a small file that the broker wrote.

    Raises FileNotFoundError, EmbeddedFault for a link and for what can't be read, NotOurs for what
    somebody else put there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as fault:
        if fault.errno == errno.ELOOP:
            raise EmbeddedFault(
                f"{path} is a symbolic link, so the embedded stores can't use it; remove it."
            ) from None
        raise EmbeddedFault(f"{path} can't be read: {_reason(fault)}.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise NotOurs(f"{path} was not written by the broker; remove it or restore it.")
        return os.pread(descriptor, 65536, 0).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


def recorded_place(data: Path) -> Path | None:
    """The folder that `where` names, when the data directory has one.

    Raises EmbeddedFault when it is not ours or names anything but a folder that we make: as root we
    are about to change its owner.
    """
    try:
        place = Path(read_ours(data / "where").strip())
    except FileNotFoundError:
        return None
    if place.parent != STATE or not _PLACE_NAME.fullmatch(place.name):
        raise EmbeddedFault(
            f"{data / 'where'} names {place}, which is not a folder of the broker's; remove the file {data / 'where'} or restore it."
        )
    return place


def place_elsewhere(data: Path, account: Account, why: str) -> tuple[Path, tuple[str, ...]]:
    """A place under the system's state directory, recorded in `where`, and the sentences that say
    so.

    The name is derived from the data directory's path. Without `where` a folder of that name is
    what a deleted data directory left behind: it is set aside, because whoever deletes `.broker/`
    expects to begin anew.
    """
    place = _state() / _name_of(data)
    notes = [f"The stores' data is in {place}: {why}."]
    if place.exists():
        aside = place.with_suffix(".old")
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        notes.append(f"The data of an earlier {data} was set aside in {aside}.")
    write(data / "where", f"{place}\n")
    return place, tuple(notes)


def binaries_directory(place: Path) -> Path:
    """The directory for copies of binaries that the servers' account can't execute where they are.
    Root only.

    It is beside the places and not in one: only root can change what is in it, or put something in
    its place.
    """
    home = _state() / f"{place.name if place.parent == STATE else _name_of(place)}.binaries"
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


def socket_directory(place: Path, account: Account) -> Path:
    """The directory for the servers' sockets: `run` in the place, or a short one elsewhere where
    that is too long.

    Also elsewhere when the path holds characters that a connection URL or Postgres's list of
    directories would need quoted.
    """
    inside = place / "run"
    if _fits(inside):
        own(inside, account)
        return inside
    name = f"passkey-broker-{_name_of(place)}"
    if account.switched:
        bases = ["/run", "/var/run"]
    else:
        bases = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]  # noqa: S108  `own` judges owner and links
    for base in bases:
        short = Path(base) / name
        if not (short.is_absolute() and _fits(short)):
            continue
        try:
            own(short, account)
        except (EmbeddedFault, OSError):
            continue
        return short
    raise EmbeddedFault(
        f"The path {inside} is too long for a Unix socket and no short directory could be made in {', '.join(filter(None, bases))}; "
        "name a data directory with a shorter path."
    )


def _fits(directory: Path) -> bool:
    longest = os.fsencode(directory / LONGEST_SOCKET)
    return len(longest) <= SOCKET_PATH_BYTES and _PLAIN_PATH.fullmatch(str(directory)) is not None


def write(
    path: Path | str, text: str, account: Account | None = None, *, directory: int | None = None
) -> None:
    """Replace a file in one step, mode 0600, owned by the account. With a directory's descriptor
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


def _reason(fault: OSError | RuntimeError) -> str:
    return (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
