"""Many processes reserve of one budget at once: exactly what it is for is granted."""

from __future__ import annotations

import json
import subprocess
import sys

from autovibe.domain.budget import Scope, day_of
from autovibe.domain.columns import now
from autovibe.store import Store
from autovibe.store.ledger import Key, Ledger
from autovibe.types import MICROS, Resource
from tests.unit import ledger_model

PROCESSES, EACH, BUDGET = 8, 125, 300


def test_a_thousand_reservations_of_eight_processes_of_a_budget_for_three_hundred(store: Store) -> None:
    project = ledger_model.make_project(store, daily_money_micros=BUDGET * MICROS)
    given = {"url": store.url.render_as_string(hide_password=False), "project": str(project), "race": EACH}
    argv = [sys.executable, "-m", "tests.unit.ledger_process", json.dumps(given)]
    racers = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        day = day_of(now())
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        found = [json.loads(racer.communicate(timeout=120)[0]) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert sum(one["granted"] for one in found) == BUDGET
    assert sum(one["refused"] for one in found) == PROCESSES * EACH - BUDGET
    ledger_model.check(store)
    with store.reading() as session:
        account = Ledger({}).look(session, Key(Scope.project, project, day, Resource.money))
    assert (account.reserved_micros, account.used_micros) == (BUDGET * MICROS, 0)
    assert account.allocated_micros == BUDGET * MICROS
