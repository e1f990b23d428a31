"""The node's log, as lines with numbers (syslog) and as a journal with cursors."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice

from autovibe.node.host import node_log
from autovibe.node.host.node_log import Line
from autovibe.node.refusal import not_implemented
from autovibe.node.state import Call, Page, State

_MOST_LINES = 20_000
_CURSOR = re.compile(r"s=([0-9a-f]{1,16});i=([0-9a-f]{1,16})")


def syslog(state: State, call: Call) -> Page:
    """Lines `{n, t}` from `start`, 50 unless told; `since` and `until` are dates with or without a time."""
    since, until = call.get("since", ""), call.get("until", "")
    start, limit = call.get("start", 0), call.get("limit", 50)
    total = 0
    found = []
    for line in _of_service(state, call.get("service")):
        if line.moment >= since and (not until or line.moment[: len(until)] <= until):
            total += 1
            if start < total <= start + min(limit or _MOST_LINES, _MOST_LINES):
                found.append({"n": total, "t": _text(state, line)})
    return Page(found, total) if total else Page([{"n": 1, "t": "no content"}], 1)


def journal(state: State, call: Call) -> list[str]:
    """Lines between two cursors, which stand first and last and name places of the log."""
    for option in ("structured", "identifiers", "units"):
        if call.get(option):
            raise not_implemented(f"a journal with '{option}' is not implemented")
    lines = iter(()) if call.get("kernel") else _selected(state, call)
    if (last := call.get("lastentries")) is not None:
        found = list(deque(lines, maxlen=min(last, _MOST_LINES)))
    else:
        found = list(islice(lines, _MOST_LINES))
    first_cursor = _cursor(found[0]) if found else call.get("startcursor", "")
    last_cursor = _cursor(found[-1]) if found else call.get("endcursor") or call.get("startcursor", "")
    return [first_cursor, *(_text(state, line) for line in found), last_cursor]


def _selected(state: State, call: Call) -> Iterator[Line]:
    low, high = _priorities(call.get("priority") or "0..7")
    since, until = call.get("since"), call.get("until")
    from_moment = "" if since is None else node_log.moment_of(since)
    to_moment = "9999" if until is None else node_log.moment_of(until)
    after, before = _place(call.get("startcursor")), _place(call.get("endcursor"))
    lines = list(_of_service(state, call.get("service") or call.get("unit")))
    begin = next((number for number, line in enumerate(lines, 1) if line.place == after), 0)
    end = next((number for number, line in enumerate(lines, 1) if line.place == before), len(lines))
    for line in lines[begin:end]:
        if from_moment <= line.moment <= to_moment and low <= line.priority <= high:
            yield line


def _priorities(text: str) -> tuple[int, int]:
    """`3` is 3 and what is graver, `3..4` a range."""
    low, dots, high = text.partition("..")
    return (int(low), int(high)) if dots else (0, int(low))


def _of_service(state: State, service: str | None) -> Iterator[Line]:
    part = (service or "").removesuffix(".service")
    return (line for line in node_log.read(state.home / "node.log") if part in ("", line.part))


def _text(state: State, line: Line) -> str:
    return node_log.as_syslog(line, state.name, os.getpid())


def _cursor(line: Line) -> str:
    number, end = line.place
    return f"s={number:x};i={end:x}"


def _place(cursor: str | None) -> tuple[int, int] | None:
    """The place a cursor names; None for one that is none of ours, which then cuts nothing off."""
    match = _CURSOR.fullmatch(cursor or "")
    return (int(match[1], 16), int(match[2], 16)) if match else None
