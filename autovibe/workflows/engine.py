"""Carries out a table of steps.

A step is carried out inside one remembered step of the durable engine, however long it waits: `do` is called until it
no longer raises NotYet (what it waits for has not happened) or Unavailable (a part it needs does not answer), or until
its deadline. It may be called again at any time, also in another process, so it finds its earlier effect.

When a step fails, the undos of it and of all before it run in reverse, each a remembered step too; then the workflow's
`fail` marks the rows. An undo goes on trying while the hypervisor does not answer, however long that is; `fail` is then
called early, so that nobody waits for it, and says what is still pending.

Nothing a step raises is lost: an AutovibeError becomes the operation's error; any other exception an InternalError
whose detail is in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from sqlmodel import Session, col, select

from autovibe.domain import Event, Machine, Operation, trace
from autovibe.domain.columns import now
from autovibe.domain.machine import WANTED_TERMINATED
from autovibe.durable import Durable, contained
from autovibe.errors import AutovibeError, Conflict, DeadlineExceeded, NotYet, Unavailable
from autovibe.store import rows
from autovibe.types import OperationStatus
from autovibe.workflows.world import World

_log = logging.getLogger(__name__)

_PAUSE = 0.25  # seconds between two calls of a step that waits
_FIRST_RETRY, _LAST_RETRY = 0.5, 15.0  # seconds between two tries while a part does not answer
_UNDO_ATTEMPTS = 6  # of an undo that fails for another reason than that
_UNDO_PATIENCE = 1800.0  # seconds an undo waits for something that answers but is not there yet
FOREVER = float("inf")

Do = Callable[[World, UUID], None]


@dataclass(frozen=True)
class Step:
    """`deadline` in seconds, or how to read it from the world. `explain` adds to the error what was found at it."""

    name: str
    do: Do
    undo: Do | None = None
    deadline: float | Callable[[World], float] = 300.0
    patience: float | None = None  # seconds it tries while a part does not answer; None means `World.patience`
    explain: Callable[[World, UUID], str] | None = None


Fail = Callable[[World, UUID, AutovibeError, str], None]
"""Marks the rows of a failed operation; the text says what is still to be cleaned up, if anything is. Idempotent."""


@dataclass(frozen=True)
class Workflow:
    """`heeds_wanted`: it backs out when the machine's `wanted` says that it is to be terminated."""

    steps: tuple[Step, ...]
    fail: Fail
    heeds_wanted: bool = False


class Repeat(Exception):
    """A step raises it to have the workflow go on from an earlier step; the step counts how often."""

    def __init__(self, step: str) -> None:
        self.step = step
        super().__init__(step)


def carry_out(durable: Durable, world: World, workflow: Workflow, operation_uuid: UUID) -> None:
    """Run the workflow of one operation to its end. Raises only Parked."""
    number = 0
    while number < len(workflow.steps):
        step = workflow.steps[number]
        outcome: dict[str, Any] = durable.step(
            step.name, partial(_attempt, durable, world, workflow, number, operation_uuid)
        )
        if "error" in outcome:
            _back_out(durable, world, workflow, number, operation_uuid, AutovibeError.from_dict(outcome["error"]))
            return
        if "repeat" in outcome:
            number = next(i for i, earlier in enumerate(workflow.steps) if earlier.name == outcome["repeat"])
        else:
            number += 1


def _attempt(durable: Durable, world: World, workflow: Workflow, number: int, operation_uuid: UUID) -> dict[str, Any]:
    step, began = workflow.steps[number], time.monotonic()
    with trace.about(operation=operation_uuid):
        try:
            with contained(f"step '{step.name}' of {operation_uuid}", (Repeat,)):
                _persist(durable, world, workflow, number, operation_uuid)
        except Repeat as repeat:
            return {"repeat": repeat.step}
        except AutovibeError as error:
            _log.info("Step '%s' of %s failed: %s %s", step.name, operation_uuid, error.message, error.log_detail)
            return {"error": error.to_dict()}
        seconds = time.monotonic() - began
        _log.debug("Step '%s' of %s is done.", step.name, operation_uuid, extra={"duration": seconds})
    return {}


def _persist(durable: Durable, world: World, workflow: Workflow, number: int, operation_uuid: UUID) -> None:
    """Call the step until it is done. Raises what it fails with, or DeadlineExceeded."""
    step = workflow.steps[number]
    allowed = step.deadline(world) if callable(step.deadline) else step.deadline
    begun_at, silent_since = 0.0, 0.0
    retry = _FIRST_RETRY
    while True:
        try:
            if not begun_at:
                begun_at = time.monotonic() - _begin(world, workflow, number, operation_uuid)
            elif workflow.heeds_wanted:
                _heed(world, operation_uuid)
            step.do(world, operation_uuid)
        except NotYet as not_yet:
            silent_since, retry = 0.0, _FIRST_RETRY
            if time.monotonic() - begun_at >= allowed:
                raise DeadlineExceeded(
                    f"Step '{step.name}' gave up after {allowed:g} seconds: {str(not_yet).rstrip('.')}."
                    f"{_explained(step, world, operation_uuid)}",
                    details={"step": step.name, "seconds": allowed},
                ) from not_yet
            durable.wait(_PAUSE)
        except Unavailable as error:
            moment = time.monotonic()
            silent_since = silent_since or moment
            limit = silent_since + (world.patience if step.patience is None else step.patience)
            if moment >= min(limit, (begun_at or moment) + allowed):
                raise
            _log.info("Step '%s' of %s tries again: %s", step.name, operation_uuid, error.message)
            durable.wait(retry)
            retry = min(retry * 2, _LAST_RETRY)
        else:
            return


def _explained(step: Step, world: World, operation_uuid: UUID) -> str:
    if step.explain is None:
        return ""
    try:
        return " " + step.explain(world, operation_uuid)
    except AutovibeError as error:
        return f" ({error.message})"


def _begin(world: World, workflow: Workflow, number: int, operation_uuid: UUID) -> float:
    """Record that the step begins. Returns how many seconds ago it began, when it was begun before a crash.

    A step that is none of the operation's own `steps` has nothing to do, and nobody is told of it.
    """
    step = workflow.steps[number]
    with world.store.transaction() as session:
        operation = rows.get(session, Operation, operation_uuid)
        trace.machine.set(str(operation.machine_uuid or operation.object_uuid))
        if OperationStatus(operation.status).is_final:
            return 0.0
        machine = _machine_of(session, operation) if workflow.heeds_wanted else None
        if machine is not None:
            _refuse_unwanted(machine)
        steps = operation.steps or [known.name for known in workflow.steps]
        if step.name not in steps:
            return 0.0
        if operation.step == step.name:
            return _begun_ago(session, operation)
        operation.status = OperationStatus.running
        operation.step = step.name
        operation.progress = f"{steps.index(step.name) + 1} of {len(steps)}: {step.name}"
        session.add(operation)
        if machine is not None:
            machine.progress = operation.progress
            session.add(machine)
        _tell(session, "operation.step", operation, step=step.name)
    return 0.0


def _begun_ago(session: Session, operation: Operation) -> float:
    statement = (
        select(Event)
        .where(Event.object_uuid == operation.uuid, Event.kind == "operation.step")
        .order_by(col(Event.id).desc())
        .limit(1)
    )
    event = session.exec(statement).first()
    return max(0.0, (now() - event.created_at).total_seconds()) if event is not None else 0.0


def _heed(world: World, operation_uuid: UUID) -> None:
    with world.store.reading() as session:
        machine = _machine_of(session, rows.get(session, Operation, operation_uuid))
    if machine is not None:
        _refuse_unwanted(machine)


def _machine_of(session: Session, operation: Operation) -> Machine | None:
    return session.get(Machine, operation.machine_uuid or operation.object_uuid)


def _tell(session: Session, kind: str, operation: Operation, **body: str) -> None:
    """Record an event of the operation, which is its machine's and its project's as well."""
    machine = _machine_of(session, operation)
    if machine is not None:
        body["machine_uuid"] = str(machine.uuid)
    project = machine.project_uuid if machine is not None else None
    rows.record(session, kind, operation.uuid, project, operation=operation.kind, **body)


def _refuse_unwanted(machine: Machine) -> None:
    if machine.wanted == WANTED_TERMINATED:
        raise unwanted(machine)


def unwanted(machine: Machine) -> Conflict:
    """What a workflow fails with whose machine is to be terminated."""
    return Conflict(f"Machine '{machine.name}' was terminated while it was spawning.")


# Backing out


def _back_out(
    durable: Durable, world: World, workflow: Workflow, number: int, operation_uuid: UUID, error: AutovibeError
) -> None:
    left: list[str] = []
    for step in reversed(workflow.steps[: number + 1]):
        if step.undo is not None:
            left += durable.step(
                f"undo {step.name}", partial(_undo, durable, world, workflow, step, operation_uuid, error)
            )
    durable.step("fail", partial(_fail, durable, world, workflow, operation_uuid, error, " ".join(left)))


def _undo(
    durable: Durable, world: World, workflow: Workflow, step: Step, operation_uuid: UUID, error: AutovibeError
) -> list[str]:
    """Undo one step. Returns what could not be undone, as sentences."""
    assert step.undo is not None  # noqa: S101 - the caller looked
    begun_at, failures, retry, is_announced = time.monotonic(), 0, _FIRST_RETRY, False
    while True:
        try:
            with trace.about(operation=operation_uuid), contained(f"undoing step '{step.name}' of {operation_uuid}"):
                step.undo(world, operation_uuid)
        except NotYet as not_yet:
            if time.monotonic() - begun_at > _UNDO_PATIENCE:
                return [f"Step '{step.name}' could not be undone: {str(not_yet).rstrip('.')}."]
            durable.wait(_PAUSE)
        except Unavailable as unavailable:
            if not is_announced:
                pending = f"Step '{step.name}' is still to be undone, and tried until that works: {unavailable.message}"
                is_announced = _announce(world, workflow, operation_uuid, error, pending)
            durable.wait(retry)
            retry = min(retry * 2, _LAST_RETRY)
        except AutovibeError as failure:
            failures += 1
            _log.warning("Undoing '%s' of %s failed: %s", step.name, operation_uuid, failure.message)
            if failures >= _UNDO_ATTEMPTS:
                return [f"Step '{step.name}' could not be undone: {failure.message}"]
            durable.wait(retry)
            retry = min(retry * 2, _LAST_RETRY)
        else:
            return []


def _announce(world: World, workflow: Workflow, operation_uuid: UUID, error: AutovibeError, pending: str) -> bool:
    try:
        with contained(f"the announcement of the failure of {operation_uuid}"):
            workflow.fail(world, operation_uuid, error, pending)
    except AutovibeError:
        return False
    return True


def _fail(
    durable: Durable, world: World, workflow: Workflow, operation_uuid: UUID, error: AutovibeError, left: str
) -> None:
    retry, fail = _FIRST_RETRY, workflow.fail
    while True:
        try:
            with trace.about(operation=operation_uuid), contained(f"the end of {operation_uuid}"):
                return fail(world, operation_uuid, error, left)
        except Unavailable:
            durable.wait(retry)
            retry = min(retry * 2, _LAST_RETRY)
        except AutovibeError:
            if fail is end:
                raise
            fail = end  # at least who waits for the operation learns of it


# The operation's end


def end(world: World, operation_uuid: UUID, error: AutovibeError | None, pending: str = "") -> None:
    """Mark the operation alone."""
    with world.store.transaction() as session:
        end_in(session, operation_uuid, error, pending)


def end_in(session: Session, operation_uuid: UUID, error: AutovibeError | None, pending: str = "") -> bool:
    """Mark the operation within a transaction; False when it had ended before (then only what is pending changes)."""
    operation = rows.get(session, Operation, operation_uuid)
    is_first = not OperationStatus(operation.status).is_final
    if is_first:
        operation.status = OperationStatus.failed if error else OperationStatus.succeeded
        operation.error = error.to_dict() if error else None
        operation.finished_at = now()
    operation.progress = pending
    session.add(operation)
    _tell(session, "operation.status", operation, status=str(operation.status))
    return is_first
