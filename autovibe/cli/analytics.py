"""autovibe analytics: how much of the work succeeded, and what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autovibe.cli import amounts, connection, names, output
from autovibe.cli.output import Json
from autovibe.cli.resources import Period, Since, Until

if TYPE_CHECKING:
    from autovibe import schemas


def analytics(
    period: Period = None,
    since: Since = None,
    until: Until = None,
    project: Annotated[str | None, typer.Option("--project", "-p", help="Only this project's machines.")] = None,
    json: Json = False,
) -> None:
    """Show how much of the work succeeded and what it cost, by machine type and day; by default of the last 30 days."""
    with connection.client() as client:
        owner = names.project(client, project) if project else None
        found = client.analytics.efficiency(
            period=period, since=since, until=until, project_uuid=owner.uuid if owner else None
        )
    if json:
        return output.print_json(found)
    if not found.overall.total_operations:
        return output.say("No machine has ended in that time.")
    _print_overall(found, owner)
    _print_types(found)
    _print_days(found)
    return None


def _print_overall(found: schemas.EfficiencyReport, owner: schemas.Project | None) -> None:
    overall = found.overall
    output.facts(
        {
            "period": amounts.span(found.period, found.since, found.until),
            "project": owner.name if owner else "all",
            "machines that ended": overall.total_operations,
            "with success": f"{overall.successful_operations} ({amounts.share(overall.success_rate)})",
            "money": amounts.money(overall.total_cost),
            "money per machine": amounts.money(overall.average_cost, missing="-"),
            "money per success": amounts.money(overall.average_cost_per_success, missing="-"),
        }
    )


def _print_types(found: schemas.EfficiencyReport) -> None:
    columns = ("machines", "success", "money each", "time each", "spawn")
    output.table(
        ("type", *columns),
        (
            (
                item.type,
                item.total_operations,
                amounts.share(item.success_rate),
                amounts.money(item.average_cost, missing="-"),
                None if item.average_minutes is None else output.duration(60 * item.average_minutes),
                None if item.average_spawn_seconds is None else output.duration(item.average_spawn_seconds),
            )
            for item in found.by_type
        ),
        empty="",
        right=columns,
    )


def _print_days(found: schemas.EfficiencyReport) -> None:
    columns = ("machines", "success", "money each", "score")
    output.table(
        ("day (UTC)", *columns),
        (
            (
                item.date,
                item.operations,
                amounts.share(item.success_rate),
                amounts.money(item.cost_per_operation, missing="-"),
                None if item.efficiency_score is None else f"{item.efficiency_score:.2f}",
            )
            for item in found.trends
            if item.operations
        ),
        empty="",
        right=columns,
    )
