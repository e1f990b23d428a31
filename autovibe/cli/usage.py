"""autovibe machine usage, autovibe machine resume: what a machine used of its limits, and how it goes on behind one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autovibe.cli import connection, names, output, progress
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe import schemas

Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="Name or uuid (a unique beginning is enough).")]


def usage(
    machine: Machine,
    api_calls: Annotated[int, typer.Option(min=0, help="Report so many model calls.")] = 0,
    money: Annotated[float, typer.Option(min=0, help="Report so much money spent.")] = 0,
    note: Annotated[str, typer.Option(help="What it was used for; kept in the ledger.")] = "",
    json: Json = False,
) -> None:
    """Show what a machine has used; with --api-calls or --money, report what else it used."""
    with connection.client() as client:
        found = names.machine(client, machine)
        if not api_calls and not money:
            return output.print_json(found.resource_usage) if json else facts(found)
        reply = client.machines.report_usage(found.uuid, api_calls=api_calls, money=money or None, note=note)
    if json:
        return output.print_json(reply)
    output.facts(
        {
            "charged": f"{reply.charged.api_calls} model calls, {_money(reply.charged.money)}",
            "left to the machine": _left(reply.machine),
            "left to its project": _left(reply.project),
        }
    )
    return None


def facts(machine: schemas.Machine) -> None:
    usage, limits = machine.resource_usage, machine.resource_constraints
    output.table(
        ("resource", "used", "estimated", "limit"),
        (
            (
                "money",
                _money(usage.money.actual),
                _money(usage.money.estimated),
                _money(limits.max_money),
            ),
            ("minutes", *_numbers(usage.time_minutes, limits.max_time_minutes, 1)),
            ("model calls", *_numbers(usage.api_calls, limits.max_api_calls, 0)),
            ("CPU hours", *_numbers(usage.cpu_hours, None, 4)),
        ),
        empty="",
    )


def _numbers(usage: schemas.Usage, limit: float | None, decimals: int) -> list[str | None]:
    values = (usage.actual, usage.estimated, limit)
    return [None if value is None else f"{value:,.{decimals}f}" for value in values]


def _money(money: schemas.MoneyAmount | None) -> str | None:
    return None if money is None else f"{money.amount} {money.currency}"


def _left(remaining: schemas.Remaining) -> str:
    parts = [
        _money(remaining.money),
        None if remaining.time_minutes is None else f"{remaining.time_minutes:g} minutes",
        None if remaining.api_calls is None else f"{remaining.api_calls} model calls",
    ]
    return ", ".join(part for part in parts if part is not None) or "no limit"


def resume(
    machine: Machine,
    max_money: Annotated[float | None, typer.Option(min=0, help="Money it may use from now on, in its life.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0, help="Minutes it may run, in its life.")] = None,
    max_api_calls: Annotated[int | None, typer.Option(min=0, help="Model calls it may make, in its life.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "--no-wait", help="Return at once; the work goes on.")] = False,
    json: Json = False,
) -> None:
    """Let a machine that was blocked at a limit go on where it was frozen."""
    from autovibe.cli.machine import constraints
    from autovibe.cli.machine import facts as machine_facts

    with connection.client() as client:
        found = names.machine(client, machine)
        again = f"autovibe machine show {found.uuid}"
        with progress.waiting(f"Resuming '{found.name}'", resume=again) as watch:
            resumed = client.machines.resume(
                found.uuid,
                resource_constraints=constraints(max_money, max_minutes, max_api_calls),
                wait=not detach,
                watch=watch,
            )
    return output.print_json(resumed) if json else machine_facts(resumed)
