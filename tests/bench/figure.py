"""One measured figure of a benchmark: ours, its peer's in the same run, and the target their ratio is held against."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """`ours` and `peer` in `unit`, smaller is better; `target` is the largest ratio that is good enough.

    A figure without a peer (peer 0) holds `ours` itself against `target`, in `unit`; one without a target informs only.
    """

    name: str
    ours: float
    peer: float
    unit: str
    target: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None

    @property
    def verdict(self) -> str:
        """ok | short | - (no target)."""
        if self.target is None:
            return "-"
        measured = self.ours if self.ratio is None else self.ratio
        return "ok" if measured <= self.target else "short"

    def __str__(self) -> str:
        peer = f"peer {self.peer:.2f} {self.unit}" if self.peer else "no peer"
        ratio = f"ratio {self.ratio:.2f}" if self.ratio is not None else ""
        limit = "" if self.target is None else f"target {self.target:g}" + ("" if self.peer else f" {self.unit}")
        ours = f"ours {self.ours:.2f} {self.unit}"
        return f"{self.name:<64} {ours:<18} {peer:<18} {ratio:<11} {limit:<11} {self.verdict}".rstrip()
