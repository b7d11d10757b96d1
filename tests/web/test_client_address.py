"""The client's address: of the peer, in the headers of trusted proxies, in the PROXY protocol."""

from __future__ import annotations

import asyncio
import io
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest
from aiohttp import web
from multidict import CIMultiDict

from broker.dialects.flex import routes as flex
from broker.telemetry import Log, Metrics
from broker.web import Edge, Limits, Listener, json_answer, listen
from broker.web import server as plain_server
from broker.web.body import LIMITS
from broker.web.client_address import ClientAddress
from broker.web.proxy_protocol import ProxyHeader, read_header
from broker.web.server import bind
from tests.web.test_server import Line, request

TRUSTED = [ip_network("10.0.0.0/8"), ip_network("2001:db8:ffff::/48")]
PROXY, CLIENT = "10.0.0.1", "203.0.113.7"


class Peer:
    """A request as far as `ClientAddress` reads it."""

    def __init__(self, remote: str | None, *headers: tuple[str, str]) -> None:
        self.remote, self.headers = remote, CIMultiDict(headers)


def client(remote: str | None, *headers: tuple[str, str]) -> str:
    return ClientAddress(TRUSTED).of(cast("web.Request", Peer(remote, *headers)))


LISTED: list[tuple[str, str]] = [
    (CLIENT, CLIENT),
    (f"198.51.100.1, {CLIENT}", CLIENT),  # the caller wrote the first
    (f"{CLIENT}, 10.9.9.9", CLIENT),
    (f"198.51.100.1,{CLIENT} ,10.9.9.9, 10.0.0.2", CLIENT),
    (f"{CLIENT}:49152", CLIENT),
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ("[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
    ("2001:db8:1:2::9, 2001:db8:ffff::1", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"),
    (f"::ffff:{CLIENT}", CLIENT),
    ("10.0.0.9, 10.0.0.8", "10.0.0.9"),
    (f"{CLIENT}, unknown", PROXY),
    (f"{CLIENT}, unknown, 10.0.0.2", "10.0.0.2"),
    (f"{CLIENT},", PROXY),
    ("", PROXY),
    (",,,", PROXY),
    ("\x00\udcff" * 50, PROXY),
    ("1.2.3.4.5", PROXY),
    ("[::1", "::/64"),
    ("9" * 4000, PROXY),
    ("1.1.1.1," * 1000 + CLIENT, CLIENT),
]
FORWARDED: list[tuple[str, str]] = [
    (f"for={CLIENT}", CLIENT),
    (f'proto=https; For="{CLIENT}:1";by=10.0.0.1, for=10.9.9.9', CLIENT),
    ('for="[2001:db8:1:2::9]:4711"', "2001:db8:1:2::/64"),
    (f"for={CLIENT}, for=_hidden", PROXY),
    (f"for={CLIENT}, for=unknown", PROXY),
    (f'for="198.51.100.1, for={CLIENT}', CLIENT),
    # A proxy that repeats the caller's Host, which looks like an address.
    (f'host="a;for=198.51.100.1";for={CLIENT}', PROXY),
    (f'host="a, for=198.51.100.1";for={CLIENT}', PROXY),
    (f'for={CLIENT};host="a:1"', CLIENT),
    (f"by={CLIENT}", PROXY),
    ("for=", PROXY),
    ("for", PROXY),
]


@pytest.mark.parametrize(("value", "found"), LISTED)
def test_the_right_most_untrusted_address(value: str, found: str) -> None:
    assert client(PROXY, ("X-Forwarded-For", value)) == found


@pytest.mark.parametrize(("value", "found"), FORWARDED)
def test_the_header_of_rfc_7239(value: str, found: str) -> None:
    assert client(PROXY, ("Forwarded", value)) == found


def test_several_headers_are_one_list() -> None:
    one, two = ("X-Forwarded-For", "198.51.100.1"), ("X-Forwarded-For", CLIENT)
    assert client(PROXY, one, two) == CLIENT
    assert client(PROXY, ("Forwarded", "for=198.51.100.1"), two) == CLIENT


def test_a_long_header_is_not_kept() -> None:
    """An address that was found is cached by its header, of which the end decides."""
    found = ClientAddress(TRUSTED)
    header = ("X-Forwarded-For", "198.51.100.1," * 5000 + CLIENT)
    tracemalloc.start()
    for number in range(100):
        asked = Peer(PROXY, ("X-Forwarded-For", f"10.0.{number}.1"), header)
        assert found.of(cast("web.Request", asked)) == CLIENT
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_000_000


def test_headers_of_other_peers_are_ignored() -> None:
    for remote, found in (
        (CLIENT, CLIENT),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("", ""),
        (None, ""),
        ("@socket", "@socket"),
    ):
        assert client(remote, ("X-Forwarded-For", "198.51.100.1")) == found
    untrusting = ClientAddress()
    asked = cast("web.Request", Peer(PROXY, ("X-Forwarded-For", CLIENT)))
    assert untrusting.of(asked) == PROXY


# -- PROXY protocol --------------------------------------------------------------------------------


def v2(source: str, *, command: int = 1, more: bytes = b"") -> bytes:
    address = ip_address(source)
    family = 0x11 if address.version == 4 else 0x21
    block = address.packed * 2 + b"\0\1\0\2" + more
    head = b"\r\n\r\n\0\r\nQUIT\n" + bytes([0x20 | command, family])
    return head + len(block).to_bytes(2, "big") + block


def v1(source: str, family: str = "TCP4") -> bytes:
    return f"PROXY {family} {source} 192.0.2.1 56324 443\r\n".encode()


HEADERS: list[tuple[bytes, str | None]] = [
    (v1(CLIENT), CLIENT),
    (v1("2001:db8::9", "TCP6"), "2001:db8::9"),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
    (v2(CLIENT), CLIENT),
    (v2("2001:db8::9", more=b"\x03\0\x04abcd"), "2001:db8::9"),
    (v2(CLIENT, command=0), None),
]
NO_HEADERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"PROXY TCP4 1.2.3.4\r\n",
    v1("1.2.3.400"),
    b"PROXY TCP4 " + b"1" * 200,
    b"PROXY UNKNOWN" + b" " * 200 + b"\r\n",
    v2(CLIENT)[:12] + b"\x31" + v2(CLIENT)[13:],
    v2(CLIENT)[:14] + b"\xff\xff",
    v2(CLIENT)[:14] + b"\0\4abcd",
    b"\r\n\r\nGET",
]


@pytest.mark.parametrize(("header", "source"), HEADERS)
def test_a_header_in_pieces(header: bytes, source: str | None) -> None:
    for end in range(len(header)):
        assert read_header(header[:end]) is None
    assert read_header(header + b"GET") == ProxyHeader(len(header), source)


@pytest.mark.parametrize("data", NO_HEADERS)
def test_no_header(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"PROXY header|address"):
        read_header(data)


async def _whence(asked: web.Request) -> web.Response:
    return json_answer({"from": ClientAddress().of(asked)})


Dial = Callable[[], Awaitable[Line]]


@pytest.fixture(params=["fast path", "plain server"])
async def dial(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Dial]:
    """Connect to a server that expects the header; its application tells whence a request came."""
    app = web.Application()
    app[LIMITS] = Limits(head=0.3)
    app.router.add_get("/", _whence)
    edge = Edge(app, renderers=[], default=flex.render, metrics=Metrics(), log=Log(io.StringIO()))
    listener = await _listen(app, edge, plain=request.param == "plain server")
    opened: list[Line] = []

    async def connect() -> Line:
        line = Line(*await asyncio.open_connection("127.0.0.1", listener.ports[0]))
        opened.append(line)
        return line

    yield connect
    for line in opened:
        line.writer.close()
    await listener.close()


async def _listen(app: web.Application, edge: Edge, *, plain: bool) -> Listener:
    sockets: list[socket.socket] = bind("127.0.0.1", 0)
    if not plain:
        return await listen(app, sockets, edge=edge, drain_seconds=1, proxy_protocol=True)
    app.freeze()
    server = plain_server._PlainServer(edge, app[LIMITS], proxy_protocol=True)
    listener = Listener(app, server, sockets, 1)
    loop = asyncio.get_running_loop()
    listener.acceptors.append(await loop.create_server(cast("Any", server), sock=sockets[0]))
    return listener


@pytest.mark.parametrize(("header", "source"), HEADERS)
async def test_the_header_says_the_address(dial: Dial, header: bytes, source: str | None) -> None:
    line = await dial()
    found = "2001:db8::/64" if source == "2001:db8::9" else source or "127.0.0.1"
    ask = request("GET", "/")
    await line.send(header + ask)
    for again in (b"", ask):  # the header stands once in a connection
        await line.send(again)
        status, _, body = await line.answer()
        assert (status, body) == (200, f'{{"from":"{found}"}}'.encode())


async def test_a_header_that_comes_byte_by_byte(dial: Dial) -> None:
    line = await dial()
    line.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in v2(CLIENT) + request("GET", "/"):
        await line.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await line.answer())[2] == f'{{"from":"{CLIENT}"}}'.encode()


@pytest.mark.parametrize("begin", [request("GET", "/"), b"PROXY nonsense\r\n", v2(CLIENT)[:20]])
async def test_a_connection_without_a_header_ends(dial: Dial, begin: bytes) -> None:
    line = await dial()
    await line.send(begin)
    assert b"200 OK" not in await line.ends()
