"""The demo's table of steps: it moves on a terminal, and is a line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autovibe.cli import output, progress

if TYPE_CHECKING:
    from rich.table import Table

MARKS = {"waiting": ("·", "dim"), "running": ("▶", "cyan"), "done": ("✓", "green"), "failed": ("✗", "bold red")}


@dataclass
class Step:
    """`note` is what it is doing, and at its end what came of it."""

    title: str
    status: str = "waiting"
    note: str = ""
    started: float = 0.0
    seconds: float | None = None
    tell: Callable[[str], None] = lambda _text: None

    def __call__(self, text: str, fraction: float | None = None) -> None:
        if progress.is_news(text, self.note):
            self.tell(text)
        self.note = text if fraction is None else f"{text} ({fraction:.0%})"

    @property
    def time(self) -> str:
        if self.status == "waiting":
            return ""
        return output.duration(time.monotonic() - self.started if self.seconds is None else self.seconds)


class Steps:
    """The steps, planned in the beginning, so that the table shows what is still to come."""

    def __init__(self, titles: list[str], *, is_silent: bool = False) -> None:
        self._is_silent = is_silent
        self._started = time.monotonic()
        self.steps = [Step(title, tell=lambda text: self._line(f"    {output.escape(text)}")) for title in titles]

    @contextmanager
    def live(self) -> Iterator[None]:
        """The moving table, while the block runs."""
        if self._is_silent or not sys.stdout.isatty():
            yield
            return
        from rich.live import Live

        with Live(get_renderable=self._table, console=output.out(), refresh_per_second=5):
            yield

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run one of the planned steps; progress inside the block becomes its note."""
        step = next(one for one in self.steps if one.title == title)
        step.status, step.started = "running", time.monotonic()
        self._line(f"▶ {step.title}")
        ending = "failed"
        try:
            with progress.told_to(step):
                yield step
            ending = "done"
        finally:
            step.status = ending
            step.seconds = time.monotonic() - step.started
            self._line(f"  {MARKS[step.status][0]} {step.time}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "step": one.title,
                "status": one.status,
                "seconds": one.seconds and round(one.seconds, 2),
                "note": one.note,
            }
            for one in self.steps
        ]

    def _line(self, text: str) -> None:
        if not self._is_silent and not sys.stdout.isatty():
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        made = Table.grid(padding=(0, 1), expand=True)
        made.add_column(no_wrap=True, min_width=max(len(step.title) for step in self.steps) + 2)
        made.add_column(justify="right", no_wrap=True, min_width=12)
        made.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
        for step in self.steps:
            mark, style = MARKS[step.status]
            is_dim = "dim" if step.status == "waiting" else ""
            note = Text(output.escape(step.note), style="dim")
            made.add_row(Text.assemble((mark, style), " ", (step.title, is_dim)), Text(step.time), note)
        return made
