"""Long waits made visible on stderr: what is waited for, the step it is at, how long it takes.

On a terminal a line that moves; else one line whenever the step changes; with --json nothing at all unless it is a
terminal. Ctrl-C leaves a wait without ending what is waited for, and says how to come back to it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from autovibe.cli import output
from autovibe.cli.exits import INTERRUPTED

if TYPE_CHECKING:
    from autovibe import schemas


class Step(Protocol):
    """Tells how far a piece of work is: `fraction` from 0 to 1, None where it is not known."""

    def __call__(self, text: str, fraction: float | None = None) -> None: ...


_sinks: list[Step] = []


@contextmanager
def told_to(sink: Step) -> Iterator[None]:
    """Inside the block, progress goes to `sink` instead of a line of its own: two moving displays would fight."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


@contextmanager
def shown(title: str, *, is_brief: bool = False) -> Iterator[Step]:
    """A line of progress while the block runs; afterwards nothing of it stays on a terminal.

    What `is_brief` is shown on a terminal alone.
    """
    if _sinks:
        sink = _sinks[-1]
        yield lambda text, fraction=None: sink(f"{title}: {text}", fraction)
        return
    if not sys.stderr.isatty():
        yield _silence if is_brief else _plain_lines(title)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[title]}", style="bold", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=output.err(), transient=True) as bar:
        task = bar.add_task("", total=None, title=title)

        def show(text: str, fraction: float | None = None) -> None:
            bar.update(
                task,
                description=output.escape(text)[:100],
                total=None if fraction is None else 1.0,
                completed=fraction or 0.0,
            )

        yield show


def _silence(text: str, fraction: float | None = None) -> None:
    """Where nobody watches a moment's work."""


def _plain_lines(title: str) -> Step:
    last = [""]
    started = time.monotonic()

    def show(text: str, fraction: float | None = None) -> None:  # noqa: ARG001
        if is_news(text, last[0]):
            output.say(f"{title}: {output.escape(text)} ({output.duration(time.monotonic() - started)})")
        last[0] = text

    return show


def is_news(text: str, before: str) -> bool:
    """Whether a line that cannot move says more than the one before: a figure that counts up (42 %) is no news."""
    return _without_figures(text) != _without_figures(before)


def _without_figures(text: str) -> str:
    return re.sub(r"[\d.,%() ]+", "", text)


@contextmanager
def waiting(title: str, *, resume: str) -> Iterator[Callable[[schemas.Operation], None]]:
    """Wait for an operation: yields the `watch` of the SDK's waiting verbs."""
    try:
        with shown(title) as show:
            yield lambda operation: show(*describe(operation))
    except KeyboardInterrupt:
        output.warn(f"\nNo longer waiting; the work goes on. See how far it is with: {resume}")
        raise typer.Exit(INTERRUPTED) from None


def describe(operation: schemas.Operation) -> tuple[str, float | None]:
    """The step of an operation in words, and which part of its steps lies behind it."""
    if operation.step is None:
        return (operation.progress or str(operation.status), None)
    text = operation.progress
    if operation.step not in text:
        text = operation.step.replace("_", " ") + (f": {text}" if text else "")
    if operation.step not in operation.steps:
        return (text, None)
    return (text, operation.steps.index(operation.step) / len(operation.steps))
