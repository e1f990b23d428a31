"""Server-sent events as they come (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import NamedTuple

import httpx2

ALIVE_SECONDS = 45.0
"""A Hub writes something at least every 15 s; a stream that is silent for so long is lost."""


class Frame(NamedTuple):
    """One event. A comment, by which the Hub says that it lives, has neither a name nor data."""

    id: str
    name: str
    data: str


class Frames:
    """The events of one answer, until it ends or is lost; then iterating ends. `close` works from any thread."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._is_closed = False

    def __iter__(self) -> Iterator[Frame]:
        fields: dict[str, str] = {}
        try:
            with contextlib.suppress(httpx2.TransportError, httpx2.StreamError):
                for line in self._lines():
                    if line:
                        name, _, value = line.partition(":")
                        value = value.removeprefix(" ")
                        fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
                    elif fields:
                        yield Frame(fields.get("id", ""), fields.get("event", ""), fields.get("data", ""))
                        fields = {}
        finally:  # also when it is left in the middle
            self._response.close()

    def _lines(self) -> Iterator[str]:
        """Only LF and CR LF end a line here; the characters that end one elsewhere may stand in data."""
        rest = b""
        for part in self._response.iter_bytes():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line.removesuffix(b"\r").decode(errors="replace")

    def close(self) -> None:
        """A thread that is reading just now would keep the connection open; shut down, its reading ends."""
        if not self._is_closed:
            self._is_closed = True
            stream = self._response.extensions.get("network_stream")
            link = stream.get_extra_info("socket") if stream is not None else None
            if link is not None:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
