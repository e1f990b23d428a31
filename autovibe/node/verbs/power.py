"""Starting and ending VMs. What a task finds locked or running is its error; a stop of a stopped VM is none.

As in Proxmox a shutdown holds the VM's lock until the guest is down; `overrule-shutdown` ends it for a stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autovibe.node.refusal import Refusal, faulty, not_implemented
from autovibe.node.state import Call, State, is_agent_enabled, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs.config import apply_pending
from autovibe.node.vm import cloudinit, drives, hotplug, vmstate
from autovibe.node.vm.command_line import options
from autovibe.node.vm.vmconfig import Config

SHUTDOWN_SECONDS = 60
_POLL_SECONDS = 0.1
_ABORT_SECONDS = 10.0


@dataclass(frozen=True)
class Starting:
    """How a VM is started: for how many seconds QEMU is waited for, and values that stand before the config's."""

    timeout: float | None = None
    values: Mapping[str, str] = field(default_factory=dict)


def require_root(call: Call, *names: str) -> None:
    """Raises the refusal of options that only root@pam itself may use."""
    refused = {name: "Only root may use this option." for name in names if call.get(name)}
    if refused and not call.actor.is_root:
        raise faulty(refused)


def start(state: State, call: Call) -> str:
    state.configs.load(call.vmid)
    migration = ("stateuri", "migratedfrom", "migration_type", "migration_network", "targetstorage", "nets-host-mtu")
    require_root(call, "skiplock", "force-cpu", *migration)
    for option in migration:
        if call.get(option):
            raise not_implemented(f"Starting with '{option}' is not implemented")
    forced = {"machine": call.get("machine"), "runningcpu": call.get("force-cpu")}
    options = Starting(call.get("timeout"), {key: str(value) for key, value in forced.items() if value})

    def work(task: Task) -> None:
        start_vm(state, call.vmid, task, options, is_lock_ignored=bool(call.get("skiplock")))

    return start_vm_task(state, call, "qmstart", work)


def start_vm(
    state: State, vmid: int, task: Task, options: Starting | None = None, *, is_lock_ignored: bool = False
) -> None:
    """Make what is pending current, write the cloud-init drive anew, run QEMU; a suspended VM goes on where it was."""
    options = options or Starting()
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        if config.is_template:
            raise Refusal("you can't start a vm if it's a template")
        if config.get("lock") == "backup" and state.qemu.is_running(vmid):
            state.qemu.resume(vmid)
            return
        if not is_lock_ignored and config.get("lock") != "suspended":
            config.check_lock()
        if state.qemu.is_running(vmid):
            raise Refusal(f"VM {vmid} already running")
        if config.get("lock") == "suspended" or "vmstate" in config.values:
            _wake(state, vmid, config, task)
            return
        config = apply_pending(state, vmid)
        write_cloudinit(state, vmid, config, task.log)
        state.qemu.start(
            vmid, {**config.values, **options.values}, volume_paths(state, config), timeout=options.timeout
        )
        hotplug.after_start(state, vmid, config)


def _wake(state: State, vmid: int, config: Config, task: Task) -> None:
    """Start a suspended VM from its state. It runs only after the configuration has forgotten the state, so that no
    kill leaves a state behind that is older than the disks.
    """
    volid = config.get("vmstate")
    task.log("Resuming suspended VM")
    write_cloudinit(state, vmid, config, task.log)
    path = state.disks.path(volid) if volid else None
    state.qemu.start(vmid, config.values, volume_paths(state, config), state=path)
    for key in ("lock", *vmstate.KEYS):
        config.values.pop(key, None)
    try:
        state.configs.save(vmid, config)
    except OSError:
        state.qemu.stop(vmid)
        raise
    state.qemu.resume(vmid)
    task.write("Resumed VM, removing state")
    state.free_all(vmid, [volid])


def volume_paths(state: State, config: Config) -> dict[str, Path]:
    """The file behind each drive that has a volume."""
    attached = drives.attached(config.values)
    return {key: state.disks.path(drive["file"]) for key, drive in attached if drives.has_volume(drive)}


def write_cloudinit(state: State, vmid: int, config: Config, log: Callable[[str], None]) -> None:
    for _, drive in drives.attached(config.values):
        if drives.is_cloudinit(drive):
            log("generating cloud-init ISO")
            values = {**config.values, "vmid": str(vmid)}
            cloudinit.build(state.disks.path(drive["file"]), vmid, values, snippet=state.disks.path)


def stop(state: State, call: Call) -> str:
    state.configs.load(call.vmid)
    require_root(call, "skiplock", "keepActive", "migratedfrom")
    if call.get("migratedfrom"):
        raise not_implemented("Stopping with 'migratedfrom' is not implemented")

    def work(task: Task) -> None:
        if call.get("overrule-shutdown"):
            _overrule(state, call, task)
        with state.locks.exclusive(call.vmid):
            if not call.get("skiplock") and state.qemu.is_running(call.vmid):
                state.configs.load(call.vmid).check_lock()
            stop_vm(state, call.vmid)

    return start_vm_task(state, call, "qmstop", work)


def _overrule(state: State, call: Call, task: Task) -> None:
    """End the shutdowns of the VM that are under way: the caller's own, and with Sys.Modify everybody's."""
    may_end_all = state.allows(call.actor, f"/nodes/{state.name}", "Sys.Modify")
    found = [
        other
        for other in state.tasks.running()
        if (other.upid.type, other.upid.id) == ("qmshutdown", str(call.vmid))
        and (may_end_all or other.upid.user == call.actor.name)
    ]
    for other in found:
        state.tasks.stop(str(other.upid))
    for other in found:
        other.over.wait(_ABORT_SECONDS)
    if found:
        task.write(f"overruled qmshutdown tasks: {', '.join(str(other.upid) for other in found)}")


def stop_vm(state: State, vmid: int) -> None:
    if state.qemu.is_running(vmid):
        state.qemu.stop(vmid)
    if "vmstate" not in state.configs.load(vmid).values:
        apply_pending(state, vmid)


def shutdown(state: State, call: Call) -> str:
    state.configs.load(call.vmid)
    require_root(call, "skiplock", "keepActive")
    is_forced, is_paused = bool(call.get("forceStop")), _is_paused(state, call.vmid)
    if is_paused and not is_forced:
        raise Refusal("VM is paused - cannot shutdown")

    def work(task: Task) -> None:
        if is_paused:
            task.write("VM is paused - stop instead of shutdown")
        with state.locks.exclusive(call.vmid):
            config = state.configs.load(call.vmid)
            if not call.get("skiplock") and state.qemu.is_running(call.vmid):
                config.check_lock()
            if not is_paused:
                _shut_down(state, call, config, task, is_forced=is_forced)
            stop_vm(state, call.vmid)

    return start_vm_task(state, call, "qmshutdown", work)


def reboot(state: State, call: Call) -> str:
    """Shut down and start, with what is pending applied."""
    state.configs.load(call.vmid)
    if _is_paused(state, call.vmid):
        raise Refusal("VM is paused - cannot shutdown")
    require_running(state, call.vmid)

    def work(task: Task) -> None:
        with state.locks.exclusive(call.vmid):
            config = state.configs.load(call.vmid)
            config.check_lock()
            _shut_down(state, call, config, task, is_forced=False)
            stop_vm(state, call.vmid)
            start_vm(state, call.vmid, task)

    return start_vm_task(state, call, "qmreboot", work)


def _shut_down(state: State, call: Call, config: Config, task: Task, *, is_forced: bool) -> None:
    """Ask the guest (its agent, else ACPI) and wait; QEMU still runs after that only when it is to be ended."""
    vmid = call.vmid
    if not state.qemu.is_running(vmid):
        return
    state.qemu.powerdown(vmid, by_agent=is_agent_enabled(config))
    by_startup = options(config.get("startup")).get("down", "")
    seconds = call.get("timeout", int(by_startup) if by_startup.isdecimal() else SHUTDOWN_SECONDS)
    deadline = time.monotonic() + seconds
    while state.qemu.is_running(vmid) and time.monotonic() < deadline:
        task.check()
        time.sleep(_POLL_SECONDS)
    if state.qemu.is_running(vmid):
        if not is_forced:
            raise Refusal("VM quit/powerdown failed - got timeout")
        task.log("VM still running - terminating now with SIGTERM")


def _is_paused(state: State, vmid: int) -> bool:
    if not state.qemu.is_running(vmid):
        return False
    return state.qemu.status(vmid).get("qmpstatus") in ("paused", "prelaunch", "suspended")


def reset(state: State, call: Call) -> str:
    return with_running(state, call, "qmreset", lambda: state.qemu.reset(call.vmid))


def with_running(state: State, call: Call, kind: str, act: Callable[[], Any], *, passes: tuple[str, ...] = ()) -> str:
    """A task for a VM that must run, which is checked before it."""
    require_root(call, "skiplock")
    require_running(state, call.vmid)

    def work(_task: Task) -> None:
        with state.locks.exclusive(call.vmid):
            config = state.configs.load(call.vmid)
            if not call.get("skiplock") and config.get("lock") not in passes:
                config.check_lock()
            act()

    return start_vm_task(state, call, kind, work)


def require_running(state: State, vmid: int) -> None:
    state.configs.load(vmid)
    if not state.qemu.is_running(vmid):
        raise Refusal(f"VM {vmid} not running")
