"""Load generator: a process that registers passkeys and runs logins over kept connections.

A closed loop: each of K connections begins its next login when its last one is done, unless a rate
is given. Commands and answers are JSON lines. The software authenticators only sign, so that the
generator takes less CPU than the server under measurement.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cbor2
import orjson
import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.authenticator import ES256, Authenticator, b64, cose_key, unb64

ORIGIN = "https://example.org"
_CLIENT_DATA = f'{{"type":"webauthn.get","challenge":"%s","origin":"{ORIGIN}","crossOrigin":false}}'
_RP_ID_HASH = hashlib.sha256(b"example.org").digest()
_FLAGS = 0x1D  # UP, UV, BE and BS, as in the authenticator's registrations
MOST_FAILED = 0.1  # of the logins, beside one for each connection; a run ends above it
_ECDSA = ec.ECDSA(hashes.SHA256())


@dataclass(slots=True)
class Passkey:
    """A user with the key pair of their authenticator."""

    external_id: str
    key: ec.EllipticCurvePrivateKey
    credential_id: bytes
    handle: str = ""
    counter: int = 1

    def get(self, options: dict[str, Any]) -> dict[str, Any]:
        """The answer to request options. Half the CPU of the tests' authenticator, which can do
        more: the generator must not be what limits a closed loop.
        """
        self.counter += 1
        client = (_CLIENT_DATA % options["challenge"]).encode()
        data = _RP_ID_HASH + struct.pack(">BI", _FLAGS, self.counter)
        name = b64(self.credential_id)
        return {
            "id": name,
            "rawId": name,
            "type": "public-key",
            "authenticatorAttachment": "platform",
            "clientExtensionResults": {},
            "response": {
                "clientDataJSON": b64(client),
                "authenticatorData": b64(data),
                "signature": b64(self.key.sign(data + hashlib.sha256(client).digest(), _ECDSA)),
                "userHandle": self.handle,
            },
        }


class Failed(Exception):
    """A request was refused, or its answer is wrong."""


class Connection(asyncio.Protocol):
    """A kept HTTP connection with one request at a time.

    Answers are parsed where they arrive: the generator's own time is part of every latency.
    """

    _transport: asyncio.WriteTransport

    def __init__(self, steps: dict[str, list[float]]) -> None:
        self._steps = steps
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None  # status and content
        self._received = b""
        self._lost: Exception | None = None

    async def open(self, url: str) -> Connection:
        self._host = url.removeprefix("http://")
        name, _, port = self._host.partition(":")
        make = asyncio.get_running_loop().create_connection
        self._transport, _ = await make(lambda: self, name, int(port))
        self.close = self._transport.close
        return self

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, content = self._received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if end and len(content) >= length:
            self._received = b""
            assert self._answer is not None, "an answer without a request"
            self._answer.set_result((head[9:12], content))
            self._answer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = exc or ConnectionResetError("the server closed the connection")
        if self._answer is not None:
            self._answer.set_exception(self._lost)

    async def post(self, step: str, path: str, body: object, headers: str = "") -> Any:
        """Send a request, keep its time under the name of the step, and return the JSON answer.

        Raises:
            Failed: any status but 200 and 201.
            OSError: the connection ended.
        """
        if self._lost is not None:
            raise self._lost
        began = time.perf_counter()
        sent = orjson.dumps(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\n{headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        )
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(head.encode() + sent)
        status, content = await answer
        if status not in (b"200", b"201"):
            raise Failed(f"{step}: {status.decode()} {content[:300].decode()}")
        self._steps.setdefault(step, []).append(time.perf_counter() - began)
        return orjson.loads(content)


class Driver:
    """Users with passkeys at one server, and the flows that sign them in."""

    def __init__(self, url: str, app_id: str, key: str) -> None:
        self._url, self._native = url, f"/v1/apps/{app_id}"
        self._hanko_login = f"/hanko/{app_id}/login"
        self._key, self._bearer = f"apiKey: {key}\r\n", f"Authorization: Bearer {key}\r\n"
        self._page = f"Origin: {ORIGIN}\r\n"
        self._passkeys: list[Passkey] = []
        self._next = 0  # turns continue where the last one ended, so that all users sign in

    async def run(
        self, flow: str, in_flight: int, seconds: float = 0, count: int = 0, rate: float = 0
    ) -> dict[str, Any]:
        """Run a flow for some seconds, or until it succeeded `count` times; latencies in seconds.

        With a `rate` so many logins begin a second, at random moments (Poisson arrivals).
        A store that pauses on a busy machine makes a login fail with 503. Failures are counted.
        """
        steps: dict[str, list[float]] = {}
        whole: list[float] = []
        failures: list[str] = []
        connections = [await Connection(steps).open(self._url) for _ in range(in_flight)]
        began, first = time.perf_counter(), self._next

        async def worker(index: int, connection: Connection) -> None:
            # A user signs in over one connection only: two ceremonies of one user would collide.
            users = self._passkeys[index::in_flight]
            done, due = 0, began
            while len(failures) <= in_flight + MOST_FAILED * len(whole) and (
                len(whole) < count if count else time.perf_counter() - began < seconds
            ):
                if rate:
                    due += random.expovariate(rate / in_flight)
                    await asyncio.sleep(due - time.perf_counter())
                at = time.perf_counter()
                try:
                    if flow in ("register", "seed"):
                        await getattr(self, f"_{flow}")(connection, f"user-{os.urandom(8).hex()}")
                    else:
                        user = users[(first + done) % len(users)]
                        await getattr(self, f"_{flow}")(connection, user)
                except (Failed, OSError, KeyError) as fault:
                    failures.append(f"{type(fault).__name__}: {fault}")
                    if not isinstance(fault, Failed):
                        connection = connections[index] = await Connection(steps).open(self._url)
                else:
                    whole.append(time.perf_counter() - at)
                done += 1
            self._next = max(self._next, first + done)

        await asyncio.gather(*(worker(*each) for each in enumerate(connections)))
        elapsed = time.perf_counter() - began
        for connection in connections:
            connection.close()
        return {
            "logins": len(whole),
            "seconds": elapsed,
            "failed": len(failures),
            "failure": failures[0] if failures else "",
            "latency": {name: _quantiles(at) for name, at in {"login": whole, **steps}.items()},
        }

    def adopt(self, keys: list[str], users: list[tuple[str, str, str, int]]) -> dict[str, Any]:
        """Replace the users by copies in the database: external id, credential id, user handle,
        and the index in `keys` of the registered credential whose key pair the copy has.
        """
        registered = {b64(passkey.credential_id): passkey.key for passkey in self._passkeys}
        self._passkeys = [
            Passkey(external_id, registered[keys[key]], unb64(credential_id), handle)
            for external_id, credential_id, handle, key in users
        ]
        return {}

    async def _register(self, to: Connection, user: str) -> None:
        device = Authenticator(algorithms=(ES256,))
        body = {"external_id": user, "passkey_display_name": user}
        opened = await to.post("open", f"{self._native}/transactions/register", body, self._bearer)
        path = f"{self._native}/register/transactions/webauthn"
        await self._ceremony(to, path, opened, lambda options: device.register(options, ORIGIN))
        (held,) = device.held.values()
        assert isinstance(held.key, ec.EllipticCurvePrivateKey)
        self._passkeys.append(Passkey(user, held.key, held.id, b64(held.user_handle)))

    async def _flex(self, to: Connection, passkey: Passkey) -> None:
        path, body = (
            f"{self._native}/transactions/authenticate",
            {"external_id": passkey.external_id},
        )
        opened = await to.post("open", path, body, self._bearer)
        path = f"{self._native}/authenticate/transactions/webauthn"
        told = await self._ceremony(to, path, opened, passkey.get)
        if told["external_id"] != passkey.external_id:
            raise Failed("redeem: the external id of another user")

    async def _ceremony(
        self, to: Connection, path: str, opened: Any, sign: Callable[[Any], Any]
    ) -> Any:
        begun = (await to.post("begin", f"{path}/start", opened, self._page))["handshake"]
        answer = {
            "handshake_id": begun["id"],
            "handshake_response": sign(begun["challenge"]["publicKey"]),
            "transaction_id": opened["transaction_id"],
        }
        nonce = await to.post("finish", f"{path}/finish", answer, self._page)
        return await to.post("redeem", f"{self._native}/authenticate/verify", nonce, self._bearer)

    async def _propelauth(self, to: Connection, passkey: Passkey) -> None:
        path, user = "/propelauth/run-command", {"userId": passkey.external_id}
        body = {"command": "StartPasskeyAuthentication", "data": user}
        begun = await to.post("options", path, body, self._bearer)
        data = {**user, "publicKey": passkey.get(begun["authenticationOptions"])}
        body = {"command": "FinishPasskeyAuthentication", "data": data}
        await to.post("verify", path, body, self._bearer)

    async def _hanko(self, to: Connection, passkey: Passkey) -> None:
        path, user = self._hanko_login, {"user_id": passkey.external_id}
        begun = await to.post("options", f"{path}/initialize", user, self._key)
        answer = passkey.get(begun["publicKey"])
        if not (await to.post("verify", f"{path}/finalize", answer, self._page))["token"]:
            raise Failed("verify: no token")

    async def _node(self, to: Connection, passkey: Passkey) -> None:
        begun = await to.post("options", "/options", {"userId": passkey.external_id})
        answer = {"userId": passkey.external_id, "response": passkey.get(begun)}
        if await to.post("verify", "/verify", answer) != {"verified": True}:
            raise Failed("verify: refused")

    async def _seed(self, to: Connection, user: str) -> None:
        """Give the Node peer a credential: its registration is not measured."""
        passkey = Passkey(user, ec.generate_private_key(ec.SECP256R1()), os.urandom(32))
        public = b64(cbor2.dumps(cose_key(passkey.key, ES256)))
        body = {"userId": user, "credentialId": b64(passkey.credential_id), "publicKey": public}
        await to.post("seed", "/seed", body)
        self._passkeys.append(passkey)


def _quantiles(times: list[float]) -> dict[str, float]:
    cut = statistics.quantiles(times, n=100) if len(times) > 1 else times * 99
    return {"p50": cut[49], "p99": cut[98]}


async def main(url: str, app_id: str, key: str) -> None:
    """Answer commands until standard input ends."""
    driver = Driver(url, app_id, key)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        if command.pop("do") == "run":
            told = await driver.run(**command)
        else:
            told = driver.adopt(**command)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
