"""QMP: QEMU's control socket (docs/interop/qmp-spec of QEMU), one blocking call at a time."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 10.0


class MonitorError(Exception):
    """QEMU refused a command or did not answer; the text is written as Proxmox writes it."""


class Monitor:
    """One VM's control socket. Threads may share it: a call waits for the one before; a lost connection is remade.

    QEMU serves one client a socket, so each VM has one Monitor in the node, and `close` only drops the connection.
    """

    def __init__(self, path: Path, vmid: int) -> None:
        self.vmid = vmid
        self._path = path
        self._lock = threading.Lock()
        self._connection: _Connection | None = None

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run a QMP command and answer what it returned; an underscore in an argument's name stands for a hyphen."""
        return self._ask(command, {key.replace("_", "-"): value for key, value in arguments.items()})

    def send(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command whose arguments have underscores in their names, which are given as they are."""
        return self._ask(command, arguments)

    def give(self, name: str, descriptor: int) -> None:
        """Hand QEMU an open file, which it knows as `fd:<name>` until a command takes it."""
        self._ask("getfd", {"fdname": name}, descriptor)

    def _ask(self, command: str, arguments: dict[str, Any], *descriptors: int) -> Any:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = _Connection(self._path)
                answer = self._connection.call(command, arguments, *descriptors)
            except (OSError, ValueError) as error:
                self._drop()
                reason = "got timeout" if isinstance(error, TimeoutError) else f"unable to connect to VM: {error}"
                raise MonitorError(f"VM {self.vmid} qmp command '{command}' failed - {reason}") from error
        if "error" in answer:
            reason = answer["error"].get("desc", "unknown error")
            raise MonitorError(f"VM {self.vmid} qmp command '{command}' failed - {reason}")
        return answer.get("return")

    def close(self) -> None:
        with self._lock:
            self._drop()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class _Connection:
    """One connection, past its greeting. Messages are JSON, one a line."""

    def __init__(self, path: Path) -> None:
        self._serial = 0
        self._unread = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(TIMEOUT_SECONDS)
            self._socket.connect(str(path))
            next(self._messages())  # the greeting
            self.call("qmp_capabilities", {})
        except BaseException:
            self.close()
            raise

    def call(self, command: str, arguments: dict[str, Any], *descriptors: int) -> dict[str, Any]:
        """Send a command, with open files beside it; its answer. Events, which come in between, are passed over."""
        self._serial += 1
        request = {"execute": command, "arguments": arguments, "id": self._serial}
        self._socket.settimeout(TIMEOUT_SECONDS)
        text = json.dumps(request).encode() + b"\n"
        if descriptors:  # a short message goes out whole
            socket.send_fds(self._socket, [text], descriptors)
        else:
            self._socket.sendall(text)
        return next(message for message in self._messages() if message.get("id") == self._serial)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def _messages(self) -> Iterator[dict[str, Any]]:
        """The messages as they come, until the time is up (TimeoutError) or QEMU is gone (ConnectionError)."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                yield json.loads(line)
                continue
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise ConnectionError("connection closed")
            self._unread += chunk
