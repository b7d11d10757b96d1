"""A backend and a page, speaking the Flex API to a running broker over HTTP, with a software
authenticator in hand.

    wire = await Wire.open(service)                         # an app with RP ID example.org and an
                                                            API key
    transaction = await wire.open_registration("ann")       # the backend
    nonce = await wire.register(transaction, device)        # the page
    receipt = (await wire.redeem(nonce)).json               # the backend

Each call returns what came back (`Answer`), judged or not: the happy-path methods assert their
status, `post` and `get` do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import aiohttp
import orjson

from broker.app import Service
from broker.model import Policy
from tests.support.authenticator import Authenticator, Misbehaviour, flex_wire_form

ORIGIN = "https://example.org"
RP_ID = "example.org"


class UnexpectedStatus(AssertionError):
    """An answer whose status is not the one that the caller needs."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status, answer.body)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, read to its end. `json` is None where the body is empty or no JSON."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None

    def of(self, status: int) -> Any:
        """The JSON of an answer that must have this status.

        Raises:
            UnexpectedStatus: it has another one.
        """
        if self.status != status:
            raise UnexpectedStatus(self)
        return self.json

    @property
    def code(self) -> str | None:
        """The refusal's code; every refusal has one, and a sentence."""
        assert isinstance(self.json, dict), self.body
        assert isinstance(self.json.get("error"), str), self.body
        assert self.json["error"], self.body
        return str(self.json["code"])


@dataclass(slots=True)
class Wire:
    """One app of a running broker. `url` is where pages and keyed callers reach it."""

    session: aiohttp.ClientSession
    url: str
    app_id: str
    key: str

    @classmethod
    async def open(
        cls,
        service: Service,
        session: aiohttp.ClientSession,
        *,
        policy: Policy | None = None,
        origins: tuple[str, ...] = (ORIGIN,),
        rp_id: str = RP_ID,
    ) -> Wire:
        """Make an app in the broker's stores."""
        app, key = await service.parts.directory.create_app(
            "Example", rp_id, origins, policy=policy
        )
        return cls(session, f"http://127.0.0.1:{service.port}", app.id, key)

    @property
    def base(self) -> str:
        return f"{self.url}/v1/apps/{self.app_id}"

    async def send(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request to a path below the app, or to a whole URL."""
        url = path if path.startswith("http") else self.base + path
        body = orjson.dumps(json) if json is not None else data
        async with self.session.request(
            method, url, data=body, headers={"Content-Type": "application/json", **(headers or {})}
        ) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def keyed(
        self,
        method: str,
        path: str,
        json: object = None,
        *,
        data: bytes | None = None,
        key: str | None = None,
    ) -> Answer:
        """As the backend."""
        return await self.send(
            method,
            path,
            json=json,
            data=data,
            headers={"Authorization": f"Bearer {key or self.key}"},
        )

    async def page(
        self,
        path: str,
        json: object = None,
        *,
        data: bytes | None = None,
        origin: str | None = ORIGIN,
    ) -> Answer:
        """As the page: POST."""
        return await self.send(
            "POST", path, json=json, data=data, headers={"Origin": origin} if origin else {}
        )

    # -- the backend -------------------------------------------------------------------------------

    async def open_registration(self, external_id: str, name: str = "Ann's passkey") -> str:
        answer = await self.keyed(
            "POST",
            "/transactions/register",
            {"external_id": external_id, "passkey_display_name": name},
        )
        return str(answer.of(201)["transaction_id"])

    async def open_authentication(self, external_id: str) -> str:
        answer = await self.keyed(
            "POST", "/transactions/authenticate", {"external_id": external_id}
        )
        return str(answer.of(201)["transaction_id"])

    async def redeem(self, nonce: str, **expected: object) -> Answer:
        return await self.keyed("POST", "/authenticate/verify", {"nonce": nonce, **expected})

    # -- the page ----------------------------------------------------------------------------------

    async def begin(
        self, kind: str, transaction: str | None, **more: object
    ) -> tuple[str, dict[str, Any]]:
        """`kind` is "register" or "authenticate". Returns the handshake's id and the options."""
        body = {**({"transaction_id": transaction} if transaction else {}), **more}
        answer = await self.page(f"/{kind}/transactions/webauthn/start", body)
        handshake = answer.of(200)["handshake"]
        return handshake["id"], handshake["challenge"]["publicKey"]

    async def finish(
        self,
        kind: str,
        handle: str,
        response: object,
        transaction: str | None = None,
        **more: object,
    ) -> Answer:
        body = {"handshake_id": handle, "handshake_response": response, **more}
        if transaction is not None:
            body["transaction_id"] = transaction
        return await self.page(f"/{kind}/transactions/webauthn/finish", body)

    async def register(
        self, transaction: str, device: Authenticator, **misbehaviour: Unpack[Misbehaviour]
    ) -> str:
        """Run a whole registration and return the nonce."""
        handle, options = await self.begin("register", transaction)
        response = flex_wire_form(device.register(options, ORIGIN, **misbehaviour))
        answer = await self.finish("register", handle, response, transaction)
        return str(answer.of(200)["nonce"])

    async def authenticate(
        self, transaction: str | None, device: Authenticator, **misbehaviour: Unpack[Misbehaviour]
    ) -> str:
        """Run a whole authentication (discoverable without a transaction) and return the nonce."""
        handle, options = await self.begin("authenticate", transaction)
        answer = await self.finish(
            "authenticate",
            handle,
            device.authenticate(options, ORIGIN, **misbehaviour),
            transaction,
        )
        return str(answer.of(200)["nonce"])

    async def user(self, external_id: str, device: Authenticator) -> str:
        """A user with a passkey on `device`; returns the passkey's id."""
        nonce = await self.register(await self.open_registration(external_id), device)
        return str((await self.redeem(nonce)).json["passkey_id"])
