"""The command line: `broker <command>`.

Exit status: 0 done, 1 refused or failed, 2 usage, 130 interrupted. Data goes to standard output,
all other text to standard error. Commands on data act on `BROKER_DATABASE_URL`. Without it, and
with a `.broker/dev.json` below the current directory, they act on the running `broker dev`, and say
so.

**JSON.** With `--json` standard output holds one JSON value, whatever the exit status. It is the
answer (lists are arrays), or of a refused or failed command an object `{"code", "error"}`. That
object has `doc`, a link to the code's documentation, if `BROKER_DOCS_URL` is set. `events --follow`
prints one object a line. The sentence for the operator stays on standard error.

**argparse.** The parser is the standard library's. Click and Typer would add completion and colour
for 40 to 150 ms of imports in every command. They would replace the 150 lines of `completion` and a
part of `output`, whose columns are needed in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Sequence
from functools import cache

from broker import __version__
from broker.cli import apps, completion, dev, doctor, events, serving, upkeep, users
from broker.cli.output import as_json_text, say
from broker.cli.parsing import Parser, Usage
from broker.errors import Fault, InvalidSetting, Refusal, Unavailable
from broker.settings import Settings, SettingsFault

_UNAVAILABLE = {
    "redis": "Redis does not answer; check BROKER_REDIS_URL.",
    "redis_term": "The replication id of Redis can't be read in a script, or differs between "
    "connections; run `broker doctor`.",
    "postgres_one_time": "BROKER_ONE_TIME is not the recorded mode; see `broker one-time`.",
    "signing_key_sealed": "The signing key was sealed under another BROKER_SECRET_KEY; "
    "run `broker doctor`.",
    "postgres_not_migrated": "The database lacks a migration; run `broker migrate`.",
    "postgres_denied": "The database's role may not do that; deploy/grants.sql has the rights "
    "that it needs.",
}
_NO_POSTGRES = "Postgres does not answer; check BROKER_DATABASE_URL, or start `broker dev`."


@cache  # argparse takes 10 ms, and tests run many commands in one process
def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Each module of this package adds its commands; `run` is
    the function to call.
    """
    top: argparse.ArgumentParser = Parser(prog="broker", description="Passkeys for any backend.")
    top.add_argument("--version", action="version", version=f"broker {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    for module in (dev, serving, doctor, upkeep, apps, users, events):
        module.add_commands(commands)
    completion.add_commands(commands, top)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    _buffer_output()
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        commands = parser()
        if not all(map(_is_utf8, given)):
            commands.error("an argument is not UTF-8")
        chosen = commands.parse_args(given)
        status = int(chosen.run(chosen))
        sys.stdout.flush()
        return status
    except Usage as fault:
        sys.stderr.write(fault.usage)
        _report_json("usage", str(fault), as_json=as_json)
        return 2
    except (Fault, Refusal, SettingsFault) as fault:
        _report(fault, as_json=as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. The interpreter's last flush must not fail
        # too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _report(fault: Fault | Refusal | SettingsFault, *, as_json: bool) -> None:
    """Print a fault for the operator, and with `as_json` for a program."""
    match fault:
        case SettingsFault():
            code, sentences = InvalidSetting.code, fault.faults
        case Unavailable():
            code, sentences = fault.code, (_UNAVAILABLE.get(fault.reason, _NO_POSTGRES),)
        case Refusal():
            code, sentences = fault.code, (fault.sentence,)
        case _:
            code, sentences = fault.code, (str(fault),)
    doc = _doc(code)
    for number, sentence in enumerate(sentences, 1):
        say(f"{sentence} See {doc}" if doc and number == len(sentences) else sentence)
    _report_json(code, " ".join(sentences), as_json=as_json)


def _report_json(code: str, error: str, *, as_json: bool) -> None:
    if as_json:
        doc = _doc(code)
        report = {"code": code, "error": error} | ({"doc": doc} if doc else {})
        print(as_json_text(report))  # noqa: T201 - the command's answer


def _doc(code: str) -> str:
    """The link to a code's documentation; "" without a valid BROKER_DOCS_URL. Other settings are
    not read: they may be the fault that is reported.
    """
    given = {name: value for name, value in os.environ.items() if name == "BROKER_DOCS_URL"}
    try:
        url = Settings.load(given, needed=()).docs_url
    except SettingsFault:
        return ""
    return f"{url}#{code}" if url else ""


def _buffer_output() -> None:
    """Make standard output and error write every byte.

    Under PYTHONUNBUFFERED, which containers set, Python calls write(2) once and drops the rest. A
    pipe takes only a part of a long text if the process was stopped meanwhile.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = getattr(stream, "buffer", None)
        if isinstance(raw, io.RawIOBase):
            buffered = io.BufferedWriter(raw)
            whole = io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, whole)


def _is_utf8(argument: str) -> bool:
    """False if an argument has lone surrogates. Python makes them of bytes that are not UTF-8, and
    no store accepts them.
    """
    return not any("\ud800" <= character <= "\udfff" for character in argument)
