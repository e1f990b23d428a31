"""autovibe machine …"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autovibe.cli import amounts, connection, guest, names, output, plan, progress, ssh, usage
from autovibe.cli.exits import FAILED
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas
    from autovibe.sdk import Client

app = typer.Typer(no_args_is_help=True, help="Intelligent Machines: virtual machines that run a prompt.")

Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="Name or uuid (a unique beginning is enough).")]
Type = Annotated[str, typer.Option("--type", help="The machine type.")]
Prompt = Annotated[str | None, typer.Option(help="What it does; for type shell a bash script. '-' reads stdin.")]
PromptFile = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Read the prompt from a file.")]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        metavar="GUEST=LOCAL",
        help="Place a local file in the guest (an empty LOCAL deletes it); may be given again.",
    ),
]
Name = Annotated[str | None, typer.Option(help="Its name; one is made up otherwise.")]
MaxMoney = Annotated[float | None, typer.Option(min=0, help="Money it may use; it is blocked there.")]
MaxMinutes = Annotated[float | None, typer.Option(min=0, help="Minutes it may run; it is blocked there.")]
MaxApiCalls = Annotated[int | None, typer.Option(min=0, help="Model calls it may make; it is blocked there.")]
Detach = Annotated[bool, typer.Option("--detach", "--no-wait", help="Return at once; the work goes on.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Print the prompt's output until it has ended.")]


@app.command()
def spawn(
    project: Annotated[str, typer.Option("--project", "-p", help="The project it works for: name or uuid.")],
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", "-c", help="Label or uuid to start from; default: the project's current."),
    ] = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    file: Files = None,
    name: Name = None,
    type_: Type = "shell",
    max_money: MaxMoney = None,
    max_minutes: MaxMinutes = None,
    max_api_calls: MaxApiCalls = None,
    plan_only: plan.Plan = False,
    detach: Detach = False,
    follow: Follow = False,
    json: Json = False,
) -> None:
    """Spawn a machine and wait until it is reachable; with --plan, only say what that would take."""
    prompt = read_prompt(prompt, prompt_file)
    placed = read_files(file or [])
    with connection.client() as client:
        owner = names.project(client, project)
        origin = names.checkpoint(client, checkpoint, of=project) if checkpoint else None
        wanted: dict[str, Any] = {
            "type": type_,
            "checkpoint_uuid": origin.uuid if origin else None,
            "prompt": prompt,
            "file_modifications": placed,
            "resource_constraints": constraints(max_money, max_minutes, max_api_calls),
            "name": name,
        }
        if plan_only:
            return plan.show(client.machines.plan(owner.uuid, **wanted), json=json)
        machine = client.machines.spawn(owner.uuid, **wanted)
        finish_spawn(client, machine, detach=detach, follow=follow, json=json)
    return None


def finish_spawn(client: Client, machine: schemas.Machine, *, detach: bool, follow: bool, json: bool) -> None:
    """What `machine spawn` and `checkpoint spawn` share: wait, show, and follow the prompt where asked."""
    if not detach:
        title = f"Spawning '{machine.name}'"
        with progress.waiting(title, resume=f"autovibe machine show {machine.name}") as watch:
            machine = client.machines.wait(machine.uuid, watch=watch)
    if follow and not json:
        output.say(f"Machine '{machine.name}' ({output.short(machine.uuid)}) is {machine.status}.")
        guest.print_log(client, machine.uuid, follow=True, resume=machine.name)
        machine = client.machines.wait(machine.uuid, until="finished")
        output.say(f"The prompt ended with exit status {machine.exit_status}.")
        if machine.exit_status:
            raise typer.Exit(FAILED)
    elif json:
        output.print_json(machine)
    else:
        facts(machine)
        output.say(f"Next: autovibe machine logs -f {machine.name}")
        output.say(f"      autovibe machine exec {machine.name} -- ls -la")


@app.command("list")
def list_(
    project: Annotated[str | None, typer.Option("--project", "-p", help="Of this project only.")] = None,
    status: Annotated[str | None, typer.Option(help="In this status only.")] = None,
    all_: Annotated[bool, typer.Option("--all", "-a", help="Also those that have ended.")] = False,
    json: Json = False,
) -> None:
    """List machines, newest first."""
    with connection.client() as client:
        owner = names.project(client, project) if project else None
        every = list(client.machines.each(status=status, project_uuid=owner.uuid if owner else None))
        owners = {} if json else {item.uuid: item.name for item in client.projects.each()}
    found = [item for item in every if all_ or status or json or not item.status.is_final]
    if json:
        return output.print_json({"machines": found, "total_count": len(found)})
    output.table(
        ("name", "uuid", "project", "type", "status", "vmid", "exit", "progress", "spawned"),
        (
            (
                item.name,
                output.short(item.uuid),
                owners.get(item.project_uuid, output.short(item.project_uuid)),
                item.type,
                item.status,
                item.vmid,
                item.exit_status,
                item.progress[:50],
                output.ago(item.spawned_at),
            )
            for item in found
        ),
        empty=f"No machine is running ({len(every)} have ended; see them with --all)." if every else "No machines yet.",
    )
    return None


@app.command()
def show(
    machine: Machine,
    wait: Annotated[
        Literal["ready", "finished"] | None,
        typer.Option(help="Wait until it is reachable, or until its prompt has ended."),
    ] = None,
    json: Json = False,
) -> None:
    """Show a machine, and how far an operation on it is."""
    with connection.client() as client:
        found = names.machine(client, machine)
        if wait:
            title = f"Waiting for '{found.name}' to be {wait}"
            with progress.waiting(title, resume=f"autovibe machine show {found.name} --wait {wait}") as watch:
                found = client.machines.wait(found.uuid, until=wait, watch=watch)
        operation = client.operations.get(found.operation_uuid) if found.operation_uuid and not json else None
    if json:
        return output.print_json(found)
    facts(found, operation)
    return None


app.command("logs")(guest.logs)
app.command("exec")(guest.exec_)
app.command("ssh")(ssh.ssh)
app.command("resume")(usage.resume)
app.command("usage")(usage.usage)


@app.command()
def checkpoint(
    machine: Machine,
    label: Annotated[str | None, typer.Option("--label", "-l", help="A name for it, unique in the project.")] = None,
    description: Annotated[str, typer.Option("--description", "-d", help="What it holds.")] = "",
    context: Annotated[str, typer.Option(help="An identifier of yours: a commit, a ticket.")] = "",
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Checkpoint a machine while it goes on living."""
    from autovibe.cli.checkpoint import facts as checkpoint_facts

    with connection.client() as client:
        found = names.machine(client, machine)
        made = client.machines.checkpoint(found.uuid, label=label, description=description, context=context)
        if not detach:
            title = f"Checkpointing '{found.name}'"
            with progress.waiting(title, resume=f"autovibe checkpoint show {made.uuid}") as watch:
                made = client.checkpoints.wait(made.uuid, watch=watch)
    if json:
        return output.print_json(made)
    checkpoint_facts(made)
    return None


@app.command()
def terminate(
    machine: Machine,
    reason: Annotated[str, typer.Option(help="Why; kept with the machine.")] = "",
    create_checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Make a final checkpoint first.")] = False,
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Terminate a machine: its virtual machine goes, its checkpoints stay."""
    with connection.client() as client:
        found = names.machine(client, machine)
        resume = f"autovibe machine show {found.uuid}"
        with progress.waiting(f"Terminating '{found.name}'", resume=resume) as watch:
            ended = client.machines.terminate(
                found.uuid, reason=reason, create_checkpoint=create_checkpoint, wait=not detach, watch=watch
            )
    if json:
        return output.print_json(ended)
    kept = f" Its final checkpoint is {ended.final_checkpoint_uuid}." if ended.final_checkpoint_uuid else ""
    typer.echo(f"Machine '{output.escape(ended.name)}' is {ended.status}.{kept}")
    return None


def facts(machine: schemas.Machine, operation: schemas.Operation | None = None) -> None:
    used, allowed = machine.resource_usage, machine.resource_constraints
    output.facts(
        {
            "name": machine.name,
            "uuid": machine.uuid,
            "status": machine.status,
            "type": machine.type,
            "project": machine.project_uuid,
            "spawned from": machine.checkpoint_uuid,
            "vmid": machine.vmid,
            "prompt": machine.prompt,
            "progress": machine.progress,
            "exit status": machine.exit_status,
            "error": machine.error_message,
            "operation": _operation(operation),
            "checkpoints": machine.checkpoint_count,
            "last checkpoint": machine.last_checkpoint_uuid,
            "money": _used(amounts.money, used.money.actual, allowed.max_money),
            "minutes": _used(_number, used.time_minutes.actual, allowed.max_time_minutes),
            "model calls": _used(_number, used.api_calls.actual, allowed.max_api_calls),
            "spawned": output.when(machine.spawned_at),
            "finished": output.when(machine.finished_at),
            "terminated": output.when(machine.terminated_at),
        }
    )


def _used(shown: Callable[[Any], str], used: Any, allowed: Any) -> str | None:
    if used is None:
        return None
    return shown(used) if allowed is None else f"{shown(used)} of {shown(allowed)}"


def _number(value: float) -> str:
    return f"{round(value, 1):g}"


def _operation(operation: schemas.Operation | None) -> str | None:
    if operation is None or operation.status.is_final:
        return None
    text, fraction = progress.describe(operation)
    return f"{operation.kind} at {text}" + ("" if fraction is None else f" ({fraction:.0%} of its steps)")


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("Give either --prompt or --prompt-file.")
    if prompt_file is not None:
        return prompt_file.read_text(encoding="utf-8")
    return sys.stdin.read() if prompt == "-" else prompt


def read_files(pairs: list[str]) -> dict[str, str | schemas.FileContent | None]:
    """`/guest/path=local/path` -> the file's content and mode; an empty local path deletes."""
    import base64

    from autovibe.schemas import FileContent

    found: dict[str, str | schemas.FileContent | None] = {}
    for pair in pairs:
        guest_path, separator, local = pair.partition("=")
        if not separator or not guest_path.startswith("/"):
            raise typer.BadParameter(f"--file takes /path/in/guest=local/path, not '{pair}'.")
        if not local:
            found[guest_path] = None
            continue
        path = Path(local).expanduser()
        if not path.is_file():
            raise typer.BadParameter(f"There is no file '{local}' to place at '{guest_path}'.")
        found[guest_path] = FileContent(
            content_base64=base64.b64encode(path.read_bytes()).decode(), mode=f"{path.stat().st_mode & 0o777:04o}"
        )
    return found


def constraints(
    max_money: float | None, max_minutes: float | None, max_api_calls: int | None
) -> schemas.ResourceConstraints | None:
    from autovibe.schemas import ResourceConstraints

    given = {"max_money": max_money, "max_time_minutes": max_minutes, "max_api_calls": max_api_calls}
    chosen = {name: value for name, value in given.items() if value is not None}
    return ResourceConstraints.model_validate(chosen) if chosen else None
