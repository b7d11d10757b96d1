"""Routes found beside aiohttp's router (`broker.web.shortcuts`): wherever there is an answer, it is
the router's.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.test_utils import make_mocked_request

from broker.app import application
from broker.demo import demo_app
from broker.tokens import SystemMint
from broker.web import json_answer
from broker.web.shortcuts import _REMEMBERED, Shortcuts
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
    """What a request leads to: handler, template and variables. None where the router refuses."""

    handler: object
    template: str
    variables: dict[str, str]


class Reader:
    """Reads requests as the server's own parser does."""

    def __init__(self) -> None:
        self._template = make_mocked_request("GET", "/")

    def __call__(self, method: str, path: str) -> tuple[str, web.Request] | None:
        """The target as it was sent, and the request; None for what is not HTTP."""
        loop = asyncio.get_running_loop()
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16)
        try:
            ((message, _),), _, _ = parser.feed_data(
                request(method, "{}").replace(b"{}", path.encode())
            )
        except HttpProcessingError:
            return None
        url = message.url.relative() if message.url.absolute else message.url
        return message.path, self._template.clone(method=method, rel_url=url)


async def by_router(app: web.Application, asked: web.Request) -> Found | None:
    match = await app.router.resolve(asked)
    if match.http_exception is not None:
        return None
    assert match.route.resource is not None
    return Found(match.handler, match.route.resource.canonical, dict(match))


def by_shortcut(shortcuts: Shortcuts, method: str, path: str) -> Found | None:
    way = shortcuts.find(method, path)
    if way is None:
        return None
    resource = way.match.route.resource
    assert resource is not None
    assert way.match.handler is way.handler
    return Found(way.handler, resource.canonical, dict(way.match))


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
def shortcuts(app: web.Application) -> Shortcuts:
    return Shortcuts(app)


@pytest.fixture
def sent() -> Reader:
    return Reader()


def of_one_variable(template: str) -> bool:
    return template.count("{") <= 1


async def test_every_route_of_every_port(
    app: web.Application, shortcuts: Shortcuts, sent: Reader
) -> None:
    """By every method, the second time as the first; and most routes with one variable or none have
    a shortcut.
    """
    short = set()
    for template, methods in templates(app).items():
        for method, ids in itertools.product(METHODS, itertools.pairwise((*IDS, IDS[0]))):
            path = filled(template, *ids)
            read = sent(method, path)
            assert read is not None
            raw, asked = read
            assert raw == path
            found = by_shortcut(shortcuts, method, raw)
            if found is not None:
                assert found == await by_router(app, asked), (method, path)
                assert by_shortcut(shortcuts, method, raw) == found
                short.add(found.template)
            if method not in methods:
                assert found is None or found.template != template, (method, path)
    assert all(map(of_one_variable, short))
    missing = {t for t in templates(app) if of_one_variable(t)} - short
    assert missing <= {"/demo", "/demo/", "/demo/static/{name}"} | {
        t for t in missing if t.startswith("/demo/")
    }


@pytest.mark.parametrize("app", ["one port"], indirect=True)
async def test_a_login_needs_no_router(app: web.Application, shortcuts: Shortcuts) -> None:
    for template in LOGIN:
        for identifier in IDS:
            assert shortcuts.find("POST", template.format(identifier)) is not None


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
    app: web.Application, shortcuts: Shortcuts, sent: Reader
) -> None:
    """There is no shortcut, or it leads where the router leads."""
    judged = 0
    for template, methods in templates(app).items():
        for path in odd(template):
            for method in {*methods, "GET"} - {"*"}:
                read = sent(method, path)
                if read is None:
                    continue
                raw, asked = read
                found = by_shortcut(shortcuts, method, raw)
                assert found is None or found == await by_router(app, asked), (method, path)
                judged += found is not None
                if not raw.isascii() or set(raw) & set("%?#;") or "//" in raw:
                    assert found is None, (method, path)
    assert judged > 0, "some paths beside one template are another's"


PATTERNS = (r"\d+", "[a-f]+", "[a-z]{24}", "[A-Za-z]+", "[0-9a-f]{24}", "a{24}", "[A-Z].*")


async def first(_: web.Request) -> web.Response:
    return json_answer("first")


async def second(_: web.Request) -> web.Response:
    return json_answer("second")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/a/{id}/x", "/{all:.*}"),
        ("/a/{id}/x", "/a/{other:[a-z]+}/x"),
        ("/a/{id}", "/{one}/{two}"),
        ("/a/{id}/x", r"/a/{two:\w+/x}"),
        ("/a", "/{any}"),
        ("/a/{id}/x", "/a/{all:a+/.*}"),
        ("/a/{id}/x", "/a/{id}/{two}"),
    ],
)
async def test_rivals_have_no_shortcut(one: str, other: str, turned: bool) -> None:
    """Which of them answers is the router's to say."""
    app = web.Application()
    pairs = [(one, first), (other, second)]
    for path, handler in reversed(pairs) if turned else pairs:
        app.router.add_post(path, handler)
    app.router.add_get(one, first)
    shortcuts = Shortcuts(app)
    for identifier in IDS:
        path = filled(one, identifier)
        assert shortcuts.find("POST", path) is None
        assert by_shortcut(shortcuts, "GET", path) == await by_router(
            app, make_mocked_request("GET", path)
        )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
async def test_rivals_for_some_ids(pattern: str, turned: bool) -> None:
    """A template that takes only some of the ids is no rival for the others, and is one for
    those.
    """
    app = web.Application()
    pairs = [("/a/{id}/x", first), (f"/a/{{other:{pattern}}}/x", second)]
    for path, handler in reversed(pairs) if turned else pairs:
        app.router.add_get(path, handler)
    shortcuts = Shortcuts(app)
    for _, identifier in itertools.product(range(2), IDS):
        path = f"/a/{identifier}/x"
        found = by_shortcut(shortcuts, "GET", path)
        assert found is None or found == await by_router(app, make_mocked_request("GET", path)), (
            path
        )


@pytest.mark.parametrize("turned", [False, True])
async def test_a_fixed_path_that_looks_like_an_id(turned: bool) -> None:
    app = web.Application()
    pairs = [("/a/{id}/x", first), (f"/a/{IDS[0]}/x", second), (f"/a/{IDS[3]}/{{other}}", second)]
    for path, handler in reversed(pairs) if turned else pairs:
        app.router.add_get(path, handler)
    shortcuts = Shortcuts(app)
    for identifier in IDS:
        path = f"/a/{identifier}/x"
        found = by_shortcut(shortcuts, "GET", path)
        assert found is None or found == await by_router(app, make_mocked_request("GET", path)), (
            path
        )


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_a_variable_that_takes_not_every_id(pattern: str) -> None:
    """Its template's own form is the router's to judge."""
    app = web.Application()
    app.router.add_get(f"/a/{{id:{pattern}}}/x", first)
    shortcuts = Shortcuts(app)
    for identifier in IDS:
        path = f"/a/{identifier}/x"
        found = by_shortcut(shortcuts, "GET", path)
        assert found is None or found == await by_router(app, make_mocked_request("GET", path)), (
            path
        )


@pytest.mark.parametrize("app", ["one port"], indirect=True)
async def test_what_is_remembered_is_bounded(app: web.Application, shortcuts: Shortcuts) -> None:
    """Ids that nobody has cost no more than that; and every path is found all along."""
    template = LOGIN[0]
    kept = template.format(MINT.id())
    found = by_shortcut(shortcuts, "POST", kept)
    assert found is not None
    assert len(shortcuts._plain) < 50
    for _ in range(2 * _REMEMBERED + 10):
        identifier = MINT.id()
        way = by_shortcut(shortcuts, "POST", template.format(identifier))
        assert way == found._replace(variables={"app_id": identifier})
        assert len(shortcuts._known) <= _REMEMBERED
    assert by_shortcut(shortcuts, "POST", kept) == found
    assert by_shortcut(shortcuts, "GET", "/health/live") is not None
    known = len(shortcuts._known)
    for n in range(1000):
        assert by_shortcut(shortcuts, "POST", f"/v1/apps/{n:024}/nothing") is None
        assert by_shortcut(shortcuts, "POST", template.format(f"{n:025}")) is None
    assert len(shortcuts._known) == known, "what leads nowhere is not remembered"


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


async def test_a_shared_match_is_frozen(broker: Started) -> None:
    """Nobody who gets it may change where others are led."""
    app = application(broker.parts, management=True, browser=True)
    way = Shortcuts(app).find("GET", "/health/live")
    assert way is not None
    with pytest.raises(RuntimeError):
        way.match.add_app(web.Application())
