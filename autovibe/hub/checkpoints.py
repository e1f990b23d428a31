"""Checkpoints: create, show with its manifest, list, compare."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime
from uuid import UUID

from sqlmodel import Session, col, select

from autovibe import schemas
from autovibe.domain import Checkpoint, Machine, Operation, Project
from autovibe.domain.actor import Actor
from autovibe.domain.checkpoint import details_of
from autovibe.domain.columns import now
from autovibe.domain.machine import WANTED_TERMINATED
from autovibe.errors import Conflict, InvalidRequest
from autovibe.hub import Hub, diffs, storage_limits
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.hub.pages import Cut, cut
from autovibe.store import rows
from autovibe.types import ArtefactKind, CheckpointStatus, CheckpointType, Entry, MachineStatus, OperationKind
from autovibe.workflows import steps_of

MANIFEST_LIMIT = 1000
_CHECKPOINTABLE = (MachineStatus.active, MachineStatus.working)


def create(
    hub: Hub, actor: Actor, machine_uuid: UUID, order: schemas.CheckpointOrder, once: Once | None = None
) -> schemas.Checkpoint:
    """A manual checkpoint of a reachable machine.

    Raises NotFound, Conflict (state, label taken), LimitExceeded (the project's storage), InsufficientSpace.
    """
    hub.require_space()

    def decide(session: Session, _attempt: int) -> Accepted:
        # The row is held, so that of two orders at the same moment one waits and then finds the machine checkpointing.
        machine = rows.held(session, Machine, machine_uuid)
        if machine.status not in _CHECKPOINTABLE or machine.wanted == WANTED_TERMINATED:
            is_wanted = machine.wanted != WANTED_TERMINATED
            raise Conflict(
                f"Machine '{machine.name}' is {machine.status if is_wanted else 'to be terminated'} and cannot be "
                "checkpointed; that takes a machine that is active or working.",
                details={"status": machine.status},
            )
        storage_limits.require_room(session, rows.get(session, Project, machine.project_uuid))
        _require_free_label(session, machine.project_uuid, order.label)
        checkpoint = Checkpoint(
            project_uuid=machine.project_uuid,
            parent_uuid=machine.last_checkpoint_uuid or machine.checkpoint_uuid,
            machine_uuid=machine.uuid,
            type=CheckpointType.manual,
            label=order.label,
            description=order.description,
            context=order.context,
            node=machine.node,
            vmid=machine.vmid,
            storage=hub.storage,
            details=details_of("request", machine, actor=actor.name),
        )
        operation = Operation(
            kind=OperationKind.checkpoint,
            steps=steps_of(OperationKind.checkpoint),
            object_uuid=checkpoint.uuid,
            machine_uuid=machine.uuid,
            actor=actor.name,
            order={"checkpoint_uuid": str(checkpoint.uuid)},
        )
        checkpoint.operation_uuid = machine.operation_uuid = operation.uuid
        machine.resume_status = machine.status
        machine.status = MachineStatus.checkpointing
        machine.updated_at = now()
        session.add_all([checkpoint, operation])
        project = machine.project_uuid
        rows.record(session, "machine.status", machine.uuid, project, status=str(machine.status), actor=actor.name)
        rows.record(session, "checkpoint.status", checkpoint.uuid, project, status=str(checkpoint.status))
        return Accepted(checkpoint.uuid, operation)

    return show(hub, accept(hub, actor, once, "checkpoint", decide))


def _require_free_label(session: Session, project: UUID, label: str | None) -> None:
    if label is None:
        return
    statement = select(Checkpoint.uuid).where(Checkpoint.project_uuid == project, Checkpoint.label == label)
    if session.exec(statement).first() is not None:
        raise Conflict(f"The project has a checkpoint '{label}' already; choose another label.")


def show(hub: Hub, uuid: UUID) -> schemas.Checkpoint:
    """Without the manifest. Raises NotFound."""
    with hub.store.reading() as session:
        return _wire(rows.get(session, Checkpoint, uuid))


def show_with_manifest(
    hub: Hub, uuid: UUID, *, cursor: str | None = None, limit: int = MANIFEST_LIMIT, prefix: str | None = None
) -> schemas.Checkpoint:
    """With `limit` entries of the manifest behind `cursor`, those at or below the path `prefix` where it is given.

    Raises NotFound, InvalidRequest for a cursor that is none, Conflict for a checkpoint that is not ready.
    """
    with hub.store.reading() as session:
        row = rows.get(session, Checkpoint, uuid)
    shown = _wire(row)
    found = hub.trees.entries(
        _root(shown),
        row.times_digest,
        after=_position(cursor),
        limit=limit + 1,
        prefix=prefix.encode() if prefix else None,
    )
    shown.manifest = dict(_manifest_file(entry) for entry in found[:limit])
    if len(found) > limit:
        shown.manifest_next = base64.urlsafe_b64encode(found[limit - 1].path).decode()
    return shown


def _position(cursor: str | None) -> bytes | None:
    if not cursor:
        return None
    try:
        return base64.b64decode(cursor.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            "The cursor is not one that 'manifest_next' gave; begin without one.", details={"field": "cursor"}
        ) from error


def _manifest_file(entry: Entry) -> tuple[str, schemas.ManifestFile]:
    path, path_base64 = diffs.spelled(entry.path)
    return path, schemas.ManifestFile(
        size=entry.size,
        sha256=entry.digest.hex() or None,
        kind=entry.kind.name,
        mode=f"{entry.mode:04o}",
        uid=entry.uid,
        gid=entry.gid,
        mtime=_moment(entry.mtime_ns),
        target=entry.target.decode(errors="backslashreplace") if entry.target else None,
        path_base64=path_base64,
    )


def _moment(nanoseconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    except (ValueError, OverflowError, OSError):  # a guest may set any time, also one no calendar has
        return None


def _root(checkpoint: schemas.Checkpoint) -> str:
    if checkpoint.status != CheckpointStatus.ready or checkpoint.root_digest is None:
        raise Conflict(f"Checkpoint '{checkpoint.uuid}' is {checkpoint.status} and has no manifest.")
    return checkpoint.root_digest


def index(hub: Hub, project: UUID, part: Cut, *, kind: CheckpointType | None = None) -> schemas.CheckpointPage:
    """The project's, newest first; ties by uuid. Raises NotFound."""
    statement = select(Checkpoint).where(Checkpoint.project_uuid == project)
    if kind is not None:
        statement = statement.where(Checkpoint.type == kind)
    with hub.store.reading() as session:
        rows.get(session, Project, project)
        found = cut(session, statement.order_by(col(Checkpoint.created_at).desc(), col(Checkpoint.uuid)), part)
        return schemas.CheckpointPage(checkpoints=[_wire(row) for row in found.rows], **found.page())


def diff(hub: Hub, base: UUID, target: UUID) -> schemas.Diff:
    """What changed from `base` to `target`, by path. Raises NotFound, Conflict for one that is not ready."""
    old, new = show(hub, base), show(hub, target)
    changes = hub.trees.diff(_root(old), _root(new))
    return diffs.shown(base, target, changes, is_cross_project=old.project_uuid != new.project_uuid)


def _wire(row: Checkpoint) -> schemas.Checkpoint:
    artefact = None
    if row.artefact_kind is not None:
        artefact = schemas.Artefact(kind=ArtefactKind(row.artefact_kind), storage=row.storage or "")
    details = dict(row.details)
    if row.error_message:
        details["error_message"] = row.error_message
    same = {name: getattr(row, name) for name in _SAME}
    return schemas.Checkpoint(
        **same,
        type=CheckpointType(row.type),
        status=CheckpointStatus(row.status),
        proxmox_snapshot_id=row.snapshot,
        artefact=artefact,
        size_mb=round(row.size_bytes / 1e6, 3),
        metadata=details,
    )


_SAME = tuple(
    name
    for name in schemas.Checkpoint.model_fields
    if name in Checkpoint.model_fields and name not in ("type", "status", "metadata")
)
