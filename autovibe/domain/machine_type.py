"""The registry of machine types: what a machine is made of and how its prompt is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autovibe.errors import InvalidRequest


@dataclass(frozen=True)
class MachineType:
    """`cores` and `memory_mb` are None where the hub's defaults hold; `playbook` is a file of playbooks/.

    `command` is the argv run in /workspace as the guest's user, in its own systemd unit; the prompt lies in the file
    `$AUTOVIBE_PROMPT` names, so that a prompt never meets a command line. `parse_progress` makes one line of progress
    of the output's tail, "" where there is none. `price_class` is one of `Prices.factors`; `base_money` is what a
    prompt costs beside its VM, for estimates while there is no history.
    """

    name: str
    playbook: str
    command: tuple[str, ...]
    image: str = "debian-12"
    cores: int | None = None
    memory_mb: int | None = None
    disk_gb: int | None = None
    price_class: str = "standard"
    base_money: float = 0.0
    parse_progress: Callable[[str], str] = lambda tail: last_line(tail)


def last_line(tail: str) -> str:
    """The last line of `tail` that is not blank, 200 characters at most."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


SHELL = MachineType(
    name="shell", playbook="shell.yml", command=("/bin/sh", "-c", 'exec /bin/bash -- "$AUTOVIBE_PROMPT"')
)

TYPES: dict[str, MachineType] = {SHELL.name: SHELL}


def machine_type(name: str) -> MachineType:
    """The type of that name, `-` and `_` alike. Raises InvalidRequest naming the types there are."""
    found = TYPES.get(name.replace("-", "_"))
    if found is None:
        raise InvalidRequest(
            f"There is no machine type '{name[:63]}'; the types are: {', '.join(sorted(TYPES))}.",
            details={"field": "type", "types": sorted(TYPES)},
        )
    return found


def price_class_of(name: str) -> str:
    """The price class of a machine's type, also of one that is no longer registered."""
    found = TYPES.get(name)
    return found.price_class if found is not None else "standard"
