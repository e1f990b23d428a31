"""One Intelligent Machine after another on real guests: what the demo shows, and what a crash must not break."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import Autovibe

pytestmark = pytest.mark.guest

PROMPT = """set -eu
echo building
mkdir -p site && cd site
git init -q . && echo 'print("hello")' > hello.py && python3 hello.py
"""


def wait_for(autovibe: Autovibe, machine: str, *statuses: str, seconds: float = 240) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found: dict[str, Any] = autovibe.json("machine", "show", machine)
        if found["status"] in statuses:
            return found
        assert found["status"] != "failed" or "failed" in statuses, found["error_message"]
        time.sleep(1)
    raise AssertionError(f"{machine} is {found['status']}, not one of {statuses}, after {seconds} s: {found}")


def hub_pid(autovibe: Autovibe) -> int:
    return int(autovibe.json("status")["hub"]["pid"])


def kill_hub(autovibe: Autovibe) -> None:
    """kill -9; `up` supervises and starts it again."""
    old = hub_pid(autovibe)
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = json.loads(autovibe.run("status", "--json", check=False).stdout)
        if status["hub"].get("pid") not in (None, old) and status["hub"].get("health") == "healthy":
            return
        time.sleep(0.5)
    raise AssertionError(f"the hub did not come back: {status}")


def operation(autovibe: Autovibe, uuid: str) -> dict[str, Any]:
    from autovibe import Client

    key = (autovibe.home / "credentials").read_text().strip()
    client = Client(url=f"http://127.0.0.1:{autovibe.hub_port}", api_key=key)
    found: dict[str, Any] = client.operations.get(uuid).model_dump(mode="json")
    return found


def wait_for_step(autovibe: Autovibe, uuid: str, step: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = operation(autovibe, uuid)
        if found["step"] == step:
            return
        assert found["status"] in ("accepted", "running"), f"ended before '{step}': {found}"
        time.sleep(0.05)
    raise AssertionError(f"'{step}' was not reached: {found}")


def test_a_machine_is_checkpointed_compared_and_branched(autovibe: Autovibe) -> None:
    project = autovibe.json("project", "create", "first-light")
    machine = autovibe.json(
        "machine", "spawn", "--project", "first-light", "--name", "one", "--prompt", PROMPT, "--detach"
    )
    assert machine["status"] == "spawning"
    wait_for_step(autovibe, machine["operation_uuid"], "reach")
    kill_hub(autovibe)  # kill -9 while the guest boots: the spawn goes on

    done = wait_for(autovibe, "one", "active")
    assert done["exit_status"] == 0
    logs = autovibe.run("machine", "logs", "one").stdout
    assert "building" in logs
    assert "hello" in logs

    first = autovibe.json("machine", "checkpoint", "one", "--label", "A")
    assert first["status"] == "ready"
    assert first["file_count"] > 100
    write = "mkdir -p site/more && echo b > site/more/b.txt && rm site/hello.py"
    assert autovibe.json("machine", "exec", "one", "--script", write)["exit_status"] == 0
    second = autovibe.json("machine", "checkpoint", "one", "--label", "B")
    changes = autovibe.json("checkpoint", "diff", first["uuid"], second["uuid"])
    assert [entry["path"] for entry in changes["deleted"]] == ["/workspace/site/hello.py"]
    assert {entry["path"] for entry in changes["added"]} == {"/workspace/site/more", "/workspace/site/more/b.txt"}

    branch = autovibe.json("checkpoint", "spawn", first["uuid"], "--name", "two")
    assert branch["checkpoint_uuid"] == first["uuid"]
    wait_for(autovibe, "two", "active")
    assert autovibe.json("machine", "exec", "two", "--", "ls", "/workspace/site")["stdout"].split() == ["hello.py"]
    identities = {
        name: autovibe.json(
            "machine",
            "exec",
            name,
            "--",
            "cat",
            "/etc/hostname",
            "/etc/machine-id",
            "/etc/ssh/ssh_host_ed25519_key.pub",
        )["stdout"].split()
        for name in ("one", "two")
    }
    assert not set(identities["one"][:2] + identities["one"][3:4]) & set(identities["two"])

    ended = autovibe.json("machine", "terminate", "two")
    assert ended["status"] == "terminated"

    # One step of a checkpoint and of a terminate is cut by kill -9 as well.
    from autovibe import Client

    key = (autovibe.home / "credentials").read_text().strip()
    client = Client(url=f"http://127.0.0.1:{autovibe.hub_port}", api_key=key)
    third = client.machines.checkpoint(machine["uuid"], label="C")
    kill_hub(autovibe)
    finished = client.operations.wait(third.operation_uuid, timeout_seconds=120)
    assert finished.status == "succeeded", finished.error
    listed = autovibe.json("checkpoint", "list", "--project", project["uuid"])
    assert [item["label"] for item in listed["checkpoints"] if item["status"] == "ready"][:3] == ["C", "B", "A"]

    ending = client.machines.terminate(machine["uuid"])
    kill_hub(autovibe)
    client.operations.wait(ending.operation_uuid, timeout_seconds=120)
    assert wait_for(autovibe, machine["uuid"], "terminated")["terminated_at"]


def test_three_machines_at_once(autovibe: Autovibe) -> None:
    autovibe.run("project", "create", "three")
    names = ["three-1", "three-2", "three-3"]
    with ThreadPoolExecutor(3) as pool:
        spawned = list(
            pool.map(
                lambda name: autovibe.json("machine", "spawn", "--project", "three", "--name", name, timeout=420), names
            )
        )
    assert [machine["status"] for machine in spawned] == ["active"] * 3
    assert len({machine["vmid"] for machine in spawned}) == 3
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda name: autovibe.json("machine", "terminate", name), names))
    assert [machine["status"] for machine in ended] == ["terminated"] * 3
