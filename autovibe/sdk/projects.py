"""Projects over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection, canonical, order
from autovibe.sdk.waiting import each


class Projects:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        name: str,
        *,
        description: str = "",
        greediness: float | None = None,
        resource_budgets: schemas.ResourceBudgets | None = None,
    ) -> schemas.Project:
        """Create a project with its genesis checkpoint. Raises Conflict when the name is taken."""
        body = order(
            schemas.ProjectOrder,
            name=name,
            description=description,
            greediness=greediness,
            resource_budgets=resource_budgets,
        )
        return self._connection.post(schemas.Project, "/projects", body)

    def list(
        self, *, name: str | None = None, limit: int | None = None, offset: int | None = None
    ) -> schemas.ProjectPage:
        return self._connection.get(schemas.ProjectPage, "/projects", name=name, limit=limit, offset=offset)

    def each(self) -> Iterator[schemas.Project]:
        """Every project, page by page."""
        return each(lambda offset: self.list(limit=200, offset=offset), lambda page: page.projects)

    def get(self, uuid: UUID | str) -> schemas.Project:
        return self._connection.get(schemas.Project, f"/projects/{canonical(uuid)}")
