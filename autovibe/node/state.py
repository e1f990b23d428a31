"""What the verbs of the node work on, and the little that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autovibe.node.access import Access
from autovibe.node.access.auth import Actor, Auth
from autovibe.node.console import Consoles
from autovibe.node.refusal import Refusal
from autovibe.node.tasks import Tasks, Work
from autovibe.node.vm import drives
from autovibe.node.vm.locks import VmLocks
from autovibe.node.vm.vmconfig import Config, Configs

if TYPE_CHECKING:
    from autovibe.node.disks import Disks
    from autovibe.node.firewall import Firewall
    from autovibe.node.host.sampler import Sampler
    from autovibe.node.vm.monitor import Monitor
    from autovibe.node.vm.qemu import Qemu


@dataclass(frozen=True)
class State:
    """The node: its name, its home, and its parts. `address` is where it listens, for `/cluster/status`."""

    name: str
    home: Path
    address: str
    fingerprint: str
    auth: Auth
    access: Access
    tasks: Tasks
    configs: Configs
    disks: Disks
    qemu: Qemu
    sampler: Sampler
    firewall: Firewall
    locks: VmLocks = field(default_factory=VmLocks)
    consoles: Consoles = field(default_factory=Consoles)

    def monitor(self, vmid: int) -> Monitor | None:
        """The monitor of a running VM, None for a stopped one: what disk operations ask for."""
        return self.qemu.monitor(vmid) if self.qemu.is_running(vmid) else None

    def allows(self, actor: Actor, path: str, *privileges: str, any: bool = False) -> bool:
        """Whether the actor has all of the privileges on a path of the access control tree, or `any` of them."""
        return self.access.allows(actor, path, *privileges, any=any)

    def has_storage(self, storage: str) -> bool:
        return any(status["storage"] == storage for status in self.disks.statuses())

    def require_storage(self, storage: str) -> str:
        """A storage that is enabled on this node."""
        found = next((status for status in self.disks.statuses() if status["storage"] == storage), None)
        if found is None:
            raise Refusal(f"storage '{storage}' does not exist")
        if not found["enabled"]:
            section = self.disks.configuration.require(storage)
            where = "disabled" if section.is_disabled else f"not available on node '{self.name}'"
            raise Refusal(f"storage '{storage}' is {where}")
        return storage

    def free_all(self, vmid: int, values: list[str]) -> None:
        """Free volumes, going on after one that is gone already."""
        present = {volume.volid for status in self.disks.statuses() for volume in self.volumes(status["storage"], vmid)}
        for volid in values:
            if volid in present:
                self.disks.free(volid)

    def volumes(self, storage: str, vmid: int | None) -> list[Any]:
        return self.disks.volumes(storage, vmid=vmid)

    def owned_by(self, vmid: int) -> list[str]:
        """Every volume that carries a VM's number, on every storage."""
        return [
            volume.volid
            for status in self.disks.statuses()
            for volume in self.volumes(status["storage"], vmid)
            if volume.content == "images"
        ]


@dataclass(frozen=True)
class Upload:
    """A file that came with a call, still under a temporary name."""

    filename: str
    path: Path
    size: int


@dataclass(frozen=True)
class Call:
    """One call of the API: who, and with which checked parameters (those of the path among them)."""

    actor: Actor
    parameters: dict[str, Any]
    upload: Upload | None = None

    def __getitem__(self, name: str) -> Any:
        return self.parameters[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.parameters.get(name, default)

    @property
    def vmid(self) -> int:
        return int(self.parameters["vmid"])

    def check_skiplock(self) -> bool:
        """Whether the config's lock is to be ignored: only root@pam itself may."""
        if self.get("skiplock") and not self.actor.is_root:
            raise Refusal(
                "Parameter verification failed.", status=400, errors={"skiplock": "Only root may use this option."}
            )
        return bool(self.get("skiplock"))


@dataclass(frozen=True)
class Page:
    """An answer with a `total` beside its `data`."""

    data: Any
    total: int


def start_vm_task(state: State, call: Call, kind: str, work: Work, **intent: Any) -> str:
    """Start a task about the call's VM."""
    return state.tasks.start(call.actor, kind, call.vmid, work, intent={"vmid": call.vmid, **intent})


def check_digest(config: Config, digest: str | None) -> None:
    if digest is not None and digest != config.digest:
        raise Refusal("checksum mismatch (file change by other user?)")


def is_agent_enabled(config: Config) -> bool:
    text = config.get("agent", "0")
    return text.split(",")[0].removeprefix("enabled=") == "1"


def disks_of(config_values: dict[str, str]) -> list[tuple[str, str]]:
    """Bus and volume of each disk."""
    return [(key, drive["file"]) for key, drive in drives.disks(config_values)]
