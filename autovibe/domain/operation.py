"""What a client can wait for, and what a repeated request finds: operations, idempotency keys, events."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import JSON, Column
from sqlmodel import BigInteger, Field, Integer, SQLModel

from autovibe.domain.columns import UtcDateTime, now
from autovibe.types import OperationStatus

_SEQUENCE = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts by itself only in an INTEGER key


class Operation(SQLModel, table=True):
    """One workflow carries it out, under the operation's own id. `order` is what was asked, as JSON."""

    __tablename__ = "operation"

    uuid: UUID = Field(default_factory=uuid4, primary_key=True)
    kind: str = Field(max_length=20)
    status: str = Field(default=OperationStatus.accepted, max_length=20, index=True)
    step: str | None = None
    steps: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    progress: str = ""
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))
    object_uuid: UUID = Field(index=True)  # the machine or checkpoint
    machine_uuid: UUID | None = Field(default=None, index=True)
    actor: str = ""
    order: dict[str, Any] = Field(default_factory=dict, sa_column=Column("arguments", JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class IdempotencyKey(SQLModel, table=True):
    """A POST that made something, by who sent it and under which key; `request_hash` tells a repeat from a mistake."""

    __tablename__ = "idempotency_key"

    actor: str = Field(primary_key=True, max_length=100)
    key: str = Field(primary_key=True, max_length=255)
    request_hash: str = Field(max_length=64)
    object_kind: str = Field(max_length=20)
    object_uuid: UUID
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)


class Event(SQLModel, table=True):
    """Something changed. Written in the transaction that changed it; the tailer of each process wakes who waits."""

    __tablename__ = "event"
    __table_args__ = {"sqlite_autoincrement": True}  # an id is never given twice, also when old events are pruned

    id: int | None = Field(default=None, primary_key=True, sa_type=_SEQUENCE)
    kind: str = Field(max_length=60)  # "machine.status", "operation.step", "machine.output", …
    object_uuid: UUID = Field(index=True)
    project_uuid: UUID | None = None
    body: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)
