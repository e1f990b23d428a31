"""A VM's saved RAM as a volume of a storage: where it goes, how it is written, and how a VM starts from it.

A configuration that has one, a snapshot's or a suspended VM's, names it as `vmstate`, beside the machine type and the
processor it was saved with (`runningmachine`, `runningcpu`), which the VM must be given again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from autovibe.node.disks import qemu_img
from autovibe.node.disks.volume import is_state
from autovibe.node.state import State
from autovibe.node.tasks import Task
from autovibe.node.vm import drives
from autovibe.node.vm.command_line import options

KEYS = ("vmstate", "runningmachine", "runningcpu", "running-nets-host-mtu")

_DEVICE_MIB = 500  # what Proxmox reserves for the devices' part (QemuConfig.pm, __snapshot_save_vmstate)
_FILE_STORAGES = ("btrfs", "cephfs", "cifs", "dir", "glusterfs", "nfs")
_REPORT_SECONDS = 1.0
_FREQUENT_REPORTS = 60


def storage_for(state: State, values: Mapping[str, str]) -> str:
    """The storage of a VM's states: the one it names, else one of its disks', shared and file-based ones first."""
    if named := values.get("vmstatestorage"):
        return named
    used = {drive["file"].partition(":")[0] for _, drive in drives.disks(values)}
    known = {status["storage"]: status for status in state.disks.statuses()}
    found = sorted(
        used & known.keys(),
        key=lambda name: (not known[name].get("shared"), known[name]["type"] not in _FILE_STORAGES, name),
    )
    return found[0] if found else "local"


def reserve(state: State, vmid: int, values: Mapping[str, str], name: str, storage: str) -> dict[str, str]:
    """Make the volume of a state: what the configuration is to say of it."""
    memory = values.get("memory", "512")
    mebibytes = int(options(memory).get("current", memory))
    running_as = state.qemu.running_as(vmid)
    size = (2 * mebibytes + _DEVICE_MIB) << 20
    volid = state.disks.allocate_state(storage, vmid, name, size=size, needed=mebibytes << 20)
    return {"vmstate": volid, **running_as, **_network_sizes(values)}


def _network_sizes(values: Mapping[str, str]) -> dict[str, str]:
    """The largest packets of the virtio cards, as a saved guest knows them: user networking carries 1500 bytes."""
    cards = {key: options(text) for key, text in sorted(values.items()) if re.fullmatch(r"net\d+", key)}
    sizes = {key: card.get("mtu", "1") for key, card in cards.items() if "virtio" in (*card, card.get("model"))}
    text = ",".join(f"{key}={1500 if size == '1' else size}" for key, size in sizes.items())
    return {"running-nets-host-mtu": text} if text else {}


def save(state: State, vmid: int, volid: str, task: Task) -> None:
    """Write a running VM's RAM into its volume. The VM is paused from here on, until `Qemu.resume`."""
    task.log(f"saving VM state and RAM using storage '{volid.partition(':')[0]}'")
    report = _Report(task)
    state.qemu.save_state(vmid, state.disks.path(volid), watch=report)
    task.log(f"completed saving the VM state in {_seconds(report.seconds)}, saved {qemu_img.render(report.written)}")


class _Report:
    """Tells the log how a saving goes: each second, after a minute each ten; asks the task whether it shall stop."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._due, self._count = 0.0, 0
        self.written, self.seconds = 0, 0.0

    def __call__(self, written: int, seconds: float) -> None:
        self.written, self.seconds = written, seconds
        self._task.check()
        if seconds < self._due:
            return
        self._count += 1
        self._task.write(f"{qemu_img.render(written)} in {_seconds(seconds)}")
        if self._count == _FREQUENT_REPORTS:
            self._task.write("reducing reporting rate to every 10s")
        self._due = seconds + _REPORT_SECONDS * (1 if self._count < _FREQUENT_REPORTS else 10)


def _seconds(duration: float) -> str:
    minutes, seconds = divmod(int(duration), 60)
    return f"{minutes}m {seconds}s" if minutes else f"{seconds}s"


def strays(state: State, vmid: int) -> list[str]:
    """Volumes of states that no section of the VM's configuration names: what a kill left of one that was begun."""
    config = state.configs.find(vmid)
    sections = (config.values, *config.snapshots.values()) if config else ()
    named = {values["vmstate"] for values in sections if "vmstate" in values}
    return [volid for volid in state.owned_by(vmid) if is_state(volid) and volid not in named]


def timestamp() -> str:
    """The name of the state of a suspended VM."""
    return f"suspend-{time.strftime('%Y-%m-%d')}"
