"""What tests of whole processes share: free ports, waiting with a deadline, who descends from whom,
and who took which connection.

No test sleeps for a while and hopes. `until` asks again and again, and fails by name after its
deadline, which is generous because the machine may be busy; nothing is concluded from how long it
took.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE = 30.0


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago, on IPv4 and, where there is one, IPv6."""
    while True:
        with socket.socket() as four:
            four.bind(("127.0.0.1", 0))
            port = int(four.getsockname()[1])
            with socket.socket(socket.AF_INET6) as six:
                try:
                    six.bind(("::1", port))
                except OSError as fault:
                    if fault.errno == errno.EADDRINUSE:
                        continue
            return port


def until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as the condition holds; fail after the deadline, saying what never came
    true.
    """
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.01)  # between two looks


def get(port: int, path: str, host: str = "127.0.0.1") -> int:
    """The status of a GET; 0 where nothing listens."""
    connection = http.client.HTTPConnection(host, port, timeout=DEADLINE)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def accepted(pid: int, port: int) -> list[int]:
    """The connections to the port that a process has taken, by the clients' ports."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry).removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [
        row
        for row in rows
        if row[1].endswith(f":{port:04X}") and row[3] == "01" and row[9] in inodes
    ]
    return [int(row[2].partition(":")[2], 16) for row in mine]


def descendants(pid: int, but: frozenset[int] = frozenset()) -> list[int]:
    """All living descendants of a process, without those in `but` and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each and child not in but]
    return found[1:]


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run; a zombie does not."""
    left = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(") ")[2][0] != "Z":
                left.append(pid)
    return left
