"""The main job over HTTP: register, sign in with and without a transaction, redeem once."""

from __future__ import annotations

from tests.conftest import ON_BOTH, Started
from tests.support.authenticator import Authenticator
from tests.support.wire import ORIGIN, Wire


@ON_BOTH
async def test_registers_and_signs_in(broker: Started, wire: Wire, device: Authenticator) -> None:
    transaction = await wire.open_registration("ann@example.org")
    receipt = (await wire.redeem(await wire.register(transaction, device), purpose="register")).json
    assert receipt["external_id"] == "ann@example.org"
    assert receipt["origin"] == ORIGIN
    assert receipt["user_verified"] is True

    transaction = await wire.open_authentication("ann@example.org")
    nonce = await wire.authenticate(transaction, device)
    answer = await wire.redeem(
        nonce, purpose="authenticate", transaction_id=transaction, external_id="ann@example.org"
    )
    assert answer.status == 200
    assert answer.json["passkey_id"] == receipt["passkey_id"]
    assert (await wire.redeem(nonce)).code == "invalid_nonce"

    nonce = await wire.authenticate(None, device)
    assert (await wire.redeem(nonce, purpose="authenticate")).json[
        "external_id"
    ] == "ann@example.org"

    assert await broker.events(wire.app_id) == [
        ("app.created", "done", None),
        ("user.created", "done", None),
        ("passkey.registered", "done", None),
        ("passkey.confirmed", "done", None),
        ("passkey.used", "done", None),
        ("nonce.replayed", "refused", "nonce_replayed"),
        ("passkey.used", "done", None),
    ]
