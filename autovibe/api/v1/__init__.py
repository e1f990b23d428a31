"""The v1 API: the Hub's nouns under /api/v1."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI

from autovibe import schemas
from autovibe.api.v1 import checkpoints, health, machines, operations, projects

PREFIX = "/api/v1"
OPEN_PATHS = frozenset({f"{PREFIX}/health"})

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorReply} for status in (400, 401, 404, 409, 500)
}

router = APIRouter()
for _noun in (projects, machines, checkpoints, operations, health):
    router.routes.extend(_noun.router.routes)


def mount(app: FastAPI) -> None:
    """Put every route under the prefix."""
    app.include_router(router, prefix=PREFIX, responses=_ERRORS)
