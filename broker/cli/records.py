"""Commands on data: how a command is declared, which app it acts on, what it asks before, and how
it is run.

**Which app.** `--app` takes an id or a name. Without it a command acts on the app of `BROKER_APP`,
else on the only app there is. A name of several apps, and no name beside several apps, is refused
with the ids. A command that takes something away says on standard error which app it acts on.

**Questions.** A command that can't be undone asks at a terminal. `--yes` is the answer for scripts;
without either it is refused before anything is read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from broker.cli import output
from broker.cli.dev import DATA, read, read_secret
from broker.cli.output import harmless, say
from broker.cli.parsing import Commands, add_app_option, add_command
from broker.cli.serving import run
from broker.dialects import load_settings
from broker.errors import Fault, InvalidSetting, UnknownApp
from broker.model import RelyingParty
from broker.settings import Settings
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
    """What these commands act on: Postgres alone. The service is three times as long to import, and
    nothing here serves.
    """

    postgres: Postgres
    directory: Directory
    durable: Durable
    signing: Signing
    app: str  # BROKER_APP


Work: TypeAlias = "Callable[[Records, argparse.Namespace], Awaitable[object]]"
Question: TypeAlias = "Callable[[Records, argparse.Namespace], Awaitable[str]]"


async def with_records(settings: Settings, work: Callable[[Records], Awaitable[object]]) -> object:
    """Do `work` with the database open."""
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
        signing = Signing(durable.signing_keys, settings.secret_key)
        return await work(Records(postgres, directory, durable, signing, settings.app))
    finally:
        await postgres.close()


def settings_for_data(*needed: str, given: Mapping[str, str] | None = None) -> Settings:
    """The settings of a command on data: the environment's, or those of the `broker dev` that runs
    below here. `given` are variables that the command line sets.

    Raises:
        SettingsFault: one can't be used, or one of those `needed` (default: the database's URL) is
            missing.
    """
    environment = {**os.environ, **(given or {})}
    if not environment.get("BROKER_DATABASE_URL") and (stored := read(Path(DATA) / "dev.json")):
        say(f"acting on the dev instance of {DATA}/dev.json.")
        environment["BROKER_DATABASE_URL"] = str(stored.get("database_url", ""))
        environment["BROKER_REDIS_URL"] = environment.get("BROKER_REDIS_URL") or str(
            stored.get("redis_url", "")
        )
        environment["BROKER_SECRET_KEY"] = environment.get("BROKER_SECRET_KEY") or read_secret(
            Path(DATA)
        )
    return load_settings(environment, needed=needed or ("database_url",))


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
) -> argparse.ArgumentParser:
    """Add a command.

    `app`: it acts on one app, which `work` finds as `options.app`. `removes`: it says which one.
    `question` makes the sentence that a person must agree to; "" needs no agreement. `columns` are
    those of a list that a person sees.
    """
    command = add_command(group, name, says, examples)
    command.add_argument("--json", action="store_true", help="print JSON, of a refusal too")
    if app:
        add_app_option(command)
    if question:
        command.add_argument("--yes", action="store_true", help="don't ask")

    def act(options: argparse.Namespace) -> int:
        async def main(records: Records) -> object:
            CONTEXT.set(Context(request_id=f"cli-{secrets.token_hex(8)}", actor="cli"))
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

        # One passkey is revoked without a question: its id is an answer.
        if (
            question
            and not options.yes
            and not can_ask()
            and getattr(options, "passkey", None) is None
        ):
            raise NotConfirmed(
                "This can't be undone, and there is no terminal to ask at; give --yes to do it without a question."
            )
        # A person waits for the answer, and deleting a large app takes longer than a request may.
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
    """An app in a sentence."""
    return f"{harmless(app.name)} ({app.rp_id}, {app.id})"


def _named(apps: Sequence[RelyingParty]) -> str:
    more = f" and {len(apps) - NAMED} more" if len(apps) > NAMED else ""
    return ", ".join(f"{app.id} ({harmless(app.name)}, {app.rp_id})" for app in apps[:NAMED]) + more


# -- questions -------------------------------------------------------------------------------------


def can_ask() -> bool:
    """Whether a person is there."""
    return sys.stdin.isatty() and sys.stderr.isatty()


async def confirm(sentence: str) -> None:
    """Ask at the terminal. The loop waits for the line, so that Ctrl-C ends the command at once: a
    read in the main thread would go on.

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
