"""How often something took how long: counts below bounds and a sum, as Prometheus' histograms want them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence

QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bounds in seconds for requests, transactions and the like."""

LONG = (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Bounds in seconds for what a virtual machine is part of."""


class Distribution:
    """Counts only grow. Several threads may note."""

    __slots__ = ("_counts", "_lock", "_sum", "bounds")

    def __init__(self, bounds: Sequence[float] = QUICK) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def note(self, seconds: float) -> None:
        place = bisect_left(self.bounds, seconds)
        with self._lock:
            self._counts[place] += 1
            self._sum += seconds

    def copy(self) -> Distribution:
        made = Distribution(self.bounds)
        with self._lock:
            made._counts, made._sum = list(self._counts), self._sum
        return made

    def read(self) -> tuple[list[tuple[str, int]], float]:
        """How many were at most each bound ("0.5", …, "+Inf"), and the sum of all."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            below += count
            found.append((bound, below))
        return found, total
