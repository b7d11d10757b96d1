"""Disaster drill: a dump of Postgres and the secret key are restored beside an empty Redis."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.durable import instant
from broker.embedded import EmbeddedStores
from broker.embedded.binaries import find_postgres
from broker.embedded.directories import server_account
from broker.tokens import key_digest
from tests.conftest import SECRET_KEY, Started, Starter
from tests.support import jws
from tests.support.authenticator import Authenticator
from tests.support.servers import Valkey, database_of
from tests.support.wire import Answer, Wire

OTHER_SECRET_KEY = "another-" + "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(slots=True)
class Disaster:
    """What is left of the lost installation, and the stores of the new one."""

    wire: Wire  # the app; `url` is a broker that is gone
    device: Authenticator  # has ann's passkey
    nonce: str  # not redeemed before the disaster
    transaction: str  # open then
    token: str  # a receipt that was signed then
    dump: str  # the dump as SQL
    database_url: str
    redis_url: str

    def at(self, started: Started) -> Wire:
        """The app with its API key, at a new broker."""
        return Wire(self.wire.session, started.url, self.wire.app_id, self.wire.key)


@pytest.fixture
async def disaster(
    stores: EmbeddedStores,
    start_broker: Starter,
    session: aiohttp.ClientSession,
    device: Authenticator,
    tmp_path: Path,
) -> AsyncIterator[Disaster]:
    """A dump, restored as the page on backups says."""
    dump = tmp_path / "broker.dump"
    valkey = Valkey.start(tmp_path / "valkey")
    try:
        async with database_of(stores) as old, database_of(stores) as new:
            lost = await start_broker(database_url=old)
            await lost.parts.postgres.migrate(instant(lost.clock()))
            wire = await Wire.open(lost.service, session)
            await wire.user("ann", device)
            token = (await signed_in(wire, device, signed=True)).of(200)["token"]
            nonce = await wire.authenticate(None, device)
            transaction = await wire.open_authentication("ann")
            run("pg_dump", "--format=custom", f"--file={dump}", old)
            run("pg_restore", "--no-owner", f"--dbname={new}", str(dump))
            sql = run("pg_restore", "--file=-", str(dump))
            yield Disaster(wire, device, nonce, transaction, token, sql, new, valkey.url)
    finally:
        valkey.stop()


def run(program: str, *arguments: str) -> str:
    """What a client program of Postgres prints."""
    argv = [str(find_postgres(server_account(), None).directory / program), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


async def signed_in(wire: Wire, device: Authenticator, **more: Any) -> Answer:
    """The redemption of a new sign-in of ann."""
    return await wire.redeem(
        await wire.authenticate(await wire.open_authentication("ann"), device), **more
    )


async def test_people_sign_in_where_the_backup_was_restored(
    disaster: Disaster, start_broker: Starter
) -> None:
    restored = await start_broker(
        database_url=disaster.database_url,
        redis_url=disaster.redis_url,
        secret_key=(SECRET_KEY,),
    )
    wire = disaster.at(restored)
    answer = await signed_in(wire, disaster.device, signed=True)
    assert answer.of(200)["external_id"] == "ann"
    keys = (await wire.send("GET", "/.well-known/jwks.json")).json
    assert jws.verify(disaster.token, keys)["sub"] == "ann"
    assert jws.verify(answer.json["token"], keys)["sub"] == "ann"
    assert (await wire.redeem(disaster.nonce)).code == "invalid_nonce"
    begun = await wire.page(
        "/authenticate/transactions/webauthn/start", {"transaction_id": disaster.transaction}
    )
    assert begun.code == "transaction_not_found"


async def test_without_the_secret_key_people_sign_in_and_nothing_is_signed(
    disaster: Disaster, start_broker: Starter
) -> None:
    restored = await start_broker(
        database_url=disaster.database_url,
        redis_url=disaster.redis_url,
        secret_key=(OTHER_SECRET_KEY,),
    )
    wire = disaster.at(restored)
    refused = await signed_in(wire, disaster.device, signed=True)
    assert (refused.status, refused.code) == (503, "service_unavailable")
    assert (await signed_in(wire, disaster.device)).of(200)["external_id"] == "ann"
    app = await restored.parts.directory.app(wire.app_id)
    await restored.parts.signing.rotate(app, "ES256", now=True)
    answer = await signed_in(wire, disaster.device, signed=True)
    keys = (await wire.send("GET", "/.well-known/jwks.json")).json
    assert jws.verify(answer.of(200)["token"], keys)["sub"] == "ann"
    assert jws.verify(disaster.token, keys)["sub"] == "ann", "the public key was in the dump"


def test_a_dump_redeems_nothing(disaster: Disaster) -> None:
    """No secret is in it, also not in the form of a bytea; the digest of the API key is."""
    key = disaster.wire.key
    for secret in (disaster.nonce, disaster.transaction, key, disaster.token, SECRET_KEY):
        for text in (secret, secret.partition("_")[2] or secret):
            assert text not in disaster.dump
            assert text.encode().hex() not in disaster.dump
    assert key_digest(key).hex() in disaster.dump
