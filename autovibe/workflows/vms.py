"""What all workflows do with a machine's VM: carry out a Proxmox task on it, remove it, name its guest's address."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from sqlmodel import col, delete

from autovibe.domain import Allotment, Checkpoint, Machine, Operation
from autovibe.domain.columns import now
from autovibe.errors import (
    ConfigurationError,
    HypervisorTaskFailed,
    InsufficientSpace,
    InternalError,
    NotYet,
    OperationFailed,
)
from autovibe.guest import Address
from autovibe.hypervisor import change, read
from autovibe.store import rows
from autovibe.types import CheckpointStatus, MachineStatus
from autovibe.workflows.world import World


def machine_of(world: World, operation_uuid: UUID) -> tuple[Operation, Machine]:
    """The operation and its machine, as they are now. Raises NotFound."""
    with world.store.reading() as session:
        operation = rows.get(session, Operation, operation_uuid)
        return operation, rows.get(session, Machine, operation.machine_uuid or operation.object_uuid)


def origin_of(world: World, machine: Machine) -> Checkpoint:
    """The checkpoint the machine is spawned from. Raises OperationFailed when it cannot be (any more)."""
    if machine.checkpoint_uuid is None:
        raise InternalError(f"Machine '{machine.name}' has no checkpoint to be spawned from.")
    with world.store.reading() as session:
        checkpoint = rows.get(session, Checkpoint, machine.checkpoint_uuid)
    if checkpoint.status != CheckpointStatus.ready or checkpoint.vmid is None:
        raise OperationFailed(f"Checkpoint '{checkpoint.uuid}' is {checkpoint.status} and cannot be spawned from.")
    return checkpoint


def meter(world: World, machine_uuid: UUID) -> None:
    """The machine's VM is on: what it uses is charged from now on, unless it is already."""
    with world.store.transaction() as session:
        expect = {"metered_at": None, "status": [status for status in MachineStatus if not status.is_final]}
        rows.compare_and_set(session, Machine, machine_uuid, expect=expect, change={"metered_at": now()})


def settle(world: World, machine_uuid: UUID, note: str) -> None:
    """The machine's VM is off: what it used is charged, and nothing more is held for it."""
    with world.store.transaction() as session:
        world.ledger.settle_machine(session, rows.held(session, Machine, machine_uuid), now(), note=note)


def note(world: World, operation_uuid: UUID, **values: Any) -> None:
    """Add to the operation's order what its later steps need to know."""
    with world.store.transaction() as session:
        row = rows.get(session, Operation, operation_uuid)
        row.order = {**row.order, **values}
        session.add(row)


def vmid_of(machine: Machine) -> int:
    if machine.vmid is None:
        raise InternalError(f"Machine '{machine.name}' has no vmid.")
    return machine.vmid


def address_of(world: World, machine: Machine) -> Address:
    """Where the machine's guest is reached, with the host key pinned at first contact."""
    if machine.address is None or machine.port is None or machine.host_key is None:
        raise InternalError(f"Machine '{machine.name}' has no address yet.")
    return Address(machine.address, machine.port, world.guest_user, machine.host_key)


def run_task(world: World, operation_uuid: UUID, what: str, vmid: int, begin: Callable[[], str | None]) -> None:
    """Begin a task of Proxmox, once in this process, and wait for its end, a few seconds a call (NotYet).

    `begin` finds an earlier effect (and then returns None). A task that was begun by a process that died is known by
    the lock it holds on the VM, and waited for.
    """
    key = (operation_uuid, what)
    if key not in world.tasks:
        upid = begin()
        if upid is None:
            require_unlocked(world, vmid)
            return
        world.tasks[key] = upid
    try:
        read.await_task(world.proxmox, world.tasks[key], stop=world.is_parking)
    except HypervisorTaskFailed as error:
        del world.tasks[key]
        if error.details.get("is_lock"):
            raise NotYet(f"{error.message} It is begun again") from error
        raise
    del world.tasks[key]


def require_unlocked(world: World, vmid: int) -> None:
    """Raises NotYet while another task holds the VM."""
    vm = read.find_vm(world.proxmox, vmid)
    if vm is not None and vm.lock:
        raise NotYet(f"VM {vmid} is locked by Proxmox ({vm.lock})")


def remove(world: World, operation_uuid: UUID, vmid: int, owner: UUID) -> None:
    """Destroy the VM with its disks, running or not, if it is there and carries the owner; another's is left alone."""
    if find_owned(world, vmid, owner) is not None:
        run_task(world, operation_uuid, "destroy", vmid, lambda: change.destroy(world.proxmox, vmid, owner=owner))
    world.tasks.pop((operation_uuid, "clone"), None)


def find_owned(world: World, vmid: int, owner: UUID) -> read.VM | None:
    """The VM if it is there and ours. Raises NotYet for one still in the making, which does not tell whose it is."""
    vm = read.find_vm(world.proxmox, vmid)
    if vm is None:
        return None
    found = read.owner(world.proxmox, vmid)
    if found is None and vm.lock in ("clone", "create"):
        raise NotYet(f"VM {vmid} is locked by Proxmox ({vm.lock})")
    return vm if found == owner else None


def release_vmids(world: World, owner: UUID) -> None:
    """Give back every vmid that was allotted to the machine."""
    with world.store.transaction() as session:
        session.exec(delete(Allotment).where(col(Allotment.owner_uuid) == owner))


def require_space(world: World) -> None:
    """Raises InsufficientSpace, naming what is nearly full, before something new is put on the disks."""
    storage = read.storage(world.proxmox, world.storage)
    if not storage.active:
        raise ConfigurationError(f"The storage '{world.storage}' is not active on the node; see 'autovibe doctor'.")
    spaces = {f"storage '{world.storage}'": storage.avail, f"the disk of '{world.runs}'": _free(world)}
    for name, free in spaces.items():
        if free < world.min_free_bytes:
            raise InsufficientSpace(
                f"Only {free / 1e9:.1f} GB are free on {name}, and {world.min_free_bytes / 1e9:.1f} GB must stay free; "
                "nothing was started. Free some, or lower the setting 'min_free_gb'.",
                details={"free_bytes": free, "required_bytes": world.min_free_bytes},
            )


def _free(world: World) -> int:
    world.runs.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(world.runs).free


def is_due(world: World, operation_uuid: UUID, seconds: float) -> bool:
    """Whether a slow question is to be asked: every `seconds`, for the first time after as many."""
    moment = time.monotonic()
    if moment - world.asked_at.setdefault(operation_uuid, moment) < seconds:
        return False
    world.asked_at[operation_uuid] = moment
    return True
