"""Life of a serving process: event loop, signals, graceful shutdown. And how any command gets at
the stores.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from broker.cli.findings import NEEDED, cause_of, redis_findings
from broker.errors import Fault, Unavailable
from broker.settings import Settings
from broker.telemetry import Log, capture_library_records

if (
    TYPE_CHECKING
):  # the service is imported when a command needs it: `dev` does so while its stores start
    from aiohttp import web

    from broker.app import Parts, Service

T = TypeVar("T")

LOG_HOLD = 0.05  # seconds
LOOK_SECONDS = 60.0  # between two looks at Postgres
OTHER_FILES = 64  # open files besides connections of callers and of Postgres
# Thresholds of the garbage collector: allocations, and younger collections. A request leaves hardly
# any cycles. The default (a search for each 700 objects) takes a twelfth of a login's time.
_GARBAGE = (50_000, 20, 1000)


class ServingFault(Fault):
    """The process can't listen; the sentence says why and what to do."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, or on asyncio's loop on Windows."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def run_with_log(main: Callable[[Log], Coroutine[Any, Any, None]], settings: Settings) -> None:
    """Run a serving process. Its log holds lines for `LOG_HOLD`."""
    log = Log(level=settings.log_level, hold=LOG_HOLD)
    capture_library_records(log)
    try:
        run(main(log))
    finally:
        log.flush()


async def with_parts(settings: Settings, work: Callable[[Parts], Awaitable[T]]) -> T:
    """Do `work` with the stores and the verbs, and close them. Without a Redis URL the ephemeral
    store is `Unavailable`.
    """
    if not settings.redis_url:
        settings = replace(settings, redis_url=f"unix://{os.devnull}")  # nothing ever listens there
    from broker.app import assemble

    parts = await assemble(settings)
    try:
        return await work(parts)
    finally:
        await parts.close()


async def apply_migrations(parts: Parts) -> None:
    """Apply those that are missing. Raises MigrationFault."""
    await parts.postgres.migrate(datetime.now(UTC))


async def watch_postgres(
    parts: Parts, *, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Look at Postgres now and every minute, and log why it can't be used and what to do. Runs
    until it is cancelled.
    """
    unmigrated = False
    while True:
        try:
            await parts.postgres.check()
            if unmigrated:
                parts.log("migrated")
            unmigrated = False
        except Unavailable as fault:
            if fault.reason == "postgres_not_migrated":
                unmigrated = True
                todo = (
                    "Run `broker migrate`, or start `broker serve --migrate`; "
                    "until then requests that need the database get 503."
                )
                parts.log("not_migrated", severity=logging.WARNING, todo=todo)
            else:
                parts.log(
                    "postgres_failed",
                    severity=logging.WARNING,
                    cause=cause_of(fault),
                    error=type(fault.__cause__).__name__ if fault.__cause__ else None,
                    todo="Check BROKER_DATABASE_URL and the server; requests get 503.",
                )
        await pause(LOOK_SECONDS)


async def start(
    parts: Parts,
    prepare: Callable[[int], Awaitable[Mapping[str, web.Application]]] | None = None,
) -> Service:
    """Listen on the ports of the settings.

    Raises:
        ServingFault: Redis is not fit, or an address is in use or not ours; everything opened is
            closed again.
    """
    from broker.app import serve

    settings = parts.settings
    await _judge_mode(parts)
    await _judge_redis(parts)
    if settings.unknown:
        parts.log("unknown_settings", severity=logging.WARNING, variables=settings.unknown)
    _allow_descriptors(parts)
    try:
        service = await serve(parts, prepare=prepare)
        gc.set_threshold(*_GARBAGE)
        gc.freeze()  # what was made so far stays: no collection need look at it again
        return service
    except OSError as fault:
        raise cannot_listen(settings, fault) from None


async def _judge_mode(parts: Parts) -> None:
    """Compare the mode of one-time values with the recorded one. A Postgres that does not answer
    may come later: readiness waits for it.

    Raises:
        ServingFault: another mode is recorded; the stores are closed.
    """
    mode = parts.settings.one_time
    try:
        await parts.durable.ledger.check(mode)
    except Unavailable as fault:
        if fault.reason != "postgres_one_time":
            return
        await parts.close()
        raise ServingFault(
            f"BROKER_ONE_TIME is {mode}, and Postgres records another mode. Set it as recorded, or "
            f"change the record with `broker one-time --set {mode}`, which ends logins in flight."
        ) from None


async def _judge_redis(parts: Parts) -> None:
    """Log what `broker doctor` would warn of in Redis. A Redis that does not answer may come later:
    readiness waits for it.

    Raises:
        ServingFault: one-time values would not be safe there; the stores are closed.
    """
    try:
        await parts.ephemeral.check()
    except Unavailable as fault:
        if fault.reason != "redis_term":
            return
    try:
        findings = redis_findings(await parts.ephemeral.facts(), parts.settings.one_time)
    except Unavailable:
        return
    if faults := [f for f in findings if not f.ok and f.check in NEEDED]:
        await parts.close()
        raise ServingFault(" ".join(f"Redis: {fault.found} {fault.todo}" for fault in faults))
    for finding in findings:
        if finding.todo:
            parts.log(
                "redis_setting",
                severity=logging.WARNING,
                check=finding.check,
                found=finding.found,
                todo=finding.todo,
            )


def _allow_descriptors(parts: Parts) -> None:
    """Raise the process's soft limit of open files to what its connections may need, as far as the
    hard limit goes. Connections above the limit of open files wait in the kernel, unanswered.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    from broker.web.body import SPARE_CONNECTIONS

    settings = parts.settings
    ports = 2 if settings.management_port else 1
    need = (
        ports * (settings.max_connections + SPARE_CONNECTIONS)
        + settings.database_connections
        + OTHER_FILES
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = need if hard == resource.RLIM_INFINITY else min(need, hard)
    if resource.RLIM_INFINITY != soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < need:
        parts.log("few_descriptors", severity=logging.WARNING, allowed=allowed, needed=need)


def cannot_listen(settings: Settings, fault: OSError) -> ServingFault:
    """The fault of binding an address, as a sentence."""
    ports = f"port {settings.port}" + (
        f" or {settings.management_port}" if settings.management_port else ""
    )
    if fault.errno == errno.EADDRINUSE:
        return ServingFault(
            f"{ports[0].upper()}{ports[1:]} on {settings.host} is in use; "
            "stop what uses it or choose another one."
        )
    return ServingFault(f"Can't listen on {settings.host}, {ports}: {fault.strerror or fault}.")


def reload_at_hangup(parts: Parts) -> None:
    """Read the files of secrets again at each SIGHUP. On a terminal SIGHUP ends the process, as its
    window closes.
    """
    if not os.isatty(0):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, parts.secrets.reload)


def until_told() -> asyncio.Future[signal.Signals]:
    """The first SIGTERM or SIGINT, which are handled from this call on. A second one ends the
    process at once: SIGTERM by its default, SIGINT with status 130 and not by an exception, which
    would come up in whatever runs at that moment and may be lost there.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Future[signal.Signals] = loop.create_future()

    def tell(received: signal.Signals) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        if not told.done():
            told.set_result(received)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell, number)
    return told
