"""Proxies on the loopback between the broker and a store, which lose what a network can lose.

`RedisProxy` understands commands: it counts them (`commands`), forwards one at a time on a
connection, and asks `fate` what becomes of each. `PostgresProxy` counts the client's messages and
falls silent after `silent_after` of them. Both
forward everything else untouched.

    Fate.PASS      forward the command and its reply
    Fate.SWALLOW   forward the command; its reply never comes, the connection stays open
    Fate.CUT       forward the command; the connection is closed in place of its reply, after the
                   store has answered
    Fate.REFUSE    close the connection; the command never reaches the store
    Fate.HOLD      forward the command; its reply waits until `release` is set
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import hiredis

_BACKEND_KEY = re.compile(
    rb"(K\0\0\0\x0c)....", re.S
)  # PostgreSQL's BackendKeyData: a process, a secret

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]


class Fate(enum.Enum):
    PASS = enum.auto()
    SWALLOW = enum.auto()
    CUT = enum.auto()
    REFUSE = enum.auto()
    HOLD = enum.auto()


def _pass(_: list[bytes]) -> Fate:
    return Fate.PASS


def of_command(fate: Fate, *prefix: bytes) -> Callable[[list[bytes]], Fate]:
    """This fate for commands whose name is the first word (in any case) and whose key or digest
    begins with the second.
    """

    def decide(words: list[bytes]) -> Fate:
        named = words[0].upper() == prefix[0] and (
            len(prefix) < 2 or words[1].startswith(prefix[1])
        )
        return fate if named else Fate.PASS

    return decide


@dataclass(slots=True)
class RedisProxy:
    """Made by `redis_proxy`. `commands` are those that clients sent, in order of arrival; `ports`
    has one for each server."""

    ports: list[int] = field(default_factory=list)
    commands: list[list[bytes]] = field(default_factory=list)
    fate: Callable[[list[bytes]], Fate] = _pass
    release: asyncio.Event = field(default_factory=asyncio.Event)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    clients: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def port(self) -> int:
        """The port, where it is one."""
        (port,) = self.ports
        return port

    async def push(self, data: bytes) -> None:
        """Send bytes that nobody asked for to every client."""
        for client in self.clients:
            client.write(data)
            await client.drain()

    def named(self, name: bytes) -> list[list[bytes]]:
        """The commands of that name."""
        return [words for words in self.commands if words[0].upper() == name]


@contextlib.asynccontextmanager
async def redis_proxy(*servers: Connect) -> AsyncIterator[RedisProxy]:
    """A proxy in front of each of these servers."""
    proxy = RedisProxy()

    async def serve(
        connect: Connect, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            upstream_reader, upstream_writer = await connect()
        except OSError:  # nobody listens there
            writer.close()
            return
        answered: asyncio.Queue[bytes] = asyncio.Queue()

        async def answers() -> None:
            parser, whole = hiredis.Reader(notEnoughData=answered), b""
            while data := await upstream_reader.read(65536):
                parser.feed(data)
                whole += data
                if parser.gets() is not answered:
                    answered.put_nowait(whole)
                    whole = b""
            writer.close()
            answered.put_nowait(b"")

        answering = asyncio.create_task(answers())
        proxy.clients.add(writer)
        silent = False  # what comes behind a lost reply is lost too, for replies have one order
        try:
            while words := await _command(reader):
                proxy.commands.append(words)
                fate = proxy.fate(words)
                if fate is Fate.REFUSE:
                    break
                upstream_writer.write(_packed(words))
                reply = await answered.get()
                if fate is Fate.CUT or not reply:
                    break
                if fate is Fate.HOLD:
                    proxy.held.set()
                    await proxy.release.wait()
                silent = silent or fate is Fate.SWALLOW
                if not silent:
                    writer.write(reply)
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            proxy.clients.discard(writer)
            answering.cancel()
            writer.close()
            upstream_writer.close()

    async with contextlib.AsyncExitStack() as stack:
        for connect in servers:
            proxy.ports.append(await stack.enter_async_context(_listening(partial(serve, connect))))
        yield proxy


async def _command(reader: asyncio.StreamReader) -> list[bytes]:
    """One command, an array of bulk strings; empty at the end of the stream."""
    try:
        count = int((await reader.readuntil(b"\r\n"))[1:])
        words = []
        for _ in range(count):
            length = int((await reader.readuntil(b"\r\n"))[1:])
            words.append((await reader.readexactly(length + 2))[:-2])
    except (asyncio.IncompleteReadError, ConnectionError):
        return []
    return words


def _packed(words: list[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(
        b"$%d\r\n%s\r\n" % (len(word), word) for word in words
    )


@dataclass(slots=True)
class PostgresProxy:
    """Made by `postgres_proxy`. Falls `silent` when a client has sent more than `silent_after`
    messages on a connection: from then on, and on every connection, what is sent is lost and
    nothing comes back, as from a machine that is frozen.
    """

    port: int
    silent_after: int | None = None
    silent: bool = False
    connections: int = 0
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    forgotten: set[asyncio.StreamWriter] = field(default_factory=set)

    def forget(self) -> None:
        """Lose what is sent on the connections there are; further ones work."""
        self.forgotten |= self.open

    @property
    def url(self) -> str:
        """Where asyncpg finds it; without TLS, so that its first message is the start-up."""
        return f"postgresql://broker@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def recover(self) -> None:
        """Answer again."""
        self.silent_after, self.silent = None, False


@contextlib.asynccontextmanager
async def postgres_proxy(connect: Connect) -> AsyncIterator[PostgresProxy]:
    """A proxy in front of the server that `connect` reaches."""
    proxy = PostgresProxy(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await connect()
        proxy.connections += 1
        proxy.open.add(writer)
        seen = 0

        def lost() -> bool:
            return proxy.silent or writer in proxy.forgotten

        async def answers() -> None:
            while data := await upstream_reader.read(65536):
                if not lost():
                    writer.write(data)
                    await writer.drain()
            if not lost():
                writer.close()

        answering = asyncio.create_task(answers())
        try:
            while data := await reader.read(65536):
                seen += 1
                if proxy.silent_after is not None and seen > proxy.silent_after:
                    proxy.silent = True
                if not lost():
                    upstream_writer.write(data)
                    await upstream_writer.drain()
        except ConnectionError:
            pass
        finally:
            proxy.connections -= 1
            proxy.open.discard(writer)
            answering.cancel()
            writer.close()
            upstream_writer.close()

    async with _listening(serve) as port:
        proxy.port = port
        yield proxy


@contextlib.asynccontextmanager
async def _listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    tasks: set[asyncio.Task[None]] = set()

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await serve(reader, writer)
        tasks.discard(task)

    server = await asyncio.start_server(kept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
