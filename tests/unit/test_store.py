"""The store's promises, on both databases: transactions, readings, translation of errors, rows."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import select

from autovibe.domain import Event, Machine, Project
from autovibe.errors import ConfigurationError, DatabaseUnavailable, InsufficientSpace, InternalError, NotFound
from autovibe.store import Store, rows
from autovibe.store.turn import Turn
from autovibe.types import MachineStatus
from tests.conftest import Postgres


def make_machine(store: Store, **values: object) -> Machine:
    project = Project(name=f"p-{uuid4()}")
    machine = Machine(name=f"m-{uuid4()}"[:40], type="shell", project_uuid=project.uuid, **values)
    with store.transaction() as session:
        session.add(project)
        session.flush()
        session.add(machine)
    return machine


def test_a_transaction_commits_at_its_end_and_tells(store: Store) -> None:
    told: list[int] = []
    store.after_commit.append(lambda: told.append(1))
    machine = make_machine(store)
    assert told == [1]
    assert machine.name.startswith("m-")  # usable after the transaction
    with store.reading() as session:
        found = rows.get(session, Machine, machine.uuid)
        assert found.spawned_at == machine.spawned_at
        assert found.spawned_at.tzinfo is not None


def test_an_exception_rolls_back_and_tells_nobody(store: Store) -> None:
    told: list[int] = []
    store.after_commit.append(lambda: told.append(1))
    with pytest.raises(KeyError), store.transaction() as session:  # noqa: PT012 - the context is under test
        session.add(Project(name="gone"))
        session.flush()
        raise KeyError("stop")
    with store.reading() as session:
        assert session.exec(select(Project)).all() == []
    assert told == []


def test_a_constraint_is_left_to_the_caller_and_a_savepoint_survives_it(store: Store) -> None:
    with store.transaction() as session:
        session.add(Project(name="one"))
        session.flush()
        with pytest.raises(IntegrityError), session.begin_nested():  # noqa: PT012
            session.add(Project(name="one"))
            session.flush()
        session.add(Project(name="two"))
    with pytest.raises(IntegrityError), store.transaction() as session:
        session.add(Project(name="two"))
    with store.reading() as session:
        assert sorted(session.exec(select(Project.name)).all()) == ["one", "two"]


def test_foreign_keys_hold(store: Store) -> None:
    with pytest.raises(IntegrityError), store.transaction() as session:
        session.add(Machine(name="m", type="shell", project_uuid=uuid4()))


def test_a_reading_cannot_write(store: Store) -> None:
    machine = make_machine(store)
    with pytest.raises(InternalError), store.reading() as session:
        session.add(Project(name="lost"))
    with pytest.raises(InternalError), store.reading() as session:
        rows.get(session, Machine, machine.uuid).progress = "lost"
    with pytest.raises(Exception, match=r"readonly|read-only"), store.reading() as session:
        session.connection().execute(text("DELETE FROM project"))
    # and the connection is as good as before
    with store.transaction() as session:
        session.add(Project(name="kept"))


def test_a_reading_sees_one_moment(store: Store) -> None:
    make_machine(store)
    with store.reading() as session:
        before = session.exec(select(Machine.uuid)).all()
        make_machine(store)
        assert session.exec(select(Machine.uuid)).all() == before
    with store.reading() as session:
        assert len(session.exec(select(Machine.uuid)).all()) == 2


def test_transactions_do_not_nest(store: Store) -> None:
    with store.transaction(), pytest.raises(InternalError), store.transaction():
        pass
    make_machine(store)  # the turn was given back


def test_get_names_what_is_missing(store: Store) -> None:
    uuid = uuid4()
    with pytest.raises(NotFound, match=f"There is no machine '{uuid}'"), store.reading() as session:
        rows.get(session, Machine, uuid)


def test_compare_and_set(store: Store) -> None:
    machine = make_machine(store)
    live = {"status": (MachineStatus.spawning, MachineStatus.active), "exit_status": None}
    with store.transaction() as session:
        held = rows.get(session, Machine, machine.uuid)
        assert rows.compare_and_set(session, Machine, machine.uuid, expect=live, change={"status": "working"})
        assert held.status == "working"
        assert not rows.compare_and_set(session, Machine, machine.uuid, expect=live, change={"status": "failed"})
        assert not rows.compare_and_set(session, Machine, uuid4(), expect=live, change={"status": "failed"})
    with store.reading() as session:
        assert rows.get(session, Machine, machine.uuid).status == "working"


def test_one_of_many_wins_a_compare_and_set(store: Store) -> None:
    machine = make_machine(store)
    won: list[int] = []

    def attempt(number: int) -> None:
        with store.transaction() as session:
            if rows.compare_and_set(
                session, Machine, machine.uuid, expect={"status": "spawning"}, change={"status": "active"}
            ):
                rows.record(session, "machine.status", machine.uuid, status="active", number=number)
                won.append(number)

    run_at_once(attempt, 12)
    assert len(won) == 1
    with store.reading() as session:
        assert [event.body["number"] for event in session.exec(select(Event)).all()] == won


def test_many_writers_and_readers_at_once(store: Store) -> None:
    machine = make_machine(store)

    def work(number: int) -> None:
        for _ in range(10):
            with store.transaction() as session:
                row = session.exec(select(Machine).where(Machine.uuid == machine.uuid).with_for_update()).one()
                row.output_bytes += 1
            with store.reading() as session:
                rows.get(session, Machine, machine.uuid)

    run_at_once(work, 16)
    with store.reading() as session:
        assert rows.get(session, Machine, machine.uuid).output_bytes == 160


def test_check_measures(store: Store) -> None:
    assert 0 < store.check() < 5


def test_a_store_can_be_used_after_close(store: Store) -> None:
    make_machine(store)
    store.close()
    make_machine(store)


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://a@b/c", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        Store(url)


def test_the_password_is_in_no_message() -> None:
    store = Store("postgresql://someone:s3cret@127.0.0.1:1/none")
    assert store.url.drivername == "postgresql+psycopg"
    with pytest.raises(DatabaseUnavailable) as caught, store.reading() as session:
        session.connection()
    assert "s3cret" not in str(caught.value) + caught.value.log_detail
    assert "127.0.0.1" in caught.value.message


def test_a_wrong_password_is_no_matter_of_waiting(postgres: Postgres) -> None:
    refused = [make_url(postgres.url).set(password="wr0ng"), make_url(postgres.url).set(database="missing")]
    for url in refused:
        store = Store(url.render_as_string(hide_password=False))
        with pytest.raises(ConfigurationError, match="refuses") as caught:
            store.check()
        assert "wr0ng" not in caught.value.message
        store.close()


def test_a_lost_connection_is_told_and_the_next_one_works(store: Store) -> None:
    if store.is_sqlite:
        return  # it has none
    make_machine(store)
    with pytest.raises(DatabaseUnavailable), store.transaction() as session:  # noqa: PT012
        ours = session.connection().execute(text("SELECT pg_backend_pid()")).scalar_one()
        with store.reading() as other:
            other.connection().execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": ours})
        session.connection().execute(text("SELECT 1"))
    make_machine(store)


def test_a_deadlock_is_told_as_try_again(store: Store) -> None:
    one, two = make_machine(store), make_machine(store)
    both_hold = threading.Barrier(2, timeout=20) if not store.is_sqlite else None  # SQLite lets in one at a time
    ended: list[type[BaseException] | None] = []

    def take(first: Machine, second: Machine) -> None:
        try:
            with store.transaction() as session:
                for machine in (first, second):
                    rows.compare_and_set(session, Machine, machine.uuid, expect={}, change={"progress": "mine"})
                    if both_hold and machine is first:
                        both_hold.wait()
            ended.append(None)
        except DatabaseUnavailable as error:
            ended.append(type(error))

    threads = [threading.Thread(target=take, args=pair) for pair in ((one, two), (two, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(map(str, ended)) == sorted(map(str, [None, None if store.is_sqlite else DatabaseUnavailable]))


def test_a_sqlite_file_is_private_and_another_writer_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autovibe.store.PATIENCE_SECONDS", 0.3)
    path = tmp_path / "hub" / "autovibe.db"
    one, other = Store(f"sqlite:///{path}"), Store(f"sqlite:///{path}")
    one.migrate(tmp_path / "backups")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with one.transaction() as session:
        session.add(Project(name="first"))
        session.flush()
        with pytest.raises(DatabaseUnavailable), other.transaction() as second:  # another process would see the same
            second.add(Project(name="second"))
        with other.reading() as view:
            assert view.exec(select(Project)).all() == []
    with other.transaction() as session:
        session.add(Project(name="second"))
    one.close(), other.close()


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'small.db'}")
    store.migrate(tmp_path / "backups")
    with pytest.raises(InsufficientSpace, match="full"), store.transaction() as session:  # noqa: PT012
        pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar_one()
        session.connection().exec_driver_sql(f"PRAGMA max_page_count={pages}")
        session.add(Project(name="big", description="x" * 1_000_000))
    store.close()


def test_turns_are_fair() -> None:
    turn, order = Turn(), list[int]()
    assert turn.take(1)

    def wait(number: int) -> None:
        assert turn.take(10)
        order.append(number)
        turn.give()

    threads = []
    for number in range(8):
        thread = threading.Thread(target=wait, args=(number,))
        thread.start()
        threads.append(thread)
        while len(turn._waiting) <= number:
            time.sleep(0.001)
    assert not turn.take(0.01)
    turn.give()
    for thread in threads:
        thread.join(10)
    assert order == list(range(8))


def run_at_once(work: object, count: int) -> None:
    """Run `work(number)` in `count` threads; the first exception of any is raised here."""
    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failed:
        raise failed[0]
