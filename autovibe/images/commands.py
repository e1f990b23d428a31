"""How a build runs programs: their output kept in a log, a failure explained by its tail, an interruption passed on."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from autovibe.errors import OperationFailed

SYSTEM_PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TAIL_LINES = 25


def search_path() -> str:
    """PATH with the places of system programs, which ordinary users' PATH leaves out."""
    return f"{os.environ.get('PATH', '')}:{SYSTEM_PATHS}"


def which(tool: str) -> str | None:
    return shutil.which(tool, path=search_path())


class Log:
    """The log of one build; every program it runs dies with this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("", encoding="utf-8")

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str = "",
        environment: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run to the end; `on_line` is told each line of output. Raises OperationFailed with the last lines.

        An interruption (Ctrl-C) ends the program and its children before it goes on.
        """
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        with (
            self.path.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8", **(environment or {})},
                umask=0o022,  # what they make belongs to the guest, not to this user
                start_new_session=True,
            ) as child,
        ):
            log.write(f"+ {shlex.join(argv)}\n")
            try:
                if child.stdin is not None:
                    child.stdin.write(input)  # a few lines: they fit into the pipe
                    child.stdin.close()
                for line in child.stdout or ():
                    log.write(line)
                    tail.append(line.rstrip())
                    on_line(line)
                status = child.wait()
            except BaseException:
                _end(child)
                raise
        if status != 0:
            text = "\n".join(tail)
            raise OperationFailed(
                f"'{argv[0]}' ended with status {status} while the image was built. "
                f"The last lines of '{self.path}':\n{text}",
                log_detail=text,
            )


def _end(child: subprocess.Popen[str]) -> None:
    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        if child.poll() is None:
            os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)
