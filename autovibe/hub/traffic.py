"""What the API answers, counted: in memory as it happens, a row a minute and process in the database."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlmodel import Session, col, delete, func, select, update

from autovibe.domain import ApiTraffic
from autovibe.domain.columns import now
from autovibe.store import Store

WINDOW = timedelta(hours=1)
_KEPT = timedelta(hours=25)


@dataclass
class Count:
    """Requests, those the Hub failed at, those that were timed, and the milliseconds these took."""

    requests: int = 0
    failures: int = 0
    timed: int = 0
    total_milliseconds: float = 0.0

    def add(self, other: Count | ApiTraffic) -> None:
        self.requests += other.requests
        self.failures += other.failures
        self.timed += other.timed
        self.total_milliseconds += other.total_milliseconds


class Tally:
    """Counts of one process that are not in the database yet, by minute. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minutes: dict[datetime, Count] = {}

    def note(self, seconds: float | None, is_failure: bool) -> None:
        """One answer; `seconds` is None for a request that asked to be kept waiting."""
        moment = now().replace(second=0, microsecond=0)
        with self._lock:
            count = self._minutes.setdefault(moment, Count())
            count.requests += 1
            count.failures += is_failure
            if seconds is not None:
                count.timed += 1
                count.total_milliseconds += seconds * 1000

    def flush(self, store: Store, hub: str) -> None:
        """Write the counts of this process down, and forget those nobody asks for any more."""
        with self._lock:
            taken, self._minutes = self._minutes, {}
        try:
            with store.transaction() as session:
                for minute, count in taken.items():
                    _add(session, minute, hub, count)
                session.exec(delete(ApiTraffic).where(col(ApiTraffic.minute) < now() - _KEPT))
        except Exception:
            self._take_back(taken)
            raise

    def lately(self, session: Session) -> Count:
        """What all processes answered in the last hour, with what this one has not written down yet."""
        since, total = now() - WINDOW, Count()
        statement = select(
            func.sum(ApiTraffic.requests),
            func.sum(ApiTraffic.failures),
            func.sum(ApiTraffic.timed),
            func.sum(ApiTraffic.total_milliseconds),
        )
        requests, failures, timed, milliseconds = session.exec(statement.where(col(ApiTraffic.minute) > since)).one()
        total.add(Count(int(requests or 0), int(failures or 0), int(timed or 0), float(milliseconds or 0)))
        with self._lock:
            for minute, count in self._minutes.items():
                if minute > since:
                    total.add(count)
        return total

    def _take_back(self, taken: dict[datetime, Count]) -> None:
        with self._lock:
            for minute, count in taken.items():
                self._minutes.setdefault(minute, Count()).add(count)


def _add(session: Session, minute: datetime, hub: str, count: Count) -> None:
    """Only the process of that name writes its rows, so nobody comes between the update and the insert."""
    found = session.exec(
        update(ApiTraffic)
        .where(col(ApiTraffic.minute) == minute, col(ApiTraffic.hub) == hub)
        .values(
            requests=col(ApiTraffic.requests) + count.requests,
            failures=col(ApiTraffic.failures) + count.failures,
            timed=col(ApiTraffic.timed) + count.timed,
            total_milliseconds=col(ApiTraffic.total_milliseconds) + count.total_milliseconds,
        )
        .execution_options(synchronize_session=False)
    )
    if not found.rowcount:
        session.add(ApiTraffic(minute=minute, hub=hub, **vars(count)))
