"""What callers see while a store is down, slow, full, read-only or hung: the whole broker over
HTTP, real servers, real faults.

Every request that needs the store is answered with 503 within 2 seconds, also twenty at once;
nothing hangs, nothing leaks, and within 2 seconds of the store's return the broker serves again
without a restart. Those two limits are promises, so they are asserted, by a clock that leaves out
what other processes take (`Waited`), and in tests that run alone: the stores are processes too. The
rest of the file is about what a fault in the middle of a ceremony leaves behind, and about kill -9.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import asyncpg
import pytest
import redis

from broker.embedded import EmbeddedStores
from broker.ephemeral import one_time_scripts as scripts
from tests.conftest import Started, Starter
from tests.support.authenticator import Authenticator, flex_wire_form
from tests.support.processes import DEADLINE, free_port
from tests.support.proxy import Fate, RedisProxy, of_command, redis_proxy
from tests.support.servers import connect_valkey, frozen, kill, revive, session_of
from tests.support.signals import refused
from tests.support.waited import Waited
from tests.support.wire import ORIGIN, Answer, Wire

TIMEOUT = 0.8  # seconds, of one wait for a store
ANSWERED_WITHIN = 2.0
BACK_WITHIN = 2.0
STORES_MARGIN = 1.0  # what a busy machine may take from the stores, which `Waited` does not see
CONNECTIONS = 16  # more than the first requests of an outage, fewer than a burst

Call = Callable[[], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Request:
    """One request, made ready while all was well, and what it needs besides PostgreSQL to read
    from, which every request does.

    `spent` is the code for one that comes again after it has taken what it had to take.
    """

    call: Call
    redis_write: bool = False
    redis: bool = False
    postgres_write: bool = False
    finish: bool = False
    spent: str = ""


@dataclass(slots=True)
class Scene:
    """A broker on stores of its own, an app, and Ann, who has a passkey."""

    stores: EmbeddedStores
    broker: Started
    wire: Wire
    device: Authenticator
    passkey: str

    async def requests(self) -> dict[str, Request]:
        """Every kind of request, each able to succeed once."""
        wire = self.wire
        registration = await wire.open_registration("ben")
        authentication = await wire.open_authentication("ann")
        new = Authenticator()
        handle, options = await wire.begin("register", await wire.open_registration("carl"))
        made = flex_wire_form(new.register(options, ORIGIN))
        signing, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
        signed = self.device.authenticate(options, ORIGIN)
        free, options = await wire.begin("authenticate", None)
        found = self.device.authenticate(options, ORIGIN)
        nonce = await wire.authenticate(None, self.device)
        first = await wire.register(await wire.open_registration("dora"), Authenticator())
        user = (await wire.keyed("GET", "/users?identifier=ann&limit=1")).json["users"][0]["id"]
        revocable = await wire.user("rita", Authenticator())
        rita = (await wire.keyed("GET", "/users?identifier=rita&limit=1")).json["users"][0]["id"]

        def page(kind: str, transaction: str | None) -> Call:
            body = {"transaction_id": transaction} if transaction else {}
            return lambda: wire.page(f"/{kind}/transactions/webauthn/start", body)

        def opened(kind: str, external_id: str) -> Call:
            body = {"external_id": external_id, "passkey_display_name": "x"}
            if kind == "authenticate":
                del body["passkey_display_name"]
            return lambda: wire.keyed("POST", f"/transactions/{kind}", body)

        return {
            "open registration": Request(
                opened("register", "erik"), redis_write=True, redis=True, postgres_write=True
            ),
            "open authentication": Request(
                opened("authenticate", "ann"), redis_write=True, redis=True
            ),
            "begin registration": Request(
                page("register", registration), redis_write=True, redis=True
            ),
            "begin authentication": Request(
                page("authenticate", authentication), redis_write=True, redis=True
            ),
            "begin discoverable": Request(page("authenticate", None), redis_write=True, redis=True),
            "finish registration": Request(
                lambda: wire.finish("register", handle, made),
                redis_write=True,
                redis=True,
                postgres_write=True,
                finish=True,
                spent="transaction_not_found",
            ),
            "finish authentication": Request(
                lambda: wire.finish("authenticate", signing, signed),
                redis_write=True,
                redis=True,
                postgres_write=True,
                finish=True,
                spent="transaction_not_found",
            ),
            "finish discoverable": Request(
                lambda: wire.finish("authenticate", free, found),
                redis_write=True,
                redis=True,
                postgres_write=True,
                finish=True,
                spent="transaction_not_found",
            ),
            "redeem a sign-in": Request(lambda: wire.redeem(nonce), redis=True),
            "redeem a registration": Request(
                lambda: wire.redeem(first), redis=True, postgres_write=True, spent="invalid_nonce"
            ),
            "look up a user": Request(lambda: wire.keyed("GET", "/users?identifier=ann&limit=1")),
            "list passkeys": Request(lambda: wire.keyed("GET", f"/users/{user}/devices")),
            "revoke a passkey": Request(
                lambda: wire.keyed("DELETE", f"/users/{rita}/devices/{revocable}"),
                postgres_write=True,
            ),
        }


async def set_up(stores: EmbeddedStores, broker: Started, session: aiohttp.ClientSession) -> Scene:
    wire, device = await Wire.open(broker.service, session), Authenticator(counts=False)
    return Scene(stores, broker, wire, device, await wire.user("ann", device))


@pytest.fixture
async def scene(
    own_stores: EmbeddedStores, start_broker: Starter, session: aiohttp.ClientSession
) -> Scene:
    """On servers of the test's own, to be broken."""
    limits: dict[str, object] = {
        "database_connections": CONNECTIONS,
        "redis_connections": CONNECTIONS,
        "store_timeout": TIMEOUT,
    }
    return await set_up(own_stores, await start_broker(own_stores, **limits), session)


@pytest.fixture
async def calm(stores: EmbeddedStores, broker: Started, session: aiohttp.ClientSession) -> Scene:
    """On the shared servers, which are left as they were."""
    return await set_up(stores, broker, session)


async def in_time(call: Call) -> Answer:
    """The answer, which must come within the limit."""
    with Waited() as waited:
        answer = await asyncio.wait_for(call(), DEADLINE)
    assert waited.seconds <= ANSWERED_WITHIN, (
        f"answered after {waited.seconds:.2f} s: {answer.body!r}"
    )
    return answer


def unavailable(answer: Answer) -> None:
    """The one answer that an outage has."""
    assert (answer.status, answer.code) == (503, "service_unavailable"), answer.body
    assert int(answer.headers["Retry-After"]) >= 1
    assert set(answer.json) == {"code", "error"} | ({"retry"} if "retry" in answer.json else set())
    assert answer.json.get("retry", "page") in ("page", "backend")


# -- outages ---------------------------------------------------------------------------------------

# An outage is a context: the store is out of order inside; leaving it sets it right. Yields what is
# missing for readiness.
Outage = Callable[[Scene], contextlib.AbstractAsyncContextManager[None]]


def _freezing(which: Any) -> Outage:
    @contextlib.asynccontextmanager
    async def outage(scene: Scene) -> AsyncIterator[None]:
        with frozen(scene.stores, which):
            yield

    return outage


def _killing(which: Any) -> Outage:
    @contextlib.asynccontextmanager
    async def outage(scene: Scene) -> AsyncIterator[None]:
        kill(scene.stores, which)
        yield
        revive(scene.stores, which)

    return outage


@contextlib.asynccontextmanager
async def _full(scene: Scene) -> AsyncIterator[None]:
    with redis.Redis.from_url(scene.stores.redis_url) as client:
        client.config_set("maxmemory", 1)
        yield
        client.config_set("maxmemory", 0)


@contextlib.asynccontextmanager
async def _read_only(scene: Scene) -> AsyncIterator[None]:
    async with session_of(scene.stores) as session:

        async def switch(to: str) -> None:
            await session.execute("SET default_transaction_read_only = off")
            await session.execute(f"ALTER SYSTEM SET default_transaction_read_only = {to}")
            await session.execute("SELECT pg_reload_conf()")
            other = await asyncpg.connect(scene.stores.database_url)
            deadline = time.monotonic() + DEADLINE
            while await other.fetchval("SHOW default_transaction_read_only") != to:
                assert time.monotonic() < deadline, "the server never read its configuration"
            await other.close()

        await switch("on")
        yield
        await switch("off")


@contextlib.asynccontextmanager
async def _no_slots(scene: Scene) -> AsyncIterator[None]:
    taken: list[asyncpg.Connection[asyncpg.Record]] = []

    async def take() -> None:
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                taken.append(await asyncpg.connect(scene.stores.database_url))

    await take()
    ended = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name = 'passkey-broker'"
    )
    while await taken[0].fetchval(ended):
        await take()
    await take()
    yield
    for session in taken:
        session.terminate()


@contextlib.asynccontextmanager
async def _hung(scene: Scene) -> AsyncIterator[None]:
    """Every statement hangs after it has begun: another session holds the tables."""
    async with session_of(scene.stores) as session, session.transaction():
        await session.execute("LOCK TABLE relying_parties, api_keys, users, credentials")
        yield


ALL: Callable[[Request], bool] = lambda _: True  # noqa: E731 - a table of predicates


@dataclass(frozen=True, slots=True)
class Case:
    outage: Outage
    fails: Callable[[Request], bool]
    missing: list[str]


CASES = {
    "PostgreSQL frozen": Case(_freezing("PostgreSQL"), ALL, ["postgres"]),
    "PostgreSQL killed": Case(_killing("PostgreSQL"), ALL, ["postgres"]),
    "PostgreSQL hung": Case(_hung, ALL, []),
    "PostgreSQL without slots": Case(_no_slots, ALL, ["postgres"]),
    "PostgreSQL read-only": Case(_read_only, lambda r: r.postgres_write, ["postgres"]),
    "Valkey frozen": Case(_freezing("Valkey"), lambda r: r.redis, ["redis"]),
    "Valkey killed": Case(_killing("Valkey"), lambda r: r.redis, ["redis"]),
    "Valkey full": Case(_full, lambda r: r.redis_write, ["redis"]),
}


@pytest.mark.alone
@pytest.mark.parametrize("name", CASES)
async def test_an_outage(scene: Scene, name: str) -> None:
    case, wire = CASES[name], scene.wire
    requests = await scene.requests()
    spare = await scene.requests()
    async with case.outage(scene):
        live, ready, *answers = await asyncio.gather(
            in_time(lambda: wire.send("GET", f"{wire.url}/health/live")),
            in_time(lambda: wire.send("GET", f"{wire.url}/health/ready")),
            *(in_time(request.call) for request in requests.values()),
        )
        assert live.status == 200
        assert (ready.status, (ready.json or {}).get("missing", [])) == (
            503 if case.missing else 200,
            case.missing,
        )
        for (what, request), answer in zip(requests.items(), answers, strict=True):
            if case.fails(request):
                unavailable(answer)
                assert not request.finish or "retry" in answer.json, what
                if request.finish and case.missing == ["redis"]:
                    assert answer.json["retry"] == "page", (
                        "nothing was taken, or there is nothing else to begin with"
                    )
                if request.finish and name == "PostgreSQL read-only":
                    assert answer.json["retry"] == ("page" if "discoverable" in what else "backend")
            else:
                assert answer.status in (200, 201), (what, answer.body)

        for _ in range(
            3
        ):  # twenty at once, again and again: the later ones find what the earlier ones left
            failing = [request for request in spare.values() if case.fails(request)]
            burst = [failing[n % len(failing)] for n in range(20)]
            for request, answer in zip(
                burst, await asyncio.gather(*(in_time(r.call) for r in burst)), strict=True
            ):
                if not (request.spent and answer.code == request.spent):
                    unavailable(answer)
        await in_time(lambda: wire.send("GET", f"{wire.url}/health/live"))

    with Waited() as waited:
        await ready_again(wire)
        nonce = await wire.authenticate(await wire.open_authentication("ann"), scene.device)
        assert (await wire.redeem(nonce, purpose="authenticate", external_id="ann")).status == 200
    assert waited.seconds <= BACK_WITHIN + STORES_MARGIN, "no sign-in again in time"
    await serves_and_holds_no_more_than_its_connections(scene)
    assert (
        scene.broker.metric(
            "broker_refusals_total",
            code="service_unavailable",
            reason=("postgres" if name.startswith("PostgreSQL") else "redis"),
        )
        > 0
    )
    assert not [line for line in scene.broker.log if line["event"] == "defect"]


async def ready_again(wire: Wire) -> None:
    """The broker notices by itself that the store is back."""
    deadline = time.monotonic() + DEADLINE
    while (await wire.send("GET", f"{wire.url}/health/ready")).status != 200:
        assert time.monotonic() < deadline, "never ready again"


async def serves_and_holds_no_more_than_its_connections(scene: Scene) -> None:
    """Forty at once, more than there are connections. A store that a busy machine keeps waiting is
    a 503, so they may ask again.
    """
    deadline = time.monotonic() + DEADLINE
    while True:
        calls = [
            scene.wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"})
            for _ in range(40)
        ]
        statuses = {answer.status for answer in await asyncio.gather(*calls)}
        assert statuses <= {201, 503}
        if statuses == {201}:
            break
        assert time.monotonic() < deadline, "forty at once are never served"
    ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'passkey-broker'"
    deadline = time.monotonic() + DEADLINE
    async with session_of(scene.stores) as session:
        while (held := await session.fetchval(ours)) > CONNECTIONS:
            assert time.monotonic() < deadline, f"{held} sessions at PostgreSQL"
            await asyncio.sleep(0.02)
    with redis.Redis.from_url(scene.stores.redis_url) as client:
        while (held := len(client.client_list())) > CONNECTIONS + 1:
            assert time.monotonic() < deadline, f"{held} connections at Valkey"
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("store", ["postgres", "redis"])
async def test_started_while_nobody_listens(calm: Scene, start_broker: Starter, store: str) -> None:
    """The broker starts, says that it is not ready, and refuses in time."""
    nowhere = f"127.0.0.1:{free_port()}"
    changes = (
        {"database_url": f"postgresql://broker@{nowhere}/postgres"}
        if store == "postgres"
        else {"redis_url": f"redis://{nowhere}"}
    )
    lost = await start_broker(calm.stores, **{"store_timeout": TIMEOUT, **changes})
    wire = replace(calm.wire, url=lost.url)
    assert (await in_time(lambda: wire.send("GET", f"{wire.url}/health/live"))).status == 200
    ready = await in_time(lambda: wire.send("GET", f"{wire.url}/health/ready"))
    assert (ready.status, ready.json["missing"]) == (503, [store])
    for call in (
        lambda: wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"}),
        lambda: wire.page("/authenticate/transactions/webauthn/start", {}),
    ):
        unavailable(await in_time(call))


async def test_an_app_deleted_a_moment_ago_is_no_defect(calm: Scene, start_broker: Starter) -> None:
    """Instances remember an app for less than a second; in that time its requests are refused like
    others.
    """
    remembering = await start_broker(calm.stores, cache_seconds=0.9, store_timeout=TIMEOUT)
    wire = replace(calm.wire, url=remembering.url)
    await wire.open_authentication("ann")
    await calm.broker.parts.directory.delete_app(wire.app_id)
    answer = await wire.keyed(
        "POST", "/transactions/register", {"external_id": "new", "passkey_display_name": "x"}
    )
    assert (answer.status, answer.code) in ((404, "app_not_found"), (401, "invalid_access_token"))
    assert not [line for line in remembering.log if line["event"] == "defect"]


# -- faults inside a ceremony ----------------------------------------------------------------------


@pytest.fixture
async def losing(
    stores: EmbeddedStores, start_broker: Starter, session: aiohttp.ClientSession
) -> AsyncIterator[tuple[Scene, RedisProxy]]:
    """A scene whose Valkey is behind a proxy that loses what it is told to."""
    async with redis_proxy(lambda: connect_valkey(stores)) as proxy:
        broker = await start_broker(
            stores, redis_url=f"redis://127.0.0.1:{proxy.port}", store_timeout=TIMEOUT
        )
        yield await set_up(stores, broker, session), proxy
        await broker.service.close()


async def begun(scene: Scene, kind: str) -> tuple[str, Call]:
    """A begun ceremony: its transaction, and the finish that would succeed."""
    wire = scene.wire
    transaction = await (
        wire.open_registration("ben") if kind == "register" else wire.open_authentication("ann")
    )
    handle, options = await wire.begin(kind, transaction)
    response: object = (
        flex_wire_form(Authenticator().register(options, ORIGIN))
        if kind == "register"
        else scene.device.authenticate(options, ORIGIN)
    )
    return transaction, lambda: wire.finish(kind, handle, response, transaction)


async def again_from(scene: Scene, kind: str, transaction: str) -> str:
    """Where the person can start again, by trying."""
    answer = await scene.wire.page(
        f"/{kind}/transactions/webauthn/start", {"transaction_id": transaction}
    )
    if answer.status == 200:
        return "page"
    assert answer.code == "transaction_not_found"
    return "backend"


async def passkeys(scene: Scene, external_id: str) -> list[dict[str, Any]]:
    user = (await scene.wire.keyed("GET", f"/users?identifier={external_id}&limit=1")).json[
        "users"
    ][0]["id"]
    return list((await scene.wire.keyed("GET", f"/users/{user}/devices")).json["devices"])


LOSSES = {
    "take(pending)": ((b"EVALSHA", scripts.TAKE_BESIDE.sha1), "page"),
    "take(transaction)": ((b"EVALSHA", scripts.TAKE.sha1), "backend"),
    "put(nonce)": ((b"SET",), "backend"),
}


@pytest.mark.parametrize("fate", [Fate.CUT, Fate.REFUSE])
@pytest.mark.parametrize("step", LOSSES)
@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_retry_says_where_to_start_again(
    losing: tuple[Scene, RedisProxy], kind: str, step: str, fate: Fate
) -> None:
    scene, proxy = losing
    transaction, finish = await begun(scene, kind)
    command, place = LOSSES[step]
    proxy.commands.clear()
    proxy.fate = of_command(fate, *command)
    answer = await in_time(finish)
    proxy.fate = of_command(Fate.PASS, b"")
    unavailable(answer)
    assert answer.json["retry"] == place
    sent = [words[:2] for words in proxy.commands if words[0].upper() != b"CLIENT"]
    steps = [command for command, _ in LOSSES.values()]
    expected = steps[: steps.index(command) + 1]
    assert [tuple(words[: len(c)]) for words, c in zip(sent, expected, strict=True)] == expected, (
        "sent once, and nothing after it"
    )
    if place == "backend" and not (step == "take(transaction)" and fate is Fate.REFUSE):
        assert await again_from(scene, kind, transaction) == "backend"
    elif place == "page":
        assert await again_from(scene, kind, transaction) == "page"
    if kind == "register":
        # With the write done, the passkey is there, and the next registration offers to exclude it.
        assert len(await passkeys(scene, "ben")) == (1 if step == "put(nonce)" else 0)
    second, finish = await begun(scene, kind)
    assert second != transaction
    answer = await finish()
    assert answer.status == 200
    assert (await scene.wire.redeem(answer.json["nonce"], purpose=kind)).status == 200


@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_a_durable_write_that_hangs_sends_back_to_the_backend(calm: Scene, kind: str) -> None:
    """Reads go on, writes wait for a lock: the transaction has been taken when PostgreSQL fails."""
    transaction, finish = await begun(calm, kind)
    async with session_of(calm.stores) as session, session.transaction():
        await session.execute("LOCK TABLE credentials IN EXCLUSIVE MODE")
        answer = await in_time(finish)
        unavailable(answer)
        assert answer.json["retry"] == "backend"
        assert await again_from(calm, kind, transaction) == "backend"
    assert len(await passkeys(calm, "ben" if kind == "register" else "ann")) == (
        0 if kind == "register" else 1
    )
    _, finish = await begun(calm, kind)
    assert (await finish()).status == 200
    name = "passkey.registered" if kind == "register" else "passkey.used"
    told = await calm.broker.events(calm.wire.app_id)
    assert told.count((name, "done", None)) == (2 if kind == "register" else 1), (
        "the one that failed told nothing"
    )


async def test_one_locked_row_harms_nobody_else(calm: Scene) -> None:
    """A passkey's row is held by another session: its owner is refused in time, others sign in
    meanwhile.
    """
    other = Authenticator()
    await calm.wire.user("zoe", other)
    _, finish = await begun(calm, "authenticate")
    async with session_of(calm.stores) as session, session.transaction():
        await session.execute("SELECT FROM credentials WHERE id = $1 FOR UPDATE", calm.passkey)
        held = asyncio.create_task(in_time(finish))
        for _ in range(5):
            await calm.wire.authenticate(await calm.wire.open_authentication("zoe"), other)
        answer = await held
        unavailable(answer)
        assert answer.json["retry"] == "backend"
        assert (await calm.wire.send("GET", f"{calm.wire.url}/health/ready")).status == 200


async def test_a_lost_redemption_never_buys_twice(losing: tuple[Scene, RedisProxy]) -> None:
    """The nonce may be spent: the caller is told to start over, and a second try finds nothing."""
    scene, proxy = losing
    nonce = await scene.wire.authenticate(await scene.wire.open_authentication("ann"), scene.device)
    proxy.commands.clear()
    proxy.fate = of_command(Fate.SWALLOW, b"EVALSHA")
    unavailable(await in_time(lambda: scene.wire.redeem(nonce)))
    proxy.fate = of_command(Fate.PASS, b"")
    assert len(proxy.named(b"EVALSHA")) == 1
    assert (await scene.wire.redeem(nonce)).code == "invalid_nonce"


# -- kill -9 ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(stores: EmbeddedStores) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`broker serve` as a process of its own, and where it listens."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("BROKER_")
    }
    environment |= {
        "BROKER_DATABASE_URL": stores.database_url,
        "BROKER_REDIS_URL": stores.redis_url,
        "BROKER_HOST": "127.0.0.1",
        "BROKER_PORT": "0",
    }
    argv = [
        sys.executable,
        "-c",
        "import sys; from broker.cli import main; sys.exit(main())",
        "serve",
    ]
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            told = json.loads(line)
            if told["event"] == "listening":
                break
        else:
            raise AssertionError("the process ended without listening")
        yield process, f"http://127.0.0.1:{told['port']}"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("victim", ["broker", "PostgreSQL", "Valkey"])
async def test_a_registration_whose_nonce_was_handed_out_survives(
    scene: Scene, victim: Any
) -> None:
    """Promise 16: SIGKILL the moment the page has its nonce. The passkey is there, and signs in.
    The nonce buys once, or ended with the term of the killed Valkey.
    """
    device = Authenticator()
    with serving(scene.stores) as (process, url):
        wire = replace(scene.wire, url=url)
        nonce = await wire.register(await wire.open_registration("ben"), device)
        if victim == "broker":
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            kill(scene.stores, victim)
    if victim != "broker":
        revive(scene.stores, victim)
    wire = scene.wire
    await ready_again(wire)
    assert len(await passkeys(scene, "ben")) == 1
    confirmed = [("passkey.confirmed", "done", None)]
    if victim == "Valkey":
        with refused(scene.broker, "invalid_nonce", "term_over"):
            await wire.redeem(nonce, purpose="register", external_id="ben")
        confirmed = []
    else:
        answer = await wire.redeem(nonce, purpose="register", external_id="ben")
        assert answer.status == 200, answer.body
    signed_in = await wire.authenticate(await wire.open_authentication("ben"), device)
    assert (await wire.redeem(signed_in)).json["external_id"] == "ben"
    told = [
        event for event in await scene.broker.events(wire.app_id) if event[0].startswith("passkey.")
    ]
    made, used = ("passkey.registered", "done", None), ("passkey.used", "done", None)
    assert told[-2 - len(confirmed) :] == [made, *confirmed, used]


async def test_a_restart_of_valkey_ends_every_login_in_flight(scene: Scene) -> None:
    """Promise 2, the restart: the moment a nonce has bought, its store loses power. A nonce that
    has not bought ends too, and the next login succeeds.
    """
    nonce = await scene.wire.authenticate(None, scene.device)
    unspent = await scene.wire.authenticate(None, scene.device)
    assert (await scene.wire.redeem(nonce)).status == 200
    kill(scene.stores, "Valkey")
    revive(scene.stores, "Valkey")
    await ready_again(scene.wire)
    assert (await scene.wire.redeem(nonce)).code == "invalid_nonce"
    with refused(scene.broker, "invalid_nonce", "term_over"):
        await scene.wire.redeem(unspent)
    again = await scene.wire.authenticate(None, scene.device)
    assert (await scene.wire.redeem(again)).status == 200
