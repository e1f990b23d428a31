"""Machines over HTTP: what is accepted, what is refused, and that nothing is half-made. The node is down here."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlmodel import select

from autovibe import schemas
from autovibe.domain import Allotment, Checkpoint, Machine, Operation
from autovibe.domain.columns import now
from autovibe.types import CheckpointStatus, CheckpointType, MachineStatus, OperationKind
from tests.api.conftest import Served, error_of, until

HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDGCYdtWZSOU0k1GkK8GEXbVAu1iHhrzTeFZDfMJKBZ1"


def spawn(served: Served, project: UUID, key: str | None = None, **fields: Any) -> schemas.Machine:
    answer = served.post("/machines", {"project_uuid": str(project), **fields}, key=key)
    assert answer.status_code == 201, answer.text
    return schemas.Machine.model_validate(answer.json())


def count(served: Served, kind: Any) -> int:
    with served.hub.store.reading() as session:
        return len(session.exec(select(kind)).all())


def test_a_spawn_is_accepted_at_once(served: Served) -> None:
    project = served.project()
    machine = spawn(
        served,
        project,
        prompt="echo hello",
        file_modifications={
            "/workspace/a.txt": "a",
            "/etc/x": {"content_base64": "aGk=", "mode": "0600"},
            "/tmp/b": None,
        },
        resource_constraints={"max_money": 1.5, "max_time_minutes": 10, "max_api_calls": 3},
    )
    assert machine.status == "spawning"
    assert machine.name == f"shell-{machine.uuid.hex[:6]}"
    assert machine.vmid in served.hub.vmids
    assert (
        machine.checkpoint_uuid == schemas.Project(**served.get(f"/projects/{project}").json()).current_checkpoint_uuid
    )
    assert machine.resource_constraints.max_money == schemas.MoneyAmount(
        amount="1.500000", currency="USD", micros=1500000
    )
    operation = schemas.Operation.model_validate(served.get(f"/operations/{machine.operation_uuid}").json())
    assert (operation.kind, operation.object_uuid) == (OperationKind.spawn, machine.uuid)
    assert operation.status in ("accepted", "running")
    assert operation.steps[0] == "clone"
    row = served.row(Machine, machine.uuid)
    assert row.file_modifications == {
        "/workspace/a.txt": {"content": "a"},
        "/etc/x": {"content_base64": "aGk=", "mode": "0600"},
        "/tmp/b": None,
    }
    with served.hub.store.reading() as session:
        allotted = session.get(Allotment, machine.vmid)
        assert allotted is not None
        assert allotted.owner_uuid == machine.uuid
    # The workflow has begun: it asks a node that does not answer, and the hub stays up.
    until(lambda: served.operation_of(machine.uuid).step == "clone")
    assert served.get(f"/machines/{machine.uuid}").json()["status"] == "spawning"


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("workspace/a", "not absolute"),
        ("", "not absolute"),
        ("/workspace/../etc/passwd", "'..'"),
        ("/..", "'..'"),
        ("/workspace/./a", "not normalised"),
        ("//workspace/a", "not normalised"),
        ("/workspace//a", "not normalised"),
        ("/workspace/", "not normalised"),
        ("/", "not normalised"),
        ("/workspace/a\u0000b", "NUL"),
        ("/proc/sys/x", "'/proc'"),
        ("/dev", "'/dev'"),
        ("/run/x", "'/run'"),
        ("/sys/x", "'/sys'"),
        ("/" + "x" * 256, "too long"),
        ("/x" * 2100, "too long"),
    ],
)
def test_a_bad_file_path_is_refused_before_anything_is_made(served: Served, path: str, fault: str) -> None:
    project = served.project()
    before = count(served, Machine), count(served, Allotment), count(served, Operation)
    body = {"project_uuid": str(project), "file_modifications": {path: "x"}}
    assert fault in error_of(served.post("/machines", body), 400, "INVALID_REQUEST").message
    assert (count(served, Machine), count(served, Allotment), count(served, Operation)) == before


@pytest.mark.parametrize(
    "files",
    [
        {"/a": {"content": "x", "content_base64": "eA=="}},
        {"/a": {}},
        {"/a": {"content_base64": "not base64!"}},
        {"/a": {"content": "x", "mode": "rwx"}},
        {"/a": {"content": "x", "owner": "Root; rm"}},
        {"/a": {"content": "x", "colour": "red"}},
        {"/a": 5},
        {"/a": "file", "/a/b": "in it"},
        {f"/f{i}": "x" * 3_000_000 for i in range(3)},
        {f"/f{i}": "" for i in range(1001)},
    ],
)
def test_bad_files_are_refused(served: Served, files: dict[str, Any]) -> None:
    body = {"project_uuid": str(served.project()), "file_modifications": files}
    error_of(served.post("/machines", body), 400, "INVALID_REQUEST")


def test_bad_orders_are_refused_with_a_remedy(served: Served) -> None:
    project, other = served.project(), served.project()
    with served.hub.store.transaction() as session:
        unready = Checkpoint(project_uuid=project, type=CheckpointType.manual, status=CheckpointStatus.creating)
        foreign = Checkpoint(project_uuid=other, type=CheckpointType.manual, status=CheckpointStatus.ready)
        session.add_all([unready, foreign])
    order = {"project_uuid": str(project)}
    error = error_of(served.post("/machines", {**order, "type": "toaster"}), 400, "INVALID_REQUEST")
    assert "shell" in error.message
    error_of(served.post("/machines", {"project_uuid": str(uuid4())}), 404, "NOT_FOUND")
    error_of(served.post("/machines", {**order, "checkpoint_uuid": str(uuid4())}), 404, "NOT_FOUND")
    error_of(served.post("/machines", {**order, "checkpoint_uuid": str(foreign.uuid)}), 400, "INVALID_REQUEST")
    error_of(served.post("/machines", {**order, "checkpoint_uuid": str(unready.uuid)}), 409, "CONFLICT")
    error_of(served.post(f"/checkpoints/{unready.uuid}/spawn"), 409, "CONFLICT")
    error_of(served.post("/machines", {**order, "name": "a b"}), 400, "INVALID_REQUEST")
    error_of(served.post("/machines", {**order, "prompt": "a\u0000b"}), 400, "INVALID_REQUEST")
    error_of(served.post("/machines", {**order, "resource_constraints": {"max_money": -1}}), 400, "INVALID_REQUEST")
    error_of(served.post("/machines", {"project_uuid": str(served.project(status="archived"))}), 409, "CONFLICT")


def test_a_live_name_is_taken_and_free_again_afterwards(served: Served) -> None:
    project, name = served.project(), f"n-{uuid4().hex[:8]}"
    old = served.machine(project, name=name)
    error = error_of(served.post("/machines", {"project_uuid": str(project), "name": name}), 409, "CONFLICT")
    assert error.details["field"] == "name"
    served.change(old, status=MachineStatus.terminated, ended_at=now())
    assert spawn(served, project, name=name).name == name


def test_many_spawns_at_once_get_names_and_vmids_of_their_own(served: Served) -> None:
    project = served.project()
    with ThreadPoolExecutor(12) as pool:
        machines = list(pool.map(lambda _: spawn(served, project), range(12)))
    assert len({machine.vmid for machine in machines}) == 12
    assert len({machine.name for machine in machines}) == 12


def test_of_equal_names_at_once_one_is_made(served: Served) -> None:
    body = {"project_uuid": str(served.project()), "name": f"race-{uuid4().hex[:8]}"}
    with ThreadPoolExecutor(6) as pool:
        statuses = sorted(answer.status_code for answer in pool.map(lambda _: served.post("/machines", body), range(6)))
    assert statuses == [201] + [409] * 5


def test_an_exhausted_range_names_the_range_and_the_setting(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    project = served.project()
    monkeypatch.setattr(served.hub, "vmids", range(40_000, 40_002))
    assert {spawn(served, project).vmid, spawn(served, project).vmid} == {40_000, 40_001}
    before = count(served, Machine)
    error = error_of(served.post("/machines", {"project_uuid": str(project)}), 409, "RESOURCE_LIMIT_EXCEEDED")
    assert "40000" in error.message
    assert "vmid_last" in error.message
    assert count(served, Machine) == before


def test_a_full_disk_is_noticed_before_anything_is_made(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    project, machine = served.project(), served.machine()
    monkeypatch.setattr(served.hub, "min_free_bytes", 10**18)
    before = count(served, Machine)
    error = error_of(served.post("/machines", {"project_uuid": str(project)}), 500, "INSUFFICIENT_SPACE")
    assert "min_free_gb" in error.message
    error_of(served.post(f"/machines/{machine}/checkpoint"), 500, "INSUFFICIENT_SPACE")
    assert count(served, Machine) == before
    assert served.get("/health").json()["services"]["hub"]["status"] == "degraded"


def test_a_repeat_under_the_same_key_answers_the_same_machine(served: Served) -> None:
    project, key = served.project(), str(uuid4())
    first = spawn(served, project, key, prompt="x")
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: spawn(served, project, key, prompt="x"), range(4)))
    assert {machine.uuid for machine in again} == {first.uuid}
    served.change(first.uuid, status=MachineStatus.failed, ended_at=now(), error_message="As a test.")
    assert spawn(served, project, key, prompt="x").status == "failed"
    answer = served.post("/machines", {"project_uuid": str(project), "prompt": "y"}, key=key)
    error_of(answer, 409, "IDEMPOTENCY_MISMATCH")
    error_of(served.post("/projects", {"name": "other"}, key=key), 409, "IDEMPOTENCY_MISMATCH")
    error_of(served.http.post("/projects", json={"name": "x"}, headers={"Idempotency-Key": ""}), 400, "INVALID_REQUEST")
    error_of(served.post("/projects", {"name": "x"}, key="k" * 256), 400, "INVALID_REQUEST")


def test_equal_requests_at_the_same_moment_make_one_machine(served: Served) -> None:
    for _ in range(5):
        project, key = served.project(), str(uuid4())
        with ThreadPoolExecutor(6) as pool:
            made = list(pool.map(lambda _: spawn(served, project, key), range(6)))  # noqa: B023 - used up in the loop
        assert len({machine.uuid for machine in made}) == 1
        assert served.get("/machines", project_uuid=str(project)).json()["total_count"] == 1


def test_an_order_that_was_refused_leaves_its_key_free(served: Served) -> None:
    project, key = served.project(), str(uuid4())
    body = {"project_uuid": str(project), "name": f"k-{uuid4().hex[:8]}"}
    other = served.machine(project, name=body["name"])
    error_of(served.post("/machines", body, key=key), 409, "CONFLICT")
    served.change(other, status=MachineStatus.terminated, ended_at=now())
    assert served.post("/machines", body, key=key).status_code == 201


def test_machines_are_listed_filtered_and_paged(served: Served) -> None:
    project = served.project()
    start = now()
    made = [served.machine(project, spawned_at=start + timedelta(seconds=i // 2)) for i in range(5)]
    served.change(made[0], status=MachineStatus.working)
    listed: list[str] = []
    for offset in (0, 2, 4):
        page = served.get("/machines", project_uuid=str(project), limit=2, offset=offset).json()
        assert (page["total_count"], page["has_more"]) == (5, offset < 4)
        listed += [machine["uuid"] for machine in page["machines"]]
    rows = [served.row(Machine, uuid) for uuid in listed]
    assert rows == sorted(rows, key=lambda row: (-row.spawned_at.timestamp(), row.uuid))
    assert len(set(listed)) == 5
    both = served.http.get(f"/machines?project_uuid={project}&status=working&status=failed").json()
    assert [machine["uuid"] for machine in both["machines"]] == [str(made[0])]
    name = rows[0].name
    assert served.get("/machines", name=name).json()["total_count"] == 1


def test_terminating_is_idempotent(served: Served) -> None:
    machine = served.machine()
    answer = served.post(f"/machines/{machine}/terminate", {"reason": "enough"})
    assert answer.status_code == 200
    shown = schemas.TerminateReply.model_validate(answer.json())
    assert (shown.status, shown.final_checkpoint_uuid) == ("terminating", None)
    again = served.post(f"/machines/{machine}/terminate").json()
    assert again["operation_uuid"] == str(shown.operation_uuid)
    with served.hub.store.reading() as session:
        assert len(session.exec(select(Operation).where(Operation.machine_uuid == machine)).all()) == 1
    assert served.row(Machine, machine).termination_reason == "enough"
    failed = served.machine(status=MachineStatus.failed, error_message="No luck.", ended_at=now())
    ended = served.post(f"/machines/{failed}/terminate").json()
    assert (ended["status"], ended["error_message"], ended["operation_uuid"]) == ("failed", "No luck.", None)


def test_terminating_a_spawning_machine_reaches_its_spawn(served: Served) -> None:
    machine = spawn(served, served.project())
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: served.post(f"/machines/{machine.uuid}/terminate"), range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert served.row(Machine, machine.uuid).wanted == "terminated"
    with served.hub.store.reading() as session:
        statement = select(Operation).where(Operation.machine_uuid == machine.uuid, Operation.kind == "terminate")
        assert len(session.exec(statement).all()) == 1


def test_a_checkpoint_takes_a_machine_that_is_active_or_working(served: Served) -> None:
    machine = served.machine(status=MachineStatus.working, address="127.0.0.1", port=1, host_key=HOST_KEY)
    answer = served.post(f"/machines/{machine}/checkpoint", {"label": "a", "description": "first", "context": "c1"})
    assert answer.status_code == 201
    checkpoint = schemas.Checkpoint.model_validate(answer.json())
    assert (checkpoint.type, checkpoint.label, checkpoint.context) == ("manual", "a", "c1")
    assert checkpoint.machine_uuid == machine
    assert checkpoint.metadata["trigger"] == "request"
    row = served.row(Machine, machine)
    assert (row.status, row.resume_status) == ("checkpointing", "working")
    assert "checkpointing" in error_of(served.post(f"/machines/{machine}/checkpoint"), 409, "CONFLICT").message
    for status in (MachineStatus.spawning, MachineStatus.terminated, MachineStatus.failed, MachineStatus.terminating):
        error_of(served.post(f"/machines/{served.machine(status=status)}/checkpoint"), 409, "CONFLICT")
    neighbour = served.machine(row.project_uuid)
    error_of(served.post(f"/machines/{neighbour}/checkpoint", {"label": "a"}), 409, "CONFLICT")
    error_of(served.post(f"/machines/{neighbour}/checkpoint", {"label": "a/b"}), 400, "INVALID_REQUEST")


def test_of_two_checkpoints_at_once_one_is_made(served: Served) -> None:
    machine = served.machine(address="127.0.0.1", port=1, host_key=HOST_KEY)
    with ThreadPoolExecutor(5) as pool:
        statuses = sorted(
            answer.status_code
            for answer in pool.map(lambda _: served.post(f"/machines/{machine}/checkpoint"), range(5))
        )
    assert statuses == [201, 409, 409, 409, 409]


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"argv": []},
        {"argv": ["true"], "script": "true"},
        {"argv": ["a\u0000b"]},
        {"argv": ["true"], "cwd": "workspace"},
        {"argv": ["true"], "env": {"A-B": "x"}},
        {"argv": ["true"], "timeout_seconds": 0},
        {"argv": ["true"], "timeout_seconds": 3601},
        {"argv": ["true"], "user": "Root"},
        {"argv": "true"},
    ],
)
def test_a_bad_exec_is_refused(served: Served, order: dict[str, Any]) -> None:
    error_of(served.post(f"/machines/{served.machine()}/exec", order), 400, "INVALID_REQUEST")


def test_a_command_that_finds_no_thread_within_its_time_is_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {"argv": ["true"], "timeout_seconds": 0.2}
    free = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(served.hub, "conversations", pool)
        busy = pool.submit(free.wait, 20)
        answer = served.post(f"/machines/{served.machine()}/exec", order)
        free.set()
        assert busy.result()
    assert "fewer" in error_of(answer, 409, "RESOURCE_LIMIT_EXCEEDED").message


def test_exec_needs_a_machine_that_can_be_reached(served: Served) -> None:
    order = {"argv": ["true"], "timeout_seconds": 0.3}
    assert (
        "wait"
        in error_of(served.post(f"/machines/{served.machine(status='spawning')}/exec", order), 409, "CONFLICT").message
    )
    ended = served.machine(status=MachineStatus.terminated, ended_at=now())
    assert "Spawn" in error_of(served.post(f"/machines/{ended}/exec", order), 409, "CONFLICT").message
    error_of(served.post(f"/machines/{served.machine(status='checkpointing')}/exec", order), 409, "CONFLICT")
    gone = served.machine(address="127.0.0.1", port=1, host_key=HOST_KEY)
    answer = served.post(f"/machines/{gone}/exec", order)
    error_of(answer, 500, "GUEST_UNREACHABLE")
    assert "Retry-After" in answer.headers
    error_of(served.get(f"/machines/{ended}/ssh"), 409, "CONFLICT")
    assert served.get(f"/machines/{gone}/ssh").json() == {
        "host": "127.0.0.1",
        "port": 1,
        "user": "agent",
        "host_key": HOST_KEY,
    }
