"""A checkpoint of a Hub that runs in a VM of its Proxmox, and what the node and the database say differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import col, delete, update

from autovibe import schemas
from autovibe.domain import Allotment, HubCheckpoint, Machine, Operation
from autovibe.domain.checkpoint import snapshot_name
from autovibe.domain.columns import now
from autovibe.hub import backups
from autovibe.hub.reconcile import differences
from autovibe.hypervisor import change, read
from autovibe.workflows import steps_of
from tests.workflows.conftest import ACTOR, LiveHub
from tests.workflows.test_steps import Fault, rewrite, twice

MakeHub = Callable[..., LiveHub]


def move_into(live: LiveHub, machine: Machine) -> int:
    """Have the Hub believe that it runs in that machine's VM."""
    assert machine.vmid is not None
    live.hub.premises = live.hub.workflows.world.premises = replace(live.hub.premises, vmid=machine.vmid)
    return machine.vmid


def checkpointed(live: LiveHub) -> tuple[HubCheckpoint, Operation]:
    made = backups.create(live.hub, ACTOR, schemas.HubCheckpointOrder(reason="test"))
    assert made.operation_uuid is not None
    operation = live.await_end(made.operation_uuid)
    return live.get(HubCheckpoint, made.uuid), operation


def snapshots_of(live: LiveHub, vmid: int) -> list[str]:
    return [found.name for found in read.snapshots(live.proxmox, vmid)]


def test_the_vm_is_snapshotted_and_pruned(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(monkeypatch, "hub_checkpoint", twice)
    live = make_hub()
    plain, operation = checkpointed(live)
    assert (plain.kind, plain.snapshot, operation.steps) == ("logical", None, ["copy", "record"])
    vmid = move_into(live, live.spawned())
    found, operation = checkpointed(live)
    assert operation.status == "succeeded", operation.error
    assert (found.kind, found.status, found.vmid, found.snapshot) == ("vm", "ready", vmid, snapshot_name(found.uuid))
    assert snapshots_of(live, vmid) == [found.snapshot]
    newer, _ = checkpointed(live)
    monkeypatch.setattr(backups, "KEPT", dict.fromkeys(backups.KEPT, 1))
    with live.store.transaction() as session:
        old = update(HubCheckpoint).where(col(HubCheckpoint.uuid) != newer.uuid)
        session.exec(old.values(created_at=now() - timedelta(days=1)))
    backups.prune(live.hub)
    assert snapshots_of(live, vmid) == [newer.snapshot]
    assert [row.uuid for row in live.all(HubCheckpoint)] == [newer.uuid]
    assert not Path(found.path).exists()


def test_a_failure_at_any_step_leaves_nothing(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault()
    rewrite(monkeypatch, "hub_checkpoint", fault.put)
    live = make_hub()
    vmid = move_into(live, live.spawned())
    for step in steps_of("hub_checkpoint")[:-1]:
        fault.step = step
        row, operation = checkpointed(live)
        assert (operation.status, row.status) == ("failed", "failed"), step
        assert row.error_message == f"Fault at '{step}'."
        assert snapshots_of(live, vmid) == []
        assert list(live.hub.premises.checkpoints.iterdir()) == []
    fault.step = ""
    assert checkpointed(live)[0].status == "ready"


def test_what_the_node_and_the_database_say_differently(live: LiveHub) -> None:
    gone, unknown, same = live.spawned(), live.spawned(), live.spawned()
    assert differences(live.store, live.proxmox, live.hub.vmids).sentences == []
    assert gone.vmid is not None
    upid = change.stop(live.proxmox, gone.vmid)
    assert upid is not None
    read.await_task(live.proxmox, upid, slice_seconds=20)
    upid = change.destroy(live.proxmox, gone.vmid, owner=gone.uuid)
    assert upid is not None
    read.await_task(live.proxmox, upid, slice_seconds=20)
    with live.store.transaction() as session:
        session.exec(delete(Allotment).where(col(Allotment.vmid) == unknown.vmid))
    found = differences(live.store, live.proxmox, live.hub.vmids)
    with live.store.transaction() as session:
        session.add(Allotment(vmid=unknown.vmid or 0, owner_uuid=unknown.uuid))
    assert [line.split("'")[1] for line in found.machines] == [gone.name]
    assert [f"VM {unknown.vmid} " in line for line in found.vmids] == [True]
    assert found.checkpoints == []
    assert not any(same.name in sentence for sentence in found.sentences)
