"""Projects over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection, canonical, order
from autovibe.sdk.waiting import each
from autovibe.types import ProjectStatus

Sort = Literal["created_at", "greediness", "name"]


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
        self,
        *,
        name: str | None = None,
        active: bool | None = None,
        sort: Sort | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.ProjectPage:
        """Projects, newest first; `sort`: the greediest first, or by name. `active`: only these, or only archived."""
        return self._connection.get(
            schemas.ProjectPage,
            "/projects",
            name=name,
            active=None if active is None else str(active).lower(),
            sort=sort,
            limit=limit,
            offset=offset,
        )

    def each(self, *, active: bool | None = None, sort: Sort | None = None) -> Iterator[schemas.Project]:
        """Every project, page by page."""
        return each(
            lambda offset: self.list(active=active, sort=sort, limit=200, offset=offset), lambda page: page.projects
        )

    def update(
        self,
        uuid: UUID | str,
        *,
        name: str | None = None,
        description: str | None = None,
        greediness: float | None = None,
        status: ProjectStatus | str | None = None,
        resource_budgets: schemas.ResourceBudgets | None = None,
    ) -> schemas.Project:
        """Change what is given. In `resource_budgets` a limit that was set to None is removed, one not set stays.

        Raises Conflict for a name that is taken, and for archiving a project whose machines live.
        """
        given = {
            "name": name,
            "description": description,
            "greediness": greediness,
            "status": status,
            "resource_budgets": resource_budgets,
        }
        chosen = {field: value for field, value in given.items() if value is not None}
        body = order(schemas.ProjectUpdate, is_whole=True, **chosen)
        return self._connection.put(schemas.Project, f"/projects/{canonical(uuid)}", body)

    def get(self, uuid: UUID | str) -> schemas.Project:
        return self._connection.get(schemas.Project, f"/projects/{canonical(uuid)}")
