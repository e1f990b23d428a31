"""The tables that belong to the store itself: content-addressed objects, and which autovibe made which schema.

`tree` holds directories of manifests, `tree_times` the modification times beside them (see `store.nodes`); both are
named by the SHA-256 of their body, shared by all checkpoints, and never changed.
"""

from __future__ import annotations

from sqlalchemy import Column, LargeBinary, String, Table
from sqlmodel import SQLModel

from autovibe.domain.columns import UtcDateTime

tree = Table(
    "tree",
    SQLModel.metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

tree_times = Table(
    "tree_times",
    SQLModel.metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

schema_history = Table(
    "schema_history",
    SQLModel.metadata,
    Column("revision", String(32), primary_key=True),
    Column("autovibe", String(32), nullable=False),  # the version that migrated to it
    Column("migrated_at", UtcDateTime, nullable=False),
)
