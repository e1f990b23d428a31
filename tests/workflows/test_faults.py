"""What real clusters do to their clients, done to the Hub: it gets over it, or fails clearly and leaves nothing.

The faults are those of autovibe/node/http/faults.py, on a stub node of this module's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.domain import Checkpoint, Machine
from autovibe.domain.checkpoint import snapshot_name
from tests.stub import node as stub_node
from tests.stub.node import StubNode
from tests.workflows.conftest import NOTHING, LiveHub

MakeHub = Callable[..., LiveHub]
Rules = Callable[..., None]
Rule = tuple[str, str, dict[str, Any], int]

VM = "/nodes/*/qemu/*"
LOCKED = "can't lock file '/var/lock/qemu-server/lock-9001.conf' - got timeout"


@pytest.fixture(scope="module")
def faults_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("faults") / "faults.json"
    found.write_text("{}")
    return found


@pytest.fixture(scope="module")
def faulty_node(faults_file: Path) -> Iterator[StubNode]:
    found = stub_node.start(faults=faults_file)
    yield found
    found.stop()


@pytest.fixture
def put(faults_file: Path) -> Iterator[Rules]:
    """Write rules `(method, path, what happens, how often)`; without any the node is sound again."""

    def write(*rules: Rule) -> None:
        table = [
            {"match": {"method": method, "path": path, "times": times}, "then": then}
            for method, path, then, times in rules
        ]
        new = faults_file.with_suffix(".new")
        new.write_text(json.dumps({"rules": table}))
        new.replace(faults_file)

    yield write
    write()


@pytest.fixture
def live(make_hub: MakeHub, faulty_node: StubNode, put: Rules) -> Iterator[LiveHub]:
    found = make_hub(node=faulty_node)
    yield found
    put()
    for machine in found.all(Machine):
        if machine.ended_at is None:
            found.terminated(machine.uuid)
    assert found.parts.close()


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not come to pass."
        time.sleep(0.05)


# What it gets over

# Each turn ends with a fault with which the call is carried out; those before it make the Hub call again.
TURNS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"drop": "before"}, {"drop": "after"}),
    ({"status": 596, "reason": "Broken pipe"}, {"truncate": 10}),
    ({"status": 595, "reason": "Connection refused"}, {"lock_timeout": True}, {"delay_seconds": 1}),
    ({"task_fails": LOCKED}, {"task_delay_seconds": 1}),
)


def turn(number: int, method: str, path: str, turns: tuple[tuple[dict[str, Any], ...], ...] = TURNS) -> list[Rule]:
    """One turn's faults, each once."""
    return [(method, path, then, 1) for then in turns[number % len(turns)]]


def test_a_life_gets_over_it(live: LiveHub, put: Rules) -> None:
    """From spawn to terminate, each round with other faults at each call."""
    before = live.inventory()
    for number in range(len(TURNS)):
        rules = [
            *turn(number, "POST", f"{VM}/clone"),
            *turn(number, "PUT", f"{VM}/config", TURNS[:3]),
            *turn(number + 1, "POST", f"{VM}/status/start"),
            *turn(number + 2, "POST", f"{VM}/status/stop"),
            *turn(number + 3, "DELETE", VM),
            *turn(number, "GET", "/nodes/*/qemu", TURNS[:2]),
            *turn(number + 1, "GET", "/nodes/*/tasks/**", TURNS[:2]),
        ]
        put(*rules)
        operation = live.await_end(live.spawn().uuid)
        assert (operation.status, operation.error) == ("succeeded", None), rules
        machine = live.get(Machine, operation.object_uuid)
        assert machine.status == "active"
        operation = live.await_end(live.terminate(machine.uuid).uuid)
        assert (operation.status, operation.error) == ("succeeded", None), rules
        assert live.get(Machine, machine.uuid).status == "terminated"
        put()
        assert live.inventory() - before == NOTHING, rules


def test_a_lock_that_stays_for_a_while(live: LiveHub, put: Rules) -> None:
    put(("POST", f"{VM}/clone", {"lock_timeout": True}, 6), ("POST", f"{VM}/status/start", {"lock_timeout": True}, 6))
    assert live.spawned().status == "active"


def test_a_race_for_a_vmid_in_a_cluster_that_lags(live: LiveHub, put: Rules) -> None:
    """Somebody else's VM has the id, the list of the cluster is ten seconds old, and nextid lies."""
    before = live.inventory()
    put(
        ("GET", "/cluster/resources", {"lag_seconds": 10}, 99),
        ("GET", "/cluster/nextid", {"nextid_taken": True}, 99),
        ("POST", f"{VM}/clone", {"vmid_taken": True}, 3),
    )
    machines = [live.spawned() for _ in range(2)]
    assert len({machine.vmid for machine in machines}) == 2
    assert (live.inventory() - before).allotments == {machine.vmid for machine in machines}
    for machine in machines:
        live.terminated(machine.uuid)
    assert live.inventory() - before == NOTHING


def test_a_checkpoint_gets_over_it(live: LiveHub, put: Rules) -> None:
    machine = live.spawned()
    taken = set()
    for number in range(len(TURNS)):
        rules = [*turn(number, "POST", f"{VM}/snapshot"), *turn(number, "GET", f"{VM}/snapshot", TURNS[:2])]
        put(*rules)
        operation = live.await_end(live.checkpoint(machine.uuid).uuid)
        assert (operation.status, operation.error) == ("succeeded", None), rules
        assert live.get(Checkpoint, operation.object_uuid).status == "ready"
        taken.add(snapshot_name(operation.object_uuid))
        put()
        assert machine.vmid is not None
        assert set(live.inventory().vms[machine.vmid]) == taken, rules
        assert live.get(Machine, machine.uuid).status == "active"


# What makes it fail, with the reason, and nothing left behind

NO_SPACE = "unable to create image: No space left on device"
SPAWN_FAILS = [
    ("POST", f"{VM}/clone", {"task_fails": NO_SPACE}, NO_SPACE),
    ("POST", f"{VM}/clone", {"status": 500, "reason": "storage 'local-lvm' is not online"}, "is not online"),
    ("POST", f"{VM}/clone", {"status": 403, "reason": "Permission check failed (/vms/9001, VM.Clone)"}, "VM.Clone"),
    ("PUT", f"{VM}/config", {"status": 400, "reason": "bad", "errors": {"ciuser": "is odd"}}, "ciuser: is odd"),
    ("POST", f"{VM}/status/start", {"task_fails": "start failed: QEMU exited with code 1"}, "exited with code 1"),
    ("POST", f"{VM}/status/start", {"status": 401, "reason": "Authentication failed!"}, "is the API token right?"),
]


def test_a_spawn_that_cannot_succeed_says_why(live: LiveHub, put: Rules) -> None:
    before = live.inventory()
    for method, path, then, reason in SPAWN_FAILS:
        put((method, path, then, 1))
        operation = live.await_end(live.spawn().uuid)
        machine = live.get(Machine, operation.object_uuid)
        assert (operation.status, machine.status) == ("failed", "failed"), then
        assert reason in str(machine.error_message), then
        put()
        assert live.inventory() - before == NOTHING, then
    live.terminated(live.spawned().uuid)


def test_a_cleanup_that_meets_faults_itself(live: LiveHub, put: Rules) -> None:
    before = live.inventory()
    """What is still to be undone is undone when the API answers again, after the machine has failed."""
    for number in range(len(TURNS)):
        put(
            ("POST", f"{VM}/status/start", {"task_fails": "start failed: QEMU exited with code 1"}, 1),
            *turn(number, "POST", f"{VM}/status/stop"),
            *turn(number, "DELETE", VM),
        )
        operation = live.await_end(live.spawn().uuid)
        assert operation.status == "failed"
        assert "exited with code 1" in str(operation.error)
        failed = operation.object_uuid
        eventually(lambda uuid=failed: live.get(Machine, uuid).progress == "")  # type: ignore[misc]
        put()
        assert live.inventory() - before == NOTHING, number


def test_a_checkpoint_that_fails_gives_the_machine_back(live: LiveHub, put: Rules) -> None:
    machine = live.spawned()
    before = live.inventory()
    for then in ({"task_fails": NO_SPACE}, {"status": 500, "reason": NO_SPACE}):
        put(("POST", f"{VM}/snapshot", then, 1))
        operation = live.await_end(live.checkpoint(machine.uuid).uuid)
        assert (operation.status, live.inventory() - before) == ("failed", NOTHING)
        assert NO_SPACE in str(live.get(Checkpoint, operation.object_uuid).error_message)
        assert live.get(Machine, machine.uuid).status == "active"


def test_a_terminate_that_fails_can_be_asked_for_again(live: LiveHub, put: Rules) -> None:
    before = live.inventory()
    for method, path in (("POST", f"{VM}/status/stop"), ("DELETE", VM)):
        machine = live.spawned()
        put((method, path, {"status": 500, "reason": "the disk is on fire"}, 1))
        operation = live.await_end(live.terminate(machine.uuid).uuid)
        assert operation.status == "failed"
        assert "the disk is on fire" in str(live.get(Machine, machine.uuid).error_message)
        live.terminated(machine.uuid)
        assert live.inventory() - before == NOTHING
