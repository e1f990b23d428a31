"""One command on one channel: send it, feed it, and read both its streams until it ends or its time is over."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from autovibe.errors import GuestUnreachable
from autovibe.guest.command import KILLED, TIMED_OUT, Result
from autovibe.guest.links import Address

_PIECE = 1 << 16
_LATE_SECONDS = 15.0  # after the time-out, for the guest to end the command and say so
_QUIET_SECONDS = 0.2  # without output after the command's end, until what it left behind is not waited for
_DRAIN_SECONDS = 10.0
_INLINE_INPUT = 1 << 20  # OpenSSH takes 2 MiB before it waits for the command to read


def run(
    channel: paramiko.Channel,
    address: Address,
    text: str,
    *,
    input: bytes,
    timeout_seconds: float,
    output_limit: int,
) -> Result:
    began = time.monotonic()
    kept = {"stdout": bytearray(), "stderr": bytearray()}
    truncated = False
    status = TIMED_OUT
    for name, piece in pieces(channel, address, text, input=input, timeout_seconds=timeout_seconds):
        if name == "exit":
            status = int(piece)
            continue
        room = output_limit - len(kept[name])
        kept[name] += piece[: max(room, 0)]
        truncated = truncated or len(piece) > room
    took = time.monotonic() - began
    return Result(status, bytes(kept["stdout"]), bytes(kept["stderr"]), truncated, round(took * 1000))


def pieces(
    channel: paramiko.Channel, address: Address, text: str, *, input: bytes, timeout_seconds: float
) -> Iterator[tuple[str, bytes]]:
    """("stdout" | "stderr", bytes) as they come, at the end ("exit", b"<status>"), 124 when the time was over."""
    began = time.monotonic()
    deadline = began + timeout_seconds + _LATE_SECONDS
    try:
        channel.settimeout(timeout_seconds + _LATE_SECONDS)
        _send_command(channel, text)
        _feed(channel, input)
        yield from _read(channel, deadline)
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise GuestUnreachable(f"The connection to the guest at {address} was lost while a command ran.") from error
    status = _status(channel, deadline)
    took = time.monotonic() - began
    if status is None and took < timeout_seconds:
        raise GuestUnreachable(f"The connection to the guest at {address} was lost while a command ran.")
    # A command that outlived the polite signal was killed together with the `timeout` that led its group.
    if status is None or (status == KILLED and took >= timeout_seconds):
        status = TIMED_OUT
    yield "exit", str(status).encode()


def _send_command(channel: paramiko.Channel, text: str) -> None:
    """`exec_command` without waiting for the answer, which a guest could leave us waiting for without end."""
    request = paramiko.Message()
    request.add_byte(cMSG_CHANNEL_REQUEST)
    request.add_int(channel.remote_chanid)
    request.add_string("exec")
    request.add_boolean(False)
    request.add_string(text)
    channel.transport._send_user_message(request)  # type: ignore[attr-defined]


def _feed(channel: paramiko.Channel, input: bytes) -> None:
    if len(input) <= _INLINE_INPUT:
        _send(channel, input)
    else:  # so that a command that writes before it has read everything does not wait for us, and we for it
        threading.Thread(target=_send, args=(channel, input), name="guest-input", daemon=True).start()


def _send(channel: paramiko.Channel, input: bytes) -> None:
    try:
        if input:
            channel.sendall(input)
        channel.shutdown_write()
    except OSError:
        return  # the command ended without reading everything, as `head` does; its status tells the rest


def _read(channel: paramiko.Channel, deadline: float) -> Iterator[tuple[str, bytes]]:
    poller = select.poll()
    poller.register(channel.fileno(), select.POLLIN)
    has_ended = False
    while time.monotonic() < deadline:
        progressed = False
        if channel.recv_ready():
            progressed = True
            yield "stdout", channel.recv(_PIECE)
        if channel.recv_stderr_ready():
            progressed = True
            yield "stderr", channel.recv_stderr(_PIECE)
        if progressed:
            continue
        if channel.eof_received or channel.closed or has_ended:
            if channel.recv_ready() or channel.recv_stderr_ready():
                continue
            return
        if channel.status_event.is_set():
            # A process that the command left in the background may keep the streams open for ever.
            has_ended = True
            deadline = min(deadline, time.monotonic() + _DRAIN_SECONDS)
        poller.poll(_QUIET_SECONDS * 1000)


def _status(channel: paramiko.Channel, deadline: float) -> int | None:
    """The exit status; None when it did not come: at the deadline, or because the connection ended."""
    if not channel.status_event.wait(max(0.0, deadline - time.monotonic())):
        return None
    status = channel.recv_exit_status()
    return status if status >= 0 else None
