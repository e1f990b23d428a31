"""machine usage and machine resume against a hub at the wire: what is sent, and what is printed."""

from __future__ import annotations

import json

import pytest

from tests.unit import wire as wires
from tests.unit.test_cli import Run
from tests.unit.test_cli import owner as owner
from tests.unit.test_cli import run as run
from tests.unit.test_cli import wire as wire
from tests.unit.wire import Refuse, Row, Wire


@pytest.fixture
def counter(wire: Wire, owner: Row) -> Row:
    return wire.put("machines", wires.machine("counter", owner, status="budget_blocked"))


def test_usage_is_shown_and_reported(run: Run, wire: Wire, counter: Row) -> None:
    assert "model calls" in run("machine", "usage", "counter").stdout
    assert "money" in json.loads(run("machine", "usage", "counter", "--json").stdout)
    left = {"money": wires.money(250_000), "time_minutes": 12.5, "api_calls": None}
    reply = {
        "machine_uuid": counter["uuid"],
        "charged": {"api_calls": 3, "money": wires.money(500_000)},
        "machine": left,
        "project": {"money": None, "time_minutes": None, "api_calls": None},
    }
    wire.on("POST", r"/machines/(.*)/usage", lambda *_: reply)
    told = run("machine", "usage", "counter", "--api-calls", "3", "--money", "0.5", "--note", "a review").stdout
    assert wire.asked[-1][2] == {"api_calls": 3, "money": {"amount": 0.5}, "note": "a review"}
    assert "3 model calls" in told
    assert "12.5 minutes" in told
    assert "no limit" in told
    assert json.loads(run("machine", "usage", "counter", "--money", "1", "--json").stdout) == reply
    assert wire.asked[-1][2] == {"api_calls": 0, "money": {"amount": 1.0}}


def test_resume_raises_constraints_and_refusals_are_told(run: Run, wire: Wire, counter: Row) -> None:
    going_on = {**counter, "status": "restoring"}
    wire.on("POST", r"/machines/(.*)/resume", lambda *_: going_on)
    shown = json.loads(run("machine", "resume", "counter", "--max-minutes", "30", "--detach", "--json").stdout)
    assert shown["status"] == "restoring"
    assert wire.asked[-1][2] == {"resource_constraints": {"max_time_minutes": 30}}

    def refuse(*_: object) -> Row:
        raise Refuse(409, "RESOURCE_LIMIT_EXCEEDED", "Machine 'counter' has 0 h left.")

    wire.on("POST", r"/machines/(.*)/resume", refuse)
    assert "0 h left" in run("machine", "resume", "counter", status=4).stderr
    assert wire.asked[-1][2] == {}
