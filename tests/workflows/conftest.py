"""A stub node for the whole session, hubs on it, and what is looked at afterwards: rows, VMs, disks, snapshots."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from sqlmodel import SQLModel, col, select

from autovibe import app, schemas
from autovibe.assets import asset
from autovibe.domain import Allotment, Checkpoint, Machine, Operation, Project, Reservation
from autovibe.domain.actor import Actor
from autovibe.hub import Hub, checkpoints, machines, projects
from autovibe.hypervisor import Proxmox, read
from autovibe.store import Store
from autovibe.types import CheckpointStatus
from autovibe.workflows.world import digest_of
from tests.stub import node as stub_node
from tests.stub.node import StubNode

ACTOR = Actor("test")
Row = TypeVar("Row", bound=SQLModel)


@pytest.fixture(scope="session")
def node() -> Iterator[StubNode]:
    """Its clones and snapshots take a moment, so that a process can die while one runs."""
    found = stub_node.start(delays={"clone": 0.3, "snapshot": 0.3, "start": 0.2})
    yield found
    found.stop()


@dataclass(frozen=True)
class Inventory:
    """What there is on the node, what the hub has allotted, and what it holds of budgets."""

    vms: dict[int, tuple[str, ...]]  # vmid -> snapshots
    volumes: frozenset[str]
    allotments: frozenset[int]
    reservations: frozenset[UUID] = frozenset()

    def __sub__(self, other: Inventory) -> Inventory:
        return Inventory(
            {vmid: names for vmid, names in self.vms.items() if other.vms.get(vmid) != names},
            self.volumes - other.volumes,
            self.allotments - other.allotments,
            self.reservations - other.reservations,
        )


NOTHING = Inventory({}, frozenset(), frozenset())


def inventory(proxmox: Proxmox, store: Store) -> Inventory:
    with store.reading() as session:
        allotments = frozenset(session.exec(select(Allotment.vmid)))
        open_ones = select(Reservation.uuid).where(col(Reservation.closed_at).is_(None))
        reservations = frozenset(session.exec(open_ones))
    return Inventory(
        {
            vm.vmid: tuple(found.name for found in read.snapshots(proxmox, vm.vmid))
            for vm in read.vms(proxmox)
            if vm.vmid in allotments or not vm.is_template
        },
        frozenset(found["volid"] for found in proxmox.get(f"nodes/{proxmox.node}/storage/local-lvm/content")),
        allotments,
        reservations,
    )


@dataclass
class Rows:
    """Reading a hub's database from outside."""

    store: Store

    def get(self, model: type[Row], uuid: UUID) -> Row:
        with self.store.reading() as session:
            found = session.get(model, uuid)
        assert found is not None
        return found

    def all(self, model: type[Row], **equal: Any) -> list[Row]:
        with self.store.reading() as session:
            return list(session.exec(select(model).filter_by(**equal)))

    def machine(self, name: str) -> Machine:
        return self.all(Machine, name=name)[0]

    def operation(self, **equal: Any) -> Operation:
        found = self.all(Operation, **equal)
        assert len(found) == 1, f"{len(found)} operations {equal}"
        return found[0]

    def await_end(
        self, operation_uuid: UUID, seconds: float = 60, keep: Callable[[], None] = lambda: None
    ) -> Operation:
        deadline = time.monotonic() + seconds
        while True:
            found = self.get(Operation, operation_uuid)
            if found.finished_at is not None:
                return found
            assert time.monotonic() < deadline, f"The {found.kind} is still {found.status} at step {found.step}."
            keep()
            time.sleep(0.03)


@dataclass
class LiveHub(Rows):
    """A hub in this process."""

    parts: app.Parts
    node: StubNode
    proxmox: Proxmox = field(init=False)
    project: UUID = field(init=False)

    def __post_init__(self) -> None:
        self.proxmox = self.hub.proxmox
        self.project = make_project(self.hub)

    @property
    def hub(self) -> Hub:
        return self.parts.hub

    def inventory(self) -> Inventory:
        return inventory(self.proxmox, self.store)

    def spawn(self, **order: Any) -> Operation:
        order = {"project_uuid": self.project, "name": f"m-{uuid4().hex[:8]}", **order}
        machine = machines.spawn(self.hub, ACTOR, schemas.MachineOrder(**order))
        return self.operation(object_uuid=machine.uuid, kind="spawn")

    def spawned(self, **order: Any) -> Machine:
        operation = self.await_end(self.spawn(**order).uuid)
        assert operation.status == "succeeded", operation.error
        return self.get(Machine, operation.object_uuid)

    def checkpoint(self, machine: UUID, **order: Any) -> Operation:
        made = checkpoints.create(self.hub, ACTOR, machine, schemas.CheckpointOrder(**order))
        return self.operation(object_uuid=made.uuid, kind="checkpoint")

    def terminate(self, machine: UUID, **order: Any) -> Operation:
        machines.terminate(self.hub, ACTOR, machine, schemas.TerminateOrder(**order))
        return max(self.all(Operation, object_uuid=machine, kind="terminate"), key=lambda found: found.created_at)

    def terminated(self, machine: UUID, **order: Any) -> Machine:
        operation = self.await_end(self.terminate(machine, **order).uuid)
        assert operation.status == "succeeded", operation.error
        return self.get(Machine, machine)


def make_project(hub: Hub, *, is_provisioned: bool = True) -> UUID:
    """A project whose genesis counts as provisioned, so that a spawn does not spend seconds in ansible."""
    project = projects.create(hub, ACTOR, schemas.ProjectOrder(name=f"p-{uuid4().hex[:8]}"))
    if is_provisioned:
        with hub.store.transaction() as session:
            row = session.get(Project, project.uuid)
            genesis = session.get(Checkpoint, row.current_checkpoint_uuid) if row else None
            assert genesis is not None
            assert genesis.status == CheckpointStatus.ready
            genesis.provisioned_for = f"shell:{digest_of(asset('playbooks'))}"
            session.add(genesis)
    return project.uuid


@pytest.fixture
def make_hub(node: StubNode, database_url: str, tmp_path: Path) -> Iterator[Callable[..., LiveHub]]:
    """Starts a hub in this process, on a fresh database; one at a time."""
    made: list[LiveHub] = []
    shared = node

    def make(node: StubNode = shared, **settings: Any) -> LiveHub:
        url = {} if database_url.startswith("sqlite") else {"database_url": database_url}
        parts = app.build(node.settings(tmp_path / "home", **{**url, **settings}))
        parts.start()
        made.append(LiveHub(parts.hub.store, parts, node))
        return made[-1]

    yield make
    for live in made:
        if live.node is shared:
            remove_vms(live.proxmox, live.store)
            assert live.parts.close()


@pytest.fixture
def live(make_hub: Callable[..., LiveHub]) -> LiveHub:
    return make_hub()


def remove_vms(proxmox: Proxmox, store: Store) -> None:
    """Leave the node as it was found, whatever the test left on it."""
    from autovibe.hypervisor import change

    with store.reading() as session:
        vmids = set(session.exec(select(Allotment.vmid)))
    for vmid in vmids:
        vm = read.find_vm(proxmox, vmid)
        if vm is None or vm.is_template:
            continue
        if vm.is_running and (upid := change.stop(proxmox, vmid)):
            read.await_task(proxmox, upid, slice_seconds=20)
        if upid := change.destroy(proxmox, vmid, owner=None):
            read.await_task(proxmox, upid, slice_seconds=20)


class HubProcess:
    """A hub in a process of its own that may kill itself; see hub_process.py."""

    def __init__(self, settings: dict[str, Any], marks: Path, kill: list[str], log: Path) -> None:
        marks.mkdir(exist_ok=True)
        self._log = log.open("ab")
        given = json.dumps({"settings": settings, "marks": str(marks), "kill": kill})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.workflows.hub_process", given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.log = log

    def await_ready(self) -> str | None:
        """The name of the hub; None when it died before."""
        answer = self._answer()
        return str(answer["ready"]) if answer is not None else None

    def ask(self, verb: str, **order: Any) -> bool:
        """False when it died over it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"verb": verb, **order}) + "\n")
        self._process.stdin.flush()
        return self._answer() is not None

    @property
    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> int:
        """Stop it as a signal does; how it ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(15)

    def end(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(10)
            assert self._process.returncode == -9, self.log.read_text()[-3000:]
            return None
        found = json.loads(line)
        assert isinstance(found, dict)
        return found
