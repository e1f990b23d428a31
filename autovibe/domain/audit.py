"""What was done, by whom: the audit log's lines, and what hub processes have leased of the keys' rate limits."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlmodel import BigInteger, Field, Integer, SQLModel

from autovibe.domain.columns import UtcDateTime, now

_SEQUENCE = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts by itself only in an INTEGER key


class AuditEntry(SQLModel, table=True):
    """A change, or an attempt that was refused. Only ever added; without bodies, without secrets.

    `count` lines of one kind that came together (refusals in a loop) are one row.
    """

    __tablename__ = "audit_entry"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = Field(default=None, primary_key=True, sa_type=_SEQUENCE)
    actor: str = Field(default="", max_length=100)
    key_id: str = Field(default="", max_length=16)
    verb: str = Field(max_length=120)  # "POST /machines/{machine_uuid}/terminate"
    object_kind: str = Field(default="", max_length=20)
    object_uuid: UUID | None = Field(default=None, index=True)
    project_uuid: UUID | None = Field(default=None, index=True)
    outcome: str = Field(max_length=10)  # see types.Outcome
    status: int  # of the HTTP answer
    count: int = 1
    request_id: str = Field(default="", max_length=64)
    client: str = Field(default="", max_length=64)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)


class RateLease(SQLModel, table=True):
    """How much of a bucket's limit hub processes have taken in one minute; `minute` counts from 1970."""

    __tablename__ = "rate_lease"

    bucket: str = Field(primary_key=True, max_length=40)
    minute: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False}, index=True)
    taken: int
