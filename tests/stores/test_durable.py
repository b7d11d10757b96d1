"""The contract of the durable store, on a real PostgreSQL: every method, every race that the
database decides, every limit.
"""

from __future__ import annotations

import asyncio
import re
import time
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from broker.durable import Durable, Postgres
from broker.durable.ceremonies import UserCredentials
from broker.durable.events import ERASE
from broker.durable.postgres import _init
from broker.embedded import EmbeddedStores
from broker.errors import Conflict, Unavailable, UnknownApp
from broker.model import (
    ApiKey,
    Approval,
    CeremonyOptions,
    Credential,
    Named,
    PendingRegistration,
    Policy,
    RelyingParty,
    SignInOutcome,
    Unowned,
    UserEntity,
    VerifiedAuthentication,
    VerifiedRegistration,
)
from broker.telemetry import CONTEXT, Context
from broker.tokens import SystemMint, key_digest
from tests.support.processes import DEADLINE
from tests.support.proxy import postgres_proxy
from tests.support.servers import connect_postgres, pool, session_of
from tests.support.waited import Waited

MINT = SystemMint()
NOW = datetime(2026, 3, 4, 5, 6, 7, 890123, UTC)
LATER = NOW + timedelta(hours=1)
Made = Callable[..., Awaitable[str]]


def relying_party(**changes: Any) -> RelyingParty:
    made = RelyingParty(
        MINT.id(), "Example", "example.org", ("https://example.org",), ("https://other.example",)
    )
    return replace(made, **changes)


async def new_app(durable: Durable, **changes: Any) -> RelyingParty:
    app = relying_party(**changes)
    secret = MINT.token("key")
    await durable.apps.create(
        app, ApiKey(MINT.id(), app.id, "pbk_…", "first", NOW, None), key_digest(secret)
    )
    return replace(app, created_at=NOW, updated_at=NOW)


@pytest.fixture
async def app(durable: Durable) -> RelyingParty:
    return await new_app(durable)


async def ensure(durable: Durable, app: RelyingParty, external_id: str, now: datetime = NOW) -> str:
    """The user's id."""
    user, _ = await durable.users.ensure(
        app.id, external_id, new_id=MINT.id(), new_handle=MINT.user_handle(), now=now
    )
    return user.user_id


def pending(app: RelyingParty, user_id: str, **changes: Any) -> PendingRegistration:
    made = PendingRegistration(
        app_id=app.id,
        challenge=b"c" * 32,
        transaction=b"t" * 32,
        subject=Named(user_id, "ann", 0),
        entity=UserEntity("h" * 43, "ann", "Ann", "Ann's key"),
        options=CeremonyOptions(),
        user_verification="required",
        algorithms=(-7,),
        begun_at=0.0,
        expires_at=300.0,
    )
    return made._replace(**changes)


def verified(credential_id: bytes, **changes: Any) -> VerifiedRegistration:
    made = VerifiedRegistration(
        credential_id=credential_id,
        public_key=b"\xa5\x01\x02\x00\xff",
        algorithm=-7,
        sign_count=0,
        user_present=True,
        user_verified=True,
        backup_eligible=True,
        backed_up=False,
        transports=("internal", "hybrid"),
        attachment="platform",
        aaguid="08987058-cadc-4b81-b6e1-30de50dcbe96",
        attestation_format="none",
        attestation_trust="none",
        origin="https://example.org",
    )
    return made._replace(**changes)


async def add(
    durable: Durable,
    app: RelyingParty,
    user_id: str,
    credential_id: bytes = b"credential",
    *,
    live: bool = True,
    now: datetime = NOW,
    **changes: Any,
) -> Credential:
    """A credential of the user's, as it is stored."""
    outcome = await durable.ceremonies.add(
        pending(app, user_id),
        verified(credential_id, **changes),
        new_id=MINT.id(),
        live=live,
        now=now,
    )
    assert outcome == "added"
    return await stored(durable, app, credential_id)


async def stored(
    durable: Durable, app: RelyingParty, credential_id: bytes = b"credential"
) -> Credential:
    owned = await durable.credentials.find(app.id, credential_id=credential_id)
    assert owned is not None
    return owned.credential


def signed_in(sign_count: int = 0, **changes: Any) -> VerifiedAuthentication:
    made = VerifiedAuthentication(
        sign_count=sign_count,
        counter_regressed=False,
        user_present=True,
        user_verified=True,
        backup_eligible=True,
        backed_up=True,
        backup_changed=True,
        origin="https://example.org",
    )
    return made._replace(**changes)


async def told(durable: Durable, app: RelyingParty) -> list[tuple[str, str, str | None]]:
    return [(e.action, e.result, e.reason) for e in await durable.events.newest(app.id, limit=1000)]


# -- relying parties and keys ----------------------------------------------------------------------


async def test_an_app_comes_back_as_it_was(durable: Durable) -> None:
    policy = Policy(
        user_verification="preferred",
        attestation_roots=("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----",),
        algorithms=(-8, -7),
        hints=("hybrid",),
        allow_cross_origin=True,
        top_origins=("https://top.example",),
        counter="flag",
        live_at="redemption",
        nonce_life=30,
        discoverable_limit=7,
        max_passkeys=8,
    )
    app = await new_app(durable, name="Ünï \"'% 🔑", policy=policy)
    assert await durable.apps.find(app.id) == app
    assert app in await durable.apps.all()
    changed = replace(
        app,
        name="Other",
        rp_id="other.example",
        origins=("android:apk-key-hash:" + "x" * 43,),
        policy=Policy(),
    )
    assert await durable.apps.update(changed, LATER) == replace(changed, updated_at=LATER)
    assert await durable.apps.find(app.id) == replace(changed, updated_at=LATER)
    assert await durable.apps.find(MINT.id()) is None
    assert not await durable.apps.update(relying_party(), LATER)
    assert await told(durable, app) == [
        ("app.created", "done", None),
        ("app.updated", "done", None),
    ]


async def test_of_two_updates_at_once_one_is_refused(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """Both rest on what was read before; the first one is held open with the row, and the second
    one waits for it.
    """
    read = await durable.apps.find(app.id)
    assert read is not None
    named, ruled = replace(read, name="Named"), replace(read, policy=Policy(nonce_life=30))
    async with session_of(stores) as session:
        async with session.transaction():
            await session.execute("SELECT FROM relying_parties WHERE id = $1 FOR UPDATE", app.id)
            waiting = (
                "SELECT count(*) FROM pg_locks"
                " WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
            )
            tasks = [asyncio.create_task(durable.apps.update(a, LATER)) for a in (named, ruled)]
            while await session.fetchval(waiting) < 1:
                assert not any(task.done() for task in tasks)
                await asyncio.sleep(0.005)  # between two looks
        results = await asyncio.gather(*tasks, return_exceptions=True)
    [refused] = [r for r in results if isinstance(r, Conflict)]
    [updated] = [r for r in results if isinstance(r, RelyingParty)]
    assert refused.sentence == "The app was changed meanwhile; look at it and try again."
    assert await durable.apps.find(app.id) == updated
    assert (await told(durable, app)).count(("app.updated", "done", None)) == 1
    with pytest.raises(Conflict):
        await durable.apps.update(replace(named, name="Later"), LATER)
    again = await durable.apps.update(replace(updated, name="Again"), LATER)
    assert again is not None
    assert again.updated_at == LATER + timedelta(microseconds=1), "no two versions share their time"


async def test_a_policy_of_newer_code_is_read_by_older_and_stays(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    async with session_of(stores) as session:
        await session.execute(
            "UPDATE relying_parties"
            """ SET policy = '{"nonce_life": 5, "of_tomorrow": {"a": [1]}}' WHERE id = $1""",
            app.id,
        )
    found = await durable.apps.find(app.id)
    assert found is not None
    assert replace(found.policy, declared={}) == Policy(nonce_life=5)
    changed = await durable.apps.update(replace(found, name="Changed"), LATER)
    assert changed is not None
    assert changed.policy.dump() == {"nonce_life": 5, "of_tomorrow": {"a": [1]}}


async def test_only_what_differs_from_the_default_is_stored(
    durable: Durable, stores: EmbeddedStores
) -> None:
    app = await new_app(durable, policy=Policy(algorithms=(-7,)))
    async with session_of(stores) as session:
        kind, text = await session.fetchrow(  # type: ignore[misc]
            "SELECT jsonb_typeof(policy), policy::text FROM relying_parties WHERE id = $1", app.id
        )
    assert (kind, text) == ("object", '{"algorithms": [-7]}')


async def test_a_key_is_of_one_app_until_it_is_revoked(durable: Durable, app: RelyingParty) -> None:
    other, secret, key_id = await new_app(durable), MINT.token("key"), MINT.id()
    name = key_digest(secret)
    assert await durable.api_keys.create(
        ApiKey(key_id, app.id, "pbk_abcd…", "second", LATER, None), name
    )
    assert await durable.api_keys.find(name) == (key_id, app.id)
    assert await durable.api_keys.find(key_digest("other")) is None
    assert not await durable.api_keys.revoke(other.id, key_id, LATER)
    assert await durable.api_keys.find(name) == (key_id, app.id)
    assert await durable.api_keys.revoke(app.id, key_id, LATER)
    assert not await durable.api_keys.revoke(app.id, key_id, LATER), "revoked before"
    assert await durable.api_keys.find(name) is None
    listed = await durable.api_keys.of_app(app.id)
    assert [k.name for k in listed] == ["first", "second"]
    assert listed[1] == ApiKey(key_id, app.id, "pbk_abcd…", "second", LATER, LATER)
    assert not await durable.api_keys.create(
        ApiKey(MINT.id(), MINT.id(), "h", "n", NOW, None), b"x" * 32
    )
    assert (await told(durable, app))[1:] == [
        ("key.created", "done", key_id),
        ("key.revoked", "done", key_id),
    ]


async def test_one_key_is_revoked_once_in_parallel(durable: Durable, app: RelyingParty) -> None:
    key = (await durable.api_keys.of_app(app.id))[0]
    done = await asyncio.gather(*(durable.api_keys.revoke(app.id, key.id, NOW) for _ in range(20)))
    assert sum(done) == 1
    assert (await told(durable, app)).count(("key.revoked", "done", key.id)) == 1


async def test_a_deleted_app_leaves_its_events(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    user = await ensure(durable, app, "ann")
    await add(durable, app, user)
    before = await told(durable, app)
    other = await new_app(durable)
    kept = await ensure(durable, other, "ann")
    assert await durable.apps.delete(app.id, LATER)
    assert not await durable.apps.delete(app.id, LATER)
    assert await found_in(stores, app.id) == {"events": 4}
    assert await found_in(stores, user) == {"events": 2}
    assert await told(durable, app) == [*before, ("app.deleted", "done", None)]
    assert await durable.users.find(other.id, user_id=kept) is not None


async def test_a_request_on_an_app_that_is_gone_is_refused(
    durable: Durable, app: RelyingParty
) -> None:
    """Look-ups are remembered for a moment, so such requests come."""
    user = await ensure(durable, app, "ann")
    await durable.apps.delete(app.id, LATER)
    with pytest.raises(UnknownApp):
        await ensure(durable, app, "ben")
    outcome = await durable.ceremonies.add(
        pending(app, user), verified(b"c"), new_id=MINT.id(), live=True, now=NOW
    )
    assert outcome == "no_user"


# -- users -----------------------------------------------------------------------------------------


async def test_many_at_once_make_one_user(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    second = pool(stores.database_url)
    await second.open()
    try:
        both = (durable, Durable(second))
        ids = await asyncio.gather(*(ensure(both[n % 2], app, "ann") for n in range(50)))
    finally:
        await second.close()
    assert len(set(ids)) == 1
    assert (await told(durable, app)).count(("user.created", "done", None)) == 1
    page, total = await durable.users.page(app.id, limit=10)
    assert ([u.id for u in page], total) == ([ids[0]], 1)


async def test_a_user_made_meanwhile_is_found(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """The race held open: another request has inserted the user and not committed yet."""
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        theirs = MINT.id()
        await session.execute(
            "INSERT INTO users (id, app_id, external_id, handle, status, created_at, updated_at)"
            " VALUES ($1, $2, 'ann', 'handle', 'pending', $3, $3)",
            theirs,
            app.id,
            NOW,
        )
        mine = asyncio.create_task(ensure(durable, app, "ann"))
        await blocked(stores, session)
        await change.commit()
    assert await mine == theirs
    assert ("user.created", "done", None) not in await told(durable, app)


STRANGE = (
    "ann",
    "Ann",
    "ANN",
    "ann ",
    " ann",
    "ann\t",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "ﬀ",
    "ff",
    "<ne:ann>",
    "%",
    "_",
    "a%",
    "'; DROP TABLE users; --",
    '"',
    "\\",
    "$1",
    "🔑",
    "🔑\ufe0f",
    "\u0131",
    "i",
    "\u0130",
    "x" * 256,
    "🔑" * 256,
    "null",
    "\u200b",
    "\x7f",
)


async def test_external_ids_are_compared_byte_for_byte(durable: Durable, app: RelyingParty) -> None:
    ids = {external_id: await ensure(durable, app, external_id) for external_id in STRANGE}
    assert len(set(ids.values())) == len(STRANGE)
    for external_id, user_id in ids.items():
        assert await ensure(durable, app, external_id) == user_id
        user = await durable.users.find(app.id, external_id=external_id)
        assert user is not None
        assert (user.id, user.external_id) == (user_id, external_id)
        page, total = await durable.users.page(app.id, limit=5, external_id=external_id)
        assert ([u.id for u in page], total) == ([user_id], 1)
    for unknown in ("annn", "A%", "é ", "", "<ne:ben>"):
        assert await durable.users.find(app.id, external_id=unknown) is None
        assert await durable.users.page(app.id, limit=5, external_id=unknown) == ([], 0)


async def test_a_user_is_of_one_app(durable: Durable, app: RelyingParty) -> None:
    other = await new_app(durable)
    mine, theirs = await ensure(durable, app, "ann"), await ensure(durable, other, "ann")
    assert mine != theirs
    assert await durable.users.find(app.id, user_id=theirs) is None
    assert (await durable.users.page(app.id, limit=9, user_id=theirs))[1] == 0
    await add(durable, other, theirs)
    assert await durable.credentials.of_user(app.id, theirs) == []
    assert await durable.credentials.revoke(app.id, theirs, None, NOW) == []
    found = await durable.ceremonies.allowed(app.id, "ann")
    assert found is not None
    assert found.allowed == [], "the other app's passkey signs nobody in here"


async def test_pages_of_users(durable: Durable, app: RelyingParty) -> None:
    names = [f"user-{n}" for n in range(7)]
    ids = [
        await ensure(durable, app, name, NOW + timedelta(seconds=n // 2))
        for n, name in enumerate(names)
    ]
    await add(durable, app, ids[2], now=LATER)

    async def listed(**query: Any) -> tuple[list[str], int]:
        users, total = await durable.users.page(app.id, **{"limit": 100, **query})
        return [u.id for u in users], total

    by_creation = [
        i for _, i in sorted((NOW + timedelta(seconds=n // 2), user) for n, user in enumerate(ids))
    ]
    assert await listed() == (by_creation, 7)
    assert await listed(order="-created_at") == (by_creation[::-1], 7)
    assert await listed(order="id") == (sorted(ids), 7)
    assert await listed(order="-id") == (sorted(ids, reverse=True), 7)
    assert (await listed(order="updated_at"))[0][-1] == ids[2]
    assert (await listed(order="-updated_at"))[0][0] == ids[2]
    assert await listed(limit=3, offset=2) == (by_creation[2:5], 7)
    assert await listed(limit=3, offset=6) == (by_creation[6:], 7)
    assert await listed(limit=3, offset=99) == ([], 7)
    assert await listed(status="active") == ([ids[2]], 1)
    assert (await listed(status="pending"))[1] == 6
    assert await listed(created_before=NOW + timedelta(seconds=1)) == (sorted(ids[:2]), 2)
    assert await listed(created_before=NOW) == ([], 0)
    assert await listed(user_id=ids[3], external_id=names[3]) == ([ids[3]], 1)
    assert await listed(user_id=ids[3], external_id=names[4]) == ([], 0)


async def test_a_user_becomes_active_with_the_first_live_passkey(
    durable: Durable, app: RelyingParty
) -> None:
    user_id = await ensure(durable, app, "ann")

    async def status() -> tuple[str, bool]:
        user, able = (
            await durable.users.find(app.id, user_id=user_id),
            await durable.ceremonies.allowed(app.id, "ann"),
        )
        assert user is not None
        assert able is not None
        return user.status, bool(able.allowed)

    assert await status() == ("pending", False)
    waiting = await add(durable, app, user_id, b"1", live=False)
    assert await status() == ("pending", False)
    assert await durable.ceremonies.confirm(app.id, waiting.id, 0, LATER)
    assert await status() == ("active", True)
    assert await durable.credentials.revoke(app.id, user_id, None, LATER) == [waiting.id]
    assert await status() == ("active", False)
    assert await durable.ceremonies.allowed(app.id, "nobody") is None


async def test_of_a_deleted_user_events_keep_our_ids_alone(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """Kind, time and our ids stay. Nothing that a caller or the user chose is in any column of any
    table.
    """
    external_id, chosen = "trace-" + MINT.id(), "ann-" + MINT.id()
    token = CONTEXT.set(Context(chosen, "key:k"))
    try:
        user_id = await ensure(durable, app, external_id)
        handle = (
            await durable.users.ensure(app.id, external_id, new_id="", new_handle="", now=NOW)
        )[1]
        key = await add(durable, app, user_id)
        approval = Approval("payment-" + chosen, "data-" + chosen, b"")
        assert await durable.approvals.add(app.id, user_id, approval, new_id=MINT.id(), now=NOW)
        await durable.ceremonies.use(key, signed_in(), epoch=0, flag_counter=False, now=LATER)
        refusal: dict[str, Any] = {
            "result": "refused",
            "user_id": user_id,
            "passkey_id": key.id,
            "now": LATER,
        }
        payload = {"chosen": chosen}
        await durable.events.add(
            app.id, "passkey.used", reason="origin", payload=payload, **refusal
        )
        other = await ensure(durable, app, "other")
    finally:
        CONTEXT.reset(token)
    assert set(await found_in(stores, user_id)) == {"users", "credentials", "events", "approvals"}
    before = await durable.events.newest(app.id, limit=100)
    assert await durable.users.delete(app.id, external_id, LATER)
    assert not await durable.users.delete(app.id, external_id, LATER)
    # A ceremony that was under way when the user was deleted is refused afterwards, and tells of
    # it.
    await durable.events.add(
        app.id, "passkey.registered", reason="no_user", payload=payload, **refusal
    )
    for trace in (external_id, handle, approval.identifier, approval.data):
        assert await found_in(stores, trace) == {}
    assert await found_in(stores, chosen) == {"events": 1}, "another user's, of the same request"
    after = await durable.events.newest(app.id, limit=100)
    assert after[: len(before)] == [
        replace(e, request_id="", payload=None) if e.user_id == user_id else e for e in before
    ]
    assert [(e.action, e.user_id, e.reason) for e in after[len(before) :]] == [
        ("user.deleted", user_id, None),
        ("passkey.registered", None, "no_user"),
    ]
    assert await found_in(stores, user_id) == {"events": 5}
    assert await durable.users.find(app.id, user_id=other) is not None


async def test_every_column_of_events_is_ours_or_erased(stores: EmbeddedStores) -> None:
    """A column that is added has to be put into one of these, and into the erasure."""
    ours = {"id", "at", "app_id", "actor", "action", "user_id", "passkey_id", "result", "reason"}
    erased = set(re.findall(r"(\w+) = (?:''|NULL)", ERASE))
    async with session_of(stores) as session:
        rows = await session.fetch(
            "SELECT column_name FROM information_schema.columns"
            " WHERE table_schema = 'public' AND table_name = 'events'"
        )
    assert {row["column_name"] for row in rows} == ours | erased
    assert erased == {"request_id", "payload", "address", "user_agent"}


async def found_in(stores: EmbeddedStores, text: str) -> dict[str, int]:
    """In how many rows of which tables the text occurs, in any column."""
    async with session_of(stores) as session:
        tables = [
            r["relname"]
            for r in await session.fetch(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
                " AND relkind IN ('r', 'p') AND NOT relispartition"
            )
        ]
        assert {"relying_parties", "api_keys", "users", "credentials", "events"} <= set(tables)
        counts = {
            table: await session.fetchval(
                f"SELECT count(*) FROM {table} t WHERE position($1 IN t::text) > 0", text
            )
            for table in tables
        }
    return {table: count for table, count in counts.items() if count}


async def blocked(
    stores: EmbeddedStores, holder: asyncpg.Connection[asyncpg.Record], times: int = 1
) -> None:
    """Return when that many sessions wait for a lock that `holder` has, also behind each other."""
    deadline = time.monotonic() + 30
    async with session_of(stores) as session:
        waiting = (
            "WITH RECURSIVE waiting AS ("
            " SELECT pid FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid)) UNION"
            " SELECT a.pid FROM pg_stat_activity a JOIN waiting w"
            " ON w.pid = ANY (pg_blocking_pids(a.pid))) SELECT count(*) FROM waiting"
        )
        while await session.fetchval(waiting, holder.get_server_pid()) < times:
            assert time.monotonic() < deadline, "nobody waits for the lock"
            await asyncio.sleep(0.01)  # between two looks


# -- credentials -----------------------------------------------------------------------------------


async def test_a_credential_comes_back_as_it_was(durable: Durable, app: RelyingParty) -> None:
    user_id, credential_id = await ensure(durable, app, "Ann"), bytes(range(256)) * 3 + b"\0" * 255
    answer = verified(
        credential_id,
        sign_count=2**32 - 1,
        attachment=None,
        transports=(),
        attestation_format="packed",
        attestation_trust="verified",
        algorithm=-257,
    )
    outcome = await durable.ceremonies.add(
        pending(app, user_id, entity=UserEntity("h" * 43, "🔒", "🔑", "🗝")),
        answer,
        new_id="i" * 24,
        live=False,
        now=NOW,
    )
    assert outcome == "added"
    owned = await durable.credentials.find(app.id, credential_id=credential_id)
    assert owned is not None
    assert owned.external_id == "Ann"
    assert owned.credential == Credential(
        id="i" * 24,
        app_id=app.id,
        user_id=user_id,
        credential_id=credential_id,
        user_handle="h" * 43,
        public_key=answer.public_key,
        algorithm=-257,
        sign_count=2**32 - 1,
        backup_eligible=True,
        backed_up=False,
        transports=(),
        attachment=None,
        aaguid=answer.aaguid,
        attestation_format="packed",
        attestation_trust="verified",
        user_name="🔒",
        user_display_name="🔑",
        nickname="🗝",
        live=False,
        second_factor=False,
        confirmed_at=None,
        created_at=NOW,
        updated_at=NOW,
        last_used_at=None,
        use_count=0,
    )
    assert await durable.credentials.of_user(app.id, user_id) == [owned.credential]
    assert await durable.ceremonies.allowed(app.id, "Ann") == UserCredentials(
        user_id, 0, disabled=False, allowed=[]
    ), "it is not live"
    assert await durable.credentials.find(app.id, credential_id=credential_id[:-1]) is None
    outcome = await durable.ceremonies.add(
        pending(app, user_id),
        verified(b"at once"),
        new_id="j" * 24,
        live=True,
        confirmed=True,
        now=NOW,
    )
    assert outcome == "added"
    owned = await durable.credentials.find(app.id, credential_id=b"at once")
    assert owned is not None
    assert (owned.credential.live, owned.credential.confirmed_at) == (True, NOW)
    await durable.users.delete(app.id, "Ann", NOW)


async def test_a_credential_id_is_one_users_in_an_app(durable: Durable, app: RelyingParty) -> None:
    """A duplicate is refused alike for the owner and for another user; another app may have the
    same.
    """
    ann, ben, other = (
        await ensure(durable, app, "ann"),
        await ensure(durable, app, "ben"),
        await new_app(durable),
    )
    first = await add(durable, app, ann)
    for user_id in (ann, ben):
        outcome = await durable.ceremonies.add(
            pending(app, user_id),
            verified(b"credential", public_key=b"another"),
            new_id=MINT.id(),
            live=True,
            now=LATER,
        )
        assert outcome == "duplicate"
    assert await stored(durable, app) == first, "the one there is untouched"
    assert await durable.credentials.of_user(app.id, ben) == []
    await add(durable, other, await ensure(durable, other, "ann"))
    assert (await told(durable, app)).count(("passkey.registered", "done", None)) == 1
    user = await durable.users.find(app.id, user_id=ben)
    assert user is not None
    assert user.status == "pending"


async def test_one_of_many_adds_the_credential(durable: Durable, app: RelyingParty) -> None:
    users = [await ensure(durable, app, f"user-{n}") for n in range(5)]
    outcomes = await asyncio.gather(
        *(
            durable.ceremonies.add(
                pending(app, users[n % 5]),
                verified(b"credential"),
                new_id=MINT.id(),
                live=True,
                now=NOW,
            )
            for n in range(50)
        )
    )
    assert sorted(set(outcomes)) == ["added", "duplicate"]
    assert outcomes.count("added") == 1
    assert (await told(durable, app)).count(("passkey.registered", "done", None)) == 1


async def test_no_credential_without_its_user(durable: Durable, app: RelyingParty) -> None:
    other = await new_app(durable)
    for user_id in (MINT.id(), await ensure(durable, other, "ann")):
        outcome = await durable.ceremonies.add(
            pending(app, user_id), verified(b"c"), new_id=MINT.id(), live=True, now=NOW
        )
        assert outcome == "no_user"
    assert await durable.credentials.find(app.id, credential_id=b"c") is None


@pytest.mark.parametrize("commits", [True, False])
async def test_a_user_deleted_meanwhile_gets_no_credential(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores, commits: bool
) -> None:
    """The race held open: the user's deletion is under way when the credential is added."""
    user_id = await ensure(durable, app, "ann")
    async with session_of(stores) as session:
        change = session.transaction()
        await change.start()
        await session.execute("DELETE FROM users WHERE id = $1", user_id)
        adding = asyncio.create_task(
            durable.ceremonies.add(
                pending(app, user_id), verified(b"c"), new_id=MINT.id(), live=True, now=NOW
            )
        )
        await blocked(stores, session)
        await (change.commit() if commits else change.rollback())
    assert await adding == ("no_user" if commits else "added")
    assert (await durable.credentials.find(app.id, credential_id=b"c") is None) == commits
    assert (("passkey.registered", "done", None) in await told(durable, app)) != commits


USES = [
    # stored, answered, flagging, recorded, stored afterwards
    (0, 0, False, True, 0),
    (0, 5, False, True, 5),
    (5, 6, False, True, 6),
    (5, 5, False, False, 5),
    (5, 4, False, False, 5),
    (5, 0, False, False, 5),
    (2**32 - 2, 2**32 - 1, False, True, 2**32 - 1),
    (2**32 - 1, 0, False, False, 2**32 - 1),
    (0, 0, True, True, 0),
    (5, 5, True, True, 5),
    (5, 4, True, True, 5),
    (5, 0, True, True, 5),
    (5, 6, True, True, 6),
]


@pytest.mark.parametrize(("before", "answered", "flagging", "recorded", "after"), USES)
async def test_the_counter_rule(
    durable: Durable,
    app: RelyingParty,
    before: int,
    answered: int,
    flagging: bool,
    recorded: bool,
    after: int,
) -> None:
    """WebAuthn L3 §7.2, "If authData.signCount is nonzero or credentialRecord.signCount is
    nonzero".
    """
    user_id = await ensure(durable, app, "ann")
    key = await add(durable, app, user_id, sign_count=before)
    regressed = flagging and answered <= before and (answered, before) != (0, 0)
    verdict = signed_in(answered, counter_regressed=regressed)
    used = await durable.ceremonies.use(key, verdict, epoch=0, flag_counter=flagging, now=LATER)
    assert used == (SignInOutcome(regressed, not key.backed_up) if recorded else None)
    now = await stored(durable, app)
    if recorded:
        assert now == replace(
            key, sign_count=after, backed_up=True, last_used_at=LATER, updated_at=LATER, use_count=1
        )
        assert (await told(durable, app))[-1] == (
            "passkey.used",
            "done",
            "counter" if regressed else None,
        )
    else:
        assert now == key
        assert (await told(durable, app))[-1] == ("passkey.registered", "done", None)


async def test_the_database_judges_the_counter_and_not_what_was_read(
    durable: Durable, app: RelyingParty
) -> None:
    key = await add(durable, app, await ensure(durable, app, "ann"), sign_count=5)
    done = await asyncio.gather(
        *(
            durable.ceremonies.use(key, signed_in(6), epoch=0, flag_counter=False, now=LATER)
            for _ in range(20)
        )
    )
    assert done.count(None) == 19, "the same answer of a cloned authenticator counts once"
    assert (await stored(durable, app)).use_count == 1


async def test_of_two_clones_that_answer_at_once_one_is_told(
    durable: Durable, app: RelyingParty
) -> None:
    """The policy lets both in; the row as it is locked says which of them came second."""
    key = await add(durable, app, await ensure(durable, app, "ann"), sign_count=5)
    for answered in range(6, 16):
        both = (
            durable.ceremonies.use(key, signed_in(answered), epoch=0, flag_counter=True, now=LATER)
            for _ in range(2)
        )
        flagged = [
            used.counter_regressed for used in await asyncio.gather(*both) if used is not None
        ]
        assert sorted(flagged) == [False, True]
    assert (await told(durable, app)).count(("passkey.used", "done", "counter")) == 10


async def test_what_can_not_sign_in(durable: Durable, app: RelyingParty) -> None:
    user_id = await ensure(durable, app, "ann")
    waiting = await add(durable, app, user_id, b"waiting", live=False)
    assert not await durable.ceremonies.use(
        waiting, signed_in(), epoch=0, flag_counter=True, now=LATER
    )
    key = await add(durable, app, user_id)
    other = await new_app(durable)
    assert not await durable.ceremonies.use(
        replace(key, app_id=other.id), signed_in(), epoch=0, flag_counter=True, now=LATER
    )
    assert await durable.ceremonies.use(key, signed_in(), epoch=0, flag_counter=False, now=LATER)
    await durable.credentials.revoke(app.id, user_id, [key.id], LATER)
    assert not await durable.ceremonies.use(
        key, signed_in(), epoch=0, flag_counter=True, now=LATER
    ), "revoked"
    assert (await told(durable, app)).count(("passkey.used", "done", None)) == 1


async def test_a_redemption_confirms_once(durable: Durable, app: RelyingParty) -> None:
    user_id = await ensure(durable, app, "ann")
    key = await add(durable, app, user_id, live=False)
    other = await new_app(durable)
    assert not await durable.ceremonies.confirm(other.id, key.id, 0, LATER)
    assert not (await stored(durable, app)).live
    assert await durable.ceremonies.confirm(app.id, key.id, 0, LATER)
    confirmed = await stored(durable, app)
    assert confirmed == replace(key, live=True, confirmed_at=LATER, updated_at=LATER)
    assert await durable.ceremonies.confirm(app.id, key.id, 0, LATER + timedelta(hours=1))
    assert (await stored(durable, app)).confirmed_at == LATER, "the first one stands"
    await durable.credentials.revoke(app.id, user_id, [key.id], LATER)
    assert not await durable.ceremonies.confirm(app.id, key.id, 0, LATER), (
        "a revoked one does not come back"
    )
    assert await durable.credentials.find(app.id, credential_id=b"credential") is None


async def test_revoked_passkeys_still_count_as_logins(durable: Durable, app: RelyingParty) -> None:
    user_id = await ensure(durable, app, "ann")
    keys = [
        await add(durable, app, user_id, bytes([n]), now=NOW + timedelta(seconds=n))
        for n in range(3)
    ]
    for n, key in enumerate(keys):
        for _ in range(n + 1):
            await durable.ceremonies.use(
                key, signed_in(), epoch=0, flag_counter=False, now=LATER + timedelta(minutes=n)
            )

    async def logins() -> tuple[int, datetime | None, list[str]]:
        user = await durable.users.find(app.id, user_id=user_id)
        assert user is not None
        listed = (await durable.users.page(app.id, limit=1))[0][0]
        assert listed == user
        held = await durable.credentials.of_user(app.id, user_id)
        return user.login_count, user.last_login_at, [k.id for k in held]

    last = LATER + timedelta(minutes=2)
    assert await logins() == (6, last, [k.id for k in keys]), "oldest first"
    assert await durable.credentials.revoke(app.id, user_id, [keys[2].id], last) == [keys[2].id]
    assert await logins() == (6, last, [keys[0].id, keys[1].id])
    assert await durable.credentials.revoke(app.id, user_id, [keys[2].id], last) == []
    assert await durable.credentials.revoke(app.id, MINT.id(), [keys[1].id], last) == [], (
        "of another user"
    )
    assert sorted(await durable.credentials.revoke(app.id, user_id, None, last)) == sorted(
        [keys[0].id, keys[1].id]
    )
    assert await logins() == (6, last, [])
    assert (await told(durable, app)).count(("passkey.revoked", "done", None)) == 3


async def test_a_passkey_of_nobody_that_somebody_had_first_leaves_no_row(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """The look for the credential id finds none, for the other's is not committed yet; then the
    insert waits for it, and loses.
    """
    first = await add(durable, app, await ensure(durable, app, "ann"), b"first")
    other = await asyncpg.connect(stores.database_url)
    try:
        async with other.transaction():
            row = dict(
                await other.fetchrow("SELECT * FROM credentials WHERE id = $1", first.id) or {}
            )
            row |= {"id": MINT.id(), "credential_id": b"same"}
            places = ", ".join(f"${n + 1}" for n in range(len(row)))
            await other.execute(
                f"INSERT INTO credentials ({', '.join(row)}) VALUES ({places})", *row.values()
            )
            entity = UserEntity(MINT.user_handle(), "ann", "Ann", "Ann's key")
            made = pending(app, "", subject=Unowned(MINT.id()), entity=entity)
            adding = asyncio.create_task(
                durable.ceremonies.add(
                    made, verified(b"same"), new_id=MINT.id(), live=True, now=NOW
                )
            )
            waiting = (
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
            )
            async with asyncio.timeout(DEADLINE):
                while True:
                    if await other.fetchval(waiting):
                        break
                    await asyncio.sleep(0.005)  # between two looks
        assert await adding == "duplicate"
        users = await other.fetch("SELECT external_id FROM users WHERE app_id = $1", app.id)
        assert [user["external_id"] for user in users] == ["ann"]
    finally:
        await other.close()


async def test_parallel_revocations_lose_no_login(durable: Durable, app: RelyingParty) -> None:
    user_id = await ensure(durable, app, "ann")
    keys = [await add(durable, app, user_id, bytes([n])) for n in range(8)]
    for key in keys:
        await durable.ceremonies.use(key, signed_in(), epoch=0, flag_counter=False, now=LATER)
    gone = await asyncio.gather(
        *(
            durable.credentials.revoke(app.id, user_id, [key.id], LATER)
            for key in keys
            for _ in range(3)
        )
    )
    assert sorted(i for ids in gone for i in ids) == sorted(k.id for k in keys)
    user = await durable.users.find(app.id, user_id=user_id)
    assert user is not None
    assert user.login_count == 8


# -- events ----------------------------------------------------------------------------------------


async def test_an_event_says_who_and_what(durable: Durable, app: RelyingParty) -> None:
    token = CONTEXT.set(Context("request-1", "key:k", app.id))
    try:
        user_id = await ensure(durable, app, "ann")
        key = await add(durable, app, user_id)
        await durable.events.add(
            app.id,
            "passkey.used",
            result="refused",
            reason="origin",
            user_id=user_id,
            passkey_id=key.id,
            now=LATER,
        )
    finally:
        CONTEXT.reset(token)
    created, made, registered, refused = await durable.events.newest(app.id, limit=10)
    assert (created.action, created.actor, created.request_id) == ("app.created", "broker", "")
    assert (made.action, made.actor, made.request_id, made.user_id) == (
        "user.created",
        "key:k",
        "request-1",
        user_id,
    )
    assert (registered.passkey_id, registered.at) == (key.id, NOW)
    assert (refused.result, refused.reason, refused.user_id, refused.passkey_id, refused.at) == (
        "refused",
        "origin",
        user_id,
        key.id,
        LATER,
    )
    assert await durable.events.newest(app.id, limit=2) == [registered, refused], (
        "the newest, oldest first"
    )
    found, cursor = await durable.events.after(app.id, registered.id, limit=10)
    assert ([row.event for row in found], cursor) == ([refused], refused.id)


CHANGES: dict[str, Callable[[Durable, RelyingParty, Credential], Awaitable[object]]] = {
    "create_app": lambda d, a, c: new_app(d),
    "update_app": lambda d, a, c: d.apps.update(replace(a, name="Changed"), LATER),
    "create_key": lambda d, a, c: d.api_keys.create(
        ApiKey(MINT.id(), a.id, "h", "n", NOW, None), MINT.challenge()
    ),
    "ensure_user": lambda d, a, c: ensure(d, a, "new"),
    "add_credential": lambda d, a, c: add(d, a, c.user_id, b"new"),
    "use_credential": lambda d, a, c: d.ceremonies.use(
        c, signed_in(), epoch=0, flag_counter=False, now=LATER
    ),
    "confirm_credential": lambda d, a, c: d.ceremonies.confirm(a.id, c.id, 0, LATER),
    "revoke_credentials": lambda d, a, c: d.credentials.revoke(a.id, c.user_id, None, LATER),
    "delete_user": lambda d, a, c: d.users.delete(a.id, "ann", LATER),
    "delete_app": lambda d, a, c: d.apps.delete(a.id, LATER),
}
_TABLES = ("relying_parties", "api_keys", "users", "credentials", "events")


@pytest.fixture
async def no_events(own_database: str) -> AsyncIterator[Durable]:
    """A database of the test's own, and its store."""
    made = pool(own_database)
    await made.open()
    await made.migrate(NOW)
    yield Durable(made)
    await made.close()


@pytest.fixture
async def own_database(stores: EmbeddedStores) -> AsyncIterator[str]:
    """An empty database."""
    name = "test_" + MINT.id().lower()
    async with session_of(stores) as session:
        await session.execute(f"CREATE DATABASE {name}")
        yield stores.database_url.replace("/postgres?", f"/{name}?")
        await session.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_a_change_and_its_event_stand_or_fall_together(
    no_events: Durable, own_database: str
) -> None:
    durable, app = no_events, await new_app(no_events)
    key = await add(durable, app, await ensure(durable, app, "ann"))
    session = await asyncpg.connect(own_database)

    async def everything() -> list[list[asyncpg.Record]]:
        return [
            await session.fetch(f"SELECT t::text FROM {table} t ORDER BY 1") for table in _TABLES
        ]

    try:
        before = await everything()
        await session.execute("ALTER TABLE events ADD CONSTRAINT none CHECK (false) NOT VALID")
        for name, change in CHANGES.items():
            with pytest.raises(asyncpg.CheckViolationError):
                await change(durable, app, key)
            assert await everything() == before, name
        await session.execute("ALTER TABLE events DROP CONSTRAINT none")
        for name, change in CHANGES.items():
            newest = await session.fetchval("SELECT max(id) FROM events")
            await change(durable, app, key)
            told_now = await session.fetchval("SELECT count(*) FROM events WHERE id > $1", newest)
            assert told_now == (2 if name == "revoke_credentials" else 1), name
    finally:
        await session.close()


# -- plans -----------------------------------------------------------------------------------------


async def test_every_hot_statement_uses_an_index(
    no_events: Durable, own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of rows and fresh statistics, the planner's own choice. The statements are
    those that are sent.
    """
    durable, app = no_events, await new_app(no_events)
    user_id = await ensure(durable, app, "ann")
    key = await add(durable, app, user_id)
    sent: list[tuple[str, str, tuple[object, ...]]] = []
    session = await asyncpg.connect(own_database)
    await _init(session)
    try:
        await session.execute(
            """
            INSERT INTO relying_parties (id, name, rp_id, origins, created_at, updated_at)
            SELECT 'app' || n, 'x', 'x.example', '{}', now(), now() FROM generate_series(1, 500) n;
            INSERT INTO api_keys (id, app_id, hash, hint, name, created_at)
            SELECT 'key' || n, 'app' || (1 + n % 500), sha256(n::text::bytea), '', '', now()
            FROM generate_series(1, 3000) n;
            INSERT INTO users (id, app_id, external_id, handle, status, created_at, updated_at)
            SELECT 'user' || n, 'app' || (1 + n % 20), 'e' || n, 'h' || n, 'active', now(), now()
            FROM generate_series(1, 10000) n;
            INSERT INTO credentials
            SELECT 'c' || n, 'app' || (1 + n % 20), 'user' || n, sha256(n::text::bytea), 'h' || n,
                '\\x00', -7, 0, true, true, '{}', NULL, '', 'none', 'none', '', '', '', true, NULL,
                now(), now(), NULL, 0
            FROM generate_series(1, 10000) n;
            INSERT INTO events (at, app_id, actor, action, user_id, result, request_id)
            SELECT now(), 'app' || (1 + n % 20), 'a', 'x', 'user' || n, 'done', ''
            FROM generate_series(1, 10000) n;
            ANALYZE
            """
        )
        postgres = durable.users._pg
        run_row, run_rows = postgres.row, postgres.rows

        async def row(operation: str, sql: str, *values: object, **how: Any) -> Any:
            sent.append((operation, sql, values))
            return await run_row(operation, sql, *values, **how)

        async def rows(operation: str, sql: str, *values: object, **how: Any) -> Any:
            sent.append((operation, sql, values))
            return await run_rows(operation, sql, *values, **how)

        monkeypatch.setattr(postgres, "row", row)
        monkeypatch.setattr(postgres, "rows", rows)
        await durable.apps.find(app.id)
        await durable.api_keys.find(b"x" * 32)
        await ensure(durable, app, "ann")
        await durable.ceremonies.allowed(app.id, "ann")
        await durable.users.find(app.id, user_id=user_id)
        await durable.users.find(app.id, external_id="ann")
        await durable.users.page(app.id, limit=1, external_id="ann")
        await durable.credentials.of_user(app.id, user_id)
        await durable.credentials.find(app.id, credential_id=b"credential")
        await add(durable, app, user_id, b"second")
        await durable.ceremonies.use(key, signed_in(), epoch=0, flag_counter=False, now=NOW)
        await durable.ceremonies.confirm(app.id, key.id, 0, NOW)
        await durable.events.add(
            app.id, "x", result="refused", reason="r", user_id=user_id, passkey_id=key.id, now=NOW
        )
        await durable.api_keys.of_app(app.id)
        await durable.events.newest(app.id, limit=10)
        await durable.credentials.revoke(app.id, user_id, [key.id], NOW)
        await durable.users.delete(app.id, "ann", NOW)
        assert len({operation for operation, _, _ in sent}) >= 14
        for mode in ("force_custom_plan", "force_generic_plan"):
            await session.execute(f"SET plan_cache_mode = {mode}")
            for operation, sql, values in sent:
                plan = await session.fetch(f"EXPLAIN {sql}", *values)
                text = "\n".join(line[0] for line in plan)
                empty = r"events_(default|\d{4}_\d\d)"  # months to come
                read = re.search(rf"Seq Scan on (?!{empty})", text)
                assert read is None, f"{operation}, {mode}:\n{text}"
    finally:
        await session.close()


# -- limits and faults -----------------------------------------------------------------------------


@pytest.mark.parametrize("silent_after", range(6))
async def test_a_server_that_falls_silent_is_unavailable_in_time(
    stores: EmbeddedStores, silent_after: int
) -> None:
    """After any number of messages: before the start-up's answer, before the first statement's,
    before the second's.
    """
    async with postgres_proxy(lambda: connect_postgres(stores)) as proxy:
        made = pool(proxy.url, timeout=1.0, connections=2)
        await made.open()
        proxy.silent_after = silent_after
        with Waited() as waited:
            results: list[Any] = await asyncio.wait_for(
                asyncio.gather(
                    *(made.row("test", "SELECT WHERE false") for _ in range(12)),
                    return_exceptions=True,
                ),
                DEADLINE,
            )
        assert waited.seconds <= 4.0, "they wait side by side"
        faults = [r for r in results if r is not None]
        assert len(faults) >= (12 if silent_after < 2 else 1)
        assert {(type(f), f.reason) for f in faults} == {(Unavailable, "postgres")}
        proxy.recover()
        again = (made.row("test", "SELECT WHERE false") for _ in range(12))
        assert await asyncio.gather(*again) == [None] * 12
        assert proxy.connections <= 2
        await made.close()


@pytest.mark.parametrize(("left", "limit"), [(None, 0.5), (0.1, 0.1), (0.0, 0.0)])
async def test_a_statement_ends_in_time_on_both_sides(
    stores: EmbeddedStores, left: float | None, limit: float
) -> None:
    """A row that another session holds: the caller is answered in time, and no session stays behind
    to wait for it.
    """
    made = pool(stores.database_url, timeout=0.5 if left is None else 3, connections=4)
    await made.open()
    durable = Durable(made)
    app = await new_app(durable)
    try:
        async with session_of(stores) as session:
            change = session.transaction()
            await change.start()
            await session.execute("SELECT FROM relying_parties WHERE id = $1 FOR UPDATE", app.id)
            for _ in range(5):
                deadline = None if left is None else time.monotonic() + left
                token = CONTEXT.set(Context("", "browser", deadline=deadline))
                began = time.monotonic()
                try:
                    with Waited() as waited:
                        results: list[Any] = await asyncio.gather(
                            *(durable.apps.update(app, LATER) for _ in range(4)),
                            return_exceptions=True,
                        )
                finally:
                    CONTEXT.reset(token)
                assert time.monotonic() - began >= limit - 0.02
                assert waited.seconds <= limit + 1.0
                assert {(type(r), r.reason) for r in results} == {(Unavailable, "postgres")}
            left_behind = (
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock'"
                " AND position('UPDATE relying_parties' in query) > 0"
            )
            deadline = time.monotonic() + DEADLINE
            while await session.fetchval(left_behind):
                assert time.monotonic() < deadline, "sessions of callers long answered still wait"
                await asyncio.sleep(0.02)  # between two looks
            await change.rollback()
        read = await durable.apps.find(
            app.id
        )  # a statement whose caller was answered may still have come to its end
        assert read is not None
        assert await durable.apps.update(read, LATER)
    finally:
        await made.close()


async def test_cancelled_anywhere_the_pool_stays_whole(stores: EmbeddedStores) -> None:
    """Cancel after each number of turns of the event loop; then every connection answers its own
    caller.
    """
    made = pool(stores.database_url, connections=3)
    await made.open()

    async def echo(number: int) -> Any:
        row = await made.row("test", "SELECT $1::int", number)
        return row and row[0]

    try:
        for turns in range(40):
            tasks = [asyncio.create_task(echo(number)) for number in range(6)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await asyncio.gather(*map(echo, range(6))) == list(range(6)), turns
    finally:
        await made.close()


async def test_a_defect_of_ours_stays_an_exception_and_harms_nobody(postgres: Postgres) -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await postgres.row("test", "SELEC 1")
    row = await postgres.row("test", "SELECT 1 AS one")
    assert row is not None
    assert row["one"] == 1


async def test_a_read_only_server_is_not_ready(own_database: str) -> None:
    made = pool(own_database)
    await made.open()
    try:
        await made.migrate(NOW)
        durable = Durable(made)
        app = await new_app(durable)
        await made.check()
        session = await asyncpg.connect(own_database)
        name = await session.fetchval("SELECT current_database()")
        await session.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await session.close()
        fresh = pool(own_database)
        await fresh.open()
        for run in (fresh.check, lambda: ensure(Durable(fresh), app, "ann")):
            with pytest.raises(Unavailable) as fault:
                await run()
            assert fault.value.reason == "postgres"
        assert await Durable(fresh).apps.find(app.id) == app, "what needs no write goes on"
        await fresh.close()
    finally:
        await made.close()


async def test_the_secrets_of_tokens_are_nowhere(durable: Durable, stores: EmbeddedStores) -> None:
    """Promise 3: no API key is at rest, only its digest and four characters to recognise it by."""
    app, secret = relying_party(), MINT.token("key")
    key = ApiKey(MINT.id(), app.id, secret[:8] + "…", "first", NOW, None)
    await durable.apps.create(app, key, key_digest(secret))
    assert await found_in(stores, key.hint) == {"api_keys": 1}
    assert await found_in(stores, secret[4:]) == {}
    assert await found_in(stores, secret[8:]) == {}


async def test_idle_connections_that_died_silently_fail_one_statement(
    stores: EmbeddedStores,
) -> None:
    """What is sent on them is lost, as behind a firewall that has forgotten them; new ones work."""
    async with postgres_proxy(lambda: connect_postgres(stores)) as proxy:
        made = pool(proxy.url, timeout=0.8, connections=8)
        await made.open()
        durable = Durable(made)
        await asyncio.gather(
            *(made.row("test", "SELECT pg_sleep(0.2)") for _ in range(8))  # all at once
        )
        assert proxy.connections == 8
        proxy.forget()
        began, failed = time.monotonic(), 0
        for _ in range(20):
            try:
                await durable.apps.find(MINT.id())
            except Unavailable:
                failed += 1
        assert failed == 1
        assert time.monotonic() - began < 2.0
        await made.close()


async def test_locked_rows_of_one_app_starve_no_other(
    durable: Durable, app: RelyingParty, stores: EmbeddedStores
) -> None:
    """More sign-ins wait for their rows than the pool has connections."""
    made = pool(stores.database_url, timeout=3.0, connections=4)
    await made.open()
    busy = Durable(made)
    other = await new_app(durable)
    users = [await ensure(durable, app, f"user-{n}") for n in range(8)]
    keys = [await add(durable, app, user, b"%d" % n) for n, user in enumerate(users)]
    theirs = await add(durable, other, await ensure(durable, other, "ann"))
    try:
        async with session_of(stores) as session:
            async with session.transaction():
                await session.execute(
                    "SELECT FROM credentials WHERE app_id = $1 FOR UPDATE", app.id
                )
                waiting = [
                    asyncio.ensure_future(
                        busy.ceremonies.use(
                            key, signed_in(), epoch=0, flag_counter=False, now=LATER
                        )
                    )
                    for key in keys
                ]
                await blocked(stores, session)
                await asyncio.sleep(0.2)  # for the others to wait, too
                async with asyncio.timeout(1.0):
                    assert await busy.apps.find(other.id) is not None
                    assert await busy.ceremonies.use(
                        theirs, signed_in(), epoch=0, flag_counter=False, now=LATER
                    )
                assert not any(task.done() for task in waiting)
            assert None not in await asyncio.gather(*waiting)
    finally:
        await made.close()
