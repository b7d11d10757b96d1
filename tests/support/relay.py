"""A relay in front of a server: forwards bytes, plain or through TLS (`relay`)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.proxy import Connect


@dataclass(slots=True)
class Door:
    """The relay's port on loopback, the URL of a Redis behind it, and its connections. With
    `loses` the next answer of the server is lost: its connection ends instead.
    """

    port: int = 0
    url: str = ""
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    connections: int = 0
    loses: bool = False

    def close(self) -> None:
        for writer in self.open:
            writer.close()


@contextlib.asynccontextmanager
async def relay(connect: Connect, certificate: Path | None = None) -> AsyncIterator[Door]:
    """A relay to what `connect` reaches. With a certificate, it ends TLS."""
    made, tasks = Door(), set[asyncio.Task[None]]()
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(65536):
                if answers and made.loses:
                    made.loses = False
                    break
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        made.connections += 1
        made.open.add(writer)
        upstream = await connect()
        await asyncio.gather(pump(reader, upstream[1]), pump(upstream[0], writer, answers=True))
        made.open.discard(writer)
        tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    made.port = server.sockets[0].getsockname()[1]
    address = f"127.0.0.1:{made.port}"
    made.url = (
        f"rediss://{address}/?ssl_ca_certs={certificate}" if context else f"redis://{address}"
    )
    try:
        yield made
    finally:
        server.close()
        made.close()
        if tasks:
            await asyncio.wait(tasks)
