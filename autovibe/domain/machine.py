"""A machine: a VM with an agent, a project and a budget.

Its row is also its lock: an operation takes a machine by a compare-and-set of `status` (see `store.rows`), so that
there is one operation a machine at a time. `wanted` is how a terminate reaches a running spawn: every step reads it
first.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import JSON, Column, Index, text
from sqlmodel import BigInteger, Field, SQLModel

from autovibe.domain.columns import UtcDateTime, now
from autovibe.types import MachineStatus

WANTED_RUNNING = "running"
WANTED_TERMINATED = "terminated"


class Machine(SQLModel, table=True):
    """One Intelligent Machine. `vmid` stays after the VM is gone; what is taken is told by `Allotment`."""

    __tablename__ = "machine"
    # A name is free again once its machine has ended.
    __table_args__ = (
        Index(
            "uq_machine_live_name",
            "name",
            unique=True,
            sqlite_where=text("ended_at IS NULL"),
            postgresql_where=text("ended_at IS NULL"),
        ),
        Index("ix_machine_project_status", "project_uuid", "status"),
        Index("ix_machine_project_spawned_at", "project_uuid", "spawned_at"),
        Index("ix_machine_project_ended_at", "project_uuid", "ended_at"),
    )

    uuid: UUID = Field(default_factory=uuid4, primary_key=True)
    name: str = Field(max_length=63, index=True)
    type: str = Field(max_length=63)
    status: str = Field(default=MachineStatus.spawning, max_length=20, index=True)
    resume_status: str | None = Field(default=None, max_length=20)  # where checkpointing returns to
    wanted: str = Field(default=WANTED_RUNNING, max_length=20)
    project_uuid: UUID = Field(foreign_key="project.uuid", index=True)
    checkpoint_uuid: UUID | None = None  # what it was spawned from
    prompt: str | None = None
    file_modifications: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    max_money_micros: int | None = Field(default=None, sa_type=BigInteger)
    currency: str = Field(default="USD", max_length=3)
    max_time_minutes: float | None = None
    max_api_calls: int | None = None

    estimate: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))
    reservation_uuid: UUID | None = None  # what it holds of its project's budget now
    price_micros: int = Field(
        default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": text("0")}
    )  # of an hour of its VM
    metered_at: datetime | None = Field(default=None, sa_type=UtcDateTime)  # charged until then; None: its VM is off
    blocked: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))  # at which limit

    node: str | None = None
    vmid: int | None = None
    address: str | None = None
    port: int | None = None
    host_key: str | None = None  # "ssh-ed25519 AAAA…", pinned at first contact

    exit_status: int | None = None
    error_message: str | None = None
    progress: str = ""
    last_checkpoint_uuid: UUID | None = None
    final_checkpoint_uuid: UUID | None = None
    operation_uuid: UUID | None = None
    termination_reason: str = ""

    output_bytes: int = Field(default=0, sa_type=BigInteger)  # of the prompt's output kept so far
    watched_by: str | None = None  # the hub process that follows the prompt, until watched_until
    watched_until: datetime | None = Field(default=None, sa_type=UtcDateTime)

    spawned_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)
    running_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    terminated_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    updated_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Output(SQLModel, table=True):
    """A stretch of the prompt's output; the key makes a stretch that is read twice harmless."""

    __tablename__ = "machine_output"

    machine_uuid: UUID = Field(foreign_key="machine.uuid", primary_key=True)
    start: int = Field(primary_key=True, sa_type=BigInteger)
    body: bytes
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Allotment(SQLModel, table=True):
    """A vmid the Hub has taken from its range. The primary key is what keeps two spawns apart."""

    __tablename__ = "allotment"

    vmid: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    owner_uuid: UUID = Field(index=True)  # the machine, or the checkpoint whose template it is
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
