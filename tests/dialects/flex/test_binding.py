"""Browser binding: only its verifier redeems a bound nonce, and a policy may require a binding."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from broker.model import Policy, base64url
from broker.sdk.passkey_broker import new_binding
from tests.conftest import OpenApp, Started
from tests.support.authenticator import Authenticator
from tests.support.passlock import Passlock
from tests.support.signals import counted, refused, same_answer
from tests.support.wire import ORIGIN, Wire

BINDING, OTHER = new_binding(), new_binding()
START = "/authenticate/transactions/webauthn/start"


async def bound(wire: Wire, device: Authenticator, *, discoverable: bool) -> str:
    """A nonce of ann's sign-in that is bound to `BINDING`."""
    challenge = {"binding_challenge": BINDING.challenge}
    if not discoverable:
        body = {"external_id": "ann", **challenge}
        opened = await wire.keyed("POST", "/transactions/authenticate", body)
        return await wire.authenticate(opened.of(201)["transaction_id"], device)
    handle, options = await wire.begin("authenticate", None, **challenge)
    answer = device.authenticate(options, ORIGIN)
    return str((await wire.finish("authenticate", handle, answer)).of(200)["nonce"])


def test_a_new_binding_is_s256_of_rfc_7636() -> None:
    assert BINDING.challenge == base64url(hashlib.sha256(BINDING.verifier.encode()).digest())
    assert BINDING != OTHER


@pytest.mark.parametrize("discoverable", [False, True], ids=["transaction", "discoverable"])
async def test_a_bound_nonce_is_redeemed_with_its_verifier_alone(
    broker: Started, wire: Wire, device: Authenticator, discoverable: bool
) -> None:
    """Any other redemption is that of an unknown nonce, and spends it."""
    await wire.user("ann", device)
    nonce = await bound(wire, device, discoverable=discoverable)
    receipt = await wire.redeem(nonce, binding_verifier=BINDING.verifier)
    assert receipt.of(200)["external_id"] == "ann"

    unknown = await wire.redeem("pbn_" + "a" * 43)
    # The challenge in place of the verifier would be the method "plain".
    for verifier in (None, OTHER.verifier, BINDING.challenge):
        nonce = await bound(wire, device, discoverable=discoverable)
        brought = {"binding_verifier": verifier} if verifier else {}
        with (
            refused(broker, "invalid_nonce", "binding_mismatch"),
            counted(broker, "broker_redemptions_total", result="mismatch"),
        ):
            same_answer(unknown, await wire.redeem(nonce, **brought))
        with refused(broker, "invalid_nonce", "nonce_replayed"):
            await wire.redeem(nonce, binding_verifier=BINDING.verifier)


async def test_a_registration_is_bound_too(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    body = {
        "external_id": "ann",
        "passkey_display_name": "Ann",
        "binding_challenge": BINDING.challenge,
    }
    opened = await wire.keyed("POST", "/transactions/register", body)
    nonce = await wire.register(opened.of(201)["transaction_id"], device)
    with refused(broker, "invalid_nonce", "binding_mismatch"):
        await wire.redeem(nonce)


async def test_a_verifier_for_a_nonce_without_binding_is_refused(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """A page that removed the challenge from its start gains nothing (RFC 9700, PKCE downgrade)."""
    await wire.user("ann", device)
    nonce = await wire.authenticate(None, device)
    with refused(broker, "invalid_nonce", "binding_mismatch"):
        await wire.redeem(nonce, binding_verifier=BINDING.verifier)


async def test_a_page_does_not_bind_a_transaction(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    transaction = await wire.open_authentication("ann")
    body = {"transaction_id": transaction, "binding_challenge": OTHER.challenge}
    with refused(broker, "invalid_request", "scope"):
        assert (await wire.page(START, body)).status == 400


async def test_a_policy_that_requires_bindings(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    """It refuses at once what was begun, and what was minted, before it was set."""
    wire = await open_app()
    await wire.user("ann", device)
    earlier = await wire.authenticate(None, device)
    handle, options = await wire.begin("authenticate", None)
    directory = broker.parts.directory
    app = await directory.app(wire.app_id)
    await directory.update_app(replace(app, policy=Policy(binding_required=True)))

    register = {"external_id": "new", "passkey_display_name": "New"}
    for path, body in (
        ("/transactions/register", register),
        ("/transactions/authenticate", {"external_id": "ann"}),
    ):
        with refused(broker, "invalid_request", "binding_missing"):
            answer = await wire.keyed("POST", path, body)
        assert (answer.status, "binding_required" in answer.json["error"]) == (400, True)
    assert (await wire.keyed("GET", "/users?identifier=new")).json["users"] == []
    with refused(broker, "invalid_request", "binding_missing"):
        page = await wire.page(START, {})
    assert (page.status, "binding_required" in page.json["error"]) == (400, False)
    with refused(broker, "transaction_not_found", "binding_missing"):
        await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    with refused(broker, "invalid_nonce", "binding_mismatch"):
        await wire.redeem(earlier)

    for discoverable in (False, True):
        nonce = await bound(wire, device, discoverable=discoverable)
        answer = await wire.redeem(nonce, binding_verifier=BINDING.verifier)
        assert answer.status == 200
    start = await wire.keyed("POST", "/authenticate/start", {"external_id": "ann"})
    assert start.status == 200, "a ceremony without a nonce has nothing to bind"


async def test_a_bound_transaction_gives_no_token_to_be_checked_offline(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """A verifier of tokens asks for no binding. So the door of another dialect, which hands a token
    to the page, refuses the transaction before the passkey is used; its own door finishes it.
    """
    await wire.user("ann", device)
    body = {"external_id": "ann", "binding_challenge": BINDING.challenge}
    opened = await wire.keyed("POST", "/transactions/authenticate", body)
    transaction = opened.of(201)["transaction_id"]
    passlock = Passlock(wire)
    token = {"authenticationToken": transaction}
    session, options = await passlock.begin("authentication", token)
    answer = device.authenticate(options, ORIGIN)
    with refused(broker, "transaction_not_found", "binding_offline"):
        assert (await passlock.finish("authentication", session, answer)).status == 400
    nonce = await wire.authenticate(transaction, device)
    assert (await wire.redeem(nonce, binding_verifier=BINDING.verifier)).status == 200


@pytest.mark.parametrize("value", [None, "", 7, "a" * 42, "a" * 44, "a" * 42 + "+", "é" * 43])
async def test_a_malformed_binding_is_refused(
    broker: Started, wire: Wire, device: Authenticator, value: object
) -> None:
    """Also null, which an unset variable becomes. A malformed verifier spends nothing."""
    with refused(broker, "invalid_request", "field_type", times=2):
        body = {"external_id": "ann", "binding_challenge": value}
        assert (await wire.keyed("POST", "/transactions/authenticate", body)).status == 400
        assert (await wire.page(START, {"binding_challenge": value})).status == 400
    if value == "a" * 44:
        return
    await wire.user("ann", device)
    nonce = await bound(wire, device, discoverable=True)
    with refused(broker, "invalid_request", "field_type"):
        assert (await wire.redeem(nonce, binding_verifier=value)).status == 400
    assert (await wire.redeem(nonce, binding_verifier=BINDING.verifier)).status == 200
