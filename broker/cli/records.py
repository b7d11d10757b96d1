"""Commands on data: declaration, choice of the app, confirmation, and execution.

**Choice of the app.** `--app` takes an id or a name. Without it a command acts on the app of
`BROKER_APP`, or on the only app. An ambiguous name, and no name beside several apps, are refused
with the ids. A command that removes data names its app on standard error.

**Confirmation.** A command that can't be undone asks at a terminal. `--yes` is the answer for
scripts. Without either the command is refused before anything is read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pwd
import re
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from broker.cli import output
from broker.cli.dev import DATA, read, read_secret
from broker.cli.output import harmless, say
from broker.cli.parsing import Commands, Option, add_command, app_option, option
from broker.cli.process import run
from broker.dialects import load_settings
from broker.errors import Fault, InvalidSetting, UnknownApp
from broker.model import RelyingParty
from broker.settings import Settings, with_secrets
from broker.telemetry import CONTEXT, Context

if TYPE_CHECKING:
    from broker.directory import Directory
    from broker.durable import Durable, Postgres
    from broker.signing import Signing

PATIENCE = 60.0  # seconds
NAMED = 10  # apps that a refusal names, at most


class NotConfirmed(Fault):
    """A command that can't be undone was not confirmed; nothing was changed."""

    code = "not_confirmed"


@dataclass(frozen=True, slots=True)
class Records:
    """The parts that these commands act on: Postgres alone. The service takes three times as long
    to import.
    """

    postgres: Postgres
    directory: Directory
    durable: Durable
    signing: Signing
    app: str  # BROKER_APP


Work: TypeAlias = "Callable[[Records, argparse.Namespace], Awaitable[object]]"
Question: TypeAlias = "Callable[[Records, argparse.Namespace], Awaitable[str]]"


async def with_records(settings: Settings, work: Callable[[Records], Awaitable[object]]) -> object:
    """Run `work` with the database open."""
    from broker.directory import Directory
    from broker.durable import Durable, Postgres
    from broker.signing import Signing
    from broker.telemetry import Metrics

    postgres = Postgres(
        settings.database_url,
        timeout=settings.store_timeout,
        connections=settings.database_connections,
        metrics=Metrics(),
    )
    await postgres.open()
    durable = Durable(postgres)
    directory = Directory(durable=durable)
    try:
        signing = Signing(durable.signing_keys, lambda: settings.secret_key)
        return await work(Records(postgres, directory, durable, signing, settings.app))
    finally:
        await postgres.close()


def settings_for_data(*needed: str, given: Mapping[str, str] | None = None) -> Settings:
    """The settings of a command on data: of the environment, or of the `broker dev` that runs below
    the current directory. `given` are variables that the command line sets.

    Raises:
        SettingsFault: a setting can't be used, or one of `needed` (default: the database's URL) is
            missing.
    """
    environment = with_secrets({**os.environ, **(given or {})})
    if not environment.get("BROKER_DATABASE_URL") and (stored := read(Path(DATA) / "dev.json")):
        say(f"acting on the dev instance of {DATA}/dev.json.")
        environment["BROKER_DATABASE_URL"] = str(stored.get("database_url", ""))
        environment["BROKER_REDIS_URL"] = environment.get("BROKER_REDIS_URL") or str(
            stored.get("redis_url", "")
        )
        environment["BROKER_SECRET_KEY"] = environment.get("BROKER_SECRET_KEY") or read_secret(
            Path(DATA)
        )
    settings = load_settings(environment, needed=needed or ("database_url",))
    for name in settings.unknown:
        say(f"{name} is not a setting; it has no effect.")
    return settings


# -- the operator ----------------------------------------------------------------------------------


def operator_account() -> str:
    """The actor of a command's events: `cli:` and the account of the operating system."""
    number = os.getuid()
    try:
        return f"cli:{pwd.getpwuid(number).pw_name}"
    except KeyError:  # a container may run as any number
        return f"cli:{number}"


def operator_address() -> str:
    """The address from which the operator came by SSH; "" if it is not known."""
    given = os.environ.get("SSH_CONNECTION") or os.environ.get("SSH_CLIENT") or ""
    try:
        # Behind a % is the interface, where Python takes any text.
        return str(ip_address(re.split("[ %]", given, maxsplit=1)[0]))
    except ValueError:
        return ""


# -- declaring a command ---------------------------------------------------------------------------


def add(
    group: Commands,
    name: str,
    says: str,
    work: Work,
    *,
    examples: Sequence[str],
    app: bool = False,
    removes: bool = False,
    question: Question | None = None,
    empty: str = "None.",
    columns: Sequence[str] = (),
    progress: bool = True,
    needed: Sequence[str] = ("database_url",),
    options: Sequence[Option] = (),
) -> argparse.ArgumentParser:
    """Add a command on data, which calls `work`.

    Args:
        app: the command acts on one app, which `work` finds as `options.app`.
        removes: the command names that app on standard error.
        question: makes the sentence to confirm; "" needs no confirmation.
        columns: the columns of a list, if it is not JSON.
    """
    declared = [
        option("--json", "print JSON, of a refusal too", action="store_true"),
        *([app_option()] if app else []),
        *([option("--yes", "don't ask", action="store_true")] if question else []),
        *options,
    ]
    command = add_command(group, name, says, examples, declared)

    def act(options: argparse.Namespace) -> int:
        async def main(records: Records) -> object:
            request_id = f"cli-{secrets.token_hex(8)}"
            CONTEXT.set(Context(request_id, operator_account(), address=operator_address()))
            sentence = ""
            if app:
                with shown():
                    options.app = await chosen_app(records, options.app)
                    sentence = await question(records, options) if question else ""
            if sentence and not options.yes:
                await confirm(sentence)
            elif removes:
                say(f"acting on the app {shown_app(options.app)}.")
            with shown():
                return await work(records, options)

        def shown() -> AbstractContextManager[None]:
            return output.progress(command.prog) if progress else nullcontext()

        # The revocation of one passkey needs no confirmation: it is named by its id.
        if (
            question
            and not options.yes
            and not can_ask()
            and getattr(options, "passkey", None) is None
        ):
            raise NotConfirmed(
                "This can't be undone, and there is no terminal to ask at; "
                "give --yes to do it without a question."
            )
        # The deletion of a large app takes longer than the time limit of a request.
        settings = replace(settings_for_data(*needed), store_timeout=PATIENCE)
        answer = run(with_records(settings, main))
        output.print_answer(answer, as_json=options.json, empty=empty, columns=columns)
        return 0

    command.set_defaults(run=act)
    return command


# -- the app ---------------------------------------------------------------------------------------


async def chosen_app(records: Records, given: str | None) -> RelyingParty:
    """The app of `--app`, else of BROKER_APP, else the only one.

    Raises:
        InvalidSetting: several apps have the name, or none was named and there is not exactly one.
        UnknownApp, Unavailable.
    """
    wanted = given if given is not None else records.app or None
    if wanted is None:
        apps = await records.directory.apps()
        if not apps:
            raise InvalidSetting("There is no app yet; `broker app create` makes one.")
        if len(apps) > 1:
            raise InvalidSetting(
                f"There are {len(apps)} apps; name one with --app or BROKER_APP: {_named(apps)}."
            )
        return apps[0]
    try:
        return await records.directory.app(wanted)
    except UnknownApp:
        apps = [app for app in await records.directory.apps() if app.name == wanted]
        if len(apps) > 1:
            raise InvalidSetting(
                f"{len(apps)} apps have this name; give the id of one: {_named(apps)}."
            ) from None
        if not apps:
            raise
        return apps[0]


def shown_app(app: RelyingParty) -> str:
    """An app, for a sentence."""
    return f"{harmless(app.name)} ({app.rp_id}, {app.id})"


def _named(apps: Sequence[RelyingParty]) -> str:
    more = f" and {len(apps) - NAMED} more" if len(apps) > NAMED else ""
    return ", ".join(f"{app.id} ({harmless(app.name)}, {app.rp_id})" for app in apps[:NAMED]) + more


# -- questions -------------------------------------------------------------------------------------


def can_ask() -> bool:
    """True if standard input and error are a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


async def confirm(sentence: str) -> None:
    """Ask for confirmation at the terminal.

    The event loop waits for the line, so that Ctrl-C ends the command at once. A read in the main
    thread would not end.

    Raises:
        NotConfirmed: the answer is not yes.
    """
    sys.stderr.write(f"{sentence} Type yes to go on: ")
    sys.stderr.flush()
    loop, terminal = asyncio.get_running_loop(), sys.stdin.fileno()
    typed = loop.create_future()
    loop.add_reader(terminal, lambda: None if typed.done() else typed.set_result(None))
    try:
        await typed
    finally:
        loop.remove_reader(terminal)
    answer = os.read(terminal, 1024)
    if not answer.endswith(b"\n"):
        sys.stderr.write("\n")
    if answer.strip().lower() not in (b"y", b"yes"):
        raise NotConfirmed("Nothing was changed.")
