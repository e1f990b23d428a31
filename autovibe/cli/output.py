"""What the words print: one JSON document or rich text on stdout, everything else on stderr.

Text from a guest never reaches a terminal as it is: a machine's output could rewrite the screen or the title, or answer
back into the shell. Tables show control characters escaped; streams keep colours alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autovibe.cli.exits import EXIT_STATUS as EXIT_STATUS
from autovibe.cli.exits import exit_status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from autovibe.errors import AutovibeError

WIDE = 4000

_state = {"is_json": False}


def reset() -> None:
    _state["is_json"] = False


def _set_json(is_wanted: bool) -> bool:
    _state["is_json"] = _state["is_json"] or is_wanted
    return is_wanted


Json = Annotated[
    bool, typer.Option("--json", callback=_set_json, help="Print one JSON document on stdout and nothing else.")
]


def is_json() -> bool:
    return _state["is_json"]


def out() -> Console:
    return _console(is_stderr=False)


def err() -> Console:
    return _console(is_stderr=True)


def _console(*, is_stderr: bool) -> Console:
    """Into a file or pipe lines are as long as they are: nothing is wrapped for a width nobody has."""
    from rich.console import Console

    is_terminal = (sys.stderr if is_stderr else sys.stdout).isatty()
    return Console(stderr=is_stderr, highlight=False, width=None if is_terminal else WIDE)


def say(text: str, style: str = "") -> None:
    """A line for the person, on stderr; silent with --json."""
    if not is_json():
        err().print(text, style=style or None, markup=False)


def warn(text: str) -> None:
    err().print(text, style="yellow", markup=False)


def print_json(value: Any) -> None:
    """`value`: a wire shape, or plain values with wire shapes in them."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def failed(error: AutovibeError) -> int:
    """Say what went wrong and return the exit status. With --json the envelope goes to stdout as well."""
    if is_json():
        print_json({"success": False, "error": error.to_dict()})
    console = err()
    console.print("Error: ", style="bold red", end="")
    console.print(escape(error.message, keep="\n"), markup=False)
    if error.code == "UNAUTHORIZED":
        say("The key is that of AUTOVIBE_API_KEY, else of 'credentials' in the home of this computer's Hub.")
    if request_id := error.details.get("request_id"):
        console.print(f"(request {request_id})", style="dim", markup=False)
    return exit_status(error)


# Text of guests and of other people

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_COLOUR = re.compile(r"\x1b\[[0-9;:]{0,64}m")


def escape(text: str, keep: str = "") -> str:
    """Control characters, and those that turn the direction of text, as visible escapes."""

    def visible(match: re.Match[str]) -> str:
        character = match.group()
        return character if character in keep else character.encode("unicode_escape").decode()

    return _CONTROL.sub(visible, text)


def stream(text: str, *, is_terminal: bool) -> str:
    """Output of a guest for stdout or stderr: as it is into a file or pipe; on a terminal with colours alone kept."""
    if not is_terminal:
        return text
    parts: list[str] = []
    position = 0
    for colour in _COLOUR.finditer(text):
        parts += [escape(text[position : colour.start()], keep="\n\t\r"), colour.group()]
        position = colour.end()
    return "".join(parts) + escape(text[position:], keep="\n\t\r") + ("\x1b[0m" if parts else "")


# Tables

STATUS_STYLES = {
    "active": "green",
    "working": "cyan",
    "ready": "green",
    "healthy": "green",
    "succeeded": "green",
    "spawning": "yellow",
    "creating": "yellow",
    "checkpointing": "yellow",
    "restoring": "yellow",
    "terminating": "yellow",
    "degraded": "yellow",
    "paused": "magenta",
    "budget_blocked": "magenta",
    "terminated": "dim",
    "failed": "bold red",
    "unhealthy": "bold red",
    "unreachable": "bold red",
    "stopped": "dim",
}


def cell(value: Any) -> Text:
    """One cell: escaped, on one line, statuses in their colour."""
    from rich.text import Text

    if isinstance(value, Text):
        return value
    text = "-" if value is None or value == "" else escape(str(value))
    return Text(text, style=STATUS_STYLES.get(text, ""))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    empty: str,
    title: str | None = None,
    right: Collection[str] = (),
) -> None:
    """A table on stdout, or `empty` where there are no rows. Columns named in `right` stand at their right edge."""
    from rich import box
    from rich.table import Column, Table

    headed = [Column(name, justify="right" if name in right else "left") for name in columns]
    made = Table(*headed, box=box.SIMPLE_HEAD, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    if made.row_count:
        out().print(made)
    else:
        say(empty)


def facts(values: Mapping[str, Any], *, title: str | None = None) -> None:
    """One object: a line a fact; facts that are None are left out. Multi-line text stands indented."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value is None or value == "":
            continue
        is_text = isinstance(value, str) and "\n" in value
        made.add_row(Text(name, style="bold"), Text(escape(value, keep="\n\t")) if is_text else cell(value))
    if title:
        out().print(Text(escape(title), style="bold underline"))
    out().print(made)


def short(uuid: Any) -> str | None:
    """The first eight digits of a uuid, which every word accepts."""
    return None if uuid is None else str(uuid)[:8]


def when(moment: datetime | None) -> str | None:
    """'2026-11-20 13:10:36 UTC (3 min 05 s ago)'."""
    return None if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC ({ago(moment)})"


def ago(moment: datetime | None) -> str | None:
    return None if moment is None else f"{duration((datetime.now(UTC) - moment).total_seconds())} ago"


def duration(seconds: float) -> str:
    """'4.2 s', '3 min 05 s', '2 h 10 min', '4 d 2 h'."""
    seconds = max(0.0, seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: int | float) -> str:
    """Bytes in decimal units, as the wire's size_mb: '512 B', '4.1 KB', '530.0 MB'."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
