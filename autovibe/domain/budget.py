"""Budgets: accounts, what is reserved and used of them, and the arithmetic of limits and prices.

An account is one owner's stock of one resource for one period:

    system    the pool all projects share       a UTC day
    project   what a project may use            a UTC day
    machine   what a machine may use            its life

Every amount is an integer in millionths of the resource's unit: currency, hours, calls, CPU hours, GB (10^9 bytes).
`limit` is what the settings, the project and its greediness give now, None for no limit. Lowering it takes nothing
back: `allocated` is the limit or what is used and reserved, whichever is more, so that at every moment

    used + reserved <= allocated

which the table itself refuses to break. The ledger's entries are only ever added; accounts are their running sums. Each
account is kept whether it has a limit or not, so that a limit set at noon counts what the morning used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import overload
from uuid import UUID

from sqlalchemy import CheckConstraint, Index
from sqlmodel import BigInteger, Field, Integer, SQLModel, UniqueConstraint

from autovibe.domain.columns import UtcDateTime, now
from autovibe.domain.machine import Machine
from autovibe.domain.project import Project
from autovibe.types import MICROS, Resource

Amounts = Mapping[Resource, int]
"""Millionths of each resource's unit; a resource that is not named is 0."""

LIFE = "life"
"""The period of a machine's accounts."""

SYSTEM = UUID(int=0)
"""The owner of the pool's accounts."""

DAILY = (Resource.money, Resource.time_hours, Resource.api_calls)
"""What pool, projects and machines can have limits for."""

MOST_MICROS = 9 * 10**18
"""What a column of the tables holds; nothing is counted beyond it."""

SLICE_SECONDS = 60.0
"""Machine time that is reserved beyond the tail at a time."""

WARNINGS = (75, 80, 90, 100)
"""Percent of a limit at whose use an event `budget.warning` is recorded."""

_SEQUENCE = BigInteger().with_variant(Integer, "sqlite")


class Scope(StrEnum):
    system = "system"
    project = "project"
    machine = "machine"


class Account(SQLModel, table=True):
    """See the module; `warned_percent` is the last of WARNINGS that was told."""

    __tablename__ = "account"
    __table_args__ = (
        CheckConstraint("used_micros >= 0 AND reserved_micros >= 0", name="ck_account_sums"),
        CheckConstraint(
            "allocated_micros IS NULL OR used_micros + reserved_micros <= allocated_micros", name="ck_account_allocated"
        ),
        Index("ix_account_period", "period", "scope", "resource"),
    )

    scope: str = Field(primary_key=True, max_length=10)
    owner_uuid: UUID = Field(primary_key=True)
    period: str = Field(primary_key=True, max_length=10)  # "2026-11-21", or LIFE
    resource: str = Field(primary_key=True, max_length=20)
    limit_micros: int | None = Field(default=None, sa_type=BigInteger)
    allocated_micros: int | None = Field(default=None, sa_type=BigInteger)
    used_micros: int = Field(default=0, sa_type=BigInteger)
    reserved_micros: int = Field(default=0, sa_type=BigInteger)
    warned_percent: int = 0
    updated_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)

    @property
    def headroom_micros(self) -> int | None:
        """What can still be reserved, None for any amount."""
        if self.limit_micros is None:
            return None
        return max(self.limit_micros - self.used_micros - self.reserved_micros, 0)


class Reservation(SQLModel, table=True):
    """What somebody holds of one resource: `reserved` shrinks as it is charged, and is 0 once it is closed.

    Without foreign keys, as accounts and entries: their checks would lock the project's row behind the accounts.
    """

    __tablename__ = "reservation"
    __table_args__ = (CheckConstraint("reserved_micros >= 0 AND used_micros >= 0", name="ck_reservation_sums"),)

    uuid: UUID = Field(primary_key=True)
    resource: str = Field(primary_key=True, max_length=20)
    project_uuid: UUID = Field(index=True)
    machine_uuid: UUID | None = Field(default=None, index=True)
    period: str = Field(max_length=10)
    reserved_micros: int = Field(sa_type=BigInteger)
    used_micros: int = Field(default=0, sa_type=BigInteger)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    closed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class LedgerEntry(SQLModel, table=True):
    """One line of the ledger, never changed. `key` makes a charge that is asked for twice happen once.

    reserve +reserved · charge -reserved +used · release -reserved; a settle is a last charge and a release.
    """

    __tablename__ = "ledger_entry"
    __table_args__ = (
        UniqueConstraint("key", "resource", name="uq_ledger_entry_key"),
        Index("ix_ledger_entry_project_period", "project_uuid", "period"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True, sa_type=_SEQUENCE)
    kind: str = Field(max_length=10)
    reservation_uuid: UUID = Field(index=True)
    project_uuid: UUID
    machine_uuid: UUID | None = Field(default=None, index=True)
    period: str = Field(max_length=10)
    resource: str = Field(max_length=20)
    amount_micros: int = Field(sa_type=BigInteger)
    key: str | None = Field(default=None, max_length=200)
    note: str = Field(default="", max_length=200)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)


def day_of(moment: datetime) -> str:
    """The period of a day's accounts: the UTC date."""
    return moment.astimezone(UTC).date().isoformat()


# Limits


def explicit_limits(project: Project) -> dict[Resource, int]:
    """The project's own daily limits."""
    given = {
        Resource.money: project.daily_money_micros,
        Resource.time_hours: micros_of(project.daily_time_hours),
        Resource.api_calls: micros_of(project.daily_api_calls),
    }
    return {resource: limit for resource, limit in given.items() if limit is not None}


def machine_limits(machine: Machine) -> dict[Resource, int]:
    """What the machine's constraints allow in its life."""
    minutes = machine.max_time_minutes
    given = {
        Resource.money: machine.max_money_micros,
        Resource.time_hours: None if minutes is None else micros_of(minutes / 60),
        Resource.api_calls: micros_of(machine.max_api_calls),
    }
    return {resource: limit for resource, limit in given.items() if limit is not None}


@overload
def micros_of(units: float) -> int: ...
@overload
def micros_of(units: None) -> None: ...
@overload
def micros_of(units: float | None) -> int | None: ...
def micros_of(units: float | None) -> int | None:
    """Units in millionths, rounded down, at most MOST_MICROS; 0.29 is 290000 although 0.29 * 10**6 is a little less."""
    if units is None:
        return None
    return MOST_MICROS if units >= MOST_MICROS / MICROS else int(round(units * MICROS, 3))


def share(greediness: float, total_greediness: float) -> float:
    """The part of the pool a project gets; `total_greediness` is the sum over the active projects, with its own."""
    return greediness / max(1.0, total_greediness)


def effective_limit(explicit: int | None, greediness: float, total_greediness: float, pool: int | None) -> int | None:
    """min(explicit, share x pool); the explicit limit alone without a pool, or with a greediness of 0 (which takes no
    share); None where neither is set.
    """
    if pool is None or (greediness == 0 and explicit is not None):
        return explicit
    of_the_pool = int(round(pool * share(greediness, total_greediness), 3))
    return of_the_pool if explicit is None else min(explicit, of_the_pool)


# Prices


@dataclass(frozen=True)
class Shape:
    """What a VM has, as the hypervisor says."""

    cores: float
    memory_gb: float
    disk_gb: float


@dataclass(frozen=True)
class Prices:
    """Micro-units of the currency an hour; `factors` multiply by the machine type's price class."""

    core: int = 50_000
    memory_gb: int = 10_000
    disk_gb: int = 1_000
    factors: Mapping[str, float] = field(
        default_factory=lambda: {"standard": 1.0, "hub": 1.2, "highmem": 1.5, "compute": 1.3}
    )

    def per_hour(self, shape: Shape, price_class: str = "standard") -> int:
        """Micro-units of the currency for an hour of such a VM."""
        plain = self.core * shape.cores + self.memory_gb * shape.memory_gb + self.disk_gb * shape.disk_gb
        return round(plain * self.factors.get(price_class, 1.0))


def spent(per_hour: int, seconds: float) -> dict[Resource, int]:
    """What a VM of that price uses of time and money in so many seconds; part units are rounded down."""
    microseconds = int(seconds * MICROS)
    return {Resource.time_hours: microseconds // 3600, Resource.money: per_hour * microseconds // (3600 * MICROS)}


def running(per_hour: int, tail_seconds: float) -> dict[Resource, int]:
    """What a machine holds while its VM runs: the tail, with which it is ended in order, and the next slice."""
    return spent(per_hour, tail_seconds + SLICE_SECONDS)
