"""A VM's disks: grown, unlinked, moved to another storage or format, given to another VM."""

from __future__ import annotations

from typing import Any

from autovibe.node.disks.volume import is_written
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema.options import DISK_KEYS, OPTIONS
from autovibe.node.schema.parameters import split_properties
from autovibe.node.state import Call, State, check_digest, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs import config as configuration
from autovibe.node.vm import changes, drives, mirrors
from autovibe.node.vm.vmconfig import Config

_EITHER = "either set 'storage' or 'target-vmid', but not both"
_NEITHER = "both 'storage' and 'target-vmid' missing, either needs to be set"


def unlink(state: State, call: Call) -> None:
    """`delete` of the configuration, under the name of old."""
    given: dict[str, Any] = {"node": call["node"], "vmid": call.vmid, "delete": call["idlist"]}
    if call.get("force") is not None:
        given["force"] = call["force"]
    configuration.put(state, Call(call.actor, given))


# Growing one


def resize(state: State, call: Call) -> str:
    state.configs.load(call.vmid)
    is_lock_ignored = call.check_skiplock()

    def work(task: Task) -> None:
        with state.locks.exclusive(call.vmid):
            config = state.configs.load(call.vmid)
            check_digest(config, call.get("digest"))
            if not is_lock_ignored:
                config.check_lock()
            _grow(state, call, config, task)

    return start_vm_task(state, call, "resize", work, disk=call["disk"])


def _grow(state: State, call: Call, config: Config, task: Task) -> None:
    key, text = call["disk"], call["size"]
    drive = _drive(config, key)
    if drives.is_cdrom(drive):
        raise Refusal("you can't resize a cdrom")
    if key not in _GROWING:
        raise Refusal(f"disk '{key}' can't be resized")
    present = state.disks.size(drive["file"])
    size = drives.parse_size(text.removeprefix("+")) + (present if text.startswith("+") else 0)
    if size < present:
        raise Refusal("shrinking disks is not supported")
    task.write(f"update VM {call.vmid}: resize --disk {key} --size {text}")
    state.disks.resize(drive["file"], size, monitor=state.monitor(call.vmid))
    drive["size"] = drives.render_size(size)
    config.values[key] = drives.render(drive)
    state.configs.save(call.vmid, config)


_GROWING = tuple(key for key in DISK_KEYS if key not in ("efidisk0", "tpmstate0"))


def _drive(config: Config, key: str) -> drives.Drive:
    if key not in config.values:
        raise Refusal(f"disk '{key}' does not exist")
    drive = drives.parse(config.values[key])
    if not drives.has_volume(drive):
        raise Refusal(f"disk '{key}' has no associated volume" if not drives.is_cdrom(drive) else _NO_DISC)
    return drive


_NO_DISC = "you can't move a cdrom"


# Moving one


def move(state: State, call: Call) -> str:
    target, storage = call.get("target-vmid"), call.get("storage")
    if target and storage:
        raise faulty({"target-vmid": _EITHER, "storage": _EITHER})
    if target:
        return _give(state, call)
    if not storage:
        raise faulty({"target-vmid": _NEITHER, "storage": _NEITHER})
    return _move(state, call)


def _move(state: State, call: Call) -> str:
    vmid, key, storage = call.vmid, call["disk"], call["storage"]
    _require_space(state, call, storage)
    if key.startswith("unused"):
        raise Refusal(f"cannot move disk '{key}', only configured disks can be moved to another storage")
    config = state.configs.load(vmid)
    old = _check_move(call, config)["file"]
    state.require_storage(storage)

    def work(task: Task) -> None:
        with state.locks.exclusive(vmid):
            present = state.configs.load(vmid)
            drive = _check_move(call, present)
            if _is_in_snapshot(present, drive["file"]):
                task.write("moving disk with snapshots, snapshots will not be moved!")
            try:
                volid = _copy(state, call, drive["file"], task)
            except Exception as error:
                raise Refusal(f"storage migration failed: {error}") from error
            settle_move(state, vmid, key, volid, is_deleting=bool(call.get("delete")))

    intent = {"disk": key, "old": old, "delete": bool(call.get("delete")), "volumes": state.owned_by(vmid)}
    return start_vm_task(state, call, "qmmove", work, **intent)


def _check_move(call: Call, config: Config) -> drives.Drive:
    key, storage, format = call["disk"], call["storage"], call.get("format")
    config.check_lock()
    check_digest(config, call.get("digest"))
    drive = _drive(config, key)
    if drives.is_cdrom(drive):
        raise Refusal(_NO_DISC)
    volid = drive["file"]
    present = volid.rpartition(".")[2] if volid.endswith((".raw", ".qcow2", ".vmdk")) else None
    if volid.partition(":")[0] == storage and (format is None or present is None or present == format):
        raise Refusal("you can't move to the same storage with same format")
    if call.get("delete") and _is_in_snapshot(config, volid):
        raise Refusal("you can't move a disk with snapshots and delete the source")
    return drive


def _is_in_snapshot(config: Config, volid: str) -> bool:
    return any(volid in drives.owned_volumes(values) for values in config.snapshots.values())


def _copy(state: State, call: Call, volid: str, task: Task) -> str:
    """The disk's content as a new volume, which a running VM already uses when this returns."""
    disks, monitor, storage = state.disks, state.monitor(call.vmid), call["storage"]
    task.log(f"create full clone of drive {call['disk']} ({volid})")
    limit = call.get("bwlimit", 0) << 10
    if monitor is None:
        options = {"snapshot": None, "format": call.get("format"), "progress": task.log, "monitor": None}
        return disks.copy(volid, call.vmid, storage=storage, limit=limit, **options)
    made = disks.allocate(storage, call.vmid, size=disks.size(volid), format=call.get("format"))
    try:
        task.log(f"drive mirror is starting for drive-{call['disk']}")
        copy = mirrors.Copy(f"drive-{call['disk']}", disks.path(volid), disks.path(made))
        mirrors.move(monitor, copy, limit=limit, progress=task.log)
    except BaseException:
        disks.free(made)
        raise
    return made


def settle_move(state: State, vmid: int, key: str, volid: str, *, is_deleting: bool) -> None:
    """Write down where a disk is now; what it was is unused, or freed."""
    config = state.configs.load(vmid)
    drive = drives.parse(config.values[key])
    old, drive["file"] = drive["file"], volid
    drive["size"] = drives.render_size(state.disks.size(volid))
    if config.is_template:
        drive["file"] = state.disks.make_base(volid)
    config.values[key] = drives.render(drive)
    if not is_deleting:
        drives.add_unused(config.values, old)
    state.configs.save(vmid, config)
    if is_deleting:
        state.disks.free(old)


# Giving one to another VM


def _give(state: State, call: Call) -> str:
    vmid, target = call.vmid, call["target-vmid"]
    key = call["disk"]
    new_key = call.get("target-disk", key)
    if not state.allows(call.actor, f"/vms/{target}", "VM.Config.Disk"):
        raise Refusal(f"Permission check failed (/vms/{target}, VM.Config.Disk)", status=403)
    if vmid == target:
        raise faulty({"target-vmid": "must be different than source VMID to reassign disk"})
    volid = _check_give(state, call, new_key)
    _require_space(state, call, volid.partition(":")[0])

    def work(task: Task) -> None:
        first, second = sorted((vmid, target))
        with state.locks.exclusive(first), state.locks.exclusive(second):
            _check_give(state, call, new_key)
            task.write(f"moving disk '{key}' from VM '{vmid}' to '{target}'")
            _reassign(state, call, new_key, task)

    intent = {"vmid": vmid, "target": target, "disk": key, "volumes": state.owned_by(target)}
    return state.tasks.start(call.actor, "qmmove", f"{vmid}-{key}>{target}-{new_key}", work, intent=intent)


def _check_give(state: State, call: Call, new_key: str) -> str:
    """The volume that can be given; raises what Proxmox refuses."""
    vmid, target, key = call.vmid, call["target-vmid"], call["disk"]
    if not state.configs.exists(target):
        raise Refusal(f"could not find target VM {target}")
    source, taker = state.configs.load(vmid), state.configs.load(target)
    source.check_lock()
    taker.check_lock()
    if source.is_template or taker.is_template:
        raise Refusal("Can't move disks from or to template VMs")
    for number, config, digest in ((vmid, source, "digest"), (target, taker, "target-digest")):
        if call.get(digest) not in (None, config.digest):
            raise Refusal(f"VM {number}: checksum mismatch (file change by other user?)")
    if key not in source.values:
        raise Refusal(f"Disk '{key}' for VM '{vmid}' does not exist")
    if new_key in taker.effective:
        raise Refusal(f"Target disk key '{new_key}' is already in use for VM '{target}'")
    drive = drives.parse(source.values[key])
    if drives.is_cdrom(drive):
        raise Refusal("CD drive contents can't be moved to another VM")
    if not drives.has_volume(drive):
        raise Refusal(f"disk '{key}' has no associated volume")
    if _is_in_snapshot(source, drive["file"]):
        raise Refusal("Can't move disk used by a snapshot to another VM")
    if state.qemu.is_running(vmid) and not key.startswith("unused"):
        raise Refusal("Cannot move disk to another VM while the source VM is running - detach first")
    return drive["file"]


def _reassign(state: State, call: Call, new_key: str, task: Task) -> None:
    vmid, target, key = call.vmid, call["target-vmid"], call["disk"]
    source = state.configs.load(vmid)
    drive = drives.parse(source.values[key])
    if is_written(state.disks.path(drive["file"])):
        raise Refusal(f"volume '{drive['file']}' is in use")
    drive["file"] = state.disks.rename(drive["file"], target)
    is_in_boot = key in source.get("boot").removeprefix("order=").split(";")
    del source.values[key]
    changes.drop_from_boot(source, key)
    if is_in_boot:
        task.write(f"removing disk '{key}' from boot order config")
        source.values["boot"] = source.pending.pop("boot")
    task.write(f"removing disk '{key}' from VM '{vmid}' config")
    state.configs.save(vmid, source)
    text = drive["file"] if new_key.startswith("unused") else _fitting(new_key, drive)
    if new_key.startswith("unused"):
        taker = state.configs.load(target)
        taker.values[new_key] = text
        state.configs.save(target, taker)
        return
    configuration.put(state, Call(call.actor, {"node": call["node"], "vmid": target, new_key: text}))


def _fitting(key: str, drive: drives.Drive) -> str:
    """The drive string without what its new bus does not know."""
    form: Any = OPTIONS[key].form
    return ",".join(
        value if name == "file" else f"{name}={value}"
        for name, value in sorted(drive.items(), key=lambda item: item[0] != "file")
        if name in split_properties(form, drives.render(drive)) and name in form
    )


def _require_space(state: State, call: Call, storage: str) -> None:
    if not state.allows(call.actor, f"/storage/{storage}", "Datastore.AllocateSpace"):
        raise Refusal(f"Permission check failed (/storage/{storage}, Datastore.AllocateSpace)", status=403)
