"""Remembered look-ups: one class apart from the stores, for both who asks for apps and who asks for signing keys put it over them.

What is remembered may have changed meanwhile, so it is remembered for less than a second: a change in the store is effective on every
instance within that time, without a message between instances. Only what exists is remembered, so nobody fills the memory by
asking for what does not; and there is a limit, above which everything is asked for again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

_REMEMBERED = 10_000

V = TypeVar("V")


class Remembered(Generic[V]):
    """Look-ups remembered for at most `seconds`, so that a change is effective everywhere within that time.

    The time counts from when the store was asked, not from its answer, which may have been long on the way; and a clock that was
    set back ends the memory instead of lengthening it.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._values: dict[object, tuple[float, V]] = {}

    def get(self, key: object) -> V | None:
        found = self._values.get(key)
        return found[1] if found and 0 <= self._clock() - found[0] < self._seconds else None

    def forget(self, key: object) -> None:
        self._values.pop(key, None)

    def put(self, key: object, value: V, asked: float) -> None:
        if len(self._values) >= _REMEMBERED:
            self._values.clear()
        self._values[key] = (asked, value)
