"""Idempotent requests: the same key and request from the same API key get the same answer for a
minute; another request with the key is refused, and any other redemption is a replay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest
import redis

from broker.embedded import EmbeddedStores
from broker.sdk.passkey_broker import AsyncBrokerClient
from tests.conftest import ON_BOTH, Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.golden import golden
from tests.support.proxy import Fate, RedisProxy, Streams, redis_proxy
from tests.support.relay import relay
from tests.support.servers import connect_valkey
from tests.support.signals import counted, refused
from tests.support.wire import Answer, Wire

KEY = "3f2c0c1e-0001-4c0f-9d2b-7a1d7a6d8e11"
OPEN, VERIFY = "/transactions/authenticate", "/authenticate/verify"


async def send(wire: Wire, path: str, json: object, key: str = KEY, api_key: str = "") -> Answer:
    headers = {"Authorization": f"Bearer {api_key or wire.key}", "Idempotency-Key": key}
    return await wire.send("POST", path, json=json, headers=headers)


@ON_BOTH
async def test_a_repeated_open_gets_the_same_transaction(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    body = {"external_id": "ann"}
    both = await asyncio.gather(*(send(wire, OPEN, body) for _ in range(20)))
    again = await send(wire, OPEN, body)
    (transaction,) = {answer.of(201)["transaction_id"] for answer in (*both, again)}
    assert (await wire.redeem(await wire.authenticate(transaction, device))).status == 200

    register = {"external_id": "ann", "passkey_display_name": "Ann"}
    for path, other in ((OPEN, {"external_id": "bob"}), ("/transactions/register", register)):
        with refused(broker, "idempotency_key_reused", "idempotency_key_reused"):
            answer = await send(wire, path, other)
        assert (answer.status, answer.code) == (422, "idempotency_key_reused")
    headers = {"Authorization": f"Bearer {wire.key}", "Idempotency-Key": KEY}
    await golden(wire, "flex/m2-key-reused", "POST", OPEN, {"external_id": "bob"}, headers=headers)
    (user,) = (await wire.keyed("GET", "/users")).json["users"]
    assert user["external_id"] == "ann", "a refused request makes no user"

    _, second = await broker.parts.directory.create_key(wire.app_id, "second")
    opened = [
        await send(wire, OPEN, body, key="another-key"),
        await send(wire, OPEN, body, api_key=second),
        await wire.keyed("POST", OPEN, body),
        await wire.keyed("POST", OPEN, body),
    ]
    assert len({transaction, *(answer.of(201)["transaction_id"] for answer in opened)}) == 5


async def test_a_refused_open_is_judged_anew(wire: Wire, device: Authenticator) -> None:
    assert (await send(wire, OPEN, {"external_id": "ann"})).status == 404
    await wire.user("ann", device)
    assert (await send(wire, OPEN, {"external_id": "ann"})).status == 201


@ON_BOTH
async def test_a_repeated_redemption_is_no_replay(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    nonce = await wire.authenticate(None, device)
    body = {"nonce": nonce, "purpose": "authenticate"}
    first = await send(wire, VERIFY, body)
    with counted(broker, "broker_redemptions_total", result="repeated"):
        again = await send(wire, VERIFY, body)
    assert (first.status, first.json) == (200, again.json)
    assert ("nonce.replayed", "refused", "nonce_replayed") not in await broker.events(wire.app_id)

    _, second = await broker.parts.directory.create_key(wire.app_id, "second")
    with refused(broker, "idempotency_key_reused", "idempotency_key_reused"):
        other = await send(wire, VERIFY, {"nonce": nonce})
    assert other.status == 422
    with refused(broker, "invalid_nonce", "nonce_replayed", times=3):
        await send(wire, VERIFY, body, key="another-key")
        await send(wire, VERIFY, body, api_key=second)
        await wire.redeem(nonce)
    broker.clock.ahead += 61
    with refused(broker, "invalid_nonce", "nonce_replayed"):
        assert (await send(wire, VERIFY, body)).status == 401


async def test_a_repeated_redemption_asks_whether_the_passkey_is_live(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    passkey = await wire.user("ann", device)
    body = {"nonce": await wire.authenticate(None, device)}
    assert (await send(wire, VERIFY, body)).status == 200
    await wire.keyed("DELETE", f"/passkeys/{passkey}")
    with refused(broker, "invalid_nonce", "passkey_revoked"):
        assert (await send(wire, VERIFY, body)).status == 401


async def test_a_mismatch_stays_one(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    body = {"nonce": await wire.authenticate(None, device), "external_id": "bob"}
    with refused(broker, "invalid_nonce", "nonce_mismatch", times=2):
        for _ in range(2):
            assert (await send(wire, VERIFY, body)).status == 401


@pytest.mark.parametrize("key", ["", "a b", "é", "k" * 256])
async def test_a_key_of_another_form_is_refused(broker: Started, wire: Wire, key: str) -> None:
    with refused(broker, "invalid_request", "idempotency_key"):
        assert (await send(wire, OPEN, {"external_id": "ann"}, key=key)).status == 400


async def test_redis_holds_nothing_that_redeems(
    stores: EmbeddedStores, wire: Wire, device: Authenticator
) -> None:
    """Neither the transaction's id nor the receipt can be read there, and no key of them."""
    await wire.user("zoe-of-this-test", device)
    transaction = (await send(wire, OPEN, {"external_id": "zoe-of-this-test"})).json
    nonce = await wire.authenticate(None, device)
    await send(wire, VERIFY, {"nonce": nonce})
    found = b""
    with redis.Redis.from_url(stores.redis_url) as client:
        for key in client.scan_iter():
            if key.startswith((b"i:", b"n:")):
                found += key + client.get(key)
    assert len(found) > 200
    for secret in (transaction["transaction_id"], nonce, wire.key, KEY, "zoe-of-this-test"):
        assert secret.encode() not in found


def cut_once(proxy: RedisProxy, *prefixes: bytes) -> None:
    """Lose the reply to the next command with a key of this prefix, after Redis has executed it."""
    done: list[bytes] = []

    def fate(words: list[bytes]) -> Fate:
        if not done and any(word.startswith(prefixes) for word in words[1:4]):
            done.append(words[0])
            return Fate.CUT
        return Fate.PASS

    proxy.fate = fate


async def test_the_client_survives_a_lost_reply_of_redis(
    start_broker: Starter, wire: Wire, stores: EmbeddedStores, device: Authenticator
) -> None:
    """The store has kept the answer, or spent the nonce, when the broker loses the reply."""
    await wire.user("ann", device)
    async with redis_proxy(lambda: connect_valkey(stores)) as proxy:
        lossy = await start_broker(redis_url=f"redis://127.0.0.1:{proxy.port}")
        async with AsyncBrokerClient(lossy.url, wire.app_id, wire.key) as client:
            cut_once(proxy, b"i:")
            transaction = await client.create_authenticate_transaction("ann")
            nonce = await wire.authenticate(transaction, device)
            cut_once(proxy, b"n:")
            with counted(lossy, "broker_redemptions_total", result="repeated"):
                receipt = await client.verify_nonce(nonce, transaction_id=transaction)
        assert receipt.external_id == "ann"
        await lossy.service.close()


async def test_the_client_survives_lost_answers(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """The broker has answered, and the connection ends before the answer reaches the client."""

    def connect() -> Awaitable[Streams]:
        return asyncio.open_connection("127.0.0.1", broker.service.port)

    async with relay(connect) as door:
        url = f"http://127.0.0.1:{door.port}"
        async with AsyncBrokerClient(url, wire.app_id, wire.key) as client:
            door.loses = True
            opened = "/v1/apps/{app_id}/transactions/register"
            with counted(broker, "broker_request_seconds_count", 2, route=opened, status="201"):
                registration = await client.create_register_transaction("ann", "Ann")
            nonce = await wire.register(registration, device)
            door.loses = True
            with counted(broker, "broker_redemptions_total", result="repeated"):
                receipt = await client.verify_nonce(nonce, purpose="register")
            assert (receipt.external_id, door.loses) == ("ann", False)
    assert ("nonce.replayed", "refused", "nonce_replayed") not in await broker.events(wire.app_id)
