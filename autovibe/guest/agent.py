"""The prompt's command as a unit of its own in the guest: it outlives SSH, the Hub, and a lost connection.

States, told by files in the guest (see programs/agent.py): none -> started -> ended (a status file) | lost (the unit
is gone and left no status: the VM was reset). Output goes to a file that is read from any offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from autovibe.errors import GuestCommandFailed
from autovibe.guest import program
from autovibe.guest.command import Result
from autovibe.guest.links import Address

if TYPE_CHECKING:
    from autovibe.guest.pool import Guests

UNIT = "autovibe-agent"
SLICE = "autovibe.slice"
FREEZER = f"/sys/fs/cgroup/{SLICE}/cgroup.freeze"
LOG = "/var/log/autovibe/agent.log"
STATE = "/var/lib/autovibe/agent"
_HEADER_BYTES = 200

# $1 state directory, $2 log, $3 offset, $4 limit, $5 unit. Told before the output is read, so that nothing is missed:
# one line "<state> <exit status> <size of the log>". Few processes: each costs 20 ms under emulation.
_POLL = """
state=lost code=-
if [ ! -e "$1/machine" ]; then state=none
elif [ -s "$1/run/status" ]; then state=ended; read -r code < "$1/run/status"
elif [ -s "$1/run/process" ]; then
  read -r pid boot < "$1/run/process"; read -r now < /proc/sys/kernel/random/boot_id
  [ "$boot" = "$now" ] && [ -d "/proc/$pid" ] && state=running
fi
if [ $state = lost ]; then
  case "$(systemctl is-active "$5" 2>/dev/null)" in active|activating|deactivating|reloading) state=running;; esac
  if [ -s "$1/run/status" ]; then state=ended; read -r code < "$1/run/status"; fi
fi
size=0
[ -f "$2" ] && size=$(stat -c %s -- "$2")
printf '%s %.8s %s\\n' "$state" "$code" "$size"
[ "$size" -gt "$3" ] && [ "$4" -gt 0 ] && tail -c "+$(($3 + 1))" -- "$2" | head -c "$4"
exit 0
"""


@dataclass(frozen=True)
class AgentState:
    """`output` starts at the offset that was asked for; `output_size` is the whole log's size in bytes.

    `exit_status` is None while the command runs, and when it was lost together with the guest it ran in.
    """

    is_running: bool
    exit_status: int | None
    output: bytes
    output_size: int
    was_started: bool = True


def start(
    guests: Guests,
    address: Address,
    *,
    machine_uuid: UUID | str,
    command: Sequence[str],
    prompt: str,
    env: Mapping[str, str],
    user: str | None = None,
    cwd: str = "/workspace",
) -> None:
    """Start the command once a machine; `$AUTOVIBE_PROMPT` names the file that holds the prompt.

    A second call for the same machine finds the first one and does nothing.
    """
    order = {
        "machine": str(machine_uuid),
        "command": list(command),
        "prompt": prompt,
        "env": dict(env),
        "user": user or address.user,
        "cwd": cwd,
        "unit": UNIT,
        "slice": SLICE,
        "log": LOG,
        "state": STATE,
    }
    program.run(guests, address, "agent", order, timeout_seconds=120)


def poll(guests: Guests, address: Address, offset: int = 0, limit: int = 256 << 10) -> AgentState:
    """How the command is doing and up to `limit` bytes of its output from `offset` on, in one round trip."""
    argv = ["sh", "-c", _POLL, "sh", STATE, LOG, str(offset), str(limit), UNIT]
    result = guests.exec(address, argv, timeout_seconds=60, output_limit=limit + _HEADER_BYTES)
    return _state(address, result, limit)


def stop(guests: Guests, address: Address) -> None:
    """End the command and everything it started; one that has ended is left alone."""
    argv = ["systemctl", "stop", UNIT]
    result = guests.exec(address, argv, user="root", timeout_seconds=120)
    if result.exit_status not in (0, 5):  # 5: there is no such unit
        raise program.command_failure(argv, address, result)


def freeze(guests: Guests, address: Address, *, timeout_seconds: float) -> None:
    """Have the command and what it started stand still, in one short round trip; `scan.release` lets it go on.

    Where there is no such slice nothing is done.
    """
    argv = ["sh", "-c", '[ ! -e "$1" ] || echo 1 > "$1"', "sh", FREEZER]
    result = guests.exec(address, argv, user="root", timeout_seconds=timeout_seconds, is_holder=True)
    if result.exit_status != 0:
        raise program.command_failure(["freeze the agent"], address, result)


def _state(address: Address, result: Result, limit: int) -> AgentState:
    if result.exit_status != 0:
        raise program.command_failure(["poll the agent"], address, result)
    header, _, output = result.stdout.partition(b"\n")
    words = header[:_HEADER_BYTES].decode("ascii", "replace").split(" ")
    if len(words) != 3 or not words[2].isdigit():
        raise GuestCommandFailed(f"The guest at {address} tells nonsense about its agent.")
    state, code, size = words[0], words[1], int(words[2][:18])
    is_number = code.isdigit() and int(code) < 256
    return AgentState(
        is_running=state == "running",
        exit_status=int(code) if state == "ended" and is_number else None,
        output=output[:limit],
        output_size=size,
        was_started=state != "none",
    )
