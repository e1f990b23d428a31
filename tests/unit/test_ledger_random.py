"""The ledger against a plain model of it: any sequence of its verbs, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlmodel import delete

from autovibe.domain import Account, LedgerEntry, Machine, Project, Reservation
from autovibe.domain.budget import Scope, day_of, effective_limit
from autovibe.errors import LimitExceeded
from autovibe.store import Store
from autovibe.store.ledger import Holder, Ledger
from autovibe.types import Resource
from tests.unit import ledger_model
from tests.unit.ledger_model import Model, ModelReservation, Name, Refused

R = Resource
MIDDAY = datetime(2026, 11, 21, 12, tzinfo=UTC)
GREED = st.sampled_from([0.0, 0.1, 0.42, 0.5, 1.0])
AMOUNT = st.sampled_from([0, 1, 7, 100, 333, 1000])
LIMIT = st.sampled_from([None, 0, 500, 1000, 2500])
AMOUNTS = st.dictionaries(st.sampled_from([R.money, R.time_hours, R.cpu_hours]), AMOUNT, min_size=1)


class LedgerMachine(RuleBasedStateMachine):
    """Two projects, a machine each with limits of its own; `store` is set by the test."""

    store: Store

    @initialize(pool=st.sampled_from([{}, {R.money: 2000}, {R.money: 3000, R.time_hours: 900}]), money=LIMIT)
    def begin(self, pool: dict[Resource, int], money: int | None) -> None:
        with self.store.transaction() as session:
            for table in (LedgerEntry, Reservation, Account, Machine, Project):
                session.exec(delete(table))
        self.pool = dict(pool)
        self.ledger = Ledger(self.pool)
        self.moment = MIDDAY
        self.projects = [
            ledger_model.make_project(self.store, name=name, greediness=0.5, daily_money_micros=limit)
            for name, limit in (("p", 1500), ("q", None))
        ]
        self.machines = [
            ledger_model.make_machine(self.store, self.projects[0], name="m", max_money_micros=money),
            ledger_model.make_machine(self.store, self.projects[1], name="n"),
        ]
        self.model = Model(self.limit)

    def limit(self, name: Name) -> int | None:
        """The arithmetic of limits, written once more."""
        scope, owner, _, resource = name
        if scope == Scope.system:
            return self.pool.get(Resource(resource))
        with self.store.reading() as session:
            if scope == Scope.machine:
                machine = session.get(Machine, owner)
                assert machine is not None
                return machine.max_money_micros if resource == R.money else None
            if resource == R.cpu_hours:
                return None
            projects = {uuid: session.get(Project, uuid) for uuid in self.projects}
        project = projects[owner]
        assert project is not None
        explicit = project.daily_money_micros if resource == R.money else None
        total = sum(found.greediness for found in projects.values() if found is not None)
        return effective_limit(explicit, project.greediness, total, self.pool.get(Resource(resource)))

    def attempt(self, of_ledger: Any, of_model: Any) -> None:
        """Both allow it or both refuse, and they answer the same. A refusal leaves the transaction usable."""
        try:
            wanted, is_refused = of_model(), False
        except Refused:
            wanted, is_refused = None, True
        with self.store.transaction() as session:
            try:
                answer = of_ledger(session)
            except LimitExceeded:
                assert is_refused
            else:
                assert not is_refused
                assert answer == wanted

    def open(self, index: int) -> UUID:
        found = [uuid for uuid, held in self.model.reservations.items() if held.is_open]
        return found[index % len(found)]

    def has_open(self) -> bool:
        return any(held.is_open for held in self.model.reservations.values())

    @rule(which=st.integers(0, 1), with_machine=st.booleans(), amounts=AMOUNTS, again=st.booleans())
    def reserve(self, which: int, with_machine: bool, amounts: dict[Resource, int], again: bool) -> None:
        machine = self.machines[which] if with_machine else None
        uuid, holder = uuid4(), Holder(self.projects[which], machine)
        made = ModelReservation(self.projects[which], machine, day_of(self.moment))
        for _ in range(1 + again):
            self.attempt(
                lambda session: self.ledger.reserve(session, uuid, holder, amounts, moment=self.moment),
                lambda: self.model.reserve(uuid, made, amounts),
            )

    @precondition(has_open)
    @rule(index=st.integers(0, 20), amounts=AMOUNTS, key=st.sampled_from([None, "a", "b", "c"]))
    def charge(self, index: int, amounts: dict[Resource, int], key: str | None) -> None:
        uuid = self.open(index)
        self.attempt(
            lambda session: self.ledger.charge(session, uuid, amounts, key=key),
            lambda: self.model.charge(uuid, amounts, key),
        )

    @precondition(has_open)
    @rule(index=st.integers(0, 20), amounts=AMOUNTS)
    def extend(self, index: int, amounts: dict[Resource, int]) -> None:
        uuid = self.open(index)
        self.attempt(
            lambda session: self.ledger.extend(session, uuid, amounts), lambda: self.model.extend(uuid, amounts)
        )

    @precondition(has_open)
    @rule(index=st.integers(0, 20), amounts=AMOUNTS, again=st.booleans())
    def settle(self, index: int, amounts: dict[Resource, int], again: bool) -> None:
        uuid = self.open(index)
        for _ in range(1 + again):
            self.attempt(
                lambda session: self.ledger.settle(session, uuid, amounts), lambda: self.model.settle(uuid, amounts)
            )

    @precondition(has_open)
    @rule(index=st.integers(0, 20))
    def release(self, index: int) -> None:
        uuid = self.open(index)
        self.attempt(lambda session: self.ledger.release(session, uuid), lambda: self.model.release(uuid))

    @rule(hours=st.sampled_from([1, 13]))
    def time_passes(self, hours: int) -> None:
        self.moment += timedelta(hours=hours)

    @precondition(has_open)
    @rule(index=st.integers(0, 20))
    def carry(self, index: int) -> None:
        uuid, new_uuid = self.open(index), uuid4()
        self.attempt(
            lambda session: self.ledger.carry(session, uuid, new_uuid, moment=self.moment),
            lambda: self.model.carry(uuid, new_uuid, day_of(self.moment)),
        )

    @rule(which=st.integers(0, 1), money=LIMIT, greediness=GREED)
    def change_the_project(self, which: int, money: int | None, greediness: float) -> None:
        with self.store.transaction() as session:
            project = session.get(Project, self.projects[which])
            assert project is not None
            project.daily_money_micros, project.greediness = money, greediness
            self.ledger.refit(session, self.moment)
        self.model.refit(day_of(self.moment))

    @rule(money=LIMIT)
    def change_the_machine(self, money: int | None) -> None:
        uuid = self.machines[0]
        with self.store.transaction() as session:
            machine = session.get(Machine, uuid)
            assert machine is not None
            machine.max_money_micros = money
            self.ledger.refit_machine(session, machine)
        for name in self.model.fitted:
            if name[1] == uuid:
                self.model.fitted[name] = self.limit(name)

    @rule(money=LIMIT)
    def change_the_pool(self, money: int | None) -> None:
        self.pool.pop(R.money, None)
        if money is not None:
            self.pool[R.money] = money
        with self.store.transaction() as session:
            self.ledger.refit(session, self.moment)
        self.model.refit(day_of(self.moment))

    @invariant()
    def the_tables_are_as_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        ledger_model.check(self.store)
        with self.store.reading() as session:
            accounts = ledger_model.accounts_of(session)
            for uuid, held in self.model.reservations.items():
                assert self.ledger.reserved(session, uuid) == (held.reserved if held.is_open else {})
            holder = Holder(self.projects[0], self.machines[0])
            headroom = self.ledger.headroom(session, holder, self.moment)
        found = {name: [row.used_micros, row.reserved_micros] for name, row in accounts.items()}
        assert {name: sums for name, sums in found.items() if any(sums)} == {
            name: sums for name, sums in self.model.taken.items() if any(sums)
        }
        assert {name: accounts[name].limit_micros for name in self.model.fitted} == self.model.fitted
        assert headroom == self.headroom(holder)

    def headroom(self, holder: Holder) -> dict[Resource, int]:
        probe = ModelReservation(holder.project_uuid, holder.machine_uuid, day_of(self.moment))
        rooms: dict[Resource, int] = {}
        for resource in (R.money, R.time_hours, R.api_calls):
            for name in probe.names(resource):
                limit = self.model.fitted[name] if name in self.model.fitted else self.limit(name)
                if limit is not None:
                    room = max(limit - sum(self.model.taken.get(name, [0, 0])), 0)
                    rooms[resource] = min(rooms.get(resource, room), room)
        return rooms


def test_any_sequence_of_verbs_is_the_models(store: Store) -> None:
    examples = settings(
        max_examples=15,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    run_state_machine_as_test(type("Bound", (LedgerMachine,), {"store": store}), settings=examples)
