"""The cloud-init drive: its options, its data, writing it anew."""

from __future__ import annotations

from typing import Any

from autovibe.node.refusal import Refusal
from autovibe.node.schema.options import CLOUDINIT
from autovibe.node.state import Call, State
from autovibe.node.verbs.vms import typed_values
from autovibe.node.vm import cloudinit, drives, hotplug


def get(state: State, call: Call) -> list[dict[str, Any]]:
    """The cloud-init options, with what waits for the drive to be written anew."""
    config = state.configs.load(call.vmid)
    values, waiting = typed_values(config.values), typed_values(config.pending)
    entries: list[dict[str, Any]] = []
    for key in (key for key in CLOUDINIT if key in values or key in waiting):
        entry: dict[str, Any] = {"key": key}
        if key in values:
            entry["value"] = values[key]
        if key in waiting:
            entry["pending"] = waiting[key]
        if key in config.deletions:
            entry["delete"] = 1
        entries.append(entry)
    return entries


def put(state: State, call: Call) -> None:
    """Write the drive anew, of a running VM too; cloud-init's waiting options become current with it."""
    with state.locks.exclusive(call.vmid):
        config = state.configs.load(call.vmid)
        config.check_lock()
        if not any(drives.is_cloudinit(drive) for _, drive in drives.attached(config.values)):
            raise Refusal("no cloud-init drive found")
        for key in [key for key in config.pending if key in CLOUDINIT]:
            config.values[key] = config.pending.pop(key)
        for key in [key for key in config.deletions if key in CLOUDINIT]:
            config.deletions.remove(key)
            config.values.pop(key, None)
        state.configs.save(call.vmid, config)
        hotplug.write_cloudinit(state, call.vmid, config)


def dump(state: State, call: Call) -> str:
    config = state.configs.load(call.vmid)
    values = {**config.values, "vmid": str(call.vmid)}
    return cloudinit.dump(values, call["type"], snippet=state.disks.path)
