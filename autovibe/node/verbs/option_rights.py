"""Which privilege each option of a VM wants of who sets, changes or deletes it.

As Qemu.pm check_vm_modify_config_perm: what is in none of its lists only root@pam itself may set, and of some options
it depends on the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from autovibe.node.access.auth import Actor
from autovibe.node.refusal import Refusal
from autovibe.node.schema.options import CLOUDINIT, DISK_KEYS
from autovibe.node.schema.parameters import split_properties
from autovibe.node.schema.property_strings import HOST_PCI, NET, USB
from autovibe.node.state import State
from autovibe.node.vm import drives

_PRIVILEGES = {
    "VM.Config.CPU": ("cores", "cpu", "cpulimit", "cpuunits", "numa", "smp", "sockets", "vcpus"),
    "VM.Config.Memory": ("memory", "balloon", "shares", "allow-ksm"),
    "VM.Config.HWType": (
        "acpi", "hotplug", "kvm", "machine", "scsihw", "smbios1", "tablet", "vga", "watchdog", "audio0", "rng0",
    ),
    "VM.Config.Options": (
        "agent", "autostart", "bios", "description", "keyboard", "localtime", "migrate_downtime",
        "migrate_speed", "name", "onboot", "ostype", "protection", "reboot", "spice_enhancements", "startdate",
        "startup", "tags", "tdf", "template",
    ),
    "VM.PowerMgmt": ("freeze",),
    "VM.Config.Disk": ("boot", "bootdisk", "vmstatestorage"),
}  # fmt: skip
_PRIVILEGE = {option: privilege for privilege, options in _PRIVILEGES.items() for option in options}


def check(
    state: State, actor: Actor, vmid: int, given: Mapping[str, str], deletions: Iterable[str], pool: str | None = None
) -> None:
    """Raises the refusal of the first option the actor may not touch; `pool` is where a new VM is to be."""
    if actor.is_root:
        return
    present = config.effective if (config := state.configs.find(vmid)) is not None else {}
    for name in deletions:
        _check(state, actor, vmid, name, present.get(name, ""), "delete", pool)
    for name, value in given.items():
        if name in present and name in DISK_KEYS:
            _check(state, actor, vmid, name, present[name], "modify", pool)
        _check(state, actor, vmid, name, value, "modify" if config is not None else "set", pool)


def _check(state: State, actor: Actor, vmid: int, name: str, value: str, act: str, pool: str | None) -> None:
    kind = name.rstrip("0123456789")
    if name in DISK_KEYS or name == "cdrom":
        _require(state, actor, vmid, pool, *_drive_privileges(value))
    elif kind == "unused":
        _require(state, actor, vmid, pool, "VM.Config.Disk")
    elif kind in ("serial", "usb", "hostpci"):
        _check_device(state, actor, vmid, name, value, act, pool)
    elif kind == "numa" and name != "numa":
        _require(state, actor, vmid, pool, "VM.Config.CPU")
    elif kind == "net":
        _require(state, actor, vmid, pool, "VM.Config.Network")
        _check_bridge(state, actor, value)
    elif name in CLOUDINIT:
        _require(state, actor, vmid, pool, "VM.Config.Cloudinit", "VM.Config.Network", any=True)
    elif name == "vmstate":
        _require(state, actor, vmid, pool, "VM.Config.Disk", "VM.PowerMgmt")
    elif privilege := _PRIVILEGE.get(name):
        _require(state, actor, vmid, pool, privilege)
        if name == "startup" and not state.allows(actor, "/", "Sys.Modify"):
            raise _denied("/", "Sys.Modify")
    else:
        raise Refusal(f"only root can set '{name}' config")


def _drive_privileges(value: str) -> tuple[str, ...]:
    drive = drives.parse(value) if value else {"file": "none"}
    if drives.new_cloudinit(drive) or (drives.has_volume(drive) and drives.is_cloudinit(drive)):
        return ("VM.Config.Cloudinit", "VM.Config.CDROM")
    return ("VM.Config.CDROM",) if drives.is_cdrom(drive) else ("VM.Config.Disk",)


def _check_device(state: State, actor: Actor, vmid: int, name: str, value: str, act: str, pool: str | None) -> None:
    """Devices of the host are root's to give, unless they are given out by a mapping."""
    if name.startswith("serial"):
        if value not in ("", "socket"):
            raise Refusal(f"only root can {act} '{name}' config for real devices")
        _require(state, actor, vmid, pool, "VM.Config.HWType")
        return
    is_usb = name.startswith("usb")
    device = split_properties(USB if is_usb else HOST_PCI, value)
    if device.get("host", "spice").lower() != "spice":
        raise Refusal(f"only root can set '{name}' config for {'real' if is_usb else 'non-mapped'} devices")
    if mapping := device.get("mapping"):
        path = f"/mapping/{'usb' if is_usb else 'pci'}/{mapping}"
        if not state.allows(actor, path, "Mapping.Use"):
            raise _denied(path, "Mapping.Use")
    elif "host" not in device:
        raise Refusal("either 'host' or 'mapping' must be set.")
    _require(state, actor, vmid, pool, "VM.Config.HWType")


def _check_bridge(state: State, actor: Actor, value: str) -> None:
    card = split_properties(NET, value) if value else {}
    if bridge := card.get("bridge"):
        path = f"/sdn/zones/localnetwork/{bridge}" + (f"/{card['tag']}" if "tag" in card else "")
        if not state.allows(actor, path, "SDN.Use"):
            raise _denied(path, "SDN.Use")


def _require(state: State, actor: Actor, vmid: int, pool: str | None, *privileges: str, any: bool = False) -> None:
    paths = [f"/vms/{vmid}", *([f"/pool/{pool}"] if pool else [])]
    for path in paths:
        if state.allows(actor, path, *privileges, any=any):
            return
    raise _denied(paths[0], ("|" if any else ", ").join(privileges))


def _denied(path: str, privileges: str) -> Refusal:
    return Refusal(f"Permission check failed ({path}, {privileges})", status=403)


def check_volumes(state: State, actor: Actor, vmid: int, given: Mapping[str, str], default: str) -> None:
    """New volumes take space of a storage; others must be the VM's own, or files that all may see."""
    if actor.is_root:
        return
    for name, value in given.items():
        if name not in DISK_KEYS and name != "cdrom":
            continue
        drive = drives.parse(value)
        new = drives.new_disk(drive)
        storage = drives.new_cloudinit(drive) or (new and (new[0] or default))
        if storage:
            _require_storage(state, actor, storage, "Datastore.AllocateSpace")
        elif drives.has_volume(drive):
            _check_existing(state, actor, vmid, drive["file"])
        if source := drive.get("import-from"):
            _check_source(state, actor, vmid, source)
    for name, value in given.items():
        if name.startswith("unused"):
            _check_existing(state, actor, vmid, value.split(",")[0].removeprefix("file="))
        elif name == "vmstatestorage":
            _require_storage(state, actor, value, "Datastore.AllocateSpace")
        elif name == "cicustom":
            for part in value.split(","):
                _require_storage(state, actor, part.partition("=")[2].partition(":")[0], "Datastore.Allocate")


def _owner(volid: str) -> int | None:
    match = re.search(r"(?:vm|base)-(\d+)-[^/]*$", volid)
    return int(match[1]) if match else None


def _check_source(state: State, actor: Actor, vmid: int, volid: str) -> None:
    """A VM's disk is copied as a clone copies it."""
    owner = _owner(volid)
    if owner is None:
        _check_existing(state, actor, vmid, volid)
    elif not state.allows(actor, f"/vms/{owner}", "VM.Clone"):
        raise _denied(f"/vms/{owner}", "VM.Clone")


def _check_existing(state: State, actor: Actor, vmid: int, volid: str) -> None:
    owner = _owner(volid)
    if owner is None:
        _require_storage(state, actor, volid.partition(":")[0], "Datastore.AllocateSpace", "Datastore.Audit")
    elif owner != vmid and not state.allows(actor, f"/storage/{volid.partition(':')[0]}", "Datastore.Allocate"):
        state.access.require(actor, f"/storage/{volid.partition(':')[0]}", "Datastore.Audit")
        state.access.require(actor, f"/vms/{owner}", "VM.Config.Disk")


def _require_storage(state: State, actor: Actor, storage: str, *privileges: str) -> None:
    path = f"/storage/{storage}"
    if not state.allows(actor, path, *privileges, any=True):
        raise _denied(path, "|".join(privileges))
