"""The node's own log as a journal: its lines in order, with time, priority, and the part of the node that wrote them.

Read are the file in use and the one before it (20 MiB at most); lines of a traceback belong to the line above them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) ([\w.]+) (.*)", re.ASCII)
_PRIORITIES = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}
_DEFAULT_PRIORITY = 6
_LINE_BYTES = 8 << 10

PARTS = {
    "pveproxy": ("autovibe.node.http.server", "autovibe.node.http.api", "autovibe.node.http.websocket"),
    "pvestatd": ("autovibe.node.host.sampler", "autovibe.node.host.rrd"),
    "pvedaemon": ("",),
}
"""What does the work of Proxmox's daemons here, by the loggers' names; the last does all the rest."""


class Line(NamedTuple):
    """`moment` is local time as text (`2026-11-21 14:04:57`), `place` its file's number and the byte it ends at."""

    moment: str
    priority: int
    part: str
    text: str
    place: tuple[int, int]


def read(path: Path) -> Iterator[Line]:
    """Oldest first."""
    moment, priority, part = "", _DEFAULT_PRIORITY, "pvedaemon"
    for file in (path.with_name(f"{path.name}.1"), path):
        if not file.exists():
            continue
        with file.open("rb") as lines:
            number, end = file.stat().st_ino, 0
            while raw := lines.readline(_LINE_BYTES):
                end += len(raw)
                text = raw.decode("utf-8", "replace").rstrip("\n")
                if match := _LINE.fullmatch(text):
                    moment, priority = match[1], _PRIORITIES.get(match[2], _DEFAULT_PRIORITY)
                    part, text = _part(match[3]), match[4]
                yield Line(moment, priority, part, text, (number, end))


def _part(logger: str) -> str:
    return next(part for part, names in PARTS.items() if logger.startswith(names))


def as_syslog(line: Line, node: str, pid: int) -> str:
    """`Nov 21 14:04:57 pve pvedaemon[1234]: text`."""
    try:
        stamp = datetime.strptime(line.moment, "%Y-%m-%d %H:%M:%S").strftime("%b %d %H:%M:%S")
    except ValueError:
        stamp = line.moment
    return f"{stamp} {node} {line.part}[{pid}]: {line.text}"


def moment_of(seconds: int) -> str:
    """Seconds since the epoch as the log writes them; far beyond all time is the end of it."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")  # the log has local time
    except (ValueError, OverflowError, OSError):
        return "9999"
