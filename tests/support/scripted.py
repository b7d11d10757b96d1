"""A scripted broker, which the client's tests run against: it notes what it is sent and answers as
it is told.

The server stands in for the broker, never for the client. `Caller` calls the blocking client and
the asynchronous one alike.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from broker.sdk.passkey_broker import AsyncBrokerClient, BrokerClient

APP = "A" * 24
KEY = "pbk_" + "k" * 43
KINDS: list[type[BrokerClient] | type[AsyncBrokerClient]] = [BrokerClient, AsyncBrokerClient]


@dataclass
class Seen:
    """One request as the server got it; `target` is the raw path with its query."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class ScriptedBroker:
    """Answers the n-th request with the n-th line of its script; a request too many gets 404
    `script_over`.
    """

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    script: list[Handler] = field(default_factory=list)

    def says(self, status: int, body: Any = None, **headers: str) -> ScriptedBroker:
        """Add a line: `body` is sent as JSON, bytes as they are."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        content = (
            body
            if isinstance(body, bytes)
            else json.dumps(body).encode()
            if body is not None
            else b""
        )

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(status=status, body=content, headers=names)

        return self.does(answer)

    def does(self, handler: Handler) -> ScriptedBroker:
        self.script.append(handler)
        return self

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append(
            Seen(request.method, request.raw_path, dict(request.headers), await request.read())
        )
        if not self.script:
            return web.json_response(
                {"code": "script_over", "error": "One request too many."}, status=404
            )
        return await self.script.pop(0)(request)


@asynccontextmanager
async def scripted_broker(
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[ScriptedBroker]:
    """A server on a free port of loopback."""
    broker = ScriptedBroker()
    runner = web.ServerRunner(web.Server(broker.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context)
    await site.start()
    scheme = "http" if ssl_context is None else "https"
    broker.url = f"{scheme}://127.0.0.1:{runner.addresses[0][1]}"
    yield broker
    await runner.cleanup()


class Caller:
    """Calls either client by method name, without blocking the loop that runs the server."""

    def __init__(self, client: BrokerClient | AsyncBrokerClient) -> None:
        self.client = client

    async def __call__(self, method: str, *args: Any, **named: Any) -> Any:
        bound = getattr(self.client, method)
        if isinstance(self.client, AsyncBrokerClient):
            return await bound(*args, **named)
        return await asyncio.to_thread(bound, *args, **named)
