"""autovibe machine spawn --plan: what a spawn would use, how it would be made, and what stands against it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autovibe.cli import output

if TYPE_CHECKING:
    from autovibe import schemas

Plan = Annotated[bool, typer.Option("--plan", help="Only say what it would use and what stands against it.")]

_CLONES = {
    "template": "linked to the template {vmid}",
    "linked": "linked to VM {vmid} at '{snapshot}'",
    "full": "a full copy of VM {vmid}",
}


def show(plan: schemas.SpawnPlan, *, json: bool) -> None:
    """Print the plan: as JSON, or for a person."""
    if json:
        output.print_json(plan)
        return
    made, room = plan.estimate, plan.headroom
    output.table(
        ("resource", "expected", "from", "to", "the project has left today", "limited by"),
        (
            (
                "money",
                _money(made.money.value),
                _money(made.money.low),
                _money(made.money.high),
                _money(room.money.remaining),
                _owner(room.money.limited_by),
            ),
            ("minutes", *_figures(made.time_minutes), *_room(room.time_hours, " h")),
            ("model calls", *_figures(made.api_calls), *_room(room.api_calls, "")),
            ("CPU hours", *_figures(made.cpu_hours), None, None),
        ),
        empty="",
    )
    output.facts(
        {
            "estimated from": _basis(plan),
            "price": f"{_money(plan.price_per_hour)} an hour",
            "held at its start": f"{_money(plan.reserved.money)}, {plan.reserved.time_minutes:g} minutes",
            "placed on": f"node {plan.placement.node}, storage {plan.placement.storage}",
            "vmid": plan.placement.vmid,
            "cloned": _clone(plan.clone),
        }
    )
    if plan.is_possible:
        output.say("Nothing stands against it, and nothing was done.", "green")
    for refusal in plan.refusals:
        output.warn(f"It would be refused: {output.escape(refusal.message)} ({refusal.code})")


def _money(money: schemas.MoneyAmount | None) -> str | None:
    return None if money is None else f"{money.amount} {money.currency}"


def _figures(figure: schemas.Figure) -> tuple[str, str, str]:
    return f"{figure.value:g}", f"{figure.low:g}", f"{figure.high:g}"


def _room(room: schemas.Room, unit: str) -> tuple[str | None, str | None]:
    return None if room.remaining is None else f"{room.remaining:g}{unit}", _owner(room.limited_by)


def _owner(scope: str | None) -> str | None:
    return {"system": "the pool", "project": "the project"}.get(scope or "")


def _basis(plan: schemas.SpawnPlan) -> str:
    made = plan.estimate
    source = f"{made.n} machines of the last 30 days" if made.basis == "history" else "the type's own figures"
    return f"{source}; complexity {made.complexity:g}"


def _clone(clone: schemas.Clone | None) -> str | None:
    if clone is None:
        return None
    return _CLONES[clone.strategy].format(vmid=clone.source_vmid, snapshot=clone.snapshot)
