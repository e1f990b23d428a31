"""A checkpoint: an artefact in Proxmox, a manifest (a content-addressed tree, told by its root), parent, metadata."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import JSON, Column
from sqlmodel import BigInteger, Field, SQLModel, UniqueConstraint

from autovibe.domain.columns import UtcDateTime, now
from autovibe.domain.machine import Machine
from autovibe.types import CheckpointStatus

_PROMPT_START = 200


def snapshot_name(checkpoint: UUID) -> str:
    """The name of a checkpoint's snapshot in Proxmox: 39 characters of the 40 it allows, starting with a letter."""
    return f"av-{checkpoint}"


def details_of(trigger: str, machine: Machine, **more: Any) -> dict[str, Any]:
    """A checkpoint's metadata: why it is made, and what the machine was about at that moment."""
    return {
        "trigger": trigger,
        **more,
        "machine": {
            "name": machine.name,
            "type": machine.type,
            "status": str(machine.resume_status or machine.status),
            "prompt": None if machine.prompt is None else machine.prompt[:_PROMPT_START],
            "exit_status": machine.exit_status,
            "progress": machine.progress,
        },
    }


class Checkpoint(SQLModel, table=True):
    """`vmid` is the VM that holds the snapshot, or the template itself."""

    __tablename__ = "checkpoint"
    __table_args__ = (UniqueConstraint("project_uuid", "label", name="uq_checkpoint_label"),)

    uuid: UUID = Field(default_factory=uuid4, primary_key=True)
    project_uuid: UUID = Field(foreign_key="project.uuid", index=True)
    parent_uuid: UUID | None = Field(default=None, index=True)
    machine_uuid: UUID | None = Field(default=None, index=True)
    type: str = Field(max_length=20)
    label: str | None = Field(default=None, max_length=63)
    description: str = ""
    context: str = ""
    status: str = Field(default=CheckpointStatus.creating, max_length=20)
    error_message: str | None = None

    node: str | None = None
    vmid: int | None = Field(default=None, index=True)
    snapshot: str | None = None
    artefact_kind: str | None = None
    storage: str | None = None
    provisioned_for: str | None = None  # the machine type whose playbook has run on it, with its digest

    root_digest: str | None = Field(default=None, max_length=64)  # hex
    times_digest: str | None = Field(default=None, max_length=64)  # hex; the root of the modification times beside it
    file_count: int = 0
    size_bytes: int = Field(default=0, sa_type=BigInteger)
    unique_bytes: int = Field(default=0, sa_type=BigInteger)  # of files whose content the parent does not have
    verified_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    details: dict[str, Any] = Field(default_factory=dict, sa_column=Column("metadata", JSON, nullable=False))
    operation_uuid: UUID | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)
