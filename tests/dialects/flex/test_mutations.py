"""A valid answer with one byte changed, over HTTP: always a refusal in the 400s, never a success,
never a 500.

Every mutation has a begin of its own, as a refused answer spends its handshake; nine of them use
one transaction, for the tenth would end it, and the last transaction takes the answer without a
mutation at the end. Positions are sampled evenly, the flags and lengths of authenticator data all
taken. Registrations carry self attestation: without a signature over them, an AAGUID or a counter
may be anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from broker.model import MAX_REFUSALS
from tests.conftest import Started
from tests.dialects.flex.test_refusals import stored
from tests.support.authenticator import Authenticator, b64, flex_wire_form, unb64
from tests.support.signals import counted, lines
from tests.support.wire import ORIGIN, Answer, Wire

MASKS = (0x01, 0x80, 0xFF, 0x20)
REFUSALS = {
    "invalid_request",
    "webauthn_login_failed",
    "discoverable_login_failed",
    "transaction_not_found",
}


def positions(length: int, samples: int) -> list[int]:
    """Evenly spread, the first and the last among them; and 32 to 55: flags, counter, AAGUID and
    length in authenticator data.
    """
    return sorted(
        {*range(0, length, max(1, length // samples)), *range(32, min(length, 56)), length - 1}
    )


def judge(answer: Answer) -> None:
    assert 400 <= answer.status < 500, answer.body
    assert answer.code in REFUSALS
    assert set(answer.json) <= {"code", "error", "signal"}


@pytest.mark.parametrize("member", ["clientDataJSON", "attestationObject"])
async def test_registration(broker: Started, wire: Wire, member: str) -> None:
    device = Authenticator(attestation="packed-self")
    transaction = await wire.open_registration("ann")
    handle, options = await wire.begin("register", transaction)
    length = len(unb64(device.register(options, ORIGIN)["response"][member]))
    for number, position in enumerate(positions(length, 40)):
        if number % (MAX_REFUSALS - 1) == 0:
            transaction = await wire.open_registration("ann")
        handle, options = await wire.begin("register", transaction)
        answer = device.register(options, ORIGIN)
        answer["response"][member] = changed(answer["response"][member], position, number)
        judge(await wire.finish("register", handle, answer, transaction))
        assert await stored(broker, wire, "ann") == []
    await wire.register(transaction, device)
    assert (
        broker.metric("broker_ceremonies_total", kind="register", step="finish", result="ok") == 1
    )
    refused = ("passkey.registered", "refused")
    assert [e[:2] for e in await broker.events(wire.app_id)].count(refused) >= 40


@pytest.mark.parametrize("discoverable", [False, True], ids=["transaction", "discoverable"])
@pytest.mark.parametrize(
    "member", ["clientDataJSON", "authenticatorData", "signature", "userHandle"]
)
async def test_authentication(
    broker: Started, wire: Wire, device: Authenticator, member: str, discoverable: bool
) -> None:
    await wire.user("ann", device)
    before = await stored(broker, wire, "ann")
    transaction = None if discoverable else await wire.open_authentication("ann")
    handle, options = await wire.begin("authenticate", transaction)
    length = len(unb64(device.authenticate(options, ORIGIN)["response"][member]))
    for number, position in enumerate(positions(length, 20)):
        if transaction is not None and number % (MAX_REFUSALS - 1) == 0:
            transaction = await wire.open_authentication("ann")
        handle, options = await wire.begin("authenticate", transaction)
        answer = device.authenticate(options, ORIGIN)
        answer["response"][member] = changed(answer["response"][member], position, number)
        got = await wire.finish("authenticate", handle, answer, transaction)
        judge(got)
        assert "signal" not in got.json
    assert await stored(broker, wire, "ann") == before
    await wire.authenticate(transaction, device)
    kind = "discoverable" if discoverable else "authenticate"
    assert broker.metric("broker_ceremonies_total", kind=kind, step="finish", result="ok") == 1


def changed(text: str, position: int, number: int) -> str:
    """Base64url text with one byte of what it stands for changed."""
    raw = bytearray(unb64(text))
    raw[position % len(raw)] ^= MASKS[number % len(MASKS)]
    return b64(bytes(raw))


def one_byte_off(body: bytes, samples: int) -> Iterator[bytes]:
    for number, position in enumerate(range(0, len(body), max(1, len(body) // samples))):
        other = bytearray(body)
        other[position] ^= MASKS[number % len(MASKS)]
        yield bytes(other)


async def test_any_byte_of_the_request(broker: Started, wire: Wire, device: Authenticator) -> None:
    """Of the whole body: keys, quotes, handshake, everything. Discoverable, where no member may be
    missing.
    """
    await wire.user("ann", device)
    before = await stored(broker, wire, "ann")

    async def body() -> bytes:
        handle, options = await wire.begin("authenticate", None)
        answer: dict[str, Any] = flex_wire_form(device.authenticate(options, ORIGIN))
        return json.dumps({"handshake_id": handle, "handshake_response": answer}).encode()

    path = "/authenticate/transactions/webauthn/finish"
    for number in range(150):
        whole = await body()
        spread = list(one_byte_off(whole, 150))
        judge(await wire.page(path, data=spread[number % len(spread)]))
    assert await stored(broker, wire, "ann") == before
    with counted(
        broker, "broker_ceremonies_total", kind="discoverable", step="finish", result="ok"
    ):
        assert (await wire.page(path, data=await body())).status == 200
    assert lines(broker, status=500) == []
