"""Checkpoints, their manifests and their differences on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import Field

from autovibe.schemas.wire import Page, Reply
from autovibe.types import (
    ArtefactKind,
    CheckpointStatus,
    CheckpointType,
)


class Artefact(Reply):
    kind: ArtefactKind
    storage: str


class ManifestFile(Reply):
    """One path of a manifest. `path_base64` stands beside a path that is not UTF-8."""

    size: int
    sha256: str | None
    kind: str
    mode: str
    uid: int
    gid: int
    mtime: datetime | None = None
    target: str | None = None
    path_base64: str | None = None


class Checkpoint(Reply):
    uuid: UUID
    project_uuid: UUID
    parent_uuid: UUID | None
    machine_uuid: UUID | None
    type: CheckpointType
    label: str | None
    description: str
    context: str
    status: CheckpointStatus
    node: str | None
    vmid: int | None
    proxmox_snapshot_id: str | None
    artefact: Artefact | None
    root_digest: str | None
    file_count: int
    size_bytes: int
    size_mb: float
    unique_bytes: int
    verified_at: datetime | None
    metadata: dict[str, Any]
    operation_uuid: UUID | None = None
    created_at: datetime
    manifest: dict[str, ManifestFile] | None = None
    manifest_next: str | None = Field(default=None, description="Where to go on: ?include=manifest&cursor=…")


class DiffEntry(Reply):
    path: str
    kind: str
    size: int
    sha256: str | None
    path_base64: str | None = None


class DiffChange(Reply):
    path: str
    what: list[str]
    kind: str
    old_size: int
    new_size: int
    old_sha256: str | None
    new_sha256: str | None
    path_base64: str | None = None


class DiffRename(Reply):
    """A hint: a deleted and an added path with the same content. Both are also listed as such."""

    old_path: str
    new_path: str
    sha256: str


class Diff(Reply):
    base: UUID
    target: UUID
    is_cross_project: bool
    added: list[DiffEntry]
    modified: list[DiffChange]
    deleted: list[DiffEntry]
    renamed: list[DiffRename]
    total_changes: int
    summary: str


class CheckpointPage(Page):
    checkpoints: list[Checkpoint]
