"""One app, every dialect at once: a passkey made through one signs in through every other, as the
same user, by name and without one.

What stays apart: second factors, and passkeys that nobody owns yet.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from broker.dialects import DIALECTS, openers
from broker.dialects.declaration import Dialect
from broker.model import Policy
from tests.conftest import ON_BOTH, OpenApp, Started
from tests.dialects.ways import BY_NAME, REGISTER, WITHOUT, SignIn
from tests.support.authenticator import Authenticator
from tests.support.byo import Byo
from tests.support.hanko import SECOND_LOGIN, SECOND_REGISTRATION, Hanko
from tests.support.passlock import Passlock
from tests.support.signals import refused
from tests.support.wire import ORIGIN, UnexpectedStatus, Wire


def test_no_two_dialects_share_a_word() -> None:
    """An opener that two declared would let each finish the other's ceremonies."""
    for words in ("segments", "openers"):
        found = [word for dialect in DIALECTS for word in getattr(dialect, words)]
        assert len(found) == len(set(found)) >= len(DIALECTS), words
    assert all(re.fullmatch("[a-z_]+", opener) for opener in openers())


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_dialect_declares_the_first_segments_of_its_paths(dialect: Dialect) -> None:
    routes = dialect.load().routes(management=True, browser=True)
    found = {route.path.split("/")[1] for route in routes if not route.path.startswith("/{")}
    assert found == set(dialect.segments)


@ON_BOTH
@pytest.mark.parametrize("made", REGISTER)
async def test_every_pair(wire: Wire, device: Authenticator, made: str) -> None:
    await REGISTER[made](wire, "ann", device)
    await REGISTER[made](wire, "bob", Authenticator())
    for name, sign_in in BY_NAME.items():
        assert await sign_in(wire, "ann", device) == "ann", name
    for name, sign_in in WITHOUT.items():
        assert await sign_in(wire, None, device) == "ann", name
    (theirs,) = await Hanko(wire).credentials("ann")
    assert [p["credentialId"] for p in await Byo(wire).passkeys("ann")] == [theirs["id"]]
    first, _ = (await Passlock(wire).ok("GET", "/passkeys/"))["records"]
    assert first["credential"]["id"] == theirs["id"]


@ON_BOTH
@pytest.mark.parametrize(("first", "second"), list(product(REGISTER, repeat=2)))
async def test_a_passkey_is_not_made_twice(
    wire: Wire, device: Authenticator, first: str, second: str
) -> None:
    """What one dialect registered the others exclude: the authenticator itself says that it has a
    passkey already.
    """
    await REGISTER[first](wire, "ann", device)
    with pytest.raises(Exception, match="InvalidStateError"):
        await REGISTER[second](wire, "ann", device)


async def _is_refused(sign_in: SignIn, wire: Wire, device: Authenticator) -> None:
    """The finish answers without a token, and before that nothing fails."""
    with pytest.raises(UnexpectedStatus) as told:
        await sign_in(wire, None, device)
    assert b"The passkey could not be verified" in told.value.answer.body


@pytest.mark.parametrize(
    ("run", "user"),
    [
        *((run, "new") for name, run in REGISTER.items() if name != "propelauth"),
        *((run, "ann") for name, run in BY_NAME.items() if name != "propelauth"),
        *((run, None) for run in WITHOUT.values()),
    ],
)
async def test_a_required_binding_is_asked_for_before_the_authenticator_is(
    broker: Started, open_app: OpenApp, device: Authenticator, run: SignIn, user: str | None
) -> None:
    """A dialect whose finish gives a nonce or a token begins nothing without a binding."""
    wire = await open_app(Policy(binding_required=True))
    await Byo(wire).register("ann", device)
    with (
        refused(broker, "invalid_request", "binding_missing"),
        pytest.raises((UnexpectedStatus, AssertionError), match=r"400|BadRequest"),
    ):
        await run(wire, user, device)


async def test_a_finish_that_gives_its_keyed_caller_the_receipt_needs_no_binding(
    open_app: OpenApp, device: Authenticator
) -> None:
    """There is no nonce that could reach another browser's session."""
    wire = await open_app(Policy(binding_required=True))
    await REGISTER["propelauth"](wire, "ann", device)
    assert await BY_NAME["propelauth"](wire, "ann", device) == "ann"
    begun = await wire.keyed("POST", "/authenticate/start", {"external_id": "ann"})
    credential = device.authenticate(begun.of(200)["options"], ORIGIN)
    body = {"external_id": "ann", "credential": credential}
    receipt = (await wire.keyed("POST", "/authenticate/finish", body)).of(200)
    assert receipt["external_id"] == "ann"


async def test_what_was_begun_before_a_binding_was_required_ends_without_a_proof(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app()
    hanko, passlock, key = Hanko(wire), Passlock(wire), Authenticator()
    await REGISTER["flex"](wire, "ann", device)
    code = (await passlock.authenticate("ann", device))["code"]
    new = key.register(await hanko.begin_registration("new"), ORIGIN)
    login = device.authenticate(await hanko.begin(user_id="ann"), ORIGIN)
    token = await passlock.authorize_authentication("ann")
    session, options = await passlock.begin("authentication", {"authenticationToken": token})

    directory = broker.parts.directory
    app = await directory.app(wire.app_id)
    await directory.update_app(replace(app, policy=Policy(binding_required=True)))
    with refused(broker, "transaction_not_found", "binding_missing", times=2):
        assert (await hanko.page("/registration/finalize", new)).status == 400
        assert (await hanko.page("/login/finalize", login)).status == 401
    with refused(broker, "transaction_not_found", "binding_missing"):
        answer = device.authenticate(options, ORIGIN)
        assert (await passlock.finish("authentication", session, answer)).status == 400
    with refused(broker, "invalid_nonce", "binding_mismatch"):
        assert (await passlock.keyed("GET", f"/principal/{code}")).status == 404
    assert [p["credentialId"] for p in await Byo(wire).passkeys("new")] == []


@ON_BOTH
async def test_a_second_factor_is_one_in_every_dialect(broker: Started, wire: Wire) -> None:
    hanko, key, device = Hanko(wire), Authenticator(), Authenticator()
    await REGISTER["flex"](wire, "ann", device)
    await hanko.register("ann", key, at=SECOND_REGISTRATION)
    claims = await hanko.login(key, at=SECOND_LOGIN, user="ann")
    assert claims["purpose"] == "authenticate_second_factor"
    for sign_in in WITHOUT.values():
        with refused(broker, "discoverable_login_failed", "second_factor"):
            await _is_refused(sign_in, wire, key)
    options = await Byo(wire).begin_authentication("ann")
    assert len(options["allowCredentials"]) == 1, "the second factor is not offered"
    nonce = claims["jti"]
    assert (await wire.redeem(nonce, purpose="authenticate")).code == "invalid_nonce", (
        "no login, however it is asked"
    )


@ON_BOTH
async def test_a_passkey_that_nobody_owns_signs_in_nowhere_else(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app(replace(Policy(), passlock_open_registration=True))
    page, backend = Passlock(wire, ""), Passlock(wire)
    made = await page.run("registration", {"username": "ann"}, device)
    passkey = made["principal"]["authenticatorId"]
    assert await WITHOUT["passlock-page"](wire, None, device) == passkey
    for elsewhere in (WITHOUT["flex"], WITHOUT["hanko"]):
        with refused(broker, "discoverable_login_failed", "ownerless"):
            await _is_refused(elsewhere, wire, device)
    await backend.ok("PATCH", f"/passkeys/{passkey}", {"userId": "ann"})
    for sign_in in WITHOUT.values():
        assert await sign_in(wire, None, device) == "ann"


@ON_BOTH
async def test_a_nonce_is_redeemed_once_whichever_dialect_made_it(
    wire: Wire, device: Authenticator
) -> None:
    """Hanko's jti and Passlock's code are nonces: the second redemption is refused everywhere, and
    so is another app's.
    """
    await REGISTER["flex"](wire, "ann", device)
    jti = (await Hanko(wire).login(device))["jti"]
    assert (await wire.redeem(jti, purpose="authenticate", external_id="ann")).status == 200
    code = (await Passlock(wire).authenticate("ann", device))["code"]
    assert (await Passlock(wire).exchange(code))["userId"] == "ann"
    for spent in (jti, code):
        assert (await wire.redeem(spent)).code == "invalid_nonce"
        answer = await Passlock(wire).keyed("GET", f"/principal/{spent}")
        assert (answer.status, answer.json["_tag"]) == (404, "@error/InvalidCode")


@ON_BOTH
async def test_a_ceremony_is_finished_in_the_dialect_that_began_it(
    wire: Wire, device: Authenticator
) -> None:
    """The challenge of one dialect is no handle in another, so nothing that one checks is passed
    by.
    """
    await REGISTER["flex"](wire, "ann", device)
    handle, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
    answer: Any = device.authenticate(options, ORIGIN)
    refusal = await Hanko(wire).page("/login/finalize", answer)
    assert refusal.status == 401
    begun = await Hanko(wire).begin(user_id="ann")
    answer = device.authenticate(begun, ORIGIN)
    assert (
        await wire.finish("authenticate", begun["challenge"], answer)
    ).code == "transaction_not_found"
    await Byo(wire).begin_authentication("ann")
    assert (await Hanko(wire).page("/login/finalize", answer)).status == 200
    assert (
        await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    ).status == 200


async def test_a_begin_that_passlock_refuses_leaves_the_begun_ceremony(
    broker: Started, wire: Wire
) -> None:
    """A page that knows the transaction can't end the ceremony that another page has begun."""
    passlock, key = Passlock(wire), Authenticator()
    for kind, purpose in (("register", "registration"), ("authenticate", "authentication")):
        body: dict[str, object] = {"external_id": "ann", "second_factor": True}
        if kind == "register":
            body["passkey_display_name"] = "Ann"
        opened = await wire.keyed("POST", f"/transactions/{kind}", body)
        transaction = opened.json["transaction_id"]
        handle, options = await wire.begin(kind, transaction)
        for other in ("registration", "authentication"):
            reason = "second_factor" if other == purpose else "transaction_wrong_kind"
            with refused(broker, "transaction_not_found", reason):
                await passlock.page(f"/passkey/{other}/options", {f"{other}Token": transaction})
        made = key.register if kind == "register" else key.authenticate
        done = await wire.finish(kind, handle, made(options, ORIGIN))
        assert done.status == 200, (kind, done.body)


async def test_a_second_factors_transaction_begins_nothing_at_passlock(
    broker: Started, wire: Wire
) -> None:
    """Its wire has no word for one. A transaction of the Flex API that a page brings there is
    unknown, and stays.
    """
    opened = await wire.keyed(
        "POST",
        "/transactions/register",
        {"external_id": "ann", "passkey_display_name": "Ann", "second_factor": True},
    )
    transaction = opened.json["transaction_id"]
    passlock, key = Passlock(wire), Authenticator()
    with refused(broker, "transaction_not_found", "second_factor"):
        answer = await passlock.page(
            "/passkey/registration/options", {"registrationToken": transaction}
        )
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    handle, options = await wire.begin("register", transaction)
    made = key.register(options, ORIGIN)
    with refused(broker, "transaction_not_found", "other_finish"):
        answer = await passlock.finish("registration", handle, made)
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    assert (await wire.finish("register", handle, made)).status == 200
