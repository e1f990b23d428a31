"""A project: what machines work for, with its lineage of checkpoints and its limits."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID, uuid4

from sqlmodel import BigInteger, Field, SQLModel

from autovibe.domain.columns import UtcDateTime, now
from autovibe.types import ProjectStatus


class Project(SQLModel, table=True):
    """`current_checkpoint_uuid` is what a spawn without a checkpoint starts from; `initial_…` is the genesis."""

    __tablename__ = "project"

    uuid: UUID = Field(default_factory=uuid4, primary_key=True)
    name: str = Field(max_length=63, unique=True)
    description: str = ""
    status: str = ProjectStatus.active
    greediness: float = 0.1
    daily_money_micros: int | None = Field(default=None, sa_type=BigInteger)
    currency: str = Field(default="USD", max_length=3)
    daily_time_hours: float | None = None
    daily_api_calls: int | None = None
    storage_gb: float | None = None
    max_concurrent_machines: int | None = None
    current_checkpoint_uuid: UUID | None = None
    initial_checkpoint_uuid: UUID | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)
    updated_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
