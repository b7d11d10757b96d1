"""The statements of a registration (`broker.durable.ceremonies`, `Users.ensure`), on a real
PostgreSQL and in parallel.

Who shares one is settled in tests/stores/test_group_commit.py; here each caller must get what they
would have got alone.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from broker.durable import Durable, Postgres
from broker.durable.ceremonies import Outcome
from broker.embedded import EmbeddedStores
from broker.errors import UnknownApp
from broker.model import CeremonyOptions, RelyingParty, UserEntity
from broker.telemetry import CONTEXT, Context
from tests.stores.test_durable import (
    LATER,
    MINT,
    NOW,
    blocked,
    ensure,
    new_app,
    pending,
    stored,
    told,
    verified,
)
from tests.support.servers import session_of, statements

MANY = 64


@pytest.fixture
async def app(durable: Durable) -> RelyingParty:
    return await new_app(durable)


async def add(
    durable: Durable, app: RelyingParty, user_id: str, key: bytes, *, live: bool = True
) -> Outcome:
    return await durable.ceremonies.add(
        pending(app, user_id), verified(key), new_id=MINT.id(), live=live, now=LATER
    )


def unharmed(*instances: Durable) -> bool:
    """No statement failed, as one does that waited in a circle."""
    return all(not one.users._pg._metrics.store_failures.values for one in instances)


# -- many at once ----------------------------------------------------------------------------------


async def test_many_registrations_share_statements_and_each_is_told_of(
    durable: Durable, postgres: Postgres, app: RelyingParty
) -> None:
    """Each has their own user, passkey and events: actor, request, ids, action, time."""

    async def register(number: int) -> tuple[str, str]:
        CONTEXT.set(Context(f"request-{number:03}", f"key:{number}"))
        at = NOW + timedelta(microseconds=number)
        user_id = await ensure(durable, app, f"user-{number}", at)
        assert await durable.ceremonies.excluded(app.id, user_id, 0, now=NOW) == []
        passkey_id = MINT.id()
        outcome = await durable.ceremonies.add(
            pending(
                app,
                user_id,
                entity=UserEntity("h" * 43, "ann", "Ann", f"🗝 {number}"),
                options=CeremonyOptions(second_factor=number % 5 == 0),
            ),
            verified(
                b"\0passkey-%d" % number,
                sign_count=2**32 - 1 - number,
                transports=("usb",) * (number % 2),
            ),
            new_id=passkey_id,
            live=number % 2 == 0,
            confirmed=number % 4 == 0,
            now=at,
        )
        assert outcome == "added"
        assert await durable.ceremonies.confirm(
            app.id, passkey_id, 0, LATER + timedelta(microseconds=number)
        )
        return user_id, passkey_id

    made = await asyncio.gather(*map(register, range(MANY)))
    for operation in ("add_credential", "confirm_credential"):
        assert 0 < statements(postgres, operation) < MANY / 4, operation
    assert len({user_id for user_id, _ in made}) == MANY
    events = await durable.events.newest(app.id, limit=1000)
    for number, (user_id, passkey_id) in enumerate(made):
        at, later = (start + timedelta(microseconds=number) for start in (NOW, LATER))
        credential = await stored(durable, app, b"\0passkey-%d" % number)
        assert (credential.id, credential.user_id) == (passkey_id, user_id)
        assert credential.nickname == f"🗝 {number}"
        assert credential.sign_count == 2**32 - 1 - number
        assert credential.transports == ("usb",) * (number % 2)
        assert credential.second_factor is (number % 5 == 0)
        assert (credential.live, credential.created_at, credential.updated_at) == (True, at, later)
        assert credential.confirmed_at == (at if number % 4 == 0 else later)
        assert await durable.ceremonies.excluded(app.id, user_id, 0, now=NOW) == [
            (credential.credential_id, credential.transports, True)
        ]
        user = await durable.users.find(app.id, user_id=user_id)
        assert user is not None
        assert (user.status, user.external_id, user.created_at) == ("active", f"user-{number}", at)
        theirs = sorted(
            (
                (e.at, e.action, e.user_id, e.passkey_id, e.actor)
                for e in events
                if e.request_id == f"request-{number:03}"
            ),
            key=lambda told: told[:2],
        )
        registered = "second_factor.registered" if number % 5 == 0 else "passkey.registered"
        assert theirs == sorted(
            [
                (at, "user.created", user_id, None, f"key:{number}"),
                (at, registered, user_id, passkey_id, f"key:{number}"),
                (later, "passkey.confirmed", user_id, passkey_id, f"key:{number}"),
            ],
            key=lambda told: told[:2],
        )


async def test_instances_that_make_the_same_in_opposite_order(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    """They never wait for each other in a circle. Each user is one, each passkey has one place."""
    for round_ in range(5):
        names = [f"user-{round_}-{number}" for number in range(16)]
        found = await asyncio.gather(
            *(ensure(durable, app, name) for name in names),
            *(ensure(other, app, name) for name in reversed(names)),
        )
        assert found[:16] == found[:15:-1]
        assert len(set(found)) == 16
        keys = [b"%d-%d" % (round_, number) for number in range(16)]
        outcomes = await asyncio.gather(
            *(add(durable, app, user, key) for user, key in zip(found, keys, strict=False)),
            *(
                add(other, app, user, key)
                for user, key in reversed(list(zip(found, keys, strict=False)))
            ),
        )
        for one, two in zip(outcomes[:16], outcomes[:15:-1], strict=True):
            assert sorted((one, two)) == ["added", "duplicate"]
    assert unharmed(durable, other)
    actions = [action for action, _, _ in await told(durable, app)]
    assert (actions.count("user.created"), actions.count("passkey.registered")) == (80, 80)


async def test_several_passkeys_of_one_user_at_once(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    user = await ensure(durable, app, "ann")
    outcomes = await asyncio.gather(
        *(add((durable, other)[number % 2], app, user, b"%d" % number) for number in range(20))
    )
    assert outcomes == ["added"] * 20
    assert len(await durable.ceremonies.excluded(app.id, user, 0, now=NOW) or ()) == 20
    assert unharmed(durable, other)


async def test_one_user_is_asked_for_many_times(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    found = await asyncio.gather(*(ensure((durable, other)[n % 2], app, "ann") for n in range(20)))
    assert len(set(found)) == 1
    assert (await told(durable, app)).count(("user.created", "done", None)) == 1


async def test_users_who_are_there_cost_no_lock_of_their_app(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """A lock is a write. The app's row is everybody's, so it is left alone where nothing is
    inserted.
    """
    names = [f"user-{number}" for number in range(8)]
    made = await asyncio.gather(*(ensure(durable, app, name) for name in names))
    async with session_of(stores) as session:
        locked = "SELECT xmax::text FROM relying_parties WHERE id = $1"
        before = await session.fetchval(locked, app.id)
        assert await asyncio.gather(*(ensure(durable, app, name) for name in names)) == made
        assert await session.fetchval(locked, app.id) == before
        await ensure(durable, app, "somebody new")
        assert await session.fetchval(locked, app.id) != before, "an insert does lock it"


# -- a bad one among good ones ---------------------------------------------------------------------


async def test_an_app_that_is_gone_among_good_ones(durable: Durable, app: RelyingParty) -> None:
    """It alone is refused: unknown to who asks for a user, no user to who has a passkey."""
    gone = await new_app(durable)
    user, theirs = await ensure(durable, app, "ann"), await ensure(durable, gone, "ann")
    await durable.apps.delete(gone.id, NOW)
    found = await asyncio.gather(
        ensure(durable, app, "bob"),
        ensure(durable, gone, "bob"),
        ensure(durable, app, "ann"),
        return_exceptions=True,
    )
    assert isinstance(found[1], UnknownApp)
    assert found[2] == user
    asked = ((app, user, b"mine"), (gone, theirs, b"theirs"), (app, user, b"too"))
    outcomes = await asyncio.gather(*(add(durable, *one) for one in asked))
    assert outcomes == ["added", "no_user", "added"]


async def test_users_and_passkeys_of_others_among_good_ones(
    durable: Durable, app: RelyingParty
) -> None:
    """A user of another app is no owner, and a passkey of another app can't be confirmed."""
    elsewhere = await new_app(durable)
    user, foreign = await ensure(durable, app, "ann"), await ensure(durable, elsewhere, "ann")
    outcomes = await asyncio.gather(
        *(add(durable, app, who, b"of " + who.encode()) for who in (user, foreign, ""))
    )
    assert outcomes == ["added", "no_user", "no_user"]
    mine = await stored(durable, app, b"of " + user.encode())
    asked = ((elsewhere, mine.id), (app, mine.id), (app, MINT.id()))
    confirmed = await asyncio.gather(
        *(durable.ceremonies.confirm(of.id, key, 0, LATER) for of, key in asked)
    )
    assert confirmed == [False, True, False]
    assert [action for action, _, _ in await told(durable, elsewhere)].count(
        "passkey.confirmed"
    ) == 0
    held = await asyncio.gather(
        *(durable.ceremonies.excluded(of.id, user, 0, now=NOW) for of in (app, elsewhere))
    )
    assert held == [[(mine.credential_id, mine.transports, True)], None]


async def test_a_value_that_the_server_refuses_harms_only_its_caller(
    durable: Durable, app: RelyingParty
) -> None:
    found = await asyncio.gather(
        *(ensure(durable, app, name) for name in ("ann", "nul\0", "bob")), return_exceptions=True
    )
    assert isinstance(found.pop(1), asyncpg.PostgresError)
    assert all(isinstance(one, str) for one in found)


# -- what somebody else holds ----------------------------------------------------------------------


@pytest.mark.parametrize("deleted", [True, False])
async def test_an_app_that_is_being_deleted_holds_up_only_its_own(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores, deleted: bool
) -> None:
    """It is settled by the commit whether there is a user, or a passkey."""
    leaving = await new_app(durable)
    user, theirs = await ensure(durable, app, "ann"), await ensure(durable, leaving, "ann")
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        await session.execute("DELETE FROM relying_parties WHERE id = $1", leaving.id)
        held = [
            asyncio.create_task(ensure(durable, leaving, "bob")),
            asyncio.create_task(add(durable, leaving, theirs, b"theirs")),
        ]
        assert await asyncio.gather(
            ensure(durable, app, "bob"),
            ensure(durable, app, "carl"),
            add(durable, app, user, b"mine"),
        )
        await blocked(stores, session, 2)
        assert not any(one.done() for one in held)
        if deleted:
            await change.commit()
        else:
            await change.rollback()
    made, outcome = await asyncio.gather(*held, return_exceptions=True)
    assert outcome == ("no_user" if deleted else "added")
    assert isinstance(made, UnknownApp if deleted else str)


@pytest.mark.parametrize("deleted", [True, False])
async def test_a_user_who_is_being_deleted_holds_up_only_their_own(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores, deleted: bool
) -> None:
    ann, bob = await ensure(durable, app, "ann"), await ensure(durable, app, "bob")
    for user, key in ((ann, b"ann's"), (bob, b"bob's")):
        assert await add(durable, app, user, key, live=False) == "added"
    anns, bobs = await stored(durable, app, b"ann's"), await stored(durable, app, b"bob's")
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        await session.execute("DELETE FROM users WHERE id = $1", ann)
        adding = asyncio.create_task(add(durable, app, ann, b"more of ann's"))
        confirming = asyncio.create_task(durable.ceremonies.confirm(app.id, anns.id, 0, LATER))
        assert await add(durable, app, bob, b"more of bob's") == "added"
        assert await durable.ceremonies.confirm(app.id, bobs.id, 0, LATER)
        await blocked(stores, session, 2)
        assert not adding.done()
        assert not confirming.done()
        if deleted:
            await change.commit()
        else:
            await change.rollback()
    assert [await adding, await confirming] == (["no_user", False] if deleted else ["added", True])
    actions = [action for action, _, _ in await told(durable, app)]
    assert (actions.count("passkey.registered"), actions.count("passkey.confirmed")) == (
        (3, 1) if deleted else (4, 2)
    )
    assert unharmed(durable)


@pytest.mark.parametrize("disabled", [True, False])
async def test_a_passkey_that_is_being_added_ends_with_the_others(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores, disabled: bool
) -> None:
    """A registration has the user's row, and commits while a disable or a revoke-all waits."""
    ann = await ensure(durable, app, "ann")
    assert await add(durable, app, ann, b"first") == "added"
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        await session.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", ann)
        await session.execute(
            "INSERT INTO credentials SELECT (jsonb_populate_record("
            r"c, jsonb_build_object('id', $2::text, 'credential_id', '\x02'))).*"
            " FROM credentials c WHERE user_id = $1",
            ann,
            MINT.id(),
        )
        if disabled:
            ending = durable.users.set_disabled(app.id, "ann", LATER, disabled=True)
            ended: asyncio.Task[object] = asyncio.create_task(ending)
        else:
            ended = asyncio.create_task(durable.credentials.revoke(app.id, ann, None, LATER))
        await blocked(stores, session)
        await change.commit()
    assert await ended
    left = await durable.credentials.of_user(app.id, ann)
    assert len(left) == (2 if disabled else 0)
    for epoch, live in ((0, False), (1, True)):
        found = [await durable.ceremonies.is_live(app.id, key.id, epoch) for key in left]
        assert found == [live] * len(left)
    outcome = await add(durable, app, ann, b"third")
    assert outcome == "epoch_over"
    assert unharmed(durable)


@pytest.mark.parametrize("revoked", [True, False])
async def test_a_user_is_locked_before_the_passkey(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores, revoked: bool
) -> None:
    """A disable, which has the user's row, gets the passkey's while the other one waits."""
    ann = await ensure(durable, app, "ann")
    assert await add(durable, app, ann, b"first", live=False) == "added"
    key = await stored(durable, app, b"first")
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        await session.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", ann)
        if revoked:
            revoking = durable.credentials.revoke(app.id, ann, [key.id], LATER)
            waiting: asyncio.Task[object] = asyncio.create_task(revoking)
        else:
            waiting = asyncio.create_task(durable.ceremonies.confirm(app.id, key.id, 0, LATER))
        await blocked(stores, session)
        await session.execute("UPDATE credentials SET epoch = 1 WHERE user_id = $1", ann)
        await change.commit()
    assert await waiting == ([key.id] if revoked else False)
    assert unharmed(durable)


async def test_deletions_and_registrations_at_once(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    """A passkey was stored before its user was deleted, or it is told that there is no user; none
    is left behind.
    """
    users = [await ensure(durable, app, f"user-{number}") for number in range(24)]
    outcomes = await asyncio.gather(
        *(add(durable, app, user, user.encode()) for user in users),
        *(other.users.delete(app.id, f"user-{number}", LATER) for number in range(24)),
    )
    assert set(outcomes[:24]) <= {"added", "no_user"}
    assert outcomes[24:] == [True] * 24
    assert [await durable.credentials.of_user(app.id, user) for user in users] == [[]] * 24
    assert unharmed(durable, other)


# -- how many a user may have ----------------------------------------------------------------------


async def registered(
    durable: Durable, app: RelyingParty, user: str, name: bytes, limit: int, **how: Any
) -> str:
    of: dict[str, Any] = {"live": True, "now": NOW, **how}
    return await durable.ceremonies.add(
        pending(app, user), verified(name), new_id=MINT.id(), max_passkeys=limit, **of
    )


@pytest.mark.parametrize("live", [True, False])
async def test_of_many_at_once_as_many_are_added_as_a_user_may_have(
    durable: Durable, other: Durable, app: RelyingParty, stores: EmbeddedStores, live: bool
) -> None:
    """Twelve registrations that all began below the limit, on two instances. All are held open at
    the user's row, so that every statement has taken its snapshot before any of them adds a
    passkey."""
    user = await ensure(durable, app, "ann")
    assert await registered(durable, app, user, b"first", 4) == "added"
    async with session_of(stores) as session:
        async with session.transaction():
            await session.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", user)
            tasks = [
                asyncio.create_task(registered(store, app, user, bytes([number]) * 8, 4, live=live))
                for number, store in enumerate((durable, other) * 6)
            ]
            waiting = (
                "SELECT count(*) FROM pg_locks"
                " WHERE NOT granted AND locktype IN ('transactionid', 'tuple')"
            )
            while await session.fetchval(waiting) < 12:
                assert not any(task.done() for task in tasks)
                await asyncio.sleep(0.005)  # between two looks
        outcomes = await asyncio.gather(*tasks)
    assert sorted(outcomes) == ["added"] * 3 + ["too_many_passkeys"] * 9
    assert len(await durable.credentials.of_user(app.id, user)) == 4
    assert await registered(other, app, user, b"last", 4) == "too_many_passkeys"
    assert await registered(other, app, user, b"last", 5) == "added"


async def test_of_several_in_one_statement_as_many_are_added_as_a_user_may_have(
    durable: Durable, app: RelyingParty
) -> None:
    """The user's passkeys and another one's, all in one batch; a duplicate takes no place."""
    user, fresh = await ensure(durable, app, "ann"), await ensure(durable, app, "ben")
    assert await registered(durable, app, fresh, b"taken", 2) == "added"
    names = [b"taken", b"1", b"2", b"3"]
    outcomes = await asyncio.gather(
        *(registered(durable, app, user, name, 2) for name in names),
        registered(durable, app, fresh, b"4", 2),
    )
    assert sorted(outcomes[1:4]) == ["added", "added", "too_many_passkeys"]
    assert outcomes[0] in ("duplicate", "too_many_passkeys")
    assert outcomes[4] == "added"
    assert len(await durable.credentials.of_user(app.id, user)) == 2


async def test_a_passkey_that_was_never_confirmed_counts_as_long_as_it_may_be(
    durable: Durable, app: RelyingParty
) -> None:
    """At the boundary, by the statement that adds."""
    user = await ensure(durable, app, "ann")
    assert await registered(durable, app, user, b"1", 1, live=False) == "added"
    for late, outcome in ((659.999, "too_many_passkeys"), (660.0, "added")):
        then = NOW + timedelta(seconds=late)
        counted = await durable.ceremonies.excluded(app.id, user, 0, now=then)
        assert len(counted or ()) == (outcome != "added")
        assert await registered(durable, app, user, b"2", 1, now=then) == outcome
