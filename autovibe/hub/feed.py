"""Live events: each is read once a process and written out once, and every listener is handed the same bytes.

    reader's thread   publish: puts events in the order of their ids, and hands them to the event loop
    event loop        _deliver: into the channel of every filter that wants them; then wakes the channel's listeners
    a listener        chunks: what was kept first, where it comes back with an id; then what its channel has for it

A listener costs a place in its channel and a task that sleeps. When a channel has passed what it may keep (MOST_EVENTS,
MOST_BYTES), whoever has not taken the oldest loses its place. After a burst it reads on from what is kept and takes a
place again. But who is just not taking what is written to it, or lost its place a moment ago, is dropped: it is told
the id to come back with, and cut off when it does not even take that. Nobody else notices.

The id of a server-sent event is where a listener can come back without missing anything. Events are held until all with
lower ids are known (see `arrivals`), so it is the event's own. Where an open transaction would hold them for longer
than HELD_SECONDS they go out, under the id behind which nothing is missing: who comes back then hears some twice.

Waking a listener costs about 0.1 ms of the event loop, which answers requests as well. So after a round of wake-ups the
next begins when as long again has passed; with 2,000 listeners a round takes up what came in 0.4 s.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from autovibe import schemas
from autovibe.domain.columns import now
from autovibe.domain.distribution import Distribution
from autovibe.hub import history
from autovibe.hub.arrivals import Arrival
from autovibe.hub.history import Wanted, frame
from autovibe.store import Store

logger = logging.getLogger(__name__)

HELD_SECONDS = 1.0
MOST_EVENTS = 1000
MOST_BYTES = 256 * 1024
ALIVE_SECONDS = 15.0
ASKED_SECONDS = 5.0  # how often the key of a listener that hears something is looked at
BURST_SECONDS = 60.0  # who loses its place twice within so long is too slow
STUCK_SECONDS = 30.0  # who takes nothing for so long is cut off, also when not much is waiting
_LAST_WORDS_SECONDS = 3.0  # what a dropped listener has to take the event that tells it so
_WRITE_BYTES = 32 * 1024
_PAGE = 500
_ROUND = 50  # listeners woken before the event loop turns to others
_LISTENER_SECONDS = 0.0002  # of rest after a round, for each listener woken


@dataclass(frozen=True)
class Told:
    """An event on its way; `id` is where to come back after it. Written out where somebody listens."""

    event: Arrival
    id: int

    @cached_property
    def frame(self) -> bytes:
        return frame(self.event.kind, self.event.data, self.id)


class Channel:
    """What the listeners of one filter have not all taken yet, numbered from `begin` to `end`."""

    def __init__(self, which: Wanted) -> None:
        self.which = which
        self.listeners: set[Listener] = set()
        self.begin = self.end = 0
        self.has_news = False
        self._told: deque[Told] = deque()
        self._bytes = 0
        self._last: tuple[tuple[int, int, int], tuple[bytes, int, int]] | None = None

    def append(self, told: Told) -> list[Listener]:
        """Returns the listeners that were too late for what had to make room."""
        self._told.append(told)
        self._bytes += len(told.frame)
        self.end += 1
        self.has_news = True
        if len(self._told) <= MOST_EVENTS and self._bytes <= MOST_BYTES:
            return []
        while len(self._told) > MOST_EVENTS or (self._bytes > MOST_BYTES and len(self._told) > 1):
            self._shift()
        return [listener for listener in self.listeners if listener.cursor < self.begin]

    def trim(self) -> None:
        """Forget what everybody has taken."""
        taken = min((listener.cursor for listener in self.listeners), default=self.end)
        while self.begin < taken:
            self._shift()

    def _shift(self) -> None:
        self._bytes -= len(self._told.popleft().frame)
        self.begin += 1

    def slice(self, cursor: int, after: int) -> tuple[bytes, int, int]:
        """What stands from `cursor` on, as much as is written at once, without events up to `after`; the next cursor;
        and the id to come back with. Listeners that are equally far are handed the same bytes."""
        key = (cursor, self.end, after)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        parts: list[bytes] = []
        size, last, position = 0, 0, cursor
        for told in islice(self._told, cursor - self.begin, None):
            if parts and size + len(told.frame) > _WRITE_BYTES:
                break
            position += 1
            if told.event.id > after:
                parts.append(told.frame)
                size += len(told.frame)
                last = told.id
        found = (b"".join(parts), position, last)
        self._last = (key, found)
        return found


class Listener:
    """One client. `chunks` is what to write to it; `leave` may be called at any time, in the event loop.

    `is_allowed` is asked now and then whether its key still holds, `cut` ends a connection whose client takes nothing.
    """

    __slots__ = (
        "_before",
        "_is_allowed",
        "_is_woken",
        "_waiter",
        "after",
        "asked_at",
        "behind_at",
        "channel",
        "cursor",
        "cut",
        "feed",
        "is_alive_due",
        "is_dropped",
        "is_over",
        "is_writing",
        "last_id",
        "name",
        "sent_at",
        "since",
        "which",
    )

    def __init__(
        self,
        feed: Feed,
        which: Wanted,
        since: int | None,
        name: str,
        is_allowed: Callable[[], Awaitable[bool]],
        cut: Callable[[], None],
    ) -> None:
        self.feed, self.which, self.since, self.name, self.cut = feed, which, since, name, cut
        self.channel: Channel | None = None
        self.cursor = self.after = 0
        self.last_id = since or 0
        self.sent_at = self.asked_at = time.monotonic()
        self.behind_at = float("-inf")
        self.is_dropped = self.is_over = self.is_alive_due = self.is_writing = False
        self._is_allowed = is_allowed
        self._before = b""
        self._is_woken = False
        self._waiter: asyncio.Future[None] | None = None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, some at a time, until the client is gone, dropped, no longer allowed, or the hub stops.

        The first chunk says that nothing that comes from then on is missed.
        """
        self.feed.attach(self)
        try:
            async for chunk in self._all():
                self.is_writing, self.sent_at = True, time.monotonic()
                yield chunk
                self.is_writing, self.sent_at = False, time.monotonic()
        finally:
            self.feed.part(self)

    async def _all(self) -> AsyncIterator[bytes]:
        feed, since = self.feed, self.since
        await feed.known()
        if since is None:
            feed.join(self, None)
            self.last_id = feed.reached
            yield f": listening\nid: {self.last_id}\n\n".encode()
        else:
            yield b": listening\n\n"
            gap = await asyncio.to_thread(history.missed, feed.store, since)
            if gap is not None:
                self.last_id = gap.go_on
                body = {"first_id": gap.first, "last_id": gap.last, "message": gap.reason}
                yield _of_the_stream("reset", gap.go_on, body)
        while not self.is_over and not feed.is_closing:
            if self.channel is None and not self.is_dropped:
                async for chunk in self._kept():
                    yield chunk
            async for chunk in self._live():
                yield chunk

    async def _kept(self) -> AsyncIterator[bytes]:
        """What is kept behind the last id; at its end the listener has its place in a channel."""
        feed = self.feed
        while not self.is_over and not feed.is_closing and not feed.join(self, self.last_id):
            if not await self._may_go_on():
                self.is_over = True
                return
            until = feed.reached
            found = await asyncio.to_thread(history.between, feed.store, self.which, self.last_id, until, _PAGE)
            self.last_id = found[-1].id if len(found) == _PAGE else until
            if found:
                yield await asyncio.to_thread(history.frames, found)

    async def _live(self) -> AsyncIterator[bytes]:
        if self._before:
            before, self._before = self._before, b""
            yield before
        while not self.is_over and not self.feed.is_closing:
            if self.is_dropped:
                self.is_over = True
                body = {"resume_id": self.last_id, "message": "You read too slowly; come back with this id."}
                yield _of_the_stream("dropped", self.last_id, body)
                return
            if self.channel is None:
                return
            if not await self._may_go_on():
                self.is_over = True
                return
            if chunk := self._take():
                yield chunk
            elif self.is_alive_due:
                self.is_alive_due = False
                yield f": alive\nid: {max(self.last_id, self.feed.reached)}\n\n".encode()
            else:
                await self._changed()

    async def _may_go_on(self) -> bool:
        """Whether its key still opens the Hub, asked before anything is told, every few seconds at most."""
        moment = time.monotonic()
        if moment - self.asked_at < ASKED_SECONDS:
            return True
        self.asked_at = moment
        return await self._is_allowed()

    def _take(self) -> bytes:
        if self.channel is None or self.cursor == self.channel.end:
            return b""
        chunk, self.cursor, last = self.channel.slice(self.cursor, self.after)
        self.last_id = max(last, self.last_id)
        return chunk

    async def _changed(self) -> None:
        if not self._is_woken:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        self._is_woken = False

    def wake(self) -> None:
        self._is_woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def precede(self, chunk: bytes, after: int) -> None:
        """Begin with `chunk`, and leave out what the channel has up to `after`."""
        self._before, self.after = chunk, after

    def leave(self) -> None:
        self.is_over = True
        self.wake()


class Feed:
    """The live events of one process. Everything but `publish` and `close` runs in the event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.is_ready = self.is_closing = False
        self.reached = 0  # every event up to this id has been delivered, or was there before anybody listened
        self.lag = Distribution()
        self.dropped_count = 0
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: dict[int, tuple[float, Arrival]] = {}
        self._mark = 0
        self._published_early: list[Told] = []  # the reader's thread's
        self._early: Sequence[Told] = ()  # above `reached`, because they were held for too long
        self.listeners: set[Listener] = set()
        self._channels: dict[Wanted, Channel] = {}
        self._is_busy = False

    async def known(self) -> int:
        """The id up to which every event is known. Waits for the reader's first look."""
        while not self.is_ready and not self.is_closing:
            await asyncio.sleep(0.02)
        return self._mark

    # The reader's thread

    def publish(self, arrived: Sequence[Arrival], mark: int) -> None:
        """Hand on what became visible; `mark` is the id behind which nothing can come in any more."""
        moment = now()
        for event in arrived:
            self.lag.note(max(0.0, (moment - event.created_at).total_seconds()))
        released = self._in_order(arrived, mark)
        with self._lock:
            is_news = bool(released) or mark != self._mark
            self._mark, self.is_ready = mark, True
            early = [told for told in (*self._published_early, *released) if told.event.id > mark]
            self._published_early = early
            if self._loop is None or not is_news:
                return
            try:
                self._loop.call_soon_threadsafe(self._deliver, released, mark, early)
            except RuntimeError:  # the loop of a server that has ended
                self._loop = None

    def _in_order(self, arrived: Sequence[Arrival], mark: int) -> list[Told]:
        moment = time.monotonic()
        self._held.update({event.id: (moment, event) for event in arrived})
        released = []
        for id in sorted(self._held):
            since, event = self._held[id]
            if id <= mark or moment - since > HELD_SECONDS:
                del self._held[id]
                back = min(id, mark)
                released.append(told := Told(event, back))
                if self.listeners:
                    _ = told.frame  # here rather than in the event loop
        return released

    def close(self) -> None:
        """End every stream. Callable from any thread."""
        self.is_closing = True
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._wake_all)
            except RuntimeError:
                logger.debug("The event loop ended before its streams.")

    # The event loop

    def attach(self, listener: Listener) -> None:
        """Count the listener, and have events delivered to this event loop from now on."""
        self.listeners.add(listener)
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._loop is loop or self.is_closing:
                return
            self._loop = loop
            self.reached, self._early = self._mark, list(self._published_early)
        loop.call_later(ALIVE_SECONDS / 3, self._look_after, loop)

    def join(self, listener: Listener, since: int | None) -> bool:
        """Put the listener into its channel; False when there is more to be read behind `since` first."""
        if since is not None and since < self.reached:
            return False
        channel = self._channels.setdefault(listener.which, Channel(listener.which))
        listener.channel, listener.cursor = channel, channel.end
        channel.listeners.add(listener)
        if since is not None:
            early = [told.frame for told in self._early if told.event.id > since and channel.which.includes(told.event)]
            listener.precede(b"".join(early), since if since > self.reached else 0)
        return True

    def part(self, listener: Listener) -> None:
        """Forget the listener."""
        self.listeners.discard(listener)
        listener.is_over = True
        self._take_place(listener)

    def _take_place(self, listener: Listener) -> None:
        channel, listener.channel = listener.channel, None
        if channel is not None:
            channel.listeners.discard(listener)
            if not channel.listeners and self._channels.get(channel.which) is channel:
                del self._channels[channel.which]

    def _deliver(self, released: Sequence[Told], mark: int, early: Sequence[Told]) -> None:
        self.reached, self._early = mark, early
        for told in released:
            for channel in list(self._channels.values()):
                if channel.which.includes(told.event):
                    for late in channel.append(told):
                        self._leave_behind(late)
        if released and not self._is_busy:
            self._begin_round()

    def _leave_behind(self, listener: Listener) -> None:
        self._take_place(listener)
        moment = time.monotonic()
        if listener.is_writing or moment - listener.behind_at < BURST_SECONDS:
            self.dropped_count += 1
            name, last = listener.name, listener.last_id
            logger.info("A listener of '%s' reads too slowly and is dropped after event %d.", name, last)
            listener.is_dropped = True
            asyncio.get_running_loop().call_later(_LAST_WORDS_SECONDS, _cut_off, listener)
        listener.behind_at = moment
        listener.wake()

    def _begin_round(self) -> None:
        news = [channel for channel in self._channels.values() if channel.has_news]
        self._is_busy = bool(news)
        if news:
            for channel in news:
                channel.has_news = False
            listeners = [listener for channel in news for listener in channel.listeners]
            self._go_round(news, listeners, 0)

    def _go_round(self, news: list[Channel], listeners: list[Listener], first: int) -> None:
        for listener in listeners[first : first + _ROUND]:
            listener.wake()
        loop = asyncio.get_running_loop()
        if first + _ROUND < len(listeners):
            loop.call_soon(self._go_round, news, listeners, first + _ROUND)
        else:
            loop.call_later(len(listeners) * _LISTENER_SECONDS, self._end_round, news)

    def _end_round(self, news: list[Channel]) -> None:
        for channel in news:
            channel.trim()
        self._begin_round()

    def _look_after(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have those written to that heard nothing for a while: proxies keep the connection, the gone are noticed."""
        moment = time.monotonic()
        for listener in self.listeners:
            if listener.is_writing:
                if moment - listener.sent_at > STUCK_SECONDS:
                    _cut_off(listener)
            elif moment - listener.sent_at > ALIVE_SECONDS * 2 / 3:
                listener.is_alive_due = True
                listener.wake()
        if self._loop is loop and not self.is_closing:
            loop.call_later(ALIVE_SECONDS / 3, self._look_after, loop)

    def _wake_all(self) -> None:
        for listener in self.listeners:
            listener.wake()


def _cut_off(listener: Listener) -> None:
    if listener in listener.feed.listeners:
        logger.info("A listener of '%s' took nothing more and is cut off.", listener.name)
        listener.cut()


def _of_the_stream(kind: str, id: int, body: dict[str, object]) -> bytes:
    event = schemas.Event(id=id, kind=kind, object_uuid=None, project_uuid=None, body=body, created_at=now())
    return frame(kind, event.model_dump_json(), id)
