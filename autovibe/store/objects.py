"""Content-addressed objects in bulk: one SELECT for many, and inserts that skip what is known.

Objects never change, so a writer needs no lock against readers, and two writers of the same object want the same thing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import Connection, Table

from autovibe.errors import InternalError
from autovibe.store import Store

MOST_PARAMETERS = 10_000
"""Digests in one SELECT; SQLite allows 32,766."""


def load(connection: Connection, table: Table, digests: Collection[bytes]) -> dict[bytes, bytes]:
    """The bodies of all `digests`. Raises InternalError when one is missing."""
    bodies = find(connection, table, digests)
    if len(bodies) < len(digests):
        missing = next(digest for digest in digests if digest not in bodies)
        raise InternalError(f"A manifest in the database is damaged: object '{missing.hex()}' is missing.")
    return bodies


def find(connection: Connection, table: Table, digests: Collection[bytes]) -> dict[bytes, bytes]:
    """The bodies of those of `digests` that are stored."""
    return dict(_select(connection, f"SELECT digest, body FROM {table.name}", list(digests)))  # noqa: S608 - ours


def known(connection: Connection, table: Table, digests: Collection[bytes]) -> set[bytes]:
    """Those of `digests` that are stored."""
    return {row[0] for row in _select(connection, f"SELECT digest FROM {table.name}", list(digests))}  # noqa: S608


def _select(connection: Connection, query: str, digests: list[bytes]) -> list[tuple[bytes, bytes]]:
    rows: list[tuple[bytes, bytes]] = []
    for start in range(0, len(digests), MOST_PARAMETERS):
        some = digests[start : start + MOST_PARAMETERS]
        if connection.dialect.name == "sqlite":
            marks = ",".join("?" * len(some))
            rows += connection.exec_driver_sql(f"{query} WHERE digest IN ({marks})", tuple(some)).fetchall()
        else:
            rows += connection.exec_driver_sql(f"{query} WHERE digest = ANY(%s)", (some,)).fetchall()
    return rows


def save(store: Store, table: Table, bodies: Mapping[bytes, bytes]) -> None:
    """Store what is not stored yet; what is known costs no write."""
    with store.connection() as connection:
        have = known(connection, table, bodies)
    fresh = [(digest, body) for digest, body in bodies.items() if digest not in have]
    if not fresh:
        return
    with store.transaction() as session:
        connection = session.connection()
        insert = f"INSERT INTO {table.name} (digest, body)"  # a table of ours
        if store.is_sqlite:
            connection.exec_driver_sql(f"{insert} VALUES (?, ?) ON CONFLICT DO NOTHING", fresh)
        else:
            fresh.sort()  # in one order everywhere: two writers of the same objects then never deadlock
            columns = ([digest for digest, _ in fresh], [body for _, body in fresh])
            rows = "SELECT * FROM unnest(%s::bytea[], %s::bytea[])"
            connection.exec_driver_sql(f"{insert} {rows} ON CONFLICT DO NOTHING", columns)
