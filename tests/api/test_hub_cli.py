"""The Hub itself at the command line, against a real hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlmodel import delete
from typer.testing import CliRunner, Result

from autovibe.cli import app
from autovibe.domain import Experiment, HubCheckpoint
from autovibe.domain.columns import now
from tests.api.conftest import KEY, Served

Run = Callable[..., Result]


@pytest.fixture
def run(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    for name in [name for name in os.environ if name.startswith("AUTOVIBE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOVIBE_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOVIBE_URL", served.url)
    monkeypatch.setenv("AUTOVIBE_API_KEY", KEY)

    def invoke(*words: str, status: int = 0) -> Result:
        result = CliRunner().invoke(app, ["hub", *words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    yield invoke
    with served.hub.store.transaction() as session:
        session.exec(delete(Experiment))
        session.exec(delete(HubCheckpoint))


def test_status(served: Served, run: Run) -> None:
    said = run("status").stdout
    assert str(served.hub.uuid) in said
    assert "requests" in said
    assert served.hub.name in said
    assert json.loads(run("status", "--json").stdout)["uuid"] == str(served.hub.uuid)


def test_checkpoints(served: Served, run: Run) -> None:
    assert "autovibe hub checkpoint" in run("checkpoints").stderr
    made = json.loads(run("checkpoint", "--reason", "a change", "--json").stdout)
    assert (made["status"], made["reason"]) == ("ready", "a change")
    assert "a change" in run("checkpoints").stdout
    assert made["path"] in run("checkpoints", made["uuid"][:8]).stdout
    assert json.loads(run("checkpoints", "--json").stdout)["total_count"] == 1
    assert json.loads(run("checkpoints", made["uuid"], "--json").stdout)["uuid"] == made["uuid"]
    run("checkpoints", "ffffffff", status=3)
    run("checkpoint", "--type", "hourly", status=2)
    assert run("checkpoint", "--detach").exit_code == 0


def test_experiments(served: Served, run: Run) -> None:
    assert "There are no experiments" in run("experiments").stderr
    run("spawn-experimental", "e", status=3)  # no checkpoint
    made = json.loads(run("checkpoint", "--json").stdout)
    assert "'workers' cannot be" in run("spawn-experimental", "e", "--set", "workers=0", status=2).stderr
    run("spawn-experimental", "e", "--set", "workers", status=2)
    with served.hub.store.transaction() as session:  # one that runs elsewhere: the words are what is tested
        row = Experiment(
            name="tried",
            checkpoint_uuid=UUID(made["uuid"]),
            configuration={"algorithm": "greedy", "optimization": {"rate": 0.5}, "settings": {"workers": 3}},
            status="ended",
            place="elsewhere",
            ends_at=now(),
            ended_at=now(),
            started_at=now(),
            report={"overall": _figures(), "until": now().isoformat()},
            vmid_first=9950,
            vmid_last=9999,
            port=1,
        )
        session.add(row)
    assert "tried" in run("experiments").stdout
    said = run("experiment", "tried").stdout
    for words in ("greedy", "workers = 3", "rate = 0.5", "9950-9999", "this Hub", "1.500000 USD"):
        assert words in said
    assert json.loads(run("experiment", str(row.uuid)[:8], "--json").stdout)["comparison"]["experiment"]
    assert "ended" in run("stop-experiment", "tried").stdout
    run("experiment", "nothing", status=3)
    run("experiment", str(uuid4()), status=3)


def _figures() -> dict[str, object]:
    money = {"amount": "1.500000", "currency": "USD", "micros": 1_500_000}
    return {
        "successful_operations": 2,
        "total_operations": 3,
        "success_rate": 0.6667,
        "total_cost": money,
        "average_cost": money,
        "average_cost_per_success": money,
    }
