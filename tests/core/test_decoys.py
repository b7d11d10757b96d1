"""Decoys: a page that signs in a user can't tell users without a passkey from others."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from broker.broker.decoys import Decoys
from broker.model import Policy, RelyingParty
from tests.conftest import SECRET_KEY, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, unb64
from tests.support.byo import Byo
from tests.support.hanko import Hanko
from tests.support.passlock import Passlock
from tests.support.signals import lines, refused
from tests.support.wire import ORIGIN, RP_ID, Wire

SHOWN = Policy(decoys=True)
HIDDEN = ("bob", "nobody")  # one without a passkey, and an unknown one
START = "/authenticate/transactions/webauthn/start"


@pytest.fixture
async def opened(open_app: OpenApp, device: Authenticator) -> Wire:
    """An app with decoys; ann has a passkey."""
    wire = await open_app(SHOWN)
    await wire.user("ann", device)
    await wire.open_registration("bob")
    return wire


def offered(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The passkeys that may answer."""
    found: list[dict[str, Any]] = options["allowCredentials"]
    return found


async def _flex(wire: Wire, user: str) -> dict[str, Any]:
    return (await wire.begin("authenticate", await wire.open_authentication(user)))[1]


async def _flex_keyed(wire: Wire, user: str) -> dict[str, Any]:
    answer = await wire.keyed("POST", "/authenticate/start", {"external_id": user})
    return dict(answer.of(200)["options"])


async def _passlock(wire: Wire, user: str) -> dict[str, Any]:
    token = await Passlock(wire).authorize_authentication(user)
    return (await Passlock(wire).begin("authentication", {"authenticationToken": token}))[1]


async def _hanko(wire: Wire, user: str) -> dict[str, Any]:
    return await Hanko(wire).begin(user_id=user)


async def _propelauth(wire: Wire, user: str) -> dict[str, Any]:
    return await Byo(wire).begin_authentication(user)


Begin = Callable[[Wire, str], Awaitable[dict[str, Any]]]
BEGINS: dict[str, Begin] = {
    "flex": _flex,
    "flex-keyed": _flex_keyed,
    "passlock": _passlock,
    "hanko": _hanko,
    "propelauth": _propelauth,
}


@pytest.mark.parametrize("name", BEGINS)
async def test_options_have_one_shape(opened: Wire, name: str) -> None:
    """In every API, and all agree about a user's decoys."""
    genuine = await BEGINS[name](opened, "ann")
    for user in HIDDEN:
        options = await BEGINS[name](opened, user)
        assert options.keys() == genuine.keys()
        differing = {k for k in options if options[k] != genuine[k]}
        assert differing == {"challenge", "allowCredentials"}
        for decoy in offered(options):
            assert decoy.keys() == offered(genuine)[0].keys()
            assert len(unb64(decoy["id"])) in (16, 20, 32)
        assert offered(options) == offered(await _flex(opened, user))


async def test_decoys_are_stable(
    opened: Wire, open_app: OpenApp, start_broker: Starter, session: aiohttp.ClientSession
) -> None:
    """On every instance, and after a new secret was put in front; each app and user has others."""
    first = {user: offered(await _flex(opened, user)) for user in HIDDEN}
    second = await start_broker(secret_key=("n" * 20 + "0123456789abcdef", SECRET_KEY))
    elsewhere = Wire(session, second.url, opened.app_id, opened.key)
    for user in HIDDEN:
        assert offered(await _flex(opened, user)) == first[user]
        assert offered(await _flex(elsewhere, user)) == first[user]
    other = await open_app(SHOWN)
    ids = [d["id"] for app in (opened, other) for u in HIDDEN for d in offered(await _flex(app, u))]
    assert len(set(ids)) == len(ids)


def test_decoys_look_like_a_population() -> None:
    """Of a thousand users some have two, and every kind of authenticator occurs."""
    decoys = Decoys(lambda: ("0123456789abcdef" * 2,))
    app = RelyingParty("a" * 24, "App", RP_ID, (ORIGIN,))
    found = [decoys.of(app, f"user{n}", "") for n in range(1000)]
    assert {len(some) for some in found} == {1, 2}
    assert sum(len(some) == 2 for some in found) in range(150, 350)
    kinds = {(len(c.credential_id), c.transports) for some in found for c in some}
    assert len(kinds) == 4
    ids = {c.credential_id for some in found for c in some}
    assert len(ids) == sum(map(len, found))


async def test_every_answer_is_refused_alike(
    broker: Started, opened: Wire, device: Authenticator
) -> None:
    """A wrong signature of an offered passkey, and another passkey: the answers to a user with a
    passkey and to others are the same, for the same reasons, and so is the end of the transaction.
    """
    other = Authenticator()
    await opened.user("carl", other)
    answers: dict[str, list[tuple[int, Any]]] = {}
    for user in ("ann", *HIDDEN):
        transaction = await opened.open_authentication(user)
        answers[user] = []
        for number in range(11):
            begun = await opened.page(START, {"transaction_id": transaction})
            answers[user].append((begun.status, begun.json["code"] if begun.status > 200 else ""))
            if begun.status > 200:
                break
            handshake = begun.json["handshake"]
            options = handshake["challenge"]["publicKey"]
            shown = unb64(offered(options)[0]["id"]) if number % 2 else b"another credential id"
            free = {**options, "allowCredentials": []}
            response = other.authenticate(free, ORIGIN, credential_id=shown, user_handle=None)
            finished = await opened.finish("authenticate", handshake["id"], response)
            answers[user].append((finished.status, finished.json))
            reason = lines(broker)[-1]["reason"]
            answers[user].append((0, reason))
    assert len(answers["ann"]) == 31
    assert answers["bob"] == answers["nobody"] == answers["ann"]
    assert {status for status, _ in answers["ann"]} == {0, 200, 401, 404}


async def test_other_ceremonies_tell_nothing_of_a_decoy(
    broker: Started, opened: Wire, device: Authenticator
) -> None:
    """A page that answers another ceremony with an offered passkey, or registers its id, gets no
    signal that the passkey is unknown. An id that was never offered still has one.
    """
    other = Authenticator()
    await opened.user("carl", other)
    told: dict[str, list[tuple[int, Any]]] = {}
    shown = {user: unb64(offered(await _flex(opened, user))[0]["id"]) for user in ("ann", *HIDDEN)}
    for user, credential_id in (*shown.items(), ("", b"another credential id")):
        told[user] = []
        for transaction in (None, await opened.open_authentication("carl")):
            handle, options = await opened.begin("authenticate", transaction)
            free = {**options, "allowCredentials": []}
            response = other.authenticate(
                free, ORIGIN, credential_id=credential_id, user_handle=None
            )
            answer = await opened.finish("authenticate", handle, response)
            told[user].append((answer.status, answer.json))
        if user:
            handle, options = await opened.begin("register", await opened.open_registration("eve"))
            response = Authenticator().register(options, ORIGIN, credential_id=credential_id)
            answer = await opened.finish("register", handle, response)
            told[user].append((answer.status, answer.json))
    assert told["ann"][-1][0] == 401
    assert told["bob"] == told["nobody"] == told["ann"]
    assert all("signal" in body for _, body in told[""])


async def test_a_registered_passkey_ends_the_decoys(opened: Wire) -> None:
    device = Authenticator()
    before = offered(await _flex(opened, "nobody"))
    await opened.user("nobody", device)
    (passkey,) = offered(await _flex(opened, "nobody"))
    assert unb64(passkey["id"]) == device.credentials(RP_ID)[0].id
    assert passkey not in before


async def test_keyed_callers_still_learn(broker: Started, opened: Wire, open_app: OpenApp) -> None:
    """Second factors, a list of passkeys and approvals are about users whom the backend knows; and
    without the policy nothing is hidden.
    """
    for body in ({"second_factor": True}, {"passkeys": ["x" * 24]}):
        for user, status in (("bob", 409), ("nobody", 404)):
            asked = {"external_id": user, **body}
            answer = await opened.keyed("POST", "/transactions/authenticate", asked)
            assert answer.status == status
    plain = await open_app()
    with refused(broker, "user_not_found", "user_not_found"):
        await plain.keyed("POST", "/transactions/authenticate", {"external_id": "nobody"})


async def test_decoys_need_a_secret(
    start_broker: Starter, session: aiohttp.ClientSession, device: Authenticator
) -> None:
    broker = await start_broker(secret_key=(), dialects=("flex", "propelauth"))
    wire = await Wire.open(broker.service, session, policy=SHOWN)
    await wire.user("ann", device)
    with refused(broker, "service_unavailable", "no_secret_key"):
        await wire.keyed("POST", "/transactions/authenticate", {"external_id": "nobody"})
    await wire.authenticate(await wire.open_authentication("ann"), device)


async def test_each_user_takes_the_same_commands(broker: Started, opened: Wire) -> None:
    """Statements and commands of a refused sign-in, as the metrics count them."""
    other = Authenticator()
    await opened.user("carl", other)
    taken = {}
    for user in ("ann", *HIDDEN):
        before = _commands(broker)
        handle, options = await opened.begin("authenticate", await opened.open_authentication(user))
        shown = unb64(offered(options)[0]["id"])
        free = {**options, "allowCredentials": []}
        response = other.authenticate(free, ORIGIN, credential_id=shown, user_handle=None)
        assert (await opened.finish("authenticate", handle, response)).status == 401
        taken[user] = _commands(broker) - before
    assert taken["bob"] == taken["nobody"] == taken["ann"]
    assert taken["ann"].total() > 5


def _commands(broker: Started) -> Counter[tuple[str, ...]]:
    """How many commands there were, by store and operation."""
    return Counter(
        {
            labels: int(sum(numbers[:-1]))
            for labels, numbers in broker.parts.metrics.store_seconds.values.items()
        }
    )


# -- time ------------------------------------------------------------------------------------------

ROUNDS = 300


@pytest.mark.alone
async def test_times_tell_nothing(open_app: OpenApp, device: Authenticator) -> None:
    """A sign test: in half of the rounds a step takes longer for a user without a passkey than for
    one with a passkey. Users take turns in a random order, so neither the machine nor the user
    before favours one. Each has one passkey or one decoy, for two take longer. The bound is seven
    standard errors (0.029 with `ROUNDS`) away; some microseconds make 0.57 of one half.
    """
    while True:
        opened = await open_app(SHOWN)
        await opened.user("ann", device)
        await opened.open_registration("bob")
        if all([len(offered(await _flex(opened, user))) == 1 for user in HIDDEN]):
            break
    other = Authenticator()  # its signatures are well-formed, and of another key
    await opened.user("carl", other)
    users = ("ann", *HIDDEN)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    chance = random.Random(0)
    for _ in range(ROUNDS):
        for user in chance.sample(users, len(users)):
            began = time.perf_counter()
            transaction = await opened.open_authentication(user)
            opened_at = time.perf_counter()
            handle, options = await opened.begin("authenticate", transaction)
            begun_at = time.perf_counter()
            shown = unb64(offered(options)[0]["id"])
            free = {**options, "allowCredentials": []}
            response = other.authenticate(free, ORIGIN, credential_id=shown, user_handle=None)
            answered_at = time.perf_counter()
            assert (await opened.finish("authenticate", handle, response)).status == 401
            times[user, "finish"].append(time.perf_counter() - answered_at)
            times[user, "begin"].append(begun_at - opened_at)
            times[user, "open"].append(opened_at - began)
    for user in HIDDEN:
        for step in ("open", "begin", "finish"):
            pairs = zip(times[user, step], times["ann", step], strict=True)
            longer = sum(hidden > genuine for hidden, genuine in pairs) / ROUNDS
            assert 0.3 < longer < 0.7, (user, step)
