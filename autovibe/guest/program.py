"""Runs one of `programs/` in the guest: as root, by the guest's own python3, sent over standard input.

The command line is fixed; the program and what it works on travel as data. Programs need nothing but the standard
library of Python 3.9, and leave no file of their own behind.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autovibe.errors import GuestCommandFailed
from autovibe.guest.command import TIMED_OUT, Result
from autovibe.guest.links import Address

if TYPE_CHECKING:
    from autovibe.guest.pool import Guests

# Reads the program, whose length it is told, and leaves the rest of standard input to it.
_BOOT = "import sys;s=sys.stdin.buffer;exec(compile(s.read(int(sys.argv[1])),sys.argv[2],'exec'))"


def argv(name: str) -> list[str]:
    return ["python3", "-I", "-S", "-c", _BOOT, str(len(_source(name))), f"autovibe-{name}"]


def input_of(name: str, order: dict[str, Any], payload: bytes = b"") -> bytes:
    """What goes to standard input: the program, its order as one line of JSON, and the payload."""
    return _source(name) + json.dumps(order).encode("ascii") + b"\n" + payload


def run(
    guests: Guests,
    address: Address,
    name: str,
    order: dict[str, Any],
    *,
    payload: bytes = b"",
    user: str = "root",
    timeout_seconds: float = 60,
    is_holder: bool = False,
) -> dict[str, Any]:
    """What the program answers: one JSON object. Raises GuestCommandFailed with its own words when it fails."""
    result = guests.exec(
        address,
        argv(name),
        user=user,
        input=input_of(name, order, payload),
        timeout_seconds=timeout_seconds,
        output_limit=1 << 20,
        is_holder=is_holder,
    )
    answer = _parse(result.stdout)
    if result.exit_status != 0 or answer is None:
        raise failure(name, address, result)
    return answer


def stream(
    guests: Guests, address: Address, name: str, order: dict[str, Any], *, timeout_seconds: float, is_holder: bool
) -> Iterator[tuple[str, bytes]]:
    return guests.stream(
        address,
        argv(name),
        user="root",
        input=input_of(name, order),
        timeout_seconds=timeout_seconds,
        is_holder=is_holder,
    )


def failure(name: str, address: Address, result: Result) -> GuestCommandFailed:
    """The error a person can act on: what was done, how it ended, and the end of what it said."""
    said = _tail(result.stderr) or _tail(result.stdout)
    how = "its time was over" if result.exit_status == TIMED_OUT else f"exit status {result.exit_status}"
    return GuestCommandFailed(
        f"'{name}' failed in the guest at {address} ({how}): {said or 'it said nothing'}",
        details={"exit_status": result.exit_status, "output": said},
    )


def command_failure(command: Sequence[str], address: Address, result: Result) -> GuestCommandFailed:
    return failure(" ".join(command)[:120], address, result)


@functools.cache
def _source(name: str) -> bytes:
    return (Path(__file__).parent / "programs" / f"{name}.py").read_bytes()


def _parse(output: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):  # the guest may send anything
        return None
    return answer if isinstance(answer, dict) else None


def _tail(output: bytes) -> str:
    """The last lines, printable: a guest's words end in logs and tables."""
    text = output[-2000:].decode("utf-8", "replace").strip()
    clean = "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
    return " / ".join(line.strip() for line in clean.splitlines()[-4:] if line.strip())[-600:]
