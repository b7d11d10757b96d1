"""Revoke-all, disable and delete end what was opened or begun for a user before, and nonces: at
every step, whichever instance serves it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import aiohttp
import pytest

from broker.errors import UnknownUser
from tests.conftest import OpenApp, Started, Starter
from tests.core.test_openers import FINISHES, POLICY, STARTS
from tests.support.authenticator import Authenticator, flex_wire_form
from tests.support.byo import Byo
from tests.support.golden import golden
from tests.support.hanko import Hanko
from tests.support.passlock import Passlock
from tests.support.signals import lines, refused
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

Kind = Literal["register", "authenticate"]
Step = Literal["begin", "finish", "redeem"]
Ending = Callable[[Started, Wire], Awaitable[object]]


async def revoke_all(broker: Started, wire: Wire) -> None:
    directory = broker.parts.directory
    app = await directory.app(wire.app_id)
    await directory.revoke(app, await directory.user(app, external_id="ann"), None)


async def revoke_all_with_signals(broker: Started, wire: Wire) -> None:
    app = await broker.parts.directory.app(wire.app_id)
    await broker.parts.signals.prepare_delete(app, external_id="ann")


async def disable(broker: Started, wire: Wire, *, disabled: bool = True) -> None:
    directory = broker.parts.directory
    await directory.disable_user(await directory.app(wire.app_id), "ann", disabled=disabled)


async def disable_for_a_moment(broker: Started, wire: Wire) -> None:
    await disable(broker, wire)
    await disable(broker, wire, disabled=False)


async def delete(broker: Started, wire: Wire) -> None:
    directory = broker.parts.directory
    await directory.delete_user(await directory.app(wire.app_id), "ann")


ENDINGS: dict[str, Ending] = {
    ending.__name__: ending
    for ending in (revoke_all, revoke_all_with_signals, disable, disable_for_a_moment, delete)
}


@pytest.mark.parametrize("step", ["begin", "finish", "redeem"])
@pytest.mark.parametrize("kind", ["register", "authenticate"])
@pytest.mark.parametrize("name", ENDINGS)
async def test_what_was_begun_before_ends(
    start_broker: Starter,
    session: aiohttp.ClientSession,
    device: Authenticator,
    name: str,
    kind: Kind,
    step: Step,
) -> None:
    """The ending happens before `step`, at another instance than the ceremony's."""
    first, second = await start_broker(), await start_broker()
    wire = await Wire.open(first.service, session)
    await wire.user("ann", device)
    new = Authenticator() if kind == "register" else device

    async def end() -> None:
        await ENDINGS[name](second, wire)

    if kind == "register":
        transaction = await wire.open_registration("ann")
    else:
        transaction = await wire.open_authentication("ann")
    if step == "begin":
        await end()
        if kind == "register":
            with refused(first, "transaction_not_found", "epoch_over"):
                begun = await wire.page(
                    "/register/transactions/webauthn/start", {"transaction_id": transaction}
                )
            assert (begun.status, begun.code) == (404, "transaction_not_found")
            return
    handle, options = await wire.begin(kind, transaction)
    if step == "finish":
        await end()
    if kind == "register":
        answer = flex_wire_form(new.register(options, ORIGIN))
        reason = "no_user" if name == "delete" else "epoch_over"
    else:
        answer = new.authenticate(options, ORIGIN)
        reason = "revoked_or_counter"
    if step != "redeem":
        with refused(first, "webauthn_login_failed", reason):
            finished = await wire.finish(kind, handle, answer, transaction)
        assert (finished.status, finished.code) == (401, "webauthn_login_failed")
        return
    nonce = (await wire.finish(kind, handle, answer, transaction)).of(200)["nonce"]
    await end()
    with refused(first, "invalid_nonce", "passkey_revoked"):
        redeemed = await wire.redeem(nonce)
    assert (redeemed.status, redeemed.code) == (401, "invalid_nonce")


async def test_a_passkey_added_later_does_not_answer_an_earlier_transaction(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """The passkeys of a transaction that are too many to store are read at begin."""
    for _ in range(9):
        await wire.user("ann", Authenticator())
    opened = await wire.open_authentication("ann")
    await revoke_all(broker, wire)
    await wire.user("ann", device)
    with refused(broker, "transaction_not_found", "epoch_over"):
        again = await wire.page(
            "/authenticate/transactions/webauthn/start", {"transaction_id": opened}
        )
    assert (again.status, again.code) == (404, "transaction_not_found")


@pytest.mark.parametrize("name", [name for name in STARTS if "open registration" not in name])
async def test_every_finish_refuses_a_user_who_was_disabled_since(
    broker: Started, open_app: OpenApp, device: Authenticator, name: str
) -> None:
    wire, start = await open_app(POLICY), STARTS[name]
    await wire.user("ann", device)

    async def finish() -> Answer:
        handle, options = await start.begin(wire)
        if name in ended:
            await disable(broker, wire)
        if start.kind == "registration":
            answer = Authenticator().register(options, ORIGIN)
        else:
            answer = device.authenticate(options, ORIGIN)
        return await FINISHES[start.own[0]].send(wire, handle, "ann", answer)

    ended = {name}
    answer = await finish()
    assert answer.status in (400, 401), answer.body
    reasons = ("epoch_over", "revoked_or_counter", "user_disabled")
    assert sum(len(lines(broker, reason=reason)) for reason in reasons) == 1
    ended.clear()
    await disable(broker, wire, disabled=False)
    assert (await finish()).status == 200, "enabled again with the passkey"


async def test_a_disabled_user_is_told_to_keyed_callers(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app(POLICY)
    await wire.user("ann", device)
    await disable(broker, wire)
    byo, passlock = Byo(wire), Passlock(wire)
    hanko_user = {"user_id": "ann", "username": "ann@example.org"}
    asked = [
        await wire.keyed(
            "POST",
            "/transactions/register",
            {"external_id": "ann", "passkey_display_name": "Ann"},
        ),
        await golden(
            wire,
            "flex/m2-disabled",
            "POST",
            "/transactions/authenticate",
            {"external_id": "ann"},
            headers={"Authorization": f"Bearer {wire.key}"},
        ),
        await wire.keyed("POST", "/authenticate/start", {"external_id": "ann"}),
        await wire.keyed("POST", "/ceremonies/authenticate/start", {"external_id": "ann"}),
        await Hanko(wire).send("POST", "/registration/initialize", hanko_user),
        await golden(
            wire,
            "hanko/login-disabled",
            "POST",
            "/login/initialize",
            {"user_id": "ann"},
            headers={"apiKey": wire.key},
            below="/hanko/{app_id}",
        ),
        await byo.run("StartPasskeyRegistration", userId="ann", emailOrUsername="ann"),
        await golden(
            wire,
            "propelauth/start-authentication-disabled",
            "POST",
            "/run-command",
            {"command": "StartPasskeyAuthentication", "data": {"userId": "ann"}},
            headers={"Authorization": f"Bearer {wire.key}"},
            below="/propelauth",
        ),
        await passlock.keyed(
            "POST", "/passkey/authentication/authorize", {"rpId": RP_ID, "userId": "ann"}
        ),
    ]
    assert [answer.status for answer in asked] == [403] * len(asked)
    assert [answer.json["code"] for answer in asked[:4]] == ["user_disabled"] * 4
    assert len(lines(broker, code="user_disabled")) == len(asked)


async def test_a_user_is_disabled_and_enabled_once(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """A second disable changes nothing and is no event; the user is listed as inactive."""
    await wire.user("ann", device)
    with pytest.raises(UnknownUser):
        await broker.parts.directory.disable_user(
            await broker.parts.directory.app(wire.app_id), "bob", disabled=True
        )
    [user] = (await wire.keyed("GET", "/users?identifier=ann")).of(200)["users"]
    for status, verb in (("inactive", "disable"), ("active", "enable")):
        for _ in range(2):
            assert (await wire.keyed("POST", f"/users/{user['id']}/{verb}")).status == 200
        listed = await wire.keyed("GET", "/users?identifier=ann")
        assert [user["status"] for user in listed.of(200)["users"]] == [status]
    actions = [event[0] for event in await broker.events(wire.app_id)]
    assert (actions.count("user.disabled"), actions.count("user.enabled")) == (1, 1)
    await wire.authenticate(await wire.open_authentication("ann"), device)
