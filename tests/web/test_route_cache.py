"""The route cache (`broker.web.route_cache`): what it remembers is what the router says."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import UrlMappingMatchInfo

from broker.app import application
from broker.demo import demo_app
from broker.tokens import SystemMint
from broker.web import json_answer
from broker.web.answer import as_response
from broker.web.body import Incoming
from broker.web.route_cache import CAPACITY, LONGEST_PATH, RouteCache
from tests.conftest import Started
from tests.support.wire import Wire
from tests.web.test_server import request

MINT = SystemMint()
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND")
IDS = ("a" * 24, "Z" * 24, "0" * 24, "passkeysUsersPrincipal12", "A1b2C3d4E5f6G7h8I9j0K1l2")
LOGIN = [
    f"/v1/apps/{{}}/{path}"
    for path in (
        "transactions/authenticate",
        "authenticate/transactions/webauthn/start",
        "authenticate/transactions/webauthn/finish",
        "authenticate/verify",
    )
]
# What may be done to a well-formed path, so that it is another or is written in another way.
CHANGES = (
    "{}/",
    "{}//",
    "/{}",
    "{}?",
    "{}?a=b",
    "{}#a",
    "{}%20",
    "{}/..",
    "{}/.",
    "/.{}",
    "{};a",
    "{}x",
    "http://passkeys.example{}",
    "{}\xe9",
)
# Ids that are none, in place of one.
NO_IDS = (
    "",
    "a",
    "a" * 23,
    "a" * 25,
    "a" * 48,
    "%61" + "a" * 23,
    "a" * 23 + "%61",
    "a" * 12 + "%2F" + "a" * 11,
    "a" * 23 + "_",
    "a" * 23 + ".",
    "\u0663" * 24,  # digits, and no ASCII
    "\u00e9" * 12,  # 24 bytes
    "\u00e9" * 24,
    "..",
    "a" * 22 + "..",
    "{app_id}",
    "*",
)


class Found(NamedTuple):
    """What a request leads to: handler (where the router refuses, the status), template and
    variables.
    """

    handler: object
    template: str
    variables: dict[str, str]


class Reader:
    """Reads requests as the server's own parser does."""

    def __call__(self, method: str, path: str) -> Incoming | None:
        """The request; None for what is not HTTP."""
        loop = asyncio.get_running_loop()
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16)
        try:
            ((message, body),), _, _ = parser.feed_data(
                request(method, "{}").replace(b"{}", path.encode())
            )
        except HttpProcessingError:
            return None
        peer = SimpleNamespace(ssl_context=None, peername=None, sockname=None)
        nothing: Any = None
        return Incoming(message, body, cast("Any", peer), nothing, nothing, loop)


def found(match: UrlMappingMatchInfo) -> Found:
    if match.http_exception is not None:
        return Found(match.http_exception.status, "unmatched", {})
    assert match.route.resource is not None
    return Found(match.handler, match.route.resource.canonical, dict(match))


async def by_router(app: web.Application, asked: web.Request) -> Found:
    return found(await app.router.resolve(asked))


async def by_cache(cache: RouteCache, asked: web.Request) -> Found:
    """As the edge asks it; the second answer is remembered where that is allowed."""
    first = cache.find(asked) or await cache.resolve(asked)
    again = cache.find(asked)
    assert (again is first) == is_kept(asked, first.match)
    told = found(first.match)
    assert told.template == first.template
    return told


def is_kept(asked: web.Request, match: UrlMappingMatchInfo) -> bool:
    return match.http_exception is None and len(match) < 2 and len(asked.raw_path) <= LONGEST_PATH


def filled(template: str, *identifiers: str) -> str:
    """The template with these in place of its variables, over and over."""
    values = itertools.cycle(identifiers)
    return re.sub(r"\{\w+\}", lambda _: next(values), template)


def templates(app: web.Application) -> dict[str, set[str]]:
    """Each template, and its methods."""
    found: dict[str, set[str]] = {}
    for route in app.router.routes():
        assert route.resource is not None
        found.setdefault(route.resource.canonical, set()).add(route.method)
    return found


@pytest.fixture(params=["one port", "pages", "management", "dev"])
def app(broker: Started, tmp_path: Path, wire: Wire, param: str) -> web.Application:
    """The real application, as each port has it."""
    subapps = {}
    if param == "dev":
        subapps["/demo/"] = demo_app(
            broker_url=broker.url, app_id=wire.app_id, api_key=wire.key, data=tmp_path, origins=[]
        )
    return application(
        broker.parts, management=param != "pages", browser=param != "management", subapps=subapps
    )


@pytest.fixture
def param(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["app"])


@pytest.fixture
def cache(app: web.Application) -> RouteCache:
    return RouteCache(app)


@pytest.fixture
def sent() -> Reader:
    return Reader()


async def test_every_route_of_every_port(
    app: web.Application, cache: RouteCache, sent: Reader
) -> None:
    """By every method, the second time as the first."""
    remembered = set()
    for template, methods in templates(app).items():
        for method, ids in itertools.product(METHODS, itertools.pairwise((*IDS, IDS[0]))):
            asked = sent(method, filled(template, *ids))
            assert asked is not None
            told = await by_router(app, asked)
            assert await by_cache(cache, asked) == told, (method, asked.raw_path)
            if cache.find(asked):
                remembered.add(told.template)
            elif method in methods:
                assert len(told.variables) != 1, (method, asked.raw_path)
    fixed = {template for template in templates(app) if template.count("{") <= 1}
    assert remembered == fixed


@pytest.mark.parametrize("app", ["one port"], indirect=True)
async def test_a_login_asks_the_router_once(cache: RouteCache, sent: Reader) -> None:
    for template, identifier in itertools.product(LOGIN, IDS):
        first, second = (sent("POST", template.format(identifier)) for _ in range(2))
        assert first is not None
        assert second is not None
        assert cache.find(first) is None
        assert cache.find(second) is None
        told = await cache.resolve(first)
        assert told.template == template.format("{app_id}")
        assert cache.find(second) is told


def odd(template: str) -> Iterator[str]:
    """Paths beside the template's own."""
    path = filled(template, *IDS)
    yield from (change.format(path) for change in CHANGES)
    yield path.replace("/", "//")
    yield path.swapcase()
    yield path.replace("/", "/./")
    yield path.replace("/", "/%2e%2e/")
    yield path.replace("a", "%61")
    yield from (filled(template, identifier) for identifier in NO_IDS if "{" in template)


@pytest.mark.parametrize("app", ["dev"], indirect=True)
async def test_paths_that_are_written_otherwise(
    app: web.Application, cache: RouteCache, sent: Reader
) -> None:
    """Each has the answer of its own, and no other one's."""
    right = wrong = 0
    for _ in range(2):
        for template, methods in templates(app).items():
            for path in odd(template):
                for method in sorted({*methods, "GET"} - {"*"}):
                    asked = sent(method, path)
                    if asked is None:
                        continue
                    told = await by_router(app, asked)
                    assert await by_cache(cache, asked) == told, (method, path)
                    right, wrong = right + (told.handler != 404), wrong + (told.handler == 404)
    assert min(right, wrong) > 100


async def first(_: web.Request) -> web.Response:
    return json_answer("first")


async def second(_: web.Request) -> web.Response:
    return json_answer("second")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "other",
    ["/{all:.*}", "/a/{other:[a-z]+}/x", "/a/{other:[A-Za-z]+}/x", f"/a/{IDS[0]}/x", "/a/{b}/{c}"],
)
async def test_rivals_for_a_path(other: str, turned: bool, sent: Reader) -> None:
    """Of two templates that fit an id the router's choice is remembered."""
    app = web.Application()
    pairs = [("/a/{id}/x", first), (other, second)]
    for path, handler in reversed(pairs) if turned else pairs:
        app.router.add_get(path, handler)
    cache = RouteCache(app)
    for _, identifier in itertools.product(range(2), IDS):
        asked = sent("GET", f"/a/{identifier}/x")
        assert asked is not None
        assert await by_cache(cache, asked) == await by_router(app, asked)


async def test_middlewares_are_run_from_the_outermost_to_the_innermost(sent: Reader) -> None:
    order = []

    def named(name: str) -> Any:
        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            order.append(name)
            return await handler(request)

        return middleware

    app = web.Application(middlewares=[named("1"), named("2")])
    inner = web.Application(middlewares=[named("3"), named("4")])
    inner.router.add_get("/x", first)
    app.add_subapp("/inner", inner)
    cache, asked = RouteCache(app), sent("GET", "/inner/x")
    assert asked is not None
    for told in (await cache.resolve(asked), cache.find(asked)):
        assert told is not None
        order.clear()
        answer = await told.handler(asked)
        assert isinstance(answer, web.Response)
        assert as_response(answer).body == b'"first"'
        assert order == ["1", "2", "3", "4"]
        assert told.match.current_app is inner


@pytest.mark.parametrize("app", ["one port"], indirect=True)
async def test_what_is_remembered_is_bounded(cache: RouteCache, sent: Reader) -> None:
    """Paths of ids that nobody has push out others, which are found again; what leads nowhere, and
    what is long, is not remembered.
    """
    template = LOGIN[0]
    kept = sent("POST", template.format(MINT.id()))
    assert kept is not None
    told = await by_cache(cache, kept)
    for _ in range(CAPACITY + 10):
        asked = sent("POST", template.format(MINT.id()))
        assert asked is not None
        assert (await by_cache(cache, asked)).handler == told.handler
        assert len(cache._known) <= CAPACITY
    assert cache.find(kept) is None
    assert await by_cache(cache, kept) == told
    known = len(cache._known)
    for n in range(100):
        for path in (f"/v1/apps/{n:024}/nothing", "/" + "x" * n):
            asked = sent("POST", path)
            assert asked is not None
            await by_cache(cache, asked)
        long = sent("POST", f"{template.format('a' * 24)}?{n:0{LONGEST_PATH}}")
        assert long is not None
        assert (await by_cache(cache, long)).handler == told.handler
    assert len(cache._known) == known


async def test_another_method_is_the_routers_405(broker: Started, wire: Wire) -> None:
    """With what is allowed, before and after the right method was asked."""
    for _ in range(2):
        for method, path, allowed in (
            ("GET", "/transactions/authenticate", "POST"),
            ("DELETE", "/authenticate/verify", "POST"),
            ("PUT", "", "GET,OPTIONS"),
        ):
            answer = await wire.send(method, path)
            assert (answer.status, answer.code) == (405, "method_not_allowed")
            assert answer.headers["Allow"] == allowed
        assert (
            await wire.keyed("POST", "/transactions/authenticate", {"external_id": "nobody"})
        ).status == 404
        assert (await wire.send("GET", "")).status == 200


async def test_a_shared_match_is_frozen(broker: Started, sent: Reader) -> None:
    """No handler that gets it may change where other requests are led."""
    app = application(broker.parts, management=True, browser=True)
    asked = sent("GET", "/health/live")
    assert asked is not None
    told = await RouteCache(app).resolve(asked)
    with pytest.raises(RuntimeError):
        told.match.add_app(web.Application())
