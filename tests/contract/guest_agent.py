"""A guest agent's side of its socket: it says what a test tells it to, rightly synchronised or not."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Speak = Callable[[dict[str, Any]], bytes]


def told(value: Any) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


def refused(text: str, kind: str = "GenericError") -> bytes:
    return json.dumps({"error": {"class": kind, "desc": text}}).encode() + b"\n"


class GuestAgent:
    """Answers each request with `speak`'s bytes, one connection after the other, as QEMU's socket does.

    `requests` is what was asked, synchronisations aside. With `synchronise` a test answers those too.
    """

    def __init__(self, path: Path, speak: Speak, *, before: bytes = b"", synchronise: Speak | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.speak = speak
        self._before = before
        self._synchronise = synchronise or (lambda request: b"\xff" + told(request["arguments"]["id"]))
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
                connection.sendall(self._before)
                for line in lines:
                    request = json.loads(line.lstrip(b"\xff"))
                    if request["execute"] == "guest-sync-delimited":
                        connection.sendall(self._synchronise(request))
                        continue
                    self.requests.append(request)
                    connection.sendall(told({}) if request["execute"] == "guest-ping" else self.speak(request))
