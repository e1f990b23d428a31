"""autovibe checkpoint diff: what changed between two checkpoints, in git's colours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from autovibe.cli import connection, names, output
from autovibe.cli.exits import DIFFERENT
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas

GRAPH_WIDTH = 40


class Line(NamedTuple):
    """One changed path: `letter` as in git (A, M, D), sizes in bytes, `what` of a modified path."""

    letter: str
    path: str
    old_size: int
    new_size: int
    what: str
    kind: str


STYLES = {"A": "green", "M": "yellow", "D": "red", "R": "cyan"}


def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Label or uuid of the earlier checkpoint.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Label or uuid of the later checkpoint.")],
    project: Annotated[str | None, typer.Option("--project", "-p", help="The project the labels belong to.")] = None,
    stat: Annotated[bool, typer.Option("--stat", help="How much each path grew or shrank.")] = False,
    name_only: Annotated[bool, typer.Option("--name-only", help="Paths alone, one a line.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit status 1 when there are differences.")] = False,
    json: Json = False,
) -> None:
    """Compare two checkpoints; no machine needs to run for it."""
    if stat and name_only:
        raise typer.BadParameter("Give either --stat or --name-only.")
    with connection.client() as client:
        left = names.checkpoint(client, base, of=project)
        right = names.checkpoint(client, target, of=project)
        found = client.checkpoints.diff(left.uuid, right.uuid)
    if json:
        output.print_json(found)
    elif name_only:
        for line in lines(found):
            typer.echo(output.escape(line.path))
    elif stat:
        _print_stat(found)
    else:
        _print_status(found)
    if exit_code and found.total_changes:
        raise typer.Exit(DIFFERENT)


def lines(found: schemas.Diff) -> list[Line]:
    """Every changed path once, sorted as git sorts: by bytes."""

    def each() -> Iterator[Line]:
        for entry in found.added:
            yield Line("A", entry.path, 0, entry.size, "", entry.kind)
        for change in found.modified:
            yield Line("M", change.path, change.old_size, change.new_size, ", ".join(change.what), change.kind)
        for entry in found.deleted:
            yield Line("D", entry.path, entry.size, 0, "", entry.kind)

    return sorted(each(), key=lambda line: line.path.encode("utf-8", "surrogateescape"))


def _print_status(found: schemas.Diff) -> None:
    from rich.text import Text

    console = output.out()
    for line in lines(found):
        style = STYLES[line.letter]
        text = Text.assemble((f"{line.letter}  {output.escape(line.path)}", style))
        if line.what and line.what != "content":
            text.append(f"  ({line.what})", style="dim")
        console.print(text)
    for rename in found.renamed:
        moved = f"R  {output.escape(rename.old_path)} -> {output.escape(rename.new_path)}"
        console.print(Text(moved, style=STYLES["R"]))
    console.print(Text(found.summary, style="bold"))


def _print_stat(found: schemas.Diff) -> None:
    from rich.text import Text

    console = output.out()
    rows = lines(found)
    widest = max((len(output.escape(row.path)) for row in rows), default=0)
    largest = max((abs(row.new_size - row.old_size) for row in rows), default=0)
    for row in rows:
        grown = row.new_size - row.old_size
        length = 0 if not largest else max(1, round(abs(grown) / largest * GRAPH_WIDTH)) if grown else 0
        mark, style = ("+", "green") if grown > 0 else ("-", "red")
        sizes = f"{output.size(row.old_size):>9} -> {output.size(row.new_size):<9}"
        text = Text(f" {row.letter} {output.escape(row.path):<{widest}} | {sizes} ")
        text.append(mark * length, style=style)
        console.print(text)
    console.print(Text(found.summary, style="bold"))
