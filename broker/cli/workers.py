"""Supervisor of `broker serve --workers N`: N processes that serve one port, and one that serves
nothing.

The supervisor judges the settings, migrates, binds the sockets and starts workers: fresh processes
that inherit the sockets. It replaces a worker that ends, at once; one that ended within 10 s of its
start, and so did the one before, after a pause that doubles. Before the service listens no worker
is replaced: one that can't start ends the service. SIGHUP replaces workers one by one, each when
its successor listens; in a terminal, where SIGHUP is the terminal's end, it ends the service.

**A socket pair joins each worker to the supervisor.** The worker says when it listens, and when it
drains because of a SIGTERM of its own. The supervisor says "leave" to one or "drain" to all. Its
end without that word means that it was killed; the worker drains as well, so no orphan keeps the
port. A worker whose event loop hangs for 30 s is ended by SIGALRM, which it postpones each second.
Workers lead sessions of their own, so that Ctrl-C reaches the supervisor alone.

**One accept queue for all** (`broker.web.accept_balance`): connections that a killed worker has not
accepted wait for the others. SO_REUSEPORT, a queue for each worker, would lose those and let a
second service bind a port that is in use. A worker that leaves while others go on takes no more
connections, and closes idle ones a second later: one that it had just taken gets its answer.

Metrics add up in a private folder (`broker.telemetry.metrics`), in memory where there is /dev/shm.

**Why no library.** Workers share a port and its metrics without a load balancer in front; beside N
instances behind one, they cost and gain nothing. gunicorn, with aiohttp's worker class, gives one
application to all its sockets, where the two ports here differ; it does not know when a worker
listens; it neither pauses in a crash loop nor adds metrics up; its settings, signals and log lines
would stand beside the broker's. circus is a daemon on ZeroMQ; honcho replaces no process; granian
is an HTTP server of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process, create_subprocess_exec
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from broker.app import Ports, assemble
from broker.cli.process import (
    ServingFault,
    apply_migrations,
    cannot_listen,
    run,
    run_with_log,
    start,
    tell_until_migrated,
    until_told,
    with_parts,
)
from broker.dialects import chosen, left_out, load_settings
from broker.settings import Settings
from broker.telemetry import Log, Metrics, SharedTally, capture_library_records

BEAT = 1.0  # seconds
HANG_SECONDS = 30.0  # without a beat
SETTLED = 10.0  # seconds after its start from which a worker's end says nothing of the next one
LONGEST_PAUSE = 30.0  # seconds
LINGER = 1.0  # seconds from a connection to its first request, when its worker leaves
LATE = 5.0  # seconds beyond the drain limit, for closing the stores

LISTENS, DRAINS = b"l", b"d"  # what a worker says
LEAVE, DRAIN = b"l", b"d"  # what the supervisor says: you alone, or all

_ENTRY = "from broker.cli.workers import work; work()"
_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is made by mkdtemp


def pause(early: int) -> float:
    """Seconds until the next start, after so many workers in a row that ended within `SETTLED` of
    theirs.
    """
    return 0.0 if early < 2 else min(LONGEST_PAUSE, 2.0 ** (early - 2))


def supervise(
    settings: Settings,
    environment: Mapping[str, str],
    *,
    migrate: bool,
    hang_seconds: float = HANG_SECONDS,
) -> None:
    """Serve with `settings.workers` processes until SIGTERM or SIGINT. `environment` is theirs; a
    worker whose event loop hangs for `hang_seconds` is replaced.

    Raises:
        SettingsFault, MigrationFault, ServingFault: before anything listens.
    """
    log = Log(level=settings.log_level, pid=os.getpid())
    capture_library_records(log)
    chosen(settings)
    if migrate:
        run(with_parts(settings, apply_migrations))
    try:
        ports = Ports.bind(settings)
    except OSError as fault:
        raise cannot_listen(settings, fault) from None
    if left := left_out(settings):
        log("dialects_left_out", dialects=left, missing="BROKER_SECRET_KEY")
    try:
        memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        folder = tempfile.mkdtemp(prefix="broker-workers-", dir=memory)
    except OSError as fault:
        raise ServingFault(
            f"Workers need a folder for their metrics ({fault.strerror}); let TMPDIR name a place for it."
        ) from None
    try:
        supervisor = _Supervisor(settings, environment, ports, folder, log, hang_seconds)
        asyncio.run(supervisor.run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Arguments:
    """A worker's command line: descriptors that it inherits, the folder of metrics, and its place
    in that. Nothing secret.
    """

    pages: list[int]
    management: list[int]
    channel: int
    folder: str
    place: int
    hang_seconds: float


class _Worker:
    """A process that serves, as the supervisor sees it."""

    def __init__(self, place: int, process: Process, channel: socket.socket) -> None:
        self.place = place
        self.process = process
        self.channel = channel
        self.listens = False
        self.drains = False  # by itself, or because it was told
        self.known = asyncio.Event()  # it listens, or it ended before
        self.over = asyncio.Event()  # it takes no new connections, or it ended
        self.began = time.monotonic()
        self.life: asyncio.Task[None]

    def drain(self, word: bytes) -> None:
        """Ask it to end. One that doesn't listen yet has no requests, and its copy of the sockets
        must not stay.
        """
        self.drains = True
        with suppress(OSError):
            self.channel.send(word)
        if not self.listens:
            with suppress(ProcessLookupError):
                self.process.terminate()

    @property
    def end(self) -> dict[str, object]:
        """How it ended, for log and metric. The cause is `told`, `hung`, a `signal`, or a `status`
        of its own.
        """
        status = self.process.returncode or 0
        end = {"signal": _name(-status)} if status < 0 else {"status": status}
        cause = "told" if self.drains and not status else next(iter(end))
        if status == -signal.SIGALRM:
            cause = "hung"
        return {"worker": self.process.pid, "cause": cause, **end}


class _Supervisor:
    """Keeps `settings.workers` workers, until told."""

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        ports: Ports,
        folder: str,
        log: Log,
        hang_seconds: float,
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._ports = ports
        self._folder = folder
        self._log = log
        self._hang_seconds = hang_seconds
        self._metrics = Metrics()
        self._shared = SharedTally(Path(folder), 0, self._metrics.tally)
        self._serving: list[_Worker] = []  # one that drains leaves its place to its successor
        self._running: set[_Worker] = set()
        self._renewal: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Raises ServingFault: a worker can't start."""
        told = until_told(self._end_at_once)
        keeping = asyncio.create_task(self._keep_all())
        try:
            await asyncio.wait([told, keeping], return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()
            self._log("draining", seconds=self._settings.drain_seconds)
        finally:
            keeping.cancel()
            if self._renewal:
                self._renewal.cancel()
            await self._end_all()
        self._log("stopped")

    async def _keep_all(self) -> None:
        first = [await self._begin() for _ in range(self._settings.workers)]
        for worker in first:
            await worker.known.wait()
            if not worker.listens:
                end = worker.end.get("signal") or f"exit status {worker.end['status']}"
                raise ServingFault(f"A worker ended before it listened ({end}).")
        pages, management = self._ports.pages, self._ports.management
        self._log(
            "listening",
            host=self._settings.host,
            port=pages[0].getsockname()[1],
            management_port=(management or pages)[0].getsockname()[1],
            metrics=self._settings.metrics_at,
            workers=len(first),
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if len(first) > (cores or 1):
            told = {"workers": len(first), "cores": cores}
            self._log("workers_share_cores", severity=logging.WARNING, **told)
        self._serving = first
        if not any(map(os.isatty, (0, 1, 2))):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._begin_renewal)
        await asyncio.gather(*map(self._keep, range(len(first))))

    async def _begin(self) -> _Worker:
        """Start a worker. After the first ones this is tried until the system has room for it.

        Raises:
            ServingFault: one of the first ones can't be started.
        """
        taken = {worker.place for worker in self._running}
        place = next(each for each in range(1, len(taken) + 2) if each not in taken)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arguments = _Arguments(
            pages=[each.fileno() for each in self._ports.pages],
            management=[each.fileno() for each in self._ports.management],
            channel=theirs.fileno(),
            folder=self._folder,
            place=place,
            hang_seconds=self._hang_seconds,
        )
        try:
            with theirs:
                process = await create_subprocess_exec(
                    *(sys.executable, "-P", "-c", _ENTRY, json.dumps(asdict(arguments))),
                    env=self._environment,
                    stdin=DEVNULL,
                    pass_fds=(*arguments.pages, *arguments.management, arguments.channel),
                    start_new_session=True,
                )
        except OSError as fault:
            ours.close()
            if not self._serving:
                raise ServingFault(f"Can't start a worker: {fault.strerror}.") from None
            self._log("worker_not_started", severity=logging.ERROR, error=fault.strerror)
            await asyncio.sleep(LONGEST_PAUSE)
            return await self._begin()
        worker = _Worker(place, process, ours)
        self._running.add(worker)
        worker.life = asyncio.create_task(self._follow(worker))
        return worker

    async def _follow(self, worker: _Worker) -> None:
        """Take note of what a worker says, and of its end."""
        loop = asyncio.get_running_loop()
        with worker.channel, suppress(OSError):
            while word := await loop.sock_recv(worker.channel, 1):
                if word == DRAINS:
                    worker.drains = True
                    worker.over.set()
                    continue
                worker.listens = True
                worker.known.set()
                if self._serving:
                    self._log("worker_listening", worker=worker.process.pid)
        await worker.process.wait()
        self._running.discard(worker)
        if worker.listens and worker.drains and worker.end["cause"] != "told":
            self._log("worker_ended", severity=logging.WARNING, **worker.end)
        worker.known.set()
        worker.over.set()

    async def _keep(self, index: int) -> None:
        """Put one worker after another in a place."""
        early = 0
        while True:
            worker = self._serving[index]
            await worker.over.wait()
            if self._serving[index] is not worker:
                continue  # it was renewed
            if worker.drains:
                self._log("worker_drains", worker=worker.process.pid)
            else:
                early = early + 1 if time.monotonic() - worker.began < SETTLED else 0
                wait = pause(early)
                self._log("worker_ended", severity=logging.WARNING, **worker.end, pause=wait)
                await asyncio.sleep(wait)
            if self._serving[index] is worker:
                self._put(index, await self._begin(), worker.end["cause"])

    def _put(self, index: int, fresh: _Worker, cause: object) -> None:
        self._serving[index] = fresh
        self._metrics.worker_restarts.inc(str(cause))
        self._shared.publish()

    def _begin_renewal(self) -> None:
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Replace each worker, when its successor listens. One that can't start ends this, and the
        rest stay as they are.
        """
        for index in range(len(self._serving)):
            fresh = await self._begin()
            await fresh.known.wait()
            if not fresh.listens:
                self._log("worker_ended", severity=logging.ERROR, **fresh.end)
                return
            old = self._serving[index]
            self._put(index, fresh, "told")
            old.drain(LEAVE)
            old.over.set()
        self._log("workers_renewed")

    async def _end_all(self) -> None:
        """Close the ports, let all drain at the same time, and kill those that are late."""
        for opened in (*self._ports.pages, *self._ports.management):
            opened.close()
        for worker in self._running:
            worker.drain(DRAIN)
        if lives := [worker.life for worker in self._running]:
            await asyncio.wait(lives, timeout=self._settings.drain_seconds + LATE)
            self._kill_all()
            await asyncio.wait(lives)

    def _kill_all(self) -> None:
        for worker in self._running:
            with suppress(ProcessLookupError):
                worker.process.kill()

    def _end_at_once(self) -> None:
        self._kill_all()
        shutil.rmtree(self._folder, ignore_errors=True)


def _name(number: int) -> str:
    """A signal's name; real-time signals have numbers only."""
    return next((each.name for each in signal.Signals if each == number), str(number))


# -- the worker ------------------------------------------------------------------------------------


def work() -> None:
    """A worker's whole life. Its settings are in the environment."""
    settings, arguments = load_settings(os.environ), _Arguments(**json.loads(sys.argv[1]))
    run_with_log(lambda log: _work(settings, arguments, log), settings, pid=os.getpid())


async def _work(settings: Settings, arguments: _Arguments, log: Log) -> None:
    parts = await assemble(settings, log=log)
    shared = SharedTally(Path(arguments.folder), arguments.place, parts.metrics.tally)
    channel = socket.socket(fileno=arguments.channel)
    channel.setblocking(False)

    def say(word: bytes) -> None:
        with suppress(OSError):  # the supervisor is gone, or stopped and not reading
            channel.send(word)

    word = asyncio.create_task(_hear(channel))
    told = until_told()
    pages, management = (
        [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for descriptors in (arguments.pages, arguments.management)
    )
    ports = Ports(pages, management, shared=True)
    service = await start(parts, ports=ports)
    say(LISTENS)
    beating = asyncio.create_task(_beat(arguments.hang_seconds, shared))
    looking = asyncio.create_task(tell_until_migrated(parts)) if arguments.place == 1 else None
    ends: list[asyncio.Future[Any]] = [told, word]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    say(DRAINS)
    if looking is not None:
        looking.cancel()
    if not word.done() or word.result() == LEAVE:
        await service.accept_no_more()
        await asyncio.sleep(LINGER)
    await service.close()
    beating.cancel()
    shared.publish()
    with suppress(BlockingIOError):
        if not channel.recv(1):  # the supervisor is gone
            shutil.rmtree(arguments.folder, ignore_errors=True)


async def _hear(channel: socket.socket) -> bytes:
    """The bytes that the supervisor sent; empty when the supervisor has ended."""
    with suppress(OSError):
        return await asyncio.get_running_loop().sock_recv(channel, 1)
    return b""


async def _beat(hang_seconds: float, shared: SharedTally) -> None:
    """Postpone SIGALRM, whose default ends the process also where no Python runs."""
    while True:
        signal.setitimer(signal.ITIMER_REAL, hang_seconds)
        shared.publish()
        await asyncio.sleep(min(BEAT, hang_seconds / 5))
