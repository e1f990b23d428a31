"""Analytics: how much of the work succeeded and what it cost, from machines that have ended and the ledger.

One statement sums machines by day and type; everything else is made of its few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from datetime import date
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import and_, case, or_
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Account, Machine, Project
from autovibe.domain.actor import Actor
from autovibe.domain.budget import LIFE, Scope
from autovibe.hub import Hub, amounts, rules
from autovibe.hub.periods import Window
from autovibe.store import rows
from autovibe.store.days import day_of, seconds_between
from autovibe.types import MICROS, MachineStatus, Resource

FORMULAS = """How much of the work succeeded, what it cost, by machine type and by day; by default of the last 30 days.

An operation is a machine's work, counted on the UTC day the machine ended, with all the money and time of its life:

* successful: the machine was terminated, and its prompt had ended with exit status 0, or it had no prompt
* success_rate = successful operations / operations
* average_cost = money of all operations / operations
* average_cost_per_success = money of all operations, also of failed ones / successful operations
* average_minutes = machine time used / operations that used any
* average_spawn_seconds = seconds from the order until the machine was reachable, over those that were
* cost_per_operation of a day = money of its operations / its operations
* efficiency_score of a day = min(1, success_rate of the day x average_cost of the whole period / cost_per_operation of
  the day); where the day's operations cost nothing it is the success_rate

A quotient with nothing to divide by is null.
"""


class Outcome(NamedTuple):
    """Sums over machines that ended; amounts in millionths."""

    operations: int = 0
    successes: int = 0
    money: int = 0
    time: int = 0
    metered: int = 0  # machines that used any time
    spawn_seconds: float = 0.0
    reachable: int = 0  # machines that were reachable once

    def success_rate(self) -> float | None:
        return round(self.successes / self.operations, 4) if self.operations else None


def efficiency(hub: Hub, actor: Actor, window: Window, project: UUID | None = None) -> schemas.EfficiencyReport:
    """Of all projects, or of one: the actor's own, where its key is for one. Raises NotFound, Forbidden."""
    project = rules.own_project(actor, project)
    with hub.store.reading() as session:
        if project is not None:
            rows.get(session, Project, project)
        found = _outcomes(session, window, project)
    currency = hub.ledger.currency
    overall = _added(outcome for _, _, outcome in found)
    by_type = _grouped(found, lambda key: key[1])
    by_day = _grouped(found, lambda key: key[0])
    return schemas.EfficiencyReport(
        period=window.name,
        since=window.since,
        until=window.until,
        project_uuid=project,
        overall=schemas.OverallEfficiency(
            successful_operations=overall.successes,
            total_operations=overall.operations,
            success_rate=overall.success_rate(),
            total_cost=amounts.money(overall.money, currency),
            average_cost=amounts.each(overall.money, overall.operations, currency),
            average_cost_per_success=amounts.each(overall.money, overall.successes, currency),
        ),
        by_type=[_type(name, by_type[name], currency) for name in sorted(by_type)],
        trends=[_day(day, by_day.get(day, Outcome()), overall, currency) for day in window.days()],
    )


def _outcomes(session: Session, window: Window, project: UUID | None) -> list[tuple[date, str, Outcome]]:
    money, time = aliased(Account), aliased(Account)
    is_success = and_(
        col(Machine.status) == MachineStatus.terminated,
        or_(col(Machine.exit_status) == 0, col(Machine.prompt).is_(None)),
    )
    day = day_of(Machine.ended_at)
    spawning = seconds_between(Machine.spawned_at, Machine.running_at)
    columns: tuple[Any, ...] = (
        day,
        Machine.type,
        func.count(),
        func.sum(case((is_success, 1), else_=0)),
        func.coalesce(func.sum(money.used_micros), 0),
        func.coalesce(func.sum(time.used_micros), 0),
        func.sum(case((col(time.used_micros) > 0, 1), else_=0)),
        func.coalesce(func.sum(spawning), 0.0),
        func.count(col(Machine.running_at)),
    )
    statement: Any = (
        select(*columns)
        .select_from(Machine)
        .outerjoin(money, _life_of(money, Resource.money))
        .outerjoin(time, _life_of(time, Resource.time_hours))
        .where(col(Machine.ended_at) >= window.since, col(Machine.ended_at) < window.until)
        .group_by(day, col(Machine.type))
    )
    if project is not None:
        statement = statement.where(Machine.project_uuid == project)
    return [
        (date.fromisoformat(row[0]), row[1], _outcome(row[2:7], float(row[7]), row[8]))
        for row in session.exec(statement).all()
    ]


def _outcome(sums: Iterable[Any], spawn_seconds: float, reachable: int) -> Outcome:
    operations, successes, money, time, metered = (int(each) for each in sums)  # sums of PostgreSQL are decimals
    return Outcome(operations, successes, money, time, metered, spawn_seconds, reachable)


def _life_of(account: Any, resource: Resource) -> Any:
    return and_(
        account.scope == Scope.machine,
        account.owner_uuid == Machine.uuid,
        account.period == LIFE,
        account.resource == resource,
    )


def _added(outcomes: Iterable[Outcome]) -> Outcome:
    sums: Any = zip(Outcome(), *outcomes, strict=True)
    return Outcome(*map(sum, sums))


Group = TypeVar("Group", bound=Hashable)


def _grouped(
    found: list[tuple[date, str, Outcome]], key: Callable[[tuple[date, str, Outcome]], Group]
) -> dict[Group, Outcome]:
    groups: dict[Group, list[Outcome]] = {}
    for item in found:
        groups.setdefault(key(item), []).append(item[2])
    return {name: _added(outcomes) for name, outcomes in groups.items()}


def _type(name: str, outcome: Outcome, currency: str) -> schemas.TypeEfficiency:
    return schemas.TypeEfficiency(
        type=name,
        successful_operations=outcome.successes,
        total_operations=outcome.operations,
        success_rate=outcome.success_rate(),
        average_cost=amounts.each(outcome.money, outcome.operations, currency),
        average_minutes=round(60 * outcome.time / MICROS / outcome.metered, 3) if outcome.metered else None,
        average_spawn_seconds=round(outcome.spawn_seconds / outcome.reachable, 3) if outcome.reachable else None,
    )


def _day(day: date, outcome: Outcome, overall: Outcome, currency: str) -> schemas.DayEfficiency:
    return schemas.DayEfficiency(
        date=day,
        operations=outcome.operations,
        success_rate=outcome.success_rate(),
        cost_per_operation=amounts.each(outcome.money, outcome.operations, currency),
        efficiency_score=_score(outcome, overall),
    )


def _score(outcome: Outcome, overall: Outcome) -> float | None:
    if not outcome.operations:
        return None
    rate = outcome.successes / outcome.operations
    if not outcome.money:
        return round(rate, 4)
    baseline = overall.money / overall.operations
    return round(min(1.0, rate * baseline / (outcome.money / outcome.operations)), 4)
