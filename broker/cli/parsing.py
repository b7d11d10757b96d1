"""What the commands' parsers share: examples in their help, types of options, and faults that
`main` tells.

Every command has examples, and a test parses them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Usage(Exception):
    """A command line that can't be parsed."""

    def __init__(self, usage: str, sentence: str) -> None:
        self.usage = usage
        super().__init__(sentence)


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to `main` how a fault is told."""

    def error(self, message: str) -> NoReturn:
        """Raise Usage."""
        raise Usage(f"{self.format_usage()}{self.prog}: error: {message}\n", message)


def add_command(
    group: Commands, name: str, says: str, examples: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add a command without options. `examples` are what its help shows, without `broker`."""
    shown = "\n".join(["examples:", *(f"  broker {example}" for example in examples)])
    return group.add_parser(
        name,
        help=says,
        description=f"{says[0].upper()}{says[1:]}.",
        epilog=shown if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_group(commands: Commands, name: str, says: str) -> Commands:
    """Add a noun, to which verbs are added."""
    return commands.add_parser(name, help=says).add_subparsers(required=True, metavar="action")


def add_app_option(command: argparse.ArgumentParser, more: str = "") -> None:
    """Add `--app` to a command that acts on one app (`records.chosen_app`)."""
    says = f"the app's id or name (BROKER_APP; default: the only one){more}"
    command.add_argument("--app", metavar="APP", help=says)


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"a whole number from {low} to {high} is needed")
        return int(text)

    return parse
