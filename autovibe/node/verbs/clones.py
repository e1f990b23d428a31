"""Clones and templates. Linked clones of one stopped source run side by side; a running source is held alone."""

from __future__ import annotations

import re
import uuid
from contextlib import AbstractContextManager
from typing import Any

from autovibe.node.refusal import Refusal
from autovibe.node.schema.parameters import split_properties
from autovibe.node.schema.property_strings import SMBIOS
from autovibe.node.state import Call, State, disks_of, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs import snapshots
from autovibe.node.verbs.create import remove_half_made
from autovibe.node.vm import drives
from autovibe.node.vm.vmconfig import SNAPSHOT_KEYS, Config
from autovibe.node.vm.volumes import complete_net

_NOT_COPIED = ("lock", "template", "meta", *SNAPSHOT_KEYS)


def clone(state: State, call: Call) -> str:
    """Check all that Proxmox checks before the task, take the new vmid, copy or link the disks in the task."""
    vmid, new, pool = call.vmid, call["newid"], call.get("pool")
    _check_rights(state, call)
    with _hold(state, vmid):
        config = state.configs.load(vmid)
        is_full = _check_clone(state, call, config)
        values = _values_for(call, config)

    def take() -> None:
        if not state.configs.create(new, {"lock": "clone"}):
            raise _taken(new)

    def work(task: Task) -> None:
        try:
            with _hold(state, vmid):
                made = _clone_disks(state, call, values, task, is_full=is_full)
            state.firewall.copy(vmid, new)
            _finish(state, new, {**values, **made}, pool)
        except Exception as error:
            remove_half_made(state, new)
            raise Refusal(f"clone failed: {error}") from error

    intent = {"vmid": vmid, "newid": new}
    return state.tasks.start(call.actor, "qmclone", vmid, work, intent=intent, prepare=take)


def _taken(new: int) -> Refusal:
    return Refusal(f"unable to create VM {new}: config file already exists")


def _check_rights(state: State, call: Call) -> None:
    """What the clone takes beside the source: space on its storages."""
    config = state.configs.load(call.vmid)
    snapshot = call.get("snapname")
    values = config.snapshots.get(snapshot, {}) if snapshot else config.values
    storages = {call["storage"]} if call.get("storage") else {volid.partition(":")[0] for _, volid in disks_of(values)}
    for storage in sorted(storages):
        if not state.allows(call.actor, f"/storage/{storage}", "Datastore.AllocateSpace"):
            raise Refusal(f"Permission check failed (/storage/{storage}, Datastore.AllocateSpace)", status=403)


def _check_clone(state: State, call: Call, config: Config) -> bool:
    """Whether it is to be a full clone; raises everything that is wrong with the request."""
    target, snapshot = call.get("target"), call.get("snapname")
    if pool := call.get("pool"):
        state.access.require_pool(pool)
    if target not in (None, state.name):
        raise Refusal(f"no such cluster node '{target}'")
    config.check_lock()
    if snapshot is not None:
        config.snapshot(snapshot)
    if state.configs.exists(call["newid"]):
        raise _taken(call["newid"])
    is_full = bool(call.get("full", not config.is_template))
    if not is_full:
        for option in ("storage", "format"):
            if call.get(option):
                raise Refusal(f"parameter '{option}' not allowed for linked clones")
    elif storage := call.get("storage"):
        state.require_storage(storage)
    values = config.snapshots[snapshot] if snapshot else config.values
    is_running = state.qemu.is_running(call.vmid)
    feature, kind = ("copy", "Full") if is_full else ("clone", "Linked")
    for key, volid in disks_of(values):
        if not state.disks.has_feature(volid, feature, snapshot=snapshot, is_running=is_running):
            what = f"a snapshot of '{volid}'" if snapshot else f"'{volid}'"
            raise Refusal(f"{kind} clone feature is not supported for {what} ({key})")
    return is_full


def _values_for(call: Call, config: Config) -> dict[str, str]:
    """The clone's configuration before its disks: a new machine in every respect that is seen from outside."""
    snapshot = call.get("snapname")
    source = config.snapshots[snapshot] if snapshot else config.values
    values = {key: text for key, text in source.items() if key not in _NOT_COPIED and not key.startswith("unused")}
    for key in values:
        if re.fullmatch(r"net\d+", key):
            values[key] = complete_net(values[key], is_new_mac=True)
    smbios = {**split_properties(SMBIOS, values.get("smbios1", "")), "uuid": str(uuid.uuid4())}
    values["smbios1"] = ",".join(f"{key}={text}" for key, text in smbios.items())
    if values.get("vmgenid", "0") != "0":
        values["vmgenid"] = str(uuid.uuid4())
    values["name"] = call.get("name") or f"Copy-of-{source.get('name') or f'VM-{call.vmid}'}"
    if "meta" in source:
        values["meta"] = source["meta"]
    if call.get("description") is not None:
        values["description"] = call["description"]
    return values


def _hold(state: State, vmid: int) -> AbstractContextManager[None]:
    """A running source is held alone; of a stopped one many clones are made side by side."""
    return state.locks.exclusive(vmid) if state.qemu.is_running(vmid) else state.locks.shared(vmid)


def _clone_disks(state: State, call: Call, values: dict[str, str], task: Task, *, is_full: bool) -> dict[str, str]:
    """The drives with the clone's own volumes; an ISO image stays what it is."""
    owned = {key: drive for key, drive in drives.attached(values) if drives.is_owned(drive)}
    live = _copy_live(state, call, owned, task) if is_full and not call.get("snapname") else {}
    made: dict[str, str] = {}
    for key, drive in owned.items():
        drive["file"] = live.get(key) or _clone_disk(state, call, key, drive, task, is_full=is_full)
        if not drives.is_cloudinit(drive):
            drive["size"] = drives.render_size(state.disks.size(drive["file"]))
        made[key] = drives.render(drive)
    return made


def _copy_live(state: State, call: Call, owned: dict[str, drives.Drive], task: Task) -> dict[str, str]:
    """Full copies of a running VM's disks, all of one moment, in which the guest's file systems are still."""
    vmid, monitor = call.vmid, state.monitor(call.vmid)
    keys = [key for key, drive in owned.items() if not drives.is_cloudinit(drive)]
    if monitor is None or not keys:
        return {}
    for key in keys:
        task.log(f"create full clone of drive {key} ({owned[key]['file']})")
    config = state.configs.load(vmid)
    volids = state.disks.copy_running(
        [owned[key]["file"] for key in keys],
        call["newid"],
        storage=call.get("storage"),
        format=call.get("format"),
        progress=task.log,
        monitor=monitor,
        limit=call.get("bwlimit", 0) << 10,
        still=lambda: snapshots.frozen(state, vmid, config, task),
    )
    return dict(zip(keys, volids, strict=True))


def _clone_disk(state: State, call: Call, key: str, drive: drives.Drive, task: Task, *, is_full: bool) -> str:
    new, volid, snapshot = call["newid"], drive["file"], call.get("snapname")
    if not is_full and not drives.is_cloudinit(drive):
        task.log(f"create linked clone of drive {key} ({volid})")
        return state.disks.clone(volid, new, snapshot=snapshot)
    task.log(f"create full clone of drive {key} ({volid})")
    options: dict[str, Any] = {"storage": call.get("storage") or volid.partition(":")[0], "format": call.get("format")}
    if drives.is_cloudinit(drive):
        snapshot, options["format"] = None, None
    limit = call.get("bwlimit", 0) << 10
    return state.disks.copy(volid, new, snapshot=snapshot, progress=task.log, monitor=None, limit=limit, **options)


def _finish(state: State, new: int, values: dict[str, str], pool: str | None) -> None:
    """The moment the clone becomes a VM: its lock goes with the same write."""
    if pool:
        state.access.join_pool(pool, new)
    state.configs.save(new, Config(values))


def template(state: State, call: Call) -> str:
    vmid = call.vmid
    config = state.configs.load(vmid)
    config.check_lock()
    _refuse_template(state, vmid, config)
    chosen = call.get("disk")
    if chosen and chosen not in config.values:
        raise Refusal(f"disk '{chosen}' does not exist")

    def work(task: Task) -> None:
        with state.locks.exclusive(vmid):
            present = state.configs.load(vmid)
            present.check_lock()
            _refuse_template(state, vmid, present)
            if chosen:
                _make_base(state, vmid, present, chosen, task)
            else:
                make_template(state, vmid, present, task)

    return start_vm_task(state, call, "qmtemplate", work, disk=chosen)


def _make_base(state: State, vmid: int, config: Config, key: str, task: Task) -> None:
    """Turn one disk into a base volume; the VM becomes a template with it."""
    drive = drives.parse(config.values[key])
    if not drives.has_volume(drive) or drives.is_cdrom(drive):
        raise Refusal(f"disk '{key}' can't be converted to a base volume")
    config.values["template"] = "1"
    state.configs.save(vmid, config)
    task.log(f"convert drive {key} ({drive['file']}) to a base volume")
    drive["file"] = state.disks.make_base(drive["file"])
    config.values[key] = drives.render(drive)
    state.configs.save(vmid, config)


def _refuse_template(state: State, vmid: int, config: Config) -> None:
    if config.snapshots:
        raise Refusal("unable to create template, because VM contains snapshots")
    if config.is_template:
        raise Refusal("you can't convert a template to a template")
    if state.qemu.is_running(vmid):
        raise Refusal("you can't convert a VM to template if VM is running")


def make_template(state: State, vmid: int, config: Config, task: Task) -> None:
    """Turn each disk into a base volume; the configuration is written after each, so that a kill loses no name.

    When the first disk cannot be one, the VM is what it was before.
    """
    config.values["template"] = "1"
    state.configs.save(vmid, config)
    for number, (key, drive) in enumerate(drives.disks(dict(config.values))):
        try:
            task.log(f"convert drive {key} ({drive['file']}) to a base volume")
            drive["file"] = state.disks.make_base(drive["file"])
        except Exception:
            if number == 0:
                del config.values["template"]
                state.configs.save(vmid, config)
            raise
        config.values[key] = drives.render(drive)
        state.configs.save(vmid, config)


def feature(state: State, call: Call) -> dict[str, Any]:
    """Whether every disk's storage can do it."""
    config = state.configs.load(call.vmid)
    snapshot = call.get("snapname")
    values = config.snapshot(snapshot) if snapshot else config.values
    is_running = state.qemu.is_running(call.vmid)
    can = all(
        state.disks.has_feature(volid, call["feature"], snapshot=snapshot, is_running=is_running)
        for _, volid in disks_of(values)
    )
    return {"hasFeature": int(can), "nodes": [state.name]}
