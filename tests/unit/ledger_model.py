"""What the ledger's tests share: a plain model of it, what must hold of the tables, and a project to work with."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlmodel import Session, select

from autovibe.domain import Account, LedgerEntry, Machine, Project, Reservation
from autovibe.domain.budget import LIFE, SYSTEM, Scope
from autovibe.store import Store
from autovibe.types import Resource

Name = tuple[str, UUID, str, str]


def accounts_of(session: Session) -> dict[Name, Account]:
    return {(row.scope, row.owner_uuid, row.period, row.resource): row for row in session.exec(select(Account))}


def check(store: Store) -> None:
    """used + reserved <= allocated everywhere; accounts are the sums of the entries and of the reservations."""
    with store.reading() as session:
        accounts = accounts_of(session)
        entries = session.exec(select(LedgerEntry).order_by(LedgerEntry.id)).all()  # type: ignore[arg-type]
        reservations = session.exec(select(Reservation)).all()
    reserved: dict[Name, int] = defaultdict(int)
    used: dict[Name, int] = defaultdict(int)
    of_reservation: dict[tuple[UUID, str], int] = defaultdict(int)
    for entry in entries:
        assert entry.amount_micros > 0
        sign = 1 if entry.kind == "reserve" else -1
        of_reservation[entry.reservation_uuid, entry.resource] += sign * entry.amount_micros
        assert of_reservation[entry.reservation_uuid, entry.resource] >= 0
        for name in names_of(entry):
            reserved[name] += sign * entry.amount_micros
            used[name] += entry.amount_micros if entry.kind == "charge" else 0
    held: dict[Name, int] = defaultdict(int)
    for row in reservations:
        assert row.reserved_micros == of_reservation[row.uuid, row.resource]
        assert row.closed_at is None or row.reserved_micros == 0
        for name in names_of(row):
            held[name] += row.reserved_micros
    for name, account in accounts.items():
        assert (account.used_micros, account.reserved_micros) == (used[name], reserved[name]), name
        assert account.reserved_micros == held[name], name
        taken = account.used_micros + account.reserved_micros
        assert account.allocated_micros is None or taken <= account.allocated_micros, name
        assert (account.limit_micros is None) == (account.allocated_micros is None), name
        if account.limit_micros is not None:
            assert account.allocated_micros == max(account.limit_micros, taken), name
    for name in {*reserved, *used}:
        assert name in accounts, name


def names_of(row: Any) -> list[Name]:
    """The accounts an entry or a reservation counts in."""
    names: list[Name] = [
        (Scope.system, SYSTEM, row.period, row.resource),
        (Scope.project, row.project_uuid, row.period, row.resource),
    ]
    if row.machine_uuid is not None:
        names.append((Scope.machine, row.machine_uuid, LIFE, row.resource))
    return names


def make_project(store: Store, **fields: Any) -> UUID:
    project = Project(**{"name": "p", "greediness": 1.0, **fields})
    with store.transaction() as session:
        session.add(project)
    return project.uuid


def make_machine(store: Store, project: UUID, **fields: Any) -> UUID:
    machine = Machine(**{"name": "m", "type": "shell", "project_uuid": project, **fields})
    with store.transaction() as session:
        session.add(machine)
    return machine.uuid


@dataclass
class ModelReservation:
    project: UUID
    machine: UUID | None
    period: str
    reserved: dict[Resource, int] = field(default_factory=dict)
    is_open: bool = True

    def names(self, resource: Resource) -> list[Name]:
        names: list[Name] = [
            (Scope.system, SYSTEM, self.period, resource),
            (Scope.project, self.project, self.period, resource),
        ]
        return names if self.machine is None else [*names, (Scope.machine, self.machine, LIFE, resource)]


class Refused(Exception):
    """The model's LimitExceeded."""


@dataclass
class Model:
    """The ledger in plain Python. `limits` is asked for a name's limit as it is now."""

    limits: Any
    taken: dict[Name, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))  # used, reserved
    fitted: dict[Name, int | None] = field(default_factory=dict)  # the limits that opened accounts have
    reservations: dict[UUID, ModelReservation] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)

    def move(self, moves: dict[Name, tuple[int, int]]) -> None:
        for name, (used, reserved) in moves.items():
            if (used, reserved) == (0, 0):
                continue
            limit = self.fitted[name] if name in self.fitted else self.limits(name)
            if used + reserved > 0 and limit is not None and sum(self.taken[name]) + used + reserved > limit:
                raise Refused
        for name, (used, reserved) in moves.items():
            if (used, reserved) == (0, 0):
                continue
            self.fitted.setdefault(name, self.limits(name))
            self.taken[name][0] += used
            self.taken[name][1] += reserved

    def refit(self, period: str) -> None:
        for name in self.fitted:
            if name[0] != Scope.machine and name[2] >= period:
                self.fitted[name] = self.limits(name)

    def reserve(self, uuid: UUID, made: ModelReservation, amounts: dict[Resource, int]) -> None:
        if uuid in self.reservations:
            return
        self.move({name: (0, amount) for resource, amount in amounts.items() for name in made.names(resource)})
        made.reserved = dict(amounts)
        if amounts:
            self.reservations[uuid] = made

    def charge(self, uuid: UUID, amounts: dict[Resource, int], key: str | None) -> bool:
        held = self.reservations[uuid]
        if key is not None and key in self.keys:
            return False
        moves: dict[Name, tuple[int, int]] = {}
        lacks = {r: max(amount - held.reserved.get(r, 0), 0) for r, amount in amounts.items()}
        for resource, amount in amounts.items():
            for name in held.names(resource):
                moves[name] = (amount, lacks[resource] - amount)
        self.move(moves)
        for resource, amount in amounts.items():
            held.reserved[resource] = held.reserved.get(resource, 0) + lacks[resource] - amount
        if key is not None and any(amounts.values()):
            self.keys.add(key)
        return True

    def extend(self, uuid: UUID, amounts: dict[Resource, int]) -> None:
        held = self.reservations[uuid]
        self.move({name: (0, amount) for resource, amount in amounts.items() for name in held.names(resource)})
        for resource, amount in amounts.items():
            held.reserved[resource] = held.reserved.get(resource, 0) + amount

    def settle(self, uuid: UUID, amounts: dict[Resource, int]) -> dict[Resource, int]:
        held = self.reservations[uuid]
        if not held.is_open:
            return {}
        charged = {
            resource: amount if resource == Resource.cpu_hours else min(amount, held.reserved.get(resource, 0))
            for resource, amount in amounts.items()
        }
        for resource in {*held.reserved, *charged}:
            change = (charged.get(resource, 0), -held.reserved.get(resource, 0))
            self.move(dict.fromkeys(held.names(resource), change))
        held.reserved, held.is_open = {}, False
        return charged

    def release(self, uuid: UUID) -> None:
        self.settle(uuid, {})

    def carry(self, uuid: UUID, new_uuid: UUID, period: str) -> None:
        old = self.reservations[uuid]
        new = ModelReservation(old.project, old.machine, period, dict(old.reserved))
        moves: dict[Name, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for resource, amount in old.reserved.items():
            for name in old.names(resource):
                moves[name] = (0, moves[name][1] - amount)
            for name in new.names(resource):
                moves[name] = (0, moves[name][1] + amount)
        self.move(moves)
        old.reserved, old.is_open = {}, False
        self.reservations[new_uuid] = new
