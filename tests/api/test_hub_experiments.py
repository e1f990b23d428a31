"""Experiments: a real second Hub, made of a checkpoint of the first, found again, started again, ended."""

from __future__ import annotations

import os
import signal
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlmodel import Session, delete, select

from autovibe.domain import Allotment, Experiment, HubCheckpoint, Machine, Project
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import place_of
from autovibe.errors import DatabaseUnavailable, LimitExceeded, OperationFailed
from autovibe.hub import experiment_home, experiments
from autovibe.hub.laboratory import Laboratory
from autovibe.premises import launch_of
from autovibe.store import Store
from tests.api.conftest import KEY, Served, error_of, settings_of, until


@pytest.fixture
def base(served: Served) -> Iterator[UUID]:
    """A checkpoint of the Hub; whatever a test leaves running is ended."""
    accepted = served.post("/hub/checkpoint", {"type": "pre_experiment"}).json()
    assert served.get(f"/hub/checkpoints/{accepted['uuid']}", wait=60).json()["status"] == "ready"
    yield UUID(accepted["uuid"])
    for item in served.get("/hub/experiments").json()["experiments"]:
        served.http.post(f"/hub/experiments/{item['uuid']}/stop")
    until(lambda: all(e["ended_at"] for e in served.get("/hub/experiments").json()["experiments"]), 60)
    with served.hub.store.transaction() as session:
        session.exec(delete(Experiment))
        session.exec(delete(HubCheckpoint))


def vmids_of(served: Served, owner: str) -> list[int]:
    with served.hub.store.reading() as session:
        return sorted(session.exec(select(Allotment.vmid).where(Allotment.owner_uuid == UUID(owner))))


def test_a_second_hub_runs_beside_the_first_and_ends(served: Served, base: UUID) -> None:
    project = served.project(name=f"p-{uuid4().hex[:8]}", daily_money_micros=10_000_000, max_concurrent_machines=3)
    machine = served.machine(project, vmid=9001)
    served.machine(project, status="terminated", ended_at=now() - timedelta(days=1), vmid=None)
    made = served.post("/hub/checkpoint", {"type": "pre_experiment"}).json()
    served.get(f"/hub/checkpoints/{made['uuid']}", wait=60)
    order = {
        "name": "faster",
        "configuration": {"algorithm": "greedy", "optimization": {"rate": 0.5}, "settings": {"workers": 3}},
        "budget_share": 0.25,
        "duration_days": 2,
    }
    key = uuid4().hex
    planned = served.post("/hub/spawn-experimental", order, key=key)
    assert planned.status_code == 201, planned.text
    found = planned.json()
    assert served.post("/hub/spawn-experimental", order, key=key).json()["uuid"] == found["uuid"]
    assert (found["status"], found["checkpoint_uuid"]) == ("planned", made["uuid"])
    assert found["estimated_ready_at"] > found["created_at"]
    assert len({found["uuid"], found["hub_uuid"], str(served.hub.uuid)}) == 3
    assert vmids_of(served, found["uuid"]) == list(range(9950, 10000))
    error_of(served.post("/hub/spawn-experimental", order), 409, "CONFLICT")  # the name

    found = served.get(f"/hub/experiments/{found['uuid']}", wait=120).json()
    assert found["status"] == "running", found["error_message"]
    key_file = Path(found["path"]) / "credentials"
    headers = {"Authorization": f"Bearer {key_file.read_text().strip()}"}
    with httpx2.Client(base_url=f"{found['url']}/api/v1", headers=headers, trust_env=False, timeout=30) as second:
        status = second.get("/hub/status").json()
        assert (status["uuid"], status["experiment"]["uuid"]) == (found["hub_uuid"], found["uuid"])
        assert status["experiment"]["configuration"]["optimization"] == {"rate": 0.5}
        error_of(second.post("/hub/spawn-experimental", json={"name": "inner"}), 409, "CONFLICT")
        assert second.get("/projects", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
        theirs = second.get(f"/projects/{project}").json()
        assert theirs["resource_budgets"]["daily_money"]["micros"] == 2_500_000
        assert theirs["resource_budgets"]["max_concurrent_machines"] == 1
        assert second.get(f"/machines/{machine}").json()["status"] == "terminated"
        assert second.get("/hub/checkpoints").json()["total_count"] == 0
    assert served.get(f"/machines/{machine}").json()["status"] == "active"
    config = tomllib.loads((Path(found["path"]) / "config.toml").read_text())
    assert (config["workers"], config["vmid_first"], config["vmid_last"]) == (3, 9950, 9999)
    assert f"http://127.0.0.1:{config['hub_port']}" == found["url"] != served.url
    assert all(path.stat().st_mode & 0o077 == 0 for path in Path(found["path"]).glob("*.toml"))
    comparison = found["comparison"]
    assert comparison["experiment"]["total_operations"] == comparison["original"]["total_operations"] == 0

    row = served.row(Experiment, found["uuid"])
    assert Laboratory(served.hub)._pid_of(row) == found["pid"]  # as a Hub finds it that was started again
    os.kill(found["pid"], signal.SIGKILL)
    until(lambda: served.row(Experiment, found["uuid"]).start_count == 2, 60)
    until(lambda: experiments.ask_figures(served.row(Experiment, found["uuid"])) is not None, 60)

    own = Store(f"sqlite:///{found['path']}/hub/autovibe.db") if served.hub.store.is_sqlite else None
    if own is not None:  # a VM of it that holds a checkpoint and stays
        with own.transaction() as session:
            session.add(Allotment(vmid=9951, owner_uuid=uuid4()))
        own.close()
    assert served.http.post(f"/hub/experiments/{found['uuid']}/stop").json()["is_stopping"]
    ended = served.get(f"/hub/experiments/{found['uuid']}", wait=120, wait_for="ended").json()
    assert (ended["status"], ended["pid"]) == ("ended", None)
    assert ended["error_message"] == (None if own is None else "VMs of it are left, and keep their vmids: 9951.")
    assert ended["comparison"]["experiment"]["total_operations"] == 0  # what it said last
    assert vmids_of(served, found["uuid"]) == ([] if own is None else [9951])
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{found['url']}/api/v1/health", trust_env=False)
    listed = served.get("/hub/experiments", status="ended").json()
    assert [item["uuid"] for item in listed["experiments"]] == [found["uuid"]]
    assert served.http.post(f"/hub/experiments/{found['uuid']}/stop").json()["status"] == "ended"  # again


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"configuration": {"settings": {"hub_port": 1}}}, "cannot change 'hub_port'"),
        ({"configuration": {"settings": {"workers": 0}}}, "'workers' cannot be '0'"),
        ({"configuration": {"settings": {"log_level": "loud"}}}, "'log_level' cannot be 'loud'"),
        ({"configuration": {"settings": {"workers": [1]}}}, "malformed"),
        ({"configuration": {"speed": 1}}, "malformed"),
        ({"name": "a/b"}, "malformed"),
        ({"duration_days": 0}, "malformed"),
        ({"duration_days": 91}, "malformed"),
        ({"budget_share": 1.5}, "malformed"),
        ({"budget_share": -0.1}, "malformed"),
        ({"checkpoint_uuid": "x"}, "malformed"),
    ],
)
def test_a_malformed_order_is_refused(served: Served, change: dict[str, Any], says: str) -> None:
    error = error_of(served.post("/hub/spawn-experimental", {"name": "e", **change}), 400, "INVALID_REQUEST")
    assert says in error.message
    assert served.get("/hub/experiments").json()["total_count"] == 0


def test_what_there_is_not(served: Served) -> None:
    error_of(served.get(f"/hub/experiments/{uuid4()}"), 404, "NOT_FOUND")
    error_of(served.http.post(f"/hub/experiments/{uuid4()}/stop"), 404, "NOT_FOUND")
    error = error_of(served.post("/hub/spawn-experimental", {"name": "e"}), 404, "NOT_FOUND")
    assert "autovibe hub checkpoint" in error.message
    unknown = {"name": "e", "checkpoint_uuid": str(uuid4())}
    error_of(served.post("/hub/spawn-experimental", unknown), 404, "NOT_FOUND")


def test_what_forbids_one(served: Served, base: UUID) -> None:
    def change(**values: Any) -> None:
        with served.hub.store.transaction() as session:
            row = session.get_one(HubCheckpoint, base)
            for name, value in values.items():
                setattr(row, name, value)

    order = {"name": "e", "checkpoint_uuid": str(base)}
    change(status="failed")
    error_of(served.post("/hub/spawn-experimental", order), 409, "CONFLICT")
    change(status="ready", place="another-host-0123")
    assert "another-host-0123" in error_of(served.post("/hub/spawn-experimental", order), 409, "CONFLICT").message
    change(place=place_of(served.hub.name))
    with served.hub.store.transaction() as session:  # of another home: nobody here looks after them
        rows = [
            Experiment(name=f"x{n}", checkpoint_uuid=base, place="elsewhere", ends_at=now())
            for n in range(experiments.MOST)
        ]
        session.add_all(rows)
    error_of(served.post("/hub/spawn-experimental", order), 409, "RESOURCE_LIMIT_EXCEEDED")
    with served.hub.store.transaction() as session:
        session.exec(delete(Experiment))


def test_a_checkpoint_that_was_changed_is_no_base(served: Served, base: UUID) -> None:
    (Path(served.row(HubCheckpoint, base).path) / "settings.json").write_text("{}")
    made = served.post("/hub/spawn-experimental", {"name": "e"}).json()
    found = served.get(f"/hub/experiments/{made['uuid']}", wait=60).json()
    assert found["status"] == "failed"
    assert "'settings.json' was changed" in found["error_message"]
    assert vmids_of(served, made["uuid"]) == []


def test_one_whose_time_is_over_before_it_began_just_ends(served: Served, base: UUID) -> None:
    with served.hub.store.transaction() as session:
        row = Experiment(name="late", checkpoint_uuid=base, place=place_of(served.hub.name), ends_at=now())
        row.path = str(served.hub.home / "experiments" / str(row.uuid))
        session.add(row)
        session.add(Allotment(vmid=9700, owner_uuid=row.uuid))
    found = served.get(f"/hub/experiments/{row.uuid}", wait=60).json()
    assert (found["status"], found["started_at"]) == ("ended", None)
    assert vmids_of(served, str(row.uuid)) == []


def test_the_home_of_one_that_was_over_long_ago_goes(served: Served, base: UUID, tmp_path: Path) -> None:
    def add(name: str, age: timedelta) -> Experiment:
        (tmp_path / name).mkdir()
        with served.hub.store.transaction() as session:
            row = Experiment(
                name=name,
                checkpoint_uuid=base,
                place=place_of(served.hub.name),
                path=str(tmp_path / name),
                status="ended",
                ends_at=now(),
                ended_at=now() - age,
            )
            session.add(row)
        return row

    old, recent = add("old", timedelta(days=8)), add("recent", timedelta(days=6))
    Laboratory(served.hub)._forget_old()
    assert [path.name for path in tmp_path.iterdir()] == ["recent"]
    assert (served.row(Experiment, old.uuid).path, served.row(Experiment, recent.uuid).path) == ("", recent.path)


@pytest.fixture
def left(served: Served, base: UUID, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Experiment, Store]:
    """One that runs and has a machine, in another home, so that the Hub leaves it to the test; and its database."""
    (tmp_path / "config.toml").touch()
    own = Store(f"sqlite:///{tmp_path / 'own.db'}")
    own.migrate(tmp_path / "backups")
    with served.hub.store.transaction() as session:
        row = Experiment(
            name="left",
            checkpoint_uuid=base,
            place="elsewhere",
            path=str(tmp_path),
            status="running",
            ends_at=now(),
            started_at=now(),
        )
        session.add(row)
    with own.transaction() as session:
        project = Project(name="p")
        session.add(project)
        session.flush()
        session.add(Machine(name="m", type="shell", project_uuid=project.uuid, node="n", vmid=9951, status="active"))
    monkeypatch.setattr(experiment_home, "database_of", lambda *_: Store(f"sqlite:///{tmp_path / 'own.db'}"))
    return row, own


def test_one_whose_hub_is_down_at_its_end_is_started_to_end_its_machines(
    served: Served, left: tuple[Experiment, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, own = left
    started: list[UUID] = []
    laboratory = Laboratory(served.hub)
    monkeypatch.setattr(laboratory, "_start", lambda row: started.append(row.uuid))
    laboratory._end(row)
    assert (started, served.row(Experiment, row.uuid).status) == ([row.uuid], "running")
    with own.transaction() as session:
        session.exec(select(Machine)).one().status = "terminated"
    laboratory._end(row)
    assert (len(started), served.row(Experiment, row.uuid).status) == (1, "ended")


@pytest.mark.parametrize(
    ("error", "status"),
    [(DatabaseUnavailable(), "running"), (OSError("full"), "running"), (OperationFailed("It is gone."), "failed")],
)
def test_trouble_of_the_original_ends_none(
    served: Served, left: tuple[Experiment, Store], monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def advance(_row: Experiment) -> None:
        raise error

    laboratory = Laboratory(served.hub)
    for name, stub in {"_living": lambda: [left[0]], "_take_lock": lambda: True, "_advance": advance}.items():
        monkeypatch.setattr(laboratory, name, stub)
    laboratory.look_after()
    assert served.row(Experiment, left[0].uuid).status == status
    with served.hub.store.transaction() as session:
        session.exec(delete(Experiment))


def test_its_machines_are_not_told_the_url_of_the_original(home: Path) -> None:
    shared = launch_of(settings_of(home, hub_url_for_guests="http://10.0.2.2:8080", workers=3)).settings
    assert ("hub_url_for_guests" in shared, shared["workers"]) == (False, 3)


def test_a_stretch_is_the_last_that_is_free(store: Store) -> None:
    def take(session: Session, *vmids: int) -> None:
        session.add_all(Allotment(vmid=vmid, owner_uuid=uuid4()) for vmid in vmids)
        session.flush()

    with store.transaction() as session:
        assert experiments.free_stretch(session, range(9000, 10000)) == range(9950, 10000)
        take(session, 9960)
        assert experiments.free_stretch(session, range(9000, 10000)) == range(9910, 9960)
        take(session, 9905, 9890)
        assert experiments.free_stretch(session, range(9000, 10000)) == range(9910, 9960)
        take(session, 9930)
        assert experiments.free_stretch(session, range(9000, 10000)) == range(9840, 9890)
        assert experiments.free_stretch(session, range(100, 140)) == range(130, 140)
        take(session, *range(200, 240, 5))
        for vmids in (range(100, 110), range(200, 240)):
            with pytest.raises(LimitExceeded, match="vmid_last"):
                experiments.free_stretch(session, vmids)
