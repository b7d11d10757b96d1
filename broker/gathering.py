"""When callers who may share one message to a store stop waiting for each other.

**Why.** A message to a store costs the broker a write, a read, a turn of the event loop and the
wake-ups on both sides, whether it carries one caller's command or thirty; with sixteen logins in
flight those were a third of a login. Callers who happen to be there in one turn of the loop are
few, because the loop turns as soon as a single connection has something to read. A few turns later
those have come whose requests lay in the kernel, and those who were answered a moment ago and ask
for their next step.

**The rule.** Each turn asks the kernel once what there is to read, without waiting, so a turn in
which nothing happens takes about a microsecond and no timer is involved. The queue goes out when a
turn brought nobody and at least as many are there as went last time. While they are fewer, they
wait until `TURNS` turns in a row have brought nobody; when they are enough and still each turn
brings somebody, for `TURNS` turns at most. One caller alone, where one went last time, goes out
with the first turn: who has the broker to himself waits for nobody, and the first crowd after him
costs what it always did. A crowd that has gone home costs one wait of `TURNS` turns, a tenth of a
millisecond.

**Nobody else there at all.** Where the last `LONE` messages carried one caller each, and each went
while no other was under way, the next goes at once: even a single turn, a look at the kernel right
before a wait, is a hundredth of a login for who is alone. Whoever comes while a message is under
way ends that, for two who each go at once would never meet.

**How many turns.** With too few, callers who go round in step fall apart into two crowds that never
meet again, and each crowd costs messages of its own: of sixteen logins in flight a login then costs
a sixth more. So the wait is a little longer than those who drive them take from one request to the
next.

Waiting changes no limit: a caller's own clock runs while the queue gathers.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sized

TURNS = 128
LONE = 16


class Gathering:
    """Calls `go` when `queue` has gathered. `go` empties the queue, or leaves in it what waits for
    something else. `under_way` has what went out and was not answered yet.

    It is called in nobody's context: deadline and request id of whoever came first are not the
    others'.
    """

    __slots__ = (
        "_before",
        "_context",
        "_go",
        "_here",
        "_last",
        "_left",
        "_lone",
        "_queue",
        "_under_way",
    )

    def __init__(self, queue: Sized, under_way: Sized, go: Callable[[], None]) -> None:
        self._queue = queue
        self._under_way = under_way
        self._go = go
        self._context = contextvars.Context()
        self._here = False  # whether somebody waits for turns
        self._left = 0  # turns
        self._before = 0  # how many were there a turn ago
        self._last = 1  # how many went last time
        self._lone = 0  # messages in a row with one caller each and no other message under way

    def come(self) -> None:
        """Somebody has joined the queue."""
        if self._here:
            return
        if self._under_way:
            self._lone = 0
        elif self._lone >= LONE:
            self._context.run(self._go)
            return
        self._here = True
        self._left = TURNS
        self._before = 1
        asyncio.get_running_loop().call_soon(self._turn, context=self._context)

    def _turn(self) -> None:
        there = len(self._queue)
        few = there < self._last
        self._left = TURNS if few and there > self._before else self._left - 1
        if self._left and there and (few or there != self._before):
            self._before = there
            asyncio.get_running_loop().call_soon(self._turn, context=self._context)
        else:
            self._here = False
            if there:  # nobody is, where somebody else has emptied the queue
                self._last = there
                self._lone = self._lone + 1 if there == 1 else 0
                self._go()
