"""The ledger's own rules, on both databases: once by uuid and key, refusals, limits that change, its arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event
from sqlmodel import Session, select

from autovibe.domain import Account, Event, LedgerEntry, Machine, Project, Reservation
from autovibe.domain.budget import (
    LIFE,
    MOST_MICROS,
    SYSTEM,
    Prices,
    Scope,
    Shape,
    day_of,
    effective_limit,
    micros_of,
    running,
    spent,
)
from autovibe.domain.columns import now
from autovibe.errors import InternalError, LimitExceeded, NotFound
from autovibe.store import Store, rows
from autovibe.store.ledger import Holder, Key, Ledger
from autovibe.types import MICROS, Resource
from tests.unit import ledger_model

R = Resource


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({R.money: 10 * MICROS})


@pytest.fixture
def project(store: Store) -> UUID:
    return ledger_model.make_project(store, daily_money_micros=MICROS)


@pytest.fixture
def holder(store: Store, project: UUID) -> Iterator[Holder]:
    yield Holder(project, ledger_model.make_machine(store, project, max_money_micros=MICROS // 2))
    ledger_model.check(store)


def do(store: Store, verb: Callable[..., Any], *given: Any, **more: Any) -> Any:
    with store.transaction() as session:
        return verb(session, *given, **more)


def count(store: Store, table: type) -> int:
    with store.reading() as session:
        return len(session.exec(select(table)).all())


# Once


def test_many_threads_reserve_under_one_uuid_once(store: Store, ledger: Ledger, holder: Holder) -> None:
    uuid, at_once = uuid4(), threading.Barrier(8)

    def reserve(_: int) -> None:
        at_once.wait()
        do(store, ledger.reserve, uuid, holder, {R.money: 1000, R.time_hours: 5})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(reserve, range(8)))
    assert (count(store, LedgerEntry), count(store, Reservation)) == (2, 2)


def test_many_threads_charge_under_one_key_once_also_of_several_reservations(
    store: Store, ledger: Ledger, holder: Holder
) -> None:
    uuids, at_once = [uuid4() for _ in range(8)], threading.Barrier(8)
    for uuid in uuids:
        do(store, ledger.reserve, uuid, holder, {R.money: 10})

    def charge(uuid: UUID) -> bool:
        at_once.wait()
        return bool(do(store, ledger.charge, uuid, {R.money: 5, R.cpu_hours: 1}, key="the same"))

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(charge, uuids)) == [False] * 7 + [True]


def test_concurrent_charges_of_one_reservation_add_a_resource_once(
    store: Store, ledger: Ledger, holder: Holder
) -> None:
    uuid, at_once = uuid4(), threading.Barrier(6)
    do(store, ledger.reserve, uuid, holder, {R.money: 600})

    def charge(_: int) -> None:
        at_once.wait()
        do(store, ledger.charge, uuid, {R.money: 100, R.cpu_hours: 7})

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(charge, range(6)))
    assert do(store, ledger.settle, uuid, {R.cpu_hours: 1, R.money: 1}) == {R.cpu_hours: 1, R.money: 0}
    with store.reading() as session:
        key = Key(Scope.project, holder.project_uuid, day_of(now()), R.cpu_hours)
        assert ledger.look(session, key).used_micros == 43


def test_what_is_closed_stays_closed(store: Store, ledger: Ledger, holder: Holder) -> None:
    uuid = uuid4()
    do(store, ledger.reserve, uuid, holder, {R.money: 100})
    assert do(store, ledger.settle, uuid, {R.money: 30}) == {R.money: 30}
    do(store, ledger.reserve, uuid, holder, {R.money: 100})
    assert do(store, ledger.settle, uuid, {R.money: 30}) == {}
    do(store, ledger.release, uuid)
    for verb in (ledger.charge, ledger.extend):
        with pytest.raises(InternalError, match="is not open"):
            do(store, verb, uuid, {R.money: 1})
    with pytest.raises(InternalError, match="is not open"):
        do(store, ledger.carry, uuid, uuid4(), moment=now())


# Refusals


def test_a_refusal_says_where_and_leaves_the_transaction_usable(store: Store, ledger: Ledger, holder: Holder) -> None:
    uuid = uuid4()
    with store.transaction() as session:
        with pytest.raises(LimitExceeded, match=r"Machine 'm' has 0\.5 USD left of 0\.5 USD in its life") as caught:
            ledger.reserve(session, uuid, holder, {R.money: MICROS, R.time_hours: 1})
        ledger.reserve(session, uuid, holder, {R.money: 1000, R.time_hours: 1})
    assert caught.value.details["scope"] == "machine"
    with store.transaction() as session:
        with pytest.raises(LimitExceeded):
            ledger.extend(session, uuid, {R.time_hours: 1, R.money: MICROS})
        with pytest.raises(LimitExceeded):
            ledger.charge(session, uuid, {R.cpu_hours: 1, R.money: MICROS}, key="k")
        assert ledger.charge(session, uuid, {R.money: 1}, key="k")
        assert ledger.reserved(session, uuid) == {R.money: 999, R.time_hours: 1}


def test_a_day_without_room_is_not_carried_to(store: Store, ledger: Ledger, holder: Holder) -> None:
    uuid, tomorrow = uuid4(), now() + timedelta(days=1)
    do(store, ledger.reserve, uuid, holder, {R.money: 1000})
    do(store, ledger.reserve, uuid4(), Holder(holder.project_uuid), {R.money: MICROS - 500}, moment=tomorrow)
    with store.transaction() as session:
        with pytest.raises(LimitExceeded):
            ledger.carry(session, uuid, uuid4(), moment=tomorrow)
        assert ledger.reserved(session, uuid) == {R.money: 1000}


def test_nothing_is_counted_beyond_what_a_column_holds(store: Store, holder: Holder) -> None:
    ledger, free = Ledger({}), Holder(ledger_model.make_project(store, name="free"))
    uuid = uuid4()
    do(store, ledger.reserve, uuid, free, {R.money: MOST_MICROS - 1})
    do(store, ledger.charge, uuid, {R.money: MOST_MICROS - 1})
    with pytest.raises(LimitExceeded):
        do(store, ledger.extend, uuid, {R.money: 2})
    do(store, ledger.extend, uuid, {R.money: 1})


def test_a_refusal_opens_no_accounts(store: Store, ledger: Ledger, holder: Holder) -> None:
    """Or they would keep limits of a moment at which nothing was taken."""
    with store.transaction() as session:
        with pytest.raises(LimitExceeded):
            ledger.reserve(session, uuid4(), holder, {Resource.money: 10**15, Resource.cpu_hours: 1})
        assert session.exec(select(Account)).all() == []
    with store.reading() as session:
        assert session.exec(select(Account)).all() == []


def test_negative_amounts_and_strangers_are_refused(store: Store, ledger: Ledger, holder: Holder) -> None:
    with pytest.raises(InternalError, match="negative"):
        do(store, ledger.reserve, uuid4(), holder, {R.money: -1})
    with pytest.raises(NotFound):
        do(store, ledger.reserve, uuid4(), Holder(uuid4()), {R.money: 1})


# Limits


def test_a_pool_that_is_set_at_noon_counts_the_morning(store: Store, holder: Holder) -> None:
    uuid = uuid4()
    do(store, Ledger({}).reserve, uuid, holder, {R.money: 1000})
    pooled = Ledger({R.money: 1500})
    do(store, pooled.refit)
    with pytest.raises(LimitExceeded, match=r"0\.0005 USD left of 0\.0015 USD"):
        do(store, pooled.extend, uuid, {R.money: 501})
    assert do(store, pooled.settle, uuid, {R.money: 700}) == {R.money: 700}
    with store.reading() as session:
        pool = pooled.look(session, Key(Scope.system, SYSTEM, day_of(now()), R.money))
    assert (pool.used_micros, pool.reserved_micros, pool.limit_micros) == (700, 0, 1500)


def test_a_limit_is_never_missed_by_an_account_that_is_opened_at_the_same_moment(store: Store, ledger: Ledger) -> None:
    """The budget is lowered while the day's first reservation opens the account by the budget of before."""
    for number in range(10):
        project = ledger_model.make_project(store, name=f"p{number}", daily_money_micros=MICROS)
        at_once = threading.Barrier(2)

        def lower(project: UUID = project, at_once: threading.Barrier = at_once) -> None:
            at_once.wait()
            with store.transaction() as session:
                row = rows.get(session, Project, project)
                row.daily_money_micros = 10
                session.add(row)
                ledger.refit(session)

        def reserve(project: UUID = project, at_once: threading.Barrier = at_once) -> None:
            at_once.wait()
            do(store, ledger.reserve, uuid4(), Holder(project), {R.money: 10})

        threads = [threading.Thread(target=target) for target in (lower, reserve)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        with store.reading() as session:
            key = Key(Scope.project, project, day_of(now()), R.money)
            assert session.exec(select(Account.limit_micros).where(Account.owner_uuid == project)).one() == 10
            assert ledger.look(session, key).headroom_micros == 0


def test_warnings_are_told_once_a_mark_and_anew_for_another_limit(store: Store, ledger: Ledger, project: UUID) -> None:
    uuid = uuid4()
    do(store, ledger.reserve, uuid, Holder(project), {R.money: 0})

    def percents() -> list[int]:
        with store.reading() as session:
            told = session.exec(select(Event).where(Event.kind == "budget.warning").order_by(Event.id)).all()  # type: ignore[arg-type]
        return [one.body["percent"] for one in told if one.body["scope"] == "project"]

    for percent in (50, 74, 76, 79, 85, 85, 99, 100):
        with store.transaction() as session:
            used = ledger.look(session, Key(Scope.project, project, day_of(now()), R.money)).used_micros
            ledger.charge(session, uuid, {R.money: MICROS * percent // 100 - used})
    assert percents() == [75, 80, 90, 100]
    with store.transaction() as session:
        row = rows.get(session, Project, project)
        row.daily_money_micros = 2 * MICROS
        session.add(row)
        ledger.refit(session)
    do(store, ledger.charge, uuid, {R.money: MICROS * 52 // 100})
    assert percents()[4:] == [75]


def test_the_tightest_account_tells_whose_limit_it_is(store: Store, holder: Holder) -> None:
    ledger = Ledger({R.money: MICROS * 3 // 4, R.api_calls: MICROS})
    with store.reading() as session:
        found = ledger.tightest(session, Holder(holder.project_uuid))
        assert {resource: (account.scope, account.headroom_micros) for resource, account in found.items()} == {
            R.money: ("system", MICROS * 3 // 4),
            R.time_hours: ("project", None),
            R.api_calls: ("system", MICROS),
        }
        assert ledger.headroom(session, holder) == {R.money: MICROS // 2, R.api_calls: MICROS}


# Cost


def test_a_reservation_takes_few_statements(store: Store, ledger: Ledger, holder: Holder) -> None:
    uuid, asked = uuid4(), []
    do(store, ledger.reserve, uuid4(), holder, {R.money: 1, R.time_hours: 1, R.api_calls: 1, R.cpu_hours: 1})
    event.listen(store.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    do(store, ledger.reserve, uuid, holder, {R.money: 1, R.time_hours: 1, R.api_calls: 1, R.cpu_hours: 1})
    assert len(asked) <= 8, asked


def test_rows_a_session_holds_are_brought_up_to_date(store: Store, ledger: Ledger, holder: Holder) -> None:
    uuid, key = uuid4(), Key(Scope.project, holder.project_uuid, day_of(now()), R.money)
    do(store, ledger.reserve, uuid, holder, {R.money: 10})
    with store.transaction() as session:
        account = ledger.look(session, key)
        reservation = session.exec(select(Reservation)).one()
        ledger.charge(session, uuid, {R.money: 4})
        assert (account.used_micros, account.reserved_micros, reservation.reserved_micros) == (4, 6, 6)
    assert (account.used_micros, reservation.used_micros) == (4, 4)


# A machine's reservation


def test_a_machine_is_settled_by_the_moment_metering_left(store: Store, ledger: Ledger, project: UUID) -> None:
    """Metering moves `metered_at` after the session has read the machine, before it settles it."""
    uuid = ledger_model.make_machine(store, project, price_micros=3600)
    moment = now()

    def read(session: Session) -> Machine:
        return rows.get(session, Machine, uuid)

    with store.transaction() as session:
        machine = read(session)
        machine.metered_at = moment
        ledger.reserve_machine(session, machine, 60)
    with store.transaction() as session:
        machine = read(session)
        machine.error_message = "kept"
        later = {"metered_at": moment + timedelta(seconds=10)}
        session.connection().execute(Machine.__table__.update().where(Machine.uuid == uuid).values(**later))  # type: ignore[attr-defined]
        charged = ledger.settle_machine(session, machine, moment + timedelta(seconds=15), also={R.cpu_hours: 3})
    assert charged == {R.money: 5, R.time_hours: 1388, R.cpu_hours: 3}
    with store.reading() as session:
        assert (read(session).error_message, read(session).reservation_uuid) == ("kept", None)
        assert ledger.look(session, Key(Scope.machine, uuid, LIFE, R.money)).used_micros == 5


# Arithmetic


def test_prices_are_those_of_the_table() -> None:
    prices = Prices()
    two_four_twenty = Shape(2, 4, 20)
    assert prices.per_hour(two_four_twenty) == 160_000  # $0.08 for half an hour
    assert prices.per_hour(two_four_twenty, "highmem") == 240_000
    assert spent(160_000, 1800) == {R.time_hours: 500_000, R.money: 80_000}
    assert running(0, 60) == {R.time_hours: 33_333, R.money: 0}


def test_units_become_millionths_without_the_noise_of_floats() -> None:
    assert [micros_of(units) for units in (0.29, 1e300, 0, None)] == [290_000, MOST_MICROS, 0, None]
    assert effective_limit(None, 0.42, 1.0, 3 * MICROS) == 1_260_000
