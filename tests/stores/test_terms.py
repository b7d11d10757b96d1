"""At most once, whatever breaks: 40 one-time values of all kinds, the faults of replication and
persistence, and each value taken at most once.

Each test runs the fault with real servers. A take after the fault gets `term_over`, so it finds the
value and refuses it: without the comparison of terms the value would be taken a second time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broker.ephemeral import TERM_OVER, Answer, Ephemeral, Replayed, Taken, Unknown
from broker.ephemeral.connection import term_of
from broker.model import FinishKind, Pending, base64url, finish_kind_of
from broker.tokens import FoundBy
from tests.core.test_mailbox import DIGITS, SECRET, code
from tests.stores.test_ephemeral import (
    APP,
    MINT,
    Place,
    authentication,
    begin_one,
    beginning,
    open_one,
    put_open,
    put_pending_by_challenge,
    put_pending_of,
    redeemable,
    registration,
)
from tests.support.processes import until
from tests.support.servers import Valkey, reached

EACH = 5  # values of each of the eight kinds
ALL = 40


class Value(NamedTuple):
    """A one-time value that was put, and its take."""

    kind: str
    take: Callable[[Ephemeral], Awaitable[Answer[Any]]]


async def put_values(place: Place, store: Ephemeral) -> list[Value]:
    """Put 40 values."""
    values = []
    for _ in range(EACH):
        _, name = await open_one(store, place)
        values.append(Value("transaction", partial(take_transaction, name)))
        token, _ = await open_one(store, place)
        handle = await begin_one(store, place, token)
        values.append(Value("begun", partial(take_pending, "handle", handle, "register")))
        handle = await put_open(store, place, cap=100)
        values.append(Value("handle", partial(take_pending, "handle", handle, "authenticate")))
        challenge, user = MINT.challenge(), MINT.id()
        pending = authentication(place, None, challenge=challenge)
        await put_pending_by_challenge(store, pending, opener="page", cap=None)
        kind = finish_kind_of(pending)
        take = partial(take_pending, "challenge", base64url(challenge), kind)
        values.append(Value("challenge", take))
        await put_pending_of(store, user, registration(place), opener="page")
        values.append(Value("user", partial(take_pending, "user", user, "register")))
        nonce, ticket = MINT.token("nonce"), MINT.token("ticket")
        await store.nonces.put(APP, nonce, redeemable(place))
        values.append(Value("nonce", partial(take_nonce, nonce)))
        await store.tickets.put(APP, ticket, [], place.clock() + 60)
        values.append(Value("ticket", partial(take_ticket, ticket)))
        mail = code(place)
        await store.mail_codes.put(mail, SECRET, DIGITS, counted=False, replace_others=False)
        values.append(Value("mail_code", partial(judge, mail.id)))
    assert len(values) == ALL
    return values


def take_pending(
    by: FoundBy, token: str, kind: FinishKind, store: Ephemeral
) -> Awaitable[Answer[Pending]]:
    return store.ceremonies.take(by, APP, token, ("page",), kind)


def take_transaction(name: bytes, store: Ephemeral) -> Awaitable[Answer[Any]]:
    return store.transactions.take(name)


def take_nonce(nonce: str, store: Ephemeral) -> Awaitable[Answer[Any]]:
    return store.nonces.take(APP, nonce)


def take_ticket(ticket: str, store: Ephemeral) -> Awaitable[Answer[Any]]:
    return store.tickets.take(APP, ticket)


async def judge(code_id: str, store: Ephemeral) -> Answer[Any]:
    verdict, found = await store.mail_codes.judge(APP, code_id, SECRET, DIGITS)
    if verdict == "right":
        return Taken(found)
    return Unknown("term_over" if verdict == "term_over" else "wrong")


class Takes:
    """Takes of all values, and how often each was taken."""

    def __init__(self, values: list[Value]) -> None:
        self.values = values
        self.taken = [0] * ALL

    async def __call__(self, store: Ephemeral) -> list[str]:
        """Take all. The answers, one of each sort: "taken", "replayed" or the reason."""
        answers = await asyncio.gather(*(value.take(store) for value in self.values))
        for number, answer in enumerate(answers):
            self.taken[number] += isinstance(answer, Taken)
        assert max(self.taken) <= 1, "taken twice: " + ", ".join(
            sorted({v.kind for v, n in zip(self.values, self.taken, strict=True) if n > 1})
        )
        return sorted(
            {a.reason if isinstance(a, Unknown) else type(a).__name__.lower() for a in answers}
        )


class Pair:
    """A primary and its replica."""

    def __init__(self, home: Path) -> None:
        words = ("--repl-diskless-sync-delay", "0")
        self.primary = Place("valkey", Valkey.start(home / "primary", *words))
        self.replica = Place("valkey", Valkey.start(home / "replica", *words))
        self.places = [self.primary, self.replica]

    def follow(self, place: Place, other: Place) -> None:
        """Make a server the replica of another one, and wait until it has all of it."""
        server(place).ask("REPLICAOF", "127.0.0.1", server(other).port)
        until(partial(self.level, place, other), "the replica is level")

    def level(self, replica: Place, primary: Place) -> bool:
        """True if the replica has executed all that the primary has."""
        ours, theirs = replication(replica), replication(primary)
        return (
            ours.get("master_link_status") == "up"
            and ours["slave_repl_offset"] == theirs["master_repl_offset"]
        )

    def cut(self, place: Place) -> None:
        """End the replica's link: it keeps what it has, and stays a replica."""
        server(place).ask("REPLICAOF", "127.0.0.1", 1)


def server(place: Place) -> Valkey:
    assert isinstance(place.server, Valkey)
    return place.server


def replication(place: Place) -> dict[str, str]:
    lines = server(place).ask("INFO", "replication").decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def term(place: Place) -> bytes:
    return term_of(server(place).ask("INFO", "replication"))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for place in made.places:
        for store in place.made:
            await store.close()
        server(place).stop()


@pytest.fixture
async def takes(pair: Pair) -> Takes:
    """Takes of values that the primary and its replica have."""
    pair.follow(pair.replica, pair.primary)
    values = await put_values(pair.primary, pair.primary.store())
    until(partial(pair.level, pair.replica, pair.primary), "the values are replicated")
    return Takes(values)


async def test_failover_to_a_lagging_replica(pair: Pair, takes: Takes) -> None:
    pair.cut(pair.replica)
    assert await takes(pair.primary.store()) == ["taken"]
    server(pair.primary).stop()
    server(pair.replica).ask("REPLICAOF", "NO", "ONE")
    assert await takes(pair.replica.store()) == ["term_over"]


async def test_fail_back(pair: Pair, takes: Takes) -> None:
    """The first primary is demoted, copies what its replica had, and is promoted again: one
    process, one connection of the broker's.
    """
    store, before = pair.primary.store(), server(pair.primary).ask("INFO", "server")
    server(pair.replica).ask("REPLICAOF", "NO", "ONE")
    assert await takes(store) == ["taken"]
    pair.follow(pair.primary, pair.replica)
    server(pair.primary).ask("REPLICAOF", "NO", "ONE")
    assert await takes(store) == ["term_over"]
    run = [line for line in before.splitlines() if line.startswith(b"run_id")]
    assert run[0] in server(pair.primary).ask("INFO", "server")


async def test_split_brain(pair: Pair, takes: Takes) -> None:
    server(pair.replica).ask("REPLICAOF", "NO", "ONE")
    stores = [place.store() for place in (pair.primary, pair.replica)]
    assert await asyncio.gather(*map(takes, stores)) == [["taken"], ["term_over"]]


async def test_a_replica_that_takes_writes(pair: Pair, takes: Takes) -> None:
    server(pair.replica).ask("CONFIG", "SET", "replica-read-only", "no")
    assert await takes(pair.replica.store()) == ["term_over"]
    assert await takes(pair.primary.store()) == ["taken"]


async def test_restart_from_an_old_snapshot(pair: Pair, tmp_path: Path) -> None:
    first = pair.primary.store()
    takes = Takes(await put_values(pair.primary, first))
    server(pair.primary).ask("SAVE")
    assert await takes(first) == ["taken"]
    old = server(pair.primary)
    old.stop()
    again = Valkey.start(tmp_path / "primary", port=old.port)
    pair.primary.server = again
    assert again.ask("DBSIZE") >= ALL
    assert await takes(pair.primary.store()) == ["term_over"]


async def test_the_first_replica_that_attaches_begins_a_term(pair: Pair) -> None:
    """Also for a store that knows the earlier term: its next values live."""
    store = pair.primary.store()
    takes = Takes(await put_values(pair.primary, store))
    pair.follow(pair.replica, pair.primary)
    assert await takes(store) == ["term_over"]
    fresh = Takes(await put_values(pair.primary, store))
    until(partial(pair.level, pair.replica, pair.primary), "the values are replicated")
    pair.cut(pair.replica)
    assert await fresh(store) == ["taken"]
    server(pair.replica).ask("REPLICAOF", "NO", "ONE")
    assert await fresh(pair.replica.store()) == ["term_over"]


async def test_a_freed_backlog_begins_a_term(pair: Pair, takes: Takes) -> None:
    before = term(pair.primary)
    server(pair.primary).ask("CONFIG", "SET", "repl-backlog-ttl", "1")
    pair.cut(pair.replica)
    until(lambda: term(pair.primary) != before, "the backlog is freed")
    assert await takes(pair.primary.store()) == ["term_over"]
    server(pair.replica).ask("REPLICAOF", "NO", "ONE")
    assert await takes(pair.replica.store()) == ["term_over"]


async def test_a_stale_stamp_kills_the_value(pair: Pair) -> None:
    """A store that still knows the earlier term stamps a value with it: no take gets it. The
    refused take has the store read the term.
    """
    store = pair.primary.store()
    await put_values(pair.primary, store)
    pair.follow(pair.replica, pair.primary)
    nonce = MINT.token("nonce")
    connection: Any = store._transport._commands
    connection._stream.term_until += 600.0
    await store.nonces.put(APP, nonce, redeemable(pair.primary))
    assert await store.nonces.take(APP, nonce) == TERM_OVER
    await store.nonces.put(APP, nonce, redeemable(pair.primary))
    assert isinstance(await store.nonces.take(APP, nonce), Taken)


async def test_a_store_that_takes_nothing_learns_of_a_term_too(pair: Pair) -> None:
    """A process that only puts meets no refused take: it reads the term again by itself."""
    store, taker = pair.primary.store(), pair.primary.store()
    await store.nonces.put(APP, MINT.token("nonce"), redeemable(pair.primary))
    pair.follow(pair.replica, pair.primary)
    connection: Any = store._transport._commands
    connection._stream.term_until = 0.0  # a second is over
    nonce = MINT.token("nonce")
    await store.nonces.put(APP, nonce, redeemable(pair.primary))
    assert isinstance(await taker.nonces.take(APP, nonce), Taken)


async def test_changes_of_the_term_are_counted(pair: Pair, tmp_path: Path) -> None:
    """Also those that a new connection meets. The first term is no change."""
    store = pair.primary.store()
    assert await changes_after_a_put(pair.primary, store) == 0
    pair.follow(pair.replica, pair.primary)
    assert await changes_after_a_put(pair.primary, store) == 1
    assert await changes_after_a_put(pair.primary, store) == 1
    old = server(pair.primary)
    old.stop()
    pair.primary.server = Valkey.start(tmp_path / "primary", port=old.port)
    assert await changes_after_a_put(pair.primary, store) == 2


async def changes_after_a_put(place: Place, store: Ephemeral) -> float | None:
    """The metric after a put that reads the term."""
    store._transport.forget_terms()
    nonce = MINT.token("nonce")
    await reached(lambda: store.nonces.put(APP, nonce, redeemable(place)))
    return place.metrics.registry.get_sample_value("broker_redis_term_changes_total")


async def test_a_tombstone_of_another_term_is_believed(pair: Pair) -> None:
    pair.follow(pair.replica, pair.primary)
    nonce, store = MINT.token("nonce"), pair.primary.store()
    await store.nonces.put(APP, nonce, redeemable(pair.primary))
    assert isinstance(await store.nonces.take(APP, nonce), Taken)
    until(partial(pair.level, pair.replica, pair.primary), "the tombstone is replicated")
    server(pair.replica).ask("REPLICAOF", "NO", "ONE")
    assert isinstance(await pair.replica.store().nonces.take(APP, nonce), Replayed)


async def test_a_begin_and_a_peek_refuse_a_transaction_of_another_term(pair: Pair) -> None:
    """So a person fails before the authenticator is asked."""
    store = pair.primary.store()
    _, name = await open_one(store, pair.primary)
    pair.follow(pair.replica, pair.primary)
    assert await store.transactions.peek(name) == TERM_OVER
    begun, secret = beginning(pair.primary), MINT.token("handle")
    found = await store.ceremonies.begin(APP, name, "page", ("register",), secret, begun)
    assert found == TERM_OVER
