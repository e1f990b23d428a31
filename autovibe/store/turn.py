"""A lock that is taken in the order it was asked for; `threading.Lock` lets a busy thread starve the others."""

from __future__ import annotations

import threading
from collections import deque


class Turn:
    """So many holders at a time, first come, first served. Not re-entrant; given by the thread that took it."""

    def __init__(self, places: int = 1) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._free = places

    def take(self, timeout_seconds: float) -> bool:
        """Wait for the turn; False when it did not come in time."""
        with self._mutex:
            if self._free:
                self._free -= 1
                return True
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        if gate.acquire(timeout=timeout_seconds):
            return True
        with self._mutex:
            if gate not in self._waiting:  # handed over between the time-out and here
                return True
            self._waiting.remove(gate)
            return False

    def give(self) -> None:
        """Hand the turn to whoever has waited longest."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1
