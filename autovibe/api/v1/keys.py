"""/keys"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from autovibe import schemas
from autovibe.api.deps import ActorHere, CutHere, HubHere, OnceHere
from autovibe.api.guard import Guarded, needs
from autovibe.hub import keys
from autovibe.types import KeyStatus, Role

router = APIRouter(tags=["keys"], route_class=Guarded)


@router.post("/keys", status_code=201)
@needs(Role.admin)
def create(hub: HubHere, actor: ActorHere, once: OnceHere, order: schemas.ApiKeyOrder) -> schemas.ApiKeyMade:
    """Create an API key. The answer is the only place where its text is ever told."""
    return keys.create(hub, actor, order, once)


@router.get("/keys")
@needs(Role.admin)
def index(
    hub: HubHere,
    part: CutHere,
    status: KeyStatus | None = None,
    machines: Annotated[bool, Query(description="Also the keys of machines.")] = False,
) -> schemas.ApiKeyPage:
    """List API keys, newest first, without their text."""
    return keys.index(hub, part, status=status, machines=machines)


@router.get("/keys/{key_uuid}")
@needs(Role.admin, key_uuid="key")
def show(hub: HubHere, key_uuid: UUID) -> schemas.ApiKey:
    """Show an API key without its text."""
    return keys.show(hub, key_uuid)


@router.post("/keys/{key_uuid}/revoke")
@needs(Role.admin, key_uuid="key")
def revoke(hub: HubHere, actor: ActorHere, key_uuid: UUID) -> schemas.ApiKey:
    """End an API key for good. A key that was revoked is answered as it is; the last usable admin key stays (409)."""
    return keys.revoke(hub, actor, key_uuid)
