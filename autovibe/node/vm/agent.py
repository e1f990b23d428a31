"""The QEMU guest agent, spoken to over its virtio-serial socket; error texts are Proxmox's own.

The guest is hostile: what it says is parsed, bounded and never trusted. Strings from it are bytes decoded as Latin-1,
as Proxmox's API hands them on, so that a client gets every byte back with `.encode("latin1")`.
"""

from __future__ import annotations

import base64
import functools
import json
import math
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

TURN_SECONDS = 10.0
"""How long a call waits for another call of the same VM to end."""

COMMAND_SECONDS = 10.0
_SECONDS = {
    "exec-status": 120.0,  # may carry 32 MiB through an emulated serial port
    "fsfreeze-freeze": 600.0,  # the guest flushes its file systems first
    "fsfreeze-thaw": 180.0,
    "fstrim": 600.0,
    "ping": ANSWER_SECONDS,
}
LEAVING_SECONDS = 3.0
"""How long a command that ends in silence when it succeeds may take to say that it failed."""

_LEAVING = ("shutdown", "suspend-disk", "suspend-hybrid", "suspend-ram")
_BULKY_BYTES = 48 << 20  # an exec-status may carry two streams of 16 MiB, in base64
_LIMIT_BYTES = 4 << 20
_LIMIT_PARTS = 200_000  # of a JSON text: what is small as text can be a gigabyte as objects
_LIMIT_DEPTH = 32
_LIMIT_REASON = 2000  # characters: a reason goes into a status line
_READ_BYTES = 1 << 20
READ_LIMIT_BYTES = 16 << 20
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201c\u201d"), "'")


class AgentError(Exception):
    """The guest agent is not there, or refused."""


class NotRunning(AgentError):
    """QEMU guest agent is not running"""

    def __init__(self) -> None:
        super().__init__("QEMU guest agent is not running")


class AgentRefused(AgentError):
    """The agent answered with an error: `error` is its own object."""

    def __init__(self, error: Any) -> None:
        self.error = error
        reason = str(error.get("desc", "unknown error")) if isinstance(error, dict) else "unknown error"
        super().__init__(f"Agent error: {reason[:_LIMIT_REASON].translate(_QUOTES)}")


class AgentTimeout(AgentError):
    """The agent was there, and then did not answer a command."""


def _parsing(call: Callable[P, R]) -> Callable[P, R]:
    """Make an answer that is not of the agreed shape, which a hostile guest may give, an AgentError."""

    @functools.wraps(call)
    def guarded(*arguments: P.args, **keywords: P.kwargs) -> R:
        try:
            return call(*arguments, **keywords)
        except (TypeError, ValueError, LookupError, OverflowError, AttributeError) as error:
            raise AgentError("Agent error: the guest agent gave a malformed answer") from error

    return guarded


_turns: dict[Path, threading.Lock] = {}
"""A lock a socket: QEMU serves one connection at a time, and to wait there would look like a dead agent."""


class Agent:
    """The agent of one running VM. Each call is a connection of its own; threads take turns."""

    def __init__(self, socket_path: Path, vmid: int = 0) -> None:
        self._path = socket_path
        self._vmid = vmid
        self._turn = _turns.setdefault(socket_path, threading.Lock())

    def ping(self) -> None:
        """Raises NotRunning, whatever is wrong with the agent."""
        try:
            self.call("ping")
        except AgentError:
            raise NotRunning from None

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
        request: dict[str, Any] = {"execute": f"guest-{command}"}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        patience = _SECONDS[command] if command == "fsfreeze-thaw" else TURN_SECONDS  # a guest must not stay frozen
        if not self._turn.acquire(timeout=patience):
            raise NotRunning
        try:
            with _Channel(self._path) as channel:
                channel.synchronise()
                channel.send(request)
                answer = self._answer(channel, command)
        finally:
            self._turn.release()
        if "error" in answer:
            raise AgentRefused(answer["error"])
        return answer.get("return")

    def _answer(self, channel: _Channel, command: str) -> dict[str, Any]:
        seconds = LEAVING_SECONDS if command in _LEAVING else _SECONDS.get(command, COMMAND_SECONDS)
        try:
            return channel.receive(seconds, _BULKY_BYTES if command == "exec-status" else _LIMIT_BYTES)
        except TimeoutError:
            if command in _LEAVING:
                return {}
            raise AgentTimeout(f"VM {self._vmid} qga command 'guest-{command}' failed - got timeout") from None
        except EOFError:
            if command in _LEAVING:
                return {}
            raise NotRunning from None

    # The calls of Proxmox's API that are more than a call of the agent's

    @_parsing
    def exec(self, argv: list[str], *, input_data: bytes | None = None) -> int:
        """Start a program in the guest: its pid there. Without one the agent says what it makes of that."""
        arguments: dict[str, Any] = {"capture-output": True}
        if argv:
            arguments |= {"path": argv[0], "arg": argv[1:]}
        if input_data is not None:
            arguments["input-data"] = base64.b64encode(input_data).decode()
        return int(self.call("exec", **arguments)["pid"])

    @_parsing
    def exec_status(self, pid: int) -> dict[str, Any]:
        """How it goes, as `agent/exec-status` answers. The guest forgets a program once its end was told."""
        told = dict(self.call("exec-status", pid=pid))
        answer: dict[str, Any] = {"exited": int(bool(told["exited"]))}
        answer |= {key: int(told[key]) for key in ("exitcode", "signal") if key in told}
        for stream in ("out", "err"):
            if text := told.get(f"{stream}-data"):
                answer[f"{stream}-data"] = base64.b64decode(text).decode("latin1")
                answer[f"{stream}-truncated"] = int(bool(told.get(f"{stream}-truncated")))
        return answer

    @_parsing
    def read_file(self, path: str, *, limit: int = READ_LIMIT_BYTES, offset: int = 0) -> dict[str, Any]:
        """A guest file, as `agent/file-read` answers: `content`, `bytes-read` and, when cut off, `truncated`."""
        handle = int(self.call("file-open", path=path, mode="r"))
        parts, size, at_end = [], 0, False
        try:
            if offset:
                self.call("file-seek", handle=handle, offset=offset, whence="set")
            while not at_end and size < limit:
                chunk = self.call("file-read", handle=handle, count=min(_READ_BYTES, limit - size))
                part = base64.b64decode(chunk["buf-b64"])
                at_end = bool(chunk["eof"])
                if not part and not at_end:
                    raise ValueError("neither bytes nor the end")
                parts.append(part)
                size += len(part)
        finally:
            self.call("file-close", handle=handle)
        content = b"".join(parts)
        answer: dict[str, Any] = {"content": content.decode("latin1"), "bytes-read": size}
        return answer if at_end else answer | {"truncated": 1}

    @_parsing
    def write_file(self, path: str, content: bytes) -> None:
        """Replace what a guest file holds."""
        handle = int(self.call("file-open", path=path, mode="wb"))
        try:
            while content:
                request = {"handle": handle, "buf-b64": base64.b64encode(content).decode()}
                written = int(self.call("file-write", **request)["count"])
                if not 0 < written <= len(content):
                    raise ValueError("no progress")
                content = content[written:]
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
        """`guest-sync-delimited`: the agent answers after a 0xFF byte, before which everything is old.

        An answer to a former client's synchronisation may come first.
        """
        token = secrets.randbelow(1 << 31)
        self._write(b"\xff")  # resets the agent's parser, should half a message have been sent before
        self.send({"execute": "guest-sync-delimited", "arguments": {"id": token}})
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            while True:
                self._skip_past(b"\xff", deadline)
                if _parse(self._read_line(deadline, _LIMIT_BYTES)).get("return") == token:
                    return
        except (TimeoutError, EOFError):
            raise NotRunning from None

    def send(self, request: dict[str, Any]) -> None:
        self._write(json.dumps(request).encode() + b"\n")

    def receive(self, seconds: float, limit: int) -> dict[str, Any]:
        """The next message. Raises TimeoutError, EOFError, and AgentError when there is no sense in it."""
        return _parse(self._read_line(time.monotonic() + seconds, limit))

    def _write(self, data: bytes) -> None:
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.sendall(data)
        except OSError:
            raise NotRunning from None

    def _skip_past(self, mark: bytes, deadline: float) -> None:
        while mark not in self._unread:
            self._unread = self._receive(deadline)
        self._unread = self._unread.partition(mark)[2]

    def _read_line(self, deadline: float, limit: int) -> bytes:
        parts = [self._unread]
        size = len(self._unread)
        while b"\n" not in parts[-1]:
            parts.append(self._receive(deadline))
            size += len(parts[-1])
            if size > limit:
                raise AgentError("Agent error: the guest agent's answer is too long")
        line, _, self._unread = b"".join(parts).partition(b"\n")
        return line

    def _receive(self, deadline: float) -> bytes:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        return data


def _parse(line: bytes) -> dict[str, Any]:
    """A message of the agent's, {} for one of another shape. Raises AgentError for what no agent says."""
    if sum(map(line.count, (b",", b"[", b"{"))) > _LIMIT_PARTS:
        raise AgentError("Agent error: the guest agent's answer is too long")
    try:
        message = json.loads(line.decode("latin1"), parse_constant=_refuse, parse_float=_read_float)
    except (ValueError, RecursionError):
        raise AgentError("Agent error: the guest agent sent no JSON") from None
    if not _is_shallow(message, _LIMIT_DEPTH):
        raise AgentError("Agent error: the guest agent's answer is too deep")
    return message if isinstance(message, dict) else {}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _read_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    return depth > 0 and all(
        _is_shallow(each, depth - 1) for each in (value.values() if isinstance(value, dict) else value)
    )
