"""Tasks: work that outlives its request, named by a UPID.

A task is three things on disk: `active/<UPID>` (its intent as JSON, synced before the UPID is answered; what recovery
after a kill reads), `logs/<X>/<UPID>` (its log; the last line tells how it ended) and, once over, a line in `index`.
States: active (running) -> over, with a status: OK, the error's text, or `unexpected status` when the node was killed.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from autovibe.node.access.auth import Actor
from autovibe.node.files import create_durably, sync_directory
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.tasks.upid import Upid
from autovibe.node.tasks.worker import Worker, end_commands

logger = logging.getLogger(__name__)

UNEXPECTED = "unexpected status"
_STOP_SECONDS = 4.0  # below what the usual client waits for an answer
_KEPT = 2000  # finished tasks remembered; older logs are removed at the next start


@dataclass
class Task:
    """One task; `status` is None while it runs. Times are seconds since the epoch."""

    upid: Upid
    log_file: Path
    intent: dict[str, Any] = field(default_factory=dict)
    status: str | None = None
    endtime: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    is_stopped: bool = False
    was_killed: bool = False
    fault: str = ""  # on demand: what it is to fail with

    @property
    def interruption(self) -> str:
        """How a stopped task ends, whatever its work makes of it: as a command killed, or a worker interrupted."""
        if self.was_killed:
            return "interrupted by signal"
        return "received interrupt" if self.is_stopped else ""

    def log(self, line: str) -> None:
        """Add to the log; also where a task that was asked to stop does so."""
        self.write(line)
        self.check()

    def write(self, line: str) -> None:
        with self.log_file.open("a", encoding="utf-8", errors="replace") as file:
            file.write("".join(f"{part}\n" for part in line.rstrip("\n").split("\n")))

    def check(self) -> None:
        if self.is_stopped:
            raise Refusal(self.interruption)
        if self.fault:
            raise Refusal(self.fault)

    @property
    def facts(self) -> dict[str, Any]:
        """As lists of tasks show it: the final text is in `status`."""
        facts = self.upid.facts()
        return facts if self.status is None else {**facts, "endtime": self.endtime, "status": self.status}


Work = Callable[[Task], object]


class Tasks:
    """The tasks of one node."""

    def __init__(self, directory: Path, node: str, wrap: Callable[[Work], Work] | None = None) -> None:
        """`wrap` is given the work of each task before it begins, in the thread of the call that starts it."""
        self._node = node
        self._wrap = wrap
        self._active, self._logs, self._index = directory / "active", directory / "logs", directory / "index"
        for path in (self._active, *(self._logs / f"{digit:X}" for digit in range(16))):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._active.glob("*.new"):
            leftover.unlink()
        self._mutex = threading.Lock()
        self._finished: dict[str, Task] = {}
        self._running: dict[str, Task] = {}
        self._load_index()

    # Starting and ending

    def start(
        self,
        actor: Actor,
        kind: str,
        object_id: str | int,
        work: Work,
        *,
        intent: dict[str, Any] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> str:
        """Run `work` in a thread of its own and return the UPID.

        `intent` is on the disk before anything happens. `prepare` comes next and still is part of the request: when it
        raises, there is no task and the caller gets the error.
        """
        worker = Worker(f"{kind}:{object_id}")
        try:
            task = self._open(worker, actor, kind, str(object_id), intent or {})
            if prepare is not None:
                try:
                    prepare()
                except BaseException:
                    self._discard(task)
                    raise
        except BaseException:
            worker.begin(None)
            raise
        worker.begin(partial(self._run, task, self._wrap(work) if self._wrap else work))
        return str(task.upid)

    def _open(self, worker: Worker, actor: Actor, kind: str, object_id: str, intent: dict[str, Any]) -> Task:
        with self._mutex:
            upid = Upid(self._node, worker.pid, worker.pstart, int(time.time()), kind, object_id, actor.name)
            while str(upid) in self._running or str(upid) in self._finished:  # a number used again within one tick
                upid = upid._replace(pstart=upid.pstart + 1)
            task = Task(upid, self._log_file(upid), intent)
            self._running[str(upid)] = task
        try:
            task.log_file.touch(mode=0o600)
            create_durably(self._active / str(upid), json.dumps(intent))
        except OSError:
            self._discard(task)
            raise
        return task

    def _discard(self, task: Task) -> None:
        with self._mutex:
            self._running.pop(str(task.upid), None)
        (self._active / str(task.upid)).unlink(missing_ok=True)
        task.log_file.unlink(missing_ok=True)

    def _run(self, task: Task, work: Work) -> None:
        status = "OK"
        try:
            work(task)
        except Exception as error:
            status = str(error).strip().split("\n")[0] or type(error).__name__
            status = task.interruption or status
            if isinstance(error, AssertionError | LookupError | TypeError | AttributeError | ValueError):
                logger.exception("Task '%s' ran into a defect.", task.upid)
        self.close(task, status)

    def close(self, task: Task, status: str) -> None:
        """Write how a task ended; its intent goes last, so that a kill in between only repeats the recovery."""
        try:
            if status != UNEXPECTED:
                task.write("TASK OK" if status == "OK" else f"TASK ERROR: {status}")
            endtime = int(time.time())
            with self._mutex, self._index.open("a", encoding="utf-8") as file:
                file.write(f"{task.upid} {endtime:08X} {status}\n")
        except OSError:  # a full disk: the status is still answered from memory, and recovery reads the intent
            logger.exception("The end of task '%s' (%s) could not be written.", task.upid, status)
        else:
            (self._active / str(task.upid)).unlink(missing_ok=True)
        with self._mutex:
            task.endtime, task.status = int(time.time()), status
            self._running.pop(str(task.upid), None)
            self._finished[str(task.upid)] = task
            while len(self._finished) > _KEPT:
                del self._finished[next(iter(self._finished))]
        task.over.set()
        logger.info("Task '%s' ended: %s", task.upid, status)

    def orphans(self) -> list[Task]:
        """Tasks that a killed node left active, oldest first; `close` each after its recovery."""
        found = []
        for path in self._active.iterdir():
            try:
                upid = Upid.parse(path.name)
            except Refusal:
                logger.error("'%s' is no task and is left alone.", path)  # noqa: TRY400 - no defect of ours
                continue
            if str(upid) in self._finished:  # killed between the last two writes of `close`
                path.unlink()
            elif str(upid) not in self._running:
                found.append(Task(upid, self._log_file(upid), json.loads(path.read_text(encoding="utf-8"))))
        return sorted(found, key=lambda task: (task.upid.starttime, task.upid.pstart))

    def await_all(self, timeout_seconds: float) -> list[Task]:
        """Give running tasks time to end; the ones that did not."""
        deadline = time.monotonic() + timeout_seconds
        for task in self.running():
            task.over.wait(max(0.0, deadline - time.monotonic()))
        return self.running()

    # Reading

    def running(self) -> list[Task]:
        with self._mutex:
            return list(self._running.values())

    def finished(self) -> list[Task]:
        """Newest first."""
        with self._mutex:
            return list(reversed(self._finished.values()))

    def find(self, text: str) -> Task:
        """Raises the 400 of a malformed or unknown UPID."""
        upid = Upid.parse(text)
        with self._mutex:
            task = self._running.get(str(upid)) or self._finished.get(str(upid))
        if task is None:
            raise faulty({"upid": "no such task"})
        return task

    def stop(self, text: str) -> None:
        """Stop a running task: its qemu-img is ended, and it goes no further than its next log line.

        Waits some seconds for the end, as a real one does; one that cannot stop where it is goes on.
        """
        task = self.find(text)
        if task.status is None:
            task.is_stopped = True
            task.was_killed = end_commands(task.upid.pid)
            task.over.wait(_STOP_SECONDS)

    def read_log(self, task: Task, start: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Lines `{n, t}` from `start` (limit 0: all) and how many there are."""
        try:
            with task.log_file.open(encoding="utf-8", errors="replace") as file:
                lines = list(islice(file, start, start + limit if limit else None))
                total = start + len(lines) + sum(1 for _ in file)
        except FileNotFoundError:
            lines, total = [], 0
        if total == 0:
            return [{"n": 1, "t": "no content"}], 1
        return [{"n": start + number, "t": line.rstrip("\n")} for number, line in enumerate(lines, 1)], total

    # On disk

    def _log_file(self, upid: Upid) -> Path:
        return self._logs / f"{upid.starttime & 15:X}" / str(upid)

    def _load_index(self) -> None:
        if not self._index.exists():
            return
        lines = self._index.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines[-_KEPT:]:
            name, _, rest = line.partition(" ")
            endtime, _, status = rest.partition(" ")
            try:
                upid = Upid.parse(name)
                task = Task(upid, self._log_file(upid), status=status, endtime=int(endtime, 16))
            except (Refusal, ValueError):  # a line cut short by a crash
                continue
            task.over.set()
            self._finished[name] = task
        if len(lines) > 2 * _KEPT:
            self._drop_old(lines)

    def _drop_old(self, lines: list[str]) -> None:
        aside = self._index.with_suffix(".new")
        aside.write_text("".join(f"{line}\n" for line in lines[-_KEPT:]), encoding="utf-8")
        aside.replace(self._index)
        sync_directory(self._index.parent)
        for line in lines[:-_KEPT]:
            try:
                self._log_file(Upid.parse(line.partition(" ")[0])).unlink(missing_ok=True)
            except Refusal:
                continue
