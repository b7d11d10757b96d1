"""A backend cancels a transaction: it and its pending ceremony end at once, whatever the page does
then, and a second cancel changes nothing.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import ON_BOTH, OpenApp, Started
from tests.support.authenticator import Authenticator
from tests.support.golden import golden
from tests.support.signals import refused, same_answer
from tests.support.wire import ORIGIN, Wire

NOT_FOUND = "transaction_not_found"
CANCELLED = ("transaction.cancelled", "done", None)


async def opened(wire: Wire, kind: str) -> str:
    if kind == "register":
        return await wire.open_registration("ann")
    return await wire.open_authentication("ann")


async def answer_of(wire: Wire, kind: str, transaction: str, device: Authenticator) -> object:
    """Begin, and the device's answer with the handle."""
    handle, options = await wire.begin(kind, transaction)
    made = (
        Authenticator().register(options, ORIGIN)
        if kind == "register"
        else device.authenticate(options, ORIGIN)
    )
    return {"handshake_id": handle, "handshake_response": made, "transaction_id": transaction}


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_a_cancelled_transaction_begins_and_finishes_nothing(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    """The page gets the answer of a transaction that never was. The event names the user."""
    await wire.user("ann", device)
    directory, app = broker.parts.directory, await broker.parts.directory.app(wire.app_id)
    before = await directory.user(app, external_id="ann")
    place = f"/{kind}/transactions/webauthn"
    transaction = await opened(wire, kind)
    body = await answer_of(wire, kind, transaction, device)
    key = {"Authorization": f"Bearer {wire.key}"}
    for _ in range(2):
        answer = await golden(
            wire,
            "flex/cancel",
            "POST",
            "/transactions/cancel",
            {"transaction_id": transaction},
            headers=key,
        )
        assert (answer.status, answer.body) == (200, b"")
    with refused(broker, NOT_FOUND, "transaction_unknown"):
        begun = await wire.page(place + "/start", {"transaction_id": transaction})
    with refused(broker, NOT_FOUND, "handle_unknown"):
        finished = await wire.page(place + "/finish", body)
    assert (begun.status, finished.status) == (404, 404)
    never = await wire.page(place + "/start", {"transaction_id": "pbt_" + "x" * 43})
    same_answer(begun, never)
    after = await directory.user(app, external_id="ann")
    assert after.login_count == before.login_count
    assert len(await directory.credentials(app, after)) == 1
    events = await directory.events(wire.app_id, limit=100)
    assert [e.user_id for e in events if e.action == "transaction.cancelled"] == [before.id]


async def test_others_are_left_alone(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    """A transaction of another app, one that is unknown, used or malformed: 200, and no event."""
    other = await open_app()
    await wire.user("ann", device)
    foreign = await other.open_registration("ann")
    used = await wire.open_authentication("ann")
    nonce = await wire.authenticate(used, device)
    for transaction in (foreign, used, "pbt_" + "x" * 43, "nonsense"):
        answer = await wire.keyed("POST", "/transactions/cancel", {"transaction_id": transaction})
        assert (answer.status, answer.body) == (200, b"")
    assert CANCELLED not in await broker.events(wire.app_id)
    assert (await wire.redeem(nonce)).json["external_id"] == "ann", "its ceremony had finished"
    await other.register(foreign, Authenticator())


@pytest.mark.parametrize("body", [{}, {"transaction_id": ""}, {"transaction_id": 7}])
async def test_a_request_says_which_transaction(wire: Wire, body: object) -> None:
    assert (await wire.keyed("POST", "/transactions/cancel", body)).status == 400


async def test_of_a_cancel_and_a_finish_at_once_one_is_effective(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Whichever takes the transaction: a passkey without a cancelled event, or the event alone."""
    await wire.user("ann", device)
    for _ in range(20):
        before = (await broker.events(wire.app_id)).count(CANCELLED)
        transaction = await wire.open_authentication("ann")
        body = await answer_of(wire, "authenticate", transaction, device)
        finished, cancelled = await asyncio.gather(
            wire.page("/authenticate/transactions/webauthn/finish", body),
            wire.keyed("POST", "/transactions/cancel", {"transaction_id": transaction}),
        )
        events = (await broker.events(wire.app_id)).count(CANCELLED) - before
        assert cancelled.status == 200
        assert (finished.status, events) in ((200, 0), (404, 1))
