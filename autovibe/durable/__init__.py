"""Workflows whose finished steps are remembered: a process may die anywhere, and its work goes on where it was.

A workflow is a plain function of its id. It calls `step` for everything that touches the world; a step that ended is
not run again, a step that was running when its process died is (so steps must find their earlier effect): by the
successor on the same home, or after ten seconds by another process on the same system database. At most `workers`
workflows run at a time in a process; others wait in order, and `start` never waits for them.

Waiting happens inside a step, by `wait`: it writes nothing however long it takes, and it ends the workflow here,
unrecorded (`Parked`), when the process closes or was taken for dead; the step is then run again elsewhere or later.

This module hides DBOS (docs.dbos.dev, 3.4). Traps it keeps others from: one executor id twice runs a workflow twice;
the default application version changes with the source and would strand work; the default serialiser is pickle;
cancelling does not interrupt a step; an exception in a workflow ends it for good.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autovibe.errors import AutovibeError, ConfigurationError, DatabaseUnavailable, InternalError, NotYet

if TYPE_CHECKING:
    from autovibe.durable.heartbeats import Heartbeats, Slot

__all__ = ["Durable", "Parked", "alive_on", "contained", "place_of"]

_log = logging.getLogger(__name__)

_SCHEMA = "autovibe_durable"
_APPLICATION_VERSION = "1"  # raise it only with a way to finish the workflows of the version before
_CONNECTIONS = 8  # of DBOS to the system database
_PRUNE_SECONDS = 3600.0
_STALE_SECONDS = 10.0
_KEPT = timedelta(days=7)  # the journals of workflows that have ended


class Parked(BaseException):
    """The workflow stops here and goes on later, maybe in another process. Never caught by steps."""


class _Yielded(Parked):
    """As Parked, and dispatched again at once, behind those that wait for a worker."""


@contextmanager
def contained(what: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn a defect met inside into an InternalError, with its trace in the log.

    AutovibeError, NotYet and the classes of `passing` are no defects and go through.
    """
    passes: tuple[type[Exception], ...] = (AutovibeError, NotYet, *passing)
    try:
        yield
    except passes:
        raise
    except Exception as error:
        _log.exception("%s met a defect.", what)
        text = f"Something went wrong inside autovibe ({what} met a defect); the Hub's log has the details."
        raise InternalError(text, log_detail=repr(error)) from error


def place_of(home: Path, host: str) -> str:
    """What the executor ids of a home's processes begin with: `<host>-<home id>`."""
    from autovibe.durable.heartbeats import home_id

    name = re.sub(r"[^a-z0-9-]+", "-", host.lower()).strip("-") or "hub"
    return f"{name}-{home_id(home)}"


def alive_on(url: str) -> dict[str, float]:
    """The processes alive on a PostgreSQL system database, for who has none of his own. Raises DatabaseUnavailable."""
    import sqlalchemy as sa
    from sqlalchemy.exc import SQLAlchemyError

    from autovibe.durable.heartbeats import Heartbeats

    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    try:
        if not sa.inspect(engine).has_table("autovibe_executor", schema=_SCHEMA):
            return {}
        return Heartbeats(engine, _SCHEMA, "", _STALE_SECONDS).alive()
    except SQLAlchemyError as error:
        raise DatabaseUnavailable("The database does not answer.", log_detail=str(error)) from error
    finally:
        engine.dispose()


class Durable:
    """One a process at a time.

    `url` is the system database, a SQLite file or the hub's PostgreSQL database, in which it keeps a schema of its own;
    `home` is where the lock files of this hub's processes lie; `host` tells hosts that share the database apart. Who
    was not seen for `stale_seconds` is dead; all processes need the same figure.
    """

    def __init__(
        self,
        url: str,
        *,
        home: Path,
        workers: int,
        host: str,
        beat_seconds: float = 2.0,
        stale_seconds: float = _STALE_SECONDS,
    ) -> None:
        self._url, self._home, self._workers, self._host = url, home, workers, host
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._functions: dict[str, Callable[[str], None]] = {}
        self._wrapped: dict[str, Callable[[str], None]] = {}
        self._slot: Slot | None = None
        self._heartbeats: Heartbeats | None = None
        self._engine: Any = None
        self._beating: threading.Thread | None = None
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._turn = threading.Condition()
        self._active = 0
        self._generation = 0  # raised whenever this process was taken for dead
        self._thread = threading.local()
        self.executor_id = ""

    def register(self, name: str, function: Callable[[str], None]) -> None:
        """Before `launch`: name a workflow. `function` gets the workflow's id and must not raise."""
        self._functions[name] = function

    def launch(self) -> None:
        """Take an executor id, migrate the system database, go on with what a predecessor left, begin to beat.

        Raises DatabaseUnavailable, and ConfigurationError when every slot of the home is taken.
        """
        import sqlalchemy as sa
        from sqlalchemy.exc import SQLAlchemyError

        from autovibe.durable.heartbeats import Heartbeats, Slot

        try:
            self._slot = Slot(self._home)
        except OSError as error:
            raise ConfigurationError(f"The hub cannot take a slot in its home: {error}") from error
        self.executor_id = f"{place_of(self._home, self._host)}-{self._slot.number}"
        url = sa.make_url(self._url)
        is_sqlite = url.get_backend_name() == "sqlite"
        if not is_sqlite:
            url = url.set(drivername="postgresql+psycopg")
        try:
            if is_sqlite:
                Path(url.database or "").touch(mode=0o600)
            self._engine = sa.create_engine(url, pool_size=1, max_overflow=1, pool_pre_ping=not is_sqlite)
            self._heartbeats = Heartbeats(
                self._engine, None if is_sqlite else _SCHEMA, self.executor_id, self._stale_seconds
            )
            self._heartbeats.create()
            self._heartbeats.enter()
            self._launch_engine(url.render_as_string(hide_password=False))
        except SQLAlchemyError as error:
            self._end_engine(is_idle=False)
            self._slot.release()
            raise DatabaseUnavailable(
                f"The system database {url.render_as_string()} does not answer.", log_detail=str(error)
            ) from error
        self._beating = threading.Thread(target=self._beat, name="durable-heartbeat", daemon=True)
        self._beating.start()

    def start(self, name: str, workflow_id: str) -> None:
        """Begin the workflow of that id unless it was begun before. Raises DatabaseUnavailable.

        While closing it does nothing: what was accepted is started by whoever looks after the accepted next.
        """
        if self._closing.is_set():
            return
        from dbos import DBOS, SetWorkflowID
        from dbos._error import DBOSException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with SetWorkflowID(workflow_id):
                DBOS.start_workflow(self._wrapped[name], workflow_id)
        except (SQLAlchemyError, DBOSException) as error:
            if self._closing.is_set():
                return
            raise DatabaseUnavailable(
                "The system database does not answer; the operation is accepted and starts later.",
                log_detail=str(error),
            ) from error

    def await_worker(self) -> None:
        """Return when a workflow that is started now would find a worker, or when this process closes."""
        with self._turn:
            self._turn.wait_for(lambda: self._active < self._workers or self._closing.is_set())

    def close(self, timeout_seconds: float = 8.0) -> bool:
        """Stop accepting and park what runs. False when a step ran on past the time-out.

        Such a step is left to itself and run again at the next start; its thread would hold up a normal exit of the
        process, so end that with `os._exit`.
        """
        deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        with self._turn:
            self._turn.notify_all()
            is_idle = self._turn.wait_for(lambda: self._active == 0, timeout=timeout_seconds)
        self._ended.set()
        if self._beating is not None:
            self._beating.join(timeout=1.0)
        ending = threading.Thread(target=self._end_engine, args=(is_idle,), name="durable-end", daemon=True)
        ending.start()
        ending.join(timeout=max(1.0, deadline - time.monotonic()))
        if is_idle and self._slot is not None:
            self._slot.release()
        return is_idle and not ending.is_alive()

    def alive(self) -> dict[str, float]:
        """The processes on this system database that are not taken for dead: id, seconds since they were seen.

        Empty before `launch`. Raises DatabaseUnavailable.
        """
        from sqlalchemy.exc import SQLAlchemyError

        if self._heartbeats is None:
            return {}
        try:
            return self._heartbeats.alive()
        except SQLAlchemyError as error:
            raise DatabaseUnavailable("The system database does not answer.", log_detail=str(error)) from error

    # What workflows call

    def step(self, name: str, function: Callable[[], Any]) -> Any:
        """Run `function` and remember what it returned (a value of JSON), or return what was remembered."""
        from dbos import DBOS

        self.check()
        return DBOS.run_step({"name": name}, function)

    def wait(self, seconds: float) -> None:
        """Sleep inside a step. Raises Parked when the process closes or was taken for dead."""
        self.check()
        self._closing.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raises Parked when this workflow must not go on in this process."""
        if self.is_parking():
            raise Parked

    def is_parking(self) -> bool:
        """Whether the workflow of this thread must stop as soon as it can."""
        return self._closing.is_set() or getattr(self._thread, "generation", self._generation) != self._generation

    def yield_turn(self) -> None:
        """Where every worker is busy, give this one to who waits in line and come back behind them.

        A workflow that waits for another workflow calls it, or a process full of such would wait for ever.
        """
        with self._turn:
            is_busy = self._active >= self._workers
        if is_busy:
            raise _Yielded

    # Inside

    def _launch_engine(self, url: str) -> None:
        # DBOS logs to the console unless its logger has a handler.
        logger = logging.getLogger("dbos")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        logger.propagate = True

        from dbos import DBOS, DBOSPortableJSONSerializer

        DBOS(
            config={
                "name": "autovibe",
                "system_database_url": url,
                "dbos_system_schema": _SCHEMA,
                "sys_db_pool_size": _CONNECTIONS,
                "application_version": _APPLICATION_VERSION,
                "executor_id": self.executor_id,
                "serializer": DBOSPortableJSONSerializer(),
                "max_executor_threads": self._workers,
                "log_level": "WARNING",
                "enable_otlp": False,
            }
        )
        for name, function in self._functions.items():
            self._wrapped[name] = DBOS.workflow(name=name, max_recovery_attempts=None)(self._wrap(function))
        DBOS.launch()

    def _wrap(self, function: Callable[[str], None]) -> Callable[[str], None]:
        def workflow(workflow_id: str) -> None:
            self._thread.generation = self._generation
            with self._turn:
                self._active += 1
            try:
                self.check()
                function(workflow_id)
            except _Yielded:
                self._dispatch_again(workflow_id)
                raise
            finally:
                with self._turn:
                    self._active -= 1
                    self._turn.notify_all()

        return workflow

    def _dispatch_again(self, workflow_id: str) -> None:
        from dbos._dbos import _get_dbos_instance
        from dbos._utils import INTERNAL_QUEUE_NAME

        system = _get_dbos_instance()._sys_db
        system.reenqueue_for_recovery(workflow_id, [self.executor_id], INTERNAL_QUEUE_NAME)

    def _end_engine(self, is_idle: bool) -> None:
        from dbos import DBOS

        DBOS.destroy(destroy_registry=True)
        if self._heartbeats is not None and is_idle:
            try:
                self._heartbeats.leave()
            except Exception as error:  # noqa: BLE001 - the database may be what is gone; others notice the silence
                _log.warning("The heartbeat could not be ended: %s", error)
        if self._engine is not None:
            self._engine.dispose()

    def _beat(self) -> None:
        from dbos import DBOS

        heartbeats = self._heartbeats
        assert heartbeats is not None  # noqa: S101 - launch made it
        is_silent, prune_at = False, time.monotonic() + _PRUNE_SECONDS
        while not self._ended.wait(self._beat_seconds):
            try:
                if not heartbeats.beat():
                    _log.warning("%s was taken for dead; its workflows go on elsewhere.", self.executor_id)
                    self._generation += 1
                    heartbeats.enter()
                    DBOS._recover_pending_workflows([self.executor_id])
                if not self._closing.is_set():
                    for dead, claim in heartbeats.claim_dead().items():
                        adopted = DBOS._recover_pending_workflows([dead])
                        _log.info("Adopted %d workflows of %s, which is gone.", len(adopted), dead)
                        heartbeats.forget(dead, claim)
                if time.monotonic() > prune_at:
                    prune_at = time.monotonic() + _PRUNE_SECONDS
                    _prune()
                is_silent = False
            except Exception as error:  # noqa: BLE001 - whatever it was, a process that stops beating loses its work
                if not is_silent:
                    _log.warning("The heartbeat of %s failed and is tried again: %s", self.executor_id, error)
                is_silent = True


def _prune() -> None:
    """Forget workflows that have ended long ago, a batch at a time."""
    from dbos import DBOS

    before = (datetime.now(UTC) - _KEPT).isoformat()
    old = DBOS.list_workflows(
        status=["SUCCESS", "ERROR"], completed_before=before, limit=1000, load_input=False, load_output=False
    )
    if old:
        DBOS.delete_workflows([workflow.workflow_id for workflow in old])
