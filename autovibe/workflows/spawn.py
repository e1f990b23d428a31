"""Spawn: a VM is cloned from a checkpoint, reached, provisioned and given its prompt.

The machine's row says what is known (vmid, address, host key). A terminate in the meantime sets the row's `wanted`; the
workflow then backs out. When it fails, no VM, disk or allotted vmid is left.
"""

from __future__ import annotations

import base64
import logging
from typing import Any
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from autovibe.domain import Allotment, HubKey, Machine, Operation
from autovibe.domain.columns import now
from autovibe.domain.machine import WANTED_RUNNING, WANTED_TERMINATED
from autovibe.domain.machine_type import machine_type
from autovibe.errors import (
    AutovibeError,
    LimitExceeded,
    NotYet,
    OperationFailed,
)
from autovibe.guest import File, agent, identity
from autovibe.guest.links import HostKeyChanged
from autovibe.hypervisor import VmidTaken, change, read
from autovibe.store import rows
from autovibe.store.keys import revoke_machine_keys
from autovibe.types import ArtefactKind, MachineStatus
from autovibe.workflows import provisioning, vms
from autovibe.workflows.engine import Step, Workflow, end_in, unwanted
from autovibe.workflows.world import World

_log = logging.getLogger(__name__)

KEY_FILE = "/etc/autovibe/machine-key"
"""In the guest: a key that is good for this machine alone. No manifest names it."""

_LOOK_SECONDS = 5.0  # between two looks at whether a VM that boots still runs


def clone(world: World, operation_uuid: UUID) -> None:
    """A linked clone where the storage can make one from the artefact, else a full one."""
    _, machine = vms.machine_of(world, operation_uuid)
    checkpoint = vms.origin_of(world, machine)
    vmid, source = vms.vmid_of(machine), checkpoint.vmid
    assert source is not None  # noqa: S101 - origin_of looked
    if (operation_uuid, "clone") not in world.tasks:
        vms.require_space(world)
    is_template = checkpoint.artefact_kind == ArtefactKind.template
    snapshot = None if is_template else checkpoint.snapshot

    def begin() -> str | None:
        is_linked = is_template or read.has_feature(world.proxmox, source, "clone", snapshot)
        return change.clone(
            world.proxmox,
            source=source,
            vmid=vmid,
            owner=machine.uuid,
            name=vm_name(machine.name),
            snapshot=snapshot,
            full=not is_linked,
            storage=None if is_linked else world.storage,
            pool=world.pool,
            description=f"Machine '{machine.name}' of autovibe.",
        )

    try:
        vms.run_task(world, operation_uuid, "clone", vmid, begin)
    except VmidTaken:
        allot_another(world, machine)
        raise NotYet(f"vmid {vmid} is taken by another VM; another one was allotted") from None


def vm_name(name: str) -> str:
    """The machine's name as a DNS name, which is what Proxmox takes: 63 of letters, digits, dots and hyphens."""
    labels = [label.strip("-") for label in name.replace("_", "-").split(".")]
    return ".".join(label for label in labels if label)[:63].strip("-.") or "machine"


def allot_another(world: World, machine: Machine) -> None:
    """Give the machine a vmid that neither the Hub nor Proxmox uses. Raises LimitExceeded when the range has none."""
    taken = read.taken_vmids(world.proxmox)
    while True:
        try:
            with world.store.transaction() as session:
                row = rows.get(session, Machine, machine.uuid)
                if row.vmid != machine.vmid:
                    return  # an earlier call of this step did it
                used = taken | set(session.exec(select(Allotment.vmid)))
                free = next((v for v in range(world.vmid_first, world.vmid_last + 1) if v not in used), None)
                if free is None:
                    raise LimitExceeded(
                        f"No vmid is free between {world.vmid_first} and {world.vmid_last}; terminate machines, or "
                        "widen the range with the settings 'vmid_first' and 'vmid_last'.",
                        details={"vmid_first": world.vmid_first, "vmid_last": world.vmid_last},
                    )
                allotment = session.get(Allotment, row.vmid) if row.vmid is not None else None
                if allotment is not None and allotment.owner_uuid == machine.uuid:
                    session.delete(allotment)
                session.add(Allotment(vmid=free, owner_uuid=machine.uuid))
                row.vmid = free
                session.add(row)
        except IntegrityError:
            continue  # another spawn was quicker
        return


def remove_vm(world: World, operation_uuid: UUID) -> None:
    _, machine = vms.machine_of(world, operation_uuid)
    if machine.vmid is not None:
        vms.remove(world, operation_uuid, machine.vmid, machine.uuid)
    vms.release_vmids(world, machine.uuid)


def configure(world: World, operation_uuid: UUID) -> None:
    _, machine = vms.machine_of(world, operation_uuid)
    kind = machine_type(machine.type)
    with world.store.reading() as session:
        keys = sorted(session.exec(select(HubKey.public_key)))
    change.configure(
        world.proxmox,
        vms.vmid_of(machine),
        ciuser=world.guest_user,
        sshkeys="\n".join(keys),
        ipconfig0="ip=dhcp",
        ciupgrade=False,
        agent=True,
        cores=kind.cores or world.cores,
        memory=kind.memory_mb or world.memory_mb,
        tags="autovibe",
    )


def start(world: World, operation_uuid: UUID) -> None:
    """From here on the VM costs."""
    _, machine = vms.machine_of(world, operation_uuid)
    vmid = vms.vmid_of(machine)
    vms.run_task(world, operation_uuid, "start", vmid, lambda: change.start(world.proxmox, vmid))
    vms.meter(world, machine.uuid)


def reach(world: World, operation_uuid: UUID) -> None:
    """First contact: the host key that answers is pinned in the machine's row."""
    _, machine = vms.machine_of(world, operation_uuid)
    vmid = vms.vmid_of(machine)
    if vms.is_due(world, operation_uuid, _LOOK_SECONDS):
        vm = read.find_vm(world.proxmox, vmid)
        if vm is None or vm.status != "running":
            state = "gone" if vm is None else vm.status
            raise OperationFailed(f"VM {vmid} of machine '{machine.name}' is {state} instead of booting.")
    host, port = read.guest_address(world.proxmox, vmid, via=world.ssh_via, forward_host_port=world.forward_port)
    require_own(world, machine, host, port)
    host_key = world.guests.reach(host, port, world.guest_user)
    _pin(world, machine.uuid, address=host, port=port, host_key=host_key)
    world.asked_at.pop(operation_uuid, None)


def require_own(world: World, machine: Machine, host: str, port: int) -> None:
    """Raises NotYet while the address is another machine's: a hostile guest may tell any as its own."""
    with world.store.reading() as session:
        other = session.exec(
            select(Machine.name).where(
                Machine.address == host,
                Machine.port == port,
                Machine.uuid != machine.uuid,
                col(Machine.ended_at).is_(None),
            )
        ).first()
    if other is not None:
        raise NotYet(f"The guest tells {host}:{port} as its address, which is that of machine '{other}'")


def _pin(world: World, machine_uuid: UUID, **values: Any) -> None:
    with world.store.transaction() as session:
        row = rows.get(session, Machine, machine_uuid)
        for name, value in values.items():
            setattr(row, name, value)
        session.add(row)


def explain_reach(world: World, operation_uuid: UUID) -> str:
    _, machine = vms.machine_of(world, operation_uuid)
    vmid = vms.vmid_of(machine)
    vm = read.find_vm(world.proxmox, vmid)
    try:
        host, port = read.guest_address(world.proxmox, vmid, via=world.ssh_via, forward_host_port=world.forward_port)
        place = f"SSH at {host}:{port} did not answer"
    except NotYet:
        place = "the guest told no address"
    return f"VM {vmid} is {vm.status if vm else 'gone'}; {place}."


def identify(world: World, operation_uuid: UUID) -> None:
    """A host name, machine id and host keys of its own, for a clone has its origin's."""
    _, machine = vms.machine_of(world, operation_uuid)
    address = vms.address_of(world, machine)
    try:
        host_key = identity.identify(world.guests, address, vm_name(machine.name), machine_uuid=machine.uuid)
    except HostKeyChanged as error:
        # Until here the guest may still have renewed its keys itself, or this step has and its process died.
        host_key = world.guests.reach(address.host, address.port, address.user)
        _pin(world, machine.uuid, host_key=host_key)
        raise NotYet(f"The guest at {address.host}:{address.port} has renewed its host key") from error
    if host_key != machine.host_key:
        _pin(world, machine.uuid, host_key=host_key)


def place_files(world: World, operation_uuid: UUID) -> None:
    """What was ordered, and the machine's own key; one that an earlier call placed is revoked."""
    _, machine = vms.machine_of(world, operation_uuid)
    with world.store.transaction() as session:
        key = world.keyring.issue_machine_key(session, machine)
    files = [file_of(path, value) for path, value in sorted(machine.file_modifications.items())]
    files.append(File(KEY_FILE, f"{key}\n".encode(), mode=0o600, owner=world.guest_user))
    world.guests.push(vms.address_of(world, machine), files)


def file_of(path: str, value: Any) -> File:
    """One of a machine's file_modifications: text, {content | content_base64, mode, owner}, or None to delete."""
    if value is None:
        return File(path=path, content=None)
    if isinstance(value, str):
        return File(path=path, content=value.encode())
    content = (
        base64.b64decode(value["content_base64"])
        if value.get("content_base64") is not None
        else str(value.get("content") or "").encode()
    )
    extra: dict[str, Any] = {}
    if value.get("mode") is not None:
        mode = value["mode"]
        extra["mode"] = int(mode, 8) if isinstance(mode, str) else int(mode)
    if value.get("owner") is not None:
        extra["owner"] = value["owner"]
    return File(path=path, content=content, **extra)


def start_agent(world: World, operation_uuid: UUID) -> None:
    _, machine = vms.machine_of(world, operation_uuid)
    if machine.prompt is not None:
        agent.start(
            world.guests,
            vms.address_of(world, machine),
            machine_uuid=machine.uuid,
            command=machine_type(machine.type).command,
            prompt=machine.prompt,
            env=_environment(world, machine),
        )


def _environment(world: World, machine: Machine) -> dict[str, str]:
    """What the prompt is told of itself, and how it reaches the Hub to report what it uses."""
    found = {
        "AUTOVIBE_MACHINE_UUID": str(machine.uuid),
        "AUTOVIBE_MACHINE_NAME": machine.name,
        "AUTOVIBE_MACHINE_KEY_FILE": KEY_FILE,
    }
    return found | ({"AUTOVIBE_URL": world.url_for_guests} if world.url_for_guests else {})


def mark(world: World, operation_uuid: UUID) -> None:
    """The machine is there: `working` when it has a prompt, else `active`."""
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        machine = rows.get(session, Machine, operation.object_uuid)
        status = MachineStatus.active if machine.prompt is None else MachineStatus.working
        is_marked = rows.compare_and_set(
            session,
            Machine,
            machine.uuid,
            expect={"status": MachineStatus.spawning, "wanted": WANTED_RUNNING},
            change={
                "status": status,
                "running_at": now(),
                "updated_at": now(),
                "node": world.proxmox.node,
                "progress": "",
            },
        )
        if is_marked:
            rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(status))
            end_in(session, operation_uuid, None)
        elif machine.status == MachineStatus.spawning:
            raise unwanted(machine)


def fail(world: World, operation_uuid: UUID, error: AutovibeError, pending: str) -> None:
    """`failed`, or `terminated` when that was what was wanted."""
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        machine = rows.get(session, Machine, operation.object_uuid)
        is_wanted = machine.wanted == WANTED_TERMINATED
        if machine.status == MachineStatus.spawning:
            machine.status = MachineStatus.terminated if is_wanted else MachineStatus.failed
            machine.error_message = None if is_wanted else error.message
            machine.ended_at = now()
            machine.terminated_at = machine.ended_at if is_wanted else None
            revoke_machine_keys(session, machine.uuid)
            world.ledger.settle_machine(session, machine, now(), note="not spawned")
        machine.progress = pending
        machine.updated_at = now()
        session.add(machine)
        rows.record(session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status))
        end_in(session, operation_uuid, error, pending)
    if machine.address and machine.port and machine.host_key:
        world.guests.forget(vms.address_of(world, machine))
    world.asked_at.pop(operation_uuid, None)


WORKFLOW = Workflow(
    steps=(
        Step("clone", clone, undo=remove_vm, deadline=1800.0),
        Step("configure", configure),
        Step("start", start),
        Step("reach", reach, deadline=lambda world: world.boot_deadline, explain=explain_reach),
        Step("identify", identify),
        Step("place_files", place_files),
        Step(
            "provision", provisioning.provision, undo=provisioning.stop, deadline=lambda world: world.provision_deadline
        ),
        Step("start_agent", start_agent),
        Step("mark", mark),
    ),
    fail=fail,
    heeds_wanted=True,
)
