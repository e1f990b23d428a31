"""What a machine reports of its own use, what is left of its limits, and how a blocked one is resumed."""

from __future__ import annotations

from uuid import UUID

from pydantic import Field, model_validator

from autovibe.schemas.machines import ResourceConstraints
from autovibe.schemas.wire import Count, MoneyAmount, MoneyOrder, Reply, Request, Text


class UsageOrder(Request):
    """At least one of `api_calls` and `money` is more than 0."""

    api_calls: Count = 0
    money: MoneyOrder | None = None
    note: Text = Field(default="", max_length=200, description="What it was used for; kept in the ledger.")

    @model_validator(mode="after")
    def _reports_something(self) -> UsageOrder:
        if not self.api_calls and (self.money is None or not self.money.micros_of()):
            raise ValueError("A report of usage takes 'api_calls' or 'money' above 0.")
        return self


class Charged(Reply):
    api_calls: int
    money: MoneyAmount


class Remaining(Reply):
    """What can still be used or reserved; `null`: there is no limit."""

    money: MoneyAmount | None
    time_minutes: float | None
    api_calls: int | None


class UsageReply(Reply):
    """`machine` counts for the machine's life, `project` for the UTC day, pool and greediness included."""

    machine_uuid: UUID
    charged: Charged
    machine: Remaining
    project: Remaining


class ResumeOrder(Request):
    """Constraints that are given replace the machine's, null takes one away; what is not given stays."""

    resource_constraints: ResourceConstraints | None = None
