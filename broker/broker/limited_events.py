"""Rate limit for events of refusals: a window of a minute for each app, action and reason.

A caller can present any number of wrong answers, and the holder of a key any number of wrong
nonces. So an app gets `LIMIT` events of one action and reason a minute from each process. One
further event carries the reason and the number of the rest (`limited` in its payload), when the
minute ends or the process stops. A flood of wrong signatures therefore hides no counter that went
back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from broker.model import RelyingParty

LIMIT = 60  # events of one action and reason in a window
WINDOW = 60.0  # seconds

# App, action, user id, reason, passkey id, payload.
Write = Callable[
    [RelyingParty, str, str | None, str | None, str | None, Mapping[str, Any] | None],
    Awaitable[None],
]


@dataclass(slots=True)
class _Window:
    app: RelyingParty
    timer: asyncio.TimerHandle
    events: int = 0


class LimitedEvents:
    """Passes events of refusals on to `write`, within the limit."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._windows: dict[tuple[str, str, str], _Window] = {}  # by app, action and reason
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(
        self,
        app: RelyingParty,
        action: str,
        reason: str,
        *,
        user_id: str | None,
        passkey_id: str | None,
        payload: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the event, or count it where its window is full."""
        key = (app.id, action, reason)
        window = self._windows.get(key)
        if window is None:
            # An empty context: the event of the rest belongs to no request.
            timer = asyncio.get_running_loop().call_later(
                WINDOW, self._end_soon, key, context=Context()
            )
            window = self._windows[key] = _Window(app, timer)
        window.events += 1
        if window.events <= LIMIT:
            await self._write(app, action, user_id, reason, passkey_id, payload)

    async def close(self) -> None:
        """End every window now."""
        ends = [self._end(key) for key in tuple(self._windows)]
        await asyncio.gather(*ends, *self._tasks)

    def _end_soon(self, key: tuple[str, str, str]) -> None:
        task = asyncio.get_running_loop().create_task(self._end(key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, key: tuple[str, str, str]) -> None:
        window = self._windows.pop(key)
        window.timer.cancel()
        rest = window.events - LIMIT
        if rest > 0:
            _, action, reason = key
            payload = {"limited": rest, "reason": reason}
            await self._write(window.app, action, None, "limited", None, payload)
