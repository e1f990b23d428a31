"""The guest agent's client against hostile and broken agents: a socket that says what a test tells it to."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node import agent as module
from autovibe.node.agent import Agent, AgentError

Speak = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Speak], Agent]]:
    """Start an agent whose answer to each request is the given function's; synchronisation is answered rightly."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = tmp_path / "qga"

    def run(speak: Speak, before: bytes) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
                connection.sendall(before)
                for line in lines:
                    request = json.loads(line.lstrip(b"\xff"))
                    if request["execute"] == "guest-sync-delimited":
                        answer = b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"
                    else:
                        answer = speak(request)
                    connection.sendall(answer)

    def start(speak: Speak, before: bytes = b"") -> Agent:
        server.bind(str(path))
        server.listen()
        threading.Thread(target=run, args=(speak, before), daemon=True).start()
        return Agent(path)

    yield start
    server.close()


def told(value: Any) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


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
    agent = serve(lambda request: json.dumps({"error": {"class": "GenericError", "desc": "no"}}).encode() + b"\n")
    with pytest.raises(AgentError, match=r"^Agent error: no$"):
        agent.call("get-time")


@pytest.mark.parametrize(
    "answer", [b"nonsense\n", b"[1]\n", b'{"error": 5}\n', b"\x80\x81\n", b"{}\n", b'{"return": "x"}\n']
)
def test_strange_answers_are_errors_not_faults(serve: Any, answer: bytes) -> None:
    agent = serve(lambda request: answer)
    for call in (lambda: agent.exec(["id"]), lambda: agent.exec_status(1), lambda: agent.read_file("/x"), agent.freeze):
        with pytest.raises(AgentError):
            call()


def test_an_endless_answer_is_cut_off(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMIT_BYTES", 1 << 20)
    agent = serve(lambda request: b"x" * (2 << 20))
    with pytest.raises(AgentError):
        agent.call("get-time")


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
