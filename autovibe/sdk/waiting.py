"""Waiting over HTTP: long polls until a deadline, across a restart of the Hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar
from uuid import UUID

from autovibe import schemas
from autovibe.errors import DeadlineExceeded, Unavailable

OUTAGE_SECONDS = 60.0
"""How long a wait goes on without an answer: the Hub may be restarting, and its work goes on when it is back."""
POLL_SECONDS = 1.0
LONG_POLL_SECONDS = 25.0
SHORTEST_POLL_SECONDS = 0.2
"""Whatever answers at once is not asked in a tight loop."""

Watch = Callable[[schemas.Operation], None]
"""Called with an operation whenever it was looked at; `step`, `steps` and `progress` tell how far it is."""

Answer = TypeVar("Answer")


class Deadline:
    """The end of a wait; `seconds` None: it has none."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

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
        started = time.monotonic()
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
