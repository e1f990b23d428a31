"""Processes that outlive the word that started them: known by pid and time of creation, since pids are used again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from autovibe.errors import ConfigurationError


class Process(NamedTuple):
    name: str
    pid: int
    created: float

    @classmethod
    def of(cls, name: str, pid: int) -> Process:
        """Raises psutil.NoSuchProcess when it has gone."""
        import psutil

        return cls(name, pid, psutil.Process(pid).create_time())

    def is_alive(self) -> bool:
        import psutil

        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def end(self, seconds: float) -> bool:
        """SIGTERM, then SIGKILL after `seconds`. True when it went by itself."""
        import psutil

        if not self.is_alive():
            return True
        process = psutil.Process(self.pid)
        process.terminate()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.is_alive():
                return True
            time.sleep(0.05)
        try:
            process.kill()
        except psutil.NoSuchProcess:
            return True
        return False


class PidFile:
    """`<home>/up.pid`: a line a process, `pid created name`; the supervisor's first, so that `head -1` finds it."""

    def __init__(self, home: Path) -> None:
        self.path = home / "up.pid"

    def write(self, processes: list[Process]) -> None:
        temporary = self.path.with_name("up.pid.new")
        temporary.write_text("".join(f"{each.pid} {each.created:.2f} {each.name}\n" for each in processes))
        temporary.replace(self.path)

    def read(self) -> list[Process]:
        """The recorded processes that still live; a torn or foreign file counts as none."""
        try:
            lines = self.path.read_text().splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return []
        found = []
        for line in lines:
            pid, _, rest = line.partition(" ")
            created, _, name = rest.partition(" ")
            try:
                found.append(Process(name, int(pid), float(created)))
            except ValueError:
                continue
        return [process for process in found if process.is_alive()]

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


class Claim:
    """The lock of a home: who holds it supervises its Hub and node. It goes with the last process that has it."""

    def __init__(self, home: Path, descriptor: int | None = None) -> None:
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            message = f"The home '{home}' cannot be made ({error.strerror}); choose another with --home."
            raise ConfigurationError(message) from error
        self._path = home / "up.lock"
        self.descriptor = descriptor

    def take(self) -> bool:
        """False when another process has it."""
        if self.descriptor is not None:
            return True  # inherited, with the lock
        import fcntl

        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def let_go(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def is_claimed(home: Path) -> bool:
    """Whether something supervises this home now."""
    if not (home / "up.lock").exists():
        return False
    claim = Claim(home)
    if not claim.take():
        return True
    claim.let_go()
    return False


def tail(path: Path, lines: int = 20, *, without: str = "") -> str:
    """The last lines of a log, those that hold `without` left out; "" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    kept = [line for line in text.splitlines() if not without or without not in line]
    return "\n".join(kept[-lines:])
