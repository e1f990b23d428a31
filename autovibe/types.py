"""The vocabulary every level shares: statuses, names, digests, money and the entries of a manifest. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from enum import StrEnum
from typing import Annotated, NamedTuple

from pydantic import StringConstraints

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""Names of projects, machines and labels; `@ ~ / :` stay free for the syntax that addresses checkpoints."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

_NAME = re.compile(NAME_PATTERN)


def is_name(text: str) -> bool:
    """Whether `text` can be the name of a project, machine or label."""
    return _NAME.match(text) is not None and not text.endswith("\n")


class MachineStatus(StrEnum):
    """States of a machine.

    spawning -> active (reachable, idle) <-> working (the prompt runs) -> terminating -> terminated;
    checkpointing, restoring and paused return to where they came from; failed and terminated are final.
    """

    spawning = "spawning"
    active = "active"
    working = "working"
    checkpointing = "checkpointing"
    restoring = "restoring"
    paused = "paused"
    budget_blocked = "budget_blocked"
    terminating = "terminating"
    terminated = "terminated"
    failed = "failed"

    @property
    def is_final(self) -> bool:
        return self in (MachineStatus.terminated, MachineStatus.failed)


class ProjectStatus(StrEnum):
    active = "active"
    archived = "archived"


class CheckpointType(StrEnum):
    genesis = "genesis"
    automatic = "automatic"
    manual = "manual"
    final = "final"


class CheckpointStatus(StrEnum):
    """creating -> ready | failed. Only a ready checkpoint has a root digest and can be spawned from."""

    creating = "creating"
    ready = "ready"
    failed = "failed"


class ArtefactKind(StrEnum):
    """What holds a checkpoint in Proxmox: a snapshot of a VM, or a template VM."""

    snapshot = "snapshot"
    template = "template"


class OperationStatus(StrEnum):
    """accepted (recorded) -> running (a workflow carries it out) -> succeeded | failed."""

    accepted = "accepted"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"

    @property
    def is_final(self) -> bool:
        return self in (OperationStatus.succeeded, OperationStatus.failed)


class OperationKind(StrEnum):
    spawn = "spawn"
    checkpoint = "checkpoint"
    terminate = "terminate"
    block = "block"
    resume = "resume"
    hub_checkpoint = "hub_checkpoint"


class HubCheckpointType(StrEnum):
    daily = "daily"
    manual = "manual"
    pre_experiment = "pre_experiment"
    recovery = "recovery"


class HubCheckpointKind(StrEnum):
    """What a checkpoint of the Hub is: a copy of its data, or that and a snapshot of the VM the Hub runs in."""

    logical = "logical"
    vm = "vm"


class HubCheckpointStatus(StrEnum):
    """creating -> ready | failed. Only a ready one can be restored."""

    creating = "creating"
    ready = "ready"
    failed = "failed"


class ExperimentStatus(StrEnum):
    """planned (recorded) -> running (its Hub answers) -> ended | failed."""

    planned = "planned"
    running = "running"
    ended = "ended"
    failed = "failed"

    @property
    def is_final(self) -> bool:
        return self in (ExperimentStatus.ended, ExperimentStatus.failed)


class Resource(StrEnum):
    """What budgets count, each named with its unit; money is in the hub's currency."""

    money = "money"
    time_hours = "time_hours"
    api_calls = "api_calls"
    cpu_hours = "cpu_hours"
    storage_gb = "storage_gb"


class Role(StrEnum):
    """What a key may do: all; everything but keys and the Hub itself; read; report on its own machine."""

    admin = "admin"
    operator = "operator"
    viewer = "viewer"
    machine = "machine"


class KeyStatus(StrEnum):
    """Only a usable key opens anything; the others stay in the list and say why they do not."""

    usable = "usable"
    expired = "expired"
    revoked = "revoked"


class Outcome(StrEnum):
    """How a request that the audit log names went: carried out; answered an error; not let in."""

    done = "done"
    failed = "failed"
    refused = "refused"


class EntryKind(StrEnum):
    """Kinds of an entry in a manifest, one letter each as stored in the trees."""

    file = "f"
    directory = "d"
    symlink = "l"
    fifo = "p"
    socket = "s"
    character_device = "c"
    block_device = "b"


class Entry(NamedTuple):
    """One path of a guest as a scan reports it.

    `path` is absolute, as the guest's bytes (names need not be UTF-8); `mode` the permission bits (0o7777);
    `size` in bytes (files; 0 otherwise); `digest` the 32-byte SHA-256 of a regular file's content, empty for other
    kinds and for a file that could not be read; `target` the bytes a symlink points to; `mtime_ns` is no part of the
    digest.
    """

    path: bytes
    kind: EntryKind
    mode: int
    uid: int
    gid: int
    size: int
    digest: bytes
    target: bytes
    mtime_ns: int


class Change(NamedTuple):
    """One difference between two manifests: `base` is None for an added path, `target` for a deleted one."""

    path: bytes
    base: Entry | None
    target: Entry | None

    @property
    def what(self) -> list[str]:
        """For a modified path, which of content, mode, owner and type differ; empty otherwise."""
        if self.base is None or self.target is None:
            return []
        old, new = self.base, self.target
        differs = {
            "type": old.kind != new.kind,
            "content": (old.digest, old.target, old.size) != (new.digest, new.target, new.size),
            "mode": old.mode != new.mode,
            "owner": (old.uid, old.gid) != (new.uid, new.gid),
        }
        return [name for name, is_different in differs.items() if is_different]


MICROS = 1_000_000


@dataclass(frozen=True, order=True)
class Money:
    """An amount in integer micro-units of one currency; floats are converted once, at the door."""

    micros: int
    currency: str = "USD"

    @classmethod
    def of(cls, amount: Decimal | int | float | str, currency: str = "USD") -> Money:
        """Raises ValueError for an amount that is negative or no finite number."""
        value = Decimal(str(amount))
        if not value.is_finite() or value < 0:
            raise ValueError(f"An amount of money must be a finite number of at least 0, not '{amount}'.")
        if value.adjusted() > 15:  # also keeps a number like 1e999999999 from being written out
            raise ValueError(f"'{amount}' is more money than can be counted.")
        return cls(int((value * MICROS).to_integral_value(ROUND_HALF_UP)), currency)

    @property
    def amount(self) -> str:
        """Six decimals, as on the wire: "1.260000"."""
        return f"{Decimal(self.micros) / MICROS:.6f}"
