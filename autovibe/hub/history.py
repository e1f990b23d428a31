"""The events that are kept, and which of them somebody wants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlmodel import Session, col, delete, func, or_, select

from autovibe import schemas
from autovibe.domain import Event, HubState
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import EVENTS_FORGOTTEN
from autovibe.hub.arrivals import COLUMNS, Arrival, arrivals
from autovibe.store import Store

OUTPUT = "machine.output"
"""Comes several times a second from every machine that works; only who names machines in `kinds` hears it."""


@dataclass(frozen=True)
class Wanted:
    """Which events; None and empty mean all. An operation's events are also about the machine they name.

    `exact` and `prefixes` are two ways to name kinds, of which one must fit: "machine.status", and "machine." for all
    that begin so. Made by `wanted`.
    """

    project: UUID | None = None
    objects: frozenset[UUID] = frozenset()
    exact: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()

    def includes(self, event: Arrival) -> bool:
        if self.project is not None and event.project_uuid != self.project:
            return False
        if self.exact or self.prefixes:
            if event.kind not in self.exact and not event.kind.startswith(self.prefixes):
                return False
        elif event.kind == OUTPUT:
            return False
        if not self.objects or event.object_uuid in self.objects:
            return True
        return (machine := event.machine) is not None and any(machine == str(uuid) for uuid in self.objects)

    def conditions(self) -> list[Any]:
        """The same as SQL."""
        found: list[Any] = []
        if self.project is not None:
            found.append(Event.project_uuid == self.project)
        if self.exact or self.prefixes:
            begins = [col(Event.kind).startswith(prefix, autoescape=True) for prefix in self.prefixes]
            found.append(or_(col(Event.kind).in_(sorted(self.exact)), *begins))
        else:
            found.append(Event.kind != OUTPUT)
        if self.objects:
            named = col(Event.body)["machine_uuid"].as_string()
            found.append(or_(col(Event.object_uuid).in_(self.objects), named.in_([str(uuid) for uuid in self.objects])))
        return found


def wanted(project: UUID | None = None, objects: Iterable[UUID] = (), kinds: Iterable[str] = ()) -> Wanted:
    """`kinds` as clients write them: "machine.status"; "machine" or "machine.*" for all of a noun's."""
    names = [kind.removesuffix("*").removesuffix(".") for kind in kinds]
    nouns = sorted({f"{name}." for name in names})
    return Wanted(project, frozenset(objects), frozenset(names), tuple(nouns))


class Missed(NamedTuple):
    """Ids that were asked for and are not there; `go_on` is the id to go on behind."""

    first: int
    last: int
    go_on: int
    reason: str


def missed(store: Store, since: int) -> Missed | None:
    """What somebody who has heard everything up to `since` cannot hear any more, None when that is nothing."""
    with store.reading() as session:
        newest = session.exec(select(func.max(Event.id))).one() or 0
        state = session.get(HubState, EVENTS_FORGOTTEN)
    forgotten = int(state.value["id"]) if state is not None else 0
    if since > newest:
        reason = f"Event {since} is not known here: the database is another one, or an earlier state of it."
        return Missed(newest + 1, since, newest, reason)
    if since < forgotten:
        return Missed(since + 1, forgotten, forgotten, f"Events up to {forgotten} are no longer kept.")
    return None


def forget(session: Session, before: datetime) -> None:
    """Delete the events that are older, and note up to which id. The newest stays: SQLite would use its id again.

    An id that is missing says nothing: on PostgreSQL a transaction that is rolled back takes its ids along.
    """
    newest = session.exec(select(func.max(Event.id))).one() or 0
    old = (col(Event.created_at) < before, col(Event.id) < newest)
    last = session.exec(select(func.max(Event.id)).where(*old)).one()
    if last is not None:
        session.exec(delete(Event).where(*old))
        session.merge(HubState(key=EVENTS_FORGOTTEN, value={"id": last}, updated_at=now()))


def between(store: Store, which: Wanted, after: int, until: int, limit: int) -> list[Arrival]:
    """The first `limit` events with ids above `after`, up to `until`."""
    statement = select(*COLUMNS).where(  # type: ignore[call-overload]
        col(Event.id) > after, col(Event.id) <= until, *which.conditions()
    )
    with store.reading() as session:
        return arrivals(session, statement.order_by(col(Event.id)).limit(limit))


def newest(store: Store, which: Wanted, until: int, limit: int) -> list[Arrival]:
    """The last `limit` events up to `until`, oldest first."""
    statement = select(*COLUMNS).where(col(Event.id) <= until, *which.conditions())  # type: ignore[call-overload]
    with store.reading() as session:
        return arrivals(session, statement.order_by(col(Event.id).desc()).limit(limit))[::-1]


def page(store: Store, which: Wanted, since: int | None, until: int, limit: int) -> schemas.EventPage:
    """Events behind `since`, or the last ones; `until` is the id up to which all are known."""
    lost, after = None, since
    if since is not None and (gap := missed(store, since)) is not None:
        lost, after = schemas.MissedEvents(first_id=gap.first, last_id=gap.last), gap.go_on
    if after is None:
        found, has_more = newest(store, which, until, limit), False
    else:
        found = between(store, which, after, until, limit + 1)
        has_more = len(found) > limit
        found = found[:limit]
    return schemas.EventPage(
        events=[event.shape() for event in found],
        next=found[-1].id if has_more else max(until, after or 0),
        has_more=has_more,
        missed=lost,
    )


def frame(kind: str, data: str, id: int) -> bytes:
    """A server-sent event."""
    return f"id: {id}\nevent: {kind}\ndata: {data}\n\n".encode()


def frames(events: Sequence[Arrival]) -> bytes:
    return b"".join(frame(event.kind, event.data, event.id) for event in events)
