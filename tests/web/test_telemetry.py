"""What operators see: log lines that parse and hold no secret, metrics with bounded labels, and how
long a request may take.
"""

from __future__ import annotations

import ast
import asyncio
import contextvars
import io
import json
import logging
import platform
import re
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import web

from broker import __version__
from broker.app import application
from broker.ceremony.reasons import REASONS
from broker.durable.cache import Cache
from broker.errors import Refusal
from broker.telemetry import (
    CONTEXT,
    Context,
    Log,
    LoopLag,
    Metrics,
    Stopwatch,
    capture_library_records,
    context,
    fault,
    remaining,
)
from broker.telemetry.metrics import LAG_SECONDS
from tests.conftest import Started
from tests.support.authenticator import Authenticator
from tests.support.processes import DEADLINE
from tests.support.servers import eventually
from tests.support.stall import stalled
from tests.support.wire import Wire

BROKER = Path(__file__).parents[2] / "broker"
SECRET = "pbk_" + "s3cret" * 8


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# -- lines -----------------------------------------------------------------------------------------


def test_a_line_is_one_json_object() -> None:
    stream = io.StringIO()
    Log(stream)("listening", host="a\nb", port=8080, odd=Path("x"))
    (line,) = lines(stream)
    at = str(line.pop("at"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()) < 60
    assert line == {"level": "info", "event": "listening", "host": "a\nb", "port": 8080, "odd": "x"}


@pytest.mark.parametrize(
    ("level", "written"),
    [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")],
)
def test_levels(level: str, written: str) -> None:
    stream = io.StringIO()
    log = Log(stream, level=level)
    for severity in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log("said", severity=severity)
    assert "".join(str(line["level"])[0] for line in lines(stream)) == written


def test_a_log_nobody_reads_stops_no_request() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    Log(Gone())("request")


async def test_held_lines_come_together_in_order() -> None:
    written = asyncio.Event()

    class Stream(io.StringIO):
        def flush(self) -> None:
            written.set()

    stream = Stream()
    log = Log(stream, level="debug", hold=0.01)
    for number in range(3):
        log("request", number=number)
    assert stream.getvalue() == ""
    async with asyncio.timeout(DEADLINE):
        await written.wait()
    assert [line["number"] for line in lines(stream)] == [0, 1, 2]


async def test_a_warning_takes_along_what_is_held() -> None:
    stream = io.StringIO()
    log = Log(stream, hold=60)
    log("request")
    log("defect", severity=logging.ERROR)
    assert [line["event"] for line in lines(stream)] == ["request", "defect"]
    log("stopped")
    log.flush()
    assert [line["event"] for line in lines(stream)] == ["request", "defect", "stopped"]


async def test_no_more_is_held_than_fits() -> None:
    stream = io.StringIO()
    log = Log(stream, hold=60)
    for _ in range(300):
        log("request")
    assert len(lines(stream)) == 256


async def test_what_is_written_at_once_is_whole_lines_that_a_pipe_takes_whole() -> None:
    pieces: list[str] = []

    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    stream = Pipe()
    log = Log(stream, hold=60)
    for number in range(250):
        log("request", number=number, route="/é" * (number % 60))
    log.flush()
    assert [line["number"] for line in lines(stream)] == list(range(250))
    assert all(piece.endswith("\n") and len(piece.encode()) <= 4096 for piece in pieces)
    assert len(pieces) < 25
    log("request", route="x" * 5000)
    log.flush()
    assert lines(stream)[-1]["route"] == "x" * 5000


def test_nothing_is_held_where_no_loop_would_write_it() -> None:
    stream = io.StringIO()
    Log(stream, hold=60)("request")
    assert len(lines(stream)) == 1


# -- libraries' records ----------------------------------------------------------------------------


@pytest.fixture
def captured() -> Iterator[io.StringIO]:
    """What libraries log, as the serving process would write it."""
    root = logging.getLogger()
    handlers, level, stream = root.handlers, root.level, io.StringIO()
    capture_library_records(Log(stream))
    yield stream
    root.handlers = handlers
    root.setLevel(level)


def test_library_records_hold_nothing_that_was_known_only_then(captured: io.StringIO) -> None:
    logger = logging.getLogger("aiohttp.server")
    logger.error("Error handling request from %s", SECRET)
    logger.error(f"Unhandled notification: {SECRET}")
    logger.error(ValueError(SECRET))
    logger.error("two lines of %s\n" + SECRET, SECRET)
    try:
        raise ValueError(f"could not parse {SECRET}")
    except ValueError:
        logger.exception("Error handling request", exc_info=True)
    assert SECRET not in captured.getvalue()
    written = lines(captured)
    assert [line.get("template") for line in written] == [
        "Error handling request from %s",
        None,
        None,
        "two lines of %s",
        None,
    ]
    for line in written:
        assert (line["event"], line["level"], line["logger"]) == (
            "library",
            "error",
            "aiohttp.server",
        )
        assert re.fullmatch(r"test_telemetry\.py:\d+ test_library_records_\w+", str(line["place"]))
    assert written[-1]["error"] == "ValueError"
    assert re.search(r"test_telemetry\.py:\d+ test_library_records_", str(written[-1]["trace"]))


async def test_asyncio_reports_hold_no_arguments(captured: io.StringIO) -> None:
    def callback(_: str) -> None:
        raise ValueError(SECRET)

    loop = asyncio.get_running_loop()
    loop.call_soon(callback, SECRET)
    loop.call_exception_handler({"message": f"lost {SECRET}", "exception": ValueError(SECRET)})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert SECRET not in captured.getvalue()
    assert [(line["logger"], line["error"]) for line in lines(captured)] == [
        ("asyncio", "ValueError")
    ] * 2


def test_libraries_below_a_warning_stay_silent(captured: io.StringIO) -> None:
    logging.getLogger("asyncio").info("Using selector: %s", "x")
    assert captured.getvalue() == ""


def test_a_fault_is_its_type_and_place() -> None:
    assert fault(None) == {"error": "NoneType", "trace": ""}
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        told = fault(error)
    assert told["error"] == "KeyError"
    assert re.fullmatch(r"test_telemetry\.py:\d+ test_a_fault_is_its_type_and_place", told["trace"])


# -- metrics ---------------------------------------------------------------------------------------


def test_a_stopwatch_counts_failures_too() -> None:
    metrics = Metrics()
    with Stopwatch(metrics, "redis", "take"):
        pass
    with pytest.raises(TimeoutError), Stopwatch(metrics, "redis", "take"):
        raise TimeoutError
    labels = {"store": "redis", "operation": "take"}
    assert metrics.registry.get_sample_value("broker_store_seconds_count", labels) == 2
    assert metrics.registry.get_sample_value("broker_store_failures_total", labels) == 1


def test_two_brokers_do_not_add_up() -> None:
    one, other = Metrics(), Metrics()
    one.events_lost.inc()
    assert one.registry.get_sample_value("broker_events_lost_total") == 1
    assert other.registry.get_sample_value("broker_events_lost_total") == 0


def test_a_bucket_holds_what_is_at_most_its_bound() -> None:
    metrics = Metrics()
    for seconds in (0.0005, 0.0006, 3.0):
        metrics.store_seconds.observe(seconds, "redis", "take")
    labels = {"store": "redis", "operation": "take"}
    buckets = {
        bound: metrics.registry.get_sample_value(
            "broker_store_seconds_bucket", {**labels, "le": bound}
        )
        for bound in ("0.0005", "0.001", "2.0", "+Inf")
    }
    assert buckets == {"0.0005": 1, "0.001": 2, "2.0": 2, "+Inf": 3}
    assert metrics.registry.get_sample_value("broker_store_seconds_sum", labels) == pytest.approx(
        3.0011
    )


def _words(*modules: str) -> set[str]:
    """Every constant of these modules that could be a label's value."""
    found = set()
    for module in modules:
        for path in BROKER.glob(module):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return {word for word in found if re.fullmatch(r"[a-z][a-z0-9_]*", word)}


def _codes(kind: type[Refusal]) -> set[str]:
    own = {kind.code} if "code" in vars(kind) else set()
    return own.union(*map(_codes, kind.__subclasses__()))


def _series(broker: Started) -> set[tuple[str, str, str]]:
    """Metric, label and value of everything a scrape shows, but for histogram buckets."""
    return {
        (metric.name, label, value)
        for metric in broker.parts.metrics.registry.collect()
        for sample in metric.samples
        for label, value in sample.labels.items()
        if label != "le"
    }


async def _odd_requests(wire: Wire) -> None:
    """Requests that carry what must not become a label: ids, paths, methods, origins, nonces."""
    chance = secrets.token_hex(8)
    await wire.send("GET", f"{wire.url}/{chance}")
    await wire.send("GET", f"{wire.url}/v1/apps/{secrets.token_hex(12)}")
    await wire.send("GET", f"{wire.url}/v1/apps/{secrets.token_hex(12)}/users/{chance}")
    await wire.send("BREW", f"{wire.url}/health/live")
    await wire.keyed("GET", f"/users/{secrets.token_hex(12)}")
    await wire.keyed("GET", "/users?identifier=" + chance, key="pbk_" + secrets.token_urlsafe(32))
    await wire.keyed("POST", "/transactions/authenticate", {"external_id": chance})
    await wire.redeem("pbn_" + secrets.token_urlsafe(32))
    await wire.redeem(chance)
    await wire.keyed("POST", "/authenticate/verify", data=b"not JSON " + chance.encode())
    await wire.keyed("POST", "/authenticate/verify", data=b"{" + b" " * 70_000)
    await wire.page(
        "/authenticate/transactions/webauthn/start", {}, origin=f"https://{chance}.example"
    )
    await wire.page("/register/transactions/webauthn/start", {"transaction_id": chance})
    await wire.page("/register/transactions/webauthn/start", {chance: chance})
    await wire.send(
        "GET",
        f"{wire.url}/health/live",
        headers={"Expect": chance, "X-Request-Id": f"{chance}-mine"},
    )
    await wire.send("GET", f"{wire.url}/health/ready")
    await wire.send("GET", f"{wire.url}/metrics")


async def test_labels_are_from_fixed_sets(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    await wire.redeem(await wire.authenticate(await wire.open_authentication("ann"), device))
    nonce = await wire.authenticate(None, device)
    await wire.redeem(nonce, purpose="register")
    handle, options = await wire.begin("authenticate", None)
    answer = device.authenticate(options, "https://elsewhere.example")
    assert (await wire.finish("authenticate", handle, answer)).code == "discoverable_login_failed"
    await _odd_requests(wire)

    routes = {resource.canonical for resource in wire_routes(broker)}
    reasons = _words("**/*.py") | set(REASONS)
    allowed = {
        "kind": {"register", "authenticate", "discoverable"},
        "step": {"begin", "finish"},
        "code": _codes(Refusal),
        "reason": reasons | {f"http_{status}" for status in range(400, 500)},
        "store": {"redis", "postgres"},
        "operation": _words("ephemeral/*.py", "durable/*.py"),
        "route": routes | {"unmatched"},
        "status": {str(status) for status in range(200, 600)},
        "cache": {"apps", "keys", "signing_keys"},
        "queue": {"redis"} | _words("durable/*.py"),
        "state": {"idle", "busy"},
        "generation": {"0", "1", "2"},
        "version": {__version__},
        "python": {platform.python_version()},
    }
    results = {
        "broker_ceremonies": {"ok", "refused", "unavailable"},
        "broker_cache_lookups": {"hit", "miss"},
        "broker_redemptions": {
            "ok",
            "malformed",
            "unknown",
            "expired",
            "replayed",
            "foreign",
            "mismatch",
        },
    }
    seen = _series(broker)
    for metric, label, value in seen:
        among = results[metric] if label == "result" else allowed[label]
        assert value in among, (metric, label, value)
    assert {label for _, label, _ in seen} == {*allowed, "result"}
    for name in (
        "broker_ceremonies",
        "broker_refusals",
        "broker_redemptions",
        "broker_request_seconds",
    ):
        assert any(metric == name for metric, _, _ in seen), name


async def test_open_and_abandoned_ceremonies(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Those without a transaction: the others end with it."""
    await wire.user("ann", device)
    for _ in range(3):
        await wire.begin("authenticate", None)
    await wire.authenticate(None, device)
    assert broker.metric("broker_ceremonies_open") == 4, "of the latest begin"
    broker.clock.ahead += 301
    assert broker.metric("broker_ceremonies_open") == 0
    assert broker.metric("broker_ceremonies_abandoned_total") == 0, "not known yet"
    await wire.begin("authenticate", None)
    assert broker.metric("broker_ceremonies_open") == 1
    assert broker.metric("broker_ceremonies_abandoned_total") == 3


async def test_what_a_process_holds(broker: Started, wire: Wire) -> None:
    """Connections, requests, the pool, caches and queues, as a scrape finds them."""
    await wire.keyed("GET", "/users?identifier=ann")
    assert broker.metric("broker_cache_lookups_total", cache="keys", result="miss") == 1
    assert broker.metric("broker_connections") == 1
    assert broker.metric("broker_requests_in_flight") == 0
    limit = broker.metric("broker_postgres_connections_limit")
    assert limit == broker.parts.settings.database_connections
    async with stalled(broker, "users") as stall:
        busy = broker.metric("broker_postgres_connections", state="busy")
        asking = asyncio.create_task(wire.open_registration("ann"))
        await stall.waiting(1)
        assert broker.metric("broker_postgres_connections", state="busy") == busy + 1
        assert broker.metric("broker_requests_in_flight") == 1
    await asking
    assert broker.metric("broker_queued", queue="redis") == 0
    build = {"version": __version__, "python": platform.python_version()}
    assert broker.metric("broker_build_info", **build) == 1
    assert broker.metric("process_open_fds") > 0


def test_a_cache_reports_hits_and_misses() -> None:
    metrics, cache = Metrics(), Cache[str](1.0, lambda: 0.0)
    cache.report("apps", metrics)
    assert cache.get("a") is None
    cache.put("a", "value", 0.0)
    assert [cache.get("a"), cache.get("a")] == ["value", "value"]
    found = {
        result: metrics.registry.get_sample_value(
            "broker_cache_lookups_total", {"cache": "apps", "result": result}
        )
        for result in ("hit", "miss")
    }
    assert found == {"hit": 2, "miss": 1}


async def test_the_lag_of_the_event_loop() -> None:
    """One late timer is one observation above the time that blocked the loop."""
    lag = Metrics().loop_lag
    measured = LoopLag(lag)
    time.sleep(LAG_SECONDS + 0.1)  # noqa: ASYNC251 - blocks the loop
    await eventually(lambda: sum(lag.values[()][:-1]) >= 1, "a timer ran")
    measured.stop()
    assert lag.values[()][-1] >= 0.1


def wire_routes(broker: Started) -> list[web.AbstractResource]:
    """Every resource that the service routes to."""
    return list(application(broker.parts, management=True, browser=True).router.resources())


async def test_repeating_adds_no_series(broker: Started, wire: Wire) -> None:
    await _odd_requests(wire)
    once = _series(broker)
    for _ in range(5):
        await _odd_requests(wire)
    assert _series(broker) == once


async def test_request_lines_hold_no_secret(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    transaction = await wire.open_registration("ann-zq9w@example.org", "Ann zq9w")
    nonce = await wire.register(transaction, device)
    await wire.redeem(nonce)
    await wire.keyed("GET", "/users?identifier=ann-zq9w@example.org")
    await _odd_requests(wire)
    text = broker.stream.getvalue()
    for secret in (wire.key, transaction, nonce, "zq9w", "pbk_", "pbt_", "pbh_", "pbn_"):
        assert secret not in text
    finish = next(
        line for line in broker.log if str(line.get("route", "")).endswith("webauthn/finish")
    )
    assert finish.keys() == {
        "at", "level", "event", "method", "route", "status", "ms", "app", "request_id"
    }  # fmt: skip
    assert finish["app"] == wire.app_id
    assert finish["route"] == "/v1/apps/{app_id}/register/transactions/webauthn/finish"


# -- context ---------------------------------------------------------------------------------------


def test_a_wait_never_passes_the_deadline() -> None:
    def left(deadline: float | None, limit: float) -> float:
        CONTEXT.set(Context("r", "browser", deadline=deadline))
        return remaining(limit)

    now = time.monotonic()
    for deadline, limit, least, most in (
        (None, 0.8, 0.8, 0.8),
        (now + 100, 0.8, 0.8, 0.8),
        (now + 50, 80.0, 1.0, 50.0),
        (now - 1, 0.8, 0.0, 0.0),
    ):
        assert least <= contextvars.Context().run(left, deadline, limit) <= most
    assert contextvars.Context().run(remaining, 0.8) == 0.8


def test_nobody_acts_as_the_broker() -> None:
    assert contextvars.Context().run(context) == Context(request_id="", actor="broker")
