"""One command on one channel: send it, feed it, and read both its streams until it ends or its time is over.

The time-out is kept by a guard in the guest, a second command that is started only for one which runs longer than a
second: it ends the whole process group when the time is over, also when the Hub or the connection is gone by then. So a
short command, and most are, costs no process more than its own.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from autovibe.errors import GuestUnreachable
from autovibe.guest.command import TIMED_OUT, Result
from autovibe.guest.links import Address

StartGuard = Callable[[int, float], paramiko.Channel | None]
"""(process group, seconds left) -> the guard's channel, None when none can be had at the moment."""

_PIECE = 1 << 16
_GUARD_AFTER_SECONDS = 1.0
_LATE_SECONDS = 15.0  # after the time-out, for the guest to end the command and say so
_QUIET_SECONDS = 0.2  # without output after the command's end, until what it left behind is not waited for
_DRAIN_SECONDS = 10.0
_INLINE_INPUT = 1 << 20  # OpenSSH takes 2 MiB before it waits for the command to read


def run(
    channel: paramiko.Channel,
    address: Address,
    text: str,
    start_guard: StartGuard,
    *,
    input: bytes,
    timeout_seconds: float,
    output_limit: int,
) -> Result:
    began = time.monotonic()
    kept = {"stdout": bytearray(), "stderr": bytearray()}
    truncated = False
    status = TIMED_OUT
    for name, piece in pieces(channel, address, text, start_guard, input=input, timeout_seconds=timeout_seconds):
        if name == "exit":
            status = int(piece)
            continue
        room = output_limit - len(kept[name])
        kept[name] += piece[: max(room, 0)]
        truncated = truncated or len(piece) > room
    took = time.monotonic() - began
    return Result(status, bytes(kept["stdout"]), bytes(kept["stderr"]), truncated, round(took * 1000))


def pieces(
    channel: paramiko.Channel,
    address: Address,
    text: str,
    start_guard: StartGuard,
    *,
    input: bytes,
    timeout_seconds: float,
) -> Iterator[tuple[str, bytes]]:
    """("stdout" | "stderr", bytes) as they come, at the end ("exit", b"<status>"), 124 when the time was over."""
    turn = _Turn(channel, start_guard, timeout_seconds)
    try:
        channel.settimeout(timeout_seconds + _LATE_SECONDS)
        _send_command(channel, text)
        _feed(channel, input)
        yield from turn.read()
        status = turn.status()
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise GuestUnreachable(f"The connection to the guest at {address} was lost while a command ran.") from error
    finally:
        turn.dismiss_guard()
    if time.monotonic() - turn.began >= timeout_seconds:
        status = TIMED_OUT
    if status is None:
        raise GuestUnreachable(f"The connection to the guest at {address} was lost while a command ran.")
    yield "exit", str(status).encode()


class _Turn:
    """The listening side. The first line on standard error is the process group's number, see `command.line`."""

    def __init__(self, channel: paramiko.Channel, start_guard: StartGuard, timeout_seconds: float) -> None:
        self.began = time.monotonic()
        self._channel = channel
        self._start_guard = start_guard
        self._ends_at = self.began + timeout_seconds
        self._guard_at = self.began + min(_GUARD_AFTER_SECONDS, timeout_seconds)
        self._guard: paramiko.Channel | None = None
        self._head: bytearray | None = bytearray()
        self._group = 0

    def read(self) -> Iterator[tuple[str, bytes]]:
        channel = self._channel
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLIN)
        deadline = self._ends_at + _LATE_SECONDS
        has_ended = False
        while (now := time.monotonic()) < deadline:
            progressed = False
            if channel.recv_ready():
                progressed = True
                yield "stdout", channel.recv(_PIECE)
            if channel.recv_stderr_ready():
                progressed = True
                if piece := self._behead(channel.recv_stderr(_PIECE)):
                    yield "stderr", piece
            if self._guard is None and now >= self._guard_at and self._group:
                self._guard = self._start_guard(self._group, max(self._ends_at - now, 0.01))
            if progressed:
                continue
            if channel.eof_received or channel.closed or has_ended:
                if channel.recv_ready() or channel.recv_stderr_ready():
                    continue
                return
            if channel.status_event.is_set():
                # A process that the command left in the background may keep the streams open for ever.
                has_ended = True
                deadline = min(deadline, now + _DRAIN_SECONDS)
            poller.poll(_QUIET_SECONDS * 1000)

    def status(self) -> int | None:
        """The exit status; None when it did not come: at the deadline, or because the connection ended."""
        left = self._ends_at + _LATE_SECONDS - time.monotonic()
        if not self._channel.status_event.wait(max(0.0, left)):
            return None
        status = self._channel.recv_exit_status()
        return status if status >= 0 else None

    def dismiss_guard(self) -> None:
        if self._guard is None:
            return
        try:
            if self._channel.status_event.is_set():
                self._guard.sendall(b"done\n")
        except OSError:
            return  # the connection is gone, and the guard does its work alone
        finally:
            self._guard.close()

    def _behead(self, piece: bytes) -> bytes:
        if self._head is None:
            return piece
        self._head += piece
        line, newline, rest = bytes(self._head).partition(b"\n")
        if not newline and len(self._head) < 20:
            return b""
        self._head = None
        if newline and line.isdigit() and len(line) < 12:
            self._group = int(line)
            return rest
        return line + newline + rest  # the shell failed before our line


def _send_command(channel: paramiko.Channel, text: str) -> None:
    """`exec_command` without waiting for the answer, which a guest could leave us waiting for without end."""
    request = paramiko.Message()
    request.add_byte(cMSG_CHANNEL_REQUEST)
    request.add_int(channel.remote_chanid)
    request.add_string("exec")
    request.add_boolean(False)
    request.add_string(text)
    channel.get_transport()._send_user_message(request)  # type: ignore[attr-defined]


def start(channel: paramiko.Channel, text: str) -> paramiko.Channel:
    """Start a command that nobody listens to."""
    _send_command(channel, text)
    return channel


def _feed(channel: paramiko.Channel, input: bytes) -> None:
    if len(input) <= min(_INLINE_INPUT, channel.out_window_size):
        _send(channel, input)
    else:  # so that a guest that does not read, or a command that writes before it reads, does not keep us waiting
        threading.Thread(target=_send, args=(channel, input), name="guest-input", daemon=True).start()


def _send(channel: paramiko.Channel, input: bytes) -> None:
    try:
        if input:
            channel.sendall(input)
        channel.shutdown_write()
    except OSError:
        return  # the command ended without reading everything, as `head` does; its status tells the rest
