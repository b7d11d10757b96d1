"""Processes that accept from one queue leave the next connection to whoever has fewer.

**Why.** The kernel gives a connection to the first process that asks, and the one that is awake
asks first: of 64 connections that a backend's pool opens at a time, one of two workers took nearly
all. They are kept for minutes, so one core worked and the other one waited. A queue for each
(SO_REUSEPORT) shares by chance, and leaves what it gave to a process that died or hangs without an
answer.

**The rule.** Processes write into memory that they share how many connections each has. One that
has over one more than another stays away from the queue for `PATIENCE`, in which the others are
awake and take theirs. Then it takes `CHUNK` whatever the others have, for they may hang, or be too
busy to come.

Each process writes a number of its own, so nothing is locked; a number read a moment too early
makes shares a little less equal.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import socket
from collections.abc import Callable
from pathlib import Path

PATIENCE = 0.001  # seconds
CHUNK = 8
ABSENT = 2**32 - 1  # of a process that takes no connections
_AT_ONCE = 64  # then requests have their turn
_RETRY = 1.0  # seconds, where the process or the machine has no descriptors left
_PEER_LEFT = (
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)


class Shares:
    """How many connections each process has, in a file that they map. Each has a seat, whose number
    outlives it: `vacate` it.
    """

    def __init__(self, path: Path, seats: int | None = None) -> None:
        """With `seats` the file is made, for so many processes. Raises OSError."""
        if seats is not None:
            path.write_bytes(ABSENT.to_bytes(4, "little") * seats)
        with path.open("r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 0)).cast("I")
        self.seats = len(self._counts)

    def vacate(self, seat: int) -> None:
        """Nobody takes connections here."""
        self._counts[seat] = ABSENT

    def at(self, seat: int) -> Share:
        """The share of who sits down here."""
        return Share(self._counts, seat)


class Share:
    """One process' number, until it takes no more."""

    __slots__ = ("_counts", "_left", "_mine", "_seat")

    def __init__(self, counts: memoryview[int], seat: int) -> None:
        self._counts = counts
        self._seat = seat
        self._mine = 0
        self._left = False
        counts[seat] = 0

    def came(self) -> None:
        """A connection was accepted."""
        self._change(1)

    def went(self) -> None:
        """A connection has ended."""
        self._change(-1)

    def _change(self, by: int) -> None:
        self._mine += by
        if not self._left:
            self._counts[self._seat] = self._mine

    def leave(self) -> None:
        """Take no more; the seat may be another's from now on."""
        if not self._left:
            self._left = True
            self._counts[self._seat] = ABSENT

    @property
    def ahead(self) -> bool:
        """Whether somebody has fewer by more than one. The more there are, the less exact shares
        need to be.
        """
        least = min(self._counts)
        return self._mine > least + 1 + least // 8


class Acceptor:
    """Accepts from a listening socket, which it owns, and makes each connection a protocol."""

    def __init__(
        self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol], share: Share
    ) -> None:
        self._listening = listening
        self._protocol = protocol
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._away: asyncio.TimerHandle | None = None
        self._coming: set[asyncio.Task[None]] = set()
        self._loop.add_reader(listening, self._take)

    def _take(self, anyway: int = 0) -> None:
        """Accept what is there, `anyway` so many though others have fewer."""
        for taken in range(_AT_ONCE):
            if taken >= anyway and self._share.ahead:
                if not taken:  # else it is seen in the next turn whether there are more
                    self._stay_away(PATIENCE)
                return
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as fault:
                if fault.errno in _PEER_LEFT:
                    continue
                self._loop.call_exception_handler(
                    {"message": "can't accept connections", "exception": fault}
                )
                self._stay_away(_RETRY)
                return
            connection.setblocking(False)
            self._share.came()
            task = self._loop.create_task(self._serve(connection))
            self._coming.add(task)
            task.add_done_callback(self._coming.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:  # it ended before anybody knew of it
            connection.close()
            self._share.went()

    def _stay_away(self, seconds: float) -> None:
        self._loop.remove_reader(self._listening)
        self._away = self._loop.call_later(seconds, self._return)

    def _return(self) -> None:
        self._away = None
        self._loop.add_reader(self._listening, self._take)
        self._take(CHUNK)

    async def close(self) -> None:
        """Accept no more. Connections that there are go on; those just accepted have their
        protocols when this returns.
        """
        self._share.leave()
        if self._away is not None:
            self._away.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        if self._coming:
            await asyncio.wait(self._coming)
