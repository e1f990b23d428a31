"""Resources on the wire: what is allocated and used, of whom, on which day, and how well it was used.

Money is an object with exact micro-units; hours and CPU hours are numbers; API calls are whole. `null` stands for "no
limit", and for a quotient that has nothing to divide by.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Literal
from uuid import UUID

from pydantic import Field

from autovibe.schemas.wire import MoneyAmount, Page, Reply
from autovibe.types import ProjectStatus, Resource


class MoneyStanding(Reply):
    allocated: MoneyAmount | None = None
    used: MoneyAmount
    reserved: MoneyAmount
    remaining: MoneyAmount | None = None


class HoursStanding(Reply):
    allocated: float | None = None
    used: float = 0.0
    reserved: float = 0.0
    remaining: float | None = None


class CallsStanding(Reply):
    allocated: int | None = None
    used: int = 0
    reserved: int = 0
    remaining: int | None = None


class DayStanding(Reply):
    """A UTC day so far. `reserved` is held by machines that run; `remaining` is what more can be reserved."""

    money: MoneyStanding
    time_hours: HoursStanding
    api_calls: CallsStanding
    cpu_hours: HoursStanding = HoursStanding()


class MoneyLimits(Reply):
    explicit: MoneyAmount | None = None
    share: MoneyAmount | None = None
    effective: MoneyAmount | None = None


class HoursLimits(Reply):
    explicit: float | None = None
    share: float | None = None
    effective: float | None = None


class CallsLimits(Reply):
    explicit: int | None = None
    share: int | None = None
    effective: int | None = None


class ResourceLimits(Reply):
    """A day's limits: the project's own, its share of the pool by greediness, and the lower of both, which holds."""

    money: MoneyLimits
    time_hours: HoursLimits
    api_calls: CallsLimits


class Spent(Reply):
    money: MoneyAmount
    time_hours: float
    api_calls: int
    cpu_hours: float


class UsedPercent(Reply):
    """Percent of today's allocation that is used; `compute` is the CPU of the node at this moment."""

    money: float | None = None
    time: float | None = None
    api_calls: float | None = None
    compute: float | None = None


class Consumer(Spent):
    """A project by what it has used today; `share_percent` is its part of all money used today."""

    project_uuid: UUID
    name: str
    status: ProjectStatus
    greediness: float
    share_percent: float | None
    active_machine_count: int


class ResourceOverview(Reply):
    date: date
    resource_usage_today: DayStanding
    utilization_percent: UsedPercent
    active_machine_count: int
    project_count: int
    active_project_count: int
    top_consumers: list[Consumer]


class DayUsage(Spent):
    """`active_machine_count`: machines that were there at some time of the day."""

    date: date
    active_machine_count: int


class ProjectEfficiency(Reply):
    """Of the period. An operation is a machine's work, counted when the machine has ended."""

    cost_per_checkpoint: MoneyAmount | None
    api_calls_per_operation: float | None
    average_machine_runtime_minutes: float | None
    checkpoint_count: int
    operation_count: int


class ProjectUsage(Reply):
    project_uuid: UUID
    name: str
    period: str | None = Field(description="The name of the period; null where `from` and `to` were given.")
    since: datetime
    until: datetime
    total_usage: Spent
    daily_breakdown: list[DayUsage]
    efficiency: ProjectEfficiency


class LedgerLine(Reply):
    """One entry of the ledger. `amount` is exact, in units of `unit`, `micros` the same in millionths."""

    id: int
    created_at: datetime
    date: date
    kind: Literal["reserve", "charge", "release"]
    resource: Resource
    amount: str
    unit: str
    micros: int
    machine_uuid: UUID | None
    machine_name: str | None
    reservation_uuid: UUID
    note: str


class LedgerPage(Page):
    """`charged`: the sum of all charges that match, not of this page alone."""

    entries: list[LedgerLine]
    charged: Spent
