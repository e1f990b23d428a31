"""Drive strings of a call made into volumes: allocated, imported, checked; undone when a later one fails."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autovibe.node.disks.volume import is_written
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema.options import DISK_KEYS
from autovibe.node.schema.parameters import split_properties
from autovibe.node.schema.property_strings import NET
from autovibe.node.vm import drives, firmware
from autovibe.node.vm.cloudinit import SIZE_BYTES as CLOUDINIT_BYTES

if TYPE_CHECKING:
    from autovibe.node.state import State

Log = Callable[[str], None]

_FIXED_BYTES = {"tpmstate0": 4 << 20, "efidisk0": firmware.VARIABLES_BYTES}
"""Volumes whose size is what is in them, whatever a call says."""


@dataclass
class Made:
    """Configuration values that name real volumes, and the volumes that were made for them."""

    state: State
    values: dict[str, str]
    volids: list[str] = field(default_factory=list)

    def undo(self) -> None:
        for volid in reversed(self.volids):
            self.state.disks.free(volid)


def check(state: State, given: Mapping[str, str], default_storage: str) -> None:
    """Refuse what can be seen to be wrong before anything is made."""
    for key, text in given.items():
        if key not in DISK_KEYS:
            continue
        drive = drives.parse(text)
        new = drives.new_disk(drive)
        storage = drives.new_cloudinit(drive) or (new and (new[0] or default_storage))
        if storage:
            state.require_storage(storage)
        if key == "efidisk0" and new and not drive.get("import-from") and firmware.find() is None:
            raise Refusal("efidisk0: OVMF is not installed on this node; run: apt install ovmf")
        if source := drive.get("import-from"):
            if not new or new[1]:
                raise faulty({key: "'import-from' requires special syntax - use <storage ID>:0,import-from=<source>"})
            state.disks.path(source)
        elif new and not new[1]:
            raise faulty({key: "a disk's size must be at least 1 MiB"})
        elif drives.has_volume(drive) and not storage:
            state.disks.path(drive["file"])


def create(state: State, vmid: int, given: Mapping[str, str], default_storage: str, log: Log | None) -> Made:
    """The given options with their volumes made, MAC addresses drawn."""
    made = Made(state, dict(given))
    say = log or (lambda _line: None)
    try:
        for key in given:
            if key in DISK_KEYS:
                made.values[key] = _make(made, vmid, key, default_storage, say)
            elif key.startswith("net"):
                made.values[key] = complete_net(given[key])
            elif key == "vmgenid" and given[key] == "1":
                made.values[key] = str(uuid.uuid4())
    except BaseException:
        made.undo()
        raise
    return made


def _make(made: Made, vmid: int, key: str, default_storage: str, say: Log) -> str:
    disks, drive = made.state.disks, drives.parse(made.values[key])
    new = drives.new_disk(drive)
    if storage := drives.new_cloudinit(drive):
        _refuse_second_cloudinit(made, vmid, key)
        drive["file"] = disks.allocate(storage, vmid, size=CLOUDINIT_BYTES, name=f"vm-{vmid}-cloudinit")
        made.volids.append(drive["file"])
        drive["media"] = "cdrom"
    elif new is not None:
        storage, size = new[0] or default_storage, new[1]
        if source := drive.get("import-from"):
            say(f"importing disk '{source}' as {key}...")
            drive["file"] = _import(made, vmid, storage, source, drive.get("format"), say)
        else:
            size = _FIXED_BYTES.get(key) or size
            drive["file"] = disks.allocate(storage, vmid, size=size, format=drive.get("format"))
            if key == "efidisk0":
                firmware.write_variables(disks.path(drive["file"]))
        made.volids.append(drive["file"])
        drive["size"] = drives.render_size(disks.size(drive["file"]))
    else:
        if drives.has_volume(drive) and not drives.is_cloudinit(drive):
            drive["size"] = drives.render_size(disks.size(drive["file"]))
        return drives.render(drive)
    text = drives.render(drive)
    say(f"{key}: successfully created disk '{text}'")
    return text


def _import(made: Made, vmid: int, storage: str, source: str, format: str | None, say: Log) -> str:
    """A volume made of an uploaded image, or of another VM's volume, which must not change meanwhile."""
    disks = made.state.disks
    if ":import/" in source or ":iso/" in source:
        return disks.import_image(storage, vmid, disks.path(source), progress=say)
    path = disks.path(source)
    if is_written(path):
        raise Refusal(f"cannot import from '{source}' - it is in use by a running VM")
    return disks.copy(source, vmid, storage=storage, snapshot=None, format=format, progress=say, monitor=None)


def _refuse_second_cloudinit(made: Made, vmid: int, key: str) -> None:
    config = made.state.configs.find(vmid)
    for other, drive in drives.attached(config.effective) if config else ():
        if other != key and drives.is_cloudinit(drive):
            raise Refusal(f"{key} - cloud-init drive is already attached at '{other}'")


def complete_net(text: str, *, is_new_mac: bool = False) -> str:
    """A network card's string with a MAC address, drawn from Proxmox's own range when it has none."""
    properties = split_properties(NET, text)
    model, given = properties.pop("model"), properties.pop("macaddr", "")
    mac = new_mac() if is_new_mac or not given else given.upper()
    return ",".join([f"{model}={mac}", *(f"{key}={value}" for key, value in sorted(properties.items()))])


def new_mac() -> str:
    tail = uuid.uuid4().hex[:6].upper()
    return f"BC:24:11:{tail[:2]}:{tail[2:4]}:{tail[4:]}"


def new_identity(qemu_version: str) -> dict[str, str]:
    """What each new VM is given: its SMBIOS uuid, its generation id, when it was made and with what."""
    return {
        "smbios1": f"uuid={uuid.uuid4()}",
        "vmgenid": str(uuid.uuid4()),
        "meta": f"creation-qemu={qemu_version},ctime={int(time.time())}",
    }
