"""Connection balancing: processes that accept from one socket share its connections.

The kernel wakes all of them for a connection, and the first to ask has it. Without a rule that is
one and the same for a whole burst: of 64 connections that a backend's pool opened at once, one of
two workers had all 64. They are kept for minutes, so one core works and the other one waits.

The rule: before a process accepts, it waits the longer the more connections it has. The others take
theirs meanwhile. Of 64 connections each of two workers then has 26 to 38, opened at once or
one by one (2026-11-30). A process that hangs takes none and delays none. The more connections a
process has, the more it accepts at a time, so the wait doesn't limit how many come a second.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

STEP = 0.0001  # seconds of wait for each connection
LONGEST_WAIT = 0.001  # seconds
_RETRY = 1.0  # seconds, where the process or the machine has no descriptors left
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Accepts from a listening socket, which it owns, and makes each connection a protocol.
    `connections` says how many the process has.
    """

    def __init__(
        self,
        listening: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        connections: Callable[[], int],
    ) -> None:
        self._listening = listening
        self._protocol = protocol
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(listening, self._wait)

    def _wait(self, seconds: float | None = None) -> None:
        """A connection is there: leave it to the others for a moment."""
        self._loop.remove_reader(self._listening)
        if seconds is None:
            seconds = min(LONGEST_WAIT, STEP * (self._connections() + len(self._opening)))
        self._timer = self._loop.call_later(seconds, self._take)

    def _take(self) -> None:
        self._loop.add_reader(self._listening, self._wait)
        for _ in range(1 + self._connections() // 8):
            try:
                connection, _ = self._listening.accept()
            except OSError as fault:  # another process has it, or the peer left
                if fault.errno in _NO_ROOM:
                    self._loop.call_exception_handler(
                        {"message": "can't accept connections", "exception": fault}
                    )
                    self._wait(_RETRY)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:  # the peer left
            connection.close()

    async def close(self) -> None:
        """Accept no more. Connections that there are go on; those just accepted have their
        protocols when this returns.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        if self._opening:
            await asyncio.wait(self._opening)
