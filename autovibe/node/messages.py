"""Requests and responses between the server, which speaks HTTP, and the API, which does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass
class Request:
    """`target` is the path with its query, as sent. `body` yields the body as it arrives; it may be left unread."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: Callable[[], Iterator[bytes]]

    def read(self, limit: int) -> bytes | None:
        """The whole body, None when it is longer than `limit` bytes."""
        parts, size = [], 0
        for part in self.body():
            size += len(part)
            if size > limit:
                return None
            parts.append(part)
        return b"".join(parts)


@dataclass(frozen=True)
class Response:
    """`reason` goes into the status line, where Proxmox's clients read the message. `closes` ends the connection."""

    status: int
    reason: str
    body: bytes = b""
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    closes: bool = False
