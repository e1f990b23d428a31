"""Blocking a machine at a limit, and letting it go on.

    active working      -> checkpointing -> budget_blocked     block: accepted by metering, or after a refused report
    budget_blocked      -> restoring -> active working         resume: asked for, or by upkeep when a daily limit allows

`Machine.blocked` says at which limit: {scope, resource, period, limit_micros, reason, checkpoint_uuid}, and after the
block what it takes to go on. A resumed machine that meets the same limit again is blocked again.
"""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID, uuid4

from sqlmodel import Session, select

from autovibe import schemas
from autovibe.domain import Checkpoint, Machine, Operation
from autovibe.domain.actor import Actor
from autovibe.domain.budget import DAILY, SYSTEM, Scope, day_of
from autovibe.domain.checkpoint import details_of
from autovibe.domain.columns import now
from autovibe.domain.machine import WANTED_TERMINATED
from autovibe.errors import Conflict, LimitExceeded
from autovibe.hub import Hub
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.store import rows
from autovibe.store.ledger import Key
from autovibe.types import CheckpointType, MachineStatus, OperationKind, Resource
from autovibe.workflows import steps_of

logger = logging.getLogger(__name__)

UPKEEP = Actor("upkeep")
BLOCKABLE = (MachineStatus.active, MachineStatus.working)
WARNED_PERCENT = 80
"""Of a limit: whoever is blocked at it was warned from there on."""


def block(hub: Hub, uuid: UUID, limit: LimitExceeded) -> bool:
    """Have the machine frozen, checkpointed and switched off because of that limit. False when it does not run now."""
    made: list[UUID] = []

    def decide(session: Session, _attempt: int) -> Accepted:
        machine = rows.held(session, Machine, uuid)
        if machine.status not in BLOCKABLE or machine.wanted == WANTED_TERMINATED:
            return Accepted(uuid)
        checkpoint = _checkpoint(hub, machine)
        operation = Operation(
            kind=OperationKind.block,
            steps=steps_of(OperationKind.block),
            object_uuid=uuid,
            machine_uuid=uuid,
            actor=UPKEEP.name,
            order={"checkpoint_uuid": str(checkpoint.uuid)},
        )
        checkpoint.operation_uuid = machine.operation_uuid = operation.uuid
        machine.status, machine.resume_status = MachineStatus.checkpointing, MachineStatus.budget_blocked
        machine.blocked = {**_limit(limit), "checkpoint_uuid": str(checkpoint.uuid)}
        machine.updated_at = now()
        session.add_all([machine, checkpoint, operation])
        _warn(hub, session, machine, limit)
        rows.record(session, "budget.exceeded", uuid, machine.project_uuid, **_limit(limit))
        rows.record(session, "machine.status", uuid, machine.project_uuid, status=str(machine.status))
        made.append(operation.uuid)
        return Accepted(uuid, operation)

    accept(hub, UPKEEP, None, "block", decide)
    return bool(made)


def _limit(limit: LimitExceeded) -> dict[str, Any]:
    names = ("scope", "resource", "period", "limit_micros")
    return {name: limit.details.get(name) for name in names} | {"reason": limit.message}


def _warn(hub: Hub, session: Session, machine: Machine, limit: LimitExceeded) -> None:
    """Of a limit that is small beside the tail no warning came by its use; it then comes together with the block."""
    scope, resource, period = (limit.details.get(name) for name in ("scope", "resource", "period"))
    if resource not in DAILY or not period:
        return
    scope = Scope(str(scope))
    owners = {Scope.system: SYSTEM, Scope.project: machine.project_uuid, Scope.machine: machine.uuid}
    account = hub.ledger.look(session, Key(scope, owners[scope], period, Resource(resource)))
    if not account.limit_micros or account.warned_percent >= WARNED_PERCENT:
        return
    rows.record(
        session,
        "budget.warning",
        machine.uuid if scope == Scope.machine else machine.project_uuid,
        machine.project_uuid,
        scope=str(scope),
        resource=str(resource),
        percent=100 * account.used_micros // account.limit_micros,
        used_micros=account.used_micros,
        limit_micros=account.limit_micros,
    )


def _checkpoint(hub: Hub, machine: Machine) -> Checkpoint:
    return Checkpoint(
        uuid=uuid4(),
        project_uuid=machine.project_uuid,
        parent_uuid=machine.last_checkpoint_uuid or machine.checkpoint_uuid,
        machine_uuid=machine.uuid,
        type=CheckpointType.automatic,
        description=f"Machine '{machine.name}' at its limit.",
        node=machine.node,
        vmid=machine.vmid,
        storage=hub.storage,
        details=details_of("budget", machine),
    )


def resume(
    hub: Hub, actor: Actor, uuid: UUID, order: schemas.ResumeOrder | None = None, once: Once | None = None
) -> UUID:
    """Let a blocked machine go on, with other constraints where they are given.

    Raises NotFound, Conflict for a machine that is not blocked, LimitExceeded when its tail and a slice of time do not
    fit into its budgets; its constraints then stay as they were.
    """

    def decide(session: Session, _attempt: int) -> Accepted:
        machine = rows.held(session, Machine, uuid)
        if machine.wanted == WANTED_TERMINATED:
            raise Conflict(f"Machine '{machine.name}' is being terminated.", details={"status": machine.status})
        if machine.status != MachineStatus.budget_blocked:
            raise Conflict(
                f"Machine '{machine.name}' is {machine.status} and cannot be resumed; that takes a machine that is "
                "blocked at a limit.",
                details={"status": machine.status},
            )
        if order is not None and order.resource_constraints is not None:
            _constrain(hub, session, machine, order.resource_constraints)
        return Accepted(uuid, resume_in(hub, session, machine, actor))

    return accept(hub, actor, once, "resume", decide)


def resume_in(hub: Hub, session: Session, machine: Machine, actor: Actor) -> Operation:
    """Reserve anew and record the operation, within a transaction that holds the machine. Raises LimitExceeded."""
    hub.ledger.reserve_machine(session, machine, hub.tail_seconds)
    operation = Operation(
        kind=OperationKind.resume,
        steps=steps_of(OperationKind.resume),
        object_uuid=machine.uuid,
        machine_uuid=machine.uuid,
        actor=actor.name,
    )
    machine.operation_uuid = operation.uuid
    machine.status, machine.updated_at = MachineStatus.restoring, now()
    session.add_all([machine, operation])
    rows.record(
        session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status), actor=actor.name
    )
    return operation


def _constrain(hub: Hub, session: Session, machine: Machine, given: schemas.ResourceConstraints) -> None:
    """What is given replaces the machine's own constraint, null takes it away; the rest stays."""
    if "max_money" in given.model_fields_set:
        money = given.max_money.to_money(hub.ledger.currency) if given.max_money is not None else None
        machine.max_money_micros = None if money is None else money.micros
    if "max_time_minutes" in given.model_fields_set:
        machine.max_time_minutes = given.max_time_minutes
    if "max_api_calls" in given.model_fields_set:
        machine.max_api_calls = given.max_api_calls
    session.add(machine)
    session.flush()
    hub.ledger.refit_machine(session, machine)


def resume_allowed(hub: Hub) -> None:
    """Resume the machines that a daily limit blocked, where a new day has begun or the limit was raised since.

    Once a day and raise: a machine whose resume failed waits for the next one, or for somebody who asks.
    """
    with hub.store.reading() as session:
        blocked = [row for row in session.exec(_blocked()) if _is_allowed(hub, session, row)]
    for machine in blocked:
        _resume_again(hub, machine.uuid)


def _blocked() -> Any:
    return select(Machine).where(Machine.status == MachineStatus.budget_blocked, Machine.wanted != WANTED_TERMINATED)


def _is_allowed(hub: Hub, session: Session, machine: Machine) -> bool:
    limit = machine.blocked or {}
    key = _daily(machine, limit)
    if key is None:
        return False
    before = limit.get("tried") or {"period": limit.get("period"), "limit_micros": limit.get("limit_micros")}
    if key.period != before["period"]:
        return True
    present = hub.ledger.look(session, key).limit_micros
    known = before["limit_micros"]
    return known is not None and (present is None or present > known)


def _daily(machine: Machine, limit: dict[str, Any]) -> Key | None:
    """Today's account of what blocked the machine; None for other limits, which somebody raises."""
    if limit.get("scope") not in (Scope.system, Scope.project) or limit.get("resource") not in DAILY:
        return None
    scope = Scope(limit["scope"])
    owner = SYSTEM if scope == Scope.system else machine.project_uuid
    return Key(scope, owner, day_of(now()), Resource(limit["resource"]))


def _resume_again(hub: Hub, uuid: UUID) -> None:
    def decide(session: Session, _attempt: int) -> Accepted:
        machine = rows.held(session, Machine, uuid)
        key = _daily(machine, machine.blocked or {})
        if key is None or machine.status != MachineStatus.budget_blocked or not _is_allowed(hub, session, machine):
            return Accepted(uuid)
        operation = resume_in(hub, session, machine, UPKEEP)
        tried = {"period": key.period, "limit_micros": hub.ledger.look(session, key).limit_micros}
        machine.blocked = {**(machine.blocked or {}), "tried": tried}
        session.add(machine)
        return Accepted(uuid, operation)

    try:
        accept(hub, UPKEEP, None, "resume", decide)
    except LimitExceeded as error:
        logger.debug("Machine %s stays blocked: %s", uuid, error.message)
