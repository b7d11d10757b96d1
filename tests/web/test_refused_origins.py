"""A page of an origin that is not registered: what it may read, and what its operator learns.

Every browser route of every dialect is asked, with the same bytes, by a registered page and by
strangers.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from broker.app import application
from broker.cli.dev import RefusedOnTheTerminal
from broker.errors import OperationNotAllowed
from broker.model import RelyingParty, page_origin
from broker.telemetry import CONTEXT, Context
from broker.web import RefusedOrigins, access_of
from broker.web.refused_origins import MINUTE, MOST_APPS, MOST_ORIGINS
from tests.conftest import OpenApp, Started, Starter
from tests.support.signals import counted, quiet, refused
from tests.support.stall import stalled
from tests.support.wire import ORIGIN, Answer, Wire

STRANGER = "https://evil.example"
PAGES_OF_OTHERS = [
    STRANGER,
    "http://example.org",
    "https://example.org:8443",
    "https://sub.example.org",
    "https://example.org.evil.example",
    "http://127.0.0.1:5173",
    "http://[::1]:5173",
    "capacitor://localhost",
    "chrome-extension://" + "abcdefgh" * 4,
]
NO_PAGES = [
    "null",
    "",
    "https://example.org/",
    "HTTPS://EXAMPLE.ORG",
    "https://example.org, https://evil.example",
    "https://exam ple.org",
    "https://<script>",
    'https://a"b',
    "https://a;b",
    "android:apk-key-hash:" + "k" * 43,
    "\xff",
    "https://" + "a" * 300,
    "*",
]
START = "/authenticate/transactions/webauthn/start"


def cors(answer: Answer) -> dict[str, str]:
    return {
        k.lower(): v for k, v in answer.headers.items() if k.lower().startswith("access-control")
    }


def sentence(answer: Answer) -> str:
    """Of a refusal in any dialect's shape."""
    said: dict[str, Any] = answer.json
    return str(said.get("error") or said.get("details") or said.get("message"))


@pytest.fixture
def routes(broker: Started) -> list[tuple[str, str]]:
    """Method and path of every browser route but the preflights."""
    app = application(broker.parts, management=True, browser=True)
    found = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and access_of(route.handler) == "browser"
    }
    dialects = {path.split("{app_id}")[0] for _, path in found}
    assert {"/v1/apps/", "/hanko/", "/v2/"} <= dialects
    return sorted((method, path) for method, path in found if method != "OPTIONS")


def url(wire: Wire, path: str) -> str:
    path = path.replace("{app_id}", wire.app_id)
    return wire.url + path.replace("{passkey_id}", "p" * 24).replace("{passkey_ids}", "p" * 24)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"{", b" " * 70_000], ids=["none", "{}", "no JSON", "too large"]
)
async def test_a_stranger_reads_the_refusal_and_nothing_else(
    broker: Started, wire: Wire, routes: list[tuple[str, str]], body: bytes
) -> None:
    """Whatever a registered page gets for the same bytes, a success or a refusal; and nothing
    begins or is spent.
    """
    statuses = set()
    for method, path in routes:
        mine = await wire.send(method, url(wire, path), data=body, headers={"Origin": ORIGIN})
        assert cors(mine) == {"access-control-allow-origin": ORIGIN}
        assert mine.headers["Vary"] == "Origin"
        statuses.add(mine.status)

        asking = {"Origin": STRANGER, "Access-Control-Request-Method": method}
        with quiet(broker, "broker_refusals_total", code="operation_not_allowed", reason="origin"):
            preflight = await wire.send("OPTIONS", url(wire, path), headers=asking)
        assert (preflight.status, preflight.body) == (204, b"")
        assert cors(preflight)["access-control-allow-origin"] == STRANGER
        assert "access-control-allow-credentials" not in cors(preflight)
        assert preflight.headers["Vary"] == "Origin"

        begun = broker.metric(
            "broker_ceremonies_total", kind="authenticate", step="begin", result="ok"
        )
        with refused(broker, "operation_not_allowed", "origin"):
            theirs = await wire.send(
                method, url(wire, path), data=body, headers={"Origin": STRANGER}
            )
        assert theirs.status == 403
        assert cors(theirs) == {"access-control-allow-origin": STRANGER}
        assert theirs.headers["Vary"] == "Origin"
        assert sentence(theirs).startswith(
            f"This page's origin {STRANGER} is not registered for the app;"
        )
        assert theirs.body != mine.body
        assert (
            broker.metric("broker_ceremonies_total", kind="authenticate", step="begin", result="ok")
            == begun
        )
    assert statuses >= ({200, 400} if body in (b"", b"{}") else {400} if body == b"{" else {413})


@pytest.mark.parametrize("origin", PAGES_OF_OTHERS + NO_PAGES)
async def test_which_origins_may_read_it(
    broker: Started, open_app: OpenApp, routes: list[tuple[str, str]], origin: str
) -> None:
    """Those that a browser writes for a page. What the header holds otherwise is in no header and
    no sentence of ours.
    """
    wire = await open_app(origins=(ORIGIN, "android:apk-key-hash:" + "k" * 43))
    for method, path in routes:
        with refused(broker, "operation_not_allowed", "origin"):
            answer = await wire.send(method, url(wire, path), data=b"{", headers={"Origin": origin})
        assert answer.status == 403
        readable = {"access-control-allow-origin": origin} if origin in PAGES_OF_OTHERS else {}
        assert cors(answer) == readable
        if not readable:
            assert sentence(answer) == OperationNotAllowed.default
            with refused(broker, "operation_not_allowed", "origin"):
                answer = await wire.send("OPTIONS", url(wire, path), headers={"Origin": origin})
            assert (answer.status, cors(answer)) == (403, {})
    assert page_origin(origin) is bool(readable)


async def test_a_stranger_reads_no_other_refusal(broker: Started, wire: Wire) -> None:
    """An unknown app, an address or a method that isn't, a header sent twice, a store that is down:
    nothing says so to a page.
    """
    nobody = Wire(wire.session, wire.url, "x" * 24, "")
    stranger = {"Origin": STRANGER}
    for asked, status in (
        (nobody.send("POST", START, headers=stranger), 404),
        (nobody.send("OPTIONS", START, headers=stranger), 404),
        (wire.send("POST", "/nowhere", headers=stranger), 404),
        (wire.send("PUT", START, headers=stranger), 405),
        (wire.send("POST", "/transactions/register", headers=stranger), 401),
    ):
        answer = await asked
        assert (answer.status, cors(answer)) == (status, {})
    async with stalled(broker, "relying_parties"):
        answer = await wire.send("POST", START, headers=stranger)
    assert (answer.status, cors(answer)) == (503, {})


async def test_an_operator_learns_which_origin(broker: Started, wire: Wire) -> None:
    """An event and a line of the log, once a minute for each origin; the metric counts every
    refusal.
    """
    for origin in (STRANGER, STRANGER, "null", "<script>", "\xff", "capacitor://localhost"):
        for _ in range(2):
            with refused(broker, "operation_not_allowed", "origin"):
                await wire.send("POST", START, headers={"Origin": origin})
    told = [STRANGER, "null", "malformed", "capacitor://localhost"]
    found = await broker.parts.directory.events(wire.app_id, limit=100)
    assert [(e.action, e.result, e.reason, e.actor) for e in found[1:]] == [
        ("origin.refused", "refused", origin, "browser") for origin in told
    ]
    logged = [line for line in broker.log if line["event"] == "origin_refused"]
    assert [(line["level"], line["app"], line["origin"]) for line in logged] == [
        ("info", wire.app_id, origin) for origin in told
    ]
    assert [line["request_id"] for line in logged] == [event.request_id for event in found[1:]]


async def test_the_refusal_stands_where_the_event_can_not_be_written(
    start_broker: Starter, session: Any
) -> None:
    broker = await start_broker(store_timeout=1.0)
    wire = await Wire.open(broker.service, session)
    async with stalled(broker, "events"):
        with (
            refused(broker, "operation_not_allowed", "origin"),
            counted(broker, "broker_events_lost_total"),
        ):
            answer = await wire.send("POST", START, headers={"Origin": STRANGER})
    assert (answer.status, cors(answer)) == (403, {"access-control-allow-origin": STRANGER})
    assert await broker.events(wire.app_id) == [("app.created", "done", None)]


class Watch:
    """What got through to the operator, by a clock that the test moves."""

    def __init__(self, broker: Started) -> None:
        self.now = 0.0
        self.told: list[tuple[str, str]] = []
        self.notices = RefusedOrigins(
            broker.parts.directory,
            broker.parts.metrics,
            lambda app, origin: self.told.append((app.id, origin)),
            clock=lambda: self.now,
        )
        CONTEXT.set(Context("request", "browser", deadline=time.monotonic() + 60))

    async def tell(self, app: RelyingParty, *origins: str) -> list[str]:
        self.told.clear()
        for origin in origins:
            await self.notices.tell(app, origin)
        return [origin for _, origin in self.told]


async def test_strangers_fill_neither_the_log_nor_the_events(broker: Started, wire: Wire) -> None:
    """Once a minute for an origin, ten times a minute for an app, and each app for itself."""
    watch = Watch(broker)
    app = await broker.parts.directory.app(wire.app_id)
    other, _ = await broker.parts.directory.create_app("Other", "example.org", [ORIGIN])
    many = [f"https://{n}.example" for n in range(100)]
    assert await watch.tell(app, *many, *many) == many[:MOST_ORIGINS]
    assert await watch.tell(other, many[0]) == [many[0]]
    watch.now = MINUTE - 1
    assert await watch.tell(app, *many) == []
    watch.now = MINUTE
    assert await watch.tell(app, *reversed(many)) == list(reversed(many))[:MOST_ORIGINS]
    watch.now += MINUTE / 2
    assert await watch.tell(other, many[0], many[0], many[1]) == many[:2]
    rows = [e for e in await broker.events(wire.app_id) if e[0] == "origin.refused"]
    assert len(rows) == 2 * MOST_ORIGINS


async def test_what_is_remembered_of_origins_is_bounded(broker: Started) -> None:
    watch = Watch(broker)
    apps = [RelyingParty(f"{n:024}", "App", "example.org", (ORIGIN,)) for n in range(MOST_APPS + 2)]
    for app in apps[:-2]:
        assert await watch.tell(app, STRANGER) == [STRANGER]
    assert await watch.tell(apps[-1], STRANGER) == []  # none is forgotten for it
    assert await watch.tell(apps[0], STRANGER) == []
    assert len(watch.notices._told) == MOST_APPS
    watch.now = MINUTE
    assert await watch.tell(apps[-1], STRANGER) == [STRANGER]
    assert len(watch.notices._told) == 1


def test_what_the_terminal_of_dev_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Once for each origin of an app: the command that allows it, or why there is none; and never
    without end.
    """
    app = RelyingParty("a" * 24, "App", "localhost", ("http://localhost:8080",))
    show = RefusedOnTheTerminal()
    for origin in (
        "http://localhost:5173",
        "http://127.0.0.1:5173",
        "https://evil.example",
        "null",
        "malformed",
    ):
        show(app, origin)
        show(app, origin)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "  Refused origin http://localhost:5173; allow it with"
        f" `broker app update --app {app.id} --add-origin http://localhost:5173`",
        "  Refused origin http://127.0.0.1:5173; The host '127.0.0.1' is an IP address; "
        "passkeys need a domain.",
        "  Refused origin https://evil.example; The host of https://evil.example is neither "
        "localhost nor below it; list it as a related origin or change the RP ID.",
        "  Refused origin null; a file, or a sandboxed frame, has no origin: "
        "serve the page from http://localhost.",
        "  Refused origin malformed; no browser writes such an Origin header.",
    ]
    for n in range(200):
        show(app, f"http://{n}.localhost")
    assert len(capsys.readouterr().out.splitlines()) == RefusedOnTheTerminal.MOST - 5


async def test_every_dialect_keeps_its_shape(broker: Started, wire: Wire) -> None:
    """The sentence stands where each vendor's SDK reads one."""
    headers = {"Origin": STRANGER}
    told = f"This page's origin {STRANGER} is not registered for the app;"
    shapes: list[tuple[str, str, dict[str, Any]]] = [
        (f"/v1/apps/{wire.app_id}{START}", "error", {"code": "operation_not_allowed"}),
        (
            f"/hanko/{wire.app_id}/login/initialize",
            "details",
            {"status": 403, "title": "Forbidden"},
        ),
        (
            f"/v2/{wire.app_id}/passkey/authentication/options",
            "message",
            {"_tag": "@error/Forbidden"},
        ),
    ]
    for path, field, rest in shapes:
        with refused(broker, "operation_not_allowed", "origin"):
            said = json.loads((await wire.send("POST", wire.url + path, headers=headers)).body)
        assert said.pop(field).startswith(told)
        assert said == rest
