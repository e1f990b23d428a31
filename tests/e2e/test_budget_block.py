"""A machine at its limit, on a real guest: frozen at once, checkpointed, off; and going on where it was after a raise.

The prompt counts aloud: each number goes to this process as a datagram, so that what is measured is when it came here,
by one clock, and not what an emulated guest takes the time to be.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Autovibe

pytestmark = pytest.mark.guest

PROMPT = "i=0; while :; do i=$((i+1)); echo $i > count; echo $i > /dev/udp/10.0.2.2/{port}; sleep 0.1; done"
FROZEN_WITHIN, OFF_WITHIN = 3.0, 30.0


class Counter:
    """Numbers of the guest as they arrive: (number, time.time())."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, float]] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        while True:
            try:
                body = self._socket.recv(100)
            except OSError:
                return
            self.heard.append((int(body), time.time()))

    def close(self) -> None:
        self._socket.close()


class Accounts:
    """Looks at every account all the while, in the Hub's database, and keeps each that is above its limit."""

    def __init__(self, database: Path) -> None:
        self._database, self._closing = database, threading.Event()
        self.looks, self.broken = 0, list[tuple[Any, ...]]()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=30)) as connection:
            while not self._closing.wait(0.05):
                self.broken += connection.execute(
                    "SELECT * FROM account WHERE used_micros + reserved_micros > limit_micros"
                ).fetchall()
                self.looks += 1

    def close(self) -> None:
        self._closing.set()
        self._thread.join(5)


@pytest.fixture
def counter() -> Iterator[Counter]:
    found = Counter()
    yield found
    found.close()


def row(autovibe: Autovibe, table: str, uuid: str) -> dict[str, Any]:
    path = f"file:{autovibe.home / 'hub' / 'autovibe.db'}?mode=ro"
    with closing(sqlite3.connect(path, uri=True, timeout=30)) as connection:
        connection.row_factory = sqlite3.Row
        found = connection.execute(f"SELECT * FROM {table} WHERE uuid = ?", (uuid.replace("-", ""),)).fetchone()
    return dict(found)


def moment(text: str) -> float:
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def await_status(autovibe: Autovibe, machine: str, *statuses: str, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while (found := row(autovibe, "machine", machine))["status"] not in statuses:
        assert time.monotonic() < deadline, f"{found['status']} and not {statuses} after {seconds} s"
        time.sleep(0.05)
    return found


def limit_hours(autovibe: Autovibe, machine: str, *, beyond_seconds: float) -> None:
    """Give the machine's project so much more machine time than it uses and holds now, for today."""
    project = row(autovibe, "machine", machine)["project_uuid"]
    with closing(sqlite3.connect(f"file:{autovibe.home / 'hub' / 'autovibe.db'}?mode=ro", uri=True)) as connection:
        statement = "SELECT used_micros + reserved_micros FROM account WHERE owner_uuid = ? AND resource = 'time_hours'"
        taken = connection.execute(statement, (project,)).fetchone()[0]
    autovibe.run("resources", "budget", "limited", "--daily-hours", f"{taken / 1e6 + beyond_seconds / 3600:.6f}")


def test_at_its_limit_a_machine_is_frozen_checkpointed_and_resumed(autovibe: Autovibe, counter: Counter) -> None:
    autovibe.run("project", "create", "limited")
    accounts = Accounts(autovibe.home / "hub" / "autovibe.db")
    prompt = PROMPT.format(port=counter.port)
    machine = autovibe.json("machine", "spawn", "-p", "limited", "--name", "counter", "--prompt", prompt)["uuid"]
    limit_hours(autovibe, machine, beyond_seconds=40)

    at_limit = await_status(autovibe, machine, "checkpointing", "budget_blocked", seconds=240)
    limit_at = moment(at_limit["metered_at"])
    blocked = await_status(autovibe, machine, "budget_blocked", seconds=240)
    operation = row(autovibe, "operation", blocked["operation_uuid"])
    assert operation["status"] == "succeeded", operation["error"]
    number, last_heard = counter.heard[-1]
    frozen_after = max(last_heard - limit_at, 0.0)
    off_after = moment(json.loads(operation["arguments"])["stopped_at"]) - limit_at
    print(f"frozen {frozen_after:.2f} s after the limit, off after {off_after:.2f} s, at {number}")

    checkpoint = row(autovibe, "checkpoint", blocked["last_checkpoint_uuid"])
    assert (checkpoint["status"], checkpoint["type"]) == ("ready", "automatic")
    uuid = autovibe.json("machine", "show", "counter")["last_checkpoint_uuid"]
    manifest = autovibe.json("checkpoint", "show", uuid, "--manifest")["manifest"]
    assert "/workspace/count" in manifest
    assert autovibe.run("machine", "resume", "counter", check=False).returncode == 4  # nothing was raised

    begun_at = time.monotonic()
    limit_hours(autovibe, machine, beyond_seconds=3600)  # which by itself lets it go on
    await_status(autovibe, machine, "working", seconds=120)
    print(f"resumed in {time.monotonic() - begun_at:.1f} s")
    deadline = time.monotonic() + 60
    while counter.heard[-1][0] < number + 20:
        assert time.monotonic() < deadline, f"it does not go on: {counter.heard[-3:]}"
        time.sleep(0.1)
    came = [heard for heard, _ in counter.heard]
    assert came == sorted(came)
    assert came[came.index(number) + 1] <= number + 2  # one datagram may be lost with the freeze
    told = int(autovibe.json("machine", "exec", "counter", "--", "date", "+%s")["stdout"])
    assert abs(told - time.time()) < 30  # its clock was set

    assert autovibe.json("machine", "terminate", "counter")["status"] == "terminated"
    accounts.close()
    assert accounts.looks > 100
    assert accounts.broken == []
    assert frozen_after <= FROZEN_WITHIN
    assert off_after <= OFF_WITHIN
