"""Analytics over HTTP."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection, canonical
from autovibe.sdk.resources import Moment, text_of


class Analytics:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def efficiency(
        self,
        *,
        period: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        project_uuid: UUID | str | None = None,
    ) -> schemas.EfficiencyReport:
        """How much of the work succeeded and what it cost, by machine type and day; by default of the last 30 days.

        The formulas stand in the description of the route `/analytics/efficiency`.
        """
        given: dict[str, Any] = {"period": period, "from": text_of(since), "to": text_of(until)}
        project = None if project_uuid is None else canonical(project_uuid)
        return self._connection.get(schemas.EfficiencyReport, "/analytics/efficiency", project_uuid=project, **given)
