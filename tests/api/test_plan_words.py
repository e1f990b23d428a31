"""The plan of a spawn by the SDK and the command line, against a hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from typer.testing import CliRunner, Result

from autovibe.cli import app
from autovibe.sdk import Client
from autovibe.types import MICROS
from tests.api.conftest import KEY, Served

Run = Callable[..., Result]


@pytest.fixture
def run(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("AUTOVIBE_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOVIBE_URL", served.url)
    monkeypatch.setenv("AUTOVIBE_API_KEY", KEY)

    def invoke(*words: str) -> Result:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, result.output
        return result

    return invoke


def test_the_sdk_plans_from_a_project_and_from_a_checkpoint(served: Served) -> None:
    project = served.project(daily_money_micros=MICROS)
    with Client(served.url, KEY) as client:
        found = client.machines.plan(project, prompt="fix it")
        assert found.checkpoint_uuid is not None
        same = client.checkpoints.plan(found.checkpoint_uuid, prompt="fix it")
        assert client.machines.list(project_uuid=project).total_count == 0
    assert same.estimate == found.estimate
    assert [refusal.code for refusal in same.refusals] == ["HYPERVISOR_UNAVAILABLE"]


def test_the_plan_is_printed_for_a_person(served: Served, run: Run) -> None:
    name = f"p-{uuid4().hex[:8]}"
    served.project(name=name, daily_money_micros=MICROS, max_concurrent_machines=0)
    shown = run("machine", "spawn", "-p", name, "--plan", "--prompt", "fix it")
    for words in ("1.000000 USD", "the project", "CPU hours", "an hour", "the type's own figures; complexity 0.069"):
        assert words in shown.stdout, shown.stdout
    assert "It would be refused: Project" in shown.stderr
    assert "(RESOURCE_LIMIT_EXCEEDED)" in shown.stderr
    assert "(HYPERVISOR_UNAVAILABLE)" in shown.stderr


def test_the_plan_is_one_json_document(served: Served, run: Run) -> None:
    name = f"p-{uuid4().hex[:8]}"
    project = served.project(name=name)
    found = json.loads(run("machine", "spawn", "-p", name, "--plan", "--json").stdout)
    assert (found["dry_run"], found["project_uuid"]) == (True, str(project))
    again = json.loads(run("checkpoint", "spawn", found["checkpoint_uuid"], "--plan", "--json").stdout)
    assert again["estimate"] == found["estimate"]
