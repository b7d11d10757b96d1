"""The golden files there have to be: one for every route that succeeds, one for every row of the
tables of errors; and those errors that any request of any dialect may meet, in each dialect's
shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import broker.dialects
from broker.dialects import DIALECTS
from broker.dialects.hanko.refusals import status_name
from broker.errors import Unavailable
from broker.model import Policy
from tests.conftest import OpenApp, Started
from tests.dialects.ways import WAYS
from tests.support.byo import Byo
from tests.support.golden import FOLDER, golden
from tests.support.signals import refused
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

DIALECTS_FOLDER = Path(broker.dialects.__file__).parent
NAMES = [dialect.name for dialect in DIALECTS]

# In the tables, and in no golden file: what needs a body that never ends, and what only the command
# line meets.
APART = {
    (408, word)
    for word in ("request_timeout", "@error/BadRequest", "UnexpectedError", "Request Timeout")
}
APART |= {(400, "invalid_setting"), (409, "conflict")}


def files(dialect: str) -> list[dict[str, Any]]:
    return [
        json.loads(file.read_text())
        for file in sorted((FOLDER / dialect / "golden").glob("*.json"))
    ]


# -- what there is ---------------------------------------------------------------------------------


def test_every_golden_file_is_used() -> None:
    """One that no test names would rot."""
    source = "".join(file.read_text() for file in Path(__file__).parents[1].rglob("test_*.py"))
    composed = {f"{kind}-options-unknown" for kind in ("registration", "authentication")}
    found = [file for file in FOLDER.glob("*/golden/*.json") if file.stem not in composed]
    assert len(found) > 200
    unused = [
        f
        for f in found
        if not re.search(rf'"(?:{f.parents[1].name}/)?{re.escape(f.stem)}"', source)
    ]
    assert unused == []


@pytest.mark.parametrize("dialect", NAMES)
def test_every_route_has_one(dialect: str) -> None:
    """A request that succeeds, but for icons, which there are none of. Passlock's two generations
    of paths share their handlers, so one file serves both."""
    (wire_format,) = [found.load() for found in DIALECTS if found.name == dialect]
    seen = {
        (file["request"]["method"], file["request"]["path"].partition("?")[0].removeprefix("/v2"))
        for file in files(dialect)
        if file["answer"]["status"] < 400 or file["request"]["path"].endswith("icon.svg")
    }
    templates = [
        (route.method, route.path.removeprefix("/v2"))
        for route in wire_format.routes(management=True, browser=True)
        if route.method not in {"OPTIONS", "*"}
    ]
    assert templates
    parameter = re.compile(r"\{\w+(?::(?:[^{}]|\{[^{}]*\})*)?\}")
    missing = [
        (method, path)
        for method, path in templates
        if not any(
            method == asked
            and re.fullmatch("[^/]+".join(map(re.escape, parameter.split(path))), at)
            for asked, at in seen
        )
    ]
    assert missing == []


def rows(dialect: str) -> Iterator[tuple[list[int], list[str]]]:
    """The statuses and words of each row of a dialect's tables of errors. A row without words has
    the statuses' own names.
    """
    page = "DECISIONS.md" if dialect == "flex" else "README.md"
    section = (DIALECTS_FOLDER / dialect / page).read_text()
    for row in re.finditer(r"^\| (\d{3}(?:, \d{3})*) \| (.*?) \| ", section, re.M):
        statuses = [int(status) for status in row[1].split(", ")]
        yield statuses, re.findall(r"`([^`]+)`", row[2]) or [status_name(s) for s in statuses]


@pytest.mark.parametrize("dialect", NAMES)
def test_every_error_has_one(dialect: str) -> None:
    """Each status of a row with one of its words, and each word with one of its statuses."""
    seen = {
        (file["answer"]["status"], str(file["answer"]["body"].get(WAYS[dialect].WORD)))
        for file in files(dialect)
        if file["answer"]["status"] >= 400
    } | APART
    table = list(rows(dialect))
    assert len(table) > 8
    missing: list[tuple[object, object]] = []
    for statuses, words in table:
        patterns = [re.escape(word).replace("…", ".+") for word in words]
        found = {
            (s, p)
            for s in statuses
            for p in patterns
            for at, w in seen
            if at == s and re.fullmatch(p, w)
        }
        missing += [(s, words) for s in statuses if s not in {at for at, _ in found}]
        missing += [(statuses, p) for p in patterns if p not in {word for _, word in found}]
    assert missing == []


# -- what may happen to any request ----------------------------------------------------------------


async def told(wire: Wire, dialect: str, name: str, **how: Any) -> Answer:
    """The golden file of a request with the key."""
    way = WAYS[dialect]
    below, path = way.KEYED
    headers = way.key(wire.key) | how.pop("headers", {})
    answer = await golden(
        wire, f"{dialect}/{name}", "POST", path, headers=headers, below=below, **how
    )
    way.judge(answer)
    assert str(answer.status) == name.removeprefix("error-")
    return answer


@pytest.mark.parametrize("dialect", NAMES)
async def test_bodies_that_are_not_read(broker: Started, wire: Wire, dialect: str) -> None:
    with refused(broker, "request_too_large", "request_too_large"):
        await told(wire, dialect, "error-413", data=b" " * 65_537)
    with refused(broker, "unsupported_media_type", "unsupported_media_type"):
        await told(wire, dialect, "error-415", data=b"x", headers={"Content-Encoding": "gzip"})


@pytest.mark.parametrize("dialect", NAMES)
@pytest.mark.parametrize(
    ("name", "fault", "code", "reason"),
    [
        ("error-500", RuntimeError("a secret"), "internal_server_error", "internal_server_error"),
        ("error-503", Unavailable(reason="postgres"), "service_unavailable", "postgres"),
    ],
)
async def test_what_is_not_the_callers_fault(
    broker: Started,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
    dialect: str,
    name: str,
    fault: Exception,
    code: str,
    reason: str,
) -> None:
    async def broken(*_: object) -> None:
        raise fault

    for look_up in ("authorise", "owner"):
        monkeypatch.setattr(broker.parts.directory, look_up, broken)
    with refused(broker, code, reason):
        answer = await told(wire, dialect, name, json_body={})
    assert "a secret" not in answer.body.decode() + broker.stream.getvalue()


async def test_too_many_open_sign_ins(broker: Started, open_app: OpenApp) -> None:
    wire, page = await open_app(Policy(discoverable_limit=1)), {"Origin": ORIGIN}
    await wire.begin("authenticate", None)
    start = "/authenticate/transactions/webauthn/start"
    with refused(broker, "too_many_requests", "discoverable_limit", times=2):
        answer = await golden(wire, "flex/error-429", "POST", start, {}, headers=page)
        WAYS["flex"].judge(answer)
        options = "/passkey/authentication/options"
        answer = await golden(
            wire, "passlock/error-429", "POST", options, {}, headers=page, below="/v2/{app_id}"
        )
        WAYS["passlock"].judge(answer)


async def test_too_many_commands(broker: Started, open_app: OpenApp) -> None:
    wire = await open_app(Policy(keyed_rate="1/min:1"))
    await Byo(wire).ok("Ping")
    with refused(broker, "too_many_requests", "keyed_rate"):
        await told(wire, "propelauth", "error-429", json_body={"command": "Ping", "data": {}})


async def test_a_user_without_passkeys(broker: Started, wire: Wire) -> None:
    await wire.open_registration("ann")
    key = {"Authorization": f"Bearer {wire.key}"}
    with refused(broker, "user_has_no_passkeys", "user_has_no_passkeys", times=2):
        path = "/transactions/authenticate"
        body = {"external_id": "ann"}
        WAYS["flex"].judge(
            await golden(wire, "flex/m2-no-passkeys", "POST", path, body, headers=key)
        )
        path, body = "/passkey/authentication/authorize", {"rpId": RP_ID, "userId": "ann"}
        below = "/v2/{app_id}"
        answer = await golden(
            wire, "passlock/authorize-no-passkeys", "POST", path, body, headers=key, below=below
        )
        WAYS["passlock"].judge(answer)


async def test_what_pages_ask_for_in_vain(broker: Started, wire: Wire) -> None:
    page = {"Origin": ORIGIN}
    with refused(broker, "ticket_not_found", "ticket_not_found"):
        body = {"kind": "update", "ticket": "pbs_" + "a" * 43}
        path = "/signals/exchange"
        WAYS["flex"].judge(
            await golden(wire, "flex/signals-unknown", "POST", path, body, headers=page)
        )
    nobody = Wire(wire.session, wire.url, "x" * 24, wire.key)
    with refused(broker, "app_not_found", "app_not_found"):
        path = "/authenticate/transactions/webauthn/start"
        WAYS["flex"].judge(await golden(nobody, "flex/a3-no-app", "POST", path, {}, headers=page))
