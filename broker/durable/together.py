"""Group commit: callers who ask for the same at the same time share one statement.

**Why.** A statement costs the same round trip, the same wake-ups and, where it writes, the same
wait for the disk whether it is about one sign-in or about thirty. Those who come within a few turns
of the event loop share one (`broker.gathering`). While it is under way, those who come meanwhile go
together as the next one; so the more there is to do, the less each costs, and a single caller waits
for nobody.

**What stays as it was.** A caller is answered after the commit of the statement that it was part
of, never before. Two callers about one row (`name` says which) never share a statement, for `UPDATE
… FROM` would apply one of them: the later one goes with the next. Each caller waits within its own
limit; who gave up before the statement began is left out of it.

**What one may do to the others: nothing.** The statement passes over what it would have to wait
for, a row that somebody else has locked, and answers `ALONE`: then the caller gets a statement of
their own, beside the others'. The same is done for each caller of a statement that the server
refused whole and certainly did not commit, so that only who caused it is refused. After anything
else, a lost connection above all, nobody can know whether it was committed: all of its callers are
told so, and nothing is sent again. When a statement has been under way for `_PATIENCE`, the next
begins beside it, `_LANES` at most.

An operator can compute: statements a second are at most callers a second, and at most 1 / (time of
a statement) while none takes longer than `_PATIENCE`.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Hashable, Sequence
from enum import Enum
from typing import Generic, TypeVar

import asyncpg

from broker.errors import Unavailable
from broker.gathering import Gathering
from broker.telemetry import Metrics, remaining

A = TypeVar("A")
T = TypeVar("T")

_PATIENCE = 0.02  # seconds
_TICK = 0.05  # seconds; so much later than its limit a wait may end
_LANES = 4
_MOST = 64  # callers of one statement


class Alone(Enum):
    """The answer of a caller who needs a statement of their own."""

    ALONE = 0


ALONE = Alone.ALONE


class Together(Generic[A, T]):
    """What `work` does for several callers at once: it is given what they ask and returns as many
    answers, in the same order. It is told whether a caller is alone, and then must not answer
    `ALONE`.

    `operation` is its name in metrics; `timeout` in seconds limits one wait.
    """

    def __init__(
        self,
        operation: str,
        work: Callable[[Sequence[A], bool], Awaitable[Sequence[T | Alone]]],
        *,
        timeout: float,
        metrics: Metrics,
        name: Callable[[A], Hashable] = id,
    ) -> None:
        self._operation = operation
        self._work = work
        self._timeout = timeout
        self._metrics = metrics
        self._name = name
        self._waiting: list[tuple[A, asyncio.Future[T]]] = []
        self._running: dict[asyncio.Task[None], float] = {}
        self._gathering = Gathering(self._waiting, self._running, self._begin)
        self._alone: set[asyncio.Task[None]] = set()
        self._woken: asyncio.Handle | None = None
        self._asking: dict[
            asyncio.Future[T], float
        ] = {}  # by the loop's time until which each is asked for
        self._tick: asyncio.Handle | None = None

    async def ask(self, asked: A) -> T:
        """The answer to `asked`, within the caller's limit.

        Raises:
            Unavailable: see `Postgres.run`; or not in time, and then it may have been done.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._waiting.append((asked, answer))
        self._asking[answer] = loop.time() + remaining(self._timeout)
        if self._tick is None:
            self._tick = loop.call_later(
                _TICK, self._look_at_the_clock, context=contextvars.Context()
            )
        if self._woken is None and len(self._running) < _LANES:
            self._gathering.come()
        try:
            return await answer
        finally:
            del self._asking[answer]

    def _look_at_the_clock(self) -> None:
        """End the waits that have reached their limit. One timer for all: one for each costs more
        than it tells.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        for answer in self._asking:
            self._over(answer, now)
        self._tick = (
            loop.call_later(_TICK, self._look_at_the_clock, context=contextvars.Context())
            if self._asking
            else None
        )

    def _over(self, answer: asyncio.Future[T], now: float) -> bool:
        """Whether nobody waits for it any longer: it is here, who asked gave up, or the limit is
        reached.
        """
        if not answer.done() and self._asking.get(answer, now) <= now:
            self._metrics.store_failures.inc("postgres", self._operation)
            answer.set_exception(Unavailable(reason="postgres"))
        return answer.done()

    def _begin(self) -> None:
        """Begin a statement for those who wait, unless one began so recently that its end is worth
        waiting for.
        """
        if self._woken is not None:
            self._woken.cancel()
            self._woken = None
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._running:
            wait = max(self._running.values()) + _PATIENCE - now
            if wait > 0:
                self._woken = loop.call_later(wait, self._begin, context=contextvars.Context())
                return
        batch: list[tuple[A, asyncio.Future[T]]] = []
        left: list[tuple[A, asyncio.Future[T]]] = []
        names: set[Hashable] = set()
        for asked, answer in self._waiting:
            if self._over(answer, now):
                continue
            name = self._name(asked)
            if name in names or len(batch) == _MOST:
                left.append((asked, answer))
            else:
                names.add(name)
                batch.append((asked, answer))
        self._waiting[:] = left
        if batch:
            task = loop.create_task(
                self._run(batch), name="together", context=contextvars.Context()
            )
            self._running[task] = now
            task.add_done_callback(self._ended)
            if (
                left and len(self._running) < _LANES
            ):  # else its end calls them, which may never come
                self._woken = loop.call_later(_PATIENCE, self._begin, context=contextvars.Context())

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if self._waiting:
            self._gathering.come()

    async def _run(
        self, batch: Sequence[tuple[A, asyncio.Future[T]]], *, alone: bool = False
    ) -> None:
        answers: Sequence[T | Alone]
        try:
            answers = await self._work([asked for asked, _ in batch], alone)
        except Exception as fault:  # noqa: BLE001 - it is the callers', who raise it
            if alone or not _undone(fault):
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(_own(fault))
                return
            answers = [ALONE] * len(batch)
        for caller, told in zip(batch, answers, strict=True):
            if caller[1].done():
                continue
            if told is ALONE:
                task = asyncio.create_task(self._run([caller], alone=True), name="alone")
                self._alone.add(task)
                task.add_done_callback(self._alone.discard)
            else:
                caller[1].set_result(told)


def _undone(fault: Exception) -> bool:
    """Whether the server refused the statement whole, so that nothing of it was committed."""
    if isinstance(fault, Unavailable):
        return isinstance(fault.__cause__, asyncpg.TransactionRollbackError)
    return isinstance(fault, asyncpg.PostgresError)


def _own(fault: Exception) -> Exception:
    """A fault for each caller: one that is raised grows a trace."""
    if not isinstance(fault, Unavailable):
        return fault
    own = Unavailable(reason=fault.reason)
    own.__cause__ = fault
    return own
