"""The plan of a spawn on a node that answers: how it would be cloned, and that it then is so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autovibe import schemas
from autovibe.domain import Checkpoint
from autovibe.hub import plans
from tests.workflows.conftest import ACTOR, NOTHING, LiveHub


def plan(live: LiveHub, **order: Any) -> schemas.SpawnPlan:
    return plans.plan(live.hub, ACTOR, schemas.MachineOrder(project_uuid=live.project, **order))


def test_a_plan_names_the_clone(live: LiveHub) -> None:
    genesis = live.get(Checkpoint, plan(live).checkpoint_uuid or live.project)
    before = live.inventory()
    found = plan(live)
    assert found.is_possible, found.refusals
    assert found.clone is not None
    assert (found.clone.strategy, found.clone.source_vmid) == ("template", genesis.vmid)
    assert live.inventory() - before == NOTHING

    machine = live.spawned()
    assert machine.vmid == found.placement.vmid
    made = live.get(Checkpoint, live.await_end(live.checkpoint(machine.uuid, label="A").uuid).object_uuid)
    found = plan(live, checkpoint_uuid=made.uuid)
    assert found.is_possible, found.refusals
    assert found.clone is not None
    assert found.clone.strategy in ("linked", "full")
    assert (found.clone.source_vmid, found.clone.snapshot) == (machine.vmid, made.snapshot)


def test_a_plan_names_what_a_spawn_would_meet_on_the_node(make_hub: Callable[..., LiveHub]) -> None:
    live = make_hub()
    live.hub.workflows.world.min_free_bytes = 1 << 60
    found = plan(live)
    assert [refusal.code for refusal in found.refusals] == ["INSUFFICIENT_SPACE"]
    live.hub.workflows.world.min_free_bytes = 0
    with live.store.transaction() as session:
        row = session.get(Checkpoint, found.checkpoint_uuid)
        assert row is not None
        row.vmid = 8999
        session.add(row)
    found = plan(live)
    assert [refusal.code for refusal in found.refusals] == ["CONFLICT"]
    assert "VM 8999" in found.refusals[0].message
