"""Metering: what the machines' VMs use is charged as they use it, and at a limit they are blocked.

A machine holds a reservation: the tail, which its own freeze and checkpoint are to cost, and up to a slice beyond it.
A pass charges the time since `metered_at` and fills the reservation up to tail and slice again. When nothing more can
be reserved the machine runs on what it holds beyond the tail, to a moment that is known, and is then blocked. So

    due = metered_at + min(15 s, until only the tail is left)

follows from the rows alone, and every hub process may meter every machine: who moves `metered_at`, by a compare-and-set
in the transaction of the charge, has charged it, and nobody else does. At midnight (UTC) the use until then is charged
to the old day, and what is reserved is carried to the new one; where that has no room the old reservation stays as it
is and pays for the end.

Machines that went unmetered for long, since no Hub ran, are charged all that their limits have left and then blocked. A
VM that was stopped or died by itself costs nothing: its machine says so, and is charged again once it runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from sqlmodel import Session, col, select

from autovibe.domain import Machine, Reservation
from autovibe.domain.budget import MOST_MICROS, SLICE_SECONDS, Amounts, Shape, day_of, spent
from autovibe.domain.columns import now
from autovibe.domain.machine_type import price_class_of
from autovibe.errors import AutovibeError, LimitExceeded
from autovibe.guest.brake import ready as brake_of
from autovibe.hub import Hub
from autovibe.hub.blocking import BLOCKABLE, block
from autovibe.hypervisor import read
from autovibe.store import rows
from autovibe.store.ledger import Holder
from autovibe.types import MICROS, MachineStatus, Resource

logger = logging.getLogger(__name__)

EVERY_SECONDS = 15.0
_IDLE_SECONDS = 0.5  # between two looks at the rows, at most
_SHORTEST_SECONDS = 0.02
_END_SECONDS = 0.04  # a runway that is shorter is none
_AGAIN_SECONDS = 1.0
_KNOWN_SECONDS = 60.0  # how long what the hypervisor told is taken for true
_METERED = (Resource.time_hours, Resource.money)
_NEAR_SECONDS = 30.0  # a machine that gets its slice has more left
_HOUR = 3600.0
_LIVING = [status for status in MachineStatus if not status.is_final]


class Vm(NamedTuple):
    """What the hypervisor says of a running VM; `cpu` is the number of its processors that are busy."""

    cpu: float
    shape: Shape


@dataclass
class Samples:
    """What the hypervisor told last, asked in a thread of its own: one that is silent must not delay a limit."""

    by_vmid: Mapping[int, Vm] = field(default_factory=dict)
    at: float = 0.0  # time.monotonic()

    def take(self, hub: Hub) -> None:
        """Ask anew. Raises HypervisorUnavailable, HypervisorRefused."""
        asked = time.monotonic()
        found = {vm.vmid: Vm(vm.cpu, Shape(vm.cores, vm.memory_gb, vm.disk_gb)) for vm in read.usage(hub.proxmox)}
        self.by_vmid, self.at = found, asked

    def of(self, vmid: int | None) -> Vm | None:
        if vmid is None or time.monotonic() - self.at > _KNOWN_SECONDS:
            return None
        return self.by_vmid.get(vmid)

    def is_off(self, machine: Machine, since: datetime, moment: datetime) -> bool:
        """Whether the VM was off when it was looked for, after `since`, of a machine whose VM has to run."""
        age = time.monotonic() - self.at
        if machine.vmid is None or machine.status not in BLOCKABLE or age > _KNOWN_SECONDS or not self.at:
            return False
        is_news = moment - timedelta(seconds=age) > max(since, machine.updated_at)
        return is_news and machine.vmid not in self.by_vmid


@dataclass(frozen=True)
class Metered:
    """A machine as its rows say: until when it is charged, and for how long it can be, the tail aside."""

    uuid: UUID
    metered_at: datetime
    period: str
    price_micros: int
    runway_seconds: float

    def due_at(self) -> datetime:
        """A machine that could not be blocked at its limit, since it is being spawned or ended, is looked at again."""
        seconds = min(EVERY_SECONDS, self.runway_seconds) if self.runway_seconds > _END_SECONDS else _AGAIN_SECONDS
        return self.metered_at + timedelta(seconds=seconds)


def meter(hub: Hub, samples: Samples, moment: datetime | None = None) -> float:
    """Charge the machines that are due and block those at a limit. Returns the seconds until the next is due."""
    waiting = _IDLE_SECONDS
    for machine in running(hub):
        present = moment or now()
        until_due = (machine.due_at() - present).total_seconds()
        if until_due > 0 and day_of(present) in (machine.period, day_of(machine.metered_at)):
            waiting = min(waiting, until_due)
            continue
        try:
            limit = charge(hub, machine, present, samples)
            if limit is not None:
                block(hub, machine.uuid, limit)
        except AutovibeError as error:  # one machine is no reason to meter no other
            logger.warning("Machine %s cannot be metered now: %s %s", machine.uuid, error.message, error.log_detail)
            waiting = _IDLE_SECONDS
    return max(waiting, _SHORTEST_SECONDS)


def running(hub: Hub) -> list[Metered]:
    """The machines whose VM runs and whose block is not decided, with their runway; one query."""
    columns: Any = (Machine.uuid, Machine.metered_at, Machine.price_micros, Machine.blocked, Reservation)
    statement: Any = (
        select(*columns)
        .join(Reservation, col(Reservation.uuid) == col(Machine.reservation_uuid))
        .where(
            col(Machine.status).in_(_LIVING),  # by its index: nearly all machines have ended
            col(Machine.metered_at).is_not(None),
            col(Reservation.closed_at).is_(None),
            col(Reservation.resource).in_(_METERED),
        )
    )
    with hub.store.reading() as session:
        found = session.exec(statement).all()
    reserved: dict[UUID, dict[Resource, int]] = {}
    for uuid, *_, reservation in found:
        reserved.setdefault(uuid, {})[Resource(reservation.resource)] = reservation.reserved_micros
    machines = {
        uuid: Metered(uuid, metered_at, reservation.period, price, runway(hub, price, reserved[uuid]))
        for uuid, metered_at, price, blocked, reservation in found
        if blocked is None
    }
    return list(machines.values())


def runway(hub: Hub, price_micros: int, reserved: Amounts) -> float:
    """For how many seconds the reservation lasts until only the tail is left of it; below 0 when that is touched."""
    rates = {Resource.time_hours: MICROS, Resource.money: price_micros}
    return min(
        (reserved.get(resource, 0) / rate * _HOUR - hub.tail_seconds for resource, rate in rates.items() if rate > 0),
        default=EVERY_SECONDS,
    )


def get_ready(hub: Hub) -> None:
    """Have the guests of machines that are near their limit wait for the word to freeze, and let the others go."""
    brakes = hub.workflows.world.brakes
    runways = {machine.uuid: machine.runway_seconds for machine in running(hub)}
    near = {uuid for uuid, seconds in runways.items() if seconds < _NEAR_SECONDS}
    for uuid, brake in list(brakes.items()):
        # That of a machine whose block is decided stays for the block, which takes it.
        is_spare = not brake.is_ready or (uuid in runways and uuid not in near)
        if is_spare and brakes.pop(uuid, None) is not None:
            brake.close()
    for uuid in near - brakes.keys():
        with hub.store.reading() as session:
            machine = session.get(Machine, uuid)
        if machine is None or machine.status != MachineStatus.working:
            continue
        try:
            brakes[uuid] = brake_of(hub.guests, hub.address_of(machine))
        except AutovibeError as error:  # the block then does without
            logger.info("The guest of machine '%s' is not ready for its limit: %s", machine.name, error.message)


def charge(hub: Hub, seen: Metered, moment: datetime, samples: Samples) -> LimitExceeded | None:
    """Charge one machine until `moment`, unless somebody else has. Returns the limit at which it has to be blocked."""
    with hub.store.transaction() as session:
        if moment < seen.metered_at or not rows.compare_and_set(
            session, Machine, seen.uuid, expect={"metered_at": seen.metered_at}, change={"metered_at": moment}
        ):
            return None
        machine = rows.get(session, Machine, seen.uuid)
        if machine.reservation_uuid is None:
            return None
        vm, is_off = samples.of(machine.vmid), samples.is_off(machine, seen.metered_at, moment)
        begin = moment if is_off else seen.metered_at
        limit = _use_over_days(hub, session, machine, seen.period, begin, moment, 0.0 if vm is None else vm.cpu)
        if vm is not None or is_off:
            _tell_power(session, machine, is_off=is_off)
        if vm is not None:
            _price(hub, session, machine, vm.shape)
        if machine.blocked is None and limit is None:
            limit = _fill_up(hub, session, machine, moment)
        return limit if machine.status in BLOCKABLE else None


def _use_over_days(
    hub: Hub, session: Session, machine: Machine, period: str, begin: datetime, moment: datetime, cpu: float
) -> LimitExceeded | None:
    """Charge each day's part to that day. Returns the limit of a new day that has no room for what is reserved."""
    limit = None
    for end in [*_midnights(begin, moment), moment]:
        _use(hub, session, machine, begin, end, cpu, is_today=period == day_of(begin))
        begin = end
        if period != day_of(end):
            limit = _carry(hub, session, machine, end)
            period = period if limit else day_of(end)
    return limit


def _midnights(begin: datetime, end: datetime) -> list[datetime]:
    """Every beginning of a UTC day behind `begin`, up to `end`."""
    found = []
    day = begin.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    while (day := day + timedelta(days=1)) <= end:
        found.append(day)
    return found


def _use(
    hub: Hub, session: Session, machine: Machine, begin: datetime, end: datetime, cpu: float, *, is_today: bool
) -> None:
    """Charge what so much time costs; at the limits all that they have left, of another day what is reserved."""
    assert machine.reservation_uuid is not None  # noqa: S101 - the caller looked
    seconds = (end - begin).total_seconds()
    amounts = {**spent(machine.price_micros, seconds), Resource.cpu_hours: int(cpu * seconds / _HOUR * MICROS)}
    amounts = {resource: amount for resource, amount in amounts.items() if amount > 0}
    try:
        if is_today:
            hub.ledger.charge(session, machine.reservation_uuid, amounts, note="VM")
            return
    except LimitExceeded as error:
        logger.debug("Machine '%s' lives on its tail: %s", machine.name, error.message)
    reserved = hub.ledger.reserved(session, machine.reservation_uuid)
    room: Amounts = {}
    if is_today:
        room = hub.ledger.headroom(session, Holder(machine.project_uuid, machine.uuid), begin)
    for resource in _METERED:
        most = reserved.get(resource, 0) + room.get(resource, MOST_MICROS if is_today else 0)
        amounts[resource] = min(amounts.get(resource, 0), most)
    hub.ledger.charge(session, machine.reservation_uuid, amounts, note="VM")


def _carry(hub: Hub, session: Session, machine: Machine, moment: datetime) -> LimitExceeded | None:
    assert machine.reservation_uuid is not None  # noqa: S101 - the caller looked
    new = uuid4()
    try:
        hub.ledger.carry(session, machine.reservation_uuid, new, moment=moment)
    except LimitExceeded as error:
        return error
    machine.reservation_uuid = new
    session.add(machine)
    return None


def _tell_power(session: Session, machine: Machine, *, is_off: bool) -> None:
    """Say, once, that the VM is off, and once that it runs again."""
    words = f"VM {machine.vmid} is off, and not by autovibe; start it in Proxmox, or terminate the machine."
    if is_off == (machine.progress == words):
        return
    machine.progress = words if is_off else ""
    session.add(machine)
    power = "off" if is_off else "on"
    rows.record(session, "machine.power", machine.uuid, machine.project_uuid, vmid=machine.vmid, power=power)


def _price(hub: Hub, session: Session, machine: Machine, shape: Shape) -> None:
    """A VM that was changed costs what it is now."""
    price = hub.prices.per_hour(shape, price_class_of(machine.type))
    if price != machine.price_micros:
        machine.price_micros = price
        session.add(machine)


def _fill_up(hub: Hub, session: Session, machine: Machine, moment: datetime) -> LimitExceeded | None:
    """Reserve up to tail and slice again, or what the limits still allow. Returns the limit when nothing is left."""
    uuid = machine.reservation_uuid
    assert uuid is not None  # noqa: S101 - the caller looked
    reserved = hub.ledger.reserved(session, uuid)
    held_for = runway(hub, machine.price_micros, reserved)
    if _extend(hub, session, machine, reserved, SLICE_SECONDS) is None:
        return None
    room = hub.ledger.headroom(session, Holder(machine.project_uuid, machine.uuid), moment)
    total = {resource: reserved.get(resource, 0) + room.get(resource, 1 << 60) for resource in _METERED}
    seconds = runway(hub, machine.price_micros, total) - _END_SECONDS
    if seconds > held_for and seconds > 0 and _extend(hub, session, machine, reserved, seconds) is None:
        return None
    # Asked for a second, the limit that is reached refuses; for a slice, one that is only near may have done so.
    return _extend(hub, session, machine, reserved, 1.0) if held_for <= _END_SECONDS else None


def _extend(hub: Hub, session: Session, machine: Machine, reserved: Amounts, seconds: float) -> LimitExceeded | None:
    """Have tail and so many seconds reserved. Returns what stands against it; nothing is changed then."""
    assert machine.reservation_uuid is not None  # noqa: S101 - the caller looked
    wanted = spent(machine.price_micros, hub.tail_seconds + seconds)
    lacking = {resource: wanted[resource] - reserved.get(resource, 0) for resource in _METERED}
    lacking = {resource: amount for resource, amount in lacking.items() if amount > 0}
    if not lacking:
        return None
    try:
        hub.ledger.extend(session, machine.reservation_uuid, lacking)
    except LimitExceeded as error:
        return error
    return None
