"""Parsers of the commands: examples in the help, declared options, and faults that `main` reports.

Every command has examples, and a test parses them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Option: TypeAlias = "tuple[str, dict[str, Any]]"


class Usage(Exception):
    """A command line that can't be parsed."""

    def __init__(self, usage: str, sentence: str) -> None:
        self.usage = usage
        super().__init__(sentence)


class Parser(argparse.ArgumentParser):
    """A parser whose faults `main` reports."""

    def error(self, message: str) -> NoReturn:
        """Raise Usage."""
        raise Usage(f"{self.format_usage()}{self.prog}: error: {message}\n", message)


def add_command(
    group: Commands,
    name: str,
    says: str,
    examples: Sequence[str] = (),
    options: Sequence[Option] = (),
) -> argparse.ArgumentParser:
    """Add a command. Its help shows `examples`, each without `broker`."""
    shown = "\n".join(["examples:", *(f"  broker {example}" for example in examples)])
    command = group.add_parser(
        name,
        help=says,
        description=f"{says[0].upper()}{says[1:]}.",
        epilog=shown if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, settings in options:
        command.add_argument(flag, **settings)
    return command


def add_group(commands: Commands, name: str, says: str) -> Commands:
    """Add a noun, to which verbs are added."""
    return commands.add_parser(name, help=says).add_subparsers(required=True, metavar="action")


def option(flag: str, help: str, **settings: Any) -> Option:
    """An option of a command: the arguments of `add_argument`."""
    return flag, {"help": help, **settings}


def app_option(more: str = "") -> Option:
    """The option `--app` of a command that acts on one app (`records.chosen_app`)."""
    says = f"the app's id or name (BROKER_APP; default: the only one){more}"
    return option("--app", says, metavar="APP")


JSON = option("--json", "print JSON", action="store_true")


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option whose value is a whole number in a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"a whole number from {low} to {high} is needed")
        return int(text)

    return parse
