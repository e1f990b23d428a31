"""kill -9 before each statement of each ledger verb, and after its commit: nothing is lost, nothing counts twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from autovibe.domain import Machine
from autovibe.domain.columns import now
from autovibe.store import Store, rows
from autovibe.store.ledger import Holder, Ledger
from autovibe.types import Resource
from tests.unit import ledger_model
from tests.unit.ledger_process import carry_out

AMOUNTS = {"money": 1000, "time_hours": 500}
Sums = dict[ledger_model.Name, tuple[int, int]]


class Mortal:
    """A process whose children die over the ledger, and a machine they work for."""

    def __init__(self, store: Store) -> None:
        self.store, self.ledger = store, Ledger({Resource.money: 10**9})
        self.project = ledger_model.make_project(store, daily_money_micros=10**8)
        self.machine = ledger_model.make_machine(store, self.project, max_money_micros=10**8, price_micros=3_600_000)
        given = json.dumps({"url": store.url.render_as_string(hide_password=False)})
        argv = [sys.executable, "-m", "tests.unit.ledger_process", given]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def dies(self, verb: str, orders: dict[str, Any], at: int) -> bool:
        """Have a child carry it out that dies at its n-th statement; False when it lived."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, "orders": orders, "kill": at}) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.answer())
        assert found["status"] in (0, 9)
        return bool(found["was_killed"])

    def repeat(self, verb: str, orders: dict[str, Any]) -> None:
        with self.store.transaction() as session:
            carry_out(session, self.ledger, verb, orders)

    def orders(self, verb: str) -> dict[str, Any]:
        """An order of its own, with the reservation it is about; a machine's account is opened anew by each."""
        machine = ledger_model.make_machine(
            self.store, self.project, name=f"m-{uuid4().hex[:8]}", max_money_micros=10**8, price_micros=3_600_000
        )
        uuid, moment = uuid4(), now()
        made = {"uuid": str(uuid), "project": str(self.project), "machine": str(machine), "new_uuid": str(uuid4())}
        made |= {"key": f"key {uuid}", "moment": (moment + timedelta(days=1)).isoformat()}
        if verb != "reserve":
            with self.store.transaction() as session:
                held = {Resource.money: 1500, Resource.time_hours: 700}
                self.ledger.reserve(session, uuid, Holder(self.project, machine), held)
                row = rows.get(session, Machine, machine)
                row.reservation_uuid, row.metered_at = uuid, moment
                session.add(row)
        amounts = {"money": 2000, "cpu_hours": 5} if verb in ("charge", "settle") else AMOUNTS
        return {**made, "amounts": amounts}

    def sums(self) -> Sums:
        with self.store.reading() as session:
            return {
                name: (row.used_micros, row.reserved_micros)
                for name, row in ledger_model.accounts_of(session).items()
                if row.used_micros or row.reserved_micros
            }


@pytest.fixture
def mortal(store: Store) -> Iterator[Mortal]:
    found = Mortal(store)
    yield found
    found.process.kill()
    found.process.wait()
    for pipe in (found.process.stdin, found.process.stdout):
        assert pipe is not None
        pipe.close()


def change(before: Sums, after: Sums) -> dict[tuple[str, str, str], tuple[int, int]]:
    """What the sums changed by, by scope, period and resource."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for name in {*before, *after}:
        old, new = before.get(name, (0, 0)), after.get(name, (0, 0))
        if old != new:
            found[name[0], name[2], name[3]] = (new[0] - old[0], new[1] - old[1])
    return found


@pytest.mark.parametrize("verb", ["reserve", "charge", "extend", "settle", "settle_machine", "carry"])
def test_killed_at_every_statement(mortal: Mortal, verb: str) -> None:
    orders = mortal.orders(verb)
    before = mortal.sums()
    mortal.repeat(verb, orders)
    effect = change(before, mortal.sums())
    assert effect
    at, done = 0, []
    while True:
        at += 1
        orders = mortal.orders(verb)
        before = mortal.sums()
        was_killed = mortal.dies(verb, orders, at)
        ledger_model.check(mortal.store)
        done.append(change(before, mortal.sums()))
        assert done[-1] in ({}, effect)
        if not was_killed:
            break
        if verb != "extend":  # that has no name of its own; who extends does it with a compare-and-set
            mortal.repeat(verb, orders)
            ledger_model.check(mortal.store)
            assert change(before, mortal.sums()) == effect
    assert at > 6  # BEGIN, a few statements, COMMIT, and the moment after
    assert done == [{}] * (at - 2) + [effect] * 2
