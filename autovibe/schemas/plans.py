"""What a spawn would do, without doing it."""

from __future__ import annotations

from typing import Any, Literal
from uuid import UUID

from pydantic import Field

from autovibe.schemas.wire import MoneyAmount, Reply


class Figure(Reply):
    """An expected value, and between what it is likely to be."""

    value: float
    low: float
    high: float


class MoneyFigure(Reply):
    value: MoneyAmount
    low: MoneyAmount
    high: MoneyAmount


class Estimate(Reply):
    """What the machine is expected to use; the API's description has the formula."""

    money: MoneyFigure
    time_minutes: Figure
    api_calls: Figure
    cpu_hours: Figure
    basis: Literal["history", "default"]
    n: int = Field(description="The machines of this type that the basis is an average of; 0 for 'default'.")
    complexity: float = Field(description="Of the prompt, from 0 to 1.")


class MoneyRoom(Reply):
    """What the project can still reserve today, and whose limit that is; null: there is none."""

    remaining: MoneyAmount | None
    limited_by: Literal["system", "project"] | None


class Room(Reply):
    remaining: float | None
    limited_by: Literal["system", "project"] | None


class Headroom(Reply):
    money: MoneyRoom
    time_hours: Room
    api_calls: Room


class Held(Reply):
    """What is reserved when it is accepted: the first slice of its work, and the tail its own end is paid with."""

    money: MoneyAmount
    time_minutes: float


class Placement(Reply):
    """`vmid` is the one that is free now; the spawn may get another."""

    node: str
    storage: str
    vmid: int | None


class Clone(Reply):
    """template: linked to a template. linked: linked to a VM's snapshot. full: a copy, which takes longer and more."""

    strategy: Literal["linked", "full", "template"]
    source_vmid: int
    snapshot: str | None = None


class Refusal(Reply):
    """The error that the spawn would be answered or fail with."""

    code: str
    message: str
    details: dict[str, Any] = {}


class SpawnPlan(Reply):
    """`is_possible`: there is no refusal. `clone` is null where the origin or the hypervisor is not there."""

    dry_run: Literal[True] = True
    is_possible: bool
    type: str
    name: str | None
    project_uuid: UUID
    checkpoint_uuid: UUID | None
    estimate: Estimate
    price_per_hour: MoneyAmount
    reserved: Held
    headroom: Headroom
    placement: Placement
    clone: Clone | None
    refusals: list[Refusal]
