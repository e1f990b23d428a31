"""New rows below the ORM: what is written is what the model would have written, now or at the transaction's end."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, func
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from autovibe.domain import Account, AuditEntry, Event, IdempotencyKey, Machine, Operation, Project
from autovibe.domain.budget import LIFE, Scope
from autovibe.store import Store, inserts, rows
from autovibe.types import MachineStatus, OperationKind, Resource


def machine(project: UUID, **more: Any) -> Machine:
    return inserts.draft(Machine, name="m", type="shell", project_uuid=project, **more)


def project(store: Store) -> UUID:
    with store.transaction() as session:
        made = Project(name="p")
        session.add(made)
    return made.uuid


def test_a_draft_becomes_the_row_the_model_would_have_made(store: Store) -> None:
    owner = project(store)
    drafted = machine(owner, prompt="true", estimate={"n": 1}, file_modifications={"/a": "b"})
    drafted.vmid = 9001
    with store.transaction() as session:
        inserts.add(session, Machine, inserts.values_of(drafted))
    with store.reading() as session:
        found = rows.get(session, Machine, drafted.uuid)
        assert found.model_dump() == Machine(**inserts.values_of(drafted)).model_dump()
        assert (found.status, found.vmid, found.estimate, found.blocked) == (
            MachineStatus.spawning, 9001, {"n": 1}, None,
        )  # fmt: skip
        assert found.spawned_at.tzinfo is not None


def test_what_is_written_later_is_there_after_the_transaction_and_not_before(store: Store) -> None:
    with store.transaction() as session:
        rows.record(session, "a", uuid4(), number=1)
        rows.record(session, "b", uuid4(), number=2)
        inserts.later(session, AuditEntry)  # of no rows
        assert session.exec(select(func.count()).select_from(Event)).one() == 0
    with store.reading() as session:
        assert [event.body for event in session.exec(select(Event).order_by(col(Event.id)))] == [
            {"number": 1},
            {"number": 2},
        ]


def test_what_was_put_off_goes_with_a_transaction_that_fails(store: Store) -> None:
    with pytest.raises(RuntimeError), store.transaction() as session:  # noqa: PT012
        rows.record(session, "a", uuid4())
        raise RuntimeError
    with store.transaction() as session:
        session.add(Project(name="p"))
    with store.reading() as session:
        assert session.exec(select(func.count()).select_from(Event)).one() == 0


def test_two_of_one_key_meet_at_the_end(store: Store) -> None:
    known = {"actor": "a", "key": "k", "request_hash": "h", "object_kind": "machine", "object_uuid": uuid4()}
    with store.transaction() as session:
        inserts.later(session, IdempotencyKey, known)
    with pytest.raises(IntegrityError), store.transaction() as session:
        inserts.later(session, IdempotencyKey, known)


def test_many_kinds_of_rows_take_few_statements(store: Store) -> None:
    owner, seen = project(store), list[str]()
    drafted = machine(owner, prompt="true")
    operation = {"kind": OperationKind.spawn, "object_uuid": drafted.uuid, "actor": "a", "steps": ["clone"]}

    def note(_c: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        seen.append(statement)

    event.listen(store.engine, "before_cursor_execute", note)
    with store.transaction() as session:
        inserts.later(session, Machine, inserts.values_of(drafted))
        inserts.later(session, Operation, operation)
        for number in range(4):
            rows.record(session, "machine.status", drafted.uuid, owner, number=number)
    event.remove(store.engine, "before_cursor_execute", note)
    written = [statement for statement in seen if "INSERT" in statement]
    assert len(written) == (3 if store.is_sqlite else 1)
    with store.reading() as session:
        assert rows.get(session, Machine, drafted.uuid).prompt == "true"
        assert session.exec(select(Operation.steps)).all() == [["clone"]]
        assert session.exec(select(func.count()).select_from(Event)).one() == 4


@pytest.mark.parametrize("count", [1, 3, 30])
def test_put_replaces_by_the_primary_key(store: Store, count: int) -> None:
    owners = [uuid4() for _ in range(count)]

    def put(session: Session, used: int, limit: int | None) -> None:
        inserts.put(
            session,
            Account,
            *(
                {
                    "scope": Scope.machine, "owner_uuid": owner, "period": LIFE, "resource": Resource.money,
                    "limit_micros": limit, "allocated_micros": limit, "used_micros": used,
                }
                for owner in owners
            ),
        )  # fmt: skip

    for used, limit in ((1, None), (5, 9), (6, None)):
        with store.transaction() as session:
            put(session, used, limit)
        with store.reading() as session:
            found = session.exec(select(Account.owner_uuid, Account.used_micros, Account.limit_micros)).all()
            assert sorted(found) == sorted((owner, used, limit) for owner in owners)
