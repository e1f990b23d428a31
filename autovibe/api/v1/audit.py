"""/audit"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from autovibe import schemas
from autovibe.api.deps import CutHere, HubHere
from autovibe.api.guard import Guarded, needs
from autovibe.hub import audit
from autovibe.types import Outcome, Role

router = APIRouter(tags=["audit"], route_class=Guarded)

_Words = Query(max_length=120, pattern=r"^[^\x00]*$")


@router.get("/audit")
@needs(Role.admin)
def index(
    hub: HubHere,
    part: CutHere,
    actor: Annotated[str | None, _Words] = None,
    verb: Annotated[str | None, _Words] = None,
    object_uuid: UUID | None = None,
    project_uuid: UUID | None = None,
    outcome: Outcome | None = None,
    since: schemas.Moment | None = None,
    until: schemas.Moment | None = None,
) -> schemas.AuditPage:
    """List changes and refused attempts, newest first.

    `actor` is a key's name or id; `verb` the beginning of a method and route, as in `POST /machines`.
    """
    wanted = audit.Wanted(actor, verb, object_uuid, project_uuid, outcome, since, until)
    return audit.index(hub, part, wanted)
