"""Machines: spawn, show, list, terminate, exec.

Each verb decides on the machine's row, which is also its lock:

    spawn        (nothing)                                   -> spawning
    terminate    active working paused budget_blocked        -> terminating
                 spawning checkpointing restoring            stays, wanted=terminated: the running operation hands over
                 failed, its VM not removed yet              -> terminating, without a final checkpoint
                 terminating terminated failed               stays; the answer is the machine as it is
    exec         active working                              stays; checkpointing and restoring are waited for
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Allotment, Checkpoint, Machine, Operation, Project
from autovibe.domain.actor import Actor
from autovibe.domain.columns import now
from autovibe.domain.machine import WANTED_TERMINATED
from autovibe.domain.machine_type import machine_type
from autovibe.errors import Conflict, InvalidRequest, LimitExceeded
from autovibe.guest import Address, Script
from autovibe.hub import Hub, files
from autovibe.hub.operations import Accepted, Once, accept, unfinished
from autovibe.hub.pages import Cut, cut
from autovibe.store import rows
from autovibe.types import CheckpointStatus, MachineStatus, Money, OperationKind, ProjectStatus
from autovibe.workflows import steps_of

_STOPPABLE = (MachineStatus.active, MachineStatus.working, MachineStatus.paused, MachineStatus.budget_blocked)
_BUSY = (MachineStatus.spawning, MachineStatus.checkpointing, MachineStatus.restoring)
_EXEC_STDIO_LIMIT = 1 << 20


def spawn(hub: Hub, actor: Actor, order: schemas.MachineOrder, once: Once | None = None) -> schemas.Machine:
    """A machine of the order's project, from the checkpoint it names or the project's current one.

    Raises InvalidRequest, NotFound, Conflict (name taken, checkpoint not ready), LimitExceeded (no vmid is free),
    InsufficientSpace.
    """
    kind = machine_type(order.type)
    placed = files.check(order.file_modifications)
    hub.require_space()

    def decide(session: Session, attempt: int) -> Accepted:
        project = rows.get(session, Project, order.project_uuid)
        checkpoint = _origin(session, project, order.checkpoint_uuid)
        machine = Machine(
            name="",
            type=kind.name,
            project_uuid=project.uuid,
            checkpoint_uuid=checkpoint.uuid,
            prompt=order.prompt or None,
            file_modifications=placed,
            node=hub.node,
            vmid=_free_vmid(session, hub.vmids, attempt),
            progress="Waiting to be started.",
            **_constraints(order.resource_constraints),
        )
        machine.name = _free_name(session, machine, order.name)
        operation = Operation(
            kind=OperationKind.spawn,
            steps=steps_of(OperationKind.spawn),
            object_uuid=machine.uuid,
            machine_uuid=machine.uuid,
            actor=actor.name,
            order={"checkpoint_uuid": str(checkpoint.uuid)},
        )
        machine.operation_uuid = operation.uuid
        session.add_all([machine, operation, Allotment(vmid=machine.vmid or 0, owner_uuid=machine.uuid)])
        _changed(session, machine, actor)
        return Accepted(machine.uuid, operation)

    return show(hub, accept(hub, actor, once, "machine", decide))


def spawn_from(
    hub: Hub, actor: Actor, checkpoint: UUID, order: schemas.SpawnFromCheckpointOrder, once: Once | None = None
) -> schemas.Machine:
    """A machine of the checkpoint's own project. Raises as `spawn` does."""
    with hub.store.reading() as session:
        project = rows.get(session, Checkpoint, checkpoint).project_uuid
    fields = {name: getattr(order, name) for name in type(order).model_fields}
    return spawn(hub, actor, schemas.MachineOrder(**fields, project_uuid=project, checkpoint_uuid=checkpoint), once)


def _origin(session: Session, project: Project, wanted: UUID | None) -> Checkpoint:
    if project.status != ProjectStatus.active:
        raise Conflict(f"Project '{project.name}' is {project.status}; machines are spawned in active projects only.")
    uuid = wanted or project.current_checkpoint_uuid
    if uuid is None:
        raise Conflict(f"Project '{project.name}' has no current checkpoint; name one in 'checkpoint_uuid'.")
    checkpoint = rows.get(session, Checkpoint, uuid)
    if checkpoint.project_uuid != project.uuid:
        raise InvalidRequest(
            f"Checkpoint '{checkpoint.uuid}' belongs to another project; name one of project '{project.name}'.",
            details={"field": "checkpoint_uuid"},
        )
    if checkpoint.status != CheckpointStatus.ready:
        raise Conflict(f"Checkpoint '{checkpoint.uuid}' is {checkpoint.status}; only a ready one can be spawned from.")
    return checkpoint


def _constraints(given: schemas.ResourceConstraints) -> dict[str, Any]:
    money = given.max_money.to_money() if given.max_money is not None else None
    return {
        "max_money_micros": money.micros if money is not None else None,
        "currency": money.currency if money is not None else "USD",
        "max_time_minutes": given.max_time_minutes,
        "max_api_calls": given.max_api_calls,
    }


def _free_name(session: Session, machine: Machine, wanted: str | None) -> str:
    def is_taken(name: str) -> bool:
        statement = select(Machine.uuid).where(Machine.name == name, col(Machine.ended_at).is_(None))
        return session.exec(statement).first() is not None

    if wanted is not None:
        if is_taken(wanted):
            raise Conflict(f"There is already a machine '{wanted}'; choose another name.", details={"field": "name"})
        return wanted
    kind = machine.type.replace("_", "-")
    name = f"{kind}-{machine.uuid.hex[:4]}"
    while is_taken(name):
        name = f"{kind}-{secrets.token_hex(4)}"
    return name


def _free_vmid(session: Session, vmids: range, attempt: int) -> int:
    """The lowest free vmid; after a collision one of the lowest few at random, so that many spawns part quickly."""
    statement = select(Allotment.vmid).where(Allotment.vmid >= vmids.start, Allotment.vmid < vmids.stop)
    taken = set(session.exec(statement))
    free: list[int] = []
    for vmid in vmids:
        if vmid not in taken:
            free.append(vmid)
            if len(free) > 2 * attempt:
                break
    if not free:
        raise LimitExceeded(
            f"Every vmid from {vmids.start} to {vmids.stop - 1} is taken; terminate machines, or widen the range by "
            "the settings 'vmid_first' and 'vmid_last'.",
            details={"vmid_first": vmids.start, "vmid_last": vmids.stop - 1},
        )
    return secrets.choice(free)


def terminate(hub: Hub, actor: Actor, uuid: UUID, order: schemas.TerminateOrder, once: Once | None = None) -> UUID:
    """End the machine; with a final checkpoint where asked. Idempotent. Raises NotFound."""

    def decide(session: Session, _attempt: int) -> Accepted:
        machine = locked(session, uuid)
        is_left_over = machine.status == MachineStatus.failed and _has_vmid(session, uuid)
        is_endable = is_left_over or machine.status in (*_STOPPABLE, *_BUSY)
        if not is_endable or unfinished(session, uuid, OperationKind.terminate) is not None:
            return Accepted(uuid)
        with_checkpoint = order.create_checkpoint and not is_left_over
        operation = Operation(
            kind=OperationKind.terminate,
            steps=steps_of(OperationKind.terminate, with_checkpoint=with_checkpoint),
            object_uuid=uuid,
            machine_uuid=uuid,
            actor=actor.name,
            order={"create_checkpoint": with_checkpoint, "reason": order.reason},
        )
        session.add(operation)
        if is_left_over or machine.status in _STOPPABLE:
            machine.resume_status, machine.status = machine.status, MachineStatus.terminating
            machine.operation_uuid = operation.uuid
        machine.wanted = WANTED_TERMINATED
        machine.termination_reason = order.reason
        machine.updated_at = now()
        _changed(session, machine, actor)
        return Accepted(uuid, operation)

    return accept(hub, actor, once, "termination", decide)


def _has_vmid(session: Session, machine: UUID) -> bool:
    """Whether a vmid is still allotted to the machine: it has, or may have, a VM."""
    return session.exec(select(Allotment.vmid).where(Allotment.owner_uuid == machine)).first() is not None


def locked(session: Session, uuid: UUID) -> Machine:
    """The machine, held until the end of the transaction. Raises NotFound."""
    session.exec(select(Machine.uuid).where(Machine.uuid == uuid).with_for_update()).first()
    return rows.get(session, Machine, uuid)


def _changed(session: Session, machine: Machine, actor: Actor) -> None:
    rows.record(
        session, "machine.status", machine.uuid, machine.project_uuid, status=str(machine.status), actor=actor.name
    )


def can_exec(hub: Hub, uuid: UUID) -> bool:
    """Whether exec may begin now; False while the machine is checkpointed or restored, which passes.

    Raises NotFound, and Conflict for a state that does not pass into a reachable one.
    """
    with hub.store.reading() as session:
        machine = rows.get(session, Machine, uuid)
    if machine.status in (MachineStatus.checkpointing, MachineStatus.restoring):
        return False
    if machine.status in (MachineStatus.active, MachineStatus.working):
        return True
    remedy = {
        MachineStatus.spawning: " It is not reachable yet; wait until it is active.",
        MachineStatus.terminated: " Spawn a new one, for example from its last checkpoint.",
        MachineStatus.failed: " Its 'error_message' says why; spawn a new one.",
    }.get(MachineStatus(machine.status), "")
    raise Conflict(
        f"Machine '{machine.name}' is {machine.status} and cannot run commands.{remedy}",
        details={"status": machine.status},
    )


def exec(hub: Hub, uuid: UUID, order: schemas.ExecOrder) -> schemas.ExecResult:
    """Run a command in the guest and wait for its end; holds a thread, so the door runs it in `hub.conversations`.

    Raises Conflict when the machine is not reachable now, GuestUnreachable.
    """
    if not can_exec(hub, uuid):
        raise Conflict(
            f"Machine '{uuid}' was busy with a checkpoint for the {order.timeout_seconds:g} s this command may take; "
            "try again."
        )
    result = hub.guests.exec(
        _address(hub, uuid),
        Script(order.script) if order.script is not None else list(order.argv or ()),
        user=order.user if "user" in order.model_fields_set else None,  # None: the guest's own user
        cwd=order.cwd or "/workspace",
        env=order.env,
        timeout_seconds=order.timeout_seconds,
        output_limit=_EXEC_STDIO_LIMIT,
    )
    return schemas.ExecResult(
        exit_status=result.exit_status,
        stdout=result.stdout.decode(errors="replace"),
        stderr=result.stderr.decode(errors="replace"),
        truncated=result.truncated,
        duration_ms=int(result.duration_ms),
    )


def ssh(hub: Hub, uuid: UUID) -> schemas.MachineSsh:
    """How OpenSSH reaches the machine. Raises NotFound, Conflict for a machine that has no guest now."""
    address = _address(hub, uuid)
    return schemas.MachineSsh(host=address.host, port=address.port, user=address.user, host_key=address.host_key)


def _address(hub: Hub, uuid: UUID) -> Address:
    with hub.store.reading() as session:
        machine = rows.get(session, Machine, uuid)
    if MachineStatus(machine.status).is_final:
        raise Conflict(f"Machine '{machine.name}' is {machine.status} and has no guest.")
    return hub.address_of(machine)


def show(hub: Hub, uuid: UUID) -> schemas.Machine:
    """Raises NotFound."""
    with hub.store.reading() as session:
        return _shown(session, [rows.get(session, Machine, uuid)])[0]


def show_terminated(hub: Hub, uuid: UUID) -> tuple[schemas.TerminateReply, bool]:
    """The machine with its final checkpoint, null until that is made, and whether its terminate is over.

    A machine whose terminate is over and which has not ended was given back: its operation says why. Raises NotFound.
    """
    with hub.store.reading() as session:
        machine = rows.get(session, Machine, uuid)
        shown = _shown(session, [machine])[0]
        is_over = shown.status.is_final or unfinished(session, uuid, OperationKind.terminate) is None
    return schemas.TerminateReply(**dict(shown), final_checkpoint_uuid=machine.final_checkpoint_uuid), is_over


def index(
    hub: Hub,
    part: Cut,
    *,
    statuses: Sequence[MachineStatus] = (),
    project: UUID | None = None,
    name: str | None = None,
) -> schemas.MachinePage:
    """Last spawned first; ties by uuid."""
    statement = select(Machine)
    if statuses:
        statement = statement.where(col(Machine.status).in_(list(statuses)))
    if project is not None:
        statement = statement.where(Machine.project_uuid == project)
    if name is not None:
        statement = statement.where(Machine.name == name)
    with hub.store.reading() as session:
        found = cut(session, statement.order_by(col(Machine.spawned_at).desc(), col(Machine.uuid)), part)
        return schemas.MachinePage(machines=_shown(session, found.rows), **found.page())


def _shown(session: Session, machines: Sequence[Machine]) -> list[schemas.Machine]:
    statement: Any = (
        select(Checkpoint.machine_uuid, func.count())
        .where(
            col(Checkpoint.machine_uuid).in_([m.uuid for m in machines]), Checkpoint.status == CheckpointStatus.ready
        )
        .group_by(col(Checkpoint.machine_uuid))
    )
    counts: dict[UUID, int] = dict(session.exec(statement).all())
    return [_wire(machine, counts.get(machine.uuid, 0)) for machine in machines]


def _wire(machine: Machine, checkpoints: int) -> schemas.Machine:
    money = machine.max_money_micros
    minutes = None
    if machine.running_at is not None:
        minutes = round(((machine.ended_at or now()) - machine.running_at).total_seconds() / 60, 3)
    shown = {name: getattr(machine, name) for name in _SAME}
    return schemas.Machine(
        **shown,
        status=MachineStatus(machine.status),
        resource_constraints=schemas.ConstraintsReply(
            max_money=None if money is None else schemas.MoneyAmount.of(Money(money, machine.currency)),
            max_time_minutes=machine.max_time_minutes,
            max_api_calls=machine.max_api_calls,
        ),
        resource_usage=schemas.ResourceUsage(time_minutes=schemas.Usage(actual=minutes)),
        checkpoint_count=checkpoints,
    )


_SAME = tuple(name for name in schemas.Machine.model_fields if name in Machine.model_fields and name != "status")
