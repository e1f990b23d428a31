"""Storages on the node: what they are and hold, making, copying and deleting volumes."""

from __future__ import annotations

import re
from typing import Any

from autovibe.node.disks.volume import DiskError, FileName, Volume, parse_directory_name, parse_thin_name
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema import formats
from autovibe.node.state import Call, State
from autovibe.node.tasks import Task

_READERS = ("Datastore.Audit", "Datastore.AllocateSpace")
_UNITS = {"": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_FORMATS: dict[str, dict[str, Any]] = {
    "dir": {"supported": ["raw", "qcow2"], "default": "qcow2"},
    "lvmthin": {"supported": ["raw"], "default": "raw"},
}


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    """The storages the caller may see, those that hold one of the `content` types, are `enabled`, or shared with
    another node, the `target`."""
    wanted = set(filter(None, re.split(r"[,;\s]+", call.get("content", ""))))
    statuses = [status for status in state.disks.statuses() if _holds(status, wanted)]
    storage, target = call.get("storage"), call.get("target", state.name)
    if storage is not None and all(status["storage"] != storage for status in statuses):
        raise faulty({"storage": "No such storage."})
    return [
        {**status, "formats": _formats(state, status)} if call.get("format") else status
        for status in statuses
        if storage in (None, status["storage"])
        and state.allows(call.actor, f"/storage/{status['storage']}", *_READERS, any=True)
        and (not call.get("enabled") or status["enabled"])
        and (target in (state.name, "localhost") or (status["shared"] and status["enabled"]))
    ]


def _holds(status: dict[str, Any], wanted: set[str]) -> bool:
    return not wanted or bool(status["enabled"] and wanted & set(status["content"].split(",")))


def _formats(state: State, status: dict[str, Any]) -> dict[str, Any]:
    values = state.disks.configuration.require(status["storage"]).values
    found = _FORMATS[status["type"]]
    return {**found, "default": values.get("format", found["default"])}


def index(state: State, call: Call) -> list[dict[str, str]]:
    _status(state, call["storage"])
    return [{"subdir": name} for name in ("content", "download-url", "rrddata", "status", "upload")]


def status(state: State, call: Call) -> dict[str, Any]:
    found = _status(state, call["storage"])
    return {key: value for key, value in found.items() if key not in ("storage", "used_fraction")}


def _status(state: State, storage: str) -> dict[str, Any]:
    for found in state.disks.statuses():
        if found["storage"] == storage:
            return found
    raise faulty({"storage": "No such storage."})


# What a storage holds


def content(state: State, call: Call) -> list[dict[str, Any]]:
    """The volumes the caller may see."""
    volumes = state.disks.volumes(call["storage"], content=call.get("content"), vmid=call.get("vmid"))
    return [_describe(volume) for volume in volumes if _may_read(state, call, volume)]


def _describe(volume: Volume) -> dict[str, Any]:
    keys = ["volid", "content", "format", "size", "ctime"]
    keys += ["used", "vmid", "parent"] if volume.content == "images" else []
    return {key: getattr(volume, key) for key in keys}


def _may_read(state: State, call: Call, volume: Volume) -> bool:
    try:
        require_access(state, call, volume.volid, volume.vmid)
    except Refusal:
        return False
    return True


def require_access(state: State, call: Call, volid: str, owner: int | None) -> None:
    """Raises the 403 of a volume the caller may not read (Storage.pm check_volume_access).

    Who may allocate on the storage sees everything; a VM's disk is for who may configure the VM's disks.
    """
    place = f"/storage/{volid.partition(':')[0]}"
    if state.allows(call.actor, place, "Datastore.Allocate"):
        return
    if owner is None:
        state.access.require(call.actor, place, *_READERS, any=True)
    else:
        state.access.require(call.actor, place, "Datastore.Audit")
        state.access.require(call.actor, f"/vms/{owner}", "VM.Config.Disk")


def _volid(call: Call, given: str) -> str:
    """A volume with or without the storage before it; never one of another storage than the path's."""
    volid = given if ":" in given else f"{call['storage']}:{given}"
    try:
        named, _ = formats.volume_id(volid)
    except ValueError as error:
        raise Refusal(str(error)) from None
    if named != call["storage"]:
        raise faulty({"volume": f"storage ID missmatch ({named} != {call['storage']})\n"})
    return volid


def _known_volid(state: State, call: Call, given: str) -> tuple[str, int | None]:
    """A volid whose name is one of its storage's, and the VM it belongs to."""
    volid = _volid(call, given)
    name = volid.split(":", 1)[1]
    if state.disks.configuration.require(call["storage"]).type == "lvmthin":
        return volid, parse_thin_name(name).vmid
    parsed = parse_directory_name(name)
    return volid, None if isinstance(parsed, FileName) else parsed.vmid


def _find(state: State, volid: str) -> Volume:
    for found in state.disks.volumes(volid.partition(":")[0]):
        if found.volid == volid:
            return found
    raise DiskError(f"volume '{volid}' does not exist")


def volume(state: State, call: Call) -> dict[str, Any]:
    volid, owner = _known_volid(state, call, call["volume"])
    require_access(state, call, volid, owner)
    found = _find(state, volid)
    return {"path": str(state.disks.path(volid)), "format": found.format, "size": found.size, "used": found.used}


def set_attributes(state: State, call: Call) -> None:
    """Notes and protection are for backups, which this node has none of: refused as for any other volume."""
    volid, owner = _known_volid(state, call, call["volume"])
    require_access(state, call, volid, owner)
    kind = state.disks.configuration.require(call["storage"]).type
    for attribute in ("notes", "protected"):
        if call.get(attribute) is not None and kind == "dir":
            raise Refusal(f"only backups support attribute '{attribute}'")
        if call.get(attribute) is not None:
            raise Refusal(f"attribute '{attribute}' is not supported for storage type '{kind}'")


# Making, copying, deleting


def allocate(state: State, call: Call) -> str:
    """Make an empty volume of a VM's; a size without a unit is in KiB."""
    name, format = call["filename"], call.get("format")
    if match := re.search(r"\.(raw|qcow2|vmdk)$", name):
        if format not in (None, match[1]):
            raise faulty({"format": f"different storage formats ({format} != {match[1]})"})
        format = match[1]
    number, unit = call["size"].rstrip("MG"), call["size"].lstrip("0123456789")
    if format not in (None, "raw", "qcow2"):
        raise DiskError(f"unsupported format '{format}'")
    return state.disks.allocate(
        call["storage"], call.vmid, size=int(number) * _UNITS[unit], name=name or None, format=format
    )


def copy(state: State, call: Call) -> str:
    """Copy a volume to another name, of the same storage or, with the storage before it, of another."""
    if call.get("target_node", state.name) != state.name:
        raise Refusal(f"no such cluster node '{call['target_node']}'")
    source, _ = _known_volid(state, call, call["volume"])
    target = call["target"] if ":" in call["target"] else f"{call['storage']}:{call['target']}"
    try:
        formats.volume_id(target)
    except ValueError as error:
        raise Refusal(str(error)) from None
    _find(state, source)
    if any(target == found.volid for found in state.disks.volumes(target.partition(":")[0])):
        raise DiskError(f"volume '{target}' already exists")

    def work(task: Task) -> None:
        state.disks.duplicate(source, target, progress=task.log)
        task.write(f"copied '{source}' to '{target}'")

    return state.tasks.start(call.actor, "imgcopy", "", work, intent={"source": source, "target": target})


def delete(state: State, call: Call) -> str | None:
    """Delete a volume, also one that a configuration still names. With `delay`, wait that long for the end."""
    volid, owner = _known_volid(state, call, call["volume"])
    state.access.require(call.actor, f"/storage/{call['storage']}", "Datastore.Allocate")
    _find(state, volid)
    object_id = call["storage"] if owner is None else f"{owner}@{call['storage']}"

    def work(task: Task) -> None:
        state.disks.free(volid)
        task.write(f"Removed volume '{volid}'")

    upid = state.tasks.start(call.actor, "imgdel", object_id, work, intent={"volid": volid})
    if not call.get("delay"):
        return upid
    task = state.tasks.find(upid)
    if not task.over.wait(call["delay"]):
        return upid
    if task.status != "OK":
        raise Refusal(str(task.status))
    return None
