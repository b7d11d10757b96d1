"""Passlock's tokens are good once, each for its own step, kind and app. Races are run with 50
requests at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from tests.conftest import ON_BOTH, SKEW, OpenApp, Started
from tests.support.authenticator import Authenticator
from tests.support.golden import golden
from tests.support.passlock import Passlock
from tests.support.signals import counted, refused, same_answer
from tests.support.wire import ORIGIN, Answer, Wire

PARALLEL = 50
REGISTRATION, AUTHENTICATION = "/passkey/registration", "/passkey/authentication"


@pytest.fixture
def passlock(wire: Wire) -> Passlock:
    return Passlock(wire)


def verdicts(answers: list[Answer]) -> Counter[tuple[int, str]]:
    return Counter((answer.status, answer.json["_tag"]) for answer in answers)


async def begun(
    passlock: Passlock, kind: str, device: Authenticator, user: str | None = "ann"
) -> tuple[str, dict[str, Any]]:
    """A begun ceremony and the device's answer."""
    if kind == "registration":
        body = {"registrationToken": await passlock.authorize_registration(str(user))}
        session, options = await passlock.begin(kind, body)
        return session, device.register(options, ORIGIN)
    body = {"authenticationToken": await passlock.authorize_authentication(user)}
    session, options = await passlock.begin(kind, body)
    return session, device.authenticate(options, ORIGIN)


# -- races -----------------------------------------------------------------------------------------


@ON_BOTH
@pytest.mark.parametrize("kind", ["registration", "authentication"])
async def test_of_50_verifications_one_succeeds(
    broker: Started, passlock: Passlock, device: Authenticator, kind: str
) -> None:
    if kind == "authentication":
        await passlock.user("ann", device)
    session, response = await begun(passlock, kind, device)
    metric = "register" if kind == "registration" else "authenticate"
    with (
        counted(broker, "broker_ceremonies_total", kind=metric, step="finish", result="ok"),
        refused(broker, "transaction_not_found", "handle_unknown", times=PARALLEL - 1),
    ):
        answers = await asyncio.gather(
            *(passlock.finish(kind, session, response) for _ in range(PARALLEL))
        )
    success = "RegistrationSuccess" if kind == "registration" else "AuthenticationSuccess"
    assert verdicts(answers) == {(200, success): 1, (400, "@error/BadRequest"): PARALLEL - 1}


@ON_BOTH
@pytest.mark.parametrize("with_user", [False, True])
async def test_of_50_exchanges_one_succeeds(
    broker: Started, passlock: Passlock, device: Authenticator, with_user: bool
) -> None:
    code = (await passlock.register("ann", device))["code"]
    method, body = ("POST", {"userId": "ann"}) if with_user else ("GET", None)
    with (
        counted(broker, "broker_redemptions_total", result="ok"),
        refused(broker, "invalid_nonce", "nonce_replayed", times=PARALLEL - 1),
    ):
        answers = await asyncio.gather(
            *(passlock.keyed(method, f"/principal/{code}", body) for _ in range(PARALLEL))
        )
    assert verdicts(answers) == {
        (200, "ExtendedPrincipal"): 1,
        (404, "@error/InvalidCode"): PARALLEL - 1,
    }


async def test_a_repeated_exchange_is_no_replay(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    """The same Idempotency-Key and request of the same API key, for a minute."""
    same, other = {"Idempotency-Key": "first"}, {"Idempotency-Key": "second"}
    path = f"/principal/{(await passlock.register('ann', device))['code']}"
    first = await passlock.keyed("GET", path, headers=same)
    with counted(broker, "broker_redemptions_total", result="repeated"):
        again = await passlock.keyed("GET", path, headers=same)
    assert (first.status, first.json) == (200, again.json)
    with refused(broker, "idempotency_key_reused", "idempotency_key_reused"):
        answer = await golden(
            passlock.wire,
            "passlock/principal-key-reused",
            "POST",
            path,
            {"userId": "ann"},
            headers=same | {"Authorization": f"Bearer {passlock.wire.key}"},
            below="/v2/{app_id}",
        )
    assert (answer.status, answer.json["_tag"]) == (422, "@error/BadRequest")
    with refused(broker, "invalid_nonce", "nonce_replayed", times=2):
        for headers in (other, None):
            assert (await passlock.keyed("GET", path, headers=headers)).status == 404


@ON_BOTH
@pytest.mark.parametrize("kind", ["update", "delete", "prune"])
async def test_of_50_exchanges_of_a_ticket_one_succeeds(
    broker: Started, passlock: Passlock, device: Authenticator, kind: str
) -> None:
    await passlock.user("ann", device)
    body = {"userId": "ann"} | ({"username": "new"} if kind == "update" else {})
    field = f"{kind}PasskeysToken"
    token = {field: (await passlock.ok("POST", f"/passkeys/{kind}", body))[field]}
    with refused(broker, "ticket_not_found", "ticket_not_found", times=PARALLEL - 1):
        answers = await asyncio.gather(
            *(passlock.page(f"/passkeys/{kind}/exchange", token) for _ in range(PARALLEL))
        )
    statuses = Counter(answer.status for answer in answers)
    assert statuses == {200: 1, 400: PARALLEL - 1}


@ON_BOTH
async def test_of_many_begun_with_one_token_one_succeeds(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    """A token is a transaction: a new begin replaces the old one."""
    await passlock.user("ann", device)
    token = {"authenticationToken": await passlock.authorize_authentication("ann")}
    sessions = [await passlock.begin("authentication", token) for _ in range(3)]
    answers = [
        await passlock.finish("authentication", session, device.authenticate(options, ORIGIN))
        for session, options in sessions
    ]
    assert [answer.status for answer in answers] == [400, 400, 200]
    with refused(broker, "transaction_not_found", "transaction_unknown"):
        await passlock.page(f"{AUTHENTICATION}/options", token)


# -- replays and wrong answers ---------------------------------------------------------------------


@ON_BOTH
@pytest.mark.parametrize("kind", ["registration", "authentication"])
async def test_a_refused_answer_spends_the_session(
    broker: Started, passlock: Passlock, device: Authenticator, kind: str
) -> None:
    """The person begins again with the same token."""
    if kind == "authentication":
        await passlock.user("ann", device)
    authorize = (
        passlock.authorize_registration
        if kind == "registration"
        else passlock.authorize_authentication
    )
    token = {f"{kind}Token": await authorize("ann")}
    make = device.register if kind == "registration" else device.authenticate
    session, options = await passlock.begin(kind, token)
    with refused(broker, "webauthn_login_failed", "origin"):
        wrong = await passlock.finish(kind, session, make(options, "https://evil.example"))
    again = await passlock.finish(kind, session, make(options, ORIGIN))
    assert (wrong.status, again.status) == (400, 400)
    assert {a.json["_tag"] for a in (wrong, again)} == {"@error/BadRequest"}
    session, options = await passlock.begin(kind, token)
    assert (await passlock.finish(kind, session, make(options, ORIGIN))).status == 200


@ON_BOTH
async def test_a_fault_of_form_spends_nothing(passlock: Passlock, device: Authenticator) -> None:
    session, response = await begun(passlock, "registration", device)
    for bad in (None, {}, "x", response | {"id": "!"}, response | {"response": None}):
        assert (await passlock.finish("registration", session, bad)).status == 400
    assert (await passlock.finish("registration", session, response)).status == 200


@ON_BOTH
async def test_another_users_answer_never_finishes(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    """An assertion by user B never finishes user A's authentication."""
    await passlock.user("ann", device)
    other = Authenticator()
    await passlock.user("bob", other)
    token = {"authenticationToken": await passlock.authorize_authentication("ann")}
    session, options = await passlock.begin("authentication", token)
    response = other.authenticate(options | {"allowCredentials": []}, ORIGIN)
    with refused(broker, "webauthn_login_failed", "not_offered"):
        answer = await passlock.finish("authentication", session, response)
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")


@ON_BOTH
async def test_an_orphan_is_told_only_where_it_is_proved(
    broker: Started, passlock: Passlock, open_app: OpenApp
) -> None:
    """Another app of the RP ID has that passkey: an authenticator knows RP IDs, so it must not hear
    that nobody has it.
    """
    elsewhere, device = Passlock(await open_app()), Authenticator()
    await elsewhere.user("ann", device)
    await passlock.user("bob", Authenticator())
    session, response = await begun(passlock, "authentication", device, None)
    with refused(broker, "discoverable_login_failed", "unknown_credential"):
        answer = await passlock.finish("authentication", session, response)
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    assert "credentialId" not in answer.json


# -- tokens of another kind or app -----------------------------------------------------------------


@ON_BOTH
async def test_no_token_is_good_for_another_step(
    broker: Started, passlock: Passlock, device: Authenticator, open_app: OpenApp
) -> None:
    """Whatever is wrong with it, one answer for each step; and it is still good for its own."""
    await passlock.user("ann", device)
    elsewhere = Passlock(await open_app())
    await elsewhere.user("ann", Authenticator())
    registration, authentication = (
        await passlock.authorize_registration("ann"),
        await passlock.authorize_authentication("ann"),
    )
    session, _ = await passlock.begin("authentication", {"authenticationToken": authentication})
    code = (await passlock.authenticate("ann", device))["code"]
    ticket = (await passlock.ok("POST", "/passkeys/prune", {"userId": "ann"}))["prunePasskeysToken"]
    foreign = await elsewhere.authorize_authentication("ann")
    tokens = [registration, authentication, session, code, ticket, foreign, "x", "pbt_" + "a" * 43]
    for path, field, own in (
        (f"{REGISTRATION}/options", "registrationToken", registration),
        (f"{AUTHENTICATION}/options", "authenticationToken", authentication),
        ("/passkeys/update/exchange", "updatePasskeysToken", ""),
        ("/passkeys/delete/exchange", "deletePasskeysToken", ""),
    ):
        first = None
        for token in (
            t for t in tokens if t != own and not (t == ticket and path.endswith("/exchange"))
        ):
            answer = await passlock.page(path, {field: token})
            assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest"), (path, token)
            same_answer(first or answer, answer)
            first = answer
    for token in (t for t in tokens if t != code):
        assert (await passlock.keyed("GET", f"/principal/{token}")).status == 404
    assert (await passlock.exchange(code))["userId"] == "ann"
    assert (await passlock.page_ok("/passkeys/prune/exchange", {"prunePasskeysToken": ticket}))[
        "instructions"
    ]
    await passlock.begin("registration", {"registrationToken": registration})
    await elsewhere.begin("authentication", {"authenticationToken": foreign})


@ON_BOTH
async def test_a_ticket_of_another_kind_is_spent(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    await passlock.user("ann", device)
    token = (await passlock.ok("POST", "/passkeys/prune", {"userId": "ann"}))["prunePasskeysToken"]
    with refused(broker, "ticket_not_found", "ticket_not_found", times=2):
        await passlock.page("/passkeys/delete/exchange", {"deletePasskeysToken": token})
        await passlock.page("/passkeys/prune/exchange", {"prunePasskeysToken": token})


@ON_BOTH
async def test_a_ticket_lives_for_five_minutes(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    await passlock.user("ann", device)
    done = await passlock.ok("POST", "/passkeys/prune", {"userId": "ann"})
    assert abs(done["expiresAt"] - (broker.clock() + 300) * 1000) < 5000
    broker.clock.ahead += 301 + SKEW
    with refused(broker, "ticket_not_found", "ticket_not_found"):
        body = {"prunePasskeysToken": done["prunePasskeysToken"]}
        await passlock.page("/passkeys/prune/exchange", body)


@ON_BOTH
@pytest.mark.parametrize("kind", ["registration", "authentication"])
async def test_a_session_of_the_other_kind_or_app(
    broker: Started, passlock: Passlock, open_app: OpenApp, kind: str
) -> None:
    """Untouched by both."""
    device, elsewhere = Authenticator(), Passlock(await open_app())
    for one in (passlock, elsewhere):
        await one.user("ann", device if one is elsewhere else Authenticator())
    own, response = await begun(
        elsewhere, kind, device if kind == "authentication" else Authenticator()
    )
    with refused(broker, "transaction_not_found", "handle_unknown"):
        assert (await passlock.finish(kind, own, response)).status == 400
    assert (await elsewhere.finish(kind, own, response)).status == 200
    own, response = await begun(
        elsewhere, kind, device if kind == "authentication" else Authenticator()
    )
    other = "authentication" if kind == "registration" else "registration"
    _, wrong = await begun(
        elsewhere, other, device if other == "authentication" else Authenticator()
    )
    with refused(broker, "transaction_not_found", "other_finish"):
        assert (await elsewhere.finish(other, own, wrong)).status == 400
    assert (await elsewhere.finish(kind, own, response)).status == 200


@ON_BOTH
async def test_a_code_of_another_app(
    broker: Started, passlock: Passlock, open_app: OpenApp
) -> None:
    elsewhere = Passlock(await open_app())
    code = (await elsewhere.register("ann", Authenticator()))["code"]
    with refused(broker, "invalid_nonce", "nonce_foreign"):
        answer = await passlock.keyed("GET", f"/principal/{code}")
    assert (answer.status, answer.json["_tag"]) == (404, "@error/InvalidCode")
    assert (await elsewhere.exchange(code))["userId"] == "ann"


# -- beside the Flex API -------------------------------------------------------------------------


@ON_BOTH
async def test_a_passkey_signs_in_both_ways(passlock: Passlock, device: Authenticator) -> None:
    await passlock.user("ann", device)
    nonce = await passlock.wire.authenticate(await passlock.wire.open_authentication("ann"), device)
    assert (await passlock.wire.redeem(nonce)).json["external_id"] == "ann"
    other = Authenticator()
    await passlock.wire.user("bob", other)
    assert (await passlock.authenticate("bob", other))["principal"]["userId"] == "bob"
    assert (await passlock.authenticate(None, other))["principal"]["userId"] == "bob"


@ON_BOTH
async def test_tokens_of_the_flex_api_buy_no_more_here(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    """Nonces and transactions are the same one-time values: spent here, they are spent there, for
    the same user and purpose. A begun ceremony is not: only the API that began it finishes it."""
    wire = passlock.wire
    registered = await wire.register(await wire.open_registration("ann"), device)
    who = await passlock.exchange(registered)
    assert (who["userId"], who["purpose"]) == ("ann", "register")
    with refused(broker, "invalid_nonce", "nonce_replayed"):
        assert (await wire.redeem(registered)).status == 401
    code = (await passlock.register("ann", Authenticator()))["code"]
    with refused(broker, "invalid_nonce", "nonce_mismatch"):
        assert (await wire.redeem(code, purpose="authenticate")).status == 401
    with refused(broker, "invalid_nonce", "nonce_replayed"):
        assert (await passlock.keyed("GET", f"/principal/{code}")).status == 404
    transaction = await wire.open_authentication("ann")
    with refused(broker, "transaction_not_found", "transaction_wrong_kind"):
        await passlock.page(f"{REGISTRATION}/options", {"registrationToken": transaction})
    handle, options = await wire.begin("authenticate", None)
    with refused(broker, "transaction_not_found", "other_finish"):
        answer = await passlock.finish(
            "authentication", handle, device.authenticate(options, ORIGIN)
        )
    assert answer.status == 400
    assert (
        await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    ).status == 200
