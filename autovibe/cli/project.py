"""autovibe project …"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autovibe.cli import connection, names, output
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas

app = typer.Typer(no_args_is_help=True, help="Projects: what machines work for, with their checkpoints and limits.")

Project = Annotated[str, typer.Argument(metavar="PROJECT", help="Name or uuid (a unique beginning is enough).")]


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

    Its limits are recorded and not enforced yet.
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
    _facts(made)
    output.say(f"Next: autovibe machine spawn --project {made.name} --prompt 'echo hello'")
    return None


@app.command("list")
def list_(json: Json = False) -> None:
    """List projects."""
    with connection.client() as client:
        found = list(client.projects.each())
    if json:
        return output.print_json({"projects": found, "total_count": len(found)})
    output.table(
        ("name", "uuid", "status", "machines", "checkpoints", "current", "created"),
        (
            (
                item.name,
                output.short(item.uuid),
                item.status,
                item.active_machine_count,
                item.checkpoint_count,
                output.short(item.current_checkpoint_uuid),
                output.ago(item.created_at),
            )
            for item in found
        ),
        empty="There are no projects yet; make one with: autovibe project create NAME",
    )
    return None


@app.command()
def show(project: Project, json: Json = False) -> None:
    """Show a project."""
    with connection.client() as client:
        found = names.project(client, project)
    return output.print_json(found) if json else _facts(found)


def _facts(project: schemas.Project) -> None:
    limits = project.resource_budgets.model_dump(mode="json", exclude_none=True)
    money = limits.pop("daily_money", None)
    output.facts(
        {
            "name": project.name,
            "uuid": project.uuid,
            "status": project.status,
            "description": project.description,
            "greediness": project.greediness,
            "daily money": f"{money['amount']} {money['currency']}" if money else None,
            **{name.replace("_", " "): value for name, value in limits.items()},
            "machines": project.active_machine_count,
            "checkpoints": project.checkpoint_count,
            "current checkpoint": project.current_checkpoint_uuid,
            "initial checkpoint": project.initial_checkpoint_uuid,
            "created": output.when(project.created_at),
        }
    )
