"""What openapi.json says beyond what the routes' signatures do: names, keys, headers, and which errors a route has."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from autovibe import schemas

ERRORS = {
    400: "The request is malformed; `details.fields` says where.",
    401: "There is no key, or it is not one of this Hub.",
    403: "The key's role, project or scopes do not allow this.",
    404: "There is no such object.",
    409: "A limit would be exceeded (`RESOURCE_LIMIT_EXCEEDED`), or the object's state or a name stands against it.",
    429: "The key has used up its requests of this minute.",
    500: "The Hub, its database or its Proxmox failed; `HYPERVISOR_UNAVAILABLE` and its like pass by themselves.",
}

_CONFLICTING_READS = frozenset({"machines_ssh", "checkpoints_diff", "checkpoints_show"})
_NAMING_BODIES = frozenset(
    {"machines_spawn", "hub_spawn_experimental", "keys_create", "analytics_efficiency", "resources_ledger"}
)
"""Routes that name an object in their body or query."""

_NUMBER = {"schema": {"type": "string", "pattern": "^[0-9]+$"}}
_RATE_HEADERS = {
    "X-RateLimit-Limit": {"description": "Requests a minute.", **_NUMBER},
    "X-RateLimit-Remaining": {"description": "What is left of them.", **_NUMBER},
    "X-RateLimit-Reset": {"description": "When the next minute begins, in seconds since 1970.", **_NUMBER},
}
_REQUEST_ID = {"X-Request-Id": {"description": "The request's own, or a new one.", "schema": {"type": "string"}}}
_RETRY = {"Retry-After": {"description": "Seconds after which another try is worth it.", **_NUMBER}}

_EXAMPLE_PROJECT = "3f2b8f0e-6f7e-4d0a-9a63-0d1f3a3c9f10"
EXAMPLES: dict[str, Any] = {
    "ProjectOrder": {
        "name": "refactoring",
        "greediness": 0.42,
        "description": "The parser, bit by bit.",
        "resource_budgets": {"daily_money": 3, "daily_time_hours": 8, "max_concurrent_machines": 4},
    },
    "MachineOrder": {
        "type": "shell",
        "project_uuid": _EXAMPLE_PROJECT,
        "prompt": "make test",
        "file_modifications": {"/workspace/.env": "MODE=test\n", "/workspace/old.txt": None},
        "resource_constraints": {"max_money": 1.5, "max_time_minutes": 60},
    },
    "CheckpointOrder": {"context": "TICKET-1", "description": "Before the change.", "label": "before"},
    "TerminateOrder": {"reason": "It has done its work.", "create_checkpoint": True},
    "ExecOrder": {"argv": ["git", "status", "--short"], "timeout_seconds": 30},
    "UsageOrder": {"api_calls": 3, "money": "0.042"},
    "HubCheckpointOrder": {"type": "manual", "reason": "Before the upgrade."},
    "ErrorReply": {
        "success": False,
        "error": {
            "code": "NOT_FOUND",
            "message": f"There is no project '{_EXAMPLE_PROJECT}'.",
            "details": {"object": "project", "uuid": _EXAMPLE_PROJECT},
            "request_id": "5f1c1d9c0a6b4a0f8c8b6f0d3a2e1b7c",
            "timestamp": "2026-11-21T12:00:00Z",
        },
    },
}


def operation_id(route: APIRoute) -> str:
    """noun_verb, such as machines_spawn: stable as long as the route's tag and function are."""
    return f"{route.tags[0]}_{route.name}"


def describe(app: FastAPI, open_paths: frozenset[str], unlimited_paths: frozenset[str]) -> dict[str, Any]:
    """The OpenAPI document of `app`; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
        made["security"] = [{"bearer": []}]
        parts = made["components"]
        parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer", "description": "An API key."}}
        parts["schemas"]["ErrorReply"] = schemas.ErrorReply.model_json_schema(
            ref_template="#/components/schemas/{model}"
        )
        body = parts["schemas"]["ErrorReply"].pop("$defs")["ErrorBody"]
        parts["schemas"]["ErrorBody"] = body
        for name in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(name, None)
        for name, example in EXAMPLES.items():
            parts["schemas"][name]["examples"] = [example]
        for path, operations in made["paths"].items():
            for method, operation in operations.items():
                is_open = path in open_paths
                _complete(
                    operation, method, "{" in path, is_open, is_limited=not is_open and path not in unlimited_paths
                )
        app.openapi_schema = made
    return app.openapi_schema


def _complete(operation: dict[str, Any], method: str, has_object: bool, is_open: bool, *, is_limited: bool) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    operation["summary"] = re.split(r"[.;:]", operation["description"].strip().partition("\n")[0])[0]
    if is_open:
        operation["security"] = []
    limits = _RATE_HEADERS if is_limited else {}
    for answer in answers.values():
        answer["headers"] = _REQUEST_ID | limits
    name = operation["operationId"]
    statuses = {500} if is_open else {401, 403, 429, 500}
    if operation.get("parameters") or "requestBody" in operation:
        statuses.add(400)
    if has_object or name in _NAMING_BODIES:
        statuses.add(404)
    if method != "get" or name in _CONFLICTING_READS:
        statuses.add(409)
    for status in sorted(statuses):
        more = _RETRY if status in (429, 500) else {}
        answers[str(status)] = {
            "description": ERRORS[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}},
            "headers": _REQUEST_ID | more,
        }


_ABOUT = """Machines in which agents work, their projects and budgets, checkpoints of both, and the Hub itself.

Every request carries `Authorization: Bearer <key>` (`/health` needs none); every answer, an `X-Request-Id`. Lists are
cut by `limit` (1-200) and `offset`; they tell `total_count`, `has_more` and `next_offset`. A POST with an
`Idempotency-Key` may be repeated: it answers the first one's object. Money is exact, in millionths of the Hub's
currency. Errors have one form, `ErrorReply`."""
