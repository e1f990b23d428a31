"""autovibe hub …: the Hub itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autovibe.cli import config, connection, names, output, prepare, progress
from autovibe.cli.exits import DIFFERENT, OK
from autovibe.cli.output import Json
from autovibe.cli.processes import Claim
from autovibe.errors import Conflict, OperationFailed

if TYPE_CHECKING:
    from autovibe import schemas
    from autovibe.sdk import Client
    from autovibe.settings import Settings

app = typer.Typer(no_args_is_help=True, help="The Hub itself: how it does, its checkpoints, experiments.")

Home = Annotated[Path | None, typer.Option(help="Where everything lies (AUTOVIBE_HOME).")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why it is made.")]
Description = Annotated[str, typer.Option("--description", "-d", help="What it holds.")]


@app.command()
def status(json: Json = False) -> None:
    """Show how the Hub does: uptime, checkpoints, utilization, and what its API answered in the last hour."""
    with connection.client() as client:
        found = client.hub.status()
    if json:
        return output.print_json(found)
    api = found.api_statistics
    average = "-" if api.average_response_ms is None else f"{api.average_response_ms:.1f} ms"
    output.facts(
        {
            "hub": found.uuid,
            "status": found.status,
            "version": found.version,
            "up for": output.duration(found.uptime_hours * 3600),
            "last checkpoint": found.last_checkpoint_uuid,
            "made": output.when(found.last_checkpoint_at),
            "machines": found.active_machine_count,
            "projects": found.active_project_count,
            "this computer": _shares(found.resource_utilization),
            "node": _shares(found.node_utilization),
            "last hour": f"{api.requests_per_hour} requests, {average} on average, {api.error_rate_percent:g} % failed",
            "processes": "\n".join(process.name for process in found.processes),
        }
    )
    return None


def _shares(found: schemas.Utilization | None) -> str | None:
    if found is None:
        return None
    return f"cpu {found.cpu_percent:g} %, memory {found.memory_percent:g} %, disk {found.disk_percent:g} %"


@app.command()
def checkpoint(
    type_: Annotated[str, typer.Option("--type", "-t", help="manual, daily, pre_experiment or recovery.")] = "manual",
    reason: Reason = "",
    description: Description = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it is ready.")] = False,
    json: Json = False,
) -> None:
    """Checkpoint the Hub: its database, journal, settings and keys."""
    with connection.client() as client:
        made = client.hub.checkpoint(type=type_, reason=reason, description=description)
        if not detach:
            with progress.waiting("Checkpointing the Hub", resume="autovibe hub checkpoints") as watch:
                made = client.hub.wait(made.uuid, watch=watch)
    return output.print_json(made) if json else _facts(made)


@app.command()
def checkpoints(
    which: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Show this one alone (a unique beginning of its uuid).")
    ] = None,
    json: Json = False,
) -> None:
    """List the checkpoints of the Hub, newest first, or show one."""
    with connection.client() as client:
        if which is not None:
            found = client.hub.get_checkpoint(
                names.by_uuid("checkpoint of the Hub", which, client.hub.each_checkpoint())
            )
            return output.print_json(found) if json else _facts(found)
        everything = list(client.hub.each_checkpoint())
    if json:
        return output.print_json({"checkpoints": everything, "total_count": len(everything)})
    output.table(
        ("uuid", "type", "kind", "status", "size", "made", "reason"),
        (
            (
                output.short(item.uuid),
                item.type,
                item.kind,
                item.status,
                output.size(item.size_bytes),
                output.ago(item.created_at),
                item.reason[:60],
            )
            for item in everything
        ),
        empty="The Hub has no checkpoint of itself yet; make one with: autovibe hub checkpoint",
    )
    return None


@app.command()
def restore(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A uuid of this home (its beginning), or a checkpoint's directory."),
    ],
    home: Home = None,
    into: Annotated[
        Path | None, typer.Option(help="Put it into this other home, and leave the one it was made of alone.")
    ] = None,
    without_recovery: Annotated[
        bool, typer.Option("--without-recovery", help="Do not checkpoint what is there now; for a damaged database.")
    ] = False,
    json: Json = False,
) -> None:
    """Put a checkpoint of the Hub back while the Hub is stopped: database, journal, settings and keys.

    Machines go on as they are: what the checkpoint does not know of them is told at the end.
    """
    source = connection.own_settings(home=home)
    prepare.require_extras(source)
    from autovibe import premises

    bundle = premises.find_checkpoint(source, checkpoint)
    target = connection.own_settings(home=into) if into is not None else source
    claim = Claim(target.home)
    if not claim.take():
        raise Conflict(f"The Hub of '{target.home}' runs; stop it first: autovibe down")
    try:
        with progress.shown("Restoring the Hub") as step:
            saved = premises.restore(target, bundle, step, is_saved=not without_recovery)
        config.remember(target.home, **_kept_database(target))
    finally:
        claim.let_go()
    if json:
        return output.print_json({"restored": bundle, "home": target.home, "recovery_checkpoint": saved})
    output.say(f"Restored from '{bundle}' into '{target.home}'.", "bold green")
    if saved is not None:
        output.say(f"What was there before is the checkpoint {saved.name}.")
    output.say("Next: start the Hub, then see what differs from the node with: autovibe hub check")
    return None


def _kept_database(settings: Settings) -> dict[str, str]:
    """The restored config.toml may name the database of another home: it must name the one that was written."""
    restored = connection.own_settings(home=settings.home)
    return {} if restored.hub_database_url == settings.hub_database_url else {"database_url": settings.database_url}


@app.command()
def check(home: Home = None, json: Json = False) -> None:
    """Show what the database and the node say differently, for example after a restore. Exit status 1 if they do."""
    settings = connection.own_settings(home=home)
    prepare.require_extras(settings)
    from autovibe.hub.reconcile import differences
    from autovibe.store import Store

    store = Store(settings.hub_database_url)
    try:
        found = differences(store, prepare.connect(settings), range(settings.vmid_first, settings.vmid_last + 1))
    finally:
        store.close()
    if json:
        output.print_json(vars(found))
    for sentence in found.sentences:
        output.say(sentence)
    if not found.sentences:
        output.say("The database and the node agree.", "green")
    raise typer.Exit(DIFFERENT if found.sentences else OK)


@app.command("spawn-experimental")
def spawn_experimental(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits and . _ -; 63 characters at most.")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="A checkpoint of the Hub; the newest by default.")
    ] = None,
    algorithm: Annotated[str, typer.Option(help="What is tried; kept with the experiment.")] = "",
    optimization: Annotated[
        list[str] | None, typer.Option("--optimization", help="NAME=VALUE, kept with the experiment; repeatable.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of a setting that it changes; repeatable.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="How long it lasts; 14 by default, 90 at most.")] = None,
    share: Annotated[float | None, typer.Option(help="Its share of the Hub's budgets, 0 to 1; 0.1 by default.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it runs.")] = False,
    json: Json = False,
) -> None:
    """Start a second Hub, restored from a checkpoint of this one, with other settings and a share of the budget."""
    from autovibe.schemas import ExperimentConfiguration
    from autovibe.sdk.connection import order

    configuration = order(
        ExperimentConfiguration,
        algorithm=algorithm or None,
        optimization=_pairs(optimization),
        settings=_pairs(setting),
    )
    with connection.client() as client:
        base = None
        if checkpoint is not None:
            base = names.by_uuid("checkpoint of the Hub", checkpoint, client.hub.each_checkpoint())
        made = client.hub.spawn_experimental(
            name,
            checkpoint_uuid=base,
            configuration=configuration,
            duration_days=days,
            budget_share=share,
        )
        if not detach:
            made = _await_experiment(client, made)
    return output.print_json(made) if json else _experiment_facts(made)


def _await_experiment(client: Client, made: schemas.Experiment) -> schemas.Experiment:
    with progress.shown(f"Experiment '{made.name}'") as step:
        while made.status == "planned":
            step("starting its Hub", None)
            made = client.hub.get_experiment(made.uuid, wait_seconds=2)
    if made.status == "failed":
        raise OperationFailed(f"The experiment failed: {made.error_message}")
    return made


def _pairs(given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE; a value that is a number, true or false is one."""
    import json as json_text

    found: dict[str, Any] = {}
    for pair in given or []:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"'{pair}' is not NAME=VALUE.")
        try:
            value = json_text.loads(text)
        except ValueError:
            value = text
        found[name] = value if isinstance(value, bool | int | float) else text
    return found


@app.command()
def experiments(json: Json = False) -> None:
    """List experiments, newest first."""
    with connection.client() as client:
        found = list(client.hub.each_experiment())
    if json:
        return output.print_json({"experiments": found, "total_count": len(found)})
    output.table(
        ("name", "uuid", "status", "url", "share", "vmids", "ends"),
        (
            (
                item.name,
                output.short(item.uuid),
                item.status,
                item.url,
                item.budget_share,
                f"{item.vmid_first}-{item.vmid_last}",
                f"{item.ended_at or item.ends_at:%Y-%m-%d %H:%M} UTC",
            )
            for item in found
        ),
        empty="There are no experiments; make one with: autovibe hub spawn-experimental NAME",
    )
    return None


Experiment = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A name, or a uuid (its beginning).")]


@app.command()
def experiment(which: Experiment, json: Json = False) -> None:
    """Show an experiment, with how efficient it is beside this Hub."""
    with connection.client() as client:
        found = client.hub.get_experiment(names.experiment(client, which))
    return output.print_json(found) if json else _experiment_facts(found)


@app.command("stop-experiment")
def stop_experiment(which: Experiment, json: Json = False) -> None:
    """End an experiment before its time: its machines are terminated and its Hub is stopped."""
    with connection.client() as client:
        found = client.hub.stop_experiment(names.experiment(client, which))
    return output.print_json(found) if json else _experiment_facts(found)


def _experiment_facts(found: schemas.Experiment) -> None:
    values: dict[str, Any] = {
        "name": found.name,
        "uuid": found.uuid,
        "its hub": found.hub_uuid,
        "status": f"{found.status}, stopping" if found.is_stopping else found.status,
        "error": found.error_message,
        "url": found.url,
        "home": found.path,
        "made of": found.checkpoint_uuid,
        "algorithm": found.configuration.algorithm,
        "optimization": _shown(found.configuration.optimization),
        "settings": _shown(found.configuration.settings),
        "share of the budget": found.budget_share,
        "vmids": f"{found.vmid_first}-{found.vmid_last}",
        "runs since": output.when(found.started_at),
        "ends": f"{found.ends_at:%Y-%m-%d %H:%M:%S} UTC",
        "ended": output.when(found.ended_at),
    }
    output.facts(values)
    if (comparison := found.comparison) is None:
        return
    output.table(
        ("since it runs", "operations", "successful", "success rate", "cost per success"),
        (
            (
                name,
                side.total_operations,
                side.successful_operations,
                side.success_rate,
                f"{side.average_cost_per_success.amount} {side.average_cost_per_success.currency}"
                if side.average_cost_per_success
                else None,
            )
            for name, side in (("experiment", comparison.experiment), ("this Hub", comparison.original))
        ),
        empty="",
    )


def _shown(values: dict[str, Any]) -> str:
    return "\n".join(f"{name} = {value}" for name, value in sorted(values.items()))


def _facts(found: schemas.HubCheckpoint) -> None:
    values: dict[str, Any] = {
        "uuid": found.uuid,
        "type": found.type,
        "kind": found.kind,
        "status": found.status,
        "error": found.error_message,
        "reason": found.reason,
        "description": found.description,
        "lies in": found.path,
        "of": found.place,
        "size": output.size(found.size_bytes),
        "files": found.file_count,
        "version": found.version,
        "schema": found.schema_revision,
        "snapshot": f"{found.proxmox_snapshot_id} of VM {found.vmid}" if found.proxmox_snapshot_id else None,
        "made": output.when(found.created_at),
    }
    output.facts(values)
