"""Snapshots of a VM's disks, and of its RAM: made and deleted.

A snapshot is a section of the configuration. Its `snapstate` says what is under way (prepare, delete) and the
configuration's `lock` keeps everything else away meanwhile; both go with the write that ends it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autovibe.node.disks import DiskError
from autovibe.node.refusal import Refusal
from autovibe.node.state import Call, State, disks_of, is_agent_enabled, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs.vms import typed_values
from autovibe.node.vm import vmstate
from autovibe.node.vm.agent import AgentError
from autovibe.node.vm.monitor import MonitorError
from autovibe.node.vm.vmconfig import Config

_NOT_KEPT = re.compile(r"lock|template|description|unused\d+|" + "|".join(vmstate.KEYS))
"""Keys of the configuration that its snapshots leave out."""


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    """Each snapshot, and as the last entry the present state, `current`."""
    config = state.configs.load(call.vmid)
    entries = [_describe(name, values) for name, values in config.snapshots.items()]
    current: dict[str, Any] = {
        "name": "current",
        "description": "You are here!",
        "digest": config.digest,
        "running": int(state.qemu.is_running(call.vmid)),
    }
    return [*entries, current | _parent(config.values)]


def _describe(name: str, values: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name,
        "description": values.get("description", ""),
        "snaptime": int(values.get("snaptime", "0")),
        "vmstate": int("vmstate" in values),
    }
    if "snapstate" in values:
        entry["snapstate"] = values["snapstate"]
    return entry | _parent(values)


def _parent(values: dict[str, str]) -> dict[str, str]:
    return {"parent": values["parent"]} if values.get("parent") else {}


def index(state: State, call: Call) -> list[dict[str, str]]:
    state.configs.load(call.vmid).snapshot(call["snapname"])
    return [{"cmd": "rollback"}, {"cmd": "config"}]


def get_config(state: State, call: Call) -> dict[str, Any]:
    return typed_values(state.configs.load(call.vmid).snapshot(call["snapname"]))


def put_config(state: State, call: Call) -> None:
    with state.locks.exclusive(call.vmid):
        config = state.configs.load(call.vmid)
        config.check_lock()
        values = config.snapshot(call["snapname"])
        if call.get("description") is not None:
            values["description"] = call["description"]
        state.configs.save(call.vmid, config)


# Making one


def create(state: State, call: Call) -> str:
    vmid, name = call.vmid, call["snapname"]
    state.configs.load(vmid)
    if name.lower() in ("current", "pending"):
        raise Refusal(f"unable to use snapshot name '{name}' (reserved name)")
    with_ram = bool(call.get("vmstate")) and state.qemu.is_running(vmid)
    goes_on = with_ram and _runs(state, vmid)

    def work(task: Task) -> None:
        config = _prepare(state, vmid, name, call.get("description"), task, with_ram=with_ram)
        kept = config.snapshots[name]
        try:
            with _held(state, vmid, task) if "vmstate" in kept else frozen(state, vmid, config, task):
                for key, volid in disks_of(kept):
                    task.log(f"snapshotting 'drive-{key}' ({volid})")
                    state.disks.snapshot(volid, name, monitor=state.monitor(vmid))
                if "vmstate" in kept:
                    vmstate.save(state, vmid, kept["vmstate"], task)
        except BaseException:
            task.write("snapshot create failed: starting cleanup")
            undo(state, vmid, name)
            raise
        commit(state, vmid, name)

    return start_vm_task(state, call, "qmsnapshot", work, snapname=name, goes_on=goes_on)


def _runs(state: State, vmid: int) -> bool:
    return state.qemu.status(vmid).get("qmpstatus") == "running"


def _prepare(state: State, vmid: int, name: str, description: str | None, task: Task, *, with_ram: bool) -> Config:
    """Write the section of a snapshot under way; the VM is locked from here on."""
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        if config.is_template:
            raise Refusal("you can't take a snapshot if it's a template")
        config.check_lock()
        if name in config.snapshots:
            raise Refusal(f"snapshot name '{name}' already used")
        is_running = state.qemu.is_running(vmid)
        for _, volid in disks_of(config.values):
            if not state.disks.has_feature(volid, "snapshot", snapshot=None, is_running=is_running):
                raise Refusal("snapshot feature is not available")
        for other, values in config.snapshots.items():
            if values.get("parent") == name:  # of a snapshot that once had the name
                task.write(f"deleting parent '{name}' reference from '{other}' to avoid bogus snapshot cycle.")
                del values["parent"]
        kept = {key: text for key, text in config.values.items() if not _NOT_KEPT.fullmatch(key)}
        kept |= {"snaptime": str(int(time.time())), "snapstate": "prepare"}
        if description:
            kept["description"] = description
        if with_ram and is_running:
            kept |= vmstate.reserve(state, vmid, config.values, name, vmstate.storage_for(state, config.values))
        config.snapshots[name] = kept
        config.values["lock"] = "snapshot"
        try:
            state.configs.save(vmid, config)
        except BaseException:
            state.free_all(vmid, [kept.get("vmstate", "")])
            raise
        return config


@contextmanager
def _held(state: State, vmid: int, task: Task) -> Iterator[None]:
    """Pause the VM, so that its disks and its RAM are of one moment; it goes on afterwards, whatever happens."""
    was_running = _runs(state, vmid)
    try:
        state.qemu.suspend(vmid)
        yield
    finally:
        try:
            state.qemu.resume(vmid)  # also of a paused one: only so QEMU takes the disks back
            if not was_running:
                state.qemu.suspend(vmid)
        except MonitorError as error:
            task.write(f"VM {vmid} could not go on - {error}")


@contextmanager
def frozen(state: State, vmid: int, config: Config, task: Task) -> Iterator[None]:
    """Hold the guest's file systems still while the disks are snapshot, when its agent can; thaw whatever happens."""
    if not (state.qemu.is_running(vmid) and is_agent_enabled(config)):
        yield
        return
    if "freeze-fs=0" in config.get("agent") or "freeze-fs-on-backup=0" in config.get("agent"):
        task.write("skipping guest filesystem freeze - disabled in VM options")
        yield
        return
    agent = state.qemu.agent(vmid)
    try:
        agent.ping()
    except AgentError:
        task.write("skipping guest filesystem freeze - agent configured but not running?")
        yield
        return
    try:
        agent.call("fsfreeze-freeze")
    except AgentError as error:
        task.write(f"guest filesystem freeze failed - {error}")
    try:
        yield
    finally:
        try:
            agent.call("fsfreeze-thaw")
        except AgentError as error:
            task.write(f"guest filesystem thaw failed - {error}")


def commit(state: State, vmid: int, name: str) -> None:
    """End a snapshot well: it becomes the parent of the present."""
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        config.snapshot(name).pop("snapstate", None)
        config.values["parent"] = name
        config.values.pop("lock", None)
        state.configs.save(vmid, config)


def undo(state: State, vmid: int, name: str) -> None:
    """Take back a snapshot that was not finished."""
    values = state.configs.load(vmid).snapshots.get(name, {})
    state.free_all(vmid, [values.get("vmstate", "")])
    for _, volid in disks_of(values):
        if name in state.disks.snapshots(volid):
            state.disks.delete_snapshot(volid, name, monitor=state.monitor(vmid))
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        config.snapshots.pop(name, None)
        config.values.pop("lock", None)
        state.configs.save(vmid, config)


# Deleting one


def delete(state: State, call: Call) -> str:
    vmid, name, is_forced = call.vmid, call["snapname"], bool(call.get("force"))
    state.configs.load(vmid)

    def work(task: Task) -> None:
        with state.locks.exclusive(vmid):
            config = state.configs.load(vmid)
            config.snapshot(name)
            config.check_lock()
            if config.is_template:
                raise Refusal("you can't delete a snapshot if vm is a template")
            config.snapshots[name]["snapstate"] = "delete"
            config.values["lock"] = "snapshot-delete"
            state.configs.save(vmid, config)
        finish_delete(state, vmid, name, task, is_forced=is_forced)

    return start_vm_task(state, call, "qmdelsnapshot", work, snapname=name)


def finish_delete(state: State, vmid: int, name: str, task: Task, *, is_forced: bool = False) -> None:
    """Remove its RAM, delete it on each disk that still has it, then its section; children move up to its parent."""
    values = state.configs.load(vmid).snapshot(name)
    try:
        state.free_all(vmid, [values.get("vmstate", "")])
        for _, volid in disks_of(values):
            try:
                if name in state.disks.snapshots(volid):
                    state.disks.delete_snapshot(volid, name, monitor=state.monitor(vmid))
            except (DiskError, MonitorError, OSError) as error:
                if not is_forced:
                    raise
                task.write(str(error))
    except BaseException:
        unlock(state, vmid)
        raise
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        parent = config.snapshots.pop(name).get("parent")
        for values in (config.values, *config.snapshots.values()):
            if values.get("parent") == name:
                del values["parent"]
                if parent:
                    values["parent"] = parent
        config.values.pop("lock", None)
        state.configs.save(vmid, config)


def unlock(state: State, vmid: int) -> None:
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        config.values.pop("lock", None)
        state.configs.save(vmid, config)
