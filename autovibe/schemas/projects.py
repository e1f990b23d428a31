"""Projects on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from autovibe.schemas.resources import DayStanding, ResourceLimits
from autovibe.schemas.wire import Count, MoneyAmount, MoneyOrder, Page, Reply, Request, Text
from autovibe.types import (
    Name,
    ProjectStatus,
)


class ResourceBudgets(Request):
    """In an update `null` removes a limit, and what is not named stays."""

    daily_money: MoneyOrder | None = None
    daily_time_hours: float | None = Field(default=None, ge=0, le=10**9, allow_inf_nan=False, strict=True)
    daily_api_calls: Count | None = None
    storage_gb: float | None = Field(default=None, ge=0, le=10**9, allow_inf_nan=False, strict=True)
    max_concurrent_machines: Count | None = None


class ProjectOrder(Request):
    name: Name
    description: Text = Field(default="", max_length=10_000)
    greediness: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False, strict=True)
    resource_budgets: ResourceBudgets = ResourceBudgets()


class ProjectUpdate(Request):
    """What is not named stays as it is. An archived project spawns no machines and takes no share of the pool."""

    name: Name | SkipJsonSchema[None] = None
    description: Annotated[Text, Field(max_length=10_000)] | SkipJsonSchema[None] = None
    greediness: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | SkipJsonSchema[None] = None
    status: ProjectStatus | SkipJsonSchema[None] = None
    resource_budgets: ResourceBudgets | SkipJsonSchema[None] = None

    @model_validator(mode="after")
    def _has_values(self) -> ProjectUpdate:
        for name in sorted(self.model_fields_set):
            if getattr(self, name) is None:
                raise ValueError(f"'{name}' cannot be null; leave it out to keep it as it is.")
        return self


class ProjectBudgets(Reply):
    daily_money: MoneyAmount | None = None
    daily_time_hours: float | None = None
    daily_api_calls: int | None = None
    storage_gb: float | None = None
    max_concurrent_machines: int | None = None


class Project(Reply):
    uuid: UUID
    name: str
    description: str
    status: ProjectStatus
    greediness: float
    current_checkpoint_uuid: UUID | None
    initial_checkpoint_uuid: UUID | None
    resource_budgets: ProjectBudgets
    resource_limits: ResourceLimits
    resource_usage_today: DayStanding
    active_machine_count: int
    checkpoint_count: int
    storage_used_gb: float = Field(default=0.0, description="Of files that are new in its checkpoints.")
    created_at: datetime
    updated_at: datetime


class ProjectPage(Page):
    projects: list[Project]
