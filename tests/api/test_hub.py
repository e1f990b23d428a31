"""The Hub itself over HTTP: its status, its checkpoints, which of them stay."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlmodel import col, delete, select

from autovibe.domain import ApiTraffic, Experiment, HubCheckpoint, Operation
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import place_of
from autovibe.hub import Hub, backups
from autovibe.hub.instance import ensure_uuid
from autovibe.hub.traffic import Tally
from autovibe.store import bundles
from autovibe.workflows import hub_checkpoint
from tests.api.conftest import Served, error_of


@pytest.fixture(autouse=True)
def _without_checkpoints(served: Served) -> None:
    with served.hub.store.transaction() as session:
        session.exec(delete(Experiment))
        session.exec(delete(HubCheckpoint))
    shutil.rmtree(served.hub.premises.checkpoints, ignore_errors=True)


def made(served: Served, **order: Any) -> dict[str, Any]:
    accepted = served.post("/hub/checkpoint", order)
    assert accepted.status_code == 201, accepted.text
    assert accepted.json()["status"] == "creating"
    found: dict[str, Any] = served.get(f"/hub/checkpoints/{accepted.json()['uuid']}", wait=60).json()
    assert found["status"] == "ready", found
    return found


def test_status_tells_of_the_hub_and_its_api(served: Served) -> None:
    served.machine(served.project())
    before = served.get("/hub/status").json()
    served.get("/projects")
    served.get("/nowhere")
    found = served.get("/hub/status").json()
    assert UUID(found["uuid"]) == ensure_uuid(served.hub.store) == served.hub.uuid
    assert found["status"] == "degraded"  # the node does not answer
    assert 0 < found["uptime_hours"] < 1
    assert found["active_machine_count"] >= 1
    assert found["active_project_count"] >= 1
    assert found["last_checkpoint_uuid"] is None
    assert all(0 <= value <= 100 for value in found["resource_utilization"].values())
    assert found["resource_utilization"]["memory_percent"] > 0
    assert found["node_utilization"] is None
    statistics = found["api_statistics"]
    assert statistics["requests_per_hour"] == before["api_statistics"]["requests_per_hour"] + 3
    assert statistics["average_response_ms"] > 0
    assert statistics["error_rate_percent"] == 0
    assert [process["name"] for process in found["processes"]] == [served.hub.name]


def test_counts_are_those_of_all_processes(served: Served) -> None:
    store, here, there = served.hub.store, Tally(), Tally()
    with store.transaction() as session:
        session.exec(delete(ApiTraffic))
        session.add(ApiTraffic(minute=now() - timedelta(hours=2), hub="old", requests=500))
        session.add(ApiTraffic(minute=now() - timedelta(hours=30), hub="older", requests=500))
    for tally, seconds in ((here, 0.010), (there, 0.030)):
        for _ in range(3):
            tally.note(seconds, is_failure=False)
        tally.note(None, is_failure=True)
    there.flush(store, "host-x-1")
    there.note(0.030, is_failure=False)
    there.flush(store, "host-x-1")  # the same minute again
    with store.reading() as session:
        count = here.lately(session)
        assert "older" not in session.exec(select(ApiTraffic.hub)).all()
    assert (count.requests, count.failures, count.timed) == (9, 2, 7)
    assert count.total_milliseconds == pytest.approx(150)


def test_a_checkpoint_holds_what_the_hub_is_made_of(served: Served) -> None:
    hub, project = served.hub, served.project(name=f"kept-{uuid4().hex[:8]}")
    (hub.home / "config.toml").write_text('log_level = "info"\n')
    found = made(served, type="manual", reason="before a change", description="all of it")
    assert (found["kind"], found["type"], found["reason"]) == ("logical", "manual", "before a change")
    assert found["estimated_completion_at"] > found["created_at"]
    bundle = Path(found["path"])
    assert bundle == hub.home / "hub" / "checkpoints" / found["uuid"]
    manifest = bundles.verify(bundle)
    assert (found["size_bytes"], found["file_count"]) == (manifest.size_bytes, len(manifest.files))
    assert manifest.facts["hub_uuid"] == str(hub.uuid)
    expected = {"settings.json", "home/config.toml", "home/credentials", "home/node/token", "home/node/fingerprint"}
    expected |= {"home/hub/ssh/id_ed25519"}
    assert expected <= set(manifest.files)
    assert bundle.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in bundle.rglob("*"))
    settings = json.loads((bundle / "settings.json").read_text())
    assert settings["hub_port"]
    assert settings["api_key"] == "**********"
    if hub.store.is_sqlite:
        assert "journal.db" in manifest.files
        with sqlite3.connect(bundle / "database.db") as copy:
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert copy.execute("SELECT count(*) FROM project WHERE uuid = ?", [project.hex]).fetchone() == (1,)
    else:
        listing = ["pg_restore", "--list", str(bundle / "database.dump")]
        told = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        assert "TABLE DATA public project" in told
        assert "autovibe_durable" in told
        assert "journal.db" not in manifest.files
    status = served.get("/hub/status").json()
    assert status["last_checkpoint_uuid"] == found["uuid"]
    listed = served.get("/hub/checkpoints", limit=1).json()
    assert [item["uuid"] for item in listed["checkpoints"]] == [found["uuid"]]
    assert served.get("/hub/checkpoints", type="daily").json()["total_count"] == 0


def test_a_repeat_under_the_same_key_makes_one(served: Served) -> None:
    key = uuid4().hex
    first, second = (served.post("/hub/checkpoint", {"reason": "once"}, key=key).json() for _ in range(2))
    assert first["uuid"] == second["uuid"]
    assert served.get("/hub/checkpoints").json()["total_count"] == 1
    served.get(f"/hub/checkpoints/{first['uuid']}", wait=60)


@pytest.mark.parametrize("body", [{"type": "hourly"}, {"reasons": "x"}, {"reason": "x\x00"}, {"reason": "x" * 1001}])
def test_a_malformed_order_is_refused(served: Served, body: dict[str, Any]) -> None:
    error_of(served.post("/hub/checkpoint", body), 400, "INVALID_REQUEST")
    error_of(served.get(f"/hub/checkpoints/{uuid4()}"), 404, "NOT_FOUND")


def test_a_full_disk_is_refused_before_anything_is_recorded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    premises = served.hub.premises
    monkeypatch.setattr(served.hub, "premises", type(premises)(**{**vars(premises), "min_free_bytes": 10**18}))
    error = error_of(served.post("/hub/checkpoint"), 500, "INSUFFICIENT_SPACE")
    assert "min_free_gb" in error.message
    assert served.get("/hub/checkpoints").json()["total_count"] == 0


def test_a_failure_is_told_and_leaves_nothing(served: Served) -> None:
    place = served.hub.premises.checkpoints
    shutil.rmtree(place, ignore_errors=True)
    place.write_text("in the way")
    accepted = served.post("/hub/checkpoint").json()
    found = served.get(f"/hub/checkpoints/{accepted['uuid']}", wait=60).json()
    place.unlink()
    assert found["status"] == "failed"
    assert "could not be written" in found["error_message"]
    assert (found["path"], found["size_bytes"]) == ("", 0)
    operation = served.get(f"/operations/{found['operation_uuid']}", wait=60).json()
    assert (operation["status"], operation["error"]["code"]) == ("failed", "OPERATION_FAILED")


def row_of(hub: Hub, kind: str, age: timedelta, status: str = "ready", **more: Any) -> UUID:
    with hub.store.transaction() as session:
        row = HubCheckpoint(
            type=kind, status=status, created_at=now() - age, place=more.pop("place", place_of(hub.name)), **more
        )
        path = hub.premises.place(row.uuid)
        if status == "ready":
            path.mkdir(parents=True)
            (path / "file").write_text("x")
            row.path = str(path)
        session.add(row)
    return row.uuid


def test_what_is_kept(served: Served) -> None:
    hub, hour = served.hub, timedelta(hours=1)
    daily = [row_of(hub, "daily", n * 24 * hour + hour) for n in range(9)]
    manual = [row_of(hub, "manual", n * hour + 2 * hour) for n in range(12)]
    before_experiments = [row_of(hub, "pre_experiment", n * hour + 3 * hour) for n in range(5)]
    recovery = [row_of(hub, "recovery", n * hour + 4 * hour) for n in range(4)]
    elsewhere = row_of(hub, "daily", timedelta(days=400), place="another-host-0123")
    failed = row_of(hub, "manual", timedelta(days=8), status="failed")
    making = row_of(hub, "manual", timedelta(days=8), status="creating")
    with hub.store.transaction() as session:
        experiment = Experiment(name="e", checkpoint_uuid=before_experiments[4], status="running", ends_at=now())
        ended = Experiment(name="f", checkpoint_uuid=before_experiments[3], status="ended", ends_at=now())
        session.add_all([experiment, ended])
    backups.prune(hub)
    with hub.store.reading() as session:
        left = {row.uuid: row for row in session.exec(select(HubCheckpoint))}
    expected = {*daily[:7], *manual[:10], *before_experiments[:3], before_experiments[4], *recovery[:3]}
    assert set(left) == expected | {elsewhere, making, before_experiments[3]}
    assert left[before_experiments[3]].status == "failed"  # its experiment names it
    assert failed not in left
    assert all(Path(left[uuid].path, "file").exists() for uuid in expected)
    gone = {*daily, *manual, *before_experiments, *recovery} - expected
    assert not [uuid for uuid in gone if hub.premises.place(uuid).exists()]


def test_one_that_cannot_be_deleted_does_not_keep_the_others(served: Served) -> None:
    hub = served.hub  # whose Proxmox does not answer
    stuck = row_of(hub, "recovery", timedelta(hours=20), vmid=9001, snapshot="s")
    old = row_of(hub, "recovery", timedelta(hours=30))
    kept = [row_of(hub, "recovery", timedelta(hours=hour)) for hour in (1, 2, 3)]
    backups.prune(hub)
    with hub.store.reading() as session:
        assert set(session.exec(select(HubCheckpoint.uuid))) == {stuck, *kept}
    assert not hub.premises.place(old).exists()


def test_what_failed_leaves_no_files(served: Served) -> None:
    hub = served.hub
    failed, ready = (row_of(hub, "manual", timedelta(hours=1), status=status) for status in ("failed", "ready"))
    place, foreign = hub.premises.place, hub.premises.checkpoints / "mine"
    for path in (place(failed), place(ready).with_name(f"{ready}.1.partial"), foreign):
        path.mkdir()
    backups.prune(hub)
    assert sorted(hub.premises.checkpoints.iterdir()) == sorted([place(ready), foreign])


def test_the_newest_is_never_deleted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "KEPT", dict.fromkeys(backups.KEPT, 0))
    monkeypatch.setattr(served.hub, "hub_checkpoints_kept", 0)
    newest = row_of(served.hub, "manual", timedelta(hours=1))
    row_of(served.hub, "manual", timedelta(hours=2))
    backups.prune(served.hub)
    with served.hub.store.reading() as session:
        assert session.exec(select(HubCheckpoint.uuid)).all() == [newest]


def test_one_a_day_however_many_look(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = served.hub
    backups.create_daily(hub)  # it has not been up for an hour
    with hub.store.reading() as session:
        assert session.exec(select(HubCheckpoint)).all() == []
    monkeypatch.setattr(hub, "started_at", now() - timedelta(hours=2))
    threads = [threading.Thread(target=backups.create_daily, args=(hub,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    backups.create_daily(hub)
    [daily] = served.get("/hub/checkpoints").json()["checkpoints"]
    assert daily["type"] == "daily"
    assert served.get(f"/hub/checkpoints/{daily['uuid']}", wait=60).json()["status"] == "ready"


def test_a_daily_one_that_failed_is_tried_again_later(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = served.hub
    monkeypatch.setattr(hub, "started_at", now() - timedelta(hours=2))
    day = datetime.now(UTC).date().isoformat()
    recent = row_of(hub, "daily", timedelta(minutes=10), status="failed", day=day)
    backups.create_daily(hub)
    with hub.store.transaction() as session:
        assert session.exec(select(HubCheckpoint.uuid)).all() == [recent]
        session.get_one(HubCheckpoint, recent).created_at = now() - timedelta(hours=2)
    backups.create_daily(hub)
    with hub.store.reading() as session:
        rows = session.exec(select(HubCheckpoint).order_by(col(HubCheckpoint.created_at))).all()
    assert [row.day for row in rows] == [None, day]
    served.get(f"/hub/checkpoints/{rows[1].uuid}", wait=60)


def test_a_bundle_that_lies_in_another_home_is_made_anew(served: Served) -> None:
    """What a process finds that took over from one whose home it does not see."""
    found = made(served)
    with served.hub.store.transaction() as session:
        row = session.get_one(HubCheckpoint, UUID(found["uuid"]))
        row.status, row.place = "creating", "another-host-0123"
        operation = session.get_one(Operation, UUID(found["operation_uuid"]))
    with pytest.raises(hub_checkpoint.Repeat):
        hub_checkpoint.record(served.hub.workflows.world, operation.uuid)
    hub_checkpoint.copy(served.hub.workflows.world, operation.uuid)
    hub_checkpoint.record(served.hub.workflows.world, operation.uuid)
    assert served.row(HubCheckpoint, found["uuid"]).status == "ready"
    assert served.row(HubCheckpoint, found["uuid"]).place == place_of(served.hub.name)
