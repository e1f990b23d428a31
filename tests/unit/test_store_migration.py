"""A database of release 0.1, with everything in it, migrated to this one: nothing is lost, keys work, machines go on.

The rows are written by plain SQL into the schema as migration 0001 made it, so that nothing of today shapes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from alembic import command
from sqlalchemy import text
from sqlmodel import Session, col, select

from autovibe import app
from autovibe.domain import Account, LedgerEntry, Machine, Operation, Reservation
from autovibe.domain.budget import LIFE, Scope
from autovibe.hub import adoption, metering
from autovibe.hub.adoption import UNPRICED
from autovibe.store import Store, migration_engine, schema
from autovibe.types import MachineStatus, Resource
from tests.api.conftest import KEY, serve, settings_of

OLD = "0001"
MOMENT = datetime(2026, 11, 20, 9, 30, 15, 250_000, tzinfo=UTC)
OLD_KEY = "av_5ca1ab1e_" + "q" * 43
OWN_KEY = "a key the operator made up"
STATUSES = [*(status for status in MachineStatus if status != MachineStatus.budget_blocked)]


@dataclass
class Old:
    """What was written, table by table, as plain values."""

    url: str
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    machines: dict[str, UUID] = field(default_factory=dict)
    project: UUID = field(default_factory=uuid4)
    poor: UUID = field(default_factory=uuid4)


@pytest.fixture
def old(empty_database_url: str) -> Old:
    """A database at the schema of the release before."""
    store = Store(empty_database_url)
    engine = migration_engine(store.url)
    config = schema._config()
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, OLD)
    made = Old(empty_database_url)
    _fill(made)
    with engine.connect() as connection, connection.begin():
        for table, rows in made.rows.items():
            for row in rows:
                names = ", ".join(f'"{name}"' for name in row)
                values = ", ".join(f":{name}" for name in row)
                connection.execute(
                    text(f"INSERT INTO {table} ({names}) VALUES ({values})"),
                    {name: _plain(value, store.is_sqlite) for name, value in row.items()},
                )
    engine.dispose()
    store.close()
    return made


def _plain(value: Any, is_sqlite: bool) -> Any:
    """As the driver takes it without SQLAlchemy's types."""
    if isinstance(value, dict | list):
        return json.dumps(value)
    if is_sqlite and isinstance(value, UUID):
        return value.hex
    if is_sqlite and isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")
    return value


def _fill(old: Old) -> None:
    genesis = {project: uuid4() for project in (old.project, old.poor)}
    old.rows["project"] = [
        _project(old.project, "kept", genesis[old.project], daily_money_micros=5_000_000, daily_time_hours=24.0),
        _project(old.poor, "poor", genesis[old.poor], daily_money_micros=0),
    ]
    old.rows["checkpoint"] = [_checkpoint(uuid, project, "genesis") for project, uuid in genesis.items()]
    old.rows["machine"] = []
    for number, status in enumerate(STATUSES):
        old.machines[status] = _machine(old, old.project, str(status), number)
    old.machines["poor"] = _machine(old, old.poor, "active", 90)
    manual = _checkpoint(uuid4(), old.project, "manual", machine_uuid=old.machines["active"], label="before")
    old.rows["checkpoint"].append(manual)
    old.rows["operation"] = [
        _operation(old.machines["active"], "succeeded"),
        _operation(old.machines["failed"], "failed"),
    ]
    old.rows["allotment"] = [
        {"vmid": 9000 + number, "owner_uuid": row["uuid"], "created_at": MOMENT}
        for number, row in enumerate(old.rows["machine"])
        if row["ended_at"] is None
    ]
    old.rows["machine_output"] = [
        {"machine_uuid": old.machines["working"], "start": 0, "body": b"half a line", "created_at": MOMENT}
    ]
    old.rows["event"] = [
        {"kind": "machine.status", "object_uuid": uuid, "project_uuid": old.project, "body": {"status": status}}
        | {"created_at": MOMENT}
        for status, uuid in old.machines.items()
    ]
    own = hashlib.sha256(OWN_KEY.encode()).hexdigest()
    old.rows["api_key"] = [
        _key("5ca1ab1e", "operator", hashlib.sha256(("q" * 43).encode()).hexdigest()),
        _key(own[:16], "operator", own),
    ]
    old.rows["hub_key"] = [{"public_key": "ssh-ed25519 AAAA old", "hub": "host", "created_at": MOMENT}]
    old.rows["idempotency_key"] = [
        {"actor": "operator", "key": "once", "request_hash": "0" * 64, "object_kind": "project"}
        | {"object_uuid": old.project, "created_at": MOMENT}
    ]


def _project(uuid: UUID, name: str, genesis: UUID, **fields: Any) -> dict[str, Any]:
    limits = {"daily_money_micros": None, "daily_time_hours": None, "daily_api_calls": None, "storage_gb": None}
    return {
        "uuid": uuid,
        "name": name,
        "description": "Ä description",
        "status": "active",
        "greediness": 0.25,
        "currency": "USD",
        "max_concurrent_machines": 20,
        "current_checkpoint_uuid": genesis,
        "initial_checkpoint_uuid": genesis,
        "created_at": MOMENT,
        "updated_at": MOMENT,
        **limits,
        **fields,
    }


def _checkpoint(uuid: UUID, project: UUID, kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "project_uuid": project,
        "type": kind,
        "description": "",
        "context": "",
        "status": "ready",
        "node": "autovibe",
        "vmid": 100,
        "artefact_kind": "template" if kind == "genesis" else "snapshot",
        "storage": "local-lvm",
        "root_digest": "0" * 64,
        "file_count": 0,
        "size_bytes": 12_345,
        "unique_bytes": 345,
        "metadata": {"trigger": "project"},
        "created_at": MOMENT,
        **fields,
    }


def _machine(old: Old, project: UUID, status: str, number: int) -> UUID:
    uuid, is_over = uuid4(), status in ("terminated", "failed")
    old.rows["machine"].append(
        {
            "uuid": uuid,
            "name": f"m-{status}-{number}",
            "type": "shell",
            "status": status,
            "resume_status": "active" if status in ("checkpointing", "restoring", "paused") else None,
            "wanted": "terminated" if status == "terminating" else "running",
            "project_uuid": project,
            "prompt": "make test" if status == "working" else None,
            "file_modifications": {"/workspace/a": "b"},
            "max_money_micros": 2_000_000,
            "currency": "USD",
            "max_time_minutes": 90.0,
            "node": "autovibe",
            "vmid": 9000 + number,
            "progress": "",
            "termination_reason": "",
            "output_bytes": 11 if status == "working" else 0,
            "spawned_at": MOMENT,
            "running_at": None if status == "spawning" else MOMENT + timedelta(seconds=20),
            "ended_at": MOMENT + timedelta(hours=1) if is_over else None,
            "terminated_at": MOMENT + timedelta(hours=1) if status == "terminated" else None,
            "updated_at": MOMENT,
        }
    )
    return uuid


def _operation(machine: UUID, status: str) -> dict[str, Any]:
    error = {"code": "OPERATION_FAILED", "message": "No."} if status == "failed" else None
    return {
        "uuid": uuid4(),
        "kind": "spawn",
        "status": status,
        "steps": ["clone", "start"],
        "progress": "",
        "error": error,
        "object_uuid": machine,
        "machine_uuid": machine,
        "actor": "operator",
        "arguments": {},
        "created_at": MOMENT,
        "finished_at": MOMENT,
    }


def _key(identifier: str, name: str, secret_hash: str) -> dict[str, Any]:
    return {"id": identifier, "name": name, "secret_hash": secret_hash, "created_at": MOMENT}


def test_nothing_is_lost(old: Old, tmp_path: Path) -> None:
    store = Store(old.url)
    store.migrate(tmp_path / "backups")
    with store.reading() as session:
        for table, written in old.rows.items():
            found = [dict(row) for row in session.execute(text(f"SELECT * FROM {table}")).mappings()]
            assert len(found) == len(written), table
            for row in written:
                plain = {name: _plain(value, store.is_sqlite) for name, value in row.items()}
                assert any(_holds(one, plain, row) for one in found), (table, row)
    store.close()
    assert list((tmp_path / "backups").iterdir()) or not store.is_sqlite


def _holds(found: dict[str, Any], plain: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the row is the one that was written, in the columns of then."""
    for name, value in row.items():
        there = found[name]
        if isinstance(value, dict | list):
            there = json.loads(there) if isinstance(there, str) else there
            if there != value:
                return False
        elif isinstance(value, bytes):
            if bytes(there) != value:
                return False
        elif there not in (plain[name], value):
            return False
    return True


def test_new_columns_have_sane_values(old: Old, tmp_path: Path) -> None:
    store = Store(old.url)
    store.migrate(tmp_path / "backups")
    with store.reading() as session:
        for machine in session.exec(select(Machine)).all():
            assert machine.price_micros == (0 if machine.ended_at else UNPRICED)
            unknown = (machine.estimate, machine.reservation_uuid, machine.metered_at, machine.blocked)
            assert unknown == (None,) * 4
            assert machine.spawned_at == MOMENT
        assert session.exec(select(Account)).all() == []
        assert session.exec(select(LedgerEntry)).all() == []
        keys = session.execute(text("SELECT role, scheme, scopes, revoked_at, expires_at FROM api_key")).all()
        assert {tuple(key) for key in keys} == {("admin", "sha256", "", None, None)}
        assert session.execute(text("SELECT count(DISTINCT uuid) FROM api_key")).scalar_one() == 2
    store.close()


@dataclass
class Upgraded:
    parts: app.Parts
    http: httpx2.Client


@pytest.fixture
def upgraded(old: Old) -> Iterator[Upgraded]:
    """A Hub of this release on the old database. Its upkeep is not started: a test calls what it looks at."""
    home = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    parts = app.build(settings_of(home, database_url=old.url, api_key=KEY))
    parts.durable.launch()
    url, stop = serve(parts)
    with httpx2.Client(base_url=f"{url}/api/v1", timeout=30, trust_env=False) as http:
        yield Upgraded(parts, http)
    stop()
    parts.close()
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("key", [OLD_KEY, OWN_KEY])
def test_old_keys_are_admins(upgraded: Upgraded, old: Old, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    for _ in range(2):  # the first use renews its hash
        assert upgraded.http.get("/audit", headers=headers).status_code == 200
        upgraded.parts.hub.keys._known.clear()
    wrong = {"Authorization": f"Bearer {key[:-1]}x"}
    assert upgraded.http.get("/audit", headers=wrong).status_code == 401
    again = upgraded.http.put(f"/projects/{old.project}", json={"description": "new"}, headers=headers)
    assert again.json()["description"] == "new"


def test_every_old_object_is_shown(upgraded: Upgraded, old: Old) -> None:
    headers = {"Authorization": f"Bearer {OLD_KEY}"}

    def get(path: str) -> dict[str, Any]:
        answer = upgraded.http.get(path, headers=headers)
        assert answer.status_code == 200, (path, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    shown = {item["uuid"]: item["status"] for item in get("/machines?limit=200")["machines"]}
    assert shown == {str(row["uuid"]): row["status"] for row in old.rows["machine"]}
    for row in old.rows["machine"]:
        assert get(f"/machines/{row['uuid']}")["resource_usage"]["money"]["estimated"] is None
    for row in old.rows["checkpoint"]:
        assert get(f"/checkpoints/{row['uuid']}")["size_bytes"] == 12_345
    for row in old.rows["operation"]:
        assert get(f"/operations/{row['uuid']}")["kind"] == "spawn"
    money = get(f"/projects/{old.project}")["resource_usage_today"]["money"]
    assert (money["allocated"]["micros"], money["used"]["micros"]) == (5_000_000, 0)
    assert get(f"/machines/{old.machines['working']}/logs")["text"] == "half a line"
    for path in ("/resources/overview", f"/resources/projects/{old.project}", "/analytics/efficiency", "/hub/status"):
        get(path)


def test_machines_that_run_are_metered_from_now_on(upgraded: Upgraded, old: Old) -> None:
    hub = upgraded.parts.hub
    adoption.adopt(hub)
    adoption.adopt(hub)  # once
    running = [old.machines["active"], old.machines["working"]]

    def look(do: Callable[[Session], Any]) -> Any:
        with hub.store.reading() as session:
            return do(session)

    machines = {machine.uuid: machine for machine in look(lambda session: session.exec(select(Machine)).all())}
    for uuid in running:
        machine = machines[uuid]
        assert machine.status in ("active", "working")  # it goes on
        assert machine.price_micros > 0
        assert machine.estimate is not None
        assert machine.metered_at is not None
    held = look(lambda session: session.exec(select(Reservation).where(col(Reservation.closed_at).is_(None))).all())
    assert {row.uuid for row in held} == {machines[uuid].reservation_uuid for uuid in running}
    for status in ("paused", "spawning", "terminating", "checkpointing", "restoring"):  # when they run again
        assert machines[old.machines[status]].price_micros == UNPRICED

    later = machines[running[0]].metered_at + timedelta(seconds=40)
    assert {found.uuid for found in metering.running(hub)} == set(running)
    metering.meter(hub, metering.Samples(), later)
    key = (Scope.machine, running[0], LIFE, Resource.time_hours)
    used = look(lambda session: session.get(Account, key).used_micros)
    assert used == pytest.approx(40 / 3600 * 1e6, abs=2)


def test_one_without_room_is_blocked_and_not_lost(
    upgraded: Upgraded, old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = upgraded.parts.hub
    started: list[UUID] = []
    hub.workflows.start_soon = lambda uuid, kind: started.append(uuid)  # type: ignore[method-assign,assignment]
    with monkeypatch.context() as busy:
        busy.setattr(adoption, "block", lambda *_: False)  # it is being checkpointed
        adoption.adopt(hub)
    adoption.adopt(hub)
    with hub.store.reading() as session:
        machine = session.get(Machine, old.machines["poor"])
        assert machine is not None
        assert (machine.status, machine.resume_status) == ("checkpointing", "budget_blocked")
        assert machine.blocked is not None
        assert machine.blocked["resource"] == "money"
        operation = session.get(Operation, machine.operation_uuid)
        assert operation is not None
        assert operation.kind == "block"
        assert started == [operation.uuid]
