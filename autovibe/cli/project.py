"""autovibe project …"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autovibe.cli import amounts, connection, names, output
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas

app = typer.Typer(no_args_is_help=True, help="Projects: what machines work for, with their checkpoints and limits.")

Project = Annotated[str, typer.Argument(metavar="PROJECT", help="Name or uuid (a unique beginning is enough).")]
DailyMoney = Annotated[str | None, typer.Option(metavar="AMOUNT", help="Money a day; none: no limit.")]
DailyHours = Annotated[str | None, typer.Option(metavar="HOURS", help="Machine hours a day; none: no limit.")]
DailyApiCalls = Annotated[str | None, typer.Option(metavar="CALLS", help="Model calls a day; none: no limit.")]
StorageGb = Annotated[str | None, typer.Option(metavar="GB", help="Storage of its checkpoints; none: no limit.")]
MaxMachines = Annotated[str | None, typer.Option(metavar="NUMBER", help="Machines at a time; none: no limit.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits and . _ -; 63 characters at most.")],
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    greediness: Annotated[float | None, typer.Option(min=0, max=1, help="Its share of the pool, 0 to 1.")] = None,
    daily_money: Annotated[float | None, typer.Option(min=0, help="Money a day.")] = None,
    daily_hours: Annotated[float | None, typer.Option(min=0, help="Machine hours a day.")] = None,
    daily_api_calls: Annotated[int | None, typer.Option(min=0, help="Model calls a day.")] = None,
    storage_gb: Annotated[float | None, typer.Option(min=0, help="Storage of its checkpoints.")] = None,
    max_machines: Annotated[int | None, typer.Option(min=0, help="Machines at a time.")] = None,
    json: Json = False,
) -> None:
    """Create a project with its genesis checkpoint, made of the base image.

    A limit that is not given is the project's share of the Hub's pool, by its greediness; without a pool there is none.
    """
    from autovibe.schemas import ResourceBudgets

    limits = {
        "daily_money": None if daily_money is None else {"amount": daily_money},
        "daily_time_hours": daily_hours,
        "daily_api_calls": daily_api_calls,
        "storage_gb": storage_gb,
        "max_concurrent_machines": max_machines,
    }
    given = {limit: value for limit, value in limits.items() if value is not None}
    with connection.client() as client:
        made = client.projects.create(
            name,
            description=description,
            greediness=greediness,
            resource_budgets=ResourceBudgets.model_validate(given) if given else None,
        )
    if json:
        return output.print_json(made)
    facts(made)
    output.say(f"Next: autovibe machine spawn --project {made.name} --prompt 'echo hello'")
    return None


@app.command("list")
def list_(
    active: Annotated[bool | None, typer.Option("--active/--archived", help="Only these.")] = None,
    sort: Annotated[
        Literal["created_at", "greediness", "name"], typer.Option(help="Newest first, greediest first, or by name.")
    ] = "created_at",
    json: Json = False,
) -> None:
    """List projects with what they have used today (UTC)."""
    with connection.client() as client:
        found = list(client.projects.each(active=active, sort=sort))
    if json:
        return output.print_json({"projects": found, "total_count": len(found)})
    output.table(
        ("name", "uuid", "status", "greediness", *_TODAY, "machines", "checkpoints", "created"),
        (_row(item) for item in found),
        empty="There are no such projects."
        if active is not None
        else "There are no projects yet; make one with: autovibe project create NAME",
        right=("greediness", *_TODAY, "machines", "checkpoints"),
    )
    return None


_TODAY = ("money today", "machine time", "API calls")


def _row(project: schemas.Project) -> tuple[object, ...]:
    today = project.resource_usage_today
    return (
        project.name,
        output.short(project.uuid),
        project.status,
        f"{project.greediness:g}",
        amounts.of(amounts.money, today.money),
        amounts.of(amounts.hours, today.time_hours),
        amounts.of(amounts.calls, today.api_calls),
        project.active_machine_count,
        project.checkpoint_count,
        output.ago(project.created_at),
    )


@app.command()
def update(
    project: Project,
    name: Annotated[str | None, typer.Option(help="Its new name.")] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    greediness: Annotated[float | None, typer.Option(min=0, max=1, help="Its share of the pool, 0 to 1.")] = None,
    status: Annotated[
        Literal["active", "archived"] | None, typer.Option(help="Archived: it spawns no machines, and takes no share.")
    ] = None,
    daily_money: DailyMoney = None,
    daily_hours: DailyHours = None,
    daily_api_calls: DailyApiCalls = None,
    storage_gb: StorageGb = None,
    max_machines: MaxMachines = None,
    json: Json = False,
) -> None:
    """Change what is given and leave the rest. 'none' removes a limit."""
    from autovibe.schemas import ResourceBudgets

    limits = amounts.limits(daily_money, daily_hours, daily_api_calls, storage_gb, max_machines)
    if not limits and all(value is None for value in (name, description, greediness, status)):
        raise typer.BadParameter("Name what to change, such as --greediness 0.3; see: autovibe project update --help")
    with connection.client() as client:
        changed = client.projects.update(
            names.project(client, project).uuid,
            name=name,
            description=description,
            greediness=greediness,
            status=status,
            resource_budgets=ResourceBudgets.model_validate(limits) if limits else None,
        )
    return output.print_json(changed) if json else facts(changed)


@app.command()
def show(project: Project, json: Json = False) -> None:
    """Show a project: its limits, and what it has used today (UTC)."""
    with connection.client() as client:
        found = names.project(client, project)
    return output.print_json(found) if json else facts(found)


def facts(project: schemas.Project) -> None:
    """The project, and under it how each resource stands today."""
    limits = project.resource_budgets
    output.facts(
        {
            "name": project.name,
            "uuid": project.uuid,
            "status": project.status,
            "description": project.description,
            "greediness": project.greediness,
            "storage": output.size(project.storage_used_gb * 1e9)
            + ("" if limits.storage_gb is None else f" of {limits.storage_gb:g} GB"),
            "machines": project.active_machine_count
            if limits.max_concurrent_machines is None
            else f"{project.active_machine_count} of {limits.max_concurrent_machines} at a time",
            "checkpoints": project.checkpoint_count,
            "current checkpoint": project.current_checkpoint_uuid,
            "initial checkpoint": project.initial_checkpoint_uuid,
            "created": output.when(project.created_at),
            "updated": output.when(project.updated_at),
        }
    )
    _today(project)


def _today(project: schemas.Project) -> None:
    limits, today = project.resource_limits, project.resource_usage_today
    rows = [
        ("money", *_numbers(amounts.money, limits.money, today.money)),
        ("machine time", *_numbers(amounts.hours, limits.time_hours, today.time_hours)),
        ("API calls", *_numbers(amounts.calls, limits.api_calls, today.api_calls)),
        ("CPU time", None, None, *_numbers(amounts.hours, None, today.cpu_hours)),
    ]
    columns = ("own limit", "share of pool", "limit", "used", "%", "reserved", "remaining")
    output.table(("today (UTC)", *columns), rows, empty="", right=columns)


def _numbers(shown: Callable[[Any], str], limits: Any, standing: Any) -> tuple[str | None, ...]:
    of_limits = () if limits is None else (limits.explicit, limits.share)
    return (
        *(None if limit is None else shown(limit) for limit in of_limits),
        shown(standing.allocated),
        shown(standing.used),
        amounts.part(standing),
        shown(standing.reserved),
        shown(standing.remaining),
    )
