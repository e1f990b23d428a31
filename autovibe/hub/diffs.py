"""The changes between two manifests as a client reads them: three lists, rename hints, one line that sums them up."""

from __future__ import annotations

import base64
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from uuid import UUID

from autovibe import schemas
from autovibe.types import Change, Entry, EntryKind


def shown(base: UUID, target: UUID, changes: Sequence[Change], *, is_cross_project: bool) -> schemas.Diff:
    """`changes` as the store gives them, sorted by path; the lists keep that order."""
    return schemas.Diff(
        base=base,
        target=target,
        is_cross_project=is_cross_project,
        added=[_entry(c.target) for c in changes if c.base is None and c.target is not None],
        modified=[_modified(c, c.base, c.target) for c in changes if c.base is not None and c.target is not None],
        deleted=[_entry(c.base) for c in changes if c.target is None and c.base is not None],
        renamed=list(_renamed(changes)),
        total_changes=len(changes),
        summary=summary(changes),
    )


def spelled(path: bytes) -> tuple[str, str | None]:
    """A path as text, and as base64 too where its bytes are not UTF-8 (the text then shows them as \\xNN)."""
    try:
        return path.decode(), None
    except UnicodeDecodeError:
        return path.decode(errors="backslashreplace"), base64.b64encode(path).decode()


def _entry(entry: Entry) -> schemas.DiffEntry:
    path, path_base64 = spelled(entry.path)
    return schemas.DiffEntry(
        path=path, kind=entry.kind.name, size=entry.size, sha256=entry.digest.hex() or None, path_base64=path_base64
    )


def _modified(change: Change, old: Entry, new: Entry) -> schemas.DiffChange:
    path, path_base64 = spelled(change.path)
    return schemas.DiffChange(
        path=path,
        what=change.what,
        kind=new.kind.name,
        old_size=old.size,
        new_size=new.size,
        old_sha256=old.digest.hex() or None,
        new_sha256=new.digest.hex() or None,
        path_base64=path_base64,
    )


def _renamed(changes: Iterable[Change]) -> Iterable[schemas.DiffRename]:
    """Deleted and added files of equal content, each used once; one of the same name is preferred."""
    added: dict[bytes, list[Entry]] = defaultdict(list)
    deleted: list[Entry] = []
    for change in changes:
        entry = change.target if change.base is None else change.base if change.target is None else None
        if entry is None or entry.kind != EntryKind.file or not entry.size or not entry.digest:
            continue
        if change.base is None:
            added[entry.digest].append(entry)
        else:
            deleted.append(entry)
    for old in deleted:
        candidates = added.get(old.digest)
        if not candidates:
            continue
        new = next((c for c in candidates if posixpath.basename(c.path) == posixpath.basename(old.path)), candidates[0])
        candidates.remove(new)
        yield schemas.DiffRename(old_path=spelled(old.path)[0], new_path=spelled(new.path)[0], sha256=old.digest.hex())


def summary(changes: Sequence[Change]) -> str:
    """`12 changes: 3 added, 8 modified, 1 deleted (+4.1 KB); mostly src/ (9)`, or `No changes`."""
    if not changes:
        return "No changes"
    added = sum(1 for c in changes if c.base is None)
    deleted = sum(1 for c in changes if c.target is None)
    growth = sum((c.target.size if c.target else 0) - (c.base.size if c.base else 0) for c in changes)
    noun = "change" if len(changes) == 1 else "changes"
    counts = f"{added} added, {len(changes) - added - deleted} modified, {deleted} deleted"
    return f"{len(changes)} {noun}: {counts} ({_size(growth)}){_focus(changes)}"


def _size(growth: int) -> str:
    sign, size = ("-" if growth < 0 else "+"), abs(growth)
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{sign}{size / factor:.1f} {unit}"
    return f"{sign}{size} B"


def _focus(changes: Sequence[Change]) -> str:
    """The directory, seen from the deepest one that holds all changes, in which more than half of them lie."""
    if len(changes) < 2:
        return ""
    top = posixpath.commonpath([posixpath.dirname(c.path) for c in changes])
    depth = len(top.rstrip(b"/")) + 1
    below = Counter(rest.split(b"/", 1)[0] for c in changes if b"/" in (rest := c.path[depth:]))
    if not below:
        return ""
    name, count = min(below.items(), key=lambda item: (-item[1], item[0]))
    if 2 * count <= len(changes):
        return ""
    start = "/" if top == b"/" else ""
    return f"; mostly {start}{_printable(spelled(name)[0])}/ ({count})"


def _printable(text: str) -> str:
    """The summary is one line, whatever a guest calls its directories."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
