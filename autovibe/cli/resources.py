"""autovibe resources …"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autovibe.cli import amounts, connection, names, output
from autovibe.cli import project as projects
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autovibe import schemas

app = typer.Typer(no_args_is_help=True, help="Resources: what is used of money, time, API calls and CPU, and by whom.")

Period = Annotated[
    str | None,
    typer.Option(
        help="today, yesterday, last_24_hours, last_7_days, last_30_days, last_90_days or this_month (UTC days)."
    ),
]
Since = Annotated[str | None, typer.Option("--from", metavar="DATE", help="Instead of a period: a UTC date or moment.")]
Until = Annotated[str | None, typer.Option("--to", metavar="DATE", help="The same; a date is within. Default: now.")]

_PAGE = 50


@app.command()
def show(json: Json = False) -> None:
    """Show what all projects use today (UTC), and which use most."""
    with connection.client() as client:
        found = client.resources.overview()
    if json:
        return output.print_json(found)
    today, used = found.resource_usage_today, found.utilization_percent
    output.table(
        (f"{found.date} (UTC)", "pool", "used", "%", "reserved", "remaining"),
        (
            ("money", *_standing(amounts.money, today.money, used.money)),
            ("machine time", *_standing(amounts.hours, today.time_hours, used.time)),
            ("API calls", *_standing(amounts.calls, today.api_calls, used.api_calls)),
            ("CPU time", *_standing(amounts.hours, today.cpu_hours, None)),
        ),
        empty="",
        right=("pool", "used", "%", "reserved", "remaining"),
    )
    output.facts(
        {
            "machines": found.active_machine_count,
            "projects": f"{found.project_count}, {found.active_project_count} of them active",
            "CPU of the node": amounts.percent(used.compute) or "not known: the node does not answer",
        }
    )
    output.table(
        ("top consumers today", "money", "of all", "machine time", "API calls", "CPU time", "machines", "greediness"),
        (
            (
                item.name,
                amounts.money(item.money),
                amounts.percent(item.share_percent),
                amounts.hours(item.time_hours),
                amounts.calls(item.api_calls),
                amounts.hours(item.cpu_hours),
                item.active_machine_count,
                f"{item.greediness:g}",
            )
            for item in found.top_consumers
        ),
        empty="No project has used anything today.",
        right=("money", "of all", "machine time", "API calls", "CPU time", "machines", "greediness"),
    )
    return None


def _standing(shown: Any, standing: Any, percent: float | None) -> tuple[str | None, ...]:
    return (
        shown(standing.allocated),
        shown(standing.used),
        amounts.percent(percent),
        shown(standing.reserved),
        shown(standing.remaining),
    )


@app.command()
def project(
    project: projects.Project, period: Period = None, since: Since = None, until: Until = None, json: Json = False
) -> None:
    """Show what a project used in a period, day by day, and what it got for it; by default of the last 7 days."""
    with connection.client() as client:
        owner = names.project(client, project)
        found = client.resources.project(owner.uuid, period=period, since=since, until=until)
    if json:
        return output.print_json(found)
    total = found.total_usage
    output.table(
        ("day (UTC)", "money", "machine time", "API calls", "CPU time", "machines"),
        [
            *(_used(str(day.date), day, day.active_machine_count) for day in found.daily_breakdown),
            _used("total", total, None),
        ],
        empty="",
        title=f"{found.name}, {amounts.span(found.period, found.since, found.until)}",
        right=("money", "machine time", "API calls", "CPU time", "machines"),
    )
    got = found.efficiency
    runtime, calls = got.average_machine_runtime_minutes, got.api_calls_per_operation
    output.facts(
        {
            "checkpoints made": got.checkpoint_count,
            "money per checkpoint": amounts.money(got.cost_per_checkpoint, missing="-"),
            "machines that ended": got.operation_count,
            "API calls per machine": "-" if calls is None else f"{calls:,.1f}",
            "average time of a machine": "-" if runtime is None else output.duration(60 * runtime),
        }
    )
    return None


def _used(name: str, spent: schemas.Spent, machines: int | None) -> tuple[object, ...]:
    return (
        name,
        amounts.money(spent.money),
        amounts.hours(spent.time_hours),
        amounts.calls(spent.api_calls),
        amounts.hours(spent.cpu_hours),
        "" if machines is None else machines,
    )


@app.command()
def budget(
    project: projects.Project,
    daily_money: projects.DailyMoney = None,
    daily_hours: projects.DailyHours = None,
    daily_api_calls: projects.DailyApiCalls = None,
    storage_gb: projects.StorageGb = None,
    max_machines: projects.MaxMachines = None,
    json: Json = False,
) -> None:
    """Set a project's limits from now on; 'none' removes one, and what is not named stays."""
    limits = amounts.limits(daily_money, daily_hours, daily_api_calls, storage_gb, max_machines)
    if not limits:
        raise typer.BadParameter("Name a limit, such as --daily-money 5; see: autovibe resources budget --help")
    with connection.client() as client:
        changed = client.resources.set_budget(names.project(client, project).uuid, **limits)
    return output.print_json(changed) if json else projects.facts(changed)


@app.command()
def ledger(
    project: projects.Project,
    machine: Annotated[str | None, typer.Option("--machine", "-m", help="Only what concerns this machine.")] = None,
    day: Annotated[str | None, typer.Option(metavar="DATE", help="Only what counts to this UTC day.")] = None,
    kind: Annotated[
        Literal["charge", "reserve", "release", "all"],
        typer.Option(help="What was used; what was held back for it; what was given back; or all of these."),
    ] = "charge",
    resource: Annotated[
        Literal["money", "time_hours", "api_calls", "cpu_hours"] | None, typer.Option(help="Only of this resource.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", "-a", help=f"Every entry, not the newest {_PAGE} alone.")] = False,
    json: Json = False,
) -> None:
    """Show where every cent went: the ledger's entries of a project, newest first, and what they come to."""
    with connection.client() as client:
        owner = names.project(client, project)
        wanted: dict[str, Any] = {
            "machine_uuid": names.machine(client, machine).uuid if machine else None,
            "day": day,
            "kind": None if kind == "all" else kind,
            "resource": resource,
        }
        page = client.resources.ledger(owner.uuid, limit=_PAGE, **wanted)
        entries = list(client.resources.each_entry(owner.uuid, **wanted)) if all_ else page.entries
    if json:
        return output.print_json({"entries": entries, "total_count": page.total_count, "charged": page.charged})
    _print_entries(entries)
    if entries:
        output.out().print(f"Charged in all: {amounts.spent(page.charged)}.", markup=False)
    if len(entries) < page.total_count:
        output.say(f"These are the newest {len(entries)} of {page.total_count:,} entries; see all with --all.")
    return None


def _print_entries(entries: Iterable[schemas.LedgerLine]) -> None:
    output.table(
        ("when (UTC)", "counts to", "machine", "kind", "resource", "amount", "unit", "why"),
        (
            (
                f"{item.created_at:%Y-%m-%d %H:%M:%S}",
                item.date,
                item.machine_name or output.short(item.machine_uuid),
                item.kind,
                amounts.RESOURCES.get(item.resource, item.resource),
                item.amount,
                item.unit,
                item.note,
            )
            for item in entries
        ),
        empty="There are no such entries.",
        right=("amount",),
    )
