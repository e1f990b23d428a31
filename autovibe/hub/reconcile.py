"""What the database and the node say differently: after a restore, or whenever somebody wonders. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlmodel import col, select

from autovibe.domain import Allotment, Checkpoint, Machine
from autovibe.hypervisor import Proxmox, read
from autovibe.store import Store
from autovibe.types import CheckpointStatus, MachineStatus


@dataclass(frozen=True)
class Differences:
    """`machines` that live and have no VM, `checkpoints` that are ready and whose VM is gone, `vmids` of VMs of ours
    that no machine or checkpoint knows. Each with what to call it.
    """

    machines: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    vmids: list[str] = field(default_factory=list)

    @property
    def sentences(self) -> list[str]:
        told = [f"Machine {name} has no VM any more; end it with: autovibe machine terminate" for name in self.machines]
        told += [f"Checkpoint {name} cannot be spawned from: its VM is gone." for name in self.checkpoints]
        return told + [f"{vm} is a machine's and the database does not know it." for vm in self.vmids]


def differences(store: Store, proxmox: Proxmox, vmids: range) -> Differences:
    """Raises HypervisorUnavailable."""
    there = {vm.vmid: vm for vm in read.vms(proxmox)}
    with store.reading() as session:
        living = col(Machine.status).not_in([MachineStatus.terminated, MachineStatus.failed, MachineStatus.spawning])
        machines = list(session.exec(select(Machine).where(living)))
        ready = select(Checkpoint).where(Checkpoint.status == CheckpointStatus.ready, col(Checkpoint.vmid).is_not(None))
        checkpoints = list(session.exec(ready))
        known = set(session.exec(select(Allotment.vmid))) | {row.vmid for row in checkpoints}
    unknown = [
        vm
        for vmid, vm in there.items()
        if vmid in vmids and vmid not in known and read.owner(proxmox, vmid) is not None
    ]
    return Differences(
        [f"'{row.name}' ({row.uuid}, vmid {row.vmid})" for row in machines if row.vmid not in there],
        [f"'{row.label or row.uuid}' (vmid {row.vmid})" for row in checkpoints if row.vmid not in there],
        [f"VM {vm.vmid} '{vm.name}' ({vm.status})" for vm in unknown],
    )
