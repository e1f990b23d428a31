"""The thread in which a task works. Its number and start are what the task's UPID names as `pid` and `pstart`.

A real Proxmox forks a process for each task; here the kernel's number of the thread stands for it, which is found under
/proc as well, with the same start time in clock ticks since the machine's boot. The commands it runs are remembered, so
that a task which is stopped does not leave them running.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_THREADS = Path("/proc/self/task")
_mutex = threading.Lock()
_commands: dict[int, set[subprocess.Popen[Any]]] = {}


class Worker:
    """A thread that exists, but does nothing until `begin`."""

    def __init__(self, name: str) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        thread.start()
        self.pid = thread.native_id or os.getpid()
        self.pstart = start_of(self.pid)

    def begin(self, work: Callable[[], None] | None) -> None:
        """Let it work; with None it ends."""
        self._orders.put(work)

    def _run(self) -> None:
        work = self._orders.get()
        if work is not None:
            work()


def start_of(thread: int) -> int:
    """When a thread of this process began, in clock ticks since the boot."""
    try:
        fields = (_THREADS / str(thread) / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # a kernel that does not show its threads
        return int(time.monotonic() * 100)
    return int(fields[19])


@contextlib.contextmanager
def running(command: subprocess.Popen[Any]) -> Iterator[None]:
    """While this thread waits for a command, `end_commands` may end it."""
    thread = threading.get_native_id()
    with _mutex:
        _commands.setdefault(thread, set()).add(command)
    try:
        yield
    finally:
        with _mutex:
            _commands[thread].discard(command)
            if not _commands[thread]:
                del _commands[thread]


def end_commands(thread: int) -> bool:
    """Kill what a thread of this process is waiting for; whether there was something."""
    with _mutex:
        found = list(_commands.get(thread, ()))
        for command in found:
            command.kill()
    return bool(found)
