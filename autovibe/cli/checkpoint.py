"""autovibe checkpoint …"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autovibe.cli import connection, diff, machine, names, output, plan
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas

app = typer.Typer(no_args_is_help=True, help="Checkpoints: a snapshot of a machine, and the manifest of its files.")

Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Label or uuid (a unique beginning is enough).")]
Of = Annotated[str | None, typer.Option("--project", "-p", help="The project it belongs to: name or uuid.")]


@app.command("list")
def list_(
    project: Annotated[str | None, typer.Argument(metavar="PROJECT", help="Name or uuid of the project.")] = None,
    of: Of = None,
    type_: Annotated[
        Literal["genesis", "automatic", "manual", "final"] | None, typer.Option("--type", help="Only of this type.")
    ] = None,
    json: Json = False,
) -> None:
    """List a project's checkpoints, newest first."""
    wanted = project or of
    if wanted is None:
        raise typer.BadParameter("Name the project: autovibe checkpoint list PROJECT")
    with connection.client() as client:
        owner = names.project(client, wanted)
        found = list(client.checkpoints.each(owner.uuid, type=type_))
    if json:
        return output.print_json({"checkpoints": found, "total_count": len(found)})
    output.table(
        ("label", "uuid", "type", "status", "parent", "files", "size", "new", "description", "made"),
        (
            (
                f"{item.label or ''}{' *' if item.uuid == owner.current_checkpoint_uuid else ''}".strip(),
                output.short(item.uuid),
                item.type,
                item.status,
                output.short(item.parent_uuid),
                item.file_count,
                output.size(item.size_bytes),
                output.size(item.unique_bytes),
                item.description[:50],
                output.ago(item.created_at),
            )
            for item in found
        ),
        empty="There are no checkpoints.",
    )
    output.say("* the project's current checkpoint: a spawn without --checkpoint starts from it.", "dim")
    return None


@app.command()
def show(
    checkpoint: Checkpoint,
    project: Of = None,
    manifest: Annotated[bool, typer.Option("--manifest", help="With every file it holds.")] = False,
    json: Json = False,
) -> None:
    """Show a checkpoint, with its files where asked."""
    with connection.client() as client:
        found = names.checkpoint(client, checkpoint, of=project)
        files: dict[str, schemas.ManifestFile] = {}
        cursor: str | None = None
        while manifest:
            page = client.checkpoints.get(found.uuid, include_manifest=True, limit=1000, cursor=cursor)
            files.update(page.manifest or {})
            cursor = page.manifest_next
            if not cursor:
                found = page.model_copy(update={"manifest": files})
                break
    if json:
        return output.print_json(found)
    facts(found)
    if manifest:
        output.table(
            ("mode", "owner", "size", "sha256", "path"),
            (
                (item.mode, f"{item.uid}:{item.gid}", item.size, (item.sha256 or "")[:12], path)
                for path, item in files.items()
            ),
            empty="It holds no files of its own.",
        )
    return None


app.command("diff")(diff.diff)


@app.command()
def spawn(
    checkpoint: Checkpoint,
    project: Of = None,
    prompt: machine.Prompt = None,
    prompt_file: machine.PromptFile = None,
    file: machine.Files = None,
    name: machine.Name = None,
    type_: machine.Type = "shell",
    max_money: machine.MaxMoney = None,
    max_minutes: machine.MaxMinutes = None,
    max_api_calls: machine.MaxApiCalls = None,
    plan_only: plan.Plan = False,
    detach: machine.Detach = False,
    follow: machine.Follow = False,
    json: Json = False,
) -> None:
    """Spawn a machine from a checkpoint, in its project, and wait until it is reachable; with --plan, only plan it."""
    prompt = machine.read_prompt(prompt, prompt_file)
    placed = machine.read_files(file or [])
    with connection.client() as client:
        origin = names.checkpoint(client, checkpoint, of=project)
        wanted: dict[str, Any] = {
            "type": type_,
            "prompt": prompt,
            "file_modifications": placed,
            "resource_constraints": machine.constraints(max_money, max_minutes, max_api_calls),
            "name": name,
        }
        if plan_only:
            return plan.show(client.checkpoints.plan(origin.uuid, **wanted), json=json)
        made = client.checkpoints.spawn(origin.uuid, **wanted)
        machine.finish_spawn(client, made, detach=detach, follow=follow, json=json)
    return None


def facts(checkpoint: schemas.Checkpoint) -> None:
    values: dict[str, Any] = {
        "label": checkpoint.label,
        "uuid": checkpoint.uuid,
        "type": checkpoint.type,
        "status": checkpoint.status,
        "description": checkpoint.description,
        "context": checkpoint.context,
        "project": checkpoint.project_uuid,
        "parent": checkpoint.parent_uuid,
        "machine": checkpoint.machine_uuid,
        "made by": checkpoint.metadata.get("trigger"),
        "reason": checkpoint.metadata.get("reason"),
        "machine then": _machine_then(checkpoint.metadata.get("machine")),
        "snapshot": checkpoint.proxmox_snapshot_id,
        "held by vmid": checkpoint.vmid,
        "artefact": f"{checkpoint.artefact.kind} on {checkpoint.artefact.storage}" if checkpoint.artefact else None,
        "root digest": checkpoint.root_digest,
        "files": checkpoint.file_count,
        "size": output.size(checkpoint.size_bytes),
        "new in it": output.size(checkpoint.unique_bytes),
        "verified": output.when(checkpoint.verified_at),
        "made": output.when(checkpoint.created_at),
    }
    output.facts(values)


def _machine_then(told: Any) -> str | None:
    """What the machine was about when it was checkpointed."""
    if not isinstance(told, dict):
        return None
    prompt = str(told.get("prompt") or "").strip().splitlines()
    start = f", prompt: {prompt[0][:80]}" if prompt else ""
    return f"{told.get('name')} ({told.get('type')}), {told.get('status')}{start}"
