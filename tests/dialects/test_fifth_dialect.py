"""A fifth dialect is one folder and one line. The folder (`tests.support.fifth`) declares a
setting, a policy key, statuses, routes and golden files; here stands the line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from broker import dialects
from broker.app import application
from broker.dialects import DIALECTS
from broker.errors import Refusal
from broker.model import Policy
from tests.conftest import Starter
from tests.dialects.flex.test_contract import subclasses
from tests.project import test_docs as docs
from tests.support import fifth, golden
from tests.support.authenticator import Authenticator
from tests.support.byo import Byo
from tests.support.commands import Cli, refusal
from tests.support.fifth import routes as wire_format
from tests.support.signals import refused
from tests.support.wire import ORIGIN, Answer, Wire
from tests.web.test_guards import guards

PLACE = "/fifth/{app_id}"


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialects, "DIALECTS", (*DIALECTS, fifth.FIFTH))


async def test_a_login_through_it(
    start_broker: Starter, session: Any, device: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its policy key and its setting in the answer, and golden files in its folder."""
    monkeypatch.setattr(golden, "FOLDER", golden.FOLDER.parent / "support")
    broker = await start_broker(fifth_keep=45)
    policy = Policy().set("fifth_letters", "capital", dialects.policy_keys())
    wire = await Wire.open(broker.service, session, policy=policy)
    await wire.redeem(await wire.register(await wire.open_registration("ann"), device))
    key = {"Authorization": f"Bearer {wire.key}"}

    async def ask(name: str, step: str, body: object, headers: dict[str, str]) -> Answer:
        return await golden.golden(
            wire, f"fifth/{name}", "POST", f"/{step}", body, headers=headers, below=PLACE
        )

    begun = await ask("start", "start", {"user": "ann"}, key)
    finish = {"user": "ann", "answer": device.authenticate(begun.json[1], ORIGIN)}
    with refused(broker, "transaction_not_found", "other_finish"):
        await Byo(wire).run("FinishPasskeyAuthentication", userId="ann", publicKey=finish["answer"])
    done = await ask("finish", "finish", finish, key)
    assert done.json == ["yes", {"name": "ANN", "keep": 45}]
    with refused(broker, "transaction_not_found", "user_has_no_ceremony"):
        await ask("finish-again", "finish", finish, key)
    with refused(broker, "invalid_access_token", "key_missing"):
        await ask("no-key", "start", {"user": "ann"}, {})


async def test_its_routes_are_seen_with_their_guard(start_broker: Starter) -> None:
    """By the walk through the router that holds every route to a guard."""
    parts = (await start_broker()).parts
    mine = {("POST", f"{PLACE}/{step}") for step in ("start", "finish")}
    assert mine <= guards(application(parts, management=True, browser=False))["key"]
    seen = guards(application(parts, management=False, browser=True))
    assert not any(mine & places for places in seen.values())


async def test_its_paths_have_its_shape(start_broker: Starter, session: Any) -> None:
    """Also where no route answers or no body is read; and the setting `dialects` knows its name."""
    started = await start_broker()
    wire = await Wire.open(started.service, session)
    place = f"{wire.url}/fifth/{wire.app_id}/start"
    for method, url, code, status in (
        ("GET", place, "method_not_allowed", 405),
        ("GET", f"{wire.url}/fifth/x", "not_found", 404),
    ):
        with refused(started, code, code):
            answer = await wire.send(method, url)
        assert (answer.status, answer.json) == (status, ["no", code])
    answer = await wire.keyed("POST", place, data=b" " * 70_000)
    assert (answer.status, answer.json) == (413, ["no", "request_too_large"])
    assert answer.headers["Connection"] == "close"
    assert (await wire.send("GET", f"{wire.url}/nowhere")).code == "not_found"
    alone = await start_broker(dialects=("fifth",))
    only = Wire(session, alone.url, wire.app_id, wire.key)
    answer = await only.keyed("POST", f"{alone.url}/fifth/{wire.app_id}/start", {"user": "ann"})
    assert answer.json == ["no", "user_not_found"]
    assert (await only.keyed("GET", "/users")).code == "not_found"


def test_its_setting_is_read_and_its_faults_are_told_with_the_others(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"BROKER_FIFTH_KEEP": "60"}
    assert dialects.load_settings(environment, needed=())[fifth.KEEP] == 60
    assert dialects.load_settings({}, needed=())[fifth.KEEP] == 30
    monkeypatch.setenv("BROKER_FIFTH_KEEP", "4")
    monkeypatch.setenv("BROKER_PORT", "x")
    done = cli("app", "list")
    assert (done.status, done.out) == (1, "")
    assert set(done.err.splitlines()) == {
        "broker: BROKER_FIFTH_KEEP must be a whole number from 5 to 600.",
        "broker: BROKER_PORT must be a whole number from 0 to 65535.",
    }


def test_its_policy_key_is_set_and_listed_like_the_others(cli: Cli) -> None:
    assert cli("policy", "--json").json[-1] == {
        "key": "fifth_letters",
        "default": "small",
        "values": "small, capital",
        "meaning": "the letters of a name",
    }
    assert "fifth_letters=" in cli("completion", "bash").out
    made = cli(
        "app", "create", "--name", "F", "--rp-id", "example.org", "--origin", ORIGIN, "--json"
    )
    update = ("app", "update", "--app", made.json["app_id"], "--json", "--set")
    changed = cli(*update, "fifth_letters=capital").json
    assert changed["policy"]["fifth_letters"] == "capital"
    assert cli(*update[:-1], "--name", "G").json["policy"]["fifth_letters"] == "capital"
    assert refusal(cli(*(word for word in update if word != "--json"), "fifth_letters=none")) == (
        "fifth_letters is one of small, capital, not 'none'."
    )


def test_the_documentation_lacks_its_rows() -> None:
    """So a dialect whose setting or policy key has no row fails the tests of the documentation."""
    assert docs.missing("setting") == ["BROKER_FIFTH_KEEP"]
    assert docs.missing("policy key") == ["fifth_letters"]


# -- what holds for every dialect ------------------------------------------------------------------


def test_no_two_declare_the_same() -> None:
    for declared in (
        [dialect.name for dialect in dialects.DIALECTS],
        docs.setting_names(),
        [key.name for key in dialects.policy_keys()],
    ):
        assert len(declared) == len(set(declared))


@pytest.mark.parametrize("dialect", [*DIALECTS, fifth.FIFTH], ids=lambda dialect: dialect.name)
def test_every_refusal_has_its_status_and_is_rendered(dialect: Any) -> None:
    found = dialect.load()
    render: Callable[[Refusal], web.Response] = found.render
    assert set(found.STATUS) == subclasses(Refusal) - {Refusal}
    assert {kind: render(kind()).status for kind in found.STATUS} == dict(found.STATUS)
    assert wire_format.PATHS.match("/fifth/x")
