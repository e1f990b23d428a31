"""Facts about a Proxmox node, and the one waiter for its tasks. Nothing here changes anything.

`GET /nodes/N/qemu` is the truth; `/cluster/resources` lags up to ten seconds behind and serves only to see ids that
other nodes use.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import UUID

from autovibe.errors import ConfigurationError, HypervisorRefused, HypervisorTaskFailed, HypervisorUnavailable, NotYet
from autovibe.hypervisor import Proxmox, is_lock, says

IMAGE_TAG = "autovibe-image"
_OWNER = re.compile(r"^autovibe (?P<uuid>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$")
_LOG_LINES = 12
_GB = 1 << 30
_GOOD_ENDING = re.compile(r"^(OK|WARNINGS: \d+)$")


class NodeStatus(NamedTuple):
    """Sizes in bytes, `uptime` in seconds, `cpu` from 0 to 1; `memory_free` is what the node says is available."""

    name: str
    version: str
    kernel: str
    cores: int
    memory_total: int
    memory_free: int
    disk_total: int
    disk_free: int
    uptime: int
    cpu: float


class VM(NamedTuple):
    """`status` is running or stopped; `lock` is "" while nothing holds the VM; `disk_gb` as in `VMUsage`."""

    vmid: int
    name: str
    status: str
    is_template: bool
    tags: tuple[str, ...]
    lock: str
    disk_gb: float = 0.0

    @property
    def is_running(self) -> bool:
        return self.status == "running"


class VMUsage(NamedTuple):
    """A running VM: its size (GB of 2**30 bytes, as Proxmox counts them), and how many of its cores are busy."""

    vmid: int
    cpu: float
    cores: int
    memory_gb: float
    disk_gb: float


class Snapshot(NamedTuple):
    """`created` in seconds since 1970; `parent` is "" for the first of a line."""

    name: str
    parent: str
    created: int


class StorageStatus(NamedTuple):
    """Sizes in bytes."""

    name: str
    type: str
    total: int
    used: int
    avail: int
    content: tuple[str, ...]
    active: bool


def version(px: Proxmox) -> str:
    return str(px.get("version")["version"])


def node_status(px: Proxmox) -> NodeStatus:
    found = px.get(f"nodes/{px.node}/status")
    memory, disk, cpu = found.get("memory", {}), found.get("rootfs", {}), found.get("cpuinfo", {})
    return NodeStatus(
        name=px.node,
        version=str(found.get("pveversion", "")),
        kernel=str(found.get("kversion", "")),
        cores=int(cpu.get("cpus", 0)),
        memory_total=int(memory.get("total", 0)),
        memory_free=int(memory.get("available", memory.get("free", 0))),
        disk_total=int(disk.get("total", 0)),
        disk_free=int(disk.get("avail", disk.get("free", 0))),
        uptime=int(found.get("uptime", 0)),
        cpu=float(found.get("cpu", 0.0)),
    )


def vms(px: Proxmox) -> list[VM]:
    """Every VM of the node, templates too, by vmid."""
    return sorted(_vm(found) for found in px.get(f"nodes/{px.node}/qemu"))


def find_vm(px: Proxmox, vmid: int) -> VM | None:
    return next((vm for vm in vms(px) if vm.vmid == vmid), None)


def usage(px: Proxmox) -> list[VMUsage]:
    """Every running VM of the node, in one call."""
    return [
        VMUsage(
            vmid=int(found["vmid"]),
            cpu=float(found.get("cpu") or 0.0) * int(found.get("cpus") or 1),
            cores=int(found.get("cpus") or 1),
            memory_gb=int(found.get("maxmem") or 0) / _GB,
            disk_gb=int(found.get("maxdisk") or 0) / _GB,
        )
        for found in px.get(f"nodes/{px.node}/qemu")
        if found.get("status") == "running"
    ]


def config(px: Proxmox, vmid: int) -> dict[str, Any]:
    """The VM's configuration with its pending changes. Raises HypervisorRefused for a VM that does not exist."""
    return dict(px.get(f"nodes/{px.node}/qemu/{vmid}/config"))


def owner(px: Proxmox, vmid: int) -> UUID | None:
    """Whose the VM is by the first line of its description, None for a VM that is not autovibe's or does not exist."""
    try:
        return owner_of(config(px, vmid))
    except HypervisorRefused as error:
        if says(error, "does not exist"):
            return None
        raise


def owner_of(configuration: dict[str, Any]) -> UUID | None:
    lines = str(configuration.get("description", "")).splitlines()
    match = _OWNER.match(lines[0].strip()) if lines else None
    return UUID(match["uuid"]) if match else None


def owner_line(owner: UUID) -> str:
    """The first line of the description of a VM that is ours."""
    return f"autovibe {owner}"


def snapshots(px: Proxmox, vmid: int) -> list[Snapshot]:
    """The VM's snapshots, oldest first; Proxmox's synthetic "current" is left out."""
    found = [
        Snapshot(str(item["name"]), str(item.get("parent", "")), int(item.get("snaptime", 0)))
        for item in px.get(f"nodes/{px.node}/qemu/{vmid}/snapshot")
        if item["name"] != "current"
    ]
    return sorted(found, key=lambda snapshot: (snapshot.created, snapshot.name))


def taken_vmids(px: Proxmox) -> set[int]:
    """Ids of VMs and containers on every node of the cluster, as far as Proxmox knows at this moment."""
    elsewhere = {int(found["vmid"]) for found in px.get("cluster/resources", type="vm") if "vmid" in found}
    return elsewhere | {vm.vmid for vm in vms(px)}


def has_feature(px: Proxmox, vmid: int, feature: str, snapshot: str | None = None) -> bool:
    """Whether the VM's storages can do `feature` (snapshot, clone = linked clone, copy = full clone)."""
    return bool(px.get(f"nodes/{px.node}/qemu/{vmid}/feature", feature=feature, snapname=snapshot)["hasFeature"])


def storage(px: Proxmox, name: str) -> StorageStatus:
    found = px.get(f"nodes/{px.node}/storage/{name}/status")
    return StorageStatus(
        name=name,
        type=str(found.get("type", "")),
        total=int(found.get("total", 0)),
        used=int(found.get("used", 0)),
        avail=int(found.get("avail", 0)),
        content=tuple(part for part in str(found.get("content", "")).split(",") if part),
        active=bool(found.get("active", 0)),
    )


def find_image(px: Proxmox, image: str) -> VM | None:
    """The newest finished template of the guest image `image`, None when there is none yet."""
    prefix = f"av-image-{image}-"
    found = [
        vm for vm in vms(px) if vm.is_template and not vm.lock and IMAGE_TAG in vm.tags and vm.name.startswith(prefix)
    ]
    if len(found) < 2:
        return found[0] if found else None
    return max(found, key=lambda vm: (_creation_time(config(px, vm.vmid)), vm.vmid))


def permissions(px: Proxmox) -> dict[str, Any]:
    """What the token may do: path -> privilege -> 1 where it propagates."""
    return dict(px.get("access/permissions"))


def running_tasks(px: Proxmox, vmid: int, kind: str) -> list[str]:
    """UPIDs of tasks of that kind (qmsnapshot, qmstart, …) that run on the VM now."""
    found = px.get(f"nodes/{px.node}/tasks", source="active", vmid=vmid, typefilter=kind)
    return [
        str(task["upid"])
        for task in found
        if task.get("type") == kind
        and str(task.get("id")) == str(vmid)
        and not task.get("endtime")
        and str(task.get("status") or "RUNNING").upper() == "RUNNING"
    ]


def await_task(
    px: Proxmox,
    upid: str,
    *,
    slice_seconds: float = 5.0,
    interval: float = 0.25,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Return when the task ended well (with warnings too).

    Raises NotYet when it still runs after `slice_seconds`, when `stop()` says so, and while the API does not answer:
    the task goes on without us. Raises HypervisorTaskFailed with Proxmox's text and the tail of the log when it ended
    badly; `details["is_lock"]` is true where only a lock was in the way, so that asking for the same again may help.
    """
    end = time.monotonic() + slice_seconds
    parts = upid.split(":")
    task = f"task {parts[5]} of VM {parts[6]}" if len(parts) == 9 and parts[6] else f"task '{upid}'"
    while True:
        try:
            found = px.get(f"nodes/{px.node}/tasks/{upid}/status")
            unknown: HypervisorRefused | None = None
        except HypervisorUnavailable as error:
            raise NotYet(f"{task} is running, and the Proxmox API does not answer") from error
        except HypervisorRefused as error:
            if not says(error, "no such task"):
                raise
            found, unknown = {}, error  # for a moment after the call, or for good after a log was lost
        if found.get("status") == "stopped":
            return _judge(px, upid, task, str(found.get("exitstatus", "")))
        if stop is not None and stop():
            raise NotYet(f"{task} is running")
        if time.monotonic() + interval > end:
            if unknown is not None:
                raise HypervisorTaskFailed(f"Proxmox knows no {task} any more.", details={"upid": upid}) from unknown
            raise NotYet(f"{task} is running")
        time.sleep(interval)


def guest_address(px: Proxmox, vmid: int, *, via: str, forward_host_port: int) -> tuple[str, int]:
    """Host and port of the guest's SSH.

    `via` "forward": the embedded node's forward, a function of the vmid and the node's forward port. "address": the
    guest's first global address, those of its first network card before others; raises NotYet while it is unknown.
    """
    if via == "forward":
        return f"127.{1 + vmid // 65536 % 254}.{vmid // 256 % 256}.{vmid % 256}", forward_host_port
    try:
        cards = _records(px.get(f"nodes/{px.node}/qemu/{vmid}/agent/network-get-interfaces").get("result"))
    except HypervisorRefused as error:
        if says(error, "agent is not running", "is not running", "got timeout"):
            raise NotYet(f"VM {vmid} does not tell its address yet") from error
        raise
    first = str(config(px, vmid).get("net0", "")).lower()
    best = sorted(cards, key=lambda card: str(card.get("hardware-address", "-")).lower() not in first)
    for family in (4, 6):
        for card in best:
            for item in _records(card.get("ip-addresses")):
                if (address := _global_address(str(item.get("ip-address", "")))) and address.version == family:
                    return str(address), 22
    raise NotYet(f"VM {vmid} has no address yet")


def _records(told: Any) -> list[dict[str, Any]]:
    """The objects of a list that a guest's agent told, which may be anything."""
    return [item for item in told if isinstance(item, dict)] if isinstance(told, list) else []


def _judge(px: Proxmox, upid: str, task: str, ending: str) -> None:
    if _GOOD_ENDING.match(ending):
        return
    try:
        log = [str(line.get("t", "")) for line in px.get(f"nodes/{px.node}/tasks/{upid}/log", limit=5000)]
    except (HypervisorUnavailable, HypervisorRefused) as error:
        log = [f"(The log cannot be read: {error.message})"]
    tail = [line for line in log if not line.startswith("TASK ")][-_LOG_LINES:]
    failed = HypervisorTaskFailed(
        f"Proxmox {task} failed: {ending.strip() or 'it does not say how'}.",
        details={"upid": upid, "exit_status": ending, "reason": ending, "log": tail},
        log_detail="\n".join(tail),
    )
    failed.details["is_lock"] = is_lock(HypervisorRefused("", details={"reason": ending})) and "lock" in ending
    raise failed


def _vm(found: dict[str, Any]) -> VM:
    vmid = int(found["vmid"])
    return VM(
        vmid=vmid,
        name=str(found.get("name") or f"VM {vmid}"),
        status=str(found.get("status", "")),
        is_template=bool(int(found.get("template") or 0)),
        tags=tuple(tag for tag in re.split(r"[;, ]+", str(found.get("tags") or "")) if tag),
        lock=str(found.get("lock") or ""),
        disk_gb=int(found.get("maxdisk") or 0) / _GB,
    )


def _creation_time(configuration: dict[str, Any]) -> int:
    match = re.search(r"\bctime=(\d+)", str(configuration.get("meta", "")))
    return int(match[1]) if match else 0


def _global_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    strange = address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
    return None if strange else address


def check_node(px: Proxmox) -> None:
    """Raises ConfigurationError naming the nodes there are when the configured one is not among them."""
    names = sorted(str(node["node"]) for node in px.get("nodes"))
    if px.node not in names:
        raise ConfigurationError(f"Proxmox has no node '{px.node}'; set proxmox_node to one of: {', '.join(names)}.")
