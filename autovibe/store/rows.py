"""What every verb does with rows: get one or say which is missing, change one if it is still as expected, record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import UUID

from sqlmodel import Session, SQLModel, select, update

from autovibe.domain import Event
from autovibe.errors import NotFound
from autovibe.store import inserts, trail

Row = TypeVar("Row", bound=SQLModel)
Found = TypeVar("Found")

CHANNEL = "autovibe_event"
"""The PostgreSQL channel that `record` notifies at commit."""

_FOUND = "what was found once"


def get(session: Session, model: type[Row], uuid: UUID) -> Row:
    """The row. Raises NotFound naming noun and uuid."""
    row = session.get(model, uuid)
    if row is None:
        noun = noun_of(model)
        raise NotFound(f"There is no {noun} '{uuid}'.", details={"object": noun, "uuid": str(uuid)})
    return row


def held(session: Session, model: type[Row], uuid: UUID) -> Row:
    """The row as it is now, nobody else's until the end of the transaction. Raises NotFound."""
    table: Any = model
    session.exec(select(table.uuid).where(table.uuid == uuid).with_for_update()).first()
    return get(session, model, uuid)


def once(session: Session, name: tuple[Any, ...], find: Callable[[], Found]) -> Found:
    """What `find` found when this transaction asked for it first: of what is its own since, or changes seldom."""
    known = session.info.setdefault(_FOUND, {})
    if name not in known:
        known[name] = find()
    found: Found = known[name]
    return found


def noun_of(model: type[SQLModel]) -> str:
    """The word for a table in messages: "machine", "api key"."""
    return str(model.__tablename__).replace("_", " ")


def compare_and_set(
    session: Session, model: type[SQLModel], uuid: UUID, *, expect: Mapping[str, Any], change: Mapping[str, Any]
) -> bool:
    """Change the row if it is still as expected, in one UPDATE; True when it was.

    A value of `expect` is one value, None, or a tuple, list or set of the values that will do:
    `expect={"status": ("active", "working"), "operation_uuid": None}`. Rows the session holds are brought up to date.
    """
    table: Any = model
    conditions = [table.uuid == uuid]
    for name, wanted in expect.items():
        column = getattr(table, name)
        if isinstance(wanted, tuple | list | set | frozenset):
            conditions.append(column.in_(list(wanted)))
        else:
            conditions.append(column.is_(None) if wanted is None else column == wanted)
    statement = update(model).where(*conditions).values(**change).execution_options(synchronize_session=False)
    session.flush()
    is_changed = bool(session.exec(statement).rowcount)
    held = session.identity_map.get(session.identity_key(model, uuid))
    if held is not None:
        session.refresh(held)
    return is_changed


def record(session: Session, kind: str, object_uuid: UUID, project_uuid: UUID | None = None, **body: Any) -> None:
    """Add an event to the transaction; the tailers of all hub processes learn of it when it commits."""
    event = {"kind": kind, "object_uuid": object_uuid, "project_uuid": project_uuid, "body": body}
    inserts.later(session, Event, event)
    trail.note(project_uuid=project_uuid)
    inserts.notify(session, CHANNEL)
