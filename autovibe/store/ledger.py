"""The ledger: reserve, charge, settle, release, in the caller's transaction.

    ledger.reserve(session, uuid, holder, amounts)   held of every account concerned, or of none: LimitExceeded
    ledger.charge(session, uuid, amounts)            what was used; taken of what is reserved, and more of that reserved
    ledger.settle(session, uuid, amounts)            the last charge; the rest is released and the reservation closed
    ledger.release(session, uuid)                    all that is still reserved goes back; it is closed

Each is done once, however often it is asked for: a reservation is known by its uuid, a charge by its key. Two that
concern one reservation wait for each other; how accounts are changed, and in which order things are locked, is told in
`store.accounts`. A refusal changes nothing and leaves the transaction usable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlmodel import Session, col, select

from autovibe.domain import Account, LedgerEntry, Machine, Project, Reservation
from autovibe.domain.budget import DAILY, LIFE, Amounts, Scope, day_of, machine_limits, running, spent
from autovibe.domain.columns import now
from autovibe.errors import InternalError, LimitExceeded
from autovibe.store import accounts, inserts
from autovibe.store.accounts import Holder, Key, Move, Sums, shown
from autovibe.types import Resource

__all__ = ["Holder", "Key", "Ledger", "shown"]


@dataclass(frozen=True)
class Ledger:
    """`pool`: what all projects share a day; a resource that it does not name has no limit."""

    pool: Mapping[Resource, int]
    currency: str = "USD"

    # The four verbs

    def reserve(
        self, session: Session, uuid: UUID, holder: Holder, amounts: Amounts, *, moment: datetime | None = None
    ) -> None:
        """Hold the amounts; a reservation that is there already, open or closed, is left as it is.

        Raises LimitExceeded naming the account that has too little; nothing is held then. Raises NotFound.
        """
        _check(amounts)
        if _rows(session, uuid):
            return
        held = _Held(uuid, holder, day_of(moment or now()), {})
        self._move(session, held, reserved=amounts)
        held.open(session, amounts)

    def charge(
        self,
        session: Session,
        uuid: UUID,
        amounts: Amounts,
        *,
        key: str | None = None,
        note: str = "",
    ) -> bool:
        """Turn reserved into used; what the reservation lacks is reserved first. A key that was charged before: False.

        Raises LimitExceeded, and then nothing is charged.
        """
        _check(amounts)
        held = _held(session, uuid, "charged")
        if key is not None and _is_charged(session, key):
            return False
        lacking = held.lacking(amounts)
        self._move(session, held, reserved=lacking, used=amounts)
        held.write(session, reserved=lacking, used=amounts, key=key, note=note)
        return True

    def extend(self, session: Session, uuid: UUID, amounts: Amounts) -> None:
        """Reserve so much more under an open reservation. Raises LimitExceeded; nothing is changed then."""
        _check(amounts)
        held = _held(session, uuid, "extended")
        self._move(session, held, reserved=amounts)
        held.write(session, reserved=amounts)

    def settle(self, session: Session, uuid: UUID, amounts: Amounts, *, note: str = "") -> dict[Resource, int]:
        """Charge the amounts, release the rest and close. Returns what was charged: of a resource that can have a limit
        at most what is reserved. Does nothing when it is closed already.
        """
        _check(amounts)
        held = _find(session, uuid)
        if held is None:
            return {}
        charged = {
            resource: min(amount, held.reserved(resource)) if resource in DAILY else amount
            for resource, amount in amounts.items()
        }
        extra = held.lacking(charged)
        rest = {
            resource: left
            for resource in held.rows
            if (left := held.reserved(resource) + extra.get(resource, 0) - charged.get(resource, 0))
        }
        self._move(session, held, reserved=extra, used=charged, released=rest)
        held.write(session, reserved=extra, used=charged, released=rest, note=note)
        held.close()
        return charged

    def release(self, session: Session, uuid: UUID, *, note: str = "") -> None:
        """Give back all that is still reserved and close; harmless when it is closed already."""
        self.settle(session, uuid, {}, note=note)

    def carry(self, session: Session, uuid: UUID, new_uuid: UUID, *, moment: datetime) -> None:
        """Move what is still reserved under `uuid` to the day of `moment`, as `new_uuid`, unless that was done before.

        Raises LimitExceeded where that day has no room for it; the old reservation then stays as it is.
        """
        old = _find(session, uuid)
        if _rows(session, new_uuid):
            return
        if old is None:
            raise _not_open(uuid, "carried over")
        new = _Held(new_uuid, old.holder, day_of(moment), {})
        rest = {resource: old.reserved(resource) for resource in old.rows}
        moves = _added(_moves(old, released=rest), _moves(new, reserved=rest))
        accounts.move(session, moves, self.pool, self.currency, old.holder.project_uuid)
        old.write(session, released=rest, note="carried over midnight")
        old.close()
        new.open(session, rest)

    # A machine's reservation

    def reserve_machine(
        self,
        session: Session,
        machine: Machine,
        tail_seconds: float,
        moment: datetime | None = None,
        *,
        is_new: bool = False,
    ) -> None:
        """Hold the tail and a first slice of the machine's time and money, in its row, which the transaction holds or
        (`is_new`) makes. Raises LimitExceeded; the machine is as it was then.
        """
        amounts = running(machine.price_micros, tail_seconds)
        held = _Held(uuid4(), Holder(machine.project_uuid, machine.uuid), day_of(moment or now()), {})
        moves = _moves(held, reserved=amounts)
        accounts.move(session, moves, self.pool, self.currency, machine.project_uuid, machine, is_new=is_new)
        held.open(session, amounts, write=inserts.later if is_new else inserts.add)
        machine.reservation_uuid = held.uuid

    def settle_machine(
        self, session: Session, machine: Machine, moment: datetime, *, also: Amounts | None = None, note: str = ""
    ) -> dict[Resource, int]:
        """The machine's VM is off, or has no right to run: charge what it used since it was last metered, and `also`
        (at most what is reserved), and release the rest. For the transaction that marks the row, which it holds from
        now on; again: nothing.
        """
        session.flush()
        session.refresh(machine, with_for_update={"key_share": True})  # metering may be about to move metered_at
        amounts: dict[Resource, int] = dict(also or {})
        if machine.metered_at is not None:
            seconds = max((moment - machine.metered_at).total_seconds(), 0.0)
            for resource, amount in spent(machine.price_micros, seconds).items():
                amounts[resource] = amounts.get(resource, 0) + amount
        uuid, machine.reservation_uuid, machine.metered_at = machine.reservation_uuid, None, None
        session.add(machine)
        return self.settle(session, uuid, amounts, note=note) if uuid is not None else {}

    # What there is

    def standing(self, session: Session, project: Project, moment: datetime | None = None) -> dict[Resource, Account]:
        """The project's accounts of the day for DAILY and CPU hours; those not opened yet as they would be opened."""
        period = day_of(moment or now())
        keys = [Key(Scope.project, project.uuid, period, resource) for resource in (*DAILY, Resource.cpu_hours)]
        return {key.resource: account for key, account in accounts.read(session, keys, self.pool).items()}

    def look(self, session: Session, key: Key) -> Account:
        """The account, or one as it would be opened now. Writes nothing."""
        return accounts.read(session, [key], self.pool)[key]

    def headroom(self, session: Session, holder: Holder, moment: datetime | None = None) -> dict[Resource, int]:
        """What can still be reserved for the holder, the least over its accounts; resources without a limit are left
        out.
        """
        return {
            resource: account.headroom_micros or 0
            for resource, account in self.tightest(session, holder, moment).items()
            if account.limit_micros is not None
        }

    def tightest(self, session: Session, holder: Holder, moment: datetime | None = None) -> dict[Resource, Account]:
        """For each of DAILY the holder's account with the least headroom; the project's where none has a limit."""
        period = day_of(moment or now())
        keys = {resource: holder.keys(period, resource) for resource in DAILY}
        found = accounts.read(session, [key for each in keys.values() for key in each], self.pool)
        tightest: dict[Resource, Account] = {}
        for resource, of_it in keys.items():
            limited = [found[key] for key in of_it if found[key].limit_micros is not None]
            project = found[Key(Scope.project, holder.project_uuid, period, resource)]
            tightest[resource] = min(limited, key=lambda account: account.headroom_micros or 0, default=project)
        return tightest

    def shortages(
        self, session: Session, machine: Machine, amounts: Amounts, moment: datetime | None = None
    ) -> list[LimitExceeded]:
        """Every refusal that reserving the amounts for a machine that is not there yet would meet, where `reserve`
        raises the first. Writes nothing.
        """
        period = day_of(moment or now())
        keys = [key for resource in amounts for key in Holder(machine.project_uuid).keys(period, resource)]
        found = {key: Sums.of(account) for key, account in accounts.read(session, keys, self.pool).items()}
        for resource, limit in machine_limits(machine).items():
            found[Key(Scope.machine, machine.uuid, LIFE, resource)] = Sums(limit)
        errors = (
            accounts.shortage(session, key, sums, amounts.get(key.resource, 0), self.currency, machine.name)
            for key, sums in found.items()
        )
        return [error for error in errors if error is not None]

    def reserved(self, session: Session, uuid: UUID) -> dict[Resource, int]:
        """What is still held under an open reservation; empty when it is closed. Holds nothing itself."""
        statement = select(Reservation.resource, Reservation.reserved_micros).where(
            Reservation.uuid == uuid, col(Reservation.closed_at).is_(None)
        )
        return {Resource(resource): amount for resource, amount in session.exec(statement).all()}

    def refit(self, session: Session, moment: datetime | None = None) -> None:
        """Give the open accounts of the day the limits of now: after a change of budgets, greediness, projects or pool.

        What is used or reserved above a lower limit stays allocated.
        """
        accounts.refit(session, self.pool, day_of(moment or now()))

    def refit_machine(self, session: Session, machine: Machine) -> None:
        """Give a machine's accounts the limits of its constraints, after they were changed."""
        accounts.refit_machine(session, machine.uuid, self.pool)

    def _move(
        self,
        session: Session,
        held: _Held,
        *,
        reserved: Amounts | None = None,
        used: Amounts | None = None,
        released: Amounts | None = None,
    ) -> None:
        moves = _moves(held, reserved=reserved or {}, used=used or {}, released=released or {})
        accounts.move(session, moves, self.pool, self.currency, held.holder.project_uuid)


@dataclass(frozen=True)
class _Held:
    """An open reservation, its rows held by the transaction; or one in the making."""

    uuid: UUID
    holder: Holder
    period: str
    rows: dict[Resource, Reservation]

    def reserved(self, resource: Resource) -> int:
        row = self.rows.get(resource)
        return row.reserved_micros if row is not None else 0

    def lacking(self, amounts: Amounts) -> dict[Resource, int]:
        """What of the amounts is not reserved."""
        return {
            resource: lack for resource, amount in amounts.items() if (lack := amount - self.reserved(resource)) > 0
        }

    def open(self, session: Session, reserved: Amounts, write: Callable[..., None] = inserts.add) -> None:
        """Write the rows and entries of one in the making."""
        rows = [self._values(resource) | {"reserved_micros": amount} for resource, amount in reserved.items()]
        write(session, Reservation, *rows)
        entries = (self._entry("reserve", resource, amount) for resource, amount in reserved.items() if amount)
        inserts.later(session, LedgerEntry, *entries)

    def write(
        self,
        session: Session,
        *,
        reserved: Amounts | None = None,
        used: Amounts | None = None,
        released: Amounts | None = None,
        key: str | None = None,
        note: str = "",
    ) -> None:
        """Bring the rows up to date and add the entries: reserved, then used, then released."""
        reserved, used, released = reserved or {}, used or {}, released or {}
        for resource in Resource:
            if resource not in self.rows and (resource in reserved or resource in used):
                self.rows[resource] = Reservation(**self._values(resource), reserved_micros=0)
                session.add(self.rows[resource])
            if (row := self.rows.get(resource)) is not None:
                row.reserved_micros += reserved.get(resource, 0) - used.get(resource, 0) - released.get(resource, 0)
                row.used_micros += used.get(resource, 0)
        entries = [
            self._entry(kind, resource, amounts[resource], key if kind == "charge" else None, note)
            for kind, amounts in (("reserve", reserved), ("charge", used), ("release", released))
            for resource in Resource
            if amounts.get(resource, 0)
        ]
        inserts.later(session, LedgerEntry, *entries)

    def close(self) -> None:
        for row in self.rows.values():
            row.closed_at = now()

    def _values(self, resource: Resource) -> dict[str, Any]:
        return {
            "uuid": self.uuid,
            "resource": resource,
            "project_uuid": self.holder.project_uuid,
            "machine_uuid": self.holder.machine_uuid,
            "period": self.period,
        }

    def _entry(
        self, kind: str, resource: Resource, amount: int, key: str | None = None, note: str = ""
    ) -> dict[str, Any]:
        return {
            "kind": kind,
            "reservation_uuid": self.uuid,
            "project_uuid": self.holder.project_uuid,
            "machine_uuid": self.holder.machine_uuid,
            "period": self.period,
            "resource": resource,
            "amount_micros": amount,
            "key": key,
            "note": note if kind != "reserve" else "",
        }


def _check(amounts: Amounts) -> None:
    if any(amount < 0 for amount in amounts.values()):
        raise InternalError("An amount of the ledger cannot be negative.")


def _rows(session: Session, uuid: UUID) -> Sequence[Reservation]:
    """The reservation's rows, open or closed; nobody else works with it until the end of the transaction.

    Locks on its rows would not do: the first reserve finds none, and a charge may add one.
    """
    accounts.lock(session, str(uuid))
    statement = select(Reservation).where(Reservation.uuid == uuid)
    return session.exec(statement.execution_options(populate_existing=True)).all()


def _find(session: Session, uuid: UUID) -> _Held | None:
    found = _rows(session, uuid)
    if not found or found[0].closed_at is not None:
        return None
    one = found[0]
    return _Held(
        uuid, Holder(one.project_uuid, one.machine_uuid), one.period, {Resource(row.resource): row for row in found}
    )


def _held(session: Session, uuid: UUID, verb: str) -> _Held:
    held = _find(session, uuid)
    if held is None:
        raise _not_open(uuid, verb)
    return held


def _not_open(uuid: UUID, verb: str) -> InternalError:
    return InternalError(f"Reservation '{uuid}' is not open and cannot be {verb}.")


def _is_charged(session: Session, key: str) -> bool:
    """Whether something was charged under this key; whoever else asks now waits for the end of this transaction."""
    accounts.lock(session, f"key {key}")
    return session.exec(select(LedgerEntry.id).where(LedgerEntry.key == key)).first() is not None


def _moves(
    held: _Held, *, reserved: Amounts | None = None, used: Amounts | None = None, released: Amounts | None = None
) -> dict[Key, Move]:
    reserved, used, released = reserved or {}, used or {}, released or {}
    moves: dict[Key, Move] = {}
    for resource in {*reserved, *used, *released}:
        use = used.get(resource, 0)
        change = Move(reserved.get(resource, 0) - use - released.get(resource, 0), use)
        moves |= dict.fromkeys(held.holder.keys(held.period, resource), change)
    return moves


def _added(one: Mapping[Key, Move], other: Mapping[Key, Move]) -> dict[Key, Move]:
    nothing = Move(0, 0)
    return {
        key: Move(*(a + b for a, b in zip(one.get(key, nothing), other.get(key, nothing), strict=True)))
        for key in {*one, *other}
    }
