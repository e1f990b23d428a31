"""The Hub itself: what it knows of itself, its checkpoints, its experiments, and what its API has answered.

The Hub is its database, however many processes serve it; a "place" is one home of them, `<host>-<home id>`: the name of
a process without its slot. Checkpoints and experiments lie in the home of the process that made them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import JSON, Column
from sqlmodel import BigInteger, Field, SQLModel

from autovibe.domain.columns import UtcDateTime, now
from autovibe.types import ExperimentStatus, HubCheckpointKind, HubCheckpointStatus

HUB_UUID = "hub_uuid"
"""The key of HubState under which the Hub's own uuid stands, made once a database."""

EXPERIMENT = "experiment"
"""The key of HubState that tells a Hub that it is an experiment, and which."""

EVENTS_FORGOTTEN = "events_forgotten"
"""The key of HubState that tells up to which id events were deleted; other ids that are missing were never told."""


class HubState(SQLModel, table=True):
    """One thing the Hub knows of itself."""

    __tablename__ = "hub_state"

    key: str = Field(primary_key=True, max_length=60)
    value: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    updated_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class HubCheckpoint(SQLModel, table=True):
    """A copy of the Hub's database, journal, settings and keys, in a directory of the home that `place` names.

    `day` is set for the daily one alone ("2026-11-21"), and unique: it is what keeps two processes from making two.
    """

    __tablename__ = "hub_checkpoint"

    uuid: UUID = Field(default_factory=uuid4, primary_key=True)
    type: str = Field(max_length=20)
    kind: str = Field(default=HubCheckpointKind.logical, max_length=10)
    status: str = Field(default=HubCheckpointStatus.creating, max_length=20)
    reason: str = ""
    description: str = ""
    day: str | None = Field(default=None, max_length=10, unique=True)
    place: str = Field(default="", max_length=200)
    path: str = ""
    size_bytes: int = Field(default=0, sa_type=BigInteger)
    file_count: int = 0
    version: str = Field(default="", max_length=40)
    schema_revision: str = Field(default="", max_length=40)
    vmid: int | None = None  # of the Hub's own VM, where its snapshot is part of the checkpoint
    snapshot: str | None = None
    error_message: str | None = None
    operation_uuid: UUID | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)
    estimated_completion_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    completed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Experiment(SQLModel, table=True):
    """A second Hub, restored from a checkpoint, that runs as a process beside the one that spawned it.

    planned -> running -> ended | failed. `pid` and `pid_created` name the process: pids are used again.
    """

    __tablename__ = "experiment"

    uuid: UUID = Field(default_factory=uuid4, primary_key=True)
    hub_uuid: UUID = Field(default_factory=uuid4, unique=True)
    name: str = Field(max_length=63, index=True)
    status: str = Field(default=ExperimentStatus.planned, max_length=20, index=True)
    checkpoint_uuid: UUID = Field(foreign_key="hub_checkpoint.uuid")
    configuration: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    budget_share: float = 0.1
    place: str = Field(default="", max_length=200)
    path: str = ""
    port: int | None = None
    vmid_first: int | None = None
    vmid_last: int | None = None
    pid: int | None = None
    pid_created: float | None = None
    start_count: int = 0
    is_stop_wanted: bool = False
    error_message: str | None = None
    report: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))  # its last known figures
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    ends_at: datetime = Field(sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class ApiTraffic(SQLModel, table=True):
    """What one hub process has answered in one minute; `timed` of the requests count for `total_milliseconds`.

    A request that asked to be kept waiting is counted and not timed.
    """

    __tablename__ = "api_traffic"

    minute: datetime = Field(primary_key=True, sa_type=UtcDateTime)
    hub: str = Field(primary_key=True, max_length=200)
    requests: int = 0
    failures: int = 0
    timed: int = 0
    total_milliseconds: float = 0.0


def place_of(process: str) -> str:
    """The home of a hub process, by its name `<host>-<home id>-<slot>`."""
    return process.rpartition("-")[0]
