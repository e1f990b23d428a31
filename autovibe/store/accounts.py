"""Accounts: which there are for whom, their limits, and the one way in which their sums change.

`move` is that way. It holds all accounts concerned (in one order, so that no two transactions wait for each other in a
circle), looks whether every limit allows the change, and writes all of it or nothing; a refusal leaves the transaction
as it was, to be gone on with. It takes two statements, however many accounts there are, and a few more on
PostgreSQL where it opens those of a new day.

PostgreSQL's locks are taken in this order everywhere: rows of projects and machines, the reservation, the limits,
accounts. So one transaction works with one reservation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import and_, bindparam, or_, text
from sqlalchemy.dialects import postgresql
from sqlmodel import Session, col, delete, func, select

from autovibe.domain import Account, Machine, Project
from autovibe.domain.budget import (
    DAILY,
    LIFE,
    MOST_MICROS,
    SYSTEM,
    WARNINGS,
    Scope,
    effective_limit,
    explicit_limits,
    machine_limits,
)
from autovibe.domain.columns import now
from autovibe.errors import LimitExceeded, NotFound
from autovibe.store import inserts, rows
from autovibe.types import MICROS, ProjectStatus, Resource


class Key(NamedTuple):
    """Names one account."""

    scope: Scope
    owner_uuid: UUID
    period: str
    resource: Resource


class Move(NamedTuple):
    """By how much an account's sums change. What makes their total grow needs the limit's leave."""

    reserved: int
    used: int = 0


class Sums(NamedTuple):
    """What of an account decides whether it can be changed, and how."""

    limit_micros: int | None
    used_micros: int = 0
    reserved_micros: int = 0
    warned_percent: int = 0

    @classmethod
    def of(cls, account: Account) -> Sums:
        return cls(account.limit_micros, account.used_micros, account.reserved_micros, account.warned_percent)

    @property
    def allocated_micros(self) -> int | None:
        limit = self.limit_micros
        return None if limit is None else max(self.used_micros + self.reserved_micros, limit)

    def moved(self, change: Move) -> Sums:
        return self._replace(
            used_micros=self.used_micros + change.used, reserved_micros=self.reserved_micros + change.reserved
        )


@dataclass(frozen=True)
class Holder:
    """Whose accounts a reservation is held of; without a machine those of the project and the pool."""

    project_uuid: UUID
    machine_uuid: UUID | None = None

    def keys(self, period: str, resource: Resource) -> list[Key]:
        """The accounts: the pool's and the project's of the day, and the machine's of its life."""
        keys = [Key(Scope.system, SYSTEM, period, resource), Key(Scope.project, self.project_uuid, period, resource)]
        if self.machine_uuid is not None:
            keys.append(Key(Scope.machine, self.machine_uuid, LIFE, resource))
        return keys


Pool = Mapping[Resource, int]


def move(
    session: Session,
    moves: Mapping[Key, Move],
    pool: Pool,
    currency: str,
    project: UUID,
    machine: Machine | None = None,
    *,
    is_new: bool = False,
) -> None:
    """Change the accounts. Raises LimitExceeded naming one that has too little; nothing is changed then.

    `machine`: one of which the transaction has the row, so that it need not be read again; `is_new` says that it makes
    it, so that there are no accounts of it.
    """
    wanted = {key: change for key, change in moves.items() if change != (0, 0)}
    if not wanted:
        return
    session.flush()  # all that follows goes below the ORM
    new = {key for key in wanted if is_new and machine is not None and key.owner_uuid == machine.uuid}
    there = wanted.keys() - new
    found, opened = _held(session, there), set[Key]()
    if len(found) < len(there) and _is_postgres(session):  # none is held then
        opened = _open(session, there, pool, machine)
        found = _held(session, there)
    missing = wanted.keys() - found.keys()  # nobody else can open them now
    limits = limits_of(session, missing, pool, machine)
    found |= {key: Sums(limits[key]) for key in missing}
    for key in sorted(wanted):
        if error := shortage(session, key, found[key], sum(wanted[key]), currency):
            _forget(session, opened)
            raise error
    moved = {key: found[key].moved(change) for key, change in wanted.items()}
    for key, change in wanted.items():
        if change.used:
            moved[key] = _warned(session, key, moved[key], project)
    _write(session, moved, is_new=is_new)


def read(session: Session, keys: Collection[Key], pool: Pool) -> dict[Key, Account]:
    """The accounts, those not opened yet as they would be opened now. Writes and holds nothing."""
    inserts.put_now(session, Account)
    statement = select(Account).where(_are(len(owners := _by_owner(keys)))).execution_options(populate_existing=True)
    found = {_key_of(account): account for account in session.exec(statement, params=_named(owners)).all()}
    limits = limits_of(session, missing := [key for key in keys if key not in found], pool)
    return found | {
        key: Account(**key._asdict(), limit_micros=limits[key], allocated_micros=limits[key]) for key in missing
    }


def shortage(
    session: Session, key: Key, sums: Sums, amount: int, currency: str, machine: str = ""
) -> LimitExceeded | None:
    """Why the account cannot take so much more; None where it can. `machine` names one that has no row yet."""
    taken = sums.used_micros + sums.reserved_micros
    limit = MOST_MICROS if sums.limit_micros is None else min(sums.limit_micros, MOST_MICROS)
    if amount <= 0 or taken + amount <= limit:
        return None
    if key.scope == Scope.system:
        owner, remedy = "The pool of all projects", "the settings 'pool_daily_…'"
    elif key.scope == Scope.project:
        owner, remedy = f"Project '{_name(session, Project, key)}'", "its budget or greediness"
    else:
        owner, remedy = f"Machine '{machine or _name(session, Machine, key)}'", "its constraints"
    when = "in its life" if key.period == LIFE else f"on {key.period} (UTC)"
    unit = _unit(key.resource, currency)
    return LimitExceeded(
        f"{owner} has {shown(max(limit - taken, 0), unit)} left of {shown(limit, unit)} {when}, and "
        f"{shown(amount, unit)} is needed; raise {remedy}, or wait until something is released.",
        details={
            "scope": str(key.scope),
            "resource": str(key.resource),
            "period": key.period,
            "limit_micros": sums.limit_micros,
            "used_micros": sums.used_micros,
            "reserved_micros": sums.reserved_micros,
            "requested_micros": amount,
        },
    )


def shown(micros: int, unit: str) -> str:
    """An amount as a person reads it."""
    text = f"{micros / MICROS:,.6f}" if micros < MICROS else f"{micros / MICROS:,.4f}"
    return text.rstrip("0").rstrip(".") + f" {unit}"


def _unit(resource: Resource, currency: str) -> str:
    return {
        Resource.money: currency,
        Resource.time_hours: "h",
        Resource.api_calls: "API calls",
        Resource.cpu_hours: "CPU hours",
        Resource.storage_gb: "GB",
    }[resource]


def _name(session: Session, model: type[Project] | type[Machine], key: Key) -> str:
    name = session.exec(select(col(model.name)).where(col(model.uuid) == key.owner_uuid)).first()
    return name or str(key.owner_uuid)


# Limits


def limits_of(
    session: Session, keys: Collection[Key], pool: Pool, machine: Machine | None = None
) -> dict[Key, int | None]:
    """What settings, projects, greediness and constraints give these accounts now, read anew. Raises NotFound."""
    if not keys:
        return {}
    known = {machine.uuid: machine} if machine is not None else {}
    projects = _rows(session, Project, {key.owner_uuid for key in keys if key.scope == Scope.project})
    unknown = {key.owner_uuid for key in keys if key.scope == Scope.machine} - set(known)
    machines = known | _rows(session, Machine, unknown)
    total = _greediness(session) if projects else 0.0
    found: dict[Key, int | None] = {}
    for key in keys:
        if key.scope == Scope.system:
            found[key] = pool.get(key.resource)
        elif key.scope == Scope.machine:
            found[key] = machine_limits(machines[key.owner_uuid]).get(key.resource)
        else:
            found[key] = project_limit(projects[key.owner_uuid], key.resource, total, pool)
    return found


def project_limit(project: Project, resource: Resource, greediness: float, pool: Pool) -> int | None:
    """The project's daily limit; `greediness` is the sum over the active projects."""
    if resource not in DAILY:
        return None
    total = greediness if project.status == ProjectStatus.active else greediness + project.greediness
    return effective_limit(explicit_limits(project).get(resource), project.greediness, total, pool.get(resource))


def refit(session: Session, pool: Pool, since: str) -> None:
    """Give the daily accounts from that day on the limits of now. What is taken above a lower limit stays allocated."""
    guard_limits(session, is_changing=True)
    daily = col(Account.scope).in_([Scope.system, Scope.project]) & (col(Account.period) >= since)
    _set_limits(session, daily, pool)


def refit_machine(session: Session, machine: UUID, pool: Pool) -> None:
    """Give a machine's accounts the limits of its constraints."""
    guard_limits(session, is_changing=True)
    own = (col(Account.scope) == Scope.machine) & (col(Account.owner_uuid) == machine)
    _set_limits(session, own, pool)


def _set_limits(session: Session, which: Any, pool: Pool) -> None:
    inserts.put_now(session, Account)
    statement = select(Account).where(which).order_by(*_KEY).with_for_update()
    held = session.exec(statement.execution_options(populate_existing=True)).all()
    found = {_key_of(account): account for account in held}
    for key, limit in limits_of(session, found, pool).items():
        account = found[key]
        if account.limit_micros != limit:
            account.limit_micros = limit
            account.warned_percent = 0  # the percents of another limit are told anew
            account.allocated_micros, account.updated_at = Sums.of(account).allocated_micros, now()


def guard_limits(session: Session, *, is_changing: bool = False) -> None:
    """Keep limits from changing while accounts are opened by them, until the end of the transaction: or an account
    opened at the same moment by a limit of before would keep it all day. SQLite has one writer, and no need of it.
    """
    lock(session, "limits", is_shared=not is_changing)


def lock(session: Session, name: str, *, is_shared: bool = False) -> None:
    """Have what bears this name to oneself until the end of the transaction."""
    if _is_postgres(session):
        number = int.from_bytes(hashlib.sha256(f"ledger {name}".encode()).digest()[:8], signed=True)
        kind = "pg_advisory_xact_lock_shared" if is_shared else "pg_advisory_xact_lock"
        session.execute(text(f"SELECT {kind}(:number)"), {"number": number})


def _is_postgres(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"


def _greediness(session: Session) -> float:
    active = select(func.sum(Project.greediness)).where(Project.status == ProjectStatus.active)
    return float(session.exec(active).one() or 0.0)


def _rows(session: Session, model: Any, uuids: Collection[UUID]) -> dict[UUID, Any]:
    if not uuids:
        return {}
    fresh = select(model).where(col(model.uuid).in_(uuids)).execution_options(populate_existing=True)
    found = {row.uuid: row for row in session.exec(fresh).all()}
    for uuid in uuids:
        if uuid not in found:
            noun = rows.noun_of(model)
            raise NotFound(f"There is no {noun} '{uuid}'.", details={"object": noun, "uuid": str(uuid)})
    return found


# Rows


_KEY: Any = (Account.scope, Account.owner_uuid, Account.period, Account.resource)
_SUMS: Any = (Account.limit_micros, Account.used_micros, Account.reserved_micros, Account.warned_percent)


def _open(session: Session, keys: Collection[Key], pool: Pool, machine: Machine | None) -> set[Key]:
    """Have rows of all of them, committed or ours, before any is held. Returns ours."""
    owners = _by_owner(keys)
    known = session.connection().execute(_looking(len(owners)), _named(owners))
    there = {tuple(row) for row in known}
    missing = [key for key in keys if tuple(key) not in there]
    if not missing:
        return set()
    if machine is None or any(key.owner_uuid != machine.uuid for key in missing):
        guard_limits(session)
    limits = limits_of(session, missing, pool, machine)
    ours = session.connection().execute(_OPENING, [_values(key, Sums(limits[key])) for key in sorted(missing)])
    return {Key(Scope(scope), owner, period, Resource(resource)) for scope, owner, period, resource in ours}


def _forget(session: Session, opened: Set[Key]) -> None:
    """Have them be opened by who needs them next, by the limits of then."""
    if opened:
        session.connection().execute(delete(Account).where(_are(len(owners := _by_owner(opened)))), _named(owners))


def _held(session: Session, keys: Set[Key]) -> dict[Key, Sums]:
    """The accounts, nobody else's until the end of the transaction: those that there are on SQLite; on PostgreSQL all
    of them or, where one is not there yet, none, since they are held in one order.
    """
    put_off = inserts.put_off(session, Account)
    known = {key: Sums(*(put_off[key][name] for name in Sums._fields)) for key in keys if key in put_off}
    if len(known) == len(keys):
        return known
    owners = _by_owner(unknown := keys - known.keys())
    found = session.connection().execute(
        _holding(len(owners), is_whole=_is_postgres(session)), {**_named(owners), "count": len(unknown)}
    )
    return known | {
        Key(Scope(scope), owner, period, Resource(resource)): Sums(*sums)
        for scope, owner, period, resource, *sums in found
    }


def _write(session: Session, moved: Mapping[Key, Sums], *, is_new: bool) -> None:
    """Open or change accounts that are held; what the session has read of them is read again. Those of a machine in
    the making nobody reads: they are written at the end, once for all machines of the transaction.
    """
    read = [row for row in session.identity_map.values() if isinstance(row, Account) and _key_of(row) in moved]
    inserts.put_later(session, Account, {key: _values(key, sums) for key, sums in moved.items()})
    if read or not is_new:
        inserts.put_now(session, Account)
    for row in read:
        session.expire(row)


def _values(key: Key, sums: Sums) -> dict[str, Any]:
    return {**key._asdict(), **sums._asdict(), "allocated_micros": sums.allocated_micros, "updated_at": now()}


_OPENING = postgresql.insert(Account).on_conflict_do_nothing().returning(*_KEY)

Owners = Mapping[tuple[Scope, UUID, str], list[Resource]]


def _by_owner(keys: Collection[Key]) -> Owners:
    owners: dict[tuple[Scope, UUID, str], list[Resource]] = {}
    for key in keys:
        owners.setdefault(key[:3], []).append(key.resource)
    return owners


@cache
def _looking(owners: int) -> Any:
    return select(*_KEY).where(_are(owners))


@cache
def _holding(owners: int, *, is_whole: bool) -> Any:
    statement = select(*_KEY, *_SUMS).where(_are(owners)).order_by(*_KEY)
    there = select(func.count()).select_from(Account).where(_are(owners)).scalar_subquery()
    return statement.where(there == bindparam("count")).with_for_update() if is_whole else statement


@cache
def _are(owners: int) -> Any:
    """One condition an owner and period (`_named`); row values would have SQLite read the whole table."""
    return or_(
        *(
            and_(
                col(Account.scope) == bindparam(f"scope_{n}"),
                col(Account.owner_uuid) == bindparam(f"owner_{n}"),
                col(Account.period) == bindparam(f"period_{n}"),
                col(Account.resource).in_(bindparam(f"resources_{n}", expanding=True)),
            )
            for n in range(owners)
        )
    )


def _named(owners: Owners) -> dict[str, Any]:
    """The parameters of a statement over `_are`."""
    named: dict[str, Any] = {}
    for n, ((scope, owner, period), resources) in enumerate(owners.items()):
        named |= {f"scope_{n}": scope, f"owner_{n}": owner, f"period_{n}": period, f"resources_{n}": resources}
    return named


def _key_of(account: Account) -> Key:
    return Key(Scope(account.scope), account.owner_uuid, account.period, Resource(account.resource))


def _warned(session: Session, key: Key, sums: Sums, project: UUID) -> Sums:
    """Record an event for the highest of WARNINGS that the use has reached and that was not told yet."""
    if not sums.limit_micros:
        return sums
    percent = 100 * sums.used_micros // sums.limit_micros
    reached = max((mark for mark in WARNINGS if mark <= percent), default=0)
    if reached <= sums.warned_percent:
        return sums
    is_machines = key.scope == Scope.machine
    rows.record(
        session,
        "budget.warning",
        key.owner_uuid if is_machines else project,
        project,
        scope=str(key.scope),
        resource=str(key.resource),
        percent=reached,
        used_micros=sums.used_micros,
        limit_micros=sums.limit_micros,
    )
    return sums._replace(warned_percent=reached)
