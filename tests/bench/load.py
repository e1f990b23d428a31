"""A load of kept connections that ask as fast as they are answered. Raw, so that it costs little beside the server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Question = Callable[[], bytes]
"""The bytes of the next request."""


def request(method: str, path: str, headers: dict[str, str], body: Any = None) -> bytes:
    """An HTTP/1.1 request with a JSON body, where there is one."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", *(f"{name}: {value}" for name, value in headers.items())]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


@dataclass
class Load:
    """What a load has measured: seconds of each answer, and the answers that were not as expected."""

    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    wrong: list[bytes] = field(default_factory=list)

    @property
    def milliseconds_an_answer(self) -> float:
        """Of the server: the inverse of its throughput."""
        return 1000 * self.elapsed / len(self.seconds)

    def percentile(self, part: float) -> float:
        """In milliseconds."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def run(
    port: int, question: Question, *, connections: int, seconds: float = 3600.0, most: int = 10**9, status: int = 200
) -> Load:
    """Ask from so many connections for so long, or until `most` answers. Raises AssertionError for a wrong answer."""
    load = asyncio.run(_run(port, question, connections, seconds, most, b" %d " % status))
    if load.wrong:
        raise AssertionError(f"{len(load.wrong)} wrong answers, such as {load.wrong[0][:1000]!r}")
    return load


async def _run(port: int, question: Question, connections: int, seconds: float, most: int, status: bytes) -> Load:
    load, left = Load(), most
    streams = [await asyncio.open_connection("127.0.0.1", port, limit=2**24) for _ in range(connections)]
    began = time.perf_counter()

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        while left > 0 and time.perf_counter() - began < seconds:
            left -= 1
            sent = question()
            start = time.perf_counter()
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length)) if length else b""
            load.seconds.append(time.perf_counter() - start)
            if status not in head[:16]:
                load.wrong.append(head + body)
                return

    await asyncio.gather(*(ask(*stream) for stream in streams))
    load.elapsed = time.perf_counter() - began
    for _, writer in streams:
        writer.close()
    return load
