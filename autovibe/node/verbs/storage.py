"""Storages: what they are and hold, uploads, deleting a volume."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
from pathlib import Path
from typing import Any

from autovibe.node import formats
from autovibe.node.files import sync_directory
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State
from autovibe.node.tasks import Task
from autovibe.node.volume import Volume

_ENDINGS = {
    "iso": (".iso", ".img"),
    "import": (".qcow2", ".raw", ".img"),
    "snippets": (".yaml", ".yml", ".json", ".cfg", ".conf", ".txt", ".sh", ".pl", ".py"),
}
_BLOCK = 1 << 20


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    wanted = set(filter(None, re.split(r"[,;\s]+", call.get("content", ""))))
    return [
        status
        for status in state.disks.statuses()
        if call.get("storage", status["storage"]) == status["storage"]
        and (not wanted or wanted & set(status["content"].split(",")))
        and call.get("target", state.name) == state.name
    ]


def index(state: State, call: Call) -> list[dict[str, str]]:
    state.require_storage(call["storage"])
    return [{"subdir": name} for name in ("content", "status", "upload")]


def status(state: State, call: Call) -> dict[str, Any]:
    found = _status(state, call["storage"])
    return {key: value for key, value in found.items() if key not in ("storage", "used_fraction")}


def _status(state: State, storage: str) -> dict[str, Any]:
    state.require_storage(storage)
    return next(status for status in state.disks.statuses() if status["storage"] == storage)


def content(state: State, call: Call) -> list[dict[str, Any]]:
    state.require_storage(call["storage"])
    volumes = state.disks.volumes(call["storage"], content=call.get("content"), vmid=call.get("vmid"))
    return [_describe(volume) for volume in volumes]


def _describe(volume: Volume) -> dict[str, Any]:
    keys = ["volid", "content", "format", "size", "ctime"]
    keys += ["used", "vmid", "parent"] if volume.content == "images" else []
    return {key: getattr(volume, key) for key in keys}


def volume(state: State, call: Call) -> dict[str, Any]:
    volid = _volid(state, call)
    for found in state.disks.volumes(call["storage"]):
        if found.volid == volid:
            path = str(state.disks.path(volid))
            return {"path": path, "format": found.format, "size": found.size, "used": found.used}
    raise Refusal(f"volume '{volid}' does not exist")


def _volid(state: State, call: Call) -> str:
    """The path's volume with or without the storage before it; never one of another storage."""
    given, storage = call["volume"], state.require_storage(call["storage"])
    volid = given if ":" in given else f"{storage}:{given}"
    try:
        named, _ = formats.volume_id(volid)
    except ValueError as error:
        raise Refusal(str(error)) from None
    if named != storage:
        raise faulty({"storage": f"storage does not match volume '{given}'"})
    return volid


def delete(state: State, call: Call) -> str | None:
    """Delete a volume, also one that a configuration still names. With `delay`, wait that long for the end."""
    volid = _volid(state, call)
    state.disks.path(volid)
    owner = next((found.vmid for found in state.disks.volumes(call["storage"]) if found.volid == volid), None)
    object_id = call["storage"] if owner is None else f"{owner}@{call['storage']}"

    def work(_task: Task) -> None:
        state.disks.free(volid)

    upid = state.tasks.start(call.actor, "imgdel", object_id, work, intent={"volid": volid})
    if call.get("delay") and state.tasks.find(upid).over.wait(call["delay"]):
        return None
    return upid


def upload(state: State, call: Call) -> str:
    """Give a received file its place, in a task, after checking its name and, there, its checksum."""
    received = call.upload
    if received is None:
        raise faulty({"filename": "property is missing and it is not optional"})
    try:
        target = _check_upload(state, call, received.filename)
    except BaseException:
        received.path.unlink(missing_ok=True)
        raise

    def work(task: Task) -> None:
        try:
            task.write(f"starting file import from: {received.path}")
            task.write(f"target node: {state.name}")
            task.write(f"target file: {target}")
            task.write(f"file size is: {received.size} bytes")
            if algorithm := call.get("checksum-algorithm"):
                _verify(received.path, algorithm, call["checksum"], task)
            with received.path.open("rb") as file:
                os.fsync(file.fileno())
            received.path.replace(target)
            sync_directory(target.parent)
            task.write("finished file import successfully")
        finally:
            with contextlib.suppress(FileNotFoundError):
                received.path.unlink()

    return state.tasks.start(call.actor, "imgcopy", "", work, intent={"upload": str(received.path)})


def _check_upload(state: State, call: Call, filename: str) -> Path:
    storage, kind = call["storage"], call["content"]
    found = _status(state, storage)
    if found["type"] != "dir":
        raise Refusal(f"can't upload to storage type '{found['type']}'")
    if kind not in found["content"].split(","):
        raise Refusal(f"storage '{storage}' does not support '{kind}' content")
    name = re.sub(r"[^a-zA-Z0-9_.-]", "_", re.sub(r".*[/\\]", "", filename.strip()))
    if not name.lower().endswith(_ENDINGS[kind]) or name.startswith(".") or not 1 <= len(name) <= 255:
        raise faulty({"filename": "wrong file extension"})
    return state.disks.path(f"{storage}:{kind}/{name}", must_exist=False)


def _verify(path: Path, algorithm: str, checksum: str, task: Task) -> None:
    task.write(f"calculating checksum ({algorithm})...")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            task.check()
    if not hmac.compare_digest(digest.hexdigest(), checksum.strip().lower()):
        raise Refusal(f"checksum mismatch: got '{digest.hexdigest()}' != expect '{checksum}'")
    task.write("OK, checksum verified")
