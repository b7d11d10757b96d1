"""The command line: `broker <command>`.

Exit status: 0 done, 1 refused or failed, 2 usage. Data goes to standard output (with `--json` as JSON, lists as arrays); everything
said to a person goes to standard error. Commands on data act on `BROKER_DATABASE_URL`; without it, and with a `.broker/dev.json`
below the current directory, on the running `broker dev`, and say so.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Sequence

from broker import __version__
from broker.cli import admin, dev, doctor, serving
from broker.errors import Fault, Refusal, Unavailable
from broker.settings import SettingsFault


def parser() -> argparse.ArgumentParser:
    """The whole command line; each module of this package adds its commands, with `run` as what to call."""
    top = argparse.ArgumentParser(prog="broker", description="Passkeys for any backend.")
    top.add_argument("--version", action="version", version=f"broker {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    for module in (dev, serving, doctor, admin):
        module.add_commands(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    _write_whole()
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = parser()
    if not all(map(_is_utf8, given)):
        commands.error("an argument is not UTF-8")
    chosen = commands.parse_args(given)
    try:
        status = int(chosen.run(chosen))
        sys.stdout.flush()
        return status
    except SettingsFault as fault:
        for sentence in fault.faults:
            _say(sentence)
    except Unavailable as fault:
        _say(
            {
                "redis": "Redis does not answer; check BROKER_REDIS_URL.",
                "signing_key_sealed": "The signing key was sealed under another BROKER_SECRET_KEY; run `broker doctor`.",
                "postgres_not_migrated": "The database lacks a migration; run `broker migrate`.",
                "postgres_denied": "The database's role may not do that; make it the owner of the tables.",
            }.get(fault.reason, "Postgres does not answer; check BROKER_DATABASE_URL, or start `broker dev`.")
        )
    except Fault as fault:
        _say(str(fault))
    except Refusal as refusal:
        _say(refusal.sentence)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except BrokenPipeError:
        # The reader went away, as `head` does. What the interpreter flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _write_whole() -> None:
    """Have standard output and error write all that they are given. Under PYTHONUNBUFFERED, as containers have it, Python asks the system
    once and drops what was not taken; and of a long text a pipe takes a part where the process was stopped meanwhile."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = getattr(stream, "buffer", None)
        if isinstance(raw, io.RawIOBase):
            buffered = io.BufferedWriter(raw)
            whole = io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, whole)


def _is_utf8(argument: str) -> bool:
    """Python turns the bytes of an argument that are no UTF-8 into halves of surrogate pairs, which no store takes."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _say(sentence: str) -> None:
    sys.stderr.write(f"broker: {sentence}\n")
