"""Traces: the spans of a request and of its waits for the stores, and what they never hold."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from io import StringIO

import pytest
from aiohttp import ClientSession, web
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from broker.app import Service, TracingFault, assemble, serve
from broker.cli import doctor
from broker.cli.findings import Finding
from broker.embedded import EmbeddedStores
from broker.telemetry import Log
from broker.telemetry.tracing import Tracing
from tests.conftest import settings_for
from tests.support.authenticator import Authenticator
from tests.support.processes import free_port
from tests.support.wire import Wire

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def service(
    request: pytest.FixtureRequest, stores: EmbeddedStores, spans: InMemorySpanExporter
) -> AsyncIterator[Service]:
    """A broker that traces, with a management port if asked."""
    parted = getattr(request, "param", False)
    settings = settings_for(stores, management_port=free_port() if parted else 0)
    parts = await assemble(settings, log=Log(StringIO()))
    started = await serve(parts, tracing=Tracing(SimpleSpanProcessor(spans)))
    yield started
    await started.close()


@pytest.fixture
async def traced(service: Service, session: ClientSession) -> Wire:
    """An app of a broker that traces."""
    return await Wire.open(service, session)


def trees(spans: InMemorySpanExporter) -> list[tuple[ReadableSpan, list[str]]]:
    """Each request's span with the names of its children."""
    ended = spans.get_finished_spans()
    servers = [span for span in ended if span.kind == SpanKind.SERVER]
    names = {span.context.span_id: list[str]() for span in servers}
    for span in ended:
        if span.kind != SpanKind.SERVER:
            assert span.parent is not None
            names[span.parent.span_id].append(span.name)
    return [(span, names[span.context.span_id]) for span in servers]


async def test_a_login_has_a_span_for_each_request_and_store_call(
    traced: Wire, spans: InMemorySpanExporter, device: Authenticator
) -> None:
    await traced.user("ann-zq9w", device)
    spans.clear()
    nonce = await traced.authenticate(await traced.open_authentication("ann-zq9w"), device)
    await traced.redeem(nonce)
    begun = trees(spans)
    assert [span.name for span, _ in begun] == [
        "POST /v1/apps/{app_id}/transactions/authenticate",
        "POST /v1/apps/{app_id}/authenticate/transactions/webauthn/start",
        "POST /v1/apps/{app_id}/authenticate/transactions/webauthn/finish",
        "POST /v1/apps/{app_id}/authenticate/verify",
    ]
    finish, calls = begun[2]
    assert {"redis take_pending", "redis take_transaction", "redis put_nonce"} <= set(calls)
    assert any(call.startswith("postgres ") for call in calls), "the statement of a group commit"
    assert finish.attributes is not None
    assert finish.attributes["http.response.status_code"] == 200
    assert finish.attributes["broker.app"] == traced.app_id
    text = "".join(span.to_json() for span in spans.get_finished_spans())
    for secret in ("zq9w", nonce, traced.key):
        assert secret not in text


@pytest.mark.parametrize("service", [True], indirect=True)
async def test_the_trace_of_a_caller_of_the_management_port_goes_on(
    traced: Wire, service: Service, spans: InMemorySpanExporter
) -> None:
    ready = f"http://127.0.0.1:{service.management_port}/health/ready"
    spans.clear()
    for flag in ("01", "00"):
        sent = {"traceparent": f"00-{TRACE}-{PARENT}-{flag}", "X-Request-Id": "mine-1234"}
        await traced.send("GET", ready, headers=sent)
    (span, calls), *others = trees(spans)
    assert others == [], "the caller samples the second one out"
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes is not None
    assert span.attributes["broker.request_id"] == "mine-1234"
    assert sorted(calls) == ["postgres check", "postgres one_time_mode", "redis check"]


@pytest.mark.parametrize("service", [False, True], indirect=True)
async def test_a_page_chooses_neither_its_trace_nor_what_is_sampled(
    traced: Wire, spans: InMemorySpanExporter
) -> None:
    """Its context is a link. The chosen id would pass any ratio."""
    spans.clear()
    chosen = f"{1:032x}"
    for flag in ("01", "00"):
        sent = {"traceparent": f"00-{chosen}-{PARENT}-{flag}"}
        await traced.send("GET", f"{traced.url}/health/live", headers=sent)
    made = [span for span, _ in trees(spans)]
    assert len(made) == 2
    for span in made:
        assert span.parent is None
        assert f"{span.context.trace_id:032x}" != chosen
        assert [f"{link.context.trace_id:032x}" for link in span.links] == [chosen]


async def test_a_malformed_context_and_a_refusal(traced: Wire, spans: InMemorySpanExporter) -> None:
    spans.clear()
    sent = {"traceparent": "00-zq9w", "tracestate": "zq9w=1"}
    await traced.send("PROPFIND", f"{traced.url}/zq9w?zq9w", headers=sent)
    ((span, _),) = trees(spans)
    assert (span.name, span.parent) == ("_OTHER unmatched", None)
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 404
    assert "zq9w" not in span.to_json()


async def test_spans_are_sent_by_otlp(
    stores: EmbeddedStores, session: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a collector, at the latest when the process ends."""
    received: list[bytes] = []

    async def collect(request: web.Request) -> web.Response:
        received.append(await request.read())
        return web.Response(content_type="application/x-protobuf")

    collector = web.Application()
    collector.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(collector)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{host}:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    try:
        parts = await assemble(settings_for(stores, traces="otlp"), log=Log(StringIO()))
        service = await serve(parts)
        async with session.get(f"http://127.0.0.1:{service.port}/health/live") as answer:
            assert answer.status == 200
        await service.close()
    finally:
        await runner.cleanup()
    (sent,) = received
    assert b"passkey-broker" in sent
    assert b"GET /health/live" in sent


async def test_a_collector_that_is_down_does_not_keep_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library itself tries for 10 seconds."""
    released = threading.Event()

    class Stuck(SpanProcessor):
        def shutdown(self) -> None:
            released.wait()

    monkeypatch.setattr("broker.telemetry.tracing.CLOSE_SECONDS", 0.05)
    try:
        await Tracing(Stuck()).close()
        assert not released.is_set()
    finally:
        released.set()


async def test_without_the_extra_the_start_says_what_to_install(
    stores: EmbeddedStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "broker.telemetry.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = settings_for(stores, traces="otlp")
    parts = await assemble(settings, log=Log(StringIO()))
    with pytest.raises(TracingFault, match=r"install passkey-broker\[otel\]"):
        await serve(parts)
    found = doctor.traces(settings)
    assert (found.ok, found.todo) == (
        False,
        "Install passkey-broker[otel], or unset BROKER_TRACES.",
    )


@pytest.mark.parametrize("traces", ["otlp", "off"])
def test_the_doctor_finds_the_extra(stores: EmbeddedStores, traces: str) -> None:
    assert doctor.traces(settings_for(stores, traces=traces)) == Finding("traces", True, traces)


def test_nothing_is_loaded_without_the_setting() -> None:
    """Of the broker's: redis-py imports OpenTelemetry wherever it is installed."""
    code = "import broker.app, sys; sys.exit('broker.telemetry.tracing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
