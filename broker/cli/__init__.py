"""The command line: `broker <command>`.

Exit status: 0 done, 1 refused or failed, 2 usage, 130 interrupted. Data goes to standard output;
everything said to a person goes to standard error. Commands on data act on `BROKER_DATABASE_URL`;
without it, and with a `.broker/dev.json` below the current directory, on the running `broker dev`,
and say so.

**JSON.** With `--json` standard output holds one JSON value, whatever the exit status: the answer
(lists are arrays), or of a refused or failed command an object `{"code", "error"}`, with `doc`, a
link to the code's documentation, where `BROKER_DOCS_URL` is set. `events --follow` prints one
object a line. The sentence for a person stays on standard error.

**argparse.** The parser is the standard library's. Click and Typer would give completion and
colour, for 40 to 150 ms of imports in every command; what they save here are the 150 lines of
`completion` and `output`, and `output` would be needed for columns in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Sequence

from broker import __version__
from broker.cli import apps, completion, dev, doctor, events, serving, upkeep, users
from broker.cli.output import as_json_text, say
from broker.cli.parsing import Parser, Usage
from broker.errors import Fault, InvalidSetting, Refusal, Unavailable
from broker.settings import Settings, SettingsFault

_UNAVAILABLE = {
    "redis": "Redis does not answer; check BROKER_REDIS_URL.",
    "signing_key_sealed": "The signing key was sealed under another BROKER_SECRET_KEY; run `broker doctor`.",
    "postgres_not_migrated": "The database lacks a migration; run `broker migrate`.",
    "postgres_denied": "The database's role may not do that; make it the owner of the tables.",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line; each module of this package adds its commands, with `run` as what to
    call.
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
    _write_whole()
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
        _tell_program("usage", str(fault), as_json=as_json)
        return 2
    except SettingsFault as fault:
        _tell(InvalidSetting.code, fault.faults, as_json=as_json)
    except Unavailable as fault:
        postgres = "Postgres does not answer; check BROKER_DATABASE_URL, or start `broker dev`."
        _tell(fault.code, [_UNAVAILABLE.get(fault.reason, postgres)], as_json=as_json)
    except Fault as fault:
        _tell(fault.code, [str(fault)], as_json=as_json)
    except Refusal as refusal:
        _tell(refusal.code, [refusal.sentence], as_json=as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except BrokenPipeError:
        # The reader went away, as `head` does. What the interpreter flushes at its end must not
        # fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _tell(code: str, sentences: Sequence[str], *, as_json: bool) -> None:
    """Say what went wrong to a person, and to a program."""
    doc = _doc(code)
    for number, sentence in enumerate(sentences, 1):
        say(f"{sentence} See {doc}" if doc and number == len(sentences) else sentence)
    _tell_program(code, " ".join(sentences), as_json=as_json)


def _tell_program(code: str, error: str, *, as_json: bool) -> None:
    if as_json:
        doc = _doc(code)
        told = {"code": code, "error": error} | ({"doc": doc} if doc else {})
        print(as_json_text(told))  # noqa: T201 - the command's answer


def _doc(code: str) -> str:
    """The link to a code's documentation; "" where BROKER_DOCS_URL is none, or not right: other
    settings may be what went wrong.
    """
    given = {name: value for name, value in os.environ.items() if name == "BROKER_DOCS_URL"}
    try:
        url = Settings.load(given, needed=()).docs_url
    except SettingsFault:
        return ""
    return f"{url}#{code}" if url else ""


def _write_whole() -> None:
    """Have standard output and error write all that they are given. Under PYTHONUNBUFFERED, as
    containers have it, Python asks the system once and drops what was not taken; and of a long text
    a pipe takes a part where the process was stopped meanwhile."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = getattr(stream, "buffer", None)
        if isinstance(raw, io.RawIOBase):
            buffered = io.BufferedWriter(raw)
            whole = io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, whole)


def _is_utf8(argument: str) -> bool:
    """Python turns the bytes of an argument that are no UTF-8 into halves of surrogate pairs, which
    no store takes.
    """
    return not any("\ud800" <= character <= "\udfff" for character in argument)
