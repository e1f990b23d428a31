"""Keeps the experiments of this home going: builds, starts, starts again, ends. One process of a home does it, the one
that holds the lock `experiments/lock`; it goes with that process, and another takes over.

    planned   its home is built, its Hub is started                    -> running once that answers
    running   its figures are kept; a Hub that died is started again
    the end   (its time is over, or somebody stops it) its machines are terminated, its Hub is stopped, the vmids of
              VMs that are gone are free again                         -> ended

An experiment's Hub outlives this one when that is killed, and is found again by the pid file in its home and the home
in its command line. When this one is stopped, it is stopped too, and started again at the next start.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col, delete, select

from autovibe.domain import Allotment, Experiment, HubCheckpoint, Machine
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import place_of
from autovibe.errors import AutovibeError, InsufficientSpace, OperationFailed, Unavailable
from autovibe.hub import Hub, experiment_home, experiments
from autovibe.store import rows
from autovibe.types import ExperimentStatus, MachineStatus

logger = logging.getLogger(__name__)

_STARTS = 5
"""How often a Hub that never answered is started."""
_LONGEST_PAUSE_SECONDS = 60.0
_READY_SECONDS = 120.0
_FIGURES_SECONDS = 60.0
_LAST_MACHINES_SECONDS = 300.0  # what the machines of an experiment get to end in
_STOP_SECONDS = 15.0
_TROUBLE_SECONDS = 60.0
_HOMES_KEPT = timedelta(days=7)
_TIDY_SECONDS = 3600.0


class Laboratory:
    """The experiments of one home, as one process sees them."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._lock: int | None = None
        self._tidied_at = float("-inf")
        self._children: dict[UUID, subprocess.Popen[bytes]] = {}
        self._moments: dict[tuple[UUID, str], float] = {}  # by time.monotonic()

    def look_after(self) -> None:
        """One pass over the experiments of this home."""
        found = self._living()
        is_tidied = time.monotonic() - self._tidied_at < _TIDY_SECONDS
        if (not found and is_tidied) or not self._take_lock():
            return
        for row in found:
            try:
                self._advance(row)
            except (AutovibeError, OSError) as error:
                if not _will_pass(row, error):
                    self._fail(row, str(error))
                elif self._is_due(row, "trouble", _TROUBLE_SECONDS):
                    logger.warning("Experiment '%s' cannot be looked after now: %s", row.name, error)
        if not is_tidied:
            self._forget_old()
            self._tidied_at = time.monotonic()

    def close(self) -> None:
        """Have the Hubs of the experiments stop, without waiting: they take as long as this one."""
        if self._lock is None:
            return
        with suppress(AutovibeError):
            for row in self._living():
                self._signal(row, signal.SIGTERM)
        os.close(self._lock)
        self._lock = None

    def _living(self) -> list[Experiment]:
        place = place_of(self._hub.name)
        living = col(Experiment.status).in_(experiments.LIVING)
        with self._hub.store.reading() as session:
            return list(session.exec(select(Experiment).where(Experiment.place == place, living)))

    def _take_lock(self) -> bool:
        if self._lock is not None:
            return True
        directory = self._hub.home / "experiments"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def _advance(self, row: Experiment) -> None:
        if row.is_stop_wanted or now() >= row.ends_at:
            self._end(row)
        elif not experiment_home.is_built(row):
            with self._hub.store.reading() as session:
                base = rows.get(session, HubCheckpoint, row.checkpoint_uuid)
            experiment_home.build(self._hub, row, base)
            logger.info("The home of experiment '%s' is built.", row.name)
        elif self._pid_of(row) is None:
            self._start(row)
        elif row.status == ExperimentStatus.planned:
            self._await_answer(row)
        elif self._is_due(row, "figures", _FIGURES_SECONDS):
            self._keep_figures(row)

    # Its process

    def _start(self, row: Experiment) -> None:
        """Start its Hub, after a pause that grows while it keeps dying."""
        if row.status == ExperimentStatus.planned and row.start_count >= _STARTS:
            raise OperationFailed(f"Its Hub ended {_STARTS} times before it answered: {_last_words(row)}")
        pause = min(0.5 * 2**row.start_count, _LONGEST_PAUSE_SECONDS) if row.start_count else 0.0
        if not self._is_due(row, "start", pause):
            return
        launch, home = self._hub.launch, Path(row.path)
        with (home / "console.log").open("ab") as console:
            child = subprocess.Popen(
                [*launch.argv, "--home", str(home)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(launch.environment),
            )
        self._children[row.uuid] = child
        self._moments[row.uuid, "started"] = time.monotonic()
        self._change(row, pid=child.pid, start_count=row.start_count + 1)
        logger.info("The Hub of experiment '%s' is started on port %s (pid %d).", row.name, row.port, child.pid)

    def _pid_of(self, row: Experiment) -> int | None:
        """Its living process: our child, or one that an earlier process of this home has left."""
        child = self._children.get(row.uuid)
        if child is not None:
            if child.poll() is None:
                return child.pid
            del self._children[row.uuid]
        with suppress(OSError, ValueError):
            pid = int((Path(row.path) / "hub" / "hub.pid").read_text(encoding="ascii"))
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if row.path.encode() in words:
                return pid
        return None

    def _signal(self, row: Experiment, number: signal.Signals) -> None:
        pid = self._pid_of(row)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _await_answer(self, row: Experiment) -> None:
        try:
            with experiments.door(row) as client:
                is_there = client.get("/hub/status").is_success
        except (httpx2.HTTPError, OSError):
            is_there = False
        if is_there:
            self._change(row, status=ExperimentStatus.running, started_at=now())
        elif time.monotonic() - self._moments.setdefault((row.uuid, "started"), time.monotonic()) > _READY_SECONDS:
            raise OperationFailed(f"Its Hub did not answer for {_READY_SECONDS:.0f} s: {_last_words(row)}")

    def _keep_figures(self, row: Experiment) -> None:
        if (figures := experiments.ask_figures(row)) is not None:
            self._change(row, report=figures)

    # Its end

    def _end(self, row: Experiment) -> None:
        """One step towards its end a pass; each may be repeated by another process."""
        moment = self._moments.setdefault((row.uuid, "end"), time.monotonic())
        is_stopped = (row.uuid, "stop") in self._moments
        may_have_machines = (
            row.status == ExperimentStatus.running
            and not is_stopped
            and time.monotonic() - moment < _LAST_MACHINES_SECONDS
        )
        if self._pid_of(row) is None:
            if may_have_machines and self._has_machines(row):
                self._start(row)  # it ended with the Hub that looks after it, or died; only it can terminate them
            else:
                self._finish(row, ExperimentStatus.ended)
            return
        if not is_stopped:
            if may_have_machines and self._terminate_machines(row):
                return
            self._keep_figures(row)
            self._moments[row.uuid, "stop"] = time.monotonic()
            self._signal(row, signal.SIGTERM)
        elif time.monotonic() - self._moments[row.uuid, "stop"] > _STOP_SECONDS:
            self._signal(row, signal.SIGKILL)

    def _terminate_machines(self, row: Experiment) -> bool:
        """Have every machine of its end. True while one lives, or it does not answer."""
        try:
            with experiments.door(row) as client:
                statuses = [str(status) for status in MachineStatus if not status.is_final]
                found = client.get("/machines", params={"limit": 200, "status": statuses})
                found.raise_for_status()
                living = found.json()["machines"]
                for machine in living:
                    if machine["status"] != MachineStatus.terminating:
                        client.post(
                            f"/machines/{machine['uuid']}/terminate", json={"reason": "The experiment is over."}
                        )
        except (httpx2.HTTPError, OSError) as error:
            logger.info("Experiment '%s' cannot be asked to terminate its machines now: %s", row.name, error)
            return True
        return bool(living)

    def _finish(self, row: Experiment, status: ExperimentStatus, message: str | None = None) -> None:
        """Mark it over and free its vmids, but for those of VMs that are still there."""
        left = self._left_vmids(row)
        if left:
            message = " ".join(
                filter(
                    None, [message or row.error_message, f"VMs of it are left, and keep their vmids: {_listed(left)}."]
                )
            )
        with self._hub.store.transaction() as session:
            found = rows.get(session, Experiment, row.uuid)
            found.status, found.ended_at, found.pid = status, now(), None
            found.error_message = message or found.error_message
            session.add(found)
            free = col(Allotment.vmid).not_in(left)
            session.exec(delete(Allotment).where(col(Allotment.owner_uuid) == row.uuid, free))
            rows.record(session, "experiment.status", row.uuid, status=status)
        logger.info("Experiment '%s' is over: %s. %s", row.name, status, message or "")

    def _fail(self, row: Experiment, message: str) -> None:
        logger.warning("Experiment '%s' failed: %s", row.name, message)
        self._signal(row, signal.SIGTERM)
        self._finish(row, ExperimentStatus.failed, message)

    def _left_vmids(self, row: Experiment) -> list[int]:
        """Those its own database has as allotted: to machines that live, and to VMs that hold its checkpoints."""
        try:
            return sorted(self._ask(row, select(Allotment.vmid)))
        except (AutovibeError, SQLAlchemyError) as error:
            logger.warning("The database of experiment '%s' cannot be read; its vmids stay taken: %s", row.name, error)
            return list(range(row.vmid_first or 0, (row.vmid_last or -1) + 1))

    def _has_machines(self, row: Experiment) -> bool:
        """Whether machines of it live, by its own database."""
        living = col(Machine.status).not_in([status for status in MachineStatus if status.is_final])
        try:
            return bool(self._ask(row, select(Machine.uuid).where(living)))
        except (AutovibeError, SQLAlchemyError):
            return False  # `_left_vmids` tells

    def _ask(self, row: Experiment, statement: Any) -> list[Any]:
        """What its own database answers; nothing where there is none yet."""
        if not experiment_home.is_built(row):
            return []
        store = experiment_home.database_of(self._hub, row)
        try:
            with store.reading() as session:
                return list(session.exec(statement))
        finally:
            store.close()

    def _forget_old(self) -> None:
        """Delete the homes and databases of experiments that were over long ago; their rows stay."""
        old = col(Experiment.ended_at) < now() - _HOMES_KEPT
        with self._hub.store.reading() as session:
            place = Experiment.place == place_of(self._hub.name)
            found = list(session.exec(select(Experiment).where(place, old, Experiment.path != "")))
        for row in found:
            shutil.rmtree(row.path, ignore_errors=True)
            experiment_home.drop_database(self._hub, row)
            self._change(row, path="")

    def _is_due(self, row: Experiment, what: str, seconds: float) -> bool:
        """Whether it is so long ago that this was done; then it counts as done now."""
        moment, key = time.monotonic(), (row.uuid, what)
        if moment - self._moments.get(key, float("-inf")) < seconds:
            return False
        self._moments[key] = moment
        return True

    def _change(self, row: Experiment, **values: Any) -> None:
        with self._hub.store.transaction() as session:
            found = rows.get(session, Experiment, row.uuid)
            for name, value in values.items():
                setattr(found, name, value)
            session.add(found)
            if "status" in values:
                rows.record(session, "experiment.status", row.uuid, status=values["status"])


def _will_pass(row: Experiment, error: Exception) -> bool:
    """Whether it is no fault of the experiment's: a database that is busy, for one that runs a full disk too."""
    passing: tuple[type[Exception], ...] = (Unavailable,)
    if row.status == ExperimentStatus.running:
        passing = (Unavailable, InsufficientSpace, OSError)
    return isinstance(error, passing)


def _listed(vmids: list[int]) -> str:
    return ", ".join(map(str, vmids[:10])) + (f" and {len(vmids) - 10} more" if len(vmids) > 10 else "")


def _last_words(row: Experiment) -> str:
    path = Path(row.path) / "console.log"
    try:
        return path.read_text(encoding="utf-8", errors="replace")[-1000:].strip() or "it did not say why"
    except OSError:
        return "it did not say why"
