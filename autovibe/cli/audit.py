"""autovibe audit …"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from autovibe.cli import connection, names, output
from autovibe.cli.output import Json

app = typer.Typer(no_args_is_help=True, help="The audit log: every change, and every attempt that was refused.")


@app.command("list")
def list_(
    actor: Annotated[str | None, typer.Option(help="A key's name or id.")] = None,
    verb: Annotated[str | None, typer.Option(help="The beginning of a method and route: 'POST /machines'.")] = None,
    object: Annotated[str | None, typer.Option("--object", help="The uuid of a machine, project, key, …")] = None,
    project: Annotated[str | None, typer.Option(help="A project's name or uuid.")] = None,
    outcome: Annotated[str | None, typer.Option(help="done, failed or refused.")] = None,
    hours: Annotated[float | None, typer.Option(min=0, help="Only the last so many hours.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Lines at most.")] = 50,
    json: Json = False,
) -> None:
    """List the newest lines of the audit log."""
    from uuid import UUID

    from autovibe.errors import InvalidRequest

    try:
        uuid = UUID(object) if object else None
    except ValueError:
        raise InvalidRequest(f"'{output.escape((object or '')[:80])}' is no uuid.") from None
    with connection.client() as client:
        found = client.audit.list(
            actor=actor,
            verb=verb,
            object=uuid,
            project=names.project(client, project).uuid if project else None,
            outcome=outcome,
            since=datetime.now(UTC) - timedelta(hours=hours) if hours is not None else None,
            limit=limit,
        )
    if json:
        return output.print_json(found)
    output.table(
        ("time", "actor", "verb", "object", "outcome", "status", "count", "client", "request"),
        (
            (
                f"{item.created_at:%Y-%m-%d %H:%M:%S}",
                item.actor or item.key_id,
                item.verb,
                f"{item.object_kind} {output.short(item.object_uuid)}" if item.object_uuid else None,
                item.outcome,
                item.status,
                item.count if item.count > 1 else None,
                item.client,
                item.request_id,
            )
            for item in found.entries
        ),
        empty="There are no such lines.",
    )
    return None
