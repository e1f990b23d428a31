"""The product's own tables on the stub node: each step twice, a failure at each step, and what the world does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest

from autovibe import workflows
from autovibe.domain import Allotment, Checkpoint, Machine, Operation, Project
from autovibe.domain.checkpoint import snapshot_name
from autovibe.errors import NotYet, OperationFailed
from autovibe.guest import Address
from autovibe.hub import machines
from autovibe.hypervisor import change, read
from autovibe.node import serve
from autovibe.types import Entry
from autovibe.workflows import Step, Workflow, World, steps_of
from autovibe.workflows import spawn as spawning
from tests.stub import node as stub_node
from tests.stub.node import StubNode
from tests.workflows.conftest import NOTHING, LiveHub, make_project

MakeHub = Callable[..., LiveHub]


def rewrite(monkeypatch: pytest.MonkeyPatch, kind: str, change_step: Callable[[Step], Step]) -> None:
    """Have the hubs made from now on carry out changed steps of that kind."""
    table = workflows.WORKFLOWS[kind]
    steps = tuple(change_step(step) for step in table.steps)
    monkeypatch.setitem(workflows.WORKFLOWS, kind, Workflow(steps, table.fail, table.heeds_wanted))


def twice(step: Step) -> Step:
    def again(do: workflows.engine.Do) -> workflows.engine.Do:
        def do_twice(world: World, operation_uuid: UUID) -> None:
            do(world, operation_uuid)
            while True:
                try:
                    return do(world, operation_uuid)
                except NotYet:
                    time.sleep(0.1)

        return do_twice

    return dataclasses.replace(step, do=again(step.do), undo=again(step.undo) if step.undo else None)


class Fault:
    """Fails the step of that name after it has done its work, until told otherwise."""

    def __init__(self) -> None:
        self.step = ""

    def put(self, step: Step) -> Step:
        def do(world: World, operation_uuid: UUID) -> None:
            step.do(world, operation_uuid)
            if step.name == self.step:
                raise OperationFailed(f"Fault at '{step.name}'.")

        return dataclasses.replace(step, do=do)


def address_of(live: LiveHub, machine: Machine) -> Address:
    assert machine.address is not None
    assert machine.port is not None
    assert machine.host_key is not None
    return Address(machine.address, machine.port, live.hub.guest_user, machine.host_key)


def run_in(live: LiveHub, machine: Machine, *argv: str) -> str:
    result = live.hub.guests.exec(address_of(live, machine), list(argv))
    assert result.exit_status == 0, result.stderr
    return result.stdout.decode()


def entries_of(live: LiveHub, checkpoint: Checkpoint) -> dict[str, Entry]:
    assert checkpoint.root_digest is not None
    found = live.hub.trees.entries(checkpoint.root_digest, checkpoint.times_digest)
    return {entry.path.decode(): entry for entry in found}


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not come to pass."
        time.sleep(0.05)


# Each step twice


def test_every_step_may_be_repeated(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("spawn", "checkpoint", "terminate"):
        rewrite(monkeypatch, kind, twice)
    live = make_hub()
    before = live.inventory()
    machine = live.spawned(prompt="echo once >> /workspace/runs", file_modifications={"/workspace/a": "here"})
    eventually(lambda: live.get(Machine, machine.uuid).status == "active")
    assert run_in(live, machine, "cat", "/workspace/runs", "/workspace/a") == "once\nhere"
    made = live.inventory() - before
    assert (made.vms, made.reservations) == ({machine.vmid: ()}, {machine.reservation_uuid})
    assert machine.metered_at is not None

    operation = live.await_end(live.checkpoint(machine.uuid, label="A").uuid)
    assert operation.status == "succeeded", operation.error
    assert (live.inventory() - before).vms == {machine.vmid: (snapshot_name(operation.object_uuid),)}

    other = live.spawned()
    live.terminated(other.uuid)
    ended = live.terminated(machine.uuid, create_checkpoint=True)
    checkpoints = live.all(Checkpoint, machine_uuid=machine.uuid)
    assert {row.status for row in checkpoints} == {"ready"}
    assert len(checkpoints) == 2
    made = live.inventory() - before
    assert {vmid: set(names) for vmid, names in made.vms.items()} == {
        ended.vmid: {snapshot_name(row.uuid) for row in checkpoints}
    }
    assert (made.allotments, made.reservations) == ({ended.vmid}, frozenset())
    assert (ended.metered_at, ended.reservation_uuid) == (None, None)


# A failure at each step


def test_a_failure_at_any_step_of_spawn_leaves_nothing(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault()
    rewrite(monkeypatch, "spawn", fault.put)
    live = make_hub()
    before = live.inventory()
    for step in steps_of("spawn")[:-1]:
        fault.step = step
        operation = live.await_end(live.spawn(prompt="sleep 60").uuid)
        assert operation.error is not None, step
        assert operation.error["message"] == f"Fault at '{step}'."
        machine = live.get(Machine, operation.object_uuid)
        assert (machine.status, machine.error_message) == ("failed", f"Fault at '{step}'.")
        assert machine.ended_at is not None
        assert live.inventory() - before == NOTHING, step
    fault.step = ""
    assert live.spawned().vmid is not None  # and all is as it was


def test_a_failure_at_any_step_of_a_checkpoint_gives_the_machine_back(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault()
    rewrite(monkeypatch, "checkpoint", fault.put)
    live = make_hub()
    machine = live.spawned()
    before = live.inventory()
    for step in steps_of("checkpoint")[:-1]:
        fault.step = step
        operation = live.await_end(live.checkpoint(machine.uuid, label="again").uuid)
        assert (operation.status, live.inventory() - before) == ("failed", NOTHING)
        checkpoint = live.get(Checkpoint, operation.object_uuid)
        assert (checkpoint.status, checkpoint.error_message) == ("failed", f"Fault at '{step}'.")
        assert (checkpoint.root_digest, checkpoint.file_count, checkpoint.size_bytes) == (None, 0, 0)
        assert live.get(Machine, machine.uuid).status == "active"
    fault.step = ""
    assert live.await_end(live.checkpoint(machine.uuid, label="again").uuid).status == "succeeded"


def test_a_terminate_whose_checkpoint_fails_gives_the_machine_back(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault()
    rewrite(monkeypatch, "terminate", fault.put)
    live = make_hub()
    machine = live.spawned()
    before = live.inventory()
    fault.step = "snapshot"
    operation = live.await_end(live.terminate(machine.uuid, create_checkpoint=True).uuid)
    assert (operation.status, live.inventory() - before) == ("failed", NOTHING)
    given_back = live.get(Machine, machine.uuid)
    assert (given_back.status, given_back.wanted) == ("active", "running")
    assert machines.show_terminated(live.hub, machine.uuid)[1]  # nobody goes on waiting for it
    fault.step = ""
    operation = live.await_end(live.terminate(machine.uuid).uuid)
    assert operation.steps == ["take", "stop", "remove", "mark"]
    assert live.get(Machine, machine.uuid).status == "terminated"


def test_a_machine_that_failed_to_end_can_be_terminated_again(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault()
    rewrite(monkeypatch, "terminate", fault.put)
    live = make_hub()
    before = live.inventory()
    machine = live.spawned()
    fault.step = "stop"
    assert live.await_end(live.terminate(machine.uuid).uuid).status == "failed"
    failed = live.get(Machine, machine.uuid)
    assert (failed.status, failed.error_message) == ("failed", "Fault at 'stop'.")
    assert live.inventory() - before != NOTHING
    fault.step = ""
    assert live.terminated(machine.uuid, create_checkpoint=True).final_checkpoint_uuid is None
    assert live.inventory() - before == NOTHING


# What the world does to a spawn


def test_a_vmid_that_somebody_else_has_taken_is_replaced(live: LiveHub) -> None:
    first_free = live.hub.vmids.start
    foreign = uuid4()
    upid = change.create(live.proxmox, first_free, owner=foreign, name="foreign", memory=64)
    if upid:
        read.await_task(live.proxmox, upid)
    try:
        machine = live.spawned()
        assert machine.vmid != first_free
        assert [row.vmid for row in live.all(Allotment)] == [machine.vmid]
        assert read.owner(live.proxmox, first_free) == foreign
    finally:
        if upid := change.destroy(live.proxmox, first_free, owner=foreign):
            read.await_task(live.proxmox, upid)


def test_a_range_without_a_free_vmid_is_named(make_hub: MakeHub) -> None:
    live = make_hub(vmid_first=9100, vmid_last=9100)
    upid = change.create(live.proxmox, 9100, owner=uuid4(), name="foreign", memory=64)
    if upid:
        read.await_task(live.proxmox, upid)
    try:
        operation = live.await_end(live.spawn().uuid)
        assert operation.error is not None
        assert operation.error["code"] == "RESOURCE_LIMIT_EXCEEDED"
        assert "9100" in operation.error["message"]
        assert "vmid_last" in operation.error["message"]
        assert live.all(Allotment) == []
        assert read.find_vm(live.proxmox, 9100) is not None  # it was not ours to destroy
    finally:
        if upid := change.destroy(live.proxmox, 9100, owner=None):
            read.await_task(live.proxmox, upid)


def test_a_full_storage_is_noticed_before_anything_is_made(make_hub: MakeHub) -> None:
    live = make_hub()
    before = live.inventory()
    live.hub.workflows.world.min_free_bytes = 1 << 60
    operation = live.await_end(live.spawn().uuid)
    assert operation.error is not None
    assert operation.error["code"] == "INSUFFICIENT_SPACE"
    assert "min_free_gb" in operation.error["message"]
    assert live.inventory() - before == NOTHING


def test_a_guest_that_never_answers_is_given_up_with_what_is_known(
    make_hub: MakeHub, node: StubNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.qemu, "boot_seconds", 600.0)
    live = make_hub(boot_deadline_seconds=2.0)
    before = live.inventory()
    operation = live.await_end(live.spawn().uuid)
    assert operation.error is not None
    assert operation.error["code"] == "DEADLINE_EXCEEDED"
    machine = live.get(Machine, operation.object_uuid)
    message = str(machine.error_message)
    assert f"VM {machine.vmid} is running" in message
    assert f":{node.forward_port}" in message
    assert live.inventory() - before == NOTHING


def test_a_terminate_reaches_a_spawn(make_hub: MakeHub, node: StubNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.qemu, "boot_seconds", 600.0)
    live = make_hub(workers=1)  # so that the terminate has to give way
    before = live.inventory()
    spawn = live.spawn()
    eventually(lambda: live.get(Operation, spawn.uuid).step == "reach")
    ended = live.terminated(spawn.object_uuid, create_checkpoint=True)
    assert (ended.status, ended.error_message, ended.final_checkpoint_uuid) == ("terminated", None, None)
    assert live.await_end(spawn.uuid).status == "failed"
    assert live.inventory() - before == NOTHING


def test_a_guest_cannot_tell_another_machines_address_as_its_own(live: LiveHub) -> None:
    owner = live.spawned()
    other = Machine(name="other", type="shell", project_uuid=owner.project_uuid)
    assert owner.address is not None
    assert owner.port is not None
    with pytest.raises(NotYet, match=owner.name):
        spawning.require_own(live.hub.workflows.world, other, owner.address, owner.port)
    spawning.require_own(live.hub.workflows.world, owner, owner.address, owner.port)
    live.terminated(owner.uuid)
    spawning.require_own(live.hub.workflows.world, other, owner.address, owner.port)


def test_a_node_that_is_away_delays_the_cleanup_until_it_is_back(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stub_node.start()
    server = [own.server]

    def cut(step: Step) -> Step:
        def do(world: World, operation_uuid: UUID) -> None:
            step.do(world, operation_uuid)
            if step.name == "clone":
                server[0].stop()

        return dataclasses.replace(step, do=do)

    try:
        rewrite(monkeypatch, "spawn", cut)
        live = make_hub(node=own)
        live.hub.workflows.world.patience = 0.5
        before = live.inventory()
        operation = live.await_end(live.spawn().uuid)
        assert operation.error is not None
        assert operation.error["code"] == "HYPERVISOR_UNAVAILABLE"
        machine = live.get(Machine, operation.object_uuid)
        assert machine.status == "failed"
        assert "still to be undone" in machine.progress
        server[0] = serve(own.home, "127.0.0.1", own.port, name="autovibe", qemu=own.qemu, disks=own.disks)
        server[0].start()
        eventually(lambda: live.get(Machine, machine.uuid).progress == "", seconds=40)
        assert live.inventory() - before == NOTHING
        live.parts.close()
    finally:
        own.server = server[0]
        own.stop()


# What a machine is


def test_ten_machines_at_once(live: LiveHub) -> None:
    with ThreadPoolExecutor(10) as clients:
        operations = list(clients.map(lambda _: live.spawn(), range(10)))
    for operation in operations:
        ended = live.await_end(operation.uuid, seconds=120)
        assert ended.status == "succeeded", ended.error
    made = live.all(Machine)
    assert {machine.status for machine in made} == {"active"}
    assert len({machine.vmid for machine in made}) == len({machine.address for machine in made}) == 10
    assert len({machine.host_key for machine in made}) == 10


def test_files_are_placed_and_a_branch_has_its_origins(live: LiveHub) -> None:
    placed: dict[str, Any] = {
        "/workspace/text": "plain",
        "/workspace/tool": {"content_base64": "IyEvYmluL3NoCmVjaG8gcmFuCg==", "mode": "0755"},
    }
    machine = live.spawned(file_modifications=placed)
    assert run_in(live, machine, "/workspace/tool") == "ran\n"
    first = live.await_end(live.checkpoint(machine.uuid, label="A").uuid)
    run_in(live, machine, "sh", "-c", "echo later > /workspace/later; rm /workspace/text")
    second = live.await_end(live.checkpoint(machine.uuid, label="B").uuid)
    a, b = live.get(Checkpoint, first.object_uuid), live.get(Checkpoint, second.object_uuid)
    assert (b.parent_uuid, a.root_digest == b.root_digest) == (a.uuid, False)
    assert "/workspace/text" in entries_of(live, a)
    assert {"/workspace/later", "/workspace/tool"} <= set(entries_of(live, b))
    assert "/workspace/text" not in entries_of(live, b)
    assert 0 < b.unique_bytes < a.unique_bytes

    branch = live.spawned(checkpoint_uuid=a.uuid)
    assert run_in(live, branch, "sh", "-c", "cd /workspace; ls; cat text").split() == ["text", "tool", "plain"]
    assert branch.host_key != machine.host_key
    assert run_in(live, branch, "cat", "/etc/machine-id") != run_in(live, machine, "cat", "/etc/machine-id")


def test_the_projects_current_checkpoint_follows_a_machine_spawned_from_it(live: LiveHub) -> None:
    project = live.get(Project, live.project)
    follower, branch = live.spawned(), live.spawned()
    first = live.await_end(live.checkpoint(follower.uuid).uuid).object_uuid
    assert live.get(Project, project.uuid).current_checkpoint_uuid == first
    second = live.await_end(live.checkpoint(follower.uuid).uuid).object_uuid
    assert live.get(Project, project.uuid).current_checkpoint_uuid == second
    live.await_end(live.checkpoint(branch.uuid).uuid)  # came from the genesis, which is not the current one any more
    assert live.get(Project, project.uuid).current_checkpoint_uuid == second


def test_what_was_provisioned_is_not_provisioned_again(live: LiveHub) -> None:
    live.project = make_project(live.hub, is_provisioned=False)
    machine = live.spawned()
    assert run_in(live, machine, "ls", "-d", "/workspace") == "/workspace\n"
    operation = live.await_end(live.checkpoint(machine.uuid).uuid)
    checkpoint = live.get(Checkpoint, operation.object_uuid)
    assert str(checkpoint.provisioned_for).startswith("shell:")
    runs = live.hub.home / "hub" / "runs"
    before = sorted(runs.iterdir())
    live.spawned(checkpoint_uuid=checkpoint.uuid)
    assert sorted(runs.iterdir()) == before
