"""What becomes of a configuration when options are set, deleted and reverted; it touches no volume and no VM.

A change is pending first. What the VM can take, because it is stopped or by `hotplug`, is then `settle`d: it becomes
current, and the volumes that nothing names any more are answered, to be freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autovibe.node.schema.options import DISK_KEYS
from autovibe.node.vm import drives, vmstate
from autovibe.node.vm.vmconfig import Config


def request(config: Config, given: Mapping[str, str], deletions: Iterable[str], *, is_forced: bool) -> list[str]:
    """Make changes pending; deletions of unused volumes are done at once, and answered to be freed."""
    gone: list[str] = []
    for name in deletions:
        gone += _request_deletion(config, name, is_forced=is_forced)
    for name, value in given.items():
        _forget_deletion(config, name)
        gone += _keep_waiting_disk(config, name, value)
        config.pending[name] = value
        if name in DISK_KEYS and name not in config.values and "media=cdrom" in value:
            _append_to_boot(config, name)
    drop_idle(config)
    return gone


def _request_deletion(config: Config, name: str, *, is_forced: bool) -> list[str]:
    waiting = config.pending.pop(name, None)
    gone: list[str] = []
    if name == "vmstate":
        return _forget_state(config)
    if name.startswith("unused"):
        return delete(config, name, is_forced=True)
    if waiting is not None and name in DISK_KEYS:
        gone += _leave(config, waiting, is_forced=is_forced)
    if name in config.values:
        _forget_deletion(config, name)
        config.deletions.append(name)
        if is_forced:
            config.forced.append(name)
        drop_from_boot(config, name)
    return gone


def _forget_state(config: Config) -> list[str]:
    """Make a VM that was suspended to disk an ordinary stopped one."""
    volid = config.values.get("vmstate")
    for key in vmstate.KEYS:
        config.values.pop(key, None)
    if config.get("lock") == "suspended":
        del config.values["lock"]
    return [volid] if volid else []


def revert(config: Config, names: Iterable[str]) -> None:
    """Take back what is pending; a disk that was made for it stays as unused."""
    for name in names:
        waiting = config.pending.pop(name, None)
        _forget_deletion(config, name)
        if waiting is not None and name in DISK_KEYS:
            _leave(config, waiting, is_forced=False)


def drop_idle(config: Config) -> None:
    """What is pending and as it is already needs no waiting."""
    for name in [name for name, value in config.pending.items() if config.values.get(name) == value]:
        del config.pending[name]
    for name in [name for name in config.deletions if name not in config.values]:
        _forget_deletion(config, name)


def settle(config: Config, name: str) -> list[str]:
    """Make one pending change current: the volumes to be freed."""
    if name in config.deletions:
        is_forced = name in config.forced
        _forget_deletion(config, name)
        return delete(config, name, is_forced=is_forced)
    value = config.pending.pop(name)
    gone = _detach(config, name, replacement=value)
    config.values[name] = value
    if name in DISK_KEYS:  # an unused volume that is attached again is no longer unused
        volid = drives.parse(value)["file"]
        for key in [key for key, text in config.values.items() if key.startswith("unused") and text == volid]:
            del config.values[key]
    return gone


def delete(config: Config, name: str, *, is_forced: bool = False) -> list[str]:
    """Drop an option. A disk becomes unused, or when `is_forced` it is to be freed, as a cloud-init drive always is."""
    text = config.values.get(name)
    if text is None:
        return []
    gone: list[str] = []
    if name.startswith("unused"):
        gone.append(drives.parse(text)["file"])
    del config.values[name]
    if name in DISK_KEYS:
        gone += _leave(config, text, is_forced=is_forced)
        drop_from_boot(config, name)
    return [volid for volid in gone if volid not in _named(config)]


def _detach(config: Config, name: str, replacement: str) -> list[str]:
    """What becomes of the volume that a bus and number held, unless it is the same with other properties."""
    text = config.values.get(name)
    if name not in DISK_KEYS or text is None or drives.parse(replacement)["file"] == drives.parse(text)["file"]:
        return []
    del config.values[name]
    return _leave(config, text, is_forced=False)


def _keep_waiting_disk(config: Config, name: str, replacement: str) -> list[str]:
    waiting = config.pending.pop(name, None)
    if waiting is None or name not in DISK_KEYS or drives.parse(replacement)["file"] == drives.parse(waiting)["file"]:
        return []
    return _leave(config, waiting, is_forced=False)


def _leave(config: Config, text: str, *, is_forced: bool) -> list[str]:
    """A drive's volume after its drive: unused, or to be freed."""
    drive = drives.parse(text)
    if not drives.is_owned(drive) or drive["file"] in _named(config):
        return []
    if is_forced or drives.is_cloudinit(drive):
        return [drive["file"]]
    drives.add_unused(config.values, drive["file"])
    return []


def _named(config: Config) -> set[str]:
    """The volumes that the configuration, what is pending, or a snapshot names."""
    sections = (config.values, config.pending, *config.snapshots.values())
    return {volid for values in sections for volid in drives.owned_volumes(values)}


def _forget_deletion(config: Config, name: str) -> None:
    config.deletions = [other for other in config.deletions if other != name]
    config.forced = [other for other in config.forced if other != name]


def _boot_devices(config: Config) -> list[str] | None:
    boot = config.pending.get("boot", config.get("boot"))
    return boot.removeprefix("order=").split(";") if boot.startswith("order=") else None


def drop_from_boot(config: Config, name: str) -> None:
    """Take a device out of the boot order, what is pending of it too."""
    devices = _boot_devices(config)
    if devices and name in devices:
        rest = [device for device in devices if device != name]
        config.pending["boot"] = f"order={';'.join(rest)}" if rest else " "


def _append_to_boot(config: Config, name: str) -> None:
    """A new disc drive can be booted from."""
    devices = _boot_devices(config)
    if devices and name not in devices:
        config.pending["boot"] = f"order={';'.join([*devices, name])}"
