"""Consoles: a VM's display or serial terminal, asked for by one call and then talked to over a websocket.

    asked for (a task runs, a port is allotted) -> taken (a client with the ticket came) -> over (the task ends)

It is over as well when no client comes within 10 seconds, when the task is stopped, and when the node stops. The ports
are numbers by which clients name what they asked for, as with a real one: nothing listens on them.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autovibe.node.http.messages import Talk
from autovibe.node.http.websocket import Relay
from autovibe.node.refusal import Refusal
from autovibe.node.tasks import Task
from autovibe.node.vm.monitor import MonitorError

if TYPE_CHECKING:
    from autovibe.node.vm.qemu import Qemu

PORTS = range(5900, 6000)
WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.2
_LEAVE_SECONDS = 5.0
_LINE_BYTES = 1024  # of `user:ticket`
_COMMAND = re.compile(rb"0:(\d{1,6}):|1:\d{1,5}:\d{1,5}:|2")
_COMMAND_BYTES = 24  # the longest of those
_TYPED_BYTES = 64 << 10  # typed or pasted at once


@dataclass
class Session:
    """One console; `device` is `vnc` or a serial port. It is `over` when it is to end, and `left` when it has."""

    port: int
    vmid: int
    owner: str
    device: str
    taken: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    failure: str = ""

    def holds(self, vmid: int, device: str) -> bool:
        """Whether somebody talks to that device of that VM over this console."""
        return (self.vmid, self.device) == (vmid, device) and self.taken.is_set() and not self.left.is_set()

    def watch(self, task: Task) -> None:
        """What the console's task does: wait for the client, then for the end."""
        deadline = time.monotonic() + WAIT_SECONDS
        try:
            while not self.over.wait(_POLL_SECONDS):
                task.check()
                if not self.taken.is_set() and time.monotonic() > deadline:
                    raise Refusal("connection timed out")
        finally:
            self.over.set()
            if self.taken.is_set():  # what was opened is to be closed when the task has ended
                self.left.wait(_LEAVE_SECONDS)
        if self.failure:
            raise Refusal(self.failure)


class Consoles:
    """The consoles of one node."""

    def __init__(self) -> None:
        self._sessions: dict[int, Session] = {}
        self._mutex = threading.Lock()

    def open(self, vmid: int, owner: str, device: str) -> Session:
        with self._mutex:
            port = next((port for port in PORTS if port not in self._sessions), None)
            if port is None:
                raise Refusal("unable to find free vnc port (5900-5999)")
            self._sessions[port] = Session(port, vmid, owner, device)
            return self._sessions[port]

    def take(self, port: int, vmid: int, owner: str) -> Session:
        """The console that was asked for, once. Raises the refusal of a port nobody listens on."""
        with self._mutex:
            session = self._sessions.get(port)
            if (
                session is None
                or (session.vmid, session.owner) != (vmid, owner)
                or session.taken.is_set()
                or session.over.is_set()
            ):
                raise Refusal(f"connect to 'localhost:{port}' failed: Connection refused")
            if session.device != "vnc" and any(other.holds(vmid, session.device) for other in self._sessions.values()):
                raise Refusal(f"port '{session.device}' of VM {vmid} is in use by another terminal")
            session.taken.set()
            return session

    def close(self, session: Session) -> None:
        session.over.set()
        with self._mutex:
            if self._sessions.get(session.port) is session:
                del self._sessions[session.port]

    def close_all(self) -> None:
        with self._mutex:
            for session in self._sessions.values():
                session.over.set()


def talk_vnc(qemu: Qemu, session: Session, password: str) -> Talk:
    """VNC as QEMU speaks it, byte by byte."""

    def talk(client: ssl.SSLSocket, early: bytes) -> None:
        with _ending(session, "Failed to run vncproxy."):
            display = qemu.open_display(session.vmid, password)
            Relay(client, Raw(), session.over.is_set).run(early, lambda: display)

    return talk


def talk_terminal(qemu: Qemu, session: Session, admits: Callable[[str, str], bool]) -> Talk:
    """The protocol of Proxmox's xterm.js (proxmox-termproxy); `admits` judges the user and ticket it begins with."""

    def talk(client: ssl.SSLSocket, early: bytes) -> None:
        codec = Terminal(admits, lambda data: qemu.keep_console(session.vmid, session.device, data))
        opened: list[socket.socket] = []

        def connect() -> socket.socket | None:
            if codec.is_admitted:
                opened.append(qemu.open_serial(session.vmid, session.device))
                return opened[0]
            return None

        deadline = time.monotonic() + WAIT_SECONDS

        def is_over() -> bool:
            return session.over.is_set() or (not codec.is_admitted and time.monotonic() > deadline)

        with _ending(session, f"VM {session.vmid} not running"):
            try:
                Relay(client, codec, is_over).run(early, connect)
            finally:
                if opened:
                    qemu.close_serial(session.vmid, session.device)

    return talk


@contextlib.contextmanager
def _ending(session: Session, failure: str) -> Iterator[None]:
    """However a conversation ends, its task does so too; a VM that cannot be reached is the task's failure."""
    try:
        yield
    except MonitorError:
        session.failure = failure
    finally:
        session.over.set()
        session.left.set()


class Raw:
    """What the client says goes to the VM as it is."""

    def from_client(self, data: bytes) -> bytes:
        return data

    def from_vm(self, data: bytes) -> bytes:
        return data

    def reply(self) -> bytes:
        return b""


class Terminal:
    """`user:ticket` and a newline first, which is answered `OK`; then `0:<length>:<bytes>` for what is typed,
    `1:<columns>:<rows>:` for the size of the window (a serial line has none), `2` to keep the connection alive.
    """

    def __init__(self, admits: Callable[[str, str], bool], keep: Callable[[bytes], None]) -> None:
        self._admits = admits
        self._keep = keep
        self._unread = b""
        self._reply = b""
        self.is_admitted = False

    def from_client(self, data: bytes) -> bytes:
        self._unread += data
        if not self.is_admitted:
            line, newline, self._unread = self._unread.partition(b"\n")
            if not newline:
                self._unread = line
                if len(line) > _LINE_BYTES:
                    raise ValueError("failed to read ticket")
                return b""
            user, _, ticket = line.decode("utf-8", "replace").strip().partition(":")
            if not self._admits(user, ticket):
                raise ValueError("authentication failed")
            self.is_admitted, self._reply = True, b"OK"
        return b"".join(self._commands())

    def _commands(self) -> Iterator[bytes]:
        while match := _COMMAND.match(self._unread):
            size = int(match[1] or 0)
            if size > _TYPED_BYTES:
                raise ValueError("message too long")
            if len(self._unread) < match.end() + size:
                return
            yield self._unread[match.end() : match.end() + size]
            self._unread = self._unread[match.end() + size :]
        if len(self._unread) >= _COMMAND_BYTES:
            raise ValueError("unexpected message")

    def from_vm(self, data: bytes) -> bytes:
        self._keep(data)
        return data

    def reply(self) -> bytes:
        reply, self._reply = self._reply, b""
        return reply
