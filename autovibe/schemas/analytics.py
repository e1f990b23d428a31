"""Analytics on the wire; the formulas stand at the route."""

from __future__ import annotations

from datetime import date, datetime
from uuid import UUID

from pydantic import Field

from autovibe.schemas.wire import MoneyAmount, Reply


class OverallEfficiency(Reply):
    successful_operations: int
    total_operations: int
    success_rate: float | None
    total_cost: MoneyAmount
    average_cost: MoneyAmount | None = Field(description="Per operation; the baseline of the daily scores.")
    average_cost_per_success: MoneyAmount | None


class TypeEfficiency(Reply):
    """`average_minutes` is of machine time used, `average_spawn_seconds` from the order until it was reachable."""

    type: str
    successful_operations: int
    total_operations: int
    success_rate: float | None
    average_cost: MoneyAmount | None
    average_minutes: float | None
    average_spawn_seconds: float | None


class DayEfficiency(Reply):
    date: date
    operations: int
    success_rate: float | None
    cost_per_operation: MoneyAmount | None
    efficiency_score: float | None


class EfficiencyReport(Reply):
    period: str | None = Field(description="The name of the period; null where `from` and `to` were given.")
    since: datetime
    until: datetime
    project_uuid: UUID | None
    overall: OverallEfficiency
    by_type: list[TypeEfficiency]
    trends: list[DayEfficiency]
