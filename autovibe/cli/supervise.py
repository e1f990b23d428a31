"""Hub and node as processes of their own, started again when they die.

Each child has a session of its own, so that Ctrl-C reaches the supervisor alone and the order of stopping is ours: the
Hub first, while the node still answers it, then the node. Virtual machines are children of neither and stay.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from autovibe.cli.processes import Process, tail

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""A child that has lived so long is started again without a pause when it dies."""
STOP_SECONDS = {"hub": 7.0, "node": 2.5}
CONSOLE_LIMIT_BYTES = 10_000_000


class Child:
    """One program of ours. Its own log is rotated by itself; `console` holds what it printed, and its last words."""

    def __init__(self, name: str, argv: list[str], console: Path) -> None:
        self.name = name
        self.console = console
        self._argv = argv
        self._popen: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pause = FIRST_PAUSE_SECONDS

    def start(self) -> None:
        self.console.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.console.open("wb") as console:
            self._popen = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(),
            )
        os.chmod(self.console, 0o600)
        self._started_at = time.monotonic()

    @property
    def process(self) -> Process | None:
        return None if self._popen is None or self.exit_status is not None else Process.of(self.name, self._popen.pid)

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return None if self._popen is None else self._popen.poll()

    def next_pause(self) -> float:
        """How long to wait before it is started again; grows while it keeps dying young."""
        if time.monotonic() - self._started_at > STEADY_SECONDS:
            self._pause = FIRST_PAUSE_SECONDS
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE_SECONDS)
        return pause

    def stop(self, seconds: float) -> None:
        if self._popen is None or self.exit_status is not None:
            return
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def trim(self) -> None:
        if self.console.exists() and self.console.stat().st_size > CONSOLE_LIMIT_BYTES:
            os.truncate(self.console, 0)

    def last_words(self) -> str:
        return tail(self.console)


class Supervisor:
    """Keeps the children it was given running, from `watch` until `stop`."""

    def __init__(self, tell: Callable[[str], None], on_change: Callable[[list[Process]], None]) -> None:
        self._tell = tell
        self._on_change = on_change
        self._children: list[Child] = []
        self._is_stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self, child: Child) -> None:
        child.start()
        self._children.append(child)
        self._report()

    def watch(self) -> None:
        """From now on a child that dies is started again."""
        self._watcher.start()

    def stop(self) -> None:
        """Stop all, the last started first, within ten seconds."""
        self._is_stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for child in reversed(self._children):
            child.stop(STOP_SECONDS.get(child.name, 5.0))
        self._children.clear()
        self._report()

    def _report(self) -> None:
        self._on_change([process for child in self._children if (process := child.process) is not None])

    def _watch(self) -> None:
        again_at: dict[str, float] = {}
        while not self._is_stopping.wait(0.25):
            for child in self._children:
                child.trim()
                if child.exit_status is None:
                    continue
                if child.name not in again_at:
                    pause = child.next_pause()
                    again_at[child.name] = time.monotonic() + pause
                    self._tell(f"The {child.name} ended with {_ending(child)}; it is started again in {pause:g} s.")
                elif time.monotonic() >= again_at[child.name]:
                    del again_at[child.name]
                    child.start()
                    self._report()


def _ending(child: Child) -> str:
    status = child.exit_status or 0
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def program(*words: str) -> list[str]:
    """argv that runs words of this same command line in another process."""
    return [sys.executable, "-P", "-m", "autovibe.cli", *words]


def environment() -> dict[str, str]:
    """This process's environment, in which the package is found also when it runs from a checkout."""
    import site

    top = str(Path(__file__).resolve().parents[2])
    if top in site.getsitepackages():
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (top, os.environ.get("PYTHONPATH"))))}
