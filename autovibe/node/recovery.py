"""After a kill: each task the former node left active is finished or undone, by kind, before the node serves again.

Running VMs go on, also those a task had paused. A recovered task ends as `unexpected status`; the last line of its log
says what was done. Everything here may be killed too, and is then done again.

What a kill may leave of each kind is in the table at the end. Everywhere: children of qemu-img die with the node; jobs
inside QEMU do not, and are cancelled first, since they write into files that are removed next.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from autovibe.node.disks import blocks
from autovibe.node.disks.orphans import named_volumes
from autovibe.node.refusal import Refusal
from autovibe.node.state import State, is_agent_enabled
from autovibe.node.tasks import UNEXPECTED, Task
from autovibe.node.verbs import clones, create, disks, power, rollback, snapshots, suspend
from autovibe.node.vm import drives, vmstate
from autovibe.node.vm.agent import AgentError
from autovibe.node.vm.monitor import MonitorError
from autovibe.node.vm.qemu import QemuError

logger = logging.getLogger(__name__)


def recover(state: State) -> None:
    orphans = state.tasks.orphans()
    done = [*_settle_vms(state, orphans), *state.disks.recover()]
    if orphans:
        done += state.disks.mend(min(task.upid.starttime for task in orphans) - 1)
    for line in done:
        logger.warning("Recovery: %s", line)
    for task in orphans:
        try:
            outcome = _RECOVERIES.get(task.upid.type, _nothing)(state, task)
        except Exception as error:
            logger.exception("The recovery of task '%s' failed.", task.upid)
            outcome = f"recovery failed: {error}"
        task.write(f"the node was killed during this task; recovery: {outcome}")
        state.tasks.close(task, UNEXPECTED)
        logger.warning("Recovered task '%s': %s", task.upid, outcome)


def _settle_vms(state: State, orphans: list[Task]) -> list[str]:
    """End what QEMU still does for the former node; VMs that it had paused to save their RAM go on."""
    held = {
        task.intent["vmid"]
        for task in orphans
        if task.upid.type == "qmsuspend" or (task.upid.type == "qmsnapshot" and task.intent.get("goes_on"))
    }
    done = []
    for vmid in state.qemu.running():
        config = state.configs.find(vmid)
        try:
            if config is not None and config.get("lock") == "suspended":
                state.qemu.stop(vmid)
                done.append(f"ended VM {vmid}, which is suspended to disk")
            else:
                done += [f"VM {vmid}: {line}" for line in state.qemu.settle(vmid, goes_on=vmid in held)]
        except (MonitorError, QemuError) as error:
            done.append(f"VM {vmid} does not answer: {error}")
    return done


def _nothing(_state: State, _task: Task) -> str:
    return "nothing was left to do"


def _finish_start(state: State, task: Task) -> str:
    """A suspended VM whose state is named no more was loaded whole; it may not have been let go on yet."""
    vmid = task.intent["vmid"]
    is_running = state.qemu.is_running(vmid)
    if not (strays := vmstate.strays(state, vmid)):
        return f"VM {vmid} is {'running' if is_running else 'stopped'}"
    if is_running:
        state.qemu.resume(vmid)
    state.free_all(vmid, strays)
    return f"VM {vmid} {'goes on' if is_running else 'is stopped'}; removed {', '.join(strays)}"


def _finish_reboot(state: State, task: Task) -> str:
    vmid = task.intent["vmid"]
    if state.qemu.is_running(vmid) or state.configs.find(vmid) is None:
        return "the VM runs, or is gone"
    power.start_vm(state, vmid, task)
    return f"started VM {vmid}, which had shut down"


def _undo_suspend(state: State, task: Task) -> str:
    vmid = task.intent["vmid"]
    config = state.configs.find(vmid)
    lock = config.get("lock") if config else ""
    if lock == "suspending":
        suspend.undo(state, vmid)
        return f"removed the half-made state; VM {vmid} {_goes_on(state, vmid)}"
    strays = vmstate.strays(state, vmid)
    state.free_all(vmid, strays)
    if strays:
        return f"removed {', '.join(strays)}"
    return f"VM {vmid} is suspended" if lock == "suspended" else "nothing was left to do"


def _goes_on(state: State, vmid: int) -> str:
    return "goes on" if state.qemu.is_running(vmid) else "had ended"


def _remove_created(state: State, task: Task) -> str:
    return _remove_half_made(state, task.intent["vmid"])


def _remove_clone(state: State, task: Task) -> str:
    return _remove_half_made(state, task.intent["newid"])


def _remove_half_made(state: State, vmid: int) -> str:
    config = state.configs.find(vmid)
    if config is None:
        return f"VM {vmid} had not been made"
    if config.get("lock") not in ("create", "clone"):
        return f"VM {vmid} was complete"
    create.remove_half_made(state, vmid)
    return f"removed the half-made VM {vmid}"


def _finish_snapshot(state: State, task: Task) -> str:
    vmid, name = task.intent["vmid"], task.intent["snapname"]
    config = state.configs.find(vmid)
    values = config.snapshots.get(name) if config else None
    if config is None or values is None or values.get("snapstate") != "prepare":
        state.free_all(vmid, vmstate.strays(state, vmid))
        return "the snapshot was complete, or had not been begun"
    if "vmstate" in values:
        snapshots.undo(state, vmid, name)
        return f"removed the half-made snapshot '{name}' with its RAM; VM {vmid} {_goes_on(state, vmid)}"
    _thaw(state, vmid)
    volids = [drive["file"] for _, drive in drives.disks(values)]
    if all(name in state.disks.snapshots(volid) for volid in volids):
        snapshots.commit(state, vmid, name)
        return f"finished snapshot '{name}', which every disk had"
    snapshots.undo(state, vmid, name)
    return f"removed the half-made snapshot '{name}'"


def _thaw(state: State, vmid: int) -> None:
    config = state.configs.load(vmid)
    if state.qemu.is_running(vmid) and is_agent_enabled(config):
        with contextlib.suppress(AgentError):  # no agent, so nothing it could have frozen
            state.qemu.agent(vmid).call("fsfreeze-thaw")


def _finish_delete_snapshot(state: State, task: Task) -> str:
    vmid, name = task.intent["vmid"], task.intent["snapname"]
    config = state.configs.find(vmid)
    if config is None or config.snapshots.get(name, {}).get("snapstate") != "delete":
        return "the snapshot was gone, or its removal had not been begun"
    snapshots.finish_delete(state, vmid, name, task)
    return f"finished removing snapshot '{name}'"


def _finish_rollback(state: State, task: Task) -> str:
    vmid, name = task.intent["vmid"], task.intent["snapname"]
    config = state.configs.find(vmid)
    if config is None or name not in config.snapshots:
        return "nothing was left to do"
    has_ram = "vmstate" in config.snapshots[name]
    if config.get("lock") == "rollback":
        state.qemu.stop(vmid)
        rollback.finish(state, vmid, name, task)
    elif has_ram and state.qemu.is_running(vmid) and state.qemu.status(vmid).get("qmpstatus") == "paused":
        state.qemu.resume(vmid)  # loaded, and not yet let go on
    else:
        return "the rollback was complete, or had not been begun"
    if task.intent.get("start") and not state.qemu.is_running(vmid):
        power.start_vm(state, vmid, task)
    how = "runs" if state.qemu.is_running(vmid) else "is stopped"
    return f"finished the rollback to '{name}'; the VM {how}"


def _finish_destroy(state: State, task: Task) -> str:
    vmid = task.intent["vmid"]
    config = state.configs.find(vmid)
    if config is None:
        return f"VM {vmid} was gone"
    named = [volid for values in (config.values, *config.snapshots.values()) for volid in drives.owned_volumes(values)]
    if set(named) <= set(state.owned_by(vmid)):
        return "nothing had been removed yet"
    create.remove(state, vmid, config, task, with_unreferenced=bool(task.intent.get("with_unreferenced")))
    return f"finished removing VM {vmid}"


def _finish_template(state: State, task: Task) -> str:
    """Each disk whose volume was renamed, but not yet in the configuration, gets its new name; then the rest follow."""
    vmid = task.intent["vmid"]
    config = state.configs.find(vmid)
    if config is None or not config.is_template:
        return "the conversion had not been begun"
    owned = state.owned_by(vmid)
    for key, drive in drives.disks(dict(config.values)):
        base = drive["file"].replace(f"vm-{vmid}-", f"base-{vmid}-")
        if drive["file"] not in owned and base in owned:
            drive["file"] = base
            config.values[key] = drives.render(drive)
    state.configs.save(vmid, config)
    remaining = [drive["file"] for _, drive in drives.disks(config.values) if f"base-{vmid}-" not in drive["file"]]
    if remaining:
        clones.make_template(state, vmid, config, task)
    return f"finished making VM {vmid} a template"


def _settle_resize(state: State, task: Task) -> str:
    vmid, key = task.intent["vmid"], task.intent["disk"]
    config = state.configs.find(vmid)
    if config is None or key not in config.values:
        return "nothing was left to do"
    drive = drives.parse(config.values[key])
    drive["size"] = drives.render_size(state.disks.size(drive["file"]))
    config.values[key] = drives.render(drive)
    state.configs.save(vmid, config)
    return f"{key} has {drive['size']}"


def _remove_strays(state: State, task: Task) -> str:
    """Volumes made by an unfinished change of a configuration, which nothing names."""
    vmid = task.intent["vmid"]
    if not state.configs.exists(vmid):
        return "nothing was left to do"
    strays = _unnamed(state, vmid, task.intent["volumes"])
    for volid in strays:
        state.disks.free(volid)
    return f"removed {', '.join(strays)}" if strays else "nothing was left to do"


def _settle_move(state: State, task: Task) -> str:
    """The disk is where the VM uses it, or the configuration says so; the other volume goes."""
    if "target" in task.intent:
        return _finish_gift(state, task)
    vmid, key, old = task.intent["vmid"], task.intent["disk"], task.intent["old"]
    if not state.configs.exists(vmid):
        return "the VM is gone"
    new, monitor = _unnamed(state, vmid, task.intent["volumes"]), state.monitor(vmid)
    if monitor is not None and new and blocks.find(monitor, state.disks.path(new[0])) is not None:
        disks.settle_move(state, vmid, key, new.pop(0), is_deleting=bool(task.intent["delete"]))
    state.free_all(vmid, new)
    volid = drives.parse(state.configs.load(vmid).get(key, "none"))["file"]
    if volid != old and task.intent["delete"] and old not in named_volumes(state):
        state.free_all(vmid, [old])
    return f"{key} is '{volid}'"


def _finish_gift(state: State, task: Task) -> str:
    """A volume that has the other VM's name already becomes its unused disk."""
    vmid, target, key = task.intent["vmid"], task.intent["target"], task.intent["disk"]
    source, taker = state.configs.find(vmid), state.configs.find(target)
    given = _unnamed(state, target, task.intent["volumes"])
    if not given or taker is None:
        return "the disk was given, or is where it was"
    drives.add_unused(taker.values, given[0])
    state.configs.save(target, taker)
    if source is not None and key in source.values:
        del source.values[key]
        state.configs.save(vmid, source)
    return f"VM {target} has '{given[0]}' as an unused disk"


def _unnamed(state: State, vmid: int, before: list[str]) -> list[str]:
    """A VM's volumes that came since and that no configuration names."""
    known = named_volumes(state) | set(before)
    return [volid for volid in state.owned_by(vmid) if volid not in known]


def _finish_delete_volume(state: State, task: Task) -> str:
    volid = task.intent["volid"]
    storage = volid.partition(":")[0]
    if all(volume.volid != volid for volume in state.disks.volumes(storage)):
        return f"'{volid}' was gone"
    try:
        state.disks.free(volid)
    except Refusal as error:
        return str(error)
    return f"finished removing '{volid}'"


def _remove_upload(_state: State, task: Task) -> str:
    path = Path(task.intent.get("upload", "/nonexistent"))  # a copy on the node has none
    if not path.exists():
        return "the file was in place"
    path.unlink()
    return "removed the received file"


def _give_back_serial(state: State, task: Task) -> str:
    """A terminal that was open has taken the place of the buffer that keeps the console's output."""
    vmid, device = task.intent["vmid"], task.intent["device"]
    if device == "vnc" or not state.qemu.is_running(vmid):
        return "nothing was left to do"
    state.qemu.close_serial(vmid, device)
    return f"gave {device} back to the node"


_RECOVERIES: dict[str, Callable[[State, Task], str]] = {
    "qmstart": _finish_start,
    "qmresume": _finish_start,
    "qmreboot": _finish_reboot,
    "qmsuspend": _undo_suspend,
    "qmcreate": _remove_created,
    "qmclone": _remove_clone,
    "qmsnapshot": _finish_snapshot,
    "qmdelsnapshot": _finish_delete_snapshot,
    "qmrollback": _finish_rollback,
    "qmdestroy": _finish_destroy,
    "qmtemplate": _finish_template,
    "qmconfig": _remove_strays,
    "resize": _settle_resize,
    "imgdel": _finish_delete_volume,
    "imgcopy": _remove_upload,
    "qmmove": _settle_move,
    "vncproxy": _give_back_serial,
}
"""Kinds of tasks that may leave something behind. Of qmstop, qmshutdown, qmpause and qmreset the VM itself is the whole
truth; startall, stopall and suspendall have a task for each VM; a download's part has a name that the storage's own
recovery knows.
"""
