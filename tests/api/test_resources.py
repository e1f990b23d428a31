"""Resources over HTTP, held against sums made by hand: the Hub's day, a project's days, its ledger, its budget."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlmodel import col, func, select

from autovibe import app
from autovibe.domain import Checkpoint, Event, LedgerEntry, Project
from autovibe.domain.columns import now
from autovibe.store.ledger import Holder
from autovibe.types import CheckpointStatus, CheckpointType, MachineStatus, Resource
from tests.api.conftest import Served, error_of, settings_of
from tests.api.spending import DAY, day, pool, reserve, spend
from tests.unit.wire import money


def test_the_overview_shows_the_day_of_the_hub(served: Served) -> None:
    with pool(served, 10, 48, 1000):
        before = served.get("/resources/overview").json()
        rich, poor = served.project(greediness=0.5), served.project(greediness=0.1)
        idle = served.project(greediness=0.1)
        machine = served.machine(rich)
        spend(served, rich, machine, money=3_000_000, time_hours=6_000_000, cpu_hours=2_500_000)
        spend(served, poor, money=1_000_000, api_calls=50_000_000)
        reserve(served, rich, machine, money=500_000)
        found = served.get("/resources/overview").json()
    assert before["resource_usage_today"]["money"]["used"] == money(0), "this test runs first"
    assert found["date"] == now().date().isoformat()
    assert found["resource_usage_today"]["money"] == {
        "allocated": money(10_000_000),
        "used": money(4_000_000),
        "reserved": money(500_000),
        "remaining": money(5_500_000),
    }
    assert found["resource_usage_today"]["time_hours"] == {
        "allocated": 48.0,
        "used": 6.0,
        "reserved": 0.0,
        "remaining": 42.0,
    }
    assert found["resource_usage_today"]["cpu_hours"]["used"] == 2.5
    assert found["utilization_percent"] == {"money": 40.0, "time": 12.5, "api_calls": 5.0, "compute": None}
    assert found["active_machine_count"] == before["active_machine_count"] + 1
    assert found["project_count"] == before["project_count"] + 3
    assert found["active_project_count"] == 3
    assert [item["project_uuid"] for item in found["top_consumers"]] == [str(rich), str(poor)]
    top = found["top_consumers"][0]
    assert (top["money"], top["time_hours"], top["api_calls"], top["cpu_hours"]) == (money(3_000_000), 6.0, 0, 2.5)
    assert (top["share_percent"], top["active_machine_count"], top["greediness"]) == (75.0, 1, 0.5)
    assert str(idle) not in str(found["top_consumers"])


def test_only_ten_consumers_are_named_those_with_most_money_first(served: Served) -> None:
    made = [served.project() for _ in range(12)]
    for number, uuid in enumerate(made):
        spend(served, uuid, money=100_000_000 + number)
    found = served.get("/resources/overview").json()["top_consumers"]
    assert [item["project_uuid"] for item in found] == [str(uuid) for uuid in reversed(made[2:])]


# A project in a period


@pytest.fixture
def worked(served: Served) -> UUID:
    """Used something today, yesterday and three days ago; three machines, two of which have ended; two checkpoints."""
    uuid = served.project()
    ended: dict[str, Any] = {"status": MachineStatus.terminated}
    one = served.machine(uuid, spawned_at=day(4), running_at=day(4), ended_at=day(3), **ended)
    two = served.machine(uuid, spawned_at=day(3), running_at=day(3), ended_at=day(1), **ended)
    served.machine(uuid, spawned_at=day(1))
    spend(served, uuid, one, day(3), money=1_000_001, time_hours=1_500_000, api_calls=10_000_000)
    spend(served, uuid, two, day(1), money=500_000, time_hours=500_000, cpu_hours=250_000)
    spend(served, uuid, money=4, api_calls=5_000_000)
    with served.hub.store.transaction() as session:
        for made in (day(3), day(1)):
            session.add(
                Checkpoint(
                    project_uuid=uuid,
                    type=CheckpointType.manual,
                    status=CheckpointStatus.ready,
                    created_at=made,
                )
            )
    return uuid


def test_a_projects_use_is_told_in_all_and_by_day(served: Served, worked: UUID) -> None:
    found = served.get(f"/resources/projects/{worked}").json()
    assert found["period"] == "last_7_days"
    assert found["total_usage"] == {"money": money(1_500_005), "time_hours": 2.0, "api_calls": 15, "cpu_hours": 0.25}
    days = {item["date"]: item for item in found["daily_breakdown"]}
    assert list(days) == [(now().date() - timedelta(days=ago)).isoformat() for ago in range(6, -1, -1)]
    by_ago = [days[(now().date() - timedelta(days=ago)).isoformat()] for ago in range(7)]
    assert [item["money"]["micros"] for item in by_ago] == [4, 500_000, 0, 1_000_001, 0, 0, 0]
    assert [item["api_calls"] for item in by_ago] == [5, 0, 0, 10, 0, 0, 0]
    assert [item["time_hours"] for item in by_ago] == [0.0, 0.5, 0.0, 1.5, 0.0, 0.0, 0.0]
    assert [item["active_machine_count"] for item in by_ago] == [1, 2, 1, 2, 1, 0, 0]
    assert found["efficiency"] == {
        "cost_per_checkpoint": money(750_003),  # 1 500 005 / 2, rounded
        "api_calls_per_operation": 7.5,
        "average_machine_runtime_minutes": 60.0,  # (1.5 h + 0.5 h) / 2
        "checkpoint_count": 2,
        "operation_count": 2,
    }
    total = sum(item["money"]["micros"] for item in found["daily_breakdown"])
    assert total == found["total_usage"]["money"]["micros"]


@pytest.mark.parametrize(
    ("period", "days", "micros"),
    [
        ("today", 1, 4),
        ("yesterday", 1, 500_000),
        ("last_7_days", 7, 1_500_005),
        ("last_30_days", 30, 1_500_005),
        ("last_90_days", 90, 1_500_005),
        ("this_month", now().day, None),
    ],
)
def test_periods_are_utc_days(served: Served, worked: UUID, period: str, days: int, micros: int | None) -> None:
    found = served.get(f"/resources/projects/{worked}", period=period).json()
    assert found["period"] == period
    assert len(found["daily_breakdown"]) == days
    assert micros is None or found["total_usage"]["money"]["micros"] == micros


def test_a_day_that_is_cut_counts_what_was_used_within(served: Served) -> None:
    uuid = served.project()
    for hour, micros in ((6, 1), (12, 10), (18, 100)):
        spend(served, uuid, moment=day(2, hour), money=micros)
    spend(served, uuid, moment=day(1, 0), money=1000)
    begin, end = day(2, 12), day(1, 0)

    def used(since: datetime | str, until: datetime | str) -> list[int]:
        given = [text if isinstance(text, str) else text.isoformat() for text in (since, until)]
        found = served.get(f"/resources/projects/{uuid}", **{"from": given[0], "to": given[1]})
        assert found.status_code == 200, found.text
        assert found.json()["period"] is None
        return [item["money"]["micros"] for item in found.json()["daily_breakdown"]]

    assert used(begin, end) == [110]
    assert used(day(2, 0), begin) == [1]
    assert used(begin, end + timedelta(hours=1)) == [110, 1000]
    assert used(day(2).date().isoformat(), day(1).date().isoformat()) == [111, 1000]
    assert used(day(2).date().isoformat(), day(2).date().isoformat()) == [111]
    spend(served, uuid, moment=now() - timedelta(hours=1), money=5)
    spend(served, uuid, moment=now() - timedelta(hours=25), money=7)
    found = served.get(f"/resources/projects/{uuid}", period="last_24_hours").json()
    is_within = day(1, 0) > now() - DAY
    assert found["total_usage"]["money"]["micros"] == (1005 if is_within else 5)


def test_what_was_never_used_is_zero_and_null(served: Served) -> None:
    found = served.get(f"/resources/projects/{served.project()}", period="today").json()
    assert found["total_usage"] == {"money": money(0), "time_hours": 0.0, "api_calls": 0, "cpu_hours": 0.0}
    assert found["efficiency"] == {
        "cost_per_checkpoint": None,
        "api_calls_per_operation": None,
        "average_machine_runtime_minutes": None,
        "checkpoint_count": 0,
        "operation_count": 0,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"period": "last_week"}, "last_7_days"),
        ({"period": "today", "from": "2026-11-01"}, "either"),
        ({"to": "2026-11-01"}, "'from'"),
        ({"from": "2026-11-02", "to": "2026-11-01"}, "before"),
        ({"from": "2026-11-02T00:00:00Z", "to": "2026-11-02T00:00:00Z"}, "before"),
        ({"from": "2024-01-01", "to": "2026-01-01"}, "366"),
        ({"from": "0001-01-01"}, "366"),
        ({"from": "yesterday"}, "date"),
        ({"from": "2026-02-30"}, "date"),
        ({"from": "2026-11-01T25:00:00Z"}, "date"),
        ({"from": "2026-11-01T00:00:00"}, "offset"),
        ({"from": "2026-11-01", "to": "9999-12-31"}, "date"),
        ({"from": "1"}, "date"),
    ],
)
def test_a_wrong_period_is_refused(served: Served, given: dict[str, str], words: str) -> None:
    for path in (f"/resources/projects/{served.project()}", "/analytics/efficiency"):
        assert words in error_of(served.get(path, **given), 400, "INVALID_REQUEST").message


def test_a_moment_may_have_any_offset_also_one_not_escaped(served: Served) -> None:
    path = f"/resources/projects/{served.project()}"
    for text in ("2026-11-01T02:00:00+02:00", "2026-11-01T00:00:00z", "2026-11-01 00:00:00Z"):
        found = served.get(path, **{"from": text, "to": "2026-11-01"}).json()
        assert (found["since"], found["until"]) == ("2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z")
    raw = served.http.get(f"{path}?from=2026-11-01T02:00:00+02:00&to=2026-11-01").json()
    assert raw["since"] == "2026-11-01T00:00:00Z"


def test_an_unknown_project_is_a_404_everywhere(served: Served) -> None:
    unknown = uuid4()
    error_of(served.get(f"/resources/projects/{unknown}"), 404, "NOT_FOUND")
    error_of(served.get(f"/resources/projects/{unknown}/ledger"), 404, "NOT_FOUND")
    error_of(served.http.put(f"/resources/projects/{unknown}/budget", json={}), 404, "NOT_FOUND")
    error_of(served.get("/analytics/efficiency", project_uuid=str(unknown)), 404, "NOT_FOUND")
    error_of(served.get("/resources/projects/7"), 400, "INVALID_REQUEST")


# The budget


def test_a_budget_holds_from_now_on_and_null_removes_it(served: Served) -> None:
    uuid = served.project()
    held = reserve(served, uuid, money=900_000)
    path = f"/resources/projects/{uuid}/budget"
    answer = served.http.put(path, json={"daily_money": 1, "daily_api_calls": 10, "max_concurrent_machines": 2})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["resource_budgets"] == {
        "daily_money": money(1_000_000),
        "daily_time_hours": None,
        "daily_api_calls": 10,
        "storage_gb": None,
        "max_concurrent_machines": 2,
    }
    assert found["resource_usage_today"]["money"]["remaining"] == money(100_000)
    found = served.http.put(path, json={"daily_money": {"amount": "0.5"}}).json()
    assert found["resource_usage_today"]["money"] == {
        "allocated": money(900_000),  # what is held stays allocated
        "used": money(0),
        "reserved": money(900_000),
        "remaining": money(0),
    }
    with served.hub.store.transaction() as session:
        served.hub.ledger.release(session, held)
    found = served.get(f"/projects/{uuid}").json()
    assert found["resource_usage_today"]["money"]["allocated"] == money(500_000)
    found = served.http.put(path, json={"daily_money": None, "storage_gb": 2, "daily_time_hours": 1.5}).json()
    assert found["resource_usage_today"]["money"]["allocated"] is None
    assert (found["resource_budgets"]["daily_api_calls"], found["resource_budgets"]["storage_gb"]) == (10, 2.0)
    with served.hub.store.reading() as session:
        kinds = session.exec(select(Event.kind, Event.body).where(Event.object_uuid == uuid)).all()
    assert [kind for kind, _ in kinds if kind == "budget.updated"] == ["budget.updated"] * 3
    for bad in ({"daily_money": "much"}, {"daily_cents": 1}, {"daily_api_calls": -1}, {"max_concurrent_machines": "x"}):
        error_of(served.http.put(path, json=bad), 400, "INVALID_REQUEST")


# The ledger


def test_every_entry_is_listed_and_charges_come_to_what_was_used(served: Served) -> None:
    uuid = served.project()
    one, two = served.machine(uuid, name=f"one-{uuid4().hex[:6]}"), served.machine(uuid)
    spend(served, uuid, one, day(1), money=123_456, time_hours=1, note="VM time")
    spend(served, uuid, two, money=34, api_calls=2_000_000, note="reported")
    held = reserve(served, uuid, one, money=7)
    with served.hub.store.transaction() as session:
        served.hub.ledger.release(session, held, note="not needed")
    path = f"/resources/projects/{uuid}/ledger"
    page = served.get(path, limit=3).json()
    assert (page["total_count"], page["has_more"], page["next_offset"]) == (10, True, 3)
    assert page["charged"] == {"money": money(123_490), "time_hours": 1e-06, "api_calls": 2, "cpu_hours": 0.0}
    every = served.get(path, limit=200).json()["entries"]
    assert len(every) == 10
    assert [item["date"] for item in every] == sorted((item["date"] for item in every), reverse=True)
    newest = every[0]
    assert (newest["kind"], newest["resource"], newest["micros"]) == ("release", "money", 7)
    assert (newest["amount"], newest["unit"], newest["note"]) == ("0.000007", "USD", "not needed")
    oldest = next(item for item in every if item["kind"] == "charge" and item["micros"] == 123_456)
    assert oldest["amount"] == "0.123456"
    assert oldest["machine_uuid"] == str(one)
    assert oldest["machine_name"].startswith("one-")
    charged = sum(item["micros"] for item in every if item["kind"] == "charge" and item["resource"] == "money")
    assert charged == page["charged"]["money"]["micros"] == 123_490
    of_two = served.get(path, machine_uuid=str(two), kind="charge").json()
    assert {(item["resource"], item["micros"]) for item in of_two["entries"]} == {
        ("money", 34),
        ("api_calls", 2_000_000),
    }
    yesterday = served.get(path, day=day(1).date().isoformat(), resource="money").json()
    assert [item["kind"] for item in yesterday["entries"]] == ["charge", "reserve"]
    assert yesterday["charged"]["money"] == money(123_456)
    assert yesterday["charged"]["time_hours"] == 0
    assert served.get(path, day="2020-01-01").json()["entries"] == []
    for bad in ({"kind": "gift"}, {"day": "then"}, {"machine_uuid": "x"}, {"resource": "luck"}, {"limit": 0}):
        error_of(served.get(path, **bad), 400, "INVALID_REQUEST")


def test_reports_and_ledger_agree_to_the_last_millionth(served: Served) -> None:
    uuid = served.project()
    for number in range(1, 40):
        spend(served, uuid, moment=day(number % 5), money=number * 333_333 + 1)
    found = served.get(f"/resources/projects/{uuid}", period="last_7_days").json()
    with served.hub.store.reading() as session:
        total: Any = select(func.sum(LedgerEntry.amount_micros)).where(
            LedgerEntry.project_uuid == uuid, col(LedgerEntry.kind) == "charge"
        )
        charged = int(session.exec(total).one())
    assert found["total_usage"]["money"]["micros"] == charged == sum(n * 333_333 + 1 for n in range(1, 40))
    listed = served.get(f"/resources/projects/{uuid}/ledger").json()
    assert listed["charged"]["money"]["micros"] == charged
    assert date.fromisoformat(found["daily_breakdown"][-1]["date"]) == now().date()


def test_another_pool_in_the_settings_holds_from_the_next_start(home: Path) -> None:
    def standing(pool_daily_money: float) -> tuple[int | None, int | None]:
        parts = app.build(settings_of(home, pool_daily_money=pool_daily_money))
        try:
            with parts.hub.store.transaction() as session:
                project = session.exec(select(Project).where(Project.name == "kept")).first()
                if project is None:
                    project = Project(name="kept", greediness=0.5)
                    session.add(project)
                    session.flush()
                    parts.hub.ledger.reserve(session, uuid4(), Holder(project.uuid), {Resource.money: 1_500_000})
            with parts.hub.store.reading() as session:
                account = parts.hub.ledger.standing(session, project)[Resource.money]
                return account.limit_micros, account.allocated_micros
        finally:
            parts.close()

    assert standing(10.0) == (5_000_000, 5_000_000)
    assert standing(4.0) == (2_000_000, 2_000_000)
    assert standing(2.0) == (1_000_000, 1_500_000)
