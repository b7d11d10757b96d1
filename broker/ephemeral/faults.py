"""Error classification: names the cause of a failed Redis command for the metric and the log.

`broker_redis_failures_total` counts by `cause`, one of `CAUSES`. The log has one line a second for
each cause at most, which says how many failures it stands for. The text of an error may quote a key
or an argument, so only the exception's type and the server's error code (its first word, like
`OOM`) are logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Literal, get_args

from redis import exceptions

from broker.ephemeral.codec import DecodeError
from broker.telemetry import Log, Metrics

Cause = Literal[
    "oom",
    "noperm",
    "auth",
    "readonly",
    "loading",
    "busy",
    "misconf",
    "noreplicas",
    "script",
    "cluster_down",
    "redirect",
    "timeout",
    "connection",
    "unreadable",
    "other",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)

_PAUSE = 1.0  # seconds between two lines of one cause
_CODE = re.compile(r"[A-Z]{2,20}(?= |$)")

# The first that fits: redis-py derives some of these from others. It drops the codes of errors that
# it has a type for.
_BY_TYPE: tuple[tuple[type[BaseException], Cause], ...] = (
    (exceptions.OutOfMemoryError, "oom"),
    (exceptions.NoPermissionError, "noperm"),
    (exceptions.AuthenticationError, "auth"),
    (exceptions.AuthenticationWrongNumberOfArgsError, "auth"),
    (exceptions.ReadOnlyError, "readonly"),
    (exceptions.BusyLoadingError, "loading"),
    (exceptions.ClusterDownError, "cluster_down"),
    (exceptions.AskError, "redirect"),
    (exceptions.TryAgainError, "redirect"),
    (exceptions.ClusterCrossSlotError, "redirect"),
    (TimeoutError, "timeout"),
    (exceptions.TimeoutError, "timeout"),
    (DecodeError, "unreadable"),
)
_BY_CODE: dict[str, Cause] = {"BUSY": "busy", "MISCONF": "misconf", "NOREPLICAS": "noreplicas"}


def cause_of(fault: BaseException) -> tuple[Cause, BaseException]:
    """The cause of a failure and the exception that shows it: where a connection ended, what ended
    it.
    """
    seen: BaseException | None = fault
    while seen is not None:
        found = _cause_of_one(seen)
        if found != "connection":
            return found, seen
        seen = seen.__cause__
    return "connection", fault


def _cause_of_one(fault: BaseException) -> Cause:
    for kind, cause in _BY_TYPE:
        if isinstance(fault, kind):
            return cause
    if isinstance(fault, exceptions.ResponseError):
        text = str(fault)
        if "ACL failure in script" in text:
            return "noperm"
        return _BY_CODE.get(_code(fault) or "") or ("script" if "script" in text else "other")
    return "connection" if isinstance(fault, exceptions.ConnectionError | OSError) else "other"


def _code(fault: BaseException) -> str | None:
    """The server's error code: the first word of its error, in capitals."""
    code = getattr(fault, "status_code", None)
    if code is None and isinstance(fault, exceptions.ResponseError):
        found = _CODE.match(str(fault))
        code = found[0] if found else None
    return code


class Faults:
    """Counts and logs failed commands. `clock` is a monotonic one."""

    def __init__(self, metrics: Metrics, log: Log, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._told: dict[Cause, tuple[float, int]] = {}  # when the last line was, failures since

    def tell(self, operation: str, fault: BaseException) -> None:
        """A command failed."""
        (cause, shown), now = cause_of(fault), self._clock()
        self._metrics.store_failures.inc("redis", operation)
        self._metrics.redis_failures.inc(cause)
        last, failures = self._told.get(cause, (now - _PAUSE, 0))
        if now - last < _PAUSE:
            self._told[cause] = last, failures + 1
            return
        self._told[cause] = now, 0
        self._log(
            "redis_failed",
            severity=logging.WARNING,
            cause=cause,
            error=type(shown).__name__,
            code=_code(shown),
            operation=operation,
            failures=failures + 1,
        )
