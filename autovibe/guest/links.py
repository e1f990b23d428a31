"""One SSH connection to a guest, made and verified; `pool` decides how many there are and who uses them.

paramiko's exceptions end here: GuestUnreachable for a guest that does not answer, refuses the key, or shows another
host key than the pinned one; NotYet only while a guest is being reached for the first time.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from dataclasses import dataclass, replace

import paramiko
from paramiko.common import MSG_CHANNEL_REQUEST

from autovibe.errors import GuestUnreachable
from autovibe.guest.keys import HOST_KEY_TYPE, fingerprint

CHANNELS = 4  # commands at a time on one connection, each with its guard; sshd's MaxSessions is 10
_HANDSHAKE_SECONDS = 45.0  # one costs 1-2 s of an idle emulated CPU, and much more of a busy one


# paramiko logs a stack trace for every guest that does not answer yet; what happened is told by the error.
_QUIET = logging.getLogger("autovibe.guest.paramiko")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False


@dataclass(frozen=True)
class Address:
    """Where a guest is reached and who it must be; `host_key` is "ssh-ed25519 AAAA…"."""

    host: str
    port: int
    user: str
    host_key: str

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"

    def with_key(self, host_key: str) -> Address:
        return replace(self, host_key=host_key)


class Silent(GuestUnreachable):
    """Nobody answers at that address, or what answers is no SSH server (yet)."""


class HostKeyChanged(GuestUnreachable):
    """Another host key than the pinned one."""


class KeyRefused(GuestUnreachable):
    """The guest does not let the Hub's key in."""


class Link:
    """A transport and how many channels are open on it. `pool` guards the count with its own lock."""

    def __init__(self, transport: paramiko.Transport, host_key: str) -> None:
        self.transport = transport
        self.host_key = host_key
        self.channels = 0
        self.most_channels = CHANNELS
        self.used_at = time.monotonic()

    @property
    def is_alive(self) -> bool:
        return bool(self.transport.is_active())

    def close(self) -> None:
        self.transport.close()


def connect(
    host: str, port: int, user: str, key: paramiko.PKey, *, host_key: str | None, timeout_seconds: float
) -> Link:
    """A verified and authenticated connection; without `host_key` (first contact) the link tells the one it saw.

    `timeout_seconds` is for the TCP connection and the SSH banner: a forward accepts before anybody listens behind it.
    """
    where = f"{user}@{host}:{port}"
    try:
        channel = _socket(host, port, timeout_seconds)
    except OSError as error:
        raise Silent(f"The guest does not answer on SSH at {host}:{port} ({error}).") from error
    transport = _Transport(channel)
    transport.set_log_channel(_QUIET.name)
    transport.banner_timeout = timeout_seconds
    transport.handshake_timeout = transport.auth_timeout = _HANDSHAKE_SECONDS
    transport.get_security_options().key_types = (HOST_KEY_TYPE,)
    transport.daemon = True
    try:
        try:
            transport.start_client(timeout=timeout_seconds + _HANDSHAKE_SECONDS)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise Silent(f"The guest does not answer on SSH at {host}:{port} ({_text(error)}).") from error
        seen = _key_line(transport.get_remote_server_key())
        _check_key(host, port, host_key, seen)
        try:
            transport.auth_publickey(user, key)
        except paramiko.AuthenticationException as error:
            raise KeyRefused(f"The guest refuses the Hub's SSH key for {where} ({_text(error)}).") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise Silent(f"The guest went silent while {where} was logging in ({_text(error)}).") from error
    except BaseException:
        transport.close()
        raise
    transport.set_keepalive(15)
    return Link(transport, seen)


def _told(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """paramiko forgets how a command ended that a signal killed; it becomes 128 + the signal, as shells count."""
    start = message.packet.tell()
    kind = message.get_text()
    if kind == "exit-signal":
        message.get_boolean()
        number = signal.Signals.__members__.get(f"SIG{message.get_text()}")
        channel.exit_status = 128 + (number.value if number is not None else 0)
        channel.status_event.set()
        return
    message.packet.seek(start)
    paramiko.Channel._handle_request(channel, message)  # type: ignore[attr-defined]


class _Transport(paramiko.Transport):
    _channel_handler_table = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: _told,
    }


def _check_key(host: str, port: int, pinned: str | None, seen: str) -> None:
    if pinned is None or seen == _plain(pinned):
        return
    expected, found = fingerprint(pinned), fingerprint(seen)
    raise HostKeyChanged(
        f"The guest at {host}:{port} shows another host key than the pinned one: {found} instead of {expected}. "
        "Somebody else answers there, or the guest was rebuilt; nothing was sent to it.",
        details={"expected": expected, "found": found},
    )


def _socket(host: str, port: int, timeout_seconds: float) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=timeout_seconds)
    # Without this an exec waits for the other side's delayed acknowledgement: 50 ms instead of 5.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _key_line(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.get_base64()}"


def _plain(host_key: str) -> str:
    return " ".join(host_key.split()[:2])


def _text(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).rstrip(".")[:300]
