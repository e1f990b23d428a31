"""Checkpoints over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection, canonical, order
from autovibe.sdk.machines import Files, Machines
from autovibe.sdk.operations import Operations
from autovibe.sdk.waiting import Watch, each
from autovibe.types import CheckpointStatus, CheckpointType


class Checkpoints:
    def __init__(self, connection: Connection, operations: Operations, machines: Machines) -> None:
        self._connection = connection
        self._operations = operations
        self._machines = machines

    def list(
        self,
        project_uuid: UUID | str,
        *,
        type: CheckpointType | str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.CheckpointPage:
        path = f"/projects/{canonical(project_uuid)}/checkpoints"
        return self._connection.get(schemas.CheckpointPage, path, type=type, limit=limit, offset=offset)

    def each(
        self, project_uuid: UUID | str, *, type: CheckpointType | str | None = None
    ) -> Iterator[schemas.Checkpoint]:
        """Every checkpoint of a project, newest first, page by page."""
        return each(
            lambda offset: self.list(project_uuid, type=type, limit=200, offset=offset), lambda page: page.checkpoints
        )

    def get(
        self, uuid: UUID | str, *, include_manifest: bool = False, limit: int | None = None, cursor: str | None = None
    ) -> schemas.Checkpoint:
        """A checkpoint, with one page of its manifest when asked; `manifest_next` is the cursor of the next page."""
        include = "manifest" if include_manifest else None
        path = f"/checkpoints/{canonical(uuid)}"
        return self._connection.get(schemas.Checkpoint, path, include=include, limit=limit, cursor=cursor)

    def wait(self, uuid: UUID | str, *, watch: Watch | None = None) -> schemas.Checkpoint:
        """Wait until a checkpoint that is being made is ready. Raises OperationFailed when it could not be made."""
        checkpoint = self.get(uuid)
        if checkpoint.status is not CheckpointStatus.ready and checkpoint.operation_uuid is not None:
            self._operations.wait(checkpoint.operation_uuid, watch=watch)
            checkpoint = self.get(uuid)
        return checkpoint

    def spawn(
        self,
        uuid: UUID | str,
        *,
        type: str = "shell",
        prompt: str | None = None,
        file_modifications: Files | None = None,
        resource_constraints: schemas.ResourceConstraints | None = None,
        name: str | None = None,
        wait: bool = False,
        watch: Watch | None = None,
    ) -> schemas.Machine:
        """Spawn a machine from this checkpoint, in the checkpoint's project."""
        body = _order(type, prompt, file_modifications, resource_constraints, name)
        machine = self._connection.post(schemas.Machine, f"/checkpoints/{canonical(uuid)}/spawn", body)
        return self._machines.wait(machine.uuid, watch=watch) if wait else machine

    def plan(
        self,
        uuid: UUID | str,
        *,
        type: str = "shell",
        prompt: str | None = None,
        file_modifications: Files | None = None,
        resource_constraints: schemas.ResourceConstraints | None = None,
        name: str | None = None,
    ) -> schemas.SpawnPlan:
        """What such a spawn would use, how it would be cloned, and all that stands against it; nothing is done."""
        body = _order(type, prompt, file_modifications, resource_constraints, name)
        return self._connection.post(schemas.SpawnPlan, f"/checkpoints/{canonical(uuid)}/spawn?dry_run=true", body)

    def diff(self, base: UUID | str, target: UUID | str) -> schemas.Diff:
        """What changed from `base` to `target`, each list sorted by path."""
        return self._connection.get(schemas.Diff, f"/checkpoints/{canonical(base)}/diff/{canonical(target)}")


def _order(
    type: str,
    prompt: str | None,
    file_modifications: Files | None,
    resource_constraints: schemas.ResourceConstraints | None,
    name: str | None,
) -> schemas.SpawnFromCheckpointOrder:
    return order(
        schemas.SpawnFromCheckpointOrder,
        type=type,
        prompt=prompt,
        file_modifications=dict(file_modifications) if file_modifications else None,
        resource_constraints=resource_constraints,
        name=name,
    )
