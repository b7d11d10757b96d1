"""What an operator sees of a refusal: the metric, the log line, the event. Tests assert these
beside the verdict.

    with refused(broker, "transaction_not_found", "handle_unknown"):
        answer = await wire.finish("register", handle, response)

fails unless, inside the block, the metric of that code and reason rose by exactly `times` and as
many request lines name both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.conftest import Started
from tests.support.wire import Answer


def lines(broker: Started, **values: object) -> list[dict[str, Any]]:
    """The request lines of the log that have these values."""
    return [
        line
        for line in broker.log
        if line["event"] == "request" and all(line.get(k) == v for k, v in values.items())
    ]


@contextmanager
def refused(broker: Started, code: str, reason: str, *, times: int = 1) -> Iterator[None]:
    """Inside, exactly `times` requests are refused with this code for this reason, and metric and
    log say so.
    """
    metric = broker.metric("broker_refusals_total", code=code, reason=reason)
    logged = len(lines(broker, code=code, reason=reason))
    yield
    counted = broker.metric("broker_refusals_total", code=code, reason=reason) - metric
    found = len(lines(broker, code=code, reason=reason)) - logged
    assert (counted, found) == (times, times), _recent(broker)


@contextmanager
def counted(broker: Started, name: str, times: float = 1, **labels: str) -> Iterator[None]:
    """Inside, the metric rises by exactly `times`."""
    before = broker.metric(name, **labels)
    yield
    assert broker.metric(name, **labels) - before == times, (name, labels, _recent(broker))


@contextmanager
def quiet(broker: Started, name: str, **labels: str) -> Iterator[None]:
    """Inside, the metric stays as it is."""
    with counted(broker, name, 0, **labels):
        yield


def _recent(broker: Started) -> list[tuple[object, ...]]:
    return [
        (x.get("route"), x.get("status"), x.get("code"), x.get("reason")) for x in broker.log[-6:]
    ]


def same_answer(first: Answer, second: Answer) -> None:
    """Two answers that a caller can't tell apart: status, body, and names and values of headers,
    but for date and request id.
    """
    assert first.status == second.status
    assert first.body == second.body
    assert _stable(first) == _stable(second)


def _stable(answer: Answer) -> dict[str, str]:
    changing = {"date", "x-request-id"}
    headers = {k.lower(): v for k, v in answer.headers.items()}
    assert changing <= set(headers)
    return {k: v for k, v in headers.items() if k not in changing}
