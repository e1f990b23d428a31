"""Real entries of the ledger, and a pool for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlmodel import col, update

from autovibe.domain import LedgerEntry, Project
from autovibe.store.ledger import Holder, Ledger
from autovibe.types import MICROS, ProjectStatus, Resource
from tests.api.conftest import Served

DAY = timedelta(days=1)


def day(ago: int, hour: int = 12) -> datetime:
    """An hour of the UTC day so many days ago."""
    today = datetime.now(UTC).replace(hour=hour, minute=0, second=0, microsecond=0)
    return today - ago * DAY


@contextmanager
def pool(served: Served, money: float, hours: float, calls: int) -> Iterator[None]:
    """The Hub with a pool, and without other active projects than those made from now on."""
    with served.hub.store.transaction() as session:
        session.exec(update(Project).values(status=ProjectStatus.archived))
    before = served.hub.ledger
    given = {Resource.money: money, Resource.time_hours: hours, Resource.api_calls: calls}
    served.hub.ledger = Ledger({resource: int(limit * MICROS) for resource, limit in given.items()}, "USD")
    try:
        yield
    finally:
        served.hub.ledger = before
        with served.hub.store.transaction() as session:
            before.refit(session)


def reserve(
    served: Served, project: UUID, machine: UUID | None = None, moment: datetime | None = None, **amounts: int
) -> UUID:
    """Hold millionths, named by resource."""
    uuid = uuid4()
    with served.hub.store.transaction() as session:
        wanted = {Resource(name): amount for name, amount in amounts.items()}
        served.hub.ledger.reserve(session, uuid, Holder(project, machine), wanted, moment=moment)
    return uuid


def spend(
    served: Served,
    project: UUID,
    machine: UUID | None = None,
    moment: datetime | None = None,
    note: str = "",
    **amounts: int,
) -> None:
    """Use millionths on the day of `moment`; the entries are then as old as that."""
    uuid = reserve(served, project, machine, moment, **amounts)
    with served.hub.store.transaction() as session:
        used = {Resource(name): amount for name, amount in amounts.items()}
        served.hub.ledger.settle(session, uuid, used, note=note)
    if moment is not None:
        with served.hub.store.transaction() as session:
            dated = update(LedgerEntry).where(col(LedgerEntry.reservation_uuid) == uuid).values(created_at=moment)
            session.exec(dated)
