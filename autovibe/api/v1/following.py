"""A machine's output as a stream, from the rows that are kept, woken by events. Async because bytes stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from autovibe import schemas
from autovibe.hub import Hub, output

_LOOK_AGAIN_SECONDS = 10.0  # also how often an event stream says that it lives


async def chunks(hub: Hub, machine: UUID, offset: int, request: Request) -> AsyncIterator[schemas.LogChunk]:
    """Every chunk from `offset` on as it comes, an empty one now and then while none does, until the output is over."""
    with hub.events.watch(machine) as watch:
        while True:
            chunk = await run_in_threadpool(output.chunk, hub, machine, offset)
            offset = chunk.next_offset
            if chunk.text or chunk.finished:
                yield chunk
            if chunk.finished or watch.is_closed or await request.is_disconnected():
                return
            if not chunk.text and not await watch.changed(_LOOK_AGAIN_SECONDS):
                yield chunk


async def text(stream: AsyncIterator[schemas.LogChunk]) -> AsyncIterator[str]:
    async for chunk in stream:
        if chunk.text:
            yield chunk.text


async def events(stream: AsyncIterator[schemas.LogChunk]) -> AsyncIterator[str]:
    """Server-sent events: the data is a LogChunk, the id where to go on (`Last-Event-ID`)."""
    async for chunk in stream:
        if chunk.text or chunk.finished:
            name = "end" if chunk.finished and not chunk.text else "output"
            yield f"id: {chunk.next_offset}\nevent: {name}\ndata: {chunk.model_dump_json()}\n\n"
        else:
            yield ": alive\n\n"
