"""What needs a node: the API against the stub node, whose API and tasks are real and whose guests are local sshds."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from autovibe import app, schemas
from autovibe.domain import Machine
from autovibe.hub import output
from autovibe.types import MachineStatus
from tests.api.conftest import KEY, Served, error_of, serve, until
from tests.conftest import BACKENDS
from tests.stub.node import StubNode


@pytest.fixture(scope="module", params=BACKENDS)
def stubbed(request: pytest.FixtureRequest, stub_node: StubNode) -> Iterator[Served]:
    """A hub whose node answers."""
    path = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    more: dict[str, Any] = {"api_key": KEY}
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        more["database_url"] = server.create(is_migrated=True, backups=path / "backups")
    parts = app.build(stub_node.settings(path, **more))
    parts.start()
    url, stop = serve(parts)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=f"{url}/api/v1", headers=headers, timeout=320, trust_env=False) as http:
        found = Served(parts, url, http)
        yield found
        for machine in found.get("/machines", limit=200).json()["machines"]:
            if machine["status"] not in ("terminated", "failed"):
                found.post(f"/machines/{machine['uuid']}/terminate", wait=60)
    stop()
    parts.close()
    if "database_url" in more:
        server.drop(more["database_url"])
    shutil.rmtree(path, ignore_errors=True)


def project(stubbed: Served) -> schemas.Project:
    answer = stubbed.post("/projects", {"name": f"p-{uuid4().hex[:8]}"})
    assert answer.status_code == 201, answer.text
    return schemas.Project.model_validate(answer.json())


def spawn(stubbed: Served, wait_for: str = "ready", **fields: Any) -> schemas.Machine:
    body = {"project_uuid": str(project(stubbed).uuid), **fields}
    answer = stubbed.post("/machines", body, wait=120, wait_for=wait_for)
    assert answer.status_code == 201, answer.text
    machine = schemas.Machine.model_validate(answer.json())
    assert machine.status in ("active", "working"), (machine.status, machine.error_message)
    return machine


def run(stubbed: Served, machine: schemas.Machine, script: str, **more: Any) -> schemas.ExecResult:
    answer = stubbed.post(f"/machines/{machine.uuid}/exec", {"script": script, **more})
    assert answer.status_code == 200, answer.text
    return schemas.ExecResult.model_validate(answer.json())


def test_a_project_is_made_once_with_its_genesis(stubbed: Served) -> None:
    key, name = str(uuid4()), f"p-{uuid4().hex[:8]}"
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: stubbed.post("/projects", {"name": name}, key=key), range(5)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["uuid"] for answer in answers}) == 1
    error_of(stubbed.post("/projects", {"name": name}), 409, "CONFLICT")
    shown = answers[0].json()
    listed = stubbed.get(f"/projects/{shown['uuid']}/checkpoints").json()
    assert listed["total_count"] == 1
    genesis = listed["checkpoints"][0]
    assert genesis["uuid"] == shown["initial_checkpoint_uuid"] == shown["current_checkpoint_uuid"]
    assert (genesis["type"], genesis["status"], genesis["artefact"]["kind"]) == ("genesis", "ready", "template")
    assert stubbed.get(f"/checkpoints/{genesis['uuid']}", include="manifest").json()["manifest"] == {}


def test_a_project_whose_image_is_missing_says_how_to_get_it(stubbed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stubbed.hub, "image", "plan-9")
    error = error_of(stubbed.post("/projects", {"name": f"p-{uuid4().hex[:8]}"}), 409, "CONFLICT")
    assert "autovibe image upload plan-9" in error.message


def test_health_is_green(stubbed: Served) -> None:
    health = stubbed.get("/health").json()
    assert health["status"] == "healthy", health
    assert 0 <= health["utilization_percent"] <= 100


def test_a_prompt_runs_and_its_output_streams(stubbed: Served) -> None:
    script = "echo first; sleep 1; printf 'wörld\\n'; exit 7"
    machine = spawn(stubbed, prompt=script, file_modifications={"/workspace/given.txt": "placed"})
    assert machine.status == "working"
    start, came = time.monotonic(), []
    with stubbed.http.stream("GET", f"/machines/{machine.uuid}/logs", params={"follow": 1}) as answer:
        for text in answer.iter_text():
            came.append((time.monotonic() - start, text))
    assert "".join(text for _, text in came) == "first\nwörld\n"
    assert len(came) > 1, "the output came in one piece, at the end"
    ended = stubbed.get(f"/machines/{machine.uuid}", wait_for="finished").json()
    assert (ended["status"], ended["exit_status"], ended["progress"]) == ("active", 7, "wörld")
    assert ended["finished_at"] is not None
    assert run(stubbed, machine, "cat given.txt").stdout == "placed"


def test_exec_answers_as_the_command_did(stubbed: Served) -> None:
    machine = spawn(stubbed)
    answer = stubbed.post(
        f"/machines/{machine.uuid}/exec",
        {"argv": ["sh", "-c", 'echo "$A$1"; pwd >&2; exit 3', "x", "b c"], "env": {"A": "ä"}},
    )
    result = schemas.ExecResult.model_validate(answer.json())
    assert (result.exit_status, result.stdout, result.stderr) == (3, "äb c\n", "/workspace\n")
    assert run(stubbed, machine, "pwd", cwd="/tmp").stdout == "/tmp\n"
    slow = run(stubbed, machine, "sleep 30", timeout_seconds=0.5)
    assert slow.exit_status == 124
    assert slow.duration_ms < 5000
    much = run(stubbed, machine, "head -c 3000000 /dev/zero | tr '\\0' x")
    assert much.truncated
    assert len(much.stdout) == 1 << 20


def test_long_commands_hold_up_nobody(stubbed: Served) -> None:
    urls = [f"/machines/{spawn(stubbed).uuid}/exec" for _ in range(2)]
    limits = httpx2.Limits(max_connections=60)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(
        base_url=stubbed.http.base_url, headers=headers, limits=limits, timeout=60, trust_env=False
    ) as http:
        with ThreadPoolExecutor(48) as pool:
            slow = [pool.submit(http.post, urls[i % 2], json={"argv": ["sleep", "5"]}) for i in range(48)]
            time.sleep(2)
            start = time.monotonic()
            assert stubbed.get("/projects").status_code == 200
            assert time.monotonic() - start < 1
            assert {future.result().text.split(",")[0] for future in slow} == {'{"exit_status":0'}


def test_checkpoints_are_made_compared_branched_and_waited_for(stubbed: Served) -> None:
    machine = spawn(stubbed)
    run(stubbed, machine, "echo one > a; mkdir src; echo x > src/x")
    first = stubbed.post(f"/machines/{machine.uuid}/checkpoint", {"label": "a"}, wait=120).json()
    assert first["status"] == "ready", first
    assert first["proxmox_snapshot_id"] == f"av-{first['uuid']}"
    shown = stubbed.get(f"/machines/{machine.uuid}").json()
    assert (shown["status"], shown["last_checkpoint_uuid"], shown["checkpoint_count"]) == ("active", first["uuid"], 1)
    run(stubbed, machine, "echo two > a; rm src/x; echo y > src/y")
    # exec while it is being checkpointed waits, and runs afterwards
    second = stubbed.post(f"/machines/{machine.uuid}/checkpoint", {"label": "b"}).json()
    assert run(stubbed, machine, "cat a").stdout == "two\n"
    second = stubbed.get(f"/checkpoints/{second['uuid']}", wait=120).json()
    assert (second["status"], second["parent_uuid"]) == ("ready", first["uuid"])
    diff = stubbed.get(f"/checkpoints/{first['uuid']}/diff/{second['uuid']}").json()
    assert [entry["path"] for entry in diff["added"]] == ["/workspace/src/y"]
    assert [entry["path"] for entry in diff["deleted"]] == ["/workspace/src/x"]
    assert [entry["path"] for entry in diff["modified"]] == ["/workspace/a"]
    manifest = stubbed.get(f"/checkpoints/{second['uuid']}", include="manifest", path="/workspace").json()["manifest"]
    assert {"/workspace/a", "/workspace/src", "/workspace/src/y"} <= set(manifest)
    branch = stubbed.post(f"/checkpoints/{first['uuid']}/spawn", {}, wait=120).json()
    assert branch["status"] == "active", branch
    assert run(stubbed, schemas.Machine(**branch), "cat a src/x; ls src").stdout == "one\nx\nx\n"
    ended = stubbed.post(f"/machines/{branch['uuid']}/terminate", {"create_checkpoint": True}, wait=120).json()
    assert ended["status"] == "terminated"
    final = stubbed.get(f"/checkpoints/{ended['final_checkpoint_uuid']}").json()
    assert (final["type"], final["status"]) == ("final", "ready")
    again = stubbed.post(f"/machines/{branch['uuid']}/terminate").json()
    assert again["final_checkpoint_uuid"] == final["uuid"]
    heir = stubbed.post(f"/checkpoints/{final['uuid']}/spawn", {}, wait=120).json()
    assert heir["status"] == "active", heir
    assert run(stubbed, schemas.Machine(**heir), "cat a").stdout == "one\n"


def test_output_beyond_the_limit_is_not_kept(stubbed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "KEPT_BYTES", 100_000)
    machine = spawn(stubbed, "finished", prompt="head -c 300000 /dev/zero | tr '\\0' y; sleep 1; echo the end")
    assert (machine.status, machine.exit_status) == ("active", 0)
    chunk = stubbed.get(f"/machines/{machine.uuid}/logs").json()
    assert chunk["finished"]
    assert chunk["text"].startswith("y" * 100_000 + "\n[autovibe: ")
    assert "the end" not in chunk["text"]


def test_a_prompt_whose_hub_was_away_is_taken_up_again(stubbed: Served) -> None:
    machine = spawn(stubbed, prompt="for i in 1 2 3 4 5 6; do echo $i; sleep 0.5; done")
    stubbed.change(machine.uuid, watched_by="a-dead-hub", watched_until=None)
    ended = stubbed.get(f"/machines/{machine.uuid}", wait_for="finished", wait=60).json()
    assert ended["exit_status"] == 0
    assert stubbed.get(f"/machines/{machine.uuid}/logs").json()["text"] == "1\n2\n3\n4\n5\n6\n"
    assert stubbed.row(Machine, machine.uuid).watched_by is None


def test_what_was_accepted_and_not_started_is_started(stubbed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between commit and start."""
    body = {"project_uuid": str(project(stubbed).uuid)}
    with monkeypatch.context() as patched:
        patched.setattr(stubbed.hub.workflows, "start_soon", lambda *_: None)
        machine = stubbed.post("/machines", body).json()
    assert stubbed.get(f"/operations/{machine['operation_uuid']}").json()["status"] == "accepted"
    assert stubbed.get(f"/machines/{machine['uuid']}", wait=60).json()["status"] == "active"


def test_a_terminate_reaches_a_machine_that_spawns(stubbed: Served) -> None:
    machine = stubbed.post("/machines", {"project_uuid": str(project(stubbed).uuid)}).json()
    ended = stubbed.post(f"/machines/{machine['uuid']}/terminate", {"reason": "never mind"}, wait=60).json()
    assert ended["status"] == "terminated"
    operation = stubbed.get(f"/operations/{machine['operation_uuid']}", wait=60).json()
    assert operation["status"] == "failed"


def test_ten_at_once_wait_together(stubbed: Served) -> None:
    body = {"project_uuid": str(project(stubbed).uuid)}
    with ThreadPoolExecutor(10) as pool:
        made = list(pool.map(lambda _: stubbed.post("/machines", body, wait=200).json(), range(10)))
    assert {machine["status"] for machine in made} == {"active"}, made
    assert len({machine["vmid"] for machine in made}) == 10
    with ThreadPoolExecutor(10) as pool:
        ended = list(pool.map(lambda m: stubbed.post(f"/machines/{m['uuid']}/terminate", wait=200).json(), made))
    assert {machine["status"] for machine in ended} == {"terminated"}


def test_a_follower_sees_a_machine_end_that_never_finished(stubbed: Served) -> None:
    machine = spawn(stubbed, prompt="echo begun; sleep 300")
    until(lambda: stubbed.row(Machine, machine.uuid).output_bytes)
    threading.Timer(1, stubbed.post, (f"/machines/{machine.uuid}/terminate",)).start()
    with stubbed.http.stream("GET", f"/machines/{machine.uuid}/logs", params={"follow": 1}) as answer:
        assert "".join(answer.iter_text()) == "begun\n"
    assert stubbed.row(Machine, machine.uuid).status == MachineStatus.terminated
