"""autovibe image …"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from autovibe.cli import connection, output, prepare, progress
from autovibe.cli.output import Json

app = typer.Typer(no_args_is_help=True, help="Guest images: what machines are cloned from in the beginning.")

Image = Annotated[str | None, typer.Argument(metavar="IMAGE", help="A recipe's name; default: the setting 'image'.")]


@app.command()
def build(
    image: Image = None,
    force: Annotated[bool, typer.Option("--force", help="Build it anew although it is there.")] = False,
    json: Json = False,
) -> None:
    """Build a guest image from its recipe, unless it was built before."""
    settings = connection.settings()
    name = image or settings.image
    started = time.monotonic()
    with progress.shown(f"Image '{name}'") as step:
        path = prepare.build_image(settings, step, name, force=force)
    seconds = time.monotonic() - started
    if json:
        return output.print_json({"image": name, "path": path, "size_bytes": path.stat().st_size})
    output.say(f"Image '{name}' ({output.size(path.stat().st_size)}, {output.duration(seconds)}):")
    typer.echo(str(path))
    return None


@app.command("list")
def list_(json: Json = False) -> None:
    """List the recipes, and what was built of them."""
    from autovibe import images

    settings = connection.settings()
    rows = []
    for recipe in images.recipes():
        path = images.built(recipe, settings.images_home)
        rows.append(
            {
                "name": recipe.name,
                "digest": images.digest(recipe),
                "description": recipe.description,
                "path": None if path is None else str(path),
                "size_bytes": None if path is None else path.stat().st_size,
            }
        )
    if json:
        return output.print_json({"images": rows, "total_count": len(rows)})
    output.table(
        ("name", "digest", "built", "size", "description"),
        (
            (
                row["name"],
                row["digest"],
                "yes" if row["path"] else "no",
                output.size(row["size_bytes"]) if isinstance(row["size_bytes"], int) else None,
                row["description"],
            )
            for row in rows
        ),
        empty="There are no recipes.",
    )
    return None


@app.command()
def upload(image: Image = None, json: Json = False) -> None:
    """Put an image on the node (the embedded one, or your Proxmox) and make a template of it."""
    settings = connection.settings()
    name = image or settings.image
    with progress.shown(f"Image '{name}'") as step:
        vmid = prepare.ensure_template(settings, step, name, is_latest=True)
    if json:
        return output.print_json({"image": name, "node": settings.proxmox_node, "vmid": vmid})
    typer.echo(f"Image '{name}' is the template {vmid} on node '{settings.proxmox_node}'.")
    return None
