"""Metering without a node: what is charged when, on which day, by which hub, and what blocks a machine.

Every moment is an argument and lies on days to come, so that the hub's own upkeep leaves these machines alone.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlmodel import select

from autovibe.domain import Account, Event, LedgerEntry, Machine, Operation, Project
from autovibe.domain.budget import LIFE, Scope, Shape, day_of, spent
from autovibe.hub import blocking, metering
from autovibe.hub.metering import Samples, Vm
from autovibe.store import rows
from autovibe.store.ledger import Holder, Key
from autovibe.types import MICROS, MachineStatus, Resource
from tests.api.conftest import Served

PRICE = 3_600_000  # an hour; 1000 micros a second
_days = count(1000)


def noon() -> datetime:
    """Of a day that no other test uses."""
    day = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
    return day + timedelta(days=next(_days))


def running(served: Served, moment: datetime, project: UUID | None = None, **fields: Any) -> UUID:
    """A machine whose VM runs since `moment`, with tail and slice reserved."""
    uuid = served.machine(project, price_micros=PRICE, vmid=None, **fields)
    with served.hub.store.transaction() as session:
        machine = rows.get(session, Machine, uuid)
        served.hub.ledger.reserve_machine(session, machine, served.hub.tail_seconds, moment)
        machine.metered_at = moment
    return uuid


def account(served: Served, key: Key) -> Account:
    with served.hub.store.reading() as session:
        return served.hub.ledger.look(session, key)


def used(served: Served, machine: UUID, resource: Resource = Resource.money) -> int:
    return account(served, Key(Scope.machine, machine, LIFE, resource)).used_micros


def seen(served: Served, machine: UUID) -> metering.Metered:
    return next(found for found in metering.running(served.hub) if found.uuid == machine)


def meter(served: Served, machine: UUID, moment: datetime, samples: Samples | None = None) -> Any:
    return metering.charge(served.hub, seen(served, machine), moment, samples or Samples())


@pytest.fixture
def started(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[UUID]:
    """The operations that would be carried out; there is no node."""
    found: list[UUID] = []
    monkeypatch.setattr(served.hub.workflows, "start", lambda uuid, kind: found.append(uuid))
    return found


def test_time_and_money_are_charged_as_they_pass(served: Served) -> None:
    start = noon()
    machine = running(served, start)
    assert meter(served, machine, start + timedelta(seconds=15)) is None
    assert used(served, machine) == 15_000
    assert used(served, machine, Resource.time_hours) == 15 * MICROS // 3600
    assert served.row(Machine, machine).metered_at == start + timedelta(seconds=15)
    held = seen(served, machine)
    assert held.runway_seconds == pytest.approx(60, abs=0.1)  # filled up again
    assert held.due_at() == start + timedelta(seconds=30)
    project = served.row(Machine, machine).project_uuid
    day = account(served, Key(Scope.project, project, day_of(start), Resource.money))
    assert (day.used_micros, day.reserved_micros) == (15_000, spent(PRICE, 120)[Resource.money])


def test_cpu_is_charged_and_a_changed_vm_costs_what_it_is_now(served: Served) -> None:
    start = noon()
    machine = running(served, start)
    served.change(machine, vmid=4242)
    samples = Samples({4242: Vm(1.5, Shape(2, 4, 20))}, time.monotonic())
    meter(served, machine, start + timedelta(seconds=36), samples)
    assert used(served, machine, Resource.cpu_hours) == 15_000
    assert served.row(Machine, machine).price_micros == 160_000
    samples.at -= 61  # what is older than a minute is not known any more
    meter(served, machine, start + timedelta(seconds=72), samples)
    assert used(served, machine, Resource.cpu_hours) == 15_000


def test_nothing_is_charged_twice_by_several_hubs(served: Served) -> None:
    start = noon()
    machines = [running(served, start) for _ in range(5)]
    for turn in range(1, 4):
        found = [seen(served, machine) for machine in machines]
        moments = [start + timedelta(seconds=10 * turn, milliseconds=number) for number in range(4)]
        with ThreadPoolExecutor(8) as hubs:
            calls = [
                hubs.submit(metering.charge, served.hub, each, moment, Samples())
                for each in found
                for moment in moments
            ]
            assert [call.result() for call in calls] == [None] * 20
    for machine in machines:
        until = served.row(Machine, machine).metered_at
        assert used(served, machine) == int((until - start).total_seconds() * 1000)
        with served.hub.store.reading() as session:
            charges = session.exec(
                select(LedgerEntry).where(
                    LedgerEntry.machine_uuid == machine, LedgerEntry.kind == "charge", LedgerEntry.resource == "money"
                )
            ).all()
        assert len(charges) == 3


def test_a_machine_runs_to_its_limit_less_the_tail_and_is_blocked(served: Served, started: list[UUID]) -> None:
    start = noon()
    machine = running(served, start, max_money_micros=150_000, prompt="work", status=MachineStatus.working)
    assert meter(served, machine, start + timedelta(seconds=15)) is None
    assert meter(served, machine, start + timedelta(seconds=30)) is None
    held = seen(served, machine)
    assert held.runway_seconds == pytest.approx(60, abs=0.2)  # 150 s less what was used and the tail
    moment = start + timedelta(seconds=90)
    while (limit := meter(served, machine, moment)) is None:
        moment = seen(served, machine).due_at()
    assert moment - start == pytest.approx(timedelta(seconds=90), abs=timedelta(seconds=0.2))
    assert (limit.details["scope"], limit.details["resource"]) == ("machine", "money")
    assert blocking.block(served.hub, machine, limit)
    row, operation = served.row(Machine, machine), served.operation_of(machine)
    assert (row.status, row.resume_status, operation.kind) == ("checkpointing", "budget_blocked", "block")
    assert row.blocked["reason"] == limit.message
    assert operation.uuid in started
    assert not blocking.block(served.hub, machine, limit)
    of_it = account(served, Key(Scope.machine, machine, LIFE, Resource.money))
    assert of_it.used_micros + of_it.reserved_micros <= 150_000
    assert of_it.reserved_micros == pytest.approx(60_000, abs=100)
    with served.hub.store.reading() as session:
        kinds = session.exec(select(Event.kind).where(Event.object_uuid == machine)).all()
        told = session.exec(select(Event).where(Event.object_uuid == machine, Event.kind == "budget.warning")).all()
    assert kinds.count("budget.exceeded") == 1
    assert [event.body["percent"] for event in told] == [60]  # the limit is small: the warning comes with the block
    assert machine not in [found.uuid for found in metering.running(served.hub)]


def test_a_machine_that_cannot_be_blocked_now_lives_on_its_tail_and_never_above(served: Served) -> None:
    start = noon()
    machine = running(served, start, max_money_micros=150_000, status=MachineStatus.spawning)
    for seconds in (60, 90, 140, 200, 400):
        assert meter(served, machine, start + timedelta(seconds=seconds)) is None
        of_it = account(served, Key(Scope.machine, machine, LIFE, Resource.money))
        assert of_it.used_micros + of_it.reserved_micros <= 150_000
    assert of_it.used_micros == pytest.approx(150_000, abs=100)


def test_what_ran_while_no_hub_did_is_charged_up_to_the_limit_and_then_blocked(served: Served) -> None:
    start = noon()
    machine = running(served, start, max_money_micros=1_000_000)
    limit = meter(served, machine, start + timedelta(hours=2))
    assert (limit.details["scope"], limit.details["resource"]) == ("machine", "money")
    assert used(served, machine) == 1_000_000
    assert used(served, machine, Resource.time_hours) == 2 * MICROS  # which has no limit


def test_a_vm_that_is_off_costs_nothing_and_says_so_until_it_runs(served: Served) -> None:
    start = noon()
    machine = running(served, start, prompt="work", status=MachineStatus.working)
    served.change(machine, vmid=4243)
    found = Samples({4242: Vm(1.0, Shape(2, 4, 20))}, time.monotonic())
    for seconds in (15, 30, 45):
        assert meter(served, machine, start + timedelta(seconds=seconds), found) is None
    row = served.row(Machine, machine)
    assert "VM 4243 is off" in row.progress
    assert (used(served, machine), row.metered_at) == (0, start + timedelta(seconds=45))
    found.by_vmid = {4243: Vm(0.0, Shape(2, 4, 20))}
    meter(served, machine, start + timedelta(seconds=60), found)
    assert (used(served, machine), served.row(Machine, machine).progress) == (15_000, "")
    with served.hub.store.reading() as session:
        told = session.exec(select(Event).where(Event.object_uuid == machine, Event.kind == "machine.power")).all()
    assert [event.body["power"] for event in told] == ["off", "on"]


def test_a_vm_is_not_taken_for_off_by_what_was_seen_before_it_ran(served: Served) -> None:
    start = noon()
    machine = running(served, start)
    served.change(machine, vmid=4244)
    meter(served, machine, start + timedelta(seconds=15), Samples({}, time.monotonic() - 20))
    assert used(served, machine) == 15_000


def test_a_machine_of_a_day_without_room_that_cannot_be_blocked_is_no_busy_loop(served: Served) -> None:
    start = noon() + timedelta(hours=11, minutes=59, seconds=50)
    project = served.project(daily_money_micros=1_000_000)
    machine = running(served, start, project, status=MachineStatus.terminating)
    late = start + timedelta(seconds=20)
    with served.hub.store.transaction() as session:
        served.hub.ledger.reserve(session, uuid4(), Holder(project), {Resource.money: 999_000}, moment=late)
    meter(served, machine, late)
    charged = served.row(Machine, machine).metered_at
    metering.meter(served.hub, Samples(), late + timedelta(seconds=0.1))
    assert served.row(Machine, machine).metered_at == charged == late


def test_midnight_divides_the_charge_and_carries_the_reservation(served: Served) -> None:
    midnight = noon().replace(hour=0) + timedelta(days=1)
    machine = running(served, midnight - timedelta(seconds=10))
    before = served.row(Machine, machine)
    assert meter(served, machine, midnight + timedelta(seconds=5)) is None
    row = served.row(Machine, machine)
    assert row.reservation_uuid != before.reservation_uuid
    old, new = (
        account(served, Key(Scope.project, row.project_uuid, day_of(day), Resource.money))
        for day in (midnight - timedelta(seconds=1), midnight)
    )
    assert (old.used_micros, old.reserved_micros) == (10_000, 0)
    assert (new.used_micros, new.reserved_micros) == (5_000, 120_000)
    assert used(served, machine) == 15_000


def test_a_new_day_without_room_blocks_and_the_old_one_pays_for_the_end(served: Served) -> None:
    midnight = noon().replace(hour=0) + timedelta(days=1)
    project = served.project()
    machine = running(served, midnight - timedelta(seconds=10), project)
    before = served.row(Machine, machine).reservation_uuid
    with served.hub.store.transaction() as session:  # the new day's money is somebody else's already
        row = rows.get(session, Project, project)
        row.daily_money_micros = 100_000
    limit = meter(served, machine, midnight + timedelta(seconds=5))
    assert limit is not None
    assert (limit.details["scope"], limit.details["period"]) == ("project", day_of(midnight))
    assert served.row(Machine, machine).reservation_uuid == before
    old, new = (
        account(served, Key(Scope.project, project, day_of(day), Resource.money))
        for day in (midnight - timedelta(seconds=1), midnight)
    )
    assert (old.used_micros, new.used_micros, new.reserved_micros) == (15_000, 0, 0)


def test_a_pass_leaves_alone_what_is_not_due(served: Served) -> None:
    start = noon()
    machine = running(served, start)
    assert metering.meter(served.hub, Samples(), start + timedelta(seconds=14.9)) <= 0.5
    assert used(served, machine) == 0
    metering.meter(served.hub, Samples(), start + timedelta(seconds=15))
    assert used(served, machine) == 15_000


# Going on


def blocked(served: Served, scope: str, limit: int | None, period: str, project: UUID | None = None) -> UUID:
    told = {"scope": scope, "resource": "money", "period": period, "limit_micros": limit, "reason": "It was so."}
    return served.machine(project, price_micros=PRICE, status=MachineStatus.budget_blocked, blocked=told)


def test_a_daily_limit_that_was_raised_or_a_new_day_resumes(served: Served, started: list[UUID]) -> None:
    today = day_of(datetime.now(UTC))
    tight = served.project(daily_money_micros=100_000)
    roomy = served.project(daily_money_micros=100_000_000)
    same = blocked(served, "project", 100_000_000, today, roomy)
    raised = blocked(served, "project", 1_000, today, roomy)
    yesterday = blocked(served, "project", 100_000_000, "2020-01-01", roomy)
    too_tight = blocked(served, "project", 1_000, today, tight)
    own = blocked(served, "machine", 1_000, LIFE, roomy)
    blocking.resume_allowed(served.hub)
    statuses = {uuid: served.row(Machine, uuid).status for uuid in (same, raised, yesterday, too_tight, own)}
    assert statuses == {
        same: "budget_blocked",
        raised: "restoring",
        yesterday: "restoring",
        too_tight: "budget_blocked",
        own: "budget_blocked",
    }
    operation = served.operation_of(raised)
    assert (operation.kind, operation.uuid in started) == ("resume", True)
    # A resume that failed is not tried again on the same day under the same limit.
    with served.hub.store.transaction() as session:
        row = rows.get(session, Machine, raised)
        served.hub.ledger.settle_machine(session, row, datetime.now(UTC))
        row.status = MachineStatus.budget_blocked
    blocking.resume_allowed(served.hub)
    assert served.row(Machine, raised).status == "budget_blocked"
    with served.hub.store.transaction() as session:
        rows.get(session, Project, roomy).daily_money_micros = 200_000_000
        session.flush()
        served.hub.ledger.refit(session)
    blocking.resume_allowed(served.hub)
    assert served.row(Machine, raised).status == "restoring"


def test_resume_reserves_anew_raises_constraints_and_refuses_what_does_not_fit(
    served: Served, started: list[UUID]
) -> None:
    machine = served.machine(
        price_micros=PRICE, status=MachineStatus.budget_blocked, max_money_micros=1000, max_api_calls=5
    )
    refused = served.post(f"/machines/{machine}/resume")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "RESOURCE_LIMIT_EXCEEDED")
    too_little = {"resource_constraints": {"max_money": 0.1}}
    assert served.post(f"/machines/{machine}/resume", too_little).status_code == 409
    assert served.row(Machine, machine).max_money_micros == 1000
    answer = served.post(f"/machines/{machine}/resume", {"resource_constraints": {"max_money": 1}})
    assert (answer.status_code, answer.json()["status"]) == (200, "restoring"), answer.text
    row = served.row(Machine, machine)
    assert (row.max_money_micros, row.max_api_calls) == (MICROS, 5)
    assert account(served, Key(Scope.machine, machine, LIFE, Resource.money)).reserved_micros == 120_000
    assert served.row(Operation, row.operation_uuid).actor == "operator"
    again = served.post(f"/machines/{machine}/resume")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "CONFLICT")
    assert len([uuid for uuid in started if uuid == row.operation_uuid]) == 1
