"""The composition root: settings, stores, verbs, HTTP applications.

This module makes every part and hands it down through `__init__`. Handlers find the verbs under
typed keys (`web.AppKey`). A process serves everything on one port. With a management port it serves
pages on one port, and keyed callers, health and metrics on the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from broker import __version__
from broker.broker import Broker
from broker.dialects import DIALECTS, chosen, openers
from broker.directory import Directory
from broker.durable import Durable, Postgres
from broker.durable.housekeeping import Housekeeping
from broker.ephemeral import Ephemeral, connect
from broker.errors import Fault, Unavailable
from broker.mailbox import Mailbox
from broker.model import RATE_KEYS, RelyingParty
from broker.settings import Secrets, Settings
from broker.signals import Signals
from broker.signing import Signing
from broker.telemetry import Log, LoopLag, Metrics, context
from broker.tokens import Mint, SystemMint
from broker.web import (
    BROKER,
    CLIENT_ADDRESS,
    DIRECTORY,
    LIMITS,
    MAILBOX,
    METRICS,
    PUBLIC_URL,
    RATE_LIMITS,
    REFUSED_ORIGINS,
    SETTINGS,
    SIGNALS,
    SIGNING,
    ClientAddress,
    Edge,
    Limits,
    Listener,
    RefusedOrigins,
    TracedEdge,
    json_answer,
    listen,
    public,
)
from broker.web.body import MAX_BODY
from broker.web.server import bind

if TYPE_CHECKING:
    from broker.telemetry.tracing import Tracing

_SDK = Path(__file__).parent / "sdk"
_SDK_TYPES = {"passkey.js": "text/javascript", "passkey.d.ts": "application/typescript"}
# Cache-Control by folder. A file under a version never changes (RFC 8246).
_SDK_PLACES = {
    "/sdk": "public, max-age=300",
    f"/sdk/{__version__}": "public, max-age=31536000, immutable",
}


class TracingFault(Fault):
    """Traces can't be made; the sentence says what to do."""


@dataclass(slots=True)
class Parts:
    """The parts of a process: stores, verbs, log and metrics."""

    settings: Settings
    secrets: Secrets
    postgres: Postgres
    housekeeping: Housekeeping
    durable: Durable
    ephemeral: Ephemeral
    broker: Broker
    directory: Directory
    signals: Signals
    mailbox: Mailbox
    signing: Signing
    refused_origins: RefusedOrigins
    metrics: Metrics
    log: Log
    ending: bool = False  # the process serves on, and is not ready for more

    async def close(self) -> None:
        """End the background tasks, then close the connections of the stores."""
        await self.housekeeping.close()
        await self.broker.close()
        await self.ephemeral.close()
        await self.postgres.close()


async def assemble(
    settings: Settings,
    *,
    log: Log | None = None,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    mint: Mint | None = None,
) -> Parts:
    """Make the stores and the verbs. No connection is made yet, so this succeeds while a store is
    down.

    Raises:
        SettingsFault: the setting names an unknown dialect, or one that lacks a secret key.
    """
    chosen(settings)
    metrics, log, mint = Metrics(), log or Log(level=settings.log_level), mint or SystemMint()
    secrets = Secrets(settings, log)
    postgres = Postgres(
        settings.database_url,
        timeout=settings.store_timeout,
        connections=settings.database_connections,
        metrics=metrics,
        read_url=secrets.database_url,
    )
    await postgres.open()
    durable = Durable(postgres)
    ephemeral = Ephemeral(
        connect(settings.redis_url, timeout=settings.store_timeout, read_url=secrets.redis_url),
        timeout=settings.store_timeout,
        metrics=metrics,
        log=log,
        clock=clock,
        openers=openers(),
        rates={limit: getattr(settings, limit) for limit in RATE_KEYS},
        monotonic=monotonic,
        ledger=durable.ledger if settings.one_time == "postgres" else None,
    )
    directory = Directory(
        durable=durable,
        clock=clock,
        mint=mint,
        cache_seconds=settings.cache_seconds,
        monotonic=monotonic,
        metrics=metrics,
    )
    signing = Signing(
        durable.signing_keys,
        secrets.secret_key,
        clock=clock,
        mint=mint,
        cache_seconds=settings.cache_seconds,
        monotonic=monotonic,
        metrics=metrics,
    )
    return Parts(
        settings=settings,
        secrets=secrets,
        postgres=postgres,
        housekeeping=Housekeeping(
            postgres,
            retention_days=settings.event_retention_days,
            metrics=metrics,
            log=log,
            clock=clock,
        ),
        durable=durable,
        ephemeral=ephemeral,
        broker=Broker(
            ephemeral=ephemeral,
            durable=durable,
            signing=signing,
            secret_keys=secrets.secret_key,
            metrics=metrics,
            log=log,
            clock=clock,
            mint=mint,
        ),
        directory=directory,
        signals=Signals(ephemeral=ephemeral, durable=durable, clock=clock, mint=mint),
        mailbox=Mailbox(
            ephemeral=ephemeral, durable=durable, metrics=metrics, clock=clock, mint=mint
        ),
        signing=signing,
        refused_origins=RefusedOrigins(directory, metrics, _logged(log)),
        metrics=metrics,
        log=log,
    )


def _logged(log: Log) -> Callable[[RelyingParty, str], None]:
    def notify(app: RelyingParty, origin: str) -> None:
        log("origin_refused", app=app.id, origin=origin, request_id=context().request_id)

    return notify


def _warning(log: Log) -> Callable[[], None]:
    def warn() -> None:
        log(
            "proxy_not_trusted",
            severity=logging.WARNING,
            todo="Name the proxy in BROKER_TRUSTED_PROXIES: otherwise all its clients share one "
            "rate limit, and one client can use it up. Without a proxy ignore this.",
        )

    return warn


def application(
    parts: Parts,
    *,
    management: bool,
    browser: bool,
    subapps: Mapping[str, web.Application] | None = None,
    limits: Limits | None = None,
) -> web.Application:
    """The routes of one port."""
    app = web.Application(client_max_size=MAX_BODY)
    app[BROKER] = parts.broker
    app[CLIENT_ADDRESS] = ClientAddress(parts.settings.trusted_proxies, _warning(parts.log))
    app[DIRECTORY] = parts.directory
    app[SIGNALS] = parts.signals
    app[MAILBOX] = parts.mailbox
    app[METRICS] = parts.metrics
    app[RATE_LIMITS] = parts.ephemeral.rate_limits
    app[PUBLIC_URL] = parts.settings.public_url
    app[REFUSED_ORIGINS] = parts.refused_origins
    app[SETTINGS] = parts.settings
    app[SIGNING] = parts.signing
    app[LIMITS] = limits or Limits(
        connections=parts.settings.max_connections, requests=parts.settings.max_requests
    )
    for dialect in chosen(parts.settings):
        app.add_routes(dialect.load().routes(management=management, browser=browser))
    app.add_routes(_health(parts))
    if management and (not browser or parts.settings.metrics_at == "public"):
        app.router.add_get("/metrics", _metrics(parts), allow_head=False)
    if browser:
        app.add_routes(_sdk())
    for prefix, subapp in (subapps or {}).items():
        app.add_routes([web.get(path, _to(prefix)) for path in ("/", prefix.rstrip("/"))])
        app.add_subapp(prefix, subapp)
    return app


async def check_postgres(parts: Parts) -> None:
    """Raise `Unavailable` unless Postgres takes writes, has every migration, and records this
    process's mode of one-time values.
    """
    await parts.postgres.check()
    await parts.durable.ledger.check(parts.settings.one_time)


async def _faults_of_readiness(parts: Parts) -> dict[str, BaseException | None]:
    """The reasons why the process is not ready, each with its fault; none if it is."""
    checks = {"postgres": check_postgres(parts), "redis": parts.ephemeral.check()}
    results = await asyncio.gather(*checks.values(), return_exceptions=True)
    faults: dict[str, BaseException | None] = {"draining": None} if parts.ending else {}
    for name, fault in zip(checks, results, strict=True):
        if fault is not None:
            reason = fault.reason if isinstance(fault, Unavailable) else name
            faults[reason if reason.startswith(name) else name] = fault
    return faults


def _health(parts: Parts) -> list[web.RouteDef]:
    @public
    async def live(_: web.Request) -> web.StreamResponse:
        """The process runs. The answer asks no store, because a restart mends no store."""
        return json_answer({"status": "live"})

    @public
    async def ready(_: web.Request) -> web.StreamResponse:
        """The stores answer, the database has every migration, and the process goes on."""
        missing = await _faults_of_readiness(parts)
        for fault in missing.values():
            if fault is not None and not isinstance(fault, Unavailable):
                raise fault
        if missing:
            body = {
                "code": "not_ready",
                "error": f"Not ready: {', '.join(missing)}.",
                "missing": list(missing),
            }
            return json_answer(body, status=503, headers={"Retry-After": "1"})
        return json_answer({"status": "ready"})

    return [
        web.get("/health/live", live),
        web.get("/health/ready", ready),
    ]


def _metrics(parts: Parts) -> Callable[[web.Request], Any]:
    metrics = parts.metrics

    @public
    async def answer(_: web.Request) -> web.StreamResponse:
        """Prometheus' text format. The label `reason` is for operators only, so nothing in a
        request can open the route (`Settings.metrics_at`): a proxy on this machine has a loopback
        address and need not forward the client's.
        """
        reasons = await _faults_of_readiness(parts)
        metrics.ready.values = {(reason,): 0.0 for reason in reasons} or {("",): 1.0}
        return web.Response(
            body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    return answer


def _to(place: str) -> Callable[[web.Request], Any]:
    @public
    async def answer(_: web.Request) -> web.StreamResponse:
        """Redirect from the bare address, which people type."""
        raise web.HTTPFound(place)

    return answer


def _sdk() -> list[web.RouteDef]:
    def of(name: str, folder: str, caching: str) -> web.RouteDef:
        body = (_SDK / name).read_bytes()

        @public
        async def answer(_: web.Request) -> web.StreamResponse:
            """A file of the page SDK. Any page may import it."""
            return web.Response(
                body=body,
                content_type=_SDK_TYPES[name],
                charset="utf-8",
                headers={"Cache-Control": caching, "Access-Control-Allow-Origin": "*"},
            )

        return web.get(f"{folder}/{name}", answer)

    return [of(name, *place) for place in _SDK_PLACES.items() for name in _SDK_TYPES]


class Service:
    """A process that listens. `port` and `management_port` are the ports in use, also where the
    settings say 0.
    """

    def __init__(self, parts: Parts, listeners: Sequence[Listener], stack: AsyncExitStack) -> None:
        self.parts = parts
        self.port = listeners[0].ports[0]
        self.management_port = listeners[-1].ports[0]
        self._listeners = listeners
        self._stack = stack

    async def close(self) -> None:
        """Refuse new work, let running requests end (`drain_seconds` at most), then close the
        stores.
        """
        await self._stack.aclose()


async def _close_all(listeners: Sequence[Listener]) -> None:
    """Close all at once: the drain has one limit, and no port takes work while another drains."""
    await asyncio.gather(*(listener.close() for listener in listeners))


def _tracing() -> Tracing:
    try:
        from broker.telemetry.tracing import Tracing
    except ImportError:
        raise TracingFault(
            "BROKER_TRACES=otlp needs OpenTelemetry, which is not installed; "
            "install passkey-broker[otel]."
        ) from None
    return Tracing()


async def serve(
    parts: Parts,
    *,
    prepare: Callable[[int], Awaitable[Mapping[str, web.Application]]] | None = None,
    limits: Limits | None = None,
    tracing: Tracing | None = None,
) -> Service:
    """Listen on the ports of the settings. Before the first request is answered, `prepare` takes
    the port and returns further applications by path prefix. `limits` bounds slow callers.

    Raises:
        OSError: an address is in use, or not of this machine.
        TracingFault: the extra `otel` is missing.
    """
    settings = parts.settings
    wire_formats = [dialect.load() for dialect in chosen(settings)]
    stack = AsyncExitStack()
    stack.push_async_callback(parts.close)
    stack.callback(LoopLag(parts.metrics.loop_lag).stop)
    parts.housekeeping.start()
    try:
        if settings.traces == "otlp":
            tracing = tracing or _tracing()
        if tracing is not None:
            parts.metrics.trace = tracing.store_call
            stack.push_async_callback(tracing.close)
        numbers = [settings.port, *filter(None, [settings.management_port])]
        opened = []
        for number in numbers:
            opened.append(bind(settings.host, number))
            for listening in opened[-1]:
                stack.enter_context(listening)
        extra = await prepare(opened[0][0].getsockname()[1]) if prepare else {}
        if settings.management_port:
            pages = application(parts, management=False, browser=True, subapps=extra, limits=limits)
            keyed = application(parts, management=True, browser=False, limits=limits)
            apps = [pages, keyed]
        else:
            apps = [application(parts, management=True, browser=True, subapps=extra, limits=limits)]
        listeners: list[Listener] = []
        stack.push_async_callback(_close_all, listeners)
        for sockets, app in zip(opened, apps, strict=True):
            edge_of: Callable[..., Edge] = Edge
            if tracing is not None:  # pages reach the first port
                edge_of = partial(TracedEdge, tracing, trusts_callers=sockets is not opened[0])
            edge = edge_of(
                app,
                renderers=[(found.PATHS, found.render) for found in wire_formats],
                default=DIALECTS[0].load().render,
                metrics=parts.metrics,
                log=parts.log,
                docs_url=settings.docs_url,
            )
            listener = await listen(
                app,
                sockets,
                edge=edge,
                drain_seconds=settings.drain_seconds,
                proxy_protocol=settings.proxy_protocol and sockets is opened[0],
            )
            listeners.append(listener)
            parts.metrics.connections.add(listener.count_connections)
    except BaseException:
        await stack.aclose()
        raise
    return Service(parts, listeners, stack)
