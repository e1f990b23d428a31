"""The audit log, read. It is written by store.trail and hub.trail."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlmodel import col, or_, select

from autovibe import schemas
from autovibe.domain import AuditEntry
from autovibe.hub import Hub
from autovibe.hub.pages import Cut, cut
from autovibe.types import Outcome


@dataclass(frozen=True)
class Wanted:
    """Which lines are asked for; `actor` is a key's name or id, `verb` a beginning ("POST /machines")."""

    actor: str | None = None
    verb: str | None = None
    object_uuid: UUID | None = None
    project_uuid: UUID | None = None
    outcome: Outcome | None = None
    since: datetime | None = None
    until: datetime | None = None


def index(hub: Hub, part: Cut, wanted: Wanted) -> schemas.AuditPage:
    """Newest first. `since` is included, `until` is not."""
    statement = select(AuditEntry)
    if wanted.actor is not None:
        statement = statement.where(or_(AuditEntry.actor == wanted.actor, AuditEntry.key_id == wanted.actor))
    if wanted.verb is not None:
        statement = statement.where(col(AuditEntry.verb).startswith(wanted.verb, autoescape=True))
    for name in ("object_uuid", "project_uuid", "outcome"):
        value = getattr(wanted, name)
        if value is not None:
            statement = statement.where(getattr(AuditEntry, name) == value)
    if wanted.since is not None:
        statement = statement.where(col(AuditEntry.created_at) >= wanted.since)
    if wanted.until is not None:
        statement = statement.where(col(AuditEntry.created_at) < wanted.until)
    order = (col(AuditEntry.created_at).desc(), col(AuditEntry.id).desc())
    with hub.store.reading() as session:
        found = cut(session, statement.order_by(*order), part)
        entries = [schemas.AuditEntry.model_validate(row) for row in found.rows]
        return schemas.AuditPage(entries=entries, **found.page())
