"""Logs, metrics and the context of a request.

**Logs** are JSON, one object a line on standard error. A request makes one line, with the route's template (never the path),
status, duration, app and request id. Nothing that came from a caller is logged except a well-formed request id and the app id
of a route that matched; so no token, key, body, header or query can reach a log. Of a library's record only what its source
code says is kept: the logger, the place, the template of a message that has arguments, and an exception's type and trace. Arguments,
finished messages and the texts of exceptions are dropped: aiohttp reports malformed requests with the bytes it could not parse,
asyncio reports callbacks with their arguments, and either may hold an Authorization header. A log that can't be written to stops
no request.

**Metrics** have bounded labels: kinds, results, refusal codes, stores, route templates. Never an app, a user or an origin.

**Context** is who acts (an API key's id, "browser", "cli") and under which request id; the durable store writes both into events.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson
from prometheus_client import CollectorRegistry, Counter, Histogram


@dataclass(slots=True)
class Context:
    """Who acts (`actor` is "key:<id>", "browser" or "cli") and how long the request may still take."""

    request_id: str
    actor: str
    app_id: str | None = None
    deadline: float | None = None  # of the monotonic clock

    def remaining(self, limit: float) -> float:
        """Seconds that one wait may take: `limit`, or what is left of the request if that is less."""
        return limit if self.deadline is None else max(0.0, min(limit, self.deadline - time.monotonic()))


CONTEXT: ContextVar[Context] = ContextVar("broker_context")
_NOBODY = Context(request_id="", actor="broker")


def context() -> Context:
    """The context of the running request or command."""
    return CONTEXT.get(_NOBODY)


_LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}


class Log:
    """Writes one JSON line per call."""

    def __init__(self, stream: TextIO | None = None, *, level: str = "info") -> None:
        self._stream = stream or sys.stderr
        self.level = logging.getLevelName(level.upper())

    def __call__(self, event: str, *, severity: int = logging.INFO, **values: Any) -> None:
        if severity < self.level:
            return
        line = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": _LEVELS.get(severity) or logging.getLevelName(severity).lower(),
            "event": event,
            **values,
        }
        with suppress(OSError):  # the reader of our standard error went away, or its disk is full
            self._stream.write(orjson.dumps(line, default=str).decode() + "\n")
            self._stream.flush()


class _LibraryRecords(logging.Handler):
    """Library records as JSON lines, without anything that was known only when they were made."""

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
    """An exception as log fields: its type and where it was raised. Its text may quote a caller's bytes, so it is left out."""
    places = []
    trace = error.__traceback__ if error else None
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return {"error": type(error).__name__, "trace": " < ".join(reversed(places[-8:]))}


def capture_library_records(log: Log) -> None:
    """Send what libraries log through `log`. Called once, by the process's entry point."""
    root = logging.getLogger()
    root.handlers = [_LibraryRecords(log)]
    root.setLevel(max(logging.WARNING, log.level))


_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


class Metrics:
    """Every metric, in a registry of its own so that two brokers in one process (as in tests) do not add up."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.ceremonies = Counter(
            "broker_ceremonies", "Steps of ceremonies.", ["kind", "step", "result"], registry=r
        )
        self.refusals = Counter("broker_refusals", "Refused requests.", ["code", "reason"], registry=r)
        self.redemptions = Counter("broker_redemptions", "Redemptions of nonces.", ["result"], registry=r)
        self.redemption_age = Histogram(
            "broker_redemption_age_fraction",
            "Age of a nonce at its redemption, as a fraction of its life.",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0),
            registry=r,
        )
        self.mail_codes = Counter(
            "broker_mail_codes", "Mail codes: made, judged, refused.", ["result"], registry=r
        )
        self.store_seconds = Histogram(
            "broker_store_seconds", "Time a store took.", ["store", "operation"], buckets=_STEPS, registry=r
        )
        self.store_failures = Counter(
            "broker_store_failures", "Failures of a store.", ["store", "operation"], registry=r
        )
        self.requests = Histogram(
            "broker_request_seconds", "Time of a request.", ["route", "status"], buckets=_STEPS, registry=r
        )
        self.events_lost = Counter(
            "broker_events_lost", "Events of refused ceremonies that could not be written.", registry=r
        )


class Stopwatch:
    """Times one wait for a store: `with Stopwatch(metrics, "redis", "take"):`. A failure counts in `store_failures` as well."""

    __slots__ = ("_began", "_metrics", "_names")

    def __init__(self, metrics: Metrics, store: str, operation: str) -> None:
        self._metrics = metrics
        self._names = (store, operation)

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._metrics.store_seconds.labels(*self._names).observe(time.perf_counter() - self._began)
        if kind is not None:
            self._metrics.store_failures.labels(*self._names).inc()
