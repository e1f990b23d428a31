"""The SDK against a real HTTP server: errors become their classes, lost connections are taken up, waits end."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from autovibe import AutovibeError, Client, errors, schemas
from autovibe.sdk import connection, waiting
from tests.unit import wire as wires
from tests.unit.wire import Refuse, Wire


@pytest.fixture
def wire() -> Iterator[Wire]:
    with wires.serving() as made:
        yield made


@pytest.fixture
def client(wire: Wire) -> Iterator[Client]:
    with Client(wire.url, "av_key") as made:
        yield made


def test_it_imports_without_the_programs() -> None:
    script = (
        "import sys, autovibe; autovibe.Client\n"
        "foreign = {'fastapi', 'sqlmodel', 'sqlalchemy', 'paramiko', 'proxmoxer', 'psutil', 'typer', 'rich'}\n"
        "assert not foreign & set(sys.modules), foreign & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_key_and_the_request_travel(wire: Wire, client: Client) -> None:
    wire.on("POST", "/projects", lambda given: wires.project(given["name"]))
    budgets = schemas.ResourceBudgets.model_validate({"daily_money": 1.5, "max_concurrent_machines": 2})
    made = client.projects.create("hello", resource_budgets=budgets)
    assert isinstance(made.uuid, UUID)
    _, path, body, headers = wire.asked[0]
    assert path == "/projects"
    assert headers["Authorization"] == "Bearer av_key"
    assert UUID(headers["Idempotency-Key"])
    assert body["name"] == "hello"
    assert body["resource_budgets"]["daily_money"]["amount"] == 1.5
    assert "greediness" not in body


@pytest.mark.parametrize("kind", sorted(errors.CLASSES.values(), key=lambda kind: kind.code))
def test_every_error_comes_back_as_its_class(wire: Wire, client: Client, kind: type[AutovibeError]) -> None:
    def refuse(_given: Any, _uuid: str) -> None:
        raise Refuse(400, kind.code, "What happened.")

    wire.on("GET", r"/machines/(.*)", refuse)
    with pytest.raises(AutovibeError) as caught:
        client.machines.get(UUID(int=1))
    assert type(caught.value) is kind
    assert caught.value.message == "What happened."
    assert caught.value.details["request_id"] == "r-1"


def test_what_is_no_hub_is_told_apart(wire: Wire, client: Client) -> None:
    wire.on("GET", "/projects", lambda _given: b"<html>")
    with pytest.raises(errors.InternalError, match="is it a Hub"):
        client.projects.list()
    for url in ("ftp://x", "http://", "nonsense", "http://h:99999"):
        with pytest.raises(errors.InvalidRequest, match="URL"):
            Client(url, "k")


def test_a_name_never_becomes_part_of_a_path(wire: Wire, client: Client) -> None:
    for word in ("../projects", "one", ""):
        with pytest.raises(errors.InvalidRequest):
            client.machines.get(word)
    assert not wire.asked


def test_a_malformed_order_is_refused_before_it_is_sent(wire: Wire, client: Client) -> None:
    with pytest.raises(errors.InvalidRequest, match="name"):
        client.projects.create("no spaces")
    with pytest.raises(errors.InvalidRequest, match="exactly one"):
        client.machines.exec(UUID(int=1), ["ls"], script="ls")
    assert not wire.asked


def test_a_lost_connection_is_taken_up_under_the_same_key(
    wire: Wire, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE_SECONDS", 0.01)
    wire.on("POST", "/projects", lambda given: wires.project(given["name"]))
    wire.drops = 3
    client.projects.create("hello")
    keys = {headers["Idempotency-Key"] for *_, headers in wire.asked}
    assert (len(wire.asked), len(keys)) == (4, 1)


def test_retries_are_bounded(wire: Wire, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE_SECONDS", 0.01)
    wire.drops = 100
    with pytest.raises(errors.Unavailable, match="autovibe up"):
        client.projects.list()
    assert len(wire.asked) == connection.ATTEMPTS


def test_exec_is_never_sent_twice(wire: Wire, client: Client) -> None:
    wire.drops = 1
    with pytest.raises(errors.Unavailable):
        client.machines.exec(UUID(int=1), ["touch", "x"])
    assert len(wire.asked) == 1


def test_nobody_listening_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE_SECONDS", 0.01)
    with pytest.raises(errors.Unavailable) as caught:
        Client("http://127.0.0.1:9", "k").health()
    assert type(caught.value) is errors.Unavailable


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE"])
def test_loopback_ignores_proxies_and_bundles(wire: Wire, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert Client(wire.url, "k").projects.list().total_count == 0


def test_the_own_hubs_certificate_is_accepted_and_no_other(wire: Wire, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
        ]
        command += ["-subj", "/CN=hub.example", "-addext", "subjectAltName=DNS:hub.example"]
        files = ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")]
        subprocess.run([*command, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "mine.pem", tmp_path / "mine.key")
    with wires.serving(context) as secure:
        with Client(secure.url, "k", ca_file=tmp_path / "mine.pem") as client:
            assert client.projects.list().total_count == 0
        for ca_file in (tmp_path / "other.pem", None):
            with pytest.raises(errors.Unavailable, match="certificate"):
                Client(secure.url, "k", ca_file=ca_file).projects.list()


def test_pages_are_walked(wire: Wire, client: Client) -> None:
    names = [f"p{number}" for number in range(450)]
    for name in names:
        wire.put("projects", wires.project(name))
    assert [item.name for item in client.projects.each()] == names[::-1]
    assert len(wire.asked) == 3


def test_an_operation_is_waited_for_and_watched(wire: Wire, client: Client) -> None:
    row = wire.put("operations", wires.operation())
    seen: list[str | None] = []

    def watch(operation: schemas.Operation) -> None:
        seen.append(operation.step)
        row.update(step="mark", status="succeeded") if len(seen) == 2 else row.update(step="start")

    assert client.operations.wait(row["uuid"], watch=watch).status == "succeeded"
    assert seen == ["clone", "start", "mark"]
    assert [given.get("wait") for _, path, given, _ in wire.asked if path != "/events"] == [None, "2.0", "2.0"]


def test_a_wait_looks_when_an_event_tells_it_to(wire: Wire, client: Client) -> None:
    """Three looks and one stream, however long it takes; without one it would ask every two seconds."""
    row = wire.put("operations", wires.operation())
    seen: list[str | None] = []
    first_look, second_look = threading.Event(), threading.Event()

    def events() -> Iterator[str]:
        yield ": listening\nid: 6\n\n"
        first_look.wait(10)
        row.update(step="start")
        yield wires.event(7, "operation.step", row["uuid"], step="start")
        second_look.wait(10)
        row.update(step="mark", status="succeeded")
        yield wires.event(8, "operation.status", row["uuid"], status="succeeded")
        first_look.clear()
        first_look.wait(10)

    def watch(operation: schemas.Operation) -> None:
        seen.append(operation.step)
        if len(seen) == 2:
            first_look.set()
        elif len(seen) == 3:
            second_look.set()

    wire.on("GET", "/events", lambda _given: wires.Sse(events()))
    assert client.operations.wait(row["uuid"], watch=watch).status == "succeeded"
    first_look.set()
    assert seen == ["clone", "clone", "start", "mark"]
    streams = [given for _, path, given, _ in wire.asked if path == "/events"]
    assert streams == [{"object_uuid": row["uuid"]}]
    assert [given for _, path, given, _ in wire.asked if path != "/events"] == [{}] * 4


@pytest.mark.parametrize("refusal", [Refuse(403, "FORBIDDEN", "No."), Refuse(404, "NOT_FOUND", "An older Hub."), None])
def test_without_a_stream_a_wait_polls_and_does_not_ask_for_one_again(
    wire: Wire, client: Client, monkeypatch: pytest.MonkeyPatch, refusal: Refuse | None
) -> None:
    monkeypatch.setattr(waiting, "STREAM_SECONDS", 0.2)
    held = threading.Event()

    def events(_given: Any) -> Any:
        if refusal is not None:
            raise refusal

        def silence() -> Iterator[str]:  # what a proxy does that passes on only whole answers
            held.wait(10)
            yield ""

        return wires.Sse(silence())

    wire.on("GET", "/events", events)
    for _ in range(2):
        row = wire.put("operations", wires.operation())
        timer = threading.Timer(0.5, row.update, kwargs={"status": "succeeded"})
        timer.start()
        assert client.operations.wait(row["uuid"], timeout_seconds=20).status == "succeeded"
    held.set()
    assert len([path for _, path, *_ in wire.asked if path == "/events"]) == 1


def test_a_stream_is_taken_up_where_it_was_and_each_event_comes_once(wire: Wire, client: Client) -> None:
    about = str(UUID(int=1))
    parts = [
        [wires.event(5, "test", about, note="a\u2028b"), wires.event(8, "test", about, resume_id=5)],
        [": listening\n\n", wires.event(8, "test", about, resume_id=5), wires.event(7, "test", about)],
        [wires.event(9, "dropped", None, resume_id=9), wires.event(10, "test", about)],
    ]
    wire.on("GET", "/events", lambda _given: wires.Sse(parts.pop(0)))
    with client.events.stream(kind="test", since=3) as stream:
        assert [next(stream).id for _ in range(4)] == [5, 8, 7, 10]
        assert stream.last_id == 10
    assert [headers.get("Last-Event-ID") for *_, headers in wire.asked] == ["3", "5", "7"]


@pytest.fixture
def held(wire: Wire) -> Iterator[None]:
    """Streams of events tell one and then stay open, until the test is over."""
    over = threading.Event()

    def events() -> Iterator[str]:
        yield wires.event(1, "test", None)
        over.wait(20)

    wire.on("GET", "/events", lambda _given: wires.Sse(events()))
    yield
    over.set()


@pytest.mark.usefixtures("held")
def test_a_stream_ends_when_another_thread_closes_it(client: Client) -> None:
    stream = client.events.stream()
    assert next(stream).id == 1
    threading.Timer(0.3, stream.close).start()
    assert list(stream) == []


@pytest.mark.usefixtures("held")
def test_streams_that_are_left_in_the_middle_hold_no_connections(client: Client) -> None:
    for _ in range(3):
        with client.events.stream() as stream:
            assert next(stream).id == 1
    del stream
    assert client.connection._http._transport._pool.connections == []  # type: ignore[attr-defined]


def test_a_stream_that_cannot_be_had_says_why(wire: Wire, client: Client) -> None:
    with pytest.raises(errors.NotFound):
        next(client.events.stream())
    wire.on("GET", "/events", lambda _given: {"events": [], "next": 4, "has_more": False, "missed": None})
    with pytest.raises(errors.InternalError, match="no event stream"):
        next(client.events.stream())
    assert client.events.list(object_uuid=UUID(int=2), kind=["machine", "hub"]).next == 4


def test_a_failed_operation_raises_what_failed(wire: Wire, client: Client) -> None:
    error = {"code": "PROVISION_FAILED", "message": "The playbook failed.", "details": {}}
    row = wire.put("operations", wires.operation(status="failed", error=error))
    with pytest.raises(errors.ProvisionFailed) as caught:
        client.operations.wait(row["uuid"])
    assert caught.value.details["operation_uuid"] == row["uuid"]
    row["error"] = {"code": "GUEST_UNREACHABLE", "message": "No answer.", "details": {}}
    with pytest.raises(errors.OperationFailed, match="No answer") as failed:
        client.operations.wait(row["uuid"])
    assert isinstance(failed.value.__cause__, errors.GuestUnreachable)


def test_a_wait_outlives_a_restart_of_the_hub(wire: Wire, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE_SECONDS", 0.01)
    row = wire.put("operations", wires.operation())
    threading.Timer(0.5, lambda: (setattr(wire, "drops", 8), row.update(status="succeeded"))).start()
    assert client.operations.wait(row["uuid"], timeout_seconds=20).status == "succeeded"
    assert len(wire.asked) > connection.ATTEMPTS


def test_a_wait_gives_up_when_the_hub_stays_away(wire: Wire, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "OUTAGE_SECONDS", 0.2)
    wire.drops = 1000
    with pytest.raises(errors.Unavailable):
        client.operations.wait(UUID(int=1))


def test_a_deadline_names_what_it_waited_for(wire: Wire, client: Client) -> None:
    row = wire.put("operations", wires.operation(step="reach"))
    started = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded, match="at step 'reach'"):
        client.operations.wait(row["uuid"], timeout_seconds=0.4)
    assert time.monotonic() - started < 5


def test_spawn_waits_until_ready_and_then_finished(wire: Wire, client: Client) -> None:
    owner = wire.put("projects", wires.project("p"))
    running = wire.put("operations", wires.operation())
    row = wires.machine("m", owner, status="spawning", operation_uuid=running["uuid"], prompt="true")

    def spawn(given: Any) -> Any:
        assert given == {
            "project_uuid": owner["uuid"],
            "type": "shell",
            "prompt": "true",
            "file_modifications": {"/a": "b"},
        }
        return wire.put("machines", row)

    def on_step(_operation: schemas.Operation) -> None:
        running["status"] = "succeeded"
        row["status"] = "working"

    wire.on("POST", "/machines", spawn)
    ready = client.machines.spawn(
        owner["uuid"], prompt="true", file_modifications={"/a": "b"}, wait=True, watch=on_step
    )
    assert ready.status == "working"
    threading.Timer(0.3, lambda: row.update(status="active", exit_status=4)).start()
    assert client.machines.wait(ready.uuid, until="finished").exit_status == 4


def test_waiting_for_a_failed_machine_says_why(wire: Wire, client: Client) -> None:
    owner = wires.project("p")
    row = wire.put("machines", wires.machine("m", owner, status="failed", error_message="The guest never answered."))
    with pytest.raises(errors.OperationFailed, match="never answered"):
        client.machines.wait(row["uuid"])


def test_terminate_waits_through_a_spawn_that_is_undone(wire: Wire, client: Client) -> None:
    owner = wires.project("p")
    error = {"code": "CONFLICT", "message": "It was terminated meanwhile.", "details": {}}
    spawn = wire.put("operations", wires.operation(status="failed", error=error))
    row = wire.put("machines", wires.machine("m", owner, status="terminated"))
    answers = iter(["spawning", "terminated"])
    wire.on(
        "POST",
        r"/machines/(.*)/terminate",
        lambda *_: {**row, "status": next(answers), "operation_uuid": spawn["uuid"], "final_checkpoint_uuid": None},
    )
    assert client.machines.terminate(row["uuid"], wait=True).status == "terminated"


def test_a_log_is_followed_to_its_end(wire: Wire, client: Client) -> None:
    text = "one\ntwo\nthree\n"

    def logs(given: Any, _uuid: str) -> Any:
        offset = int(given["offset"])
        piece = text[offset : offset + 5]
        end = offset + len(piece)
        return {"offset": offset, "next_offset": end, "text": piece, "finished": end == len(text)}

    wire.on("GET", r"/machines/(.*)/logs", logs)
    assert "".join(chunk.text for chunk in client.machines.follow(UUID(int=1))) == text
    assert len(wire.asked) == 4  # the first asked for a stream, and this Hub has none


def test_a_log_is_followed_in_one_stream_and_taken_up_again(wire: Wire, client: Client) -> None:
    text = "one\ntwo\nthree\n"

    def chunk(begin: int, end: int) -> dict[str, Any]:
        return {"offset": begin, "next_offset": end, "text": text[begin:end], "finished": end == len(text)}

    def logs(given: Any, _uuid: str) -> Any:
        offset = int(given["offset"])
        if "follow" not in given:
            return chunk(offset, offset + 1)
        ends = [offset + 2, offset + 4] if offset == 0 else [len(text)]
        blocks = []
        for end in ends:
            blocks.append(f"id: {end}\nevent: output\ndata: {json.dumps(chunk(offset, end))}\n\n")
            offset = end
        return wires.Sse([*blocks[:1], ": alive\n\n", *blocks[1:]])

    wire.on("GET", r"/machines/(.*)/logs", logs)
    assert "".join(piece.text for piece in client.machines.follow(UUID(int=1))) == text
    assert [given["offset"] for _, _, given, _ in wire.asked] == ["0", "4", "5"]


def test_health_is_read_also_when_it_is_bad(wire: Wire, client: Client) -> None:
    body = {
        "status": "unhealthy",
        "version": "0.1.0",
        "services": {"database": {"status": "unhealthy", "message": "gone"}},
        "active_machine_count": 0,
        "utilization_percent": None,
        "last_checkpoint_at": None,
        "timestamp": wires.NOW,
    }

    def refuse(_given: Any) -> None:
        refusal = Refuse(503, "", "")
        refusal.body = body
        raise refusal

    wire.on("GET", "/health", refuse)
    assert client.health().services["database"].message == "gone"
