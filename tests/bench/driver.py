"""The load: a process that registers passkeys and runs logins, so many in flight, over kept
connections.

It reads one JSON command a line and answers one JSON line: how long each request and each whole
login took, in seconds, and how many failed. Its authenticators hold one P-256 key each and do no
more than sign, so that it needs less CPU than what it measures.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import statistics
import struct
import sys
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import cbor2
import orjson
import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

ORIGIN = "https://example.org"
RP_ID_HASH = hashlib.sha256(b"example.org").digest()
_UP_UV = 0x05
_AT = 0x40
_ECDSA = ec.ECDSA(hashes.SHA256())


def b64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


@dataclass(slots=True)
class Passkey:
    """A user and the key that their authenticator holds."""

    external_id: str
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    credential_id: bytes = field(default_factory=lambda: os.urandom(32))
    handle: str = ""
    counter: int = 0

    def create(self, options: dict[str, Any]) -> dict[str, Any]:
        """The answer to creation options, without attestation."""
        self.handle = options["user"]["id"]
        numbers = self.key.public_key().public_numbers()
        cose = {
            1: 2,
            3: -7,
            -1: 1,
            -2: numbers.x.to_bytes(32, "big"),
            -3: numbers.y.to_bytes(32, "big"),
        }
        data = (
            self._data(_UP_UV | _AT)
            + bytes(16)
            + struct.pack(">H", 32)
            + self.credential_id
            + cbor2.dumps(cose)
        )
        attestation = cbor2.dumps({"fmt": "none", "attStmt": {}, "authData": data})
        client = _client_data("webauthn.create", options["challenge"])
        return self._answer(
            {
                "clientDataJSON": b64(client),
                "attestationObject": b64(attestation),
                "transports": ["internal"],
            }
        )

    def get(self, options: dict[str, Any]) -> dict[str, Any]:
        """The answer to request options, signed."""
        self.counter += 1
        data, client = self._data(_UP_UV), _client_data("webauthn.get", options["challenge"])
        signature = self.key.sign(data + hashlib.sha256(client).digest(), _ECDSA)
        return self._answer(
            {
                "clientDataJSON": b64(client),
                "authenticatorData": b64(data),
                "signature": b64(signature),
                "userHandle": self.handle,
            }
        )

    def _data(self, flags: int) -> bytes:
        return RP_ID_HASH + struct.pack(">BI", flags, self.counter)

    def _answer(self, response: dict[str, Any]) -> dict[str, Any]:
        name = b64(self.credential_id)
        return {
            "id": name,
            "rawId": name,
            "type": "public-key",
            "authenticatorAttachment": "platform",
            "clientExtensionResults": {},
            "response": response,
        }


def _client_data(kind: str, challenge: str) -> bytes:
    return orjson.dumps(
        {"type": kind, "challenge": challenge, "origin": ORIGIN, "crossOrigin": False}
    )


class Failed(Exception):
    """A request that was not answered as a login needs."""


class Connection(asyncio.Protocol):
    """One kept connection; one request at a time. An answer is taken apart where it arrives: what
    the driver takes for itself stands in every latency."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = "".join(f"{k}: {v}\r\n" for k, v in {"Host": parts.netloc, **headers}.items())
        self._transport: asyncio.WriteTransport | None = None
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None  # status and content
        self._came = b""
        self._ended: Exception | None = None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: self, self._host, self._port)

    @property
    def port(self) -> int:
        """Ours, by which the process at the other end is found."""
        assert self._transport is not None, "not opened"
        return int(self._transport.get_extra_info("sockname")[1])

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._came += data
        head, end, content = self._came.partition(b"\r\n\r\n")
        if end:
            status = head[9:12]
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            if len(content) >= length:
                self._came = b""
                assert self._answer is not None, "an answer that nobody asked for"
                self._answer.set_result((status, content))
                self._answer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = exc or ConnectionResetError("the server closed the connection")
        if self._answer is not None:
            self._answer.set_exception(self._ended)

    async def post(self, path: str, body: object, headers: str = "") -> Any:
        """The answer's JSON.

        Raises:
            Failed: any status but 200 and 201.
            OSError: the connection ended.
        """
        if self._ended is not None:
            raise self._ended
        if self._transport is None:
            await self.open()
        assert self._transport is not None
        sent = orjson.dumps(body)
        head = f"POST {path} HTTP/1.1\r\n{self._head}{headers}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(head.encode() + sent)
        status, content = await answer
        if status not in (b"200", b"201"):
            raise Failed(f"{path.rpartition('/')[2]}: {status.decode()} {content[:300].decode()}")
        return orjson.loads(content)


@dataclass(slots=True)
class Run:
    """What a repetition took: seconds by step, and by whole login; and how many logins a connection
    had, by its port.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    whole: list[float] = field(default_factory=list)
    ports: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    async def step(self, name: str, request: Awaitable[Any]) -> Any:
        began = time.perf_counter()
        answer = await request
        self.steps.setdefault(name, []).append(time.perf_counter() - began)
        return answer

    def told(self) -> dict[str, Any]:
        return {
            "logins": len(self.whole),
            "failures": self.failures[:5],
            "failed": len(self.failures),
            "ports": self.ports,
            "whole": _quantiles(self.whole),
            "steps": {name: _quantiles(times) for name, times in self.steps.items()},
        }


def _quantiles(times: list[float]) -> dict[str, float]:
    if len(times) < 2:
        return {}
    cut = statistics.quantiles(times, n=100)
    return {"p50": cut[49], "p99": cut[98]}


class Driver:
    """Users with passkeys at one server."""

    def __init__(self, url: str, app_id: str, key: str) -> None:
        self._url, self._app, self._key = url, app_id, key
        self._bearer = f"Authorization: Bearer {key}\r\n"
        self._page = f"Origin: {ORIGIN}\r\n"
        self._base = f"/v1/apps/{app_id}"
        self._idle: list[Connection] = []
        self.passkeys: list[Passkey] = []
        self._made = 0
        self._turn = (
            0  # every run goes on where the last one ended, so that all users have their turn
        )

    def _free(self) -> Connection:
        return self._idle.pop() if self._idle else Connection(self._url, {})

    async def connect(self, in_flight: int) -> None:
        """New connections for the next run: servers close those that rest for a minute or so.
        Workers share them by how many each has, so those that there were are gone first."""
        for connection in self._idle:
            connection.close()
        await asyncio.sleep(0.1)  # nothing tells when the server has noticed
        self._idle = [Connection(self._url, {}) for _ in range(in_flight)]
        for connection in self._idle:
            await connection.open()

    async def run(
        self, case: str, count: int, in_flight: int, rate: int | None = None
    ) -> dict[str, Any]:
        """Run `count` logins (or registrations), `in_flight` at a time, each user once at a time.
        With a `rate` as many begin a second, and up to `in_flight` are under way: each connection
        begins one in each of its equal shares of time, at a random moment of it, or when its last
        one is done."""
        what: Callable[[Run, Connection, Passkey], Awaitable[None]] = getattr(self, f"_{case}")
        run = Run()
        left = iter(range(count))
        share = in_flight / rate if rate else 0.0
        first, self._turn = self._turn, self._turn + -(-count // in_flight)
        began = time.perf_counter()

        async def worker(mine: list[Passkey]) -> None:
            connection = self._free()
            for done, _ in enumerate(range(count // in_flight) if rate else left):
                turn = first + done
                passkey = self._new() if case == "register" else mine[turn % len(mine)]
                if rate:
                    due = began + (done + random.random()) * share
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                at = time.perf_counter()
                try:
                    await what(run, connection, passkey)
                except (Failed, OSError, KeyError) as fault:
                    run.failures.append(f"{type(fault).__name__}: {fault}")
                    connection = Connection(self._url, {})
                else:
                    run.whole.append(time.perf_counter() - at)
                    run.ports[connection.port] += 1
            self._idle.append(connection)

        await asyncio.gather(*(worker(self.passkeys[i::in_flight]) for i in range(in_flight)))
        return {**run.told(), "seconds": time.perf_counter() - began}

    def _new(self) -> Passkey:
        self._made += 1
        return Passkey(f"user-{os.getpid()}-{self._made}")

    async def _register(self, run: Run, connection: Connection, passkey: Passkey) -> None:
        opened = await run.step(
            "open",
            connection.post(
                f"{self._base}/transactions/register",
                {"external_id": passkey.external_id, "passkey_display_name": passkey.external_id},
                self._bearer,
            ),
        )
        begun = await run.step(
            "begin",
            connection.post(
                f"{self._base}/register/transactions/webauthn/start", opened, self._page
            ),
        )
        handshake = begun["handshake"]
        finished = await run.step(
            "finish",
            connection.post(
                f"{self._base}/register/transactions/webauthn/finish",
                {
                    "handshake_id": handshake["id"],
                    "handshake_response": passkey.create(handshake["challenge"]["publicKey"]),
                    "transaction_id": opened["transaction_id"],
                },
                self._page,
            ),
        )
        await run.step(
            "redeem", connection.post(f"{self._base}/authenticate/verify", finished, self._bearer)
        )
        self.passkeys.append(passkey)

    async def _flex(self, run: Run, connection: Connection, passkey: Passkey) -> None:
        opened = await run.step(
            "open",
            connection.post(
                f"{self._base}/transactions/authenticate",
                {"external_id": passkey.external_id},
                self._bearer,
            ),
        )
        handshake = await self._begin(run, connection, opened)
        finished = await run.step(
            "finish",
            connection.post(
                f"{self._base}/authenticate/transactions/webauthn/finish",
                {
                    "handshake_id": handshake["id"],
                    "handshake_response": passkey.get(handshake["challenge"]["publicKey"]),
                    "transaction_id": opened["transaction_id"],
                },
                self._page,
            ),
        )
        told = await run.step(
            "redeem", connection.post(f"{self._base}/authenticate/verify", finished, self._bearer)
        )
        if told["external_id"] != passkey.external_id:
            raise Failed("somebody else signed in")

    async def _begin(self, run: Run, connection: Connection, opened: dict[str, Any]) -> Any:
        begun = await run.step(
            "begin",
            connection.post(
                f"{self._base}/authenticate/transactions/webauthn/start", opened, self._page
            ),
        )
        return begun["handshake"]

    async def _begun(self, run: Run, connection: Connection, passkey: Passkey) -> None:
        """Half a login: a transaction and its pending ceremony, for the bytes that they take."""
        opened = await connection.post(
            f"{self._base}/transactions/authenticate",
            {"external_id": passkey.external_id},
            self._bearer,
        )
        await self._begin(run, connection, opened)

    async def _propelauth(self, run: Run, connection: Connection, passkey: Passkey) -> None:
        path = "/propelauth/run-command"
        begun = await run.step(
            "options",
            connection.post(
                path,
                {"command": "StartPasskeyAuthentication", "data": {"userId": passkey.external_id}},
                self._bearer,
            ),
        )
        answer = passkey.get(begun["authenticationOptions"])
        await run.step(
            "verify",
            connection.post(
                path,
                {
                    "command": "FinishPasskeyAuthentication",
                    "data": {"userId": passkey.external_id, "publicKey": answer},
                },
                self._bearer,
            ),
        )

    async def _hanko(self, run: Run, connection: Connection, passkey: Passkey) -> None:
        base = f"/hanko/{self._app}/login"
        key = f"apiKey: {self._key}\r\n"
        begun = await run.step(
            "options", connection.post(f"{base}/initialize", {"user_id": passkey.external_id}, key)
        )
        finished = await run.step(
            "verify",
            connection.post(f"{base}/finalize", passkey.get(begun["publicKey"]), self._page),
        )
        if finished["token"].count(".") != 2:
            raise Failed("no token")

    async def _peer(self, run: Run, connection: Connection, passkey: Passkey) -> None:
        begun = await run.step(
            "options", connection.post("/options", {"userId": passkey.external_id})
        )
        answer = {"userId": passkey.external_id, "response": passkey.get(begun)}
        told = await run.step("verify", connection.post("/verify", answer))
        if told != {"verified": True}:
            raise Failed("the peer refuses")

    async def peer_register(self, count: int) -> None:
        """Give the peer its users: it keeps credentials as we do, registration is not what is
        measured there.
        """
        connection = self._free()
        for _ in range(count):
            passkey = self._new()
            numbers = passkey.key.public_key().public_numbers()
            cose = {
                1: 2,
                3: -7,
                -1: 1,
                -2: numbers.x.to_bytes(32, "big"),
                -3: numbers.y.to_bytes(32, "big"),
            }
            await connection.post(
                "/seed",
                {
                    "userId": passkey.external_id,
                    "credentialId": b64(passkey.credential_id),
                    "publicKey": b64(cbor2.dumps(cose)),
                },
            )
            self.passkeys.append(passkey)

    def adopt(self, keys: list[str], users: list[tuple[str, str, str, int]]) -> None:
        """Be other users from now on: external id, credential id, user handle, and which key is
        theirs, of the registered passkeys whose credential ids `keys` has. The database holds
        copies of those with other ids."""
        registered = {b64(passkey.credential_id): passkey.key for passkey in self.passkeys}
        self.passkeys = [
            Passkey(external_id, registered[keys[key]], unb64(credential_id), handle)
            for external_id, credential_id, handle, key in users
        ]


async def main() -> None:
    """Answer commands until standard input ends."""
    loop = asyncio.get_running_loop()
    driver: Driver | None = None
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if command["do"] == "aim":
            driver = Driver(command["url"], command["app_id"], command["key"])
            told: dict[str, Any] = {}
        elif command["do"] == "seed":
            assert driver is not None, "aim first"
            await driver.peer_register(command["count"])
            told = {}
        elif command["do"] == "connect":
            assert driver is not None, "aim first"
            await driver.connect(command["in_flight"])
            told = {}
        elif command["do"] == "adopt":
            assert driver is not None, "aim first"
            driver.adopt(command["keys"], command["users"])
            told = {}
        else:
            assert driver is not None, "aim first"
            told = await driver.run(
                command["do"], command["count"], command["in_flight"], command.get("rate")
            )
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
