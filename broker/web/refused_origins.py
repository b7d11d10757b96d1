"""Rate-limited notices of refused origins: an event, and a line for the operator.

A page whose origin the app doesn't list is refused. The metric of refusals counts each refusal. A
notice names the origin: one event `origin.refused`, and one line of the log (`serve`) or of the
terminal (`dev`).

The `Origin` header is untrusted text. A notice names the origin only in the form that browsers
write (`page_origin`), otherwise as "null" or "malformed". Limits of one process: one notice a
minute for each origin of an app, ten a minute for each app, and notices for a thousand apps at a
time. So untrusted callers write at most ten rows a minute for each app, and fill at most a few
megabytes of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from broker.directory import Directory
from broker.errors import Unavailable
from broker.model import RelyingParty, page_origin
from broker.telemetry import Metrics

MINUTE = 60.0  # seconds
MOST_ORIGINS = 10  # of an app in a minute
MOST_APPS = 1000

Notify = Callable[[RelyingParty, str], None]


class RefusedOrigins:
    """Rate limiter of notices. `notify` gets the app and the printable origin; `clock` is
    monotonic.
    """

    def __init__(
        self,
        directory: Directory,
        metrics: Metrics,
        notify: Notify,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notify = notify
        self._directory = directory
        self._metrics = metrics
        self._clock = clock
        self._told: dict[str, dict[str, float]] = {}  # by app: time of each origin's notice

    async def tell(self, app: RelyingParty, origin: str) -> None:
        """Notify of a page that was refused; `origin` is its header. The refusal stands even if the
        event can't be written.
        """
        shown = origin if origin == "null" or page_origin(origin) else "malformed"
        if not self._is_due(app.id, shown):
            return
        self.notify(app, shown)
        try:
            await self._directory.tell_refused_origin(app, shown)
        except Unavailable:
            self._metrics.events_lost.inc()

    def _is_due(self, app_id: str, origin: str) -> bool:
        now = self._clock()
        told = self._recent(app_id, now)
        if app_id not in self._told and len(self._told) >= MOST_APPS:
            self._told = {app: left for app in self._told if (left := self._recent(app, now))}
            if len(self._told) >= MOST_APPS:
                return False
        self._told[app_id] = told
        if origin in told or len(told) >= MOST_ORIGINS:
            return False
        told[origin] = now
        return True

    def _recent(self, app_id: str, now: float) -> dict[str, float]:
        return {
            origin: at for origin, at in self._told.get(app_id, {}).items() if now - at < MINUTE
        }
