"""/projects"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from autovibe import schemas
from autovibe.api.deps import ActorHere, CutHere, HubHere, OnceHere
from autovibe.api.guard import Guarded, needs
from autovibe.hub import checkpoints, projects
from autovibe.types import CheckpointType, Name, Role

router = APIRouter(tags=["projects"], route_class=Guarded)


@router.post("/projects", status_code=201)
@needs(Role.operator)
def create(hub: HubHere, actor: ActorHere, once: OnceHere, order: schemas.ProjectOrder) -> schemas.Project:
    """Create a project with its genesis checkpoint, made of the base image."""
    return projects.create(hub, actor, order, once)


@router.get("/projects")
@needs(Role.viewer, narrows=True)
def index(
    hub: HubHere,
    actor: ActorHere,
    part: CutHere,
    active: Annotated[bool | None, Query(description="Only active, or only archived projects.")] = None,
    sort: projects.Sort = "created_at",
    name: Name | None = None,
) -> schemas.ProjectPage:
    """List projects with what they have used today: newest first, the greediest first, or by name."""
    return projects.index(hub, actor, part, is_active=active, sort=sort, name=name)


@router.get("/projects/{project_uuid}")
@needs(Role.viewer, project_uuid="project")
def show(hub: HubHere, project_uuid: UUID) -> schemas.Project:
    """Show a project with its limits and what it has used today (UTC)."""
    return projects.show(hub, project_uuid)


@router.put("/projects/{project_uuid}")
@needs(Role.operator)  # closed to keys for one project: a budget binds who works under it
def update(hub: HubHere, actor: ActorHere, project_uuid: UUID, order: schemas.ProjectUpdate) -> schemas.Project:
    """Change what the body names and leave the rest; the limits of all projects follow at once.

    A project is archived when none of its machines live.
    """
    return projects.update(hub, actor, project_uuid, order)


@router.get("/projects/{project_uuid}/checkpoints")
@needs(Role.viewer, project_uuid="project")
def index_checkpoints(
    hub: HubHere,
    part: CutHere,
    project_uuid: UUID,
    type: Annotated[CheckpointType | None, Query(description="Only checkpoints of this type.")] = None,
) -> schemas.CheckpointPage:
    """List a project's checkpoints, newest first."""
    return checkpoints.index(hub, project_uuid, part, kind=type)
