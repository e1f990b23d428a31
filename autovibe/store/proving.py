"""Proof that a stored manifest is whole: every object is hashed again, and its form checked."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

from sqlalchemy import Connection

from autovibe.errors import InternalError
from autovibe.store import nodes, objects, tables

BATCH = 500


def prove(connection: Connection, root: bytes, times: bytes | None) -> Iterator[str]:
    """A sentence for each object that is missing, has other bytes than its name says, or is malformed."""
    yield from _walk(connection, tables.tree.name, root)
    if times is not None:
        yield from _walk(connection, tables.tree_times.name, times)


def _walk(connection: Connection, table: str, root: bytes) -> Iterator[str]:
    is_tree = table == tables.tree.name
    noun = "tree object" if is_tree else "times object"
    seen = {nodes.EMPTY, nodes.EMPTY_TIMES, nodes.NO_DIGEST}
    pending = [root] if root not in seen else []
    while pending:
        batch, pending = pending[-BATCH:], pending[:-BATCH]
        bodies = objects.find(connection, tables.tree if is_tree else tables.tree_times, batch)
        for digest in batch:
            body = bodies.get(digest)
            if body is None:
                yield f"The {noun} '{digest.hex()}' is missing."
                continue
            if nodes.digest_of(body) != digest:
                yield f"The {noun} '{digest.hex()}' was changed: its bytes have another SHA-256."
            try:
                below = _tree_below(body) if is_tree else nodes.decode_times(body).children
            except (InternalError, struct.error) as error:
                yield f"The {noun} '{digest.hex()}' is malformed: {error}"
                continue
            for child in below:
                if child not in seen:
                    seen.add(child)
                    pending.append(child)


def _tree_below(body: bytes) -> list[bytes]:
    """The nodes below one. Raises InternalError for records out of order or malformed."""
    node = nodes.decode(body)
    names = [node.name(index) for index in range(node.size)]
    if any(left >= right for left, right in pairwise(names)):
        raise InternalError("Its names are not in order.")
    if node.height:
        return node.children()
    records = node.records()
    for record in records:
        if record[:1] != nodes.IMPLIED:
            nodes.decode_entry(record, b"")
    return [child for record in records if (child := nodes.child_of(record)) is not None]
