"""The two statements of a login (`broker.durable.ceremonies`), on a real PostgreSQL and in
parallel.

Who shares one is settled in tests/stores/test_group_commit.py; here each caller must get what they
would have got alone.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import asyncpg
import pytest

from broker.durable import Durable, Postgres
from broker.durable.ceremonies import UserCredentials
from broker.embedded import EmbeddedStores
from broker.errors import Unavailable
from broker.model import Approval, Credential, RelyingParty, SignInOutcome
from broker.telemetry import CONTEXT, Context
from tests.stores.test_durable import (
    LATER,
    MINT,
    NOW,
    STRANGE,
    add,
    blocked,
    ensure,
    new_app,
    signed_in,
    stored,
    told,
)
from tests.support.servers import session_of, statements

MANY = 64


@pytest.fixture
async def app(durable: Durable) -> RelyingParty:
    return await new_app(durable)


async def passkeys(
    durable: Durable, app: RelyingParty, number: int, *, sign_count: int = 5
) -> list[Credential]:
    """So many users' passkeys, one each."""
    made = []
    for n in range(number):
        user = await ensure(durable, app, f"user-{n}")
        made.append(await add(durable, app, user, b"passkey-%d" % n, sign_count=sign_count))
    return made


async def use(
    durable: Durable,
    key: Credential,
    sign_count: int = 6,
    *,
    flag: bool = False,
    approval: str | None = None,
) -> SignInOutcome | None:
    return await durable.ceremonies.use(
        key, signed_in(sign_count), epoch=0, flag_counter=flag, approval=approval, now=LATER
    )


# -- sign-ins --------------------------------------------------------------------------------------


async def test_many_share_statements_and_each_is_told_of(
    durable: Durable, postgres: Postgres, app: RelyingParty
) -> None:
    """Each has the Used of their passkey, and their own event: actor, request, user, passkey,
    action, time.
    """
    keys = await passkeys(durable, app, MANY)

    async def sign_in(number: int) -> SignInOutcome | None:
        CONTEXT.set(Context(f"request-{number:03}", f"key:{number}"))
        verdict = signed_in(6 + number, backed_up=number % 3 == 0)
        return await durable.ceremonies.use(
            keys[number],
            verdict,
            epoch=0,
            flag_counter=number % 2 == 0,
            action="passkey.used" if number % 5 else "second_factor.used",
            now=LATER + timedelta(microseconds=number),
        )

    used = await asyncio.gather(*map(sign_in, range(MANY)))
    assert used == [SignInOutcome(False, number % 3 == 0) for number in range(MANY)]
    assert 0 < statements(postgres, "use_credential") < MANY / 4
    events = {
        e.request_id: e for e in await durable.events.newest(app.id, limit=1000) if e.at >= LATER
    }
    assert len(events) == MANY
    for number, key in enumerate(keys):
        event = events[f"request-{number:03}"]
        assert (event.actor, event.user_id, event.passkey_id) == (
            f"key:{number}",
            key.user_id,
            key.id,
        )
        assert event.action == ("passkey.used" if number % 5 else "second_factor.used")
        assert (event.result, event.reason) == ("done", None)
        at = LATER + timedelta(microseconds=number)
        assert event.at == at
        assert await stored(durable, app, key.credential_id) == replace(
            key,
            sign_count=6 + number,
            backed_up=number % 3 == 0,
            last_used_at=at,
            updated_at=at,
            use_count=1,
        )


async def test_rising_counters_of_one_passkey(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    """At once, on two instances: whichever are recorded, the counter rose with each; the highest
    always is.
    """
    (key,) = await passkeys(durable, app, 1)
    counts = range(6, 26)
    used = await asyncio.gather(*(use((durable, other)[count % 2], key, count) for count in counts))
    assert used[-1] is not None
    now = await stored(durable, app, key.credential_id)
    assert (now.sign_count, now.use_count) == (25, len([one for one in used if one]))
    assert all(one is None or not one.counter_regressed for one in used)


@pytest.mark.parametrize("flag", [False, True])
async def test_equal_counters_of_one_passkey(
    durable: Durable, other: Durable, app: RelyingParty, flag: bool
) -> None:
    """Of clones that answer at once exactly one is first; the others are refused, or flagged."""
    (key,) = await passkeys(durable, app, 1)
    used = await asyncio.gather(
        *(use((durable, other)[n % 2], key, 6, flag=flag) for n in range(20))
    )
    first = [one for one in used if one is not None and not one.counter_regressed]
    assert len(first) == 1
    assert used.count(None) == (0 if flag else 19)
    assert (await stored(durable, app, key.credential_id)).use_count == (20 if flag else 1)
    events = await told(durable, app)
    assert events.count(("passkey.used", "done", "counter")) == (19 if flag else 0)
    assert events.count(("passkey.used", "done", None)) == 1


async def test_passkeys_without_counters(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    """As most are: every one of many sign-ins counts."""
    (key,) = await passkeys(durable, app, 1, sign_count=0)
    used = await asyncio.gather(*(use((durable, other)[n % 2], key, 0) for n in range(20)))
    assert all(one is not None and not one.counter_regressed for one in used)
    assert (await stored(durable, app, key.credential_id)).use_count == 20


@pytest.mark.parametrize("what", ["revoked", "counter", "other app", "unknown", "not live"])
async def test_a_bad_one_among_good_ones(
    durable: Durable, postgres: Postgres, app: RelyingParty, what: str
) -> None:
    """It alone is refused, and nothing of it is recorded."""
    keys = await passkeys(durable, app, 8)
    bad, count = keys[3], 6
    if what == "revoked":
        await durable.credentials.revoke(app.id, bad.user_id, [bad.id], NOW)
    elif what == "counter":
        count = 5
    elif what == "other app":
        keys[3] = replace(bad, app_id=(await new_app(durable)).id)
    elif what == "unknown":
        keys[3] = replace(bad, id=MINT.id())
    else:
        keys[3] = await add(
            durable,
            app,
            await ensure(durable, app, "waiting"),
            b"waiting",
            live=False,
            sign_count=5,
        )
    before = statements(postgres, "use_credential")
    used = await asyncio.gather(
        *(use(durable, key, count if n == 3 else 6) for n, key in enumerate(keys))
    )
    assert [one is None for one in used] == [n == 3 for n in range(8)]
    assert statements(postgres, "use_credential") - before == 2, "the bad one was asked about alone"
    actions = [action for action, _, _ in await told(durable, app)]
    assert actions.count("passkey.used") == 7
    if what == "counter":
        assert await stored(durable, app, bad.credential_id) == bad


async def test_a_locked_row_among_good_ones(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """It waits, alone, for whoever holds the row, and is then recorded; the others don't wait."""
    keys = await passkeys(durable, app, 8)
    async with session_of(stores) as session:
        async with session.transaction():
            await session.execute("SELECT FROM credentials WHERE id = $1 FOR UPDATE", keys[3].id)
            signing_in = [asyncio.create_task(use(durable, key)) for key in keys]
            held = signing_in.pop(3)
            assert await asyncio.gather(*signing_in) == [SignInOutcome(False, True)] * 7
            again = [
                asyncio.create_task(use(durable, key, 7)) for key in keys if key is not keys[3]
            ]
            assert await asyncio.gather(*again) == [SignInOutcome(False, False)] * 7
            await blocked(stores, session)
            assert not held.done()
        assert await held == SignInOutcome(False, True)


@pytest.mark.parametrize("revoked", [True, False])
async def test_a_revocation_that_races_with_sign_ins(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores, revoked: bool
) -> None:
    """Held open: the row is deleted and not committed. Whether the sign-in counts is settled by the
    commit.
    """
    keys = await passkeys(durable, app, 4)
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        await session.execute("DELETE FROM credentials WHERE id = $1", keys[1].id)
        signing_in = [asyncio.create_task(use(durable, key)) for key in keys]
        await blocked(stores, session)
        assert not signing_in[1].done()
        if revoked:
            await change.commit()
        else:
            await change.rollback()
    used = await asyncio.gather(*signing_in)
    assert [one is None for one in used] == [False, revoked, False, False]
    assert (await told(durable, app)).count(("passkey.used", "done", None)) == 4 - revoked


async def test_revocations_and_sign_ins_at_once(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    """Each passkey's sign-in came before its revocation, or it didn't happen; and each revocation
    takes the logins along.
    """
    keys = await passkeys(durable, app, 24)
    outcomes = await asyncio.gather(
        *(use(durable, key) for key in keys),
        *(other.credentials.revoke(app.id, key.user_id, [key.id], LATER) for key in keys),
    )
    used, revoked = outcomes[:24], outcomes[24:]
    assert revoked == [[key.id] for key in keys]
    for key, one in zip(keys, used, strict=True):
        user = await durable.users.find(app.id, user_id=key.user_id)
        assert user is not None
        assert user.login_count == (one is not None)


async def test_instances_that_sign_in_the_same_in_opposite_order(
    durable: Durable, other: Durable, app: RelyingParty
) -> None:
    """They never wait for each other in a circle: no statement fails as a deadlock, and nobody is
    refused.
    """
    keys = await passkeys(durable, app, 16, sign_count=0)
    for _ in range(5):
        used = await asyncio.gather(
            *(use(durable, key, 0) for key in keys), *(use(other, key, 0) for key in reversed(keys))
        )
        assert None not in used
    assert (
        durable.ceremonies._pg._metrics.store_failures.values
        == other.ceremonies._pg._metrics.store_failures.values
        == {}
    )
    for key in keys:
        assert (await stored(durable, app, key.credential_id)).use_count == 10


async def test_approvals_among_sign_ins(
    durable: Durable, postgres: Postgres, app: RelyingParty
) -> None:
    """Those approve theirs whose passkey signed in; the others' stay as they were, also one of
    another app with the same name.
    """
    keys = await passkeys(durable, app, 6)
    elsewhere = await new_app(durable)
    theirs = await ensure(durable, elsewhere, "ann")
    for n, key in enumerate(keys):
        await durable.approvals.add(
            app.id, key.user_id, Approval(f"buy-{n}", "data", b"d" * 32), new_id=MINT.id(), now=NOW
        )
    await durable.approvals.add(
        elsewhere.id, theirs, Approval("buy-0", "data", b"d" * 32), new_id=MINT.id(), now=NOW
    )
    approving = {0: "buy-0", 2: "buy-2", 3: "buy-3"}
    used = await asyncio.gather(
        *(
            use(durable, key, 5 if n == 3 else 6, approval=approving.get(n))
            for n, key in enumerate(keys)
        )
    )
    assert [one is None for one in used] == [n == 3 for n in range(6)]
    approved = {}
    for key in keys:
        for record in await durable.approvals.of_user(app.id, key.user_id):
            approved[record.identifier] = record.approved_at
    assert approved == {f"buy-{n}": LATER if n in (0, 2) else None for n in range(6)}
    (untouched,) = await durable.approvals.of_user(elsewhere.id, theirs)
    assert untouched.approved_at is None


async def test_a_value_that_the_server_refuses_harms_only_its_caller(
    durable: Durable, app: RelyingParty
) -> None:
    """No JSON of PostgreSQL has a NUL, no bigint 64 bits. Nothing in front lets these through; a
    statement is shared all the same.
    """
    keys = await passkeys(durable, app, 6)
    used = await asyncio.gather(
        *(use(durable, key, 2**63 if n == 1 else 6) for n, key in enumerate(keys)),
        return_exceptions=True,
    )
    assert isinstance(used.pop(1), asyncpg.PostgresError)
    assert used == [SignInOutcome(False, True)] * 5
    found = await asyncio.gather(
        *(durable.ceremonies.allowed(app.id, name) for name in ("user-0", "nul\0", "user-2")),
        return_exceptions=True,
    )
    assert isinstance(found.pop(1), asyncpg.PostgresError)
    assert [one[0] for one in found if isinstance(one, tuple)] == [keys[0].user_id, keys[2].user_id]


async def test_what_asyncpg_can_not_send(postgres: Postgres) -> None:
    """It says so by the class that a server's refusal has: one that group commit takes for
    certainly not done.
    """
    with pytest.raises(asyncpg.DataError) as refusal:
        await postgres.rows("test", "SELECT $1::integer", "no number")
    assert isinstance(refusal.value, asyncpg.PostgresError)
    assert not isinstance(refusal.value, asyncpg.InterfaceError)


async def test_a_lost_connection_is_everybodys(
    durable: Durable, postgres: Postgres, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """Nobody knows, so nothing is sent again: whoever signs in anew meets what was recorded, or
    not.
    """
    keys = await passkeys(durable, app, 3)
    async with session_of(stores) as session, session.transaction():
        await session.execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        signing_in = [asyncio.create_task(use(durable, key)) for key in keys]
        await blocked(stores, session)
        await session.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE $1 = ANY(pg_blocking_pids(pid))",
            session.get_server_pid(),
        )
        found = await asyncio.gather(*signing_in, return_exceptions=True)
    assert [type(one) for one in found] == [Unavailable] * 3
    assert statements(postgres, "use_credential") == 1
    assert [await stored(durable, app, key.credential_id) for key in keys] == keys
    assert await use(durable, keys[0]) == SignInOutcome(False, True)


# -- who may sign in -------------------------------------------------------------------------------


def ids(found: UserCredentials | None) -> tuple[str, list[str]] | None:
    """A user's id and the passkeys', in their order."""
    return None if found is None else (found.user_id, [one.id for one in found.allowed])


async def test_each_finds_their_own_user(
    durable: Durable, postgres: Postgres, app: RelyingParty
) -> None:
    """Of all kinds at once, and the same external id in two apps."""
    elsewhere = await new_app(durable)
    ann, zoe = await ensure(durable, app, "ann"), await ensure(durable, app, "zoe")
    theirs = await ensure(durable, elsewhere, "ann")
    first = await add(durable, app, ann, b"first", now=NOW)
    second = await add(durable, app, ann, b"second", now=NOW + timedelta(microseconds=1))
    await add(durable, app, ann, b"waiting", live=False)
    foreign = await add(durable, elsewhere, theirs, b"first")
    asked = [
        (app.id, "ann"),
        (app.id, "nobody"),
        (elsewhere.id, "ann"),
        (app.id, "zoe"),
        (elsewhere.id, "zoe"),
        (MINT.id(), "ann"),
        (app.id, "ann"),
        (app.id, ""),
    ]
    found = await asyncio.gather(*(durable.ceremonies.allowed(*one) for one in asked))
    assert [ids(one) for one in found] == [
        (ann, [first.id, second.id]),
        None,
        (theirs, [foreign.id]),
        (zoe, []),
        None,
        None,
        (ann, [first.id, second.id]),
        None,
    ]
    assert found[0] is not None
    assert found[6] is not None
    assert found[0].allowed is not found[6].allowed, "each has a list of their own"
    assert found[0].allowed[0].public_key == first.public_key


async def test_second_factors_are_found_by_who_asks_for_them(
    durable: Durable, postgres: Postgres, app: RelyingParty, stores: EmbeddedStores
) -> None:
    ann = await ensure(durable, app, "ann")
    login, factor = (
        await add(durable, app, ann, b"login"),
        await add(durable, app, ann, b"factor", now=LATER),
    )
    async with session_of(stores) as session:
        await session.execute(
            "UPDATE credentials SET second_factor = true WHERE id = $1", factor.id
        )
    found = await asyncio.gather(
        *(
            durable.ceremonies.allowed(app.id, "ann", second_factor=asked)
            for asked in (False, True, False)
        )
    )
    assert [ids(one) for one in found] == [
        (ann, [login.id]),
        (ann, [login.id, factor.id]),
        (ann, [login.id]),
    ]


ESCAPED = (
    'quo"te',
    "apos'trophe",
    "back\\slash",
    "\\u0041",
    "line\nfeed",
    "\r\t\b\f\x01\x1f\x7f",
    "🔑 emoji",
    "\u2028\u2029",
    "\ufeffmark",
    "{}[],:",
    "null",
    "$1::text",
    "e\u0301",
    "\u00e9",
    "\U0010ffff",
    "x" * 1000,
)


async def test_external_ids_that_json_escapes(durable: Durable, app: RelyingParty) -> None:
    """They find exactly the user whose id they are."""
    names = list(dict.fromkeys((*ESCAPED, *STRANGE)))
    made = {name: await ensure(durable, app, name) for name in names}
    assert len(set(made.values())) == len(names)
    found = await asyncio.gather(*(durable.ceremonies.allowed(app.id, name) for name in names))
    assert {name: one and one[0] for name, one in zip(names, found, strict=True)} == made


async def test_what_an_event_says_of_odd_words(
    durable: Durable, postgres: Postgres, app: RelyingParty
) -> None:
    """Actor, request and action travel as JSON too."""
    (key,) = await passkeys(durable, app, 1)
    CONTEXT.set(Context('r"\\\u2028🔑\n', "key:'{}\\u0041"))
    await durable.ceremonies.use(
        key, signed_in(6), epoch=0, flag_counter=False, action='a"\\n', now=LATER
    )
    event = next(e for e in await durable.events.newest(app.id, limit=1000) if e.at == LATER)
    assert (event.request_id, event.actor, event.action) == (
        'r"\\\u2028🔑\n',
        "key:'{}\\u0041",
        'a"\\n',
    )


@pytest.mark.parametrize("micro", [0, 1, 100_000, 123_456, 999_999])
async def test_a_time_keeps_its_microseconds(
    durable: Durable, app: RelyingParty, micro: int
) -> None:
    (key,) = await passkeys(durable, app, 1)
    at = LATER.replace(microsecond=micro)
    await durable.ceremonies.use(key, signed_in(6), epoch=0, flag_counter=False, now=at)
    assert (await stored(durable, app, key.credential_id)).last_used_at == at
