"""The durable engine alone: what a killed, closed or taken-for-dead process leaves is done, and done once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import autovibe.durable
from autovibe.durable import Durable


class Process:
    """A process of `durable_process`; `say` sends a command and gives its answer."""

    def __init__(self, directory: Path, url: str, *, home: str = "home", host: str = "host", **given: Any) -> None:
        (directory / home).mkdir(exist_ok=True)
        values = {
            "url": url,
            "home": str(directory / home),
            "host": host,
            "journal": str(directory / "journal"),
            "hold": str(directory / "hold"),
            "label": "a",
            "beats": {"beat_seconds": 0.4, "stale_seconds": 3.0},
            **given,
        }
        self._log = (directory / f"log-{values['label']}").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.workflows.durable_process", json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.executor_id = self._answer().split()[1]

    def say(self, *words: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self, how: int = signal.SIGKILL) -> None:
        self._process.send_signal(how)
        if how == signal.SIGKILL:
            self._process.wait(10)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"The process ended with {self._process.poll()}; see {self._log.name}."
        return line.strip()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(url: str, **given: Any) -> Process:
        made.append(Process(tmp_path, url, **given))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    file = tmp_path / "hold"
    file.touch()
    return file


@pytest.fixture
def journal(tmp_path: Path) -> Callable[[], list[str]]:
    def read() -> list[str]:
        file = tmp_path / "journal"
        return file.read_text().splitlines() if file.exists() else []

    return read


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not come to pass."
        time.sleep(0.05)


Start = Callable[..., Process]
Journal = Callable[[], list[str]]


def test_a_killed_process_is_succeeded_by_the_next_on_its_home(
    empty_database_url: str, process: Start, hold: Path, journal: Journal
) -> None:
    first = process(empty_database_url)
    first.say("start", "work", "w1")
    eventually(lambda: "w1 two a" in journal())
    first.kill()
    hold.unlink()
    second = process(empty_database_url, label="b")
    assert second.executor_id == first.executor_id
    eventually(lambda: "w1 three b" in journal())
    assert journal() == ["w1 one a", "w1 two a", "w1 two b", "w1 three b"]


def test_starting_the_same_id_again_runs_nothing_twice(
    empty_database_url: str, process: Start, tmp_path: Path, journal: Journal
) -> None:
    one = process(empty_database_url)
    for _ in range(3):
        one.say("start", "work", "w1")
    eventually(lambda: "w1 three a" in journal())
    one.say("start", "work", "w1")
    time.sleep(0.5)
    assert Counter(line.split()[1] for line in journal()) == {"one": 1, "two": 1, "three": 1}


def test_at_most_so_many_run_at_a_time_and_starting_does_not_wait(
    empty_database_url: str, process: Start, hold: Path, journal: Journal
) -> None:
    one = process(empty_database_url, workers=2)
    begun_at = time.monotonic()
    for number in range(6):
        one.say("start", "work", f"w{number}")
    assert time.monotonic() - begun_at < 3
    eventually(lambda: len([line for line in journal() if " two " in line]) == 2)
    time.sleep(0.5)
    assert {line.split()[0] for line in journal()} == {"w0", "w1"}  # in order
    hold.unlink()
    eventually(lambda: len([line for line in journal() if " three " in line]) == 6)
    assert Counter(line.split()[1] for line in journal()) == {"one": 6, "two": 6, "three": 6}


def test_a_workflow_that_waits_for_another_gives_way_to_it(
    empty_database_url: str, process: Start, journal: Journal
) -> None:
    one = process(empty_database_url, workers=1)
    one.say("start", "waits", "w1")
    one.say("start", "other", "w2")
    eventually(lambda: "w1 waited a" in journal())


def test_close_parks_what_runs_and_the_next_process_goes_on(
    empty_database_url: str, process: Start, hold: Path, journal: Journal
) -> None:
    one = process(empty_database_url, workers=1)
    one.say("start", "work", "w1")
    one.say("start", "work", "w2")  # waits in line
    eventually(lambda: "w1 two a" in journal())
    answer, is_clean, seconds = one.say("close").split()
    assert (answer, is_clean) == ("closed", "True")
    assert float(seconds) < 5
    hold.unlink()
    process(empty_database_url, label="b")
    eventually(lambda: {"w1 three b", "w2 three b"} <= set(journal()))
    assert [line for line in journal() if line.startswith("w1 one")] == ["w1 one a"]


def test_close_does_not_wait_for_a_step_that_runs_on(
    empty_database_url: str, process: Start, hold: Path, journal: Journal
) -> None:
    one = process(empty_database_url, stubborn=True)
    one.say("start", "work", "w1")
    eventually(lambda: "w1 two a" in journal())
    _, is_clean, seconds = one.say("close", "2").split()
    assert is_clean == "False"
    assert float(seconds) < 10
    hold.unlink()
    process(empty_database_url, label="b")
    eventually(lambda: "w1 three b" in journal())
    assert "w1 three a" not in journal()


def test_two_processes_of_one_home_have_ids_of_their_own(empty_database_url: str, process: Start) -> None:
    first, second = process(empty_database_url, label="a"), process(empty_database_url, label="b")
    assert first.executor_id != second.executor_id


@pytest.mark.parametrize("empty_database_url", ["postgres"], indirect=True)
def test_a_killed_process_is_adopted_once_by_another_host(
    empty_database_url: str, process: Start, hold: Path, journal: Journal
) -> None:
    dying = process(empty_database_url, label="a", home="home-a", host="alpha")
    process(empty_database_url, label="b", home="home-b", host="beta")
    process(empty_database_url, label="c", home="home-c", host="gamma")
    for number in range(4):
        dying.say("start", "work", f"w{number}")
    eventually(lambda: len([line for line in journal() if " two a" in line]) == 4)
    dying.kill()
    hold.unlink()
    eventually(lambda: len([line for line in journal() if " three " in line]) == 4, seconds=40)
    time.sleep(2)
    steps = Counter(tuple(line.split()[:2]) for line in journal())
    assert steps == {
        (f"w{number}", step): count for number in range(4) for step, count in (("one", 1), ("two", 2), ("three", 1))
    }
    assert not [line for line in journal() if line.endswith("three a")]


@pytest.mark.parametrize("empty_database_url", ["postgres"], indirect=True)
def test_a_process_that_was_taken_for_dead_stops_what_it_does(
    empty_database_url: str, process: Start, hold: Path, journal: Journal
) -> None:
    frozen = process(empty_database_url, label="a", home="home-a", host="alpha")
    process(empty_database_url, label="b", home="home-b", host="beta")
    frozen.say("start", "work", "w1")
    eventually(lambda: "w1 two a" in journal())
    frozen.kill(signal.SIGSTOP)
    eventually(lambda: "w1 two b" in journal(), seconds=40)
    frozen.kill(signal.SIGCONT)
    time.sleep(1.5)  # a few beats: it learns that its work is another's
    hold.unlink()
    eventually(lambda: "w1 three b" in journal())
    time.sleep(1)
    assert Counter(line.split()[1] for line in journal()) == {"one": 1, "two": 2, "three": 1}
    frozen.say("start", "work", "w2")  # and is as good as new
    eventually(lambda: "w2 three a" in journal())


def test_journals_of_the_ended_are_forgotten(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable = Durable(empty_database_url, home=tmp_path, workers=2, host="host")
    done: list[str] = []
    durable.register("work", lambda workflow_id: done.append(durable.step("one", lambda: workflow_id)))
    durable.launch()
    durable.start("work", "w1")
    eventually(lambda: done == ["w1"])
    time.sleep(0.2)
    autovibe.durable._prune()
    durable.start("work", "w1")  # known: it is not run again
    monkeypatch.setattr(autovibe.durable, "_KEPT", timedelta(0))
    autovibe.durable._prune()
    durable.start("work", "w1")
    eventually(lambda: done == ["w1", "w1"])
    assert durable.close()
