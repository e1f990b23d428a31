"""Who waits is woken: one thread a process reads the events that transactions wrote and wakes their objects' watches.

A wake-up says "look again" and nothing more, so a watch that is woken twice, or for nothing, is right. The thread
learns of new events at once from a commit of its own process, by LISTEN from the other hubs on PostgreSQL, and by a
short poll from other processes on SQLite.

On PostgreSQL the order of commits is not the order of ids: an event may become visible after one with a higher id. So
the reader keeps the ids it has not seen below the highest one (gaps) and asks for them until each has come or every
transaction that was running when the gap was noticed is over, when it can come no more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, func, select

from autovibe.domain import Event
from autovibe.errors import AutovibeError
from autovibe.store import Store
from autovibe.store.rows import CHANNEL

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25  # SQLite: how late another process's write is noticed
_LISTEN_SECONDS = 1.0  # PostgreSQL: how often gaps are looked at while nobody notifies
_GAP_SECONDS = 2.0  # a gap younger than this is never given up
_BATCH = 1000


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
        while not self.is_closing:
            try:
                if listener is None and not self._store.is_sqlite:
                    listener = _Listener(self._store)
                self._wake(self._reader.read())
                self.is_alive_at = time.monotonic()
                if listener is not None:
                    listener.wait(_LISTEN_SECONDS)
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


class Reader:
    """Reads every event once, in spite of commits that come out of order. Starts behind the newest event."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._position: int | None = None
        self._gaps: dict[int, tuple[float, int]] = {}  # id -> (noticed at, first transaction id not yet given then)

    def read(self) -> set[UUID]:
        """The objects of the events that became visible since the last call; at the first call, none."""
        found: set[UUID] = set()
        with self._store.reading() as session:
            if self._position is None:
                self._position = session.exec(select(func.max(Event.id))).one() or 0
                if not self._store.is_sqlite:  # what is being written right now may come in below it
                    self._notice(session, range(max(self._position - _BATCH, 0) + 1, self._position + 1))
                    self._fill(session)
                return found
            while True:
                rows = self._after(session, self._position)
                found |= {uuid for _, uuid in rows}
                if not rows:
                    break
                if not self._store.is_sqlite:
                    seen = {identifier for identifier, _ in rows}
                    missing = [i for i in range(self._position + 1, rows[-1][0]) if i not in seen]
                    self._notice(session, missing)
                self._position = rows[-1][0]
                if len(rows) < _BATCH:
                    break
            if self._gaps:
                found |= self._fill(session)
        return found

    @staticmethod
    def _after(session: Session, position: int) -> list[tuple[int, UUID]]:
        statement = select(Event.id, Event.object_uuid).where(col(Event.id) > position)
        statement = statement.order_by(col(Event.id)).limit(_BATCH)
        return [(identifier, uuid) for identifier, uuid in session.exec(statement) if identifier is not None]

    def _notice(self, session: Session, missing: Iterable[int]) -> None:
        identifiers = list(missing)
        if identifiers:
            next_transaction = _snapshot(session, "xmax")
            self._gaps.update({identifier: (time.monotonic(), next_transaction) for identifier in identifiers})

    def _fill(self, session: Session) -> set[UUID]:
        oldest_running = _snapshot(session, "xmin")
        statement = select(Event.id, Event.object_uuid).where(col(Event.id).in_(list(self._gaps)))
        found = set()
        for identifier, uuid in session.exec(statement):
            found.add(uuid)
            self._gaps.pop(identifier or 0, None)
        latest = time.monotonic() - _GAP_SECONDS
        for identifier, (noticed, next_transaction) in list(self._gaps.items()):
            if noticed < latest and oldest_running >= next_transaction:
                del self._gaps[identifier]
        return found


def _snapshot(session: Session, end: str) -> int:
    """`xmin`: the oldest transaction that runs. `xmax`: the first that had not begun. As this transaction sees it."""
    return int(session.execute(text(f"SELECT pg_snapshot_{end}(pg_current_snapshot())::text")).scalar_one())


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
