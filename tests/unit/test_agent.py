"""The guest agent's client against hostile and broken agents: a socket that says what a test tells it to."""

from __future__ import annotations

import base64
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.vm import agent as module
from autovibe.node.vm.agent import Agent, AgentError, AgentRefused, AgentTimeout, NotRunning
from tests.contract.guest_agent import GuestAgent, refused, told

Serve = Callable[..., Agent]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a guest's agent and give the client of it."""
    guests: list[GuestAgent] = []

    def start(speak: Any, **more: Any) -> Agent:
        guests.append(GuestAgent(tmp_path / "qga", speak, **more))
        return Agent(tmp_path / "qga", 100)

    yield start
    for guest in guests:
        guest.close()


def test_no_socket_means_no_agent(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"^QEMU guest agent is not running$"):
        Agent(tmp_path / "none").ping()


def test_a_silent_agent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "qga"))
        server.listen()
        began = time.monotonic()
        with pytest.raises(AgentError, match=r"^QEMU guest agent is not running$"):
            Agent(tmp_path / "qga").ping()
        assert time.monotonic() - began < 2


def test_leftovers_of_a_former_client_are_skipped(serve: Any) -> None:
    agent = serve(lambda request: told({"pid": 7}), before=b'{"return": {"pid": 1}}\n\xff{"return": 5}\n')
    assert agent.exec(["id"]) == 7


def test_errors_are_worded_as_by_proxmox(serve: Any) -> None:
    agent = serve(lambda request: refused("no"))
    with pytest.raises(AgentError, match=r"^Agent error: no$"):
        agent.call("get-time")


HOSTILE = {
    "no json": b"nonsense\n",
    "a list": b"[1]\n",
    "an odd error": b'{"error": 5}\n',
    "bytes": b"\x80\x81\n",
    "nothing": b"{}\n",
    "text": b'{"return": "x"}\n',
    "null": b'{"return": null}\n',
    "a number": b'{"return": 1e999}\n',
    "not a number": b'{"return": {"pid": NaN}}\n',
    "odd fields": b'{"return": {"pid": {}, "exited": [], "exitcode": "x", "out-data": 5, "count": -1}}\n',
    "deep": b'{"return": ' + b"[" * 50_000 + b"\n",
    "deep and closed": b'{"return": ' + b"[" * 900 + b"]" * 900 + b"}\n",
    "many parts": b'{"return": [' + b"[]," * 300_000 + b"1]}\n",
    "an empty object": b'{"return": {}}\n',
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_strange_answers_are_errors_not_faults(serve: Serve, answer: bytes) -> None:
    agent = serve(lambda request: answer)
    for call in (
        lambda: agent.exec(["id"]),
        lambda: agent.exec_status(1),
        lambda: agent.read_file("/x"),
        lambda: agent.write_file("/x", b"y"),
        agent.freeze,
    ):
        with pytest.raises(AgentError) as found:
            call()
        assert len(str(found.value)) < 3000


@pytest.mark.parametrize("command", ["get-time", "exec-status"])
def test_an_endless_answer_is_cut_off(serve: Serve, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BULKY_BYTES", 6 << 20)
    agent = serve(lambda request: b"x" * (64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(AgentError, match=r"^Agent error: the guest agent's answer is too long$"):
            agent.call(command)
        # What the guest's double holds to send is not counted twice: its own 64 MiB are there before.
        assert tracemalloc.get_traced_memory()[1] < (64 << 20) + (16 << 20)
    finally:
        tracemalloc.stop()


def test_a_long_error_is_shortened_and_typographic_quotes_are_ascii(serve: Serve) -> None:
    agent = serve(lambda request: refused("\u201c/nope\u201d " + "x" * 100_000))
    with pytest.raises(AgentRefused, match=r"^Agent error: '/nope' x+$") as found:
        agent.call("exec")
    assert len(str(found.value)) < 2100
    assert found.value.error["class"] == "GenericError"


@pytest.mark.parametrize(
    "synchronise",
    [
        lambda request: b"\xff" * (1 << 20),
        lambda request: b"leftover " * 100_000,
        lambda request: b"\xff" + told(7) + b"\xff" + told(8),
        lambda request: b"\xff[[[[\n",
        lambda request: told(request["arguments"]["id"]),
        lambda request: b"",
    ],
    ids=["marks", "garbage", "other ids", "no json", "no mark", "silence"],
)
def test_an_agent_out_of_step_is_not_running(serve: Serve, synchronise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)
    agent = serve(lambda request: told({}), synchronise=synchronise)
    with pytest.raises(NotRunning):
        agent.ping()
    assert not agent.is_running()


def test_answers_to_former_synchronisations_are_passed_over(serve: Serve) -> None:
    def late(request: dict[str, Any]) -> bytes:
        return b'{"return": {"pid"' + b"\xff" + told(3) + told({"pid": 1}) + b"\xff" + told(request["arguments"]["id"])

    agent = serve(lambda request: told({"pid": 7}), synchronise=late)
    assert agent.exec(["id"]) == 7


def test_an_agent_that_falls_silent_is_a_timeout(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND_SECONDS", 0.2)
    agent = serve(lambda request: b"")
    with pytest.raises(AgentTimeout, match=r"^VM 100 qga command 'guest-get-time' failed - got timeout$"):
        agent.call("get-time")


def test_an_answer_that_drips_is_given_up() -> None:
    """The time is that of the whole answer, not of a piece of it."""
    left, right = socket.socketpair()
    channel = module._Channel.__new__(module._Channel)
    channel._socket, channel._unread = left, b""
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.05):
            right.sendall(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(TimeoutError):
            channel.receive(0.4, 1 << 20)
    finally:
        stop.set()
        thread.join()
        left.close()
        right.close()


def test_commands_that_end_the_guest_succeed_in_silence(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVING_SECONDS", 0.2)
    answers = {"guest-suspend-ram": refused("not supported", "CommandNotFound")}
    agent = serve(lambda request: answers.get(request["execute"], b""))
    assert agent.call("shutdown") is None
    with pytest.raises(AgentRefused, match="not supported"):
        agent.call("suspend-ram")


def test_a_call_waits_its_turn_but_not_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_SECONDS", 0.2)
    agent = serve(lambda request: told({}))
    with agent._turn, pytest.raises(NotRunning):
        Agent(agent._path).call("get-time")
    assert agent.call("get-time") == {}


def test_bytes_come_as_latin1(serve: Any) -> None:
    data = base64.b64encode(b"\xc3\xa9\xff").decode()
    agent = serve(lambda request: told({"exited": True, "exitcode": 0, "out-data": data, "err-data": ""}))
    assert agent.exec_status(1) == {"exited": 1, "exitcode": 0, "out-data": "\u00c3\u00a9\u00ff", "out-truncated": 0}


def test_callers_take_turns(serve: Any) -> None:
    agent = serve(lambda request: (time.sleep(0.05), told({"pid": 1}))[1])
    threads = [threading.Thread(target=agent.exec, args=(["id"],)) for _ in range(8)]
    found: list[BaseException] = []
    threading.excepthook, hook = (lambda args: found.append(args.exc_value)), threading.excepthook  # type: ignore[assignment]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert found == []


def test_a_file_is_read_in_pieces_from_an_offset_up_to_a_limit(serve: Serve) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB
    place = 0
    asked: list[Any] = []

    def speak(request: dict[str, Any]) -> bytes:
        nonlocal place
        name, values = request["execute"].removeprefix("guest-"), request.get("arguments", {})
        asked.append((name, {key: value for key, value in values.items() if key != "handle"}))
        if name == "file-open":
            place = 0
            return told(1000)
        if name == "file-seek":
            place = values["offset"]
        if name == "file-read":
            piece = data[place : place + values["count"]]
            place += len(piece)
            at_end = len(piece) < values["count"]
            return told({"count": len(piece), "buf-b64": base64.b64encode(piece).decode(), "eof": at_end})
        return told({})

    agent = serve(speak)
    answer = agent.read_file("/x")
    assert answer == {"content": data.decode("latin1"), "bytes-read": len(data)}
    assert [name for name, _ in asked] == ["file-open", "file-read", "file-read", "file-read", "file-close"]
    asked.clear()
    answer = agent.read_file("/x", limit=10, offset=300)
    assert answer == {"content": data[300:310].decode("latin1"), "bytes-read": 10, "truncated": 1}
    assert asked[1] == ("file-seek", {"offset": 300, "whence": "set"})


def test_a_refused_read_closes_the_file(serve: Serve) -> None:
    asked: list[str] = []

    def speak(request: dict[str, Any]) -> bytes:
        asked.append(request["execute"])
        return told(1) if request["execute"] != "guest-file-read" else refused("failed to read file")

    agent = serve(speak)
    with pytest.raises(AgentError, match=r"^Agent error: failed to read file$"):
        agent.read_file("/x")
    assert asked[-1] == "guest-file-close"


def test_a_file_that_never_ends_and_has_nothing_is_given_up(serve: Serve) -> None:
    nothing = {"count": 0, "buf-b64": "", "eof": False}
    agent = serve(lambda request: told(nothing if request["execute"] == "guest-file-read" else 1))
    with pytest.raises(AgentError, match="malformed"):
        agent.read_file("/x")
