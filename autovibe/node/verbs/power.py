"""Starting and ending VMs. What a task finds locked or running is its error; a stop of a stopped VM is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from autovibe.node import cloudinit, drives
from autovibe.node.refusal import Refusal, not_implemented
from autovibe.node.state import Call, State, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs.config import apply_pending
from autovibe.node.vmconfig import Config

SHUTDOWN_SECONDS = 60
_POLL_SECONDS = 0.1


def start(state: State, call: Call) -> str:
    state.configs.load(call.vmid)
    is_lock_ignored = call.check_skiplock()
    for option in ("stateuri", "migratedfrom", "targetstorage"):
        if call.get(option):
            raise not_implemented(f"Starting with '{option}' is not implemented")

    def work(task: Task) -> None:
        config = state.configs.load(call.vmid)
        if config.get("lock") == "backup" and state.qemu.is_running(call.vmid):
            state.qemu.resume(call.vmid)
            return
        if not is_lock_ignored:
            config.check_lock()
        start_vm(state, call.vmid, task)

    return start_vm_task(state, call, "qmstart", work)


def start_vm(state: State, vmid: int, task: Task) -> None:
    """Make what is pending current, write the cloud-init drive anew, run QEMU."""
    with state.locks.exclusive(vmid):
        config = apply_pending(state, vmid)
        if config.is_template:
            raise Refusal("you can't start a vm if it's a template")
        if state.qemu.is_running(vmid):
            raise Refusal(f"VM {vmid} already running")
        write_cloudinit(state, vmid, config, task.log)
        paths = {
            key: state.disks.path(drive["file"])
            for key, drive in drives.attached(config.values)
            if drives.has_volume(drive)
        }
        state.qemu.start(vmid, config.values, paths)


def write_cloudinit(state: State, vmid: int, config: Config, log: Callable[[str], None]) -> None:
    for _, drive in drives.attached(config.values):
        if drives.is_cloudinit(drive):
            log("generating cloud-init ISO")
            values = {**config.values, "vmid": str(vmid)}
            cloudinit.build(state.disks.path(drive["file"]), vmid, values, snippet=state.disks.path)


def stop(state: State, call: Call) -> str:
    state.configs.load(call.vmid)
    is_lock_ignored = call.check_skiplock()

    def work(_task: Task) -> None:
        with state.locks.exclusive(call.vmid):
            if not is_lock_ignored:
                state.configs.load(call.vmid).check_lock()
            stop_vm(state, call.vmid)

    return start_vm_task(state, call, "qmstop", work)


def stop_vm(state: State, vmid: int) -> None:
    if state.qemu.is_running(vmid):
        state.qemu.stop(vmid)
    apply_pending(state, vmid)


def shutdown(state: State, call: Call) -> str:
    state.configs.load(call.vmid)
    is_lock_ignored = call.check_skiplock()

    def work(task: Task) -> None:
        if not is_lock_ignored:
            state.configs.load(call.vmid).check_lock()
        _shut_down(state, call, task, is_forced=bool(call.get("forceStop")))

    return start_vm_task(state, call, "qmshutdown", work)


def reboot(state: State, call: Call) -> str:
    """Shut down and start, with what is pending applied."""
    _require_running(state, call.vmid)

    def work(task: Task) -> None:
        state.configs.load(call.vmid).check_lock()
        _shut_down(state, call, task, is_forced=False)
        start_vm(state, call.vmid, task)

    return start_vm_task(state, call, "qmreboot", work)


def _shut_down(state: State, call: Call, task: Task, *, is_forced: bool) -> None:
    """Ask the guest (its agent, else ACPI), wait, and end QEMU after all when that was asked for."""
    vmid = call.vmid
    if state.qemu.is_running(vmid):
        state.qemu.powerdown(vmid)
        deadline = time.monotonic() + call.get("timeout", SHUTDOWN_SECONDS)
        while state.qemu.is_running(vmid) and time.monotonic() < deadline:
            task.check()
            time.sleep(_POLL_SECONDS)
        if state.qemu.is_running(vmid):
            if not is_forced:
                raise Refusal("VM quit/powerdown failed - got timeout")
            task.log("VM still running - terminating now with SIGTERM")
    with state.locks.exclusive(vmid):
        stop_vm(state, vmid)


def reset(state: State, call: Call) -> str:
    return _with_running(state, call, "qmreset", lambda: state.qemu.reset(call.vmid))


def suspend(state: State, call: Call) -> str:
    if call.get("todisk"):
        raise not_implemented("Suspending a VM to disk is not implemented")
    return _with_running(state, call, "qmpause", lambda: state.qemu.suspend(call.vmid), passes=("backup",))


def resume(state: State, call: Call) -> str:
    return _with_running(state, call, "qmresume", lambda: state.qemu.resume(call.vmid), passes=("backup",))


def _with_running(state: State, call: Call, kind: str, act: Callable[[], Any], *, passes: tuple[str, ...] = ()) -> str:
    """A task for a VM that must run, which is checked before it."""
    is_lock_ignored = call.check_skiplock()
    _require_running(state, call.vmid)

    def work(_task: Task) -> None:
        with state.locks.exclusive(call.vmid):
            config = state.configs.load(call.vmid)
            if not is_lock_ignored and config.get("lock") not in passes:
                config.check_lock()
            act()

    return start_vm_task(state, call, kind, work)


def _require_running(state: State, vmid: int) -> None:
    state.configs.load(vmid)
    if not state.qemu.is_running(vmid):
        raise Refusal(f"VM {vmid} not running")
