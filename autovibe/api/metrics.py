"""/metrics for Prometheus: text format 0.0.4, or OpenMetrics where Accept asks for it.

Counted from the database, so the same from every hub process (scrape one, or aggregate with max): machines,
checkpoints, projects, operations and their durations, the queue, budgets, the ledger. Of the process that answers, so
one scrape a process (aggregate with sum): requests, rate limits, event streams, transactions, process_*. No label holds
a uuid or anything a client sends.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterable, Iterator
from typing import Annotated

from fastapi import APIRouter, FastAPI, Header
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client import exposition as text
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Scope

from autovibe.api.guard import Guarded, needs, open_to_all
from autovibe.domain.distribution import Distribution
from autovibe.errors import AutovibeError
from autovibe.hub import Hub
from autovibe.hub.gauges import Counts, Figures, Gauges
from autovibe.types import Role
from autovibe.version import __version__

PATH = "/metrics"
_UNMATCHED = "(none)"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Meter:
    """How long answers took and how they ended, by route, as this process gave them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timed: dict[tuple[str, str, str], Distribution] = {}
        self._waited: dict[tuple[str, str, str], int] = {}
        self.rate_limited_count = 0

    def note(self, scope: Scope, status: int, seconds: float, *, is_timed: bool) -> None:
        """One answer; the time of a request that asked to be kept waiting says nothing, so it is only counted."""
        route = getattr(scope.get("route"), "path", _UNMATCHED)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        key = (method, route, f"{status // 100}xx" if status else "cut off")
        if status == 429:
            self.rate_limited_count += 1
        if is_timed:
            known = self._timed.get(key)
            if known is None:
                with self._lock:
                    known = self._timed.setdefault(key, Distribution())
            known.note(seconds)
        else:
            with self._lock:
                self._waited[key] = self._waited.get(key, 0) + 1

    def timed(self) -> dict[tuple[str, str, str], Distribution]:
        with self._lock:
            return dict(self._timed)

    def waited(self) -> dict[tuple[str, str, str], int]:
        with self._lock:
            return dict(self._waited)


def mount(app: FastAPI, hub: Hub, meter: Meter, *, is_open: bool) -> frozenset[str]:
    """Put the route into the application. Returns the paths that need no key: this one where `is_open`."""
    registry = CollectorRegistry()
    registry.register(_Figures(hub, meter))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)

    def show(accept: Annotated[str, Header()] = "") -> Response:
        if "application/openmetrics-text" in accept.lower():
            body = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
            return Response(body, media_type=openmetrics.CONTENT_TYPE_LATEST)
        return Response(text.generate_latest(registry), media_type=text.CONTENT_TYPE_PLAIN_0_0_4)

    router = APIRouter(route_class=Guarded)
    router.add_api_route(PATH, open_to_all(show) if is_open else needs(Role.viewer)(show), include_in_schema=False)
    app.include_router(router)
    return frozenset({PATH}) if is_open else frozenset()


class _Figures(Collector):
    """Asked at every scrape."""

    def __init__(self, hub: Hub, meter: Meter) -> None:
        self._hub, self._meter = hub, meter
        self._gauges = Gauges(hub.store)

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is asked at the registration

    def collect(self) -> Iterator[Metric]:
        database = "sqlite" if self._hub.store.is_sqlite else "postgresql"
        build = {"version": __version__, "python": platform.python_version(), "database": database}
        yield InfoMetricFamily("autovibe_build", "What runs here.", value=build)
        try:
            figures = self._gauges.read()
        except AutovibeError:
            yield GaugeMetricFamily("autovibe_database_up", "Whether the database answers.", value=0)
        else:
            yield GaugeMetricFamily("autovibe_database_up", "Whether the database answers.", value=1)
            yield from _of_the_rows(figures)
        yield from _of_the_api(self._meter)
        yield from self._of_the_process()

    def _of_the_process(self) -> Iterator[Metric]:
        feed, store = self._hub.events.feed, self._hub.store
        yield GaugeMetricFamily("autovibe_event_listeners", "Open event streams.", value=len(feed.listeners))
        yield CounterMetricFamily(
            "autovibe_event_listeners_dropped", "Listeners that read too slowly.", value=feed.dropped_count
        )
        yield _histogram("autovibe_event_lag_seconds", "From an event's making to its reading.", feed.lag)
        yield _histogram("autovibe_transaction_seconds", "Write transactions, from their begin to commit.", store.spans)
        yield _histogram("autovibe_transaction_wait_seconds", "Waits of a write transaction for its turn.", store.waits)


def _of_the_rows(figures: Figures) -> Iterator[Metric]:
    yield _gauge("autovibe_machines", "Machines, also those that have ended.", ("status", "type"), figures.machines)
    yield _gauge("autovibe_checkpoints", "Checkpoints.", ("type", "status"), figures.checkpoints)
    yield _gauge("autovibe_projects", "Projects.", ("status",), figures.projects)
    yield _gauge(
        "autovibe_operations", "Operations, also those that have ended.", ("kind", "status"), figures.operations
    )
    waiting: Counts = {
        (status,): sum(count for key, count in figures.operations.items() if key[1] == status)
        for status in ("accepted", "running")
    }
    yield _gauge("autovibe_queue_operations", "Operations that have not ended.", ("status",), waiting)
    yield GaugeMetricFamily(
        "autovibe_queue_oldest_accepted_seconds",
        "Age of the oldest operation that has not begun.",
        value=figures.oldest_accepted_seconds,
    )
    durations = HistogramMetricFamily(
        "autovibe_operation_duration_seconds",
        "Spawns, checkpoints and other operations, from their acceptance to their end.",
        labels=("kind", "status"),
    )
    for key, known in sorted(figures.durations.items()):
        durations.add_metric(key, *known.read())
    yield durations
    of = "of the pool and the projects today, and of machines that have not ended, in the resource's unit."
    labels = ("scope", "resource")
    yield _gauge("autovibe_budget_used", f"Used {of}", labels, figures.used)
    yield _gauge("autovibe_budget_reserved", f"Reserved {of}", labels, figures.reserved)
    yield _gauge(
        "autovibe_budget_allocated", f"Allocated {of} Accounts without a limit are left out.", labels, figures.allocated
    )
    entries = CounterMetricFamily("autovibe_ledger_entries", "Entries of the ledger.", labels=("kind",))
    for key, count in sorted(figures.entries.items()):
        entries.add_metric(key, count)
    yield entries


def _of_the_api(meter: Meter) -> Iterator[Metric]:
    labels = ("method", "route", "status")
    timed = HistogramMetricFamily(
        "autovibe_api_request_duration_seconds",
        "Answers of the API, without those of clients that asked to be kept waiting.",
        labels=labels,
    )
    for key, known in sorted(meter.timed().items()):
        timed.add_metric(key, *known.read())
    yield timed
    waited = CounterMetricFamily(
        "autovibe_api_waiting_requests", "Long polls, streams and exec, which are not timed.", labels=labels
    )
    for key, count in sorted(meter.waited().items()):
        waited.add_metric(key, count)
    yield waited
    yield CounterMetricFamily(
        "autovibe_api_rate_limited", "Requests refused because of a rate limit.", value=meter.rate_limited_count
    )


def _gauge(name: str, words: str, labels: tuple[str, ...], counts: Counts) -> Metric:
    made = GaugeMetricFamily(name, words, labels=labels)
    for key, count in sorted(counts.items()):
        made.add_metric(key, count)
    return made


def _histogram(name: str, words: str, known: Distribution) -> Metric:
    buckets, total = known.read()
    return HistogramMetricFamily(name, words, buckets=buckets, sum_value=total)
