"""Connection balancing: acceptors of one queue, as several processes have them. Who has more
connections leaves the next one to the others, for a moment.
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

from broker.web import accept_balance
from broker.web.accept_balance import Acceptor
from broker.web.server import _BACKLOG, bind
from tests.conftest import Started
from tests.support.servers import eventually


class Held(asyncio.Protocol):
    """A connection that lasts as long as its peer wants."""

    def __init__(self, taken: list[Held]) -> None:
        self._taken = taken

    def connection_made(self, _: asyncio.BaseTransport) -> None:
        self._taken.append(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._taken.remove(self)


class Port:
    """A listening socket, those who accept from it, and its clients."""

    def __init__(self) -> None:
        (self.listening,) = bind("127.0.0.1", 0)
        self.acceptors: list[Acceptor] = []
        self._taken: list[list[Held]] = []
        self._clients: list[socket.socket] = []

    def accept(self) -> list[Held]:
        """Have another process accept, which this one plays; what it has taken."""
        taken: list[Held] = []
        self._taken.append(taken)
        self.acceptors.append(
            Acceptor(self.listening.dup(), lambda: Held(taken), lambda: len(taken))
        )
        return taken

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
        for acceptor in self.acceptors:
            await acceptor.close()
        self.listening.close()
        await eventually(lambda: not any(self._taken), "all have gone")


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    opened = Port()
    yield opened
    await opened.close()


async def test_a_burst_is_shared(port: Port) -> None:
    one, two, three = port.accept(), port.accept(), port.accept()
    port.connect(63)
    await eventually(lambda: len(one) + len(two) + len(three) == 63, "all are taken")
    assert min(map(len, (one, two, three))) >= 14


async def test_who_comes_later_catches_up(port: Port) -> None:
    one = port.accept()
    port.connect(30)
    await eventually(lambda: len(one) == 30, "all are taken")
    two = port.accept()
    for count in range(31, 51):
        port.connect(1)
        await eventually(lambda count=count: len(one) + len(two) == count, "somebody takes it")  # type: ignore[misc]
    assert len(two) >= 15


async def test_one_alone_takes_all(port: Port) -> None:
    """However many it has, and whatever the others do: here one has stopped."""
    one, _ = port.accept(), port.accept()
    await port.acceptors.pop(1).close()
    port.connect(100)
    await eventually(lambda: len(one) == 100, "all are taken")


async def test_who_stops_takes_no_more_and_keeps_what_it_has(port: Port) -> None:
    one, two = port.accept(), port.accept()
    port.connect(10)
    await eventually(lambda: len(one) + len(two) == 10, "all are taken")
    had = len(one)
    assert 0 < had < 10
    await port.acceptors.pop(0).close()
    port.connect(10)
    await eventually(lambda: len(two) == 20 - had, "the other takes all")
    assert len(one) == had


async def test_who_stops_keeps_what_it_had_just_accepted(port: Port) -> None:
    one = port.accept()
    port.connect(1)
    for _ in range(10_000):
        if port.acceptors[0]._opening:
            break
        await asyncio.sleep(0)
    assert one == [], "accepted, and not known yet"
    await port.acceptors.pop(0).close()
    assert len(one) == 1


async def test_who_stops_while_it_waits_takes_nothing(port: Port) -> None:
    one = port.accept()
    port.connect(20)
    await eventually(lambda: len(one) == 20, "all are taken")
    port.connect(1)
    for _ in range(10_000):
        timer = port.acceptors[0]._timer
        if timer is not None and timer.when() > asyncio.get_running_loop().time():
            break
        await asyncio.sleep(0)
    await port.acceptors.pop(0).close()
    await asyncio.sleep(0.01)  # far beyond its wait
    assert len(one) == 20


async def test_a_client_that_left_before_it_was_accepted_is_let_go(port: Port) -> None:
    port.connect(3)
    port.hang_up()
    one = port.accept()
    port.connect(1)
    await eventually(lambda: len(one) == 1, "only who is there counts")


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
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept_balance, "_RETRY", 0.01)
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    port.connect(2)
    one = port.accept()  # in the next turn
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


async def test_a_queue_is_as_long_as_it_was_bound_for(port: Port, broker: Started) -> None:
    """Also where an event loop serves the socket, which listens anew."""
    port.accept()
    (acceptor,) = broker.service._listeners[0].acceptors
    assert isinstance(acceptor, asyncio.Server)
    (listening,) = acceptor.sockets
    assert longest(listening) == longest(port.listening) == min(_BACKLOG, socket_limit())


def socket_limit() -> int:
    return int(Path("/proc/sys/net/core/somaxconn").read_text())
