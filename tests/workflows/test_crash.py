"""kill -9 of the hub, everywhere: after restarts each operation has been carried out exactly once.

The spawn dies on both databases, the others on one each: what differs between databases is the engine and the store,
which have tests of their own on both (test_durable.py, test_engine.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from autovibe import app
from autovibe.domain import Checkpoint, Machine, Operation
from autovibe.domain.checkpoint import snapshot_name
from autovibe.hypervisor import Proxmox, read
from autovibe.settings import Settings
from autovibe.store import Store
from autovibe.workflows import steps_of
from tests.stub.node import StubNode
from tests.workflows.conftest import HubProcess, Inventory, Rows, inventory, make_project, remove_vms
from tests.workflows.test_steps import eventually


@dataclass
class Mortal(Rows):
    """A hub on a home whose process dies and is started again, as a supervisor does."""

    settings: Settings
    directory: Path
    proxmox: Proxmox
    project: UUID
    kill: list[str] = field(default_factory=list)
    starts: int = 0
    process: HubProcess | None = None

    def start(self) -> HubProcess:
        if self.process is not None:
            self.process.end()
        given = {
            "home": str(self.settings.home),
            **{name: getattr(self.settings, name) for name in _TOLD},
            "proxmox_token": self.settings.read_proxmox_token(),
        }
        self.process = HubProcess(given, self.directory / "marks", self.kill, self.directory / "log")
        self.starts += 1
        self.process.await_ready()
        return self.process

    def keep_alive(self) -> None:
        if self.process is None or self.process.is_dead:
            self.start()

    def ask(self, verb: str, kill: list[str], **order: Any) -> None:
        """Ask a hub that will die at these moments; a moment met is not deadly again."""
        self.kill = kill
        self.start().ask(verb, **order)

    def finish(self, **equal: Any) -> Operation:
        return self.await_end(self.operation(**equal).uuid, seconds=120, keep=self.keep_alive)

    def met(self) -> set[str]:
        return {path.name for path in (self.directory / "marks").iterdir()}

    def inventory(self) -> Inventory:
        return inventory(self.proxmox, self.store)

    def spawned(self, name: str) -> Machine:
        self.ask("spawn", [], project_uuid=str(self.project), name=name)
        assert self.finish(object_uuid=self.machine(name).uuid).status == "succeeded"
        return self.machine(name)

    def end(self) -> None:
        if self.process is not None:
            self.process.end()


_TOLD = (
    "database_url",
    "proxmox_url",
    "proxmox_fingerprint",
    "ssh_via",
    "node_port",
    "guest_user",
    "min_free_gb",
    "hub_port",
    "workers",
)


@pytest.fixture
def make_mortal(node: StubNode, tmp_path: Path) -> Iterator[Callable[..., Mortal]]:
    made: list[Mortal] = []

    def make(database_url: str, name: str = "home", project: UUID | None = None) -> Mortal:
        url = {} if database_url.startswith("sqlite") else {"database_url": database_url}
        settings = node.settings(tmp_path / name, **url)
        parts = app.build(settings)
        project = project or make_project(parts.hub)
        parts.hub.store.close()
        directory = tmp_path / f"of-{name}"
        directory.mkdir()
        found = Mortal(Store(settings.hub_database_url), settings, directory, node.proxmox(), project)
        made.append(found)
        return found

    yield make
    for one in made:
        one.end()
    for one in made:
        remove_vms(one.proxmox, one.store)
        one.store.close()


@pytest.fixture
def mortal(database_url: str, make_mortal: Callable[..., Mortal]) -> Mortal:
    return make_mortal(database_url)


def moments(kind: str, *more: str) -> list[str]:
    return [*(f"{kind}.{step}" for step in steps_of(kind)), *more]


def test_killed_at_every_step_of_spawn(mortal: Mortal) -> None:
    before = mortal.inventory()
    deadly = moments("spawn", "start", "spawn.clone.during", "spawn.start.during")
    mortal.ask(
        "spawn",
        deadly,
        project_uuid=str(mortal.project),
        name="m1",
        prompt="echo once >> /workspace/runs",
        file_modifications={"/workspace/placed": "here"},
    )
    machine = mortal.machine("m1")
    operation = mortal.finish(object_uuid=machine.uuid)
    assert (operation.status, operation.error) == ("succeeded", None)
    mortal.keep_alive()  # it dies once more after its mark
    assert mortal.met() == set(deadly)
    machine = mortal.machine("m1")
    assert machine.status in ("working", "active")
    assert len(mortal.all(Machine)) == len(mortal.all(Operation)) == 1
    made = mortal.inventory() - before
    assert made.vms == {machine.vmid: ()}
    assert (made.allotments, made.reservations) == ({machine.vmid}, {machine.reservation_uuid})
    assert machine.vmid is not None
    assert read.owner(mortal.proxmox, machine.vmid) == machine.uuid


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_killed_at_every_step_of_checkpoint(mortal: Mortal) -> None:
    machine = mortal.spawned("m1")
    before = mortal.inventory()
    deadly = moments("checkpoint", "start", "checkpoint.snapshot.during")
    mortal.ask("checkpoint", deadly, machine=str(machine.uuid), label="A")
    checkpoint = mortal.all(Checkpoint, label="A")[0]
    assert mortal.finish(object_uuid=checkpoint.uuid).status == "succeeded"
    mortal.keep_alive()
    assert mortal.met() == set(deadly)
    assert mortal.machine("m1").status == "active"
    checkpoint = mortal.all(Checkpoint, label="A")[0]
    assert (checkpoint.status, checkpoint.vmid, checkpoint.file_count > 0) == ("ready", machine.vmid, True)
    assert len(mortal.all(Checkpoint, machine_uuid=machine.uuid)) == 1
    assert (mortal.inventory() - before).vms == {machine.vmid: (snapshot_name(checkpoint.uuid),)}


@pytest.mark.parametrize(
    ("database_url", "with_checkpoint"), [("sqlite", True), ("postgres", False)], indirect=["database_url"]
)
def test_killed_at_every_step_of_terminate(mortal: Mortal, with_checkpoint: bool) -> None:
    before = mortal.inventory()
    machine = mortal.spawned("m1")
    deadly = ["start", *(f"terminate.{step}" for step in ("take", "stop", "remove", "mark"))]
    if with_checkpoint:
        deadly = moments("terminate", "start", "terminate.snapshot.during")
    mortal.ask("terminate", deadly, machine=str(machine.uuid), create_checkpoint=with_checkpoint)
    assert mortal.finish(object_uuid=machine.uuid, kind="terminate").status == "succeeded"
    mortal.keep_alive()
    assert mortal.met() == set(deadly)
    ended = mortal.machine("m1")
    assert (ended.status, ended.terminated_at is not None) == ("terminated", True)
    made = mortal.inventory() - before
    assert made.reservations == frozenset()
    if with_checkpoint:
        final = mortal.all(Checkpoint, machine_uuid=machine.uuid)
        assert [row.status for row in final] == ["ready"]
        assert made.vms == {machine.vmid: (snapshot_name(final[0].uuid),)}
        assert ended.final_checkpoint_uuid == final[0].uuid
        assert machine.vmid is not None
        vm = read.find_vm(mortal.proxmox, machine.vmid)
        assert vm is not None
        assert (vm.status, vm.tags) == ("stopped", ("autovibe-checkpoints",))
    else:
        assert made == Inventory({}, frozenset(), frozenset())


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_killed_at_every_step_of_block(mortal: Mortal) -> None:
    machine = mortal.spawned("m1")
    before = mortal.inventory()
    deadly = moments("block", "start", "block.snapshot.during", "block.keep.during")
    mortal.ask("block", deadly, machine=str(machine.uuid))
    assert mortal.finish(object_uuid=machine.uuid, kind="block").error is None
    eventually(lambda: mortal.met() == set(deadly))  # it dies once more after its mark
    mortal.keep_alive()
    blocked = mortal.machine("m1")
    assert (blocked.status, blocked.reservation_uuid, blocked.metered_at) == ("budget_blocked", None, None)
    checkpoint = mortal.all(Checkpoint, machine_uuid=machine.uuid)[0]
    assert (checkpoint.status, checkpoint.type) == ("ready", "automatic")
    assert blocked.blocked is not None
    assert machine.vmid is not None
    kept = {snapshot_name(checkpoint.uuid), blocked.blocked["ram"]}
    assert set((mortal.inventory() - before).vms[machine.vmid]) == kept
    vm = read.find_vm(mortal.proxmox, machine.vmid)
    assert vm is not None
    assert vm.status == "stopped"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_killed_at_every_step_of_resume(mortal: Mortal) -> None:
    machine = mortal.spawned("m1")
    before = mortal.inventory()
    mortal.ask("block", [], machine=str(machine.uuid))
    assert mortal.finish(object_uuid=machine.uuid, kind="block").error is None
    deadly = moments("resume", "start", "resume.start.during", "resume.forget.during")
    mortal.ask("resume", deadly, machine=str(machine.uuid))
    assert mortal.finish(object_uuid=machine.uuid, kind="resume").error is None
    eventually(lambda: mortal.met() == set(deadly))  # it dies once more after its mark
    mortal.keep_alive()
    resumed = mortal.machine("m1")
    assert (resumed.status, resumed.blocked) == ("active", None)
    assert resumed.reservation_uuid is not None
    checkpoint = mortal.all(Checkpoint, machine_uuid=machine.uuid)[0]
    assert (mortal.inventory() - before).vms == {machine.vmid: (snapshot_name(checkpoint.uuid),)}


def test_two_hubs_share_a_database_and_one_is_killed_while_it_spawns(
    make_mortal: Callable[..., Mortal], postgres: Any, tmp_path: Path
) -> None:
    url = postgres.create(is_migrated=True, backups=tmp_path / "backups")
    dying = make_mortal(url, "one")
    other = make_mortal(url, "two", project=dying.project)
    other.start()
    before = dying.inventory()
    dying.ask("spawn", ["spawn.start"], project_uuid=str(dying.project), name="m1")
    machine = dying.machine("m1")
    operation = other.await_end(other.operation(object_uuid=machine.uuid).uuid, seconds=60)
    assert (operation.status, operation.error) == ("succeeded", None)
    assert dying.process is not None
    assert dying.process.is_dead
    assert other.machine("m1").status == "active"
    assert (other.inventory() - before).vms == {machine.vmid: ()}
    dying.start()  # and when it comes back it finds nothing to do
    time.sleep(2)
    assert other.machine("m1").status == "active"
    assert (other.inventory() - before).vms == {machine.vmid: ()}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_hub_that_is_told_to_stop_parks_and_goes_on(mortal: Mortal) -> None:
    """SIGTERM's way: parts.close() within its seconds, and the rest at the next start."""
    mortal.ask("spawn", [], project_uuid=str(mortal.project), name="m1")
    process = mortal.process
    assert process is not None
    begun_at = time.monotonic()
    assert process.close() == 0
    assert time.monotonic() - begun_at < 10
    assert mortal.finish(object_uuid=mortal.machine("m1").uuid).status == "succeeded"
    assert mortal.starts == 2
