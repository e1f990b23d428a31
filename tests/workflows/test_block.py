"""Block and resume on the stub node: each step twice, a failure at each step, and what becomes of the machine.

What differs between databases is the store and the engine, which have tests of their own; so most run on one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlmodel import select

from autovibe.domain import Account, Checkpoint, Machine, Operation, Reservation
from autovibe.domain.checkpoint import snapshot_name
from autovibe.errors import HypervisorUnavailable, LimitExceeded, OperationFailed, Unauthorized
from autovibe.guest import Address, agent
from autovibe.hub import blocking, metering
from autovibe.hypervisor import Proxmox, change, read
from autovibe.workflows import block, steps_of
from tests.workflows.conftest import ACTOR, LiveHub
from tests.workflows.test_steps import Fault, eventually, rewrite, run_in, twice

MakeHub = Callable[..., LiveHub]

LIMIT = {"scope": "machine", "resource": "money", "period": "life", "limit_micros": 1}


def begin_block(live: LiveHub, machine: UUID) -> Operation:
    assert blocking.block(live.hub, machine, LimitExceeded("It has used what it may.", details=LIMIT))
    return max(live.all(Operation, object_uuid=machine, kind="block"), key=lambda found: found.created_at)


def blocked(live: LiveHub, machine: UUID) -> Machine:
    operation = live.await_end(begin_block(live, machine).uuid)
    assert operation.status == "succeeded", operation.error
    return live.get(Machine, machine)


def begin_resume(live: LiveHub, machine: UUID) -> Operation:
    blocking.resume(live.hub, ACTOR, machine)
    return max(live.all(Operation, object_uuid=machine, kind="resume"), key=lambda found: found.created_at)


def is_running(live: LiveHub, machine: Machine) -> bool:
    assert machine.vmid is not None
    vm = read.find_vm(live.proxmox, machine.vmid)
    return vm is not None and vm.is_running


def snapshots(live: LiveHub, machine: Machine) -> set[str]:
    assert machine.vmid is not None
    return {found.name for found in read.snapshots(live.proxmox, machine.vmid)}


def open_reservations(live: LiveHub, machine: UUID) -> set[UUID]:
    with live.store.reading() as session:
        found = session.exec(select(Reservation).where(Reservation.machine_uuid == machine)).all()
    return {row.uuid for row in found if row.closed_at is None}


def require_sound_accounts(live: LiveHub, machine: Machine) -> None:
    """Without an open reservation nothing is reserved in any of its accounts."""
    with live.store.reading() as session:
        accounts = session.exec(select(Account)).all()
    of_it = [row for row in accounts if row.owner_uuid in (machine.uuid, machine.project_uuid)]
    assert of_it
    assert all(row.reserved_micros == 0 for row in of_it)


def require_blocked(live: LiveHub, uuid: UUID) -> Machine:
    machine = live.get(Machine, uuid)
    assert (machine.status, machine.metered_at, machine.reservation_uuid) == ("budget_blocked", None, None)
    assert machine.blocked is not None
    assert machine.blocked["reason"] == "It has used what it may."
    assert not is_running(live, machine)
    assert open_reservations(live, uuid) == set()
    require_sound_accounts(live, machine)
    return machine


def test_every_step_may_be_repeated(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("block", "resume"):
        rewrite(monkeypatch, kind, twice)
    live = make_hub()
    machine = live.spawned(file_modifications={"/workspace/a": "here"})
    blocked(live, machine.uuid)
    after = require_blocked(live, machine.uuid)
    checkpoint = live.all(Checkpoint, machine_uuid=machine.uuid)[0]
    assert (checkpoint.status, checkpoint.type, checkpoint.details["trigger"]) == ("ready", "automatic", "budget")
    assert checkpoint.file_count > 0
    assert after.last_checkpoint_uuid == checkpoint.uuid
    assert after.blocked is not None
    assert snapshots(live, machine) == {snapshot_name(checkpoint.uuid), after.blocked["ram"]}

    operation = live.await_end(begin_resume(live, machine.uuid).uuid)
    assert operation.status == "succeeded", operation.error
    resumed = live.get(Machine, machine.uuid)
    assert (resumed.status, resumed.blocked, resumed.resume_status) == ("active", None, None)
    assert resumed.metered_at is not None
    assert open_reservations(live, machine.uuid) == {resumed.reservation_uuid}
    assert run_in(live, resumed, "cat", "/workspace/a") == "here"
    assert snapshots(live, machine) == {snapshot_name(checkpoint.uuid)}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_failure_at_any_step_of_block_switches_off_nevertheless(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault()
    rewrite(monkeypatch, "block", fault.put)
    live = make_hub()
    for step in steps_of("block")[:-1]:
        fault.step = ""
        machine = live.spawned()
        fault.step = step
        operation = live.await_end(begin_block(live, machine.uuid).uuid)
        assert operation.error is not None, step
        assert operation.error["message"] == f"Fault at '{step}'."
        after = require_blocked(live, machine.uuid)
        checkpoint = live.all(Checkpoint, machine_uuid=machine.uuid)[0]
        is_made = step in ("record", "keep", "stop")
        assert checkpoint.status == ("ready" if is_made else "failed"), step
        assert (snapshot_name(checkpoint.uuid) in snapshots(live, after)) == is_made, step
        fault.step = ""
        assert live.await_end(begin_resume(live, machine.uuid).uuid).status == "succeeded", step
        live.terminated(machine.uuid)
        eventually(lambda uuid=machine.uuid: open_reservations(live, uuid) == set())  # type: ignore[misc]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_failure_at_any_step_of_resume_leaves_it_blocked_and_it_can_be_resumed(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault()
    rewrite(monkeypatch, "resume", fault.put)
    live = make_hub()
    machine = live.spawned()
    blocked(live, machine.uuid)
    for step in steps_of("resume")[:-1]:
        fault.step = step
        operation = live.await_end(begin_resume(live, machine.uuid).uuid)
        assert operation.error is not None, step
        assert operation.error["message"] == f"Fault at '{step}'."
        require_blocked(live, machine.uuid)
    fault.step = ""
    assert live.await_end(begin_resume(live, machine.uuid).uuid).status == "succeeded"
    assert live.get(Machine, machine.uuid).status == "active"


# What fails on its own


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_checkpoint_that_fails_does_not_keep_the_limit_from_holding(
    live: LiveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OperationFailed("The disk is on fire.")

    machine = live.spawned()
    monkeypatch.setattr("autovibe.workflows.checkpoint.guest_scan.scan", fail)
    blocked(live, machine.uuid)
    after = require_blocked(live, machine.uuid)
    checkpoint = live.all(Checkpoint, machine_uuid=machine.uuid)[0]
    assert (checkpoint.status, checkpoint.error_message) == ("failed", "The disk is on fire.")
    assert after.blocked is not None
    assert snapshots(live, machine) == {after.blocked["ram"]}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_guest_that_is_not_held_still_is_checkpointed_again_and_then_not(
    live: LiveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def check(_guests: Any, _address: Address, token: str) -> bool:
        asked.append(token)
        return len(asked) == 2

    monkeypatch.setattr("autovibe.workflows.block.guest_scan.check", check)
    machine = live.spawned()
    operation = begin_block(live, machine.uuid)
    assert live.await_end(operation.uuid).status == "succeeded"
    assert asked == [f"{operation.uuid}-0", f"{operation.uuid}-1"]
    first = live.all(Checkpoint, machine_uuid=machine.uuid)[0]
    after = require_blocked(live, machine.uuid)
    assert after.blocked is not None
    assert (first.status, after.blocked["token"]) == ("ready", f"{operation.uuid}-1")

    asked.extend(["", ""])
    assert live.await_end(begin_resume(live, machine.uuid).uuid).status == "succeeded"
    blocked(live, machine.uuid)
    after = require_blocked(live, machine.uuid)
    assert sorted(row.status for row in live.all(Checkpoint, machine_uuid=machine.uuid)) == ["failed", "ready"]
    assert after.last_checkpoint_uuid == first.uuid
    assert after.blocked is not None
    assert snapshots(live, machine) == {snapshot_name(first.uuid), after.blocked["ram"]}


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_guest_that_does_not_freeze_in_time_is_paused_and_loses_nothing(
    live: LiveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[int] = []
    real = change.pause

    def pause(px: Proxmox, vmid: int) -> str | None:
        paused.append(vmid)
        return real(px, vmid)

    monkeypatch.setattr(block, "FREEZE_SECONDS", 0.0)
    monkeypatch.setattr(change, "pause", pause)
    machine = live.spawned()
    blocked(live, machine.uuid)
    after = require_blocked(live, machine.uuid)
    assert paused == [machine.vmid]
    checkpoint = live.all(Checkpoint, machine_uuid=machine.uuid)[0]
    assert checkpoint.status == "failed"
    assert "paused instead of frozen" in str(checkpoint.error_message)
    assert after.blocked is not None
    assert snapshots(live, machine) == {after.blocked["ram"]}
    assert live.await_end(begin_resume(live, machine.uuid).uuid).status == "succeeded"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_resumed_machine_does_not_wait_for_a_hypervisor_that_went_silent(
    live: LiveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise HypervisorUnavailable("The node does not answer.")

    machine = live.spawned()
    kept = blocked(live, machine.uuid)
    monkeypatch.setattr(block, "forget_ram", silent)
    assert live.await_end(begin_resume(live, machine.uuid).uuid).status == "succeeded"
    assert live.get(Machine, machine.uuid).status == "active"
    assert kept.operation_uuid is not None
    block.stop(live.hub.workflows.world, kept.operation_uuid)  # the undo of an operation that is over stops nothing
    assert is_running(live, machine)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_where_the_ram_cannot_be_kept_the_machine_boots_from_its_disks(
    live: LiveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(live.node.qemu, "save_state", refuse)
    machine = live.spawned(prompt="sleep 1000")
    blocked(live, machine.uuid)
    after = require_blocked(live, machine.uuid)
    assert after.blocked is not None
    assert "ram" not in after.blocked
    assert len(snapshots(live, machine)) == 1
    assert live.await_end(begin_resume(live, machine.uuid).uuid).status == "succeeded"
    eventually(lambda: live.get(Machine, machine.uuid).status == "active")
    resumed = live.get(Machine, machine.uuid)
    assert (resumed.exit_status, resumed.error_message) == (
        255,
        "The prompt was lost: its guest was restarted while it ran.",
    )


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_guest_near_its_limit_waits_for_the_word_to_freeze(live: LiveHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "FREEZER", "/workspace/freezer")
    monkeypatch.setattr(metering, "_NEAR_SECONDS", 1000.0)
    brakes = live.hub.workflows.world.brakes
    machine = live.spawned(prompt="sleep 1000")
    eventually(lambda: machine.uuid in brakes)
    monkeypatch.setattr(agent, "FREEZER", "/proc/none/freezer")  # so that only the brake can have done it
    monkeypatch.setattr(metering, "_NEAR_SECONDS", 0.0)
    eventually(lambda: machine.uuid not in brakes)
    assert run_in(live, machine, "sh", "-c", "ls /workspace/freezer 2>&1 || true").strip() != "/workspace/freezer"

    monkeypatch.setattr(agent, "FREEZER", "/workspace/freezer")
    monkeypatch.setattr(metering, "_NEAR_SECONDS", 1000.0)
    eventually(lambda: machine.uuid in brakes)
    monkeypatch.setattr(agent, "FREEZER", "/proc/none/freezer")
    blocked(live, machine.uuid)
    assert machine.uuid not in brakes
    assert live.await_end(begin_resume(live, machine.uuid).uuid).status == "succeeded"
    assert run_in(live, live.get(Machine, machine.uuid), "cat", "/workspace/freezer") == "1\n"


# A machine's own key


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_machine_has_a_key_of_its_own_until_it_ends(live: LiveHub) -> None:
    machine = live.spawned(prompt='echo "$AUTOVIBE_MACHINE_KEY_FILE" > /workspace/told')
    eventually(lambda: live.get(Machine, machine.uuid).finished_at is not None)
    file = run_in(live, machine, "cat", "/workspace/told").strip()
    key = run_in(live, machine, "cat", file).strip()
    assert run_in(live, machine, "stat", "-c", "%a", file).strip() == "600"
    actor = live.hub.keys.authenticate(key)
    assert (actor.role, actor.machine_uuid, actor.project_uuid) == ("machine", machine.uuid, machine.project_uuid)
    live.terminated(machine.uuid)
    live.hub.keys.forget(actor.key_id)
    with pytest.raises(Unauthorized):
        live.hub.keys.authenticate(key)


# What can be done with a blocked machine


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_its_checkpoint_can_be_spawned_from_and_it_can_be_terminated(live: LiveHub) -> None:
    before = live.inventory()
    machine = live.spawned(file_modifications={"/workspace/a": "here"})
    after = blocked(live, machine.uuid)
    assert after.last_checkpoint_uuid is not None
    branch = live.spawned(checkpoint_uuid=after.last_checkpoint_uuid)
    assert run_in(live, branch, "cat", "/workspace/a") == "here"
    live.terminated(branch.uuid)

    ended = live.terminated(machine.uuid, create_checkpoint=True)
    assert (ended.status, ended.final_checkpoint_uuid) == ("terminated", after.last_checkpoint_uuid)
    assert (live.inventory() - before).vms == {machine.vmid: (snapshot_name(after.last_checkpoint_uuid),)}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_blocked_machine_without_checkpoints_leaves_nothing(live: LiveHub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = live.inventory()
    monkeypatch.setattr(block, "FREEZE_SECONDS", 0.0)
    machine = live.spawned()
    blocked(live, machine.uuid)
    assert live.terminated(machine.uuid).status == "terminated"
    made = live.inventory() - before
    assert (made.vms, made.volumes, made.allotments) == ({}, frozenset(), frozenset())


@pytest.mark.parametrize("kind", ["block", "resume"])
def test_a_terminate_waits_for_it(live: LiveHub, kind: str) -> None:
    machine = live.spawned()
    if kind == "resume":
        blocked(live, machine.uuid)
    operation = (begin_block if kind == "block" else begin_resume)(live, machine.uuid)
    assert live.terminated(machine.uuid).status == "terminated"
    assert live.get(Operation, operation.uuid).status == "succeeded"
    assert open_reservations(live, machine.uuid) == set()
