"""Projects over HTTP: show, list, what a repeat answers. Making one needs an image; see test_on_stub."""

from __future__ import annotations

from uuid import UUID, uuid4

from autovibe import schemas
from autovibe.types import MachineStatus, ProjectStatus
from tests.api.conftest import Served, error_of


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
