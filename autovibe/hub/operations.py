"""What a client can wait for, and how every accepting verb accepts: one transaction, then the workflow.

`accept` is the only place where an order becomes an operation:

    decide(session, attempt) -> Accepted     in one transaction, together with the row of the Idempotency-Key
    commit
    workflows.start_soon(operation)          a hub killed before this leaves an accepted operation for upkeep

Names, vmids, labels and keys are unique columns. Two orders that meet on one of them are told apart by the database:
the one that comes second is decided again from the top, and then sees the first one's row.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import bindparam
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from autovibe import schemas
from autovibe.domain import IdempotencyKey, Operation
from autovibe.domain.actor import Actor
from autovibe.errors import Conflict, IdempotencyMismatch
from autovibe.hub import Hub
from autovibe.store import inserts, rows, trail
from autovibe.types import OperationKind

logger = logging.getLogger(__name__)

_ATTEMPTS = 30

_KNOWN = select(IdempotencyKey.request_hash, IdempotencyKey.object_kind, IdempotencyKey.object_uuid).where(
    IdempotencyKey.actor == bindparam("actor"), IdempotencyKey.key == bindparam("of_key")
)


@dataclass(frozen=True)
class Once:
    """An Idempotency-Key, with the hash of the request it came with."""

    key: str
    request_hash: str


class Start(NamedTuple):
    """What of an operation tells the workflows to begin it."""

    uuid: UUID
    kind: str


@dataclass(frozen=True)
class Accepted:
    """What was decided: the object to answer, and the operation to start, where there is one."""

    object_uuid: UUID
    operation: Operation | Start | None = None


def accept(
    hub: Hub,
    actor: Actor,
    once: Once | None,
    kind: str,
    decide: Callable[[Session, int], Accepted],
    *,
    group: str | None = None,
) -> UUID:
    """Carry out `decide` at most once for a key, and start what it accepted. Returns the object's uuid.

    Decisions of one `group` may share a transaction, see `Store.together`.

    A repeat returns the first one's object and decides nothing. Raises IdempotencyMismatch when the key came with
    another request, and whatever `decide` raises, in which case nothing is recorded.
    """
    for attempt in range(_ATTEMPTS):
        try:
            decided = partial(_decide, actor, once, kind, decide, attempt)
            if group is not None:
                accepted, start = hub.store.together(group, decided)
            else:
                with hub.store.transaction() as session:
                    accepted, start = decided(session)
        except IntegrityError as error:
            logger.debug("Two orders met on a unique column; deciding again: %s", error.orig)
            time.sleep(random.uniform(0, 0.01 * (attempt + 1)))  # noqa: S311 - no secret
            continue
        except Conflict:
            # The same request may have been accepted since this one looked for it, and be what stands in its way.
            if once is None or (repeated := _accepted(hub, actor, once, kind)) is None:
                raise
            return repeated
        if start is not None:
            hub.workflows.start_soon(*start)
        return accepted
    raise Conflict("Too many requests compete for the same name or id; try again.")


def _decide(
    actor: Actor,
    once: Once | None,
    kind: str,
    decide: Callable[[Session, int], Accepted],
    attempt: int,
    session: Session,
) -> tuple[UUID, tuple[UUID, OperationKind] | None]:
    trail.forget()
    if once is not None and (repeated := _repeated(session, actor, once, kind)) is not None:
        return repeated, None
    accepted = decide(session, attempt)
    trail.note(kind, accepted.object_uuid)
    if once is not None:
        known = {"actor": actor.identity, "key": once.key, "request_hash": once.request_hash}
        inserts.later(session, IdempotencyKey, {**known, "object_kind": kind, "object_uuid": accepted.object_uuid})
    session.flush()
    operation = accepted.operation
    start = (operation.uuid, OperationKind(operation.kind)) if operation is not None else None
    return accepted.object_uuid, start


def _accepted(hub: Hub, actor: Actor, once: Once, kind: str) -> UUID | None:
    with hub.store.reading() as session:
        return _repeated(session, actor, once, kind)


def _repeated(session: Session, actor: Actor, once: Once, kind: str) -> UUID | None:
    row = _of_this_transaction(session, actor, once)
    row = row or session.connection().execute(_KNOWN, {"actor": actor.identity, "of_key": once.key}).first()
    if row is None:
        return None
    request_hash, object_kind, object_uuid = row
    if request_hash != once.request_hash or object_kind != kind:
        raise IdempotencyMismatch(
            f"The Idempotency-Key '{once.key}' was used for another request; send a new key.",
            details={"idempotency_key": once.key},
        )
    return object_uuid


def _of_this_transaction(session: Session, actor: Actor, once: Once) -> Any:
    for row in inserts.waiting(session, IdempotencyKey):
        if (row["actor"], row["key"]) == (actor.identity, once.key):
            return row["request_hash"], row["object_kind"], row["object_uuid"]
    return None


def show(hub: Hub, uuid: UUID) -> schemas.Operation:
    """Raises NotFound."""
    with hub.store.reading() as session:
        return schemas.Operation.model_validate(rows.get(session, Operation, uuid))


def unfinished(session: Session, machine: UUID, kind: OperationKind) -> Operation | None:
    """The operation of that kind the machine has, accepted or running."""
    statement = select(Operation).where(
        Operation.machine_uuid == machine,
        Operation.kind == kind,
        col(Operation.finished_at).is_(None),
    )
    return session.exec(statement).first()
