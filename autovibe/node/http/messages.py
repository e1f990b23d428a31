"""Requests and responses between the server, which speaks HTTP, and the API, which does not."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Talk = Callable[[ssl.SSLSocket, bytes], None]
"""What goes on over a connection after HTTP: the connection, and what the client has sent already."""


@dataclass
class Request:
    """`target` is the path with its query, as sent. `body` yields the body as it arrives; it may be left unread."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: Callable[[], Iterator[bytes]]

    @property
    def length(self) -> int:
        """Bytes of the body; chunked ones do not get this far."""
        return int(self.headers.get("content-length") or 0)

    def read(self, limit: int) -> bytes | None:
        """The whole body, None when it is longer than `limit` bytes."""
        return None if self.length > limit else b"".join(self.body())


@dataclass(frozen=True)
class Response:
    """`reason` goes into the status line, where Proxmox's clients read the message. `closes` ends the connection.

    With `talk` the answer is a switch of protocols. `cut` is a fault on demand: so many bytes of the body are sent,
    then the connection ends.
    """

    status: int
    reason: str
    body: bytes = b""
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    closes: bool = False
    talk: Talk | None = None
    cut: int | None = None


@dataclass(frozen=True)
class Channel:
    """What a verb answers that can also become a websocket: `data` for a plain request.

    For an upgrade `open` is called, which may still refuse.
    """

    data: Any
    open: Callable[[], Talk]
