"""What steps work with: the parts, as they were built, and plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import UUID

if TYPE_CHECKING:
    from autovibe.guest import Guests
    from autovibe.hypervisor import Proxmox
    from autovibe.store import Store
    from autovibe.store.trees import Trees


def _nothing() -> None:
    return None


@dataclass
class World:
    """One a process, shared by all workflows; only the dictionaries and callables at the end ever change."""

    store: Store
    trees: Trees
    proxmox: Proxmox
    guests: Guests

    storage: str  # of machines' disks
    import_storage: str
    pool: str
    bridge: str
    image: str
    guest_user: str
    cores: int
    memory_mb: int
    ssh_via: Literal["forward", "address"]
    forward_port: int
    runs: Path  # a directory a playbook run
    playbooks: Path
    private_key: Path
    vmid_first: int
    vmid_last: int
    min_free_bytes: int
    boot_deadline: float = 300.0
    provision_deadline: float = 1800.0
    patience: float = 120.0  # how long a step tries again while a part it needs does not answer

    # How a step stops or gives way; Workflows puts the durable engine's functions here. `check` and
    # `yield_turn` end the step by Parked, `is_parking` asks whether `check` would.
    check: Callable[[], None] = _nothing
    is_parking: Callable[[], bool] = lambda: False
    yield_turn: Callable[[], None] = _nothing
    # Tasks of Proxmox this process has begun and not seen end: (operation, what) -> UPID. Lost with the process: steps
    # find the effect of a lost task, or its lock, on the VM.
    tasks: dict[tuple[UUID, str], str] = field(default_factory=dict)
    # When a slow question was last asked: operation -> time.monotonic().
    asked_at: dict[UUID, float] = field(default_factory=dict)

    def provisioned_for(self, type_name: str) -> str:
        """What a checkpoint carries whose machine was provisioned for that type: the type and the playbooks' digest."""
        return f"{type_name}:{digest_of(self.playbooks)}"


@cache
def digest_of(directory: Path) -> str:
    """Sixteen hex digits of the names and contents of all files below; read once a process."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16]
