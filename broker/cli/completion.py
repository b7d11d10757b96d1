"""`broker completion`: completion scripts for bash, zsh and fish, generated from the parser.

A script is static. It holds every command, option and choice of its release, so that completion
starts no Python. The parser becomes a list of places ("broker app create"), each with the words and
options that may follow there. The three shells differ in syntax only.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from broker.cli.parsing import Commands, add_command
from broker.dialects import policy_keys


@dataclass(slots=True)
class Place:
    """The words and options that may follow at one place of the command line.

    `options` maps a name to its help and its values. None: the option takes no value. An empty
    list: it takes any value.
    """

    at: str
    words: dict[str, str] = field(default_factory=dict)
    options: dict[str, tuple[str, list[str] | None]] = field(default_factory=dict)


def add_commands(commands: Commands, top: argparse.ArgumentParser) -> None:
    """Add `completion`."""
    says = "print a completion script for your shell"
    examples = (
        'eval "$(broker completion bash)"     # in ~/.bashrc',
        'eval "$(broker completion zsh)"      # in ~/.zshrc, behind compinit',
        "broker completion fish | source      # in ~/.config/fish/config.fish",
    )
    command = add_command(commands, "completion", says, ("completion bash",))
    command.epilog = "\n  ".join(["examples:", *examples])
    command.add_argument("shell", choices=tuple(_SCRIPTS), help="for which shell")

    def run(options: argparse.Namespace) -> int:
        print(_SCRIPTS[options.shell](list(places(top))), end="")  # noqa: T201 - the command's answer
        return 0

    command.set_defaults(run=run)


def places(parser: argparse.ArgumentParser) -> Iterator[Place]:
    """Every place of the command line, the shorter ones first."""
    place = Place(parser.prog)
    below: list[argparse.ArgumentParser] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            place.words |= {
                str(choice.dest): choice.help or "" for choice in action._choices_actions
            }
            below += action.choices.values()
        elif not action.option_strings:
            place.words |= dict.fromkeys(map(str, action.choices or ()), action.help or "")
        else:
            values: list[str] | None = list(map(str, action.choices or ()))
            if action.metavar == "KEY=VALUE":
                values = [f"{key.name}=" for key in policy_keys()]
            if action.nargs == 0:
                values = None
            place.options[action.option_strings[-1]] = (action.help or "", values)
    yield place
    for child in below:
        yield from places(child)


def _any(names: list[str]) -> str:
    """A pattern of `case`."""
    return "|".join(f'"{name}"' for name in names)


def _free(found: list[Place]) -> list[str]:
    """Options that take any value."""
    return [f"{at} {name}" for at, name, values in _options(found) if values == []]


def _options(found: list[Place]) -> list[tuple[str, str, list[str] | None]]:
    """Every option with its place and its values."""
    return [
        (place.at, name, values) for place in found for name, (_, values) in place.options.items()
    ]


def _bash(found: list[Place]) -> str:
    lines = [
        "_broker() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"'
        ' at=broker word words=""',
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f'        case "$at $word" in {_any([place.at for place in found[1:]])})'
        ' at="$at $word" ;; esac',
        "    done",
        '    case "$at $previous" in',
        f"        {_any(_free(found))}) return ;;",
    ]
    for at, name, values in _options(found):
        if values:
            space = "compopt -o nospace; " if values[0].endswith("=") else ""
            lines.append(f'        "{at} {name}") {space}words="{" ".join(values)}" ;;')
    lines += [
        '        *) case "$at" in',
        *(
            f'            "{place.at}") words="{" ".join([*place.words, *place.options])}" ;;'
            for place in found
        ),
        "        esac ;;",
        "    esac",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _broker broker",
    ]
    return "\n".join(lines) + "\n"


def _zsh(found: list[Place]) -> str:
    lines = [
        "#compdef broker",
        "_broker() {",
        "    local at=broker word; local -a choices",
        '    for word in "${(@)words[2,CURRENT-1]}"; do',
        f'        case "$at $word" in ({_any([place.at for place in found[1:]])})'
        ' at="$at $word" ;; esac',
        "    done",
        '    case "$at ${words[CURRENT-1]}" in',
        f"        ({_any(_free(found))}) _default; return ;;",
    ]
    for at, name, values in _options(found):
        if values:
            space = "-S '' " if values[0].endswith("=") else ""
            lines.append(f'        ("{at} {name}") compadd {space}-- {" ".join(values)}; return ;;')
    lines += ["    esac", '    case "$at" in']
    for place in found:
        helps = place.words | {name: says for name, (says, _) in place.options.items()}
        choices = " ".join(shlex.quote(f"{name}:{says}") for name, says in helps.items())
        lines.append(f'        ("{place.at}") choices=({choices}) ;;')
    lines += ["    esac", "    _describe broker choices", "}", "compdef _broker broker"]
    return "\n".join(lines) + "\n"


def _fish(found: list[Place]) -> str:
    lines = [
        "function __broker_at",
        "    set -l at broker",
        "    for word in (commandline -opc)[2..]",
        '        switch "$at $word"',
        f"            case {' '.join(shlex.quote(place.at) for place in found[1:])}",
        '                set at "$at $word"',
        "        end",
        "    end",
        '    test "$at" = "$argv"',
        "end",
        "complete -c broker -f",
    ]
    for place in found:
        start = f"complete -c broker -n '__broker_at {place.at}'"
        for word, says in place.words.items():
            lines.append(f"{start} -a {word} -d {_quoted(says)}")
        for name, (says, values) in place.options.items():
            takes = "" if values is None else f" -x -a '{' '.join(values)}'" if values else " -r -F"
            lines.append(f"{start} -l {name.removeprefix('--')}{takes} -d {_quoted(says)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A word of fish, which escapes within single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS: dict[str, Callable[[list[Place]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
