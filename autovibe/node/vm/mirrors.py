"""Long copies of a running VM's disks, progress told: all disks as of one moment, or a disk moved for good."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from autovibe.node.disks import blocks, qemu_img
from autovibe.node.disks.volume import DiskError, Progress, format_of
from autovibe.node.vm import plugs
from autovibe.node.vm.monitor import Monitor, MonitorError

_POLL_SECONDS = 0.1
_TOLD_SECONDS = 1.0


class Copy(NamedTuple):
    """From one of the VM's files into a new file."""

    name: str
    source: Path
    target: Path


def copy_all(
    monitor: Monitor,
    copies: Sequence[Copy],
    *,
    limit: int,
    progress: Progress,
    still: Callable[[], AbstractContextManager[None]],
) -> None:
    """Copy several disks as they are at one moment, the one inside `still`; `limit` is bytes a second, 0 for none."""
    jobs = {f"copy-{secrets.token_hex(4)}": copy for copy in copies}
    actions = [{"type": "drive-backup", "data": _backup(monitor, job, copy, limit)} for job, copy in jobs.items()]
    try:
        with still():
            monitor.execute("transaction", actions=actions)
        for job, copy in jobs.items():
            _await(monitor, job, copy.name, "concluded", progress)
            blocks.await_job(monitor, job)
    except MonitorError as error:
        _cancel(monitor, jobs)
        raise DiskError(str(error)) from error
    except BaseException:
        _cancel(monitor, jobs)
        raise


def _backup(monitor: Monitor, job: str, copy: Copy, limit: int) -> dict[str, Any]:
    return {
        "job-id": job,
        "device": _node(monitor, copy.source),
        "target": str(copy.target),
        "format": format_of(copy.target),
        "sync": "full",
        "mode": "existing",
        "auto-dismiss": False,
        **({"speed": limit} if limit else {}),
    }


def move(monitor: Monitor, copy: Copy, *, limit: int, progress: Progress) -> None:
    """Copy a disk into another file while the VM writes to it, and let the VM use that file from then on."""
    job, node = f"move-{secrets.token_hex(4)}", f"moved-{secrets.token_hex(4)}"
    source = _node(monitor, copy.source)
    old = plugs.nodes_below(monitor, source)
    file = {"driver": "file", "filename": str(copy.target)}
    try:
        monitor.execute("blockdev-add", driver=format_of(copy.target), node_name=node, discard="unmap", file=file)
        monitor.execute(
            "blockdev-mirror",
            job_id=job,
            device=source,
            target=node,
            sync="full",
            auto_dismiss=False,
            **({"speed": limit} if limit else {}),
        )
        _await(monitor, job, copy.name, "ready", progress)
        progress(f"{copy.name}: Completing block job...")
        monitor.execute("job-complete", id=job)
        blocks.await_job(monitor, job)
    except BaseException as error:
        _cancel(monitor, [job])
        plugs.close_nodes(monitor, [node])
        if isinstance(error, MonitorError):
            raise DiskError(str(error)) from error
        raise
    progress(f"{copy.name}: Completed successfully.")
    plugs.close_nodes(monitor, old)


def _node(monitor: Monitor, path: Path) -> str:
    node = blocks.find(monitor, path)
    if node is None:
        raise DiskError(f"VM {monitor.vmid} does not use the image '{path.name}'")
    return node


def _await(monitor: Monitor, job: str, name: str, wanted: str, progress: Progress) -> None:
    """Wait until a job is so far. Raises MonitorError when it fails before."""
    started = told = time.monotonic()
    while True:
        state = next((each for each in monitor.execute("query-jobs") if each["id"] == job), None)
        if state is None:
            raise MonitorError(f"VM {monitor.vmid} job '{job}' vanished")
        done, total = int(state.get("current-progress", 0)), int(state.get("total-progress", 0))
        is_over = state["status"] in (wanted, "concluded")
        if total and (is_over or time.monotonic() - told >= _TOLD_SECONDS):
            told = time.monotonic()
            share = f"{qemu_img.render(done)} of {qemu_img.render(total)} ({done / total * 100:.2f}%)"
            progress(f"{name}: transferred {share} in {int(told - started)}s")
        if is_over:
            if "error" in state:
                raise MonitorError(f"VM {monitor.vmid} job '{job}' failed - {state['error']}")
            return
        time.sleep(_POLL_SECONDS)


def _cancel(monitor: Monitor, jobs: Sequence[str] | dict[str, Copy]) -> None:
    for job in jobs:
        with contextlib.suppress(MonitorError):
            monitor.execute("block-job-cancel", device=job, force=True)
        with contextlib.suppress(MonitorError):
            blocks.await_job(monitor, job)
