"""Works that share a transaction, on both databases: one commit, each its own outcome, nothing kept of a refusal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Session, select

from autovibe.domain import AuditEntry, Event, Project
from autovibe.errors import Conflict, DatabaseUnavailable, InternalError
from autovibe.store import Store, groups, inserts, rows, trail
from tests.api.conftest import until

GROUP = "projects of a test"


@contextmanager
def company(store: Store, works: list[Callable[[Session], Any]]) -> Iterator[list[Future[Any]]]:
    """The works, asked for while the first of their group is at work, so that all others wait and then share."""
    begun, may_end = threading.Event(), threading.Event()

    def first(_session: Session) -> None:
        begun.set()
        assert may_end.wait(30)

    with ThreadPoolExecutor(len(works) + 1) as threads:
        opener = threads.submit(store.together, GROUP, first)
        try:
            assert begun.wait(30)
            futures = []
            for work in works:
                futures.append(threads.submit(store.together, GROUP, work))
                until(lambda: len(store._groups._waiting[GROUP]) == len(futures))
        finally:
            may_end.set()
        opener.result(30)
        yield futures


def adding(name: str) -> Callable[[Session], UUID]:
    def work(session: Session) -> UUID:
        uuid = uuid4()
        inserts.later(session, Project, {"uuid": uuid, "name": name})
        rows.record(session, "project.created", uuid, uuid)
        return uuid

    return work


def refusing(session: Session) -> None:
    adding("refused")(session)
    raise Conflict("No.")


def names(store: Store) -> list[str]:
    with store.reading() as session:
        return sorted(session.exec(select(Project.name)).all())


def test_works_asked_for_at_once_share_a_commit_and_have_each_its_outcome(store: Store) -> None:
    told: list[int] = []
    store.after_commit.append(lambda: told.append(1))
    count = groups.MOST + 4
    with company(store, [adding(f"p{n:02}") for n in range(count)]) as futures:
        uuids = [future.result(30) for future in futures]
    assert len(told) == 3  # the first one's, a full one, the rest
    assert names(store) == [f"p{n:02}" for n in range(count)]
    with store.reading() as session:
        assert [rows.get(session, Project, uuid).name for uuid in uuids] == [f"p{n:02}" for n in range(count)]
        assert [event.object_uuid for event in session.exec(select(Event).order_by(Event.id)).all()] == uuids


def test_a_work_that_comes_alone_waits_for_nobody(store: Store) -> None:
    store.together(GROUP, adding("alone"))
    with pytest.raises(Conflict):
        store.together(GROUP, refusing)
    assert names(store) == ["alone"]


def test_a_refusal_is_one_works_own_and_leaves_nothing(store: Store) -> None:
    with company(store, [adding("a"), refusing, adding("b")]) as (first, refused, second):
        assert isinstance(first.result(30), UUID)
        assert isinstance(second.result(30), UUID)
        with pytest.raises(Conflict, match=r"No\."):
            refused.result(30)
    assert names(store) == ["a", "b"]


def test_where_two_meet_on_a_unique_column_the_others_are_carried_out_alone(store: Store) -> None:
    runs: list[str] = []

    def counted(name: str) -> Callable[[Session], Any]:
        def work(session: Session) -> None:
            runs.append(name)
            adding(name)(session)

        return work

    with company(store, [counted("a"), counted("same"), counted("same"), counted("b")]) as futures:
        errors = [future.exception(30) for future in futures]
    assert [type(error) for error in errors] == [type(None), type(None), IntegrityError, type(None)]
    assert names(store) == ["a", "b", "same"]
    assert sorted(runs) == ["a"] * 2 + ["b"] * 2 + ["same"] * 4


def test_what_a_work_wrote_by_itself_goes_with_its_refusal(store: Store) -> None:
    def work(session: Session) -> None:
        session.add(Project(name="gone"))
        session.flush()
        raise Conflict("No.")

    def unwritten(session: Session) -> None:
        session.add(Project(name="gone too"))
        raise Conflict("No.")

    for each, pair in ((work, ["a", "b"]), (unwritten, ["c", "d"])):
        with company(store, [adding(pair[0]), each, adding(pair[1])]) as futures:
            assert [type(future.exception(30)) for future in futures] == [type(None), Conflict, type(None)]
    assert names(store) == ["a", "b", "c", "d"]


def test_a_defect_of_one_does_not_reach_the_others(store: Store) -> None:
    def work(_session: Session) -> None:
        raise KeyError("defect")

    with company(store, [adding("a"), work, adding("b")]) as futures:
        assert [type(future.exception(30)) for future in futures] == [type(None), KeyError, type(None)]
    assert names(store) == ["a", "b"]


def test_a_later_work_finds_what_those_before_it_have_put_off(store: Store) -> None:
    found: list[list[str]] = []

    def work(session: Session) -> None:
        found.append([row["name"] for row in inserts.waiting(session, Project)])

    with company(store, [adding("a"), refusing, adding("b"), work]) as futures:
        assert futures[3].result(30) is None
    assert found == [["a", "b"]]


def test_each_has_its_own_line_in_the_audit_log(store: Store) -> None:
    lines = [trail.Line("me", "k", f"POST /{n}", 201, f"r{n}", "127.0.0.1") for n in range(3)]

    def asked(line: trail.Line, work: Callable[[Session], Any]) -> Callable[[Session], Any]:
        def called(session: Session) -> Any:
            assert trail.current.get() is line
            return work(session)

        return called

    begun, may_end = threading.Event(), threading.Event()

    def first(_session: Session) -> None:
        begun.set()
        assert may_end.wait(30)

    def ask(line: trail.Line, work: Callable[[Session], Any]) -> Any:
        trail.current.set(line)
        return store.together(GROUP, asked(line, work))

    with ThreadPoolExecutor(4) as threads:
        opener = threads.submit(store.together, GROUP, first)
        assert begun.wait(30)
        works = [adding("a"), refusing, adding("b")]
        futures = [threads.submit(ask, line, work) for line, work in zip(lines, works, strict=True)]
        until(lambda: len(store._groups._waiting[GROUP]) == 3)
        may_end.set()
        opener.result(30)
        assert [type(future.exception(30)) for future in futures] == [type(None), Conflict, type(None)]
    assert [line.is_written for line in lines] == [True, False, True]
    with store.reading() as session:
        assert sorted(session.exec(select(AuditEntry.request_id)).all()) == ["r0", "r2"]


def test_a_database_that_does_not_answer_is_told_to_each(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = inserts.write

    def unavailable(session: Session) -> None:
        if inserts.waiting(session, Project):
            raise DatabaseUnavailable("Not now.")
        write(session)

    monkeypatch.setattr(inserts, "write", unavailable)
    with company(store, [adding("a"), adding("b")]) as futures:
        errors = [future.exception(30) for future in futures]
    assert [type(error) for error in errors] == [DatabaseUnavailable] * 2
    monkeypatch.undo()
    assert names(store) == []
    store.together(GROUP, adding("c"))
    assert names(store) == ["c"]


def test_where_the_turn_does_not_come_nobody_waits_for_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    may_fail = threading.Event()

    def never() -> None:
        asked.append(1)
        assert may_fail.wait(30)
        raise DatabaseUnavailable("Busy.")

    monkeypatch.setattr(store, "_take_turn", never)
    count = groups.MOST + 4
    with ThreadPoolExecutor(count) as threads:
        futures = [threads.submit(store.together, GROUP, adding(f"p{n}")) for n in range(count)]
        until(lambda: len(store._groups._waiting.get(GROUP, ())) == count)
        may_fail.set()
        assert {type(future.exception(30)) for future in futures} == {DatabaseUnavailable}
    assert asked == [1]
    monkeypatch.undo()
    store.together(GROUP, adding("after"))
    assert names(store) == ["after"]


def test_who_was_done_before_the_database_went_away_is_told_so(store: Store) -> None:
    errors: list[Exception] = [KeyError("have them carried out alone"), DatabaseUnavailable("Not now.")]

    def work(_session: Session) -> None:
        raise errors.pop(0)

    with company(store, [adding("a"), work, adding("b")]) as futures:
        found = [type(future.exception(30)) for future in futures]
    assert found == [type(None), DatabaseUnavailable, DatabaseUnavailable]
    assert names(store) == ["a"]


class _Driver(Exception):
    """What psycopg raises, as far as the store looks at it."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__("of a test")
        self.sqlstate = sqlstate


def test_a_lock_that_one_waited_for_in_vain_is_not_waited_for_by_the_others(store: Store) -> None:
    def work(_session: Session) -> None:
        raise OperationalError("UPDATE", {}, _Driver("55P03"))

    with company(store, [adding("a"), work, adding("b")]) as futures:
        assert [type(future.exception(30)) for future in futures] == [DatabaseUnavailable] * 3
    assert names(store) == []


def test_a_deadlock_at_the_end_is_met_by_carrying_each_out_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write, errors = inserts.write, [OperationalError("INSERT", {}, _Driver("40P01"))]

    def once_in_deadlock(session: Session) -> None:
        if len(inserts.waiting(session, Project)) > 1:
            raise errors.pop()
        write(session)

    monkeypatch.setattr(inserts, "write", once_in_deadlock)
    with company(store, [adding("a"), adding("b")]) as futures:
        assert [type(future.exception(30)) for future in futures] == [type(None)] * 2
    assert (names(store), errors) == (["a", "b"], [])


def test_it_does_not_nest(store: Store) -> None:
    with store.transaction(), pytest.raises(InternalError):
        store.together(GROUP, adding("a"))
    with pytest.raises(InternalError):
        store.together(GROUP, lambda _session: store.together(GROUP, adding("b")))
    assert names(store) == []


def test_groups_do_not_wait_for_each_others_company(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: store.together(f"group {n % 4}", adding(f"p{n}")), range(40)))
    assert len(set(made)) == 40
    assert len(names(store)) == 40
