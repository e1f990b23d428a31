"""The lock between processes; two of them in one process differ in nothing, since each opens the file for itself."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autovibe.store.queue import Queue


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "database"


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_somebody_next(path: Path) -> bool:
    file = os.open(f"{path}.next", os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def test_who_has_just_had_it_is_not_before_who_waits(path: Path) -> None:
    busy, patient = Queue(path), Queue(path)
    order: list[str] = []

    def wait() -> None:
        assert patient.take(10)
        order.append("patient")
        patient.give()

    for _ in range(20):
        assert busy.take(10)
        waiting = threading.Thread(target=wait)
        waiting.start()
        eventually(lambda: is_somebody_next(path))
        busy.give()
        assert busy.take(10)
        order.append("busy")
        busy.give()
        waiting.join(10)
    assert order == ["patient", "busy"] * 20


def test_the_wait_has_an_end_and_what_comes_too_late_is_given_back(path: Path) -> None:
    first, second, third = Queue(path), Queue(path), Queue(path)
    assert first.take(0)
    assert not second.take(0.05)
    assert not second.take(0.05)
    first.give()
    assert third.take(10)
    assert not second.take(0.05)
    third.give()
    assert second.take(10)
    assert not first.take(0)
    second.give()
    eventually(lambda: first.take(0.2))
    for queue in (first, second, third):
        queue.close()


def test_a_process_that_dies_leaves_its_turn(path: Path) -> None:
    program = (
        "import sys, pathlib; from autovibe.store.queue import Queue; q = Queue(pathlib.Path(sys.argv[1])); "
        "assert q.take(10); print('has it', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        queue = Queue(path)
        assert not queue.take(0.05)
        process.kill()
        assert queue.take(10)
