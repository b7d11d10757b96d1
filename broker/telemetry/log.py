"""Structured logs: one JSON object a line, on standard error.

**One line a request**: the route's template (never the path), status, duration, app and request id.

**Redaction.** Three values of a caller are logged: a well-formed request id, the app id of a route
that matched, and a refused origin in the form that browsers write (`broker.web.refused_origins`).
So no token, key, body, query or other header reaches a log. Of a library's record only constants of
its source code are kept: the logger, the place, the template of a message that has arguments, and
an exception's type and trace. Arguments, formatted messages and texts of exceptions are dropped.
aiohttp reports malformed requests with their bytes, and asyncio reports callbacks with their
arguments; either may contain an Authorization header.

**Buffering.** Lines may be held for `hold` seconds, then serialized and written together: a line
by itself costs a request as much as its look-ups. Order is kept: a warning or an error flushes the
buffer and is written at once. A killed process loses its buffer, so a process that exits calls
`flush`. A failed write stops no request.

**Atomic lines.** Several processes may share one standard error. A write is whole lines of at most
4096 bytes together, which a pipe takes in one piece (pipe(7), PIPE_BUF on Linux), as files and
sockets do. No logged line is longer.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO, TypeAlias

import orjson

_MOST_HELD = 256
_AT_ONCE = 4096  # bytes
_Line: TypeAlias = tuple[float, int, str, dict[str, Any]]  # time, severity, event, values


class Log:
    """JSON logger: one line a call. While an event loop runs, lines below a warning are buffered
    for `hold` seconds; 0 buffers none.
    """

    def __init__(
        self, stream: TextIO | None = None, *, level: str = "info", hold: float = 0.0
    ) -> None:
        self._stream = stream or sys.stderr
        self._hold = hold
        self._held: list[_Line] = []
        self.level = logging.getLevelName(level.upper())

    def __call__(self, event: str, *, severity: int = logging.INFO, **values: Any) -> None:
        if severity < self.level:
            return
        self._held.append((time.time(), severity, event, values))
        if not self._hold or severity >= logging.WARNING or len(self._held) >= _MOST_HELD:
            self.flush()
        elif len(self._held) == 1:
            try:
                asyncio.get_running_loop().call_later(self._hold, self.flush)
            except RuntimeError:  # no loop runs
                self.flush()

    def flush(self) -> None:
        """Write the buffered lines."""
        held, self._held = self._held, []
        if not held:
            return
        with suppress(OSError):  # the pipe is closed, or the disk is full
            for piece in _pieces(map(self._serialize, held)):
                self._stream.write(piece)
                self._stream.flush()

    def _serialize(self, line: _Line) -> bytes:
        at, severity, event, values = line
        fields = {
            "at": datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": logging.getLevelName(severity).lower(),
            "event": event,
            **values,
        }
        return orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)


def _pieces(lines: Iterable[bytes]) -> Iterator[str]:
    """The lines joined to pieces of at most `_AT_ONCE` bytes."""
    joined = b""
    for line in lines:
        if joined and len(joined) + len(line) > _AT_ONCE:
            yield joined.decode()
            joined = b""
        joined += line
    yield joined.decode()


class _LibraryRecords(logging.Handler):
    """Handler that writes library records as JSON lines, without values of the running process."""

    def __init__(self, log: Log) -> None:
        super().__init__(log.level)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        values: dict[str, Any] = {
            "logger": record.name,
            "place": f"{record.filename}:{record.lineno} {record.funcName}",
        }
        if record.args and isinstance(record.msg, str):
            values["template"] = record.msg.split("\n", 1)[0][:200]
        if record.exc_info and record.exc_info[0]:
            values |= fault(record.exc_info[1])
        self._log("library", severity=record.levelno, **values)


def fault(error: BaseException | None) -> dict[str, str]:
    """An exception as log fields: its type and the place that raised it. The text of an exception
    may quote a caller's bytes, so it is left out.
    """
    places = []
    trace = error.__traceback__ if error else None
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return {"error": type(error).__name__, "trace": " < ".join(reversed(places[-8:]))}


def capture_library_records(log: Log) -> None:
    """Send the records of libraries through `log`. Called once, by the process's entry point."""
    root = logging.getLogger()
    root.handlers = [_LibraryRecords(log)]
    root.setLevel(max(logging.WARNING, log.level))
