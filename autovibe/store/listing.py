"""Reading a manifest in the byte order of its paths, from any path on, with the times laid beside the tree.

The order of names is not the order of paths: `a-b` comes before `a/x`. So a directory is entered when the next name of
its parent is greater than its own name with a slash; those that wait form a stack, since each one's name begins the
next one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from sqlalchemy import Connection

from autovibe.errors import InternalError
from autovibe.store import nodes, objects, tables
from autovibe.store.nodes import NO_DIGEST, Node, Times
from autovibe.types import Entry

AHEAD = 64
"""Nodes fetched at a time while reading on."""
_SLASH = b"/"[0]


class _Ref(NamedTuple):
    """A node and the times beside it; `times` is None where no times are wanted."""

    digest: bytes
    times: bytes | None


class _Row(NamedTuple):
    """One record of a directory with its time and, for a directory, what lies below."""

    name: bytes
    record: bytes
    mtime_ns: int
    below: _Ref | None


class _Descent(NamedTuple):
    path: bytes
    below: _Ref


class Listing:
    """One walk. `fetched` holds nodes that were read ahead and not reached yet."""

    def __init__(self, connection: Connection, root: bytes, times: bytes | None) -> None:
        self._connection = connection
        self._root = _Ref(root, times)
        self._fetched: dict[_Ref, tuple[Node, Times | None]] = {}

    def entries(self, after: bytes | None, prefix: bytes | None) -> Iterator[Entry]:
        """Entries of paths greater than `after`, at or below `prefix`."""
        start = self._find(prefix.rstrip(b"/")) if prefix and prefix.strip(b"/") else _Descent(b"", self._root)
        if isinstance(start, Entry):
            if after is None or start.path > after:
                yield start
            return
        if start is None:
            return
        if start.path:
            itself = self._find(start.path, as_entry=True)
            if isinstance(itself, Entry) and (after is None or itself.path > after):
                yield itself
        stack = [self._walk(start, after)]
        while stack:
            for step in stack[-1]:
                if isinstance(step, _Descent):
                    stack.append(self._walk(step, after))
                    break
                yield step
            else:
                stack.pop()

    def _find(self, path: bytes, *, as_entry: bool = False) -> _Descent | Entry | None:
        """What lies at `path`: a directory to walk (or its entry), another entry, or nothing."""
        here, parent = self._root, b""
        names = path.lstrip(b"/").split(b"/")
        for depth, name in enumerate(names):
            row = next(self._rows(here, name), None)
            if row is None or row.name != name or name == nodes.SELF:
                return None
            if depth == len(names) - 1 and (row.below is None or as_entry):
                return None if row.record[:1] == nodes.IMPLIED else nodes.decode_entry(row.record, parent, row.mtime_ns)
            if row.below is None:
                return None
            here, parent = row.below, parent + b"/" + name
        return _Descent(parent, here)

    def _walk(self, directory: _Descent, after: bytes | None) -> Iterator[Entry | _Descent]:
        path = directory.path
        waiting: list[_Row] = []
        begin = b""
        if after is not None and after.startswith(path + b"/"):
            begin = after[len(path) + 1 :].partition(b"/")[0]
            waiting = self._shorter(directory.below, begin)
        elif after is not None and after > path + b"/":
            return  # all below is before `after`

        def is_due(row: _Row) -> bool:  # whether anything below may come after `after`
            return after is None or path + b"/" + row.name + b"0" > after  # "0" is the byte after the slash

        rows = self._rows(directory.below, begin)
        while ahead := list(islice(rows, AHEAD)):
            self._fetch([row.below for row in ahead if row.below is not None and is_due(row)])
            for row in ahead:
                while waiting and waiting[-1].name + b"/" < row.name:
                    yield self._descent(path, waiting.pop())
                if row.record[:1] != nodes.IMPLIED:
                    entry = nodes.decode_entry(row.record, path, row.mtime_ns)
                    if after is None or entry.path > after:
                        yield entry
                if row.below is not None and is_due(row):
                    waiting.append(row)
        while waiting:
            yield self._descent(path, waiting.pop())

    @staticmethod
    def _descent(path: bytes, row: _Row) -> _Descent:
        if row.below is None:
            raise InternalError("A listing tried to enter what is no directory.")
        return _Descent(path + b"/" + row.name, row.below)

    def _shorter(self, directory: _Ref, name: bytes) -> list[_Row]:
        """The directories named before `name` that are entered after it: `a` for `a-b`."""
        found = []
        for length in range(1, len(name)):
            if name[length] < _SLASH:
                row = next(self._rows(directory, name[:length]), None)
                if row is not None and row.name == name[:length] and row.below is not None:
                    found.append(row)
        return found

    def _rows(self, ref: _Ref, begin: bytes) -> Iterator[_Row]:
        """The records of a directory from the name `begin` on."""
        if ref.digest == nodes.EMPTY:
            return
        node, times = self._load(ref)
        if node.height:
            first = node.find_chunk(begin)
            chunks = [_Ref(digest, times.children[i] if times else None) for i, digest in enumerate(node.children())]
            for index in range(first, node.size):
                if index > first and (index - first) % AHEAD == 1:  # one alone first: a search wants no more
                    self._fetch(chunks[index : index + AHEAD])
                yield from self._rows(chunks[index], begin if index == first else b"")
            return
        first = node.find(begin)
        below_at = 0
        if times and times.children:
            below_at = sum(1 for record in node.records(0, first) if nodes.child_of(record) is not None)
        for index, record in enumerate(node.records(first), first):
            below = None
            child = nodes.child_of(record)
            if child is not None:
                if times and below_at >= len(times.children):
                    raise _not_beside()
                below_times = times.children[below_at] if times else None
                below_at += 1
                below = _Ref(child, below_times) if child not in (NO_DIGEST, nodes.EMPTY) else None
            yield _Row(nodes.record_name(record), record, times.times[index] if times else 0, below)

    def _load(self, ref: _Ref) -> tuple[Node, Times | None]:
        if ref not in self._fetched:
            self._fetch([ref])
        return self._fetched.pop(ref)

    def _fetch(self, refs: list[_Ref]) -> None:
        """Read nodes and times that are not read yet, with one SELECT each."""
        wanted = [ref for ref in refs if ref not in self._fetched and ref.digest != nodes.EMPTY]
        if not wanted:
            return
        bodies = objects.load(self._connection, tables.tree, {ref.digest for ref in wanted})
        beside = {ref.times for ref in wanted if ref.times is not None} - {nodes.EMPTY_TIMES}
        times = objects.load(self._connection, tables.tree_times, beside) if beside else {}
        times[nodes.EMPTY_TIMES] = nodes.EMPTY_TIMES_BODY
        for ref in wanted:
            node = nodes.decode(bodies[ref.digest])
            laid = nodes.decode_times(times[ref.times]) if ref.times is not None else None
            if laid is not None and node.size != len(laid.children if node.height else laid.times):
                raise _not_beside()
            self._fetched[ref] = (node, laid)


def _not_beside() -> InternalError:
    return InternalError("The modification times do not belong to this manifest.")
