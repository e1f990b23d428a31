"""The HTTP protocol of the server, with one thing more: a stream may cut off a client that takes nothing.

Closing a connection waits for what is still to be written, which such a client never takes.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class Protocol(H11Protocol):
    """Requests find `cut` in their state: it ends the connection at once. Callable in the event loop."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state = {**self.app_state, "cut": transport.abort}
        super().connection_made(transport)
