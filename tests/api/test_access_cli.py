"""Keys and the audit log at the command line, against a real hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner, Result

from autovibe.cli import app
from autovibe.sdk import waiting
from tests.api.conftest import KEY, Served

Run = Callable[..., Result]


@pytest.fixture
def run(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in [name for name in os.environ if name.startswith("AUTOVIBE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOVIBE_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOVIBE_URL", served.url)
    monkeypatch.setenv("AUTOVIBE_API_KEY", KEY)

    def invoke(*words: str, status: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return invoke


def test_a_key_is_shown_once_listed_and_revoked(served: Served, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"cli-{uuid4().hex[:6]}"
    project = served.project(name=f"p-{name}")
    key = run("key", "create", name, "--role", "viewer", "--project", f"p-{name}", "--days", "7").stdout.strip()
    identifier = key.split("_")[1]
    assert key not in run("key", "list").output
    assert identifier in run("key", "list").stdout
    shown = json.loads(run("key", "show", name, "--json").stdout)
    assert (shown["id"], shown["project_uuid"], shown["role"]) == (identifier, str(project), "viewer")
    assert "viewer" in run("key", "show", shown["uuid"]).stdout
    monkeypatch.setenv("AUTOVIBE_API_KEY", key)
    assert f"p-{name}" in run("project", "list").stdout
    assert "admin" in run("key", "list", status=5).output
    monkeypatch.setenv("AUTOVIBE_API_KEY", KEY)
    run("key", "revoke", identifier)
    monkeypatch.setenv("AUTOVIBE_API_KEY", key)
    assert "revoked" in run("project", "list", status=5).output


def test_a_key_goes_into_a_file_and_not_to_the_screen(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ci.key"
    scopes = ("--scope", "machines:read", "--scope", "projects:read")  # the list names the machines' projects
    made = run("key", "create", "ci", *scopes, "--output", str(file), "--json")
    key = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    assert key.split("_", 2)[2] not in made.output
    assert json.loads(made.stdout)["scopes"] == ["machines:read", "projects:read"]
    assert "exists" in run("key", "create", "ci", "--output", str(file), status=4).output
    monkeypatch.setenv("AUTOVIBE_API_KEY", key)
    run("machine", "list")
    assert "hub:read" in run("hub", "status", status=5).output


def test_a_word_that_names_no_key_or_several(run: Run) -> None:
    assert "no key" in run("key", "show", "nobody", status=3).output
    for _ in range(2):
        run("key", "create", "twin")
    assert "means 2 keys" in run("key", "revoke", "twin", status=2).output
    run("key", "create", "x", "--role", "king", status=2)


def test_the_audit_log_is_listed(served: Served, run: Run) -> None:
    project = served.project()
    served.post("/machines", {"project_uuid": str(project)})
    lines: dict[str, Any] = json.loads(run("audit", "list", "--project", str(project), "--json").stdout)
    assert [line["verb"] for line in lines["entries"]] == ["POST /machines"]
    machine = lines["entries"][0]["object_uuid"]
    assert "POST /machines" in run("audit", "list", "--object", machine, "--hours", "1").stdout
    run("audit", "list", "--object", "nonsense", status=2)


def test_long_waits_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of looks that answer at once stays far below a key's limit."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now))
    deadline, asked = waiting.Deadline(None), 0
    while clock.now < 60:
        deadline.poll(lambda wait_seconds: wait_seconds, wait_seconds=1.0)
        asked += 1
    assert asked <= 50
