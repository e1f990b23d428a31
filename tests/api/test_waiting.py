"""Long polls and streams: woken by changes, holding no thread; events that come out of order."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from uuid import UUID, uuid4

import httpx2
from sqlmodel import Session

from autovibe.domain import Event, Output
from autovibe.domain.columns import now
from autovibe.hub.arrivals import Reader
from autovibe.store import Store, rows
from autovibe.types import MachineStatus
from tests.api.conftest import KEY, Served, until

PROMPT = {"prompt": "true", "status": MachineStatus.working, "address": None}


def later(seconds: float, do: object, *arguments: object, **named: object) -> None:
    timer = threading.Timer(seconds, do, arguments, named)  # type: ignore[arg-type]
    timer.daemon = True
    timer.start()


def write(served: Served, machine: object, start: int, body: bytes, **changes: object) -> None:
    with served.hub.store.transaction() as session:
        session.add(Output(machine_uuid=machine, start=start, body=body))
    served.change(machine, output_bytes=start + len(body), **changes)  # type: ignore[arg-type]


def test_a_wait_ends_as_soon_as_the_machine_is_there(served: Served) -> None:
    machine = served.machine(status=MachineStatus.spawning)
    later(0.5, served.change, machine, status=MachineStatus.active)
    start = time.monotonic()
    assert served.get(f"/machines/{machine}", wait=20).json()["status"] == "active"
    assert 0.4 < time.monotonic() - start < 2


def test_a_wait_that_runs_out_answers_what_there_is(served: Served) -> None:
    machine = served.machine(status=MachineStatus.spawning)
    start = time.monotonic()
    assert served.get(f"/machines/{machine}", wait=0.3).json()["status"] == "spawning"
    assert 0.3 <= time.monotonic() - start < 2


def test_a_wait_for_the_end_of_the_prompt(served: Served) -> None:
    machine = served.machine(**PROMPT)
    assert served.get(f"/machines/{machine}", wait=5).json()["status"] == "working"
    later(0.4, served.change, machine, status=MachineStatus.active, exit_status=3, finished_at=now())
    shown = served.get(f"/machines/{machine}", wait_for="finished").json()
    assert (shown["status"], shown["exit_status"]) == ("active", 3)
    idle = served.machine()
    assert served.get(f"/machines/{idle}", wait=20, wait_for="finished").json()["status"] == "active"


def test_sixty_waiters_hold_up_nobody(served: Served) -> None:
    machine = served.machine(status=MachineStatus.spawning)
    limits = httpx2.Limits(max_connections=100)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(
        base_url=served.http.base_url, headers=headers, timeout=60, limits=limits, trust_env=False
    ) as http:
        with ThreadPoolExecutor(60) as pool:
            waiting = [pool.submit(http.get, f"/machines/{machine}", params={"wait": 50}) for _ in range(60)]
            until(lambda: len(served.hub.events._watches.get(machine, ())) == 60, 20)
            slowest = 0.0
            for _ in range(10):
                start = time.monotonic()
                assert served.get(f"/machines/{machine}").status_code == 200
                slowest = max(slowest, time.monotonic() - start)
            assert slowest < 1.0
            served.change(machine, status=MachineStatus.active)
            assert {future.result(30).json()["status"] for future in waiting} == {"active"}
    until(lambda: not served.hub.events._watches.get(machine))


def test_what_another_process_writes_wakes_a_wait(served: Served) -> None:
    machine = served.machine(status=MachineStatus.spawning)

    def elsewhere() -> None:
        with closing(Store(served.hub.store.url.render_as_string(hide_password=False))) as store:
            with store.transaction() as session:
                from autovibe.domain import Machine

                rows.get(session, Machine, machine).status = MachineStatus.active
                rows.record(session, "machine.status", machine)

    later(0.3, elsewhere)
    start = time.monotonic()
    assert served.get(f"/machines/{machine}", wait=20).json()["status"] == "active"
    assert time.monotonic() - start < 3


def test_logs_are_read_in_chunks_cut_between_characters(served: Served) -> None:
    machine = served.machine(**PROMPT)
    text = "héllo wörld ✓\n" * 3
    body = text.encode()
    write(served, machine, 0, body[:7])
    write(served, machine, 7, body[7:20])
    write(served, machine, 20, body[20:])
    whole = served.get(f"/machines/{machine}/logs").json()
    assert whole == {"offset": 0, "next_offset": len(body), "text": text, "finished": False}
    for limit in (1, 2, 3, 5, 16):
        read, offset = "", 0
        while offset < len(body):
            chunk = served.get(f"/machines/{machine}/logs", offset=offset, limit=limit).json()
            assert chunk["next_offset"] > offset
            read, offset = read + chunk["text"], chunk["next_offset"]
        assert limit < 4 or read == text
    write(served, machine, len(body), "✓".encode()[:2])
    cut_off = served.get(f"/machines/{machine}/logs", offset=len(body)).json()
    assert (cut_off["text"], cut_off["next_offset"]) == ("", len(body))
    served.change(machine, status=MachineStatus.active, finished_at=now(), exit_status=0)
    assert served.get(f"/machines/{machine}/logs", offset=len(body)).json()["text"] == "\ufffd"
    beyond = served.get(f"/machines/{machine}/logs", offset=10_000).json()
    assert (beyond["text"], beyond["finished"]) == ("", True)


def test_logs_are_waited_for(served: Served) -> None:
    machine = served.machine(**PROMPT)
    later(0.4, write, served, machine, 0, b"here\n")
    start = time.monotonic()
    assert served.get(f"/machines/{machine}/logs", wait=20).json()["text"] == "here\n"
    assert time.monotonic() - start < 3


def test_logs_are_followed_as_text_until_the_prompt_ends(served: Served) -> None:
    machine = served.machine(**PROMPT)
    write(served, machine, 0, b"one\n")
    later(0.4, write, served, machine, 4, b"two\n")
    later(0.8, write, served, machine, 8, b"three\n", status=MachineStatus.active, finished_at=now(), exit_status=0)
    came: list[tuple[float, str]] = []
    start = time.monotonic()
    with served.http.stream("GET", f"/machines/{machine}/logs", params={"follow": 1}) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        for text in answer.iter_text():
            came.append((time.monotonic() - start, text))
    assert "".join(text for _, text in came) == "one\ntwo\nthree\n"
    assert came[0][0] < 0.35
    assert came[-1][0] < 3


def test_logs_are_followed_as_events_and_taken_up_again(served: Served) -> None:
    machine = served.machine(**PROMPT)
    write(served, machine, 0, b"one\n")
    later(0.3, write, served, machine, 4, b"two\n", status=MachineStatus.active, finished_at=now(), exit_status=0)

    def follow(**headers: str) -> str:
        sse = {"Accept": "text/event-stream", **headers}
        with served.http.stream("GET", f"/machines/{machine}/logs?follow=1", headers=sse) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            return "".join(answer.iter_text())

    stream = follow()
    assert stream.startswith(
        'id: 4\nevent: output\ndata: {"offset":0,"next_offset":4,"text":"one\\n","finished":false}\n\n'
    )
    assert "id: 8" in stream
    assert '"finished":true' in stream
    again = follow(**{"Last-Event-ID": "4"})
    assert "one" not in again
    assert "two" in again


def test_a_follower_that_leaves_is_forgotten(served: Served) -> None:
    machine = served.machine(**PROMPT)
    with httpx2.Client(base_url=served.http.base_url, headers=served.http.headers, trust_env=False) as http:
        with http.stream("GET", f"/machines/{machine}/logs?follow=1"):
            until(lambda: served.hub.events._watches.get(machine))
    until(lambda: not served.hub.events._watches.get(machine), 20)


def test_events_that_commit_out_of_order_are_all_seen(store: Store) -> None:
    """PostgreSQL gives ids before commits. On SQLite writes take turns, so there the order cannot differ."""
    reader = Reader(store)

    def read() -> set[UUID]:
        return {event.object_uuid for event in reader.read()}

    assert read() == set()
    objects = [uuid4() for _ in range(4)]
    if store.is_sqlite:
        for uuid in objects:
            with store.transaction() as session:
                rows.record(session, "test", uuid)
        assert read() == set(objects)
        assert read() == set()
        return
    slow, lost = Session(store.engine), Session(store.engine)
    slow.add(Event(kind="test", object_uuid=objects[0]))
    slow.flush()
    lost.add(Event(kind="test", object_uuid=objects[1]))
    lost.flush()
    with store.transaction() as session:
        rows.record(session, "test", objects[2])
    assert read() == {objects[2]}
    lost.rollback()
    time.sleep(2.2)  # longer than a gap is kept when nobody may fill it
    assert read() == set()
    slow.commit()
    with store.transaction() as session:
        rows.record(session, "test", objects[3])
    assert read() == {objects[0], objects[3]}
    time.sleep(2.2)
    assert read() == set()
    assert not reader._gaps
    slow.close()
    lost.close()
