"""Passlock's clients 2.0 to 2.4, whose pages begin ceremonies by themselves: what a page may do
without a backend's word, and what becomes of passkeys that nobody owns yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from broker.model import Policy
from tests.conftest import OpenApp, Started
from tests.dialects.passlock.contract import CREDENTIAL, CREDENTIALS
from tests.support.authenticator import Authenticator, b64
from tests.support.passlock import Passlock, judge
from tests.support.signals import lines, refused, same_answer
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

REGISTRATION, AUTHENTICATION = "/passkey/registration", "/passkey/authentication"
ANN = {"username": "ann@example.org"}


@pytest.fixture(params=["/v2", ""])
async def passlock(request: pytest.FixtureRequest, wire: Wire) -> Passlock:
    """On both kinds of path: early clients of the prefixed ones begin alike."""
    return Passlock(wire, prefix=request.param)


@pytest.fixture
async def opened(open_app: OpenApp) -> Passlock:
    """Of an app whose pages may register."""
    return Passlock(await open_app(Policy(passlock_open_registration=True)), prefix="")


async def read(passlock: Passlock, path: str, shape: dict[str, Any]) -> Answer:
    """A page's GET."""
    answer = await passlock.wire.send("GET", passlock.base + path, headers={"Origin": ORIGIN})
    judge(answer, shape)
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    return answer


async def ownerless(passlock: Passlock, device: Authenticator) -> tuple[str, str]:
    """A passkey that a page registered; its id and the code."""
    done = await passlock.run("registration", ANN, device)
    assert done["principal"]["userId"] == done["principal"]["authenticatorId"]
    return done["principal"]["authenticatorId"], done["code"]


# -- closed, as an app is unless its policy says otherwise -----------------------------------------


async def test_a_page_registers_nothing_by_itself(broker: Started, passlock: Passlock) -> None:
    """Refused before anything is looked at: nothing is made."""
    for body in (ANN, {"username": ""}, {"username": 7}):
        with refused(broker, "operation_not_allowed", "not_open"):
            answer = await passlock.page(f"{REGISTRATION}/options", body)
        assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden")
    assert await broker.events(passlock.wire.app_id) == [("app.created", "done", None)]


async def test_a_page_reads_no_ids(broker: Started, wire: Wire) -> None:
    """The same for a passkey that is there and for one that is not."""
    passkey_id = await Passlock(wire).user("ann", Authenticator())
    passlock = Passlock(wire, prefix="")
    for kind in ("credential", "credentials"):
        with refused(broker, "operation_not_allowed", "not_open", times=2):
            first = await read(passlock, f"/{kind}/{passkey_id}", {})
            same_answer(first, await read(passlock, f"/{kind}/{'x' * 24}", {}))
        assert (first.status, first.json["_tag"]) == (403, "@error/Forbidden")


async def test_a_page_signs_in_whoever_has_a_passkey(
    passlock: Passlock, device: Authenticator
) -> None:
    await Passlock(passlock.wire).user("ann", device)
    done = await passlock.run("authentication", {}, device)
    assert done["principal"]["userId"] == "ann"
    assert (await passlock.exchange(done["code"]))["userId"] == "ann"


async def test_allow_credentials_of_a_page_narrows_and_is_never_read_back(
    broker: Started, passlock: Passlock, device: Authenticator
) -> None:
    """What is allowed is judged at the end; the options are the same for passkeys that are there
    and that are not.
    """
    backend, other = Passlock(passlock.wire), Authenticator()
    mine, bobs = await backend.user("ann", device), await backend.user("bob", other)
    shapes = set()
    for ids, good in (
        ([mine], True),
        ([mine, bobs], True),
        ([bobs], False),
        (["x" * 24], False),
    ):
        body = {"allowCredentials": ids, "rpId": "EXAMPLE.org"}
        session, options = await passlock.begin("authentication", body)
        assert "allowCredentials" not in options
        shapes.add(frozenset(options))
        answer = await passlock.finish(
            "authentication", session, device.authenticate(options, ORIGIN)
        )
        assert (answer.status, answer.json["_tag"]) == (
            (200, "AuthenticationSuccess") if good else (400, "@error/BadRequest")
        )
    assert len(shapes) == 1
    assert lines(broker, code="discoverable_login_failed", status=400)


async def test_a_page_can_not_ask_for_less(
    open_app: OpenApp, passlock: Passlock, device: Authenticator
) -> None:
    """Not even where keyed callers may: whoever can call a page's route is anybody."""
    for policy, wish, expected in (
        (Policy(allow_weaker=True), "discouraged", "required"),
        (Policy(allow_weaker=True, user_verification="preferred"), "required", "required"),
    ):
        policy = replace(policy, passlock_open_registration=True)
        page = Passlock(await open_app(policy), prefix=passlock.prefix)
        _, options = await page.begin("authentication", {"userVerification": wish})
        assert options["userVerification"] == expected
        _, options = await page.begin("registration", ANN | {"userVerification": wish})
        assert options["authenticatorSelection"]["userVerification"] == expected


BAD: list[dict[str, object]] = [
    {"rpId": "evil.example"},
    {"rpId": 7},
    {"allowCredentials": "x"},
    {"allowCredentials": [None]},
    {"allowCredentials": ["x" * 65]},
    {"allowCredentials": ["x"] * 101},
    {"allowCredentials": ["no id"]},
    {"userVerification": "never"},
    {"timeout": "60"},
    {"timeout": 0},
    {"mediation": "silent"},
    {"authenticationToken": None},
    {"authenticationToken": ""},
    {"authenticationToken": 7},
]


@pytest.mark.parametrize("body", BAD)
async def test_wishes_that_are_none(broker: Started, passlock: Passlock, body: object) -> None:
    """A token that is there and empty is no wish for a sign-in without one."""
    answer = await passlock.page(f"{AUTHENTICATION}/options", body)
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    assert lines(broker, code="invalid_request")


async def test_the_cap_of_open_sign_ins(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    passlock = Passlock(await open_app(Policy(discoverable_limit=1)), prefix="")
    await passlock.begin("authentication", {})
    with refused(broker, "too_many_requests", "discoverable_limit"):
        answer = await passlock.page(f"{AUTHENTICATION}/options", {})
    assert (answer.status, answer.json["_tag"]) == (429, "@error/BadRequest")
    assert answer.headers["Retry-After"].isdigit()
    await Passlock(passlock.wire).user("ann", device)


# -- open ------------------------------------------------------------------------------------------


async def test_a_passkey_that_nobody_owns_signs_in_here_only(
    broker: Started, opened: Passlock, device: Authenticator
) -> None:
    passkey_id, code = await ownerless(opened, device)
    assert (await opened.exchange(code))["userId"] == passkey_id
    assert (await opened.passkey(passkey_id))["userId"] == passkey_id
    assert [r["userId"] for r in (await opened.ok("GET", "/passkeys/"))["records"]] == [passkey_id]
    done = await opened.run("authentication", {"allowCredentials": [passkey_id]}, device)
    assert done["principal"] == {"authenticatorId": passkey_id, "userId": passkey_id}
    new = Passlock(opened.wire)
    assert (await new.authenticate(None, device))["principal"]["userId"] == passkey_id
    handle, options = await opened.wire.begin("authenticate", None)
    with refused(broker, "discoverable_login_failed", "ownerless"):
        answer = await opened.wire.finish(
            "authenticate", handle, device.authenticate(options, ORIGIN)
        )
    assert (answer.status, "signal" in answer.json) == (401, False)
    body = {"rpId": RP_ID, "userId": passkey_id}
    assert (await new.keyed("POST", f"{AUTHENTICATION}/authorize", body)).status == 400


async def test_it_stops_where_the_policy_is_taken_back(
    broker: Started, opened: Passlock, device: Authenticator
) -> None:
    await ownerless(opened, device)
    directory = broker.parts.directory
    app = await directory.app(opened.wire.app_id)
    await directory.update_app(replace(app, policy=Policy()))
    session, options = await opened.begin("authentication", {})
    with refused(broker, "discoverable_login_failed", "ownerless"):
        answer = await opened.finish(
            "authentication", session, device.authenticate(options, ORIGIN)
        )
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")


@pytest.mark.parametrize("how", ["principal", "patch"])
async def test_an_owner_is_given_once(
    broker: Started, opened: Passlock, device: Authenticator, how: str
) -> None:
    passkey_id, code = await ownerless(opened, device)
    if how == "principal":
        who = await opened.ok("POST", f"/principal/{code}", {"userId": "ann"})
        assert (who["_tag"], who["userId"], who["authenticatorId"]) == (
            "ExtendedPrincipal",
            "ann",
            passkey_id,
        )
    else:
        found = await opened.ok(
            "PATCH", f"/passkeys/{passkey_id}", {"userId": "ann", "username": "Ann"}
        )
        assert (found["userId"], found["credential"]["username"]) == ("ann", "Ann")
    with refused(broker, "passkey_has_owner", "passkey_has_owner"):
        answer = await opened.keyed(
            "PATCH", f"/passkeys/{passkey_id}", {"userId": "bob", "username": "Bob"}
        )
    assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden")
    found = await opened.ok("PATCH", f"/passkeys/{passkey_id}", {"userId": "ann"})
    assert (found["userId"], found["credential"]["username"] == "Bob") == ("ann", False)
    nonce = await opened.wire.authenticate(None, device)
    assert (await opened.wire.redeem(nonce)).json["external_id"] == "ann"


async def test_a_repeated_exchange_names_the_owner_that_the_first_gave(
    opened: Passlock, device: Authenticator
) -> None:
    _, code = await ownerless(opened, device)
    given, headers = {"userId": "ann"}, {"Idempotency-Key": "first"}
    first = await opened.keyed("POST", f"/principal/{code}", given, headers=headers)
    again = await opened.keyed("POST", f"/principal/{code}", given, headers=headers)
    assert (first.status, first.json["userId"], again.json) == (200, "ann", first.json)


async def test_a_code_is_exchanged_for_its_owner_only(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Another user's name buys nothing, and spends the code."""
    passlock, other = Passlock(wire, prefix=""), Passlock(wire)
    await other.user("ann", device)
    done = await other.authenticate("ann", device)
    with refused(broker, "passkey_has_owner", "passkey_has_owner"):
        answer = await passlock.keyed("POST", f"/principal/{done['code']}", {"userId": "bob"})
    assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden")
    with refused(broker, "invalid_nonce", "nonce_replayed"):
        await passlock.keyed("POST", f"/principal/{done['code']}", {"userId": "ann"})
    done = await other.authenticate("ann", device)
    assert (
        await passlock.keyed("POST", f"/principal/{done['code']}", {})
    ).status == 400  # spends nothing
    assert (await passlock.ok("POST", f"/principal/{done['code']}", {"userId": "ann"}))[
        "userId"
    ] == "ann"


async def test_a_page_reads_ids_of_passkeys_it_knows(opened: Passlock) -> None:
    one, two, other = Authenticator(), Authenticator(), Authenticator()
    backend = Passlock(opened.wire)
    mine = [await backend.user("ann", device) for device in (one, two)]
    bobs = await backend.user("bob", other)
    held, second = one.credentials(RP_ID)[0], two.credentials(RP_ID)[0]
    handle = b64(held.user_handle)
    answer = await read(opened, f"/credential/{mine[0]}", CREDENTIAL)
    assert answer.json == {"credentialId": b64(held.id), "userId": handle, "rpId": RP_ID}
    answer = await read(opened, f"/credentials/{','.join(mine)},nobody", CREDENTIALS)
    accepted = [b64(held.id), b64(second.id)]
    assert answer.json == {"rpId": RP_ID, "userId": handle, "allAcceptedCredentialIds": accepted}
    assert (await read(opened, f"/credentials/{mine[0]},{bobs}", CREDENTIALS)).status == 400
    for path in (
        "/credential/x",
        "/credentials/[object Object]",
        "/credentials/,",
        f"/credentials/{'x' * 24}",
    ):
        answer = await read(opened, path, CREDENTIAL)
        assert (answer.status, answer.json["_tag"]) == (404, "@error/NotFound")


async def test_names_and_exclusions_of_a_page(opened: Passlock) -> None:
    first, _ = await ownerless(opened, Authenticator())
    body = ANN | {"displayName": "Ann", "excludeCredentials": [first], "timeout": 60_000}
    _, options = await opened.begin("registration", body)
    assert (options["user"]["name"], options["user"]["displayName"]) == ("ann@example.org", "Ann")
    assert (len(options["excludeCredentials"]), options["timeout"]) == (1, 60_000)
    for bad in ({"username": ""}, {"username": 7}, {"username": "x" * 257}, {"username": "a\x00"}):
        assert (await opened.page(f"{REGISTRATION}/options", bad)).status == 400


# -- what anybody may cause ------------------------------------------------------------------------


async def test_the_cap_counts_open_registrations(broker: Started, open_app: OpenApp) -> None:
    """Nobody needs a key to begin one, so what they leave in the store is bounded, together with
    sign-ins; a finish makes room. What a backend authorised goes on."""
    policy = Policy(passlock_open_registration=True, discoverable_limit=2)
    opened = Passlock(await open_app(policy), prefix="")
    session, options = await opened.begin("registration", ANN)
    await opened.begin("authentication", {})
    for kind, body in (("registration", ANN), ("authentication", {})):
        with refused(broker, "too_many_requests", "discoverable_limit"):
            answer = await opened.page(f"/passkey/{kind}/options", body)
        assert (answer.status, answer.json["_tag"]) == (429, "@error/BadRequest")
    await Passlock(opened.wire).register("bob", Authenticator())
    answer = await opened.finish("registration", session, Authenticator().register(options, ORIGIN))
    assert answer.status == 200
    async with Redis.from_url(broker.parts.settings.redis_url) as redis:
        left = [n async for n in redis.scan_iter(match=f"p:{{{opened.wire.app_id}}}*")]
    assert len(left) == 1
    await opened.begin("registration", ANN)


async def test_what_anybody_has_refused_is_no_event(broker: Started, opened: Passlock) -> None:
    """Else a page alone fills the table of events."""
    device = Authenticator()
    await Passlock(opened.wire).user("ann", device)
    before = await broker.events(opened.wire.app_id)
    for how in ({"uv": False}, {"credential_id": next(iter(device.held))}):
        session, options = await opened.begin("registration", ANN)
        made = Authenticator().register(options, ORIGIN, **how)
        assert (await opened.finish("registration", session, made)).status == 400
    assert lines(broker, code="webauthn_login_failed", reason="user_verification")
    assert lines(broker, code="webauthn_login_failed", reason="duplicate")
    assert await broker.events(opened.wire.app_id) == before


async def test_what_nobody_owns_proves_nothing_elsewhere(
    broker: Started, opened: Passlock, device: Authenticator
) -> None:
    """The Flex API redeems no code of this dialect: its caller would take the passkey's id for the
    id of a user. A session that is taken to the Flex API's pages is unknown there."""
    wire = opened.wire
    for kind, purpose in (("registration", "register"), ("authentication", "authenticate")):
        session, options = await opened.begin(kind, ANN if kind == "registration" else {})
        make = device.register if kind == "registration" else device.authenticate
        answer = make(options, ORIGIN)
        with refused(broker, "transaction_not_found", "other_finish"):
            assert (await wire.finish(purpose, session, answer)).status == 404
        nonce = (await opened.finish(kind, session, answer)).json["code"]
        for expected in ({}, {"purpose": purpose}):
            with refused(
                broker, "invalid_nonce", "nonce_replayed" if expected else "nonce_mismatch"
            ):
                assert (await wire.redeem(nonce, **expected)).status == 401


async def test_the_policy_taken_back_ends_what_is_open(
    broker: Started, opened: Passlock, device: Authenticator
) -> None:
    """Within the second that a policy takes: registrations and sign-ins that were begun, and
    codes.
    """
    passkey_id, code = await ownerless(opened, device)
    registering, made = await opened.begin("registration", ANN)
    signing, signed = await opened.begin("authentication", {})
    directory = broker.parts.directory
    app = await directory.app(opened.wire.app_id)
    await directory.update_app(replace(app, policy=Policy()))
    with refused(broker, "transaction_not_found", "not_open"):
        answer = await opened.finish(
            "registration", registering, Authenticator().register(made, ORIGIN)
        )
    assert answer.status == 400
    with refused(broker, "discoverable_login_failed", "ownerless"):
        answer = await opened.finish("authentication", signing, device.authenticate(signed, ORIGIN))
    assert answer.status == 400
    with refused(broker, "invalid_nonce", "nonce_mismatch"):
        assert (await opened.keyed("GET", f"/principal/{code}")).json[
            "_tag"
        ] == "@error/InvalidCode"
    assert [r["id"] for r in (await opened.ok("GET", "/passkeys/"))["records"]] == [passkey_id]
