"""Redis Sentinel (`broker.ephemeral.sentinel`): three servers and three Sentinels, real ones."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from broker.ephemeral import connect
from broker.ephemeral.connection import MultiplexedConnection
from broker.ephemeral.faults import cause_of
from broker.ephemeral.sentinel import SentinelPool
from broker.ephemeral.transport import DOWN, Commands
from tests.support.load_balancers import certificate
from tests.support.processes import DEADLINE, until
from tests.support.relay import Door, relay
from tests.support.servers import Sentinels, Valkey

LIMIT = 0.8
SECRET = "sentinel-word"


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    made = Sentinels.start(tmp_path_factory.mktemp("sentinels"), secret=SECRET)
    yield made
    made.stop()


def url_of(sentinels: Sentinels, *more: Valkey) -> str:
    """The URL with both passwords; `more` Sentinels are named first."""
    parts = urlsplit(sentinels.url)
    hosts = "".join(f"127.0.0.1:{watcher.port}," for watcher in more) + parts.netloc
    named = parts._replace(netloc=f":{SECRET[::-1]}@{hosts}", query=f"sentinel_password={SECRET}")
    return named.geturl()


@asynccontextmanager
async def commands(url: str, limit: float = LIMIT) -> AsyncIterator[Commands]:
    made = connect(url, timeout=limit)
    try:
        yield made
    finally:
        await made.close()


async def written(made: Commands, key: str) -> None:
    """Write until a primary takes it."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            assert await made.ask("SET", key, "1", limit=LIMIT) == b"OK"
        except DOWN:
            assert time.monotonic() < deadline, "no primary takes a write"
        else:
            return


async def test_commands_go_to_the_primary_with_the_passwords_of_both(sentinels: Sentinels) -> None:
    async with commands(url_of(sentinels)) as made:
        await written(made, "a")
        assert sentinels.primary().ask("EXISTS", "a") == 1


@pytest.mark.parametrize("name", ["sentinel_password=wrong", "sentinel_username=nobody"])
async def test_without_the_sentinels_own_credentials_nothing_is_found(
    sentinels: Sentinels, name: str
) -> None:
    url = url_of(sentinels).replace(f"sentinel_password={SECRET}", name)
    async with commands(url) as made:
        with pytest.raises(DOWN) as caught:
            await made.ask("PING", limit=LIMIT)
    assert SECRET not in repr(caught.value)
    assert cause_of(caught.value)[0] == "auth", "the log says so"


async def test_a_connection_takes_the_passwords_of_then(sentinels: Sentinels) -> None:
    """Of the primary and of the Sentinels."""
    words = ["old-word"]

    def url() -> str:
        options = f"sentinel_username=ann&sentinel_password={words[-1]}"
        parts = urlsplit(sentinels.url)
        return parts._replace(netloc=f"ann:{words[-1]}@{parts.netloc}", query=options).geturl()

    made = connect(url(), timeout=LIMIT, read_url=url)
    for word in ("old-word", "new-word"):
        words.append(word)
        for server in (sentinels.primary(), *sentinels.watchers):
            server.ask("ACL SETUSER", "ann", "on", "resetpass", f">{word}", "~*", "+@all")
        await written(made, word)
        await made.close()


async def test_failovers_are_followed(sentinels: Sentinels) -> None:
    """The primary is killed, then the next one hangs."""
    async with commands(url_of(sentinels)) as made:
        await written(made, "before")
        first = sentinels.primary()
        first.process.kill()
        await written(made, "after")
        second = sentinels.primary()
        assert second is not first
        assert second.ask("EXISTS", "after") == 1
        with stopped(second):
            await written(made, "later")
            third = sentinels.primary()
            assert third not in (first, second)
            assert third.ask("EXISTS", "later") == 1


async def test_a_sentinel_that_hangs_hides_no_primary(sentinels: Sentinels) -> None:
    with stopped(sentinels.watchers[0]):
        async with commands(url_of(sentinels)) as made:
            await written(made, "beside")


async def test_the_newest_configuration_counts(sentinels: Sentinels, tmp_path: Path) -> None:
    """A Sentinel that is cut off with a primary of its own, and is named first, misleads nobody."""
    lone = Valkey.start(tmp_path / "lone", password=SECRET[::-1])
    cut_off = sentinels.watch(tmp_path / "cut off", SECRET, lone)
    try:
        until(lambda: newest(sentinels.watchers[0]) > newest(cut_off), "there was a failover")
        async with commands(url_of(sentinels, cut_off)) as made:
            await written(made, "newest")
        assert lone.ask("EXISTS", "newest") == 0
    finally:
        cut_off.stop()
        lone.stop()


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A primary without replicas."""
    made = Valkey.start(tmp_path_factory.mktemp("lone"), password=SECRET[::-1])
    yield made
    made.stop()


@pytest.mark.parametrize("encrypted", [("Sentinel",), ("primary",), ("Sentinel", "primary")])
async def test_tls_with_sentinels_is_apart_from_the_primarys(
    lone: Valkey, tmp_path: Path, encrypted: tuple[str, ...]
) -> None:
    """Each has a certificate and a password of its own, and the other's CA is refused.

    The Valkey at hand has no TLS, so relays end it. The Sentinel itself speaks no TLS with the
    primary: it calls the primary down, and names its address all the same.
    """
    ca = {}
    for name in ("Sentinel", "primary"):
        (tmp_path / name).mkdir()
        ca[name] = certificate(tmp_path / name)

    def own(name: str) -> Path | None:
        return ca[name] if name in encrypted else None

    async with relay(lone.connect, own("primary")) as primary:
        seen = Valkey(lone.process, primary.port)
        watcher = Sentinels([lone], []).watch(tmp_path / "watcher", SECRET, seen)
        try:
            async with relay(watcher.connect, own("Sentinel")) as sentinel:
                url = tls_url(sentinel.port, {name: ca[name] for name in encrypted})
                async with commands(url, DEADLINE) as made:
                    assert await made.ask("PING", limit=DEADLINE) == b"PONG"
                for name, door in (("Sentinel", sentinel), ("primary", primary)):
                    if name in encrypted:
                        (other,) = ca.keys() - {name}
                        wrong = {each: ca[each] for each in encrypted} | {name: ca[other]}
                        await is_refused(tls_url(sentinel.port, wrong), door)
        finally:
            watcher.stop()


def tls_url(port: int, trusted: dict[str, Path]) -> str:
    """The URL with both passwords, a Sentinel's port, and the CAs of what speaks TLS."""
    scheme = "rediss" if "primary" in trusted else "redis"
    options = f"sentinel_password={SECRET}&sentinel_tls={'yes' if 'Sentinel' in trusted else 'no'}"
    for name, prefix in (("Sentinel", "sentinel_"), ("primary", "")):
        if name in trusted:
            options += f"&{prefix}ssl_ca_certs={trusted[name]}"
    return f"{scheme}+sentinel://:{SECRET[::-1]}@127.0.0.1:{port}/main?{options}"


async def is_refused(url: str, door: Door) -> None:
    """No TLS handshake with the door succeeds."""
    before = door.connections
    async with commands(url, DEADLINE) as made:
        with pytest.raises(DOWN):
            await made.ask("PING", limit=DEADLINE)
    assert door.connections == before


async def test_tls_and_credentials_of_sentinels_are_apart() -> None:
    def pool(url: str) -> SentinelPool:
        made = connect(url, timeout=LIMIT)
        assert isinstance(made, MultiplexedConnection)
        found = made._pool()
        assert isinstance(found, SentinelPool)
        return found

    options = "db=3&ssl_ca_certs=/ca&sentinel_username=s&sentinel_password=q%26"
    both = pool(f"rediss+sentinel://u:p%2F@a,[::1]:7/main?{options}")
    kwargs = both.connection_kwargs
    assert both.connection_class is SentinelManagedSSLConnection
    assert (kwargs["username"], kwargs["password"], kwargs["db"]) == ("u", "p/", 3)
    assert kwargs["ssl_ca_certs"] == "/ca"
    assert both._sentinels == [
        f"rediss://{host}?ssl_ca_certs=%2Fca&username=s&password=q%26"
        for host in ("a:26379", "[::1]:7")
    ]
    plain = pool("rediss+sentinel://a/main?sentinel_tls=no")._sentinels
    assert plain == ["redis://a:26379?"]
    other = pool("redis+sentinel://a/main?sentinel_tls=yes&sentinel_ssl_ca_certs=/x")
    assert other.connection_class is SentinelManagedConnection
    assert other._sentinels == ["rediss://a:26379?ssl_ca_certs=%2Fx"]


def newest(watcher: Valkey) -> int:
    """The configuration epoch that a Sentinel knows."""
    words = watcher.ask("SENTINEL", "MASTER", "main")
    return int(words[words.index(b"config-epoch") + 1])


@contextmanager
def stopped(server: Valkey) -> Iterator[None]:
    """The process hangs inside."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)
