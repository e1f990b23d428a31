"""Reads every event once, in spite of commits that come out of order.

On PostgreSQL the order of commits is not the order of ids: an event may become visible after one with a higher id. So
the reader keeps the ids it has not seen below the highest one (gaps) until each has come or never will. Whoever draws
an id holds a lock on the table from before the draw to the end of its transaction, and a commit is visible before its
locks are gone. So a gap is given up when none of those is left who held the lock after it was noticed, and a view that
was taken later still does not show it. `mark` is the id behind which nothing can come in any more.

On SQLite writers take turns, and there are no gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Event
from autovibe.store import Store

_BATCH = 1000
_MOST_GAPS = 10_000  # a sequence that jumped leaves millions of ids that were never drawn

_WRITERS = text(
    "SELECT virtualtransaction FROM pg_locks WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' "
    "AND relation = 'event'::regclass AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class Arrival:
    """An event as it was read; written out once, however many listeners it goes to."""

    def __init__(
        self,
        id: int,
        kind: str,
        object_uuid: UUID,
        project_uuid: UUID | None,
        body: dict[str, Any],
        created_at: datetime,
    ) -> None:
        self.id = id
        self.kind = kind
        self.object_uuid = object_uuid
        self.project_uuid = project_uuid
        self.body = body
        self.created_at = created_at

    @property
    def machine(self) -> str | None:
        """The machine that an event of another object names, as operations do."""
        named = self.body.get("machine_uuid")
        return named if isinstance(named, str) else None

    @cached_property
    def data(self) -> str:
        """JSON of the shape `schemas.Event`, in ASCII: what ends a line for some clients is no newline here."""
        return json.dumps(self.shape().model_dump(mode="json"), separators=(",", ":"))

    def shape(self) -> schemas.Event:
        return schemas.Event.model_validate(self)


COLUMNS = (Event.id, Event.kind, Event.object_uuid, Event.project_uuid, Event.body, Event.created_at)


def arrivals(session: Session, statement: Any) -> list[Arrival]:
    """The events of a statement over `COLUMNS`."""
    return [Arrival(*row) for row in session.exec(statement)]


class Reader:
    """Starts behind the newest event."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._position: int | None = None
        self._gaps: dict[int, frozenset[str] | None] = {}  # id -> who may still fill it; None: just noticed

    @property
    def mark(self) -> int:
        """Every event up to this id has been read, or will never be."""
        return min(self._gaps) - 1 if self._gaps else self._position or 0

    @property
    def seconds_to_wait(self) -> float | None:
        """How soon to read again though nobody tells of news, because of gaps; None when there are none."""
        if not self._gaps:
            return None
        return 0.05 if all(self._gaps.values()) else 0.0

    def read(self) -> list[Arrival]:
        """The events that became visible since the last call; at the first call, those above a gap alone."""
        if self._position is None:
            return self._begin()
        found: list[Arrival] = []
        with self._store.reading() as session:
            while rows := self._after(session, self._position):
                found += rows
                if not self._store.is_sqlite:
                    self._notice(rows, self._position)
                self._position = rows[-1].id
                if len(rows) < _BATCH:
                    break
            if self._gaps:
                found += self._fill(session)
        return found

    def _begin(self) -> list[Arrival]:
        writers = frozenset[str]()
        if not self._store.is_sqlite:
            with self._store.reading() as session:  # in a view before the next one: see the module
                writers = _writers(session)
        with self._store.reading() as session:
            newest = session.exec(select(func.max(Event.id))).one() or 0
            first = max(newest - _BATCH, 0)
            rows = self._after(session, first) if writers else []
        self._position = newest
        self._notice(rows, first)
        self._gaps = dict.fromkeys(self._gaps, writers)
        return [row for row in rows if row.id > self.mark]

    @staticmethod
    def _after(session: Session, position: int) -> list[Arrival]:
        statement = select(*COLUMNS).where(col(Event.id) > position)  # type: ignore[call-overload]
        return arrivals(session, statement.order_by(col(Event.id)).limit(_BATCH))

    def _notice(self, rows: Iterable[Arrival], position: int) -> None:
        for row in rows:
            self._gaps.update(dict.fromkeys(range(max(position + 1, row.id - _MOST_GAPS), row.id)))
            position = row.id

    def _fill(self, session: Session) -> list[Arrival]:
        statement = select(*COLUMNS).where(col(Event.id).in_(list(self._gaps)))  # type: ignore[call-overload]
        found = arrivals(session, statement.order_by(col(Event.id)))
        for event in found:
            del self._gaps[event.id]
        left = {id: writers for id, writers in self._gaps.items() if writers is None or writers}
        if left:
            active = _writers(session)
            left = {id: active if writers is None else writers & active for id, writers in left.items()}
        self._gaps = left
        return found


def _writers(session: Session) -> frozenset[str]:
    """The transactions that may have drawn ids of events and are not over."""
    return frozenset(session.execute(_WRITERS).scalars())
