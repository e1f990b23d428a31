"""The Hub's API against bare FastAPI and SQLModel (`tests.bench.bare_api`): reads of 100,000 machines, and spawns.

Two programs with equal uvicorn options, each on its own copy of one database, asked by turns over kept connections.
Ours checks its key and rate limits, writes audit and access lines and puts errors into envelopes; the peer does not.
The figure of a read is the milliseconds an answer takes of a busy server: a throughput of 0.8 of the peer's is a ratio
of 1.25. A spawn is timed from the POST to the 201, at 50 in parallel, against the insert of one row; both wait for the
store's write lock and for the disk.

The Hub's node does not answer and one workflow is carried out at a time, so what is accepted waits in line: what a
spawn costs after its acceptance is bench_spawn's. AUTOVIBE_BENCH_MACHINES sets the size.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import psycopg

from autovibe.domain import Account, Checkpoint, Machine, Project
from autovibe.domain.budget import LIFE, Scope
from autovibe.domain.columns import now
from autovibe.settings import Settings
from autovibe.store import Store
from autovibe.store.trees import EMPTY_ROOT
from autovibe.types import MICROS, ArtefactKind, CheckpointStatus, CheckpointType, MachineStatus, Resource
from tests.api.conftest import KEY, free_port, settings_of
from tests.bench.figure import Figure
from tests.bench.load import Load, Question, request, run
from tests.conftest import private_postgres

MACHINES = int(os.environ.get("AUTOVIBE_BENCH_MACHINES", "100000"))
READERS, BLOCKS, BLOCK_SECONDS = 8, 7, 1.5
SPAWNERS, SPAWNS, SPAWN_BLOCKS = 50, 600, 5
READ_TARGET, SPAWN_TARGET = 1.25, 2.0
PROJECTS = 20
_VMIDS = {"vmid_first": 100_000, "vmid_last": 199_999}
_NO_LIMIT: dict[str, Any] = {"rate_limit_per_minute": 10**9, "rate_limit_heavy_per_minute": 10**9}
_HUB = "import json, sys; from autovibe import app, settings; app.serve(settings.load(**json.loads(sys.argv[1])))"


@dataclass
class Sample:
    """What of the filled database is asked for."""

    machines: list[UUID]
    project: UUID
    checkpoint: UUID


def figures() -> Iterator[Figure]:
    home = Path(tempfile.mkdtemp(prefix="av-bench-"))
    try:
        yield from _figures("SQLite", home / "s", f"sqlite:///{home / 's.db'}", f"sqlite:///{home / 'peer.db'}")
        with private_postgres() as server:
            first, second = (server.create(is_migrated=True, backups=home) for _ in range(2))
            yield from _figures("PostgreSQL", home / "p", first, second)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _figures(kind: str, home: Path, url: str, peer_url: str) -> Iterator[Figure]:
    sample = _fill(url, peer_url, home)
    settings = settings_of(home, database_url=url, workers=1, log_level="info", **_VMIDS, **_NO_LIMIT)
    with _served(_hub_argv(settings), settings.hub_port) as ours, _served(*_peer(peer_url)) as peer:
        headers = {"Authorization": f"Bearer {KEY}"}
        for name, path in (
            ("GET /machines/{uuid}", lambda: f"/machines/{random.choice(sample.machines)}"),
            ("GET /machines?limit=50", lambda: "/machines?limit=50"),
        ):
            mine, theirs = _reads(ours, peer, _gets("/api/v1", path, headers), _gets("", path, {}))
            yield Figure(f"{name} of {MACHINES:,}, an answer, {kind}", mine, theirs, "ms", READ_TARGET)
        mine, theirs = _spawns(ours, peer, sample, headers)
        name = f"POST /machines, p99 at {SPAWNERS} in parallel, against a bare insert, {kind}"
        yield Figure(name, mine, theirs, "ms", SPAWN_TARGET)


def _gets(prefix: str, path: Callable[[], str], headers: dict[str, str]) -> Question:
    return lambda: request("GET", prefix + path(), headers)


def _reads(ours: _Served, peer: _Served, question: Question, peers: Question) -> tuple[float, float]:
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(BLOCKS + 1):
        for measured, served, asked in zip(found, (ours, peer), (question, peers), strict=True):
            load = run(served.port, asked, connections=READERS, seconds=BLOCK_SECONDS)
            if number:  # the first block warms up
                measured.append(load.milliseconds_an_answer)
    return statistics.median(found[0]), statistics.median(found[1])


def _spawns(ours: _Served, peer: _Served, sample: Sample, headers: dict[str, str]) -> tuple[float, float]:
    order = {"project_uuid": str(sample.project), "checkpoint_uuid": str(sample.checkpoint), "prompt": "true"}
    order |= {"resource_constraints": {"max_money": 1, "max_time_minutes": 60}}

    def spawn(served: _Served, prefix: str, more: dict[str, str]) -> Load:
        found = run(
            served.port,
            lambda: request("POST", f"{prefix}/machines", more | {"Idempotency-Key": uuid4().hex}, order),
            connections=SPAWNERS,
            most=SPAWNS,
            status=201,
        )
        served.await_rest()
        return found

    found: tuple[list[float], list[float]] = ([], [])
    for number in range(SPAWN_BLOCKS + 1):
        for measured, load in zip(found, (spawn(ours, "/api/v1", headers), spawn(peer, "", {})), strict=True):
            if number:
                measured.append(load.percentile(0.99))
    return statistics.median(found[0]), statistics.median(found[1])


# The two programs


@dataclass
class _Served:
    port: int
    process: psutil.Process

    def await_rest(self) -> None:
        """Until the program does nothing more, such as start what it has accepted."""
        deadline = time.monotonic() + 120
        while self.process.cpu_percent(0.5) > 10:
            if time.monotonic() > deadline:
                raise AssertionError("The server does not come to rest.")


@contextlib.contextmanager
def _served(argv: list[str], port: int) -> Iterator[_Served]:
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                run(port, lambda: request("GET", "/", {}), connections=1, most=1, status=0)
            except (OSError, AssertionError, EOFError) as error:
                if isinstance(error, AssertionError):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{argv[:2]} does not answer.") from error
                time.sleep(0.05)
        yield _Served(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(30)


def _hub_argv(settings: Settings) -> list[str]:
    given = settings.model_dump(mode="json", include=settings.model_fields_set)
    return ["-c", _HUB, json.dumps(given | {"api_key": KEY})]


def _peer(url: str) -> tuple[list[str], int]:
    port = free_port()
    return ["-m", "tests.bench.bare_api", url, str(port)], port


# What they are asked about


def _fill(url: str, peer_url: str, home: Path) -> Sample:
    """Two equal databases: machines, most of which have ended, with what they used and their checkpoints."""
    sample = Sample([], UUID(int=0), UUID(int=0))
    for each in (url, peer_url):
        store = Store(each)
        store.migrate(home / "backups")
        with store.transaction() as session:
            sample = _rows(session.connection())
        if store.is_sqlite:
            with store.connection() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        else:
            with psycopg.connect(each, autocommit=True) as plain:
                plain.execute("VACUUM ANALYZE")
        store.close()
    return sample


def _rows(connection: Any) -> Sample:
    """Always the same rows."""
    numbers, moment = random.Random(1), now()
    projects = [UUID(int=numbers.getrandbits(128)) for _ in range(PROJECTS)]
    genesis = [UUID(int=numbers.getrandbits(128)) for _ in range(PROJECTS)]
    machines = [UUID(int=numbers.getrandbits(128)) for _ in range(MACHINES)]

    def insert(model: Any, given: Iterator[Any]) -> None:
        connection.execute(model.__table__.insert(), [_values(row) for row in given])

    insert(
        Project,
        (
            Project(uuid=uuid, name=f"p{n}", daily_money_micros=10**15, daily_time_hours=1e6, greediness=0.04)
            for n, uuid in enumerate(projects)
        ),
    )
    insert(Machine, (_machine(n, uuid, projects, moment) for n, uuid in enumerate(machines)))
    insert(Checkpoint, (_genesis(uuid, project) for uuid, project in zip(genesis, projects, strict=True)))
    insert(
        Checkpoint,
        (
            Checkpoint(
                uuid=UUID(int=numbers.getrandbits(128)),
                project_uuid=projects[n % PROJECTS],
                machine_uuid=machine,
                type=CheckpointType.final,
                status=CheckpointStatus.ready,
            )
            for n, machine in enumerate(machines)
            if n % 2
        ),
    )
    used = {Resource.money: 250_000, Resource.time_hours: MICROS // 2, Resource.cpu_hours: MICROS // 4}
    for resource, micros in used.items():
        insert(
            Account,
            (
                Account(scope=Scope.machine, owner_uuid=uuid, period=LIFE, resource=resource, used_micros=micros)
                for uuid in machines
            ),
        )
    return Sample(numbers.sample(machines, min(5000, MACHINES)), projects[0], genesis[0])


def _values(row: Any) -> dict[str, Any]:
    return {
        column.name: getattr(row, attribute.key)
        for attribute in row.__mapper__.column_attrs
        for column in attribute.columns
    }


def _machine(number: int, uuid: UUID, projects: list[UUID], moment: Any) -> Machine:
    began = moment - timedelta(minutes=10 + number)
    ended = began + timedelta(minutes=5)
    return Machine(
        uuid=uuid,
        name=f"shell-{number}",
        type="shell",
        status=MachineStatus.terminated,
        project_uuid=projects[number % PROJECTS],
        prompt="Read the failing tests, mend what they found and say what you have changed.",
        vmid=9000 + number % 1000,
        max_money_micros=MICROS,
        exit_status=0,
        spawned_at=began,
        running_at=began + timedelta(seconds=20),
        finished_at=ended,
        ended_at=ended,
        terminated_at=ended,
        updated_at=ended,
    )


def _genesis(uuid: UUID, project: UUID) -> Checkpoint:
    return Checkpoint(
        uuid=uuid,
        project_uuid=project,
        type=CheckpointType.genesis,
        status=CheckpointStatus.ready,
        node="autovibe",
        vmid=100,
        artefact_kind=ArtefactKind.template,
        storage="local-lvm",
        root_digest=EMPTY_ROOT,
    )
