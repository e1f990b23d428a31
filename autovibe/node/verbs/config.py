"""A VM's configuration: reading it, changing it, what is pending, growing a disk.

A running VM takes some options at once; all others are pending until it stops or starts.
"""

from __future__ import annotations

from typing import Any

from autovibe.node import drives, volumes
from autovibe.node.options import APPLIED_AT_ONCE, DRIVE_KEYS, OPTIONS, ROOT_ONLY
from autovibe.node.parameters import render
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State, check_digest, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs.vms import typed_values
from autovibe.node.vmconfig import Config

_CONTROL = ("node", "vmid", "delete", "revert", "digest", "force", "skiplock", "background_delay")
_CONTROL_OF_CREATE = (
    "pool",
    "storage",
    "start",
    "unique",
    "archive",
    "bwlimit",
    "import-working-storage",
    "ha-managed",
)


def options_of(call: Call) -> dict[str, str]:
    """The options a call sets, as stored. Raises the refusal of those only root@pam may set."""
    control = (*_CONTROL, *_CONTROL_OF_CREATE)
    given = {name: render(value) for name, value in call.parameters.items() if name not in control}
    for name in ROOT_ONLY:
        if name in given and not call.actor.is_root:
            raise Refusal(f"only root can set '{name}' config")
    return given


def get(state: State, call: Call) -> dict[str, Any]:
    config = state.configs.load(call.vmid)
    if name := call.get("snapshot"):
        return {**typed_values(config.snapshot(name)), "digest": config.digest}
    values = config.values if call.get("current") else config.effective
    return {**typed_values(values), "digest": config.digest}


def pending(state: State, call: Call) -> list[dict[str, Any]]:
    """Each option with its value, and where they wait, its `pending` value or `delete`."""
    config = state.configs.load(call.vmid)
    entries: list[dict[str, Any]] = []
    waiting = typed_values(config.pending)
    for key, value in {**typed_values(config.values), "digest": config.digest}.items():
        entry: dict[str, Any] = {"key": key, "value": value}
        if key in waiting:
            entry["pending"] = waiting[key]
        elif key in config.deletions:
            entry["delete"] = 1
        entries.append(entry)
    return entries + [{"key": key, "pending": waiting[key]} for key in waiting if key not in config.values]


def put(state: State, call: Call) -> None:
    """Change it now."""
    _change(state, call, None)


def post(state: State, call: Call) -> str:
    """Change it in a task; what can be refused is refused before."""
    given, deletions = _check_change(state, call)
    intent = {"volumes": state.owned_by(call.vmid)}
    return start_vm_task(
        state, call, "qmconfig", lambda task: _apply_change(state, call, given, deletions, task), **intent
    )


def _change(state: State, call: Call, task: Task | None) -> None:
    given, deletions = _check_change(state, call)
    _apply_change(state, call, given, deletions, task)


def _check_change(state: State, call: Call) -> tuple[dict[str, str], list[str]]:
    """What is set and what is deleted. Everything is checked before anything changes."""
    given = options_of(call)
    is_lock_ignored = call.check_skiplock()
    deletions = _names(call.get("delete", ""))
    for name in deletions:
        if name not in OPTIONS:
            raise faulty({"delete": f"unknown option '{name}'"})
        if name in given:
            raise faulty({"delete": f"you can't use '-{name}' and -delete {name}' at the same time"})
        if name in ROOT_ONLY and not call.actor.is_root:
            raise Refusal(f"only root can set '{name}' config")
    config = state.configs.load(call.vmid)
    check_digest(config, call.get("digest"))
    if not is_lock_ignored:
        config.check_lock()
    for name in deletions:
        if config.has("protection") and (name in DRIVE_KEYS or name.startswith("unused")):
            raise Refusal(f"can't remove drive '{name}' - protection mode enabled")
    if not given and not deletions and not call.get("revert"):
        raise Refusal("no options specified", status=400)
    volumes.check(state, given, "local")
    return given, deletions


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").replace(";", " ").split() if name]


def _apply_change(state: State, call: Call, given: dict[str, str], deletions: list[str], task: Task | None) -> None:
    vmid = call.vmid
    log = task.write if task else None
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        check_digest(config, call.get("digest"))
        if not call.get("skiplock"):
            config.check_lock()
        for name in _names(call.get("revert", "")):
            config.pending.pop(name, None)
            config.deletions = [other for other in config.deletions if other != name]
        made = volumes.create(state, vmid, given, "local", log)
        try:
            gone = _merge(config, made.values, deletions)
            state.configs.save(vmid, config)
        except BaseException:
            made.undo()
            raise
        for volid in gone:
            state.disks.free(volid)
        if not state.qemu.is_running(vmid):
            apply_pending(state, vmid)


def _merge(config: Config, given: dict[str, str], deletions: list[str]) -> list[str]:
    """Put changes where they belong, at once or to what is pending: the volumes that are to be freed."""
    gone: list[str] = []
    for name, value in given.items():
        config.deletions = [other for other in config.deletions if other != name]
        if name in APPLIED_AT_ONCE:
            config.values[name] = value
        elif config.values.get(name) == value:
            config.pending.pop(name, None)
        else:
            config.pending[name] = value
    for name in deletions:
        config.pending.pop(name, None)
        if name in APPLIED_AT_ONCE or name.startswith("unused"):
            gone += _delete(config, name)
        elif name in config.values and name not in config.deletions:
            config.deletions.append(name)
    return gone


def apply_pending(state: State, vmid: int) -> Config:
    """Make what is pending current: of a stopped VM, at each change, stop and start."""
    config = state.configs.load(vmid)
    if not config.pending and not config.deletions:
        return config
    gone = [volid for name in config.deletions for volid in _delete(config, name)]
    for name, value in config.pending.items():
        _detach(config, name, replacement=value)
        config.values[name] = value
        if name in DRIVE_KEYS:  # an unused volume that is attached again is no longer unused
            volid = drives.parse(value)["file"]
            for key in [key for key, text in config.values.items() if key.startswith("unused") and text == volid]:
                del config.values[key]
    config.pending, config.deletions = {}, []
    state.configs.save(vmid, config)
    for volid in gone:
        state.disks.free(volid)
    return config


def _delete(config: Config, name: str) -> list[str]:
    """Drop an option. A disk becomes unused; an unused one is to be freed, and so is a cloud-init drive."""
    text = config.values.get(name)
    if text is None:
        return []
    gone: list[str] = []
    if name in DRIVE_KEYS:
        drive = drives.parse(text)
        _detach(config, name)
        if drives.is_owned(drive) and drives.is_cloudinit(drive):
            gone.append(drive["file"])
        _drop_from_boot(config, name)
    elif name.startswith("unused"):
        gone.append(drives.parse(text)["file"])
    config.values.pop(name, None)
    return gone


def _detach(config: Config, name: str, replacement: str = "") -> None:
    """Keep the disk that a bus and number held as unused, unless it is the same one with other properties."""
    text = config.values.get(name)
    if name not in DRIVE_KEYS or text is None:
        return
    drive = drives.parse(text)
    if drives.is_owned(drive) and not drives.is_cloudinit(drive):
        if replacement and drives.parse(replacement)["file"] == drive["file"]:
            return
        del config.values[name]
        drives.add_unused(config.values, drive["file"])


def _drop_from_boot(config: Config, name: str) -> None:
    devices = config.get("boot").removeprefix("order=").split(";")
    if config.get("boot").startswith("order=") and name in devices:
        rest = [device for device in devices if device != name]
        config.values["boot"] = f"order={';'.join(rest)}" if rest else " "


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
    if key not in config.values:
        raise Refusal(f"disk '{key}' does not exist")
    drive = drives.parse(config.values[key])
    if drives.is_cdrom(drive):
        raise Refusal("you can't resize a cdrom")
    present = state.disks.size(drive["file"])
    size = drives.parse_size(text.removeprefix("+")) + (present if text.startswith("+") else 0)
    if size < present:
        raise Refusal("shrinking disks is not supported")
    task.write(f"update VM {call.vmid}: resize --disk {key} --size {text}")
    state.disks.resize(drive["file"], size, monitor=state.monitor(call.vmid))
    drive["size"] = drives.render_size(size)
    config.values[key] = drives.render(drive)
    state.configs.save(call.vmid, config)
