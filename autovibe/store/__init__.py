"""The Hub's database: SQLite in a file, or PostgreSQL by URL, behind three doors and nothing else.

    with store.transaction() as session: …   one write transaction, committed at its end, rolled back by an exception
    with store.reading() as session: …       one consistent view; a write in it fails
    store.together(group, work)              a write transaction shared by works that are asked for at the same time

Nobody calls commit. Rows stay usable after their transaction (`expire_on_commit=False`).

SQLite has one writer at a time, so writes queue in the order they were asked for (`Turn` for the threads of a process,
`Queue` for processes) and begin with BEGIN IMMEDIATE: a transaction that reads and then writes never fails with
"database is locked" halfway. `synchronous=FULL` is on purpose: the Hub answers 201 and starts VMs after a commit, and a
power cut that takes a row back would leave a VM nobody knows. On PostgreSQL writes are READ COMMITTED, a few of a
process at a time, readings REPEATABLE READ READ ONLY.

Errors of the driver that mean "not now" (unreachable, locked, deadlock, no connection free) leave as
DatabaseUnavailable, a full disk as InsufficientSpace; everything else, IntegrityError above all, leaves as it is.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlmodel import Session

from autovibe.domain.distribution import Distribution
from autovibe.errors import AutovibeError, ConfigurationError, DatabaseUnavailable, InsufficientSpace, InternalError
from autovibe.store import inserts, trail
from autovibe.store.groups import Collect, Groups, Work
from autovibe.store.queue import Queue
from autovibe.store.turn import Turn

__all__ = ["Store", "migration_engine"]

Result = TypeVar("Result")

PATIENCE_SECONDS = 30.0
"""How long a transaction waits for its turn, a lock or a connection before it gives up."""

_WRITERS = 8
"""PostgreSQL: how many write transactions a process has at a time. More would only wait for each other's rows, and each
holds a connection."""

_HAS_WRITTEN = "has written"

_TRUSTED_SECONDS = 1.0  # how long an idle connection is taken for one that works

_RETRYABLE = ("40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03")  # PostgreSQL, appendix A: error codes
_UNDONE = ("40001", "40P01")  # another transaction stood in the way, and this one was rolled back
_DISK_FULL = "53100"
_SQLITE_RETRYABLE = ("is locked", "unable to open database file", "disk I/O error")


class Store:
    """One database. Thread-safe; a process opens it once. `after_commit` callbacks run after each committed write
    transaction, in the thread that made it; they must be quick and must not raise."""

    def __init__(self, url: str) -> None:
        """Connects at first use. Raises ConfigurationError for what is neither a SQLite file nor PostgreSQL."""
        self.url = _parse(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.after_commit: list[Callable[[], None]] = []
        self.spans = Distribution()  # seconds of each write transaction, from its begin to its commit
        self.waits = Distribution()  # seconds each waited for its turn before
        self._turn = Turn(1 if self.is_sqlite else _WRITERS)
        self._queue = Queue(self.path)
        self._groups = Groups()
        self._inside = threading.local()
        self._engines: dict[str, Engine] = {}
        self._opening = threading.Lock()

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return Path(self.url.database or "")

    @property
    def engine(self) -> Engine:
        """What write transactions use. On SQLite its pool is one connection, as there is one writer."""
        return self._open("writer", lambda: _sqlite_engine(self.url, "BEGIN IMMEDIATE", pool_size=1, max_overflow=2))

    @property
    def _reader(self) -> Engine:
        if not self.is_sqlite:
            return self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        return self._open(
            "reader", lambda: _sqlite_engine(self.url, "BEGIN", pool_size=16, max_overflow=64, pragma="query_only=ON")
        )

    def _open(self, name: str, open_sqlite: Callable[[], Engine]) -> Engine:
        with self._opening:
            if name not in self._engines:
                self._engines[name] = open_sqlite() if self.is_sqlite else _postgres_engine(self.url)
            return self._engines[name]

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One write transaction. It does not nest (InternalError). Raises DatabaseUnavailable, InsufficientSpace."""
        with self._translated(), self._my_turn(), self._session() as session:
            yield session
            trail.write(session)
        trail.written()
        self._tell()

    def together(self, group: str, work: Callable[[Session], Result]) -> Result:
        """Carry out `work` in a write transaction, which works of the same group that are asked for meanwhile share.

        Each is refused for itself: it puts off what it writes (`inserts.later`), which is forgotten then. It may be
        carried out again, alone: when the transaction fails, on a unique column for example. So it changes rows and
        nothing else. What the others have put off it finds in no table, but in `inserts.waiting`. On PostgreSQL works
        of a group hold the same rows, or such as nobody else can hold. Raises what `work` raises, and what
        `transaction` does.
        """
        if getattr(self._inside, "transaction", False):
            raise InternalError("A transaction was begun inside another one of the same thread.")
        return self._groups.share(group, work, self._carry_out)

    def _carry_out(self, collect: Collect) -> None:
        with self._translated(), self._my_turn():
            works = collect()
            if len(works) == 1 or not self._share(works):
                self._carry_out_apart(works)
        for work in works:
            if work.error is None:
                work.within(trail.written)
        self._tell()

    def _carry_out_apart(self, works: Sequence[Work[Any]]) -> None:
        unavailable: BaseException | None = None
        for work in works:
            if unavailable is not None:
                work.error = unavailable  # without each of them waiting for it again
            elif not work.attempt(self._alone) and isinstance(work.error, DatabaseUnavailable):
                unavailable = work.error

    def _alone(self, work: Callable[[Session], Result]) -> Result:
        with self._translated(), self._session() as session:
            result = work(session)
            trail.write(session)
        return result

    def _share(self, works: Sequence[Work[Any]]) -> bool:
        """Carry them out in one transaction; False when each is to be carried out alone, and nothing has happened."""
        try:
            with self._session() as session:
                event.listen(session.connection(), "before_cursor_execute", partial(_watch, session))
                for work in works:
                    self._attempt(session, work)
        except (_ApartError, IntegrityError):
            return False
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in _UNDONE:
                raise
            return False
        return True

    def _attempt(self, session: Session, work: Work[Any]) -> None:
        """Attempt one of several works that share a transaction. Raises _ApartError, and what tells that the database
        does not answer now.
        """
        session.info[_HAS_WRITTEN], mark = False, inserts.mark(session)
        if work.attempt(partial(_part, session)):
            return
        error = work.error
        if isinstance(error, DBAPIError) and isinstance(self._translate(error), DatabaseUnavailable):
            raise error
        is_refused = isinstance(error, AutovibeError)
        if not is_refused or session.info[_HAS_WRITTEN] or session.new or session.dirty or session.deleted:
            raise _ApartError
        inserts.rewind(session, mark)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        began = time.perf_counter()
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session
            inserts.write(session)
        self.spans.note(time.perf_counter() - began)

    def _tell(self) -> None:
        for notify in self.after_commit:
            notify()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One view of everything committed. Raises DatabaseUnavailable; InternalError for a row changed in it."""
        with self._translated(), Session(self._reader, expire_on_commit=False, autoflush=False) as session:
            yield session
            if session.new or session.deleted or any(session.is_modified(row) for row in session.dirty):
                raise InternalError("A reading changed rows; such changes belong into a transaction.")

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A reading below the ORM, for the few places where bytes are moved in bulk."""
        with self._translated(), self._reader.connect() as connection:
            yield connection

    def check(self) -> float:
        """The seconds that one question to the database takes. Raises DatabaseUnavailable."""
        start = time.perf_counter()
        with self.connection() as connection:
            connection.execute(text("SELECT 1"))
        return time.perf_counter() - start

    def migrate(self, backups: Path) -> None:
        """Bring the schema to this version's, see `store.schema.migrate`."""
        from autovibe.store.schema import migrate

        with self._translated():
            migrate(self, backups)

    def close(self) -> None:
        """Close every connection; the store may be used again after."""
        with self._opening:
            engines, self._engines = list(self._engines.values()), {}
        for engine in reversed(engines):
            engine.dispose()
        self._queue.close()

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        if getattr(self._inside, "transaction", False):
            raise InternalError("A transaction was begun inside another one of the same thread.")
        asked = time.perf_counter()
        self._take_turn()
        self.waits.note(time.perf_counter() - asked)
        self._inside.transaction = True
        try:
            yield
        finally:
            self._inside.transaction = False
            if self.is_sqlite:
                self._queue.give()
            self._turn.give()

    def _take_turn(self) -> None:
        """First among the threads of this process, then among the processes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        is_ours = self._turn.take(PATIENCE_SECONDS)
        if is_ours and (not self.is_sqlite or self._queue.take(max(deadline - time.monotonic(), 0.0))):
            return
        if is_ours:
            self._turn.give()
        name = self.url.render_as_string(hide_password=True)
        raise DatabaseUnavailable(f"The database '{name}' was busy for {PATIENCE_SECONDS:.0f} s; try again.")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, NoConnectionFree) as error:
            translated = self._translate(error)
            if translated is None:
                raise
            raise translated from error

    def _translate(self, error: SQLAlchemyError) -> AutovibeError | None:
        """The error as a caller can act on it; None for one that is a defect."""
        name = self.url.render_as_string(hide_password=True)
        cause = getattr(error, "orig", None)
        words = str(cause or error).strip().splitlines()[0][:300]
        code = str(getattr(cause, "sqlstate", None) or "")
        if "disk is full" in words or code == _DISK_FULL:
            return InsufficientSpace(
                f"The disk of the database '{name}' is full; nothing was changed.", log_detail=words
            )
        is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
        is_unreachable = isinstance(error, OperationalError) and not code and not self.is_sqlite
        if is_unreachable and any(sign in words for sign in ("authentication failed", "does not exist")):
            return ConfigurationError(f"The database '{name}' refuses the Hub: {words}.")
        is_busy = self.is_sqlite and any(sign in words for sign in _SQLITE_RETRYABLE)
        if is_lost or is_unreachable or is_busy or code in _RETRYABLE or isinstance(error, NoConnectionFree):
            return DatabaseUnavailable(f"The database '{name}' does not answer now; try again.", log_detail=words)
        return None


class _ApartError(Exception):
    """Works that share a transaction have to be carried out each in its own."""


def _watch(session: Session, _connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
    if not statement.startswith("SELECT"):
        session.info[_HAS_WRITTEN] = True


def _part(session: Session, work: Callable[[Session], Result]) -> Result:
    result = work(session)
    trail.write(session)
    return result


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError(
            "The setting 'database_url' is no database URL; use postgresql://user@host/name."
        ) from error
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or not parsed.database or parsed.database == ":memory:":
        raise ConfigurationError(
            f"The database '{parsed.render_as_string(hide_password=True)}' is neither a SQLite file (sqlite:///path) "
            "nor PostgreSQL (postgresql://user@host/name)."
        )
    return parsed.set(drivername="sqlite")


def _postgres_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        pool_size=16,
        max_overflow=24,
        pool_timeout=PATIENCE_SECONDS,
        connect_args={
            "connect_timeout": 10,
            "application_name": "autovibe",
            "keepalives_idle": 30,
            "options": f"-c lock_timeout={int(PATIENCE_SECONDS)}s -c timezone=UTC",
        },
    )
    event.listen(engine, "checkin", _lay_down)
    event.listen(engine, "checkout", _take_up)
    return engine


def _lay_down(_connection: Any, record: Any) -> None:
    record.info["idle_since"] = time.monotonic()


def _take_up(connection: Any, record: Any, _proxy: Any) -> None:
    """A connection that nobody has used for a while is asked whether it is still one; the pool then takes another."""
    if time.monotonic() - record.info.get("idle_since", math.inf) < _TRUSTED_SECONDS:
        return
    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except psycopg.Error as error:
        raise DisconnectionError from error


def _sqlite_engine(url: URL, begin: str, *, pool_size: int, max_overflow: int, pragma: str = "") -> Engine:
    _create_privately(Path(url.database or ""))
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=PATIENCE_SECONDS,
        # isolation_level None: the driver begins nothing by itself, the event below does.
        connect_args={"timeout": PATIENCE_SECONDS, "check_same_thread": False, "isolation_level": None},
    )
    settings = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "journal_size_limit=67108864", pragma)

    def prepare(connection: Any, _record: Any) -> None:
        for setting in filter(None, settings):
            connection.execute(f"PRAGMA {setting}").close()

    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", start)
    return engine


def migration_engine(url: URL) -> Engine:
    """A single connection for migrations. On SQLite without foreign keys: they rebuild tables others refer to."""
    if url.get_backend_name() != "sqlite":
        return _postgres_engine(url)
    return _sqlite_engine(url, "BEGIN IMMEDIATE", pool_size=1, max_overflow=0, pragma="foreign_keys=OFF")


def _create_privately(path: Path) -> None:
    """SQLite would make the file readable by everyone; its -wal and -shm take the file's mode."""
    if path.exists():
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise DatabaseUnavailable(f"The database '{path}' cannot be made: {error.strerror}.") from error
