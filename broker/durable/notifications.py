"""Changes that other instances, commands or people with psql make, heard of at their commit; and
the proof that they are heard of.

One connection, beside the pool's, listens on the channel on which triggers tell of changes
(sql/0004_notifications.sql). A connection says nothing when it is lost: a network may swallow
everything, a server may be frozen, a pooler may lend the session to others. So it is asked a
question every third of `seconds`, within a limit, and only the answer is a proof.

**What an answer proves.** A commit signals the listening sessions before its own client has the
answer; a session sends the notifications it was signalled before it says that it is ready for the
next query, which is what asyncpg waits for; and asyncpg calls back in the order of what it reads.
So when the answer is here, every change whose maker had *their* answer before the question was
asked has been heard of here: the proof counts from the question. A look-up may rest on it for
`seconds`, so a change is effective within `seconds` of its maker's answer, whatever becomes of the
connection (`broker.durable.remembered`). LISTEN is committed before the first look-up that rests on
it is made; the documentation of LISTEN says why that order leaves no gap.

**What is asked.** Whether the session is the one that the connection was opened to (behind a pooler
it is not: then this reasoning ends, even where notifications come), whether it listens, and whether
every trigger is there and enabled. Any other answer, none in time, or a server that can't LISTEN (a
standby, a relative of Postgres): nothing is proven, and look-ups are remembered for `seconds`, as
without all this. The log says so once, `broker_store_failures_total` counts with operation
"listen", and it is tried again, ever less often.

**At rest.** Nothing is connected before the first look-up, and nothing asked when none was made for
`REST`. As remembered look-ups are made again after `LONGEST`, which is less, that is when nobody is
there. Rest is no loss: the session listens on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import asyncpg

from broker.durable.postgres import Connection, Postgres
from broker.durable.remembered import LONGEST, News
from broker.errors import Unavailable
from broker.telemetry import Log, Metrics, fault

CHANNEL = "passkey_broker"
REST = 1.5 * LONGEST  # seconds
_LONGEST_PAUSE = 10.0  # seconds between two tries

_TRIGGERS = 6
_QUESTION = """
SELECT pg_backend_pid() AS pid, $1 IN (SELECT pg_listening_channels()) AS listens, (
    SELECT count(*) FROM pg_trigger WHERE tgname IN ('notify_change', 'notify_truncate') AND tgenabled = 'A'
    AND tgrelid IN (to_regclass('relying_parties'), to_regclass('api_keys'), to_regclass('signing_keys'))
) AS triggers
"""


class Notifications:
    """Keeps `news` up to date while it runs. `seconds` is how long a look-up may rest on one proof,
    `timeout` limits one wait.
    """

    def __init__(
        self,
        url: str,
        *,
        seconds: float,
        timeout: float,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float] = time.time,
        rest: float = REST,
    ) -> None:
        self.news = News()
        self._postgres = Postgres(
            url, timeout=min(timeout, seconds), connections=1, metrics=metrics
        )
        self._seconds = seconds
        self._log = log
        self._clock = clock
        self._rest = rest
        self._session: Connection | None = None
        self._lost_by = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs no server. Without `seconds` nothing is remembered, and there is nothing to
        do.
        """
        if self._seconds > 0:
            self._task = asyncio.create_task(self._run(), name="notifications")
            self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        """End. What is remembered holds no longer than without notifications."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self.news.restart()
        await self._postgres.close()

    async def _run(self) -> None:
        pause = every = self._seconds / 3
        wanted_at = -self._rest
        time_of = asyncio.get_running_loop().time
        while True:
            if not self.news.wanted.is_set() and time_of() - wanted_at >= self._rest:
                await self.news.wanted.wait()
            if self.news.wanted.is_set():
                self.news.wanted.clear()
                wanted_at = time_of()
            try:
                await self._postgres.run("listen", self._prove)
            except Unavailable as down:
                self._lose(down.reason)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except asyncpg.PostgresError:  # a server that does not know what is said here
                self._lose("postgres_no_listen")
                pause = _LONGEST_PAUSE
            else:
                if self._lost_by:
                    self._log("notifications_heard")
                self._lost_by, pause = "", every
            await asyncio.sleep(pause)

    async def _prove(self, session: Connection) -> None:
        if session is not self._session:
            self._session = None
            await session.add_listener(CHANNEL, self._hear)
            self._session = session
            self.news.restart()
        asked = self._clock()
        answer = await session.fetchrow(_QUESTION, CHANNEL)
        assert answer is not None, "a SELECT without FROM has one row"
        if answer["pid"] != session.get_server_pid() or not answer["listens"]:
            raise Unavailable(reason="postgres_pooled")
        if answer["triggers"] != _TRIGGERS:
            raise Unavailable(reason="postgres_not_migrated")
        self.news.proven = asked

    def _hear(self, _session: object, _pid: int, _channel: str, payload: object) -> None:
        self.news.hear(str(payload))

    def _lose(self, reason: str) -> None:
        self._session = None
        self.news.restart()
        if reason != self._lost_by:
            self._log("notifications_lost", severity=logging.WARNING, reason=reason)
        self._lost_by = reason

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log("defect", severity=logging.ERROR, **fault(error))
