"""Reports of usage, and the limits of storage, without a node."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlmodel import select

from autovibe.domain import Checkpoint, Event, LedgerEntry, Machine, Project
from autovibe.hub import storage_limits
from autovibe.store import rows
from autovibe.types import CheckpointStatus, CheckpointType, MachineStatus
from tests.api.conftest import Served, error_of, until


@pytest.fixture(autouse=True)
def started(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[UUID]:
    """The operations that would be carried out; there is no node."""
    found: list[UUID] = []
    monkeypatch.setattr(served.hub.workflows, "start", lambda uuid, kind: found.append(uuid))
    return found


def report(served: Served, machine: UUID, key: str | None = None, **body: Any) -> Any:
    return served.post(f"/machines/{machine}/usage", body, key=key)


def charges(served: Served, machine: UUID) -> list[tuple[str, int, str]]:
    with served.hub.store.reading() as session:
        statement = select(LedgerEntry).where(LedgerEntry.machine_uuid == machine, LedgerEntry.kind == "charge")
        return sorted((row.resource, row.amount_micros, row.note) for row in session.exec(statement))


def test_a_report_is_charged_and_tells_what_is_left(served: Served) -> None:
    project = served.project(daily_money_micros=5_000_000, daily_api_calls=100)
    machine = served.machine(project, max_money_micros=2_000_000, max_time_minutes=30)
    answer = report(served, machine, api_calls=3, money={"amount": "0.25"}, note="a review")
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["machine_uuid"] == str(machine)
    assert (told["charged"]["api_calls"], told["charged"]["money"]["micros"]) == (3, 250_000)
    assert told["machine"]["money"]["micros"] == 1_750_000
    assert (told["machine"]["time_minutes"], told["machine"]["api_calls"]) == (30, None)
    assert told["project"]["money"]["micros"] == 4_750_000
    assert (told["project"]["api_calls"], told["project"]["time_minutes"]) == (97, None)
    assert charges(served, machine) == [("api_calls", 3_000_000, "a review"), ("money", 250_000, "a review")]


def test_a_repeated_report_is_charged_once(served: Served) -> None:
    machine, key = served.machine(), str(uuid4())
    with ThreadPoolExecutor(6) as reporters:
        answers = list(reporters.map(lambda _: report(served, machine, key, api_calls=2), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    assert charges(served, machine) == [("api_calls", 2_000_000, "")]
    error_of(report(served, machine, key, api_calls=3), 409, "IDEMPOTENCY_MISMATCH")


def test_long_keys_that_end_differently_are_two_reports(served: Served) -> None:
    machine = served.machine()
    for end in "ab":
        assert report(served, machine, "k" * 250 + end, api_calls=2).status_code == 200
    assert [amount for _, amount, _ in charges(served, machine)] == [2_000_000, 2_000_000]


def test_what_does_not_fit_is_not_charged_and_blocks_the_machine(served: Served, started: list[UUID]) -> None:
    machine = served.machine(max_api_calls=5, status=MachineStatus.working, prompt="work")
    assert report(served, machine, api_calls=4).status_code == 200
    error = error_of(report(served, machine, api_calls=2), 409, "RESOURCE_LIMIT_EXCEEDED")
    assert (error.details["scope"], error.details["resource"]) == ("machine", "api_calls")
    assert charges(served, machine) == [("api_calls", 4_000_000, "")]
    row = served.row(Machine, machine)
    assert (row.status, row.blocked["resource"]) == ("checkpointing", "api_calls")
    assert row.operation_uuid in started
    assert report(served, machine, api_calls=1).status_code == 200  # what came before the freeze still counts


def test_of_many_reports_as_many_are_charged_as_fit(served: Served) -> None:
    machine = served.machine(max_api_calls=10, status=MachineStatus.budget_blocked)
    with ThreadPoolExecutor(8) as reporters:
        answers = list(reporters.map(lambda _: report(served, machine, api_calls=1).status_code, range(25)))
    assert sorted(answers) == [200] * 10 + [409] * 15
    assert sum(amount for _, amount, _ in charges(served, machine)) == 10_000_000


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"api_calls": 0},
        {"api_calls": -1},
        {"api_calls": 1.5},
        {"money": 0},
        {"money": -1},
        {"money": "much"},
        {"money": {"amount": 1, "currency": "CAD"}},
        {"api_calls": 1, "calls": 1},
        {"api_calls": 1, "note": "x" * 201},
    ],
)
def test_a_report_that_says_nothing_or_nonsense_is_refused(served: Served, body: dict[str, Any]) -> None:
    machine = served.machine()
    error_of(served.post(f"/machines/{machine}/usage", body), 400, "INVALID_REQUEST")
    assert charges(served, machine) == []


def test_a_machine_that_has_ended_reports_nothing(served: Served) -> None:
    machine = served.machine(status=MachineStatus.terminated)
    error_of(report(served, machine, api_calls=1), 409, "CONFLICT")
    error_of(report(served, uuid4(), api_calls=1), 404, "NOT_FOUND")


def test_a_machines_own_key_reports_for_itself_alone(served: Served) -> None:
    machine, other = served.machine(), served.machine()
    with served.hub.store.transaction() as session:
        key = served.hub.keyring.issue_machine_key(session, rows.get(session, Machine, machine))
    own = {"Authorization": f"Bearer {key}"}
    body = {"api_calls": 1}
    assert served.http.post(f"/machines/{machine}/usage", json=body, headers=own).status_code == 200
    assert served.http.post(f"/machines/{other}/usage", json=body, headers=own).status_code == 403
    assert served.http.post(f"/machines/{machine}/resume", headers=own).status_code == 403
    assert (len(charges(served, machine)), len(charges(served, other))) == (1, 0)


# Storage


def fill(served: Served, project: UUID, unique_bytes: int, status: CheckpointStatus = CheckpointStatus.ready) -> None:
    with served.hub.store.transaction() as session:
        session.add(
            Checkpoint(
                project_uuid=project, type=CheckpointType.manual, status=status, vmid=100, unique_bytes=unique_bytes
            )
        )


def test_storage_is_told_of_refused_and_blocked_by_how_far_it_is_over(served: Served, started: list[UUID]) -> None:
    project = served.project(storage_gb=1)
    active = served.machine(project, metered_at=None)
    ending = served.machine(project, status=MachineStatus.terminating)
    order = {"project_uuid": str(project)}

    def warned() -> list[int]:
        storage_limits.enforce(served.hub)
        storage_limits.enforce(served.hub)
        with served.hub.store.reading() as session:
            told = session.exec(
                select(Event).where(Event.object_uuid == project, Event.kind == "budget.warning").order_by("id")
            )
            return [event.body["percent"] for event in told if event.body["resource"] == "storage_gb"]

    fill(served, project, 700_000_000)
    fill(served, project, 9_000_000_000, CheckpointStatus.failed)  # has nothing
    assert warned() == []
    fill(served, project, 350_000_000)  # 105 %
    assert warned() == [100]
    assert served.post("/machines", order).status_code == 201
    fill(served, project, 100_000_000)  # 115 %
    error = error_of(served.post("/machines", order), 409, "RESOURCE_LIMIT_EXCEEDED")
    assert error.details["resource"] == "storage_gb"
    error_of(served.post(f"/machines/{active}/checkpoint"), 409, "RESOURCE_LIMIT_EXCEEDED")
    assert warned() == [100]
    assert served.row(Machine, active).status == "active"
    fill(served, project, 400_000_000)  # 155 %
    storage_limits.enforce(served.hub)
    assert served.row(Machine, active).status == "active", "its VM is off"
    with served.hub.store.transaction() as session:
        row = rows.get(session, Machine, active)
        row.metered_at = row.spawned_at
    storage_limits.enforce(served.hub)
    row = served.row(Machine, active)
    assert (row.status, row.blocked["resource"]) == ("checkpointing", "storage_gb")
    until(lambda: row.operation_uuid in started)  # the hub's own upkeep may have been quicker
    assert served.row(Machine, ending).status == "terminating"
    with served.hub.store.transaction() as session:
        rows.get(session, Project, project).storage_gb = 2
    assert served.post("/machines", order).status_code == 201


def test_a_limit_of_a_few_bytes_is_told_of_too(served: Served) -> None:
    project = served.project(storage_gb=0.0000015)
    fill(served, project, 1200)  # 80 %, and less than 75 % in whole millionths
    storage_limits.enforce(served.hub)
    with served.hub.store.reading() as session:
        told = session.exec(select(Event).where(Event.object_uuid == project, Event.kind == "budget.warning")).all()
    assert [event.body["percent"] for event in told] == [75]
