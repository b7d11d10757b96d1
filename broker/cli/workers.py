"""`broker serve --workers N`: N processes that serve one port, and a supervisor that serves
nothing.

The supervisor judges the settings, migrates, binds and starts workers: fresh processes that inherit
the listening sockets. It says once what an operator has to mend, and replaces what ends. **One
accept queue for all**: a worker takes the next connection when its event loop gets to it and no
other has clearly fewer (`broker.web.share`); when a worker is killed, connections that nobody had
accepted wait for the others. SO_REUSEPORT, a queue for each, would lose those, would let a second
service bind a port that is in use, and differs between systems.

**A socket pair joins each worker to the supervisor.** The worker says when it listens, that it
lives (once a second), and that it drains because somebody sent it SIGTERM. The supervisor says
"leave" to one and "drain" to all; its end closed without that word means that it was killed, and
the worker drains as well, so no orphan keeps the port; a thread waits for either, and ends a worker
whose event loop hangs. Workers lead sessions of their own, so that Ctrl-C reaches the supervisor
alone; a service manager may signal all of them at once, for being told twice is no second signal.

**A worker that leaves while others go on** takes no more connections, and closes idle ones a second
later: one that it had just taken gets its answer. **A worker that ends is replaced** at once; one
that ended soon after its start, and so did the one before, after a pause that doubles. Before the
service listens nothing is replaced: a worker that can't start ends it. A worker that listens and is
silent for 30 s of the supervisor's own waking time hangs, for nothing here may block that long; it
is killed. SIGHUP replaces workers one after the other, each told to drain when its successor
listens; in a terminal, where SIGHUP is the terminal's end, it ends the service.

Metrics add up in a private folder (`broker.telemetry.shared`), in memory where there is /dev/shm;
there stands as well how many connections each has.

**More workers than cores are a warning**: two on one core push each other's code and data out of
its caches and share messages to the stores between half as many callers (tests/bench/README.md),
and serve nobody sooner.

gunicorn would supervise as well, with aiohttp's worker class. But it gives one application to all
its sockets, where the two ports here differ; it knows when a worker's process runs and not when it
listens; it neither pauses in a crash loop nor adds metrics up; and its own settings, signals and
log lines would stand beside ours. circus is a daemon on ZeroMQ and tornado; honcho replaces
nothing; granian is an HTTP server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from broker.app import Ports, assemble
from broker.cli.serving import (
    LOG_HOLD,
    ServingFault,
    apply_migrations,
    cannot_listen,
    run,
    start,
    tell_until_migrated,
    until_told,
    with_parts,
)
from broker.dialects import chosen, left_out, load_settings
from broker.settings import Settings
from broker.telemetry import KEEPER, Log, Metrics, Shared, capture_library_records
from broker.web.share import Shares

BEAT = 1.0  # seconds
HANGS = 30  # beats that a worker may miss
SETTLED = 10.0  # seconds after its start from which a worker's end says nothing of the next one
LONGEST_PAUSE = 30.0  # seconds
LINGER = 1.0  # seconds from a connection to its first request, when its worker leaves
LATE = 5.0  # seconds beyond the drain limit, for closing the stores

SHARES = "shares"  # the file in the folder
_SEATS_EACH = 4  # for a worker, its successor, and some that drain still

LISTENS, LIVES, DRAINS = b"l", b".", b"d"  # what a worker says
LEAVE, DRAIN = b"l", b"d"  # what the supervisor says: you alone, or all

_ENTRY = "from broker.cli.workers import work; work()"
_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is made by mkdtemp


def pause(early: int) -> float:
    """Seconds until the next start, after so many workers in a row that ended within `SETTLED` of
    theirs.
    """
    return 0.0 if early < 2 else min(LONGEST_PAUSE, 2.0 ** (early - 2))


def supervise(
    settings: Settings, environment: Mapping[str, str], *, migrate: bool, beat: float = BEAT
) -> None:
    """Serve with `settings.workers` processes until SIGTERM or SIGINT. `environment` is theirs;
    `beat` is how often they are looked at, in seconds.

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
    folder = _private_folder()
    try:
        try:
            shares = Shares(folder / SHARES, settings.workers * _SEATS_EACH)
        except OSError as fault:
            raise _no_place(fault) from None
        asyncio.run(_Supervisor(settings, environment, ports, folder, shares, log).run(beat))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _private_folder() -> Path:
    try:
        memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        return Path(tempfile.mkdtemp(prefix="broker-workers-", dir=memory))
    except OSError as fault:
        raise _no_place(fault) from None


def _usable_cores() -> int:
    """How many cores the service may run on. A limit of its time on them (a container's quota) is
    no matter of cores.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _no_place(fault: OSError) -> ServingFault:
    return ServingFault(
        f"Workers need a folder for their metrics ({fault.strerror}); let TMPDIR name a place for it."
    )


@dataclass(frozen=True, slots=True)
class _Post:
    """What a worker is told on its command line: descriptors that it inherits, and where its
    metrics go. Nothing secret.
    """

    name: str
    pages: list[int]
    management: list[int]
    channel: int
    folder: str
    seat: int | None  # among those who share connections; None where too many drain still


class _Worker:
    """A process that serves, as the supervisor sees it."""

    def __init__(
        self, name: str, seat: int | None, process: subprocess.Popen[bytes], channel: socket.socket
    ) -> None:
        self.name = name
        self.seat = seat
        self.process = process
        self.listens = False
        self.drains = False  # by itself, or because it was told
        self.hangs = False
        self.known = asyncio.Event()  # it listens, or it ended before
        self.over = asyncio.Event()  # it takes no new connections, or it ended
        self.gone = asyncio.Event()
        self.missed = 0
        self.lived = 0.0
        self._began = time.monotonic()
        self._channel = channel
        asyncio.get_running_loop().add_reader(channel, self._hear)

    def _hear(self) -> None:
        """Take note of what it said."""
        try:
            said = self._channel.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            asyncio.get_running_loop().remove_reader(self._channel)
            return
        self.missed = 0
        if LISTENS in said:
            self.listens = True
            self.known.set()
        if DRAINS in said:
            self.drains = True
            self.over.set()

    def drain(self, word: bytes) -> None:
        """Ask it to end. One that doesn't listen yet has no requests, and its copy of the sockets
        must not stay.
        """
        self.drains = True
        with suppress(OSError):
            self._channel.send(word)
        if not self.listens:
            self.process.terminate()

    def has_ended(self) -> bool:
        """Look once; the first time it has, note how."""
        if self.process.poll() is None or self.gone.is_set():
            return False
        self._hear()
        asyncio.get_running_loop().remove_reader(self._channel)
        self._channel.close()
        self.lived = time.monotonic() - self._began
        for event in (self.known, self.over, self.gone):
            event.set()
        return True

    @property
    def cause(self) -> str:
        """Why it ended: `told`, `hung`, by a `signal`, or by itself with a `status`."""
        if self.hangs:
            return "hung"
        status = self.process.returncode
        if self.drains and not status:
            return "told"
        return "signal" if status is not None and status < 0 else "status"

    @property
    def how(self) -> dict[str, object]:
        """For the log: who it was and how it ended."""
        status = self.process.returncode or 0
        told = {"signal": _name(-status)} if status < 0 else {"status": status}
        return {"worker": self.process.pid, "cause": self.cause, **told}


class _Supervisor:
    """Keeps `settings.workers` workers, until told."""

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        ports: Ports,
        folder: Path,
        shares: Shares,
        log: Log,
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._ports = ports
        self._folder = folder
        self._log = log
        self._metrics = Metrics()
        self._shared = Shared(folder, KEEPER, self._metrics.tally)
        self._places: list[
            _Worker
        ] = []  # who serves; one that drains leaves its place to its successor
        self._running: set[_Worker] = set()
        self._begun = 0
        self._shares = shares
        self._renewal: asyncio.Task[None] | None = None

    async def run(self, beat: float) -> None:
        """Raises ServingFault: a worker can't start."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        told = until_told(self._end_at_once)
        tasks: list[asyncio.Future[None]] = [told]
        try:
            tasks.append(asyncio.create_task(self._begin_all()))
            await _first(tasks)
            if not told.done():
                tasks.append(asyncio.create_task(self._watch(beat)))
                tasks += [
                    asyncio.create_task(self._keep(place)) for place in range(len(self._places))
                ]
                if not any(map(os.isatty, (0, 1, 2))):
                    loop.add_signal_handler(signal.SIGHUP, self._begin_renewal)
                await _first([task for task in tasks if not task.done()])
            self._log("draining", seconds=self._settings.drain_seconds)
        finally:
            for task in (*tasks, self._renewal):
                if task:
                    task.cancel()
            await self._end_all()
        self._log("stopped")

    async def _begin_all(self) -> None:
        try:
            self._places = [self._begin() for _ in range(self._settings.workers)]
        except OSError as fault:
            raise ServingFault(f"Can't start a worker: {fault.strerror}.") from None
        for knows in asyncio.as_completed([worker.known.wait() for worker in self._places]):
            await knows
            for worker in self._places:
                if worker.gone.is_set() and not worker.listens:
                    status = worker.process.returncode
                    end = f"exit status {status}" if status >= 0 else _name(-status)
                    raise ServingFault(f"A worker ended before it listened ({end}).")
        pages, management = self._ports.pages, self._ports.management
        self._log(
            "listening",
            host=self._settings.host,
            port=pages[0].getsockname()[1],
            management_port=(management or pages)[0].getsockname()[1],
            metrics=self._settings.metrics_at,
            workers=len(self._places),
        )
        if len(self._places) > (cores := _usable_cores()):
            self._log(
                "workers_share_cores",
                severity=logging.WARNING,
                workers=len(self._places),
                cores=cores,
            )

    def _begin(self) -> _Worker:
        """Start a worker. Raises OSError."""
        self._begun += 1
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        post = _Post(
            name=str(self._begun),
            pages=[each.fileno() for each in self._ports.pages],
            management=[each.fileno() for each in self._ports.management],
            channel=theirs.fileno(),
            folder=str(self._folder),
            seat=self._free_seat(),
        )
        with theirs:
            try:
                process = subprocess.Popen(  # noqa: S603 - the interpreter that runs this, no shell
                    [sys.executable, "-P", "-c", _ENTRY, json.dumps(asdict(post))],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(*post.pages, *post.management, post.channel),
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        worker = _Worker(post.name, post.seat, process, ours)
        self._running.add(worker)
        return worker

    def _free_seat(self) -> int | None:
        taken = {worker.seat for worker in self._running}
        return next((seat for seat in range(self._shares.seats) if seat not in taken), None)

    def _reap(self) -> None:
        """Some child has ended."""
        for worker in [worker for worker in self._running if worker.has_ended()]:
            self._running.discard(worker)
            if worker.seat is not None:
                self._shares.vacate(worker.seat)
            self._shared.inherit(worker.name)
            if worker.listens and worker.drains and worker.cause != "told":
                self._log("worker_ended", severity=logging.WARNING, **worker.how)

    async def _keep(self, place: int) -> None:
        """Put one worker after another in a place."""
        early = 0
        while True:
            worker = self._places[place]
            await worker.over.wait()
            if self._places[place] is not worker:
                continue  # it was renewed
            if worker.drains:
                self._log("worker_drains", worker=worker.process.pid)
            else:
                early = early + 1 if worker.lived < SETTLED else 0
                wait = pause(early)
                self._log("worker_ended", severity=logging.WARNING, **worker.how, pause=wait)
                await asyncio.sleep(wait)
            while self._places[place] is worker:
                if fresh := self._try():
                    self._take(place, fresh, worker.cause)
                    await self._comes(fresh)
                else:
                    await asyncio.sleep(LONGEST_PAUSE)

    def _try(self) -> _Worker | None:
        try:
            return self._begin()
        except OSError as fault:
            self._log("worker_not_started", severity=logging.ERROR, error=fault.strerror)
            return None

    async def _comes(self, fresh: _Worker) -> bool:
        """Whether a new worker listens, as soon as that is known."""
        await fresh.known.wait()
        if fresh.listens:
            self._log("worker_listening", worker=fresh.process.pid)
        return fresh.listens

    def _take(self, place: int, fresh: _Worker, cause: str) -> None:
        """Give a place to a new worker."""
        self._places[place] = fresh
        self._metrics.worker_restarts.inc(cause)
        self._shared.publish()

    def _begin_renewal(self) -> None:
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Replace each worker, when its successor listens. One that can't start ends this, and the
        rest stay as they are.
        """
        for place in range(len(self._places)):
            fresh = self._try()
            if fresh is None:
                return
            if not await self._comes(fresh):
                self._log("worker_ended", severity=logging.ERROR, **fresh.how)
                return
            old = self._places[place]
            self._take(place, fresh, "told")
            old.drain(LEAVE)
            old.over.set()
        self._log("workers_renewed")

    async def _watch(self, beat: float) -> None:
        """Kill those that hang. Beats are counted and not seconds: while this process does not run,
        the others may not either.
        """
        while True:
            await asyncio.sleep(beat)
            for worker in self._running:
                worker.missed += worker.listens
                if worker.missed > HANGS:
                    worker.hangs = True
                    worker.process.kill()

    async def _end_all(self) -> None:
        """Close the ports, let all drain at the same time, and kill who is late."""
        for opened in (*self._ports.pages, *self._ports.management):
            opened.close()
        ending = list(self._running)
        for worker in ending:
            worker.drain(DRAIN)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds + LATE):
                for worker in ending:
                    await worker.gone.wait()
        for worker in self._running:
            worker.process.kill()
        for worker in ending:
            await worker.gone.wait()

    def _end_at_once(self) -> None:
        for worker in list(self._running):
            worker.process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _name(number: int) -> str:
    """A signal's name; real-time signals have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


async def _first(tasks: list[asyncio.Future[None]]) -> None:
    """Wait for one of them, and raise what it raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


# -- the worker ------------------------------------------------------------------------------------


def work() -> None:
    """A worker's whole life. What it is told is on its command line, its settings are in the
    environment.
    """
    post = _Post(**json.loads(sys.argv[1]))
    run(_work(load_settings(os.environ), post))


async def _work(settings: Settings, post: _Post) -> None:
    log = Log(level=settings.log_level, hold=LOG_HOLD, pid=os.getpid())
    capture_library_records(log)
    try:
        await _serve_until_told(settings, post, log)
    finally:
        log.flush()


async def _serve_until_told(settings: Settings, post: _Post, log: Log) -> None:
    parts = await assemble(settings, log=log)
    shared = Shared(Path(post.folder), post.name, parts.metrics.tally)
    parts.metrics.tally.others = shared.others
    channel = _Channel(socket.socket(fileno=post.channel), limit=settings.drain_seconds + LATE)
    told: list[asyncio.Future[Any]] = [until_told(), asyncio.create_task(channel.told.wait())]
    await asyncio.sleep(0)  # the channel is waited for
    share = Shares(Path(post.folder) / SHARES).at(post.seat) if post.seat is not None else None
    ports = Ports(_sockets(post.pages), _sockets(post.management), share)
    service = await start(parts, ports=ports)
    channel.say(LISTENS)
    beating = asyncio.create_task(_beat(channel, shared))
    looking = (
        asyncio.create_task(tell_until_migrated(parts)) if post.seat == 0 else None
    )  # one for all
    await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
    channel.say(DRAINS)
    if looking is not None:
        looking.cancel()
    if not channel.all_end.is_set():
        await service.accept_no_more()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                await channel.all_end.wait()
    await service.close()
    beating.cancel()
    shared.publish()
    if channel.orphan:
        shutil.rmtree(post.folder, ignore_errors=True)


def _sockets(descriptors: list[int]) -> list[socket.socket]:
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]


async def _beat(channel: _Channel, shared: Shared) -> None:
    while True:
        await asyncio.sleep(BEAT)
        channel.say(LIVES)
        shared.publish()


class _Channel:
    """The supervisor, as a worker sees it. `told` is set when it wants the worker to drain,
    `all_end` when all do or it is no more.
    """

    def __init__(self, channel: socket.socket, *, limit: float) -> None:
        self.told = asyncio.Event()
        self.all_end = asyncio.Event()
        self.orphan = False
        self._channel = channel
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """In a thread, so that an event loop that hangs does not keep the port when the supervisor
        is gone.
        """
        word = LEAVE
        while word == LEAVE:
            try:
                word = self._channel.recv(1)
            except OSError:
                word = b""
            self.orphan = not word
            with suppress(RuntimeError):  # the loop has ended, and with it all there is to do
                self._loop.call_soon_threadsafe(self._hear, word)
        time.sleep(
            self._limit
        )  # in a thread of its own: the loop has so long to drain, and may hang
        os._exit(1)

    def _hear(self, word: bytes) -> None:
        self.told.set()
        if word != LEAVE:
            self.all_end.set()

    def say(self, word: bytes) -> None:
        """Tell the supervisor. It may be gone, or stopped and not reading: nothing here depends on
        it.
        """
        with suppress(OSError):
            self._channel.send(word, socket.MSG_DONTWAIT)
