"""Resources: what all projects use today, what one used in a period, and every entry of the ledger behind that.

Days that lie wholly in a period are read from their accounts, which are the running sums of the ledger; of days cut by
its ends the charges themselves are summed. Both count an entry to the day its reservation was made for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import case
from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Account, Checkpoint, LedgerEntry, Machine, Project
from autovibe.domain.budget import LIFE, Scope
from autovibe.domain.columns import now
from autovibe.errors import NotFound
from autovibe.hub import Hub, amounts
from autovibe.hub.health import Watchtower
from autovibe.hub.pages import Cut, cut
from autovibe.hub.periods import Window, midnight
from autovibe.hub.projects import machine_count, machine_counts
from autovibe.store import rows
from autovibe.store.days import day_of
from autovibe.store.standings import Standing, of_all
from autovibe.types import MICROS, CheckpointStatus, CheckpointType, Money, ProjectStatus, Resource

TOP = 10
_UNITS = {
    Resource.time_hours: "hours",
    Resource.api_calls: "calls",
    Resource.cpu_hours: "CPU hours",
    Resource.storage_gb: "GB",
}

Sums = dict[Resource, int]


def overview(hub: Hub, watchtower: Watchtower) -> schemas.ResourceOverview:
    """How the Hub stands today; the share of the node's CPU is null while the node does not answer."""
    watchtower.look(hub)
    node = watchtower.node
    cpu = node.cpu if node is not None else None
    with hub.store.reading() as session:
        today = of_all(hub.ledger, session)
        counted: Any = select(func.count(), func.sum(case((col(Project.status) == ProjectStatus.active, 1), else_=0)))
        projects, active = session.exec(counted.select_from(Project)).one()
        return schemas.ResourceOverview(
            date=now().date(),
            resource_usage_today=amounts.day(today, hub.ledger.currency),
            utilization_percent=_utilization(today, cpu),
            active_machine_count=machine_count(session),
            project_count=projects,
            active_project_count=active or 0,
            top_consumers=_top_consumers(hub, session, today),
        )


def _utilization(today: Mapping[Resource, Standing], cpu: float | None) -> schemas.UsedPercent:
    used = {resource: amounts.percent(each.used, each.allocated) for resource, each in today.items()}
    return schemas.UsedPercent(
        money=used[Resource.money],
        time=used[Resource.time_hours],
        api_calls=used[Resource.api_calls],
        compute=None if cpu is None else round(100 * cpu, 2),
    )


def _top_consumers(hub: Hub, session: Session, today: Mapping[Resource, Standing]) -> list[schemas.Consumer]:
    """Those that used most money today, then most time, then most calls."""
    sums = {resource: _sum_of(Account, col(Account.used_micros), resource) for resource in today}
    statement: Any = (
        select(Account.owner_uuid, *sums.values())
        .where(Account.scope == Scope.project, Account.period == now().date().isoformat())
        .group_by(col(Account.owner_uuid))
        .having(func.sum(Account.used_micros) > 0)
        .order_by(
            *(sums[resource].desc() for resource in (Resource.money, Resource.time_hours, Resource.api_calls)),
            col(Account.owner_uuid),
        )
        .limit(TOP)
    )
    found = {row[0]: dict(zip(sums, map(int, row[1:]), strict=True)) for row in session.exec(statement).all()}
    projects = {row.uuid: row for row in session.exec(select(Project).where(col(Project.uuid).in_(found))).all()}
    machines = machine_counts(session, list(found))
    return [
        schemas.Consumer(
            **dict(amounts.spent(used, hub.ledger.currency)),
            project_uuid=uuid,
            name=projects[uuid].name,
            status=ProjectStatus(projects[uuid].status),
            greediness=projects[uuid].greediness,
            share_percent=amounts.percent(used[Resource.money], today[Resource.money].used),
            active_machine_count=machines.get(uuid, 0),
        )
        for uuid, used in found.items()
    ]


def _sum_of(table: type[Account] | type[LedgerEntry], amount: Any, resource: Resource) -> Any:
    return func.coalesce(func.sum(case((col(table.resource) == resource, amount), else_=0)), 0)


# One project in a period


def project_usage(hub: Hub, uuid: UUID, window: Window) -> schemas.ProjectUsage:
    """What the project used, in all and a day, and what it got for it. Raises NotFound."""
    currency = hub.ledger.currency
    with hub.store.reading() as session:
        project = rows.get(session, Project, uuid)
        days = window.days()
        used = _used_by_day(session, uuid, window, days)
        alive = _machines_by_day(session, uuid, window, days)
        total: Sums = {
            resource: sum(each.get(resource, 0) for each in used.values())
            for resource in (Resource.money, Resource.time_hours, Resource.api_calls, Resource.cpu_hours)
        }
        return schemas.ProjectUsage(
            project_uuid=uuid,
            name=project.name,
            period=window.name,
            since=window.since,
            until=window.until,
            total_usage=amounts.spent(total, currency),
            daily_breakdown=[
                schemas.DayUsage(
                    **dict(amounts.spent(used.get(day, {}), currency)), date=day, active_machine_count=alive[day]
                )
                for day in days
            ],
            efficiency=_efficiency(session, uuid, window, total, currency),
        )


def _used_by_day(session: Session, project: UUID, window: Window, days: Sequence[date]) -> dict[date, Sums]:
    whole = [day for day in days if window.holds_all_of(day)]
    found: dict[date, Sums] = {}
    if whole:
        statement: Any = select(Account.period, Account.resource, Account.used_micros).where(
            Account.scope == Scope.project,
            Account.owner_uuid == project,
            Account.period >= whole[0].isoformat(),
            Account.period <= whole[-1].isoformat(),
        )
        _add(found, session.exec(statement).all())
    if cut_days := [day.isoformat() for day in days if day not in whole]:
        statement = (
            select(LedgerEntry.period, LedgerEntry.resource, func.sum(LedgerEntry.amount_micros))
            .where(
                LedgerEntry.project_uuid == project,
                LedgerEntry.kind == "charge",
                col(LedgerEntry.period).in_(cut_days),
                LedgerEntry.created_at >= window.since,
                LedgerEntry.created_at < window.until,
            )
            .group_by(col(LedgerEntry.period), col(LedgerEntry.resource))
        )
        _add(found, session.exec(statement).all())
    return found


def _add(found: dict[date, Sums], given: Sequence[tuple[str, str, Any]]) -> None:
    for period, resource, micros in given:
        found.setdefault(date.fromisoformat(period), {})[Resource(resource)] = int(micros)


def _machines_by_day(session: Session, project: UUID, window: Window, days: Sequence[date]) -> dict[date, int]:
    """How many machines were there at some time of each day: all spawned until its end less those gone before it."""
    spawned = _counted_by_day(session, project, col(Machine.spawned_at), window, days)
    ended = _counted_by_day(session, project, col(Machine.ended_at), window, days)
    alive: dict[date, int] = {}
    here = spawned[None] - ended[None]
    for day in days:
        alive[day] = here + spawned.get(day, 0)
        here = alive[day] - ended.get(day, 0)
    return alive


def _counted_by_day(
    session: Session, project: UUID, moment: Any, window: Window, days: Sequence[date]
) -> dict[date | None, int]:
    """Machines by the day of `moment`; those before the first of the days under None."""
    first, end = midnight(days[0]), min(midnight(days[-1]) + timedelta(days=1), window.until)
    of_project = Machine.project_uuid == project
    before = select(func.count()).select_from(Machine).where(of_project, moment < first)
    within: Any = select(day_of(moment), func.count()).where(of_project, moment >= first, moment < end)
    found: dict[date | None, int] = {None: session.exec(before).one()}
    for day, count in session.exec(within.group_by(day_of(moment))).all():
        found[date.fromisoformat(day)] = count
    return found


def _efficiency(
    session: Session, project: UUID, window: Window, total: Sums, currency: str
) -> schemas.ProjectEfficiency:
    made = select(func.count()).where(
        Checkpoint.project_uuid == project,
        Checkpoint.status == CheckpointStatus.ready,
        Checkpoint.type != CheckpointType.genesis,
        Checkpoint.created_at >= window.since,
        Checkpoint.created_at < window.until,
    )
    ended = (
        Machine.project_uuid == project,
        col(Machine.ended_at) >= window.since,
        col(Machine.ended_at) < window.until,
    )
    metered: Any = (
        select(func.count(), func.coalesce(func.sum(Account.used_micros), 0))
        .join(Machine, col(Machine.uuid) == col(Account.owner_uuid))
        .where(
            Account.scope == Scope.machine,
            Account.period == LIFE,
            Account.resource == Resource.time_hours,
            Account.used_micros > 0,
            *ended,
        )
    )
    checkpoints = session.exec(made.select_from(Checkpoint)).one()
    operations = session.exec(select(func.count()).select_from(Machine).where(*ended)).one()
    ran, time_micros = session.exec(metered).one()
    return schemas.ProjectEfficiency(
        cost_per_checkpoint=amounts.each(total[Resource.money], checkpoints, currency),
        api_calls_per_operation=round(total[Resource.api_calls] / MICROS / operations, 3) if operations else None,
        average_machine_runtime_minutes=round(60 * int(time_micros) / MICROS / ran, 3) if ran else None,
        checkpoint_count=checkpoints,
        operation_count=operations,
    )


# The ledger


def ledger(
    hub: Hub,
    uuid: UUID,
    part: Cut,
    *,
    machine: UUID | None = None,
    day: date | None = None,
    kind: str | None = None,
    resource: Resource | None = None,
) -> schemas.LedgerPage:
    """The project's entries, the last day and the last entry first, with the sum of its charges. Raises NotFound."""
    # A machine's entries are its project's, so its index finds them alone.
    owner: Any = LedgerEntry.project_uuid == uuid if machine is None else LedgerEntry.machine_uuid == machine
    conditions = [owner]
    if day is not None:
        conditions.append(LedgerEntry.period == day.isoformat())
    if resource is not None:
        conditions.append(LedgerEntry.resource == resource)
    charged: Any = (
        select(LedgerEntry.resource, func.sum(LedgerEntry.amount_micros))
        .where(*conditions, LedgerEntry.kind == "charge")
        .group_by(col(LedgerEntry.resource))
    )
    if kind is not None:
        conditions.append(LedgerEntry.kind == kind)
    listed = select(LedgerEntry).where(*conditions).order_by(col(LedgerEntry.period).desc(), col(LedgerEntry.id).desc())
    with hub.store.reading() as session:
        rows.get(session, Project, uuid)
        if machine is not None:
            _require_of(session, uuid, machine)
        found = cut(session, listed, part)
        sums = {Resource(resource): int(micros) for resource, micros in session.exec(charged).all()}
        named: Any = select(Machine.uuid, Machine.name).where(
            col(Machine.uuid).in_({row.machine_uuid for row in found.rows})
        )
        names: dict[UUID, str] = dict(session.exec(named).all())
        return schemas.LedgerPage(
            entries=[_line(row, names, hub.ledger.currency) for row in found.rows],
            charged=amounts.spent(sums, hub.ledger.currency),
            **found.page(),
        )


def _require_of(session: Session, project: UUID, machine: UUID) -> None:
    if rows.get(session, Machine, machine).project_uuid != project:
        raise NotFound(
            f"Project '{project}' has no machine '{machine}'.", details={"object": "machine", "uuid": str(machine)}
        )


def _line(row: LedgerEntry, names: Mapping[UUID, str], currency: str) -> schemas.LedgerLine:
    resource = Resource(row.resource)
    return schemas.LedgerLine.model_validate(
        {
            **{name: getattr(row, name) for name in ("id", "created_at", "kind", "machine_uuid", "reservation_uuid")},
            "date": row.period,
            "resource": resource,
            "amount": Money(row.amount_micros).amount,
            "unit": currency if resource is Resource.money else _UNITS[resource],
            "micros": row.amount_micros,
            "machine_name": names.get(row.machine_uuid) if row.machine_uuid is not None else None,
            "note": row.note,
        }
    )
