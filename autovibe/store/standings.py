"""How projects stand on a day, many at once: two statements however many projects are shown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlmodel import Session, col, func, select

from autovibe.domain import Account, Project
from autovibe.domain.budget import DAILY, SYSTEM, Scope, day_of, effective_limit, explicit_limits
from autovibe.domain.columns import now
from autovibe.store import accounts
from autovibe.store.ledger import Key, Ledger
from autovibe.types import ProjectStatus, Resource

RESOURCES = (*DAILY, Resource.cpu_hours)
"""What a day's accounts of a project count."""


class Standing(NamedTuple):
    """One resource of one project on one day, in millionths; None: there is no such limit.

    `explicit` is the project's own limit, `share` its part of the pool, `effective` what both come to now. `allocated`
    is more than that only where more was used and reserved before the limit was lowered.
    """

    explicit: int | None
    share: int | None
    effective: int | None
    allocated: int | None
    used: int
    reserved: int

    @property
    def remaining(self) -> int | None:
        """What can still be reserved, None for any amount."""
        return None if self.allocated is None else self.allocated - self.used - self.reserved


def standings(
    ledger: Ledger, session: Session, projects: Sequence[Project], moment: datetime | None = None
) -> dict[UUID, dict[Resource, Standing]]:
    """By project and resource; a project that has no accounts on the day stands as they would be opened."""
    statement = select(Account).where(
        Account.scope == Scope.project,
        col(Account.owner_uuid).in_([project.uuid for project in projects]),
        Account.period == day_of(moment or now()),
    )
    found = {(account.owner_uuid, account.resource): account for account in session.exec(statement).all()}
    active = select(func.sum(Project.greediness)).where(Project.status == ProjectStatus.active)
    total = float(session.exec(active).one() or 0.0)
    return {
        project.uuid: {
            resource: _standing(ledger, project, total, resource, found.get((project.uuid, resource)))
            for resource in RESOURCES
        }
        for project in projects
    }


def _standing(ledger: Ledger, project: Project, active: float, resource: Resource, account: Account | None) -> Standing:
    total = active if project.status == ProjectStatus.active else active + project.greediness
    pool = ledger.pool.get(resource) if resource in DAILY else None
    of_the_pool = effective_limit(None, project.greediness, total, pool)
    explicit = explicit_limits(project).get(resource)
    effective = accounts.project_limit(project, resource, active, ledger.pool)
    if account is None:
        return Standing(explicit, of_the_pool, effective, effective, 0, 0)
    return Standing(
        explicit, of_the_pool, effective, account.allocated_micros, account.used_micros, account.reserved_micros
    )


def of_all(ledger: Ledger, session: Session, moment: datetime | None = None) -> dict[Resource, Standing]:
    """How the pool stands, and with it all projects together; without a pool there is no limit to them."""
    keys = [Key(Scope.system, SYSTEM, day_of(moment or now()), resource) for resource in RESOURCES]
    return {
        key.resource: Standing(
            None,
            None,
            account.limit_micros,
            account.allocated_micros,
            account.used_micros,
            account.reserved_micros,
        )
        for key, account in accounts.read(session, keys, ledger.pool).items()
    }
