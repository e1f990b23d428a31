"""/health: without a key, so it tells how things are and names nothing."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request

from autovibe import schemas
from autovibe.api.deps import HubHere
from autovibe.api.guard import Guarded, open_to_all
from autovibe.api.requests import Traffic
from autovibe.hub import health

router = APIRouter(tags=["health"], route_class=Guarded)


@router.get("/health")
@open_to_all
def show(hub: HubHere, request: Request) -> schemas.Health:
    """Whether the Hub, its database, its Proxmox and its API do their work."""
    traffic = cast(Traffic, request.app.state.traffic)
    watchtower = cast(health.Watchtower, request.app.state.watchtower)
    return health.check(hub, watchtower, traffic.health())
