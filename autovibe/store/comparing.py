"""The difference of two trees, level by level: equal digests are skipped, equal bytes are never taken apart.

Each round fetches with one SELECT every node that may differ. Two nodes are compared on their bytes: what lies before
the first and after the last difference is left alone, and of the records between, equal ones cancel out unparsed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Connection

from autovibe.store import nodes, objects, tables
from autovibe.store.nodes import DIGEST_AT, DIRECTORY, IMPLIED, Node
from autovibe.types import Change

BATCH = 2000
"""Directories compared at a time; bounds the memory of a comparison with nothing."""
_NEAR = 24  # a common prefix is found to within so many bytes


class _Pair(NamedTuple):
    """One directory on both sides, by nodes that together hold all that may differ. `path` is b"" for the root."""

    path: bytes
    base: tuple[bytes, ...]
    target: tuple[bytes, ...]


def diff(connection: Connection, base: bytes, target: bytes) -> list[Change]:
    """What turns the tree `base` into `target`, sorted by the bytes of the path."""
    if base == target:
        return []
    changes: list[Change] = []
    pending = [_pair(b"", base, target)]
    while pending:
        batch, pending = pending[:BATCH], pending[BATCH:]
        wanted = {digest for pair in batch for side in pair[1:] for digest in side}
        bodies = objects.load(connection, tables.tree, wanted)
        for pair in batch:
            _compare(pair, bodies, changes, pending)
    changes.sort()
    return changes


def _pair(path: bytes, base: bytes | None, target: bytes | None) -> _Pair:
    return _Pair(path, *(() if side in (None, nodes.EMPTY, nodes.NO_DIGEST) else (side,) for side in (base, target)))


def _compare(pair: _Pair, bodies: dict[bytes, bytes], changes: list[Change], pending: list[_Pair]) -> None:
    base = [nodes.decode(bodies[digest]) for digest in pair.base]
    target = [nodes.decode(bodies[digest]) for digest in pair.target]
    height = max(node.height for node in (*base, *target))
    if height > 0:
        old, new = _expand(pair.base, base, height), _expand(pair.target, target, height)
        common = set(old) & set(new)
        pending.append(_Pair(pair.path, *(tuple(d for d in side if d not in common) for side in (old, new))))
        return
    if len(base) == len(target) == 1:
        gone, come = _between(base[0], target[0])
    else:
        gone, come = _all(base), _all(target)
    if len(gone) == len(come) == 1 and nodes.record_name(gone[0]) == nodes.record_name(come[0]):
        _change(pair.path, gone[0], come[0], changes, pending)
        return
    common = set(gone) & set(come)
    old_by_name = {nodes.record_name(record): record for record in gone if record not in common}
    for record in come:
        if record not in common:
            _change(pair.path, old_by_name.pop(nodes.record_name(record), None), record, changes, pending)
    for record in old_by_name.values():
        _change(pair.path, record, None, changes, pending)


def _expand(digests: Iterable[bytes], side: list[Node], height: int) -> list[bytes]:
    """The digests with those of the greatest height replaced by their chunks."""
    found: list[bytes] = []
    for digest, node in zip(digests, side, strict=True):
        found += node.children() if node.height == height else [digest]
    return found


def _all(side: list[Node]) -> list[bytes]:
    return [record for node in side for record in node.records()]


def _between(base: Node, target: Node) -> tuple[list[bytes], list[bytes]]:
    """The records from the first to the last that differ, on both sides."""
    old, new = base.body[base.start :], target.body[target.start :]
    first = bisect_right(base.ends, _common_prefix(old, new))
    begin = base.ends[first - 1] if first else 0
    kept = _common_suffix(old, new, min(len(old), len(new)) - begin)
    # The first boundary of `base` in the common suffix that is one of `target` too; records tell their own length, so
    # all after it are equal.
    shift = len(new) - len(old)
    last = bisect_left(base.ends, len(old) - kept)
    while last < base.size:
        end = base.ends[last] + shift
        place = bisect_left(target.ends, end)
        if place < target.size and target.ends[place] == end:
            return base.records(first, last + 1), target.records(first, place + 1)
        last += 1
    return base.records(first), target.records(first)


def _common_prefix(old: bytes, new: bytes) -> int:
    """How many bytes at the start are equal; a little too few is good enough."""
    low, high = 0, min(len(old), len(new))
    if old[:high] == new[:high]:
        return high
    while high - low > _NEAR:
        middle = (low + high) // 2
        if old[low:middle] == new[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _common_suffix(old: bytes, new: bytes, most: int) -> int:
    low, high = 0, most
    end, other = len(old), len(new)
    while high - low > _NEAR:
        middle = (low + high) // 2
        if old[end - middle : end - low] == new[other - middle : other - low]:
            low = middle
        else:
            high = middle
    return low


def _change(path: bytes, old: bytes | None, new: bytes | None, changes: list[Change], pending: list[_Pair]) -> None:
    """Note how one name differs, and that its directories are to be compared."""
    before = None if old is None or old[:1] == IMPLIED else old
    after = None if new is None or new[:1] == IMPLIED else new
    is_same_directory = (
        before is not None and after is not None and before[:1] == DIRECTORY and before[:DIGEST_AT] == after[:DIGEST_AT]
    )
    if (before or after) and not is_same_directory:
        base = nodes.decode_entry(before, path) if before else None
        target = nodes.decode_entry(after, path) if after else None
        changes.append(Change((target or base).path, base, target))  # type: ignore[union-attr]
    base_child = nodes.child_of(old) if old else None
    target_child = nodes.child_of(new) if new else None
    if base_child != target_child:
        pair = _pair(path + b"/" + nodes.record_name(old or new or b""), base_child, target_child)
        if pair.base or pair.target:
            pending.append(pair)
