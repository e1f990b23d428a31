"""/machines"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from autovibe import schemas
from autovibe.api.deps import (
    ActorHere,
    CutHere,
    HubHere,
    OnceHere,
    Wait,
    WaitFor,
    converse,
    large,
    seconds_to_wait,
    until,
)
from autovibe.api.guard import Guarded, needs
from autovibe.api.v1 import following
from autovibe.hub import blocking, checkpoints, machines, output, plans, usage
from autovibe.types import CheckpointStatus, MachineStatus, Name, Role

router = APIRouter(tags=["machines"], route_class=Guarded)


DryRun = Annotated[
    bool,
    Query(
        description="Answer 200 with the plan: what it would use, where, how, and what stands against it; do nothing."
    ),
]
PLANNED: dict[int | str, dict[str, Any]] = {200: {"model": schemas.SpawnPlan, "description": "The plan of a dry run"}}


@router.post(
    "/machines", status_code=201, response_model=schemas.Machine, responses=PLANNED, description=plans.DESCRIPTION
)
@needs(Role.operator, narrows=True, is_heavy=True)
async def spawn(
    hub: HubHere,
    actor: ActorHere,
    once: OnceHere,
    order: schemas.MachineOrder,
    dry_run: DryRun = False,
    wait: Wait = None,
    wait_for: WaitFor = None,
) -> Any:
    """Spawn a machine; answers at once with status `spawning`, or with `wait` when it is reachable or has failed."""
    if dry_run:
        return large(await run_in_threadpool(plans.plan, hub, actor, order))
    machine = await run_in_threadpool(machines.spawn, hub, actor, order, once)
    return large(await awaited(hub, machine, wait, wait_for), 201)


async def awaited(
    hub: HubHere, machine: schemas.Machine, wait: float | None, wait_for: Literal["ready", "finished"] | None
) -> schemas.Machine:
    """The machine when it is as far as `wait_for` says, or as it is when the seconds have passed."""
    return await until(
        hub,
        [machine.uuid],
        lambda: machines.show(hub, machine.uuid),
        _has_finished if wait_for == "finished" else _is_up,
        seconds_to_wait(wait, wait_for),
        machine,
    )


def _is_up(machine: schemas.Machine) -> bool:
    return machine.status != MachineStatus.spawning


def _has_finished(machine: schemas.Machine) -> bool:
    if machine.status.is_final or machine.finished_at is not None:
        return True
    return machine.prompt is None and machine.status != MachineStatus.spawning


@router.get("/machines", response_model=schemas.MachinePage)
@needs(Role.viewer, narrows=True)
def index(
    hub: HubHere,
    actor: ActorHere,
    part: CutHere,
    status: Annotated[list[MachineStatus] | None, Query(description="Only these; may be given several times.")] = None,
    project_uuid: UUID | None = None,
    name: Name | None = None,
) -> Any:
    """List machines, last spawned first."""
    return large(machines.index(hub, actor, part, statuses=status or (), project=project_uuid, name=name))


@router.get("/machines/{machine_uuid}", response_model=schemas.Machine)
@needs(Role.viewer, machine_uuid="machine", own_machine=True)
async def show(hub: HubHere, machine_uuid: UUID, wait: Wait = None, wait_for: WaitFor = None) -> Any:
    """Show a machine; with `wait`, when it is reachable (or its prompt has ended), or the seconds have passed."""
    machine = await run_in_threadpool(machines.show, hub, machine_uuid)
    return large(await awaited(hub, machine, wait, wait_for))


@router.post("/machines/{machine_uuid}/terminate")
@needs(Role.operator, machine_uuid="machine")
async def terminate(
    hub: HubHere,
    actor: ActorHere,
    once: OnceHere,
    machine_uuid: UUID,
    order: schemas.TerminateOrder | None = None,
    wait: Wait = None,
) -> schemas.TerminateReply:
    """End a machine, with a final checkpoint where asked. A machine that has ended is answered as it is.

    Where the final checkpoint fails the machine goes on; its operation says why.
    """
    await run_in_threadpool(machines.terminate, hub, actor, machine_uuid, order or schemas.TerminateOrder(), once)
    machine, _ = await until(
        hub,
        [machine_uuid],
        lambda: machines.show_terminated(hub, machine_uuid),
        lambda found: found[1],
        seconds_to_wait(wait),
    )
    return machine


@router.post("/machines/{machine_uuid}/checkpoint", status_code=201)
@needs(Role.operator, machine_uuid="machine", own_machine=True, is_heavy=True)
async def checkpoint(
    hub: HubHere,
    actor: ActorHere,
    once: OnceHere,
    machine_uuid: UUID,
    order: schemas.CheckpointOrder | None = None,
    wait: Wait = None,
) -> schemas.Checkpoint:
    """Checkpoint a machine; answers at once with status `creating`, or with `wait` when it is ready or has failed."""
    made = await run_in_threadpool(
        checkpoints.create, hub, actor, machine_uuid, order or schemas.CheckpointOrder(), once
    )
    return await until(
        hub,
        [made.uuid],
        lambda: checkpoints.show(hub, made.uuid),
        lambda shown: shown.status != CheckpointStatus.creating,
        seconds_to_wait(wait),
        made,
    )


@router.post("/machines/{machine_uuid}/resume")
@needs(Role.operator, machine_uuid="machine")
async def resume(
    hub: HubHere,
    actor: ActorHere,
    once: OnceHere,
    machine_uuid: UUID,
    order: schemas.ResumeOrder | None = None,
    wait: Wait = None,
) -> schemas.Machine:
    """Let a machine that was blocked at a limit go on, where it fits into its budgets again.

    Answers at once with status `restoring`, or with `wait` when it runs, or is blocked again because that failed.
    """
    await run_in_threadpool(blocking.resume, hub, actor, machine_uuid, order, once)
    return await until(
        hub,
        [machine_uuid],
        lambda: machines.show(hub, machine_uuid),
        lambda shown: shown.status != MachineStatus.restoring,
        seconds_to_wait(wait),
    )


@router.post("/machines/{machine_uuid}/usage")
@needs(Role.operator, machine_uuid="machine", own_machine=True)
def report_usage(
    hub: HubHere, actor: ActorHere, once: OnceHere, machine_uuid: UUID, order: schemas.UsageOrder
) -> schemas.UsageReply:
    """Report model calls and money a machine used, with its own key from inside, or an operator's.

    They are charged against machine, project and pool at once; where they do not fit nothing is charged (409), and the
    machine is blocked.
    """
    return usage.report(hub, actor, machine_uuid, order, once)


@router.post("/machines/{machine_uuid}/exec")
@needs(Role.operator, machine_uuid="machine")
async def exec_in_guest(hub: HubHere, machine_uuid: UUID, order: schemas.ExecOrder) -> schemas.ExecResult:
    """Run a command in the guest and answer its output; a time-out answers exit status 124."""
    await until(
        hub,
        [machine_uuid],
        lambda: machines.can_exec(hub, machine_uuid),
        lambda is_free: is_free,
        order.timeout_seconds,
    )
    return await converse(hub, lambda: machines.exec(hub, machine_uuid, order), order.timeout_seconds)


@router.get("/machines/{machine_uuid}/ssh")
@needs(Role.viewer, machine_uuid="machine")
def ssh(hub: HubHere, machine_uuid: UUID) -> schemas.MachineSsh:
    """Where OpenSSH reaches the machine, and its pinned host key."""
    return machines.ssh(hub, machine_uuid)


@router.get(
    "/machines/{machine_uuid}/logs",
    response_model=schemas.LogChunk,
    responses={200: {"content": {"text/plain": {}, "text/event-stream": {}}}},
)
@needs(Role.viewer, machine_uuid="machine")
async def logs(
    request: Request,
    hub: HubHere,
    machine_uuid: UUID,
    offset: Annotated[int, Query(ge=0, le=2**62, description="The byte of the output to begin at.")] = 0,
    limit: Annotated[int, Query(ge=1, le=output.CHUNK_BYTES, description="Bytes of one chunk.")] = output.CHUNK_BYTES,
    follow: Annotated[bool, Query(description="A stream of what is there and comes, until the prompt ends.")] = False,
    wait: Wait = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[str, Header(description="Where an event stream was cut off.")] = "",
) -> Any:
    """The prompt's output: one chunk as JSON, or with `follow` a stream (server-sent events where Accept asks)."""
    if not follow:
        return await until(
            hub,
            [machine_uuid],
            lambda: output.chunk(hub, machine_uuid, offset, limit),
            lambda chunk: bool(chunk.text) or chunk.finished,
            seconds_to_wait(wait),
        )
    is_sse = "text/event-stream" in accept.lower()
    begin = int(last_event_id) if is_sse and last_event_id.isdecimal() and len(last_event_id) < 19 else offset
    await run_in_threadpool(machines.show, hub, machine_uuid)  # an unknown machine is a 404, not an empty stream
    chunks = following.chunks(hub, machine_uuid, begin, request)
    return StreamingResponse(
        following.events(chunks) if is_sse else following.text(chunks),
        media_type="text/event-stream" if is_sse else "text/plain; charset=utf-8",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
