"""The authorisation matrix: every v1 route, by every kind of key. A route that is not in it fails the test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlalchemy import text

from autovibe.api.v1 import ROUTES
from autovibe.domain import ApiKey, Machine, Operation, Project
from autovibe.domain.columns import now
from autovibe.hub.rules import SCOPED_NOUNS
from autovibe.store import rows
from autovibe.types import MachineStatus, OperationKind, OperationStatus, Role
from tests.api.conftest import KEY, Served, error_of

LETTERS = {
    "A": "admin",
    "O": "operator",
    "V": "viewer",
    "P": "project_operator",
    "W": "project_viewer",
    "p": "other_project_operator",
    "M": "machine",
    "m": "other_machine",
}

EXPECTED = {
    "POST /projects": "AO",
    "GET /projects": "AOVPWp",
    "GET /projects/{project_uuid}": "AOVPW",
    "PUT /projects/{project_uuid}": "AO",
    "GET /projects/{project_uuid}/checkpoints": "AOVPW",
    "POST /machines": "AOP",
    "GET /machines": "AOVPWp",
    "GET /machines/{machine_uuid}": "AOVPWM",
    "POST /machines/{machine_uuid}/terminate": "AOP",
    "POST /machines/{machine_uuid}/checkpoint": "AOPM",
    "POST /machines/{machine_uuid}/resume": "AOP",
    "POST /machines/{machine_uuid}/usage": "AOPM",
    "POST /machines/{machine_uuid}/exec": "AOP",
    "GET /machines/{machine_uuid}/ssh": "AOVPW",
    "GET /machines/{machine_uuid}/logs": "AOVPW",
    "GET /checkpoints/{checkpoint_uuid}": "AOVPW",
    "POST /checkpoints/{checkpoint_uuid}/spawn": "AOP",
    "GET /checkpoints/{base_uuid}/diff/{target_uuid}": "AOVPW",
    "GET /resources/overview": "AOV",
    "GET /resources/projects/{project_uuid}": "AOVPW",
    "PUT /resources/projects/{project_uuid}/budget": "AO",
    "GET /resources/projects/{project_uuid}/ledger": "AOVPW",
    "GET /analytics/efficiency": "AOVPWp",
    "GET /hub/status": "AOV",
    "POST /hub/checkpoint": "A",
    "GET /hub/checkpoints": "AOV",
    "GET /hub/checkpoints/{hub_checkpoint_uuid}": "AOV",
    "POST /hub/spawn-experimental": "A",
    "GET /hub/experiments": "AOV",
    "GET /hub/experiments/{experiment_uuid}": "AOV",
    "POST /hub/experiments/{experiment_uuid}/stop": "A",
    "GET /operations/{operation_uuid}": "AOVPW",
    "GET /events": "AOVPWp",
    "POST /keys": "A",
    "GET /keys": "A",
    "GET /keys/{key_uuid}": "A",
    "POST /keys/{key_uuid}/revoke": "A",
    "GET /audit": "A",
}
"""Who is let in, by the letters above. P, W, M belong to the object's project or are the machine, p and m to others."""

GUARDED = {route.verb.label: route for route in ROUTES if route.verb is not None}
NO_KEY = ("none", "wrong", "expired", "revoked")
TABLES = (
    *("project", "machine", "checkpoint", "operation", "event", "idempotency_key", "api_key", "allotment"),
    *("reservation", "ledger_entry", "account", "hub_checkpoint", "experiment"),
)


@dataclass
class Cast:
    """One project with a machine that has ended, another project, and a key of every kind."""

    served: Served
    project: UUID
    other: UUID
    machine: UUID
    other_machine: UUID
    operation: UUID
    clients: dict[str, httpx2.Client] = field(default_factory=dict)

    def path(self, route: str) -> str:
        """The route with this project's objects in it."""
        checkpoint = self.served.row(Project, self.project).current_checkpoint_uuid
        known = {
            "project_uuid": self.project,
            "machine_uuid": self.machine,
            "operation_uuid": self.operation,
            **dict.fromkeys(("checkpoint_uuid", "base_uuid", "target_uuid"), checkpoint),
        }
        words = route.split(" ")[1].split("/")
        return "/".join(str(known.get(word[1:-1], uuid4())) if word.startswith("{") else word for word in words)

    def body(self, route: str) -> Any:
        bodies = {"POST /machines": {"project_uuid": str(self.project)}, "POST /keys": {"name": "another"}}
        return None if route.startswith("GET ") else bodies.get(route, {})

    def ask(self, role: str, route: str) -> httpx2.Response:
        method = route.split(" ")[0]
        return self.clients[role].request(method, self.path(route), json=self.body(route))

    def state(self) -> dict[str, Any]:
        """What a refused request must not change: how many rows each table has, and the machine."""
        with self.served.hub.store.reading() as session:
            counts = {t: session.execute(text(f"SELECT count(*) FROM {t}")).scalar_one() for t in TABLES}
            machine = rows.get(session, Machine, self.machine).model_dump()
            return {**counts, "machine": machine, "project": rows.get(session, Project, self.project).model_dump()}


@pytest.fixture(scope="module")
def cast(served: Served) -> Iterator[Cast]:
    project, other = served.project(), served.project()
    ended: dict[str, Any] = {"status": MachineStatus.terminated, "ended_at": now()}
    machine, other_machine = served.machine(project, **ended), served.machine(other, **ended)
    operation = Operation(
        kind=OperationKind.terminate, status=OperationStatus.succeeded, object_uuid=machine, machine_uuid=machine
    )
    with served.hub.store.transaction() as session:
        session.add(operation)
    made = Cast(served, project, other, machine, other_machine, operation.uuid)
    texts = {"admin": KEY, "none": None, "wrong": KEY[:-1] + "X"}
    with served.hub.store.transaction() as session:
        keys: dict[str, dict[str, Any]] = {
            "operator": {"role": Role.operator},
            "viewer": {"role": Role.viewer},
            "project_operator": {"role": Role.operator, "project_uuid": project},
            "project_viewer": {"role": Role.viewer, "project_uuid": project},
            "other_project_operator": {"role": Role.operator, "project_uuid": other},
            "expired": {"role": Role.admin, "expires_at": now() - timedelta(seconds=1)},
            "revoked": {"role": Role.admin},
        }
        for name, more in keys.items():
            row, texts[name] = served.hub.keyring.issue(session, name=name, created_by="test", **more)
            if name == "revoked":
                row.revoked_at = now()
        for name, uuid in (("machine", machine), ("other_machine", other_machine)):
            texts[name] = served.hub.keyring.issue_machine_key(session, rows.get(session, Machine, uuid))
    for name, key in texts.items():
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        made.clients[name] = httpx2.Client(
            base_url=f"{served.url}/api/v1", headers=headers, timeout=60, trust_env=False
        )
    yield made
    for client in made.clients.values():
        client.close()


def test_every_route_has_a_rule_and_a_row_here() -> None:
    without = [f"{sorted(route.methods or ())} {route.path}" for route in ROUTES if not route.has_rule]
    assert without == [], "a route says with @needs(…) whom it lets in"
    assert sorted(GUARDED) == sorted(EXPECTED), "write into EXPECTED who may call the new route"


def test_every_route_names_the_objects_of_its_path_and_has_a_noun() -> None:
    for label, route in GUARDED.items():
        assert route.verb is not None
        assert route.verb.noun in SCOPED_NOUNS, label
        for parameter in route.param_convertors:
            is_closed_to_projects = not route.verb.rule.objects and not route.verb.rule.narrows
            assert parameter in route.verb.rule.objects or is_closed_to_projects, label


@pytest.mark.parametrize("route", sorted(EXPECTED))
def test_who_is_refused(cast: Cast, route: str) -> None:
    """First for all routes, while nothing goes on: what is refused changes nothing."""
    if route not in GUARDED:
        pytest.fail(f"There is no route '{route}' any more; take it out of EXPECTED.")
    before = cast.state()
    for role in NO_KEY:
        answer = cast.ask(role, route)
        error = error_of(answer, 401, "UNAUTHORIZED")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert role not in ("expired", "revoked") or error.details["reason"] == role
    for letter, role in LETTERS.items():
        if letter not in EXPECTED[route]:
            error_of(cast.ask(role, route), 403, "FORBIDDEN")
    assert cast.state() == before


@pytest.mark.parametrize("route", sorted(EXPECTED))
def test_who_is_let_in(cast: Cast, route: str) -> None:
    """Let in: the verb itself answers, be it that the object's state forbids it."""
    for letter in EXPECTED.get(route, ""):
        answer = cast.ask(LETTERS[letter], route)
        assert answer.status_code not in (401, 403, 429), f"{LETTERS[letter]}: {answer.text}"


def test_lists_show_what_is_the_projects(cast: Cast) -> None:
    mine, all_of_it = cast.clients["project_viewer"], cast.clients["viewer"]
    assert [item["uuid"] for item in mine.get("/projects").json()["projects"]] == [str(cast.project)]
    assert {str(cast.project), str(cast.other)} <= {
        item["uuid"] for item in all_of_it.get("/projects").json()["projects"]
    }
    shown = mine.get("/machines", params={"limit": 200}).json()
    assert {item["project_uuid"] for item in shown["machines"]} == {str(cast.project)}
    error_of(mine.get("/machines", params={"project_uuid": str(cast.other)}), 403, "FORBIDDEN")
    events = mine.get("/events", params={"limit": 200})
    assert {item["project_uuid"] for item in events.json().get("events", [])} <= {str(cast.project)}


def test_an_unknown_object_is_404_for_a_project_key_too(cast: Cast) -> None:
    nowhere = uuid4()
    for path in ("/projects/{}", "/machines/{}", "/checkpoints/{}", "/operations/{}"):
        error_of(cast.clients["project_viewer"].get(path.format(nowhere)), 404, "NOT_FOUND")
        error_of(cast.clients["project_viewer"].get(path.format("nonsense")), 400, "INVALID_REQUEST")


def test_a_diff_needs_both_checkpoints(cast: Cast) -> None:
    mine, other = (cast.served.row(Project, uuid).current_checkpoint_uuid for uuid in (cast.project, cast.other))
    for pair in ((mine, other), (other, mine)):
        answer = cast.clients["project_operator"].get("/checkpoints/{}/diff/{}".format(*pair))
        error_of(answer, 403, "FORBIDDEN")


def test_a_project_key_cannot_reach_across_by_a_body(cast: Cast) -> None:
    other = str(cast.served.row(Project, cast.other).current_checkpoint_uuid)
    order = {"project_uuid": str(cast.project), "checkpoint_uuid": other}
    answer = cast.clients["project_operator"].post("/machines", json=order)
    error_of(answer, 400, "INVALID_REQUEST")
    answer = cast.clients["project_operator"].post("/machines", json={"project_uuid": str(cast.other)})
    error_of(answer, 403, "FORBIDDEN")


@pytest.mark.parametrize(
    ("scopes", "let_in", "refused"),
    [
        ("machines:read", ["GET /machines", "GET /operations/{operation_uuid}"], ["POST /machines", "GET /projects"]),
        ("machines:write", ["GET /machines", "POST /machines"], ["GET /checkpoints/{checkpoint_uuid}"]),
        ("*:read", ["GET /machines", "GET /hub/status"], ["POST /machines", "GET /keys"]),
        ("projects:write *:read", ["POST /projects", "GET /machines"], ["POST /machines"]),
    ],
)
def test_scopes_narrow_a_key(cast: Cast, scopes: str, let_in: list[str], refused: list[str]) -> None:
    with cast.served.hub.store.transaction() as session:
        _, key = cast.served.hub.keyring.issue(
            session, name="scoped", role=Role.operator, created_by="test", scopes=scopes
        )
    cast.clients["scoped"] = httpx2.Client(
        base_url=f"{cast.served.url}/api/v1", headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False
    )
    for route in let_in:
        assert cast.ask("scoped", route).status_code not in (401, 403)
    for route in refused:
        error_of(cast.ask("scoped", route), 403, "FORBIDDEN")


def test_a_key_in_the_query_opens_nothing(cast: Cast) -> None:
    error_of(cast.clients["none"].get("/projects", params={"key": KEY}), 401, "UNAUTHORIZED")


def test_a_machine_key_dies_with_its_machine(cast: Cast) -> None:
    from autovibe.store.keys import revoke_machine_keys

    store, keyring = cast.served.hub.store, cast.served.hub.keyring
    machine = cast.served.machine(cast.project)
    with store.transaction() as session:
        first = keyring.issue_machine_key(session, rows.get(session, Machine, machine))
    with store.transaction() as session:
        second = keyring.issue_machine_key(session, rows.get(session, Machine, machine))

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return cast.clients["none"].get(f"/machines/{machine}", headers=headers).status_code

    assert (status(first), status(second)) == (401, 200)
    with store.transaction() as session:
        revoke_machine_keys(session, machine)
        identifier = second.split("_")[1]
        assert session.get(ApiKey, identifier).revoked_at is not None  # type: ignore[union-attr]
    cast.served.hub.keys.forget(identifier)
    assert status(second) == 401
