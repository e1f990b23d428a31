"""/events: what changes, as a page, or live. Async because bytes stream."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from autovibe import schemas
from autovibe.api.deps import ActorHere, HubHere
from autovibe.api.guard import Guarded, needs
from autovibe.domain.actor import hash_secret
from autovibe.errors import AutovibeError, InvalidRequest, Unauthorized
from autovibe.hub import Hub, history, rules
from autovibe.hub.feed import Listener
from autovibe.types import Role

router = APIRouter(tags=["events"], route_class=Guarded)

Kind = Annotated[str, Query(max_length=60, pattern=r"^[a-z_]+(\.[a-z_]+)*(\.\*)?$")]
Id = Annotated[int, Query(ge=0, le=2**63 - 1)]


@router.get(
    "/events",
    response_model=schemas.EventPage,
    responses={200: {"content": {"text/event-stream": {}}}},
)
@needs(Role.viewer, narrows=True)
async def index(
    hub: HubHere,
    actor: ActorHere,
    project_uuid: Annotated[UUID | None, Query(description="Only events of this project.")] = None,
    object_uuid: Annotated[
        list[UUID] | None, Query(max_length=100, description="Only events about these objects; operations too.")
    ] = None,
    kind: Annotated[
        list[Kind] | None, Query(max_length=50, description="machine.status, or machine for all; several times.")
    ] = None,
    since: Annotated[Id | None, Query(description="Only events behind this id; `next` of the page before.")] = None,
    last_event_id: Annotated[Id | None, Query(description="The same, for a stream.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events of one page.")] = 100,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    resume: Annotated[str, Header(alias="Last-Event-ID", description="Where a stream was cut off.")] = "",
) -> Any:
    """What changes, as a stream of server-sent events where Accept asks for text/event-stream, else a page of them.

    Events are kept for 7 days. A stream begins with what is kept behind `since` (or Last-Event-ID), or else with what
    comes; `machine.output` is left out unless `kind` names it or all of machine.
    """
    began = _resumed(resume) if resume else last_event_id if last_event_id is not None else since
    which = history.wanted(rules.own_project(actor, project_uuid), object_uuid or (), kind or ())
    if "text/event-stream" in accept.lower():
        return EventStream(hub, actor.name, which, began)
    known = await hub.events.feed.known()
    return await asyncio.to_thread(history.page, hub.store, which, began, known, limit)


def _resumed(given: str) -> int:
    if not (given.isascii() and given.isdecimal() and len(given) < 19):
        raise InvalidRequest(f"'{given[:40]}' is no id of an event; leave Last-Event-ID out to begin with what comes.")
    return int(given)


class EventStream(Response):
    """Writes what a listener hears for as long as the client, its key and the Hub stay."""

    media_type = "text/event-stream"

    def __init__(self, hub: Hub, name: str, which: history.Wanted, since: int | None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._hub, self._name, self._which, self._since = hub, name, which, since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get("authorization", "").partition(" ")[2].strip()

        async def is_allowed() -> bool:
            return await _still_opens(self._hub, key)

        cut = scope["state"].get("cut", _let_be)
        listener = Listener(self._hub.events.feed, self._which, self._since, self._name, is_allowed, cut)
        leaving = asyncio.create_task(_outlast(receive))
        leaving.add_done_callback(lambda _: listener.leave())
        try:
            is_begun = False
            async with aclosing(listener.chunks()) as chunks:
                async for chunk in chunks:
                    if not is_begun:
                        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        await send(start)
                        is_begun = True
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if is_begun:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()


async def _outlast(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _still_opens(hub: Hub, key: str) -> bool:
    """Whether the key that opened the stream was not revoked since. The streams of one key ask the database once."""
    if hub.keys.cached(key) is not None:
        return True
    asked = (id(hub), hash_secret(key))
    if asked not in _asking:
        _asking[asked] = asyncio.create_task(_opens(hub, key))
        _asking[asked].add_done_callback(lambda _: _asking.pop(asked, None))
    return await asyncio.shield(_asking[asked])


_asking: dict[tuple[int, str], asyncio.Task[bool]] = {}


async def _opens(hub: Hub, key: str) -> bool:
    try:
        await asyncio.to_thread(hub.keys.authenticate, key)
    except Unauthorized:
        return False
    except AutovibeError:  # the database does not answer; that ends no stream
        return True
    return True


def _let_be() -> None:
    """A server that cannot cut connections off."""
