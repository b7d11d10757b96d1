"""Approvals: what a user signs is in the challenge, is written down once, and is approved by
exactly the sign-in about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import redis
from aiohttp import ClientSession

from broker.ceremony import parse_authentication
from broker.embedded import EmbeddedStores
from broker.errors import (
    CeremonyRefused,
    DuplicateApproval,
    NoPasskeys,
    Unavailable,
    UnknownTransaction,
    UnknownUser,
)
from broker.model import (
    Approval,
    ApprovalRecord,
    AuthenticationAnswer,
    ByChallenge,
    ByUser,
    ExpectedCeremony,
    RelyingParty,
)
from tests.conftest import OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, unb64
from tests.support.servers import session_of
from tests.support.verbs import KEYED, keyed
from tests.support.wire import ORIGIN, Wire

PAYMENT = Approval("payment-7", '{"amount":12}', hashlib.sha256(b"payment-7").digest())


async def app_of(broker: Started, wire: Wire) -> RelyingParty:
    return await broker.parts.directory.app(wire.app_id)


async def ask(
    broker: Started,
    app: RelyingParty,
    device: Authenticator,
    approval: Approval | None = PAYMENT,
    **how: bool,
) -> AuthenticationAnswer:
    """Begin for ann, and what the device says."""
    options = (
        await broker.parts.broker.begin_authentication(
            keyed(app), ByChallenge("ann"), "keyed", approval=approval
        )
    ).public_key
    return parse_authentication(device.authenticate(options, ORIGIN, **how))  # type: ignore[arg-type]


async def records(broker: Started, app: RelyingParty) -> list[ApprovalRecord]:
    user = await broker.parts.directory.user(app, external_id="ann")
    return await broker.parts.directory.approvals(app, user.id)


async def test_the_challenge_ends_with_the_digest(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """So whoever keeps the answer can prove what was approved; the first half is chance as ever."""
    await wire.user("ann", device)
    app = await app_of(broker, wire)
    seen = set()
    for number in range(3):
        approval = replace(PAYMENT, identifier=f"payment-{number}")
        options = (
            await broker.parts.broker.begin_authentication(
                keyed(app), ByChallenge("ann"), "keyed", approval=approval
            )
        ).public_key
        challenge = unb64(options["challenge"])
        assert (len(challenge), challenge[32:]) == (64, PAYMENT.digest)
        seen.add(challenge[:32])
    assert len(seen) == 3


async def test_what_the_flex_api_hashes(wire: Wire, device: Authenticator) -> None:
    """As README tells a verifier to: with nothing of ours."""
    await wire.user("ann", device)
    approval = {
        "id": "zahlung-1",
        "data": {"to": "Bob", "amount": 12, "text": 'für "alles"\n', "list": [True, None]},
    }
    body = {"external_id": "ann", "approval": approval}
    options = (await wire.keyed("POST", "/ceremonies/authenticate/start", body)).json["options"]
    credential = device.authenticate(options, ORIGIN)
    client_data = json.loads(unb64(credential["response"]["clientDataJSON"]))
    text = json.dumps(approval, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert unb64(client_data["challenge"])[-32:] == hashlib.sha256(text.encode()).digest()
    answer = await wire.keyed(
        "POST", "/ceremonies/authenticate/finish", {"credential": credential, "approval": True}
    )
    assert (answer.status, answer.json["approval"]) == (200, "zahlung-1")


async def test_it_is_approved_by_the_sign_in_itself(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """At the very time of the sign-in, and not by a refused one."""
    await wire.user("ann", device)
    app = await app_of(broker, wire)
    refused = await ask(broker, app, device, uv=False)
    with pytest.raises(CeremonyRefused):
        await broker.parts.broker.finish_authentication(
            keyed(app), ByChallenge(), refused, ExpectedCeremony(("keyed",), approval=True)
        )
    second = replace(PAYMENT, identifier="payment-8")
    answer = await ask(broker, app, device, second)
    [first, waiting] = await records(broker, app)
    assert (first.approved_at, waiting.approved_at) == (None, None)
    assert (first.identifier, first.data) == (PAYMENT.identifier, PAYMENT.data)
    broker.clock.ahead += 5
    receipt = (
        await broker.parts.broker.finish_authentication(
            keyed(app), ByChallenge(), answer, ExpectedCeremony(("keyed",), approval=True)
        )
    ).receipt
    assert receipt.approval == "payment-8"
    [first, approved] = await records(broker, app)
    passkey = await broker.parts.directory.passkey(app, receipt.passkey_id)
    assert approved.approved_at == passkey.credential.last_used_at
    assert approved.approved_at is not None
    assert (approved.approved_at - approved.created_at).total_seconds() >= 5
    assert first.approved_at is None


async def test_a_counter_that_went_back_approves_nothing(broker: Started, wire: Wire) -> None:
    """The statement that decides about the sign-in decides about the approval: two answers of a
    clone, at once.
    """
    device = Authenticator()
    await wire.user("ann", device)
    app = await app_of(broker, wire)
    answers = []
    for number in range(2):
        device.credentials(app.rp_id)[0].counter = 50
        answers.append(await ask(broker, app, device, replace(PAYMENT, identifier=f"p-{number}")))
    results = await asyncio.gather(
        *(
            broker.parts.broker.finish_authentication(
                keyed(app), ByChallenge(), a, ExpectedCeremony(("keyed",), approval=True)
            )
            for a in answers
        ),
        return_exceptions=True,
    )
    assert sorted(isinstance(r, CeremonyRefused) for r in results) == [False, True]
    assert sorted(r.approved_at is None for r in await records(broker, app)) == [False, True]


@pytest.mark.parametrize("failing", ["Redis is full", "Postgres takes no writes", "Postgres hangs"])
async def test_a_store_that_fails_leaves_the_identifier_unused(
    own_stores: EmbeddedStores,
    start_broker: Starter,
    session: ClientSession,
    device: Authenticator,
    failing: str,
) -> None:
    """The caller who was told 503 asks again with the same identifier: granted, and approved."""
    broker = await start_broker(own_stores, store_timeout=0.4)
    wire = await Wire.open(broker.service, session)
    await wire.user("ann", device)
    app = await app_of(broker, wire)
    store = "redis" if failing.startswith("Redis") else "postgres"
    async with FAILING[failing](own_stores):
        with pytest.raises(Unavailable) as refused:
            await ask(broker, app, device)
    assert refused.value.reason == store
    operation = "put_pending" if store == "redis" else "add_approval"
    assert broker.metric("broker_store_failures_total", store=store, operation=operation) == 1
    assert await records(broker, app) == []
    answer = await ask(broker, app, device)
    receipt = (
        await broker.parts.broker.finish_authentication(
            keyed(app), ByChallenge(), answer, ExpectedCeremony(("keyed",), approval=True)
        )
    ).receipt
    assert receipt.approval == PAYMENT.identifier
    with pytest.raises(DuplicateApproval):
        await ask(broker, app, device)


@contextlib.asynccontextmanager
async def _full(stores: EmbeddedStores) -> AsyncIterator[None]:
    with redis.Redis.from_url(stores.redis_url) as client:
        client.config_set("maxmemory", 1)
        yield
        client.config_set("maxmemory", 0)


@contextlib.asynccontextmanager
async def _refusing(stores: EmbeddedStores) -> AsyncIterator[None]:
    """As a standby does; reads go on."""
    body = "BEGIN RAISE read_only_sql_transaction; END"
    refuse = f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS '{body}'"
    async with session_of(stores) as postgres:
        await postgres.execute(refuse)
        await postgres.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON approvals EXECUTE FUNCTION refuse()"
        )
        yield
        await postgres.execute("DROP TRIGGER refuse ON approvals")


@contextlib.asynccontextmanager
async def _locked(stores: EmbeddedStores) -> AsyncIterator[None]:
    async with session_of(stores) as postgres, postgres.transaction():
        await postgres.execute("LOCK TABLE approvals")
        yield


FAILING = {"Redis is full": _full, "Postgres takes no writes": _refusing, "Postgres hangs": _locked}


async def test_an_identifier_is_used_once_in_an_app(
    broker: Started, start_broker: Starter, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    """By whomever, also of 20 at once on two instances; another app has its own."""
    await wire.user("ann", device)
    await wire.user("bob", Authenticator())
    app, other = await app_of(broker, wire), await start_broker()
    brokers = [broker.parts.broker, other.parts.broker]

    async def begin(number: int) -> bool:
        try:
            user = ("ann", "bob")[number % 3 == 0]
            await brokers[number % 2].begin_authentication(
                keyed(app), ByChallenge(user), "keyed", approval=PAYMENT
            )
        except DuplicateApproval:
            return False
        return True

    assert sorted(await asyncio.gather(*(begin(n) for n in range(20)))) == [False] * 19 + [True]
    elsewhere = await open_app()
    await elsewhere.user("ann", device)
    await ask(broker, await app_of(broker, elsewhere), device)


async def test_nobody_is_asked_who_can_not_sign(broker: Started, wire: Wire) -> None:
    """And the identifier stays free."""
    app = await app_of(broker, wire)
    verbs = broker.parts.broker
    with pytest.raises(UnknownUser):
        await verbs.begin_authentication(keyed(app), ByChallenge("ann"), "keyed", approval=PAYMENT)
    await wire.open_registration("ann")
    with pytest.raises(NoPasskeys):
        await verbs.begin_authentication(keyed(app), ByChallenge("ann"), "keyed", approval=PAYMENT)
    assert await records(broker, app) == []


@pytest.mark.parametrize("approval", [PAYMENT, None])
async def test_an_approval_is_no_sign_in_and_a_sign_in_no_approval(
    broker: Started, wire: Wire, device: Authenticator, approval: Approval | None
) -> None:
    """The answer to the one never finishes the other, which takes nothing and approves nothing."""
    await wire.user("ann", device)
    app = await app_of(broker, wire)
    answer = await ask(broker, app, device, approval)
    verbs = broker.parts.broker
    with pytest.raises(UnknownTransaction) as caught:
        await verbs.finish_authentication(
            keyed(app),
            ByChallenge(),
            answer,
            ExpectedCeremony(("keyed",), approval=approval is None),
        )
    assert caught.value.reason == "other_finish"
    with pytest.raises(UnknownTransaction):
        await verbs.finish_authentication(keyed(app), ByUser("ann"), answer, KEYED)
    assert [r.approved_at for r in await records(broker, app)] == [None] * (approval is not None)
    await verbs.finish_authentication(
        keyed(app),
        ByChallenge(),
        answer,
        ExpectedCeremony(("keyed",), approval=approval is not None),
    )


async def test_of_50_finishes_one_approves(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    app = await app_of(broker, wire)
    answer = await ask(broker, app, device)
    results = await asyncio.gather(
        *(
            broker.parts.broker.finish_authentication(
                keyed(app), ByChallenge(), answer, ExpectedCeremony(("keyed",), approval=True)
            )
            for _ in range(50)
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(r, UnknownTransaction) for r in results) == 49
    [record] = await records(broker, app)
    assert record.approved_at is not None


async def test_approvals_go_with_their_user(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    app = await app_of(broker, wire)
    answer = await ask(broker, app, device)
    await broker.parts.directory.delete_user(app, "ann")
    with pytest.raises(CeremonyRefused):
        await broker.parts.broker.finish_authentication(
            keyed(app), ByChallenge(), answer, ExpectedCeremony(("keyed",), approval=True)
        )
    await wire.user("ann", device)
    assert await records(broker, app) == []
    await ask(broker, app, device)
