"""Adaptive micro-batching: decides when a queue of commands is flushed to a store.

**Why.** A message to a store costs the broker a write, a read, an iteration of the event loop and
the wake-ups on both sides, whether it carries one command or thirty.

**The rule.** The queue is flushed at the next iteration of the event loop: one message carries the
commands of all callers that were ready in this one. While the latest batch is under way, the queue
waits for the end of a batch, for `patience` seconds at most. So the busier the store, the larger
the batch, and a lone caller waits for no other.

An operator can compute: with `patience`, batches a second are at most 1 / (time of a batch) while
none takes longer than `patience`.

Callers' own time limits run while the queue waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Sized


class FlushPolicy:
    """Calls `flush` for `queue`, which empties it or leaves in it what waits for the next batch.
    `under_way` holds the batches, or their commands, that are not answered yet.

    `flush` runs in an empty context: deadline and request id of one caller are not the others'.
    """

    __slots__ = ("_context", "_flush", "_flushed", "_next", "_patience", "_queue", "_under_way")

    def __init__(
        self, queue: Sized, under_way: Sized, flush: Callable[[], None], *, patience: float = 0.0
    ) -> None:
        self._queue = queue
        self._under_way = under_way
        self._flush = flush
        self._patience = patience
        self._context = contextvars.Context()
        self._flushed = -math.inf  # by the loop's time; once a batch has ended, the next may go
        self._next: asyncio.Handle | None = None

    def schedule(self) -> None:
        """Schedule a flush: a command was added to the queue."""
        if self._next is not None:
            return
        loop = asyncio.get_running_loop()
        wait = 0.0
        if self._patience and self._under_way:
            wait = self._flushed + self._patience - loop.time()
        self._next = (
            loop.call_later(wait, self._run, context=self._context)
            if wait > 0
            else loop.call_soon(self._run, context=self._context)
        )

    def ended(self) -> None:
        """Flush what waited for a batch that has ended."""
        self._flushed = -math.inf
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._queue:
            self.schedule()

    def _run(self) -> None:
        self._next = None
        if self._patience:
            self._flushed = asyncio.get_running_loop().time()
        self._flush()
        if self._queue and self._under_way:
            self.schedule()
