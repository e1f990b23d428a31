"""Building a manifest's tree from a stream of entries, in memory for one chain of directories at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from autovibe.errors import InvalidRequest
from autovibe.store import Store, nodes, objects, tables
from autovibe.types import Entry, EntryKind

BATCH_BYTES = 2_000_000
_LEAST, _MOST = -(2**63), 2**63 - 1


class Root(NamedTuple):
    """A written manifest. `digest` names the tree, `times` the modification times beside it (both hex).

    `file_count` and `size_bytes` are of regular files; the size stops at 2**63-1, which sparse files can exceed.
    """

    digest: str
    file_count: int
    size_bytes: int
    times: str


class _Directory:
    """A directory whose entries are still coming in. `unopened` are its directories that may yet get entries."""

    __slots__ = ("index", "names", "path", "records", "times", "times_below", "unopened")

    def __init__(self, path: bytes, index: int) -> None:
        self.path = path
        self.index = index  # in the parent
        self.names: list[bytes] = []
        self.records: list[bytes] = []
        self.times: list[int] = []
        self.times_below: dict[int, bytes] = {}
        self.unopened: dict[bytes, int] = {}


class Writer:
    """Takes entries one by one, then gives the root. Nodes are stored children first, so a stored node is whole."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open = [_Directory(b"", 0)]
        self._trees: dict[bytes, bytes] = {}
        self._times: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._file_count = 0
        self._size_bytes = 0

    def write(self, entries: Iterable[Entry]) -> Root:
        for entry in entries:
            self._place(entry)
        while len(self._open) > 1:
            self._close()
        digest, times = self._build(self._open[0])
        self._flush()
        return Root(digest.hex(), self._file_count, min(self._size_bytes, _MOST), times.hex())

    def _place(self, entry: Entry) -> None:
        parent, _, name = entry.path.rpartition(b"/")
        if entry.path[:1] != b"/" or b"\0" in entry.path:
            raise InvalidRequest(f"The manifest's path {_quoted(entry.path)} is not absolute, or holds a zero byte.")
        if entry.path == b"/" and entry.kind == EntryKind.directory:
            name = nodes.SELF
        else:
            _check_name(name, entry.path)
        directory = self._open[-1]
        if directory.path != parent:
            directory = self._go_to(parent)
        if entry.kind == EntryKind.directory:
            directory.unopened[name] = len(directory.names)
        elif entry.kind == EntryKind.file:
            self._file_count += 1
            self._size_bytes += entry.size
            if len(entry.digest) not in (0, nodes.DIGEST_SIZE):
                raise InvalidRequest(f"The digest of {_quoted(entry.path)} is no SHA-256.")
        try:
            record = nodes.encode_entry(entry, name)
        except struct.error as error:
            raise InvalidRequest(f"The mode, owner or size of {_quoted(entry.path)} is out of range.") from error
        directory.names.append(name)
        directory.records.append(record)
        directory.times.append(min(max(entry.mtime_ns, _LEAST), _MOST))  # years past 2262 exist on ext4

    def _go_to(self, path: bytes) -> _Directory:
        """Close what does not lead to `path`, open what does; directories that no entry named are implied."""
        while not _is_at_or_below(path, self._open[-1].path):
            self._close()
        directory = self._open[-1]
        for name in path[len(directory.path) + 1 :].split(b"/") if path != directory.path else ():
            index = directory.unopened.pop(name, None)
            if index is None:
                _check_name(name, path)
                index = len(directory.names)
                directory.names.append(name)
                directory.records.append(
                    nodes.RECORD.pack(nodes.IMPLIED, 0, 0, 0, 0, nodes.NO_DIGEST, len(name)) + name
                )
                directory.times.append(0)
            directory = _Directory(directory.path + b"/" + name, index)
            self._open.append(directory)
        return directory

    def _close(self) -> None:
        directory = self._open.pop()
        parent = self._open[-1]
        digest, times = self._build(directory)
        parent.records[directory.index] = nodes.with_child(parent.records[directory.index], digest)
        parent.times_below[directory.index] = times

    def _build(self, directory: _Directory) -> tuple[bytes, bytes]:
        """Store a complete directory's nodes; the digests of its tree and of its times."""
        names, records, times, below = directory.names, directory.records, directory.times, directory.times_below
        for name, index in directory.unopened.items():
            below[index] = nodes.EMPTY_TIMES
            if name != nodes.SELF:
                records[index] = nodes.with_child(records[index], nodes.EMPTY)
        order: Iterable[int] = range(len(names))
        if any(left >= right for left, right in pairwise(names)):
            order = sorted(order, key=names.__getitem__)
            names, records, times = ([some[i] for i in order] for some in (names, records, times))  # type: ignore[assignment]
            _check_unique(names, directory.path)
        # One digest for each directory, in order, with where it belongs.
        times_at = {place: below[index] for place, index in enumerate(order) if index in below} if below else {}
        spans = list(nodes.cuts(names, 0)) if len(names) > nodes.LONGEST else [(0, len(names))]
        made = [
            (
                names[first] if names else b"",
                self._keep(self._trees, nodes.encode(records[first:last], 0)),
                self._keep(
                    self._times,
                    nodes.encode_times(
                        0, last - first, times[first:last], [times_at[i] for i in range(first, last) if i in times_at]
                    ),
                ),
            )
            for first, last in spans
        ]
        height = 0
        while len(made) > 1:
            height += 1
            spans = [(0, len(made))]
            if len(made) > nodes.LONGEST:
                spans = list(nodes.cuts([name for name, _, _ in made], height))
            made = [self._keep_chunks(made[first:last], height) for first, last in spans]
        return made[0][1], made[0][2]

    def _keep_chunks(self, chunks: list[tuple[bytes, bytes, bytes]], height: int) -> tuple[bytes, bytes, bytes]:
        body = nodes.encode([digest + name for name, digest, _ in chunks], height)
        times = nodes.encode_times(height, len(chunks), (), [times for _, _, times in chunks])
        return chunks[0][0], self._keep(self._trees, body), self._keep(self._times, times)

    def _keep(self, bodies: dict[bytes, bytes], body: bytes) -> bytes:
        digest = nodes.digest_of(body)
        if digest not in bodies and digest not in (nodes.EMPTY, nodes.EMPTY_TIMES):
            bodies[digest] = body
            self._waiting_bytes += len(body)
            if self._waiting_bytes > BATCH_BYTES:
                self._flush()
        return digest

    def _flush(self) -> None:
        for table, bodies in ((tables.tree, self._trees), (tables.tree_times, self._times)):
            if bodies:
                objects.save(self._store, table, bodies)
                bodies.clear()
        self._waiting_bytes = 0


def _is_at_or_below(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory + b"/")


def _check_name(name: bytes, path: bytes) -> None:
    if name in (b"", b".", b".."):
        raise InvalidRequest(f"The manifest's path {_quoted(path)} holds an empty name, '.' or '..'.")


def _check_unique(names: list[bytes], directory: bytes) -> None:
    for left, right in pairwise(names):
        if left == right:
            raise InvalidRequest(
                f"The manifest names {_quoted(directory + b'/' + left)} twice, or is not in depth-first order."
            )


def _quoted(path: bytes) -> str:
    return "'" + path[:200].decode("utf-8", "backslashreplace") + "'"
