"""Projects: create (with the genesis checkpoint of the base image), show, list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Checkpoint, Machine, Project
from autovibe.domain.actor import Actor
from autovibe.errors import Conflict
from autovibe.hub import Hub
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.hub.pages import Cut, cut
from autovibe.hypervisor import read
from autovibe.store import rows
from autovibe.store.trees import EMPTY_ROOT
from autovibe.types import ArtefactKind, CheckpointStatus, CheckpointType, MachineStatus, Money, ProjectStatus

Sort = Literal["created_at", "greediness", "name"]


def create(hub: Hub, actor: Actor, order: schemas.ProjectOrder, once: Once | None = None) -> schemas.Project:
    """A project with its genesis checkpoint: the hub's guest image, as a template, under an empty manifest.

    Raises Conflict for a name that is taken and for an image that is not on the node, HypervisorUnavailable.
    """
    template: list[int] = []  # asked for outside of the transaction, and only when there is something to create

    def decide(session: Session, _attempt: int) -> Accepted:
        if session.exec(select(Project.uuid).where(Project.name == order.name)).first() is not None:
            raise Conflict(
                f"There is already a project '{order.name}'; choose another name.", details={"field": "name"}
            )
        if not template:
            raise _ImageWanted
        project, genesis = _rows(hub, order, template[0])
        session.add(project)
        session.flush()
        session.add(genesis)
        rows.record(session, "project.created", project.uuid, project.uuid, actor=actor.name)
        return Accepted(project.uuid)

    try:
        uuid = accept(hub, actor, once, "project", decide)
    except _ImageWanted:
        template.append(_find_template(hub))
        uuid = accept(hub, actor, once, "project", decide)
    return show(hub, uuid)


class _ImageWanted(Exception):
    """The order is good so far and needs the image."""


def _find_template(hub: Hub) -> int:
    template = read.find_image(hub.proxmox, hub.image)
    if template is None:
        raise Conflict(
            f"The image '{hub.image}' is not on the node '{hub.node}'; run: autovibe image upload {hub.image}",
            details={"image": hub.image, "node": hub.node},
        )
    return template.vmid


def _rows(hub: Hub, order: schemas.ProjectOrder, template: int) -> tuple[Project, Checkpoint]:
    budgets = order.resource_budgets
    money = budgets.daily_money.to_money() if budgets.daily_money is not None else None
    project = Project(
        name=order.name,
        description=order.description,
        greediness=order.greediness,
        daily_money_micros=money.micros if money is not None else None,
        currency=money.currency if money is not None else "USD",
        daily_time_hours=budgets.daily_time_hours,
        daily_api_calls=budgets.daily_api_calls,
        storage_gb=budgets.storage_gb,
        max_concurrent_machines=budgets.max_concurrent_machines,
    )
    genesis = Checkpoint(
        uuid=uuid4(),
        project_uuid=project.uuid,
        type=CheckpointType.genesis,
        description=f"The image '{hub.image}' as it is.",
        status=CheckpointStatus.ready,
        node=hub.node,
        vmid=template,
        artefact_kind=ArtefactKind.template,
        storage=hub.storage,
        root_digest=EMPTY_ROOT,
        details={"trigger": "project", "image": hub.image},
    )
    project.current_checkpoint_uuid = project.initial_checkpoint_uuid = genesis.uuid
    return project, genesis


def show(hub: Hub, uuid: UUID) -> schemas.Project:
    """Raises NotFound."""
    with hub.store.reading() as session:
        return _shown(session, [rows.get(session, Project, uuid)])[0]


def index(
    hub: Hub,
    part: Cut,
    *,
    is_active: bool | None = None,
    sort: Sort = "created_at",
    name: str | None = None,
) -> schemas.ProjectPage:
    """Newest first, or the greediest first, or by name; ties by uuid."""
    statement = select(Project)
    if is_active is not None:
        wanted = col(Project.status) == ProjectStatus.active
        statement = statement.where(wanted if is_active else ~wanted)
    if name is not None:
        statement = statement.where(Project.name == name)
    orders: dict[str, Any] = {
        "created_at": col(Project.created_at).desc(),
        "greediness": col(Project.greediness).desc(),
        "name": col(Project.name),
    }
    with hub.store.reading() as session:
        found = cut(session, statement.order_by(orders[sort], col(Project.uuid)), part)
        return schemas.ProjectPage(projects=_shown(session, found.rows), **found.page())


def _shown(session: Session, projects: Sequence[Project]) -> list[schemas.Project]:
    machines = _counts(
        session,
        select(Machine.project_uuid, func.count())
        .where(
            col(Machine.project_uuid).in_([p.uuid for p in projects]),
            col(Machine.status).not_in([MachineStatus.terminated, MachineStatus.failed]),
        )
        .group_by(col(Machine.project_uuid)),
    )
    checkpoints = _counts(
        session,
        select(Checkpoint.project_uuid, func.count())
        .where(
            col(Checkpoint.project_uuid).in_([p.uuid for p in projects]), Checkpoint.status == CheckpointStatus.ready
        )
        .group_by(col(Checkpoint.project_uuid)),
    )
    return [_wire(project, machines.get(project.uuid, 0), checkpoints.get(project.uuid, 0)) for project in projects]


def _counts(session: Session, statement: Any) -> dict[UUID, int]:
    return dict(session.exec(statement).all())


def _wire(project: Project, machines: int, checkpoints: int) -> schemas.Project:
    money = None
    if project.daily_money_micros is not None:
        money = schemas.MoneyAmount.of(Money(project.daily_money_micros, project.currency))
    return schemas.Project(
        uuid=project.uuid,
        name=project.name,
        description=project.description,
        status=ProjectStatus(project.status),
        greediness=project.greediness,
        current_checkpoint_uuid=project.current_checkpoint_uuid,
        initial_checkpoint_uuid=project.initial_checkpoint_uuid,
        resource_budgets=schemas.ProjectBudgets(
            daily_money=money,
            daily_time_hours=project.daily_time_hours,
            daily_api_calls=project.daily_api_calls,
            storage_gb=project.storage_gb,
            max_concurrent_machines=project.max_concurrent_machines,
        ),
        active_machine_count=machines,
        checkpoint_count=checkpoints,
        created_at=project.created_at,
        updated_at=project.updated_at,
    )
