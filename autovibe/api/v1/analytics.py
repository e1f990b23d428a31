"""/analytics"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from autovibe import schemas
from autovibe.api.deps import ActorHere, HubHere, MonthHere
from autovibe.api.guard import Guarded, needs
from autovibe.hub import analytics
from autovibe.types import Role

router = APIRouter(tags=["analytics"], route_class=Guarded)


@router.get("/analytics/efficiency", description=analytics.FORMULAS)
@needs(Role.viewer, narrows=True)
def efficiency(
    hub: HubHere,
    actor: ActorHere,
    window: MonthHere,
    project_uuid: Annotated[UUID | None, Query(description="Only this project's machines.")] = None,
) -> schemas.EfficiencyReport:
    """How much of the work succeeded, what it cost, by machine type and by day; by default of the last 30 days."""
    return analytics.efficiency(hub, actor, window, project_uuid)
