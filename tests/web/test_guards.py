"""Who may call a route: the router of each port, walked and compared with an explicit list; keys
before bodies; origins and CORS.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from aiohttp import web
from redis.asyncio import Redis

from broker import __version__
from broker.app import application
from broker.model import Policy
from broker.web import access_of
from tests.conftest import OpenApp, Started, Starter
from tests.support import hanko, passlock
from tests.support.authenticator import Authenticator
from tests.support.servers import eventually
from tests.support.signals import lines, refused, same_answer
from tests.support.wire import ORIGIN, RP_ID, Wire

APP = "/v1/apps/{app_id}"
ANYBODY = {
    ("GET", APP),
    ("GET", APP + "/"),
    ("OPTIONS", APP),
    ("OPTIONS", APP + "/"),
    *((method, f"/health/{name}") for name in ("live", "ready") for method in ("GET", "HEAD")),
    *(
        (method, f"{folder}/passkey.{kind}")
        for folder in ("/sdk", f"/sdk/{__version__}")
        for kind in ("js", "d.ts")
        for method in ("GET", "HEAD")
    ),
}
PAGES = {
    (method, f"{APP}/{kind}/transactions/webauthn/{step}")
    for method in ("POST", "OPTIONS")
    for kind in ("register", "authenticate")
    for step in ("start", "finish")
}
PAGES |= {(method, APP + "/signals/exchange") for method in ("POST", "OPTIONS")}
KEYED = {
    ("POST", APP + "/transactions/register"),
    ("POST", APP + "/transactions/authenticate"),
    ("POST", APP + "/transactions/cancel"),
    ("POST", APP + "/authenticate/verify"),
    ("GET", APP + "/users"),
    ("GET", APP + "/users/{user_id}"),
    ("GET", APP + "/users/{user_id}/devices"),
    ("DELETE", APP + "/users/{user_id}/devices/{device_id}"),
}
KEYED |= {
    ("POST", f"{APP}/{kind}/{step}")
    for kind in ("register", "authenticate")
    for step in ("start", "finish")
}
KEYED |= {
    ("POST", f"{APP}/ceremonies/{kind}/{step}")
    for kind in ("register", "authenticate")
    for step in ("start", "finish")
}
KEYED |= {("POST", f"{APP}/signals/{kind}") for kind in ("update", "delete", "prune")}
KEYED |= {
    ("GET", APP + "/passkeys"),
    ("GET", APP + "/passkeys/{passkey_id}"),
    ("PATCH", APP + "/passkeys/{passkey_id}"),
    ("DELETE", APP + "/passkeys/{passkey_id}"),
    ("POST", APP + "/passkeys/{passkey_id}/owner"),
    ("PATCH", APP + "/users/{user_id}"),
    ("POST", APP + "/users/{user_id}/disable"),
    ("POST", APP + "/users/{user_id}/enable"),
    ("GET", APP + "/users/{user_id}/approvals"),
    ("GET", APP + "/events"),
}
KEYED |= {
    ("POST", APP + "/mail_codes"),
    ("POST", APP + "/mail_codes/verify"),
    ("GET", APP + "/mail_codes/{mail_code_id}"),
    ("DELETE", APP + "/mail_codes/{mail_code_id}"),
}
KEYED_ALONE = {("POST", "/propelauth/run-command")}
START = "/authenticate/transactions/webauthn/start"
HEALTH = {(method, f"/health/{name}") for name in ("live", "ready") for method in ("GET", "HEAD")}
METRICS = {("GET", "/metrics")}
OTHERS_KEYED = passlock.KEYED.keys() | hanko.KEYED  # looked into in tests of their own
OTHERS_PAGES = passlock.PAGES | hanko.PAGES
KEY_SETS = passlock.KEY_SETS | hanko.KEY_SETS | {("GET", APP + "/.well-known/jwks.json")}


def guards(app: web.Application) -> dict[str | None, set[tuple[str, str]]]:
    """The routes of an application by how they are guarded."""
    found: dict[str | None, set[tuple[str, str]]] = {}
    for route in app.router.routes():
        assert route.resource is not None
        place = (route.method, route.resource.canonical)
        found.setdefault(access_of(route.handler), set()).add(place)
    return found


async def test_one_port_for_everything(broker: Started) -> None:
    found = guards(application(broker.parts, management=True, browser=True))
    assert found == {
        "key": KEYED | KEYED_ALONE | OTHERS_KEYED,
        "browser": PAGES | OTHERS_PAGES,
        "public": ANYBODY
        | KEY_SETS
        | passlock.ICONS
        | passlock.NOT_OF_KEYS
        | passlock.NOT_OF_PAGES,
    }


async def test_public_metrics_are_one_route_more(start_broker: Starter, broker: Started) -> None:
    public = await start_broker(metrics="public")
    without = guards(application(broker.parts, management=True, browser=True))
    assert guards(application(public.parts, management=True, browser=True)) == {
        **without,
        "public": without["public"] | METRICS,
    }
    assert guards(application(public.parts, management=False, browser=True)) == guards(
        application(broker.parts, management=False, browser=True)
    )


async def test_the_public_port_has_no_keyed_route(broker: Started) -> None:
    found = guards(application(broker.parts, management=False, browser=True))
    assert found == {
        "browser": PAGES | OTHERS_PAGES,
        "public": ANYBODY | KEY_SETS | passlock.ICONS | passlock.NOT_OF_PAGES,
    }


async def test_the_management_port_has_no_page(broker: Started) -> None:
    found = guards(application(broker.parts, management=True, browser=False))
    keyed_here = {
        ("GET", APP),
        ("GET", APP + "/"),
        *(place for place in hanko.PAGES if place[0] == "POST"),
    }
    assert found == {
        "key": KEYED | KEYED_ALONE | OTHERS_KEYED | keyed_here,
        "public": {place for place in KEY_SETS if place[0] == "GET"}
        | (HEALTH | METRICS | passlock.NOT_OF_KEYS),
    }


def test_a_route_without_a_guard_is_seen() -> None:
    async def forgotten(_: web.Request) -> web.StreamResponse:
        return web.Response()

    app = web.Application()
    app.router.add_get("/open", forgotten, allow_head=False)
    assert guards(app) == {None: {("GET", "/open")}}


def filled(template: str, wire: Wire) -> str:
    path = template.replace("{app_id}", wire.app_id)
    path = path.replace("{user_id}", "u" * 24).replace("{device_id}", "d" * 24)
    return wire.url + path.replace("{mail_code_id}", "m" * 24).replace("{passkey_id}", "p" * 24)


@pytest.mark.parametrize(("method", "template"), sorted(KEYED))
async def test_the_key_is_checked_before_anything_else(
    broker: Started, wire: Wire, open_app: OpenApp, method: str, template: str
) -> None:
    """Garbage, a body too large, a compressed one, an unknown user: without a key nobody gets to
    know about any of it.
    """
    other = await open_app()
    url = filled(template, wire)
    first = None
    for headers in ({}, {"Authorization": f"Bearer {other.key}"}):
        reason = "key_of_another_app" if headers else "key_missing"
        for body, encoding in (
            (b"{", None),
            (b"\xff" * 100, None),
            (b" " * 70_000, None),
            (b"x", "gzip"),
            (b"", None),
        ):
            more = headers | ({"Content-Encoding": encoding} if encoding else {})
            with refused(broker, "invalid_access_token", reason):
                answer = await wire.send(method, url + "?limit=nonsense", data=body, headers=more)
            assert (answer.status, answer.code) == (401, "invalid_access_token")
            first = first or answer
            same_answer(first, answer)


@pytest.mark.parametrize(("method", "path"), sorted(KEYED_ALONE))
async def test_a_key_that_names_the_app_is_checked_before_anything_else(
    broker: Started, wire: Wire, method: str, path: str
) -> None:
    await broker.parts.directory.revoke_key(
        wire.app_id, (await broker.parts.directory.keys(wire.app_id))[0].id
    )
    for headers, reason in (
        ({}, "key_missing"),
        ({"Authorization": "Bearer x"}, "key_malformed"),
        ({"Authorization": f"Bearer {wire.key}"}, "key_unknown"),
    ):
        first = None
        for body, encoding in ((b"{", None), (b" " * 70_000, None), (b"x", "gzip"), (b"", None)):
            more = headers | ({"Content-Encoding": encoding} if encoding else {})
            with refused(broker, "invalid_access_token", reason):
                answer = await wire.send(method, wire.url + path, data=body, headers=more)
            assert answer.status == 401
            first = first or answer
            same_answer(first, answer)


async def test_an_unknown_app_is_as_unknown_as_a_wrong_key(broker: Started, wire: Wire) -> None:
    for method, template in sorted(KEYED):
        with refused(broker, "invalid_access_token", "key_of_another_app"):
            unknown = await wire.send(
                method,
                filled(template, Wire(wire.session, wire.url, "x" * 24, "")),
                headers={"Authorization": f"Bearer {wire.key}"},
            )
        with refused(broker, "invalid_access_token", "key_missing"):
            same_answer(unknown, await wire.send(method, filled(template, wire)))


async def test_a_key_that_is_remembered_opens_nothing_more(
    broker: Started, wire: Wire, open_app: OpenApp
) -> None:
    other = await open_app()
    for known in (wire, other):
        assert (await known.keyed("GET", "/users")).status == 200
    for header, reason in (
        (f"Bearer {other.key}", "key_of_another_app"),
        (f"Bearer {wire.key}x", "key_unknown"),
        (f"Bearer {wire.key}\u00e9", "key_malformed"),
        (f"Bearer {wire.key} {wire.key}", "key_malformed"),
        (f"Basic {wire.key}", "key_missing"),
        ("Bearer ", "key_missing"),
        (wire.key, "key_missing"),
    ):
        with refused(broker, "invalid_access_token", reason):
            assert (
                await wire.send("GET", "/users", headers={"Authorization": header})
            ).status == 401
    for scheme in ("Bearer ", "bearer ", "BEARER ", "Bearer  "):
        assert (
            await wire.send("GET", "/users", headers={"Authorization": scheme + wire.key})
        ).status == 200


@dataclass(frozen=True)
class Guarded:
    """A route of one guard: its path, where its key stands, and a body that would change
    something.
    """

    path: str
    body: dict[str, object]
    key_in: str = "Authorization"


# Each guard, with a begin of each API: it makes a user, a transaction or a pending ceremony.
GUARDED = {
    "keyed": Guarded(
        APP + "/transactions/register", {"external_id": "new", "passkey_display_name": "New"}
    ),
    "keyed-flex-ceremony": Guarded(
        APP + "/ceremonies/register/start", {"external_id": "new", "user_name": "new"}
    ),
    "keyed-hanko": Guarded(
        hanko.TENANT + "/registration/initialize", {"user_id": "new", "username": "new"}, "apiKey"
    ),
    "hanko-login": Guarded(hanko.TENANT + "/login/initialize", {"user_id": "ann"}, "apiKey"),
    "keyed-passlock": Guarded(
        "/v2/{app_id}/passkey/registration/authorize",
        {"rpId": RP_ID, "userId": "new", "username": "new"},
    ),
    "keyed_alone": Guarded(
        "/propelauth/run-command",
        {
            "command": "StartPasskeyRegistration",
            "data": {"userId": "new", "emailOrUsername": "new"},
        },
    ),
}


@pytest.mark.parametrize("name", GUARDED)
async def test_a_key_that_is_revoked_while_the_body_comes(
    broker: Started, wire: Wire, device: Authenticator, name: str
) -> None:
    """The guard looks at the key before the body is read. After a slow body it looks again, so the
    request does nothing.
    """
    guarded, arrived = GUARDED[name], asyncio.Event()
    await wire.user("ann", device)
    directory, app = broker.parts.directory, await broker.parts.directory.app(wire.app_id)
    key, secret = await directory.create_key(app.id, "revoked soon")
    raw = orjson.dumps(guarded.body)

    async def slowly() -> AsyncIterator[bytes]:
        yield raw[:9]
        await arrived.wait()
        yield raw[9:]

    async def request() -> tuple[int, bytes]:
        bearer = f"Bearer {secret}" if guarded.key_in == "Authorization" else secret
        headers = {guarded.key_in: bearer, "Content-Type": "application/json"}
        url = filled(guarded.path, wire)
        async with wire.session.post(url, data=slowly(), headers=headers) as response:
            return response.status, await response.read()

    def looks() -> float:
        return sum(
            broker.metric("broker_store_seconds_count", store="postgres", operation=operation)
            for operation in ("key", "app")
        )

    before, seen = await _stored(broker), looks()
    with refused(broker, "invalid_access_token", "key_unknown"):
        running = asyncio.create_task(request())
        await eventually(
            lambda: looks() >= seen + 1 + (name != "hanko-login"), "the guard has looked"
        )
        await directory.revoke_key(app.id, key.id)
        await asyncio.sleep(0.15)  # a body that takes longer than 0.1 s is slow
        arrived.set()
        status, body = await running
    assert status == (403 if "passlock" in name else 401), body
    assert await _stored(broker) - before == set(), "nothing begins"
    users, _ = await directory.users(app, limit=10, page=1, external_id="new")
    assert users == []


async def _stored(broker: Started) -> set[bytes]:
    """The names of all one-time values."""
    async with Redis.from_url(broker.parts.settings.redis_url) as redis:
        return {name async for name in redis.scan_iter()}


# -- two ports -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_with_a_management_port(
    start_broker: Starter, session: Any, device: Authenticator
) -> None:
    """Keys work on one port, pages on the other, and a whole sign-in goes over both."""
    started = await start_broker(management_port=free_port())
    service = started.service
    assert service.management_port != service.port
    public = await Wire.open(service, session)
    management = Wire(
        session, f"http://127.0.0.1:{service.management_port}", public.app_id, public.key
    )
    for method, template in sorted(KEYED):
        with refused(started, "not_found", "not_found"):
            answer = await public.send(
                method, filled(template, public), headers={"Authorization": f"Bearer {public.key}"}
            )
        assert (answer.status, answer.code) == (404, "not_found")
    for method, template in sorted(PAGES):
        with refused(started, "not_found", "not_found"):
            assert (await management.send(method, filled(template, management))).status == 404
    for method, path in sorted(KEYED_ALONE):
        with refused(started, "not_found", "not_found"):
            answer = await public.send(
                method, public.url + path, headers={"Authorization": f"Bearer {public.key}"}
            )
        assert answer.status == 404
    key = {"Authorization": f"Bearer {public.key}"}
    assert "rsa_public_key" not in (await public.send("GET", "", headers=key)).json["app"]
    assert "rsa_public_key" in (await management.send("GET", "", headers=key)).json["app"]
    with refused(started, "invalid_access_token", "key_missing"):
        assert (await management.send("GET", "")).status == 401
    with refused(started, "not_found", "not_found"):
        assert (await public.send("GET", public.url + "/metrics")).status == 404
    assert (await public.send("GET", management.url + "/metrics")).status == 200

    transaction = await management.open_registration("ann")
    nonce = await public.register(transaction, device)
    assert (await management.redeem(nonce, purpose="register")).json["external_id"] == "ann"
    nonce = await public.authenticate(None, device)
    assert (await management.redeem(nonce)).json["external_id"] == "ann"
    assert started.metric("broker_redemptions_total", result="ok") == 2


# -- origins ---------------------------------------------------------------------------------------


STRANGERS = [
    "https://evil.example",
    "null",
    "",
    "http://example.org",
    "https://example.org:8443",
    "https://sub.example.org",
    "https://example.org.evil.example",
    "https://example.org/",
    "HTTPS://EXAMPLE.ORG",
    "https://example.org, https://evil.example",
    "android:apk-key-hash:" + "k" * 43,
    "\xff",
]


@pytest.mark.parametrize("origin", STRANGERS)
async def test_an_origin_that_is_not_registered(
    broker: Started, open_app: OpenApp, origin: str
) -> None:
    """403 before the body is looked at, on every page route. What of it a page may read:
    `test_refused_origins`.
    """
    wire = await open_app(origins=(ORIGIN, "android:apk-key-hash:" + "k" * 43))
    for method, template in sorted(PAGES):
        if method == "OPTIONS":
            continue
        with refused(broker, "operation_not_allowed", "origin"):
            answer = await wire.send(
                method, filled(template, wire), data=b"{", headers={"Origin": origin}
            )
        assert (answer.status, answer.code) == (403, "operation_not_allowed")


async def test_a_registered_origin_and_none(broker: Started, open_app: OpenApp) -> None:
    """Echoed with Vary, never with credentials; native apps send none and pass."""
    wire = await open_app(origins=(ORIGIN, "https://app.example.org:8443"))
    for origin in (ORIGIN, "https://app.example.org:8443"):
        for method, template in sorted(PAGES):
            answer = await wire.send(
                method, filled(template, wire), data=b"{}", headers={"Origin": origin}
            )
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Vary"] == "Origin"
            assert "Access-Control-Allow-Credentials" not in answer.headers
    answer = await wire.page(START, {}, origin=None)
    assert answer.status == 200
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert (
        broker.metric("broker_refusals_total", code="operation_not_allowed", reason="origin") == 0
    )


async def test_related_origins_are_pages_too(broker: Started, session: Any) -> None:
    app, _ = await broker.parts.directory.create_app(
        "Example", "example.org", [ORIGIN], related_origins=["https://example.com"]
    )
    wire = Wire(session, broker.url, app.id, "")
    answer = await wire.page(START, {}, origin="https://example.com")
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (
        200,
        "https://example.com",
    )
    assert lines(broker, status=200, app=app.id)


async def test_the_public_subset_may_be_read_from_anywhere(broker: Started, wire: Wire) -> None:
    for headers in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        answer = await wire.send("GET", "", headers=headers)
        assert answer.status == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert set(answer.json["app"]) == {
            "id",
            "name",
            "type",
            "rp_id",
            "auth_origin",
            "additional_auth_origins",
        }
    with refused(broker, "app_not_found", "app_not_found"):
        nobody = Wire(wire.session, wire.url, "x" * 24, "")
        assert (await nobody.send("GET", "")).status == 404


async def test_management_answers_carry_no_cors_headers(broker: Started, wire: Wire) -> None:
    """A key does not belong in a page: a browser can't read what a keyed route answers."""
    headers = {"Origin": ORIGIN, "Authorization": f"Bearer {wire.key}"}
    for path in ("/users", ""):
        answer = await wire.send("GET", path, headers=headers)
        assert answer.status == 200
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    with refused(broker, "method_not_allowed", "method_not_allowed"):
        preflight = await wire.send("OPTIONS", "/users", headers={"Origin": ORIGIN})
    assert preflight.status == 405


# -- the cap of open ceremonies --------------------------------------------------------------------


async def test_the_cap_stops_strangers_only(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    """Above it 429 with Retry-After; keyed routes, begins with a transaction and other apps go on,
    and a finish makes room.
    """
    wire = await open_app(Policy(discoverable_limit=2))
    await wire.user("ann", device)
    handle, options = await wire.begin("authenticate", None)
    await wire.begin("authenticate", None)
    for _ in range(3):
        with refused(broker, "too_many_requests", "discoverable_limit"):
            answer = await wire.page(START, {})
        assert (answer.status, answer.code) == (429, "too_many_requests")
        assert answer.headers["Retry-After"].isdigit()
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    await wire.begin("register", await wire.open_registration("bob"))
    for body in ({"discoverable": True}, {"external_id": "ann"}):
        assert (await wire.keyed("POST", "/ceremonies/authenticate/start", body)).status == 200
    nonce = await wire.authenticate(await wire.open_authentication("ann"), device)
    assert (await wire.redeem(nonce)).status == 200
    await (await open_app()).begin("authenticate", None)
    assert (
        await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    ).status == 200
    await wire.begin("authenticate", None)


async def test_the_cap_holds_for_many_at_once(broker: Started, open_app: OpenApp) -> None:
    wire = await open_app(Policy(discoverable_limit=10))
    with refused(broker, "too_many_requests", "discoverable_limit", times=30):
        answers = await asyncio.gather(*(wire.page(START, {}) for _ in range(40)))
    assert sorted(answer.status for answer in answers) == [200] * 10 + [429] * 30


# -- callers without a key -------------------------------------------------------------------------


async def test_callers_without_a_key_learn_nothing_about_users(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    """An app with users and passkeys, and an empty one, answer a page's guesses with the same
    bytes.
    """
    empty = await open_app()
    await wire.user("ann", device)
    transaction = await wire.open_registration("ann")
    response = {"id": "YQ", "rawId": "YQ", "type": "public-key", "response": {}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (
            f"/{kind}/transactions/webauthn/start",
            {"transaction_id": "pbt_" + "a" * 43, "external_id": "ann"},
        )
        for kind in ("register", "authenticate")
    ]
    bodies += [
        (
            f"/{kind}/transactions/webauthn/finish",
            {"handshake_id": given, "handshake_response": response},
        )
        for kind in ("register", "authenticate")
        for given in ("pbh_" + "a" * 43, transaction)
    ]
    for path, body in bodies:
        same_answer(await wire.page(path, body), await empty.page(path, body))
    both = [(await one.page(START, {})).json["handshake"] for one in (wire, empty)]
    shapes = [
        (
            len(one["id"]),
            set(one["challenge"]["publicKey"]),
            len(one["challenge"]["publicKey"]["challenge"]),
        )
        for one in both
    ]
    assert shapes[0] == shapes[1]
    assert not lines(broker, status=500)


async def test_a_key_changes_nothing_on_page_routes(broker: Started, wire: Wire) -> None:
    body = {"transaction_id": "pbt_" + "a" * 43}
    with refused(broker, "transaction_not_found", "transaction_unknown", times=3):
        bare = await wire.page(START, body)
        for key in (wire.key, "wrong"):
            headers = {"Authorization": f"Bearer {key}", "Origin": ORIGIN}
            same_answer(bare, await wire.send("POST", START, json=body, headers=headers))
