"""/resources"""

from __future__ import annotations

from typing import Annotated, Literal, cast
from uuid import UUID

from fastapi import APIRouter, Query, Request

from autovibe import schemas
from autovibe.api.deps import ActorHere, CutHere, HubHere, WeekHere
from autovibe.api.guard import Guarded, needs
from autovibe.hub import projects, resources
from autovibe.hub.health import Watchtower
from autovibe.types import Resource, Role

router = APIRouter(tags=["resources"], route_class=Guarded)


@router.get("/resources/overview")
@needs(Role.viewer)
def overview(hub: HubHere, request: Request) -> schemas.ResourceOverview:
    """What all projects together use today (UTC): of the pool, of the node, and who uses most of it."""
    return resources.overview(hub, cast(Watchtower, request.app.state.watchtower))


@router.get("/resources/projects/{project_uuid}")
@needs(Role.viewer, project_uuid="project")
def show(hub: HubHere, project_uuid: UUID, window: WeekHere) -> schemas.ProjectUsage:
    """What a project used in a period, in all and by UTC day, and what it got for it; by default of the last 7 days.

    `cost_per_checkpoint` is the money used divided by the checkpoints that became ready, `api_calls_per_operation` the
    calls made by the machines that ended, `average_machine_runtime_minutes` the machine time used in their lives by the
    machines that ended and used any. A quotient with nothing to divide by is null.
    """
    return resources.project_usage(hub, project_uuid, window)


@router.put("/resources/projects/{project_uuid}/budget")
@needs(Role.operator)  # closed to keys for one project: a budget binds who works under it
def set_budget(hub: HubHere, actor: ActorHere, project_uuid: UUID, budgets: schemas.ResourceBudgets) -> schemas.Project:
    """Set the limits that the body names, from now on; null removes one, what is not named stays.

    What machines have reserved under a higher limit stays theirs.
    """
    return projects.set_budget(hub, actor, project_uuid, budgets)


@router.get("/resources/projects/{project_uuid}/ledger")
@needs(Role.viewer, project_uuid="project")
def ledger(
    hub: HubHere,
    part: CutHere,
    project_uuid: UUID,
    machine_uuid: Annotated[UUID | None, Query(description="Only what concerns this machine.")] = None,
    day: Annotated[schemas.Day | None, Query(description="Only what counts to this UTC day.")] = None,
    kind: Annotated[Literal["reserve", "charge", "release"] | None, Query(description="Only such entries.")] = None,
    resource: Annotated[Resource | None, Query(description="Only of this resource.")] = None,
) -> schemas.LedgerPage:
    """Every entry of the ledger behind a project's amounts, newest first, with the sum of all charges that match."""
    return resources.ledger(hub, project_uuid, part, machine=machine_uuid, day=day, kind=kind, resource=resource)
