"""How an argv becomes the one text that SSH carries, and what comes back. The only place where a command is quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autovibe.errors import InvalidRequest

TIMED_OUT = 124
_MOST_SECONDS = 7 * 86400
_VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_USER = re.compile(r"^[a-z_][a-z0-9_-]{0,31}$")
_MOST_BYTES = 128 * 1024 - 1  # of one argument of execve; the whole line is one argument of the login shell


# The fifth word of stat is the process group: $$ alone is not its leader where something wraps the login shell.
_TELL_GROUP = "read -r _ _ _ _ g _ </proc/$$/stat; echo $g >&2; "

# Without a word from the Hub, also when it is gone, the polite signal comes, and after two seconds the other one.
_GUARD = """
if read -r -t "$2" word && [ "$word" = done ]; then exit; fi
left=$((${2%.*} - SECONDS)); [ "$left" -gt 0 ] && sleep "$left"
kill -TERM -- "-$1" || exit
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.2; kill -0 -- "-$1" 2>/dev/null || exit; done
kill -KILL -- "-$1"
"""


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
) -> str:
    """The command line for the guest's login shell: [sudo -n -u USER] [env [-C CWD] NAME=VALUE …] ARGV…

    Before it becomes the command, the shell tells its process group as the first line of standard error, for the guard.
    Raises InvalidRequest for what no command can be.
    """
    argv = ["bash", "-c", str(command)] if isinstance(command, Script) else [str(part) for part in command]
    if not argv or not argv[0]:
        raise InvalidRequest("There is no command to run.", details={"field": "argv"})
    words: list[str] = []
    if user is not None and user != login:
        if not _USER.match(user):
            raise InvalidRequest(f"'{user[:40]}' cannot be the name of a user.", details={"field": "user"})
        words += ["sudo", "-n", "-u", user]
    if env or cwd is not None:
        words += ["env", *_environment(cwd, env or {})]
        if "=" in argv[0]:  # env would take it for a variable
            argv = ["/bin/sh", "-c", 'exec "$@"', "sh", *argv]
    text = f"{_TELL_GROUP}exec {shlex.join([*words, *argv])}"
    if "\0" in text:
        raise InvalidRequest("A command cannot hold a NUL character.", details={"field": "argv"})
    if len(text.encode("utf-8", "surrogateescape")) > _MOST_BYTES:
        raise InvalidRequest(
            f"The command is longer than {_MOST_BYTES} bytes; push it as a file or send it as input.",
            details={"field": "argv"},
        )
    return text


def guard_line(login: str, group: int, seconds: float) -> str:
    """The guard of a process group: ends it after `seconds`, unless it reads "done" before."""
    sudo = [] if login == "root" else ["sudo", "-n", "-u", "root"]
    return "exec " + shlex.join([*sudo, "bash", "-c", _GUARD, "guard", str(group), f"{seconds:.3f}"])


def checked_timeout(seconds: float) -> float:
    """`seconds` itself. Raises InvalidRequest for what is no time-out."""
    if not 0 < seconds <= _MOST_SECONDS:
        raise InvalidRequest(
            f"A time-out is a number of seconds above 0 and at most {_MOST_SECONDS}.",
            details={"field": "timeout_seconds"},
        )
    return seconds


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
