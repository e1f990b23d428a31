"""What a person sees of projects, budgets, the ledger and analytics; and what the words send."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from autovibe.cli import amounts, app
from tests.unit import wire as wires
from tests.unit.wire import NOW, Row, Wire, money

Run = Callable[..., Result]
SPENT: Row = {"money": money(123_456), "time_hours": 1.5, "api_calls": 1234, "cpu_hours": 0.25}
TODAY: Row = {
    "money": {
        "allocated": money(1_260_000),
        "used": money(420_000),
        "reserved": money(8_200),
        "remaining": money(831_800),
    },
    "time_hours": {"allocated": 10.08, "used": 3.5, "reserved": 0.05, "remaining": 6.53},
    "api_calls": {"allocated": None, "used": 1234, "reserved": 0, "remaining": None},
    "cpu_hours": {"used": 0.001},
}
LIMITS: Row = {
    "money": {"explicit": money(2_000_000), "share": money(1_260_000), "effective": money(1_260_000)},
    "time_hours": {"share": 10.08, "effective": 10.08},
    "api_calls": {},
}


@pytest.fixture
def wire() -> Iterator[Wire]:
    with wires.serving() as made:
        yield made


@pytest.fixture
def run(wire: Wire, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("AUTOVIBE_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOVIBE_URL", wire.url)
    monkeypatch.setenv("AUTOVIBE_API_KEY", "av_key")

    def invoke(*words: str, status: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return invoke


@pytest.fixture
def owner(wire: Wire) -> Row:
    return wire.put(
        "projects", wires.project("hello", greediness=0.42, resource_limits=LIMITS, resource_usage_today=TODAY)
    )


def rows(text: str) -> list[list[str]]:
    """The cells of a printed table: between them are at least two blanks."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip() and "──" not in line]


def last_asked(wire: Wire, method: str) -> tuple[str, Row]:
    return next((path, given) for verb, path, given, _ in reversed(wire.asked) if verb == method)


# Projects


def test_a_project_shows_todays_use_as_a_table(run: Run, owner: Row) -> None:
    told = rows(run("project", "show", "hello").stdout)
    assert [
        "money",
        "2.0000 USD",
        "1.2600 USD",
        "1.2600 USD",
        "0.4200 USD",
        "33.3 %",
        "0.0082 USD",
        "0.8318 USD",
    ] in told
    assert ["machine time", "-", "10.08 h", "10.08 h", "3.50 h", "34.7 %", "0.05 h", "6.53 h"] in told
    assert ["API calls", "-", "-", "no limit", "1,234", "-", "0", "no limit"] in told
    assert ["CPU time", "-", "-", "no limit", "0.0010 h", "-", "0.00 h", "no limit"] in told


def test_numbers_stand_at_the_right_edge_and_no_micros_are_shown(run: Run, owner: Row) -> None:
    text = run("project", "show", "hello").stdout
    lines = [line for line in text.splitlines() if line.strip().startswith(("money", "machine time", "API calls"))]
    ends = [re.search(r"(\d \w+|no limit|\d{3})\s*$", line) for line in lines]
    assert len({match.end(1) for match in ends if match}) == 1
    assert "1260000" not in text
    assert "420000" not in text


def test_projects_are_listed_with_what_they_used(run: Run, wire: Wire, owner: Row) -> None:
    told = rows(run("project", "list", "--active", "--sort", "greediness").stdout)
    assert told[0][:7] == ["name", "uuid", "status", "greediness", "money today", "machine time", "API calls"]
    assert told[1][0] == "hello"
    assert told[1][3:7] == ["0.42", "0.4200 of 1.2600 USD", "3.50 of 10.08 h", "1,234"]
    path, given = last_asked(wire, "GET")
    assert (path, given["active"], given["sort"]) == ("/projects", "true", "greediness")
    run("project", "list", "--archived")
    assert last_asked(wire, "GET")[1]["active"] == "false"
    run("project", "list", "--sort", "colour", status=2)


def test_update_sends_what_was_named_and_none_as_null(run: Run, wire: Wire, owner: Row) -> None:
    wire.on("PUT", f"/projects/{owner['uuid']}", lambda _given: owner)
    run("project", "update", "hello", "--greediness", "0.5", "--daily-money", "none", "--max-machines", "3")
    path, given = last_asked(wire, "PUT")
    assert path == f"/projects/{owner['uuid']}"
    assert given == {"greediness": 0.5, "resource_budgets": {"daily_money": None, "max_concurrent_machines": 3}}
    run("project", "update", "hello", "--status", "archived", "--description", "")
    assert last_asked(wire, "PUT")[1] == {"status": "archived", "description": ""}
    run("project", "update", "hello", status=2)
    for bad in ("lots", "-1", "nan", "1e99"):
        run("project", "update", "hello", "--daily-money", bad, status=2)
    run("project", "update", "hello", "--max-machines", "1.5", status=2)
    assert "recorded and not enforced" not in run("project", "create", "--help").stdout


# Resources


def test_the_overview_is_a_table_with_percentages(run: Run, wire: Wire, owner: Row) -> None:
    consumer = {
        **SPENT,
        "project_uuid": owner["uuid"],
        "name": "hello\x1b[2J",
        "status": "active",
        "greediness": 0.42,
        "share_percent": 29.4,
        "active_machine_count": 2,
    }
    answer = {
        "date": "2026-11-21",
        "resource_usage_today": TODAY,
        "utilization_percent": {"money": 33.33, "time": 34.72, "api_calls": None, "compute": 12.5},
        "active_machine_count": 2,
        "project_count": 3,
        "active_project_count": 1,
        "top_consumers": [consumer],
    }
    wire.on("GET", "/resources/overview", lambda _given: answer)
    shown = run("resources", "show").stdout
    told = rows(shown)
    assert ["machine time", "10.08 h", "3.50 h", "34.7 %", "0.05 h", "6.53 h"] in told
    assert ["API calls", "no limit", "1,234", "-", "0", "no limit"] in told
    assert ["CPU of the node", "12.5 %"] in told
    assert ["projects", "3, 1 of them active"] in told
    assert told[-1] == ["hello\\x1b[2J", "0.1235 USD", "29.4 %", "1.50 h", "1,234", "0.25 h", "2", "0.42"]
    assert "\x1b" not in shown
    assert json.loads(run("resources", "show", "--json").stdout)["top_consumers"][0]["money"]["micros"] == 123_456
    answer["top_consumers"] = []
    assert "No project has used anything today." in run("resources", "show").stderr


def test_a_projects_days_and_what_it_got(run: Run, wire: Wire, owner: Row) -> None:
    answer = {
        "project_uuid": owner["uuid"],
        "name": "hello",
        "period": "last_7_days",
        "since": "2026-11-15T00:00:00Z",
        "until": "2026-11-21T13:00:00Z",
        "total_usage": SPENT,
        "daily_breakdown": [{**SPENT, "date": "2026-11-20", "active_machine_count": 4}],
        "efficiency": {
            "cost_per_checkpoint": None,
            "api_calls_per_operation": 617.0,
            "average_machine_runtime_minutes": 61.5,
            "checkpoint_count": 0,
            "operation_count": 2,
        },
    }
    wire.on("GET", f"/resources/projects/{owner['uuid']}", lambda _given: answer)
    shown = run("resources", "project", "hello", "--from", "2026-11-15", "--to", "2026-11-20").stdout
    assert last_asked(wire, "GET")[1] == {"from": "2026-11-15", "to": "2026-11-20"}
    told = rows(shown)
    assert told[0] == ["hello, last 7 days (2026-11-15 00:00 to 2026-11-21 13:00 UTC)"]
    assert ["2026-11-20", "0.1235 USD", "1.50 h", "1,234", "0.25 h", "4"] in told
    assert ["total", "0.1235 USD", "1.50 h", "1,234", "0.25 h", "-"] in told
    assert ["money per checkpoint", "-"] in told
    assert ["API calls per machine", "617.0"] in told
    assert ["average time of a machine", "1 h 01 min"] in told
    run("resources", "project", "hello", "--period", "today")
    assert last_asked(wire, "GET")[1] == {"period": "today"}


def test_a_budget_is_sent_and_shown(run: Run, wire: Wire, owner: Row) -> None:
    wire.on("PUT", f"/resources/projects/{owner['uuid']}/budget", lambda _given: owner)
    shown = run("resources", "budget", "hello", "--daily-money", "2", "--daily-hours", "none").stdout
    assert last_asked(wire, "PUT")[1] == {"daily_money": {"amount": 2.0}, "daily_time_hours": None}
    assert "1.2600 USD" in shown
    run("resources", "budget", "hello", status=2)


def entry(number: int, **more: Any) -> Row:
    return {
        "id": number,
        "created_at": NOW,
        "date": "2026-11-20",
        "kind": "charge",
        "resource": "money",
        "amount": f"{number / 1e6:.6f}",
        "unit": "USD",
        "micros": number,
        "machine_uuid": None,
        "machine_name": "shell-1a2b",
        "reservation_uuid": "aaaa1111-0000-4000-8000-000000000001",
        "note": "VM time",
        **more,
    }


def test_the_ledger_shows_each_entry_and_the_exact_sum(run: Run, wire: Wire, owner: Row) -> None:
    every = [entry(number) for number in range(300, 0, -1)]

    def page(given: Row) -> Row:
        offset, limit = int(given.get("offset", 0)), int(given["limit"])
        end = offset + limit
        more = {"has_more": end < 300, "next_offset": end if end < 300 else None}
        return {"entries": every[offset:end], "charged": SPENT, "total_count": 300, **more}

    wire.on("GET", f"/resources/projects/{owner['uuid']}/ledger", page)
    shown = run("resources", "ledger", "hello", "--day", "2026-11-20", "--resource", "money")
    asked = last_asked(wire, "GET")[1]
    assert (asked["kind"], asked["day"], asked["resource"]) == ("charge", "2026-11-20", "money")
    assert rows(shown.stdout)[1] == [
        "2026-11-20 12:00:00",
        "2026-11-20",
        "shell-1a2b",
        "charge",
        "money",
        "0.000300",
        "USD",
        "VM time",
    ]
    assert "Charged in all: 0.123456 USD, 1.50 h of machine time, 1,234 API calls, 0.25 h of CPU.\n" in shown.stdout
    assert "newest 50 of 300 entries" in shown.stderr
    whole = run("resources", "ledger", "hello", "--all", "--kind", "all", "--json")
    assert [item["id"] for item in json.loads(whole.stdout)["entries"]] == list(range(300, 0, -1))
    assert "kind" not in last_asked(wire, "GET")[1]


# Analytics


def test_analytics_in_tables(run: Run, wire: Wire, owner: Row) -> None:
    answer: Row = {
        "period": "last_30_days",
        "since": "2026-10-23T00:00:00Z",
        "until": "2026-11-21T13:00:00Z",
        "project_uuid": owner["uuid"],
        "overall": {
            "successful_operations": 2,
            "total_operations": 3,
            "success_rate": 0.6667,
            "total_cost": money(420_000),
            "average_cost": money(140_000),
            "average_cost_per_success": money(210_000),
        },
        "by_type": [
            {
                "type": "shell",
                "successful_operations": 2,
                "total_operations": 3,
                "success_rate": 0.6667,
                "average_cost": money(140_000),
                "average_minutes": 61.5,
                "average_spawn_seconds": None,
            }
        ],
        "trends": [
            {"date": "2026-11-19", "operations": 0}
            | dict.fromkeys(("success_rate", "cost_per_operation", "efficiency_score")),
            {
                "date": "2026-11-20",
                "operations": 3,
                "success_rate": 0.6667,
                "cost_per_operation": money(140_000),
                "efficiency_score": 0.6667,
            },
        ],
    }
    wire.on("GET", "/analytics/efficiency", lambda _given: answer)
    told = rows(run("analytics", "--project", "hello", "--period", "last_30_days").stdout)
    assert last_asked(wire, "GET")[1] == {"period": "last_30_days", "project_uuid": owner["uuid"]}
    assert ["with success", "2 (66.7 %)"] in told
    assert ["money per success", "0.2100 USD"] in told
    assert ["shell", "3", "66.7 %", "0.1400 USD", "1 h 01 min", "-"] in told
    assert ["2026-11-20", "3", "66.7 %", "0.1400 USD", "0.67"] in told
    assert not [row for row in told if row[0] == "2026-11-19"]
    answer["overall"]["total_operations"] = 0
    assert "No machine has ended" in run("analytics").stderr
    assert json.loads(run("analytics", "--json").stdout)["by_type"][0]["type"] == "shell"


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0.0000 USD"),
        (49, "0.000049 USD"),
        (50, "0.0001 USD"),
        (1_260_000, "1.2600 USD"),
        (10**12, "1,000,000.0000 USD"),
    ],
)
def test_money_as_a_person_reads_it(micros: int, text: str) -> None:
    from autovibe.schemas import MoneyAmount

    assert amounts.money(MoneyAmount.model_validate(money(micros))) == text
    assert amounts.money(None) == "no limit"
