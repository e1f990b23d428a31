"""autovibe serve …: the two programs in the foreground, as `up` runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autovibe.cli import connection, prepare
from autovibe.errors import ConfigurationError

app = typer.Typer(no_args_is_help=True, help="Run the Hub or the embedded node in the foreground.")

Home = Annotated[Path | None, typer.Option(help="Where everything lies (AUTOVIBE_HOME).")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="The port to listen on.")]
Host = Annotated[str | None, typer.Option(help="The address to listen on.")]


@app.command()
def hub(
    home: Home = None,
    host: Host = None,
    port: Port = None,
    node_port: Annotated[int | None, typer.Option(min=1, max=65534, help="The embedded node's port.")] = None,
    behind_proxy: Annotated[
        bool | None, typer.Option("--behind-proxy", help="A proxy in front of it ends TLS; allows other addresses.")
    ] = None,
) -> None:
    """Run the Hub until SIGTERM or Ctrl-C."""
    settings = connection.settings(
        home=home, hub_host=host, hub_port=port, node_port=node_port, behind_proxy=behind_proxy
    )
    prepare.require_extras(settings)
    from autovibe.app import serve

    serve(settings)


@app.command()
def node(
    home: Home = None,
    host: Host = None,
    port: Port = None,
    name: Annotated[str | None, typer.Option(help="The node's name; a Hub names it in proxmox_node.")] = None,
    faults: Annotated[
        Path | None,
        typer.Option(
            help="For tests: a JSON or TOML file of faults on demand (on loopback only). It holds a list `rules`, each "
            "with a `match` (method, path with * and **, skip, times, probability) and a `then`: delay_seconds; status "
            "with reason and errors; drop = before or after; lock_timeout; vmid_taken; task_fails = TEXT; "
            "task_delay_seconds; lag_seconds; nextid_taken; truncate = BYTES. It is read again when it changes."
        ),
    ] = None,
) -> None:
    """Run the embedded node until SIGTERM or Ctrl-C. Its virtual machines outlive it."""
    settings = connection.settings(home=home, node_host=host, node_port=port, proxmox_node=name)
    if not settings.uses_embedded_node:
        raise ConfigurationError(
            f"The settings name a Proxmox at {settings.proxmox_url}; without proxmox_url the embedded node serves."
        )
    prepare.require_extras(settings)
    prepare.require_programs(prepare.QEMU_PROGRAMS, "The embedded node")
    from autovibe.node import run

    run(
        settings.node_home,
        settings.node_host,
        settings.node_port,
        name=settings.proxmox_node,
        accel=settings.node_accel,
        log_level=settings.log_level,
        faults=faults,
    )
