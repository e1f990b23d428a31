"""/checkpoints"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from autovibe import schemas
from autovibe.api.deps import ActorHere, HubHere, OnceHere, Wait, WaitFor, large, seconds_to_wait, until
from autovibe.api.guard import Guarded, needs
from autovibe.api.v1.machines import PLANNED, DryRun, awaited
from autovibe.hub import checkpoints, machines, plans
from autovibe.types import CheckpointStatus, Role

router = APIRouter(tags=["checkpoints"], route_class=Guarded)


@router.get("/checkpoints/{checkpoint_uuid}", response_model=schemas.Checkpoint)
@needs(Role.viewer, checkpoint_uuid="checkpoint")
async def show(
    hub: HubHere,
    checkpoint_uuid: UUID,
    include: Annotated[Literal["manifest"] | None, Query(description="manifest: also the files, by pages.")] = None,
    cursor: Annotated[str | None, Query(max_length=8192, description="`manifest_next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = checkpoints.MANIFEST_LIMIT,
    path: Annotated[str | None, Query(max_length=4096, description="Only the manifest at or below this path.")] = None,
    wait: Wait = None,
) -> Any:
    """Show a checkpoint; with `wait`, when it is ready or failed, or the seconds have passed."""
    shown = await until(
        hub,
        [checkpoint_uuid],
        lambda: checkpoints.show(hub, checkpoint_uuid),
        lambda checkpoint: checkpoint.status != CheckpointStatus.creating,
        seconds_to_wait(wait),
    )
    if include is None:
        return shown
    return await run_in_threadpool(
        lambda: large(checkpoints.show_with_manifest(hub, checkpoint_uuid, cursor=cursor, limit=limit, prefix=path))
    )


@router.post("/checkpoints/{checkpoint_uuid}/spawn", status_code=201, response_model=schemas.Machine, responses=PLANNED)
@needs(Role.operator, checkpoint_uuid="checkpoint", is_heavy=True)
async def spawn(
    hub: HubHere,
    actor: ActorHere,
    once: OnceHere,
    checkpoint_uuid: UUID,
    order: schemas.SpawnFromCheckpointOrder,
    dry_run: DryRun = False,
    wait: Wait = None,
    wait_for: WaitFor = None,
) -> Any:
    """Spawn a machine from a checkpoint, in the checkpoint's project."""
    if dry_run:
        return large(await run_in_threadpool(plans.plan_from, hub, actor, checkpoint_uuid, order))
    machine = await run_in_threadpool(machines.spawn_from, hub, actor, checkpoint_uuid, order, once)
    return await awaited(hub, machine, wait, wait_for)


@router.get("/checkpoints/{base_uuid}/diff/{target_uuid}", response_model=schemas.Diff)
@needs(Role.viewer, base_uuid="checkpoint", target_uuid="checkpoint")
def diff(hub: HubHere, base_uuid: UUID, target_uuid: UUID) -> Any:
    """What changed from the base checkpoint to the target, by path."""
    return large(checkpoints.diff(hub, base_uuid, target_uuid))
