"""The audit log: every change in the transaction that makes it, every refusal soon after, no secret anywhere."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlalchemy import text
from sqlmodel import select

from autovibe import Client
from autovibe.domain import AuditEntry, Machine
from autovibe.domain.actor import split_key
from autovibe.domain.columns import now
from autovibe.errors import Conflict, DatabaseUnavailable
from autovibe.hub import machines, upkeep
from autovibe.hub import trail as trails
from autovibe.hub.trail import Trail
from autovibe.store import Store, rows, trail
from autovibe.types import MachineStatus, Outcome, Role
from tests.api.conftest import KEY, Served, error_of

ROUTE = "POST /machines/{machine_uuid}/terminate"


def lines(served: Served, **wanted: Any) -> list[dict[str, Any]]:
    served.hub.trail.flush()
    answer = served.get("/audit", **{"limit": 200, **wanted})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["entries"])


def line_of(served: Served, answer: httpx2.Response) -> dict[str, Any]:
    [found] = [line for line in lines(served) if line["request_id"] == answer.headers["X-Request-Id"]]
    return found


def key_of(served: Served, **more: Any) -> tuple[str, httpx2.Client]:
    with served.hub.store.transaction() as session:
        row, key = served.hub.keyring.issue(session, name=f"k-{uuid4().hex[:6]}", created_by="test", **more)
    headers = {"Authorization": f"Bearer {key}"}
    return row.id, httpx2.Client(base_url=f"{served.url}/api/v1", headers=headers, timeout=30, trust_env=False)


def test_a_change_has_its_line_with_who_what_and_whence(served: Served) -> None:
    project = served.project()
    answer = served.post("/machines", {"project_uuid": str(project)})
    line = line_of(served, answer)
    assert {name: line[name] for name in ("actor", "verb", "outcome", "status", "count", "client")} == {
        "actor": "operator",
        "verb": "POST /machines",
        "outcome": "done",
        "status": 201,
        "count": 1,
        "client": "127.0.0.1",
    }
    assert KEY.startswith(f"av_{line['key_id']}_")
    assert (line["object_kind"], line["object_uuid"]) == ("machine", answer.json()["uuid"])
    assert line["project_uuid"] == str(project)


def test_the_line_is_written_by_the_transaction_of_the_change(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batched writer writes nothing here, and a change that is rolled back has no line."""
    monkeypatch.setattr(served.hub.trail, "put", lambda *_: None)
    project = served.project()
    answer = served.post("/machines", {"project_uuid": str(project), "name": "taken-name"})
    assert answer.status_code == 201
    assert line_of(served, answer)["outcome"] == "done"
    refused = served.post("/machines", {"project_uuid": str(project), "name": "taken-name"})
    error_of(refused, 409, "CONFLICT")
    assert not [line for line in lines(served) if line["request_id"] == refused.headers["X-Request-Id"]]


def test_the_object_of_the_path_goes_before_what_was_made(served: Served) -> None:
    machine = served.machine()
    answer = served.post(f"/machines/{machine}/checkpoint")
    assert answer.status_code == 201
    line = line_of(served, answer)
    assert (line["object_kind"], line["object_uuid"]) == ("machine", str(machine))
    assert line["project_uuid"] == str(served.row(Machine, machine).project_uuid)


def test_a_verb_that_failed_has_its_line(served: Served) -> None:
    machine = served.machine(status=MachineStatus.terminated, ended_at=now())
    answers = [
        served.post(f"/machines/{machine}/checkpoint"),
        served.post(f"/machines/{machine}/exec", {"argv": ["true"]}),
        served.post(f"/machines/{uuid4()}/terminate"),
        served.post("/machines", {"prompt": 7}),
    ]
    found = [line_of(served, answer) for answer in answers]
    assert [(line["outcome"], line["status"]) for line in found] == [
        ("failed", status) for status in (409, 409, 404, 400)
    ]


def test_a_crash_has_its_line(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(machines, "terminate", crash)
    line = line_of(served, served.post(f"/machines/{served.machine()}/terminate"))
    assert (line["outcome"], line["status"]) == ("failed", 500)


def test_a_request_that_fails_after_its_change_has_both_lines(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Conflict("Something else went wrong.")

    machine = served.machine(status=MachineStatus.terminated, ended_at=now())
    monkeypatch.setattr(machines, "show_terminated", refuse)
    answer = served.post(f"/machines/{machine}/terminate")
    error_of(answer, 409, "CONFLICT")
    found = [line for line in lines(served) if line["request_id"] == answer.headers["X-Request-Id"]]
    assert sorted((line["outcome"], line["status"]) for line in found) == [("done", 200), ("failed", 409)]


def test_refusals_are_in_it_readings_too_and_alike_ones_fold(served: Served) -> None:
    machine = served.machine()
    identifier, viewer = key_of(served, role=Role.viewer)
    served.hub.trail.flush()
    with viewer:
        for _ in range(3):
            error_of(viewer.post(f"/machines/{machine}/terminate"), 403, "FORBIDDEN")
        error_of(viewer.get("/audit"), 403, "FORBIDDEN")
        assert viewer.get(f"/machines/{machine}").status_code == 200
    bare = httpx2.get(f"{served.url}/api/v1/machines/{machine}", trust_env=False)
    found = lines(served, actor=identifier)
    assert {(line["verb"], line["outcome"], line["status"]) for line in found} == {
        (ROUTE, "refused", 403),
        ("GET /audit", "refused", 403),
    }
    assert sum(line["count"] for line in found if line["verb"] == ROUTE) == 3
    line = line_of(served, bare)
    assert (line["actor"], line["verb"], line["outcome"], line["status"]) == (
        "",
        "GET /machines/{machine_uuid}",
        "refused",
        401,
    )
    assert line["object_uuid"] == str(machine)


def test_an_unknown_route_without_a_key_is_in_it_without_its_path(served: Served) -> None:
    answer = httpx2.get(f"{served.url}/api/v1/secret-word", trust_env=False)
    assert line_of(served, answer)["verb"] == "GET (no route)"


def test_readings_are_not_in_it(served: Served) -> None:
    before = lines(served)
    served.get("/machines")
    served.get(f"/machines/{uuid4()}")
    assert lines(served) == before


def test_no_secret_is_in_it(served: Served) -> None:
    made = served.post("/keys", {"name": "audited"}).json()
    served.post("/machines", {"project_uuid": str(served.project()), "prompt": "a-secret-prompt"})
    httpx2.get(f"{served.url}/api/v1/projects?key={KEY}", headers={"Authorization": "Bearer guess-me"}, trust_env=False)
    served.hub.trail.flush()
    with served.hub.store.reading() as session:
        dump = str(session.execute(text("SELECT * FROM audit_entry")).all())
    for secret in (split_key(made["key"])[1], split_key(KEY)[1], "a-secret-prompt", "guess-me"):
        assert secret not in dump


def test_filters_pages_and_the_sdk(served: Served) -> None:
    project, begin = served.project(), now()
    served.post("/machines", {"project_uuid": str(project)})
    machine = served.machine(project)
    served.post(f"/machines/{machine}/terminate")
    with Client(served.url, KEY) as client:
        both = client.audit.list(project=project, since=begin)
        assert [entry.verb for entry in both.entries] == [ROUTE, "POST /machines"]
        page = client.audit.list(project=project, limit=1)
        assert (page.total_count, page.has_more, page.next_offset) == (2, True, 1)
        assert client.audit.list(project=project, limit=1, offset=1).entries[0].verb == "POST /machines"
        assert client.audit.list(object=machine).total_count == 1
        assert client.audit.list(project=project, verb="POST /machines/{").total_count == 1
        assert client.audit.list(project=project, actor="operator").total_count == 2
        assert client.audit.list(project=project, actor="nobody").total_count == 0
        assert client.audit.list(project=project, outcome="refused").total_count == 0
        assert client.audit.list(project=project, until=begin).total_count == 0
        assert client.audit.list(verb="%").total_count == 0


@pytest.mark.parametrize(
    "query", ["outcome=x", "object_uuid=x", "since=yesterday", "since=2026-01-01T00:00:00", "actor=%00"]
)
def test_a_malformed_filter_is_400(served: Served, query: str) -> None:
    error_of(served.http.get(f"/audit?{query}"), 400, "INVALID_REQUEST")


def test_old_lines_and_keys_of_ended_machines_are_pruned(served: Served) -> None:
    old = now() - timedelta(days=served.hub.audit_days, minutes=1)
    machine = served.machine()
    with served.hub.store.transaction() as session:
        session.add_all(
            AuditEntry(verb=f"POST /{moment:%Y}", outcome="done", status=200, created_at=moment, client="pruned?")
            for moment in (old, now())
        )
        served.hub.keyring.issue_machine_key(session, rows.get(session, Machine, machine))
        session.flush()
        session.execute(text("UPDATE api_key SET revoked_at = :old WHERE machine_uuid IS NOT NULL"), {"old": old})
    upkeep.prune(served.hub)
    with served.hub.store.reading() as session:
        kept = session.exec(select(AuditEntry).where(AuditEntry.client == "pruned?")).all()
        keys = session.execute(text("SELECT count(*) FROM api_key WHERE machine_uuid IS NOT NULL")).scalar_one()
    assert len(kept) == 1
    assert keys == 0


# The parts, without a hub


def line(**more: Any) -> trail.Line:
    given = {"actor": "ann", "key_id": "k", "verb": "POST /x", "status": 201, "request_id": "r", "client": "c", **more}
    return trail.Line(**given)


def entries(store: Store) -> list[AuditEntry]:
    with store.reading() as session:
        return list(session.exec(select(AuditEntry).order_by(AuditEntry.id)))  # type: ignore[arg-type]


def _give_up(store: Store) -> None:
    with store.transaction():
        trail.note("machine", UUID(int=1))
        raise Conflict


def test_a_transaction_that_is_rolled_back_takes_its_line_along(store: Store) -> None:
    token = trail.current.set(line())
    try:
        with pytest.raises(Conflict):
            _give_up(store)
        assert entries(store) == []
        with store.transaction():
            trail.note("machine", UUID(int=2), UUID(int=3))
        with store.transaction():
            trail.note("machine", UUID(int=4))
    finally:
        trail.current.reset(token)
    [found] = entries(store)
    assert (found.object_uuid, found.project_uuid, found.outcome) == (UUID(int=2), UUID(int=3), "done")
    with store.transaction():
        pass
    assert len(entries(store)) == 1


def test_the_writer_folds_bounds_and_outlives_a_database_that_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trails, "_WAITING", 5)
    written = Trail(store)
    for number in range(8):
        written.put(line(request_id=str(number), actor="ann" if number else "bob"), Outcome.refused, 403)
    transaction = store.transaction

    def away() -> Any:
        raise DatabaseUnavailable

    monkeypatch.setattr(store, "transaction", away)
    with pytest.raises(DatabaseUnavailable):
        written.flush()
    monkeypatch.setattr(store, "transaction", transaction)
    written.flush()
    assert [(found.actor, found.count, found.request_id) for found in entries(store)] == [
        ("bob", 1, "0"),
        ("ann", 4, "1"),
    ]


def test_a_loop_without_a_key_is_one_line_whatever_it_names(store: Store) -> None:
    written = Trail(store)
    for number in range(4):
        named = {"object_kind": "machine", "object_uuid": UUID(int=number // 3)}
        for status in (401, 403, 429):
            written.put(line(**named), Outcome.refused, status)
    written.flush()
    found = [(entry.status, entry.object_uuid, entry.count) for entry in entries(store)]
    assert found == [(401, None, 4), (403, UUID(int=0), 3), (429, None, 4), (403, UUID(int=1), 1)]


def test_the_writer_writes_soon_and_what_waits_at_its_end(store: Store) -> None:
    written, is_there = Trail(store), threading.Event()
    store.after_commit.append(is_there.set)
    written.start()
    written.put(line(actor="first"), Outcome.failed, 409)
    assert is_there.wait(20)
    written.put(line(actor="last"), Outcome.failed, 409)
    written.close()
    assert [found.actor for found in entries(store)] == ["first", "last"]
