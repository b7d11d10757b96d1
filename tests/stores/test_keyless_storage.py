"""What callers without a key can store in Redis: at most `BOUND` bytes a request, on every route
that takes no key.

The router is walked, so a new route needs a case here. A case is the largest body that the route
accepts, filled up to the limit of a body with a field that nothing reads. Not measured is what a
keyed caller has asked for: a begin of a transaction that names hundreds of passkeys stores their
ids in the transaction's own value.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from broker.app import application
from broker.model import MAX_TEXT, Policy
from broker.tokens import SystemMint
from broker.web import access_of
from broker.web.body import MAX_BODY
from tests.conftest import OpenApp, Started
from tests.support import hanko, passlock
from tests.support.authenticator import Authenticator
from tests.support.hanko import Hanko
from tests.support.passlock import Passlock
from tests.support.servers import Valkey
from tests.support.signals import counted
from tests.support.wire import ORIGIN, RP_ID, Wire
from tests.web.test_guards import APP

BOUND = 6 * 1024  # bytes of the server's memory, with the names of keys
OPEN = Policy(passlock_open_registration=True, declared={"hanko_algorithm": "ES256"})
LONGEST = "\1" * MAX_TEXT  # a control character takes six bytes in JSON, more than any other
IDS = [SystemMint().id() for _ in range(20)]
LONGEST_CREDENTIAL_ID = 1023  # bytes, WebAuthn's limit

Body = dict[str, Any]
# Does what the request needs before it, as ann's backend and page; the largest body.
Case = Callable[[Wire, Authenticator], Awaitable[Body]]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server with few keys, for each measurement reads all of them."""
    started = Valkey.start(tmp_path_factory.mktemp("valkey"))
    yield started
    started.stop()


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    return valkey.url


async def _token(wire: Wire, kind: str) -> str:
    if kind == "register":
        return await wire.open_registration(LONGEST, LONGEST)
    return await wire.open_authentication(LONGEST)


def _starts(kind: str) -> Case:
    async def prepare(wire: Wire, _: Authenticator) -> Body:
        return {
            "transaction_id": await _token(wire, kind),
            "authenticator_attachment": "cross-platform",
        }

    return prepare


def _finishes(kind: str, *, named: bool = True) -> Case:
    async def prepare(wire: Wire, device: Authenticator) -> Body:
        transaction = await _token(wire, kind) if named else None
        handle, options = await wire.begin(kind, transaction)
        return {"handshake_id": handle, "handshake_response": _answer(kind, options, device)}

    return prepare


def _answer(kind: str, options: Body, device: Authenticator) -> Body:
    if kind.startswith("regist"):
        return Authenticator().register(
            options, ORIGIN, credential_id=os.urandom(LONGEST_CREDENTIAL_ID)
        )
    return device.authenticate(options, ORIGIN)


async def _nothing(_: Wire, __: Authenticator) -> Body:
    return {}


async def _exchanges(wire: Wire, _: Authenticator) -> Body:
    made = await wire.keyed("POST", "/signals/prune", {"external_id": LONGEST})
    return {"kind": "prune", "ticket": made.json["ticket"]}


async def _finalizes_registration(wire: Wire, device: Authenticator) -> Body:
    return _answer("registration", await Hanko(wire).begin_registration(LONGEST), device)


def _finalizes_login(**body: str) -> Case:
    async def prepare(wire: Wire, device: Authenticator) -> Body:
        return device.authenticate(await Hanko(wire).begin(**body), ORIGIN)

    return prepare


WISHES: Body = {"userVerification": "required", "timeout": 300_000}
# Values in front of which a route must stop, of every field that a page's body may have.
_IDS_OF_ANY_FORM = [f"{number:02}" + "\U0001f511" * 62 for number in range(100)]
TOO_LARGE: Body = {
    "allowCredentials": _IDS_OF_ANY_FORM,
    "excludeCredentials": _IDS_OF_ANY_FORM,
    "username": "\1" * (MAX_TEXT + 1),
    "displayName": "\1" * (MAX_TEXT + 1),
}
BY_ITSELF: dict[str, Body] = {
    "registration": {
        "username": LONGEST,
        "displayName": LONGEST,
        "excludeCredentials": IDS,
        **WISHES,
    },
    "authentication": {
        "allowCredentials": IDS,
        "rpId": RP_ID,
        "mediation": "conditional",
        **WISHES,
    },
}


async def _authorized(wire: Wire, kind: str) -> Body:
    if kind == "registration":
        return {"registrationToken": await Passlock(wire).authorize_registration("ann")}
    return {"authenticationToken": await Passlock(wire).authorize_authentication(LONGEST)}


def _passlock_begins(kind: str, *, token: bool) -> Case:
    async def prepare(wire: Wire, _: Authenticator) -> Body:
        return await _authorized(wire, kind) if token else BY_ITSELF[kind]

    return prepare


def _passlock_verifies(kind: str, *, token: bool) -> Case:
    async def prepare(wire: Wire, device: Authenticator) -> Body:
        body = (
            await _authorized(wire, kind)
            if token
            else {"username": LONGEST}
            if "reg" in kind
            else {}
        )
        session, options = await Passlock(wire).begin(kind, body)
        return {"sessionToken": session, "response": _answer(kind, options, device)}

    return prepare


def _passlock_exchanges(kind: str) -> Case:
    async def prepare(wire: Wire, _: Authenticator) -> Body:
        body = {"userId": "nobody", **({"username": LONGEST} if kind == "update" else {})}
        field = f"{kind}PasskeysToken"
        return {field: (await Passlock(wire).ok("POST", f"/passkeys/{kind}", body))[field]}

    return prepare


CASES: dict[str, list[Case]] = {
    f"{APP}/register/transactions/webauthn/start": [_starts("register")],
    f"{APP}/register/transactions/webauthn/finish": [_finishes("register")],
    f"{APP}/authenticate/transactions/webauthn/start": [_starts("authenticate"), _nothing],
    f"{APP}/authenticate/transactions/webauthn/finish": [
        _finishes("authenticate"),
        _finishes("authenticate", named=False),
    ],
    f"{APP}/signals/exchange": [_exchanges],
    f"{hanko.TENANT}/registration/finalize": [_finalizes_registration],
    f"{hanko.TENANT}/login/initialize": [_nothing],
    f"{hanko.TENANT}/login/finalize": [_finalizes_login(), _finalizes_login(user_id=LONGEST)],
}
for _tenancy in ("/v2/{app_id}", "/{app_id}"):
    for _kind in ("registration", "authentication"):
        CASES |= {
            f"{_tenancy}/passkey/{_kind}/options": [
                _passlock_begins(_kind, token=token) for token in (True, False)
            ],
            f"{_tenancy}/passkey/{_kind}/verification": [
                _passlock_verifies(_kind, token=token) for token in (True, False)
            ],
        }
CASES |= {
    f"/v2/{{app_id}}/passkeys/{kind}/exchange": [_passlock_exchanges(kind)]
    for kind in ("update", "delete", "prune")
}


async def test_a_keyless_request_stores_little(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app(OPEN)
    nonce = await wire.register(
        await wire.open_registration(LONGEST),
        device,
        credential_id=os.urandom(LONGEST_CREDENTIAL_ID),
    )
    assert (await wire.redeem(nonce)).status == 200
    stored: dict[tuple[str, str, int], int] = {}
    for route in application(broker.parts, management=True, browser=True).router.routes():
        assert route.resource is not None
        if access_of(route.handler) == "key":
            continue
        method, template = route.method, route.resource.canonical
        assert method in ("GET", "HEAD", "OPTIONS", "POST", "*"), template
        url = passlock.filled(template, wire)
        if method == "*":  # paths whose app id is none: refused whatever is sent
            method, url = "POST", wire.url + template.replace("{app_id}", "none")
            assert await _grows(broker, wire, method, url, _filled_up({}), refused=True) == 0
        elif method == "POST":
            *_, last = CASES[template]
            for number, case in enumerate(CASES[template]):
                body = _filled_up(await case(wire, device))
                stored[method, template, number] = await _grows(broker, wire, method, url, body)
            for field, value in TOO_LARGE.items():  # whether it is refused or not
                raw = orjson.dumps(await last(wire, device) | {field: value})
                grown = await _grows(broker, wire, method, url, raw, refused=None)
                stored[method, f"{template} {field}", 0] = grown
        else:  # without a body
            stored[method, template, 0] = await _grows(broker, wire, method, url, None)
    assert max(stored.values()) > 1024, "what is stored was seen"
    assert {call: size for call, size in stored.items() if size > BOUND} == {}


async def _grows(
    broker: Started,
    wire: Wire,
    method: str,
    url: str,
    body: bytes | None,
    *,
    refused: bool | None = False,
) -> int:
    """By how many bytes a request makes the stored values grow; one with a body must succeed, or be
    refused, or (None) either.
    """
    before = await _memory(broker)
    answer = await wire.send(method, url, data=body, headers={"Origin": ORIGIN})
    if body is not None and refused is not None:
        assert (answer.status >= 400) == refused, (url, answer.body)
    after = await _memory(broker)
    return sum(max(0, size - before.get(name, 0)) for name, size in after.items())


def _filled_up(body: Body) -> bytes:
    """The body with a field that nothing reads, as large as a body may be."""
    empty = len(orjson.dumps({**body, "padding": ""}))
    return orjson.dumps({**body, "padding": "x" * (MAX_BODY - empty)})


async def _memory(broker: Started) -> dict[bytes, int]:
    """What each key of the server takes."""
    async with Redis.from_url(broker.parts.settings.redis_url) as redis:
        names = [name async for name in redis.scan_iter(count=1000)]
        asked = redis.pipeline(transaction=False)
        for name in names:
            asked.memory_usage(name, samples=0)
        sizes = await asked.execute()
    return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}


@pytest.mark.parametrize("field", ["allowCredentials", "excludeCredentials"])
@pytest.mark.parametrize(
    "ids",
    [
        [*IDS, SystemMint().id()],
        ["x" * 23],
        ["x" * 25],
        ["\U0001f511" * 24],
        ["é" * 24],
        [" " * 24],
    ],
)
async def test_a_page_names_at_most_20_passkeys_by_their_ids(
    broker: Started, open_app: OpenApp, field: str, ids: list[str]
) -> None:
    page = Passlock(await open_app(OPEN), "")
    kind = "authentication" if field == "allowCredentials" else "registration"
    who: Body = {} if field == "allowCredentials" else {"username": "ann"}
    path = f"/passkey/{kind}/options"
    before = await _memory(broker)
    with counted(broker, "broker_refusals_total", code="invalid_request", reason="field_type"):
        answer = await page.page(path, {**who, field: ids})
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    assert field in answer.json["message"]
    assert (await _memory(broker)).keys() <= before.keys(), "nothing begins"
    assert (await page.page(path, {**who, field: IDS})).status == 200
