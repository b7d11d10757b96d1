"""Output of the commands: JSON or columns, colour, and progress.

Printed values are made harmless, because a user's or passkey's name may hold control characters,
which a terminal would execute. Columns are aligned by terminal cells: two for most of East Asia's
characters, none for a combining accent. No value is cut, so that ids can be copied; a terminal
wraps lines that are too wide. Colour and progress are for terminals only, and the environment
variable NO_COLOR ends colour (https://no-color.org).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

Row = Mapping[str, object]

BOLD, RED, GREEN, YELLOW = "1", "31", "32", "33"  # ECMA-48 §8.3.117, SGR
PROGRESS_AFTER = 1.0  # seconds


def print_answer(result: object, *, as_json: bool, empty: str, columns: Sequence[str] = ()) -> None:
    """Print a command's answer: a row, or a list of rows or of names.

    `empty` is printed for an empty list. `columns` are the columns of a table.
    """
    if as_json:
        print(as_json_text(result, indent=2))  # noqa: T201 - the command's answer
    elif isinstance(result, list):
        rows = [row for row in result if isinstance(row, Mapping)]
        lines = (
            table(rows, columns, colour=has_colour(sys.stdout))
            if rows
            else [str(name) for name in result]
        )
        print("\n".join(lines) or empty)  # noqa: T201
    elif isinstance(result, Mapping):
        print("\n".join(_record(result)))  # noqa: T201


def as_json_text(value: object, *, indent: int | None = None) -> str:
    """JSON with times in ISO 8601."""
    return json.dumps(value, indent=indent, default=_as_text)


def table(
    rows: Sequence[Row],
    columns: Sequence[str] = (),
    *,
    colour: bool,
    widths: list[int] | None = None,
) -> list[str]:
    """A header and a line for each row; without `columns`, of all but nested values.

    A table that grows passes the same list of `widths` each time, empty at first. Only the first
    part has a header.
    """
    names = list(columns) or [
        name for name, value in rows[0].items() if not isinstance(value, Mapping)
    ]
    widths = [] if widths is None else widths
    is_first = not widths
    cells = [[name.upper().replace("_", " ") for name in names]] if is_first else []
    cells += [[_cell(row[name]) for name in names] for row in rows]
    before = widths or [0] * len(names)
    widths[:] = [max(old, *map(width, column)) for old, *column in zip(before, *cells, strict=True)]
    lines = ["  ".join(map(_padded, line, widths)).rstrip() for line in cells]
    return [painted(lines[0], BOLD, colour=colour), *lines[1:]] if is_first else lines


def _record(row: Row) -> Iterator[str]:
    """A line for each value; nested values have one line each."""
    for name, value in row.items():
        shown = (
            [f"{k}={_cell(v)}" for k, v in value.items()]
            if isinstance(value, Mapping)
            else [_cell(value)]
        )
        for number, line in enumerate(shown):
            yield f"{'' if number else name:<17}{line}"


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_cell, value)) or "-"
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value in (None, "") else _as_text(value)


def _as_text(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return str(value.isoformat(timespec="seconds"))
    return harmless(str(value))


def say(sentence: str) -> None:
    """Print a sentence on standard error."""
    sys.stderr.write(f"{painted('broker:', BOLD, colour=has_colour(sys.stderr))} {sentence}\n")


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def harmless(text: str) -> str:
    """A text with escapes in place of characters that are not printable."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def width(text: str) -> int:
    """The number of terminal cells of a text (UAX #11)."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _padded(text: str, cells: int) -> str:
    return text + " " * (cells - width(text))


# -- terminals -------------------------------------------------------------------------------------


class Steps:
    """Prints the steps of a command at a terminal, with the duration of each. A context manager
    that ends the last step.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._began: float | None = None

    def __call__(self, step: str) -> None:
        """End the previous step and begin this one."""
        self.end()
        if self._shown:
            self._began = time.monotonic()
            sys.stderr.write(f"  {step}… ")
            sys.stderr.flush()

    def end(self, mark: str = "") -> None:
        """End the running step, if there is one."""
        if self._began is not None:
            sys.stderr.write(f"{time.monotonic() - self._began:.1f} s{mark}\n")
            self._began = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.end(", not finished" if kind else "")


def has_colour(stream: TextIO) -> bool:
    """True if a stream is a terminal that shows colour."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, code: str, *, colour: bool) -> str:
    """A text in a colour."""
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show at a terminal, after one second, what runs and for how long. The line disappears at the
    end.
    """
    if not sys.stderr.isatty():
        yield
        return
    ended, began = threading.Event(), time.monotonic()

    def show() -> None:
        shown = False
        while not ended.wait(PROGRESS_AFTER):
            shown = True
            sys.stderr.write(f"\r\x1b[K{what}… {time.monotonic() - began:.0f} s")
            sys.stderr.flush()
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    shows = threading.Thread(target=show, daemon=True)
    shows.start()
    try:
        yield
    finally:
        ended.set()
        shows.join()
