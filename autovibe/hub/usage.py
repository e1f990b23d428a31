"""What a machine used besides its VM: model calls and money, charged against machine, project and pool at once."""

from __future__ import annotations

import contextvars
from hashlib import sha256
from uuid import UUID, uuid4

from sqlmodel import Session

from autovibe import schemas
from autovibe.domain import Machine
from autovibe.domain.actor import Actor
from autovibe.domain.budget import LIFE, Scope
from autovibe.errors import Conflict, LimitExceeded
from autovibe.hub import Hub
from autovibe.hub.blocking import block
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.store import rows
from autovibe.store.ledger import Holder, Key
from autovibe.types import MICROS, MachineStatus, Money, Resource


def report(
    hub: Hub, actor: Actor, uuid: UUID, order: schemas.UsageOrder, once: Once | None = None
) -> schemas.UsageReply:
    """Charge what the machine used. A report that is repeated under its Idempotency-Key is charged once.

    Raises NotFound, Conflict for a machine that has ended, LimitExceeded when it does not fit: nothing is charged then,
    and the machine is blocked.
    """
    money = order.money.to_money(hub.ledger.currency).micros if order.money is not None else 0
    amounts = {Resource.api_calls: order.api_calls * MICROS, Resource.money: money}
    amounts = {resource: amount for resource, amount in amounts.items() if amount}
    key = sha256(f"{actor.identity}:{once.key}".encode()).hexdigest() if once is not None else None

    def decide(session: Session, _attempt: int) -> Accepted:
        machine = rows.held(session, Machine, uuid)
        if MachineStatus(machine.status).is_final:
            raise Conflict(
                f"Machine '{machine.name}' is {machine.status}; what it used is counted.",
                details={"status": machine.status},
            )
        reservation = uuid4()
        hub.ledger.reserve(session, reservation, Holder(machine.project_uuid, uuid), amounts)
        hub.ledger.charge(session, reservation, amounts, key=key, note=order.note)
        hub.ledger.release(session, reservation)
        return Accepted(uuid)

    try:
        accept(hub, actor, once, "usage", decide)
    except LimitExceeded as error:
        contextvars.Context().run(block, hub, uuid, error)  # no part of the request, nor of its audit line
        raise
    return _reply(hub, uuid, order.api_calls, money)


def _reply(hub: Hub, uuid: UUID, calls: int, money: int) -> schemas.UsageReply:
    currency = hub.ledger.currency
    with hub.store.reading() as session:
        machine = rows.get(session, Machine, uuid)
        of_machine = {
            resource: hub.ledger.look(session, Key(Scope.machine, uuid, LIFE, resource)).headroom_micros
            for resource in (Resource.money, Resource.time_hours, Resource.api_calls)
        }
        of_project: dict[Resource, int | None] = dict(hub.ledger.headroom(session, Holder(machine.project_uuid)))
    return schemas.UsageReply(
        machine_uuid=uuid,
        charged=schemas.Charged(api_calls=calls, money=schemas.MoneyAmount.of(Money(money, currency))),
        machine=_remaining(of_machine, currency),
        project=_remaining(of_project, currency),
    )


def _remaining(rooms: dict[Resource, int | None], currency: str) -> schemas.Remaining:
    money, hours, calls = (rooms.get(r) for r in (Resource.money, Resource.time_hours, Resource.api_calls))
    return schemas.Remaining(
        money=None if money is None else schemas.MoneyAmount.of(Money(money, currency)),
        time_minutes=None if hours is None else round(hours * 60 / MICROS, 3),
        api_calls=None if calls is None else calls // MICROS,
    )
