"""The block graph of a running VM, changed through QMP. Nodes are found by the file they read, so no name is kept."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from pathlib import Path
from typing import Any

from autovibe.node.disks.volume import DiskError, format_of
from autovibe.node.vm.monitor import Monitor, MonitorError

_POLL_SECONDS = 0.05


def find(monitor: Monitor, path: Path) -> str | None:
    """The name of the node that gives a file's disk (the format's node, not the file's), None where there is none."""
    for node in monitor.execute("query-named-block-nodes", flat=True):
        if node["drv"] == format_of(path) and _file(str(node["file"])) == str(path):
            return str(node["node-name"])
    return None


def resize(monitor: Monitor, path: Path, size: int) -> None:
    _ask(monitor, "block_resize", node_name=_require(monitor, path), size=size)


def put_on_top(monitor: Monitor, path: Path, overlay: Path) -> None:
    """Freeze `path`: the VM writes into `overlay`, a file made on top of it, from now on."""
    monitor.execute(
        "blockdev-snapshot-sync",
        node_name=_require(monitor, path),
        snapshot_file=str(overlay),
        snapshot_node_name=f"n{secrets.token_hex(8)}",
        format="qcow2",
        mode="existing",
    )


def pull_up(monitor: Monitor, path: Path, gone: Path, below: Path | None) -> bool:
    """Copy the disk's part in the file `gone` into `path`, which lies on it, then put `path` on `below`, if anything.

    False when this VM does not use `path`. Raises MonitorError when the job fails, and the chain is as before.
    """
    node = find(monitor, path)
    if node is None:
        return False
    merged = _require(monitor, gone)
    base = {} if below is None else {"base-node": _require(monitor, below), "backing-file": below.name}
    job = f"pull-{secrets.token_hex(4)}"
    monitor.execute("block-stream", job_id=job, device=node, auto_dismiss=False, **base)
    await_job(monitor, job)
    with contextlib.suppress(MonitorError):  # the file the VM was started with stays open until it is dropped by name
        monitor.execute("blockdev-del", node_name=merged)
    return True


def copy(monitor: Monitor, path: Path, target: Path, format: str) -> None:
    """Copy the disk as it is now into a new file, while the VM runs and goes on writing."""
    job = f"copy-{secrets.token_hex(4)}"
    _ask(
        monitor,
        "drive-backup",
        job_id=job,
        device=_require(monitor, path),
        target=str(target),
        format=format,
        sync="full",
        mode="existing",
        auto_dismiss=False,
    )
    try:
        await_job(monitor, job)
    except MonitorError as error:
        raise DiskError(str(error)) from error


def internal_snapshot(monitor: Monitor, path: Path, name: str) -> None:
    _ask(monitor, "blockdev-snapshot-internal-sync", device=_require(monitor, path), name=name)


def delete_internal_snapshot(monitor: Monitor, path: Path, name: str) -> None:
    _ask(monitor, "blockdev-snapshot-delete-internal-sync", device=_require(monitor, path), name=name)


def await_job(monitor: Monitor, job: str) -> None:
    """Wait for a job's end, however long it takes: a VM that is gone makes the next call fail."""
    state = _job(monitor, job)
    while state["status"] != "concluded":
        time.sleep(_POLL_SECONDS)
        state = _job(monitor, job)
    monitor.execute("job-dismiss", id=job)
    if "error" in state:
        raise MonitorError(f"VM {monitor.vmid} job '{job}' failed - {state['error']}")


def cancel_jobs(monitor: Monitor) -> list[str]:
    """End the jobs a node that is gone had begun; what each was. A merge (`pull-`) is left to come to its end."""
    done = []
    for each in monitor.execute("query-jobs"):
        job = str(each["id"])
        if not job.startswith("pull-") and each["status"] != "concluded":
            monitor.execute("job-cancel", id=job)
            done.append(f"cancelled job '{job}'")
        with contextlib.suppress(MonitorError):  # its error was the former node's affair
            await_job(monitor, job)
    for node in monitor.execute("query-named-block-nodes", flat=True):
        if str(node["node-name"]).startswith("moved-"):
            with contextlib.suppress(MonitorError):  # the VM uses it: the move was complete
                monitor.execute("blockdev-del", node_name=node["node-name"])
    return done


def _job(monitor: Monitor, job: str) -> dict[str, Any]:
    for each in monitor.execute("query-jobs"):
        if each["id"] == job:
            return dict(each)
    raise MonitorError(f"VM {monitor.vmid} job '{job}' vanished")


def _require(monitor: Monitor, path: Path) -> str:
    node = find(monitor, path)
    if node is None:
        raise MonitorError(f"VM {monitor.vmid} does not use the image '{path.name}'")
    return node


def _ask(monitor: Monitor, command: str, **arguments: object) -> None:
    try:
        monitor.execute(command, **arguments)
    except MonitorError as error:
        raise DiskError(str(error)) from error


def _file(name: str) -> str:
    """The file behind QEMU's name of a node, which is `json:{…}` where its options are not those its header implies."""
    if not name.startswith("json:"):
        return name
    options = json.loads(name.removeprefix("json:"))
    return str(options.get("file", options).get("filename", ""))
