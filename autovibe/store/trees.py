"""Manifests as content-addressed trees: written from a scan, compared, read, and proved whole.

    root = trees.write(entries)                        root.digest and root.times are what a checkpoint keeps
    trees.diff(a.root_digest, b.root_digest)           its cost follows the number of changes, not of files
    trees.entries(a.root_digest, a.times_digest)       in the byte order of paths, from any path on

Digests are hex. See `store.nodes` for the format and for why times lie beside the tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from sqlalchemy import Connection

from autovibe.errors import InvalidRequest, NotFound
from autovibe.store import Store, comparing, nodes, objects, tables
from autovibe.store.listing import Listing
from autovibe.store.proving import prove
from autovibe.store.writing import Root, Writer
from autovibe.types import Change, Entry, EntryKind

__all__ = ["EMPTY_ROOT", "EMPTY_TIMES", "Root", "Trees"]

EMPTY_ROOT = nodes.EMPTY.hex()
"""The manifest without entries; it is known without being stored."""
EMPTY_TIMES = nodes.EMPTY_TIMES.hex()


class Trees:
    """The manifests of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, entries: Iterable[Entry]) -> Root:
        """Store a manifest; writing one that is known changes nothing.

        `entries` come depth first: a directory before what lies in it, and all of that together. Directories above the
        first ones (`/usr` for `/usr/local`) are implied and are no entries. Memory is bounded by one chain of
        directories; no transaction is held while the next entry is waited for. Raises InvalidRequest for a path that is
        not absolute, an empty name, `.` or `..`, a path twice, and numbers out of range.
        """
        return Writer(self._store).write(entries)

    def diff(self, base: str, target: str) -> list[Change]:
        """What turns `base` into `target`, sorted by the bytes of the path; modification times do not count.

        A directory that came or went is one change, and so is each path below it. Raises NotFound for an unknown root.
        """
        with self._reading(base, target) as (connection, (before, after)):
            return comparing.diff(connection, before, after)

    def entries(
        self,
        root: str,
        times: str | None = None,
        *,
        after: bytes | None = None,
        limit: int | None = None,
        prefix: bytes | None = None,
    ) -> list[Entry]:
        """Entries sorted by the bytes of the path: those greater than `after`, at or below `prefix`, at most `limit`.

        Without `times` (the checkpoint's `times_digest`) every `mtime_ns` is 0. Raises NotFound for an unknown root.
        """
        with self._reading(root) as (connection, (digest,)):
            beside = _parse(times) if times is not None else None
            return list(islice(Listing(connection, digest, beside).entries(after, prefix), limit))

    def new_bytes(self, base: str, target: str) -> int:
        """Bytes of files in `target` whose content `base` does not have where something changed.

        Each content counts once; a copy of a file that itself did not change counts as new, since looking for it would
        read the whole of `base`.
        """
        old: set[bytes] = set()
        new: dict[bytes, int] = {}
        for change in self.diff(base, target):
            if change.base is not None and change.base.digest:
                old.add(change.base.digest)
            if change.target is not None and change.target.kind == EntryKind.file:
                new[change.target.digest or change.path] = change.target.size
        return min(sum(size for digest, size in new.items() if digest not in old), 2**63 - 1)

    def verify(self, root: str, times: str | None = None) -> list[str]:
        """Hash everything reachable from `root` and `times` again: a sentence for each fault, none when it is whole."""
        with self._store.connection() as connection:
            return list(prove(connection, _parse(root), _parse(times) if times is not None else None))

    @contextmanager
    def _reading(self, *roots: str) -> Iterator[tuple[Connection, list[bytes]]]:
        digests = [_parse(root) for root in roots]
        with self._store.connection() as connection:
            stored = {digest for digest in digests if digest != nodes.EMPTY}
            _check_known(connection, stored, roots)
            yield connection, digests


def _check_known(connection: Connection, stored: set[bytes], roots: tuple[str, ...]) -> None:
    have = objects.known(connection, tables.tree, stored)
    for root in roots:
        digest = _parse(root)
        if digest in stored and digest not in have:
            raise NotFound(f"There is no manifest with the root '{root}'.", details={"object": "manifest"})


def _parse(digest: str) -> bytes:
    try:
        found = bytes.fromhex(digest)
    except ValueError:
        found = b""
    if len(found) != nodes.DIGEST_SIZE:
        raise InvalidRequest(f"'{digest[:80]}' is no digest of a manifest; it has 64 hexadecimal digits.")
    return found
