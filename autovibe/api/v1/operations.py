"""/operations"""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter

from autovibe import schemas
from autovibe.api.deps import HubHere, Wait, seconds_to_wait, until
from autovibe.api.guard import Guarded, needs
from autovibe.hub import operations
from autovibe.types import Role

router = APIRouter(tags=["operations"], route_class=Guarded)


@router.get("/operations/{operation_uuid}")
@needs(Role.viewer, operation_uuid="operation")
async def show(hub: HubHere, operation_uuid: UUID, wait: Wait = None) -> schemas.Operation:
    """Show an operation; with `wait`, when it has ended or the seconds have passed."""
    return await until(
        hub,
        [operation_uuid],
        lambda: operations.show(hub, operation_uuid),
        lambda operation: operation.status.is_final,
        seconds_to_wait(wait),
    )
