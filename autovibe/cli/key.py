"""autovibe key …"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autovibe.cli import connection, names, output
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas
    from autovibe.sdk import Client

app = typer.Typer(no_args_is_help=True, help="API keys: who may use this Hub, for what and how long.")

Key = Annotated[str, typer.Argument(metavar="KEY", help="Its id, name, or uuid (a unique beginning is enough).")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who will use it: letters, digits and . _ -")],
    role: Annotated[str, typer.Option(help="admin, operator or viewer.")] = "operator",
    project: Annotated[str | None, typer.Option(help="Only this project's objects.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="Only this noun and verb, e.g. machines:write.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="How long it is valid; without it until revoked.")] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the key to this new file (0600) instead of showing it.")
    ] = None,
    json: Json = False,
) -> None:
    """Create an API key and print it, this once: the Hub keeps a hash alone."""
    from autovibe.errors import Conflict
    from autovibe.settings import write_secret

    if output_file is not None and output_file.exists():
        raise Conflict(f"'{output_file}' exists; name a new file.")
    with connection.client() as client:
        made = client.keys.create(
            name,
            role=role,
            project=names.project(client, project).uuid if project else None,
            scopes=scope or (),
            expires_in_days=days,
        )
    if output_file is not None:
        write_secret(output_file, made.key or "")
        made.key = None
    if json:
        return output.print_json(made)
    if output_file is not None:
        output.say(f"The key '{made.name}' ({made.id}) is in {output_file}.")
        return None
    output.say(f"The key '{made.name}' ({made.id}), {made.role}; it is shown this once:")
    typer.echo(made.key)
    return None


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="usable, expired or revoked.")] = None,
    machines: Annotated[bool, typer.Option("--machines", help="Also the keys of machines.")] = False,
    json: Json = False,
) -> None:
    """List API keys."""
    with connection.client() as client:
        found = list(client.keys.each(status=status, machines=machines))
    if json:
        return output.print_json({"keys": found, "total_count": len(found)})
    output.table(
        ("id", "name", "role", "status", "project", "scopes", "last used", "expires"),
        (
            (
                item.id,
                item.name,
                item.role,
                item.status,
                output.short(item.project_uuid),
                " ".join(item.scopes),
                output.ago(item.last_used_at),
                f"{item.expires_at:%Y-%m-%d %H:%M}" if item.expires_at else None,
            )
            for item in found
        ),
        empty="There are no such keys.",
    )
    return None


@app.command()
def show(key: Key, json: Json = False) -> None:
    """Show an API key, without its text."""
    with connection.client() as client:
        found = _find(client, key)
    return output.print_json(found) if json else _facts(found)


@app.command()
def revoke(key: Key, json: Json = False) -> None:
    """End an API key for good; it is refused at once, by other hub processes within five seconds."""
    with connection.client() as client:
        ended = client.keys.revoke(_find(client, key).uuid)
    if json:
        return output.print_json(ended)
    output.say(f"The key '{ended.name}' ({ended.id}) is revoked.")
    return None


def _find(client: Client, word: str) -> schemas.ApiKey:
    """By uuid, else by id, name or the beginning of a uuid. Raises NotFound; InvalidRequest for several."""
    from uuid import UUID

    from autovibe.errors import InvalidRequest, NotFound

    if len(word) in (32, 36):
        try:
            return client.keys.get(UUID(word))
        except ValueError:
            pass  # a name of that length
    every = list(client.keys.each(machines=True))
    matches = [item for item in every if item.id == word] or [item for item in every if item.name == word]
    matches = matches or [item for item in every if str(item.uuid).startswith(word.lower())]
    shown = output.escape(word[:80])
    if not matches:
        raise NotFound(f"There is no key '{shown}'; see: autovibe key list")
    if len(matches) > 1:
        several = ", ".join(f"{item.id} ({item.status})" for item in matches[:10])
        raise InvalidRequest(f"'{shown}' means {len(matches)} keys; give the id of one: {several}.")
    return matches[0]


def _facts(key: schemas.ApiKey) -> None:
    output.facts(
        {
            "id": key.id,
            "uuid": key.uuid,
            "name": key.name,
            "role": key.role,
            "status": key.status,
            "project": key.project_uuid,
            "machine": key.machine_uuid,
            "scopes": " ".join(key.scopes),
            "created": output.when(key.created_at),
            "created by": key.created_by,
            "last used": output.when(key.last_used_at),
            "expires": f"{key.expires_at:%Y-%m-%d %H:%M:%S} UTC" if key.expires_at else None,
            "revoked": output.when(key.revoked_at),
        }
    )
