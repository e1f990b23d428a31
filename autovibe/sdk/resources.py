"""Resources over HTTP: what is used, by whom, and every entry of the ledger behind it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from typing import Any, Literal
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection, canonical, order
from autovibe.types import Resource

Moment = date | datetime | str
"""A UTC day, or a moment that knows its offset; or either as RFC 3339 text."""


class Resources:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def overview(self) -> schemas.ResourceOverview:
        """What all projects together use today (UTC), and who uses most."""
        return self._connection.get(schemas.ResourceOverview, "/resources/overview")

    def project(
        self,
        uuid: UUID | str,
        *,
        period: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
    ) -> schemas.ProjectUsage:
        """What a project used in a period, by UTC day; by default in the last 7 days.

        `since` and `until` instead of `period`: a day as `until` is within.
        """
        path = f"/resources/projects/{canonical(uuid)}"
        given: dict[str, Any] = {"period": period, "from": text_of(since), "to": text_of(until)}
        return self._connection.get(schemas.ProjectUsage, path, **given)

    def set_budget(self, uuid: UUID | str, **limits: Any) -> schemas.Project:
        """Set the limits that are named: `daily_money`, `daily_time_hours`, `daily_api_calls`, `storage_gb`,
        `max_concurrent_machines`. None removes a limit; what is not named stays.
        """
        body = order(schemas.ResourceBudgets, is_whole=True, **limits)
        return self._connection.put(schemas.Project, f"/resources/projects/{canonical(uuid)}/budget", body)

    def ledger(
        self,
        uuid: UUID | str,
        *,
        machine_uuid: UUID | str | None = None,
        day: date | str | None = None,
        kind: Literal["reserve", "charge", "release"] | None = None,
        resource: Resource | str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.LedgerPage:
        """The project's entries, newest first; `charged` is the sum of all charges that match."""
        return self._connection.get(
            schemas.LedgerPage,
            f"/resources/projects/{canonical(uuid)}/ledger",
            machine_uuid=None if machine_uuid is None else canonical(machine_uuid),
            day=None if day is None else str(day),
            kind=kind,
            resource=resource,
            limit=limit,
            offset=offset,
        )

    def each_entry(
        self,
        uuid: UUID | str,
        *,
        machine_uuid: UUID | str | None = None,
        day: date | str | None = None,
        kind: Literal["reserve", "charge", "release"] | None = None,
        resource: Resource | str | None = None,
    ) -> Iterator[schemas.LedgerLine]:
        """Every entry, newest first, page by page; one that comes in meanwhile repeats none."""
        offset: int | None = 0
        last: int | None = None
        while offset is not None:
            page = self.ledger(
                uuid, machine_uuid=machine_uuid, day=day, kind=kind, resource=resource, limit=200, offset=offset
            )
            for entry in page.entries:
                if last is None or entry.id < last:
                    last = entry.id
                    yield entry
            offset = page.next_offset


def text_of(moment: Moment | None) -> str | None:
    """As it stands in a query."""
    return moment.isoformat() if isinstance(moment, date) else moment
