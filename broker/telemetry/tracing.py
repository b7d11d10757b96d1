"""Distributed tracing (OpenTelemetry): a server span for each request, a client span for each wait
for a store. The parent of a request's span is the W3C Trace Context in its headers, where callers
are trusted. Otherwise the span begins a new trace, with a link to that context: a caller that
chooses the parent, or the trace's id alone, chooses whether the request is sampled.

**Cost.** This module is imported only with `BROKER_TRACES=otlp` and the extra `otel`. Without it a
store call costs a comparison with None more.

**What a span holds.** Method, route template, status, app id and request id of a request; store and
operation of a wait. Never a path, a query, a header, a body or the text of an exception, which may
quote a caller. Waits outside of a request (housekeeping, the one statement that a group commit runs
for several requests) have no span; each request's wait for that statement has.

OpenTelemetry reads its own variables: `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` and others (https://opentelemetry.io/docs/specs/otel/configuration/
sdk-environment-variables/). Spans are sent in batches by a thread of the library.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from broker import __version__

CLOSE_SECONDS = 2.0
_PROPAGATOR = TraceContextTextMapPropagator()
# https://opentelemetry.io/docs/specs/semconv/database/
_SYSTEMS = {"postgres": "postgresql", "redis": "redis"}


class Tracing:
    """Makes spans. `processor` takes the ended ones; without it they are sent by OTLP over HTTP."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        named = {"service.name": "passkey-broker", **OTELResourceDetector().detect().attributes}
        resource = Resource.create({**named, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("broker", __version__)

    @contextmanager
    def request(self, headers: Mapping[str, str], *, trusted: bool) -> Iterator[Span]:
        """The span of a request; waits for stores inside are its children. `trusted`: its caller
        may choose the parent.
        """
        parent, links = _PROPAGATOR.extract(headers), []
        if not trusted:
            given = get_current_span(parent).get_span_context()
            parent, links = Context(), [Link(given)] if given.is_valid else []
        with self._tracer.start_as_current_span(
            "request",
            context=parent,
            links=links,
            kind=SpanKind.SERVER,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def store_call(self, store: str, operation: str, seconds: float, failed: bool) -> None:
        """The span of a wait that has just ended."""
        if not get_current_span().is_recording():
            return
        now = time.time_ns()
        span = self._tracer.start_span(
            f"{store} {operation}",
            kind=SpanKind.CLIENT,
            attributes={"db.system.name": _SYSTEMS[store], "db.operation.name": operation},
            start_time=now - int(seconds * 1e9),
        )
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(now)

    async def close(self) -> None:
        """Send what is left, for `CLOSE_SECONDS` at most: a collector that is down must not delay
        the end of the process.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop has ended before
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=end, daemon=True).start()  # a pool's thread would be waited for
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await ended.wait()
