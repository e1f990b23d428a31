"""The format of manifest trees: a directory is a node, or a small tree of nodes, each named by the SHA-256 of its
body.

    body    := version u8 · height u8 · zero u16 · count u32 · end u32 [count] · record [count]
    height 0: records are entries, sorted by name
    record  := kind u8 · mode u16 · uid u32 · gid u32 · size u64 · digest [32] · length of name u16 · name · link target
    height n: records are nodes of height n-1 in order
    record  := digest [32] · first name in it

All little-endian; `end` is where a record ends, counted from the first one's start. `digest` is a file's SHA-256, a
directory's node, or zeros where there is none; `size` is a file's size, or the length of a link's target, so that a
record tells its own length and equal bytes are equal records. A directory of more than 64 entries is cut where a hash
of the name says so, about every 32 entries, and the list of its chunks is cut again until it fits: the same entries
give the same nodes whatever their history, and a change rewrites one chunk a level. (64, not 256: in trees of 100
entries a directory a checkpoint of 10 changes then adds 0.4 % instead of 1.1 %, and a diff takes 1.3 times as long.)
Modification times lie beside the tree, node by node, so that a touched file changes no digest of the tree:

    times   := version u8 · height u8 · zero u16 · count u32 · time i64 [count] · digest [32] (of the times below) …

with a digest for each directory (height 0) or each node (height n) in order, and no `time` above height 0.

Bodies are not compressed and records are found by their ends, so that comparing two nodes is a comparison of bytes:
what is equal is never taken apart.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

from autovibe.errors import InternalError
from autovibe.types import Entry, EntryKind

VERSION = 1
DIGEST_SIZE = 32
NO_DIGEST = bytes(DIGEST_SIZE)
LONGEST = 64  # records of a node that is not cut
LEAST, USUAL, MOST = 16, 32, 128  # records of a chunk
_SELDOM, _OFTEN = 2**32 // 64, 2**32 // 8

HEADER = struct.Struct("<BBHI")
RECORD = struct.Struct("<cHIIQ32sH")
FIXED = RECORD.size
DIGEST_AT = RECORD.size - 2 - DIGEST_SIZE
DIRECTORY = EntryKind.directory.encode()
IMPLIED = b"/"
"""The kind of a directory that no scan reported: one above a scanned root. It is part of the tree, and no entry."""
SELF = b"."
"""The name under which the root holds the attributes of `/` itself, where a scan reports them."""

_FILE = EntryKind.file
_KINDS = {kind.encode(): kind for kind in EntryKind}


class Node(NamedTuple):
    """A body taken apart as little as possible: the ends of its records (relative to `start`)."""

    body: bytes
    height: int
    start: int
    ends: memoryview

    @property
    def size(self) -> int:
        return len(self.ends)

    def record(self, index: int) -> bytes:
        begin = self.ends[index - 1] if index else 0
        return self.body[self.start + begin : self.start + self.ends[index]]

    def records(self, first: int = 0, last: int | None = None) -> list[bytes]:
        """Records `first` up to, not including, `last`."""
        if last is None:
            last = len(self.ends)
        if first >= last:
            return []
        body, start = self.body, self.start
        begin = start + (self.ends[first - 1] if first else 0)
        found = []
        for end in self.ends[first:last].tolist():
            end += start
            found.append(body[begin:end])
            begin = end
        return found

    def name(self, index: int) -> bytes:
        """The name of an entry, or the first name in a chunk."""
        record = self.record(index)
        return record_name(record) if self.height == 0 else record[DIGEST_SIZE:]

    def find(self, name: bytes) -> int:
        """The index of the first entry that is not before `name`."""
        return bisect_left(range(self.size), name, key=self.name)

    def find_chunk(self, name: bytes) -> int:
        """The index of the chunk that holds `name`, if any does."""
        return max(bisect_left(range(self.size), name + b"\0", key=self.name) - 1, 0)

    def children(self) -> list[bytes]:
        """The digests of the chunks of a node above height 0."""
        return [record[:DIGEST_SIZE] for record in self.records()]


class Times(NamedTuple):
    """The times of one node: of its entries, and the digests of those below."""

    times: Sequence[int]
    children: list[bytes]


def digest_of(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def encode(records: Sequence[bytes], height: int) -> bytes:
    """The body of a node."""
    ends, end = [], 0
    for record in records:
        end += len(record)
        ends.append(end)
    return b"".join((HEADER.pack(VERSION, height, 0, len(ends)), struct.pack(f"<{len(ends)}I", *ends), *records))


def decode(body: bytes) -> Node:
    """Raises InternalError for a body that is none."""
    try:
        version, height, zero, count = HEADER.unpack_from(body)
        start = HEADER.size + 4 * count
        ends = memoryview(body)[HEADER.size : start].cast("I")
        length = ends[-1] if count else 0
    except (struct.error, TypeError, ValueError, IndexError) as error:
        raise _damaged() from error
    if version != VERSION or zero or length != len(body) - start:
        raise _damaged()
    return Node(body, height, start, ends)


def encode_times(height: int, count: int, times: Sequence[int], children: Sequence[bytes]) -> bytes:
    return b"".join((HEADER.pack(VERSION, height, 0, count), struct.pack(f"<{len(times)}q", *times), *children))


def decode_times(body: bytes) -> Times:
    """Raises InternalError for a body that is none."""
    try:
        version, height, zero, count = HEADER.unpack_from(body)
        start = HEADER.size if height else HEADER.size + 8 * count
        times = () if height else memoryview(body)[HEADER.size : start].cast("q")
    except (struct.error, TypeError, ValueError) as error:
        raise _damaged() from error
    if version != VERSION or zero or (len(body) - start) % DIGEST_SIZE:
        raise _damaged()
    return Times(times, [body[at : at + DIGEST_SIZE] for at in range(start, len(body), DIGEST_SIZE)])


def encode_entry(entry: Entry, name: bytes) -> bytes:
    """The record of an entry; a directory's digest is put in later. Raises struct.error for a number out of range."""
    _, kind, mode, uid, gid, size, digest, target, _ = entry
    if kind == "f":
        return RECORD.pack(b"f", mode, uid, gid, size, digest or NO_DIGEST, len(name)) + name
    if kind == "l":
        return RECORD.pack(b"l", mode, uid, gid, len(target), NO_DIGEST, len(name)) + name + target
    return RECORD.pack(kind.encode(), mode, uid, gid, 0, NO_DIGEST, len(name)) + name


def decode_entry(record: bytes, parent: bytes, mtime_ns: int = 0) -> Entry:
    """The entry of a record in the directory `parent` (b"" for the root). Raises InternalError for none."""
    try:
        kind, mode, uid, gid, size, digest, length = RECORD.unpack_from(record)
        name = record[FIXED : FIXED + length]
        path = parent + b"/" + name if name != SELF else parent or b"/"
        if kind == b"f":
            return Entry(path, _FILE, mode, uid, gid, size, digest if digest != NO_DIGEST else b"", b"", mtime_ns)
        return Entry(path, _KINDS[kind], mode, uid, gid, 0, b"", record[FIXED + length :], mtime_ns)
    except (struct.error, KeyError) as error:
        raise _damaged() from error


def record_name(record: bytes) -> bytes:
    return record[FIXED : FIXED + record[FIXED - 2] + 256 * record[FIXED - 1]]


def child_of(record: bytes) -> bytes | None:
    """The node of a directory's record, None for any other kind."""
    return record[DIGEST_AT : DIGEST_AT + DIGEST_SIZE] if record[:1] in (DIRECTORY, IMPLIED) else None


def with_child(record: bytes, digest: bytes) -> bytes:
    return record[:DIGEST_AT] + digest + record[DIGEST_AT + DIGEST_SIZE :]


def cuts(names: Sequence[bytes], height: int) -> Iterator[tuple[int, int]]:
    """How a directory's records, or the list of its chunks, are cut: (first, last) of each chunk, the last excluded.

    A cut is made where a hash of the name says so, seldom below USUAL records and often above, so that chunks are
    nearly of one size and the cuts after an inserted name soon fall where they fell before.
    """
    first, index = 0, LEAST
    while index < len(names):
        size = index - first
        # Multiplied, since the CRCs of names that count up differ in few bits.
        mixed = crc32(names[index], height) * 0x9E3779B1 & 0xFFFFFFFF
        if mixed < (_SELDOM if size < USUAL else _OFTEN) or size >= MOST:
            yield first, index
            first, index = index, index + LEAST
        else:
            index += 1
    yield first, len(names)


def _damaged() -> InternalError:
    return InternalError("A manifest in the database is damaged: an object is no tree node.")


EMPTY_BODY = encode((), 0)
EMPTY = digest_of(EMPTY_BODY)
"""The directory without entries. It is known, and never stored."""
EMPTY_TIMES_BODY = encode_times(0, 0, (), ())
EMPTY_TIMES = digest_of(EMPTY_TIMES_BODY)
