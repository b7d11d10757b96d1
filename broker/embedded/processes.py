"""Server processes: start, supervision and stop of the embedded servers. They end with the broker.

Each server leads a session of its own, so Ctrl-C in the terminal reaches the broker alone. The
broker lets requests finish, and then stops its stores. Two mechanisms end a server whose broker was
killed:

- **On Linux** the kernel signals the server when its parent ends (prctl(2), PR_SET_PDEATHSIG). The
  child makes that request after its change of user, which would cancel it. A parent that ended
  before is noticed by its parent id. The signal follows the *thread* that started the child, so
  servers are started from the main thread only.
- **Elsewhere**, and for a server that stops slowly, there is a record: `servers.json` in the
  servers' directory names each process and a path in its command line. The holder of the data
  directory's lock owns every process in the record, and `reap` ends them before another server
  starts. The path guards against a process id that the system has reused. As root the record lies
  in a directory of the servers' account: it counts only if root wrote it, and a process of another
  account is never signalled.
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

from broker.embedded.directories import (
    Account,
    EmbeddedFault,
    NotOurs,
    read_ours,
    require_sole_file,
    server_environment,
    write,
)

LOG_BYTES = 1024 * 1024
GRACE = 6.0

_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REAL_USER = re.compile(rb"^Uid:\s+(\d+)", re.MULTILINE)
_FAILURE = re.compile(r"\b(FATAL|PANIC|error|ERROR|Fatal|Bad file|Can't)\b")


class Log:
    """A server's log file, which the server writes. Above 1 MiB a new file begins, and one older
    file is kept.
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
            require_sole_file(self.descriptor, path)
        except EmbeddedFault:
            os.close(self.descriptor)
            raise
        self._start = os.fstat(self.descriptor).st_size

    def last_words(self) -> str:
        """The last line since the start that names a failure; without one, the last line."""
        written = os.pread(
            self.descriptor, 65536, max(self._start, os.fstat(self.descriptor).st_size - 65536)
        )
        lines = [
            line.strip() for line in written.decode("utf-8", "replace").splitlines() if line.strip()
        ]
        failures = [line for line in lines if _FAILURE.search(line)]
        return (failures or lines or ["it printed nothing"])[-1][:300]

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Server:
    """A child process: a server, or initdb."""

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
        """Start the process. `mark` is an absolute path in `argv` that identifies it for `reap`.

        Raises EmbeddedFault.
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
                **account.identity,
                preexec_fn=_dying_with_parent(stop_signal),
            )
        except (OSError, subprocess.SubprocessError) as fault:
            raise EmbeddedFault(f"{title} can't be started: {fault}.") from None

    def failed(self) -> EmbeddedFault:
        """The fault of a process that ended by itself."""
        status = self.process.returncode
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        words = self.log.last_words().rstrip(".")
        return EmbeddedFault(
            f"{self.title} ended at once ({how}): {words}; its log is {self.log.path}."
        )


def stop(servers: list[Server]) -> None:
    """Stop the servers together: by their own signal within 6 s, by SIGQUIT (PostgreSQL's immediate
    shutdown) within 2 s, by SIGKILL.
    """
    for number, limit in ((None, GRACE), (signal.SIGQUIT, 2.0), (signal.SIGKILL, 5.0)):
        running = [server for server in servers if server.process.poll() is None]
        for server in running:
            server.process.send_signal(number or server.stop_signal)
        deadline = time.monotonic() + limit
        for server in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.01, deadline - time.monotonic()))


def record(path: Path, servers: list[Server]) -> None:
    """Write the record of the running servers."""
    entries = [
        [s.process.pid, int(s.stop_signal), str(s.mark)]
        for s in servers
        if s.process.poll() is None
    ]
    write(path, json.dumps(entries) + "\n")


def reap(path: Path, account: Account) -> None:
    """End the account's servers of an earlier broker on this data. Call it with the lock held.

    On Linux the kernel has signalled them, so they get their time first. Raises EmbeddedFault if a
    process does not end, or if the record is a link.
    """
    left = _recorded(path)
    first = 0 if sys.platform == "linux" else None  # signal 0: only look
    for number, limit in ((first, GRACE), (None, GRACE), (signal.SIGKILL, 5.0)):
        left = [entry for entry in left if runs(entry[0], entry[2], account)]
        for pid, stop_signal, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, stop_signal if number is None else number)
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
    """The entries that `record` could have written. A file of another account has none."""
    try:
        entries = json.loads(read_ours(path))
    except (FileNotFoundError, NotOurs, ValueError):
        return []
    found = []
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case [int(pid), int(number), str(mark)] if (
                pid > 1 and number in _STOP_SIGNALS and _is_mark(mark)
            ):
                found.append((pid, number, mark))
    return found


def _is_mark(mark: str) -> bool:
    return mark.startswith("/") and len(Path(mark).parts) > 2


def exists(pid: int) -> bool:
    """True if a process of any account has this id."""
    try:
        with contextlib.suppress(PermissionError):
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True


def runs(pid: int, mark: str, account: Account) -> bool:
    """True if the process exists, its real user is the account's, and the mark is an argument of
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
