"""Consoles: asking for one, the websocket, and what a hostile client can do with either. The VM is a socket here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    Request,
    TextMessage,
)

from autovibe.node import console
from autovibe.node.access import auth
from autovibe.node.vm.monitor import MonitorError
from tests.contract.node_parts import Client, FlagQemu, make_node

N = "/nodes/pvetest"
V = f"{N}/qemu/100"


class ConsoleQemu(FlagQemu):
    """Displays and serial ports are sockets; the VM's ends are in `ends`, what a terminal kept in `kept`."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[socket.socket] = []
        self.passwords: list[str] = []
        self.open_ports: set[str] = set()
        self.kept = b""
        self.came = threading.Semaphore(0)

    def _open(self, vmid: int) -> socket.socket:
        if vmid not in self.started:
            raise MonitorError(f"VM {vmid} qmp command 'set_password' failed - unable to connect to VM: gone")
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        self.ends.append(ours)
        self.came.release()
        return theirs

    def open_display(self, vmid: int, password: str) -> socket.socket:
        self.passwords.append(password[:8])
        return self._open(vmid)

    def open_serial(self, vmid: int, port: str) -> socket.socket:
        opened = self._open(vmid)
        self.open_ports.add(port)
        return opened

    def close_serial(self, _vmid: int, port: str) -> None:
        self.open_ports.discard(port)

    def keep_console(self, _vmid: int, _port: str, data: bytes) -> None:
        self.kept += data

    def end(self) -> socket.socket:
        """The VM's end of the console that was opened last."""
        assert self.came.acquire(timeout=20)
        return self.ends[-1]


@pytest.fixture
def qemu() -> Iterator[ConsoleQemu]:
    made = ConsoleQemu()
    yield made
    for end in made.ends:
        end.close()


@pytest.fixture
def client(tmp_path: Path, qemu: ConsoleQemu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(auth, "FAILED_LOGIN_DELAY_SECONDS", 0.05)
    monkeypatch.setattr("autovibe.node.verbs.console.REFUSED_SECONDS", 0.05)
    node = make_node(tmp_path / "node", qemu)
    found = Client(node)
    found.do("POST", f"{N}/qemu", vmid=100, serial0="socket", serial2="socket", name="vm")
    found.do("POST", f"{V}/status/start")
    yield found
    node.stop()


class WebSocket:
    """A client of ours, over wsproto; `raw` sends bytes that no library would."""

    def __init__(self, client: Client, path: str, protocols: tuple[str, ...] = ("binary",)) -> None:
        plain = socket.create_connection(("127.0.0.1", client.node.port), timeout=20)
        self.socket: ssl.SSLSocket = client.context.wrap_socket(plain)
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self.events: list[Any] = []
        self.data = b""
        self.closed: CloseConnection | None = None
        headers = [(b"authorization", client.authorization.encode())]
        request = Request(host="node", target=path, subprotocols=list(protocols), extra_headers=headers)
        self.raw(self.protocol.send(request))
        self.answer = self.event(AcceptConnection, RejectConnection)

    def raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send(self, data: bytes | str) -> None:
        event = TextMessage(data=data) if isinstance(data, str) else BytesMessage(data=data)
        self.raw(self.protocol.send(event))

    def event(self, *kinds: type) -> Any:
        while True:
            for place, event in enumerate(self.events):
                if isinstance(event, kinds):
                    return self.events.pop(place)
            self._receive()

    def _receive(self) -> None:
        if self.protocol.state is ConnectionState.CLOSED:
            raise EOFError(self.events)
        block = self.socket.recv(65536)
        self.protocol.receive_data(block or None)
        for event in self.protocol.events():
            if isinstance(event, BytesMessage):
                self.data += event.data
            else:
                self.events.append(event)

    def read(self, size: int) -> bytes:
        while len(self.data) < size:
            self._receive()
        found, self.data = self.data[:size], self.data[size:]
        return found

    def close_code(self) -> int:
        code = int(self.event(CloseConnection).code)
        self.socket.close()
        return code


def ask(client: Client, verb: str = "vncproxy", **fields: Any) -> dict[str, Any]:
    found = client.ask("POST", f"{V}/{verb}", fields).data
    assert isinstance(found, dict)
    return found


def path_of(asked: dict[str, Any], **other: Any) -> str:
    query = urlencode({"port": asked["port"], "vncticket": asked["ticket"], **other})
    return f"/api2/json{V}/vncwebsocket?{query}"


def status_of(client: Client, asked: dict[str, Any]) -> dict[str, Any]:
    found = client.get(f"{N}/tasks/{asked['upid']}/status")
    assert isinstance(found, dict)
    return found


# Asking


def test_what_is_answered(client: Client) -> None:
    asked = ask(client, websocket=1)
    assert set(asked) == {"user", "ticket", "cert", "port", "upid", "password"}
    assert (asked["user"], asked["port"]) == ("root@pam!autovibe", "5900")
    assert asked["ticket"].startswith(f"{asked['password']}:PVEVNC:")
    assert len(asked["password"]) == 8
    assert asked["cert"].startswith("-----BEGIN CERTIFICATE-----")
    assert ":vncproxy:100:root@pam!autovibe:" in asked["upid"]
    assert ask(client, websocket=1, **{"generate-password": 1})["port"] == "5901"
    assert status_of(client, asked)["status"] == "running"
    terminal = ask(client, "termproxy")
    assert set(terminal) == {"user", "ticket", "port", "upid"}
    assert terminal["ticket"].startswith("PVEVNC:")
    assert client.ask("GET", path_of(asked)).data == {"port": "5900"}, "without an upgrade it is a plain answer"


def test_what_is_refused(client: Client, qemu: ConsoleQemu) -> None:
    client.do("POST", f"{N}/qemu", vmid=101)
    client.do("POST", f"{N}/qemu", vmid=102, vga="serial0", serial0="socket")
    for vmid, verb, status, reason in (
        (101, "termproxy", 500, "Timeout while waiting for port '5900' to get ready!"),
        (100, "spiceproxy", 500, "no spice port"),
        (101, "spiceproxy", 500, "VM 101 not running"),
        (999, "vncproxy", 500, "Configuration file 'nodes/pvetest/qemu-server/999.conf' does not exist"),
        (102, "vncproxy", 501, "A serial terminal over VNC is not implemented, use termproxy"),
    ):
        answer = client.ask("POST", f"{N}/qemu/{vmid}/{verb}", {})
        assert (answer.status, answer.reason) == (status, reason)
    assert client.ask("POST", f"{V}/termproxy", {"serial": "serial1"}).status == 500
    for shell in ("termproxy", "vncshell", "spiceshell"):
        assert client.ask("POST", f"{N}/{shell}", {}).status == 501
    assert qemu.ends == []


def test_nobody_comes(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "WAIT_SECONDS", 0.3)
    asked = ask(client, websocket=1)
    assert client.end_of(asked["upid"]) == "connection timed out"
    late = WebSocket(client, path_of(asked)).answer
    assert late.status_code == 500
    assert ask(client, websocket=1)["port"] == asked["port"], "the port is free again"


def test_a_stopped_console_ends(client: Client, qemu: ConsoleQemu) -> None:
    asked = ask(client, websocket=1)
    web = WebSocket(client, path_of(asked))
    qemu.end()
    client.ask("DELETE", f"{N}/tasks/{asked['upid']}")
    assert web.close_code() == 1001
    assert client.end_of(asked["upid"]) == "received interrupt"


# The handshake


def test_the_ticket_is_for_one_user_one_vm_one_port(client: Client) -> None:
    asked = ask(client, websocket=1)
    client.do("POST", f"{N}/qemu", vmid=101)
    other = f"/api2/json{N}/qemu/101/vncwebsocket?{path_of(asked).partition('?')[2]}"
    for path in (path_of(asked, vncticket=asked["ticket"][:-3]), path_of(asked, port=5901), other):
        answer = WebSocket(client, path).answer
        assert answer.status_code == 401, path
    assert WebSocket(client, path_of(asked, port=80)).answer.status_code == 400
    assert isinstance(WebSocket(client, path_of(asked)).answer, AcceptConnection)
    assert WebSocket(client, path_of(asked)).answer.status_code == 500, "it is taken"
    client.authorization = "PVEAPIToken=root@pam!autovibe=00000000-0000-0000-0000-000000000000"
    assert WebSocket(client, path_of(asked)).answer.status_code == 401


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Upgrade": "h2c"}, "unable to upgrade to protocol 'h2c'"),
        ({"Sec-WebSocket-Version": "8"}, "unsupported websocket-version '8'"),
        ({"Sec-WebSocket-Key": ""}, "missing websocket-key"),
    ],
)
def test_bad_handshakes(client: Client, change: dict[str, str], reason: str) -> None:
    headers = {
        "Authorization": client.authorization,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    answer = client.ask("GET", path_of(ask(client, websocket=1)), headers={**headers, **change})
    assert (answer.status, answer.reason) == (501, reason)


def test_the_handshakes_answer(client: Client, qemu: ConsoleQemu) -> None:
    """By hand, as a browser does it, and with its first frame in the same record."""
    path = path_of(ask(client, websocket=1))
    key = base64.b64encode(os.urandom(16)).decode()
    plain = socket.create_connection(("127.0.0.1", client.node.port), timeout=20)
    with client.context.wrap_socket(plain) as secured:
        lines = [
            f"GET {path} HTTP/1.1",
            "Host: node",
            f"Authorization: {client.authorization}",
            "Upgrade: WebSocket",
            "Connection: keep-alive, Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Protocol: base64, binary",
        ]
        secured.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + frame(2, b"early"))
        assert qemu.end().recv(100) == b"early"
        answer = secured.recv(4096).decode("latin1").lower().split("\r\n")
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
    assert answer[0] == "http/1.1 101 switching protocols"
    assert f"sec-websocket-accept: {base64.b64encode(digest).decode().lower()}" in answer
    assert "sec-websocket-protocol: binary" in answer


# The relay


def frame(opcode: int, data: bytes, *, first: int = 0x80, is_masked: bool = True) -> bytes:
    size = len(data)
    length = (
        bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2) if size < 1 << 16 else b"\x7f" + size.to_bytes(8)
    )
    if not is_masked:
        return bytes([first | opcode]) + length + data
    return bytes([first | opcode, length[0] | 0x80]) + length[1:] + bytes(4) + data


def test_bytes_go_both_ways(client: Client, qemu: ConsoleQemu) -> None:
    asked = ask(client, websocket=1)
    web = WebSocket(client, path_of(asked))
    assert web.answer.subprotocol == "binary"
    vm = qemu.end()
    assert qemu.passwords == [asked["password"]]
    vm.sendall(b"RFB 003.008\n")
    assert web.read(12) == b"RFB 003.008\n"
    web.send(b"RFB 003.008\n")
    assert vm.recv(12) == b"RFB 003.008\n"
    large = os.urandom(3 << 20)
    sending = threading.Thread(target=vm.sendall, args=(large,))
    sending.start()
    assert web.read(len(large)) == large
    sending.join()
    for start in range(0, 1 << 20, 100_000):
        web.send(large[start : start + 100_000])
    got = b""
    while len(got) < 11 * 100_000:
        got += vm.recv(65536)
    assert got == large[: 11 * 100_000]
    web.raw(web.protocol.send(Ping(payload=b"still there")))
    assert web.event(Pong).payload == b"still there"
    assert status_of(client, asked)["status"] == "running"
    web.raw(web.protocol.send(CloseConnection(code=1000)))
    assert web.close_code() == 1000
    assert vm.recv(1) == b""
    assert client.end_of(asked["upid"]) == "OK"


def test_the_vm_ends_the_connection(client: Client, qemu: ConsoleQemu) -> None:
    asked = ask(client, websocket=1)
    web = WebSocket(client, path_of(asked))
    qemu.end().close()
    assert web.close_code() == 1000
    assert client.end_of(asked["upid"]) == "OK"


def test_a_client_that_is_gone_ends_the_task(client: Client, qemu: ConsoleQemu) -> None:
    asked = ask(client, websocket=1)
    web = WebSocket(client, path_of(asked))
    qemu.end()
    web.socket.close()
    assert client.end_of(asked["upid"]) == "OK"


def test_a_stopped_vm_fails_the_task(client: Client, qemu: ConsoleQemu) -> None:
    client.do("POST", f"{V}/status/stop")
    asked = ask(client, websocket=1)
    web = WebSocket(client, path_of(asked))
    with contextlib.suppress(ssl.SSLError):
        assert web.close_code() in (1006, 1011)
    assert client.end_of(asked["upid"]) == "Failed to run vncproxy."


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(2, b"bare", is_masked=False), 1002),
        (frame(2, b"reserved", first=0xC0), 1002),
        (frame(11, b"unknown"), 1002),
        (frame(9, bytes(126)), 1002),
        (frame(1, b"\xff\xfe"), 1007),
        (frame(2, bytes(200_000)), 1009),
        (frame(2, bytes(100_000), first=0) + frame(0, bytes(100_000), first=0), 1009),
        (b"\x82\xff" + (1 << 62).to_bytes(8) + bytes(4) + bytes(200_000), 1009),
    ],
)
def test_hostile_frames(client: Client, qemu: ConsoleQemu, sent: bytes, code: int) -> None:
    asked = ask(client, websocket=1)
    web = WebSocket(client, path_of(asked))
    qemu.end()
    with contextlib.suppress(OSError):
        web.raw(sent)
    assert web.close_code() == code
    client.end_of(asked["upid"])
    assert client.get("/version")["version"] == "9.2.11"


def test_a_client_that_takes_nothing_stops_the_vms_side(client: Client, qemu: ConsoleQemu) -> None:
    web = WebSocket(client, path_of(ask(client, websocket=1)))
    vm = qemu.end()
    vm.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 64 << 20:
            sent += vm.send(bytes(65536))
    assert sent < 32 << 20
    web.socket.close()


# Terminals


def begin(client: Client, qemu: ConsoleQemu, **fields: Any) -> tuple[dict[str, Any], WebSocket, socket.socket]:
    asked = ask(client, "termproxy", **fields)
    web = WebSocket(client, path_of(asked))
    web.send(f"{asked['user']}:{asked['ticket']}\n")
    assert web.read(2) == b"OK"
    return asked, web, qemu.end()


def test_a_terminal(client: Client, qemu: ConsoleQemu) -> None:
    asked, web, vm = begin(client, qemu)
    assert qemu.open_ports == {"serial0"}
    vm.sendall(b"login: ")
    assert web.read(7) == b"login: "
    web.send("1:80:24:")
    web.send("0:4:root")
    web.send("2")
    typed = "ä\r".encode()
    for byte in f"0:{len(typed)}:".encode() + typed:
        web.send(bytes([byte]))
    web.send("0:1:a0:1:b")
    got = b""
    while len(got) < 9:
        got += vm.recv(100)
    assert got == b"root" + typed + b"ab"
    web.raw(web.protocol.send(CloseConnection(code=1000)))
    assert web.close_code() == 1000
    assert client.end_of(asked["upid"]) == "OK"
    assert (qemu.open_ports, qemu.kept) == (set(), b"login: ")


def test_one_terminal_at_a_time(client: Client, qemu: ConsoleQemu) -> None:
    asked, web, _ = begin(client, qemu)
    second = ask(client, "termproxy")
    assert WebSocket(client, path_of(second)).answer.status_code == 500
    begin(client, qemu, serial="serial2")
    web.socket.close()
    assert client.end_of(asked["upid"]) == "OK"
    assert isinstance(WebSocket(client, path_of(second)).answer, AcceptConnection)


def test_a_terminal_on_another_port(client: Client, qemu: ConsoleQemu) -> None:
    asked, web, _ = begin(client, qemu, serial="serial2")
    assert qemu.open_ports == {"serial2"}
    web.socket.close()
    assert client.end_of(asked["upid"]) == "OK"
    assert qemu.open_ports == set()


@pytest.mark.parametrize(
    "said",
    ["root@pam!autovibe:PVEVNC:00000000::nonsense\n", "root@pam:{ticket}\n", "x" * 2000, "\n", "0:4:root\n"],
)
def test_a_terminal_admits_only_who_asked_for_it(client: Client, qemu: ConsoleQemu, said: str) -> None:
    asked = ask(client, "termproxy")
    web = WebSocket(client, path_of(asked))
    web.send(said.format(ticket=asked["ticket"]))
    assert web.close_code() == 1008
    client.end_of(asked["upid"])
    assert qemu.ends == []


def test_a_terminal_does_not_wait_for_its_ticket_for_ever(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(client, "termproxy")
    monkeypatch.setattr(console, "WAIT_SECONDS", 0.3)
    assert WebSocket(client, path_of(asked)).close_code() == 1001
    client.end_of(asked["upid"])


@pytest.mark.parametrize("said", ["0:999999:", "nonsense that is no command", "0:-1:" + "a" * 30, "1:a:b:" + "a" * 30])
def test_a_terminal_refuses_nonsense(client: Client, qemu: ConsoleQemu, said: str) -> None:
    _, web, _ = begin(client, qemu)
    web.send(said)
    assert web.close_code() == 1008
    assert client.get("/version")["version"] == "9.2.11"


def test_a_killed_node_gives_serial_ports_back(client: Client, qemu: ConsoleQemu) -> None:
    """The next node finds the task of a terminal that nobody talks to any more."""
    upid = "UPID:pvetest:00000FFF:00000001:69200000:vncproxy:100:root@pam:"
    (client.node.home / "tasks" / "active" / upid).write_text('{"vmid": 100, "device": "serial0"}')
    client.node.stop()
    qemu.open_ports.add("serial0")
    second = make_node(client.node.home, qemu)
    try:
        status = Client(second).get(f"{N}/tasks/{upid}/status")
        assert (status["exitstatus"], qemu.open_ports) == ("unexpected status", set())
    finally:
        second.stop()


def test_the_node_stops_with_consoles_open(client: Client, qemu: ConsoleQemu) -> None:
    waiting = ask(client, websocket=1)
    asked, web, _ = begin(client, qemu)
    assert client.node.stop(10)
    assert web.close_code() == 1001
    for found in (waiting, asked):
        assert client.node.state.tasks.find(found["upid"]).status is not None
    assert qemu.open_ports == set()
