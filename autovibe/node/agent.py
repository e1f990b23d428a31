"""The QEMU guest agent, spoken to over its virtio-serial socket; error texts are Proxmox's own.

The guest is hostile: what it says is parsed, bounded and never trusted. Strings from it are bytes decoded as Latin-1,
as Proxmox's API hands them on, so that a client gets every byte back with `.encode("latin1")`.
"""

from __future__ import annotations

import base64
import functools
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

ANSWER_SECONDS = 3.0
"""How long an agent may take to answer that it is there; Proxmox waits as long."""

COMMAND_SECONDS = 10.0
FREEZE_SECONDS = 600.0
"""How long `fsfreeze-freeze` may take: the guest flushes its file systems first."""
_LIMIT_BYTES = 48 << 20  # an exec-status may carry two streams of 16 MiB, in base64
_READ_BYTES = 1 << 20
READ_LIMIT_BYTES = 16 << 20
WRITE_LIMIT_CHARACTERS = 60 << 10


class AgentError(Exception):
    """The guest agent is not there, or refused."""


class NotRunning(AgentError):
    """QEMU guest agent is not running"""

    def __init__(self) -> None:
        super().__init__("QEMU guest agent is not running")


def _parsing(call: Callable[P, R]) -> Callable[P, R]:
    """Make an answer that is not of the agreed shape, which a hostile guest may give, an AgentError."""

    @functools.wraps(call)
    def guarded(*arguments: P.args, **keywords: P.kwargs) -> R:
        try:
            return call(*arguments, **keywords)
        except (TypeError, ValueError, LookupError) as error:
            raise AgentError("Agent error: the guest agent gave a malformed answer") from error

    return guarded


_turns: dict[Path, threading.Lock] = {}
"""A lock a socket: QEMU serves one connection at a time, and to wait there would look like a dead agent."""


class Agent:
    """The agent of one running VM. Each call is a connection of its own; threads take turns."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._turn = _turns.setdefault(socket_path, threading.Lock())

    def ping(self) -> None:
        self.call("ping")

    def is_running(self) -> bool:
        """Whether the agent answers; costs up to 3 s when it does not."""
        try:
            self.ping()
        except AgentError:
            return False
        return True

    def call(self, command: str, /, **arguments: Any) -> Any:
        """Run a command of the agent, named without its `guest-`, and answer its `return`. Raises AgentError.

        An underscore in an argument's name stands for a hyphen.
        """
        timeout = FREEZE_SECONDS if command == "fsfreeze-freeze" else COMMAND_SECONDS
        request: dict[str, Any] = {"execute": f"guest-{command}"}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        with self._turn, _Channel(self._path) as channel:
            channel.synchronise()
            channel.send(request)
            if command in ("shutdown", "suspend-disk", "suspend-ram", "suspend-hybrid"):
                return {}  # the agent answers nothing when it succeeds
            answer = channel.receive(timeout)
        if "error" in answer:
            error = answer["error"] if isinstance(answer["error"], dict) else {}
            raise AgentError(f"Agent error: {error.get('desc', 'unknown error')}")
        return answer.get("return")

    # The calls of Proxmox's API that are more than a call of the agent's

    @_parsing
    def exec(self, argv: list[str], *, input_data: bytes | None = None) -> int:
        """Start a program in the guest: its pid there."""
        arguments: dict[str, Any] = {"path": argv[0], "arg": argv[1:], "capture-output": True}
        if input_data is not None:
            arguments["input-data"] = base64.b64encode(input_data).decode()
        return int(self.call("exec", **arguments)["pid"])

    @_parsing
    def exec_status(self, pid: int) -> dict[str, Any]:
        """How it goes, as `agent/exec-status` answers. The guest forgets a program once its end was told."""
        told = dict(self.call("exec-status", pid=pid))
        answer: dict[str, Any] = {"exited": int(bool(told.get("exited")))}
        answer |= {key: int(told[key]) for key in ("exitcode", "signal") if key in told}
        for stream in ("out", "err"):
            if text := told.get(f"{stream}-data"):
                answer[f"{stream}-data"] = _decode(text)
                answer[f"{stream}-truncated"] = int(bool(told.get(f"{stream}-truncated")))
        return answer

    @_parsing
    def read_file(self, path: str, *, limit: int = READ_LIMIT_BYTES) -> dict[str, Any]:
        """A guest file, as `agent/file-read` answers: `content`, `bytes-read` and, when cut off, `truncated`."""
        handle = self.call("file-open", path=path, mode="r")
        content, at_end = b"", False
        try:
            while not at_end and len(content) < limit:
                count = min(_READ_BYTES, limit - len(content))
                chunk = self.call("file-read", handle=handle, count=count)
                content += base64.b64decode(chunk["buf-b64"])
                at_end = bool(chunk["eof"])
        finally:
            self.call("file-close", handle=handle)
        answer: dict[str, Any] = {"content": content.decode("latin1"), "bytes-read": len(content)}
        return answer if at_end else answer | {"truncated": 1}

    @_parsing
    def write_file(self, path: str, content: bytes) -> None:
        """Replace what a guest file holds."""
        handle = self.call("file-open", path=path, mode="wb")
        try:
            while content:
                written = self.call("file-write", handle=handle, buf_b64=base64.b64encode(content).decode())["count"]
                content = content[int(written) :]
            self.call("file-flush", handle=handle)
        finally:
            self.call("file-close", handle=handle)

    @_parsing
    def freeze(self) -> int:
        """Flush and freeze the guest's file systems: how many. A failed freeze is thawed."""
        try:
            return int(self.call("fsfreeze-freeze"))
        except AgentError:
            self.thaw()
            raise

    @_parsing
    def thaw(self) -> int:
        return int(self.call("fsfreeze-thaw"))


class _Channel:
    """One connection: JSON messages, a line each, after a synchronisation that skips a former client's leftovers."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise NotRunning from None
        self._unread = b""

    def __enter__(self) -> _Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def synchronise(self) -> None:
        """`guest-sync-delimited`: the agent answers after a 0xFF byte, before which everything is old."""
        token = secrets.randbelow(1 << 31)
        self._write(b"\xff")  # resets the agent's parser, should half a message have been sent before
        self.send({"execute": "guest-sync-delimited", "arguments": {"id": token}})
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            self._read_until(b"\xff", deadline)
            if self._message(deadline).get("return") == token:
                return

    def send(self, request: dict[str, Any]) -> None:
        self._write(json.dumps(request).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any]:
        return self._message(time.monotonic() + timeout)

    def _message(self, deadline: float) -> dict[str, Any]:
        line = self._read_until(b"\n", deadline)
        try:
            message = json.loads(line.decode("latin1"))
        except ValueError:
            raise AgentError("Agent error: the guest agent sent no JSON") from None
        return message if isinstance(message, dict) else {}

    def _write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            raise NotRunning from None

    def _read_until(self, mark: bytes, deadline: float) -> bytes:
        parts = [self._unread]
        size = len(self._unread)
        while mark not in parts[-1]:
            remaining = deadline - time.monotonic()
            try:
                self._socket.settimeout(max(remaining, 0.001))
                chunk = self._socket.recv(1 << 16)
            except OSError:
                chunk = b""
            size += len(chunk)
            if not chunk or size > _LIMIT_BYTES or remaining <= 0:
                raise NotRunning
            parts.append(chunk)
        before, _, self._unread = b"".join(parts).partition(mark)
        return before


def _decode(text: str) -> str:
    return base64.b64decode(text).decode("latin1")
