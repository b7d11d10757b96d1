"""Key sets on a real PostgreSQL: the first key, rotation as verifiers live through it, what is at
rest, and other secrets.

Most tests use apps of their own; the broker's own set is shared by all tests of a worker, sealed
under the tests' secret.
"""

from __future__ import annotations

import asyncio
import random
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast, get_args

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker import dialects
from broker.app import Parts, assemble
from broker.cli import serving
from broker.cli.doctor import secret_key
from broker.dialects.declaration import Dialect, WireFormat
from broker.dialects.flex import routes as flex
from broker.directory import Directory
from broker.durable import Postgres, instant
from broker.durable.signing_keys import SigningKeys, StoredKey
from broker.embedded import EmbeddedStores
from broker.errors import InvalidSetting, Unavailable, UnknownApp
from broker.model import Caller, RelyingParty, TokenAlgorithm
from broker.settings import TOKEN_LIFE_LIMIT, SettingsFault
from broker.signing import JWKS_MAX_AGE, PUBLISHED_AHEAD, SKEW, Signing
from broker.telemetry import Log
from broker.tokens import SystemMint
from broker.tokens.signed import PrivateKey, Seal
from broker.web import SIGNING, json_answer, public_app
from tests.conftest import SECRET_KEY, Clock, Starter, settings_for
from tests.support import jws
from tests.support.servers import session_of
from tests.support.wire import ORIGIN, RP_ID

OTHER = "another-secret-0123456789abcdefghij"
ALGORITHMS: tuple[TokenAlgorithm, ...] = get_args(TokenAlgorithm)
CLAIMS = {"sub": "ann", "aud": ["example.org"]}


@dataclass(slots=True)
class Instance:
    """What a broker process has of it: verbs over a pool of its own."""

    signing: Signing
    directory: Directory
    keys: SigningKeys

    async def app(self) -> RelyingParty:
        """A new app."""
        return (await self.directory.create_app("Example", RP_ID, [ORIGIN]))[0]

    async def kids(
        self, app: RelyingParty | None, algorithm: TokenAlgorithm = "ES256"
    ) -> list[str]:
        """What a verifier finds published."""
        return [key["kid"] for key in (await self.signing.key_set(app, algorithm))["keys"]]

    async def signer(self, app: RelyingParty | None, algorithm: TokenAlgorithm = "ES256") -> str:
        """The key that signs."""
        return str(jws.header(await self.signing.sign(app, algorithm, CLAIMS))["kid"])


class CountingMint(SystemMint):
    """Counts ids, of which each new key takes one."""

    def __init__(self) -> None:
        self.ids = 0

    def id(self) -> str:
        self.ids += 1
        return super().id()


class Together(SigningKeys):
    """Holds the first insert until another instance is about to make its own."""

    def __init__(self, postgres: Postgres, barrier: asyncio.Barrier) -> None:
        super().__init__(postgres)
        self._barrier = barrier

    async def add_first(self, key: StoredKey, *, rotated: bool = False) -> None:
        await self._barrier.wait()
        await super().add_first(key, rotated=rotated)


Start = Callable[..., Awaitable[Instance]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def start(stores: EmbeddedStores, clock: Clock) -> AsyncIterator[Start]:
    """Start instances with these secrets, on one clock unless they bring their own."""
    opened: list[Parts] = []

    async def make(
        *secrets: str,
        barrier: asyncio.Barrier | None = None,
        mint: SystemMint | None = None,
        own: Clock | None = None,
        **changes: object,
    ) -> Instance:
        settings = settings_for(stores, secret_key=secrets or (SECRET_KEY,), **changes)
        parts = await assemble(
            settings, clock=own or clock, monotonic=(own or clock).monotonic, mint=mint
        )
        opened.append(parts)
        if barrier:
            parts.signing = Signing(
                Together(parts.postgres, barrier), parts.secrets.secret_key, clock=clock
            )
        return Instance(parts.signing, parts.directory, SigningKeys(parts.postgres))

    yield make
    for parts in opened:
        await parts.close()


@pytest.fixture
async def one(start: Start) -> Instance:
    return await start()


# -- the first key ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_token_verifies_through_the_key_set(
    one: Instance, algorithm: TokenAlgorithm
) -> None:
    app = await one.app()
    token = await one.signing.sign(app, algorithm, CLAIMS)
    published = await one.signing.key_set(app, algorithm)
    assert jws.verify(token, published) == CLAIMS, "nothing is added"
    assert jws.header(token) == {"alg": algorithm, "typ": "JWT", "kid": published["keys"][0]["kid"]}
    assert len(published["keys"]) == 1
    assert published == await one.signing.key_set(app, algorithm)


async def test_the_key_set_is_there_before_the_first_token(one: Instance) -> None:
    app = await one.app()
    published = await one.signing.key_set(app)
    assert [key["alg"] for key in published["keys"]] == ["RS256"]
    assert jws.verify(await one.signing.sign(app, "RS256", CLAIMS), published) == CLAIMS


async def test_sets_are_apart(one: Instance) -> None:
    """An app's key verifies nothing of another app's and nothing of the broker's own set."""
    apps = [await one.app(), await one.app(), None]
    tokens = [await one.signing.sign(app, "ES256", CLAIMS) for app in apps]
    sets = [await one.signing.key_set(app, "ES256") for app in apps]
    for i, token in enumerate(tokens):
        for j, published in enumerate(sets):
            if i == j:
                assert jws.verify(token, published) == CLAIMS
            else:
                with pytest.raises(KeyError):
                    jws.verify(token, published)


async def test_instances_that_make_the_first_key_at_once_end_with_one(start: Start) -> None:
    barrier = asyncio.Barrier(2)
    left, right = await start(barrier=barrier), await start(barrier=barrier)
    app = await left.app()
    tokens = await asyncio.gather(*(i.signing.sign(app, "RS256", CLAIMS) for i in (left, right)))
    published = await left.signing.key_set(app)
    assert len(published["keys"]) == 1
    assert [jws.verify(token, published) for token in tokens] == [CLAIMS, CLAIMS]
    assert len(await left.keys.of(app.id)) == 1


async def test_many_requests_make_one_key(start: Start) -> None:
    mint = CountingMint()
    one = await start(mint=mint)
    app = await one.app()
    mint.ids = 0
    kids = await asyncio.gather(*(one.signer(app, "RS256") for _ in range(20)))
    assert len(set(kids)) == 1
    assert mint.ids == 1


async def test_an_instance_whose_clock_is_behind_signs(start: Start) -> None:
    slow = Clock()
    slow.ahead = -30
    one, behind = await start(), await start(own=slow)
    app = await one.app()
    kid = await one.signer(app)
    assert await behind.signer(app) == kid
    assert await behind.kids(app) == [kid]


async def test_an_app_that_was_deleted(one: Instance) -> None:
    """Its keys are deleted with it, and none is made for it again."""
    app = await one.app()
    await one.signer(app)
    assert len(await one.keys.of(app.id)) == 1
    await one.directory.delete_app(app.id)
    assert await one.keys.of(app.id) == []
    assert app.id not in {key.app_id for key in await one.keys.all()}
    for attempt in (one.signing.sign(app, "ES256", CLAIMS), one.signing.key_set(app, "ES256")):
        with pytest.raises(UnknownApp):
            await attempt
    key = await one.signing._new(app.id, "ES256")
    with pytest.raises(UnknownApp):
        await one.keys.rotate(key, others_retire_at=key.created_at)


# -- rotation --------------------------------------------------------------------------------------


async def test_a_rotation_publishes_first_and_signs_later(one: Instance, clock: Clock) -> None:
    app = await one.app()
    old = await one.signer(app)
    ((_, first), (second, state)) = await one.signing.rotate(app, "ES256")
    assert (first, state) == ("signs", "next")
    moments = [
        (1, old, [old, second.id]),
        (PUBLISHED_AHEAD - 1, old, [old, second.id]),
        (PUBLISHED_AHEAD + 1, second.id, [second.id, old]),
        (PUBLISHED_AHEAD + TOKEN_LIFE_LIMIT + SKEW - 1, second.id, [second.id, old]),
        (PUBLISHED_AHEAD + TOKEN_LIFE_LIMIT + SKEW + 1, second.id, [second.id]),
    ]
    for ahead, signer, published in moments:
        clock.ahead = ahead
        assert (await one.signer(app), await one.kids(app)) == (signer, published), ahead
    assert [state for _, state in await one.signing.list_keys(app)] == ["gone", "signs"]
    listed = await one.signing.rotate(app, "ES256")
    assert [(key.generation, state) for key, state in listed] == [(2, "signs"), (3, "next")], (
        "gone is deleted"
    )


async def test_no_verifier_ever_meets_an_unknown_key(one: Instance, clock: Clock) -> None:
    """A day of rotations at odd times. A token verifies, until it has expired, with any set that
    was fetched in the last ten minutes.
    """
    app, chance, step = await one.app(), random.Random(6), 120
    signed: list[tuple[float, str]] = []
    sets: list[tuple[float, set[str]]] = []
    for ahead in range(0, 6 * 3600, step):
        clock.ahead = ahead
        if chance.random() < 0.06:
            await one.signing.rotate(app, "ES256")
        signed.append((ahead, await one.signer(app)))
        sets.append((ahead, set(await one.kids(app))))
    assert len({kid for _, kid in signed}) > 5
    assert max(len(kids) for _, kids in sets) < 10, "they leave again"
    for at, kid in signed:
        for fetched, kids in sets:
            if at - JWKS_MAX_AGE <= fetched <= at + TOKEN_LIFE_LIMIT:
                assert kid in kids, (at, fetched)


async def test_rotating_now(one: Instance, clock: Clock) -> None:
    app = await one.app()
    old = await one.signer(app)
    pending = (await one.signing.rotate(app, "ES256"))[1][0].id
    listed = await one.signing.rotate(app, "ES256", now=True)
    new = listed[2][0].id
    assert [(key.id, state) for key, state in listed] == [
        (old, "old"),
        (pending, "old"),
        (new, "signs"),
    ]
    assert await one.signer(app) == new
    assert await one.kids(app) == [new, old, pending]
    clock.ahead = TOKEN_LIFE_LIMIT + SKEW + 1
    assert await one.kids(app) == [new]


async def test_dropping_a_leaked_key(one: Instance) -> None:
    app = await one.app()
    leaked = await one.signing.sign(app, "ES256", CLAIMS)
    other = await one.signing.sign(app, "RS256", CLAIMS)
    with pytest.raises(InvalidSetting, match="only when the next one signs now"):
        await one.signing.rotate(app, "ES256", drop=True)
    assert len(await one.kids(app)) == 2
    await one.signing.rotate(app, "ES256", now=True, drop=True)
    published = await one.signing.key_set(app, "ES256")
    with pytest.raises(KeyError):
        jws.verify(leaked, published)
    assert jws.verify(await one.signing.sign(app, "ES256", CLAIMS), published) == CLAIMS
    assert jws.verify(other, published) == CLAIMS, "another algorithm is another line"


async def test_dropping_after_a_plain_rotation(one: Instance, clock: Clock) -> None:
    """Keys that were to stay for an hour leave at once, too."""
    app = await one.app()
    await one.signer(app)
    await one.signing.rotate(app, "ES256")
    clock.ahead = PUBLISHED_AHEAD + 1
    await one.signing.rotate(app, "ES256", now=True, drop=True)
    assert len(await one.kids(app)) == 1
    assert len(await one.keys.of(app.id)) == 3
    clock.ahead += 1
    await one.signing.rotate(app, "ES256")
    assert len(await one.keys.of(app.id)) == 2


async def test_rotating_without_a_key_makes_the_first(one: Instance) -> None:
    app = await one.app()
    ((key, state),) = await one.signing.rotate(app, "EdDSA")
    assert (key.generation, state) == (1, "signs")
    assert await one.signer(app, "EdDSA") == key.id


async def test_rotations_at_once(start: Start) -> None:
    """Each makes a key; the numbers have no gap and no number is taken twice."""
    instances = [await start() for _ in range(4)]
    app = await instances[0].app()
    await instances[0].signer(app)
    await asyncio.gather(
        *(i.signing.rotate(app, "ES256", now=True) for i in instances for _ in range(3))
    )
    keys = await instances[0].keys.of(app.id)
    assert [key.generation for key in keys] == list(range(1, 14))
    assert [key.retires_at is None for key in keys] == [False] * 12 + [True]
    assert {await i.signer(app) for i in instances} == {keys[-1].id}


async def test_another_instance_follows_within_a_second(start: Start, clock: Clock) -> None:
    one, two = await start(), await start(cache_seconds=0.9)
    app = await one.app()
    old = await two.signer(app)
    await one.signing.rotate(app, "ES256", now=True, drop=True)
    assert await two.signer(app) == old, "remembered"
    clock.ahead += 1
    new = await two.signer(app)
    assert new != old
    assert await two.kids(app) == [new]
    await two.signing.rotate(app, "ES256", now=True)
    assert await two.signer(app) != new, "its own rotation it knows at once"


async def test_a_rotation_that_makes_the_first_key_is_an_event_and_a_first_use_is_none(
    one: Instance,
) -> None:
    rotated, used = await one.app(), await one.app()
    await one.signing.rotate(rotated, "ES256")
    await one.signer(used)
    for app, actions in (
        (rotated, ["app.created", "signing_key.rotated"]),
        (used, ["app.created"]),
    ):
        assert [e.action for e in await one.directory.events(app.id, limit=10)] == actions


async def test_a_rotation_of_the_brokers_own_keys_is_an_event_of_no_app(one: Instance) -> None:
    before = len(await one.directory.events("", limit=1000))
    for _ in range(2):
        await one.signing.rotate(None, "ES256")
    found = (await one.directory.events("", limit=1000))[before:]
    assert [(e.app_id, e.action, e.result) for e in found] == [
        ("", "signing_key.rotated", "done")
    ] * 2


async def test_a_rotation_is_an_event_of_its_app(one: Instance) -> None:
    app = await one.app()
    await one.signer(app)
    await one.signing.rotate(app, "ES256")
    found = await one.directory.events(app.id, limit=10)
    assert [(e.action, e.result) for e in found] == [
        ("app.created", "done"),
        ("signing_key.rotated", "done"),
    ]


# -- at rest, and other secrets --------------------------------------------------------------------


async def test_a_dump_signs_nothing(one: Instance, stores: EmbeddedStores) -> None:
    """No piece of a private key is in the table, in no form that a database shows; and the secret
    is not either.
    """
    app = await one.app()
    for algorithm in ALGORITHMS:
        await one.signing.sign(app, algorithm, CLAIMS)
    async with session_of(stores) as session:
        rows = await session.fetch(
            "SELECT k.sealed, k::text AS line FROM signing_keys k WHERE app_id = $1", app.id
        )
    assert len(rows) == len(ALGORITHMS)
    dump = b"\n".join(row["sealed"] + row["line"].encode() for row in rows)
    for key in await one.keys.of(app.id):
        private, _ = Seal([SECRET_KEY]).open(
            key.sealed, kid=key.id, scope=app.id, algorithm=key.algorithm
        )
        der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        for part in _secret_parts(private):
            assert not _shows(dump, part)
            assert all(_shows(form, part) for form in (der, b64encode(der), der.hex().encode())), (
                "it would see"
            )
    assert b"PRIVATE" not in dump
    assert SECRET_KEY.encode() not in dump


def _secret_parts(private: PrivateKey) -> list[bytes]:
    if isinstance(private, rsa.RSAPrivateKey):
        found = private.private_numbers()
        return [
            n.to_bytes(256).lstrip(b"\0")
            for n in (found.d, found.p, found.q, found.dmp1, found.dmq1)
        ]
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return [private.private_numbers().private_value.to_bytes(32)]
    return [private.private_bytes_raw()]


def _shows(dump: bytes, part: bytes) -> bool:
    """Whether nine bytes of `part` are in the dump: as they are, in hexadecimal or in base64."""
    pieces = [part[n : n + 9] for n in range(len(part) - 8)]
    return any(
        form in dump
        for p in pieces
        for form in (p, p.hex().encode(), b64encode(p), urlsafe_b64encode(p))
    )


async def test_another_secret_signs_nothing_and_publishes_the_same(start: Start) -> None:
    one, two = await start(), await start(OTHER)
    app = await one.app()
    kid = await one.signer(app)
    with pytest.raises(Unavailable) as refused:
        await two.signing.sign(app, "ES256", CLAIMS)
    assert refused.value.reason == "signing_key_sealed"
    assert await two.kids(app) == [kid]
    assert len(await one.keys.of(app.id)) == 1, "none is made anew"
    assert [number for key, number in await two.signing.list_seals() if key.app_id == app.id] == [
        None
    ]
    await two.signing.rotate(app, "ES256", now=True)
    assert jws.verify(
        await two.signing.sign(app, "ES256", CLAIMS), await two.signing.key_set(app, "ES256")
    )
    assert [number for key, number in await two.signing.list_seals() if key.app_id == app.id] == [0]
    await one.directory.delete_app(app.id)


async def test_without_a_secret_nothing_is_made(stores: EmbeddedStores, one: Instance) -> None:
    app = await one.app()
    signing = Signing(one.keys, tuple)
    for attempt in (
        signing.sign(app, "ES256", CLAIMS),
        signing.key_set(app),
        signing.rotate(app, "ES256"),
    ):
        with pytest.raises(Unavailable) as refused:
            await cast("Awaitable[object]", attempt)
        assert refused.value.reason == "no_secret_key"
    assert await one.keys.of(app.id) == []


async def test_the_secret_changes_without_a_pause(own_stores: EmbeddedStores) -> None:
    """Every step of it, on a database of the test's own, for `reseal` takes every key."""
    parts = await assemble(settings_for(own_stores))
    keys = SigningKeys(parts.postgres)
    app, _ = await parts.directory.create_app("Example", RP_ID, [ORIGIN])
    secrets = ((OTHER,), (SECRET_KEY, OTHER), (SECRET_KEY,))
    old, both, new = (Signing(keys, partial(tuple, each)) for each in secrets)
    try:
        tokens = [await old.sign(of, "ES256", CLAIMS) for of in (app, None)]
        await old.rotate(app, "ES256", now=True)
        tokens += [await both.sign(of, "ES256", CLAIMS) for of in (app, None)]
        assert [number for _, number in await both.list_seals()] == [1, 1], (
            "the one that signed before need not open"
        )
        assert secret_key(settings_for(own_stores), (), [1, 0]).found.startswith(
            "1 of 2 signing keys are sealed"
        )
        assert await new.reseal() == (0, 3)
        assert await both.reseal() == (3, 0)
        assert await both.reseal() == (0, 0)
        tokens += [await new.sign(of, "ES256", CLAIMS) for of in (app, None)]
        for n, token in enumerate(tokens):
            assert jws.verify(token, await new.key_set(None if n % 2 else app, "ES256")) == CLAIMS
        with pytest.raises(Unavailable):
            await old.sign(app, "ES256", CLAIMS)
        stale = await keys.of(app.id)
        await both.reseal()
        changed = (await keys.of(app.id))[0]
        assert not await keys.reseal(
            StoredKey(changed.id, app.id, "ES256", 1, b"old", {}, *[instant(0)] * 2),
            b"x",
            instant(0),
        )
        assert [key.sealed for key in await keys.of(app.id)] == [key.sealed for key in stale]
    finally:
        await parts.close()


async def test_a_sealed_key_of_another_row_does_not_sign(
    one: Instance, stores: EmbeddedStores
) -> None:
    """Who can write to the table, and no more, can't move an app's key under another app."""
    mine, theirs = await one.app(), await one.app()
    await one.signer(mine)
    await one.signer(theirs)
    async with session_of(stores) as session:
        await session.execute(
            "UPDATE signing_keys SET sealed = (SELECT sealed FROM signing_keys WHERE app_id = $2)"
            " WHERE app_id = $1",
            mine.id,
            theirs.id,
        )
    with pytest.raises(Unavailable) as refused:
        await one.signer(mine)
    assert refused.value.reason == "signing_key_sealed"
    await one.directory.delete_app(mine.id)


# -- dialects that sign ----------------------------------------------------------------------------


def _signing_dialect() -> Dialect:
    """A dialect as they are: a module. It signs for whoever asks, and publishes its app's keys."""

    @public_app
    async def token(request: web.Request, caller: Caller) -> web.StreamResponse:
        return json_answer({"token": await request.app[SIGNING].sign(caller.app, "RS256", CLAIMS)})

    @public_app
    async def keys(request: web.Request, caller: Caller) -> web.StreamResponse:
        return json_answer(await request.app[SIGNING].key_set(caller.app))

    def routes(*, management: bool, browser: bool) -> list[web.RouteDef]:
        return [
            web.post("/signs/{app_id}/token", token),
            web.get("/signs/{app_id}/keys", keys, allow_head=False),
        ]

    wire_format = SimpleNamespace(
        PATHS=re.compile("/signs/"), STATUS=flex.STATUS, routes=routes, render=flex.render
    )
    return Dialect("signs", lambda: cast("WireFormat", wire_format), ("signs",), (), signs=True)


@pytest.fixture
def _with_a_signing_dialect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialects, "DIALECTS", (dialects.DIALECTS[0], _signing_dialect()))


@pytest.mark.usefixtures("_with_a_signing_dialect")
async def test_a_dialect_signs_and_the_log_says_nothing_of_it(
    start_broker: Starter, session: aiohttp.ClientSession, one: Instance
) -> None:
    broker, wrong = await start_broker(), await start_broker(secret_key=(OTHER,))
    app = await one.app()

    async def ask(url: str) -> tuple[int, dict[str, Any]]:
        async with session.request("POST" if url.endswith("token") else "GET", url) as answer:
            return answer.status, await answer.json()

    _, answer = await ask(f"{broker.url}/signs/{app.id}/token")
    _, published = await ask(f"{wrong.url}/signs/{app.id}/keys")
    assert jws.verify(answer["token"], published) == CLAIMS
    status, refused = await ask(f"{wrong.url}/signs/{app.id}/token")
    assert (status, refused["code"]) == (503, "service_unavailable")
    assert (
        wrong.metric(
            "broker_refusals_total", code="service_unavailable", reason="signing_key_sealed"
        )
        == 1
    )

    (key,) = await one.keys.of(app.id)
    private, _ = Seal([SECRET_KEY]).open(key.sealed, kid=key.id, scope=app.id, algorithm="RS256")
    der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    for log in (broker.stream.getvalue(), wrong.stream.getvalue()):
        assert app.id in log
        said = log + repr(broker.parts.settings) + repr(key) + repr(broker.parts.signing)
        for secret in (
            SECRET_KEY,
            OTHER,
            der.hex(),
            b64encode(der).decode(),
            answer["token"],
            repr(key.sealed),
        ):
            assert secret[-24:] not in said
            assert secret[:24] not in said


@pytest.mark.usefixtures("_with_a_signing_dialect")
def test_what_needs_a_secret_key_is_left_out_without_one(stores: EmbeddedStores) -> None:
    def named(**changes: object) -> list[str]:
        return [dialect.name for dialect in dialects.chosen(settings_for(stores, **changes))]

    assert named() == ["flex", "signs"]
    assert named(dialects=("signs",)) == ["signs"]
    assert named(secret_key=()) == ["flex"]
    assert dialects.left_out(settings_for(stores, secret_key=())) == ("signs",)
    assert named(secret_key=(), dialects=("flex",)) == ["flex"]
    assert dialects.left_out(settings_for(stores, secret_key=(), dialects=("flex",))) == ()
    with pytest.raises(SettingsFault) as caught:
        named(secret_key=(), dialects=("flex", "signs"))
    assert caught.value.faults == ("BROKER_SECRET_KEY is missing; without it signs can't sign.",)


@pytest.mark.usefixtures("_with_a_signing_dialect")
async def test_serve_says_what_it_left_out(
    stores: EmbeddedStores, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def at_once() -> None:
        pass

    monkeypatch.setattr(serving, "until_told", at_once)
    await serving._serve(settings_for(stores, secret_key=()), Log(), migrate=False)
    said = capsys.readouterr().err
    assert '"event":"dialects_left_out","dialects":["signs"],"missing":"BROKER_SECRET_KEY"' in said
    await serving._serve(settings_for(stores), Log(), migrate=False)
    assert "left_out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("secrets", "left", "seals", "ok", "found"),
    [
        ((), (), [], True, "none, and nothing that needs one"),
        ((), ("hanko", "passlock"), [], True, "none; without one hanko and passlock don't answer"),
        ((), (), [None], False, "1 of 1 signing keys were sealed under another BROKER_SECRET_KEY."),
        ((SECRET_KEY,), (), [], True, "set; no signing keys yet"),
        ((SECRET_KEY,), (), [0, 0], True, "opens all 2 signing keys"),
        (
            (SECRET_KEY,),
            (),
            [0, None, 1],
            False,
            "1 of 3 signing keys were sealed under another BROKER_SECRET_KEY.",
        ),
        (
            (SECRET_KEY, OTHER),
            (),
            [0, 1],
            True,
            "1 of 2 signing keys are sealed under an older one; "
            "`broker signing-key reseal` changes that",
        ),
    ],
)
def test_what_doctor_makes_of_it(
    stores: EmbeddedStores,
    secrets: tuple[str, ...],
    left: tuple[str, ...],
    seals: list[int | None],
    ok: bool,
    found: str,
) -> None:
    finding = secret_key(settings_for(stores, secret_key=secrets), left, seals)
    assert (finding.check, finding.ok, finding.found) == ("secret key", ok, found)
    assert bool(finding.todo) is not ok
