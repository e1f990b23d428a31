"""Analytics over HTTP, held against quotients made by hand."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from autovibe.domain.columns import now
from autovibe.types import MachineStatus
from tests.api.conftest import Served
from tests.api.spending import day, spend
from tests.unit.wire import money

SECOND = timedelta(seconds=1)


def ended(
    served: Served, project: UUID, ago: int, *, cost: int = 0, hours: float = 0, spawn_seconds: float = 10, **more: Any
) -> UUID:
    """A machine that ended at noon of a day, having used so much in its life."""
    end = day(ago)
    row: dict[str, Any] = {
        "status": MachineStatus.terminated,
        "prompt": "true",
        "exit_status": 0,
        "spawned_at": end - timedelta(hours=2),
        "running_at": end - timedelta(hours=2) + spawn_seconds * SECOND,
        "ended_at": end,
    }
    machine = served.machine(project, **row | more)
    spend(served, project, machine, end, money=cost, time_hours=int(hours * 1_000_000))
    return machine


@pytest.fixture
def worked(served: Served) -> UUID:
    """Day 2: two machines, one a success; day 1: a machine without a prompt; and what counts to no success."""
    uuid = served.project()
    ended(served, uuid, 2, cost=100_000, hours=0.5)
    ended(served, uuid, 2, cost=300_000, hours=1.5, exit_status=3, spawn_seconds=30)
    ended(served, uuid, 1, cost=50_000, hours=0.25, prompt=None, exit_status=None, type="other")
    ended(served, uuid, 1, cost=50_001, hours=0.75, exit_status=None)  # its prompt was cut off
    ended(served, uuid, 1, status=MachineStatus.failed, exit_status=None, running_at=None)  # never reachable
    served.machine(uuid)  # lives still
    ended(served, served.project(), 1, cost=7)  # another project's
    return uuid


def report(served: Served, project: UUID, **given: Any) -> Any:
    answer = served.get("/analytics/efficiency", project_uuid=str(project), **given)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_overall_figures(served: Served, worked: UUID) -> None:
    found = report(served, worked)
    assert found["period"] == "last_30_days"
    assert found["project_uuid"] == str(worked)
    assert found["overall"] == {
        "successful_operations": 2,
        "total_operations": 5,
        "success_rate": 0.4,
        "total_cost": money(500_001),
        "average_cost": money(100_000),  # 500 001 / 5, rounded
        "average_cost_per_success": money(250_001),  # 500 001 / 2, rounded up from the half
    }


def test_figures_by_type(served: Served, worked: UUID) -> None:
    other, shell = report(served, worked)["by_type"]
    assert other == {
        "type": "other",
        "successful_operations": 1,
        "total_operations": 1,
        "success_rate": 1.0,
        "average_cost": money(50_000),
        "average_minutes": 15.0,
        "average_spawn_seconds": pytest.approx(10, abs=0.001),
    }
    assert shell == {
        "type": "shell",
        "successful_operations": 1,
        "total_operations": 4,
        "success_rate": 0.25,
        "average_cost": money(112_500),  # 450 001 / 4
        "average_minutes": 55.0,  # (0.5 + 1.5 + 0.75) h / 3 that ran
        "average_spawn_seconds": pytest.approx(50 / 3, abs=0.001),
    }


def test_the_daily_trend(served: Served, worked: UUID) -> None:
    found = report(served, worked, period="last_7_days")
    trend = {item["date"]: item for item in found["trends"]}
    assert list(trend) == [(now().date() - timedelta(days=ago)).isoformat() for ago in range(6, -1, -1)]
    two, one, none = (trend[(now().date() - timedelta(days=ago)).isoformat()] for ago in (2, 1, 0))
    # the baseline is 100 000.2 a machine
    assert two == {
        "date": two["date"],
        "operations": 2,
        "success_rate": 0.5,
        "cost_per_operation": money(200_000),
        "efficiency_score": 0.25,  # 0.5 x 100 000.2 / 200 000
    }
    assert one == {
        "date": one["date"],
        "operations": 3,
        "success_rate": 0.3333,
        "cost_per_operation": money(33_334),  # 100 001 / 3
        "efficiency_score": 1.0,  # 1/3 x 100 000.2 / 33 333.67 = 1.00001, and 1 at most
    }
    assert none == {
        "date": none["date"],
        "operations": 0,
        "success_rate": None,
        "cost_per_operation": None,
        "efficiency_score": None,
    }


def test_a_day_that_cost_nothing_scores_its_success_rate(served: Served) -> None:
    uuid = served.project()
    ended(served, uuid, 1)
    ended(served, uuid, 1, exit_status=1)
    found = report(served, uuid, period="yesterday")
    assert found["overall"]["average_cost_per_success"] == money(0)
    assert [item["efficiency_score"] for item in found["trends"]] == [0.5]


def test_nothing_to_divide_by_is_null(served: Served) -> None:
    found = report(served, served.project(), period="today")
    assert found["overall"] == {
        "successful_operations": 0,
        "total_operations": 0,
        "success_rate": None,
        "total_cost": money(0),
        "average_cost": None,
        "average_cost_per_success": None,
    }
    assert found["by_type"] == []
    assert len(found["trends"]) == 1


def test_a_machine_belongs_to_the_utc_day_it_ended(served: Served) -> None:
    uuid = served.project()
    midnight = day(2, 0)
    for moment in (midnight - timedelta(microseconds=1), midnight, midnight + timedelta(hours=23, minutes=59)):
        served.machine(uuid, status=MachineStatus.terminated, ended_at=moment)

    def counts(since: datetime | str, until: datetime | str) -> list[int]:
        found = report(served, uuid, **{"from": str(since).replace(" ", "T"), "to": str(until).replace(" ", "T")})
        return [item["operations"] for item in found["trends"]]

    assert counts(day(3).date().isoformat(), day(1).date().isoformat()) == [1, 2, 0]
    assert counts(midnight, midnight + timedelta(hours=1)) == [1]
    assert counts(midnight - timedelta(hours=1), midnight) == [1]


def test_all_projects_are_summed_where_none_is_named(served: Served, worked: UUID) -> None:
    mine = report(served, worked)["overall"]["total_operations"]
    every = served.get("/analytics/efficiency").json()
    assert every["project_uuid"] is None
    assert every["overall"]["total_operations"] > mine
    assert every["overall"]["total_operations"] == sum(item["operations"] for item in every["trends"])
    assert every["overall"]["total_operations"] == sum(item["total_operations"] for item in every["by_type"])


def test_the_formulas_stand_in_the_description(served: Served) -> None:
    described = served.get("/openapi.json").json()["paths"]["/api/v1/analytics/efficiency"]["get"]["description"]
    for formula in ("success_rate = successful operations / operations", "efficiency_score of a day = min(1, "):
        assert formula in described
