"""What a spawn decides, for itself and for its plan: origin, name, vmid, price, estimate, and what stands against it.

The functions that look for something raise what stands against it; `limits` tells all that does. A spawn is refused for
the first of them, a plan names each.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam
from sqlmodel import Session, col, func, select

from autovibe import schemas
from autovibe.domain import Account, Allotment, Checkpoint, Machine, Project
from autovibe.domain.budget import LIFE, Scope, Shape, explicit_limits
from autovibe.domain.columns import now
from autovibe.domain.estimate import HISTORY_DAYS, HISTORY_MACHINES, Base, default_base, estimate
from autovibe.domain.machine_type import MachineType
from autovibe.errors import AutovibeError, Conflict, InvalidRequest, LimitExceeded
from autovibe.hub import Hub, storage_limits
from autovibe.store import inserts, rows
from autovibe.types import CheckpointStatus, MachineStatus, ProjectStatus, Resource

DEFAULT_DISK_GB = 10.0
"""The disk of a machine whose origin does not tell its own; metering then finds the real one."""

_TAKEN: Any = select(func.max(Allotment.vmid), func.count()).where(
    Allotment.vmid >= bindparam("first"), Allotment.vmid < bindparam("stop")
)

_CHECKPOINT = select(Checkpoint).where(Checkpoint.uuid == bindparam("uuid"))

_NAMED = select(Machine.uuid).where(Machine.name == bindparam("name"), col(Machine.ended_at).is_(None))

_HISTORY_SECONDS = 60.0  # how long an average is taken for true


def require_active(project: Project) -> None:
    """Raises Conflict."""
    if project.status != ProjectStatus.active:
        raise Conflict(f"Project '{project.name}' is {project.status}; machines are spawned in active projects only.")


def origin(session: Session, project: Project, wanted: UUID | None) -> Checkpoint:
    """The checkpoint to begin with. Raises Conflict, InvalidRequest, NotFound."""
    uuid = wanted or project.current_checkpoint_uuid
    if uuid is None:
        raise Conflict(f"Project '{project.name}' has no current checkpoint; name one in 'checkpoint_uuid'.")
    checkpoint = session.exec(_CHECKPOINT, params={"uuid": uuid}).first() or rows.get(session, Checkpoint, uuid)
    if checkpoint.project_uuid != project.uuid:
        raise InvalidRequest(
            f"Checkpoint '{checkpoint.uuid}' belongs to another project; name one of project '{project.name}'.",
            details={"field": "checkpoint_uuid"},
        )
    if checkpoint.status != CheckpointStatus.ready:
        raise Conflict(f"Checkpoint '{checkpoint.uuid}' is {checkpoint.status}; only a ready one can be spawned from.")
    return checkpoint


def constraints(given: schemas.ResourceConstraints, currency: str) -> dict[str, Any]:
    """The machine's columns of its own limits. Raises InvalidRequest for money of another currency."""
    money = given.max_money.to_money(currency) if given.max_money is not None else None
    return {
        "max_money_micros": money.micros if money is not None else None,
        "currency": currency,
        "max_time_minutes": given.max_time_minutes,
        "max_api_calls": given.max_api_calls,
    }


def free_name(session: Session, machine: Machine, wanted: str | None, attempt: int) -> str:
    """The wanted name, or one that is made up, which is hardly ever taken: looked up after a collision. Raises
    Conflict.
    """

    def is_taken(name: str) -> bool:
        is_anew = any(row["name"] == name for row in inserts.waiting(session, Machine))
        return is_anew or session.connection().execute(_NAMED, {"name": name}).first() is not None

    if wanted is not None:
        if is_taken(wanted):
            raise Conflict(f"There is already a machine '{wanted}'; choose another name.", details={"field": "name"})
        return wanted
    kind = machine.type.replace("_", "-")
    name = f"{kind}-{machine.uuid.hex[:6]}"
    while attempt and is_taken(name):
        name = f"{kind}-{secrets.token_hex(4)}"
    return name


def free_vmid(session: Session, vmids: range, attempt: int) -> int:
    """The lowest free vmid; after a collision one of the lowest few at random, so that many spawns part quickly."""
    free = _lowest_free(session, vmids) if attempt == 0 else _free_few(session, vmids, 2 * attempt + 1)
    if not free:
        raise LimitExceeded(
            f"Every vmid from {vmids.start} to {vmids.stop - 1} is taken; terminate machines, or widen the range by "
            "the settings 'vmid_first' and 'vmid_last'.",
            details={"vmid_first": vmids.start, "vmid_last": vmids.stop - 1},
        )
    return secrets.choice(free)


def _lowest_free(session: Session, vmids: range) -> list[int]:
    """One vmid or none: behind the taken ones where they leave no gap, or in the first gap."""
    among = {"first": vmids.start, "stop": vmids.stop}
    row: Any = rows.once(session, ("taken", vmids), lambda: session.connection().execute(_TAKEN, among).one())
    anew = _anew(session, vmids)
    last, count = max([row[0] or 0, *anew]), row[1] + len(anew)
    if count == 0:
        return [vmids.start]
    if last - vmids.start + 1 > count:
        return _free_few(session, vmids, 1)
    return [last + 1] if last + 1 < vmids.stop else []


def _free_few(session: Session, vmids: range, most: int) -> list[int]:
    taken = set(session.exec(select(Allotment.vmid).where(Allotment.vmid >= vmids.start, Allotment.vmid < vmids.stop)))
    taken |= set(_anew(session, vmids))
    return list(islice((vmid for vmid in vmids if vmid not in taken), most))


def _anew(session: Session, vmids: range) -> list[int]:
    """What other spawns of this transaction have taken."""
    return [row["vmid"] for row in inserts.waiting(session, Allotment) if row["vmid"] in vmids]


# Price and estimate


def appraise(hub: Hub, machine: Machine, kind: MachineType, disk_gb: float, base: Base) -> None:
    """Give the machine the price of an hour of its VM, and what it is expected to use."""
    world = hub.workflows.world
    shape = Shape(kind.cores or world.cores, (kind.memory_mb or world.memory_mb) / 1024, disk_gb)
    machine.price_micros = hub.prices.per_hour(shape, kind.price_class)
    machine.estimate = estimate(machine, base, machine.price_micros).to_dict()


def disk_gb(session: Session, project: Project, checkpoint: Checkpoint | None, kind: MachineType) -> float:
    """The size of the disk, as the type, the checkpoint or the project's image tells it."""
    if kind.disk_gb is not None:
        return float(kind.disk_gb)
    for uuid in (checkpoint.uuid if checkpoint is not None else None, project.initial_checkpoint_uuid):
        is_known = checkpoint is not None and uuid == checkpoint.uuid
        found = checkpoint if is_known else session.get(Checkpoint, uuid) if uuid is not None else None
        if found is not None and found.details.get("disk_gb"):
            return float(found.details["disk_gb"])
    return DEFAULT_DISK_GB


def base_of(hub: Hub, kind: MachineType) -> Base:
    """The base of a type's estimates; looked up once a minute."""
    known = hub.bases.get(kind.name)
    if known is None or known[0] < time.monotonic() - _HISTORY_SECONDS:
        with hub.store.reading() as session:
            found = _history(session, kind.name)
        known = hub.bases[kind.name] = (time.monotonic(), found)
    return known[1] if known[1].n else default_base(kind.base_money)


def _history(session: Session, kind: str) -> Base:
    """What the machines of that type that ended lately used of money beside their VMs, on average."""
    ended: Any = (
        select(Machine.uuid, Machine.price_micros)
        .where(Machine.type == kind, col(Machine.ended_at) >= now() - timedelta(days=HISTORY_DAYS))
        .where(col(Machine.running_at).is_not(None))
        .order_by(col(Machine.ended_at).desc())
        .limit(HISTORY_MACHINES)
        .subquery()
    )
    used: Any = (
        select(
            ended.c.uuid,
            ended.c.price_micros,
            func.sum(Account.used_micros).filter(col(Account.resource) == Resource.money),
            func.sum(Account.used_micros).filter(col(Account.resource) == Resource.time_hours),
        )
        .join(Account, (Account.scope == Scope.machine) & (Account.owner_uuid == ended.c.uuid))
        .where(Account.period == LIFE)
        .group_by(ended.c.uuid, ended.c.price_micros)
    )
    beside = [
        max(int(money or 0) - price * int(hours or 0) // 1_000_000, 0)
        for _, price, money, hours in session.exec(used).all()
    ]
    return Base(sum(beside) // len(beside), len(beside)) if beside else Base(0)


# Limits


def limits(hub: Hub, session: Session, project: Project) -> Iterator[AutovibeError]:
    """What of the project's limits stands against one more machine, its daily budgets aside."""
    most = project.max_concurrent_machines
    if most is not None and (count := _living(session, project)) >= most:
        yield LimitExceeded(
            f"Project '{project.name}' has {count} machines, and at most {most} at a time; terminate one, or raise "
            "its 'max_concurrent_machines'.",
            details={"scope": "project", "resource": "machines", "limit": most, "used": count},
        )
    if project.greediness == 0 and hub.ledger.pool and not explicit_limits(project):
        yield LimitExceeded(
            f"Project '{project.name}' has a greediness of 0 and so no share of the pool; raise it, or give the "
            "project a budget of its own.",
            details={"scope": "project", "resource": "greediness", "limit": 0},
        )
    try:
        storage_limits.require_room(session, project)
    except LimitExceeded as error:
        yield error


def _living(session: Session, project: Project) -> int:
    final = [status for status in MachineStatus if status.is_final]
    statement = select(func.count()).where(Machine.project_uuid == project.uuid, col(Machine.status).not_in(final))
    anew = [row for row in inserts.waiting(session, Machine) if row["project_uuid"] == project.uuid]
    return int(session.exec(statement).one()) + len(anew)
