"""What changes infrastructure: each operation is carried out by one workflow, a table of remembered steps.

An operation's workflow has the operation's own id, so starting it twice is harmless. Read a workflow's module from the
end: the table is there, the steps above it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic
from uuid import UUID

from autovibe.durable import Durable, contained
from autovibe.errors import AutovibeError
from autovibe.workflows import block, checkpoint, engine, hub_checkpoint, resume, spawn, terminate
from autovibe.workflows.engine import Step, Workflow
from autovibe.workflows.world import World

__all__ = ["STEPS", "WORKFLOWS", "Step", "Workflow", "Workflows", "World", "steps_of"]

_log = logging.getLogger(__name__)

_LATELY_SECONDS = 60.0

WORKFLOWS: dict[str, Workflow] = {
    "spawn": spawn.WORKFLOW,
    "checkpoint": checkpoint.WORKFLOW,
    "terminate": terminate.WORKFLOW,
    "block": block.WORKFLOW,
    "resume": resume.WORKFLOW,
    "hub_checkpoint": hub_checkpoint.WORKFLOW,
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
        self._soon = ThreadPoolExecutor(1, thread_name_prefix="start")
        self._in_line: set[UUID] = set()  # accepted here, until begun
        self._begun: dict[UUID, float] = {}  # when this process began it, by time.monotonic()
        world.check, world.is_parking, world.yield_turn = durable.check, durable.is_parking, durable.yield_turn
        world.executor = lambda: durable.executor_id
        for kind, workflow in workflows.items():
            durable.register(kind, partial(_run, durable, world, workflow))

    def start(self, operation_uuid: UUID, kind: str) -> None:
        """Begin what was accepted, unless it was begun before. Raises DatabaseUnavailable; upkeep then begins it."""
        self._durable.start(str(kind), str(operation_uuid))
        self._begun[operation_uuid] = monotonic()

    def start_forgotten(self, operation_uuid: UUID, kind: str) -> None:
        """As `start`, but for what this process has in line or began lately: that waits for a worker."""
        earliest = monotonic() - _LATELY_SECONDS
        if operation_uuid not in self._in_line and self._begun.get(operation_uuid, earliest) <= earliest:
            self._begun = {uuid: at for uuid, at in list(self._begun.items()) if at > earliest}
            self.start(operation_uuid, kind)

    def start_soon(self, operation_uuid: UUID, kind: str) -> None:
        """As `start`, in a thread of its own, in order, and not before a worker is free for it: who accepts waits
        neither for the engine's own commit nor for its work on a hundred others.

        What is lost when the process dies before it, or fails, is begun by upkeep.
        """
        self._in_line.add(operation_uuid)
        self._soon.submit(self._start, operation_uuid, kind)

    def _start(self, operation_uuid: UUID, kind: str) -> None:
        self._durable.await_worker()
        try:
            with contained(f"the start of {operation_uuid}"):
                self.start(operation_uuid, kind)
        except AutovibeError as error:
            _log.warning("Operation %s is accepted and starts later: %s", operation_uuid, error.log_detail or error)
        finally:
            self._in_line.discard(operation_uuid)

    def steps_of(self, kind: str) -> list[str]:
        return steps_of(kind)

    def alive(self) -> dict[str, float]:
        """The hub processes on this database, each with the seconds since it was last seen."""
        return self._durable.alive()


def _run(durable: Durable, world: World, workflow: Workflow, workflow_id: str) -> None:
    engine.carry_out(durable, world, workflow, UUID(workflow_id))
