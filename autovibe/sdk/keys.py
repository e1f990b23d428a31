"""API keys over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection, canonical, order
from autovibe.sdk.waiting import each
from autovibe.types import KeyStatus, Role


class Keys:
    """For admins. Named by uuid; `id` is the part of a key that may be shown."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        name: str,
        *,
        role: Role | str | None = None,
        project: UUID | str | None = None,
        scopes: Sequence[str] = (),
        expires_at: datetime | None = None,
        expires_in_days: float | None = None,
    ) -> schemas.ApiKeyMade:
        """A new key; its `key` is told this once. It is an operator's unless `role` says otherwise.

        When the answer was lost on the way (Unavailable), the key may be there: revoke it and make another.
        """
        body = order(
            schemas.ApiKeyOrder,
            name=name,
            role=role,
            project_uuid=project,
            scopes=list(scopes) or None,
            expires_at=expires_at,
            expires_in_days=expires_in_days,
        )
        return self._connection.post(schemas.ApiKeyMade, "/keys", body, is_repeatable=False)

    def list(
        self,
        *,
        status: KeyStatus | str | None = None,
        machines: bool = False,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.ApiKeyPage:
        """Newest first; with `machines` also those of machines."""
        return self._connection.get(
            schemas.ApiKeyPage, "/keys", status=status, machines=machines or None, limit=limit, offset=offset
        )

    def each(self, *, status: KeyStatus | str | None = None, machines: bool = False) -> Iterator[schemas.ApiKey]:
        """Every key, page by page."""
        return each(
            lambda offset: self.list(status=status, machines=machines, limit=200, offset=offset),
            lambda page: page.keys,
        )

    def get(self, uuid: UUID | str) -> schemas.ApiKey:
        return self._connection.get(schemas.ApiKey, f"/keys/{canonical(uuid)}")

    def revoke(self, uuid: UUID | str) -> schemas.ApiKey:
        """End a key for good. Raises Conflict for the last usable admin key."""
        return self._connection.post(schemas.ApiKey, f"/keys/{canonical(uuid)}/revoke", schemas.Request())
