"""What there is, counted from the rows: the same from every hub process, whichever is asked.

Only what is new since the last time is read of rows that never change any more (operations that have ended, entries of
the ledger); a minute is left for transactions that commit late. The rest are aggregates, kept for five seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlmodel import Session, and_, col, func, or_, select

from autovibe.domain import Account, Checkpoint, LedgerEntry, Machine, Operation, Project
from autovibe.domain.budget import Scope, day_of
from autovibe.domain.columns import now
from autovibe.domain.distribution import LONG, Distribution
from autovibe.domain.machine_type import TYPES
from autovibe.store import Store
from autovibe.types import MICROS, OperationStatus

_KEEP_SECONDS = 5.0
_LATE = timedelta(minutes=1)
_PAGE = 5000

Counts = dict[tuple[str, ...], float]
"""By the values of the labels."""


@dataclass(frozen=True)
class Figures:
    """Amounts in each resource's unit; `allocated` only of accounts that have a limit."""

    machines: Counts  # status, type
    checkpoints: Counts  # type, status
    projects: Counts  # status
    operations: Counts  # kind, status
    oldest_accepted_seconds: float
    used: Counts  # scope, resource
    reserved: Counts
    allocated: Counts
    entries: Counts  # kind
    durations: dict[tuple[str, ...], Distribution]  # kind, status


class Gauges:
    """Asked by several threads, it asks the database once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._figures: Figures | None = None
        self._read_at = 0.0
        self._until = datetime(1970, 1, 1, tzinfo=UTC)
        self._entries: Counts = {}
        self._durations: dict[tuple[str, ...], Distribution] = {}

    def read(self) -> Figures:
        """Raises DatabaseUnavailable."""
        with self._lock:
            if self._figures is None or time.monotonic() - self._read_at > _KEEP_SECONDS:
                with self._store.reading() as session:
                    self._figures = self._ask(session)
                self._read_at = time.monotonic()
            return self._figures

    def _ask(self, session: Session) -> Figures:
        self._settle(session, now() - _LATE)
        entries, durations = self._later_than(session, self._until, None)
        sums = _sums(session)
        return Figures(
            machines=_machines(session),
            checkpoints=_counts(session, Checkpoint.type, Checkpoint.status),
            projects=_counts(session, Project.status),
            operations=_counts(session, Operation.kind, Operation.status),
            oldest_accepted_seconds=_oldest_accepted(session),
            used={key: used for key, (used, _, _) in sums.items()},
            reserved={key: reserved for key, (_, reserved, _) in sums.items()},
            allocated={key: allocated for key, (_, _, allocated) in sums.items() if allocated is not None},
            entries=entries,
            durations=durations,
        )

    def _settle(self, session: Session, until: datetime) -> None:
        if until <= self._until:  # the clock was set back: nothing is counted twice
            return
        self._entries, self._durations = self._later_than(session, self._until, until)
        self._until = until

    def _later_than(
        self, session: Session, after: datetime, until: datetime | None
    ) -> tuple[Counts, dict[tuple[str, ...], Distribution]]:
        """What has been settled, with what came in after that, up to `until`."""
        entries = dict(self._entries)
        statement = select(LedgerEntry.kind, func.count()).where(col(LedgerEntry.created_at) > after)
        if until is not None:
            statement = statement.where(col(LedgerEntry.created_at) <= until)
        for kind, count in session.exec(statement.group_by(LedgerEntry.kind)):
            entries[(kind,)] = entries.get((kind,), 0) + count
        durations = {key: known.copy() for key, known in self._durations.items()}
        columns: list[Any] = [Operation.kind, Operation.status, Operation.created_at, Operation.finished_at]
        ended: Any = select(*columns).where(col(Operation.finished_at) > after)
        if until is not None:
            ended = ended.where(col(Operation.finished_at) <= until)
        for kind, status, began, finished in session.exec(ended.execution_options(yield_per=_PAGE)):
            known = durations.setdefault((kind, status), Distribution(LONG))
            known.note(max(0.0, (finished - began).total_seconds()))
        return entries, durations


def _counts(session: Session, *columns: Any) -> Counts:
    wanted: list[Any] = [*columns, func.count()]
    statement = select(*wanted).group_by(*columns)
    return {tuple(map(str, row[:-1])): row[-1] for row in session.exec(statement)}


def _machines(session: Session) -> Counts:
    """Types that are no longer registered are one, so that labels stay few."""
    found: Counts = {}
    for (status, kind), count in _counts(session, Machine.status, Machine.type).items():
        key = (status, kind if kind in TYPES else "other")
        found[key] = found.get(key, 0) + count
    return found


def _oldest_accepted(session: Session) -> float:
    statement = select(func.min(Operation.created_at)).where(Operation.status == OperationStatus.accepted)
    oldest = session.exec(statement).one()
    return max(0.0, (now() - oldest).total_seconds()) if oldest is not None else 0.0


def _sums(session: Session) -> dict[tuple[str, ...], tuple[float, float, float | None]]:
    """used, reserved, allocated by scope and resource: of pool and projects today, of machines that have not ended."""
    sums = (func.sum(Account.used_micros), func.sum(Account.reserved_micros), func.sum(Account.allocated_micros))
    wanted: list[Any] = [Account.scope, Account.resource, *sums]
    living = and_(col(Account.scope) == Scope.machine, col(Machine.ended_at).is_(None))
    statement: Any = (
        select(*wanted)
        .outerjoin(Machine, col(Machine.uuid) == Account.owner_uuid)
        .where(or_(col(Account.period) == day_of(now()), living))
        .group_by(Account.scope, Account.resource)
    )
    return {(scope, resource): _in_units(row) for scope, resource, *row in session.exec(statement)}


def _in_units(row: Sequence[Any]) -> tuple[float, float, float | None]:
    used, reserved, allocated = (None if value is None else int(value) / MICROS for value in row)
    return used or 0.0, reserved or 0.0, allocated
