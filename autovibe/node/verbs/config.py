"""A VM's configuration: reading it, changing it, what is pending.

A running VM takes at once what it can (`hotplug`); the rest is pending until it stops or starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from autovibe.node.access import passwords
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema.options import DISK_KEYS, OPTIONS
from autovibe.node.schema.parameters import render
from autovibe.node.state import Call, State, check_digest, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs import option_rights
from autovibe.node.verbs.vms import typed_values
from autovibe.node.vm import changes, hotplug, processors, volumes
from autovibe.node.vm.vmconfig import Config

_CONTROL = (
    "node", "vmid", "delete", "revert", "digest", "force", "skiplock", "background_delay", "pool", "storage", "start",
    "unique", "archive", "bwlimit", "import-working-storage", "ha-managed", "live-restore",
)  # fmt: skip
_KEY = re.compile(
    r"([^#\s].*\s)?(ssh-(rsa|dss|ed25519)|ecdsa-sha2-nistp(256|384|521)|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r"\s+[A-Za-z0-9+/]+={0,2}(\s.*)?"
)


def options_of(call: Call) -> dict[str, str]:
    """The options a call sets, as stored."""
    given = {name: render(value) for name, value in call.parameters.items() if name not in _CONTROL}
    if "cdrom" in given:  # the name of old for the disc drive
        disc = given.pop("cdrom")
        if "ide2" in given:
            raise faulty({"cdrom": "option conflicts with option 'ide2'"})
        given["ide2"] = disc if "media=" in disc else f"{disc},media=cdrom"
    _check_keys(given.get("sshkeys", ""))
    if password := given.get("cipassword"):
        given["cipassword"] = passwords.hashed(password)
    return given


def _check_keys(text: str) -> None:
    lines = [line.strip() for line in unquote(text).splitlines()]
    if not all(_KEY.fullmatch(line) for line in lines if line and not line.startswith("#")):
        raise Refusal("SSH public key validation error")


def get(state: State, call: Call) -> dict[str, Any]:
    config = state.configs.load(call.vmid)
    if name := call.get("snapshot"):
        if call.get("current"):
            fault = "cannot use 'snapshot' parameter with 'current'"
            raise faulty({"snapshot": fault, "current": fault})
        return {**typed_values(config.snapshot(name)), "digest": config.digest}
    values = config.values if call.get("current") else config.effective
    return {**typed_values(values), "digest": config.digest}


def pending(state: State, call: Call) -> list[dict[str, Any]]:
    """Each option with its value, and where they wait, its `pending` value or `delete` (2: with the disk's volume)."""
    config = state.configs.load(call.vmid)
    entries: list[dict[str, Any]] = []
    waiting = typed_values(config.pending)
    for key, value in {**typed_values(config.values), "digest": config.digest}.items():
        entry: dict[str, Any] = {"key": key, "value": value}
        if key in waiting:
            entry["pending"] = waiting[key]
        elif key in config.deletions:
            entry["delete"] = 2 if key in config.forced else 1
        entries.append(entry)
    return entries + [{"key": key, "pending": waiting[key]} for key in waiting if key not in config.values]


def put(state: State, call: Call) -> None:
    """Change it now."""
    given, deletions = _check_change(state, call)
    _apply_change(state, call, given, deletions, None)


def post(state: State, call: Call) -> str | None:
    """Change it in a task; what can be refused is refused before. None when it ended within `background_delay`."""
    given, deletions = _check_change(state, call)
    intent = {"volumes": state.owned_by(call.vmid)}
    upid = start_vm_task(
        state, call, "qmconfig", lambda task: _apply_change(state, call, given, deletions, task), **intent
    )
    task = state.tasks.find(upid)
    if not (delay := call.get("background_delay")) or not task.over.wait(delay):
        return upid
    if task.status != "OK":
        raise Refusal(f"failed to update VM {call.vmid}: {task.status}")
    return None


def _check_change(state: State, call: Call) -> tuple[dict[str, str], list[str]]:
    """What is set and what is deleted. Everything is checked before anything changes."""
    is_lock_ignored = call.check_skiplock()
    given, reverts = options_of(call), names(call.get("revert", ""))
    deletions = ["ide2" if name == "cdrom" else name for name in names(call.get("delete", ""))]
    if not given and not deletions and not reverts:
        raise Refusal("no options specified")
    _check_names(given, deletions, reverts)
    option_rights.check(state, call.actor, call.vmid, given, deletions)
    option_rights.check_volumes(state, call.actor, call.vmid, given, "local")
    config = state.configs.load(call.vmid)
    check_digest(config, call.get("digest"))
    if not is_lock_ignored:
        _check_lock(config, deletions)
    _check_values(config, given, deletions)
    volumes.check(state, given, "local")
    return given, deletions


def _check_lock(config: Config, deletions: list[str]) -> None:
    """A VM that is suspended to disk may be made to forget that, and with it its lock."""
    if not ("vmstate" in deletions and config.get("lock") == "suspended"):
        config.check_lock()


def _check_names(given: Mapping[str, str], deletions: list[str], reverts: list[str]) -> None:
    for name in reverts:
        if name not in OPTIONS:
            raise faulty({"revert": f"unknown option '{name}'"})
        if name in given:
            raise faulty({"delete": f"you can't use '-{name}' and -revert {name}' at the same time"})
    for name in deletions:
        if name in given:
            raise faulty({"delete": f"you can't use '-{name}' and -delete {name}' at the same time"})
        if name in reverts:
            raise faulty({"revert": f"you can't use '-delete {name}' and -revert {name}' at the same time"})
        if name not in OPTIONS and name != "vmstate":
            raise faulty({"delete": f"unknown option '{name}'"})


def _check_values(config: Config, given: Mapping[str, str], deletions: list[str]) -> None:
    """What cannot be seen of one option alone."""
    after = {**config.effective, **given}
    is_asked = "balloon" in given or "memory" in given
    if is_asked and int(after.get("balloon", "0")) > processors.memory_mb(after):
        raise Refusal("balloon value too large (must be smaller than assigned memory)")
    order = given.get("boot", "").removeprefix("order=")
    for device in order.split(";") if given.get("boot", "").startswith("order=") and order else []:
        if device not in after or device in deletions:
            raise Refusal(f"invalid bootorder: device '{device}' does not exist'")
    if config.has("protection"):
        for name in deletions:
            if name.startswith("unused") and name in config.values:
                raise Refusal(f"can't remove unused disk '{config.values[name]}' - protection mode enabled")
            if name in DISK_KEYS and name in after:
                raise Refusal(f"can't remove drive '{name}' - protection mode enabled")


def names(text: str) -> list[str]:
    """The items of a list parameter, each once."""
    return list(dict.fromkeys(text.replace(",", " ").replace(";", " ").replace("\0", " ").split()))


def _apply_change(state: State, call: Call, given: dict[str, str], deletions: list[str], task: Task | None) -> None:
    vmid = call.vmid
    log = task.write if task else None
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        check_digest(config, call.get("digest"))
        if not call.get("skiplock"):
            _check_lock(config, deletions)
        changes.revert(config, names(call.get("revert", "")))
        made = volumes.create(state, vmid, given, "local", log)
        try:
            gone = changes.request(config, made.values, deletions, is_forced=bool(call.get("force")))
            state.configs.save(vmid, config)
        except BaseException:
            made.undo()
            raise
        for volid in gone:
            state.disks.free(volid)
        if not state.qemu.is_running(vmid):
            apply_pending(state, vmid)
        elif errors := hotplug.apply(state, vmid, config, {*given, *deletions}):
            raise faulty(errors)


def apply_pending(state: State, vmid: int) -> Config:
    """Make what is pending current: of a stopped VM, at each change, stop and start."""
    config = state.configs.load(vmid)
    if not config.pending and not config.deletions:
        return config
    gone = [volid for name in [*config.deletions, *config.pending] for volid in changes.settle(config, name)]
    while config.pending:  # a deleted drive changes the boot order
        gone += changes.settle(config, next(iter(config.pending)))
    state.configs.save(vmid, config)
    for volid in gone:
        state.disks.free(volid)
    return config
