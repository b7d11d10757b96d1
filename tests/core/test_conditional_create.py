"""Conditional create: a passkey that the browser makes without a prompt, so without user presence.

WebAuthn L3 §7.1 drops the UP check "If options.mediation is … set to conditional". The backend
permits it for one transaction; nothing that a page sends does.
"""

from __future__ import annotations

from typing import Any

import pytest

from broker.model import Policy
from tests.conftest import OpenApp, Started
from tests.support.authenticator import Authenticator
from tests.support.signals import refused
from tests.support.wire import ORIGIN, Answer, Wire


async def register(
    wire: Wire, device: Authenticator, *, uv: bool = False, **options: Any
) -> Answer:
    """The last answer of a registration whose answer has no UP flag."""
    body = {"external_id": "ann", "passkey_display_name": "Ann", **options}
    transaction = (await wire.keyed("POST", "/transactions/register", body)).json["transaction_id"]
    handle, shown = await wire.begin("register", transaction)
    made = device.register(shown, ORIGIN, up=False, uv=uv)
    return await wire.finish("register", handle, made, transaction)


@pytest.fixture
async def wire(open_app: OpenApp) -> Wire:
    return await open_app(Policy(user_verification="preferred"))


@pytest.mark.parametrize("attestation", ["none", "direct"])
async def test_it_is_permitted_by_the_transaction(
    open_app: OpenApp, device: Authenticator, attestation: str
) -> None:
    wire = await open_app(Policy(user_verification="preferred").set("attestation", attestation))
    done = await register(wire, device, mediation="conditional")
    receipt = (await wire.redeem(done.json["nonce"], purpose="register")).json
    assert (receipt["user_present"], receipt["user_verified"]) == (False, False)
    # The passkey signs in as any other; a sign-in needs the user.
    transaction = await wire.open_authentication("ann")
    handle, shown = await wire.begin("authenticate", transaction)
    done = await wire.finish(
        "authenticate", handle, device.authenticate(shown, ORIGIN), transaction
    )
    assert (await wire.redeem(done.json["nonce"], purpose="authenticate")).json[
        "user_present"
    ] is True


@pytest.mark.parametrize("options", [{}, {"mediation": "required"}, {"mediation": None}])
async def test_without_that_the_user_must_be_present(
    broker: Started, wire: Wire, device: Authenticator, options: dict[str, Any]
) -> None:
    with refused(broker, "webauthn_login_failed", "user_presence"):
        assert (await register(wire, device, **options)).status == 401


async def test_a_page_can_not_permit_it(broker: Started, wire: Wire, device: Authenticator) -> None:
    transaction = await wire.open_registration("ann")
    handle, shown = await wire.begin("register", transaction, mediation="conditional")
    with refused(broker, "webauthn_login_failed", "user_presence"):
        made = device.register(shown, ORIGIN, up=False, uv=False)
        assert (await wire.finish("register", handle, made, transaction)).status == 401


async def test_a_policy_that_demands_user_verification_stands(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app(Policy(user_verification="required"))
    with refused(broker, "webauthn_login_failed", "user_verification"):
        assert (await register(wire, device, mediation="conditional")).status == 401


async def test_a_sign_in_from_autofill_needs_the_user(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    body = {"external_id": "ann", "mediation": "conditional"}
    transaction = (await wire.keyed("POST", "/transactions/authenticate", body)).json[
        "transaction_id"
    ]
    handle, shown = await wire.begin("authenticate", transaction)
    with refused(broker, "webauthn_login_failed", "user_presence"):
        answer = device.authenticate(shown, ORIGIN, up=False, uv=False)
        assert (await wire.finish("authenticate", handle, answer, transaction)).status == 401


async def test_another_word_is_refused(wire: Wire) -> None:
    body = {"external_id": "ann", "passkey_display_name": "Ann", "mediation": "silent"}
    answer = await wire.keyed("POST", "/transactions/register", body)
    assert (answer.status, answer.json["code"]) == (400, "invalid_request")
