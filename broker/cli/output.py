"""How commands speak: answers as JSON or in columns, colour, and progress.

Printed values are made harmless: a user's name or a passkey's may hold control characters, which a
terminal would obey. Columns are aligned by the cells that a terminal gives a character: two for
most of East Asia's, none for an accent that combines. Nothing is cut off, so that ids can be
copied; a terminal wraps what is too wide. Colour and progress are for terminals only, and the
environment variable NO_COLOR ends colour (https://no-color.org).
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
from types import TracebackType
from typing import Any, TextIO

Row = Mapping[str, object]

BOLD, RED, GREEN = "1", "31", "32"  # ECMA-48 §8.3.117, SGR
PROGRESS_AFTER = 1.0  # seconds


def print_answer(result: object, *, as_json: bool, empty: str, columns: Sequence[str] = ()) -> None:
    """Print a command's answer: a row, or a list of rows or of names; `empty` stands for an empty
    list, `columns` are those of a row that a person sees."""
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
    """A header and a line for each row. Without `columns` all but nested values are shown. A table
    that grows hands in the list of its `widths` each time: empty at first, then it has a header
    already."""
    names = list(columns) or [
        name for name, value in rows[0].items() if not isinstance(value, Mapping)
    ]
    header = [name.upper().replace("_", " ") for name in names]
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [] if widths is None else widths
    before = list(widths or map(width, header))
    began = bool(widths)
    widths[:] = [max(map(width, column), default=0) for column in zip(*cells, strict=True)]
    widths[:] = map(max, widths, before)
    lines = ["  ".join(map(_padded, line, widths)).rstrip() for line in (header, *cells)]
    return lines[1:] if began else [painted(lines[0], BOLD, colour=colour), *lines[1:]]


def _record(row: Row) -> Iterator[str]:
    """A line for each value; nested ones have theirs below each other."""
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
    """A sentence for a person, on standard error."""
    sys.stderr.write(f"{painted('broker:', BOLD, colour=has_colour(sys.stderr))} {sentence}\n")


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def harmless(text: str) -> str:
    """A text without control characters and whatever else is not printable."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def width(text: str) -> int:
    """How many cells a terminal gives a text (UAX #11)."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _padded(text: str, cells: int) -> str:
    return text + " " * (cells - width(text))


# -- terminals -------------------------------------------------------------------------------------


class Steps:
    """Says at a terminal what is being done, step by step, and how long each took. A context
    manager that ends the last one.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._began: float | None = None

    def __call__(self, step: str) -> None:
        """End the step before, and begin this one."""
        self.end()
        if self._shown:
            self._began = time.monotonic()
            sys.stderr.write(f"  {step}… ")
            sys.stderr.flush()

    def end(self, mark: str = "") -> None:
        """End the step that runs, if one does."""
        if self._began is not None:
            sys.stderr.write(f"{time.monotonic() - self._began:.1f} s{mark}\n")
            self._began = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(", not finished" if kind else "")


def has_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that wants colour."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, code: str, *, colour: bool) -> str:
    """A text in a colour."""
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say at a terminal what takes longer than a second, and for how long it has; the line is gone
    at the end.
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
