"""The words of the command line, put together; and the one place where an error becomes an exit status."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from autovibe.cli import (
    analytics,
    audit,
    checkpoint,
    config,
    connection,
    demo,
    doctor,
    hub,
    image,
    key,
    machine,
    output,
    project,
    resources,
    serve,
    status,
    systemd,
    up,
    watch,
)
from autovibe.errors import AutovibeError, OperationFailed
from autovibe.version import __version__


class Words(TyperGroup):
    """Turns the errors of autovibe into a message and an exit status, for every word."""

    def invoke(self, ctx: Any) -> Any:
        output.reset()
        try:
            return super().invoke(ctx)
        except AutovibeError as error:
            raise typer.Exit(output.failed(error)) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader (head, less) has gone; nothing more can be said, also not at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except OSError as error:
            # A file or directory of this computer; 1 would mean that `checkpoint diff` found a difference.
            raise typer.Exit(output.failed(OperationFailed(f"{error}."))) from error


app = typer.Typer(
    name="autovibe",
    cls=Words,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"autovibe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    home: Annotated[Path | None, typer.Option(help="Where autovibe keeps everything (AUTOVIBE_HOME).")] = None,
    url: Annotated[str | None, typer.Option(help="The Hub to talk to (AUTOVIBE_URL).")] = None,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """AI agents in virtual machines on your own Proxmox VE cluster, or on this machine without one.

    First steps: [bold]autovibe demo[/bold] shows everything once; [bold]autovibe up[/bold] starts it for you to use.
    """
    connection.given(home=home, url=url)


app.command("up", rich_help_panel="Run it")(up.up)
app.command("down", rich_help_panel="Run it")(up.down)
app.command("status", rich_help_panel="Run it")(status.status)
app.command("doctor", rich_help_panel="Run it")(doctor.doctor)
app.command("demo", rich_help_panel="Run it")(demo.demo)
app.command("watch", rich_help_panel="Use it")(watch.watch)
app.add_typer(project.app, name="project", rich_help_panel="Use it")
app.add_typer(machine.app, name="machine", rich_help_panel="Use it")
app.add_typer(checkpoint.app, name="checkpoint", rich_help_panel="Use it")
app.add_typer(resources.app, name="resources", rich_help_panel="Use it")
app.command("analytics", rich_help_panel="Use it")(analytics.analytics)
app.add_typer(hub.app, name="hub", rich_help_panel="Look after it")
app.add_typer(key.app, name="key", rich_help_panel="Look after it")
app.add_typer(audit.app, name="audit", rich_help_panel="Look after it")
app.add_typer(image.app, name="image", rich_help_panel="Look after it")
app.add_typer(config.app, name="config", rich_help_panel="Look after it")
app.add_typer(serve.app, name="serve", rich_help_panel="Look after it")
app.add_typer(systemd.app, name="service", rich_help_panel="Look after it")
