"""Waiting over HTTP, until a deadline and across a restart of the Hub: by the Hub's event stream, else by long polls.

Both keep well below the Hub's rate limit of 100 requests a minute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar
from uuid import UUID

from autovibe import schemas
from autovibe.errors import AutovibeError, DeadlineExceeded, Unavailable
from autovibe.sdk.connection import Connection
from autovibe.sdk.events import EventStream

OUTAGE_SECONDS = 60.0
"""How long a wait goes on without an answer: the Hub may be restarting, and its work goes on when it is back."""
POLL_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 5.0
"""What changes without an event (how far a step is) is seen by who watches at least so often."""
REST_SECONDS = 1.0
"""Between two looks at what goes on and on; its end is looked at when it comes."""
STREAM_SECONDS = 3.0
"""How long a stream may take to say that it listens; one that a proxy holds back never does."""
LONG_POLL_SECONDS = 25.0
SHORTEST_POLL_SECONDS = 0.2
"""Whatever answers at once is not asked in a tight loop."""
FREE_POLLS = 20
POLLS_APART_SECONDS = 2.0
"""A wait that has asked so often asks at most every two seconds: several waits must fit into one rate limit."""

Watch = Callable[[schemas.Operation], None]
"""Called with an operation whenever it was looked at; `step`, `steps` and `progress` tell how far it is."""

Answer = TypeVar("Answer")


class Deadline:
    """The end of a wait; `seconds` None: it has none."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds
        self._polls, self._asked_at = 0, 0.0

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def slice(self, seconds: float) -> float:
        """`seconds`, or what is left of the wait."""
        left = self.left()
        return seconds if left is None else min(seconds, left)

    def check(self, what: str) -> None:
        if self._end is not None and time.monotonic() >= self._end:
            raise DeadlineExceeded(f"Waited {self._seconds:g} s for {what}.")

    def poll(self, ask: Callable[..., Answer], *arguments: Any, **options: Any) -> Answer:
        """Ask once, and again while nobody answers, for `OUTAGE_SECONDS` or until the deadline; last a moment."""
        self._polls += 1
        if self._polls > FREE_POLLS:
            time.sleep(self.slice(max(0.0, self._asked_at + POLLS_APART_SECONDS - time.monotonic())))
        started = self._asked_at = time.monotonic()
        give_up = started + self.slice(OUTAGE_SECONDS)
        while True:
            try:
                answer = ask(*arguments, **options)
                break
            except Unavailable as error:
                # A class below it is the Hub's own answer about something else that is not there.
                if type(error) is not Unavailable or time.monotonic() >= give_up:
                    raise
            time.sleep(0.5)
        if options and time.monotonic() - started < SHORTEST_POLL_SECONDS / 2:
            time.sleep(self.slice(SHORTEST_POLL_SECONDS))
        return answer


class Changes:
    """Looks at objects again when something has changed. Use with `with`: it may hold a connection and a thread.

    The stream is begun by the first `look`, so that what has ended already costs one request.
    """

    def __init__(self, connection: Connection, deadline: Deadline, *objects: UUID) -> None:
        self._connection, self._deadline, self._objects = connection, deadline, objects
        self._stream: EventStream | None = None
        self._news = threading.Condition()
        self._is_begun = self._is_live = self._has_news = self._has_ended = False
        self._looked_at = 0.0

    def look(self, ask: Callable[[float | None], Answer], seconds: float, poll_seconds: float) -> Answer:
        """Ask when something changed, or when `seconds` have passed. Without a stream `ask` is given the seconds it may
        wait for a change, `poll_seconds`."""
        if not self._is_begun:
            self._is_begun = True
            self._begin()
            if self._is_live:  # what happened before the stream began
                return self._ask(ask, None)
        if not self._is_live:
            return self._ask(ask, round(self._deadline.slice(poll_seconds), 1))
        self._await_news(self._deadline.slice(seconds))
        return self._ask(ask, None)

    def _ask(self, ask: Callable[[float | None], Answer], wait: float | None) -> Answer:
        with self._news:
            self._has_news = self._has_ended = False
        options = {} if wait is None else {"wait": wait}
        answer = self._deadline.poll(lambda wait=None: ask(wait), **options)
        self._looked_at = time.monotonic()
        return answer

    def _begin(self) -> None:
        if self._connection.has_no_events:
            return
        stream = EventStream(self._connection, {"object_uuid": list(map(str, self._objects))}, None, self._hear)
        try:
            stream.open()
        except Unavailable:
            return
        except AutovibeError:  # an older Hub, a key that may not, something between: none of that changes soon
            self._connection.has_no_events = True
            return
        self._stream = stream
        threading.Thread(target=self._read, args=(stream,), name="events", daemon=True).start()
        with self._news:
            self._news.wait_for(lambda: self._is_live, self._deadline.slice(STREAM_SECONDS))
        if not self._is_live:
            self._connection.has_no_events = True
            stream.close()

    def _read(self, stream: EventStream) -> None:
        try:
            for event in stream:
                with self._news:
                    self._has_news = True
                    self._has_ended = self._has_ended or event.kind.endswith(".status")
                    self._news.notify_all()
        except AutovibeError:
            pass  # the key is no longer good, maybe: who asks hears of it
        with self._news:
            self._is_live = False
            self._news.notify_all()

    def _hear(self) -> None:
        with self._news:
            self._is_live = True
            self._news.notify_all()

    def _await_news(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._news:
            while self._is_live and not self._has_ended and (left := end - time.monotonic()) > 0:
                rest = self._looked_at + REST_SECONDS - time.monotonic()
                if self._has_news and rest <= 0:
                    return
                self._news.wait(min(left, rest) if self._has_news else left)

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()


class Page(Protocol):
    next_offset: int | None


SomePage = TypeVar("SomePage", bound=Page)


def each(get: Callable[[int], SomePage], items: Callable[[SomePage], Sequence[Any]]) -> Iterator[Any]:
    """Walk through pages. A row that a concurrent insert pushed to the next page is not given twice."""
    offset: int | None = 0
    seen: set[UUID] = set()
    while offset is not None:
        page = get(offset)
        for item in items(page):
            if item.uuid not in seen:
                seen.add(item.uuid)
                yield item
        offset = page.next_offset
