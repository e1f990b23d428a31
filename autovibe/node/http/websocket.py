"""Websockets (RFC 6455): the handshake as Proxmox does it, and the relay between a client and a VM's socket.

A `Codec` stands between the two: what the client's messages mean to the VM, and what the VM's bytes are for the client
(`console`). The relay is one thread over two sockets that never block, with bounded buffers: a side that does not take
what it is sent stops the other side from being read.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Protocol

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

from autovibe.node.http.messages import Channel, Request, Response
from autovibe.node.refusal import Refusal

logger = logging.getLogger(__name__)

_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_MESSAGE_BYTES = 128 << 10  # as much as Proxmox takes in one frame
_BUFFER_BYTES = 256 << 10
_BLOCK = 1 << 14
_POLL_SECONDS = 0.5
_STALL_SECONDS = 60.0  # a client that takes nothing for so long is given up
_CLOSE_SECONDS = 2.0
_KEEP_ALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 10),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 6),
)


class Codec(Protocol):
    """What is said in the websocket's messages."""

    def from_client(self, data: bytes) -> bytes:
        """What the VM gets for a message of the client's. Raises ValueError for one that makes no sense."""

    def from_vm(self, data: bytes) -> bytes:
        """What the client gets for what the VM says."""

    def reply(self) -> bytes:
        """What the client gets in answer to its last message, besides what the VM says."""


class Violation(Exception):
    """The client broke the rules; `code` is the close code it is told."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def accept(request: Request, channel: Channel) -> Response:
    """The switch to a websocket. Its refusals are bare, as those of a real one."""
    headers = request.headers
    upgrade, version = headers.get("upgrade", "").lower(), headers.get("sec-websocket-version", "")
    if upgrade != "websocket":
        raise _bare(f"unable to upgrade to protocol '{upgrade}'")
    if version != "13":
        raise _bare(f"unsupported websocket-version '{version}'")
    key = headers.get("sec-websocket-key", "")
    if not key:
        raise _bare("missing websocket-key")
    digest = hashlib.sha1((key + _GUID).encode("latin1")).digest()  # noqa: S324 - the RFC's
    answer = {
        "Upgrade": "websocket",
        "Connection": "upgrade",
        "Sec-WebSocket-Accept": base64.b64encode(digest).decode(),
    }
    offered = [word.strip() for word in headers.get("sec-websocket-protocol", "").split(",") if word.strip()]
    if offered:
        answer["Sec-WebSocket-Protocol"] = "binary" if "binary" in offered else offered[0]
    return Response(101, "Switching Protocols", headers=answer, talk=channel.open())


def _bare(reason: str) -> Refusal:
    return Refusal(reason, status=501, is_bare=True)


class Relay:
    """One websocket and the VM's socket behind it. `is_over` is asked now and then, and ends it."""

    def __init__(self, client: ssl.SSLSocket, codec: Codec, is_over: Callable[[], bool]) -> None:
        self._client = client
        self._codec = codec
        self._is_over = is_over
        self._frames = Connection(ConnectionType.SERVER)
        self._to_client, self._to_vm = b"", b""
        self._message = b""
        self._is_closing = False
        self._vm: socket.socket | None = None
        self._taken_at = time.monotonic()

    def run(self, early: bytes, connect: Callable[[], socket.socket | None]) -> None:
        """Until either side has had enough. `connect` gives the VM's socket; None while the client must say more."""
        self._client.settimeout(0)
        for option, value in _KEEP_ALIVE:  # a client may vanish without a word
            self._client.setsockopt(*option, value)
        try:
            self._take(early)
            while not self._is_closing:
                if self._vm is None and (vm := connect()) is not None:
                    vm.settimeout(0)
                    self._vm = vm
                if self._is_over():
                    self._close(CloseReason.GOING_AWAY, "")
                    break
                self._step()
        except Violation as violation:
            self._close(violation.code, str(violation))
        finally:
            if self._vm is not None:
                self._vm.close()
            self._flush()

    def _step(self) -> None:
        """Wait for something to do, then do it."""
        reading, writing = [], []
        if len(self._to_vm) < _BUFFER_BYTES:
            reading.append(self._client)
        if self._to_client:
            writing.append(self._client)
        vm = self._vm
        if vm is not None and len(self._to_client) < _BUFFER_BYTES:
            reading.append(vm)  # type: ignore[arg-type]
        if vm is not None and self._to_vm:
            writing.append(vm)  # type: ignore[arg-type]
        if not (self._client in reading and self._client.pending()):
            select.select(reading, writing, [], _POLL_SECONDS)
        if self._client in reading:
            self._read_client()
        if vm is not None:
            self._talk_to(vm)
        self._write_client()

    def _read_client(self) -> None:
        try:
            data = self._client.recv(_BLOCK)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:  # gone without a word
            data = b""
        if not data:
            self._is_closing = True
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        self._frames.receive_data(data)
        for event in self._frames.events():
            if isinstance(event, Ping):
                self._to_client += self._frames.send(event.response())
            elif isinstance(event, CloseConnection):
                self._to_client += self._answer_close(event)
                self._is_closing = True
            elif isinstance(event, BytesMessage | TextMessage):
                part = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
                self._message += part
                if len(self._message) > _MESSAGE_BYTES:
                    raise Violation(CloseReason.MESSAGE_TOO_BIG, "received too large websocket frame")
                if event.message_finished:
                    self._deliver()
        if len(self._to_client) > 2 * _BUFFER_BYTES:  # pings without end, whose answers nobody takes
            raise Violation(CloseReason.POLICY_VIOLATION, "too many messages")

    def _answer_close(self, event: CloseConnection) -> bytes:
        try:
            return self._frames.send(event.response())
        except LocalProtocolError:  # it was we who closed
            return b""

    def _deliver(self) -> None:
        message, self._message = self._message, b""
        try:
            self._to_vm += self._codec.from_client(message)
        except ValueError as error:
            raise Violation(CloseReason.POLICY_VIOLATION, str(error)) from None
        if reply := self._codec.reply():
            self._say(reply)

    def _talk_to(self, vm: socket.socket) -> None:
        try:
            if self._to_vm:
                self._to_vm = self._to_vm[vm.send(self._to_vm) :]
        except BlockingIOError:
            pass
        except OSError:
            self._close(CloseReason.NORMAL_CLOSURE, "")
            return
        if len(self._to_client) >= _BUFFER_BYTES:
            return
        try:
            data = vm.recv(_BLOCK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._say(self._codec.from_vm(data))
        else:
            self._close(CloseReason.NORMAL_CLOSURE, "")

    def _say(self, data: bytes) -> None:
        self._to_client += self._frames.send(BytesMessage(data=data))

    def _close(self, code: int, reason: str) -> None:
        self._is_closing = True
        try:
            self._to_client += self._frames.send(CloseConnection(code=code, reason=reason))
        except LocalProtocolError:  # the client was first
            return

    def _write_client(self) -> None:
        if self._to_client:
            try:
                self._to_client = self._to_client[self._client.send(self._to_client[:_BLOCK]) :]
                self._taken_at = time.monotonic()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if time.monotonic() - self._taken_at > _STALL_SECONDS:
                    raise TimeoutError("the client takes nothing") from None
        else:
            self._taken_at = time.monotonic()

    def _flush(self) -> None:
        """Send what is left, the close among it, for a moment at most."""
        try:
            self._client.settimeout(_CLOSE_SECONDS)
            if self._to_client:
                self._client.sendall(self._to_client)
            self._client.unwrap()
        except (OSError, ValueError) as error:
            logger.debug("A websocket's end could not be told: %s", error)
