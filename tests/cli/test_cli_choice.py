"""Which app a command acts on, and what it asks before it does what can't be undone."""

from __future__ import annotations

import pytest

from broker.embedded import EmbeddedStores
from tests.support.authenticator import Authenticator
from tests.support.commands import NEW, UNKNOWN, Cli, Terminal, beside, program, refusal
from tests.support.wire import ORIGIN, RP_ID, Wire

LOCAL = (
    "app",
    "create",
    "--name",
    "Local",
    "--rp-id",
    "localhost",
    "--origin",
    "http://localhost:8080",
)


@pytest.fixture
def own(own_stores: EmbeddedStores, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Commands on a database without an app."""
    monkeypatch.setenv("BROKER_DATABASE_URL", own_stores.database_url)
    return cli


def make(cli: Cli, *command: str) -> str:
    return str(cli(*command, "--json").json["app_id"])


def test_without_an_app_there_is_none_to_choose(own: Cli) -> None:
    assert refusal(own("app", "show")) == "There is no app yet; `broker app create` makes one."


def test_the_only_app_need_not_be_named(own: Cli) -> None:
    app = make(own, *LOCAL)
    changed = own("app", "update", "--add-origin", "http://localhost:8081", "--json").json
    assert (changed["app_id"], changed["origins"]) == (
        app,
        ["http://localhost:8080", "http://localhost:8081"],
    )
    assert [event["action"] for event in own("events", "--json").json] == [
        "app.created",
        "app.updated",
    ]
    key = own("key", "create", "--json").json["key_id"]
    revoked = own("key", "revoke", "--key", key)
    assert revoked.err == f"broker: acting on the app Local (localhost, {app}).\n"
    assert own("signing-key", "rotate", "--json").status == 0
    assert own("signing-key", "list", "--app", "Local", "--json").json == [], (
        "the broker's own set was meant"
    )


def test_of_several_apps_one_is_named(own: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """By id or name; the setting stands behind the option, and an id before a name."""
    first, second = make(own, *LOCAL), make(own, *NEW)
    sentence = refusal(own("app", "show"))
    assert sentence == (
        "There are 2 apps; name one with --app or BROKER_APP:"
        f" {first} (Local, localhost), {second} (Example, {RP_ID})."
    )
    for given, found in (("Local", first), ("Example", second), (second, second)):
        assert own("app", "show", "--app", given, "--json").json["app_id"] == found
        monkeypatch.setenv("BROKER_APP", given)
        assert own("app", "show", "--json").json["app_id"] == found
        assert own("app", "show", "--app", first, "--json").json["app_id"] == first
        monkeypatch.delenv("BROKER_APP")
    monkeypatch.setenv("BROKER_APP", "Nobody")
    assert refusal(own("app", "show")) == "There is no such app."
    monkeypatch.delenv("BROKER_APP")
    third = make(own, "app", "create", "--name", first, "--rp-id", RP_ID, "--origin", ORIGIN)
    assert own("app", "show", "--app", first, "--json").json["app_id"] == first
    assert own("app", "show", "--app", third, "--json").json["name"] == first


def test_a_name_of_several_apps_is_refused_with_their_ids(own: Cli) -> None:
    ids = [make(own, *NEW) for _ in range(12)]
    for command in (
        ("app", "show"),
        ("app", "delete", "--yes"),
        ("events",),
        ("signing-key", "list"),
    ):
        sentence = refusal(own(*command, "--app", "Example"))
        assert sentence.startswith(
            f"12 apps have this name; give the id of one: {ids[0]} (Example, {RP_ID}), "
        )
        assert all(app in sentence for app in ids[:10])
        assert sentence.endswith(" and 2 more.")
    assert len(own("app", "list", "--json").json) == 12


# -- questions -------------------------------------------------------------------------------------

DESTRUCTIVE = [
    ("app", "delete"),
    ("user", "delete", "--user", "ann"),
    ("passkey", "revoke", "--user", "ann", "--all"),
]


@pytest.mark.parametrize("command", DESTRUCTIVE)
def test_without_a_terminal_and_without_yes_nothing_is_done(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Not even a look at the database."""
    monkeypatch.setenv("BROKER_DATABASE_URL", "postgresql://broker@127.0.0.1:1/x")
    assert refusal(cli(*command, "--app", UNKNOWN)) == (
        "This can't be undone, and there is no terminal to ask at; "
        "give --yes to do it without a question."
    )
    assert cli(*command, "--json").status == 1


@pytest.mark.parametrize("answer", ["no\n", "\n", "yep\n", "\x04"])
async def test_at_a_terminal_only_yes_is_consent(
    cli: Cli, stores: EmbeddedStores, wire: Wire, device: Authenticator, answer: str
) -> None:
    await wire.user("ann", device)
    app = ("--app", wire.app_id)
    questions = [
        "with its 1 user and 1 passkey? Type yes to go on: ",
        "Delete the user ann of the app ",
        "Revoke 1 passkey of the user ann of the app ",
    ]
    for command, question in zip(DESTRUCTIVE, questions, strict=True):
        with Terminal(stores, *command, *app) as terminal:
            terminal.wait_for("Type yes to go on: ")
            assert question in terminal.shown
            assert wire.app_id in terminal.shown
            terminal.press(answer)
            assert terminal.end() == 1
            assert "Nothing was changed.\n" in terminal.shown
    assert len((await beside(cli)("passkey", "list", *app, "--user", "ann", "--json")).json) == 1


async def test_yes_does_it(
    cli: Cli, stores: EmbeddedStores, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    app = ("--app", wire.app_id)
    for command in reversed(DESTRUCTIVE):
        with Terminal(stores, *command, *app) as terminal:
            terminal.wait_for("Type yes to go on: ")
            terminal.press("Yes\n")
            assert terminal.end() == 0
    assert refusal(await beside(cli)("app", "show", *app)) == "There is no such app."
    actions = [event["action"] for event in (await beside(cli)("events", *app, "--json")).json]
    assert actions[-3:] == ["passkey.revoked", "user.deleted", "app.deleted"]


async def test_ctrl_c_at_a_question_ends_at_once(
    cli: Cli, stores: EmbeddedStores, wire: Wire
) -> None:
    with Terminal(stores, "app", "delete", "--app", wire.app_id) as terminal:
        terminal.wait_for("Type yes to go on: ")
        terminal.press("\x03")
        assert terminal.end() == 130
    assert (await beside(cli)("app", "show", "--app", wire.app_id)).status == 0


async def test_one_passkey_is_revoked_without_a_question(
    cli: Cli, stores: EmbeddedStores, wire: Wire, device: Authenticator
) -> None:
    passkey = await wire.user("ann", device)
    revoke = ("passkey", "revoke", "--app", wire.app_id, "--user", "ann", "--passkey", passkey)
    done = program(stores, *revoke)
    assert (done.returncode, done.stdout.split()) == (0, ["revoked", passkey])
    assert done.stderr.startswith("broker: acting on the app ")
    assert (await beside(cli)("passkey", "list", *revoke[2:6], "--json")).json == []
