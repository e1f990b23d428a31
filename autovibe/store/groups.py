"""Works that share a transaction: what several threads ask for at the same time is carried out, and committed, at once.

A commit, and what is written at a transaction's end, cost as much as all else that a small change does. So the thread
whose turn it is carries out what the others of its group have asked for meanwhile, each in its own context, and wakes
them with what came of it. Nobody waits for company: a work that comes alone is carried out alone.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

Result = TypeVar("Result")

MOST = 16
"""How many works share a transaction, so that others get their turn."""


class Work(Generic[Result]):
    """A call that another thread may carry out, in the context of the thread that asks for it."""

    def __init__(self, call: Callable[..., Result]) -> None:
        self.error: BaseException | None = None
        self.is_answered = False
        self._call, self._context = call, contextvars.copy_context()
        self._result: Result | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def attempt(self, way: Callable[[Callable[..., Result]], Result]) -> bool:
        """Have `way` make the call, in the work's context, and keep what comes of it; False for an error."""
        try:
            self._result, self.error = self._context.run(way, self._call), None
        except BaseException as error:  # noqa: BLE001 - it is raised where the call was asked for
            self.error = error
        return self.error is None

    def within(self, function: Callable[[], None]) -> None:
        """Call a function in the work's context."""
        self._context.run(function)

    def answer(self, error: BaseException | None = None) -> None:
        """Let the thread that asked go on with what came of it, or with this error."""
        self.error, self.is_answered = error or self.error, True
        self._gate.release()

    def wake(self) -> None:
        """Let the thread that asked carry out its group's works."""
        self._gate.release()

    def wait(self) -> None:
        self._gate.acquire()

    def outcome(self) -> Result:
        """Raises what the call raised."""
        if self.error is not None:
            raise self.error
        return cast(Result, self._result)


Collect = Callable[[], Sequence[Work[Any]]]


class Groups:
    """Which works wait, by their groups; of each group one thread at a time carries out some. Thread-safe."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: dict[str, deque[Work[Any]]] = {}  # a group is here while somebody carries out works of it

    def share(self, group: str, call: Callable[..., Result], carry_out: Callable[[Collect], None]) -> Result:
        """What comes of the call, carried out by this thread or by another one of the group.

        `carry_out` gets a function that hands it the works, to be called when it can begin; it attempts each. What it
        raises is the answer to all that wait. Raises what the call raises.
        """
        work = Work(call)
        with self._mutex:
            is_first = group not in self._waiting
            self._waiting.setdefault(group, deque()).append(work)
        if not is_first:
            work.wait()
        if not work.is_answered:
            self._carry_out(group, carry_out)
        return work.outcome()

    def _carry_out(self, group: str, carry_out: Callable[[Collect], None]) -> None:
        taken: list[Work[Any]] = []

        def collect(most: int = MOST) -> Sequence[Work[Any]]:
            with self._mutex:
                waiting = self._waiting[group]
                taken.extend([waiting.popleft() for _ in range(min(len(waiting), most))])
            return taken

        failure: BaseException | None = None
        try:
            carry_out(collect)
        except BaseException as error:  # noqa: BLE001 - it is raised where the call was asked for
            failure = error
        # Where the database does not answer, nobody is made to wait for it once more.
        for work in taken if failure is None else collect(sys.maxsize):
            work.answer(failure)
        with self._mutex:
            if waiting := self._waiting[group]:
                waiting[0].wake()
            else:
                del self._waiting[group]
