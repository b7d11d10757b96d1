"""The contract of the ephemeral store, on everything that can be had: fakeredis, Valkey, a Redis
Cluster, and the machine's own Redis.

Servers here are the test's own, so a test may look at every key there is.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from broker.dialects import openers
from broker.ephemeral import Answer, Ephemeral, Taken, Unknown, one_time_scripts, stores
from broker.ephemeral.transport import ByClient, Commands, Script
from broker.errors import TooManyRequests, Unavailable
from broker.model import (
    ANYONE,
    AllowedCredential,
    BegunCeremony,
    CeremonyOptions,
    FinishKind,
    Named,
    Opener,
    Pending,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    Receipt,
    Redeemable,
    Transaction,
    Unowned,
    UserEntity,
    Verifications,
    base64url,
    finish_kind,
    finish_kind_of,
    purpose_of,
)
from broker.telemetry import CONTEXT, Context, Log, Metrics
from broker.tokens import SystemMint, ceremony_digest, digest
from tests.conftest import Clock
from tests.support.fake_redis import fake_client
from tests.support.proxy import Fate, RedisProxy, of_command, redis_proxy
from tests.support.servers import Cluster, Valkey, eventually, reached
from tests.support.waited import Waited

APP = "AppAppAppAppAppAppAppApp"
OTHER = "OtherOtherOtherOtherOthe"
TIMEOUT = 3.0  # what is not about limits shall not meet one on a busy machine
REAL = ("valkey", "cluster", *(["redis"] if shutil.which("redis-server") else []))
MINT = SystemMint()
REGISTER: tuple[Opener, Purpose] = ("page", "register")
SIGN_IN: tuple[Opener, Purpose] = ("page", "authenticate")
SCRIPTS = [s for s in (vars(one_time_scripts) | vars(stores)).values() if isinstance(s, Script)]


@dataclass(slots=True)
class Place:
    """A store to test: makes clients of it, each an instance of the broker's, and shows its
    keys.
    """

    kind: str
    server: Valkey | Cluster | None
    clock: Clock = field(default_factory=Clock)
    metrics: Metrics = field(default_factory=Metrics)
    stream: io.StringIO = field(default_factory=io.StringIO)
    made: list[Ephemeral] = field(default_factory=list)
    fake: fakeredis.FakeServer = field(default_factory=fakeredis.FakeServer)

    def store(
        self,
        *,
        timeout: float = TIMEOUT,
        through: RedisProxy | None = None,
    ) -> Ephemeral:
        """Another instance's store; `through` a proxy where one is given."""
        client: Commands
        if self.server is None:
            client = ByClient(fake_client(self.fake))
        else:
            client = self.server.commands(timeout=timeout, through=through)
        store = Ephemeral(
            client,
            timeout=timeout,
            metrics=self.metrics,
            log=self.log,
            clock=self.clock,
            openers=openers(),
        )
        self.made.append(store)
        return store

    @property
    def log(self) -> Log:
        return Log(self.stream)

    def client(self) -> Any:
        """A plain client that sees every key."""
        return self.server.client() if self.server else fakeredis.FakeRedis(server=self.fake)

    def connections(self) -> int:
        """How many connections the servers have, ours and those of a cluster's nodes among them."""
        assert self.server is not None
        nodes = self.server.nodes if isinstance(self.server, Cluster) else [self.server]
        return sum(int(node.ask("INFO", "clients").split(b":")[1].split()[0]) for node in nodes)

    def failures(self, operation: str) -> float:
        """What an operator sees of failed waits."""
        labels = {"store": "redis", "operation": operation}
        return self.metrics.registry.get_sample_value("broker_store_failures_total", labels) or 0.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Valkey]]:
    """Started when first asked for."""
    made: dict[str, Valkey] = {}

    class Lazily(dict[str, Valkey]):
        def __missing__(self, kind: str) -> Valkey:
            binary = Path(shutil.which("redis-server") or "") if kind == "redis" else None
            self[kind] = made[kind] = Valkey.start(tmp_path_factory.mktemp(kind), binary=binary)
            return made[kind]

    yield Lazily()
    for server in made.values():
        server.stop()


async def _place(
    kind: str, servers: dict[str, Valkey], request: pytest.FixtureRequest
) -> AsyncIterator[Place]:
    server = request.getfixturevalue("cluster") if kind == "cluster" else None
    made = Place(kind, server if kind in ("fakeredis", "cluster") else servers[kind])
    with made.client() as client:
        client.flushall()
    yield made
    for store in made.made:
        await store.close()


@pytest.fixture(params=("fakeredis", *REAL))
async def place(request: pytest.FixtureRequest, servers: dict[str, Valkey]) -> AsyncIterator[Place]:
    """Every kind of store."""
    async for made in _place(request.param, servers, request):
        yield made


@pytest.fixture(params=REAL)
async def real(request: pytest.FixtureRequest, servers: dict[str, Valkey]) -> AsyncIterator[Place]:
    """Every kind of store that is a server: for what concerns connections."""
    async for made in _place(request.param, servers, request):
        yield made


@pytest.fixture
async def single(
    request: pytest.FixtureRequest, servers: dict[str, Valkey]
) -> AsyncIterator[Place]:
    """One Valkey."""
    async for made in _place("valkey", servers, request):
        yield made


@pytest.fixture
async def proxy(real: Place) -> AsyncIterator[RedisProxy]:
    """A proxy in front of the server, or of each node of the cluster."""
    assert real.server is not None
    async with redis_proxy(*real.server.doors) as made:
        yield made
        made.release.set()


# -- values ----------------------------------------------------------------------------------------

STRANGE = "Åsa\u0301 \u202e<ne:x> 'quoted\" %s 🔑 " + "\N{GREEK SMALL LETTER ALPHA}" * 200


OPTIONS = CeremonyOptions(
    user_verification="discouraged",
    life=12.5,
    exclude=("a" * 24,),
    allow=(),
    second_factor=True,
    unowned=True,
    mediation="conditional",
)

ENTITY = UserEntity(MINT.user_handle(), STRANGE, STRANGE + "!", "")


def transaction(place: Place, **changes: Any) -> Transaction:
    ends = place.clock() + 600
    made = Transaction(
        APP,
        "register",
        Named(MINT.id(), STRANGE, 7),
        ENTITY,
        (),
        OPTIONS,
        ends,
    )
    return made._replace(**changes)


def registration(place: Place, **changes: Any) -> PendingRegistration:
    now = place.clock()
    made = PendingRegistration(
        app_id=APP,
        challenge=bytes(range(32)),
        transaction=None,
        subject=Named(MINT.id(), STRANGE, 7),
        entity=ENTITY,
        options=CeremonyOptions(),
        user_verification="preferred",
        algorithms=(-7, -8),
        begun_at=now,
        expires_at=now + 300,
    )
    return made._replace(**changes)


def authentication(place: Place, name: bytes | None, **changes: Any) -> PendingAuthentication:
    now = place.clock()
    made = PendingAuthentication(
        app_id=APP,
        challenge=b"\xff" * 32,
        transaction=name,
        subject=Named(MINT.id(), STRANGE, 7) if name else ANYONE,
        offered=(),
        allowed=("a", "b") if name else (),
        approval=STRANGE,
        options=OPTIONS,
        user_verification="required",
        begun_at=now,
        expires_at=now + 300,
    )
    return made._replace(**changes)


def offered(user_id: str, credential_id: bytes) -> AllowedCredential:
    return AllowedCredential(
        id=MINT.id(),
        credential_id=credential_id,
        transports=("usb", "nfc"),
        user_handle=MINT.user_handle(),
        public_key=bytes(range(77)),
        algorithm=-257,
        sign_count=2**32 - 1,
        backup_eligible=True,
        backed_up=False,
        attestation_trust="verified",
        aaguid="00000000-0000-0000-0000-000000000000",
        user_id=user_id,
        app_id=APP,
    )


def redeemable(place: Place, **changes: Any) -> Redeemable:
    now = place.clock()
    receipt = Receipt(
        subject=Named(MINT.id(), STRANGE, 7),
        purpose="authenticate",
        passkey_id=MINT.id(),
        credential_id=bytes(range(256)) * 3 + b"\0",
        origin="https://example.org",
        user_present=True,
        user_verified=True,
        backup_eligible=False,
        backed_up=False,
        backup_changed=True,
        counter_regressed=True,
        attestation="claimed",
        authenticator_name_claimed=None,
        second_factor=True,
        approval=STRANGE,
        at=now,
    )
    return Redeemable(receipt, b"\0" * 32, now + 60)._replace(**changes)


# -- the stores, by what a token finds -------------------------------------------------------------


def value_of(answer: Answer[Any]) -> Any:
    """What was taken, or None."""
    return answer.value if isinstance(answer, Taken) else None


def put_transaction(store: Ephemeral, token: str, made: Transaction) -> Awaitable[None]:
    return store.transactions.put(token, made)


async def peek_transaction(
    store: Ephemeral, app_id: str, token: str
) -> tuple[bytes, Transaction] | None:
    name = digest("transaction", app_id, token)
    found = await store.transactions.peek(name)
    return None if isinstance(found, Unknown) else (name, found)


async def take_transaction(store: Ephemeral, name: bytes) -> bool:
    return isinstance(await store.transactions.take(name), Taken)


async def begin(
    store: Ephemeral,
    app_id: str,
    token: str,
    opener: Opener,
    purpose: Purpose,
    secret: str,
    made: BegunCeremony,
) -> tuple[str, bytes, Transaction] | None:
    """Handle (one that finds nothing, where nothing was put), name and transaction."""
    name = digest("transaction", app_id, token)
    kinds = (purpose, finish_kind(purpose, second_factor=True))
    found = await store.ceremonies.begin(app_id, name, opener, kinds, secret, made)
    if isinstance(found, Unknown):
        return (secret + base64url(name), name, found.value) if found.value else None
    return found[0], name, found[1]


def put_pending(
    store: Ephemeral, handle: str, pending: Pending, *, opener: Opener, cap: int
) -> Awaitable[None]:
    return store.ceremonies.put("handle", handle, pending, opener=opener, cap=cap)


def put_pending_of(
    store: Ephemeral, external_id: str, pending: Pending, *, opener: Opener
) -> Awaitable[None]:
    return store.ceremonies.put("user", external_id, pending, opener=opener)


def put_pending_by_challenge(
    store: Ephemeral, pending: Pending, *, opener: Opener, cap: int | None
) -> Awaitable[None]:
    challenge = base64url(pending.challenge)
    return store.ceremonies.put("challenge", challenge, pending, opener=opener, cap=cap)


async def take_pending(
    store: Ephemeral, app_id: str, handle: str, opener: Opener, purpose: Purpose
) -> Pending | None:
    made = value_of(await store.ceremonies.take("handle", app_id, handle, (opener,), purpose))
    assert made is None or isinstance(made, Pending)
    return made


async def take_pending_of(
    store: Ephemeral, app_id: str, external_id: str, opener: Opener, purpose: Purpose
) -> Pending | None:
    made = value_of(await store.ceremonies.take("user", app_id, external_id, (opener,), purpose))
    assert made is None or isinstance(made, Pending)
    return made


async def take_pending_by_challenge(
    store: Ephemeral, app_id: str, challenge: bytes, openers: tuple[Opener, ...], kind: FinishKind
) -> Pending | None:
    token = base64url(challenge)
    made = value_of(await store.ceremonies.take("challenge", app_id, token, openers, kind))
    assert made is None or isinstance(made, Pending)
    return made


def put_nonce(store: Ephemeral, app_id: str, nonce: str, made: Redeemable) -> Awaitable[None]:
    return store.nonces.put(app_id, nonce, made)


async def take_nonce(store: Ephemeral, app_id: str, nonce: str) -> Redeemable | None:
    made = value_of(await store.nonces.take(app_id, nonce))
    assert made is None or isinstance(made, Redeemable)
    return made


async def open_one(store: Ephemeral, place: Place, **changes: Any) -> tuple[str, bytes]:
    """A transaction's id and the digest of it."""
    made = MINT.token("transaction")
    await put_transaction(store, made, transaction(place, **changes))
    return made, digest("transaction", APP, made)


def beginning(place: Place, **changes: Any) -> BegunCeremony:
    made = BegunCeremony(
        bytes(range(32)),
        place.clock(),
        300,
        Verifications("preferred", "discouraged", True),
        (-7, -8),
    )
    return made._replace(**changes)


async def begin_one(
    store: Ephemeral, place: Place, token: str, secret: str = "", **changes: Any
) -> str:
    """The handle of a registration begun with a transaction."""
    begun = await begin(
        store,
        APP,
        token,
        "page",
        "register",
        secret or MINT.token("handle"),
        beginning(place, **changes),
    )
    assert begun is not None
    return begun[0]


async def put_open(store: Ephemeral, place: Place, *, cap: int = 9, **changes: Any) -> str:
    """The handle of a ceremony without a transaction."""
    handle = MINT.token("handle")
    await put_pending(store, handle, authentication(place, None, **changes), opener="page", cap=cap)
    return handle


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"subject": Unowned("u" * 24), "options": CeremonyOptions()},
        {"purpose": "authenticate", "subject": ANYONE, "entity": None},
        {"purpose": "authenticate", "entity": None},
    ],
)
async def test_a_transaction_comes_back_as_it_was(place: Place, changes: dict[str, Any]) -> None:
    store, token, put = place.store(), MINT.token("transaction"), transaction(place, **changes)
    if put.purpose == "authenticate" and isinstance(put.subject, Named):
        user_id = put.subject.user_id
        known = offered(user_id, b"\xff")._replace(aaguid="ea9b8d66-4d01-1d21-3ce4-b6b48cb575d4")
        put = put._replace(offered=(offered(user_id, b"\0" * 32), known))
    await put_transaction(store, token, put)
    name = digest("transaction", APP, token)
    assert await peek_transaction(store, APP, token) == (name, put)
    assert await peek_transaction(store, APP, token) == (name, put), "peek leaves it where it is"
    assert await take_transaction(store, name)
    assert not await take_transaction(store, name)
    assert await peek_transaction(store, APP, token) is None


@pytest.mark.parametrize("purpose", ["register", "authenticate"])
@pytest.mark.parametrize("allowed", [None, (), ("x" * 24,) * 300])
async def test_a_begun_ceremony_comes_back_with_its_transaction(
    place: Place, purpose: Purpose, allowed: tuple[str, ...] | None
) -> None:
    store, token = place.store(), MINT.token("transaction")
    put = transaction(place, purpose=purpose)
    if purpose == "authenticate":
        held = (
            (offered("u" * 24, b"\0" * 32), offered("u" * 24, b"\xff")) if allowed is None else ()
        )
        put = put._replace(entity=None, offered=held)
    await put_transaction(store, token, put)
    made = beginning(place, allowed=allowed, challenge=b"\xff" * 31 + b"+")
    begun = await begin(store, APP, token, "page", purpose, MINT.token("handle"), made)
    assert begun is not None
    handle, name, found = begun
    assert (name, found) == (digest("transaction", APP, token), put)
    taken = await take_pending(store, APP, handle, "page", purpose)
    assert taken == made.pending(name, put)
    assert await take_pending(store, APP, handle, "page", purpose) is None
    assert await peek_transaction(store, APP, token) == (name, put), "the transaction stays"


def test_a_begun_ceremony_is_what_transaction_and_policy_make_of_it(place: Place) -> None:
    """Ends with the earliest of three; asks for user verification as the policy did when it
    began.
    """
    begun = beginning(place)
    now, name = begun.begun_at, b"t" * 32
    opened = transaction(place, purpose="authenticate", offered=(offered("u" * 24, b"1"),))
    made = begun.pending(name, opened)
    assert isinstance(made, PendingAuthentication)
    assert made.allowed == (opened.offered[0].id,)
    assert made.offered == opened.offered
    assert made.expires_at == now + 12.5, "what was asked"
    assert made.user_verification == "discouraged", "of second factors, and weaker is allowed"
    plain = opened._replace(options=CeremonyOptions(), expires_at=now + 100)
    made = begun.pending(name, plain)
    assert (made.expires_at, made.user_verification) == (now + 100, "preferred")
    made = begun.pending(name, plain._replace(expires_at=now + 600))
    assert made.expires_at == now + 300, "the policy's life"


async def test_a_begin_leaves_a_transaction_of_another_purpose_as_it_was(place: Place) -> None:
    """So a page that knows the id can't end the right page's ceremony by asking for the wrong
    kind.
    """
    store = place.store()
    token, _ = await open_one(store, place)
    handle = await begin_one(store, place, token)
    found = await begin(
        store, APP, token, "page", "authenticate", MINT.token("handle"), beginning(place)
    )
    assert found is not None
    assert found[2].purpose == "register", "the caller sees which it is"
    assert await take_pending(store, APP, found[0], *SIGN_IN) is None
    assert await take_pending(store, APP, handle, *REGISTER) is not None


async def test_a_begin_waits_until_it_is_known_who_may_answer(place: Place) -> None:
    """A look-up that finds nobody must leave the earlier ceremony alone."""
    store = place.store()
    token, _ = await open_one(store, place, purpose="authenticate", subject=ANYONE)
    known = beginning(place, allowed=("x" * 24,))
    first = await begin(store, APP, token, "page", "authenticate", MINT.token("handle"), known)
    assert first is not None
    second = await begin(
        store, APP, token, "page", "authenticate", MINT.token("handle"), beginning(place)
    )
    assert second is not None
    assert second[2].to_look_up
    assert await take_pending(store, APP, second[0], *SIGN_IN) is None
    assert await take_pending(store, APP, first[0], *SIGN_IN) is not None


async def test_nothing_begins_without_its_transaction(place: Place) -> None:
    store = place.store()
    token, name = await open_one(store, place)
    assert (
        await begin(store, OTHER, token, "page", "register", MINT.token("handle"), beginning(place))
        is None
    )
    handle = await begin_one(store, place, token)
    assert await take_transaction(store, name)
    assert await take_pending(store, APP, handle, *REGISTER) is None
    assert (
        await begin(store, APP, token, "page", "register", MINT.token("handle"), beginning(place))
        is None
    )


PENDING: dict[str, Callable[[Place], Pending]] = {
    "registration": lambda place: registration(place),
    "authentication": lambda place: authentication(
        place, None, subject=Named("u" * 24, STRANGE, 7), allowed=("x" * 24,)
    ),
    "offered": lambda place: authentication(
        place,
        None,
        subject=Named("u" * 24, STRANGE, 7),
        allowed=("a", "b"),
        offered=(offered("u" * 24, b"1"),),
    ),
    "hundreds": lambda place: authentication(place, None, allowed=("x" * 24,) * 300),
    "discoverable": lambda place: authentication(place, None),
}


@pytest.mark.parametrize("kind", PENDING)
async def test_a_pending_ceremony_comes_back_as_it_was(place: Place, kind: str) -> None:
    store, put, handle = place.store(), PENDING[kind](place), MINT.token("handle")
    await put_pending(store, handle, put, opener="page", cap=10)
    assert await take_pending(store, APP, handle, "page", purpose_of(put)) == put
    assert await take_pending(store, APP, handle, "page", purpose_of(put)) is None


@pytest.mark.parametrize("cap", [None, 10])
@pytest.mark.parametrize("kind", ["registration", "authentication"])
async def test_a_challenge_finds_its_ceremony_and_stands_nowhere(
    place: Place, kind: str, cap: int | None
) -> None:
    """Whoever has the challenge may make an answer to it, so it is as secret at rest as a
    handle.
    """
    store, put = place.store(), NAMED[kind](place)
    wanted: tuple[tuple[Opener, ...], FinishKind] = (("keyed", "hanko"), finish_kind_of(put))
    await put_pending_by_challenge(store, put, opener="hanko", cap=cap)
    with place.client() as client:
        (key,) = client.keys("p:*")
        stored = key + client.get(key)
    assert put.challenge not in stored
    assert base64url(put.challenge).encode() not in stored
    assert await take_pending_by_challenge(store, OTHER, put.challenge, *wanted) is None
    assert await take_pending_by_challenge(store, APP, put.challenge[:-1] + b"?", *wanted) is None
    assert await take_pending_by_challenge(store, APP, put.challenge, *wanted) == put
    assert await take_pending_by_challenge(store, APP, put.challenge, *wanted) is None


NAMED: dict[str, Callable[[Place], Pending]] = {
    "registration": lambda place: registration(place),
    "authentication": lambda place: authentication(
        place, None, subject=Named("u" * 24, STRANGE, 7), allowed=("x" * 24,)
    ),
}


@pytest.mark.parametrize("kind", NAMED)
async def test_a_pending_ceremony_under_a_name_comes_back_as_it_was(
    place: Place, kind: str
) -> None:
    store, put = place.store(), NAMED[kind](place)
    await put_pending_of(store, STRANGE, put, opener="keyed")
    assert await take_pending_of(store, OTHER, STRANGE, "keyed", purpose_of(put)) is None, (
        "another app's names are others"
    )
    assert await take_pending_of(store, APP, STRANGE + "!", "keyed", purpose_of(put)) is None
    assert await take_pending_of(store, APP, STRANGE, "keyed", purpose_of(put)) == put
    assert await take_pending_of(store, APP, STRANGE, "keyed", purpose_of(put)) is None
    with place.client() as client:
        assert client.keys() == []


@pytest.mark.parametrize("kind", NAMED)
async def test_a_put_under_a_name_replaces_what_was_there(place: Place, kind: str) -> None:
    store, put = place.store(), NAMED[kind](place)
    await put_pending_of(store, "ann", put, opener="keyed")
    second = put._replace(challenge=b"2" * 32)
    await put_pending_of(store, "ann", second, opener="keyed")
    with place.client() as client:
        (key,) = client.keys()
        assert b"ann" not in key
        assert 0 < client.pttl(key) <= 300_000
    assert await take_pending_of(store, APP, "ann", "keyed", purpose_of(put)) == second
    assert await take_pending_of(store, APP, "ann", "keyed", purpose_of(put)) is None


@pytest.mark.parametrize("kind", NAMED)
async def test_of_many_takers_of_a_name_one_gets_it(place: Place, kind: str) -> None:
    put = NAMED[kind](place)
    await put_pending_of(place.store(), "ann", put, opener="keyed")
    assert (
        len(
            await _parallel(
                place, lambda store: take_pending_of(store, APP, "ann", "keyed", purpose_of(put))
            )
        )
        == 1
    )


async def test_a_handle_made_up_from_a_name_takes_nothing(place: Place) -> None:
    """A page may know the user's id, and so the digest of the name; what a keyed caller begins is
    not for pages.
    """
    store, put = place.store(), NAMED["authentication"](place)
    await put_pending_of(store, "ann", put, opener="keyed")
    name = ceremony_digest("user", APP, "keyed", "authenticate", "ann")
    assert await take_pending(store, APP, MINT.token("handle") + base64url(name), *SIGN_IN) is None
    assert await take_pending_of(store, APP, "ann", "keyed", "authenticate") == put


async def test_a_ceremony_under_a_name_ends_by_the_brokers_clock(place: Place) -> None:
    store, put = place.store(), NAMED["registration"](place)
    await put_pending_of(store, "ann", put, opener="keyed")
    place.clock.ahead = 300 + 5
    assert await take_pending_of(store, APP, "ann", "keyed", purpose_of(put)) is None


@pytest.mark.parametrize("bound", [b"\0" * 32, None])
async def test_what_a_nonce_stands_for_comes_back_as_it_was(
    place: Place, bound: bytes | None
) -> None:
    store, nonce, put = place.store(), MINT.token("nonce"), redeemable(place, transaction=bound)
    named = put._replace(receipt=put.receipt._replace(authenticator_name_claimed="Ключ"))
    await put_nonce(store, APP, nonce, named)
    assert await take_nonce(store, APP, nonce) == named
    assert await take_nonce(store, APP, nonce) is None


async def test_a_record_of_newer_code_is_as_unknown(place: Place) -> None:
    store = place.store()
    token, _ = await open_one(store, place)
    nonce = MINT.token("nonce")
    await put_nonce(store, APP, nonce, redeemable(place))
    bound = await begin_one(store, place, token)
    free = await put_open(store, place)
    with place.client() as client:
        keys = [key for key in client.keys("*") if not key.startswith(b"d:")]
        assert len(keys) == 4
        for key in keys:
            client.set(key, b"\x7f" + client.get(key)[1:], px=800_000)
    assert await peek_transaction(store, APP, token) is None
    assert (
        await begin(store, APP, token, "page", "register", MINT.token("handle"), beginning(place))
        is None
    )
    assert await take_nonce(store, APP, nonce) is None
    assert await take_pending(store, APP, bound, *REGISTER) is None
    assert await take_pending(store, APP, free, *SIGN_IN) is None


# -- time ------------------------------------------------------------------------------------------


async def test_nothing_is_returned_past_its_end(place: Place) -> None:
    """Redis still holds it (its clock has not moved): as after a restored snapshot."""
    store = place.store()
    token, _ = await open_one(store, place)
    nonce = MINT.token("nonce")
    await put_nonce(store, APP, nonce, redeemable(place))
    bound = await begin_one(store, place, token)
    free = await put_open(store, place)
    place.clock.ahead = 600 + 5
    with place.client() as client:
        assert len(client.keys()) == 5
    assert await peek_transaction(store, APP, token) is None
    assert (
        await begin(store, APP, token, "page", "register", MINT.token("handle"), beginning(place))
        is None
    )
    assert await take_nonce(store, APP, nonce) is None
    assert await take_pending(store, APP, bound, *REGISTER) is None
    assert await take_pending(store, APP, free, *SIGN_IN) is None


async def test_every_key_ends_by_itself_and_holds_no_secret(place: Place) -> None:
    """Promise 3: from a dump of everything there is, nothing can be redeemed. And nothing stays for
    ever.
    """
    store = place.store()
    token, _ = await open_one(store, place)
    nonce, secrets = MINT.token("nonce"), [MINT.token("handle") for _ in range(2)]
    await put_nonce(store, APP, nonce, redeemable(place))
    bound = await begin_one(store, place, token, secrets[0])
    await put_pending(store, secrets[1], authentication(place, None), opener="page", cap=9)
    ends = {b":t": 600, b":c": 300, b"p:": 300, b"n:": 660, b"d:": 900}
    secret = [value.partition("_")[2].encode() for value in (token, nonce, *secrets)]
    assert bound.startswith(secrets[0])
    with place.client() as client:
        keys = client.keys("*")
        assert len(keys) == len(ends)
        for key in keys:
            left, end = client.pttl(key) / 1000, ends[key[-2:] if key[:1] == b"{" else key[:2]]
            assert 0 < left <= end, key
            assert left > end - 30, key
            value = b"".join(client.zrange(key, 0, -1)) if key[:1] == b"d" else client.get(key)
            dumped = client.dump(key) if place.server else b""
            for hidden in secret:
                assert hidden not in key + value + dumped


# -- whose it is -----------------------------------------------------------------------------------


async def test_a_begin_replaces_the_transactions_earlier_one(place: Place) -> None:
    store = place.store()
    token, _ = await open_one(store, place)
    first = await begin_one(store, place, token)
    second = await begin_one(store, place, token, challenge=b"2" * 32)
    assert await take_pending(store, APP, first, *REGISTER) is None
    taken = await take_pending(store, APP, second, *REGISTER)
    assert taken is not None
    assert taken.challenge == b"2" * 32


async def test_another_apps_values_are_unknown_and_stay(place: Place) -> None:
    store = place.store()
    token, name = await open_one(store, place)
    nonce = MINT.token("nonce")
    await put_nonce(store, APP, nonce, redeemable(place))
    bound = await begin_one(store, place, token)
    free = await put_open(store, place)
    assert await peek_transaction(store, OTHER, token) is None
    assert not await take_transaction(store, digest("transaction", OTHER, token))
    assert await take_nonce(store, OTHER, nonce) is None
    assert await take_pending(store, OTHER, bound, *REGISTER) is None
    assert await take_pending(store, OTHER, free, *SIGN_IN) is None

    assert await take_pending(store, APP, free, *SIGN_IN) is not None
    assert await take_pending(store, APP, bound, *REGISTER) is not None
    assert await take_nonce(store, APP, nonce) is not None
    assert await take_transaction(store, name)


async def test_a_value_of_another_kind_is_unknown_and_stays(place: Place) -> None:
    store = place.store()
    token, _ = await open_one(store, place)
    nonce = MINT.token("nonce")
    await put_nonce(store, APP, nonce, redeemable(place))
    assert await take_nonce(store, APP, token) is None
    assert await take_pending(store, APP, token, *REGISTER) is None
    assert await peek_transaction(store, APP, nonce) is None
    assert await take_pending(store, APP, nonce, *REGISTER) is None
    assert await take_nonce(store, APP, nonce) is not None
    assert await peek_transaction(store, APP, token) is not None


@pytest.mark.parametrize("end", [43, 44, 0])
async def test_a_forged_handle_spends_nothing(place: Place, end: int) -> None:
    """The transaction's digest stands in the handle, so whoever saw a handle knows it; it does not
    open the place.
    """
    store = place.store()
    token, name = await open_one(store, place)
    handle = await begin_one(store, place, token)
    forged = MINT.token("handle") + base64url(name)[:end]
    assert await take_pending(store, APP, forged, *REGISTER) is None
    assert await take_pending(store, APP, handle, *REGISTER) is not None


# -- at most once ----------------------------------------------------------------------------------


async def _parallel(place: Place, take: Callable[[Ephemeral], Awaitable[object]]) -> list[object]:
    """50 takes over five instances; the results that are something."""
    instances = [place.store() for _ in range(5)]
    await asyncio.gather(*(instance.check() for instance in instances))
    taken = await asyncio.gather(*(take(instances[n % 5]) for n in range(50)))
    return [value for value in taken if value not in (None, False)]


async def test_one_of_many_takes_a_transaction(place: Place) -> None:
    _, name = await open_one(place.store(), place)
    assert len(await _parallel(place, lambda store: take_transaction(store, name))) == 1


@pytest.mark.parametrize("kind", PENDING)
async def test_one_of_many_takes_a_pending_ceremony(place: Place, kind: str) -> None:
    handle = MINT.token("handle")
    put = PENDING[kind](place)
    await put_pending(place.store(), handle, put, opener="page", cap=5)
    taken = await _parallel(
        place, lambda store: take_pending(store, APP, handle, "page", purpose_of(put))
    )
    assert len(taken) == 1


async def test_one_of_many_takes_a_begun_ceremony(place: Place) -> None:
    token, name = await open_one(place.store(), place)
    handle = await begin_one(place.store(), place, token)
    assert (
        len(await _parallel(place, lambda store: take_pending(store, APP, handle, *REGISTER))) == 1
    )
    assert await take_transaction(place.store(), name), "the transaction stays"


async def test_of_a_begin_and_a_take_at_once_one_wins(place: Place) -> None:
    """Either the old handle takes its ceremony and the new one begins after that, or the old one
    finds nothing.
    """
    instances = [place.store() for _ in range(2)]
    for _ in range(25):
        token, _ = await open_one(instances[0], place)
        old = await begin_one(instances[0], place, token)
        taken, new = await asyncio.gather(
            take_pending(instances[0], APP, old, *REGISTER),
            begin_one(instances[1], place, token, challenge=b"2" * 32),
        )
        assert taken is None or taken.challenge == bytes(range(32))
        following = await take_pending(instances[0], APP, new, *REGISTER)
        assert following is not None
        assert following.challenge == b"2" * 32


async def test_one_of_many_takes_a_nonce(place: Place) -> None:
    nonce = MINT.token("nonce")
    await put_nonce(place.store(), APP, nonce, redeemable(place))
    assert len(await _parallel(place, lambda store: take_nonce(store, APP, nonce))) == 1


async def test_many_callers_wait_for_few_connections(real: Place) -> None:
    """A burst is slower than its parts, and no part of it fails."""
    store = real.store(timeout=10)
    nonces = [MINT.token("nonce") for _ in range(200)]
    await asyncio.gather(*(put_nonce(store, APP, nonce, redeemable(real)) for nonce in nonces))
    assert None not in await asyncio.gather(*(take_nonce(store, APP, nonce) for nonce in nonces))


# -- the cap ---------------------------------------------------------------------------------------


async def test_the_cap_counts_open_ceremonies_of_the_app(place: Place) -> None:
    store = place.store()
    handles = [await put_open(store, place, cap=3) for _ in range(3)]
    with pytest.raises(TooManyRequests) as refused:
        await put_open(store, place, cap=3)
    assert refused.value.reason == "discoverable_limit"
    with place.client() as client:
        assert len(client.keys("p:*")) == 3, "the refused one left nothing"

    assert await put_open(store, place, cap=1, app_id=OTHER), "each app has its own"
    token, _ = await open_one(store, place)
    assert await begin_one(store, place, token), "not counted with a transaction"

    assert await take_pending(store, APP, handles[1], *SIGN_IN)
    assert await put_open(store, place, cap=3), "a take frees one"
    with pytest.raises(TooManyRequests):
        await put_open(store, place, cap=3)
    place.clock.ahead = 301
    for _ in range(3):
        await put_open(store, place, cap=3)
    with pytest.raises(TooManyRequests):
        await put_open(store, place, cap=3)


async def test_the_count_lives_longer_than_the_longest_ceremony(place: Place) -> None:
    """A shorter one (the policy changed) must not end the count early. Within 10 minutes a
    begin learns how many were abandoned.
    """
    store, now = place.store(), place.clock()
    for life in (300, 600, 10):
        await put_open(store, place, expires_at=now + life)
    with place.client() as client:
        assert 1170 < client.pttl(b"d:{%s}" % APP.encode()) / 1000 <= 1200
    place.clock.ahead = 20
    await put_open(store, place, cap=3)
    with pytest.raises(TooManyRequests):
        await put_open(store, place, cap=3)


async def test_the_cap_is_exact_in_parallel(place: Place) -> None:
    instances = [place.store() for _ in range(4)]

    async def put(number: int) -> bool:
        try:
            await put_open(instances[number % 4], place, cap=20)
        except TooManyRequests:
            return False
        return True

    assert sum(await asyncio.gather(*(put(n) for n in range(50)))) == 20
    with place.client() as client:
        assert len(client.keys("p:*")) == client.zcard(b"d:{%s}" % APP.encode()) == 20


async def test_counting_takes_no_round_trip_of_its_own(proxy: RedisProxy, real: Place) -> None:
    assert real.server is not None
    store = real.store(through=proxy)
    await put_open(store, real)
    proxy.commands.clear()
    handle = await put_open(store, real)
    assert [words[0] for words in proxy.commands] == [b"EVALSHA"]
    await take_pending(store, APP, handle, *SIGN_IN)
    assert [words[0] for words in proxy.commands] == [b"EVALSHA"] * 2


# -- what a network can lose -----------------------------------------------------------------------

LOST = {Fate.SWALLOW: "swallowed", Fate.CUT: "cut"}


@pytest.fixture(params=LOST, ids=lambda fate: LOST[fate])
def fate(request: pytest.FixtureRequest) -> Fate:
    assert isinstance(request.param, Fate)
    return request.param


@dataclass(slots=True)
class Step:
    """A step of the store: the command it sends, its name in metrics, and what must be true after
    its reply was lost.
    """

    command: bytes
    operation: str
    run: Callable[[Ephemeral], Awaitable[object]]
    gone: Callable[[Ephemeral], Awaitable[object]] | None = None


def load_scripts(place: Place) -> None:
    """Every master has them: no reply is NOSCRIPT after that."""
    with place.client() as client:
        for script in SCRIPTS:
            client.script_load(script.text)


async def _steps(place: Place, store: Ephemeral) -> list[Step]:
    token, name = await open_one(store, place)
    nonce = MINT.token("nonce")
    await put_nonce(store, APP, nonce, redeemable(place))
    bound = await begin_one(store, place, token)
    free = await put_open(store, place)
    await put_pending_of(store, "ann", NAMED["registration"](place), opener="keyed")
    other, _ = await open_one(store, place)
    return [
        Step(
            b"SET",
            "put_pending",
            lambda s: put_pending_of(s, "bob", NAMED["registration"](place), opener="keyed"),
        ),
        Step(
            b"EVALSHA",
            "take_pending",
            lambda s: take_pending_of(s, APP, "ann", "keyed", "register"),
            lambda s: take_pending_of(s, APP, "ann", "keyed", "register"),
        ),
        Step(b"EVALSHA", "put_pending", lambda s: put_open(s, place)),
        Step(b"EVALSHA", "begin", lambda s: begin_one(s, place, other)),
        Step(
            b"SET", "put_nonce", lambda s: put_nonce(s, APP, MINT.token("nonce"), redeemable(place))
        ),
        Step(
            b"SET",
            "put_transaction",
            lambda s: put_transaction(s, MINT.token("transaction"), transaction(place)),
        ),
        Step(
            b"EVALSHA",
            "take_pending",
            lambda s: take_pending(s, APP, bound, *REGISTER),
            lambda s: take_pending(s, APP, bound, *REGISTER),
        ),
        Step(
            b"EVALSHA",
            "take_pending",
            lambda s: take_pending(s, APP, free, *SIGN_IN),
            lambda s: take_pending(s, APP, free, *SIGN_IN),
        ),
        Step(
            b"EVALSHA",
            "take_nonce",
            lambda s: take_nonce(s, APP, nonce),
            lambda s: take_nonce(s, APP, nonce),
        ),
        Step(
            b"EVALSHA",
            "take_transaction",
            lambda s: take_transaction(s, name),
            lambda s: take_transaction(s, name),
        ),
    ]


async def test_a_lost_reply_is_unavailable_and_nothing_is_sent_twice(
    proxy: RedisProxy, real: Place, fate: Fate
) -> None:
    # After each loss the topology of a cluster is read again, by way of six proxies in this loop.
    store = real.store(through=proxy, timeout=1.0 if real.kind == "cluster" else 0.4)
    load_scripts(real)
    for step in await _steps(real, store):
        before, failed = len(proxy.named(step.command)), real.failures(step.operation)
        proxy.fate = of_command(fate, step.command)
        with pytest.raises(Unavailable) as refused:
            await step.run(store)
        assert refused.value.reason == "redis"
        assert real.failures(step.operation) == failed + 1
        proxy.fate = of_command(Fate.PASS, b"")
        assert len(proxy.named(step.command)) == before + 1, step
        if step.gone is not None:
            assert not await step.gone(store), "it was taken; it never comes twice"


async def test_a_dead_connection_fails_all_who_wait(proxy: RedisProxy, real: Place) -> None:
    """Nobody is left waiting, no command is sent again, and the next caller has a connection."""
    load_scripts(real)
    store, nonces = real.store(through=proxy), [MINT.token("nonce") for _ in range(20)]
    await asyncio.gather(*(put_nonce(store, APP, nonce, redeemable(real)) for nonce in nonces))
    proxy.fate = of_command(Fate.CUT, b"EVALSHA")
    taken = await asyncio.gather(
        *(take_nonce(store, APP, nonce) for nonce in nonces), return_exceptions=True
    )
    assert {type(result) for result in taken} == {Unavailable}
    sent = [words[3] for words in proxy.named(b"EVALSHA")]
    assert len(sent) == len(set(sent)) > 0
    proxy.fate = of_command(Fate.PASS, b"")
    assert await take_nonce(store, APP, MINT.token("nonce")) is None


async def test_a_server_that_forgot_the_scripts_gets_them_again(place: Place) -> None:
    store = place.store()
    for _ in range(2):
        token, _ = await open_one(store, place)
        bound = await begin_one(store, place, token)
        free = await put_open(store, place)
        for handle, opened in ((bound, REGISTER), (free, SIGN_IN)):
            with place.client() as client:
                client.script_flush()
            assert await take_pending(store, APP, handle, *opened) is not None
        with place.client() as client:
            client.script_flush()


async def test_a_command_that_never_arrived_spends_nothing(proxy: RedisProxy, real: Place) -> None:
    load_scripts(real)
    store, nonce = real.store(through=proxy), MINT.token("nonce")
    await put_nonce(store, APP, nonce, redeemable(real))
    proxy.fate = of_command(Fate.REFUSE, b"EVALSHA")
    with pytest.raises(Unavailable):
        await take_nonce(store, APP, nonce)
    assert len(proxy.named(b"EVALSHA")) == 1
    proxy.fate = of_command(Fate.PASS, b"")
    assert await take_nonce(store, APP, nonce) is not None


async def test_a_cancelled_wait_leaves_no_answer_for_the_next(
    proxy: RedisProxy, real: Place
) -> None:
    """The next caller on the pool's only connection must get its own answer, not the one that came
    too late.
    """
    load_scripts(real)
    store = real.store(through=proxy)
    mine, theirs = MINT.token("nonce"), MINT.token("nonce")
    await put_nonce(store, APP, mine, redeemable(real, transaction=b"1" * 32))
    await put_nonce(store, APP, theirs, redeemable(real, transaction=b"2" * 32))
    proxy.fate = of_command(Fate.HOLD, b"EVALSHA")
    cancelled = asyncio.create_task(take_nonce(store, APP, mine))
    await proxy.held.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    proxy.fate = of_command(Fate.PASS, b"")
    following = asyncio.create_task(take_nonce(store, APP, theirs))
    proxy.release.set()
    taken = await following
    assert taken is not None
    assert taken.transaction == b"2" * 32
    assert await take_nonce(store, APP, mine) is None


async def test_a_connection_with_unread_bytes_is_not_used(single: Place) -> None:
    """An answer without a question on an idle connection is nobody's answer."""
    assert single.server is not None
    async with redis_proxy(*single.server.doors) as proxy:
        store, nonce = single.store(through=proxy), MINT.token("nonce")
        await put_nonce(store, APP, nonce, redeemable(single, transaction=b"2" * 32))
        other = MINT.token("nonce")
        await put_nonce(store, APP, other, redeemable(single, transaction=b"1" * 32))
        with single.client() as client:
            stale = client.get(b"n:" + digest("nonce", other))
        assert len(proxy.clients) == 1
        connection: Any = store._transport._commands
        stream = connection._stream
        await proxy.push(b"$%d\r\n%s\r\n" % (len(stale), stale))
        await eventually(lambda: stream.ended, "the bytes have arrived")
        taken = await take_nonce(store, APP, nonce)
        assert taken is not None
        assert taken.transaction == b"2" * 32
        await store.close()


async def test_cancelled_anywhere_the_pool_stays_whole(real: Place) -> None:
    """Cancel after each number of turns of the event loop; then every connection is still there and
    answers its own caller.
    """
    store = real.store()
    await store.check()
    for turns in range(40):
        nonces = [MINT.token("nonce") for _ in range(6)]
        await asyncio.gather(*(put_nonce(store, APP, nonce, redeemable(real)) for nonce in nonces))
        takes = [asyncio.create_task(take_nonce(store, APP, nonce)) for nonce in nonces]
        for _ in range(turns):
            await asyncio.sleep(0)
        for take in takes:
            take.cancel()
        await asyncio.gather(*takes, return_exceptions=True)
        bound = [bytes([number]) * 32 for number in range(6)]
        again = [MINT.token("nonce") for _ in bound]
        for nonce, name in zip(again, bound, strict=True):
            await put_nonce(store, APP, nonce, redeemable(real, transaction=name))
        taken = await asyncio.gather(*(take_nonce(store, APP, nonce) for nonce in again))
        assert [value and value.transaction for value in taken] == bound, turns


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "limit"), [(None, 0.4), (0.1, 0.1), (0.0, 0.0)])
async def test_a_wait_ends_in_time(
    proxy: RedisProxy, real: Place, left: float | None, limit: float
) -> None:
    """Within the store's limit, and within what is left of the request."""
    store = real.store(through=proxy, timeout=0.4 if left is None else 5)
    await reached(store.check)
    proxy.fate = lambda _: Fate.SWALLOW
    deadline = None if left is None else time.monotonic() + left
    token = CONTEXT.set(Context("", "browser", deadline=deadline))
    began = time.monotonic()
    try:
        with Waited() as waited, pytest.raises(Unavailable):
            await take_nonce(store, APP, MINT.token("nonce"))
    finally:
        CONTEXT.reset(token)
    assert time.monotonic() - began >= limit - 0.02
    assert waited.seconds <= limit + 1.0


async def test_a_waiting_queue_ends_in_time(proxy: RedisProxy, real: Place) -> None:
    store = real.store(through=proxy, timeout=1.0)
    await reached(store.check)
    proxy.fate = lambda _: Fate.SWALLOW
    with Waited() as waited:
        results = await asyncio.gather(
            *(take_nonce(store, APP, MINT.token("nonce")) for _ in range(50)),
            return_exceptions=True,
        )
    assert waited.seconds <= 4.0, "they wait side by side"
    assert {type(result) for result in results} == {Unavailable}
    proxy.fate = of_command(Fate.PASS, b"")
    await reached(store.check)
    assert (
        await asyncio.gather(*(take_nonce(store, APP, MINT.token("nonce")) for _ in range(4)))
        == [None] * 4
    )


async def test_a_wait_ends_also_where_the_loop_is_always_late(single: Place) -> None:
    """A busy process looks at the clock late, every time; a server that fell silent is found all
    the same.
    """
    assert single.server is not None
    async with redis_proxy(*single.server.doors) as proxy:
        store = single.store(through=proxy, timeout=1.0)
        await store.check()
        proxy.fate = lambda _: Fate.SWALLOW
        asked = asyncio.create_task(take_nonce(store, APP, MINT.token("nonce")))
        for _ in range(40):  # times 0.12 s, and the limit is 1 s
            if asked.done():
                break
            time.sleep(0.12)  # noqa: ASYNC251 - holds up the loop, for more than two ticks
            await asyncio.sleep(0)
        assert asked.done(), "the wait goes on"
        with pytest.raises(Unavailable):
            await asked
        await store.close()


async def test_connections_do_not_pile_up(proxy: RedisProxy, real: Place) -> None:
    before = real.connections()
    store = real.store(through=proxy, timeout=0.25)
    await reached(store.check)
    proxy.fate = lambda _: Fate.SWALLOW
    for _ in range(5):
        await asyncio.gather(*(store.check() for _ in range(12)), return_exceptions=True)
    proxy.fate = of_command(Fate.PASS, b"")
    await reached(store.check)
    masters = 3 if real.kind == "cluster" else 1
    await eventually(
        lambda: real.connections() <= before + masters, "one connection for each master"
    )


# -- a server in distress --------------------------------------------------------------------------


async def test_nobody_listens(tmp_path: Path) -> None:
    server = Valkey.start(tmp_path / "gone")
    server.stop()
    place = Place("gone", server)
    store = place.store()
    for run in (
        store.check,
        store.facts,
        lambda: take_nonce(store, APP, MINT.token("nonce")),
        lambda: take_pending(store, APP, MINT.token("handle"), *REGISTER),
        lambda: put_open(store, place),
    ):
        with pytest.raises(Unavailable) as refused:
            await run()
        assert refused.value.reason == "redis"
    server = Valkey.start(tmp_path / "again", port=server.port)
    try:
        await store.check()
        assert await take_nonce(store, APP, MINT.token("nonce")) is None
    finally:
        await store.close()
        server.stop()


@pytest.mark.parametrize("trouble", ["full", "replica"])
async def test_a_server_that_takes_no_writes_is_unavailable(tmp_path: Path, trouble: str) -> None:
    """Also by `check`: a store that can't be written to serves nobody."""
    server = Valkey.start(tmp_path / "valkey")
    place = Place("valkey", server)
    store = place.store()
    try:
        nonce = MINT.token("nonce")
        await put_nonce(store, APP, nonce, redeemable(place))
        await store.check()
        with server.client() as client:
            if trouble == "full":
                client.config_set("maxmemory", 1)
            else:
                client.replicaof("127.0.0.1", "1")
            for run in (
                store.check,
                lambda: put_nonce(store, APP, MINT.token("nonce"), redeemable(place)),
                lambda: put_open(store, place),
            ):
                with pytest.raises(Unavailable) as refused:
                    await run()
                assert refused.value.reason == "redis"
            if trouble == "full":
                assert await take_nonce(store, APP, nonce) is not None, "what is there can be taken"
                client.config_set("maxmemory", 0)
            else:
                client.replicaof("NO", "ONE")
            await store.check()
            assert all(client.pttl(key) > 0 for key in client.keys("*"))
    finally:
        await store.close()
        server.stop()


async def test_facts_for_the_operator(real: Place) -> None:
    facts = await real.store().facts()
    assert facts.eviction == "noeviction"
    assert abs(facts.ahead) < 60
    assert int(facts.version.split(".")[0]) >= 7
    assert facts.term_readable
    assert facts.settings["enable-debug-command"] == ["no"]
    assert facts.replicas == (real.kind == "cluster")
