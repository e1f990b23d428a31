"""Storage of a project: what its ready checkpoints brought with them, and what happens above its limit.

    up to 10 % over     told (budget.warning), as the other limits are at 75, 80, 90 and 100 %
    10 to 50 % over     no machine is spawned, no checkpoint made by hand
    above 50 %          its machines are blocked; one that is being ended is let come to its end

Storage is given back by nobody in time, as hours and money are at midnight: the limit is raised, or checkpoints go.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlmodel import Session, col, func, select

from autovibe.domain import Checkpoint, Event, Machine, Project
from autovibe.domain.budget import WARNINGS, Scope
from autovibe.errors import LimitExceeded
from autovibe.hub import Hub
from autovibe.hub.blocking import BLOCKABLE, block
from autovibe.store import rows
from autovibe.types import CheckpointStatus, Resource

REFUSED_ABOVE = 1.1
BLOCKED_ABOVE = 1.5
_GB = 1_000_000_000


def require_room(session: Session, project: Project) -> None:
    """Before a machine is spawned or a checkpoint made by hand. Raises LimitExceeded."""
    if project.storage_gb is None:
        return
    used = _used(session, project.uuid)
    if used > REFUSED_ABOVE * project.storage_gb * _GB:
        raise _exceeded(project, used)


def enforce(hub: Hub) -> None:
    """Tell of projects that near their limit, and block the machines of those far above it."""
    statement: Any = (
        select(Project, func.sum(Checkpoint.unique_bytes))
        .join(Checkpoint, col(Checkpoint.project_uuid) == col(Project.uuid))
        .where(col(Project.storage_gb).is_not(None), Checkpoint.status == CheckpointStatus.ready)
        .group_by(col(Project.uuid))
    )
    with hub.store.reading() as session:
        found = [(project, int(used)) for project, used in session.exec(statement).all()]
    for project, used in found:
        limit = (project.storage_gb or 0.0) * _GB
        if used >= WARNINGS[0] / 100 * limit and used > 0:
            _tell(hub, project, used)
        if used > BLOCKED_ABOVE * limit:
            for machine in _running(hub, project.uuid):
                block(hub, machine, _exceeded(project, used))


def _used(session: Session, project: UUID) -> int:
    statement = select(func.sum(Checkpoint.unique_bytes)).where(
        Checkpoint.project_uuid == project, Checkpoint.status == CheckpointStatus.ready
    )
    return int(session.exec(statement).one() or 0)


def _exceeded(project: Project, used: int) -> LimitExceeded:
    limit = project.storage_gb or 0.0
    return LimitExceeded(
        f"The checkpoints of project '{project.name}' take {used / _GB:.3f} GB, and its limit is {limit:g} GB; raise "
        "the project's 'storage_gb'.",
        details={
            "scope": str(Scope.project),
            "resource": str(Resource.storage_gb),
            "period": "life",
            "limit_micros": round(limit * 1_000_000),
            "used_micros": used // 1000,
        },
    )


def _tell(hub: Hub, project: Project, used: int) -> None:
    """Record an event for the highest mark that is reached, unless that was told of this limit before."""
    limit_micros, used_micros = round((project.storage_gb or 0.0) * 1_000_000), used // 1000
    # The first was reached by the bytes, which may be a little less in whole millionths.
    reached = max((mark for mark in WARNINGS if used_micros * 100 >= mark * limit_micros), default=WARNINGS[0])
    body = {"scope": "project", "resource": "storage_gb", "percent": reached, "limit_micros": limit_micros}
    with hub.store.transaction() as session:
        session.exec(select(Project.uuid).where(Project.uuid == project.uuid).with_for_update()).first()
        told = select(Event.body).where(Event.object_uuid == project.uuid, Event.kind == "budget.warning")
        if not any(body.items() <= before.items() for before in session.exec(told)):
            rows.record(session, "budget.warning", project.uuid, project.uuid, used_micros=used_micros, **body)


def _running(hub: Hub, project: UUID) -> list[UUID]:
    statement = select(Machine.uuid).where(
        Machine.project_uuid == project, col(Machine.status).in_(list(BLOCKABLE)), col(Machine.metered_at).is_not(None)
    )
    with hub.store.reading() as session:
        return list(session.exec(statement))
