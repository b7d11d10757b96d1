"""Acceptors of one queue, as two processes have them: who has more connections leaves the next one
to the other, for a moment.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from broker.web import share
from broker.web.server import _BACKLOG, bind
from broker.web.share import ABSENT, Acceptor, Share, Shares
from tests.conftest import Started
from tests.support.servers import eventually


class Held(asyncio.Protocol):
    """A connection that lasts as long as its peer wants."""

    def __init__(self, taken: list[Held], own: Share) -> None:
        self._taken = taken
        self._own = own

    def connection_made(self, _: asyncio.BaseTransport) -> None:
        self._taken.append(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._taken.remove(self)
        self._own.went()


class Port:
    """A listening socket, those who accept from it, and its clients."""

    def __init__(self) -> None:
        (self.listening,) = bind("127.0.0.1", 0)
        self._acceptors: list[Acceptor] = []
        self._taken: list[list[Held]] = []
        self._clients: list[socket.socket] = []

    def accept(self, own: Share) -> list[Held]:
        """Have another process accept, which this one plays; what it has taken."""
        taken: list[Held] = []
        self._taken.append(taken)
        self._acceptors.append(Acceptor(self.listening.dup(), lambda: Held(taken, own), own))
        return taken

    async def stop(self, number: int) -> None:
        await self._acceptors.pop(number).close()

    def connect(self, count: int) -> None:
        """So many clients, whom nobody has accepted yet."""
        self._clients += [
            socket.create_connection(self.listening.getsockname()) for _ in range(count)
        ]

    def hang_up(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    async def close(self) -> None:
        self.hang_up()
        for acceptor in self._acceptors:
            await acceptor.close()
        self.listening.close()
        await eventually(lambda: not any(self._taken), "all have gone")


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    opened = Port()
    yield opened
    await opened.close()


@pytest.fixture
def shares(tmp_path: Path) -> Shares:
    return Shares(tmp_path / "shares", 4)


def numbers(shares: Shares) -> list[int]:
    return list(shares._counts)


# -- the numbers -----------------------------------------------------------------------------------


def test_each_sees_the_others(tmp_path: Path) -> None:
    kept, mapped = Shares(tmp_path / "shares", 3), Shares(tmp_path / "shares")
    assert (kept.seats, mapped.seats) == (3, 3)
    own = mapped.at(1)
    own.came()
    own.came()
    own.went()
    assert numbers(kept) == [ABSENT, 1, ABSENT]
    kept.vacate(1)
    assert numbers(mapped) == [ABSENT] * 3


def test_who_has_left_writes_no_more(shares: Shares) -> None:
    leaving = shares.at(0)
    leaving.came()
    leaving.leave()
    shares.at(0).came()
    leaving.went()
    leaving.leave()
    assert numbers(shares)[0] == 1


@pytest.mark.parametrize(
    ("mine", "others", "ahead"),
    [
        (0, [], False),
        (500, [], False),
        (1, [0], False),
        (2, [0], True),
        (7, [6], False),
        (8, [6], True),
        (8, [9, 6], True),
        (45, [40], False),
        (47, [40], True),
    ],
)
def test_ahead_is_who_has_clearly_more_than_somebody(
    shares: Shares, mine: int, others: list[int], ahead: bool
) -> None:
    own = shares.at(0)
    for seat, count in [(0, mine), *enumerate(others, 1)]:
        each = own if seat == 0 else shares.at(seat)
        for _ in range(count):
            each.came()
    assert own.ahead is ahead


# -- accepting -------------------------------------------------------------------------------------


async def test_a_burst_is_shared(port: Port, shares: Shares) -> None:
    one, two = port.accept(shares.at(0)), port.accept(shares.at(1))
    port.connect(64)
    await eventually(lambda: len(one) + len(two) == 64, "all are taken")
    assert min(len(one), len(two)) >= 24
    assert numbers(shares)[:2] == [len(one), len(two)]
    port.hang_up()
    await eventually(lambda: numbers(shares)[:2] == [0, 0], "all have gone")


async def test_who_comes_later_catches_up(port: Port, shares: Shares) -> None:
    one = port.accept(shares.at(0))
    port.connect(30)
    await eventually(lambda: len(one) == 30, "all are taken")
    two = port.accept(shares.at(1))
    for count in range(31, 51):
        port.connect(1)
        await eventually(lambda count=count: len(one) + len(two) == count, "somebody takes it")  # type: ignore[misc]
    assert len(two) >= 15


async def test_who_hangs_keeps_nobody_waiting(port: Port, shares: Shares) -> None:
    """It has nothing, and takes nothing."""
    shares.at(1)
    one = port.accept(shares.at(0))
    port.connect(60)
    await eventually(lambda: len(one) == 60, "all are taken")


async def test_who_leaves_takes_no_more_and_the_rest_goes_on(port: Port, shares: Shares) -> None:
    one, two = port.accept(shares.at(0)), port.accept(shares.at(1))
    port.connect(10)
    await eventually(lambda: len(one) + len(two) == 10, "all are taken")
    had = len(one)
    await port.stop(0)
    port.connect(10)
    await eventually(lambda: len(two) == 20 - had, "the other takes all")
    assert len(one) == had
    assert numbers(shares)[:2] == [ABSENT, len(two)]


async def test_who_stops_keeps_what_it_had_just_accepted(port: Port, shares: Shares) -> None:
    one = port.accept(shares.at(0))
    port.connect(5)
    for _ in range(1000):
        if numbers(shares)[0] == 5:
            break
        await asyncio.sleep(0)
    assert one == [], "accepted, and not known yet"
    await port.stop(0)
    assert len(one) == 5


async def test_a_client_that_left_before_it_was_accepted_is_let_go(
    port: Port, shares: Shares
) -> None:
    port.connect(3)
    port.hang_up()
    one = port.accept(shares.at(0))
    port.connect(1)
    await eventually(lambda: len(one) == 1 and numbers(shares)[0] == 1, "only who is there counts")


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Inside, this process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    filler = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        while True:
            try:
                filler.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in filler:
            os.close(each)


async def test_without_descriptors_it_is_told_and_tried_again(
    port: Port, shares: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "_RETRY", 0.01)
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    port.connect(2)
    one = port.accept(shares.at(0))  # in the next turn
    with no_more_descriptors():
        await eventually(lambda: len(told) > 1, "it is told, again and again")
        assert one == []
    await eventually(lambda: len(one) == 2, "both are taken")
    assert {context["message"] for context in told} == {"can't accept connections"}


# -- the queue -------------------------------------------------------------------------------------


def longest(listening: socket.socket) -> int:
    """How many may wait to be accepted: `tcpi_sacked` tells that of a socket that listens."""
    facts = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    most: int = struct.unpack_from("I", facts, 28)[0]
    return most


async def test_a_queue_is_as_long_as_it_was_bound_for(
    port: Port, shares: Shares, broker: Started
) -> None:
    """Also where an event loop serves the socket, which listens anew."""
    port.accept(shares.at(0))
    (site,) = broker.service._listeners[0]._runner.sites
    assert isinstance(site, web.SockSite)
    assert longest(site._sock) == longest(port.listening) == min(_BACKLOG, socket_limit())


def socket_limit() -> int:
    return int(Path("/proc/sys/net/core/somaxconn").read_text())
