"""What changes infrastructure: each operation is carried out by one workflow, a table of remembered steps.

An operation's workflow has the operation's own id, so starting it twice is harmless. Read a workflow's module from the
end: the table is there, the steps above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from uuid import UUID

from autovibe.durable import Durable
from autovibe.workflows import checkpoint, engine, spawn, terminate
from autovibe.workflows.engine import Step, Workflow
from autovibe.workflows.world import World

__all__ = ["STEPS", "WORKFLOWS", "Step", "Workflow", "Workflows", "World", "steps_of"]

WORKFLOWS: dict[str, Workflow] = {
    "spawn": spawn.WORKFLOW,
    "checkpoint": checkpoint.WORKFLOW,
    "terminate": terminate.WORKFLOW,
}

STEPS: dict[str, tuple[Step, ...]] = {kind: workflow.steps for kind, workflow in WORKFLOWS.items()}


def steps_of(kind: str, *, with_checkpoint: bool = True) -> list[str]:
    """The names of a kind's steps, in order; `with_checkpoint` says whether a terminate makes a final one."""
    left_out = terminate.CHECKPOINT_STEPS if kind == "terminate" and not with_checkpoint else ()
    return [step.name for step in STEPS[kind] if step.name not in left_out]


class Workflows:
    """The workflows of one process. Made before `durable.launch()`, which goes on with those a predecessor left."""

    def __init__(self, world: World, durable: Durable, workflows: Mapping[str, Workflow] = WORKFLOWS) -> None:
        self.world, self._durable = world, durable
        world.check, world.is_parking, world.yield_turn = durable.check, durable.is_parking, durable.yield_turn
        for kind, workflow in workflows.items():
            durable.register(kind, partial(_run, durable, world, workflow))

    def start(self, operation_uuid: UUID, kind: str) -> None:
        """Begin what was accepted, unless it was begun before. Raises DatabaseUnavailable; upkeep then begins it."""
        self._durable.start(str(kind), str(operation_uuid))

    def steps_of(self, kind: str) -> list[str]:
        return steps_of(kind)


def _run(durable: Durable, world: World, workflow: Workflow, workflow_id: str) -> None:
    engine.carry_out(durable, world, workflow, UUID(workflow_id))
