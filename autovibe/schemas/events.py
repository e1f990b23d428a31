"""Events on the wire: what changed, as a page of what is kept and as the data of a server-sent event."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from autovibe.schemas.wire import Reply


class Event(Reply):
    """Something changed. In a stream two kinds are the stream's own and are about no object: `reset` (events were
    missed, `body` tells which) and `dropped` (the listener was too slow; it may come back with `Last-Event-ID`)."""

    id: int
    kind: str
    object_uuid: UUID | None
    project_uuid: UUID | None
    body: dict[str, Any]
    created_at: datetime


class MissedEvents(Reply):
    """The ids of events that were asked for and are no longer kept, both included."""

    first_id: int
    last_id: int


class EventPage(Reply):
    """Events by their ids, oldest first. `next` is what to give as `since` to go on; `has_more`: there are some now."""

    events: list[Event]
    next: int
    has_more: bool
    missed: MissedEvents | None = None
