"""The vendor's browser SDK, unmodified, in a page of ours: its bundles, the host that it talks to,
and a site that uses it.

Both published versions are bundled as they come from the registry; nothing of them is patched. They
reach the broker in two ways. *Redirected*: the browser resolves auth.passage.id to a TLS listener
on loopback that passes each byte on to the broker, so the SDK runs with no word of ours in the
page, and the preflights and CORS answers are real. *Overridden*: the page sets the address on the
SDK's instance, as an app that moves would, and talks to the broker with nothing between.

The listener's address has to be known when the browser starts, and a broker is made per test: so
`Name` holds one port for the browser's life, and each test's `Doorway` listens there for its own
broker.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.browser.chromium import Page, Request
from tests.conftest import OpenApp, Started
from tests.sdk.node import bundled
from tests.support import parts
from tests.support.wire import Wire

HOST = "auth.passage.id"
PACKAGES = {"1.0.2": "@passageidentity/passage-flex-js", "0.1.3": "passage-flex-js-0.1"}

Way = Literal["redirected", "overridden"]
Outcome = dict[str, Any]  # {"nonce"}, or what the SDK's error shows


def bundle(version: str) -> bytes:
    """The SDK of this version as one ES module.

    Raises:
        MissingPart: Node, or a package of tests/sdk, is not there.
    """
    package = PACKAGES[version]
    manifest = parts.npm_packages() / package / "package.json"
    if not manifest.exists():
        raise parts.MissingPart(
            f"tests/sdk lacks the npm package {package}"
            f" (@passageidentity/passage-flex-js {version})."
        )
    assert json.loads(manifest.read_text())["version"] == version
    return bundled(package, "{ PassageFlex }")


@dataclass(frozen=True, slots=True)
class Name:
    """The host's name: a certificate for it (and the hash of its key, as the browser wants it) and
    an address that stays.
    """

    listening: socket.socket
    context: ssl.SSLContext
    key_hash: str

    @property
    def port(self) -> int:
        return int(self.listening.getsockname()[1])


@contextlib.contextmanager
def held_name(directory: Path) -> Iterator[Name]:
    """A name with a certificate by a throwaway authority, its files in `directory`; the address is
    free again at the end.
    """
    authority, key = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Throwaway CA")])
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    chain = directory / "leaf.pem"
    chain.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + leaf.public_bytes(pem)
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Name(listening, context, base64.b64encode(hashlib.sha256(spki).digest()).decode())


@dataclass(slots=True)
class Doorway:
    """Ends TLS and passes the bytes on to `port`; a broker that is gone is a connection that closes
    without an answer.
    """

    port: int
    open: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def serving(self, name: Name) -> AsyncIterator[None]:
        server = await asyncio.start_server(
            self._accept, sock=name.listening.dup(), ssl=name.context
        )
        try:
            yield
        finally:
            server.close()
            for task in self.open:
                task.cancel()
            await asyncio.gather(*self.open, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass(reader, writer))
        self.open.add(task)
        task.add_done_callback(self.open.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer.transport):
            try:
                answers, requests = await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionError:
                return
            with contextlib.closing(requests.transport):
                await asyncio.gather(_copy(reader, requests), _copy(answers, writer))


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await source.read(1 << 16):
            sink.write(chunk)
            await sink.drain()
    sink.close()


@dataclass(slots=True)
class Site:
    """A site that uses the SDK: its page, its backend (`wire`), and its broker. `stranger` is an
    origin without registration.
    """

    page: Page
    broker: Started
    wire: Wire
    doorway: Doorway
    origin: str
    stranger: str

    @property
    def broker_url(self) -> str:
        return f"http://localhost:{self.broker.service.port}"

    async def js(self, expression: str) -> Any:
        return await asyncio.to_thread(self.page.js, expression)

    async def open(
        self, version: str = "1.0.2", way: Way = "redirected", *, origin: str | None = None
    ) -> None:
        """Open the page and make the SDK's object, `pf`."""
        await asyncio.to_thread(bundle, version)  # a missing part shall fail here, by its name
        await asyncio.to_thread(self.page.goto, f"{origin or self.origin}/{version}/")
        await asyncio.to_thread(self.page.wait_until, "window.ready")
        await self.js(f"void (window.pf = new PassageFlex({json.dumps(self.wire.app_id)}))")
        if way == "overridden":
            await self.js(f"void point(pf, {json.dumps(self.broker_url)})")

    async def told(self, ceremony: str) -> Outcome:
        outcome: Outcome = await self.js(f"told({ceremony})")
        return outcome

    async def register(self, transaction: str, attachment: str | None = None) -> Outcome:
        options = f", {{authenticatorAttachment: {json.dumps(attachment)}}}" if attachment else ""
        return await self.told(f"pf.passkey.register({json.dumps(transaction)}{options})")

    async def authenticate(
        self, transaction: str | None = None, *, autofill: bool = False
    ) -> Outcome:
        options: dict[str, Any] = {"transactionId": transaction} if transaction is not None else {}
        if autofill:
            options["isConditionalMediation"] = True
        return await self.told(f"pf.passkey.authenticate({json.dumps(options) if options else ''})")

    async def enrol(self, external_id: str) -> dict[str, Any]:
        """Register a passkey for a user with the SDK; the receipt."""
        outcome = await self.register(await self.wire.open_registration(external_id))
        return await self.redeemed(outcome, purpose="register")

    async def redeemed(self, outcome: Outcome, **expected: str) -> dict[str, Any]:
        """The receipt of a ceremony that succeeded; a second redemption must fail."""
        assert list(outcome) == ["nonce"], outcome
        answer = await self.wire.redeem(outcome["nonce"], **expected)
        assert answer.status == 200, answer.body
        again = await self.wire.redeem(outcome["nonce"], **expected)
        assert (again.status, again.code) == (401, "invalid_nonce")
        receipt: dict[str, Any] = answer.json
        assert receipt["origin"] == self.origin
        assert receipt["user_verified"] is True
        return receipt

    async def devices(self, external_id: str) -> list[dict[str, Any]]:
        """The user's passkeys, as the management API lists them."""
        found = (await self.wire.keyed("GET", f"/users?identifier={external_id}&limit=1")).json[
            "users"
        ]
        listed: list[dict[str, Any]] = (
            await self.wire.keyed("GET", f"/users/{found[0]['id']}/devices")
        ).json["devices"]
        return listed

    def served(self, method: str) -> list[tuple[str, int]]:
        """Which of the app's browser routes the broker served so far, and how."""
        return [
            (line["route"].removeprefix("/v1/apps/{app_id}"), line["status"])
            for line in self.broker.log
            if line.get("method") == method and "/webauthn/" in line.get("route", "")
        ]

    def posted(self, path: str) -> list[Request]:
        return self.page.sent(path)


def body(request: Request) -> dict[str, Any]:
    assert request.body is not None
    parsed: dict[str, Any] = json.loads(request.body)
    return parsed


@contextlib.asynccontextmanager
async def opened_site(
    page: Page, broker: Started, open_app: OpenApp, name: Name
) -> AsyncIterator[Site]:
    """A site whose app has one registered origin; a second port serves the same pages from an
    origin that is not registered.
    """
    app = web.Application()
    app.router.add_get("/{version}/", _page)
    app.router.add_get("/{version}/flex.js", _sdk)
    runner = web.AppRunner(app)
    await runner.setup()
    for _ in range(2):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    origin, stranger = (f"http://localhost:{port}" for _, port in runner.addresses)
    wire = await open_app(rp_id="localhost", origins=(origin,))
    doorway = Doorway(broker.service.port)
    async with doorway.serving(name):
        yield Site(page, broker, wire, doorway, origin, stranger)
    await runner.cleanup()


async def _page(_: web.Request) -> web.Response:
    return web.Response(body=(parts.SDK / "flex.html").read_bytes(), content_type="text/html")


async def _sdk(request: web.Request) -> web.Response:
    return web.Response(body=bundle(request.match_info["version"]), content_type="text/javascript")
