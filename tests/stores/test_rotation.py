"""Passwords of the stores and the secret key, replaced under a running broker (`Secrets`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import redis

from broker.embedded import EmbeddedStores
from broker.settings import Secrets, Settings
from tests.conftest import SECRET_KEY, Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.processes import DEADLINE
from tests.support.servers import session_of
from tests.support.wire import Wire

FIRST, SECOND = "first-zq9w", "second-zq9w"
OTHER_KEY = SECRET_KEY[::-1]


@dataclass(slots=True)
class Rotated:
    """A broker whose secrets are in files, on stores that ask it for a password."""

    stores: EmbeddedStores
    folder: Path
    broker: Started
    wire: Wire

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(f"{text}\n")

    def write_passwords(self, password: str) -> None:
        self.write("database_url", postgres_url(self.stores, password))
        self.write("redis_url", redis_url(self.stores, password))

    async def replace_passwords(self, password: str) -> None:
        """Set another password in both stores, which close the broker's connections."""
        async with session_of(self.stores) as session:
            await session.execute(f"ALTER ROLE ann PASSWORD '{password}'")
            await session.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'ann'"
            )
        with redis.Redis.from_url(self.stores.redis_url) as client:
            client.execute_command("ACL", "SETUSER", "ann", "resetpass", f">{password}")
            client.execute_command("CLIENT", "KILL", "USER", "ann")

    async def status(self) -> int:
        """Of a registration and a sign-in: 201, or the status of the first refusal."""
        device = Authenticator()
        body = {"external_id": "ann", "passkey_display_name": "Ann"}
        opened = await self.wire.keyed("POST", "/transactions/register", body)
        if opened.status == 201:
            nonce = await self.wire.register(opened.json["transaction_id"], device)
            assert (await self.wire.redeem(nonce)).status == 200
            transaction = await self.wire.open_authentication("ann")
            nonce = await self.wire.authenticate(transaction, device)
            assert (await self.wire.redeem(nonce)).status == 200
        return opened.status

    async def recovered(self) -> bool:
        """Sign in until the broker has noticed that its connections are closed."""
        deadline = time.monotonic() + DEADLINE
        while await self.status() != 201:
            if time.monotonic() > deadline:
                return False
        return True

    def told(self, event: str) -> list[dict[str, Any]]:
        """The values of the log's lines of an event."""
        return [
            {k: v for k, v in line.items() if k not in ("at", "event")}
            for line in self.broker.log
            if line["event"] == event
        ]


def postgres_url(stores: EmbeddedStores, password: str) -> str:
    return urlsplit(stores.database_url)._replace(netloc=f"ann:{password}@").geturl()


def redis_url(stores: EmbeddedStores, password: str) -> str:
    return stores.redis_url.replace("unix://", f"unix://ann:{password}@")


def ask_for_password(role: str, hba_file: Path) -> None:
    with hba_file.open("a") as file:
        file.write(f"local all {role} scram-sha-256\n")


@pytest.fixture
async def rotated(
    own_stores: EmbeddedStores,
    start_broker: Starter,
    session: aiohttp.ClientSession,
    tmp_path: Path,
) -> Rotated:
    async with session_of(own_stores) as postgres:
        await postgres.execute(f"CREATE ROLE ann LOGIN PASSWORD '{FIRST}' IN ROLE broker")
        ask_for_password("ann", Path(await postgres.fetchval("SHOW hba_file")))
        await postgres.execute("SELECT pg_reload_conf()")
    with redis.Redis.from_url(own_stores.redis_url) as client:
        client.execute_command("ACL", "SETUSER", "ann", "on", f">{FIRST}", "~*", "+@all")
    names = ("database_url", "redis_url", "secret_key")
    broker = await start_broker(
        own_stores,
        database_url=postgres_url(own_stores, FIRST),
        redis_url=redis_url(own_stores, FIRST),
        files={name: tmp_path / name for name in names},
    )
    (tmp_path / "secret_key").write_text(SECRET_KEY)
    for name in names[:2]:
        (tmp_path / name).write_text(getattr(broker.parts.settings, name))
    return Rotated(own_stores, tmp_path, broker, await Wire.open(broker.service, session))


async def test_people_sign_in_when_both_stores_have_another_password(rotated: Rotated) -> None:
    assert await rotated.status() == 201
    await rotated.replace_passwords(SECOND)
    assert [await rotated.status() for _ in range(3)] == [503] * 3
    rotated.write_passwords(SECOND)
    assert await rotated.status() == 201
    line = {"level": "info", "restart": []}
    assert sorted(rotated.told("settings_reloaded"), key=str) == [
        {**line, "changed": ["BROKER_DATABASE_URL"]},
        {**line, "changed": ["BROKER_REDIS_URL"]},
    ]
    assert rotated.told("secret_refused") == []


async def test_a_file_that_can_not_be_used_leaves_the_url(rotated: Rotated) -> None:
    """So does a URL of another server. The log says so once, and quotes nothing."""
    rotated.write("database_url", "zq9w")
    (rotated.folder / "redis_url").unlink()
    for _ in range(2):
        await rotated.replace_passwords(FIRST)
        assert await rotated.recovered()
    assert {line["variable"]: line["cause"] for line in rotated.told("secret_refused")} == {
        "BROKER_DATABASE_URL": "BROKER_DATABASE_URL must be"
        " a URL that begins with postgresql:// or postgres://.",
        "BROKER_REDIS_URL": "BROKER_REDIS_URL_FILE can't be read (FileNotFoundError).",
    }
    rotated.write("redis_url", "redis://:zq9w@elsewhere")
    rotated.write("database_url", postgres_url(rotated.stores, "zq9w") + "&sslmode=require")
    for _ in range(2):
        await rotated.replace_passwords(FIRST)
        assert await rotated.recovered()
    urls = ["BROKER_DATABASE_URL", "BROKER_REDIS_URL"]
    assert sorted(line["restart"] for line in rotated.told("settings_reloaded")) == [
        [url] for url in urls
    ]
    rotated.broker.parts.secrets.reload()
    last = rotated.told("settings_reloaded")[-1]
    assert (last["changed"], sorted(last["restart"])) == ([], urls)
    assert len(rotated.told("secret_refused")) == 2
    assert "zq9w" not in rotated.broker.stream.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        ("postgresql://ann:a@h", "postgresql://ann:b@h", True),
        ("postgresql://ann:a@h", "postgresql://ben:b@h", False),
        ("postgresql://ann:a@h/", "postgresql://ben:b@h/", False),
        ("postgresql://h?user=ann", "postgresql://h?user=ben", False),
        ("postgresql://ann:a@h/d", "postgresql://ben:b@h/d", True),
        ("postgresql://ann:a@h?dbname=d", "postgresql://ben:b@h?dbname=d", True),
    ],
)
def test_another_user_without_a_named_database_is_another_database(
    tmp_path: Path, before: str, after: str, counts: bool
) -> None:
    file = tmp_path / "url"
    file.write_text(after)
    settings = Settings(database_url=before, files={"database_url": file})
    secrets = Secrets(settings, lambda event, **_: None)
    assert secrets.database_url() == (after if counts else before)


async def test_the_secret_key_is_read_again_on_demand(rotated: Rotated) -> None:
    """Keys are sealed under the new secret, and those under the old one open."""
    parts = rotated.broker.parts
    app = await parts.directory.app(rotated.wire.app_id)
    await parts.signing.ready(app, "ES256")
    rotated.write("secret_key", f"{OTHER_KEY},{SECRET_KEY}")
    assert [number for _, number in await parts.signing.list_seals()] == [0]
    parts.secrets.reload()
    assert [number for _, number in await parts.signing.list_seals()] == [1]
    assert await parts.signing.reseal() == (1, 0)
    rotated.write("secret_key", OTHER_KEY)
    parts.secrets.reload()
    assert [number for _, number in await parts.signing.list_seals()] == [0]
    rotated.write("secret_key", "short")
    parts.secrets.reload()
    await parts.signing.ready(app, "ES256")
    assert [line["changed"] for line in rotated.told("settings_reloaded")] == [
        ["BROKER_SECRET_KEY"],
        ["BROKER_SECRET_KEY"],
        [],
    ]
    (refused,) = rotated.told("secret_refused")
    assert refused["variable"] == "BROKER_SECRET_KEY"
