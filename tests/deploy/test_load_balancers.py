"""Three brokers behind the load balancers that `deploy/` configures."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

import aiohttp
import pytest
import yarl

from broker.app import application
from tests.conftest import Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.load_balancers import (
    DEPLOY,
    LoadBalancer,
    haproxy,
    nginx,
    nginx_command,
    variables,
)
from tests.support.parts import program
from tests.support.processes import DEADLINE, free_port
from tests.support.wire import Wire

Balance = Callable[..., AbstractContextManager[LoadBalancer]]
HSTS = "max-age=63072000"
KINDS: dict[str, Balance] = {"haproxy": haproxy, "nginx": nginx}


@pytest.fixture(params=KINDS)
def balance(request: pytest.FixtureRequest) -> Balance:
    return KINDS[request.param]


@pytest.fixture
async def brokers(start_broker: Starter) -> list[Started]:
    """Three brokers, each with a management port."""
    return [await start_broker(management_port=free_port()) for _ in range(3)]


@pytest.fixture
async def proxy(
    balance: Balance, brokers: list[Started], tmp_path: Path
) -> AsyncIterator[LoadBalancer]:
    pages = [each.service.port for each in brokers]
    management = [each.service.management_port for each in brokers]
    with balance(tmp_path, pages=pages, management=management) as running:
        yield running


@pytest.fixture
async def client(proxy: LoadBalancer) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(ssl=proxy.trust, limit=0)
    async with aiohttp.ClientSession(connector=connector) as opened:
        yield opened


@dataclass(slots=True)
class Dying:
    """A server in a broker's place: ready, answers `/answered`, and closes the connection when it
    has read any other request. `heads` are those requests.
    """

    port: int = 0
    heads: list[str] = field(default_factory=list)
    ready: bool = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)^content-length: (\d+)\r$", head, re.M)
                await reader.readexactly(int(length[1]) if length else 0)
                if not ("/health/ready " in head or "/answered " in head):
                    self.heads.append(head)
                    break
                status = "200 OK" if self.ready else "503 Service Unavailable"
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        writer.close()


@pytest.fixture
async def dying() -> AsyncIterator[list[Dying]]:
    """Three of them."""
    made = [Dying() for _ in range(3)]
    servers = [await asyncio.start_server(each.serve, "127.0.0.1", 0) for each in made]
    for each, server in zip(made, servers, strict=True):
        each.port = server.sockets[0].getsockname()[1]
    yield made
    for server in servers:
        server.close()


async def curl(proxy: LoadBalancer, *words: str) -> list[str]:
    """The statuses of the answers to a curl with these arguments, `000` for none."""
    argv = [program("curl"), "--silent", "--max-time", "20", "--write-out", "%{http_code}\n"]
    argv += ["--output", "/dev/null", "--cacert", proxy.given["TLS_CERTIFICATE"], *words]
    urls = [word for word in words if word.startswith("https:")]
    argv += ["--output", "/dev/null"] * (len(urls) - 1)
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    written, _ = await process.communicate()
    return written.decode().split()


def test_both_accept_their_files_without_a_warning(tmp_path: Path) -> None:
    given = variables(tmp_path, pages=[1, 2, 3], management=[4, 5, 6])
    for argv in (
        [program("haproxy"), "-c", "-f", str(DEPLOY / "haproxy.cfg")],
        [*nginx_command(tmp_path, given), "-t"],
    ):
        done = subprocess.run(
            argv, env=os.environ | given, capture_output=True, text=True, check=False
        )
        judged = re.findall(r"(?i)warn|alert|emerg", done.stdout + done.stderr)
        assert (done.returncode, judged) == (0, []), done.stderr


async def test_people_sign_in_through_it(
    brokers: list[Started],
    proxy: LoadBalancer,
    client: aiohttp.ClientSession,
    device: Authenticator,
) -> None:
    """Pages and backend each at their own address, and every broker takes part."""
    wire = await Wire.open(brokers[0].service, client)
    page = replace(wire, url=f"https://localhost:{proxy.pages}")
    backend = replace(wire, url=f"https://localhost:{proxy.management}")
    transaction = await backend.open_registration("ann")
    nonce = await page.register(transaction, device)
    assert (await backend.redeem(nonce)).of(200)["external_id"] == "ann"
    for _ in range(3):
        nonce = await page.authenticate(await backend.open_authentication("ann"), device)
        assert (await backend.redeem(nonce)).of(200)["purpose"] == "authenticate"
        assert (await backend.redeem(nonce)).status == 401
    for each in brokers:
        assert [line for line in each.log if line["event"] == "request"]


async def test_keyed_routes_and_metrics_are_not_exposed(
    brokers: list[Started], proxy: LoadBalancer, client: aiohttp.ClientSession
) -> None:
    """Each route of the management port, called with a valid key at the address for pages."""
    wire = await Wire.open(brokers[0].service, client)
    parts = brokers[0].parts
    exposed = application(parts, management=False, browser=True).router.routes()
    told = {(route.method, route.resource.canonical) for route in exposed if route.resource}
    called = 0
    for route in application(parts, management=True, browser=False).router.routes():
        assert route.resource
        if (route.method, route.resource.canonical) in told or route.method in ("HEAD", "*"):
            continue
        path = re.sub(r"\{[^}]*\}", "x", route.resource.canonical.replace("{app_id}", wire.app_id))
        keys = {"Authorization": f"Bearer {wire.key}", "apiKey": wire.key}
        answer = await client.request(
            route.method, f"https://localhost:{proxy.pages}{path}", json={}, headers=keys
        )
        assert answer.status in (403, 404, 405), (route.method, path, await answer.text())
        called += 1
    assert called > 40
    for port in (proxy.pages, proxy.management):
        for path in ("/metrics", "/%6detrics", "//metrics", "/health/live", "/health/ready"):
            url = yarl.URL(f"https://localhost:{port}{path}", encoded=True)
            assert (await client.get(url)).status == 404, path


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_a_request_that_a_broker_has_read_is_not_repeated(
    balance: Balance, dying: list[Dying], tmp_path: Path, version: str
) -> None:
    """Neither by the proxy nor by curl, which sends again what a proxy calls unprocessed. The
    request is the first of its connection, or the second. nginx leaves each broker that died, so
    no port meets more than three.
    """
    ports = [each.port for each in dying]
    with balance(tmp_path, pages=ports, management=ports) as proxy:
        pages, management = (f"https://localhost:{n}" for n in (proxy.pages, proxy.management))
        post = ["--data", "{}"]
        finish = f"{pages}/v1/apps/x/authenticate/transactions/webauthn/finish"
        principal = f"{management}/v2/{'A' * 24}/principal/x"
        for words in (
            [*post, finish],
            [*post, f"{pages}/answered", finish],
            [principal],
            [f"{management}/answered", principal],
            [*post, f"{management}/answered", f"{management}/v1/apps/x/authenticate/verify"],
        ):
            for each in dying:
                each.heads.clear()
            statuses = await curl(proxy, version, *words)
            assert sum(len(each.heads) for each in dying) == 1, words
            assert statuses[-1] == "502"


async def test_headers_of_proxies_come_from_it_alone(
    balance: Balance, dying: list[Dying], tmp_path: Path
) -> None:
    ports = [each.port for each in dying]
    forged = {
        "X-Forwarded-For": "192.0.2.1",
        "X-Forwarded-Proto": "gopher",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "for=192.0.2.1",
    }
    with balance(tmp_path, pages=ports, management=ports) as proxy:
        connector = aiohttp.TCPConnector(ssl=proxy.trust)
        async with aiohttp.ClientSession(connector=connector) as client:
            for port in (proxy.pages, proxy.management):
                await client.post(f"https://localhost:{port}/x", headers=forged)
    heads = [head for each in dying for head in each.heads]
    for head in heads:
        lines = [line.lower() for line in head.split("\r\n") if "orwarded" in line.lower()]
        assert sorted(lines) == ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: https"]
    assert len(heads) == 2


async def test_a_broker_that_is_gone_costs_no_request(
    brokers: list[Started],
    proxy: LoadBalancer,
    client: aiohttp.ClientSession,
    device: Authenticator,
) -> None:
    wire = await Wire.open(brokers[0].service, client)
    page = replace(wire, url=f"https://localhost:{proxy.pages}")
    backend = replace(wire, url=f"https://localhost:{proxy.management}")
    nonce = await page.register(await backend.open_registration("ann"), device)
    assert (await backend.redeem(nonce)).status == 200
    await brokers[2].service.close()
    for _ in range(3):
        nonce = await page.authenticate(await backend.open_authentication("ann"), device)
        assert (await backend.redeem(nonce)).status == 200


async def test_haproxy_sends_nothing_to_a_broker_that_is_not_ready(
    dying: list[Dying], tmp_path: Path
) -> None:
    """HAProxy's own metrics tell when it has noticed."""
    ports = [each.port for each in dying]
    dying[0].ready = False
    down = 'haproxy_server_status{proxy="pages",server="broker-1",state="DOWN"} 1'
    with haproxy(tmp_path, pages=ports, management=ports) as proxy:
        connector = aiohttp.TCPConnector(ssl=proxy.trust)
        async with aiohttp.ClientSession(connector=connector) as client, asyncio.timeout(DEADLINE):
            scraped = ""
            while down not in scraped:
                await asyncio.sleep(0.02)  # between two looks
                answer = await client.get(f"http://127.0.0.1:{proxy.metrics}/metrics")
                scraped = await answer.text()
            for _ in range(6):
                await client.post(f"https://localhost:{proxy.pages}/x")
    assert [len(each.heads) for each in dying] == [0, 3, 3]


async def test_a_body_above_64_kib_is_refused(
    brokers: list[Started], proxy: LoadBalancer, client: aiohttp.ClientSession
) -> None:
    url = f"https://localhost:{proxy.pages}/v1/apps/{'A' * 24}/authenticate/verify"
    assert (await client.post(url, data=b"x" * 65_537)).status == 413
    assert [line for each in brokers for line in each.log if line["event"] == "request"] == []


@dataclass(slots=True)
class Client:
    """A connection to the port for pages, with the client's address in the PROXY protocol."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, proxy: LoadBalancer, address: str) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.pages)
        version = ip_address(address).version
        writer.write(f"PROXY TCP{version} {address} {address} 1 443\r\n".encode())
        await writer.start_tls(proxy.trust, server_hostname="localhost")
        return cls(reader, writer)

    async def ask(self, *head: str) -> list[str]:
        """The lines of the answer's head, none where the connection ends."""
        self.writer.write("\r\n".join((*head, "Host: localhost", "", "")).encode())
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        return []


# Addresses of clients and whether a request of each is answered, with 2 for each client.
CLIENTS = [
    ("192.0.2.1", True),
    ("192.0.2.1", True),
    ("192.0.2.1", False),
    ("192.0.2.2", True),
    ("2001:db8::1", True),
    ("2001:db8::ff:0:0:2", True),
    ("2001:db8::3", False),
    ("2001:db8:0:1::1", True),
    *((f"::ffff:198.51.100.{number}", True) for number in range(3)),
]


async def test_haproxy_limits_the_connections_of_an_address_or_a_64(
    dying: list[Dying], tmp_path: Path
) -> None:
    """Behind the PROXY protocol, so rules on connections become rules on sessions."""
    changed = (
        (DEPLOY / "haproxy.cfg")
        .read_text()
        .replace("tcp-request connection", "tcp-request session")
    )
    changed = changed.replace('bind "${PAGES_BIND}" ssl', 'bind "${PAGES_BIND}" accept-proxy ssl')
    (tmp_path / "haproxy.cfg").write_text(changed)
    ports = [each.port for each in dying]
    limit = {"CONNECTIONS_PER_ADDRESS": "2"}
    with haproxy(tmp_path, tmp_path / "haproxy.cfg", limit, pages=ports, management=ports) as proxy:
        clients, heads = [], []
        for address, _ in CLIENTS:
            clients.append(await Client.open(proxy, address))
            heads.append(await clients[-1].ask("GET /answered HTTP/1.1"))
        for client in clients:
            client.writer.close()
    assert ["http/1.1 200 ok" in head for head in heads] == [answered for _, answered in CLIENTS]


async def test_nginx_limits_the_requests_of_an_address_or_a_64(
    dying: list[Dying], tmp_path: Path
) -> None:
    """nginx asks for a body with status 100 where the limit permits the request."""
    changed = (DEPLOY / "nginx.conf").read_text().replace("addresses 500", "addresses 2")
    changed = changed.replace("${PAGES_BIND} ssl", "${PAGES_BIND} proxy_protocol ssl")
    trusted = "set_real_ip_from 127.0.0.1; real_ip_header proxy_protocol;"
    changed = changed.replace("    upstream pages {", f"    {trusted}\n    upstream pages {{")
    (tmp_path / "template").write_text(changed)
    ports = [each.port for each in dying]
    with nginx(tmp_path, tmp_path / "template", pages=ports, management=ports) as proxy:
        clients = []
        head = ("POST /answered HTTP/1.1", "Content-Length: 1", "Expect: 100-continue")
        for address, answered in CLIENTS:
            clients.append(await Client.open(proxy, address))
            first, *others = await clients[-1].ask(*head)
            assert first.split()[1] == ("100" if answered else "429"), address
            assert answered or {"retry-after: 1", f"strict-transport-security: {HSTS}"} <= {*others}
        for client in clients:
            client.writer.close()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113 §4.1)."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags))
    return head + stream.to_bytes(4, "big") + payload


async def test_haproxy_limits_the_requests_of_an_address_on_one_connection(
    dying: list[Dying], tmp_path: Path
) -> None:
    """Three whose bodies are not there yet, with 2 for each client."""
    ports = [each.port for each in dying]
    limit = {"REQUESTS_PER_ADDRESS": "2"}
    fields = {":method": "POST", ":path": "/x", ":scheme": "https", ":authority": "localhost"}
    fields["content-length"] = "1"
    head = b"".join(  # RFC 7541 §6.2.2
        bytes((0, len(name))) + name.encode() + bytes((len(text),)) + text.encode()
        for name, text in fields.items()
    )
    with haproxy(tmp_path, changed=limit, pages=ports, management=ports) as proxy:
        trust = proxy.trust
        trust.set_alpn_protocols(["h2"])
        reader, writer = await asyncio.open_connection(
            "localhost", proxy.pages, ssl=trust, family=socket.AF_INET
        )
        answers: dict[int, bytes] = {}

        async def read_answers(number: int) -> None:
            async with asyncio.timeout(DEADLINE):
                while len(answers) < number:
                    read = await reader.readexactly(9)
                    payload = await reader.readexactly(int.from_bytes(read[:3], "big"))
                    if read[3] == 1:
                        answers[int.from_bytes(read[5:], "big")] = payload

        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        writer.write(b"".join(frame(1, 4, stream, head) for stream in (1, 3, 5)))
        await read_answers(1)
        ((refused, answer),) = answers.items()
        assert b"\x48\x03429\x75\x011" in answer  # :status 429, retry-after 1
        writer.write(b"".join(frame(0, 1, s, b"x") for s in (1, 3, 5) if s != refused))
        await read_answers(3)
        writer.close()
    assert sum(len(each.heads) for each in dying) == 2


async def test_haproxy_tells_when_to_come_back(tmp_path: Path) -> None:
    """Where no broker answers."""
    ports = [free_port() for _ in range(3)]
    with haproxy(tmp_path, pages=ports, management=ports) as proxy:
        connector = aiohttp.TCPConnector(ssl=proxy.trust)
        async with aiohttp.ClientSession(connector=connector) as client:
            for port in (proxy.pages, proxy.management):
                answer = await client.post(f"https://localhost:{port}/x")
                assert (answer.status, answer.headers.get("Retry-After")) == (503, "2")


async def test_pages_leave_connections_of_haproxy_to_backends(
    dying: list[Dying], tmp_path: Path
) -> None:
    ports = [each.port for each in dying]
    limits = {"CONNECTIONS": "20", "PAGES_CONNECTIONS": "10"}
    with haproxy(tmp_path, changed=limits, pages=ports, management=ports) as proxy:
        opened = [await asyncio.open_connection("127.0.0.1", proxy.pages) for _ in range(20)]
        # HAProxy ends connections without a request after 10 seconds.
        url = f"https://localhost:{proxy.management}/answered"
        statuses = await curl(proxy, "--max-time", "5", url)
        for _, writer in opened:
            writer.close()
    assert statuses == ["200"]
