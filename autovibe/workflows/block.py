"""Block: a machine that reached a limit is frozen, which ends its spending, then checkpointed and switched off.

    running -> frozen -> (scanned, snapshotted, recorded) -> kept (a snapshot with its RAM) -> off: budget_blocked

A limit is a limit: whatever fails, the VM goes off. The hold is for good (see guest/programs/hold.py): work that was
frozen at the limit runs again only when `resume` thaws it, also after a crash of the Hub in between. A guest that does
not let itself be frozen in time is paused by the hypervisor; it then has no checkpoint, but loses nothing either: its
RAM and disks are kept in a snapshot of their own, `av-ram-…`, from which `resume` goes on. That is a snapshot and no
suspend to disk because Proxmox locks a suspended VM, and no checkpoint in it could be spawned from.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime
from uuid import UUID

from sqlmodel import Session

from autovibe.domain import Checkpoint, Machine, Operation
from autovibe.domain.columns import now
from autovibe.errors import (
    AutovibeError,
    GuestUnreachable,
    HypervisorRefused,
    HypervisorTaskFailed,
    NotYet,
    OperationFailed,
    Unavailable,
)
from autovibe.guest import agent
from autovibe.guest import scan as guest_scan
from autovibe.hypervisor import change, read
from autovibe.store import rows
from autovibe.types import CheckpointStatus, MachineStatus
from autovibe.workflows import checkpoint, vms
from autovibe.workflows.engine import FOREVER, Do, Repeat, Step, Workflow, end_in
from autovibe.workflows.world import World

_log = logging.getLogger(__name__)

RAM_PREFIX = "av-ram-"
"""Begins the names of snapshots that hold a blocked machine's RAM; 39 characters with the operation's uuid."""

FREEZE_SECONDS = 8.0  # what a guest gets to freeze its prompt in, before the hypervisor pauses it; 0.2 s are usual
HOLD_SECONDS = 30.0  # and to freeze everything else, or the tail where that is longer: the prompt rests already
_PATIENCE_SECONDS = 30.0  # of a command whose end is waited for shorter
_SILENCE_SECONDS = 30.0  # how long a guest that was frozen may not answer before its checkpoint is given up
_DAY = 86400.0


def freeze(world: World, operation_uuid: UUID) -> None:
    """Stop the machine's work: in the guest, or where that does not answer from outside."""
    operation, machine = vms.machine_of(world, operation_uuid)
    if operation.order.get("is_paused"):
        return
    fault = _hold(world, operation, machine)
    if fault:
        vmid = vms.vmid_of(machine)
        vms.run_task(world, operation_uuid, "pause", vmid, lambda: change.pause(world.proxmox, vmid))
        vms.note(world, operation_uuid, is_paused=True)
        give_up(world, operation_uuid, OperationFailed(f"The guest was paused instead of frozen: {fault}"))
    if "frozen_at" not in operation.order:
        vms.note(world, operation_uuid, frozen_at=now().isoformat(), token=checkpoint.token(operation))


def _hold(world: World, operation: Operation, machine: Machine) -> str:
    """Why the guest is not held, "" when it is. First what works for the prompt, which is quick, then all the rest."""
    address, token = vms.address_of(world, machine), checkpoint.token(operation)
    brake = world.brakes.pop(machine.uuid, None)
    is_frozen = brake is not None and brake.pull(FREEZE_SECONDS)
    if not is_frozen and (
        fault := _within(FREEZE_SECONDS, lambda: agent.freeze(world.guests, address, timeout_seconds=_PATIENCE_SECONDS))
    ):
        return fault
    patience = max(HOLD_SECONDS, world.tail_seconds)
    return _within(patience, lambda: guest_scan.hold(world.guests, address, token=token, watchdog_seconds=None))


def _within(seconds: float, act: Callable[[], None]) -> str:
    """Why it was not done in that time, "" when it was. The pool would wait longer for a silent guest than a limit."""
    faults: list[str] = []

    def attempt() -> None:
        try:
            act()
            faults.append("")
        except AutovibeError as error:
            faults.append(error.message)

    thread = threading.Thread(target=attempt, name="freeze", daemon=True)
    thread.start()
    thread.join(seconds)
    return faults[0] if faults else f"it did not freeze within {seconds:g} seconds."


def _while_possible(do: Do) -> Do:
    """A step of the checkpoint: what it fails with is the end of the checkpoint alone."""

    def attempt(world: World, operation_uuid: UUID) -> None:
        operation, _ = vms.machine_of(world, operation_uuid)
        if operation.order.get("is_given_up"):
            return
        try:
            do(world, operation_uuid)
        except GuestUnreachable as error:
            if not vms.is_due(world, operation_uuid, _SILENCE_SECONDS):
                raise
            give_up(world, operation_uuid, error)
        except (Unavailable, NotYet, Repeat):
            raise
        except AutovibeError as error:
            give_up(world, operation_uuid, error)

    return attempt


def give_up(world: World, operation_uuid: UUID, error: AutovibeError) -> None:
    """There will be no checkpoint; the rest of the block goes on."""
    _log.warning("The checkpoint of %s at its limit failed: %s", operation_uuid, error.message)
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        checkpoint.make_failed(session, operation, error)
        operation.order = {**operation.order, "is_given_up": True}
        session.add(operation)


def scan(world: World, operation_uuid: UUID) -> None:
    operation, machine, made = checkpoint.subject(world, operation_uuid)
    vms.require_space(world)
    checkpoint.write_manifest(world, operation, machine, made)


def record(world: World, operation_uuid: UUID) -> None:
    """The checkpoint is ready, if nothing moved since the freeze; else it is made again."""
    operation, machine, made = checkpoint.subject(world, operation_uuid)
    if made.status != CheckpointStatus.creating:
        return
    if not guest_scan.check(world.guests, vms.address_of(world, machine), checkpoint.token(operation)):
        _begin_again(world, operation, machine, made)
    unique_bytes = checkpoint.unique_bytes_of(world, operation_uuid)
    with world.store.transaction() as session:
        row, _ = checkpoint.make_ready(world, session, operation_uuid, unique_bytes)
        rows.record(session, "checkpoint.status", row.uuid, row.project_uuid, status=row.status)


def _begin_again(world: World, operation: Operation, machine: Machine, made: Checkpoint) -> None:
    checkpoint.delete_snapshot(world, operation.uuid, machine, made)
    rounds = int(operation.order.get("rounds", 0)) + 1
    if rounds >= checkpoint.ROUNDS:
        raise OperationFailed(f"The guest of machine '{machine.name}' was not held still, {rounds} times.")
    vms.note(world, operation.uuid, rounds=rounds, token=f"{operation.uuid}-{rounds}")
    raise Repeat("freeze")


def drop_snapshot(world: World, operation_uuid: UUID) -> None:
    """Undo of the snapshot, unless it holds a checkpoint by now."""
    _, machine, made = checkpoint.subject(world, operation_uuid)
    if made.status != CheckpointStatus.ready:
        checkpoint.delete_snapshot(world, operation_uuid, machine, made)


def ram_name(operation_uuid: UUID) -> str:
    return f"{RAM_PREFIX}{operation_uuid.hex}"


def keep(world: World, operation_uuid: UUID) -> None:
    """Snapshot disks and RAM, so that the work can go on. Where that cannot be, only what is on disk is kept."""
    operation, machine = vms.machine_of(world, operation_uuid)
    vmid, name = vms.vmid_of(machine), ram_name(operation_uuid)
    if "ram" in operation.order:
        return
    try:
        if operation.order.get("is_given_up"):
            drop_snapshot(world, operation_uuid)
        vms.run_task(
            world,
            operation_uuid,
            "keep",
            vmid,
            lambda: change.snapshot(
                world.proxmox, vmid, name, f"Machine '{machine.name}' at its limit.", with_ram=True
            ),
        )
    except (HypervisorTaskFailed, HypervisorRefused) as error:
        _log.warning("The RAM of machine '%s' is not kept: %s", machine.name, error.message)
        name = ""
    vms.note(world, operation_uuid, ram=name)


def stop(world: World, operation_uuid: UUID) -> None:
    """Switch the VM off; also the undo of all, so that nothing goes on running at a limit."""
    operation, machine = vms.machine_of(world, operation_uuid)
    if machine.operation_uuid != operation_uuid:
        return  # an undo that waited for the hypervisor: another operation has the VM by now
    if machine.vmid is not None and vms.find_owned(world, machine.vmid, machine.uuid) is not None:
        vmid = machine.vmid
        vms.run_task(world, operation_uuid, "stop", vmid, lambda: change.stop(world.proxmox, vmid))
    if machine.address and machine.port and machine.host_key:
        world.guests.forget(vms.address_of(world, machine))
    if "stopped_at" not in operation.order:
        vms.note(world, operation_uuid, stopped_at=now().isoformat())
    world.asked_at.pop(operation_uuid, None)


def mark(world: World, operation_uuid: UUID) -> None:
    with world.store.transaction() as session:
        _mark_blocked(world, session, operation_uuid)
        end_in(session, operation_uuid, None)


def _mark_blocked(world: World, session: Session, operation_uuid: UUID) -> None:
    """The machine is budget_blocked, and what it still held of its budgets is settled. Harmless when it is already."""
    operation = rows.get(session, Operation, operation_uuid)
    machine = rows.get(session, Machine, operation.object_uuid)
    if machine.status != MachineStatus.checkpointing or machine.operation_uuid != operation_uuid:
        return  # a repeated step may find it resumed by now
    stopped_at = operation.order.get("stopped_at")
    until = datetime.fromisoformat(str(stopped_at)) if stopped_at else now()
    world.ledger.settle_machine(session, machine, until, note="blocked")
    kept = {name: operation.order[name] for name in ("ram", "token") if operation.order.get(name)}
    machine.blocked = {**(machine.blocked or {}), **kept}
    machine.status, machine.resume_status = MachineStatus.budget_blocked, None
    machine.progress = str(machine.blocked.get("reason", ""))[:200]
    machine.updated_at = now()
    session.add(machine)
    rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))


def forget_ram(world: World, operation_uuid: UUID, vmid: int) -> None:
    """Delete the snapshots that held the VM's RAM, one task after the other."""
    for found in read.snapshots(world.proxmox, vmid):
        if found.name.startswith(RAM_PREFIX):
            name = found.name
            vms.run_task(
                world,
                operation_uuid,
                f"forget {name}",
                vmid,
                lambda name=name: change.delete_snapshot(world.proxmox, vmid, name),  # type: ignore[misc]
            )


def fail(world: World, operation_uuid: UUID, error: AutovibeError, pending: str) -> None:
    """Something failed, and the VM was switched off nevertheless."""
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        checkpoint.make_failed(session, operation, error)
        _mark_blocked(world, session, operation_uuid)
        end_in(session, operation_uuid, error, pending)


WORKFLOW = Workflow(
    steps=(
        Step("freeze", freeze, undo=stop, deadline=_DAY, patience=FOREVER),
        Step("scan", _while_possible(scan), deadline=checkpoint.SCAN_DEADLINE, patience=FOREVER),
        Step("snapshot", _while_possible(checkpoint.snapshot), undo=drop_snapshot, patience=FOREVER),
        Step("record", _while_possible(record), patience=FOREVER),
        Step("keep", keep, deadline=_DAY, patience=FOREVER),
        Step("stop", stop, deadline=_DAY, patience=FOREVER),
        Step("mark", mark),
    ),
    fail=fail,
)
