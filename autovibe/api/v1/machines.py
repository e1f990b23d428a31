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
    seconds_to_wait,
    until,
)
from autovibe.api.v1 import following
from autovibe.hub import checkpoints, machines, output
from autovibe.types import CheckpointStatus, MachineStatus, Name

router = APIRouter(tags=["machines"])


@router.post("/machines", status_code=201)
async def spawn(
    hub: HubHere,
    actor: ActorHere,
    once: OnceHere,
    order: schemas.MachineOrder,
    wait: Wait = None,
    wait_for: WaitFor = None,
) -> schemas.Machine:
    """Spawn a machine; answers at once with status `spawning`, or with `wait` when it is reachable or has failed."""
    machine = await run_in_threadpool(machines.spawn, hub, actor, order, once)
    return await awaited(hub, machine, wait, wait_for)


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
    )


def _is_up(machine: schemas.Machine) -> bool:
    return machine.status != MachineStatus.spawning


def _has_finished(machine: schemas.Machine) -> bool:
    if machine.status.is_final or machine.finished_at is not None:
        return True
    return machine.prompt is None and machine.status != MachineStatus.spawning


@router.get("/machines")
def index(
    hub: HubHere,
    part: CutHere,
    status: Annotated[list[MachineStatus] | None, Query(description="Only these; may be given several times.")] = None,
    project_uuid: UUID | None = None,
    name: Name | None = None,
) -> schemas.MachinePage:
    """List machines, last spawned first."""
    return machines.index(hub, part, statuses=status or (), project=project_uuid, name=name)


@router.get("/machines/{machine_uuid}")
async def show(hub: HubHere, machine_uuid: UUID, wait: Wait = None, wait_for: WaitFor = None) -> schemas.Machine:
    """Show a machine; with `wait`, when it is reachable (or its prompt has ended), or the seconds have passed."""
    machine = await run_in_threadpool(machines.show, hub, machine_uuid)
    return await awaited(hub, machine, wait, wait_for) if seconds_to_wait(wait, wait_for) else machine


@router.post("/machines/{machine_uuid}/terminate")
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
    )


@router.post("/machines/{machine_uuid}/exec")
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
def ssh(hub: HubHere, machine_uuid: UUID) -> schemas.MachineSsh:
    """Where OpenSSH reaches the machine, and its pinned host key."""
    return machines.ssh(hub, machine_uuid)


@router.get(
    "/machines/{machine_uuid}/logs",
    response_model=schemas.LogChunk,
    responses={200: {"content": {"text/plain": {}, "text/event-stream": {}}}},
)
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
