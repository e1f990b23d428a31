"""autovibe doctor: what is there, what is missing, and the line that mends it."""

from __future__ import annotations

import typer

from autovibe.cli import checks, connection, output, progress
from autovibe.cli.exits import FAILED
from autovibe.cli.output import Json
from autovibe.cli.up import Home

MARKS = {"ok": ("✓ ok", "green"), "warn": ("! warn", "yellow"), "fail": ("✗ fail", "bold red")}


def doctor(home: Home = None, json: Json = False) -> None:
    """Check everything autovibe needs on this machine, and a real Proxmox when the settings name one."""
    settings = connection.settings(home=home)
    found: list[checks.Check] = []
    with progress.shown("Doctor", is_brief=True) as step:
        for name, check in checks.of(settings):
            step(name, None)
            found += check(settings)
    has_failed = any(check.status == "fail" for check in found)
    if json:
        output.print_json({"ok": not has_failed, "checks": [check._asdict() for check in found]})
    else:
        _print(found)
    if has_failed:
        raise typer.Exit(FAILED)


def _print(found: list[checks.Check]) -> None:
    from rich.text import Text

    output.table(
        ("", "check", "found"),
        ((Text(*MARKS[check.status]), check.name, check.finding) for check in found),
        empty="",
    )
    console = output.out()
    for check in found:
        if check.remedy:
            console.print(Text(f"{check.name}: ", style=MARKS[check.status][1]), Text(check.remedy), sep="")
