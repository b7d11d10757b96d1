"""Server processes that live as long as the broker, and not a moment longer.

Each server leads a session of its own, so a Ctrl-C in the terminal reaches the broker alone, which
lets requests finish before it stops its stores. That session would survive the broker, so on Linux
the kernel is asked to signal the server when its parent ends (prctl(2), PR_SET_PDEATHSIG). The
request is made in the child after the change of user, which would cancel it; a parent that ended
even before is noticed by comparing parent ids. The signal follows the *thread* that started the
child: servers are started from the main thread only.

Elsewhere, and for a server that is slow to go, there is the record: `servers.json` in the place
names each process and a path that is an argument of its command line. Whoever holds the lock of the
data directory owns every process in the record, and `reap` ends them before anything is started.
The path guards against a number that the system has given to somebody else. As root the record is
in a directory of the servers' account: it is believed only when root wrote it, and even then no
process of another account is ever signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from broker.embedded.place import (
    Account,
    EmbeddedFault,
    NotOurs,
    read_ours,
    server_environment,
    sole_file,
    write,
)

LOG_BYTES = 1024 * 1024
GRACE = 6.0

_PR_SET_PDEATHSIG = 1
_OWN_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REAL_USER = re.compile(rb"^Uid:\s+(\d+)", re.MULTILINE)
_TELLING = re.compile(r"\b(FATAL|PANIC|error|ERROR|Fatal|Bad file|Can't)\b")


class Log:
    """A server's log file, appended to by the server itself; above 1 MiB it starts anew and one
    older file is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_size > LOG_BYTES:
                path.replace(path.with_name(path.name + ".1"))
        self.descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )
        try:
            sole_file(self.descriptor, path)
        except EmbeddedFault:
            os.close(self.descriptor)
            raise
        self._start = os.fstat(self.descriptor).st_size

    def last_words(self) -> str:
        """The last line since the server was started that names a failure, else the last line."""
        written = os.pread(
            self.descriptor, 65536, max(self._start, os.fstat(self.descriptor).st_size - 65536)
        )
        lines = [
            line.strip() for line in written.decode("utf-8", "replace").splitlines() if line.strip()
        ]
        telling = [line for line in lines if _TELLING.search(line)]
        return (telling or lines or ["it printed nothing"])[-1][:300]

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Server:
    """One process of ours: a server, or initdb."""

    def __init__(
        self,
        title: str,
        argv: list[str],
        *,
        account: Account,
        cwd: Path,
        log: Log,
        stop_signal: signal.Signals,
        mark: Path,
    ) -> None:
        """Start it. `mark` is an absolute path that is one of `argv`, by which `reap` recognises
        the process. Raises EmbeddedFault.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "servers die with the thread that starts them; start them from the main thread"
            )
        self.title = title
        self.stop_signal = stop_signal
        self.mark = mark
        self.log = log
        try:
            self.process = subprocess.Popen(  # noqa: S603  argv is ours, no shell
                argv,
                cwd=cwd,
                env=server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log.descriptor,
                stderr=log.descriptor,
                start_new_session=True,
                umask=0o077,
                user=account.uid if account.switched else None,
                group=account.gid if account.switched else None,
                extra_groups=[] if account.switched else None,
                preexec_fn=_dying_with_parent(stop_signal),
            )
        except (OSError, subprocess.SubprocessError) as fault:
            raise EmbeddedFault(f"{title} can't be started: {fault}.") from None

    def failed(self) -> EmbeddedFault:
        """The fault that tells of a process which ended when it should not have."""
        status = self.process.returncode
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        words = self.log.last_words().rstrip(".")
        return EmbeddedFault(
            f"{self.title} ended at once ({how}): {words}; its log is {self.log.path}."
        )


def stop(servers: list[Server]) -> None:
    """End the servers together: their own signal and 6 s, then (PostgreSQL's immediate shutdown)
    SIGQUIT and 2 s, then SIGKILL.
    """
    for ask, limit in ((None, GRACE), (signal.SIGQUIT, 2.0), (signal.SIGKILL, 5.0)):
        running = [server for server in servers if server.process.poll() is None]
        for server in running:
            server.process.send_signal(ask or server.stop_signal)
        deadline = time.monotonic() + limit
        for server in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.01, deadline - time.monotonic()))


def record(path: Path, servers: list[Server]) -> None:
    """Write down which processes are ours."""
    entries = [
        [s.process.pid, int(s.stop_signal), str(s.mark)]
        for s in servers
        if s.process.poll() is None
    ]
    write(path, json.dumps(entries) + "\n")


def reap(path: Path, account: Account) -> None:
    """End what an earlier broker on this data left running as the account. Call with the data
    directory's lock held.

    On Linux such servers are stopping already and get their time; elsewhere nobody has told them
    yet. Raises EmbeddedFault where one can't be ended, and for a link in place of the record.
    """
    left = _recorded(path)
    told = sys.platform == "linux"
    for ask, limit in ((0 if told else None, GRACE), (None, GRACE), (signal.SIGKILL, 5.0)):
        left = [entry for entry in left if runs(entry[0], entry[2], account)]
        for pid, own_signal, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, own_signal if ask is None else ask)
        deadline = time.monotonic() + limit
        while left and time.monotonic() < deadline:
            time.sleep(0.01)  # between two looks
            left = [entry for entry in left if runs(entry[0], entry[2], account)]
    if left:
        raise EmbeddedFault(
            f"The process {left[0][0]} of an earlier broker does not end; end it and start again."
        )
    path.unlink(missing_ok=True)


def _recorded(path: Path) -> list[tuple[int, int, str]]:
    """The entries that `record` could have written; none from a file that somebody else put
    there.
    """
    try:
        entries = json.loads(read_ours(path))
    except (FileNotFoundError, NotOurs, ValueError):
        return []
    found = []
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case [int(pid), int(ask), str(mark)] if (
                pid > 1 and ask in _OWN_SIGNALS and _is_mark(mark)
            ):
                found.append((pid, ask, mark))
    return found


def _is_mark(mark: str) -> bool:
    return mark.startswith("/") and len(Path(mark).parts) > 2


def exists(pid: int) -> bool:
    """Whether there is a process with that number, whoever owns it."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def runs(pid: int, mark: str, account: Account) -> bool:
    """Whether the process exists, its real user is the account's, and the mark is an argument of
    its command line.
    """
    if sys.platform == "linux":
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            user = _REAL_USER.search(Path(f"/proc/{pid}/status").read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            return False
        return os.fsencode(mark) in arguments and user is not None and int(user[1]) == account.uid
    answer = subprocess.run(  # noqa: S603
        ["/bin/ps", "-ww", "-o", "ruid=,command=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    owner, _, command = answer.stdout.strip().partition(" ")
    return owner == str(account.uid) and mark in command


def _libc_prctl() -> Callable[[int, int], int] | None:
    if sys.platform != "linux":
        return None
    prctl: Callable[[int, int], int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl


_prctl = _libc_prctl()


def _dying_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    parent = os.getpid()

    def in_child() -> None:
        if _prctl is not None:
            _prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:
            os._exit(1)

    return in_child
