"""/projects"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from autovibe import schemas
from autovibe.api.deps import ActorHere, CutHere, HubHere, OnceHere
from autovibe.hub import checkpoints, projects
from autovibe.types import CheckpointType, Name

router = APIRouter(tags=["projects"])


@router.post("/projects", status_code=201)
def create(hub: HubHere, actor: ActorHere, once: OnceHere, order: schemas.ProjectOrder) -> schemas.Project:
    """Create a project with its genesis checkpoint, made of the base image."""
    return projects.create(hub, actor, order, once)


@router.get("/projects")
def index(
    hub: HubHere,
    part: CutHere,
    active: Annotated[bool | None, Query(description="Only active, or only archived projects.")] = None,
    sort: projects.Sort = "created_at",
    name: Name | None = None,
) -> schemas.ProjectPage:
    """List projects."""
    return projects.index(hub, part, is_active=active, sort=sort, name=name)


@router.get("/projects/{project_uuid}")
def show(hub: HubHere, project_uuid: UUID) -> schemas.Project:
    """Show a project."""
    return projects.show(hub, project_uuid)


@router.get("/projects/{project_uuid}/checkpoints")
def index_checkpoints(
    hub: HubHere,
    part: CutHere,
    project_uuid: UUID,
    type: Annotated[CheckpointType | None, Query(description="Only checkpoints of this type.")] = None,
) -> schemas.CheckpointPage:
    """List a project's checkpoints, newest first."""
    return checkpoints.index(hub, project_uuid, part, kind=type)
