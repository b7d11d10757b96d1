"""The command line on data: what each command does, prints and refuses, and with which exit status.

Most commands run in this process, through the `main` that the installed `broker` calls; the first
section runs that program.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pwd
import re
import secrets
import select
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

from broker import __version__
from broker.cli import dev, doctor, findings, records
from broker.cli.findings import Finding
from broker.dialects import DIALECTS, policy_keys
from broker.embedded import EmbeddedStores
from broker.errors import Fault
from broker.model import ALGORITHMS
from broker.settings import Settings
from broker.tokens import key_digest
from tests.conftest import SECRET_KEY, Started, Starter
from tests.core.test_model import BAD, GOOD, ROOTS
from tests.support.authenticator import Authenticator
from tests.support.commands import (
    BROKER,
    CLEAN,
    ID,
    KEY,
    NEW,
    UNKNOWN,
    Cli,
    Done,
    beside,
    program,
    refusal,
)
from tests.support.processes import until
from tests.support.servers import session_of
from tests.support.wire import ORIGIN, RP_ID, Wire

ACTOR = f"cli:{pwd.getpwuid(os.getuid()).pw_name}"


@pytest.fixture
def app(cli: Cli) -> str:
    """An app of the test's own."""
    return str(cli(*NEW, "--json").json["app_id"])


async def query(stores: EmbeddedStores, sql: str, *values: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(stores.database_url)
    try:
        return await connection.fetch(sql, *values)
    finally:
        await connection.close()


# -- the program -----------------------------------------------------------------------------------


def test_the_program_makes_shows_and_refuses(stores: EmbeddedStores, tmp_path: Path) -> None:
    made = program(stores, *NEW, "--json", cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    told = json.loads(made.stdout)
    assert told.keys() == {"app_id", "api_key"}
    shown = program(stores, "app", "show", "--app", told["app_id"], cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"app_id           {told['app_id']}\nname             Example\n")
    refused = program(stores, "app", "show", "--app", UNKNOWN, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "broker: There is no such app.\n"


def test_an_argument_that_is_no_text_is_usage(stores: EmbeddedStores) -> None:
    done = program(stores, "user", "delete", "--app", UNKNOWN, "--user", b"\xff")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("broker: error: an argument is not UTF-8\n")


def test_a_reader_that_goes_away_is_no_fault(stores: EmbeddedStores) -> None:
    """As in `broker app list | head -1`."""
    read, write = os.pipe()
    os.close(read)
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
    try:
        process = subprocess.run(
            [str(BROKER), "app", "list"],
            env=CLEAN | urls,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(write)
    assert (process.returncode, process.stderr) == (1, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_long_answer_is_whole_when_the_process_was_stopped(
    stores: EmbeddedStores, cli: Cli, unbuffered: str
) -> None:
    """A pipe that is full takes the rest later; who is stopped while waiting for that is told of a
    part.
    """
    for _ in range(12):
        cli(*NEW)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [str(BROKER), "app", "list", "--json"],
        env={**CLEAN, "BROKER_DATABASE_URL": stores.database_url, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
    )
    os.close(writer)
    with open(reader, "rb") as pipe:
        until(lambda: select.select([pipe], [], [], 0)[0] != [], "it writes")
        until(
            lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] == "S",
            "it waits",
        )
        for number in (signal.SIGSTOP, signal.SIGCONT):
            process.send_signal(number)
            time.sleep(0.1)  # so that it is seen by itself
        assert len(json.loads(pipe.read())) >= 12
    assert process.wait(30) == 0


def test_the_version(cli: Cli) -> None:
    assert cli("--version") == Done(0, f"broker {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("appp",),
        ("app",),
        ("app", "create"),
        ("app", "create", "--name", "A", "--rp-id", RP_ID),
        ("key", "revoke", "--app", UNKNOWN),
        ("passkey", "list", "--app", UNKNOWN),
        ("passkey", "revoke", "--app", UNKNOWN, "--user", "ann"),
        ("passkey", "revoke", "--app", UNKNOWN, "--user", "ann", "--all", "--passkey", UNKNOWN),
        ("user", "delete", "--app", UNKNOWN),
        ("user", "list", "--status", "asleep"),
        ("events", "--app", UNKNOWN, "--limit", "0"),
        ("events", "--app", UNKNOWN, "--since", "yesterday"),
        ("events", "--app", UNKNOWN, "later"),
        ("events", "--app", UNKNOWN, "--limit", "-1"),
        ("events", "--app", UNKNOWN, "--limit", "10001"),
        ("events", "--app", UNKNOWN, "--limit", "many"),
        ("events", "--app", UNKNOWN, "--after", "9223372036854775808"),
        ("events", "--app", UNKNOWN, "--after", "9" * 5000),
        ("serve", "--port", "http"),
        ("migrate", "--now"),
    ],
)
def test_wrong_usage_is_status_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert (done.status, done.out) == (2, "")
    assert re.match(r"usage: broker", done.err)
    assert re.search(r"\nbroker[a-z ]*: error: [^\n]+\n\Z", done.err)


# -- apps ------------------------------------------------------------------------------------------


async def test_a_new_app_works_and_its_key_is_stored_hashed(
    cli: Cli, stores: EmbeddedStores, broker: Started, wire: Wire, device: Authenticator
) -> None:
    told = (await beside(cli)(*NEW, "--json")).json
    assert list(told) == ["app_id", "api_key"]
    assert re.fullmatch(ID, told["app_id"])
    assert re.fullmatch(KEY, told["api_key"])
    mine = Wire(wire.session, wire.url, told["app_id"], told["api_key"])
    await mine.user("ann", device)
    assert (await mine.keyed("GET", "/users?identifier=ann&limit=1")).status == 200
    assert (await mine.keyed("GET", "/users", key=wire.key)).code == "invalid_access_token"
    (row,) = await query(
        stores, "SELECT k.*, k::text AS whole FROM api_keys k WHERE app_id = $1", told["app_id"]
    )
    assert row["hash"] == key_digest(told["api_key"])
    assert told["api_key"][8:] not in row["whole"]
    assert told["api_key"].startswith(row["hint"].removesuffix("…"))
    assert len(row["hint"]) == len("pbk_") + 4 + 1
    (event, *_) = await broker.parts.directory.events(told["app_id"], limit=1000)
    assert (event.action, event.actor) == ("app.created", ACTOR)
    assert re.fullmatch(r"cli-[0-9a-f]{16}", event.request_id)


def test_create_prints_for_people_too(cli: Cli) -> None:
    done = cli(*NEW)
    assert done.status == 0
    assert re.fullmatch(rf"app_id           {ID}\napi_key          {KEY}\n", done.out)
    assert done.err == ""


def test_an_app_is_what_was_given(cli: Cli) -> None:
    made = cli(
        *("app", "create", "--name", "Bücher", "--rp-id", "Bücher.example", "--json"),
        *(
            "--origin",
            "https://bücher.example:443/",
            "--origin",
            "https://shop.bücher.example:8443",
        ),
        *(
            "--related-origin",
            "https://buecher.example",
            "--set",
            "nonce_life=30",
            "--set",
            "counter=flag",
        ),
    ).json
    shown = cli("app", "show", "--app", made["app_id"], "--json").json
    created_at = shown.pop("created_at")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", created_at)
    policy = shown.pop("policy")
    assert shown == {
        "app_id": made["app_id"],
        "name": "Bücher",
        "rp_id": "xn--bcher-kva.example",
        "origins": ["https://xn--bcher-kva.example", "https://shop.xn--bcher-kva.example:8443"],
        "related_origins": ["https://buecher.example"],
    }
    assert (policy["nonce_life"], policy["counter"]) == (30, "flag")
    assert list(policy) == [key.name for key in policy_keys()]
    assert shown in [
        {k: v for k, v in row.items() if k not in ("created_at", "policy")}
        for row in cli("app", "list", "--json").json
    ]
    assert re.search(
        rf"^{made['app_id']}  Bücher +xn--bcher-kva.example  ", cli("app", "list").out, re.M
    )


ANDROID = "android:apk-key-hash:" + "Ab-_" * 10 + "xyz"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--name", ""), "The name has 1 to 128 characters."),
        (("--name", "a\x1b[2Jb"), "The name has a control character."),
        (("--rp-id", "https://example.org"), "The RP ID 'https://example.org' is not a domain."),
        (
            ("--rp-id", "127.0.0.1"),
            "The RP ID '127.0.0.1' is an IP address; passkeys need a domain.",
        ),
        (
            ("--origin", "https://example.com"),
            "The host of https://example.com is neither example.org nor below it; "
            "list it as a related origin or change the RP ID.",
        ),
        (("--origin", "https://evilexample.org"), "The host of https://evilexample.org is neither"),
        (
            ("--origin", "http://example.org"),
            "http://example.org is plain http, which browsers allow on",
        ),
        (
            ("--origin", "https://192.0.2.1"),
            "The host '192.0.2.1' is an IP address; passkeys need a domain.",
        ),
        (
            ("--origin", "https://example.org/login"),
            "'https://example.org/login' is not an origin like",
        ),
        (("--origin", "https://me@example.org"), "'https://me@example.org' is not an origin like"),
        (
            ("--origin", "https://example.org:99999"),
            "'https://example.org:99999' is not an origin like",
        ),
        (
            ("--origin", "https://straße.example.org"),
            "The host 'straße.example.org' can't be converted safely",
        ),
        (
            ("--origin", "android:apk-key-hash:abc"),
            "'android:apk-key-hash:abc' is not android:apk-key-hash",
        ),
        (("--related-origin", ANDROID), f"'{ANDROID}' is not an origin like https://example.com."),
        (("--related-origin", "http://example.net"), "http://example.net is plain http"),
        (("--set", "nonce_life"), "--set takes KEY=VALUE, not 'nonce_life'."),
        (
            ("--set", "nonce_live=60"),
            "There is no policy key 'nonce_live'; there are user_verification,",
        ),
        (
            ("--set", "counter=flag", "--set", "nonce_life=9999"),
            "nonce_life is a whole number from 5 to 600",
        ),
        *((("--set", f"{key}={text}"), sentence) for key, text, sentence in BAD),
    ],
)
def test_create_and_update_refuse_alike_and_change_nothing(
    cli: Cli, app: str, changes: tuple[str, ...], sentence: str
) -> None:
    apps, before = (
        len(cli("app", "list", "--json").json),
        cli("app", "show", "--app", app, "--json").json,
    )
    assert refusal(cli(*NEW, *changes)).startswith(sentence)
    assert refusal(cli("app", "update", "--app", app, *changes)).startswith(sentence)
    assert len(cli("app", "list", "--json").json) == apps
    assert cli("app", "show", "--app", app, "--json").json == before
    assert [e["action"] for e in cli("events", "--app", app, "--json").json] == ["app.created"]


def test_update_changes_what_is_named(cli: Cli, app: str) -> None:
    before = cli("app", "show", "--app", app, "--json").json
    renamed = cli("app", "update", "--app", app, "--name", "New", "--json").json
    assert renamed == before | {"name": "New"}
    moved = cli(
        *(
            "app",
            "update",
            "--app",
            app,
            "--rp-id",
            "example.net",
            "--json",
            "--origin",
            "https://example.net",
        ),
        *("--origin", ANDROID, "--related-origin", "https://example.com"),
    ).json
    assert moved == renamed | {
        "rp_id": "example.net",
        "origins": ["https://example.net", ANDROID],
        "related_origins": ["https://example.com"],
    }
    cleared = cli("app", "update", "--app", app, "--related-origin", "", "--json").json
    assert cleared == moved | {"related_origins": []}
    assert cli("app", "show", "--app", app, "--json").json == cleared
    assert [e["action"] for e in cli("events", "--app", app, "--json").json] == [
        "app.created",
        *["app.updated"] * 3,
    ]


def test_origins_are_added_and_removed_beside_those_there_are(cli: Cli, app: str) -> None:
    """In canonical form, repeatable, in one command or several; an origin that is there already is
    no fault.
    """

    def update(*changes: str) -> list[str]:
        origins: list[str] = cli("app", "update", "--app", app, "--json", *changes).json["origins"]
        assert cli("app", "show", "--app", app, "--json").json["origins"] == origins
        return origins

    (first,) = cli("app", "show", "--app", app, "--json").json["origins"]
    more = ["https://a.example.org", "https://b.example.org:8443", ANDROID]
    assert update("--add-origin", "HTTPS://A.example.org:443/") == [first, more[0]]
    assert update("--add-origin", more[1], "--add-origin", ANDROID) == [first, *more]
    assert update("--add-origin", more[0]) == [first, *more]
    assert update("--remove-origin", "https://A.example.org") == [first, *more[1:]]
    assert update(
        "--remove-origin", more[1], "--remove-origin", ANDROID, "--add-origin", more[0]
    ) == [
        first,
        more[0],
    ]
    assert update("--name", "Renamed", "--remove-origin", first) == [more[0]]
    assert [e["action"] for e in cli("events", "--app", app, "--json").json[1:]] == [
        "app.updated"
    ] * 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ("--add-origin", "https://example.com"),
            "The host of https://example.com is neither example.org",
        ),
        (("--add-origin", "http://example.org"), "http://example.org is plain http"),
        (("--add-origin", "null"), "'null' is not an origin like https://example.com."),
        (
            ("--add-origin", "https://example.org/login"),
            "'https://example.org/login' is not an origin like",
        ),
        (
            ("--add-origin", "android:apk-key-hash:abc"),
            "'android:apk-key-hash:abc' is not android:",
        ),
        (
            ("--remove-origin", "https://a.example.org"),
            "https://a.example.org is none of the app's origins: https://example.org.",
        ),
        (
            ("--remove-origin", ANDROID),
            f"{ANDROID} is none of the app's origins: https://example.org.",
        ),
        (
            ("--remove-origin", "example.org"),
            "'example.org' is not an origin like https://example.com.",
        ),
        (("--remove-origin", "https://example.org"), "An app needs at least one origin"),
        (
            ("--remove-origin", "https://example.org", "--remove-origin", "https://example.org"),
            "https://example.org is none of the app's origins",
        ),
        (
            ("--origin", "https://example.org", "--add-origin", "https://a.example.org"),
            "--origin replaces every origin; give it, or --add-origin and --remove-origin.",
        ),
    ],
)
def test_an_origin_that_can_not_be_added_or_removed_changes_nothing(
    cli: Cli, app: str, changes: tuple[str, ...], sentence: str
) -> None:
    before = cli("app", "show", "--app", app, "--json").json
    assert refusal(cli("app", "update", "--app", app, *changes)).startswith(sentence)
    assert cli("app", "show", "--app", app, "--json").json == before


def test_a_related_origin_is_removed_in_its_own_way(cli: Cli, app: str) -> None:
    cli("app", "update", "--app", app, "--related-origin", "https://example.com")
    said = refusal(cli("app", "update", "--app", app, "--remove-origin", "https://example.com"))
    assert said.startswith(
        "https://example.com is a related origin; --related-origin replaces those."
    )


async def test_update_of_what_was_changed_meanwhile_is_refused(
    app: str, stores: EmbeddedStores
) -> None:
    """The command has read the app and waits for the row, which another one changes."""
    async with session_of(stores) as session:
        async with session.transaction():
            change = "UPDATE relying_parties SET name = 'Theirs', updated_at = now() WHERE id = $1"
            await session.execute(change, app)
            update = asyncio.to_thread(
                program, stores, "app", "update", "--app", app, "--name", "Ours"
            )
            task = asyncio.create_task(update)
            waiting = (
                "SELECT count(*) FROM pg_locks"
                " WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
            )
            while not await session.fetchval(waiting):
                assert not task.done(), task.result()
                await asyncio.sleep(0.005)  # between two looks
        done = await task
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "broker: The app was changed meanwhile; look at it and try again.\n"
        assert (
            await session.fetchval("SELECT name FROM relying_parties WHERE id = $1", app)
            == "Theirs"
        )


def test_update_refuses_an_rp_id_that_its_origins_are_not_below(cli: Cli, app: str) -> None:
    sentence = refusal(cli("app", "update", "--app", app, "--rp-id", "example.net"))
    assert sentence.startswith(
        "The host of https://example.org is neither example.net nor below it;"
    )


def test_update_without_a_change_is_refused(cli: Cli, app: str) -> None:
    assert refusal(cli("app", "update", "--app", app)).startswith("Nothing to change; give --name,")
    assert len(cli("events", "--app", app, "--json").json) == 1


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_every_policy_key_can_be_set(
    cli: Cli, app: str, key: str, text: str, value: object
) -> None:
    shown = cli("app", "update", "--app", app, "--set", f"{key}={text}", "--json").json["policy"]
    expected: object = list(value) if isinstance(value, tuple) else value
    if key == "attestation_roots":
        assert isinstance(value, tuple)
        expected = len(value)  # certificates are long, and their number says enough
    if key == "algorithms":
        assert isinstance(value, tuple)
        expected = [ALGORITHMS[number] for number in value]
    assert shown[key] == expected
    assert cli("app", "show", "--app", app, "--json").json["policy"] == shown
    assert f"{key}=" in cli("app", "show", "--app", app).out


def test_several_policy_keys_at_once(cli: Cli, app: str) -> None:
    names = ",".join(ALGORITHMS.values())
    arguments = ("--set", f"algorithms={names}", "--set", "nonce_life=30", "--set", "nonce_life=45")
    policy = cli("app", "update", "--app", app, *arguments, "--json").json["policy"]
    assert (policy["algorithms"], policy["nonce_life"]) == (list(ALGORITHMS.values()), 45)


def test_policy_keys_that_contradict_each_other_are_refused(cli: Cli, app: str) -> None:
    """When they are set, and when one is changed that another needs; in both cases nothing
    changes.
    """
    update = ("app", "update", "--app", app)
    root = ("--set", f"attestation_roots={ROOTS[0]}")
    direct, verified = ("--set", "attestation=direct"), ("--set", "attestation_required=verified")
    assert "needs attestation=direct" in refusal(cli(*update, *verified, *root))
    assert "needs attestation_roots" in refusal(cli(*update, *verified, *direct))
    assert (
        cli(*update, *verified, *direct, *root, "--json").json["policy"]["attestation_required"]
        == "verified"
    )
    assert "needs attestation=direct" in refusal(cli(*update, "--set", "attestation=none"))
    assert "needs attestation_roots" in refusal(cli(*update, "--set", "attestation_roots="))
    assert cli("app", "show", "--app", app, "--json").json["policy"]["attestation"] == "direct"
    created = (
        "app",
        "create",
        "--name",
        "E",
        "--rp-id",
        "example.org",
        "--origin",
        "https://example.org",
    )
    assert "needs attestation=direct" in refusal(cli(*created, *verified))
    created, updated = cli("events", "--app", app, "--json").json
    assert [e["action"] for e in (created, updated)] == ["app.created", "app.updated"]
    assert updated["payload"] == {
        "changed": ["attestation", "attestation_required", "attestation_roots"]
    }


def test_delete_an_app(cli: Cli, app: str) -> None:
    assert cli("app", "delete", "--app", app, "--yes", "--json").json == {"deleted": app}
    assert refusal(cli("app", "delete", "--app", app, "--yes")) == "There is no such app."
    created, event = cli("events", "--app", app, "--json").json
    assert created["action"] == "app.created"
    assert (event["action"], event["actor"], event["result"]) == ("app.deleted", ACTOR, "done")
    assert cli("events", "--app", app, "--after", str(created["id"]), "--json").json == [event]


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({"SSH_CONNECTION": "192.0.2.7 50022 198.51.100.1 22"}, "192.0.2.7"),
        ({"SSH_CLIENT": "2001:db8:1:2::7 50022 22"}, "2001:db8:1:2::7"),
        (
            {"SSH_CONNECTION": "192.0.2.7 1 198.51.100.1 22", "SSH_CLIENT": "192.0.2.8 1 22"},
            "192.0.2.7",
        ),
        ({"SSH_CONNECTION": "192.0.2.7, 198.51.100.1"}, None),
        ({"SSH_CONNECTION": "fe80::7%\udcff 1 fe80::8%eth0 22"}, "fe80::7"),
        ({"SSH_CLIENT": "somewhere 50022 22"}, None),
        ({}, None),
    ],
)
def test_an_event_has_the_address_of_the_operator(
    cli: Cli,
    app: str,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    address: str | None,
) -> None:
    for name in ("SSH_CONNECTION", "SSH_CLIENT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cli("key", "create", "--app", app)
    event = cli("events", "--app", app, "--json").json[-1]
    assert [event[name] for name in ("action", "actor", "address", "user_agent")] == [
        "key.created",
        ACTOR,
        address,
        None,
    ]


def test_an_account_without_a_name_is_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 2_000_000_000)
    assert records.operator_account() == "cli:2000000000"


@pytest.mark.parametrize(
    "app_id", [UNKNOWN, "", "x", "../../etc/passwd", "A" * 23 + "é", "' OR 1=1 --"]
)
@pytest.mark.parametrize(
    "command",
    [
        ("app", "show"),
        ("app", "update", "--name", "New"),
        ("app", "delete", "--yes"),
        ("key", "create"),
        ("key", "list"),
        ("passkey", "list", "--user", "ann"),
        ("passkey", "revoke", "--user", "ann", "--all", "--yes"),
        ("user", "list"),
        ("user", "disable", "--user", "ann"),
        ("user", "delete", "--user", "ann", "--yes"),
    ],
)
def test_an_unknown_app_is_one_sentence(cli: Cli, command: tuple[str, ...], app_id: str) -> None:
    assert refusal(cli(*command, "--app", app_id)) == "There is no such app."
    if app_id:
        assert refusal(cli("events", "--app", app_id)) == "There is no such app."


# -- keys ------------------------------------------------------------------------------------------


async def test_a_revoked_key_ends_on_a_running_broker(
    cli: Cli, start_broker: Starter, wire: Wire
) -> None:
    """Within the 0.9 s that look-ups are remembered, so within a second."""
    run, running = beside(cli), await start_broker(cache_seconds=0.9)
    told = (await run("key", "create", "--app", wire.app_id, "--name", "second", "--json")).json
    assert list(told) == ["key_id", "api_key"]
    assert re.fullmatch(ID, told["key_id"])
    assert re.fullmatch(KEY, told["api_key"])
    mine = Wire(wire.session, running.url, wire.app_id, told["api_key"])
    assert (await mine.keyed("GET", "/users")).status == 200
    revoke = ("key", "revoke", "--app", wire.app_id, "--key", told["key_id"])
    assert (await run(*revoke, "--json")).json == {"revoked": told["key_id"]}
    running.clock.ahead += 0.9
    answer = await mine.keyed("GET", "/users")
    assert (answer.status, answer.code) == (401, "invalid_access_token")
    assert (
        running.metric("broker_refusals_total", code="invalid_access_token", reason="key_unknown")
        == 1
    )
    assert (await mine.keyed("GET", "/users", key=wire.key)).status == 200
    assert "no such unrevoked key" in refusal(await run(*revoke))


def test_lists_never_show_a_key(cli: Cli, app: str) -> None:
    secret = cli("key", "create", "--app", app, "--name", "second", "--json").json["api_key"]
    rows = cli("key", "list", "--app", app, "--json").json
    assert [row["name"] for row in rows] == ["first", "second"]
    assert [list(row) for row in rows] == [
        ["key_id", "hint", "name", "created_at", "revoked_at"]
    ] * 2
    assert rows[1]["hint"] == secret[:8] + "…"
    cli("key", "revoke", "--app", app, "--key", rows[1]["key_id"])
    first, second = cli("key", "list", "--app", app, "--json").json
    assert first["revoked_at"] is None
    assert second["revoked_at"] is not None
    for command in (
        ("key", "list", "--app", app),
        ("app", "list"),
        ("app", "show", "--app", app),
        ("events", "--app", app),
    ):
        for done in (cli(*command), cli(*command, "--json")):
            assert done.status == 0
            assert secret[8:] not in done.out + done.err
    assert [e["action"] for e in cli("events", "--app", app, "--json").json] == [
        "app.created",
        "key.created",
        "key.revoked",
    ]


@pytest.mark.parametrize("key_id", [UNKNOWN, "", "pbk_" + "a" * 43])
def test_an_unknown_key_is_one_sentence(cli: Cli, app: str, key_id: str) -> None:
    sentence = "The app has no such unrevoked key; `broker key list` shows the ids."
    assert refusal(cli("key", "revoke", "--app", app, "--key", key_id)) == sentence
    assert (
        refusal(cli("key", "revoke", "--app", UNKNOWN, "--key", key_id)) == "There is no such app."
    )


def test_another_apps_key_stays(cli: Cli, app: str) -> None:
    other = cli(*NEW, "--json").json["app_id"]
    (row,) = cli("key", "list", "--app", other, "--json").json
    refusal(cli("key", "revoke", "--app", app, "--key", row["key_id"]))
    assert cli("key", "list", "--app", other, "--json").json == [row]


# -- passkeys and users ----------------------------------------------------------------------------


async def test_passkeys_are_listed_and_revoked(cli: Cli, broker: Started, wire: Wire) -> None:
    run, devices = beside(cli), [Authenticator() for _ in range(3)]
    ids = [await wire.user("ann", device) for device in devices]
    other = await wire.user("ben", Authenticator())
    mine = ("--app", wire.app_id, "--user", "ann")
    rows = (await run("passkey", "list", *mine, "--json")).json
    assert [row["passkey_id"] for row in rows] == ids
    assert list(rows[0]) == [
        "passkey_id", "name", "credential_id", "sign_count", "use_count", "backup_eligible",
        "backed_up", "attestation", "aaguid", "live", "created_at", "confirmed_at", "last_used_at",
    ]  # fmt: skip
    assert (rows[0]["name"], rows[0]["live"], rows[0]["last_used_at"]) == (
        "Ann's passkey",
        True,
        None,
    )
    assert (await run("passkey", "list", *mine)).out.count("\n") == 1 + 3

    assert (await run("passkey", "revoke", *mine, "--passkey", ids[0], "--json")).json == {
        "revoked": [ids[0]]
    }
    handle, options = await wire.begin("authenticate", None)
    answer = await wire.finish("authenticate", handle, devices[0].authenticate(options, ORIGIN))
    assert answer.code == "discoverable_login_failed"
    reason = {"code": "discoverable_login_failed", "reason": "unknown_credential"}
    assert broker.metric("broker_refusals_total", **reason) == 1
    for passkey in (ids[0], other, UNKNOWN, "x", ""):
        sentence = refusal(await run("passkey", "revoke", *mine, "--passkey", passkey))
        assert sentence == "The user has no such passkey."

    every = ("passkey", "revoke", *mine, "--all", "--yes", "--json")
    assert (await run(*every)).json == {"revoked": ids[1:]}
    assert (await run(*every)).json == {"revoked": []}
    assert await run("passkey", "list", *mine) == Done(0, "None.\n", "")
    assert (await run("passkey", "list", *mine, "--json")).json == []
    assert (
        await wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"})
    ).code == ("user_has_no_passkeys")
    assert (
        len((await run("passkey", "list", "--app", wire.app_id, "--user", "ben", "--json")).json)
        == 1
    )


@pytest.mark.parametrize("user", ["nobody", "", "Ann", "ann ", "' OR 1=1 --", "x" * 10_000])
async def test_an_unknown_user_is_one_sentence(
    cli: Cli, wire: Wire, device: Authenticator, user: str
) -> None:
    """External ids are compared byte for byte."""
    await wire.user("ann", device)
    for command in (
        ("passkey", "list"),
        ("passkey", "revoke", "--all", "--yes"),
        ("user", "disable"),
        ("user", "enable"),
        ("user", "delete", "--yes"),
    ):
        done = await beside(cli)(*command, "--app", wire.app_id, "--user", user)
        assert refusal(done) == "The app has no such user."


async def test_a_user_is_disabled_and_enabled(cli: Cli, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    of_ann = ("--app", wire.app_id, "--user", "ann", "--json")
    for verb, status, opened in (("disable", "inactive", 403), ("enable", "active", 201)):
        done = await beside(cli)("user", verb, *of_ann)
        assert done.json == {f"{verb}d": "ann"}
        [user] = (await beside(cli)("user", "list", *of_ann)).json
        assert user["status"] == status
        answer = await wire.keyed("POST", "/transactions/authenticate", {"external_id": "ann"})
        assert answer.status == opened


async def test_a_deleted_user_leaves_our_ids_in_events_alone(
    cli: Cli, stores: EmbeddedStores, wire: Wire, device: Authenticator
) -> None:
    """In no table, under none of their names but our ids in events; who stays is as before."""
    external = f"ann-{secrets.token_hex(8)}@example.org"
    passkey = await wire.user(external, device)
    await wire.user("ben", Authenticator())
    await wire.redeem(await wire.authenticate(await wire.open_authentication(external), device))
    (user,) = await query(stores, "SELECT id, handle FROM users WHERE external_id = $1", external)
    (credential,) = await query(
        stores, "SELECT credential_id FROM credentials WHERE id = $1", passkey
    )
    names = [external, user["id"], user["handle"], passkey, credential["credential_id"].hex()]
    assert await _found(stores, names) == set(names)

    done = await beside(cli)(
        "user", "delete", "--app", wire.app_id, "--user", external, "--yes", "--json"
    )
    assert done.json == {"deleted": external}
    assert await _found(stores, names) == {user["id"], passkey}
    for table in ("users", "credentials"):
        assert (
            await query(stores, f"SELECT FROM {table} WHERE id IN ($1, $2)", user["id"], passkey)
            == []
        )
    answer = await wire.keyed("POST", "/transactions/authenticate", {"external_id": external})
    assert answer.code == "user_not_found"
    assert (await wire.keyed("GET", f"/users/{user['id']}")).code == "user_not_found"
    handle, options = await wire.begin("authenticate", None)
    answer = await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    assert answer.code == "discoverable_login_failed"
    last = (await beside(cli)("events", "--app", wire.app_id, "--json")).json[-1]
    assert (last["action"], last["user_id"], last["passkey_id"]) == (
        "user.deleted",
        user["id"],
        None,
    )
    assert (await beside(cli)("passkey", "list", "--app", wire.app_id, "--user", "ben")).status == 0


async def _found(stores: EmbeddedStores, names: list[str]) -> set[str]:
    """Which of these texts occur in any row of any table."""
    tables = await query(stores, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    rows = [
        str(row["t"])
        for t in tables
        for row in await query(stores, f"SELECT t::text AS t FROM {t[0]} t")
    ]
    assert len(tables) >= 5
    return {name for name in names if any(name in row for row in rows)}


async def test_a_terminal_gets_no_control_characters(
    cli: Cli, wire: Wire, device: Authenticator
) -> None:
    """A backend's user may have chosen the passkey's name."""
    name = "Ann\x1b[2J\u202eñ\n"
    await wire.redeem(await wire.register(await wire.open_registration("ann", name), device))
    mine = ("passkey", "list", "--app", wire.app_id, "--user", "ann")
    done = await beside(cli)(*mine)
    assert "  Ann\\x1b[2J\\u202eñ\\n  " in done.out
    assert (await beside(cli)(*mine, "--json")).json[0]["name"] == name


# -- events ----------------------------------------------------------------------------------------


async def test_events_tell_who_did_what(cli: Cli, wire: Wire, device: Authenticator) -> None:
    run = beside(cli)
    passkey = await wire.user("ann", device)
    handle, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
    await wire.finish(
        "authenticate", handle, device.authenticate(options, "https://elsewhere.example")
    )
    await run("passkey", "revoke", "--app", wire.app_id, "--user", "ann", "--all", "--yes")
    events = (await run("events", "--app", wire.app_id, "--json")).json
    assert list(events[0]) == [
        "id", "at", "app_id", "actor", "action", "user_id", "passkey_id", "result", "reason",
        "request_id", "payload", "address", "user_agent",
    ]  # fmt: skip
    (key,) = (await run("key", "list", "--app", wire.app_id, "--json")).json
    assert [(e["actor"], e["action"], e["result"], e["reason"]) for e in events] == [
        ("broker", "app.created", "done", None),
        (f"key:{key['key_id']}", "user.created", "done", None),
        ("browser", "passkey.registered", "done", None),
        (f"key:{key['key_id']}", "passkey.confirmed", "done", None),
        ("browser", "passkey.used", "refused", "origin"),
        (ACTOR, "passkey.revoked", "done", None),
    ]
    assert {e["passkey_id"] for e in events[2:]} == {passkey}
    assert [e["id"] for e in events] == sorted(e["id"] for e in events)

    newest = (await run("events", "--app", wire.app_id, "--limit", "2", "--json")).json
    assert newest == events[-2:]
    after = (
        await run("events", "--app", wire.app_id, "--after", str(events[3]["id"]), "--json")
    ).json
    assert after == events[4:]
    first = str(events[0]["id"])
    after = (
        await run("events", "--app", wire.app_id, "--after", first, "--limit", "2", "--json")
    ).json
    assert after == events[1:3], "the first ones behind it, not the newest"
    assert (
        await run("events", "--app", wire.app_id, "--after", str(2**63 - 1), "--json")
    ).json == []
    assert (await run("events", "--app", wire.app_id)).out.count("\n") == 1 + len(events)


async def test_events_are_exported_as_lines(cli: Cli, wire: Wire, device: Authenticator) -> None:
    run = beside(cli)
    await wire.user("user-7", device)
    shown = (await run("events", "--app", wire.app_id, "--json")).json
    assert [event["action"] for event in shown[-2:]] == ["passkey.registered", "passkey.confirmed"]
    for flags in ((), ("--json",)):
        lines = (await run("events", "export", "--app", wire.app_id, *flags)).out.splitlines()
        exported = [json.loads(line) for line in lines]
        names = [event.pop("external_id") for event in exported]
        assert exported == shown
        assert names[-2:] == ["user-7", "user-7"]
    last = shown[-1]["at"]
    since = ("events", "export", "--app", wire.app_id, "--since")
    times = [json.loads(line)["at"] for line in (await run(*since, last)).out.splitlines()]
    assert times == [event["at"] for event in shown if event["at"] >= last]
    assert (await run(*since, "2999-01-01")).out == ""
    assert (await run(*since, "1999-01-01", "--after", str(shown[-2]["id"]))).out.count("\n") == 1


# -- signing keys ----------------------------------------------------------------------------------


def test_signing_keys_are_listed_and_rotated(cli: Cli, app: str) -> None:
    listing = ("signing-key", "list", "--app", app, "--json")
    assert cli(*listing).json == []
    assert cli("signing-key", "list", "--app", app).out == "None.\n"
    (first,) = cli("signing-key", "rotate", "--app", app, "--json").json
    assert first.keys() == {"kid", "algorithm", "state", "signs_from", "retires_at", "created_at"}
    assert (first["algorithm"], first["state"], first["retires_at"]) == ("RS256", "signs", None)
    rotated = cli("signing-key", "rotate", "--app", app, "--json").json
    assert rotated == cli(*listing).json
    assert [(row["kid"] == first["kid"], row["state"]) for row in rotated] == [
        (True, "signs"),
        (False, "next"),
    ]
    assert rotated[0]["retires_at"] > rotated[1]["signs_from"] > rotated[1]["created_at"]
    now = cli("signing-key", "rotate", "--app", app, "--now", "--json").json
    assert [row["state"] for row in now] == ["old", "old", "signs"]
    dropped = cli("signing-key", "rotate", "--app", app, "--now", "--drop", "--json").json
    assert [row["state"] for row in dropped] == ["gone", "gone", "gone", "signs"]
    other = cli("signing-key", "rotate", "--app", app, "--algorithm", "ES256", "--json").json
    assert [row["state"] for row in other if row["algorithm"] == "ES256"] == ["signs"]
    line = cli("signing-key", "list", "--app", app).out.splitlines()[-1]
    assert re.fullmatch(rf"{ID}  RS256 +signs  [0-9T:+-]{{25}}  - +[0-9T:+-]{{25}}", line)
    actions = [row["action"] for row in cli("events", "--app", app, "--json").json]
    assert actions == ["app.created", *["signing_key.rotated"] * 5], (
        "also where a line got its first key"
    )


def test_the_brokers_own_signing_keys(cli: Cli) -> None:
    before = {row["kid"] for row in cli("signing-key", "list", "--json").json}
    rows = cli("signing-key", "rotate", "--algorithm", "EdDSA", "--json").json
    assert len({row["kid"] for row in rows} - before) == 1
    assert cli("signing-key", "list", "--json").json == rows
    event = cli("events", "--app", "", "--json").json[-1]
    assert (event["action"], event["actor"], event["app_id"]) == ("signing_key.rotated", ACTOR, "")


def test_signing_keys_are_sealed_anew(cli: Cli, app: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "another-secret-0123456789abcdefghij"
    monkeypatch.setenv("BROKER_SECRET_KEY", other)
    cli("signing-key", "rotate", "--app", app, "--algorithm", "ES256")
    monkeypatch.setenv("BROKER_SECRET_KEY", SECRET_KEY)
    assert not next(f for f in _findings(cli("doctor", "--json").out) if f.check == "secret key").ok
    assert cli("signing-key", "reseal", "--json").json["resealed"] == 0
    monkeypatch.setenv("BROKER_SECRET_KEY", f"{SECRET_KEY},{other}")
    assert next(f for f in _findings(cli("doctor", "--json").out) if f.check == "secret key").ok
    assert cli("signing-key", "reseal", "--json").json == {"resealed": 1, "lost": 0}
    event = cli("events", "--app", app, "--json").json[-1]
    assert (event["action"], event["actor"]) == ("signing_key.resealed", ACTOR)
    monkeypatch.setenv("BROKER_SECRET_KEY", SECRET_KEY)
    assert cli("signing-key", "reseal").out == "resealed         0\nlost             0\n"
    found = next(f for f in _findings(cli("doctor", "--json").out) if f.check == "secret key")
    assert re.fullmatch(r"opens all [0-9]+ signing keys", found.found)


def test_signing_keys_need_a_secret_key(
    cli: Cli, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(cli("signing-key", "rotate", "--app", UNKNOWN)) == "There is no such app."
    assert refusal(cli("signing-key", "rotate", "--app", "")) == "There is no such app."
    assert refusal(cli("signing-key", "list", "--app", UNKNOWN)) == "There is no such app."
    assert refusal(cli("signing-key", "rotate", "--app", app, "--drop")).startswith(
        "Older keys can be dropped"
    )
    assert cli("signing-key", "rotate", "--app", app, "--algorithm", "HS256").status == 2
    monkeypatch.delenv("BROKER_SECRET_KEY")
    for command in (("rotate", "--app", app), ("reseal",)):
        assert refusal(cli("signing-key", *command)) == "BROKER_SECRET_KEY is missing."
    assert cli("signing-key", "list", "--app", app).out == "None.\n"
    monkeypatch.setenv("BROKER_SECRET_KEY", "zq9w")
    said = refusal(cli("signing-key", "list", "--app", app))
    assert said.startswith("BROKER_SECRET_KEY must be a random text of at least 32 characters")
    assert "zq9w" not in said


def test_the_secret_key_of_a_dev_instance(
    cli: Cli,
    app: str,
    stores: EmbeddedStores,
    dev_json: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It is taken with the instance's stores, and only from a file that nobody else can have
    written or read.
    """
    monkeypatch.delenv("BROKER_SECRET_KEY")
    dev_json({"database_url": stores.database_url, "redis_url": stores.redis_url})
    place = tmp_path / ".broker" / "secret-key"
    place.write_text(SECRET_KEY + "\n")
    place.chmod(0o644)
    assert cli("signing-key", "rotate", "--app", app).err.endswith(
        "broker: BROKER_SECRET_KEY is missing.\n"
    )
    place.chmod(0o600)
    assert (
        json.loads(cli("signing-key", "rotate", "--app", app, "--json").out)[0]["state"] == "signs"
    )
    assert SECRET_KEY not in (done := cli("doctor")).out + done.err
    assert done.status == 0


def test_dev_makes_a_secret_key_once(tmp_path: Path) -> None:
    place = tmp_path / "secret-key"
    made = dev._kept_secret(tmp_path)
    assert re.fullmatch(r"[A-Za-z0-9_-]{64}", made)
    assert (oct(place.stat().st_mode & 0o777), place.read_text()) == ("0o600", made + "\n")
    assert dev._kept_secret(tmp_path) == made == dev.read_secret(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret-key"]


@pytest.mark.parametrize(
    "damage", ["empty", "short", "open to others", "binary", "a link", "a folder"]
)
def test_dev_never_replaces_a_secret_key(tmp_path: Path, damage: str) -> None:
    """Keys may be sealed under it: a person decides."""
    place, made = tmp_path / "secret-key", "zq9w-" + dev._kept_secret(tmp_path)
    place.unlink()
    match damage:
        case "a link":
            place.symlink_to(tmp_path / "elsewhere")
        case "a folder":
            place.mkdir()
        case _:
            content = {"empty": b"", "short": b"zq9w", "binary": b"\xff" * 40}.get(
                damage, made.encode()
            )
            place.write_bytes(content)
            place.chmod(0o644 if damage == "open to others" else 0o600)
    with pytest.raises(Fault) as fault:
        dev._kept_secret(tmp_path)
    assert str(fault.value).startswith(f"{place} is not a secret key that only this user can read")
    assert "zq9w" not in str(fault.value)
    assert not (tmp_path / "elsewhere").exists()


# -- which stores ----------------------------------------------------------------------------------


@pytest.fixture
def dev_json(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Write `.broker/dev.json` and forget the environment's stores."""

    def write(value: object) -> None:
        monkeypatch.delenv("BROKER_DATABASE_URL", raising=False)
        monkeypatch.delenv("BROKER_REDIS_URL", raising=False)
        (tmp_path / ".broker").mkdir(exist_ok=True)
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / ".broker" / "dev.json").write_text(text)
        (tmp_path / ".broker" / "dev.json").chmod(0o600)

    return write


def test_a_dev_instance_below_is_acted_on(
    cli: Cli, app: str, stores: EmbeddedStores, dev_json: Callable[..., None]
) -> None:
    dev_json(
        {"database_url": stores.database_url, "redis_url": stores.redis_url, "api_key": "pbk_zq9w"}
    )
    notice = "broker: acting on the dev instance of .broker/dev.json.\n"
    done = cli("app", "show", "--app", app, "--json")
    assert (done.status, done.err) == (0, notice)
    assert json.loads(done.out)["app_id"] == app
    assert cli("migrate") == Done(0, "Nothing to apply.\n", notice)
    checked = cli("doctor")
    assert (checked.status, checked.err) == (0, notice)


def test_the_environment_stands_above_a_dev_instance(
    cli: Cli,
    app: str,
    dev_json: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    stores: EmbeddedStores,
) -> None:
    dev_json({"database_url": "postgresql://elsewhere/x", "redis_url": "redis://elsewhere"})
    monkeypatch.setenv("BROKER_DATABASE_URL", stores.database_url)
    assert cli("app", "show", "--app", app).err == ""


def test_a_dev_instance_that_does_not_run_is_one_sentence(
    cli: Cli, dev_json: Callable[..., None], tmp_path: Path
) -> None:
    gone = quote(str(tmp_path), safe="")
    dev_json(
        {
            "database_url": f"postgresql://broker@/postgres?host={gone}",
            "redis_url": f"unix://{tmp_path}/v",
        }
    )
    notice = "broker: acting on the dev instance of .broker/dev.json."
    done = cli("app", "list")
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == [
        notice,
        "broker: Postgres does not answer; check BROKER_DATABASE_URL, or start `broker dev`.",
    ]
    done = cli("migrate")
    assert done.status == 1
    assert re.fullmatch(
        r"broker: Postgres can't be reached \(\w+\); check BROKER_DATABASE_URL\.",
        done.err.splitlines()[1],
    )


@pytest.mark.parametrize("content", ["", "not JSON", "[]", "{}", "null", '{"database_url": ""}'])
def test_a_dev_json_without_stores_is_none(
    cli: Cli, dev_json: Callable[..., None], content: str
) -> None:
    dev_json(content)
    done = cli("app", "list")
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines()[-1] == "broker: BROKER_DATABASE_URL is missing."


def test_without_any_store_it_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROKER_DATABASE_URL")
    for command in (("app", "list"), ("migrate",), ("events", "--app", UNKNOWN)):
        assert refusal(cli(*command)) == "BROKER_DATABASE_URL is missing."


def test_commands_on_data_need_no_redis(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROKER_REDIS_URL")
    told = cli(*NEW, "--json").json
    assert cli("app", "show", "--app", told["app_id"]).status == 0
    assert cli("migrate", "--json").json == []


@pytest.mark.parametrize(
    "command",
    [
        ("app", "list"),
        ("migrate",),
        ("events", "--app", UNKNOWN),
        ("key", "list", "--app", UNKNOWN),
    ],
)
def test_a_database_that_is_down_is_one_sentence_without_its_password(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("BROKER_DATABASE_URL", "postgresql://broker:zq9w@127.0.0.1:1/x")
    sentence = refusal(cli(*command))
    assert "check BROKER_DATABASE_URL" in sentence
    assert "zq9w" not in sentence


async def test_a_database_without_schema_is_one_sentence(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, stores: EmbeddedStores
) -> None:
    name = f"bare_{secrets.token_hex(6)}"
    await query(stores, f"CREATE DATABASE {name}")
    monkeypatch.setenv(
        "BROKER_DATABASE_URL", stores.database_url.replace("/postgres?", f"/{name}?")
    )
    sentence = "The database lacks a migration; run `broker migrate`."
    assert refusal(await beside(cli)("app", "list")) == sentence
    findings = (await beside(cli)("doctor", "--json")).out
    assert Finding("migrations", False, "some are missing.", "Run `broker migrate`.") in _findings(
        findings
    )
    applied = (await beside(cli)("migrate", "--json")).json
    assert applied[0] == "0001_first"
    assert (await beside(cli)("migrate", "--json")).json == []
    assert (await beside(cli)("app", "list", "--json")).json == []


@pytest.fixture
async def powerless(cli: Cli, stores: EmbeddedStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands act as a role that may connect, and no more."""
    role = f"powerless_{secrets.token_hex(6)}"
    await query(stores, f"CREATE ROLE {role}")
    options = quote(f"-c role={role}", safe="")
    monkeypatch.setenv("BROKER_DATABASE_URL", f"{stores.database_url}&options={options}")


@pytest.mark.usefixtures("powerless")
async def test_a_role_without_rights_is_one_sentence(cli: Cli) -> None:
    sentence = (
        "The database's role may not do that; deploy/grants.sql has the rights that it needs."
    )
    assert refusal(await beside(cli)("app", "list")) == sentence
    sentence = (
        "The database's role may not make tables; migrate as their owner, or grant it CREATE "
        "on the schema."
    )
    assert refusal(await beside(cli)("migrate")) == sentence
    done = await beside(cli)("doctor", "--json")
    assert done.status == 1
    assert [f for f in _findings(done.out) if not f.ok] == [
        Finding(
            "migrations",
            False,
            "can't be seen.",
            "Give the role the rights of deploy/grants.sql.",
        )
    ]


# -- config ----------------------------------------------------------------------------------------


def test_config_shows_every_setting_and_no_secret(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("zq9w" * 4 + "abcdefghijklmnopqrst")
    monkeypatch.delenv("BROKER_SECRET_KEY", raising=False)
    for name, value in {
        "DATABASE_URL": "postgresql://zq9w:zq%409w@db-a:5432,db-b/broker?sslpassword=zq9w",
        "REDIS_URL": "rediss://:zq9w@cache.example:6379/0?ssl_certfile=/zq9w",
        "SECRET_KEY_FILE": str(tmp_path / "key"),
        "DIALECTS": "flex,hanko",
        "TRUSTED_PROXIES": "10.0.0.0/8",
        "HANKO_TOKEN_LIFE": "60",
        "PROT": "zq9w",
    }.items():
        monkeypatch.setenv(f"BROKER_{name}", value)
    done = cli("config", "--json")
    assert done.status == 0
    assert "BROKER_PROT is not a setting; it has no effect." in done.err
    rows = {row["variable"]: (row["value"], row["set"]) for row in json.loads(done.out)}
    names = [f.name for f in fields(Settings) if f.metadata]
    names += [setting.name for dialect in DIALECTS for setting in dialect.settings]
    assert rows.keys() == {f"BROKER_{name.upper()}" for name in names}
    assert rows["BROKER_DATABASE_URL"] == ("postgresql://db-a:5432,db-b/broker", True)
    assert rows["BROKER_REDIS_URL"] == ("rediss://cache.example:6379/0", True)
    assert rows["BROKER_SECRET_KEY"] == ("(hidden)", True)
    assert rows["BROKER_DIALECTS"] == (["flex", "hanko"], True)
    assert rows["BROKER_TRUSTED_PROXIES"] == (["10.0.0.0/8"], True)
    assert rows["BROKER_HANKO_TOKEN_LIFE"] == (60, True)
    assert rows["BROKER_PORT"] == (8080, False)
    columns = cli("config")
    assert "zq" not in done.out + done.err + columns.out + columns.err
    assert re.search(r"^BROKER_PORT +8080 +false$", columns.out, re.M)


def test_config_tells_every_fault(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_PORT", "zq9w")
    done = cli("config")
    assert (done.status, done.out) == (1, "")
    assert done.err == "broker: BROKER_PORT must be a whole number from 0 to 65535.\n"


# -- doctor ----------------------------------------------------------------------------------------


def _findings(out: str) -> list[Finding]:
    return [Finding(**found) for found in json.loads(out)]


def test_doctor_finds_all_well(
    own_stores: EmbeddedStores, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each fault that can be made in stores of the test's own, whose role is a superuser."""
    monkeypatch.setenv("BROKER_DATABASE_URL", own_stores.database_url)
    monkeypatch.setenv("BROKER_REDIS_URL", own_stores.redis_url)
    done = cli("doctor", "--json")
    assert (done.status, done.err) == (0, "")
    findings = _findings(done.out)
    assert all(f.ok for f in findings)
    assert [f.check for f in findings if f.todo] == ["role"]
    assert Finding("standby", True, "none follows") in findings
    assert [f.check for f in findings] == [
        "settings", "ports", "metrics", "traces", "postgres", "clock", "fsync",
        "synchronous_commit", "full_page_writes", "standby", "role", "schema", "rights",
        "connections", "migrations", "one-time", "event months", "redis", "clock", "eviction",
        "term", "debug command", "secret key", "apps",
    ]  # fmt: skip

    app = cli(*NEW, "--json").json["app_id"]
    assert _findings(cli("doctor", "--json").out)[-1] == Finding(
        "app", True, f"{app} example.org: {ORIGIN}"
    )
    lines = [line for line in cli("doctor").out.splitlines() if not line.startswith("ok   ")]
    assert [line.split(":")[0] for line in lines] == ["warn role"]

    asyncio.run(query(own_stores, "UPDATE relying_parties SET origins = '{http://example.org}'"))
    done = cli("doctor", "--json")
    assert done.status == 1
    assert [f for f in _findings(done.out) if not f.ok] == [
        Finding(
            "app",
            False,
            f"{app}: http://example.org is plain http, which browsers allow on localhost only.",
            "Mend it with `broker app update`.",
        )
    ]
    assert f"\nFAIL app: {app}: http://example.org is plain http" in cli("doctor").out
    assert cli("app", "update", "--app", app, "--origin", ORIGIN).status == 0
    assert cli("doctor").status == 0


PARTED = "port 9090 serves keyed routes, port 8080 serves pages"
SHARED = (
    "no BROKER_MANAGEMENT_PORT: port 8080 serves pages and keyed routes, "
    "unless `serve --management-port` parts them"
)
NOWHERE = (
    "served nowhere, unless `serve --management-port` names a port; set BROKER_MANAGEMENT_PORT, "
    "or BROKER_METRICS=public where only operators reach the port"
)


@pytest.mark.parametrize(
    ("environment", "options", "ports", "metrics"),
    [
        ({}, (), SHARED, NOWHERE),
        ({"METRICS": "public"}, (), SHARED, "served on port 8080, to all who reach it"),
        ({"MANAGEMENT_PORT": "9090"}, (), PARTED, "served on port 9090"),
        ({"MANAGEMENT_PORT": "9090", "METRICS": "public"}, (), PARTED, "served on port 9090"),
        ({}, ("--management-port", "9090"), PARTED, "served on port 9090"),
        ({"MANAGEMENT_PORT": "9000"}, ("--management-port", "9090"), PARTED, "served on port 9090"),
    ],
)
def test_doctor_tells_what_each_port_serves(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    options: tuple[str, ...],
    ports: str,
    metrics: str,
) -> None:
    """From the environment, and from the option that `serve` takes too."""
    for name, value in environment.items():
        monkeypatch.setenv(f"BROKER_{name}", value)
    findings = _findings(cli("doctor", *options, "--json").out)
    assert Finding("ports", True, ports) in findings
    assert Finding("metrics", True, metrics) in findings


def test_doctor_tells_every_missing_setting(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROKER_DATABASE_URL")
    monkeypatch.delenv("BROKER_REDIS_URL")
    monkeypatch.setenv("BROKER_PROT", "1")
    done = cli("doctor", "--json")
    assert (done.status, done.err) == (1, "")
    assert _findings(done.out) == [
        Finding(
            "settings", False, "BROKER_DATABASE_URL is missing.", "Set it right and run again."
        ),
        Finding("settings", False, "BROKER_REDIS_URL is missing.", "Set it right and run again."),
        Finding("settings", False, "BROKER_PROT is not a setting.", "Set it right and run again."),
    ]
    assert cli("doctor").out.startswith(
        "FAIL settings: BROKER_DATABASE_URL is missing. Set it right and run"
    )


def test_an_unknown_setting_is_told_of(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_PROT", "1")
    done = cli("doctor", "--json")
    assert Finding("settings", True, "all readable; ignored: BROKER_PROT") in _findings(done.out)
    assert "BROKER_PROT is not a setting; it has no effect." in done.err


def test_doctor_tells_of_a_dialect_that_can_not_answer(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults that only the composition root finds are findings, too."""
    monkeypatch.setenv("BROKER_DIALECTS", "flex,nonsense")
    done = cli("doctor", "--json")
    assert (done.status, done.err) == (1, "")
    (finding,) = _findings(done.out)
    assert (finding.check, finding.ok) == ("settings", False)
    assert finding.found.startswith("BROKER_DIALECTS must be of flex, ")


def test_doctor_tells_which_store_is_down(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_REDIS_URL", "redis://:zq9w@127.0.0.1:1/0")
    done = cli("doctor", "--json")
    assert done.status == 1
    assert [f for f in _findings(done.out) if not f.ok] == [
        Finding(
            "redis",
            False,
            "can't be used (connection refused).",
            "Check BROKER_REDIS_URL, or start `broker dev`.",
        )
    ]
    monkeypatch.setenv("BROKER_DATABASE_URL", "postgresql://broker:zq9w@127.0.0.1:1/x")
    done = cli("doctor", "--json")
    postgres, redis = (f for f in _findings(done.out) if not f.ok)
    assert (postgres.check, redis.check) == ("postgres", "redis")
    assert postgres.found == "can't be used (connection refused)."
    assert "zq9w" not in done.out + done.err


class _Refusal(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1)
        self.request.sendall(b"N" * 64)  # Postgres' refusal of TLS, and no TLS


@contextmanager
def server_without_tls() -> Iterator[int]:
    """The port of a server that speaks neither TLS nor a store's protocol."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("redis_url", "database_url", "cause"),
    [
        ("redis://:zq9w@{mute}", "postgresql://a:zq9w@{mute}/x", "no answer in time"),
        ("rediss://:zq9w@{plain}", "postgresql://a:zq9w@{plain}/x?sslmode=require", "TLS failed"),
        (
            "redis://:zq9w@zq9w.invalid",
            "postgresql://a:zq9w@zq9w.invalid/x",
            "its host name can't be resolved",
        ),
        (
            "unix://zq9w:zq9w@{valkey}",
            "postgresql://zq9w:zq9w@/postgres?host={postgres}",
            "user or password refused",
        ),
        ("unix:///zq9w", "postgresql://broker@/zq9w?host={postgres}", "no such "),
    ],
)
def test_doctor_tells_why_a_store_can_not_be_used(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    stores: EmbeddedStores,
    redis_url: str,
    database_url: str,
    cause: str,
) -> None:
    """A server that never answers, one without TLS, an unknown host, an unknown user, a socket and
    a database that are not there.
    """
    with socket.create_server(("127.0.0.1", 0)) as mute, server_without_tls() as port:
        places = {
            "mute": f"127.0.0.1:{mute.getsockname()[1]}",
            "plain": f"127.0.0.1:{port}",
            "valkey": stores.redis_url.removeprefix("unix://"),
            "postgres": stores.database_url.partition("host=")[2],
        }
        monkeypatch.setenv("BROKER_REDIS_URL", redis_url.format(**places))
        monkeypatch.setenv("BROKER_DATABASE_URL", database_url.format(**places))
        monkeypatch.setenv("BROKER_STORE_TIMEOUT", "1")
        done = cli("doctor", "--json")
    found = [f.found for f in _findings(done.out) if not f.ok]
    assert len(found) == 2
    assert all(sentence.startswith(f"can't be used ({cause}") for sentence in found), found
    assert "zq9w" not in done.out + done.err


@pytest.mark.parametrize(
    ("finding", "ok", "found"),
    [
        (doctor.postgres_version(15), True, "version 15"),
        (doctor.postgres_version(14), False, "version 14."),
        (findings.redis_version("7.0.0"), True, "version 7.0.0"),
        (findings.redis_version("7.2.4-rc1"), True, "version 7.2.4-rc1"),
        (findings.redis_version("10.0"), True, "version 10.0"),
        (findings.redis_version("6.2.14"), False, "version 6.2.14."),
        (findings.eviction("noeviction"), True, "noeviction"),
        (
            findings.eviction("allkeys-lru"),
            False,
            "maxmemory-policy is allkeys-lru: one-time values may vanish early.",
        ),
        (findings.clock("redis", 1.0), True, "within 1 s of redis's"),
        (findings.clock("redis", -0.9), True, "within 1 s of redis's"),
        (findings.clock("redis", 1.6), False, "2 s off redis's."),
        (findings.clock("postgres", 3.4), False, "3 s off postgres's."),
        (findings.clock("postgres", -7200.0), False, "7200 s off postgres's."),
    ],
)
def test_what_doctor_makes_of_a_fact(finding: Finding, ok: bool, found: str) -> None:
    assert (finding.ok, finding.found) == (ok, found)
    assert bool(finding.todo) is not ok


@pytest.mark.parametrize(
    ("covered", "astray", "found"),
    [
        (True, False, "this and the next are there"),
        (False, False, "this month or the next has no partition; its events go to events_default."),
        (False, True, "this month or the next has no partition; its events go to events_default."),
        (True, True, "events_default has events: their time was in no month."),
    ],
)
def test_doctor_warns_of_events_without_a_month(covered: bool, astray: bool, found: str) -> None:
    finding = doctor.event_months(covered=covered, astray=astray)
    assert (finding.ok, finding.found) == (True, found)
    assert bool(finding.todo) is (not covered or astray)


def test_what_is_to_be_done_is_said_wherever_something_is() -> None:
    assert "Postgres 15 or newer" in doctor.postgres_version(14).todo
    assert "Redis 7.0, Valkey 7.2 or newer" in findings.redis_version("6.2").todo
    assert "noeviction" in findings.eviction("volatile-ttl").todo
    assert "NTP" in findings.clock("redis", 60).todo
