"""Logs, metrics and the context of a request. Reading order:

log       structured logs; records of libraries without a caller's data
metrics   counters, histograms and gauges with bounded labels
tracing   spans of requests and of waits for stores (OpenTelemetry), if switched on

`Context` has the actor (an API key's id, "browser", "cli") and the id of a request. The durable
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
    """The request id, the actor ("key:<id>", "browser" or "cli:<account>") and the deadline of a
    request or command. `address` and `user_agent` are the client's, for events; "" is unknown.
    """

    request_id: str
    actor: str
    app_id: str | None = None
    deadline: float | None = None  # of the monotonic clock
    address: str = ""
    user_agent: str = ""


CONTEXT: ContextVar[Context] = ContextVar("broker_context")
_NOBODY = Context(request_id="", actor="broker")


def context() -> Context:
    """The context of the running request or command."""
    return CONTEXT.get(_NOBODY)


def remaining(limit: float) -> float:
    """The limit of a wait in seconds: `limit`, or the time until the running request's deadline, if
    that is less.
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
        seconds = time.perf_counter() - self._began
        self._metrics.store_seconds.observe(seconds, *self._names)
        if self._metrics.trace is not None:
            self._metrics.trace(*self._names, seconds, kind is not None)
        if kind is not None:
            self._metrics.store_failures.inc(*self._names)
