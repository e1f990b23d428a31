"""How an argv becomes the one text that SSH carries, and what comes back. The only place where a command is quoted."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autovibe.errors import InvalidRequest

TIMED_OUT = 124
KILLED = 137
_GRACE_SECONDS = 2  # between the polite signal at the time-out and the one that cannot be ignored
_VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_USER = re.compile(r"^[a-z_][a-z0-9_-]{0,31}$")
_MOST_BYTES = 128 * 1024 - 1  # of one argument of execve; the whole line is one argument of the login shell


class Script(str):
    """A typed bash script. It is handed to bash as one argument and is never joined with anything."""

    __slots__ = ()


@dataclass(frozen=True)
class Result:
    """How a command ended: 0-255 as shells count (128 + signal), 124 at a time-out; output up to the limit."""

    exit_status: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    duration_ms: int


def line(
    command: Sequence[str] | Script,
    *,
    login: str,
    user: str | None,
    cwd: str | None,
    env: Mapping[str, str] | None,
    timeout_seconds: float,
) -> str:
    """The command line for the guest's login shell.

    [sudo -n -u USER] timeout -k 2 SECONDS [env [-C CWD] NAME=VALUE …] ARGV…: `timeout` leads a process group and ends
    it as a whole, inside sudo so that it may. Raises InvalidRequest for what no command can be.
    """
    argv = ["bash", "-c", str(command)] if isinstance(command, Script) else [str(part) for part in command]
    if not argv or not argv[0]:
        raise InvalidRequest("There is no command to run.", details={"field": "argv"})
    if not timeout_seconds > 0 or math.isinf(timeout_seconds):
        raise InvalidRequest("A time-out is a number of seconds above 0.", details={"field": "timeout_seconds"})
    words: list[str] = []
    if user is not None and user != login:
        if not _USER.match(user):
            raise InvalidRequest(f"'{user[:40]}' cannot be the name of a user.", details={"field": "user"})
        words += ["sudo", "-n", "-u", user]
    words += ["timeout", "-k", str(_GRACE_SECONDS), f"{timeout_seconds:.3f}"]
    if env or cwd is not None:
        words += ["env", *_environment(cwd, env or {})]
        if "=" in argv[0]:  # env would take it for a variable
            argv = ["/bin/sh", "-c", 'exec "$@"', "sh", *argv]
    text = "exec " + shlex.join([*words, *argv])
    if "\0" in text:
        raise InvalidRequest("A command cannot hold a NUL character.", details={"field": "argv"})
    if len(text.encode("utf-8", "surrogateescape")) > _MOST_BYTES:
        raise InvalidRequest(
            f"The command is longer than {_MOST_BYTES} bytes; push it as a file or send it as input.",
            details={"field": "argv"},
        )
    return text


def _environment(cwd: str | None, env: Mapping[str, str]) -> list[str]:
    words = []
    if cwd is not None:
        if not cwd.startswith("/"):
            raise InvalidRequest(f"The directory '{cwd[:200]}' is not absolute.", details={"field": "cwd"})
        words += ["-C", cwd]
    for name, value in env.items():
        if not _VARIABLE.match(name):
            raise InvalidRequest(f"'{name[:60]}' cannot be the name of a variable.", details={"field": "env"})
        words.append(f"{name}={value}")
    return words
