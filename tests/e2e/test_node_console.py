"""Consoles of VMs under real QEMU, through the node's own door: VNC with its password, and the serial terminal.

Two tests boot a sector of machine code (a second); the last one boots the Debian guest.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes

from autovibe.node import serve
from autovibe.node.disks import Disks
from autovibe.node.vm.qemu import Qemu
from tests.contract.node_parts import Client
from tests.contract.test_node_console import WebSocket, ask, path_of
from tests.stub.node import free_port

N = "/nodes/pvetest"
V = f"{N}/qemu/100"

# Writes `ready` to the serial port, then back to it whatever comes in.
ECHO = (
    bytes.fromhex(
        "fa31c08ed88ed0bc007cbe377cac84c07405e81300ebf6bafd03eca80174f8baf803ece80200ebef50bafd03eca82074fb58baf803eec3"
    )
    + b"ready\r\n\0"
)


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    run = Path(tempfile.mkdtemp(prefix="av-console-"))
    made = Qemu(tmp_path / "node", run, accel="tcg", forward_port=free_port() + 1)
    yield made
    for vmid in made.running():
        made.stop(vmid)
    shutil.rmtree(run)


@pytest.fixture
def client(tmp_path: Path, qemu: Qemu) -> Iterator[Client]:
    home = tmp_path / "node"
    node = serve(home, "127.0.0.1", 0, name="pvetest", qemu=qemu, disks=Disks(home / "storage")).start()
    yield Client(node)
    node.stop()


def boot(client: Client, image: Path, **options: object) -> None:
    """VM 100 with a copy of `image` as its disk, running."""
    disks = client.node.state.disks
    volid = disks.import_image("local-lvm", 100, image, progress=lambda _line: None)
    client.do("POST", f"{N}/qemu", vmid=100, scsihw="virtio-scsi-pci", serial0="socket", memory=64, **options)
    client.do("POST", f"{V}/config", scsi0=volid, boot="order=scsi0")
    client.do("POST", f"{V}/status/start")


@pytest.fixture
def echo(client: Client, qemu: Qemu, tmp_path: Path) -> Client:
    image = tmp_path / "echo.raw"
    image.write_bytes((ECHO.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    boot(client, image)
    await_text(qemu, "ready")
    return client


def await_text(qemu: Qemu, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in (seen := qemu.console(100)):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)


class Rfb:
    """As much of a VNC client (RFC 6143) as it takes to log in and see the screen."""

    def __init__(self, web: WebSocket) -> None:
        self.web = web
        self.size = (0, 0)

    def log_in(self, password: str) -> int:
        """The server's verdict on the password: 0 is good."""
        assert self.web.read(12) == b"RFB 003.008\n"
        self.web.send(b"RFB 003.008\n")
        kinds = self.web.read(self.web.read(1)[0])
        assert kinds == b"\x02", "VNC authentication and nothing else"
        self.web.send(b"\x02")
        self.web.send(respond(self.web.read(16), password))
        return int.from_bytes(self.web.read(4))

    def screen(self) -> bytes:
        """The pixels of the whole screen."""
        self.web.send(b"\x01")
        width, height = struct.unpack(">HH", self.web.read(4))
        bits = self.web.read(16)[0]
        self.web.read(int.from_bytes(self.web.read(4)))
        self.size = (width, height)
        self.web.send(struct.pack(">BBHi", 2, 0, 1, 0))  # raw pixels
        self.web.send(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height))
        pixels = b""
        while len(pixels) < width * height * bits // 8:
            kind, _, count = struct.unpack(">BBH", self.web.read(4))
            assert kind == 0
            for _ in range(count):
                _, _, across, down, encoding = struct.unpack(">HHHHi", self.web.read(12))
                assert encoding == 0
                pixels += self.web.read(across * down * bits // 8)
        return pixels


def respond(challenge: bytes, password: str) -> bytes:
    """VNC's own way with DES: the bits of each byte of the key in reverse."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.encode()[:8].ljust(8, b"\0"))
    encryptor = Cipher(TripleDES(key * 3), modes.ECB()).encryptor()
    return encryptor.update(challenge) + encryptor.finalize()


def log_in(client: Client) -> tuple[WebSocket, dict[str, str]]:
    asked = ask(client, "termproxy")
    web = WebSocket(client, path_of(asked))
    web.send(f"{asked['user']}:{asked['ticket']}\n")
    assert web.read(2) == b"OK"
    return web, asked


def type_text(web: WebSocket, text: str) -> None:
    web.send(f"0:{len(text)}:{text}")


def test_the_display(echo: Client) -> None:
    asked = ask(echo, websocket=1)
    web = WebSocket(echo, path_of(asked))
    rfb = Rfb(web)
    assert rfb.log_in(asked["password"]) == 0
    pixels = rfb.screen()
    assert rfb.size[0] >= 640
    assert len(set(pixels)) > 1, "the screen is blank"
    web.socket.close()
    assert echo.end_of(asked["upid"]) == "OK"
    wrong = Rfb(WebSocket(echo, path_of(ask(echo, websocket=1))))
    assert wrong.log_in("nonsense") == 1
    again = ask(echo, websocket=1)
    assert Rfb(WebSocket(echo, path_of(again))).log_in(asked["password"]) == 1, "each console has its own password"


def test_the_terminal(echo: Client, qemu: Qemu) -> None:
    web, asked = log_in(echo)
    type_text(web, "hello")
    assert web.read(5) == b"hello"
    second = WebSocket(echo, path_of(ask(echo, "termproxy")))
    assert second.answer.status_code == 500, "one terminal at a time"
    type_text(web, "again")
    assert web.read(5) == b"again"
    web.socket.close()
    assert echo.end_of(asked["upid"]) == "OK"
    web, asked = log_in(echo)
    type_text(web, "later")
    assert web.read(5) == b"later"
    echo.ask("DELETE", f"{N}/tasks/{asked['upid']}")
    assert web.close_code() == 1001
    assert echo.end_of(asked["upid"]) == "received interrupt"
    kept = qemu.console(100)
    assert kept.index("ready") < kept.index("hello") < kept.index("again") < kept.index("later")
    web, asked = log_in(echo)
    echo.do("POST", f"{V}/status/stop")
    assert web.close_code() == 1000
    assert echo.end_of(asked["upid"]) == "OK"
    assert "later" in qemu.console(100)


@pytest.mark.guest
def test_a_line_typed_to_a_debian_guest(client: Client, qemu: Qemu, guest_image: Path) -> None:
    image = max(guest_image.glob("debian-12-*.qcow2"), key=lambda path: path.stat().st_mtime)
    disks = client.node.state.disks
    volid = disks.import_image("local-lvm", 100, image, progress=lambda _line: None)
    client.do("POST", f"{N}/qemu", vmid=100, scsihw="virtio-scsi-pci", serial0="socket", memory=512, agent=1)
    client.do("POST", f"{V}/config", scsi0=volid, boot="order=scsi0")
    client.do("POST", f"{V}/status/start")
    agent = qemu.agent(100)
    deadline = time.monotonic() + 240
    while not agent.is_running():
        assert time.monotonic() < deadline, qemu.console(100)
        time.sleep(0.5)
    web, asked = log_in(client)
    listener = "exec </dev/ttyS0 >/dev/ttyS0; stty sane; echo who is there; read name; echo hello $name"
    agent.exec(["sh", "-c", listener])
    seen = b""
    while b"who is there" not in seen:
        seen += web.read(1)
    type_text(web, "it is me\r")
    while b"hello it is me" not in seen:
        seen += web.read(1)
    assert seen.count(b"it is me") == 2, "the guest's terminal echoes"
    web.socket.close()
    assert client.end_of(asked["upid"]) == "OK"
    assert "hello it is me" in qemu.console(100)
    display = ask(client, websocket=1)
    rfb = Rfb(WebSocket(client, path_of(display)))
    assert rfb.log_in(display["password"]) == 0
    assert len(set(rfb.screen())) > 1
