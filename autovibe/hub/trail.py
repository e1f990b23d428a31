"""The audit log's batched writer, for what no transaction of a verb tells of: refusals, failures, verbs without one.

A line waits in memory for half a second at most, then a thread writes all that came in one transaction; lines that
differ in nothing but the moment become one with a count, so that a loop of refusals does not fill the disk. What can be
lost: the lines of the last half second when the process is killed, those above 10,000 waiting (the log says how many),
those of a database that is gone for good. Never lost are changes: their lines are written by the change's own
transaction (store.trail).
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from sqlalchemy.exc import SQLAlchemyError

from autovibe.domain import AuditEntry
from autovibe.errors import AutovibeError
from autovibe.store import Store
from autovibe.store.trail import Line as Line
from autovibe.store.trail import current as current
from autovibe.types import Outcome

logger = logging.getLogger(__name__)

_WAITING = 10_000
_BATCH = 500
_BATCH_SECONDS = 0.5
_RETRY_SECONDS = 5.0
_OF_EACH = {"request_id", "created_at", "count"}
_BEFORE_THE_OBJECT = (401, 429)


class Trail:
    """One a process. Lines may be put before `start`; they are written then."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: deque[AuditEntry] = deque()
        self._writing = threading.Lock()
        self._news = threading.Event()
        self._is_closing = False
        self._lost = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what waits, and stop."""
        self._is_closing = True
        self._news.set()
        if self._thread is not None:
            self._thread.join(timeout=3)

    def put(self, line: Line, outcome: Outcome, status: int) -> None:
        """Have the line written soon. Never blocks."""
        if len(self._waiting) >= _WAITING:
            self._lost += 1
            return
        self._waiting.append(line.entry(str(outcome), status))
        self._news.set()

    def flush(self) -> None:
        """Write every line that waits. Raises DatabaseUnavailable; the lines go on waiting then."""
        with self._writing:
            while self._waiting:
                batch = [self._waiting[i] for i in range(min(_BATCH, len(self._waiting)))]
                with self._store.transaction() as session:
                    session.add_all(_folded(batch))
                for _ in batch:
                    self._waiting.popleft()
        if self._lost:
            logger.warning("%d lines of the audit log were lost: more came than could be written.", self._lost)
            self._lost = 0

    def _run(self) -> None:
        pause = threading.Event()
        while not self._is_closing:
            self._news.wait()
            pause.wait(0 if self._is_closing else _BATCH_SECONDS)  # others of the same moment come along
            self._news.clear()
            try:
                self.flush()
            except (AutovibeError, SQLAlchemyError) as error:
                logger.warning("The audit log cannot be written now; its lines wait: %s", error)
                pause.wait(0 if self._is_closing else _RETRY_SECONDS)
                self._news.set()


def _folded(batch: list[AuditEntry]) -> list[AuditEntry]:
    """The lines, copies of them: those that are alike in everything but request id and moment as one.

    Who was refused for a key or a limit may have named any object, each time another one: those are one line too.
    """
    found: dict[tuple[object, ...], AuditEntry] = {}
    for one in batch:
        values = one.model_dump(exclude={"id"})
        left_out = _OF_EACH | {"object_uuid"} if one.status in _BEFORE_THE_OBJECT else _OF_EACH
        alike = tuple(value for name, value in values.items() if name not in left_out)
        if (known := found.get(alike)) is not None:
            known.count += 1
            known.object_uuid = known.object_uuid if known.object_uuid == one.object_uuid else None
        else:
            found[alike] = AuditEntry(**values)
    return list(found.values())
