"""Mail codes: the store's contract on everything that can be had, then the verbs and the Flex API's
routes.

Servers of the first part are the test's own, so a test may look at every key there is.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.ephemeral.mail_codes import (
    GRACE,
    PENDING,
    PER_MAILBOX,
    PER_USER,
    WINDOW,
    MailCode,
    MailCodes,
)
from broker.errors import Unavailable
from broker.mailbox import ATTEMPTS, LIFE
from tests.conftest import ON_BOTH, SKEW, OpenApp, Started, Starter
from tests.stores.test_ephemeral import APP, MINT, OTHER, REAL, STRANGE, Place
from tests.support.golden import golden
from tests.support.proxy import Fate, RedisProxy, of_command, redis_proxy
from tests.support.servers import Valkey
from tests.support.signals import counted, lines, quiet, refused, same_answer
from tests.support.wire import Answer, Wire

SECRET = "pbm_" + "-".join("S" * 24 for _ in range(3))
DIGITS = "013579"
WRONG = "013570"
real = pytest.mark.parametrize(
    "server", REAL, indirect=True
)  # not fakeredis, which has no connections and is never full
GONE = ("unknown", None)


@pytest.fixture(scope="module", params=("fakeredis", *REAL))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Every kind of store, once."""
    kind: str = request.param
    if kind == "fakeredis":
        yield Place(kind, None)
        return
    if kind == "cluster":
        yield Place(kind, request.getfixturevalue("cluster"))
        return
    binary = Path(shutil.which("redis-server") or "") if kind == "redis" else None
    started = Valkey.start(tmp_path_factory.mktemp(kind), binary=binary)
    yield Place(kind, started)
    started.stop()


@pytest.fixture
async def place(server: Place) -> AsyncIterator[Place]:
    """The store, empty."""
    made = Place(server.kind, server.server)
    with made.client() as client:
        client.flushall()
    yield made
    for store in made.made:
        await store.close()


def codes(place: Place) -> MailCodes:
    """Another instance's store."""
    return place.store().mail_codes


def code(place: Place, **changes: Any) -> MailCode:
    now = round(place.clock(), 3)
    made = MailCode(
        ATTEMPTS, MINT.id(), APP, "sign-up", "Ann@example.org", None, None, now, now + LIFE
    )
    return made._replace(**changes)


async def put(
    store: MailCodes, made: MailCode, *, counted: bool = False, replace_others: bool = False
) -> MailCode:
    assert (
        await store.put(made, SECRET, DIGITS, counted=counted, replace_others=replace_others) == 0
    )
    return made


async def wait_for(store: MailCodes, made: MailCode) -> int:
    return await store.put(made, SECRET, DIGITS, counted=True, replace_others=False)


# -- the store: one code ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"external_id": STRANGE, "email": "ünï@exämple.org", "purpose": "a:b.c_d-e"},
        {"metadata": {"a": [1, 2.5, None, True, {"ключ": STRANGE}], "": "x" * 3000}},
        {"metadata": {}, "external_id": "u"},
    ],
)
async def test_a_mail_code_comes_back_as_it_was(place: Place, changes: dict[str, Any]) -> None:
    store, made = codes(place), code(place, **changes)
    await put(store, made)
    assert await store.peek(APP, made.id) == made
    assert await store.peek(APP, made.id) == made, "peek leaves it where it is"
    assert await store.peek(OTHER, made.id) is None
    assert await store.judge(OTHER, made.id, SECRET, DIGITS) == GONE
    assert await store.judge(APP, made.id, SECRET, DIGITS) == (
        "right",
        made._replace(attempts_left=ATTEMPTS - 1),
    )
    assert await store.judge(APP, made.id, SECRET, DIGITS) == GONE
    assert await store.peek(APP, made.id) is None


async def test_guesses_are_counted_until_none_is_left(place: Place) -> None:
    store, made = codes(place), await put(codes(place), code(place))
    for left in range(ATTEMPTS - 1, 0, -1):
        assert await store.judge(APP, made.id, SECRET, WRONG) == (
            "wrong",
            made._replace(attempts_left=left),
        )
    assert (await store.judge(APP, made.id, SECRET, WRONG))[0] == "exhausted"
    for digits in (WRONG, DIGITS):
        assert await store.judge(APP, made.id, SECRET, digits) == ("spent", None)
    assert await store.peek(APP, made.id) == made._replace(attempts_left=0)


async def test_the_last_guess_may_be_the_right_one(place: Place) -> None:
    store, made = codes(place), await put(codes(place), code(place))
    for _ in range(ATTEMPTS - 1):
        await store.judge(APP, made.id, SECRET, WRONG)
    assert (await store.judge(APP, made.id, SECRET, DIGITS))[0] == "right"


async def test_a_guess_without_the_secret_counts_nothing_and_learns_nothing(place: Place) -> None:
    store, made = codes(place), await put(codes(place), code(place))
    for secret in ("", SECRET[:-1], SECRET + "S", SECRET.lower(), made.id):
        for digits in (DIGITS, WRONG):
            assert await store.judge(APP, made.id, secret, digits) == GONE
    assert await store.peek(APP, made.id) == made
    place.clock.ahead = LIFE
    assert await store.judge(APP, made.id, "", DIGITS) == GONE


async def test_it_ends_and_is_known_to_have_ended(place: Place) -> None:
    store, made = codes(place), await put(codes(place), code(place))
    with place.client() as client:
        (key,) = client.keys("c:*")
        assert LIFE + GRACE - 30 < client.pttl(key) / 1000 <= LIFE + GRACE
        client.pexpire(key, GRACE * 1000 + 5000)
        assert (await store.judge(APP, made.id, SECRET, WRONG))[0] == "wrong"
        client.pexpire(key, GRACE * 1000)
    assert await store.judge(APP, made.id, SECRET, DIGITS) == ("expired", None)
    assert await store.peek(APP, made.id) is None
    with place.client() as client:
        client.pexpire(key, (LIFE + GRACE) * 1000)  # as after a restored snapshot
    for late in (SKEW, GRACE, 10 * GRACE):
        place.clock.ahead = LIFE + late
        assert await store.judge(APP, made.id, SECRET, DIGITS) == ("expired", None)
        assert await store.peek(APP, made.id) is None


async def test_a_dropped_code_is_unknown(place: Place) -> None:
    store, made = codes(place), await put(codes(place), code(place))
    await store.drop(OTHER, made.id)
    assert await store.peek(APP, made.id) == made
    for _ in range(2):
        await store.drop(APP, made.id)
        assert await store.judge(APP, made.id, SECRET, DIGITS) == GONE


async def test_a_code_of_newer_code_is_as_unknown(place: Place) -> None:
    store, made = codes(place), await put(codes(place), code(place))
    with place.client() as client:
        (key,) = client.keys("c:*")
        client.set(key, b"\x7f" + client.get(key)[1:], keepttl=True)
    assert await store.peek(APP, made.id) is None
    assert await store.judge(APP, made.id, SECRET, DIGITS) == GONE


# -- the store: many at once -----------------------------------------------------------------------


async def judged(place: Place, made: MailCode, guesses: list[str]) -> Counter[str]:
    """The verdicts on guesses made at once over five instances."""
    instances = [place.store() for _ in range(5)]
    await asyncio.gather(*(instance.check() for instance in instances))
    stores = [instance.mail_codes for instance in instances]
    answers = await asyncio.gather(
        *(stores[n % 5].judge(APP, made.id, SECRET, digits) for n, digits in enumerate(guesses))
    )
    return Counter(verdict for verdict, _ in answers)


async def test_of_50_right_guesses_one_succeeds(place: Place) -> None:
    made = await put(codes(place), code(place))
    assert await judged(place, made, [DIGITS] * 50) == {"right": 1, "unknown": 49}


async def test_of_50_wrong_guesses_no_more_are_judged_than_allowed(place: Place) -> None:
    made = await put(codes(place), code(place))
    assert await judged(place, made, [WRONG] * 50) == {
        "wrong": ATTEMPTS - 1,
        "exhausted": 1,
        "spent": 50 - ATTEMPTS,
    }


async def test_the_rate_is_exact_in_parallel(place: Place) -> None:
    stores = [codes(place) for _ in range(4)]
    waits = await asyncio.gather(*(wait_for(stores[n % 4], code(place)) for n in range(40)))
    assert waits.count(0) == PER_MAILBOX
    with place.client() as client:
        assert len(client.keys("c:*")) == PER_MAILBOX, "the refused ones left nothing"


# -- the store: the rate ---------------------------------------------------------------------------


async def test_the_rate_of_a_mailbox(place: Place) -> None:
    store = codes(place)
    begun = place.clock()
    for n in range(PER_MAILBOX):
        place.clock.ahead = 10.0 * n
        assert await wait_for(store, code(place)) == 0
    wait = await wait_for(store, code(place))
    assert WINDOW - 60 < wait <= WINDOW - 40 + 1
    assert await wait_for(store, code(place, email="aNN@EXAMPLE.org")) > 0, (
        "another spelling is no way round"
    )
    for other in ({"purpose": "sign-in"}, {"email": "bob@example.org"}, {"app_id": OTHER}):
        assert await wait_for(store, code(place, **other)) == 0
    await put(store, code(place))
    place.clock.ahead += wait
    assert place.clock() - begun > WINDOW
    assert await wait_for(store, code(place)) == 0, "the first one slid out of the window"
    assert 0 < await wait_for(store, code(place)) <= 10


async def test_the_rate_of_a_user(place: Place) -> None:
    """Of whatever purpose and mailbox; and codes whose rate nobody asked for don't count."""
    store = codes(place)
    for n in range(PER_USER):
        await put(store, code(place, external_id="ann"))
        made = code(place, external_id="ann", email=f"{n}@example.org", purpose=f"p{n}")
        assert await wait_for(store, made) == 0
    wait = await wait_for(store, code(place, external_id="ann", email="new@example.org"))
    assert WINDOW - 30 < wait <= WINDOW
    assert await wait_for(store, code(place, external_id="bob")) == 0
    assert await wait_for(store, code(place)) == 0


async def test_a_clock_that_was_set_back_makes_nobody_wait_longer(place: Place) -> None:
    store = codes(place)
    place.clock.ahead = 86_400
    for _ in range(PER_MAILBOX):
        assert await wait_for(store, code(place)) == 0
    place.clock.ahead = 0
    assert await wait_for(store, code(place)) == WINDOW


# -- the store: replacing, bounds, secrets ---------------------------------------------------------


async def test_a_new_code_may_replace_the_others(place: Place) -> None:
    """Of the same purpose: the user's where one is named, else the mailbox's, byte for byte."""
    store = codes(place)
    kinds = {
        "mailbox": code(place),
        "mailbox, user": code(place, external_id="ann"),
        "user": code(place, external_id="ann", email="other@example.org"),
        "other user": code(place, external_id="bob"),
        "other purpose": code(place, purpose="sign-in", external_id="ann"),
        "other spelling": code(place, email="ann@example.org"),
        "other app": code(place, app_id=OTHER, external_id="ann"),
    }

    async def left() -> set[str]:
        return {kind for kind, one in kinds.items() if await store.peek(one.app_id, one.id)}

    for one in kinds.values():
        await put(store, one)
    assert await left() == kinds.keys()
    made = await put(store, code(place, external_id="ann"), replace_others=True)
    assert await left() == kinds.keys() - {"mailbox, user", "user"}
    assert await store.peek(APP, made.id) == made
    await put(store, code(place), replace_others=True)
    assert await left() == {"other purpose", "other spelling", "other app"}
    assert await store.judge(APP, made.id, SECRET, DIGITS) == GONE


async def test_codes_are_bounded_and_end_by_themselves(place: Place) -> None:
    store = codes(place)
    made = []
    for n in range(3 * PENDING):
        place.clock.ahead = 0.1 * n
        made.append(await put(store, code(place, external_id="ann"), counted=n < 5))
    there = [one for one in made if await store.peek(APP, one.id)]
    assert there == made[-PENDING:], "the newest stay"
    with place.client() as client:
        keys = client.keys()
        assert len(keys) == PENDING + 4
        for key in keys:
            assert b"{%s}" % APP.encode() in key, "one slot of a cluster"
            assert 0 < client.pttl(key) <= max(LIFE + GRACE, WINDOW) * 1000
            if key.startswith((b"o:", b"w:")):
                assert client.zcard(key) <= PENDING
    place.clock.ahead = LIFE + 60
    await put(store, code(place, external_id="ann"))
    with place.client() as client:
        assert {client.zcard(key) for key in client.keys("o:*")} == {1}


async def test_a_dump_redeems_nothing(place: Place) -> None:
    """Id, secret and code are not there; what is there is none of them; and the digits' digest
    can't be found by trying them all, for it takes in the secret."""
    store, made = (
        codes(place),
        await put(codes(place), code(place, external_id="ann"), counted=True),
    )
    twin = code(place)
    assert await store.put(twin, SECRET + "x", DIGITS, counted=True, replace_others=False) == 0
    dump: list[bytes] = []
    stored: list[bytes] = []
    with place.client() as client:
        for key in client.keys("*"):
            dump.append(key)
            if key.startswith(b"c:"):
                value = client.get(key)
                content = value.index(b"|l|") + 3
                digests = [value[content : content + 32], value[content + 32 : content + 64]]
                assert hashlib.sha256(DIGITS.encode()).digest() not in value
                stored.append(digests[1])
                dump += [value, *digests]
            else:
                dump += client.zrange(key, 0, -1)
    assert len(stored) == len(set(stored)) == 2, "the same digits, another secret"
    assert not [word for word in dump if made.id.encode() in word or b"S" * 24 in word]
    for word in dump:
        for known in {
            word.decode("latin-1"),
            word.hex(),
            word.rpartition(b":")[2].decode("latin-1"),
        }:
            assert await store.judge(APP, made.id, known, DIGITS) == GONE
            assert await store.judge(APP, known, SECRET, DIGITS) == GONE
    assert (await store.judge(APP, made.id, SECRET, DIGITS))[0] == "right"


# -- the store: what can go wrong ------------------------------------------------------------------


@pytest.fixture
async def proxy(place: Place) -> AsyncIterator[RedisProxy]:
    """A proxy in front of the server, or of each node of the cluster."""
    assert place.server is not None
    async with redis_proxy(*place.server.doors) as made:
        yield made
        made.release.set()


@real
async def test_each_step_is_one_round_trip(place: Place, proxy: RedisProxy) -> None:
    store, made = place.store(through=proxy).mail_codes, code(place)
    for turn in range(2):  # the first one teaches the server the scripts
        proxy.commands.clear()
        await put(store, made, counted=True, replace_others=True)
        await store.peek(APP, made.id)
        await store.judge(APP, made.id, SECRET, WRONG)
        await store.drop(APP, made.id)
        if turn:
            assert [words[0] for words in proxy.commands] == [b"EVALSHA"] * 3 + [b"DEL"]


@real
@pytest.mark.parametrize("fate", [Fate.SWALLOW, Fate.CUT])
async def test_a_lost_reply_is_unavailable_and_nothing_is_sent_twice(
    place: Place, proxy: RedisProxy, fate: Fate
) -> None:
    """A guess whose verdict was lost has been counted, and a right one has spent the code."""
    # A limit in which a busy machine connects: each lost reply ends the connection, and the next
    # guess has to make one.
    store, near = place.store(through=proxy, timeout=1.5).mail_codes, codes(place)
    made = await put(store, code(place))
    await store.judge(APP, made.id, "", WRONG)
    for digits, left in ((WRONG, ATTEMPTS - 1), (DIGITS, None)):
        proxy.commands.clear()
        proxy.fate = of_command(fate, b"EVALSHA")
        with pytest.raises(Unavailable):
            await store.judge(APP, made.id, SECRET, digits)
        assert len(proxy.named(b"EVALSHA")) == 1
        proxy.fate = of_command(Fate.PASS, b"EVALSHA")
        found = await near.peek(APP, made.id)
        assert (found.attempts_left if found else None) == left
    assert place.failures("judge_mail_code") == 2


@real
async def test_a_full_server_judges_nothing(place: Place) -> None:
    """Where a guess can't be counted, right and wrong are alike."""
    store, made = codes(place), await put(codes(place), code(place))
    with place.client() as client:
        client.config_set("maxmemory", 1)
        for digits in (WRONG, DIGITS):
            with pytest.raises(Unavailable):
                await store.judge(APP, made.id, SECRET, digits)
        with pytest.raises(Unavailable):
            await put(store, code(place), counted=True)
        client.config_set("maxmemory", 0)
        assert len(client.keys()) == 2, "the refused one left nothing"
    assert await store.peek(APP, made.id) == made


# -- the Flex API's routes -------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"email": "ann@example.org", "purpose": "sign-up"}


def result(broker: Started, name: str, times: int = 1) -> Any:
    """Inside, so many mail codes end so."""
    return counted(broker, "broker_mail_codes_total", times, result=name)


async def create(wire: Wire, **fields: Any) -> dict[str, Any]:
    answer = await wire.keyed("POST", "/mail_codes", FIELDS | fields)
    assert answer.status == 201, answer.body
    made: dict[str, Any] = answer.json["mail_code"]
    return made


async def verify(wire: Wire, made: dict[str, Any], **changes: object) -> Answer:
    body = {"id": made["id"], "secret": made["secret"], "code": made["code"], **changes}
    return await wire.keyed("POST", "/mail_codes/verify", body)


def other(digits: str) -> str:
    """Another code."""
    return f"{(int(digits) + 1) % 1_000_000:06d}"


async def on_the_wire(
    wire: Wire, name: str, status: int, method: str, path: str, body: object = None
) -> Answer:
    headers = {"Authorization": f"Bearer {wire.key}"}
    answer = await golden(wire, f"flex/{name}", method, f"/mail_codes{path}", body, headers=headers)
    assert answer.status == status
    return answer


async def test_flex_golden_files(broker: Started, wire: Wire) -> None:
    clock = broker.clock() + 1
    broker.parts.mailbox._clock = lambda: (
        clock
    )  # stands still, so that Retry-After is the same every time
    names = {
        "all": "flex/mail-create",
        "few": "flex/mail-create-few",
        "rate": "flex/mail-rate",
        "get": "flex/mail-get",
        "get-unknown": "flex/mail-get-unknown",
        "wrong": "flex/mail-verify-wrong",
        "right": "flex/mail-verify",
        "again": "flex/mail-verify-again",
        "expired": "flex/mail-verify-expired",
        "exhausted": "flex/mail-verify-exhausted",
        "delete": "flex/mail-delete",
        "invalid": "flex/mail-create-invalid",
    }

    async def call(name: str, status: int, method: str, path: str, body: object = None) -> Answer:
        return await on_the_wire(wire, names[name].partition("/")[2], status, method, path, body)

    whole = FIELDS | {
        "external_id": "ann",
        "metadata": {"plan": "pro"},
        "invalidate_others": True,
        "skip_rate_limit": True,
    }
    with result(broker, "created", 1 + PER_MAILBOX):
        made = (await call("all", 201, "POST", "", whole)).json["mail_code"]
        few = (await call("few", 201, "POST", "", FIELDS)).json["mail_code"]
        for _ in range(PER_MAILBOX - 1):
            await create(wire)
    with (
        refused(broker, "mail_code_rate_limited", "mail_code_rate_limited"),
        result(broker, "limited"),
    ):
        await call("rate", 429, "POST", "", FIELDS)
    with (
        refused(broker, "invalid_request", "email"),
        quiet(broker, "broker_mail_codes_total", result="limited"),
    ):
        await call("invalid", 400, "POST", "", FIELDS | {"email": "ann"})

    await call("get", 200, "GET", f"/{made['id']}")
    with refused(broker, "mail_code_not_found", "mail_code_not_found"):
        await call("get-unknown", 404, "GET", "/" + "x" * 24)

    body = {"id": made["id"], "secret": made["secret"], "code": made["code"]}
    with refused(broker, "mail_code_wrong", "mail_code_wrong"), result(broker, "wrong"):
        await call("wrong", 401, "POST", "/verify", body | {"code": other(made["code"])})
    with result(broker, "verified"):
        await call("right", 200, "POST", "/verify", body)
    with refused(broker, "mail_code_not_found", "mail_code_not_found"), result(broker, "unknown"):
        await call("again", 404, "POST", "/verify", body)

    body = {"id": few["id"], "secret": few["secret"], "code": other(few["code"])}
    for _ in range(ATTEMPTS - 1):
        await verify(wire, few, code=body["code"])
    with (
        refused(broker, "mail_code_attempts_exceeded", "mail_code_attempts_exceeded"),
        result(broker, "exhausted"),
    ):
        await call("exhausted", 410, "POST", "/verify", body)
    await call("delete", 200, "DELETE", f"/{few['id']}")

    late = await create(wire, email="late@example.org")
    broker.clock.ahead += LIFE + SKEW + 1
    body = {"id": late["id"], "secret": late["secret"], "code": late["code"]}
    with refused(broker, "mail_code_expired", "mail_code_expired"), result(broker, "expired"):
        await call("expired", 410, "POST", "/verify", body)
    text = broker.stream.getvalue()
    assert not [
        word
        for word in (made["secret"], made["id"], late["secret"], "@example.org")
        if word in text
    ]
    assert lines(broker, route="/v1/apps/{app_id}/mail_codes/verify", status=200, app=wire.app_id)


async def test_what_a_code_looks_like(broker: Started, wire: Wire) -> None:
    seen = [await create(wire, skip_rate_limit=True) for _ in range(20)]
    for made in seen:
        assert re.fullmatch(r"[A-Za-z0-9]{24}", made["id"])
        assert re.fullmatch(r"pbm(_|-)[A-Za-z0-9]{24}(-[A-Za-z0-9]{24}){2}", made["secret"])
        assert re.fullmatch(r"[0-9]{6}", made["code"])
        assert (made["external_id"], made["metadata"]) == (None, None)
        assert made["attempts_left"] == ATTEMPTS
    for name in ("id", "secret"):
        assert len({made[name] for made in seen}) == 20
    assert len({made["code"] for made in seen}) > 10
    text = broker.stream.getvalue()
    assert not [made for made in seen if made["secret"] in text or made["id"] in text]
    assert "ann@example.org" not in text


async def test_the_message(broker: Started, session: Any) -> None:
    """Both forms are whole: whose code, what for, how long, what if unasked. A name can't break out
    of the HTML.
    """
    app, key = await broker.parts.directory.create_app(
        'Tom & "Ann" <b onload=x>', "example.org", ["https://example.org"]
    )
    made = await create(Wire(session, broker.url, app.id, key))
    html, text = made["message"]["html"], made["message"]["text"]
    assert "Tom &amp; &quot;Ann&quot; &lt;b onload=x&gt;" in html
    assert "<b onload" not in html
    assert app.name in text
    for form in (html, text):
        assert form.count(made["code"]) == 1
        assert made["secret"] not in form
        assert made["id"] not in form
        assert f"{LIFE // 60} minutes" in form
        assert "ignore this mail" in form
    assert not re.search(r"https?:|src=|href=|url\(|<script", html)


async def test_only_the_whole_of_id_secret_and_code_redeems(
    broker: Started, wire: Wire, open_app: OpenApp
) -> None:
    made, second = await create(wire), await create(wire)
    for changes in (
        {"id": second["id"]},
        {"secret": second["secret"]},
        {"secret": made["secret"].lower()},
        {"id": "x" * 24},
        {"id": "../" + made["id"]},
        {"id": made["id"] + "\n"},
    ):
        with (
            refused(broker, "mail_code_not_found", "mail_code_not_found"),
            result(broker, "unknown"),
        ):
            answer = await verify(wire, made, **changes)
        assert (answer.status, answer.code) == (404, "mail_code_not_found"), changes
    stranger = await open_app()
    same_answer(await verify(stranger, made), answer)
    assert (await stranger.keyed("GET", f"/mail_codes/{made['id']}")).status == 404
    assert (await stranger.keyed("DELETE", f"/mail_codes/{made['id']}")).status == 200
    assert (await verify(wire, made)).status == 200


@pytest.mark.parametrize(
    "typed",
    [
        "12345",
        "1234567",
        "12345a",
        " 123456",
        "123 456",
        "\uff11\uff12\uff13\uff14\uff15\uff16",
        "-12345",
        "0x1234",
    ],
)
async def test_what_is_not_six_digits_counts_nothing(
    broker: Started, wire: Wire, typed: str
) -> None:
    made = await create(wire)
    with refused(broker, "mail_code_wrong", "mail_code_form"), result(broker, "wrong"):
        answer = await verify(wire, made, code=typed)
    assert (answer.status, answer.code) == (401, "mail_code_wrong")
    assert (await wire.keyed("GET", f"/mail_codes/{made['id']}")).json["mail_code"][
        "attempts_left"
    ] == ATTEMPTS


@ON_BOTH
async def test_of_50_verifies_one_succeeds(
    broker: Started, start_broker: Starter, wire: Wire
) -> None:
    """Over two instances."""
    second = replace(wire, url=(await start_broker()).url)
    made = await create(wire)
    answers = await asyncio.gather(*(verify((wire, second)[n % 2], made) for n in range(50)))
    assert Counter(answer.status for answer in answers) == {200: 1, 404: 49}


async def test_guessing_a_known_users_code_is_an_event(broker: Started, wire: Wire) -> None:
    """Once; not for a user that the app does not know, nor for a code without one."""
    await wire.open_registration("ann")
    for external_id in ("ann", "nobody", None):
        made = await create(wire, external_id=external_id)
        with result(broker, "exhausted"), result(broker, "spent", 5 - 1):
            for _ in range(2 * ATTEMPTS - 1):
                answer = await verify(wire, made, code=other(made["code"]))
        assert (answer.status, answer.code) == (410, "mail_code_attempts_exceeded")
        told = [
            event for event in await broker.events(wire.app_id) if event[0].startswith("mail_code")
        ]
        assert told == [("mail_code.exhausted", "refused", "mail_code_attempts_exceeded")], (
            external_id
        )


async def test_invalidating_the_others(wire: Wire) -> None:
    first, second = await create(wire), await create(wire, external_id="ann", email="a@example.org")
    kept = await create(wire, purpose="sign-in")
    await create(wire, invalidate_others=True)
    await create(wire, external_id="ann", invalidate_others=True)
    assert [(await verify(wire, made)).status for made in (first, second, kept)] == [404, 404, 200]


LONG = "a" * 64 + "@" + "b" * 60 + "." + "c" * 60 + "." + "d" * 66
NO_TEXT: tuple[object, ...] = (1, True, [], {"a": 1})
GOOD: list[dict[str, Any]] = [
    {"email": "a@b.c"},
    {"email": "Ünï.cøde+tag@exämple.org"},
    {"email": "o'neil/x=y!#$%&*?^`{|}~-_@sub.example.org"},
    {"email": LONG + "e"},
    {"purpose": "A"},
    {"purpose": "az.AZ_09:-" + "x" * 54},
    {"external_id": "x" * 256},
    {"external_id": None, "metadata": None, "invalidate_others": None, "skip_rate_limit": None},
    {"external_id": ""},
    {"metadata": {}},
    {"metadata": {"a": "x" * 4088}},
    {"metadata": {"é": [None, 1.5, -1, {"b": False}]}},
    {"skip_rate_limit": False, "invalidate_others": False, "anything": [1]},
]
BAD: list[tuple[dict[str, Any], str]] = [
    *(
        ({"email": email}, "email")
        for email in (
            "ann",
            "ann@localhost",
            "@example.org",
            "ann@",
            "ann@example.",
            "ann@.org",
            "ann@exa..mple",
            "ann@@example.org",
            "a@b@example.org",
            "ann @example.org",
            "ann@example.org ",
            "ann@example.org\n",
            "ann@example.org\r\nBcc: all@example.org",
            "ann@example.org,bob@example.org",
            "a,b@example.org",
            "a;b@example.org",
            "Ann <ann@example.org>",
            '"ann"@example.org',
            "ann@[127.0.0.1]",
            "ann(x)@example.org",
            "ann\\x@example.org",
            "ann\u202e@example.org",
            "ann\u200b@example.org",
            "ann\u2028@example.org",
            LONG + "ee",
            "x" * 60_000,
        )
    ),
    *(({"email": value}, "field_type") for value in (None, *NO_TEXT)),
    ({"email": ""}, "empty_field"),
    *(
        ({"purpose": purpose}, "purpose")
        for purpose in (
            "x" * 65,
            "sign up",
            "sign/up",
            "signé",
            "a\n",
            "{x}",
            "a,b",
            "%41",
            "\u0661",
        )
    ),
    *(({"purpose": value}, "field_type") for value in (None, *NO_TEXT)),
    ({"purpose": ""}, "empty_field"),
    ({"external_id": "x" * 257}, "external_id"),
    *(({"external_id": value}, "field_type") for value in NO_TEXT),
    *(({"metadata": value}, "field_type") for value in ("x", 0, "", *NO_TEXT[:3])),
    ({"metadata": {"a": "x" * 4089}}, "metadata"),
    ({"metadata": {"a": "é" * 2045}}, "metadata"),
    ({"metadata": {"a": "\0"}}, "nul"),
    *(
        ({name: value}, "field_type")
        for name in ("invalidate_others", "skip_rate_limit")
        for value in ("true", 0, *NO_TEXT[2:])
    ),
]


async def test_good_input(wire: Wire) -> None:
    for fields in GOOD:
        made = await create(wire, **{"skip_rate_limit": True} | fields)
        found = (await verify(wire, made)).json["mail_code"]
        given = {
            k: v
            for k, v in fields.items()
            if k in ("email", "purpose", "metadata") and v is not None
        }
        assert {k: found[k] for k in given} == given


async def test_bad_input(broker: Started, wire: Wire) -> None:
    with quiet(broker, "broker_mail_codes_total", result="created"):
        for fields, reason in BAD:
            with refused(broker, "invalid_request", reason):
                answer = await wire.keyed("POST", "/mail_codes", FIELDS | fields)
            assert (answer.status, answer.code) == (400, "invalid_request"), fields
        for missing in FIELDS:
            with refused(broker, "invalid_request", "missing_field"):
                body = {name: value for name, value in FIELDS.items() if name != missing}
                assert (await wire.keyed("POST", "/mail_codes", body)).status == 400


@pytest.mark.parametrize("field", ["id", "secret", "code"])
async def test_a_verify_with_a_fault_of_form_spends_nothing(
    broker: Started, wire: Wire, field: str
) -> None:
    made = await create(wire)
    for value, reason in (
        *((value, "field_type") for value in (None, *NO_TEXT)),
        ("", "empty_field"),
    ):
        with refused(broker, "invalid_request", reason):
            assert (await verify(wire, made, **{field: value})).code == "invalid_request"
    answer = await verify(wire, made)
    assert answer.status == 200
    assert answer.json["mail_code"]["attempts_left"] == ATTEMPTS - 1


@pytest.mark.parametrize(
    "identifier", ["x", "x" * 25, "%00", "%ff", "a%2Fb", "%F0%9F%94%91", "x" * 4000]
)
async def test_ids_that_can_be_none(broker: Started, wire: Wire, identifier: str) -> None:
    answer = await wire.keyed("GET", f"/mail_codes/{identifier}")
    assert (answer.status, answer.code) == (404, "mail_code_not_found")
    assert (await wire.keyed("DELETE", f"/mail_codes/{identifier}")).status == 200


async def test_a_store_that_is_down(broker: Started, start_broker: Starter, wire: Wire) -> None:
    """503 with Retry-After, and nothing is made, judged or deleted. An event that can't be written
    changes no verdict.
    """
    made = await create(wire)
    nowhere = await start_broker(redis_url="redis://127.0.0.1:1")
    cut_off = replace(wire, url=nowhere.url)
    with refused(nowhere, "service_unavailable", "redis", times=4):
        for answer in (
            await cut_off.keyed("POST", "/mail_codes", FIELDS),
            await verify(cut_off, made),
            await cut_off.keyed("GET", f"/mail_codes/{made['id']}"),
            await cut_off.keyed("DELETE", f"/mail_codes/{made['id']}"),
        ):
            assert (answer.status, answer.code) == (503, "service_unavailable")
            assert answer.headers["Retry-After"] == "1"
    assert (await verify(wire, made)).status == 200


async def test_an_event_that_can_not_be_written(
    broker: Started, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await create(wire, external_id="ann")

    async def down(*_: object, **__: object) -> None:
        raise Unavailable(reason="postgres")

    monkeypatch.setattr(broker.parts.durable.users, "find", down)
    for _ in range(ATTEMPTS - 1):
        await verify(wire, made, code=other(made["code"]))
    with counted(broker, "broker_events_lost_total"), result(broker, "exhausted"):
        answer = await verify(wire, made, code=other(made["code"]))
    assert (answer.status, answer.code) == (410, "mail_code_attempts_exceeded")


async def test_results_are_from_a_fixed_set(broker: Started, wire: Wire) -> None:
    """Every result there is, and no label besides."""
    made = await create(wire)
    for fields in (FIELDS, FIELDS | {"email": "x"}, {}):
        for _ in range(PER_MAILBOX):
            await wire.keyed("POST", "/mail_codes", fields)
    for changes in ({"id": "?"}, {"code": "?"}, {"secret": "?"}, {"code": other(made["code"])}):
        for _ in range(ATTEMPTS + 1):
            await verify(wire, made, **changes)
    await verify(wire, second := await create(wire, purpose="sign-in"))
    broker.clock.ahead = LIFE + SKEW
    await verify(wire, made)
    assert (await verify(wire, second)).status == 404
    series = {
        tuple(sample.labels.items())
        for metric in broker.parts.metrics.registry.collect()
        if metric.name == "broker_mail_codes"
        for sample in metric.samples
    }
    assert series == {
        (("result", name),)
        for name in (
            "created",
            "limited",
            "verified",
            "wrong",
            "exhausted",
            "spent",
            "expired",
            "unknown",
        )
    }


def test_the_constants_are_those_that_the_docs_name() -> None:
    assert (LIFE, ATTEMPTS, WINDOW, PER_MAILBOX, PER_USER, PENDING, GRACE) == (
        600,
        5,
        900,
        5,
        10,
        10,
        600,
    )
