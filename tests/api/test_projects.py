"""Projects over HTTP: show, list, update, what they may use today. Making one needs an image; see test_on_stub."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, event
from sqlmodel import col, select

from autovibe import schemas
from autovibe.domain import Checkpoint, Event, Project
from autovibe.domain.columns import now
from autovibe.hub import projects
from autovibe.types import MachineStatus, ProjectStatus, Resource
from tests.api.conftest import Served, error_of
from tests.api.spending import pool, reserve, spend
from tests.unit.wire import money


def test_a_project_is_shown_with_its_counts(served: Served) -> None:
    uuid = served.project(greediness=0.42, daily_money_micros=1_260_000, daily_api_calls=7)
    served.machine(uuid)
    served.machine(uuid, status=MachineStatus.working)
    served.machine(uuid, status=MachineStatus.terminated)
    answer = served.get(f"/projects/{uuid}")
    assert answer.status_code == 200
    project = schemas.Project.model_validate(answer.json())
    assert project.uuid == uuid
    assert (project.active_machine_count, project.checkpoint_count) == (2, 1)
    assert project.storage_used_gb == 0
    with served.hub.store.transaction() as session:
        for size in (1_000_000, 2_500_000):
            row = {"project_uuid": uuid, "type": "manual", "status": "ready", "unique_bytes": size}
            session.add(Checkpoint(**row))
    found = served.get(f"/projects/{uuid}").json()
    assert (found["checkpoint_count"], found["storage_used_gb"]) == (3, 0.0035)
    assert project.current_checkpoint_uuid == project.initial_checkpoint_uuid is not None
    assert answer.json()["resource_budgets"]["daily_money"] == {
        "amount": "1.260000",
        "currency": "USD",
        "micros": 1_260_000,
    }
    assert answer.json()["created_at"].endswith("Z")


def test_projects_are_listed_by_pages_and_in_order(served: Served) -> None:
    made = [served.project(name=f"order-{i}-{uuid4().hex[:6]}", greediness=i / 10) for i in range(5)]
    total = served.get("/projects").json()["total_count"]
    assert total >= 5
    seen: list[UUID] = []
    offset: int | None = 0
    while offset is not None:
        page = schemas.ProjectPage.model_validate(served.get("/projects", limit=2, offset=offset).json())
        assert page.total_count == total
        assert page.has_more == (page.next_offset is not None)
        seen += [project.uuid for project in page.projects]
        offset = page.next_offset
    assert len(seen) == len(set(seen)) == total
    assert [uuid for uuid in seen if uuid in made] == list(reversed(made))
    by_greediness = served.get("/projects", sort="greediness", limit=200).json()["projects"]
    shares = [project["greediness"] for project in by_greediness]
    assert shares == sorted(shares, reverse=True)
    beyond = served.get("/projects", offset=10_000).json()
    assert (beyond["projects"], beyond["has_more"], beyond["next_offset"]) == ([], False, None)
    error_of(served.get("/projects", sort="colour"), 400, "INVALID_REQUEST")


def test_projects_are_filtered(served: Served) -> None:
    name = f"gone-{uuid4().hex[:6]}"
    archived = served.project(name=name, status=ProjectStatus.archived)
    active = {project["uuid"] for project in served.get("/projects", active="true", limit=200).json()["projects"]}
    inactive = {project["uuid"] for project in served.get("/projects", active="false", limit=200).json()["projects"]}
    assert str(archived) in inactive - active
    assert [p["uuid"] for p in served.get("/projects", name=name).json()["projects"]] == [str(archived)]


def test_a_name_that_is_taken_is_a_conflict_also_while_the_node_is_down(served: Served) -> None:
    name = f"taken-{uuid4().hex[:6]}"
    served.project(name=name)
    error = error_of(served.post("/projects", {"name": name}), 409, "CONFLICT")
    assert f"'{name}'" in error.message
    assert error.details["field"] == "name"


# Today's resources and limits


def test_the_example_of_the_design_holds(served: Served) -> None:
    """$42 in 14 days is $3 a day; a greediness of 0.42 gets $1.26, 10.08 of 24 hours, 420 of 1000 calls."""
    with pool(served, 3, 24, 1000):
        uuid = served.project(greediness=0.42)
        held = reserve(served, uuid, money=500_000, time_hours=2_000_000)
        with served.hub.store.transaction() as session:
            served.hub.ledger.charge(session, held, {Resource.money: 200_000, Resource.api_calls: 7_000_000})
        found = served.get(f"/projects/{uuid}").json()
        listed = served.get("/projects", active="true").json()["projects"]
    assert found["resource_usage_today"] == {
        "money": {
            "allocated": money(1_260_000),
            "used": money(200_000),
            "reserved": money(300_000),
            "remaining": money(760_000),
        },
        "time_hours": {"allocated": 10.08, "used": 0.0, "reserved": 2.0, "remaining": 8.08},
        "api_calls": {"allocated": 420, "used": 7, "reserved": 0, "remaining": 413},
        "cpu_hours": {"allocated": None, "used": 0.0, "reserved": 0.0, "remaining": None},
    }
    assert found["resource_limits"] == {
        "money": {"explicit": None, "share": money(1_260_000), "effective": money(1_260_000)},
        "time_hours": {"explicit": None, "share": 10.08, "effective": 10.08},
        "api_calls": {"explicit": None, "share": 420, "effective": 420},
    }
    assert [item["uuid"] for item in listed] == [str(uuid)]
    assert listed[0]["resource_usage_today"] == found["resource_usage_today"]


def test_limits_are_the_lower_of_explicit_and_share(served: Served) -> None:
    with pool(served, 10, 24, 1000):
        tight = served.project(greediness=0.5, daily_money_micros=2_000_000, daily_api_calls=900)
        none = served.project(greediness=0.0)
        own = served.project(greediness=0.0, daily_money_micros=700_000)
        limits = {uuid: served.get(f"/projects/{uuid}").json()["resource_limits"] for uuid in (tight, none, own)}
        assert limits[tight]["money"] == {
            "explicit": money(2_000_000),
            "share": money(5_000_000),
            "effective": money(2_000_000),
        }
        assert limits[tight]["api_calls"] == {"explicit": 900, "share": 500, "effective": 500}
        assert limits[none]["money"]["effective"] == money(0)
        assert limits[own]["money"]["effective"] == money(700_000)
        # Σ of greediness 2.0: shares are proportional, and the accounts of the others follow at once
        reserve(served, tight, api_calls=400_000_000)
        more = served.project(greediness=0.1)
        changed = served.http.put(f"/projects/{more}", json={"greediness": 0.75})
        assert changed.status_code == 200, changed.text
        assert changed.json()["resource_limits"]["api_calls"]["share"] == 600
        after = served.get(f"/projects/{tight}").json()
        assert after["resource_limits"]["api_calls"] == {"explicit": 900, "share": 400, "effective": 400}
        assert after["resource_usage_today"]["api_calls"] == {
            "allocated": 400,
            "used": 0,
            "reserved": 400,
            "remaining": 0,
        }
        # never below what is held
        served.http.put(f"/projects/{more}", json={"greediness": 1})
        after = served.get(f"/projects/{tight}").json()
        assert after["resource_limits"]["api_calls"]["effective"] == 333
        assert after["resource_usage_today"]["api_calls"]["allocated"] == 400
        assert after["resource_usage_today"]["api_calls"]["remaining"] == 0


def test_without_a_pool_and_limits_everything_is_metered_and_nothing_limited(served: Served) -> None:
    uuid = served.project()
    spend(served, uuid, money=5, api_calls=3_000_000)
    today = served.get(f"/projects/{uuid}").json()["resource_usage_today"]
    assert today["money"] == {"allocated": None, "used": money(5), "reserved": money(0), "remaining": None}
    assert today["api_calls"] == {"allocated": None, "used": 3, "reserved": 0, "remaining": None}


def test_a_list_of_many_projects_asks_no_more_questions_than_one_of_few(served: Served) -> None:
    asked: list[str] = []
    here = threading.get_ident()

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if threading.get_ident() == here:  # upkeep asks as well
            asked.append(statement)

    for _ in range(3):
        served.project()
    event.listen(Engine, "before_cursor_execute", note)
    try:
        counts = []
        for limit in (2, 200):
            asked.clear()
            with served.hub.store.reading() as session:
                shown = projects._shown(served.hub, session, list(session.exec(select(Project).limit(limit)).all()))
            assert len(shown) >= 2
            counts.append(len([one for one in asked if one.lstrip().upper().startswith("SELECT")]))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert counts[0] == counts[1] <= 6


# Update


def test_what_is_not_named_stays(served: Served) -> None:
    uuid = served.project(description="old", greediness=0.3, daily_money_micros=1_000_000, daily_api_calls=5)
    before = served.get(f"/projects/{uuid}").json()
    answer = served.http.put(
        f"/projects/{uuid}", json={"greediness": 0.5, "resource_budgets": {"daily_money": None, "storage_gb": 1.5}}
    )
    assert answer.status_code == 200, answer.text
    after = answer.json()
    assert after["updated_at"] > before["updated_at"]
    assert after["greediness"] == 0.5
    assert after["resource_budgets"] == {
        "daily_money": None,
        "daily_time_hours": None,
        "daily_api_calls": 5,
        "storage_gb": 1.5,
        "max_concurrent_machines": None,
    }
    for same in ("name", "description", "status", "created_at", "current_checkpoint_uuid"):
        assert after[same] == before[same]
    name = f"new-{uuid4().hex[:8]}"
    assert served.http.put(f"/projects/{uuid}", json={"name": name, "description": "new"}).json()["name"] == name
    with served.hub.store.reading() as session:
        events = session.exec(select(Event).where(Event.object_uuid == uuid).order_by(col(Event.id))).all()
    assert [(item.kind, item.body["changed"]) for item in events] == [
        ("project.updated", ["daily_money_micros", "greediness", "storage_gb"]),
        ("project.updated", ["description", "name"]),
    ]
    assert (
        served.http.put(f"/projects/{uuid}", json={}).json()["updated_at"]
        == served.get(f"/projects/{uuid}").json()["updated_at"]
    )


@pytest.mark.parametrize(
    "body",
    [
        {"uuid": str(uuid4())},
        {"colour": "red"},
        {"name": None},
        {"name": "no name"},
        {"greediness": 1.01},
        {"greediness": None},
        {"status": "gone"},
        {"resource_budgets": None},
        {"resource_budgets": {"daily_cents": 5}},
        {"resource_budgets": {"daily_money": -1}},
        {"resource_budgets": {"daily_money": {"amount": "5", "currency": "EUR"}}},
        {"resource_budgets": {"daily_time_hours": 1e300}},
        {"resource_budgets": {"max_concurrent_machines": 1.5}},
        [],
        "x",
    ],
)
def test_a_malformed_update_changes_nothing(served: Served, body: Any) -> None:
    uuid = served.project()
    before = served.get(f"/projects/{uuid}").json()
    error_of(served.http.put(f"/projects/{uuid}", json=body), 400, "INVALID_REQUEST")
    assert served.get(f"/projects/{uuid}").json() == before


def test_money_is_in_the_currency_of_the_hub(served: Served) -> None:
    uuid = served.project()
    answer = served.http.put(
        f"/projects/{uuid}", json={"resource_budgets": {"daily_money": {"amount": 5, "currency": "CHF"}}}
    )
    assert "USD" in error_of(answer, 400, "INVALID_REQUEST").message
    for spelled in ({"amount": "1.25", "currency": "USD"}, {"micros": 1_250_000}, 1.25, "1.25"):
        answer = served.http.put(f"/projects/{uuid}", json={"resource_budgets": {"daily_money": spelled}})
        assert answer.json()["resource_budgets"]["daily_money"] == money(1_250_000)


def test_a_name_that_is_taken_stays_with_its_project(served: Served) -> None:
    one, other = served.project(), served.project()
    taken = served.get(f"/projects/{one}").json()["name"]
    error = error_of(served.http.put(f"/projects/{other}", json={"name": taken}), 409, "CONFLICT")
    assert error.details["field"] == "name"
    assert served.http.put(f"/projects/{one}", json={"name": taken}).status_code == 200
    error_of(served.http.put(f"/projects/{uuid4()}", json={"name": "x"}), 404, "NOT_FOUND")


def allocated(served: Served, uuid: UUID) -> Any:
    return served.get(f"/projects/{uuid}").json()["resource_usage_today"]["money"]["allocated"]


def test_a_project_is_archived_when_none_of_its_machines_live(served: Served) -> None:
    with pool(served, 10, 24, 1000):
        uuid, other = served.project(greediness=1.0), served.project(greediness=1.0)
        reserve(served, other, money=1)
        machine = served.machine(uuid, name=f"alive-{uuid4().hex[:6]}")
        error = error_of(served.http.put(f"/projects/{uuid}", json={"status": "archived"}), 409, "CONFLICT")
        assert "'alive-" in error.message
        served.change(machine, status=MachineStatus.terminated, ended_at=now())
        assert served.http.put(f"/projects/{uuid}", json={"status": "archived"}).json()["status"] == "archived"
        error_of(served.post("/machines", {"project_uuid": str(uuid)}), 409, "CONFLICT")
        # the pool is the others' now
        assert served.get(f"/projects/{other}").json()["resource_usage_today"]["money"]["allocated"] == money(
            10_000_000
        )
        assert served.http.put(f"/projects/{uuid}", json={"status": "active"}).json()["status"] == "active"
        assert allocated(served, other) == money(5_000_000)


def test_many_updates_at_once_all_happen(served: Served) -> None:
    """Each waits for the project's row, and the accounts end at the limits of the last state."""
    with pool(served, 10, 24, 1000):
        made = [served.project(greediness=0.1) for _ in range(4)]
        for uuid in made:
            reserve(served, uuid, money=1)
        with ThreadPoolExecutor(8) as threads:
            answers = list(
                threads.map(
                    lambda i: served.http.put(f"/projects/{made[i % 4]}", json={"greediness": 0.25 + i // 4 * 0.25}),
                    range(16),
                )
            )
        assert {answer.status_code for answer in answers} == {200}
        found = [served.get(f"/projects/{uuid}").json() for uuid in made]
        total = sum(item["greediness"] for item in found)
        for item in found:
            expected = 10 * item["greediness"] / max(1, total)
            assert float(item["resource_usage_today"]["money"]["allocated"]["amount"]) == pytest.approx(
                expected, abs=1e-6
            )


def test_a_spawn_and_an_archiving_at_the_same_moment_never_both_happen(served: Served) -> None:
    """Each decides under the project's row, so an archived project has no machine that lives."""
    for _ in range(4):
        uuid = served.project(daily_money_micros=10_000_000)
        with ThreadPoolExecutor(2) as threads:
            spawned = threads.submit(served.post, "/machines", {"project_uuid": str(uuid)})
            archived = threads.submit(served.http.put, f"/projects/{uuid}", json={"status": "archived"})
            codes = (spawned.result().status_code, archived.result().status_code)
        assert codes in ((201, 409), (409, 200)), spawned.result().text
        found = served.get(f"/projects/{uuid}").json()
        assert (found["status"], found["active_machine_count"]) == (
            ("active", 1) if codes[0] == 201 else ("archived", 0)
        )


def test_limits_change_while_others_spend(served: Served) -> None:
    """Neither waits for the other in a circle, and what is taken never passes what is allocated."""
    with pool(served, 1000, 1000, 1000):
        made = [served.project(greediness=0.2) for _ in range(3)]

        def work(number: int) -> int:
            uuid = made[number % 3]
            if number % 2:
                answer = served.http.put(f"/projects/{uuid}", json={"greediness": 0.1 + number / 100})
                return answer.status_code
            spend(served, uuid, served.machine(uuid), money=1000, api_calls=1_000_000)
            return 200

        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(work, range(48))) == {200}
        today = [served.get(f"/projects/{uuid}").json()["resource_usage_today"] for uuid in made]
    assert sum(item["money"]["used"]["micros"] for item in today) == 24_000
    assert sum(item["api_calls"]["used"] for item in today) == 24
    for item in today:
        assert item["money"]["used"]["micros"] <= item["money"]["allocated"]["micros"]
        assert item["money"]["remaining"]["micros"] > 0
