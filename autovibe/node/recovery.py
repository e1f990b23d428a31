"""After a kill: each task the former node left active is finished or undone, by kind, before the node serves again.

Running VMs are left alone. A recovered task ends as `unexpected status`; the last line of its log says what was done.
Everything here may be killed too, and is then done again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from autovibe.node import drives
from autovibe.node.agent import AgentError
from autovibe.node.refusal import Refusal
from autovibe.node.state import State, is_agent_enabled
from autovibe.node.tasks import UNEXPECTED, Task
from autovibe.node.verbs import clones, create, snapshots

logger = logging.getLogger(__name__)


def recover(state: State) -> None:
    for line in state.disks.recover():
        logger.warning("Recovery: %s", line)
    for task in state.tasks.orphans():
        try:
            outcome = _RECOVERIES.get(task.upid.type, _nothing)(state, task)
        except Exception as error:
            logger.exception("The recovery of task '%s' failed.", task.upid)
            outcome = f"recovery failed: {error}"
        task.write(f"the node was killed during this task; recovery: {outcome}")
        state.tasks.close(task, UNEXPECTED)
        logger.warning("Recovered task '%s': %s", task.upid, outcome)


def _nothing(_state: State, _task: Task) -> str:
    return "nothing was left to do"


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
        return "the snapshot was complete, or had not been begun"
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
    if config is None or config.get("lock") != "rollback":
        return "the rollback was complete, or had not been begun"
    state.qemu.stop(vmid)
    snapshots.finish_rollback(state, vmid, name, task)
    return f"finished the rollback to '{name}'; the VM is stopped"


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
    config = state.configs.find(vmid)
    if config is None:
        return "nothing was left to do"
    sections = (config.values, config.pending, *config.snapshots.values())
    known = {volid for values in sections for volid in drives.owned_volumes(values)} | set(task.intent["volumes"])
    strays = [volid for volid in state.owned_by(vmid) if volid not in known]
    for volid in strays:
        state.disks.free(volid)
    return f"removed {', '.join(strays)}" if strays else "nothing was left to do"


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
    path = Path(task.intent["upload"])
    if not path.exists():
        return "the file was in place"
    path.unlink()
    return "removed the received file"


_RECOVERIES: dict[str, Callable[[State, Task], str]] = {
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
}
"""Kinds of tasks that may leave something behind; of the others (start, stop …) the VM itself is the whole truth."""
