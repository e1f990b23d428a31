"""Live events: nothing lost and nothing twice, in spite of writers that race; filters; slow listeners; who may hear."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlmodel import Session

from autovibe import Client, app, schemas
from autovibe.domain import Event, Operation
from autovibe.hub import feed, history
from autovibe.hub.arrivals import Reader
from autovibe.store import Store, rows
from autovibe.types import OperationKind
from tests.api.conftest import KEY, Served, error_of, serve, settings_of, until

SSE = {"Accept": "text/event-stream"}


class Stream:
    """A listener of a test: reads server-sent events in a thread."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.events: list[tuple[str, str, dict[str, Any]]] = []  # id, name, data
        self.resume_id = ""
        self.comments: list[str] = []
        self.is_over = threading.Event()
        self.is_whole = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        fields: dict[str, str] = {}
        try:
            for line in self.response.iter_lines():
                if line.startswith(":"):
                    self.comments.append(line[2:])
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif fields:
                    self.resume_id = fields.get("id", self.resume_id)
                    if "data" in fields:
                        self.events.append((fields["id"], fields["event"], json.loads(fields["data"])))
                    fields = {}
            self.is_whole = True
        except httpx2.TransportError:
            self.is_whole = False
        self.is_over.set()

    def ids(self) -> list[int]:
        return [data["id"] for _, _, data in self.events]

    def notes(self) -> list[Any]:
        return [data["body"].get("note") for _, _, data in self.events]

    def wait(self, count: int) -> list[tuple[str, str, dict[str, Any]]]:
        until(lambda: len(self.events) >= count, 20)
        return self.events[:count]


@contextmanager
def listening(served: Served, *, last: str = "", key: str = KEY, **params: Any) -> Iterator[Stream]:
    headers = {**SSE, "Authorization": f"Bearer {key}"} | ({"Last-Event-ID": last} if last else {})
    with httpx2.Client(base_url=served.http.base_url, timeout=60, trust_env=False) as http:
        with http.stream("GET", "/events", params=params, headers=headers) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            stream = Stream(response)
            until(lambda: stream.comments)
            yield stream
            with contextlib.suppress(OSError):  # else the connection stays until the thread has read once more
                response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            stream.is_over.wait(5)


def tell(served: Served, kind: str = "test.note", about: UUID | None = None, **body: Any) -> UUID:
    uuid = about or uuid4()
    project = body.pop("project", None)
    with served.hub.store.transaction() as session:
        rows.record(session, kind, uuid, project, **body)
    return uuid


def test_events_come_live_with_their_ids(served: Served) -> None:
    with listening(served, kind="test") as stream:
        uuid = tell(served, note="one")
        tell(served, note="two", project=UUID(int=5))
        (first, name, data), (_, _, other) = stream.wait(2)
    assert first == str(data["id"])
    assert name == data["kind"] == "test.note"
    assert data["object_uuid"] == str(uuid)
    assert set(data) == {"id", "kind", "object_uuid", "project_uuid", "body", "created_at"}
    assert data["body"] == {"note": "one"}
    assert other["project_uuid"] == str(UUID(int=5))
    assert other["id"] > data["id"]


def test_filters(served: Served) -> None:
    machine, other, project = uuid4(), uuid4(), uuid4()
    with (
        listening(served, project_uuid=str(project)) as by_project,
        listening(served, object_uuid=[str(machine), str(other)], kind=["machine", "operation.*"]) as by_object,
        listening(served, kind="machine.status") as by_kind,
        listening(served) as everything,
    ):
        tell(served, "machine.status", machine, project=project, note="a")
        tell(served, "machine.output", machine, project=project, note="b")
        tell(served, "machines.else", other, note="c")
        tell(served, "operation.step", uuid4(), machine_uuid=str(machine), note="d")
        tell(served, "operation.step", uuid4(), machine_uuid=str(uuid4()), note="e")
        tell(served, "machine.status", other, note="f")
        tell(served, "end.test", other, project=project, note="g")
        tell(served, "machine.status", other, note="h")
        assert [data["body"]["note"] for _, _, data in by_project.wait(2)] == ["a", "g"]
        assert [data["body"]["note"] for _, _, data in by_object.wait(5)] == ["a", "b", "d", "f", "h"]
        assert [data["body"]["note"] for _, _, data in by_kind.wait(3)] == ["a", "f", "h"]
        everything.wait(7)
        assert everything.notes() == ["a", "c", "d", "e", "f", "g", "h"]
        since = everything.ids()[0] - 1
    with listening(served, since=since, object_uuid=[str(machine), str(other)], kind=["machine", "operation"]) as again:
        again.wait(5)
        assert again.notes() == ["a", "b", "d", "f", "h"]
    with listening(served, since=since, project_uuid=str(project)) as again:
        again.wait(2)
        assert again.notes() == ["a", "g"]


@pytest.mark.parametrize(
    "params",
    [{"kind": "Machine Status"}, {"kind": "%"}, {"object_uuid": "x"}, {"since": "-1"}, {"since": "x"}, {"limit": "0"}],
)
def test_a_malformed_filter_is_refused(served: Served, params: dict[str, str]) -> None:
    error_of(served.get("/events", **params), 400, "INVALID_REQUEST")
    error_of(served.http.get("/events", params=params, headers=SSE), 400, "INVALID_REQUEST")


def test_a_malformed_resume_id_is_refused(served: Served) -> None:
    for last in ("x", "-1", "9" * 30, "1.5"):
        error_of(served.http.get("/events", headers={**SSE, "Last-Event-ID": last}), 400, "INVALID_REQUEST")


def test_a_cut_stream_is_taken_up_without_loss_or_doubles_under_concurrent_writers(served: Served) -> None:
    """Six threads write 40 transactions each, some rolled back and some slow; the listener is cut off all the time."""
    about, chance = uuid4(), random.Random(4)
    written: list[int] = []

    def write(number: int) -> None:
        own = random.Random(number)
        for _ in range(40):
            is_lost = own.random() < 0.25
            try:
                with served.hub.store.transaction() as session:
                    event = Event(kind="test.race", object_uuid=about)
                    session.add(event)
                    session.flush()
                    time.sleep(own.random() * 0.01)
                    rows.record(session, "test.other", about)
                    if is_lost:
                        raise LookupError
                    found = event.id
            except LookupError:
                continue
            assert found is not None
            written.append(found)

    heard: list[int] = []
    last = ""
    with ThreadPoolExecutor(6) as pool, listening(served, object_uuid=str(about)) as whole:
        last = whole.resume_id or until(lambda: whole.resume_id)
        writers = [pool.submit(write, number) for number in range(6)]
        while not all(writer.done() for writer in writers) or set(written) - set(heard):
            with listening(served, last=last, object_uuid=str(about), kind="test.race") as part:
                until(lambda: part.is_over.wait(chance.random() * 0.2) or part.events or all(w.done() for w in writers))
            part.is_over.wait(5)
            heard += part.ids()
            last = part.resume_id or last
        for writer in writers:
            writer.result()
        assert heard == sorted(written)
        whole.wait(2 * len(written))
        ids = whole.ids()
        assert ids == sorted(set(ids))
        assert [data["id"] for _, name, data in whole.events if name == "test.race"] == sorted(written)
        assert [int(given) for given, _, _ in whole.events] == ids


def test_an_open_transaction_holds_nobody_up_for_long_and_loses_nothing(served: Served) -> None:
    """PostgreSQL: an event whose transaction commits late comes late, and who comes back hears it."""
    if served.hub.store.is_sqlite:
        with served.hub.store.transaction() as session:  # nobody else can write meanwhile
            rows.record(session, "test.slow", UUID(int=1))
        return
    about = uuid4()
    slow = Session(served.hub.store.engine)
    try:
        with listening(served, object_uuid=str(about)) as stream:
            slow.add(Event(kind="test.slow", object_uuid=about))
            slow.flush()
            tell(served, about=about, note="after")
            (resume, _, data), *_ = stream.wait(1)
            assert int(resume) < data["id"] - 1
            with listening(served, last=resume, object_uuid=str(about)) as back:
                back.wait(1)
                assert back.notes() == ["after"]
                slow.commit()
                assert [name for _, name, _ in stream.wait(2)] == ["test.note", "test.slow"]
                assert [name for _, name, _ in back.wait(2)] == ["test.note", "test.slow"]
            tell(served, about=about, note="last")
            (resume, _, data) = stream.wait(3)[2]
            assert int(resume) == data["id"]
        with listening(served, since=int(resume) - 1, object_uuid=str(about)) as again:
            again.wait(1)
            assert again.notes() == ["last"]
    finally:
        slow.close()


def test_a_transaction_that_is_rolled_back_delays_nobody(served: Served) -> None:
    about = uuid4()
    with listening(served, object_uuid=str(about)) as stream:
        for number in range(5):
            with pytest.raises(LookupError):
                lose(served, about)
            tell(served, about=about, note=number)
            (resume, _, data) = stream.wait(number + 1)[number]
            assert resume == str(data["id"])
    assert stream.notes() == [0, 1, 2, 3, 4]


def lose(served: Served, about: UUID) -> None:
    with served.hub.store.transaction() as session:
        session.add(Event(kind="test.lost", object_uuid=about))
        session.flush()
        raise LookupError


def test_gaps_are_given_up_when_nobody_can_fill_them(store: Store) -> None:
    if store.is_sqlite:
        return
    reader = Reader(store)
    assert reader.read() == []
    slow, lost = Session(store.engine), Session(store.engine)
    for session in (slow, lost):
        session.add(Event(kind="test", object_uuid=UUID(int=1)))
        session.flush()
    with store.transaction() as session:
        rows.record(session, "test", UUID(int=2))
    mark = reader.mark
    assert len(reader.read()) == 1
    assert reader.mark == mark
    lost.rollback()
    assert reader.read() == []
    slow.commit()
    assert len(reader.read()) == 1
    assert reader.seconds_to_wait == 0.0
    assert reader.read() == []
    assert (reader.mark, reader.seconds_to_wait) == (mark + 3, None)
    begun = Reader(store)
    slow.add(Event(kind="test", object_uuid=UUID(int=3)))
    slow.flush()
    with store.transaction() as session:
        rows.record(session, "test", UUID(int=4))
    assert begun.read()[-1].object_uuid == UUID(
        int=4
    )  # what lies above a gap it cannot tell from an open one comes too
    assert begun.mark <= mark + 3
    slow.commit()
    assert [event.object_uuid for event in begun.read()] == [UUID(int=3)]
    assert begun.read() == []
    assert begun.mark == mark + 5
    slow.close()
    lost.close()


def test_who_was_away_for_too_long_is_told_what_is_missing(served: Served) -> None:
    about = uuid4()
    for number in range(3):
        tell(served, about=about, note=number)

    def told() -> Any:
        found = served.get("/events", object_uuid=str(about)).json()["events"]
        return found if len(found) == 3 else None

    kept = until(told)
    newest = kept[-1]["id"]
    with listening(served, since=newest + 1000, object_uuid=str(about)) as ahead:
        (resume, name, data), *_ = ahead.wait(1)
        assert (name, data["body"]["first_id"], data["object_uuid"]) == ("reset", int(resume) + 1, None)
        tell(served, about=about, note="go on")
        assert ahead.wait(2)[1][2]["body"] == {"note": "go on"}
    page = served.get("/events", since=newest + 1000, object_uuid=str(about)).json()
    assert page["missed"]["last_id"] == newest + 1000
    with served.hub.store.transaction() as session:
        history.forget(session, datetime.fromisoformat(kept[1]["created_at"]))
    with listening(served, since=kept[0]["id"] - 1, object_uuid=str(about)) as late:
        late.wait(4)
        assert [name for _, name, _ in late.events] == ["reset", "test.note", "test.note", "test.note"]
        assert late.events[0][2]["body"]["last_id"] == kept[0]["id"]
        assert late.notes()[1:] == [1, 2, "go on"]
    page = served.get("/events", since=kept[0]["id"] - 1, object_uuid=str(about)).json()
    assert page["missed"] == {"first_id": kept[0]["id"], "last_id": kept[0]["id"]}
    assert [event["body"]["note"] for event in page["events"]] == [1, 2, "go on"]


def test_pages_are_polled(served: Served) -> None:
    about = uuid4()
    for number in range(5):
        tell(served, about=about, note=number)

    def known() -> Any:
        page = served.get("/events", object_uuid=str(about), limit=2).json()
        return page if [event["body"]["note"] for event in page["events"]] == [3, 4] else None

    last = until(known)
    assert last["has_more"] is False
    first = last["events"][0]["id"] - 4
    read: list[int] = []
    page = served.get("/events", object_uuid=str(about), since=first, limit=2).json()
    while page["events"]:
        read += [event["body"]["note"] for event in page["events"]]
        page = served.get("/events", object_uuid=str(about), since=page["next"], limit=2).json()
    assert read == [0, 1, 2, 3, 4]
    assert (page["has_more"], page["missed"]) == (False, None)
    tell(served, about=about, note=5)
    again = until(lambda: served.get("/events", object_uuid=str(about), since=page["next"]).json()["events"])
    assert [event["body"]["note"] for event in again] == [5]


def test_a_long_history_is_replayed_while_it_grows(served: Served) -> None:
    about = uuid4()
    tell(served, about=about, note=-1)
    since = until(lambda: served.get("/events", object_uuid=str(about)).json()["events"])[0]["id"]
    count = 1700
    with served.hub.store.transaction() as session:
        for number in range(count):
            session.add(Event(kind="test.many", object_uuid=about, body={"note": number}))
    with listening(served, since=since, object_uuid=str(about)) as stream:
        for number in range(50):
            tell(served, about=about, note=count + number)
        stream.wait(count + 50)
        assert stream.notes() == list(range(count + 50))


def test_a_slow_listener_is_dropped_and_others_go_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed, "MOST_EVENTS", 50)
    monkeypatch.setattr(feed, "_LAST_WORDS_SECONDS", 0.5)
    about = uuid4()
    caplog.set_level("INFO", logger="autovibe")
    host, port = served.url.removeprefix("http://").split(":")
    before = served.hub.events.feed.dropped_count
    with socket.socket() as deaf, listening(served, object_uuid=str(about)) as quick:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        request = f"GET /api/v1/events?object_uuid={about} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        deaf.sendall(f"{request}Accept: text/event-stream\r\n\r\n".encode())
        until(lambda: len(served.hub.events.feed.listeners) == 2)
        filling, count = "x" * 20_000, 0
        while served.hub.events.feed.dropped_count == before:
            tell(served, about=about, note=count, filling=filling)
            count += 1
            quick.wait(count)
            assert count < 2000
        until(lambda: len(served.hub.events.feed.listeners) == 1)
        until(lambda: "is cut off" in caplog.text)
        tell(served, about=about, note=count)
        quick.wait(count + 1)
        assert quick.notes() == list(range(count + 1))
        assert "reads too slowly and is dropped after event" in caplog.text


def test_who_reads_again_in_time_is_told_where_to_come_back(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST_EVENTS", 50)
    monkeypatch.setattr(feed, "_LAST_WORDS_SECONDS", 30)
    about = uuid4()
    host, port = served.url.removeprefix("http://").split(":")
    before = served.hub.events.feed.dropped_count
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        request = f"GET /api/v1/events?object_uuid={about} HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\n"
        slow.sendall(f"{request}Accept: text/event-stream\r\n\r\n".encode())
        until(lambda: len(served.hub.events.feed.listeners) == 1)
        count = 0
        while served.hub.events.feed.dropped_count == before:
            tell(served, about=about, note=count, filling="x" * 20_000)
            count += 1
            assert count < 2000
        slow.settimeout(20)
        text = b""
        while part := slow.recv(65536):
            text += part
    blocks = [block for block in text.decode().split("\n\n") if "event: " in block]
    assert "event: dropped" in blocks[-1]
    resume = int(blocks[-1].splitlines()[0].removeprefix("id: "))
    assert json.loads(blocks[-1].splitlines()[2].removeprefix("data: "))["body"]["resume_id"] == resume
    notes = [json.loads(block.splitlines()[2].removeprefix("data: "))["body"]["note"] for block in blocks[:-1]]
    assert notes == list(range(len(notes)))
    with listening(served, last=str(resume), object_uuid=str(about)) as back:
        back.wait(count - len(notes))
        assert back.notes() == list(range(len(notes), count))


def test_who_takes_nothing_of_a_long_history_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    about = uuid4()
    with served.hub.store.transaction() as session:
        for _ in range(600):
            session.add(Event(kind="test.many", object_uuid=about, body={"filling": "x" * 20_000}))
        rows.record(session, "test.end", about)
    host, port = served.url.removeprefix("http://").split(":")
    feed_here = served.hub.events.feed
    with socket.socket() as deaf, listening(served, kind="nothing.ever"):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        request = (
            f"GET /api/v1/events?since=1&object_uuid={about} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        )
        deaf.sendall(f"{request}Accept: text/event-stream\r\n\r\n".encode())
        until(lambda: [one for one in list(feed_here.listeners) if one.is_writing and one.since == 1])
        monkeypatch.setattr(feed, "STUCK_SECONDS", 0.2)
        time.sleep(0.3)
        loop = feed_here._loop
        assert loop is not None
        loop.call_soon_threadsafe(feed_here._look_after, loop)
        until(lambda: len(feed_here.listeners) == 1)


def test_a_listener_that_leaves_is_forgotten(served: Served) -> None:
    until(lambda: len(served.hub.events.feed.listeners) == 0)
    with listening(served):
        until(lambda: len(served.hub.events.feed.listeners) == 1)
    until(lambda: len(served.hub.events.feed.listeners) == 0)


def test_a_quiet_stream_says_that_it_lives_and_where_it_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(served, kind="nothing.ever") as stream:
        tell(served, note="not for it")
        newest = until(lambda: served.get("/events", kind="test").json()["next"])
        feed_here = served.hub.events.feed
        monkeypatch.setattr(feed, "ALIVE_SECONDS", 0.0)
        loop = feed_here._loop
        assert loop is not None
        loop.call_soon_threadsafe(lambda: [wake(one) for one in feed_here.listeners])
        until(lambda: "alive" in stream.comments)
        until(lambda: int(stream.resume_id) >= newest)
    assert stream.events == []


def wake(listener: feed.Listener) -> None:
    """As if it had heard nothing for a while."""
    listener.is_alive_due = True
    listener.asked_at = float("-inf")
    listener.wake()


def test_a_hub_that_stops_ends_its_streams(home: Path) -> None:
    parts = app.build(settings_of(home))
    parts.start()
    url, stop = serve(parts)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=f"{url}/api/v1", headers=headers, timeout=30, trust_env=False) as http:
        with listening(Served(parts, url, http), kind="nothing.ever") as stream:
            stop()
            assert stream.is_over.wait(5)
            assert stream.is_whole
    parts.close()


# Who may hear


def key_for(served: Served, **order: Any) -> Any:
    answer = served.post("/keys", {"name": f"k-{uuid4().hex[:8]}", "role": "viewer", **order})
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_a_key_for_one_project_hears_of_that_project_alone(served: Served) -> None:
    own, other = served.project(), served.project()
    key = key_for(served, project_uuid=str(own))["key"]
    about = uuid4()
    with listening(served, key=key) as stream, listening(served, key=key, object_uuid=str(about)) as narrow:
        tell(served, about=about, project=other, note="other")
        tell(served, about=about, note="of the whole Hub")
        tell(served, about=about, project=own, note="own")
        stream.wait(1)
        narrow.wait(1)
        since = stream.ids()[0]
        assert stream.notes() == narrow.notes() == ["own"]
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=served.http.base_url, headers=headers, trust_env=False, timeout=30) as http:
        page = http.get("/events", params={"object_uuid": str(about), "since": since - 3}).json()
        assert [event["body"]["note"] for event in page["events"]] == ["own"]
        error_of(http.get("/events", params={"project_uuid": str(other)}), 403, "FORBIDDEN")
        error_of(http.get("/events", params={"project_uuid": str(other)}, headers=SSE), 403, "FORBIDDEN")
        error_of(http.get(f"{served.url}/metrics"), 403, "FORBIDDEN")


def test_a_stream_ends_with_its_key(served: Served) -> None:
    made = key_for(served)
    with listening(served, key=made["key"], kind="nothing.ever") as stream, listening(served, kind="nothing.ever"):
        feed_here = served.hub.events.feed
        loop = feed_here._loop
        assert loop is not None

        def ask_all() -> None:
            loop.call_soon_threadsafe(lambda: [wake(one) for one in list(feed_here.listeners)])

        ask_all()
        until(lambda: "alive" in stream.comments)
        served.post(f"/keys/{made['uuid']}/revoke").raise_for_status()
        ask_all()
        assert stream.is_over.wait(10)
        assert stream.is_whole
        until(lambda: len(feed_here.listeners) == 1)


def test_a_long_history_is_told_no_further_than_its_key_is_good(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, about = key_for(served), uuid4()
    tell(served, about=about)
    first = until(lambda: served.get("/events", object_uuid=str(about)).json()["events"])
    with served.hub.store.transaction() as session:
        for _ in range(1100):
            session.add(Event(kind="test.many", object_uuid=about, body={}))
    wanted = {"object_uuid": str(about), "since": first[0]["id"], "limit": 1000}
    until(lambda: served.get("/events", **wanted).json()["has_more"])
    monkeypatch.setattr(feed, "ASKED_SECONDS", 0.0)
    between = history.between

    def revoked_meanwhile(*arguments: Any) -> Any:
        served.post(f"/keys/{made['uuid']}/revoke").raise_for_status()
        return between(*arguments)

    monkeypatch.setattr(history, "between", revoked_meanwhile)
    with listening(served, key=made["key"], since=first[0]["id"], object_uuid=str(about)) as stream:
        assert stream.is_over.wait(10)
        assert len(stream.events) == 500


def test_the_client_waits_by_the_stream(served: Served) -> None:
    machine = served.machine(status="spawning")
    with served.hub.store.transaction() as session:
        operation = Operation(kind=OperationKind.spawn, status="running", object_uuid=machine, machine_uuid=machine)
        session.add(operation)
        uuid = operation.uuid
    steps, looks = ["clone", "start", "mark"], []

    def go_on() -> None:
        with served.hub.store.transaction() as session:
            row = session.get_one(Operation, uuid)
            row.step = steps.pop(0)
            row.status = "running" if steps else "succeeded"
            rows.record(session, "operation.step" if steps else "operation.status", uuid)

    def watch(seen: schemas.Operation) -> None:
        looks.append(seen.step)
        if len(looks) > 1 and steps:
            threading.Timer(0.05, go_on).start()

    with Client(served.url, KEY) as client:
        assert client.operations.wait(uuid, watch=watch).status == "succeeded"
        assert not client.connection.has_no_events
        stream = client.events.stream(object_uuid=uuid, since=0)
        kinds = list(itertools.takewhile(lambda kind: kind != "operation.status", (event.kind for event in stream)))
        assert kinds[-2:] == ["operation.step", "operation.step"]
        stream.close()
        page = client.events.list(object_uuid=[uuid], kind="operation", limit=2)
        assert [event.kind for event in page.events] == ["operation.step", "operation.status"]
    assert looks == [None, None, "clone", "start", "mark"]
    until(lambda: len(served.hub.events.feed.listeners) == 0)
