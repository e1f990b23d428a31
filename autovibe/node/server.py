"""HTTPS on threads, over h11: a thread per connection, as the status line must carry Proxmox's messages.

A connection serves one request after the other and is closed after 5 idle seconds and after every error, as Proxmox
does. The request's body is read by whoever wants it, so that an upload goes straight to the disk.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import h11

from autovibe.node.messages import Request, Response

logger = logging.getLogger(__name__)

IDLE_SECONDS = 5.0
_STALL_SECONDS = 60.0  # a client that sends or takes nothing for this long is dropped
_CONNECTIONS = 256
_HEADER_BYTES = 8 << 10
_HEADER_COUNT = 64
_BLOCK = 1 << 16
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20
_TLS_HANDSHAKE = 0x16
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201c\u201d"), "'")


class Server:
    """Answers each request with `answer`, which may be called by many threads."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, answer: Callable[[Request], Response]) -> None:
        self._context = context
        self._answer = answer
        self._is_stopping = False
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        self._idle: set[socket.socket] = set()
        self._mutex = threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def stop(self) -> None:
        """Accept nothing more and drop idle connections; requests under way are answered."""
        self._is_stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._mutex:
            for connection in self._idle:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def _accept(self) -> None:
        while not self._is_stopping:
            self._slots.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                self._slots.release()
                if not self._is_stopping:
                    logger.error("A connection could not be accepted: %s", error)  # noqa: TRY400
                    time.sleep(0.1)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="connection", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_STALL_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if (first := connection.recv(1, socket.MSG_PEEK)) and first[0] != _TLS_HANDSHAKE:
                _redirect(connection)
            elif first:
                with self._context.wrap_socket(connection, server_side=True) as secured:
                    _Conversation(secured, self).run()
        except (OSError, h11.ProtocolError) as error:
            logger.debug("A connection ended: %s", error)
        finally:
            connection.close()
            self._slots.release()

    @contextlib.contextmanager
    def idle(self, connection: socket.socket) -> Iterator[None]:
        """While a connection waits for its next request, `stop` may end it."""
        with self._mutex:
            self._idle.add(connection)
        try:
            yield
        finally:
            with self._mutex:
                self._idle.discard(connection)

    def respond(self, request: Request) -> Response:
        return self._answer(request)

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping


class _Conversation:
    """The requests and answers of one connection."""

    def __init__(self, connection: ssl.SSLSocket, server: Server) -> None:
        self._connection = connection
        self._server = server
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADER_BYTES)

    def run(self) -> None:
        while not self._server.is_stopping:
            try:
                head = self._await_request()
                if head is None:
                    return
                response = self._server.respond(self._request(head))
            except h11.RemoteProtocolError as error:
                response = Response(error.error_status_hint, "bad request", closes=True)
            closes = not self._send(response)
            if closes:
                self._linger()
                return
            self._h11.start_next_cycle()

    def _await_request(self) -> h11.Request | None:
        """The next request's head, None when the client is gone or idle for too long."""
        with self._server.idle(self._connection):
            self._connection.settimeout(IDLE_SECONDS)
            try:
                event = self._next_event()
            except TimeoutError:
                return None
        self._connection.settimeout(_STALL_SECONDS)
        if not isinstance(event, h11.Request):
            return None
        if len(event.headers) > _HEADER_COUNT:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        return event

    def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            if self._h11.they_are_waiting_for_100_continue:
                self._write(self._h11.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")))
            self._h11.receive_data(self._connection.recv(_BLOCK))

    def _request(self, head: h11.Request) -> Request:
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in head.headers}
        return Request(head.method.decode("latin1"), head.target.decode("latin1"), headers, self._body)

    def _body(self) -> Iterator[bytes]:
        while self._h11.their_state is h11.SEND_BODY:
            event = self._next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.ConnectionClosed):
                return

    def _send(self, response: Response) -> bool:
        """Send an answer; whether the connection may be used for another request."""
        closes = response.closes or self._server.is_stopping or self._h11.their_state is not h11.DONE
        closes = closes and not (not response.closes and self._is_body_over())
        headers = {
            "Cache-Control": "max-age=0",
            "Connection": "close" if closes else "Keep-Alive",
            "Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            "Pragma": "no-cache",
            "Server": "pve-api-daemon/3.0",
            "Content-Length": str(len(response.body)),
            **response.headers,
        }
        if response.content_type:
            headers["Content-Type"] = response.content_type
        head = h11.Response(
            status_code=response.status, reason=_as_reason(response.reason), headers=list(headers.items())
        )
        data = self._h11.send(head) or b""
        if response.body:
            data += self._h11.send(h11.Data(data=response.body)) or b""
        data += self._h11.send(h11.EndOfMessage()) or b""
        self._write(data)
        return not closes and self._h11.our_state is h11.DONE

    def _is_body_over(self) -> bool:
        """Take in the end of a short body that nobody read, so that the connection can go on."""
        if self._server.is_stopping:
            return False
        for size, _ in enumerate(self._body()):
            if size > 8:
                return False
        return self._h11.their_state is h11.DONE

    def _linger(self) -> None:
        """Let the client read the answer before the connection ends, though it may still be sending."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the socket was closed meanwhile
            self._connection.settimeout(_LINGER_SECONDS)
            deadline, size = time.monotonic() + _LINGER_SECONDS, 0
            if self._h11.their_state is h11.SEND_BODY:
                while time.monotonic() < deadline and size < _LINGER_BYTES:
                    block = self._connection.recv(_BLOCK)
                    if not block:
                        break
                    size += len(block)
            self._connection.unwrap()

    def _write(self, data: bytes | None) -> None:
        if data:
            self._connection.sendall(data)


def _as_reason(text: str) -> bytes:
    """The first line, in ASCII: other characters break clients (and on a real Proxmox the answer itself)."""
    line = text.strip().split("\n")[0].translate(_QUOTES)
    return "".join(char if " " <= char <= "~" else "?" for char in line).encode("ascii")


def _redirect(connection: socket.socket) -> None:
    """Plain HTTP is answered with where to go."""
    connection.settimeout(2.0)
    lines = connection.recv(_HEADER_BYTES).decode("latin1").split("\r\n")
    words = lines[0].split(" ")
    host = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("host:")), "")
    place = f"Location: https://{host}{words[1]}\r\n" if len(words) > 1 and host else ""
    text = f"HTTP/1.1 301 Moved Permanently\r\n{place}Content-Length: 0\r\nConnection: close\r\n\r\n"
    connection.sendall(text.encode("latin1", "replace"))
