"""Checkpoints of the Hub: create, list, the daily one, and which are kept. `recovery` puts one back.

    daily            the newest `hub_checkpoints_kept` (7)
    manual           the newest 10
    pre_experiment   those of experiments that are not over, and the newest 3
    recovery         the newest 3, made before a restore

The newest one of all that can be restored is never deleted, and each is deleted by a process of the home it lies in.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

from sqlmodel import Session, col, select

from autovibe import schemas
from autovibe.domain import Experiment, HubCheckpoint, Operation
from autovibe.domain.actor import Actor
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import place_of
from autovibe.errors import AutovibeError, Conflict, NotFound, NotYet
from autovibe.hub import Hub
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.hub.pages import Cut, cut
from autovibe.store import copies, rows
from autovibe.types import (
    ExperimentStatus,
    HubCheckpointKind,
    HubCheckpointStatus,
    HubCheckpointType,
    OperationKind,
)
from autovibe.workflows import hub_checkpoint, steps_of

logger = logging.getLogger(__name__)

KEPT = {HubCheckpointType.manual: 10, HubCheckpointType.pre_experiment: 3, HubCheckpointType.recovery: 3}
FIRST_DAILY_AFTER = timedelta(hours=1)
"""Of uptime: a Hub that is started and ended for a moment makes none."""
_RETRY_AFTER = timedelta(hours=1)  # a daily one that failed
_FAILED_KEPT = timedelta(days=7)
_BYTES_A_SECOND = 20e6
_UPKEEP = Actor("upkeep")


def create(
    hub: Hub, actor: Actor, order: schemas.HubCheckpointOrder, once: Once | None = None, *, day: str | None = None
) -> schemas.HubCheckpoint:
    """Accept a checkpoint of the Hub; a workflow makes it.

    Raises InsufficientSpace, and ConfigurationError when pg_dump is missing or too old, before anything is recorded.
    """
    hub_checkpoint.require_space(hub.store, hub.premises)
    if not hub.store.is_sqlite:
        copies.find_program(hub.store, "pg_dump")
    size = copies.size_of(hub.store)

    def decide(session: Session, _attempt: int) -> Accepted:
        if day is not None:
            _clear_day(session, day)
        row = HubCheckpoint(
            uuid=uuid4(), type=order.type, reason=order.reason, description=order.description, day=day, created_at=now()
        )
        row.estimated_completion_at = row.created_at + _expected(session, size)
        row.operation_uuid = uuid4()
        session.add(row)
        left_out = () if hub.premises.vmid is not None else hub_checkpoint.SNAPSHOT_STEPS
        steps = [name for name in steps_of(OperationKind.hub_checkpoint) if name not in left_out]
        operation = Operation(
            uuid=row.operation_uuid,
            kind=OperationKind.hub_checkpoint,
            object_uuid=row.uuid,
            steps=steps,
            actor=actor.name,
            order=order.model_dump(mode="json"),
        )
        session.add(operation)
        rows.record(session, "hub_checkpoint.status", row.uuid, status=row.status)
        return Accepted(row.uuid, operation)

    return show(hub, accept(hub, actor, once, "hub checkpoint", decide))


def _expected(session: Session, size_bytes: int) -> timedelta:
    """How long it will take: as the last one did, by size; else by a guess."""
    ready = select(HubCheckpoint).where(HubCheckpoint.status == HubCheckpointStatus.ready)
    last = session.exec(ready.order_by(col(HubCheckpoint.created_at).desc()).limit(1)).first()
    if last is None or last.completed_at is None or not last.size_bytes:
        return timedelta(seconds=3 + size_bytes / _BYTES_A_SECOND)
    took = (last.completed_at - last.created_at).total_seconds()
    return timedelta(seconds=max(1.0, took * size_bytes / last.size_bytes))


class _DayIsTaken(Conflict):
    """The checkpoint of this day is made already."""


def _clear_day(session: Session, day: str) -> None:
    """Raises _DayIsTaken; frees the day of a checkpoint that failed a while ago."""
    row = session.exec(select(HubCheckpoint).where(HubCheckpoint.day == day)).first()
    if row is None:
        return
    if row.status != HubCheckpointStatus.failed or row.created_at > now() - _RETRY_AFTER:
        raise _DayIsTaken
    row.day = None
    session.add(row)
    session.flush()


def create_daily(hub: Hub) -> None:
    """Once a UTC day and Hub, however many processes look. Raises what `create` raises."""
    if not hub.is_checkpointed_daily or now() - hub.started_at < FIRST_DAILY_AFTER:
        return
    day = now().date().isoformat()
    with hub.store.reading() as session:
        row = session.exec(select(HubCheckpoint).where(HubCheckpoint.day == day)).first()
    if row is not None and row.status != HubCheckpointStatus.failed:
        return
    order = schemas.HubCheckpointOrder(type=HubCheckpointType.daily, reason=f"The day {day}.")
    try:
        create(hub, _UPKEEP, order, day=day)
    except _DayIsTaken:
        logger.debug("Another process makes the checkpoint of %s.", day)


def show(hub: Hub, uuid: UUID) -> schemas.HubCheckpoint:
    """Raises NotFound."""
    with hub.store.reading() as session:
        return wire(rows.get(session, HubCheckpoint, uuid))


def index(hub: Hub, part: Cut, *, kind: HubCheckpointType | None = None) -> schemas.HubCheckpointPage:
    """Newest first."""
    statement = select(HubCheckpoint)
    if kind is not None:
        statement = statement.where(HubCheckpoint.type == kind)
    with hub.store.reading() as session:
        found = cut(session, statement.order_by(col(HubCheckpoint.created_at).desc(), col(HubCheckpoint.uuid)), part)
        return schemas.HubCheckpointPage(checkpoints=[wire(row) for row in found.rows], **found.page())


def usable(session: Session, uuid: UUID | None) -> HubCheckpoint:
    """That one, or the newest that is ready. Raises NotFound, Conflict for one that is not ready."""
    if uuid is not None:
        row = rows.get(session, HubCheckpoint, uuid)
        if row.status != HubCheckpointStatus.ready:
            raise Conflict(f"Checkpoint '{uuid}' of the Hub is {row.status}; only a ready one can be used.")
        return row
    ready = select(HubCheckpoint).where(HubCheckpoint.status == HubCheckpointStatus.ready)
    newest = session.exec(ready.order_by(col(HubCheckpoint.created_at).desc()).limit(1)).first()
    if newest is None:
        raise NotFound("The Hub has no checkpoint of itself yet; make one with: autovibe hub checkpoint")
    return newest


def prune(hub: Hub) -> None:
    """Delete what is not kept of the checkpoints in this home, files first, and what was left half made."""
    place = place_of(hub.name)
    with hub.store.reading() as session:
        everything = session.exec(select(HubCheckpoint).order_by(col(HubCheckpoint.created_at).desc())).all()
        living = select(Experiment.checkpoint_uuid).where(
            col(Experiment.status).in_([ExperimentStatus.planned, ExperimentStatus.running])
        )
        needed = set(session.exec(living))
        referred = set(session.exec(select(Experiment.checkpoint_uuid)))
    _sweep(hub, {str(row.uuid): row for row in everything})
    doomed = [row for row in unkept(everything, needed, hub.hub_checkpoints_kept) if row.place in (place, "")]
    for row in doomed:
        try:
            hub_checkpoint.forget_snapshot(hub.workflows.world, row)
        except AutovibeError as error:  # one whose VM's snapshot cannot go now does not keep the others
            level = logging.INFO if isinstance(error, NotYet) else logging.WARNING
            logger.log(level, "The checkpoint %s of the Hub is deleted later: %s", row.uuid, error)
            continue
        if row.path:
            shutil.rmtree(Path(row.path), ignore_errors=True)
        hub_checkpoint.drop_partials(hub.premises, row.uuid)
        with hub.store.transaction() as session:
            found = session.get(HubCheckpoint, row.uuid)
            if found is None:
                continue
            if row.uuid in referred:  # an experiment that is over still names it
                found.status, found.error_message, found.path = HubCheckpointStatus.failed, "It was deleted.", ""
                session.add(found)
            else:
                session.delete(found)
        logger.info("The %s checkpoint %s of the Hub is deleted: newer ones are kept.", row.type, row.uuid)


def _sweep(hub: Hub, rows_by_uuid: dict[str, HubCheckpoint]) -> None:
    """Delete what this home holds of checkpoints that failed: another process may have undone what this one began."""
    if not hub.premises.checkpoints.exists():
        return
    for path in hub.premises.checkpoints.iterdir():
        row = rows_by_uuid.get(path.name.partition(".")[0])
        is_partial = path.name.endswith(".partial")
        if row is not None and (
            row.status == HubCheckpointStatus.failed or (is_partial and row.status == HubCheckpointStatus.ready)
        ):
            shutil.rmtree(path, ignore_errors=True)


def unkept(newest_first: Sequence[HubCheckpoint], needed: set[UUID], daily_kept: int) -> list[HubCheckpoint]:
    """Which of them go, by the rules of this module."""
    kept_of = {**KEPT, HubCheckpointType.daily: daily_kept}
    ready = [row for row in newest_first if row.status == HubCheckpointStatus.ready]
    kept = {row.uuid for row in ready[:1]} | needed
    for kind, count in kept_of.items():
        kept |= {row.uuid for row in [row for row in ready if row.type == kind][:count]}
    old = now() - _FAILED_KEPT
    failed = [row for row in newest_first if row.status == HubCheckpointStatus.failed and row.created_at < old]
    return [row for row in ready if row.uuid not in kept] + [row for row in failed if row.uuid not in needed]


def wire(row: HubCheckpoint) -> schemas.HubCheckpoint:
    same = {
        name: getattr(row, name) for name in schemas.HubCheckpoint.model_fields if name in HubCheckpoint.model_fields
    }
    return schemas.HubCheckpoint(
        **{
            **same,
            "type": HubCheckpointType(row.type),
            "kind": HubCheckpointKind(row.kind),
            "status": HubCheckpointStatus(row.status),
        },
        size_mb=round(row.size_bytes / 1e6, 3),
        proxmox_snapshot_id=row.snapshot,
    )
