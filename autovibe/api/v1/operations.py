"""/operations"""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter

from autovibe import schemas
from autovibe.api.deps import HubHere, Wait, seconds_to_wait, until
from autovibe.hub import operations

router = APIRouter(tags=["operations"])


@router.get("/operations/{operation_uuid}")
async def show(hub: HubHere, operation_uuid: UUID, wait: Wait = None) -> schemas.Operation:
    """Show an operation; with `wait`, when it has ended or the seconds have passed."""
    return await until(
        hub,
        [operation_uuid],
        lambda: operations.show(hub, operation_uuid),
        lambda operation: operation.status.is_final,
        seconds_to_wait(wait),
    )
