"""Snapshots of a VM's disks: made, deleted, rolled back to.

A snapshot is a section of the configuration. Its `snapstate` says what is under way (prepare, delete) and the
configuration's `lock` keeps everything else away meanwhile; both go with the write that ends it. RAM is not kept.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autovibe.node import drives
from autovibe.node.agent import AgentError
from autovibe.node.disks import DiskError
from autovibe.node.monitor import MonitorError
from autovibe.node.refusal import Refusal, not_implemented
from autovibe.node.state import Call, State, disks_of, is_agent_enabled, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs import power
from autovibe.node.verbs.vms import typed_values
from autovibe.node.vmconfig import SNAPSHOT_KEYS, Config

_NOT_KEPT = ("lock", "template")  # of the configuration, in a snapshot


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
        "vmstate": 0,
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
    if call.get("vmstate") and state.qemu.is_running(vmid):
        raise not_implemented("A snapshot of a running VM's memory is not implemented")

    def work(task: Task) -> None:
        config = _prepare(state, vmid, name, call.get("description"))
        try:
            with _frozen(state, vmid, config, task):
                for key, volid in disks_of(config.snapshots[name]):
                    task.log(f"snapshotting 'drive-{key}' ({volid})")
                    state.disks.snapshot(volid, name, monitor=state.monitor(vmid))
        except BaseException:
            undo(state, vmid, name)
            raise
        commit(state, vmid, name)

    return start_vm_task(state, call, "qmsnapshot", work, snapname=name)


def _prepare(state: State, vmid: int, name: str, description: str | None) -> Config:
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
        values = {key: text for key, text in config.values.items() if key not in _NOT_KEPT and key != "description"}
        values |= {"snaptime": str(int(time.time())), "snapstate": "prepare"}
        if description:
            values["description"] = description
        config.snapshots[name] = values
        config.values["lock"] = "snapshot"
        state.configs.save(vmid, config)
        return config


@contextmanager
def _frozen(state: State, vmid: int, config: Config, task: Task) -> Iterator[None]:
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
    config = state.configs.load(vmid)
    for _, volid in disks_of(config.snapshots.get(name, {})):
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
            config.snapshots[name]["snapstate"] = "delete"
            config.values["lock"] = "snapshot-delete"
            state.configs.save(vmid, config)
        finish_delete(state, vmid, name, task, is_forced=is_forced)

    return start_vm_task(state, call, "qmdelsnapshot", work, snapname=name)


def finish_delete(state: State, vmid: int, name: str, task: Task, *, is_forced: bool = False) -> None:
    """Delete the snapshot on each disk that still has it, then its section; children move up to its parent."""
    config = state.configs.load(vmid)
    try:
        for _, volid in disks_of(config.snapshot(name)):
            try:
                if name in state.disks.snapshots(volid):
                    state.disks.delete_snapshot(volid, name, monitor=state.monitor(vmid))
            except (DiskError, MonitorError, OSError) as error:
                if not is_forced:
                    raise
                task.write(str(error))
    except BaseException:
        _unlock(state, vmid)
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


def _unlock(state: State, vmid: int) -> None:
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        config.values.pop("lock", None)
        state.configs.save(vmid, config)


# Going back to one


def rollback(state: State, call: Call) -> str:
    vmid, name = call.vmid, call["snapname"]
    state.configs.load(vmid)

    def work(task: Task) -> None:
        with state.locks.exclusive(vmid):
            config = state.configs.load(vmid)
            values = config.snapshot(name)
            if config.is_template:
                raise Refusal("unable to rollback: you can't rollback if it's a template")
            config.check_lock()
            if "snapstate" in values:
                raise Refusal(f"unable to rollback to incomplete snapshot (snapstate = {values['snapstate']})")
            config.values["lock"] = "rollback"
            state.configs.save(vmid, config)
            if state.qemu.is_running(vmid):
                state.qemu.stop(vmid)
        finish_rollback(state, vmid, name, task)
        if call.get("start"):
            power.start_vm(state, vmid, task)

    return start_vm_task(state, call, "qmrollback", work, snapname=name)


def finish_rollback(state: State, vmid: int, name: str, task: Task) -> None:
    """Put back disks and configuration. Doing it again is harmless: a disk is again what it was at the snapshot."""
    config = state.configs.load(vmid)
    kept = config.snapshot(name)
    try:
        for key, volid in disks_of(kept):
            task.log(f"rolling back 'drive-{key}' ({volid})")
            state.disks.rollback(volid, name)
    except BaseException:
        _unlock(state, vmid)
        raise
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        before = config.values
        config.values = {key: text for key, text in kept.items() if key not in (*SNAPSHOT_KEYS, "description")}
        config.values["parent"] = name
        if before.get("description"):
            config.values["description"] = before["description"]
        if config.get("vmgenid", "0") != "0":
            config.values["vmgenid"] = str(uuid.uuid4())
        for volid in drives.owned_volumes(before):
            if volid not in drives.owned_volumes(config.values):
                drives.add_unused(config.values, volid)
        state.configs.save(vmid, config)
