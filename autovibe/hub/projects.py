"""Projects: create (with the genesis checkpoint of the base image), update, show, list.

Whatever changes limits refits the day's accounts of all projects in the same transaction: a share of the pool depends
on the greediness of every active project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import bindparam
from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Checkpoint, Machine, Project
from autovibe.domain.actor import Actor
from autovibe.domain.columns import now
from autovibe.errors import Conflict
from autovibe.hub import Hub, amounts, rules
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.hub.pages import Cut, cut
from autovibe.hypervisor import read
from autovibe.store import rows
from autovibe.store.standings import Standing, standings
from autovibe.store.trees import EMPTY_ROOT
from autovibe.types import ArtefactKind, CheckpointStatus, CheckpointType, MachineStatus, ProjectStatus, Resource

Sort = Literal["created_at", "greediness", "name"]


def create(hub: Hub, actor: Actor, order: schemas.ProjectOrder, once: Once | None = None) -> schemas.Project:
    """A project with its genesis checkpoint: the hub's guest image, as a template, under an empty manifest.

    Raises Conflict for a name that is taken and for an image that is not on the node, HypervisorUnavailable.
    """
    template: list[read.VM] = []  # asked for outside of the transaction, and only when there is something to create

    def decide(session: Session, _attempt: int) -> Accepted:
        _require_free_name(session, order.name)
        if not template:
            raise _ImageWanted
        project, genesis = _rows(hub, order, template[0])
        session.add(project)
        session.flush()
        session.add(genesis)
        session.flush()
        hub.ledger.refit(session)
        rows.record(session, "project.created", project.uuid, project.uuid, actor=actor.name)
        return Accepted(project.uuid)

    try:
        uuid = accept(hub, actor, once, "project", decide)
    except _ImageWanted:
        template.append(_find_template(hub))
        uuid = accept(hub, actor, once, "project", decide)
    return show(hub, uuid)


def _require_free_name(session: Session, name: str) -> None:
    if session.exec(select(Project.uuid).where(Project.name == name)).first() is not None:
        raise Conflict(f"There is already a project '{name}'; choose another name.", details={"field": "name"})


class _ImageWanted(Exception):
    """The order is good so far and needs the image."""


def _find_template(hub: Hub) -> read.VM:
    template = read.find_image(hub.proxmox, hub.image)
    if template is None:
        raise Conflict(
            f"The image '{hub.image}' is not on the node '{hub.node}'; run: autovibe image upload {hub.image}",
            details={"image": hub.image, "node": hub.node},
        )
    return template


def _rows(hub: Hub, order: schemas.ProjectOrder, template: read.VM) -> tuple[Project, Checkpoint]:
    project = Project(
        name=order.name,
        description=order.description,
        greediness=order.greediness,
        **{"currency": hub.ledger.currency} | _limits(order.resource_budgets, hub.ledger.currency),
    )
    genesis = Checkpoint(
        uuid=uuid4(),
        project_uuid=project.uuid,
        type=CheckpointType.genesis,
        description=f"The image '{hub.image}' as it is.",
        status=CheckpointStatus.ready,
        node=hub.node,
        vmid=template.vmid,
        artefact_kind=ArtefactKind.template,
        storage=hub.storage,
        root_digest=EMPTY_ROOT,
        details={"trigger": "project", "image": hub.image, "disk_gb": template.disk_gb or None},
    )
    project.current_checkpoint_uuid = project.initial_checkpoint_uuid = genesis.uuid
    return project, genesis


def _limits(given: schemas.ResourceBudgets, currency: str) -> dict[str, Any]:
    """The columns of the limits that were named; None is no limit. Raises InvalidRequest for another currency."""
    columns = {name: getattr(given, name) for name in sorted(given.model_fields_set)}
    if "daily_money" in columns:
        money = columns.pop("daily_money")
        columns["daily_money_micros"] = None if money is None else money.to_money(currency).micros
        columns["currency"] = currency
    return columns


def update(hub: Hub, actor: Actor, uuid: UUID, order: schemas.ProjectUpdate) -> schemas.Project:
    """Change what the order names. Raises NotFound, Conflict (name taken, archived while machines live)."""
    given = {name: getattr(order, name) for name in sorted(order.model_fields_set)}
    budgets = given.pop("resource_budgets", None)
    if budgets is not None:
        given |= _limits(budgets, hub.ledger.currency)

    def decide(session: Session, _attempt: int) -> Accepted:
        project = locked(session, uuid)
        changes = {name: value for name, value in given.items() if getattr(project, name) != value}
        if "name" in changes:
            _require_free_name(session, changes["name"])
        if changes.get("status") == ProjectStatus.archived:
            _require_no_machines(session, project)
        _change(hub, session, actor, project, "project.updated", changes)
        return Accepted(uuid)

    return show(hub, accept(hub, actor, None, "project", decide))


def set_budget(hub: Hub, actor: Actor, uuid: UUID, budgets: schemas.ResourceBudgets) -> schemas.Project:
    """Set the limits that are named, None removes one. What runs keeps what it has reserved. Raises NotFound."""
    given = _limits(budgets, hub.ledger.currency)

    def decide(session: Session, _attempt: int) -> Accepted:
        project = locked(session, uuid)
        changes = {name: value for name, value in given.items() if getattr(project, name) != value}
        _change(hub, session, actor, project, "budget.updated", changes)
        return Accepted(uuid)

    return show(hub, accept(hub, actor, None, "project", decide))


_PROJECT = (
    select(Project)
    .where(Project.uuid == bindparam("uuid"))
    .with_for_update(key_share=True)
    .execution_options(populate_existing=True)
)


def locked(session: Session, uuid: UUID) -> Project:
    """The project, held until the end of the transaction; rows that only refer to it can still be written. The next
    spawn of it sees this one's machine.

    Raises NotFound.
    """
    found = session.exec(_PROJECT, params={"uuid": uuid}).first()
    return found if found is not None else rows.get(session, Project, uuid)


def _require_no_machines(session: Session, project: Project) -> None:
    statement = select(Machine.name).where(Machine.project_uuid == project.uuid, _LIVES)
    names = list(session.exec(statement.order_by(col(Machine.name)).limit(4)).all())
    if names:
        shown = ", ".join(f"'{name}'" for name in names[:3]) + (" and more" if len(names) > 3 else "")
        raise Conflict(
            f"Project '{project.name}' has machines that live ({shown}); terminate them, then archive it.",
            details={"field": "status"},
        )


def _change(hub: Hub, session: Session, actor: Actor, project: Project, event: str, changes: dict[str, Any]) -> None:
    if not changes:
        return
    for name, value in changes.items():
        setattr(project, name, value)
    project.updated_at = now()
    session.add(project)
    session.flush()
    hub.ledger.refit(session)
    rows.record(session, event, project.uuid, project.uuid, actor=actor.name, changed=sorted(changes))


_LIVES = col(Machine.status).in_([status for status in MachineStatus if not status.is_final])


def show(hub: Hub, uuid: UUID) -> schemas.Project:
    """With its limits and what it has used today. Raises NotFound."""
    with hub.store.reading() as session:
        return _shown(hub, session, [rows.get(session, Project, uuid)])[0]


def index(
    hub: Hub,
    actor: Actor,
    part: Cut,
    *,
    is_active: bool | None = None,
    sort: Sort = "created_at",
    name: str | None = None,
) -> schemas.ProjectPage:
    """Newest first, or the greediest first, or by name; ties by uuid. A key for one project sees that project."""
    statement = select(Project)
    if (own := rules.own_project(actor)) is not None:
        statement = statement.where(Project.uuid == own)
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
        return schemas.ProjectPage(projects=_shown(hub, session, found.rows), **found.page())


def machine_count(session: Session) -> int:
    """How many machines live, of all projects."""
    return session.exec(select(func.count()).select_from(Machine).where(_LIVES)).one()


def machine_counts(session: Session, projects: Sequence[UUID]) -> dict[UUID, int]:
    """How many machines of each project live."""
    statement: Any = select(Machine.project_uuid, func.count()).where(col(Machine.project_uuid).in_(projects), _LIVES)
    return dict(session.exec(statement.group_by(col(Machine.project_uuid))).all())


def _kept(session: Session, projects: Sequence[UUID]) -> dict[UUID, tuple[int, int]]:
    """How many ready checkpoints each project has, and how many bytes are new in them."""
    statement: Any = select(Checkpoint.project_uuid, func.count(), func.sum(Checkpoint.unique_bytes)).where(
        col(Checkpoint.project_uuid).in_(projects), Checkpoint.status == CheckpointStatus.ready
    )
    found = session.exec(statement.group_by(col(Checkpoint.project_uuid))).all()
    return {project: (count, int(size)) for project, count, size in found}


def _shown(hub: Hub, session: Session, projects: Sequence[Project]) -> list[schemas.Project]:
    """A fixed number of statements, however many projects there are."""
    uuids = [project.uuid for project in projects]
    machines, kept = machine_counts(session, uuids), _kept(session, uuids)
    standing = standings(hub.ledger, session, projects)
    return [
        _wire(
            project,
            machines.get(project.uuid, 0),
            kept.get(project.uuid, (0, 0)),
            standing[project.uuid],
            hub.ledger.currency,
        )
        for project in projects
    ]


def _wire(
    project: Project, machines: int, kept: tuple[int, int], standing: Mapping[Resource, Standing], currency: str
) -> schemas.Project:
    return schemas.Project(
        uuid=project.uuid,
        name=project.name,
        description=project.description,
        status=ProjectStatus(project.status),
        greediness=project.greediness,
        current_checkpoint_uuid=project.current_checkpoint_uuid,
        initial_checkpoint_uuid=project.initial_checkpoint_uuid,
        resource_budgets=schemas.ProjectBudgets(
            daily_money=amounts.maybe_money(project.daily_money_micros, project.currency),
            daily_time_hours=project.daily_time_hours,
            daily_api_calls=project.daily_api_calls,
            storage_gb=project.storage_gb,
            max_concurrent_machines=project.max_concurrent_machines,
        ),
        resource_limits=amounts.limits(standing, currency),
        resource_usage_today=amounts.day(standing, currency),
        active_machine_count=machines,
        checkpoint_count=kept[0],
        storage_used_gb=kept[1] / 1e9,
        created_at=project.created_at,
        updated_at=project.updated_at,
    )
