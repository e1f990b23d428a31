"""/hub: the Hub itself."""

from __future__ import annotations

from typing import Annotated, cast
from uuid import UUID

from fastapi import APIRouter, Query, Request

from autovibe import schemas
from autovibe.api.deps import ActorHere, CutHere, HubHere, OnceHere, Wait, seconds_to_wait, until
from autovibe.api.guard import Guarded, needs
from autovibe.api.requests import Traffic
from autovibe.hub import backups, experiments, instance
from autovibe.hub.health import Watchtower
from autovibe.types import ExperimentStatus, HubCheckpointStatus, HubCheckpointType, Role

router = APIRouter(tags=["hub"], route_class=Guarded)


@router.get("/hub/status")
@needs(Role.viewer)
def status(hub: HubHere, request: Request) -> schemas.HubStatus:
    """How the Hub does: uptime, last checkpoint, what is active, utilization, and what its API answered lately."""
    traffic = cast(Traffic, request.app.state.traffic)
    watchtower = cast(Watchtower, request.app.state.watchtower)
    return instance.status(hub, cast(instance.Gauge, request.app.state.gauge), watchtower, traffic.health())


@router.post("/hub/checkpoint", status_code=201)
@needs(Role.admin, is_heavy=True)
def create_checkpoint(
    hub: HubHere, actor: ActorHere, once: OnceHere, order: schemas.HubCheckpointOrder
) -> schemas.HubCheckpoint:
    """Begin a checkpoint of the Hub: its database, journal, settings and keys, and its own VM where it runs in one."""
    return backups.create(hub, actor, order, once)


@router.get("/hub/checkpoints")
@needs(Role.viewer)
def index_checkpoints(
    hub: HubHere,
    part: CutHere,
    type: Annotated[HubCheckpointType | None, Query(description="Only checkpoints of this type.")] = None,
) -> schemas.HubCheckpointPage:
    """List the checkpoints of the Hub, newest first."""
    return backups.index(hub, part, kind=type)


@router.get("/hub/checkpoints/{hub_checkpoint_uuid}")
@needs(Role.viewer, hub_checkpoint_uuid="hub checkpoint")
async def show_checkpoint(hub: HubHere, hub_checkpoint_uuid: UUID, wait: Wait = None) -> schemas.HubCheckpoint:
    """Show a checkpoint of the Hub; with `wait`, when it is ready or failed, or the seconds have passed."""
    return await until(
        hub,
        [hub_checkpoint_uuid],
        lambda: backups.show(hub, hub_checkpoint_uuid),
        lambda found: found.status is not HubCheckpointStatus.creating,
        seconds_to_wait(wait),
    )


@router.post("/hub/spawn-experimental", status_code=201)
@needs(Role.admin, is_heavy=True)
def spawn_experimental(
    hub: HubHere, actor: ActorHere, once: OnceHere, order: schemas.ExperimentOrder
) -> schemas.Experiment:
    """Plan a second Hub, restored from a checkpoint of this one, with other settings and a share of the budget."""
    return experiments.spawn(hub, actor, order, once)


@router.get("/hub/experiments")
@needs(Role.viewer)
def index_experiments(
    hub: HubHere,
    part: CutHere,
    status: Annotated[ExperimentStatus | None, Query(description="Only experiments of this status.")] = None,
) -> schemas.ExperimentPage:
    """List experiments, newest first."""
    return experiments.index(hub, part, status=status)


@router.get("/hub/experiments/{experiment_uuid}")
@needs(Role.viewer, experiment_uuid="experiment")
async def show_experiment(
    hub: HubHere, experiment_uuid: UUID, wait: Wait = None, wait_for: ExperimentStatus = ExperimentStatus.running
) -> schemas.Experiment:
    """Show an experiment, with its efficiency beside the original's; with `wait`, when it has the status or is over."""
    return await until(
        hub,
        [experiment_uuid],
        lambda: experiments.show(hub, experiment_uuid),
        lambda found: found.status is wait_for or found.status.is_final,
        seconds_to_wait(wait),
    )


@router.post("/hub/experiments/{experiment_uuid}/stop")
@needs(Role.admin, experiment_uuid="experiment")
def stop_experiment(hub: HubHere, experiment_uuid: UUID) -> schemas.Experiment:
    """End an experiment before its time: its machines are terminated and its Hub is stopped, which takes a while."""
    return experiments.stop(hub, experiment_uuid)
