"""Two brokers on the same stores are interchangeable at any step: what one begins the other ends,
and both follow one policy.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from typing import Any

import aiohttp
import pytest

from broker.model import Policy
from tests.conftest import Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.processes import DEADLINE
from tests.support.signals import counted, refused
from tests.support.wire import ORIGIN, Wire

CACHE_SECONDS = 0.9
PATIENCE = DEADLINE


async def two(
    start_broker: Starter, session: aiohttp.ClientSession, **changes: object
) -> tuple[tuple[Started, Wire], tuple[Started, Wire]]:
    first, second = await start_broker(**changes), await start_broker(**changes)
    wire = await Wire.open(first.service, session)
    return (first, wire), (second, Wire(session, second.url, wire.app_id, wire.key))


async def change_policy(broker: Started, app_id: str, policy: Policy) -> None:
    app = await broker.parts.directory.app(app_id)
    await broker.parts.directory.update_app(replace(app, policy=policy))


@pytest.mark.parametrize("order", sorted(product((0, 1), repeat=4))[1:-1], ids=str)
async def test_a_ceremony_goes_from_one_to_the_other(
    start_broker: Starter, session: aiohttp.ClientSession, order: tuple[int, ...]
) -> None:
    """Open, begin, finish and redeem, each on either instance, in every mixture: registration,
    sign-in, sign-in without a name.
    """
    both = await two(start_broker, session)
    opens, begins, finishes, redeems = (both[number][1] for number in order)
    device = Authenticator()
    transaction: str | None
    for kind in ("register", "authenticate", "discoverable"):
        step = "register" if kind == "register" else "authenticate"
        if kind == "register":
            transaction = await opens.open_registration("ann")
        else:
            transaction = await opens.open_authentication("ann") if kind == "authenticate" else None
        handle, options = await begins.begin(step, transaction)
        make = device.register if kind == "register" else device.authenticate
        answer = make(options, ORIGIN)
        with counted(
            both[order[2]][0], "broker_ceremonies_total", kind=kind, step="finish", result="ok"
        ):
            finished = await finishes.finish(step, handle, answer, transaction)
        assert finished.status == 200
        nonce = finished.json["nonce"]
        with counted(both[order[3]][0], "broker_redemptions_total", result="ok"):
            redeemed = await redeems.redeem(nonce, purpose=step, external_id="ann")
        assert redeemed.status == 200
        for broker, wire in both:
            with refused(broker, "transaction_not_found", "handle_unknown"):
                assert (await wire.finish(step, handle, answer, transaction)).status == 404
            with refused(broker, "invalid_nonce", "nonce_replayed"):
                assert (await wire.redeem(nonce)).status == 401
    assert (await both[0][0].events(both[0][1].app_id)).count(("passkey.used", "done", None)) == 2


async def test_a_policy_changed_in_the_middle_of_a_ceremony(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """Opened on the first, begun on the second, the policy changed, finished on the first, redeemed
    on the second.

    What was asked of the authenticator is judged as it was asked: a begun ceremony carries its
    algorithms and its verification.
    """
    (first, one), (_, other) = await two(start_broker, session)
    transaction = await one.open_registration("ann")
    handle, options = await other.begin("register", transaction)
    assert options["authenticatorSelection"]["userVerification"] == "required"
    await change_policy(
        first, one.app_id, Policy(user_verification="discouraged", nonce_life=5, algorithms=(-257,))
    )
    with refused(first, "webauthn_login_failed", "user_verification"):
        answer = await one.finish(
            "register", handle, device.register(options, ORIGIN, uv=False), transaction
        )
    assert answer.status == 401
    device = Authenticator()
    handle, options = await other.begin("register", transaction)
    assert options["authenticatorSelection"]["userVerification"] == "discouraged"
    assert [param["alg"] for param in options["pubKeyCredParams"]] == [-257]
    answer = await one.finish(
        "register", handle, device.register(options, ORIGIN, uv=False), transaction
    )
    receipt = (await other.redeem(answer.json["nonce"])).json
    assert (receipt["purpose"], receipt["user_verified"]) == ("register", False)


async def seen_within(wire: Wire, expected: str) -> float:
    """Seconds until a begin asks for this user verification."""
    began = time.monotonic()
    while True:
        _, options = await wire.begin("authenticate", None)
        if options["userVerification"] == expected:
            return time.monotonic() - began
        assert time.monotonic() - began < PATIENCE


async def test_a_changed_policy_is_seen_by_every_instance(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    """Within the time that a look-up is remembered; by the server's clock, which the test moves."""
    (first, one), (second, other) = await two(start_broker, session, cache_seconds=CACHE_SECONDS)
    for wire in (one, other):
        assert await seen_within(wire, "required") < PATIENCE
    await change_policy(first, one.app_id, Policy(user_verification="preferred"))
    for broker, wire in ((first, one), (second, other)):
        broker.clock.ahead += CACHE_SECONDS
        _, options = await wire.begin("authenticate", None)
        assert options["userVerification"] == "preferred"


async def test_a_remembered_look_up_ends_in_real_time(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    """Nobody moves the clock here."""
    (first, one), (_, other) = await two(start_broker, session, cache_seconds=CACHE_SECONDS)
    assert await seen_within(other, "required") < PATIENCE
    await change_policy(first, one.app_id, Policy(user_verification="discouraged"))
    assert await seen_within(other, "discouraged") < PATIENCE


async def test_a_revoked_key_is_refused_by_every_instance(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    both = await two(start_broker, session, cache_seconds=CACHE_SECONDS)
    first, one = both[0]
    keys: list[Any] = await first.parts.directory.keys(one.app_id)
    for _, wire in both:
        assert (await wire.keyed("GET", "/users")).status == 200
    assert await first.parts.directory.revoke_key(one.app_id, keys[0].id)
    for broker, wire in both:
        broker.clock.ahead += CACHE_SECONDS
        with refused(broker, "invalid_access_token", "key_unknown"):
            assert (await wire.keyed("GET", "/users")).status == 401
    assert [e[:2] for e in await first.events(one.app_id)].count(("key.revoked", "done")) == 1


async def test_the_cap_of_open_ceremonies_is_one_for_all_instances(
    start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    (first, one), (second, other) = await two(start_broker, session)
    await change_policy(first, one.app_id, Policy(discoverable_limit=4))
    for wire in (one, other, one, other):
        await wire.begin("authenticate", None)
    for broker, wire in ((first, one), (second, other)):
        with refused(broker, "too_many_requests", "discoverable_limit"):
            assert (await wire.page("/authenticate/transactions/webauthn/start", {})).status == 429


async def test_one_instance_may_go_in_the_middle(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    """Nothing of a ceremony is in a process: what a stopped one began, another ends."""
    (first, one), (_, other) = await two(start_broker, session)
    transaction = await one.open_registration("ann")
    handle, options = await one.begin("register", transaction)
    await first.service.close()
    answer = await other.finish("register", handle, device.register(options, ORIGIN), transaction)
    assert (await other.redeem(answer.json["nonce"], transaction_id=transaction)).status == 200
    events = await (await start_broker()).events(one.app_id)
    assert ("passkey.confirmed", "done", None) in events
