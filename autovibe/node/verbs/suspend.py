"""Pausing a VM, or suspending it to disk, and letting it go on.

A VM suspended to disk is stopped and locked: `suspending` while its RAM is written (what a kill leaves of that is
undone), `suspended` once the state is whole. Only its start, which takes the state, and its removal pass the lock.
"""

from __future__ import annotations

from autovibe.node.refusal import Refusal
from autovibe.node.state import Call, State, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs import power
from autovibe.node.vm import vmstate


def suspend(state: State, call: Call) -> str:
    if call.get("todisk"):
        return _suspend_to_disk(state, call)
    return power.with_running(state, call, "qmpause", lambda: state.qemu.suspend(call.vmid), passes=("backup",))


def _suspend_to_disk(state: State, call: Call) -> str:
    vmid = call.vmid
    power.require_root(call, "skiplock")
    power.require_running(state, vmid)
    values = state.configs.load(vmid).values
    if any(key.startswith("hostpci") for key in values):
        raise Refusal("cannot suspend VM to disk due to passed-through PCI device(s)")
    storage = state.require_storage(call.get("statestorage") or vmstate.storage_for(state, values))
    for path, privilege in ((f"/vms/{vmid}", "VM.Config.Disk"), (f"/storage/{storage}", "Datastore.AllocateSpace")):
        if not state.allows(call.actor, path, privilege):
            raise Refusal(f"Permission check failed ({path}, {privilege})", status=403)

    def work(task: Task) -> None:
        volid = _begin(state, vmid, storage, is_lock_ignored=bool(call.get("skiplock")))
        try:
            vmstate.save(state, vmid, volid, task)
            task.log("State saved, quitting")
            _end(state, vmid)
        except BaseException:
            undo(state, vmid)
            raise

    return start_vm_task(state, call, "qmsuspend", work)


def _begin(state: State, vmid: int, storage: str, *, is_lock_ignored: bool) -> str:
    """Make the volume and lock the VM: the volume's id."""
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        if config.get("lock") == "backup":
            raise Refusal("cannot suspend to disk during backup")
        if not is_lock_ignored:
            config.check_lock()
        power.require_running(state, vmid)
        kept = vmstate.reserve(state, vmid, config.values, vmstate.timestamp(), storage)
        config.values |= {**kept, "lock": "suspending"}
        try:
            state.configs.save(vmid, config)
        except BaseException:
            state.disks.free(kept["vmstate"])
            raise
        return kept["vmstate"]


def _end(state: State, vmid: int) -> None:
    """From the write on the state is what counts, and the VM's process is only to be ended."""
    with state.locks.exclusive(vmid):
        config = state.configs.load(vmid)
        if config.get("lock") != "suspending":
            raise Refusal("lock changed unexpectedly")
        config.values["lock"] = "suspended"
        state.configs.save(vmid, config)
        state.qemu.stop(vmid)


def undo(state: State, vmid: int) -> None:
    """Let the VM go on, and forget the state that was begun."""
    try:
        if state.qemu.is_running(vmid):
            state.qemu.resume(vmid)
    finally:
        with state.locks.exclusive(vmid):
            config = state.configs.load(vmid)
            volid = config.get("vmstate")
            for key in ("lock", *vmstate.KEYS):
                config.values.pop(key, None)
            state.configs.save(vmid, config)
        state.free_all(vmid, [volid])


def resume(state: State, call: Call) -> str:
    """Let a paused VM go on; one suspended to disk is started."""
    vmid = call.vmid
    power.require_root(call, "skiplock", "nocheck")
    if state.configs.load(vmid).get("lock") == "suspended":

        def wake(task: Task) -> None:
            power.start_vm(state, vmid, task, is_lock_ignored=bool(call.get("skiplock")))

        return start_vm_task(state, call, "qmresume", wake)
    power.require_running(state, vmid)

    def work(_task: Task) -> None:
        with state.locks.exclusive(vmid):
            config = state.configs.load(vmid)
            if config.is_template:
                raise Refusal(f"VM {vmid} is a template and cannot be resumed!")
            if state.qemu.status(vmid).get("qmpstatus") == "running":
                return
            if not call.get("skiplock") and config.get("lock") != "backup":
                config.check_lock()
            state.qemu.resume(vmid)

    return start_vm_task(state, call, "qmresume", work)
