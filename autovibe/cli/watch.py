"""autovibe watch: what happens, a line an event, until Ctrl-C."""

from __future__ import annotations

import json as json_lines
import sys
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from autovibe.cli import connection, names, output
from autovibe.cli.output import Json
from autovibe.errors import AutovibeError, NotFound

if TYPE_CHECKING:
    from autovibe import schemas
    from autovibe.sdk import Client

_WIDTHS = (19, 24)  # of the kind, of what it is about


def watch(
    project: Annotated[str | None, typer.Option("--project", "-p", help="Of this project only: name or uuid.")] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option("--object", "-o", metavar="MACHINE|UUID", help="About these only: machines by name, all by uuid."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", "-k", help="machine.status, or machine for all of its kinds; may be given again."),
    ] = None,
    since: Annotated[int | None, typer.Option(min=0, help="Begin with what is kept behind this id.")] = None,
    json: Json = False,
) -> None:
    """Show what changes as it happens, until Ctrl-C. With --json an object a line."""
    with connection.client() as client:
        owner = names.project(client, project) if project else None
        wanted = [_object(client, word) for word in objects or []]
        known = {} if json else _names(client)
        stream = client.events.stream(
            project_uuid=owner.uuid if owner else None, object_uuid=wanted, kind=kind, since=since
        )
        with stream:
            stream.open()
            output.say("Watching; Ctrl-C ends it.", "dim")
            for event in stream:
                if json:
                    sys.stdout.write(json_lines.dumps(event.model_dump(mode="json")) + "\n")
                else:
                    sys.stdout.write(line(client, event, known) + "\n")
                sys.stdout.flush()


def _object(client: Client, word: str) -> UUID:
    try:
        return UUID(word)
    except ValueError:
        return names.machine(client, word).uuid


def _names(client: Client) -> dict[str, str]:
    found = {str(item.uuid): item.name for item in client.projects.each()}
    return found | {str(item.uuid): item.name for item in client.machines.each()}


def line(client: Client, event: schemas.Event, known: dict[str, str]) -> str:
    """'13:10:36 machine.status      worker (1f2e3d4c)        active, exit status 0'"""
    subject = event.body.get("machine_uuid") or event.object_uuid
    name = _name(client, event, str(subject), known) if subject else "-"
    moment = event.created_at.astimezone().strftime("%H:%M:%S")
    text = f"{moment} {event.kind:<{_WIDTHS[0]}} {name:<{_WIDTHS[1]}} {what(event)}"
    return output.escape(text.rstrip())


def _name(client: Client, event: schemas.Event, uuid: str, known: dict[str, str]) -> str:
    if uuid not in known:
        is_machine = event.kind.startswith("machine.") or "machine_uuid" in event.body
        known[uuid] = _ask(client, uuid) if is_machine else ""
    return f"{known[uuid]} ({uuid[:8]})" if known[uuid] else uuid[:8]


def _ask(client: Client, uuid: str) -> str:
    """A machine that was spawned after the watch began."""
    try:
        return client.machines.get(uuid).name
    except NotFound:
        return ""
    except AutovibeError as error:
        output.warn(f"The name of machine '{uuid}' is not known: {error.message}")
        return ""


def what(event: schemas.Event) -> str:
    """The event in a few words: its status or step first, then whatever else it carries."""
    body: dict[str, Any] = {key: value for key, value in event.body.items() if key != "machine_uuid"}
    first = [str(body.pop(key)) for key in ("operation", "message", "status", "step") if key in body]
    rest = [f"{key.replace('_', ' ')} {value}" for key, value in body.items() if value is not None]
    return ", ".join([": ".join(first), *rest] if first else rest)
