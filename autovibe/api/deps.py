"""What routes share: the hub, the actor, paging, idempotency keys, and waiting without holding a thread."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar, cast
from uuid import UUID

from fastapi import Depends, Header, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from autovibe.domain.actor import Actor
from autovibe.errors import InvalidRequest, LimitExceeded
from autovibe.hub import Hub, periods
from autovibe.hub.operations import Once
from autovibe.hub.pages import Cut

Answer = TypeVar("Answer")

LONGEST_WAIT_SECONDS = 300
_LOOK_AGAIN_SECONDS = 5.0  # a wake-up that got lost costs no more than this


# As coroutines although they wait for nothing: the framework would run each plain function in a thread.


async def _hub(request: Request) -> Hub:
    return cast(Hub, request.app.state.hub)


async def _actor(request: Request) -> Actor:
    return cast(Actor, request.state.actor)


async def _cut(
    limit: Annotated[int, Query(ge=1, le=200)] = 50, offset: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0
) -> Cut:
    return Cut(limit, offset)


_Named = Annotated[periods.Period | None, Query(description="Of UTC days.")]
_From = Annotated[
    str | None, Query(alias="from", max_length=64, description="RFC 3339 date or moment, instead of a period.")
]
_To = Annotated[
    str | None, Query(alias="to", max_length=64, description="The same; a date is within. Without it: until now.")
]


async def _week(period: _Named = None, since: _From = None, until: _To = None) -> periods.Window:
    return periods.window(period, since, until, default="last_7_days")


async def _month(period: _Named = None, since: _From = None, until: _To = None) -> periods.Window:
    return periods.window(period, since, until, default="last_30_days")


async def _once(
    request: Request,
    idempotency_key: Annotated[
        str | None, Header(description="A repeat under the same key answers the first one's object.")
    ] = None,
) -> Once | None:
    """The key with a hash of method, path and body; the body counts by its values, not by its spelling."""
    if idempotency_key is None:
        return None
    if not 1 <= len(idempotency_key) <= 255 or not idempotency_key.isascii() or not idempotency_key.isprintable():
        raise InvalidRequest("An Idempotency-Key has 1 to 255 printable ASCII characters.")
    body = await request.body()
    with contextlib.suppress(ValueError, RecursionError):  # no JSON, or too deep for it: its bytes count
        body = json.dumps(await request.json(), sort_keys=True).encode()
    start = f"{request.method} {request.url.path}\n".encode()
    return Once(idempotency_key, hashlib.sha256(start + body).hexdigest())


HubHere = Annotated[Hub, Depends(_hub)]
ActorHere = Annotated[Actor, Depends(_actor)]
CutHere = Annotated[Cut, Depends(_cut)]
OnceHere = Annotated[Once | None, Depends(_once)]
WeekHere = Annotated[periods.Window, Depends(_week)]
MonthHere = Annotated[periods.Window, Depends(_month)]
Wait = Annotated[
    float | None,
    Query(ge=0, le=LONGEST_WAIT_SECONDS, allow_inf_nan=False, description="Seconds the answer may wait for the end."),
]
WaitFor = Annotated[
    Literal["ready", "finished"] | None,
    Query(
        description="ready: it is reachable (default). finished: its prompt has ended; then `wait` is 300 by default."
    ),
]


def seconds_to_wait(wait: float | None, wait_for: str | None = None) -> float:
    return wait if wait is not None else float(LONGEST_WAIT_SECONDS) if wait_for is not None else 0.0


async def until(
    hub: Hub,
    objects: Sequence[UUID | None],
    look: Callable[[], Answer],
    is_there: Callable[[Answer], bool],
    seconds: float,
    known: Answer | None = None,
) -> Answer:
    """Look, in a thread, whenever one of the objects changes, until the answer is there; the last answer at the end.

    `known` is the answer of this moment, which does where nobody waits. Between the looks nothing is held but a little
    memory. Ends early when the hub shuts down.
    """
    if known is not None and seconds <= 0:
        return known
    deadline = time.monotonic() + seconds
    with hub.events.watch(*objects) as watch:
        while True:
            answer = await run_in_threadpool(look)
            left = deadline - time.monotonic()
            if left <= 0 or watch.is_closed or is_there(answer):
                return answer
            await watch.changed(min(left, _LOOK_AGAIN_SECONDS))


def large(reply: BaseModel, status: int = 200) -> Response:
    """A reply of maybe 200,000 entries, written in the thread that made it and not a second time in the event loop."""
    return Response(reply.model_dump_json(), status, media_type="application/json")


async def converse(hub: Hub, verb: Callable[[], Answer], patience_seconds: float) -> Answer:
    """Run a verb that talks to a guest, maybe for long, in the threads kept for that; others are not held up.

    Raises LimitExceeded when none of these threads is free for so long; the verb is not begun then.
    """
    work = hub.conversations.submit(verb)
    waiting = asyncio.wrap_future(work)
    done, _ = await asyncio.wait([waiting], timeout=patience_seconds)
    if not done and work.cancel():
        raise LimitExceeded(
            f"The Hub runs as many commands in guests as it can, and none has ended for {patience_seconds:g} s; "
            "run fewer at a time, or try again."
        )
    return await waiting
