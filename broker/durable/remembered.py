"""Remembered look-ups, and the news that lets them be remembered for long.

What is remembered may have changed meanwhile. A look-up holds for `seconds` (less than one) from
when the store was asked; that needs nothing from anybody, so a change is effective on every
instance within that time. The store also tells of changes (`broker.durable.notifications`), and
each telling makes the look-up it names be forgotten. While that is *proven* to work, a look-up is
as good as one made at the time of the proof: it holds for `seconds` from then. Proofs come several
times within `seconds`, so it holds on and on, for `LONGEST` at most; when proofs stop coming, for
whatever reason, it ends as if no news had ever been. The bound is the same in both cases, and it
rests on a clock, not on anybody's noticing that a connection is lost.

*A look-up that was under way when something was told of* may have been answered before that change,
and be put after it. The news are counted: what was asked for at another count than it is put at is
not covered by proofs. *Sessions* end with the connection: what was asked for in one session is not
covered by the proofs of another, between which a change may have gone unheard.

Only for what changes by a write: what ends by itself must be judged by whoever uses it. Only what
exists is remembered, so nobody fills the memory by asking for what does not; and there is a limit,
above which everything is asked for again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

_REMEMBERED = 10_000
LONGEST = 60.0  # seconds; so long a change made behind the triggers' back (by whoever disabled them) can go unnoticed

V = TypeVar("V")
LookUpStart: TypeAlias = tuple[float, int]  # seconds by the clock, and the count of the news


class News:
    """How far changes in the store have been heard of. Written by `Notifications`, read by every
    `Remembered`.

    `proven` is a time by the same clock as the memories': of every change committed until then this
    process has heard. `wanted` is set by every look-up that was not remembered.
    """

    __slots__ = ("_memories", "count", "proven", "session", "wanted")

    def __init__(self) -> None:
        self.proven = -math.inf
        self.session = 0
        self.count = 0
        self.wanted = asyncio.Event()
        self._memories: dict[str, Remembered[Any]] = {}

    def subscribe(self, table: str, memory: Remembered[Any]) -> None:
        """Have `memory` hear of changes in `table`."""
        assert table not in self._memories, "one memory a table"
        self._memories[table] = memory

    def restart(self) -> None:
        """From now on changes are heard of, or no longer: either way nothing is known of those up
        to now.
        """
        self.session += 1
        self.count += 1
        self.proven = -math.inf

    def hear(self, payload: str) -> None:
        """A change: a table and, behind a space, a name in it; without a name, of everything
        in it.
        """
        self.count += 1
        table, one, name = payload.partition(" ")
        memory = self._memories.get(table)
        if memory is not None:
            memory.hear(name if one else None)


class Remembered(Generic[V]):
    """Look-ups remembered for at most `seconds`, so that a change is effective everywhere within
    that time; on proof, for longer.

    The time counts from when the store was asked, not from its answer, which may have been long on
    the way; and a clock that was set back ends the memory instead of lengthening it. `news` of
    `table` name what changed; `named` makes a key of such a name.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float],
        news: News | None = None,
        table: str = "",
        named: Callable[[str], object] = str,
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._news = news or News()
        self._named = named
        self._values: dict[object, tuple[float, int, V]] = {}
        self._news.subscribe(table, self)

    def get(self, key: object) -> V | None:
        found = self._values.get(key)
        if found is None:
            return None
        asked, session, value = found
        now = self._clock()
        age = now - asked
        if 0 <= age < self._seconds:
            return value
        news = self._news
        if (
            session == news.session
            and 0 <= now - news.proven < self._seconds
            and 0 <= age < LONGEST
        ):
            return value
        return None

    def forget(self, key: object) -> None:
        self._values.pop(key, None)

    def hear(self, name: str | None) -> None:
        """Forget what the store calls `name`, or everything."""
        if name is None:
            self._values.clear()
            return
        try:
            self.forget(self._named(name))
        except (
            ValueError
        ):  # no trigger of ours says that, but whoever may connect to the database may notify
            self._values.clear()

    def ask(self) -> LookUpStart:
        """To be called before the store is asked; `put` wants it back."""
        self._news.wanted.set()
        return self._clock(), self._news.count

    def put(self, key: object, value: V, asked: LookUpStart) -> None:
        if len(self._values) >= _REMEMBERED:
            self._values.clear()
        at, count = asked
        self._values[key] = (at, self._news.session if count == self._news.count else -1, value)
