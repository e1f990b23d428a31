"""Resume: a machine that was blocked at a limit goes on where it was frozen.

Its VM starts from the snapshot that holds its RAM, the clock is set, and what the block froze is thawed. Where the RAM
was not kept, or cannot be loaded any more, the VM boots from its disks; a prompt that ran is lost then. Whatever fails
before the thaw loses nothing: the VM goes off, the machine is blocked as before, and can be resumed again.
"""

from __future__ import annotations

import logging
from uuid import UUID

from sqlmodel import Session

from autovibe.domain import Machine, Operation
from autovibe.domain.columns import now
from autovibe.errors import (
    AutovibeError,
    HypervisorRefused,
    HypervisorTaskFailed,
    HypervisorUnavailable,
    OperationFailed,
)
from autovibe.guest import identity
from autovibe.guest import scan as guest_scan
from autovibe.hypervisor import change, read
from autovibe.store import rows
from autovibe.types import MachineStatus
from autovibe.workflows import block, spawn, vms
from autovibe.workflows.engine import FOREVER, Step, Workflow, end_in
from autovibe.workflows.world import World

_log = logging.getLogger(__name__)

_DAY = 86400.0


def start(world: World, operation_uuid: UUID) -> None:
    operation, machine = vms.machine_of(world, operation_uuid)
    vmid = vms.vmid_of(machine)
    if vms.find_owned(world, vmid, machine.uuid) is None:
        raise OperationFailed(f"VM {vmid} of machine '{machine.name}' is gone; spawn a machine from its checkpoint.")
    vms.meter(world, machine.uuid)
    ram = str((machine.blocked or {}).get("ram") or "")
    if ram and not operation.order.get("is_ram_lost"):
        _load(world, operation_uuid, vmid, ram)
    vms.run_task(world, operation_uuid, "start", vmid, lambda: change.start(world.proxmox, vmid))


def _load(world: World, operation_uuid: UUID, vmid: int, name: str) -> None:
    """Go back to the snapshot with the RAM, after which the VM runs; a running one has done so before."""

    def begin() -> str | None:
        if running := read.running_tasks(world.proxmox, vmid, "qmrollback"):
            return running[0]
        vm = read.find_vm(world.proxmox, vmid)
        return None if vm is None or vm.is_running else change.rollback(world.proxmox, vmid, name)

    try:
        vms.run_task(world, operation_uuid, "load", vmid, begin)
    except (HypervisorTaskFailed, HypervisorRefused) as error:
        _log.warning("The RAM of VM %d cannot be loaded, so it boots: %s", vmid, error.message)
        vms.note(world, operation_uuid, is_ram_lost=True)


def reach(world: World, operation_uuid: UUID) -> None:
    """Nobody but the guest that was blocked is taken for it: its host key is pinned."""
    _, machine = vms.machine_of(world, operation_uuid)
    vmid = vms.vmid_of(machine)
    host, port = read.guest_address(world.proxmox, vmid, via=world.ssh_via, forward_host_port=world.forward_port)
    spawn.require_own(world, machine, host, port)
    found = world.guests.reach(host, port, world.guest_user)
    if found != machine.host_key:
        raise OperationFailed(f"The guest at {host}:{port} shows another host key than machine '{machine.name}' had.")
    if (host, port) != (machine.address, machine.port):
        with world.store.transaction() as session:
            row = rows.get(session, Machine, machine.uuid)
            row.address, row.port = host, port
            session.add(row)


def clock(world: World, operation_uuid: UUID) -> None:
    """The guest is who it was, but its clock stood still."""
    _, machine = vms.machine_of(world, operation_uuid)
    address = vms.address_of(world, machine)
    identity.identify(world.guests, address, spawn.vm_name(machine.name), machine_uuid=machine.uuid)


def thaw(world: World, operation_uuid: UUID) -> None:
    _, machine = vms.machine_of(world, operation_uuid)
    if token := (machine.blocked or {}).get("token"):
        guest_scan.release(world.guests, vms.address_of(world, machine), str(token))


def forget(world: World, operation_uuid: UUID) -> None:
    """The RAM's snapshot has served its purpose. One that cannot be deleted now is left for the machine's end: its
    work goes on again, and is not metered before this operation is over.
    """
    _, machine = vms.machine_of(world, operation_uuid)
    try:
        block.forget_ram(world, operation_uuid, vms.vmid_of(machine))
    except (HypervisorTaskFailed, HypervisorRefused, HypervisorUnavailable) as error:
        _log.warning("A snapshot of machine '%s' is left over: %s", machine.name, error.message)


def mark(world: World, operation_uuid: UUID) -> None:
    with world.store.transaction() as session:
        machine = rows.get(session, Machine, rows.get(session, Operation, operation_uuid).object_uuid)
        if _is_ours(machine, operation_uuid):
            is_working = machine.prompt is not None and machine.finished_at is None
            machine.status = MachineStatus.working if is_working else MachineStatus.active
            machine.resume_status = machine.blocked = None
            machine.progress, machine.updated_at = "", now()
            session.add(machine)
            rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))
        end_in(session, operation_uuid, None)


def _is_ours(machine: Machine, operation_uuid: UUID) -> bool:
    """Whether this operation still has the machine: a repeated step may find it blocked and resumed again by now."""
    return machine.status == MachineStatus.restoring and machine.operation_uuid == operation_uuid


def fail(world: World, operation_uuid: UUID, error: AutovibeError, pending: str) -> None:
    """Blocked as before, with the VM off and nothing reserved."""
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        machine = rows.get(session, Machine, operation.object_uuid)
        if _is_ours(machine, operation_uuid):
            _block_again(world, session, machine)
        end_in(session, operation_uuid, error, pending)


def _block_again(world: World, session: Session, machine: Machine) -> None:
    world.ledger.settle_machine(session, machine, now(), note="not resumed")
    machine.status, machine.resume_status = MachineStatus.budget_blocked, None
    machine.progress = str((machine.blocked or {}).get("reason", ""))[:200]
    machine.updated_at = now()
    session.add(machine)
    rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))


WORKFLOW = Workflow(
    steps=(
        Step("start", start, undo=block.stop),
        Step("reach", reach, deadline=lambda world: world.boot_deadline, explain=spawn.explain_reach),
        Step("clock", clock),
        Step("thaw", thaw),
        Step("forget", forget, deadline=_DAY, patience=FOREVER),
        Step("mark", mark, patience=FOREVER),
    ),
    fail=fail,
)
