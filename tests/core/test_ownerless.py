"""Passkeys that nobody owns yet: they sign in nowhere in the Flex API, get one owner once, and
leave nobody behind.

They come from pages that register before anybody says who it is, where an app's policy lets them;
here the verbs make them.
"""

from __future__ import annotations

import asyncio

import pytest

from broker.broker import Nonce
from broker.ceremony import parse_authentication, parse_registration
from broker.errors import (
    DiscoverableRefused,
    NoPasskeys,
    OwnedAlready,
    UnknownNonce,
    UnknownPasskey,
)
from broker.model import (
    ANYONE,
    ByTransaction,
    Caller,
    CeremonyOptions,
    ExpectedReceipt,
    Names,
    Policy,
    RelyingParty,
    Unowned,
)
from tests.conftest import OpenApp, Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.golden import golden
from tests.support.signals import refused
from tests.support.verbs import PAGE, by_handle, keyed, nonce_of
from tests.support.wire import ORIGIN, Wire


async def ownerless(broker: Started, wire: Wire, device: Authenticator) -> tuple[RelyingParty, str]:
    """A passkey of nobody; the app and the passkey's id."""
    app = await broker.parts.directory.app(wire.app_id)
    transaction = await broker.parts.broker.open_registration(
        keyed(app), ANYONE, Names("Somebody", "Somebody", "Somebody")
    )
    nonce = await wire.register(transaction, device)
    receipt = (
        await broker.parts.broker.redeem(keyed(app), nonce, ExpectedReceipt(unowned=True))
    ).receipt
    assert isinstance(receipt.subject, Unowned)
    assert receipt.external_id is None
    return app, receipt.passkey_id


async def users(broker: Started, app: RelyingParty) -> list[tuple[str | None, str]]:
    """External id and status of every row, also of those that no list shows."""
    rows = await broker.parts.postgres.rows(
        "users",
        "SELECT external_id, status FROM users WHERE app_id = $1 ORDER BY external_id",
        app.id,
    )
    return [(row["external_id"], row["status"]) for row in rows]


async def test_it_signs_in_nowhere(broker: Started, wire: Wire, device: Authenticator) -> None:
    """Not without a name, not by an allow list, not as its own id; the same refusal as for an
    unknown one, but without a signal: somebody has it."""
    app, passkey = await ownerless(broker, wire, device)
    handle, options = await wire.begin("authenticate", None)
    with refused(broker, "discoverable_login_failed", "ownerless"):
        answer = await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    assert (answer.status, set(answer.json)) == (401, {"code", "error"})
    for body, code in (
        ({"passkeys": [passkey]}, "user_has_no_passkeys"),
        ({"external_id": passkey}, "user_not_found"),
    ):
        with refused(broker, code, code):
            answer = await wire.keyed("POST", "/transactions/authenticate", body)
    options = (
        await wire.keyed("POST", "/ceremonies/authenticate/start", {"discoverable": True})
    ).json["options"]
    signed = {"credential": device.authenticate(options, ORIGIN)}
    with refused(broker, "discoverable_login_failed", "ownerless"):
        await wire.keyed("POST", "/ceremonies/authenticate/finish", signed)
    assert (await wire.keyed("GET", "/users")).json["total_users"] == 0
    assert app.id == wire.app_id


async def test_it_is_listed_without_an_owner(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    _, passkey = await ownerless(broker, wire, device)
    headers = {"Authorization": f"Bearer {wire.key}"}
    await golden(wire, "flex/passkey-ownerless", "GET", f"/passkeys/{passkey}", headers=headers)
    [listed] = (await wire.keyed("GET", "/passkeys")).json["passkeys"]
    assert (listed["id"], listed["external_id"], listed["user_id"]) == (passkey, None, None)


async def test_it_gets_an_owner_once(broker: Started, wire: Wire, device: Authenticator) -> None:
    """Who may be new or there already; from then on it is a passkey like any other, and no second
    call changes that.
    """
    app, passkey = await ownerless(broker, wire, device)
    headers, path = {"Authorization": f"Bearer {wire.key}"}, f"/passkeys/{passkey}/owner"
    await golden(wire, "flex/passkey-owner", "POST", path, {"external_id": "ann"}, headers=headers)
    with refused(broker, "passkey_has_owner", "passkey_has_owner", times=2):
        body = {"external_id": "bob"}
        await golden(wire, "flex/passkey-owner-again", "POST", path, body, headers=headers)
        assert (await wire.keyed("POST", path, {"external_id": "ann"})).status == 409
    assert await users(broker, app) == [("ann", "active")], (
        "nobody was made for a call that was refused"
    )
    for transaction in (None, await wire.open_authentication("ann")):
        assert (await wire.redeem(await wire.authenticate(transaction, device))).json[
            "external_id"
        ] == "ann"
    second = Authenticator()
    _, passkey = await ownerless(broker, wire, second)
    await broker.parts.directory.assign(app, passkey, "ann")
    assert (await wire.redeem(await wire.authenticate(None, second))).json["external_id"] == "ann"
    assert await users(broker, app) == [("ann", "active")]
    events = await broker.events(wire.app_id)
    assert events.count(("passkey.assigned", "done", None)) == 2
    assert events.count(("user.created", "done", None)) == 1


@pytest.mark.parametrize("known", [True, False])
async def test_of_20_owners_at_once_one_gets_it(
    broker: Started, start_broker: Starter, wire: Wire, device: Authenticator, known: bool
) -> None:
    """On two instances, whether the users are there or not; who loses is told that it has an owner,
    and nobody is made for it.
    """
    app, passkey = await ownerless(broker, wire, device)
    other = await start_broker()
    if known:
        await asyncio.gather(*(wire.open_registration(f"user-{n}") for n in range(20)))
    directories = [broker.parts.directory, other.parts.directory]
    results = await asyncio.gather(
        *(directories[n % 2].assign(app, passkey, f"user-{n}") for n in range(20)),
        return_exceptions=True,
    )
    assert sum(isinstance(r, OwnedAlready) for r in results) == 19
    owner = (await broker.parts.directory.passkey(app, passkey)).external_id
    [given] = [r for r in results if not isinstance(r, BaseException)]
    assert given.external_id == owner
    found = await users(broker, app)
    assert len(found) == (20 if known else 1)
    assert [name for name, status in found if status == "active"] == [owner]
    assert (await wire.redeem(await wire.authenticate(None, device))).json["external_id"] == owner


async def test_20_passkeys_get_one_new_owner_at_once(broker: Started, wire: Wire) -> None:
    made = [await ownerless(broker, wire, Authenticator()) for _ in range(20)]
    await asyncio.gather(
        *(broker.parts.directory.assign(app, passkey, "ann") for app, passkey in made)
    )
    assert await users(broker, made[0][0]) == [("ann", "active")]
    assert (await broker.events(wire.app_id)).count(("user.created", "done", None)) == 1


async def test_an_owner_of_what_is_not_there(
    broker: Started, wire: Wire, open_app: OpenApp
) -> None:
    app, passkey = await ownerless(broker, await open_app(), Authenticator())
    mine = await broker.parts.directory.app(wire.app_id)
    for unknown in (passkey, "x" * 24, "none", "a\0b"):
        with pytest.raises(UnknownPasskey):
            await broker.parts.directory.assign(mine, unknown, "ann")
    assert await users(broker, mine) == []
    assert await users(broker, app) == [(None, "active")]


async def test_what_is_revoked_leaves_nobody_behind(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """By either way to revoke; and a revoked one gets no owner."""
    app, passkey = await ownerless(broker, wire, device)
    assert (await wire.keyed("DELETE", f"/passkeys/{passkey}")).status == 200
    with refused(broker, "device_not_found", "device_not_found"):
        await wire.keyed("POST", f"/passkeys/{passkey}/owner", {"external_id": "ann"})
    assert await users(broker, app) == []
    _, passkey = await ownerless(broker, wire, device)
    assert (await wire.keyed("POST", "/signals/delete", {"passkeys": [passkey]})).json[
        "missing"
    ] == []
    assert await users(broker, app) == []
    assert (await broker.events(wire.app_id)).count(("passkey.revoked", "done", None)) == 2


async def test_a_page_that_never_finishes_leaves_nobody_behind(broker: Started, wire: Wire) -> None:
    """Nor does one whose answer is refused, or whose credential is registered already."""
    app = await broker.parts.directory.app(wire.app_id)
    device = Authenticator()
    await wire.user("ann", device)
    for how in ({"uv": False}, {"credential_id": next(iter(device.held))}):
        transaction = await broker.parts.broker.open_registration(
            keyed(app), ANYONE, Names("Somebody", "Somebody", "Somebody")
        )
        begun = await broker.parts.broker.begin_registration(
            Caller(app), ByTransaction(transaction), "page"
        )
        made = Authenticator().register(begun.public_key, ORIGIN, **how)
        assert (
            await wire.finish("register", by_handle(begun).handle, made, transaction)
        ).status == 401
    assert await users(broker, app) == [("ann", "active")]


async def test_one_that_waits_for_redemption_makes_nobody_active(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    """With policy `live_at=redemption` an owner alone does not make it sign in; its nonce does."""
    wire = await open_app(Policy(live_at="redemption"))
    app = await broker.parts.directory.app(wire.app_id)
    transaction = await broker.parts.broker.open_registration(
        keyed(app), ANYONE, Names("Somebody", "Somebody", "Somebody")
    )
    nonce = await wire.register(transaction, device)
    [listed] = (await wire.keyed("GET", "/passkeys")).json["passkeys"]
    await broker.parts.directory.assign(app, listed["id"], "ann")
    assert await users(broker, app) == [("ann", "pending")]
    with pytest.raises(NoPasskeys):
        await broker.parts.broker.open_authentication(keyed(app), "ann")
    await broker.parts.broker.redeem(keyed(app), nonce, ExpectedReceipt(unowned=True))
    assert await users(broker, app) == [("ann", "active")]
    assert (await wire.redeem(await wire.authenticate(None, device))).json["external_id"] == "ann"


@pytest.mark.parametrize("disabled", [True, False])
async def test_its_nonce_redeems_after_an_assignment_unless_the_owner_is_disabled(
    broker: Started, wire: Wire, device: Authenticator, disabled: bool
) -> None:
    """The owner was disabled before, and perhaps enabled again: another epoch than the nonce's."""
    directory, verbs = broker.parts.directory, broker.parts.broker
    app = await directory.app(wire.app_id)
    await wire.user("ann", Authenticator())
    await directory.disable_user(app, "ann", disabled=True)
    await directory.disable_user(app, "ann", disabled=disabled)
    names = Names("Somebody", "Somebody", "Somebody")
    nonce = await wire.register(await verbs.open_registration(keyed(app), ANYONE, names), device)
    listed = (await wire.keyed("GET", "/passkeys?order_by=created_at:DESC")).json["passkeys"]
    await directory.assign(app, listed[0]["id"], "ann")
    if disabled:
        with pytest.raises(UnknownNonce):
            await verbs.redeem(keyed(app), nonce, ExpectedReceipt(unowned=True))
    else:
        await verbs.redeem(keyed(app), nonce, ExpectedReceipt(unowned=True))
        opened = await wire.open_authentication("ann")
        assert (await wire.redeem(await wire.authenticate(opened, device))).status == 200


async def test_where_it_is_asked_for_it_stands_for_itself(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    """The verbs let one answer where the caller says so, and redeem it where the caller says so;
    the receipt names nobody else.
    """
    wire = await open_app(Policy(passlock_open_registration=True))
    app, passkey = await ownerless(broker, wire, device)
    verbs = broker.parts.broker
    for asked, may in (
        (CeremonyOptions(unowned=True), True),
        (CeremonyOptions(unowned=True), False),
        (CeremonyOptions(), False),
    ):
        begun = await verbs.begin_authentication(Caller(app), ANYONE, "page", options=asked)
        answer = parse_authentication(device.authenticate(begun.public_key, ORIGIN))
        if asked.unowned:
            nonce = nonce_of(
                await verbs.finish_authentication(
                    Caller(app), by_handle(begun), answer, PAGE, Nonce()
                )
            )
            if may:
                receipt = (
                    await verbs.redeem(keyed(app), nonce, ExpectedReceipt(unowned=True))
                ).receipt
                assert isinstance(receipt.subject, Unowned)
                assert receipt.passkey_id == passkey
                continue
            for _ in range(2):
                with pytest.raises(UnknownNonce):
                    await verbs.redeem(keyed(app), nonce)
        else:
            with pytest.raises(DiscoverableRefused):
                await verbs.finish_authentication(
                    Caller(app), by_handle(begun), answer, PAGE, Nonce()
                )


async def test_two_devices_of_one_page_are_two_nobodies(broker: Started, wire: Wire) -> None:
    """One transaction, one passkey: each nobody has a handle of its own, so authenticators keep
    both.
    """
    app = await broker.parts.directory.app(wire.app_id)
    device = Authenticator()
    for _ in range(2):
        options = (
            await broker.parts.broker.begin_registration(
                Caller(app),
                ByTransaction(
                    await broker.parts.broker.open_registration(
                        keyed(app), ANYONE, Names("Somebody", "Somebody", "Somebody")
                    )
                ),
                "page",
            )
        ).public_key
        parse_registration(device.register(options, ORIGIN))
    assert len(device.credentials(app.rp_id)) == 2
