"""Pending changes given to a running VM: at once where QEMU and the option `hotplug` can, else they wait for a start.

As QemuServer.pm vmconfig_hotplug_pending: what cannot be plugged in stays pending without a word, what fails stays
pending and is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from autovibe.node.disks.volume import DiskError
from autovibe.node.schema.options import APPLIED_AT_ONCE, CLOUDINIT, DRIVE_KEYS
from autovibe.node.schema.parameters import split_properties
from autovibe.node.schema.property_strings import NET, THROTTLES
from autovibe.node.state import State
from autovibe.node.vm import changes, cloudinit, drives, plugs, processors, usage
from autovibe.node.vm.devices import ConfigError, controller, drive_device, nic_device, options
from autovibe.node.vm.monitor import Monitor, MonitorError
from autovibe.node.vm.qemu import forward_address
from autovibe.node.vm.vmconfig import Config

_DEFAULT_FEATURES = "network,disk,usb"
_HELD = frozenset(("cpulimit", "cpuunits", "hotplug"))
"""Options that are current as soon as they are set: nothing of the process depends on them until the next start."""


class NotNow(Exception):
    """The VM cannot take this change while it runs."""


@dataclass
class _Change:
    """One option's change: `new` is None when it is deleted."""

    state: State
    vmid: int
    config: Config
    key: str
    old: str | None
    new: str | None

    @property
    def monitor(self) -> Monitor:
        monitor = self.state.monitor(self.vmid)
        if monitor is None:
            raise NotNow
        return monitor

    @property
    def values(self) -> dict[str, str]:
        """The configuration with this change in it."""
        return {**self.config.values, self.key: self.new or self.old or ""}

    def require(self, feature: str) -> None:
        chosen = self.config.get("hotplug", "1")
        if feature not in (_DEFAULT_FEATURES if chosen == "1" else chosen).replace(";", ",").split(","):
            raise NotNow


def apply(state: State, vmid: int, config: Config, keys: Collection[str]) -> dict[str, str]:
    """Give a running VM what it can take now of pending changes of `keys`; the faults, by option. `config` is saved."""
    errors: dict[str, str] = {}
    for key in [key for key in [*config.deletions, *config.pending] if key in keys]:
        new = None if key in config.deletions else config.pending[key]
        try:
            _taker(key)(_Change(state, vmid, config, key, config.values.get(key), new))
        except NotNow:
            continue
        except (ConfigError, DiskError, MonitorError) as error:
            errors[key] = f"hotplug problem - {error}"
            continue
        gone = changes.settle(config, key)
        changes.drop_idle(config)
        state.configs.save(vmid, config)
        for volid in gone:
            state.disks.free(volid)
    return errors


def after_start(state: State, vmid: int, config: Config) -> None:
    """What a VM is told once it runs: limits of its drives, how much memory it is to leave."""
    monitor = state.monitor(vmid)
    if monitor is None:
        return
    for key, drive in drives.attached(config.values):
        if key in DRIVE_KEYS and any(name in drive for name in THROTTLES):
            plugs.set_throttle(monitor, key, config.values[key])
    if config.get("balloon") != "0":
        monitor.execute(
            "qom-set", path=usage.BALLOON, property="guest-stats-polling-interval", value=usage.POLL_SECONDS
        )
    balloon = int(config.get("balloon", "0"))
    if 0 < balloon < processors.memory_mb(config.values):
        plugs.set_balloon(monitor, balloon)


def write_cloudinit(state: State, vmid: int, config: Config) -> None:
    """Write the cloud-init drive anew, also while the VM reads it: the disc is taken out meanwhile."""
    monitor = state.monitor(vmid)
    for key, drive in drives.attached(config.values):
        if not drives.is_cloudinit(drive):
            continue
        path = state.disks.path(drive["file"])
        if monitor is not None:
            plugs.change_medium(monitor, key, None)
        try:
            values = {**config.values, "vmid": str(vmid)}
            cloudinit.build(path, vmid, values, snippet=state.disks.path)
        finally:
            if monitor is not None:
                plugs.change_medium(monitor, key, path)


def _taker(key: str) -> Callable[[_Change], None]:
    if key in APPLIED_AT_ONCE or key in _HELD:
        return _take
    if key in DRIVE_KEYS:
        return _change_drive
    if key.startswith("net"):
        return _change_card
    if key in CLOUDINIT:
        return _change_cloudinit
    return {"balloon": _change_balloon, "vcpus": _change_processors, "agent": _change_agent}.get(key, _wait)


def _take(_change: _Change) -> None:
    """It is enough that it is in the configuration."""


def _wait(_change: _Change) -> None:
    raise NotNow


def _change_balloon(change: _Change) -> None:
    """The memory the guest is left with; the device itself comes and goes only at a start."""
    memory = processors.memory_mb(change.config.values)
    target = int(change.new) if change.new is not None else memory
    if change.old == "0" or target == 0:
        raise NotNow
    plugs.set_balloon(change.monitor, min(target, memory))


def _change_processors(change: _Change) -> None:
    change.require("cpu")
    most = processors.number(change.config.values, "sockets", 1) * processors.number(change.config.values, "cores", 1)
    wanted = int(change.new) if change.new is not None else most
    if wanted > most:
        raise MonitorError("maximum vcpus is limited by sockets and cores")
    plugs.set_processors(change.monitor, wanted)


def _change_agent(change: _Change) -> None:
    """Everything but its channel's kind, which is a device."""
    if change.new is None or options(change.new).get("type") != options(change.old or "").get("type"):
        raise NotNow


def _change_cloudinit(change: _Change) -> None:
    """With the feature `cloudinit` the guest finds the new data on its drive; what is pending is part of it."""
    change.require("cloudinit")
    settled = change.config.copy()
    changes.settle(settled, change.key)
    write_cloudinit(change.state, change.vmid, settled)


# Network cards


def _change_card(change: _Change) -> None:
    monitor, old, new = change.monitor, change.old, change.new
    if old is not None and new is not None and _same(old, new, "model", "macaddr", "queues", "mtu"):
        plugs.set_link(monitor, change.key, new)
        return
    change.require("network")
    if new is not None and not plugs.has_bus(monitor, nic_device(change.key, change.values, {})):
        raise NotNow
    if old is not None:
        plugs.remove_card(monitor, change.key)
    if new is not None:
        forward = (forward_address(change.vmid), change.state.qemu.forward_port)
        is_restricted = change.state.firewall.restricts_outbound(change.vmid)
        plugs.add_card(monitor, change.key, change.values, forward, is_restricted=is_restricted)


def _same(old: str, new: str, *names: str) -> bool:
    one, other = split_properties(NET, old), split_properties(NET, new)
    return all(one.get(name, "").upper() == other.get(name, "").upper() for name in names)


# Drives


def _change_drive(change: _Change) -> None:
    old = drives.parse(change.old) if change.old is not None else None
    new = drives.parse(change.new) if change.new is not None else None
    if old is not None and new is not None:
        if drives.is_cdrom(old) and drives.is_cdrom(new):
            _change_disc(change, old, new)
            return
        if drives.is_cdrom(old) or drives.is_cdrom(new):
            raise NotNow
        if old["file"] == new["file"]:
            _change_limits(change, old, new)
            return
    _require_pluggable(change)
    if old is not None:
        plugs.remove_drive(change.monitor, change.key, change.config.values)
    if new is not None:
        path = change.state.disks.path(new["file"])
        plugs.add_drive(change.monitor, change.key, path, change.values)


def _require_pluggable(change: _Change) -> None:
    """Disks on SCSI and virtio buses only, and never those of the firmware."""
    change.require("disk")
    if not change.key.startswith(("scsi", "virtio")):
        raise NotNow
    seat = controller(change.key, change.values) if change.key.startswith("scsi") else None
    place = seat or drive_device(change.key, change.values, {}, has_medium=False)
    if not plugs.has_bus(change.monitor, place):
        raise NotNow


def _change_disc(change: _Change, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    if change.key not in plugs.present(change.monitor):
        raise NotNow
    if old["file"] != new["file"]:
        path = change.state.disks.path(new["file"]) if drives.has_volume(new) else None
        plugs.change_medium(change.monitor, change.key, path)


def _change_limits(change: _Change, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Limits of the throughput are taken at once; of the rest, what QEMU is not told."""
    held = (*THROTTLES, "backup", "replicate", "shared", "size", "format", "file")
    if any(old.get(name) != new.get(name) for name in {*old, *new} - set(held)):
        raise NotNow
    plugs.set_throttle(change.monitor, change.key, change.new or "")
