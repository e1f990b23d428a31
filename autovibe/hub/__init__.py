"""What can be done: authorise, decide, record - one transaction a verb.

A verb is a function of the hub, the actor and the order; it answers a wire shape. It never changes infrastructure
itself: it records what was decided and hands the operation to the workflows, after the commit. Inside this package
calls go down only: upkeep > metering > laboratory > experiments > backups | instance > plans > machines | checkpoints
| usage > projects > spawning > storage_limits > blocking > operations | output | files | diffs | pages | health >
keys | audit > rules | access | limits | trail | gauges | events > feed > history > arrivals.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from uuid import UUID

from autovibe.domain import Machine
from autovibe.domain.budget import Prices
from autovibe.domain.columns import now
from autovibe.domain.estimate import Base
from autovibe.errors import Conflict, InsufficientSpace
from autovibe.guest import Address, Guests
from autovibe.hub.access import Keys
from autovibe.hub.events import Events
from autovibe.hub.launch import Launch
from autovibe.hub.limits import Limits
from autovibe.hub.traffic import Tally
from autovibe.hub.trail import Trail
from autovibe.hypervisor import Proxmox
from autovibe.store import Store
from autovibe.store.keys import Keyring
from autovibe.store.ledger import Ledger
from autovibe.store.trees import Trees
from autovibe.workflows import Workflows
from autovibe.workflows.world import Premises


@dataclass
class Hub:
    """The parts every verb works with. `conversations` is the bounded pool of threads that exec holds while it runs."""

    store: Store
    trees: Trees
    events: Events
    keys: Keys
    keyring: Keyring
    limits: Limits
    trail: Trail
    audit_days: int
    workflows: Workflows
    proxmox: Proxmox
    guests: Guests
    conversations: Executor
    name: str  # of this hub process, in claims; the executor id, known once the durable engine runs
    home: Path
    node: str
    storage: str
    image: str
    guest_user: str
    vmids: range
    min_free_bytes: int
    ledger: Ledger
    prices: Prices
    tail_seconds: float  # of machine time that every machine's reservation keeps back for its own end
    uuid: UUID  # of the Hub, which is its database
    premises: Premises  # what a checkpoint of the Hub copies of this process's home
    is_checkpointed_daily: bool
    hub_checkpoints_kept: int  # daily ones
    launch: Launch  # of a second Hub
    tally: Tally = field(default_factory=Tally)
    bases: dict[str, tuple[float, Base]] = field(default_factory=dict)  # of estimates, by machine type; when found
    started_at: datetime = field(default_factory=now)  # of this process

    def require_space(self) -> None:
        """Raises InsufficientSpace when the hub's own disk is nearly full, before anything is started."""
        free = shutil.disk_usage(self.home).free
        if free < self.min_free_bytes:
            raise InsufficientSpace(
                f"Only {free / 1e9:.1f} GB are free on the disk of '{self.home}'; {self.min_free_bytes / 1e9:.1f} GB "
                "must stay free; nothing was started. Free some space, or lower the setting 'min_free_gb'.",
                details={"path": str(self.home), "free_bytes": free, "required_bytes": self.min_free_bytes},
            )

    def address_of(self, machine: Machine) -> Address:
        """Where the machine's guest is reached, with its pinned host key. Raises Conflict while that is unknown."""
        if machine.address is None or machine.port is None or machine.host_key is None:
            raise Conflict(f"Machine '{machine.name}' has no address yet; wait until it is active.")
        return Address(machine.address, machine.port, self.guest_user, machine.host_key)
