"""Transactions and handshakes over HTTP: whatever is wrong with one, the caller sees the same; and
each is good once.

Unknown, malformed, expired, used, of the wrong kind, another app's: `same_answer` compares status,
body and headers, while metric and log line tell the operator which it was. The races are run with
50 requests at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from broker.embedded import EmbeddedStores
from broker.model import Policy
from tests.conftest import ON_BOTH, SKEW, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, flex_wire_form
from tests.support.proxy import Fate, of_command, redis_proxy
from tests.support.servers import connect_valkey
from tests.support.signals import counted, refused, same_answer
from tests.support.wire import ORIGIN, Answer, Wire

PARALLEL = 50
NOT_FOUND = "transaction_not_found"


def start(kind: str) -> str:
    return f"/{kind}/transactions/webauthn/start"


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_all_bad_transactions_are_alike(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator, kind: str
) -> None:
    other = await open_app()
    for one in (wire, other):
        await one.user("ann", Authenticator())
    await wire.user("bob", device)

    async def opened(at: Wire, purpose: str) -> str:
        return await (
            at.open_registration("bob") if purpose == "register" else at.open_authentication("ann")
        )

    expired = await opened(wire, kind)
    broker.clock.ahead += 601 + SKEW
    used = await wire.open_authentication("bob")
    if kind == "register":
        used = await wire.open_registration("carl")
        await wire.register(used, Authenticator())
    else:
        await wire.authenticate(used, device)
    wrong = await opened(wire, "authenticate" if kind == "register" else "register")
    foreign = await opened(other, kind)
    good = await opened(wire, kind)
    answers = []
    for reason, transaction in (
        ("transaction_unknown", "pbt_" + "a" * 43),
        ("transaction_unknown", good[:-1] + ("A" if good[-1] != "A" else "B")),
        ("transaction_malformed", "nothing"),
        ("transaction_malformed", good + "\n"),
        ("transaction_malformed", good.replace("pbt_", "pbn_")),
        ("transaction_unknown", expired),
        ("transaction_unknown", used),
        ("transaction_wrong_kind", wrong),
        ("transaction_unknown", foreign),
    ):
        with refused(broker, NOT_FOUND, reason):
            answers.append(await wire.page(start(kind), {"transaction_id": transaction}))
    assert (answers[0].status, answers[0].code) == (404, NOT_FOUND)
    for answer in answers[1:]:
        same_answer(answers[0], answer)
    await wire.begin(kind, good)


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_all_bad_handshakes_are_alike(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator, kind: str
) -> None:
    other = await open_app()
    for one in (wire, other):
        await one.user("ann", Authenticator())
    await wire.user("bob", device)

    async def opened(at: Wire, purpose: str) -> str:
        return await (
            at.open_registration("bob") if purpose == "register" else at.open_authentication("ann")
        )

    expired, _ = await wire.begin(kind, await opened(wire, kind))
    ended = await opened(wire, kind)
    broker.clock.ahead += 400
    outlived, _ = await wire.begin(kind, ended)
    broker.clock.ahead += 201 + SKEW
    twice = await opened(wire, kind)
    replaced, _ = await wire.begin(kind, twice)
    await wire.begin(kind, twice)
    wrong_kind = "authenticate" if kind == "register" else "register"
    wrong, _ = await wire.begin(wrong_kind, await opened(wire, wrong_kind))
    foreign, _ = await other.begin(kind, await opened(other, kind))
    elsewhere, _ = await wire.begin(kind, await opened(wire, kind))
    if kind == "register":
        used, options = await wire.begin(kind, await wire.open_registration("carl"))
        made = flex_wire_form(Authenticator().register(options, ORIGIN))
    else:
        used, options = await wire.begin(kind, await wire.open_authentication("bob"))
        made = flex_wire_form(device.authenticate(options, ORIGIN))
    assert (await wire.finish(kind, used, made)).status == 200
    answers = []
    for reason, handle, transaction in (
        ("handle_unknown", "pbh_" + "a" * 43, None),
        ("handle_unknown", "pbh_" + "a" * 86, None),
        ("handle_unknown", "nothing", None),
        ("handle_unknown", "pbh_" + "a" * 500, None),
        ("handle_unknown", "pbh_" + "é" * 43, None),
        ("handle_unknown", expired, None),
        ("handle_unknown", outlived, None),
        ("handle_unknown", used, None),
        ("handle_unknown", replaced, twice),
        ("other_finish", wrong, None),
        ("handle_unknown", foreign, None),
        ("other_transaction", elsewhere, "pbt_" + "a" * 43),
    ):
        with (
            refused(broker, NOT_FOUND, reason),
            counted(broker, "broker_ceremonies_total", kind=kind, step="finish", result="refused"),
        ):
            answers.append(await wire.finish(kind, handle, made, transaction))
    assert (answers[0].status, answers[0].code) == (404, NOT_FOUND)
    for answer in answers[1:]:
        same_answer(answers[0], answer)


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
@pytest.mark.parametrize("other", ["unknown", "another of the app", "malformed"])
async def test_a_different_transaction_at_finish_spends_the_handshake(
    broker: Started, wire: Wire, device: Authenticator, kind: str, other: str
) -> None:
    """The transaction itself stands: the page begins again with it."""
    await wire.user("ann", device)
    mine = await (
        wire.open_registration("bob") if kind == "register" else wire.open_authentication("ann")
    )
    given = {
        "unknown": "pbt_" + "a" * 43,
        "another of the app": await wire.open_registration("carl"),
        "malformed": "x",
    }[other]
    asked = Authenticator() if kind == "register" else device
    handle, options = await wire.begin(kind, mine)
    make = asked.register if kind == "register" else asked.authenticate
    with refused(broker, NOT_FOUND, "other_transaction"):
        first = await wire.finish(kind, handle, make(options, ORIGIN), given)
    with refused(broker, NOT_FOUND, "handle_unknown"):
        second = await wire.finish(kind, handle, make(options, ORIGIN), mine)
    same_answer(first, second)
    handle, options = await wire.begin(kind, mine)
    assert (await wire.finish(kind, handle, make(options, ORIGIN), mine)).status == 200


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_a_transaction_id_with_a_discoverable_handshake_is_another_one(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    await wire.user("ann", device)
    handle, options = await wire.begin("authenticate", None)
    transaction = await (
        wire.open_registration("ann") if kind == "register" else wire.open_authentication("ann")
    )
    with refused(broker, NOT_FOUND, "other_transaction"):
        answer = await wire.finish(
            "authenticate", handle, device.authenticate(options, ORIGIN), transaction
        )
    assert answer.status == 404


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_a_new_begin_ends_the_old_one(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    """People cancel and try again: the newest handshake counts, and the old one finds nothing and
    spends nothing.
    """
    await wire.user("ann", device)
    transaction = await (
        wire.open_registration("bob") if kind == "register" else wire.open_authentication("ann")
    )
    asked = Authenticator() if kind == "register" else device
    make = asked.register if kind == "register" else asked.authenticate
    old, old_options = await wire.begin(kind, transaction)
    new, new_options = await wire.begin(kind, transaction)
    assert old != new
    assert old_options["challenge"] != new_options["challenge"]
    with refused(broker, NOT_FOUND, "handle_unknown"):
        answer = await wire.finish(kind, old, make(old_options, ORIGIN), transaction)
    assert answer.status == 404
    assert (await wire.finish(kind, new, make(new_options, ORIGIN), transaction)).status == 200


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_a_finished_transaction_begins_nothing(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    transaction = await wire.open_registration("ann")
    await wire.register(transaction, device)
    if kind == "authenticate":
        transaction = await wire.open_authentication("ann")
        await wire.authenticate(transaction, device)
    with refused(broker, NOT_FOUND, "transaction_unknown"):
        answer = await wire.page(start(kind), {"transaction_id": transaction})
    assert (answer.status, answer.code) == (404, NOT_FOUND)


@ON_BOTH
async def test_a_refused_finish_leaves_the_transaction(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """A refused answer has spent its handshake and nothing else."""
    await wire.user("ann", device)
    transaction = await wire.open_authentication("ann")
    for _ in range(3):
        handle, options = await wire.begin("authenticate", transaction)
        with refused(broker, "webauthn_login_failed", "signature"):
            answer = device.authenticate(options, ORIGIN, signature=b"no")
            assert (await wire.finish("authenticate", handle, answer)).status == 401
        with refused(broker, NOT_FOUND, "handle_unknown"):
            again = await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
            assert again.status == 404
    await wire.authenticate(transaction, device)


@ON_BOTH
async def test_a_transaction_whose_passkeys_are_gone(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """It offers what its user had when it was opened; the write finds that gone, and the device may
    hear of it.
    """
    passkey = await wire.user("ann", device)
    transaction = await wire.open_authentication("ann")
    user = (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    await wire.keyed("DELETE", f"/users/{user}/devices/{passkey}")
    handle, options = await wire.begin("authenticate", transaction)
    with refused(broker, "webauthn_login_failed", "revoked_or_counter"):
        gone = await wire.finish(
            "authenticate", handle, device.authenticate(options, ORIGIN), transaction
        )
    assert gone.status == 401
    assert gone.json["signal"]["type"] == "unknown_credential"
    with refused(broker, NOT_FOUND, "transaction_unknown"):
        await wire.page(start("authenticate"), {"transaction_id": transaction})


# -- lives -----------------------------------------------------------------------------------------


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_a_handshake_lives_for_five_minutes_or_what_is_left(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    """The timeout in the options is that life; the transaction's own end is its end too."""
    await wire.user("ann", device)
    asked = Authenticator() if kind == "register" else device
    make = asked.register if kind == "register" else asked.authenticate

    async def opened() -> str:
        return await (
            wire.open_registration("bob") if kind == "register" else wire.open_authentication("ann")
        )

    transaction = await opened()
    handle, options = await wire.begin(kind, transaction)
    assert options["timeout"] == 300_000
    broker.clock.ahead += 301 + SKEW
    with refused(broker, NOT_FOUND, "handle_unknown"):
        assert (await wire.finish(kind, handle, make(options, ORIGIN))).status == 404
    broker.clock.ahead += 195
    handle, options = await wire.begin(kind, transaction)
    assert 90_000 < options["timeout"] <= 99_000
    broker.clock.ahead += 90
    assert (await wire.finish(kind, handle, make(options, ORIGIN))).status == 200
    transaction = await opened()
    broker.clock.ahead += 601 + SKEW
    with refused(broker, NOT_FOUND, "transaction_unknown"):
        assert (await wire.page(start(kind), {"transaction_id": transaction})).status == 404


@ON_BOTH
async def test_lives_follow_the_policy(
    open_app: OpenApp, broker: Started, device: Authenticator
) -> None:
    wire = await open_app(Policy(transaction_life=40, ceremony_life=20, nonce_life=10))
    await wire.user("ann", device)
    _, options = await wire.begin("authenticate", None)
    assert options["timeout"] == 20_000
    transaction = await wire.open_authentication("ann")
    broker.clock.ahead += 30
    _, options = await wire.begin("authenticate", transaction)
    assert 8_000 < options["timeout"] <= 10_000
    broker.clock.ahead += 11 + SKEW
    with refused(broker, NOT_FOUND, "transaction_unknown"):
        assert (
            await wire.page(start("authenticate"), {"transaction_id": transaction})
        ).status == 404
    for wait, status in ((9, 200), (11 + SKEW, 401)):
        nonce = await wire.authenticate(None, device)
        broker.clock.ahead += wait
        assert (await wire.redeem(nonce)).status == status
    assert broker.metric("broker_redemptions_total", result="expired") == 1


# -- races -----------------------------------------------------------------------------------------


async def at_once(
    calls: list[Callable[[], Awaitable[Answer]]],
) -> tuple[list[Answer], Counter[int]]:
    answers = await asyncio.gather(*(call() for call in calls))
    return answers, Counter(answer.status for answer in answers)


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate", "discoverable"])
async def test_50_finishes_of_one_handshake(
    start_broker: Starter, broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    """Over two instances: one succeeds, the others find nothing."""
    second = await start_broker()
    there = Wire(wire.session, second.url, wire.app_id, wire.key)
    await wire.user("ann", device)
    if kind == "register":
        handle, options = await wire.begin("register", await wire.open_registration("bob"))
        answer = Authenticator().register(options, ORIGIN)
    else:
        transaction = None if kind == "discoverable" else await wire.open_authentication("ann")
        handle, options = await wire.begin("authenticate", transaction)
        answer = device.authenticate(options, ORIGIN)
    step = "register" if kind == "register" else "authenticate"
    calls: list[Callable[[], Awaitable[Answer]]] = [
        lambda at=at: at.finish(step, handle, answer)  # type: ignore[misc]
        for at in (wire, there) * (PARALLEL // 2)
    ]
    answers, statuses = await at_once(calls)
    assert statuses == {200: 1, 404: PARALLEL - 1}
    refusals = [a for a in answers if a.status == 404]
    for refusal in refusals[1:]:
        same_answer(refusals[0], refusal)
    seen = sum(
        one.metric("broker_refusals_total", code=NOT_FOUND, reason="handle_unknown")
        for one in (broker, second)
    )
    assert seen == PARALLEL - 1
    expected = "passkey.registered" if kind == "register" else "passkey.used"
    done = (await broker.events(wire.app_id)).count((expected, "done", None))
    assert done == (2 if kind == "register" else 1)


@ON_BOTH
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_50_begins_and_finishes_of_one_transaction(
    start_broker: Starter, broker: Started, wire: Wire, kind: str
) -> None:
    """Every one with a handshake and an authenticator of its own: one transaction buys one
    success.
    """
    second = await start_broker()
    there = Wire(wire.session, second.url, wire.app_id, wire.key)
    device = Authenticator(counts=False)
    await wire.user("ann", device)
    transaction = await (
        wire.open_registration("bob") if kind == "register" else wire.open_authentication("ann")
    )

    async def whole(at: Wire) -> Answer:
        begun = await at.page(start(kind), {"transaction_id": transaction})
        if begun.status != 200:
            return begun
        options = begun.json["handshake"]["challenge"]["publicKey"]
        asked = Authenticator() if kind == "register" else device
        make = asked.register if kind == "register" else asked.authenticate
        return await at.finish(
            kind, begun.json["handshake"]["id"], make(options, ORIGIN), transaction
        )

    calls: list[Callable[[], Awaitable[Answer]]] = [
        lambda at=at: whole(at)  # type: ignore[misc]
        for at in (wire, there) * (PARALLEL // 2)
    ]
    answers, statuses = await at_once(calls)
    assert statuses == {200: 1, 404: PARALLEL - 1}
    assert {a.code for a in answers if a.status == 404} == {NOT_FOUND}
    bob = (await wire.keyed("GET", "/users?identifier=bob")).json["users"]
    if kind == "register":
        devices = (await wire.keyed("GET", f"/users/{bob[0]['id']}/devices")).json["devices"]
        assert len(devices) == 1
    events = await broker.events(wire.app_id)
    assert events.count(("passkey.registered", "done", None)) == (2 if kind == "register" else 1)
    assert events.count(("passkey.used", "done", None)) == (0 if kind == "register" else 1)


async def test_two_verified_answers_of_one_transaction_buy_one_success(
    wire: Wire,
    broker: Started,
    start_broker: Starter,
    stores: EmbeddedStores,
    device: Authenticator,
) -> None:
    """The first handshake is taken, then the page begins again, then the first succeeds: the second
    finds the transaction spent.

    The first finish is held open between its two takes: it runs on an instance whose first answer
    from Redis comes late.
    """
    await wire.user("ann", device)
    transaction = await wire.open_authentication("ann")
    handle, options = await wire.begin("authenticate", transaction)
    answer = device.authenticate(options, ORIGIN)
    async with redis_proxy(lambda: connect_valkey(stores)) as proxy:
        slow = await start_broker(redis_url=f"redis://127.0.0.1:{proxy.port}")
        there = Wire(wire.session, slow.url, wire.app_id, wire.key)
        proxy.fate = of_command(Fate.HOLD, b"EVALSHA")
        finishing = asyncio.create_task(there.finish("authenticate", handle, answer, transaction))
        await proxy.held.wait()
        handle, options = await wire.begin("authenticate", transaction)
        proxy.fate = of_command(Fate.PASS, b"")
        proxy.release.set()
        assert (await finishing).status == 200
        await slow.service.close()
    answer = device.authenticate(options, ORIGIN)
    with (
        refused(broker, NOT_FOUND, "handle_unknown"),
        counted(
            broker, "broker_ceremonies_total", kind="authenticate", step="finish", result="refused"
        ),
    ):
        late = await wire.finish("authenticate", handle, answer, transaction)
    assert (late.status, late.code) == (404, NOT_FOUND)
    assert (await broker.events(wire.app_id)).count(("passkey.used", "done", None)) == 1
