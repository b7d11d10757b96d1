"""Ceremonies of users whom a keyed caller names: the Flex API's routes, golden files, what is taken
once, whose answer it is.

The steps are those of the routes with transactions; what is tested here is what the keyed way adds:
joined by user and purpose, no transaction, no nonce, confirmed at once.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.model import Policy, base64url
from broker.tokens import digest
from tests.conftest import SKEW, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, Misbehaviour, b64
from tests.support.byo import Byo
from tests.support.golden import golden
from tests.support.servers import kill
from tests.support.signals import counted, quiet, refused
from tests.support.stall import stalled
from tests.support.wire import ORIGIN, Answer, Wire

SENTENCE = "There is no begun ceremony of this user, or it is expired or already used; begin again."
KINDS = ["register", "authenticate"]


def key(wire: Wire) -> dict[str, str]:
    return {"Authorization": f"Bearer {wire.key}"}


async def begin(wire: Wire, kind: str, user: str, **more: object) -> dict[str, Any]:
    body = {"external_id": user, **({"user_name": user} if kind == "register" else {}), **more}
    answer = await wire.keyed("POST", f"/{kind}/start", body)
    assert answer.status == 200, answer.body
    options: dict[str, Any] = answer.json["options"]
    return options


async def finish(wire: Wire, kind: str, user: str, credential: object) -> Answer:
    return await wire.keyed(
        "POST", f"/{kind}/finish", {"external_id": user, "credential": credential}
    )


async def answered(
    wire: Wire, kind: str, user: str, device: Authenticator, **how: Any
) -> dict[str, Any]:
    """Begin, and what the device says."""
    options = await begin(wire, kind, user)
    return (device.register if kind == "register" else device.authenticate)(options, ORIGIN, **how)


async def run(wire: Wire, kind: str, user: str, device: Authenticator) -> dict[str, Any]:
    """A whole ceremony; the receipt."""
    answer = await finish(wire, kind, user, await answered(wire, kind, user, device))
    assert answer.status == 200, answer.body
    receipt: dict[str, Any] = answer.json
    assert (receipt["external_id"], receipt["purpose"]) == (user, kind)
    return receipt


# -- golden files ----------------------------------------------------------------------------------


async def test_k1_registration(broker: Started, wire: Wire, device: Authenticator) -> None:
    body: dict[str, object] = {
        "external_id": "ann",
        "user_name": "ann@example.org",
        "user_display_name": "Ann",
        "passkey_display_name": "Ann's phone",
    }
    with counted(broker, "broker_ceremonies_total", kind="register", step="begin", result="ok"):
        begun = await golden(
            wire, "flex/k1-start", "POST", "/register/start", body, headers=key(wire)
        )
    body = {"external_id": "ann", "credential": device.register(begun.json["options"], ORIGIN)}
    with counted(broker, "broker_ceremonies_total", kind="register", step="finish", result="ok"):
        await golden(wire, "flex/k1-finish", "POST", "/register/finish", body, headers=key(wire))
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        again = await golden(
            wire, "flex/k1-finish-again", "POST", "/register/finish", body, headers=key(wire)
        )
    assert again.json["error"] == SENTENCE
    assert await broker.events(wire.app_id) == [
        ("app.created", "done", None),
        ("user.created", "done", None),
        ("passkey.registered", "done", None),
    ]


async def test_k2_authentication(broker: Started, wire: Wire, device: Authenticator) -> None:
    await run(wire, "register", "ann", device)
    body: dict[str, object] = {"external_id": "ann"}
    begun = await golden(
        wire, "flex/k2-start", "POST", "/authenticate/start", body, headers=key(wire)
    )
    body["credential"] = device.authenticate(begun.json["options"], ORIGIN)
    with quiet(broker, "broker_redemptions_total", result="ok"):
        await golden(
            wire, "flex/k2-finish", "POST", "/authenticate/finish", body, headers=key(wire)
        )
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        await golden(
            wire, "flex/k2-finish-again", "POST", "/authenticate/finish", body, headers=key(wire)
        )


async def test_too_many_passkeys(broker: Started, open_app: OpenApp, device: Authenticator) -> None:
    """By either way to begin; a revoked passkey makes room."""
    wire = await open_app(Policy(max_passkeys=2))
    await run(wire, "register", "ann", device)
    passkey = (await run(wire, "register", "ann", Authenticator()))["passkey_id"]
    transaction = await wire.open_registration("ann")
    path = "/register/transactions/webauthn/start"
    with refused(broker, "too_many_passkeys", "too_many_passkeys", times=2):
        begun = await wire.page(path, {"transaction_id": transaction})
        assert (begun.status, begun.code) == (409, "too_many_passkeys")
        body = {"external_id": "ann", "user_name": "ann"}
        await golden(wire, "flex/k1-too-many", "POST", "/register/start", body, headers=key(wire))
    await run(wire, "authenticate", "ann", device)
    await begin(wire, "register", "bob")
    user = (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    assert (await wire.keyed("DELETE", f"/users/{user}/devices/{passkey}")).status == 200
    assert (await wire.page(path, {"transaction_id": transaction})).status == 200


async def test_registrations_that_began_below_the_limit_add_no_more_than_it(
    broker: Started, open_app: OpenApp
) -> None:
    """Three are begun, two fit. The device that made the third one may forget it."""
    wire, devices = await open_app(Policy(max_passkeys=2)), [Authenticator() for _ in range(3)]
    begun = [await wire.begin("register", await wire.open_registration("ann")) for _ in devices]
    answers = [
        (handle, device.register(options, ORIGIN))
        for (handle, options), device in zip(begun, devices, strict=True)
    ]
    for handle, answer in answers[:2]:
        assert (await wire.finish("register", handle, answer)).status == 200
    with refused(broker, "webauthn_login_failed", "too_many_passkeys"):
        refusal = await wire.finish("register", *answers[2])
    assert (refusal.status, refusal.code) == (401, "webauthn_login_failed")
    assert refusal.json["error"].startswith(
        "This account has as many passkeys as it may have; remove one first."
    )
    assert refusal.json["signal"]["credential_id"] == answers[2][1]["id"]
    assert (await broker.events(wire.app_id))[-1] == (
        "passkey.registered",
        "refused",
        "too_many_passkeys",
    )
    assert len((await wire.keyed("GET", "/passkeys?external_id=ann")).json["passkeys"]) == 2


async def test_a_passkey_that_nobody_confirmed_makes_room(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    """Not before its nonce is dead."""
    wire = await open_app(Policy(max_passkeys=1, live_at="redemption"))
    nonce = await wire.register(await wire.open_registration("ann"), device)
    path, body = (
        "/register/transactions/webauthn/start",
        {"transaction_id": await wire.open_registration("ann")},
    )
    with refused(broker, "too_many_passkeys", "too_many_passkeys"):
        assert (await wire.page(path, body)).code == "too_many_passkeys"
    broker.clock.ahead += 661
    assert (await wire.redeem(nonce)).code == "invalid_nonce"
    again = await wire.register(await wire.open_registration("ann"), Authenticator())
    assert (await wire.redeem(again)).status == 200


# -- names and policy ------------------------------------------------------------------------------


async def test_names(wire: Wire) -> None:
    """The authenticator shows two, lists show the third; what is not given is the one before."""
    options = await begin(wire, "register", "ann")
    assert (options["user"]["name"], options["user"]["displayName"]) == ("ann", "ann")
    options = await begin(
        wire, "register", "ann", user_display_name="Ann", authenticator_attachment="platform"
    )
    assert (options["user"]["name"], options["user"]["displayName"]) == ("ann", "Ann")
    assert options["authenticatorSelection"]["authenticatorAttachment"] == "platform"
    for name in (None, "phone"):
        options = await begin(wire, "register", "ann", passkey_display_name=name)
        made = Authenticator().register(options, ORIGIN)
        assert (await finish(wire, "register", "ann", made)).status == 200
    user = (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    devices = (await wire.keyed("GET", f"/users/{user}/devices")).json["devices"]
    assert [device["friendly_name"] for device in devices] == ["ann", "phone"]


@pytest.mark.parametrize("live_at", ["finish", "redemption"])
async def test_the_finish_is_the_redemption(
    open_app: OpenApp, device: Authenticator, live_at: Any
) -> None:
    wire = await open_app(Policy(live_at=live_at))
    await run(wire, "register", "ann", device)
    user = (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]
    assert user["status"] == "active"
    [shown] = (await wire.keyed("GET", f"/users/{user['id']}/devices")).json["devices"]
    assert (shown["live"], shown["confirmed_at"]) == (True, shown["created_at"])
    await run(wire, "authenticate", "ann", device)


async def test_users_without_passkeys(broker: Started, wire: Wire) -> None:
    with refused(broker, "user_not_found", "user_not_found"):
        answer = await wire.keyed("POST", "/authenticate/start", {"external_id": "ann"})
    assert (answer.status, answer.code) == (404, "user_not_found")
    await begin(wire, "register", "ann")
    with refused(broker, "user_has_no_passkeys", "user_has_no_passkeys"):
        answer = await wire.keyed("POST", "/authenticate/start", {"external_id": "ann"})
    assert (answer.status, answer.code) == (409, "user_has_no_passkeys")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fault_of_form_spends_nothing(wire: Wire, device: Authenticator, kind: str) -> None:
    await run(wire, "register", "ann", device)
    device = device if kind == "authenticate" else Authenticator()
    credential = await answered(wire, kind, "ann", device)
    for user, wrong in (
        ("ann", None),
        ("ann", {**credential, "id": "="}),
        ("ann", {**credential, "response": {}}),
        ("", credential),
        ("x" * 257, credential),
    ):
        answer = await finish(wire, kind, user, wrong)
        assert (answer.status, answer.code) == (400, "invalid_request")
    assert (await finish(wire, kind, "ann", credential)).status == 200


# -- once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_of_50_finishes_one_succeeds(
    broker: Started, start_broker: Starter, wire: Wire, device: Authenticator, kind: str
) -> None:
    """On two instances."""
    await run(wire, "register", "ann", device)
    device = device if kind == "authenticate" else Authenticator()
    other = await start_broker()
    ways = [wire, Wire(wire.session, other.url, wire.app_id, wire.key)]
    credential = await answered(wire, kind, "ann", device)
    answers = await asyncio.gather(
        *(finish(ways[n % 2], kind, "ann", credential) for n in range(50))
    )
    assert sorted(a.status for a in answers) == [200] + [404] * 49
    seen = sum(
        one.metric(
            "broker_refusals_total", code="transaction_not_found", reason="user_has_no_ceremony"
        )
        for one in (broker, other)
    )
    assert seen == 49


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_answer_spends_the_ceremony(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    await run(wire, "register", "ann", device)
    device = device if kind == "authenticate" else Authenticator()
    how: Misbehaviour = {"uv": False}
    options = await begin(wire, kind, "ann")
    act = device.register if kind == "register" else device.authenticate
    with refused(broker, "webauthn_login_failed", "user_verification"):
        answer = await finish(wire, kind, "ann", act(options, ORIGIN, **how))
    assert (answer.status, answer.code) == (401, "webauthn_login_failed")
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        assert (await finish(wire, kind, "ann", act(options, ORIGIN))).status == 404
    await run(wire, kind, "ann", device if kind == "authenticate" else Authenticator())


@pytest.mark.parametrize("kind", KINDS)
async def test_a_second_begin_replaces_the_first(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    await run(wire, "register", "ann", device)
    device = device if kind == "authenticate" else Authenticator()
    first = await answered(wire, kind, "ann", device)
    second = await answered(
        wire, kind, "ann", device if kind == "authenticate" else Authenticator()
    )
    assert (await finish(wire, kind, "ann", second)).status == 200
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        assert (await finish(wire, kind, "ann", first)).status == 404
    await begin(wire, kind, "ann")
    with refused(broker, "webauthn_login_failed", "challenge"):
        assert (await finish(wire, kind, "ann", first)).status == 401


async def test_the_two_purposes_are_apart(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await run(wire, "register", "ann", device)
    made = await answered(wire, "register", "ann", Authenticator())
    signed = await answered(wire, "authenticate", "ann", device)
    assert (await finish(wire, "register", "ann", made)).status == 200
    assert (await finish(wire, "authenticate", "ann", signed)).status == 200


@pytest.mark.parametrize("kind", KINDS)
async def test_a_ceremony_ends_with_its_life(
    broker: Started, open_app: OpenApp, device: Authenticator, kind: str
) -> None:
    wire = await open_app(Policy(ceremony_life=30))
    await run(wire, "register", "ann", device)
    credential = await answered(
        wire, kind, "ann", device if kind == "authenticate" else Authenticator()
    )
    broker.clock.ahead = 30 + SKEW
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        assert (await finish(wire, kind, "ann", credential)).status == 404


async def test_no_cap_counts_keyed_ceremonies(open_app: OpenApp, device: Authenticator) -> None:
    wire = await open_app(Policy(discoverable_limit=1))
    await run(wire, "register", "ann", device)
    await wire.begin("authenticate", None)
    for _ in range(3):
        await begin(wire, "authenticate", "ann")


# -- whose -----------------------------------------------------------------------------------------


async def test_another_users_answer_never_finishes(broker: Started, wire: Wire) -> None:
    """Not the other's own answer to this challenge, not a signature that claims this user's handle,
    not the id of this user.
    """
    ann, bob = Authenticator(), Authenticator()
    await run(wire, "register", "ann", ann)
    await run(wire, "register", "bob", bob)
    for how in (
        {},
        {"user_handle": b64(ann.credentials("example.org")[0].user_handle)},
        {"user_handle": None},
    ):
        options = await begin(wire, "authenticate", "ann")
        mine = {k: v for k, v in options.items() if k != "allowCredentials"}
        with refused(broker, "webauthn_login_failed", "not_offered"):
            answer = await finish(
                wire, "authenticate", "ann", bob.authenticate(mine, ORIGIN, **how)
            )
        assert (answer.status, answer.code) == (401, "webauthn_login_failed")
    credential = await answered(wire, "authenticate", "ann", ann)
    await begin(wire, "authenticate", "bob")
    with refused(broker, "webauthn_login_failed", "not_offered"):
        assert (await finish(wire, "authenticate", "bob", credential)).status == 401
    assert (await finish(wire, "authenticate", "ann", credential)).json["external_id"] == "ann"


async def test_a_passkey_without_a_handle_signs_in_the_named_user(
    wire: Wire, device: Authenticator
) -> None:
    await run(wire, "register", "ann", device)
    credential = await answered(wire, "authenticate", "ann", device, user_handle=None)
    assert (await finish(wire, "authenticate", "ann", credential)).status == 200


async def test_another_apps_user_of_the_same_name(
    wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    other = await open_app()
    await run(wire, "register", "ann", device)
    await run(other, "register", "ann", Authenticator())
    credential = await answered(wire, "authenticate", "ann", device)
    assert (await finish(other, "authenticate", "ann", credential)).status == 404
    assert (await finish(wire, "authenticate", "ann", credential)).status == 200


async def test_a_page_can_not_reach_a_keyed_ceremony(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """A handle made up from what a page may know: the app's id and the user's."""
    await run(wire, "register", "ann", device)
    credential = await answered(wire, "authenticate", "ann", device)
    name = digest("handle", wire.app_id, "authenticate:ann")
    for handle in ("pbh_" + "a" * 43 + base64url(name), "pbh_" + base64url(name)):
        with refused(broker, "transaction_not_found", "handle_unknown"):
            assert (await wire.finish("authenticate", handle, credential)).status == 404
    assert (await finish(wire, "authenticate", "ann", credential)).status == 200


async def test_revoked_between_the_verdict_and_the_write(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    receipt = await run(wire, "register", "ann", device)
    credential = await answered(wire, "authenticate", "ann", device)
    async with stalled(broker, "credentials", mode="SHARE") as stall:
        finishing = asyncio.create_task(finish(wire, "authenticate", "ann", credential))
        await stall.waiting(1)
        await stall.connection.execute(
            "DELETE FROM credentials WHERE id = $1", receipt["passkey_id"]
        )
    answer = await finishing
    assert (answer.status, answer.code) == (401, "webauthn_login_failed")
    assert ("passkey.used", "refused", "revoked_or_counter") in await broker.events(wire.app_id)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_that_is_down_sends_the_backend_back_to_begin(
    start_broker: Starter, session: Any, own_stores: Any, device: Authenticator, kind: str
) -> None:
    started = await start_broker(own_stores)
    wire = await Wire.open(started.service, session)
    await run(wire, "register", "ann", device)
    credential = await answered(
        wire, kind, "ann", device if kind == "authenticate" else Authenticator()
    )
    kill(own_stores, "Valkey")
    with counted(
        started, "broker_ceremonies_total", kind=kind, step="finish", result="unavailable"
    ):
        answer = await finish(wire, kind, "ann", credential)
    assert (answer.status, answer.json["retry"]) == (503, "backend")


# -- with the other ways ---------------------------------------------------------------------------


@pytest.mark.parametrize("registered", ["transaction", "keyed", "propelauth"])
async def test_a_passkey_signs_in_every_way(
    wire: Wire, device: Authenticator, registered: str
) -> None:
    byo = Byo(wire)
    if registered == "transaction":
        await wire.user("ann", device)
    elif registered == "keyed":
        await run(wire, "register", "ann", device)
    else:
        await byo.register("ann", device)
    for transaction in (await wire.open_authentication("ann"), None):
        nonce = await wire.authenticate(transaction, device)
        assert (await wire.redeem(nonce, purpose="authenticate")).json["external_id"] == "ann"
    await run(wire, "authenticate", "ann", device)
    await byo.authenticate("ann", device)
    handles = {held.user_handle for held in device.credentials("example.org")}
    await run(wire, "register", "ann", more := Authenticator())
    assert {held.user_handle for held in more.credentials("example.org")} == handles


@pytest.mark.parametrize("kind", ["Registration", "Authentication"])
async def test_of_50_propelauth_finishes_one_succeeds(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    byo = Byo(wire)
    await byo.register("ann", device)
    if kind == "Registration":
        credential = Authenticator().register(await byo.begin_registration("ann"), ORIGIN)
    else:
        credential = device.authenticate(await byo.begin_authentication("ann"), ORIGIN)
    with refused(broker, "transaction_not_found", "user_has_no_ceremony", times=49):
        answers = await asyncio.gather(
            *(
                byo.run(f"FinishPasskey{kind}", userId="ann", publicKey=credential)
                for _ in range(50)
            )
        )
    assert sorted(a.status for a in answers) == [200] + [400] * 49
    assert {a.json["type"] for a in answers if a.status == 400} == {f"No{kind}ChallengeFound"}
    assert len(await byo.passkeys("ann")) == (2 if kind == "Registration" else 1)


@pytest.mark.parametrize("kind", ["Registration", "Authentication"])
async def test_a_second_propelauth_start_replaces_the_first(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    byo = Byo(wire)
    await byo.register("ann", device)

    async def answered() -> dict[str, Any]:
        if kind == "Registration":
            return Authenticator().register(await byo.begin_registration("ann"), ORIGIN)
        return device.authenticate(await byo.begin_authentication("ann"), ORIGIN)

    finish, first = f"FinishPasskey{kind}", await answered()
    second = await answered()
    await byo.ok(finish, userId="ann", publicKey=second)
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        await byo.refused(400, f"No{kind}ChallengeFound", finish, userId="ann", publicKey=first)
    await answered()
    with refused(broker, "webauthn_login_failed", "challenge"):
        await byo.refused(400, f"No{kind}ChallengeFound", finish, userId="ann", publicKey=first)


async def test_another_users_answer_never_finishes_a_propelauth_sign_in(
    broker: Started, wire: Wire
) -> None:
    byo, ann, bob = Byo(wire), Authenticator(), Authenticator()
    await byo.register("ann", ann)
    await byo.register("bob", bob)
    options = await byo.begin_authentication("ann")
    mine = {k: v for k, v in options.items() if k != "allowCredentials"}
    with refused(broker, "webauthn_login_failed", "not_offered"):
        await byo.refused(
            400,
            "UnexpectedError",
            "FinishPasskeyAuthentication",
            userId="ann",
            publicKey=bob.authenticate(mine, ORIGIN),
        )
    made = Authenticator().register(await byo.begin_registration("ann"), ORIGIN)
    finish = "FinishPasskeyRegistration"
    await byo.refused(400, "NoRegistrationChallengeFound", finish, userId="bob", publicKey=made)
    await byo.ok(finish, userId="ann", publicKey=made)
    assert (len(await byo.passkeys("ann")), len(await byo.passkeys("bob"))) == (2, 1)
