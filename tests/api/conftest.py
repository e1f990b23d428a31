"""A hub behind real HTTP, on both databases. Its Proxmox does not answer; what needs a node is in test_on_stub."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from autovibe import app, schemas
from autovibe.domain import Checkpoint, Machine, Operation, Project
from autovibe.domain.columns import now
from autovibe.hub import Hub
from autovibe.settings import Settings, load, write_secret
from autovibe.store import rows
from autovibe.store.trees import EMPTY_ROOT
from autovibe.types import ArtefactKind, CheckpointStatus, CheckpointType, MachineStatus
from tests.conftest import BACKENDS

KEY = "av_0badcafe_" + "k" * 43
TOKEN = "root@pam!autovibe=00000000-1111-2222-3333-444444444444"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings_of(home: Path, **more: Any) -> Settings:
    """Settings of a home whose node has run once and does not answer now."""
    write_secret(home / "node" / "token", TOKEN)
    (home / "node" / "fingerprint").write_text(":".join(["AB"] * 32) + "\n")
    given = {"hub_port": free_port(), "node_port": free_port(), "api_key": KEY, "min_free_gb": 0.0, "node_accel": "tcg"}
    limits = {"rate_limit_per_minute": 0, "rate_limit_heavy_per_minute": 0}  # tests hammer
    return load(home=home, **given | limits | more)


@dataclass
class Served:
    """A hub that answers; `http` carries the key."""

    parts: app.Parts
    url: str
    http: httpx2.Client

    @property
    def hub(self) -> Hub:
        return self.parts.hub

    def get(self, path: str, /, **params: Any) -> httpx2.Response:
        return self.http.get(path, params=params)

    def post(self, path: str, body: Any = None, /, *, key: str | None = None, **params: Any) -> httpx2.Response:
        headers = {"Idempotency-Key": key} if key else {}
        return self.http.post(path, json={} if body is None else body, headers=headers, params=params)

    def project(self, **fields: Any) -> UUID:
        """A project as the node would have let it be made, with its genesis."""
        with self.hub.store.transaction() as session:
            project = Project(**{"name": f"p-{uuid4().hex[:12]}", **fields})
            session.add(project)
            session.flush()
            genesis = Checkpoint(
                project_uuid=project.uuid,
                type=CheckpointType.genesis,
                status=CheckpointStatus.ready,
                node="autovibe",
                vmid=100,
                artefact_kind=ArtefactKind.template,
                storage="local-lvm",
                root_digest=EMPTY_ROOT,
            )
            session.add(genesis)
            project.current_checkpoint_uuid = project.initial_checkpoint_uuid = genesis.uuid
        return project.uuid

    def machine(self, project: UUID | None = None, **fields: Any) -> UUID:
        """A machine that is in some state, without an operation."""
        owner = project or self.project()
        with self.hub.store.transaction() as session:
            machine = Machine(
                **{
                    "name": f"m-{uuid4().hex[:12]}",
                    "type": "shell",
                    "status": MachineStatus.active,
                    "project_uuid": owner,
                    "vmid": 9999,
                    **fields,
                }
            )
            session.add(machine)
        return machine.uuid

    def change(self, machine: UUID, **fields: Any) -> None:
        """Change a machine and tell of it, as a workflow does."""
        with self.hub.store.transaction() as session:
            row = rows.get(session, Machine, machine)
            for name, value in fields.items():
                setattr(row, name, value)
            row.updated_at = now()
            rows.record(session, "machine.status", machine, row.project_uuid, status=row.status)

    def row(self, kind: Any, uuid: UUID | str) -> Any:
        with self.hub.store.reading() as session:
            return rows.get(session, kind, UUID(str(uuid)))

    def operation_of(self, machine: UUID | str) -> Operation:
        found = self.row(Operation, self.row(Machine, machine).operation_uuid)
        assert isinstance(found, Operation)
        return found


def serve(parts: app.Parts) -> tuple[str, Callable[[], None]]:
    """Serve in a thread; returns the URL and how to stop."""
    listener = app._bind(parts.settings)
    server = app.make_server(parts)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)

    def stop() -> None:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"
        listener.close()

    return parts.settings.hub_url, stop


def until(look: Callable[[], Any], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return found


def error_of(response: httpx2.Response, status: int, code: str) -> schemas.ErrorBody:
    """Check that a response is the error envelope with that status and code."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"success", "error"}
    reply = schemas.ErrorReply.model_validate(response.json())
    assert reply.error.code == code, response.text
    assert reply.error.request_id == response.headers["X-Request-Id"]
    assert reply.error.message[0].isupper() or reply.error.message[0] == "'"
    return reply.error


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: sockets and databases lie in it."""
    path = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module", params=BACKENDS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """One hub for the tests of a module, on each database."""
    with serving(request) as found:
        yield found


@contextmanager
def serving(request: pytest.FixtureRequest, **more: Any) -> Iterator[Served]:
    """A hub with these settings, on the database that the fixture's parameter names."""
    path = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        more["database_url"] = server.create(is_migrated=True, backups=path / "backups")
    parts = app.build(settings_of(path, **more))
    parts.start()
    url, stop = serve(parts)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=f"{url}/api/v1", headers=headers, timeout=30, trust_env=False) as http:
        yield Served(parts, url, http)
    stop()
    parts.close()
    if "database_url" in more:
        server.drop(more["database_url"])
    shutil.rmtree(path, ignore_errors=True)
