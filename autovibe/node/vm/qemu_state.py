"""A VM's RAM and devices, written to a file and read back: QEMU's migration stream, through a pipe.

The pipe, and not the file itself, goes to QEMU: every QEMU takes one (a plain file behind `fd:` is deprecated since
9.1), QMP stays answered while a state is read, and a node that dies breaks it, so that QEMU writes nothing more.
QEMU runs in a sandbox without `exec:`.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from pathlib import Path

from autovibe.node.vm.monitor import Monitor, MonitorError

Watch = Callable[[int, float], None]
"""Takes bytes written and seconds spent, several times a second; an exception it raises stops the saving."""

_NAME = "state"
_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2
_STALL_SECONDS = 60.0
_UNLIMITED = 1 << 40
_OVER = ("completed", "failed", "cancelled")


def save(monitor: Monitor, path: Path, *, watch: Watch) -> None:
    """Pause the VM and write its state. It stays paused: `Qemu.resume` makes it go on, whatever became of this.

    Raises MonitorError when QEMU fails, OSError when the file cannot be written, and what `watch` raises.
    """
    monitor.execute("stop")
    monitor.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED)
    reader, writer = os.pipe()
    try:
        try:
            monitor.give(_NAME, writer)
        finally:
            os.close(writer)
        monitor.execute("migrate", uri=f"fd:{_NAME}")
        _receive(reader, path, watch)
    except BaseException:
        os.close(reader)
        with contextlib.suppress(MonitorError):
            monitor.execute("migrate_cancel")
            await_end(monitor)
        raise
    os.close(reader)
    if (status := await_end(monitor)) != "completed":
        raise MonitorError(f"unable to save VM state and RAM - {_reason(monitor) or status}")


def load(monitor: Monitor, path: Path) -> None:
    """Give a state to a QEMU that was started with `-incoming defer`. The VM is paused then."""
    reader, writer = os.pipe()
    try:
        try:
            monitor.give(_NAME, reader)
        finally:
            os.close(reader)
        monitor.execute("migrate-incoming", uri=f"fd:{_NAME}")
        _send(path, writer)
    finally:
        os.close(writer)
    deadline = time.monotonic() + _STALL_SECONDS
    while monitor.execute("query-status")["status"] == "inmigrate":
        if time.monotonic() > deadline:
            raise MonitorError("unable to load VM state and RAM - got timeout")
        time.sleep(_POLL_SECONDS / 10)


def cancel(monitor: Monitor) -> bool:
    """End a saving that a former node began; whether there was one."""
    if monitor.execute("query-migrate").get("status", "none") in ("none", *_OVER):
        return False
    monitor.execute("migrate_cancel")
    await_end(monitor)
    return True


def await_end(monitor: Monitor) -> str:
    """The state a migration ends in; QEMU has given up its file by then."""
    deadline = time.monotonic() + _STALL_SECONDS
    while (status := str(monitor.execute("query-migrate").get("status", "none"))) not in ("none", *_OVER):
        if time.monotonic() > deadline:
            return "got timeout"
        time.sleep(_POLL_SECONDS / 10)
    return status


def _reason(monitor: Monitor) -> str:
    return str(monitor.execute("query-migrate").get("error-desc", ""))


def _receive(reader: int, path: Path, watch: Watch) -> None:
    """Write what comes until QEMU closes its end."""
    began, written = time.monotonic(), 0
    with path.open("rb+", buffering=0) as file:
        while True:
            watch(written, time.monotonic() - began)
            if not select.select([reader], [], [], _POLL_SECONDS)[0]:
                continue
            chunk = os.read(reader, _CHUNK_BYTES)
            if not chunk:
                break
            written += file.write(chunk)
        os.fsync(file.fileno())


def _send(path: Path, writer: int) -> None:
    """Write the file until QEMU has read enough: it closes its end after the last section."""
    os.set_blocking(writer, False)
    with path.open("rb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
        while chunk := memoryview(file.read(_CHUNK_BYTES)):
            while chunk:
                if not select.select([], [writer], [], _STALL_SECONDS)[1]:
                    raise MonitorError("unable to load VM state and RAM - got timeout")
                chunk = chunk[os.write(writer, chunk) :]
