"""A hub process without its HTTP door, driven by lines of JSON on standard input, which kills itself at chosen steps.

`kill` names moments: "spawn.clone" is after that step has done its work and before that is remembered,
"spawn.clone.during" while its first Proxmox task runs, "start" between the commit of an order and the start of its
workflow. Each is deadly once: a file in `marks` tells that it was met.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from autovibe import app, schemas, workflows
from autovibe.domain.actor import Actor
from autovibe.errors import LimitExceeded
from autovibe.hub import blocking, checkpoints, machines
from autovibe.settings import load
from autovibe.workflows import Step, Workflow, World

ACTOR = Actor("test")


def arm(kill: list[str], marks: Path) -> None:
    """Make the product's tables deadly."""
    for kind, workflow in list(workflows.WORKFLOWS.items()):
        steps = tuple(_deadly(kind, step, kill, marks) for step in workflow.steps)
        workflows.WORKFLOWS[kind] = Workflow(steps, workflow.fail, workflow.heeds_wanted)


def _deadly(kind: str, step: Step, kill: list[str], marks: Path) -> Step:
    after, during = f"{kind}.{step.name}", f"{kind}.{step.name}.during"

    def do(world: World, operation_uuid: UUID) -> None:
        is_parking = world.is_parking
        if during in kill and not (marks / during).exists():
            world.is_parking = lambda: die(marks / during)
        try:
            step.do(world, operation_uuid)
        finally:
            world.is_parking = is_parking
        if after in kill and not (marks / after).exists():
            die(marks / after)

    return dataclasses.replace(step, do=do)


def die(mark: Path) -> bool:
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def main() -> None:
    given = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    kill, marks = given["kill"], Path(given["marks"])
    arm(kill, marks)
    parts = app.build(load(**{**given["settings"], "home": Path(given["settings"]["home"])}))
    parts.start()
    hub = parts.hub
    if "start" in kill and not (marks / "start").exists():
        hub.workflows.start = lambda *_: die(marks / "start")  # type: ignore[method-assign,assignment,return-value]
    verbs: dict[str, Callable[..., Any]] = {
        "spawn": lambda **order: machines.spawn(hub, ACTOR, schemas.MachineOrder(**order)),
        "checkpoint": lambda machine, **order: checkpoints.create(
            hub, ACTOR, UUID(machine), schemas.CheckpointOrder(**order)
        ),
        "terminate": lambda machine, **order: machines.terminate(
            hub, ACTOR, UUID(machine), schemas.TerminateOrder(**order)
        ),
        "block": lambda machine: blocking.block(hub, UUID(machine), LimitExceeded(details={"scope": "machine"})),
        "resume": lambda machine: blocking.resume(hub, ACTOR, UUID(machine)),
    }
    print(json.dumps({"ready": hub.name}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        verbs[asked.pop("verb")](**asked)
        print(json.dumps({}), flush=True)
    os._exit(0 if parts.close() else 1)


if __name__ == "__main__":
    main()
