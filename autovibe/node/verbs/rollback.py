"""Going back to a snapshot: disks, configuration and, where it has them, RAM and processes.

The lock `rollback` is kept until the VM is what it was; before that, doing it all again is harmless: a disk is again
what it was at the snapshot, and a VM that is loaded from its RAM has not run yet.
"""

from __future__ import annotations

import uuid

from autovibe.node.refusal import Refusal
from autovibe.node.state import Call, State, disks_of, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs import power
from autovibe.node.verbs.snapshots import unlock
from autovibe.node.vm import drives, vmstate
from autovibe.node.vm.vmconfig import SNAPSHOT_KEYS, Config

_NOT_RESTORED = (*SNAPSHOT_KEYS, *vmstate.KEYS, "description", "lock")


def rollback(state: State, call: Call) -> str:
    vmid, name = call.vmid, call["snapname"]
    state.configs.load(vmid)

    def work(task: Task) -> None:
        with state.locks.exclusive(vmid):
            config = state.configs.load(vmid)
            _check(state, config, name)
            config.values["lock"] = "rollback"
            state.configs.save(vmid, config)
            if state.qemu.is_running(vmid):
                state.qemu.stop(vmid)
        finish(state, vmid, name, task)
        if call.get("start") and not state.qemu.is_running(vmid):
            power.start_vm(state, vmid, task)

    return start_vm_task(state, call, "qmrollback", work, snapname=name, start=bool(call.get("start")))


def _check(state: State, config: Config, name: str) -> None:
    """Raises what stands against a rollback, before the VM is stopped for it."""
    if config.is_template:
        raise Refusal("you can't rollback if vm is a template")
    kept = config.snapshot(name)
    for _, volid in disks_of(kept):
        if name not in state.disks.snapshots(volid):
            raise Refusal(f"snapshot '{name}' of volume '{volid}' does not exist")
    if "snapstate" in kept:
        raise Refusal(f"unable to rollback to incomplete snapshot (snapstate = {kept['snapstate']})")
    config.check_lock()


def finish(state: State, vmid: int, name: str, task: Task) -> None:
    """All of it, of a VM that is locked and stopped; it runs afterwards when the snapshot has its RAM."""
    kept = state.configs.load(vmid).snapshot(name)
    try:
        for key, volid in disks_of(kept):
            task.log(f"rolling back 'drive-{key}' ({volid})")
            state.disks.rollback(volid, name)
        with state.locks.exclusive(vmid):
            config = state.configs.load(vmid)
            gone = _restore(config, kept, name)
            config.values["lock"] = "rollback"
            state.configs.save(vmid, config)
            state.free_all(vmid, gone)
            if "vmstate" in kept:
                _load(state, vmid, config, kept, task)
    finally:
        unlock(state, vmid)
    if "vmstate" in kept:
        state.qemu.resume(vmid)


def _restore(config: Config, kept: dict[str, str], name: str) -> list[str]:
    """Make the configuration what it was, but for its description. What is pending is dropped; disks that were added
    since become unused ones, and a cloud-init drive is to be freed: the volumes of those.
    """
    before = [*drives.owned_volumes(config.values), *drives.owned_volumes(config.pending)]
    stays = {key: text for key, text in config.values.items() if key == "description" or key.startswith("unused")}
    config.values = {**stays, **{key: text for key, text in kept.items() if key not in _NOT_RESTORED}, "parent": name}
    config.pending, config.deletions = {}, []
    if config.get("vmgenid", "0") != "0":
        config.values["vmgenid"] = str(uuid.uuid4())
    used = [drive["file"] for _, drive in drives.attached(config.values)]
    for key in [key for key in stays if key.startswith("unused") and drives.parse(stays[key])["file"] in used]:
        del config.values[key]
    gone = []
    for volid in dict.fromkeys(before):
        if volid in drives.owned_volumes(config.values):
            continue
        if drives.is_cloudinit({"file": volid}):
            gone.append(volid)
        else:
            drives.add_unused(config.values, volid)
    return gone


def _load(state: State, vmid: int, config: Config, kept: dict[str, str], task: Task) -> None:
    """Start the VM from the snapshot's RAM; it is paused then. Its new generation id is told to the guest so."""
    values = {**config.values, **{key: kept[key] for key in vmstate.KEYS if key in kept}}
    power.write_cloudinit(state, vmid, config, task.write)
    paths = power.volume_paths(state, config)
    state.qemu.start(vmid, values, paths, state=state.disks.path(kept["vmstate"]))
