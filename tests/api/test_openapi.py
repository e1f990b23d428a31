"""openapi.json: it is what clients know (golden), it is complete, and the Hub keeps to it (schemathesis).

Data that fit the document and data that do not are sent to every route, by a key that may do everything, to a Hub whose
node answers. Some values are replaced on the way: uuids by those of objects that are there, waits by short ones.
Nothing that is drawn at random is run in a guest: spawns are of a project that may have no machine.
"""

from __future__ import annotations

import difflib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from autovibe import app
from autovibe.api import document
from autovibe.types import MachineStatus
from tests.api.conftest import KEY, Served, error_of, serve
from tests.conftest import BACKENDS
from tests.golden import OPENAPI, openapi
from tests.stub.node import StubNode

EXAMPLES = 25
LISTS = ("status", "object_uuid", "kind")
"""Parameters that may be sent several times."""

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
]


def _with_the_key_sent() -> dict[str, Any]:
    """The document, without what it says of keys: every request here carries a good one."""
    found: dict[str, Any] = json.loads(OPENAPI.read_text(encoding="utf-8"))
    found.pop("security")
    for operations in found["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)
    return found


pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")  # of its own

schema = schemathesis.openapi.from_dict(_with_the_key_sent())


@dataclass
class World:
    hub: Served
    known: dict[str, str]
    locked: str  # a project that may have no machine


@pytest.fixture(scope="module", params=BACKENDS)
def world(request: pytest.FixtureRequest, stub_node: StubNode) -> Iterator[World]:
    path = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    more: dict[str, Any] = {"api_key": KEY, "rate_limit_per_minute": 0, "rate_limit_heavy_per_minute": 0}
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        more["database_url"] = server.create(is_migrated=True, backups=path / "backups")
    parts = app.build(stub_node.settings(path, **more))
    parts.start()
    url, stop = serve(parts)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=f"{url}/api/v1", headers=headers, timeout=30, trust_env=False) as http:
        hub = Served(parts, url, http)
        project = hub.project(name="changing")
        first = hub.get(f"/projects/{project}").json()["initial_checkpoint_uuid"]
        machine = hub.machine(project, status=MachineStatus.terminated, vmid=None)
        known = {"project_uuid": str(project), "machine_uuid": str(machine), "checkpoint_uuid": first}
        known |= {"base_uuid": first, "target_uuid": first}
        yield World(hub, known, str(hub.project(name="locked", max_concurrent_machines=0)))
    stop()
    parts.close()
    if "database_url" in more:
        server.drop(more["database_url"])
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("world", ["sqlite"], indirect=True)
@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # explicit: the limits of every parameter and field
    suppress_health_check=list(HealthCheck),
)
def test_the_hub_keeps_to_its_document(case: schemathesis.Case, world: World) -> None:
    _ask(case, world)


@pytest.mark.parametrize("world", ["postgres"], indirect=True)
@schema.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_hub_keeps_to_its_document_on_postgres(case: schemathesis.Case, world: World) -> None:
    _ask(case, world)


def _ask(case: schemathesis.Case, world: World) -> None:
    if any(isinstance(value, list) and name not in LISTS for name, value in (case.query or {}).items()):
        return  # a parameter sent several times: the last counts, and that may be a good one
    _settle(case, world)
    answer = case.call(base_url=world.hub.url, headers={"Authorization": f"Bearer {KEY}"})
    case.validate_response(answer, checks=CHECKS)
    if answer.status_code >= 400:
        assert [answer.json()["error"]["request_id"]] == answer.headers["x-request-id"]


def _settle(case: schemathesis.Case, world: World) -> None:
    """Name what is there, half of the time, and keep nobody waiting."""
    for name, value in list((case.path_parameters or {}).items()):
        if name in world.known and _is_uuid(value) and UUID(str(value)).int % 2:
            case.path_parameters[name] = world.known[name]
    for name, most in (("wait", 0.1), ("follow", None), ("wait_for", None)):
        if case.query and name in case.query:
            if most is None or _is_number(case.query[name]):
                case.query[name] = most
            if most is None:
                del case.query[name]
    body = case.body
    if isinstance(body, dict):
        if "project_uuid" in body and _is_uuid(body["project_uuid"]):
            body["project_uuid"] = world.locked
        base = body.get("checkpoint_uuid")
        if case.path.endswith("/spawn-experimental") and (base is None or _is_uuid(base)):
            body["checkpoint_uuid"] = str(uuid4())  # no Hub is to be started here


def _is_uuid(value: Any) -> bool:
    try:
        return str(UUID(value)) == value
    except (ValueError, TypeError, AttributeError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# The document


def test_the_document_is_what_clients_know() -> None:
    """`git diff` shows what they will notice; when that is meant: python -m tests.golden"""
    found, known = openapi(), OPENAPI.read_text(encoding="utf-8")
    changes = difflib.unified_diff(known.splitlines(), found.splitlines(), "golden", "the routes", lineterm="", n=2)
    assert found == known, "\n".join(["Clients will notice:", *list(changes)[:60], "Renew: python -m tests.golden"])


def test_the_hub_serves_it(world: World) -> None:
    served = world.hub.get("/openapi.json").json()
    served["info"]["version"] = "0"
    assert served == json.loads(OPENAPI.read_text(encoding="utf-8"))


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in json.loads(openapi())["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_operation_is_named_and_explained() -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))
    for path, method, operation in operations():
        place = f"{method} {path}"
        assert operation["operationId"].split("_")[0] == operation["tags"][0], place
        assert operation["summary"], place
        assert operation["description"], place
        assert not operation["summary"].endswith("."), place
        for parameter in operation.get("parameters", []):
            assert parameter["in"] in ("path", "query", "header"), place


def test_keys_and_errors_are_declared() -> None:
    whole = json.loads(openapi())
    assert whole["security"] == [{"bearer": []}]
    assert whole["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert set(document.ERRORS) == {400, 401, 403, 404, 409, 429, 500}
    for path, method, operation in operations():
        is_open = path == "/api/v1/health"
        assert operation.get("security", whole["security"]) == ([] if is_open else whole["security"])
        assert "422" not in operation["responses"]
        errors = {int(status) for status in operation["responses"] if int(status) >= 400}
        assert errors >= ({500} if is_open else {401, 403, 429, 500}), (method, path)
        for status in errors:
            content = operation["responses"][str(status)]["content"]
            assert content == {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    for name in document.EXAMPLES:
        assert whole["components"]["schemas"][name]["examples"], name


# What no document describes


@pytest.mark.parametrize("query", [{"project_uuid": "no-uuid"}, {"kind": "Machine"}, {"since": "-1"}])
def test_a_malformed_question_for_a_stream_is_refused(world: World, query: dict[str, str]) -> None:
    answer = world.hub.http.get("/events", params=query, headers={"Accept": "text/event-stream"})
    error_of(answer, 400, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/nothing", 404, "NOT_FOUND"),
        ("GET", "/", 404, "NOT_FOUND"),
        ("GET", "/api/v1/projects/", 404, "NOT_FOUND"),
        ("DELETE", "/api/v1/projects", 404, "NOT_FOUND"),
        ("PATCH", "/api/v1/machines/no-uuid", 404, "NOT_FOUND"),
        ("GET", "/api/v1/machines/no-uuid", 400, "INVALID_REQUEST"),
        ("POST", "/api/v1/machines/no-uuid/terminate", 400, "INVALID_REQUEST"),
    ],
)
def test_what_there_is_not_answers_with_the_envelope(
    world: World, method: str, path: str, status: int, code: str
) -> None:
    error_of(world.hub.http.request(method, world.hub.url + path), status, code)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'{"name": "x"}', "text/plain"),
        (b"name=x", "application/x-www-form-urlencoded"),
        (b"\xff\xfe", "application/json"),
        (b'{"name": "\\ud800"}', "application/json"),
        (b'{"name": NaN}', "application/json"),
        (b'{"name": "x", "greediness": 1e999}', "application/json"),
        (b"[" * 100_000, "application/json"),
    ],
)
def test_a_malformed_body_answers_with_the_envelope(world: World, content: bytes, kind: str) -> None:
    answer = world.hub.http.post("/projects", content=content, headers={"Content-Type": kind})
    error_of(answer, 400, "INVALID_REQUEST")


def test_a_crash_answers_with_the_envelope(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("autovibe.hub.projects.show", crash)
    answer = world.hub.get(f"/projects/{world.known['project_uuid']}")
    error = error_of(answer, 500, "INTERNAL_ERROR")
    assert "secret" not in answer.text
    assert "log" in error.message
