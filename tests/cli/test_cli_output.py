"""How commands speak: columns, JSON of refusals, links to documentation, help with examples,
completion, colour and progress.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from broker import cli as command_line
from broker.cli import output
from broker.dialects import policy_keys
from broker.embedded import EmbeddedStores
from broker.model import Policy
from tests.support.authenticator import Authenticator
from tests.support.commands import (
    BROKER,
    CLEAN,
    ID,
    NEW,
    UNKNOWN,
    Cli,
    Terminal,
    beside,
    program,
    refusal,
)
from tests.support.servers import session_of
from tests.support.wire import Wire

DOCS = "https://docs.example.org/refusals"


@pytest.fixture
def app(cli: Cli) -> str:
    """An app of the test's own."""
    return str(cli(*NEW, "--json").json["app_id"])


# -- columns ---------------------------------------------------------------------------------------


def test_columns_are_aligned_by_what_a_terminal_shows() -> None:
    """A wide character takes two cells, a combining one none; what is not printable is
    written out.
    """
    names = ["plain", "株式会社", "e\u0301te\u0301", "a\x1b[2Jb", "\u202eñ\n"]
    lines = output.table(
        [{"name": name, "left_out": {}, "number": 7} for name in names], colour=False
    )
    assert lines == [
        "NAME       NUMBER",
        "plain      7",
        "株式会社   7",
        "e\u0301te\u0301        7",
        "a\\x1b[2Jb  7",
        "\\u202eñ\\n  7",
    ]


def test_a_table_that_grows_has_one_header_and_stays_aligned() -> None:
    widths: list[int] = []
    first = output.table([{"a": "long value", "b": 1}], colour=False, widths=widths)
    second = output.table([{"a": "x", "b": 2}], colour=False, widths=widths)
    assert (first, second) == (["A           B", "long value  1"], ["x           2"])


def test_every_list_has_headers_and_an_empty_one_says_so(cli: Cli, app: str) -> None:
    heads = {
        ("app", "list"): "APP ID +NAME +RP ID +CREATED AT +ORIGINS",
        ("key", "list", "--app", app): "KEY ID +HINT +NAME +CREATED AT +REVOKED AT",
        ("events", "--app", app): "ID +AT +ACTION +RESULT +REASON +ACTOR +USER ID +PASSKEY ID",
        ("policy",): "KEY +DEFAULT +VALUES +MEANING",
        ("policy", "--app", app): "KEY +VALUE +DEFAULT +VALUES +MEANING",
    }
    for command, head in heads.items():
        done = cli(*command)
        assert (done.status, done.err) == (0, "")
        assert re.match(head + "\n", done.out), done.out
    assert cli("user", "list", "--app", app).out == "None.\n"


# -- refusals as JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "code"),
    [
        (("app", "show", "--app", UNKNOWN), 1, "app_not_found"),
        (("app", "delete", "--app", UNKNOWN), 1, "not_confirmed"),
        (("app", "update", "--app", "{app}"), 1, "invalid_setting"),
        (("app", "update", "--app", "{app}", "--set", "counter=x"), 1, "invalid_setting"),
        (("user", "delete", "--app", "{app}", "--user", "ann", "--yes"), 1, "user_not_found"),
        (("passkey", "list", "--app", "{app}"), 2, "usage"),
        (("nonsense",), 2, "usage"),
        (("events", "--app", UNKNOWN, "--follow"), 1, "app_not_found"),
    ],
)
def test_a_refusal_is_an_object_for_a_program_and_a_sentence_for_a_person(
    cli: Cli,
    app: str,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    status: int,
    code: str,
) -> None:
    command = tuple(part.format(app=app) for part in command)
    plain, told = cli(*command), cli(*command, "--json")
    assert (plain.status, plain.out) == (told.status, "") == (status, "")
    assert told.err == plain.err
    value = json.loads(told.out)
    assert list(value) == ["code", "error"]
    assert value["code"] == code
    assert told.err.rstrip("\n").endswith(f": {value['error']}")

    monkeypatch.setenv("BROKER_DOCS_URL", DOCS)
    linked = cli(*command, "--json")
    assert json.loads(linked.out) == value | {"doc": f"{DOCS}#{code}"}
    if status == 1:
        assert linked.err == f"{plain.err.rstrip()} See {DOCS}#{code}\n"


def test_settings_and_stores_that_fail_are_objects_too(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_DOCS_URL", DOCS)
    monkeypatch.setenv("BROKER_DATABASE_URL", "postgresql://broker@127.0.0.1:1/x")
    assert json.loads(cli("app", "list", "--json").out) == {
        "code": "service_unavailable",
        "error": "Postgres does not answer; check BROKER_DATABASE_URL, or start `broker dev`.",
        "doc": f"{DOCS}#service_unavailable",
    }
    assert json.loads(cli("migrate", "--json").out)["code"] == "fault"
    monkeypatch.setenv("BROKER_DATABASE_URL", "")
    monkeypatch.setenv("BROKER_PORT", "x")
    done = cli("app", "list", "--json")
    assert json.loads(done.out)["error"] == (
        "BROKER_PORT must be a whole number from 0 to 65535. BROKER_DATABASE_URL is missing."
    )
    assert done.err.count(DOCS) == 1
    monkeypatch.setenv("BROKER_DOCS_URL", "no address")
    assert "doc" not in json.loads(cli("app", "list", "--json").out), "a link that can't be is none"


# -- help and completion ---------------------------------------------------------------------------


def commands() -> Iterator[argparse.ArgumentParser]:
    """The parser of every command that runs."""
    below = [command_line.parser()]
    while below:
        parser = below.pop()
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        below += [child for group in groups for child in group.choices.values()]
        if not groups:
            yield parser


COMMANDS = {parser.prog: parser for parser in commands()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_parse(cli: Cli, name: str) -> None:
    done = cli(*name.split()[1:], "--help")
    assert (done.status, done.err) == (0, "")
    _, _, shown = done.out.partition("\nexamples:\n")
    examples = [shlex.split(line.partition("#")[0]) for line in shown.splitlines()]
    assert examples
    for words in examples:
        if words[0] == "eval":
            words = shlex.split(words[1].removeprefix("$(").removesuffix(")"))
        words = words[: words.index("|")] if "|" in words else words
        assert " ".join(words).startswith(name), "it is of this command"
        chosen = command_line.parser().parse_args(words[1:])
        assert callable(chosen.run)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name: str) -> None:
    assert [action.dest for action in COMMANDS[name]._actions if not action.help] == []


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    lines = f"""{script}
    COMP_WORDS=({" ".join(shlex.quote(word) for word in words)}); COMP_CWORD={len(words) - 1}
    compopt() {{ :; }}
    _broker; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-eu", "-c", lines], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_every_command_and_option(cli: Cli) -> None:
    script = cli("completion", "bash").out
    assert completed(script, "broker", "") >= ["dev"]
    for name, parser in COMMANDS.items():
        words = name.split()
        assert words[-1] in completed(script, *words[:-1], "")
        options = {option for action in parser._actions for option in action.option_strings}
        offered = completed(script, *words, "--")
        assert set(offered) == {option for option in options if option.startswith("--")}
    assert completed(script, "broker", "user", "list", "--status", "p") == ["pending"]
    keys = completed(script, "broker", "app", "update", "--app", "Shop", "--set", "")
    assert keys == [f"{key.name}=" for key in policy_keys()]
    assert completed(script, "broker", "app", "show", "--app", "") == [], "any value may follow"
    assert completed(script, "broker", "completion", "") == ["bash", "zsh", "fish", "--help"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_are_told_the_same(cli: Cli, shell: str) -> None:
    script = cli("completion", shell).out
    for name, parser in COMMANDS.items():
        assert name in script
        for action in parser._actions:
            for option in action.option_strings:
                assert option.removeprefix("--") in script
    assert all(f"{key.name}=" in script for key in policy_keys())


# -- policy ----------------------------------------------------------------------------------------


def test_policy_lists_every_key_without_a_database(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it says of values is what `--set` takes."""
    monkeypatch.delenv("BROKER_DATABASE_URL")
    rows = cli("policy", "--json").json
    assert [row["key"] for row in rows] == [key.name for key in policy_keys()]
    for row, key in zip(rows, policy_keys(), strict=True):
        assert list(row) == ["key", "default", "values", "meaning"]
        assert row["meaning"]
        if isinstance(row["default"], str):
            assert row["default"] in row["values"].split(", ")
        low, to, high = row["values"].partition(" to ")
        values = [low, high] if to else row["values"].split(", ")
        if " a rate" in row["values"]:
            values = [row["default"], *re.findall(r"[0-9]+/\w+:[0-9]+", row["values"]), "0"]
            assert len(values) > 3
        if not row["values"].startswith(("a list", "PEM")):
            for value in values:
                set_to = Policy().set(row["key"], value, policy_keys())[key]
                assert str(set_to).lower() == value.lower()


def test_policy_shows_an_apps_values(cli: Cli, app: str) -> None:
    cli("app", "update", "--app", app, "--set", "nonce_life=120", "--set", "algorithms=ES256")
    rows = {row["key"]: row for row in cli("policy", "--app", app, "--json").json}
    assert (rows["nonce_life"]["value"], rows["nonce_life"]["default"]) == (120, 60)
    assert rows["algorithms"]["value"] == ["ES256"]
    assert refusal(cli("policy", "--app", UNKNOWN)) == "There is no such app."


# -- users -----------------------------------------------------------------------------------------


async def test_users_are_listed_by_page_status_and_external_id(cli: Cli, wire: Wire) -> None:
    run, mine = beside(cli), ("user", "list", "--app", wire.app_id)
    for name in ("ann", "ben", "cid"):
        await wire.user(name, Authenticator())
    await wire.open_registration("dan")
    rows = (await run(*mine, "--json")).json
    assert [(row["external_id"], row["status"]) for row in rows][:3] == [
        ("ann", "active"),
        ("ben", "active"),
        ("cid", "active"),
    ]
    assert list(rows[0]) == [
        "user_id", "external_id", "status", "login_count", "last_login_at", "created_at",
        "updated_at",
    ]  # fmt: skip
    assert re.fullmatch(ID, rows[0]["user_id"])
    page = await run(*mine, "--limit", "2", "--page", "2", "--status", "active")
    assert page.out.splitlines()[1].startswith("cid ")
    assert page.err == "broker: page 2 of 2, 3 users in all; --page shows another one.\n"
    assert (
        await run(*mine, "--limit", "2", "--page", "2", "--status", "active", "--json")
    ).err == ""
    pending = (await run(*mine, "--status", "pending", "--json")).json
    assert [row["external_id"] for row in pending] == [row["external_id"] for row in rows[3:]]
    assert [row["external_id"] for row in (await run(*mine, "--user", "ben", "--json")).json] == [
        "ben"
    ]
    assert (await run(*mine, "--user", "be", "--json")).json == [], (
        "external ids are compared whole"
    )


# -- events ----------------------------------------------------------------------------------------


async def test_events_are_filtered_by_user_and_action(cli: Cli, wire: Wire) -> None:
    run, mine = beside(cli), ("events", "--app", wire.app_id, "--json")
    for name in ("ann", "annette"):
        await wire.user(name, Authenticator())
    every = (await run(*mine)).json
    (ann,) = (await run("user", "list", "--app", wire.app_id, "--user", "ann", "--json")).json
    hers = [event for event in every if event["user_id"] == ann["user_id"]]
    assert len(hers) > 1
    for more in ((), ("--after", "0")):
        assert (await run(*mine, "--user", "ann", *more)).json == hers, "not those of a longer name"
        action = ("--action", "passkey.registered")
        registered = [event for event in every if event["action"] == action[1]]
        assert (await run(*mine, *action, *more)).json == registered
        assert (await run(*mine, *action, "--limit", "1", *more)).json == (
            registered[:1] if more else registered[1:]
        )
        both = (await run(*mine, *action, "--user", "ann", *more)).json
        assert both == [event for event in registered if event in hers]
        assert (await run(*mine, "--user", "nobody", *more)).json == []


async def test_events_are_followed_and_none_is_skipped(stores: EmbeddedStores, wire: Wire) -> None:
    """A transaction that drew its id earlier and commits later is waited for."""
    process = await asyncio.create_subprocess_exec(
        *(BROKER, "events", "--app", wire.app_id, "--follow", "--json", "--limit", "1"),
        env={**CLEAN, "BROKER_DATABASE_URL": stores.database_url},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    late, early = [await asyncpg.connect(stores.database_url) for _ in range(2)]
    try:
        assert json.loads(await process.stdout.readline())["action"] == "app.created"
        write = (
            "INSERT INTO events (at, app_id, actor, action, result, request_id)"
            " VALUES (now(), $1, 'cli', $2, 'done', 'r') RETURNING id"
        )
        async with late.transaction():
            lower = await late.fetchval(write, wire.app_id, "test.late")
            higher = await early.fetchval(write, wire.app_id, "test.early")
            waits = (
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%virtualtransaction%'"
                " AND query NOT LIKE '%newest%' AND pid <> pg_backend_pid()"
            )
            while not await early.fetchval(waits):
                assert process.returncode is None
                await asyncio.sleep(0.01)  # between two looks
        ids = [json.loads(await process.stdout.readline())["id"] for _ in range(2)]
        assert ids == [lower, higher]
        process.send_signal(signal.SIGINT)
        assert await process.stdout.read() == b""
        assert await process.wait() == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await late.close()
        await early.close()


async def test_ctrl_c_ends_following_at_a_terminal(
    cli: Cli, stores: EmbeddedStores, wire: Wire
) -> None:
    with Terminal(stores, "events", "--app", wire.app_id, "--follow") as terminal:
        terminal.wait_for("app.created")
        await beside(cli)("app", "update", "--app", wire.app_id, "--name", "New")
        terminal.wait_for("app.updated")
        terminal.press("\x03")
        assert terminal.end() == 130
        assert terminal.shown.count("ACTION") == 1
        assert "Traceback" not in terminal.shown


# -- terminals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(
    stores: EmbeddedStores, app: str, environment: dict[str, str], colour: bool
) -> None:
    with Terminal(stores, "app", "list", **environment) as terminal:
        assert terminal.end() == 0
        assert ("\x1b[1mAPP ID" in terminal.shown) is colour
        assert ("\x1b[" in terminal.shown) is colour
    assert "\x1b[" not in program(stores, "app", "list").stdout


LOCK = "SELECT FROM relying_parties WHERE id = $1 FOR UPDATE"


async def test_a_terminal_shows_progress_until_the_end(stores: EmbeddedStores, app: str) -> None:
    """While the database makes the command wait."""
    async with session_of(stores) as session:
        async with session.transaction():
            await session.execute(LOCK, app)
            terminal = Terminal(stores, "app", "update", "--app", app, "--name", "New")
            for seconds in (1, 2):
                await asyncio.to_thread(terminal.wait_for, f"broker app update… {seconds} s")
        with terminal:
            assert await asyncio.to_thread(terminal.end) == 0
    shown = terminal.shown.rpartition("\r\x1b[K")[2]
    assert shown.startswith("app_id ")
    assert "name             New\n" in shown


async def test_nothing_but_a_terminal_is_shown_progress(stores: EmbeddedStores, app: str) -> None:
    waits = (
        "SELECT count(*) FROM pg_locks"
        " WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
    )
    async with session_of(stores) as session:
        async with session.transaction():
            await session.execute(LOCK, app)
            change = ("app", "update", "--app", app, "--name", "New")
            task = asyncio.create_task(asyncio.to_thread(program, stores, *change))
            while not await session.fetchval(waits):
                assert not task.done(), task.result()
                await asyncio.sleep(0.005)  # between two looks
            await session.execute(
                "SELECT pg_sleep(1.5)"
            )  # longer than what is passed over in silence
        done = await task
    assert (done.returncode, done.stderr) == (0, "")


def test_the_start_of_a_command_imports_no_service() -> None:
    """What most of a command's time is: the modules that its start brings in."""
    script = "import sys, broker.cli; broker.cli.parser(); print(*sys.modules)"
    loaded = subprocess.run(
        [str(Path(BROKER).with_name("python")), "-c", script],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"aiohttp", "asyncpg", "webauthn", "redis", "httpx", "rich", "click"} & set(loaded)
