"""The plan of a spawn: what it is expected to use, where it would be put, how cloned, and everything against it.

The same functions decide as for a spawn (see `hub.spawning`), in a reading: nothing is written, and no
Idempotency-Key is used up. What is malformed is refused as it is for a spawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast
from uuid import UUID

from sqlmodel import Session

from autovibe import schemas
from autovibe.domain import Account, Checkpoint, Machine, Project
from autovibe.domain.actor import Actor
from autovibe.domain.budget import running
from autovibe.domain.estimate import FORMULA, VERBS
from autovibe.domain.machine_type import machine_type
from autovibe.errors import (
    AutovibeError,
    ConfigurationError,
    Conflict,
    InsufficientSpace,
    OperationFailed,
    Unavailable,
)
from autovibe.hub import Hub, files, rules, spawning
from autovibe.hub.machines import order_from
from autovibe.hypervisor import read
from autovibe.store import rows, trail
from autovibe.store.ledger import Holder
from autovibe.types import MICROS, ArtefactKind, Money, Resource
from autovibe.workflows import vms

Found = TypeVar("Found")

DESCRIPTION = f"""Spawn a machine; answers at once with status `spawning`, or with `wait` when it is up or has failed.

It then holds a first minute of its time and money, and the tail that its own end is paid with; 409
`RESOURCE_LIMIT_EXCEEDED` where a budget has no room for that, and nothing is recorded. With `dry_run` nothing is done.
{FORMULA}
{", ".join(sorted(VERBS))}.
"""
"""Of the route, for the API's description."""

_STANDS_AGAINST = (Conflict, InsufficientSpace, OperationFailed, Unavailable, ConfigurationError)


@dataclass
class _Refusals:
    """What was met so far; the same thing met twice counts once."""

    errors: list[AutovibeError] = field(default_factory=list)

    def attempt(self, do: Callable[[], Found]) -> Found | None:
        try:
            return do()
        except _STANDS_AGAINST as error:
            self.add(error)
            return None

    def add(self, error: AutovibeError) -> None:
        if error.message not in {known.message for known in self.errors}:
            self.errors.append(error)

    def shown(self) -> list[schemas.Refusal]:
        return [schemas.Refusal(code=e.code, message=e.message, details=e.details) for e in self.errors]


def plan(hub: Hub, actor: Actor, order: schemas.MachineOrder) -> schemas.SpawnPlan:
    """Raises InvalidRequest, NotFound, Forbidden; all else that stands against the spawn is in the plan."""
    trail.unchanged()
    rules.require_project(actor, order.project_uuid)
    kind = machine_type(order.type)
    machine = Machine(
        name=order.name or kind.name,
        type=kind.name,
        project_uuid=order.project_uuid,
        prompt=order.prompt or None,
        file_modifications=files.check(order.file_modifications),
        **spawning.constraints(order.resource_constraints, hub.ledger.currency),
    )
    base = spawning.base_of(hub, kind)
    met = _Refusals()
    met.attempt(hub.require_space)
    with hub.store.reading() as session:
        project = rows.get(session, Project, order.project_uuid)
        met.attempt(lambda: spawning.require_active(project))
        checkpoint = met.attempt(lambda: spawning.origin(session, project, order.checkpoint_uuid))
        met.attempt(lambda: spawning.free_name(session, machine, order.name, 1))
        machine.vmid = met.attempt(lambda: spawning.free_vmid(session, hub.vmids, 0))
        spawning.appraise(hub, machine, kind, spawning.disk_gb(session, project, checkpoint, kind), base)
        held = running(machine.price_micros, hub.tail_seconds)
        for refusal in (*spawning.limits(hub, session, project), *hub.ledger.shortages(session, machine, held)):
            met.add(refusal)
        headroom = _headroom(hub, session, project)
    met.attempt(lambda: vms.require_space(hub.workflows.world))
    clone = met.attempt(lambda: _clone(hub, checkpoint)) if checkpoint is not None else None
    return schemas.SpawnPlan(
        is_possible=not met.errors,
        type=kind.name,
        name=order.name,
        project_uuid=project.uuid,
        checkpoint_uuid=checkpoint.uuid if checkpoint is not None else None,
        estimate=_estimate(machine),
        price_per_hour=_money(hub, machine.price_micros),
        reserved=schemas.Held(
            money=_money(hub, held[Resource.money]), time_minutes=round(held[Resource.time_hours] * 60 / MICROS, 3)
        ),
        headroom=headroom,
        placement=schemas.Placement(node=hub.node, storage=hub.storage, vmid=machine.vmid),
        clone=clone,
        refusals=met.shown(),
    )


def plan_from(hub: Hub, actor: Actor, checkpoint: UUID, order: schemas.SpawnFromCheckpointOrder) -> schemas.SpawnPlan:
    """Of a spawn from that checkpoint, in its own project. Raises as `plan` does."""
    return plan(hub, actor, order_from(hub, checkpoint, order))


def _clone(hub: Hub, checkpoint: Checkpoint) -> schemas.Clone:
    """How the VM would be made, as the hypervisor says. Raises Conflict where the origin's VM is gone."""
    source = checkpoint.vmid
    if source is None or read.find_vm(hub.proxmox, source) is None:
        raise Conflict(
            f"VM {source}, which holds checkpoint '{checkpoint.uuid}', is not on the node '{hub.node}'; spawn from "
            "another checkpoint.",
            details={"vmid": source},
        )
    if checkpoint.artefact_kind == ArtefactKind.template:
        return schemas.Clone(strategy="template", source_vmid=source)
    is_linked = read.has_feature(hub.proxmox, source, "clone", checkpoint.snapshot)
    return schemas.Clone(strategy="linked" if is_linked else "full", source_vmid=source, snapshot=checkpoint.snapshot)


def _headroom(hub: Hub, session: Session, project: Project) -> schemas.Headroom:
    found = hub.ledger.tightest(session, Holder(project.uuid))
    money = found[Resource.money]
    return schemas.Headroom(
        money=schemas.MoneyRoom(
            remaining=None if money.headroom_micros is None else _money(hub, money.headroom_micros),
            limited_by=_scope(money),
        ),
        time_hours=_room(found, Resource.time_hours),
        api_calls=_room(found, Resource.api_calls),
    )


def _room(found: Mapping[Resource, Account], resource: Resource) -> schemas.Room:
    micros = found[resource].headroom_micros
    return schemas.Room(remaining=None if micros is None else micros / MICROS, limited_by=_scope(found[resource]))


def _scope(account: Account) -> Literal["system", "project"] | None:
    if account.limit_micros is None:
        return None
    return cast(Literal["system", "project"], str(account.scope))


def _estimate(machine: Machine) -> schemas.Estimate:
    kept = dict(machine.estimate or {})
    figures = kept.pop("money_micros")
    money = {name: schemas.MoneyAmount.of(Money(int(micros), machine.currency)) for name, micros in figures.items()}
    return schemas.Estimate(money=schemas.MoneyFigure(**money), **kept)


def _money(hub: Hub, micros: int) -> schemas.MoneyAmount:
    return schemas.MoneyAmount.of(Money(micros, hub.ledger.currency))
