"""Group commit: runs one SQL statement for all callers waiting for the same operation.

**Why.** A statement costs the same round trip, the same wake-ups and, where it writes, the same
wait for the disk whether it records one sign-in or thirty. While a statement is under way, callers
queue for the next one (`broker.batching`). So the more there is to do, the less each caller costs.
Postgres' own `commit_delay` shares the wait for the disk alone; no library shares the statement.

**Guarantee.** A caller is answered after the commit of its statement, never before. Two callers
with the same key never share a statement, for `UPDATE … FROM` would apply one of them: the second
goes with the next. Each caller waits within its own limit. A caller that gave up before the
statement began is left out of it.

**Isolation.** A statement passes over rows that another transaction has locked and answers
`NEEDS_OWN_STATEMENT` for their callers. Each of them then gets a statement of its own, which waits
for the row. The same is done for every caller of a statement that the server refused as a whole
and certainly did not commit: so only the caller that caused it is refused. After any other fault, a
lost connection above all, the outcome is unknown: all callers are told so, and nothing is sent
again.
When a statement has been under way for `_PATIENCE`, the next begins beside it, `_LANES` at most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from enum import Enum
from typing import Generic, TypeVar

import asyncpg

from broker.batching import FlushPolicy
from broker.errors import Unavailable
from broker.telemetry import Metrics, remaining

A = TypeVar("A")
T = TypeVar("T")

_PATIENCE = 0.02  # seconds
_LANES = 4
_MOST = 64  # callers of one statement


class OwnStatement(Enum):
    """The answer for a caller that needs a statement of its own."""

    NEEDED = 0


NEEDS_OWN_STATEMENT = OwnStatement.NEEDED


class GroupCommit(Generic[A, T]):
    """Runs `statement` for several callers at once: it takes their inputs and returns as many
    answers, in the same order. Its second argument is true for a caller with a statement of its
    own; it then must not answer `NEEDS_OWN_STATEMENT`.

    `operation` is its name in metrics; `timeout` in seconds limits one wait.
    """

    def __init__(
        self,
        operation: str,
        statement: Callable[[Sequence[A], bool], Awaitable[Sequence[T | OwnStatement]]],
        *,
        timeout: float,
        metrics: Metrics,
        key: Callable[[A], Hashable] = id,
    ) -> None:
        self._operation = operation
        self._statement = statement
        self._timeout = timeout
        self._metrics = metrics
        self._key = key
        self._waiting: list[tuple[A, asyncio.Future[T]]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._own: set[asyncio.Task[None]] = set()
        self._policy = FlushPolicy(self._waiting, self._running, self._begin, patience=_PATIENCE)
        metrics.queued.add(lambda: len(self._waiting), operation)

    async def submit(self, item: A) -> T:
        """The answer for `item`, within the caller's limit.

        Raises:
            Unavailable: see `Postgres.run`; or not in time, and then it may have been done.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        expiry = loop.call_later(remaining(self._timeout), self._expire, answer)
        self._waiting.append((item, answer))
        self._policy.schedule()
        began = time.perf_counter()
        try:
            return await answer
        finally:
            expiry.cancel()
            if self._metrics.trace is not None:
                failed = answer.cancelled() or answer.exception() is not None
                seconds = time.perf_counter() - began
                self._metrics.trace("postgres", self._operation, seconds, failed)

    def _expire(self, answer: asyncio.Future[T]) -> None:
        if not answer.done():
            self._metrics.store_failures.inc("postgres", self._operation)
            answer.set_exception(Unavailable(reason="postgres"))

    def _begin(self) -> None:
        """Begin a statement for the callers that wait."""
        if len(self._running) >= _LANES:
            return
        batch: list[tuple[A, asyncio.Future[T]]] = []
        left: list[tuple[A, asyncio.Future[T]]] = []
        keys: set[Hashable] = set()
        for item, answer in self._waiting:
            if answer.done():
                continue
            key = self._key(item)
            if key in keys or len(batch) == _MOST:
                left.append((item, answer))
            else:
                keys.add(key)
                batch.append((item, answer))
        self._waiting[:] = left
        if batch:
            task = asyncio.create_task(self._run(batch), name="group commit")
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.remove(task)
        self._policy.ended()

    async def _run(
        self, batch: Sequence[tuple[A, asyncio.Future[T]]], *, own: bool = False
    ) -> None:
        answers: Sequence[T | OwnStatement]
        try:
            answers = await self._statement([item for item, _ in batch], own)
        except Exception as fault:  # noqa: BLE001 - it is the callers', who raise it
            if own or not _undone(fault):
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(_copy(fault))
                return
            answers = [NEEDS_OWN_STATEMENT] * len(batch)
        for caller, result in zip(batch, answers, strict=True):
            if caller[1].done():
                continue
            if result is NEEDS_OWN_STATEMENT:
                task = asyncio.create_task(self._run([caller], own=True), name="own statement")
                self._own.add(task)
                task.add_done_callback(self._own.discard)
            else:
                caller[1].set_result(result)


def _undone(fault: Exception) -> bool:
    """True if the server refused the statement as a whole, so that nothing of it was committed."""
    if isinstance(fault, Unavailable):
        return isinstance(fault.__cause__, asyncpg.TransactionRollbackError)
    return isinstance(fault, asyncpg.PostgresError)


def _copy(fault: Exception) -> Exception:
    """A fault for each caller: one that is raised grows a trace."""
    if not isinstance(fault, Unavailable):
        return fault
    copy = Unavailable(reason=fault.reason)
    copy.__cause__ = fault
    return copy
