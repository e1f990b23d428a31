"""Machines that run since before there were budgets: each gets a price, an estimate and a reservation, once.

The migration that brought budgets has marked them (`UNPRICED`). From the adoption on they are metered as all others
are; what they used before is nobody's. One that does not fit into its project's budget is blocked as at any limit.
"""

from __future__ import annotations

import logging
from uuid import UUID

from sqlmodel import col, select

from autovibe.domain import Checkpoint, Machine, Project
from autovibe.domain.columns import now
from autovibe.domain.machine_type import machine_type
from autovibe.errors import AutovibeError, LimitExceeded
from autovibe.hub import Hub, spawning
from autovibe.hub.blocking import BLOCKABLE, block
from autovibe.store import rows

logger = logging.getLogger(__name__)

UNPRICED = -1
"""The price of a machine that was there when budgets came (migration 0002)."""


def adopt(hub: Hub) -> None:
    """Adopt the marked machines whose VM runs now."""
    with hub.store.reading() as session:
        statement = select(Machine.uuid).where(
            col(Machine.status).in_(list(BLOCKABLE)), Machine.price_micros == UNPRICED
        )
        found = list(session.exec(statement))
    for uuid in found:
        try:
            limit = _adopt(hub, uuid)
            if limit is not None and not block(hub, uuid, limit):
                _leave(hub, uuid)
        except AutovibeError as error:
            logger.warning("Machine %s cannot be adopted now: %s %s", uuid, error.message, error.log_detail)


def _leave(hub: Hub, uuid: UUID) -> None:
    """A machine that could be neither adopted nor blocked, since it is being checkpointed, is looked at again."""
    with hub.store.transaction() as session:
        expect = {"reservation_uuid": None, "metered_at": None, "blocked": None}
        rows.compare_and_set(session, Machine, uuid, expect=expect, change={"price_micros": UNPRICED})


def _adopt(hub: Hub, uuid: UUID) -> LimitExceeded | None:
    """Returns the limit that has no room for the machine."""
    with hub.store.reading() as session:
        base = spawning.base_of(hub, machine_type(rows.get(session, Machine, uuid).type))
    with hub.store.transaction() as session:
        session.get(Machine, uuid, with_for_update={"key_share": True})
        machine = rows.get(session, Machine, uuid)
        if machine.price_micros != UNPRICED or machine.status not in BLOCKABLE:
            return None
        kind = machine_type(machine.type)
        project = rows.get(session, Project, machine.project_uuid)
        origin = session.get(Checkpoint, machine.checkpoint_uuid) if machine.checkpoint_uuid is not None else None
        machine.currency = hub.ledger.currency
        spawning.appraise(hub, machine, kind, spawning.disk_gb(session, project, origin, kind), base)
        session.add(machine)
        try:
            hub.ledger.reserve_machine(session, machine, hub.tail_seconds)
        except LimitExceeded as error:
            return error
        machine.metered_at = now()
        session.add(machine)
        return None
