"""The lock of each VM, as Proxmox's lock file: held while a configuration changes, shared by linked clones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from autovibe.node.refusal import Refusal

TIMEOUT_SECONDS = 10.0


class _Lock:
    """Many readers or one writer; the writer's thread may take it again."""

    def __init__(self) -> None:
        self.readers = 0
        self.writer: int | None = None
        self.depth = 0


class VmLocks:
    """One lock a vmid."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._locks: dict[int, _Lock] = {}

    @contextmanager
    def exclusive(self, vmid: int, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[None]:
        """Raises `can't lock file … got timeout`, which clients know and try again on."""
        me = threading.get_ident()
        with self._changed:
            lock = self._locks.setdefault(vmid, _Lock())
            is_free = self._changed.wait_for(
                lambda: lock.writer == me or (lock.writer is None and lock.readers == 0), timeout_seconds
            )
            if not is_free:
                raise _timed_out(vmid)
            lock.writer = me
            lock.depth += 1
        try:
            yield
        finally:
            with self._changed:
                lock.depth -= 1
                if lock.depth == 0:
                    lock.writer = None
                    self._changed.notify_all()

    @contextmanager
    def shared(self, vmid: int, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[None]:
        with self._changed:
            lock = self._locks.setdefault(vmid, _Lock())
            if not self._changed.wait_for(lambda: lock.writer is None, timeout_seconds):
                raise _timed_out(vmid)
            lock.readers += 1
        try:
            yield
        finally:
            with self._changed:
                lock.readers -= 1
                self._changed.notify_all()


def _timed_out(vmid: int) -> Refusal:
    return Refusal(f"can't lock file '/var/lock/qemu-server/lock-{vmid}.conf' - got timeout")
