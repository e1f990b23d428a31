"""Clones and templates. Linked clones of one stopped source run side by side; a running source is held alone."""

from __future__ import annotations

import uuid
from contextlib import AbstractContextManager
from typing import Any

from autovibe.node import drives
from autovibe.node.options import OPTIONS
from autovibe.node.parameters import split_properties
from autovibe.node.refusal import Refusal
from autovibe.node.state import Call, State, disks_of, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs.create import refuse_pool, remove_half_made
from autovibe.node.vmconfig import SNAPSHOT_KEYS, Config
from autovibe.node.volumes import complete_net

_NOT_COPIED = ("lock", "template", "meta", *SNAPSHOT_KEYS)


def clone(state: State, call: Call) -> str:
    """Check all that Proxmox checks before the task, take the new vmid, copy or link the disks in the task."""
    vmid, new = call.vmid, call["newid"]
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
            _finish(state, new, {**values, **made})
        except Exception as error:
            remove_half_made(state, new)
            raise Refusal(f"clone failed: {error}") from error

    intent = {"vmid": vmid, "newid": new}
    return state.tasks.start(call.actor, "qmclone", vmid, work, intent=intent, prepare=take)


def _taken(new: int) -> Refusal:
    return Refusal(f"unable to create VM {new}: config file already exists")


def _check_clone(state: State, call: Call, config: Config) -> bool:
    """Whether it is to be a full clone; raises everything that is wrong with the request."""
    target, snapshot = call.get("target"), call.get("snapname")
    if target not in (None, state.name):
        raise Refusal(f"no such cluster node '{target}'")
    config.check_lock()
    if snapshot is not None:
        config.snapshot(snapshot)
    if state.configs.exists(call["newid"]):
        raise _taken(call["newid"])
    refuse_pool(call)
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
        if key.startswith("net"):
            values[key] = complete_net(values[key], is_new_mac=True)
    smbios = {**split_properties(OPTIONS["smbios1"].form, values.get("smbios1", "")), "uuid": str(uuid.uuid4())}  # type: ignore[arg-type]
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
    return state.locks.exclusive(vmid) if state.qemu.is_running(vmid) else state.locks.shared(vmid)


def _clone_disks(state: State, call: Call, values: dict[str, str], task: Task, *, is_full: bool) -> dict[str, str]:
    """The drives with the clone's own volumes; an ISO image stays what it is."""
    new, snapshot = call["newid"], call.get("snapname")
    made: dict[str, str] = {}
    for key, drive in drives.attached(values):
        if not drives.is_owned(drive):
            continue
        task.check()
        volid = drive["file"]
        if is_full or drives.is_cloudinit(drive):
            task.log(f"create full clone of drive {key} ({volid})")
            options: dict[str, Any] = {"storage": call.get("storage") or volid.partition(":")[0], "format": None}
            if drives.is_cloudinit(drive):
                monitor, source = None, None
            else:
                monitor, source, options["format"] = state.monitor(call.vmid), snapshot, call.get("format")
            drive["file"] = state.disks.copy(volid, new, snapshot=source, progress=task.log, monitor=monitor, **options)
        else:
            task.log(f"create linked clone of drive {key} ({volid})")
            drive["file"] = state.disks.clone(volid, new, snapshot=snapshot)
        if not drives.is_cloudinit(drive):
            drive["size"] = drives.render_size(state.disks.size(drive["file"]))
        made[key] = drives.render(drive)
    return made


def _finish(state: State, new: int, values: dict[str, str]) -> None:
    """The moment the clone becomes a VM: its lock goes with the same write."""
    state.configs.save(new, Config(values))


def template(state: State, call: Call) -> str:
    vmid = call.vmid
    config = state.configs.load(vmid)
    config.check_lock()
    _refuse_template(state, vmid, config)
    if call.get("disk") and call["disk"] not in config.values:
        raise Refusal(f"disk '{call['disk']}' does not exist")

    def work(task: Task) -> None:
        with state.locks.exclusive(vmid):
            present = state.configs.load(vmid)
            present.check_lock()
            _refuse_template(state, vmid, present)
            make_template(state, vmid, present, task)

    return start_vm_task(state, call, "qmtemplate", work)


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
