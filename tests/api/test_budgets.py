"""Budgets over HTTP: what a spawn reserves, what refuses it, what a machine shows of its use, and the dry run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlalchemy import inspect, text
from sqlmodel import select

from autovibe import app, schemas
from autovibe.domain import Checkpoint, Machine, Reservation
from autovibe.domain.budget import SLICE_SECONDS, running
from autovibe.domain.columns import now
from autovibe.store import rows
from autovibe.store.ledger import Holder
from autovibe.types import MICROS, MachineStatus, Resource
from tests.api.conftest import KEY, Served, error_of, serve, settings_of
from tests.conftest import BACKENDS


@pytest.fixture(scope="module", params=BACKENDS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A hub that answers and decides, and carries nothing out: no workflow and no upkeep changes a row."""
    path = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    more: dict[str, Any] = {}
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        more["database_url"] = server.create(is_migrated=True, backups=path / "backups")
    parts = app.build(settings_of(path, **more))
    url, stop = serve(parts)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=f"{url}/api/v1", headers=headers, timeout=30, trust_env=False) as http:
        yield Served(parts, url, http)
    stop()
    parts.hub.store.close()
    if "database_url" in more:
        server.drop(more["database_url"])
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def pool(served: Served, limits: dict[Resource, int]) -> Iterator[None]:
    """The hub with a pool; its dictionary is the one the ledger looks at."""
    shared: Any = served.hub.ledger.pool
    before = dict(shared)
    shared.clear()
    shared.update(limits)
    with served.hub.store.transaction() as session:
        served.hub.ledger.refit(session)
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)
        with served.hub.store.transaction() as session:
            served.hub.ledger.refit(session)


def spawn(served: Served, project: UUID, **fields: Any) -> httpx2.Response:
    return served.post("/machines", {"project_uuid": str(project), **fields})


def held(served: Served, machine: str) -> dict[Resource, int]:
    row = served.row(Machine, machine)
    with served.hub.store.reading() as session:
        return served.hub.ledger.reserved(session, row.reservation_uuid) if row.reservation_uuid else {}


def reservations(served: Served, project: UUID) -> int:
    with served.hub.store.reading() as session:
        return len(session.exec(select(Reservation.uuid).where(Reservation.project_uuid == project).distinct()).all())


# What is reserved


def test_a_spawn_reserves_the_tail_and_a_slice(served: Served) -> None:
    project = served.project(daily_money_micros=MICROS, daily_time_hours=1.0)
    machine = spawn(served, project).json()
    row = served.row(Machine, machine["uuid"])
    world = served.hub.workflows.world
    assert row.price_micros == 50_000 * world.cores + 10_000 * world.memory_mb // 1024 + 1_000 * 10
    assert held(served, machine["uuid"]) == running(row.price_micros, served.hub.tail_seconds)
    assert held(served, machine["uuid"])[Resource.time_hours] == int((60 + SLICE_SECONDS) * MICROS / 3600)
    usage = machine["resource_usage"]
    assert usage["time_minutes"] == {"estimated": 5.0, "actual": 0.0}
    assert usage["api_calls"] == {"estimated": 1.0, "actual": 0.0}
    assert usage["cpu_hours"] == {"estimated": 0.1, "actual": 0.0}
    assert usage["money"]["estimated"]["micros"] == round(row.price_micros * 5 / 60)
    assert usage["money"]["actual"]["micros"] == 0


def test_a_repeat_under_the_same_key_reserves_once(served: Served) -> None:
    project, key = served.project(daily_money_micros=MICROS), uuid4().hex
    body = {"project_uuid": str(project)}
    first, second = (served.post("/machines", body, key=key).json()["uuid"] for _ in range(2))
    assert first == second
    assert reservations(served, project) == 1


def test_a_machine_shows_what_the_ledger_charged(served: Served) -> None:
    project = served.project()
    machine = spawn(served, project, prompt="echo").json()["uuid"]
    row = served.row(Machine, machine)
    assert row.reservation_uuid is not None
    used = {Resource.money: 1_234_567, Resource.api_calls: 3 * MICROS, Resource.cpu_hours: 25_000}
    with served.hub.store.transaction() as session:
        served.hub.ledger.charge(session, row.reservation_uuid, {**used, Resource.time_hours: 50_000})
    for shown in (
        served.get(f"/machines/{machine}").json(),
        served.get("/machines", project_uuid=str(project)).json()["machines"][0],
        served.post(f"/machines/{machine}/terminate").json(),
    ):
        usage = shown["resource_usage"]
        assert usage["money"]["actual"] == {"amount": "1.234567", "currency": "USD", "micros": 1_234_567}
        assert [usage[name]["actual"] for name in ("time_minutes", "api_calls", "cpu_hours")] == [3.0, 3.0, 0.025]


def test_what_a_vm_used_since_it_was_metered_is_charged_at_its_end_and_the_rest_given_back(served: Served) -> None:
    project = served.project(daily_money_micros=MICROS)
    row = served.row(Machine, spawn(served, project).json()["uuid"])
    with served.hub.store.transaction() as session:
        machine = rows.get(session, Machine, row.uuid)
        machine.metered_at, machine.status = now() - timedelta(seconds=36), MachineStatus.terminated
        assert machine.metered_at is not None
        charged = served.hub.ledger.settle_machine(session, machine, machine.metered_at + timedelta(seconds=36))
        again = served.hub.ledger.settle_machine(session, machine, now())
    assert (charged, again) == ({Resource.time_hours: 10_000, Resource.money: row.price_micros // 100}, {})
    ended = served.row(Machine, row.uuid)
    assert (ended.status, ended.reservation_uuid, ended.metered_at) == ("terminated", None, None)
    with served.hub.store.reading() as session:
        room = served.hub.ledger.headroom(session, Holder(project))
    assert room[Resource.money] == MICROS - row.price_micros // 100


# What refuses


@pytest.mark.parametrize(
    ("project", "order", "says"),
    [
        ({"daily_money_micros": 100}, {}, "0.0001 USD left of 0.0001 USD on "),
        ({"daily_time_hours": 0.0}, {}, "has 0 h left of 0 h on "),
        ({}, {"max_money": 0}, "0 USD left of 0 USD in its life"),
        ({}, {"max_time_minutes": 1}, "h in its life"),
        ({"max_concurrent_machines": 0}, {}, "at most 0 at a time"),
    ],
)
def test_a_limit_that_has_no_room_refuses_and_records_nothing(
    served: Served, project: dict[str, Any], order: dict[str, Any], says: str
) -> None:
    uuid = served.project(**project)
    before = counts(served)
    error = error_of(spawn(served, uuid, resource_constraints=order), 409, "RESOURCE_LIMIT_EXCEEDED")
    assert says in error.message
    assert counts(served) == before
    assert served.get("/machines", project_uuid=str(uuid)).json()["total_count"] == 0


def test_api_calls_of_0_allow_a_machine_that_makes_none(served: Served) -> None:
    machine = spawn(served, served.project(), resource_constraints={"max_api_calls": 0})
    assert machine.status_code == 201
    assert machine.json()["resource_usage"]["api_calls"]["estimated"] == 0.0


@pytest.mark.parametrize(
    "order", [{"max_money": -1}, {"max_time_minutes": -0.5}, {"max_api_calls": -1}, {"max_money": "NaN"}]
)
def test_a_constraint_that_is_no_amount_is_malformed(served: Served, order: dict[str, Any]) -> None:
    error_of(spawn(served, served.project(), resource_constraints=order), 400, "INVALID_REQUEST")


def test_nan_is_malformed(served: Served) -> None:
    body = f'{{"project_uuid": "{served.project()}", "resource_constraints": {{"max_time_minutes": NaN}}}}'
    answer = served.http.post("/machines", content=body, headers={"Content-Type": "application/json"})
    error_of(answer, 400, "INVALID_REQUEST")


def test_another_currency_is_malformed(served: Served) -> None:
    order = {"max_money": {"amount": 1, "currency": "EUR"}}
    error = error_of(spawn(served, served.project(), resource_constraints=order), 400, "INVALID_REQUEST")
    assert "USD" in error.message


def test_more_machines_at_a_time_than_a_project_may_have(served: Served) -> None:
    project = served.project(max_concurrent_machines=2)
    for status in (MachineStatus.terminated, MachineStatus.failed):
        served.machine(project, status=status)
    assert [spawn(served, project).status_code for _ in range(2)] == [201, 201]
    error = error_of(spawn(served, project), 409, "RESOURCE_LIMIT_EXCEEDED")
    assert error.details == {"scope": "project", "resource": "machines", "limit": 2, "used": 2}


def test_of_many_spawns_at_once_only_as_many_as_may_be_are_accepted(served: Served) -> None:
    project = served.project(max_concurrent_machines=3, daily_money_micros=10 * MICROS)
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: spawn(served, project).status_code, range(12)))
    assert sorted(answers) == [201] * 3 + [409] * 9
    assert reservations(served, project) == 3


def test_of_many_spawns_at_once_only_as_many_as_can_be_paid_are_accepted(served: Served) -> None:
    price = served.row(Machine, spawn(served, served.project()).json()["uuid"]).price_micros
    one = running(price, served.hub.tail_seconds)[Resource.money]
    project = served.project(daily_money_micros=5 * one)
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: spawn(served, project).status_code, range(12)))
    assert sorted(answers) == [201] * 5 + [409] * 7


def test_the_same_request_many_times_at_once_is_one_machine_though_the_limit_is_one(served: Served) -> None:
    key, body = uuid4().hex, {"project_uuid": str(served.project(max_concurrent_machines=1))}
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: served.post("/machines", body, key=key), range(12)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["uuid"] for answer in answers}) == 1


def test_no_greediness_is_no_share_of_the_pool(served: Served) -> None:
    with pool(served, {Resource.money: 100 * MICROS}):
        error = error_of(spawn(served, served.project(greediness=0.0)), 409, "RESOURCE_LIMIT_EXCEEDED")
        assert "greediness of 0" in error.message
        own = served.project(greediness=0.0, daily_money_micros=MICROS)
        assert spawn(served, own).status_code == 201
    assert spawn(served, served.project(greediness=0.0)).status_code == 201  # without a pool nobody needs a share


def test_the_pool_holds_for_all_projects_together(served: Served) -> None:
    with served.hub.store.reading() as session:
        used = served.hub.ledger.look(session, Holder(uuid4()).keys(f"{now():%Y-%m-%d}", Resource.money)[0])
    taken = used.used_micros + used.reserved_micros
    with pool(served, {Resource.money: taken + 6_000}):
        projects = [served.project(greediness=1.0, daily_money_micros=MICROS) for _ in range(3)]
        answers = [spawn(served, project) for project in projects]
        refused = [answer for answer in answers if answer.status_code != 201]
        assert refused
        assert error_of(refused[0], 409, "RESOURCE_LIMIT_EXCEEDED").details["scope"] in ("system", "project")


# The dry run


def counts(served: Served) -> dict[str, list[Any]]:
    """Every row of every table."""
    with served.hub.store.connection() as connection:
        found = {}
        for name in sorted(inspect(connection).get_table_names()):
            marks = connection.execute(text(f'SELECT * FROM "{name}"')).all()
            found[name] = sorted(map(repr, marks))
    return found


def plan(served: Served, project: UUID, **fields: Any) -> schemas.SpawnPlan:
    answer = served.post("/machines", {"project_uuid": str(project), **fields}, dry_run="true", key=uuid4().hex)
    assert answer.status_code == 200, answer.text
    return schemas.SpawnPlan.model_validate(answer.json())


def test_a_dry_run_changes_nothing_and_uses_up_no_key(served: Served) -> None:
    project, key = served.project(daily_money_micros=MICROS), uuid4().hex
    served.machine(project)
    body = {"project_uuid": str(project), "prompt": "write a test"}
    served.hub.trail.flush()
    before = counts(served)
    for _ in range(2):
        answer = served.post("/machines", body, dry_run="true", key=key)
        assert answer.status_code == 200
        assert answer.json()["dry_run"] is True
    served.hub.trail.flush()
    assert counts(served) == before
    assert served.post("/machines", body, key=key).status_code == 201


def test_a_plan_tells_what_a_spawn_then_does(served: Served) -> None:
    project = served.project(daily_money_micros=MICROS, daily_time_hours=2.0)
    found = plan(served, project, prompt="implement and test the parser in src/parse.py", name=f"n-{uuid4().hex[:6]}")
    made = spawn(served, project, prompt="implement and test the parser in src/parse.py").json()
    row = served.row(Machine, made["uuid"])
    assert (found.placement.node, found.placement.storage, found.placement.vmid) == (row.node, "local-lvm", row.vmid)
    assert found.price_per_hour.micros == row.price_micros
    assert found.reserved.money.micros == held(served, made["uuid"])[Resource.money]
    usage = made["resource_usage"]
    assert found.estimate.money.value.model_dump() == usage["money"]["estimated"]
    assert found.estimate.time_minutes.value == usage["time_minutes"]["estimated"]
    assert found.estimate.money.low.micros < found.estimate.money.value.micros < found.estimate.money.high.micros
    assert (found.estimate.basis, found.estimate.n) == ("default", 0)
    assert 0 < found.estimate.complexity < 1
    assert found.headroom.money.remaining is not None
    assert (found.headroom.money.remaining.micros, found.headroom.money.limited_by) == (MICROS, "project")
    assert (found.headroom.time_hours.remaining, found.headroom.api_calls.limited_by) == (2.0, None)
    # the node of these tests does not answer
    assert [refusal.code for refusal in found.refusals] == ["HYPERVISOR_UNAVAILABLE"]
    assert (found.is_possible, found.clone) == (False, None)


def test_a_plan_names_every_refusal(served: Served) -> None:
    taken = f"n-{uuid4().hex[:6]}"
    project = served.project(
        max_concurrent_machines=0, daily_money_micros=1, daily_time_hours=0.0, storage_gb=0.0, status="archived"
    )
    with served.hub.store.transaction() as session:
        for checkpoint in session.exec(select(Checkpoint).where(Checkpoint.project_uuid == project)):
            checkpoint.unique_bytes = 5 * 10**9
            checkpoint.status = "creating"
            session.add(checkpoint)
        session.add(Checkpoint(project_uuid=project, type="manual", status="ready", unique_bytes=5 * 10**9))
    served.machine(name=taken)
    found = plan(served, project, name=taken, resource_constraints={"max_money": 0, "max_time_minutes": 0.1})
    messages = "\n".join(refusal.message for refusal in found.refusals)
    for words in (
        "is archived",
        "only a ready one",
        f"already a machine '{taken}'",
        "at most 0 at a time",
        f"Machine '{taken}' has 0 USD left",
        f"Machine '{taken}' has 0.001666 h left",
        "0 h left of 0 h on",
        "USD left of 0.000001 USD on",
        "'storage_gb'",
    ):
        assert words in messages, messages
    assert not found.is_possible
    codes = {refusal.code for refusal in found.refusals}
    assert codes >= {"CONFLICT", "RESOURCE_LIMIT_EXCEEDED"}


def test_what_is_malformed_is_refused_by_a_dry_run_too(served: Served) -> None:
    unknown = served.post("/machines", {"project_uuid": str(uuid4())}, dry_run="true")
    error_of(unknown, 404, "NOT_FOUND")
    body = {"project_uuid": str(served.project()), "type": "nonsense"}
    error_of(served.post("/machines", body, dry_run="true"), 400, "INVALID_REQUEST")


def test_a_plan_from_a_checkpoint_is_one_of_its_project(served: Served) -> None:
    project = served.project()
    checkpoint = served.get(f"/projects/{project}").json()["current_checkpoint_uuid"]
    answer = served.post(f"/checkpoints/{checkpoint}/spawn", {}, dry_run="true")
    assert answer.status_code == 200
    found = schemas.SpawnPlan.model_validate(answer.json())
    assert (found.project_uuid, str(found.checkpoint_uuid)) == (project, checkpoint)


def test_both_answers_are_documented(served: Served) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    for path in ("/api/v1/machines", "/api/v1/checkpoints/{checkpoint_uuid}/spawn"):
        answers = paths[path]["post"]["responses"]
        names = {status: answers[status]["content"]["application/json"]["schema"]["$ref"] for status in ("200", "201")}
        assert {status: name.rpartition("/")[2] for status, name in names.items()} == {
            "200": "SpawnPlan",
            "201": "Machine",
        }


def test_an_estimate_learns_from_machines_that_ended(served: Served) -> None:
    project = served.project()
    served.hub.bases.clear()
    for money in (2_000_000, 4_000_000):
        machine = served.machine(project, status="terminated", price_micros=1_000_000, running_at=now(), ended_at=now())
        with served.hub.store.transaction() as session:
            reservation, hour = uuid4(), MICROS
            served.hub.ledger.reserve(session, reservation, Holder(project, machine), {})
            used = {Resource.money: money + 1_000_000, Resource.time_hours: hour}
            served.hub.ledger.reserve(session, reservation, Holder(project, machine), used)
            served.hub.ledger.settle(session, reservation, used)
    try:
        found = plan(served, project).estimate
        price = plan(served, project).price_per_hour.micros
    finally:
        served.hub.bases.clear()
    assert (found.basis, found.n) == ("history", 2)
    assert found.money.value.micros == round(3_000_000 * 0.5 + price * 5 / 60)
    assert found.money.high.micros == pytest.approx(found.money.value.micros * (1 + 2**-0.5), abs=2)
