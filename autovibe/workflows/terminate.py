"""Terminate: a machine ends, after a last checkpoint where one is asked for; its VM goes, or stays to hold checkpoints.

It waits until the machine's other operation is over (a spawn backs out by itself, see `wanted`). A machine that has
ended already is no fault: every step then has nothing to do. Until the VM is stopped a failure gives the machine back:
who asked for a last checkpoint does not lose what it would have held, and can terminate without one. After that the
workflow goes on trying as long as the hypervisor does not answer.
"""

from __future__ import annotations

from uuid import UUID, uuid4

from sqlmodel import Session, col, select

from autovibe.domain import Checkpoint, Machine, Operation
from autovibe.domain.checkpoint import details_of
from autovibe.domain.columns import now
from autovibe.domain.machine import WANTED_RUNNING
from autovibe.errors import AutovibeError, NotYet
from autovibe.hypervisor import change
from autovibe.store import rows
from autovibe.store.keys import revoke_machine_keys
from autovibe.types import ArtefactKind, CheckpointStatus, CheckpointType, MachineStatus, OperationKind, OperationStatus
from autovibe.workflows import block, checkpoint, vms
from autovibe.workflows.engine import FOREVER, Do, Step, Workflow, end_in
from autovibe.workflows.world import World

HOLDER_TAG = "autovibe-checkpoints"
"""The tag of a stopped VM that is kept for its snapshots."""

_TAKEN_FROM = (MachineStatus.active, MachineStatus.working, MachineStatus.paused, MachineStatus.budget_blocked)
_BUSY = (MachineStatus.spawning, MachineStatus.checkpointing, MachineStatus.restoring)


def take(world: World, operation_uuid: UUID) -> None:
    """Make the machine `terminating`, which only this operation then leaves."""
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        # Held, or on PostgreSQL a checkpoint could be accepted between the look and the change.
        machine = rows.held(session, Machine, operation.object_uuid)
        status = machine.status
        if status in _TAKEN_FROM:
            machine.resume_status, machine.status = status, MachineStatus.terminating
            machine.operation_uuid, machine.updated_at = operation_uuid, now()
            session.add(machine)
            rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))
        is_taken = status not in _BUSY and not _is_other_terminating(session, operation)
        if is_taken and operation.order.get("create_checkpoint"):
            _create_checkpoint(session, operation, machine)
    if not is_taken:
        if vms.is_due(world, operation_uuid, 5.0):
            world.yield_turn()
        raise NotYet(f"machine '{machine.name}' is {status} and is terminated when that is over")


def _is_other_terminating(session: Session, operation: Operation) -> bool:
    """Whether an earlier terminate of the machine is not over."""
    statement = select(Operation).where(
        Operation.object_uuid == operation.object_uuid,
        Operation.kind == OperationKind.terminate,
        Operation.uuid != operation.uuid,
        Operation.status == OperationStatus.running,
        col(Operation.created_at) < operation.created_at,
    )
    return session.exec(statement).first() is not None


def _create_checkpoint(session: Session, operation: Operation, machine: Machine) -> None:
    """The row of the final checkpoint, unless the hub or an earlier call made it. A machine that never ran has none,
    and neither has one that ended before this operation's turn came. Of a blocked one, which is off, the checkpoint
    made at its limit is the final one.
    """
    is_off = machine.resume_status == MachineStatus.budget_blocked
    if is_off and (machine.blocked or {}).get("checkpoint_uuid") == str(machine.last_checkpoint_uuid):
        machine.final_checkpoint_uuid = machine.last_checkpoint_uuid
        session.add(machine)
    if is_off or machine.host_key is None or machine.status != MachineStatus.terminating:
        operation.order = {**operation.order, "create_checkpoint": False}
        operation.steps = [name for name in operation.steps if name not in CHECKPOINT_STEPS]
        session.add(operation)
        return
    named = checkpoint.checkpoint_uuid(operation) if "checkpoint_uuid" in operation.order else uuid4()
    if session.get(Checkpoint, named) is not None:
        return
    row = Checkpoint(
        uuid=named,
        project_uuid=machine.project_uuid,
        parent_uuid=machine.last_checkpoint_uuid or machine.checkpoint_uuid,
        machine_uuid=machine.uuid,
        type=CheckpointType.final,
        details=details_of(
            "terminate", machine, actor=operation.actor, reason=str(operation.order.get("reason") or "")
        ),
        operation_uuid=operation.uuid,
    )
    session.add(row)
    operation.order = {**operation.order, "checkpoint_uuid": str(named)}
    session.add(operation)


def _is_checkpointing(world: World, operation_uuid: UUID) -> bool:
    operation, _ = vms.machine_of(world, operation_uuid)
    return bool(operation.order.get("create_checkpoint"))


def _when_asked(do: Do) -> Do:
    def do_when_asked(world: World, operation_uuid: UUID) -> None:
        if _is_checkpointing(world, operation_uuid):
            do(world, operation_uuid)

    return do_when_asked


def record(world: World, operation_uuid: UUID) -> None:
    """The final checkpoint is ready."""
    unique_bytes = checkpoint.unique_bytes_of(world, operation_uuid)
    with world.store.transaction() as session:
        row, machine = checkpoint.make_ready(world, session, operation_uuid, unique_bytes)
        machine.final_checkpoint_uuid = row.uuid
        session.add(machine)
        rows.record(session, "checkpoint.status", row.uuid, row.project_uuid, status=row.status)


def stop(world: World, operation_uuid: UUID) -> None:
    _, machine = vms.machine_of(world, operation_uuid)
    if machine.status != MachineStatus.terminating or machine.vmid is None:
        return
    vmid = machine.vmid
    if machine.address and machine.port and machine.host_key:
        world.guests.forget(vms.address_of(world, machine))
    if vms.find_owned(world, vmid, machine.uuid) is not None:
        vms.run_task(world, operation_uuid, "stop", vmid, lambda: change.stop(world.proxmox, vmid))
    vms.settle(world, machine.uuid, "terminated")


def remove(world: World, operation_uuid: UUID) -> None:
    """Destroy the VM, unless a checkpoint lives in it."""
    _, machine = vms.machine_of(world, operation_uuid)
    if machine.status != MachineStatus.terminating or machine.vmid is None:
        return
    if _holds_checkpoints(world, machine.vmid):
        if vms.find_owned(world, machine.vmid, machine.uuid) is not None:
            block.forget_ram(world, operation_uuid, machine.vmid)
            change.configure(world.proxmox, machine.vmid, tags=HOLDER_TAG)
        return
    vms.remove(world, operation_uuid, machine.vmid, machine.uuid)
    vms.release_vmids(world, machine.uuid)


def _holds_checkpoints(world: World, vmid: int) -> bool:
    with world.store.reading() as session:
        statement = select(Checkpoint.uuid).where(
            Checkpoint.vmid == vmid,
            Checkpoint.artefact_kind == ArtefactKind.snapshot,
            Checkpoint.status == CheckpointStatus.ready,
        )
        return session.exec(statement).first() is not None


def mark(world: World, operation_uuid: UUID) -> None:
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        machine = rows.get(session, Machine, operation.object_uuid)
        if machine.status == MachineStatus.terminating:
            machine.status, machine.resume_status = MachineStatus.terminated, None
            machine.ended_at = machine.terminated_at = machine.updated_at = now()
            world.ledger.settle_machine(session, machine, machine.ended_at, note="terminated")
            revoke_machine_keys(session, machine.uuid)
            machine.termination_reason = str(operation.order.get("reason") or machine.termination_reason)
            session.add(machine)
            rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))
        end_in(session, operation_uuid, None)
    world.asked_at.pop(operation_uuid, None)


def fail(world: World, operation_uuid: UUID, error: AutovibeError, pending: str) -> None:
    """Before the VM was stopped the machine goes on; after that it has failed, and its VM may still be there: another
    terminate then tries again.
    """
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        machine = rows.get(session, Machine, operation.object_uuid)
        checkpoint.make_failed(session, operation, error)
        if machine.status == MachineStatus.terminating and operation.step in ("stop", "remove", "mark"):
            machine.status, machine.resume_status = MachineStatus.failed, None
            machine.error_message = error.message
            machine.ended_at = machine.updated_at = now()
            world.ledger.settle_machine(session, machine, machine.ended_at, note="not terminated")
            revoke_machine_keys(session, machine.uuid)
            session.add(machine)
            rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))
        machine.wanted = WANTED_RUNNING
        checkpoint.resume(session, machine, MachineStatus.terminating)
        end_in(session, operation_uuid, error, pending)
    world.asked_at.pop(operation_uuid, None)


_DAY = 86400.0

CHECKPOINT_STEPS = ("scan", "snapshot", "release", "record")
"""What only a terminate with a final checkpoint does."""

WORKFLOW = Workflow(
    steps=(
        Step("take", take, deadline=_DAY),
        Step(
            "scan",
            _when_asked(checkpoint.scan),
            undo=_when_asked(checkpoint.thaw),
            deadline=checkpoint.SCAN_DEADLINE,
            patience=checkpoint.SCAN_PATIENCE,
        ),
        Step("snapshot", _when_asked(checkpoint.snapshot), undo=_when_asked(checkpoint.drop_snapshot)),
        Step("release", _when_asked(checkpoint.release), patience=FOREVER),
        Step("record", _when_asked(record)),
        Step("stop", stop, deadline=_DAY, patience=FOREVER),
        Step("remove", remove, deadline=_DAY, patience=FOREVER),
        Step("mark", mark),
    ),
    fail=fail,
)
