"""Many VMs at a time, in the order of their `startup`: each is started, stopped or suspended by a task of its own.

The VMs of one order go together, as many at a time as `max-workers` says. Those without an order come last at the
start and first at the end.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from autovibe.node.host import datacenter
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State
from autovibe.node.tasks import Task
from autovibe.node.verbs import power, suspend

STOP_SECONDS = 180
_START_DELAY_SECONDS = 3  # between two starts, where `startup` says nothing, to reduce load
_UNORDERED = 1 << 63
_POLL_SECONDS = 0.2

Begin = Callable[["_Member"], str | None]


class _Member(NamedTuple):
    """A VM with what its `startup` says; None where it says nothing."""

    order: int
    vmid: int
    up: int | None
    down: int | None


def vmid_list(text: str) -> None:
    """The format of `vms`."""
    for vmid in filter(None, re.split(r"[,;\s]+", text)):
        if not re.fullmatch(r"[1-9][0-9]{2,8}", vmid):
            raise ValueError("value does not look like a valid VM ID")


def start_all(state: State, call: Call) -> str:
    """Start the VMs with `onboot`, or all with `force`; those that run are left alone."""
    _check(state, call, "VM.PowerMgmt")

    def work(task: Task) -> None:
        members = _members(state, call, only_onboot=not call.get("force"))
        members = [member for member in members if not state.qemu.is_running(member.vmid)]
        batches = list(_batches(sorted(members), call.get("max-workers", 1)))
        for place, batch in enumerate(batches, 1):
            _run(state, task, batch, _starter(state, call, task))
            if place < len(batches):
                _pause(task, batch)

    return state.tasks.start(call.actor, "startall", "", work)


def _starter(state: State, call: Call, task: Task) -> Begin:
    def begin(member: _Member) -> str:
        task.log(f"Starting VM {member.vmid}")
        return power.start(state, _call_for(call, member))

    return begin


def stop_all(state: State, call: Call) -> str:
    """Shut VMs down, and end after `timeout` those that have not, unless `force-stop` is off."""
    _check(state, call, "VM.PowerMgmt")

    def work(task: Task) -> None:
        def begin(member: _Member) -> str | None:
            if not state.qemu.is_running(member.vmid):
                return None
            seconds = call.get("timeout", STOP_SECONDS) if member.down is None else member.down
            task.log(f"Stopping VM {member.vmid} (timeout = {seconds} seconds)")
            return power.shutdown(
                state, _call_for(call, member, timeout=seconds, forceStop=call.get("force-stop", True))
            )

        _run_backwards(state, call, task, begin)

    return state.tasks.start(call.actor, "stopall", "", work)


def suspend_all(state: State, call: Call) -> str:
    """Suspend VMs to disk."""
    _check(state, call, "VM.PowerMgmt", "VM.Config.Disk")

    def work(task: Task) -> None:
        def begin(member: _Member) -> str | None:
            if not state.qemu.is_running(member.vmid):
                task.log(f"VM {member.vmid} not running, skipping suspension")
                return None
            task.log(f"Suspending VM {member.vmid}")
            return suspend.suspend(state, _call_for(call, member, todisk=True))

        _run_backwards(state, call, task, begin)

    return state.tasks.start(call.actor, "suspendall", "", work)


def migrate_all(state: State, call: Call) -> None:
    """There is nowhere to migrate to."""
    _check(state, call, "VM.Migrate")
    if call["target"] in (state.name, "localhost"):
        raise faulty({"target": "target is local node."})
    raise Refusal(f"no such cluster node '{call['target']}'")


def _check(state: State, call: Call, *privileges: str) -> None:
    """The privileges on everything, or the first of them on each VM that is named."""
    if state.allows(call.actor, "/", *privileges):
        return
    vmids = _vmids(call)
    if not vmids:
        raise Refusal(f"Permission check failed (/, {' && '.join(privileges)})", status=403)
    for vmid in vmids:
        if not state.allows(call.actor, f"/vms/{vmid}", privileges[0]):
            raise Refusal(f"Permission check failed (/vms/{vmid}, {privileges[0]})", status=403)


def _vmids(call: Call) -> list[int]:
    return [int(vmid) for vmid in re.split(r"[,;\s]+", call.get("vms", "")) if vmid]


def _members(state: State, call: Call, *, only_onboot: bool = False) -> list[_Member]:
    named = _vmids(call)
    found = []
    for vmid in state.configs.vmids():
        config = state.configs.find(vmid)
        if config is None or config.is_template or (named and vmid not in named):
            continue
        if not only_onboot or config.has("onboot"):
            found.append(_member(vmid, config.get("startup")))
    return found


def _member(vmid: int, startup: str) -> _Member:
    said: dict[str, str] = {}
    for part in startup.split(","):
        name, equals, value = part.partition("=")
        said[name if equals else "order"] = value if equals else name
    up, down = (int(said[key]) if said.get(key, "").isdecimal() else None for key in ("up", "down"))
    return _Member(int(said["order"]) if said.get("order", "").isdecimal() else _UNORDERED, vmid, up, down)


def _batches(members: Iterable[_Member], workers: int) -> Iterator[list[_Member]]:
    for _, group in groupby(members, key=lambda member: member.order):
        together = list(group)
        for start in range(0, len(together), workers):
            yield together[start : start + workers]


def _run_backwards(state: State, call: Call, task: Task, begin: Begin) -> None:
    chosen = datacenter.cluster_options(state.home).get("max_workers")
    workers = call.get("max-workers") or chosen or os.cpu_count() or 1
    for batch in _batches(sorted(_members(state, call), reverse=True), workers):
        _run(state, task, batch, begin)


def _run(state: State, task: Task, batch: list[_Member], begin: Begin) -> None:
    """Begin a batch's tasks and await their ends. What fails is said, and the others go on."""
    begun: list[tuple[int, Task]] = []
    for member in batch:
        try:
            upid = begin(member)
        except Refusal as refusal:
            task.log(refusal.message)
            continue
        if upid is not None:
            begun.append((member.vmid, state.tasks.find(upid)))
    for vmid, part in begun:
        while not part.over.wait(_POLL_SECONDS):
            task.check()
        if part.status != "OK" and not str(part.status).startswith("WARNINGS"):
            verb = {"qmstart": "Starting", "qmshutdown": "Stopping"}.get(part.upid.type, "Suspending")
            task.log(f"{verb} VM {vmid} failed: {part.status}")


def _pause(task: Task, batch: list[_Member]) -> None:
    """Wait as long as the VMs of a batch ask for before the next ones start."""
    asked = [member.up for member in batch if member.up is not None]
    seconds = max(asked, default=_START_DELAY_SECONDS)
    if asked and seconds:
        task.log(f"Waiting for {seconds} seconds (startup delay)")
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        task.check()
        time.sleep(min(_POLL_SECONDS, left))


def _call_for(call: Call, member: _Member, **parameters: object) -> Call:
    return Call(call.actor, {"node": call["node"], "vmid": member.vmid, **parameters})
