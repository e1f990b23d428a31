"""2,000 listeners to live events of one Hub: how late an event is (commit to receipt), and the memory a listener costs.

The Hub is a process of its own, as `serve hub` runs it. The listeners are raw sockets in this process, each with a
request of its own; half hear everything, half one project of two. Events are written by this process, 20 a second, so
that they take the way of another hub process's: the poll on SQLite, NOTIFY on PostgreSQL. While they listen, one client
asks for the Hub's health as fast as it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import httpx2
import psutil

from autovibe.domain import Event
from autovibe.settings import Settings
from autovibe.store import Store
from autovibe.store.rows import CHANNEL
from tests.api.conftest import KEY, settings_of
from tests.bench.figure import Figure
from tests.conftest import private_postgres

LISTENERS = 2000
EVENTS_A_SECOND = 20
SECONDS = 15.0
_WARM_UP = 50  # listeners that come and go before memory is first measured
_HUB = "import json, sys; from autovibe import app, settings; app.serve(settings.load(**json.loads(sys.argv[1])))"
_ID = re.compile(rb"^data: \{\"id\":(\d+)", re.MULTILINE)
PROJECTS = (uuid4(), uuid4())


def figures() -> Iterator[Figure]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    home = Path(tempfile.mkdtemp(prefix="av-bench-"))
    try:
        yield from _figures("SQLite", settings_of(home / "s", log_level="warning"))
        with private_postgres() as server:
            url = server.create(is_migrated=True, backups=home)
            yield from _figures("PostgreSQL", settings_of(home / "p", log_level="warning", database_url=url))
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _figures(kind: str, settings: Settings) -> Iterator[Figure]:
    with _hub(settings) as process:
        heard = asyncio.run(_listen(settings, process))
    assert heard.count == heard.expected, f"{heard.expected - heard.count} of {heard.expected} events were not heard"
    ordered = sorted(heard.delays)
    late = ordered[int(len(ordered) * 0.99)]
    yield Figure(f"{LISTENERS:,} listeners: delay of an event, p99, {kind}", late, 0, "s", 2)
    yield Figure(f"{LISTENERS:,} listeners: delay of an event, median, {kind}", ordered[len(ordered) // 2], 0, "s")
    yield Figure(f"{LISTENERS:,} listeners: memory of the Hub a listener, {kind}", heard.kilobytes, 0, "KB", 100)
    slow = sorted(heard.others)[int(len(heard.others) * 0.99)] * 1000
    yield Figure(f"{LISTENERS:,} listeners: another request, p99, {kind}", slow, 0, "ms")


@dataclass
class _Heard:
    delays: array[float] = field(default_factory=lambda: array("d"))
    committed: dict[int, float] = field(default_factory=dict)
    early: list[tuple[int, float]] = field(default_factory=list)  # heard before this process noted the commit
    others: list[float] = field(default_factory=list)
    count: int = 0
    expected: int = 0
    kilobytes: float = 0.0
    is_over: bool = False


class _Client(asyncio.Protocol):
    def __init__(self, heard: _Heard, path: str, ready: asyncio.Future[None]) -> None:
        self._heard, self._path, self._ready = heard, path, ready
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        head = f"GET {self._path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {KEY}\r\nAccept: text/event-stream"
        transport.write(f"{head}\r\n\r\n".encode())  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        moment = time.monotonic()
        if not self._ready.done() and b": listening" in data:
            self._ready.set_result(None)
        data = self._rest + data
        lines = data.rfind(b"\n") + 1
        self._rest = data[lines:]
        heard = self._heard
        for found in _ID.findall(data[:lines]):
            heard.count += 1
            committed = heard.committed.get(int(found))
            if committed is None:
                heard.early.append((int(found), moment))
            else:
                heard.delays.append(moment - committed)


async def _listen(settings: Settings, process: psutil.Process) -> _Heard:
    heard, loop = _Heard(), asyncio.get_running_loop()

    async def come(count: int) -> list[asyncio.BaseTransport]:
        found = []
        for first in range(0, count, 50):
            waiting = []
            for number in range(first, min(first + 50, count)):
                path = "/api/v1/events?kind=bench"
                if number % 2:
                    path += f"&project_uuid={PROJECTS[number % 4 // 2]}"
                ready: asyncio.Future[None] = loop.create_future()
                made = await loop.create_connection(
                    lambda path=path, ready=ready: _Client(heard, path, ready), "127.0.0.1", settings.hub_port
                )
                found.append(made[0])
                waiting.append(ready)
            await asyncio.wait_for(asyncio.gather(*waiting), 60)
        return found

    for transport in await come(_WARM_UP):
        transport.abort()  # type: ignore[attr-defined]
    await asyncio.sleep(2)
    before = process.memory_info().rss
    listeners = await come(LISTENERS)
    highest = process.memory_info().rss
    threads = [
        threading.Thread(target=_write, args=(settings, heard)),
        threading.Thread(target=_ask, args=(settings, heard)),
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads[:1]) or heard.count < heard.expected:
        await asyncio.sleep(0.25)
        highest = max(highest, process.memory_info().rss)
        if heard.is_over and time.monotonic() - max(heard.committed.values()) > 30:
            break
    heard.is_over = True
    await asyncio.to_thread(threads[1].join)
    heard.kilobytes = (highest - before) / 1000 / LISTENERS
    heard.delays.extend(max(0.0, moment - heard.committed[event]) for event, moment in heard.early)
    for transport in listeners:
        transport.abort()  # type: ignore[attr-defined]
    return heard


def _write(settings: Settings, heard: _Heard) -> None:
    """Events of two projects by turns; each is heard by half of the listeners and a quarter."""
    store = Store(settings.hub_database_url)
    begin = time.monotonic()
    for number in range(int(SECONDS * EVENTS_A_SECOND)):
        time.sleep(max(0.0, begin + number / EVENTS_A_SECOND - time.monotonic()))
        with store.transaction() as session:
            event = Event(
                kind="bench.event",
                object_uuid=UUID(int=number),
                project_uuid=PROJECTS[number % 2],
                body={"status": "working", "step": "clone", "machine_uuid": str(PROJECTS[0])},
            )
            session.add(event)
            session.flush()
            if not store.is_sqlite:
                session.connection().exec_driver_sql(f"NOTIFY {CHANNEL}")
        heard.committed[event.id or 0] = time.monotonic()
        heard.expected += LISTENERS // 2 + LISTENERS // 4
    store.close()
    heard.is_over = True


def _ask(settings: Settings, heard: _Heard) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=settings.hub_url, headers=headers, trust_env=False, timeout=60) as http:
        while not heard.is_over:
            start = time.perf_counter()
            http.get("/api/v1/projects?limit=1").raise_for_status()
            heard.others.append(time.perf_counter() - start)
            time.sleep(0.02)


@contextlib.contextmanager
def _hub(settings: Settings) -> Iterator[psutil.Process]:
    given = {
        name: str(getattr(settings, name)) for name in ("home", "hub_port", "node_port", "database_url", "log_level")
    }
    given |= {"api_key": KEY, "node_accel": "tcg", "rate_limit_per_minute": 0, "min_free_gb": 0}
    log = settings.home / "out.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", _HUB, json.dumps(given)], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{settings.hub_url}/api/v1/health", trust_env=False, timeout=10).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the Hub does not answer"
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)
