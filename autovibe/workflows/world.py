"""What steps work with: the parts, as they were built, and plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

if TYPE_CHECKING:
    from autovibe.domain.budget import Prices
    from autovibe.guest import Guests
    from autovibe.guest.brake import Brake
    from autovibe.hypervisor import Proxmox
    from autovibe.store import Store
    from autovibe.store.keys import Keyring
    from autovibe.store.ledger import Ledger
    from autovibe.store.trees import Trees


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Premises:
    """The home of this hub process, as far as a checkpoint of the Hub copies it.

    `journal` is None where the workflows' journal lies in the database; `settings` are those that apply, secrets
    masked; `vmid` is the VM of the Proxmox that the Hub itself runs in, if it does.
    """

    home: Path
    journal: Path | None
    settings: Mapping[str, Any]
    vmid: int | None
    min_free_bytes: int

    @property
    def checkpoints(self) -> Path:
        return self.home / "hub" / "checkpoints"

    def place(self, uuid: UUID) -> Path:
        """Where a checkpoint of the Hub lies."""
        return self.checkpoints / str(uuid)


@dataclass
class World:
    """One a process, shared by all workflows; only the dictionaries and callables at the end ever change."""

    store: Store
    trees: Trees
    proxmox: Proxmox
    guests: Guests
    keyring: Keyring

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
    ledger: Ledger
    prices: Prices
    tail_seconds: float
    url_for_guests: str = ""  # of the Hub, as machines reach it
    boot_deadline: float = 300.0
    provision_deadline: float = 1800.0
    premises: Premises | None = None
    patience: float = 120.0  # how long a step tries again while a part it needs does not answer

    # How a step stops or gives way; Workflows puts the durable engine's functions here. `check` and
    # `yield_turn` end the step by Parked, `is_parking` asks whether `check` would.
    check: Callable[[], None] = _nothing
    is_parking: Callable[[], bool] = lambda: False
    executor: Callable[[], str] = lambda: ""  # the name of this hub process
    yield_turn: Callable[[], None] = _nothing
    # Tasks of Proxmox this process has begun and not seen end: (operation, what) -> UPID. Lost with the process: steps
    # find the effect of a lost task, or its lock, on the VM.
    tasks: dict[tuple[UUID, str], str] = field(default_factory=dict)
    # Of machines near a limit, held by this process: their guests wait for one word to freeze.
    brakes: dict[UUID, Brake] = field(default_factory=dict)
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
