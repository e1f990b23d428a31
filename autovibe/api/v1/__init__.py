"""The v1 API: the Hub's nouns under /api/v1."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI

from autovibe.api import document
from autovibe.api.guard import Guarded
from autovibe.api.v1 import (
    analytics,
    audit,
    checkpoints,
    events,
    health,
    hub,
    keys,
    machines,
    operations,
    projects,
    resources,
)

PREFIX = "/api/v1"
OPEN_PATHS = frozenset({f"{PREFIX}/health"})
UNLIMITED_PATHS = frozenset({f"{PREFIX}/events"})
"""Need a key and take nothing of its rate limit: one request that goes on for hours."""

router = APIRouter()
for _noun in (projects, machines, checkpoints, resources, analytics, hub, operations, events, keys, audit, health):
    router.routes.extend(_noun.router.routes)

ROUTES = [route for route in router.routes if isinstance(route, Guarded)]
if len(ROUTES) != len(router.routes):
    raise TypeError("A v1 route has no guard: make its router by APIRouter(route_class=Guarded).")


def mount(app: FastAPI) -> None:
    """Put every route under the prefix, and give the application its document."""
    app.include_router(router, prefix=PREFIX, generate_unique_id_function=document.operation_id)
    app.openapi = lambda: document.describe(app, OPEN_PATHS, UNLIMITED_PATHS)  # type: ignore[method-assign]
