"""/metrics: what Prometheus' own parsers read, true to the rows, with few labels; and who may ask."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text_format

from autovibe import app
from autovibe.domain import Operation
from autovibe.domain.columns import now
from autovibe.errors import DatabaseUnavailable
from autovibe.hub import gauges
from autovibe.store import Store
from autovibe.store.accounts import Holder
from autovibe.types import OperationKind, OperationStatus, Resource
from tests.api.conftest import KEY, Served, error_of, serve, settings_of

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "_KEEP_SECONDS", 0.0)


def scrape(served: Served, **headers: str) -> httpx2.Response:
    answer = httpx2.get(
        f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}", **headers}, trust_env=False, timeout=30
    )
    assert answer.status_code == 200, answer.text
    return answer


def samples(served: Served) -> Samples:
    found: Samples = {}
    for family in text_format(scrape(served).text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def ended(served: Served, kind: OperationKind, status: OperationStatus, seconds: float) -> None:
    with served.hub.store.transaction() as session:
        session.add(
            Operation(
                kind=kind,
                status=status,
                object_uuid=uuid4(),
                created_at=now() - timedelta(seconds=seconds),
                finished_at=now(),
            )
        )


def test_both_formats_are_read_by_their_parsers(served: Served) -> None:
    plain = scrape(served)
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    named = {family.name for family in text_format(plain.text)}
    assert {"autovibe_machines", "autovibe_operation_duration_seconds", "process_resident_memory_bytes"} <= named
    modern = scrape(served, Accept="application/openmetrics-text; version=1.0.0, text/plain;q=0.5")
    assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
    assert {family.name for family in openmetrics(modern.text)} >= {"autovibe_machines", "autovibe_build"}
    for odd in ("application/openmetrics-text; version=x", "text/plain; version=9;;", "*/*"):
        scrape(served, Accept=odd)


def test_a_key_is_needed(served: Served) -> None:
    answer = httpx2.get(f"{served.url}/metrics", trust_env=False)
    assert answer.status_code == 401
    error_of(answer, 401, "UNAUTHORIZED")


def test_rows_are_counted(served: Served) -> None:
    before = samples(served)
    served.machine(status="active")
    served.machine(status="terminated", type="of-another-time")
    after = samples(served)
    for labels, more in (
        ({"status": "active", "type": "shell"}, 1),
        ({"status": "terminated", "type": "other"}, 1),
    ):
        assert value(after, "autovibe_machines", **labels) == value(before, "autovibe_machines", **labels) + more
    labels = {"type": "genesis", "status": "ready"}
    assert value(after, "autovibe_checkpoints", **labels) == value(before, "autovibe_checkpoints", **labels) + 2
    assert value(after, "autovibe_projects", status="active") == value(before, "autovibe_projects", status="active") + 2
    assert value(after, "autovibe_database_up") == 1


def test_durations_are_those_of_the_rows_however_often_and_late_they_are_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, labels = "autovibe_operation_duration_seconds", {"kind": "spawn", "status": "succeeded"}
    before = samples(served)

    def more(part: str, **also: str) -> float:
        return value(samples(served), f"{name}_{part}", **labels, **also) - value(
            before, f"{name}_{part}", **labels, **also
        )

    ended(served, OperationKind.spawn, OperationStatus.succeeded, 3)
    ended(served, OperationKind.spawn, OperationStatus.succeeded, 45)
    ended(served, OperationKind.spawn, OperationStatus.failed, 45)
    assert (more("count"), more("count")) == (2, 2)
    monkeypatch.setattr(gauges, "_LATE", timedelta(0))  # now they are settled
    assert (more("count"), more("count")) == (2, 2)
    assert more("bucket", le="5.0") == 1
    assert more("bucket", le="+Inf") == 2
    assert 47.9 < more("sum") < 48.5
    ended(served, OperationKind.spawn, OperationStatus.succeeded, 3)
    assert (more("count"), more("bucket", le="5.0")) == (3, 2)


def test_nothing_is_counted_twice_when_the_clock_is_set_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    began = now() - timedelta(minutes=30)
    with store.transaction() as session:
        ended_at = {"created_at": began, "finished_at": began + timedelta(seconds=3)}
        session.add(Operation(kind=OperationKind.spawn, status="succeeded", object_uuid=uuid4(), **ended_at))
    found = gauges.Gauges(store)
    monkeypatch.setattr(gauges, "_KEEP_SECONDS", -1.0)
    for hours in (0, -1, 0):
        monkeypatch.setattr(gauges, "now", lambda hours=hours: now() + timedelta(hours=hours))
        assert found.read().durations["spawn", "succeeded"].read()[1] == pytest.approx(3)


def test_the_queue_is_seen(store: Store) -> None:
    """Without a hub, whose upkeep would begin what waits."""
    with store.transaction() as session:
        for status, hours in (("accepted", 1), ("accepted", 2), ("running", 3), ("failed", 4)):
            began = now() - timedelta(hours=hours)
            session.add(Operation(kind=OperationKind.spawn, status=status, object_uuid=uuid4(), created_at=began))
    found = gauges.Gauges(store).read()
    assert found.operations == {("spawn", "accepted"): 2, ("spawn", "running"): 1, ("spawn", "failed"): 1}
    assert 7200 <= found.oldest_accepted_seconds < 7300


def test_the_ledger_is_summed_by_scope(served: Served) -> None:
    before = samples(served)
    project = served.project(daily_money_micros=5_000_000)
    machine = served.machine(project)
    ledger, reservation = served.hub.ledger, uuid4()
    with served.hub.store.transaction() as session:
        ledger.reserve(session, reservation, Holder(project, machine), {Resource.money: 2_000_000})
        ledger.charge(session, reservation, {Resource.money: 500_000})
    after = samples(served)
    assert value(after, "autovibe_queue_operations", status="accepted") == 0

    def more(name: str, **labels: str) -> float:
        return round(value(after, name, **labels) - value(before, name, **labels), 6)

    for scope in ("project", "machine"):
        assert more("autovibe_budget_used", scope=scope, resource="money") == 0.5
        assert more("autovibe_budget_reserved", scope=scope, resource="money") == 1.5
    assert more("autovibe_budget_allocated", scope="project", resource="money") == 5
    assert more("autovibe_ledger_entries_total", kind="reserve") == 1
    assert more("autovibe_ledger_entries_total", kind="charge") == 1


def test_requests_are_timed_by_route_and_never_by_what_clients_send(served: Served) -> None:
    name = "autovibe_api_request_duration_seconds_count"
    ok = {"method": "GET", "route": "/machines/{machine_uuid}", "status": "2xx"}
    missing, unknown = {**ok, "status": "4xx"}, {"method": "GET", "route": "(none)", "status": "4xx"}
    before = samples(served)
    machine = served.machine()
    for _ in range(3):
        served.get(f"/machines/{machine}")
    served.get(f"/machines/{uuid4()}")
    served.get(f"/nowhere/{uuid4()}")
    served.http.request("BREW", "/machines")
    served.get(f"/machines/{machine}", wait=0)
    after = samples(served)
    for labels, more in ((ok, 3), (missing, 1), (unknown, 1)):
        assert value(after, name, **labels) == value(before, name, **labels) + more
    waited = "autovibe_api_waiting_requests_total"
    assert value(after, waited, **ok) == value(before, waited, **ok) + 1
    assert all(dict(labels).get("method") != "BREW" for _, labels in after)
    text = scrape(served).text
    assert str(machine) not in text


def test_a_database_that_is_away_is_told_and_the_rest_is_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> Any:
        raise DatabaseUnavailable

    monkeypatch.setattr(gauges.Gauges, "read", away)
    found = samples(served)
    assert value(found, "autovibe_database_up") == 0
    assert any(name == "autovibe_api_request_duration_seconds_count" for name, _ in found)
    assert not any(name == "autovibe_machines" for name, _ in found)


@pytest.fixture
def open_hub(home: Path) -> Iterator[str]:
    parts = app.build(settings_of(home, metrics_open=True))
    parts.start()
    url, stop = serve(parts)
    yield url
    stop()
    parts.close()
    shutil.rmtree(home / "hub", ignore_errors=True)


def test_an_open_hub_asks_for_no_key(open_hub: str) -> None:
    answer = httpx2.get(f"{open_hub}/metrics", trust_env=False)
    assert answer.status_code == 200
    assert "autovibe_machines" in answer.text
    assert httpx2.get(f"{open_hub}/api/v1/machines", trust_env=False).status_code == 401
