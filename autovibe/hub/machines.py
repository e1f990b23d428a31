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

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Account, Allotment, Checkpoint, Machine, Operation, Project
from autovibe.domain.actor import Actor
from autovibe.domain.budget import LIFE, Scope
from autovibe.domain.columns import now
from autovibe.domain.machine import WANTED_TERMINATED
from autovibe.domain.machine_type import machine_type
from autovibe.errors import Conflict
from autovibe.guest import Address, Script
from autovibe.hub import Hub, files, projects, rules, spawning
from autovibe.hub.operations import Accepted, Once, Start, accept, unfinished
from autovibe.hub.pages import Cut, cut
from autovibe.store import inserts, rows
from autovibe.types import MICROS, CheckpointStatus, MachineStatus, Money, OperationKind, Resource
from autovibe.workflows import steps_of

_STOPPABLE = (MachineStatus.active, MachineStatus.working, MachineStatus.paused, MachineStatus.budget_blocked)
_BUSY = (MachineStatus.spawning, MachineStatus.checkpointing, MachineStatus.restoring)
_EXEC_STDIO_LIMIT = 1 << 20


def spawn(hub: Hub, actor: Actor, order: schemas.MachineOrder, once: Once | None = None) -> schemas.Machine:
    """A machine of the order's project, from the checkpoint it names or the project's current one.

    It holds the tail and a first slice of its project's budgets from now on. Raises InvalidRequest, NotFound, Conflict
    (name taken, checkpoint not ready), LimitExceeded (budgets, machines at a time, vmids), InsufficientSpace; nothing
    is recorded then.
    """
    rules.require_project(actor, order.project_uuid)
    kind = machine_type(order.type)
    placed = files.check(order.file_modifications)
    limits = spawning.constraints(order.resource_constraints, hub.ledger.currency)
    hub.require_space()
    base = spawning.base_of(hub, kind)

    made: list[schemas.Machine] = []  # what a repeat has not: its machine is asked for
    named = (order.project_uuid, order.checkpoint_uuid)

    def decide(session: Session, attempt: int) -> Accepted:
        project, checkpoint = rows.once(session, ("origin", *named), lambda: _origin(session, *named))
        machine = inserts.draft(
            Machine,
            name="",
            type=kind.name,
            project_uuid=project.uuid,
            checkpoint_uuid=checkpoint.uuid,
            prompt=order.prompt or None,
            file_modifications=placed,
            node=hub.node,
            progress="Waiting to be started.",
            **limits,
        )
        machine.name = spawning.free_name(session, machine, order.name, attempt)
        spawning.appraise(hub, machine, kind, spawning.disk_gb(session, project, checkpoint, kind), base)
        for refusal in spawning.limits(hub, session, project):
            raise refusal
        start = Start(uuid4(), OperationKind.spawn)
        operation = {
            "uuid": start.uuid,
            "kind": start.kind,
            "steps": steps_of(OperationKind.spawn),
            "object_uuid": machine.uuid,
            "machine_uuid": machine.uuid,
            "actor": actor.name,
            "order": {"checkpoint_uuid": str(checkpoint.uuid)},
        }
        machine.operation_uuid = start.uuid
        moment = rows.once(session, ("moment",), now)  # spawns that share the transaction share the day
        hub.ledger.reserve_machine(session, machine, hub.tail_seconds, moment, is_new=True)
        # Now that the pool's accounts are held: on PostgreSQL spawns of two projects would choose the same ones.
        machine.vmid = spawning.free_vmid(session, hub.vmids, attempt)
        inserts.later(session, Machine, inserts.values_of(machine))
        inserts.later(session, Operation, operation)
        inserts.later(session, Allotment, {"vmid": machine.vmid or 0, "owner_uuid": machine.uuid})
        _changed(session, machine, actor)
        made[:] = [_wire(machine, 0, {})]
        return Accepted(machine.uuid, start)

    # Those of one project and origin hold the same rows.
    uuid = accept(hub, actor, once, "machine", decide, group="spawn {} {}".format(*named))
    return made[0] if made and made[0].uuid == uuid else show(hub, uuid)


def _origin(session: Session, project_uuid: UUID, checkpoint_uuid: UUID | None) -> tuple[Project, Checkpoint]:
    project = projects.locked(session, project_uuid)
    spawning.require_active(project)
    return project, spawning.origin(session, project, checkpoint_uuid)


def spawn_from(
    hub: Hub, actor: Actor, checkpoint: UUID, order: schemas.SpawnFromCheckpointOrder, once: Once | None = None
) -> schemas.Machine:
    """A machine of the checkpoint's own project. Raises as `spawn` does."""
    return spawn(hub, actor, order_from(hub, checkpoint, order), once)


def order_from(hub: Hub, checkpoint: UUID, order: schemas.SpawnFromCheckpointOrder) -> schemas.MachineOrder:
    """The order with the checkpoint and its project. Raises NotFound."""
    with hub.store.reading() as session:
        project = rows.get(session, Checkpoint, checkpoint).project_uuid
    fields = {name: getattr(order, name) for name in type(order).model_fields}
    return schemas.MachineOrder(**fields, project_uuid=project, checkpoint_uuid=checkpoint)


def terminate(hub: Hub, actor: Actor, uuid: UUID, order: schemas.TerminateOrder, once: Once | None = None) -> UUID:
    """End the machine; with a final checkpoint where asked. Idempotent. Raises NotFound."""

    def decide(session: Session, _attempt: int) -> Accepted:
        machine = rows.held(session, Machine, uuid)
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
        MachineStatus.budget_blocked: " It has reached a limit; raise that, and resume it.",
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
    actor: Actor,
    part: Cut,
    *,
    statuses: Sequence[MachineStatus] = (),
    project: UUID | None = None,
    name: str | None = None,
) -> schemas.MachinePage:
    """Last spawned first; ties by uuid."""
    statement = select(Machine)
    project = rules.own_project(actor, project)
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
    uuids = [machine.uuid for machine in machines]
    checkpoints: Any = (
        select(Checkpoint.machine_uuid, func.count())
        .where(col(Checkpoint.machine_uuid).in_(uuids), Checkpoint.status == CheckpointStatus.ready)
        .group_by(col(Checkpoint.machine_uuid))
    )
    counts: dict[UUID, int] = dict(session.exec(checkpoints).all())
    accounts = select(Account.owner_uuid, Account.resource, Account.used_micros).where(
        Account.scope == Scope.machine, col(Account.owner_uuid).in_(uuids), Account.period == LIFE
    )
    used: dict[UUID, dict[str, int]] = {uuid: {} for uuid in uuids}
    for uuid, resource, amount in session.exec(accounts).all():
        used[uuid][resource] = amount
    return [_wire(machine, counts.get(machine.uuid, 0), used[machine.uuid]) for machine in machines]


def _wire(machine: Machine, checkpoints: int, used: Mapping[str, int]) -> schemas.Machine:
    money = machine.max_money_micros
    shown = {name: getattr(machine, name) for name in _SAME}
    return schemas.Machine(
        **shown,
        status=MachineStatus(machine.status),
        resource_constraints=schemas.ConstraintsReply(
            max_money=None if money is None else schemas.MoneyAmount.of(Money(money, machine.currency)),
            max_time_minutes=machine.max_time_minutes,
            max_api_calls=machine.max_api_calls,
        ),
        resource_usage=_usage(machine, used),
        checkpoint_count=checkpoints,
    )


def _usage(machine: Machine, used: Mapping[str, int]) -> schemas.ResourceUsage:
    """What was estimated, and what the ledger has charged the machine with until `metered_at`."""
    expected = machine.estimate or {}

    def estimated(name: str) -> float | None:
        return float(expected[name]["value"]) if name in expected else None

    money = estimated("money_micros")
    return schemas.ResourceUsage(
        money=schemas.MoneyUsage(
            estimated=None if money is None else schemas.MoneyAmount.of(Money(int(money), machine.currency)),
            actual=schemas.MoneyAmount.of(Money(used.get(Resource.money, 0), machine.currency)),
        ),
        time_minutes=schemas.Usage(
            estimated=estimated("time_minutes"), actual=round(used.get(Resource.time_hours, 0) * 60 / MICROS, 3)
        ),
        api_calls=schemas.Usage(estimated=estimated("api_calls"), actual=used.get(Resource.api_calls, 0) / MICROS),
        cpu_hours=schemas.Usage(estimated=estimated("cpu_hours"), actual=used.get(Resource.cpu_hours, 0) / MICROS),
    )


_SAME = tuple(name for name in schemas.Machine.model_fields if name in Machine.model_fields and name != "status")
