"""Logs, metrics and the context of a request. Reading order:

log       JSON lines, and libraries' records without anything that a caller sent
metrics   what is counted and timed, with bounded labels; adds up over processes

`Context` is who acts (an API key's id, "browser", "cli") and under which request id; the durable
store writes both into events.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass

from broker.telemetry.log import Log, capture_library_records, fault
from broker.telemetry.metrics import LoopLag, Metrics

__all__ = [
    "CONTEXT",
    "Context",
    "Log",
    "LoopLag",
    "Metrics",
    "Stopwatch",
    "capture_library_records",
    "context",
    "fault",
    "remaining",
]


@dataclass(slots=True)
class Context:
    """Who acts (`actor` is "key:<id>", "browser" or "cli") and how long the request may still
    take.
    """

    request_id: str
    actor: str
    app_id: str | None = None
    deadline: float | None = None  # of the monotonic clock


CONTEXT: ContextVar[Context] = ContextVar("broker_context")
_NOBODY = Context(request_id="", actor="broker")


def context() -> Context:
    """The context of the running request or command."""
    return CONTEXT.get(_NOBODY)


def remaining(limit: float) -> float:
    """Seconds that one wait may take: `limit`, or what is left of the running request if that is
    less.
    """
    deadline = CONTEXT.get(_NOBODY).deadline
    if deadline is None:
        return limit
    left = deadline - time.monotonic()
    return limit if left > limit else max(0.0, left)


class Stopwatch:
    """Times one wait for a store: `with Stopwatch(metrics, "redis", "take"):`. A failure counts in
    `store_failures` as well.
    """

    __slots__ = ("_began", "_metrics", "_names")

    def __init__(self, metrics: Metrics, store: str, operation: str) -> None:
        self._metrics = metrics
        self._names = (store, operation)

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._metrics.store_seconds.observe(time.perf_counter() - self._began, *self._names)
        if kind is not None:
            self._metrics.store_failures.inc(*self._names)
