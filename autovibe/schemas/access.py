"""Keys and the audit log on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from autovibe.schemas.wire import Page, Reply, Request
from autovibe.types import KeyStatus, Name, Outcome, Role

Scope = Annotated[str, StringConstraints(pattern=r"^([a-z]{1,20}|\*):(read|write)$")]
"""`machines:write`, `*:read`: the first word of a path, and whether only reading is allowed. Who may write may read."""


class ApiKeyOrder(Request):
    """A machine's own key is not ordered: the Hub makes it when it spawns the machine."""

    name: Name
    role: Literal[Role.admin, Role.operator, Role.viewer] = Role.operator
    project_uuid: UUID | None = Field(default=None, description="Only this project's objects; not for admins.")
    scopes: list[Scope] = Field(
        default=[], max_length=20, description="Only these nouns and verbs, e.g. machines:write; none: all of the role."
    )
    expires_at: AwareDatetime | None = None
    expires_in_days: float | None = Field(default=None, gt=0, le=36_500, allow_inf_nan=False, strict=True)

    @model_validator(mode="after")
    def _has_one_end(self) -> ApiKeyOrder:
        if self.expires_at is not None and self.expires_in_days is not None:
            raise ValueError("A key takes 'expires_at' or 'expires_in_days', not both.")
        if self.role == Role.admin and self.project_uuid is not None:
            raise ValueError("A key for one project is an operator's or a viewer's; an admin's concerns the whole Hub.")
        return self


class ApiKey(Reply):
    """`id` is the part of the key that may be shown; `status` says whether it opens anything."""

    uuid: UUID
    id: str
    name: str
    role: Role
    status: KeyStatus
    project_uuid: UUID | None
    machine_uuid: UUID | None
    scopes: list[str]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class ApiKeyMade(ApiKey):
    """`key` is told this once; a repeat under the same Idempotency-Key answers it as null."""

    key: str | None


class ApiKeyPage(Page):
    keys: list[ApiKey]


class AuditEntry(Reply):
    """One line. `verb` is method and route, `status` that of the answer; `count` such attempts came together."""

    id: int
    actor: str
    key_id: str
    verb: str
    object_kind: str
    object_uuid: UUID | None
    project_uuid: UUID | None
    outcome: Outcome
    status: int
    count: int
    request_id: str
    client: str
    created_at: datetime


class AuditPage(Page):
    entries: list[AuditEntry]
