"""Who waits is woken: one thread a process reads the events that transactions wrote and wakes their objects' watches.

A wake-up says "look again" and nothing more, so a watch that is woken twice, or for nothing, is right. The thread
learns of new events at once from a commit of its own process, by LISTEN from the other hubs on PostgreSQL, and by a
short poll from other processes on SQLite.

The same thread hands what it read to the `feed`, whose listeners want to know more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from autovibe.errors import AutovibeError
from autovibe.hub.arrivals import Reader
from autovibe.hub.feed import Feed
from autovibe.store import Store
from autovibe.store.rows import CHANNEL

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25  # SQLite: how late another process's write is noticed
_PACE_SECONDS = 0.05  # at most so often: a burst of commits is read together
_LISTEN_SECONDS = 1.0  # PostgreSQL: how often it is looked while nobody notifies


class Watch:
    """One waiter. Made by `Events.watch` before the object is read, so that no change falls between."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._signal = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether the hub is shutting down: who waits then answers with what there is."""
        return self._events.is_closing

    async def changed(self, seconds: float) -> bool:
        """Wait until something may have changed since the last call, at most `seconds`; False when that ran out."""
        try:
            async with asyncio.timeout(seconds):
                await self._signal.wait()
        except TimeoutError:
            return False
        self._signal.clear()
        return True

    def wake(self) -> None:
        """Callable from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._signal.set)
        except RuntimeError:  # the loop of a waiter that is gone
            logger.debug("A watch outlived its event loop.")


class Events:
    """The process's tailer, and the watches it wakes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reader = Reader(store)
        self.feed = Feed(store)
        self._watches: dict[UUID, set[Watch]] = {}
        self._lock = threading.Lock()
        self._nudge = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_closing = False
        self.is_alive_at = 0.0  # time.monotonic() of the last good pass, for the health check
        store.after_commit.append(self._nudge.set)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Wake everybody for good: the hub is shutting down. Callable from any thread."""
        self.is_closing = True
        self.feed.close()
        self._nudge.set()
        with self._lock:
            waiting = {watch for watches in self._watches.values() for watch in watches}
        for watch in waiting:
            watch.wake()

    def close(self) -> None:
        self.release()
        if self._thread is not None:
            self._thread.join(timeout=3)
        if self._nudge.set in self._store.after_commit:
            self._store.after_commit.remove(self._nudge.set)

    @contextmanager
    def watch(self, *objects: UUID | None) -> Iterator[Watch]:
        """A watch woken by every event of these objects (None is left out). For use in the event loop."""
        watch = Watch(self)
        wanted = [uuid for uuid in objects if uuid is not None]
        with self._lock:
            for uuid in wanted:
                self._watches.setdefault(uuid, set()).add(watch)
        try:
            yield watch
        finally:
            with self._lock:
                for uuid in wanted:
                    self._watches[uuid].discard(watch)
                    if not self._watches[uuid]:
                        del self._watches[uuid]

    def _run(self) -> None:
        listener: _Listener | None = None
        read_at = 0.0
        while not self.is_closing:
            try:
                if listener is None and not self._store.is_sqlite:
                    listener = _Listener(self._store)
                time.sleep(max(0.0, read_at + _PACE_SECONDS - time.monotonic()))
                read_at = time.monotonic()
                arrived = self._reader.read()
                self._wake({event.object_uuid for event in arrived})
                self.feed.publish(arrived, self._reader.mark)
                self.is_alive_at = time.monotonic()
                if listener is not None:
                    seconds = self._reader.seconds_to_wait
                    listener.wait(_LISTEN_SECONDS if seconds is None else seconds)
                else:
                    self._nudge.wait(_POLL_SECONDS)
                    self._nudge.clear()
            except (SQLAlchemyError, psycopg.Error, AutovibeError, OSError) as error:
                logger.warning("Events cannot be read; trying again: %s", error)
                if listener is not None:
                    listener.close()
                    listener = None
                self._nudge.wait(1.0)
                self._nudge.clear()
        if listener is not None:
            listener.close()

    def _wake(self, objects: set[UUID]) -> None:
        with self._lock:
            waiting = {watch for uuid in objects for watch in self._watches.get(uuid, ())}
        for watch in waiting:
            watch.wake()


class _Listener:
    """A connection of its own that hears the other hubs' commits."""

    def __init__(self, store: Store) -> None:
        self._connection = store.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        driver = self._connection.connection.driver_connection
        if not isinstance(driver, psycopg.Connection):
            raise TypeError("The PostgreSQL driver is not psycopg.")
        self._driver = driver
        self._driver.execute(f"LISTEN {CHANNEL}")

    def wait(self, seconds: float) -> None:
        for _ in self._driver.notifies(timeout=seconds, stop_after=1):
            pass

    def close(self) -> None:
        self._connection.invalidate()
        self._connection.close()
