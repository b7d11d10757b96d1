"""Nonces at the backend: good once, briefly, for what the backend expects; and every refusal is the
same answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker.model import Policy
from tests.conftest import SKEW, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, b64
from tests.support.signals import counted, refused, same_answer
from tests.support.wire import ORIGIN, Wire

PARALLEL = 50


async def device_of(wire: Wire, external_id: str) -> dict[str, Any]:
    user = (await wire.keyed("GET", f"/users?identifier={external_id}&limit=1")).json["users"][0]
    return dict((await wire.keyed("GET", f"/users/{user['id']}/devices")).json["devices"][0])


async def test_the_receipt_is_honest(broker: Started, wire: Wire, device: Authenticator) -> None:
    passkey = await wire.user("ann", device)
    user = (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]
    with counted(broker, "broker_redemption_age_fraction_count"):
        receipt = (await wire.redeem(await wire.authenticate(None, device))).json
    at = receipt.pop("at")
    assert receipt == {
        "external_id": "ann",
        "user_id": user["id"],
        "purpose": "authenticate",
        "passkey_id": passkey,
        "credential_id": b64(next(iter(device.held))),
        "origin": ORIGIN,
        "user_present": True,
        "user_verified": True,
        "backup_eligible": True,
        "backed_up": True,
        "backup_changed": False,
        "counter_regressed": False,
        "attestation": "none",
        "authenticator_name_claimed": None,
        "second_factor": False,
        "approval": None,
    }
    assert at == (await device_of(wire, "ann"))["last_used_at"]


async def test_nothing_is_spent_where_no_receipt_can_be_signed(
    broker: Started, start_broker: Starter, session: Any, wire: Wire, device: Authenticator
) -> None:
    """An instance whose secret does not open the app's key finds that out before it takes the
    nonce.
    """
    await wire.user("ann", device)
    assert (await wire.redeem(await wire.authenticate(None, device), signed=True)).status == 200
    other = await start_broker(secret_key=("another-secret-0123456789abcdefghij",))
    there, nonce = (
        Wire(session, other.url, wire.app_id, wire.key),
        await wire.authenticate(None, device),
    )
    with refused(other, "service_unavailable", "signing_key_sealed"):
        assert (await there.redeem(nonce, signed=True)).status == 503
    assert (await wire.redeem(nonce, signed=True)).json["external_id"] == "ann"


@pytest.mark.parametrize("purpose", ["register", "authenticate"])
async def test_what_the_backend_expects_is_there(
    broker: Started, wire: Wire, device: Authenticator, purpose: str
) -> None:
    transaction = await wire.open_registration("ann")
    nonce = await wire.register(transaction, device)
    if purpose == "authenticate":
        transaction = await wire.open_authentication("ann")
        nonce = await wire.authenticate(transaction, device)
    with counted(broker, "broker_redemptions_total", result="ok"):
        answer = await wire.redeem(
            nonce, purpose=purpose, transaction_id=transaction, external_id="ann"
        )
    assert (answer.status, answer.json["purpose"]) == (200, purpose)


@pytest.mark.parametrize(
    "expected",
    [
        {"purpose": "register"},
        {"transaction_id": "pbt_" + "a" * 43},
        {"transaction_id": "x"},
        {"external_id": "bob"},
        {"external_id": "ANN"},
        {"external_id": "ann "},
        {"external_id": "x" * 5_000},
        {"purpose": "authenticate", "external_id": "bob"},
    ],
    ids=str,
)
@pytest.mark.parametrize("discoverable", [False, True], ids=["transaction", "discoverable"])
async def test_what_the_backend_does_not_expect_is_an_unknown_nonce(
    broker: Started, wire: Wire, device: Authenticator, expected: dict[str, str], discoverable: bool
) -> None:
    """And it is spent: whoever brought it has no second try."""
    await wire.user("ann", device)
    nonce = await wire.authenticate(
        None if discoverable else await wire.open_authentication("ann"), device
    )
    with (
        refused(broker, "invalid_nonce", "nonce_mismatch"),
        counted(broker, "broker_redemptions_total", result="mismatch"),
    ):
        mismatch = await wire.redeem(nonce, **expected)
    with (
        refused(broker, "invalid_nonce", "nonce_replayed"),
        counted(broker, "broker_redemptions_total", result="replayed"),
    ):
        again = await wire.redeem(nonce)
    assert (mismatch.status, mismatch.code) == (401, "invalid_nonce")
    same_answer(mismatch, again)


async def test_a_discoverable_nonce_never_has_a_transaction(
    wire: Wire, broker: Started, device: Authenticator
) -> None:
    """A backend that expects the transaction it opened is not content with somebody's one-click
    sign-in.
    """
    await wire.user("ann", device)
    transaction = await wire.open_authentication("ann")
    nonce = await wire.authenticate(None, device)
    with refused(broker, "invalid_nonce", "nonce_mismatch"):
        assert (await wire.redeem(nonce, transaction_id=transaction)).status == 401


async def test_all_bad_nonces_are_alike(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    """Unknown, malformed, of another kind, another app's, expired, redeemed."""
    await wire.user("ann", device)
    other, theirs = await open_app(), Authenticator()
    await other.user("ann", theirs)
    expired = await wire.authenticate(None, device)
    broker.clock.ahead += 61 + SKEW
    redeemed = await wire.authenticate(None, device)
    assert (await wire.redeem(redeemed)).status == 200
    foreign = await other.authenticate(None, theirs)
    answers = []
    for reason, nonce in (
        ("unknown", "pbn_" + "a" * 43),
        ("malformed", "nothing"),
        ("malformed", "pbn_" + "é" * 43),
        ("malformed", await wire.open_authentication("ann")),
        ("malformed", wire.key),
        ("expired", expired),
        ("replayed", redeemed),
        ("foreign", foreign),
        ("malformed", foreign + " "),
    ):
        with (
            refused(broker, "invalid_nonce", f"nonce_{reason}"),
            counted(broker, "broker_redemptions_total", result=reason),
        ):
            answers.append(await wire.redeem(nonce))
    assert (answers[0].status, answers[0].code) == (401, "invalid_nonce")
    for answer in answers[1:]:
        same_answer(answers[0], answer)
    assert (await other.redeem(foreign)).status == 200, "another app's try spends nothing"


@pytest.mark.parametrize(
    ("wait", "status"), [(0, 200), (59, 200), (60.5 + SKEW, 401), (3_600, 401)]
)
async def test_a_nonce_lives_for_a_minute(
    broker: Started, wire: Wire, device: Authenticator, wait: float, status: int
) -> None:
    await wire.user("ann", device)
    nonce = await wire.authenticate(None, device)
    broker.clock.ahead += wait
    with counted(broker, "broker_redemptions_total", result="ok" if status == 200 else "expired"):
        assert (await wire.redeem(nonce)).status == status


async def test_the_age_at_redemption_is_measured(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """As a fraction of the life: an operator sees how near to its end nonces are redeemed."""
    await wire.user("ann", device)
    nonce = await wire.authenticate(None, device)
    broker.clock.ahead += 45
    with (
        counted(broker, "broker_redemption_age_fraction_bucket", le="0.9"),
        counted(broker, "broker_redemption_age_fraction_bucket", 0, le="0.7"),
    ):
        assert (await wire.redeem(nonce)).status == 200


@pytest.mark.parametrize("purpose", ["register", "authenticate"])
async def test_50_redemptions_over_two_instances(
    start_broker: Starter, broker: Started, wire: Wire, device: Authenticator, purpose: str
) -> None:
    second = await start_broker()
    there = Wire(wire.session, second.url, wire.app_id, wire.key)
    nonce = await wire.register(await wire.open_registration("ann"), device)
    if purpose == "authenticate":
        nonce = await wire.authenticate(None, device)
    answers = await asyncio.gather(
        *(at.redeem(nonce, purpose=purpose) for at in (wire, there) * (PARALLEL // 2))
    )
    assert Counter(answer.status for answer in answers) == {200: 1, 401: PARALLEL - 1}
    lost = [answer for answer in answers if answer.status == 401]
    for answer in lost[1:]:
        same_answer(lost[0], answer)
    for result, number in (("ok", 1), ("replayed", PARALLEL - 1)):
        seen = sum(
            one.metric("broker_redemptions_total", result=result) for one in (broker, second)
        )
        assert seen == number
    confirmed = (await broker.events(wire.app_id)).count(("passkey.confirmed", "done", None))
    assert confirmed == (1 if purpose == "register" else 0)


async def test_redemption_confirms(broker: Started, wire: Wire, device: Authenticator) -> None:
    nonce = await wire.register(await wire.open_registration("ann"), device)
    assert (await device_of(wire, "ann"))["confirmed_at"] is None
    broker.clock.ahead += 10
    await wire.redeem(nonce)
    passkey = await device_of(wire, "ann")
    assert passkey["confirmed_at"] > passkey["created_at"]
    broker.clock.ahead += 10
    await wire.redeem(await wire.authenticate(None, device))
    assert (await device_of(wire, "ann"))["confirmed_at"] == passkey["confirmed_at"]
    assert (await broker.events(wire.app_id)).count(("passkey.confirmed", "done", None)) == 1


async def test_live_at_redemption(
    open_app: OpenApp, broker: Started, device: Authenticator
) -> None:
    """Where the policy says so, a passkey signs in only after the backend has redeemed the
    registration's nonce.
    """
    wire = await open_app(Policy(live_at="redemption"))
    nonce = await wire.register(await wire.open_registration("ann"), device)
    assert (await device_of(wire, "ann"))["live"] is False
    handle, options = await wire.begin("authenticate", None)
    with refused(broker, "discoverable_login_failed", "not_live"):
        answer = await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    assert (answer.status, "signal" in answer.json) == (401, False)
    assert (await broker.events(wire.app_id))[-1] == ("passkey.registered", "done", None)
    _, again = await wire.begin("register", await wire.open_registration("ann"))
    assert again["excludeCredentials"] == [], (
        "the authenticator shall be able to replace what never signed in"
    )
    with refused(broker, "user_has_no_passkeys", "user_has_no_passkeys"):
        answer = await wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"})
    assert answer.status == 409
    assert (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0][
        "status"
    ] == "pending"
    assert (await wire.redeem(nonce, purpose="register")).status == 200
    assert (await device_of(wire, "ann"))["live"] is True
    assert (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["status"] == "active"
    await wire.authenticate(await wire.open_authentication("ann"), device)


async def test_live_at_redemption_with_a_mismatch_stays_dead(
    open_app: OpenApp, broker: Started, device: Authenticator
) -> None:
    """The backend expected another user: the passkey was registered by the wrong person and never
    signs in.
    """
    wire = await open_app(Policy(live_at="redemption"))
    nonce = await wire.register(await wire.open_registration("ann"), device)
    with refused(broker, "invalid_nonce", "nonce_mismatch"):
        assert (await wire.redeem(nonce, external_id="bob")).status == 401
    assert (await device_of(wire, "ann"))["live"] is False
    assert ("passkey.confirmed", "done", None) not in await broker.events(wire.app_id)


Undo = Callable[[Started, Wire, str], Awaitable[object]]


async def _revoke(broker: Started, wire: Wire, external_id: str) -> None:
    app = await broker.parts.directory.app(wire.app_id)
    user = await broker.parts.directory.user(app, external_id=external_id)
    await broker.parts.directory.revoke(app, user, None)


async def _delete(broker: Started, wire: Wire, external_id: str) -> None:
    app = await broker.parts.directory.app(wire.app_id)
    await broker.parts.directory.delete_user(app, external_id)


@pytest.mark.parametrize("undo", [_revoke, _delete])
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_a_nonce_of_a_revoked_passkey_redeems_nothing(
    broker: Started, wire: Wire, device: Authenticator, kind: str, undo: Undo
) -> None:
    """The passkey was revoked, or its user deleted, between finish and redemption. The nonce is
    spent, and another one's redeems."""
    if kind == "register":
        nonce = await wire.register(await wire.open_registration("ann"), device)
    else:
        await wire.user("ann", device)
        nonce = await wire.authenticate(await wire.open_authentication("ann"), device)
    other = await wire.register(await wire.open_registration("ben"), Authenticator())
    await undo(broker, wire, "ann")
    with (
        counted(broker, "broker_redemptions_total", result="revoked"),
        refused(broker, "invalid_nonce", "passkey_revoked"),
    ):
        answer = await wire.redeem(nonce)
    same_answer(answer, await wire.redeem(nonce))
    assert (await wire.redeem(other)).status == 200
    assert (await broker.events(wire.app_id)).count(("passkey.confirmed", "done", None)) == (
        1 if kind == "register" else 2
    )
