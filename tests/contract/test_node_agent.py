"""The guest agent over the node's API: its answers as recorded, its errors in their order, and guests that lie.

The node, its API and the agent's client are real; the guest's side of the socket says what the test tells it to.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.vm import agent as module
from autovibe.node.vm.agent import Agent
from tests.contract.guest_agent import GuestAgent, refused, told
from tests.contract.node_parts import Client, FlagQemu, make_node

V = "/nodes/pvetest/qemu/100"
MISSING = "Failed to execute child process \u201c/nope\u201d (No such file or directory)"
RESULTS: dict[str, Any] = {
    "guest-get-host-name": {"host-name": "g\u00e4st"},
    "guest-fsfreeze-status": "thawed",
    "guest-fsfreeze-freeze": 2,
    "guest-fsfreeze-thaw": 2,
    "guest-get-time": 1795171046283982000,
    "guest-get-fsinfo": [],
    "guest-fstrim": {"paths": []},
    "guest-exec": {"pid": 147},
    "guest-file-open": 1000,
    "guest-file-close": {},
    "guest-file-flush": {},
    "guest-set-user-password": {},
}


class GuestQemu(FlagQemu):
    """VMs whose agent is a scripted one behind a real socket."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.socket = folder / "qga"

    def agent(self, vmid: int) -> Agent:  # type: ignore[override]
        return Agent(self.socket, vmid)


@pytest.fixture
def client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Client]:
    node = make_node(tmp_path / "node", GuestQemu(tmp_path))
    found = Client(node)
    found.do("POST", "/nodes/pvetest/qemu", vmid=100, memory=64, agent=1)
    found.do("POST", f"{V}/status/start")
    with caplog.at_level(logging.WARNING):
        yield found
    node.stop()
    assert [record for record in caplog.records if record.exc_info] == []  # no defect, whatever the guest said


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[GuestAgent]:
    def speak(request: dict[str, Any]) -> bytes:
        name, values = request["execute"], request.get("arguments", {})
        if name == "guest-file-write":
            return told({"count": len(base64.b64decode(values["buf-b64"])), "eof": False})
        return told(RESULTS[name]) if name in RESULTS else refused(f"{name} is disabled", "CommandNotFound")

    found = GuestAgent(tmp_path / "qga", speak)
    yield found
    found.close()


def test_the_three_reasons_in_their_order(tmp_path: Path) -> None:
    node = make_node(tmp_path / "node", GuestQemu(tmp_path))
    client = Client(node)
    client.do("POST", "/nodes/pvetest/qemu", vmid=100, memory=64)
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "ping", {}),
        ("GET", "get-osinfo", {}),
        ("POST", "exec", {"command": "id"}),
        ("GET", "exec-status", {"pid": 1}),
        ("GET", "file-read", {"file": "/x"}),
        ("POST", "file-write", {"file": "/x", "content": "y"}),
        ("POST", "set-user-password", {"username": "root", "password": "secret"}),
    ]

    def reasons() -> set[str]:
        answers = [client.ask(method, f"{V}/agent/{name}", fields) for method, name, fields in calls]
        assert {answer.status for answer in answers} == {500}
        assert all(answer.json == {"data": None, "message": f"{answer.reason}\n"} for answer in answers)
        return {answer.reason for answer in answers}

    assert reasons() == {"No QEMU guest agent configured"}  # also of a VM that does not run
    client.ask("PUT", f"{V}/config", {"agent": "enabled=1"})
    assert reasons() == {"VM 100 is not running"}
    client.do("POST", f"{V}/status/start")
    assert reasons() == {"QEMU guest agent is not running"}
    missing = client.ask("POST", "/nodes/pvetest/qemu/999/agent/ping")
    assert missing.reason == "Configuration file 'nodes/pvetest/qemu-server/999.conf' does not exist"
    node.stop()


def test_the_index_names_every_command(client: Client) -> None:
    names = [entry["name"] for entry in client.get(f"{V}/agent")]
    assert names == sorted(names)
    assert len(names) == 25
    assert {"exec", "exec-status", "file-read", "file-write", "set-user-password", "get-vcpus"} <= set(names)
    assert client.get("/nodes/pvetest/qemu/999/agent") == client.get(f"{V}/agent")


def test_results_are_handed_on_untouched(client: Client, guest: GuestAgent) -> None:
    assert client.ask("POST", f"{V}/agent/ping").data == {"result": {}}
    assert client.ask("POST", f"{V}/agent", {"command": "ping"}).data == {"result": {}}
    assert client.get(f"{V}/agent/get-time") == {"result": 1795171046283982000}
    assert client.get(f"{V}/agent/get-fsinfo") == {"result": []}
    assert client.ask("POST", f"{V}/agent/fsfreeze-status").data == {"result": "thawed"}
    assert client.ask("POST", f"{V}/agent/fsfreeze-freeze").data == {"result": 2}
    assert client.ask("POST", f"{V}/agent/fsfreeze-thaw").data == {"result": 2}
    assert client.ask("POST", f"{V}/agent/fstrim").data == {"result": {"paths": []}}
    # QEMU's agent writes other characters as escapes; those it does not are bytes, each a character.
    guest.speak = lambda request: b'{"return": {"host-name": "g\xc3\xa4st \\u00e9"}}\n'
    assert client.get(f"{V}/agent/get-host-name") == {"result": {"host-name": "g\u00c3\u00a4st \u00e9"}}


def test_an_error_of_a_plain_command_is_its_result(client: Client, guest: GuestAgent) -> None:
    """Status 200, as on a real Proxmox: the Ansible inventory looks for `error` in the result."""
    answer = client.ask("GET", f"{V}/agent/network-get-interfaces")
    error = {"class": "CommandNotFound", "desc": "guest-network-get-interfaces is disabled"}
    assert answer.data == {"result": {"error": error}}


def test_exec_and_its_status(client: Client, guest: GuestAgent) -> None:
    fields = [("command", "sh"), ("command", "-c"), ("command", "echo \u00e9"), ("input-data", "\u00fc\n\0")]
    assert client.ask("POST", f"{V}/agent/exec", fields).data == {"pid": 147}
    sent = guest.requests[-1]["arguments"]
    assert sent == {"path": "sh", "arg": ["-c", "echo \u00e9"], "capture-output": True, "input-data": "/AoA"}
    both = {"exited": True, "exitcode": 3, "out-data": "b3V0Cg==", "err-data": "ZXJyCg=="}
    guest.speak = lambda request: told(both)
    assert client.get(f"{V}/agent/exec-status", pid=147) == {
        "exited": 1, "exitcode": 3, "out-data": "out\n", "err-data": "err\n", "out-truncated": 0, "err-truncated": 0,
    }  # fmt: skip
    guest.speak = lambda request: told({"exited": False})
    assert client.get(f"{V}/agent/exec-status", pid=147) == {"exited": 0}
    guest.speak = lambda request: told({"exited": True, "signal": 9})
    assert client.get(f"{V}/agent/exec-status", pid=147) == {"exited": 1, "signal": 9}
    full = {"exited": True, "exitcode": 0, "out-truncated": True}
    full["out-data"] = base64.b64encode(b"\xc3\xa9\xff\0" * (4 << 20)).decode()
    guest.speak = lambda request: told(full)
    answer = client.get(f"{V}/agent/exec-status", pid=147)
    assert (len(answer["out-data"]), answer["out-data"][:4], answer["out-truncated"]) == (
        16 << 20,
        "\u00c3\u00a9\u00ff\0",
        1,
    )
    guest.speak = lambda request: refused("PID ld does not exist")
    again = client.ask("GET", f"{V}/agent/exec-status", {"pid": 147})
    assert (again.status, again.reason) == (500, "Agent error: PID ld does not exist")


def test_a_missing_program_is_an_ascii_500(client: Client, guest: GuestAgent) -> None:
    guest.speak = lambda request: refused(MISSING)
    answer = client.ask("POST", f"{V}/agent/exec", {"command": "/nope"})
    text = f"Agent error: {MISSING}".replace("\u201c", "'").replace("\u201d", "'")
    assert (answer.status, answer.reason, answer.json["message"]) == (500, text, f"{text}\n")
    assert text.isascii()


def test_exec_needs_something_to_do(client: Client, guest: GuestAgent) -> None:
    assert client.ask("POST", f"{V}/agent/exec").json["errors"] == {
        "command": "property is missing and it is not optional"
    }
    headers = {"Authorization": client.authorization, "Content-Type": "application/json"}
    empty = client.ask("POST", f"{V}/agent/exec", body=b'{"command": []}', headers=headers)
    assert empty.reason == "command or input-data (or both) required"
    long = client.ask("POST", f"{V}/agent/exec", {"command": "cat", "input-data": "x" * 65537})
    assert (long.status, long.json["errors"]) == (400, {"input-data": "value may only be 65536 characters long"})
    assert all(request["execute"] == "guest-ping" for request in guest.requests)


def test_files(client: Client, guest: GuestAgent) -> None:
    written: list[bytes] = []
    known = guest.speak

    def speak(request: dict[str, Any]) -> bytes:
        if request["execute"] == "guest-file-write":
            written.append(base64.b64decode(request["arguments"]["buf-b64"]))
        return known(request)

    guest.speak = speak
    limit = "x" * 61440
    for content, encode, kept in (
        ("caf\u00e9\n", {}, b"caf\xe9\n"),
        ("aGVs\nbG8=", {"encode": 0}, None),
        ("aGVsbG8=", {"encode": 0}, b"hello"),
        (limit, {"encode": 1}, limit.encode()),
        ("\u20ac", {}, None),
        ("", {}, b""),
    ):
        written.clear()
        answer = client.ask("POST", f"{V}/agent/file-write", {"file": "/x", "content": content, **encode})
        if kept is None:
            assert answer.status in (400, 500)
        else:
            assert answer.data is None
            assert b"".join(written) == kept
    assert guest.requests[-1]["execute"] == "guest-file-close"
    long = client.ask("POST", f"{V}/agent/file-write", {"file": "/x", "content": limit + "x"})
    assert long.json["errors"] == {"content": "value may only be 61440 characters long"}
    guest.speak = lambda request: refused("failed to open file '/x' (mode: 'r'): No such file or directory")
    absent = client.ask("GET", f"{V}/agent/file-read", {"file": "/x"})
    assert absent.reason == "Agent error: failed to open file '/x' (mode: 'r'): No such file or directory"
    assert client.ask("GET", f"{V}/agent/file-read", {"file": "/x", "count": (16 << 20) + 1}).status == 400


def test_reading_a_file(client: Client, guest: GuestAgent) -> None:
    data = b"caf\xc3\xa9\xff"

    def speak(request: dict[str, Any]) -> bytes:
        if request["execute"] != "guest-file-read":
            return told(1000)
        piece = data[: request["arguments"]["count"]]
        return told({"count": len(piece), "buf-b64": base64.b64encode(piece).decode(), "eof": len(piece) == len(data)})

    guest.speak = speak
    assert client.get(f"{V}/agent/file-read", file="/x") == {"content": "caf\u00c3\u00a9\u00ff", "bytes-read": 6}
    assert client.get(f"{V}/agent/file-read", file="/x", count=3) == {
        "content": "caf", "bytes-read": 3, "truncated": 1,
    }  # fmt: skip
    raw = client.get(f"{V}/agent/file-read", file="/x", decode=0)
    assert base64.b64decode(raw["content"]) == data


def test_passwords_go_in_base64(client: Client, guest: GuestAgent) -> None:
    fields = {"username": "root", "password": "s\u00e9cret"}
    assert client.ask("POST", f"{V}/agent/set-user-password", fields).data == {"result": {}}
    sent = guest.requests[-1]["arguments"]
    assert (base64.b64decode(sent["password"]), sent["username"], sent["crypted"]) == (b"s\xe9cret", "root", False)
    client.ask("POST", f"{V}/agent/set-user-password", {"username": "root", "password": "$6$abc", "crypted": 1})
    assert guest.requests[-1]["arguments"]["crypted"] is True
    short = client.ask("POST", f"{V}/agent/set-user-password", {"username": "root", "password": "abc"})
    assert short.json["errors"] == {"password": "value must be at least 5 characters long"}
    guest.speak = lambda request: refused("child process has failed to set user password")
    assert client.ask("POST", f"{V}/agent/set-user-password", fields).reason == (
        "Agent error: child process has failed to set user password"
    )


@pytest.mark.parametrize("command", ["shutdown", "suspend-ram", "suspend-disk", "suspend-hybrid"])
def test_a_command_that_ends_the_guest_has_no_result(
    client: Client, guest: GuestAgent, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVING_SECONDS", 0.1)
    guest.speak = lambda request: b""
    assert client.ask("POST", f"{V}/agent/{command}").data == {"result": None}
    guest.speak = lambda request: refused("not supported")
    assert client.ask("POST", f"{V}/agent/{command}").data["result"]["error"]["desc"] == "not supported"


LIES = [
    b"\x80\n", b"[]\n", b'"x"\n', b"{}\n", b'{"return": NaN}\n', b'{"return": "\\ud800"}\n', b'{"error": null}\n',
    b'{"error": "\\u4e2d\\n\\r\\u0000"}\n', b'{"error": {"desc": "a\\r\\nX-Evil: 1\\r\\n\\r\\n\\u4e2d"}}\n',
    b'{"return": {"pid": 1e999}}\n', b'{"return": {"pid": "7; reboot"}}\n', b'{"return": ' + b"[" * 5000 + b"\n",
    b'{"return": {"exited": 1, "out-data": "%%%", "signal": null}}\n', b'{"return": {"exited": 1, "out-data": [1]}}\n',
    b'{"return": ' + b"9" * 5000 + b"}\n",
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_guest_gets_clean_answers(client: Client, guest: GuestAgent, lie: bytes) -> None:
    guest.speak = lambda request: lie
    for method, name, fields in (
        ("GET", "get-osinfo", {}),
        ("POST", "exec", {"command": "id"}),
        ("GET", "exec-status", {"pid": 1}),
        ("GET", "file-read", {"file": "/x"}),
        ("POST", "file-write", {"file": "/x", "content": "y"}),
        ("POST", "set-user-password", {"username": "root", "password": "secret"}),
    ):
        answer = client.ask(method, f"{V}/agent/{name}", fields)
        assert answer.status in (200, 500)
        assert answer.reason.isascii()
        assert "x-evil" not in answer.headers
        json.loads(answer.body, parse_constant=lambda text: pytest.fail(text))


def test_a_silent_command_is_a_timeout(client: Client, guest: GuestAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND_SECONDS", 0.2)
    guest.speak = lambda request: b""
    answer = client.ask("GET", f"{V}/agent/get-osinfo")
    assert (answer.status, answer.reason) == (500, "VM 100 qga command 'guest-get-osinfo' failed - got timeout")


def test_calls_of_one_vm_take_turns_and_do_not_mix(client: Client, guest: GuestAgent) -> None:
    under_way, most = 0, 0
    mutex = threading.Lock()

    def speak(request: dict[str, Any]) -> bytes:
        nonlocal under_way, most
        with mutex:
            under_way += 1
            most = max(most, under_way)
        answer = told({"pid": int(request["arguments"]["arg"][0])})
        with mutex:
            under_way -= 1
        return answer

    guest.speak = speak
    found: dict[int, Any] = {}

    def execute(number: int) -> None:
        found[number] = client.ask("POST", f"{V}/agent/exec", [("command", "x"), ("command", number)]).data["pid"]

    threads = [threading.Thread(target=execute, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(16)}
    assert most == 1


def test_a_call_behind_a_long_one_is_given_up(
    client: Client, guest: GuestAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_SECONDS", 0.2)
    is_freezing, may_end = threading.Event(), threading.Event()

    def speak(request: dict[str, Any]) -> bytes:
        is_freezing.set()
        may_end.wait(20)
        return told(1)

    guest.speak = speak
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(client.ask("POST", f"{V}/agent/fsfreeze-freeze").data))
    thread.start()
    assert is_freezing.wait(20)
    assert client.ask("POST", f"{V}/agent/ping").reason == "QEMU guest agent is not running"
    may_end.set()
    thread.join()
    assert results == [{"result": 1}]
