"""The audit log over HTTP."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection
from autovibe.types import Outcome


class Audit:
    """For admins."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(
        self,
        *,
        actor: str | None = None,
        verb: str | None = None,
        object: UUID | str | None = None,
        project: UUID | str | None = None,
        outcome: Outcome | str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.AuditPage:
        """Changes and refused attempts, newest first. `actor` is a key's name or id, `verb` a beginning of one."""
        return self._connection.get(
            schemas.AuditPage,
            "/audit",
            actor=actor,
            verb=verb,
            object_uuid=object,
            project_uuid=project,
            outcome=outcome,
            since=since.isoformat() if since is not None else None,
            until=until.isoformat() if until is not None else None,
            limit=limit,
            offset=offset,
        )
