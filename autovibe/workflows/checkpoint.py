"""Checkpoint: the guest is held still while its files are scanned and its VM is snapshotted, so both say the same.

The hold carries a token and a watchdog that ends it; until then nobody but the process that began it can log in, so
after a crash the steps wait for the watchdog. `release` says whether it lasted without a break; if not, the
snapshot is deleted and everything is done again, three times at most. A final checkpoint of `terminate` goes the same
way, with the same functions. However it ends, the machine returns to the status it came from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from uuid import UUID

from sqlmodel import Session, select

from autovibe.domain import Checkpoint, Machine, Operation, Project
from autovibe.domain.checkpoint import snapshot_name
from autovibe.domain.columns import now
from autovibe.errors import AutovibeError, InternalError, NotYet, OperationFailed
from autovibe.guest import scan as guest_scan
from autovibe.hypervisor import change, read
from autovibe.store import rows
from autovibe.store.trees import EMPTY_ROOT
from autovibe.types import ArtefactKind, CheckpointStatus, CheckpointType, Entry, MachineStatus, OperationKind
from autovibe.workflows import vms
from autovibe.workflows.engine import FOREVER, Repeat, Step, Workflow, end_in
from autovibe.workflows.world import World

_log = logging.getLogger(__name__)

WATCHDOG_SECONDS = 120
SCAN_DEADLINE = 1800.0
SCAN_PATIENCE = 300.0  # longer than a watchdog a predecessor left; a guest that is silent after that is gone
ROUNDS = 3
_ENTRIES_A_LOOK = 2000  # between two looks at whether the process closes


def subject(world: World, operation_uuid: UUID) -> tuple[Operation, Machine, Checkpoint]:
    """The operation, the machine, and the checkpoint that is made. Raises NotFound."""
    with world.store.reading() as session:
        operation = rows.get(session, Operation, operation_uuid)
        checkpoint = rows.get(session, Checkpoint, checkpoint_uuid(operation))
        if checkpoint.machine_uuid is None:
            raise InternalError(f"Checkpoint '{checkpoint.uuid}' has no machine.")
        return operation, rows.get(session, Machine, checkpoint.machine_uuid), checkpoint


def checkpoint_uuid(operation: Operation) -> UUID:
    named = operation.order.get("checkpoint_uuid")
    return UUID(str(named)) if named else operation.object_uuid


def token(operation: Operation) -> str:
    """Names the hold of the operation's present round."""
    return f"{operation.uuid}-{operation.order.get('rounds', 0)}"


def scan(world: World, operation_uuid: UUID) -> None:
    """Hold the guest and write its manifest; the hold stays on for the snapshot."""
    operation, machine, checkpoint = subject(world, operation_uuid)
    vms.require_space(world)
    address = vms.address_of(world, machine)
    guest_scan.hold(world.guests, address, token=token(operation), watchdog_seconds=WATCHDOG_SECONDS)
    write_manifest(world, operation, machine, checkpoint)


def write_manifest(world: World, operation: Operation, machine: Machine, checkpoint: Checkpoint) -> None:
    """Scan the guest, which is held, and keep what is found with the checkpoint."""
    entries = guest_scan.scan(
        world.guests,
        vms.address_of(world, machine),
        guest_scan.WORKSPACE,
        full=bool(operation.order.get("full_scan", False)),
    )
    root = world.trees.write(_interruptible(world, entries))
    with world.store.transaction() as session:
        row = rows.get(session, Checkpoint, checkpoint.uuid)
        row.root_digest, row.times_digest = root.digest, root.times
        row.file_count, row.size_bytes = root.file_count, root.size_bytes
        session.add(row)


def _interruptible(world: World, entries: Iterable[Entry]) -> Iterator[Entry]:
    for number, entry in enumerate(entries):
        if number % _ENTRIES_A_LOOK == 0:
            world.check()
        yield entry


def snapshot(world: World, operation_uuid: UUID) -> None:
    _, machine, checkpoint = subject(world, operation_uuid)
    vmid, name = vms.vmid_of(machine), snapshot_name(checkpoint.uuid)
    description = f"Checkpoint '{checkpoint.label or checkpoint.uuid}' of machine '{machine.name}'."
    vms.run_task(
        world, operation_uuid, "snapshot", vmid, lambda: change.snapshot(world.proxmox, vmid, name, description)
    )


def release(world: World, operation_uuid: UUID) -> None:
    """Let the guest go on. Raises Repeat when it was not held all the while."""
    operation, machine, checkpoint = subject(world, operation_uuid)
    rounds = int(operation.order.get("rounds", 0))
    # Asked a second time the guest would say that nothing is held, so its answer is kept.
    was_held = operation.order.get("was_held")
    if was_held is None:
        was_held = guest_scan.release(world.guests, vms.address_of(world, machine), token(operation))
        vms.note(world, operation_uuid, was_held=was_held)
    if was_held:
        return
    delete_snapshot(world, operation_uuid, machine, checkpoint)
    if rounds + 1 >= ROUNDS:
        raise OperationFailed(
            f"The guest of machine '{machine.name}' could not be held still while it was checkpointed, {ROUNDS} times."
        )
    vms.note(world, operation_uuid, rounds=rounds + 1, was_held=None)
    raise Repeat("scan")


def delete_snapshot(world: World, operation_uuid: UUID, machine: Machine, checkpoint: Checkpoint) -> None:
    vmid, name = vms.vmid_of(machine), snapshot_name(checkpoint.uuid)
    if read.find_vm(world.proxmox, vmid) is None:
        return
    vms.require_unlocked(world, vmid)
    if (operation_uuid, "delete snapshot") in world.tasks or any(
        found.name == name for found in read.snapshots(world.proxmox, vmid)
    ):
        vms.run_task(
            world, operation_uuid, "delete snapshot", vmid, lambda: change.delete_snapshot(world.proxmox, vmid, name)
        )


def thaw(world: World, operation_uuid: UUID) -> None:
    """Undo of a hold. It is no fault when the guest does not answer: its watchdog lets it go."""
    operation, machine, _ = subject(world, operation_uuid)
    try:
        guest_scan.release(world.guests, vms.address_of(world, machine), token(operation))
    except (AutovibeError, NotYet) as error:
        _log.info("The guest of '%s' was not released and waits for its watchdog: %s", machine.name, error)


def drop_snapshot(world: World, operation_uuid: UUID) -> None:
    _, machine, checkpoint = subject(world, operation_uuid)
    if (operation_uuid, "delete snapshot") not in world.tasks:
        thaw(world, operation_uuid)
    delete_snapshot(world, operation_uuid, machine, checkpoint)


def record(world: World, operation_uuid: UUID) -> None:
    """The checkpoint is ready, and the machine goes on."""
    unique_bytes = unique_bytes_of(world, operation_uuid)
    with world.store.transaction() as session:
        checkpoint, machine = make_ready(world, session, operation_uuid, unique_bytes)
        resume(session, machine, MachineStatus.checkpointing)
        end_in(session, operation_uuid, None)
        rows.record(session, "checkpoint.status", checkpoint.uuid, checkpoint.project_uuid, status=checkpoint.status)


def unique_bytes_of(world: World, operation_uuid: UUID) -> int:
    """The bytes of files whose content the parent does not have."""
    _, _, checkpoint = subject(world, operation_uuid)
    if checkpoint.root_digest is None:
        raise InternalError(f"Checkpoint '{checkpoint.uuid}' has no manifest.")
    base = EMPTY_ROOT
    if checkpoint.parent_uuid is not None:
        with world.store.reading() as session:
            parent = session.get(Checkpoint, checkpoint.parent_uuid)
            base = (parent.root_digest if parent else None) or EMPTY_ROOT
    return world.trees.new_bytes(base, checkpoint.root_digest)


def make_ready(world: World, session: Session, operation_uuid: UUID, unique_bytes: int) -> tuple[Checkpoint, Machine]:
    """Complete the checkpoint's row and make it the machine's last one; moves the project's current where it should."""
    operation = rows.get(session, Operation, operation_uuid)
    checkpoint = rows.get(session, Checkpoint, checkpoint_uuid(operation))
    machine = rows.get(session, Machine, checkpoint.machine_uuid or operation.object_uuid)
    if checkpoint.status == CheckpointStatus.creating:
        checkpoint.status = CheckpointStatus.ready
        checkpoint.node, checkpoint.vmid, checkpoint.storage = world.proxmox.node, machine.vmid, world.storage
        checkpoint.snapshot, checkpoint.artefact_kind = snapshot_name(checkpoint.uuid), ArtefactKind.snapshot
        checkpoint.provisioned_for = _provisioned_for(session, machine)
        checkpoint.unique_bytes = unique_bytes
        session.add(checkpoint)
        if checkpoint.type in (CheckpointType.manual, CheckpointType.final):
            _move_current(session, machine, checkpoint)
        machine.last_checkpoint_uuid = checkpoint.uuid
        machine.updated_at = now()
        session.add(machine)
    return checkpoint, machine


def _provisioned_for(session: Session, machine: Machine) -> str | None:
    statement = select(Operation).where(Operation.object_uuid == machine.uuid, Operation.kind == OperationKind.spawn)
    spawned = session.exec(statement).first()
    found = spawned.order.get("provisioned_for") if spawned is not None else None
    return str(found) if found else None


def _move_current(session: Session, machine: Machine, checkpoint: Checkpoint) -> None:
    """The project follows a machine that was spawned from its current checkpoint; others only branch off."""
    project = rows.get(session, Project, checkpoint.project_uuid)
    current = session.get(Checkpoint, project.current_checkpoint_uuid) if project.current_checkpoint_uuid else None
    is_followed = current is None or current.uuid == machine.checkpoint_uuid or current.machine_uuid == machine.uuid
    if is_followed:
        project.current_checkpoint_uuid = checkpoint.uuid
        project.updated_at = now()
        session.add(project)
        rows.record(session, "project.current", project.uuid, project.uuid, checkpoint_uuid=str(checkpoint.uuid))


def resume(session: Session, machine: Machine, taken: MachineStatus) -> None:
    """Give the machine back to the status it was taken from, if it still has the one it was taken to."""
    if machine.status != taken:
        return
    is_working = machine.prompt is not None and machine.finished_at is None
    machine.status = machine.resume_status or (MachineStatus.working if is_working else MachineStatus.active)
    machine.resume_status = None
    machine.updated_at = now()
    session.add(machine)
    rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))


def make_failed(session: Session, operation: Operation, error: AutovibeError) -> None:
    """Mark the checkpoint's row, if it was not made: it has no files, and its label is free for the next try."""
    checkpoint = session.get(Checkpoint, checkpoint_uuid(operation))
    if checkpoint is not None and checkpoint.status == CheckpointStatus.creating:
        checkpoint.status = CheckpointStatus.failed
        checkpoint.error_message = error.message
        checkpoint.root_digest = checkpoint.times_digest = None
        checkpoint.file_count = checkpoint.size_bytes = checkpoint.unique_bytes = 0
        if checkpoint.label is not None:
            checkpoint.details = {**checkpoint.details, "label": checkpoint.label}
            checkpoint.label = None
        session.add(checkpoint)
        rows.record(session, "checkpoint.status", checkpoint.uuid, checkpoint.project_uuid, status=checkpoint.status)


def fail(world: World, operation_uuid: UUID, error: AutovibeError, pending: str) -> None:
    """The checkpoint failed; the machine goes on once its snapshot is gone."""
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        make_failed(session, operation, error)
        machine = session.get(Machine, operation.machine_uuid) if operation.machine_uuid else None
        if machine is not None:
            resume(session, machine, MachineStatus.checkpointing)
        end_in(session, operation_uuid, error, pending)


WORKFLOW = Workflow(
    steps=(
        Step("scan", scan, undo=thaw, deadline=SCAN_DEADLINE, patience=SCAN_PATIENCE),
        Step("snapshot", snapshot, undo=drop_snapshot),
        Step("release", release, patience=FOREVER),
        Step("record", record),
    ),
    fail=fail,
)
