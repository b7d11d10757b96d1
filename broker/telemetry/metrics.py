"""Prometheus metrics: counters, histograms and gauges. Labels are bounded: kinds, results, refusal
codes, stores, route templates; never an app, a user or an origin.

Counters and histograms are plain lists. prometheus_client's own take a lock, look children up under
a lock and walk the buckets: 2 to 4 microseconds an observation, and a login has about twenty. All
observations run on one event loop, so no lock is needed, and a binary search finds the bucket. The
library still writes the text, and reads the figures of the process and of the garbage collector:
`Tally` is a collector. Gauges are read at the scrape (`Readings`), so they cost a request nothing.
"""

from __future__ import annotations

import asyncio
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker import __version__

_ASIDE = 256
Values = dict[tuple[str, ...], list[float]]


class Counts:
    """Counter, by labels."""

    def __init__(self, name: str, help_: str, *labels: str) -> None:
        self.name, self._help, self._labels = name, help_, labels
        self.values: Values = {} if labels else {(): [0.0]}

    def inc(self, *labels: str) -> None:
        """Add 1. `labels` are in the order of the metric's label names."""
        self.add(1.0, *labels)

    def add(self, number: float, *labels: str) -> None:
        """Add `number`."""
        found = self.values.get(labels)
        if found is None:
            self.values[labels] = [number]
        else:
            found[0] += number

    def family(self) -> Metric:
        """The values in Prometheus' form."""
        family = CounterMetricFamily(self.name, self._help, labels=self._labels)
        for labels, (number,) in self.values.items():
            family.add_metric(labels, number)
        return family


class Times:
    """Histogram, by labels: a count for each bucket and for values above the last bound, then the
    sum.

    Observations are buffered, and sorted into the buckets by the hundred: a batch costs a fraction
    of single insertions.
    """

    def __init__(self, name: str, help_: str, *labels: str, buckets: tuple[float, ...]) -> None:
        self.name, self._help, self._labels, self._buckets = name, help_, labels, buckets
        self._empty = [0.0] * (len(buckets) + 2)
        self._sorted: Values = {} if labels else {(): self._empty.copy()}
        self._aside: list[tuple[float, tuple[str, ...]]] = []

    def observe(self, value: float, *labels: str) -> None:
        """Observe a value. A bucket counts values up to its bound, inclusive."""
        self._aside.append((value, labels))
        if len(self._aside) >= _ASIDE:
            self._sort_in()

    def _sort_in(self) -> None:
        for value, labels in self._aside:
            found = self._sorted.get(labels)
            if found is None:
                found = self._sorted[labels] = self._empty.copy()
            found[bisect_left(self._buckets, value)] += 1.0
            found[-1] += value
        self._aside.clear()

    @property
    def values(self) -> Values:
        """The counts of all observations."""
        self._sort_in()
        return self._sorted

    def family(self) -> Metric:
        """The values in Prometheus' form: cumulative buckets."""
        family = HistogramMetricFamily(self.name, self._help, labels=self._labels)
        bounds = [*map(str, self._buckets), "+Inf"]
        for labels, numbers in self.values.items():
            family.add_metric(
                labels, list(zip(bounds, accumulate(numbers[:-1]), strict=True)), numbers[-1]
            )
        return family


class Readings:
    """Gauges, or counters, whose values parts of the broker hold and a scrape reads. Readings with
    the same labels add up.
    """

    def __init__(
        self,
        name: str,
        help_: str,
        *labels: str,
        family: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily,
    ) -> None:
        self._name, self._help, self._labels, self._family = name, help_, labels, family
        self._sources: list[tuple[tuple[str, ...], Callable[[], float]]] = []

    def add(self, read: Callable[[], float], *labels: str) -> None:
        """Read one more figure at each scrape."""
        self._sources.append((labels, read))

    def family(self) -> Metric:
        """The values in Prometheus' form."""
        sums: dict[tuple[str, ...], float] = {} if self._labels else {(): 0.0}
        for labels, read in self._sources:
            sums[labels] = sums.get(labels, 0.0) + read()
        family = self._family(self._name, self._help, labels=self._labels)
        for labels, number in sums.items():
            family.add_metric(labels, number)
        return family


class Gauges:
    """Gauge, by labels, whose values are set together: labels that are left out end."""

    def __init__(self, name: str, help_: str, *labels: str) -> None:
        self._name, self._help, self._labels = name, help_, labels
        self.values: dict[tuple[str, ...], float] = {}

    def family(self) -> Metric:
        """The values in Prometheus' form."""
        family = GaugeMetricFamily(self._name, self._help, labels=self._labels)
        for labels, number in self.values.items():
            family.add_metric(labels, number)
        return family


class LoopLag:
    """Measures how late the event loop runs its timers: every `LAG_SECONDS`."""

    def __init__(self, lag: Times) -> None:
        self._lag = lag
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._schedule()

    def _schedule(self) -> None:
        self._due = self._loop.time() + LAG_SECONDS
        self._timer = self._loop.call_at(self._due, self._observe)

    def _observe(self) -> None:
        self._lag.observe(max(0.0, self._loop.time() - self._due))
        self._schedule()

    def stop(self) -> None:
        """Measure no more."""
        self._timer.cancel()


class Tally(Collector):
    """The figures of this process."""

    def __init__(self, metrics: Sequence[Counts | Times | Readings | Gauges]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Every metric, including those without an observation."""
        return [metric.family() for metric in self._metrics]


LAG_SECONDS = 0.25
_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


class Metrics:
    """All metrics, in a registry of their own, so that two brokers in one process (as in tests) do
    not add up.
    """

    def __init__(self) -> None:
        # Makes a span of a wait for a store: store, operation, seconds, whether it failed.
        self.trace: Callable[[str, str, float, bool], None] | None = None
        self.ceremonies = Counts(
            "broker_ceremonies", "Steps of ceremonies.", "kind", "step", "result"
        )
        self.refusals = Counts("broker_refusals", "Refused requests.", "code", "reason")
        self.redemptions = Counts("broker_redemptions", "Redemptions of nonces.", "result")
        self.redemption_age = Times(
            "broker_redemption_age_fraction",
            "Age of a nonce at its redemption, as a fraction of its life.",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0),
        )
        self.mail_codes = Counts(
            "broker_mail_codes", "Mail codes: made, judged, refused.", "result"
        )
        self.store_seconds = Times(
            "broker_store_seconds", "Time a store took.", "store", "operation", buckets=_STEPS
        )
        self.store_failures = Counts(
            "broker_store_failures", "Failures of a store.", "store", "operation"
        )
        self.redis_failures = Counts("broker_redis_failures", "Failed commands to Redis.", "cause")
        self.redis_term_changes = Readings(
            "broker_redis_term_changes",
            "Terms of Redis that differ from the last one known.",
            family=CounterMetricFamily,
        )
        self.requests = Times(
            "broker_request_seconds", "Time of a request.", "route", "status", buckets=_STEPS
        )
        self.events_lost = Counts(
            "broker_events_lost", "Events of refusals that could not be written."
        )
        self.housekeeping_rows = Counts(
            "broker_housekeeping_rows", "Rows that the periodic clean-up deleted.", "chore"
        )
        self.housekeeping_failures = Counts(
            "broker_housekeeping_failures", "Batches of the periodic clean-up that failed.", "chore"
        )
        self.ceremonies_open = Readings(
            "broker_ceremonies_open",
            "Open ceremonies without a transaction, as Redis counted at the latest begin of each "
            "app.",
        )
        self.ceremonies_abandoned = Counts(
            "broker_ceremonies_abandoned", "Ceremonies without a transaction that ended unfinished."
        )
        self.cache_lookups = Readings(
            "broker_cache_lookups",
            "Look-ups in a cache.",
            "cache",
            "result",
            family=CounterMetricFamily,
        )
        self.postgres_connections = Readings(
            "broker_postgres_connections", "Connections of the pool.", "state"
        )
        self.postgres_connections_limit = Readings(
            "broker_postgres_connections_limit", "Connections that the pool may have."
        )
        self.queued = Readings(
            "broker_queued",
            "Commands and rows that wait for a store's answer or the next batch.",
            "queue",
        )
        self.connections = Readings("broker_connections", "Connections of callers.")
        self.requests_in_flight = Readings("broker_requests_in_flight", "Requests in flight.")
        self.loop_lag = Times(
            "broker_loop_lag_seconds", "How late the event loop runs a timer.", buckets=_STEPS
        )
        self.ready = Gauges(
            "broker_ready", "1 if the process is ready, else 0 for each reason.", "reason"
        )
        self.build_info = Readings(
            "broker_build_info", "1, with the release and Python's version.", "version", "python"
        )
        self.build_info.add(lambda: 1.0, __version__, platform.python_version())
        self.tally = Tally(
            [m for m in vars(self).values() if isinstance(m, Counts | Times | Readings | Gauges)]
        )
        self.registry = CollectorRegistry()
        self.registry.register(self.tally)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
