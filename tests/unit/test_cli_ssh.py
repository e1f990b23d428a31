"""fabric Connections, and `machine ssh` without OpenSSH, with the stub's local sshd as the guest."""

from __future__ import annotations

import builtins
import contextlib
import getpass
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from autovibe import Client
from autovibe.errors import ConfigurationError, GuestUnreachable, NotYet
from autovibe.guest import Guests, generate_key
from autovibe.node.vm.qemu import forward_address
from tests.stub.node import free_port
from tests.stub.qemu import StubQemu, make_base_tree
from tests.unit import wire as wires
from tests.unit.wire import Row, Wire

PORT = free_port()  # each worker of the suite has its own
VMID = 24350


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ssh")


class ShellQemu(StubQemu):
    """A login without a command is a shell, as in a guest."""

    def _wrapper(self, *given: Any) -> str:
        return super()._wrapper(*given).replace('"$SSH_ORIGINAL_COMMAND"', '"${SSH_ORIGINAL_COMMAND:-exec sh -i}"')


@pytest.fixture(scope="module")
def there(home: Path) -> Iterator[Row]:
    """A guest that answers, as GET /machines/{uuid}/ssh tells where it is."""
    guests = Guests(home / "hub" / "ssh" / "id_ed25519")
    qemu = ShellQemu(home / "stub", forward_port=PORT)
    tree = make_base_tree(home / "tree")
    qemu.start(VMID, {"name": "one", "sshkeys": quote(guests.public_key, safe="")}, {"scsi0": tree})
    host, user = forward_address(VMID), getpass.getuser()
    yield {"host": host, "port": PORT, "user": user, "host_key": _reach(guests, host, user)}
    guests.close()
    qemu.stop(VMID)


def _reach(guests: Guests, host: str, user: str) -> str:
    end = time.monotonic() + 20
    while True:
        try:
            return guests.reach(host, PORT, user)
        except NotYet:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@pytest.fixture
def wire(there: Row) -> Iterator[Wire]:
    with wires.serving() as made:
        made.on("GET", r"/machines/(.*)/ssh", lambda *_: there)
        yield made


@pytest.fixture
def row(wire: Wire) -> Row:
    return wire.put("machines", wires.machine("one", wire.put("projects", wires.project("hello"))))


@pytest.fixture
def client(wire: Wire, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("AUTOVIBE_HOME", str(home))
    with Client(wire.url, "av_key") as made:
        yield made


def test_a_connection_runs_commands_and_opens_again(client: Client, row: Row) -> None:
    with client.machines.connect(client.machines.get(row["uuid"])) as guest:
        assert guest.run("echo $((6 * 7))", hide=True, in_stream=False).stdout == "42\n"
        assert guest.run("exit 3", hide=True, warn=True, in_stream=False).exited == 3
        assert guest.transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        guest.open()  # it is open
        guest.close()
        assert guest.run("true", hide=True, in_stream=False).ok  # and opens again


def test_another_host_key_is_refused(client: Client, wire: Wire, row: Row, there: Row, tmp_path: Path) -> None:
    wrong = generate_key(tmp_path / "other").rsplit(" ", 1)[0]
    wire.on("GET", r"/machines/(.*)/ssh", lambda *_: {**there, "host_key": wrong})
    guest = client.machines.connect(row["uuid"])
    with pytest.raises(GuestUnreachable, match="does not match"):
        guest.run("true", hide=True, in_stream=False)
    assert not guest.is_connected
    wire.on("GET", r"/machines/(.*)/ssh", lambda *_: {**there, "host_key": "ssh-ed25519 no-key"})
    with pytest.raises(GuestUnreachable, match="pinned host key"):
        client.machines.connect(row["uuid"])
    wire.on("GET", r"/machines/(.*)/ssh", lambda *_: {**there, "host_key": ""})
    with pytest.raises(GuestUnreachable, match="not found in known_hosts"):
        client.machines.connect(row["uuid"]).open()


def test_only_the_pinned_key_is_known_and_only_the_hubs_is_offered(
    client: Client, row: Row, there: Row, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host *\n  ProxyCommand false\n  User nobody\n  IdentityFile ~/mine\n")
    (tmp_path / ".fabric.yaml").write_text("gateway: nowhere\nconnect_kwargs: {password: mine}\nuser: nobody\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    guest = client.machines.connect(row["uuid"])
    keys = guest.client.get_host_keys()
    assert {name: [key.get_base64() for key in keys[name].values()] for name in keys} == {
        f"[{there['host']}]:{PORT}": [there["host_key"].split()[1]]
    }
    assert type(guest.client._policy).__name__ == "RejectPolicy"
    assert guest.connect_kwargs["key_filename"] == [str(home / "hub" / "ssh" / "id_ed25519")]
    assert not guest.connect_kwargs["allow_agent"]
    assert not guest.connect_kwargs["look_for_keys"]
    assert guest.run("true", hide=True, in_stream=False).ok
    guest.close()


def test_without_the_hubs_key_there_is_no_connection(
    client: Client, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOVIBE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="where the Hub's home is"):
        client.machines.connect(row["uuid"])


def test_without_fabric_the_extra_is_named(client: Client, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **options: Any) -> Any:
        if name == "fabric":
            raise ModuleNotFoundError("No module named 'fabric'", name="fabric")
        return real(name, *more, **options)

    monkeypatch.delitem(sys.modules, "autovibe.sdk.ssh", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'autovibe\[hub\]'"):
        client.machines.connect(row["uuid"])


def _command(wire: Wire, home: Path, tmp_path: Path, *words: str) -> dict[str, Any]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AUTOVIBE_")},
        "PATH": str(tmp_path),  # no ssh there
        "AUTOVIBE_HOME": str(home),
        "AUTOVIBE_URL": wire.url,
        "AUTOVIBE_API_KEY": "av_key",
    }
    return {"args": [sys.executable, "-m", "autovibe.cli", "machine", "ssh", "one", *words], "env": environment}


@pytest.mark.usefixtures("row")
def test_machine_ssh_without_openssh(wire: Wire, home: Path, tmp_path: Path) -> None:
    def ssh(*words: str, given: bytes = b"") -> Any:
        return subprocess.run(
            **_command(wire, home, tmp_path, *words), input=given, capture_output=True, check=False, timeout=60
        )

    done = ssh("--", "echo", "one  two;", "echo", "err", ">&2;", "exit", "5")
    assert (done.stdout, done.stderr, done.returncode) == (b"one two\n", b"err\n", 5)
    every_byte = bytes(range(256)) * 1000
    assert ssh("--", "cat", given=every_byte).stdout == every_byte
    assert ssh("--", "true", given=every_byte).returncode == 0
    done = ssh(given=b"echo $((6 * 7))\nexit 4\n")
    assert (done.stdout, done.returncode) == (b"42\n", 4), done.stderr
    refused = ssh("--", "-L", "8080:localhost:80")
    assert refused.returncode == 2
    assert b"openssh-client" in refused.stderr


@pytest.mark.usefixtures("row")
def test_a_shell_on_a_terminal_without_openssh(wire: Wire, home: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = _command(wire, home, tmp_path)
    command["args"] = [shutil.which("setsid"), "--ctty", "--wait", *command["args"]]
    process = subprocess.Popen(**command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, answered = b"", False
    end = time.monotonic() + 30
    with contextlib.suppress(OSError):  # the end of a terminal
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                shown += os.read(ours, 4096)
            if not answered and shown.rstrip().endswith((b"#", b"$")):  # what is typed before the prompt is dropped
                answered = bool(os.write(ours, b"echo answer-$((6 * 7)); exit 4\n"))
            if process.poll() is not None:
                break
    assert process.wait(5) == 4, shown
    assert b"answer-42" in shown
