"""The words that speak with a guest: machine logs, exec."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from autovibe.cli import connection, names, output
from autovibe.cli.exits import INTERRUPTED
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas
    from autovibe.sdk import Client

Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="Name or uuid (a unique beginning is enough).")]


def logs(
    machine: Machine,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the prompt has ended.")] = False,
    json: Json = False,
) -> None:
    """Print the output of a machine's prompt."""
    with connection.client() as client:
        found = names.machine(client, machine)
        if not json:
            return print_log(client, found.uuid, follow=follow, resume=found.name)
        chunks = list(client.machines.follow(found.uuid)) if follow else _all(client, found.uuid)
        end = client.machines.logs(found.uuid, offset=chunks[-1].next_offset if chunks else 0)
    text = "".join(chunk.text for chunk in chunks)
    return output.print_json({"machine_uuid": found.uuid, "text": text, "finished": end.finished})


def _all(client: Client, uuid: UUID) -> list[schemas.LogChunk]:
    chunks = [client.machines.logs(uuid)]
    while chunks[-1].text:
        chunks.append(client.machines.logs(uuid, offset=chunks[-1].next_offset))
    return chunks


def print_log(client: Client, uuid: UUID, *, follow: bool, resume: str) -> None:
    """The output so far, or as it comes until it ends; Ctrl-C ends the printing alone."""
    is_terminal = sys.stdout.isatty()
    try:
        for chunk in client.machines.follow(uuid) if follow else _all(client, uuid):
            sys.stdout.write(output.stream(chunk.text, is_terminal=is_terminal))
            sys.stdout.flush()
    except KeyboardInterrupt:
        output.warn(f"\nNo longer following; the prompt goes on. Take it up with: autovibe machine logs -f {resume}")
        raise typer.Exit(INTERRUPTED) from None


def exec_(
    machine: Machine,
    argv: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND…", help="The command and its arguments.")
    ] = None,
    script: Annotated[str | None, typer.Option(help="Run a bash script instead; '-' reads it from stdin.")] = None,
    cwd: Annotated[str | None, typer.Option(help="The directory it runs in; default: /workspace.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Set a variable in its environment; may be given again."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End it after so long, with exit status 124.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="The user it runs as; default: agent.")] = None,
    json: Json = False,
) -> None:
    """Run a command in the guest; its exit status becomes this one's."""
    if not argv and script is None:
        raise typer.BadParameter("Give a command after '--', or --script.")
    pairs = [pair.partition("=") for pair in env or []]
    if bad := [name for name, separator, _ in pairs if not separator]:
        raise typer.BadParameter(f"--env takes NAME=VALUE, not '{bad[0]}'.")
    with connection.client() as client:
        found = names.machine(client, machine)
        result = client.machines.exec(
            found.uuid,
            argv or None,
            script=sys.stdin.read() if script == "-" else script,
            cwd=cwd,
            env={name: value for name, _, value in pairs},
            timeout_seconds=timeout,
            user=user,
        )
    if json:
        output.print_json(result)
        raise typer.Exit(result.exit_status & 0xFF)
    for stream, text in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
        stream.write(output.stream(text, is_terminal=stream.isatty()))
        stream.flush()
    if result.truncated:
        output.warn("The output was longer than the Hub passes on; the rest is left out.")
    raise typer.Exit(result.exit_status & 0xFF)
