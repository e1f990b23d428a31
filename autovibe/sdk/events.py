"""Events over HTTP: what changed, by pages or as it happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from autovibe import schemas
from autovibe.errors import InternalError, RateLimited, Unavailable
from autovibe.sdk.connection import Connection, canonical
from autovibe.sdk.streaming import Frame, Frames

PATH = "/events"
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 15.0

Objects = UUID | str | Iterable[UUID | str] | None
Kinds = str | Iterable[str] | None


class Events:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(
        self,
        *,
        project_uuid: UUID | str | None = None,
        object_uuid: Objects = None,
        kind: Kinds = None,
        since: int | None = None,
        limit: int | None = None,
    ) -> schemas.EventPage:
        """One page of events: the last ones, or those behind the id `since`, which is `next` of the page before."""
        wanted = _wanted(project_uuid, object_uuid, kind)
        return self._connection.get(schemas.EventPage, PATH, since=since, limit=limit, **wanted)

    def stream(
        self,
        *,
        project_uuid: UUID | str | None = None,
        object_uuid: Objects = None,
        kind: Kinds = None,
        since: int | None = None,
    ) -> EventStream:
        """Events as they happen, or first those that are kept behind the id `since`. `kind`: "machine.status", or
        "machine" for all of a noun's; `machine.output` comes only when it is asked for."""
        return EventStream(self._connection, _wanted(project_uuid, object_uuid, kind), since)


class EventStream(Iterator[schemas.Event]):
    """An endless iterator; `close`, from any thread, ends it. Waits for a Hub that has gone away, and goes on where it
    was; each event comes once. An event of kind "reset" says that some were missed, and `body` which.

    The first event raises Unavailable, Unauthorized, Forbidden or NotFound when the stream cannot be had; later ones
    raise only the last three.
    """

    def __init__(
        self,
        connection: Connection,
        wanted: dict[str, Any],
        since: int | None,
        hear: Callable[[], None] = lambda: None,
    ) -> None:
        """`hear` is called whenever the Hub says anything, also that it listens and that it lives."""
        self._connection, self._wanted, self._hear = connection, wanted, hear
        self._last_id = since
        self._early: set[int] = set()  # heard already, and above the id to come back with
        self._pause = _FIRST_PAUSE_SECONDS
        self._frames: Frames | None = None
        self._coming: Iterator[Frame] | None = None
        self._is_known = False
        self._closed = threading.Event()

    @property
    def last_id(self) -> int | None:
        """Where another stream can go on: its `since`. None until something was heard."""
        return self._last_id

    def open(self) -> None:
        """Connect, unless that was done: nothing that happens after this is missed."""
        if self._coming is None and not self._closed.is_set():
            self._frames = self._connection.stream(PATH, last_id=self._last_id, **self._wanted)
            self._coming, self._is_known = iter(self._frames), True
            if self._closed.is_set():
                self._frames.close()

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> schemas.Event:
        while not self._closed.is_set():
            frame = self._next_frame()
            if frame is not None and (event := self._accept(frame)) is not None:
                return event
        raise StopIteration

    def _next_frame(self) -> Frame | None:
        """None when there is none now and the connection is to be made anew."""
        try:
            self.open()
        except (Unavailable, RateLimited):
            if not self._is_known:
                raise
        found = next(self._coming, None) if self._coming is not None else None
        if found is None:
            self._coming = self._frames = None
            self._closed.wait(self._pause)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        return found

    def _accept(self, frame: Frame) -> schemas.Event | None:
        self._pause = _FIRST_PAUSE_SECONDS
        self._hear()
        if frame.id.isdecimal():
            self._last_id = int(frame.id)
            self._early = {id for id in self._early if id > self._last_id}
        if not frame.data or frame.name == "dropped":
            return None
        try:
            event = schemas.Event.model_validate_json(frame.data)
        except ValidationError as error:
            raise InternalError("The Hub sent what is no event.", log_detail=str(error)) from error
        if event.id in self._early:
            return None
        if event.id > (self._last_id or 0):
            self._early.add(event.id)
        return event

    def close(self) -> None:
        self._closed.set()
        if (frames := self._frames) is not None:
            frames.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wanted(project_uuid: UUID | str | None, object_uuid: Objects, kind: Kinds) -> dict[str, Any]:
    objects = [object_uuid] if isinstance(object_uuid, UUID | str) else list(object_uuid or ())
    return {
        "project_uuid": None if project_uuid is None else canonical(project_uuid),
        "object_uuid": [canonical(uuid) for uuid in objects] or None,
        "kind": ([kind] if isinstance(kind, str) else list(kind or ())) or None,
    }
