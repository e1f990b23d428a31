"""HTTPS on threads, over h11: a thread per connection, as the status line must carry Proxmox's messages.

A connection serves one request after the other, a hundred at most, and is closed after 5 idle seconds and after every
error, as Proxmox does. The request's body is read by whoever wants it, so that an upload goes straight to the disk.
Every read and write has an end in sight: who sends or takes a byte a second does not keep a thread.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import h11

from autovibe.node.http import request_head
from autovibe.node.http.messages import Request, Response

logger = logging.getLogger(__name__)

Answer = Callable[[Request], Response]

IDLE_SECONDS = 5.0
HANDSHAKE_SECONDS = 10.0
HEAD_SECONDS = 10.0
STALL_SECONDS = 30.0  # what a body may take, besides the time its bytes take at the slowest pace
_SLOWEST_PACE = 1 << 10  # bytes a second
_CONNECTIONS = 256
_REQUESTS = 100  # of one connection
_BLOCK = 1 << 16
_COMPRESSED_FROM = 1024
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20
_UNREAD_BYTES = 1 << 16
_TLS_HANDSHAKE = 0x16
_CONTINUE = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201c\u201d"), "'")


class Server:
    """Answers each request with `answer`, which may be called by many threads."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, answer: Answer) -> None:
        self._context = context
        self._answer = answer
        self._is_stopping = False
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        self._interruptible: set[socket.socket] = set()
        self._mutex = threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def stop(self) -> None:
        """Accept nothing more and drop idle connections; requests under way are answered, websockets end themselves."""
        self._is_stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._mutex:
            for connection in self._interruptible:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RD)  # not TLS's own, which another thread is using

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @contextlib.contextmanager
    def interruptible(self, connection: socket.socket) -> Iterator[None]:
        """While a connection waits for its next request, `stop` may end it."""
        with self._mutex:
            self._interruptible.add(connection)
        try:
            yield
        finally:
            with self._mutex:
                self._interruptible.discard(connection)

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
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if (first := connection.recv(1, socket.MSG_PEEK)) and first[0] != _TLS_HANDSHAKE:
                _Conversation(connection, self, _redirect).run()
            elif first:
                with self._context.wrap_socket(connection, server_side=True) as secured:
                    _Conversation(secured, self, self._answer).run()
        except (OSError, h11.ProtocolError, request_head.TooLarge) as error:
            logger.debug("A connection ended: %r", error)
        finally:
            connection.close()
            self._slots.release()


class _Conversation:
    """The requests and answers of one connection."""

    def __init__(self, connection: socket.socket, server: Server, answer: Answer) -> None:
        self._connection = connection
        self._server = server
        self._answer = answer
        self._unread = b""
        self._left = _REQUESTS
        self._h11 = h11.Connection(h11.SERVER)

    def run(self) -> None:
        while not self._server.is_stopping:
            head = self._await_head()
            if head is None:
                return
            self._left -= 1
            self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=request_head.MAX_BYTES * 2)
            request: h11.Request | None = None
            response = request_head.complaint(head)
            if response is None:
                try:
                    request = self._parse(head)
                    response = self._answer(self._request(request))
                except h11.RemoteProtocolError as error:
                    response = Response(error.error_status_hint, "bad request", closes=True)
            if response.talk is not None:
                self._switch(response, response.talk)
                return
            if not self._send(response, request):
                self._linger()
                return
            self._unread = self._h11.trailing_data[0]

    # Reading

    def _await_head(self) -> bytes | None:
        """The next request's head, None when the client is gone, or idle for too long."""
        with self._server.interruptible(self._connection):
            self._unread = self._unread.lstrip(b"\r\n")
            self._connection.settimeout(IDLE_SECONDS)
            while not self._unread:
                try:
                    block = self._connection.recv(_BLOCK)
                except TimeoutError:
                    return None
                if not block:
                    return None
                self._unread = block.lstrip(b"\r\n")
        deadline = time.monotonic() + HEAD_SECONDS
        while (end := request_head.find_end(self._unread)) is None:
            block = self._receive(min(deadline, time.monotonic() + IDLE_SECONDS))
            if not block:
                return None
            self._unread += block
        return self._unread[:end]

    def _parse(self, head: bytes) -> h11.Request:
        self._h11.receive_data(self._unread)
        event = self._h11.next_event()
        if not isinstance(event, h11.Request):
            raise h11.RemoteProtocolError(f"no request: {head[:80]!r}")
        return event

    def _request(self, head: h11.Request) -> Request:
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in head.headers}
        return Request(head.method.decode("latin1"), head.target.decode("latin1"), headers, self._body)

    def _body(self) -> Iterator[bytes]:
        """The body as it comes; it may take the longer the more of it has come."""
        deadline = time.monotonic() + STALL_SECONDS
        while self._h11.their_state is h11.SEND_BODY:
            event = self._h11.next_event()
            if isinstance(event, h11.Data):
                deadline += len(event.data) / _SLOWEST_PACE
                yield bytes(event.data)
            elif event is h11.NEED_DATA:
                if self._h11.they_are_waiting_for_100_continue:
                    self._write(self._h11.send(_CONTINUE))
                self._h11.receive_data(self._receive(deadline))
            else:
                return

    def _receive(self, deadline: float) -> bytes:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the client is too slow")
        self._connection.settimeout(remaining)
        return self._connection.recv(_BLOCK)

    # Writing

    def _send(self, response: Response, request: h11.Request | None) -> bool:
        """Send an answer; whether the connection may be used for another request."""
        closes = response.closes or self._server.is_stopping or self._left <= 0 or not self._is_body_over()
        body, coding = response.body, {}
        if len(body) > _COMPRESSED_FROM and request is not None and _takes_gzip(request):
            body, coding = gzip.compress(body, 6, mtime=0), {"Content-Encoding": "gzip"}
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        headers = {
            "Cache-Control": "max-age=0",
            "Connection": "close" if closes else "Keep-Alive",
            "Date": date,
            "Pragma": "no-cache",
            "Server": "pve-api-daemon/3.0",
            "Content-Length": str(len(body)),
            **({"Content-Type": response.content_type} if response.content_type else {}),
            "Expires": date,
            **coding,
            **response.headers,
        }
        head = h11.Response(
            status_code=response.status, reason=_as_reason(response.reason), headers=list(headers.items())
        )
        data = self._h11.send(head) or b""
        if response.cut is not None:
            self._write(data + body[: response.cut])
            raise ConnectionError("cut off on demand")
        data += self._h11.send(h11.Data(data=body)) or b""
        data += self._h11.send(h11.EndOfMessage()) or b""
        self._write(data)
        return not closes

    def _switch(self, response: Response, talk: Callable[[ssl.SSLSocket, bytes], None]) -> None:
        """Leave HTTP: `talk` has the connection from here on; also one that is gone, to end what was begun for it."""
        head = h11.InformationalResponse(
            status_code=response.status, reason=_as_reason(response.reason), headers=list(response.headers.items())
        )
        with contextlib.suppress(OSError):
            self._write(self._h11.send(head))
        if isinstance(self._connection, ssl.SSLSocket):
            talk(self._connection, self._h11.trailing_data[0])

    def _is_body_over(self) -> bool:
        """Take in the end of a short body that nobody read, so that the connection can go on."""
        size = 0
        if self._h11.their_state is h11.SEND_BODY and not self._h11.they_are_waiting_for_100_continue:
            for block in self._body():
                size += len(block)
                if size > _UNREAD_BYTES:
                    break
        return self._h11.their_state is h11.DONE

    def _linger(self) -> None:
        """Let the client read the answer before the connection ends, though it may still be sending."""
        with contextlib.suppress(OSError, ValueError, h11.RemoteProtocolError):  # ValueError: a socket closed meanwhile
            while self._h11.their_state is h11.SEND_BODY and self._h11.next_event() is not h11.NEED_DATA:
                pass
            deadline, size = time.monotonic() + _LINGER_SECONDS, 0
            if self._h11.their_state in (h11.SEND_BODY, h11.IDLE):
                while size < _LINGER_BYTES and (block := self._receive(deadline)):
                    size += len(block)
            if isinstance(self._connection, ssl.SSLSocket):
                self._connection.settimeout(_LINGER_SECONDS)
                self._connection.unwrap()

    def _write(self, data: bytes | None) -> None:
        rest = memoryview(data or b"")
        deadline = time.monotonic() + STALL_SECONDS + len(rest) / _SLOWEST_PACE
        while rest:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
            rest = rest[self._connection.send(rest[:_BLOCK]) :]


def _takes_gzip(request: h11.Request) -> bool:
    return any(name == b"accept-encoding" and b"gzip" in value for name, value in request.headers)


def _as_reason(text: str) -> bytes:
    """The first line, in ASCII.

    A character outside of Latin-1 kills a real daemon's answer: its client sees 596 and no body. That is a defect of
    the real one, which clients can only suffer from, so here such an answer arrives, with a `?` in its place.
    """
    line = text.strip().split("\n")[0].translate(_QUOTES)
    return "".join(char if " " <= char <= "~" else "?" for char in line).encode("ascii")


def _redirect(request: Request) -> Response:
    """Plain HTTP is answered with where to go."""
    host = request.headers.get("host", "").removeprefix("http://").removeprefix("https://")
    status, reason = (301, "Moved Permanently") if request.method == "GET" else (308, "Permanent Redirect")
    return Response(status, reason, headers={"Location": f"https://{host}{request.target}"}, closes=True)
